"""The yardstick must be as far from the truth as its precision says: not nearer, not farther."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glac.errors import InputError, InputTypeError
from glac.reference import chunk_gla, recurrent_gla, relative_rms, yardstick, yardstick_chunk_gla
from glac.reference.yardstick import round_mantissa
from glac.testing import Inputs, hard_gates, make_inputs

FP64 = torch.float64
# Upper bounds for outputs and states: half a unit in the last place of the 16-bit formats.
FARTHEST = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}
DTYPES = list(FARTHEST)


def errors(x: Inputs, g: Tensor, chunk_size: int = 64) -> tuple[float, float]:
    """Relative errors of the yardstick's outputs and final state against fp64."""
    o, state = yardstick_chunk_gla(
        x.q,
        x.k,
        x.v,
        g,
        initial_state=x.initial_state,
        output_final_state=True,
        chunk_size=chunk_size,
    )
    expected, expected_state = chunk_gla(
        x.q.double(),
        x.k.double(),
        x.v.double(),
        g.double(),
        initial_state=x.initial_state,
        output_final_state=True,
    )
    assert state is not None
    assert expected_state is not None
    assert state.dtype == torch.float32
    return relative_rms(o, expected), relative_rms(state, expected_state)


@pytest.fixture
def block_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per call of the sub-block scheme, which only gates out of range may need."""
    calls: list[int] = []
    inner = yardstick._block_scores

    def counting(
        q: Tensor, k: Tensor, g: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(1)
        return inner(q, k, g, dtype)

    monkeypatch.setattr(yardstick, "_block_scores", counting)
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128])
def test_error_with_the_gates_of_trained_models(dtype: torch.dtype, chunk_size: int) -> None:
    x = make_inputs(1, 256, 2, 64, 64, dtype=dtype, initial_state=True)
    assert x.g is not None
    output, state = errors(x, x.g, chunk_size)
    assert output < FARTHEST[dtype]
    assert state < FARTHEST[dtype]
    if dtype == torch.float32:
        return
    # One rounding is off by eps / sqrt(12) of the last place at most, by 0.208 eps rms relative to
    # a number with a uniform mantissa. The state sees one (the keys); the output sees four (both
    # operands of a score, the score, the output; likewise through the state), so 0.416 eps. With
    # three it would be 0.36, with five 0.465.
    eps = torch.finfo(dtype).eps
    assert 0.19 * eps < state < 0.23 * eps
    assert 0.39 * eps < output < 0.44 * eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("gate", "by_blocks"),
    [
        (-0.5, False),  # 46 log2 units per chunk: anchored at the start
        (-1.37, False),  # 126: only the midpoint keeps both sides in range
        (-3.0, True),  # 277: out of range for one anchor
        (-11.0, True),  # 254 in 16 rows: the diagonal itself is out of range
    ],
)
def test_error_on_each_level_of_the_ladder(
    dtype: torch.dtype, gate: float, by_blocks: bool, block_calls: list[int]
) -> None:
    x = make_inputs(1, 128, 2, 32, 32, dtype=dtype, initial_state=True)
    output, state = errors(x, torch.full_like(x.q, gate))
    assert bool(block_calls) == by_blocks
    assert output < FARTHEST[dtype]
    assert state < FARTHEST[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_reset_in_the_first_row_of_a_chunk_needs_no_blocks(
    dtype: torch.dtype, block_calls: list[int]
) -> None:
    x = make_inputs(1, 128, 2, 32, 32, dtype=dtype, initial_state=True)
    assert x.g is not None
    g = x.g.clone()
    g[:, ::64] = -math.inf
    output, state = errors(x, g)
    assert output < FARTHEST[dtype]
    assert state < FARTHEST[dtype]
    assert block_calls == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_error_with_hard_gates(dtype: torch.dtype, chunk_size: int) -> None:
    x = make_inputs(2, 150, 2, 24, 20, dtype=dtype, initial_state=True)
    g = hard_gates(x.q.shape, seed=1, dtype=dtype)
    output, state = errors(x, g, chunk_size)
    assert output < FARTHEST[dtype]
    assert state < FARTHEST[dtype]


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 70),
    keys=st.integers(1, 24),
    values=st.integers(1, 24),
    seed=st.integers(0, 2**16),
    chunk_size=st.sampled_from([16, 32, 48, 64]),
)
def test_fp32_equals_the_token_loop_for_any_shape_and_gate(
    tokens: int, keys: int, values: int, seed: int, chunk_size: int
) -> None:
    x = make_inputs(1, tokens, 2, keys, values, dtype=torch.float32, seed=seed)
    g = hard_gates(x.q.shape, seed=seed)
    o, state = yardstick_chunk_gla(
        x.q, x.k, x.v, g, scale=0.5, output_final_state=True, chunk_size=chunk_size
    )
    wide = [t.double() for t in (x.q, x.k, x.v, g)]
    expected, end = recurrent_gla(*wide, scale=0.5, output_final_state=True)
    size, size_end = recurrent_gla(
        wide[0].abs(), wide[1].abs(), wide[2].abs(), wide[3], scale=0.5, output_final_state=True
    )
    assert state is not None
    assert end is not None
    assert size_end is not None
    # fp32 holds decays down to 2^-149, and a cumulative gate of up to 176 log2 units is off by
    # some units of 2^-17 where it matters: 2e-5 of the magnitude per term at the very worst.
    assert bool(((o - expected).abs() <= 2e-5 * size).all())
    assert bool(((state - end).abs() <= 2e-5 * size_end).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_state_is_rounded_where_it_is_read_but_not_where_it_is_kept(
    dtype: torch.dtype,
) -> None:
    x = make_inputs(1, 256, 2, 64, 64, dtype=dtype, initial_state=True)
    assert x.initial_state is not None
    o, state = yardstick_chunk_gla(
        x.q,
        x.k,
        torch.zeros_like(x.v),
        torch.zeros_like(x.q),
        scale=1.0,
        initial_state=x.initial_state,
        output_final_state=True,
    )
    assert state is not None
    assert torch.equal(state, x.initial_state)
    expected = torch.einsum("bthk,bhkv->bthv", x.q.double(), x.initial_state.double())
    # Two roundings of 0.208 eps: the state as an operand and the output.
    eps = torch.finfo(dtype).eps
    assert 0.27 * eps < relative_rms(o, expected) < 0.32 * eps


def test_output_has_the_dtype_of_v_and_no_graph() -> None:
    x = make_inputs(1, 20, 1, 8, 8, dtype=torch.bfloat16)
    assert x.g is not None
    o, state = yardstick_chunk_gla(x.q.requires_grad_(), x.k, x.v.float(), x.g)
    assert o.shape == x.v.shape
    assert o.dtype == torch.float32
    assert not o.requires_grad
    assert state is None


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), exponent=st.integers(-14, 13))
def test_round_mantissa_to_eleven_bits_is_fp16_where_fp16_reaches(
    seed: int, exponent: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (1 + torch.rand(256, generator=generator)) * 2.0**exponent
    x = torch.cat((x, -x))
    assert torch.equal(round_mantissa(x, 11), x.half().float())
    assert torch.equal(round_mantissa(x, 8), x.bfloat16().float())


def test_round_mantissa_at_its_edges() -> None:
    ties = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, 2 - 2.0**-12, 0.0, -0.0])
    expected = torch.tensor([1.0, 1 + 2.0**-9, 2.0, 0.0, -0.0])
    assert torch.equal(round_mantissa(ties, 11), expected)
    far = torch.tensor([2.0**100 * (1 + 2.0**-12), math.inf, -math.inf, math.nan])
    rounded = round_mantissa(far, 11)
    assert rounded[:3].tolist() == [2.0**100, math.inf, -math.inf]
    assert math.isnan(rounded[3])
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_mantissa(x, 24), x)
    with pytest.raises(InputError, match="bits must lie in"):
        round_mantissa(x, 25)
    with pytest.raises(InputTypeError, match="x must be fp32"):
        round_mantissa(x.double(), 11)


def test_rejects_what_it_cannot_round() -> None:
    x = make_inputs(1, 4, 1, 2, 2, dtype=FP64)
    assert x.g is not None
    with pytest.raises(InputTypeError, match="q must be bf16, fp16 or fp32"):
        yardstick_chunk_gla(x.q, x.k, x.v, x.g)
    with pytest.raises(InputError, match="chunk_size must be a multiple of 16"):
        yardstick_chunk_gla(x.q.float(), x.k, x.v, x.g, chunk_size=24)
    with pytest.raises(InputError, match="k must have q's shape"):
        yardstick_chunk_gla(x.q.float(), x.k[:, :2], x.v, x.g)
