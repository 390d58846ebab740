"""From study results to the tuned YAML of a GPU: rows for what was tuned, the others kept."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from glac import __version__
from glac.errors import StudyError
from glac.gpus import GpuSpec
from glac.kernelspec import config_kernels
from glac.pack import Pack
from glac.problem import Op
from glac.tuned import (
    Denied,
    RowKey,
    TunedEnvironment,
    TunedFile,
    TunedKernel,
    TunedRow,
    TunedStats,
    dump_tuned,
    header_conflicts,
    load_tuned,
    merge_tuned,
)
from glac.tuning.deny import denied_families
from glac.tuning.evaluate import Device
from glac.tuning.study import Report, Result


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path: of the YAML.
        rows: made from this study.
        kept: rows of the old file that stay.
        replaced: rows of the old file that gave way.
        warnings: what a user should know about the kept rows.
        denied: families of configs that failed in this study.
    """

    path: Path
    rows: tuple[TunedRow, ...]
    kept: int
    replaced: int
    warnings: tuple[str, ...]
    denied: tuple[Denied, ...] = ()


def environment(
    device: Device, toolchain: Mapping[str, str], templates_sha256: Mapping[Op, str], commit: str
) -> TunedEnvironment:
    """The header: device's software, and the toolchain that made the candidates."""
    return TunedEnvironment(
        driver=device.driver,
        torch=device.torch,
        triton=toolchain["triton"],
        ptxas=toolchain["ptxas"],
        glac=__version__,
        commit=commit,
        templates_sha256=templates_sha256,
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _plain(value: float, digits: int) -> float:
    """Rounded to so many significant digits; 0 for what is unknown."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else 0.0


def tuned_row(result: Result, pack: Pack, device: Device) -> TunedRow | None:
    """The row of one result, or ``None`` if no candidate worked.

    Hashes and facts are those of ``pack``, which ships, whatever code path was timed.
    """
    choice = result.choice
    if choice is None:
        return None
    kernels = []
    for kernel in config_kernels(result.problem.spec, choice.config, pack.arch):
        packed = pack.kernels[kernel.name]
        kernels.append(
            TunedKernel(
                name=kernel.name,
                registers=packed.registers,
                spill_bytes=packed.spill_bytes,
                shared=packed.shared,
                cubin_sha256=packed.sha256,
            )
        )
    stats = TunedStats(
        us=_plain(choice.us, 5),
        default_us=_plain(choice.default_us, 5),
        noise=_plain(choice.noise, 3),
        error=_plain(result.outcomes[choice.config].error, 4),
        yardstick_error=_plain(result.yardstick, 4),
        candidates=len(result.outcomes),
        measured_on=device.name,
    )
    return TunedRow(result.problem, choice.config, stats, tuple(kernels))


def _best_of_bucket(rows: Sequence[TunedRow]) -> list[TunedRow]:
    """One row for each op, specialisation and bucket; of two, the larger problem's."""
    chosen: dict[RowKey, TunedRow] = {}
    for row in rows:
        other = chosen.get(row.key)
        if other is None or row.problem.bytes(row.op) > other.problem.bytes(row.op):
            chosen[row.key] = row
    return list(chosen.values())


def check_target(path: Path | str, gpu: GpuSpec) -> TunedFile | None:
    """The file that an export would update; to be asked before hours of measurement.

    Raises:
        ConfigError: it is broken.
        StudyError: it is for another GPU.
    """
    path = Path(path)
    if not path.exists():
        return None
    old = load_tuned(path)
    if old.gpu != gpu.name:
        raise StudyError(
            f"{path}: is for {old.gpu}, this study is for {gpu.name}",
            hint="name another file with --out",
        )
    return old


def export(
    report: Report,
    pack: Pack,
    gpu: GpuSpec,
    path: Path | str,
    templates_sha256: Mapping[Op, str],
    commit: str,
) -> Export | None:
    """Write the results into the YAML at ``path``, whose other rows stay.

    Args:
        report: of the study.
        pack: the kernels that were measured.
        gpu: whose file it is; ``measured_on`` says what device the times are from.
        path: of the YAML; folders are made.
        templates_sha256: of the sources the kernels were compiled from, by op.
        commit: of the checkout they were compiled in.

    Returns:
        What was written, or ``None`` if no problem has a working config: then nothing is written.

    Raises:
        ConfigError: the old file is broken, or cannot be written; it stays as it is.
        StudyError: the old file is for another GPU.
    """
    path = Path(path)
    made = [tuned_row(result, pack, report.device) for result in report.results]
    rows = _best_of_bucket([row for row in made if row is not None])
    if not rows:
        return None
    old = check_target(path, gpu)
    hashes = {row.op: templates_sha256[row.op] for row in rows}
    header = environment(report.device, pack.toolchain, hashes, commit)
    denied = [
        entry
        for result in report.results
        for entry in denied_families(
            result.problem.spec,
            result.outcomes,
            triton=header.triton,
            ptxas=header.ptxas,
            templates_sha256=templates_sha256[result.op],
            measured_on=report.device.name,
            date=header.date,
        )
    ]
    unique = tuple({entry.key: entry for entry in denied}.values())
    new = TunedFile(gpu.name, report.device.name, pack.arch, header, tuple(rows), unique)
    merged, kept, replaced = merge_tuned(old, new) if old else (new, 0, 0)
    worked = {
        (r.op, r.problem.spec, c) for r in report.results for c, o in r.outcomes.items() if o.ok
    }
    merged = replace(
        merged,
        # What works in one bucket, or works now, is not denied for what failed in another.
        denied=tuple(
            entry
            for entry in merged.denied
            if not any(
                (op, spec) == (entry.op, entry.spec) and entry.matches(spec, config)
                for op, spec, config in worked
            )
        ),
    )
    warnings = []
    conflicts = header_conflicts(old, new) if old else []
    if conflicts:
        warnings.append(
            f"{kept} older rows were certified with other templates or another toolchain "
            f"({'; '.join(conflicts)}); "
            "tune them again, or expect `glac build` to report other binaries"
        )
    dump_tuned(merged, path)
    return Export(path, tuple(rows), kept, replaced, tuple(warnings), unique)
