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
    ForwardConfig,
    KernelConfig,
    ScalarBackwardConfig,
    cut_forward,
    default_config,
    default_forward,
    leads,
    lesser_choices,
    suited,
    why_illegal,
    without_way,
)
from glac.errors import CompileError, ConfigError, GlacError, PackError
from glac.gpus import GPUS, RELATIVES, GpuSpec, gpu_by_name
from glac.kernelspec import KernelSpec, config_kernels
from glac.pack import Pack, PackRow, read_pack, same_rows, write_pack
from glac.problem import Bucket, DType, Gate, Op, Precision, Problem, Specialisation
from glac.templates import templates_sha256
from glac.tuned import TunedFile, available, effective_rows, user_files

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
        compiled: kernels that were compiled; the others were in the pack that was there before.
    """

    path: Path
    pack: Pack
    warnings: tuple[str, ...]
    seconds: float
    compiled: int

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


def _tuned_files(name: str, configs_dir: Path | None) -> list[TunedFile]:
    """Files for a GPU, those that count first."""
    return available(name) if configs_dir is None else user_files(name, [configs_dir])


_Source = tuple[TunedFile, Op]
"""A file, and the op whose rows were taken from it."""


def _tuned_rows(gpu: GpuSpec, op: Op, files: Sequence[TunedFile]) -> Iterator[_Wanted]:
    for file, row in effective_rows(files):
        if row.op is op:
            measured_on = row.stats.measured_on or file.measured_on
            yield _Wanted(gpu, "tuned", measured_on, row.problem, row.config)


def _borrowed_rows(gpu: GpuSpec, op: Op, relatives: Sequence[TunedFile]) -> Iterator[_Wanted]:
    """Rows of relatives, as guesses; of several for one bucket, the nearest relative's."""
    seen = set()
    for row in (row for file in relatives for row in _tuned_rows(gpu, op, [file])):
        key = (row.problem.spec, row.problem.bucket)
        if key not in seen and why_illegal(row.problem.spec, row.config, gpu) is None:
            seen.add(key)
            yield replace(row, source="heuristic")


def _default_rows(gpu: GpuSpec, op: Op) -> Iterator[_Wanted]:
    for problem in STANDARD_PROBLEMS:
        if op in problem.ops:
            config = default_config(op, problem.spec, gpu, problem.bucket)
            yield _Wanted(gpu, "heuristic", "", problem, config)


_LONG = (1, 32768, 1)
"""B, T, H of rows for few heads: what idles any GPU if it is not cut."""


def _cut_rows(gpu: GpuSpec, rows: Sequence[_Wanted]) -> Iterator[_Wanted]:
    """For each specialisation whose forward rows all walk whole sequences, one that cuts them.

    As a guess. Its kernels serve whatever has so few heads that most of the GPU would idle: the
    length of segments is found at run time (``glac.configs.suited``).
    """
    by_spec: dict[Specialisation, list[_Wanted]] = {}
    for row in rows:
        by_spec.setdefault(row.problem.spec, []).append(row)
    for spec, of_spec in by_spec.items():
        problem = Problem(spec, *_LONG)
        wanted = problem.bucket
        if any(getattr(row.config, "summary", None) for row in of_spec):
            continue
        near = min(of_spec, key=lambda row: (row.problem.bucket.distance(wanted), row.problem.T))
        whole = without_way(near.config, spec, gpu)
        assert isinstance(whole, ForwardConfig)
        config = cut_forward(whole, spec, wanted, gpu)
        if config.summary is not None and gpu.capability < (9, 0):
            # The tile that walks best spills 7.8 kB as a summary, at 256 x 512.
            config = replace(config, summary=default_forward(spec, gpu, wanted).summary)
        if config.summary is not None and why_illegal(spec, config, gpu) is None:
            yield _Wanted(gpu, "heuristic", "", problem, config)


def _plain_rows(gpu: GpuSpec, rows: Sequence[_Wanted]) -> Iterator[_Wanted]:
    """For each specialisation whose backward rows all walk to segments, one that does not.

    As a guess, by the same tiles: for other lengths and packed batches (``glac.dispatch``).
    """
    for spec in dict.fromkeys(row.problem.spec for row in rows):
        of_spec = [row.config for row in rows if row.problem.spec == spec]
        if all(map(leads, of_spec)):
            problem = Problem(spec, *_LONG)
            whole = without_way(of_spec[0], spec, gpu)
            config = suited(whole, spec, problem.bucket, gpu)
            if why_illegal(spec, config, gpu) is not None:
                config = default_config(Op.BACKWARD, spec, gpu, problem.bucket)
            yield _Wanted(gpu, "heuristic", "", problem, config)


