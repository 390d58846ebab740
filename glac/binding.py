"""Binding a call: its launches written down, for ``glac.fast`` to repeat.

A bound call ends in the same launches as the long way, because binding runs ``run_forward`` and
``run_backward`` themselves, with kernels that take notes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from glac import dispatch, engine
from glac.backward import run_backward
from glac.configs import DecodeConfig
from glac.fast import NEVER, Bound, bound
from glac.forward import run_forward
from glac.gate import GateInput
from glac.heads import HeadGroups
from glac.launch import DeviceKernel
from glac.layouts import contiguous, laid_out, laid_out_inputs
from glac.plan import Plan
from glac.problem import Op, Problem
from glac.templates import stride_unit

if TYPE_CHECKING:
    from glac import decode

LIMIT = 4096
"""Calls that are remembered; then all are forgotten, since lengths may never come back."""

ALIGNMENT = 256


class _Note(NamedTuple):
    kernel: DeviceKernel
    tensors: tuple[Tensor | None, ...]
    scalars: tuple[Any, ...]
    grid: int


class _Notes:
    """A kernel that launches nothing and writes down what it was to launch."""

    def __init__(self, kernel: DeviceKernel, notes: list[_Note]) -> None:
        self._kernel, self._notes = kernel, notes

    def run(self, tensors: Sequence[Tensor | None], scalars: Sequence[Any], grid: int) -> None:
        self._notes.append(_Note(self._kernel, tuple(tensors), tuple(scalars), grid))


def _plan(problem: Problem, q: Tensor, op: Op, given: Sequence[Tensor | None]) -> Plan[Any] | None:
    """By which a call went; ``None`` if it cannot be bound, or not now."""
    if not engine.launchable(problem, q):
        return None
    plan = dispatch.resolve(problem, q.device.index, op)[1]
    return plan if plan is not None and _bindable(plan, given) else None


def _bindable(plan: Plan[Any], given: Sequence[Tensor | None]) -> bool:
    if torch.cuda.is_current_stream_capturing():
        return False
    if any(t is not None and t.data_ptr() % 16 for t in given):
        return False  # as it does not say whether the others with this key are
    return all(isinstance(x, DeviceKernel) for x in plan.kernels.values())


def bind(
    key: Hashable,
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: GateInput,
    scale: float,
    initial_state: Tensor | None,
    final: bool,
    call: Any,
) -> None:
    """Remember a call that went well.

    Arguments are those of ``glac.engine.forward``; ``call`` is kept for whoever finds it.
    """
    given = (q, k, v, *gate.tensors, initial_state)
    plan = _plan(problem, q, Op.FORWARD, given)
    if plan is None:
        return
    *usable, usable_gate = laid_out_inputs(problem.spec, q, k, v, gate)
    if _moved(given, (*usable, *usable_gate.tensors, contiguous(initial_state))):
        bound[key] = NEVER
        return
    inputs = _doubles(given)
    a, b, c, *gates, start = inputs
    assert a is not None
    assert b is not None
    assert c is not None
    noted, notes = _noted(plan)
    inner = GateInput(tuple(gates), gate.inv_normalizer, gate.clamp)
    with torch.cuda.device(q.device):
        results = run_forward(noted, a, b, c, inner, scale, start, final)
    bound[key] = _written(q.device, notes, inputs, results, call) or NEVER


def bind_backward(
    key: Hashable,
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: GateInput,
    scale: float,
    initial_state: Tensor | None,
    do: Tensor,
    dht: Tensor | None,
    dh0: bool,
) -> None:
    """Remember a backward pass that went well; arguments are those of ``glac.engine.backward``."""
    given = (q, k, v, *gate.tensors, initial_state, do, dht)
    plan = _plan(problem, q, Op.BACKWARD, given)
    if plan is None:
        return
    *usable, usable_gate = laid_out_inputs(problem.spec, q, k, v, gate)
    states = (contiguous(initial_state), contiguous(dht))
    do_usable = laid_out(do, stride_unit(problem.spec.V))
    found = (*usable, *usable_gate.tensors, states[0], do_usable, states[1])
    if _moved(given, found):
        bound[key] = NEVER
        return
    inputs = _doubles(given)
    a, b, c, *gates, start, d, e = inputs
    assert a is not None
    assert b is not None
    assert c is not None
    assert d is not None
    noted, notes = _noted(plan)
    inner = GateInput(tuple(gates), gate.inv_normalizer, gate.clamp)
    with torch.cuda.device(q.device):
        dq, dk, dv, dgates, dstate = run_backward(
            noted, a, b, c, inner, scale, start, d, e, dh0=dh0
        )
    results = (dq, dk, dv, *dgates, dstate)
    bound[key] = _written(q.device, notes, inputs, results, None) or NEVER


def bind_decode(
    key: Hashable,
    plan: Plan[DecodeConfig],
    groups: HeadGroups,
    i: decode.DecodeInputs,
    want: decode.Want,
    numbers: tuple[float, ...],
) -> None:
    """Remember a call of ``glac.decode.execute`` that went well by ``plan``."""
    from glac import decode  # which the first call of the other operations does without

    given = i.all
    if not _bindable(plan, given):
        return
    if _moved(given, decode.laid_out(i).all):
        bound[key] = NEVER
        return
    inputs = _doubles(given)
    q, k, v, g, x, weight, bias, *rest = inputs
    assert q is not None
    assert k is not None
    assert v is not None
    doubles = decode.DecodeInputs(q, k, v, decode.Gated(g, x, weight, bias), *rest)
    noted, notes = _noted(plan)
    run = decode.launch(noted, groups, doubles, want)
    with torch.cuda.device(i.q.device):
        o, state = decode.run_launch(run, doubles, want, numbers)
    results = (o, None if want.in_place else state)
    bound[key] = _written(i.q.device, notes, inputs, results, None) or NEVER


def _moved(given: Sequence[Tensor | None], laid_out: Sequence[Tensor | None]) -> bool:
    """Whether a layout had to be copied."""
    pairs = zip(given, laid_out, strict=True)
    return any(a is not None and b is not None and a.data_ptr() != b.data_ptr() for a, b in pairs)


def _doubles(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Tensors of the same layout without memory, one for each: known by identity.

    Whatever is allocated for them has no memory either. On the device a second set of results
    and scratch would be there for a moment: 250 MiB more at 16,2048,8,128,128, backward.
    """
    if len(bound) >= LIMIT:
        bound.clear()
    return [
        None
        if t is None
        else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        for t in tensors
    ]


