"""Packed batches and grouped heads on the GPU: against fp64, and against separate calls."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from glac import fallback
from glac.attention import chunk_gla, chunk_gla_lowrank
from glac.backward import run_backward
from glac.configs import BackwardConfig, ChunksBackwardConfig, ForwardConfig
from glac.forward import run_forward
from glac.gate import GateInput
from glac.launch import load_from_pack
from glac.pack import Pack, PackRow
from glac.plan import Plan
from glac.problem import Op, Problem
from glac.reference import relative_rms
from glac.testing import Inputs, hard_gates, make_inputs
from glac.validate import check_lowrank, check_vector
from tests.gpu.rows import CEILING

if TYPE_CHECKING:
    from tests.gpu.conftest import Packed

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
DIMS = [(64, 64), (128, 128), (128, 256), (256, 512)]
GATE_CEILING = 5e-3
"""Of a gradient of the gate in bf16."""


def boundaries(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def random_lengths(tokens: int, sequences: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(tokens + 1, (sequences - 1,), generator=generator).sort().values
    ends = [0, *cuts.tolist(), tokens]
    return [b - a for a, b in itertools.pairwise(ends)]


def with_heads(x: Inputs, q_heads: int, k_heads: int) -> Inputs:
    """The problem with fewer heads of q and k, or more of q."""
    q = x.q[:, :, :q_heads] if q_heads <= x.q.shape[2] else x.q.repeat(1, 1, q_heads, 1)
    return replace(x, q=q[:, :, :q_heads].contiguous(), k=x.k[:, :, :k_heads].contiguous())


def problem_of(x: Inputs, cu: Tensor | None) -> Problem:
    if x.g is not None:
        return check_vector(x.q, x.k, x.v, x.g, x.initial_state, cu)
    assert x.x is not None
    assert x.weight is not None
    return check_lowrank(x.q, x.k, x.v, x.x, x.weight, x.bias, x.initial_state, cu)


def gate_of(x: Inputs) -> GateInput:
    return GateInput((x.g,)) if x.g is not None else GateInput((x.x, x.weight, x.bias), 1 / 16)


def check_against_fp64(x: Inputs, cu: Tensor | None) -> None:
    """Results and all gradients of the public operation, through autograd."""
    named = {name: t for name, t in vars(x).items() if t is not None}
    leaves = {name: t.clone().requires_grad_() for name, t in named.items()}
    run: Any = chunk_gla if x.g is not None else chunk_gla_lowrank
    o, state = run(**leaves, output_final_state=True, cu_seqlens=cu)
    do, dht = torch.randn_like(o), torch.randn_like(state)
    grads = dict(
        zip(leaves, torch.autograd.grad((o, state), list(leaves.values()), (do, dht)), strict=True)
    )

    wide = Inputs(**{name: t.double() for name, t in named.items()})
    problem, scale = problem_of(x, cu), x.q.shape[-1] ** -0.5
    tensors = (problem, wide.q, wide.k, wide.v, gate_of(wide), scale, wide.initial_state)
    wanted, last = fallback.forward(*tensors, True, 64, cu)
    dq, dk, dv, gates, dh0 = fallback.backward(*tensors, do.double(), dht.double(), 64, True, cu)
    names = ("g",) if x.g is not None else ("x", "weight", "bias")
    true = {"q": dq, "k": dk, "v": dv, **dict(zip(names, gates, strict=True))}
    true["initial_state"] = dh0
    assert last is not None
    assert relative_rms(o.double(), wanted) <= CEILING[BF16]
    assert relative_rms(state.double(), last) <= CEILING[BF16]
    for name, grad in grads.items():
        ceiling = GATE_CEILING if name in names else CEILING[BF16]
        expected = true[name]
        assert expected is not None
        assert grad.shape == expected.shape
        error = relative_rms(grad.double(), expected)
        assert error <= ceiling, f"d{name}: {error:.2e}"


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("sequences", [1, 5, 40])
def test_packed_batches(packed: Packed, dims: tuple[int, int], sequences: int) -> None:
    tokens = 5000
    x = make_inputs(1, tokens, 4, *dims, dtype=BF16, device=packed.device)
    state = torch.randn(sequences, 4, *dims, device=packed.device)
    x = replace(x, initial_state=state)
    cu = boundaries(random_lengths(tokens, sequences), packed.device)
    for op in (Op.FORWARD, Op.BACKWARD):
        packed.need(problem_of(x, cu), op)
    check_against_fp64(x, cu)


@pytest.mark.parametrize("kind", ["lowrank", "resets"])
def test_packed_batches_of_other_gates(packed: Packed, kind: str) -> None:
    gate: Any = "lowrank" if kind == "lowrank" else "vector"
    x = make_inputs(1, 3000, 2, 128, 128, dtype=BF16, device=packed.device, gate=gate)
    x = replace(x, initial_state=torch.randn(7, 2, 128, 128, device=packed.device))
    if x.g is not None:
        mask = torch.rand(x.g.shape, device=packed.device) < 1 / 256
        x = replace(x, g=x.g.masked_fill(mask, -torch.inf))
    cu = boundaries(random_lengths(3000, 7, seed=1), packed.device)
    for op in (Op.FORWARD, Op.BACKWARD):
        packed.need(problem_of(x, cu), op)
    check_against_fp64(x, cu)


@pytest.mark.parametrize("heads", [(8, 2, 8), (2, 8, 8), (32, 8, 8), (4, 1, 1)], ids=str)
@pytest.mark.parametrize("gate", ["vector", "lowrank"])
def test_grouped_heads(packed: Packed, heads: tuple[int, int, int], gate: Any) -> None:
    q_heads, k_heads, v_heads = heads
    x = make_inputs(
        2, 700, v_heads, 128, 128, dtype=BF16, device=packed.device, gate=gate, initial_state=True
    )
    x = with_heads(x, q_heads, k_heads)
    for op in (Op.FORWARD, Op.BACKWARD):
        packed.need(problem_of(x, None), op)
    check_against_fp64(x, None)


def plan_of(pack: Pack, row: PackRow, problem: Problem) -> Plan[Any]:
    kernels = {t: load_from_pack(pack, name, 0) for t, name in row.kernels.items()}
    return Plan(problem, row.config, kernels)


def sequence(x: Inputs, n: int, begin: int, end: int) -> Inputs:
    parts = {
        name: None if t is None else t[:, begin:end]
        for name, t in (("q", x.q), ("k", x.k), ("v", x.v), ("g", x.g), ("x", x.x))
    }
    assert x.initial_state is not None
    return replace(x, **parts, initial_state=x.initial_state[n : n + 1])  # type: ignore[arg-type]


LENGTHS = [37, 0, 300, 1, 64, 900]


def packed_row(row: PackRow, device: torch.device) -> Inputs:
    spec = row.spec
    dtype: Any = {"bf16": BF16, "fp16": torch.float16, "fp32": torch.float32}[spec.dtype.value]
    wide = torch.float32 if spec.gate_dtype.value == "fp32" else dtype
    gate: Any = spec.gate.value
    x = make_inputs(
        1, sum(LENGTHS), 2, spec.K, spec.V, dtype=dtype, device=device, gate=gate,
        gate_dtype=wide, rank=spec.rank or 16,
    )  # fmt: skip
    if x.bias is not None:
        x = replace(x, bias=x.bias.to(wide))
    if x.g is not None:
        # One of the two heads leaves the fast path.
        hard = hard_gates(x.g[:, :, :1].shape, device=device).to(x.g.dtype)
        x = replace(x, g=torch.cat((x.g[:, :, :1], hard), 2))
    state = torch.randn(len(LENGTHS), 2, spec.K, spec.V, device=device)
    return replace(x, initial_state=state)


def test_packed_is_separate_bit_for_bit(packed: Packed) -> None:
    """Of every row of the packs, at the row's own config, both passes."""
    cu = boundaries(LENGTHS, packed.device)
    bounds = cu.tolist()
    ran = 0
    for op in (Op.FORWARD, Op.BACKWARD):
        for pack, row in packed.rows(op):
            assert isinstance(row.config, ForwardConfig | BackwardConfig | ChunksBackwardConfig)
            if 0 < row.config.segment < 900:
                continue  # a dense call takes another way through short sequences
            x = packed_row(row, packed.device)
            do = torch.randn_like(x.v)

            def results(
                x: Inputs, do: Tensor, cu: Tensor | None, pack: Pack = pack, row: PackRow = row
            ) -> list[Tensor]:
                plan = plan_of(pack, row, problem_of(x, cu))
                tensors = (plan, x.q, x.k, x.v, gate_of(x), 0.2, x.initial_state)
                if isinstance(row.config, ForwardConfig):
                    o, state = run_forward(*tensors, True, cu)
                    assert state is not None
                    return [o, state]
                dq, dk, dv, gates, dh0 = run_backward(*tensors, do, None, dh0=True, cu=cu)
                assert dh0 is not None
                first = gates[0]
                assert first is not None
                return [dq, dk, dv, first, dh0]

            together = results(x, do, cu)
            for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
                if begin == end:
                    continue
                alone = results(sequence(x, n, begin, end), do[:, begin:end], None)
                for i, (a, b) in enumerate(zip(together, alone, strict=True)):
                    part = a[n : n + 1] if i == len(alone) - 1 else a[:, begin:end]
                    assert torch.equal(part, b), f"{row.config.slug} {row.spec.slug} {i} {n}"
            ran += 1
    assert ran


