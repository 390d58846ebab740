"""How a validated call reaches the passes of ``glac.engine``, and how gradients come back.

- Something has to see the call before it runs (``torch.compile``, fake tensors, a dispatch mode):
  the operators of ``glac.ops``, which have gradients of their own.
- No gradient is wanted: the forward pass and nothing else.
- Otherwise an autograd node, which keeps the inputs and nothing else: the backward pass recomputes
  what it needs. ``torch.func`` gets a node in the form that it asks for.

Gradients have gradients nowhere: asking for one raises ``NotDifferentiableError``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from glac import engine, fast, ops
from glac.errors import NotDifferentiableError
from glac.gate import GateInput
from glac.problem import Problem

_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_ordinary = torch._C._disabled_torch_dispatch_impl


def _on_gpu(q: Tensor) -> bool:
    return q.is_cuda


class Call(NamedTuple):
    """A call without its tensors; ``inv_normalizer`` and ``clamp`` are those of ``GateInput``."""

    problem: Problem
    inv_normalizer: float
    clamp: float
    scale: float
    output_final_state: bool
    chunk_size: int
    key: Hashable | None = None  # under which glac.fast may remember it


def _observed(tensors: Sequence[Tensor | None]) -> bool:
    """Whether something has to see the call that a launch would bypass. Takes 0.6 us."""
    return (
        torch.compiler.is_compiling()
        or _modes() > 0
        or _transforms()
        or any(
            type(t) is not Tensor and t is not None and type(t).__torch_dispatch__ is not _ordinary
            for t in tensors
        )
    )


def _wants_grad(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _has_tangent(tensor: Tensor | None) -> bool:
    if tensor is None:
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _no_tangents() -> NotDifferentiableError:
    return NotDifferentiableError(
        "gated linear attention has no forward-mode derivative",
        hint="use reverse mode, or glac.reference.chunk_gla, which has both",
    )


def attend(
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
    key: Hashable | None = None,
) -> engine.Result:
    """``glac.engine.forward`` with gradients, in eager and in traced code.

    Arguments and results are those of ``glac.engine.forward``; ``key`` is that of ``glac.fast``.

    Raises:
        InputError: checked mode, and a gate is positive or NaN.
        KernelNotFoundError: ``GLAC_REQUIRE_AOT=1`` and no pack serves the forward pass, or the
            backward pass of an eager call whose gradients are wanted.
        NotDifferentiableError: an input has a forward-mode tangent.
    """
    tensors = (q, k, v, *gate.tensors, initial_state, cu)
    observed = _observed(tensors)
    compiling = observed and torch.compiler.is_compiling()
    if not compiling and forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
        raise _no_tangents()
    if not observed and not _wants_grad(tensors):
        return engine.forward(
            problem, q, k, v, gate, scale, initial_state, output_final_state, chunk_size, cu
        )
    numbers = (gate.inv_normalizer, gate.clamp, scale)
    call = Call(problem, *numbers, output_final_state, chunk_size, key)
    result: engine.Result
    if not observed:
        result = _Attention.apply(call, *tensors)  # type: ignore[no-untyped-call]
    elif not compiling and _transforms():
        result = _TransformedAttention.apply(call, *tensors)  # type: ignore[no-untyped-call]
    else:
        result = _forward(call, *tensors)
    return result


def attend_bound(bound: fast.Bound, tensors: Sequence[Tensor | None]) -> engine.Result | None:
    """A call that ``glac.fast`` remembers; ``None`` if it has to go the long way after all.

    Args:
        bound: what it launches.
        tensors: q, k, v, those of the gate, the initial state.
    """
    result: Any
    if not _wants_grad(tensors):
        result = bound.run(tensors)
        return result  # type: ignore[no-any-return]
    result = _Attention.apply(bound.call, *tensors, None)  # type: ignore[no-untyped-call]
    return result  # type: ignore[no-any-return]


def remember(
    key: Hashable | None,
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: GateInput,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    chunk_size: int,
) -> None:
    """Let ``glac.fast`` remember a call that went well, under the key that it gave for it."""
    if key is None or key in fast.bound or not _on_gpu(q):
        return
    from glac.binding import bind

    call = Call(
        problem, gate.inv_normalizer, gate.clamp, scale, output_final_state, chunk_size, key
    )
    bind(key, problem, q, k, v, gate, scale, initial_state, output_final_state, call)


def _precision(call: Call) -> str:
    """As the operators take it."""
    return call.problem.spec.precision.value


def _numbers(gate: GateInput) -> tuple[float, ...]:
    """What the operators of this kind of gate take besides tensors."""
    return (gate.inv_normalizer, gate.clamp) if gate.lowrank else ()


def _forward(call: Call, *tensors: Any) -> engine.Result:
    """The forward pass. Tensors are q, k, v, the gate's, the initial state, the boundaries."""
    bound = fast.find(call.key)
    if bound is not None:
        result: Any = bound.run(tensors[:-1])
        if result is not None:
            return result  # type: ignore[no-any-return]
    q, k, v, *gates, initial_state, cu = tensors
    gate = GateInput(tuple(gates), call.inv_normalizer, call.clamp)
    if _observed(tensors):
        operator = ops.chunk_gla_lowrank_fwd if gate.lowrank else ops.chunk_gla_fwd
        o, state = operator(
            *tensors,
            *_numbers(gate),
            call.scale,
            call.output_final_state,
            call.chunk_size,
            _precision(call),
        )
        return o, state if call.output_final_state else None
    return engine.forward(
        call.problem,
        q,
        k,
        v,
        gate,
        call.scale,
        initial_state,
        call.output_final_state,
        call.chunk_size,
        cu,
    )


