"""Studies from a table of recorded outcomes, without a GPU.

A table is CSV with one line for each config of a problem:

    B,T,H,K,V,gate,config,status,early_stop,us,noise,error,hard_error
    8,2048,16,64,64,vector,c32_bv64_w4_s3,ok,,77.1,0.0106,3.31e-03,3.31e-03

``gate`` is such as ``vector`` or ``lowrank16``; a column ``dtype`` is optional, and bf16 without
it; further columns are ignored. A replay goes through the same study, worker process, storage and
export as measuring does; only the answers come from the table.
"""

from __future__ import annotations

import csv
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glac.configs import (
    BackwardConfig,
    ChunkKernelConfig,
    ChunksBackwardConfig,
    Config,
    DecodeConfig,
    DecodeKernelConfig,
    ForwardConfig,
    PrepareKernelConfig,
    ScalarBackwardConfig,
    ScalarForwardConfig,
    TileKernelConfig,
    TurnedKernelConfig,
    default_config,
)
from glac.errors import ConfigError, GlacError, StudyError
from glac.gpus import GpuSpec
from glac.problem import DType, Gate, Op, Problem
from glac.tuning.evaluate import ERROR, OK, STATUSES, Device, Outcome, Yardstick
from glac.tuning.space import Space, make_problem

COLUMNS = ("B", "T", "H", "K", "V", "gate", "config", "status", "us")
REPLAY_SESSION = "glac.tuning.replay:replay_session"

_WALK = re.compile(r"c(\d+)_bv(\d+)_w(\d+)_s(\d+)(_tma)?(?:_l(\d+))?(_stop)?(_pe)?")
_TILE = re.compile(r"c(\d+)_bk(\d+)_bv(\d+)_w(\d+)_s(\d+)(_tma)?(_dv)?(?:_k(\d+))?(?:_l(\d+))?")
_PREPARE = re.compile(r"c(\d+)_bk(\d+)_w(\d+)_s(\d+)")
_DECODE = re.compile(r"bv(\d+)_w(\d+)(?:_r(\d+))?")
_GATE = re.compile(r"([a-z]+)(\d*)")


def _walk(slug: str) -> ChunkKernelConfig:
    found = _WALK.fullmatch(slug)
    if not found:
        raise ValueError(f"{slug!r} is no tile such as c32_bv64_w4_s3")
    chunk, block_v, warps, stages = map(int, found.groups()[:4])
    tma, lead = found.group(5) is not None, int(found.group(6) or 0)
    stops, product_ends = found.group(7) is not None, found.group(8) is not None
    return ChunkKernelConfig(chunk, block_v, warps, stages, tma, lead, stops, product_ends)


def _tile(slug: str) -> TileKernelConfig:
    found = _TILE.fullmatch(slug)
    if not found:
        raise ValueError(f"{slug!r} is no tile such as c32_bk64_bv64_w4_s3_dv")
    chunk, block_k, block_v, warps, stages = map(int, found.groups()[:5])
    tma, dv = found.group(6) is not None, found.group(7) is not None
    keep, lead = int(found.group(8) or 1), int(found.group(9) or 0)
    return TileKernelConfig(chunk, block_k, block_v, warps, stages, tma, dv, keep, lead)


def _prepare(slug: str) -> PrepareKernelConfig:
    found = _PREPARE.fullmatch(slug)
    if not found:
        raise ValueError(f"{slug!r} is no kernel such as c32_bk64_w2_s2")
    return PrepareKernelConfig(*map(int, found.groups()))


def _turned(slug: str) -> TurnedKernelConfig:
    tile = _walk(slug.removesuffix("_turned"))
    return TurnedKernelConfig(**tile.to_dict(), turned=slug.endswith("_turned"))


def _config(slug: str, gate: Gate) -> Config:
    """The config of a slug, if it is one; some slugs mean what the gate says."""
    main, *rest = slug.split("-")
    if found := _DECODE.fullmatch(main):
        return DecodeConfig(DecodeKernelConfig(*(int(part or 0) for part in found.groups())))
    # A segment's length is followed by the kernel that summarises segments.
    named: dict[str, str] = {}
    for part in rest:
        key = next((k for k in ("st_", "dv_", "pre_", "wk_", "seg") if part.startswith(k)), "")
        named[key.rstrip("_") or "summary"] = part.removeprefix(key)
    segment = int(named.get("seg", 0))
    dv = _walk(named["dv"]) if "dv" in named else None
    if gate.is_scalar:
        if "st" not in named:
            return ScalarForwardConfig(_turned(main))
        chunks, grads = (None, _tile(main)) if "_bk" in main else (_walk(main), None)
        return ScalarBackwardConfig(_walk(named["st"]), chunks, grads, dv)
    if "wk" in named:
        return ChunksBackwardConfig(
            _prepare(named["pre"]), _walk(named["wk"]), _tile(main), _walk(named["st"]), segment
        )
    if "_bk" in main:
        grads = _tile(main)
        states = None if grads.lead else _walk(named["st"])
        return BackwardConfig(states, grads, dv, segment)
    fwd = _walk(main)
    if segment and not fwd.lead and "summary" not in named:
        raise ValueError(f"{slug!r} lacks the kernel that summarises segments")
    summary = _walk(named["summary"]) if "summary" in named else None
    prepare = _prepare(named["pre"]) if "pre" in named else None
    return ForwardConfig(fwd, segment, summary, prepare)


