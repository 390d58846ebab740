"""Backward kernels from packs on a GPU: against fp64, against themselves, and their memory."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glac import dispatch
from glac.attention import chunk_gla, chunk_gla_lowrank
from glac.configs import BackwardConfig, ChunksBackwardConfig
from glac.errors import KernelNotFoundError
from glac.pack import Pack, PackRow
from glac.problem import Op, Problem
from glac.reference import chunk_gla as reference_chunk_gla
from glac.reference import (
    chunk_gla_backward,
    relative_rms,
    yardstick_chunk_gla,
    yardstick_chunk_gla_backward,
)
from glac.testing import Inputs, hard_gates, make_inputs
from glac.validate import check_lowrank, check_vector
from tests.gpu.rows import (
    BF16,
    CEILING,
    FP16,
    FP32,
    TF32_CEILING,
    TF32_STEEP,
    Tensors,
    backward_chunk,
    hard,
    in_tf32,
    partly_hard,
    row_inputs,
    run_backward_row,
    why_wrong,
    windows_of,
)
from tests.helpers_gradients import CANCELLED, ends_of, gradient_errors, true_gradients

if TYPE_CHECKING:
    from tests.gpu.conftest import Packed

pytestmark = pytest.mark.gpu

DIMS = [(64, 64), (128, 128), (128, 256), (256, 512)]
EVERY_DIM = pytest.mark.parametrize("dims", DIMS, ids=str)
EVERY_GATE = pytest.mark.parametrize("gate", ["vector", "lowrank"])
STEEP = ("dx", "dweight", "dbias")
LN2 = math.log(2)
MIB = 2**20
_empty = torch.empty


def nan_filled(*size: Any, **options: Any) -> Tensor:
    tensor = _empty(*size, **options)
    return tensor.fill_(math.nan if tensor.is_floating_point() else 7)


def with_resets(x: Inputs, every: int = 64) -> Inputs:
    """One token in ``every`` resets its head, one element in ``4 * every`` its channel."""
    assert x.g is not None
    generator = torch.Generator(x.g.device).manual_seed(every)

    def rare(size: Sequence[int], one_in: int) -> Tensor:
        assert x.g is not None
        return torch.randint(one_in, size, generator=generator, device=x.g.device) == 0

    mask = rare((*x.g.shape[:3], 1), every) | rare(x.g.shape, 4 * every)
    return replace(x, g=x.g.masked_fill(mask, -math.inf))


def tokens_of(x: Inputs, begin: int, end: int | None = None) -> Inputs:
    """The problem of some of the tokens, as views."""
    some = {
        name: None if t is None else t[:, begin:end]
        for name, t in (("q", x.q), ("k", x.k), ("v", x.v), ("g", x.g), ("x", x.x))
    }
    return replace(x, **some)  # type: ignore[arg-type]


def problem_of(x: Inputs) -> Problem:
    if x.g is not None:
        return check_vector(x.q, x.k, x.v, x.g, x.initial_state)
    assert x.x is not None
    assert x.weight is not None
    return check_lowrank(x.q, x.k, x.v, x.x, x.weight, x.bias, x.initial_state)


def leaves_of(x: Inputs, names: Sequence[str] | None = None) -> Tensors:
    """The tensors by name, as leaves; those in ``names`` (default: all) want a gradient."""
    return {
        name: t.detach().requires_grad_(names is None or name in names)
        for name, t in vars(x).items()
        if t is not None
    }


def call(x: Tensors, **options: Any) -> tuple[Tensor, Tensor | None]:
    operation: Any = chunk_gla if "g" in x else chunk_gla_lowrank
    o, state = operation(**x, **options)
    return o, state


def gradients(
    x: Inputs,
    do: Tensor | None,
    dht: Tensor | None = None,
    names: Sequence[str] | None = None,
    **options: Any,
) -> Tensors:
    """Results and gradients by name, through the public operation and autograd."""
    leaves = leaves_of(x, names)
    o, state = call(leaves, output_final_state=dht is not None, **options)
    used = [(a, b) for a, b in ((o, do), (state, dht)) if a is not None and b is not None]
    results, ends = zip(*used, strict=True)
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(results, list(wanted.values()), ends, materialize_grads=True)
    found = {"o": o.detach()} if state is None else {"o": o.detach(), "state": state.detach()}
    names_of = {"initial_state": "dh0"}
    return found | {
        names_of.get(name, f"d{name}"): t for name, t in zip(wanted, grads, strict=True)
    }


def assert_same_bits(a: Tensors, b: Tensors) -> None:
    assert list(a) == list(b)
    for name, one in a.items():
        assert torch.equal(bits(one), bits(b[name])), name


def bits(t: Tensor) -> Tensor:
    return t.view(torch.int16 if t.element_size() == 2 else torch.int32)


def check(x: Inputs, *, measured: bool = False, seed: int = 0) -> None:
    do, dht = ends_of(x, seed)
    reason = why_wrong(x, gradients(x, do, dht), do, dht, measured=measured)
    assert not reason, f"{problem_of(x)}: {reason}"


# --- against fp64 -----------------------------------------------------------------------------


@EVERY_DIM
@pytest.mark.parametrize("tokens", [256, 4096, 65536])
@pytest.mark.parametrize("kind", ["slow", "fast", "resets"])
def test_error_against_fp64(packed: Packed, dims: tuple[int, int], tokens: int, kind: str) -> None:
    batch, heads = (1, 2) if tokens > 4096 else (2, 4)
    x = packed.draw(
        batch,
        tokens,
        heads,
        *dims,
        backward=True,
        initial_state=True,
        gate_scale=1.0 if kind == "fast" else 16.0,
    )
    check(with_resets(x) if kind == "resets" else x, measured=tokens <= 4096)


@EVERY_DIM
@pytest.mark.parametrize("tokens", [256, 1000, 4096])
def test_low_rank_gate(packed: Packed, dims: tuple[int, int], tokens: int) -> None:
    x = packed.draw(
        2, tokens, 4, *dims, gate="lowrank", rank=16, initial_state=True, backward=True
    )
    check(x, measured=tokens == 256)
    if tokens == 1000:
        check(replace(x, bias=None))
        assert x.weight is not None
        check(replace(x, weight=64 * x.weight))  # decays from 1 down to e^-15 a token


@EVERY_DIM
@EVERY_GATE
def test_fp32_inputs(packed: Packed, dims: tuple[int, int], gate: str) -> None:
    x = packed.draw(1, 300, 4, *dims, dtype=FP32, gate=gate, initial_state=True, backward=True)
    check(x)
    if gate == "vector":
        check(hard(x))


@pytest.mark.parametrize("dims", DIMS[:2], ids=str)
@EVERY_GATE
@pytest.mark.parametrize("tokens", [64, 300, 1030])
def test_fp32_inputs_in_tf32(
    packed: Packed, dims: tuple[int, int], gate: str, tokens: int
) -> None:
    """Every gradient less exact than by the usual products, and within the ceiling."""
    x = packed.draw(2, tokens, 4, *dims, dtype=FP32, gate=gate, initial_state=True, backward=True)
    for op in (Op.FORWARD, Op.BACKWARD):
        packed.need(in_tf32(problem_of(x)), op)
    do, dht = ends_of(x)
    cases = {"mild": x}
    if x.weight is None:
        cases |= {"resets": with_resets(x), "hard": hard(x)}
    else:
        cases["hard"] = replace(x, weight=64 * x.weight)
    for kind, case in cases.items():
        true = true_gradients(case, do, dht)
        runs = [gradients(case, do, dht, precision=p) for p in ("ieee", "tf32", "ieee", "tf32")]
        assert_same_bits(runs[0], runs[2])
        assert_same_bits(runs[1], runs[3])
        usual, once = (
            gradient_errors({n: t for n, t in run.items() if n not in ("o", "state")}, *true)
            for run in runs[:2]
        )
        for name, error in once.items():
            limit = TF32_STEEP if kind == "hard" and name in STEEP else TF32_CEILING
            assert usual[name] < error <= limit, f"{kind} {name}: {usual[name]:.1e}, {error:.1e}"


@EVERY_DIM
@EVERY_GATE
def test_fp16_inputs(packed: Packed, dims: tuple[int, int], gate: str) -> None:
    x = packed.draw(2, 300, 4, *dims, dtype=FP16, gate=gate, initial_state=True, backward=True)
    check(x, measured=True)
    if gate == "vector":
        check(hard(x), measured=True)


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "initial_state"])
def test_finite_differences(packed: Packed, name: str) -> None:
    """The kernels against themselves, fp32. All but the gate enter linearly: any step will do."""
    x = packed.draw(1, 150, 2, 128, 128, dtype=FP32, initial_state=True, backward=True)
    do, dht = ends_of(x)
    grads = gradients(x, do, dht)
    value = getattr(x, name)
    direction = torch.randn(value.shape, device=packed.device)
    if name == "g":
        direction = 2**-4 * direction.clamp(-3, 3) * value  # stays below 0

    def loss(sign: int) -> tuple[float, float]:
        """The loss, and the size of what it adds up."""
        moved = replace(x, **{name: value + sign * direction})
        with torch.no_grad():
            o, state = call(leaves_of(moved), output_final_state=True)
        assert state is not None
        terms = (o.double() * do, state.double() * dht)
        return sum(float(t.sum()) for t in terms), sum(float(t.norm()) for t in terms)

    (ahead, size), (behind, _) = loss(1), loss(-1)
    products = grads["dh0" if name == "initial_state" else f"d{name}"].double() * direction
    curvature = 1e-3 if name == "g" else 0.0
    budget = 1e-6 * size + (1e-5 + curvature) * float(products.norm())
    assert abs((ahead - behind) / 2 - float(products.sum())) <= budget


@EVERY_GATE
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_identities(packed: Packed, gate: str, dtype: torch.dtype) -> None:
    """Scaling q, or k and v oppositely, changes nothing; the first gate scales the state."""
    x = packed.draw(2, 500, 4, 128, 128, dtype=dtype, gate=gate, initial_state=True, backward=True)
    limit = 2 * CEILING[dtype]
    for y in [x, hard(x)] if gate == "vector" else [x]:
        assert y.initial_state is not None
        do, dht = ends_of(y)
        got = {name: t.double() for name, t in gradients(y, do, dht).items()}
        terms = [y.q * got["dq"], do * got["o"], y.k * got["dk"], y.v * got["dv"]]
        read, out, key, value = (t.sum(-1) for t in terms)
        assert float((read - out).norm()) <= limit * float(terms[0].norm())
        assert float((key - value).norm()) <= limit * float(terms[2].norm())
        if gate == "vector":
            products = y.initial_state * got["dh0"]
            first = got["dg"][:, 0] - products.sum(-1)
            assert float(first.norm()) <= limit * float(products.norm())


# --- every row of the packs -------------------------------------------------------------------


def test_every_row_of_the_packs(packed: Packed) -> None:
    """Each shipped config at lengths around its chunk, mild and hard gates, and in windows."""
    failures = []
    for pack, row in packed.rows(Op.BACKWARD):
        assert isinstance(row.config, BackwardConfig | ChunksBackwardConfig)
        chunk = backward_chunk(row.config)
        lengths = [1, chunk, chunk + 1, 3 * chunk + 9]
        if row.config.states is None:  # programs walk to their segments
            lengths.append(2 * row.config.segment + 33)
        for tokens in lengths:
            x = row_inputs(row, 2, tokens, 3, packed.device)
            for kind, case in (("mild", x), ("partly hard", partly_hard(x))):
                where = f"{row.spec.slug} {row.config.slug} T={tokens} {kind}"
                do, dht = ends_of(case)
                with mock.patch.object(torch, "empty", nan_filled):
                    got = run_backward_row(pack, row, case, do, dht)
                    with windows_of(1):
                        pieces = run_backward_row(pack, row, case, do, dht)
                true = true_gradients(case, do, dht)
                for what, grads in (("", got), (" in windows", pieces)):
                    precision = row.spec.precision
                    reason = why_wrong(case, grads, do, dht, true=true, precision=precision)
                    if reason:
                        failures.append(f"{where}{what}: {reason}")
    assert not failures, "\n".join(failures)


def count_differences(run: Callable[[], Tensors], times: int) -> int:
    """How many of the repeats in a CUDA graph differ in a bit from the first run."""
    first = {name: t.clone() for name, t in run().items()}
    differing = torch.zeros((), dtype=torch.int64, device=first["dq"].device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = run()
        same = [torch.ne(bits(t), bits(first[name])).any() for name, t in again.items()]
        differing += torch.stack(same).any()
    for _ in range(times):
        graph.replay()
    return int(differing)


def test_repeats_of_every_row_are_bit_equal(packed: Packed) -> None:
    """Forward and backward a thousand times."""
    failures = []
    for pack, row in packed.rows(Op.BACKWARD):
        assert isinstance(row.config, BackwardConfig | ChunksBackwardConfig)
        tokens = 300 if row.config.states else 2 * row.config.segment + 33
        x = partly_hard(row_inputs(row, 2, tokens, 4, packed.device))
        do, dht = ends_of(x)

        def run(
            pack: Pack = pack, row: PackRow = row, x: Inputs = x, ends: Any = (do, dht)
        ) -> Tensors:
            grads = run_backward_row(pack, row, x, *ends)
            try:
                with torch.no_grad():
                    precision = row.spec.precision.value
                    o, state = call(leaves_of(x), output_final_state=True, precision=precision)
            except KernelNotFoundError:  # a pack may have the backward op alone
                return grads
            assert state is not None
            return {"o": o, "state": state, **grads}

        differing = count_differences(run, 1000)
        if differing:
            failures.append(f"{row.spec.slug} {row.config.slug}: {differing} of 1000 differ")
    assert not failures, "\n".join(failures)


@EVERY_GATE
def test_repeats_are_bit_equal_beside_a_busy_stream(packed: Packed, gate: str) -> None:
    x = packed.draw(2, 300, 4, 128, 128, gate=gate, initial_state=True, backward=True)
    x = partly_hard(x)
    do, dht = ends_of(x)
    first = gradients(x, do, dht)
    differing = torch.zeros((), dtype=torch.int64, device=packed.device)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    noise = torch.randn(2048, 2048, device=packed.device, dtype=BF16)
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(1000):
        with torch.cuda.stream(side):
            noise @ noise
        again = gradients(x, do, dht)
        same = [torch.ne(bits(t), bits(first[name])).any() for name, t in again.items()]
        differing += torch.stack(same).any()
    torch.cuda.synchronize()
    assert int(differing) == 0


# --- every gate -------------------------------------------------------------------------------


def gate_cases(
    shape: tuple[int, int, int, int], seed: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Gates of which each head is a case of its own: one kind, or a kind for each channel."""
    B, T, H, K = shape
    generator = torch.Generator(device).manual_seed(seed)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device)

    def integers(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=generator, device=device)

    steps = F.logsigmoid(torch.randn(shape, generator=generator, device=device))
    mild = steps / 16
    token = torch.arange(T, device=device).view(1, T, 1, 1)
    kinds = [
        mild,
        steps,
        torch.zeros_like(mild),
        -(10.0 ** (-30 * uniform(B, 1, H, K))).expand(shape),
        # From 1 to 200 powers of two in 32 tokens, in step and each channel at its own rate.
        -((1 + 199 * uniform(B, 1, H, 1)) * LN2 / 32).expand(shape),
        -((1 + 199 * uniform(B, 1, H, K)) * LN2 / 32).expand(shape),
        mild.masked_fill(integers(32, B, T, H, 1) == 0, -math.inf),
        mild.masked_fill((token % 16 == 0) & (integers(2, B, T, H, 1) == 0), -math.inf),
        mild.masked_fill(integers(64, *shape) == 0, -1e4),
        torch.full_like(mild, -math.inf),
        hard_gates(shape, seed=seed, device=device),
    ]
    kind = integers(len(kinds) + 1, B, 1, H, 1)
    per_channel = torch.where(kind < len(kinds), kind, integers(len(kinds), B, 1, H, K))
    picked = torch.zeros(shape, device=device)
    for index, gates in enumerate(kinds):
        picked = torch.where(per_channel == index, gates, picked)
    return picked.to(dtype)


