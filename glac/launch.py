"""Kernels from a pack as something a launcher can run on torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glac.driver import BoundLaunch, DriverKernel, KernelCache, check_fork

if TYPE_CHECKING:
    from glac.pack import Pack

_CACHE = KernelCache()


class DeviceKernel:
    """A loaded kernel that launches on torch's current stream of its device."""

    def __init__(self, kernel: DriverKernel) -> None:
        self._kernel = kernel
        self._device = kernel.device
        self._scratch = kernel.scratch_bytes
        # Public torch.cuda.current_stream() builds a Stream object: 7 us a call instead of 0.1.
        self._stream = torch._C._cuda_getCurrentRawStream

    def bound(self, scalars: Sequence[Any], grid: int) -> BoundLaunch:
        """A launch with these arguments, all but the pointers."""
        return BoundLaunch(self._kernel, scalars, grid)

    def load_now(self) -> None:
        """Put the code on the device now; see ``DriverKernel.load_now``."""
        self._kernel.load_now()

    def run(self, tensors: Sequence[Tensor | None], scalars: Sequence[Any], grid: int) -> None:
        values: list[Any] = [0 if t is None else t.data_ptr() for t in tensors]
        values.extend(scalars)
        scratch = 0
        if self._scratch:
            # Freed on return; the allocator reuses it only behind this launch on the same stream.
            space = torch.empty(grid * self._scratch, dtype=torch.uint8, device=self._device)
            scratch = space.data_ptr()
        self._kernel.launch(values, grid, self._stream(self._device), scratch)


def loaded_kernels() -> int:
    """How many kernels this process has loaded, over all devices."""
    return len(_CACHE)


def load_from_pack(pack: Pack, name: str, device: int) -> DeviceKernel:
    """The kernel ``name`` of ``pack`` on a device; verified and loaded at most once per process.

    Raises:
        PackError: the cubin is damaged, or the driver refuses it.
        DriverError: this process was forked from one that had kernels loaded.
    """
    check_fork()
    info = pack.kernels[name]

    def load() -> DriverKernel:
        return DriverKernel(
            name=name,
            cubin=pack.read_cubin(name),
            symbol=info.symbol,
            kinds=[kind for _, kind in info.args],
            num_warps=info.num_warps,
            shared=info.shared,
            scratch_bytes=info.scratch_bytes,
            device=device,
        )

    return DeviceKernel(_CACHE.get((info.sha256, info.symbol, device), load))
