"""``glac roofline``: floors, kernels and times of problems, or the needs of a whole model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from glac import cli
from glac.gpus import GPUS, GpuSpec
from glac.problem import DType, Gate, Problem
from glac.roofline import (
    PASSES,
    Roofline,
    chart,
    checkout_results,
    draw,
    gate_label,
    load_results,
    roofline,
)
from glac.suites import SUITES, make_problem

_OPS = {**{op: (op,) for op in PASSES if op != "training"}, "both": tuple(PASSES)}


def _problems(
    shapes: Sequence[tuple[int, ...]],
    suite: str | None,
    gate: str | None,
    rank: int | None,
    dtype: str | None,
    gate_dtype: str | None,
) -> list[Problem]:
    if suite:
        given = {"--rank": rank, "--dtype": dtype, "--gate-dtype": gate_dtype}
        named = [name for name, value in given.items() if value is not None]
        if shapes or named:
            other = "a shape" if shapes else named[0]
            raise click.UsageError(f"--suite and {other} exclude each other")
        wanted = [p for p in SUITES[suite] if gate in (None, p.spec.gate.value)]
        if not wanted:
            raise click.UsageError(f"suite {suite} has no problem with a {gate} gate")
        return wanted
    if not shapes:
        raise click.UsageError("give shapes B,T,H,K,V, --suite or --model")
    kind, element = Gate(gate or "vector"), DType(dtype or "bf16")
    if kind is not Gate.LOWRANK and rank is not None:
        raise click.UsageError("--rank goes with --gate lowrank")
    ranks = (16 if rank is None else rank) if kind is Gate.LOWRANK else 0
    wide = DType(gate_dtype) if gate_dtype else element
    return [make_problem(shape, kind, ranks, element, wide) for shape in shapes]


def _title(gpu: GpuSpec) -> str:
    return (
        f"{gpu.name} ({gpu.title}): copies at {gpu.copy_bandwidth / 1e12:.2f} TB/s, bf16 products "
        f"at {gpu.matrix_rate / 1e12:.0f} TFLOP/s, "
        f"ridge at {gpu.matrix_rate / gpu.copy_bandwidth:.0f} FLOP/B"
    )


def _names(row: Roofline) -> tuple[str, str, str]:
    p, spec = row.problem, row.problem.spec
    return f"{p.B},{p.T},{p.H},{spec.K},{spec.V}", gate_label(spec), row.op


def _floor_table(rows: Sequence[Roofline]) -> str:
    headers = ("B,T,H,K,V", "gate", "op", "MB", "GFLOP", "useful", "FLOP/B")
    body = [
        (
            *_names(row),
            f"{row.bytes / 1e6:.1f}",
            f"{row.flops / 1e9:.1f}",
            f"{row.useful_flops / 1e9:.1f}",
            f"{row.intensity:.0f}",
            f"{row.memory_us:.1f}",
            f"{row.compute_us:.1f}",
            f"{row.floor_us:.1f}",
        )
        for row in rows
    ]
    return cli.format_table((*headers, "memory us", "compute us", "floor us"), body)


def _time_table(rows: Sequence[Roofline]) -> str:
    headers = ("B,T,H,K,V", "gate", "op", "predicted us", "share")
    body = []
    for row in rows:
        time = row.best_measured
        body.append(
            (
                *_names(row),
                f"{row.predicted_us:.0f}",
                f"{row.predicted_share:.0%}",
                f"{time.us:.1f}" if time else "-",
                f"{time.share:.0%}" if time else "-",
                f"{time.device}, {time.source}" if time else "-",
                row.config_id,
            )
        )
    return cli.format_table((*headers, "measured us", "share", "measured on", "config"), body)


def _kernel_table(rows: Sequence[Roofline]) -> str:
    headers = ("op", "kernel", "launches", "programs", "chunks", "GFLOP", "MB", "predicted us")
    body = [
        (
            row.op,
            kernel.template,
            kernel.launches,
            kernel.programs,
            kernel.steps or "-",
            f"{kernel.flops / 1e9:.1f}" if kernel.flops else "-",
            f"{kernel.bytes / 1e6:.1f}" if kernel.bytes else "-",
            f"{kernel.us:.0f}",
        )
        for row in rows
        if len(PASSES[row.op]) == 1
        for kernel in row.kernels
    ]
    return cli.format_table(headers, body)


def _problem_text(rows: Sequence[Roofline], gpu: GpuSpec) -> str:
    texts = [_title(gpu), _floor_table(rows), _time_table(rows)]
    if len({row.problem for row in rows}) == 1:
        texts += [_kernel_table(rows)]
        served = dict.fromkeys(row.served_by for row in rows if len(PASSES[row.op]) == 1)
        texts.append("\n".join(f"served by  {line}" for line in served))
    return "\n\n".join(texts)


def _amount(value: float) -> str:
    """A number with a decimal prefix."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


