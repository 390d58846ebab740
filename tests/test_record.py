"""``glac.record`` behaves as ``dataclasses`` does, on the classes that glac makes with it."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any, ClassVar

import pytest

from glac import record
from glac.problem import Bucket, DType, Gate, Op, Problem, Specialisation

SPEC = Specialisation(64, 128, DType.BF16, Gate.LOWRANK, DType.FP32, rank=16)


def both(**options: bool) -> tuple[Any, Any]:
    """The same class made by ``dataclasses`` and by glac."""

    def body() -> type:
        class Made:
            KIND: ClassVar[str] = "kind"
            first: int
            second: str = "two"
            rest: list[int] = dataclasses.field(default_factory=list)

            @property
            def both(self) -> str:
                return f"{self.first}{self.second}"

        return Made

    return dataclasses.dataclass(**options)(body()), record.dataclass(**options)(body())


def values(cls: Any) -> list[Any]:
    return [cls(1), cls(1, "two"), cls(2, second="two"), cls(1, rest=[3]), cls(0, "zero", [1])]


@pytest.mark.parametrize("frozen", [False, True])
def test_instances_are_as_those_of_dataclasses(frozen: bool) -> None:
    theirs, ours = both(frozen=frozen)
    for a, b in zip(values(theirs), values(ours), strict=True):
        assert repr(a) == repr(b)
        assert dataclasses.asdict(a) == dataclasses.asdict(b)
        assert [f.name for f in dataclasses.fields(b)] == ["first", "second", "rest"]
        assert dataclasses.replace(b, first=7).both == dataclasses.replace(a, first=7).both
        assert [a == other for other in values(theirs)] == [b == other for other in values(ours)]
        assert b != a
        assert copy.deepcopy(b) == b
    assert ours(1).rest is not ours(1).rest
    for wrong in ((), (1, 2, 3, 4)):
        with pytest.raises(TypeError):
            ours(*wrong)
    with pytest.raises(TypeError, match="unexpected"):
        ours(1, other=2)


def test_mutable_ones_have_no_hash_and_frozen_ones_no_assignment() -> None:
    _, mutable = both()
    item = mutable(1)
    item.first = 2
    assert item == mutable(2)
    with pytest.raises(TypeError, match="unhashable"):
        hash(item)
    with pytest.raises(dataclasses.FrozenInstanceError, match="'K'"):
        SPEC.K = 3  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError, match="'K'"):
        del SPEC.K


def test_order_hash_and_pickle() -> None:
    a, b = Bucket(1, 5), Bucket(2, 0)
    assert sorted([b, a]) == [a, b]
    assert a < b
    assert a <= a
    assert b > a
    assert b >= b
    with pytest.raises(TypeError):
        a < SPEC  # type: ignore[operator]  # noqa: B015
    assert {Bucket(1, 5): "x"}[a] == "x"
    problem = Problem(SPEC, 1, 2, 3)
    assert pickle.loads(pickle.dumps(problem)) == problem
    assert hash(copy.copy(problem)) == hash(problem)
    assert dataclasses.replace(problem, B=4).bucket != problem.bucket
    assert Op.FORWARD.value == "forward"
