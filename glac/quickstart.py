"""``glac quickstart``: the main job, once, on whatever machine this is.

With a GPU: tune a few configs of one problem, build a pack, run the public operations from it, and
compare them with fp64. Without: cross-build part of the packs for Hopper and Ampere, say what an
H100 would run, and compare the PyTorch form with fp64. A step whose tools are missing is skipped
and named; the others still run.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from glac import dispatch
from glac.cli import DEFAULT_BUILD, format_table, terminal
from glac.configs import Config, default_forward
from glac.errors import GlacError
from glac.gpus import GPUS, RELATIVES, GpuSpec
from glac.kernelspec import KernelSpec, config_kernels
from glac.pack import Pack, PackRow, write_pack
from glac.problem import DType, Gate, Op, Problem, Specialisation
from glac.settings import load_settings

if TYPE_CHECKING:
    from glac.compile import CompiledKernel

Say = Callable[[str], None]


def _problem(
    sizes: tuple[int, int, int, int, int], dtype: DType = DType.BF16, rank: int = 0
) -> Problem:
    B, T, H, K, V = sizes
    gate = Gate.LOWRANK if rank else Gate.VECTOR
    return Problem(Specialisation(K, V, dtype, gate, dtype, rank), B, T, H)


TUNED = _problem((16, 2048, 8, 128, 128))
LOWRANK = _problem((8, 2048, 16, 64, 64), rank=16)
ODD = _problem((2, 1000, 3, 96, 80))
"""Sizes that divide by nothing."""
SINGLE = _problem((2, 1, 3, 96, 80))
"""One token; served by the kernel of ``ODD``."""

CROSS_BUILT = (_problem((8, 2048, 16, 64, 64)), TUNED, LOWRANK)
CROSS_GPUS = ("h100", "a100")
ON_CPU = (
    _problem((1, 512, 4, 128, 128)),
    _problem((1, 512, 4, 64, 64), rank=16),
    _problem((1, 512, 4, 64, 64), DType.FP16),
    ODD,
    SINGLE,
)
BUDGET = 2.0
"""A result may be this many times as far from fp64 as PyTorch in the kernels' precision."""


