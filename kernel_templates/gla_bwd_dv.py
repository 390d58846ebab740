"""Gradient of the values, walking back in time: the forward's mirror image.

    dv = tril(qh kh^T)^T do + kh D        D = 2^Gend . dS        dS_prev = D + qh^T do

(qh, kh, G, dS as in ``gla_bwd``.) A program holds all key channels and a tile of values, so
nothing is left to be summed. Range test and second pass as in ``gla_fwd``.

| tensor | shape        | dtype      | layout                                        |
|--------|--------------|------------|-----------------------------------------------|
| q, k   | [B, T, H, K] | io         | any b, t, h stride in units of UK, last dim 1 |
| do     | [B, T, H, V] | io         | likewise, units of UV                         |
| g      | [B, T, H, K] | io or fp32 | likewise, natural log, <= 0                   |
| cu     | [N + 1]      | int32      | boundaries of a packed batch, see ``_place``  |
| dht    | [N, HS, K, V] | fp32      | contiguous, absent when has_dht == 0          |
| ends   | [B, H, S, K, V] | fp32    | contiguous, dS at segments' ends, not of the last |
| dv     | [B, T, H, V] | io         | contiguous                                    |

Heads and groups are those of ``gla_fwd``; dv is per head of the output.

Grid: x = V tiles (fastest) x S segments x B*H.
"""

import triton
import triton.language as tl

from glac.kernel_templates._bwd import (
    await_descriptor_stores,
    cumulative_log2_t,
    load_rows,
    store_rows,
    triangles,
)
from glac.kernel_templates._exact import START_RANGE_LOG2, dense_gate_steps, exact_scores
from glac.kernel_templates._gate import operand
from glac.kernel_templates._place import place


