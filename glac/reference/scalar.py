"""Same-precision yardsticks of chunked linear attention with one gate per token and head.

With ``G`` the cumulative gate of a chunk, ``Gend`` its last row and ``D_ij = exp(G_i - G_j)``:

    o      = scale * ( (q k^T * D) v + exp G . (q S) )
    S_next = exp(Gend) S + (exp(Gend - G) . k)^T v

Every matrix operand is rounded to the input precision, products accumulate in fp32 and states stay
in fp32. The gate's sums are fp64. These set error budgets: a kernel may be at most twice as far
from the fp64 truth. Source of the form: arXiv 2405.21060.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glac.reference._common import start_state, without_autocast
from glac.reference.backward import Gradients
from glac.reference.yardstick import _as_operand

_CHUNK = 64
_STEP_FLOOR = -111.0  # natural log: a reset, which is 0 in fp32, and finite enough for a sum


def _chunks(x: Tensor) -> Tensor:
    """``[B, T, H, ...]`` to ``[B, H, N, C, ...]`` in fp32, padded with zeros."""
    pad = -x.shape[1] % _CHUNK
    x = F.pad(x.float(), (0, 0) * (x.dim() - 2) + (0, pad))
    return torch.unflatten(x, 1, (-1, _CHUNK)).movedim(3, 1)


class _Chunked:
    """Operands and decays of all chunks, and the states before them."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor
    ) -> None:
        self.dtype = q.dtype
        self.q, self.k, self.v = (_chunks(x) for x in (q, k, v))  # [B, H, N, C, D]
        gate = _chunks(g).double().clamp(min=_STEP_FLOOR)  # [B, H, N, C]
        total = gate.cumsum(-1)
        gap = (total[..., :, None] - total[..., None, :]).clamp(max=0.0)
        self.pairs = torch.tril(gap.exp()).float() * scale  # [B, H, N, C, C]
        self.read = total.exp().float()[..., None] * scale  # [B, H, N, C, 1]
        self.write = (total[..., -1:] - total).exp().float()[..., None]
        self.decay = total[..., -1].exp().float()[..., None, None]  # [B, H, N, 1, 1]
        self.scores = (self.q @ self.k.mT) * self.pairs
        added = self.round(self.k * self.write).mT @ self.v
        states = []
        for n in range(added.shape[2]):
            states.append(state)
            state = self.decay[:, :, n] * state + added[:, :, n]
        self.states, self.end = torch.stack(states, 2), state  # [B, H, N, K, V]

    def round(self, x: Tensor) -> Tensor:
        return _as_operand(x, self.dtype)


def _tokens(x: Tensor, like: Tensor) -> Tensor:
    """``[B, H, N, C, D]`` back to ``[B, T, H, D]`` in the dtype of ``like``."""
    return x.flatten(2, 3).transpose(1, 2)[:, : like.shape[1]].to(like.dtype).contiguous()


def yardstick_scalar_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The forward pass with the roundings of a tensor-core kernel, without autograd.

    Args:
        q: Queries ``[B, T, H, K]`` in bf16, fp16 or fp32.
        k: Keys ``[B, T, H, K]``.
        v: Values ``[B, T, H, V]``.
        g: Natural log of the decay per step, <= 0, ``[B, T, H]``.
        scale: Factor on the output; ``K ** -0.5`` if None.
        initial_state: ``[B, H, K, V]``; zeros if None.
        output_final_state: Whether to return the state after the last token.

    Returns:
        ``o`` ``[B, T, H, V]`` in v's dtype, and the final state in fp32 or None.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.no_grad(), without_autocast(q.device):
        c = _Chunked(q, k, v, g, factor, start_state(q, v, initial_state, torch.float32))
        o = c.round(c.scores) @ c.v + c.read * (c.q @ c.round(c.states))
    return _tokens(o, v), c.end if output_final_state else None


def yardstick_scalar_gla_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    do: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    dht: Tensor | None = None,
) -> Gradients:
    """The backward pass with the roundings of a tensor-core kernel.

    Args:
        q: As for ``yardstick_scalar_gla``, like k, v, g, scale and initial_state.
        k: Keys ``[B, T, H, K]``.
        v: Values ``[B, T, H, V]``.
        g: ``[B, T, H]``.
        do: Gradient of the output ``[B, T, H, V]``.
        scale: Factor on the output.
        initial_state: ``[B, H, K, V]``; zeros if None.
        dht: Gradient of the final state; zeros if None.

    Returns:
        The gradients in the dtypes of their inputs; dg in fp32, ``[B, T, H]``.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.no_grad(), without_autocast(q.device):
        c = _Chunked(q, k, v, g, factor, start_state(q, v, initial_state, torch.float32))
        dout = _chunks(do)
        dstate = start_state(q, v, dht, torch.float32)
        pulled = c.round(c.q * c.read).mT @ dout
        ends: list[Tensor] = []
        for n in reversed(range(pulled.shape[2])):
            ends.append(dstate)
            dstate = c.decay[:, :, n] * dstate + pulled[:, :, n]
        states, dstates = c.round(c.states), c.round(torch.stack(ends[::-1], 2))
        scores, pull = c.scores, dout @ c.v.mT
        weights = c.round(pull * c.pairs)
        seen, held = c.read * (dout @ states.mT), c.write * (c.v @ dstates.mT)
        dq, dk = weights @ c.k + seen, weights.mT @ c.q + held
        dv = c.round(scores).mT @ dout + c.write * (c.k @ dstates)
        pairs = torch.tril(scores * pull, -1)
        read, write = (c.q * seen).sum(-1), (c.k * held).sum(-1)
        row = pairs.sum(-1) - pairs.sum(-2) + read - write
        dg = row.flip(-1).cumsum(-1).flip(-1) + write.sum(-1, keepdim=True)
        dg += c.decay[..., 0] * (states * dstates).sum((-1, -2))[..., None]
        dg = torch.where(_chunks(g) > _STEP_FLOOR, dg, 0.0)
    return Gradients(
        _tokens(dq, q),
        _tokens(dk, k),
        _tokens(dv, v),
        _rows(dg, g),
        None if initial_state is None else dstate,
    )


def _rows(x: Tensor, g: Tensor) -> Tensor:
    """``[B, H, N, C]`` back to ``[B, T, H]`` in fp32."""
    return x.flatten(2, 3).transpose(1, 2)[:, : g.shape[1]].contiguous()
