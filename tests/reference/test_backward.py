"""The written-out gradients against autograd, and their yardstick against its precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from glac.errors import InputError, InputTypeError
from glac.reference import (
    Gradients,
    backward,
    chunk_gla_backward,
    recurrent_gla,
    relative_rms,
    yardstick_chunk_gla_backward,
)
from glac.testing import HARD_GATE_VALUES, Inputs, hard_gates, make_inputs

FP64 = torch.float64
# Upper bounds per dtype for dq, dk, dv and dh0, and for dg.
FARTHEST = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}
FARTHEST_GATE = {torch.bfloat16: 5e-3, torch.float16: 6e-4, torch.float32: 1e-5}
DTYPES = list(FARTHEST)


def draw(
    B: int, T: int, H: int, K: int, V: int, *, dtype: torch.dtype, seed: int = 0
) -> tuple[Inputs, Tensor, Tensor, Tensor]:
    """A problem with an initial state, its gate, and gradients of both of its results."""
    x = make_inputs(B, T, H, K, V, dtype=dtype, seed=seed, initial_state=True)
    probe = make_inputs(B, T, H, K, V, dtype=dtype, seed=seed + 2**20, initial_state=True)
    assert x.g is not None
    assert probe.initial_state is not None
    return x, x.g, probe.v, probe.initial_state


def present(gradients: Gradients) -> list[Tensor]:
    return [t for t in gradients if t is not None]


def by_autograd(
    x: Inputs,
    g: Tensor,
    do: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    dht: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of the token loop, that of the initial state last if there is one."""
    inputs = [x.q, x.k, x.v, g] + ([] if initial_state is None else [initial_state])
    leaves = [t.clone().requires_grad_() for t in inputs]
    start = None if initial_state is None else leaves[4]
    o, state = recurrent_gla(
        *leaves[:4], scale=scale, initial_state=start, output_final_state=True
    )
    assert state is not None
    loss = (o * do).sum()
    if dht is not None:
        loss = loss + (state * dht).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(leaves, found, strict=True)
    ]


def truth(x: Inputs, g: Tensor, do: Tensor, dht: Tensor | None) -> list[Tensor]:
    wide = [t.double() for t in (x.q, x.k, x.v, g, do)]
    return present(chunk_gla_backward(*wide, initial_state=x.initial_state, dht=dht))


def yardstick_errors(
    x: Inputs, g: Tensor, do: Tensor, dht: Tensor, chunk_size: int = 64
) -> list[float]:
    """Relative errors of the yardstick's dq, dk, dv, dg, dh0 against fp64."""
    actual = yardstick_chunk_gla_backward(
        x.q, x.k, x.v, g, do, initial_state=x.initial_state, dht=dht, chunk_size=chunk_size
    )
    assert all(bool(grad.isfinite().all()) for grad in present(actual))
    expected = truth(x, g, do, dht)
    return [relative_rms(a, b) for a, b in zip(present(actual), expected, strict=True)]


