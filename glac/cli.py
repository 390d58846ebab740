"""The ``glac`` command.

Results go to stdout; progress, warnings and errors go to stderr. With ``--json`` stdout holds one
object, ``{"schema": 1, "ok": true, "data": ...}`` or ``{"schema": 1, "ok": false, "error":
{"code", "message", "hint"}}``. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 something outside
glac is missing, 130 interrupted.

Help and completion must answer at once and where nothing else is installed. So this module imports
click and the light tables of glac; commands import what they need when they run.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from glac import __version__
from glac.errors import ConfigError, GlacError, MissingEnvironmentError, PackError
from glac.gpus import ARCHS, GPUS, GpuSpec
from glac.suites import SUITES

if TYPE_CHECKING:
    from glac.dispatch import Decision, FoundPack
    from glac.pack import Pack
    from glac.problem import Problem
    from glac.tuned import TunedDiff, TunedFile, TunedRow

JSON_SCHEMA = 1
DEFAULT_BUILD = ("a100", "h100", "h200")
PROGRAM = "glac"

Command = TypeVar("Command", bound=Callable[..., Any])

# name: (module, attribute, one line for `glac --help`)
LAZY_COMMANDS: dict[str, tuple[str, str, str]] = {
    "roofline": (
        "glac.roofline_cli",
        "roofline_command",
        "Say what problems and models cost at least on a GPU.",
    ),
    "tune": ("glac.tuning.cli", "tune_command", "Search the fastest right config on a GPU."),
    "tune-proxy": ("glac.tuning.proxy", "proxy_command", "Serve a study to other machines."),
    "report": ("glac.tuning.report", "report_command", "Write a study's report as one web page."),
}

# What brings a module that may be absent.
_EXTRAS = {
    "torch": "pip install torch",
    "numpy": "pip install numpy",
    "yaml": "pip install pyyaml",
    "triton": "pip install 'glac[build]'",
    "optuna": "pip install 'glac[tune]'",
    "scipy": "pip install 'glac[tune]'",
    "rich": "pip install 'glac[tune]'",
    "matplotlib": "pip install 'glac[bench]'",
}


class FailedError(GlacError):
    """The command ran, and what it looked at is not in order; ``data`` is its full result."""

    code = "failed"

    def __init__(self, message: str, data: object, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.data = data


# ---- output ----


@dataclass
class _Terminal:
    """How this invocation talks; one command runs per process, so there is one of it."""

    json: bool = False
    verbosity: int = 0


terminal = _Terminal()


def _jsonable(value: Any) -> Any:
    """``value`` as JSON can hold it: no NaN or infinity, paths as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _print_object(content: Mapping[str, Any]) -> None:
    import json

    document = _jsonable({"schema": JSON_SCHEMA, **content})
    click.echo(json.dumps(document, indent=1, allow_nan=False))


def emit(data: object, text: str) -> None:
    """Print a command's result: ``text``, or with ``--json`` the object that holds ``data``."""
    if terminal.json:
        _print_object({"ok": True, "data": data})
    elif text:
        click.echo(text)


def say(text: str) -> None:
    """Print a part of the result as soon as it is known; nothing with ``--json``."""
    if not terminal.json:
        click.echo(text)


def progress(text: str) -> None:
    """Print what is going on, to stderr; nothing with ``-q``."""
    if terminal.verbosity >= 0:
        click.echo(text, err=True)


def format_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns under a header; columns of numbers are flush right."""
    body = [[str(cell) for cell in row] for row in rows]
    lines = [list(headers), *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    right = [bool(body) and all(_numeric(line[i]) for line in body) for i in range(len(headers))]
    texts = [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    ]
    texts.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(texts)


def _numeric(cell: str) -> bool:
    return cell == "-" or (cell[:1].isdigit() and all(c in "0123456789.,e+-x%" for c in cell))


# ---- errors and exit codes ----


def _report(error: GlacError) -> int:
    if terminal.json:
        content: dict[str, Any] = {
            "ok": False,
            "error": {"code": error.code, "message": error.message, "hint": error.hint},
        }
        if isinstance(error, FailedError):
            content["data"] = error.data
        _print_object(content)
    else:
        click.echo(f"error: {error.message}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
    return error.exit_code


def _missing_module(error: ModuleNotFoundError) -> GlacError | None:
    """A missing package as an error with a remedy; ``None`` if the module is one of glac's own."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "glac"):
        return None
    return MissingEnvironmentError(
        f"this command needs the Python package {package}, which is not installed",
        hint=_EXTRAS.get(package, f"pip install {package}"),
    )


def _usage_error(error: click.ClickException) -> int:
    context = getattr(error, "ctx", None)
    if terminal.json:
        hint = f"{context.command_path} --help" if context is not None else f"{PROGRAM} --help"
        code = "usage" if error.exit_code == 2 else "error"
        content = {"code": code, "message": error.format_message(), "hint": hint}
        _print_object({"ok": False, "error": content})
    else:
        error.show(sys.stderr)
    return error.exit_code


def _unexpected(error: Exception) -> int:
    name = type(error).__name__
    internal = GlacError(
        f"unexpected {name}: {str(error).strip() or 'no message'}",
        hint="run it again with -vv to see where, and report it with the output of `glac doctor`",
    )
    internal.code = "unexpected"
    return _report(internal)


