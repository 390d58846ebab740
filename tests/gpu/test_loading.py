"""Loading and launching on a real driver: remembered calls, preloading, forks, verification."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import glac
from glac import fast
from glac.attention import chunk_gla, chunk_gla_lowrank
from glac.problem import Op
from glac.testing import Inputs
from tests.gpu.conftest import Packed

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]


def call(x: Inputs, **options: Any) -> tuple[Tensor, Tensor | None]:
    options = {"initial_state": x.initial_state, "output_final_state": True, **options}
    if x.g is not None:
        return chunk_gla(x.q, x.k, x.v, x.g, **options)
    assert x.x is not None
    assert x.weight is not None
    return chunk_gla_lowrank(x.q, x.k, x.v, x.x, x.weight, x.bias, **options)


def leaves_of(x: Inputs) -> list[Tensor]:
    found = (x.q, x.k, x.v, x.g, x.x, x.weight, x.bias, x.initial_state)
    return [t for t in found if t is not None]


@pytest.mark.parametrize("gate", ["vector", "lowrank"])
@pytest.mark.parametrize("tokens", [64, 1000])
def test_remembered_calls_give_the_same_bits(packed: Packed, gate: str, tokens: int) -> None:
    x = packed.draw(2, tokens, 4, 64, 64, gate=gate, initial_state=True, backward=True)
    leaves = [t.requires_grad_() for t in leaves_of(x)]
    do = torch.randn_like(x.v)

    def run() -> list[Tensor]:
        o, state = call(x)
        assert state is not None
        grads = torch.autograd.grad([o, state], leaves, [do, torch.ones_like(state)])
        return [o.detach(), state.detach(), *grads]

    fast.bound.clear()
    wanted = run()
    assert any(isinstance(b, fast.Bound) for b in fast.bound.values())
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), wanted, strict=True))
    with torch.no_grad():
        o, state = call(x)
    assert torch.equal(o, wanted[0])
    assert state is not None
    assert torch.equal(state, wanted[1])


def test_everything_preloaded_is_there_in_a_capture(packed: Packed) -> None:
    """The first call of a shape may be inside a capture, where nothing can be loaded."""
    packed.draw(1, 64, 2, 64, 64)
    found = glac.preload()
    assert found
    before = glac.stats().loaded
    x = packed.draw(3, 77, 2, 64, 64)
    fast.bound.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            o, _ = call(x)
        graph.replay()
        torch.cuda.synchronize()
        wanted, _ = call(x)
    assert torch.equal(o, wanted)
    assert glac.stats().loaded == before
    assert glac.stats().compiled == 0


FORK = """
import os, sys, torch
from glac.attention import chunk_gla
from glac import fast
x = [torch.randn(1, 64, 2, 64, device="cuda").bfloat16() for _ in range(4)]
x[3] = -x[3].abs()
for _ in range(2):
    chunk_gla(*x)
torch.cuda.synchronize()
sys.stdout.flush()
if os.fork() == 0:
    for clear in (False, True):
        if clear:
            fast.bound.clear()
        try:
            chunk_gla(*x)
        except Exception as error:
            print(type(error).__name__, str(error).replace(chr(10), " "), flush=True)
        else:
            print("went on", flush=True)
    cpu = [t for t in (torch.ones(1, 4, 2, 8),) * 3] + [-torch.ones(1, 4, 2, 8)]
    print("cpu", float(chunk_gla(*cpu)[0].sum()) != 0, flush=True)
    os._exit(0)
_, status = os.wait()
chunk_gla(*x)
torch.cuda.synchronize()
print("parent", status, flush=True)
"""


def test_a_forked_child_gets_an_error_and_no_crash(packed: Packed) -> None:
    packed.draw(1, 64, 2, 64, 64)
    done = subprocess.run(
        [sys.executable, "-c", FORK], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second, cpu, parent = done.stdout.splitlines()
    assert "fork" in first.lower()
    assert "fork" in second.lower()
    assert cpu == "cpu True"
    assert parent == "parent 0"


def test_the_whole_pack_verifies_and_loads(packed: Packed) -> None:
    pack, _ = packed.rows(Op.FORWARD)[0]
    done = subprocess.run(
        [sys.executable, "-m", "glac", "pack", "verify", str(pack.path), "--device", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (data,) = json.loads(done.stdout)["data"]["packs"]
    assert data["kernels"] == len(pack.kernels)
    assert data["load_ms"] < 2000
