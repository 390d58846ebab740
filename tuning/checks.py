"""Is a candidate right, does it repeat, and how long does it take?

Right means: on the whole tuned shape the relative rms error of every result against fp64 is at
most twice that of the same-dtype PyTorch form (and a forward pass stays below a ceiling), no
single row is far off, and small neighbouring shapes agree too: a ragged length with mild and with
hard gates, a length of whole chunks, one shorter than any chunk; all with states at both ends.
``glac.tuning.cases`` has inputs, truth and results.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from glac.configs import Config, ForwardConfig, leads
from glac.errors import GlacError
from glac.plan import Kernel, Plan
from glac.problem import DECODE_TOKENS, DType, Op, Precision, Problem, Specialisation
from glac.tuning.cases import (
    RAGGED_TOKENS,
    Case,
    Error,
    error_of,
    neighbour_cases,
    small_cases,
    tuned_case,
)
from glac.tuning.clocks import Clock
from glac.tuning.evaluate import NOT_REPEATABLE, OK, WRONG, Effort, Outcome, Yardstick
from glac.tuning.stats import interval, spread
from glac.tuning.timing import Stopwatch

CEILING = {DType.BF16: 4e-3, DType.FP16: 1e-3, DType.FP32: 1e-4}
"""Largest relative rms error of any forward kernel, whatever the yardstick says."""
FLOOR = {DType.BF16: 0.0, DType.FP16: 0.0, DType.FP32: 1e-5}
"""A budget is never below this: three TF32 products are not quite fp32."""
TF32_FLOOR, TF32_CEILING = 3e-3, 1e-2
"""Likewise of fp32 inputs multiplied once: the yardstick is fp32, so these alone decide. Kernels
that cut operands off, in the interpreter, are 0.7e-3 to 2.2e-3 away, and up to 6e-3 in the
gradients of steep low-rank gates, whose logits are such products too."""
TIMES_YARDSTICK = 2.0
ROW_TIMES_YARDSTICK = 5.0
"""The worst row is an extreme of many, hence the wider factor; a misplaced one is 100x off."""

Load = Callable[[Specialisation, Config], Mapping[str, Kernel]]
"""Loads the kernels of a config, by template name."""


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether all results are equal bit for bit."""
    return all(torch.equal(value, other[name]) for name, value in one.items())


