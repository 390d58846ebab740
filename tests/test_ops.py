"""The passes as PyTorch operators: registered soundly, traced whole, equal to eager calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from glac import ops
from glac.attention import chunk_gla, chunk_gla_lowrank
from glac.errors import InputError, NotDifferentiableError
from glac.testing import make_inputs

Gate = Literal["vector", "lowrank"]
GATES: tuple[Gate, ...] = ("vector", "lowrank")
Tensors = list[Tensor | None]
FP32, BF16 = torch.float32, torch.bfloat16
OPERATORS = {
    "vector": (ops.chunk_gla_fwd, ops.chunk_gla_bwd),
    "lowrank": (ops.chunk_gla_lowrank_fwd, ops.chunk_gla_lowrank_bwd),
}
NUMBERS: dict[str, tuple[float, ...]] = {"vector": (), "lowrank": (1 / 16, -0.1)}
SCALE, CHUNK, PRECISION = 0.3, 16, "ieee"


@pytest.fixture(autouse=True)
def _default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLAC_CHECKED", "GLAC_REQUIRE_AOT", "GLAC_PACK_PATH"):
        monkeypatch.delenv(name, raising=False)
    torch._dynamo.reset()


def draw(
    gate: Gate, *, dtype: torch.dtype = FP32, T: int = 20, bias: bool = True, state: bool = True
) -> Tensors:
    """q, k, v, the gate's tensors, the initial state, no boundaries."""
    x = make_inputs(2, T, 2, 8, 6, dtype=dtype, gate=gate, rank=8, initial_state=state)
    if gate == "vector":
        return [x.q, x.k, x.v, x.g, x.initial_state, None]
    return [x.q, x.k, x.v, x.x, x.weight, x.bias if bias else None, x.initial_state, None]


def as_leaves(tensors: Tensors) -> Tensors:
    return [None if t is None else t.clone().requires_grad_() for t in tensors]


