"""The study: every candidate tried once, the best compared again, each result kept on disk.

One Optuna study for each op of a problem lives in a journal file. A space of at most 150 configs
is tried whole, a larger one by a Gaussian process on log(time). Failed candidates are results too:
a large finite value and a violated constraint, so that a sampler learns from them. Running the
same command again goes on where the last run ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import importlib.util
import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glac.configs import Config
from glac.errors import GlacError, MissingEnvironmentError, StudyError
from glac.problem import Op, Problem
from glac.tuning.evaluate import (
    CRASHED,
    EFFORT,
    HUNG,
    Device,
    Effort,
    Evaluator,
    Outcome,
)
from glac.tuning.progress import Progress
from glac.tuning.space import Space, parameter_choices, parameters
from glac.tuning.stats import spread

WORTHWHILE = 0.01
"""A config must beat the default by more than this, or by more than the noise."""
_INFEASIBLE = math.log(1e9)
_CONSTRAINT = "works"
TIMED_WHOLE = 400
"""A space of at most this many configs is timed whole: 70 ms a config, where asking the sampler
for the next takes up to 4 s (200 configs, 16 parameters, on the CPU of an H200's host)."""
_STARTUP_TRIALS = 10
_WARM_STARTS = 8


@dataclass(frozen=True)
class Choice:
    """The config a study ends with.

    Attributes:
        config: the winner; the default unless something clearly beat it.
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
    """

    results: tuple[Result, ...]
    device: Device
    interrupted: bool = False


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


class _HeldLock:
    """Nothing to do: the journal is locked for the whole study, and freed if we die."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The Gaussian process works on tiny matrices, where threads only get in each other's way."""
    if importlib.util.find_spec("torch") is None:
        yield
        return
    torch = importlib.import_module("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _open_storage(path: Path) -> Iterator[Any]:
    """The journal, ours alone until the end.

    Raises:
        StudyError: another study is using it, or it cannot be written.
    """
    optuna = import_optuna()
    journal = optuna.storages.journal

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise StudyError(f"{path}: cannot be written ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(
                f"{path}: another study is writing it",
                hint="wait for it, or give this one its own --storage",
            ) from None
        _drop_torn_line(file)
        backend = journal.JournalFileBackend(str(path), lock_obj=_HeldLock())
        try:
            storage = optuna.storages.JournalStorage(backend)
        except Exception as error:  # json and key errors of a foreign file
            raise StudyError(
                f"{path}: not a study journal ({type(error).__name__}: {error})",
                hint="move it away, or choose another --storage",
            ) from None
        yield storage


def _drop_torn_line(file: Any) -> None:
    """Cut off a last line that a killed process left half written; it would spoil the next."""
    file.seek(0, os.SEEK_END)
    size = file.tell()
    back = min(size, 1 << 20)
    file.seek(size - back)
    tail = file.read(back)
    if tail and not tail.endswith(b"\n"):
        file.truncate(size - back + tail.rfind(b"\n") + 1)
        file.flush()


def _distributions(optuna: Any, space: Space) -> dict[str, Any]:
    """Choices that do not depend on what happened to compile: a resumed study must agree."""
    category = optuna.distributions.CategoricalDistribution
    return {name: category(values) for name, values in parameter_choices(space).items()}


def _sampler(optuna: Any, exhaustive: bool, seed: int) -> Any:
    if exhaustive:
        return optuna.samplers.RandomSampler(seed=seed)  # never asked: all points are given
    if importlib.util.find_spec("scipy") is not None and importlib.util.find_spec("torch"):
        return optuna.samplers.GPSampler(
            seed=seed, n_startup_trials=_STARTUP_TRIALS, deterministic_objective=False
        )
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


def decide(default: Config, times: Mapping[Config, Sequence[float]], noise: float = 0.0) -> Choice:
    """The winner among configs timed in the same rounds.

    Args:
        default: stays unless it is beaten by more than max(1 %, noise).
        times: microseconds per round, at least one round; rounds of all configs correspond.
        noise: a lower bound, for times that say nothing about their own spread.
    """
    middle = {config: statistics.median(values) for config, values in times.items()}
    best = min(middle, key=lambda c: (middle[c], c.slug))
    if default not in times:
        return Choice(best, middle[best], 0.0, max(noise, spread(times[best])), True)
    noise = max(noise, spread(times[best]), spread(times[default]))
    pairs = zip(times[default], times[best], strict=False)
    gain = statistics.median((d - b) / d for d, b in pairs)
    winner = best if gain > max(WORTHWHILE, noise) else default
    return Choice(winner, middle[winner], middle[default], noise, True)


def _decide_from_outcomes(default: Config, outcomes: Mapping[Config, Outcome]) -> Choice | None:
    """The winner where no comparison was made."""
    ok = {c: o for c, o in outcomes.items() if o.ok and o.us is not None}
    if not ok:
        return None
    best = min(ok, key=lambda c: (ok[c].us or 0.0, c.slug))
    pair = {c: ok[c] for c in (best, default) if c in ok}
    choice = decide(
        default,
        {c: [o.us or 0.0] for c, o in pair.items()},
        noise=max(o.noise for o in pair.values()),
    )
    return Choice(choice.config, choice.us, choice.default_us, choice.noise, False)


@dataclass
class _ProblemStudy:
    """The study of one op of one problem."""

    space: Space
    evaluator: Evaluator
    effort: Effort
    study: Any
    distributions: Mapping[str, Any]
    exhaustive: bool
    planned: int
    progress: Progress
    outcomes: dict[Config, Outcome] = field(default_factory=dict)
    yardstick: float = math.nan
    prepared: bool = False

    def restore(self) -> None:
        """Take over what earlier runs found, and close what they left open."""
        from optuna.trial import TrialState

        stored = self.study.user_attrs.get("yardstick")
        if stored is not None:
            self.yardstick = float(stored)
        by_slug = {config.slug: config for config in self.space.configs}
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state in (TrialState.RUNNING, TrialState.WAITING):
                self.study.tell(trial.number, state=TrialState.FAIL)
            config = by_slug.get(trial.user_attrs.get("config"))
            if trial.state is TrialState.COMPLETE and config and config not in self.outcomes:
                with contextlib.suppress(ValueError):
                    self.outcomes[config] = Outcome.from_dict(trial.user_attrs["outcome"])

    def prepare(self) -> None:
        """Have the evaluator make inputs and truth, before the first measurement of this run."""
        if not self.prepared:
            self.yardstick = self.evaluator.prepare(self.space.problem, self.space.op).error
            self.study.set_user_attr("yardstick", self.yardstick)
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

    def _record(self, trial: Any, config: Config, outcome: Outcome) -> None:
        trial.set_user_attr("config", config.slug)
        trial.set_user_attr("outcome", outcome.to_dict())
        trial.set_constraint(_CONSTRAINT, -1.0 if outcome.ok else 1.0)
        us = outcome.us if outcome.ok else None
        self.study.tell(trial, _INFEASIBLE if us is None else math.log(us))

    def _try(self, trial: Any, config: Config) -> None:
        best = self.best
        try:
            self.prepare()
            outcome = self.evaluator.evaluate(config, best[1] if best else None)
        except BaseException:
            # Not this candidate's fault: it is tried again when the study goes on.
            from optuna.trial import TrialState

            self.study.tell(trial, state=TrialState.FAIL)
            raise
        self._record(trial, config, outcome)
        self.outcomes[config] = outcome
        if outcome.status in (CRASHED, HUNG):
            self.progress.note(f"  {config.slug}: {outcome.status}: {outcome.reason}")
        self.progress.step(self._detail())

    def _given(self, config: Config) -> None:
        self.study.enqueue_trial(parameters(config))
        self._try(self.study.ask(self.distributions), config)

    def try_all(self) -> None:
        """Every candidate that was not tried yet, the most promising first."""
        for config in self.space.configs:
            if config not in self.outcomes:
                self._given(config)

    def search(self) -> None:
        """As many candidates as planned, chosen by the sampler after a few warm starts."""
        by_params: dict[tuple[Any, ...], Config] = {}
        for config in self.space.configs:
            values = parameters(config)
            by_params.setdefault(tuple(values[name] for name in self.distributions), config)
        for config in self.space.configs[:_WARM_STARTS]:
            if len(self.outcomes) < self.planned and config not in self.outcomes:
                self._given(config)
        wasted = 0
        while len(self.outcomes) < self.planned:
            if wasted >= 20:  # the sampler repeats itself: take the best untried by rule of thumb
                wasted = 0
                self._given(next(c for c in self.space.configs if c not in self.outcomes))
                continue
            trial = self.study.ask(self.distributions)
            key = tuple(trial.params[name] for name in self.distributions)
            config_ = by_params.get(key)
            if config_ is None:
                self._tell_again(trial, Outcome("error", reason="not in the space"))
                wasted += 1
            elif config_ in self.outcomes:
                self._tell_again(trial, self.outcomes[config_])
                wasted += 1
            else:
                wasted = 0
                self._try(trial, config_)

    def _tell_again(self, trial: Any, outcome: Outcome) -> None:
        """Answer the sampler without a measurement."""
        trial.set_constraint(_CONSTRAINT, -1.0 if outcome.ok else 1.0)
        us = outcome.us if outcome.ok else None
        self.study.tell(trial, _INFEASIBLE if us is None else math.log(us))

    def compare(self) -> Choice | None:
        """The finalists and the default timed again, in turn; the winner among them."""
        ok = {c: o.us for c, o in self.outcomes.items() if o.us is not None}
        finalists = sorted(ok, key=lambda c: (ok[c], c.slug))[: self.effort.finalists]
        default = self.space.default
        if default in ok and default not in finalists:
            finalists.append(default)
        if not finalists:
            return None
        key = {"configs": sorted(c.slug for c in finalists), "rounds": self.effort.rounds}
        kept = self.study.user_attrs.get("comparison")
        if kept and kept.get("key") == key:
            times = {c: kept["times"][c.slug] for c in finalists if c.slug in kept["times"]}
        else:
            self.progress.begin(f"{self.space}: comparing finalists", len(finalists))
            self.prepare()
            rows = self.evaluator.compare(finalists, self.effort.rounds)
            times = {c: row for c, row in zip(finalists, rows, strict=True) if row}
            self.progress.step(count=len(finalists))
            if times:
                record = {"key": key, "times": {c.slug: row for c, row in times.items()}}
                self.study.set_user_attr("comparison", record)
        if not times or (default in ok and default not in times):
            return _decide_from_outcomes(default, self.outcomes)
        return decide(default, times)


def _plan(space: Space, effort: Effort, trials: int | None) -> tuple[bool, int]:
    """Whether all candidates are tried, and how many are."""
    total = len(space.configs)
    if trials is None:
        trials = total if total <= TIMED_WHOLE else effort.trials
    return total <= trials, min(total, trials)


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
) -> Report:
    """Study problem after problem.

    Args:
        spaces: problems with their candidates.
        evaluator: measures; closed at the end.
        storage: journal file, made if it is not there.
        gpu: name, part of each study's name.
        effort: a key of ``EFFORT``.
        trials: candidates per problem; default: all, or ``effort.trials`` of a large space.
        seed: of the sampler.
        key: what else must be the same for results to be taken over, for each op: toolchain,
            templates.
        missing: why a config cannot be measured, or None if it can.
        progress: told of everything.

    Returns:
        What was found, also after Ctrl-C.

    Raises:
        StudyError: the storage is in use or broken, or nothing can be measured.
        MissingEnvironmentError: Optuna is not installed.
    """
    progress = progress or Progress(quiet=True)
    results: list[Result] = []
    device = Device("")
    interrupted = False
    try:
        optuna = import_optuna()
        with _open_storage(Path(storage)) as opened:
            try:
                device = evaluator.device()
                for index, space in enumerate(spaces):
                    title = f"[{index + 1}/{len(spaces)}] {space}"
                    name = "|".join((gpu, device.name, str(space), (key or {}).get(space.op, "")))
                    run = _Run(optuna, opened, evaluator, EFFORT[effort], seed, progress)
                    result, interrupted = run.problem(space, title, name, trials, missing)
                    results.append(result)
                    if interrupted:
                        break
            except KeyboardInterrupt:
                interrupted = True
    finally:
        progress.end()
        evaluator.close()
    return Report(tuple(results), device, interrupted)


@dataclass(frozen=True)
class _Run:
    """What the studies of all problems share."""

    optuna: Any
    storage: Any
    evaluator: Evaluator
    effort: Effort
    seed: int
    progress: Progress

    def problem(
        self,
        space: Space,
        title: str,
        name: str,
        trials: int | None,
        missing: Callable[[Problem, Config], str | None] | None,
    ) -> tuple[Result, bool]:
        """The result for one problem, and whether Ctrl-C ended it."""
        problem = space.problem
        reasons = {c: missing(problem, c) if missing else None for c in space.configs}
        left_out = {c: reason for c, reason in reasons.items() if reason}
        usable = Space(problem, space.default, tuple(c for c in space.configs if not reasons[c]))
        exhaustive, planned = _plan(usable, self.effort, trials)
        try:
            study = self.optuna.create_study(
                study_name=name,
                storage=self.storage,
                sampler=_sampler(self.optuna, exhaustive, self.seed),
                direction="minimize",
                load_if_exists=True,
            )
        except Exception as error:
            raise StudyError(f"the study journal is broken ({error})") from None
        work = _ProblemStudy(
            usable,
            self.evaluator,
            self.effort,
            study,
            _distributions(self.optuna, space),
            exhaustive,
            planned,
            self.progress,
        )
        work.restore()
        choice: Choice | None = None
        trouble, interrupted = "", False
        try:
            self.progress.begin(title, planned, len(work.outcomes))
            if exhaustive:
                work.try_all()
            else:
                with _one_thread():
                    work.search()
            choice = work.compare()
        except KeyboardInterrupt:
            interrupted = True
        except GlacError as failure:
            trouble = failure.message
            self.progress.note(f"{title}: {trouble}")
        if choice is None:
            choice = _decide_from_outcomes(space.default, work.outcomes)
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
