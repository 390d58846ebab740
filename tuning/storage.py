"""Where a study is kept: a journal file, or a server that many machines share.

    studies/h100.journal            a file (the default); many processes of one machine
    grpc://host:13000               a proxy, `glac tune-proxy`, in front of a database
    postgresql://user@host/name     a PostgreSQL database
    study.db                        what `glac tune-proxy` makes, to be read when that has ended

A file is locked by the kernel while it is written, so a killed process never leaves a lock behind;
a last line that it tore is cut off by the next writer.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import random
import re
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from glac.errors import MissingEnvironmentError, StudyError

_TAIL = 1 << 20
_TRIES = 10
_SQLITE = b"SQLite format 3\0"


def is_url(where: Path | str) -> bool:
    """Whether ``where`` names a server instead of a file."""
    return isinstance(where, str) and "://" in where


def shown(where: Path | str) -> str:
    """``where`` without a password, for messages and reports."""
    if not is_url(where):
        return str(where)
    parts = urlsplit(str(where))
    if parts.password is None:
        return str(where)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{parts.username}:***@{host}").geturl()


class FileLock:
    """The journal file's lock: held by the kernel for a process, and freed when that dies.

    While it is held, a torn last line is cut off, for it would spoil the next one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._threads = threading.Lock()
        self._file: BinaryIO | None = None

    def acquire(self) -> bool:
        self._threads.acquire()
        try:
            self._file = self._path.open("r+b")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            _drop_torn_line(self._file)
        except BaseException:
            self._close()
            self._threads.release()
            raise
        return True

    def release(self) -> None:
        self._close()
        self._threads.release()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _drop_torn_line(file: BinaryIO) -> None:
    """Cut off a last line that a killed process left half written."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    back = min(size, _TAIL)
    file.seek(size - back)
    tail = file.read(back)
    file.truncate(size - back + tail.rfind(b"\n") + 1)
    file.flush()


def _open_journal(optuna: Any, path: Path, create: bool) -> Any:
    try:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()
        elif not path.is_file():
            raise StudyError(f"{path}: no study here", hint="name the journal of a `glac tune`")
        lock = FileLock(path)
        if os.access(path, os.W_OK):
            lock.acquire()  # heals a torn line before anybody reads it
            lock.release()
    except OSError as error:
        raise StudyError(f"{path}: cannot be written ({error.strerror})") from None
    backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=lock)
    try:
        return optuna.storages.JournalStorage(backend)
    except Exception as error:  # json and key errors of a foreign file
        raise StudyError(
            f"{path}: not a study journal ({type(error).__name__}: {error})",
            hint="move it away, or choose another --storage",
        ) from None


def is_sqlite(path: Path) -> bool:
    """Whether a file is an SQLite database."""
    try:
        with path.open("rb") as file:
            return file.read(len(_SQLITE)) == _SQLITE
    except OSError:
        return False


def open_sqlite(optuna: Any, path: Path) -> Any:
    """The storage in an SQLite file, which is made if it is not there. For one process at a time.

    Raises:
        StudyError: it cannot be used.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"{path}: cannot be written ({error.strerror})") from None
    return optuna.storages.get_storage(_open_database(optuna, f"sqlite:///{path.resolve()}"))


def _open_grpc(optuna: Any, url: str) -> Any:
    parts = urlsplit(url)
    if not parts.hostname or parts.port is None or parts.path not in ("", "/"):
        raise StudyError(f"{url}: wanted grpc://HOST:PORT", hint="such as grpc://localhost:13000")
    if importlib.util.find_spec("grpc") is None:
        raise MissingEnvironmentError(
            "a study behind a gRPC proxy needs grpcio and protobuf",
            hint="pip install 'glac[fleet]'",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is experimental since Optuna 4.2, and works
        proxy = optuna.storages.GrpcStorageProxy(host=parts.hostname, port=parts.port)
    try:
        proxy.wait_server_ready(timeout=20)
    except Exception as error:
        raise StudyError(
            f"{url}: no proxy answers there ({error})",
            hint="start one: glac tune-proxy study.db",
        ) from None
    return proxy


def _open_database(optuna: Any, url: str) -> Any:
    scheme, _, rest = url.partition("://")
    if scheme == "postgresql" and importlib.util.find_spec("psycopg2") is None:
        if importlib.util.find_spec("psycopg") is None:
            raise MissingEnvironmentError(
                "a study in PostgreSQL needs psycopg", hint="pip install 'glac[fleet]'"
            )
        url = f"postgresql+psycopg://{rest}"
    engine: dict[str, object] = {"pool_pre_ping": True}
    if scheme.startswith("postgresql"):
        # A server of a machine without a locale may keep plain bytes, which psycopg leaves so.
        engine["connect_args"] = {"client_encoding": "utf8"}
    tries = 0
    while True:
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs=engine)
        except Exception as error:
            tries += 1
            # Of workers that make the tables of a new database together, all but one fail.
            together = re.search(r"already exists|duplicate key|UniqueViolation", str(error))
            if together and tries < _TRIES:
                time.sleep(random.uniform(0.2, 1.0))
                continue
            reason = " ".join(str(error).split())[:300]
            raise StudyError(
                f"{shown(url)}: cannot be used ({reason})",
                hint="the database must exist, and the user must be allowed to make tables in it",
            ) from None


@contextlib.contextmanager
def open_storage(optuna: Any, where: Path | str, create: bool = True) -> Iterator[Any]:
    """The storage at ``where``; any number of processes may have it open.

    Args:
        optuna: the module.
        where: path of a journal, or a URL.
        create: make a journal that is not there.

    Raises:
        StudyError: it is not a storage, or cannot be reached or written.
        MissingEnvironmentError: what the URL needs is not installed.
    """
    if not is_url(where):
        path = Path(where)
        if is_sqlite(path):
            yield open_sqlite(optuna, path)
        else:
            yield _open_journal(optuna, path, create)
        return
    url = str(where)
    scheme = url.partition("://")[0]
    if scheme == "grpc":
        proxy = _open_grpc(optuna, url)
        try:
            yield proxy
        finally:
            proxy.close()
        return
    if scheme.partition("+")[0] != "postgresql":
        raise StudyError(
            f"{shown(where)}: wanted a file, grpc://HOST:PORT or postgresql://..., "
            f"got {scheme}://",
            hint="on one machine a file serves many processes: --storage study.journal",
        )
    yield optuna.storages.get_storage(_open_database(optuna, url))
