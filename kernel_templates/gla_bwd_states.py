"""States at the start of every few tokens, which the backward pass reads: the forward recurrence
without its read-out.

    S_{t+1} = 2^Gend . (S_t + kh^T v),     kh = k * 2^-G       (chunk by chunk, as in ``gla_fwd``)

A launch walks [t_begin, t_end) from the state ``h0``. From token ``keep_from`` on it stores the
state before every ``keep`` tokens into ``states``; earlier it stores the one before every
``window`` tokens into ``marks``. So one launch over the whole sequence serves the last window of a
backward pass, and what it marked lets later launches serve the windows before. Range test and
second pass as in ``gla_fwd``.

| tensor | shape           | dtype      | layout                                                |
|--------|-----------------|------------|-------------------------------------------------------|
| k      | [B, T, H, K]    | io         | any b, t, h stride in units of UK, last dim 1         |
| v      | [B, T, H, V]    | io         | likewise, units of UV                                 |
| g      | [B, T, H, K]    | io or fp32 | likewise (vector gate), natural log, <= 0             |
| x      | [B, T, R]       | io         | any b, t stride in units of UR (low rank)             |
| w      | [H*K, R]        | io         | contiguous                                            |
| bias   | [H*K]           | io or fp32 | contiguous, absent when has_bias == 0                 |
| h0     | [B, H, ?, K, V] | fp32       | h0_slots * K * V between heads, absent (has_h0 == 0)  |
| states | [B, H, N, K, V] | state      | contiguous, slot j: before token keep_from + j * keep |
| marks  | [B, H, W, K, V] | fp32       | contiguous, slot j: before token j * window           |

Grid: x = V tiles (fastest) x B*H.
"""

import triton
import triton.language as tl

from glac.kernel_templates._bwd import (
    await_descriptor_stores,
    cumulative_log2_t,
    load_rows,
    logsigmoid_gate,
    lowrank_logits_t,
    triangles,
)
from glac.kernel_templates._exact import START_RANGE_LOG2
from glac.kernel_templates._exact import _steps as gate_steps
from glac.kernel_templates._gate import LOG2E, operand


