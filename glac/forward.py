"""Run a forward config: allocate, lay out arguments by the kernels' ABI, launch in order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glac.configs import CombineKernelConfig, ForwardConfig, PrepareKernelConfig, padded_k
from glac.gate import GateInput
from glac.plan import Plan, gate_arguments, segment_states, segments_of, strides
from glac.problem import Problem
from glac.templates import state_dtype, stride_unit, tiles
from glac.validate import TORCH_DTYPES


def chunk_slots(problem: Problem, chunk: int) -> int:
    """Slots of chunks in a row of the tensors, which lie as those of segments do."""
    if problem.packed:
        return problem.T // chunk + problem.packed
    return math.ceil(problem.T / chunk)


@dataclass(frozen=True)
class Prepared:
    """What ``gla_prepare`` makes of a call; shapes are in its file.

    Attributes:
        qs: scaled queries.
        ks: scaled keys.
        scores: masked products of the two.
        ends: decay of each chunk.
        flags: whether a chunk left the range.
        slots: of chunks.
    """

    qs: Tensor
    ks: Tensor
    scores: Tensor
    ends: Tensor
    flags: Tensor
    slots: int


def prepare(
    plan: Plan[Any],
    config: PrepareKernelConfig,
    q: Tensor,
    k: Tensor,
    gate: GateInput,
    scale: float,
    cu: Tensor | None,
) -> Prepared:
    """Launch ``gla_prepare`` of a plan, which has ``config``."""
    problem = plan.problem
    spec = problem.spec
    gated, unit_k = gate_arguments(gate, spec), stride_unit(spec.K)
    chunk, keys, slots = config.chunk, padded_k(spec), chunk_slots(problem, config.chunk)
    lead = (problem.B, problem.H, slots)
    tile = TORCH_DTYPES[state_dtype(spec)]
    prepared = Prepared(
        qs=torch.empty((*lead, chunk, keys), dtype=tile, device=q.device),
        ks=torch.empty((*lead, chunk, keys), dtype=tile, device=q.device),
        scores=torch.empty((*lead, chunk, chunk), dtype=tile, device=q.device),
        ends=torch.empty((*lead, keys), dtype=torch.float32, device=q.device),
        flags=torch.empty(lead, dtype=torch.int32, device=q.device),
        slots=slots,
    )
    plan.kernels["gla_prepare"].run(
        (
            *(q, k, *gate.tensors, cu, prepared.qs, prepared.ks, prepared.scores),
            *(prepared.ends, prepared.flags),
        ),
        (
            *(scale, *gated.scalars, problem.T, problem.sequences, problem.H, slots),
            *(problem.q_group, problem.k_group, problem.s_group, int(cu is not None)),
            *(*gated.flag, *strides(q, unit_k), *strides(k, unit_k), *gated.strides),
        ),
        tiles("gla_prepare", spec, config) * slots * problem.B * problem.H,
    )
    return prepared


def _prepared_segment_states(
    plan: Plan[ForwardConfig],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: GateInput,
    scale: float,
    initial_state: Tensor | None,
    cu: Tensor | None,
    o: Tensor,
    prepared: Prepared,
) -> Tensor:
    """As ``segment_states``, from prepared chunks. May leave anything in ``o``."""
    problem, config = plan.problem, plan.config
    assert config.summary is not None
    spec = problem.spec
    B, T, K, V, heads = problem.B, problem.T, spec.K, spec.V, problem.state_heads
    count, length = segments_of(problem, config.segment)
    gated, unit_k, unit_v = gate_arguments(gate, spec), stride_unit(K), stride_unit(V)
    packed = int(cu is not None)
    starts = torch.empty((B, heads, count, K, V), dtype=torch.float32, device=q.device)
    decay = torch.empty((B, heads, count, K), dtype=torch.float32, device=q.device)
    plan.kernels["gla_walk_states"].run(
        (
            *(q, k, v, *gate.tensors, o, cu, starts, decay),
            *(prepared.ks, prepared.ends, prepared.flags),
        ),
        (
            *(scale, *gated.scalars, T, problem.sequences, problem.H, count, length),
            *(prepared.slots, problem.q_group, problem.k_group, problem.s_group, packed),
            *(*gated.flag, *strides(q, unit_k), *strides(k, unit_k), *strides(v, unit_v)),
            *gated.strides,
        ),
        tiles("gla_walk_states", spec, config.summary) * count * B * heads,
    )
    plan.kernels["gla_combine"].run(
        (starts, decay, initial_state, cu),
        (T, heads, count, length, 1, 0, packed, int(initial_state is not None)),
        tiles("gla_combine", spec, CombineKernelConfig()) * problem.sequences * heads,
    )
    return starts


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
    prepared = None
    if config.prepare is not None:
        prepared = prepare(plan, config.prepare, q, k, gate, scale, cu)
    if seg_len < T and prepared is not None:
        starts = _prepared_segment_states(
            plan, q, k, v, gate, scale, initial_state, cu, o, prepared
        )
    elif seg_len < T and config.fwd.lead:
        # Each program leaves the state before its segment here, for its second pass.
        shape = (B, state_heads, segments, K, V)
        starts = torch.empty(shape, dtype=torch.float32, device=q.device)
    elif seg_len < T:
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
    made: tuple[Tensor, ...] = ()
    slots: tuple[int, ...] = ()
    if prepared is not None:
        made = (prepared.qs, prepared.ks, prepared.scores, prepared.ends, prepared.flags)
        slots = (prepared.slots,)
    plan.kernels[config.main].run(
        (q, k, v, *gate.tensors, o, cu, initial_state, starts, final, *made),
        (
            *(scale, *gated.scalars, T, N, H, segments, seg_len, *slots),
            *(problem.q_group, problem.k_group, problem.s_group),
            *(int(cu is not None), int(initial_state is not None), int(final is not None)),
            *(*gated.flag, *strides(q, unit_k), *strides(k, unit_k), *strides(v, unit_v)),
            *gated.strides,
        ),
        tiles(config.main, spec, config.fwd) * segments * B * H,
    )
    return o, final
