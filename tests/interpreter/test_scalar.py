"""The kernels of a scalar gate against the token loop in fp64, in Triton's interpreter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from glac import scalar, scalar_segments
from glac.configs import (
    ChunkKernelConfig,
    CombineKernelConfig,
    Config,
    ScalarBackwardConfig,
    ScalarForwardConfig,
    TileKernelConfig,
    TurnedKernelConfig,
    is_legal,
)
from glac.gpus import GPUS
from glac.interpret import InterpretedKernel, interpreted_plan
from glac.kernelspec import KernelSpec
from glac.problem import Gate
from glac.scalar import ScalarInputs
from glac.testing import HARD_GATE_VALUES
from tests.interpreter.running import guarded

pytestmark = pytest.mark.interpreter

FP32, FP16 = torch.float32, torch.float16
BUDGET = {FP32: 1e-5, FP16: 2e-3}
HEADS = st.sampled_from([(1, 1, 1), (2, 2, 2), (4, 2, 2), (6, 1, 3), (1, 2, 4), (2, 1, 2)])
SIZES = st.sampled_from([1, 5, 8, 16, 24, 32])
GATES = st.sampled_from(["token", "head", "none"])
SCALE = 0.37


def drawn(
    batch: int,
    tokens: int,
    heads: tuple[int, int, int],
    K: int,
    V: int,
    gate: str,
    *,
    dtype: torch.dtype = FP32,
    hard: bool = False,
    carried: bool = True,
    lengths: list[int] | None = None,
    seed: int = 0,
) -> ScalarInputs:
    """Inputs of a call; ``lengths`` packs sequences, and takes the place of batch and tokens."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    cu = None
    if lengths is not None:
        batch, tokens = 1, sum(lengths)
        cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    Hq, Hk, Hs = heads
    q, k = randn(batch, tokens, Hq, K).to(dtype), randn(batch, tokens, Hk, K).to(dtype)
    v = randn(batch, tokens, Hs, V).to(dtype)
    g = None
    if gate != "none":
        shape = (Hs,) if gate == "head" else (batch, tokens, Hs)
        g = torch.nn.functional.logsigmoid(randn(*shape)) / 4
        if hard:
            values = torch.tensor(HARD_GATE_VALUES)
            g = values[torch.randint(len(values), shape, generator=generator)]
        g = g.to(dtype) if seed % 2 else g
    rows = batch if lengths is None else len(lengths)
    return ScalarInputs(q, k, v, g, randn(rows, Hs, K, V) if carried else None, cu)


def legal(i: ScalarInputs, cfg: Config) -> bool:
    return is_legal(scalar.check(i).problem.spec, cfg, GPUS["h100"])


def in_fp64(i: ScalarInputs) -> ScalarInputs:
    def wide(t: Tensor | None) -> Tensor | None:
        return t if t is None else t.double()

    q, k, v = i.q.double(), i.k.double(), i.v.double()
    return ScalarInputs(q, k, v, wide(i.g), wide(i.initial_state), i.cu_seqlens)


def close(name: str, got: Tensor | None, wanted: Tensor | None, budget: float) -> None:
    assert (got is None) == (wanted is None), name
    if got is None or wanted is None:
        return
    assert got.shape == wanted.shape, name
    assert bool(got.isfinite().all()), f"{name} is not finite"
    size = max(float(wanted.double().norm()), math.sqrt(wanted.numel()) * 0.1)
    error = float((got.double() - wanted.double()).norm()) / size
    assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


def forward_config(
    chunk: int = 16, block_v: int = 16, *, tma: bool = False, turned: bool = False
) -> ScalarForwardConfig:
    return ScalarForwardConfig(TurnedKernelConfig(chunk, block_v, 4, 2, tma, turned))


def backward_config(
    chunk: int = 16,
    block_k: int = 16,
    block_v: int = 16,
    *,
    tma: bool = False,
    walks: bool = True,
) -> ScalarBackwardConfig:
    """Walking back through sequences, or all chunks at once."""
    walk = ChunkKernelConfig(chunk, block_v, 4, 2, tma)
    if not walks:
        return ScalarBackwardConfig(walk, walk)
    grads = TileKernelConfig(chunk, block_k, block_v, 4, 2, tma)
    return ScalarBackwardConfig(walk, None, grads, replace(walk, chunk=16))


