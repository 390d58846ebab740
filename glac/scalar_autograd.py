"""How a call with a scalar gate reaches the passes of ``glac.scalar``, and how gradients return.

    glac::chunk_simple_gla_fwd, glac::chunk_simple_gla_bwd

are the passes as operators, for whatever has to see a call before it runs (``torch.compile``, fake
tensors, dispatch modes). An absent result has the shape ``[0]``. Other calls go past them, through
an autograd node where a gradient is wanted. Nothing but the inputs is kept between the passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from glac import dispatch, scalar
from glac.autograd import _has_tangent as has_tangent
from glac.autograd import _no_tangents as no_tangents
from glac.autograd import _observed as observed
from glac.autograd import _transforms as transforms
from glac.autograd import _wants_grad as wants_grad
from glac.errors import KernelNotFoundError
from glac.ops import (
    define_passes,
    no_gradient,
    no_second_derivative,
    or_empty,
    output_shape,
    wanted,
)
from glac.problem import Op
from glac.scalar import ScalarInputs
from glac.settings import require_aot

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? initial_state, Tensor? cu_seqlens"
_COUNT = 6


class _Call(NamedTuple):
    """A call without its tensors."""

    scale: float
    output_final_state: bool
    chunk_size: int
    precision: str


def attend(
    i: ScalarInputs, scale: float, output_final_state: bool, chunk_size: int, precision: str
) -> scalar.Result:
    """``glac.scalar.forward`` with gradients, in eager and in traced code.

    Raises:
        InputError, InputTypeError: the call is wrong.
        KernelNotFoundError: ``GLAC_REQUIRE_AOT=1`` and no pack serves the forward pass, or the
            backward pass of an eager call whose gradients are wanted.
        NotDifferentiableError: an input has a forward-mode tangent.
    """
    tensors = (i.q, i.k, i.v, i.g, i.initial_state, i.cu_seqlens)
    seen = observed(tensors)
    compiling = seen and torch.compiler.is_compiling()
    if not compiling and forward_ad._current_level >= 0 and any(map(has_tangent, tensors)):
        raise no_tangents()
    call = _Call(scale, output_final_state, chunk_size, precision)
    if seen and not (not compiling and transforms()):
        return _forward(call, *tensors)
    if not seen and not wants_grad(tensors):
        return scalar.forward(i, *call)
    if not seen:
        _require_backward(i, precision)
    result: scalar.Result = _Attention.apply(call, *tensors)  # type: ignore[no-untyped-call]
    return result


def _require_backward(i: ScalarInputs, precision: str) -> None:
    """Where PyTorch may not stand in, find out before the forward pass runs."""
    if not (require_aot() and i.q.is_cuda):
        return
    try:
        problem = scalar.bucketed(scalar.check(i, precision).problem, i)
        dispatch.resolve(problem, i.q.device.index, Op.SCALAR_BACKWARD)
    except KernelNotFoundError as error:
        raise KernelNotFoundError(
            error.message, hint=f"{error.hint}; or call it in torch.no_grad(), without gradients"
        ) from None


def _forward(call: _Call, *tensors: Any) -> scalar.Result:
    if observed(tensors):
        o, state = chunk_simple_gla_fwd(*tensors, *call)
        return o, state if call.output_final_state else None
    return scalar.forward(ScalarInputs(*tensors), *call)


def _backward(
    call: _Call, needs: Sequence[bool], do: Tensor, dht: Tensor | None, *tensors: Any
) -> tuple[Tensor | None, ...]:
    """A gradient for each of q, k, v, and for g and the initial state where needed."""
    if observed((do, dht, *tensors)):
        grads: tuple[Tensor, ...] = chunk_simple_gla_bwd(
            *tensors, do, dht, call.scale, call.chunk_size, call.precision
        )
        return grads
    return scalar.backward(
        ScalarInputs(*tensors),
        call.scale,
        do,
        dht,
        call.chunk_size,
        call.precision,
        want_dg=needs[3],
        want_dh0=needs[4],
    )


class _Attention(torch.autograd.Function):
    """The node of a call, eager or inside a ``torch.func`` transform."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, *tensors: Any) -> scalar.Result:
        return _forward(call, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        call, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.call = call

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dht: Tensor | None) -> Any:
        tensors = ctx.saved_tensors
        if do is None:
            if dht is None:
                return (None,) * (1 + len(tensors))
            do = no_gradient(tensors[0], tensors[2])
        run = _Gradients.apply if torch.is_grad_enabled() else _backward
        _, *needs = ctx.needs_input_grad
        grads = run(ctx.call, needs, do, dht, *tensors)
        return None, *wanted(needs, (*grads, None))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise no_tangents()


class _Gradients(torch.autograd.Function):
    """The node of gradients, which have none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        return _backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise no_second_derivative()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise no_tangents()


# ---- operators ----


def _op_forward(*args: Any) -> tuple[Tensor, Tensor]:
    i = ScalarInputs(*args[:_COUNT])
    o, state = scalar.forward(i, *args[_COUNT:])
    return o, or_empty(state, i.q)


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
    i = ScalarInputs(*args[:_COUNT])
    _, output_final_state, _, _ = args[_COUNT:]
    final = (i.sequences, i.v.shape[2], i.q.shape[3], i.v.shape[3]) if output_final_state else (0,)
    return i.q.new_empty(output_shape(i.q, i.v)), i.q.new_empty(final, dtype=torch.float32)


def _op_backward(*args: Any) -> tuple[Tensor, ...]:
    i = ScalarInputs(*args[:_COUNT])
    do, dht, scale, chunk_size, precision = args[_COUNT:]
    grads = scalar.backward(
        i,
        scale,
        do,
        dht,
        chunk_size,
        precision,
        want_dg=i.g is not None,
        want_dh0=i.initial_state is not None,
    )
    return tuple(or_empty(t, i.q) for t in grads)


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    i = ScalarInputs(*args[:_COUNT])
    dg = i.q.new_empty(0, dtype=torch.float32) if i.g is None else i.g.new_empty(i.g.shape)
    h0 = i.initial_state
    dh0 = i.q.new_empty((0,) if h0 is None else h0.shape, dtype=torch.float32)
    return *(t.new_empty(t.shape) for t in (i.q, i.k, i.v)), dg, dh0


chunk_simple_gla_fwd, chunk_simple_gla_bwd = define_passes(
    "chunk_simple_gla",
    (
        f"({_TENSORS}, float scale, bool output_final_state, int chunk_size, str precision)"
        " -> (Tensor o, Tensor final_state)",
        f"({_TENSORS}, Tensor do, Tensor? dht, float scale, int chunk_size, str precision)"
        " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dh0)",
    ),
    (_op_forward, _op_backward),
    (_fake_forward, _fake_backward),
    _COUNT,
)