def levels(g: Tensor, chunk: int) -> Tensor:
    """The rung of the ladder ``[B, H]`` that each head needs, by the rule of docs/numerics.md."""
    log2 = (g.double() / LN2).clamp(min=-160.0)
    log2 = F.pad(log2, (0, 0, 0, 0, 0, -g.shape[1] % chunk))

    def range_of(rows: int, skip: int) -> Tensor:
        blocks = torch.unflatten(log2, 1, (-1, rows))  # [B, N, rows, H, K]
        return -blocks[:, :, skip:].sum(2).amin((1, 3))  # [B, H]

    exact = torch.where(range_of(16, 1) <= 128, 2, 3)
    return torch.where(range_of(chunk, 0) <= 80, 0, exact)


def head_errors(got: Tensors, wanted: Tensors, sizes: Tensors) -> Tensors:
    """Error of each result, for each head."""
    errors = {}
    for name, t in got.items():
        over = (2, 3) if name in ("state", "dh0") else (1, 3)
        size = wanted[name].square().sum(over).sqrt().clamp(min=1e-30)  # 0 behind a reset
        if name in sizes:
            size = torch.maximum(size, sizes[name])
        difference = (t.double() - wanted[name]).square().sum(over).sqrt()
        errors[name] = torch.nan_to_num(difference / size, nan=math.inf)
    return errors


