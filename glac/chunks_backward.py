"""Run a backward config that makes the gradients of all chunks at once.

    gla_prepare            scaled tiles and scores of each chunk, as for the forward pass
    gla_bwd_walks          the state before each chunk, its gradient behind it, and dv
    gla_bwd_walks_exact    again, where gates left the range of prepared chunks
    gla_bwd_chunks         dq, dk and the gate's gradient of each chunk
    gla_bwd_chunks_exact   again, where gates left the range of that kernel

Before them, where the heads are too few for the GPU or the batch is packed, the state before each
segment and the gradient behind it, by ``gla_states`` and ``gla_combine`` as in ``glac.backward``.

A walk has nothing to do but products with states, and gradients come out complete, however many
tiles V has. The price is memory for a state and its gradient for each chunk, or for each second
one: what lies between is then found again from what was prepared.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from glac.backward import GradientParts, border_states, cut_segments, gradient_parts
from glac.configs import ChunksBackwardConfig
from glac.gate import GateInput
from glac.plan import Plan, strides
from glac.problem import Problem
from glac.templates import state_dtype, stride_unit, tiles

if TYPE_CHECKING:
    # What follows imports it where it runs: `kept_bytes` is asked where there may be none.
    import torch
    from torch import Tensor


def kept_in_segment(problem: Problem, config: ChunksBackwardConfig) -> int:
    """States of a segment that are kept."""
    return math.ceil(min(cut_segments(problem, config)[1], problem.T) / config.chunks.kept_tokens)


def kept_bytes(problem: Problem, config: ChunksBackwardConfig) -> int:
    """Bytes of the states and the gradients of states that are kept."""
    spec = problem.spec
    slots = cut_segments(problem, config)[0] * kept_in_segment(problem, config)
    states = problem.B * (problem.state_heads + problem.H) * slots
    return states * spec.K * spec.V * state_dtype(spec).itemsize


def run_chunks_backward(
    plan: Plan[ChunksBackwardConfig],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    do: Tensor,
    dht: Tensor | None,
    *,
    dh0: bool,
    cu: Tensor | None = None,
) -> GradientParts:
    """Launch a ``ChunksBackwardConfig``; arguments are those of ``run_backward``, a dense gate."""
    import torch

    from glac.forward import prepare
    from glac.validate import TORCH_DTYPES

    problem, config = plan.problem, plan.config
    spec = problem.spec
    B, T, H, K, V = problem.B, problem.T, problem.H, spec.K, spec.V
    N, state_heads = problem.sequences, problem.state_heads
    segments, length = cut_segments(problem, config)
    kept_states, keep = kept_in_segment(problem, config), config.chunks.keep
    slots = kept_states * keep
    unit_k, unit_v = stride_unit(K), stride_unit(V)
    groups = (problem.q_group, problem.k_group, problem.s_group)
    packed = int(cu is not None)

    def memory(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=q.device)

    starts = ends = None
    if segments > 1 or packed:
        at = (segments, length)
        starts, ends = border_states(
            plan, config.states, at, q, k, v, g, scale, initial_state, do, dht, cu
        )
    kept = TORCH_DTYPES[state_dtype(spec)]
    states = memory(B, state_heads, segments * kept_states, K, V, dtype=kept)
    dstates = memory(B, H, segments * kept_states, K, V, dtype=kept)
    dv = gradient_parts(B, T, H, v, 1)
    start_grads = memory(N, H, K, V) if dh0 else None
    stride = (
        *(*strides(q, unit_k), *strides(k, unit_k), *strides(v, unit_v), *strides(do, unit_v)),
        *strides(g, unit_k),
    )
    made = prepare(plan, config.prepare, q, k, GateInput((g,)), scale, cu)
    walked = (
        *(q, k, v, g, do, cu, initial_state, starts, dht, ends, made.qs, made.ks),
        *(made.scores, made.ends, made.flags, states, dstates, dv, start_grads),
    )
    how = (
        *(scale, T, N, H, segments, length, made.slots),
        *(config.chunks.kept_tokens, kept_states, *groups),
        *(packed, int(initial_state is not None), int(dht is not None), int(dh0)),
        *stride,
    )
    for name in ("gla_bwd_walks", "gla_bwd_walks_exact"):
        plan.kernels[name].run(walked, how, tiles(name, spec, config.walks) * segments * B * H)

    k_tiles = tiles("gla_bwd_chunks", spec, config.chunks)
    programs = k_tiles * slots * segments * B * H
    dq, dk = gradient_parts(B, T, H, q, 1), gradient_parts(B, T, H, k, 1)
    dg = gradient_parts(B, T, H, g, 1)
    others: tuple[Tensor, ...] = ()
    prepared: tuple[int, ...] = ()
    if keep > 1:
        others = (made.qs, made.ks, made.ends, made.flags)
        prepared = (made.slots, config.prepare.chunk)
    tensors = (
        *(q, k, v, g, do, cu, *others, states, dstates, dq, dk, dg),
        memory(programs, dtype=torch.int32),
    )
    scalars = (
        *(scale, T, N, H, segments, length, kept_states, *prepared, *groups),
        *(packed, *stride),
    )
    plan.kernels["gla_bwd_chunks"].run(tensors, scalars, programs)
    plan.kernels["gla_bwd_chunks_exact"].run(tensors, scalars, programs)
    return dq, dk, dv, dg, start_grads