@triton.jit
def gla_bwd_dv(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    g,  # [B, T, H, K]
    do,  # [B, T, H, V]
    cu,  # [N + 1]
    dht,  # [N, HS, K, V]
    ends,  # [B, H, S, K, V]
    dv,  # [B, T, H, V]
    scale,
    T,
    N,
    H,
    n_seg,
    seg_len,
    q_group,
    k_group,
    s_group,
    has_cu,
    has_dht,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
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
    STAGES: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    NV: tl.constexpr = (V + BV - 1) // BV
    IO: tl.constexpr = do.dtype.element_ty

    pid = tl.program_id(0)
    i_v = pid % NV
    i_b, i_n, i_h, slot, bos, n_tok, t_begin, t_end, _is_first, is_last = place(
        pid // NV, cu, T, N, H, 0, n_seg, seg_len, has_cu
    )
    i_hs = i_h // s_group

    row = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    v0 = i_v * BV
    o_v = v0 + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_low = row[:, None] >= row[None, :]

    q += (i_b * q_b + bos * q_t + (i_h // q_group).to(tl.int64) * q_h) * UK
    k += (i_b * k_b + bos * k_t + (i_h // k_group).to(tl.int64) * k_h) * UK
    do += (i_b * do_b + bos * do_t + i_h.to(tl.int64) * do_h) * UV
    dv += ((i_b * T + bos) * H + i_h) * V
    row_q = q_t.to(tl.int64) * UK
    row_k = k_t.to(tl.int64) * UK
    row_do = do_t.to(tl.int64) * UV
    row_dv = H.to(tl.int64) * V
    g += (i_b * g_b + bos * g_t + i_hs.to(tl.int64) * g_h) * UK
    row_g = g_t.to(tl.int64) * UK
    GATE: tl.constexpr = g.dtype.element_ty
    SUMMAND: tl.constexpr = tl.bfloat16 if BF16 and GATE == tl.float32 else GATE
    upper, _lower = triangles(BT, SUMMAND, BF16)

    rows = tl.maximum(n_tok, 1)
    s_q = tl.make_tensor_descriptor(q, [rows, K], [row_q, 1], [BT, BK]) if TMA else q
    s_k = tl.make_tensor_descriptor(k, [rows, K], [row_k, 1], [BT, BK]) if TMA else k
    s_do = tl.make_tensor_descriptor(do, [rows, V], [row_do, 1], [BT, BV]) if TMA else do
    s_dv = tl.make_tensor_descriptor(dv, [rows, V], [row_dv, 1], [BT, BV]) if TMA else dv
    s_g = tl.make_tensor_descriptor(g, [rows, K], [row_g, 1], [BT, BK]) if TMA else g
    end = dht + (i_n * (H // s_group) + i_hs) * (K * V)
    has_end = tl.where(i_h % s_group == 0, has_dht, 0)
    if not is_last:
        end = ends + ((i_b * H + i_h) * n_seg + slot) * (K * V)
        has_end = tl.where(t_begin < t_end, 1, 0)
    p_state = o_k[:, None] * V + o_v[None, :]
    m_state = m_k[:, None] & m_v[None, :] & (has_end != 0)
    b_ds = tl.load(end + p_state, mask=m_state, other=0.0)  # [BK, BV]

    n_chunks = tl.cdiv(t_end - t_begin, BT)
    worst = tl.zeros([BK], dtype=tl.float32)
    for i in tl.range(0, n_chunks, num_stages=STAGES):
        t = t_begin + (n_chunks - 1 - i) * BT
        m_t = t + row < n_tok
        m_tk = m_t[:, None] & m_k[None, :]
        m_tv = m_t[:, None] & m_v[None, :]
        b_g = load_rows(s_g, t, 0, row_g, o_k, m_tk, BT, TMA)  # [BT, BK]
        b_q = load_rows(s_q, t, 0, row_q, o_k, m_tk, BT, TMA)  # [BT, BK]
        b_k = load_rows(s_k, t, 0, row_k, o_k, m_tk, BT, TMA)  # [BT, BK]
        b_do = operand(load_rows(s_do, t, v0, row_do, o_v, m_tv, BT, TMA), IO)  # [BT, BV]
        b_gt = tl.trans(b_g)
        b_cum = cumulative_log2_t(b_gt, upper, False, BF16)  # [BK, BT]
        b_end = tl.min(b_cum, 1)  # [BK]
        worst = tl.minimum(worst, b_end)
        qh = operand(tl.trans(b_q) * (tl.exp2(b_cum) * scale), IO)  # [BK, BT]
        kh = operand(tl.trans(b_k) * tl.exp2(-b_cum), IO)  # [BK, BT]
        b_ds = b_ds * tl.exp2(b_end)[:, None]
        b_a = tl.dot(tl.trans(qh), kh, input_precision=PRECISION)  # [BT, BT]
        b_a = operand(tl.where(m_low, b_a, 0.0), IO)
        b_dv = tl.dot(tl.trans(operand(b_ds, IO)), kh, input_precision=PRECISION)  # [BV, BT]
        b_dv = tl.dot(tl.trans(b_do), b_a, b_dv, input_precision=PRECISION)
        b_ds = tl.dot(qh, b_do, b_ds, input_precision=PRECISION)
        store_rows(s_dv, tl.trans(b_dv.to(IO)), t, v0, row_dv, o_v, m_tv, BT, TMA)

    # Written so that a NaN counts as out of range.
    if not (tl.min(worst, 0) >= -START_RANGE_LOG2):
        if TMA:
            await_descriptor_stores(t_begin, INTERPRETED)
        ro = tl.arange(0, BX)
        b_ds = tl.load(end + p_state, mask=m_state, other=0.0)
        n_blocks = tl.cdiv(t_end - t_begin, BX)
        for i in tl.range(0, n_blocks, num_stages=1):
            t = t_begin + (n_blocks - 1 - i) * BX
            t_row = t + ro
            m_t = t_row < n_tok
            m_tk = m_t[:, None] & m_k[None, :]
            m_tv = m_t[:, None] & m_v[None, :]
            m_after = (ro < BX - 1) & (t_row + 1 < n_tok)
            b_step = dense_gate_steps(g, t_row, m_t, g_t, o_k, m_k, UK)
            b_after = dense_gate_steps(g, t_row + 1, m_after, g_t, o_k, m_k, UK)
            b_q = load_rows(q, t, 0, row_q, o_k, m_tk, BX, False).to(tl.float32) * scale
            b_k = load_rows(k, t, 0, row_k, o_k, m_tk, BX, False).to(tl.float32)
            b_do = operand(load_rows(do, t, v0, row_do, o_v, m_tv, BX, False), IO)
            b_a = exact_scores(b_q, b_k, b_step, BX, IO, PRECISION)
            b_a = operand(tl.where(ro[:, None] >= ro[None, :], b_a, 0.0), IO)
            kh = operand(b_k * tl.exp2(tl.cumsum(b_after, 0, reverse=True)), IO)  # Gend - G
            b_dv = tl.dot(kh, operand(b_ds, IO), input_precision=PRECISION)  # [BX, BV]
            b_dv = tl.dot(tl.trans(b_a), b_do, b_dv, input_precision=PRECISION)
            store_rows(dv, b_dv.to(IO), t, v0, row_dv, o_v, m_tv, BX, False)
            qh = operand(b_q * tl.exp2(tl.cumsum(b_step, 0)), IO)
            b_ds = b_ds * tl.exp2(tl.sum(b_step, 0))[:, None]
            b_ds = tl.dot(tl.trans(qh), b_do, b_ds, input_precision=PRECISION)