class GlacGroup(click.Group):
    """A group that loads some commands on demand and turns errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *LAZY_COMMANDS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        known = super().get_command(ctx, cmd_name)
        if known is not None or cmd_name not in LAZY_COMMANDS:
            return known
        module, attribute, _ = LAZY_COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List commands without loading those that are loaded on demand."""
        rows = []
        for name in self.list_commands(ctx):
            if name in LAZY_COMMANDS:
                rows.append((name, LAZY_COMMANDS[name][2]))
            else:
                command = super().get_command(ctx, name)
                assert command is not None
                rows.append((name, command.get_short_help_str(limit=70)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        name = prog_name or PROGRAM
        if not standalone_mode:
            return super().main(words, name, complete_var, standalone_mode=False, **extra)
        # Before parsing, so that a usage error is an object too.
        terminal.json = "--json" in words
        terminal.verbosity = 0
        sys.exit(self._exit_code(words, name, complete_var, extra))

    def _exit_code(
        self, words: list[str], name: str, complete_var: str | None, extra: dict[str, Any]
    ) -> int:
        try:
            code = super().main(words, name, complete_var, standalone_mode=False, **extra)
            return code if isinstance(code, int) else 0
        except (click.Abort, KeyboardInterrupt):
            stopped = GlacError("interrupted")
            stopped.code, stopped.exit_code = "interrupted", 130
            return _report(stopped)
        except click.ClickException as error:
            return _usage_error(error)
        except Exception as error:
            if isinstance(error, GlacError):
                known: GlacError | None = error
            elif isinstance(error, ModuleNotFoundError):
                known = _missing_module(error)
            else:
                known = None
            if terminal.verbosity >= 2 and not terminal.json:
                import traceback

                traceback.print_exc()
            return _report(known) if known else _unexpected(error)


# ---- options that every command has ----


def _set_json(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    terminal.json = terminal.json or value


def _set_verbosity(ctx: click.Context, param: click.Parameter, value: int) -> None:
    if not value:
        return
    import logging

    terminal.verbosity = value if param.name == "verbose" else -value
    levels = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO, 2: logging.DEBUG}
    log = logging.getLogger("glac")
    log.setLevel(levels[max(-1, min(2, terminal.verbosity))])
    for old in [handler for handler in log.handlers if handler.get_name() == PROGRAM]:
        log.removeHandler(old)
    handler = logging.StreamHandler(sys.stderr)
    handler.set_name(PROGRAM)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)


def _verbosity_options(command: Command) -> Command:
    quiet = click.option(
        "-q",
        "--quiet",
        count=True,
        expose_value=False,
        callback=_set_verbosity,
        help="No progress, only errors.",
    )
    verbose = click.option(
        "-v",
        "--verbose",
        count=True,
        expose_value=False,
        callback=_set_verbosity,
        help="Say what is decided and why; -vv adds tracebacks.",
    )
    return verbose(quiet(command))


def common_options(command: Command) -> Command:
    as_json = click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_set_json,
        help="Print one JSON object on stdout.",
    )
    return _verbosity_options(as_json(command))


