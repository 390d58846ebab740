"""Real processes that crash, hang or talk nonsense: each is an outcome, and the study goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from glac.configs import ChunkKernelConfig, ForwardConfig
from glac.errors import StudyError
from glac.problem import Op
from glac.tuning.evaluate import CRASHED, ERROR, HUNG, ILLEGAL, OK, OUT_OF_MEMORY, WRONG
from glac.tuning.space import Space, make_problem
from glac.tuning.study import run_study
from glac.tuning.worker import WorkerEvaluator, problem_from_dict, problem_to_dict

PROBLEM = make_problem((1, 64, 1, 16, 16))

# The chunk says how a candidate behaves, the warps say which one it is.
SESSION = """
import os, sys, time
from glac.tuning.evaluate import Device, Outcome, Yardstick

class Odd:
    def to_dict(self):
        return {"status": "ok", "us": "fast"}

class Session:
    def __init__(self, fail_start=False, fail_prepare="", log=""):
        if fail_start:
            raise RuntimeError("no such device")
        self.fail_prepare, self.log, self.well = fail_prepare, log, True

    def device(self):
        return Device("fake", "1.0", "2.0")

    def prepare(self, problem, op):
        print("noise on stdout")
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()}\\n")
        if self.fail_prepare == "raise":
            raise ValueError("too large")
        if self.fail_prepare == "die":
            os._exit(9)
        return Yardstick(0.001)

    def evaluate(self, config, best_us):
        what, tag = config.fwd.num_stages, config.fwd.num_warps
        if config.fwd.chunk == 16:
            return Outcome("ok", us=100.0 + tag + (0 if best_us is None else 0.5), error=0.001)
        if config.fwd.chunk == 32:
            if what == 1:
                os._exit(3)
            if what == 2:
                sys.stderr.write("CUDA error: an illegal memory access\\n")
                sys.stderr.flush()
                os.abort()
            if what == 3:
                time.sleep(3600)
            if tag == 8:
                raise MemoryError("CUDA out of memory. Tried to allocate 80 GiB")
            raise ValueError("cannot load")
        if config.fwd.chunk == 64:
            if what == 1:
                for fd in range(3, 12):
                    try:
                        os.write(fd, b"garbage\\n")
                    except OSError:
                        pass
                return Outcome("ok", us=1.0)
            if what == 2:
                return Odd()
            if what == 3:
                self.well = False
                raise RuntimeError("CUDA error: unspecified launch failure")
            return Outcome("wrong", error=0.5, reason="error 0.5")
        raise SystemError

    def compare(self, configs, rounds):
        if any(c.fwd.block_v == 32 for c in configs):
            os._exit(5)
        return [[100.0 + c.fwd.num_warps] * rounds for c in configs]

    def healthy(self):
        return self.well

def make(**arguments):
    return Session(**arguments)
