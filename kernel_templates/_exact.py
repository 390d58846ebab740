"""One segment of the recurrence, right for every gate g <= 0 including -inf, 16 rows at a time.

Used where the single-anchor form is out of range. With G the cumulative gate of a block of rows:

    o      = scale * ( tril(A) v + (q * 2^G) S )        A_ij = sum_k q_ik k_jk 2^(G_ik - G_jk)
    S_next = 2^Gend . S + (k * 2^(Gend - G))^T v

Read-out and update need no anchor: both factors are at most 1. ``Gend - G`` is summed from the end
of the block rather than subtracted. A is one product of midpoint-anchored tiles while the range of
G fits 2^+-64, otherwise it is summed element by element in fp32, each exponent a sum of steps.
"""

import triton
import triton.language as tl

from glac.kernel_templates._gate import LOG2E, STEP_MIN_LOG2, lowrank_gate_log2, operand

START_RANGE_LOG2 = tl.constexpr(80.0)
"""How far a channel may decay in a chunk before the start anchor is out of range."""
MIDPOINT_RANGE_LOG2 = tl.constexpr(128.0)


@triton.jit
def exact_scores(b_q, b_k, b_step, BT: tl.constexpr, IO: tl.constexpr, PRECISION: tl.constexpr):
    """``[BT, BT]`` scores, exact on and below the diagonal; above it the values mean nothing."""
    row = tl.arange(0, BT)
    # From the first row on: its own step decays no score of the block, and may be a reset.
    b_rel = tl.cumsum(tl.where((row == 0)[:, None], 0.0, b_step), 0)
    last = tl.min(b_rel, 0)
    if tl.min(last, 0) >= -MIDPOINT_RANGE_LOG2:
        anchor = (0.5 * last)[None, :]
        qm = operand(b_q * tl.exp2(b_rel - anchor), IO)
        km = operand(b_k * tl.exp2(anchor - b_rel), IO)
        scores = tl.dot(qm, tl.trans(km), input_precision=PRECISION)
    else:
        # Column by column from the right, so that the decay from j to each row is a sum of steps.
        # As a difference of cumulative sums it would lose the small steps beside a reset: 5e-5.
        scores = tl.zeros([BT, BT], dtype=tl.float32)
        gap = tl.zeros_like(b_step)
        for i in range(BT):
            j = BT - 1 - i
            pick = (row == j)[:, None]
            k_j = tl.sum(tl.where(pick, b_k, 0.0), 0)
            column = tl.sum(b_q * k_j[None, :] * tl.exp2(gap), 1)
            scores = tl.where((row == j)[None, :], column[:, None], scores)
            step_j = tl.sum(tl.where(pick, b_step, 0.0), 0)
            gap = tl.where((row >= j)[:, None], gap + step_j[None, :], gap)
    return scores