class ShapeType(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.1
    """``B,T,H,K,V``: five positive integers."""

    name = "B,T,H,K,V"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            sizes = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            sizes = ()
        if len(sizes) != 5 or min(sizes) < 1:
            self.fail(
                f"{value!r} is not five positive integers B,T,H,K,V, such as 16,2048,8,128,128",
                param,
                ctx,
            )
        return sizes


GPU_CHOICE = click.Choice(sorted(GPUS), case_sensitive=False)
DTYPE_CHOICE = click.Choice(["bf16", "fp16", "fp32"])
PRECISION_CHOICE = click.Choice(["ieee", "tf32"])
GATE_CHOICE = click.Choice(["vector", "lowrank", "scalar"])
OP_CHOICE = click.Choice(["forward", "backward", "decode"])
SUITE_CHOICE = click.Choice(sorted(SUITES))
FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group(PROGRAM, cls=GlacGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=PROGRAM)
@_verbosity_options
def cli() -> None:
    """Gated linear attention on precompiled, autotuned GPU kernels.

    Start with `glac quickstart`; ask `glac doctor` when something is odd.
    """


# ---- quickstart ----


@cli.command()
@click.option("--out", type=FOLDER, help="Folder for the pack and the study [in the cache].")
@click.option("--jobs", type=click.IntRange(min=1), help="Kernels compiled at a time [all CPUs].")
@click.option("--no-tune", is_flag=True, help="On a GPU: skip the small study.")
@click.option("--cpu", is_flag=True, help="Do what a machine without a GPU does.")
@common_options
def quickstart(out: Path | None, jobs: int | None, no_tune: bool, cpu: bool) -> None:
    """Do the main job once, in minutes, and check it.

    With a GPU: tune a small grid, build a pack, run the operator from it, compare with fp64.
    Without: cross-build part of the packs, say what an H100 would run, compare PyTorch with fp64.
    """
    _need("torch")
    from glac.quickstart import run_quickstart

    report = run_quickstart(
        say, progress, out=out, jobs=jobs, tune=not no_tune, use_gpu=False if cpu else None
    )
    data = report.to_dict()
    if not report.useful:
        raise MissingEnvironmentError(
            "nothing could be run: " + "; ".join(report.missing), hint="glac doctor"
        )
    failed = [run.problem for run in report.runs if not run.passed]
    if failed:
        raise FailedError(
            f"{len(failed)} of {len(report.runs)} results are off: {'; '.join(failed)}",
            data,
            hint="glac doctor -v, then report its output with the table above",
        )
    emit(data, report.summary())


# ---- build ----


@cli.command()
@click.option(
    "--gpu",
    "gpus",
    type=GPU_CHOICE,
    multiple=True,
    help=f"GPU to build for, repeatable [{', '.join(DEFAULT_BUILD)}].",
)
@click.option("--out", type=FOLDER, help="Folder of the packs [in the cache].")
@click.option("--jobs", type=click.IntRange(min=1), help="Kernels compiled at a time [all CPUs].")
@click.option("--configs", type=FOLDER, help="Folder of tuned YAML files [those shipped].")
@click.option(
    "--dtype",
    "dtypes",
    type=DTYPE_CHOICE,
    multiple=True,
    help="Repeatable; one that was not tuned gets heuristic rows [what was tuned, else bf16].",
)
@click.option("--zip", "zipped", is_flag=True, help="Write OUT/ARCH.zip instead of a folder.")
@click.option(
    "--shipped", is_flag=True, help="Fill the installed package with zips for every listed GPU."
)
@click.option("--fresh", is_flag=True, help="Compile kernels that the packs already hold, too.")
@click.option(
    "--emit",
    "emit_language",
    type=click.Choice(["c"]),
    help="Also write OUT/glac_ARCH.h and .c: kernels and launches for C and C++.",
)
@common_options
def build(
    gpus: tuple[str, ...],
    out: Path | None,
    jobs: int | None,
    configs: Path | None,
    dtypes: tuple[str, ...],
    zipped: bool,
    shipped: bool,
    fresh: bool,
    emit_language: str | None,
) -> None:
    """Compile kernel packs from tuned configs; needs no GPU."""
    from glac.build import build_packs
    from glac.problem import DType
    from glac.settings import load_settings, shipped_pack_dir

    if shipped and (gpus or out or configs or dtypes):
        raise click.UsageError("--shipped has its own GPUs, folder, configs and dtypes")
    if zipped and not out:
        raise click.UsageError("--zip needs --out: the cache holds folders")
    folder = shipped_pack_dir() if shipped else out or load_settings().build_dir
    names = sorted(GPUS) if shipped else list(dict.fromkeys(gpus or DEFAULT_BUILD))
    if shipped:
        configs = Path(__file__).parent / "tuned_configs"  # not what was tuned on this machine

    def on_kernel(done: int, total: int, name: str) -> None:
        progress(f"[{done}/{total}] {name}")

    try:
        results = build_packs(
            names,
            folder,
            jobs=jobs,
            progress=on_kernel,
            configs_dir=configs,
            dtypes=[DType(name) for name in dict.fromkeys(dtypes)] or None,
            zipped=zipped or shipped,
            fresh=fresh,
        )
        sources = _emit_c([result.pack for result in results], folder) if emit_language else []
    except OSError as error:
        raise MissingEnvironmentError(
            f"cannot write {folder}: {error.strerror or error}", hint="choose a folder with --out"
        ) from None
    data, texts = [], []
    for result in results:
        for warning in result.warnings:
            progress(f"warning: {warning}")
        data.append({**_pack_data(result.pack), "warnings": list(result.warnings)})
        data[-1].update(seconds=round(result.seconds, 1), compiled=result.compiled)
        took = f"{result.compiled} kernels compiled, {result.seconds:.0f} s"
        texts.append(f"{_pack_title(result.pack)}, {took}\n")
        texts.append(_kernel_table(result.pack) + "\n")
    texts += [str(path) for path in sources]
    emit({"packs": data, "sources": sources}, "\n".join(texts).rstrip())


def _emit_c(packs: Sequence[Pack], folder: Path) -> list[Path]:
    """C sources beside the packs."""
    from glac.emit_c import left_out, write_c

    for item in packs:
        notes = [
            f"no C function for {row.op.value} of {row.spec.slug}: {why}"
            for row, why in left_out(item)
        ]
        for note in dict.fromkeys(notes):
            click.echo(f"warning: {note}", err=True)
    return [path for item in packs for path in write_c(item, folder)]


def _kernel_rows(pack: Pack) -> list[dict[str, Any]]:
    return [
        {
            "kernel": kernel.name,
            "registers": kernel.registers,
            "spill_bytes": kernel.spill_bytes,
            "shared": kernel.shared,
            "size": kernel.size,
            "sha256": kernel.sha256,
        }
        for kernel in sorted(pack.kernels.values(), key=lambda item: item.name)
    ]


def _kernel_table(pack: Pack) -> str:
    columns = ("kernel", "registers", "spill_bytes", "shared", "size")
    rows = [[row[column] for column in columns] for row in _kernel_rows(pack)]
    return format_table(("kernel", "registers", "spills B", "shared B", "size B"), rows)


def _pack_title(pack: Pack) -> str:
    return (
        f"{pack.path}: {pack.arch}, {len(pack.rows)} rows, {len(pack.kernels)} kernels, "
        f"triton {pack.toolchain['triton']}, ptxas {pack.toolchain['ptxas']}, "
        f"driver >= {pack.driver_floor}"
    )


def _pack_data(pack: Pack) -> dict[str, Any]:
    return {
        "path": str(pack.path),
        "arch": pack.arch,
        "glac": pack.glac,
        "driver_floor": pack.driver_floor,
        "toolchain": dict(pack.toolchain),
        "templates_sha256": {op.value: sha for op, sha in pack.templates_sha256.items()},
        "kernels": _kernel_rows(pack),
        "rows": [row.to_dict() for row in pack.rows],
    }


# ---- bench ----


@cli.command()
@click.option("--suite", type=SUITE_CHOICE, help="Set of problems [standard].")
@click.option("--shape", "shapes", type=ShapeType(), multiple=True, help="Repeatable.")
@click.option(
    "--gate", "gates", type=GATE_CHOICE, multiple=True, help="Repeatable; of a suite, which part."
)
@click.option(
    "--op",
    type=click.Choice(["forward", "training", "both", "decode"]),
    default="both",
    show_default=True,
    help="What to time; training is forward and backward, decode is one state update.",
)
@click.option(
    "--impl",
    "impls",
    type=click.Choice(["glac", "fla", "fa2", "cudnn", "glac-dense"]),
    multiple=True,
    help="Repeatable [all but glac-dense, which computes a low-rank gate first].",
)
@click.option("--dtype", type=DTYPE_CHOICE, help="[bf16]")
@click.option("--gate-dtype", type=DTYPE_CHOICE, help="Of a dense gate [as --dtype].")
@click.option("--rank", type=int, help="Of a low-rank gate [16].")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Results file [benchmarks/results/GPU.json, GPU_SUITE.json].",
)
@common_options
def bench(
    suite: str | None,
    shapes: tuple[tuple[int, int, int, int, int], ...],
    gates: tuple[str, ...],
    op: str,
    impls: tuple[str, ...],
    dtype: str | None,
    gate_dtype: str | None,
    rank: int | None,
    out: Path | None,
) -> None:
    """Time glac beside other implementations; needs a GPU."""
    own = {"--shape": shapes or None, "--dtype": dtype, "--gate-dtype": gate_dtype, "--rank": rank}
    named = [name for name, value in own.items() if value is not None]
    if suite and named:
        raise click.UsageError(f"--suite and {named[0]} exclude each other: suites have their own")
    _need("torch")
    from glac import bench as room

    document = room.run_bench(
        shapes or None,
        gates or None,
        impls or room.IMPLS,
        ops=room.OPS if op == "both" else (op,),
        out=out,
        suite=suite,
        dtype=dtype,
        gate_dtype=gate_dtype,
        rank=rank,
        table=False,
    )
    say(room.format_table(document["rows"]))
    ours = [row for row in document["rows"] if row["impl"] == "glac"]
    failed = [row for row in ours if row["us"] is None]
    if failed:
        raise FailedError(
            f"glac has no time in {len(failed)} of {len(ours)} rows: {failed[0]['note']}",
            document,
        )
    emit(document, "")


