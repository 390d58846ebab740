"""Gated linear attention, chunkwise: the public operations.

    S_t = diag(exp g_t) S_{t-1} + k_t^T v_t          o_t = scale * q_t S_t

Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training",
arXiv 2312.06635. CUDA tensors run precompiled kernels when a pack has one for the problem (see
``glac.dispatch``), everything else runs the same mathematics in PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glac import dispatch
from glac.configs import MAX_SEGMENTS
from glac.errors import InputError, NotDifferentiableError
from glac.forward import STEP_MIN, ForwardPlan, GateInput, run_forward
from glac.problem import Problem
from glac.settings import checked_mode
from glac.templates import stride_unit
from glac.validate import (
    MAX_PROGRAMS,
    MAX_TOKEN_STRIDE,
    check_chunk_size,
    check_gate_values,
    check_lowrank,
    check_scalar,
    check_vector,
)

__all__ = ["chunk_gla", "chunk_gla_lowrank"]


def _copied(tensor: Tensor) -> Tensor:
    """A contiguous copy in memory of its own, hence aligned."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _laid_out(tensor: Tensor, unit: int) -> Tensor:
    """``tensor`` in a layout the kernels read: a copy only where its own layout is unusable.

    Usable: last dimension contiguous, strides in whole units and in range, 16-byte aligned.
    """
    *outer, last = tensor.stride()
    usable = (
        (last == 1 or tensor.shape[-1] == 1)
        and all(0 <= s // unit < 2**31 and s % unit == 0 for s in outer)
        and tensor.shape[-1] <= outer[1] < MAX_TOKEN_STRIDE
        and tensor.data_ptr() % 16 == 0
    )
    return tensor if usable else _copied(tensor)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % 16 == 0):
        return tensor
    return _copied(tensor)


