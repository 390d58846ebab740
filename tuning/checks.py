"""Is a candidate right, does it repeat, and how long does it take?

Right means: on the whole tuned shape the relative rms error against fp64 is at most twice that of
the same-dtype PyTorch form and below a ceiling, no single row is far off, and two small cases
(ragged length, initial and final state; once with mild and once with hard gates) agree too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from glac.configs import ForwardConfig
from glac.errors import GlacError
from glac.forward import ForwardPlan, GateInput, Kernel, run_forward
from glac.problem import DType, Gate, Problem, Specialisation
from glac.reference import chunk_gla, lowrank_gate, yardstick_chunk_gla
from glac.testing import Inputs, hard_gates, problem_inputs
from glac.tuning.evaluate import NOT_REPEATABLE, OK, WRONG, Effort, Outcome, Yardstick
from glac.tuning.stats import spread
from glac.tuning.timing import Stopwatch
from glac.validate import TORCH_DTYPES

CEILING = {DType.BF16: 4e-3, DType.FP16: 1e-3, DType.FP32: 1e-4}
"""Largest relative rms error of any kernel, whatever the yardstick says."""
FLOOR = {DType.BF16: 0.0, DType.FP16: 0.0, DType.FP32: 1e-5}
"""A budget is never below this: three TF32 products are not quite fp32."""
TIMES_YARDSTICK = 2.0
ROW_TIMES_YARDSTICK = 5.0
"""The worst row is an extreme of many, hence the wider factor; a misplaced one is 100x off."""
_SLICE_ELEMENTS = 1 << 25
_RAGGED_TOKENS = 173
_NORMALIZER = 16.0

Load = Callable[[Specialisation, ForwardConfig], Mapping[str, Kernel]]
"""Loads the kernels of a config, by template name."""


@dataclass(frozen=True)
class _Error:
    """Relative rms error over everything, and of the worst row in units of the mean row."""

    total: float
    row: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.total) and math.isfinite(self.row)


@dataclass(frozen=True)
class _Case:
    """One problem with its inputs, its fp64 truth (kept in fp32) and the yardstick's errors."""

    problem: Problem
    inputs: Inputs
    normalizer: float
    output: Tensor
    state: Tensor | None
    yardstick: _Error
    state_yardstick: float

    @property
    def gate(self) -> GateInput:
        i = self.inputs
        if i.g is not None:
            return GateInput((i.g,))
        return GateInput((i.x, i.weight, i.bias), 1.0 / self.normalizer)

    def call(self, plan: ForwardPlan) -> tuple[Tensor, Tensor | None]:
        i = self.inputs
        scale = self.problem.spec.K**-0.5
        return run_forward(
            plan, i.q, i.k, i.v, self.gate, scale, i.initial_state, self.state is not None
        )


