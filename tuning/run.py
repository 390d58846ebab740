"""A whole tuning run: compiled candidates, a worker on the GPU, a study, the YAML."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from glac import __version__
from glac.configs import Config
from glac.errors import MissingEnvironmentError, StudyError
from glac.gpus import GpuSpec
from glac.problem import Op, Problem
from glac.tuned import available
from glac.tuning.board import LEASE_SECONDS
from glac.tuning.candidates import TWINS, Candidates, check_usable, compile_candidates
from glac.tuning.deny import why_denied
from glac.tuning.evaluate import EFFORT, Device, Evaluator, Outcome, Yardstick
from glac.tuning.export import Export, check_target, export
from glac.tuning.fleet import Fleet, Plan
from glac.tuning.progress import Progress
from glac.tuning.replay import REPLAY_SESSION, Table
from glac.tuning.space import QUICK_CANDIDATES, Space, space
from glac.tuning.storage import open_storage
from glac.tuning.study import (
    DEFAULT_SAMPLER,
    FINALS,
    STUDY_FORMAT,
    Report,
    import_optuna,
    run_study,
)
from glac.tuning.worker import CUDA_SESSION

_ELSEWHERE = (
    "without a GPU: --dry-run, and --gpu NAME --compile-only DIR; then --from DIR on the machine "
    "that has one"
)


_LOOK_SECONDS = 2.0


@dataclass(frozen=True)
class Tuned:
    """What a run ends with: the report, and what was written (``None``: nothing worked)."""

    report: Report
    export: Export | None


def detected_gpu(device: int = 0) -> GpuSpec:
    """The GPU of this machine.

    Raises:
        MissingEnvironmentError: there is none, or none that glac knows.
    """
    try:
        import torch

        from glac.dispatch import device_gpu
    except ImportError as error:
        raise MissingEnvironmentError(
            f"PyTorch is needed to look for a GPU ({error})",
            hint=f"pip install torch; {_ELSEWHERE}",
        ) from None
    if not torch.cuda.is_available():
        raise MissingEnvironmentError("no GPU that PyTorch can use", hint=_ELSEWHERE)
    found, note = device_gpu(device)
    if found is None:
        raise MissingEnvironmentError(note, hint=_ELSEWHERE)
    return found


def check_measurable(gpu: GpuSpec, device: int = 0) -> str:
    """Refuse to start what cannot be finished: no Optuna, no GPU, a GPU of another arch.

    Returns:
        The arch of the GPU here, which for code with a twin may be another.

    Raises:
        MissingEnvironmentError: something is missing.
        StudyError: the GPU here cannot run what is tuned.
    """
    import_optuna()
    here = detected_gpu(device)
    twin = TWINS.get(gpu.arch)
    if here.arch != gpu.arch and (twin is None or here.arch != twin.runs_on):
        raise StudyError(
            f"this machine has {here.title} ({here.arch}), {gpu.name} needs {gpu.arch}",
            hint=f"glac tune --gpu {here.name}, or measure on another machine with --from DIR",
        )
    return here.arch


def visible_devices(wanted: str) -> list[int]:
    """Device indices for ``--gpus``: ``all``, or a list such as ``0,2``.

    Raises:
        StudyError: that is no list of devices here.
        MissingEnvironmentError: there is no GPU.
    """
    import torch

    detected_gpu()
    count = torch.cuda.device_count()
    if wanted == "all":
        return list(range(count))
    try:
        chosen = [int(part) for part in wanted.split(",")]
    except ValueError:
        chosen = []
    if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= i < count for i in chosen):
        raise StudyError(
            f"--gpus: wanted all, or different numbers below {count}, got {wanted!r}",
            hint="one timing worker is started for each GPU",
        )
    return chosen


def choose_spaces(
    candidates: Candidates,
    problems: Sequence[Problem] | None,
    gpu: GpuSpec,
    effort: str,
    ops: Sequence[Op] = tuple(Op),
) -> list[Space]:
    """The problems to study with their compiled configs; all that there are if ``None``.

    Raises:
        StudyError: a problem is not among the candidates.
    """
    chosen = []
    for problem in problems or list(dict.fromkeys(s.problem for s in candidates.spaces)):
        found = [s for op in ops if (s := candidates.space(problem, op)) is not None]
        if not found and problems:
            raise StudyError(
                f"{candidates.path}: has no candidates for {problem}",
                hint="compile them: glac tune --compile-only DIR with the same --suite or --shape "
                "and --op",
            )
        chosen += [_reduced(item, gpu) if effort == "quick" else item for item in found]
    if not chosen:
        raise StudyError(
            f"{candidates.path}: has no candidates for {' and '.join(op.value for op in ops)}",
            hint="compile them: glac tune --compile-only DIR with the same --op",
        )
    return chosen


def _reduced(found: Space, gpu: GpuSpec) -> Space:
    """What a quick study tries of a space."""
    few = space(found.problem, gpu, "quick", found.op).configs
    always = (*found.configs[: min(found.warm, QUICK_CANDIDATES)], *few)
    configs = tuple(c for c in dict.fromkeys(always) if c in found.configs)[:QUICK_CANDIDATES]
    return replace(found, configs=configs, warm=min(found.warm, len(configs)))


def compile_with_progress(
    spaces: Sequence[Space], gpu: GpuSpec, folder: Path, jobs: int | None, progress: Progress
) -> Candidates:
    """``compile_candidates`` with a progress line."""
    begun = False

    def on_kernel(done: int, total: int, failed: int) -> None:
        nonlocal begun
        if not begun:
            progress.begin("compiling kernels", total)
            begun = True
        progress.step(f"{failed} failed")

    try:
        return compile_candidates(spaces, gpu, folder, jobs, on_kernel)
    finally:
        progress.end()


class _Stopped:
    """After Ctrl-C: tells where was measured, and measures nothing more."""

    def __init__(self, inner: Evaluator) -> None:
        self._inner = inner

    def device(self) -> Device:
        return self._inner.device()

    def prepare(self, problem: Problem, op: Op) -> Yardstick:
        raise KeyboardInterrupt

    def evaluate(self, config: Config, best_us: float | None) -> Outcome:
        raise KeyboardInterrupt

    def compare(self, configs: Sequence[Config], rounds: int) -> list[list[float]]:
        raise KeyboardInterrupt

    def abort(self) -> None:
        self._inner.abort()

    def close(self) -> None:
        self._inner.close()


def run_plan(plan: Plan, devices: Sequence[int], progress: Progress) -> Report:
    """Run a plan with one worker for each device; its report.

    One worker is a child of this process; several run the study beside each other and this process
    collects what they found, or finishes what they left.
    """
    started = time.monotonic()
    if len(devices) == 1:
        only: Report = plan.run(devices[0], 0, progress)
        return only
    total = sum(len(space.configs) for space in plan.spaces)
    progress.begin(f"{len(devices)} workers", total)
    watch = _Watch(plan, progress)
    try:
        Fleet(plan, devices, progress, watch.look).run()
    except KeyboardInterrupt:
        progress.end()
        stopped = _Stopped(plan.evaluator(devices[0]))
        report = run_study(
            plan.spaces,
            stopped,
            plan.storage,
            missing=plan.why_missing,
            **plan.study,
        )
        return replace(report, interrupted=True)
    progress.end()
    last: Report = plan.run(devices[0], 0, progress)
    return replace(last, wall=time.monotonic() - started)


class _Watch:
    """Counts what all workers of a plan have done, now and then."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self._plan, self._progress = plan, progress
        self._next, self._shown = 0.0, 0

    def look(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _LOOK_SECONDS
        # The storage may not be there yet, or be away for a moment.
        with contextlib.suppress(Exception):
            done = self._count()
            if done > self._shown:
                self._progress.step(count=done - self._shown)
                self._shown = done

    def _count(self) -> int:
        optuna = import_optuna()
        prefix = f"{STUDY_FORMAT}:{self._plan.study['gpu']}|"
        with open_storage(optuna, self._plan.storage, create=False) as storage:
            complete = optuna.trial.TrialState.COMPLETE
            names = [str(space) for space in self._plan.spaces]
            return sum(
                storage.get_n_trials(study._study_id, complete)
                for study in storage.get_all_studies()
                if study.study_name.startswith(prefix)
                and not study.study_name.endswith(FINALS)
                and study.study_name.split("|")[2] in names
            )


def tune(
    candidates: Candidates,
    spaces: Sequence[Space],
    gpu: GpuSpec,
    out: Path,
    storage: Path | str | None = None,
    *,
    effort: str = "standard",
    trials: int | None = None,
    timeout: float = 60.0,
    seed: int = 0,
    device: int = 0,
    devices: Sequence[int] | None = None,
    progress: Progress | None = None,
    sampler: str = DEFAULT_SAMPLER,
    lease: float = LEASE_SECONDS,
) -> Tuned:
    """Measure candidates on this machine's GPUs and write the winners.

    Args:
        candidates: compiled, as ``compile_candidates`` returns them.
        spaces: what to study of them, see ``choose_spaces``.
        gpu: whose rows are written.
        out: YAML; rows of other problems in it stay.
        storage: journal or URL of the study, a journal beside ``out`` if None.
        effort: ``quick``, ``standard`` or ``full``.
        trials: candidates per problem, if not all.
        timeout: seconds a candidate may take.
        seed: of inputs and sampler.
        device: CUDA device index.
        devices: several of them, one worker each; instead of ``device``.
        progress: told of everything.
        sampler: for spaces that are not tried whole.
        lease: seconds after which a silent worker of another machine has lost its candidate.

    Raises:
        StudyError: candidates, storage or ``out`` are unusable.
        MissingEnvironmentError: no GPU or no Optuna.
    """
    check_target(out, gpu)
    check_usable(candidates, gpu)
    chosen = list(devices) if devices else [device]
    code = candidates.pack_for(check_measurable(gpu, chosen[0]))
    if code is None:
        raise StudyError(
            f"{candidates.path}: holds no code that this machine's GPU runs",
            hint=f"compile again: glac tune --gpu {gpu.name} --compile-only {candidates.path}",
        )
    pack = candidates.read_pack()
    tools, templates = candidates.toolchain, candidates.templates_sha256
    # Code for another GPU than the one here is not the same study.
    path = f", {gpu.arch} code" if code != candidates.pack_path else ""
    denied = available(gpu.name)

    def missing(problem: Problem, config: Config) -> str | None:
        return candidates.why_missing(problem, config, pack) or why_denied(
            problem.spec, config, denied, tools["triton"], tools["ptxas"], templates
        )

    plan = Plan(
        spaces=spaces,
        session={
            "pack": str(code.resolve()),
            "device": chosen[0],
            "effort": asdict(EFFORT[effort]),
            "seed": seed,
        },
        factory=CUDA_SESSION,
        storage=str(storage or default_storage(out)),
        study={
            "gpu": gpu.name,
            "effort": effort,
            "trials": trials,
            "seed": seed,
            "sampler": sampler,
            "lease": lease,
            "elsewhere": bool(path),
            "key": {
                op: f"triton {tools['triton']}, ptxas {tools['ptxas']}, templates {sha[:12]}{path}"
                for op, sha in templates.items()
            },
            "facts": _facts(tools, candidates.commit, gpu.arch),
        },
        missing=[_reasons(item, missing) for item in spaces],
        timeout=timeout,
    )
    report = run_plan(plan, chosen, progress or Progress(quiet=True))
    written = export(report, pack, gpu, out, templates, candidates.commit)
    return Tuned(report, written)


def _facts(tools: Mapping[str, str], commit: str, arch: str) -> dict[str, str]:
    return {**tools, "glac": __version__, "commit": commit, "code_path": arch}


def _reasons(space: Space, missing: Callable[[Problem, Config], str | None]) -> dict[str, str]:
    found = {config.slug: missing(space.problem, config) for config in space.configs}
    return {slug: reason for slug, reason in found.items() if reason}


def replay(
    table: Table,
    spaces: Sequence[Space],
    gpu: GpuSpec,
    out: Path | None,
    storage: Path | str,
    *,
    effort: str = "standard",
    trials: int | None = None,
    timeout: float = 60.0,
    seed: int = 0,
    workers: int = 1,
    sleep: float = 0.0,
    log: str = "",
    jobs: int | None = None,
    progress: Progress | None = None,
    sampler: str = DEFAULT_SAMPLER,
    lease: float = LEASE_SECONDS,
) -> Tuned:
    """Run studies from a table instead of a GPU; all but the timing is as in ``tune``.

    Args:
        table: recorded outcomes.
        spaces: what to study of it.
        gpu: whose rows are written.
        out: YAML to write, for which the winners are compiled; nothing is written if None.
        storage: journal or URL of the study.
        effort, trials, timeout, seed, sampler: as in ``tune``.
        workers: processes that run the study beside each other.
        sleep: seconds each candidate takes.
        log: file that gets a line for each candidate tried.
        jobs: compiler processes for ``out``.
        progress: told of everything.
        lease: seconds after which a silent worker of another machine has lost its candidate.

    Raises:
        StudyError: storage or ``out`` are unusable.
        MissingEnvironmentError: no Optuna, or no compiler where ``out`` is given.
    """
    if out is not None:
        check_target(out, gpu)
    progress = progress or Progress(quiet=True)
    digest = hashlib.sha256(table.path.read_bytes()).hexdigest()[:12]
    plan = Plan(
        spaces=spaces,
        session={"table": str(table.path.resolve()), "sleep": sleep, "log": log},
        factory=REPLAY_SESSION,
        storage=str(storage),
        study={
            "gpu": gpu.name,
            "effort": effort,
            "trials": trials,
            "seed": seed,
            "sampler": sampler,
            "lease": lease,
            "key": dict.fromkeys(Op, f"table {digest}"),
            "facts": {"glac": __version__, "code_path": gpu.arch, "table": table.path.name},
        },
        missing=[{} for _ in spaces],
        timeout=timeout + sleep,
    )
    report = run_plan(plan, list(range(workers)), progress)
    won = [(r, r.choice.config) for r in report.results if r.choice is not None]
    if out is None or not won:
        return Tuned(report, None)
    winners_only = [Space(r.problem, config, (config,)) for r, config in won]
    folder = out.with_name(f"{out.stem}-candidates")
    compiled = compile_with_progress(winners_only, gpu, folder, jobs, progress)
    pack = compiled.read_pack()
    failed = [compiled.why_missing(r.problem, config, pack) for r, config in won]
    for reason in failed:
        if reason:
            raise StudyError(f"a winner of the table cannot be compiled: {reason}")
    written = export(report, pack, gpu, out, compiled.templates_sha256, compiled.commit)
    return Tuned(report, written)


def default_storage(out: Path) -> Path:
    """The journal beside a YAML: ``h100.yaml`` has ``h100.journal``."""
    return out.with_suffix(".journal")
