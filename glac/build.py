"""From tuned files to kernel packs: one pack for each arch, on any machine, without a GPU.

For each op, a GPU whose tuned file has rows gets these. Another gets heuristic rows, labelled as
such: those of its nearest relatives where these have any, else the default configs for the
standard problems.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glac import __version__
from glac.compile import CompiledKernel, Toolchain, compile_many, toolchain
from glac.configs import (
    Config,
    KernelConfig,
    default_config,
    lesser_choices,
    why_illegal,
)
from glac.errors import CompileError, ConfigError, GlacError, PackError
from glac.gpus import GPUS, RELATIVES, GpuSpec, gpu_by_name
from glac.kernelspec import KernelSpec, config_kernels
from glac.pack import Pack, PackRow, read_pack, write_pack
from glac.problem import DType, Gate, Op, Problem, Specialisation
from glac.templates import templates_sha256
from glac.tuned import TunedFile, load_tuned, shipped

Progress = Callable[[int, int, str], None]
"""Called with kernels done, kernels known so far, and the name of the one just done."""


def _standard_problems() -> tuple[Problem, ...]:
    bf16 = DType.BF16
    sizes = (
        (8, 2048, 16, 64, 64),
        (16, 2048, 8, 128, 128),
        (4, 4096, 64, 128, 128),
        (8, 2048, 4, 128, 256),
        (8, 2048, 4, 256, 512),
    )
    vector = [
        Problem(Specialisation(K, V, bf16, Gate.VECTOR, bf16), B, T, H) for B, T, H, K, V in sizes
    ]
    lowrank = [
        Problem(Specialisation(K, V, bf16, Gate.LOWRANK, bf16, rank=16), B, T, H)
        for B, T, H, K, V in sizes[:3]
    ]
    scalar = [
        Problem(Specialisation(K, V, bf16, Gate.SCALAR, gate, rank=0), B, T, H)
        for B, T, H, K, V in sizes[:4]
        for gate in (bf16, DType.FP32)
    ]
    tokens = [
        Problem(problem.spec, 32, 1, 16)
        for problem in (vector[0], vector[1], lowrank[0], lowrank[1], *scalar[:4])
    ]
    return (*vector, *lowrank, *scalar, *tokens)


STANDARD_PROBLEMS = _standard_problems()
"""What is built where nothing was tuned (B, T, H with K, V as benchmarked)."""


@dataclass(frozen=True)
class KernelFacts:
    """One line of a build's table."""

    name: str
    registers: int
    spill_bytes: int
    shared: int
    size: int


@dataclass(frozen=True)
class BuildResult:
    """One pack that was built.

    Attributes:
        path: of the pack.
        pack: what it holds.
        warnings: what a user should know: binaries other than the certified ones, configs that
            had to step down, problems left out.
        seconds: the build took.
    """

    path: Path
    pack: Pack
    warnings: tuple[str, ...]
    seconds: float

    @property
    def facts(self) -> list[KernelFacts]:
        """Registers, spills, shared memory and size of every kernel, by name."""
        return [
            KernelFacts(k.name, k.registers, k.spill_bytes, k.shared, k.size)
            for k in sorted(self.pack.kernels.values(), key=lambda kernel: kernel.name)
        ]


@dataclass(frozen=True)
class _Wanted:
    """A row to be. Only heuristic ones may change their config when a kernel fails."""

    gpu: GpuSpec
    source: str
    measured_on: str
    problem: Problem
    config: Config

    def kernels(self) -> list[KernelSpec]:
        return config_kernels(self.problem.spec, self.config, self.gpu.arch)

    def row(self) -> PackRow:
        return PackRow.make(
            self.gpu.name,
            self.source,
            self.measured_on,
            self.problem.spec,
            self.problem.bucket,
            self.config,
        )

    def __str__(self) -> str:
        return f"{self.gpu.name} {self.problem} {self.config.op.value}"


def _tuned_file(name: str, configs_dir: Path | None) -> TunedFile | None:
    if configs_dir is None:
        return shipped(name)
    path = configs_dir / f"{name}.yaml"
    if not path.is_file():
        return None
    file = load_tuned(path)
    if file.gpu != name:
        raise ConfigError(f"{path}: gpu: wanted {name}, got {file.gpu}", hint="rename the file")
    return file


