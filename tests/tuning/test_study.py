"""Studies on replayed tables: nothing tried twice, nothing lost, the default hard to beat."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from glac.configs import ChunkKernelConfig, Config, ForwardConfig
from glac.errors import MissingEnvironmentError, StudyError
from glac.gpus import GPUS
from glac.problem import Gate, Op, Problem
from glac.tuning import study
from glac.tuning.evaluate import CRASHED, EFFORT, WRONG, Outcome, ReplayEvaluator, Yardstick
from glac.tuning.progress import Progress, duration
from glac.tuning.space import Space, make_problem, space
from glac.tuning.study import Report, decide, run_study

optuna = pytest.importorskip("optuna")

PROBLEM = make_problem((1, 64, 1, 64, 64))


def config(chunk: int, stages: int = 1, warps: int = 4) -> ForwardConfig:
    return ForwardConfig(ChunkKernelConfig(chunk, 32, warps, stages))


CONFIGS = tuple(config(c, s) for c in (16, 32, 64) for s in (1, 2, 3, 4))
DEFAULT = CONFIGS[5]
TINY = Space(PROBLEM, DEFAULT, CONFIGS)


def times(**special: float) -> dict[str, float | Outcome]:
    return {c.slug: special.get(c.slug, 200.0 + i) for i, c in enumerate(CONFIGS)}


def run(
    storage: Path,
    table: Mapping[str, float | Outcome],
    tried: Space = TINY,
    trials: int | None = None,
) -> tuple[Report, ReplayEvaluator]:
    evaluator = ReplayEvaluator(table)
    return run_study([tried], evaluator, storage, gpu="h100", trials=trials), evaluator


def test_every_candidate_is_tried_once_and_the_best_wins(tmp_path: Path) -> None:
    table = times(**{CONFIGS[9].slug: 100.0})
    report, evaluator = run(tmp_path / "s.journal", table)
    result = report.results[0]
    assert evaluator.calls == [c.slug for c in CONFIGS]
    assert result.complete
    assert result.choice is not None
    assert result.choice.config == CONFIGS[9]
    assert (result.choice.us, result.choice.default_us) == (100.0, 205.0)
    assert result.choice.compared


def test_the_same_command_again_measures_nothing(tmp_path: Path) -> None:
    first, _ = run(tmp_path / "s.journal", times())
    second, evaluator = run(tmp_path / "s.journal", {})
    assert evaluator.calls == []
    assert second.results[0].choice == first.results[0].choice
    assert second.results[0].outcomes == first.results[0].outcomes
    assert second.results[0].yardstick == first.results[0].yardstick == 1e-3


def test_failures_are_recorded_with_their_reason(tmp_path: Path) -> None:
    table = times()
    table[CONFIGS[0].slug] = Outcome(WRONG, error=0.4, reason="error 4e-01")
    table[CONFIGS[1].slug] = Outcome(CRASHED, reason="worker died of SIGABRT")
    del table[CONFIGS[2].slug]
    storage = tmp_path / "s.journal"
    report, _ = run(storage, table)
    result = report.results[0]
    assert result.counts["ok"] == len(CONFIGS) - 3
    assert result.outcomes[CONFIGS[0]].reason == "error 4e-01"
    assert result.choice is not None
    assert result.choice.config == DEFAULT, "201.. us do not beat 205 by more than noise"
    # They are in the journal as infeasible, with a finite value a sampler can learn from.
    again, evaluator = run(storage, {})
    assert evaluator.calls == []
    assert again.results[0].outcomes[CONFIGS[1]].status == CRASHED
    trials = _trials(storage)
    bad = next(t for t in trials if t.user_attrs["config"] == CONFIGS[1].slug)
    assert bad.state is optuna.trial.TrialState.COMPLETE
    assert 20 < bad.value < 21


def _trials(storage: Path) -> list[Any]:
    backend = optuna.storages.journal.JournalFileBackend(str(storage))
    opened = optuna.storages.JournalStorage(backend)
    (name,) = (n for n in optuna.get_all_study_names(opened) if not n.endswith("|finals"))
    return list(optuna.load_study(study_name=name, storage=opened).trials)


def test_ops_of_one_problem_are_studied_apart(tmp_path: Path) -> None:
    backward = space(PROBLEM, GPUS["h100"], "quick", Op.BACKWARD)
    table = times() | {c.slug: 300.0 - i for i, c in enumerate(backward.configs)}
    evaluator = ReplayEvaluator(table)
    storage = tmp_path / "s.journal"
    report = run_study([TINY, backward], evaluator, storage, gpu="h100")
    assert [result.op for result in report.results] == [Op.FORWARD, Op.BACKWARD]
    choice = report.results[1].choice
    assert choice is not None
    assert choice.config == backward.configs[-1]
    again = ReplayEvaluator({})
    assert run_study([backward, TINY], again, storage, gpu="h100").results == report.results[::-1]
    assert again.calls == []


@pytest.mark.parametrize("op", list(Op))
def test_a_sampler_searches_either_op(tmp_path: Path, op: Op) -> None:
    gate = Gate.VECTOR if op.serves(Gate.VECTOR) else Gate.SCALAR
    tried = space(make_problem((16, 2048, 8, 128, 128), gate), GPUS["h100"], op=op)
    table = {c.slug: 100.0 + i for i, c in enumerate(tried.configs)}
    trials = min(14, len(tried.configs) - 1)
    report, evaluator = run(tmp_path / "s.journal", table, tried, trials=trials)
    assert len(set(evaluator.calls)) == len(evaluator.calls) == trials
    assert report.results[0].complete


def test_nothing_works(tmp_path: Path) -> None:
    report, _ = run(tmp_path / "s.journal", {})
    assert report.results[0].choice is None
    assert report.results[0].complete


def test_a_failed_default_does_not_win(tmp_path: Path) -> None:
    table = times()
    table[DEFAULT.slug] = Outcome(WRONG, reason="wrong")
    report, _ = run(tmp_path / "s.journal", table)
    choice = report.results[0].choice
    assert choice is not None
    assert choice.config == CONFIGS[0]
    assert choice.default_us == 0.0


def test_uncompiled_candidates_are_left_out(tmp_path: Path) -> None:
    evaluator = ReplayEvaluator(times())
    report = run_study(
        [TINY],
        evaluator,
        tmp_path / "s.journal",
        gpu="h100",
        missing=lambda _, c: "too much shared memory" if c in CONFIGS[8:] else None,
    )
    assert report.results[0].counts["uncompiled"] == 4
    assert len(evaluator.calls) == 8


class Interrupting(ReplayEvaluator):
    """Ctrl-C at the fifth candidate."""

    def evaluate(self, config: Config, best_us: float | None) -> Outcome:
        if len(self.calls) == 4:
            raise KeyboardInterrupt
        return super().evaluate(config, best_us)


def test_ctrl_c_keeps_the_best_and_the_next_run_goes_on(tmp_path: Path) -> None:
    storage = tmp_path / "s.journal"
    table = times(**{CONFIGS[2].slug: 90.0, CONFIGS[7].slug: 80.0})
    report = run_study([TINY, TINY], Interrupting(table), storage, gpu="h100")
    assert report.interrupted
    assert len(report.results) == 1
    result = report.results[0]
    assert len(result.outcomes) == 4
    assert not result.complete
    assert result.choice is not None
    assert result.choice.config == CONFIGS[2]
    assert not result.choice.compared
    again, evaluator = run(storage, table)
    assert evaluator.calls == [c.slug for c in CONFIGS[4:]]
    choice = again.results[0].choice
    assert choice is not None
    assert choice.config == CONFIGS[7]


SLOW_STUDY = """
import sys, threading
from pathlib import Path
import test_study_shared as shared
from glac.tuning.evaluate import ReplayEvaluator
from glac.tuning.study import run_study