def _model(text: str, gpu: GpuSpec, lengths: tuple[int, ...], out: Path | None) -> None:
    from glac import model_costs as costs

    model = costs.parse_model(text)
    found = costs.model_costs(model, gpu, lengths or costs.LENGTHS)
    if out:
        draw(costs.chart(found), out)
    counts = [(name, _amount(count)) for name, count in found.parameters.items() if count]
    counts.append(("total", _amount(found.parameter_count)))
    memory = [(name, f"{size / 1e9:.2f}") for name, size in found.memory.items()]
    memory.append(("total", f"{found.memory_bytes / 1e9:.2f}"))
    parts = [
        (
            part.name,
            f"{part.flops / 1e12:.2f}",
            f"{part.bytes / 1e9:.2f}",
            f"{part.compute_us / 1e3:.2f}",
            f"{part.memory_us / 1e3:.2f}",
            f"{part.us / 1e3:.2f}",
            part.bound_by,
        )
        for part in found.training
    ]
    parts.append(("total", "-", "-", "-", "-", f"{found.training_us / 1e3:.2f}", "-"))
    steps = [
        (
            step.mixer,
            step.length or "-",
            f"{step.kept_bytes / 1e6:.1f}",
            f"{step.bytes / 1e6 / step.sequences:.1f}",
            f"{step.us / 1e3:.2f}",
            f"{step.tokens_per_second:.0f}",
        )
        for step in found.decoding
    ]
    layer = found.layer
    texts = [
        _title(gpu),
        f"{model.layers} layers of width {model.hidden}, {model.heads} heads of {model.K} x "
        f"{model.V}, feed-forward {model.inner}, vocabulary {model.vocab}, gate of rank "
        f"{model.gate_rank}",
        cli.format_table(("parameters", "count"), counts),
        f"Training, {model.batch} sequences of {model.tokens} tokens a step"
        + (", layers run again" if model.checkpoint else ""),
        cli.format_table(("memory", "GB"), memory),
        cli.format_table(
            (
                "part of a step",
                "TFLOP",
                "GB",
                "compute ms",
                "memory ms",
                "at least ms",
                "bound by",
            ),
            parts,
        ),
        f"at most {found.tokens_per_second:.0f} tokens/s; glac's operation takes "
        f"{model.layers * layer.floor_us / 1e3:.1f} ms at least, "
        f"{model.layers * layer.predicted_us / 1e3:.1f} ms predicted with {layer.config_id}",
        f"Decoding, {model.sequences} sequences together; states of {found.state / 1e6:.1f} MB "
        f"each, as much as the softmax cache of {found.equal_length:.0f} tokens",
        cli.format_table(
            ("mixer", "tokens before", "kept MB", "MB a token", "at least ms", "tokens/s"), steps
        ),
    ]
    cli.emit(found.to_dict(), "\n\n".join(texts))


@click.command("roofline")
@click.argument("shapes", type=cli.ShapeType(), nargs=-1, metavar="[B,T,H,K,V]...")
@click.option("--suite", type=cli.SUITE_CHOICE, help="Set of problems instead of shapes.")
@click.option(
    "--model", help="A whole model instead: gla-340m, gla-1.3b, a file, or key=value,..."
)
@click.option(
    "--op", type=click.Choice(list(_OPS)), default="both", show_default=True, help="Which passes."
)
@click.option("--gate", type=cli.GATE_CHOICE, help="[vector; of a suite: all]")
@click.option("--rank", type=int, help="Of a low-rank gate [16].")
@click.option("--dtype", type=cli.DTYPE_CHOICE, help="[bf16]")
@click.option("--gate-dtype", type=cli.DTYPE_CHOICE, help="Of the gate or its bias [as --dtype].")
@click.option(
    "--gpu", "gpu_name", type=cli.GPU_CHOICE, default="h100", show_default=True, help="Where."
)
@click.option(
    "--results",
    type=click.Path(dir_okay=False, path_type=Path),
    multiple=True,
    help="Results of `glac bench`, repeatable [those of the checkout].",
)
@click.option(
    "--length",
    "lengths",
    type=click.IntRange(min=1),
    multiple=True,
    help="Of --model, repeatable.",
)
@click.option(
    "-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="Draw a chart as well."
)
@cli.common_options
def roofline_command(
    shapes: tuple[tuple[int, ...], ...],
    suite: str | None,
    model: str | None,
    op: str,
    gate: str | None,
    rank: int | None,
    dtype: str | None,
    gate_dtype: str | None,
    gpu_name: str,
    results: tuple[Path, ...],
    lengths: tuple[int, ...],
    out: Path | None,
) -> None:
    """Say what problems cost at least on a GPU, and how near their kernels are.

    \b
      glac roofline 16,2048,8,128,128 --gpu h200
      glac roofline --suite grid --gate vector -o grid.png
      glac roofline --model gla-1.3b,tokens=8192,batch=4
    """
    gpu = GPUS[gpu_name.lower()]
    if model is not None:
        own: dict[str, object] = {"a shape": shapes, "--suite": suite, "--gate": gate}
        own.update({"--rank": rank, "--dtype": dtype, "--gate-dtype": gate_dtype})
        own["--results"] = results
        named = [name for name, value in own.items() if value]
        if named:
            raise click.UsageError(f"--model and {named[0]} exclude each other")
        _model(model, gpu, lengths, out)
        return
    if lengths:
        raise click.UsageError("--length goes with --model")
    problems = _problems(shapes, suite, gate, rank, dtype, gate_dtype)
    known = load_results(results) if results else checkout_results()
    rows = [
        roofline(problem, gpu, name, results=known) for problem in problems for name in _OPS[op]
    ]
    if out:
        # Of both passes together there is no kernel of its own to draw.
        draw(chart([row for row in rows if len(PASSES[row.op]) == 1]), out)
    data = {
        "gpu": gpu.name,
        "copy_bandwidth": gpu.copy_bandwidth,
        "matrix_rate": gpu.matrix_rate,
        "rows": [row.to_dict() for row in rows],
    }
    cli.emit(data, _problem_text(rows, gpu))
