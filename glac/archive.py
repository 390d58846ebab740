"""The two forms in which the files of a pack lie on disk: a folder, and one zip file.

Both readers open only what a pack can hold, by exact name, once, and no more of it than asked for:
links, devices and pipes inside a folder, and names, links or methods in a zip that a pack has no
use for, are refused. Nothing is ever extracted. The zip reader is 100 lines because Python's
costs 10 ms to import, as much as reading the largest pack, and is lenient.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from glac.errors import PackError

MANIFEST = "manifest.json"
CUBINS = "cubins"
MEMBER = re.compile(r"manifest\.json|cubins/[0-9a-f]{64}\.cubin")
"""Names of the files of a pack."""

REBUILD = "rebuild it: glac build"

_END = struct.Struct("<4s4H2IH")  # end of central directory
_ENTRY = struct.Struct("<4s6H3I5H2I")  # central directory entry
_LOCAL = struct.Struct("<4s5H3I2H")  # header before a member's bytes
_MAX_COMMENT = 65535
_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 1


def is_zip(path: Path) -> bool:
    """Whether a pack at ``path`` is, or would be, one file."""
    return path.suffix == ".zip"


def read_member(path: Path, member: str, limit: int) -> bytes:
    """One file of a pack, at most ``limit`` + 1 bytes of it.

    Raises:
        PackError: there is no such file, it is not an ordinary one, or the zip is broken.
    """
    try:
        if path.is_dir():
            return _read_from_folder(path, member, limit)
        if not path.exists():
            raise PackError(f"{path}: no such pack", hint="make it: glac build")
        return _read_from_zip(path, member, limit)
    except OSError as error:
        raise PackError(
            f"{path}: {member}: cannot be read ({error.strerror or error})", hint=REBUILD
        ) from None


def members(path: Path) -> list[str]:
    """The names of all files in a pack, also of those that a pack has no use for.

    Raises:
        PackError: it cannot be read, or the zip is broken.
    """
    try:
        if path.is_dir():
            files = (item for item in path.rglob("*") if item.is_symlink() or not item.is_dir())
            return sorted(item.relative_to(path).as_posix() for item in files)
        with path.open("rb") as file:
            return sorted(_entries(path, file.fileno()))
    except OSError as error:
        raise PackError(f"{path}: cannot be read ({error.strerror or error})") from None


# Folders.


def _read_from_folder(path: Path, member: str, limit: int) -> bytes:
    *folders, name = member.split("/")
    handles = [os.open(path, os.O_RDONLY | os.O_DIRECTORY)]
    try:
        for folder in folders:
            _want_kind(path, folder, handles[-1], stat.S_ISDIR, "a folder")
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            handles.append(os.open(folder, flags, dir_fd=handles[-1]))
        _want_kind(path, member, handles[-1], stat.S_ISREG, "an ordinary file")
        # Checked again by the flags, as it may have been exchanged; a pipe must not block.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.open(name, flags, dir_fd=handles[-1])
        handles.append(file)
        return _read_at(file, 0, min(limit + 1, os.fstat(file).st_size))
    finally:
        for handle in handles:
            os.close(handle)


def _want_kind(path: Path, member: str, folder: int, is_kind: object, what: str) -> None:
    mode = os.stat(member.rpartition("/")[2], dir_fd=folder, follow_symlinks=False).st_mode
    assert callable(is_kind)
    if not is_kind(mode):
        link = stat.S_ISLNK(mode)
        raise PackError(
            f"{path}: {member}: wanted {what}, got {'a link' if link else 'something else'}",
            hint="copy the pack with what its links lead to: cp -rL" if link else REBUILD,
        )


def _read_at(file: int, offset: int, size: int) -> bytes:
    """Up to ``size`` bytes; fewer only where the file ends."""
    parts = []
    while size > 0:
        part = os.pread(file, min(size, 1 << 26), offset)
        if not part:
            break
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return b"".join(parts)


# Zip files.


class _Entry(NamedTuple):
    method: int
    compressed: int
    offset: int


def _broken(path: Path, reason: str) -> PackError:
    return PackError(f"{path}: not a usable zip: {reason}", hint=REBUILD)


def _entries(path: Path, file: int) -> dict[str, _Entry]:
    """The table of contents, in which every name must be one that a pack can have."""
    length = os.fstat(file).st_size
    tail_size = min(length, _END.size + _MAX_COMMENT)
    tail = _read_at(file, length - tail_size, tail_size)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise _broken(path, "it has no table of contents, so it may be cut off")
    _, disk, first, here, count, size, offset, comment = _END.unpack_from(tail, at)
    if at + _END.size + comment != len(tail):
        raise _broken(path, "something follows its table of contents")
    if disk or first or here != count or 0xFFFFFFFF in (size, offset) or count == 0xFFFF:
        raise _broken(path, "it has several parts, or more than a pack needs")
    if offset + size != length - tail_size + at:
        raise _broken(path, "its table of contents is not where it says")
    table = _read_at(file, offset, size)
    found: dict[str, _Entry] = {}
    place = 0
    for _ in range(count):
        if place + _ENTRY.size > len(table):
            raise _broken(path, "its table of contents is cut off")
        values = _ENTRY.unpack_from(table, place)
        magic, made, _, flags, method, _, _, _, packed, full, named, extra, note = values[:13]
        if magic != b"PK\x01\x02":
            raise _broken(path, "its table of contents is damaged")
        mode, start = values[15] >> 16, values[16]
        raw = table[place + _ENTRY.size : place + _ENTRY.size + named]
        place += _ENTRY.size + named + extra + note
        name = raw.decode("utf-8", "backslashreplace")
        unix = made >> 8 == 3
        if name == f"{CUBINS}/" and full == 0:
            continue
        if not MEMBER.fullmatch(name):
            raise _broken(path, f"a pack holds no {name[:100]!r}")
        if name in found:
            raise _broken(path, f"it has {name} twice")
        if unix and stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise _broken(path, f"{name} is a link or a device")
        if flags & _ENCRYPTED or method not in (_STORED, _DEFLATED):
            raise _broken(
                path, f"{name} is encrypted or compressed in a way that packs do not use"
            )
        found[name] = _Entry(method, packed, start)
    return found


def _read_from_zip(path: Path, member: str, limit: int) -> bytes:
    with path.open("rb") as opened:
        file = opened.fileno()
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise PackError(f"{path}: wanted a folder or a zip, got something else", hint=REBUILD)
        entry = _entries(path, file).get(member)
        if entry is None:
            raise PackError(f"{path}: {member}: not in this zip", hint=REBUILD)
        header = _read_at(file, entry.offset, _LOCAL.size)
        if len(header) < _LOCAL.size or header[:4] != b"PK\x03\x04":
            raise _broken(path, f"{member} is not where its table of contents says")
        values = _LOCAL.unpack(header)
        method, named, extra = values[3], values[9], values[10]
        if (
            method != entry.method
            or _read_at(file, entry.offset + _LOCAL.size, named) != member.encode()
        ):
            raise _broken(path, f"{member} is not where its table of contents says")
        start = entry.offset + _LOCAL.size + named + extra
        # A stored member has its size; a compressed one can only grow so little.
        most = min(entry.compressed, limit + 1 + (limit >> 3) + 1024)
        data = _read_at(file, start, most)
    if entry.method == _STORED:
        return data[: limit + 1]
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, limit + 1)
    except zlib.error as error:
        raise PackError(
            f"{path}: {member}: cannot be decompressed ({error})", hint=REBUILD
        ) from None


def zip_bytes(files: Mapping[str, bytes]) -> bytes:
    """A zip of ``files``, the same bytes for the same files: sorted, without dates."""
    body, table = bytearray(), bytearray()
    for name in sorted(files):
        data, raw = files[name], name.encode()
        deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        packed = deflate.compress(data) + deflate.flush()
        method = _DEFLATED if len(packed) < len(data) else _STORED
        packed = packed if method == _DEFLATED else data
        # Version 2.0, no flags, 1980-01-01 00:00.
        common = (20, 0, method, 0, 0x21, zlib.crc32(data), len(packed), len(data), len(raw), 0)
        table += _ENTRY.pack(
            b"PK\x01\x02", 3 << 8 | 20, *common, 0, 0, 0, (stat.S_IFREG | 0o644) << 16, len(body)
        )
        table += raw
        body += _LOCAL.pack(b"PK\x03\x04", *common) + raw + packed
    end = _END.pack(b"PK\x05\x06", 0, 0, len(files), len(files), len(table), len(body), 0)
    return bytes(body + table + end)