def run_forward(i: ScalarInputs, cfg: ScalarForwardConfig) -> tuple[Tensor, Tensor | None]:
    checked = scalar.check(i)
    assert legal(i, cfg)
    with guarded():
        plan = interpreted_plan(checked.problem, cfg)
        return scalar.run_forward(plan, checked.groups, scalar._laid_out(i), SCALE, True)


def check_forward(i: ScalarInputs, cfg: ScalarForwardConfig) -> None:
    checked = scalar.check(i)
    o, state = run_forward(i, cfg)
    true_o, true_state = scalar.torch_forward(checked, in_fp64(i), SCALE, True, 64)
    close("o", o, true_o, BUDGET[i.q.dtype])
    close("state", state, true_state, BUDGET[i.q.dtype])


def ends_of(i: ScalarInputs, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    problem = scalar.check(i)
    do = torch.randn((*i.q.shape[:2], problem.problem.H, i.v.shape[3]), generator=generator)
    size = (i.sequences, problem.state_heads, i.q.shape[3], i.v.shape[3])
    return do.to(i.q.dtype), torch.randn(size, generator=generator)


def check_backward(i: ScalarInputs, cfg: ScalarBackwardConfig, seed: int, end: bool) -> None:
    checked = scalar.check(i)
    assert legal(i, cfg)
    do, dht = ends_of(i, seed)
    some = dht if end else None
    with guarded():
        found = scalar.run_backward(
            interpreted_plan(checked.problem, cfg),
            checked.groups,
            scalar._laid_out(i),
            SCALE,
            do,
            some,
            want_dg=i.g is not None,
            want_dh0=i.initial_state is not None,
        )
    true = scalar.torch_backward(
        checked,
        in_fp64(i),
        SCALE,
        do.double(),
        None if some is None else some.double(),
        64,
        want_dg=i.g is not None,
        want_dh0=i.initial_state is not None,
    )
    for name, got, wanted in zip(("dq", "dk", "dv", "dg", "dh0"), found, true, strict=True):
        close(name, got, wanted, BUDGET[i.q.dtype])


@settings(max_examples=60)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 70),
    heads=HEADS,
    keys=SIZES,
    values=SIZES,
    gate=GATES,
    dtype=st.sampled_from([FP32, FP16]),
    chunk=st.sampled_from([16, 32, 64]),
    block_v=st.sampled_from([16, 32]),
    tma=st.booleans(),
    turned=st.booleans(),
    hard=st.booleans(),
    carried=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(2, 70, (4, 2, 2), 32, 32, "token", FP32, 32, 16, True, True, True, True, 0)
@example(1, 1, (1, 1, 1), 1, 1, "none", FP16, 16, 16, False, False, False, False, 1)
def test_forward_equals_the_token_loop(
    batch: int,
    tokens: int,
    heads: tuple[int, int, int],
    keys: int,
    values: int,
    gate: str,
    dtype: torch.dtype,
    chunk: int,
    block_v: int,
    tma: bool,
    turned: bool,
    hard: bool,
    carried: bool,
    seed: int,
) -> None:
    i = drawn(
        batch,
        tokens,
        heads,
        keys,
        values,
        gate,
        dtype=dtype,
        hard=hard,
        carried=carried,
        seed=seed,
    )
    cfg = forward_config(chunk, block_v, tma=tma, turned=turned)
    assume(legal(i, cfg))
    check_forward(i, cfg)


@settings(max_examples=30)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 70),
    heads=HEADS,
    keys=SIZES,
    values=SIZES,
    gate=GATES,
    dtype=st.sampled_from([FP32, FP16]),
    chunk=st.sampled_from([16, 32]),
    block_k=st.sampled_from([16, 32]),
    block_v=st.sampled_from([16, 32]),
    tma=st.booleans(),
    walks=st.booleans(),
    hard=st.booleans(),
    carried=st.booleans(),
    end=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(2, 70, (4, 2, 2), 32, 32, "token", FP32, 32, 16, 16, True, True, True, True, True, 0)