stopped = threading.Event()

class Slow(ReplayEvaluator):
    def evaluate(self, config, best_us):
        print(len(self.calls), flush=True)
        stopped.wait(0.05 if len(self.calls) < 5 else 60)
        return super().evaluate(config, best_us)

    def abort(self):
        stopped.set()

run_study([shared.TINY], Slow(shared.TABLE), Path(sys.argv[1]), gpu="h100")
"""
SHARED = """
from glac.configs import ChunkKernelConfig, ForwardConfig
from glac.tuning.space import Space, make_problem
CONFIGS = tuple(
    ForwardConfig(ChunkKernelConfig(c, 32, 4, s)) for c in (16, 32, 64) for s in (1, 2, 3, 4)
)
TINY = Space(make_problem((1, 64, 1, 64, 64)), CONFIGS[5], CONFIGS)
TABLE = {c.slug: 200.0 + i for i, c in enumerate(CONFIGS)}
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_study_goes_on_where_it_ended(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "test_study_shared.py").write_text(SHARED)
    storage = tmp_path / "s.journal"
    path = os.pathsep.join((str(tmp_path), *sys.path))
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_STUDY, str(storage)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        assert process.stdout
        assert next(line for line in process.stdout if line.strip() == "5")
        time.sleep(0.1)
        process.send_signal(how)
        process.wait(timeout=30)
    with storage.open("ab") as file:
        file.write(b'{"op_code": 4, "worker')  # a line the kill tore apart
    report, evaluator = run(storage, times())
    assert evaluator.calls == [c.slug for c in CONFIGS[5:]]
    assert report.results[0].complete
    states = [t.state.name for t in _trials(storage)]
    assert states.count("COMPLETE") == len(CONFIGS)
    assert 1 <= states.count("FAIL") <= 2, "what was tried, and what was taken meanwhile"
    assert "RUNNING" not in states