def _backward(
    call: Call, dh0: bool, do: Tensor, dht: Tensor | None, *tensors: Any
) -> tuple[Tensor | None, ...]:
    """The backward pass: a gradient for each of ``tensors``, of the initial state if ``dh0``."""
    q, k, v, *gates, initial_state, cu = tensors
    gate = GateInput(tuple(gates), call.inv_normalizer, call.clamp)
    if _observed((do, dht, *tensors)):
        operator = ops.chunk_gla_lowrank_bwd if gate.lowrank else ops.chunk_gla_bwd
        grads: tuple[Tensor, ...] = operator(
            *tensors, do, dht, *_numbers(gate), call.scale, call.chunk_size, _precision(call)
        )
        return *grads, None
    key = None if cu is not None else fast.backward_key(call.key, do, dht, dh0)
    bound = fast.find(key)
    if bound is not None:
        found = bound.run((*tensors[:-1], do, dht))
        if found is not None:
            return *found, None
    dq, dk, dv, dgates, dstate = engine.backward(
        call.problem,
        q,
        k,
        v,
        gate,
        call.scale,
        initial_state,
        do,
        dht,
        call.chunk_size,
        dh0=dh0,
        cu=cu,
    )
    if key is not None and key not in fast.bound and _on_gpu(q):
        from glac.binding import bind_backward

        arguments = (call.problem, q, k, v, gate, call.scale, initial_state, do, dht, dh0)
        bind_backward(key, *arguments)
    return dq, dk, dv, *dgates, dstate, None


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep the inputs of a call for its backward pass."""
    call, *tensors = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.call = call


class _Attention(torch.autograd.Function):
    """The node of an eager call. Its form is the one that PyTorch enters fastest, by 15 us."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Any) -> engine.Result:
        engine.require_backward(call.problem, tensors[0])
        _keep(ctx, (call, *tensors), None)
        return _forward(call, *tensors)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dht: Tensor | None) -> Any:
        tensors = ctx.saved_tensors
        if do is None:
            if dht is None:
                return (None,) * (1 + len(tensors))
            do = ops.no_gradient(tensors[0], tensors[2])
        # With create_graph the gradients get a node of their own, if only to raise an error.
        run = _Gradients.apply if torch.is_grad_enabled() else _backward
        _, *needs = ctx.needs_input_grad
        grads = run(ctx.call, needs[-2], do, dht, *tensors)
        # Gradients in fp32 of parameters in another dtype: autograd converts to what they ask for.
        return None, *ops.wanted(needs, grads)


class _TransformedAttention(torch.autograd.Function):
    """The node inside a ``torch.func`` transform."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Call, *tensors: Any) -> engine.Result:
        return _forward(call, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _keep(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dht: Tensor | None) -> Any:
        return _Attention.backward(ctx, do, dht)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise _no_tangents()


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
        raise ops.no_second_derivative()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise _no_tangents()
