"""The decode kernel against the token loop in fp64, in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from glac.configs import DecodeConfig, DecodeKernelConfig, why_illegal
from glac.decode import DecodeInputs, Gated, Want, _check, laid_out, launch, run_launch, run_torch
from glac.gate import LOG2E, STEP_MIN
from glac.gpus import GPUS
from glac.interpret import interpreted_plan
from glac.testing import HARD_GATE_VALUES
from tests.interpreter.running import guarded

pytestmark = pytest.mark.interpreter

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
BUDGET = {FP32: 2e-6, FP16: 1e-3}
HEADS = st.sampled_from([(1, 1, 1), (2, 2, 2), (4, 2, 2), (6, 1, 3), (1, 2, 4), (2, 1, 2)])
GATES = st.sampled_from(["vector", "token", "head", "none", "lowrank"])


def drawn(
    batch: int,
    tokens: int,
    heads: tuple[int, int, int],
    K: int,
    V: int,
    gate: str,
    *,
    dtype: torch.dtype = FP32,
    state_dtype: torch.dtype | None = FP32,
    slots: int = 0,
    hard: bool = False,
    seed: int = 0,
) -> DecodeInputs:
    """Inputs of a call; with ``slots`` a pool, and an inactive sequence if there are several."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    Hq, Hk, Hs = heads
    q, k = randn(batch, tokens, Hq, K).to(dtype), randn(batch, tokens, Hk, K).to(dtype)
    v = randn(batch, tokens, Hs, V).to(dtype)
    shape = {"vector": (batch, tokens, Hs, K), "token": (batch, tokens, Hs), "head": (Hs,)}
    gated = Gated()
    if gate == "lowrank":
        weight = (randn(Hs * K, 16) / 4).to(dtype)
        gated = Gated(None, randn(batch, tokens, 16).to(dtype), weight, randn(Hs * K))
    elif gate in shape:
        g = torch.nn.functional.logsigmoid(randn(*shape[gate]))
        if hard:
            values = torch.tensor(HARD_GATE_VALUES)
            g = values[torch.randint(len(values), g.shape, generator=generator)]
        gated = Gated(g.to(dtype) if seed % 2 else g)
    state = indices = None
    if state_dtype is not None:
        state = randn(slots or batch, Hs, K, V).to(state_dtype)
    if slots:
        indices = torch.randperm(slots, generator=generator)[:batch]
        if batch > 1:
            indices[0] = -1 if seed % 3 else slots + 5
        indices = indices.to(torch.int32 if seed % 2 else torch.int64)
    return DecodeInputs(q, k, v, gated, state, indices)


def run(
    i: DecodeInputs, want: Want, block_v: int, numbers: tuple[float, ...]
) -> tuple[Tensor, Tensor | None]:
    problem, groups = _check(i, want)
    cfg = DecodeConfig(DecodeKernelConfig(block_v, 2))
    assert why_illegal(problem.spec, cfg, GPUS["h100"]) is None
    with guarded():
        i = laid_out(i)
        return run_launch(
            launch(interpreted_plan(problem, cfg), groups, i, want), i, want, numbers
        )


def in_fp64(i: DecodeInputs) -> DecodeInputs:
    def wide(t: Tensor | None) -> Tensor | None:
        return t if t is None else t.double()

    q, k, v = i.q.double(), i.k.double(), i.v.double()
    return DecodeInputs(q, k, v, Gated(*map(wide, i.gate)), i.state, i.indices, i.cu_seqlens)


def close(got: Tensor, wanted: Tensor, budget: float) -> None:
    assert got.shape == wanted.shape
    assert bool(got.isfinite().all())
    size = max(float(wanted.double().norm()), math.sqrt(wanted.numel()) * 0.1)
    error = float((got.double() - wanted.double()).norm()) / size
    assert error <= budget, f"error {error:.2e}, budget {budget:.2e}"


def numbers_of(i: DecodeInputs, scale: float = 0.37) -> tuple[float, ...]:
    return (scale,) if i.gate.x is None else (scale, 1 / 16, STEP_MIN * LOG2E)