_Source = tuple[TunedFile, Op]
"""A file, and the op whose rows were taken from it."""


def _tuned_rows(gpu: GpuSpec, op: Op, file: TunedFile) -> Iterator[_Wanted]:
    for row in file.rows:
        if row.op is op:
            measured_on = row.stats.measured_on or file.measured_on
            yield _Wanted(gpu, "tuned", measured_on, row.problem, row.config)


def _borrowed_rows(gpu: GpuSpec, op: Op, relatives: Sequence[TunedFile]) -> Iterator[_Wanted]:
    """Rows of relatives, as guesses; of several for one bucket, the nearest relative's."""
    seen = set()
    for file in relatives:
        for row in _tuned_rows(gpu, op, file):
            key = (row.problem.spec, row.problem.bucket)
            if key not in seen and why_illegal(row.problem.spec, row.config, gpu) is None:
                seen.add(key)
                yield replace(row, source="heuristic")


def _default_rows(gpu: GpuSpec, op: Op) -> Iterator[_Wanted]:
    for problem in STANDARD_PROBLEMS:
        if op in problem.ops:
            config = default_config(op, problem.spec, gpu, problem.bucket)
            yield _Wanted(gpu, "heuristic", "", problem, config)


def _planned_of(
    gpu: GpuSpec, op: Op, folder: Path | None
) -> tuple[list[_Wanted], list[TunedFile]]:
    own = _tuned_file(gpu.name, folder)
    if own is not None:
        tuned = list(_tuned_rows(gpu, op, own))
        if tuned:
            return tuned, [own]
    found = (_tuned_file(name, folder) for name in RELATIVES.get(gpu.name, ()))
    relatives = [file for file in found if file is not None]
    borrowed = list(_borrowed_rows(gpu, op, relatives))
    return borrowed or list(_default_rows(gpu, op)), relatives


def _planned(gpu: GpuSpec, folder: Path | None) -> tuple[list[_Wanted], list[_Source]]:
    """The rows of a GPU before anything is compiled, and the files they come from."""
    rows: list[_Wanted] = []
    sources: list[_Source] = []
    for op in Op:
        of_op, files = _planned_of(gpu, op, folder)
        rows += of_op
        sources += [(file, op) for file in files]
    return rows, sources


def planned_kernels(gpus: Sequence[str]) -> set[KernelSpec]:
    """What ``build_packs`` would compile for ``gpus`` from the files that came with glac."""
    rows = (row for name in gpus for row in _planned(gpu_by_name(name), None)[0])
    return {kernel for row in rows for kernel in row.kernels()}


def _smaller(config: KernelConfig) -> Iterator[KernelConfig]:
    """What to try next: fewer stages, then shorter chunks, then smaller tiles.

    In that order, because of these a stage costs the least speed.
    """
    for name in ("num_stages", "chunk", "block_v", "block_k"):
        for value in lesser_choices(config, name):
            change: dict[str, Any] = {name: value}
            config = replace(config, **change)
            yield config


def _step_down(wanted: _Wanted, failed: Iterable[str]) -> _Wanted | None:
    """``wanted`` with less demanding kernels in place of the ``failed`` templates."""
    config, spec = wanted.config, wanted.problem.spec
    for part in dict.fromkeys(config.PARTS.get(template) for template in failed):
        if part is None:
            return None
        steps = (config.with_part(part, step) for step in _smaller(getattr(config, part)))
        lesser = next((s for s in steps if why_illegal(spec, s, wanted.gpu) is None), None)
        if lesser is None:
            return None
        config = lesser
    return replace(wanted, config=config)


Results = dict[KernelSpec, CompiledKernel | GlacError]


def _failure(result: CompiledKernel | GlacError, gpu: GpuSpec) -> GlacError | None:
    """Why a kernel does not run on ``gpu``, which may have less memory than others of its arch."""
    if isinstance(result, CompiledKernel) and result.shared > gpu.shared_per_block:
        return CompileError(
            f"{result.kernel.name} needs {result.shared} bytes of shared memory, {gpu.name} has "
            f"{gpu.shared_per_block}"
        )
    return result if isinstance(result, GlacError) else None