# ---- explain ----


@cli.command()
@click.argument("shape", type=ShapeType())
@click.option("--dtype", type=DTYPE_CHOICE, default="bf16", show_default=True)
@click.option("--op", type=OP_CHOICE, default="forward", show_default=True)
@click.option("--gate", type=GATE_CHOICE, default="vector", show_default=True)
@click.option("--rank", type=int, default=16, show_default=True, help="Of a low-rank gate.")
@click.option("--gate-dtype", type=DTYPE_CHOICE, help="Of the gate or its bias [as --dtype].")
@click.option("--precision", type=PRECISION_CHOICE, help="Of products of fp32 inputs [ieee].")
@click.option("--gpu", type=GPU_CHOICE, help="Decide for this GPU [the one in this machine].")
@common_options
def explain(
    shape: tuple[int, int, int, int, int],
    dtype: str,
    op: str,
    gate: str,
    rank: int,
    gate_dtype: str | None,
    precision: str | None,
    gpu: str | None,
) -> None:
    """Say which kernel serves a problem, and why."""
    _need("torch")
    from glac.dispatch import decide
    from glac.problem import DType, Gate, Op, Precision
    from glac.suites import make_problem

    if precision == Precision.TF32.value and op == Op.DECODE.value:
        raise click.UsageError("--precision goes with forward and backward: decoding has no TF32")
    kind, element, wide = Gate(gate), DType(dtype), DType(gate_dtype or dtype)
    ranks = rank if kind is Gate.LOWRANK else 0
    problem = make_problem(shape, kind, ranks, element, wide, Precision(precision or "ieee"))
    target = GPUS[gpu] if gpu else _device_spec()
    wanted = Op(op)
    if not wanted.serves(kind) and wanted in (Op.FORWARD, Op.BACKWARD):
        wanted = kind.passes[wanted is Op.BACKWARD]
    decision = decide(problem, target, wanted)
    emit(_decision_data(problem, target, decision), _decision_text(problem, target, decision))


def _device_spec() -> GpuSpec:
    import torch

    from glac.dispatch import device_gpu

    if not torch.cuda.is_available():
        raise MissingEnvironmentError(
            "PyTorch finds no CUDA GPU in this machine", hint="decide for one by name: --gpu h100"
        )
    spec, note = device_gpu(torch.cuda.current_device())
    if spec is None:
        raise MissingEnvironmentError(note, hint="decide for another by name: --gpu h100")
    return spec


def _decision_data(problem: Problem, gpu: GpuSpec, decision: Decision) -> dict[str, Any]:
    return {
        "problem": str(problem),
        "op": decision.op.value,
        "gpu": gpu.name,
        "bucket": problem.bucket.to_dict(),
        "floor_us": problem.bytes(decision.op) / gpu.copy_bandwidth * 1e6,
        "provider": decision.provider,
        "config": decision.config.to_dict() if decision.config else None,
        "config_id": decision.config_id,
        "kernels": dict(decision.kernels),
        "cubin_sha256": decision.cubin_sha,
        "pack": decision.path,
        "reason": decision.reason,
        "tried": list(decision.tried),
    }


def _decision_text(problem: Problem, gpu: GpuSpec, decision: Decision) -> str:
    bucket = problem.bucket
    moved = problem.bytes(decision.op)
    floor = moved / gpu.copy_bandwidth * 1e6
    lines = [
        f"problem    {problem}",
        f"op         {decision.op.value}",
        f"bucket     about 2^{bucket.bh} heads in flight, about 2^{bucket.t} tokens",
        f"gpu        {gpu.name} ({gpu.title}, {gpu.arch})",
        f"floor      {floor:.1f} us to move {moved / 1e6:.1f} MB once",
        f"served by  {decision.provider}: {decision.reason}",
        f"config     {decision.config_id}",
    ]
    lines += [f"kernel     {name}" for name in decision.kernels.values()]
    if decision.path:
        lines.append(f"pack       {decision.path}")
    lines += [f"not by     {line}" for line in decision.tried]
    return "\n".join(lines)


# ---- pack ----


@cli.group()
def pack() -> None:
    """Look into kernel packs, check and merge them."""


def _packs_at(path: Path) -> list[Pack]:
    """The pack at ``path``, or the packs of a folder that ``glac build`` wrote."""
    from glac.archive import MANIFEST
    from glac.pack import read_pack

    if path.is_dir() and not (path / MANIFEST).is_file():
        places = (path / name for arch in ARCHS for name in (arch, f"{arch}.zip"))
        inner = [place for place in places if place.is_file() or (place / MANIFEST).is_file()]
        if inner:
            return [read_pack(folder) for folder in inner]
    return [read_pack(path)]


@pack.command("show")
@click.argument("path", type=click.Path(path_type=Path))
@common_options
def pack_show(path: Path) -> None:
    """List the kernels of a pack and the problems it serves."""
    packs = _packs_at(path)
    texts = []
    for item in packs:
        rows = [
            (
                row.gpu,
                row.source,
                row.op.value,
                row.spec.slug,
                row.bucket.bh,
                row.bucket.t,
                row.config.slug,
            )
            for row in item.rows
        ]
        headers = ("gpu", "source", "op", "problem", "log2 BH", "log2 T", "config")
        texts += [_pack_title(item) + "\n", format_table(headers, rows) + "\n"]
        texts.append(_kernel_table(item) + "\n")
    emit({"packs": [_pack_data(item) for item in packs]}, "\n".join(texts).rstrip())


