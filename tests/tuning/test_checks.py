"""What the worker checks, with kernels made of PyTorch: right passes, each kind of wrong fails."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from glac.configs import (
    BackwardConfig,
    ChunkKernelConfig,
    Config,
    DecodeConfig,
    DecodeKernelConfig,
    ForwardConfig,
    ScalarBackwardConfig,
    ScalarForwardConfig,
    TileKernelConfig,
    TurnedKernelConfig,
    default_backward,
)
from glac.gate import GateInput
from glac.gpus import GPUS
from glac.kernelspec import config_kernels
from glac.plan import Kernel, Plan
from glac.problem import DType, Gate, Op, Precision, Problem, Specialisation
from glac.reference import (
    lowrank_gate,
    recurrent_gla,
    yardstick_chunk_gla,
    yardstick_chunk_gla_backward,
)
from glac.tuning import cases, checks
from glac.tuning.checks import Checker
from glac.tuning.clocks import Clock
from glac.tuning.evaluate import NOT_REPEATABLE, OK, WRONG, Effort, Outcome
from glac.tuning.space import make_problem
from glac.tuning.stats import interval
from glac.tuning.timing import HostStopwatch

VECTOR = make_problem((2, 96, 2, 16, 24))
LOWRANK = make_problem((2, 96, 2, 16, 24), Gate.LOWRANK, 16)
TILE = ChunkKernelConfig(16, 16, 4, 2)
WHOLE = ForwardConfig(TILE)
Spoil = Callable[[Tensor, Tensor | None], None]


class FakeKernel:
    """``gla_fwd`` without segments, computed as the yardstick does, then spoilt."""

    def __init__(self, spec: Specialisation, spoil: Spoil | None) -> None:
        self._spec, self._spoil = spec, spoil

    def run(self, tensors: Sequence[Tensor | None], scalars: Sequence[Any], grid: int) -> None:
        q, k, v, *gate, o, _cu, h0, _starts, ht = tensors
        assert q is not None
        assert k is not None
        assert v is not None
        assert o is not None
        g = gate[0]
        assert g is not None
        if len(gate) == 3:
            assert gate[1] is not None
            g = lowrank_gate(g, gate[1], gate[2], num_heads=q.shape[2], normalizer=1 / scalars[1])
        out, state = yardstick_chunk_gla(
            q, k, v, g, scale=scalars[0], initial_state=h0, output_final_state=True, chunk_size=32
        )
        assert state is not None
        o.copy_(out)
        if ht is not None:
            ht.copy_(state)
        if self._spoil:
            self._spoil(o, ht)


def checker(problem: Problem, spoil: Spoil | None = None) -> Checker:
    def load(spec: Specialisation, config: Config) -> Mapping[str, Kernel]:
        return {"gla_fwd": FakeKernel(spec, spoil)}

    effort = Effort(samples=6, early=3, most=6)
    return Checker(problem, torch.device("cpu"), load, HostStopwatch(), effort)


def judge(spoil: Spoil | None = None, problem: Problem = VECTOR) -> Outcome:
    return checker(problem, spoil).evaluate(WHOLE, None)


@pytest.mark.parametrize("problem", [VECTOR, LOWRANK], ids=str)
def test_a_right_kernel_passes(problem: Problem) -> None:
    outcome = judge(problem=problem)
    assert outcome.status == OK, outcome.reason
    assert outcome.us
    assert outcome.samples == 6
    assert 0 < outcome.error < 4e-3
    assert outcome.hard_error < 8e-3


def test_a_slow_kernel_is_given_up_early() -> None:
    outcome = checker(VECTOR).evaluate(WHOLE, 1e-3)
    assert outcome.status == OK
    assert outcome.pruned
    assert outcome.samples == 3


def only(tokens: int, spoil: Callable[[Tensor], object]) -> Spoil:
    """Spoils outputs of that many tokens: 96 is the tuned shape, 173 the small cases."""

    def apply(o: Tensor, ht: Tensor | None) -> None:
        if o.shape[1] == tokens:
            spoil(o)

    return apply


def test_nan_anywhere_is_wrong() -> None:
    for tokens in (96, 173):
        outcome = judge(only(tokens, lambda o: o[1, -1, 1, 3:4].fill_(math.nan)))
        assert outcome.status == WRONG
        assert "NaN" in outcome.reason


def test_too_large_an_error_is_wrong() -> None:
    outcome = judge(only(96, lambda o: o.mul_(1.05)))
    assert outcome.status == WRONG
    assert outcome.error > 0.04
    assert "allowed" in outcome.reason


@pytest.mark.parametrize(
    ("precision", "error", "right"),
    [("ieee", 2e-6, True), ("ieee", 2e-3, False), ("tf32", 2e-3, True), ("tf32", 4e-3, False)],
)
def test_budgets_of_fp32_inputs(precision: str, error: float, right: bool) -> None:
    shape = (2, 96, 2, 16, 24)
    problem = make_problem(shape, dtype=DType.FP32, precision=Precision(precision))
    outcome = judge(only(96, lambda o: o.mul_(1 + error)), problem)
    assert outcome.status == (OK if right else WRONG), outcome.reason
    assert outcome.error == pytest.approx(error, rel=0.1)


def test_one_wrong_row_in_many_is_found() -> None:
    problem = make_problem((4, 2048, 2, 16, 16))
    case = checker(problem, only(2048, lambda o: o[2, 1033, 1].mul_(1.3)))
    outcome = case.evaluate(WHOLE, None)
    assert outcome.status == WRONG
    assert "row" in outcome.reason


def test_the_final_state_is_checked() -> None:
    def spoil(o: Tensor, ht: Tensor | None) -> None:
        if ht is not None:
            ht[0, 0, 0] = 0.0

    outcome = judge(spoil)
    assert outcome.status == WRONG
    assert "state" in outcome.reason


def test_a_ragged_tail_is_checked() -> None:
    outcome = judge(only(173, lambda o: o[:, 160:].zero_()))
    assert outcome.status == WRONG
    assert "T=173" in outcome.reason


@pytest.mark.parametrize(("tokens", "name"), [(256, "even"), (7, "short")])
def test_neighbouring_shapes_are_checked(tokens: int, name: str) -> None:
    outcome = judge(only(tokens, lambda o: o[:, -3:].zero_()))
    assert outcome.status == WRONG
    assert f"{name}, T={tokens}" in outcome.reason


class Recorded:
    """A stopwatch that replays times."""

    def __init__(self, times: list[float]) -> None:
        self.times, self.taken = times, 0

    def warm_up(self, fn: Callable[[], object]) -> None:
        pass

    def sample(self, fn: Callable[[], object], count: int) -> list[float]:
        found = [self.times[(self.taken + i) % len(self.times)] for i in range(count)]
        self.taken += count
        return found


@pytest.mark.parametrize(
    ("times", "samples", "noisy"),
    [
        ([100.0, 100.5], 10, False),
        ([95.0, 100.0, 105.0, 99.0, 100.0, 101.0, 100.0], 40, False),
        ([80.0, 120.0], 40, True),
    ],
    ids=["steady", "steady in the long run", "never steady"],
)
def test_timing_goes_on_until_the_interval_is_narrow(
    times: list[float], samples: int, noisy: bool
) -> None:
    def load(spec: Specialisation, config: Config) -> Mapping[str, Kernel]:
        return {"gla_fwd": FakeKernel(spec, None)}

    effort = Effort(samples=10, early=3, most=40)
    clock = Clock(1980, "power cap")
    fake = Checker(VECTOR, torch.device("cpu"), load, Recorded(times), effort, clock=lambda: clock)
    outcome = fake.evaluate(WHOLE, None)
    assert outcome.status == OK, outcome.reason
    assert outcome.noisy is noisy
    assert (outcome.samples > 10) is (samples > 10)
    assert outcome.samples <= samples
    assert (outcome.interval > effort.interval) is noisy
    assert (outcome.clock_mhz, outcome.throttle) == (1980, "power cap")


def test_the_interval_holds_the_median() -> None:
    assert interval([1.0] * 5) == math.inf
    assert interval([100.0] * 30) == 0.0
    chance = random.Random(0)
    inside = 0
    for _ in range(400):
        samples = [100.0 * math.exp(chance.gauss(0, 0.02)) for _ in range(25)]
        width = interval(samples) * statistics.median(samples)
        inside += abs(statistics.median(samples) - 100.0) <= width
    assert inside >= 0.95 * 400


@pytest.mark.parametrize("nth", [1, 9], ids=["before timing", "after timing"])
def test_runs_that_differ_are_refused(nth: int) -> None:
    calls = iter(range(1000))

    def spoil(o: Tensor, ht: Tensor | None) -> None:
        if o.shape[1] == 96 and next(calls) == nth:
            o[0, 0, 0, 0] += 2.0**-5

    assert judge(spoil).status == NOT_REPEATABLE


def test_comparison_takes_turns() -> None:
    times = checker(VECTOR).compare([WHOLE, WHOLE, WHOLE], rounds=2)
    assert [len(row) for row in times] == [2, 2, 2]
    assert all(us > 0 for row in times for us in row)


def test_slices_cover_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = checker(VECTOR).yardstick.error
    for limit in (1, 96 * 24, 96 * 24 * 2, 96 * 24 * 3):
        monkeypatch.setattr(cases, "_SLICE_ELEMENTS", limit)
        seen = torch.zeros(2, 2)
        for b, h in cases.slices(VECTOR):
            seen[b, h] += 1
        assert bool((seen == 1).all())
        assert checker(VECTOR).yardstick.error == pytest.approx(whole, rel=1e-6)


# The backward pass.


Gradients = tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...], Tensor | None]
SpoilGradients = Callable[[dict[str, Tensor]], None]


def fake_backward(spoil: SpoilGradients | None) -> Callable[..., Gradients]:
    """In place of ``run_backward``: what the yardstick computes, then spoilt."""

    def run(
        plan: Plan[BackwardConfig],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: GateInput,
        scale: float,
        initial_state: Tensor | None,
        do: Tensor,
        dht: Tensor | None,
        *,
        dh0: bool,
    ) -> Gradients:
        assert dh0 == (dht is not None)
        leaves = [x.detach().float().requires_grad_() for x in gate.tensors if x is not None]
        with torch.enable_grad():
            g = leaves[0]
            if gate.lowrank:
                normalizer = 1 / gate.inv_normalizer
                g = lowrank_gate(*leaves, num_heads=q.shape[2], normalizer=normalizer)
        near = yardstick_chunk_gla_backward(
            q, k, v, g.detach(), do, scale=scale, initial_state=initial_state, dht=dht
        )
        found = torch.autograd.grad(g, leaves, near.dg) if gate.lowrank else (near.dg,)
        gates = tuple(
            x.to(like.dtype)
            for x, like in zip(found, gate.tensors, strict=True)
            if like is not None
        )
        named = {"dq": near.dq, "dk": near.dk, "dv": near.dv, "gate": gates[0]}
        if near.dh0 is not None:
            named["dh0"] = near.dh0
        if spoil:
            spoil(named)
        return near.dq, near.dk, near.dv, gates, near.dh0

    return run


def gradients(
    monkeypatch: pytest.MonkeyPatch, problem: Problem = VECTOR, spoil: SpoilGradients | None = None
) -> Outcome:
    """What becomes of a backward candidate that computes what ``fake_backward`` does."""
    monkeypatch.setattr(cases, "run_backward", fake_backward(spoil))
    config = default_backward(problem.spec, GPUS["h100"], problem.bucket)
    checker = Checker(
        problem,
        torch.device("cpu"),
        lambda spec, config: {},
        HostStopwatch(),
        Effort(samples=6, early=3, most=6),
        op=Op.BACKWARD,
    )
    assert 0 < checker.yardstick.error < 2e-2
    return checker.evaluate(config, None)


WIDE = make_problem((2, 96, 2, 16, 24), gate_dtype=DType.FP32)


@pytest.mark.parametrize("problem", [VECTOR, LOWRANK, WIDE], ids=str)
def test_right_gradients_pass(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = gradients(monkeypatch, problem)
    assert outcome.status == OK, outcome.reason
    assert outcome.us
    assert 0 < outcome.error < 2e-2
    assert 0 < outcome.hard_error < 2e-2


@pytest.mark.parametrize("problem", [VECTOR, LOWRANK], ids=str)
@pytest.mark.parametrize("name", ["dq", "dk", "dv", "gate", "dh0"])
def test_each_gradient_is_checked(
    problem: Problem, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(found: dict[str, Tensor]) -> None:
        if name in found:
            found[name].mul_(1.05)

    outcome = gradients(monkeypatch, problem, spoil)
    assert outcome.status == WRONG
    shown = ("dg" if problem is VECTOR else "dx") if name == "gate" else name
    assert outcome.reason.startswith(f"mild gates, T=173: {shown}: error")


def test_a_gradient_with_nan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(found: dict[str, Tensor]) -> None:
        if found["dq"].shape[1] == 96:
            found["gate"][1, 3, 0, 5] = math.nan

    outcome = gradients(monkeypatch, VECTOR, spoil)
    assert outcome.status == WRONG
    assert outcome.reason == "dg has NaN or inf"


def test_gradients_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1000))

    def spoil(found: dict[str, Tensor]) -> None:
        if found["dq"].shape[1] == 96 and next(calls) == 1:
            found["dv"][0, 0, 0, 0] += 2.0**-5

    assert gradients(monkeypatch, VECTOR, spoil).status == NOT_REPEATABLE


def test_gradients_through_a_gate_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    whole = cases.tuned_case(Op.BACKWARD, LOWRANK, device, 0)
    monkeypatch.setattr(cases, "_SLICE_ELEMENTS", 1)
    parts = cases.tuned_case(Op.BACKWARD, LOWRANK, device, 0)
    assert set(whole.truth) == {"dq", "dk", "dv", "dx", "dweight", "dbias"}
    for name, truth in whole.truth.items():
        torch.testing.assert_close(parts.truth[name], truth, rtol=1e-6, atol=1e-6)
        assert parts.yardstick[name].total == pytest.approx(whole.yardstick[name].total, rel=0.05)
    # Autograd through gate and recurrence at once.
    i = whole.inputs
    assert i.x is not None
    assert i.weight is not None
    assert i.bias is not None
    assert isinstance(whole, cases.BackwardCase)
    leaves = [x.double().requires_grad_() for x in (i.x, i.weight, i.bias)]
    g = lowrank_gate(*leaves, num_heads=LOWRANK.H)
    out, _ = recurrent_gla(i.q.double(), i.k.double(), i.v.double(), g)
    found = torch.autograd.grad(out, leaves, whole.do.double())
    for name, value in zip(("dx", "dweight", "dbias"), found, strict=True):
        torch.testing.assert_close(whole.truth[name], value.float(), rtol=1e-5, atol=1e-5)


# The real kernels.


def interpreted(spec: Specialisation, config: Config) -> Mapping[str, Kernel]:
    from glac.interpret import InterpretedKernel

    kernels = config_kernels(spec, config, "sm_90a")
    return {k.template: InterpretedKernel(k) for k in kernels}


REAL = [
    WHOLE,
    ForwardConfig(TILE, 16, TILE),
    BackwardConfig(TILE, TileKernelConfig(16, 16, 16, 4, 2, dv=True)),
    BackwardConfig(TILE, TileKernelConfig(32, 16, 16, 4, 2), TILE),
    ScalarForwardConfig(TurnedKernelConfig(16, 16, 4, 2, turned=True)),
    ScalarBackwardConfig(TILE, TILE),
    ScalarBackwardConfig(TILE, None, TileKernelConfig(16, 16, 16, 4, 2), TILE),
    DecodeConfig(DecodeKernelConfig(16, 2)),
]


@pytest.mark.interpreter
@pytest.mark.parametrize("gate", list(Gate))
@pytest.mark.parametrize("config", REAL, ids=lambda config: config.slug)
def test_the_real_kernels_pass(
    config: Config, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not config.op.serves(gate):
        return
    monkeypatch.setattr(checks, "RAGGED_TOKENS", 37)
    rank = 16 if gate is Gate.LOWRANK else 0
    problem = make_problem((1, 64, 1, 16, 16), gate, rank, DType.FP32)
    effort = Effort(samples=3)
    device = torch.device("cpu")
    case = Checker(problem, device, interpreted, HostStopwatch(), effort, op=config.op)
    outcome = case.evaluate(config, None)
    assert outcome.status == OK, outcome.reason
