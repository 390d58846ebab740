"""The backward kernels against gradients in fp64, in Triton's interpreter."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glac.backward import windows
from glac.configs import BackwardConfig
from glac.problem import DType, Gate, Problem, Specialisation
from glac.reference import relative_rms
from glac.testing import Inputs, hard_gates, make_inputs
from tests.helpers_gradients import ends_of
from tests.interpreter.running import (
    assert_gradients_right,
    backward_config,
    backward_configs,
    fitted,
    run_gradients,
    windows_of,
)

pytestmark = [
    pytest.mark.interpreter,
    # The fast kernel overflows wherever the exact one has to take over.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

FP32, FP16 = torch.float32, torch.float16
DTYPES = st.sampled_from([(FP32, FP32), (FP16, FP16), (FP16, FP32)])
SIZES = st.sampled_from([1, 5, 8, 12, 16, 20, 24, 32])
LENGTHS = st.integers(1, 70)
# Tiles and kernels, each at sizes that they divide and at sizes that they do not.
CONFIGS = {
    "one tile": (16, 16, backward_config()),
    "descriptors": (16, 20, backward_config(32, states_chunk=16, tma=True)),
    "dv apart": (16, 16, backward_config(16, dv_chunk=32)),
    "K tiles": (24, 16, backward_config(16, 16, dv_chunk=16)),
    "V tiles": (12, 28, backward_config(32, 16, 16, states_chunk=16)),
    "K and V tiles": (24, 24, backward_config(16, 16, 16, dv_chunk=32)),
    "wide tiles": (20, 20, backward_config(16, 32, 32)),
    "wide descriptors": (24, 36, backward_config(32, 16, 32, dv_chunk=16, tma=True)),
    "states between": (24, 20, backward_config(16, 16, 16, dv_chunk=16, keep=2)),
    "states between by descriptors": (16, 24, backward_config(16, tma=True, keep=4)),
}
EVERY_CONFIG = pytest.mark.parametrize("name", CONFIGS)


LEADING = backward_config(16, lead=32, segment=32)
"""Whose programs walk to their segments, from both ends."""


def drawn(keys: int, values: int, *, tokens: int = 35, heads: int = 1) -> Inputs:
    return make_inputs(1, tokens, heads, keys, values, dtype=FP32, initial_state=True)


# --- mild gates -------------------------------------------------------------------------------


@EVERY_CONFIG
@pytest.mark.parametrize("tokens", [1, 17, 35])
def test_tiles(name: str, tokens: int) -> None:
    keys, values, cfg = CONFIGS[name]
    assert assert_gradients_right(drawn(keys, values, tokens=tokens), cfg).redone == 0


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 31, 32, 33, 70])
def test_lengths(tokens: int) -> None:
    x = drawn(12, 16, tokens=tokens, heads=2)
    assert_gradients_right(x, backward_config(32, states_chunk=16))


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("dh0", [False, True])
@pytest.mark.parametrize("chunks", [1, 2])
def test_states_at_both_ends(carried: bool, end: bool, dh0: bool, chunks: int) -> None:
    """The state before the first token and the gradient of the one after the last."""
    x = drawn(16, 20, tokens=20)
    if not carried:
        x = replace(x, initial_state=None)
    with windows_of(chunks):
        assert_gradients_right(x, backward_config(dv_chunk=16), end=end, dh0=dh0)


@EVERY_CONFIG
def test_windows(name: str) -> None:
    keys, values, cfg = CONFIGS[name]
    with windows_of(1):
        found = assert_gradients_right(drawn(keys, values, tokens=2 * cfg.chunk_step + 3), cfg)
    assert len(found.flags) == 3


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_windows_of_several_chunks(chunks: int) -> None:
    """Windows are whole chunks of every kernel, of 16 and of 32 tokens here."""
    with windows_of(chunks):
        found = assert_gradients_right(drawn(16, 20, tokens=70), backward_config(dv_chunk=32))
    assert len(found.flags) == math.ceil(70 / 32 / chunks)


@given(
    batch=st.integers(1, 2**10),
    tokens=st.integers(1, 2**21),
    heads=st.integers(1, 2**7),
    keys=st.integers(1, 256),
    values=st.integers(1, 512),
    chunk=st.sampled_from([16, 32]),
    dv_chunk=st.sampled_from([0, 16, 32]),
)
def test_windows_fill_the_sequence(
    batch: int, tokens: int, heads: int, keys: int, values: int, chunk: int, dv_chunk: int
) -> None:
    spec = Specialisation(keys, values, DType.BF16, Gate.VECTOR, DType.BF16)
    config = backward_config(chunk, dv_chunk=dv_chunk)
    count, length = windows(Problem(spec, batch, tokens, heads), config)
    assert length % chunk == length % max(1, dv_chunk) == 0
    assert (count - 1) * length < tokens <= count * length


@settings(max_examples=10)
@given(
    batch=st.integers(1, 2),
    tokens=LENGTHS,
    heads=st.integers(1, 2),
    keys=SIZES,
    values=SIZES,
    dtypes=DTYPES,
    cfg=backward_configs(),
    carried=st.booleans(),
    end=st.booleans(),
    scale=st.sampled_from([None, -0.3]),
    seed=st.integers(0, 2**16),
)
@example(
    2, 70, 2, 32, 32, (FP32, FP32), backward_config(32, 32, 16, tma=True), True, True, None, 0
)
@example(2, 33, 1, 1, 1, (FP16, FP32), backward_config(), False, False, None, 0)
@example(1, 70, 2, 16, 24, (FP32, FP32), LEADING, True, True, None, 0)
def test_equal_those_in_fp64(
    batch: int,
    tokens: int,
    heads: int,
    keys: int,
    values: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    cfg: BackwardConfig,
    carried: bool,
    end: bool,
    scale: float | None,
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
    found = assert_gradients_right(x, fitted(x, cfg), seed=seed, end=end, scale=scale)
    assert found.grads["dg"].dtype == gate_dtype
    assert found.redone == 0


# --- every gate -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("carried", "end", "dh0"), [(True, False, False), (False, True, False), (False, False, True)]
)
def test_hard_gates_and_states_at_both_ends(carried: bool, end: bool, dh0: bool) -> None:
    x = drawn(16, 20, tokens=20)
    h0 = x.initial_state if carried else None
    x = replace(x, g=hard_gates(x.q.shape), initial_state=h0)
    with windows_of(1):
        found = assert_gradients_right(x, backward_config(dv_chunk=16), end=end, dh0=dh0)
    assert all(bool(flags.any()) for flags in found.flags)


@settings(max_examples=5)
@given(
    tokens=st.integers(1, 36),
    heads=st.integers(1, 2),
    keys=st.sampled_from([5, 12, 16, 24]),
    values=st.sampled_from([4, 16, 24]),
    dtypes=DTYPES,
    cfg=backward_configs(),
    carried=st.booleans(),
    end=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(36, 1, 24, 16, (FP32, FP32), backward_config(dv_chunk=16), True, True, 0)
@example(70, 1, 16, 24, (FP32, FP32), LEADING, True, True, 0)
@example(17, 1, 16, 24, (FP16, FP16), backward_config(32, tma=True), True, False, 1)
def test_are_exact_for_every_gate(
    tokens: int,
    heads: int,
    keys: int,
    values: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    cfg: BackwardConfig,
    carried: bool,
    end: bool,
    seed: int,
) -> None:
    dtype, gate_dtype = dtypes
    x = make_inputs(1, tokens, heads, keys, values, dtype=dtype, seed=seed, initial_state=carried)
    x = replace(x, g=hard_gates(x.q.shape, seed=seed, dtype=gate_dtype))
    assert_gradients_right(x, fitted(x, cfg), seed=seed, end=end)


@EVERY_CONFIG
def test_hard_gates_in_windows(name: str) -> None:
    """Only windows with hard gates leave the fast kernel, and the others take over from them."""
    keys, values, cfg = CONFIGS[name]
    chunk = cfg.chunk_step
    x = drawn(keys, values, tokens=2 * chunk + 3)
    assert x.g is not None
    middle = x.g[:, chunk : 2 * chunk]
    middle.copy_(hard_gates(middle.shape, seed=1))
    with windows_of(1):
        last, hard, first = assert_gradients_right(x, cfg).flags
    assert bool((hard == 1).all())
    assert not bool((last | first).any())


@pytest.mark.parametrize("value", [0.0, -1e-30, -0.06, -3.0, -5.0, -50.0, -1e4, -math.inf])
def test_one_gate_value_everywhere(value: float) -> None:
    x = drawn(16, 16, tokens=36)
    x = replace(x, g=torch.full(x.q.shape, value))
    found = assert_gradients_right(x, backward_config(dv_chunk=16))
    assert found.redone == int(value < -3.5)  # 80 / 16 tokens * log(2)


@pytest.mark.parametrize("position", [0, 1, 15, 16, 31, 32, 49])
@pytest.mark.parametrize("gate_dtype", [FP32, FP16])
def test_one_reset(position: int, gate_dtype: torch.dtype) -> None:
    x = make_inputs(1, 50, 2, 16, 16, dtype=gate_dtype, initial_state=True)
    assert x.g is not None
    x.g[:, position, 1] = -math.inf
    found = assert_gradients_right(x, backward_config(32, dv_chunk=32))
    assert found.flags[0].tolist() == [0, 1]  # only the head that has it


def test_programs_of_one_head_part_ways() -> None:
    """A reset in one channel sends its K tile into the exact kernel, the other stays."""
    x = drawn(32, 16)
    assert x.g is not None
    x.g[:, 20, :, 5] = -math.inf
    found = assert_gradients_right(x, backward_config(16, 16, dv_chunk=16))
    assert found.flags[0].tolist() == [1, 0]


# --- low-rank gates ---------------------------------------------------------------------------


@settings(max_examples=6)
@given(
    batch=st.integers(1, 2),
    tokens=LENGTHS,
    heads=st.integers(1, 2),
    keys=SIZES,
    values=st.sampled_from([4, 16, 24]),
    dtypes=DTYPES,
    rank=st.sampled_from([8, 16]),
    cfg=backward_configs(),
    bias=st.booleans(),
    normalizer=st.sampled_from([0.05, 1.0, 16.0]),
    clamp_min=st.sampled_from([None, -0.5, -1e-3, 0.0]),
    seed=st.integers(0, 2**16),
)
@example(1, 20, 2, 16, 24, (FP16, FP32), 8, backward_config(), True, 0.05, None, 0)
@example(2, 33, 2, 20, 16, (FP32, FP32), 16, backward_config(block_k=32), False, 16.0, -1e-3, 0)
@example(1, 70, 2, 16, 24, (FP32, FP32), 16, LEADING, True, 16.0, None, 0)
def test_low_rank_gate(
    batch: int,
    tokens: int,
    heads: int,
    keys: int,
    values: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    rank: int,
    cfg: BackwardConfig,
    bias: bool,
    normalizer: float,
    clamp_min: float | None,
    seed: int,
) -> None:
    dtype, bias_dtype = dtypes
    x = make_inputs(
        batch,
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
    assert_gradients_right(
        x, fitted(x, cfg), seed=seed, normalizer=normalizer, clamp_min=clamp_min
    )


@pytest.mark.parametrize("name", ["V tiles", "dv apart"])
def test_low_rank_tiles_and_windows(name: str) -> None:
    keys, values, cfg = CONFIGS[name]
    tokens = cfg.grads.chunk + 2
    x = make_inputs(1, tokens, 1, keys, values, dtype=FP32, gate="lowrank", initial_state=True)
    with windows_of(1):
        assert assert_gradients_right(x, cfg).redone == 0


def test_low_rank_gates_that_decay_fast() -> None:
    keys, values, cfg = CONFIGS["V tiles"]
    x = make_inputs(1, 20, 1, keys, values, dtype=FP32, gate="lowrank", initial_state=True)
    found = assert_gradients_right(x, cfg, normalizer=0.1)
    assert all(bool((flags == 1).all()) for flags in found.flags)


def test_a_clamped_gate_has_no_gradient() -> None:
    x = make_inputs(1, 20, 1, 16, 16, dtype=FP32, gate="lowrank", initial_state=True)
    found = assert_gradients_right(x, backward_config(), clamp_min=-1e-9)
    for name in ("dx", "dweight", "dbias"):
        assert bool((found.grads[name] == 0).all()), name


# --- the ladder -------------------------------------------------------------------------------


def out_of_range(monkeypatch: pytest.MonkeyPatch, start: float, midpoint: float) -> None:
    """Limits of the start anchor in every kernel, and of the midpoint anchor."""
    constexpr = importlib.import_module("triton.language").constexpr
    folder = "glac.kernel_templates"
    for kernel in ("gla_bwd", "gla_bwd_dv"):
        module = importlib.import_module(f"{folder}.{kernel}")
        monkeypatch.setattr(module, "START_RANGE_LOG2", constexpr(start))
    for kernel in ("_bwd_exact", "_exact"):
        module = importlib.import_module(f"{folder}.{kernel}")
        monkeypatch.setattr(module, "MIDPOINT_RANGE_LOG2", constexpr(midpoint))


@pytest.mark.parametrize(
    "name", ["one tile", "descriptors", "K and V tiles", "dv apart", "K tiles"]
)
def test_all_levels_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mild gates sent into the exact kernel: by midpoint anchors, then element by element."""
    keys, values, cfg = CONFIGS[name]
    x = make_inputs(1, cfg.grads.chunk + 1, 1, keys, values, dtype=FP32, initial_state=True)
    do, dht = ends_of(x)
    fast = run_gradients(x, cfg, do, dht)
    assert fast.redone == 0
    for midpoint in (128.0, -1.0):
        out_of_range(monkeypatch, -1.0, midpoint)
        exact = run_gradients(x, cfg, do, dht)
        assert all(bool((flags == 1).all()) for flags in exact.flags)
        for kind, grad in fast.grads.items():
            difference = relative_rms(exact.grads[kind], grad)
            assert difference <= 2e-6, f"{kind}, midpoint {midpoint}: {difference:.2e}"
        assert not torch.equal(exact.grads["dq"], fast.grads["dq"])


def test_control_the_fast_kernels_alone_are_wrong_for_hard_gates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the range tests switched off the same inputs fail: these tests would see it."""
    x = drawn(16, 16)
    x = replace(x, g=hard_gates(x.q.shape))
    cfg = backward_config(dv_chunk=16)
    assert assert_gradients_right(x, cfg).redone == 1
    out_of_range(monkeypatch, 1e30, 128.0)
    found = run_gradients(x, cfg, *ends_of(x))
    assert found.redone == 0
    for name in ("dq", "dk", "dv", "dg"):
        assert not bool(found.grads[name].isfinite().all()), name
