"""``glac tune``: candidates from the CPU, times from the GPU, winners into the YAML."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from glac import cli
from glac.errors import GlacError, StudyError
from glac.gpus import GPUS, GpuSpec, gpu_by_name
from glac.problem import LOWRANK_RANKS, DType, Gate, Op, Precision, Problem
from glac.settings import load_settings
from glac.tuned import TunedFile, available
from glac.tuning.board import LEASE_SECONDS
from glac.tuning.candidates import (
    Candidates,
    check_usable,
    estimate_seconds,
    kernels_of,
    load_candidates,
)
from glac.tuning.export import check_target
from glac.tuning.progress import Progress, duration
from glac.tuning.propose import SAMPLERS
from glac.tuning.replay import Table, load_table
from glac.tuning.space import (
    EFFORTS,
    QUICK_CANDIDATES,
    SUITES,
    Space,
    make_problem,
    space,
)
from glac.tuning.storage import shown
from glac.tuning.study import DEFAULT_SAMPLER
from glac.tuning.warm import Winner, incumbent_row, warmed, winners

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
    precision: str | None = None,
) -> list[Problem] | None:
    """What the options ask for; ``None`` if they ask for nothing in particular."""
    if shapes and suite:
        raise click.UsageError("--suite and --shape exclude each other")
    given = {"--gate": gate, "--rank": rank, "--dtype": dtype, "--gate-dtype": gate_dtype}
    given["--precision"] = precision
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
    products = Precision(precision or "ieee")
    return [make_problem(shape, kind, ranks, element, wide, products) for shape in shapes]


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
@click.option("--suite", type=cli.SUITE_CHOICE, help="Set of problems [standard].")
@click.option("--shape", "shapes", type=cli.ShapeType(), multiple=True, help="Repeatable.")
@click.option("--gate", type=cli.GATE_CHOICE, help="Of --shape [vector].")
@click.option("--rank", type=click.Choice([str(r) for r in LOWRANK_RANKS]), help="[16]")
@click.option("--dtype", type=cli.DTYPE_CHOICE, help="Of --shape [bf16].")
@click.option("--gate-dtype", type=click.Choice(["same", "fp32"]), help="Of --shape [same].")
@click.option("--precision", type=cli.PRECISION_CHOICE, help="Of --shape in fp32 [ieee].")
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
@click.option("--storage", help="Journal file or URL of the study [a file beside --out].")
@click.option("--gpus", help="Time on several GPUs here: all, or numbers such as 0,1.")
@click.option(
    "--sampler",
    type=click.Choice(SAMPLERS),
    default=DEFAULT_SAMPLER,
    show_default=True,
    help="For spaces that are not tried whole.",
)
@click.option(
    "--replay",
    "replay_table",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Take outcomes from a table; no GPU.",
)
@click.option(
    "--replay-sleep", type=click.FloatRange(min=0.0), help="Seconds each candidate takes then."
)
@click.option(
    "--replay-log",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File that gets a line for each candidate tried then.",
)
@click.option("--workers", type=click.IntRange(1, 64), help="Processes of a replay [1].")
@click.option(
    "--lease",
    type=click.FloatRange(min=1.0),
    default=LEASE_SECONDS,
    show_default=True,
    help="Seconds until a worker of another machine that is silent counts as dead.",
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
    precision: str | None,
    op_name: str,
    effort: str | None,
    trials: int | None,
    timeout: float,
    compile_dir: Path | None,
    from_dir: Path | None,
    out: Path | None,
    storage: str | None,
    gpus: str | None,
    sampler: str,
    replay_table: Path | None,
    replay_sleep: float | None,
    replay_log: Path | None,
    workers: int | None,
    lease: float,
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
      glac tune --gpus all --storage URL            on each of many machines
    """
    if compile_dir and from_dir:
        raise click.UsageError("--compile-only and --from exclude each other")
    alone = {"--replay-sleep": replay_sleep, "--replay-log": replay_log, "--workers": workers}
    for name, value in alone.items():
        if value is not None and replay_table is None:
            raise click.UsageError(f"{name} goes with --replay")
    if replay_table is not None and (compile_dir or from_dir or gpus):
        raise click.UsageError("--replay measures nothing: no --compile-only, --from or --gpus")
    ranks = int(rank) if rank else None
    problems = _problems(suite, shapes, gate, ranks, dtype, gate_dtype, precision)
    ops = tuple(Op) if op_name == "both" else (Op(op_name),)
    level = effort or ("quick" if suite == "quick" else "standard")
    progress = Progress(quiet=no_progress or cli.terminal.verbosity < 0)
    from glac.tuning import run

    table = load_table(replay_table) if replay_table else None
    gpu = gpu_by_name(gpu_name) if gpu_name else None
    if gpu is None and replay_table is not None:
        gpu = _gpu_of(replay_table)
    loaded = load_candidates(from_dir) if from_dir else None
    if gpu is None and loaded is not None and (dry_run or loaded.gpu in GPUS):
        gpu = gpu_by_name(loaded.gpu)
    if gpu is None:
        gpu = run.detected_gpu()
        # Rows belong to listed GPUs; another one of the same arch tunes for its nearest relative.
        if gpu.name not in GPUS:
            gpu = next(g for g in GPUS.values() if g.arch == gpu.arch)
    target = out or load_settings().cache_dir / "tuned" / f"{gpu.name}.yaml"
    where = storage or str(run.default_storage(target))
    if table is not None:
        spaces = _replayed(table, gpu, problems, ops, level)
        if dry_run:
            _dry_run(spaces, gpu, jobs)
            return
        with _terminated_is_interrupted():
            tuned = run.replay(
                table,
                spaces,
                gpu,
                out,
                where,
                effort=level,
                trials=trials,
                timeout=timeout,
                seed=seed,
                workers=workers or 1,
                sleep=replay_sleep or 0.0,
                log=str(replay_log.resolve()) if replay_log else "",
                jobs=jobs,
                progress=progress,
                sampler=sampler,
                lease=lease,
            )
        _finish(tuned, gpu, where)
        return
    if loaded is not None:
        check_usable(loaded, gpu)
        chosen = run.choose_spaces(loaded, problems, gpu, level, ops)
        spaces = [_defended(item, gpu, target) for item in chosen]
    else:
        wanted = problems or SUITES["standard"]
        spaces = [
            _started(problem, op, gpu, level, target)
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
    check_target(target, gpu)
    devices = run.visible_devices(gpus) if gpus else [0]
    run.check_measurable(gpu, devices[0])
    if loaded is None:
        folder = target.with_name(f"{target.stem}-candidates")
        loaded = run.compile_with_progress(spaces, gpu, folder, jobs, progress)
    with _terminated_is_interrupted():
        tuned = run.tune(
            loaded,
            spaces,
            gpu,
            target,
            where,
            effort=level,
            trials=trials,
            timeout=timeout,
            seed=seed,
            devices=devices,
            progress=progress,
            sampler=sampler,
            lease=lease,
        )
    _finish(tuned, gpu, where)


def _gpu_of(table: Path) -> GpuSpec:
    """The GPU that a table is named after."""
    for name in sorted(GPUS, key=len, reverse=True):
        if table.name.lower().startswith(name):
            return GPUS[name]
    raise click.UsageError(f"--gpu is needed: {table.name} does not begin with the name of one")


def _serving(gpu: GpuSpec, target: Path) -> list[TunedFile]:
    """Files whose rows serve ``gpu`` now, the file to be updated first."""
    file = check_target(target, gpu)
    return [*([file] if file is not None else []), *available(gpu.name)]


def _known(gpu: GpuSpec, target: Path) -> tuple[list[TunedFile], list[Winner]]:
    """Files whose rows serve ``gpu`` now, and the winners of all GPUs."""
    own = _serving(gpu, target)
    others = [file for name in GPUS if name != gpu.name for file in available(name)]
    return own, winners([*own, *others])


def _defended(compiled: Space, gpu: GpuSpec, target: Path) -> Space:
    """A compiled space with what serves its problem now as the incumbent, if it was compiled."""
    row = incumbent_row(compiled.problem, compiled.op, _serving(gpu, target), gpu)
    config = row.config if row and row.config in compiled.configs else None
    return replace(compiled, incumbent=config)


def _started(problem: Problem, op: Op, gpu: GpuSpec, level: str, target: Path) -> Space:
    """The space of a problem with its warm starts in front."""
    own, known = _known(gpu, target)
    row = incumbent_row(problem, op, own, gpu)
    whole = space(problem, gpu, level, op)
    started = warmed(whole, gpu, known, row.config if row else None)
    if level != "quick":
        return started
    few = started.configs[:QUICK_CANDIDATES]
    return replace(started, configs=few, warm=min(started.warm, len(few)))


def _replayed(
    table: Table, gpu: GpuSpec, problems: Sequence[Problem] | None, ops: Sequence[Op], level: str
) -> list[Space]:
    """The spaces of a table, each started from the winners of the table's other problems.

    Tuned files stay out of it: they may have been made from this very table.
    """
    spaces = [
        item
        for item in table.spaces(gpu)
        if item.op in ops and (problems is None or item.problem in problems)
    ]
    if not spaces:
        raise StudyError(
            f"{table.path}: has no rows for what was asked",
            hint="leave out --suite, --shape and --op to replay all that it has",
        )
    best = [
        Winner(problem, min(rows, key=lambda c: rows[c].us or math.inf))
        for (problem, _), rows in table.outcomes.items()
    ]
    warm = [
        warmed(item, gpu, [w for w in best if w.problem != item.problem], add=False)
        for item in spaces
    ]
    if level != "quick":
        return warm
    return [replace(item, configs=item.configs[:QUICK_CANDIDATES]) for item in warm]


def _finish(tuned: Any, gpu: GpuSpec, storage: str) -> None:
    report, written = tuned.report, tuned.export
    rows = [_result_data(result) for result in report.results]
    data = {
        "gpu": gpu.name,
        "measured_on": report.device.name,
        "out": str(written.path) if written else None,
        "storage": shown(storage),
        "wall_seconds": round(report.wall, 3),
        "held_seconds": round(report.held, 3),
        "denied": [entry.to_dict() for entry in written.denied] if written else [],
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
        if written.denied:
            lines.append(f"{len(written.denied)} families of configs are on its deny-list now")
        lines.append(f"next: glac build --gpu {gpu.name} --configs {written.path.parent}")
    if rows:
        share = f", {report.held / report.wall:.0%} of it on candidates" if report.held else ""
        lines.append(f"study: {duration(report.wall)}{share}; glac report {shown(storage)}")
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
            hint=f"the reasons are in {shown(storage)}, and in the output of --json",
        )
    if failure is None:
        cli.emit(data, "\n".join(lines))
        return
    cli.say("\n".join(lines))
    raise failure