@triton.jit
def gate_steps(
    g,  # [T, K] of this head
    x,  # [T, R] of this sequence
    b_w,  # [BR, BK]
    b_bias,  # [BK]
    inv_normalizer,
    clamp_log2,
    t_row,  # [BX] tokens
    m_row,  # [BX]
    g_t,
    x_t,
    o_k,
    m_k,
    R: tl.constexpr,
    BR: tl.constexpr,
    UK: tl.constexpr,
    UR: tl.constexpr,
    LOWRANK: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``[BX, BK]`` gate of each step, log2, clamped to 2^-160; 0 where ``m_row`` is off."""
    if LOWRANK:
        o_r = tl.arange(0, BR)
        p_x = t_row[:, None] * (x_t.to(tl.int64) * UR) + o_r[None, :]
        b_x = tl.load(x + p_x, mask=m_row[:, None] & (o_r < R)[None, :], other=0.0)
        b_g = lowrank_gate_log2(b_x, b_w, b_bias, inv_normalizer, clamp_log2, BF16, PRECISION)
        b_g = tl.where(m_row[:, None], b_g, 0.0)
    else:
        p_g = t_row[:, None] * (g_t.to(tl.int64) * UK) + o_k[None, :]
        b_g = tl.load(g + p_g, mask=m_row[:, None] & m_k[None, :], other=0.0)
        b_g = b_g.to(tl.float32) * LOG2E
    return tl.maximum(b_g, STEP_MIN_LOG2)


@triton.jit
def dense_gate_steps(g, t_row, m_row, g_t, o_k, m_k, UK: tl.constexpr):
    """``gate_steps`` of a dense gate."""
    return gate_steps(
        g, g, 0.0, 0.0, 0.0, 0.0, t_row, m_row, g_t, g_t, o_k, m_k, 1, 16, UK, 1, False, False, ""
    )


@triton.jit
def exact_segment(
    q,  # [T, K] of this head, as k, v, g, o
    k,  # [T, K]
    v,  # [T, V]
    g,  # [T, K]
    x,  # [T, R] of this sequence
    w,  # [H*K, R]
    bias,  # [H*K]
    o,  # [T, V]
    h0,  # [K, V] state at the segment's start
    ht,  # [K, V] state at its end
    scale,
    inv_normalizer,
    clamp_log2,
    T,
    t_begin,
    t_end,
    i_h,
    i_v,
    has_h0,
    has_ht,
    has_bias,
    q_t,
    k_t,
    v_t,
    g_t,
    x_t,
    o_t,
    K: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    UK: tl.constexpr,
    UV: tl.constexpr,
    UR: tl.constexpr,
    BV: tl.constexpr,
    BX: tl.constexpr,
    LOWRANK: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walk a segment of a sequence of T tokens."""
    IO: tl.constexpr = v.dtype.element_ty
    row = tl.arange(0, BX)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    p_state = o_k[:, None] * V + o_v[None, :]
    m_state = m_k[:, None] & m_v[None, :]
    b_w = 0.0
    b_bias = 0.0
    if LOWRANK:
        o_r = tl.arange(0, BR)
        p_w = (i_h * K + o_k)[None, :] * R + o_r[:, None]
        b_w = tl.load(w + p_w, mask=m_k[None, :] & (o_r < R)[:, None], other=0.0)  # [BR, BK]
        b_bias = tl.load(bias + i_h * K + o_k, mask=m_k & (has_bias != 0), other=0.0)
        b_bias = b_bias.to(tl.float32) * LOG2E

    b_s = tl.load(h0 + p_state, mask=m_state & (has_h0 != 0), other=0.0)  # [BK, BV]
    for t in tl.range(t_begin, t_end, BX, num_stages=1):
        t_row = t + row
        m_t = t_row < T
        m_after = (row < BX - 1) & (t_row + 1 < T)
        b_step = gate_steps(
            g, x, b_w, b_bias, inv_normalizer, clamp_log2, t_row, m_t,
            g_t, x_t, o_k, m_k, R, BR, UK, UR, LOWRANK, BF16, PRECISION,
        )  # fmt: skip
        b_after = gate_steps(
            g, x, b_w, b_bias, inv_normalizer, clamp_log2, t_row + 1, m_after,
            g_t, x_t, o_k, m_k, R, BR, UK, UR, LOWRANK, BF16, PRECISION,
        )  # fmt: skip
        m_tk = m_t[:, None] & m_k[None, :]
        m_tv = m_t[:, None] & m_v[None, :]
        p_k = t_row[:, None] * (k_t.to(tl.int64) * UK) + o_k[None, :]
        b_k = tl.load(k + p_k, mask=m_tk, other=0.0).to(tl.float32)
        p_v = t_row[:, None] * (v_t.to(tl.int64) * UV) + o_v[None, :]
        b_v = operand(tl.load(v + p_v, mask=m_tv, other=0.0), IO)

        b_cum = tl.cumsum(b_step, 0)
        b_end = tl.min(b_cum, 0)
        p_q = t_row[:, None] * (q_t.to(tl.int64) * UK) + o_k[None, :]
        b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32) * scale
        b_a = exact_scores(b_q, b_k, b_step, BX, IO, PRECISION)
        b_a = operand(tl.where(row[:, None] >= row[None, :], b_a, 0.0), IO)
        qh = operand(b_q * tl.exp2(b_cum), IO)
        b_o = tl.dot(qh, operand(b_s, IO), input_precision=PRECISION)
        b_o = tl.dot(b_a, b_v, b_o, input_precision=PRECISION)
        p_o = t_row[:, None] * o_t.to(tl.int64) + o_v[None, :]
        tl.store(o + p_o, b_o.to(IO), mask=m_tv)
        kh = operand(b_k * tl.exp2(tl.cumsum(b_after, 0, reverse=True)), IO)  # Gend - G
        b_s = b_s * tl.exp2(b_end)[:, None]
        b_s = tl.dot(tl.trans(kh), b_v, b_s, input_precision=PRECISION)

    tl.store(ht + p_state, b_s, mask=m_state & (has_ht != 0))


# The same as a real call, with registers of its own. Inlined, its live values cost the fast loop
# of large tiles 3 to 6 % (539 us instead of 508 at 4,4096,64,128,128); a call costs the loop of
# small tiles more (83 us instead of 70 at 8,2048,16,64,64).
exact_segment_called = triton.jit(noinline=True)(exact_segment.fn)
