"""Segments backward, packed batches, grouped heads: kernels against PyTorch in fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glac import fallback
from glac.backward import run_backward
from glac.configs import BackwardConfig, ChunksBackwardConfig, ForwardConfig
from glac.forward import run_forward
from glac.gate import GateInput
from glac.interpret import interpreted_plan
from glac.layouts import laid_out
from glac.problem import Problem
from glac.reference import relative_rms
from glac.templates import stride_unit
from glac.testing import hard_gates
from glac.validate import check_lowrank, check_vector
from tests.interpreter.running import backward_config, chunks_config, config, guarded

pytestmark = pytest.mark.interpreter

BUDGET = 5e-6
SCALE = 0.3


@dataclass(frozen=True)
class Batch:
    """Inputs of one call, gradients of its results, boundaries if it is packed."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: GateInput
    state: Tensor | None
    do: Tensor
    dht: Tensor | None
    cu: Tensor | None

    @property
    def problem(self) -> Problem:
        if self.gate.lowrank:
            x, weight, bias = self.gate.tensors
            assert x is not None
            assert weight is not None
            return check_lowrank(self.q, self.k, self.v, x, weight, bias, self.state, self.cu)
        assert self.gate.tensors[0] is not None
        return check_vector(self.q, self.k, self.v, self.gate.tensors[0], self.state, self.cu)

    def double(self) -> Batch:
        def wide(t: Tensor | None) -> Any:
            return t.double() if t is not None and t.is_floating_point() else t

        gate = replace(self.gate, tensors=tuple(wide(t) for t in self.gate.tensors))
        tensors = {n: wide(t) for n, t in vars(self).items() if n != "gate"}
        return Batch(gate=gate, **tensors)

    def sequence(self, n: int) -> Batch:
        """Sequence n of a packed batch, alone and dense."""
        assert self.cu is not None
        begin, end = self.cu.tolist()[n : n + 2]
        cut = {name: getattr(self, name)[:, begin:end] for name in ("q", "k", "v", "do")}
        first, *rest = self.gate.tensors
        assert first is not None
        gate = replace(self.gate, tensors=(first[:, begin:end], *rest))
        state = None if self.state is None else self.state[n : n + 1]
        dht = None if self.dht is None else self.dht[n : n + 1]
        return Batch(gate=gate, state=state, dht=dht, cu=None, **cut)


def drawn(
    T: int,
    *,
    B: int = 1,
    heads: tuple[int, int, int] = (1, 1, 1),
    lengths: tuple[int, ...] = (),
    K: int = 16,
    V: int = 20,
    lowrank: bool = False,
    hard: bool = False,
    ends: bool = True,
    seed: int = 0,
) -> Batch:
    """Heads of q, k and v; ``lengths`` of a packed batch's sequences, which add up to T."""
    torch.manual_seed(seed)
    q_heads, k_heads, v_heads = heads
    n = len(lengths) or B
    x = torch.randn(B, T, 8), torch.randn(v_heads * K, 8) / 4, torch.randn(v_heads * K)
    g = torch.nn.functional.logsigmoid(torch.randn(B, T, v_heads, K)) / 16
    if hard:
        g = hard_gates((B, T, v_heads, K), seed=seed)
    cu = None
    if lengths:
        assert sum(lengths) == T
        cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Batch(
        torch.randn(B, T, q_heads, K),
        torch.randn(B, T, k_heads, K),
        torch.randn(B, T, v_heads, V),
        GateInput(x, 1 / 16) if lowrank else GateInput((g,)),
        torch.randn(n, v_heads, K, V) if ends else None,
        torch.randn(B, T, max(q_heads, v_heads), V),
        torch.randn(n, v_heads, K, V) if ends else None,
        cu,
    )


def forward(x: Batch, cfg: ForwardConfig) -> tuple[Tensor, Tensor]:
    problem = x.problem
    spec = problem.spec
    gate = x.gate
    if not gate.lowrank:
        assert gate.tensors[0] is not None
        gate = GateInput((laid_out(gate.tensors[0], stride_unit(spec.K)),))
    q, k = (laid_out(t, stride_unit(spec.K)) for t in (x.q, x.k))
    with guarded():
        o, state = run_forward(
            interpreted_plan(problem, cfg),
            q,
            k,
            laid_out(x.v, stride_unit(spec.V)),
            gate,
            SCALE,
            x.state,
            True,
            x.cu,
        )
    assert state is not None
    return o, state


