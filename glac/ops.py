"""The passes as PyTorch operators, for whatever has to see a call before it runs.

    glac::chunk_gla_fwd, glac::chunk_gla_bwd                  a dense gate
    glac::chunk_gla_lowrank_fwd, glac::chunk_gla_lowrank_bwd  a low-rank gate

``torch.compile``, ``torch.export``, fake tensors and dispatch modes meet these. Other calls go
past them (``glac.autograd``), because the dispatcher would add 10 us to each. The schemas are
written below: tensors first, then numbers, then the precision. The number of results is fixed, and
an absent one has the shape ``[0]``; gradients of weight, bias and initial state are fp32. There is
one implementation for all devices, since ``glac.engine`` looks at the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from glac import engine
from glac.errors import NotDifferentiableError
from glac.gate import GateInput
from glac.problem import Problem
from glac.record import dataclass
from glac.validate import check_lowrank, check_vector

# PyTorch asks ``inspect`` which module registers an operator. Without this entry it looks through
# all of sys.modules for the answer: 3 ms of importing glac.
getattr(inspect, "modulesbyfile", {}).setdefault(__file__, __name__)

# The operators live as long as this object.
library: Any = torch.library.Library("glac", "DEF")  # type: ignore[no-untyped-call]


def wanted(needs: Sequence[bool], grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients that autograd asked for, ``None`` in place of the others."""
    return tuple(g if need else None for need, g in zip(needs, grads, strict=False))


def no_second_derivative() -> NotDifferentiableError:
    """What differentiating a gradient raises."""
    return NotDifferentiableError(
        "gated linear attention can be differentiated once, this is a second time",
        hint="glac.reference.chunk_gla and recurrent_gla are differentiable any number of times",
    )


def output_shape(q: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    """``[B, T, H, V]``: heads of queries that share a state each have an output."""
    B, T, heads, _ = q.shape
    return B, T, max(heads, v.shape[2]), v.shape[3]


def no_gradient(q: Tensor, v: Tensor) -> Tensor:
    """The gradient of an output that nothing depends on."""
    return v.new_zeros(output_shape(q, v))


class _Node(torch.autograd.Function):
    """What a differentiable operator leaves in the graph."""

    @staticmethod
    def forward(ctx: Any, below: Any, save: Any, differentiate: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            result = below(*args)
        save(ctx, args)
        ctx.differentiate = differentiate
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, None, None, *ctx.differentiate(ctx, ctx.needs_input_grad[3:], *grads)


def _differentiable(
    operator: Any,
    save: Callable[[Any, tuple[Any, ...]], None],
    differentiate: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    """As ``torch.library.register_autograd``, for operators without keyword arguments.

    That one makes two classes for each operator, a quarter of the time of importing glac.

    Args:
        operator: an overload.
        save: keeps in a context what the gradient needs of the arguments.
        differentiate: from that context, whether each argument wants a gradient, and the
            gradients of the results to those of the arguments.
    """

    def run(keys: Any, *args: Any) -> Any:
        def below(*args: Any) -> Any:
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *args)

        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return _Node.apply(below, save, differentiate, *args)  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return below(*args)

    library.impl(operator._opname, run, "Autograd", with_keyset=True)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...]) -> None:
    pass


def _refuse(ctx: Any, needs: Sequence[bool], *grads: Tensor | None) -> Any:
    raise no_second_derivative()


