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

**Packed batches.** With ``cu_seqlens`` the tensors hold sequences of any lengths one after the
other in a batch of one, ``[1, T, H, D]``, and states have one entry for each. The kernels find
their sequence on the device, so nothing is read back, and a call can be captured in a CUDA graph
whose ``cu_seqlens`` then changes (with as many sequences, some of them perhaps empty). A sequence
gives the same bits alone and packed, where the config is the same.

**Grouped heads.** Values, gate and state have Hs heads. Keys may have fewer, Hk, a divisor of Hs:
neighbouring heads then share one. Queries may have fewer too, or a multiple of Hs: then neighbours
share a state, and the output has as many heads as the queries. Nothing is copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from glac import fast
from glac.autograd import attend, attend_bound, remember
from glac.errors import InputError, InputTypeError
from glac.gate import STEP_MIN, GateInput
from glac.problem import Problem
from glac.settings import checked_mode
from glac.validate import (
    check_boundaries,
    check_choice,
    check_chunk_size,
    check_lowrank,
    check_scalar,
    check_vector,
)

__all__ = [
    "chunk_gla",
    "chunk_gla_lowrank",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "recurrent_gla",
    "recurrent_gla_lowrank",
]

if TYPE_CHECKING:
    from glac.decode import recurrent_gla, recurrent_gla_lowrank
else:

    def __getattr__(name: str) -> Any:
        """Decoding is loaded when it is asked for: training need not wait for it."""
        if name in ("recurrent_gla", "recurrent_gla_lowrank"):
            from glac import decode

            found = globals()[name] = getattr(decode, name)
            return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


