"""Blocks of 16 rows of the backward pass, exact for every gate: gates and pairs of rows.

Shared by ``gla_bwd_exact`` and ``gla_bwd_chunks_exact``; the formulas are in the former.
"""

import triton
import triton.language as tl

from glac.kernel_templates._bwd import load_rows
from glac.kernel_templates._exact import MIDPOINT_RANGE_LOG2
from glac.kernel_templates._gate import LOG2E, STEP_MIN_LOG2, operand


@triton.jit
def gate_rows(g, t, m_row, row_g, o_k, m_k, BX: tl.constexpr):
    """``[BX, BK]`` gate of each step from t on, log2, clamped; 0 where ``m_row`` is off."""
    b_g = load_rows(g, t, 0, row_g, o_k, m_row[:, None] & m_k[None, :], BX, False)
    return tl.maximum(b_g.to(tl.float32) * LOG2E, STEP_MIN_LOG2)


@triton.jit
def block_pairs(
    b_q, b_k, b_step, b_da, BX: tl.constexpr, IO: tl.constexpr, PRECISION: tl.constexpr
):
    """What pairs inside the block give: scores A, dq, dk, and the summand of dg."""
    row = tl.arange(0, BX)
    # From the first row on: its own step decays no pair of the block, and may be a reset.
    b_rel = tl.cumsum(tl.where((row == 0)[:, None], 0.0, b_step), 0)
    last = tl.min(b_rel, 0)
    if tl.min(last, 0) >= -MIDPOINT_RANGE_LOG2:
        anchor = (0.5 * last)[None, :]
        e_q = tl.exp2(b_rel - anchor)
        e_k = tl.exp2(anchor - b_rel)
        qm = operand(b_q * e_q, IO)
        km = operand(b_k * e_k, IO)
        d_a = operand(b_da, IO)
        b_a = tl.dot(qm, tl.trans(km), input_precision=PRECISION)
        b_x = tl.dot(d_a, km, input_precision=PRECISION)
        b_y = tl.dot(tl.trans(d_a), qm, input_precision=PRECISION)
        b_p = qm.to(tl.float32) * b_x - km.to(tl.float32) * b_y
        dq = b_x * e_q
        dk = b_y * e_k
    else:
        # Column by column from the right, so that each decay is a sum of steps (see _exact).
        b_a = tl.zeros([BX, BX], dtype=tl.float32)
        dq = tl.zeros_like(b_step)
        dk = tl.zeros_like(b_step)
        gap = tl.zeros_like(b_step)
        for i in range(BX):
            j = BX - 1 - i
            pick = (row == j)[:, None]
            column = (row == j)[None, :]
            k_j = tl.sum(tl.where(pick, b_k, 0.0), 0)
            decay = tl.where((row >= j)[:, None], tl.exp2(gap), 0.0)
            da_j = tl.sum(tl.where(column, b_da, 0.0), 1)
            b_a = tl.where(column, tl.sum(b_q * k_j[None, :] * decay, 1)[:, None], b_a)
            dq += da_j[:, None] * k_j[None, :] * decay
            dk_j = tl.sum(da_j[:, None] * b_q * decay, 0)
            dk = tl.where(pick, dk_j[None, :], dk)
            step_j = tl.sum(tl.where(pick, b_step, 0.0), 0)
            gap = tl.where((row >= j)[:, None], gap + step_j[None, :], gap)
        b_p = b_q * dq - b_k * dk
    return b_a, dq, dk, b_p
