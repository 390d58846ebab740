"""Gated linear attention token by token (arXiv 2312.06635, section 4.1): the definition.

    S_t = diag(exp g_t) S_{t-1} + k_t^T v_t
    o_t = scale * q_t S_t

Everything else in this project is measured against this loop in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glac.reference._common import (
    accumulation_dtype,
    check_shapes,
    start_state,
)


def recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention as a loop over tokens.

    Accumulates in fp64 if an input is fp64, else in fp32. Differentiable in all tensors. A gate of
    ``-inf`` resets its channel: the decay is exactly 0, nothing becomes nan, and the gradient of
    that gate is 0. Source: arXiv 2312.06635.

    Args:
        q: Queries ``[B, T, H, K]``.
        k: Keys ``[B, T, H, K]``.
        v: Values ``[B, T, H, V]``.
        g: Natural log of the decay, per step (not cumulative), <= 0, ``[B, T, H, K]``.
        scale: Factor on the output; ``K ** -0.5`` if None.
        initial_state: State before the first token ``[B, H, K, V]``; zeros if None.
        output_final_state: Whether to return the state after the last token.

    Returns:
        ``o`` ``[B, T, H, V]`` in v's dtype, and the final state ``[B, H, K, V]`` in the
        accumulation dtype or None.

    Raises:
        InputError: Shapes disagree or there is no token.
        InputTypeError: A tensor is not floating point.
    """
    check_shapes(q, k, v, g, initial_state)
    dtype = accumulation_dtype(q, k, v, g, initial_state)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = q.to(dtype) * factor, k.to(dtype), v.to(dtype)
    decay = g.to(dtype).exp()
    state = start_state(q, v, initial_state, dtype)
    outputs = []
    for t in range(q.shape[1]):
        update = key[:, t, :, :, None] * value[:, t, :, None, :]  # [B, H, K, V]
        state = decay[:, t, :, :, None] * state + update
        outputs.append((query[:, t, :, :, None] * state).sum(-2))
    o = torch.stack(outputs, dim=1).to(v.dtype)
    return o, state if output_final_state else None
