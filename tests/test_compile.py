"""Cross-compiling on a CPU: facts, determinism, and failures that are told apart."""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glac import compile as glac_compile
from glac import compile_worker
from glac.compile import CompiledKernel, compile_kernel, compile_many, toolchain
from glac.configs import ChunkKernelConfig, CombineKernelConfig, TurnedKernelConfig
from glac.errors import CompileError, GlacError, MissingEnvironmentError
from glac.generate import ast_source, import_triton
from glac.gpus import ARCHS, GPUS
from glac.kernelspec import KernelSpec
from glac.problem import DType, Gate, Precision, Specialisation

SPEC = Specialisation(16, 32, DType.BF16, Gate.VECTOR, DType.BF16)
CONFIG = ChunkKernelConfig(chunk=16, block_v=32, num_warps=2, num_stages=2)
COMBINE = KernelSpec("gla_combine", SPEC, CombineKernelConfig(), "sm_90a")


@pytest.fixture
def fresh_toolchain() -> Iterator[None]:
    """The toolchain is found once per process."""
    toolchain.cache_clear()
    yield
    toolchain.cache_clear()


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a second compilation would only read the first one's file."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


@pytest.mark.parametrize("arch", sorted(ARCHS))
def test_facts(arch: str) -> None:
    kernel = KernelSpec("gla_fwd", SPEC, CONFIG, arch)
    built = compile_kernel(kernel)
    assert built.kernel == kernel
    assert built.cubin.startswith(b"\x7fELF")
    assert built.sha256 == hashlib.sha256(built.cubin).hexdigest()
    assert built.symbol.encode() in built.cubin
    assert built.num_warps == 2
    assert 16 <= built.registers <= 255
    assert built.spill_bytes == 0
    assert 0 < built.shared <= 64 * 1024
    assert built.scratch_bytes == 0
    assert str(Path(__file__).parents[1]).encode() not in built.cubin


def assembly(kernel: KernelSpec) -> dict[str, Any]:
    """What the compiler makes of a kernel, from ``ttir`` to ``ptx``."""
    target = importlib.import_module("triton.backends.compiler").GPUTarget(
        "cuda", ARCHS[kernel.arch], 32
    )
    options = {"num_warps": kernel.config.num_warps, "num_stages": 2}
    made = import_triton().compile(ast_source(kernel), target=target, options=options)
    return dict(made.asm)


@pytest.mark.parametrize("arch", sorted(ARCHS))
@pytest.mark.parametrize(("template", "sums"), [("gla_fwd", 1), ("scalar_fwd", 0)])
def test_products_of_fp32_inputs(arch: str, template: str, sums: int) -> None:
    """Multiplied once there is a third of the instructions, but for the sums of the gate."""
    gate = Gate.VECTOR if template == "gla_fwd" else Gate.SCALAR
    kind = ChunkKernelConfig if template == "gla_fwd" else TurnedKernelConfig
    config = kind(chunk=32, block_v=64, num_warps=4, num_stages=2)
    usual = Specialisation(64, 64, DType.FP32, gate, DType.FP32)
    asm = [
        assembly(KernelSpec(template, replace(usual, precision=precision), config, arch))
        for precision in (Precision.IEEE, Precision.TF32)
    ]
    forms = [re.findall(r"inputPrecision = (\w+)", made["ttir"]) for made in asm]
    assert len(forms[0]) == len(forms[1]) > sums
    assert set(forms[0]) == {"tf32x3"}
    assert sorted(forms[1], reverse=True) == ["tf32x3"] * sums + ["tf32"] * (len(forms[0]) - sums)
    three, one = (
        len(re.findall(r"^\s*(?:mma\.sync|wgmma\.mma_async)", made["ptx"], re.MULTILINE))
        for made in asm
    )
    assert three % 3 == 0
    if not sums:
        assert one == three // 3
    reduced = (three - one) / 2  # what is multiplied once now, each in place of three
    assert 0.85 * three / 3 <= reduced <= three / 3


def test_same_bytes_twice(no_cache: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel = KernelSpec("gla_fwd", SPEC, CONFIG, "sm_90a")
    first = compile_kernel(kernel)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "other"))
    second = compile_kernel(kernel)
    assert first == second