@pack.command("verify")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--device",
    is_flag=True,
    help="Check it against this machine's GPU too, and load every kernel.",
)
@common_options
def pack_verify(path: Path, device: bool) -> None:
    """Check every field and every byte of a pack."""
    from glac.archive import MANIFEST, members
    from glac.pack import cubin_member
    from glac.templates import templates_sha256

    data, lines = [], []
    for item in _packs_at(path):
        size = sum(len(item.read_cubin(name)) for name in item.kernels)
        fresh = item.templates_sha256 == templates_sha256(item.templates_sha256)
        listed = {MANIFEST, *(cubin_member(kernel.sha256) for kernel in item.kernels.values())}
        others = [name for name in members(item.path) if name not in listed]
        data.append({"path": str(item.path), "arch": item.arch, "kernels": len(item.kernels)})
        data[-1].update(rows=len(item.rows), bytes=size, current_templates=fresh, others=others)
        note = "" if fresh else "; built from other templates than those installed"
        if others:
            note += f"; {len(others)} files that it does not use, such as {others[0]}"
        if device:
            took = _load_all(item)
            data[-1]["load_ms"] = took
            note += f"; verified and loaded on this GPU in {took:.0f} ms"
        lines.append(f"ok: {_pack_title(item)}, {size} bytes of code{note}")
    emit({"packs": data}, "\n".join(lines))


def _load_all(pack: Pack) -> float:
    """Load every kernel of a pack on the current device; milliseconds with reading and checks."""
    _need("torch")
    _device_spec()
    import time

    import torch

    from glac.dispatch import device_facts
    from glac.fit import check_fit
    from glac.launch import load_from_pack
    from glac.pack import read_pack

    index = torch.cuda.current_device()
    torch.cuda.synchronize(index)
    start = time.perf_counter()
    again = read_pack(pack.path)
    check_fit(again, again.kernels, device_facts(index))
    for name in again.kernels:
        load_from_pack(again, name, index).load_now()
    return (time.perf_counter() - start) * 1e3


@pack.command("list")
@click.option("--arch", type=click.Choice(ARCHS), help="Only what a GPU of this arch looks at.")
@common_options
def pack_list(arch: str | None) -> None:
    """List every pack that problems are served from, in order."""
    _need("torch")
    from glac.dispatch import found_packs, pack_roots
    from glac.settings import load_settings

    settings = load_settings()
    found: dict[Path, FoundPack] = {}
    for name in [arch] if arch else ARCHS:
        for item in found_packs(settings, name):
            # A root that is a pack itself is met for every arch and used for one.
            if item.path not in found or not item.reason:
                found[item.path] = item
    data = [_found_data(item) for item in found.values()]
    body = [
        (
            row["arch"] or "-",
            ", ".join(f"{count} {op}" for op, count in row["rows"].items()) or "-",
            "-" if row["kernels"] is None else row["kernels"],
            "-" if row["bytes"] is None else row["bytes"],
            ", ".join(f"{tool} {version}" for tool, version in row["toolchain"].items()) or "-",
            row["path"],
        )
        for row in data
    ]
    roots = [str(root) for root in pack_roots(settings)]
    text = f"no packs; looked in {', '.join(roots)}"
    if body:
        headers = ("arch", "rows", "kernels", "code B", "toolchain", "pack")
        refused = [f"not used: {row['path']}: {row['reason']}" for row in data if row["reason"]]
        text = "\n".join([format_table(headers, body), *refused])
    emit({"searched": roots, "packs": data}, text)


def _found_data(item: FoundPack) -> dict[str, Any]:
    """A place where dispatch looks; what is not known of a broken pack is null or empty."""
    found = item.pack
    ops = [row.op.value for row in found.rows] if found else []
    return {
        "path": str(item.path),
        "used": not item.reason,
        "reason": item.reason,
        "hint": item.hint,
        "arch": found.arch if found else None,
        "rows": {op: ops.count(op) for op in dict.fromkeys(ops)},
        "kernels": len(found.kernels) if found else None,
        "bytes": found.code_bytes if found else None,
        "toolchain": dict(found.toolchain) if found else {},
        "driver_floor": found.driver_floor if found else None,
    }


