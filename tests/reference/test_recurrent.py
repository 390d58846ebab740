"""The token loop against the sum over token pairs that it stands for, and its own promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glac.errors import InputError, InputTypeError
from glac.reference import recurrent_gla, relative_rms
from glac.testing import hard_gates, make_inputs

FP64 = torch.float64


def pairwise_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, scale: float
) -> Tensor:
    """Every pair of tokens on its own: no state, no chunk, gates summed between the two."""
    o = torch.zeros_like(v)
    for i in range(q.shape[1]):
        carried = g[:, : i + 1].sum(1).exp()
        o[:, i] = torch.einsum("bhk,bhk,bhkv->bhv", q[:, i], carried, start)
        for j in range(i + 1):
            decay = g[:, j + 1 : i + 1].sum(1).exp()
            o[:, i] += (q[:, i] * decay * k[:, j]).sum(-1, keepdim=True) * v[:, j]
    return scale * o


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 24),
    keys=st.integers(1, 12),
    values=st.integers(1, 12),
    seed=st.integers(0, 2**16),
)
def test_equals_the_sum_over_pairs_for_hard_gates(
    tokens: int, keys: int, values: int, seed: int
) -> None:
    x = make_inputs(2, tokens, 2, keys, values, dtype=FP64, seed=seed, initial_state=True)
    g = hard_gates(x.q.shape, seed=seed, dtype=FP64)
    assert x.initial_state is not None
    o, state = recurrent_gla(x.q, x.k, x.v, g, initial_state=x.initial_state)
    expected = pairwise_gla(x.q, x.k, x.v, g, x.initial_state, keys**-0.5)
    # Each output sums at most K * (T + 1) products of T + 4 factors; measured against the same
    # sum of magnitudes, so that cancellation does not count as an error.
    magnitude = pairwise_gla(x.q.abs(), x.k.abs(), x.v.abs(), g, x.initial_state.abs(), keys**-0.5)
    steps = keys * (tokens + 1) + tokens + 60
    assert bool(((o - expected).abs() <= steps * torch.finfo(FP64).eps * magnitude).all())
    assert state is None


def test_one_token_by_hand() -> None:
    q, k, v = torch.tensor([2.0, 3.0]), torch.tensor([5.0, -1.0]), torch.tensor([0.5, 4.0, -2.0])
    g = torch.tensor([math.log(0.5), 0.0], dtype=FP64)
    start = torch.ones(1, 1, 2, 3)
    o, state = recurrent_gla(
        *(x.view(1, 1, 1, -1) for x in (q, k, v, g)),
        scale=10.0,
        initial_state=start,
        output_final_state=True,
    )
    # S = [[0.5], [1]] + k v^T, o = 10 * (2 * S_0 + 3 * S_1)
    expected = torch.tensor([[3.0, 20.5, -9.5], [0.5, -3.0, 3.0]], dtype=FP64)
    assert state is not None
    torch.testing.assert_close(state[0, 0], expected, rtol=1e-15, atol=0)
    torch.testing.assert_close(o[0, 0, 0], torch.tensor([75.0, 320.0, -100.0]))


def test_default_scale_is_one_over_root_k() -> None:
    x = make_inputs(1, 5, 2, 16, 3, dtype=FP64)
    assert x.g is not None
    implicit, _ = recurrent_gla(x.q, x.k, x.v, x.g)
    explicit, _ = recurrent_gla(x.q, x.k, x.v, x.g, scale=0.25)
    assert torch.equal(implicit, explicit)


@pytest.mark.parametrize("cut", [1, 7, 16])
def test_carrying_the_state_over_a_cut_changes_nothing(cut: int) -> None:
    x = make_inputs(2, 17, 2, 6, 5, dtype=FP64, initial_state=True)
    g = hard_gates(x.q.shape, seed=3, dtype=FP64)
    whole, end = recurrent_gla(
        x.q, x.k, x.v, g, initial_state=x.initial_state, output_final_state=True
    )
    state = x.initial_state
    parts = []
    for part in (slice(0, cut), slice(cut, None)):
        o, state = recurrent_gla(
            x.q[:, part],
            x.k[:, part],
            x.v[:, part],
            g[:, part],
            initial_state=state,
            output_final_state=True,
        )
        parts.append(o)
    assert state is not None
    assert end is not None
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(state, end)


def test_reset_everywhere_leaves_only_the_token_itself() -> None:
    x = make_inputs(2, 9, 3, 8, 5, dtype=FP64, initial_state=True)
    o, state = recurrent_gla(
        x.q,
        x.k,
        x.v,
        torch.full_like(x.q, -math.inf),
        scale=0.3,
        initial_state=x.initial_state,
        output_final_state=True,
    )
    assert relative_rms(o, 0.3 * (x.q * x.k).sum(-1, keepdim=True) * x.v) < 1e-15
    assert state is not None
    assert torch.equal(state, x.k[:, -1, :, :, None] * x.v[:, -1, :, None, :])


def test_gradients_at_resets_are_finite_and_zero_for_the_gate() -> None:
    x = make_inputs(1, 12, 2, 5, 4, dtype=FP64, initial_state=True)
    assert x.initial_state is not None
    g = hard_gates(x.q.shape, seed=1, dtype=FP64)
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, g, x.initial_state)]
    o, state = recurrent_gla(*leaves[:4], initial_state=leaves[4], output_final_state=True)
    assert state is not None
    gradients = torch.autograd.grad(o.square().sum() + state.square().sum(), leaves)
    assert all(bool(grad.isfinite().all()) for grad in gradients)
    resets = g == -math.inf
    assert bool((gradients[3][resets] == 0).all())
    assert bool((gradients[3][(g > -1) & (g < 0)] != 0).any())


def test_gradcheck_through_outputs_and_final_state() -> None:
    x = make_inputs(1, 4, 2, 3, 2, dtype=FP64, gate_scale=2.0, initial_state=True)
    leaves = [
        t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.g, x.initial_state) if t is not None
    ]
    assert len(leaves) == 5

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        o, state = recurrent_gla(q, k, v, g, initial_state=s, output_final_state=True)
        assert state is not None
        return o, state

    assert torch.autograd.gradcheck(run, leaves)


def test_later_tokens_do_not_change_earlier_outputs() -> None:
    x = make_inputs(2, 20, 2, 6, 5, dtype=torch.float32)
    other = make_inputs(2, 20, 2, 6, 5, dtype=torch.float32, seed=1)
    g, other_g = hard_gates(x.q.shape, seed=0), hard_gates(x.q.shape, seed=1)
    pairs = ((x.q, other.q), (x.k, other.k), (x.v, other.v), (g, other_g))
    mixed = [torch.cat((a[:, :11], b[:, 11:]), 1) for a, b in pairs]
    before, _ = recurrent_gla(x.q, x.k, x.v, g)
    after, _ = recurrent_gla(*mixed)
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11:], after[:, 11:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, FP64])
def test_output_takes_the_dtype_of_v_and_the_state_that_of_the_sum(dtype: torch.dtype) -> None:
    x = make_inputs(1, 64, 1, 8, 8, dtype=dtype)
    assert x.g is not None
    o, state = recurrent_gla(x.q, x.k, x.v, x.g, output_final_state=True)
    wide = [t.double() for t in (x.q, x.k, x.v, x.g)]
    expected, expected_state = recurrent_gla(*wide, output_final_state=True)
    assert state is not None
    assert expected_state is not None
    assert o.dtype == dtype
    assert state.dtype == (FP64 if dtype == FP64 else torch.float32)
    # One rounding of the output, plus an fp32 sum over 64 tokens and 8 channels before it.
    assert relative_rms(o, expected) <= torch.finfo(dtype).eps / 2 + 72 * 2**-24
    assert relative_rms(state, expected_state) <= 64 * 2**-24


def test_autocast_does_not_lower_the_precision() -> None:
    x = make_inputs(1, 8, 1, 8, 8, dtype=torch.float32)
    assert x.g is not None
    plain, _ = recurrent_gla(x.q, x.k, x.v, x.g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = recurrent_gla(x.q, x.k, x.v, x.g)
    assert torch.equal(plain, cast)


def test_rejects_shapes_that_do_not_belong_together() -> None:
    q = torch.zeros(1, 3, 2, 4)
    v = torch.zeros(1, 3, 2, 5)
    with pytest.raises(InputError, match="k must have q's shape"):
        recurrent_gla(q, q[..., :3], v, q)
    with pytest.raises(InputError, match="g must have q's shape"):
        recurrent_gla(q, q, v, q[:, :, :1])
    with pytest.raises(InputError, match="v must start with"):
        recurrent_gla(q, q, v[:, :2], q)
    with pytest.raises(InputError, match="q must have 4 dimensions"):
        recurrent_gla(q[0], q, v, q)
    with pytest.raises(InputError, match="at least one token"):
        recurrent_gla(q[:, :0], q[:, :0], v[:, :0], q[:, :0])
    with pytest.raises(InputError, match="initial_state must have shape"):
        recurrent_gla(q, q, v, q, initial_state=torch.zeros(1, 2, 5, 4))
    with pytest.raises(InputTypeError, match="g must be floating point"):
        recurrent_gla(q, q, v, q.int())


def test_relative_rms() -> None:
    a = torch.tensor([3.0, 4.0])
    assert relative_rms(a * 1.5, a) == 0.5
    assert relative_rms(a.bfloat16(), a.double()) == 0.0
    assert relative_rms(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_rms(a, torch.zeros(2)) == math.inf
    assert math.isnan(relative_rms(torch.tensor([math.nan, 4.0]), a))
    assert math.isnan(relative_rms(torch.tensor([math.nan, 0.0]), torch.zeros(2)))
    with pytest.raises(InputError, match="shape"):
        relative_rms(a, a[:1])