def _compile_rows(
    wanted: Sequence[_Wanted], jobs: int | None, progress: Progress | None
) -> tuple[list[_Wanted], Results, list[str]]:
    """Compile every row's kernels, stepping heuristic rows down until they fit."""
    results: Results = {}
    settled: list[_Wanted] = []
    warnings: list[str] = []
    pending = list(wanted)
    while pending:
        todo = [
            kernel
            for kernel in dict.fromkeys(k for row in pending for k in row.kernels())
            if kernel not in results
        ]
        before, total = len(results), len(results) + len(todo)
        done = 0

        def on_done(
            kernel: KernelSpec,
            _: CompiledKernel | GlacError,
            before: int = before,
            total: int = total,
        ) -> None:
            nonlocal done
            done += 1
            if progress:
                progress(before + done, total, kernel.name)

        results.update(compile_many(todo, jobs, on_done))
        again: list[_Wanted] = []
        for row in pending:
            failures: dict[str, GlacError] = {}
            for kernel in row.kernels():
                error = _failure(results[kernel], row.gpu)
                if error is not None:
                    failures[kernel.template] = error
            if not failures:
                settled.append(row)
                continue
            for error in failures.values():
                # A tuned config is a promise, and a missing tool is nobody's config's fault.
                if row.source == "tuned" or not isinstance(error, CompileError):
                    raise error
            lesser = _step_down(row, failures)
            reason = "; ".join(error.message for error in failures.values())
            if lesser is None:
                warnings.append(f"no kernel for {row}: {reason}")
            else:
                warnings.append(
                    f"{row}: {row.config.slug} steps down to {lesser.config.slug}: {reason}"
                )
                again.append(lesser)
        pending = again
    return settled, results, sorted(warnings)


def _check_certified(file: TunedFile, op: Op, results: Results, tools: Toolchain) -> str | None:
    """Compare with the binaries that were checked and timed; a warning if they differ.

    Raises:
        CompileError: they differ although toolchain and templates are the same.
    """
    different: dict[str, str] = {}
    built = {kernel.name: result for kernel, result in results.items()}
    for certified in (kernel for row in file.rows if row.op is op for kernel in row.kernels):
        result = built.get(certified.name)
        if isinstance(result, CompiledKernel) and result.sha256 != certified.cubin_sha256:
            different[certified.name] = (
                f"{certified.name} has SHA-256 {result.sha256}, "
                f"certified was {certified.cubin_sha256}"
            )
    if not different:
        return None
    then_templates, templates = file.environment.templates_sha256[op], templates_sha256([op])[op]
    changes = []
    for what, then, now in (
        ("triton", file.environment.triton, tools.triton),
        ("ptxas", file.environment.ptxas, tools.ptxas),
        ("templates", then_templates[:12], templates[:12]),
    ):
        if then != now:
            changes.append(f"{what} {then or 'unknown'} then, {now} now")
    if not changes:
        name, text = sorted(different.items())[0]
        raise CompileError(
            f"{file.gpu}.yaml: {text}, with the same toolchain and templates "
            f"({len(different)} kernels differ)",
            hint=f"empty Triton's cache and build again; if {name} still differs, "
            f"run `glac tune --gpu {file.gpu}`",
        )
    return (
        f"not the certified binary: {len(different)} {op.value} kernels of {file.gpu}.yaml differ "
        f"({'; '.join(changes)}): {', '.join(sorted(different))}"
    )