def results_in(
    x: Inputs, do: Tensor, dht: Tensor, forward: Any, reverse: Any, dtype: torch.dtype | None
) -> Tensors:
    """Results and gradients by one of the forms of glac.reference."""
    assert x.g is not None
    assert x.initial_state is not None
    tensors = [x.q, x.k, x.v, x.g, x.initial_state, do, dht]
    q, k, v, g, h0, dout, end = (t if dtype is None else t.to(dtype) for t in tensors)
    o, state = forward(q, k, v, g, initial_state=h0, output_final_state=True)
    grads = reverse(q, k, v, g, dout, initial_state=h0, dht=end)
    return {"o": o, "state": state, **grads._asdict()}


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_twenty_thousand_gates(packed: Packed, dtype: torch.dtype) -> None:
    """No NaN and no wrong head, on each rung of the ladder.

    Beside bf16 the heads of a rung together may be 1.5 times as wrong as the same arithmetic in
    PyTorch. One head alone may be 3 times as wrong as that is on this head or on the usual one:
    of 120 000 such errors, each the sum of a few roundings, the worst was 2.1 times.
    """
    shape = (5, 128, 100, 64)
    packed.draw(1, 128, 1, 64, 64, dtype=dtype, backward=True)  # skips where no pack has it
    found = dict.fromkeys((0, 2, 3), 0)
    together: dict[tuple[int, str], list[Tensor]] = {}
    failures = []
    for seed in range(40):
        x = make_inputs(
            *shape, 64, dtype=dtype, seed=seed, initial_state=True, device=packed.device
        )
        x = replace(x, g=gate_cases(shape, seed, packed.device, dtype))
        assert x.g is not None
        config = dispatch.explain(problem_of(x), packed.device, Op.BACKWARD).config
        assert isinstance(config, BackwardConfig)
        rungs = levels(x.g, config.grads.chunk)
        for level in found:
            found[level] += int((rungs == level).sum())
        do, dht = ends_of(x, seed)
        got = gradients(x, do, dht)
        for name, t in got.items():
            assert bool(t.isfinite().all()), f"{name} is not finite, seed {seed}"
        wanted = results_in(x, do, dht, reference_chunk_gla, chunk_gla_backward, torch.float64)
        terms = (x.q * wanted["dq"]).abs() + (x.k * wanted["dk"]).abs()
        sizes = {"dg": CANCELLED * terms.square().sum((1, 3)).sqrt()}
        rounded = results_in(x, do, dht, yardstick_chunk_gla, yardstick_chunk_gla_backward, None)
        usual = head_errors(rounded, wanted, sizes)
        assert max(float(error.max()) for error in usual.values()) <= 1e-2
        for name, error in head_errors(got, wanted, sizes).items():
            limit = torch.full_like(error, CEILING[FP32])
            if dtype == BF16:
                theirs = torch.maximum(usual[name], usual[name].median())
                limit = 3 * theirs
                for level in found:
                    of_level = torch.stack((error, theirs))[:, rungs == level]
                    together.setdefault((level, name), []).append(of_level)
            for b, h in (error > limit).nonzero().tolist():
                failures.append(
                    f"{name}: error {error[b, h]:.2e}, budget {limit[b, h]:.2e}, "
                    f"level {rungs[b, h]}, seed {seed}, head {b}, {h}"
                )
    assert not failures, f"{len(failures)}:\n" + "\n".join(failures[:50])
    assert all(count >= 500 for count in found.values()), found
    for (level, name), parts in together.items():
        ours, usually = torch.cat(parts, 1).square().mean(1).sqrt().tolist()
        assert ours <= 1.5 * usually, (level, name, ours, usually)


