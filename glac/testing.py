"""The one source of synthetic inputs: tests, tuner, benchmarks and examples all draw from here.

    q, k, v, x ~ randn       g = logsigmoid(randn) / gate_scale       weight ~ randn / 4

(the gate as GLA layers make it, arXiv 2312.06635). Values are drawn in fp32 and then rounded, so
runs in different dtypes see roundings of the same numbers. A seed gives the same numbers on the
same kind of device, but CPU and GPU draw different ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glac.errors import InputError
from glac.problem import Problem
from glac.validate import TORCH_DTYPES

HARD_GATE_VALUES: tuple[float, ...] = (0.0, -1e-30, -0.06, -5.0, -50.0, -1e4, -math.inf)
"""Log decays that break naive chunk formulas: none, nearly none, mild, fast, resets."""

_MILD, _RESET = -0.06, -math.inf


@dataclass(frozen=True)
class Inputs:
    """Tensors of one GLA problem; those that the gate kind does not use are None.

    Attributes:
        q: Queries ``[B, T, H, K]``.
        k: Keys ``[B, T, H, K]``.
        v: Values ``[B, T, H, V]``.
        g: Natural-log decay per step ``[B, T, H, K]`` for ``gate="vector"``, ``[B, T, H]`` for
            ``gate="scalar"``.
        x: Low-rank gate activation ``[B, T, R]``, for ``gate="lowrank"``.
        weight: Gate projection ``[H*K, R]``, for ``gate="lowrank"``.
        bias: Gate bias ``[H*K]``, for ``gate="lowrank"``.
        initial_state: ``[B, H, K, V]`` in fp32 (fp64 for fp64 inputs), if asked for.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None = None
    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    initial_state: Tensor | None = None


def make_inputs(
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    gate: Literal["vector", "lowrank", "scalar"] = "vector",
    gate_dtype: torch.dtype | None = None,
    rank: int = 16,
    seed: int = 0,
    gate_scale: float = 16.0,
    initial_state: bool = False,
) -> Inputs:
    """Draw one reproducible GLA problem.

    Args:
        B: Batch size.
        T: Tokens.
        H: Heads.
        K: Key channels per head.
        V: Value channels per head.
        dtype: Of q, k, v, x, weight and bias.
        device: Where to draw.
        gate: ``"vector"`` and ``"scalar"`` draw ``g``, ``"lowrank"`` ``x``, ``weight``, ``bias``.
        gate_dtype: Of ``g``; ``dtype`` if None.
        rank: R of the low-rank gate.
        seed: Seed of the generator.
        gate_scale: Divisor of the log decay; the larger, the slower the decay.
        initial_state: Whether to draw a state to start from.

    Returns:
        The tensors, contiguous, requiring no gradient.

    Raises:
        InputError: ``gate`` is no such kind.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    q, k, v = draw(B, T, H, K).to(dtype), draw(B, T, H, K).to(dtype), draw(B, T, H, V).to(dtype)
    state = None
    if initial_state:
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        state = draw(B, H, K, V).to(state_dtype)
    if gate == "vector":
        g = (F.logsigmoid(draw(B, T, H, K)) / gate_scale).to(gate_dtype or dtype)
        return Inputs(q, k, v, g=g, initial_state=state)
    if gate == "scalar":
        g = (F.logsigmoid(draw(B, T, H)) / gate_scale).to(gate_dtype or dtype)
        return Inputs(q, k, v, g=g, initial_state=state)
    if gate == "lowrank":
        x = draw(B, T, rank).to(dtype)
        weight = (draw(H * K, rank) * 0.25).to(dtype)
        bias = draw(H * K).to(dtype)
        return Inputs(q, k, v, x=x, weight=weight, bias=bias, initial_state=state)
    raise InputError(f"gate must be 'vector', 'scalar' or 'lowrank', got {gate!r}")


def problem_inputs(
    problem: Problem,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    initial_state: bool = False,
) -> Inputs:
    """Inputs of a problem, in the dtypes of its specialisation.

    Args:
        problem: Sizes, gate kind and dtypes.
        device: Where to draw.
        seed: Seed of the generator.
        initial_state: Whether to draw a state to start from.

    Returns:
        As ``make_inputs``; a low-rank gate's bias is in the problem's gate dtype.
    """
    spec = problem.spec
    inputs = make_inputs(
        problem.B,
        problem.T,
        problem.H,
        spec.K,
        spec.V,
        dtype=TORCH_DTYPES[spec.dtype],
        device=device,
        gate=spec.gate.value,
        gate_dtype=TORCH_DTYPES[spec.gate_dtype],
        rank=spec.rank,
        seed=seed,
        initial_state=initial_state,
    )
    if inputs.bias is None:
        return inputs
    return replace(inputs, bias=inputs.bias.to(TORCH_DTYPES[spec.gate_dtype]))


def hard_gates(
    shape: Sequence[int],
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw gates that break naive chunk formulas, mixed over channels and time.

    Each channel is one of four kinds: one hard value throughout; runs of about eight tokens; a
    mild decay with rare resets; a fresh hard value per token. One token in about 32 resets its
    whole head, as a document boundary does.

    Args:
        shape: ``(B, T, H, K)``.
        seed: Seed of the generator.
        device: Where to draw.
        dtype: Of the result. In fp16 ``-1e-30`` becomes ``-0.0``.

    Returns:
        Natural-log decays per step ``[B, T, H, K]``, each one of ``HARD_GATE_VALUES``.

    Raises:
        InputError: ``shape`` does not have four entries.
    """
    if len(shape) != 4:
        raise InputError(f"shape must be (B, T, H, K), got {tuple(shape)}")
    B, T, H, K = shape
    generator = torch.Generator(device=device).manual_seed(seed)

    def integers(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=generator, device=device)

    values = torch.tensor(HARD_GATE_VALUES, device=device)
    fresh = values[integers(len(HARD_GATE_VALUES), B, T, H, K)]
    constant = fresh[:, :1].expand(B, T, H, K)
    steps = torch.arange(T, device=device).view(1, T, 1, 1)
    run_start = torch.where(integers(8, B, T, H, K) == 0, steps, 0).cummax(1).values
    runs = fresh.gather(1, run_start)
    rare = torch.where(integers(16, B, T, H, K) == 0, _RESET, _MILD)
    kind = integers(4, B, 1, H, K)
    mixed = torch.where(kind == 0, constant, torch.where(kind == 1, runs, fresh))
    mixed = torch.where(kind == 2, rare, mixed)
    boundary = integers(32, B, T, H, 1) == 0
    return torch.where(boundary, _RESET, mixed).to(dtype)