def test_every_thread_uses_the_pinned_assembler(
    no_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Triton's settings are global: threads that set and restore them can undo each other, and a
    # kernel then comes from Triton's own assembler, which is wrong on Hopper.
    used = set()
    run = subprocess.run

    def recording(command: list[str], *args: object, **kwargs: object) -> object:
        if "ptxas" in str(command[0]):
            used.add(str(command[0]))
        return run(command, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", recording)
    kernels = [
        KernelSpec("gla_combine", SPEC, CombineKernelConfig(256, warps), arch)
        for warps in (1, 2, 4, 8)
        for arch in ARCHS
    ]
    environment = dict(os.environ)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(compile_kernel, kernels))
    assert all(isinstance(result, CompiledKernel) for result in results)
    assert used == {str(toolchain().ptxas_path)}
    # And nothing of it stays behind for other libraries.
    assert os.environ.get("TRITON_PTXAS_PATH") == environment.get("TRITON_PTXAS_PATH")


def test_the_assembler_meets_the_same_addresses_every_time() -> None:
    """Otherwise it gives one of two binaries now and then, and packs differ by luck."""
    if not Path("/proc/self/personality").exists():
        pytest.skip("no /proc/self/personality here")

    def seen() -> int:
        done = subprocess.run(
            ["cat", "/proc/self/personality"], capture_output=True, text=True, check=True
        )
        return int(done.stdout, 16)

    before = seen()
    with glac_compile.fixed_addresses():
        inside = seen()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(seen).result() & 0x0040000  # threads inherit it
    if not inside & 0x0040000:
        pytest.skip("this system does not let programs choose")
    assert seen() == before


def test_sources_are_parsed_by_one_thread_at_a_time(
    no_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, parse, active, seen = threading.Lock(), ast.parse, [0], []

    def counting(*args: Any, **kwargs: Any) -> Any:
        with lock:
            active[0] += 1
            seen.append(active[0])
        try:
            time.sleep(0.02)
            return parse(*args, **kwargs)
        finally:
            with lock:
                active[0] -= 1

    monkeypatch.setattr(ast, "parse", counting)
    kernels = [
        KernelSpec("gla_combine", SPEC, CombineKernelConfig(block), "sm_90a")
        for block in (256, 512, 1024, 2048)
    ]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(compile_kernel, kernels))
    assert seen
    assert max(seen) == 1


def test_failure_is_reported_and_the_rest_goes_on() -> None:
    broken = KernelSpec("gla_fwd", SPEC, replace(CONFIG, chunk=24), "sm_90a")
    done: list[tuple[KernelSpec, CompiledKernel | GlacError]] = []
    results = compile_many([broken, COMBINE, COMBINE], on_done=lambda *args: done.append(args))
    assert list(results) == [broken, COMBINE]
    assert isinstance(results[COMBINE], CompiledKernel)
    error = results[broken]
    assert isinstance(error, CompileError)
    assert broken.name in error.message
    assert sorted(kernel.name for kernel, _ in done) == sorted([broken.name, COMBINE.name])
    with pytest.raises(CompileError, match="does not compile"):
        compile_kernel(broken)


def test_processes_give_what_one_thread_gives() -> None:
    kernels = [KernelSpec("gla_fwd", SPEC, CONFIG, arch) for arch in sorted(ARCHS)]
    assert compile_many(kernels, jobs=2) == {k: compile_kernel(k) for k in kernels}


def test_compiler_that_dies_takes_nothing_along(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A stand-in for the interpreter that runs workers: its first start ends at once.
    mark = tmp_path / "died"
    script = tmp_path / "python"
    script.write_text(
        f"#!/bin/sh\nif [ ! -e {mark} ]; then touch {mark}; exit 7; fi\n"
        f'exec {sys.executable} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    other = KernelSpec("gla_combine", SPEC, CombineKernelConfig(256, 2), "sm_90a")
    results = compile_many([COMBINE, other], jobs=1)
    died = results[COMBINE]
    assert isinstance(died, CompileError)
    assert "the compiler died" in died.message
    assert "exit status 7" in died.message
    assert isinstance(results[other], CompiledKernel)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("kill -9 $$", ""),
        ("exec sleep 600", "did not answer for 0.5 s"),
        ("kill -11 $$", "status -11"),
    ],
    ids=["killed from outside", "hangs", "crashes"],
)
def test_a_compiler_that_is_killed_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str, message: str
) -> None:
    mark, script = tmp_path / "begun", tmp_path / "python"
    script.write_text(
        f"#!/bin/sh\nif [ ! -e {mark} ]; then touch {mark}; {how}; fi\n"
        f'exec {sys.executable} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(compile_worker, "TIMEOUT", 0.5 if "sleep" in how else 60.0)
    result = compile_many([COMBINE], jobs=1)[COMBINE]
    if message:
        assert isinstance(result, CompileError)
        assert message in result.message
    else:
        assert isinstance(result, CompiledKernel)


def test_nothing_to_compile() -> None:
    assert compile_many([]) == {}


def test_too_much_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {name: replace(gpu, shared_per_block=1024) for name, gpu in GPUS.items()}
    monkeypatch.setattr(glac_compile, "GPUS", small)
    with pytest.raises(CompileError, match="bytes of shared memory, sm_90a has 1024") as caught:
        compile_kernel(KernelSpec("gla_fwd", SPEC, CONFIG, "sm_90a"))
    assert "fewer stages" in caught.value.hint


def test_missing_assembler(fresh_toolchain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glac_compile, "_pinned_ptxas", lambda: None)
    with pytest.raises(
        MissingEnvironmentError, match=r"ptxas 12\.9\.86 is not installed"
    ) as caught:
        compile_many([COMBINE])
    assert "glac[build]" in caught.value.hint
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'release 12.8, V12.8.93'", "miscompiles Hopper"),
        ("echo hello", "says no version"),
        ("exit 1", "does not run"),
    ],
)
def test_unfit_assembler(fresh_toolchain: None, tmp_path: Path, script: str, message: str) -> None:
    ptxas = tmp_path / "ptxas"
    ptxas.write_text(f"#!/bin/sh\n{script}\n")
    ptxas.chmod(0o755)
    with pytest.raises(MissingEnvironmentError, match=message):
        toolchain(str(ptxas))


def test_toolchain_record_has_no_paths() -> None:
    tools = toolchain()
    assert set(tools.to_dict()) == {"triton", "ptxas"}
    assert tools.driver_floor == 525
