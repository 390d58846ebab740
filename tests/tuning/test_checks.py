"""What the worker checks, with kernels made of PyTorch: right passes, each kind of wrong fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from glac.configs import ChunkKernelConfig, ForwardConfig
from glac.forward import Kernel
from glac.kernelspec import forward_kernels
from glac.problem import DType, Gate, Problem, Specialisation
from glac.reference import lowrank_gate, yardstick_chunk_gla
from glac.tuning import checks
from glac.tuning.checks import Checker
from glac.tuning.evaluate import NOT_REPEATABLE, OK, WRONG, Effort, Outcome
from glac.tuning.space import make_problem
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
        q, k, v, *gate, o, h0, ht = tensors
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
    def load(spec: Specialisation, config: ForwardConfig) -> Mapping[str, Kernel]:
        return {"gla_fwd": FakeKernel(spec, spoil)}

    effort = Effort(samples=6, early=3)
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
        monkeypatch.setattr(checks, "_SLICE_ELEMENTS", limit)
        seen = torch.zeros(2, 2)
        for b, h in checks._slices(VECTOR):
            seen[b, h] += 1
        assert bool((seen == 1).all())
        assert checker(VECTOR).yardstick.error == pytest.approx(whole, rel=1e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("gate", list(Gate))
def test_the_real_kernels_pass(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    from glac.interpret import InterpretedKernel

    def load(spec: Specialisation, config: ForwardConfig) -> Mapping[str, Kernel]:
        kernels = forward_kernels(spec, config, "sm_90a")
        return {k.template: InterpretedKernel(k) for k in kernels}

    monkeypatch.setattr(checks, "_RAGGED_TOKENS", 37)
    rank = 16 if gate is Gate.LOWRANK else 0
    problem = make_problem((1, 64, 1, 16, 16), gate, rank, DType.FP32)
    case = Checker(problem, torch.device("cpu"), load, HostStopwatch(), Effort(samples=3))
    for config in (WHOLE, ForwardConfig(TILE, 16, TILE)):
        outcome = case.evaluate(config, None)
        assert outcome.status == OK, outcome.reason
