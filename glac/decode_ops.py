"""Decoding as PyTorch operators, for whatever has to see a call before it runs.

    glac::recurrent_gla    states in, output and new states out
    glac::recurrent_gla_   the states are updated in place

``torch.compile``, ``torch.export``, fake tensors and dispatch modes meet these; other calls go
past them (``glac.decode``). An absent new state has the shape ``[0]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glac import decode
from glac.ops import library

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? x, Tensor? weight, Tensor? bias"
_INDICES = "Tensor? indices, Tensor? cu_seqlens"


def _inputs(tensors: Sequence[Tensor | None]) -> decode.DecodeInputs:
    q, k, v, g, x, weight, bias, state, indices, cu_seqlens = tensors
    assert q is not None
    assert k is not None
    assert v is not None
    gate = decode.Gated(g, x, weight, bias)
    return decode.DecodeInputs(q, k, v, gate, state, indices, cu_seqlens)


def _functional(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, numbers, final, every, dtype = args
    want = decode.Want(False, final, every, dtype)
    o, state = decode.execute(_inputs(tensors), want, tuple(numbers))
    return o, o.new_empty(0, dtype=dtype) if state is None else state


def _fake_functional(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, _, final, every, dtype = args
    i = _inputs(tensors)
    B, T, Hq, K = i.q.shape
    Hs, V = i.v.shape[2:]
    shape: tuple[int, ...] = (0,)
    if every:
        shape = (B, T, Hs, K, V)
    elif final:
        shape = (i.sequences, Hs, K, V)
    return i.q.new_empty((B, T, max(Hq, Hs), V)), i.q.new_empty(shape, dtype=dtype)


def _in_place(*args: Any) -> Tensor:
    *tensors, numbers = args
    i = _inputs(tensors)
    assert i.state is not None
    return decode.execute(i, decode.Want(True, dtype=i.state.dtype), tuple(numbers))[0]


def _fake_in_place(*args: Any) -> Tensor:
    q, v = args[0], args[2]
    B, T, Hq, _ = q.shape
    out: Tensor = q.new_empty((B, T, max(Hq, v.shape[2]), v.shape[3]))
    return out


def _register() -> tuple[Any, Any]:
    library.define(
        f"recurrent_gla({_INPUTS}, Tensor? state, {_INDICES}, float[] numbers, bool final, "
        "bool every, ScalarType dtype) -> (Tensor o, Tensor states)"
    )
    library.define(
        f"recurrent_gla_({_INPUTS}, Tensor(a!) state, {_INDICES}, float[] numbers) -> Tensor"
    )
    for name, run, fake in (
        ("recurrent_gla", _functional, _fake_functional),
        ("recurrent_gla_", _in_place, _fake_in_place),
    ):
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"glac::{name}", fake, lib=library)
    return torch.ops.glac.recurrent_gla.default, torch.ops.glac.recurrent_gla_.default


recurrent_gla, recurrent_gla_ = _register()


def call(
    i: decode.DecodeInputs, want: decode.Want, numbers: tuple[float, ...]
) -> tuple[Tensor, Tensor | None]:
    """``glac.decode.execute`` through the operators."""
    if want.in_place:
        return recurrent_gla_(*i.all, list(numbers)), i.state
    o, states = recurrent_gla(*i.all, list(numbers), want.final, want.every, want.dtype)
    return o, states if want.final or want.every else None
