"""The study: every candidate tried once, the best compared again, each result kept.

One Optuna study for each op of a problem lives in a storage that any number of workers share, and
beside it one for the comparisons of finalists. A space of at most 150 configs is tried whole, a
larger one by a sampler on log(time). Failed candidates are results too: a large finite value and a
violated constraint. Running the same command again goes on where the last run ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from glac.configs import Config
from glac.errors import GlacError, MissingEnvironmentError, StudyError
from glac.gpus import GPUS, GpuSpec
from glac.problem import Op, Problem
from glac.tuning.board import LEASE_SECONDS, Board, Claim
from glac.tuning.evaluate import (
    DEADLY,
    EFFORT,
    Device,
    Effort,
    Evaluator,
    Outcome,
    reason_kind,
)
from glac.tuning.prior import predicted_us
from glac.tuning.progress import Progress
from glac.tuning.propose import Proposer, coordinates, one_thread, ranges
from glac.tuning.space import EXHAUSTIVE, Space
from glac.tuning.stats import spread
from glac.tuning.storage import open_storage
from glac.tuning.worker import problem_to_dict

WORTHWHILE = 0.01
"""A config must beat the incumbent by more than this, or by more than the noise."""
DEFAULT_SAMPLER = "gp"
"""The winner of benchmarks/samplers.py."""
STUDY_FORMAT = "glac3"
"""Part of each study's name: what an older glac recorded in another form is left alone."""
FINALS = "finals"
_INFEASIBLE = math.log(1e9)
_POLL = 0.1


@dataclass(frozen=True)
class Choice:
    """The config a study ends with.

    Attributes:
        config: the winner; the incumbent unless something clearly beat it.
        us: its median time.
        default_us: the default's, 0 if it failed.
        noise: relative spread of the timings the decision rests on.
        compared: whether finalists were timed again, interleaved.
    """

    config: Config
    us: float
    default_us: float
    noise: float
    compared: bool


@dataclass(frozen=True)
class Result:
    """What a study found for one op of one problem.

    Attributes:
        problem: what was tuned.
        default: the config used without tuning.
        yardstick: error of the same-dtype PyTorch form.
        outcomes: of every candidate tried so far, by config.
        choice: the winner, ``None`` if no candidate worked.
        missing: configs that were not tried because they did not compile, with the reason.
        planned: how many candidates the study wants to try.
        error: why the problem could not be studied at all, usually empty.
    """

    problem: Problem
    default: Config
    yardstick: float
    outcomes: Mapping[Config, Outcome]
    choice: Choice | None
    missing: Mapping[Config, str]
    planned: int
    error: str = ""

    @property
    def op(self) -> Op:
        return self.default.op

    @property
    def complete(self) -> bool:
        return len(self.outcomes) >= self.planned and not self.error

    @property
    def counts(self) -> dict[str, int]:
        """Outcomes by status; ``pruned`` counts the slow ones among ``ok``."""
        counts = Counter(o.status for o in self.outcomes.values())
        counts["pruned"] = sum(o.pruned for o in self.outcomes.values())
        counts["uncompiled"] = len(self.missing)
        return dict(counts)


@dataclass(frozen=True)
class Report:
    """A whole study.

    Attributes:
        results: one for each problem and op begun.
        device: where it was measured.
        interrupted: Ctrl-C ended it early; ``results`` hold what there was.
        wall: seconds the study took.
        held: seconds of it in which a candidate was being checked or timed.
    """

    results: tuple[Result, ...]
    device: Device
    interrupted: bool = False
    wall: float = 0.0
    held: float = 0.0


