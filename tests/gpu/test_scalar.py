"""Scalar gates on the GPU: kernels from packs through the public operations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from glac import scalar, scalar_segments
from glac.attention import chunk_linear_attn, chunk_retention, chunk_simple_gla
from glac.problem import Op
from glac.reference import yardstick_scalar_gla, yardstick_scalar_gla_backward
from glac.scalar import ScalarInputs
from glac.testing import hard_gates
from tests.gpu.conftest import Packed
from tests.gpu.rows import TF32_CEILING

pytestmark = pytest.mark.gpu

BF16, FP32 = torch.bfloat16, torch.float32
CEILING = {"o": 4e-3, "state": 4e-3, "dq": 4e-3, "dk": 4e-3, "dv": 4e-3, "dg": 5e-3, "dh0": 4e-3}


def drawn(
    packed: Packed,
    B: int,
    T: int,
    heads: tuple[int, int, int],
    D: int,
    gate: str = "token",
    *,
    hard: bool = False,
    lengths: list[int] | None = None,
    seed: int = 0,
    gate_scale: float = 16.0,
    dtype: torch.dtype = BF16,
    precision: str = "ieee",
) -> ScalarInputs:
    device = packed.device
    generator = torch.Generator(device=device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    cu = None
    if lengths is not None:
        B, T = 1, sum(lengths)
        cu = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    Hq, Hk, Hs = heads
    g = None
    if gate != "none":
        shape = (Hs,) if gate == "head" else (B, T, Hs)
        g = torch.nn.functional.logsigmoid(randn(*shape)) / gate_scale
        if hard:
            g = hard_gates((B, T, Hs, 1), seed=seed, device=device)[..., 0]
    q, k, v = (randn(B, T, h, D).to(dtype) for h in (Hq, Hk, Hs))
    N = B if lengths is None else len(lengths)
    i = ScalarInputs(q, k, v, g, randn(N, Hs, D, D), cu)
    problem = scalar.bucketed(scalar.check(i, precision).problem, i)
    packed.need(problem, Op.SCALAR_FORWARD)
    packed.need(problem, Op.SCALAR_BACKWARD)
    return i


def call(i: ScalarInputs, **options: Any) -> tuple[Tensor, Tensor | None]:
    options = {"initial_state": i.initial_state, "cu_seqlens": i.cu_seqlens, **options}
    if i.g is None:
        return chunk_linear_attn(i.q, i.k, i.v, **options)
    if i.g.dim() == 1:
        return chunk_retention(i.q, i.k, i.v, g=i.g, **options)
    return chunk_simple_gla(i.q, i.k, i.v, i.g, **options)


def everything(i: ScalarInputs, do: Tensor, dht: Tensor, **options: Any) -> dict[str, Tensor]:
    """Results and gradients through the public operation."""
    named = {"dq": i.q, "dk": i.k, "dv": i.v, "dg": i.g, "dh0": i.initial_state}
    leaves = {n: t.detach().requires_grad_() for n, t in named.items() if t is not None}
    again = ScalarInputs(
        leaves["dq"], leaves["dk"], leaves["dv"], leaves.get("dg"), leaves["dh0"], i.cu_seqlens
    )
    o, state = call(again, output_final_state=True, **options)
    assert state is not None
    grads = torch.autograd.grad((o, state), list(leaves.values()), (do, dht))
    return {"o": o.detach(), "state": state.detach(), **dict(zip(leaves, grads, strict=True))}


def ends_of(i: ScalarInputs, seed: int = 1) -> tuple[Tensor, Tensor]:
    problem = scalar.check(i)
    generator = torch.Generator(device=i.q.device).manual_seed(seed)
    size = (*i.q.shape[:2], problem.problem.H, i.v.shape[3])
    do = torch.randn(size, generator=generator, device=i.q.device).to(i.q.dtype)
    assert i.initial_state is not None
    return do, torch.randn(i.initial_state.shape, generator=generator, device=i.q.device)


def truth(i: ScalarInputs, do: Tensor, dht: Tensor) -> dict[str, Tensor]:
    problem = scalar.check(i)
    scale = float(i.q.shape[3]) ** -0.5
    wide = ScalarInputs(
        i.q.double(),
        i.k.double(),
        i.v.double(),
        None if i.g is None else i.g.double(),
        None if i.initial_state is None else i.initial_state.double(),
        i.cu_seqlens,
    )
    o, state = scalar.torch_forward(problem, wide, scale, True, 64)
    assert state is not None
    grads = scalar.torch_backward(
        problem, wide, scale, do.double(), dht.double(), 64, want_dg=True, want_dh0=True
    )
    named = dict(zip(("dq", "dk", "dv", "dg", "dh0"), grads, strict=True))
    if i.g is None:
        del named["dg"]
    elif i.g.dim() == 1:
        assert named["dg"] is not None
        named["dg"] = named["dg"].sum((0, 1))
    return {"o": o, "state": state, **{n: t for n, t in named.items() if t is not None}}


def error(got: Tensor, wanted: Tensor) -> float:
    assert bool(got.isfinite().all())
    return float((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-3))


def rounded(i: ScalarInputs, do: Tensor, dht: Tensor) -> dict[str, Tensor]:
    """Gradients by the same arithmetic in PyTorch, where each head has tensors of its own."""
    if i.q.shape != i.k.shape or i.q.shape[2] != i.v.shape[2] or i.cu_seqlens is not None:
        return {}
    g = i.v.new_zeros(i.v.shape[:3], dtype=FP32) if i.g is None else i.g.expand(i.v.shape[:3])
    grads = yardstick_scalar_gla_backward(
        i.q, i.k, i.v, g, do, initial_state=i.initial_state, dht=dht
    )
    dg = grads.dg.sum((0, 1)) if i.g is not None and i.g.dim() == 1 else grads.dg
    return {"dq": grads.dq, "dk": grads.dk, "dv": grads.dv, "dg": dg}


def check(i: ScalarInputs) -> None:
    """Errors stay below the ceiling, or, where few numbers decide, twice the yardstick's."""
    do, dht = ends_of(i)
    found, true = everything(i, do, dht), truth(i, do, dht)
    assert set(found) == set(true)
    tokens = i.q.shape[:2].numel() * i.v.shape[2]
    luck = 1 + 4 / math.sqrt(tokens) if tokens < 512 else 1.0
    near: dict[str, Tensor] | None = None
    for name, value in found.items():
        wrong, budget = error(value, true[name]), CEILING[name] * luck
        if wrong > budget:
            near = rounded(i, do, dht) if near is None else near
            if name in near:
                budget = max(budget, 2 * error(near[name], true[name]))
        assert wrong <= budget, f"{name}: error {wrong:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("gate", ["token", "head", "none"])
