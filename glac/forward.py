"""Run a forward config: allocate, lay out arguments by the kernels' ABI, launch in order.

The same code serves the CUDA driver and Triton's interpreter; they differ only in ``Kernel``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from glac.configs import ForwardConfig
from glac.problem import Problem
from glac.templates import stride_unit, tiles

LOG2E = 1.4426950408889634
STEP_MIN = -111.0
"""No step decays by more than e^-111 (2^-160, which is 0 in fp32)."""


class Kernel(Protocol):
    """Something that launches: a loaded cubin, or the interpreter."""

    def run(self, tensors: Sequence[Tensor | None], scalars: Sequence[Any], grid: int) -> None:
        """Launch ``grid`` programs with the pointers of ``tensors`` and then ``scalars``."""
        ...


@dataclass(frozen=True)
class GateInput:
    """The gate as it came: ``tensors`` is ``(g,)`` or ``(x, weight, bias or None)``.

    ``inv_normalizer`` and ``clamp`` (natural log) belong to the low-rank gate.
    """

    tensors: tuple[Tensor | None, ...]
    inv_normalizer: float = 1.0
    clamp: float = STEP_MIN

    @property
    def lowrank(self) -> bool:
        return len(self.tensors) == 3


@dataclass(frozen=True)
class ForwardPlan:
    """Everything about a forward call that does not depend on its tensors.

    Attributes:
        problem: sizes and specialisation.
        config: how it runs.
        kernels: template name to a launchable kernel.
    """

    problem: Problem
    config: ForwardConfig
    kernels: Mapping[str, Kernel]


def _strides(tensor: Tensor, unit: int) -> tuple[int, int, int]:
    b, t, h, _ = tensor.stride()
    return b // unit, t // unit, h // unit


def run_forward(
    plan: ForwardPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: GateInput,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Launch a forward pass. Inputs are validated and laid out as the kernels want them.

    Returns:
        ``o [B, T, H, V]`` in the input dtype; the final state ``[B, H, K, V]`` in fp32, or None.
    """
    problem, config = plan.problem, plan.config
    spec = problem.spec
    B, T, H, K, V = problem.B, problem.T, problem.H, spec.K, spec.V
    heads = B * H
    segments, seg_len = config.segmentation(T)

    o = torch.empty((B, T, H, V), dtype=q.dtype, device=q.device)
    final = None
    if output_final_state:
        final = torch.empty((B, H, K, V), dtype=torch.float32, device=q.device)

    unit_k, unit_v = stride_unit(K), stride_unit(V)
    k_strides, v_strides = _strides(k, unit_k), _strides(v, unit_v)
    gate_scalars: tuple[Any, ...] = ()
    gate_flag: tuple[int, ...] = ()
    gate_strides: tuple[int, ...] = ()
    if gate.lowrank:
        clamp = max(gate.clamp, STEP_MIN) * LOG2E
        gate_scalars = (gate.inv_normalizer, clamp)
        gate_flag = (int(gate.tensors[2] is not None),)
        x = gate.tensors[0]
        assert x is not None
        unit_r = stride_unit(spec.rank)
        gate_strides = (x.stride(0) // unit_r, x.stride(1) // unit_r)
    else:
        assert gate.tensors[0] is not None
        gate_strides = _strides(gate.tensors[0], unit_k)

    sizes = (T, H, segments, seg_len)
    shared_strides = (*v_strides, *gate_strides)

    starts = initial_state
    if segments > 1:
        size = (heads, segments, K, V)
        starts = torch.empty(size, dtype=torch.float32, device=q.device)
        decay = torch.empty(size[:3], dtype=torch.float32, device=q.device)
        assert config.summary is not None
        plan.kernels["gla_fwd_summary"].run(
            (k, v, *gate.tensors, starts, decay),
            (*gate_scalars, *sizes, *gate_flag, *k_strides, *shared_strides),
            tiles("gla_fwd_summary", spec, config.summary) * (segments - 1) * heads,
        )
        combine = config.kernels()["gla_fwd_combine"]
        plan.kernels["gla_fwd_combine"].run(
            (starts, decay, initial_state),
            (segments, int(initial_state is not None)),
            tiles("gla_fwd_combine", spec, combine) * heads,
        )
    flags = (int(starts is not None), int(final is not None), *gate_flag)
    plan.kernels["gla_fwd"].run(
        (q, k, v, *gate.tensors, o, starts, final),
        (scale, *gate_scalars, *sizes, *flags, *_strides(q, unit_k), *k_strides, *shared_strides),
        tiles("gla_fwd", spec, config.fwd) * segments * heads,
    )
    return o, final