def named(grads: Any, lowrank: bool) -> dict[str, Tensor]:
    dq, dk, dv, gates, dh0 = grads
    names = ("dx", "dweight", "dbias") if lowrank else ("dg",)
    return {"dq": dq, "dk": dk, "dv": dv, **dict(zip(names, gates, strict=True)), "dh0": dh0}


def backward(x: Batch, cfg: BackwardConfig | ChunksBackwardConfig) -> dict[str, Tensor]:
    problem = x.problem
    spec = problem.spec
    gate = x.gate
    if not gate.lowrank:
        assert gate.tensors[0] is not None
        gate = GateInput((laid_out(gate.tensors[0], stride_unit(spec.K)),))
    q, k = (laid_out(t, stride_unit(spec.K)) for t in (x.q, x.k))
    v, do = (laid_out(t, stride_unit(spec.V)) for t in (x.v, x.do))
    with guarded():
        grads = run_backward(
            interpreted_plan(problem, cfg),
            *(q, k, v, gate, SCALE, x.state, do, x.dht),
            dh0=x.state is not None,
            cu=x.cu,
        )
    return {n: t for n, t in named(grads, x.gate.lowrank).items() if t is not None}


def assert_near(name: str, actual: Tensor, wanted: Tensor) -> None:
    assert actual.shape == wanted.shape, name
    error = relative_rms(actual.double(), wanted)
    assert error <= BUDGET, f"{name}: error {error:.2e}"


def assert_right(x: Batch, fwd: ForwardConfig, bwd: BackwardConfig | None) -> None:
    """Of the pass forward, and of the pass backward if it has a config."""
    wide = x.double()
    wanted = fallback.forward(
        x.problem, wide.q, wide.k, wide.v, wide.gate, SCALE, wide.state, True, 16, x.cu
    )
    for name, a, b in zip(("o", "state"), forward(x, fwd), wanted, strict=True):
        assert b is not None
        assert_near(name, a, b)
    if bwd is not None:
        assert_backward_right(x, bwd)


def assert_backward_right(x: Batch, bwd: BackwardConfig | ChunksBackwardConfig) -> None:
    wide = x.double()
    grads = fallback.backward(
        x.problem,
        *(wide.q, wide.k, wide.v, wide.gate, SCALE, wide.state, wide.do, wide.dht),
        16,
        x.state is not None,
        x.cu,
    )
    found = backward(x, bwd)
    for name, b in named(grads, x.gate.lowrank).items():
        if b is not None:
            assert_near(name, found[name], b)


def cut(segment: int, **options: Any) -> BackwardConfig:
    return replace(backward_config(**options), segment=segment)


# The backward pass has one implementation: what follows leaves it out where it was checked.
PREPARE = pytest.mark.parametrize("prepare", [0, 16], ids=["gla_fwd", "gla_walk"])


@pytest.mark.parametrize("tokens", [33, 64, 70])
@pytest.mark.parametrize("hard", [False, True])
def test_backward_in_segments(tokens: int, hard: bool) -> None:
    x = drawn(tokens, B=2, hard=hard, seed=tokens)
    assert_right(x, config(16, 16, 32), cut(32, dv_chunk=16, tma=False))


