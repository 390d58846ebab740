"""What must hold between two forward runs: split and whole, layouts, appended tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from glac.configs import ForwardConfig
from glac.testing import Inputs, hard_gates, make_inputs
from tests.interpreter.running import FP32_BUDGET, config, configs, legal, nan_filled, run

pytestmark = [
    pytest.mark.interpreter,
    # The fast loop overflows wherever the exact one has to take over.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

FP32, FP16 = torch.float32, torch.float16
SIZES = st.sampled_from([4, 12, 16, 24])
PREPARE = pytest.mark.parametrize("prepare", [0, 16], ids=["gla_fwd", "gla_walk"])


def tokens_of(x: Inputs, begin: int, end: int | None = None) -> Inputs:
    """The problem of some of the tokens, as views."""

    def cut(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[:, begin:end]

    q, k, v = x.q[:, begin:end], x.k[:, begin:end], x.v[:, begin:end]
    return replace(x, q=q, k=k, v=v, g=cut(x.g), x=cut(x.x))


def difference(a: Tensor, b: Tensor, size: Tensor) -> float:
    return float((a.double() - b.double()).norm() / size.double().norm())


@settings(max_examples=20)
@given(
    tokens=st.integers(2, 70),
    where=st.integers(1, 69),
    keys=SIZES,
    values=SIZES,
    cfg=configs(),
    hard=st.booleans(),
    gate=st.sampled_from(["vector", "lowrank"]),
    seed=st.integers(0, 2**16),
)
@example(70, 33, 16, 16, config(16, 16, 32), True, "vector", 0)
@example(64, 32, 16, 16, config(32, 16, 32), False, "lowrank", 0)
@example(70, 33, 16, 16, config(16, 16, 32, prepare=16), True, "vector", 0)
@example(64, 31, 16, 16, config(32, 16, 32, prepare=16), False, "lowrank", 0)
def test_split_with_a_carried_state_is_the_whole(
    tokens: int,
    where: int,
    keys: int,
    values: int,
    cfg: ForwardConfig,
    hard: bool,
    gate: str,
    seed: int,
) -> None:
    assume(where < tokens)
    x = make_inputs(
        1,
        tokens,
        1,
        keys,
        values,
        dtype=FP32,
        gate="vector" if gate == "vector" else "lowrank",
        seed=seed,
        initial_state=True,
    )
    if hard and x.g is not None:
        x = replace(x, g=hard_gates(x.q.shape, seed=seed))
    assume(legal(x, cfg))
    whole, state = run(x, cfg)
    first, carried = run(tokens_of(x, 0, where), cfg)
    second, last = run(replace(tokens_of(x, where), initial_state=carried), cfg)
    joined = torch.cat((first, second), 1)
    assert difference(joined, whole, whole) <= 2 * FP32_BUDGET
    assert difference(last, state, state) <= 2 * FP32_BUDGET


@settings(max_examples=25)
@given(
    tokens=st.integers(1, 60),
    more=st.integers(1, 40),
    keys=SIZES,
    dtype=st.sampled_from([FP32, FP16]),
    cfg=configs(),
    gate=st.sampled_from(["vector", "lowrank"]),
    seed=st.integers(0, 2**16),
)
@example(33, 1, 16, FP32, config(32, 16, 32), "vector", 0)
@example(1, 31, 16, FP16, config(32, 16), "vector", 0)
@example(33, 1, 16, FP32, config(32, 16, 32, prepare=16), "vector", 0)
@example(1, 31, 16, FP16, config(32, 16, prepare=16), "lowrank", 0)
def test_appended_tokens_leave_earlier_outputs_bit_equal(
    tokens: int,
    more: int,
    keys: int,
    dtype: torch.dtype,
    cfg: ForwardConfig,
    gate: str,
    seed: int,
) -> None:
    """The causality promise where every chunk stays on the start anchor."""
    x = make_inputs(
        1,
        tokens + more,
        1,
        keys,
        16,
        dtype=dtype,
        gate="vector" if gate == "vector" else "lowrank",
        seed=seed,
        initial_state=True,
    )
    assume(legal(x, cfg))
    whole, _ = run(x, cfg)
    short, _ = run(tokens_of(x, 0, tokens), cfg)
    assert torch.equal(whole[:, :tokens], short)


@settings(max_examples=20)
@given(
    tokens=st.integers(1, 50),
    more=st.integers(1, 20),
    cfg=configs(),
    seed=st.integers(0, 2**16),
)
@example(20, 1, config(32, 16), 0)
@example(20, 1, config(32, 16, prepare=16), 0)
def test_appended_resets_change_earlier_outputs_by_rounding_only(
    tokens: int, more: int, cfg: ForwardConfig, seed: int
) -> None:
    x = make_inputs(1, tokens + more, 1, 16, 16, dtype=FP32, seed=seed, initial_state=True)
    assert x.g is not None
    x.g[:, tokens:] = hard_gates((1, more, 1, 16), seed=seed)
    x.g[:, tokens] = -math.inf
    assume(legal(x, cfg))
    whole, _ = run(x, cfg)
    short, _ = run(tokens_of(x, 0, tokens), cfg)
    assert difference(whole[:, :tokens], short, short) <= 2 * FP32_BUDGET


def head_first(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def batch_inside(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def padded(t: Tensor) -> Tensor:
    """Rows inside wider rows, heads inside more heads, tokens inside more tokens."""
    B, T, H, D = t.shape
    wide = torch.full((B, T + 3, H + 1, 2 * D + 16), math.nan, dtype=t.dtype)
    wide[:, 2 : T + 2, 1:, 16 : 16 + D] = t
    return wide[:, 2 : T + 2, 1:, 16 : 16 + D]


@pytest.mark.parametrize("layout", [head_first, batch_inside, padded])
@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize(("keys", "values"), [(16, 32), (24, 8), (20, 12), (5, 7)])
@PREPARE
def test_layouts_give_the_same_bits(
    layout: object, dtype: torch.dtype, keys: int, values: int, prepare: int
) -> None:
    assert callable(layout)
    x = make_inputs(2, 35, 2, keys, values, dtype=dtype, initial_state=True)
    cfg = config(16, 16, 32, tma=keys % 8 == values % 8 == 0, prepare=prepare)
    o, state = run(x, cfg)
    y = replace(x, q=layout(x.q), k=layout(x.k), v=layout(x.v), g=layout(x.g))
    assert not y.q.is_contiguous()
    other, other_state = run(y, cfg)
    assert torch.equal(o, other)
    assert torch.equal(state, other_state)


@pytest.mark.parametrize("sizes", [(16, 16), (12, 20)])
@pytest.mark.parametrize("tma", [False, True])
@PREPARE
def test_slices_of_one_fused_tensor(sizes: tuple[int, int], tma: bool, prepare: int) -> None:
    """q, k, v and g as a layer's one projection makes them."""
    keys, values = sizes
    x = make_inputs(2, 35, 2, keys, values, dtype=FP32)
    assert x.g is not None
    parts = (x.q, x.k, x.v, x.g)
    widths = [t.shape[-1] for t in parts]
    per_head = torch.split(torch.cat(parts, -1), widths, -1)
    flat = torch.cat([t.flatten(2) for t in parts], -1)
    pieces = torch.split(flat, [2 * width for width in widths], -1)
    per_tensor = [torch.unflatten(piece, -1, (2, -1)) for piece in pieces]
    cfg = config(16, 16, 32, tma=tma, prepare=prepare)
    o, state = run(x, cfg)
    for q, k, v, g in (per_head, per_tensor):
        assert not q.is_contiguous()
        other, other_state = run(replace(x, q=q, k=k, v=v, g=g), cfg)
        assert torch.equal(o, other)
        assert torch.equal(state, other_state)