def check(i: DecodeInputs, want: Want, block_v: int) -> None:
    numbers = numbers_of(i)
    mine, theirs = (
        DecodeInputs(
            i.q,
            i.k,
            i.v,
            i.gate,
            None if i.state is None else i.state.clone(),
            i.indices,
            i.cu_seqlens,
        )
        for _ in range(2)
    )
    _, groups = _check(i, want)
    o, state = run(mine, want, block_v, numbers)
    true_o, true_state = run_torch(groups, in_fp64(theirs), want, numbers)
    close(o, true_o, BUDGET[i.q.dtype])
    assert (state is None) == (true_state is None)
    if state is not None:
        assert true_state is not None
        assert state.dtype == (want.dtype if not want.in_place else i.state.dtype)  # type: ignore[union-attr]
        close(state, true_state, 8e-3 if state.dtype == BF16 else 2e-6)
        if want.in_place:
            assert state is mine.state
            assert i.state is not None
            rows = torch.arange(i.state.shape[0])
            if i.indices is not None:
                idle = ~torch.isin(rows, i.indices.long())
                assert torch.equal(state[idle], i.state[idle]), "a slot of nobody was touched"


@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 4),
    heads=HEADS,
    keys=st.sampled_from([1, 5, 16, 24, 32]),
    values=st.sampled_from([1, 5, 16, 24, 40]),
    gate=GATES,
    dtype=st.sampled_from([FP32, FP16]),
    state_dtype=st.sampled_from([None, FP32, BF16]),
    pool=st.booleans(),
    mode=st.sampled_from(["nothing", "final", "every", "in place"]),
    hard=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(3, 2, (4, 2, 2), 16, 24, "vector", FP32, FP32, True, "in place", True, 1)
@example(2, 3, (1, 2, 4), 24, 16, "token", FP16, BF16, True, "every", False, 2)
def test_equals_the_token_loop(
    batch: int,
    tokens: int,
    heads: tuple[int, int, int],
    keys: int,
    values: int,
    gate: str,
    dtype: torch.dtype,
    state_dtype: torch.dtype | None,
    pool: bool,
    mode: str,
    hard: bool,
    seed: int,
) -> None:
    slots = batch + 3 if pool and state_dtype is not None else 0
    i = drawn(
        batch, tokens, heads, keys, values, gate, dtype=dtype, state_dtype=state_dtype,
        slots=slots, hard=hard, seed=seed,
    )  # fmt: skip
    if state_dtype is None and mode == "in place":
        mode = "final"
    new = state_dtype or FP32
    want = Want(mode == "in place", mode == "final", mode == "every", new)
    check(i, want, 16 if values <= 16 or seed % 2 else 32)


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any),
    heads=HEADS,
    gate=GATES,
    mode=st.sampled_from(["final", "every", "in place"]),
    seed=st.integers(0, 2**10),
)
def test_packed_sequences(
    lengths: list[int], heads: tuple[int, int, int], gate: str, mode: str, seed: int
) -> None:
    total, count = sum(lengths), len(lengths)
    i = drawn(1, total, heads, 16, 16, gate, state_dtype=None, seed=seed)
    state = torch.randn(count, heads[2], 16, 16)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    i = DecodeInputs(i.q, i.k, i.v, i.gate, state, None, offsets)
    check(i, Want(mode == "in place", mode == "final", mode == "every"), 16)


def test_broken_offsets_stay_in_memory() -> None:
    i = drawn(1, 6, (2, 2, 2), 16, 16, "token", state_dtype=None)
    for offsets in ([0, 9, 20], [-4, 3, 1], [5, 2, 6]):
        cu = torch.tensor(offsets, dtype=torch.int32)
        packed = DecodeInputs(i.q, i.k, i.v, i.gate, None, None, cu)
        _, state = run(packed, Want(final=True), 16, (1.0,))
        assert state is not None
        assert bool(state.isfinite().all())


def test_reads_strided_layouts() -> None:
    i = drawn(2, 3, (4, 2, 2), 16, 16, "vector", seed=4)
    q = i.q.transpose(1, 2).contiguous().transpose(1, 2)
    both = torch.cat((i.k, i.k), 3)
    assert i.gate.g is not None
    g = i.gate.g.transpose(0, 1).contiguous().transpose(0, 1)
    strided = DecodeInputs(q, both[..., :16], i.v, Gated(g), i.state)
    o, _ = run(i, Want(), 16, (1.0,))
    again, _ = run(strided, Want(), 16, (1.0,))
    assert torch.equal(o, again)
