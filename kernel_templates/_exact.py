"""Sixteen rows of the recurrence that are right for every gate g <= 0, including -inf.

Used where the single-anchor form is out of range. With G the cumulative gate of the block:

    o      = scale * ( tril(A) v + (q * 2^G) S )        A_ij = sum_k q_ik k_jk 2^(G_ik - G_jk)
    S_next = 2^Gend . S + (k * 2^(Gend - G))^T v

Read-out and update need no anchor: both factors are at most 1. ``Gend - G`` is summed from the end
of the block rather than subtracted. A is one product of midpoint-anchored tiles while the range of
G fits 2^+-64, otherwise it is summed element by element in fp32, each exponent a sum of steps.
"""

import triton
import triton.language as tl

from glac.kernel_templates._gate import LOG2E, STEP_MIN_LOG2, operand

MIDPOINT_RANGE_LOG2 = tl.constexpr(128.0)


@triton.jit
def exact_steps(b_g, IN_LOG2: tl.constexpr):
    """``[BT, BK]`` gate of each step in log2 units, clamped to 2^-160."""
    x = b_g.to(tl.float32)
    if not IN_LOG2:
        x = x * LOG2E
    return tl.maximum(x, STEP_MIN_LOG2)


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
