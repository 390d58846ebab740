"""Which kernel serves a problem: packs first, then a build on the spot, then PyTorch.

A *hit* is a row whose op and specialisation match; among hits the nearest bucket wins. Rows of the
device's own model come before rows of its relatives. In another bucket than its own a row is used
with the segments that suit it there. A decision is made once per op, specialisation, bucket and
device, kept, and logged at INFO.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from glac.configs import (
    BackwardConfig,
    ChunksBackwardConfig,
    Config,
    DecodeConfig,
    ForwardConfig,
    KernelConfig,
    ScalarBackwardConfig,
    ScalarForwardConfig,
    cut_backward,
    default_config,
    leads,
    packed_segment,
    suitable_segment,
    suited,
    walking_programs,
    why_illegal,
)
from glac.errors import GlacError, KernelNotFoundError, PackError
from glac.fit import Device, check_fit, row_fits, runs_on
from glac.gpus import ARCHS, GPUS, RELATIVES, GpuSpec, match_gpu
from glac.kernelspec import KernelSpec
from glac.pack import Pack, PackRow, open_pack, read_pack
from glac.plan import Kernel, Plan
from glac.problem import Bucket, Op, Problem, Specialisation
from glac.record import dataclass
from glac.settings import (
    DEFAULT_SCRATCH_BYTES,
    Settings,
    load_settings,
    scratch_bytes,
    shipped_pack_dir,
)

if TYPE_CHECKING:
    import torch

log = logging.getLogger("glac")

Kernels = Mapping[str, Kernel]


@dataclass(frozen=True)
class Decision:
    """How one op of a problem is served.

    Attributes:
        op: what is served.
        provider: ``pack``, ``build`` (compiled on a miss) or ``torch``.
        config: the kernels' config, ``None`` for PyTorch.
        config_id: its slug, or ``torch-chunk``.
        cubin_sha: SHA-256 of the main kernel's machine code, empty for PyTorch.
        kernels: template name to kernel name.
        path: of the pack, empty for PyTorch.
        reason: one line on why.
        tried: what was looked at before, one line each.
    """

    op: Op
    provider: str
    config: Config | None
    config_id: str
    cubin_sha: str
    kernels: dict[str, str]
    path: str
    reason: str
    tried: list[str] = field(default_factory=list)


@dataclass
class Stats:
    """Counters since the process started (or ``clear``).

    Attributes:
        decisions: problems resolved, by provider.
        compiled: kernels compiled at run time; 0 is what a serving process wants to see.
        loaded: kernels this process has loaded, over all devices; ``clear`` keeps them.
    """

    decisions: dict[str, int] = field(default_factory=dict)
    compiled: int = 0
    loaded: int = 0


_lock = threading.RLock()
_stats = Stats()
# By op, specialisation, bucket, whether packed, and device: lengths of one bucket share an entry.
_Key = tuple[Op, Specialisation, Bucket, bool, int]
_served: dict[_Key, tuple[Decision, Kernels | None]] = {}
_beside: dict[_Key, tuple[Config, Kernels] | None] = {}


def _after_fork() -> None:
    """In a child: what was loaded is not there, nor a thread that may have held the lock."""
    global _lock
    _lock = threading.RLock()
    _served.clear()
    _beside.clear()
    pack_kernel.cache_clear()
    _forget_bound()


def _forget_bound() -> None:
    """Calls that ``glac.fast`` remembers hold decisions, so they are forgotten with them."""
    fast = sys.modules.get("glac.fast")  # with PyTorch, which deciding does not need
    if fast:
        fast.bound.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
_generation = 0


def generation() -> int:
    """Changes whenever decisions are forgotten: what was derived from them is then stale."""
    return _generation


def stats() -> Stats:
    """Counters of what dispatch did so far; also as ``glac.stats``."""
    launch = sys.modules.get("glac.launch")
    loaded = launch.loaded_kernels() if launch else 0
    return Stats(dict(_stats.decisions), _stats.compiled, loaded)


def clear() -> None:
    """Forget every decision and pack listing, for example after a new pack was built."""
    global _generation
    with _lock:
        _generation += 1
        _served.clear()
        _beside.clear()
        _forget_bound()
        _stats.decisions.clear()
        _stats.compiled = 0
        installed_packs.cache_clear()
        pack_kernel.cache_clear()


def pack_roots(settings: Settings) -> list[Path]:
    """Where packs are looked for, in order."""
    return [*settings.pack_path, settings.build_dir, shipped_pack_dir()]


def pack_folders(settings: Settings, arch: str) -> list[Path]:
    """Where packs of ``arch`` are, in order: a root may be a pack (folder or zip) or hold one."""
    roots = pack_roots(settings)
    candidates = [path for root in roots for path in (root, root / arch, root / f"{arch}.zip")]
    return [
        path
        for path in candidates
        if (path / "manifest.json").is_file() or (path.suffix == ".zip" and path.is_file())
    ]


@dataclass(frozen=True)
class FoundPack:
    """A place where dispatch looks: its pack, or why that is not used, and what to do.

    A pack that was read but is for another arch has a ``reason`` too.
    """

    path: Path
    pack: Pack | None
    reason: str = ""
    hint: str = ""


def found_packs(
    settings: Settings, arch: str, read: Callable[[Path], Pack] = read_pack
) -> list[FoundPack]:
    """What dispatch finds for ``arch``, used or refused, in the order in which it looks."""
    found = []
    for path in pack_folders(settings, arch):
        try:
            pack = read(path)
        except PackError as error:
            found.append(FoundPack(path, None, f"refused: {error.message}", error.hint))
            continue
        reason = "" if pack.arch == arch else f"for {pack.arch}, this device needs {arch}"
        found.append(FoundPack(path, pack, reason))
    return found


@functools.lru_cache(maxsize=64)
def installed_packs(settings: Settings, arch: str) -> tuple[tuple[Pack, ...], tuple[str, ...]]:
    """The readable packs of ``arch``, and one line for each that was refused."""
    packs, refused = [], []
    for item in found_packs(settings, arch, open_pack):
        if item.pack is None:
            log.warning("glac: pack %s %s\nhint: %s", item.path, item.reason, item.hint)
        if item.pack is None or item.reason:
            refused.append(f"{item.path}: {item.reason}")
        else:
            packs.append(item.pack)
    return tuple(packs), tuple(refused)


def _nearness(bucket: Bucket, wanted: Bucket) -> tuple[int, int]:
    """Sorts buckets by distance, ties to the smaller one."""
    return bucket.distance(wanted), bucket.bh + bucket.t


def family_of(gpu: GpuSpec) -> tuple[str, ...]:
    """Names of the GPUs whose rows serve ``gpu``, its own first.

    A device that is not listed takes after the listed ones that need no more shared memory.
    """
    if gpu.name in RELATIVES:
        return (gpu.name, *RELATIVES[gpu.name])
    kin = (spec for spec in GPUS.values() if spec.arch == gpu.arch)
    able = [spec for spec in kin if spec.shared_per_block <= gpu.shared_per_block]
    able.sort(key=lambda spec: (-spec.shared_per_block, abs(spec.sm_count - gpu.sm_count)))
    return tuple(spec.name for spec in able)


def _suited(row: PackRow, gpu: GpuSpec, problem: Problem) -> Config:
    """The row's config; in another bucket than its own with the segments that suit it there."""
    if problem.packed or row.bucket == problem.bucket:
        return row.config
    return suited(row.config, row.spec, problem.bucket, gpu)


