"""Gradients of the public operations: against the token loop, and what a call keeps for them."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from glac import dispatch, engine
from glac.attention import chunk_gla, chunk_gla_lowrank
from glac.errors import KernelNotFoundError, NotDifferentiableError
from glac.gate import Gradients
from glac.problem import Op
from glac.reference import lowrank_gate, recurrent_gla, relative_rms
from glac.settings import require_aot
from glac.testing import hard_gates, make_inputs

Gate = Literal["vector", "lowrank"]
Leaves = dict[str, Tensor | None]
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Of fp32 arithmetic in another order; 16-bit gradients carry one rounding more.
BUDGET = {BF16: 4e-3, FP16: 5e-4, FP32: 1e-5}
GATES: tuple[Gate, ...] = ("vector", "lowrank")


@pytest.fixture(autouse=True)
def _default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLAC_CHECKED", "GLAC_REQUIRE_AOT", "GLAC_PACK_PATH"):
        monkeypatch.delenv(name, raising=False)


def draw(
    B: int = 2,
    T: int = 20,
    H: int = 2,
    K: int = 8,
    V: int = 6,
    *,
    dtype: torch.dtype = FP32,
    gate: Gate = "vector",
    seed: int = 0,
    without: Sequence[str] = (),
) -> Leaves:
    """Tensors of one call by the names of its arguments, those ``without`` being None."""
    x = make_inputs(B, T, H, K, V, dtype=dtype, gate=gate, rank=8, seed=seed, initial_state=True)
    names = ("q", "k", "v", *(("g",) if gate == "vector" else ("x", "weight", "bias")))
    return {
        name: None if name in without else getattr(x, name) for name in (*names, "initial_state")
    }


def probe(x: Leaves, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Gradients of both results of a call."""
    assert x["q"] is not None
    assert x["v"] is not None
    B, T, H, K = x["q"].shape
    y = make_inputs(
        B, T, H, K, x["v"].shape[3], dtype=x["v"].dtype, seed=seed + 2**20, initial_state=True
    )
    assert y.initial_state is not None
    return y.v, y.initial_state


def call(x: Leaves, **options: Any) -> tuple[Tensor, Tensor]:
    options = {"output_final_state": True, **options}
    run: Any = chunk_gla if "g" in x else chunk_gla_lowrank
    o, state = run(**x, **options)
    return o, state


def as_leaves(x: Leaves, names: Sequence[str] | None = None) -> Leaves:
    """Copies, of which those in ``names`` (default: all) want a gradient."""
    return {
        name: None
        if t is None
        else t.detach().clone().requires_grad_(names is None or name in names)
        for name, t in x.items()
    }


def present(x: Leaves) -> list[Tensor]:
    return [t for t in x.values() if t is not None and t.requires_grad]


def gradients(x: Leaves, do: Tensor | None, dht: Tensor | None, **options: Any) -> list[Tensor]:
    """Of the leaves in ``x`` that want one, through those results that have a gradient."""
    pairs = zip(call(x, **options), (do, dht), strict=True)
    used = [(result, grad) for result, grad in pairs if grad is not None]
    results, grads = zip(*used, strict=True)
    return list(torch.autograd.grad(results, present(x), grads))


def by_token_loop(
    x: Leaves,
    do: Tensor | None,
    dht: Tensor | None,
    *,
    scale: float | None = None,
    normalizer: float = 16.0,
    clamp_min: float | None = None,
) -> list[Tensor]:
    """What ``gradients`` should be: autograd through the definition, in fp64."""
    wide: dict[str, Any] = {
        name: None if t is None else t.detach().double().requires_grad_(t.requires_grad)
        for name, t in x.items()
    }
    g = wide.get("g")
    if g is None:
        g = lowrank_gate(
            wide["x"],
            wide["weight"],
            wide["bias"],
            num_heads=wide["q"].shape[2],
            normalizer=normalizer,
            clamp_min=clamp_min,
        )
    o, state = recurrent_gla(
        wide["q"],
        wide["k"],
        wide["v"],
        g,
        scale=scale,
        initial_state=wide["initial_state"],
        output_final_state=True,
    )
    assert state is not None
    loss = o.new_zeros(())
    if do is not None:
        loss = loss + (o * do).sum()
    if dht is not None:
        loss = loss + (state * dht).sum()
    if not loss.requires_grad:  # the state alone does not depend on q
        return [torch.zeros_like(leaf) for leaf in present(wide)]
    return list(torch.autograd.grad(loss, present(wide), materialize_grads=True))


