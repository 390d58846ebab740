"""What the reference forms share: shape agreement, accumulation dtype, no autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from glac.errors import InputError, InputTypeError


def check_shapes(q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor | None) -> None:
    """Raise InputError unless the arguments are one GLA problem (equal heads, no packing)."""
    for name, tensor in (("q", q), ("k", k), ("v", v), ("g", g)):
        if tensor.ndim != 4:
            raise InputError(
                f"{name} must have 4 dimensions [B, T, H, D], got shape {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise InputTypeError(f"{name} must be floating point, got {tensor.dtype}")
    for name, tensor in (("k", k), ("g", g)):
        if tensor.shape != q.shape:
            raise InputError(
                f"{name} must have q's shape {tuple(q.shape)}, got {tuple(tensor.shape)}"
            )
    if v.shape[:3] != q.shape[:3]:
        raise InputError(
            f"v must start with q's [B, T, H] = {tuple(q.shape[:3])}, got {tuple(v.shape)}"
        )
    if q.shape[1] < 1:
        raise InputError("q must have at least one token, got T = 0")
    if initial_state is not None:
        wanted = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        if tuple(initial_state.shape) != wanted:
            raise InputError(
                f"initial_state must have shape [B, H, K, V] = {wanted}, "
                f"got {tuple(initial_state.shape)}"
            )


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 as soon as one tensor is fp64, else fp32."""
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        return torch.float64
    return torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which an enclosing ``torch.autocast`` cannot lower any precision."""
    if device.type in ("cpu", "cuda"):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def start_state(q: Tensor, v: Tensor, initial_state: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The state before the first token, ``[B, H, K, V]`` in ``dtype``."""
    if initial_state is not None:
        return initial_state.to(dtype)
    return q.new_zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), dtype=dtype)