StateLayout = Literal["kv", "vk"]
Precision = Literal["ieee", "tf32"]
STATE_DTYPES = (torch.float32, torch.bfloat16)


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    reverse: bool = False,
    state_layout: StateLayout = "kv",
    state_dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
    precision: Precision = "ieee",
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention with a dense per-channel gate.

    Args:
        q: queries ``[B, T, Hq, K]`` in bf16, fp16 or fp32; any T >= 1, K <= 512.
        k: keys ``[B, T, Hk, K]``.
        v: values ``[B, T, Hs, V]``, V <= 512.
        g: forget gate ``[B, T, Hs, K]`` in q's dtype or fp32: the natural logarithm of each step's
            decay, not cumulative, ``<= 0``. ``-inf`` resets a channel; its gradient is 0, in
            kernels up to rounding. A step decays by at most e^-111. Positive gates are an error in
            checked mode (``GLAC_CHECKED=1``) and undefined otherwise.
        scale: factor on the queries, default ``K ** -0.5``.
        initial_state: ``[N, Hs, K, V]`` in fp32 or bf16, default zeros. So is its gradient.
        output_final_state: also return the state after the last token.
        cu_seqlens: boundaries of a packed batch (B = 1), ``[N + 1]`` in int32 (or int64, for one
            more launch): 0, the first token of each further sequence, T. Sequences may be empty.
            On a GPU its values are checked in checked mode only; wrong ones are clamped into the
            tensors and give wrong results.
        cu_seqlens_cpu: a copy of it in CPU memory, whose values are then checked.
        reverse: walk from the last token to the first. Copies the inputs.
        state_layout: ``"kv"``, or ``"vk"`` where both states are ``[N, Hs, V, K]``.
        state_dtype: of the final state: fp32, or bf16, to keep half as much between calls. The
            kernels read and write fp32; a state in bf16 is one more small launch.
        chunk_size: tokens per chunk of the PyTorch path. The kernels' chunk is part of their tuned
            config and not affected.
        precision: how kernels multiply fp32 inputs: ``"ieee"``, close to fp32, or ``"tf32"``,
            faster and wrong by about 1e-3 (docs/numerics.md). The PyTorch path computes in fp32
            either way. With bf16 and fp16 inputs, also those of autocast, only ``"ieee"``.

    Under ``torch.autocast`` q, k, v and a gate that is not fp32 are cast to its dtype.

    Returns:
        ``o [B, T, max(Hq, Hs), V]`` in q's dtype, and the final state, of ``initial_state``'s
        shape in ``state_dtype``, or ``None``.

    Raises:
        InputError: a shape or value is wrong.
        InputTypeError: a dtype or device is wrong.
        KernelNotFoundError: ``GLAC_REQUIRE_AOT=1`` and no pack serves this problem, or its
            backward pass if a gradient is wanted.
        NotDifferentiableError: an input has a forward-mode tangent.
    """
    key = None
    # The short way of a call that is like one before; everything behind it is the long way.
    plain = cu_seqlens is None and cu_seqlens_cpu is None and chunk_size is None and not reverse
    plain = plain and precision == "ieee"  # a key does not tell: another precision has none
    if plain and state_layout == "kv" and _wide(initial_state, state_dtype):
        given = (q, k, v, g) if initial_state is None else (q, k, v, g, initial_state)
        tensors = (q, k, v, g, initial_state)
        key, bound = fast.recall("chunk_gla", given, tensors, (scale,), output_final_state)
        result = None if bound is None else attend_bound(bound, given)
        if result is not None:
            return result
    q, k, v, g = _autocast(q, k, v, g)
    initial_state = _usual(initial_state, state_layout, state_dtype)
    problem = check_vector(q, k, v, g, initial_state, cu_seqlens, precision)
    factor = problem.spec.K**-0.5 if scale is None else check_scalar("scale", scale)
    chunk = check_chunk_size(chunk_size)
    if cu_seqlens is not None or cu_seqlens_cpu is not None:
        _check_boundaries(cu_seqlens, cu_seqlens_cpu, problem)
    if reverse:
        q, k, v, g = (x.flip(1) for x in (q, k, v, g))
        initial_state, cu_seqlens = _reversed(initial_state, cu_seqlens, problem)
    call = (problem, q, k, v, GateInput((g,)), factor, initial_state, output_final_state, chunk)
    o, state = attend(*call, cu_seqlens, key)
    remember(key, *call)
    return _as_asked(o, state, reverse, cu_seqlens, state_layout, state_dtype)


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
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    reverse: bool = False,
    state_layout: StateLayout = "kv",
    state_dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
    precision: Precision = "ieee",
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention whose gate is computed inside the kernel from a low-rank input.

        g = max(logsigmoid(x @ weight.T + bias) / normalizer, clamp_min)

    This is the gate of the paper's layer (section 4.3). As a ``[B, T, Hs, K]`` tensor it exists
    only while a backward pass lasts, which also holds its gradient then.

    Args:
        q: queries ``[B, T, Hq, K]`` in bf16, fp16 or fp32.
        k: keys ``[B, T, Hk, K]``.
        v: values ``[B, T, Hs, V]``.
        x: gate input ``[B, T, R]`` in q's dtype, R one of 8, 16, 32, 64.
        weight: ``[Hs*K, R]`` in q's dtype, as ``torch.nn.Linear`` stores it.
        bias: ``[Hs*K]`` in q's dtype or fp32, or ``None``.
        normalizer: the gate logits' divisor (tau), > 0.
        clamp_min: lower bound of g (natural log, <= 0), default none.
        scale: factor on the queries, default ``K ** -0.5``.
        initial_state: ``[N, Hs, K, V]`` in fp32 or bf16, default zeros.
        output_final_state: also return the state after the last token.
        cu_seqlens: as for ``chunk_gla``, like the arguments after it.
        cu_seqlens_cpu: a copy of it in CPU memory, whose values are then checked.
        reverse: walk from the last token to the first.
        state_layout: ``"kv"`` or ``"vk"``.
        state_dtype: of the final state, fp32 or bf16.
        chunk_size: of the PyTorch path.
        precision: of products of fp32 inputs, ``"ieee"`` or ``"tf32"``.

    Returns:
        As ``chunk_gla``. Gradients of weight and bias are computed in fp32.

    Raises:
        InputError: a shape or value is wrong.
        InputTypeError: a dtype or device is wrong.
        KernelNotFoundError: ``GLAC_REQUIRE_AOT=1`` and no pack serves this problem, or its
            backward pass if a gradient is wanted.
        NotDifferentiableError: an input has a forward-mode tangent.
    """
    key = None
    plain = cu_seqlens is None and cu_seqlens_cpu is None and chunk_size is None and not reverse
    plain = plain and precision == "ieee"  # a key does not tell: another precision has none
    if plain and state_layout == "kv" and _wide(initial_state, state_dtype):
        tensors = (q, k, v, x, weight, bias, initial_state)
        given = (*tensors[:5], *(t for t in tensors[5:] if t is not None))
        numbers = (normalizer, clamp_min, scale)
        key, bound = fast.recall("chunk_gla_lowrank", given, tensors, numbers, output_final_state)
        result = None if bound is None else attend_bound(bound, given)
        if result is not None:
            return result
    q, k, v, x, weight, bias = _autocast(q, k, v, x, weight, bias)
    initial_state = _usual(initial_state, state_layout, state_dtype)
    problem = check_lowrank(q, k, v, x, weight, bias, initial_state, cu_seqlens, precision)
    factor = problem.spec.K**-0.5 if scale is None else check_scalar("scale", scale)
    tau = check_scalar("normalizer", normalizer, positive=True)
    chunk = check_chunk_size(chunk_size)
    clamp = STEP_MIN if clamp_min is None else check_scalar("clamp_min", clamp_min)
    if clamp > 0:
        raise InputError(f"clamp_min must be <= 0 (a bound on a log-decay), got {clamp}")
    if cu_seqlens is not None or cu_seqlens_cpu is not None:
        _check_boundaries(cu_seqlens, cu_seqlens_cpu, problem)
    if reverse:
        q, k, v, x = (t.flip(1) for t in (q, k, v, x))
        initial_state, cu_seqlens = _reversed(initial_state, cu_seqlens, problem)
    gate = GateInput((x, weight, bias), 1.0 / tau, clamp)
    call = (problem, q, k, v, gate, factor, initial_state, output_final_state, chunk)
    o, state = attend(*call, cu_seqlens, key)
    remember(key, *call)
    return _as_asked(o, state, reverse, cu_seqlens, state_layout, state_dtype)