@pytest.mark.parametrize("T", [1, 63, 64, 65, 1000])
def test_error_against_fp64(packed: Packed, D: int, gate: str, T: int) -> None:
    check(drawn(packed, 2, T, (4, 4, 4), D, gate))


@pytest.mark.parametrize("gate", ["token", "none"])
@pytest.mark.parametrize("T", [64, 300, 1030])
def test_fp32_inputs_in_tf32(packed: Packed, gate: str, T: int) -> None:
    """Everything less exact than by the usual products, and within the ceiling."""
    for hard in (False, True) if gate == "token" else (False,):
        i, same = (
            drawn(packed, 2, T, (4, 4, 4), 64, gate, hard=hard, dtype=FP32, precision=p)
            for p in ("ieee", "tf32")
        )
        assert torch.equal(i.q, same.q)
        do, dht = ends_of(i)
        true = truth(i, do, dht)
        usual, once = (everything(i, do, dht, precision=p) for p in ("ieee", "tf32"))
        for name, wanted in true.items():
            errors = error(usual[name], wanted), error(once[name], wanted)
            assert errors[0] <= 1e-5, f"{name}: {errors}"
            assert errors[0] < errors[1] <= TF32_CEILING, f"{name}: {errors}"


@pytest.mark.parametrize("heads", [(8, 4, 4), (8, 2, 4), (2, 4, 4), (4, 1, 4)], ids=str)
def test_head_groups(packed: Packed, heads: tuple[int, int, int]) -> None:
    check(drawn(packed, 2, 200, heads, 128))


@pytest.mark.parametrize("gate_scale", [0.03, 1.0, 1e4])
def test_gates_of_every_size(packed: Packed, gate_scale: float) -> None:
    check(drawn(packed, 2, 500, (4, 4, 4), 128, gate_scale=gate_scale))


def test_hard_gates(packed: Packed) -> None:
    for seed in range(20):
        check(drawn(packed, 1, 300, (4, 4, 4), 128, hard=True, seed=seed))


