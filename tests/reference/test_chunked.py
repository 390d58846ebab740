"""The chunk form against the token loop, for gates that break naive chunk formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glac.errors import InputError
from glac.reference import chunk_gla, chunked, recurrent_gla, relative_rms
from glac.testing import HARD_GATE_VALUES, hard_gates, make_inputs

FP64 = torch.float64
CHUNKS = st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128])


def within_roundoff(actual: Tensor, expected: Tensor, magnitude: Tensor, steps: int) -> bool:
    """Whether the difference is at most ``steps`` roundings of the sum of magnitudes."""
    return bool(((actual - expected).abs() <= steps * torch.finfo(FP64).eps * magnitude).all())


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 70),
    keys=st.integers(1, 24),
    values=st.integers(1, 24),
    seed=st.integers(0, 2**16),
    chunk_size=CHUNKS,
    carried=st.booleans(),
)
@example(tokens=1, keys=1, values=1, seed=0, chunk_size=64, carried=True)
@example(tokens=64, keys=24, values=24, seed=0, chunk_size=64, carried=True)
@example(tokens=65, keys=3, values=24, seed=0, chunk_size=64, carried=False)
def test_equals_the_token_loop_for_hard_gates(
    tokens: int, keys: int, values: int, seed: int, chunk_size: int, carried: bool
) -> None:
    x = make_inputs(2, tokens, 2, keys, values, dtype=FP64, seed=seed, initial_state=carried)
    g = hard_gates(x.q.shape, seed=seed, dtype=FP64)
    o, state = chunk_gla(
        x.q,
        x.k,
        x.v,
        g,
        initial_state=x.initial_state,
        output_final_state=True,
        chunk_size=chunk_size,
    )
    expected, expected_state = recurrent_gla(
        x.q, x.k, x.v, g, initial_state=x.initial_state, output_final_state=True
    )
    size, size_state = recurrent_gla(
        x.q.abs(),
        x.k.abs(),
        x.v.abs(),
        g,
        initial_state=None if x.initial_state is None else x.initial_state.abs(),
        output_final_state=True,
    )
    assert state is not None
    assert expected_state is not None
    assert size_state is not None
    # T + K additions and T decays on either side. A decay that has not underflowed sums gates of
    # at most 745 in all, so its exponential is off by at most that many units (and the exponent's
    # own few); the token itself, undecayed, keeps the magnitude away from zero.
    steps = 4 * (tokens + keys) + 750
    assert within_roundoff(o, expected, size, steps)
    assert within_roundoff(state, expected_state, size_state, steps)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(2, 70), cut=st.integers(1, 69), seed=st.integers(0, 99), chunk_size=CHUNKS
)
def test_carrying_the_state_over_a_cut_changes_nothing(
    tokens: int, cut: int, seed: int, chunk_size: int
) -> None:
    cut = min(cut, tokens - 1)
    x = make_inputs(1, tokens, 2, 8, 8, dtype=FP64, seed=seed, initial_state=True)
    g = hard_gates(x.q.shape, seed=seed, dtype=FP64)
    state = x.initial_state
    whole, end = chunk_gla(
        x.q, x.k, x.v, g, initial_state=state, output_final_state=True, chunk_size=chunk_size
    )
    parts = []
    for part in (slice(0, cut), slice(cut, None)):
        o, state = chunk_gla(
            x.q[:, part],
            x.k[:, part],
            x.v[:, part],
            g[:, part],
            initial_state=state,
            output_final_state=True,
            chunk_size=chunk_size,
        )
        parts.append(o)
    assert state is not None
    assert end is not None
    # 70 + 8 additions on either side at 2^-53 each, and exponents of a few tens that matter;
    # over all outputs cancellation costs no factor of ten.
    assert relative_rms(torch.cat(parts, 1), whole) < 1e-13
    assert relative_rms(state, end) < 1e-13


@pytest.mark.parametrize("value", HARD_GATE_VALUES)
@pytest.mark.parametrize("chunk_size", [1, 16, 64])
def test_constant_gate(value: float, chunk_size: int) -> None:
    x = make_inputs(1, 150, 2, 16, 8, dtype=FP64, initial_state=True)
    g = torch.full_like(x.q, value)
    start = x.initial_state
    o, state = chunk_gla(
        x.q, x.k, x.v, g, initial_state=start, output_final_state=True, chunk_size=chunk_size
    )
    expected, end = recurrent_gla(x.q, x.k, x.v, g, initial_state=start, output_final_state=True)
    assert state is not None
    assert end is not None
    assert relative_rms(o, expected) < 1e-14
    assert relative_rms(state, end) < 1e-14


def test_reset_everywhere_leaves_only_the_token_itself() -> None:
    x = make_inputs(2, 70, 3, 8, 5, dtype=FP64, initial_state=True)
    g = torch.full_like(x.q, -math.inf)
    o, state = chunk_gla(
        x.q, x.k, x.v, g, scale=0.3, initial_state=x.initial_state, output_final_state=True
    )
    assert relative_rms(o, 0.3 * (x.q * x.k).sum(-1, keepdim=True) * x.v) < 1e-15
    assert state is not None
    assert torch.equal(state, x.k[:, -1, :, :, None] * x.v[:, -1, :, None, :])


def test_moderate_positive_gates() -> None:
    x = make_inputs(1, 130, 2, 8, 8, dtype=FP64, gate_scale=8.0)
    assert x.g is not None
    g = x.g * torch.where(torch.rand(8, generator=torch.Generator().manual_seed(0)) < 0.5, -1, 1)
    o, _ = chunk_gla(x.q, x.k, x.v, g)
    expected, _ = recurrent_gla(x.q, x.k, x.v, g)
    assert relative_rms(o, expected) < 1e-13


@pytest.mark.parametrize("hard", [False, True])
def test_fp32_is_as_exact_as_the_fp32_token_loop(hard: bool) -> None:
    x = make_inputs(2, 300, 2, 24, 20, dtype=torch.float32, initial_state=True)
    g = hard_gates(x.q.shape, seed=1) if hard else x.g
    assert g is not None
    truth, _ = recurrent_gla(
        x.q.double(), x.k.double(), x.v.double(), g.double(), initial_state=x.initial_state
    )
    loop, _ = recurrent_gla(x.q, x.k, x.v, g, initial_state=x.initial_state)
    chunks, _ = chunk_gla(x.q, x.k, x.v, g, initial_state=x.initial_state)
    assert relative_rms(chunks, truth) <= 2 * relative_rms(loop, truth)


@pytest.mark.parametrize("chunk_size", [4, 16, 64])
def test_gradients_equal_those_of_the_token_loop_for_hard_gates(chunk_size: int) -> None:
    x = make_inputs(2, 70, 2, 9, 7, dtype=FP64, initial_state=True)
    assert x.initial_state is not None
    g = hard_gates(x.q.shape, seed=2, dtype=FP64)
    probe = make_inputs(2, 70, 2, 9, 7, dtype=FP64, seed=5, initial_state=True)
    assert probe.initial_state is not None
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, g, x.initial_state)]

    def chunks(*args: Tensor) -> tuple[Tensor, Tensor | None]:
        q, k, v, g, start = args
        return chunk_gla(
            q, k, v, g, initial_state=start, output_final_state=True, chunk_size=chunk_size
        )

    def loop(*args: Tensor) -> tuple[Tensor, Tensor | None]:
        q, k, v, g, start = args
        return recurrent_gla(q, k, v, g, initial_state=start, output_final_state=True)

    gradients = []
    for form in (chunks, loop):
        o, state = form(*leaves)
        assert state is not None
        loss = (o * probe.v).sum() + (state * probe.initial_state).sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    for name, actual, expected in zip(("q", "k", "v", "g", "start"), *gradients, strict=True):
        assert relative_rms(actual, expected) < 1e-13, name
    assert bool((gradients[0][3][g == -math.inf] == 0).all())


def test_gradcheck_through_outputs_and_final_state() -> None:
    x = make_inputs(1, 5, 2, 3, 2, dtype=FP64, gate_scale=2.0, initial_state=True)
    leaves = [
        t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.g, x.initial_state) if t is not None
    ]
    assert len(leaves) == 5

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        o, state = chunk_gla(q, k, v, g, initial_state=s, output_final_state=True, chunk_size=4)
        assert state is not None
        return o, state

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("cut", [1, 16, 37, 64])
def test_later_tokens_do_not_change_earlier_outputs(cut: int) -> None:
    x = make_inputs(2, 70, 2, 8, 6, dtype=torch.float32)
    other = make_inputs(2, 70, 2, 8, 6, dtype=torch.float32, seed=1)
    g, other_g = hard_gates(x.q.shape, seed=0), hard_gates(x.q.shape, seed=1)
    pairs = ((x.q, other.q), (x.k, other.k), (x.v, other.v), (g, other_g))
    mixed = [torch.cat((a[:, :cut], b[:, cut:]), 1) for a, b in pairs]
    before, _ = chunk_gla(x.q, x.k, x.v, g)
    after, _ = chunk_gla(*mixed)
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert not torch.equal(before[:, cut:], after[:, cut:])


def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs(2, 70, 2, 8, 6, dtype=FP64, initial_state=True)
    g = hard_gates(x.q.shape, seed=0, dtype=FP64)
    whole, end = chunk_gla(
        x.q, x.k, x.v, g, initial_state=x.initial_state, output_final_state=True, chunk_size=16
    )
    monkeypatch.setattr(chunked, "_SLAB_ELEMENTS", 2 * 2 * 8 * 32)
    slabs: list[int] = []
    inner = chunked._slab

    def counting(q: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        slabs.append(q.shape[2])
        return inner(q, *rest)

    monkeypatch.setattr(chunked, "_slab", counting)
    o, state = chunk_gla(
        x.q, x.k, x.v, g, initial_state=x.initial_state, output_final_state=True, chunk_size=16
    )
    assert slabs == [2, 2, 1]
    assert state is not None
    assert end is not None
    assert relative_rms(o, whole) < 1e-15
    assert relative_rms(state, end) < 1e-15


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            # An expanded view is large in shape only.
            if isinstance(item, Tensor):
                stored = item.untyped_storage().nbytes() // item.element_size()
                self.elements = max(self.elements, min(item.numel(), stored))
        return result


def test_no_temporary_is_larger_than_the_inputs() -> None:
    x = make_inputs(1, 256, 2, 64, 64, dtype=torch.float32)
    assert x.g is not None
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.g)]
    with LargestTensor() as largest:
        torch.autograd.grad(chunk_gla(*leaves)[0].sum(), leaves)
    assert largest.elements == x.q.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_cost_one_rounding_of_the_output(dtype: torch.dtype) -> None:
    x = make_inputs(1, 100, 2, 16, 8, dtype=dtype, gate_dtype=torch.float32)
    assert x.g is not None
    o, state = chunk_gla(x.q, x.k, x.v, x.g, output_final_state=True)
    expected, _ = chunk_gla(x.q.double(), x.k.double(), x.v.double(), x.g.double())
    assert state is not None
    assert o.dtype == dtype
    assert state.dtype == torch.float32
    assert relative_rms(o, expected) <= torch.finfo(dtype).eps / 2


def test_autocast_does_not_lower_the_precision() -> None:
    x = make_inputs(1, 80, 1, 8, 8, dtype=torch.float32)
    assert x.g is not None
    plain, _ = chunk_gla(x.q, x.k, x.v, x.g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = chunk_gla(x.q, x.k, x.v, x.g)
    assert torch.equal(plain, cast)


def test_strided_inputs() -> None:
    x = make_inputs(2, 40, 3, 8, 8, dtype=FP64)
    assert x.g is not None
    expected, _ = chunk_gla(x.q, x.k, x.v, x.g)
    head_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.q, x.k, x.v, x.g)]
    o, _ = chunk_gla(*head_first)
    assert torch.equal(o, expected)
    assert o.is_contiguous()


@pytest.mark.parametrize("chunk_size", [0, -16, 48])
def test_rejects_a_chunk_size_that_is_not_a_power_of_two(chunk_size: int) -> None:
    x = make_inputs(1, 4, 1, 2, 2, dtype=torch.float32)
    assert x.g is not None
    with pytest.raises(InputError, match="chunk_size must be a power of two"):
        chunk_gla(x.q, x.k, x.v, x.g, chunk_size=chunk_size)


def test_rejects_shapes_that_do_not_belong_together() -> None:
    x = make_inputs(1, 4, 1, 2, 2, dtype=torch.float32)
    assert x.g is not None
    with pytest.raises(InputError, match="k must have q's shape"):
        chunk_gla(x.q, x.k[:, :3], x.v, x.g)