@dataclass(frozen=True)
class Run:
    """One call of a public operation, compared with fp64.

    Attributes:
        problem: sizes and specialisation.
        us: device time, ``None`` where it was not measured.
        floor_us: time to move its data once.
        error: relative rms error of the output.
        budget: the error it may have.
        served_by: provider and config.
        note: what went wrong or what a reader should know.
    """

    problem: str
    us: float | None
    floor_us: float | None
    error: float | None
    budget: float | None
    served_by: str
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether there is a result and it is as accurate as it should be."""
        return self.error is not None and self.budget is not None and self.error <= self.budget


@dataclass
class Report:
    """What a quickstart found.

    Attributes:
        mode: ``gpu`` or ``cpu``.
        device: what it ran on.
        tuned: what the small study found, ``None`` where there was none.
        packs: path, arch and kernels of each pack it built.
        decisions: what dispatch would do on an H100 (without a GPU only).
        runs: the operations that ran.
        missing: steps that were skipped, with the reason.
        seconds: the whole run.
    """

    mode: str
    device: str
    tuned: dict[str, Any] | None = None
    packs: list[dict[str, Any]] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def useful(self) -> bool:
        return bool(self.packs or self.runs)

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        for item, run in zip(data["runs"], self.runs, strict=True):
            item["passed"] = run.passed
        return data

    def summary(self) -> str:
        """The last lines of the text form."""
        good = sum(run.passed for run in self.runs)
        lines = [f"{good} of {len(self.runs)} results within budget, {self.seconds:.0f} s"]
        lines += [f"skipped: {line}" for line in self.missing]
        if self.mode == "cpu":
            lines.append("`glac build` makes all kernels; with a GPU, this also tunes and times")
        else:
            lines.append("next: `glac tune`, `glac build`, `glac bench`; `glac explain` says why")
        return "\n".join(lines)


def run_quickstart(
    say: Say,
    progress: Say,
    *,
    out: Path | None = None,
    jobs: int | None = None,
    tune: bool = True,
    use_gpu: bool | None = None,
) -> Report:
    """Do the main job and report it.

    Args:
        say: takes each part of the result as text, as soon as it is there.
        progress: takes lines on what is going on.
        out: folder for packs and study; ``quickstart`` in the user cache if None.
        jobs: kernels compiled at a time; one for each CPU if None.
        tune: whether to run the small study where there is a GPU.
        use_gpu: ``False`` does what a machine without a GPU does; ``None`` looks.
    """
    started = time.perf_counter()
    gpu, title = _find_gpu(use_gpu)
    folder = _folder(out)
    if gpu is None:
        report = Report("cpu", title)
        say(f"no GPU is used here ({title}): cross-building for others, running PyTorch\n")
        _cross_build(report, folder, jobs, say, progress)
        _foresee(report, folder, say)
        _run_on_cpu(report, say, progress)
    else:
        report = Report("gpu", title)
        say(f"running on {title}\n")
        _build_here(report, gpu, folder, jobs, tune, say, progress)
        with _packs_first(folder):
            _run_on_gpu(report, say, progress)
    report.seconds = time.perf_counter() - started
    return report


def _find_gpu(use_gpu: bool | None) -> tuple[GpuSpec | None, str]:
    if use_gpu is False:
        return None, "as asked"
    if not torch.cuda.is_available():
        return None, "PyTorch finds none"
    return dispatch.device_gpu(torch.cuda.current_device())


def _folder(out: Path | None) -> Path:
    """A folder that can be written."""
    folder = out or load_settings().cache_dir / "quickstart"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        if out is not None:
            raise GlacError(f"cannot write {out}", hint="choose another --out") from None
        return Path(tempfile.mkdtemp(prefix="glac-quickstart-"))


@contextmanager
def _packs_first(folder: Path) -> Iterator[None]:
    """Dispatch looks into ``folder`` before anywhere else, and forgets what it decided before."""
    before = os.environ.get("GLAC_PACK_PATH")
    os.environ["GLAC_PACK_PATH"] = os.pathsep.join(p for p in (str(folder), before) if p)
    dispatch.clear()
    try:
        yield
    finally:
        if before is None:
            del os.environ["GLAC_PACK_PATH"]
        else:
            os.environ["GLAC_PACK_PATH"] = before
        dispatch.clear()


def _reason(error: Exception) -> str:
    if isinstance(error, GlacError):
        return f"{error.message} ({error.hint})" if error.hint else error.message
    if isinstance(error, ModuleNotFoundError):
        return f"the Python package {(error.name or '').partition('.')[0]} is not installed"
    return f"{type(error).__name__}: {error}"


# ---- packs ----


@dataclass(frozen=True)
class _Choice:
    """A row for a pack. ``certified`` maps kernels to the cubin hashes of a tuned file."""

    gpu: str
    source: str
    measured_on: str
    problem: Problem
    config: Config
    certified: Mapping[str, str] = field(default_factory=dict)

    def kernels(self) -> list[KernelSpec]:
        return config_kernels(self.problem.spec, self.config, GPUS[self.gpu].arch)

    def row(self) -> PackRow:
        spec, bucket = self.problem.spec, self.problem.bucket
        return PackRow.make(self.gpu, self.source, self.measured_on, spec, bucket, self.config)


def _choose(problem: Problem, gpu: GpuSpec) -> _Choice:
    """The shipped row of ``problem``'s bucket, tuned on ``gpu`` or a relative, else a default."""
    from glac.tuned import shipped

    for name in (gpu.name, *RELATIVES.get(gpu.name, ())):
        file = shipped(name)
        for row in file.rows if file else ():
            wanted = (Op.FORWARD, problem.spec, problem.bucket)
            if (row.op, row.spec, row.bucket) == wanted:
                source = "tuned" if name == gpu.name else "heuristic"
                measured_on = row.stats.measured_on or (file.measured_on if file else "")
                hashes = {kernel.name: kernel.cubin_sha256 for kernel in row.kernels}
                return _Choice(gpu.name, source, measured_on, problem, row.config, hashes)
    config = default_forward(problem.spec, gpu, problem.bucket)
    return _Choice(gpu.name, "heuristic", "", problem, config)


