"""Both passes in PyTorch, for whatever no kernel serves: CPU tensors, unlisted devices.

The forms in ``glac.reference`` take one gate and one state per head and sequences of one length.
Here heads that share an input get copies of it, whose gradients are added up, and a packed batch
is done sequence by sequence, which reads ``cu_seqlens`` on the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from glac import reference
from glac.gate import STEP_MIN, GateInput, Gradients
from glac.problem import Problem

Result = tuple[Tensor, Tensor | None]


def _heads(x: Tensor, problem: Problem, dim: int = 2) -> Tensor:
    """``x`` with a copy for each head of the output."""
    group = problem.H // x.shape[dim]
    return x if group == 1 else x.repeat_interleave(group, dim)


def _per_input(x: Tensor, heads: int, dim: int = 2) -> Tensor:
    """The sum over heads of the output that share an input, in fp32 at least."""
    if x.shape[dim] == heads:
        return x
    return torch.unflatten(x, dim, (heads, -1)).sum(dim + 1)


def _sequences(problem: Problem, cu: Tensor | None) -> Iterator[tuple[slice, slice, slice]]:
    """Of each part with one length: its rows, tokens and states. Boundaries are clamped."""
    everything = slice(None)
    if cu is None:
        yield everything, everything, everything
        return
    bounds = cu.clamp(0, problem.T).tolist()
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        yield everything, slice(begin, max(begin, end)), slice(n, n + 1)


def _first_of_group(state: Tensor, problem: Problem) -> Tensor:
    """A state for each head of the output, in the first head of its group, else zeros."""
    if problem.s_group == 1:
        return state
    wide = state.new_zeros((state.shape[0], problem.H, *state.shape[2:]))
    wide[:, :: problem.s_group] = state
    return wide


def forward(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: GateInput,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    chunk_size: int,
    cu: Tensor | None = None,
) -> Result:
    """The forward pass; arguments and results as those of ``glac.engine.forward``."""
    q, k, v, g = (_heads(x, problem) for x in (q, k, v, dense_gate(problem, gate)))
    start = None if initial_state is None else _heads(initial_state, problem, 1)
    size = (problem.sequences, problem.H, problem.spec.K, problem.spec.V)
    if cu is None:
        o, state = reference.chunk_gla(
            q,
            k,
            v,
            g,
            scale=scale,
            initial_state=start,
            output_final_state=output_final_state,
            chunk_size=chunk_size,
        )
    else:
        o = v.new_zeros(v.shape)
        state = start.clone() if start is not None else q.new_zeros(size, dtype=torch.float32)
        for rows, tokens, n in _sequences(problem, cu):
            if tokens.start < tokens.stop:
                at = rows, tokens
                o[at], final = reference.chunk_gla(
                    q[at],
                    k[at],
                    v[at],
                    g[at],
                    scale=scale,
                    initial_state=None if start is None else start[n],
                    output_final_state=True,
                    chunk_size=chunk_size,
                )
                assert final is not None
                state[n] = final
    if not output_final_state:
        return o, None
    assert state is not None
    return o, state[:, :: problem.s_group].contiguous()


def backward(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: GateInput,
    scale: float,
    initial_state: Tensor | None,
    do: Tensor,
    dht: Tensor | None,
    chunk_size: int,
    dh0: bool,
    cu: Tensor | None = None,
) -> Gradients:
    """The backward pass; arguments and results as those of ``glac.engine.backward``."""
    shared = dense_gate(problem, gate)
    wide = [_heads(x, problem) for x in (q, k, v, shared)]
    start = None if initial_state is None else _heads(initial_state, problem, 1)
    end = None if dht is None else _first_of_group(dht, problem)
    size = (problem.sequences, problem.H, problem.spec.K, problem.spec.V)
    grads = [torch.zeros_like(x) for x in wide]
    # A sequence without tokens passes on what it gets.
    dstate = q.new_zeros(size, dtype=torch.float32) if end is None else end.clone()
    for rows, tokens, n in _sequences(problem, cu):
        at = rows, tokens
        if do[at].shape[1]:
            *parts, dstart = reference.chunk_gla_backward(
                wide[0][at],
                wide[1][at],
                wide[2][at],
                wide[3][at],
                do[at],
                scale=scale,
                initial_state=None if start is None else start[n],
                dht=None if end is None else end[n],
                chunk_size=chunk_size,
            )
            for grad, part in zip(grads, parts, strict=True):
                grad[at] = part
            if dstart is not None:  # there is one for each initial state
                dstate[n] = dstart
    dq, dk, dv, dg = (
        _per_input(grad, x.shape[2]) for grad, x in zip(grads, (q, k, v, shared), strict=True)
    )
    first = _per_input(dstate, problem.state_heads, 1) if dh0 else None
    if not gate.lowrank:
        return dq, dk, dv, (dg,), first
    x, weight, bias = gate.tensors
    assert x is not None
    assert weight is not None
    gates = reference.lowrank_gate_backward(
        x, weight, bias, dg, normalizer=1 / gate.inv_normalizer, clamp_min=_clamp_min(gate)
    )
    return dq, dk, dv, gates, first


def _clamp_min(gate: GateInput) -> float | None:
    """The caller's bound: a step below ``STEP_MIN`` decays by 0 in fp32 with or without one."""
    return gate.clamp if gate.clamp > STEP_MIN else None


def dense_gate(problem: Problem, gate: GateInput) -> Tensor:
    """``g [B, T, Hs, K]``."""
    if not gate.lowrank:
        assert gate.tensors[0] is not None
        return gate.tensors[0]
    x, weight, bias = gate.tensors
    assert x is not None
    assert weight is not None
    return reference.lowrank_gate(
        x,
        weight,
        bias,
        num_heads=problem.state_heads,
        normalizer=1 / gate.inv_normalizer,
        clamp_min=_clamp_min(gate),
    )