def _leads_astray(config: Config, made_for: Bucket, problem: Problem) -> bool:
    """Whether programs that walk to their segments may have a longer way than was measured."""
    return leads(config) and (problem.packed > 0 or made_for != problem.bucket)


def _cut_anyhow(
    row: PackRow, others: Iterable[PackRow], problem: Problem, gpu: GpuSpec
) -> PackRow:
    """``row`` for a packed batch: one sequence may be as long as all others together.

    A forward row that lacks the kernels to cut sequences borrows those of another row.
    """
    config = row.config
    kinds = ForwardConfig | BackwardConfig | ChunksBackwardConfig
    if not isinstance(config, kinds) or leads(config):
        return row
    if config.segment and row.bucket == problem.bucket:
        return row
    segment = packed_segment(config, row.spec, problem.bucket, gpu)
    if not isinstance(config, ForwardConfig) or config.summary is not None:
        return replace(row, config=replace(config, segment=segment))
    for other in sorted(others, key=lambda r: _nearness(r.bucket, row.bucket)):
        lender = other.config
        if not isinstance(lender, ForwardConfig) or lender.prepare or config.prepare:
            continue
        cut = replace(config, segment=segment, summary=lender.summary)
        if lender.summary and why_illegal(row.spec, cut, gpu) is None:
            return replace(row, config=cut, kernels={**other.kernels, **row.kernels})
    return row