"""


def config(chunk: int, stages: int = 1, warps: int = 4, block_v: int = 16) -> ForwardConfig:
    return ForwardConfig(ChunkKernelConfig(chunk, block_v, warps, stages))


GOOD = config(16)
MakeWorker = Callable[..., WorkerEvaluator]


@pytest.fixture
def make_worker(tmp_path: Path) -> Iterator[MakeWorker]:
    (tmp_path / "fake_session.py").write_text(SESSION)
    made: list[WorkerEvaluator] = []

    def make(
        timeout: float = 20.0, start_timeout: float = 60.0, **arguments: object
    ) -> WorkerEvaluator:
        worker = WorkerEvaluator(
            arguments,
            factory="fake_session:make",
            timeout=timeout,
            start_timeout=start_timeout,
            env={"PYTHONPATH": str(tmp_path)},
        )
        made.append(worker)
        return worker

    yield make
    for worker in made:
        worker.close()


def test_one_process_serves_many_requests(make_worker: MakeWorker) -> None:
    worker = make_worker()
    assert worker.device().name == "fake"
    assert worker.prepare(PROBLEM, Op.FORWARD).error == 0.001
    first = worker.evaluate(GOOD, None)
    second = worker.evaluate(config(16, warps=8), 90.0)
    assert (first.status, first.us, second.us) == (OK, 104.0, 108.5)
    assert worker.compare([GOOD, config(16, warps=8)], 3) == [[104.0] * 3, [108.0] * 3]
    assert worker.starts == 1


@pytest.mark.parametrize(
    ("bad", "status", "reason"),
    [
        (config(32, 1), CRASHED, "exit status 3"),
        (config(32, 2), ILLEGAL, "SIGABRT: CUDA error: an illegal memory access"),
        (config(32, 3), HUNG, "no answer in 1 s"),
        (config(64, 1), CRASHED, "nonsense"),
        (config(64, 2), CRASHED, "nonsense"),
        (config(64, 3), CRASHED, "unspecified launch failure"),
    ],
)
def test_a_bad_candidate_costs_a_process_not_the_study(
    make_worker: MakeWorker, bad: ForwardConfig, status: str, reason: str
) -> None:
    worker = make_worker(timeout=1.0 if status == HUNG else 20.0)
    worker.prepare(PROBLEM, Op.FORWARD)
    outcome = worker.evaluate(bad, None)
    assert outcome.status == status
    assert reason in outcome.reason
    assert worker.evaluate(GOOD, None).ok
    assert worker.starts == 2


def test_a_refused_candidate_costs_nothing(make_worker: MakeWorker) -> None:
    worker = make_worker()
    worker.prepare(PROBLEM, Op.FORWARD)
    assert worker.evaluate(config(32, 4), None).status == ERROR
    assert "cannot load" in worker.evaluate(config(32, 4), None).reason
    starved = worker.evaluate(config(32, 4, warps=8), None)
    assert (starved.status, "80 GiB" in starved.reason) == (OUT_OF_MEMORY, True)
    assert worker.evaluate(config(64, 4), None).status == WRONG
    assert worker.evaluate(config(128), None).status == ERROR
    assert worker.starts == 1


def test_a_comparison_that_dies_twice_is_empty(make_worker: MakeWorker) -> None:
    worker = make_worker()
    worker.prepare(PROBLEM, Op.FORWARD)
    assert worker.compare([GOOD, config(16, block_v=32)], 2) == [[], []]
    assert worker.evaluate(GOOD, None).ok


def test_a_worker_that_cannot_start_is_an_error(make_worker: MakeWorker) -> None:
    with pytest.raises(StudyError, match="no such device"):
        make_worker(fail_start=True).device()
    with pytest.raises(StudyError, match="too large"):
        make_worker(fail_prepare="raise").prepare(PROBLEM, Op.FORWARD)
    with pytest.raises(StudyError, match="exit status 9"):
        make_worker(fail_prepare="die").prepare(PROBLEM, Op.FORWARD)


def test_a_study_survives_all_of_it(make_worker: MakeWorker, tmp_path: Path) -> None:
    bad = [config(32, s) for s in (1, 2, 3, 4)] + [config(64, s) for s in (1, 2, 3, 4)]
    good = [config(16, warps=w) for w in (2, 4, 8)]
    space = Space(PROBLEM, good[1], (*bad[:4], *good, *bad[4:]))
    worker = make_worker(timeout=1.5)
    report = run_study([space], worker, tmp_path / "s.journal", gpu="h100", effort="quick")
    result = report.results[0]
    assert result.complete
    assert report.device.name == "fake"
    assert result.counts == {
        "ok": 3, "crashed": 4, "illegal-access": 1, "hung": 1, "error": 1, "wrong": 1,
        "pruned": 0, "uncompiled": 0,
    }  # fmt: skip
    assert result.choice is not None
    assert result.choice.config == good[0]
    assert result.choice.compared


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "fake_session.py").write_text(SESSION)
    log = tmp_path / "pids"
    code = (
        "import os, sys, threading, time\n"
        "from glac.problem import Op\n"
        "from glac.tuning.worker import WorkerEvaluator\n"
        "from tests_problem import PROBLEM, HANGS\n"
        f"w = WorkerEvaluator({{'log': {str(log)!r}}}, factory='fake_session:make',"
        f" env={{'PYTHONPATH': {str(tmp_path)!r}}})\n"
        "w.prepare(PROBLEM, Op.FORWARD)\n"
        "threading.Thread(target=w.evaluate, args=(HANGS, None), daemon=True).start()\n"
        "time.sleep(0.5)\n"
        "os._exit(0)\n"
    )
    (tmp_path / "tests_problem.py").write_text(
        "from glac.configs import ChunkKernelConfig, ForwardConfig\n"
        "from glac.tuning.space import make_problem\n"
        "PROBLEM = make_problem((1, 64, 1, 16, 16))\n"
        "HANGS = ForwardConfig(ChunkKernelConfig(32, 16, 4, 3))\n"
    )
    path = os.pathsep.join((str(tmp_path), *sys.path))
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=60,
    )
    pid = int(log.read_text())
    end = time.monotonic() + 20
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(pid)


def test_problems_travel_as_json() -> None:
    assert problem_from_dict(problem_to_dict(PROBLEM)) == PROBLEM
    with pytest.raises(StudyError, match="not a problem"):
        problem_from_dict({"spec": {}, "B": 1})