@example(1, 1, (1, 1, 1), 1, 1, "none", FP16, 16, 16, 16, False, False, False, False, False, 1)
def test_gradients_equal_those_in_fp64(
    batch: int,
    tokens: int,
    heads: tuple[int, int, int],
    keys: int,
    values: int,
    gate: str,
    dtype: torch.dtype,
    chunk: int,
    block_k: int,
    block_v: int,
    tma: bool,
    walks: bool,
    hard: bool,
    carried: bool,
    end: bool,
    seed: int,
) -> None:
    i = drawn(
        batch,
        tokens,
        heads,
        keys,
        values,
        gate,
        dtype=dtype,
        hard=hard,
        carried=carried,
        seed=seed,
    )
    cfg = backward_config(chunk, block_k, block_v, tma=tma, walks=walks)
    assume(legal(i, cfg))
    check_backward(i, cfg, seed, end)


@settings(max_examples=14)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    heads=HEADS,
    gate=GATES,
    hard=st.booleans(),
    end=st.booleans(),
    seed=st.integers(0, 2**10),
)
@example([0, 17, 0, 0, 33], (4, 2, 2), "token", False, True, 0)
def test_packed_sequences(
    lengths: list[int], heads: tuple[int, int, int], gate: str, hard: bool, end: bool, seed: int
) -> None:
    i = drawn(1, 1, heads, 16, 16, gate, hard=hard, lengths=lengths, seed=seed)
    check_forward(i, forward_config(turned=bool(seed % 2)))
    check_backward(i, backward_config(walks=seed % 3 > 0), seed, end)


@pytest.mark.parametrize("turned", [False, True])
def test_packed_is_separate_bit_for_bit(turned: bool) -> None:
    lengths = [5, 40, 16]
    i = drawn(1, 1, (2, 2, 2), 16, 16, "token", lengths=lengths)
    cfg = forward_config(turned=turned)
    o, state = run_forward(i, cfg)
    assert state is not None
    assert i.g is not None
    assert i.initial_state is not None
    first = 0
    for n, length in enumerate(lengths):
        part = slice(first, first + length)
        one = ScalarInputs(
            i.q[:, part], i.k[:, part], i.v[:, part], i.g[:, part], i.initial_state[n : n + 1]
        )
        alone, end = run_forward(one, cfg)
        assert end is not None
        assert torch.equal(alone, o[:, part])
        assert torch.equal(end, state[n : n + 1])
        first += length


def test_broken_offsets_stay_in_memory() -> None:
    i = drawn(1, 40, (2, 2, 2), 16, 16, "token", carried=False)
    for offsets in ([0, 90, 20], [-4, 30, 10], [50, 2, 60]):
        broken = replace(i, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))
        run_forward(broken, forward_config())
        checked = scalar.check(broken)
        do, _ = ends_of(broken, 0)
        for walks in (False, True):
            with guarded():
                scalar.run_backward(
                    interpreted_plan(checked.problem, backward_config(walks=walks)),
                    checked.groups,
                    scalar._laid_out(broken),
                    SCALE,
                    do,
                    None,
                    want_dg=True,
                    want_dh0=True,
                )


@pytest.mark.parametrize("walks", [False, True])
def test_a_reset_forgets_and_has_no_gradient(walks: bool) -> None:
    i = drawn(1, 40, (1, 1, 1), 16, 16, "token", seed=2)
    assert i.g is not None
    g = i.g.clone()
    g[:, 21] = -math.inf
    i = replace(i, g=g)
    o, _ = run_forward(i, forward_config(32))
    late = ScalarInputs(*(t[:, 21:] for t in (i.q, i.k, i.v, g)))
    alone, _ = run_forward(late, forward_config(32))
    assert torch.allclose(o[:, 21:], alone, atol=2e-6)
    checked = scalar.check(i)
    do, dht = ends_of(i, 0)
    plan = interpreted_plan(checked.problem, backward_config(32, walks=walks))
    found = [
        scalar.run_backward(plan, checked.groups, i, SCALE, do, end, want_dg=True, want_dh0=True)
        for end in (dht, None)
    ]
    for *_, dg, _dh0 in found:
        assert dg is not None
        assert float(dg[0, 21, 0]) == 0.0
    for with_end, without in zip(*found, strict=True):
        assert with_end is not None
        assert without is not None
        # Nothing before the reset learns of what comes after the sequence.
        before = slice(None) if with_end.shape[1] != 40 else slice(0, 21)
        assert torch.allclose(with_end[:, before], without[:, before], atol=2e-5)


