"""The short way of a call: the same launches as the long way, and only for calls like one before.

The driver is one that writes launches down; tensors lie in CPU memory and kernels compute nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from glac import autograd, binding, decode, dispatch, driver, engine, fast, launch
from glac.attention import chunk_gla, chunk_gla_lowrank, recurrent_gla, recurrent_gla_lowrank
from glac.configs import (
    BackwardConfig,
    ChunkKernelConfig,
    ChunksBackwardConfig,
    Config,
    DecodeConfig,
    DecodeKernelConfig,
    ForwardConfig,
    PrepareKernelConfig,
    TileKernelConfig,
)
from glac.errors import InputError, InputTypeError, NotDifferentiableError
from glac.kernelspec import KernelSpec, config_kernels
from glac.pack import run_time_args
from glac.plan import Plan
from glac.problem import Op, Problem
from tests.test_driver import Driver

B, T, H, K, V = 2, 300, 4, 64, 64
CHUNK = ChunkKernelConfig(chunk=32, block_v=64, num_warps=4, num_stages=2)
FORWARD = {"whole": ForwardConfig(CHUNK), "split": ForwardConfig(CHUNK, 64, CHUNK)}
BACKWARD: dict[str, BackwardConfig | ChunksBackwardConfig] = {
    "whole": BackwardConfig(CHUNK, TileKernelConfig(32, 64, 64, 4, 2, dv=True)),
    "split": BackwardConfig(CHUNK, TileKernelConfig(32, 64, 64, 4, 2, dv=True), segment=64),
    "tiles": BackwardConfig(CHUNK, TileKernelConfig(32, 32, 32, 4, 2), CHUNK),
    "at once": ChunksBackwardConfig(
        PrepareKernelConfig(32, 64, 4, 2), CHUNK, TileKernelConfig(64, 64, 32, 4, 2), CHUNK
    ),
    "in pairs": ChunksBackwardConfig(
        *(PrepareKernelConfig(32, 64, 4, 2), CHUNK),
        *(TileKernelConfig(64, 64, 32, 4, 2, keep=2), CHUNK),
    ),
}


class Launches:
    """What was launched: kernel, configuration, arguments."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.names: dict[int, tuple[str, str, int]] = {}
        self.code = 0

    def __call__(self, start: int, kernel: int, listed: int, extra: int) -> int:
        name, layout, _ = self.names[kernel]
        head = struct.unpack("@7I4xQQI4x8x", ctypes.string_at(start, 64))
        if listed:
            assert extra == 0
            where = (ctypes.c_uint64 * (len(layout) - 1)).from_address(listed)
            values = tuple(
                struct.unpack(f"@{code}", ctypes.string_at(address, struct.calcsize(code)))[0]
                for code, address in zip(layout[1:], where, strict=True)
            )
        else:
            one, start, two, size, end = (ctypes.c_uint64 * 5).from_address(extra)
            assert (one, two, end) == (1, 2, 0)
            length = ctypes.c_size_t.from_address(size).value
            assert length == struct.calcsize(layout)
            values = struct.unpack(layout, ctypes.string_at(start, length))
        self.seen.append((name, head, values))
        return self.code


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    taken = Launches()
    library = Driver(1)
    monkeypatch.setattr(driver, "_library", lambda: library)
    monkeypatch.setattr(driver, "_launcher", lambda: taken)
    monkeypatch.setattr(driver.DriverKernel, "_check_parameters", lambda *args: None)
    monkeypatch.setattr(engine, "launchable", lambda problem, q: True)
    monkeypatch.setattr(decode, "_launchable", lambda problem, q: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 5, raising=False)
    monkeypatch.setattr(fast, "_raw_stream", lambda index: 5)
    monkeypatch.setattr(fast, "_current_device", lambda: None)
    monkeypatch.setattr(autograd, "_on_gpu", lambda q: True)
    monkeypatch.delenv("GLAC_CHECKED", raising=False)
    monkeypatch.delenv("GLAC_REQUIRE_AOT", raising=False)
    # No address comes twice, so that each stands for one tensor.
    kept: list[Tensor] = []

    def keeping(make: Any) -> Any:
        def made(*args: Any, **options: Any) -> Tensor:
            kept.append(make(*args, **options))
            return kept[-1]

        return made

    for module, name, make in (
        (torch, "empty", torch.empty),
        (fast, "_empty_like", torch.empty_like),
    ):
        monkeypatch.setattr(module, name, keeping(make))
    dispatch.clear()
    yield taken
    dispatch.clear()


