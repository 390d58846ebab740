"""The kernels around the backward pass of a low-rank gate, against PyTorch in fp64."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from glac.configs import gate_kernels
from glac.gate import STEP_MIN, GateInput
from glac.interpret import InterpretedKernel
from glac.kernelspec import KernelSpec
from glac.lowrank_backward import FEWEST_TOKENS, gate_gradients, parts_of, written_out
from glac.plan import Plan
from glac.problem import DType, Gate, Problem, Specialisation
from glac.reference import lowrank_gate, lowrank_gate_backward, relative_rms
from tests.interpreter.running import nan_filled

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # exponentials of logits far out
]

TYPES = {DType.FP16: torch.float16, DType.FP32: torch.float32}


def plan_of(problem: Problem) -> Plan[Any]:
    kernels = gate_kernels(problem.spec).items()
    made = {n: InterpretedKernel(KernelSpec(n, problem.spec, c, "sm_90a")) for n, c in kernels}
    return Plan(problem, None, made)


def drawn(problem: Problem, bias: bool, clamp: float = STEP_MIN) -> GateInput:
    """A gate whose x is a slice of something wider."""
    spec, channels = problem.spec, problem.state_heads * problem.spec.K
    dtype = TYPES[spec.dtype]
    x = torch.randn(problem.B, problem.T, 2 * spec.rank).to(dtype)[..., : spec.rank]
    weight = torch.randn(channels, spec.rank).to(dtype)
    b = torch.randn(channels).to(TYPES[spec.gate_dtype]) if bias else None
    return GateInput((x, weight, b), 1 / 16, clamp)


def exact(gate: GateInput, heads: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The inputs in fp64 and their gate."""
    x, weight, bias = (None if t is None else t.double() for t in gate.tensors)
    assert x is not None
    assert weight is not None
    g = lowrank_gate(x, weight, bias, num_heads=heads, clamp_min=gate.clamp)
    return x, weight, bias, g


@pytest.mark.parametrize("clamp", [STEP_MIN, -0.05])
@pytest.mark.parametrize(
    ("dtype", "rank", "bias", "parts", "group"),
    [
        (DType.FP16, 16, True, 1, 1),
        (DType.FP32, 64, False, 2, 1),
        (DType.FP16, 8, True, 1, 2),
        (DType.FP32, 32, False, 3, 2),
    ],
)
def test_gate_and_gradients(
    dtype: DType, rank: int, bias: bool, parts: int, group: int, clamp: float
) -> None:
    torch.manual_seed(0)
    spec = Specialisation(20, 16, dtype, Gate.LOWRANK, dtype, rank)
    T = FEWEST_TOKENS + 37  # two blocks, the last one cut in a tile
    problem = Problem(spec, 2, T, 3 * group, s_group=group)
    gate, heads = drawn(problem, bias, clamp), problem.state_heads
    x, weight, b, wanted = exact(gate, heads)
    assert parts_of(problem)[1] == 2 * 2
    plan = plan_of(problem)
    with mock.patch.object(torch, "empty", nan_filled):
        g = written_out(plan, gate)
        dg = torch.randn(parts, 2, T, 3 * group, 20).to(g.dtype)
        dx, dweight, dbias = gate_gradients(plan, gate, dg)
    assert (g.shape, dx.shape, dx.dtype) == (wanted.shape, x.shape, TYPES[dtype])
    assert g.dtype == torch.float32
    assert relative_rms(g, wanted) < 1e-6
    if clamp > STEP_MIN:
        assert 0.1 < (wanted == clamp).double().mean() < 0.9
    total = dg.double().sum(0).view(2, T, heads, group, 20).sum(3)
    true = lowrank_gate_backward(x, weight, b, total, clamp_min=clamp)
    assert (dbias is None) == (b is None)
    for found, right in zip((dx, dweight, dbias), true, strict=True):
        if found is not None and right is not None:
            # dx is rounded to the dtype of x; dz to what products take, before both sums.
            assert relative_rms(found, right) < (1e-3 if dtype is DType.FP16 else 2e-6)


def test_logits_far_out() -> None:
    """Slopes of 0 and 1, and gates that are -0 or beyond every step."""
    spec = Specialisation(16, 16, DType.FP32, Gate.LOWRANK, DType.FP32, 16)
    problem = Problem(spec, 1, 5, 1)
    x = torch.tensor([-1e6, -300.0, 0.0, 300.0, 1e6])[None, :, None].expand(1, 5, 16) / 16
    gate = GateInput((x.contiguous(), torch.ones(16, 16), None), 1 / 16, STEP_MIN)
    plan = plan_of(problem)
    g = written_out(plan, gate)[0, :, 0, 0]
    assert g.tolist() == pytest.approx([STEP_MIN, -300 / 16, -0.0433217, 0, 0], rel=1e-6, abs=1e-9)
    dx, dweight, dbias = gate_gradients(plan, gate, torch.ones(1, 1, 5, 1, 16))
    # Each of 16 channels has the slope of a sigmoid, but that of the clamped token has none.
    assert dx[0, :, 0].tolist() == pytest.approx([0, 1, 0.5, 0, 0], rel=1e-6, abs=1e-9)
    assert dbias is None
    assert bool(dweight.isfinite().all())
