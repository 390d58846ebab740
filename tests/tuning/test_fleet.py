"""Many real processes on one study, some of them killed: nothing lost, nothing counted twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glac.errors import MissingEnvironmentError, StudyError
from glac.gpus import GPUS
from glac.problem import Op
from glac.tuning.board import Board
from glac.tuning.fleet import Plan
from glac.tuning.space import make_problem, space
from glac.tuning.storage import is_url, open_storage, shown
from glac.tuning.warm import warmed
from glac.tuning.worker import CUDA_SESSION
from tests.tuning import kills

optuna = pytest.importorskip("optuna")

POSTGRES = os.environ.get("GLAC_TEST_POSTGRES", "")
STORAGES = ("journal", "grpc", "postgresql")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def proxy(database: Path) -> Iterator[str]:
    """A running ``glac tune-proxy``."""
    pytest.importorskip("grpc", reason="grpcio is not installed")
    port = free_port()
    words = ["-m", "glac", "tune-proxy", str(database), "--host", "127.0.0.1", "--port", str(port)]
    process = kills.start([sys.executable, *words])
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=20)
        assert process.returncode == 0


@contextlib.contextmanager
def a_storage(kind: str, folder: Path) -> Iterator[str]:
    if kind == "journal":
        yield str(folder / "s.journal")
    elif kind == "grpc":
        with proxy(folder / "s.db") as url:
            yield url
    else:
        if not POSTGRES:
            pytest.skip("no PostgreSQL server: GLAC_TEST_POSTGRES is not set, .ci/run sets it")
        pytest.importorskip("psycopg", reason="psycopg is not installed")
        kills._forget(POSTGRES, folder / "no.yaml")
        yield POSTGRES
        kills._forget(POSTGRES, folder / "no.yaml")


def tuned(process: subprocess.Popen[str]) -> dict[str, Any]:
    text, errors = process.communicate(timeout=120)
    assert process.returncode == 0, (text[-2000:], errors[-2000:])
    data: dict[str, Any] = json.loads(text)["data"]
    return data


@pytest.mark.parametrize("kind", STORAGES)
def test_tuners_of_several_machines_share_a_study(kind: str, tmp_path: Path) -> None:
    """Three commands, as on three machines: each ends with the whole result."""
    table = kills.small_table(tmp_path / "h100_small.csv")
    logs = [tmp_path / f"{i}.log" for i in range(3)]
    with a_storage(kind, tmp_path) as storage:
        words = ["-m", "glac", "tune", "--replay", table, "--storage", storage, "--json"]
        # Long enough that a command which starts seconds after the others still has its part.
        processes = [
            kills.start([sys.executable, *map(str, words), "--replay-sleep", "0.6",
                         "--replay-log", str(log)])
            for log in logs
        ]  # fmt: skip
        results = [tuned(process) for process in processes]
        state = kills.look(storage)
    assert [r["results"][0]["tried"] for r in results] == [24] * 3
    assert len({json.dumps(r["results"][0]["us"]) for r in results}) == 1
    assert {r["results"][0]["config_id"] for r in results} == {"c32_bv16_w2_s1"}
    tried = Counter(line.split()[1] for log in logs for line in log.read_text().splitlines())
    assert set(tried.values()) == {1}, "a candidate was timed twice"
    assert state.done == tried
    assert all(len(log.read_text().splitlines()) >= 4 for log in logs), "one did all the work"


@pytest.mark.parametrize(
    ("kind", "count"), [("journal", 12), ("grpc", 4), ("postgresql", 4)], ids=STORAGES
)
def test_random_kills_cost_only_what_was_running(kind: str, count: int, tmp_path: Path) -> None:
    """See ``kills.py``; 200 of them take some minutes."""
    pytest.importorskip("triton")
    with a_storage(kind, tmp_path) as storage:
        seen = kills.run(tmp_path, storage, count, seed=7)
    assert sum(seen["kills"].values()) >= count


OPENING = """
import sys
import optuna
from glac.gpus import GPUS
from glac.problem import Op
from glac.tuning.board import Board
from glac.tuning.fleet import Plan
from glac.tuning.space import make_problem, space
from glac.tuning.storage import open_storage

optuna.logging.set_verbosity(optuna.logging.ERROR)
with open_storage(optuna, sys.argv[1]) as storage:
    board = Board(optuna, storage, "study")
    claim = board.claim(sys.argv[2])
    assert claim is not None
    assert board.tell(claim, 1.0, True)
    board.close()
