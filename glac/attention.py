"""Gated linear attention, chunkwise: the public operations.

    S_t = diag(exp g_t) S_{t-1} + k_t^T v_t          o_t = scale * q_t S_t

Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training",
arXiv 2312.06635. CUDA tensors run precompiled kernels when a pack has them for the problem (see
``glac.dispatch``), everything else runs the same mathematics in PyTorch.

Both operations are differentiable once, in every tensor and through both results. A call keeps its
inputs for the backward pass and nothing else. Where kernels serve the forward pass but not the
backward pass, PyTorch computes the gradients, with one warning per specialisation; with
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

from torch import Tensor

from glac.autograd import attend
from glac.errors import InputError
from glac.plan import STEP_MIN, GateInput
from glac.validate import check_chunk_size, check_lowrank, check_scalar, check_vector

__all__ = ["chunk_gla", "chunk_gla_lowrank"]


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