def parse_slug(slug: str, gate: Gate = Gate.VECTOR) -> Config:
    """The config whose ``slug`` this is, for problems with such a gate.

    Raises:
        ConfigError: it is nobody's.
    """
    config: Config | None = None
    try:
        config = _config(slug, gate)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"config: {slug!r} cannot be read ({error})") from None
    if config is None or config.slug != slug:
        raise ConfigError(
            f"config: wanted the name of a config, got {slug!r}",
            hint="such as c32_bv64_w4_s3 or c32_bv64_w2_s3-seg256-c32_bv64_w2_s3",
        )
    return config


@dataclass(frozen=True)
class Table:
    """Recorded outcomes.

    Attributes:
        path: of the file.
        outcomes: by problem and op, then by config, in the order of the file.
    """

    path: Path
    outcomes: Mapping[tuple[Problem, Op], Mapping[Config, Outcome]]

    def spaces(self, gpu: GpuSpec) -> list[Space]:
        """Every problem with its configs; the default is that of ``gpu``, else the first row."""
        found = []
        for (problem, op), rows in self.outcomes.items():
            usual = default_config(op, problem.spec, gpu, problem.bucket)
            default = usual if usual in rows else next(iter(rows))
            found.append(Space(problem, default, tuple(rows)))
        return found


def _number(row: Mapping[str, str], name: str) -> float:
    text = (row.get(name) or "").strip()
    return float(text) if text else math.nan


def _outcome(row: Mapping[str, str]) -> Outcome:
    status = row["status"]
    if status not in STATUSES:
        raise ConfigError(f"status: wanted one of {', '.join(STATUSES)}, got {status!r}")
    us, noise = _number(row, "us"), _number(row, "noise")
    if status == OK and not (math.isfinite(us) and us > 0):
        raise ConfigError(f"us: wanted a positive time, got {row['us']!r}")
    return Outcome(
        status,
        us=us if status == OK else None,
        noise=noise if math.isfinite(noise) else 0.0,
        error=_number(row, "error"),
        hard_error=_number(row, "hard_error"),
        pruned=bool(row.get("early_stop")),
        reason=row.get("reason") or ("" if status == OK else f"{status} in the table"),
    )


def _problem(row: Mapping[str, str]) -> Problem:
    gate = _GATE.fullmatch(row["gate"])
    if not gate:
        raise ConfigError(f"gate: wanted vector or lowrank16, got {row['gate']!r}")
    sizes = []
    for name in ("B", "T", "H", "K", "V"):
        if not row[name].isdecimal():
            raise ConfigError(f"{name}: wanted a positive integer, got {row[name]!r}")
        sizes.append(int(row[name]))
    try:
        dtype = DType(row.get("dtype") or "bf16")
        return make_problem(sizes, Gate(gate.group(1)), int(gate.group(2) or 0), dtype)
    except ValueError as error:
        raise ConfigError(getattr(error, "message", str(error))) from None


def load_table(path: Path | str) -> Table:
    """Read a table.

    Raises:
        ConfigError: ``file:line: column: reason``.
    """
    path = Path(path)
    found: dict[tuple[Problem, Op], dict[Config, Outcome]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
            if missing:
                raise ConfigError(f"{path}:1: header: missing columns {', '.join(missing)}")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                try:
                    if None in row.values() or None in row:
                        raise ConfigError("row: wanted as many fields as the header has")
                    problem = _problem(row)
                    config = parse_slug(row["config"], problem.spec.gate)
                    rows = found.setdefault((problem, config.op), {})
                    if config in rows:
                        raise ConfigError(f"config: {config.slug} is given twice")
                    rows[config] = _outcome(row)
                except (ConfigError, ValueError) as error:
                    reason = error.message if isinstance(error, GlacError) else str(error)
                    raise ConfigError(
                        f"{where}: {reason}", hint="columns: docs/tuning.md, Replaying"
                    ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if not found:
        raise ConfigError(f"{path}: holds no rows")
    return Table(path, found)


class ReplaySession:
    """What a worker does instead of measuring.

    Args:
        table: path of the table.
        sleep: seconds each candidate takes.
        log: file that gets a line for each candidate tried, for tests.
    """

    def __init__(self, table: str, sleep: float = 0.0, log: str = "") -> None:
        self._table = load_table(table)
        self._sleep, self._log = sleep, log
        self._rows: Mapping[Config, Outcome] = {}

    def device(self) -> Device:
        return Device(f"replay of {self._table.path.name}")

    def prepare(self, problem: Problem, op: Op) -> Yardstick:
        try:
            self._rows = self._table.outcomes[problem, op]
        except KeyError:
            raise StudyError(f"{self._table.path}: has no rows for {problem} {op.value}") from None
        errors = [o.error for o in self._rows.values() if math.isfinite(o.error)]
        return Yardstick(min(errors, default=math.nan))

    def evaluate(self, config: Config, best_us: float | None) -> Outcome:
        time.sleep(self._sleep)
        if self._log:
            line = f"{os.getpid()} {config.slug}\n".encode()
            handle = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(handle, line)  # in one piece, whoever else appends
            os.close(handle)
        return self._rows.get(config) or Outcome(ERROR, reason="not in the table")

    def compare(self, configs: Sequence[Config], rounds: int) -> list[list[float]]:
        time.sleep(self._sleep)
        found = [self._rows.get(config) for config in configs]
        return [[o.us] * rounds if o is not None and o.us else [] for o in found]

    def healthy(self) -> bool:
        return True


def replay_session(**arguments: Any) -> ReplaySession:
    """A session that answers from a table."""
    return ReplaySession(**arguments)
