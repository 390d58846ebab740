"""Robust statistics of a few timings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def spread(samples: Sequence[float]) -> float:
    """Interquartile range over median; 0 for fewer than four samples."""
    if len(samples) < 4:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4)
    return (high - low) / statistics.median(samples)


def interval(samples: Sequence[float]) -> float:
    """Width of the 95 % confidence interval of the median, relative to it.

    From the order of the samples alone, so nothing is assumed of how times are distributed.
    Infinite for fewer than six samples: their whole range holds the median less often.
    """
    count = len(samples)
    if count < 6:
        return math.inf
    # The largest k for which fewer than k of n samples lie below the median with 2.5 % at most.
    tail, k = 0.0, 0
    while True:
        tail += math.comb(count, k) / 2.0**count
        if tail > 0.025:
            break
        k += 1
    ordered = sorted(samples)
    return (ordered[count - k] - ordered[k - 1]) / statistics.median(samples)
