"""Gradients of chunked gated linear attention (arXiv 2312.06635), written out without autograd.

With ``S`` the state at a chunk's start, ``dS`` the gradient of the state at its end, ``G`` the
cumulative gate inside the chunk, ``Gend`` its last row and ``E_ij = exp(G_i - G_j)``:

    A_ij    = scale * sum_c q_ic k_jc E_ijc           dA_ij = scale * do_i . v_j       for j <= i
    dq_i    = sum_j dA_ij k_j E_ij + scale * exp(G_i) * (do_i S^T)
    dk_j    = sum_i dA_ij q_i E_ij + exp(Gend - G_j) * (v_j dS^T)
    dv      = A^T do + (k * exp(Gend - G)) dS
    dg_t    = sum_{j<t<=i} dA_ij q_i k_j E_ij
              + sum_{i>=t} scale * q_i exp(G_i) * (do_i S^T)
              + sum_{j<t} k_j exp(Gend - G_j) * (v_j dS^T)
              + exp(Gend) * sum_v S * dS
    dS_prev = exp(Gend) . dS + scale * (q * exp G)^T do

A gate thus collects exactly the pairs that it decays: pairs inside the chunk, the state read by
later rows, earlier rows held for later chunks, and the state that passes through. Nothing is
subtracted, so a gate of ``-inf`` gets exactly 0 and a fast decay loses no digits.

``chunk_gla_backward`` is that, for every gate. ``yardstick_chunk_gla_backward`` is what a
tensor-core kernel makes of it, and sets error budgets.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glac.errors import InputError, InputTypeError
from glac.reference._common import (
    accumulation_dtype,
    check_shapes,
    start_state,
    without_autocast,
)
from glac.reference.chunked import _SLAB_ELEMENTS, _to_chunks
from glac.reference.yardstick import (
    _BLOCK,
    _RANGE_LIMIT,
    _START_LIMIT,
    _STEP_FLOOR,
    _as_operand,
    _block_scores,
)


class Gradients(NamedTuple):
    """Gradients of one loss with respect to the inputs of gated linear attention.

    Attributes:
        dq: ``[B, T, H, K]`` in q's dtype.
        dk: ``[B, T, H, K]`` in k's dtype.
        dv: ``[B, T, H, V]`` in v's dtype.
        dg: With respect to the natural log of the decay per step, ``[B, T, H, K]`` in g's dtype.
        dh0: With respect to the initial state, ``[B, H, K, V]`` in the accumulation dtype (fp32,
            or fp64 for fp64 inputs); None without an initial state.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dg: Tensor
    dh0: Tensor | None


