"""The work of ``gla_bwd_walks`` again, exact for every gate, where segments left the range.

Blocks of BX = 16 rows, with the mathematics of ``_exact``, and back in time of its mirror image:

    dv      = tril(A)^T do + (k * 2^(Gend - G)) dS          A_ij = sum_k q_ik k_jk 2^(G_ik - G_jk)
    dS_prev = 2^Gend . dS + (scale * q * 2^G)^T do

Tensors and grid are those of ``gla_bwd_walks``; a program whose segment has no flag returns.
"""

import triton
import triton.language as tl

from glac.kernel_templates._bwd import load_rows, store_rows
from glac.kernel_templates._exact import dense_gate_steps, exact_scores
from glac.kernel_templates._flags import flagged
from glac.kernel_templates._gate import operand
from glac.kernel_templates._place import place


@triton.jit
def gla_bwd_walks_exact(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    g,  # [B, T, H, K]
    do,  # [B, T, H, V]
    cu,  # [N + 1]
    h0,  # [N, HS, K, V]
    starts,  # [B, HS, S, K, V]
    dht,  # [N, HS, K, V]
    ends,  # [B, H, S, K, V]
    qs,  # [B, H, C, BT, BK]
    ks,  # [B, H, C, BT, BK]
    scores,  # [B, H, C, BT, BT]
    decays,  # [B, H, C, BK]
    flags,  # [B, H, C]
    states,  # [B, HS, S, N_KEPT, K, V]
    dstates,  # [B, H, S, N_KEPT, K, V]
    dv,  # [B, T, H, V]
    dh0,  # [N, H, K, V]
    scale,
    T,
    N,
    H,
    n_seg,
    seg_len,
    n_chunks,
    keep,
    n_kept,
    q_group,
    k_group,
    s_group,
    has_cu,
    has_h0,
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
    BK: tl.constexpr,
    UK: tl.constexpr,
    UV: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    NV: tl.constexpr = (V + BV - 1) // BV
    IO: tl.constexpr = do.dtype.element_ty
    STATE: tl.constexpr = states.dtype.element_ty

    pid = tl.program_id(0)
    i_v = pid % NV
    walks_back = (pid // NV) % 2 == 0
    i_b, i_n, i_h, slot, bos, n_tok, t_begin, t_end, is_first, is_last = place(
        pid // (2 * NV), cu, T, N, H, 0, n_seg, seg_len, has_cu
    )
    # The sequence's first chunk, as gla_prepare placed it.
    chunk = (i_b * H + i_h) * n_chunks + tl.where(has_cu != 0, bos // BT + i_n, 0)
    if flagged(flags + chunk, t_begin, t_end, BT) == 0:
        return
    i_hs = i_h // s_group
    HS = H // s_group

    ro = tl.arange(0, BX)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    p_state = o_k[None, :] * V + o_v[:, None]  # [BV, BK]
    m_state = m_k[None, :] & m_v[:, None]
    n_blocks = tl.cdiv(t_end - t_begin, BX)

    k += (i_b * k_b + bos * k_t + (i_h // k_group).to(tl.int64) * k_h) * UK
    row_k = k_t.to(tl.int64) * UK
    g += (i_b * g_b + bos * g_t + i_hs.to(tl.int64) * g_h) * UK

    if walks_back:
        q += (i_b * q_b + bos * q_t + (i_h // q_group).to(tl.int64) * q_h) * UK
        do += (i_b * do_b + bos * do_t + i_h.to(tl.int64) * do_h) * UV
        dv += ((i_b * T + bos) * H + i_h) * V
        row_q = q_t.to(tl.int64) * UK
        row_do = do_t.to(tl.int64) * UV
        row_dv = H.to(tl.int64) * V
        dstates += ((i_b * H + i_h) * n_seg + slot) * n_kept * (K * V)
        end = dht + (i_n * HS + i_hs) * (K * V)
        has_end = tl.where(i_h % s_group == 0, has_dht, 0)
        if not is_last:
            end = ends + ((i_b * H + i_h) * n_seg + slot) * (K * V)
            has_end = tl.where(t_begin < t_end, 1, 0)
        b_ds = tl.load(end + p_state, mask=m_state & (has_end != 0), other=0.0)  # [BV, BK]
        i_last = (tl.cdiv(t_end - t_begin, BT) - 1) * BT // keep
        tl.store(dstates + i_last.to(tl.int64) * (K * V) + p_state, b_ds.to(STATE), mask=m_state)
        for i in tl.range(0, n_blocks, num_stages=1):
            t_in = (n_blocks - 1 - i) * BX
            t = t_begin + t_in
            t_row = t + ro
            m_t = t_row < n_tok
            m_tk = m_t[:, None] & m_k[None, :]
            m_tv = m_t[:, None] & m_v[None, :]
            m_after = (ro < BX - 1) & (t_row + 1 < n_tok)
            b_step = dense_gate_steps(g, t_row, m_t, g_t, o_k, m_k, UK)
            b_after = dense_gate_steps(g, t_row + 1, m_after, g_t, o_k, m_k, UK)
            b_q = load_rows(q, t, 0, row_q, o_k, m_tk, BX, False).to(tl.float32) * scale
            b_k = load_rows(k, t, 0, row_k, o_k, m_tk, BX, False).to(tl.float32)
            b_do = operand(load_rows(do, t, 0, row_do, o_v, m_tv, BX, False), IO)  # [BX, BV]
            b_a = exact_scores(b_q, b_k, b_step, BX, IO, PRECISION)
            b_a = operand(tl.where(ro[:, None] >= ro[None, :], b_a, 0.0), IO)
            kh = operand(b_k * tl.exp2(tl.cumsum(b_after, 0, reverse=True)), IO)  # Gend - G
            # [BX, BV]
            b_dv = tl.dot(kh, tl.trans(operand(b_ds, IO)), input_precision=PRECISION)
            b_dv = tl.dot(tl.trans(b_a), b_do, b_dv, input_precision=PRECISION)
            store_rows(dv, b_dv.to(IO), t, 0, row_dv, o_v, m_tv, BX, False)
            qh = operand(b_q * tl.exp2(tl.cumsum(b_step, 0)), IO)  # [BX, BK]
            b_ds = b_ds * tl.exp2(tl.sum(b_step, 0))[None, :]
            b_ds = tl.dot(tl.trans(b_do), qh, b_ds, input_precision=PRECISION)
            if (t_in % keep == 0) & (t_in > 0):
                p_s = dstates + (t_in // keep - 1).to(tl.int64) * (K * V) + p_state
                tl.store(p_s, b_ds.to(STATE), mask=m_state)
        p_dh0 = dh0 + (i_n * H + i_h) * (K * V) + p_state
        tl.store(p_dh0, b_ds, mask=m_state & is_first & (has_dh0 != 0))
    elif i_h % s_group == 0:
        v += (i_b * v_b + bos * v_t + i_hs.to(tl.int64) * v_h) * UV
        row_v = v_t.to(tl.int64) * UV
        states += ((i_b * HS + i_hs) * n_seg + slot) * n_kept * (K * V)
        start = h0 + (i_n * HS + i_hs) * (K * V)
        has_start = has_h0
        if not is_first:
            start = starts + ((i_b * HS + i_hs) * n_seg + slot) * (K * V)
            has_start = tl.where(t_begin < t_end, 1, 0)
        b_s = tl.load(start + p_state, mask=m_state & (has_start != 0), other=0.0)  # [BV, BK]
        for i in tl.range(0, n_blocks, num_stages=1):
            t_in = i * BX
            t = t_begin + t_in
            t_row = t + ro
            m_t = t_row < n_tok
            m_after = (ro < BX - 1) & (t_row + 1 < n_tok)
            if t_in % keep == 0:
                p_s = states + (t_in // keep).to(tl.int64) * (K * V) + p_state
                tl.store(p_s, b_s.to(STATE), mask=m_state)
            b_step = dense_gate_steps(g, t_row, m_t, g_t, o_k, m_k, UK)
            b_after = dense_gate_steps(g, t_row + 1, m_after, g_t, o_k, m_k, UK)
            m_tk = m_t[:, None] & m_k[None, :]
            b_k = load_rows(k, t, 0, row_k, o_k, m_tk, BX, False).to(tl.float32)
            m_tv = m_t[:, None] & m_v[None, :]
            b_v = operand(load_rows(v, t, 0, row_v, o_v, m_tv, BX, False), IO)  # [BX, BV]
            kh = operand(b_k * tl.exp2(tl.cumsum(b_after, 0, reverse=True)), IO)
            b_s = b_s * tl.exp2(tl.sum(b_step, 0))[None, :]
            b_s = tl.dot(tl.trans(b_v), kh, b_s, input_precision=PRECISION)