class Checker:
    """Checks and times the candidates for one op of one problem.

    Args:
        problem: what is tuned.
        device: where.
        load: gives the kernels of a config.
        stopwatch: times calls.
        effort: how much of everything.
        seed: of the inputs.
        op: what is tuned of the problem.
        clock: reads the device's clock.
    """

    def __init__(
        self,
        problem: Problem,
        device: torch.device,
        load: Load,
        stopwatch: Stopwatch,
        effort: Effort,
        seed: int = 0,
        op: Op = Op.FORWARD,
        clock: Callable[[], Clock] = Clock,
    ) -> None:
        self._clock = clock
        self._problem, self._device, self._load = problem, device, load
        self._stopwatch, self._effort, self._seed = stopwatch, effort, seed
        self._op = op
        dtype, once = problem.spec.dtype, problem.spec.precision is Precision.TF32
        self._floor = TF32_FLOOR if once else FLOOR[dtype]
        self._row_floor = TF32_CEILING if once else FLOOR[dtype]
        self._ceiling = TF32_CEILING if once else CEILING[dtype]
        self._small: dict[int, dict[str, Case]] = {}

    @cached_property
    def _tuned(self) -> Case:
        return tuned_case(self._op, self._problem, self._device, self._seed)

    @property
    def yardstick(self) -> Yardstick:
        return Yardstick(max(error.total for error in self._tuned.yardstick.values()))

    def _small_cases(self, config: Config) -> dict[str, Case]:
        """Small cases at a length that is no multiple of any chunk or segment."""
        cuts = isinstance(config, ForwardConfig) or leads(config)
        step = getattr(config, "segment", 0) if cuts else 0
        tokens = max(RAGGED_TOKENS, 2 * step + 77 if step else 0)
        if self._op is Op.DECODE:
            tokens = DECODE_TOKENS
        if tokens not in self._small:
            self._small[tokens] = small_cases(
                self._op, self._problem, tokens, self._device, self._seed
            )
        if 0 not in self._small:
            self._small[0] = neighbour_cases(self._op, self._problem, self._device, self._seed)
        return {**self._small[tokens], **self._small[0]}

    def _budget(self, yardstick: float, small: bool) -> float:
        budget = max(TIMES_YARDSTICK * yardstick, self._floor)
        if small:  # the yardstick may be good by luck where there are few elements
            return max(budget, self._ceiling)
        forward = self._op in (Op.FORWARD, Op.SCALAR_FORWARD, Op.DECODE)
        return min(budget, self._ceiling) if forward else budget

    def _why_wrong(self, case: Case, name: str, error: Error, small: bool) -> str:
        """Why a result is refused, or nothing."""
        near = case.yardstick[name]
        if not error.finite:
            return f"{name} has NaN or inf"
        budget = self._budget(near.total, small)
        if error.total > budget:
            return f"{name}: error {error.total:.2e}, at most {budget:.2e} allowed"
        rows = max(ROW_TIMES_YARDSTICK * near.row, self._row_floor)
        if error.row > rows and not small:
            return f"{name}: worst row is off by {error.row:.2e}, at most {rows:.2e} allowed"
        return ""

    def _judge(self, case: Case, results: Mapping[str, Tensor], small: bool) -> tuple[float, str]:
        """The worst error, and why a result is refused, or nothing."""
        worst = 0.0
        for name, truth in case.truth.items():
            error = error_of(results[name], truth)
            worst = max(worst, error.total) if error.finite else math.nan
            reason = self._why_wrong(case, name, error, small)
            if reason:
                return worst, reason
        return worst, ""

    def _check_small(self, config: Config, kernels: Mapping[str, Kernel]) -> tuple[float, str]:
        worst = 0.0
        for gates, case in self._small_cases(config).items():
            case.poison(config)
            error, reason = self._judge(case, case.call(Plan(case.problem, config, kernels)), True)
            if reason:
                return error, f"{gates}, T={case.problem.T}: {reason}"
            worst = max(worst, error)
        return worst, ""

    def evaluate(self, config: Config, best_us: float | None) -> Outcome:
        """Check and time one candidate.

        Raises:
            GlacError: a kernel does not load or launch.
            RuntimeError: the device reports an error; it may not be usable any more.
        """
        case = self._tuned
        kernels = self._load(self._problem.spec, config)
        hard_error, reason = self._check_small(config, kernels)
        if reason:
            return Outcome(WRONG, hard_error=hard_error, reason=reason)
        plan = Plan(self._problem, config, kernels)

        def run() -> dict[str, Tensor]:
            return case.call(plan)

        case.poison(config)
        first = run()
        error, reason = self._judge(case, first, False)
        if reason:
            return Outcome(WRONG, error=error, hard_error=hard_error, reason=reason)
        # All but one repeat before the timing and one after it, when the device is warm.
        for _ in range(self._effort.repeats - 2):
            if not _same(run(), first):
                return Outcome(NOT_REPEATABLE, error=error, hard_error=hard_error)
        samples, pruned = self._time(run, best_us)
        clock = self._clock()
        width = interval(samples)
        if not _same(run(), first):
            return Outcome(NOT_REPEATABLE, error=error, hard_error=hard_error)
        return Outcome(
            OK,
            us=statistics.median(samples),
            noise=spread(samples),
            error=error,
            hard_error=hard_error,
            samples=len(samples),
            pruned=pruned,
            interval=width if math.isfinite(width) else 0.0,
            noisy=not pruned and width > self._effort.interval,
            clock_mhz=clock.mhz,
            throttle=clock.throttle,
        )

    def _time(self, run: Callable[[], object], best_us: float | None) -> tuple[list[float], bool]:
        effort = self._effort
        self._stopwatch.warm_up(run)
        samples = self._stopwatch.sample(run, min(effort.early, effort.samples))
        if best_us is not None and min(samples) > effort.slow * best_us:
            return samples, True
        samples += self._stopwatch.sample(run, effort.samples - len(samples))
        while interval(samples) > effort.interval and len(samples) < effort.most:
            more = min(effort.samples, effort.most - len(samples))
            samples += self._stopwatch.sample(run, more)
        return samples, False

    def compare(self, configs: Sequence[Config], rounds: int) -> list[list[float]]:
        """Median of a few calls of every config, in turn, ``rounds`` times."""
        case = self._tuned
        runs: list[Callable[[], object] | None] = []
        for config in configs:
            try:
                plan = Plan(self._problem, config, self._load(self._problem.spec, config))
            except GlacError:
                runs.append(None)
                continue
            runs.append(lambda plan=plan: case.call(plan))  # type: ignore[misc]
        times: list[list[float]] = [[] for _ in configs]
        for run in runs:
            if run is not None:
                self._stopwatch.warm_up(run)
        count = max(5, self._effort.samples // 2)
        for turn in range(rounds):
            # Back and forth, so that nobody always comes after the same neighbour.
            order = range(len(runs)) if turn % 2 == 0 else reversed(range(len(runs)))
            for index in order:
                run = runs[index]
                if run is not None:
                    times[index].append(statistics.median(self._stopwatch.sample(run, count)))
        return times
