"""Compile kernels ahead of time, on any machine, with a pinned assembler.

Triton's own default assembler gives wrong results on Hopper for kernels like these (ptxas 12.8.93:
errors of 0.4 and illegal memory accesses where 12.9.86 and 13.0.88 are right), so glac brings
ptxas 12.9.86 and refuses older ones for sm_90a. Its cubins load on every driver for CUDA 12.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import os
import queue
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from glac.errors import CompileError, GlacError, MissingEnvironmentError
from glac.generate import ast_source, import_triton
from glac.gpus import ARCHS, GPUS
from glac.kernelspec import KernelSpec

PINNED_PTXAS = "12.9.86"
OLDEST_HOPPER_PTXAS = (12, 9)
DRIVER_FLOOR = {"12": 525, "13": 580}
"""Oldest driver branch that loads a cubin of that assembler's major version."""


@dataclass(frozen=True)
class Toolchain:
    """What turns a template into machine code.

    Attributes:
        triton: version of the Triton compiler.
        ptxas: version of the assembler.
        ptxas_path: where it is (never recorded).
    """

    triton: str
    ptxas: str
    ptxas_path: Path

    @property
    def driver_floor(self) -> int:
        return DRIVER_FLOOR.get(self.ptxas.split(".")[0], 580)

    def to_dict(self) -> dict[str, str]:
        return {"triton": self.triton, "ptxas": self.ptxas}


@dataclass(frozen=True)
class CompiledKernel:
    """Machine code with the facts that are known without a GPU.

    Attributes:
        kernel: what was compiled.
        cubin: the machine code.
        sha256: of the cubin, in hex.
        symbol: entry point.
        shared: dynamic shared memory, bytes.
        registers: per thread.
        spill_bytes: stored to local memory because registers ran out, called functions included.
        scratch_bytes: global scratch per program (tensor descriptors), 0 for most kernels.
        twin: the same program assembled for another arch as well, empty if nobody asked.
    """

    kernel: KernelSpec
    cubin: bytes
    sha256: str
    symbol: str
    shared: int
    registers: int
    spill_bytes: int
    scratch_bytes: int
    num_warps: int
    twin: bytes = b""