# --- the exact form ---------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(1, 70),
    keys=st.integers(1, 16),
    values=st.integers(1, 16),
    seed=st.integers(0, 2**16),
    chunk_size=st.sampled_from([1, 4, 16, 64]),
    hard=st.booleans(),
    carried=st.booleans(),
    continued=st.booleans(),
)
@example(
    tokens=1,
    keys=1,
    values=1,
    seed=0,
    chunk_size=64,
    hard=True,
    carried=True,
    continued=True,
)
@example(
    tokens=1,
    keys=3,
    values=2,
    seed=0,
    chunk_size=16,
    hard=False,
    carried=False,
    continued=False,
)
@example(
    tokens=64,
    keys=16,
    values=16,
    seed=0,
    chunk_size=64,
    hard=True,
    carried=True,
    continued=True,
)
@example(
    tokens=65,
    keys=5,
    values=16,
    seed=0,
    chunk_size=64,
    hard=True,
    carried=False,
    continued=True,
)
@example(
    tokens=33,
    keys=16,
    values=5,
    seed=0,
    chunk_size=16,
    hard=False,
    carried=True,
    continued=False,
)
def test_equals_autograd_through_the_token_loop(
    tokens: int,
    keys: int,
    values: int,
    seed: int,
    chunk_size: int,
    hard: bool,
    carried: bool,
    continued: bool,
) -> None:
    x, g, do, dht = draw(2, tokens, 2, keys, values, dtype=FP64, seed=seed)
    if hard:
        g = hard_gates(x.q.shape, seed=seed, dtype=FP64)
    start, end = x.initial_state if carried else None, dht if continued else None
    expected = by_autograd(x, g, do, scale=0.7, initial_state=start, dht=end)
    actual = chunk_gla_backward(
        x.q, x.k, x.v, g, do, scale=0.7, initial_state=start, dht=end, chunk_size=chunk_size
    )
    assert (actual.dh0 is not None) == carried
    for a, b in zip(present(actual), expected, strict=True):
        assert relative_rms(a, b) <= 1e-12
    assert bool((actual.dg[g == -math.inf] == 0).all())


@pytest.mark.parametrize("value", HARD_GATE_VALUES)
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_constant_gate(value: float, chunk_size: int) -> None:
    x, _, do, dht = draw(1, 100, 2, 8, 6, dtype=FP64)
    g = torch.full_like(x.q, value)
    start = x.initial_state
    expected = by_autograd(x, g, do, initial_state=start, dht=dht)
    actual = chunk_gla_backward(
        x.q, x.k, x.v, g, do, initial_state=start, dht=dht, chunk_size=chunk_size
    )
    for a, b in zip(present(actual), expected, strict=True):
        assert relative_rms(a, b) < 1e-14


def test_equals_differences_of_the_loss() -> None:
    x, g, do, dht = draw(1, 5, 1, 3, 2, dtype=FP64)
    assert x.initial_state is not None
    inputs = [x.q, x.k, x.v, g, x.initial_state]

    def loss(values: list[Tensor]) -> float:
        o, state = recurrent_gla(*values[:4], initial_state=values[4], output_final_state=True)
        assert state is not None
        return float((o * do).sum() + (state * dht).sum())

    gradients = chunk_gla_backward(
        x.q, x.k, x.v, g, do, initial_state=x.initial_state, dht=dht, chunk_size=4
    )
    step = 1e-5
    for which, gradient in enumerate(present(gradients)):
        numeric = torch.zeros_like(gradient)
        for i in range(gradient.numel()):
            sides = []
            for sign in (1, -1):
                moved = [t.clone() for t in inputs]
                moved[which].view(-1)[i] += sign * step
                sides.append(loss(moved))
            numeric.view(-1)[i] = (sides[0] - sides[1]) / (2 * step)
        # The second difference leaves step^2 of the size of third derivatives (here some tens),
        # the rounding of the loss 1e-15 / step.
        assert relative_rms(numeric, gradient) < 1e-8


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("carried", [False, True])
def test_invariants(hard: bool, carried: bool) -> None:
    x, g, do, dht = draw(2, 100, 2, 12, 10, dtype=FP64)
    if hard:
        g = hard_gates(x.q.shape, seed=3, dtype=FP64)
    start = x.initial_state if carried else None
    grads = chunk_gla_backward(x.q, x.k, x.v, g, do, initial_state=start, dht=dht)
    o, _ = recurrent_gla(x.q, x.k, x.v, g, initial_state=start)
    assert relative_rms((x.q * grads.dq).sum(-1), (do * o).sum(-1)) < 1e-12
    assert relative_rms((x.k * grads.dk).sum(-1), (x.v * grads.dv).sum(-1)) < 1e-12
    if carried:
        assert start is not None
        assert grads.dh0 is not None
        assert relative_rms(grads.dg[:, 0], (start * grads.dh0).sum(-1)) < 1e-12
    else:
        assert bool((grads.dg[:, 0] == 0).all())


