"""What the launchers of all ops share: plans, and arguments as the kernels' ABI wants them.

The same code serves the CUDA driver and Triton's interpreter; they differ only in ``Kernel``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor

from glac.configs import Config
from glac.problem import Problem, Specialisation
from glac.record import dataclass
from glac.templates import stride_unit

LOG2E = 1.4426950408889634
STEP_MIN = -111.0
"""No step decays by more than e^-111 (2^-160, which is 0 in fp32)."""


Gradients = tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...], Tensor | None]
"""``dq``, ``dk``, ``dv``, one gradient for each tensor of the gate, and ``dh0`` if asked for."""


class Kernel(Protocol):
    """Something that launches: a loaded cubin, or the interpreter."""

    def run(self, tensors: Sequence[Tensor | None], scalars: Sequence[Any], grid: int) -> None:
        """Launch ``grid`` programs with the pointers of ``tensors`` and then ``scalars``."""
        ...


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


AnyConfig = TypeVar("AnyConfig", bound=Config)


@dataclass(frozen=True)
class Plan(Generic[AnyConfig]):
    """Everything about a call that does not depend on its tensors.

    Attributes:
        problem: sizes and specialisation.
        config: how it runs.
        kernels: template name to a launchable kernel.
    """

    problem: Problem
    config: AnyConfig
    kernels: Mapping[str, Kernel]


def strides(tensor: Tensor, unit: int) -> tuple[int, int, int]:
    """Batch, token and head stride of ``[B, T, H, D]`` in units that the kernels count in."""
    b, t, h, _ = tensor.stride()
    return b // unit, t // unit, h // unit


class GateArguments(NamedTuple):
    """The gate's part of the scalar arguments.

    Attributes:
        scalars: ``inv_normalizer`` and ``clamp_log2`` of a low-rank gate.
        flag: ``has_bias`` of a low-rank gate.
        strides: of the dense gate, or of x.
    """

    scalars: tuple[float, ...]
    flag: tuple[int, ...]
    strides: tuple[int, ...]


def gate_arguments(gate: GateInput, spec: Specialisation) -> GateArguments:
    """Scalars, flag and strides of a gate, those that the kernels of ``spec`` take."""
    first = gate.tensors[0]
    assert first is not None
    if not gate.lowrank:
        return GateArguments((), (), strides(first, stride_unit(spec.K)))
    unit = stride_unit(spec.rank)
    return GateArguments(
        (gate.inv_normalizer, max(gate.clamp, STEP_MIN) * LOG2E),
        (int(gate.tensors[2] is not None),),
        (first.stride(0) // unit, first.stride(1) // unit),
    )