def test_a_foreign_journal_is_refused(tmp_path: Path) -> None:
    storage = tmp_path / "s.journal"
    storage.write_text('{"hello": "world"}\n')
    with pytest.raises(StudyError, match="journal"):
        run(storage, times())


def test_other_devices_and_toolchains_share_nothing(tmp_path: Path) -> None:
    storage = tmp_path / "s.journal"
    run(storage, times())
    evaluator = ReplayEvaluator(times())
    run_study([TINY], evaluator, storage, gpu="h100", key={Op.FORWARD: "triton 9"})
    assert len(evaluator.calls) == len(CONFIGS)


def test_a_large_space_is_searched(tmp_path: Path) -> None:
    gpu = GPUS["h100"]
    problem = make_problem((1, 4096, 4, 128, 256))
    large = space(problem, gpu)
    table: dict[str, float | Outcome] = {}
    for c in large.configs:
        assert isinstance(c, ForwardConfig)
        us = 100.0 + 40 * (c.fwd.chunk != 32) + 30 * (c.segment != 512) + 5 * c.fwd.num_stages
        table[c.slug] = us if c.fwd.num_warps != 2 else Outcome(WRONG, reason="wrong")
    storage = tmp_path / "s.journal"
    report, evaluator = run(storage, table, large, trials=16)
    result = report.results[0]
    assert len(evaluator.calls) == len(set(evaluator.calls)) == len(result.outcomes) == 16
    assert evaluator.calls[0] == large.default.slug
    assert result.choice is not None
    assert result.choice.us < 160
    more, evaluator = run(storage, table, large, trials=18)
    assert len(evaluator.calls) == 2
    assert len(more.results[0].outcomes) == 18


def test_the_default_stays_within_noise() -> None:
    default, other, third = CONFIGS[:3]
    steady: dict[Config, list[float]] = {
        default: [100.0] * 5,
        other: [99.5] * 5,
        third: [120.0] * 5,
    }
    assert decide(default, steady).config == default
    assert decide(default, {**steady, other: [98.0] * 5}).config == other
    noisy: dict[Config, list[float]] = {
        default: [100.0, 90, 110, 95, 105],
        other: [97.0, 88, 108, 93, 103],
    }
    assert decide(default, noisy).config == default
    assert decide(default, noisy).noise > 0.05
    clear: dict[Config, list[float]] = {
        default: noisy[default],
        other: [v / 2 for v in noisy[default]],
    }
    assert decide(default, clear).config == other


def test_the_incumbent_stays_unless_it_is_clearly_beaten() -> None:
    default, incumbent, other = CONFIGS[:3]
    times: dict[Config, list[float]] = {
        default: [120.0] * 5,
        incumbent: [100.0] * 5,
        other: [99.2] * 5,
    }
    kept = decide(default, times, incumbent=incumbent)
    assert (kept.config, kept.us, kept.default_us) == (incumbent, 100.0, 120.0)
    assert decide(default, times).config == other
    beaten = decide(default, {**times, other: [98.0] * 5}, incumbent=incumbent)
    assert beaten.config == other
    failed = {c: row for c, row in times.items() if c != incumbent}
    assert decide(default, failed, incumbent=incumbent).config == other


