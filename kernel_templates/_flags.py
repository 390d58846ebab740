"""Whether a segment holds a chunk that ``gla_prepare`` found out of range."""

import triton
import triton.language as tl

FLAGS = tl.constexpr(128)
"""Flags that are read at once."""


@triton.jit
def flagged(flags, t_begin, t_end, BT: tl.constexpr):
    """Not 0 if one of the chunks of tokens from t_begin to t_end has a flag.

    Args:
        flags: int32, that of the sequence's first chunk and those that follow.
    """
    found = t_begin * 0
    for c in tl.range(t_begin // BT, tl.cdiv(t_end, BT), FLAGS, num_stages=1):
        o_c = c + tl.arange(0, FLAGS)
        b_f = tl.load(flags + o_c, mask=o_c < tl.cdiv(t_end, BT), other=0)
        found = tl.maximum(found, tl.max(b_f, 0))
    return found
