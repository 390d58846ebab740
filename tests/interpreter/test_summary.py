"""What segments add, found from their borders as far as the gate lets anything through."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from glac.configs import BackwardConfig, ChunksBackwardConfig
from glac.testing import Inputs, hard_gates, make_inputs
from tests.helpers_gradients import ends_of
from tests.interpreter.running import (
    assert_gradients_right,
    assert_right,
    backward_config,
    chunks_config,
    config,
    run,
    run_gradients,
)

pytestmark = [
    pytest.mark.interpreter,
    # The fast kernels overflow wherever the exact ones have to take over.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

FP32 = torch.float32
SEGMENT = 96
FORWARD = {
    "gla_fwd": config(16, 16, SEGMENT, stops=True),
    "descriptors": config(16, 16, SEGMENT, summary_chunk=32, tma=True, stops=True),
    "gla_walk": config(16, 16, SEGMENT, prepare=16, stops=True),
}
AT_ONCE = chunks_config(16, segment=SEGMENT)
BACKWARD: dict[str, BackwardConfig | ChunksBackwardConfig] = {
    "gla_bwd": backward_config(16, segment=SEGMENT, stops=True),
    "at once": replace(AT_ONCE, states=replace(AT_ONCE.states, stops=True)),
}


def look(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Let summaries look so often whether anything is left to add."""
    constexpr = importlib.import_module("triton.language").constexpr
    for module, name, value in (
        ("_summary", "SPAN", tokens),
        ("gla_walk_states", "ROWS", tokens // 16),
    ):
        kernels = importlib.import_module(f"glac.kernel_templates.{module}")
        monkeypatch.setattr(kernels, name, constexpr(value))


def drawn(gate: float, *, lowrank: bool = False, tokens: int = 150) -> Inputs:
    """A sequence whose channels decay by about ``gate`` in each step."""
    if lowrank:
        x = make_inputs(1, tokens, 1, 16, 20, dtype=FP32, gate="lowrank", initial_state=True)
        assert x.bias is not None
        return replace(x, bias=torch.full_like(x.bias, 16 * gate))
    x = make_inputs(1, tokens, 1, 16, 20, dtype=FP32, initial_state=True)
    generator = torch.Generator().manual_seed(0)
    return replace(x, g=gate * (0.8 + 0.4 * torch.rand(x.q.shape, generator=generator)))


@pytest.mark.parametrize(
    ("name", "lowrank"),
    [("gla_fwd", False), ("gla_fwd", True), ("descriptors", False), ("gla_walk", True)],
)
def test_it_goes_no_further_than_needed(
    name: str, lowrank: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """160 powers of two are 44 tokens of -2.5: what lies before is not even read."""
    cfg, x = FORWARD[name], drawn(-2.5, lowrank=lowrank)
    look(monkeypatch, 32)
    assert_right(x, cfg)
    short = run(x, cfg)
    poisoned = x.v.clone()
    poisoned[:, :16] = torch.nan
    o, state = run(replace(x, v=poisoned), cfg)
    assert torch.equal(o[:, SEGMENT:], short[0][:, SEGMENT:])
    assert torch.equal(state, short[1])
    look(monkeypatch, 1024)
    for a, b in zip(short, run(x, cfg), strict=True):
        assert torch.equal(a, b)
    o, _ = run(replace(x, v=poisoned), cfg)
    assert bool(o[:, SEGMENT:].isnan().any())


@pytest.mark.parametrize(("which", "lowrank"), [("gla_bwd", True), ("at once", False)])
def test_gradients_neither(which: str, lowrank: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, x = BACKWARD[which], drawn(-2.5, lowrank=lowrank, tokens=200)
    look(monkeypatch, 32)
    short = assert_gradients_right(x, cfg, end=True, dh0=True).grads
    do, dht = ends_of(x)
    late = do.clone()
    late[:, 2 * SEGMENT - 16 : 2 * SEGMENT] = torch.nan
    found = run_gradients(x, cfg, late, dht).grads
    for name in ("dq", "dk", "dv"):
        assert torch.equal(found[name][:, :SEGMENT], short[name][:, :SEGMENT]), name
    look(monkeypatch, 1024)
    for name, gradient in run_gradients(x, cfg, do, dht).grads.items():
        assert torch.equal(gradient, short[name]), name
    if not lowrank:
        found = run_gradients(x, cfg, late, dht).grads
        assert bool(found["dk"][:, :SEGMENT].isnan().any())


@pytest.mark.parametrize("name", ["gla_fwd", "gla_walk"])
def test_hard_gates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    look(monkeypatch, 32)
    x = drawn(-1.0, tokens=110)
    assert_right(replace(x, g=hard_gates(x.q.shape)), FORWARD[name])


def test_gradients_of_hard_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    look(monkeypatch, 32)
    x = drawn(-1.0, tokens=110)
    x = replace(x, g=hard_gates(x.q.shape))
    assert_gradients_right(x, BACKWARD["gla_bwd"], end=True)


def test_one_channel_that_forgets_nothing_keeps_it_going(monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(-8.0)
    assert x.g is not None
    x.g[..., 3] = 0.0
    look(monkeypatch, 32)
    for name in ("descriptors", "gla_walk"):
        assert_right(x, FORWARD[name])
