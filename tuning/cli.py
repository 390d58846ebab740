"""``glac tune``: candidates from the CPU, times from the GPU, winners into the YAML."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from glac import cli
from glac.errors import GlacError
from glac.gpus import GPUS, GpuSpec, gpu_by_name
from glac.problem import LOWRANK_RANKS, DType, Gate, Op, Problem
from glac.settings import load_settings
from glac.tuning.candidates import (
    Candidates,
    check_usable,
    estimate_seconds,
    kernels_of,
    load_candidates,
)
from glac.tuning.export import check_target
from glac.tuning.progress import Progress, duration
from glac.tuning.space import EFFORTS, SUITES, Space, make_problem, space

_GPU_SECONDS = {
    Op.FORWARD: 0.15,
    Op.BACKWARD: 0.3,
    Op.SCALAR_FORWARD: 0.15,
    Op.SCALAR_BACKWARD: 0.3,
    Op.DECODE: 0.15,
}
"""About what one candidate takes at standard effort: checks, repeats, timing."""


def _problems(
    suite: str | None,
    shapes: Sequence[tuple[int, ...]],
    gate: str | None,
    rank: int | None,
    dtype: str | None,
    gate_dtype: str | None,
) -> list[Problem] | None:
    """What the options ask for; ``None`` if they ask for nothing in particular."""
    if shapes and suite:
        raise click.UsageError("--suite and --shape exclude each other")
    given = {"--gate": gate, "--rank": rank, "--dtype": dtype, "--gate-dtype": gate_dtype}
    if not shapes:
        alone = [name for name, value in given.items() if value is not None]
        if alone:
            raise click.UsageError(f"{alone[0]} goes with --shape; suites have their own")
        return list(SUITES[suite]) if suite else None
    kind = Gate(gate or ("lowrank" if rank else "vector"))
    if kind is not Gate.LOWRANK and rank:
        raise click.UsageError("--rank goes with --gate lowrank")
    element = DType(dtype or "bf16")
    wide = DType.FP32 if gate_dtype == "fp32" else None
    ranks = rank or (16 if kind is Gate.LOWRANK else 0)
    return [make_problem(shape, kind, ranks, element, wide) for shape in shapes]


def _space_data(item: Space, arch: str) -> dict[str, Any]:
    return {
        "problem": str(item.problem),
        "op": item.op.value,
        "candidates": len(item.configs),
        "kernels": len(kernels_of([item], arch)),
        "default": item.default.slug,
    }


def _dry_run(spaces: Sequence[Space], gpu: GpuSpec, jobs: int | None) -> None:
    rows = [_space_data(item, gpu.arch) for item in spaces]
    kernels = len(kernels_of(spaces, gpu.arch))
    workers = jobs or os.cpu_count() or 1
    total = sum(len(item.configs) for item in spaces)
    seconds = estimate_seconds(kernels, workers)
    measuring = sum(_GPU_SECONDS[item.op] * len(item.configs) + 10 for item in spaces)
    columns = ["problem", "op", "candidates", "kernels", "default"]
    text = cli.format_table(columns, [[row[column] for column in columns] for row in rows])
    text += (
        f"\n{total} candidates, {kernels} kernels: about {duration(seconds)} of compiling on "
        f"{workers} cores, {duration(measuring)} on the GPU"
    )
    data = {
        "gpu": gpu.name,
        "problems": rows,
        "candidates": total,
        "kernels": kernels,
        "compile_seconds": round(seconds),
    }
    cli.emit(data, text)


def _compiled_data(candidates: Candidates) -> dict[str, Any]:
    pack = candidates.read_pack()
    return {
        "path": str(candidates.path),
        "gpu": candidates.gpu,
        "arch": candidates.arch,
        "problems": [_space_data(item, candidates.arch) for item in candidates.spaces],
        "kernels": len(pack.kernels),
        "failures": dict(candidates.failures),
        "toolchain": dict(candidates.toolchain),
    }


def _result_data(result: Any) -> dict[str, Any]:
    choice = result.choice
    outcome = result.outcomes.get(choice.config) if choice else None
    return {
        "problem": str(result.problem),
        "op": result.op.value,
        "config": choice.config.to_dict() if choice else None,
        "config_id": choice.config.slug if choice else None,
        "default_id": result.default.slug,
        "us": choice.us if choice else None,
        "default_us": (choice.default_us or None) if choice else None,
        "noise": choice.noise if choice else None,
        "compared": choice.compared if choice else False,
        "error": outcome.error if outcome else None,
        "yardstick_error": result.yardstick,
        "tried": len(result.outcomes),
        "planned": result.planned,
        "counts": result.counts,
        "failures": [
            {"config": c.slug, "status": o.status, "reason": o.reason}
            for c, o in result.outcomes.items()
            if not o.ok
        ],
        "study_error": result.error or None,
    }


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def _result_table(rows: Sequence[dict[str, Any]]) -> str:
    body = []
    for row in rows:
        us, default = row["us"], row["default_us"]
        faster = default / us if us and default else None
        failed = row["tried"] - row["counts"].get("ok", 0)
        body.append(
            (
                row["problem"],
                row["op"],
                _number(us, ".1f"),
                _number(default, ".1f"),
                _number(faster, ".2f"),
                _number(row["noise"], ".1%"),
                _number(row["error"], ".2e"),
                _number(row["yardstick_error"], ".2e"),
                f"{row['tried']}",
                f"{failed}",
                row["config_id"] or row["study_error"] or "no candidate works",
            )
        )
    headers = ["problem", "op", "us", "default", "faster", "noise", "error", "yardstick"]
    headers += ["tried", "failed", "config"]
    return cli.format_table(headers, body)


@contextlib.contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """Inside, SIGTERM means Ctrl-C: job systems send it, and what was measured must be kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@click.command("tune")
@click.option("--gpu", "gpu_name", type=cli.GPU_CHOICE, help="Whose configs [the GPU here].")
@click.option("--suite", type=click.Choice(sorted(SUITES)), help="Set of problems [standard].")
@click.option("--shape", "shapes", type=cli.ShapeType(), multiple=True, help="Repeatable.")
@click.option("--gate", type=cli.GATE_CHOICE, help="Of --shape [vector].")
@click.option("--rank", type=click.Choice([str(r) for r in LOWRANK_RANKS]), help="[16]")
@click.option("--dtype", type=cli.DTYPE_CHOICE, help="Of --shape [bf16].")
@click.option("--gate-dtype", type=click.Choice(["same", "fp32"]), help="Of --shape [same].")
@click.option(
    "--op",
    "op_name",
    type=click.Choice([*(op.value for op in Op), "both"]),
    default="both",
    show_default=True,
    help="What is tuned of each problem.",
)
@click.option("--effort", type=click.Choice(EFFORTS), help="[standard; quick with --suite quick]")
@click.option("--trials", type=click.IntRange(min=1), help="Candidates per problem [all].")
@click.option(
    "--timeout", type=click.FloatRange(min=1.0), default=60.0, show_default=True, help="Seconds."
)
@click.option("--compile-only", "compile_dir", type=cli.FOLDER, help="Compile into DIR; no GPU.")
@click.option("--from", "from_dir", type=cli.FOLDER, help="Measure what DIR holds; no compiler.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="YAML to write or update [in the cache].",
)
@click.option(
    "--storage",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Journal of the study [beside --out].",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Kernels compiled at a time [all CPUs].")
