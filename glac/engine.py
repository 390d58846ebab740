"""One pass over real tensors: by kernels where ``glac.dispatch`` has some, else by PyTorch.

Nothing here records gradients; ``glac.autograd`` and ``glac.ops`` join the two passes. Dispatch,
packs and launchers are imported by the first call on a GPU, so that importing glac is half as much
work.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glac.errors import KernelNotFoundError
from glac.gate import GateInput, Gradients
from glac.problem import Op, Problem, Specialisation
from glac.settings import checked_mode, require_aot
from glac.validate import MAX_PROGRAMS, check_gate_values

if TYPE_CHECKING:
    from glac.dispatch import Decision
    from glac.plan import Plan

Result = tuple[Tensor, Tensor | None]
"""``o`` and the final state, if asked for."""

_warned: set[Specialisation] = set()
"""Specialisations whose backward pass is not served by kernels while the forward pass is."""


def launchable(problem: Problem, q: Tensor) -> bool:
    """Whether kernels could serve a problem, if there are any: it is on a GPU and fits a grid."""
    if not q.is_cuda:
        return False
    from glac.configs import MAX_SEGMENTS

    # The largest grid any config has; launches count programs in 31 bits.
    tiles = -(-max(problem.spec.K, problem.spec.V) // 16)
    segments = MAX_SEGMENTS + problem.packed
    return problem.B * problem.H * tiles * segments <= MAX_PROGRAMS


def _resolve(problem: Problem, q: Tensor, op: Op) -> tuple[Decision, Plan[Any] | None]:
    from glac import dispatch

    return dispatch.resolve(problem, q.device.index, op)


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
    """The forward pass. Tensors are validated and belong to ``problem``.

    Args:
        problem: their specialisation and sizes.
        q: ``[B, T, Hq, K]``, of any layout, as all tensors here.
        k: ``[B, T, Hk, K]``.
        v: ``[B, T, Hs, V]``.
        gate: ``g [B, T, Hs, K]``, or what the low-rank gate is made of.
        scale: factor on the queries.
        initial_state: ``[N, Hs, K, V]`` in fp32, or None.
        output_final_state: whether to return the state after the last token.
        chunk_size: tokens per chunk of the PyTorch form.
        cu: ``[N + 1]``, boundaries of a packed batch; None for a dense one (N = B).

    Returns:
        ``o [B, T, H, V]`` in the input dtype; the final state ``[N, Hs, K, V]`` in fp32, or None.

    Raises:
        InputError: checked mode, and a gate is positive or NaN.
        KernelNotFoundError: ``GLAC_REQUIRE_AOT=1`` and no pack serves this problem.
    """
    if not gate.lowrank and checked_mode():
        assert gate.tensors[0] is not None
        check_gate_values(gate.tensors[0])
    plan = _resolve(problem, q, Op.FORWARD)[1] if launchable(problem, q) else None
    if plan is None:
        from glac import fallback

        return fallback.forward(
            problem, q, k, v, gate, scale, initial_state, output_final_state, chunk_size, cu
        )
    from glac.forward import run_forward
    from glac.layouts import boundaries, contiguous, laid_out_inputs

    q, k, v, gate = laid_out_inputs(problem.spec, q, k, v, gate)
    start, cu = contiguous(initial_state), boundaries(cu)
    arguments = (plan, q, k, v, gate, scale, start, output_final_state, cu)
    if torch.cuda.current_device() == q.device.index:  # the guard alone costs 5 us
        return run_forward(*arguments)
    with torch.cuda.device(q.device):
        return run_forward(*arguments)


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
    *,
    dh0: bool,
    cu: Tensor | None = None,
) -> Gradients:
    """The backward pass, from the inputs of ``forward`` and the gradients of its results.

    Args:
        problem: as for ``forward``, like the other arguments not named here.
        q: ``[B, T, Hq, K]``.
        k: ``[B, T, Hk, K]``.
        v: ``[B, T, Hs, V]``.
        gate: of the forward pass.
        scale: factor on the queries.
        initial_state: ``[N, Hs, K, V]`` in fp32, or None.
        do: gradient of ``o``, ``[B, T, H, V]``.
        dht: gradient of the final state, ``[N, Hs, K, V]`` in fp32, or None for zeros.
        chunk_size: tokens per chunk of the PyTorch form.
        dh0: whether to return the gradient of the initial state.
        cu: as for ``forward``.

    Returns:
        ``dq``, ``dk``, ``dv`` and ``dg`` or ``dx`` in the dtypes of their inputs; ``dweight``,
        ``dbias`` and ``dh0`` in fp32.

    Raises:
        KernelNotFoundError: ``GLAC_REQUIRE_AOT=1`` and no pack has a backward kernel.
    """
    plan = None
    if launchable(problem, q):
        decision, plan = _resolve(problem, q, Op.BACKWARD)
        if plan is None:
            _warn_of_slow_backward(problem, q, decision.reason)
    if plan is None:
        from glac import fallback

        return fallback.backward(
            problem, q, k, v, gate, scale, initial_state, do, dht, chunk_size, dh0, cu
        )
    from glac.backward import run_backward
    from glac.layouts import boundaries, contiguous, laid_out, laid_out_inputs
    from glac.templates import stride_unit

    q, k, v, gate = laid_out_inputs(problem.spec, q, k, v, gate)
    do = laid_out(do, stride_unit(problem.spec.V))
    arguments = (plan, q, k, v, gate, scale, contiguous(initial_state), do, contiguous(dht))
    cu = boundaries(cu)
    if torch.cuda.current_device() == q.device.index:
        return run_backward(*arguments, dh0=dh0, cu=cu)
    with torch.cuda.device(q.device):
        return run_backward(*arguments, dh0=dh0, cu=cu)


def require_backward(problem: Problem, q: Tensor) -> None:
    """Where PyTorch may not stand in, find out before the forward pass runs.

    Raises:
        KernelNotFoundError: ``GLAC_REQUIRE_AOT=1`` and no pack has a backward kernel.
    """
    if not (require_aot() and launchable(problem, q)):
        return
    try:
        _resolve(problem, q, Op.BACKWARD)
    except KernelNotFoundError as error:
        raise KernelNotFoundError(
            error.message, hint=f"{error.hint}; or call it in torch.no_grad(), without gradients"
        ) from None


def _warn_of_slow_backward(problem: Problem, q: Tensor, reason: str) -> None:
    """Once per specialisation, where the forward pass has kernels."""
    spec = problem.spec
    if spec in _warned or _resolve(problem, q, Op.FORWARD)[1] is None:
        return
    _warned.add(spec)
    warnings.warn(
        f"glac computes gradients in PyTorch, many times slower than a kernel: no backward kernel "
        f"for {problem} ({reason}). Ship one: glac tune, glac build.",
        stacklevel=2,
    )
