"""The forward kernels against the token loop in fp64, in Triton's interpreter."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from glac.configs import ForwardConfig
from glac.testing import hard_gates, make_inputs
from tests.interpreter.running import (
    FP32_BUDGET,
    assert_right,
    config,
    configs,
    legal,
    run,
    truth,
)

pytestmark = [
    pytest.mark.interpreter,
    # The fast loop overflows wherever the exact one has to take over.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

FP32, FP16 = torch.float32, torch.float16
DTYPES = st.sampled_from([(FP32, FP32), (FP16, FP16), (FP16, FP32)])
SIZES = st.sampled_from([1, 5, 8, 12, 16, 20, 24, 32])
LENGTHS = st.integers(1, 70)
PREPARE = pytest.mark.parametrize("prepare", [0, 16], ids=["gla_fwd", "gla_walk"])


@settings(max_examples=60)
@given(
    batch=st.integers(1, 2),
    tokens=LENGTHS,
    heads=st.integers(1, 2),
    keys=SIZES,
    values=SIZES,
    dtypes=DTYPES,
    cfg=configs(),
    carried=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(2, 70, 2, 32, 32, (FP32, FP32), config(32, 16, 32, tma=True), True, 0)
@example(2, 70, 2, 24, 32, (FP16, FP32), config(32, 16, 64, tma=True, prepare=16), True, 0)
@example(1, 1, 1, 1, 1, (FP16, FP32), config(prepare=16), False, 0)
@example(1, 1, 1, 1, 1, (FP16, FP32), config(), False, 0)
def test_equals_the_token_loop(
    batch: int,
    tokens: int,
    heads: int,
    keys: int,
    values: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    cfg: ForwardConfig,
    carried: bool,
    seed: int,
) -> None:
    dtype, gate_dtype = dtypes
    x = make_inputs(
        batch,
        tokens,
        heads,
        keys,
        values,
        dtype=dtype,
        gate_dtype=gate_dtype,
        seed=seed,
        initial_state=carried,
    )
    assume(legal(x, cfg))
    assert_right(x, cfg)


@settings(max_examples=40)
@given(
    heads=st.integers(1, 2),
    tokens=LENGTHS,
    keys=SIZES,
    values=st.sampled_from([4, 16, 24]),
    dtypes=DTYPES,
    cfg=configs(),
    carried=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(2, 65, 16, 24, (FP32, FP32), config(16, 16, 16), True, 0)
@example(1, 17, 16, 16, (FP16, FP16), config(32, 16, tma=True), True, 1)
@example(2, 65, 32, 24, (FP32, FP32), config(16, 16, 16, prepare=16), True, 0)
@example(2, 65, 16, 24, (FP32, FP32), config(16, 16, 32, lead=32), True, 0)
@example(1, 70, 16, 16, (FP16, FP16), config(32, 16, 32, tma=True, prepare=16), True, 1)
def test_is_exact_for_every_gate(
    heads: int,
    tokens: int,
    keys: int,
    values: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    cfg: ForwardConfig,
    carried: bool,
    seed: int,
) -> None:
    dtype, gate_dtype = dtypes
    x = make_inputs(1, tokens, heads, keys, values, dtype=dtype, seed=seed, initial_state=carried)
    x = replace(x, g=hard_gates(x.q.shape, seed=seed, dtype=gate_dtype))
    assume(legal(x, cfg))
    assert_right(x, cfg, fp32_budget=FP32_BUDGET)


@pytest.mark.parametrize("value", [0.0, -1e-30, -0.06, -3.0, -5.0, -50.0, -1e4, -math.inf])
@pytest.mark.parametrize("segment", [0, 32])
@PREPARE
def test_one_gate_value_everywhere(value: float, segment: int, prepare: int) -> None:
    x = make_inputs(1, 50, 1, 16, 16, dtype=FP32, initial_state=True)
    x = replace(x, g=torch.full(x.q.shape, value))
    assert_right(x, config(16, 16, segment, prepare=prepare))


@pytest.mark.parametrize("position", [0, 1, 15, 16, 31, 32, 49])
@pytest.mark.parametrize("gate_dtype", [FP32, FP16])
@PREPARE
def test_one_reset(position: int, gate_dtype: torch.dtype, prepare: int) -> None:
    dtype = gate_dtype
    x = make_inputs(1, 50, 1, 16, 16, dtype=dtype, initial_state=True)
    assert x.g is not None
    x.g[:, position] = -math.inf
    assert_right(x, config(32, 16, prepare=prepare))


@settings(max_examples=30)
@given(
    tokens=LENGTHS,
    heads=st.integers(1, 2),
    keys=SIZES,
    values=st.sampled_from([4, 16, 24]),
    dtypes=DTYPES,
    rank=st.sampled_from([8, 16]),
    cfg=configs(),
    bias=st.booleans(),
    normalizer=st.sampled_from([0.05, 1.0, 16.0]),
    clamp_min=st.sampled_from([None, -0.5, -1e-3, 0.0]),
    seed=st.integers(0, 2**16),
)
@example(70, 2, 16, 24, (FP16, FP32), 8, config(16, 16, 32), True, 0.05, None, 0)
@example(33, 2, 20, 16, (FP32, FP32), 16, config(), False, 16.0, -1e-3, 0)
@example(70, 2, 20, 24, (FP16, FP32), 8, config(32, 16, 32, lead=16), True, 0.05, None, 0)
@example(70, 2, 20, 24, (FP16, FP32), 8, config(16, 16, 32, prepare=16), True, 0.05, None, 0)
def test_low_rank_gate(
    tokens: int,
    heads: int,
    keys: int,
    values: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    rank: int,
    cfg: ForwardConfig,
    bias: bool,
    normalizer: float,
    clamp_min: float | None,
    seed: int,
) -> None:
    dtype, bias_dtype = dtypes
    x = make_inputs(
        1,
        tokens,
        heads,
        keys,
        values,
        dtype=dtype,
        gate="lowrank",
        rank=rank,
        seed=seed,
        initial_state=True,
    )
    assert x.bias is not None
    x = replace(x, bias=x.bias.to(bias_dtype) if bias else None)
    assume(legal(x, cfg))
    assert_right(x, cfg, normalizer=normalizer, clamp_min=clamp_min)


@pytest.mark.parametrize(("keys", "values"), [(12, 20), (20, 24), (24, 60), (60, 12)])
@pytest.mark.parametrize("gate", ["vector", "lowrank"])
@pytest.mark.parametrize("segment", [0, 32])
@PREPARE
def test_sizes_that_are_no_powers_of_two(
    keys: int, values: int, gate: str, segment: int, prepare: int
) -> None:
    x = make_inputs(
        2,
        45,
        2,
        keys,
        values,
        dtype=FP32,
        gate="vector" if gate == "vector" else "lowrank",
        initial_state=True,
    )
    assert_right(x, config(16, 16, segment, prepare=prepare))


@pytest.mark.parametrize("scale", [1.0, -0.3, 1e-4])
@PREPARE
def test_scale(scale: float, prepare: int) -> None:
    x = make_inputs(1, 40, 1, 16, 16, dtype=FP32, initial_state=True)
    assert_right(x, config(16, 16, 32, prepare=prepare), scale=scale)


@PREPARE
def test_low_rank_gate_keeps_slow_decays(prepare: int) -> None:
    """At z = 20, log2(1 + 2^-|z|) in fp32 is 0, and the decay of a long sequence with it."""
    x = make_inputs(1, 64, 1, 16, 16, dtype=FP32, gate="lowrank", rank=8, initial_state=True)
    x = replace(x, bias=torch.full((16,), 17.0))
    normalizer = 1e-6  # brings the decay back to where it shows
    wanted, _ = truth(x, normalizer=normalizer)
    still, _ = truth(replace(x, g=torch.zeros(x.q.shape)))
    assert float((wanted - still).norm() / wanted.norm()) > 1e-2
    got, _ = run(x, config(prepare=prepare), normalizer=normalizer)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-4


@PREPARE
def test_control_the_fast_loop_alone_is_wrong_for_hard_gates(
    prepare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the range test switched off the same inputs fail: these tests can see a missing one."""
    triton_language = importlib.import_module("triton.language")
    name = "gla_prepare" if prepare else "gla_fwd"
    kernel = importlib.import_module(f"glac.kernel_templates.{name}")
    x = make_inputs(1, 40, 1, 16, 16, dtype=FP32, initial_state=True)
    x = replace(x, g=hard_gates(x.q.shape))
    assert_right(x, config(prepare=prepare))
    monkeypatch.setattr(kernel, "START_RANGE_LOG2", triton_language.constexpr(1e30))
    o, _ = run(x, config(prepare=prepare))
    assert not bool(o.isfinite().all())
