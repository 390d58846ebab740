"""The work of ``gla_bwd_chunks`` again, exact for every gate, where a chunk left the range.

The mathematics is that of ``gla_bwd_exact``: blocks of BX = 16 rows, with the state at a block's
start found again from the kept S before it, and the gradient of the state at its end from the kept
dS behind it.
A program holds only a tile of V of either at a time.

Tensors and grid are those of ``gla_bwd_chunks``; a program whose flag is 0 returns at once.
"""

import triton
import triton.language as tl

from glac.kernel_templates._bwd import load_rows, store_rows
from glac.kernel_templates._bwd_exact import block_pairs, gate_rows
from glac.kernel_templates._gate import operand
from glac.kernel_templates._place import place


@triton.jit
def gla_bwd_chunks_exact(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    g,  # [B, T, H, K]
    do,  # [B, T, H, V]
    cu,  # [N + 1]
    qs,  # not read
    ks,
    decays,
    ranges,
    states,  # [B, HS, S, N_KEPT, K, V]
    dstates,  # [B, H, S, N_KEPT, K, V]
    dq,  # [B, T, H, K]
    dk,  # [B, T, H, K]
    dg,  # [B, T, H, K]
    flags,  # [grid]
    scale,
    T,
    N,
    H,
    n_seg,
    seg_len,
    n_kept,
    n_prepared,
    prepared,
    q_group,
    k_group,
    s_group,
    has_cu,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    do_b,
    do_t,
    do_h,
    g_b,
    g_t,
    g_h,
    K: tl.constexpr,
    V: tl.constexpr,
    UK: tl.constexpr,
    UV: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BX: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    NK: tl.constexpr = (K + BK - 1) // BK
    BLOCKS: tl.constexpr = BT // BX
    IO: tl.constexpr = v.dtype.element_ty

    pid = tl.program_id(0)
    if tl.load(flags + pid) == 0:
        return
    i_k = pid % NK
    i_c = (pid // NK) % (n_kept * KEEP)
    i_b, _i_n, i_h, slot, bos, n_tok, t_begin, _t_end, _is_first, _is_last = place(
        pid // (NK * n_kept * KEEP), cu, T, N, H, 0, n_seg, seg_len, has_cu
    )
    # Of the kept state, and how many blocks of its tokens are before the chunk.
    t_kept = t_begin + i_c // KEEP * (KEEP * BT)
    before = i_c % KEEP * BLOCKS
    i_hs = i_h // s_group
    HS = H // s_group
    chunk = slot.to(tl.int64) * (n_kept * KEEP) + i_c
    n_chunks = n_seg * (n_kept * KEEP)

    row = tl.arange(0, BX)
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < K
    m_low = row[:, None] >= row[None, :]
    strict = (row[:, None] > row[None, :]).to(tl.float32)

    q += (i_b * q_b + bos * q_t + (i_h // q_group).to(tl.int64) * q_h) * UK
    k += (i_b * k_b + bos * k_t + (i_h // k_group).to(tl.int64) * k_h) * UK
    v += (i_b * v_b + bos * v_t + i_hs.to(tl.int64) * v_h) * UV
    do += (i_b * do_b + bos * do_t + i_h.to(tl.int64) * do_h) * UV
    row_q = q_t.to(tl.int64) * UK
    row_k = k_t.to(tl.int64) * UK
    row_v = v_t.to(tl.int64) * UV
    row_do = do_t.to(tl.int64) * UV
    out = ((i_b * T + bos) * H + i_h) * K
    row_dk = H.to(tl.int64) * K
    states += ((i_b * HS + i_hs) * n_chunks + chunk) // KEEP * (K * V)
    dstates += ((i_b * H + i_h) * n_chunks + chunk) // KEEP * (K * V)
    g += (i_b * g_b + bos * g_t + i_hs.to(tl.int64) * g_h) * UK
    row_g = g_t.to(tl.int64) * UK

    for block in tl.range(before, before + BLOCKS, num_stages=1):
        # What passes through the state, over tiles of V.
        t = t_kept + block * BX
        m_t = t + row < n_tok
        b_da = tl.zeros([BX, BX], dtype=tl.float32)
        b_out = tl.zeros([BX, BK], dtype=tl.float32)
        b_in = tl.zeros([BX, BK], dtype=tl.float32)
        b_total = tl.zeros([BK], dtype=tl.float32)
        for v0 in tl.range(0, V, BV, num_stages=1):
            o_v = v0 + tl.arange(0, BV)
            m_v = o_v < V
            p_state = o_k[:, None] * V + o_v[None, :]
            m_state = m_k[:, None] & m_v[None, :]
            b_s = tl.load(states + p_state, mask=m_state, other=0.0).to(tl.float32)  # [BK, BV]
            b_ds = tl.load(dstates + p_state, mask=m_state, other=0.0).to(tl.float32)
            for j in tl.range(0, block, num_stages=1):
                t_j = t_kept + j * BX
                m_j = t_j + row < n_tok
                m_after = (row < BX - 1) & (t_j + 1 + row < n_tok)
                b_step = gate_rows(g, t_j, m_j, row_g, o_k, m_k, BX)
                b_after = gate_rows(g, t_j + 1, m_after, row_g, o_k, m_k, BX)
                b_k = load_rows(k, t_j, 0, row_k, o_k, m_j[:, None] & m_k[None, :], BX, False)
                b_v = load_rows(v, t_j, 0, row_v, o_v, m_j[:, None] & m_v[None, :], BX, False)
                kh = operand(b_k.to(tl.float32) * tl.exp2(tl.cumsum(b_after, 0, reverse=True)), IO)
                b_s = b_s * tl.exp2(tl.sum(b_step, 0))[:, None]
                b_s = tl.dot(tl.trans(kh), operand(b_v, IO), b_s, input_precision=PRECISION)
            for j in tl.range(0, KEEP * BLOCKS - 1 - block, num_stages=1):
                t_j = t_kept + (KEEP * BLOCKS - 1 - j) * BX
                m_j = t_j + row < n_tok
                b_step = gate_rows(g, t_j, m_j, row_g, o_k, m_k, BX)
                b_q = load_rows(q, t_j, 0, row_q, o_k, m_j[:, None] & m_k[None, :], BX, False)
                b_do = load_rows(do, t_j, 0, row_do, o_v, m_j[:, None] & m_v[None, :], BX, False)
                qh = operand(b_q.to(tl.float32) * scale * tl.exp2(tl.cumsum(b_step, 0)), IO)
                b_ds = b_ds * tl.exp2(tl.sum(b_step, 0))[:, None]
                b_ds = tl.dot(tl.trans(qh), operand(b_do, IO), b_ds, input_precision=PRECISION)
            m_tv = m_t[:, None] & m_v[None, :]
            b_v = operand(load_rows(v, t, 0, row_v, o_v, m_tv, BX, False), IO)  # [BX, BV]
            b_do = operand(load_rows(do, t, 0, row_do, o_v, m_tv, BX, False), IO)  # [BX, BV]
            b_da = tl.dot(b_do, tl.trans(b_v), b_da, input_precision=PRECISION)
            # fmt: off
            b_out = tl.dot(b_do, tl.trans(operand(b_s, IO)), b_out, input_precision=PRECISION)
            b_in = tl.dot(b_v, tl.trans(operand(b_ds, IO)), b_in, input_precision=PRECISION)
            # fmt: on
            b_total += tl.sum(b_s * b_ds, 1)

        m_tk = m_t[:, None] & m_k[None, :]
        m_after = (row < BX - 1) & (t + 1 + row < n_tok)
        b_step = gate_rows(g, t, m_t, row_g, o_k, m_k, BX)
        b_after = gate_rows(g, t + 1, m_after, row_g, o_k, m_k, BX)
        b_q = load_rows(q, t, 0, row_q, o_k, m_tk, BX, False).to(tl.float32) * scale  # [BX, BK]
        b_k = load_rows(k, t, 0, row_k, o_k, m_tk, BX, False).to(tl.float32)  # [BX, BK]
        b_da = tl.where(m_low, b_da, 0.0)  # [BX, BX]
        _b_a, b_dq, b_dk, b_p = block_pairs(b_q, b_k, b_step, b_da, BX, IO, PRECISION)
        b_out = b_out * tl.exp2(tl.cumsum(b_step, 0))  # 2^G
        b_in = b_in * tl.exp2(tl.cumsum(b_after, 0, reverse=True))  # 2^(Gend - G)
        b_dq += b_out
        b_p += b_q * b_out
        store_rows(dq + out, (b_dq * scale).to(IO), t, 0, row_dk, o_k, m_tk, BX, False)
        store_rows(dk + out, (b_dk + b_in).to(IO), t, 0, row_dk, o_k, m_tk, BX, False)
        # The prefix sums have no cancellation; as inclusive sums less the row they would.
        b_dg = tl.dot(strict, b_k * b_in, input_precision="tf32x3")
        b_total = b_total * tl.exp2(tl.sum(b_step, 0))
        b_dg += tl.cumsum(b_p, 0, reverse=True) + b_total[None, :]
        b_dg = b_dg.to(dg.dtype.element_ty)
        store_rows(dg + out, b_dg, t, 0, row_dk, o_k, m_tk, BX, False)
