"""Packed batches, grouped heads, direction and state layout, on the CPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glac import ops
from glac.attention import chunk_gla, chunk_gla_lowrank
from glac.errors import InputError, InputTypeError
from glac.problem import Bucket, DType, Gate, Problem, Specialisation
from glac.reference import recurrent_gla

SCALE = 0.3


@pytest.fixture(autouse=True)
def _default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLAC_CHECKED", "GLAC_REQUIRE_AOT", "GLAC_PACK_PATH"):
        monkeypatch.delenv(name, raising=False)


def drawn(
    T: int,
    heads: tuple[int, int, int] = (2, 2, 2),
    *,
    B: int = 1,
    sequences: int = 0,
    K: int = 8,
    V: int = 6,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of ``chunk_gla`` with so many heads of q, k and v."""
    torch.manual_seed(seed)
    q, k, v = heads
    return {
        "q": torch.randn(B, T, q, K),
        "k": torch.randn(B, T, k, K),
        "v": torch.randn(B, T, v, V),
        "g": torch.nn.functional.logsigmoid(torch.randn(B, T, v, K)) / 4,
        "initial_state": torch.randn(sequences or B, v, K, V),
    }


def leaves(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.clone().requires_grad_() for name, t in x.items()}


def by_definition(x: dict[str, Tensor], bounds: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """The token loop in fp64 over copies of grouped heads, sequence by sequence."""
    heads = max(x["q"].shape[2], x["v"].shape[2])
    group = heads // x["v"].shape[2]

    def wide(name: str, dim: int) -> Tensor:
        t = x[name].double()
        return t.repeat_interleave(heads // t.shape[dim], dim)

    q, k, v, g = (wide(n, 2) for n in ("q", "k", "v", "g"))
    start = wide("initial_state", 1)
    if bounds is None:
        o, state = recurrent_gla(
            q, k, v, g, scale=SCALE, initial_state=start, output_final_state=True
        )
        assert state is not None
        return o, state[:, ::group]
    outputs, states = [], []
    for n, (a, b) in enumerate(itertools.pairwise(bounds)):
        if a == b:
            states.append(start[n : n + 1])
            continue
        o, state = recurrent_gla(
            q[:, a:b],
            k[:, a:b],
            v[:, a:b],
            g[:, a:b],
            scale=SCALE,
            initial_state=start[n : n + 1],
            output_final_state=True,
        )
        assert state is not None
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states)[:, ::group]


def assert_same(x: dict[str, Tensor], bounds: list[int] | None = None, **options: Any) -> None:
    """Values and all gradients of ``chunk_gla`` are those of the definition."""
    cu = None if bounds is None else torch.tensor(bounds)
    a: dict[str, Any] = leaves(x)
    b = leaves(x)
    o, state = chunk_gla(**a, scale=SCALE, output_final_state=True, cu_seqlens=cu, **options)
    wanted, last = by_definition(b, bounds)
    assert state is not None
    assert o.shape == wanted.shape
    assert state.shape == last.shape
    assert torch.allclose(o.double(), wanted, atol=1e-5)
    assert torch.allclose(state.double(), last, atol=1e-5)
    do, dht = torch.randn_like(o), torch.randn_like(state)
    actual = torch.autograd.grad((o, state), list(a.values()), (do, dht))
    expected = torch.autograd.grad((wanted, last), list(b.values()), (do.double(), dht.double()))
    for name, got, true in zip(a, actual, expected, strict=True):
        assert got.shape == x[name].shape
        assert torch.allclose(got, true.to(got.dtype), atol=2e-5, rtol=1e-4), name


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any),
    heads=st.sampled_from([(1, 1, 1), (2, 1, 2), (1, 2, 4), (4, 1, 2), (4, 2, 4)]),
    seed=st.integers(0, 9),
)
def test_packed_and_grouped(lengths: list[int], heads: tuple[int, int, int], seed: int) -> None:
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    assert_same(drawn(bounds[-1], heads, sequences=len(lengths), seed=seed), bounds)