@PREPARE
def test_one_head_for_all_and_one_gate_for_all(prepare: int) -> None:
    """Expanded tensors: strides of 0."""
    x = make_inputs(2, 20, 2, 16, 16, dtype=FP32)
    assert x.g is not None
    q, g = x.q[:, :, :1].expand_as(x.q), x.g[:1].expand_as(x.g)
    cfg = config(prepare=prepare)
    o, _ = run(replace(x, q=q, g=g), cfg)
    wanted, _ = run(replace(x, q=q.contiguous(), g=g.contiguous()), cfg)
    assert torch.equal(o, wanted)


@PREPARE
def test_low_rank_input_that_is_a_slice(prepare: int) -> None:
    x = make_inputs(2, 35, 2, 16, 16, dtype=FP32, gate="lowrank", rank=8)
    assert x.x is not None
    wide = torch.cat((x.x, x.x * math.nan), -1)
    cfg = config(16, 16, 32, prepare=prepare)
    o, _ = run(x, cfg)
    other, _ = run(replace(x, x=wide[..., :8]), cfg)
    assert torch.equal(o, other)


@pytest.mark.parametrize("tokens", [1, 16, 33, 70])
@pytest.mark.parametrize(
    "cfg",
    [
        config(),
        config(16, 16, 32),
        config(32, 16, tma=True),
        config(prepare=16),
        config(16, 16, 32, prepare=16),
        config(32, 16, tma=True, prepare=16),
    ],
)
def test_every_element_is_written(tokens: int, cfg: ForwardConfig) -> None:
    """Output, state and scratch hold NaN before the launch (see ``run``)."""
    assert bool(nan_filled(2, dtype=FP32).isnan().all())
    x = make_inputs(2, tokens, 2, 12, 20, dtype=FP32, initial_state=True)
    o, state = run(x, cfg)
    assert not bool(o.isnan().any())
    assert not bool(state.isnan().any())


@PREPARE
def test_repeats_are_bit_equal(prepare: int) -> None:
    x = make_inputs(1, 40, 2, 16, 16, dtype=FP16, initial_state=True)
    x = replace(x, g=hard_gates(x.q.shape, dtype=FP16))
    cfg = config(16, 16, 32, prepare=prepare)
    o, state = run(x, cfg)
    again, state_again = run(x, cfg)
    assert torch.equal(o, again)
    assert torch.equal(state, state_again)