class _ForwardOnly(torch.autograd.Function):
    """Carries ``requires_grad`` through the kernels so that a backward call can say what is up."""

    @staticmethod
    def forward(ctx: Any, run: Any, *tensors: Tensor | None) -> Any:
        return run(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotDifferentiableError(
            "the kernels have no backward pass yet",
            hint="glac.reference.chunk_gla is differentiable; wrap inference in torch.no_grad()",
        )


def _plan(problem: Problem, device: int) -> ForwardPlan | None:
    """The plan that serves ``problem``, or ``None`` if PyTorch should."""
    # The largest grid any config has; launches count programs in 31 bits.
    if problem.B * problem.H * -(-problem.spec.V // 16) * MAX_SEGMENTS > MAX_PROGRAMS:
        return None
    return dispatch.resolve(problem, device)[1]


def _run_kernels(
    plan: ForwardPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: GateInput,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run ``plan`` on q's device, with tensors copied where kernels cannot read their layout."""
    device, spec = q.device.index, plan.problem.spec
    unit_k, unit_v = stride_unit(spec.K), stride_unit(spec.V)
    if gate.lowrank:
        x, weight, bias = gate.tensors
        assert x is not None
        x = _laid_out(x.unsqueeze(2), stride_unit(spec.rank)).squeeze(2)
        laid: tuple[Tensor | None, ...] = (x, _contiguous(weight), _contiguous(bias))
    else:
        assert gate.tensors[0] is not None
        laid = (_laid_out(gate.tensors[0], unit_k),)
    arguments = (
        plan,
        _laid_out(q, unit_k),
        _laid_out(k, unit_k),
        _laid_out(v, unit_v),
        GateInput(laid, gate.inv_normalizer, gate.clamp),
        scale,
        _contiguous(initial_state),
        output_final_state,
    )
    if torch.cuda.current_device() == device:  # the guard alone costs 5 us
        return run_forward(*arguments)
    with torch.cuda.device(device):
        return run_forward(*arguments)


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _call(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: GateInput,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """The result from kernels, or ``None`` if PyTorch should serve the call."""
    plan = _plan(problem, q.device.index)
    if plan is None:
        return None
    if not _wants_grad(q, k, v, *gate.tensors, initial_state):
        return _run_kernels(plan, q, k, v, gate, scale, initial_state, output_final_state)

    def run(q: Tensor, k: Tensor, v: Tensor, h0: Tensor | None, *tensors: Tensor | None) -> Any:
        inner = GateInput(tensors, gate.inv_normalizer, gate.clamp)
        return _run_kernels(plan, q, k, v, inner, scale, h0, output_final_state)

    result: tuple[Tensor, Tensor | None] = _ForwardOnly.apply(  # type: ignore[no-untyped-call]
        run, q, k, v, initial_state, *gate.tensors
    )
    return result


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention with a dense per-channel gate.

    Args:
        q: queries ``[B, T, H, K]`` in bf16, fp16 or fp32; any T >= 1, K <= 256.
        k: keys ``[B, T, H, K]``.
        v: values ``[B, T, H, V]``, V <= 512.
        g: forget gate ``[B, T, H, K]`` in q's dtype or fp32: the natural logarithm of each step's
            decay, not cumulative, ``<= 0``. ``-inf`` resets a channel. A step decays by at most
            e^-111. Positive gates are an error in checked mode (``GLAC_CHECKED=1``) and undefined
            otherwise.
        scale: factor on the queries, default ``K ** -0.5``.
        initial_state: ``[B, H, K, V]`` in fp32, default zeros.
        output_final_state: also return the state after the last token.
        chunk_size: tokens per chunk of the PyTorch path. The kernels' chunk is part of their tuned
            config and not affected.

    Returns:
        ``o [B, T, H, V]`` in q's dtype, and the final state ``[B, H, K, V]`` in fp32 or ``None``.

    Raises:
        InputError: a shape or value is wrong.
        InputTypeError: a dtype or device is wrong.
        KernelNotFoundError: ``GLAC_REQUIRE_AOT=1`` and no pack serves this problem.
    """
    problem = check_vector(q, k, v, g, initial_state)
    factor = problem.spec.K**-0.5 if scale is None else check_scalar("scale", scale)
    chunk = check_chunk_size(chunk_size)
    if checked_mode():
        check_gate_values(g)
    if q.is_cuda:
        result = _call(
            problem, q, k, v, GateInput((g,)), factor, initial_state, output_final_state
        )
        if result is not None:
            return result
    return _torch_chunk(q, k, v, g, factor, initial_state, output_final_state, chunk)


def chunk_gla_lowrank(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    normalizer: float = 16.0,
    clamp_min: float | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention whose gate is computed inside the kernel from a low-rank input.

        g = max(logsigmoid(x @ weight.T + bias) / normalizer, clamp_min)

    This is the gate of the paper's layer (section 4.3). The ``[B, T, H, K]`` gate never exists in
    memory.

    Args:
        q: queries ``[B, T, H, K]`` in bf16, fp16 or fp32.
        k: keys ``[B, T, H, K]``.
        v: values ``[B, T, H, V]``.
        x: gate input ``[B, T, R]`` in q's dtype, R one of 8, 16, 32, 64.
        weight: ``[H*K, R]`` in q's dtype, as ``torch.nn.Linear`` stores it.
        bias: ``[H*K]`` in q's dtype or fp32, or ``None``.
        normalizer: the gate logits' divisor (tau), > 0.
        clamp_min: lower bound of g (natural log, <= 0), default none.
        scale: factor on the queries, default ``K ** -0.5``.
        initial_state: ``[B, H, K, V]`` in fp32, default zeros.
        output_final_state: also return the state after the last token.
        chunk_size: as for ``chunk_gla``.

    Returns:
        As ``chunk_gla``.

    Raises:
        InputError: a shape or value is wrong.
        InputTypeError: a dtype or device is wrong.
        KernelNotFoundError: ``GLAC_REQUIRE_AOT=1`` and no pack serves this problem.
    """
    problem = check_lowrank(q, k, v, x, weight, bias, initial_state)
    factor = problem.spec.K**-0.5 if scale is None else check_scalar("scale", scale)
    tau = check_scalar("normalizer", normalizer, positive=True)
    chunk = check_chunk_size(chunk_size)
    clamp = STEP_MIN if clamp_min is None else check_scalar("clamp_min", clamp_min)
    if clamp > 0:
        raise InputError(f"clamp_min must be <= 0 (a bound on a log-decay), got {clamp}")
    if q.is_cuda:
        gate = GateInput((x, weight, bias), 1.0 / tau, clamp)
        result = _call(problem, q, k, v, gate, factor, initial_state, output_final_state)
        if result is not None:
            return result
    from glac.reference import lowrank_gate

    g = lowrank_gate(x, weight, bias, num_heads=problem.H, normalizer=tau, clamp_min=clamp_min)
    return _torch_chunk(q, k, v, g, factor, initial_state, output_final_state, chunk)


def _torch_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor | None]:
    from glac import reference

    return reference.chunk_gla(
        q,
        k,
        v,
        g,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        chunk_size=chunk_size,
    )