@pytest.mark.parametrize("lowrank", [False, True])
@pytest.mark.parametrize("at_once", [1, 2, 99])
def test_a_few_segments_at_once(
    lowrank: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glac.backward.PROGRAMS", at_once)
    monkeypatch.setenv("GLAC_SCRATCH_MIB", "0")
    x = drawn(100, lowrank=lowrank, K=32)
    assert_right(x, config(32, 16, 32), cut(32, chunk=32, block_k=16, dv_chunk=16))


@pytest.mark.parametrize(
    "heads", [(4, 2, 4), (2, 1, 2), (2, 4, 4), (4, 1, 1), (4, 1, 2), (1, 1, 2), (6, 3, 3)]
)
@pytest.mark.parametrize("segment", [0, 32])
@PREPARE
def test_grouped_heads(heads: tuple[int, int, int], segment: int, prepare: int) -> None:
    x = drawn(40, heads=heads, lowrank=segment == 32)
    bwd = cut(segment, dv_chunk=16) if segment else backward_config()
    assert_right(x, config(16, 32, segment, prepare=prepare), None if prepare else bwd)


@pytest.mark.parametrize("segment", [0, 32])
@pytest.mark.parametrize("heads", [(4, 2, 4), (4, 1, 2), (6, 3, 3)])
def test_prepared_grouped_heads_with_hard_gates(heads: tuple[int, int, int], segment: int) -> None:
    x = drawn(70, heads=heads, hard=True)
    assert_right(x, config(16, 32, segment, prepare=16), None)


def test_groups_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLAC_SCRATCH_MIB", "0")
    assert_right(drawn(90, heads=(4, 1, 2)), config(), backward_config(dv_chunk=16))


@pytest.mark.parametrize(
    "lengths", [(20,), (0, 5, 0, 31, 0), (1, 1, 1), (16, 32, 48), (63, 1, 0, 32)]
)
@pytest.mark.parametrize("segment", [0, 32])
@PREPARE
def test_packed_batches(lengths: tuple[int, ...], segment: int, prepare: int) -> None:
    x = drawn(sum(lengths), lengths=lengths)
    bwd = None if prepare else cut(segment, dv_chunk=16)
    assert_right(x, config(16, 16, segment, prepare=prepare), bwd)


@settings(max_examples=4)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(any),
    groups=st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 1, 2), (2, 1, 2)]),
    segment=st.sampled_from([0, 16, 32]),
    lowrank=st.booleans(),
    hard=st.booleans(),
    ends=st.booleans(),
    tma=st.booleans(),
    prepare=st.sampled_from([0, 16]),
    seed=st.integers(0, 99),
)
def test_any_packed_batch(
    lengths: list[int],
    groups: tuple[int, int, int],
    segment: int,
    lowrank: bool,
    hard: bool,
    ends: bool,
    tma: bool,
    prepare: int,
    seed: int,
) -> None:
    x = drawn(
        sum(lengths),
        lengths=tuple(lengths),
        heads=groups,
        lowrank=lowrank,
        hard=hard,
        ends=ends,
        seed=seed,
    )
    fwd = config(16, 16, segment, tma=tma, prepare=prepare)
    assert_right(x, fwd, cut(segment, dv_chunk=16, tma=tma))


@pytest.mark.parametrize("segment", [0, 32])
@pytest.mark.parametrize("hard", [False, True])
@PREPARE
def test_packed_is_separate_bit_for_bit(segment: int, hard: bool, prepare: int) -> None:
    # The exact passes of hard gates are slow here.
    heads = (1, 1, 1) if hard else (2, 1, 2)
    x = drawn(75, lengths=(31, 0, 10, 34), heads=heads, hard=hard)
    fwd, bwd = config(16, 16, segment, prepare=prepare), cut(segment or 64, dv_chunk=16)
    o, state = forward(x, fwd)
    grads = {} if prepare else backward(x, bwd)  # which prepares nothing
    for n in (0, 2, 3):
        alone = x.sequence(n)
        assert x.cu is not None
        begin, end = x.cu.tolist()[n : n + 2]
        one, last = forward(alone, fwd)
        assert torch.equal(o[:, begin:end], one)
        assert torch.equal(state[n : n + 1], last)
        if not grads:
            continue
        separate = backward(alone, bwd)
        for name in ("dq", "dk", "dv", "dg"):
            assert torch.equal(grads[name][:, begin:end], separate[name]), name
        assert torch.equal(grads["dh0"][n : n + 1], separate["dh0"])


@pytest.mark.parametrize("cu", [[0, 99], [5, 3, 1], [-4, 30], [3, 20, 60]])
@pytest.mark.parametrize("segment", [0, 16])
@PREPARE
def test_wrong_boundaries_touch_nothing_else(cu: list[int], segment: int, prepare: int) -> None:
    """Results mean nothing, but no kernel leaves its tensors (``guarded`` watches)."""
    x = drawn(40, lengths=(*(1,) * (len(cu) - 2), 42 - len(cu)), heads=(2, 2, 2))
    x = replace(x, cu=torch.tensor(cu, dtype=torch.int32))
    forward(x, config(16, 16, segment, prepare=prepare))
    backward(x, cut(segment, dv_chunk=16))


# --- programs that walk to their segments ------------------------------------------------------