def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, do, dht = draw(2, 70, 2, 8, 6, dtype=FP64)
    g = hard_gates(x.q.shape, seed=0, dtype=FP64)

    def run() -> list[Tensor]:
        return present(
            chunk_gla_backward(
                x.q, x.k, x.v, g, do, initial_state=x.initial_state, dht=dht, chunk_size=16
            )
        )

    whole = run()
    monkeypatch.setattr(backward, "_SLAB_ELEMENTS", 2 * 2 * 8 * 32)
    slabs: list[int] = []
    inner = backward._slab_backward

    def counting(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, do: Tensor, states: Tensor, dstate: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
        slabs.append(q.shape[2])
        return inner(q, k, v, g, do, states, dstate)

    monkeypatch.setattr(backward, "_slab_backward", counting)
    parts = run()
    assert slabs == [1, 2, 2]
    for a, b in zip(parts, whole, strict=True):
        assert relative_rms(a, b) < 1e-15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_take_the_dtypes_of_the_inputs_with_one_rounding(dtype: torch.dtype) -> None:
    x, g, do, dht = draw(1, 100, 2, 16, 8, dtype=dtype)
    actual = chunk_gla_backward(x.q, x.k, x.v, g, do, initial_state=x.initial_state, dht=dht)
    assert [t.dtype for t in present(actual)] == [dtype] * 4 + [torch.float32]
    expected = truth(x, g, do, dht)
    for a, b in zip(present(actual), expected, strict=True):
        # Half a unit of the last place, and some tens of fp32 roundings before it.
        assert relative_rms(a, b) <= torch.finfo(a.dtype).eps / 2 + 2e-6
    mixed = chunk_gla_backward(x.q, x.k.float(), x.v, g.double(), do)
    assert [t.dtype for t in present(mixed)] == [dtype, torch.float32, dtype, FP64]


def test_fp32_is_as_exact_as_fp32_autograd_for_hard_gates() -> None:
    x, _, do, dht = draw(2, 150, 2, 16, 12, dtype=torch.float32)
    g = hard_gates(x.q.shape, seed=1)
    expected = truth(x, g, do, dht)
    loop = by_autograd(x, g, do, initial_state=x.initial_state, dht=dht)
    chunks = chunk_gla_backward(x.q, x.k, x.v, g, do, initial_state=x.initial_state, dht=dht)
    for a, b, c in zip(present(chunks), loop, expected, strict=True):
        assert relative_rms(a, c) <= 2 * relative_rms(b, c)


@pytest.mark.parametrize("run", [chunk_gla_backward, yardstick_chunk_gla_backward])
def test_neither_autograd_nor_autocast_nor_strides_matter(run: Callable[..., Gradients]) -> None:
    x, g, do, dht = draw(2, 40, 3, 8, 8, dtype=torch.float32)
    inputs = (x.q, x.k, x.v, g, do)
    plain = present(run(*inputs, initial_state=x.initial_state, dht=dht))
    head_first = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = present(run(*head_first, initial_state=x.initial_state, dht=dht))
    for a, b in zip(other, plain, strict=True):
        assert torch.equal(a, b)
        assert a.is_contiguous()
        assert not a.requires_grad


# --- the yardstick ----------------------------------------------------------------------------


@pytest.fixture
def block_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per call of the sub-block scheme, which only gates out of range may need."""
    calls: list[int] = []
    inner = backward._block_pairs

    def counting(
        q: Tensor, k: Tensor, g: Tensor, dscores: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(1)
        return inner(q, k, g, dscores, dtype)

    monkeypatch.setattr(backward, "_block_pairs", counting)
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [16, 64, 128])
def test_error_with_the_gates_of_trained_models(dtype: torch.dtype, chunk_size: int) -> None:
    x, g, do, dht = draw(1, 256, 4, 64, 64, dtype=dtype)
    dq, dk, dv, dg, dh0 = yardstick_errors(x, g, do, dht, chunk_size)
    assert max(dq, dk, dv, dh0) < FARTHEST[dtype]
    assert dg < FARTHEST_GATE[dtype]
    if dtype == torch.float32:
        return
    # One rounding is 0.208 eps, as in the forward yardstick. dv sees four (both operands of a
    # score, the score, itself; likewise through dS), dq and dk three (dA, or S and dS; the other
    # operand; themselves), dg those without their last, the other tile of the pair, and its own.
    # Of two roundings dq and dk would have 0.294, of three dv 0.36, of three dg 0.36.
    eps = torch.finfo(dtype).eps
    assert 0.33 * eps < dq < 0.39 * eps
    assert 0.33 * eps < dk < 0.39 * eps
    assert 0.39 * eps < dv < 0.44 * eps
    assert 0.37 * eps < dg < 0.46 * eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("gate", "by_blocks"),
    [
        (-0.5, False),  # 46 log2 units per chunk: anchored at the start
        (-1.37, False),  # 126: only the midpoint keeps both sides in range
        (-3.0, True),  # 277: out of range for one anchor
        (-8.0, True),  # 185 in 16 rows: the diagonal itself is out of range
    ],
)
def test_error_on_each_level_of_the_ladder(
    dtype: torch.dtype, gate: float, by_blocks: bool, block_calls: list[int]
) -> None:
    x, _, do, dht = draw(1, 128, 2, 32, 32, dtype=dtype)
    # The gradient of g is as small as its decay, so g is wider than fp16's range here.
    g = torch.full(x.q.shape, gate, dtype=torch.bfloat16 if dtype == torch.bfloat16 else None)
    dq, dk, dv, dg, dh0 = yardstick_errors(x, g, do, dht)
    assert bool(block_calls) == by_blocks
    assert max(dq, dk, dv, dh0) < FARTHEST[dtype]
    assert dg < FARTHEST_GATE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_reset_in_the_first_row_of_a_chunk_needs_no_blocks(
    dtype: torch.dtype, block_calls: list[int]
) -> None:
    x, g, do, dht = draw(1, 128, 2, 32, 32, dtype=dtype)
    g[:, ::64] = -math.inf
    dq, dk, dv, dg, dh0 = yardstick_errors(x, g, do, dht)
    assert max(dq, dk, dv, dh0) < FARTHEST[dtype]
    assert dg < FARTHEST_GATE[dtype]
    assert block_calls == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_error_with_hard_gates(dtype: torch.dtype, chunk_size: int) -> None:
    x, _, do, dht = draw(2, 150, 2, 24, 20, dtype=dtype)
    g = hard_gates(x.q.shape, seed=1, dtype=dtype)
    dq, dk, dv, dg, dh0 = yardstick_errors(x, g, do, dht, chunk_size)
    assert max(dq, dk, dv, dh0) < FARTHEST[dtype]
    assert dg < FARTHEST_GATE[dtype]


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(1, 70),
    keys=st.integers(1, 24),
    values=st.integers(1, 24),
    seed=st.integers(0, 2**16),
    chunk_size=st.sampled_from([16, 32, 48, 64]),
    carried=st.booleans(),
)
def test_fp32_yardstick_for_any_shape_and_gate(
    tokens: int, keys: int, values: int, seed: int, chunk_size: int, carried: bool
) -> None:
    x, _, do, dht = draw(1, tokens, 2, keys, values, dtype=torch.float32, seed=seed)
    g = hard_gates(x.q.shape, seed=seed)
    start = x.initial_state if carried else None
    actual = yardstick_chunk_gla_backward(
        x.q, x.k, x.v, g, do, scale=0.5, initial_state=start, dht=dht, chunk_size=chunk_size
    )
    wide = [t.double() for t in (x.q, x.k, x.v, g, do)]
    expected = chunk_gla_backward(*wide, scale=0.5, initial_state=start, dht=dht)
    # Gradients of what only adds up, each term as large as its magnitude. The terms of dg cancel
    # inside a chunk, so its errors are measured by those of the rows of dq and dk around it.
    q, k, v, _, pull = (t.abs() for t in wide)
    sizes = chunk_gla_backward(
        q,
        k,
        v,
        wide[3],
        pull,
        scale=0.5,
        initial_state=None if start is None else start.abs(),
        dht=dht.abs(),
    )
    for name in ("dq", "dk", "dv", "dh0"):
        a, b, size = (getattr(grads, name) for grads in (actual, expected, sizes))
        assert (a is None) == (b is None)
        if a is not None:
            assert bool(((a - b).abs() <= 4e-5 * size).all()), name
    spread = (q * sizes.dq + k * sizes.dk).cumsum(1)[:, -1:]
    assert bool(((actual.dg - expected.dg).abs() <= 4e-5 * (sizes.dg + spread)).all())


@pytest.mark.parametrize("gate_scale", [16.0, 2.0, 0.25])
def test_pairs_of_a_chunk_cancel_in_the_first_gate_of_the_yardstick(gate_scale: float) -> None:
    x = make_inputs(1, 128, 2, 32, 32, dtype=torch.bfloat16, gate_scale=gate_scale)
    assert x.g is not None
    _, _, do, dht = draw(1, 128, 2, 32, 32, dtype=torch.bfloat16)
    dg = yardstick_chunk_gla_backward(x.q, x.k, x.v, x.g, do, dht=dht).dg.float()
    # Without an initial state the truth is 0. Separately rounded tiles would leave some 1e-2.
    assert float(dg[:, 0].square().mean().sqrt()) < 1e-5 * float(dg.square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_state_gradient_is_rounded_where_it_is_an_operand_but_not_where_it_is_kept(
    dtype: torch.dtype,
) -> None:
    x, _, do, dht = draw(1, 256, 2, 64, 64, dtype=dtype)
    actual = yardstick_chunk_gla_backward(
        x.q,
        x.k,
        x.v,
        torch.zeros_like(x.q),
        torch.zeros_like(do),
        initial_state=x.initial_state,
        dht=dht,
    )
    assert actual.dh0 is not None
    assert torch.equal(actual.dh0, dht)
    assert bool((actual.dq == 0).all())
    expected = torch.einsum("bthk,bhkv->bthv", x.k.double(), dht.double())
    # Two roundings of 0.208 eps: the gradient of the state as an operand, and the result.
    eps = torch.finfo(dtype).eps
    assert 0.27 * eps < relative_rms(actual.dv, expected) < 0.32 * eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_state_is_rounded_where_it_is_an_operand_but_not_where_it_is_kept(
    dtype: torch.dtype,
) -> None:
    x, _, do, dht = draw(1, 256, 2, 64, 64, dtype=dtype)
    assert x.initial_state is not None
    start, nothing, g = x.initial_state, torch.zeros_like(x.v), torch.zeros_like(x.q).float()
    eps = torch.finfo(dtype).eps
    # Without values the state stays what it was: dq sees it rounded, and is rounded itself.
    read = yardstick_chunk_gla_backward(x.q, x.k, nothing, g, do, scale=1.0, initial_state=start)
    expected = torch.einsum("bthv,bhkv->bthk", do.double(), start.double())
    assert 0.27 * eps < relative_rms(read.dq, expected) < 0.32 * eps
    # Without do either, all gates see it pass, in fp32.
    passed = yardstick_chunk_gla_backward(
        x.q, x.k, nothing, g, nothing, initial_state=start, dht=dht
    )
    assert relative_rms(passed.dg, (start * dht).sum(-1)[:, None].expand(g.shape)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_gradients_through_the_states_see_two_roundings(dtype: torch.dtype) -> None:
    x, g, do, dht = draw(1, 64, 16, 64, 64, dtype=dtype)
    wide, eps = g.float(), torch.finfo(dtype).eps
    nothing = torch.zeros_like(do)
    for v, pull, start, end in (
        (nothing, do, x.initial_state, None),  # rows that read the initial state: q and the state
        (x.v, nothing, None, dht),  # rows that the final state holds: k and its gradient
    ):
        dg = yardstick_chunk_gla_backward(x.q, x.k, v, wide, pull, initial_state=start, dht=end).dg
        expected = chunk_gla_backward(
            x.q, x.k, v, g.double(), pull, initial_state=start, dht=end
        ).dg
        assert 0.27 * eps < relative_rms(dg, expected) < 0.32 * eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_round_their_operands(dtype: torch.dtype, block_calls: list[int]) -> None:
    x, g, do, _ = draw(1, 64, 16, 64, 64, dtype=dtype)
    g[..., 0] = -3.0  # one channel out of range sends its head through the blocks
    actual = yardstick_chunk_gla_backward(x.q, x.k, x.v, g.float(), do)
    assert block_calls == [1]
    expected = chunk_gla_backward(*(t.double() for t in (x.q, x.k, x.v, g, do)))
    dq, dk, dv, dg = (
        relative_rms(a, b) / torch.finfo(dtype).eps
        for a, b in zip(actual[:4], expected[:4], strict=True)
    )
    # Only pairs of different blocks see roundings, three tenths to a half of the sum of squares
    # (the diagonal is fp32). Without one of the roundings dq and dk would be near 0.246 eps, dv
    # near 0.32, dg near 0.25.
    assert 0.265 < dq < 0.295
    assert 0.265 < dk < 0.295
    assert 0.335 < dv < 0.365
    assert 0.29 < dg < 0.33


def test_gradients_of_the_yardstick_take_the_dtypes_of_the_inputs() -> None:
    x, g, do, _ = draw(1, 20, 1, 8, 8, dtype=torch.bfloat16)
    grads = yardstick_chunk_gla_backward(x.q, x.k, x.v.float(), g.float(), do)
    low, high = torch.bfloat16, torch.float32
    assert [t.dtype for t in present(grads)] == [low, low, high, high]
    assert [t.shape for t in present(grads)] == [t.shape for t in (x.q, x.k, x.v, g)]
    assert grads.dh0 is None


# --- what both reject -------------------------------------------------------------------------


@pytest.mark.parametrize("run", [chunk_gla_backward, yardstick_chunk_gla_backward])
def test_rejects_shapes_that_do_not_belong_together(run: Callable[..., Gradients]) -> None:
    q, v = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 5)
    with pytest.raises(InputError, match="k must have q's shape"):
        run(q, q[..., :3], v, q, v)
    with pytest.raises(InputError, match="do must have v's shape"):
        run(q, q, v, q, q)
    with pytest.raises(InputTypeError, match="do must be floating point"):
        run(q, q, v, q, v.int())
    with pytest.raises(InputError, match="dht must have shape"):
        run(q, q, v, q, v, dht=torch.zeros(1, 2, 5, 4))
    with pytest.raises(InputError, match="initial_state must have shape"):
        run(q, q, v, q, v, initial_state=torch.zeros(1, 2, 5, 4))


def test_rejects_what_it_cannot_chunk_or_round() -> None:
    q, v = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 5)
    for chunk_size in (0, -16, 48):
        with pytest.raises(InputError, match="chunk_size must be a power of two"):
            chunk_gla_backward(q, q, v, q, v, chunk_size=chunk_size)
    with pytest.raises(InputError, match="chunk_size must be a multiple of 16"):
        yardstick_chunk_gla_backward(q, q, v, q, v, chunk_size=24)
    with pytest.raises(InputTypeError, match="q must be bf16, fp16 or fp32"):
        yardstick_chunk_gla_backward(q.double(), q, v, q, v)
