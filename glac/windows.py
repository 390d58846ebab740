"""How much of a sequence's chunk states a backward pass keeps at a time."""

from __future__ import annotations

import math

from glac.problem import Problem
from glac.templates import state_dtype

FREE_STATES = 80 << 20
"""Bytes of chunk states that are kept all at once."""
WINDOWS = 3
"""Beyond that the sequence falls into so many windows, and one window's states are kept.

At 16,2048,8,128,128 that is 88 MiB instead of 256, for 631 us instead of 534 on an H200: all
windows but the last are walked through twice for their states, and each launch has its start.
"""


def windows(problem: Problem, chunk: int) -> tuple[int, int]:
    """How many windows a backward pass takes, and the tokens of each but the last.

    Args:
        problem: sizes and dtypes.
        chunk: tokens from kept state to kept state.
    """
    spec = problem.spec
    heads = problem.B * problem.H
    per_chunk = heads * spec.K * spec.V * state_dtype(spec).itemsize
    chunks = math.ceil(problem.T / chunk)
    count = 1 if chunks * per_chunk <= FREE_STATES else min(WINDOWS, chunks)
    length = chunk * math.ceil(chunks / count)
    return math.ceil(problem.T / length), length