def import_optuna() -> Any:
    """Optuna, quiet.

    Raises:
        MissingEnvironmentError: it is not installed.
    """
    try:
        optuna = importlib.import_module("optuna")
    except ImportError as error:
        raise MissingEnvironmentError(
            f"Optuna is needed to run a study and cannot be imported ({error})",
            hint="pip install 'glac[tune]'; --dry-run and --compile-only work without",
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def decide(
    default: Config,
    times: Mapping[Config, Sequence[float]],
    noise: float = 0.0,
    incumbent: Config | None = None,
    rank: Callable[[Config], float] | None = None,
) -> Choice:
    """The winner among configs timed in the same rounds.

    Args:
        default: what the winner's time is compared with in reports.
        times: microseconds per round, at least one round; rounds of all configs correspond.
        noise: a lower bound, for times that say nothing about their own spread.
        incumbent: what serves the problem now, the default if None. It stays unless it is beaten
            by more than max(1 %, noise). If it failed, the default takes its place.
        rank: orders configs that are within that of the best, smallest first, where the times are
            from another device than the one that is meant.
    """
    middle = {config: statistics.median(values) for config, values in times.items()}
    best = min(middle, key=lambda c: (middle[c], c.slug))
    if rank is not None:
        limit = middle[best] * (1.0 + max(WORTHWHILE, noise, spread(times[best])))
        best = min((c for c in middle if middle[c] <= limit), key=lambda c: (rank(c), middle[c]))
    default_us = middle.get(default, 0.0)
    holder = next((c for c in (incumbent, default) if c is not None and c in times), None)
    if holder is None:
        return Choice(best, middle[best], default_us, max(noise, spread(times[best])), True)
    noise = max(noise, spread(times[best]), spread(times[holder]))
    pairs = zip(times[holder], times[best], strict=False)
    gain = statistics.median((h - b) / h for h, b in pairs)
    winner = best if gain > max(WORTHWHILE, noise) else holder
    return Choice(winner, middle[winner], default_us, noise, True)


def _decide_from_outcomes(
    default: Config, outcomes: Mapping[Config, Outcome], incumbent: Config | None = None
) -> Choice | None:
    """The winner where no comparison was made."""
    ok = {c: o for c, o in outcomes.items() if o.ok and o.us is not None}
    if not ok:
        return None
    best = min(ok, key=lambda c: (ok[c].us or 0.0, c.slug))
    few = {c: ok[c] for c in (best, default, incumbent) if c is not None and c in ok}
    choice = decide(
        default,
        {c: [o.us or 0.0] for c, o in few.items()},
        noise=max(o.noise for o in few.values()),
        incumbent=incumbent,
    )
    return replace(choice, compared=False)


@dataclass(frozen=True)
class _Held:
    """A candidate that this worker claimed."""

    claim: Claim
    config: Config


@dataclass
class _ProblemStudy:
    """The study of one op of one problem, by one of any number of workers."""

    optuna: Any
    space: Space
    evaluator: Evaluator
    effort: Effort
    board: Board
    open_finals: Callable[[], Board]
    planned: int
    proposer: Proposer | None
    progress: Progress
    clock: _Clock
    rank: Callable[[Config], float] | None = None
    outcomes: dict[Config, Outcome] = field(default_factory=dict)
    yardstick: float = math.nan
    prepared: bool = False

    def __post_init__(self) -> None:
        self._by_slug = {config.slug: config for config in self.space.configs}
        self._shown = 0

    def refresh(self) -> None:
        """Take over what this and other workers, now and earlier, found."""
        self.board.refresh()
        for slug, trial in self.board.done.items():
            config = self._by_slug.get(slug)
            if config is not None and config not in self.outcomes:
                # What an older glac wrote in another form is tried again under the same name.
                with contextlib.suppress(ValueError, KeyError):
                    self.outcomes[config] = Outcome.from_dict(trial.user_attrs["outcome"])
        stored = self.board.attributes.get("yardstick") if math.isnan(self.yardstick) else None
        if stored is not None:
            self.yardstick = float(stored)

    def prepare(self) -> None:
        """Have the evaluator make inputs and truth, before the first measurement of this run."""
        if not self.prepared:
            self.yardstick = self.evaluator.prepare(self.space.problem, self.space.op).error
            if math.isfinite(self.yardstick):
                self.board.describe(yardstick=self.yardstick)
            self.prepared = True

    @property
    def best(self) -> tuple[Config, float] | None:
        ok = [(o.us, c.slug, c) for c, o in self.outcomes.items() if o.us is not None]
        if not ok:
            return None
        us, _, config = min(ok)
        return config, us

    def _detail(self) -> str:
        best = self.best
        failed = sum(not o.ok for o in self.outcomes.values())
        pruned = sum(o.pruned for o in self.outcomes.values())
        text = f"best {best[1]:.1f} us {best[0].slug}" if best else "none works yet"
        return f"{text}, {failed} failed, {pruned} pruned"

    def _report(self) -> None:
        """Tell how far the study is, whoever got it there."""
        new = len(self.outcomes) - self._shown
        if new > 0:
            self._shown = len(self.outcomes)
            self.progress.step(self._detail(), new)

    def _measure(self, config: Config, best_us: float | None) -> Outcome:
        """What becomes of a candidate; runs in a thread of its own."""
        self.prepare()
        with self.clock:
            return self.evaluator.evaluate(config, best_us)

    def _record(self, claim: Claim, config: Config, outcome: Outcome) -> None:
        us = outcome.us if outcome.ok else None
        value = _INFEASIBLE if us is None else math.log(us)
        if not self.board.tell(claim, value, outcome.ok, outcome=outcome.to_dict()):
            self.progress.note(f"  {config.slug}: another worker took it over, result dropped")
            return
        self.outcomes[config] = outcome
        if outcome.status in DEADLY:
            self.progress.note(f"  {config.slug}: {outcome.status}: {outcome.reason}")

    def _next(self) -> Config | None:
        """What to try now; ``None`` if the rest is in other workers' hands."""
        taken = {c for slug in self.board.running if (c := self._by_slug.get(slug)) is not None}
        if len(self.outcomes) + len(taken - self.outcomes.keys()) >= self.planned:
            return None
        free = (c for c in self.space.configs if c not in self.outcomes and c not in taken)
        if self.proposer is None:
            return next(free, None)
        starts = self.space.configs[: self.space.warm]
        first = next((c for c in free if c in starts), None)
        return first or self.proposer.next(self.outcomes, taken)

    def _take(self) -> _Held | None:
        """A candidate that is ours now; ``None`` if there is none, or another was first."""
        config = self._next()
        if config is None:
            return None
        claim = self.board.claim(config.slug, self.planned, coordinates(config), self._ranges)
        return None if claim is None else _Held(claim, config)

    def run(self) -> None:
        """Try candidates until as many as planned have an outcome, together with other workers.

        While one is measured, the result of the one before is written and the next one is taken:
        the device waits for neither storage nor sampler.
        """
        with ThreadPoolExecutor(1) as measuring:
            while True:
                self.refresh()
                self._report()
                if len(self.outcomes) >= self.planned:
                    return
                held = self._take()
                if held is None:
                    time.sleep(_POLL)
                else:
                    self._run_from(held, measuring)

    def _run_from(self, current: _Held | None, measuring: ThreadPoolExecutor) -> None:
        """Measure a candidate, and more as long as there is one to take."""
        before: tuple[_Held, Outcome] | None = None
        ahead: _Held | None = None
        try:
            while current is not None:
                ours = [self.best[1]] if self.best else []
                ours += [before[1].us] if before and before[1].us else []
                future = measuring.submit(self._measure, current.config, min(ours, default=None))
                if before:
                    self._record(before[0].claim, before[0].config, before[1])
                    before = None
                    self._report()
                ahead = self._take()
                before, current, ahead = (current, future.result()), ahead, None
            if before:
                self._record(before[0].claim, before[0].config, before[1])
        except BaseException:
            # Not the candidates' fault: they are tried again when the study goes on.
            self.evaluator.abort()
            if before:
                self._record(before[0].claim, before[0].config, before[1])
            for held in (current, ahead):
                if held is not None:
                    self.board.withdraw(held.claim)
            raise

    @cached_property
    def _ranges(self) -> dict[str, Any]:
        whole = self.optuna.distributions.IntDistribution
        points = [coordinates(config) for config in self.space.configs]
        return {name: whole(low, high) for name, (low, high) in ranges(points).items()}

    def finalists(self) -> list[Config]:
        """The best few, the default and the incumbent."""
        ok = {c: o.us for c, o in self.outcomes.items() if o.us is not None}
        chosen = sorted(ok, key=lambda c: (ok[c], c.slug))[: self.effort.finalists]
        always = (self.space.default, self.space.incumbent)
        return list(dict.fromkeys((*chosen, *(c for c in always if c is not None and c in ok))))

    def compare(self) -> Choice | None:
        """The finalists timed again, in turn, by one of the workers; the winner among them."""
        finalists = self.finalists()
        if not finalists:
            return None
        default, incumbent = self.space.default, self.space.incumbent
        names = [",".join(sorted(c.slug for c in finalists)), str(self.effort.rounds)]
        key = hashlib.sha256(" ".join(names).encode()).hexdigest()[:16]
        times = self._compared(key, finalists)
        holder = incumbent if incumbent in finalists else default
        if not times or (holder in finalists and holder not in times):
            return _decide_from_outcomes(default, self.outcomes, incumbent)
        return decide(default, times, incumbent=incumbent, rank=self.rank)

    def _compared(self, key: str, finalists: Sequence[Config]) -> Mapping[Config, Sequence[float]]:
        """Times of the comparison called ``key``; empty if it cannot be made."""
        finals, begun = self.open_finals(), False
        try:
            while True:
                finals.refresh()
                done = finals.done.get(key)
                if done is not None:
                    stored = done.user_attrs["times"]
                    return {c: stored[c.slug] for c in finalists if stored.get(c.slug)}
                if not begun:
                    self.progress.begin(f"{self.space}: comparing finalists", len(finalists))
                    begun = True
                claim = None if key in finals.running else finals.claim(key)
                if claim is None:
                    time.sleep(_POLL)
                elif not self._compare_now(finals, claim, finalists):
                    return {}
        finally:
            finals.close()

    def _compare_now(self, finals: Board, claim: Claim, finalists: Sequence[Config]) -> bool:
        """Make the comparison that was claimed; whether anything could be timed."""
        try:
            self.prepare()
            with self.clock:
                rows = self.evaluator.compare(finalists, self.effort.rounds)
        except BaseException:
            finals.withdraw(claim)
            raise
        times = {c.slug: row for c, row in zip(finalists, rows, strict=True) if row}
        self.progress.step(count=len(finalists))
        if not times:
            finals.withdraw(claim)
            return False
        fastest = min(statistics.median(row) for row in times.values())
        finals.tell(claim, math.log(fastest), True, times=times)
        return True


class _Clock:
    """Adds up how long candidates were held."""

    def __init__(self) -> None:
        self.held = 0.0
        self._since = 0.0

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.held += time.monotonic() - self._since


def _plan(space: Space, effort: Effort, trials: int | None) -> tuple[bool, int]:
    """Whether all candidates are tried, and how many are."""
    total = len(space.configs)
    if trials is None:
        trials = total if total <= EXHAUSTIVE else effort.trials
    return total <= trials, min(total, trials)


def study_name(gpu: str, device: Device, space: Space, key: str) -> str:
    """What must be the same for results to be taken over."""
    return "|".join((f"{STUDY_FORMAT}:{gpu}", device.name, str(space), key))


def run_study(
    spaces: Sequence[Space],
    evaluator: Evaluator,
    storage: Path | str,
    *,
    gpu: str,
    effort: str = "standard",
    trials: int | None = None,
    seed: int = 0,
    key: Mapping[Op, str] | None = None,
    missing: Callable[[Problem, Config], str | None] | None = None,
    progress: Progress | None = None,
    sampler: str = DEFAULT_SAMPLER,
    lease: float = LEASE_SECONDS,
    facts: Mapping[str, Any] | None = None,
    elsewhere: bool = False,
) -> Report:
    """Study problem after problem, alone or beside other processes that call this too.

    Args:
        spaces: problems with their candidates.
        evaluator: measures; closed at the end.
        storage: journal file, made if it is not there, or a URL, see ``glac.tuning.storage``.
        gpu: name, part of each study's name.
        effort: a key of ``EFFORT``.
        trials: candidates per problem; default: all, or ``effort.trials`` of a large space.
        seed: of the sampler.
        key: what else must be the same for results to be taken over, for each op: toolchain,
            templates.
        missing: why a config cannot be measured, or None if it can.
        progress: told of everything.
        sampler: one of ``glac.tuning.propose.SAMPLERS``.
        lease: seconds after which a silent worker of another machine has lost its candidate.
        facts: about toolchain and checkout, kept with the study for its report.
        elsewhere: times are from another model than ``gpu``, whose roofline decides ties.

    Returns:
        What was found, also after Ctrl-C.

    Raises:
        StudyError: the storage is broken or away, or nothing can be measured.
        MissingEnvironmentError: Optuna is not installed.
    """
    progress = progress or Progress(quiet=True)
    results: list[Result] = []
    device = Device("")
    interrupted = False
    clock, started = _Clock(), time.monotonic()
    try:
        optuna = import_optuna()
        with open_storage(optuna, storage) as opened:
            try:
                device = evaluator.device()
                for index, space in enumerate(spaces):
                    title = f"[{index + 1}/{len(spaces)}] {space}"
                    name = study_name(gpu, device, space, (key or {}).get(space.op, ""))
                    known = {**(facts or {}), "gpu": gpu, "device": asdict(device)}
                    run = _Run(
                        optuna,
                        opened,
                        evaluator,
                        EFFORT[effort],
                        seed,
                        sampler,
                        lease,
                        progress,
                        clock,
                        GPUS[gpu] if elsewhere else None,
                    )
                    result, interrupted = run.problem(space, title, name, trials, missing, known)
                    results.append(result)
                    if interrupted:
                        break
            except KeyboardInterrupt:
                interrupted = True
    finally:
        progress.end()
        evaluator.close()
    wall = time.monotonic() - started
    return Report(tuple(results), device, interrupted, wall, clock.held)


@dataclass(frozen=True)
class _Run:
    """What the studies of all problems share."""

    optuna: Any
    storage: Any
    evaluator: Evaluator
    effort: Effort
    seed: int
    sampler: str
    lease: float
    progress: Progress
    clock: _Clock
    meant: GpuSpec | None = None

    def problem(
        self,
        space: Space,
        title: str,
        name: str,
        trials: int | None,
        missing: Callable[[Problem, Config], str | None] | None,
        facts: Mapping[str, Any],
    ) -> tuple[Result, bool]:
        """The result for one problem, and whether Ctrl-C ended it."""
        problem = space.problem
        reasons = {c: missing(problem, c) if missing else None for c in space.configs}
        left_out = {c: reason for c, reason in reasons.items() if reason}
        configs = tuple(c for c in space.configs if not reasons[c])
        warm = sum(c in configs for c in space.configs[: space.warm])
        usable = replace(space, configs=configs, warm=warm)
        exhaustive, planned = _plan(usable, self.effort, trials)
        board = Board(self.optuna, self.storage, name, self.lease)
        work = _ProblemStudy(
            self.optuna,
            usable,
            self.evaluator,
            self.effort,
            board,
            lambda: Board(self.optuna, self.storage, f"{name}|{FINALS}", self.lease),
            planned,
            None if exhaustive else Proposer(self.optuna, usable, self.sampler, self.seed),
            self.progress,
            self.clock,
            (lambda c: predicted_us(problem, c, meant)) if (meant := self.meant) else None,
        )
        choice: Choice | None = None
        trouble, interrupted = "", False
        try:
            board.describe(
                **facts,
                problem=problem_to_dict(problem),
                op=space.op.value,
                default=space.default.slug,
                incumbent=space.incumbent.slug if space.incumbent else None,
                planned=planned,
                left_out=_counted(left_out),
            )
            work.refresh()
            self.progress.begin(title, planned, len(work.outcomes))
            work._shown = len(work.outcomes)
            with one_thread() if not exhaustive else contextlib.nullcontext():
                work.run()
            choice = work.compare()
        except KeyboardInterrupt:
            interrupted = True
        except GlacError as failure:
            trouble = failure.message
            self.progress.note(f"{title}: {trouble}")
        except Exception as failure:
            raise _storage_failure(self.optuna, failure) from failure
        finally:
            board.close()
        if choice is None:
            choice = _decide_from_outcomes(space.default, work.outcomes, space.incumbent)
        result = Result(
            problem,
            space.default,
            work.yardstick,
            work.outcomes,
            choice,
            left_out,
            planned,
            trouble,
        )
        return result, interrupted


def _counted(left_out: Mapping[Config, str]) -> dict[str, int]:
    """How many configs were left out for each kind of reason."""
    return dict(Counter(reason_kind(reason) for reason in left_out.values()))


def _storage_failure(optuna: Any, failure: Exception) -> Exception:
    """A storage that went away as an error with a remedy; our own mistakes as they are."""
    module = type(failure).__module__.partition(".")[0]
    if module in ("optuna", "grpc", "sqlalchemy", "psycopg") or isinstance(failure, OSError):
        reason = " ".join(str(failure).split())[:200]
        return StudyError(
            f"the study storage failed ({type(failure).__name__}: {reason})",
            hint="what was measured is kept there; the same command goes on",
        )
    return failure
