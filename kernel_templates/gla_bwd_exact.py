"""The work of ``gla_bwd`` again, exact for every gate, where programs left the anchor's range.

Blocks of BX = 16 rows, back in time. With G the cumulative gate in the block, S the state at its
start (rebuilt from the chunk's kept one), dS the gradient of the state at its end, and
D = 2^Gend . dS:

    dA = tril(do v^T)                     x_ij = dA_ij 2^(G_i - G_j)       (per channel, i >= j)
    dq = scale * ( sum_j x_ij k_j + 2^G . (do S^T) )
    dk = sum_i x_ij (scale q_i) + 2^(Gend - G) . (v dS^T)
    dg_t = sum_{i>=t} (q dq' - k dk')_i + sum_{i<t} (k 2^(Gend - G) . v dS^T)_i + sum_v S . D
    dv = A^T do + (k 2^(Gend - G)) dS
    dS_prev = D + (scale q 2^G)^T do

dq' is dq with its part through the state, dk' is dk without. The terms inside the block are
products of midpoint-anchored tiles while the block's range fits 2^+-64 (level 2 of
docs/numerics.md), and otherwise sums element by element in fp32 whose exponents are sums of steps
(level 3). All other factors are at most 1.

Tensors and grid are those of ``gla_bwd``; a program whose flag is 0 returns at once.
"""

import triton
import triton.language as tl

from glac.kernel_templates._bwd import load_rows, store_rows
from glac.kernel_templates._bwd_exact import block_pairs, gate_rows
from glac.kernel_templates._gate import operand
from glac.kernel_templates._place import place


