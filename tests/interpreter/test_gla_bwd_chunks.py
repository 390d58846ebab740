"""Gradients of all chunks at once, and the walks before them, against gradients in fp64."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glac.configs import ChunksBackwardConfig, padded_k, padded_v
from glac.reference import relative_rms
from glac.testing import Inputs, hard_gates, make_inputs
from tests.helpers_gradients import ends_of
from tests.interpreter.running import (
    assert_gradients_right,
    chunks_config,
    problem_of,
    run_gradients,
)

pytestmark = [
    pytest.mark.interpreter,
    # The fast kernels overflow wherever the exact ones have to take over.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

FP32, FP16 = torch.float32, torch.float16
DTYPES = st.sampled_from([(FP32, FP32), (FP16, FP16), (FP16, FP32)])
SIZES = st.sampled_from([1, 5, 12, 16, 20, 32])
# Tiles, each at sizes that they divide and at sizes that they do not.
CONFIGS = {
    "one tile": (16, 16, chunks_config(16)),
    "two walked chunks": (16, 20, chunks_config(32)),
    "one walked chunk": (20, 16, chunks_config(32, walked=32)),
    "K tiles": (24, 16, chunks_config(32)),
    "V tiles": (12, 44, chunks_config(32, walk_v=32)),
    "wide tiles": (20, 40, chunks_config(64, 32, 32, walked=32)),
    "descriptors": (16, 40, chunks_config(32, tma=True)),
    "padded descriptors": (24, 36, chunks_config(32, 32, tma=True)),
    "pairs": (24, 36, chunks_config(16, tma=True, keep=2)),
    "pairs of two walked chunks": (20, 40, chunks_config(32, 32, 32, keep=2)),
}
EVERY_CONFIG = pytest.mark.parametrize("name", CONFIGS)


def drawn(keys: int, values: int, *, tokens: int = 70, heads: int = 1) -> Inputs:
    return make_inputs(1, tokens, heads, keys, values, dtype=FP32, initial_state=True)


@st.composite
def drawn_configs(draw: st.DrawFn) -> ChunksBackwardConfig:
    chunk, keep = draw(st.sampled_from([(16, 1), (32, 1), (64, 1), (16, 2), (32, 2)]))
    return chunks_config(
        chunk,
        draw(st.sampled_from([16, 32])),
        draw(st.sampled_from([16, 32])),
        walked=min(chunk, draw(st.sampled_from([16, 32]))),
        walk_v=draw(st.sampled_from([16, 32])),
        tma=draw(st.booleans()),
        keep=keep,
        segment=draw(st.sampled_from([0, 64])),
    )


def fitted(x: Inputs, cfg: ChunksBackwardConfig) -> ChunksBackwardConfig:
    """The legal config nearest to one that may not be, for this problem."""
    spec = problem_of(x).spec
    rows = (spec.K * spec.dtype.itemsize, spec.V * spec.dtype.itemsize)
    aligned = all(size % 16 == 0 for size in (*rows, spec.K * spec.gate_dtype.itemsize))
    return chunks_config(
        cfg.chunks.chunk,
        min(cfg.chunks.block_k, padded_k(spec)),
        min(cfg.chunks.block_v, padded_v(spec)),
        walked=cfg.walks.chunk,
        walk_v=min(cfg.walks.block_v, padded_v(spec)),
        tma=cfg.walks.tma and aligned,
        keep=cfg.chunks.keep,
        segment=cfg.segment,
    )


@EVERY_CONFIG
@pytest.mark.parametrize("tokens", [1, 70])
def test_tiles(name: str, tokens: int) -> None:
    keys, values, cfg = CONFIGS[name]
    assert assert_gradients_right(drawn(keys, values, tokens=tokens), cfg).redone == 0


@pytest.mark.parametrize(
    ("carried", "end", "dh0", "keep", "segment"),
    [
        (True, True, True, 1, 16),
        (True, False, False, 1, 0),
        (False, True, False, 1, 16),
        (False, False, True, 1, 0),
        (True, True, True, 2, 32),
        (False, True, False, 2, 0),
    ],
)
@pytest.mark.parametrize("hard", [False, True])
def test_states_at_both_ends(
    carried: bool, end: bool, dh0: bool, keep: int, segment: int, hard: bool
) -> None:
    """The state before the first token and the gradient of the one after the last."""
    x = drawn(16, 20, tokens=20 if keep == 1 else 40)
    if hard:
        x = replace(x, g=hard_gates(x.q.shape))
    if not carried:
        x = replace(x, initial_state=None)
    cfg = chunks_config(16, keep=keep, segment=segment)
    assert_gradients_right(x, cfg, end=end, dh0=dh0)


@settings(max_examples=4)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 70),
    heads=st.integers(1, 2),
    keys=SIZES,
    values=SIZES,
    dtypes=DTYPES,
    cfg=drawn_configs(),
    carried=st.booleans(),
    end=st.booleans(),
    scale=st.sampled_from([None, -0.3]),
    seed=st.integers(0, 2**16),
)
@example(2, 33, 1, 1, 1, (FP16, FP32), chunks_config(), False, False, None, 0)
def test_equal_those_in_fp64(
    batch: int,
    tokens: int,
    heads: int,
    keys: int,
    values: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    cfg: ChunksBackwardConfig,
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


@settings(max_examples=3)
@given(
    tokens=st.integers(1, 40),
    heads=st.integers(1, 2),
    keys=st.sampled_from([5, 16, 24]),
    values=st.sampled_from([4, 16, 24]),
    dtypes=DTYPES,
    cfg=drawn_configs(),
    carried=st.booleans(),
    end=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(40, 1, 24, 40, (FP32, FP32), chunks_config(32, 32, 32), True, True, 0)
@example(20, 1, 16, 24, (FP16, FP16), chunks_config(32, tma=True), True, False, 1)
@example(40, 1, 16, 24, (FP32, FP32), chunks_config(16, keep=2), True, True, 2)
def test_are_exact_for_every_gate(
    tokens: int,
    heads: int,
    keys: int,
    values: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    cfg: ChunksBackwardConfig,
    carried: bool,
    end: bool,
    seed: int,
) -> None:
    dtype, gate_dtype = dtypes
    x = make_inputs(1, tokens, heads, keys, values, dtype=dtype, seed=seed, initial_state=carried)
    x = replace(x, g=hard_gates(x.q.shape, seed=seed, dtype=gate_dtype))
    assert_gradients_right(x, fitted(x, cfg), seed=seed, end=end)


@pytest.mark.parametrize("value", [0.0, -1e-30, -0.06, -3.0, -5.0, -50.0, -1e4, -math.inf])
def test_one_gate_value_everywhere(value: float) -> None:
    x = drawn(16, 16, tokens=36)
    x = replace(x, g=torch.full(x.q.shape, value))
    found = assert_gradients_right(x, chunks_config(32))
    # A half of 16 tokens may decay by 2^80; the second chunk has but four tokens.
    limit = 80 / 16 * math.log(2)
    assert found.flags[0].tolist() == [int(value < -limit), int(value < -4 * limit)]


@pytest.mark.parametrize("position", [0, 1, 15, 16, 31, 32, 63, 66])
@pytest.mark.parametrize("gate_dtype", [FP32, FP16])
def test_one_reset(position: int, gate_dtype: torch.dtype) -> None:
    """It sends its chunk into the exact kernel, whatever the other channels of it say."""
    x = make_inputs(1, 70, 2, 16, 16, dtype=gate_dtype, initial_state=True)
    assert x.g is not None
    x.g[:, position, 1, 7] = -math.inf
    found = assert_gradients_right(x, chunks_config(32))
    wanted = [[0, 0, 0], [int(position // 32 == chunk) for chunk in range(3)]]
    assert found.flags[0].view(2, 3).tolist() == wanted


@pytest.mark.parametrize("position", [3, 20, 40, 69])
def test_one_reset_in_a_pair(position: int) -> None:
    """States are found again from what was prepared, so not from a part that left the range."""
    x = make_inputs(1, 70, 1, 16, 20, dtype=FP32, initial_state=True)
    assert x.g is not None
    x.g[:, position, 0, 7] = -math.inf
    found = assert_gradients_right(x, chunks_config(16, walked=16, keep=2))
    pair = position // 32
    assert found.flags[0].tolist() == [
        int(chunk // 2 == pair and 16 * chunk < 70) for chunk in range(6)
    ]


# --- low-rank gates ---------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2])
def test_low_rank_gate(keep: int) -> None:
    x = make_inputs(2, 40, 2, 20, 24, dtype=FP32, gate="lowrank", rank=8, initial_state=True)
    assert_gradients_right(x, chunks_config(16, keep=keep), normalizer=1.0)


# --- the ladder -------------------------------------------------------------------------------


@pytest.mark.parametrize("midpoint", [128.0, -1.0])
def test_all_levels_give_the_same(midpoint: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mild gates sent into the exact kernels: by midpoint anchors, then element by element."""
    keys, values, cfg = CONFIGS["two walked chunks"]
    x = make_inputs(1, 40, 1, keys, values, dtype=FP32, initial_state=True)
    do, dht = ends_of(x)
    fast = run_gradients(x, cfg, do, dht)
    assert fast.redone == 0
    constexpr = importlib.import_module("triton.language").constexpr
    for name, limit, value in (
        ("gla_prepare", "START_RANGE_LOG2", -1.0),
        ("gla_bwd_chunks", "START_RANGE_LOG2", -1.0),
        ("_bwd_exact", "MIDPOINT_RANGE_LOG2", midpoint),
        ("_exact", "MIDPOINT_RANGE_LOG2", midpoint),
    ):
        module = importlib.import_module(f"glac.kernel_templates.{name}")
        monkeypatch.setattr(module, limit, constexpr(value))
    exact = run_gradients(x, cfg, do, dht)
    assert bool((exact.flags[0] == 1).all())
    for name, got in exact.grads.items():
        assert relative_rms(got, fast.grads[name].double()) < 5e-6, name
