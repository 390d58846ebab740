"""What the launchers of all ops share: plans, and arguments as the kernels' ABI wants them.

The same code serves the CUDA driver and Triton's interpreter; they differ only in ``Kernel``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from glac.configs import ChunkKernelConfig, CombineKernelConfig, Config, segmentation
from glac.gate import LOG2E, STEP_MIN, GateInput
from glac.problem import Problem, Specialisation
from glac.record import dataclass
from glac.templates import stride_unit, tiles

if TYPE_CHECKING:
    from torch import Tensor


class Kernel(Protocol):
    """Something that launches: a loaded cubin, or the interpreter."""

    def run(self, tensors: Sequence[Tensor | None], scalars: Sequence[Any], grid: int) -> None:
        """Launch ``grid`` programs with the pointers of ``tensors`` and then ``scalars``."""
        ...


AnyConfig = TypeVar("AnyConfig", bound=Config)
AnyConfig_co = TypeVar("AnyConfig_co", bound=Config, covariant=True)


@dataclass(frozen=True)
class Plan(Generic[AnyConfig_co]):
    """Everything about a call that does not depend on its tensors.

    Attributes:
        problem: sizes and specialisation.
        config: how it runs.
        kernels: template name to a launchable kernel.
    """

    problem: Problem
    config: AnyConfig_co
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


def segments_of(problem: Problem, segment: int) -> tuple[int, int]:
    """Slots of segments in a row of the tensors, and the tokens of a segment.

    A packed batch that is not cut has one slot for each sequence and segments longer than T
    (``kernel_templates/_place.py``).

    Args:
        problem: sizes.
        segment: the config's, 0 for whole sequences.
    """
    if not problem.packed:
        return segmentation(segment, problem.T)
    count, length = segmentation(segment, problem.T)
    if count == 1:
        return problem.packed, problem.T + 1
    return problem.T // length + problem.packed, length


def segment_states(
    plan: Plan[Any],
    k: Tensor,
    v: Tensor,
    gate: GateInput,
    ends: Tensor | None,
    cu: Tensor | None,
    *,
    segments: tuple[int, int],
    summary: ChunkKernelConfig,
    heads: int,
    k_group: int = 1,
    g_group: int = 1,
    out_scale: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """The state at every border between segments, or with ``reverse`` its gradient.

    Args:
        plan: whose kernels ``gla_states`` and ``gla_combine`` run.
        k: keys; with ``reverse`` queries.
        v: values; with ``reverse`` the gradient of the output.
        gate: the gate.
        ends: the state to begin with, or with ``reverse`` the gradient of the last one.
        cu: boundaries of a packed batch.
        segments: what ``segments_of`` said.
        summary: config of ``gla_states``.
        heads: how many are walked.
        k_group: heads that share one of ``k``.
        g_group: heads that share one of the gate (and, with ``reverse``, one of ``ends``).
        out_scale: factor on what segments add.
        reverse: whether to walk back.

    Returns:
        ``[B, heads, slots, K, V]`` in fp32. Slot j is the state before segment j, undefined for
        the first; with ``reverse`` what concerns the end of segment j, undefined for the last.
    """
    import torch  # here, so that configs can be reckoned with where there is none

    problem = plan.problem
    spec = problem.spec
    B, T, K, V = problem.B, problem.T, spec.K, spec.V
    count, length = segments
    packed = int(cu is not None)
    args = gate_arguments(gate, spec)
    states = torch.empty((B, heads, count, K, V), dtype=torch.float32, device=k.device)
    decay = torch.empty((B, heads, count, K), dtype=torch.float32, device=k.device)
    plan.kernels["gla_states"].run(
        (k, v, *gate.tensors, cu, None, states, None, decay),
        (
            *(out_scale, *args.scalars, T, problem.sequences, heads, count, 0, count, length),
            *(1, 1, k_group, 1, g_group, int(reverse), 1, 0, packed, 0, *args.flag),
            *(*strides(k, stride_unit(K)), *strides(v, stride_unit(V)), *args.strides),
        ),
        tiles("gla_states", spec, summary) * count * B * heads,
    )
    combine = CombineKernelConfig()
    plan.kernels["gla_combine"].run(
        (states, decay, ends, cu),
        (T, heads, count, length, g_group, int(reverse), packed, int(ends is not None)),
        tiles("gla_combine", spec, combine) * problem.sequences * heads,
    )
    return states
