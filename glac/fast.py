"""The short way of a call that is like one before: one lookup instead of checks and arguments.

A call is *bound* after it went the long way once: what it launches, in which order, with which
scalars and grids is written down, and the pointers are left open. The key holds everything that
the checks, the layouts and the launches depend on, apart from alignment, which is looked at each
time. The long way and this one end in the same launches, because binding runs ``run_forward``
itself, with kernels that take notes.

Whatever has to see a call before it runs (tracing, modes, autocast, checked mode, subclasses)
takes the long way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from glac import dispatch
from glac.driver import BoundLaunch
from glac.forward import run_forward
from glac.launch import DeviceKernel
from glac.plan import GateInput, Plan
from glac.problem import Op, Problem
from glac.settings import checked_mode
from glac.templates import stride_unit

LIMIT = 4096
"""Calls that are remembered; then all are forgotten, since lengths may never come back."""

ALIGNMENT = 256

_empty, _empty_like = torch.empty, torch.empty_like
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_autocast = torch._C._is_any_autocast_enabled
_ordinary = torch._C._disabled_torch_dispatch_impl
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda i: 0)


def _on_gpu(q: Tensor) -> bool:
    return q.is_cuda


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


class Bound:
    """The launches of one pass, all but the pointers.

    Args:
        where: the CUDA device.
        made: what a call allocates for its results: the input whose double it is, or -1; shape;
            dtype.
        results: for each result its place in ``made``, or -1 for none.
        offsets: addresses inside the workspace that launches use.
        workspace: bytes of it.
        launches: for each the kernel; for each of its pointers a place in the table of addresses,
            which is 0, inputs, results, addresses in the workspace; and the place of its scratch.
        call: what the backward pass needs to know.
    """

    def __init__(
        self,
        where: torch.device,
        made: Sequence[tuple[int, tuple[int, ...], torch.dtype]],
        results: Sequence[int],
        offsets: Sequence[int],
        workspace: int,
        launches: Sequence[tuple[BoundLaunch, tuple[int, ...], int]],
        call: Any = None,
    ) -> None:
        self.device = where.index
        self.call = call
        self._where = where
        self._made = tuple(made)
        self._results = tuple(results)
        self._offsets = tuple(offsets)
        self._workspace = workspace
        # One place alone would come out of itemgetter bare; no kernel has fewer than two pointers.
        self._launches = [
            (launch.launch, itemgetter(*places), scratch) for launch, places, scratch in launches
        ]

    def run(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...] | None:
        """Allocate, launch and return; ``None`` without any effect if a tensor is not aligned.

        The device must be the current one.
        """
        addresses = [0]
        seen = 0
        for tensor in tensors:
            address = 0 if tensor is None else tensor.data_ptr()
            seen |= address
            addresses.append(address)
        if seen & 15:
            return None
        where = self._where
        made = [
            _empty(shape, dtype=dtype, device=where) if like < 0 else _empty_like(tensors[like])  # type: ignore[arg-type]
            for like, shape, dtype in self._made
        ]
        addresses += [tensor.data_ptr() for tensor in made]
        if self._workspace:
            # Freed on return; used again only behind these launches on the same stream.
            space = _empty(self._workspace, dtype=torch.uint8, device=where)
            start = space.data_ptr()
            addresses += [start + offset for offset in self._offsets]
        stream = _raw_stream(self.device)
        for launch, places, scratch in self._launches:
            launch(stream, places(addresses), addresses[scratch])
        return tuple([None if place < 0 else made[place] for place in self._results])


NEVER = object()
"""In place of a ``Bound``: calls with this key need copies, so each goes the long way."""


def key_of(
    tensors: Sequence[Tensor | None], numbers: tuple[float | None, ...], final: bool
) -> Hashable | None:
    """What a call is remembered by, or ``None`` if it must take the long way.

    Args:
        tensors: q, k, v, those of the gate, the initial state.
        numbers: the scalars as they were given.
        final: whether the final state is wanted.
    """
    if (
        torch.compiler.is_compiling()
        or _modes()
        or _transforms()
        or _autocast()
        or forward_ad._current_level >= 0
        or checked_mode()
    ):
        return None
    parts: list[Any] = [final]
    for number in numbers:
        # 1, 1.0 and True are equal keys, and not all of them are right.
        if number is not None and type(number) is not float:
            return None
        parts.append(number)
    try:
        for t in tensors:
            if t is None:
                parts.append(None)
                continue
            if type(t) is not Tensor and type(t).__torch_dispatch__ is not _ordinary:
                return None
            parts += (t.shape, t.stride(), t.dtype, t.device)
    except (AttributeError, RuntimeError, TypeError):  # no tensor, or a sparse or nested one
        return None
    return tuple(parts)


def find(key: Hashable | None) -> Bound | None:
    """The bound call of ``key``, if there is one and its device is the current one."""
    if key is None:
        return None
    found = dispatch.bound.get(key)
    if found is None or found is NEVER:
        return None
    assert isinstance(found, Bound)
    return found if found.device == _current_device() else None


def bind(
    key: Hashable | None,
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
    from glac import engine

    if key is None or key in dispatch.bound or not _on_gpu(q):
        return
    if not engine._launchable(problem, q):
        return
    plan = dispatch.resolve(problem, q.device.index)[1]
    if plan is None or not all(isinstance(x, DeviceKernel) for x in plan.kernels.values()):
        return
    if torch.cuda.is_current_stream_capturing():
        return
    given = (q, k, v, *gate.tensors, initial_state)
    if any(t is not None and t.data_ptr() % 16 for t in given):
        return  # as it does not say whether the others with this key are
    *usable, usable_gate = engine._laid_out_inputs(problem.spec, q, k, v, gate)
    laid_out = (*usable, *usable_gate.tensors, engine.contiguous(initial_state))
    if _moved(given, laid_out):
        dispatch.bound[key] = NEVER
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
    dispatch.bound[key] = _bound(q.device, notes, inputs, results, call) or NEVER


def backward_key(
    key: Hashable | None, do: Tensor, dht: Tensor | None, dh0: bool
) -> Hashable | None:
    """What the backward pass of a call with ``key`` is remembered by."""
    if key is None:
        return None
    return key, do.stride(), do.dtype, None if dht is None else dht.stride(), dh0


def bind_backward(
    key: Hashable | None,
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
    """Remember a backward pass that went well; arguments are those of ``glac.engine.backward``.

    Only a dense gate's: the gradients of a low-rank one are summed up between and behind launches.
    """
    from glac import engine
    from glac.backward import run_backward

    if key is None or key in dispatch.bound or not _on_gpu(q):
        return
    if not engine._launchable(problem, q):
        return
    plan = dispatch.resolve(problem, q.device.index, Op.BACKWARD)[1]
    if plan is None or not all(isinstance(x, DeviceKernel) for x in plan.kernels.values()):
        return
    if torch.cuda.is_current_stream_capturing():
        return
    given = (q, k, v, *gate.tensors, initial_state, do, dht)
    if any(t is not None and t.data_ptr() % 16 for t in given):
        return
    *usable, usable_gate = engine._laid_out_inputs(problem.spec, q, k, v, gate)
    states = (engine.contiguous(initial_state), engine.contiguous(dht))
    do_usable = engine.laid_out(do, stride_unit(problem.spec.V))
    laid_out = (*usable, *usable_gate.tensors, states[0], do_usable, states[1])
    if gate.lowrank or _moved(given, laid_out):
        dispatch.bound[key] = NEVER
        return
    inputs = _doubles(given)
    a, b, c, g, start, d, e = inputs
    assert a is not None
    assert b is not None
    assert c is not None
    assert d is not None
    noted, notes = _noted(plan)
    with torch.cuda.device(q.device):
        dq, dk, dv, dgates, dstate = run_backward(
            noted, a, b, c, GateInput((g,)), scale, start, d, e, dh0=dh0
        )
    results = (dq, dk, dv, *dgates, dstate)
    dispatch.bound[key] = _bound(q.device, notes, inputs, results, None) or NEVER


def _moved(given: Sequence[Tensor | None], laid_out: Sequence[Tensor | None]) -> bool:
    """Whether a layout had to be copied."""
    pairs = zip(given, laid_out, strict=True)
    return any(a is not None and b is not None and a.data_ptr() != b.data_ptr() for a, b in pairs)


def _doubles(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Tensors of the same layout without memory, one for each: known by identity.

    Whatever is allocated for them has no memory either. On the device a second set of results
    and scratch would be there for a moment: 250 MiB more at 16,2048,8,128,128, backward.
    """
    if len(dispatch.bound) >= LIMIT:
        dispatch.bound.clear()
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


