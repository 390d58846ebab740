"""The gate of a call as it came, what holds for every gate, and the gradients of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from glac.record import dataclass

if TYPE_CHECKING:
    from torch import Tensor

LOG2E = 1.4426950408889634
STEP_MIN = -111.0
"""No step decays by more than e^-111 (2^-160, which is 0 in fp32)."""


Gradients: TypeAlias = "tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...], Tensor | None]"
"""``dq``, ``dk``, ``dv``, one gradient for each tensor of the gate, and ``dh0`` if asked for."""


@dataclass(frozen=True)
class GateInput:
    """The gate as it came: ``tensors`` is ``(g,)`` or ``(x, weight, bias or None)``.

    ``inv_normalizer`` and ``clamp`` (natural log) belong to the low-rank gate.
    """

    tensors: tuple[Tensor | None, ...]
    inv_normalizer: float = 1.0
    clamp: float = STEP_MIN

    @property
    def lowrank(self) -> bool:
        return len(self.tensors) == 3
