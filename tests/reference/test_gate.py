"""The low-rank gate against its formula, and the inputs that every other test draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glac.errors import InputError
from glac.reference import lowrank_gate, lowrank_gate_backward, relative_rms
from glac.testing import HARD_GATE_VALUES, hard_gates, make_inputs

FP64 = torch.float64


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 20),
    heads=st.integers(1, 3),
    keys=st.integers(1, 9),
    rank=st.integers(1, 9),
    normalizer=st.floats(0.5, 32.0),
    with_bias=st.booleans(),
    clamp=st.none() | st.floats(-1.0, 0.0),
)
def test_equals_the_formula(
    tokens: int,
    heads: int,
    keys: int,
    rank: int,
    normalizer: float,
    with_bias: bool,
    clamp: float | None,
) -> None:
    x = make_inputs(2, tokens, heads, keys, 1, dtype=FP64, gate="lowrank", rank=rank)
    assert x.x is not None
    assert x.weight is not None
    g = lowrank_gate(
        x.x,
        x.weight,
        x.bias if with_bias else None,
        num_heads=heads,
        normalizer=normalizer,
        clamp_min=clamp,
    )
    assert g.shape == (2, tokens, heads, keys)
    for head in range(heads):
        for key in range(keys):
            row = head * keys + key
            z = (x.x * x.weight[row]).sum(-1)
            if with_bias:
                assert x.bias is not None
                z = z + x.bias[row]
            expected = -torch.log1p(torch.exp(-z)) / normalizer
            if clamp is not None:
                expected = torch.where(expected < clamp, clamp, expected)
            # z itself is off by R roundings of its terms, and |dg/dz| <= 1 / normalizer.
            torch.testing.assert_close(g[:, :, head, key], expected, rtol=1e-13, atol=1e-13)


def test_large_activations_keep_the_gate() -> None:
    z = torch.tensor([-1e4, -90.0, 17.0, 90.0]).view(1, 4, 1)
    g = lowrank_gate(z, torch.ones(1, 1), num_heads=1, normalizer=1.0).flatten().double()
    expected = torch.tensor([-1e4, -90.0, -math.exp(-17.0), -math.exp(-90.0)], dtype=FP64)
    assert bool(((g - expected).abs() <= 1e-6 * expected.abs()).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computes_in_fp32_whatever_the_input(dtype: torch.dtype) -> None:
    x = make_inputs(1, 33, 2, 8, 8, dtype=dtype, gate="lowrank")
    assert x.x is not None
    assert x.weight is not None
    assert x.bias is not None
    g = lowrank_gate(x.x, x.weight, x.bias, num_heads=2)
    wide = lowrank_gate(x.x.double(), x.weight.double(), x.bias.double(), num_heads=2)
    assert g.dtype == torch.float32
    assert wide.dtype == FP64
    assert relative_rms(g, wide) < 20 * 2**-24  # R + 1 = 17 additions and three more operations
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lowrank_gate(x.x, x.weight, x.bias, num_heads=2), g)


def test_gradcheck() -> None:
    x = make_inputs(1, 3, 2, 2, 1, dtype=FP64, gate="lowrank", rank=3)
    leaves = [t.clone().requires_grad_() for t in (x.x, x.weight, x.bias) if t is not None]
    assert len(leaves) == 3

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return lowrank_gate(x, weight, bias, num_heads=2, normalizer=3.0, clamp_min=-0.4)

    g = run(*leaves)
    assert bool((g == -0.4).any())
    assert bool((g > -0.4).any())
    assert torch.autograd.gradcheck(run, leaves)


def test_rejects_what_does_not_fit() -> None:
    x, weight, bias = torch.zeros(1, 3, 4), torch.zeros(6, 4), torch.zeros(6)
    with pytest.raises(InputError, match="x must have 3 dimensions"):
        lowrank_gate(x[0], weight, num_heads=2)
    with pytest.raises(InputError, match="weight must have shape"):
        lowrank_gate(x, weight[:, :3], num_heads=2)
    with pytest.raises(InputError, match="num_heads must divide"):
        lowrank_gate(x, weight, num_heads=4)
    with pytest.raises(InputError, match="num_heads must divide"):
        lowrank_gate(x, weight, num_heads=0)
    with pytest.raises(InputError, match="bias must have shape"):
        lowrank_gate(x, weight, bias[:5], num_heads=2)
    with pytest.raises(InputError, match="normalizer must be positive"):
        lowrank_gate(x, weight, num_heads=2, normalizer=0.0)
    with pytest.raises(InputError, match="clamp_min must be at most 0"):
        lowrank_gate(x, weight, num_heads=2, clamp_min=0.1)


def test_inputs_are_reproducible_and_round_the_same_numbers() -> None:
    wide = make_inputs(2, 3, 2, 4, 5, dtype=torch.float32, seed=7, initial_state=True)
    again = make_inputs(2, 3, 2, 4, 5, dtype=torch.float32, seed=7, initial_state=True)
    other = make_inputs(2, 3, 2, 4, 5, dtype=torch.float32, seed=8, initial_state=True)
    half = make_inputs(
        2, 3, 2, 4, 5, dtype=torch.bfloat16, gate_dtype=torch.float32, seed=7, initial_state=True
    )
    for name in ("q", "k", "v", "g", "initial_state"):
        tensor: Tensor = getattr(wide, name)
        assert torch.equal(tensor, getattr(again, name))
        assert not torch.equal(tensor, getattr(other, name))
        assert torch.equal(tensor.to(getattr(half, name).dtype), getattr(half, name))
    assert half.q.dtype == torch.bfloat16
    assert half.g is not None
    assert half.g.dtype == torch.float32
    assert wide.v.shape == (2, 3, 2, 5)
    assert (wide.x, wide.weight, wide.bias) == (None, None, None)
    assert make_inputs(1, 1, 1, 1, 1, dtype=FP64, gate="lowrank").g is None
    with pytest.raises(InputError, match="gate must be"):
        make_inputs(1, 1, 1, 1, 1, dtype=FP64, gate="head")  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hard_gates_contain_every_hard_value(seed: int) -> None:
    g = hard_gates((2, 70, 2, 9), seed=seed, dtype=FP64)
    assert set(g.flatten().tolist()) == {float(torch.tensor(x)) for x in HARD_GATE_VALUES}
    boundary = (g == -math.inf).all(-1, keepdim=True)
    assert bool(boundary.any())
    assert not bool(boundary.all())
    lowest = g.masked_fill(boundary, math.inf).amin(1)
    constant = lowest == g.masked_fill(boundary, -math.inf).amax(1)
    assert bool(constant.any())
    assert not bool(constant.all())
    with pytest.raises(InputError, match="shape must be"):
        hard_gates((2, 70, 2))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 20),
    heads=st.integers(1, 3),
    keys=st.integers(1, 9),
    rank=st.integers(1, 9),
    normalizer=st.floats(0.5, 32.0),
    with_bias=st.booleans(),
    clamp=st.none() | st.floats(-1.0, 0.0),
    seed=st.integers(0, 2**16),
)
def test_gradients_equal_autograd(
    tokens: int,
    heads: int,
    keys: int,
    rank: int,
    normalizer: float,
    with_bias: bool,
    clamp: float | None,
    seed: int,
) -> None:
    inputs = make_inputs(
        2, tokens, heads, keys, 1, dtype=FP64, gate="lowrank", rank=rank, seed=seed
    )
    assert inputs.x is not None
    assert inputs.weight is not None
    bias = inputs.bias if with_bias else None
    leaves = [t for t in (inputs.x, inputs.weight, bias) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    options: dict[str, Any] = {"normalizer": normalizer, "clamp_min": clamp}
    g = lowrank_gate(inputs.x, inputs.weight, bias, num_heads=heads, **options)
    dg = torch.randn(g.shape, dtype=FP64, generator=torch.Generator().manual_seed(seed))
    wanted = torch.autograd.grad(g, leaves, dg)
    found = lowrank_gate_backward(inputs.x, inputs.weight, bias, dg, **options)
    assert (found[2] is None) == (bias is None)
    for a, b in zip(found, wanted, strict=False):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_a_gate_at_its_bound_passes_its_gradient() -> None:
    x, weight = torch.zeros(1, 1, 1), torch.ones(1, 1)
    at = float(lowrank_gate(x, weight, num_heads=1))  # representable in fp32, so it is met exactly
    one = torch.ones(1, 1, 1, 1)
    for clamp, passes in ((at - 1e-3, True), (at, True), (at + 1e-3, False)):
        (dx, _, _) = lowrank_gate_backward(x, weight, None, one, clamp_min=clamp)
        assert bool(dx != 0) == passes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_of_parameters_stay_in_fp32(dtype: torch.dtype) -> None:
    x = make_inputs(1, 33, 2, 8, 8, dtype=dtype, gate="lowrank")
    assert x.x is not None
    assert x.weight is not None
    assert x.bias is not None
    dg = torch.randn(1, 33, 2, 8)
    dx, dweight, dbias = lowrank_gate_backward(x.x, x.weight, x.bias, dg)
    assert dbias is not None
    assert (dx.dtype, dweight.dtype, dbias.dtype) == (dtype, torch.float32, torch.float32)
    wide = lowrank_gate_backward(x.x.double(), x.weight.double(), x.bias.double(), dg.double())
    assert relative_rms(dweight, wide[1]) <= 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lowrank_gate_backward(x.x, x.weight, x.bias, dg)[1], dweight)


def test_gradients_need_the_shape_of_the_gate() -> None:
    x, weight = torch.zeros(2, 3, 8), torch.zeros(12, 8)
    for shape in ((2, 3, 12), (2, 3, 3, 3), (2, 4, 3, 4)):
        with pytest.raises(InputError, match="dg must have shape"):
            lowrank_gate_backward(x, weight, None, torch.zeros(shape))
