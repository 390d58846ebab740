"""Which rows of a pack have a C function, and what it is called."""

from __future__ import annotations

import math
from collections.abc import Mapping

from glac.configs import (
    ChunksBackwardConfig,
    Config,
    DecodeConfig,
    ForwardConfig,
    ScalarForwardConfig,
)
from glac.pack import Pack, PackRow
from glac.problem import Gate, Op, Specialisation
from glac.record import dataclass

_OP_NAMES = {
    Op.FORWARD: "fwd",
    Op.SCALAR_FORWARD: "fwd",
    Op.BACKWARD: "bwd",
    Op.SCALAR_BACKWARD: "bwd",
    Op.DECODE: "decode",
}
"""The op in the name of a function; the slug of its specialisation tells the gate."""


@dataclass(frozen=True)
class Function:
    """One C function: a config of a specialisation, and the rows that name it."""

    name: str
    config: Config
    spec: Specialisation
    kernels: Mapping[str, str]
    rows: tuple[PackRow, ...]


def prefix_of(pack: Pack) -> str:
    """What all names in the sources of a pack begin with."""
    return f"glac_{pack.arch.replace('_', '')}"


def functions_of(pack: Pack) -> list[Function]:
    """One for each config of a specialisation, whichever GPUs and buckets name it."""
    groups: dict[tuple[Specialisation, Config], list[PackRow]] = {}
    for row in pack.rows:
        if not why_left_out(row):
            groups.setdefault((row.spec, row.config), []).append(row)
    found: list[Function] = []
    taken: set[str] = set()
    for (spec, config), rows in groups.items():
        first = rows[0]
        name = f"{prefix_of(pack)}_{_OP_NAMES[config.op]}_{spec.slug}"
        name += f"_bh{first.bucket.bh}_t{first.bucket.t}"
        if name in taken:
            name += f"_{first.gpu.replace('-', '_')}"
        taken.add(name)
        found.append(Function(name, config, spec, first.kernels, tuple(rows)))
    return found


def function_names(pack: Pack) -> dict[tuple[Specialisation, Config], str]:
    """What the C function of a row is called, by the row's specialisation and config.

    Dispatch may give a config other segments than its row's: take the row's here, and the others
    as ``segment`` of the call.
    """
    return {(item.spec, item.config): item.name for item in functions_of(pack)}


def why_left_out(row: PackRow) -> str:
    """Why a row has no C function, empty if it has one: results that are not all from kernels."""
    if isinstance(row.config, ForwardConfig | ScalarForwardConfig | DecodeConfig):
        return ""
    if row.spec.gate is Gate.LOWRANK:
        return "the kernels around the pass of a low-rank gate have no C yet"
    if isinstance(row.config, ChunksBackwardConfig) or row.config.grads is None:
        return ""
    tiles = math.ceil(row.spec.V / row.config.grads.block_v)
    return f"PyTorch adds up gradients of {tiles} tiles of V" if tiles > 1 else ""


def left_out(pack: Pack) -> list[tuple[PackRow, str]]:
    """The rows without a C function, each with the reason."""
    return [(row, reason) for row in pack.rows if (reason := why_left_out(row))]
