"""Gradients of one GLA problem in fp64 and in kernel precision, and the errors of others."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from glac.reference import (
    chunk_gla_backward,
    lowrank_gate,
    lowrank_gate_backward,
    yardstick_chunk_gla_backward,
)
from glac.testing import Inputs

FEW = 512
"""Token-heads: sums of fewer may all nearly cancel."""
CANCELLED = 0.1
"""Of the terms that the gate's gradient adds and takes away, what its error counts against."""


def _double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def dense_gate(x: Inputs, dtype: torch.dtype, **gate: Any) -> Tensor:
    """The gate ``[B, T, H, K]``; ``gate`` is normalizer and clamp_min of a low-rank one."""
    if x.g is not None:
        return x.g.to(dtype)
    assert x.x is not None
    assert x.weight is not None
    bias = None if x.bias is None else x.bias.to(dtype)
    heads = x.q.shape[2]
    return lowrank_gate(x.x.to(dtype), x.weight.to(dtype), bias, num_heads=heads, **gate)


def ends_of(x: Inputs, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gradients of output and final state to start from."""
    generator = torch.Generator(x.q.device).manual_seed(seed + 2**20)
    batch, _, heads, keys = x.q.shape
    size = (batch, heads, keys, x.v.shape[-1])
    do = torch.randn(x.v.shape, generator=generator, device=x.q.device).to(x.v.dtype)
    return do, torch.randn(size, generator=generator, device=x.q.device)


def gate_gradients(x: Inputs, dg: Tensor, **gate: Any) -> dict[str, Tensor]:
    """Of the gate's inputs, in fp64, from that of the gate."""
    if x.g is not None:
        return {"dg": dg.double()}
    assert x.x is not None
    assert x.weight is not None
    dx, dweight, dbias = lowrank_gate_backward(
        x.x.double(),
        x.weight.double(),
        _double(x.bias),
        dg.double(),
        normalizer=gate.get("normalizer", 16.0),
        clamp_min=gate.get("clamp_min"),
    )
    grads = {"dx": dx, "dweight": dweight}
    return grads if dbias is None else {**grads, "dbias": dbias}


def _start(x: Inputs) -> Tensor:
    """The initial state, zeros where there is none: so that there is a gradient of it."""
    if x.initial_state is not None:
        return x.initial_state
    batch, _, heads, keys = x.q.shape
    return torch.zeros((batch, heads, keys, x.v.shape[-1]), device=x.q.device)


def _named(x: Inputs, grads: Any, **gate: Any) -> dict[str, Tensor]:
    found = {"dq": grads.dq, "dk": grads.dk, "dv": grads.dv}
    return {**found, **gate_gradients(x, grads.dg, **gate), "dh0": grads.dh0}


def true_gradients(
    x: Inputs, do: Tensor, dht: Tensor | None = None, *, scale: float | None = None, **gate: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients in fp64 by name (tests/reference holds that form against autograd), and sizes.

    An error counts against at least this size. For the gate it comes from the terms of its sums,
    which cancel where gates reset. Where tokens are few it comes, for the others, from a run
    without signs: what sums of so many terms have on average.
    """
    _, tokens, _, keys = x.q.shape
    values = x.v.shape[-1]
    q, k, v, dout, h0 = (t.double() for t in (x.q, x.k, x.v, do, _start(x)))
    g = dense_gate(x, torch.float64, **gate)
    end = _double(dht)
    wanted = chunk_gla_backward(q, k, v, g, dout, scale=scale, initial_state=h0, dht=end)
    generator = torch.Generator(x.q.device).manual_seed(0)
    signs = torch.randint(2, g.shape, generator=generator, device=g.device) * 2 - 1
    terms = CANCELLED * signs * ((q * wanted.dq).abs() + (k * wanted.dk).abs())
    sizes = {name: float(t.norm()) for name, t in gate_gradients(x, terms, **gate).items()}
    if g.shape[:3].numel() < FEW:
        unsigned = chunk_gla_backward(
            q.abs(),
            k.abs(),
            v.abs(),
            g,
            dout.abs(),
            scale=None if scale is None else abs(scale),
            initial_state=h0.abs(),
            dht=None if end is None else end.abs(),
        )
        for name, count in {"dq": values, "dk": values, "dv": keys, "dh0": 1}.items():
            sizes[name] = float(getattr(unsigned, name).norm()) / math.sqrt(count * (tokens + 1))
    return _named(x, wanted, **gate), sizes


def rounded_gradients(
    x: Inputs, do: Tensor, dht: Tensor | None = None, *, scale: float | None = None, **gate: Any
) -> dict[str, Tensor]:
    """Gradients by name with the roundings of a kernel in the inputs' dtype."""
    g = dense_gate(x, torch.float32, **gate)
    grads = yardstick_chunk_gla_backward(
        x.q, x.k, x.v, g, do, scale=scale, initial_state=_start(x), dht=dht
    )
    return _named(x, grads, **gate)


def gradient_errors(
    grads: dict[str, Tensor], wanted: dict[str, Tensor], sizes: dict[str, float]
) -> dict[str, float]:
    """Error of each gradient relative to its size, inf if it is not finite."""
    errors = {}
    for name, got in grads.items():
        size = max(float(wanted[name].norm()), sizes.get(name, 0.0))
        difference = float((got.double() - wanted[name]).norm())
        error = difference / size if size else difference
        errors[name] = error if math.isfinite(error) else math.inf
    return errors