def define_passes(
    name: str,
    schemas: tuple[str, str],
    runs: tuple[Callable[..., Any], Callable[..., Any]],
    fakes: tuple[Callable[..., Any], Callable[..., Any]],
    count: int,
) -> tuple[Any, Any]:
    """Define the operators ``<name>_fwd`` and ``<name>_bwd``, and return them.

    The forward operator takes ``count`` tensors, q, k and v first and the boundaries of a packed
    batch last, then numbers, of which the last are whether the final state is wanted and the chunk
    size, then the precision. The backward operator takes the tensors, the gradients of both
    results, and the rest but whether the final state is wanted; it returns a gradient for each
    tensor but the boundaries, and has none itself.

    Args:
        name: what both names begin with.
        schemas: what follows the names.
        runs: what they do, on any device.
        fakes: the same for shapes and dtypes alone.
        count: of the input tensors.
    """
    pair = []
    for which, schema, run, fake in zip(("fwd", "bwd"), schemas, runs, fakes, strict=True):
        full = f"{name}_{which}"
        library.define(f"{full}{schema}")
        library.impl(full, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"glac::{full}", fake, lib=library)
        pair.append(getattr(torch.ops.glac, full).default)
    forward, backward = pair

    def save(ctx: Any, inputs: tuple[Any, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:count])
        ctx.numbers = inputs[count:]

    def differentiate(
        ctx: Any, needs: Sequence[bool], do: Tensor | None, dht: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        *numbers, output_final_state, chunk_size, precision = ctx.numbers
        dht = dht if output_final_state else None
        if do is None and dht is None:
            return (None,) * len(needs)
        if do is None:
            do = no_gradient(inputs[0], inputs[2])
        grads = backward(*inputs, do, dht, *numbers, chunk_size, precision)
        return *wanted(needs, (*grads, None)), *(None for _ in ctx.numbers)

    _differentiable(forward, save, differentiate)
    _differentiable(backward, _keep_nothing, _refuse)
    return forward, backward


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """``tensor``, contiguous; without one an empty fp32 tensor."""
    return like.new_empty(0, dtype=torch.float32) if tensor is None else tensor.contiguous()


def _fake(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(shape, dtype=dtype or like.dtype)


@dataclass(frozen=True)
class _Family:
    """The forward and the backward operator of one kind of gate.

    Attributes:
        name: what both names begin with.
        tensors: schema of the inputs: q, k, v, those of the gate, the initial state, and the
            boundaries of a packed batch, which have no gradient.
        numbers: schema of the gate's numbers, as in ``GateInput``.
        gradients: names of the gradients of the gate's inputs.
        check: validates the inputs.
    """

    name: str
    tensors: str
    numbers: str
    gradients: tuple[str, ...]
    check: Callable[..., Problem]

    @property
    def count(self) -> int:
        """Of the input tensors."""
        return self.tensors.count(",") + 1

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        q, k, v, *gate, initial_state, cu = args[: self.count]
        *numbers, scale, output_final_state, chunk_size, precision = args[self.count :]
        problem = self.check(q, k, v, *gate, initial_state, cu, precision)
        o, state = engine.forward(
            problem,
            q,
            k,
            v,
            GateInput(tuple(gate), *numbers),
            scale,
            initial_state,
            output_final_state,
            chunk_size,
            cu,
        )
        return o, or_empty(state, q)

    def fake_forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        q, _, v, *_, cu = args[: self.count]
        *_, output_final_state, _, _ = args
        sequences = q.shape[0] if cu is None else cu.shape[0] - 1
        state = (sequences, v.shape[2], q.shape[3], v.shape[3])
        final = state if output_final_state else (0,)
        return _fake(v, output_shape(q, v)), _fake(q, final, torch.float32)

    def backward(self, *args: Any) -> tuple[Tensor, ...]:
        q, k, v, *gate, initial_state, cu, do, dht = args[: self.count + 2]
        *numbers, scale, chunk_size, precision = args[self.count + 2 :]
        problem = self.check(q, k, v, *gate, initial_state, cu, precision)
        dq, dk, dv, gates, dh0 = engine.backward(
            problem,
            q,
            k,
            v,
            GateInput(tuple(gate), *numbers),
            scale,
            initial_state,
            do,
            dht,
            chunk_size,
            dh0=initial_state is not None,
            cu=cu,
        )
        return tuple(or_empty(t, q) for t in (dq, dk, dv, *gates, dh0))

    def fake_backward(self, *args: Any) -> tuple[Tensor, ...]:
        q, k, v, gate, *wide, _ = args[: self.count]
        grads = [_fake(t, t.shape) for t in (q, k, v, gate)]
        shapes = ((0,) if t is None else t.shape for t in wide)
        return *grads, *(_fake(q, shape, torch.float32) for shape in shapes)

    def define(self) -> tuple[Any, Any]:
        """Define both operators, and return them."""
        numbers = f"{self.numbers}float scale"
        grads = ", ".join(f"Tensor {n}" for n in ("dq", "dk", "dv", *self.gradients, "dh0"))
        return define_passes(
            self.name,
            (
                f"({self.tensors}, {numbers}, bool output_final_state, int chunk_size, "
                "str precision) -> (Tensor o, Tensor final_state)",
                f"({self.tensors}, Tensor do, Tensor? dht, {numbers}, int chunk_size, "
                f"str precision) -> ({grads})",
            ),
            (self.forward, self.backward),
            (self.fake_forward, self.fake_backward),
            self.count,
        )


chunk_gla_fwd, chunk_gla_bwd = _Family(
    "chunk_gla",
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial_state, Tensor? cu_seqlens",
    "",
    ("dg",),
    check_vector,
).define()
chunk_gla_lowrank_fwd, chunk_gla_lowrank_bwd = _Family(
    "chunk_gla_lowrank",
    "Tensor q, Tensor k, Tensor v, Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, "
    "Tensor? cu_seqlens",
    "float inv_normalizer, float clamp, ",
    ("dx", "dweight", "dbias"),
    check_lowrank,
).define()
