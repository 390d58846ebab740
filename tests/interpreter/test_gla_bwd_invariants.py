"""What must hold between two backward runs, and between gradients of one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from glac.configs import BackwardConfig
from glac.reference import relative_rms
from glac.testing import Inputs, hard_gates, make_inputs
from tests.helpers_gradients import ends_of
from tests.interpreter.running import (
    FP32_GRADIENT_BUDGET,
    Backward,
    backward_config,
    backward_configs,
    fitted,
    run_gradients,
    truth,
    windows_of,
)

pytestmark = [
    pytest.mark.interpreter,
    # The fast kernel overflows wherever the exact one has to take over.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

FP32, FP16 = torch.float32, torch.float16
Gate = Literal["vector", "lowrank"]
SIZES = st.sampled_from([4, 12, 16, 24])
GATES = st.sampled_from(["vector", "lowrank"])
PER_TOKEN = ("dq", "dk", "dv", "dg", "dx")
TILES = backward_config(16, 16, 16, dv_chunk=16)  # of K and V, where these exceed 16


def drawn(
    tokens: int,
    keys: int,
    values: int,
    *,
    gate: Gate = "vector",
    hard: bool = False,
    batch: int = 1,
    heads: int = 1,
    seed: int = 0,
) -> Inputs:
    x = make_inputs(
        batch,
        tokens,
        heads,
        keys,
        values,
        dtype=FP32,
        gate=gate,
        rank=8,
        seed=seed,
        initial_state=True,
    )
    if hard and x.g is not None:
        x = replace(x, g=hard_gates(x.q.shape, seed=seed))
    return x


def tokens_of(x: Inputs, begin: int, end: int | None = None) -> Inputs:
    """The problem of some of the tokens, as views."""

    def cut(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[:, begin:end]

    q, k, v = x.q[:, begin:end], x.k[:, begin:end], x.v[:, begin:end]
    return replace(x, q=q, k=k, v=v, g=cut(x.g), x=cut(x.x))


def assert_same_bits(a: Backward, b: Backward) -> None:
    for name, grad in a.grads.items():
        assert torch.equal(grad, b.grads[name]), name


# --- two runs ---------------------------------------------------------------------------------


@settings(max_examples=4)
@given(
    tokens=st.integers(2, 36),
    where=st.integers(1, 35),
    keys=SIZES,
    values=SIZES,
    cfg=backward_configs(),
    hard=st.booleans(),
    gate=GATES,
    seed=st.integers(0, 2**16),
)
@example(36, 21, 16, 16, backward_config(16, dv_chunk=32), True, "vector", 0)
@example(48, 32, 16, 16, backward_config(32), False, "lowrank", 0)
def test_two_calls_joined_by_the_state_are_one(
    tokens: int,
    where: int,
    keys: int,
    values: int,
    cfg: BackwardConfig,
    hard: bool,
    gate: Gate,
    seed: int,
) -> None:
    assume(where < tokens)
    x = drawn(tokens, keys, values, gate=gate, hard=hard, seed=seed)
    cfg = fitted(x, cfg)
    do, dht = ends_of(x, seed)
    whole = run_gradients(x, cfg, do, dht).grads
    early, late = tokens_of(x, 0, where), tokens_of(x, where)
    _, carried = truth(early)
    second = run_gradients(
        replace(late, initial_state=carried.float()), cfg, do[:, where:], dht
    ).grads
    first = run_gradients(early, cfg, do[:, :where], second["dh0"]).grads
    for name, grad in whole.items():
        if name in PER_TOKEN:
            joined = torch.cat((first[name], second[name]), 1)
        else:
            joined = first[name] if name == "dh0" else first[name] + second[name]
        assert relative_rms(joined, grad) <= 2 * FP32_GRADIENT_BUDGET, name


@settings(max_examples=5)
@given(
    tokens=st.integers(2, 36),
    where=st.integers(1, 35),
    keys=SIZES,
    values=SIZES,
    cfg=backward_configs(),
    hard=st.booleans(),
    gate=GATES,
    chunks=st.sampled_from([1, 4]),
    seed=st.integers(0, 2**16),
)
@example(40, 21, 16, 16, backward_config(32, dv_chunk=32), True, "vector", 1, 0)
@example(40, 1, 24, 16, TILES, False, "lowrank", 4, 0)
def test_earlier_queries_and_outputs_change_nothing_later(
    tokens: int,
    where: int,
    keys: int,
    values: int,
    cfg: BackwardConfig,
    hard: bool,
    gate: Gate,
    chunks: int,
    seed: int,
) -> None:
    """Causality backwards, bit for bit: from token t on gradients come from t on."""
    assume(where < tokens)
    x = drawn(tokens, keys, values, gate=gate, hard=hard, seed=seed)
    cfg = fitted(x, cfg)
    do, dht = ends_of(x, seed)
    y, other = replace(x, q=x.q.clone()), do.clone()
    y.q[:, :where] *= -3
    other[:, :where] = 5 * other[:, :where].flip(-1)
    with windows_of(chunks):
        one, two = run_gradients(x, cfg, do, dht), run_gradients(y, cfg, other, dht)
    for name in PER_TOKEN:
        if name in one.grads:
            assert torch.equal(one.grads[name][:, where:], two.grads[name][:, where:]), name
    assert not torch.equal(one.grads["dk"], two.grads["dk"])


@settings(max_examples=5)
@given(
    tokens=st.integers(1, 30),
    more=st.integers(1, 10),
    keys=SIZES,
    values=SIZES,
    cfg=backward_configs(),
    hard=st.booleans(),
    gate=GATES,
    seed=st.integers(0, 2**16),
)
@example(20, 1, 16, 16, backward_config(32), False, "vector", 0)
@example(20, 13, 16, 24, TILES, True, "vector", 0)
def test_tokens_that_nobody_reads_get_no_gradient_and_change_none(
    tokens: int,
    more: int,
    keys: int,
    values: int,
    cfg: BackwardConfig,
    hard: bool,
    gate: Gate,
    seed: int,
) -> None:
    x = drawn(tokens + more, keys, values, gate=gate, hard=hard, seed=seed)
    cfg = fitted(x, cfg)
    do, _ = ends_of(x, seed)
    do[:, tokens:] = 0
    whole = run_gradients(x, cfg, do).grads
    short = run_gradients(tokens_of(x, 0, tokens), cfg, do[:, :tokens]).grads
    for name, grad in whole.items():
        kept = grad[:, :tokens] if name in PER_TOKEN else grad
        if name in PER_TOKEN:
            assert bool((grad[:, tokens:] == 0).all()), name
        if hard:  # later gates choose anchors in the exact kernel
            difference = float((kept - short[name]).norm())
            assert difference <= 2 * FP32_GRADIENT_BUDGET * float(short["dq"].norm()), name
        else:
            assert torch.equal(kept, short[name]), name


@pytest.mark.parametrize("gate", ["vector", "lowrank"])
def test_gradients_are_linear_in_those_of_the_results(gate: Gate) -> None:
    """Twice as much gives twice as much, bit for bit; two together give their sum."""
    x = drawn(20, 24, 20, gate=gate)
    (do, dht), (other, _) = ends_of(x), ends_of(x, 1)
    one = run_gradients(x, TILES, do, dht).grads
    two = run_gradients(x, TILES, other).grads
    twice = run_gradients(x, TILES, 2 * do, 2 * dht).grads
    both = run_gradients(x, TILES, do + other, dht).grads
    for name, grad in one.items():
        assert torch.equal(twice[name], 2 * grad), name
        assert relative_rms(both[name], grad + two[name]) <= FP32_GRADIENT_BUDGET, name


@pytest.mark.parametrize("hard", [False, True])
def test_batches_and_heads_do_not_meet(hard: bool) -> None:
    x = drawn(18, 16, 24, hard=hard, batch=2, heads=2)
    assert x.g is not None
    assert x.initial_state is not None
    do, dht = ends_of(x)
    together = run_gradients(x, TILES, do, dht).grads
    b, h = slice(1, 2), slice(1, 2)
    q, k, v, g = (t[b, :, h] for t in (x.q, x.k, x.v, x.g))
    alone = Inputs(q, k, v, g, initial_state=x.initial_state[b, h])
    apart = run_gradients(alone, TILES, do[b, :, h], dht[b, h]).grads
    for name, grad in apart.items():
        mine = together[name][b, h] if name == "dh0" else together[name][b, :, h]
        assert torch.equal(grad, mine), name


# --- one run ----------------------------------------------------------------------------------


@settings(max_examples=5)
@given(
    tokens=st.integers(1, 36),
    heads=st.integers(1, 2),
    keys=SIZES,
    values=SIZES,
    cfg=backward_configs(),
    hard=st.booleans(),
    gate=GATES,
    seed=st.integers(0, 2**16),
)
@example(18, 1, 24, 24, TILES, True, "vector", 0)
@example(33, 2, 24, 24, TILES, False, "vector", 0)
def test_identities(
    tokens: int,
    heads: int,
    keys: int,
    values: int,
    cfg: BackwardConfig,
    hard: bool,
    gate: Gate,
    seed: int,
) -> None:
    """Scaling q or k and v oppositely changes no output; nor does the first gate but through S."""
    x = drawn(tokens, keys, values, gate=gate, hard=hard, heads=heads, seed=seed)
    cfg = fitted(x, cfg)
    do, dht = ends_of(x, seed)
    grads = {name: t.double() for name, t in run_gradients(x, cfg, do, dht).grads.items()}
    o, _ = truth(x)
    q, k, v = x.q.double(), x.k.double(), x.v.double()
    pairs = [
        ((q * grads["dq"]).sum(-1), (do * o).sum(-1), (q * grads["dq"]).norm()),
        ((k * grads["dk"]).sum(-1), (v * grads["dv"]).sum(-1), (k * grads["dk"]).norm()),
    ]
    if gate == "vector":
        assert x.initial_state is not None
        products = x.initial_state * grads["dh0"]
        pairs.append((grads["dg"][:, 0], products.sum(-1), products.norm()))
    for one, other, size in pairs:
        assert float((one - other).norm()) <= 2 * FP32_GRADIENT_BUDGET * float(size)


def test_a_reset_has_no_gradient() -> None:
    """Up to the rounding of the terms that cancel, and states before it get exactly none."""
    x = drawn(40, 16, 16)
    assert x.g is not None
    x.g[:, 20] = -math.inf
    found = run_gradients(x, backward_config(), *ends_of(x)).grads
    assert float(found["dg"][:, 20].norm()) <= FP32_GRADIENT_BUDGET * float(found["dg"].norm())
    alone = run_gradients(tokens_of(x, 0, 20), backward_config(), ends_of(x)[0][:, :20]).grads
    for name in ("dk", "dv", "dh0"):
        mine = found[name] if name == "dh0" else found[name][:, :20]
        assert relative_rms(mine, alone[name]) <= FP32_GRADIENT_BUDGET, name


# --- layouts ----------------------------------------------------------------------------------


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


def channels_outermost(t: Tensor) -> Tensor:
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


@pytest.mark.parametrize("layout", [head_first, batch_inside, padded, channels_outermost])
@pytest.mark.parametrize(
    ("keys", "values", "dtype"), [(16, 24, FP32), (16, 16, FP16), (20, 12, FP16), (5, 7, FP32)]
)
def test_layouts_give_the_same_bits(
    layout: Callable[[Tensor], Tensor], keys: int, values: int, dtype: torch.dtype
) -> None:
    x = make_inputs(2, 5, 2, keys, values, dtype=dtype, initial_state=True)
    assert x.g is not None
    cfg = fitted(x, backward_config(16, dv_chunk=16, tma=True))
    do, dht = ends_of(x)
    wanted = run_gradients(x, cfg, do, dht)
    y = replace(x, q=layout(x.q), k=layout(x.k), v=layout(x.v), g=layout(x.g))
    assert not y.q.is_contiguous()
    found = run_gradients(y, cfg, layout(do), dht)
    assert_same_bits(found, wanted)
    assert all(grad.is_contiguous() for grad in found.grads.values())


@pytest.mark.parametrize("tma", [False, True])
def test_slices_of_one_fused_tensor(tma: bool) -> None:
    """q, k, v and g as a layer's one projection makes them."""
    x = drawn(5, 16, 16, batch=2, heads=2)
    assert x.g is not None
    cfg = backward_config(16, dv_chunk=16, tma=tma)
    wanted = run_gradients(x, cfg, *ends_of(x))
    parts = (x.q, x.k, x.v, x.g)
    per_head = torch.split(torch.cat(parts, -1), 16, -1)
    flat = torch.cat([t.flatten(2) for t in parts], -1)
    per_tensor = [torch.unflatten(t, -1, (2, -1)) for t in torch.split(flat, 32, -1)]
    for q, k, v, g in (per_head, per_tensor):
        assert not q.is_contiguous()
        found = run_gradients(replace(x, q=q, k=k, v=v, g=g), cfg, *ends_of(x))
        assert_same_bits(found, wanted)


def test_one_value_everywhere_and_one_head_for_all() -> None:
    """Expanded tensors: strides of 0, as those of the gradient of a sum."""
    x = drawn(5, 16, 16, batch=2, heads=2)
    assert x.g is not None
    cfg = backward_config()
    do = torch.ones(1).expand_as(x.v)
    y = replace(x, q=x.q[:, :, :1].expand_as(x.q), g=x.g[:1].expand_as(x.g))
    found = run_gradients(y, cfg, do)
    assert y.g is not None
    z = replace(y, q=y.q.contiguous(), g=y.g.contiguous())
    assert_same_bits(found, run_gradients(z, cfg, do.contiguous()))


def test_low_rank_input_that_is_a_slice() -> None:
    x = drawn(5, 16, 16, gate="lowrank", batch=2, heads=2)
    assert x.x is not None
    wide = torch.cat((x.x, x.x * math.nan), -1)
    found = run_gradients(replace(x, x=wide[..., :8]), backward_config(), *ends_of(x))
    assert_same_bits(found, run_gradients(x, backward_config(), *ends_of(x)))