def _idles(row: PackRow, gpu: GpuSpec, bucket: Bucket) -> bool:
    """Whether a row made for another bucket cannot keep the GPU busy with whole sequences."""
    config = row.config
    if isinstance(config, ScalarBackwardConfig):
        programs = walking_programs(config, row.spec, bucket)
        return row.bucket != bucket and 0 < 2 * programs < gpu.sm_count
    return (
        row.bucket != bucket
        and isinstance(config, ForwardConfig)
        and config.summary is None
        and suitable_segment(config, row.spec, bucket, gpu) > 0
    )


MOST_KEPT = 1.5
"""Of states, times the bytes of all inputs and gradients, unless ``GLAC_SCRATCH_MIB`` is less."""


def _keeps_too_much(config: ChunksBackwardConfig, problem: Problem, gpu: GpuSpec) -> bool:
    """Whether states of all chunks take more memory than a problem should need.

    At 8,2048,4,256,512 they are 512 MiB, 1.3 times the tensors of the pass and as much as the
    parts of gradients that they spare. Where somebody allows less memory than by default, less it
    is.
    """
    from glac.chunks_backward import kept_bytes

    way = cut_backward(config, problem.spec, problem.bucket, gpu)
    allowed = scratch_bytes()
    if allowed >= DEFAULT_SCRATCH_BYTES:
        allowed = max(allowed, int(MOST_KEPT * problem.dense.bytes(Op.BACKWARD)))
    return kept_bytes(problem, way) > allowed


def _walks_in_vain(config: Config, problem: Problem, gpu: GpuSpec) -> bool:
    """Whether a backward config walks where others do better.

    Of a vector gate one that finds states again without sparing the problem any windows. Only that
    pays for it. On an H100 training with four times the heads of the problem that it won
    at took 3734 us instead of 3333, in segments, as those of packed batches, 1468 instead of 1240,
    and that problem itself, with memory for the states of every chunk, 818 instead of 752.
    """
    if isinstance(config, ScalarBackwardConfig):
        # Walking takes as long as the longest sequence does, and nobody knows how long it is: with
        # 8 heads of random lengths 2768 us instead of 1277. Many heads even that out: 2550 at 32
        # instead of 2981.
        programs = walking_programs(config, problem.spec, problem.bucket)
        return problem.packed > 0 and 0 < programs < 2 * gpu.sm_count
    if isinstance(config, ChunksBackwardConfig):
        return _keeps_too_much(config, problem, gpu)
    if not isinstance(config, BackwardConfig) or config.grads.keep == 1:
        return False
    from glac.backward import cut

    if problem.packed:
        return True
    apart = cut_backward(config, problem.spec, problem.bucket, gpu)
    every = replace(apart, grads=replace(apart.grads, keep=1))
    return not cut(problem, apart).segments == 1 < cut(problem, every).segments


