"""The recurrence of the state without its read-out: states inside segments, or what segments add.

    forward    S' = 2^Gend . S + (k * 2^(Gend - G))^T v      chunk by chunk, G the cumulative gate
    reverse    D' = 2^Gend . D + (q * 2^G)^T do              in the chunk (log2)

Both factors are at most 1 for every gate <= 0, so neither direction has a range to leave. A launch
does one of two things with its segments (``_place``):

- *keep*: walk from the state before the segment (``h0`` or ``starts``) and store the state before
  every ``keep`` tokens into ``states``, for the backward pass. With ``from_start`` the walk begins
  at token 0, and stores the state before every earlier segment into ``starts`` on its way.
- *summarise*: walk from zero and store what the segment adds to the state behind it, times
  ``out_scale``, into the next slot of ``starts`` (in reverse: the slot before), and its total gate
  into ``decay``; ``gla_combine`` chains these. The last segment (in reverse: the first) adds to
  nothing and returns. With STOPS the walk goes the other way and ends where nothing is left to
  add (``_summary``).

In reverse, k stands for q, v for do and ``starts`` for the gradients of states at segments' ends.

| tensor | shape           | dtype      | layout                                                  |
|--------|-----------------|------------|---------------------------------------------------------|
| k      | [B, T, Hk, K]   | io         | any b, t, h stride in units of UK, last dim 1           |
| v      | [B, T, Hv, V]   | io         | likewise, units of UV                                   |
| g      | [B, T, Hg, K]   | io or fp32 | likewise (vector gate), natural log, <= 0               |
| x      | [B, T, R]       | io         | any b, t stride in units of UR (low rank)               |
| w      | [Hg*K, R]       | io         | contiguous                                              |
| bias   | [Hg*K]          | io or fp32 | contiguous, absent when has_bias == 0                   |
| cu     | [N + 1]         | int32      | boundaries of a packed batch, see ``_place``            |
| h0     | [N, H, K, V]    | fp32       | contiguous, absent when has_h0 == 0                     |
| starts | [B, H, S, K, V] | fp32       | contiguous                                              |
| states | [B, H, C, N_KEPT, K, V] | state | contiguous, for the seg_count segments of the launch |
| decay  | [B, H, S, K]    | fp32       | contiguous                                              |

Head i of H reads k of head i // k_group, v of i // v_group and the gate of i // g_group.

Grid: x = V tiles (fastest) x seg_count segments x B*H.
"""

import triton
import triton.language as tl

from glac.kernel_templates._bwd import (
    cumulative_log2_t,
    load_rows,
    logsigmoid_gate,
    lowrank_logits_t,
    triangles,
)
from glac.kernel_templates._gate import LOG2E, clamped, operand
from glac.kernel_templates._place import place
from glac.kernel_templates._summary import summary_walk


