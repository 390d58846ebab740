"""Device time of a call, from CUDA events with a cold L2 cache.

Unlike ``glac.bench`` this keeps every sample, because the study needs the spread and gives up
early on slow candidates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Stopwatch(Protocol):
    """Times calls, one sample each, in microseconds."""

    def warm_up(self, fn: Callable[[], object]) -> None:
        """Run ``fn`` until clocks and caches have settled."""
        ...

    def sample(self, fn: Callable[[], object], count: int) -> list[float]:
        """Times of ``count`` calls."""
        ...


FLUSH_US, ROUND_US, MOST_FLUSHES = 80.0, 30.0, 5
"""How long one flush keeps the device busy; what the host does in a round beside the call."""


class CudaStopwatch:
    """Queues all calls of a batch, each behind an L2 flush, and waits once.

    Flushes take longer than a call costs the host, so the device never waits for the host and
    multi-kernel calls are timed as they run when the queue is full. One flush did not do for
    decoding: on a slow host its times varied by a factor of two.
    """

    def __init__(self, device: int = 0, warm_up_ms: float = 5.0) -> None:
        props = torch.cuda.get_device_properties(device)
        cache = int(getattr(props, "L2_cache_size", 0)) or (64 << 20)
        self._flush = torch.empty(max(4 * cache, 256 << 20), dtype=torch.int8, device=device)
        self._warm_up_ms = warm_up_ms
        self._flushes = 1
        self._cuda: Any = torch.cuda

    def warm_up(self, fn: Callable[[], object]) -> None:
        end = time.perf_counter() + self._warm_up_ms / 1e3
        fn()
        torch.cuda.synchronize()
        fastest = math.inf
        while fastest == math.inf or time.perf_counter() < end:
            start = time.perf_counter()
            fn()
            fastest = min(fastest, time.perf_counter() - start)
            torch.cuda.synchronize()
        # Never fewer: finalists are sampled in turn.
        wanted = math.ceil((fastest * 1e6 + ROUND_US) / FLUSH_US)
        self._flushes = max(self._flushes, min(wanted, MOST_FLUSHES))

    def sample(self, fn: Callable[[], object], count: int) -> list[float]:
        event: Any = self._cuda.Event
        marks = []
        for _ in range(count):
            for _ in range(self._flushes):
                self._flush.zero_()
            start, end = event(enable_timing=True), event(enable_timing=True)
            start.record()
            fn()
            end.record()
            marks.append((start, end))
        torch.cuda.synchronize()
        return [float(start.elapsed_time(end)) * 1e3 for start, end in marks]


class HostStopwatch:
    """Wall time of calls that finish before they return; for tests without a device."""

    def warm_up(self, fn: Callable[[], object]) -> None:
        fn()

    def sample(self, fn: Callable[[], object], count: int) -> list[float]:
        times = []
        for _ in range(count):
            start = time.perf_counter()
            fn()
            times.append((time.perf_counter() - start) * 1e6)
        return times