# --- memory -----------------------------------------------------------------------------------


@EVERY_GATE
@pytest.mark.parametrize("tokens", [1, 33, 700])
def test_every_element_is_written(packed: Packed, gate: str, tokens: int) -> None:
    """PyTorch fills what it allocates with NaN, and with the largest integer."""
    x = packed.draw(2, tokens, 4, 128, 128, gate=gate, initial_state=True, backward=True)
    x = partly_hard(x)
    do, dht = ends_of(x)
    wanted = gradients(x, do, dht)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert bool(torch.empty(9, device=packed.device).isnan().all())
        found = gradients(x, do, dht)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(found, wanted)


@EVERY_GATE
def test_memory(packed: Packed, gate: str) -> None:
    x = packed.draw(16, 2048, 8, 128, 128, gate=gate, backward=True)
    leaves = leaves_of(x)
    do, _ = ends_of(x)
    gradients(tokens_of(x, 0, 64), do[:, :64])  # loads the kernels
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o, _ = call(leaves)
    kept = torch.cuda.memory_allocated() - before - o.nbytes
    grads = torch.autograd.grad(o, list(leaves.values()), do)
    torch.cuda.synchronize()
    results = o.nbytes + sum(grad.nbytes for grad in grads)
    beyond = torch.cuda.max_memory_allocated() - before - results
    assert kept <= 16 * MIB, f"{kept / MIB:.1f} MiB kept for the backward pass"
    # Of a low-rank gate there are the dense one, what its gradient is and what is made of that, 77
    # MiB at the peak; of a dense one the caller has two of them.
    most = 208 if gate == "lowrank" else 128
    assert beyond <= most * MIB, f"{beyond / MIB:.1f} MiB beyond inputs and results at the peak"