@pytest.mark.parametrize("lengths", [[5, 0, 700, 64, 1, 130], [0, 64], [1] * 40], ids=str)
def test_packed_sequences(packed: Packed, lengths: list[int]) -> None:
    i = drawn(packed, 1, 1, (8, 2, 4), 128, lengths=lengths)
    check(i)
    do, dht = ends_of(i)
    together = everything(i, do, dht)
    first = 0
    assert i.g is not None
    assert i.initial_state is not None
    for n, length in enumerate(lengths):
        part = slice(first, first + length)
        first += length
        if not length:
            assert torch.equal(together["state"][n], i.initial_state[n])
            continue
        one = ScalarInputs(
            i.q[:, part], i.k[:, part], i.v[:, part], i.g[:, part], i.initial_state[n : n + 1]
        )
        alone = everything(one, do[:, part], dht[n : n + 1])
        for name, value in alone.items():
            whole = together[name]
            piece = whole[n : n + 1] if name in ("state", "dh0") else whole[:, part]
            assert torch.equal(value, piece), name


def test_no_worse_than_twice_the_yardstick(packed: Packed) -> None:
    i = drawn(packed, 4, 2048, (8, 8, 8), 128)
    do, dht = ends_of(i)
    found, true = everything(i, do, dht), truth(i, do, dht)
    assert i.g is not None
    o, _ = yardstick_scalar_gla(i.q, i.k, i.v, i.g, initial_state=i.initial_state)
    grads = yardstick_scalar_gla_backward(
        i.q, i.k, i.v, i.g, do, initial_state=i.initial_state, dht=dht
    )
    near = dict(zip(("o", "dq", "dk", "dv", "dg"), (o, *grads[:4]), strict=True))
    for name, value in near.items():
        assert error(found[name], true[name]) <= 2 * error(value, true[name]), name


def test_repeats_have_the_same_bits(packed: Packed) -> None:
    i = drawn(packed, 4, 500, (8, 8, 8), 128)
    do, dht = ends_of(i)
    first = everything(i, do, dht)
    for _ in range(50):
        again = everything(i, do, dht)
        for name, value in first.items():
            assert torch.equal(again[name], value), name


@pytest.mark.parametrize(
    ("B", "T", "heads", "gate", "lengths"),
    [
        (1, 16384, (1, 1, 1), "token", None),
        (2, 9000, (2, 2, 2), "token", None),
        (1, 8192, (4, 1, 2), "head", None),
        (1, 5000, (2, 2, 2), "none", None),
        (1, 0, (1, 1, 1), "token", [9000, 0, 31, 2100]),
    ],
    ids=str,
)
def test_in_segments(
    packed: Packed,
    B: int,
    T: int,
    heads: tuple[int, int, int],
    gate: str,
    lengths: list[int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    i = drawn(packed, B, T, heads, 128, gate, lengths=lengths)
    cut: list[int] = []
    segments = scalar_segments.segments

    def watched(*args: Any) -> Any:
        cut.append(args[4])
        return segments(*args)

    monkeypatch.setattr(scalar_segments, "segments", watched)
    check(i)
    assert len(cut) == 2, "forward and backward were to be cut"
    # In a graph too: nothing waits for the device.
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        wanted, _ = call(i)
        with torch.cuda.graph(graph):
            o, _ = call(i)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(o, wanted)


@pytest.mark.parametrize("hard", [False, True])
def test_in_segments_with_other_gates(packed: Packed, hard: bool) -> None:
    check(drawn(packed, 1, 6000, (2, 2, 2), 64, hard=hard, gate_scale=1.0))


@pytest.mark.parametrize("D", [64, 128])
def test_many_heads_walk_back(packed: Packed, D: int) -> None:
    check(drawn(packed, 16, 300, (8, 8, 8), D))


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("gate", ["head", "none"])
def test_without_the_gradient_of_the_gate(
    packed: Packed, D: int, gate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    i = replace(drawn(packed, 16, 300, (8, 8, 8), D, gate), initial_state=None)
    do = torch.randn_like(i.v)
    runs: list[Any] = []
    passes = scalar.run_gateless

    def watched(*args: Any) -> Any:
        runs.append(args)
        return passes(*args)

    monkeypatch.setattr(scalar, "run_gateless", watched)
    leaves = [t.detach().requires_grad_() for t in (i.q, i.k, i.v)]
    o, _ = call(replace(i, q=leaves[0], k=leaves[1], v=leaves[2]))
    found = torch.autograd.grad(o, leaves, do)
    assert len(runs) == 1
    g = None if i.g is None else i.g.double()
    wide = ScalarInputs(i.q.double(), i.k.double(), i.v.double(), g)
    true = scalar.torch_backward(
        scalar.check(i), wide, D**-0.5, do.double(), None, 64, want_dg=False, want_dh0=False
    )
    for name, got, wanted in zip(("dq", "dk", "dv"), found, true, strict=False):
        assert wanted is not None
        assert error(got, wanted) <= CEILING[name], name
