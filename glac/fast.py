"""The short way of a call that is like one before: one lookup instead of checks and arguments.

A call is *bound* after it went the long way once (``glac.binding``): what it launches, in which
order, with which scalars and grids is written down, and the pointers are left open. The key holds
everything that the checks, the layouts and the launches depend on, apart from alignment, which is
looked at each time.

Most calls are like one of the last few. For these PyTorch compares all tensors in one step, which
takes 0.6 us; making and looking up a key takes 4.

Whatever has to see a call before it runs (tracing, modes, autocast, checked mode, subclasses)
takes the long way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from glac.settings import checked_mode

if TYPE_CHECKING:
    from glac.driver import BoundLaunch

_empty_like = torch.empty_like
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_autocast = torch._C._is_any_autocast_enabled
_ordinary = torch._C._disabled_torch_dispatch_impl
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda i: 0)
# What guards compiled code; without it each call looks up its key.
_guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)

_NUMBERS = frozenset((float, type(None)))

Check = Callable[..., bool]
"""Whether tensors, as many as it was made of, are like those it was made of."""


class Bound:
    """The launches of one pass, all but the pointers.

    Args:
        where: the CUDA device.
        there: which of its tensors a call has; only these are counted below.
        made: shape and dtype of each tensor that is allocated for the results.
        results: for each result its place in ``made``, or -1 for none.
        offsets: addresses inside the workspace that launches use.
        workspace: bytes of it.
        launches: for each the places of its pointers, and of its scratch, in the table of
            addresses, which is 0, tensors, results, addresses in the workspace.
        call: what the backward pass needs to know.

    Attributes:
        results: as given.
        pick: these of what ``launch`` returns.
        likes: what ``recall`` compares calls with, by which tensors want gradients.
        backward: backward passes of this call, by which gradients are wanted and whether that of
            the final state is given: what to compare, the pass, and what to take of its results.
    """

    def __init__(
        self,
        where: torch.device,
        there: Sequence[bool],
        made: Sequence[tuple[tuple[int, ...], torch.dtype]],
        results: Sequence[int],
        offsets: Sequence[int],
        workspace: int,
        launches: Sequence[tuple[BoundLaunch, tuple[int, ...], int]],
        call: Any = None,
    ) -> None:
        from glac.driver import BoundLaunches

        self.device = where.index
        self.call = call
        self.results = tuple(results)
        self.likes: dict[Hashable, _Like] = {}
        self.backward: dict[Hashable, tuple[Check, Bound, Callable[..., Any]]] = {}
        self._there = tuple(there)
        self._patterns = [_pattern(shape, dtype, where) for shape, dtype in made]
        self._space = _pattern((workspace,), torch.uint8, where) if workspace else None
        self._offsets = tuple(offsets)
        count = 1 + sum(self._there) + len(self._patterns) + len(self._offsets)
        self._launches = BoundLaunches(launches, count)
        # One place alone would come out of itemgetter bare; no pass has fewer than two results.
        self.pick = itemgetter(*self.results)

    def run(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...] | None:
        """Allocate, launch and return; ``None`` without any effect if a tensor is not aligned.

        The device must be the current one.
        """
        made = self.launch([t for t in tensors if t is not None])
        return None if made is None else self.pick(made)

    def launch(self, given: Sequence[Tensor]) -> list[Tensor | None] | None:
        """``run`` without absent tensors, to what was allocated, and ``None`` at the end of it."""
        addresses = [0]
        seen = 0
        try:
            for tensor in given:
                address = tensor.data_ptr()
                seen |= address
                addresses.append(address)
        except RuntimeError:  # what torch.func has left behind has no memory
            return None
        if seen & 15:
            return None
        made: list[Tensor | None] = []
        # Results have memory of their own: one gradient may outlive the others for long. And all
        # is asked for in one way. PyTorch's code for it has left the processor's caches since the
        # last call, so the first time takes 6 us, and others 1.2: scratch by torch.empty took 6.8.
        for pattern in self._patterns:
            new = _empty_like(pattern)
            made.append(new)
            addresses.append(new.data_ptr())
        if self._space is not None:
            # Freed on return; used again only behind these launches on the same stream.
            space = _empty_like(self._space)
            start = space.data_ptr()
            for offset in self._offsets:
                addresses.append(start + offset)
        self._launches.run(_raw_stream(self.device), addresses)
        made.append(None)
        return made

    def spread(self, given: Sequence[Any]) -> list[Any]:
        """Something for each tensor that a call has, ``None`` for each absent one."""
        items = iter(given)
        return [next(items) if there else None for there in self._there]

    def gathered(self, every: Sequence[Any]) -> list[Any]:
        """The inverse of ``spread``."""
        return [item for item, there in zip(every, self._there, strict=False) if there]


_elements: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _pattern(shape: tuple[int, ...], dtype: torch.dtype, where: torch.device) -> Tensor:
    """What ``empty_like`` makes a contiguous tensor of ``shape`` from: one element, repeated."""
    with torch.inference_mode(False):
        one = _elements.get((dtype, where))
        if one is None:
            one = _elements[dtype, where] = torch.empty((), dtype=dtype, device=where)
        return one.expand(shape)


NEVER = object()
"""In place of a ``Bound``: calls with this key need copies, so each goes the long way."""


class _Like(NamedTuple):
    """One of the last few calls of an operation."""

    numbers: tuple[float | None, ...]
    wanted: Hashable
    check: Check
    bound: Bound


_LAST = 4
_last: dict[tuple[str, int], tuple[_Like, ...]] = {}
"""By operation and number of tensors; the newest first."""


class _Calls(dict[Hashable, Any]):
    """Forgets everything that was derived from its entries with them."""

    def clear(self) -> None:
        _last.clear()
        for call in tuple(self.values()):
            if isinstance(call, Bound):  # which a node may keep for its backward pass
                call.likes.clear()
                call.backward.clear()
        super().clear()


bound: dict[Hashable, Any] = _Calls()
"""A ``Bound`` or ``NEVER`` for each key. ``glac.dispatch`` empties it as it forgets decisions."""


def check_of(given: Sequence[Tensor]) -> Check | None:
    """What compares tensors with these: dtype, device, shape, strides, and what observes them.

    That is modes, transforms and autocast, too; ``None`` if tensors are of a type of their own, or
    PyTorch has no such thing.
    """
    if _guards is None or any(type(t) is not Tensor for t in given):
        return None
    sizes, strides = [list(t.shape) for t in given], [list(t.stride()) for t in given]
    guard = _guards.TensorGuards(*given, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    check: Check = guard.check
    return check


def recall(
    name: str,
    given: Sequence[Any],
    tensors: Sequence[Any],
    numbers: tuple[float | None, ...],
    wanted: Hashable,
) -> tuple[Hashable | None, Bound | None]:
    """What the short way knows of a call: its key, if that had to be made, and its bound call.

    Args:
        name: of the operation.
        given: the tensors without those that are absent and may be.
        tensors: all of them, in the order of the operation.
        numbers: the scalars as they were given.
        wanted: which results.
    """
    if torch.compiler.is_compiling():  # before anything that compiled code would depend on
        return None, None
    place = name, len(given)
    last = _last.get(place, ())
    if last and _floats(numbers) and forward_ad._current_level < 0 and not checked_mode():
        for like in last:
            if like.numbers == numbers and like.wanted is wanted and like.check(*given):
                if like.bound.device == _current_device():
                    return None, like.bound
                break
    key = key_of(tensors, numbers, wanted)
    found = find(key)
    if found is not None:
        which = tuple([t.requires_grad for t in given])  # which PyTorch compares, a key does not
        kept = found.likes.get(which)
        if kept is None or not kept.check(*given):
            check = check_of(given)
            if check is None:
                return key, found
            kept = found.likes[which] = _Like(numbers, wanted, check, found)
        _last[place] = (kept, *last[: _LAST - 1])
    return key, found


def _floats(numbers: tuple[float | None, ...]) -> bool:
    """Whether equal numbers are the same: 1, 1.0 and True are not, and not all are right."""
    return _NUMBERS.issuperset(map(type, numbers))


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
    if not _floats(numbers):
        return None
    return _with_layouts([wanted, *numbers], tensors)


def _with_layouts(parts: list[Any], tensors: Sequence[Tensor | None]) -> Hashable | None:
    """``parts`` and all of tensors but their addresses; ``None`` if something observes one."""
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
    forward: Bound,
    tensors: Sequence[Tensor | None],
    do: Tensor,
    dht: Tensor | None,
    dh0: bool,
) -> Hashable | None:
    """What the backward pass of a call is remembered by, or ``None`` if it goes the long way.

    Args:
        forward: the call. It stands for its key, and is hashed and compared in no time.
        tensors: its own, as they were kept: hooks may have changed layouts since.
        do: gradient of the output.
        dht: of the final state.
        dh0: whether the gradient of the initial state is wanted.
    """
    if torch.compiler.is_compiling() or _modes() or _transforms():
        return None
    return _with_layouts([forward, dh0], (*tensors, do, dht))


def gradients(forward: Bound, given: Sequence[Any], which: Hashable) -> Any:
    """What the node of a call returns, ``None`` if the long way has to be gone.

    Args:
        forward: the call.
        given: its tensors, and the gradients of its results that there are.
        which: for ``Bound.backward``.
    """
    if torch.compiler.is_compiling():
        return None
    found = forward.backward.get(which)
    if found is None:
        return None
    check, backward, pick = found
    if not check(*given) or backward.device != _current_device():
        return None
    made = backward.launch(given)
    return None if made is None else pick(made)


def keep_gradients(
    forward: Bound, given: Sequence[Tensor], which: Hashable, needs: Sequence[bool], key: Hashable
) -> None:
    """Let ``gradients`` find a backward pass.

    Args:
        forward: the call, as the other arguments for ``gradients``.
        given: as there.
        which: as there.
        needs: for each input of the node, whether its gradient is wanted.
        key: of the backward pass.
    """
    backward = find(key)
    check = None if backward is None else check_of(given)
    if check is None or backward is None:
        return
    results = forward.gathered(backward.results)
    absent = len(needs) - len(results)
    places = [-1] * absent + [
        place if need else -1 for place, need in zip(results, needs[absent:], strict=True)
    ]
    forward.backward[which] = check, backward, itemgetter(*places)
