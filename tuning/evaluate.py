"""What an evaluator of candidates promises, and one that replays recorded times.

The study asks an ``Evaluator`` and never touches a GPU itself. ``glac.tuning.worker`` has the one
that measures, in a process of its own; ``ReplayEvaluator`` here answers from a table in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from glac.configs import Config
from glac.problem import Op, Problem

OK = "ok"
WRONG = "wrong"
NOT_REPEATABLE = "not-repeatable"
ERROR = "error"
CRASHED = "crashed"
ILLEGAL = "illegal-access"
HUNG = "hung"
OUT_OF_MEMORY = "out-of-memory"
STATUSES = (OK, WRONG, NOT_REPEATABLE, ERROR, CRASHED, ILLEGAL, HUNG, OUT_OF_MEMORY)
DEADLY = (CRASHED, ILLEGAL, HUNG)
"""Cost the worker process."""
BROKEN = (WRONG, NOT_REPEATABLE, CRASHED, ILLEGAL, HUNG)
"""The machine code is not to be trusted; other failures may be the machine's."""

_KINDS: tuple[tuple[str, str], ...] = (
    ("shared memory", r"shared memory"),
    ("spills too much", r"spills \d+ bytes"),
    ("denied", r"deny-list"),
    ("compiler crashed", r"compiler died|compiler did not answer"),
    ("was not compiled", r"was not compiled"),
    ("does not compile", r"does not compile|ptxas"),
)


def reason_kind(reason: str) -> str:
    """A reason without its numbers and names, to count what is alike."""
    for kind, pattern in _KINDS:
        if re.search(pattern, reason):
            return kind
    text = re.sub(r"\S*[\d_]\S*", "...", reason)
    return " ".join(text.split()[:8])


def failure_status(text: str, otherwise: str) -> str:
    """The status that an error text of CUDA or PyTorch means, else ``otherwise``."""
    low = text.lower()
    if re.search(r"illegal memory access|misaligned address|illegal instruction", low):
        return ILLEGAL
    if re.search(r"out of memory|out_of_memory|outofmemory|memoryerror", low):
        return OUT_OF_MEMORY
    return otherwise


@dataclass(frozen=True)
class Outcome:
    """What became of one candidate.

    Attributes:
        status: ``ok``, or why it was refused: ``wrong`` (error against fp64 too large),
            ``not-repeatable`` (two runs differ), ``error`` (does not load or launch), ``crashed``
            (took its process down), ``illegal-access`` (the same, because it touched memory that
            is not its own), ``hung`` (did not answer in time), ``out-of-memory``.
        us: median device time of a call, microseconds; ``None`` unless ok.
        noise: interquartile range over median.
        error: relative rms error against fp64 on the tuned shape; the worst of several results.
        hard_error: the same for the small case with hard gates, states and a ragged length.
        samples: timings taken.
        pruned: timing stopped early because it was far from the best.
        reason: one line on what went wrong.
        interval: width of the 95 % confidence interval of ``us``, relative to it.
        noisy: it stayed above ``Effort.interval`` however often the call was timed.
        clock_mhz: of the SMs after the timing, 0 where the driver does not say.
        throttle: why the GPU held its clock back then, empty if it did not.
    """

    status: str
    us: float | None = None
    noise: float = 0.0
    error: float = math.nan
    hard_error: float = math.nan
    samples: int = 0
    pruned: bool = False
    reason: str = ""
    interval: float = 0.0
    noisy: bool = False
    clock_mhz: int = 0
    throttle: str = ""

    @property
    def ok(self) -> bool:
        return self.status == OK

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; NaN becomes None."""
        data = asdict(self)
        for key in ("error", "hard_error"):
            if not math.isfinite(data[key]):
                data[key] = None
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Outcome:
        """Read what ``to_dict`` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            values = dict(data)
            for key in ("error", "hard_error"):
                values[key] = math.nan if values.get(key) is None else float(values[key])
            outcome = cls(**values)
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not an outcome: {error}") from None
        if outcome.status not in STATUSES:
            raise ValueError(f"not an outcome: status {outcome.status!r}")
        if outcome.ok and not (
            isinstance(outcome.us, (int, float)) and math.isfinite(outcome.us) and outcome.us > 0
        ):
            raise ValueError(f"not an outcome: ok with a time of {outcome.us!r}")
        return outcome


