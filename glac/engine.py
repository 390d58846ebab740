"""One pass over real tensors: by kernels where ``glac.dispatch`` has some, else by PyTorch.

Nothing here records gradients; ``glac.autograd`` and ``glac.ops`` join the two passes.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from glac import dispatch
from glac.configs import MAX_SEGMENTS
from glac.errors import KernelNotFoundError
from glac.forward import run_forward
from glac.plan import GateInput, Gradients
from glac.problem import Op, Problem, Specialisation
from glac.settings import checked_mode, require_aot
from glac.templates import stride_unit
from glac.validate import MAX_PROGRAMS, MAX_TOKEN_STRIDE, check_gate_values

Result = tuple[Tensor, Tensor | None]
"""``o`` and the final state, if asked for."""

_warned: set[Specialisation] = set()
"""Specialisations whose backward pass is not served by kernels while the forward pass is."""


def _copied(tensor: Tensor) -> Tensor:
    """A contiguous copy in memory of its own, hence aligned."""
    return tensor.clone(memory_format=torch.contiguous_format)


def laid_out(tensor: Tensor, unit: int) -> Tensor:
    """``tensor`` in a layout the kernels read: a copy only where its own layout is unusable.

    Usable: last dimension contiguous, strides in whole units and in range, 16-byte aligned.
    """
    batch, token, head, last = tensor.stride()
    width = tensor.shape[-1]
    usable = (
        (last == 1 or width == 1)
        and batch % unit == token % unit == head % unit == 0
        and batch < unit * 2**31
        and head < unit * 2**31
        and width <= token < MAX_TOKEN_STRIDE
        and tensor.data_ptr() % 16 == 0
    )
    return tensor if usable else _copied(tensor)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """``tensor`` contiguous and 16-byte aligned: a copy only where it is not."""
    if tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % 16 == 0):
        return tensor
    return _copied(tensor)


def _launchable(problem: Problem, q: Tensor) -> bool:
    """Whether kernels could serve a problem, if there are any: it is on a GPU and fits a grid."""
    if not q.is_cuda:
        return False
    # The largest grid any config has; launches count programs in 31 bits.
    tiles = -(-max(problem.spec.K, problem.spec.V) // 16)
    segments = MAX_SEGMENTS + problem.packed
    return problem.B * problem.H * tiles * segments <= MAX_PROGRAMS


def _boundaries(cu: Tensor | None) -> Tensor | None:
    """``cu_seqlens`` as kernels read it. From int64 that is one more launch."""
    return None if cu is None else contiguous(cu.to(torch.int32))


def _laid_out_inputs(
    spec: Specialisation, q: Tensor, k: Tensor, v: Tensor, gate: GateInput
) -> tuple[Tensor, Tensor, Tensor, GateInput]:
    unit_k = stride_unit(spec.K)
    if gate.lowrank:
        x, weight, bias = gate.tensors
        assert x is not None
        x = laid_out(x.unsqueeze(2), stride_unit(spec.rank)).squeeze(2)
        tensors: tuple[Tensor | None, ...] = (x, contiguous(weight), contiguous(bias))
    else:
        assert gate.tensors[0] is not None
        tensors = (laid_out(gate.tensors[0], unit_k),)
    return (
        laid_out(q, unit_k),
        laid_out(k, unit_k),
        laid_out(v, stride_unit(spec.V)),
        GateInput(tensors, gate.inv_normalizer, gate.clamp),
    )


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
    plan = dispatch.resolve(problem, q.device.index)[1] if _launchable(problem, q) else None
    if plan is None:
        from glac import fallback

        return fallback.forward(
            problem, q, k, v, gate, scale, initial_state, output_final_state, chunk_size, cu
        )
    q, k, v, gate = _laid_out_inputs(problem.spec, q, k, v, gate)
    start, cu = contiguous(initial_state), _boundaries(cu)
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
    if _launchable(problem, q):
        decision, plan = dispatch.resolve(problem, q.device.index, Op.BACKWARD)
        if plan is None:
            _warn_of_slow_backward(problem, q, decision.reason)
    if plan is None:
        from glac import fallback

        return fallback.backward(
            problem, q, k, v, gate, scale, initial_state, do, dht, chunk_size, dh0, cu
        )
    from glac.backward import run_backward

    q, k, v, gate = _laid_out_inputs(problem.spec, q, k, v, gate)
    do = laid_out(do, stride_unit(problem.spec.V))
    arguments = (plan, q, k, v, gate, scale, contiguous(initial_state), do, contiguous(dht))
    cu = _boundaries(cu)
    if torch.cuda.current_device() == q.device.index:
        return run_backward(*arguments, dh0=dh0, cu=cu)
    with torch.cuda.device(q.device):
        return run_backward(*arguments, dh0=dh0, cu=cu)


def require_backward(problem: Problem, q: Tensor) -> None:
    """Where PyTorch may not stand in, find out before the forward pass runs.

    Raises:
        KernelNotFoundError: ``GLAC_REQUIRE_AOT=1`` and no pack has a backward kernel.
    """
    if not (require_aot() and _launchable(problem, q)):
        return
    try:
        dispatch.resolve(problem, q.device.index, Op.BACKWARD)
    except KernelNotFoundError as error:
        raise KernelNotFoundError(
            error.message, hint=f"{error.hint}; or call it in torch.no_grad(), without gradients"
        ) from None


def _warn_of_slow_backward(problem: Problem, q: Tensor, reason: str) -> None:
    """Once per specialisation, where the forward pass has kernels."""
    spec = problem.spec
    if spec in _warned or dispatch.resolve(problem, q.device.index)[1] is None:
        return
    _warned.add(spec)
    warnings.warn(
        f"glac computes gradients in PyTorch, many times slower than a kernel: no backward kernel "
        f"for {problem} ({reason}). Ship one: glac tune, glac build.",
        stacklevel=2,
    )
