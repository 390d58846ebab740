"""Suites: what their names promise, and that a study has one row for each problem."""

from __future__ import annotations

import subprocess
import sys

import pytest

from glac.problem import Gate, Op
from glac.suites import GRID, LENGTHS, SHAPES, SUITES, make_problem


def test_grid_is_ten_shapes_with_both_gates() -> None:
    grid = SUITES["grid"]
    vector = [p for p in grid if p.spec.gate is Gate.VECTOR]
    lowrank = [p for p in grid if p.spec.gate is Gate.LOWRANK]
    for part in (vector, lowrank):
        assert tuple((p.B, p.T, p.H, p.spec.K, p.spec.V) for p in part) == GRID
    assert {p.spec.rank for p in lowrank} == {16}
    assert len(grid) == 20
    assert set(SHAPES) < set(GRID)


def test_lengths_hold_the_same_work() -> None:
    lengths = SUITES["lengths"]
    assert [p.T for p in lengths] == [1024 << i for i in range(8)]
    for op in (Op.FORWARD, Op.BACKWARD):
        assert len({p.bytes(op) for p in lengths}) == 1
    assert LENGTHS[-1] in GRID, "the two series meet"


@pytest.mark.parametrize("name", SUITES)
def test_no_two_problems_fight_for_one_row(name: str) -> None:
    keys = [(p.spec, p.bucket) for p in SUITES[name]]
    assert len(set(keys)) == len(keys)


def test_the_tuner_and_the_suites_have_one_home() -> None:
    from glac.tuning import space

    assert space.SUITES is SUITES
    assert space.make_problem is make_problem


def test_suites_need_no_torch() -> None:
    code = "import sys, glac.suites; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
