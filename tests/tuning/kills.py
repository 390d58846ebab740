"""Kill tuners and their workers at random, and look at what is left.

    python -m tests.tuning.kills --kills 200

A study of a recorded table runs with two workers and is started again and again; each time, after
a random while, one of its processes gets SIGKILL: the tuner, a worker, or one that measures or
compiles. After every kill the study must open, hold every result it held before, and lack at most
the candidates that were running; the YAML must be absent or whole. In the end the result must be
that of a study nobody disturbed, and each candidate must have been counted once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glac.tuned import load_tuned
from glac.tuning.storage import open_storage
from glac.tuning.study import FINALS, import_optuna

WORKERS = 2
HEADER = "B,T,H,K,V,gate,config,status,early_stop,us,noise,error,hard_error,reason"
ROOT = Path(__file__).resolve().parents[2]


def small_table(path: Path, configs: int = 24) -> Path:
    """A table of small kernels, so that winners compile in a second; one fails, one is best."""
    lines = [HEADER]
    slugs = [
        f"c{chunk}_bv16_w{warps}_s{stages}"
        for chunk in (16, 32, 64, 128)
        for warps in (2, 4, 8)
        for stages in (1, 2, 3, 4)
    ][:configs]
    for index, slug in enumerate(slugs):
        row = f"1,256,1,16,16,vector,{slug}"
        if index == 3:
            lines.append(f"{row},illegal-access,,,,,,worker died of SIGABRT")
        else:
            us = 40.0 if index == configs // 2 else 60.0 + index
            lines.append(f"{row},ok,,{us},0.01,2e-3,2e-3,")
    path.write_text("\n".join(lines) + "\n")
    return path


def command(
    table: Path, storage: str, out: Path, log: Path, sleep: float, *more: str
) -> list[str]:
    words = ["-m", "glac", "tune", "--gpu", "h100", "--replay", table, "--storage", storage]
    words += ["--out", out, "--replay-log", log, "--replay-sleep", sleep, "--json", *more]
    return [sys.executable, *map(str, words)]


def start(words: list[str]) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )


def children(pid: int) -> list[int]:
    """All living descendants of a process."""
    found = []
    for child in _lists().get(pid, []):
        found += [child, *children(child)]
    return found


def _lists() -> dict[int, list[int]]:
    table: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    table.setdefault(int(fields[1]), []).append(int(entry.name))
    return table


def wait_gone(pids: list[int], seconds: float = 20.0) -> None:
    """Wait for processes that end with the one that was killed."""
    end = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() and _alive(pid) for pid in pids):
        if time.monotonic() > end:
            raise AssertionError(f"processes {pids} outlive the tuner")
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class State:
    """What a storage holds of the study.

    Attributes:
        done: configs with a result, each as often as it has one.
        lost: trials that were closed without a result.
        running: trials that nobody closed yet.
    """

    done: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    running: int = 0


def look(storage: str) -> State:
    """Open the storage as a tuner would."""
    optuna = import_optuna()
    state = State()
    with open_storage(optuna, storage) as opened:
        for study in opened.get_all_studies():
            if study.study_name.endswith(FINALS):
                continue
            for trial in opened.get_all_trials(study._study_id, deepcopy=False):
                if trial.state is optuna.trial.TrialState.COMPLETE:
                    state.done[trial.user_attrs["config"]] += 1
                elif trial.state is optuna.trial.TrialState.FAIL:
                    state.lost += 1
                else:
                    state.running += 1
    return state


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a YAML without what names the moment."""
    rows = []
    for row in load_tuned(path).rows:
        data = row.to_dict()
        data.pop("provenance", None)
        rows.append(data)
    return rows


def kill_one(process: subprocess.Popen[str], chance: random.Random) -> str:
    """Kill the tuner, or a worker, or a measuring process; which."""
    below = [p for p in children(process.pid) if p != os.getpid()]
    target = chance.choice([process.pid, *below])
    what = "tuner" if target == process.pid else "worker"
    with contextlib.suppress(OSError):
        os.kill(target, signal.SIGKILL)
    return what