def test_a_graph_replays_with_other_boundaries(packed: Packed) -> None:
    x = make_inputs(1, 2048, 4, 128, 128, dtype=BF16, device=packed.device)
    x = replace(x, initial_state=torch.randn(4, 4, 128, 128, device=packed.device))
    assert x.g is not None
    cu = boundaries([500, 548, 600, 400], packed.device)
    packed.need(problem_of(x, cu))
    options: Any = {"initial_state": x.initial_state, "output_final_state": True}
    chunk_gla(x.q, x.k, x.v, x.g, cu_seqlens=cu, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, state = chunk_gla(x.q, x.k, x.v, x.g, cu_seqlens=cu, **options)
    for lengths in ([2048, 0, 0, 0], [1, 2, 3, 2042], [512] * 4):
        cu.copy_(boundaries(lengths, packed.device))
        graph.replay()
        wanted, last = chunk_gla(x.q, x.k, x.v, x.g, cu_seqlens=cu, **options)
        assert state is not None
        assert last is not None
        assert torch.equal(o, wanted)
        assert torch.equal(state, last)


def test_reverse(packed: Packed) -> None:
    x = make_inputs(2, 300, 4, 128, 128, dtype=BF16, device=packed.device, initial_state=True)
    assert x.g is not None
    packed.need(problem_of(x, None))
    o, state = chunk_gla(
        x.q, x.k, x.v, x.g, initial_state=x.initial_state, output_final_state=True, reverse=True
    )
    flipped = [t.flip(1) for t in (x.q, x.k, x.v, x.g)]
    wanted, last = chunk_gla(*flipped, initial_state=x.initial_state, output_final_state=True)
    assert state is not None
    assert last is not None
    assert torch.equal(o, wanted.flip(1))
    assert torch.equal(state, last)