@triton.jit
def gla_states(
    k,  # [B, T, Hk, K]
    v,  # [B, T, Hv, V]
    g,  # [B, T, Hg, K]
    x,  # [B, T, R]
    w,  # [Hg*K, R]
    bias,  # [Hg*K]
    cu,  # [N + 1]
    h0,  # [N, H, K, V]
    starts,  # [B, H, S, K, V]
    states,  # [B, H, C, N_KEPT, K, V]
    decay,  # [B, H, S, K]
    out_scale,
    inv_normalizer,
    clamp_log2,
    T,
    N,
    H,
    n_seg,
    seg_first,
    seg_count,
    seg_len,
    keep,
    n_kept,
    k_group,
    v_group,
    g_group,
    reverse,
    summarise,
    from_start,
    has_cu,
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
    STAGES: tl.constexpr,
    STOPS: tl.constexpr,
    LOWRANK: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    NV: tl.constexpr = (V + BV - 1) // BV
    IO: tl.constexpr = v.dtype.element_ty

    pid = tl.program_id(0)
    i_v = pid % NV
    i_b, i_n, i_h, slot, bos, n_tok, t_begin, t_end, is_first, is_last = place(
        pid // NV, cu, T, N, H, seg_first, seg_count, seg_len, has_cu
    )
    i_hg = i_h // g_group

    row = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    v0 = i_v * BV
    o_v = v0 + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V

    k += (i_b * k_b + bos * k_t + (i_h // k_group).to(tl.int64) * k_h) * UK
    v += (i_b * v_b + bos * v_t + (i_h // v_group).to(tl.int64) * v_h) * UV
    row_k = k_t.to(tl.int64) * UK
    row_v = v_t.to(tl.int64) * UV
    if LOWRANK:
        o_r = tl.arange(0, BR)
        m_r = o_r < R
        x += (i_b * x_b + bos * x_t) * UR
        row_x = x_t.to(tl.int64) * UR
        p_w = (i_hg * K + o_k)[:, None] * R + o_r[None, :]
        b_w = tl.load(w + p_w, mask=m_k[:, None] & m_r[None, :], other=0.0)  # [BK, BR]
        b_bias = tl.load(bias + i_hg * K + o_k, mask=m_k & (has_bias != 0), other=0.0)
        b_bias = b_bias.to(tl.float32) * LOG2E
        SUMMAND: tl.constexpr = tl.float16 if BF16 else tl.float32
    else:
        g += (i_b * g_b + bos * g_t + i_hg.to(tl.int64) * g_h) * UK
        row_g = g_t.to(tl.int64) * UK
        GATE: tl.constexpr = g.dtype.element_ty
        SUMMAND: tl.constexpr = tl.bfloat16 if BF16 and GATE == tl.float32 else GATE
    upper, _lower = triangles(BT, SUMMAND, BF16)

    rows = tl.maximum(n_tok, 1)
    s_k = tl.make_tensor_descriptor(k, [rows, K], [row_k, 1], [BT, BK]) if TMA else k
    s_v = tl.make_tensor_descriptor(v, [rows, V], [row_v, 1], [BT, BV]) if TMA else v
    if not LOWRANK:
        s_g = tl.make_tensor_descriptor(g, [rows, K], [row_g, 1], [BT, BK]) if TMA else g
    p_state = o_k[:, None] * V + o_v[None, :]
    m_state = m_k[:, None] & m_v[None, :]
    i_bh = i_b * H + i_h
    starts += i_bh * n_seg * (K * V)
    states += (i_bh * seg_count + slot - seg_first) * n_kept * (K * V)
    if TMA and BK == K:
        d_s = tl.make_tensor_descriptor(states, [n_kept * K, V], [V, 1], [BK, BV])

    t_walk = t_begin
    keep_from = t_begin
    start = h0 + (i_n * H + i_h) * (K * V)
    has_start = has_h0
    if summarise != 0:
        has_start = has_h0 * 0
        keep_from = t_end
        if (is_last & (reverse == 0)) | (is_first & (reverse != 0)):
            t_walk = t_end
    elif from_start != 0:
        t_walk = t_begin * 0
    elif not is_first:
        start = starts + slot.to(tl.int64) * (K * V)
        has_start = tl.where(t_begin < t_end, 1, 0)
    b_s = tl.load(start + p_state, mask=m_state & (has_start != 0), other=0.0)  # [BK, BV]

    b_total = tl.zeros([BK], dtype=tl.float32)
    # Weights of G and Gend in the exponent of the factor: Gend - G, in reverse G.
    sign = tl.where(reverse != 0, 1.0, -1.0)
    whole = tl.where(reverse != 0, 0.0, 1.0)
    n_chunks = tl.cdiv(t_end - t_walk, BT)
    if STOPS:
        if summarise != 0:
            if LOWRANK:
                l_g = x
                l_w = b_w
                l_bias = b_bias
                row_l = row_x
            else:
                l_g = s_g
                l_w = 0.0
                l_bias = 0.0
                row_l = row_g
            b_s, b_total = summary_walk(
                b_s, s_k, s_v, l_g, l_w, l_bias, inv_normalizer, clamp_log2, upper, reverse,
                t_walk, t_end, n_tok, v0, row_k, row_v, row_l, m_k, m_v,
                R, BR, BK, BV, BT, STAGES, LOWRANK, BF16, PRECISION, TMA,
            )  # fmt: skip
            n_chunks = n_chunks * 0
    c_first = tl.where(reverse != 0, n_chunks - 1, 0)
    c_step = tl.where(reverse != 0, -1, 1)
    for i in tl.range(0, n_chunks, num_stages=STAGES):
        t = t_walk + (c_first + i * c_step) * BT
        m_t = t + row < n_tok
        if LOWRANK:
            b_x = load_rows(x, t, 0, row_x, o_r, m_t[:, None] & m_r[None, :], BT, False)
        else:
            b_g = load_rows(s_g, t, 0, row_g, o_k, m_t[:, None] & m_k[None, :], BT, TMA)
        b_k = load_rows(s_k, t, 0, row_k, o_k, m_t[:, None] & m_k[None, :], BT, TMA)
        b_v = operand(load_rows(s_v, t, v0, row_v, o_v, m_t[:, None] & m_v[None, :], BT, TMA), IO)
        if t >= keep_from:
            if (t - keep_from) % keep == 0:
                i_kept = (t - keep_from) // keep
                if TMA and BK == K:
                    d_s.store([i_kept * K, v0], b_s.to(states.dtype.element_ty))
                else:
                    p_s = states + i_kept.to(tl.int64) * (K * V) + p_state
                    tl.store(p_s, b_s.to(states.dtype.element_ty), mask=m_state)
        elif (from_start != 0) & (t % seg_len == 0) & (t > 0):
            tl.store(starts + (t // seg_len).to(tl.int64) * (K * V) + p_state, b_s, mask=m_state)
        if LOWRANK:
            b_y = lowrank_logits_t(b_w, b_x, b_bias, PRECISION)
            b_gt = logsigmoid_gate(b_y, inv_normalizer, clamp_log2, BF16)
            b_gt = tl.where(m_t[None, :], b_gt, 0.0)  # tokens outside must not decay
        else:
            b_gt = clamped(tl.trans(b_g))
        b_cum = cumulative_log2_t(b_gt, upper, LOWRANK, BF16)  # [BK, BT]
        b_end = tl.min(b_cum, 1)  # [BK], the last column: g <= 0 makes G fall along the chunk
        b_total += b_end
        if PRECISION == "tf32x3":
            # A difference of sums loses small steps beside a reset, which fp32 inputs would show.
            after = (row[:, None] > row[None, :]).to(tl.float32)
            x_log2 = b_gt if LOWRANK else b_gt * LOG2E
            b_after = tl.dot(x_log2, after, input_precision=PRECISION)
            b_e = tl.where(reverse != 0, b_cum, b_after)
        else:
            b_e = b_cum * sign + b_end[:, None] * whole
        kh = operand(tl.trans(b_k) * tl.exp2(b_e), IO)  # [BK, BT]
        b_s = b_s * tl.exp2(b_end)[:, None]
        b_s = tl.dot(kh, b_v, b_s, input_precision=PRECISION)

    if (summarise != 0) & (t_walk < t_end):
        target = starts + (slot + c_step).to(tl.int64) * (K * V)
        tl.store(target + p_state, b_s * out_scale, mask=m_state)
        p_decay = decay + (i_bh * n_seg + slot) * K + o_k
        tl.store(p_decay, b_total, mask=m_k & (i_v == 0))
