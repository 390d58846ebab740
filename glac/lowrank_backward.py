"""The kernels around a backward pass that make it that of a low-rank gate.

    gla_gate         the gate, written out
    ...              the backward pass of that dense gate
    gla_gate_bwd     parts of dx, dweight and dbias from the gradient of the gate
    gla_gate_sums    their sums

The price is memory for the gate and its gradient while the pass lasts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from glac.configs import GateKernelConfig, SumsKernelConfig, gate_kernels
from glac.gate import GateInput
from glac.plan import Plan, gate_arguments
from glac.problem import DType, Gate, Problem

if TYPE_CHECKING:
    from torch import Tensor


MOST_TOKENS, FEWEST_TOKENS = 512, 128
PROGRAMS = 264
"""Two on each SM of an H100. At 8,1024,8,64,64 128 programs took 17 us and 256 took 14."""


def _config(problem: Problem, template: str) -> GateKernelConfig:
    config = gate_kernels(problem.spec)[template]
    assert isinstance(config, GateKernelConfig)
    return config


def _channels(problem: Problem) -> int:
    """Of all heads of the gate."""
    return problem.state_heads * problem.spec.K


def _tiles(problem: Problem, template: str) -> int:
    """Tiles of channels of ``gla_gate`` or ``gla_gate_bwd``."""
    return math.ceil(_channels(problem) / _config(problem, template).block_n)


def tokens_per_program(problem: Problem) -> int:
    """Of ``gla_gate_bwd``: the more, the fewer parts are left, as long as programs fill a GPU."""
    length = MOST_TOKENS
    tiles = _tiles(problem, "gla_gate_bwd")
    while length > FEWEST_TOKENS and tiles * _blocks(problem, length) < PROGRAMS:
        length //= 2
    return length


def _blocks(problem: Problem, length: int) -> int:
    return problem.B * math.ceil(problem.T / length)


def parts_of(problem: Problem) -> tuple[int, int]:
    """How many parts ``gla_gate_bwd`` leaves: of dx, and of dweight and dbias."""
    return _tiles(problem, "gla_gate_bwd"), _blocks(problem, tokens_per_program(problem))


def parts_bytes(problem: Problem) -> int:
    """Bytes of all parts."""
    in_x, in_w = parts_of(problem)
    rank, channels = problem.spec.rank, _channels(problem)
    numbers = in_x * problem.B * problem.T * rank + in_w * channels * (rank + 1)
    return numbers * DType.FP32.itemsize


def gate_bytes(problem: Problem) -> int:
    """Bytes that a low-rank gate takes while the backward pass lasts: 0 for other gates.

    The gate and its gradient, which beside several tiles of V or grouped heads is in parts, and
    the parts that are made from it.
    """
    if problem.spec.gate is not Gate.LOWRANK:
        return 0
    channels = (problem.state_heads + problem.H) * problem.spec.K
    dense = problem.B * problem.T * channels * problem.spec.dense.gate_dtype.itemsize
    return dense + parts_bytes(problem)


def written_programs(problem: Problem) -> int:
    """Programs of ``gla_gate``."""
    return _tiles(problem, "gla_gate") * _blocks(problem, _config(problem, "gla_gate").chunk)


def sums_programs(problem: Problem) -> int:
    """Programs of ``gla_gate_sums``."""
    config = gate_kernels(problem.spec)["gla_gate_sums"]
    assert isinstance(config, SumsKernelConfig)
    rank, channels = problem.spec.rank, _channels(problem)
    sizes = (problem.B * problem.T * rank, channels * rank, channels)
    return sum(math.ceil(size / config.block) for size in sizes)


def written_out(plan: Plan[Any], gate: GateInput) -> Tensor:
    """The gate of ``plan.problem`` as ``g [B, T, Hs, K]``, natural log, per step."""
    import torch

    from glac.validate import TORCH_DTYPES

    problem = plan.problem
    B, T, H, K = problem.B, problem.T, problem.state_heads, problem.spec.K
    x = gate.tensors[0]
    assert x is not None
    dtype = TORCH_DTYPES[problem.spec.dense.gate_dtype]
    g = torch.empty((B, T, H, K), dtype=dtype, device=x.device)
    args = gate_arguments(gate, problem.spec)
    plan.kernels["gla_gate"].run(
        (*gate.tensors, g),
        (*args.scalars, T, H, *args.flag, *args.strides),
        written_programs(problem),
    )
    return g


def gate_gradients(
    plan: Plan[Any], gate: GateInput, dg: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x in its dtype, and of weight and bias in fp32.

    Args:
        plan: of the pass.
        gate: as it came.
        dg: gradient of the dense gate, ``[P, B, T, H, K]`` in parts to be added.
    """
    import torch

    problem, rank = plan.problem, plan.problem.spec.rank
    B, T, H, K = problem.B, problem.T, problem.state_heads, problem.spec.K
    x, weight, bias = gate.tensors
    assert x is not None
    assert weight is not None
    in_x, in_w = parts_of(problem)

    def memory(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=x.device)

    parts = memory(in_x, B, T, rank), memory(in_w, H * K, rank), memory(in_w, H * K)
    args = gate_arguments(gate, problem.spec)
    plan.kernels["gla_gate_bwd"].run(
        (*gate.tensors, dg, *parts),
        (
            *(*args.scalars, B, T, H, dg.shape[0], problem.s_group),
            *(tokens_per_program(problem), *args.flag, *args.strides),
        ),
        in_x * in_w,
    )
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dw, db = memory(H * K, rank), memory(H * K)
    plan.kernels["gla_gate_sums"].run(
        (*parts, dx, dw, db), (B * T, H * K, in_x, in_w), sums_programs(problem)
    )
    return dx, dw, None if bias is None else db