@triton.jit
def gla_bwd_exact(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    g,  # [B, T, H, K]
    do,  # [B, T, H, V]
    cu,  # [N + 1]
    states,  # [B, HS, C, N_KEPT, K, V]
    dht,  # [N, HS, K, V]
    ends,  # [B, H, S, K, V]
    dq,  # [NV, B, T, H, K]
    dk,  # [NV, B, T, H, K]
    dv,  # [B, T, H, V]
    dg,  # [NV, B, T, H, K]
    dh0,  # [N, H, K, V]
    flags,  # [grid]
    scale,
    T,
    B,
    N,
    H,
    n_seg,
    seg_first,
    seg_count,
    seg_len,
    n_kept,
    q_group,
    k_group,
    s_group,
    chain,
    has_cu,
    has_dht,
    has_dh0,
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
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    BLOCKS: tl.constexpr = BT // BX
    IO: tl.constexpr = v.dtype.element_ty

    pid = tl.program_id(0)
    if tl.load(flags + pid) == 0:
        return
    i_v = pid % NV
    i_k = (pid // NV) % NK
    i_b, i_n, i_h, slot, bos, n_tok, t_begin, t_end, is_first, is_last = place(
        pid // (NV * NK), cu, T, N, H, seg_first, seg_count, seg_len, has_cu
    )
    i_hs = i_h // s_group
    HS = H // s_group

    row = tl.arange(0, BX)
    k0 = i_k * BK
    v0 = i_v * BV
    o_k = k0 + tl.arange(0, BK)
    o_v = v0 + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
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
    out = (((i_v.to(tl.int64) * B + i_b) * T + bos) * H + i_h) * K
    dq += out
    dk += out
    dv += ((i_b * T + bos) * H + i_h) * V
    row_dk = H.to(tl.int64) * K
    row_dv = H.to(tl.int64) * V
    g += (i_b * g_b + bos * g_t + i_hs.to(tl.int64) * g_h) * UK
    row_g = g_t.to(tl.int64) * UK
    dg += out

    n_chunks = tl.cdiv(t_end - t_begin, BT)
    states += ((i_b * HS + i_hs) * seg_count + slot - seg_first) * n_kept * (K * V)
    p_state = o_k[:, None] * V + o_v[None, :]
    m_state = m_k[:, None] & m_v[None, :]
    # What enters at the segment's end. Heads that share a state take its gradient once.
    ends += ((i_b * H + i_h) * n_seg + slot) * (K * V)
    end = dht + (i_n * HS + i_hs) * (K * V)
    has_end = tl.where(i_h % s_group == 0, has_dht, 0)
    if not is_last:
        end = ends
        has_end = tl.where(t_begin < t_end, 1, 0)
    b_ds = tl.load(end + p_state, mask=m_state & (has_end != 0), other=0.0)  # [BK, BV]

    for i in tl.range(0, n_chunks * BLOCKS, num_stages=1):
        i_c = n_chunks - 1 - i // BLOCKS
        blocks_before = BLOCKS - 1 - i % BLOCKS
        p_s = states + i_c.to(tl.int64) * (K * V) + p_state
        b_s = tl.load(p_s, mask=m_state, other=0.0).to(tl.float32)  # [BK, BV]
        for j in tl.range(0, blocks_before, num_stages=1):
            t = t_begin + i_c * BT + j * BX
            m_t = t + row < n_tok
            m_after = (row < BX - 1) & (t + 1 + row < n_tok)
            b_step = gate_rows(g, t, m_t, row_g, o_k, m_k, BX)
            b_after = gate_rows(g, t + 1, m_after, row_g, o_k, m_k, BX)
            b_k = load_rows(k, t, 0, row_k, o_k, m_t[:, None] & m_k[None, :], BX, False)
            b_v = load_rows(v, t, 0, row_v, o_v, m_t[:, None] & m_v[None, :], BX, False)
            kh = operand(b_k.to(tl.float32) * tl.exp2(tl.cumsum(b_after, 0, reverse=True)), IO)
            b_s = b_s * tl.exp2(tl.sum(b_step, 0))[:, None]
            b_s = tl.dot(tl.trans(kh), operand(b_v, IO), b_s, input_precision=PRECISION)

        t = t_begin + i_c * BT + blocks_before * BX
        m_t = t + row < n_tok
        m_tk = m_t[:, None] & m_k[None, :]
        m_tv = m_t[:, None] & m_v[None, :]
        m_after = (row < BX - 1) & (t + 1 + row < n_tok)
        b_step = gate_rows(g, t, m_t, row_g, o_k, m_k, BX)
        b_after = gate_rows(g, t + 1, m_after, row_g, o_k, m_k, BX)
        b_q = load_rows(q, t, 0, row_q, o_k, m_tk, BX, False).to(tl.float32) * scale  # [BX, BK]
        b_k = load_rows(k, t, 0, row_k, o_k, m_tk, BX, False).to(tl.float32)  # [BX, BK]
        b_v = operand(load_rows(v, t, 0, row_v, o_v, m_tv, BX, False), IO)  # [BX, BV]
        b_do = operand(load_rows(do, t, 0, row_do, o_v, m_tv, BX, False), IO)  # [BX, BV]
        b_da = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_da = tl.where(m_low, b_da, 0.0)  # [BX, BX]
        b_a, b_dq, b_dk, b_p = block_pairs(b_q, b_k, b_step, b_da, BX, IO, PRECISION)

        e_start = tl.exp2(tl.cumsum(b_step, 0))  # 2^G
        e_end = tl.exp2(tl.cumsum(b_after, 0, reverse=True))  # 2^(Gend - G)
        decay = tl.exp2(tl.sum(b_step, 0))  # [BK]
        b_out = tl.dot(b_do, tl.trans(operand(b_s, IO)), input_precision=PRECISION) * e_start
        b_in = tl.dot(b_v, tl.trans(operand(b_ds, IO)), input_precision=PRECISION) * e_end
        b_dq += b_out
        b_p += b_q * b_out
        store_rows(dq, (b_dq * scale).to(IO), t, 0, row_dk, o_k, m_tk, BX, False)
        store_rows(dk, (b_dk + b_in).to(IO), t, 0, row_dk, o_k, m_tk, BX, False)
        # The prefix sums have no cancellation; as inclusive sums less the row they would.
        b_dg = tl.dot(strict, b_k * b_in, input_precision="tf32x3")
        b_dg += tl.cumsum(b_p, 0, reverse=True) + (decay * tl.sum(b_s * b_ds, 1))[None, :]
        b_dg = b_dg.to(dg.dtype.element_ty)
        store_rows(dg, b_dg, t, 0, row_dk, o_k, m_tk, BX, False)
        if DV:
            b_a = operand(tl.where(m_low, b_a, 0.0), IO)
            b_dv = tl.dot(tl.trans(b_a), b_do, input_precision=PRECISION)  # [BX, BV]
            kh = operand(b_k * e_end, IO)
            b_dv = tl.dot(kh, operand(b_ds, IO), b_dv, input_precision=PRECISION)
            store_rows(dv, b_dv.to(IO), t, 0, row_dv, o_v, m_tv, BX, False)
        b_ds = b_ds * decay[:, None]
        qh = operand(b_q * e_start, IO)
        b_ds = tl.dot(tl.trans(qh), b_do, b_ds, input_precision=PRECISION)

    start = dh0 + (i_n * H + i_h) * (K * V)
    has_start = has_dh0
    if not is_first:
        start = ends - K * V
        has_start = chain
    tl.store(start + p_state, b_ds, mask=m_state & (has_start != 0))