def assert_close(
    x: Leaves, actual: Sequence[Tensor], expected: Sequence[Tensor], budget: float = 1e-5
) -> None:
    names = [name for name, t in x.items() if t is not None and t.requires_grad]
    for name, a, b in zip(names, actual, expected, strict=True):
        assert relative_rms(a, b) <= budget, name


# --- values -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 70),
    keys=st.integers(4, 12),
    values=st.integers(4, 12),
    dtype=st.sampled_from([FP32, BF16, FP16]),
    gate=st.sampled_from(GATES),
    without=st.sets(st.sampled_from(["bias", "initial_state"])),
    used=st.sampled_from(["o", "state", "both"]),
    some=st.integers(1, 2**7 - 1),
    clamp_min=st.sampled_from([None, -0.05]),
    seed=st.integers(0, 2**16),
)
@example(1, 4, 4, FP32, "lowrank", set(), "both", 2**7 - 1, None, 0)
@example(64, 8, 8, FP32, "vector", set(), "both", 2**7 - 1, None, 0)
@example(65, 8, 8, FP32, "lowrank", {"bias", "initial_state"}, "o", 2**7 - 1, -0.05, 0)
def test_equal_those_of_the_token_loop(
    tokens: int,
    keys: int,
    values: int,
    dtype: torch.dtype,
    gate: Gate,
    without: set[str],
    used: str,
    some: int,
    clamp_min: float | None,
    seed: int,
) -> None:
    absent = tuple(without) if gate == "lowrank" else tuple(without - {"bias"})
    x = draw(2, tokens, 2, keys, values, dtype=dtype, gate=gate, seed=seed, without=absent)
    do, dht = probe(x, seed)
    names = [n for i, n in enumerate(n for n, t in x.items() if t is not None) if some >> i & 1]
    x = as_leaves(x, names or ["v"])
    ends = (do if used != "state" else None, dht if used != "o" else None)
    options: dict[str, Any] = {"scale": 0.7}
    if gate == "lowrank":
        options |= {"normalizer": 4.0, "clamp_min": clamp_min}
    actual = gradients(x, *ends, **options)
    for leaf, grad in zip(present(x), actual, strict=True):
        assert grad.dtype == leaf.dtype
        assert grad.shape == leaf.shape
    assert_close(x, actual, by_token_loop(x, *ends, **options), BUDGET[dtype])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", ["q", "k", "v", "gate", "initial_state"])
def test_one_input_alone(gate: Gate, name: str) -> None:
    x = draw(gate=gate)
    names = {"vector": ["g"], "lowrank": ["x", "weight", "bias"]}[gate]
    for one in names if name == "gate" else [name]:
        some = as_leaves(x, [one])
        every = as_leaves(x)
        wanted = dict(zip(every, gradients(every, *probe(x)), strict=True))
        assert torch.equal(gradients(some, *probe(x))[0], wanted[one])


def test_hard_gates() -> None:
    x = draw(1, 70, 2, 8, 8)
    assert x["q"] is not None
    x["g"] = hard_gates(x["q"].shape)
    x = as_leaves(x)
    actual = gradients(x, *probe(x))
    assert_close(x, actual, by_token_loop(x, *probe(x)))
    assert bool((actual[3][x["g"] == -math.inf] == 0).all())


@pytest.mark.parametrize("gate", GATES)
def test_chunk_size_changes_rounding_only(gate: Gate) -> None:
    x = as_leaves(draw(1, 50, gate=gate))
    wanted = gradients(x, *probe(x))
    assert_close(x, gradients(x, *probe(x), chunk_size=16), wanted)


def expanded(t: Tensor) -> Tensor:
    return t[:1, :1, :1, :1].expand_as(t)


def channels_outermost(t: Tensor) -> Tensor:
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


@pytest.mark.parametrize("layout", [expanded, channels_outermost])
def test_any_layout_of_what_comes_back(layout: Callable[[Tensor], Tensor]) -> None:
    x = as_leaves(draw())
    do, dht = (layout(t) for t in probe(x))
    assert not do.is_contiguous()
    wanted = gradients(x, do.contiguous(), dht.contiguous())
    for a, b in zip(gradients(x, do, dht), wanted, strict=True):
        assert torch.equal(a, b)


def test_inputs_that_share_memory() -> None:
    x = as_leaves(draw(H=1), ["k"])
    assert x["k"] is not None
    y: Leaves = {**x, "q": x["k"]}
    ((together),) = torch.autograd.grad(call(y)[0].sum(), [x["k"]])
    parts = as_leaves(y)
    dq, dk = gradients(parts, torch.ones_like(call(parts)[0]), None)[:2]
    assert relative_rms(together, dq + dk) <= 1e-6


