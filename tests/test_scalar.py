"""Linear attention with scalar gates on the CPU: semantics, gradients, checks, operators."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glac import attention, scalar, scalar_autograd, scalar_segments
from glac.attention import chunk_gla, chunk_linear_attn, chunk_retention, chunk_simple_gla
from glac.configs import ScalarForwardConfig, TurnedKernelConfig
from glac.errors import InputError, InputTypeError, NotDifferentiableError
from glac.problem import DType, Gate, Precision, Problem, Specialisation
from glac.reference import (
    recurrent_gla,
    relative_rms,
    yardstick_scalar_gla,
    yardstick_scalar_gla_backward,
)
from glac.testing import hard_gates, make_inputs

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16


def drawn(B: int = 2, T: int = 37, H: int = 4, **options: Any) -> Any:
    options.setdefault("dtype", FP32)
    return make_inputs(B, T, H, 16, 24, gate="scalar", initial_state=True, **options)


def test_equals_the_vector_gate() -> None:
    x = drawn()
    o, end = chunk_simple_gla(
        x.q, x.k, x.v, x.g, initial_state=x.initial_state, output_final_state=True
    )
    wanted, last = chunk_gla(
        x.q,
        x.k,
        x.v,
        x.g[..., None].expand(x.q.shape),
        initial_state=x.initial_state,
        output_final_state=True,
    )
    torch.testing.assert_close(o, wanted)
    torch.testing.assert_close(end, last)


def test_retention_has_the_rates_of_retnet() -> None:
    x = drawn()
    o, _ = chunk_retention(x.q, x.k, x.v)
    rates = torch.tensor([math.log(1 - 2.0 ** (-5 - h)) for h in range(4)])
    wanted, _ = chunk_simple_gla(x.q, x.k, x.v, rates.expand(2, 37, 4))
    torch.testing.assert_close(o, wanted)
    given_rates, _ = chunk_retention(x.q, x.k, x.v, g=rates)
    torch.testing.assert_close(given_rates, wanted)


def test_no_gate() -> None:
    x = drawn()
    o, _ = chunk_linear_attn(x.q, x.k, x.v)
    wanted, _ = chunk_simple_gla(x.q, x.k, x.v, torch.zeros(2, 37, 4))
    torch.testing.assert_close(o, wanted)


def gradients(outputs: tuple[Tensor, Tensor | None], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    o, end = outputs
    assert end is not None
    generator = torch.Generator().manual_seed(1)
    loss = (o * torch.randn(o.shape, generator=generator)).sum()
    loss = loss + (end * torch.randn(end.shape, generator=generator)).sum()
    return torch.autograd.grad(loss, leaves)


@settings(max_examples=15, deadline=None)
@given(
    heads=st.sampled_from([(2, 2, 2), (4, 2, 2), (4, 1, 2), (1, 2, 4)]),
    kind=st.sampled_from(["token", "head", "none"]),
    lengths=st.one_of(st.none(), st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any)),
    hard=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gradients_are_those_of_the_token_loop(
    heads: tuple[int, int, int], kind: str, lengths: list[int] | None, hard: bool, seed: int
) -> None:
    Hq, Hk, Hs = heads
    generator = torch.Generator().manual_seed(seed)
    B, T = (2, 21) if lengths is None else (1, sum(lengths))
    N = B if lengths is None else len(lengths)
    cu = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int()

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).requires_grad_()

    q, k, v = randn(B, T, Hq, 8), randn(B, T, Hk, 8), randn(B, T, Hs, 12)
    h0 = randn(N, Hs, 8, 12)
    leaves = [q, k, v, h0]
    options: Any = {"initial_state": h0, "output_final_state": True, "cu_seqlens": cu}
    if kind == "none":
        g = torch.zeros(B, T, Hs)
        found = gradients(chunk_linear_attn(q, k, v, **options), leaves)
    else:
        shape = (B, T, Hs) if kind == "token" else (Hs,)
        g = torch.nn.functional.logsigmoid(torch.randn(shape, generator=generator))
        if hard and kind == "token":
            g = hard_gates((B, T, Hs, 1), seed=seed)[..., 0]
        g = g.requires_grad_()
        leaves.append(g)
        if kind == "token":
            found = gradients(chunk_simple_gla(q, k, v, g, **options), leaves)
        else:
            found = gradients(chunk_retention(q, k, v, g=g, **options), leaves)

    H = max(Hq, Hs)
    dense = g.expand(B, T, Hs)[..., None]
    wide = (
        q.repeat_interleave(H // Hq, 2),
        k.repeat_interleave(H // Hk, 2),
        v.repeat_interleave(H // Hs, 2),
        dense.repeat_interleave(H // Hs, 2).expand(B, T, H, 8),
    )
    bounds = [(b, 0, T) for b in range(B)]
    if lengths is not None:
        assert cu is not None
        bounds = [(0, low, high) for low, high in zip(cu.tolist(), cu.tolist()[1:], strict=False)]
    pieces, ends = [], []
    for n, (b, low, high) in enumerate(bounds):
        start = h0[n : n + 1].repeat_interleave(H // Hs, 1)
        end: Tensor | None = start
        if high > low:
            part = (t[b : b + 1, low:high].double() for t in wide)
            out, end = recurrent_gla(*part, initial_state=start.double(), output_final_state=True)
            pieces.append(out)
        assert end is not None
        ends.append(end[:, :: H // Hs].double())
    o = torch.cat(pieces, 0 if lengths is None else 1)
    wanted = gradients((o, torch.cat(ends)), leaves)
    for mine, theirs in zip(found, wanted, strict=True):
        assert relative_rms(mine, theirs) < 2e-5 or float((mine - theirs).abs().max()) < 1e-5


@pytest.mark.parametrize("hard", [False, True])
def test_the_yardstick_is_near_in_fp32_and_rounds_in_bf16(hard: bool) -> None:
    x = drawn(T=150)
    if hard:
        x.g.copy_(hard_gates((2, 150, 4, 1))[..., 0])
    do = torch.randn(x.v.shape)
    problem = scalar.check(scalar.ScalarInputs(x.q, x.k, x.v, x.g, x.initial_state))
    for dtype, low, high in ((FP32, 0.0, 2e-6), (BF16, 1e-4, 6e-3)):
        q, k, v, dout = (t.to(dtype) for t in (x.q, x.k, x.v, do))
        h0 = x.initial_state.double()
        i = scalar.ScalarInputs(q.double(), k.double(), v.double(), x.g.double(), h0)
        true_o, true_end = scalar.torch_forward(problem, i, 0.25, True, 64)
        o, end = yardstick_scalar_gla(
            q, k, v, x.g, initial_state=x.initial_state, output_final_state=True
        )
        assert low <= relative_rms(o, true_o) <= high
        assert true_end is not None
        assert end is not None
        assert low <= relative_rms(end, true_end) <= high
        true = scalar.torch_backward(
            problem, i, 0.25, dout.double(), None, 64, want_dg=True, want_dh0=True
        )
        near = yardstick_scalar_gla_backward(q, k, v, x.g, dout, initial_state=x.initial_state)
        for mine, theirs in zip(near, true, strict=True):
            assert mine is not None
            assert theirs is not None
            assert low <= relative_rms(mine, theirs) <= high


def refused(kind: type[Exception], match: str, **changes: Any) -> None:
    x = drawn()
    call = {"q": x.q, "k": x.k, "v": x.v, "g": x.g, "initial_state": x.initial_state, **changes}
    with pytest.raises(kind, match=match):
        chunk_simple_gla(**call)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refused(InputError, "g must be", g=torch.zeros(2, 37, 4, 16))
    refused(InputError, "g must be", g=torch.zeros(2, 37, 5))
    refused(InputError, "g must be", g=None)
    refused(InputTypeError, "g must be", g=torch.zeros(2, 37, 4).half())
    refused(
        InputError,
        "k must be .* with Hk a divisor of the 4 heads of v",
        k=torch.zeros(2, 37, 3, 16),
    )
    refused(InputError, "initial_state must be", initial_state=torch.zeros(2, 4, 24, 16))
    refused(InputError, "cu_seqlens", cu_seqlens=torch.zeros(3, dtype=torch.int32))
    refused(InputTypeError, "cu_seqlens", cu_seqlens=torch.zeros(3))
    refused(InputError, "chunk_size", chunk_size=3)
    monkeypatch.setenv("GLAC_CHECKED", "1")
    refused(InputError, "g must be <= 0", g=torch.ones(2, 37, 4))
    x = drawn(B=1)
    monkeypatch.delenv("GLAC_CHECKED")
    good = torch.tensor([0, 20, 37], dtype=torch.int32)
    for offsets, words in (
        ([1, 37], "begin with 0, got 1 at position 0"),
        ([0, 20, 10], "got 10 after 20 at position 2"),
        ([0, 50], "T = 37, got 50 at position 1"),
    ):
        # On the CPU values are always looked at; those of a GPU are in a copy or in checked mode.
        cu = torch.tensor(offsets, dtype=torch.int32)
        with pytest.raises(InputError, match=words):
            chunk_linear_attn(x.q, x.k, x.v, cu_seqlens=cu)
        if len(cu) == len(good):
            with pytest.raises(InputError, match=words):
                chunk_linear_attn(x.q, x.k, x.v, cu_seqlens=good, cu_seqlens_cpu=cu)
    with pytest.raises(InputError, match="a copy of cu_seqlens"):
        chunk_linear_attn(x.q, x.k, x.v, cu_seqlens_cpu=good)
    refused(InputError, "state_layout must be one of", state_layout="kk")
    refused(InputTypeError, "state_dtype must be", state_dtype=torch.float16)
    refused(
        InputTypeError, "initial_state must be", initial_state=torch.zeros(2, 4, 16, 24).half()
    )


def calls(x: Any) -> list[Any]:
    """Each scalar operation as a function of q, k, v, gate and options."""
    rates = -torch.rand(4)
    return [
        lambda q, k, v, g, **o: chunk_simple_gla(q, k, v, g, **o),
        lambda q, k, v, g, **o: chunk_retention(q, k, v, g=rates, **o),
        lambda q, k, v, g, **o: chunk_linear_attn(q, k, v, **o),
    ]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("bounds", [None, [0, 20, 20, 37]])
def test_reverse_is_the_flipped_sequence(which: int, bounds: list[int] | None) -> None:
    x = drawn(B=1)
    run = calls(x)[which]
    tensors = [x.q, x.k, x.v, x.g]
    cu = None if bounds is None else torch.tensor(bounds)  # int64
    h0 = torch.randn(len(bounds) - 1 if bounds else 1, 4, 16, 24)
    options = {"output_final_state": True}
    leaves = [t.clone().requires_grad_() for t in (*tensors, h0)]
    *given, start = leaves
    o, end = run(*given, reverse=True, cu_seqlens=cu, initial_state=start, **options)
    outs, ends = [], []
    for n, (a, b) in enumerate(zip(bounds or [0], (bounds or [0, 37])[1:], strict=False)):
        state = start[n : n + 1]
        if a < b:
            flipped = (t[:, a:b].flip(1) for t in given)
            out, state = run(*flipped, initial_state=state, **options)
            outs.append(out.flip(1))
        ends.append(state)
    torch.testing.assert_close(o, torch.cat(outs, 1))
    torch.testing.assert_close(end, torch.cat(ends))
    used = [t for t in leaves if which == 0 or t is not leaves[3]]
    mine = torch.autograd.grad(o.square().sum() + end.sum(), used)
    whole = torch.cat(outs, 1).square().sum() + torch.cat(ends).sum()
    for one, other in zip(mine, torch.autograd.grad(whole, used), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("which", range(3))
def test_states_transposed_and_in_bf16(which: int) -> None:
    x = drawn()
    run = calls(x)[which]
    tensors = (x.q, x.k, x.v, x.g)
    options = {"output_final_state": True}
    start = x.initial_state.to(BF16)
    o, end = run(*tensors, initial_state=start.float(), **options)
    same, turned = run(*tensors, initial_state=start.mT, state_layout="vk", **options)
    small, narrow = run(*tensors, initial_state=start, state_dtype=BF16, **options)
    assert torch.equal(o, same)
    assert torch.equal(o, small)
    assert turned.dtype is FP32
    assert narrow.dtype is BF16
    assert torch.equal(end, turned.mT)
    assert torch.equal(end.to(BF16), narrow)
    start.requires_grad_()
    _, end = run(*tensors, initial_state=start, state_dtype=BF16, **options)
    (grad,) = torch.autograd.grad(end.float().sum(), start)
    assert grad.dtype is BF16


def test_autocast() -> None:
    x = drawn()
    with torch.autocast("cpu", BF16):
        for run in calls(x):
            o, end = run(x.q, x.k, x.v, x.g, output_final_state=True)
            assert (o.dtype, end.dtype) == (BF16, FP32)
            wanted, _ = run(x.q.to(BF16), x.k.to(BF16), x.v.to(BF16), x.g)
            assert torch.equal(o, wanted)


def test_retention_takes_one_decay_per_head() -> None:
    x = drawn()
    with pytest.raises(InputError, match=r"g must be \[H\]"):
        chunk_retention(x.q, x.k, x.v, g=x.g)


def test_differentiable_once() -> None:
    x = drawn()
    q = x.q.requires_grad_()
    o, _ = chunk_simple_gla(q, x.k, x.v, x.g)
    (dq,) = torch.autograd.grad(o.sum(), q, create_graph=True)
    with pytest.raises(NotDifferentiableError):
        torch.autograd.grad(dq.sum(), q)


def test_only_what_depends_on_the_state_gets_a_gradient() -> None:
    x = drawn()
    k = x.k.requires_grad_()
    _, end = chunk_simple_gla(x.q, k, x.v, x.g, output_final_state=True)
    assert end is not None
    (dk,) = torch.autograd.grad(end.sum(), k)
    assert bool(dk.isfinite().all())
    assert bool(dk.any())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_operators(packed: bool, gated: bool, precision: str) -> None:
    x = drawn(B=1 if packed else 2, T=9)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32) if packed else None
    h0 = torch.randn(2, 4, 16, 24).requires_grad_()
    q, k, v = (t.requires_grad_() for t in (x.q, x.k, x.v))
    g = x.g.requires_grad_() if gated else None
    inputs = (q, k, v, g, h0, cu)
    torch.library.opcheck(
        scalar_autograd.chunk_simple_gla_fwd, (*inputs, 0.25, True, 64, precision)
    )
    plain = tuple(None if t is None else t.detach() for t in inputs)
    do = torch.randn(x.v.shape)
    torch.library.opcheck(
        scalar_autograd.chunk_simple_gla_bwd, (*plain, do, None, 0.25, 64, precision)
    )


@pytest.mark.parametrize("function", [chunk_simple_gla, chunk_retention, chunk_linear_attn])
def test_precision(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is part of the problem in both passes, and changes nothing in PyTorch."""
    seen: list[Precision] = []
    check = scalar.check

    def watched(*args: Any) -> scalar.ScalarProblem:
        checked = check(*args)
        seen.append(checked.problem.spec.precision)
        return checked

    monkeypatch.setattr(scalar, "check", watched)
    x = drawn()
    q = x.q.requires_grad_()
    tensors = (q, x.k, x.v, x.g) if function is chunk_simple_gla else (q, x.k, x.v)
    runs = []
    for precision in (Precision.IEEE, Precision.TF32):
        seen.clear()
        o, _ = function(*tensors, precision=precision.value)
        runs.append((o, *torch.autograd.grad(o.sum(), q)))
        assert len(seen) >= 2
        assert set(seen) == {precision}
    assert all(map(torch.equal, *runs))
    half = [t.half() for t in tensors]
    with pytest.raises(InputError, match="precision 'tf32' goes with"):
        function(*half, precision="tf32")
    with pytest.raises(InputError, match="precision must be one of ieee, tf32"):
        function(*tensors, precision="high")


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_compiles_and_transforms(precision: Literal["ieee", "tf32"]) -> None:
    x = drawn()

    def loss(q: Tensor, g: Tensor) -> Tensor:
        o, end = chunk_simple_gla(q, x.k, x.v, g, output_final_state=True, precision=precision)
        assert end is not None
        return o.sum() + end.sum()

    torch._dynamo.reset()
    q, g = x.q.requires_grad_(), x.g.requires_grad_()
    wanted = torch.autograd.grad(loss(q, g), (q, g))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(q, g), (q, g))
    functional = torch.func.grad(loss, argnums=(0, 1))(q.detach(), g.detach())
    for mine, other, theirs in zip(found, functional, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(other, theirs)


@pytest.mark.parametrize(
    ("heads", "tokens", "length"),
    [
        (1, 32768, 512),  # no shorter than eight chunks
        (16, 32768, 2048),  # two programs per SM
        (33, 32768, 4096),
        (66, 32768, 8192),
        (67, 32768, 0),  # half of the SMs at work
        (16, 2048, 512),
        (16, 1024, 0),  # fewer than four segments
        (1, 1 << 20, 4096),
        (1, 1 << 24, 65536),
    ],
)
def test_which_sequences_are_cut(heads: int, tokens: int, length: int) -> None:
    problem = Problem(
        Specialisation(128, 128, DType.BF16, Gate.SCALAR, DType.BF16), 1, tokens, heads
    )
    config = ScalarForwardConfig(TurnedKernelConfig(64, 128, 8, 3))
    assert scalar_segments.segment_length(problem, config, 132) == length


def test_decays_of_retention_are_made_once() -> None:
    v = torch.zeros(1, 2, 3, 4)
    with torch.inference_mode():
        rates = attention._retnet_rates(v)
    assert attention._retnet_rates(v) is rates
    assert not rates.is_inference()
    torch.testing.assert_close(rates, torch.tensor([1 - 2.0 ** (-5 - h) for h in range(3)]).log())
    compiled = torch.compile(chunk_retention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(v, v, v)[0], chunk_retention(v, v, v)[0])


def test_segments_of_packed_sequences() -> None:
    lengths = [70, 0, 33, 1, 64, 0]
    x = drawn(1, sum(lengths), 2)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    i = scalar.ScalarInputs(x.q, x.k, x.v, x.g, None, cu)
    cuts, first, last, slots = scalar_segments._boundaries(i, 32)
    assert slots == sum(lengths) // 32 + len(lengths) == len(cuts) - 1
    assert cuts[0] == 0
    assert cuts[-1] == sum(lengths)
    assert bool((cuts[1:] >= cuts[:-1]).all())
    total = scalar_segments._decays(i, cuts, slots, 32)[0]
    for n, (low, high) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        a, b = int(first[n]), int(last[n]) + 1
        # The segments of a sequence are its tokens, in pieces of 32.
        assert cuts[a : b + 1].tolist() == [*range(low, high, 32)] + [high] + (
            [] if high > low else [high]
        )
        wanted = x.g[0, low:high].sum(0) / math.log(2)
        torch.testing.assert_close(total[:, a:b].sum(1), wanted)