def test_ties_on_another_device_are_ranked() -> None:
    default, one, two, three = CONFIGS[:4]
    times: dict[Config, list[float]] = {
        default: [120.0] * 5,
        one: [100.0] * 5,
        two: [100.5] * 5,
        three: [103.0] * 5,
    }
    ranks: dict[Config, float] = {default: 9.0, one: 3.0, two: 2.0, three: 1.0}
    assert decide(default, times, rank=ranks.__getitem__).config == two
    assert decide(default, times).config == one


def test_a_row_that_serves_now_is_in_the_final(tmp_path: Path) -> None:
    incumbent = CONFIGS[11]
    table = times(**{CONFIGS[2].slug: 198.9, incumbent.slug: 200.0})
    tried = Space(PROBLEM, DEFAULT, CONFIGS, incumbent)
    report, _ = run(tmp_path / "s.journal", table, tried)
    choice = report.results[0].choice
    assert choice is not None
    assert (choice.config, choice.default_us) == (incumbent, 205.0)


def test_a_comparison_that_fails_falls_back_on_the_first_times(tmp_path: Path) -> None:
    class NoComparison(ReplayEvaluator):
        def compare(self, configs: object, rounds: int) -> list[list[float]]:
            return [[] for _ in configs]  # type: ignore[attr-defined]

    table = times(**{CONFIGS[3].slug: 50.0})
    report = run_study([TINY], NoComparison(table), tmp_path / "s.journal", gpu="h100")
    choice = report.results[0].choice
    assert choice is not None
    assert (choice.config, choice.compared) == (CONFIGS[3], False)


def test_a_problem_that_cannot_be_prepared_does_not_end_the_study(tmp_path: Path) -> None:
    class Picky(ReplayEvaluator):
        def prepare(self, problem: Problem, op: Op) -> Yardstick:
            if problem == PROBLEM:
                raise StudyError("out of memory")
            return super().prepare(problem, op)

    other = Space(make_problem((1, 64, 2, 64, 64)), DEFAULT, CONFIGS)
    report = run_study([TINY, other], Picky(times()), tmp_path / "s.journal", gpu="h100")
    assert report.results[0].error == "out of memory"
    assert report.results[0].choice is None
    assert report.results[1].complete


def test_any_segment_length_can_be_tried(tmp_path: Path) -> None:
    tile = ChunkKernelConfig(16, 32, 4, 2)
    odd = ForwardConfig(tile, 48, ChunkKernelConfig(16, 32, 4, 3))
    tried = Space(PROBLEM, DEFAULT, (DEFAULT, odd))
    report, _ = run(tmp_path / "s.journal", {DEFAULT.slug: 100.0, odd.slug: 50.0}, tried)
    assert report.results[0].choice is not None
    assert report.results[0].choice.config == odd


def test_missing_optuna_says_what_still_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingEnvironmentError, match="Optuna") as caught:
        run(tmp_path / "s.journal", times())
    assert "--dry-run" in caught.value.hint
    assert caught.value.exit_code == 3


def test_progress_counts_and_estimates(tmp_path: Path) -> None:
    stream = StringIO()
    table = times()
    table[CONFIGS[0].slug] = Outcome(CRASHED, reason="worker died of SIGABRT")
    run_study(
        [TINY],
        ReplayEvaluator(table),
        tmp_path / "s.journal",
        gpu="h100",
        progress=Progress(stream),
    )
    text = stream.getvalue()
    assert f"12/12, best 201.0 us {CONFIGS[1].slug}, 1 failed, 0 pruned" in text
    assert "SIGABRT" in text
    assert "\r" not in text, "no terminal, no live line"
    assert [duration(s) for s in (5, 75, 3700)] == ["5s", "1m15s", "1h01m"]


def test_outcomes_travel_as_json() -> None:
    outcome = Outcome("ok", us=3.5, noise=0.01, error=1e-3, samples=25)
    there = json.loads(json.dumps(outcome.to_dict(), allow_nan=False))
    back = Outcome.from_dict(there)
    assert (back.us, back.error, back.status) == (3.5, 1e-3, "ok")
    unfit: list[Any] = [
        {},
        {"status": "fine"},
        {"status": "ok"},
        {"status": "ok", "us": -1.0},
        [],
        None,
    ]
    for bad in unfit:
        with pytest.raises(ValueError, match="not an outcome"):
            Outcome.from_dict(bad)
    assert set(EFFORT) == {"quick", "standard", "full"}
    assert study.WORTHWHILE == 0.01