def _bound(
    where: torch.device,
    notes: Sequence[_Note],
    inputs: Sequence[Tensor | None],
    results: Sequence[Tensor | None],
    call: Any,
) -> Bound | None:
    """From notes to launches; ``None`` if results are more than what the launches have written."""
    made: list[tuple[int, tuple[int, ...], torch.dtype]] = []
    owners: dict[int, int] = {}
    given = {_memory(t) for t in inputs if t is not None}
    places = []
    for result in results:
        if result is None:
            places.append(-1)
            continue
        memory = _memory(result)
        whole = result.numel() * result.itemsize == result.untyped_storage().nbytes()
        if not (whole and result.is_contiguous()) or memory in owners or memory in given:
            return None
        owners[memory] = 1 + len(inputs) + len(made)
        places.append(len(made))
        shape = tuple(result.shape)
        doubles = (
            index
            for index, t in enumerate(inputs)
            if t is not None
            and (tuple(t.shape), t.dtype, t.is_contiguous()) == (shape, result.dtype, True)
        )
        made.append((next(doubles, -1), shape, result.dtype))
    written = {_memory(t) for note in notes for t in note.tensors if t is not None}
    if not owners.keys() <= written:
        return None
    spaces: dict[int, int] = {}
    workspace = 0
    offsets: list[int] = []
    launches = []
    first = 1 + len(inputs) + len(made)

    def place_of(t: Tensor | None) -> int | None:
        nonlocal workspace
        if t is None:
            return 0
        for index, other in enumerate(inputs):
            if t is other:
                return 1 + index
        memory = _memory(t)
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
    return Bound(where, made, places, offsets, workspace, launches, call)