def chunk_gla_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    do: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    dht: Tensor | None = None,
    chunk_size: int = 64,
) -> Gradients:
    """Gradients of gated linear attention in chunks, by matrix products.

    Equal to autograd through :func:`glac.reference.recurrent_gla` up to rounding for every gate
    ``<= 0``, including 0 and ``-inf`` (a reset, whose gradient is 0). Accumulates in fp64 if an
    input is fp64, else in fp32. Runs without autograd and keeps no state between slabs of chunks
    but the one at each slab's start. Source: arXiv 2312.06635.

    Args:
        q: Queries ``[B, T, H, K]``.
        k: Keys ``[B, T, H, K]``.
        v: Values ``[B, T, H, V]``.
        g: Natural log of the decay, per step (not cumulative), <= 0, ``[B, T, H, K]``.
        do: Gradient of the output ``[B, T, H, V]``.
        scale: Factor on the output; ``K ** -0.5`` if None.
        initial_state: State before the first token ``[B, H, K, V]``; zeros if None.
        dht: Gradient of the state after the last token ``[B, H, K, V]``; zeros if None.
        chunk_size: Tokens per chunk, a power of two. It changes speed and rounding only.

    Returns:
        The gradients, each in the dtype of its input, that of the initial state in the
        accumulation dtype.

    Raises:
        InputError: Shapes disagree, there is no token, or ``chunk_size`` is not a power of two.
        InputTypeError: A tensor is not floating point.
    """
    _check(q, k, v, g, do, initial_state, dht)
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise InputError(f"chunk_size must be a power of two, got {chunk_size}")
    dtype = accumulation_dtype(q, k, v, g, do, initial_state, dht)
    n_batch, n_tokens, n_heads, n_keys = q.shape
    factor = n_keys**-0.5 if scale is None else scale
    rows = min(chunk_size, 1 << (n_tokens - 1).bit_length())
    row_elements = max(1, n_batch * n_heads * max(n_keys, v.shape[-1]))
    slab = rows * max(1, _SLAB_ELEMENTS // (row_elements * rows))

    def load(x: Tensor, start: int) -> Tensor:  # [B, H, N, C, D]
        return _to_chunks(x[:, start : start + slab].to(dtype), rows)

    inputs = (q, k, v, g)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    with torch.no_grad(), without_autocast(q.device):
        state = start_state(q, v, initial_state, dtype)  # [B, H, K, V]
        slab_states = [state]
        for start in range(0, n_tokens - slab, slab):
            _, state = _chunk_states(load(k, start), load(v, start), load(g, start), state)
            slab_states.append(state)
        dstate = start_state(q, v, dht, dtype)  # [B, H, K, V]
        for start in range(slab * (len(slab_states) - 1), -1, -slab):
            query, key, value, gate, dout = (load(x, start) for x in (*inputs, do))
            states, _ = _chunk_states(key, value, gate, slab_states.pop())
            parts, dstate = _slab_backward(query * factor, key, value, gate, dout, states, dstate)
            parts[0].mul_(factor)
            for grad, part in zip(grads, parts, strict=True):
                tokens = part.flatten(2, 3).transpose(1, 2)  # [B, T', H, D], T' padded
                grad[:, start : start + slab] = tokens[:, : n_tokens - start]
    dq, dk, dv, dg = grads
    return Gradients(dq, dk, dv, dg, None if initial_state is None else dstate)


def yardstick_chunk_gla_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    do: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    dht: Tensor | None = None,
    chunk_size: int = 64,
) -> Gradients:
    """Gradients with the roundings of a tensor-core kernel, for error budgets.

    The counterpart of :func:`glac.reference.yardstick_chunk_gla`, with the same chunk form, anchor
    ``r`` and operand precision (``G`` in log2 units, ``.`` scales rows of a ``[K, V]`` tile):

        qh = q * 2^(G-r)                              kh = k * 2^(r-G)
        x  = dA kh + scale * do (2^r . S)^T           dq = 2^(G-r) * x
        y  = dA^T qh,  z = v (2^(Gend-r) . dS)^T      dk = 2^(r-G) * (y + z)
        dv = scale * tril(qh kh^T)^T do + kh (2^(Gend-r) . dS)
        dg_t = sum_{i>=t} (qh_i x_i - kh_i y_i) + sum_{i<t} kh_i z_i + 2^Gend . sum_v S * dS

    Both sums of dg use the rounded ``qh`` and ``kh`` of the products, so what a pair inside the
    chunk adds to one it takes from the other. Every product accumulates in fp32; states and their
    gradients stay in fp32 and are rounded where they are operands; a gradient is rounded once more
    when it is returned. A chunk out of range for one anchor is split into blocks of 16 rows: each
    block against all rows before it, anchored at the boundary, and the diagonal elementwise in
    fp32. Source: arXiv 2312.06635.

    Args:
        q: Queries ``[B, T, H, K]`` in bf16, fp16 or fp32.
        k: Keys ``[B, T, H, K]``.
        v: Values ``[B, T, H, V]``.
        g: Natural log of the decay, per step (not cumulative), <= 0, ``[B, T, H, K]``.
        do: Gradient of the output ``[B, T, H, V]``.
        scale: Factor on the output; ``K ** -0.5`` if None.
        initial_state: State before the first token ``[B, H, K, V]``; zeros if None.
        dht: Gradient of the state after the last token ``[B, H, K, V]``; zeros if None.
        chunk_size: Tokens per chunk, a multiple of 16.

    Returns:
        The gradients, each in the dtype of its input, that of the initial state in fp32.

    Raises:
        InputError: Shapes disagree, there is no token, or ``chunk_size`` is not a multiple of 16.
        InputTypeError: ``q`` is not bf16, fp16 or fp32.
    """
    _check(q, k, v, g, do, initial_state, dht)
    if chunk_size < _BLOCK or chunk_size % _BLOCK:
        raise InputError(f"chunk_size must be a multiple of {_BLOCK}, got {chunk_size}")
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise InputTypeError(f"q must be bf16, fp16 or fp32, got {q.dtype}")
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.no_grad(), without_autocast(q.device):
        query, key, value, gate, dout = (
            _to_chunks(x.float(), chunk_size) for x in (q, k, v, g, do)
        )
        state = start_state(q, v, initial_state, torch.float32)
        dstate = start_state(q, v, dht, torch.float32)
        parts, dstate = _yardstick(query, key, value, gate, dout, state, dstate, factor, q.dtype)
        dq, dk, dv, dg = (
            part.flatten(2, 3).transpose(1, 2)[:, : q.shape[1]].to(x.dtype).contiguous()
            for part, x in zip(parts, (q, k, v, g), strict=True)
        )
    return Gradients(dq, dk, dv, dg, None if initial_state is None else dstate)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    do: Tensor,
    initial_state: Tensor | None,
    dht: Tensor | None,
) -> None:
    """Raise InputError unless the arguments are one GLA problem and gradients of its results."""
    check_shapes(q, k, v, g, initial_state)
    if do.shape != v.shape:
        raise InputError(f"do must have v's shape {tuple(v.shape)}, got {tuple(do.shape)}")
    if not do.is_floating_point():
        raise InputTypeError(f"do must be floating point, got {do.dtype}")
    wanted = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    if dht is not None and tuple(dht.shape) != wanted:
        raise InputError(f"dht must have shape [B, H, K, V] = {wanted}, got {tuple(dht.shape)}")


