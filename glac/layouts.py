"""Tensors in layouts that the kernels read: as they are where possible, else copies."""

from __future__ import annotations

import torch
from torch import Tensor

from glac.gate import GateInput
from glac.problem import Specialisation
from glac.templates import stride_unit
from glac.validate import MAX_TOKEN_STRIDE


def _copied(tensor: Tensor) -> Tensor:
    """A contiguous copy in memory of its own, hence aligned."""
    return tensor.clone(memory_format=torch.contiguous_format)


def laid_out(tensor: Tensor, unit: int) -> Tensor:
    """``tensor`` in a layout the kernels read: a copy only where its own layout is unusable.

    Usable: last dimension contiguous, strides in whole units and in range, 16-byte aligned.
    """
    batch, token, head, last = tensor.stride()
    width = tensor.shape[-1]
    usable = (
        (last == 1 or width == 1)
        and batch % unit == token % unit == head % unit == 0
        and batch < unit * 2**31
        and head < unit * 2**31
        and width <= token < MAX_TOKEN_STRIDE
        and tensor.data_ptr() % 16 == 0
    )
    return tensor if usable else _copied(tensor)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """``tensor`` contiguous and 16-byte aligned: a copy only where it is not."""
    if tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % 16 == 0):
        return tensor
    return _copied(tensor)


def boundaries(cu: Tensor | None) -> Tensor | None:
    """``cu_seqlens`` as kernels read it. From int64 that is one more launch."""
    return None if cu is None else contiguous(cu.to(torch.int32))


def laid_out_inputs(
    spec: Specialisation, q: Tensor, k: Tensor, v: Tensor, gate: GateInput
) -> tuple[Tensor, Tensor, Tensor, GateInput]:
    """q, k, v and the tensors of the gate, each as ``laid_out``."""
    unit_k = stride_unit(spec.K)
    if gate.lowrank:
        x, weight, bias = gate.tensors
        assert x is not None
        x = laid_out(x.unsqueeze(2), stride_unit(spec.rank)).squeeze(2)
        tensors: tuple[Tensor | None, ...] = (x, contiguous(weight), contiguous(bias))
    else:
        assert gate.tensors[0] is not None
        tensors = (laid_out(gate.tensors[0], unit_k),)
    return (
        laid_out(q, unit_k),
        laid_out(k, unit_k),
        laid_out(v, stride_unit(spec.V)),
        GateInput(tensors, gate.inv_normalizer, gate.clamp),
    )
