"""Run a backward config: the launches of one backward pass, by the kernels' ABI.

    for each window of the sequence, from the last to the first:
        gla_bwd_states   the state at the start of each of its chunks
        gla_bwd          dq, dk, the gate's gradient (and dv), and dS at the window's start
        gla_bwd_exact    again, where gates left the fast kernel's range
    gla_bwd_dv           dv, where gla_bwd does not make it

Windows bound what is kept: chunk states of the whole sequence would take as much memory as all
gradients together. The forward pass saves nothing but its inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glac.configs import BackwardConfig
from glac.plan import GateInput, Gradients, Plan, gate_arguments, strides
from glac.templates import state_dtype, stride_unit, tiles
from glac.validate import TORCH_DTYPES
from glac.windows import windows as windows  # tests put others in its place


def _parts(like: Tensor, parts: int) -> Tensor:
    """Memory for the gradient of ``like``, in as many parts as tiles make it from."""
    return torch.empty((parts, *like.shape), dtype=like.dtype, device=like.device)


def _summed(parts: Tensor) -> Tensor:
    """The parts' sum, added in fp32 and in a fixed order."""
    if parts.shape[0] == 1:
        return parts[0]
    # As one addition of whole tensors it takes half the time of a reduction.
    return torch.add(parts[0], parts[1]) if parts.shape[0] == 2 else parts.sum(0)


def run_backward(
    plan: Plan[BackwardConfig],
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
) -> Gradients:
    """Launch a backward pass. Inputs are validated and laid out as the kernels want them.

    Args:
        plan: sizes, config, kernels.
        q: ``[B, T, H, K]``.
        k: ``[B, T, H, K]``.
        v: ``[B, T, H, V]``.
        gate: of the forward pass.
        scale: factor on the queries.
        initial_state: ``[B, H, K, V]`` in fp32, or None.
        do: gradient of the output, ``[B, T, H, V]``.
        dht: gradient of the final state, ``[B, H, K, V]`` in fp32, or None for zeros.
        dh0: whether to return the gradient of the initial state.

    Returns:
        ``dq``, ``dk``, ``dv`` and the gate's gradients, ``(dg,)`` or ``(dx, dweight, dbias)``, in
        the inputs' dtypes but dweight and dbias in fp32; ``dh0`` in fp32, or None.
    """
    problem, config = plan.problem, plan.config
    spec = problem.spec
    B, T, H, K, V = problem.B, problem.T, problem.H, spec.K, spec.V
    heads = B * H
    grads = config.grads
    chunk = grads.chunk
    n_windows, window = windows(problem, chunk)
    k_tiles, v_tiles = math.ceil(K / grads.block_k), math.ceil(V / grads.block_v)
    args = gate_arguments(gate, spec)
    unit_k, unit_v = stride_unit(K), stride_unit(V)
    q_strides, k_strides = strides(q, unit_k), strides(k, unit_k)
    v_strides, do_strides = strides(v, unit_v), strides(do, unit_v)

    def scratch(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=q.device)

    dq, dk = _parts(q, v_tiles), _parts(k, v_tiles)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    gate_parts: tuple[Tensor, ...]
    if gate.lowrank:
        rank = spec.rank
        gate_parts = (
            scratch(v_tiles, B, H * k_tiles, T, rank),
            scratch(n_windows, v_tiles * B, H * K, rank),
            scratch(n_windows, v_tiles * B, H * K),
        )
    else:
        assert gate.tensors[0] is not None
        gate_parts = (_parts(gate.tensors[0], v_tiles),)

    slots = math.ceil(window / chunk)
    states = scratch(heads, slots, K, V, dtype=TORCH_DTYPES[state_dtype(spec)])
    n_marks = n_windows - 1  # the last window starts where the walk over all others ends
    marks = scratch(heads, n_marks, K, V) if n_marks else None
    flags = scratch(heads * k_tiles * v_tiles, dtype=torch.int32)
    grid_states = tiles("gla_bwd_states", spec, config.states) * heads
    grid = tiles("gla_bwd", spec, grads) * heads

    def keep_states(
        begin: int, end: int, keep_from: int, start: Tensor | None, start_slots: int
    ) -> None:
        plan.kernels["gla_bwd_states"].run(
            (k, v, *gate.tensors, start, states, marks),
            (
                *(*args.scalars, T, H, begin, end, keep_from, chunk, window),
                *(start_slots, n_marks, int(start is not None), *args.flag),
                *(*k_strides, *v_strides, *args.strides),
            ),
            grid_states,
        )

    d_state = dht
    for index in reversed(range(n_windows)):
        begin, end = index * window, min(T, (index + 1) * window)
        if index == n_windows - 1:
            keep_states(0, end, begin, initial_state, 1)  # and marks the windows before
        elif index == 0:
            keep_states(begin, end, begin, initial_state, 1)
        else:
            assert marks is not None
            keep_states(begin, end, begin, marks[:, index], n_marks)
        wanted = dh0 or index > 0
        before = scratch(B, H, K, V) if wanted else None
        parts = (gate_parts[0], *(part[index] for part in gate_parts[1:]))
        tensors = (q, k, v, *gate.tensors, do, states, d_state, dq, dk, dv, *parts, before, flags)
        scalars = (
            *(scale, *args.scalars, T, B, H, begin, end),
            *(int(d_state is not None), int(wanted), *args.flag),
            *(*q_strides, *k_strides, *v_strides, *do_strides, *args.strides),
        )
        plan.kernels["gla_bwd"].run(tensors, scalars, grid)
        plan.kernels["gla_bwd_exact"].run(tensors, scalars, grid)
        d_state = before
    if config.dv is not None:
        plan.kernels["gla_bwd_dv"].run(
            (q, k, *gate.tensors, do, dht, dv),
            (
                *(scale, *args.scalars, T, H, int(dht is not None), *args.flag),
                *(*q_strides, *k_strides, *do_strides, *args.strides),
            ),
            tiles("gla_bwd_dv", spec, config.dv) * heads,
        )
    return _summed(dq), _summed(dk), dv, _gate_gradients(gate, gate_parts), d_state


def _gate_gradients(gate: GateInput, parts: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    if not gate.lowrank:
        return (_summed(parts[0]),)
    x, _, bias = gate.tensors
    assert x is not None
    dx, dw, db = parts
    return (
        dx.sum((0, 2)).to(x.dtype),
        dw.sum((0, 1)),
        None if bias is None else db.sum((0, 1)),
    )