def _write_packs(
    report: Report,
    choices: Sequence[_Choice],
    folder: Path,
    jobs: int | None,
    say: Say,
    progress: Say,
) -> None:
    """Compile ``choices`` into one pack for each arch, at ``folder/<arch>``, and show them."""
    from glac.compile import CompiledKernel, compile_many, toolchain

    tools = toolchain()
    todo = list(dict.fromkeys(kernel for choice in choices for kernel in choice.kernels()))
    done = 0

    def on_done(kernel: KernelSpec, _: CompiledKernel | GlacError) -> None:
        nonlocal done
        done += 1
        progress(f"[{done}/{len(todo)}] {kernel.name}")

    compiled = compile_many(todo, jobs, on_done)
    certified = {name: sha for choice in choices for name, sha in choice.certified.items()}
    by_arch: dict[str, list[_Choice]] = {}
    for choice in choices:
        failures = [r for k in choice.kernels() if isinstance(r := compiled[k], GlacError)]
        if failures:
            report.missing.append(f"{choice.gpu} {choice.problem}: {failures[0].message}")
        else:
            by_arch.setdefault(GPUS[choice.gpu].arch, []).append(choice)
    for arch, group in by_arch.items():
        kernels = dict.fromkeys(kernel for choice in group for kernel in choice.kernels())
        built = [r for k in kernels if isinstance(r := compiled[k], CompiledKernel)]
        rows = [choice.row() for choice in group]
        pack = write_pack(folder / arch, arch, built, rows, tools)
        _show_pack(report, pack, built, certified, say)


def _show_pack(
    report: Report,
    pack: Pack,
    built: Sequence[CompiledKernel],
    certified: Mapping[str, str],
    say: Say,
) -> None:
    kernels, rows = [], []
    for item in sorted(built, key=lambda item: item.kernel.name):
        name = item.kernel.name
        wanted = certified.get(name)
        kernels.append(
            {
                "kernel": name,
                "registers": item.registers,
                "spill_bytes": item.spill_bytes,
                "shared": item.shared,
                "size": len(item.cubin),
                "sha256": item.sha256,
                "certified": None if wanted is None else wanted == item.sha256,
            }
        )
        verdict = "-" if wanted is None else "yes" if wanted == item.sha256 else "NO"
        facts = (item.registers, item.spill_bytes, item.shared, len(item.cubin))
        rows.append((name, *facts, verdict))
    report.packs.append({"path": str(pack.path), "arch": pack.arch, "kernels": kernels})
    headers = ("kernel", "registers", "spills B", "shared B", "size B", "certified")
    title = f"pack {pack.path}: {pack.arch}, triton {pack.toolchain['triton']}"
    say(f"{title}, ptxas {pack.toolchain['ptxas']}\n{format_table(headers, rows)}\n")


def _cross_build(report: Report, folder: Path, jobs: int | None, say: Say, progress: Say) -> None:
    try:
        from glac.build import planned_kernels

        choices = [_choose(p, GPUS[name]) for name in CROSS_GPUS for p in CROSS_BUILT]
        count = len({kernel for choice in choices for kernel in choice.kernels()})
        total = len(planned_kernels(DEFAULT_BUILD))
        say(
            f"compiling {count} kernels, those of {len(CROSS_BUILT)} problems; "
            f"`glac build` makes all {total}"
        )
        _write_packs(report, choices, folder, jobs, say, progress)
    except (GlacError, ModuleNotFoundError, OSError) as error:
        report.missing.append(f"building packs: {_reason(error)}")
        say(f"no pack was built: {_reason(error)}\n")


