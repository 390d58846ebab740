"""Load cubins and launch them through the CUDA driver, with ctypes.

ctypes is part of Python, imports in 2 ms and launches as fast as the alternatives: measured on a
Hopper host (docs/performance.md, "Launch paths"). The driver library is opened on first use.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from glac.errors import DriverError, MissingEnvironmentError, PackError

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: this thread has no current context yet
_DEFAULT_SHARED = 48 * 1024
_CODES = {"i32": ("i", 4), "fp32": ("f", 4)}


_forked = False
"""Whether this process is the child of one that had the driver open: its handles mean nothing."""


def check_fork() -> None:
    """Refuse to go on in a child of a process that used the driver.

    Raises:
        DriverError: this is such a child.
    """
    if _forked:
        raise DriverError(
            "this process was forked from one that had already loaded GPU kernels, and CUDA does "
            "not survive a fork",
            hint="start workers with the method spawn or forkserver, or fork before the first use "
            "of the GPU; CPU tensors work here",
        )


def _after_fork() -> None:
    global _forked
    if _open_library.cache_info().currsize:
        _forked = True
        # Whoever still holds a kernel gets the error, not a crash; launches pay nothing for it.
        DriverKernel.launch = _refuse_launch  # type: ignore[method-assign]
        BoundLaunches.run = _refuse_launch  # type: ignore[method-assign]


def _refuse_launch(*args: Any, **options: Any) -> None:
    check_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _library() -> Any:
    check_fork()
    return _open_library()


@functools.cache
def _open_library() -> Any:
    for name in ("libcuda.so.1", "libcuda.so", "nvcuda.dll"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if library.cuInit(0) == 0:
            return library
    raise MissingEnvironmentError(
        "no CUDA driver with a working GPU",
        hint="CPU tensors run through PyTorch; building and inspecting packs needs no GPU",
    )


@functools.cache
def _launcher() -> Any:
    """``cuLaunchKernelEx`` with declared types: plain integers are converted without wrappers.

    Its four arguments cost ctypes half of what the eleven of ``cuLaunchKernel`` do; the rest of
    these is in a buffer, written by one ``struct`` call together with the kernel's arguments.
    """
    prototype = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
    return prototype(("cuLaunchKernelEx", _library()))


# CUlaunchConfig (grid, block, shared memory, stream, attributes), up to where arguments begin.
_CONFIG = "@7I4xQQI4x8x"
_CONFIG_SIZE = struct.calcsize(_CONFIG)
_STREAM_OFFSET = 32
_POINTER = struct.Struct("@Q")


def _check(code: int, what: str) -> None:
    if code == 0:
        return
    name = ctypes.c_char_p()
    _library().cuGetErrorName(code, ctypes.byref(name))
    text = name.value.decode() if name.value else "unknown error"
    raise DriverError(f"{what}: {text} ({code})")


def driver_version() -> tuple[int, int]:
    """CUDA version the installed driver supports, such as ``(12, 9)``."""
    value = ctypes.c_int()
    _check(_library().cuDriverGetVersion(ctypes.byref(value)), "cuDriverGetVersion")
    return value.value // 1000, value.value % 1000 // 10


def _enter_primary_context(device: int) -> None:
    """Make the device's primary context, which PyTorch uses, current in this thread."""
    library, context = _library(), ctypes.c_void_p()
    handle = ctypes.c_int()
    _check(library.cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
    _check(
        library.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain"
    )
    _check(library.cuCtxSetCurrent(context), "cuCtxSetCurrent")


def _want_context(device: int) -> None:
    """Give this thread a context if it has none: autograd's threads begin without."""
    context = ctypes.c_void_p()
    _check(_library().cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    if not context.value:
        _enter_primary_context(device)


def argument_format(kinds: Sequence[str]) -> str:
    """``struct`` format of a kernel's parameter buffer: natural alignment, pointers as 8 bytes.

    The compiler appends two pointers to every kernel, for global and for profiling scratch.
    """
    codes = "".join("Q" if kind.startswith("*") else _CODES[kind][0] for kind in kinds)
    return f"@{codes}QQ"


class DriverKernel:
    """A loaded kernel, ready to launch on one device.

    Args:
        name: for messages.
        cubin: machine code, already verified.
        symbol: entry point.
        kinds: run-time argument kinds in order, pointers first.
        num_warps: warps per program.
        shared: dynamic shared memory in bytes.
        scratch_bytes: global scratch per program.
        device: CUDA device index.

    Raises:
        PackError: the cubin does not load, or its parameters are not those of ``kinds``.
    """

    def __init__(
        self,
        name: str,
        cubin: bytes,
        symbol: str,
        kinds: Sequence[str],
        num_warps: int,
        shared: int,
        scratch_bytes: int,
        device: int,
    ) -> None:
        self.name = name
        self.device = device
        self.scratch_bytes = scratch_bytes
        self.kinds = tuple(kinds)
        arguments = argument_format(kinds)
        layout = struct.Struct(_CONFIG + arguments.removeprefix("@"))
        self.pack_into = layout.pack_into
        self.buffer_size = layout.size
        self._size = ctypes.c_size_t(struct.calcsize(arguments))
        self.threads = 32 * num_warps
        self.shared = shared
        # Buffers that no launch is using: ctypes drops the GIL while the driver reads one.
        self._slots: list[Slot] = []
        library = _library()
        # Without a context the driver does not tell a kernel's parameters.
        _want_context(device)
        self.launch_kernel = _launcher()
        self._cubin = cubin  # the driver may read it after the load call
        module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
        code = library.cuLibraryLoadData(
            ctypes.byref(module), ctypes.c_char_p(cubin), None, None, 0, None, None, 0
        )
        if code:
            raise PackError(
                f"the driver refuses the machine code of {name} (error {code})",
                hint="the pack may be for another GPU or need a newer driver: glac pack show",
            )
        _check(
            library.cuLibraryGetKernel(ctypes.byref(kernel), module, symbol.encode()),
            f"looking up {symbol} in {name}",
        )
        self._handle = kernel
        self.address = kernel.value or 0
        self._check_parameters(library, kinds)
        if shared > _DEFAULT_SHARED:
            handle = ctypes.c_int()
            _check(library.cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
            _check(
                library.cuKernelSetAttribute(_MAX_DYNAMIC_SHARED, shared, kernel, handle),
                f"reserving {shared} bytes of shared memory for {name}",
            )

    def _check_parameters(self, library: Any, kinds: Sequence[str]) -> None:
        try:
            info = library.cuKernelGetParamInfo
        except AttributeError:  # drivers before CUDA 12.4 cannot tell
            return
        sizes = [8 if kind.startswith("*") else _CODES[kind][1] for kind in kinds] + [8, 8]
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        found = []
        for index in range(len(sizes) + 1):
            if info(
                self._handle, ctypes.c_size_t(index), ctypes.byref(offset), ctypes.byref(size)
            ):
                break
            found.append(size.value)
        if found != sizes:
            raise PackError(
                f"{self.name} takes parameters of {found} bytes, its manifest says {sizes}",
                hint="the pack is damaged or from another glac version; rebuild it: glac build",
            )

    def load_now(self) -> None:
        """Put the code on the device, which the driver otherwise does at the first launch.

        The device must be this thread's current one.
        """
        library, function = _library(), ctypes.c_void_p()
        _want_context(self.device)
        _check(
            library.cuKernelGetFunction(ctypes.byref(function), self._handle),
            f"loading {self.name}",
        )
        try:
            load = library.cuFuncLoad
        except AttributeError:  # drivers before CUDA 12.4 have loaded it by now
            return
        _check(load(function), f"loading {self.name}")

    def new_slot(self) -> Slot:
        """A buffer for one launch at a time."""
        buffer = ctypes.create_string_buffer(self.buffer_size)
        start = ctypes.addressof(buffer)
        extra = (ctypes.c_void_p * 5)(
            1,  # CU_LAUNCH_PARAM_BUFFER_POINTER
            start + _CONFIG_SIZE,
            2,  # CU_LAUNCH_PARAM_BUFFER_SIZE
            ctypes.addressof(self._size),
            0,  # CU_LAUNCH_PARAM_END
        )
        return Slot(buffer, start, ctypes.addressof(extra), extra)

    def launch(self, values: Sequence[Any], grid: int, stream: int, scratch: int = 0) -> None:
        """Launch ``grid`` programs on a raw stream handle.

        Args:
            values: one per argument; pointers are addresses (0 for absent).
            grid: number of programs.
            stream: ``CUstream`` as an integer.
            scratch: address of ``grid * scratch_bytes`` bytes of device memory.
        """
        # Taken, not looked at: two threads never get the same one.
        try:
            slot = self._slots.pop()
        except IndexError:
            slot = self.new_slot()
        head = (grid, 1, 1, self.threads, 1, 1, self.shared, stream, 0, 0)
        self.pack_into(slot.buffer, 0, *head, *values, scratch, 0)
        code = self.launch_kernel(slot.start, self.address, 0, slot.extra)
        if code:
            self.launch_again(code, (slot.start, self.address, 0, slot.extra), grid)
        self._slots.append(slot)

    def launch_again(self, code: int, arguments: tuple[int, ...], grid: int) -> None:
        """After a launch that failed with ``code``: with a context, if that was missing.

        Args:
            code: of the driver.
            arguments: of the launch, as the driver takes them.
            grid: for messages.

        Raises:
            DriverError: it fails for another reason, or again.
        """
        if code == _INVALID_CONTEXT:
            _enter_primary_context(self.device)
            code = self.launch_kernel(*arguments)
        if code:
            _check(code, f"launching {self.name} with a grid of {grid}")


class Slot(NamedTuple):
    """Memory that the driver reads during one launch.

    Attributes:
        buffer: launch configuration and arguments.
        start: its address.
        extra: address of the list that tells the driver where the arguments are.
        keep: that list.
    """

    buffer: Any
    start: int
    extra: int
    keep: Any


class BoundLaunch(NamedTuple):
    """A launch in which only pointers and the stream are open.

    Attributes:
        kernel: to launch.
        scalars: values of the arguments that are no pointers.
        grid: number of programs.
    """

    kernel: DriverKernel
    scalars: Sequence[Any]
    grid: int

    @property
    def scratch_bytes(self) -> int:
        """Device memory that it needs for its time."""
        return self.grid * self.kernel.scratch_bytes


class _Series:
    """Memory that the driver reads while it launches one ``BoundLaunches``.

    A table of addresses, and for each launch its configuration, its scalars, and the list of where
    its arguments are: in the table, or among the scalars.

    Attributes:
        table: all of the memory, which begins with the table.
        stream: that the configurations are for.
        calls: for each launch what the driver is called with.
    """

    def __init__(
        self, launches: Sequence[tuple[BoundLaunch, tuple[int, ...], int]], count: int
    ) -> None:
        sizes = [
            _CONFIG_SIZE + 8 * (len(launch.kernel.kinds) + 2) + 8 * len(launch.scalars)
            for launch, _, _ in launches
        ]
        self.table = ctypes.create_string_buffer(8 * count + sum(sizes))
        self.stream = 0
        self._streams: list[int] = []
        base = ctypes.addressof(self.table)
        at = 8 * count
        calls = []
        for (launch, places, scratch), size in zip(launches, sizes, strict=True):
            kernel = launch.kernel
            assert len(places) + len(launch.scalars) == len(kernel.kinds)
            config, arguments, scalar = at, at + _CONFIG_SIZE, at + size - 8 * len(launch.scalars)
            head = (launch.grid, 1, 1, kernel.threads, 1, 1, kernel.shared, 0, 0, 0)
            struct.pack_into(_CONFIG, self.table, config, *head)
            where = []
            pointers, scalars = iter(places), iter(launch.scalars)
            for kind in kernel.kinds:
                if kind.startswith("*"):
                    where.append(base + 8 * next(pointers))
                else:
                    struct.pack_into("@" + _CODES[kind][0], self.table, scalar, next(scalars))
                    where.append(base + scalar)
                    scalar += 8
            # The compiler's own two pointers: global scratch, and that of profiling, which is 0.
            where += [base + 8 * scratch, base]
            struct.pack_into(f"@{len(where)}Q", self.table, arguments, *where)
            calls.append((base + config, kernel.address, base + arguments))
            self._streams.append(config + _STREAM_OFFSET)
            at += size
        self.calls = tuple(calls)

    def move(self, stream: int) -> None:
        """To another stream."""
        for offset in self._streams:
            _POINTER.pack_into(self.table, offset, stream)
        self.stream = stream


class BoundLaunches:
    """Launches one behind the other, of which a call gives addresses and a stream.

    A call writes one table of addresses, at which the arguments of all launches point: writing
    each launch's own took as long as launching it. There are as many tables as threads that are
    in a call at the same time.

    Args:
        launches: for each the place in the table of each of its pointers, and of its scratch.
        count: of addresses in the table. The first of them is 0.
    """

    def __init__(
        self, launches: Sequence[tuple[BoundLaunch, tuple[int, ...], int]], count: int
    ) -> None:
        self.launches = tuple(launches)
        self._count = count
        self._pack = struct.Struct(f"@{count}Q").pack_into
        self._launch_kernel = launches[0][0].kernel.launch_kernel
        self._free = [_Series(self.launches, count)]

    def run(self, stream: int, addresses: Sequence[int]) -> None:
        """Launch on a raw stream handle, with all addresses of the table."""
        # Taken, not looked at: two threads never get the same one.
        try:
            series = self._free.pop()
        except IndexError:
            series = _Series(self.launches, self._count)
        self._pack(series.table, 0, *addresses)
        if series.stream != stream:
            series.move(stream)
        launch_kernel = self._launch_kernel
        for start, kernel, arguments in series.calls:
            code = launch_kernel(start, kernel, arguments, 0)
            if code:
                self._again(code, series, (start, kernel, arguments, 0))
        self._free.append(series)

    def _again(self, code: int, series: _Series, call: tuple[int, int, int, int]) -> None:
        launch = self.launches[series.calls.index(call[:3])][0]
        launch.kernel.launch_again(code, call, launch.grid)


class KernelCache:
    """Kernels by (cubin hash, symbol, device): each loaded once per process, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kernels: dict[tuple[str, str, int], DriverKernel] = {}

    def __len__(self) -> int:
        return len(self._kernels)

    def get(self, key: tuple[str, str, int], load: Any) -> DriverKernel:
        """The kernel of ``key``, made by ``load()`` if this is its first use."""
        found = self._kernels.get(key)
        if found is None:
            with self._lock:
                found = self._kernels.get(key)
                if found is None:
                    found = self._kernels[key] = load()
        return found