def _at_once_rows(gpu: GpuSpec, rows: Sequence[_Wanted]) -> Iterator[_Wanted]:
    """For each scalar gate whose backward rows all walk sequences, one that takes chunks at once.

    As a guess, for few heads and for packed sequences, the longest of which nobody knows.
    """
    for spec in dict.fromkeys(row.problem.spec for row in rows):
        of_spec = [row.config for row in rows if row.problem.spec == spec]
        if all(isinstance(c, ScalarBackwardConfig) and c.chunks is None for c in of_spec):
            problem = Problem(spec, *_LONG)
            config = default_config(Op.SCALAR_BACKWARD, spec, gpu, problem.bucket)
            yield _Wanted(gpu, "heuristic", "", problem, config)


def _planned_of(
    gpu: GpuSpec, op: Op, folder: Path | None
) -> tuple[list[_Wanted], list[TunedFile]]:
    rows, files = _rows_of(gpu, op, folder)
    if op is Op.FORWARD:
        rows += _cut_rows(gpu, rows)
    elif op is Op.BACKWARD:
        rows += _plain_rows(gpu, rows)
    elif op is Op.SCALAR_BACKWARD:
        rows += _at_once_rows(gpu, rows)
    return rows, files


def _rows_of(gpu: GpuSpec, op: Op, folder: Path | None) -> tuple[list[_Wanted], list[TunedFile]]:
    own = _tuned_files(gpu.name, folder)
    rows = list(_tuned_rows(gpu, op, own))
    files = [file for file in own if any(row.op is op for row in file.rows)]
    if not rows:
        kin = RELATIVES.get(gpu.name, ())
        files = [file for name in kin for file in _tuned_files(name, folder)]
        rows = list(_borrowed_rows(gpu, op, files))
    if not rows or folder is None:
        # What came with glac must serve the standard problems, whichever of them are tuned.
        known = {row.problem.spec for row in rows}
        rows += [row for row in _default_rows(gpu, op) if row.problem.spec not in known]
    return rows, files


def _of_dtype(dtype: DType, row: _Wanted) -> _Wanted:
    """A heuristic row for the same sizes in another element type."""
    spec = replace(row.problem.spec, dtype=dtype, gate_dtype=dtype)
    problem = replace(row.problem, spec=spec)
    config = default_config(row.config.op, spec, row.gpu, problem.bucket)
    return _Wanted(row.gpu, "heuristic", "", problem, config)


def _planned(
    gpu: GpuSpec, folder: Path | None, dtypes: Sequence[DType] | None = None
) -> tuple[list[_Wanted], list[_Source]]:
    """The rows of a GPU before anything is compiled, and the files they come from."""
    rows: list[_Wanted] = []
    sources: list[_Source] = []
    for op in Op:
        of_op, files = _planned_of(gpu, op, folder)
        if dtypes is not None:
            chosen = [row for row in of_op if row.problem.spec.dtype in dtypes]
            for dtype in dtypes:
                # Rows in TF32 serve no call but those that ask for it.
                plain = (row.problem.spec for row in chosen)
                if not any((s.dtype, s.precision) == (dtype, Precision.IEEE) for s in plain):
                    chosen += [_of_dtype(dtype, row) for row in _default_rows(gpu, op)]
            of_op = list(dict.fromkeys(chosen))  # wide gates and others may now be the same
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


@dataclass(frozen=True)
class _Earlier:
    """What an earlier build with the same tools, sources and version of glac left.

    Attributes:
        kernels: what it compiled, verified.
        configs: of its heuristic rows.
    """

    kernels: dict[KernelSpec, CompiledKernel]
    configs: dict[tuple[str, Op, Specialisation, Bucket], Config]

    def settled(self, row: _Wanted) -> _Wanted | None:
        """``row`` with the config that it stepped down to then, if it did."""
        key = (row.gpu.name, row.config.op, row.problem.spec, row.problem.bucket)
        config = self.configs.get(key)
        if row.source == "tuned" or config is None or config == row.config:
            return None
        return replace(row, config=config) if _stepped_down(config, row.config) else None


def _stepped_down(config: Config, start: Config) -> bool:
    """Whether ``_step_down`` can have made ``config`` from ``start``."""
    if type(config) is not type(start):
        return False
    for part in dict.fromkeys(start.PARTS.values()):
        first, now = getattr(start, part), getattr(config, part)
        if first is None or now is None:
            if first is not now:
                return False
        elif now not in (first, *_smaller(first)) and part != "states":
            return False
    return getattr(config, "segment", 0) == getattr(start, "segment", 0)


def _earlier(path: Path, arch: str, tools: Toolchain) -> _Earlier:
    """What the pack at ``path`` can be taken over from; nothing if it is not exactly ours."""
    kernels: dict[KernelSpec, CompiledKernel] = {}
    configs: dict[tuple[str, Op, Specialisation, Bucket], Config] = {}
    try:
        pack = read_pack(path)
        if (
            pack.arch == arch
            and pack.glac == __version__
            and pack.toolchain == tools.to_dict()
            and pack.templates_sha256 == templates_sha256(pack.templates_sha256)
        ):
            for item in pack.kernels.values():
                kernels[item.kernel] = CompiledKernel(
                    kernel=item.kernel,
                    cubin=pack.read_cubin(item.name),
                    sha256=item.sha256,
                    symbol=item.symbol,
                    shared=item.shared,
                    registers=item.registers,
                    spill_bytes=item.spill_bytes,
                    scratch_bytes=item.scratch_bytes,
                    num_warps=item.num_warps,
                )
            for row in pack.rows:
                if row.source != "tuned":
                    configs[row.gpu, row.op, row.spec, row.bucket] = row.config
    except PackError:  # missing or damaged: built anew
        return _Earlier({}, {})
    return _Earlier(kernels, configs)