def _autocast(q: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors, in the dtype of an enclosing ``torch.autocast``.

    What is not among q, k and v stays in fp32, which the gate's tensors may always be.
    """
    tensors = (q, *others)
    if not isinstance(q, Tensor) or q.device.type not in ("cpu", "cuda"):
        return tensors
    if not torch.is_autocast_enabled(q.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(q.device.type)

    def cast(index: int, t: Tensor | None) -> Tensor | None:
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.dtype == torch.float64:
            return t
        # g [B, T, H, K] and bias may be fp32; x and weight are in the dtype of q.
        keeps = t.dtype == torch.float32 and index == len(tensors) - 1
        return t if keeps else t.to(dtype)

    return tuple(cast(index, t) for index, t in enumerate(tensors))


def _wide(initial_state: Tensor | None, state_dtype: torch.dtype) -> bool:
    """Whether states come and go in fp32, as the kernels have them."""
    return state_dtype is torch.float32 and (
        initial_state is None or getattr(initial_state, "dtype", None) is torch.float32
    )


def _usual(state: Tensor | None, layout: str, dtype: torch.dtype) -> Tensor | None:
    """The initial state as ``[N, Hs, K, V]`` in fp32."""
    check_choice("state_layout", layout, ("kv", "vk"))
    if dtype not in STATE_DTYPES:
        raise InputTypeError(f"state_dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    if not isinstance(state, Tensor):
        return state
    if state.dtype is torch.bfloat16:
        state = state.float()
    return state if layout == "kv" or state.dim() < 2 else state.transpose(-1, -2)


def _check_boundaries(cu: Tensor | None, copy: Tensor | None, problem: Problem) -> None:
    """Checks values of boundaries that are in CPU memory, or all of them in checked mode."""
    if copy is not None:
        if cu is None or not isinstance(copy, Tensor) or copy.shape != cu.shape or copy.is_cuda:
            raise InputError(
                "cu_seqlens_cpu must be a copy of cu_seqlens in CPU memory, "
                f"got {type(copy).__name__} beside {type(cu).__name__}",
                hint="cu_seqlens_cpu=cu_seqlens.cpu()",
            )
        check_boundaries(copy, problem.T)
    assert cu is not None
    if not torch.compiler.is_compiling() and (cu.device.type == "cpu" or checked_mode()):
        check_boundaries(cu, problem.T)


def _reversed(
    state: Tensor | None, cu: Tensor | None, problem: Problem
) -> tuple[Tensor | None, Tensor | None]:
    """State and boundaries of a packed batch whose tokens were flipped, all of them at once."""
    if cu is None:
        return state, None
    return None if state is None else state.flip(0), problem.T - cu.flip(0)


def _as_asked(
    o: Tensor,
    state: Tensor | None,
    reverse: bool,
    cu: Tensor | None,
    layout: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    if reverse:
        o = o.flip(1)
        if state is not None and cu is not None:
            state = state.flip(0)
    if state is not None:
        state = state.to(dtype)
        if layout == "vk":
            state = state.transpose(-1, -2)
    return o, state


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
    cu_seqlens_cpu: Tensor | None = None,
    reverse: bool = False,
    state_layout: StateLayout = "kv",
    state_dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
    precision: Precision = "ieee",
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
        initial_state: ``[N, H, K, V]`` in fp32 or bf16, default zeros. N is B, or the number of
            packed sequences.
        output_final_state: also return the state after the last token.
        cu_seqlens: boundaries of a packed batch, as for ``chunk_gla``.
        cu_seqlens_cpu: a copy of it in CPU memory, whose values are then checked.
        reverse: walk from the last token to the first. Copies the inputs.
        state_layout: ``"kv"``, or ``"vk"`` where both states are ``[N, H, V, K]``.
        state_dtype: of the final state, fp32 or bf16.
        chunk_size: tokens per chunk of the PyTorch path.
        precision: of products of fp32 inputs, ``"ieee"`` or ``"tf32"``, as for ``chunk_gla``.

    Under ``torch.autocast`` q, k, v and a gate that is not fp32 are cast to its dtype.

    Returns:
        ``o [B, T, max(Hq, H), V]`` in q's dtype, and the final state, of ``initial_state``'s shape
        in ``state_dtype``, or ``None``.

    Raises:
        InputError: a shape or value is wrong.
        InputTypeError: a dtype or device is wrong.
        KernelNotFoundError: ``GLAC_REQUIRE_AOT=1`` and no pack serves this problem, or its
            backward pass if a gradient is wanted.
        NotDifferentiableError: an input has a forward-mode tangent.
    """
    if g is None:
        raise InputError("g must be [B, T, H], got None", hint="chunk_linear_attn has no gate")
    form = _Form(cu_seqlens_cpu, reverse, state_layout, state_dtype, precision)
    tensors = (q, k, v, g, initial_state, cu_seqlens)
    return _scalar(tensors, scale, output_final_state, chunk_size, form)


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
    cu_seqlens_cpu: Tensor | None = None,
    reverse: bool = False,
    state_layout: StateLayout = "kv",
    state_dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
    precision: Precision = "ieee",
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
        scale, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu, reverse,
            state_layout, state_dtype, chunk_size, precision: as there.

    Returns:
        As ``chunk_simple_gla``.

    Raises:
        InputError, InputTypeError, KernelNotFoundError, NotDifferentiableError: likewise.
    """
    if g is None and isinstance(v, Tensor) and v.dim() == 4:
        g = _retnet_rates(v)
    elif isinstance(g, Tensor) and g.dim() != 1:
        raise InputError(
            f"g must be [H], one decay per head, got shape {tuple(g.shape)}",
            hint="chunk_simple_gla takes a gate for each token, [B, T, H]",
        )
    form = _Form(cu_seqlens_cpu, reverse, state_layout, state_dtype, precision)
    tensors = (q, k, v, g, initial_state, cu_seqlens)
    return _scalar(tensors, scale, output_final_state, chunk_size, form)


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    reverse: bool = False,
    state_layout: StateLayout = "kv",
    state_dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
    precision: Precision = "ieee",
) -> tuple[Tensor, Tensor | None]:
    """Linear attention that forgets nothing: ``chunk_simple_gla`` without a gate.

    Args:
        q: queries ``[B, T, Hq, K]``, with k and v as for ``chunk_simple_gla``.
        k: keys ``[B, T, Hk, K]``.
        v: values ``[B, T, H, V]``.
        scale, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu, reverse,
            state_layout, state_dtype, chunk_size, precision: as there.

    Returns:
        As ``chunk_simple_gla``.

    Raises:
        InputError, InputTypeError, KernelNotFoundError, NotDifferentiableError: likewise.
    """
    form = _Form(cu_seqlens_cpu, reverse, state_layout, state_dtype, precision)
    tensors = (q, k, v, None, initial_state, cu_seqlens)
    return _scalar(tensors, scale, output_final_state, chunk_size, form)


class _Form(NamedTuple):
    """In what form a caller gives and wants things, besides what the kernels know."""

    cu_seqlens_cpu: Tensor | None
    reverse: bool
    layout: str
    dtype: torch.dtype
    precision: str


_rates: dict[tuple[int, torch.device], Tensor] = {}


def _retnet_rates(v: Tensor) -> Tensor:
    """RetNet's decays for the heads of ``v``: five small kernels, in the first call only."""
    from glac.autograd import _observed as observed

    def made(device: torch.device | None = None) -> Tensor:
        heads = torch.arange(v.shape[2], device=device, dtype=torch.float32)
        return torch.log1p(-torch.exp2(-5.0 - heads))

    key = (v.shape[2], v.device)
    if observed((v,)):  # what traces or pretends makes its own
        return made(v.device)
    found = _rates.get(key)
    if found is None:
        if v.is_cuda and torch.cuda.is_current_stream_capturing():
            return made(v.device)
        with torch.inference_mode(False):
            # By way of the CPU: the copy ends before any stream can use it.
            found = _rates[key] = made().to(v.device)
    return found


def _scalar(
    tensors: tuple[Any, ...],
    scale: float | None,
    output_final_state: bool,
    chunk_size: int | None,
    form: _Form,
) -> tuple[Tensor, Tensor | None]:
    # Here, because who calls chunk_gla alone should not wait for them at import.
    from glac.scalar import ScalarInputs, check
    from glac.scalar_autograd import attend as attend_scalar

    *inputs, state, cu = tensors
    q, k, v, g = _autocast(*inputs)
    state = _usual(state, form.layout, form.dtype)
    problem = check(ScalarInputs(q, k, v, g, state, cu), form.precision).problem
    factor = problem.spec.K**-0.5 if scale is None else check_scalar("scale", scale)
    chunk = check_chunk_size(chunk_size)
    if cu is not None or form.cu_seqlens_cpu is not None:
        _check_boundaries(cu, form.cu_seqlens_cpu, problem)
    if form.reverse:
        q, k, v = (x.flip(1) for x in (q, k, v))
        g = g.flip(1) if g is not None and g.dim() == 3 else g
        state, cu = _reversed(state, cu, problem)
    call = ScalarInputs(q, k, v, g, state, cu)
    o, state = attend_scalar(call, factor, bool(output_final_state), chunk, form.precision)
    return _as_asked(o, state, form.reverse, cu, form.layout, form.dtype)