def check(storage: str, out: Path, before: State, kills: int) -> State:
    """What must hold after each kill."""
    now = look(storage)
    missing = before.done.keys() - now.done.keys()
    assert not missing, f"results were lost: {missing}"
    twice = [slug for slug, count in now.done.items() if count > 1]
    assert not twice, f"counted twice: {twice}"
    # Of each worker the candidate it measures, and the one it took meanwhile, or told just now.
    assert now.running <= 2 * WORKERS, f"{now.running} trials are open, of {WORKERS} workers"
    if out.exists():
        load_tuned(out)
    return now


def run(
    folder: Path, storage: str, kills: int, seed: int = 0, sleep: float = 0.15
) -> dict[str, Any]:
    """``kills`` kills, then the study to its end; what was seen.

    Raises:
        AssertionError: something was lost, counted twice, or came out differently.
    """
    chance = random.Random(seed)
    table = small_table(folder / "h100_small.csv")
    log, quiet_log = folder / "tried.log", folder / "quiet.log"
    out, quiet = folder / "h100.yaml", folder / "quiet.yaml"
    journal = str(folder / "quiet.journal")
    undisturbed = start(command(table, journal, quiet, quiet_log, 0.0))
    text, errors = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, (text[-2000:], errors)
    log.touch()
    words = command(table, storage, out, log, sleep, "--workers", str(WORKERS), "--lease", "5")
    state, seen = State(), Counter[str]()
    done, rounds, finished, studies, lost = 0, 0, 0, 1, 0
    while done < kills:
        if finished or len(state.done) >= 23:
            # It got to the end in spite of us: another study of the same kind, beside the first.
            finished, studies, lost = 0, studies + 1, lost + look(storage).lost
            _forget(storage, out)
            log.write_text("")
            state = State()
        process = start(words)
        time.sleep(chance.uniform(0.3, 2.6))
        if process.poll() is not None:
            finished += 1
            process.communicate()
            continue
        below: set[int] = set()
        for _ in range(chance.choice((1, 1, 2))):
            below.update(children(process.pid))
            seen[kill_one(process, chance)] += 1
            done += 1
            time.sleep(chance.uniform(0.0, 0.3))
            # A worker that died is started again: find the new one too, with the tuner held still.
            with contextlib.suppress(OSError):
                process.send_signal(signal.SIGSTOP)
                below.update(children(process.pid))
                process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGSTOP)
        below.update(children(process.pid))
        process.kill()
        wait_gone(list(below))
        process.communicate()
        state = check(storage, out, state, done)
        rounds += 1
        _check_log(log, state, done + rounds)
    process = start(words)
    text, errors = process.communicate(timeout=300)
    assert process.returncode == 0, (process.returncode, text[-2000:], errors)
    state = check(storage, out, state, done)
    assert state.running == 0
    assert len(state.done) == 24
    assert rows_of(out) == rows_of(quiet), "the result differs from that of an undisturbed study"
    data = json.loads(text)["data"]
    assert data["results"][0]["tried"] == 24
    return {"kills": dict(seen), "lost_trials": lost + state.lost, "studies": studies}


def _check_log(log: Path, state: State, kills: int) -> None:
    """A candidate tried without a result is one that was running when something died."""
    tried = Counter(line.split()[1] for line in log.read_text().splitlines() if " " in line)
    unknown = state.done.keys() - tried.keys()
    assert not unknown, f"results of candidates that nobody tried: {unknown}"
    wasted = sum(tried.values()) - sum(state.done.values())
    # A kill of the tuner, with which each round ends, costs what both workers were trying; a kill
    # of one process costs one trial, or has it tried once more.
    assert wasted <= WORKERS * kills, f"{wasted} trials without a result after {kills} kills"


def _forget(storage: str, out: Path) -> None:
    """Delete the studies of a storage, and the YAML."""
    optuna = import_optuna()
    out.unlink(missing_ok=True)
    with open_storage(optuna, storage) as opened:
        for study in list(opened.get_all_studies()):
            opened.delete_study(study._study_id)


@contextlib.contextmanager
def work_folder(path: Path | None) -> Iterator[Path]:
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--storage", help="URL or path; a journal in the folder if left out")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    started = time.monotonic()
    with work_folder(options.folder) as folder:
        storage = options.storage or str(folder / "s.journal")
        seen = run(folder, storage, options.kills, options.seed)
    print(json.dumps({**seen, "seconds": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    main()