@pytest.mark.parametrize(
    ("chunk", "lead", "tma"), [(16, 32, True), (32, 16, False), (16, 16, True)]
)
@pytest.mark.parametrize("hard", [False, True])
def test_programs_walk_to_their_segments(chunk: int, lead: int, hard: bool, tma: bool) -> None:
    x = drawn(70, B=1 if hard else 2, hard=hard, seed=lead)
    bwd = cut(32, chunk=chunk, lead=lead, tma=tma)
    assert_right(x, config(chunk, 16, 32, lead=lead, tma=tma), bwd)


@pytest.mark.parametrize(
    ("heads", "lowrank"),
    [
        ((4, 2, 4), False),
        ((2, 1, 2), True),
        ((4, 1, 1), False),
        ((4, 1, 2), True),
        ((1, 1, 2), False),
    ],
)
def test_groups_walk_to_their_segments(heads: tuple[int, int, int], lowrank: bool) -> None:
    x = drawn(70, heads=heads, lowrank=lowrank)
    bwd = cut(32, dv_chunk=16, lead=16)
    assert_right(x, config(16, 16, 48, lead=16), bwd)


@pytest.mark.parametrize(("hard", "tma"), [(False, True), (True, False)])
def test_packed_sequences_walk_to_their_segments(hard: bool, tma: bool) -> None:
    x = drawn(100, lengths=(0, 37, 0, 63), hard=hard)
    assert_right(x, config(16, 16, 32, lead=32, tma=tma), cut(32, lead=32, tma=tma))


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_few_of_those_segments_at_once(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glac.backward.PROGRAMS", at_once)
    monkeypatch.setenv("GLAC_SCRATCH_MIB", "0")
    x = drawn(100, lowrank=at_once == 2)
    assert_right(x, config(16, 16, 32, lead=16), cut(32, lead=16))


def test_nothing_to_walk_to_is_right() -> None:
    assert_right(drawn(20), config(16, 16, 32, lead=16), cut(64, lead=16))


@pytest.mark.parametrize("cu", [[0, 99], [5, 3, 1], [-4, 30], [3, 20, 60]])
def test_wrong_boundaries_lead_nowhere(cu: list[int]) -> None:
    x = drawn(40, lengths=(*(1,) * (len(cu) - 2), 42 - len(cu)), heads=(2, 2, 2))
    x = replace(x, cu=torch.tensor(cu, dtype=torch.int32))
    forward(x, config(16, 16, 16, lead=16))
    backward(x, cut(16, dv_chunk=16, lead=16))


# --- gradients of all chunks at once -----------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "segment"), [((4, 2, 4), 0), ((2, 4, 4), 32), ((4, 1, 2), 32), ((1, 1, 2), 0)]
)
def test_groups_with_all_chunks_at_once(heads: tuple[int, int, int], segment: int) -> None:
    x = drawn(40, heads=heads, lowrank=segment == 32)
    assert_backward_right(x, chunks_config(32, segment=segment))


@pytest.mark.parametrize("lengths", [(0, 5, 0, 31, 0), (63, 1, 0, 32)])
@pytest.mark.parametrize("segment", [0, 32])
def test_packed_with_all_chunks_at_once(lengths: tuple[int, ...], segment: int) -> None:
    x = drawn(sum(lengths), lengths=lengths, lowrank=segment == 32)
    assert_backward_right(x, chunks_config(32, segment=segment))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("segment", [32, 64])
@pytest.mark.parametrize("hard", [False, True])
def test_chunks_at_once_are_separate_bit_for_bit(segment: int, hard: bool) -> None:
    x = drawn(75, lengths=(31, 0, 10, 34), hard=hard)
    cfg = chunks_config(16, segment=segment)
    grads = backward(x, cfg)
    for n in (0, 2, 3):
        assert x.cu is not None
        begin, end = x.cu.tolist()[n : n + 2]
        separate = backward(x.sequence(n), cfg)
        for name in ("dq", "dk", "dv", "dg"):
            assert torch.equal(grads[name][:, begin:end], separate[name]), name
        assert torch.equal(grads["dh0"][n : n + 1], separate["dh0"])


@pytest.mark.parametrize("cu", [[0, 99], [5, 3, 1], [-4, 30], [3, 20, 60]])
def test_wrong_boundaries_of_chunks_touch_nothing_else(cu: list[int]) -> None:
    x = drawn(40, lengths=(*(1,) * (len(cu) - 2), 42 - len(cu)), heads=(2, 2, 2))
    x = replace(x, cu=torch.tensor(cu, dtype=torch.int32))
    backward(x, chunks_config(16, segment=16))