@triton.jit
def keep_state(
    states, marks, b_s, t, keep_from, keep, window, p_state, m_state,
    K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Store the state before token t where it is wanted."""
    if t >= keep_from:
        if (t - keep_from) % keep == 0:
            p_s = states + ((t - keep_from) // keep).to(tl.int64) * (K * V) + p_state
            tl.store(p_s, b_s.to(states.dtype.element_ty), mask=m_state)
    elif t % window == 0:
        tl.store(marks + (t // window).to(tl.int64) * (K * V) + p_state, b_s, mask=m_state)


@triton.jit
def gla_bwd_states(
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    g,  # [B, T, H, K]
    x,  # [B, T, R]
    w,  # [H*K, R]
    bias,  # [H*K]
    h0,  # [B, H, ?, K, V]
    states,  # [B, H, N, K, V]
    marks,  # [B, H, W, K, V]
    inv_normalizer,
    clamp_log2,
    T,
    H,
    t_begin,
    t_end,
    keep_from,
    keep,
    window,
    h0_slots,
    mark_slots,
    has_h0,
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
    INTERPRETED: tl.constexpr,
):
    NV: tl.constexpr = (V + BV - 1) // BV
    IO: tl.constexpr = v.dtype.element_ty

    pid = tl.program_id(0)
    i_v = pid % NV
    i_bh = pid // NV
    i_b = (i_bh // H).to(tl.int64)
    i_h = i_bh % H

    row = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    v0 = i_v * BV
    o_v = v0 + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V

    k += (i_b * k_b + i_h.to(tl.int64) * k_h) * UK
    v += (i_b * v_b + i_h.to(tl.int64) * v_h) * UV
    row_k = k_t.to(tl.int64) * UK
    row_v = v_t.to(tl.int64) * UV
    b_w = 0.0
    b_bias = 0.0
    if LOWRANK:
        o_r = tl.arange(0, BR)
        m_r = o_r < R
        x += i_b * x_b * UR
        row_x = x_t.to(tl.int64) * UR
        p_w = (i_h * K + o_k)[:, None] * R + o_r[None, :]
        b_w = tl.load(w + p_w, mask=m_k[:, None] & m_r[None, :], other=0.0)  # [BK, BR]
        b_bias = tl.load(bias + i_h * K + o_k, mask=m_k & (has_bias != 0), other=0.0)
        b_bias = b_bias.to(tl.float32) * LOG2E
        SUMMAND: tl.constexpr = tl.float16 if BF16 else tl.float32
    else:
        g += (i_b * g_b + i_h.to(tl.int64) * g_h) * UK
        row_g = g_t.to(tl.int64) * UK
        GATE: tl.constexpr = g.dtype.element_ty
        SUMMAND: tl.constexpr = tl.bfloat16 if BF16 and GATE == tl.float32 else GATE
    upper, _lower = triangles(BT, SUMMAND, BF16)

    s_k = tl.make_tensor_descriptor(k, [T, K], [row_k, 1], [BT, BK]) if TMA else k
    s_v = tl.make_tensor_descriptor(v, [T, V], [row_v, 1], [BT, BV]) if TMA else v
    if not LOWRANK:
        s_g = tl.make_tensor_descriptor(g, [T, K], [row_g, 1], [BT, BK]) if TMA else g
    p_state = o_k[:, None] * V + o_v[None, :]
    m_state = m_k[:, None] & m_v[None, :]
    h0 += i_bh.to(tl.int64) * h0_slots * (K * V)
    n_kept = tl.cdiv(t_end - keep_from, keep)
    states += i_bh.to(tl.int64) * n_kept * (K * V)
    marks += i_bh.to(tl.int64) * mark_slots * (K * V)
    if TMA:
        d_s = tl.make_tensor_descriptor(states, [n_kept * K, V], [V, 1], [BK, BV])

    b_s = tl.load(h0 + p_state, mask=m_state & (has_h0 != 0), other=0.0)  # [BK, BV]
    worst = tl.zeros([BK], dtype=tl.float32)
    for t in tl.range(t_begin, t_end, BT, num_stages=STAGES):
        m_t = t + row < T
        if LOWRANK:
            b_x = load_rows(x, t, 0, row_x, o_r, m_t[:, None] & m_r[None, :], BT, False)
        else:
            b_g = load_rows(s_g, t, 0, row_g, o_k, m_t[:, None] & m_k[None, :], BT, TMA)
        b_k = load_rows(s_k, t, 0, row_k, o_k, m_t[:, None] & m_k[None, :], BT, TMA)
        b_v = operand(load_rows(s_v, t, v0, row_v, o_v, m_t[:, None] & m_v[None, :], BT, TMA), IO)
        if TMA and BK == K:
            if t >= keep_from:
                if (t - keep_from) % keep == 0:
                    slot = (t - keep_from) // keep
                    d_s.store([slot * K, v0], b_s.to(states.dtype.element_ty))
            elif t % window == 0:
                tl.store(marks + (t // window).to(tl.int64) * (K * V) + p_state, b_s, mask=m_state)
        else:
            keep_state(
                states, marks, b_s, t, keep_from, keep, window, p_state, m_state, K, V
            )  # fmt: skip
        if LOWRANK:
            b_y = lowrank_logits_t(b_w, b_x, b_bias, PRECISION)
            b_gt, _slope = logsigmoid_gate(b_y, inv_normalizer, clamp_log2, BF16)
            b_gt = tl.where(m_t[None, :], b_gt, 0.0)  # tokens outside must not decay
        else:
            b_gt = tl.trans(b_g)
        b_cum = cumulative_log2_t(b_gt, upper, LOWRANK, BF16)  # [BK, BT]
        b_end = tl.min(b_cum, 1)  # [BK]
        worst = tl.minimum(worst, b_end)
        kh = operand(tl.trans(b_k) * tl.exp2(-b_cum), IO)  # [BK, BT]
        b_s = tl.dot(kh, b_v, b_s, input_precision=PRECISION)
        b_s = b_s * tl.exp2(b_end)[:, None]

    # Written so that a NaN counts as out of range.
    if not (tl.min(worst, 0) >= -START_RANGE_LOG2):
        if TMA:
            await_descriptor_stores(t_begin, INTERPRETED)
        ro = tl.arange(0, BX)
        w_rows = tl.trans(b_w) if LOWRANK else b_w  # as gate_steps takes it
        b_s = tl.load(h0 + p_state, mask=m_state & (has_h0 != 0), other=0.0)
        for t in tl.range(t_begin, t_end, BX, num_stages=1):
            keep_state(
                states, marks, b_s, t, keep_from, keep, window, p_state, m_state, K, V
            )  # fmt: skip
            t_row = t + ro
            m_t = t_row < T
            m_after = (ro < BX - 1) & (t_row + 1 < T)
            b_step = gate_steps(
                g, x, w_rows, b_bias, inv_normalizer, clamp_log2, t_row, m_t,
                g_t, x_t, o_k, m_k, R, BR, UK, UR, LOWRANK, BF16, PRECISION,
            )  # fmt: skip
            b_after = gate_steps(
                g, x, w_rows, b_bias, inv_normalizer, clamp_log2, t_row + 1, m_after,
                g_t, x_t, o_k, m_k, R, BR, UK, UR, LOWRANK, BF16, PRECISION,
            )  # fmt: skip
            b_k = load_rows(k, t, 0, row_k, o_k, m_t[:, None] & m_k[None, :], BX, False)
            b_v = load_rows(v, t, v0, row_v, o_v, m_t[:, None] & m_v[None, :], BX, False)
            b_e = tl.exp2(tl.cumsum(b_after, 0, reverse=True))  # 2^(Gend - G)
            b_s = b_s * tl.exp2(tl.sum(b_step, 0))[:, None]
            kh = operand(b_k.to(tl.float32) * b_e, IO)
            b_s = tl.dot(tl.trans(kh), operand(b_v, IO), b_s, input_precision=PRECISION)
