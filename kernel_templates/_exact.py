"""Sixteen rows of the recurrence that are right for every gate g <= 0, including -inf.

Used where the single-anchor form is out of range. With G the cumulative gate of the block:

    o      = scale * ( tril(A) v + (q * 2^G) S )        A_ij = sum_k q_ik k_jk 2^(G_ik - G_jk)
    S_next = 2^Gend . S + (k * 2^(Gend - G))^T v

Read-out and update need no anchor: both factors are at most 1. A is one product of midpoint-
anchored tiles while the range of G fits 2^+-64, otherwise it is summed element by element in
fp32, with exponents clamped to <= 0.
"""

import triton
import triton.language as tl

from glac.kernel_templates._gate import LOG2E, STEP_MIN_LOG2, operand

MIDPOINT_RANGE_LOG2 = tl.constexpr(128.0)


@triton.jit
def exact_scores(b_q, b_k, b_cum, BT: tl.constexpr, IO: tl.constexpr, PRECISION: tl.constexpr):
    """``[BT, BT]`` scores, exact on and below the diagonal; above it the values mean nothing."""
    first = tl.max(b_cum, 0)
    last = tl.min(b_cum, 0)
    if tl.max(first - last, 0) <= MIDPOINT_RANGE_LOG2:
        anchor = (0.5 * (first + last))[None, :]
        qm = operand(b_q * tl.exp2(b_cum - anchor), IO)
        km = operand(b_k * tl.exp2(anchor - b_cum), IO)
        scores = tl.dot(qm, tl.trans(km), input_precision=PRECISION)
    else:
        row = tl.arange(0, BT)
        scores = tl.zeros([BT, BT], dtype=tl.float32)
        for j in range(BT):
            pick = (row == j)[:, None]
            k_j = tl.sum(tl.where(pick, b_k, 0.0), 0)
            cum_j = tl.sum(tl.where(pick, b_cum, 0.0), 0)
            decay = tl.exp2(tl.minimum(b_cum - cum_j[None, :], 0.0))
            column = tl.sum(b_q * k_j[None, :] * decay, 1)
            scores = tl.where((row == j)[None, :], column[:, None], scores)
    return scores


@triton.jit
def exact_block_cumulative(b_g, IN_LOG2: tl.constexpr):
    """``[BT, BK]`` cumulative gate in log2 units, each step clamped to 2^-160."""
    x = b_g.to(tl.float32)
    if not IN_LOG2:
        x = x * LOG2E
    return tl.cumsum(tl.maximum(x, STEP_MIN_LOG2), 0)