def test_large_tensors(packed: Packed) -> None:
    """More than 2^31 elements each: offsets beyond 32 bits."""
    B, T, H, D, end, slope = 1, 2**21 + 35, 16, 64, 64, 24
    packed.draw(1, 64, 1, D, D, backward=True)  # skips where no pack has it
    if torch.cuda.mem_get_info()[0] < 70e9:
        pytest.skip("needs 70 GB of free GPU memory")
    torch.manual_seed(0)

    def new() -> Tensor:
        return torch.empty((B, T, H, D), dtype=BF16, device=packed.device)

    x = Inputs(new().normal_(), new().normal_(), new().normal_(), new().uniform_(-0.1, 0.0))
    do = new().normal_()
    assert x.g is not None
    assert x.q.numel() > 2**31
    # Fast decays, e^-36 in all, cut both ends off, though not from the fast kernel's range. Tokens
    # that have them neither write nor read what the other side would see.
    after, before = slice(end, end + slope), slice(T - end - slope, T - end)
    x.g[:, after] = x.g[:, before] = -1.5
    do[:, after] = x.v[:, before] = 0
    got = gradients(x, do)
    for begin, stop in ((T - end, None), (0, end)):
        found = {name: t[:, begin:stop] for name, t in got.items()}
        reason = why_wrong(tokens_of(x, begin, stop), found, do[:, begin:stop])
        assert not reason, f"from token {begin}: {reason}"
    del got
    torch.cuda.empty_cache()