def _sum_from(x: Tensor) -> Tensor:
    """Per row of ``[..., C, K]``: the sum over it and all later rows."""
    return x.flip(-2).cumsum(-2).flip(-2)


def _sum_after(x: Tensor) -> Tensor:
    """Per row of ``[..., C, K]``: the sum over all later rows."""
    return _sum_from(F.pad(x[..., 1:, :], (0, 0, 0, 1)))


def _sum_before(x: Tensor) -> Tensor:
    """Per row of ``[..., C, K]``: the sum over all earlier rows."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def _chunk_states(k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states at the starts of N chunks ``[B, H, N, K, V]`` and the state behind them."""
    added = (k * _sum_after(g).exp()).mT @ v  # [B, H, N, K, V]
    decay = g.sum(-2).exp().unsqueeze(-1)  # [B, H, N, K, 1]
    states = []
    for i in range(k.shape[2]):
        states.append(state)
        state = decay[:, :, i] * state + added[:, :, i]
    return torch.stack(states, dim=2), state


def _slab_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, do: Tensor, states: Tensor, dstate: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Gradients of N chunks ``[B, H, N, C, D]``; q is already scaled.

    Args:
        q: ``[B, H, N, C, K]``, scaled.
        k: ``[B, H, N, C, K]``.
        v: ``[B, H, N, C, V]``.
        g: ``[B, H, N, C, K]``, natural log.
        do: ``[B, H, N, C, V]``.
        states: State at each chunk's start ``[B, H, N, K, V]``.
        dstate: Gradient of the state behind the last chunk ``[B, H, K, V]``.

    Returns:
        dq (with respect to the scaled q), dk, dv, dg, and the gradient of the state before the
        first chunk ``[B, H, K, V]``.
    """
    read_decay, write_decay = g.cumsum(-2).exp(), _sum_after(g).exp()  # [B, H, N, C, K]
    read, write = q * read_decay, k * write_decay
    decay = g.sum(-2).exp().unsqueeze(-1)  # [B, H, N, K, 1]
    pulled = read.mT @ do  # [B, H, N, K, V]
    ends: list[Tensor] = []
    for i in reversed(range(q.shape[2])):
        ends.append(dstate)
        dstate = decay[:, :, i] * dstate + pulled[:, :, i]
    dstates = torch.stack(ends[::-1], dim=2)  # [B, H, N, K, V]

    seen, held = do @ states.mT, v @ dstates.mT  # [B, H, N, C, K]
    own, down = (q * k).sum(-1, keepdim=True), (do * v).sum(-1, keepdim=True)  # [B, H, N, C, 1]
    dq = read_decay * seen + down * k
    dk = write_decay * held + down * q
    dv = write @ dstates + own * do
    dg = _sum_from(read * seen) + _sum_before(write * held)
    dg += (decay * states * dstates).sum(-1).unsqueeze(-2)

    # Pairs of different rows: the causal triangle by doubling, as in the forward chunk form.
    size = 1
    while size < q.shape[-2]:
        q1, g1, do1, dq1, dg1 = (_half(x, size, 1) for x in (q, g, do, dq, dg))
        k0, g0, v0, dk0, dv0, dg0 = (_half(x, size, 0) for x in (k, g, v, dk, dv, dg))
        late_decay, early_decay = g1.cumsum(-2).exp(), _sum_after(g0).exp()  # [..., s, K]
        late, early = q1 * late_decay, k0 * early_decay
        pull = do1 @ v0.mT  # [..., s, s]
        x, y = pull @ early, pull.mT @ late  # [..., s, K]
        dq1 += late_decay * x
        dk0 += early_decay * y
        dv0 += (early @ late.mT) @ do1
        dg1 += _sum_from(late * x)
        dg0 += _sum_before(early * y)
        size *= 2
    return (dq, dk, dv, dg), dstate


def _half(x: Tensor, size: int, index: int) -> Tensor:
    """A view of the first or second ``size`` rows of each ``2 * size``: ``[..., n, size, D]``."""
    return torch.unflatten(x, -2, (-1, 2, size)).select(-3, index)


def _yardstick(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    do: Tensor,
    state: Tensor,
    dstate: Tensor,
    factor: float,
    dtype: torch.dtype,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Unrounded dq, dk, dv, dg ``[B, H, N, C, D]`` and the gradient of the first state, fp32.

    Args:
        q: ``[B, H, N, C, K]`` in fp32.
        k: ``[B, H, N, C, K]``.
        v: ``[B, H, N, C, V]``.
        g: ``[B, H, N, C, K]``, natural log.
        do: ``[B, H, N, C, V]``.
        state: Before the first chunk ``[B, H, K, V]``.
        dstate: Gradient of the state behind the last chunk ``[B, H, K, V]``.
        factor: On the output.
        dtype: Whose precision the operands of products have.
    """
    value, dout = _as_operand(v, dtype), _as_operand(do, dtype)
    gate = (g * math.log2(math.e)).clamp(min=_STEP_FLOOR)
    cumulative = gate.cumsum(-2)  # [B, H, N, C, K]
    first, end = cumulative[..., :1, :], cumulative[..., -1:, :]
    starts = (-end).amax((-2, -1), keepdim=True) <= _START_LIMIT  # [B, H, N, 1, 1]
    fits = starts | ((first - end).amax((-2, -1), keepdim=True) <= _RANGE_LIMIT)
    anchor = torch.where(starts, 0.0, (first + end) / 2)  # [B, H, N, 1, K]
    read_decay = torch.exp2(cumulative - anchor)  # [B, H, N, C, K]
    write_decay = torch.exp2(anchor - cumulative)
    lift = torch.exp2(end - anchor)  # [B, H, N, 1, K]
    read, write = _as_operand(q * read_decay, dtype), _as_operand(k * write_decay, dtype)

    dscores = factor * torch.tril(dout @ value.mT)  # [B, H, N, C, C]
    rounded = _as_operand(dscores, dtype)
    scores = torch.tril(read @ write.mT)  # [B, H, N, C, C]
    x, y = rounded @ write, rounded.mT @ read  # [B, H, N, C, K]
    dq, dk, dg = read_decay * x, write_decay * y, _sum_from(read * x - write * y)
    if not bool(fits.all()):
        block_scores, from_start, to_end = _block_scores(q, k, gate, dtype)
        pairs = _block_pairs(q, k, gate, dscores, dtype)
        scores = torch.where(fits, scores, block_scores)
        dq, dk, dg = (torch.where(fits, a, b) for a, b in zip((dq, dk, dg), pairs, strict=True))
        read_decay = torch.where(fits, read_decay, torch.exp2(from_start))
        write_decay = torch.where(fits, write_decay, torch.exp2(to_end))
        read, write = _as_operand(q * read_decay, dtype), _as_operand(k * write_decay, dtype)
        anchor = torch.where(fits, anchor, 0.0)
        lift = torch.where(fits, lift, 1.0)
    dv = factor * (_as_operand(scores, dtype).mT @ dout)  # [B, H, N, C, V]

    n_chunks = q.shape[2]
    decay, sink, rise = torch.exp2(end).mT, torch.exp2(anchor).mT, lift.mT  # [B, H, N, K, 1]
    added = rise * (write.mT @ value)  # [B, H, N, K, V]
    pulled = factor * sink * (read.mT @ dout)  # [B, H, N, K, V]
    states = []
    for i in range(n_chunks):
        states.append(state)
        state = decay[:, :, i] * state + added[:, :, i]
    for i in reversed(range(n_chunks)):
        seen = factor * (dout[:, :, i] @ _as_operand(sink[:, :, i] * states[i], dtype).mT)
        arriving = _as_operand(rise[:, :, i] * dstate, dtype)  # [B, H, K, V]
        held = value[:, :, i] @ arriving.mT  # [B, H, C, K]
        dq[:, :, i] += read_decay[:, :, i] * seen
        dk[:, :, i] += write_decay[:, :, i] * held
        dv[:, :, i] += write[:, :, i] @ arriving
        dg[:, :, i] += _sum_from(read[:, :, i] * seen) + _sum_before(write[:, :, i] * held)
        dg[:, :, i] += (decay[:, :, i] * states[i] * dstate).sum(-1).unsqueeze(-2)
        dstate = decay[:, :, i] * dstate + pulled[:, :, i]
    return (dq, dk, dv, dg), dstate


