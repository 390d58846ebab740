"""Gated linear attention for a few tokens against stored states: the definition of decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from glac.reference._common import accumulation_dtype, without_autocast


def decode_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    every_state: bool = False,
) -> tuple[Tensor, Tensor]:
    """Token by token, with the state after the last token or after every one.

    Accumulates in fp64 if an input is fp64, else in fp32, whatever the dtype of the state.
    Source: arXiv 2312.06635.

    Args:
        q: Queries ``[B, T, H, K]``.
        k: Keys ``[B, T, H, K]``.
        v: Values ``[B, T, H, V]``.
        g: Natural log of the decay per step, <= 0, ``[B, T, H, K]`` or ``[B, T, H, 1]``.
        scale: Factor on the output; ``K ** -0.5`` if None.
        initial_state: ``[B, H, K, V]``, zeros if None.
        every_state: Whether to return the state after each token.

    Returns:
        ``o`` ``[B, T, H, V]`` in v's dtype; the last state ``[B, H, K, V]``, or all states
        ``[B, T, H, K, V]``, in the accumulation dtype.
    """
    dtype = accumulation_dtype(q, k, v, g, initial_state)
    B, T, H, K = q.shape
    factor = K**-0.5 if scale is None else scale
    with without_autocast(q.device):
        query, key, value = q.to(dtype) * factor, k.to(dtype), v.to(dtype)
        decay = g.to(dtype).exp()
        if initial_state is None:
            state = q.new_zeros((B, H, K, v.shape[-1]), dtype=dtype)
        else:
            state = initial_state.to(dtype)
        outputs, states = [], []
        for t in range(T):
            update = key[:, t, :, :, None] * value[:, t, :, None, :]
            state = decay[:, t, :, :, None] * state + update
            outputs.append((query[:, t, :, :, None] * state).sum(-2))
            if every_state:
                states.append(state)
        empty_o = value.new_zeros((B, 0, H, v.shape[-1]))
        o = (torch.stack(outputs, 1) if outputs else empty_o).to(v.dtype)
        if every_state:
            state = torch.stack(states, 1) if states else state[:, None][:, :0]
    return o, state