# --- states -----------------------------------------------------------------------------------


def in_segments(x: Inputs, do: Tensor, dht: Tensor, count: int, *, truncated: bool) -> Tensors:
    """Results and gradients of one sequence, called piece by piece."""
    leaves = leaves_of(x)
    cuts = [round(i * x.q.shape[1] / count) for i in range(count + 1)]
    state: Tensor | None = leaves["initial_state"]
    outputs = []
    for begin, end in pairwise(cuts):
        piece = {
            name: t[:, begin:end] if name in ("q", "k", "v", "g", "x") else t
            for name, t in leaves.items()
        }
        assert state is not None
        carried = state.detach() if truncated and begin else state
        o, state = call({**piece, "initial_state": carried}, output_final_state=True)
        outputs.append(o)
    assert state is not None
    joined = torch.cat(outputs, 1)
    grads = torch.autograd.grad([joined, state], list(leaves.values()), [do, dht])
    names = ["dh0" if name == "initial_state" else f"d{name}" for name in leaves]
    return {"o": joined.detach(), "state": state.detach(), **dict(zip(names, grads, strict=True))}


@EVERY_GATE
def test_four_segments_are_one_sequence(packed: Packed, gate: str) -> None:
    x = packed.draw(2, 1030, 4, 128, 128, gate=gate, initial_state=True, backward=True)
    do, dht = ends_of(x)
    got = in_segments(x, do, dht, 4, truncated=False)
    reason = why_wrong(x, got, do, dht)
    assert not reason, reason


