"""The low-rank forget gate of GLA (arXiv 2312.06635, section 4.4).

    g_t = logsigmoid(x_t W^T + b) / normalizer          then clamped from below

x is the rank-R activation of the first of the layer's two gate projections; W and b are the second
projection as ``nn.Linear`` stores it, all heads stacked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glac.errors import InputError
from glac.reference._common import accumulation_dtype, without_autocast


def lowrank_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_heads: int,
    normalizer: float = 16.0,
    clamp_min: float | None = None,
) -> Tensor:
    """Expand a rank-R activation to one log decay per token, head and key channel.

    Computed in fp64 if an input is fp64, else in fp32. Differentiable. Source: arXiv 2312.06635.

    Args:
        x: Low-rank activation ``[B, T, R]``.
        weight: Projection ``[H*K, R]``, heads outermost.
        bias: ``[H*K]`` or None.
        num_heads: H; must divide the rows of ``weight``.
        normalizer: Positive temperature; the larger, the slower the decay.
        clamp_min: Lower bound of the result (natural log per step, at most 0), or None.

    Returns:
        ``g`` ``[B, T, H, K]``: natural log of the decay, per step (not cumulative), <= 0, in
        fp64 or fp32.

    Raises:
        InputError: Shapes disagree, ``normalizer`` is not positive or ``clamp_min`` is positive.
    """
    if x.ndim != 3:
        raise InputError(f"x must have 3 dimensions [B, T, R], got shape {tuple(x.shape)}")
    if weight.ndim != 2 or weight.shape[1] != x.shape[2]:
        raise InputError(
            f"weight must have shape [H*K, R] with R = {x.shape[2]}, got {tuple(weight.shape)}"
        )
    if num_heads < 1 or weight.shape[0] % num_heads:
        raise InputError(
            f"num_heads must divide the {weight.shape[0]} rows of weight, got {num_heads}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise InputError(
            f"bias must have shape [H*K] = ({weight.shape[0]},), got {tuple(bias.shape)}"
        )
    if not normalizer > 0:
        raise InputError(f"normalizer must be positive, got {normalizer}")
    if clamp_min is not None and not clamp_min <= 0:
        raise InputError(f"clamp_min must be at most 0, got {clamp_min}")

    with without_autocast(x.device):
        g = F.logsigmoid(_logits(x, weight, bias)) / normalizer
        if clamp_min is not None:
            g = torch.clamp(g, min=clamp_min)
    return torch.unflatten(g, -1, (num_heads, weight.shape[0] // num_heads))


def lowrank_gate_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dg: Tensor,
    *,
    normalizer: float = 16.0,
    clamp_min: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of ``lowrank_gate``, written out without autograd.

        dz = dg * sigmoid(-z) / normalizer where the gate is not clamped, else 0
        dx = dz W          dW = dz^T x          db = sum_t dz_t

    A gate equal to ``clamp_min`` passes its gradient. Computed in fp64 if an input is fp64, else
    in fp32. Source: arXiv 2312.06635.

    Args:
        x: Low-rank activation ``[B, T, R]``.
        weight: Projection ``[H*K, R]``, heads outermost.
        bias: ``[H*K]`` or None.
        dg: Gradient of the gate ``[B, T, H, K]``.
        normalizer: As for ``lowrank_gate``.
        clamp_min: As for ``lowrank_gate``.

    Returns:
        ``dx`` ``[B, T, R]`` in x's dtype; ``dweight`` ``[H*K, R]`` and ``dbias`` ``[H*K]`` in fp64
        or fp32, the latter None without a bias.

    Raises:
        InputError: ``dg`` does not have the gate's shape.
    """
    wanted = (*x.shape[:2], weight.shape[0])
    if dg.ndim != 4 or tuple(dg.flatten(2).shape) != wanted:
        raise InputError(
            f"dg must have shape [B, T, H, K] with [B, T, H*K] = {wanted}, got {tuple(dg.shape)}"
        )
    with torch.no_grad(), without_autocast(x.device):
        z = _logits(x, weight, bias)  # [B, T, H*K]
        slope = torch.sigmoid(-z) / normalizer
        if clamp_min is not None:
            slope = torch.where(F.logsigmoid(z) / normalizer >= clamp_min, slope, 0.0)
        dz = slope * dg.flatten(2)  # [B, T, H*K]
        dx = (dz @ weight.to(dz.dtype)).to(x.dtype)
        dweight = dz.flatten(0, 1).mT @ x.flatten(0, 1).to(dz.dtype)
    return dx, dweight, None if bias is None else dz.sum((0, 1))


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` ``[B, T, H*K]``, in fp64 if one of them is fp64, else in fp32."""
    dtype = accumulation_dtype(x, weight, bias)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
