"""``glac tune-proxy``: one study storage for many machines, over gRPC."""

from __future__ import annotations

import contextlib
import signal
import threading
from pathlib import Path

import click

from glac import cli
from glac.errors import MissingEnvironmentError, StudyError


@click.command("tune-proxy")
@click.argument("storage")
@click.option("--host", default="localhost", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(1, 65535), default=13000, show_default=True, help="To listen on."
)
@cli.common_options
def proxy_command(storage: str, host: str, port: int) -> None:
    """Serve the study in STORAGE to tuners on other machines until it is stopped.

    STORAGE is a file, made if it is not there, or the URL of a PostgreSQL database. The tuners use
    it as --storage grpc://HOST:PORT. There is no password: listen on an address that only your
    machines reach.
    """
    from glac.tuning.storage import is_sqlite, is_url, open_sqlite, open_storage, shown
    from glac.tuning.study import import_optuna

    optuna = import_optuna()
    try:
        from optuna.storages._grpc.server import make_server
    except ImportError as error:
        raise MissingEnvironmentError(
            f"a gRPC proxy needs grpcio and protobuf ({error})", hint="pip install 'glac[fleet]'"
        ) from None
    path = Path(storage)
    # Optuna's proxy does not support journals, whose trials belong to threads.
    if not is_url(storage) and path.exists() and not is_sqlite(path):
        raise StudyError(
            f"{path}: wanted a file that a proxy made, or none; got another one",
            hint="a journal serves the processes of one machine without a proxy",
        )
    with contextlib.ExitStack() as stack:
        if is_url(storage):
            opened = stack.enter_context(open_storage(optuna, storage))
        else:
            opened = open_sqlite(optuna, path)
        try:
            server = make_server(opened, host, port)
        except RuntimeError as error:
            raise MissingEnvironmentError(
                f"cannot listen on {host}:{port} ({error})", hint="choose another --port"
            ) from None
        stopped = threading.Event()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: stopped.set())
        server.start()
        cli.progress(f"serving {shown(storage)} as grpc://{host}:{port}")
        try:
            while not stopped.wait(0.5):
                pass
        finally:
            server.stop(grace=2).wait()
    cli.emit({"storage": shown(storage), "host": host, "port": port}, "")