"""


def test_workers_that_begin_together_make_a_new_database_usable(tmp_path: Path) -> None:
    with a_storage("postgresql", tmp_path) as url:
        import psycopg

        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP DATABASE IF EXISTS glac_new")
            connection.execute("CREATE DATABASE glac_new")
        fresh = f"{url.rpartition('/')[0]}/glac_new"
        begun = [kills.start([sys.executable, "-c", OPENING, fresh, f"c{i}"]) for i in range(4)]
        for process in begun:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors[-1000:]
        assert set(kills.look(fresh).done) == {f"c{i}" for i in range(4)}


@pytest.mark.parametrize(
    ("workers", "how"), [(1, signal.SIGINT), (2, signal.SIGTERM)], ids=["ctrl-c", "terminated"]
)
def test_an_interrupted_tuner_gives_back_what_it_held(
    tmp_path: Path, workers: int, how: signal.Signals
) -> None:
    table = kills.small_table(tmp_path / "h100_small.csv")
    storage, log = tmp_path / "s.journal", tmp_path / "log"
    words = ["-m", "glac", "tune", "--replay", table, "--storage", storage, "--json"]
    words += ["--replay-log", log, "--workers", workers]
    process = kills.start([sys.executable, *map(str, words), "--replay-sleep", "0.4"])
    end = time.monotonic() + 60
    while not log.exists() or log.read_text().count("\n") < 3:
        assert time.monotonic() < end
        time.sleep(0.02)
    below = kills.children(process.pid)
    assert len(below) >= workers
    process.send_signal(how)
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 130, (text, errors)
    document = json.loads(text)
    assert document["error"]["code"] == "interrupted"
    kept = document["data"]["results"][0]["tried"]
    assert kept >= 3
    kills.wait_gone(below)
    state = kills.look(str(storage))
    assert (state.running, sum(state.done.values())) == (0, kept)
    again = tuned(kills.start([sys.executable, *map(str, words)]))
    assert again["results"][0]["tried"] == 24
    tried = Counter(line.split()[1] for line in log.read_text().splitlines())
    assert sum(tried.values()) <= 24 + workers, "only what was running is tried again"


def test_each_worker_has_a_device_of_its_own(tmp_path: Path) -> None:
    tried = space(make_problem((16, 2048, 8, 128, 128)), GPUS["h100"], "quick")
    tried = warmed(tried, GPUS["h100"], incumbent=tried.configs[1])
    plan = Plan(
        [tried],
        {"pack": "p", "device": 0},
        CUDA_SESSION,
        "s.journal",
        {"gpu": "h100", "key": {Op.FORWARD: "a"}},
        [{tried.configs[1].slug: "spills 4096 bytes"}],
        60.0,
    )
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert json.loads(again.evaluator(3)._arguments)["device"] == 3
    reason = again.why_missing(tried.problem, tried.configs[1])
    assert reason == "spills 4096 bytes"
    assert again.why_missing(tried.problem, tried.configs[0]) is None


def test_a_dead_worker_of_this_machine_is_noticed_at_once(tmp_path: Path) -> None:
    with open_storage(optuna, tmp_path / "s.journal") as storage:
        mine, other = (Board(optuna, storage, "study") for _ in range(2))
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        machine = mine.owner.partition(":")[0]
        other.owner = f"{machine}:{dead.pid}:12345:abcdef"
        assert other.claim("one") is not None
        other.close()
        mine.refresh()
        assert (mine.running, mine.lost) == ({}, 1)
        claim = mine.claim("one")
        assert claim is not None
        assert mine.tell(claim, 1.0, True)
        assert not mine.tell(claim, 2.0, True), "a result counts once"


def test_a_silent_worker_of_another_machine_loses_its_candidate(tmp_path: Path) -> None:
    with open_storage(optuna, tmp_path / "s.journal") as storage:
        mine = Board(optuna, storage, "study", lease=0.5)
        alive, silent = (Board(optuna, storage, "study", lease=0.5) for _ in range(2))
        alive.owner, silent.owner = "elsewhere:1:1:a", "elsewhere:2:1:b"
        assert (kept := alive.claim("kept")) is not None
        assert (lost := silent.claim("lost")) is not None
        silent.close()  # renews its lease no more
        end = time.monotonic() + 10
        while "lost" in mine.running or not mine.lost:
            mine.refresh()
            assert time.monotonic() < end
            time.sleep(0.05)
        assert set(mine.running) == {"kept"}
        assert (again := mine.claim("lost")) is not None
        assert mine.tell(again, 1.0, True)
        assert not silent.tell(lost, 2.0, True), "it comes back too late"
        assert alive.tell(kept, 3.0, True)
        mine.refresh()
        assert {key: trial.value for key, trial in mine.done.items()} == {"lost": 1.0, "kept": 3.0}
        mine.close()
        alive.close()


def test_of_two_claims_the_first_stands_and_none_goes_beyond_the_limit(tmp_path: Path) -> None:
    with open_storage(optuna, tmp_path / "s.journal") as storage:
        one, two = (Board(optuna, storage, "study") for _ in range(2))
        assert one.claim("a", 2) is not None
        assert two.claim("a", 2) is None
        assert two.claim("b", 2) is not None
        three = Board(optuna, storage, "study")
        assert three.claim("c", 2) is None
        for board in (one, two, three):
            board.close()


def test_a_torn_line_is_healed_while_others_write(tmp_path: Path) -> None:
    path = tmp_path / "s.journal"
    with open_storage(optuna, path) as storage:
        board = Board(optuna, storage, "study")
        with path.open("ab") as file:
            file.write(b'{"op_code": 4, "worker')  # torn by a kill
        claim = board.claim("a")
        assert claim is not None
        assert board.tell(claim, 1.0, True)
        board.close()
    with open_storage(optuna, path) as storage:
        again = Board(optuna, storage, "study")
        again.refresh()
        assert set(again.done) == {"a"}


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ("mysql://host/name", "wanted a file, grpc://HOST:PORT or postgresql"),
        ("grpc://host", "wanted grpc://HOST:PORT"),
        ("postgresql://nobody:secret@127.0.0.1:1/none", "cannot be used"),
    ],
)
def test_storages_that_are_none_are_refused(where: str, wanted: str) -> None:
    with (
        pytest.raises((StudyError, MissingEnvironmentError)) as caught,
        open_storage(optuna, where),
    ):
        pass
    assert wanted in caught.value.message or isinstance(caught.value, MissingEnvironmentError)
    assert caught.value.hint
    assert "secret" not in caught.value.message


def test_passwords_are_not_shown() -> None:
    url = "postgresql://me:secret@host:5432/name"
    assert shown(url) == "postgresql://me:***@host:5432/name"
    assert is_url(url)
    assert not is_url("study.journal")


def test_a_proxy_refuses_a_journal(tmp_path: Path) -> None:
    journal = tmp_path / "s.journal"
    journal.write_text("")
    process = kills.start([sys.executable, "-m", "glac", "tune-proxy", str(journal)])
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (1, 3)
    assert "hint:" in errors