@EVERY_GATE
def test_truncated_segments_are_calls_of_their_own(packed: Packed, gate: str) -> None:
    x = packed.draw(2, 1024, 4, 128, 128, gate=gate, initial_state=True, backward=True)
    do, dht = ends_of(x)
    whole = in_segments(x, do, dht, 4, truncated=False)
    cut = in_segments(x, do, dht, 4, truncated=True)
    assert torch.equal(cut["o"], whole["o"])
    # The last segment cannot tell, the first does not see the later ones.
    assert torch.equal(cut["dq"][:, 768:], whole["dq"][:, 768:])
    assert torch.equal(cut["dk"][:, 768:], whole["dk"][:, 768:])
    assert not torch.equal(cut["dk"][:, :256], whole["dk"][:, :256])
    alone = gradients(tokens_of(x, 0, 256), do[:, :256], torch.zeros_like(dht))
    for name in ("dq", "dk", "dv", "dh0"):
        mine = cut[name] if name == "dh0" else cut[name][:, :256]
        assert torch.equal(mine, alone[name]), name


def test_the_final_state_alone(packed: Packed) -> None:
    x = packed.draw(2, 300, 4, 128, 128, initial_state=True, backward=True)
    do, dht = ends_of(x)
    got = gradients(x, None, dht)
    assert bool((got["dq"] == 0).all())
    reason = why_wrong(x, {n: t for n, t in got.items() if n != "o"}, torch.zeros_like(do), dht)
    assert not reason, reason


def test_earlier_outputs_change_no_later_gradient(packed: Packed) -> None:
    """Causality backwards, bit for bit."""
    x = packed.draw(2, 500, 4, 128, 128, initial_state=True, backward=True)
    for y in (x, partly_hard(x)):
        do, dht = ends_of(y)
        for where in (1, 77, 499):
            other = do.clone()
            other[:, :where] *= -3
            one, two = gradients(y, do, dht), gradients(y, other, dht)
            for name in ("dq", "dk", "dv", "dg"):
                assert torch.equal(one[name][:, where:], two[name][:, where:]), name


# --- calls ------------------------------------------------------------------------------------


def head_first(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def channels_outermost(t: Tensor) -> Tensor:
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


def inside_a_wider_tensor(t: Tensor) -> Tensor:
    return torch.cat((t * torch.nan, t, t * torch.nan), -1)[..., t.shape[-1] : 2 * t.shape[-1]]


def one_element_off(t: Tensor) -> Tensor:
    flat = t.new_full((t.numel() + 1,), math.nan)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


LAYOUTS = [head_first, channels_outermost, inside_a_wider_tensor, one_element_off]


@EVERY_GATE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_bits(
    packed: Packed, layout: Callable[[Tensor], Tensor], gate: str
) -> None:
    x = packed.draw(2, 300, 4, 128, 128, gate=gate, initial_state=True, backward=True)
    do, dht = ends_of(x)
    other = {
        name: layout(t) if t.ndim == 4 or layout is one_element_off else t
        for name, t in vars(x).items()
        if t is not None
    }
    assert_same_bits(gradients(Inputs(**other), layout(do), layout(dht)), gradients(x, do, dht))


def test_the_gradient_of_a_sum(packed: Packed) -> None:
    """It is one number, expanded: strides of 0."""
    x = packed.draw(2, 300, 4, 128, 128, backward=True)
    wanted = gradients(x, torch.ones_like(x.v))
    leaves = leaves_of(x)
    torch.autograd.backward(call(leaves)[0].sum())
    for name, t in leaves.items():
        assert t.grad is not None
        assert torch.equal(t.grad, wanted[f"d{name}"]), name


@EVERY_GATE
def test_one_input_alone(packed: Packed, gate: str) -> None:
    x = packed.draw(2, 300, 4, 128, 128, gate=gate, initial_state=True, backward=True)
    do, dht = ends_of(x)
    wanted = gradients(x, do, dht)
    for name in leaves_of(x):
        found = gradients(x, do, dht, [name])
        assert set(found) - {"o", "state"} == {"dh0" if name == "initial_state" else f"d{name}"}
        assert_same_bits(found, {key: wanted[key] for key in found})


@EVERY_GATE
def test_a_cuda_graph_replays_with_new_inputs(packed: Packed, gate: str) -> None:
    x = packed.draw(2, 500, 4, 128, 128, gate=gate, initial_state=True, backward=True)
    do, dht = ends_of(x)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # autograd's first pass may do what no capture allows
        gradients(x, do, dht)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(x, do, dht)
    other = packed.draw(2, 500, 4, 128, 128, gate=gate, initial_state=True, seed=1)
    for new in (other, partly_hard(other)):
        for name, t in vars(new).items():
            if t is not None:
                getattr(x, name).copy_(t)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, gradients(new, do, dht))