@click.option("--dry-run", is_flag=True, help="Say how much there is to do.")
@click.option("--no-progress", is_flag=True, help="No progress on stderr.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of inputs and sampler.")
@cli.common_options
def tune_command(
    gpu_name: str | None,
    suite: str | None,
    shapes: tuple[tuple[int, ...], ...],
    gate: str | None,
    rank: str | None,
    dtype: str | None,
    gate_dtype: str | None,
    op_name: str,
    effort: str | None,
    trials: int | None,
    timeout: float,
    compile_dir: Path | None,
    from_dir: Path | None,
    out: Path | None,
    storage: Path | None,
    jobs: int | None,
    dry_run: bool,
    no_progress: bool,
    seed: int,
) -> None:
    """Search the fastest right config of each problem and write it to a YAML file.

    Candidates are compiled on the CPU, checked against fp64 on the GPU, repeated bit for bit and
    timed, in a process that may crash without ending the study. The same command again goes on
    where the last one ended; Ctrl-C keeps the best.

    \b
      glac tune                                     here, in one go
      glac tune --gpu h100 --compile-only DIR       on any machine, then
      glac tune --gpu h100 --from DIR               on the machine with the GPU
    """
    if compile_dir and from_dir:
        raise click.UsageError("--compile-only and --from exclude each other")
    problems = _problems(suite, shapes, gate, int(rank) if rank else None, dtype, gate_dtype)
    ops = tuple(Op) if op_name == "both" else (Op(op_name),)
    level = effort or ("quick" if suite == "quick" else "standard")
    progress = Progress(quiet=no_progress or cli.terminal.verbosity < 0)
    from glac.tuning import run

    gpu = gpu_by_name(gpu_name) if gpu_name else None
    loaded = load_candidates(from_dir) if from_dir else None
    if gpu is None and loaded is not None and (dry_run or loaded.gpu in GPUS):
        gpu = gpu_by_name(loaded.gpu)
    if gpu is None:
        gpu = run.detected_gpu()
        # Rows belong to listed GPUs; another one of the same arch tunes for its nearest relative.
        if gpu.name not in GPUS:
            gpu = next(g for g in GPUS.values() if g.arch == gpu.arch)
    if loaded is not None:
        check_usable(loaded, gpu)
        spaces = run.choose_spaces(loaded, problems, gpu, level, ops)
    else:
        wanted = problems or SUITES["standard"]
        spaces = [
            space(problem, gpu, level, op)
            for problem in wanted
            for op in (problem.ops if op_name == "both" else ops)
            if op.serves(problem.spec.gate)
        ]
    if dry_run:
        _dry_run(spaces, gpu, jobs)
        return
    if compile_dir:
        candidates = run.compile_with_progress(spaces, gpu, compile_dir, jobs, progress)
        data = _compiled_data(candidates)
        text = (
            f"{candidates.path}: {data['kernels']} kernels for {candidates.arch}, "
            f"{len(candidates.failures)} did not compile\n"
            f"next, where the GPU is: glac tune --gpu {gpu.name} --from {candidates.path}"
        )
        cli.emit(data, text)
        return
    target = out or load_settings().cache_dir / "tuned" / f"{gpu.name}.yaml"
    check_target(target, gpu)
    run.check_measurable(gpu)
    if loaded is None:
        folder = target.with_name(f"{target.stem}-candidates")
        loaded = run.compile_with_progress(spaces, gpu, folder, jobs, progress)
    with _terminated_is_interrupted():
        tuned = run.tune(
            loaded,
            spaces,
            gpu,
            target,
            storage,
            effort=level,
            trials=trials,
            timeout=timeout,
            seed=seed,
            progress=progress,
        )
    _finish(tuned, gpu, storage or run.default_storage(target))


