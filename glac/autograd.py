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
    if torch.is_grad_enabled():
        for t in tensors:  # a generator would take longer to make than to ask the first tensor
            if t is not None and t.requires_grad:
                return True
    return False


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


def attend_bound(bound: fast.Bound, given: Sequence[Tensor]) -> engine.Result | None:
    """A call that ``glac.fast`` remembers; ``None`` if it has to go the long way after all.

    Args:
        bound: what it launches.
        given: q, k, v, those of the gate, the initial state, without absent ones.
    """
    wanted = _wants_grad(given)
    if wanted:
        engine.require_backward(bound.call.problem, given[0])
    made = bound.launch(given)
    if made is None:
        return None
    result: Any = bound.pick(made)
    return _attach(bound, result, *given) if wanted else result  # type: ignore[no-any-return]


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
    call: Call,
    forward: fast.Bound | None,
    dh0: bool,
    do: Tensor,
    dht: Tensor | None,
    *tensors: Any,
) -> tuple[Tensor | None, ...]:
    """The backward pass: a gradient for each of ``tensors``, of the initial state if ``dh0``.

    Args:
        call: whose.
        forward: as which ``glac.fast`` remembered it when it was made, if it did.
        dh0: whether the gradient of the initial state is wanted.
        do: gradient of the output.
        dht: of the final state.
        tensors: q, k, v, those of the gate, the initial state, the boundaries.
    """
    if forward is None and call.key is not None:
        forward = fast.find(call.key)  # remembered since: it was the first of its kind
    key = None if forward is None else fast.backward_key(forward, tensors, do, dht, dh0)
    bound = fast.find(key)
    if bound is not None:
        found = bound.run((*tensors, do, dht))
        if found is not None:
            return *found, None
    q, k, v, *gates, initial_state, cu = tensors
    gate = GateInput(tuple(gates), call.inv_normalizer, call.clamp)
    if _observed((do, dht, *tensors)):
        operator = ops.chunk_gla_lowrank_bwd if gate.lowrank else ops.chunk_gla_bwd
        grads: tuple[Tensor, ...] = operator(
            *tensors, do, dht, *_numbers(gate), call.scale, call.chunk_size, _precision(call)
        )
        return *grads, None
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


def _gradients(
    call: Call,
    forward: fast.Bound | None,
    needs: Sequence[bool],
    do: Tensor | None,
    dht: Tensor | None,
    tensors: Sequence[Any],
) -> tuple[Tensor | None, ...]:
    """The gradients that autograd asked for; arguments are those of ``_backward``."""
    if do is None:
        if dht is None:
            return (None,) * len(tensors)
        do = ops.no_gradient(tensors[0], tensors[2])
    # With create_graph the gradients get a node of their own, if only to raise an error.
    run = _Gradients.apply if torch.is_grad_enabled() else _backward
    grads = run(call, forward, needs[-2], do, dht, *tensors)
    # Gradients in fp32 of parameters in another dtype: autograd converts to what they ask for.
    return ops.wanted(needs, grads)


class _Attention(torch.autograd.Function):
    """The node of an eager call. Its form is the one that PyTorch enters fastest, by 15 us."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Any) -> engine.Result:
        engine.require_backward(call.problem, tensors[0])
        _keep(ctx, (call, *tensors), None)
        return _forward(call, *tensors)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dht: Tensor | None) -> Any:
        _, *needs = ctx.needs_input_grad
        return None, *_gradients(ctx.call, None, needs, do, dht, ctx.saved_tensors)


class _Remembered(torch.autograd.Function):
    """The node of a call that ``glac.fast`` remembers, put behind results that are there already.

    Its tensors are those that the call has.
    """

    @staticmethod
    def forward(ctx: Any, bound: fast.Bound, result: engine.Result, *given: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given)
        ctx.bound = bound
        return result

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dht: Tensor | None) -> Any:
        bound, needs, saved = ctx.bound, ctx.needs_input_grad, ctx.saved_tensors
        which = needs, dht is None
        given = (*saved, do) if dht is None else (*saved, do, dht)
        graph = torch.is_grad_enabled()
        grads = None if graph else fast.gradients(bound, given, which)
        if grads is not None:
            return grads
        tensors = *bound.spread(saved), None
        every = *map(bool, bound.spread(needs[2:])), False
        found = _gradients(bound.call, bound, every, do, dht, tensors)
        if do is not None and not graph and which not in bound.backward:
            key = fast.backward_key(bound, tensors, do, dht, every[-2])
            fast.keep_gradients(bound, given, which, needs, key)
        return None, None, *bound.gathered(found)


# ``apply`` itself looks for transforms and their wrappers first, which takes 3 us; who calls this
# has looked, and a wrapper that has lost its transform has no memory to launch anything on.
_attach: Any = super(torch.autograd.Function, _Remembered).apply


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