@pack.command("merge")
@click.argument("out", type=FOLDER)
@click.argument(
    "paths", metavar="PACK...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@common_options
def pack_merge(out: Path, paths: tuple[Path, ...]) -> None:
    """Write one pack OUT with the rows of several packs; where two have a row, the first wins."""
    from glac.merge import merge_packs

    result = merge_packs(out, [item for path in paths for item in _packs_at(path)])
    dropped = [
        {**drop.row.to_dict(), "path": str(drop.path), "kept": str(drop.kept)}
        for drop in result.dropped
    ]
    lines = [_pack_title(result.pack)]
    for drop in result.dropped:
        row = drop.row
        lines.append(
            f"dropped: {row.gpu} {row.op.value} {row.spec.slug}, 2^{row.bucket.bh} heads, "
            f"2^{row.bucket.t} tokens, of {drop.path}: {drop.kept} has it"
        )
    emit({"pack": _pack_data(result.pack), "dropped": dropped}, "\n".join(lines))


# ---- cache ----


@cli.group()
def cache() -> None:
    """Look at the packs that were built here, and remove them."""


@cache.command("dir")
@common_options
def cache_dir() -> None:
    """Print the folder of built packs; its size goes to stderr."""
    from glac.cache import cached_packs
    from glac.settings import load_settings

    settings = load_settings()
    packs, others = cached_packs(settings)
    size = sum(item.size for item in packs)
    data = {
        "folder": str(settings.build_dir),
        "on_miss": str(settings.miss_dir),
        "packs": [{"path": str(item.path), "bytes": item.size} for item in packs],
        "bytes": size,
        "others": [str(path) for path in others],
    }
    progress(f"{len(packs)} packs, {size} bytes, with those built on a miss")
    emit(data, str(settings.build_dir))


@cache.command("clear")
@click.option("--yes", is_flag=True, help="Do not ask.")
@common_options
def cache_clear(yes: bool) -> None:
    """Remove the packs that `glac build` and builds on a miss put into the cache."""
    from glac.cache import removable_packs, remove_packs
    from glac.settings import load_settings

    if terminal.json and not yes:
        raise click.UsageError("--json does not ask: add --yes to remove the packs")
    packs = removable_packs(load_settings())
    for item in packs:
        say(f"{item.path}: {item.size} bytes")
    count, size = len(packs), sum(item.size for item in packs)
    if packs and not yes and not click.confirm(f"Remove these {count} packs?", err=True):
        say("nothing was removed")
        return
    remove_packs(packs)
    removed = [{"path": str(item.path), "bytes": item.size} for item in packs]
    text = f"removed {count} packs, {size} bytes" if packs else "no packs to remove"
    emit({"removed": removed, "bytes": size}, text)


# ---- configs ----


@cli.group()
def configs() -> None:
    """Look into tuned configs and check them."""


def _tuned(name: str) -> TunedFile:
    """A tuned file, by GPU or by path."""
    from glac.tuned import load_tuned, shipped

    if name.lower() not in GPUS:
        return load_tuned(Path(name))
    file = shipped(name.lower())
    if file is None:
        raise ConfigError(
            f"no tuned file came with glac for {name.lower()}",
            hint=f"glac tune --gpu {name.lower()}; until then it is built with heuristic configs",
        )
    return file


def _tuned_data(file: TunedFile) -> dict[str, Any]:
    return {
        "gpu": file.gpu,
        "rows": len(file.rows),
        "ops": [op.value for op in file.environment.templates_sha256],
        "measured_on": file.measured_on,
        "date": file.environment.date,
        "triton": file.environment.triton,
        "ptxas": file.environment.ptxas,
        "driver": file.environment.driver,
    }


@configs.command("list")
@common_options
def configs_list() -> None:
    """List the tuned files that count: your own, then those that came with glac."""
    from glac.settings import load_settings
    from glac.tuned import shipped, shipped_names, user_files

    files = [
        (file, str(folder / f"{name}.yaml"))
        for folder in load_settings().config_path
        for name in sorted(GPUS)
        for file in user_files(name, [folder])
    ]
    files += [(file, "glac") for name in shipped_names() if (file := shipped(name)) is not None]
    data = [{**_tuned_data(file), "from": where} for file, where in files]
    text = "no tuned files; `glac build` uses heuristic configs"
    if data:
        columns = ("gpu", "rows", "measured_on", "date", "triton", "ptxas")
        headers = ("gpu", "rows", "measured on", "date", "triton", "ptxas", "ops", "from")
        body = [
            [*(row[column] or "-" for column in columns), ", ".join(row["ops"]), row["from"]]
            for row in data
        ]
        text = format_table(headers, body)
    emit({"files": data}, text)


@configs.command("show")
@click.argument("name", metavar="GPU|PATH")
@common_options
def configs_show(name: str) -> None:
    """Show the rows of one tuned file."""
    file = _tuned(name)
    rows = [
        (
            f"{row.problem.B},{row.problem.T},{row.problem.H},{row.spec.K},{row.spec.V}",
            row.spec.slug,
            row.op.value,
            row.config.slug,
            f"{row.stats.us:.1f}",
            f"{row.stats.default_us:.1f}",
            f"{row.stats.error:.1e}",
            row.stats.candidates,
        )
        for row in file.rows
    ]
    headers = ("B,T,H,K,V", "problem", "op", "config", "us", "default us", "error", "candidates")
    env = file.environment
    title = (
        f"{file.gpu}: measured on {file.measured_on or 'nothing'}, {env.date}, "
        f"driver {env.driver or '-'}, triton {env.triton}, ptxas {env.ptxas}"
    )
    emit(file.to_dict(), f"{title}\n\n{format_table(headers, rows)}")


@configs.command("validate")
@click.argument("names", nargs=-1, metavar="[GPU|PATH]...")
@common_options
def configs_validate(names: tuple[str, ...]) -> None:
    """Check tuned files as strictly as the build does; all shipped ones by default."""
    from glac.tuned import shipped_names

    data, lines = [], []
    for name in names or shipped_names():
        file = _tuned(name)
        data.append({"name": name, "gpu": file.gpu, "rows": len(file.rows)})
        lines.append(f"ok: {name}: {file.gpu}, {len(file.rows)} rows")
    emit({"files": data}, "\n".join(lines) or "no tuned files to check")


@configs.command("migrate")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@common_options
def configs_migrate(paths: tuple[Path, ...]) -> None:
    """Write tuned files of an older schema in the newest one, in place.

    All are read before any is written. What such a file says of its rows stays true.
    """
    from glac.tuned import SCHEMA, dump_tuned, load_tuned

    files = [(path, load_tuned(path)) for path in paths]
    for path, file in files:
        dump_tuned(file, path)
    lines = [f"{path}: schema {SCHEMA}, {len(file.rows)} rows" for path, file in files]
    emit({"schema": SCHEMA, "files": [str(path) for path in paths]}, "\n".join(lines))


@configs.command("certify")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--jobs", type=click.IntRange(1), help="Kernels compiled at a time [all CPUs].")
@common_options
def configs_certify(paths: tuple[Path, ...], jobs: int | None) -> None:
    """Sign tuned files for the templates of today, in place.

    For work on the templates. Rows whose kernels still compile to the machine
    code that was measured stay what they were; nothing is written if one
    differs.
    """
    from glac.certify import certify
    from glac.tuned import dump_tuned, load_tuned

    found = [(path, certify(load_tuned(path), jobs)) for path in paths]
    for path, signed in found:
        dump_tuned(signed.file, path)
    lines = [
        f"{path}: {signed.kernels} kernels are what was measured; signed: "
        + (", ".join(f"{op} ({rows} rows)" for op, rows in signed.ops.items()) or "nothing new")
        for path, signed in found
    ]
    data = [
        {"file": str(path), "kernels": signed.kernels, "rows": signed.ops}
        for path, signed in found
    ]
    emit({"files": data}, "\n".join(lines))


@configs.command("diff")
@click.argument("old", metavar="GPU|PATH")
@click.argument("new", metavar="GPU|PATH")
@common_options
def configs_diff(old: str, new: str) -> None:
    """Compare two tuned files, the first taken as the old one.

    Exit code 0 if they are equal, 1 if they differ.
    """
    from glac.tuned import diff_tuned

    found = diff_tuned(_tuned(old), _tuned(new))
    data = {"old": old, "new": new, **found.to_dict()}
    if not found:
        emit(data, f"equal: {found.same} rows")
        return
    say(_diff_text(found))
    parts = (
        (found.changed, "changed"),
        (found.removed, f"only in {old}"),
        (found.added, f"only in {new}"),
        (found.header, "in the header"),
    )
    counts = ", ".join(f"{len(items)} {what}" for items, what in parts if items)
    raise FailedError(f"{old} and {new} differ: {counts}; {found.same} equal", data)


def _diff_text(found: TunedDiff) -> str:
    """The header's differences, then one line for each row that differs."""
    texts = []
    if found.header:
        body = [[key, *(value or "-" for value in pair)] for key, pair in found.header.items()]
        texts.append(format_table(("header", "old", "new"), body))

    def line(what: str, old: TunedRow | None, new: TunedRow | None, *rest: str) -> list[object]:
        row = old or new
        assert row is not None
        sides = (old, new)
        return [
            what,
            row.op.value,
            row.spec.slug,
            row.bucket.bh,
            row.bucket.t,
            *(side.config.slug if side else "-" for side in sides),
            *(f"{side.stats.us:.1f}" if side else "-" for side in sides),
            *rest,
        ]

    rows = [line("removed", row, None, "-", "-") for row in found.removed]
    rows += [line("added", None, row, "-", "-") for row in found.added]
    for change in found.changed:
        ratio = "-" if change.ratio is None else f"{change.ratio:.3f}"
        rows.append(line("changed", change.old, change.new, ratio, ", ".join(change.fields)))
    if rows:
        headers = ("row", "op", "problem", "log2 BH", "log2 T", "old config", "new config")
        texts.append(format_table((*headers, "old us", "new us", "new/old", "fields"), rows))
    return "\n\n".join(texts)


@configs.command("merge")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("first", metavar="GPU|PATH")
@click.argument("others", nargs=-1, required=True, metavar="GPU|PATH...")
@common_options
def configs_merge(out: Path, first: str, others: tuple[str, ...]) -> None:
    """Write the rows of several tuned files of one GPU to OUT.

    Of two rows for the same op, problem and bucket, the later file's stays. The header is that of
    the last file; rows that it would be wrong about are refused. OUT may be one of the files.
    """
    from glac.tuned import dump_tuned, header_conflicts, merge_tuned

    names = (first, *others)
    paths = [Path(name).resolve() for name in names if name.lower() not in GPUS]
    if out.exists() and out.resolve() not in paths:
        raise ConfigError(
            f"{out}: is there already, and is none of the files to merge",
            hint=f"to update it: glac configs merge {out} {out} {' '.join(names)}",
        )
    files = [_tuned(name) for name in names]
    merged = files[-1]
    data = [{"name": names[-1], "rows": len(merged.rows), "kept": len(merged.rows), "replaced": 0}]
    # From the last to the first, so that only rows that stay are held against the header.
    for name, file in zip(names[-2::-1], files[-2::-1], strict=True):
        conflicts = header_conflicts(file, merged)
        try:
            merged, kept, replaced = merge_tuned(file, merged)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error.message}", hint=error.hint) from None
        if conflicts:
            raise ConfigError(
                f"{name}: the header of {names[-1]} would be wrong about {kept} rows: "
                f"{'; '.join(conflicts)}",
                hint="tune these rows again as those of the last file were, or keep two files",
            )
        data.insert(0, {"name": name, "rows": len(file.rows), "kept": kept, "replaced": replaced})
    dump_tuned(merged, out)
    table = format_table(
        ("file", "rows", "kept", "replaced"), [list(row.values()) for row in data]
    )
    emit(
        {"path": str(out), "gpu": merged.gpu, "rows": len(merged.rows), "files": data},
        f"{table}\n\n{out}: {merged.gpu}, {len(merged.rows)} rows",
    )


