"""Where a study starts: configs that won elsewhere, and what the roofline likes best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from glac.configs import Config, ForwardConfig, why_illegal
from glac.gpus import GpuSpec
from glac.problem import Op, Problem
from glac.tuned import TunedFile, TunedRow
from glac.tuning.prior import predicted_us
from glac.tuning.space import Space

KNOWN_STARTS = 6
PRIOR_STARTS = 8
"""Of the roofline's and the rules' favourites, half each."""


@dataclass(frozen=True)
class Winner:
    """A config that won for some problem."""

    problem: Problem
    config: Config


def winners(files: Iterable[TunedFile]) -> list[Winner]:
    """All rows of tuned files, those of earlier files first."""
    return [Winner(row.problem, row.config) for file in files for row in file.rows]


def _far(one: Problem, other: Problem) -> float:
    """How unlike two problems are; infinite where a config of one says nothing about the other."""
    a, b = one.spec, other.spec
    if a.dtype.itemsize != b.dtype.itemsize:
        return math.inf
    widths = abs(math.log2(a.K / b.K)) + abs(math.log2(a.V / b.V))
    sizes = abs(one.bucket.bh - other.bucket.bh) + abs(one.bucket.t - other.bucket.t)
    return 4.0 * widths + 2.0 * (a.gate is not b.gate) + (a != b) + sizes


def known_starts(problem: Problem, op: Op, known: Sequence[Winner], gpu: GpuSpec) -> list[Config]:
    """Winners of the most similar problems that are legal here, each config once."""
    near = sorted(
        (w for w in known if w.config.op is op and _far(problem, w.problem) < math.inf),
        key=lambda winner: _far(problem, winner.problem),
    )
    found: dict[Config, None] = {}
    for winner in near:
        config = winner.config
        if isinstance(config, ForwardConfig) and config.segment and config.segment >= problem.T:
            config = replace(config, segment=0, summary=None)
        if why_illegal(problem.spec, config, gpu) is None:
            found.setdefault(config)
    return list(found)[:KNOWN_STARTS]


def incumbent_row(
    problem: Problem, op: Op, files: Iterable[TunedFile], gpu: GpuSpec
) -> TunedRow | None:
    """The row that serves the problem's bucket now, of the first file that has one."""
    for file in files:
        for row in file.rows:
            if file.gpu == gpu.name and row.key == (op, problem.spec, problem.bucket):
                return row
    return None


def _favourites(space: Space, gpu: GpuSpec) -> list[Config]:
    """The roofline's and the rules' best, in turn."""
    by_roofline = sorted(
        space.configs, key=lambda c: (predicted_us(space.problem, c, gpu), c.slug)
    )
    half = PRIOR_STARTS // 2
    turns = itertools.chain.from_iterable(zip(by_roofline, space.configs, strict=True))
    return list(dict.fromkeys(turns))[: 2 * half]


def warmed(
    space: Space,
    gpu: GpuSpec,
    known: Sequence[Winner] = (),
    incumbent: Config | None = None,
    add: bool = True,
) -> Space:
    """``space`` with its warm starts in front: default, incumbent, winners elsewhere, favourites.

    Args:
        space: of one op of a problem, its configs ordered by rule of thumb.
        gpu: where it is tuned.
        known: winners of other problems and GPUs.
        incumbent: what serves the problem now, if not the default.
        add: whether winners that are not in the space join it; they must then be compiled too.
    """
    starts: list[Config] = [space.default]
    if incumbent is not None and why_illegal(space.problem.spec, incumbent, gpu) is None:
        starts.append(incumbent)
    else:
        incumbent = None
    starts += known_starts(space.problem, space.op, known, gpu)
    if not add:
        starts = [config for config in starts if config in space.configs]
    if incumbent not in starts:
        incumbent = None
    starts += _favourites(space, gpu)
    first = list(dict.fromkeys(starts))
    configs = tuple(dict.fromkeys((*first, *space.configs)))
    return Space(space.problem, space.default, configs, incumbent, len(first))
