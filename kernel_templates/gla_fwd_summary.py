"""What one segment adds to the state, and how much it decays it.

    C_j = sum_{t in segment j} 2^(Gend - G_t) . k_t^T v_t          d_j = Gend (log2, whole segment)

with G the cumulative gate from the segment's start. Same chunks, range test and exact second pass
as ``gla_fwd``, without the read-out. The last segment needs no summary.

| tensor | shape           | dtype      | layout                                        |
|--------|-----------------|------------|-----------------------------------------------|
| k      | [B, T, H, K]    | io         | any b, t, h stride in units of UK, last dim 1 |
| v      | [B, T, H, V]    | io         | likewise, units of UV                         |
| g      | [B, T, H, K]    | io or fp32 | likewise (vector gate), natural log, <= 0     |
| x      | [B, T, R]       | io         | any b, t stride in units of UR (low rank)     |
| w      | [H*K, R]        | io         | contiguous                                    |
| bias   | [H*K]           | io or fp32 | contiguous, absent when has_bias == 0         |
| states | [B, H, S, K, V] | fp32       | contiguous, C_j is written to slot j + 1      |
| decay  | [B, H, S, K]    | fp32       | contiguous, d_j is written to row j           |

Grid: x = V tiles (fastest) x (S - 1) segments x B*H.
"""

import triton
import triton.language as tl

from glac.kernel_templates._exact import START_RANGE_LOG2, exact_segment
from glac.kernel_templates._gate import LOG2E, cumulative_log2, lowrank_gate_log2, operand


@triton.jit
def gla_fwd_summary(
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    g,  # [B, T, H, K]
    x,  # [B, T, R]
    w,  # [H*K, R]
    bias,  # [H*K]
    states,  # [B, H, S, K, V]
    decay,  # [B, H, S, K]
    inv_normalizer,
    clamp_log2,
    T,
    H,
    n_seg,
    seg_len,
    has_bias,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    g_b,
    g_t,
    g_h,
    x_b,
    x_t,
    K: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    UK: tl.constexpr,
    UV: tl.constexpr,
    UR: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BX: tl.constexpr,
    STAGES: tl.constexpr,
    LOWRANK: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    NV: tl.constexpr = (V + BV - 1) // BV
    IO: tl.constexpr = v.dtype.element_ty

    pid = tl.program_id(0)
    i_v = pid % NV
    i_s = (pid // NV) % (n_seg - 1)
    i_bh = pid // (NV * (n_seg - 1))
    i_b = (i_bh // H).to(tl.int64)
    i_h = i_bh % H

    row = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_tri = row[:, None] >= row[None, :]

    k += (i_b * k_b + i_h.to(tl.int64) * k_h) * UK
    v += (i_b * v_b + i_h.to(tl.int64) * v_h) * UV
    row_k = k_t.to(tl.int64) * UK
    row_v = v_t.to(tl.int64) * UV
    if LOWRANK:
        o_r = tl.arange(0, BR)
        m_r = o_r < R
        x += i_b * x_b * UR
        row_x = x_t.to(tl.int64) * UR
        p_w = (i_h * K + o_k)[None, :] * R + o_r[:, None]
        b_w = tl.load(w + p_w, mask=m_k[None, :] & m_r[:, None], other=0.0)  # [BR, BK]
        b_bias = tl.load(bias + i_h * K + o_k, mask=m_k & (has_bias != 0), other=0.0)
        b_bias = b_bias.to(tl.float32) * LOG2E
    else:
        g += (i_b * g_b + i_h.to(tl.int64) * g_h) * UK
        row_g = g_t.to(tl.int64) * UK

    t_begin = i_s * seg_len
    t_end = tl.minimum(t_begin + seg_len, T)
    if TMA:
        d_k = tl.make_tensor_descriptor(k, [T, K], [row_k, 1], [BT, BK])
        d_v = tl.make_tensor_descriptor(v, [T, V], [row_v, 1], [BT, BV])
        if not LOWRANK:
            d_g = tl.make_tensor_descriptor(g, [T, K], [row_g, 1], [BT, BK])

    b_s = tl.zeros([BK, BV], dtype=tl.float32)
    b_d = tl.zeros([BK], dtype=tl.float32)
    worst = tl.zeros([BK], dtype=tl.float32)
    m_cum = m_tri
    for t in tl.range(t_begin, t_end, BT, num_stages=STAGES):
        m_t = t + row < T
        m_tk = m_t[:, None] & m_k[None, :] if BK != K else m_t[:, None]
        m_tv = m_t[:, None] & m_v[None, :] if V % BV != 0 else m_t[:, None]
        if LOWRANK:
            p_x = row[:, None] * (x_t * UR) + o_r[None, :]
            b_x = tl.load(x + t * row_x + p_x, mask=m_t[:, None] & m_r[None, :], other=0.0)
            b_g = lowrank_gate_log2(b_x, b_w, b_bias, inv_normalizer, clamp_log2, BF16, PRECISION)
            # Rows outside the sequence must not decay: cheaper on the triangle than on the gate.
            m_cum = m_tri & m_t[None, :]
        elif TMA:
            b_g = d_g.load([t, 0])
        else:
            p_g = row[:, None] * (g_t * UK) + o_k[None, :]
            b_g = tl.load(g + t * row_g + p_g, mask=m_tk, other=0.0)
        if TMA:
            b_k = d_k.load([t, 0])
            b_v = d_v.load([t, i_v * BV])
        else:
            p_k = row[:, None] * (k_t * UK) + o_k[None, :]
            b_k = tl.load(k + t * row_k + p_k, mask=m_tk, other=0.0)
            p_v = row[:, None] * (v_t * UV) + o_v[None, :]
            b_v = tl.load(v + t * row_v + p_v, mask=m_tv, other=0.0)

        b_cum = cumulative_log2(b_g, m_cum, LOWRANK, BF16)  # [BT, BK]
        b_end = tl.min(b_cum, 0)  # [BK]
        worst = tl.minimum(worst, b_end)
        b_d += b_end
        kh = operand(b_k * tl.exp2(-b_cum), IO)
        b_s = tl.dot(tl.trans(kh), operand(b_v, IO), b_s, input_precision=PRECISION)
        b_s = b_s * tl.exp2(b_end)[:, None]

    i_bhs = i_bh.to(tl.int64) * n_seg + i_s
    states += (i_bhs + 1) * K * V
    decay += i_bhs * K
    # Written so that a NaN counts as out of range.
    if not (tl.min(worst, 0) >= -START_RANGE_LOG2):
        exact_segment(
            k, k, v, g, x, w, bias, v, states, states, decay, 1.0, inv_normalizer, clamp_log2,
            T, t_begin, t_end, i_h, i_v, has_bias, 1, has_bias,
            k_t, k_t, v_t, g_t, x_t, H,
            K, V, R, BK, BR, UK, UV, UR, BV, BX, False, LOWRANK, BF16, PRECISION,
        )  # fmt: skip
    else:
        p_state = o_k[:, None] * V + o_v[None, :]
        tl.store(states + p_state, b_s, mask=m_k[:, None] & m_v[None, :])
        tl.store(decay + o_k, b_d, mask=m_k & (i_v == 0))