def _foresee(report: Report, folder: Path, say: Say) -> None:
    """What dispatch would choose on an H100 that has the packs in ``folder``."""
    settings = load_settings()
    settings = replace(settings, pack_path=(folder, *settings.pack_path))
    dispatch.clear()
    rows = []
    for problem in (*CROSS_BUILT, ODD):
        try:
            decision = dispatch.decide(problem, GPUS["h100"], settings=settings)
        except (GlacError, ModuleNotFoundError) as error:
            rows.append((str(problem), "error", "-", _reason(error).splitlines()[0]))
            continue
        report.decisions.append(
            {
                "problem": str(problem),
                "provider": decision.provider,
                "config_id": decision.config_id,
                "kernels": dict(decision.kernels),
                "reason": decision.reason,
            }
        )
        rows.append((str(problem), decision.provider, decision.config_id, decision.reason))
    say("on an H100 with these packs")
    say(format_table(("problem", "served by", "config", "because"), rows) + "\n")


# ---- tuning, with a GPU ----


def _build_here(
    report: Report,
    gpu: GpuSpec,
    folder: Path,
    jobs: int | None,
    tune: bool,
    say: Say,
    progress: Say,
) -> None:
    """Tune one problem, and build the pack of all problems that run afterwards."""
    # A GPU that is not listed runs the rows of a listed one with the same code.
    listed = gpu if gpu.name in GPUS else GPUS["h100" if gpu.arch == "sm_90a" else "a100"]
    try:
        choices = {problem: _choose(problem, listed) for problem in (TUNED, LOWRANK, ODD)}
        if tune:
            tuned = _tune(report, listed, folder / "study", jobs, say, progress)
            if tuned is not None:
                choices[TUNED] = tuned
        _write_packs(report, list(choices.values()), folder, jobs, say, progress)
    except (GlacError, ModuleNotFoundError, OSError) as error:
        report.missing.append(f"building a pack: {_reason(error)}")
        say(f"no pack was built: {_reason(error)}\n")


def _tune(
    report: Report, gpu: GpuSpec, folder: Path, jobs: int | None, say: Say, progress: Say
) -> _Choice | None:
    """A quick study of one problem; ``None``, and a line in the report, where it cannot run.

    Results stay in ``folder``: a second quickstart goes on where the first one ended.
    """
    try:
        from glac.tuning import run
        from glac.tuning.progress import Progress
        from glac.tuning.space import space
        from glac.tuning.study import import_optuna

        import_optuna()  # before minutes of compiling
        spaces = [space(TUNED, gpu, "quick")]
        progress(f"tuning {TUNED}: {len(spaces[0].configs)} candidates")
        lines = Progress(quiet=terminal.verbosity < 0)
        candidates = run.compile_with_progress(spaces, gpu, folder / "candidates", jobs, lines)
        tuned = run.tune(
            candidates,
            spaces,
            gpu,
            folder / f"{gpu.name}.yaml",
            effort="quick",
            device=torch.cuda.current_device(),
            progress=lines,
        )
    except (GlacError, ModuleNotFoundError, OSError) as error:
        report.missing.append(f"tuning: {_reason(error)}; shipped configs are used")
        return None
    study = tuned.report
    if study.interrupted:
        raise KeyboardInterrupt
    result = study.results[0] if study.results else None
    if result is None or result.choice is None:
        why = result.error if result and result.error else "no candidate worked"
        report.missing.append(f"tuning: {why}; shipped configs are used")
        return None
    choice = result.choice
    report.tuned = {
        "problem": str(TUNED),
        "config_id": choice.config.slug,
        "us": choice.us,
        "default_us": choice.default_us or None,
        "tried": len(result.outcomes),
        "counts": result.counts,
    }
    untuned = f"untuned {choice.default_us:.1f} us" if choice.default_us else "untuned fails"
    refused = len(result.outcomes) - result.counts.get("ok", 0)
    say(f"tuned {TUNED}: {choice.us:.1f} us with {choice.config.slug}, {untuned}")
    say(f"{len(result.outcomes)} candidates tried, {refused} of them refused\n")
    compiled = candidates.read_pack()
    kernels = config_kernels(TUNED.spec, choice.config, gpu.arch)
    hashes = {kernel.name: compiled.kernels[kernel.name].sha256 for kernel in kernels}
    return _Choice(gpu.name, "tuned", study.device.name, TUNED, choice.config, hashes)