# ---- doctor ----


@dataclass(frozen=True)
class Probe:
    """One line of ``glac doctor``: ``status`` is ok, warn or fail."""

    name: str
    status: str
    text: str
    hint: str = ""


def _version_probe(package: str, distribution: str, status: str, hint: str) -> Probe:
    """Version of a package from its metadata, and whether it can be imported."""
    import importlib.metadata
    import importlib.util

    if importlib.util.find_spec(package) is None:
        return Probe(distribution, status, "not installed", hint)
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "version unknown"
    return Probe(distribution, "ok", version)


def _probe_torch() -> list[Probe]:
    found = _version_probe("torch", "torch", "fail", "pip install torch")
    if found.status != "ok":
        return [found]
    import torch

    return [Probe("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}")]


def _probe_packages() -> list[Probe]:
    build, tune = "pip install 'glac[build]'", "pip install 'glac[tune]'"
    return [
        _version_probe("numpy", "numpy", "warn", "pip install numpy"),
        _version_probe("yaml", "PyYAML", "warn", "pip install pyyaml: builds read it"),
        _version_probe("triton", "triton", "warn", f"{build}: building and tuning need it"),
        _version_probe("optuna", "optuna", "warn", f"{tune}: tuning needs it"),
    ]


def _probe_gpus() -> list[Probe]:
    import torch

    from glac.dispatch import device_gpu

    if not torch.cuda.is_available():
        reason = "none that PyTorch can use"
        hint = "tensors on the CPU run through PyTorch; packs can be built here"
        return [Probe("gpu", "warn", reason, hint)]
    probes = []
    for index in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(index)
        spec, note = device_gpu(index)
        what = f"{props.name}, {props.major}.{props.minor}, {props.multi_processor_count} SMs"
        if spec is None:
            probes.append(Probe(f"gpu {index}", "warn", what, f"{note}; PyTorch serves it"))
        elif spec.name not in GPUS:
            probes.append(Probe(f"gpu {index}", "warn", what, note))
        else:
            probes.append(Probe(f"gpu {index}", "ok", f"{what}: {spec.name}"))
    return probes


def _probe_driver() -> list[Probe]:
    from glac.driver import driver_version

    try:
        major, minor = driver_version()
    except MissingEnvironmentError as error:
        return [Probe("driver", "warn", error.message, error.hint)]
    return [Probe("driver", "ok", f"for CUDA {major}.{minor}")]


