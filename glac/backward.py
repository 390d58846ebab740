"""Run a backward config: the launches of one backward pass, by the kernels' ABI.

A sequence that is walked as a whole falls into windows, from the last to the first:

    gla_states       the state at the start of every few chunks of the window
    gla_bwd          dq, dk, the gate's gradient (and dv), and dS at the window's start
    gla_bwd_exact    again, where gates left the fast kernel's range

Windows bound what is kept: states of the whole sequence may take as much memory as all gradients
together. Where the heads are too few for the GPU, the sequence is cut into segments
that are walked at once. The state before each and the gradient of the one behind each come first:

    gla_states, gla_combine      what every segment adds to the state, chained
    gla_states, gla_combine      the same for the state's gradient, back in time
    gla_states, gla_bwd, gla_bwd_exact, for a few segments at a time

Or, for short sequences, programs of ``gla_bwd`` walk to their segments from both ends of the
sequence, and nothing comes first:

    gla_bwd, gla_bwd_exact

In all cases ``gla_bwd_dv`` makes dv, where gla_bwd does not. ``ChunksBackwardConfig`` is another
way, in ``glac.chunks_backward``. A low-rank gate is written out first, and its gradients are made
from that of the dense one (``glac.lowrank_backward``). The forward pass saves nothing but its
inputs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

from glac.configs import BackwardConfig, ChunkKernelConfig, ChunksBackwardConfig
from glac.gate import GateInput, Gradients
from glac.plan import Plan, segment_states, segments_of, strides
from glac.problem import Problem
from glac.record import dataclass
from glac.settings import scratch_bytes
from glac.templates import state_dtype, stride_unit, tiles

if TYPE_CHECKING:
    # What follows imports it where it runs: `cut` is asked where there may be none.
    import torch
    from torch import Tensor

GradientParts: TypeAlias = "tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]"
"""Gradients of q, k, v and a dense gate as ``gradient_parts``, and of each head's first state."""

WINDOWS = 3
"""Where states of all chunks are more than ``scratch_bytes``, one of so many windows' are kept.

At 16,2048,8,128,128 that is 88 MiB instead of 256, for 631 us instead of 534 on an H200: all
windows but the last are walked through twice for their states, and each launch has its start.
"""
PROGRAMS = 264
"""Programs that fill an H100, two on each SM: a launch of segments has at least so many."""
PACKED_SEGMENT = 2048
"""Tokens per segment of a packed batch whose config has none."""


@dataclass(frozen=True)
class Cut:
    """How a backward pass goes through its sequences.

    Attributes:
        segments: slots of segments in a row of the tensors.
        length: tokens of a segment.
        at_once: segments of one launch.
        chained: whether launches follow each other back in time, each handing on the gradient of
            the state (windows); else all segments know theirs from the start.
    """

    segments: int
    length: int
    at_once: int
    chained: bool


def windows(problem: Problem, config: BackwardConfig) -> tuple[int, int]:
    """How many windows a backward pass takes, and the tokens of each but the last."""
    kept = math.ceil(problem.T / config.grads.kept_tokens) * _state_bytes(problem)
    steps = math.ceil(problem.T / config.chunk_step)
    count = 1 if kept <= scratch_bytes() else min(WINDOWS, steps)
    length = config.chunk_step * math.ceil(steps / count)
    return math.ceil(problem.T / length), length


def _state_bytes(problem: Problem) -> int:
    """Of the states that are kept at one token."""
    spec = problem.spec
    states = problem.B * problem.state_heads * spec.K * spec.V
    return states * state_dtype(spec).itemsize


def cut_segments(
    problem: Problem, config: BackwardConfig | ChunksBackwardConfig
) -> tuple[int, int]:
    """Slots of segments in a row, and the tokens of each; a packed batch always has some."""
    if not problem.packed:
        return segments_of(problem, config.segment)
    step = config.chunk_step
    segment = config.segment or step * math.ceil(PACKED_SEGMENT / step)
    if segment >= problem.T:
        # One slot for each sequence.
        return problem.packed + 1, step * math.ceil(problem.T / step)
    return segments_of(problem, segment)


