"""The short way of a call that is like one before: one lookup instead of checks and arguments.

A call is *bound* after it went the long way once (``glac.binding``): what it launches, in which
order, with which scalars and grids is written down, and the pointers are left open. The key holds
everything that the checks, the layouts and the launches depend on, apart from alignment, which is
looked at each time.

Whatever has to see a call before it runs (tracing, modes, autocast, checked mode, subclasses)
takes the long way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from glac.settings import checked_mode

if TYPE_CHECKING:
    from glac.driver import BoundLaunch

bound: dict[Hashable, Any] = {}
"""A ``Bound`` or ``NEVER`` for each key. ``glac.dispatch`` empties it as it forgets decisions."""

_empty, _empty_like = torch.empty, torch.empty_like
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_autocast = torch._C._is_any_autocast_enabled
_ordinary = torch._C._disabled_torch_dispatch_impl
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda i: 0)


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
    tensors: Sequence[Tensor | None], numbers: tuple[float | None, ...], wanted: Hashable
) -> Hashable | None:
    """What a call is remembered by, or ``None`` if it must take the long way.

    Args:
        tensors: all that the call was given, in the order of its operation.
        numbers: the scalars as they were given.
        wanted: which results; of a type of its own for each operation with other tensors.
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
    parts: list[Any] = [wanted]
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
    found = bound.get(key)
    if found is None or found is NEVER:
        return None
    assert isinstance(found, Bound)
    return found if found.device == _current_device() else None


def backward_key(
    key: Hashable | None, do: Tensor, dht: Tensor | None, dh0: bool
) -> Hashable | None:
    """What the backward pass of a call with ``key`` is remembered by."""
    if key is None:
        return None
    return key, do.stride(), do.dtype, None if dht is None else dht.stride(), dh0
