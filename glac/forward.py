"""Run a forward config: allocate, lay out arguments by the kernels' ABI, launch in order."""

from __future__ import annotations

import torch
from torch import Tensor

from glac.configs import ForwardConfig
from glac.plan import GateInput, Plan, gate_arguments, strides
from glac.templates import stride_unit, tiles


def run_forward(
    plan: Plan[ForwardConfig],
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
    k_strides, v_strides = strides(k, unit_k), strides(v, unit_v)
    gated = gate_arguments(gate, spec)
    sizes = (T, H, segments, seg_len)
    shared_strides = (*v_strides, *gated.strides)

    starts = initial_state
    if segments > 1:
        size = (heads, segments, K, V)
        starts = torch.empty(size, dtype=torch.float32, device=q.device)
        decay = torch.empty(size[:3], dtype=torch.float32, device=q.device)
        assert config.summary is not None
        plan.kernels["gla_fwd_summary"].run(
            (k, v, *gate.tensors, starts, decay),
            (*gated.scalars, *sizes, *gated.flag, *k_strides, *shared_strides),
            tiles("gla_fwd_summary", spec, config.summary) * (segments - 1) * heads,
        )
        combine = config.kernels()["gla_fwd_combine"]
        plan.kernels["gla_fwd_combine"].run(
            (starts, decay, initial_state),
            (segments, int(initial_state is not None)),
            tiles("gla_fwd_combine", spec, combine) * heads,
        )
    flags = (int(starts is not None), int(final is not None), *gated.flag)
    plan.kernels["gla_fwd"].run(
        (q, k, v, *gate.tensors, o, starts, final),
        (scale, *gated.scalars, *sizes, *flags, *strides(q, unit_k), *k_strides, *shared_strides),
        tiles("gla_fwd", spec, config.fwd) * segments * heads,
    )
    return o, final