def _compile_rows(
    wanted: Sequence[_Wanted],
    jobs: int | None,
    progress: Progress | None,
    earlier: _Earlier | None = None,
) -> tuple[list[_Wanted], Results, list[str]]:
    """Compile every row's kernels, stepping heuristic rows down until they fit."""
    results: Results = {}
    settled: list[_Wanted] = []
    warnings: list[str] = []
    pending = list(wanted)
    if earlier is not None:
        results.update(earlier.kernels)
        for index, row in enumerate(pending):
            lesser = earlier.settled(row)
            if lesser is not None:
                pending[index] = lesser
                warnings.append(
                    f"{row}: {row.config.slug} steps down to {lesser.config.slug}: as before"
                )
    known = len(results)
    while pending:
        todo = [
            kernel
            for kernel in dict.fromkeys(k for row in pending for k in row.kernels())
            if kernel not in results
        ]
        before = len(results) - known
        total = before + len(todo)
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


def _changes_since(file: TunedFile, op: Op, tools: Toolchain) -> list[str]:
    """What has changed since the binaries of a tuned file were made."""
    then_templates, templates = file.environment.templates_sha256[op], templates_sha256([op])[op]
    changes = []
    for what, then, now in (
        ("triton", file.environment.triton, tools.triton),
        ("ptxas", file.environment.ptxas, tools.ptxas),
        ("templates", then_templates[:12], templates[:12]),
    ):
        if then != now:
            changes.append(f"{what} {then or 'unknown'} then, {now} now")
    return changes


def _forget_uncertified(earlier: _Earlier, file: TunedFile, op: Op, tools: Toolchain) -> None:
    """Take over no binary of an earlier build where there is a certified one that differs."""
    if op not in file.environment.templates_sha256 or _changes_since(file, op, tools):
        return
    certified = {
        kernel.name: kernel.cubin_sha256
        for row in file.rows
        if row.op is op
        for kernel in row.kernels
    }
    for kernel, built in list(earlier.kernels.items()):
        if certified.get(kernel.name, built.sha256) != built.sha256:
            del earlier.kernels[kernel]


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
    changes = _changes_since(file, op, tools)
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
    *,
    dtypes: Sequence[DType] | None = None,
    zipped: bool = False,
    fresh: bool = False,
) -> list[BuildResult]:
    """Build one pack for each arch among ``gpus``, at ``out/<arch>``.

    Kernels that a pack there already holds are taken over if the same version of glac made them,
    from the same templates, with the same tools. A pack that would not change is left untouched.

    Args:
        gpus: names, as after ``--gpu``.
        out: folder of the packs.
        jobs: kernels compiled at a time; one for each CPU if None.
        progress: called after each kernel, in the thread of the caller.
        configs_dir: folder of tuned files, instead of those that came with glac.
        dtypes: element types to build for; one without tuned rows gets heuristic ones for the
            standard problems. None takes the rows as they are.
        zipped: write ``out/<arch>.zip`` instead of folders.
        fresh: compile every kernel, whatever is there.

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
        sources: list[_Source] = []
        for gpu in archs[arch]:
            rows_of_gpu, files = _planned(gpu, folder, dtypes)
            wanted += rows_of_gpu
            sources += (item for item in files if item not in sources)
        path = Path(out) / (f"{arch}.zip" if zipped else arch)
        earlier = _Earlier({}, {}) if fresh else _earlier(path, arch, tools)
        for file, op in sources:
            _forget_uncertified(earlier, file, op, tools)
        rows, compiled, warnings = _compile_rows(wanted, jobs, progress, earlier)
        for file, op in sorted(sources, key=lambda item: (item[0].gpu, item[1])):
            warning = _check_certified(file, op, compiled, tools)
            if warning:
                warnings.append(warning)
        needed = {kernel for row in rows for kernel in row.kernels()}
        kernels = [
            result
            for kernel, result in compiled.items()
            if kernel in needed and isinstance(result, CompiledKernel)
        ]
        packed_rows = [row.row() for row in rows]
        new = [kernel for kernel in compiled if kernel not in earlier.kernels]
        pack = None
        if not new and {item.kernel for item in kernels} == set(earlier.kernels):
            with contextlib.suppress(PackError):
                pack = read_pack(path)
        if pack is None or not same_rows(pack.rows, packed_rows):
            pack = write_pack(path, arch, kernels, packed_rows, tools)
        seconds = time.perf_counter() - started
        results.append(BuildResult(path, pack, tuple(warnings), seconds, len(new)))
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
            and pack.templates_sha256 == templates_sha256(pack.templates_sha256)
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
