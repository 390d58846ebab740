"""Gated linear attention: the public operations.

    S_t = diag(exp g_t) S_{t-1} + k_t^T v_t          o_t = scale * q_t S_t

``chunk_gla`` and ``chunk_gla_lowrank`` take a gate for each channel, ``chunk_simple_gla`` one for
each token and head, ``chunk_retention`` one for each head and ``chunk_linear_attn`` none. The last
three share kernels, which are faster. ``recurrent_gla`` and ``recurrent_gla_lowrank`` decode.

Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training",
arXiv 2312.06635. CUDA tensors run precompiled kernels when a pack has them for the problem (see
``glac.dispatch``), everything else runs the same mathematics in PyTorch.

The chunk operations are differentiable once, in every tensor and through both results. A call
keeps its inputs for the backward pass and nothing else. Where kernels serve the forward pass but
not the backward pass, PyTorch computes the gradients, with one warning per specialisation; with
``GLAC_REQUIRE_AOT=1`` that is an error of the forward call, or, in compiled code, of the backward
call. ``torch.compile``, ``torch.export``, ``torch.func.grad`` and ``vjp`` work; ``vmap`` works as
a loop, so it gains no speed. Forward-mode and second derivatives raise ``NotDifferentiableError``,
and ``torch.func`` inside a compiled function is not supported.

**Long sequences** can be cut into segments, each call starting from the final state of the last:

    for piece in pieces:
        o, state = chunk_gla(*piece, initial_state=state, output_final_state=True)

Passed on like this, the state carries the gradient, and one ``backward`` through all segments
gives the gradient of the whole sequence. Passing on ``state.detach()`` cuts the gradient between
segments (truncated back-propagation through time): outputs are the same, and each segment can do
its own ``backward`` and release its memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glac.autograd import attend
from glac.decode import recurrent_gla, recurrent_gla_lowrank
from glac.errors import InputError
from glac.plan import STEP_MIN, GateInput
from glac.scalar import ScalarInputs
from glac.scalar import check as check_scalar_gated
from glac.scalar_autograd import attend as attend_scalar
from glac.validate import check_chunk_size, check_lowrank, check_scalar, check_vector

__all__ = [
    "chunk_gla",
    "chunk_gla_lowrank",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "recurrent_gla",
    "recurrent_gla_lowrank",
]


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
            decay, not cumulative, ``<= 0``. ``-inf`` resets a channel; its gradient is 0, in
            kernels up to rounding. A step decays by at most e^-111. Positive gates are an error in
            checked mode (``GLAC_CHECKED=1``) and undefined otherwise.
        scale: factor on the queries, default ``K ** -0.5``.
        initial_state: ``[B, H, K, V]`` in fp32, default zeros. Its gradient is fp32 too.
        output_final_state: also return the state after the last token.
        chunk_size: tokens per chunk of the PyTorch path. The kernels' chunk is part of their tuned
            config and not affected.

    Returns:
        ``o [B, T, H, V]`` in q's dtype, and the final state ``[B, H, K, V]`` in fp32 or ``None``.

    Raises:
        InputError: a shape or value is wrong.
        InputTypeError: a dtype or device is wrong.
        KernelNotFoundError: ``GLAC_REQUIRE_AOT=1`` and no pack serves this problem, or its
            backward pass if a gradient is wanted.
        NotDifferentiableError: an input has a forward-mode tangent.
    """
    problem = check_vector(q, k, v, g, initial_state)
    factor = problem.spec.K**-0.5 if scale is None else check_scalar("scale", scale)
    chunk = check_chunk_size(chunk_size)
    return attend(
        problem, q, k, v, GateInput((g,)), factor, initial_state, output_final_state, chunk
    )


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
        As ``chunk_gla``. Gradients of weight and bias are computed in fp32.

    Raises:
        InputError: a shape or value is wrong.
        InputTypeError: a dtype or device is wrong.
        KernelNotFoundError: ``GLAC_REQUIRE_AOT=1`` and no pack serves this problem, or its
            backward pass if a gradient is wanted.
        NotDifferentiableError: an input has a forward-mode tangent.
    """
    problem = check_lowrank(q, k, v, x, weight, bias, initial_state)
    factor = problem.spec.K**-0.5 if scale is None else check_scalar("scale", scale)
    tau = check_scalar("normalizer", normalizer, positive=True)
    chunk = check_chunk_size(chunk_size)
    clamp = STEP_MIN if clamp_min is None else check_scalar("clamp_min", clamp_min)
    if clamp > 0:
        raise InputError(f"clamp_min must be <= 0 (a bound on a log-decay), got {clamp}")
    gate = GateInput((x, weight, bias), 1.0 / tau, clamp)
    return attend(problem, q, k, v, gate, factor, initial_state, output_final_state, chunk)


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with one forget gate per token and head (simple GLA, Mamba-2's SSD).

        S_t = exp(g_t) S_{t-1} + k_t^T v_t          o_t = scale * q_t S_t

    Args:
        q: queries ``[B, T, Hq, K]`` in bf16, fp16 or fp32; K <= 256.
        k: keys ``[B, T, Hk, K]``.
        v: values ``[B, T, H, V]``, V <= 512. Hk divides H; Hq divides H or is a multiple of it.
            Heads that share a tensor are neighbours, and gradients of shared tensors are summed.
        g: forget gate ``[B, T, H]`` in q's dtype or fp32: the natural logarithm of each step's
            decay, not cumulative, ``<= 0``. ``-inf`` resets a head; its gradient is 0. A step
            decays by at most e^-111. Positive gates are an error in checked mode
            (``GLAC_CHECKED=1``) and undefined otherwise.
        scale: factor on the queries, default ``K ** -0.5``.
        initial_state: ``[N, H, K, V]`` in fp32, default zeros. N is B, or the number of packed
            sequences.
        output_final_state: also return the state after the last token.
        cu_seqlens: ``[N + 1]`` in int32, on the device: offsets of N sequences that are packed
            into tensors of batch size 1; each may be empty. Checked in checked mode; otherwise
            kernels clamp offsets that are wrong to the tensors.
        chunk_size: tokens per chunk of the PyTorch path.

    Returns:
        ``o [B, T, max(Hq, H), V]`` in q's dtype, and the final state ``[N, H, K, V]`` in fp32 or
        ``None``.

    Raises:
        InputError: a shape or value is wrong.
        InputTypeError: a dtype or device is wrong.
        KernelNotFoundError: ``GLAC_REQUIRE_AOT=1`` and no pack serves this problem, or its
            backward pass if a gradient is wanted.
        NotDifferentiableError: an input has a forward-mode tangent.
    """
    if g is None:
        raise InputError("g must be [B, T, H], got None", hint="chunk_linear_attn has no gate")
    i = ScalarInputs(q, k, v, g, initial_state, cu_seqlens)
    return _scalar(i, scale, output_final_state, chunk_size)


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Retention: linear attention whose heads decay at constant rates of their own.

    ``chunk_simple_gla`` with the gate of a head the same at every token. Source: Sun et al.,
    "Retentive Network", arXiv 2307.08621.

    Args:
        q: queries ``[B, T, Hq, K]``, with k and v as for ``chunk_simple_gla``.
        k: keys ``[B, T, Hk, K]``.
        v: values ``[B, T, H, V]``.
        g: natural logarithm of each head's decay per token ``[H]``, <= 0, in q's dtype or fp32;
            by default RetNet's, ``log(1 - 2 ** (-5 - h))`` for head h.
        scale, initial_state, output_final_state, cu_seqlens, chunk_size: as there.

    Returns:
        As ``chunk_simple_gla``.

    Raises:
        InputError, InputTypeError, KernelNotFoundError, NotDifferentiableError: likewise.
    """
    if g is None and isinstance(v, Tensor) and v.dim() == 4:
        heads = torch.arange(v.shape[2], device=v.device, dtype=torch.float32)
        g = torch.log1p(-torch.exp2(-5.0 - heads))
    elif isinstance(g, Tensor) and g.dim() != 1:
        raise InputError(
            f"g must be [H], one decay per head, got shape {tuple(g.shape)}",
            hint="chunk_simple_gla takes a gate for each token, [B, T, H]",
        )
    i = ScalarInputs(q, k, v, g, initial_state, cu_seqlens)
    return _scalar(i, scale, output_final_state, chunk_size)


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention that forgets nothing: ``chunk_simple_gla`` without a gate.

    Args:
        q: queries ``[B, T, Hq, K]``, with k and v as for ``chunk_simple_gla``.
        k: keys ``[B, T, Hk, K]``.
        v: values ``[B, T, H, V]``.
        scale, initial_state, output_final_state, cu_seqlens, chunk_size: as there.

    Returns:
        As ``chunk_simple_gla``.

    Raises:
        InputError, InputTypeError, KernelNotFoundError, NotDifferentiableError: likewise.
    """
    i = ScalarInputs(q, k, v, None, initial_state, cu_seqlens)
    return _scalar(i, scale, output_final_state, chunk_size)


def _scalar(
    i: ScalarInputs, scale: float | None, output_final_state: bool, chunk_size: int | None
) -> tuple[Tensor, Tensor | None]:
    problem = check_scalar_gated(i).problem
    factor = problem.spec.K**-0.5 if scale is None else check_scalar("scale", scale)
    chunk = check_chunk_size(chunk_size)
    return attend_scalar(i, factor, bool(output_final_state), chunk)