def cut(problem: Problem, config: BackwardConfig) -> Cut:
    """How the backward pass of ``problem`` goes through its sequences."""
    segments, length = cut_segments(problem, config)
    if segments == 1 and not problem.packed and config.states is not None:
        count, window = windows(problem, config)
        return Cut(count, window, 1, True)
    spec, grads = problem.spec, config.grads
    per_segment = _state_bytes(problem) * math.ceil(length / grads.kept_tokens)
    per_launch = tiles("gla_bwd", spec, grads) * problem.B * problem.H
    at_once = max(scratch_bytes() // per_segment, math.ceil(PROGRAMS / per_launch))
    launches = math.ceil(segments / at_once)
    return Cut(segments, length, math.ceil(segments / launches), False)


def gradient_parts(B: int, T: int, H: int, like: Tensor, parts: int) -> Tensor:
    """Memory for a gradient per head of the output, in as many parts as tiles make it from."""
    import torch

    return torch.empty((parts, B, T, H, like.shape[-1]), dtype=like.dtype, device=like.device)


def summed(parts: Tensor, heads: int) -> Tensor:
    """The parts' sum over tiles and over heads that share an input, in fp32 and a fixed order."""
    count, B, T, H, D = parts.shape
    if heads != H:
        return parts.view(count, B, T, heads, H // heads, D).sum((0, 4))
    if count == 1:
        return parts[0]
    import torch

    # As one addition of whole tensors it takes half the time of a reduction.
    return torch.add(parts[0], parts[1]) if count == 2 else parts.sum(0)


def border_states(
    plan: Plan[BackwardConfig | ChunksBackwardConfig],
    states: ChunkKernelConfig,
    segments: tuple[int, int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    do: Tensor,
    dht: Tensor | None,
    cu: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The state before each segment, and the gradient of the state behind each.

    Args:
        states: config of ``gla_states``.
        segments: what ``cut_segments`` said.
        g: the dense gate; the others are those of ``run_backward``.
    """
    problem = plan.problem
    starts = segment_states(
        plan, k, v, GateInput((g,)), initial_state, cu, segments=segments, summary=states,
        heads=problem.state_heads, k_group=problem.k_group // problem.s_group,
    )  # fmt: skip
    ends = segment_states(
        plan, q, do, GateInput((g,)), dht, cu, segments=segments, summary=states, heads=problem.H,
        k_group=problem.q_group, g_group=problem.s_group, out_scale=scale, reverse=True,
    )  # fmt: skip
    return starts, ends


def run_backward(
    plan: Plan[BackwardConfig | ChunksBackwardConfig],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: GateInput,
    scale: float,
    initial_state: Tensor | None,
    do: Tensor,
    dht: Tensor | None,
    *,
    dh0: bool,
    cu: Tensor | None = None,
) -> Gradients:
    """Launch a backward pass. Inputs are validated and laid out as the kernels want them.

    Args:
        plan: sizes, config, kernels.
        q: ``[B, T, Hq, K]``.
        k: ``[B, T, Hk, K]``.
        v: ``[B, T, Hs, V]``.
        gate: of the forward pass.
        scale: factor on the queries.
        initial_state: ``[N, Hs, K, V]`` in fp32, or None.
        do: gradient of the output, ``[B, T, H, V]``.
        dht: gradient of the final state, ``[N, Hs, K, V]`` in fp32, or None for zeros.
        dh0: whether to return the gradient of the initial state.
        cu: ``[N + 1]`` in int32, boundaries of a packed batch; None for a dense one (N = B).

    Returns:
        ``dq``, ``dk``, ``dv`` and the gate's gradients, ``(dg,)`` or ``(dx, dweight, dbias)``, in
        the inputs' dtypes but dweight and dbias in fp32; ``dh0`` in fp32, or None.
    """
    problem = plan.problem
    dense = Plan(problem.dense, plan.config, plan.kernels)
    if gate.lowrank:
        from glac.lowrank_backward import gate_gradients, written_out

        g = written_out(plan, gate)
    else:
        assert gate.tensors[0] is not None
        g = gate.tensors[0]
    run: Any = _walk_back
    if isinstance(plan.config, ChunksBackwardConfig):
        from glac.chunks_backward import run_chunks_backward as run
    dq, dk, dv, dg, start_grads = run(
        dense, q, k, v, g, scale, initial_state, do, dht, dh0=dh0, cu=cu
    )
    if start_grads is not None and problem.s_group > 1:
        groups = (problem.state_heads, problem.s_group)
        start_grads = start_grads.unflatten(1, groups).sum(2)
    return (
        summed(dq, q.shape[2]),
        summed(dk, k.shape[2]),
        summed(dv, problem.state_heads),
        gate_gradients(plan, gate, dg) if gate.lowrank else (summed(dg, problem.state_heads),),
        start_grads,
    )


def _walk_back(
    plan: Plan[BackwardConfig],
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
    cu: Tensor | None,
) -> GradientParts:
    """Launch a ``BackwardConfig``; arguments are those of ``run_backward``, and a dense gate."""
    import torch

    from glac.validate import TORCH_DTYPES

    problem, config = plan.problem, plan.config
    spec = problem.spec
    B, T, H, K, V = problem.B, problem.T, problem.H, spec.K, spec.V
    N, state_heads = problem.sequences, problem.state_heads
    grads = config.grads
    way = cut(problem, config)
    segments, length = way.segments, way.length
    kept = math.ceil(min(length, T) / grads.kept_tokens)
    v_tiles = math.ceil(V / grads.block_v)
    unit_k, unit_v = stride_unit(K), stride_unit(V)
    q_strides, k_strides = strides(q, unit_k), strides(k, unit_k)
    v_strides, do_strides = strides(v, unit_v), strides(do, unit_v)
    g_strides = strides(g, unit_k)
    groups = (problem.q_group, problem.k_group, problem.s_group)
    packed = int(cu is not None)

    def scratch(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=q.device)

    dq, dk = gradient_parts(B, T, H, q, v_tiles), gradient_parts(B, T, H, k, v_tiles)
    dv, dg = gradient_parts(B, T, H, v, 1), gradient_parts(B, T, H, g, v_tiles)
    start_grads = scratch(N, H, K, V) if dh0 else None
    starts = ends = None
    if way.chained and segments > 1:
        # The gradient at the end of window j - 1 takes the place of the state before window j,
        # which nothing reads any more when it is written; with groups there are more of it.
        starts = scratch(B, H, segments, K, V)
        ends = starts.view(-1)[K * V :]
        if state_heads != H:
            ends = scratch(B, H, segments, K, V)
    elif config.states is None:
        ends = scratch(B, H, segments, K, V)  # from the programs themselves, for gla_bwd_exact
    elif not way.chained:
        at = (segments, length)
        starts, ends = border_states(
            plan, config.states, at, q, k, v, g, scale, initial_state, do, dht, cu
        )
    per_segment = tiles("gla_bwd", spec, grads) * B * H
    # Behind the kept states those that programs find again.
    elements = B * state_heads * kept * K * V + per_segment * grads.found_again
    states = scratch(way.at_once * elements, dtype=TORCH_DTYPES[state_dtype(spec)])
    flags = scratch(per_segment * way.at_once, dtype=torch.int32)

    first = segments
    while first > 0:
        last, first = first, max(0, first - way.at_once)
        count = last - first
        # The last window's walk starts at the first token, and leaves the windows' own starts.
        from_start = int(way.chained and last == segments > 1)
        if config.states is not None:
            plan.kernels["gla_states"].run(
                (k, v, g, cu, initial_state, starts, states, None),
                (
                    *(1.0, T, N, state_heads, segments, first, count, length),
                    *(grads.kept_tokens, kept, problem.k_group // problem.s_group, 1, 1),
                    *(0, 0, from_start, packed, int(initial_state is not None)),
                    *(*k_strides, *v_strides, *g_strides),
                ),
                tiles("gla_states", spec, config.states) * count * B * state_heads,
            )
        for name in ("gla_bwd", "gla_bwd_exact"):
            # On its way from the first token a program starts where the caller does.
            leading = name == "gla_bwd" and config.states is None
            plan.kernels[name].run(
                (
                    *(q, k, v, g, do, cu, *((initial_state,) if leading else ())),
                    *(states, dht, ends, dq, dk, dv, dg, start_grads, flags),
                ),
                (
                    *(scale, T, B, N, H, segments, first, count, length, kept),
                    *(*groups, int(way.chained), packed),
                    *((int(initial_state is not None),) if leading else ()),
                    *(int(dht is not None), int(dh0)),
                    *(*q_strides, *k_strides, *v_strides, *do_strides, *g_strides),
                ),
                per_segment * count,
            )
    if config.dv is not None:
        plan.kernels["gla_bwd_dv"].run(
            (q, k, g, do, cu, dht, ends, dv),
            (
                *(scale, T, N, H, segments, length, *groups),
                *(packed, int(dht is not None)),
                *(*q_strides, *k_strides, *do_strides, *g_strides),
            ),
            tiles("gla_bwd_dv", spec, config.dv) * segments * B * H,
        )
    return dq, dk, dv, dg, start_grads
