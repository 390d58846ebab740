"""Which candidate next: a sampler's guess, moved to the nearest candidate that was not tried.

A sampler sees a config as a point with a few integer coordinates (powers of two as exponents),
never as one of hundreds of names. It works on a copy of the study in memory that holds what is
finished, so what it guesses but nobody tries leaves no trace in the shared study.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from glac.configs import BackwardConfig, ChunkKernelConfig, Config, ForwardConfig
from glac.tuning.evaluate import Outcome
from glac.tuning.space import Space

SAMPLERS = ("gp", "tpe", "tpe-independent", "random")
STARTUP_TRIALS = 10
INFEASIBLE_FACTOR = 4.0
"""What does not work counts as this many times slower than the slowest that does."""

Coordinates = dict[str, int]


def _exponent(value: int) -> int:
    """``floor(log2(value)) + 1``, and 0 for 0."""
    return value.bit_length()


_PLAIN = ("num_stages", "max_registers")
"""Numbers that count, where others are sizes."""


def _tile(prefix: str, tile: Any) -> Coordinates:
    return _numbers(prefix, tile.to_dict())


def _numbers(prefix: str, values: Mapping[str, Any]) -> Coordinates:
    """Integers and truth values as coordinates, parts of parts with their names in front."""
    found: Coordinates = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(_numbers(f"{prefix}{name}_", value))
        elif isinstance(value, bool) or name in _PLAIN:
            found[f"{prefix}{name}"] = int(value)
        elif isinstance(value, int):
            found[f"{prefix}{name}"] = _exponent(value)
    return found


def _way(lead: int, segment: int) -> Coordinates:
    """Of segments that programs walk to, whose lengths are no powers of two."""
    return {"way_segment": segment // lead} if lead else {}


def coordinates(config: Config) -> Coordinates:
    """A config as a point. Two configs may share one; they are told apart by name."""
    if isinstance(config, BackwardConfig):
        # Where the gradient kernel does the values too, their coordinates are the neutral ones.
        values = config.dv or ChunkKernelConfig(
            config.states.chunk if config.states else config.grads.chunk,
            config.grads.block_v,
            config.grads.num_warps,
            config.grads.num_stages,
            config.grads.tma,
        )
        return {
            **_tile("", config.grads),
            **_tile("states_", config.states or values),
            **_tile("dv_", values),
            "segment": _exponent(config.segment),
            **_way(config.grads.lead, config.segment),
        }
    if not isinstance(config, ForwardConfig):
        return _numbers("", config.to_dict())
    other = config.summary is not None and config.summary != config.fwd
    prepare = _tile("prepare_", config.prepare) if config.prepare is not None else {}
    return {
        **_tile("", config.fwd),
        "segment": _exponent(config.segment),
        "summary_differs": int(other),
        "prepared": int(config.prepare is not None),
        **prepare,
        **_way(config.fwd.lead, config.segment),
    }


def ranges(points: Iterable[Coordinates]) -> dict[str, tuple[int, int]]:
    """Smallest and largest value of each coordinate."""
    found: dict[str, tuple[int, int]] = {}
    for point in points:
        for name, value in point.items():
            low, high = found.get(name, (value, value))
            found[name] = (min(low, value), max(high, value))
    return found


def make_sampler(optuna: Any, name: str, seed: int) -> Any:
    """The sampler called ``name``; a Gaussian process needs scipy and torch, else it is TPE."""
    if name == "gp" and importlib.util.find_spec("scipy") and importlib.util.find_spec("torch"):
        return optuna.samplers.GPSampler(
            seed=seed, n_startup_trials=STARTUP_TRIALS, warn_independent_sampling=False
        )
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(
        seed=seed,
        n_startup_trials=STARTUP_TRIALS,
        multivariate=name != "tpe-independent",
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
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


class Proposer:
    """Proposes candidates of one space.

    Args:
        optuna: the module.
        space: the candidates.
        sampler: one of ``SAMPLERS``.
        seed: of the sampler.
    """

    def __init__(self, optuna: Any, space: Space, sampler: str, seed: int) -> None:
        self._optuna, self._space = optuna, space
        points = {config: coordinates(config) for config in space.configs}
        self._ranges = ranges(points.values())
        # A part that a config leaves out lies where the least one would.
        least = {name: low for name, (low, _) in self._ranges.items()}
        self.points = {config: {**least, **point} for config, point in points.items()}
        whole = optuna.distributions.IntDistribution
        self.distributions = {n: whole(low, high) for n, (low, high) in self._ranges.items()}
        self._free = {n: d for n, d in self.distributions.items() if not d.single()}
        self._study = optuna.create_study(sampler=make_sampler(optuna, sampler, seed))
        self._known: set[Config] = set()

    def _learn(self, outcomes: Mapping[Config, Outcome]) -> None:
        """Take over what was found since the last time."""
        slowest = max((o.us for o in outcomes.values() if o.us), default=1.0)
        for config, outcome in outcomes.items():
            if config in self._known or config not in self.points:
                continue
            self._known.add(config)
            us = outcome.us if outcome.ok and outcome.us else INFEASIBLE_FACTOR * slowest
            point = self.points[config]
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    value=math.log(us),
                    params={name: point[name] for name in self._free},
                    distributions=self._free,
                    constraints={"works": -1.0 if outcome.ok else 1.0},
                )
            )

    def _distance(self, config: Config, guess: Mapping[str, int]) -> float:
        point = self.points[config]
        total = 0.0
        for name, value in guess.items():
            low, high = self._ranges[name]
            total += abs(point[name] - value) / (high - low)
        return total

    def next(
        self, outcomes: Mapping[Config, Outcome], taken: Iterable[Config] = ()
    ) -> Config | None:
        """The candidate to try next, or ``None`` if all are tried or taken.

        Args:
            outcomes: of what was tried.
            taken: what others are trying now.
        """
        unavailable = {*outcomes, *taken}
        open_: Sequence[Config] = [c for c in self._space.configs if c not in unavailable]
        if not open_:
            return None
        self._learn(outcomes)
        if not self._free:
            return open_[0]
        trial = self._study.ask(self._free)
        guess = dict(trial.params)
        self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        # Of equally near ones the first, which is the more promising by rule of thumb.
        return min(open_, key=lambda config: self._distance(config, guess))