# --- states -----------------------------------------------------------------------------------


def tokens_of(x: Leaves, begin: int, end: int | None) -> Leaves:
    names = ("q", "k", "v", "g", "x")
    return {n: t[:, begin:end] if n in names and t is not None else t for n, t in x.items()}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("where", [1, 16, 33])
def test_a_state_that_is_passed_on_carries_the_gradient_of_the_whole(
    gate: Gate, where: int
) -> None:
    x = as_leaves(draw(T=50, gate=gate))
    do, dht = probe(x)
    wanted = gradients(x, do, dht)
    first, carried = call(tokens_of(x, 0, where))
    second, last = call({**tokens_of(x, where, None), "initial_state": carried})
    o = torch.cat((first, second), 1)
    assert_close(x, torch.autograd.grad([o, last], present(x), [do, dht]), wanted)


@pytest.mark.parametrize("gate", GATES)
def test_a_detached_state_cuts_the_gradient_there(gate: Gate) -> None:
    x = as_leaves(draw(T=50, gate=gate))
    do, dht = probe(x)
    first, carried = call(tokens_of(x, 0, 20))
    second, last = call({**tokens_of(x, 20, None), "initial_state": carried.detach()})
    ends = ([first, second, last], present(x), [do[:, :20], do[:, 20:], dht])
    cut = torch.autograd.grad(*ends)
    alone = as_leaves({**tokens_of(x, 20, None), "initial_state": carried})
    before = as_leaves(tokens_of(x, 0, 20))
    late = dict(zip(alone, gradients(alone, do[:, 20:], dht), strict=True))
    early = dict(zip(before, gradients(before, do[:, :20], None), strict=True))
    for name, grad in zip(x, cut, strict=True):
        if name == "initial_state":
            parts = early[name]
        elif name in ("weight", "bias"):
            parts = early[name] + late[name]
        else:
            parts = torch.cat((early[name], late[name]), 1)
        assert relative_rms(grad, parts) <= 1e-6, name


def test_the_final_state_alone() -> None:
    x = as_leaves(draw())
    _, dht = probe(x)
    actual = gradients(x, None, dht)
    assert bool((actual[0] == 0).all())
    assert_close(x, actual, by_token_loop(x, None, dht))


# --- what a call keeps ------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("without", [(), ("bias", "initial_state")])
def test_only_the_inputs_are_kept(gate: Gate, without: tuple[str, ...]) -> None:
    absent = [name for name in without if gate == "lowrank" or name != "bias"]
    x = as_leaves(draw(T=70, gate=gate, without=absent))
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        o, _ = call(x)
    inputs = [t for t in x.values() if t is not None]
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in inputs)
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in inputs)
    o.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant: bool) -> None:
    x = as_leaves(draw(gate="lowrank"))
    do, dht = probe(x)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return call(dict(zip(x, tensors, strict=True)))

    results = checkpoint(run, *x.values(), use_reentrant=reentrant)
    actual = as_leaves(x, [])
    torch.autograd.backward(results, [do, dht])
    wanted = gradients(as_leaves(actual), do, dht)
    for leaf, grad in zip(present(x), wanted, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, grad)


