"""The public operations on CPU tensors, and the layouts that kernels are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from glac.attention import chunk_gla, chunk_gla_lowrank
from glac.layouts import contiguous, laid_out
from glac.reference import lowrank_gate, recurrent_gla, relative_rms, yardstick_chunk_gla
from glac.testing import Inputs, hard_gates, make_inputs
from glac.validate import MAX_TOKEN_STRIDE

Gate = Literal["vector", "lowrank"]
FP32 = torch.float32
DTYPES = [torch.bfloat16, torch.float16, FP32]
# Of fp32 arithmetic in another order; 16-bit outputs carry one rounding more.
BUDGET = {torch.bfloat16: 4e-3, torch.float16: 5e-4, FP32: 2e-6}


@pytest.fixture(autouse=True)
def _default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLAC_CHECKED", "GLAC_REQUIRE_AOT", "GLAC_PACK_PATH"):
        monkeypatch.delenv(name, raising=False)


def call(x: Inputs, **options: object) -> tuple[Tensor, Tensor | None]:
    common: dict[str, object] = {"initial_state": x.initial_state, "output_final_state": True}
    common.update(options)
    if x.g is not None:
        return chunk_gla(x.q, x.k, x.v, x.g, **common)  # type: ignore[arg-type]
    assert x.x is not None
    assert x.weight is not None
    return chunk_gla_lowrank(x.q, x.k, x.v, x.x, x.weight, x.bias, **common)  # type: ignore[arg-type]


def truth(
    x: Inputs, *, scale: float | None = None, normalizer: float = 16.0, **gate: float | None
) -> tuple[Tensor, Tensor]:
    g = x.g
    if g is None:
        assert x.x is not None
        assert x.weight is not None
        g = lowrank_gate(
            x.x.double(),
            x.weight.double(),
            None if x.bias is None else x.bias.double(),
            num_heads=x.q.shape[2],
            normalizer=normalizer,
            **gate,
        )
    h0 = None if x.initial_state is None else x.initial_state.double()
    tensors = (x.q.double(), x.k.double(), x.v.double(), g.double())
    o, state = recurrent_gla(*tensors, scale=scale, initial_state=h0, output_final_state=True)
    assert state is not None
    return o, state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", ["vector", "lowrank"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 65, 3, 12, 20), (1, 130, 2, 32, 16)])
@pytest.mark.parametrize("carried", [False, True])
def test_equals_the_token_loop(
    dtype: torch.dtype, gate: Gate, sizes: tuple[int, int, int, int, int], carried: bool
) -> None:
    x = make_inputs(*sizes, dtype=dtype, gate=gate, initial_state=carried)
    o, state = call(x)
    wanted, wanted_state = truth(x)
    assert o.dtype == dtype
    assert o.shape == x.v.shape
    assert state is not None
    assert state.dtype == FP32
    assert relative_rms(o, wanted) <= BUDGET[dtype]
    assert relative_rms(state, wanted_state) <= BUDGET[FP32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_within_twice_the_yardstick(dtype: torch.dtype) -> None:
    x = make_inputs(1, 256, 2, 32, 32, dtype=dtype)
    assert x.g is not None
    wanted, _ = truth(x)
    measure, _ = yardstick_chunk_gla(x.q, x.k, x.v, x.g)
    o, _ = call(x)
    assert relative_rms(o, wanted) <= 2 * relative_rms(measure, wanted)


def test_hard_gates() -> None:
    x = make_inputs(2, 100, 2, 16, 16, dtype=FP32, initial_state=True)
    x = replace(x, g=hard_gates(x.q.shape))
    o, state = call(x)
    wanted, wanted_state = truth(x)
    assert state is not None
    assert relative_rms(o, wanted) <= BUDGET[FP32]
    assert relative_rms(state, wanted_state) <= BUDGET[FP32]


@pytest.mark.parametrize("gate_dtype", [torch.bfloat16, FP32])
def test_gate_in_another_dtype(gate_dtype: torch.dtype) -> None:
    x = make_inputs(1, 40, 2, 16, 16, dtype=torch.bfloat16, gate_dtype=gate_dtype)
    o, _ = call(x)
    assert relative_rms(o, truth(x)[0]) <= BUDGET[torch.bfloat16]


@pytest.mark.parametrize("scale", [1.0, 0.0, -2.5, 3])
@pytest.mark.parametrize("gate", ["vector", "lowrank"])
def test_scale(scale: float, gate: Gate) -> None:
    x = make_inputs(1, 20, 1, 8, 8, dtype=FP32, gate=gate)
    o, _ = call(x, scale=scale)
    assert relative_rms(o, truth(x, scale=scale)[0]) <= BUDGET[FP32]


@pytest.mark.parametrize("normalizer", [1, 16.0, 0.1])
@pytest.mark.parametrize("clamp_min", [None, -0.05, 0.0])
@pytest.mark.parametrize("bias", [False, True])
def test_low_rank_options(normalizer: float, clamp_min: float | None, bias: bool) -> None:
    x = make_inputs(2, 33, 2, 8, 8, dtype=FP32, gate="lowrank", rank=8)
    x = x if bias else replace(x, bias=None)
    o, _ = call(x, normalizer=normalizer, clamp_min=clamp_min)
    wanted, _ = truth(x, normalizer=normalizer, clamp_min=clamp_min)
    assert relative_rms(o, wanted) <= BUDGET[FP32]


def test_the_final_state_is_returned_on_request_only() -> None:
    x = make_inputs(1, 5, 1, 4, 4, dtype=FP32)
    assert call(x, output_final_state=False)[1] is None
    assert call(x)[1] is not None


@pytest.mark.parametrize("where", [1, 31, 64, 99])
def test_split_with_a_carried_state_is_the_whole(where: int) -> None:
    x = make_inputs(2, 100, 2, 16, 8, dtype=FP32, initial_state=True)
    assert x.g is not None
    o, state = call(x)
    q, k, v, g = (torch.tensor_split(t, [where], 1) for t in (x.q, x.k, x.v, x.g))
    first, carried = chunk_gla(
        q[0], k[0], v[0], g[0], initial_state=x.initial_state, output_final_state=True
    )
    second, last = chunk_gla(
        q[1], k[1], v[1], g[1], initial_state=carried, output_final_state=True
    )
    assert state is not None
    assert last is not None
    assert relative_rms(torch.cat((first, second), 1), o) <= BUDGET[FP32]
    assert relative_rms(last, state) <= BUDGET[FP32]


@pytest.mark.parametrize("chunk_size", [1, 16, 128])
def test_chunk_size_changes_rounding_only(chunk_size: int) -> None:
    x = make_inputs(1, 70, 1, 8, 8, dtype=FP32)
    assert relative_rms(call(x, chunk_size=chunk_size)[0], call(x)[0]) <= BUDGET[FP32]


@pytest.mark.parametrize("gate", ["vector", "lowrank"])
def test_gradients_are_those_of_the_token_loop(gate: Gate) -> None:
    x = make_inputs(2, 40, 2, 8, 12, dtype=FP32, gate=gate, initial_state=True)
    names = [name for name in vars(x) if getattr(x, name) is not None]
    single = {name: getattr(x, name).clone().requires_grad_() for name in names}
    double = {name: getattr(x, name).double().requires_grad_() for name in names}
    o, state = call(replace(x, **single))
    wanted, wanted_state = truth(replace(x, **double))
    assert state is not None
    weight_o, weight_s = torch.randn_like(o), torch.randn_like(state)
    ((o * weight_o).sum() + (state * weight_s).sum()).backward()  # type: ignore[no-untyped-call]
    size = (wanted * weight_o.double()).sum() + (wanted_state * weight_s.double()).sum()
    size.backward()  # type: ignore[no-untyped-call]
    for name in names:
        assert relative_rms(single[name].grad, double[name].grad) <= 1e-5, name


@pytest.mark.parametrize("gate", ["vector", "lowrank"])
def test_precision_changes_nothing_in_pytorch(gate: Gate) -> None:
    x = make_inputs(2, 40, 2, 12, 16, dtype=FP32, gate=gate, rank=8, initial_state=True)
    for name in ("q", "k", "v"):
        getattr(x, name).requires_grad_()
    runs = []
    for precision in ("ieee", "tf32"):
        o, state = call(x, precision=precision)
        assert state is not None
        loss = o.square().sum() + state.sum()
        runs.append((o, state, *torch.autograd.grad(loss, (x.q, x.k, x.v))))
    assert all(map(torch.equal, *runs))


def test_inputs_are_left_alone() -> None:
    x = make_inputs(1, 20, 2, 8, 8, dtype=FP32, initial_state=True)
    before = {name: t.clone() for name, t in vars(x).items() if t is not None}
    call(x)
    for name, tensor in before.items():
        assert torch.equal(tensor, getattr(x, name)), name


def head_first(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def inside_a_wider_tensor(t: Tensor) -> Tensor:
    return torch.cat((t * torch.nan, t, t * torch.nan), -1)[..., t.shape[-1] : 2 * t.shape[-1]]


def channels_outermost(t: Tensor) -> Tensor:
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


@pytest.mark.parametrize("layout", [head_first, inside_a_wider_tensor, channels_outermost])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_give_the_same_bits(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = make_inputs(2, 33, 2, 8, 12, dtype=dtype, initial_state=True)
    assert x.g is not None
    o, state = call(x)
    y = replace(x, q=layout(x.q), k=layout(x.k), v=layout(x.v), g=layout(x.g))
    assert not y.q.is_contiguous()
    other, other_state = call(y)
    assert state is not None
    assert other_state is not None
    assert torch.equal(o, other)
    assert torch.equal(state, other_state)


def offset_by(elements: int, *shape: int) -> Tensor:
    size = torch.Size(shape).numel()
    flat = torch.arange(size + 64, dtype=FP32)
    start = elements - flat.data_ptr() % 16 // 4 + 4
    return flat[start : start + size].view(shape)


def same_values_elsewhere(laid: Tensor, tensor: Tensor) -> bool:
    return (
        torch.equal(laid, tensor)
        and laid.is_contiguous()
        and laid.data_ptr() % 16 == 0
        and laid.data_ptr() != tensor.data_ptr()
    )


USABLE = {
    "contiguous": (torch.zeros(2, 5, 3, 16), 16),
    "head-first": (torch.zeros(2, 3, 5, 16).transpose(1, 2), 16),
    "slice of a fused tensor": (torch.zeros(2, 5, 3, 48)[..., 16:32], 16),
    "every second token": (torch.zeros(2, 10, 3, 16)[:, ::2], 16),
    "one batch for all": (torch.zeros(1, 5, 3, 16).expand(4, 5, 3, 16), 16),
    "one head for all": (torch.zeros(2, 5, 1, 16).expand(2, 5, 3, 16), 16),
    "rows of 12": (torch.zeros(2, 5, 3, 36)[..., 12:24], 4),
    "one channel, strided": (torch.zeros(2, 5, 3, 4)[..., :1], 1),
}
UNUSABLE = {
    "off by one element": (offset_by(1, 2, 5, 3, 16), 16),
    "off by half a vector": (offset_by(2, 2, 5, 3, 16), 16),
    "channels outermost": (torch.rand(16, 2, 5, 3).movedim(0, -1), 16),
    "every second channel": (torch.rand(2, 5, 3, 32)[..., ::2], 16),
    "rows between units": (torch.rand(2, 5, 3, 20)[..., :16], 16),
    "one token for all": (torch.rand(2, 1, 3, 16).expand(2, 5, 3, 16), 16),
    "overlapping tokens": (torch.rand(400).as_strided((2, 5, 1, 32), (160, 16, 16, 1)), 16),
    "one channel for all": (torch.rand(2, 5, 3, 1).expand(2, 5, 3, 16), 16),
}


@pytest.mark.parametrize("name", USABLE)
def test_usable_layouts_are_not_copied(name: str) -> None:
    tensor, unit = USABLE[name]
    assert laid_out(tensor, unit) is tensor


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_layouts_are_copied(name: str) -> None:
    tensor, unit = UNUSABLE[name]
    assert same_values_elsewhere(laid_out(tensor, unit), tensor)


def test_a_token_stride_out_of_range_is_copied() -> None:
    # 2 x 2^24 x 4 bytes of address space; nothing but the two rows is touched.
    flat = torch.empty(MAX_TOKEN_STRIDE + 16)
    near = flat.as_strided((1, 2, 1, 16), (16, MAX_TOKEN_STRIDE - 16, 16, 1))
    far = flat.as_strided((1, 2, 1, 16), (16, MAX_TOKEN_STRIDE, 16, 1))
    far.zero_()
    assert laid_out(near, 16) is near
    assert same_values_elsewhere(laid_out(far, 16), far)


def test_whole_tensors() -> None:
    tensor = torch.rand(2, 3, 16, 8)
    assert contiguous(None) is None
    assert contiguous(tensor) is tensor
    for other in (tensor.mT, tensor[..., ::2], offset_by(1, 2, 3, 16, 8)):
        copy = contiguous(other)
        assert copy is not None
        assert same_values_elsewhere(copy, other)
