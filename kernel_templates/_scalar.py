"""What the kernels for a gate of one number per token and head share.

A decay between two tokens is 2^(G_i - G_j), one number, which multiplies their score after the
product. Nothing is scaled per channel, so there is no range to leave and no anchor. Only the
difference must be exact: beside resets (2^-160 a step) a plain sum would lose the small steps. So
each step is cut into a multiple of 2^-9, whose sums and differences are exact in fp32 (128 steps
of 160 are 10.5 of the 16.8 million multiples that fit), and a rest below 2^-10.
"""

import triton
import triton.language as tl

from glac.kernel_templates._gate import LOG2E, STEP_MIN_LOG2

GRAIN = tl.constexpr(512.0)


@triton.jit
def chunk_gate(g, t, end, g_t, has_g, BT: tl.constexpr):
    """The gate of a chunk as it is stored, ``[BT]``; 0 outside [0, end).

    Loops ask for it one chunk before they use it: a bf16 gate cannot be copied asynchronously, and
    waiting for it took 28 of 151 us forward at 16,2048,8,128,128.
    """
    o_t = t + tl.arange(0, BT)
    m_t = (o_t >= 0) & (o_t < end) & (has_g != 0)
    return tl.load(g + o_t.to(tl.int64) * g_t, mask=m_t, other=0.0)


@triton.jit
def gate_sums(b_g):
    """Steps of a chunk in log2 units, and their cumulative coarse and fine parts; all ``[BT]``."""
    step = tl.maximum(b_g.to(tl.float32) * LOG2E, STEP_MIN_LOG2)
    coarse = tl.floor(step * GRAIN + 0.5) * (1.0 / GRAIN)
    return step, tl.cumsum(coarse, 0), tl.cumsum(step - coarse, 0)


@triton.jit
def total(coarse, fine, BT: tl.constexpr):
    """Both parts of the whole chunk's gate: the last entries."""
    last = tl.arange(0, BT) == BT - 1
    return tl.sum(tl.where(last, coarse, 0.0), 0), tl.sum(tl.where(last, fine, 0.0), 0)


@triton.jit
def pair_decays(coarse, fine, BT: tl.constexpr):
    """``[BT, BT]`` decay from token j (column) to token i (row), 0 above the diagonal."""
    row = tl.arange(0, BT)
    gap = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    return tl.where(row[:, None] >= row[None, :], tl.exp2(tl.minimum(gap, 0.0)), 0.0)


@triton.jit
def sequence_bounds(cu, i_n, T, has_cu):
    """First token of sequence ``i_n``, its length, and the batch row that its tensors are in."""
    begin = T - T
    length = T
    i_b = i_n.to(tl.int64)
    if has_cu != 0:
        begin = tl.minimum(tl.maximum(tl.load(cu + i_n), 0), T)
        length = tl.minimum(tl.maximum(tl.load(cu + i_n + 1), begin), T) - begin
        i_b = tl.zeros_like(i_b)
    return begin, length, i_b


@triton.jit
def first_slot(bos, i_n, has_cu, BT: tl.constexpr):
    """Slot of the first chunk of a sequence that begins with token ``bos`` of its row."""
    return tl.where(has_cu != 0, bos // BT + i_n, 0).to(tl.int64)