@pytest.fixture(params=["whole", "split", "tiles", "at once"])
def configs(
    request: pytest.FixtureRequest, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Kernels of these configs serve; those with scratch memory among them."""
    name: str = request.param
    wanted: dict[Op, Config] = {
        Op.FORWARD: FORWARD.get(name, FORWARD["whole"]),
        Op.BACKWARD: BACKWARD[name],
        Op.DECODE: DecodeConfig(DecodeKernelConfig(32, 2)),
    }
    loaded: dict[KernelSpec, launch.DeviceKernel] = {}

    def load(spec: KernelSpec) -> launch.DeviceKernel:
        if spec not in loaded:
            kinds = [kind for _, kind in run_time_args(spec)]
            made = driver.DriverKernel(
                spec.name,
                b"code",
                "x",
                kinds,
                4,
                1024,
                128 if len(loaded) % 2 else 0,
                None,  # type: ignore[arg-type]
            )
            made.address = 1000 + len(loaded)
            launches.names[made.address] = (spec.name, driver.argument_format(kinds), 0)
            loaded[spec] = launch.DeviceKernel(made)
        return loaded[spec]

    def resolve(problem: Problem, device: Any, op: Op = Op.FORWARD) -> Any:
        config = wanted[op]
        kernels = {k.template: load(k) for k in config_kernels(problem.spec, config, "sm_90a")}
        return None, Plan(problem, config, kernels)

    monkeypatch.setattr(dispatch, "resolve", resolve)
    return name


def inputs(lowrank: bool = False, **options: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).bfloat16()

    q, k, v = draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V)
    if lowrank:
        return q, k, v, draw(B, T, 16), draw(H * K, 16), draw(H * K)
    return q, k, v, -draw(B, T, H, K).abs()


def normalised(seen: list[tuple[Any, ...]], known: dict[int, str]) -> list[tuple[Any, ...]]:
    """Launches with addresses replaced by what they are of, or by the order they appear in."""
    new: dict[int, str] = {}

    def name(value: Any) -> Any:
        if not isinstance(value, int) or value < 1 << 32:
            return value
        return known.get(value) or new.setdefault(value, f"new {len(new)}")

    return [(kernel, head, tuple(map(name, values))) for kernel, head, values in seen]


def addresses(*tensors: Tensor | None) -> dict[int, str]:
    return {t.data_ptr(): f"given {i}" for i, t in enumerate(tensors) if t is not None}


def run(launches: Launches, call: Any, *tensors: Tensor | None) -> tuple[Any, list[Any]]:
    """A result, and the launches that made it."""
    launches.seen.clear()
    result = call()
    results = [t for t in result if isinstance(t, Tensor)]
    return result, normalised(launches.seen, addresses(*tensors, *results))


@pytest.mark.parametrize("lowrank", [False, True])
def test_another_precision_goes_the_long_way(
    launches: Launches, configs: str, lowrank: bool
) -> None:
    function = chunk_gla_lowrank if lowrank else chunk_gla
    x = [t.float().requires_grad_() for t in inputs(lowrank)]
    bare = ("gla_combine", "gla_gate_sums")  # without products
    for turn in range(2):  # the second time the usual calls are remembered
        for precision in ("ieee", "tf32"):
            launches.seen.clear()
            o, _ = function(*x, precision=precision)
            torch.autograd.grad(o.sum(), x)
            names = [name for name, _, _ in launches.seen if not name.startswith(bare)]
            assert len(names) > 1
            assert all(("_tf32_" in name) == (precision == "tf32") for name in names)
            assert len(fast.bound) == 2, turn


@pytest.mark.parametrize("lowrank", [False, True])
@pytest.mark.parametrize("states", [False, True])
def test_forward(launches: Launches, configs: str, lowrank: bool, states: bool) -> None:
    function = chunk_gla_lowrank if lowrank else chunk_gla
    x = inputs(lowrank)
    h0 = torch.randn(B, H, K, V) if states else None
    options: dict[str, Any] = {"initial_state": h0, "output_final_state": states, "scale": 0.25}
    (o, final), first = run(launches, lambda: function(*x, **options), *x, h0)
    assert len(fast.bound) == 1
    assert (final is not None) == states
    # Other tensors like these, in other places.
    y = tuple(t.clone() for t in x)
    again = None if h0 is None else h0.clone()
    options["initial_state"] = again
    bound = next(iter(fast.bound.values()))
    assert isinstance(bound, fast.Bound)
    (o2, final2), second = run(launches, lambda: function(*y, **options), *y, again)
    assert second == first
    assert (o2.shape, o2.dtype, o2.is_contiguous()) == (o.shape, o.dtype, True)
    assert (final2 is None) == (final is None)
    if final2 is not None:
        assert (final2.shape, final2.dtype) == (final.shape, final.dtype)
    assert not o2.requires_grad
    # And it was the short way: with the long one gone it still works.
    assert next(iter(fast.bound.values())) is bound


def test_one_tensor_in_two_places(launches: Launches, configs: str) -> None:
    q, k, v, g = inputs()
    chunk_gla(q, q, v, g)
    _, got = run(launches, lambda: chunk_gla(q, k, v, g), q, k, v, g)
    fast.bound.clear()
    _, wanted = run(launches, lambda: chunk_gla(q, k, v, g), q, k, v, g)
    assert got == wanted


@pytest.mark.parametrize("lowrank", [False, True])
@pytest.mark.parametrize("states", [False, True])
def test_backward(
    launches: Launches, configs: str, states: bool, lowrank: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = chunk_gla_lowrank if lowrank else chunk_gla
    x = inputs(lowrank)
    h0 = torch.randn(B, H, K, V, requires_grad=True) if states else None
    leaves = [t.requires_grad_() for t in x] + ([h0] if h0 is not None else [])
    do, dht = torch.randn(B, T, H, V).bfloat16(), torch.randn(B, H, K, V)

    def call() -> tuple[Tensor, ...]:
        o, final = function(*x, initial_state=h0, output_final_state=states)
        assert o.requires_grad
        if final is None:
            return torch.autograd.grad(o, leaves, do)
        return torch.autograd.grad([o, final], leaves, [do, dht])

    first_grads, first = run(launches, call, *x, h0, do, dht)
    remembered = list(fast.bound.values())
    grads, second = run(launches, call, *x, h0, do, dht)
    assert second == first
    assert [(g.shape, g.dtype) for g in grads] == [(g.shape, g.dtype) for g in first_grads]
    assert list(fast.bound.values()) == remembered
    assert isinstance(remembered[0], fast.Bound)
    # Gradients that are sums of parts go the long way, which is remembered too.
    assert isinstance(remembered[1], fast.Bound) == (configs != "tiles")
    if configs != "tiles":
        monkeypatch.setattr(engine, "backward", None)
        run(launches, call, *x, h0, do, dht)


DECODE: dict[str, dict[str, Any]] = {
    "no state": {},
    "in place": {"initial_state": torch.ones(B, H, K, V), "inplace": True},
    "a pool": {
        "initial_state": torch.ones(9, H, K, V, dtype=torch.bfloat16),
        "state_indices": torch.tensor([3, 8]),
        "inplace": True,
    },
    "new states": {
        "initial_state": torch.ones(B, H, K, V),
        "output_states": True,
        "state_dtype": torch.bfloat16,
    },
}


@pytest.mark.parametrize("configs", ["whole"], indirect=True)
@pytest.mark.parametrize("lowrank", [False, True])
@pytest.mark.parametrize("case", DECODE)
def test_decoding(
    launches: Launches, configs: str, case: str, lowrank: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = recurrent_gla_lowrank if lowrank else recurrent_gla
    options = DECODE[case]
    given = [t for t in options.values() if isinstance(t, Tensor)]

    def tokens() -> tuple[Tensor, ...]:
        return tuple(t[:, :2].contiguous() if t.dim() > 2 else t for t in inputs(lowrank))

    x = tokens()
    (o, state), first = run(launches, lambda: function(*x, **options), *x, *given)
    assert isinstance(next(iter(fast.bound.values())), fast.Bound)
    monkeypatch.setattr(decode, "_check", None)
    x = tokens()
    (o2, state2), second = run(launches, lambda: function(*x, **options), *x, *given)
    assert second == first
    assert len(first) == 1
    assert (o2.shape, o2.dtype) == (o.shape, o.dtype)
    if options.get("inplace"):
        assert state2 is options["initial_state"]
    elif state is None:
        assert state2 is None
    else:
        assert (state2.shape, state2.dtype) == (state.shape, state.dtype)


@pytest.mark.parametrize("configs", ["whole"], indirect=True)
def test_decoding_what_lies_elsewhere_or_otherwise(launches: Launches, configs: str) -> None:
    q, k, v, g = (t[:, :2].contiguous() for t in inputs())
    gates = torch.zeros(B * 2 * H + 1)
    seen = []
    for gate in (gates[:-1], gates[1:]):
        given = (q, k, v, gate.view(B, 2, H))
        seen.append(run(launches, lambda x=given: recurrent_gla(*x), *given)[1])
    assert seen[0] == seen[1]  # not aligned: the long way, in which such a gate is fine
    dispatch.clear()
    turned = q.transpose(1, 3).contiguous().transpose(1, 3)
    recurrent_gla(turned, k, v, g)
    assert list(fast.bound.values()) == [fast.NEVER]


LONG: dict[str, Any] = {
    "another scale": lambda x: ((x[0], x[1], x[2], x[3]), {"scale": 0.5}),
    "another length": lambda x: (tuple(t[:, :200] for t in x), {}),
    "another layout": lambda x: (
        tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in x),
        {},
    ),
    "another gate dtype": lambda x: ((*x[:3], x[3].float()), {}),
    "final state": lambda x: (x, {"output_final_state": True}),
    "initial state": lambda x: (x, {"initial_state": torch.zeros(B, H, K, V)}),
}


@pytest.mark.parametrize("configs", ["whole"], indirect=True)
@pytest.mark.parametrize("change", LONG)
def test_what_makes_a_call_another_one(launches: Launches, configs: str, change: str) -> None:
    x = inputs()
    chunk_gla(*x)
    args, options = LONG[change](x)
    _, got = run(launches, lambda: chunk_gla(*args, **options), *args)
    assert len(fast.bound) == 2
    fast.bound.clear()
    _, wanted = run(launches, lambda: chunk_gla(*args, **options), *args)
    assert got == wanted


@pytest.mark.parametrize("configs", ["whole"], indirect=True)
def test_unaligned_tensors_are_copied(launches: Launches, configs: str) -> None:
    x = inputs()
    chunk_gla(*x)
    memory = torch.empty(x[0].numel() + 1, dtype=torch.bfloat16)
    odd = memory[1:].view(x[0].shape).copy_(x[0])
    assert odd.data_ptr() % 16
    launches.seen.clear()
    chunk_gla(odd, *x[1:])
    (seen,) = launches.seen
    assert seen[2][0] not in (odd.data_ptr(), x[0].data_ptr())
    assert all(value % 16 == 0 for value in seen[2][:5])
    # Nor is such a call remembered as one that never can be.
    fast.bound.clear()
    chunk_gla(odd, *x[1:])
    assert fast.bound == {}


@pytest.mark.parametrize("configs", ["whole"], indirect=True)
def test_layouts_that_need_copies_never_go_the_short_way(launches: Launches, configs: str) -> None:
    q, k, v, g = inputs()
    q = q.transpose(2, 3).contiguous().transpose(2, 3)
    for _ in range(2):
        launches.seen.clear()
        chunk_gla(q, k, v, g)
        assert launches.seen[0][2][0] != q.data_ptr()
    assert list(fast.bound.values()) == [fast.NEVER]


@pytest.mark.parametrize("configs", ["whole"], indirect=True)
def test_what_has_to_see_a_call_sees_it(
    launches: Launches, configs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    x = inputs()
    chunk_gla(*x)

    def refused(*args: Any) -> Any:
        raise AssertionError("the short way")

    monkeypatch.setattr(fast.Bound, "launch", refused)

    class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    class Sub(Tensor):  # type: ignore[no-untyped-call,unused-ignore]
        @classmethod
        def __torch_dispatch__(  # type: ignore[override]
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    numbers = ((None,), False)
    assert fast.key_of((*x, None), *numbers) in fast.bound
    with Mode():  # type: ignore[no-untyped-call]
        assert fast.key_of((*x, None), *numbers) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast.key_of((*x, None), *numbers) is None
    with torch.autograd.forward_ad.dual_level():
        assert fast.key_of((*x, None), *numbers) is None
    assert fast.key_of((x[0].as_subclass(Sub), *x[1:], None), *numbers) is None
    assert fast.key_of((torch.nn.Parameter(x[0]), *x[1:], None), *numbers) in fast.bound
    with pytest.raises(InputTypeError, match="dense tensor"):
        chunk_gla(x[0].to_sparse(), *x[1:])
    monkeypatch.setenv("GLAC_CHECKED", "1")
    assert fast.key_of((*x, None), *numbers) is None
    monkeypatch.delenv("GLAC_CHECKED")
    with pytest.raises(AssertionError, match="the short way"):
        chunk_gla(*x)
    for wrong in (True, 1, "2"):
        assert fast.key_of((*x, None), (wrong,), False) is None  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match="scale"):
        chunk_gla(*x, scale=True)
    with pytest.raises(InputTypeError, match="q must be"):
        chunk_gla(None, *x[1:])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="state_layout"):
        chunk_gla(*x, state_layout="xy")  # type: ignore[arg-type]


@pytest.mark.parametrize("configs", ["whole"], indirect=True)
def test_what_has_to_see_one_of_the_last_calls_sees_it(
    launches: Launches, configs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    x = inputs()

    def recalled(scale: Any = 1.0, final: bool = False, given: Any = x) -> bool:
        """Whether a call is known without its key."""
        key, found = fast.recall("chunk_gla", given, (*given, None), (scale,), final)
        assert key is None or found is None
        return found is not None

    for _ in range(2):
        chunk_gla(*x, scale=1.0)
    assert recalled()
    assert not recalled(True)
    assert not recalled(1)
    assert not recalled(0.5)
    assert not recalled(torch.ones(3))
    assert not recalled(final=True)
    assert not recalled(given=(*x[:3], x[3].float()))
    assert not recalled(given=(*x[:3], None))
    with Mode():  # type: ignore[no-untyped-call]
        assert not recalled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not recalled()
    with torch.autograd.forward_ad.dual_level():
        assert not recalled()
    known = torch.func.vmap(lambda t: t * recalled())(torch.ones(2))
    assert known.tolist() == [0, 0]
    slope = torch.func.grad(lambda t: (t * recalled()).sum())(torch.ones(2))
    assert slope.tolist() == [0, 0]
    monkeypatch.setenv("GLAC_CHECKED", "1")
    assert not recalled()
    monkeypatch.delenv("GLAC_CHECKED")
    assert recalled()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not recalled()


@pytest.mark.parametrize("configs", ["whole"], indirect=True)
def test_the_last_few_calls_are_known_without_a_key(
    launches: Launches, configs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = inputs()
    sets = [tuple(t[:, :tokens].contiguous() for t in x) for tokens in (64, 96)]
    sets += [tuple(t.clone().requires_grad_() for t in own) for own in sets]
    for _ in range(2):
        for own in sets:
            chunk_gla(*own)
    made = list(fast._last["chunk_gla", 4])
    assert len(made) == len(sets)
    monkeypatch.setattr(fast, "key_of", None)
    for own in sets:
        o, _ = chunk_gla(*own)
        assert o.shape == own[2].shape
        assert o.requires_grad == own[0].requires_grad
        assert launches.seen[-1][2][0] == own[0].data_ptr()
    assert list(fast._last["chunk_gla", 4]) == made
    dispatch.clear()
    assert fast._last == {}


@pytest.mark.parametrize("configs", ["whole"], indirect=True)
def test_without_what_compares_tensors(
    launches: Launches, configs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "_guards", None)
    x = tuple(t.requires_grad_() for t in inputs())
    do = torch.randn(B, T, H, V).bfloat16()

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(chunk_gla(*x)[0], x, do)

    _, first = run(launches, call, *x, do)
    monkeypatch.setattr(engine, "forward", None)
    monkeypatch.setattr(engine, "backward", None)
    assert run(launches, call, *x, do)[1] == first
    assert fast._last == {}


def train(x: tuple[Tensor, ...], do: Tensor, leaves: tuple[Tensor, ...] | None = None) -> Any:
    return torch.autograd.grad(chunk_gla(*x)[0], leaves or x, do)


@pytest.mark.parametrize("configs", ["whole"], indirect=True)
def test_layouts_that_hooks_have_changed(launches: Launches, configs: str) -> None:
    """What comes back need not lie as what was kept, as with ``save_on_cpu``."""
    x = tuple(t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in inputs())
    do = torch.randn(B, T, H, V).bfloat16()
    for _ in range(3):
        train(x, do)
    assert all(isinstance(b, fast.Bound) for b in fast.bound.values())
    y = tuple(t.detach().contiguous() for t in x)
    packed = dict(zip([id(t) for t in x], y, strict=True))

    def changed() -> Any:
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: packed.get(id(t), t), lambda t: t
        )
        with hooks:
            return train(x, do)

    def backward(call: Any, *tensors: Tensor) -> list[Any]:
        """Launches of the backward pass, without pointers."""
        seen = [item for item in run(launches, call, *tensors)[1] if "fwd" not in item[0]]
        return [
            (n, head, [x for x in values if not isinstance(x, str)]) for n, head, values in seen
        ]

    before = backward(lambda: train(x, do), *x, do)
    got = backward(changed, *x, *y, do)
    dispatch.clear()
    own = tuple(t.clone().requires_grad_() for t in y)
    assert got == backward(lambda: train(own, do), *own, do) != before


@pytest.mark.parametrize("configs", ["whole"], indirect=True)
def test_gradients_nobody_wants_are_dropped(launches: Launches, configs: str) -> None:
    x = tuple(t.requires_grad_() for t in inputs())
    do = torch.randn(B, T, H, V).bfloat16()
    every, some = (0, 1, 2, 3), (1, 3)
    for wanted in (every, every, some, some, some, every):
        for i, t in enumerate(x):
            t.requires_grad_(i in wanted)
        o, _ = chunk_gla(*x)
        found: list[bool] = []
        node: Any = o.grad_fn
        node.register_hook(
            lambda grads, _, found=found: found.extend(grad is not None for grad in grads)
        )
        grads = torch.autograd.grad(o, [x[i] for i in wanted], do)
        assert [g.shape for g in grads] == [x[i].shape for i in wanted]
        assert sum(found) == len(wanted)
    h0 = torch.randn(B, H, K, V)
    for _ in range(3):
        o, final = chunk_gla(*x, initial_state=h0, output_final_state=True)
        assert final is not None
        assert len(torch.autograd.grad([o, final], x, [do, torch.ones_like(h0)])) == 4
        final = chunk_gla(*x, initial_state=h0, output_final_state=True)[1]
        assert final is not None
        (dq,) = torch.autograd.grad(final, x[:1], torch.ones_like(h0))
        assert dq.shape == x[0].shape


@pytest.mark.parametrize("configs", ["whole"], indirect=True)
def test_gradients_have_memory_of_their_own(launches: Launches, configs: str) -> None:
    x = tuple(t.requires_grad_() for t in inputs())
    do = torch.randn(B, T, H, V).bfloat16()
    for _ in range(3):
        grads = train(x, do)
        assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads)
        assert all(g.untyped_storage().nbytes() == g.nbytes for g in grads)
        assert all(g.is_contiguous() and not g.is_inference() for g in grads)


@pytest.mark.parametrize("configs", ["whole"], indirect=True)
def test_a_second_derivative_is_refused(launches: Launches, configs: str) -> None:
    x = tuple(t.requires_grad_() for t in inputs())
    do = torch.randn(B, T, H, V).bfloat16()
    for _ in range(3):
        train(x, do)
        grads = torch.autograd.grad(chunk_gla(*x)[0], x, do, create_graph=True)
        with pytest.raises(NotDifferentiableError, match="once"):
            torch.autograd.grad(grads[0].sum(), x)


@pytest.mark.parametrize("configs", ["whole"], indirect=True)
def test_a_waiting_backward_pass_forgets_too(
    launches: Launches, configs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = tuple(t.requires_grad_() for t in inputs())
    do = torch.randn(B, T, H, V).bfloat16()
    for _ in range(3):
        train(x, do)
    o, _ = chunk_gla(*x)
    dispatch.clear()
    calls: list[Op] = []
    resolve = dispatch.resolve

    def asked(problem: Problem, device: Any, op: Op = Op.FORWARD) -> Any:
        calls.append(op)
        return resolve(problem, device, op)

    monkeypatch.setattr(dispatch, "resolve", asked)
    torch.autograd.grad(o, x, do)
    assert calls[:1] == [Op.BACKWARD]


@pytest.mark.parametrize("configs", ["whole"], indirect=True)
def test_streams_change(launches: Launches, configs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = tuple(t.requires_grad_() for t in inputs())
    do = torch.randn(B, T, H, V).bfloat16()
    train(x, do)
    for stream in (5, 6, 6, 0, 5):
        monkeypatch.setattr(fast, "_raw_stream", lambda index, stream=stream: stream)
        launches.seen.clear()
        train(x, do)
        assert {head[7] for _, head, _ in launches.seen} == {stream}


@pytest.mark.parametrize("configs", ["whole"], indirect=True)
def test_it_is_forgotten_with_the_decisions(
    launches: Launches, configs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = inputs()
    chunk_gla(*x)
    assert fast.bound
    dispatch.clear()
    assert fast.bound == {}
    monkeypatch.setattr(binding, "LIMIT", 3)
    for tokens in range(1, 9):
        chunk_gla(*(t[:, :tokens] for t in x))
        assert len(fast.bound) <= 3
    # Another current device: the long way, which changes it for the launch.
    monkeypatch.setattr(fast, "_current_device", lambda: 7)
    assert fast.find(next(iter(fast.bound))) is None


@pytest.mark.parametrize("configs", ["whole"], indirect=True)
def test_a_failed_launch_is_an_error(launches: Launches, configs: str) -> None:
    x = inputs()
    chunk_gla(*x)
    launches.code = 1
    with pytest.raises(Exception, match="launching gla_fwd_"):
        chunk_gla(*x)
    launches.code = 0
    chunk_gla(*x)


@pytest.mark.parametrize("configs", ["split"], indirect=True)
def test_a_thread_without_a_context_gets_one(
    launches: Launches, configs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread of autograd launches before anything else has given it one."""
    x = inputs()
    chunk_gla(*x)
    _, first = run(launches, lambda: chunk_gla(*x), *x)
    monkeypatch.setattr(
        driver, "_enter_primary_context", lambda device: setattr(launches, "code", 0)
    )
    launches.code = 201
    _, second = run(launches, lambda: chunk_gla(*x), *x)
    assert second == [first[0], *first]


@pytest.mark.parametrize("configs", ["split"], indirect=True)
def test_threads(launches: Launches, configs: str) -> None:
    """Each launch has a buffer of its own while it lasts."""
    x = inputs()
    sets = [tuple(t.clone() for t in x) for _ in range(4)]
    chunk_gla(*x)
    wrong: list[Any] = []
    launches.seen.clear()

    def work(own: tuple[Tensor, ...]) -> None:
        try:
            for _ in range(100):
                chunk_gla(*own)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(own,)) for own in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(launches.seen) == 4 * 100 * 3
    counts = {own[0].data_ptr(): 0 for own in sets}
    for name, _, values in launches.seen:
        if name.startswith("gla_fwd_"):
            counts[values[0]] += 1
            (own,) = (own for own in sets if own[0].data_ptr() == values[0])
            assert values[1:4] == tuple(t.data_ptr() for t in own[1:])
    assert set(counts.values()) == {100}
