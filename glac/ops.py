"""The passes as PyTorch operators, for whatever has to see a call before it runs.

    glac::chunk_gla_fwd, glac::chunk_gla_bwd                  a dense gate
    glac::chunk_gla_lowrank_fwd, glac::chunk_gla_lowrank_bwd  a low-rank gate

``torch.compile``, ``torch.export``, fake tensors and dispatch modes meet these. Other calls go
past them (``glac.autograd``), because the dispatcher would add 10 us to each. The schemas are
written below: tensors first, then numbers. The number of results is fixed, and an absent one has
the shape ``[0]``; gradients of weight, bias and initial state are fp32. There is one
implementation for all devices, since ``glac.engine`` looks at the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from glac import engine
from glac.errors import NotDifferentiableError
from glac.plan import GateInput
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


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
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
        *numbers, scale, output_final_state, chunk_size = args[self.count :]
        problem = self.check(q, k, v, *gate, initial_state, cu)
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
        return o, _or_empty(state, q)

    def fake_forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        q, _, v, *_, cu = args[: self.count]
        *_, output_final_state, _ = args
        sequences = q.shape[0] if cu is None else cu.shape[0] - 1
        state = (sequences, v.shape[2], q.shape[3], v.shape[3])
        final = state if output_final_state else (0,)
        return _fake(v, output_shape(q, v)), _fake(q, final, torch.float32)

    def backward(self, *args: Any) -> tuple[Tensor, ...]:
        q, k, v, *gate, initial_state, cu, do, dht = args[: self.count + 2]
        *numbers, scale, chunk_size = args[self.count + 2 :]
        problem = self.check(q, k, v, *gate, initial_state, cu)
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
        return tuple(_or_empty(t, q) for t in (dq, dk, dv, *gates, dh0))

    def fake_backward(self, *args: Any) -> tuple[Tensor, ...]:
        q, k, v, gate, *wide, _ = args[: self.count]
        grads = [_fake(t, t.shape) for t in (q, k, v, gate)]
        shapes = ((0,) if t is None else t.shape for t in wide)
        return *grads, *(_fake(q, shape, torch.float32) for shape in shapes)

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: self.count])
        ctx.numbers = inputs[self.count :]

    def differentiate(self, ctx: Any, do: Tensor | None, dht: Tensor | None) -> Any:
        inputs = ctx.saved_tensors
        *numbers, output_final_state, chunk_size = ctx.numbers
        dht = dht if output_final_state else None
        unused = (None,) * len(ctx.numbers)
        if do is None and dht is None:
            return *(None for _ in inputs), *unused
        if do is None:
            do = inputs[2].new_zeros(output_shape(inputs[0], inputs[2]))
        grads = self.operator("bwd")(*inputs, do, dht, *numbers, chunk_size)
        return *wanted(ctx.needs_input_grad, (*grads, None)), *unused

    def operator(self, which: str) -> Any:
        return getattr(torch.ops.glac, f"{self.name}_{which}").default

    def register(self) -> tuple[Any, Any]:
        """Define both operators, and return them."""
        forward, backward = f"{self.name}_fwd", f"{self.name}_bwd"
        numbers = f"{self.numbers}float scale"
        grads = ", ".join(f"Tensor {n}" for n in ("dq", "dk", "dv", *self.gradients, "dh0"))
        library.define(
            f"{forward}({self.tensors}, {numbers}, bool output_final_state, int chunk_size)"
            " -> (Tensor o, Tensor final_state)"
        )
        library.define(
            f"{backward}({self.tensors}, Tensor do, Tensor? dht, {numbers}, int chunk_size)"
            f" -> ({grads})"
        )
        for name, run, fake in (
            (forward, self.forward, self.fake_forward),
            (backward, self.backward, self.fake_backward),
        ):
            library.impl(name, run, "CompositeExplicitAutograd")
            torch.library.register_fake(f"glac::{name}", fake, lib=library)
        torch.library.register_autograd(
            f"glac::{forward}", self.differentiate, setup_context=self.save, lib=library
        )
        torch.library.register_autograd(f"glac::{backward}", _refuse, lib=library)
        return self.operator("fwd"), self.operator("bwd")


def _refuse(ctx: Any, *grads: Tensor | None) -> Any:
    raise no_second_derivative()


chunk_gla_fwd, chunk_gla_bwd = _Family(
    "chunk_gla",
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial_state, Tensor? cu_seqlens",
    "",
    ("dg",),
    check_vector,
).register()
chunk_gla_lowrank_fwd, chunk_gla_lowrank_bwd = _Family(
    "chunk_gla_lowrank",
    "Tensor q, Tensor k, Tensor v, Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, "
    "Tensor? cu_seqlens",
    "float inv_normalizer, float clamp, ",
    ("dx", "dweight", "dbias"),
    check_lowrank,
).register()
