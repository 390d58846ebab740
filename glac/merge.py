"""Several packs of one arch as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glac.archive import MANIFEST, is_zip
from glac.errors import PackError
from glac.pack import Pack, PackedKernel, PackRow, ops_of, write_parts
from glac.problem import Bucket, Op, Specialisation

_SEPARATE = "merge packs of one build, or list both under GLAC_PACK_PATH"


@dataclass(frozen=True)
class DroppedRow:
    """A row that an earlier pack has too.

    Attributes:
        row: what was dropped.
        path: of the pack it was in.
        kept: path of the pack whose row serves instead.
    """

    row: PackRow
    path: Path
    kept: Path


@dataclass(frozen=True)
class MergeResult:
    """The pack that was written, and the rows that are not in it."""

    pack: Pack
    dropped: tuple[DroppedRow, ...]


def _same(packs: Sequence[Pack], what: str, value: Callable[[Pack], Any], reason: str) -> None:
    first = packs[0]
    for pack in packs[1:]:
        if value(pack) != value(first):
            raise PackError(
                f"{pack.path}: {what}: wanted {value(first)} as in {first.path}, "
                f"got {value(pack)}{reason}",
                hint=f"rebuild them with one installation: glac build; {_SEPARATE}",
            )


def _check_alike(packs: Sequence[Pack]) -> dict[Op, str]:
    """Refuse what one manifest cannot say; the hash of each op's templates."""
    arch = packs[0].arch
    for pack in packs:
        if pack.arch != arch:
            raise PackError(
                f"{pack.path}: arch: wanted {arch} as in {packs[0].path}, got {pack.arch}; "
                "a pack serves one arch",
                hint="merge the packs of each arch by themselves",
            )
    _same(packs, "toolchain", lambda pack: dict(pack.toolchain), "; a pack names one toolchain")
    _same(packs, "driver_floor", lambda pack: pack.driver_floor, "")
    templates: dict[Op, str] = {}
    for op in Op:
        having = [pack for pack in packs if op in pack.templates_sha256]
        if having:
            _same(
                having,
                f"templates_sha256.{op.value}",
                lambda pack, op=op: pack.templates_sha256[op],  # type: ignore[misc]
                "; a pack names one set of templates for each op",
            )
            templates[op] = having[0].templates_sha256[op]
    return templates


def _all_kernels(packs: Sequence[Pack]) -> dict[str, tuple[Pack, PackedKernel]]:
    """Every kernel by name, with the first pack that has it."""
    found: dict[str, tuple[Pack, PackedKernel]] = {}
    for pack in packs:
        for name, kernel in pack.kernels.items():
            first, known = found.setdefault(name, (pack, kernel))
            if kernel != known:
                what = "sha256" if kernel.sha256 != known.sha256 else "content"
                wanted, got = (
                    (known.sha256, kernel.sha256)
                    if what == "sha256"
                    else (known.to_dict(), kernel.to_dict())
                )
                raise PackError(
                    f"{pack.path}: kernels[{name!r}].{what}: wanted {wanted} as in {first.path}, "
                    f"got {got}; one name cannot stand for two kernels",
                    hint=f"leave one of the two packs out, or {_SEPARATE}",
                )
    return found


def merge_packs(out: Path | str, packs: Sequence[Pack]) -> MergeResult:
    """Write one pack at ``out`` with the rows of all ``packs``.

    Of rows for the same GPU, op, specialisation and bucket the earliest pack's is kept. Kernels
    that no kept row needs are left out. All machine code is checked before anything is written,
    and again before the new pack takes its place.

    Args:
        out: of the folder or zip to write. A pack that is there already is replaced, but only if
            it is among ``packs``.
        packs: to merge, the ones that win first; of one arch, toolchain and set of templates.

    Raises:
        PackError: a pack is damaged, they do not fit together, or ``out`` cannot be written.
    """
    out = Path(out)
    if out.name in ("", ".."):
        out = out.resolve()
    if not packs:
        raise PackError("no pack to merge: wanted at least one, got none", hint="name their paths")
    templates = _check_alike(packs)
    kernels = _all_kernels(packs)
    given = {pack.path.resolve() for pack in packs}
    taken = out.is_file() if is_zip(out) else (out / MANIFEST).is_file()
    if taken and out.resolve() not in given:
        raise PackError(
            f"{out}: wanted a new place or one of the packs to merge, got another pack; "
            "it was left as it is",
            hint=f"name it among the packs to keep its rows: glac pack merge {out} {out} ...",
        )
    rows: dict[tuple[str, Op, Specialisation, Bucket], tuple[Pack, PackRow]] = {}
    dropped = []
    for pack in packs:
        for name in pack.kernels:
            pack.read_cubin(name)
        for row in pack.rows:
            first, kept = rows.setdefault((row.gpu, row.op, row.spec, row.bucket), (pack, row))
            if kept is not row:
                dropped.append(DroppedRow(row, pack.path, first.path))
    names = sorted({name for _, row in rows.values() for name in row.kernels.values()})
    needed = [kernels[name][1] for name in names]
    merged = write_parts(
        out,
        arch=packs[0].arch,
        driver_floor=packs[0].driver_floor,
        toolchain=packs[0].toolchain,
        templates={op: templates[op] for op in ops_of(item.kernel for item in needed)},
        kernels=needed,
        rows=[row for _, row in rows.values()],
        cubins={kernels[name][1].sha256: kernels[name][0].read_cubin(name) for name in names},
    )
    return MergeResult(merged, tuple(dropped))
