"""Files that are either the old or the new content, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def sync_folder(path: Path) -> None:
    """Make a rename inside ``path`` durable. Best effort: some file systems cannot."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Replace the content of ``path`` by ``data``, all of it or nothing."""
    path = Path(path)
    # Beside the target, because a rename does not cross file systems; with a fresh random name,
    # because another process may write the same target. Its mode obeys the umask, as mkstemp's
    # does not.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path | str, text: str) -> None:
    """Replace the content of ``path`` by ``text`` in UTF-8, all of it or nothing."""
    write_bytes(path, text.encode())