def _ptxas_version(path: Path) -> str:
    try:
        done = subprocess.run(
            [str(path), "--version"], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise MissingEnvironmentError(
            f"the assembler {path} does not run ({error})",
            hint="reinstall it: pip install --force-reinstall 'glac[build]'",
        ) from None
    found = re.search(r"V(\d+\.\d+\.\d+)", done.stdout)
    if not found:
        raise MissingEnvironmentError(f"{path} --version says no version: {done.stdout!r}")
    return found.group(1)


def _pinned_ptxas() -> Path | None:
    try:
        found = importlib.util.find_spec("nvidia.cuda_nvcc")
    except ModuleNotFoundError:
        return None
    for root in (found.submodule_search_locations or []) if found else []:
        path = Path(root) / "bin" / "ptxas"
        if path.is_file():
            return path
    return None


@functools.cache
def toolchain(ptxas: str | None = None) -> Toolchain:
    """The toolchain in use: installed Triton, and the pinned assembler or the one given.

    Raises:
        MissingEnvironmentError: Triton or the assembler is missing, or too old for Hopper.
    """
    triton = import_triton()
    path = Path(ptxas) if ptxas else _pinned_ptxas()
    if path is None:
        raise MissingEnvironmentError(
            f"the assembler ptxas {PINNED_PTXAS} is not installed",
            hint="pip install 'glac[build]' brings it",
        )
    version = _ptxas_version(path)
    if tuple(map(int, version.split(".")[:2])) < OLDEST_HOPPER_PTXAS:
        raise MissingEnvironmentError(
            f"ptxas {version} miscompiles Hopper kernels; at least 12.9 is needed ({path})",
            hint=f"pip install nvidia-cuda-nvcc-cu12=={PINNED_PTXAS}",
        )
    return Toolchain(str(triton.__version__), version, path)


class _PinnedAssembler:
    """While at least one compilation runs: the pinned assembler is Triton's.

    Triton's knobs are global to the process and ``knobs.scope`` restores them on exit, so scopes
    of two threads would undo each other and a kernel could get Triton's default assembler. One
    counted scope serves all threads. Other libraries' kernels keep the assembler they chose.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active = 0
        self._path: Path | None = None
        self._stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self, path: Path) -> Iterator[None]:
        with self._lock:
            if self._active and path != self._path:
                raise CompileError(f"compilations with {self._path} still run, {path} must wait")
            if not self._active:
                self._enter(path)
            self._active += 1
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1
                if not self._active:
                    self._stack.close()

    def _enter(self, path: Path) -> None:
        knobs = importlib.import_module("triton.knobs")
        backend = importlib.import_module("triton.backends.nvidia.compiler")
        self._path = path
        with contextlib.ExitStack() as stack:
            stack.enter_context(knobs.nvidia.scope())
            knobs.nvidia.ptxas = str(path)
            # Triton 3.9 assembles sm_90 with the second one. (hasattr is False for its knobs.)
            if "ptxas_blackwell" in vars(type(knobs.nvidia)):
                knobs.nvidia.ptxas_blackwell = str(path)
            # A failing assembler makes Triton print the whole program on stdout.
            stack.callback(vars(backend).pop, "print", None)
            vars(backend)["print"] = lambda *args, **kwargs: None
            self._stack = stack.pop_all()


_pinned_assembler = _PinnedAssembler()


_READ_PERSONALITY = 0xFFFFFFFF
_ADDR_NO_RANDOMIZE = 0x0040000


@contextlib.contextmanager
def fixed_addresses() -> Iterator[None]:
    """Programs that this thread starts get the same memory addresses every time.

    ptxas puts some of its decisions in the order of addresses. With these drawn at random, as is
    usual, a kernel of the low-rank backward pass came out as one of two binaries, the rarer one in
    a fifth of the runs. Where the system forbids it (some containers do), nothing is changed.
    """
    try:
        personality = ctypes.CDLL(None).personality
    except (AttributeError, OSError):  # not Linux
        yield
        return
    personality.argtypes = [ctypes.c_ulong]
    before = personality(_READ_PERSONALITY)
    if before != -1:
        personality(before | _ADDR_NO_RANDOMIZE)
    try:
        yield
    finally:
        if before != -1:
            personality(before)


def _resource_use(ptx: str, arch: str, ptxas: Path) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(ptxas), "-v", f"-arch={arch}", str(source), "-o", os.devnull]
        with fixed_addresses():
            done = subprocess.run(command, capture_output=True, text=True, check=False)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    # One line for the kernel and one for each function it calls.
    spills = re.findall(r"(\d+) bytes spill stores", done.stderr)
    if "Unsupported .version" in done.stderr:
        # Then this Triton did not take the assembler it was given, and what it made is not ours.
        raise CompileError(
            f"this Triton emits code that {ptxas.name} does not read: {done.stderr.strip()[:200]}",
            hint="use a Triton from 3.6 to 3.9 with the assembler of 'glac[build]'",
        )
    if done.returncode or not registers or not spills:
        raise CompileError(f"ptxas reports no resource use: {done.stderr.strip()[:400]}")
    return int(registers.group(1)), sum(map(int, spills))


def _assemble(ptx: str, arch: str, ptxas: Path) -> bytes:
    """Machine code of a program for an arch that is newer than the one it was written for."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        done = subprocess.run(
            [str(ptxas), f"-arch={arch}", str(source), "-o", str(target)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise CompileError(f"ptxas for {arch} fails: {done.stderr.strip()[:400]}")
        return target.read_bytes()


def compile_kernel(
    kernel: KernelSpec, tools: Toolchain | None = None, twin_arch: str = ""
) -> CompiledKernel:
    """Compile one kernel for its arch, on this machine's CPU.

    Args:
        kernel: what to compile.
        tools: the toolchain, that in use if None.
        twin_arch: assemble the same program for this arch too, such as Ampere's for ``sm_90``.

    Raises:
        CompileError: the compiler or assembler fails, or the kernel needs more shared memory
            than its arch has.
    """
    tools = tools or toolchain()
    triton = import_triton()
    backends = importlib.import_module("triton.backends.compiler")
    options = {
        "num_warps": kernel.config.num_warps,
        "num_stages": getattr(kernel.config, "num_stages", 1),
        "enable_fp_fusion": True,
        "maxnreg": getattr(kernel.config, "max_registers", 0) or None,
    }
    target = backends.GPUTarget("cuda", ARCHS[kernel.arch], 32)
    try:
        with _pinned_assembler(tools.ptxas_path), fixed_addresses():
            built = triton.compile(ast_source(kernel), target=target, options=options)
    except GlacError:
        raise
    except Exception as error:
        raise CompileError(
            f"{kernel.name} does not compile: {type(error).__name__}: {str(error)[:600]}"
        ) from error
    meta = built.metadata
    limit = max(g.shared_per_block for g in GPUS.values() if g.arch == kernel.arch)
    if meta.shared > limit:
        raise CompileError(
            f"{kernel.name} needs {meta.shared} bytes of shared memory, {kernel.arch} has {limit}",
            hint="fewer stages, a shorter chunk or a smaller block_v need less",
        )
    registers, spill = _resource_use(built.asm["ptx"], kernel.arch, tools.ptxas_path)
    cubin = bytes(built.asm["cubin"])
    return CompiledKernel(
        kernel=kernel,
        cubin=cubin,
        sha256=hashlib.sha256(cubin).hexdigest(),
        symbol=str(meta.name),
        shared=int(meta.shared),
        registers=registers,
        spill_bytes=spill,
        scratch_bytes=int(meta.global_scratch_size),
        num_warps=int(meta.num_warps),
        twin=_assemble(built.asm["ptx"], twin_arch, tools.ptxas_path) if twin_arch else b"",
    )


def compile_many(
    kernels: Iterable[KernelSpec],
    jobs: int | None = None,
    on_done: Callable[[KernelSpec, CompiledKernel | GlacError], None] | None = None,
    twin_arch: str = "",
) -> dict[KernelSpec, CompiledKernel | GlacError]:
    """Compile kernels in parallel processes. One that fails maps to its error; the rest go on.

    Args:
        kernels: what to compile; repeated ones are compiled once.
        jobs: processes, default one per CPU.
        on_done: called with each result as it arrives, from one thread at a time.
        twin_arch: as in ``compile_kernel``.
    """
    from glac.compile_worker import Worker

    todo: Sequence[KernelSpec] = list(dict.fromkeys(kernels))
    results: dict[KernelSpec, CompiledKernel | GlacError] = {}
    if not todo:
        return results
    tools = toolchain()
    count = min(jobs or os.cpu_count() or 1, len(todo))
    workers: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    everyone = [Worker(tools) for _ in range(count)]
    for worker in everyone:
        workers.put(worker)

    def one(kernel: KernelSpec) -> CompiledKernel | GlacError:
        worker = workers.get()
        try:
            return worker.compile(kernel, twin_arch)
        finally:
            workers.put(worker)

    with ThreadPoolExecutor(count) as pool:
        futures = {pool.submit(one, kernel): kernel for kernel in todo}
        try:
            for future in as_completed(futures):
                kernel = futures[future]
                results[kernel] = future.result()
                if on_done:
                    on_done(kernel, results[kernel])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            for worker in everyone:
                worker.close()
    return {kernel: results[kernel] for kernel in todo}