def build_packs(
    gpus: Sequence[str],
    out: Path | str,
    jobs: int | None = None,
    progress: Progress | None = None,
    configs_dir: Path | str | None = None,
) -> list[BuildResult]:
    """Build one pack for each arch among ``gpus``, at ``out/<arch>``.

    Args:
        gpus: names, as after ``--gpu``.
        out: folder of the packs.
        jobs: kernels compiled at a time; one for each CPU if None.
        progress: called after each kernel, in the thread of the caller.
        configs_dir: folder of tuned files, instead of those that came with glac.

    Returns:
        One result for each arch, in alphabetical order.

    Raises:
        ConfigError: a GPU is unknown, or a tuned file is broken.
        CompileError: a tuned kernel does not compile, or is not the certified one although
            toolchain and templates are the same.
        MissingEnvironmentError: Triton or the assembler is missing.
        PackError: something that is no pack is in the way.
    """
    if not gpus:
        raise ConfigError("no GPU to build for", hint="name one: --gpu h100")
    named = {spec.name: spec for spec in map(gpu_by_name, gpus)}
    archs: dict[str, list[GpuSpec]] = {}
    for name in sorted(named):
        archs.setdefault(named[name].arch, []).append(named[name])
    folder = None if configs_dir is None else Path(configs_dir)
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder of tuned files")
    tools = toolchain()
    results = []
    for arch in sorted(archs):
        started = time.perf_counter()
        wanted: list[_Wanted] = []
        sources: dict[tuple[str, Op], TunedFile] = {}
        for gpu in archs[arch]:
            rows_of_gpu, files = _planned(gpu, folder)
            wanted += rows_of_gpu
            sources.update(((file.gpu, op), file) for file, op in files)
        rows, compiled, warnings = _compile_rows(wanted, jobs, progress)
        for (_, op), file in sorted(sources.items(), key=lambda item: item[0]):
            warning = _check_certified(file, op, compiled, tools)
            if warning:
                warnings.append(warning)
        needed = {kernel for row in rows for kernel in row.kernels()}
        kernels = [
            result
            for kernel, result in compiled.items()
            if kernel in needed and isinstance(result, CompiledKernel)
        ]
        path = Path(out) / arch
        pack = write_pack(path, arch, kernels, [row.row() for row in rows], tools)
        seconds = time.perf_counter() - started
        results.append(BuildResult(path, pack, tuple(warnings), seconds))
    return results


def build_single(
    problem: Problem, gpu: GpuSpec, config: Config, path: Path | str
) -> tuple[Pack, int]:
    """A pack at ``path`` for one op of one problem with one config: the build on a miss.

    A pack that is there already is used if the same sources and tools made it from the same
    config; a broken or outdated one is replaced. The row is heuristic, whatever the config's
    origin, because nobody checked this binary. A GPU that is not listed borrows the name of a
    listed one of its arch.

    Args:
        problem: what to serve.
        gpu: the device, listed or not; its shared memory counts.
        config: to compile; steps down if it does not fit.
        path: of the pack.

    Returns:
        The pack, and how many kernels were compiled for it now.

    Raises:
        CompileError: no config that could serve the problem compiles.
        MissingEnvironmentError: Triton or the assembler is missing.
        PackError: ``path`` cannot be written.
    """
    tools = toolchain()
    path = Path(path)
    listed = gpu_by_name(_listed_name(gpu))
    with contextlib.suppress(PackError):
        pack = read_pack(path)
        current = (
            pack.arch == gpu.arch
            and pack.glac == __version__
            and pack.toolchain == tools.to_dict()
            and pack.templates_sha256 == templates_sha256([config.op])
        )
        if current and any(
            (row.gpu, row.spec, row.bucket, row.config)
            == (listed.name, problem.spec, problem.bucket, config)
            for row in pack.rows
        ):
            return pack, 0
    wanted = _Wanted(
        replace(listed, shared_per_block=gpu.shared_per_block), "heuristic", "", problem, config
    )
    rows, compiled, warnings = _compile_rows([wanted], None, None)
    if not rows:
        raise CompileError("; ".join(warnings))
    needed = set(rows[0].kernels())
    kernels = [
        result
        for kernel, result in compiled.items()
        if kernel in needed and isinstance(result, CompiledKernel)
    ]
    return write_pack(path, gpu.arch, kernels, [rows[0].row()], tools), len(compiled)


def _listed_name(gpu: GpuSpec) -> str:
    if gpu.name in GPUS:
        return gpu.name
    names = [spec.name for spec in GPUS.values() if spec.arch == gpu.arch]
    if not names:
        raise CompileError(f"glac builds nothing for {gpu.title} ({gpu.arch})")
    return names[0]