def test_an_input_changed_in_place_is_noticed() -> None:
    x = as_leaves(draw(), ["q"])
    o, _ = call(x)
    assert x["k"] is not None
    x["k"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()  # type: ignore[no-untyped-call]


def test_nothing_is_recorded_where_nothing_is_wanted() -> None:
    x = as_leaves(draw())
    with torch.no_grad():
        assert not call(x)[0].requires_grad
    with torch.inference_mode():
        assert not call(x)[0].requires_grad
    assert not call(as_leaves(x, []))[0].requires_grad
    assert all(t.requires_grad for t in call(as_leaves(x, ["initial_state"])))


@pytest.mark.parametrize("gate", GATES)
def test_gradients_nobody_wants_are_dropped(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    inner = engine.backward

    def spy(*args: Any, dh0: bool, **options: Any) -> Gradients:
        asked.append(dh0)
        return inner(*args, dh0=dh0, **options)

    monkeypatch.setattr(engine, "backward", spy)
    x = as_leaves(draw(gate=gate), ["k"])
    o, _ = call(x)
    found: list[bool] = []
    node: Any = o.grad_fn
    node.register_hook(lambda grads, _: found.extend(grad is not None for grad in grads))
    torch.autograd.grad(o.sum(), present(x))
    assert asked == [False]
    assert found == [name == "k" for name in x]
    y = as_leaves(x, ["initial_state"])
    gradients(y, torch.ones_like(o), None)
    assert asked == [False, True]


# --- dtypes -----------------------------------------------------------------------------------


def test_parameters_get_their_dtype_or_the_one_they_ask_for() -> None:
    x = as_leaves(draw(dtype=BF16, gate="lowrank"))
    weight, bias = x["weight"], x["bias"]
    assert weight is not None
    assert bias is not None
    weight.grad_dtype = FP32
    torch.autograd.backward(call(x)[0].sum())
    assert weight.grad is not None
    assert bias.grad is not None
    assert (weight.grad.dtype, bias.grad.dtype) == (FP32, BF16)
    assert not torch.equal(weight.grad, weight.grad.to(BF16).float())


def test_a_wide_bias_and_a_wide_gate() -> None:
    x = draw(dtype=BF16, gate="lowrank")
    assert x["bias"] is not None
    x = as_leaves({**x, "bias": x["bias"].float() * 1.001})
    for y in (x, as_leaves({**draw(dtype=BF16), "g": draw()["g"]})):
        actual = gradients(y, *probe(y))
        assert [a.dtype for a in actual] == [t.dtype for t in present(y)]
        assert_close(y, actual, by_token_loop(y, *probe(y)), BUDGET[BF16])


@pytest.mark.parametrize("gate", GATES)
def test_autocast_casts_what_is_not_a_state_or_a_wide_gate(gate: Gate) -> None:
    x = as_leaves(draw(gate=gate))
    wide = ("g", "bias", "initial_state")
    y = {n: t if t is None or n in wide else t.to(BF16) for n, t in x.items()}
    do, dht = probe(x)
    wanted = torch.autograd.grad(call(y), present(x), (do.to(BF16), dht))
    with torch.autocast("cpu", BF16):
        o, state = call(x)
    assert (o.dtype, state.dtype) == (BF16, FP32)
    actual = torch.autograd.grad((o, state), present(x), (do.to(BF16), dht))
    for a, b in zip(actual, wanted, strict=True):
        assert torch.equal(a, b)


# --- what has no gradient ---------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
def test_a_second_derivative_is_refused(gate: Gate) -> None:
    x = as_leaves(draw(gate=gate))
    wanted = gradients(x, *probe(x))
    grads = torch.autograd.grad(call(x), present(x), probe(x), create_graph=True)
    for a, b in zip(grads, wanted, strict=True):  # asking for a graph alone is no error
        assert torch.equal(a, b)
        with pytest.raises(NotDifferentiableError, match="once") as caught:
            torch.autograd.grad(a.sum(), present(x), retain_graph=True)
        assert "glac.reference" in caught.value.hint


def test_forward_mode_is_refused() -> None:
    x = draw()
    q = x["q"]
    assert q is not None
    with forward_ad.dual_level():
        assert call(x)[0].shape == (*q.shape[:3], 6)
        dual = forward_ad.make_dual(q, q)  # type: ignore[no-untyped-call]
        with pytest.raises(NotDifferentiableError, match="forward-mode"):
            call({**x, "q": dual})
    with pytest.raises(NotDifferentiableError, match="forward-mode"):
        torch.func.jvp(lambda q: call({**x, "q": q})[0], (q,), (q,))


# --- torch.func -------------------------------------------------------------------------------


def test_functional_transforms() -> None:
    x = draw()
    q, h0 = x["q"], x["initial_state"]
    assert q is not None
    assert h0 is not None
    do, dht = probe(x)

    def run(q: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        return call({**x, "q": q, "initial_state": h0})

    def loss(q: Tensor, h0: Tensor) -> Tensor:
        o, state = run(q, h0)
        return (o * do).sum() + (state * dht).sum()

    wanted = gradients(as_leaves(x, ["q", "initial_state"]), do, dht)
    pull: Any = torch.func.vjp(run, q, h0)[1]
    for found in (torch.func.grad(loss, (0, 1))(q, h0), pull((do, dht))):
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)
    with pytest.raises(NotDifferentiableError, match="once"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q, h0).sum())(q)
    with pytest.raises(NotDifferentiableError, match="forward-mode"):
        torch.func.hessian(loss)(q, h0)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_per_sample() -> None:
    x = draw(without=["initial_state"])
    tensors = present(as_leaves(x))

    def loss(*tensors: Tensor) -> Tensor:
        q, k, v, g = (t[None] for t in tensors)
        return chunk_gla(q, k, v, g)[0].sin().sum()

    found = torch.func.vmap(torch.func.grad(loss, (0, 3)))(*tensors)
    for i in range(2):
        one = [t[i].detach().clone().requires_grad_() for t in tensors]
        wanted = torch.autograd.grad(loss(*one), [one[0], one[3]])
        for a, b in zip(found, wanted, strict=True):
            assert relative_rms(a[i], b) <= 1e-6


# --- kernels, stood in for --------------------------------------------------------------------


@dataclass
class Served:
    """What dispatch has and what was asked of it, on a pretended GPU."""

    forward: bool = True
    backward: bool = True
    resolved: list[Op] = None  # type: ignore[assignment]
    launched: list[Op] = None  # type: ignore[assignment]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    state = Served(resolved=[], launched=[])

    def resolve(problem: Any, device: Any, op: Op = Op.FORWARD) -> tuple[Any, Any]:
        state.resolved.append(op)
        there = state.forward if op is Op.FORWARD else state.backward
        if not there and require_aot():
            raise KernelNotFoundError(f"no pack has a {op.value} kernel")
        plan = SimpleNamespace(problem=problem) if there else None
        return SimpleNamespace(reason="a reason"), plan

    def run_forward(plan: Any, *args: Any) -> Any:
        state.launched.append(Op.FORWARD)
        *inputs, cu = args
        return by_torch(plan.problem, engine.forward, *inputs, 64, cu)

    def run_backward(plan: Any, *args: Any, dh0: bool, cu: Any) -> Any:
        state.launched.append(Op.BACKWARD)
        assert args[6].is_contiguous()  # do
        return by_torch(plan.problem, engine.backward, *args, 64, dh0=dh0, cu=cu)

    def by_torch(problem: Any, run: Any, *args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "launchable", lambda problem, q: False)
            return run(problem, *args, **options)

    monkeypatch.setattr(engine, "launchable", lambda problem, q: True)
    monkeypatch.setattr(engine, "_warned", set())
    monkeypatch.setattr(dispatch, "resolve", resolve)
    monkeypatch.setattr("glac.forward.run_forward", run_forward)
    module = SimpleNamespace(run_backward=run_backward)
    monkeypatch.setitem(sys.modules, "glac.backward", module)  # imported by the first backward
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    return state


@pytest.mark.parametrize("gate", GATES)
def test_kernels_serve_both_passes(gate: Gate, served: Served) -> None:
    x = as_leaves(draw(gate=gate))
    do, dht = probe(x)
    wanted = by_token_loop(x, do[:1, :1, :1, :1].expand_as(do), dht)
    actual = gradients(x, do[:1, :1, :1, :1].expand_as(do), dht)
    assert_close(x, actual, wanted)
    assert served.launched == [Op.FORWARD, Op.BACKWARD]
    assert served.resolved == [Op.FORWARD, Op.BACKWARD]


def test_the_backward_pass_is_resolved_when_it_runs(served: Served) -> None:
    call(as_leaves(draw()))
    with torch.no_grad():
        call(as_leaves(draw()))
    assert served.resolved == [Op.FORWARD] * 2


def test_pytorch_stands_in_for_a_backward_kernel_and_says_so_once(served: Served) -> None:
    served.backward = False
    x = as_leaves(draw())
    with pytest.warns(UserWarning, match=r"no backward kernel for .* \(a reason\)") as caught:
        actual = gradients(x, *probe(x))
    assert len(caught) == 1
    assert_close(x, actual, by_token_loop(x, *probe(x)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(x, *probe(x))
    with pytest.warns(UserWarning, match="no backward kernel"):  # another specialisation
        gradients(as_leaves(draw(K=4)), *probe(draw(K=4)))


def test_no_warning_where_pytorch_serves_both(served: Served) -> None:
    served.forward = served.backward = False
    x = as_leaves(draw())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(x, *probe(x))
    assert served.launched == []


def test_required_kernels_are_missed_before_anything_runs(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.backward = False
    monkeypatch.setenv("GLAC_REQUIRE_AOT", "1")
    with pytest.raises(KernelNotFoundError, match="backward") as caught:
        call(as_leaves(draw()))
    assert "torch.no_grad()" in caught.value.hint
    assert served.launched == []
    with torch.no_grad():
        call(as_leaves(draw()))
    assert served.launched == [Op.FORWARD]