# ---- running ----


def _run_on_gpu(report: Report, say: Say, progress: Say) -> None:
    """Time and check the operations with the benchmark's own methods."""
    from glac import bench

    harness = bench.cuda_harness(budget_ms=100.0)
    device = torch.cuda.current_device()
    for problem in (TUNED, LOWRANK, ODD, SINGLE):
        progress(f"running {problem} ...")
        work = bench.Work(problem, harness.device)
        row = bench.measure("glac", work, harness)
        yardstick = bench.measure_yardstick(work, harness).error
        try:
            decision = dispatch.explain(problem, device)
            served = f"{decision.provider} {decision.config_id}"
        except GlacError as error:
            served = f"nothing: {error.message.splitlines()[0]}"
        budget = None if yardstick is None else BUDGET * yardstick
        report.runs.append(
            Run(str(problem), row.us, row.floor_us, row.error, budget, served, row.note)
        )
        del work
        torch.cuda.empty_cache()
    _show_runs(report, say)


def _run_on_cpu(report: Report, say: Say, progress: Say) -> None:
    for problem in ON_CPU:
        progress(f"running {problem} ...")
        try:
            report.runs.append(_check_on_cpu(problem))
        except GlacError as error:
            served, note = "nothing", _reason(error)
            report.runs.append(Run(str(problem), None, None, None, None, served, note))
    _show_runs(report, say)


def _check_on_cpu(problem: Problem) -> Run:
    """Run the public operation on CPU tensors, beside the recurrence in fp64."""
    from glac import attention, reference
    from glac.testing import problem_inputs

    spec = problem.spec
    lowrank = spec.gate is Gate.LOWRANK
    x = problem_inputs(problem)
    with torch.no_grad():
        if lowrank:
            assert x.x is not None
            assert x.weight is not None
            assert x.bias is not None
            o, _ = attention.chunk_gla_lowrank(x.q, x.k, x.v, x.x, x.weight, x.bias)
            exact = (x.x.double(), x.weight.double(), x.bias.double())
            truth_gate = reference.lowrank_gate(*exact, num_heads=problem.H)
            gate = reference.lowrank_gate(x.x, x.weight, x.bias, num_heads=problem.H)
        else:
            assert x.g is not None
            o, _ = attention.chunk_gla(x.q, x.k, x.v, x.g)
            truth_gate, gate = x.g.double(), x.g
        truth, _ = reference.recurrent_gla(x.q.double(), x.k.double(), x.v.double(), truth_gate)
        yardstick, _ = reference.yardstick_chunk_gla(x.q, x.k, x.v, gate)
    error = reference.relative_rms(o, truth)
    budget = BUDGET * reference.relative_rms(yardstick, truth)
    return Run(str(problem), None, None, error, budget, "torch torch-chunk (tensors on the CPU)")


def _show_runs(report: Report, say: Say) -> None:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    timed = any(run.us is not None for run in report.runs)
    headers = ["problem", *(("time us", "floor us") if timed else ())]
    headers += ["error", "budget", "ok", "served by"]
    rows = []
    for run in report.runs:
        times = (number(run.us, ".1f"), number(run.floor_us, ".1f")) if timed else ()
        errors = (number(run.error, ".2e"), number(run.budget, ".2e"))
        served = f"{run.served_by} ({run.note})" if run.note else run.served_by
        rows.append((run.problem, *times, *errors, "yes" if run.passed else "NO", served))
    say("results against fp64; the budget is twice the error of PyTorch in kernel precision")
    say(format_table(headers, rows) + "\n")