@pytest.mark.parametrize("heads", [(4, 2, 4), (2, 4, 4), (4, 1, 1), (6, 3, 3)])
def test_grouped_heads_of_a_dense_batch(heads: tuple[int, int, int]) -> None:
    assert_same(drawn(21, heads, B=2))


def test_low_rank_gates_of_grouped_heads() -> None:
    x = drawn(15, (4, 1, 2))
    low, weight, bias = torch.randn(1, 15, 8), torch.randn(16, 8), torch.randn(16)
    g = torch.nn.functional.logsigmoid(low @ weight.T + bias).view(1, 15, 2, 8) / 16
    del x["g"]
    o, _ = chunk_gla_lowrank(x["q"], x["k"], x["v"], low, weight, bias, scale=SCALE)
    wanted, _ = chunk_gla(x["q"], x["k"], x["v"], g, scale=SCALE)
    assert torch.allclose(o, wanted, atol=1e-5)


@pytest.mark.parametrize("bounds", [None, [0, 4, 4, 13]])
@pytest.mark.parametrize("lowrank", [False, True])
def test_reverse_is_the_flipped_sequence(bounds: list[int] | None, lowrank: bool) -> None:
    x = drawn(13, sequences=len(bounds) - 1 if bounds else 0)
    options: dict[str, Any] = {"output_final_state": True}
    run: Any = chunk_gla
    if lowrank:
        run = chunk_gla_lowrank
        del x["g"]
        x |= {"x": torch.randn(1, 13, 8)}
        options |= {"weight": torch.randn(16, 8)}
    cu = None if bounds is None else torch.tensor(bounds)
    o, state = run(**x, **options, reverse=True, cu_seqlens=cu)
    for n, (a, b) in enumerate(zip(bounds or [0], (bounds or [0, 13])[1:], strict=False)):
        if a == b:
            assert torch.equal(state[n], x["initial_state"][n])
            continue
        one = {name: t[:, a:b].flip(1) for name, t in x.items() if name != "initial_state"}
        alone, last = run(**one, **options, initial_state=x["initial_state"][n : n + 1])
        assert torch.allclose(o[:, a:b], alone.flip(1), atol=1e-5)
        assert torch.allclose(state[n : n + 1], last, atol=1e-5)


def test_transposed_states() -> None:
    x = drawn(9)
    o, state = chunk_gla(**x, output_final_state=True)
    x["initial_state"] = x["initial_state"].mT
    same, turned = chunk_gla(**x, output_final_state=True, state_layout="vk")
    assert state is not None
    assert turned is not None
    assert torch.equal(o, same)
    assert torch.equal(state, turned.mT)


@pytest.mark.parametrize("lowrank", [False, True])
def test_states_in_bf16(lowrank: bool) -> None:
    x = drawn(9)
    start = x.pop("initial_state").to(torch.bfloat16)
    run: Any = chunk_gla
    if lowrank:
        run = chunk_gla_lowrank
        del x["g"]
        x |= {"x": torch.randn(1, 9, 8), "weight": torch.randn(16, 8)}
    options = {"output_final_state": True}
    o, state = run(**x, **options, initial_state=start.float())
    same, narrow = run(**x, **options, initial_state=start, state_dtype=torch.bfloat16)
    assert torch.equal(o, same)
    assert torch.equal(state.to(torch.bfloat16), narrow)
    wide, last = run(**x, **options, initial_state=start)
    assert torch.equal(o, wide)
    assert torch.equal(state, last)
    start.requires_grad_()
    o, _ = run(**x, initial_state=start)
    (grad,) = torch.autograd.grad(o.sum(), start)
    assert grad.dtype is torch.bfloat16