def _rank(row: PackRow, gpu: GpuSpec, problem: Problem) -> tuple[int, ...]:
    family = family_of(gpu)
    kinship = family.index(row.gpu) if row.gpu in family else len(family)
    guessed = row.source != "tuned"
    astray = _leads_astray(row.config, row.bucket, problem)
    vain = _walks_in_vain(row.config, problem, gpu)
    flaws = (astray, _idles(row, gpu, problem.bucket), guessed, vain)
    return *map(int, flaws), kinship, *_nearness(row.bucket, problem.bucket)


def best_row(
    rows: Iterable[PackRow], problem: Problem, gpu: GpuSpec, op: Op = Op.FORWARD
) -> PackRow | None:
    """The row that serves ``problem`` on ``gpu``.

    First one whose programs walk to their segments only where that was measured; then one that
    can cut its sequences where they should be, then tuned before guessed, then one that keeps
    states as far apart as suits the problem, then kin, then the nearest bucket.
    """
    hits = [row for row in rows if row.op is op and row.spec == problem.spec]
    return min(hits, key=lambda row: _rank(row, gpu, problem), default=None)


def _from_packs(
    packs: Sequence[Pack], problem: Problem, gpu: GpuSpec, op: Op, tried: list[str]
) -> tuple[Pack, PackRow] | None:
    for pack in packs:
        try:
            hits = pack.rows_of(op, problem.spec)
        except PackError as error:
            tried.append(f"{pack.path}: refused: {error.message}")
            log.warning("glac: pack %s refused: %s", pack.path, error)
            continue
        fitting = [
            row for row in hits if row_fits((pack.kernels[k] for k in row.kernels.values()), gpu)
        ]
        row = best_row(fitting, problem, gpu, op)
        if row is not None:
            return pack, _cut_anyhow(row, fitting, problem, gpu) if problem.packed else row
        reason = f"no {op.value} row for {problem.spec.slug}"
        if hits:
            reason += f" within {gpu.shared_per_block} bytes of shared memory"
        tried.append(f"{pack.path}: {reason}")
    return None


def _pack_decision(
    pack: Pack, row: PackRow, problem: Problem, gpu: GpuSpec, tried: list[str]
) -> Decision:
    b, want = row.bucket, problem.bucket
    config = _suited(row, gpu, problem)
    exact = "its bucket" if b == want else f"nearest bucket (2^{b.bh} heads, 2^{b.t} tokens)"
    if config != row.config or problem.packed:
        segment = getattr(config, "segment", 0)
        exact += f", in segments of {segment} tokens" if segment else ", not cut"
    return _row_decision(
        "pack", pack, row, config, f"{row.source} row of {row.gpu}, {exact}", tried
    )


def _row_decision(
    provider: str, pack: Pack, row: PackRow, config: Config, reason: str, tried: list[str]
) -> Decision:
    return Decision(
        op=row.op,
        provider=provider,
        config=config,
        config_id=config.slug,
        cubin_sha=pack.kernels[row.kernels[row.config.main]].sha256,
        kernels=dict(row.kernels),
        path=str(pack.path),
        reason=reason,
        tried=tried,
    )


def _torch_decision(op: Op, reason: str, tried: list[str]) -> Decision:
    return Decision(op, "torch", None, "torch-chunk", "", {}, "", reason, tried)