def present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def public(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """The public operation with its final state."""
    *inputs, initial_state, cu = tensors
    run: Any = chunk_gla if len(inputs) == 4 else chunk_gla_lowrank
    options = {"initial_state": initial_state, "cu_seqlens": cu, **options}
    o, state = run(*inputs, output_final_state=True, **options)
    return o, state


def gradients(run: Callable[..., tuple[Tensor, Tensor]], tensors: Tensors) -> list[Tensor]:
    leaves = as_leaves(tensors)
    o, state = run(*leaves)
    loss = o.float().square().sum() + (2 * state).sum()
    return list(torch.autograd.grad(loss, present(leaves)))


def head_first(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


# --- registration -----------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("optional", [False, True])
def test_forward_operators(gate: Gate, dtype: torch.dtype, optional: bool) -> None:
    inputs = as_leaves(draw(gate, dtype=dtype, bias=optional, state=optional))
    arguments = (*inputs, *NUMBERS[gate], SCALE, optional, CHUNK, PRECISION)
    torch.library.opcheck(OPERATORS[gate][0], arguments)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("optional", [False, True])
def test_backward_operators(gate: Gate, dtype: torch.dtype, optional: bool) -> None:
    inputs = draw(gate, dtype=dtype, bias=optional, state=optional)
    dht = torch.ones(2, 2, 8, 6) if optional else None
    arguments = (*inputs, inputs[2], dht, *NUMBERS[gate], SCALE, CHUNK, PRECISION)
    torch.library.opcheck(OPERATORS[gate][1], arguments)


@pytest.mark.parametrize("gate", GATES)
def test_operators_on_other_layouts(gate: Gate) -> None:
    inputs = [head_first(t) if t is not None and t.ndim == 4 else t for t in draw(gate)]
    forward, backward = OPERATORS[gate]
    torch.library.opcheck(
        forward, (*as_leaves(inputs), *NUMBERS[gate], SCALE, True, CHUNK, PRECISION)
    )
    assert inputs[2] is not None
    do, dht = inputs[2][:1, :1].expand_as(inputs[2]), inputs[-1]
    torch.library.opcheck(backward, (*inputs, do, dht, *NUMBERS[gate], SCALE, CHUNK, PRECISION))


@pytest.mark.parametrize("gate", GATES)
def test_absent_results_are_empty(gate: Gate) -> None:
    inputs = draw(gate, bias=False, state=False)
    forward, backward = OPERATORS[gate]
    o, state = forward(*inputs, *NUMBERS[gate], SCALE, False, CHUNK, PRECISION)
    assert (state.shape, state.dtype) == ((0,), FP32)
    grads = backward(*inputs, o, None, *NUMBERS[gate], SCALE, CHUNK, PRECISION)
    assert len(grads) == len(inputs) - 1  # boundaries have none
    for grad, tensor in zip(grads, inputs, strict=False):
        assert grad.shape == ((0,) if tensor is None else tensor.shape)


def test_gradients_of_parameters_are_fp32() -> None:
    inputs = draw("lowrank", dtype=BF16)
    grads = ops.chunk_gla_lowrank_bwd(
        *inputs, inputs[2], None, 1 / 16, -111.0, SCALE, CHUNK, PRECISION
    )
    assert [g.dtype for g in grads] == [BF16] * 4 + [FP32] * 3


@pytest.mark.parametrize("gate", GATES)
def test_gradients_through_an_operator_are_those_of_an_eager_call(gate: Gate) -> None:
    numbers = (1 / 16, -111.0) if gate == "lowrank" else ()

    def run(*tensors: Any) -> Any:
        return OPERATORS[gate][0](*tensors, *numbers, 8**-0.5, True, 64, PRECISION)

    inputs = draw(gate)
    for a, b in zip(gradients(run, inputs), gradients(public, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("which", [0, 1])
def test_operators_are_differentiable_once(gate: Gate, which: int) -> None:
    inputs = as_leaves(draw(gate))
    forward, backward = OPERATORS[gate]
    if which:
        (dq, *_) = backward(*inputs, inputs[2], None, *NUMBERS[gate], SCALE, CHUNK, PRECISION)
    else:
        o, _ = forward(*inputs, *NUMBERS[gate], SCALE, True, CHUNK, PRECISION)
        (dq,) = torch.autograd.grad(o.sum(), present(inputs)[:1], create_graph=True)
    with pytest.raises(NotDifferentiableError, match="once"):
        dq.sum().backward()


def test_operators_check_their_arguments() -> None:
    q, k, v, g, *_ = draw("vector")
    assert g is not None
    with pytest.raises(InputError, match="g must be"):
        ops.chunk_gla_fwd(q, k, v, g[:, :5], None, None, SCALE, False, CHUNK, PRECISION)


def test_checked_mode_reaches_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLAC_CHECKED", "1")
    q, k, v, g, *_ = draw("vector")
    assert g is not None
    with pytest.raises(InputError, match="g must be <= 0"):
        ops.chunk_gla_fwd(q, k, v, g.abs(), None, None, SCALE, False, CHUNK, PRECISION)


# --- what sees a call before it runs ----------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_compiled_whole(gate: Gate, dtype: torch.dtype) -> None:
    compiled = torch.compile(public, fullgraph=True, backend="aot_eager")
    for T in (20, 20, 33, 47):  # a second length makes T a symbol
        inputs = draw(gate, dtype=dtype, T=T)
        found, wanted = gradients(compiled, inputs), gradients(public, inputs)
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_compiled_with_numbers_that_change() -> None:
    inputs = draw("lowrank")
    compiled = torch.compile(public, fullgraph=True, backend="aot_eager", dynamic=True)
    for numbers in ({}, {"scale": 0.5}, {"scale": 0.25}, {"normalizer": 4.0, "clamp_min": -1}):
        o, state = compiled(*inputs, **numbers)
        wanted, wanted_state = public(*inputs, **numbers)
        assert torch.equal(o, wanted)
        assert torch.equal(state, wanted_state)


@pytest.mark.parametrize("gate", GATES)
def test_compiled_with_a_precision(gate: Gate) -> None:
    compiled = torch.compile(public, fullgraph=True, backend="aot_eager")
    inputs = draw(gate)
    wanted = gradients(public, inputs)
    for precision in ("ieee", "tf32"):
        found = gradients(lambda *x, p=precision: compiled(*x, precision=p), inputs)
        assert all(map(torch.equal, found, wanted))


def test_compiled_without_gradients() -> None:
    compiled = torch.compile(public, fullgraph=True, backend="aot_eager")
    inputs = draw("vector")
    with torch.no_grad():
        assert torch.equal(compiled(*inputs)[0], public(*inputs)[0])


def test_compiled_backward_of_an_eager_call() -> None:
    inputs = draw("lowrank")
    leaves = as_leaves(inputs)
    o, state = public(*leaves)
    loss = o.square().sum() + (2 * state).sum()

    def compiler(graph: Any) -> Any:
        return torch.compile(graph, fullgraph=True, backend="aot_eager")

    with torch._dynamo.compiled_autograd._enable(compiler):
        loss.backward()  # type: ignore[no-untyped-call]
    for leaf, wanted in zip(present(leaves), gradients(public, inputs), strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, wanted)


def test_exported() -> None:
    class Layer(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            return public(*tensors)

    inputs = draw("lowrank")
    program = torch.export.export(Layer(), tuple(inputs))
    assert "glac.chunk_gla_lowrank_fwd" in str(program.graph)
    assert torch.equal(program.module()(*inputs)[0], public(*inputs)[0])


@pytest.mark.parametrize("gate", GATES)
def test_fake_tensors_give_shapes_and_nothing_runs(gate: Gate) -> None:
    with FakeTensorMode() as mode:
        inputs = [None if t is None else mode.from_tensor(t) for t in as_leaves(draw(gate))]
        o, state = public(*inputs)
        assert isinstance(o, FakeTensor)
        assert o.shape == (2, 20, 2, 6)
        assert state.shape == (2, 2, 8, 6)
        for leaf, grad in zip(
            present(inputs), torch.autograd.grad(o.sum(), present(inputs)), strict=True
        ):
            assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)
    later, _ = public(*inputs)  # the mode is over, the tensors are still fake
    assert isinstance(later, FakeTensor)


def test_a_dispatch_mode_sees_both_passes() -> None:
    seen: dict[str, Any] = {}  # the last argument of each operator

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen[str(func)] = args[-1] if args else None
            return func(*args, **(kwargs or {}))

    watch = Watch()  # type: ignore[no-untyped-call]
    leaves = as_leaves(draw("vector"))
    for precision in ("ieee", "tf32"):
        seen.clear()
        with watch:
            o, _ = public(*leaves, precision=precision)
            o.sum().backward()  # type: ignore[no-untyped-call]
        assert seen["glac.chunk_gla_fwd.default"] == precision
        assert seen["glac.chunk_gla_bwd.default"] == precision
    seen.clear()
    o, _ = public(*leaves)
    with watch:
        o.sum().backward()  # type: ignore[no-untyped-call]
    assert "glac.chunk_gla_bwd.default" in seen


def test_plain_calls_go_past_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("an operator was called")

    for gate in GATES:
        for operator in ("fwd", "bwd"):
            name = "chunk_gla_" if gate == "vector" else "chunk_gla_lowrank_"
            monkeypatch.setattr(ops, name + operator, never)
    for gate in GATES:
        inputs = draw(gate)
        public(*inputs)
        gradients(public, [None if t is None else torch.nn.Parameter(t) for t in inputs])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("gate", GATES)
def test_vmap_loops(gate: Gate) -> None:
    q, *others = draw(gate)
    assert q is not None
    several = torch.stack((q, 2 * q, -q))
    found = torch.func.vmap(lambda q: public(q, *others)[0])(several)
    for i in range(3):
        assert torch.equal(found[i], public(several[i], *others)[0])
