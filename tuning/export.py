"""From study results to the tuned YAML of a GPU: rows for what was tuned, the others kept."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from glac import __version__
from glac.errors import ConfigError, StudyError
from glac.gpus import GpuSpec
from glac.kernelspec import config_kernels
from glac.pack import Pack
from glac.problem import Op
from glac.tuned import (
    TunedEnvironment,
    TunedFile,
    TunedKernel,
    TunedRow,
    TunedStats,
    dump_tuned,
    load_tuned,
)
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
    """

    path: Path
    rows: tuple[TunedRow, ...]
    kept: int
    replaced: int
    warnings: tuple[str, ...]


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
    """The row of one result, or ``None`` if no candidate worked."""
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


def _kept(old: TunedFile, new: TunedFile) -> list[TunedRow]:
    """Rows of ``old`` that ``new`` has none for."""
    taken = {(row.op, row.spec, row.bucket) for row in new.rows}
    return [row for row in old.rows if (row.op, row.spec, row.bucket) not in taken]


def _same_code(old: TunedFile, new: TunedFile) -> bool:
    """Whether kept rows were made by the toolchain and the templates that the header will name."""
    then, now = old.environment, new.environment
    return (then.triton, then.ptxas) == (now.triton, now.ptxas) and all(
        then.templates_sha256[op] == now.templates_sha256.get(op, then.templates_sha256[op])
        for op in {row.op for row in _kept(old, new)}
    )


def merge(old: TunedFile | None, new: TunedFile) -> tuple[TunedFile, int, int]:
    """``new`` plus the rows of ``old`` for other ops, specialisations and buckets.

    Returns:
        The merged file, the number of rows kept and of rows replaced.

    Raises:
        StudyError: the files are for different GPUs.
    """
    if old is None:
        return new, 0, 0
    if old.gpu != new.gpu:
        raise StudyError(
            f"the file to update is for {old.gpu}, this study is for {new.gpu}",
            hint="name another file with --out",
        )
    kept = _kept(old, new)
    hashes = {row.op: old.environment.templates_sha256[row.op] for row in kept}
    hashes.update(new.environment.templates_sha256)
    merged = replace(
        new,
        environment=replace(new.environment, templates_sha256=hashes),
        rows=(*new.rows, *kept),
    )
    return merged, len(kept), len(old.rows) - len(kept)


def _best_of_bucket(rows: Sequence[TunedRow]) -> list[TunedRow]:
    """One row for each op, specialisation and bucket; of two, the larger problem's."""
    chosen: dict[tuple[object, ...], TunedRow] = {}
    for row in rows:
        key = (row.op, row.spec, row.bucket)
        other = chosen.get(key)
        if other is None or row.problem.bytes(row.op) > other.problem.bytes(row.op):
            chosen[key] = row
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
        ConfigError: the old file is broken; it stays as it is.
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
    new = TunedFile(gpu.name, report.device.name, gpu.arch, header, tuple(rows))
    merged, kept, replaced = merge(old, new)
    warnings = []
    if old and kept and not _same_code(old, new):
        warnings.append(
            f"{kept} older rows were certified with other templates or another toolchain; "
            "tune them again, or expect `glac build` to report other binaries"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        dump_tuned(merged, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from None
    return Export(path, tuple(rows), kept, replaced, tuple(warnings))