def _noted(plan: Plan[Any]) -> tuple[Plan[Any], list[_Note]]:
    """A plan that launches nothing, and where its launches are written down."""
    notes: list[_Note] = []
    kernels = {
        name: _Notes(kernel, notes)
        for name, kernel in plan.kernels.items()
        if isinstance(kernel, DeviceKernel)
    }
    return Plan(plan.problem, plan.config, kernels), notes


def _memory(tensor: Tensor) -> int:
    """Of what a tensor is a view, a number for each; it has no address."""
    storage: int = tensor.untyped_storage()._cdata
    return storage


def _offset(tensor: Tensor) -> int:
    """Where in its memory a tensor begins, in bytes."""
    return int(tensor.storage_offset()) * tensor.element_size()


def _written(
    where: torch.device,
    notes: Sequence[_Note],
    inputs: Sequence[Tensor | None],
    results: Sequence[Tensor | None],
    call: Any,
) -> Bound | None:
    """From notes to launches; ``None`` if results are more than what the launches have written."""
    made: list[tuple[tuple[int, ...], torch.dtype]] = []
    owners: dict[int, int] = {}
    there = [t for t in inputs if t is not None]
    given = {_memory(t) for t in there}
    places = []
    for result in results:
        if result is None:
            places.append(-1)
            continue
        memory = _memory(result)
        whole = result.numel() * result.itemsize == result.untyped_storage().nbytes()
        if not (whole and result.is_contiguous()) or memory in owners or memory in given:
            return None
        owners[memory] = 1 + len(there) + len(made)
        places.append(len(made))
        made.append((tuple(result.shape), result.dtype))
    written = {_memory(t) for note in notes for t in note.tensors if t is not None}
    if not owners.keys() <= written:
        return None
    spaces: dict[int, int] = {}
    workspace = 0
    offsets: list[int] = []
    launches = []
    first = 1 + len(there) + len(made)

    def place_of(t: Tensor | None) -> int | None:
        nonlocal workspace
        if t is None:
            return 0
        memory = _memory(t)
        for index, other in enumerate(there):
            if (memory, _offset(t)) == (_memory(other), _offset(other)):
                return 1 + index
        if memory in owners:
            return None if _offset(t) else owners[memory]
        if memory in given:
            return None
        if memory not in spaces:
            spaces[memory] = workspace
            workspace += -(-t.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT
        offsets.append(spaces[memory] + _offset(t))
        return first + len(offsets) - 1

    for note in notes:
        found = [place_of(t) for t in note.tensors]
        pointers = tuple(place for place in found if place is not None)
        if len(pointers) != len(found):
            return None
        launch = note.kernel.bound(note.scalars, note.grid)
        scratch = 0
        if launch.scratch_bytes:
            offsets.append(workspace)
            scratch = first + len(offsets) - 1
            workspace += -(-launch.scratch_bytes // ALIGNMENT) * ALIGNMENT
        launches.append((launch, pointers, scratch))
    present = [t is not None for t in inputs]
    return Bound(where, present, made, places, offsets, workspace, launches, call)