@settings(max_examples=8)
@given(
    tokens=st.integers(1, 70),
    gate=GATES,
    lengths=st.none() | st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any),
    turned=st.booleans(),
    hard=st.booleans(),
    seed=st.integers(0, 2**10),
)
def test_gradients_without_that_of_the_gate(
    tokens: int, gate: str, lengths: list[int] | None, turned: bool, hard: bool, seed: int
) -> None:
    i = drawn(
        1, tokens, (2, 2, 2), 24, 24, gate, hard=hard, carried=False, lengths=lengths, seed=seed
    )
    checked = scalar.check(i)
    assert checked.even
    do, _ = ends_of(i, seed)
    with guarded():
        found = scalar.run_gateless(
            interpreted_plan(checked.problem, forward_config(turned=turned)),
            interpreted_plan(checked.problem, backward_config()),
            scalar._laid_out(i),
            SCALE,
            do,
        )
    true = scalar.torch_backward(
        checked, in_fp64(i), SCALE, do.double(), None, 64, want_dg=False, want_dh0=False
    )
    for name, got, wanted in zip(("dq", "dk", "dv", "dg", "dh0"), found, true, strict=True):
        close(name, got, wanted, BUDGET[FP32])


def in_segments(
    i: ScalarInputs, fwd: ScalarForwardConfig, length: int, bwd: ScalarBackwardConfig | None
) -> scalar_segments.Segments:
    checked = scalar.check(i)
    spec = checked.problem.spec
    vector = replace(spec, gate=Gate.VECTOR, gate_dtype=spec.dtype)
    combine = KernelSpec("gla_combine", vector, CombineKernelConfig(), "sm_90a")
    plan = interpreted_plan(checked.problem, fwd)
    walking = None if bwd is None else interpreted_plan(checked.problem, bwd)
    return scalar_segments.segments(
        plan, InterpretedKernel(combine), checked.groups, scalar._laid_out(i), length, walking
    )


@pytest.mark.parametrize(
    ("heads", "gate", "hard", "carried", "lengths"),
    [
        ((1, 1, 2), "token", False, True, None),
        ((4, 2, 2), "token", True, True, [40, 0, 17, 1]),
        ((2, 1, 1), "head", False, False, [33, 16]),
        ((1, 1, 1), "none", False, True, None),
    ],
)
def test_in_segments(
    heads: tuple[int, int, int], gate: str, hard: bool, carried: bool, lengths: list[int] | None
) -> None:
    i = drawn(2, 40, heads, 16, 16, gate, hard=hard, carried=carried, lengths=lengths)
    fwd, bwd = forward_config(), backward_config(walks=hard)
    checked = scalar.check(i)
    do, dht = ends_of(i, 1)
    with guarded():
        parts = in_segments(i, fwd, 16, bwd if gate == "token" else None)
        o, state = parts.forward(SCALE, True)
        plan = interpreted_plan(checked.problem, bwd)
        grads = parts.backward(plan, SCALE, do, dht, want_dg=True, want_dh0=True)
    true_o, true_state = scalar.torch_forward(checked, in_fp64(i), SCALE, True, 64)
    budget = BUDGET[FP32]
    close("o", o, true_o, budget)
    close("state", state, true_state, budget)
    wanted = scalar.torch_backward(
        checked, in_fp64(i), SCALE, do.double(), dht.double(), 64, want_dg=True, want_dh0=True
    )
    for name, got, true in zip(("dq", "dk", "dv", "dg", "dh0"), grads, wanted, strict=True):
        close(name, got, true, 2 * budget)
