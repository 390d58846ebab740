"""Bad arguments: each gives a typed error that names the argument, and nothing is launched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glac import engine
from glac.attention import chunk_gla, chunk_gla_lowrank
from glac.errors import GlacError, InputError, InputTypeError
from glac.problem import DType, Gate, Precision, Specialisation
from glac.testing import make_inputs
from glac.validate import check_lowrank, check_vector

B, T, H, K, V, R = 2, 5, 3, 8, 6, 16
Arguments = dict[str, Any]
FP16, FP32 = torch.float16, torch.float32
SHAPES = {
    "q": (B, T, H, K),
    "k": (B, T, H, K),
    "v": (B, T, H, V),
    "g": (B, T, H, K),
    "x": (B, T, R),
    "weight": (H * K, R),
    "bias": (H * K,),
    "initial_state": (B, H, K, V),
}
TENSORS = {
    "vector": ("q", "k", "v", "g", "initial_state"),
    "lowrank": ("q", "k", "v", "x", "weight", "bias", "initial_state"),
}
OPERATIONS: dict[str, Callable[..., Any]] = {"vector": chunk_gla, "lowrank": chunk_gla_lowrank}


def good(operation: str) -> Arguments:
    made = {name: torch.zeros(SHAPES[name], dtype=FP16) for name in TENSORS[operation]}
    made["initial_state"] = torch.zeros(SHAPES["initial_state"])
    return made


@dataclass(frozen=True)
class Bad:
    """A call that must fail: ``changes`` to the arguments of a good one."""

    operation: str
    what: str
    changes: Callable[[], Arguments]
    error: type[GlacError]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.operation}-{self.what}"


def changed(name: str, value: Any) -> Callable[[], Arguments]:
    return lambda: {name: value}


def sized(operation: str, sizes: dict[str, int], device: str = "cpu") -> Callable[[], Arguments]:
    """Every tensor at other sizes, consistent with each other."""

    def make() -> Arguments:
        n = {"B": B, "T": T, "H": H, "K": K, "V": V, **sizes}
        shapes = {
            "q": (n["B"], n["T"], n["H"], n["K"]),
            "k": (n["B"], n["T"], n["H"], n["K"]),
            "v": (n["B"], n["T"], n["H"], n["V"]),
            "g": (n["B"], n["T"], n["H"], n["K"]),
            "x": (n["B"], n["T"], R),
            "weight": (n["H"] * n["K"], R),
            "bias": (n["H"] * n["K"],),
        }
        tensors: Arguments = {
            name: torch.empty(shapes[name], dtype=FP16, device=device)
            for name in TENSORS[operation]
            if name in shapes
        }
        return {**tensors, "initial_state": None}

    return make


def bad_tensors(operation: str) -> Iterator[Bad]:
    words: tuple[str, ...]
    for name in TENSORS[operation]:
        tensor = good(operation)[name]
        shape = SHAPES[name]
        # The other tensors are held against q, so a wrong size of q shows in the first of them.
        blamed = "k" if name == "q" else name
        for junk in ([1.0], 1.0, "q", np.zeros(shape, np.float32)):
            kind = type(junk).__name__
            words = (f"{name} must be a torch.Tensor", kind)
            yield Bad(operation, f"{name}-{kind}", changed(name, junk), InputTypeError, words)
        for other in (tensor.flatten()[0], tensor[None]):
            words = (f"{name} must be [", "dimensions", str(tuple(other.shape)))
            what = f"{name}-rank-{other.dim()}"
            yield Bad(operation, what, changed(name, other), InputError, words)
        for axis, size in enumerate(shape):
            for wrong_size in (size + 1, 1 if axis == 0 else size - 1):
                wrong = [*shape[:axis], wrong_size, *shape[axis + 1 :]]
                value = torch.zeros(wrong, dtype=tensor.dtype)
                what = f"{name}-axis-{axis}-of-{wrong_size}"
                # v is where V comes from.
                first = "initial_state" if (name, axis) == ("v", 3) else blamed
                # Heads may differ, as long as they divide: those of k and q are held against v's.
                if axis == 2 and name in ("q", "k", "v"):
                    first = "q" if name == "q" else "k"
                words = (f"{first} must be [", "got")
                yield Bad(operation, what, changed(name, value), InputError, words)
        wrong_types = [torch.float64, torch.int32, torch.bool, torch.complex64, torch.bfloat16]
        if name in ("q", "initial_state"):
            wrong_types.remove(torch.bfloat16)
        for dtype in wrong_types:
            words = (f"{name} must be ", "torch.float", f"got {dtype}")
            value = tensor.to(dtype)
            yield Bad(operation, f"{name}-{dtype}", changed(name, value), InputTypeError, words)
        words = (f"{blamed} is on ", "q is on ", "meta", "cpu")
        value = tensor.to("meta")
        yield Bad(operation, f"{name}-on-meta", changed(name, value), InputTypeError, words)
    for name in TENSORS[operation][:-1]:
        if name != "bias":
            words = (f"{name} must be a torch.Tensor", "NoneType")
            yield Bad(operation, f"{name}-None", changed(name, None), InputTypeError, words)


def bad_sizes(operation: str) -> Iterator[Bad]:
    words: tuple[str, ...]
    for letter in "BTH":
        words = (f"{letter} must be at least 1", "got")
        what = f"{letter}=0"
        yield Bad(operation, what, sized(operation, {letter: 0}), InputError, words)
    for letter, limit in (("K", 512), ("V", 512)):
        for size in (0, limit + 1, 10 * limit):
            words = (f"{letter} must be in 1..{limit}", f"got {size}")
            make = sized(operation, {letter: size})
            yield Bad(operation, f"{letter}={size}", make, InputError, words)
    for sizes in ({"H": 2**16, "K": 256}, {"H": 2**15, "V": 512}, {"H": 2**20, "K": 16}):
        make = sized(operation, {"B": 1, "T": 1, **sizes}, "meta")
        words = ("one token has", "addressable", "hint: split the heads")
        yield Bad(operation, f"huge-token-{sizes}", make, InputError, words)
    make = sized(operation, {"B": 1, "T": 2**31, "H": 1}, "meta")
    yield Bad(operation, "T=2^31", make, InputError, ("T must be below", "got 2147483648"))


def bad_scalars(operation: str) -> Iterator[Bad]:
    words: tuple[str, ...]
    names = ("scale",) if operation == "vector" else ("scale", "normalizer", "clamp_min")
    for name in names:
        for value in (math.nan, math.inf, -math.inf):
            words = (f"{name} must be finite", f"got {value}")
            yield Bad(operation, f"{name}={value}", changed(name, value), InputError, words)
        for wrong in (True, "1", 1j, [1.0], torch.tensor(1.0)):
            kind = type(wrong).__name__
            words = (f"{name} must be a number", f"got {kind}")
            yield Bad(operation, f"{name}-{kind}", changed(name, wrong), InputTypeError, words)
    if operation == "lowrank":
        for low in (0, 0.0, -1.0):
            words = ("normalizer must be greater than 0", f"got {low}")
            make = changed("normalizer", low)
            yield Bad(operation, f"normalizer={low!r}", make, InputError, words)
        make = changed("clamp_min", 0.5)
        yield Bad(operation, "clamp_min=0.5", make, InputError, ("clamp_min must be", "got 0.5"))
        for rank in (0, 1, 4, 12, 128):
            x = torch.zeros(B, T, rank, dtype=FP16)
            weight = torch.zeros(H * K, rank, dtype=FP16)

            def make_rank(x: Tensor = x, weight: Tensor = weight) -> Arguments:
                return {"x": x, "weight": weight}

            words = ("x must be [B, T, R]", "(8, 16, 32, 64)", str(tuple(x.shape)))
            yield Bad(operation, f"rank={rank}", make_rank, InputError, words)


CASES = [
    case
    for operation in OPERATIONS
    for source in (bad_tensors, bad_sizes, bad_scalars)
    for case in source(operation)
]


@pytest.fixture(autouse=True)
def _default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLAC_CHECKED", "GLAC_REQUIRE_AOT", "GLAC_PACK_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def _nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("bad arguments got past the checks")

    monkeypatch.setattr(engine, "launchable", never)


def test_there_are_many_cases() -> None:
    assert len(CASES) > 100
    assert len({str(case) for case in CASES}) == len(CASES)


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_call(case: Bad) -> None:
    arguments = {**good(case.operation), **case.changes()}
    with pytest.raises(case.error) as caught:
        OPERATIONS[case.operation](**arguments)
    text = str(caught.value)
    for word in case.words:
        assert word in text
    builtin = TypeError if case.error is InputTypeError else ValueError
    assert isinstance(caught.value, builtin)


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_control_the_good_call_gets_through(operation: str) -> None:
    with pytest.raises(AssertionError, match="got past the checks"):
        OPERATIONS[operation](**good(operation))


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize("value", [0.5, math.nan, math.inf, 1e-30])
def test_checked_mode_refuses_gates_that_are_no_log_decays(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {**good("vector"), "g": torch.zeros(B, T, H, K)}
    arguments["g"][1, 2, 0, 3] = value
    with pytest.raises(AssertionError, match="got past the checks"):
        chunk_gla(**arguments)
    monkeypatch.setenv("GLAC_CHECKED", "1")
    with pytest.raises(InputError, match=r"g must be <= 0 .* got .* at \(1, 2, 0, 3\)") as caught:
        chunk_gla(**arguments)
    assert "logsigmoid" in caught.value.hint


@pytest.mark.parametrize("value", [0.0, -0.0, -1e-30, -1e4, -math.inf])
def test_checked_mode_accepts_log_decays(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLAC_CHECKED", "1")
    arguments = {**good("vector"), "g": torch.full((B, T, H, K), value)}
    o, _ = chunk_gla(**arguments)
    assert bool((o == 0).all())


@pytest.mark.parametrize("chunk_size", [0, -16, 3, 48])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_chunk_size(operation: str, chunk_size: int) -> None:
    with pytest.raises(InputError, match=f"chunk_size must be .* got {chunk_size}"):
        OPERATIONS[operation](**good(operation), chunk_size=chunk_size)


def test_a_wrong_rank_says_where_the_tokens_belong() -> None:
    with pytest.raises(InputError) as caught:
        chunk_gla(**{**good("vector"), "v": torch.zeros(B, T, V)})
    assert "[B, T, H, D]" in caught.value.hint


def test_another_device_says_how_to_move() -> None:
    with pytest.raises(InputTypeError) as caught:
        chunk_gla(**{**good("vector"), "g": torch.zeros(B, T, H, K, device="meta")})
    assert caught.value.hint == "move it: g.to(q.device)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP16, FP32])
@pytest.mark.parametrize("wide", [False, True])
def test_what_a_good_call_is_compiled_for(dtype: torch.dtype, wide: bool) -> None:
    gate_dtype = FP32 if wide else dtype
    x = make_inputs(B, T, H, K, V, dtype=dtype, gate_dtype=gate_dtype)
    assert x.g is not None
    problem = check_vector(x.q, x.k, x.v, x.g, None)
    assert (problem.B, problem.T, problem.H) == (B, T, H)
    spec = problem.spec
    assert (spec.K, spec.V, spec.gate, spec.rank) == (K, V, Gate.VECTOR, 0)
    assert (spec.gate_dtype is DType.FP32) == (gate_dtype == FP32)
    y = make_inputs(B, T, H, K, V, dtype=dtype, gate="lowrank", rank=R)
    assert y.x is not None
    assert y.weight is not None
    assert y.bias is not None
    bias = y.bias.to(gate_dtype)
    lowrank = check_lowrank(y.q, y.k, y.v, y.x, y.weight, bias, None).spec
    assert (lowrank.gate, lowrank.rank) == (Gate.LOWRANK, R)
    assert lowrank.gate_dtype is spec.gate_dtype
    without = check_lowrank(y.q, y.k, y.v, y.x, y.weight, None, None).spec
    assert without.gate_dtype is without.dtype


@pytest.mark.parametrize("operation", ["vector", "lowrank"])
def test_tf32_goes_with_fp32_inputs(operation: str) -> None:
    arguments = good(operation)
    with pytest.raises(InputError, match=r"precision 'tf32' goes with .*float32.* torch\.float16"):
        OPERATIONS[operation](**arguments, precision="tf32")
    wide = {name: t.float() for name, t in arguments.items()}
    OPERATIONS[operation](**wide, precision="tf32")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="bfloat16"):
        OPERATIONS[operation](**wide, precision="tf32")


def test_the_precision_is_part_of_the_problem() -> None:
    x = make_inputs(B, T, H, K, V, dtype=FP32)
    y = make_inputs(B, T, H, K, V, dtype=FP32, gate="lowrank", rank=R)
    assert x.g is not None
    assert y.x is not None
    assert y.weight is not None
    usual = (
        check_vector(x.q, x.k, x.v, x.g, None),
        check_lowrank(y.q, y.k, y.v, y.x, y.weight, None, None),
    )
    once = (
        check_vector(x.q, x.k, x.v, x.g, None, None, "tf32"),
        check_lowrank(y.q, y.k, y.v, y.x, y.weight, None, None, None, "tf32"),
    )
    for a, b in zip(usual, once, strict=True):
        assert a.spec.precision is Precision.IEEE
        assert b == replace(a, spec=replace(a.spec, precision=Precision.TF32))


@pytest.mark.parametrize(("keys", "values"), [(1, 1), (256, 512)])
def test_the_limits_themselves_are_fine(keys: int, values: int) -> None:
    x = make_inputs(1, 1, 1, keys, values, dtype=FP32)
    assert x.g is not None
    wanted = Specialisation(keys, values, DType.FP32, Gate.VECTOR, DType.FP32)
    assert check_vector(x.q, x.k, x.v, x.g, None).spec == wanted


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"scale": 10**400}, InputError, "scale must be finite"),
        ({"chunk_size": "a"}, InputTypeError, "chunk_size must be an integer"),
        ({"chunk_size": 16.0}, InputTypeError, "chunk_size must be an integer"),
        ({"chunk_size": True}, InputTypeError, "chunk_size must be an integer"),
        ({"chunk_size": 48}, InputError, "chunk_size must be a power of two"),
        ({"precision": "fp32"}, InputError, "precision must be one of ieee, tf32, got 'fp32'"),
        ({"precision": None}, InputError, "precision must be one of ieee, tf32, got None"),
    ],
)
def test_odd_scalars(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    x = torch.randn(1, 4, 1, 8)
    with pytest.raises(error, match=words):
        chunk_gla(x, x, x, -x.abs(), **arguments)


def test_numpy_scalars_are_numbers() -> None:
    x = torch.randn(1, 4, 1, 8)
    o, _ = chunk_gla(x, x, x, -x.abs(), scale=np.float32(0.5))  # type: ignore[arg-type]
    expected, _ = chunk_gla(x, x, x, -x.abs(), scale=0.5)
    assert torch.equal(o, expected)


def test_normalizer_too_small_to_divide_by() -> None:
    x = torch.randn(1, 4, 1, 8)
    with pytest.raises(InputError, match="normalizer must be greater than 0"):
        chunk_gla_lowrank(x, x, x, x[:, :, 0], torch.randn(8, 8), normalizer=5e-324)


def test_sparse_tensors_are_refused() -> None:
    x = torch.randn(1, 4, 1, 8)
    with pytest.raises(InputTypeError, match="q must be a dense tensor"):
        chunk_gla(x.to_sparse(), x, x, -x.abs())