def _probe_toolchain() -> list[Probe]:
    import time

    from glac.compile import PINNED_PTXAS, compile_kernel, toolchain
    from glac.configs import CombineKernelConfig
    from glac.kernelspec import KernelSpec
    from glac.problem import DType, Gate, Specialisation

    try:
        tools = toolchain()
    except MissingEnvironmentError as error:
        return [Probe("compiler", "warn", error.message, error.hint)]
    exact = tools.ptxas == PINNED_PTXAS
    hint = "" if exact else f"tuned files were certified with ptxas {PINNED_PTXAS}"
    probes = [Probe("assembler", "ok" if exact else "warn", f"ptxas {tools.ptxas}", hint)]
    spec = Specialisation(64, 64, DType.BF16, Gate.VECTOR, DType.BF16)
    started = time.perf_counter()
    for arch in ARCHS:
        compile_kernel(KernelSpec("gla_combine", spec, CombineKernelConfig(), arch), tools)
    took = time.perf_counter() - started
    text = f"triton {tools.triton} compiles a kernel for {' and '.join(ARCHS)} ({took:.1f} s)"
    return [*probes, Probe("compiler", "ok", text)]


def _probe_settings() -> list[Probe]:
    from glac.settings import load_settings

    settings = load_settings()
    probes = []
    for folder in settings.pack_path:
        if not folder.is_dir():
            hint = f"correct GLAC_PACK_PATH, or make it: glac build --out {folder}"
            probes.append(Probe("GLAC_PACK_PATH", "warn", f"{folder} is no folder", hint))
    if settings.require_aot:
        probes.append(Probe("GLAC_REQUIRE_AOT", "ok", "1: a problem without a pack is an error"))
    nearest = settings.cache_dir
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    writable = nearest.is_dir() and os.access(nearest, os.W_OK)
    hint = "" if writable else "set GLAC_CACHE_DIR to a folder that can be written"
    text = f"{settings.cache_dir}{'' if writable else ' cannot be written'}"
    return [*probes, Probe("cache", "ok" if writable else "warn", text, hint)]


def _probe_packs() -> list[Probe]:
    from glac.dispatch import pack_folders
    from glac.pack import read_pack
    from glac.settings import load_settings
    from glac.templates import templates_sha256

    settings, probes = load_settings(), []
    for path in dict.fromkeys(p for arch in ARCHS for p in pack_folders(settings, arch)):
        try:
            found = read_pack(path)
        except PackError as error:
            probes.append(Probe("pack", "fail", error.message, error.hint))
            continue
        text = f"{path}: {found.arch}, {len(found.rows)} rows, {len(found.kernels)} kernels"
        if found.templates_sha256 == templates_sha256(found.templates_sha256):
            probes.append(Probe("pack", "ok", text))
        else:
            probes.append(Probe("pack", "warn", f"{text}, of other templates", "glac build"))
    if not probes:
        hint = "glac build; until then kernels are compiled at first use, or PyTorch serves"
        return [Probe("pack", "warn", "none found", hint)]
    return probes


def _probe_configs() -> list[Probe]:
    from glac.tuned import shipped, shipped_names

    probes = []
    for name in shipped_names():
        try:
            file = shipped(name)
        except ConfigError as error:
            probes.append(Probe("configs", "fail", error.message, error.hint))
            continue
        if file is not None:
            text = f"{name}: {len(file.rows)} rows, measured on {file.measured_on or 'nothing'}"
            probes.append(Probe("configs", "ok", text))
    if not probes:
        return [Probe("configs", "warn", "no tuned files shipped", "glac tune makes them")]
    return probes


PROBES: tuple[tuple[str, Callable[[], list[Probe]]], ...] = (
    ("torch", _probe_torch),
    ("packages", _probe_packages),
    ("gpu", _probe_gpus),
    ("driver", _probe_driver),
    ("compiler", _probe_toolchain),
    ("settings", _probe_settings),
    ("packs", _probe_packs),
    ("configs", _probe_configs),
)


def _run_probe(name: str, probe: Callable[[], list[Probe]]) -> list[Probe]:
    """A probe's lines; whatever goes wrong becomes a line too."""
    try:
        return probe()
    except ModuleNotFoundError as error:
        package = (error.name or "a module").partition(".")[0]
        hint = _EXTRAS.get(package, "")
        return [Probe(name, "warn", f"not looked at: {package} is not installed", hint)]
    except GlacError as error:
        return [Probe(name, "fail", error.message, error.hint)]
    except Exception as error:
        return [Probe(name, "fail", f"{type(error).__name__}: {str(error).strip()[:300]}")]


@cli.command()
@common_options
def doctor() -> None:
    """Look at everything glac depends on, and judge it."""
    import platform

    probes = [
        Probe("glac", "ok", __version__),
        Probe("python", "ok", f"{platform.python_version()} on {platform.platform()}"),
    ]
    for name, look in PROBES:
        progress(f"looking at {name} ...")
        probes += _run_probe(name, look)
    data = {"probes": [vars(probe) for probe in probes]}
    failed = [probe for probe in probes if probe.status == "fail"]
    width = max(len(probe.name) for probe in probes)
    lines = []
    for probe in probes:
        lines.append(f"{probe.status:<4}  {probe.name:<{width}}  {probe.text}")
        if probe.hint and probe.status != "ok":
            lines.append(f"{'':<4}  {'':<{width}}  hint: {probe.hint}")
    if failed:
        say("\n".join(lines))
        raise FailedError(f"{len(failed)} of {len(probes)} checks failed", data)
    emit(data, "\n".join(lines))


# ---- completion ----


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@common_options
def completion(shell: str) -> None:
    """Print the script that completes `glac` in a shell.

    For example: eval "$(glac completion bash)"
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(cli, {}, PROGRAM, "_GLAC_COMPLETE").source()
    emit({"shell": shell, "script": script}, script.rstrip())


def _need(package: str) -> None:
    """Fail early, with a remedy, where a package is missing."""
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise MissingEnvironmentError(
            f"this command needs the Python package {package}, which is not installed",
            hint=_EXTRAS.get(package, f"pip install {package}"),
        )


def main() -> NoReturn:
    """The console script."""
    cli.main(prog_name=PROGRAM)
    raise AssertionError("unreachable: cli.main exits")
