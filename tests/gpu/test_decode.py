"""Decoding on the GPU: kernels from packs through the public operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glac import decode
from glac.attention import recurrent_gla, recurrent_gla_lowrank
from glac.decode import DecodeInputs, Gated, Want
from glac.gate import LOG2E, STEP_MIN
from glac.problem import Op
from glac.testing import hard_gates
from tests.gpu.conftest import Packed

pytestmark = pytest.mark.gpu

BF16, FP32 = torch.bfloat16, torch.float32
GATES = ["vector", "token", "head", "none", "lowrank"]


def drawn(
    packed: Packed, N: int, T: int, heads: tuple[int, int, int], D: int, gate: str, **options: Any
) -> DecodeInputs:
    """Inputs with a pool of states twice as large as needed; sequence 1 is inactive."""
    device, seed = packed.device, options.get("seed", 0)
    generator = torch.Generator(device=device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    Hq, Hk, Hs = heads
    gated = Gated()
    if gate == "lowrank":
        weight = (randn(Hs * D, 16) / 4).to(BF16)
        gated = Gated(None, randn(N, T, 16).to(BF16), weight, randn(Hs * D).to(BF16))
    elif gate != "none":
        shape = {"vector": (N, T, Hs, D), "token": (N, T, Hs), "head": (Hs,)}[gate]
        g = torch.nn.functional.logsigmoid(randn(*shape)) / 16
        if options.get("hard") and gate == "vector":
            g = hard_gates(shape, seed=seed, device=device)
        gated = Gated(g.to(BF16) if gate == "vector" else g)
    pool = randn(2 * N, Hs, D, D).to(options.get("state_dtype", FP32))
    slots = torch.randperm(2 * N, generator=generator, device=device)[:N]
    if N > 1:
        slots[1] = -1
    q, k, v = (randn(N, T, h, D).to(BF16) for h in (Hq, Hk, Hs))
    i = DecodeInputs(q, k, v, gated, pool, slots.to(options.get("index_dtype", torch.int32)))
    packed.need(decode._check(i, Want())[0], Op.DECODE)
    return i


def call(i: DecodeInputs, **options: Any) -> tuple[Tensor, Tensor | None]:
    g, x, weight, bias = i.gate
    options = {"initial_state": i.state, "state_indices": i.indices, **options}
    if x is not None:
        assert weight is not None
        return recurrent_gla_lowrank(i.q, i.k, i.v, x, weight, bias, **options)
    return recurrent_gla(i.q, i.k, i.v, g, **options)


def truth(i: DecodeInputs, want: Want) -> tuple[Tensor, Tensor | None]:
    _, groups = decode._check(i, want)
    wide = [None if t is None else t.double() for t in (i.q, i.k, i.v, *i.gate)]
    q, k, v = wide[:3]
    assert q is not None
    assert k is not None
    assert v is not None
    state = None if i.state is None else i.state.clone()
    numbers: tuple[float, ...] = (float(i.q.shape[3]) ** -0.5,)
    if i.gate.x is not None:
        numbers += (1 / 16, STEP_MIN * LOG2E)
    again = DecodeInputs(q, k, v, Gated(*wide[3:]), state, i.indices, i.cu_seqlens)
    return decode.run_torch(groups, again, want, numbers)


def close(got: Tensor | None, wanted: Tensor | None, budget: float) -> None:
    assert got is not None
    assert wanted is not None
    assert bool(got.isfinite().all())
    error = float((got.double() - wanted.double()).norm() / wanted.double().norm())
    assert error <= budget, f"error {error:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4, 4), (8, 2, 4), (2, 4, 4)], ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
def test_in_place(
    packed: Packed, D: int, heads: tuple[int, int, int], gate: str, state_dtype: torch.dtype
) -> None:
    for T, index_dtype in ((1, torch.int32), (3, torch.int64)):
        i = drawn(packed, 5, T, heads, D, gate, state_dtype=state_dtype, index_dtype=index_dtype)
        assert i.state is not None
        assert i.indices is not None
        wanted, pool = truth(i, Want(True, dtype=state_dtype))
        before = i.state.clone()
        o, state = call(i, inplace=True)
        assert state is i.state
        close(o, wanted, 3e-3)
        assert not bool(o[1].any())
        close(state, pool, 1e-6 if state_dtype == FP32 else 3e-3)
        idle = ~torch.isin(torch.arange(10, device=packed.device), i.indices.long())
        assert torch.equal(state[idle], before[idle])


@pytest.mark.parametrize("gate", GATES)
def test_new_states(packed: Packed, gate: str) -> None:
    i = drawn(packed, 4, 3, (4, 4, 4), 128, gate)
    wanted, end = truth(i, Want(final=True))
    o, state = call(i, output_final_state=True)
    close(o, wanted, 3e-3)
    close(state, end, 1e-6)
    _, every = truth(i, Want(every=True))
    _, states = call(i, output_states=True)
    close(states, every, 1e-6)
    assert states is not None
    assert state is not None
    assert torch.equal(states[:, -1], state)


def test_hard_gates(packed: Packed) -> None:
    for seed in range(20):
        i = drawn(packed, 4, 8, (4, 4, 4), 128, "vector", hard=True, seed=seed)
        wanted, end = truth(i, Want(final=True))
        o, state = call(i, output_final_state=True)
        close(o, wanted, 3e-3)
        close(state, end, 1e-6)


def test_slots_outside_the_pool_touch_nothing(packed: Packed) -> None:
    i = drawn(packed, 4, 1, (4, 4, 4), 128, "token")
    assert i.indices is not None
    assert i.state is not None
    i.indices.copy_(torch.tensor([-7, 8, 2**31 - 1, -(2**31)]))
    before = i.state.clone()
    o, _ = call(i, inplace=True)
    assert torch.equal(i.state, before)
    assert not bool(o.any())


def test_captured_in_a_graph(packed: Packed) -> None:
    i = drawn(packed, 4, 1, (4, 4, 4), 128, "vector")
    assert i.state is not None
    start = i.state.clone()
    for _ in range(2):
        call(i, inplace=True)
    cuda: Any = torch.cuda
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        o, _ = call(i, inplace=True)
    i.state.copy_(start)
    outputs = []
    for _ in range(3):
        graph.replay()
        outputs.append(o.clone())
    replayed = i.state.clone()
    i.state.copy_(start)
    for out in outputs:
        assert torch.equal(call(i, inplace=True)[0], out)
    assert torch.equal(i.state, replayed)


def test_layouts_that_have_to_be_copied(packed: Packed) -> None:
    i = drawn(packed, 4, 2, (4, 4, 4), 128, "vector")
    o, _ = call(i)
    odd = torch.empty(4, 2, 4, 132, dtype=BF16, device=packed.device)[..., 1:129]
    odd.copy_(i.q)
    moved = DecodeInputs(odd, i.k, i.v, i.gate, i.state, i.indices)
    for _ in range(2):
        assert torch.equal(call(moved)[0], o)
