"""Proposals: always an untried candidate, led by what was found, and started well."""

from __future__ import annotations

import math

import pytest

from glac.configs import ChunkKernelConfig, Config, ForwardConfig, why_illegal
from glac.gpus import GPUS
from glac.problem import Gate, Op
from glac.tuning.evaluate import WRONG, Outcome
from glac.tuning.prior import predicted_us
from glac.tuning.propose import SAMPLERS, Proposer, coordinates
from glac.tuning.space import SUITES, Space, make_problem, space
from glac.tuning.warm import Winner, known_starts, warmed
from tests.helpers_packs import WHOLE, tuned_file

optuna = pytest.importorskip("optuna")
GPU = GPUS["h200"]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("op", list(Op))
def test_each_candidate_is_proposed_once(sampler: str, op: Op) -> None:
    gate = next(gate for gate in (Gate.VECTOR, Gate.SCALAR) if op.serves(gate))
    tried = space(make_problem((8, 2048, 4, 128, 256), gate), GPU, op=op)
    small = Space(tried.problem, tried.default, tried.configs[:14])
    proposer = Proposer(optuna, small, sampler, 0)
    outcomes: dict[Config, Outcome] = {}
    busy = small.configs[3]
    while (config := proposer.next(outcomes, [busy])) is not None:
        assert config not in outcomes
        assert config != busy
        bad = len(outcomes) == 4
        outcomes[config] = Outcome(WRONG, reason="wrong") if bad else Outcome("ok", us=100.0)
    assert {*outcomes, busy} == set(small.configs)


def test_two_workers_of_different_seeds_part() -> None:
    whole = space(make_problem((16, 2048, 8, 128, 128)), GPU)
    first = [Proposer(optuna, whole, "tpe", seed).next({}) for seed in range(6)]
    assert len(set(first)) > 1


def test_a_sampler_learns() -> None:
    whole = space(make_problem((8, 2048, 4, 128, 256)), GPU)

    def us(config: Config) -> float:
        return 50.0 * (1 + sum((v - 3) ** 2 for v in coordinates(config).values()) / 10)

    best = min(map(us, whole.configs))
    ranks = sorted(map(us, whole.configs))
    proposer = Proposer(optuna, whole, "tpe", 1)
    outcomes: dict[Config, Outcome] = {}
    for _ in range(40):
        config = proposer.next(outcomes)
        assert config is not None
        outcomes[config] = Outcome("ok", us=us(config))
    found = min(o.us or math.inf for o in outcomes.values())
    assert found <= ranks[3]
    assert best <= found


@pytest.mark.parametrize("op", list(Op))
@pytest.mark.parametrize("gpu", ["h100", "h200", "a100"])
def test_the_roofline_is_never_below_the_memory_floor(gpu: str, op: Op) -> None:
    for problem in SUITES["full"]:
        floor = problem.bytes(op) / GPUS[gpu].copy_bandwidth * 1e6
        for config in space(problem, GPUS[gpu], "quick", op).configs:
            us = predicted_us(problem, config, GPUS[gpu])
            assert math.isfinite(us)
            assert us > 0.9 * floor


def test_warm_starts_come_first_and_are_legal() -> None:
    problem = make_problem((16, 2048, 8, 128, 128))
    plain = space(problem, GPU)
    mine = ForwardConfig(ChunkKernelConfig(16, 128, 4, 2))
    near = make_problem((8, 2048, 8, 128, 128))
    known = [Winner(near, mine), Winner(make_problem((1, 64, 1, 16, 16)), WHOLE)]
    started = warmed(plain, GPU, known, incumbent=plain.configs[7])
    assert started.configs[:3] == (plain.default, plain.configs[7], mine)
    assert started.incumbent == plain.configs[7]
    assert set(plain.configs) <= set(started.configs)
    assert len(set(started.configs)) == len(started.configs)
    assert started.warm >= 8
    assert all(why_illegal(problem.spec, c, GPU) is None for c in started.configs)
    kept = warmed(plain, GPU, [Winner(near, WHOLE)], incumbent=WHOLE, add=False)
    assert set(kept.configs) == set(plain.configs)
    assert kept.incumbent is None


def test_winners_of_other_widths_are_adapted_or_dropped() -> None:
    tile = ChunkKernelConfig(16, 16, 2, 1)
    long = Winner(make_problem((1, 4096, 1, 16, 16)), ForwardConfig(tile, 1024, tile))
    short = make_problem((1, 512, 1, 16, 16))
    assert known_starts(short, Op.FORWARD, [long], GPU) == [ForwardConfig(tile)]
    wide = Winner(
        make_problem((1, 512, 1, 16, 256)), ForwardConfig(ChunkKernelConfig(16, 256, 4, 1))
    )
    assert known_starts(short, Op.FORWARD, [wide], GPU) == []
    assert known_starts(short, Op.BACKWARD, [long], GPU) == []
    assert tuned_file().rows  # the helper's rows are what `winners` reads
