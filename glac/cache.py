"""The packs that glac built into the user cache: how large they are, and how to remove them."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from glac.archive import MANIFEST
from glac.errors import PackError
from glac.gpus import ARCHS
from glac.settings import Settings

_CUBIN = re.compile(r"[0-9a-f]{64}\.cubin")
# A pack that is being written, or on its way out.
_PASSING = re.compile(r"\..+\.[0-9a-f]{16}\.(tmp|old)")


@dataclass(frozen=True)
class CachedPack:
    """A pack folder in the cache, readable or of another format; ``size`` counts all its files."""

    path: Path
    size: int


def _pack_size(folder: Path) -> int | None:
    """Bytes of a folder laid out as glac writes packs; ``None`` for anything else."""
    cubins = folder / "cubins"
    if folder.is_symlink() or not folder.is_dir():
        return None
    if {item.name for item in folder.iterdir()} != {MANIFEST, cubins.name}:
        return None
    if cubins.is_symlink() or not cubins.is_dir():
        return None
    files = list(cubins.iterdir())
    if not all(_CUBIN.fullmatch(file.name) for file in files):
        return None
    files.append(folder / MANIFEST)
    if any(file.is_symlink() or not file.is_file() for file in files):
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (ValueError, RecursionError):
        return None
    # Not its content: packs of an older format, or damaged ones, are to go as well.
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        return None
    return sum(file.stat().st_size for file in files)


def _inside(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from sorted(p for p in folder.iterdir() if not _PASSING.fullmatch(p.name))


def _candidates(settings: Settings) -> Iterator[Path]:
    yield from _inside(settings.build_dir)
    for path in _inside(settings.miss_dir):
        if path.name in ARCHS and path.is_dir() and not path.is_symlink():
            yield from _inside(path)
        else:
            yield path


def cached_packs(settings: Settings) -> tuple[list[CachedPack], list[Path]]:
    """The packs in ``build_dir`` and ``miss_dir``, and what else lies there.

    Raises:
        PackError: a folder cannot be read.
    """
    packs, others = [], []
    try:
        for path in _candidates(settings):
            size = _pack_size(path)
            if size is None:
                others.append(path)
            else:
                packs.append(CachedPack(path, size))
    except OSError as error:
        raise PackError(
            f"{settings.cache_dir}: cannot be read ({error})",
            hint="look at its permissions, or set GLAC_CACHE_DIR to another folder",
        ) from None
    return packs, others


def removable_packs(settings: Settings) -> list[CachedPack]:
    """The packs that ``remove_packs`` may be given.

    Raises:
        PackError: something that is no pack of glac's making lies among them.
    """
    packs, others = cached_packs(settings)
    if others:
        shown = ", ".join(map(str, others[:5])) + (", ..." if len(others) > 5 else "")
        raise PackError(
            f"{settings.cache_dir}: wanted only packs that glac built, got {len(others)} other "
            f"entries: {shown}; nothing was removed",
            hint="move them elsewhere, or remove them by hand, and run it again",
        )
    return packs


def remove_packs(packs: Sequence[CachedPack]) -> None:
    """Remove packs, all of them or none: they are first renamed to where nobody looks.

    Raises:
        PackError: one cannot be moved, and all are back in their place; or files of one that was
            moved away cannot be deleted.
    """
    moved: list[tuple[Path, Path]] = []
    try:
        for pack in packs:
            away = pack.path.with_name(f".{pack.path.name}.{secrets.token_hex(8)}.old")
            pack.path.rename(away)
            moved.append((pack.path, away))
    except BaseException as error:
        for path, away in reversed(moved):
            away.rename(path)
        if not isinstance(error, OSError):
            raise
        raise PackError(
            f"{pack.path}: cannot be removed ({error}); nothing was removed",
            hint="look at the permissions of its folder",
        ) from None
    failed = []
    for _, away in moved:
        shutil.rmtree(away, ignore_errors=True)
        if away.exists():
            failed.append(str(away))
    if failed:
        raise PackError(
            f"no pack is left in use, but files of {len(failed)} cannot be deleted: "
            f"{', '.join(failed)}",
            hint="delete these folders by hand",
        )