@dataclass(frozen=True)
class Device:
    """Where candidates are measured, all as text."""

    name: str
    driver: str = ""
    torch: str = ""


@dataclass(frozen=True)
class Yardstick:
    """Error of the same-dtype PyTorch form against fp64, on the tuned shape.

    Where an op has several results, it is that of the worst.
    """

    error: float


@dataclass(frozen=True)
class Effort:
    """How much time a study spends on each candidate.

    Attributes:
        samples: timed calls of a candidate that is not pruned.
        early: calls after which a slow candidate is given up.
        slow: how far behind the best is slow.
        repeats: runs that must be equal bit for bit.
        finalists: best candidates that are timed again, the default not counted.
        rounds: interleaved rounds of the final comparison.
        trials: candidates tried where the space is too large to try all.
        interval: calls are timed until the 95 % interval of the median is narrower than this ...
        most: ... or this many were timed.
    """

    samples: int
    early: int = 3
    slow: float = 1.5
    repeats: int = 3
    finalists: int = 8
    rounds: int = 5
    trials: int = 100
    interval: float = 0.02
    most: int = 100


EFFORT: dict[str, Effort] = {
    "quick": Effort(samples=10, finalists=4, most=40),
    "standard": Effort(samples=25, rounds=7),
    "full": Effort(samples=60, rounds=11, trials=250, most=240),
}


class Evaluator(Protocol):
    """Checks and times candidates of an op of one problem after the other."""

    def device(self) -> Device:
        """Where it measures. Starts what has to be started."""
        ...

    def prepare(self, problem: Problem, op: Op) -> Yardstick:
        """Make inputs and truth of an op of ``problem``; what follows is about it."""
        ...

    def evaluate(self, config: Config, best_us: float | None) -> Outcome:
        """Check and time one candidate. Never raises because of the candidate."""
        ...

    def compare(self, configs: Sequence[Config], rounds: int) -> list[list[float]]:
        """Times in microseconds, one list per config and one entry per interleaved round.

        A config that fails has an empty list.
        """
        ...

    def abort(self) -> None:
        """End an evaluation that runs in another thread; called before ``close`` at most."""
        ...

    def close(self) -> None:
        """Release the device."""
        ...


@dataclass
class ReplayEvaluator:
    """Answers from recorded times, so that a study can be run without a device.

    Attributes:
        table: config slug to microseconds, or to a whole outcome. Configs that are missing fail.
        yardstick: reported for every problem.
        calls: slugs in the order they were asked for, for tests.
        jitter: relative spread that ``compare`` adds, the same in every run.
    """

    table: Mapping[str, float | Outcome]
    yardstick: float = 1e-3
    jitter: float = 0.0
    calls: list[str] = field(default_factory=list)

    def device(self) -> Device:
        return Device("replayed table")

    def prepare(self, problem: Problem, op: Op) -> Yardstick:
        return Yardstick(self.yardstick)

    def evaluate(self, config: Config, best_us: float | None) -> Outcome:
        self.calls.append(config.slug)
        found = self.table.get(config.slug)
        if found is None:
            return Outcome(ERROR, reason="not in the table")
        if isinstance(found, Outcome):
            return found
        return Outcome(OK, us=float(found), error=self.yardstick, hard_error=self.yardstick)

    def compare(self, configs: Sequence[Config], rounds: int) -> list[list[float]]:
        times = []
        for config in configs:
            found = self.table.get(config.slug)
            us = found.us if isinstance(found, Outcome) else found
            swing = [1.0 + self.jitter * ((i * 7) % 5 - 2) / 2 for i in range(rounds)]
            times.append([us * s for s in swing] if us else [])
        return times

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass
