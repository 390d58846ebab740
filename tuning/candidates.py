"""Compile every kernel that a study may need, on any machine, into a folder it can travel in.

    DIR/pack/             the kernels, a pack without rows
    DIR/pack-twin/        for the A100: the same kernels assembled for an H100, to be timed there
    DIR/candidates.json   problems and ops, their configs, kernels that did not compile and why,
                          toolchain

What was compiled stays compiled: the folder is brought up to date every few dozen kernels and on
Ctrl-C, and kernels of the same toolchain and templates are never compiled twice.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glac import __version__
from glac.atomic import write_text
from glac.configs import Config
from glac.errors import GlacError, PackError, StudyError
from glac.gpus import ARCHS, GpuSpec
from glac.kernelspec import KernelSpec, config_kernels
from glac.pack import Pack, read_pack, write_pack
from glac.problem import Op, Problem
from glac.templates import template_ops, templates_sha256
from glac.tuning.evaluate import reason_kind
from glac.tuning.fleet import space_from_dict, space_to_dict
from glac.tuning.space import Space

if TYPE_CHECKING:
    from glac.compile import CompiledKernel

SCHEMA = 2
INDEX = "candidates.json"
PACK = "pack"
TWIN_PACK = "pack-twin"
SAVE_EVERY = 64
MOST_SPILLED = {"sm_90a": 2048}
"""Bytes a thread may spill before a config is not worth a try. The fastest may spill a little
(48 bytes in the first sketch of the forward), and code for Ampere a kilobyte and more."""


@dataclass(frozen=True)
class Twin:
    """How code for a GPU that is not at hand is timed on another.

    Attributes:
        assembled_for: what the assembler is told.
        runs_on: arch of the devices that run it.
        shared_per_sm: bytes of shared memory of an SM there, of which each block takes
            ``_RESERVED`` beside its own.
        meant_per_sm: the same of the GPU that is meant.
    """

    assembled_for: str
    runs_on: str
    shared_per_sm: int
    meant_per_sm: int

    def padded(self, shared: int) -> int:
        """Shared memory to ask for, so that as many blocks share an SM as on the GPU meant."""
        blocks = min(32, self.meant_per_sm // (shared + _RESERVED))
        least = self.shared_per_sm // (blocks + 1) + 1 - _RESERVED
        step = 128
        return max(shared, -(-least // step) * step) if blocks < 32 else shared


_RESERVED = 1024
TWINS = {"sm_80": Twin("sm_90", "sm_90a", 228 << 10, 164 << 10)}
"""Ampere code on Hopper: same instructions, within the A100's shared memory per SM. Registers
per thread and per SM are the same on both."""

OnKernel = Callable[[int, int, int], None]
"""Called with kernels done, kernels in all, and how many of them failed."""


@dataclass(frozen=True)
class Candidates:
    """A folder of compiled candidates.

    Attributes:
        path: of the folder.
        gpu: the name it was made for; every GPU of the same arch can use it.
        arch: code target.
        spaces: problems with their configs, whether they compiled or not.
        failures: kernel name to the reason why it did not compile.
        toolchain: versions of ``triton`` and ``ptxas``.
        templates_sha256: of the kernel sources, for each op that has a space.
        commit: of the checkout, empty outside one.
        complete: whether every kernel was tried.
        twin: whether the kernels were also assembled for the GPUs that ``TWINS`` names.
    """

    path: Path
    gpu: str
    arch: str
    spaces: tuple[Space, ...]
    failures: Mapping[str, str]
    toolchain: Mapping[str, str]
    templates_sha256: Mapping[Op, str]
    commit: str
    complete: bool
    twin: bool = False

    @property
    def pack_path(self) -> Path:
        return self.path / PACK

    def pack_for(self, arch: str) -> Path | None:
        """The pack whose code runs on a device of ``arch``: what ships, or its twin; or ``None``.

        A twin has the same kernels under the same names, assembled for a newer GPU.
        """
        if arch == self.arch:
            return self.pack_path
        return self.path / TWIN_PACK if self.twin and arch == TWINS[self.arch].runs_on else None

    def read_pack(self) -> Pack:
        """The compiled kernels.

        Raises:
            PackError: they are damaged.
        """
        return read_pack(self.pack_path)

    def space(self, problem: Problem, op: Op) -> Space | None:
        """The configs for an op of ``problem``, or ``None`` if they are not in here."""
        return next((s for s in self.spaces if (s.problem, s.op) == (problem, op)), None)

    def why_missing(self, problem: Problem, config: Config, pack: Pack) -> str | None:
        """Why a config cannot be launched, or ``None`` if all its kernels are there."""
        for kernel in config_kernels(problem.spec, config, self.arch):
            packed = pack.kernels.get(kernel.name)
            if packed is None:
                return self.failures.get(kernel.name, f"{kernel.name} was not compiled")
            if self.arch in MOST_SPILLED and packed.spill_bytes > MOST_SPILLED[self.arch]:
                return (
                    f"{kernel.name} spills {packed.spill_bytes} bytes, "
                    f"more than {MOST_SPILLED[self.arch]}"
                )
        return None


def current_commit() -> str:
    """Commit of the checkout that glac runs from, ``-dirty`` appended if files differ, or ''."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        return done.stdout.strip()

    try:
        # An installed copy may lie inside somebody else's checkout.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        commit = git("rev-parse", "HEAD")
        return commit + ("-dirty" if git("status", "--porcelain", "--", str(here.parent)) else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _to_dict(candidates: Candidates) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "glac": __version__,
        "gpu": candidates.gpu,
        "arch": candidates.arch,
        "toolchain": dict(candidates.toolchain),
        "templates_sha256": {op.value: sha for op, sha in candidates.templates_sha256.items()},
        "commit": candidates.commit,
        "complete": candidates.complete,
        "twin": candidates.twin,
        "problems": [space_to_dict(space) for space in candidates.spaces],
        "failures": dict(sorted(candidates.failures.items())),
    }


def _from_dict(path: Path, data: Any) -> Candidates:
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"schema must be {SCHEMA}, got {found!r}")
    spaces = []
    for index, item in enumerate(data["problems"]):
        spaces.append(space_from_dict(item, f"problems[{index}]"))
    if data["arch"] not in ARCHS:
        raise ValueError(f"arch must be one of {', '.join(ARCHS)}, got {data['arch']!r}")
    return Candidates(
        path=path,
        gpu=str(data["gpu"]),
        arch=str(data["arch"]),
        spaces=tuple(spaces),
        failures={str(k): str(v) for k, v in data["failures"].items()},
        toolchain={key: str(data["toolchain"][key]) for key in ("triton", "ptxas")},
        templates_sha256={Op(op): str(sha) for op, sha in data["templates_sha256"].items()},
        commit=str(data["commit"]),
        complete=data["complete"] is True,
        twin=data.get("twin") is True,
    )


def load_candidates(path: Path | str) -> Candidates:
    """Read the index of a folder that ``compile_candidates`` made.

    Raises:
        StudyError: there is none, or it is broken.
    """
    path = Path(path)
    index = path / INDEX
    try:
        return _from_dict(path, json.loads(index.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise StudyError(
            f"{index}: no compiled candidates here",
            hint="make them, on any machine: glac tune --gpu NAME --compile-only DIR",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, GlacError) as error:
        reason = error.message if isinstance(error, GlacError) else error
        raise StudyError(
            f"{index}: broken: {reason}",
            hint="make it again: glac tune --gpu NAME --compile-only DIR",
        ) from None


@dataclass(frozen=True)
class _Reusable:
    """What a folder holds that need not be done again."""

    spaces: tuple[Space, ...] = ()
    built: Mapping[str, CompiledKernel] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)


def _reusable(path: Path, arch: str, toolchain: Mapping[str, str]) -> _Reusable:
    """What is there of the same toolchain, and of ops whose templates did not change."""
    from glac.compile import CompiledKernel

    try:
        old = load_candidates(path)
        pack = read_pack(path / PACK)
        twin = read_pack(path / TWIN_PACK) if arch in TWINS else None
    except (StudyError, PackError):
        return _Reusable()
    if not (
        old.arch == pack.arch == arch
        and dict(old.toolchain) == dict(pack.toolchain) == dict(toolchain)
    ):
        return _Reusable()
    current = templates_sha256(old.templates_sha256)
    same = {op for op, sha in old.templates_sha256.items() if sha == current[op]}
    spaces = tuple(space for space in old.spaces if space.op in same)
    known = {kernel.name for kernel in kernels_of(spaces, arch)}
    kept = {}
    for name, kernel in pack.kernels.items():
        # One kernel may serve both ops; what another op was made from does not concern it.
        if not any(
            op in same and pack.templates_sha256.get(op) == current[op]
            for op in template_ops(kernel.kernel.template)
        ):
            continue
        try:
            cubin = pack.read_cubin(name)
        except PackError:
            continue
        try:
            code = twin.read_cubin(name) if twin else b""
        except (PackError, KeyError):
            continue
        kept[name] = CompiledKernel(
            kernel=kernel.kernel,
            twin=code,
            cubin=cubin,
            sha256=kernel.sha256,
            symbol=kernel.symbol,
            shared=kernel.shared,
            registers=kernel.registers,
            spill_bytes=kernel.spill_bytes,
            scratch_bytes=kernel.scratch_bytes,
            num_warps=kernel.num_warps,
        )
    # A compiler that died or hung may have better luck: not the last word on a kernel.
    failures = {
        name: reason
        for name, reason in old.failures.items()
        if name in known and reason_kind(reason) != "compiler crashed"
    }
    return _Reusable(spaces, kept, failures)


def _merge(old: Sequence[Space], new: Sequence[Space]) -> tuple[Space, ...]:
    """Problems of both; an op of a problem in both keeps the configs of both."""
    merged = {(space.problem, space.op): space for space in old}
    for space in new:
        key = (space.problem, space.op)
        before = merged.get(key)
        extra = before.configs if before else ()
        configs = tuple(dict.fromkeys((*space.configs, *extra)))
        merged[key] = replace(space, configs=configs)
    return tuple(merged.values())


def compile_candidates(
    spaces: Sequence[Space],
    gpu: GpuSpec,
    out_dir: Path | str,
    jobs: int | None = None,
    progress: OnKernel | None = None,
) -> Candidates:
    """Compile all kernels of all configs and put them in ``out_dir``, beside what it holds.

    Args:
        spaces: problems and configs.
        gpu: which they are for.
        out_dir: a new folder, or one made by this function.
        jobs: compiler threads; one for each core if None.
        progress: told of every kernel.

    Returns:
        What the folder now holds.

    Raises:
        StudyError: the folder holds something else.
        MissingEnvironmentError: no compiler.
        KeyboardInterrupt: after what is compiled was saved.
    """
    from glac.compile import compile_many, toolchain

    path = Path(out_dir)
    if path.exists() and not (path / INDEX).is_file() and any(path.iterdir()):
        raise StudyError(
            f"{path}: exists and holds no candidates; it was left as it is",
            hint="choose another folder",
        )
    tools = toolchain()
    before = _reusable(path, gpu.arch, tools.to_dict())
    built, failures = dict(before.built), dict(before.failures)
    merged = _merge(before.spaces, spaces)
    templates = templates_sha256(dict.fromkeys(space.op for space in merged))
    wanted: dict[str, KernelSpec] = {}
    for space in merged:
        for config in space.configs:
            for kernel in config_kernels(space.problem.spec, config, gpu.arch):
                wanted[kernel.name] = kernel
    todo = [k for name, k in wanted.items() if name not in built and name not in failures]
    path.mkdir(parents=True, exist_ok=True)
    twin = TWINS.get(gpu.arch)

    def save(complete: bool) -> Candidates:
        candidates = Candidates(
            path,
            gpu.name,
            gpu.arch,
            merged,
            dict(failures),
            tools.to_dict(),
            templates,
            current_commit(),
            complete,
            gpu.arch in TWINS,
        )
        # The pack first: an index never names kernels as compiled, it only lists failures.
        write_pack(path / PACK, gpu.arch, list(built.values()), (), tools)
        if twin is not None:
            twins = [
                replace(
                    item,
                    cubin=item.twin,
                    sha256=hashlib.sha256(item.twin).hexdigest(),
                    shared=twin.padded(item.shared),
                )
                for item in built.values()
            ]
            write_pack(path / TWIN_PACK, gpu.arch, twins, (), tools)
        write_text(path / INDEX, json.dumps(_to_dict(candidates), indent=1) + "\n")
        return candidates

    total = len(todo)
    counts = {"done": 0, "failed": 0}

    def on_done(kernel: KernelSpec, result: CompiledKernel | GlacError) -> None:
        counts["done"] += 1
        if isinstance(result, GlacError):
            failures[kernel.name] = " ".join(result.message.split())[:400]
            counts["failed"] += 1
        else:
            built[kernel.name] = result
        if counts["done"] % SAVE_EVERY == 0:
            save(complete=False)
        if progress:
            progress(counts["done"], total, counts["failed"])

    try:
        if twin is None:
            compile_many(todo, jobs, on_done)
        else:
            compile_many(todo, jobs, on_done, twin.assembled_for)
    except BaseException:
        save(complete=False)
        raise
    return save(complete=True)


def check_usable(candidates: Candidates, gpu: GpuSpec) -> None:
    """Refuse candidates that this glac, or this GPU, cannot use.

    Raises:
        StudyError: other arch, or other templates than the ones installed.
    """
    if candidates.arch != gpu.arch:
        raise StudyError(
            f"{candidates.path}: made for {candidates.gpu} ({candidates.arch}), "
            f"{gpu.name} needs {gpu.arch}",
            hint=f"glac tune --gpu {gpu.name} --compile-only DIR",
        )
    if candidates.templates_sha256 != templates_sha256(candidates.templates_sha256):
        raise StudyError(
            f"{candidates.path}: compiled from other kernel templates than the ones installed",
            hint=f"compile again: glac tune --gpu {gpu.name} --compile-only {candidates.path}",
        )


def estimate_seconds(kernels: int, jobs: int) -> float:
    """Rough compile time: 1.5 s for a kernel and core."""
    return 1.5 * kernels / max(1, jobs)


def kernels_of(spaces: Sequence[Space], arch: str) -> set[KernelSpec]:
    """Distinct kernels of all configs."""
    return {
        kernel
        for space in spaces
        for config in space.configs
        for kernel in config_kernels(space.problem.spec, config, arch)
    }
