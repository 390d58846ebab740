"""Run a forward config: allocate, lay out arguments by the kernels' ABI, launch in order."""

from __future__ import annotations

import torch
from torch import Tensor

from glac.configs import ForwardConfig
from glac.plan import GateInput, Plan, gate_arguments, segment_states, segments_of, strides
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
    cu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch a forward pass. Inputs are validated and laid out as the kernels want them.

    Args:
        plan: sizes, config, kernels.
        q: ``[B, T, Hq, K]``.
        k: ``[B, T, Hk, K]``.
        v: ``[B, T, Hs, V]``.
        gate: of ``Hs`` heads.
        scale: factor on the queries.
        initial_state: ``[N, Hs, K, V]`` in fp32, or None.
        output_final_state: whether to return the state after the last token.
        cu: ``[N + 1]`` in int32, boundaries of a packed batch; None for a dense one (N = B).

    Returns:
        ``o [B, T, H, V]`` in the input dtype; the final state ``[N, Hs, K, V]`` in fp32, or None.
    """
    problem, config = plan.problem, plan.config
    spec = problem.spec
    B, T, H, K, V = problem.B, problem.T, problem.H, spec.K, spec.V
    N, state_heads = problem.sequences, problem.state_heads
    segments, seg_len = segments_of(problem, config.segment)

    o = torch.empty((B, T, H, V), dtype=q.dtype, device=q.device)
    final = None
    if output_final_state:
        final = torch.empty((N, state_heads, K, V), dtype=torch.float32, device=q.device)

    unit_k, unit_v = stride_unit(K), stride_unit(V)
    gated = gate_arguments(gate, spec)
    starts = None
    if seg_len < T:
        assert config.summary is not None
        starts = segment_states(
            plan,
            k,
            v,
            gate,
            initial_state,
            cu,
            segments=(segments, seg_len),
            summary=config.summary,
            heads=state_heads,
            k_group=problem.k_group // problem.s_group,
        )
    plan.kernels["gla_fwd"].run(
        (q, k, v, *gate.tensors, o, cu, initial_state, starts, final),
        (
            *(scale, *gated.scalars, T, N, H, segments, seg_len),
            *(problem.q_group, problem.k_group, problem.s_group),
            *(int(cu is not None), int(initial_state is not None), int(final is not None)),
            *(*gated.flag, *strides(q, unit_k), *strides(k, unit_k), *strides(v, unit_v)),
            *gated.strides,
        ),
        tiles("gla_fwd", spec, config.fwd) * segments * B * H,
    )
    return o, final