def _finish(tuned: Any, gpu: GpuSpec, storage: Path) -> None:
    report, written = tuned.report, tuned.export
    rows = [_result_data(result) for result in report.results]
    data = {
        "gpu": gpu.name,
        "measured_on": report.device.name,
        "out": str(written.path) if written else None,
        "storage": str(storage),
        "interrupted": report.interrupted,
        "results": rows,
        "kept_rows": written.kept if written else 0,
        "replaced_rows": written.replaced if written else 0,
        "warnings": list(written.warnings) if written else [],
    }
    lines = [_result_table(rows)] if rows else []
    if written:
        lines += [f"warning: {warning}" for warning in written.warnings]
        lines.append(f"{written.path}: {len(written.rows)} rows written, {written.kept} kept")
        lines.append(f"next: glac build --gpu {gpu.name} --configs {written.path.parent}")
    unfinished = [
        f"{row['problem']} {row['op']}"
        for row in rows
        if row["config"] is None or row["study_error"]
    ]
    failure: GlacError | None = None
    if report.interrupted:
        failure = cli.FailedError(
            "interrupted; what was measured is kept",
            data,
            hint="the same command goes on where this one ended",
        )
        failure.code, failure.exit_code = "interrupted", 130
    elif unfinished or not rows:
        failure = cli.FailedError(
            f"no result for {len(unfinished)} of {len(rows)} problems: {'; '.join(unfinished)}",
            data,
            hint=f"the reasons are in {storage}, and in the output of --json",
        )
    if failure is None:
        cli.emit(data, "\n".join(lines))
        return
    cli.say("\n".join(lines))
    raise failure