def test_a_call_on_another_stream(packed: Packed) -> None:
    x = packed.draw(1, 500, 4, 128, 128, backward=True)
    do, dht = ends_of(x)
    wanted = gradients(x, do, dht)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = gradients(x, do, dht)
    stream.synchronize()
    assert_same_bits(got, wanted)


def test_calls_from_two_threads(packed: Packed) -> None:
    x = packed.draw(2, 500, 4, 128, 128, backward=True)
    cases = [x, partly_hard(x)]
    do, dht = ends_of(x)
    wanted = [gradients(case, do, dht) for case in cases]
    results: list[list[Tensors]] = [[], []]

    def work(index: int) -> None:
        for _ in range(20):
            results[index].append(gradients(cases[index], do, dht))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for found, right in zip(results, wanted, strict=True):
        assert len(found) == 20
        for got in found:
            assert_same_bits(got, right)


class Layer(torch.nn.Module):
    """A small layer around the operation."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.inner = torch.nn.Linear(width, 4 * width, bias=False)
        self.outer = torch.nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = self.inner(x).unflatten(-1, (4, self.heads, -1)).unbind(2)
        q, k, v, g = parts
        o, _ = chunk_gla(q, k, v, F.logsigmoid(g) / 16)
        out: Tensor = self.outer(F.silu(o.flatten(2)))
        return out


@pytest.mark.slow
def test_a_compiled_module(packed: Packed) -> None:
    pytest.importorskip("triton", reason="torch.compile needs Triton")
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("torch.compile needs a C compiler")
    packed.draw(2, 300, 4, 128, 128, backward=True)  # skips where no pack has it
    torch.manual_seed(0)
    layer = Layer(4, 512).to(packed.device, BF16)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, 300, 512, device=packed.device, dtype=BF16)
    parameters = list(layer.parameters())
    runs = []
    for module in (layer, compiled):
        out = module(x)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), parameters)])
    for eager, traced in zip(*runs, strict=True):
        assert relative_rms(traced, eager) <= 2e-2


def test_the_script_for_the_sanitizer(packed: Packed) -> None:
    packed.rows(Op.BACKWARD)  # skips where there is none
    script = Path(__file__).with_name("sanitize.py")
    command = [sys.executable, str(script), "--limit", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " cases ran, 0 wrong" in done.stdout


@EVERY_GATE
def test_first_backward_of_a_process(packed: Packed, gate: str) -> None:
    """Its kernels are loaded in a thread of autograd, which begins without a CUDA context."""
    packed.draw(1, 1024, 8, 128, 128, gate=gate, backward=True)  # skips where no pack has it
    script = Path(__file__).with_name("cold_start.py")
    command = [sys.executable, str(script), "--backward"]
    if gate == "lowrank":
        command.append("--lowrank")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["provider"] == "pack"
    assert result["finite"]


# --- programs that walk to their segments ------------------------------------------------------


@EVERY_GATE
@pytest.mark.parametrize("tokens", [800, 1024, 1400])
@pytest.mark.parametrize("kind", ["mild", "partly hard"])
def test_few_heads_of_short_sequences(packed: Packed, gate: str, tokens: int, kind: str) -> None:
    """Sizes whose rows, where tuned, have programs that walk to their segments themselves."""
    x = packed.draw(5, tokens, 11, 64, 64, gate=gate, initial_state=True, backward=True)
    x = partly_hard(x) if kind == "partly hard" else x
    do, dht = ends_of(x)
    got = gradients(x, do, dht)
    reason = why_wrong(x, got, do, dht)
    assert not reason, reason
    for _ in range(3):  # the short way from the second call on
        assert_same_bits(got, gradients(x, do, dht))
    leaves = leaves_of(x, ())
    o, _ = call(leaves)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again, _ = call(leaves)
    again.zero_()
    graph.replay()
    assert torch.equal(bits(again), bits(o))
    assert torch.equal(bits(o), bits(got["o"]))