def test_a_compiled_packed_call() -> None:
    torch._dynamo.reset()
    x = drawn(20, sequences=2)
    cu = torch.tensor([0, 7, 20])
    wanted = chunk_gla(**x, cu_seqlens=cu, output_final_state=True)
    compiled = torch.compile(chunk_gla, fullgraph=True, backend="aot_eager")
    actual = compiled(**x, cu_seqlens=cu, output_final_state=True)
    for a, b in zip(actual, wanted, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_operators_take_boundaries() -> None:
    x = leaves(drawn(20, (2, 1, 1), sequences=2))
    cu = torch.tensor([0, 7, 20], dtype=torch.int32)
    inputs = (x["q"], x["k"], x["v"], x["g"], x["initial_state"], cu)
    torch.library.opcheck(ops.chunk_gla_fwd, (*inputs, SCALE, True, 16, "ieee"))
    do = torch.randn(1, 20, 2, 6)
    plain = (t.detach() for t in inputs)
    torch.library.opcheck(ops.chunk_gla_bwd, (*plain, do, None, SCALE, 16, "ieee"))


CU = torch.tensor([0, 7, 20])
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("list", {"cu_seqlens": [0, 20]}, InputTypeError, "cu_seqlens must be a torch.Tensor"),
    ("float", {"cu_seqlens": CU.float()}, InputTypeError, "cu_seqlens must be torch.int32"),
    ("scalar", {"cu_seqlens": CU[0]}, InputError, r"cu_seqlens must be \[N \+ 1\]"),
    ("one", {"cu_seqlens": CU[:1]}, InputError, r"cu_seqlens must be \[N \+ 1\]"),
    ("start", {"cu_seqlens": CU + 1}, InputError, "begin with 0, got 1 at position 0"),
    ("end", {"cu_seqlens": CU[:2]}, InputError, "T = 20, got 7 at position 1"),
    ("down", {"cu_seqlens": torch.tensor([0, 9, 7, 20])}, InputError, "got 7 after 9 at posi"),
    ("copy", {"cu_seqlens": CU, "cu_seqlens_cpu": CU[:2]}, InputError, "a copy of cu_seqlens"),
    ("alone", {"cu_seqlens_cpu": CU}, InputError, "must be a copy of cu_seqlens"),
    (
        "copied",
        {"cu_seqlens": CU, "cu_seqlens_cpu": torch.tensor([0, 30, 20])},
        InputError,
        "got 20 after 30 at position 2",
    ),
    ("device", {"cu_seqlens": CU.to("meta")}, InputTypeError, "cu_seqlens is on meta"),
    ("layout", {"state_layout": "kk"}, InputError, "state_layout must be one of kv, vk"),
    (
        "state",
        {"state_dtype": torch.float16},
        InputTypeError,
        "state_dtype must be torch.float32 or torch.bfloat16, got torch.float16",
    ),
]


@pytest.mark.parametrize(
    ("change", "error", "words"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], words: str) -> None:
    x = drawn(20)
    del x["initial_state"]
    with pytest.raises(error, match=words):
        chunk_gla(**x, **change)


def test_packed_batches_are_one_row() -> None:
    x = drawn(20, B=2)
    with pytest.raises(InputError, match="packed into one row"):
        chunk_gla(**x, cu_seqlens=CU)


@pytest.mark.parametrize(
    ("heads", "blamed"), [((2, 3, 2), "k"), ((2, 2, 3), "k"), ((3, 2, 2), "q")]
)
def test_heads_that_do_not_divide(heads: tuple[int, int, int], blamed: str) -> None:
    with pytest.raises(InputError, match=f"{blamed} must be .* the {heads[2]} heads of v"):
        chunk_gla(**drawn(5, heads))


def test_packed_batches_share_the_buckets_of_dense_ones() -> None:
    spec = Specialisation(64, 64, DType.BF16, Gate.VECTOR, DType.BF16)
    assert Problem(spec, 1, 16 * 2048, 8, packed=16).bucket == Problem(spec, 16, 2048, 8).bucket
    assert Problem(spec, 1, 3, 1, packed=5).bucket == Bucket(2, 0)
