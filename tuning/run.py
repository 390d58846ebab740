"""A whole tuning run: compiled candidates, a worker on the GPU, a study, the YAML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glac.errors import MissingEnvironmentError, StudyError
from glac.gpus import GpuSpec
from glac.problem import Op, Problem
from glac.tuning.candidates import Candidates, check_usable, compile_candidates
from glac.tuning.evaluate import EFFORT
from glac.tuning.export import Export, check_target, export
from glac.tuning.progress import Progress
from glac.tuning.space import Space, space
from glac.tuning.study import Report, import_optuna, run_study
from glac.tuning.worker import WorkerEvaluator

_ELSEWHERE = (
    "without a GPU: --dry-run, and --gpu NAME --compile-only DIR; then --from DIR on the machine "
    "that has one"
)


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


def check_measurable(gpu: GpuSpec, device: int = 0) -> None:
    """Refuse to start what cannot be finished: no Optuna, no GPU, a GPU of another arch.

    Raises:
        MissingEnvironmentError: something is missing.
        StudyError: the GPU here cannot run what is tuned.
    """
    import_optuna()
    here = detected_gpu(device)
    if here.arch != gpu.arch:
        raise StudyError(
            f"this machine has {here.title} ({here.arch}), {gpu.name} needs {gpu.arch}",
            hint=f"glac tune --gpu {here.name}, or measure on another machine with --from DIR",
        )


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
    configs = tuple(c for c in few if c in found.configs) or found.configs
    return Space(found.problem, found.default, configs)


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


def tune(
    candidates: Candidates,
    spaces: Sequence[Space],
    gpu: GpuSpec,
    out: Path,
    storage: Path | None = None,
    *,
    effort: str = "standard",
    trials: int | None = None,
    timeout: float = 60.0,
    seed: int = 0,
    device: int = 0,
    progress: Progress | None = None,
) -> Tuned:
    """Measure candidates on this machine's GPU and write the winners.

    Args:
        candidates: compiled, as ``compile_candidates`` returns them.
        spaces: what to study of them, see ``choose_spaces``.
        gpu: whose rows are written.
        out: YAML; rows of other problems in it stay.
        storage: journal of the study, beside ``out`` if None.
        effort: ``quick``, ``standard`` or ``full``.
        trials: candidates per problem, if not all.
        timeout: seconds a candidate may take.
        seed: of inputs and sampler.
        device: CUDA device index.
        progress: told of everything.

    Raises:
        StudyError: candidates, storage or ``out`` are unusable.
        MissingEnvironmentError: no GPU or no Optuna.
    """
    check_target(out, gpu)
    check_usable(candidates, gpu)
    check_measurable(gpu, device)
    pack = candidates.read_pack()
    tools, templates = candidates.toolchain, candidates.templates_sha256
    arguments: dict[str, Any] = {
        "pack": str(candidates.pack_path.resolve()),
        "device": device,
        "effort": asdict(EFFORT[effort]),
        "seed": seed,
    }
    report = run_study(
        spaces,
        WorkerEvaluator(arguments, timeout=timeout),
        storage or default_storage(out),
        gpu=gpu.name,
        effort=effort,
        trials=trials,
        seed=seed,
        key={
            op: f"triton {tools['triton']}, ptxas {tools['ptxas']}, templates {sha[:12]}"
            for op, sha in templates.items()
        },
        missing=lambda problem, config: candidates.why_missing(problem, config, pack),
        progress=progress,
    )
    written = export(report, pack, gpu, out, templates, candidates.commit)
    return Tuned(report, written)


def default_storage(out: Path) -> Path:
    """The journal beside a YAML: ``h100.yaml`` has ``h100.journal``."""
    return out.with_suffix(".journal")