def can_build() -> bool:
    """Whether a compiler is installed. Imports nothing."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        return importlib.util.find_spec("nvidia.cuda_nvcc") is not None
    except ModuleNotFoundError:
        return False


def decide(
    problem: Problem, gpu: GpuSpec, op: Op = Op.FORWARD, settings: Settings | None = None
) -> Decision:
    """What would serve ``problem`` on ``gpu``, without building, loading or touching a device."""
    settings = settings or load_settings()
    packs, refused = installed_packs(settings, gpu.arch)
    tried = list(refused)
    hit = _from_packs(packs, problem, gpu, op, tried)
    if hit:
        return _pack_decision(*hit, problem, gpu, tried)
    if settings.require_aot:
        raise _not_found(problem, gpu, op, settings, tried)
    if can_build():
        config = miss_config(problem, gpu, op)
        reason = "no pack has it: compiled at first use"
        return Decision(op, "build", config, config.slug, "", {}, "", reason, tried)
    return _torch_decision(op, "no pack has it and no compiler is installed", tried)


def _not_found(
    problem: Problem, gpu: GpuSpec, op: Op, settings: Settings, tried: list[str]
) -> KernelNotFoundError:
    looked = [str(p) for p in pack_roots(settings)]
    lines = "".join(f"\n  {line}" for line in (*tried, f"searched: {', '.join(looked)}"))
    return KernelNotFoundError(
        f"GLAC_REQUIRE_AOT=1 and no pack has a {op.value} kernel for {problem} on {gpu.name}:"
        f"{lines}",
        hint=f"glac tune --gpu {gpu.name}, then glac build --gpu {gpu.name}, where a compiler is; "
        "or unset GLAC_REQUIRE_AOT",
    )


def miss_config(problem: Problem, gpu: GpuSpec, op: Op = Op.FORWARD) -> Config:
    """The config for a problem that no pack has: the nearest tuned row's, else the heuristic's.

    In another bucket than its own, a tuned row's is cut into segments as the problem wants.
    """
    default = default_config(op, problem.spec, gpu, problem.bucket)
    try:
        from glac.tuned import available  # needs PyYAML, which serving from packs does not
    except ImportError:
        return default

    for name in family_of(gpu):
        rows = [row for file in available(name) for row in file.rows]
        hits = [
            row
            for row in rows
            if row.op is op
            and row.spec == problem.spec
            and not _leads_astray(row.config, row.bucket, problem)
        ]
        if hits:
            # The first of equally near ones: a user's own before one that came with glac.
            near = min(
                hits,
                key=lambda row: (
                    _walks_in_vain(row.config, problem, gpu),
                    *_nearness(row.bucket, problem.bucket),
                ),
            )
            if near.bucket == problem.bucket:
                return near.config
            config = suited(near.config, problem.spec, problem.bucket, gpu, new_kernels=True)
            return near.config if why_illegal(problem.spec, config, gpu) else config
    return default


def _build_on_miss(
    problem: Problem, gpu: GpuSpec, op: Op, settings: Settings
) -> tuple[Pack, PackRow]:
    from glac.build import build_single

    bucket = problem.bucket
    name = f"{op.value}-{problem.spec.slug}-bh{bucket.bh}-t{bucket.t}"
    folder = settings.miss_dir / gpu.arch / name
    pack, compiled = build_single(problem, gpu, miss_config(problem, gpu, op), folder)
    _stats.compiled += compiled
    row = best_row(pack.rows, problem, gpu, op)
    assert row is not None
    return pack, row


@functools.cache
def device_facts(device: int) -> Device:
    """What a CUDA device lets run.

    Raises:
        MissingEnvironmentError: there is no CUDA driver.
    """
    import torch

    from glac.driver import driver_version

    props = torch.cuda.get_device_properties(device)
    capability = (props.major, props.minor)
    return Device(props.name, capability, _shared_per_block(props), driver_version())


def _shared_per_block(props: Any) -> int:
    """Bytes that a block may ask for; where PyTorch does not tell, those of the smallest kin."""
    told = getattr(props, "shared_memory_per_block_optin", None)
    if told is not None:
        return int(told)
    known = [
        spec.shared_per_block
        for spec in GPUS.values()
        if spec.capability[0] == props.major and (spec.capability[1] == 0) == (props.minor == 0)
    ]
    return min(known, default=0)


def _load(pack: Pack, row: PackRow, device: int) -> Kernels:
    from glac.launch import load_from_pack

    check_fit(pack, row.kernels.values(), device_facts(device))
    return {name: load_from_pack(pack, kernel, device) for name, kernel in row.kernels.items()}


@functools.lru_cache(maxsize=256)
def pack_kernel(
    template: str, spec: Specialisation, config: KernelConfig, device: int
) -> Kernel | None:
    """One kernel from whichever pack has it, whatever its rows; ``None`` if none does."""
    gpu = device_gpu(device)[0]
    if gpu is None:
        return None
    from glac.launch import load_from_pack

    name = KernelSpec(template, spec, config, gpu.arch).name
    for pack in installed_packs(load_settings(), gpu.arch)[0]:
        try:
            if name in pack.kernels:
                check_fit(pack, [name], device_facts(device))
                return load_from_pack(pack, name, device)
        except PackError as error:
            log.warning("glac: pack %s refused: %s", pack.path, error)
    return None


def plan_from_packs(problem: Problem, device: int, op: Op) -> Plan[Any] | None:
    """The plan of an op that a pack has, for what only helps another op: no decision, no error."""
    key = (op, problem.spec, problem.bucket, problem.packed > 0, device)
    if key not in _beside:
        gpu = device_gpu(device)[0]
        packs = installed_packs(load_settings(), gpu.arch)[0] if gpu else ()
        hit = _from_packs(packs, problem, gpu, op, []) if gpu else None
        try:
            _beside[key] = (hit[1].config, _load(*hit, device)) if hit else None
        except PackError as error:
            log.warning("glac: kernels beside %s refused: %s", op.value, error)
            _beside[key] = None
    found = _beside[key]
    return Plan(problem, *found) if found else None


@functools.cache
def device_gpu(device: int) -> tuple[GpuSpec | None, str]:
    """The GpuSpec that serves a CUDA device, and a line about it.

    A model that is not listed gets a spec of its own from its properties if glac builds for its
    capability; otherwise ``None``.
    """
    import torch  # here, so that deciding for a GPU that is not in this machine needs none

    props = torch.cuda.get_device_properties(device)
    capability = (props.major, props.minor)
    known = match_gpu(capability, props.multi_processor_count, props.name)
    if known:
        return known, known.title
    arch = next((name for name in ARCHS if runs_on(name, capability)), None)
    if arch is None:
        return (
            None,
            f"{props.name}: glac has no kernels for capability {props.major}.{props.minor}",
        )
    shared = _shared_per_block(props)
    # The nearest listed one with no more shared memory: rows made for it run here.
    kin = [spec for spec in GPUS.values() if spec.arch == arch]
    able = [spec for spec in kin if spec.shared_per_block <= shared] or kin
    base = max(able, key=lambda spec: (spec.shared_per_block, spec.capability == capability))
    spec = GpuSpec(
        name=f"cc{props.major}{props.minor}-{props.multi_processor_count}sm",
        title=props.name,
        capability=base.capability,  # the code path: sm_80 machine code runs on every 8.x
        sm_count=props.multi_processor_count,
        shared_per_block=shared,
        copy_bandwidth=base.copy_bandwidth,
        matrix_rate=base.matrix_rate,
    )
    return spec, f"{props.name}: not a listed GPU, served by {base.name}'s configs"


def _resolve(problem: Problem, device: int, op: Op) -> tuple[Decision, Kernels | None]:
    settings = load_settings()
    gpu, note = device_gpu(device)
    if gpu is None:
        if settings.require_aot:
            raise KernelNotFoundError(
                f"GLAC_REQUIRE_AOT=1, and {note}",
                hint="unset GLAC_REQUIRE_AOT to run through PyTorch",
            )
        return _torch_decision(op, note, []), None
    packs, refused = installed_packs(settings, gpu.arch)
    tried = list(refused)
    hit = _from_packs(packs, problem, gpu, op, tried)
    while hit:
        try:
            return _pack_decision(*hit, problem, gpu, tried), _load(*hit, device)
        except PackError as error:
            # A damaged cubin: say so, and go on with the packs behind this one.
            tried.append(f"{hit[0].path}: refused: {error.message}")
            log.warning("glac: pack %s refused: %s", hit[0].path, error)
            packs = packs[packs.index(hit[0]) + 1 :]
            hit = _from_packs(packs, problem, gpu, op, tried)
    if settings.require_aot:
        raise _not_found(problem, gpu, op, settings, tried)
    if can_build():
        try:
            pack, row = _build_on_miss(problem, gpu, op, settings)
            loaded = _load(pack, row, device)
        except GlacError as error:
            tried.append(f"build on miss failed: {error.message}")
            return _torch_decision(op, "no pack has it and building it failed", tried), None
        reason = f"no pack has it: compiled here with the {row.source} config"
        warnings.warn(
            f"glac compiled {op.value} kernels at run time: no pack row for {problem} on "
            f"{gpu.name}. Ship one: glac tune --gpu {gpu.name}, glac build --gpu {gpu.name}.",
            stacklevel=2,
        )
        return _row_decision("build", pack, row, row.config, reason, tried), loaded
    return _torch_decision(op, "no pack has it and no compiler is installed", tried), None


@overload
def resolve(
    problem: Problem, device: int, op: Literal[Op.FORWARD] = ...
) -> tuple[Decision, Plan[ForwardConfig] | None]: ...


@overload
def resolve(
    problem: Problem, device: int, op: Literal[Op.BACKWARD]
) -> tuple[Decision, Plan[BackwardConfig | ChunksBackwardConfig] | None]: ...


@overload
def resolve(
    problem: Problem, device: int, op: Literal[Op.SCALAR_FORWARD]
) -> tuple[Decision, Plan[ScalarForwardConfig] | None]: ...


@overload
def resolve(
    problem: Problem, device: int, op: Literal[Op.SCALAR_BACKWARD]
) -> tuple[Decision, Plan[ScalarBackwardConfig] | None]: ...


@overload
def resolve(
    problem: Problem, device: int, op: Literal[Op.DECODE]
) -> tuple[Decision, Plan[DecodeConfig] | None]: ...


@overload
def resolve(problem: Problem, device: int, op: Op) -> tuple[Decision, Plan[Config] | None]: ...


def resolve(
    problem: Problem, device: int, op: Op = Op.FORWARD
) -> tuple[Decision, Plan[Any] | None]:
    """The decision for an op of ``problem`` on a CUDA device, its plan (``None``: use PyTorch).

    Raises:
        KernelNotFoundError: ``GLAC_REQUIRE_AOT=1`` and no pack has a kernel.
    """
    key = (op, problem.spec, problem.bucket, problem.packed > 0, device)
    found = _served.get(key)
    if found is None:
        with _lock:
            found = _served.get(key)
            if found is None:
                found = _served[key] = _resolve(problem, device, op)
                decision = found[0]
                _stats.decisions[decision.provider] = (
                    _stats.decisions.get(decision.provider, 0) + 1
                )
                log.info(
                    "glac: %s %s: %s %s (%s)",
                    problem,
                    op.value,
                    decision.provider,
                    decision.config_id,
                    decision.reason,
                )
    decision, kernels = found
    if kernels is None or decision.config is None:
        return decision, None
    return decision, Plan(problem, decision.config, kernels)


def explain(problem: Problem, device: torch.device | int = 0, op: Op = Op.FORWARD) -> Decision:
    """The decision for an op of ``problem`` on a CUDA device; makes it if it was not made yet."""
    index = device if isinstance(device, int) else (device.index or 0)
    return resolve(problem, index, op)[0]