def _block_pairs(
    q: Tensor, k: Tensor, g: Tensor, dscores: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What the pairs inside a chunk add to dq, dk and dg, by blocks of 16 rows, for any gate.

    ``q``, ``k``, ``g`` are ``[..., C, K]``, the gate in log2 units and finite, ``dscores`` is
    ``[..., C, C]``, scaled and causal. The cumulative sums restart in every block, and every block
    pair takes both its sums of dg from its own rounded tiles.
    """
    dq, dk, dg = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(g)
    for start in range(0, q.shape[-2], _BLOCK):
        block, earlier = slice(start, start + _BLOCK), slice(0, start)
        q1, k1, g1 = (x[..., block, :] for x in (q, k, g))  # [..., 16, K]
        parts = _diagonal_pairs(q1, k1, g1, dscores[..., block, block])
        for grad, part in zip((dq, dk, dg), parts, strict=True):
            grad[..., block, :] += part
        if start == 0:
            continue
        late_decay = torch.exp2(g1.cumsum(-2))  # [..., 16, K]
        early_decay = torch.exp2(_to_boundary(g[..., earlier, :]))  # [..., start, K]
        late = _as_operand(q1 * late_decay, dtype)
        early = _as_operand(k[..., earlier, :] * early_decay, dtype)
        pull = _as_operand(dscores[..., block, earlier], dtype)  # [..., 16, start]
        x, y = pull @ early, pull.mT @ late
        dq[..., block, :] += late_decay * x
        dk[..., earlier, :] += early_decay * y
        dg[..., block, :] += _sum_from(late * x)
        dg[..., earlier, :] += _sum_before(early * y)
    return dq, dk, dg


def _to_boundary(g: Tensor) -> Tensor:
    """Per row of ``[..., C, K]`` the sum over all later rows, summed block by block of 16."""
    blocks = torch.unflatten(g, -2, (-1, _BLOCK))  # [..., n, 16, K]
    later = _sum_after(blocks.sum(-2)).unsqueeze(-2)  # [..., n, 1, K]
    return (_sum_after(blocks) + later).flatten(-3, -2)


def _diagonal_pairs(
    q: Tensor, k: Tensor, g: Tensor, dscores: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the pairs of one block, column by column, elementwise in fp32."""
    dq, dk, dg = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(g)
    for j in range(q.shape[-2]):
        exponent = F.pad(g[..., j + 1 :, :], (0, 0, 1, 0)).cumsum(-2)  # rows j.., never > 0
        pulled = dscores[..., j:, j : j + 1] * torch.exp2(exponent)  # [..., rows, K]
        dq[..., j:, :] += pulled * k[..., j : j + 1, :]
        column = pulled * q[..., j:, :]
        dk[..., j, :] = column.sum(-2)
        dg[..., j + 1 :, :] += _sum_from(column[..., 1:, :] * k[..., j : j + 1, :])
    return dq, dk, dg