def _slices(problem: Problem) -> Iterator[tuple[slice, slice]]:
    """Batch and head ranges that bound the temporaries of the reference."""
    per_head = problem.T * max(problem.spec.K, problem.spec.V)
    heads = max(1, min(problem.H, _SLICE_ELEMENTS // per_head))
    batches = max(1, _SLICE_ELEMENTS // (per_head * problem.H)) if heads == problem.H else 1
    for b in range(0, problem.B, batches):
        for h in range(0, problem.H, heads):
            yield slice(b, b + batches), slice(h, min(h + heads, problem.H))


def _gate_values(
    inputs: Inputs, K: int, batch: slice, heads: slice, normalizer: float, dtype: torch.dtype
) -> Tensor:
    if inputs.g is not None:
        return inputs.g[batch, :, heads].to(dtype)
    assert inputs.x is not None
    assert inputs.weight is not None
    rows = slice(heads.start * K, heads.stop * K)
    bias = None if inputs.bias is None else inputs.bias[rows].to(dtype)
    return lowrank_gate(
        inputs.x[batch].to(dtype),
        inputs.weight[rows].to(dtype),
        bias,
        num_heads=heads.stop - heads.start,
        normalizer=normalizer,
    )


class _ErrorSum:
    """Adds up squares slice by slice on the device; one transfer at the end."""

    def __init__(self, device: torch.device) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self._wrong, self._truth, self._row = zero, zero.clone(), zero.clone()
        self._rows = 0

    def add(self, actual: Tensor, expected: Tensor) -> None:
        truth = expected.double()
        rows = (actual.double() - truth).square().sum(-1)
        self._wrong = self._wrong + rows.sum()
        self._truth = self._truth + truth.square().sum()
        self._row = torch.maximum(self._row, rows.max())  # propagates NaN
        self._rows += rows.numel()

    def result(self) -> _Error:
        wrong, truth, row = torch.stack((self._wrong, self._truth, self._row)).tolist()
        if not truth > 0:
            return _Error(math.nan, math.nan)
        return _Error(math.sqrt(wrong / truth), math.sqrt(row * self._rows / truth))


def _make_case(problem: Problem, inputs: Inputs, normalizer: float, with_state: bool) -> _Case:
    spec = problem.spec
    device = inputs.q.device
    output = torch.empty(
        (problem.B, problem.T, problem.H, spec.V), dtype=torch.float32, device=device
    )
    state = None
    if with_state:
        size = (problem.B, problem.H, spec.K, spec.V)
        state = torch.empty(size, dtype=torch.float32, device=device)
    error, state_error = _ErrorSum(device), _ErrorSum(device)
    for b, h in _slices(problem):
        q, k, v = (x[b, :, h] for x in (inputs.q, inputs.k, inputs.v))
        h0 = None if inputs.initial_state is None else inputs.initial_state[b, h]
        gate = _gate_values(inputs, spec.K, b, h, normalizer, torch.float64)
        o, end = chunk_gla(
            q.double(), k.double(), v.double(), gate, initial_state=h0, output_final_state=True
        )
        near, near_end = yardstick_chunk_gla(
            q, k, v, gate.float(), initial_state=h0, output_final_state=True
        )
        output[b, :, h] = o.float()
        error.add(near, o)
        assert end is not None
        assert near_end is not None
        if state is not None:
            state[b, h] = end.float()
            state_error.add(near_end, end)
    state_yardstick = state_error.result().total if with_state else 0.0
    return _Case(problem, inputs, normalizer, output, state, error.result(), state_yardstick)


def _poison(problem: Problem, config: ForwardConfig, device: torch.device) -> None:
    """Fill with NaN the memory that the next call's outputs will most likely get.

    Without it an output that is never written may hold an earlier candidate's right answer.
    """
    spec, dtype = problem.spec, TORCH_DTYPES[problem.spec.dtype]
    heads, segments = problem.B * problem.H, config.segments(problem.T)
    held = [
        torch.full((problem.B, problem.T, problem.H, spec.V), math.nan, dtype=dtype, device=device)
    ]
    if segments > 1:
        size = (heads, segments, spec.K, spec.V)
        held.append(torch.full(size, math.nan, device=device))
        held.append(torch.full(size[:3], math.nan, device=device))
    del held


class Checker:
    """Checks and times the candidates of one problem.

    Args:
        problem: what is tuned.
        device: where.
        load: gives the kernels of a config.
        stopwatch: times calls.
        effort: how much of everything.
        seed: of the inputs.
    """

    def __init__(
        self,
        problem: Problem,
        device: torch.device,
        load: Load,
        stopwatch: Stopwatch,
        effort: Effort,
        seed: int = 0,
    ) -> None:
        self._problem, self._device, self._load = problem, device, load
        self._stopwatch, self._effort, self._seed = stopwatch, effort, seed
        self._small: dict[int, tuple[_Case, _Case]] = {}

    @cached_property
    def _tuned(self) -> _Case:
        inputs = problem_inputs(self._problem, device=self._device, seed=self._seed)
        return _make_case(self._problem, inputs, _NORMALIZER, with_state=False)

    @property
    def yardstick(self) -> Yardstick:
        return Yardstick(self._tuned.yardstick.total)

    def _small_cases(self, config: ForwardConfig) -> tuple[_Case, _Case]:
        """Mild and hard gates at a length that is no multiple of any chunk or segment."""
        tokens = max(_RAGGED_TOKENS, 2 * config.segment + 77 if config.segment else 0)
        if tokens not in self._small:
            spec = self._problem.spec
            problem = Problem(spec, B=2, T=tokens, H=3)
            mild = problem_inputs(
                problem, device=self._device, seed=self._seed + 1, initial_state=True
            )
            normalizer = _NORMALIZER
            if spec.gate is Gate.VECTOR:
                gates = hard_gates(
                    (2, tokens, 3, spec.K),
                    seed=self._seed + 2,
                    device=self._device,
                    dtype=TORCH_DTYPES[spec.gate_dtype],
                )
                hard = replace(mild, g=gates)
            else:
                # Steep logits without a normalizer: gates from none to e^-50 and beyond.
                assert mild.weight is not None
                hard, normalizer = replace(mild, weight=mild.weight * 16), 1.0
            self._small[tokens] = (
                _make_case(problem, mild, _NORMALIZER, with_state=True),
                _make_case(problem, hard, normalizer, with_state=True),
            )
        return self._small[tokens]

    def _budget(self, yardstick: float, ceiling: bool = True) -> float:
        dtype = self._problem.spec.dtype
        budget = max(TIMES_YARDSTICK * yardstick, FLOOR[dtype])
        return min(budget, CEILING[dtype]) if ceiling else max(budget, CEILING[dtype])

    def _error(self, case: _Case, output: Tensor) -> _Error:
        total = _ErrorSum(self._device)
        for b, h in _slices(case.problem):
            total.add(output[b, :, h], case.output[b, :, h])
        return total.result()

    def _check_tuned(self, error: _Error) -> str:
        """Why the tuned shape's output is refused, or nothing."""
        near = self._tuned.yardstick
        if not error.finite:
            return "output has NaN or inf"
        budget = self._budget(near.total)
        if error.total > budget:
            return f"error {error.total:.2e}, at most {budget:.2e} allowed"
        rows = max(ROW_TIMES_YARDSTICK * near.row, FLOOR[self._problem.spec.dtype])
        if error.row > rows:
            return f"worst row is off by {error.row:.2e}, at most {rows:.2e} allowed"
        return ""

    def _check_small(
        self, config: ForwardConfig, kernels: Mapping[str, Kernel]
    ) -> tuple[float, str]:
        worst = 0.0
        for name, case in zip(("mild", "hard"), self._small_cases(config), strict=True):
            _poison(case.problem, config, self._device)
            output, state = case.call(ForwardPlan(case.problem, config, kernels))
            error = self._error(case, output)
            states = _ErrorSum(self._device)
            assert state is not None
            assert case.state is not None
            states.add(state, case.state)
            state_error = states.result().total
            worst = max(worst, error.total, state_error)
            where = f"{name} gates, T={case.problem.T}"
            if not error.finite or not math.isfinite(state_error):
                return math.nan, f"{where}: output or final state has NaN or inf"
            budget = self._budget(case.yardstick.total, ceiling=False)
            if error.total > budget:
                return worst, f"{where}: error {error.total:.2e}, at most {budget:.2e} allowed"
            budget = self._budget(case.state_yardstick, ceiling=False)
            if state_error > budget:
                return worst, f"{where}: state off by {state_error:.2e}, at most {budget:.2e}"
        return worst, ""

    def evaluate(self, config: ForwardConfig, best_us: float | None) -> Outcome:
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
        plan = ForwardPlan(self._problem, config, kernels)

        def run() -> Tensor:
            return case.call(plan)[0]

        _poison(self._problem, config, self._device)
        first = run()
        error = self._error(case, first)
        reason = self._check_tuned(error)
        if reason:
            return Outcome(WRONG, error=error.total, hard_error=hard_error, reason=reason)
        # All but one repeat before the timing and one after it, when the device is warm.
        for _ in range(self._effort.repeats - 2):
            if not torch.equal(run(), first):
                return Outcome(NOT_REPEATABLE, error=error.total, hard_error=hard_error)
        samples, pruned = self._time(run, best_us)
        if not torch.equal(run(), first):
            return Outcome(NOT_REPEATABLE, error=error.total, hard_error=hard_error)
        return Outcome(
            OK,
            us=statistics.median(samples),
            noise=spread(samples),
            error=error.total,
            hard_error=hard_error,
            samples=len(samples),
            pruned=pruned,
        )

    def _time(self, run: Callable[[], Tensor], best_us: float | None) -> tuple[list[float], bool]:
        effort = self._effort
        self._stopwatch.warm_up(run)
        samples = self._stopwatch.sample(run, min(effort.early, effort.samples))
        if best_us is not None and min(samples) > effort.slow * best_us:
            return samples, True
        samples += self._stopwatch.sample(run, effort.samples - len(samples))
        return samples, False

    def compare(self, configs: Sequence[ForwardConfig], rounds: int) -> list[list[float]]:
        """Median of a few calls of every config, in turn, ``rounds`` times."""
        case = self._tuned
        runs: list[Callable[[], object] | None] = []
        for config in configs:
            try:
                plan = ForwardPlan(self._problem, config, self._load(self._problem.spec, config))
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
