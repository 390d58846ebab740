"""How interpreter tests run a kernel, and what they compare it with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from glac import backward
from glac.backward import run_backward
from glac.configs import (
    BackwardConfig,
    ChunkKernelConfig,
    ChunksBackwardConfig,
    Config,
    ForwardConfig,
    PrepareKernelConfig,
    TileKernelConfig,
    is_legal,
    padded_k,
    padded_v,
)
from glac.forward import run_forward
from glac.gate import STEP_MIN, GateInput
from glac.gpus import GPUS
from glac.interpret import interpreted_plan
from glac.layouts import laid_out
from glac.plan import Kernel
from glac.problem import Problem
from glac.reference import recurrent_gla, relative_rms, yardstick_chunk_gla
from glac.templates import stride_unit
from glac.testing import Inputs
from glac.validate import check_lowrank, check_vector
from tests.helpers_gradients import (
    dense_gate,
    ends_of,
    gradient_errors,
    rounded_gradients,
    true_gradients,
)

FP32_BUDGET = 1e-5
FP16_FLOOR = 2e-3
"""The yardstick's error may be below this by luck where there are few elements."""
FP32_GRADIENT_BUDGET = 5e-6
"""Measured: 1.4e-6 at most, where a low-rank gate decays fast, and otherwise 4e-7."""
FP16_GRADIENT_FLOOR = 1e-3

GUARD = 4096  # elements
_empty = torch.empty


def nan_filled(*size: Any, **options: Any) -> Tensor:
    """``torch.empty`` whose memory holds NaN, or sevens, as freed memory may."""
    tensor = _empty(*size, **options)
    return tensor.fill_(math.nan if tensor.is_floating_point() else 7)


@contextmanager
def guarded() -> Iterator[None]:
    """``torch.empty`` as ``nan_filled``, between guards that nothing may write to."""
    blocks: list[tuple[Tensor, int]] = []

    def empty(*size: Any, **options: Any) -> Tensor:
        shape = _empty(*size, device="meta").shape
        count = shape.numel()
        block = nan_filled(count + 2 * GUARD, **options)
        blocks.append((block, count))
        return block[GUARD : GUARD + count].view(shape)

    with mock.patch.object(torch, "empty", empty):
        yield
    for block, count in blocks:
        guards = torch.cat((block[:GUARD], block[GUARD + count :]))
        untouched = guards.isnan() if block.is_floating_point() else guards == 7
        assert bool(untouched.all()), "something was written outside its memory"


def problem_of(x: Inputs) -> Problem:
    if x.g is not None:
        return check_vector(x.q, x.k, x.v, x.g, x.initial_state)
    assert x.x is not None
    assert x.weight is not None
    return check_lowrank(x.q, x.k, x.v, x.x, x.weight, x.bias, x.initial_state)


def config(
    chunk: int = 16,
    block_v: int = 16,
    segment: int = 0,
    *,
    summary_chunk: int = 0,
    tma: bool = False,
    prepare: int = 0,
    lead: int = 0,
    stops: bool = False,
    product_ends: bool = False,
) -> ForwardConfig:
    """``prepare``: key channels at a time of ``gla_prepare``; 0: ``gla_fwd`` does its work.

    With ``lead`` programs walk to their segments, so many tokens at a time.
    """
    fwd = ChunkKernelConfig(chunk, block_v, 4, 2, tma, lead)
    if lead:
        return ForwardConfig(fwd, segment)
    if prepare:
        summary_chunk = chunk
    summary = None
    if segment:
        summary = replace(fwd, chunk=summary_chunk or chunk, stops=stops)
    if product_ends:
        fwd = replace(fwd, product_ends=True)
    before = PrepareKernelConfig(chunk, prepare, 4, 2) if prepare else None
    return ForwardConfig(fwd, segment, summary, before)


def legal(x: Inputs, cfg: Config) -> bool:
    return is_legal(problem_of(x).spec, cfg, GPUS["h100"])


def gate_input(x: Inputs, normalizer: float = 16.0, clamp_min: float | None = None) -> GateInput:
    if x.g is not None:
        return GateInput((laid_out(x.g, stride_unit(x.g.shape[-1])),))
    assert x.x is not None
    clamp = STEP_MIN if clamp_min is None else clamp_min
    return GateInput((x.x, x.weight, x.bias), 1.0 / normalizer, clamp)


def run(
    x: Inputs,
    cfg: ForwardConfig,
    *,
    scale: float | None = None,
    normalizer: float = 16.0,
    clamp_min: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and final state of the kernels, in memory that held NaN."""
    problem = problem_of(x)
    spec = problem.spec
    assert legal(x, cfg)
    gate = gate_input(x, normalizer, clamp_min)
    with guarded():
        o, state = run_forward(
            interpreted_plan(problem, cfg),
            laid_out(x.q, stride_unit(spec.K)),
            laid_out(x.k, stride_unit(spec.K)),
            laid_out(x.v, stride_unit(spec.V)),
            gate,
            spec.K**-0.5 if scale is None else scale,
            x.initial_state,
            True,
        )
    assert state is not None
    return o, state


def truth(x: Inputs, *, scale: float | None = None, **gate: Any) -> tuple[Tensor, Tensor]:
    """Output and final state of the token loop in fp64."""
    h0 = None if x.initial_state is None else x.initial_state.double()
    q, k, v, g = x.q.double(), x.k.double(), x.v.double(), dense_gate(x, torch.float64, **gate)
    o, state = recurrent_gla(q, k, v, g, scale=scale, initial_state=h0, output_final_state=True)
    assert state is not None
    return o, state


def magnitude(x: Inputs, *, scale: float | None = None, **gate: Any) -> tuple[Tensor, Tensor]:
    """What output and state would be if nothing cancelled."""
    h0 = None if x.initial_state is None else x.initial_state.abs()
    g = dense_gate(x, torch.float64, **gate)
    y = replace(x, q=x.q.abs(), k=x.k.abs(), v=x.v.abs(), g=g, initial_state=h0)
    return truth(y, scale=None if scale is None else abs(scale))


def assert_right(
    x: Inputs, cfg: ForwardConfig, *, fp32_budget: float = FP32_BUDGET, **options: Any
) -> None:
    """Kernel output and state are the token loop's, within the budget of the input dtype.

    A few elements may all nearly cancel, so an error counts against at least the size that sums of
    so many terms have on average.
    """
    gate = {key: options[key] for key in ("normalizer", "clamp_min") if key in options}
    budget = fp32_budget
    wanted = truth(x, **options)
    if x.q.dtype == torch.float16:
        measure, _ = yardstick_chunk_gla(
            x.q,
            x.k,
            x.v,
            dense_gate(x, torch.float32, **gate),
            scale=options.get("scale"),
            initial_state=x.initial_state,
        )
        budget = max(2 * relative_rms(measure, wanted[0]), FP16_FLOOR)
    got = run(x, cfg, **options)
    sizes = magnitude(x, scale=options.get("scale"), **gate)
    _, tokens, _, keys = x.q.shape
    terms = (keys * (tokens + 1), tokens + 1)
    for name, a, w, size, n in zip(("o", "state"), got, wanted, sizes, terms, strict=True):
        assert bool(a.isfinite().all()), f"{name} is not finite"
        size_norm = max(float(w.norm()), float(size.norm()) / math.sqrt(n))
        error = float((a.double() - w).norm()) / size_norm if size_norm else float(a.norm())
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


@st.composite
def configs(draw: st.DrawFn) -> ForwardConfig:
    """Configs of every chunk, segment and copy mode, not all legal for every problem."""
    chunk, summary = draw(st.sampled_from([16, 32])), draw(st.sampled_from([16, 32]))
    segment = draw(st.sampled_from([0, 16, 32, 64]))
    if lead := draw(st.sampled_from([0, 0, 16, 32])):
        length = draw(st.sampled_from([32, 64, 96]))
        tile = draw(st.sampled_from([16, 32]))
        return config(chunk, tile, length, tma=draw(st.booleans()), lead=lead)
    if segment % max(chunk, summary):
        segment = 64
    prepare = draw(st.sampled_from([0, 16, 32]))
    return config(
        chunk,
        draw(st.sampled_from([16, 32])),
        segment,
        summary_chunk=summary,
        tma=draw(st.booleans()),
        prepare=prepare,
        stops=draw(st.booleans()),
        product_ends=not prepare and draw(st.booleans()),
    )


# --- backward ---------------------------------------------------------------------------------


def backward_config(
    chunk: int = 16,
    block_k: int = 16,
    block_v: int = 16,
    *,
    states_chunk: int = 0,
    dv_chunk: int = 0,
    tma: bool = False,
    keep: int = 1,
    lead: int = 0,
    segment: int = 0,
    stops: bool = False,
) -> BackwardConfig:
    """``dv_chunk`` is that of ``gla_bwd_dv``; 0: ``gla_bwd`` makes dv itself.

    With ``lead`` programs walk to their segments, so many tokens at a time.
    """
    states = None
    if not lead:
        states = ChunkKernelConfig(states_chunk or chunk, 16, 4, 2, tma, stops=stops)
    return BackwardConfig(
        states,
        TileKernelConfig(chunk, block_k, block_v, 4, 2, tma, not dv_chunk, keep, lead),
        ChunkKernelConfig(dv_chunk, block_v, 4, 2, tma) if dv_chunk else None,
        segment,
    )


@st.composite
def backward_configs(draw: st.DrawFn) -> BackwardConfig:
    """Configs of every chunk, tile and copy mode, for ``fitted``."""
    chunk, lead = draw(st.sampled_from([16, 32])), draw(st.sampled_from([0, 0, 16, 32]))
    if lead:
        return backward_config(
            chunk,
            draw(st.sampled_from([16, 32])),
            draw(st.sampled_from([16, 32])),
            dv_chunk=draw(st.sampled_from([0, 16, 32])),
            tma=draw(st.booleans()),
            lead=lead,
            segment=draw(st.sampled_from([32, 64, 96])),
        )
    return backward_config(
        chunk,
        draw(st.sampled_from([16, 32])),
        draw(st.sampled_from([16, 32])),
        states_chunk=draw(st.sampled_from([16, chunk])),
        dv_chunk=draw(st.sampled_from([0, 16, 32])),
        tma=draw(st.booleans()),
        keep=draw(st.sampled_from([1, 2, 4])),
    )


def fitted(x: Inputs, cfg: BackwardConfig) -> BackwardConfig:
    """The legal config nearest to one that may not be, for this problem."""
    spec = problem_of(x).spec
    rows = (spec.K * spec.dtype.itemsize, spec.V * spec.dtype.itemsize)
    aligned = all(size % 16 == 0 for size in (*rows, spec.K * spec.gate_dtype.itemsize))
    block_k = min(cfg.grads.block_k, padded_k(spec))
    dv_chunk = cfg.dv.chunk if cfg.dv else 0
    return backward_config(
        cfg.grads.chunk,
        block_k,
        min(cfg.grads.block_v, padded_v(spec)),
        states_chunk=cfg.states.chunk if cfg.states else 0,
        dv_chunk=dv_chunk or (16 if block_k < padded_k(spec) else 0),
        tma=cfg.grads.tma and aligned,
        keep=cfg.grads.keep,
        lead=cfg.grads.lead,
        segment=cfg.segment,
    )


def chunks_config(
    chunk: int = 32,
    block_k: int = 16,
    block_v: int = 16,
    *,
    walked: int = 16,
    walk_v: int = 16,
    tma: bool = False,
    keep: int = 1,
    segment: int = 0,
) -> ChunksBackwardConfig:
    """``walked`` tokens are a chunk of the walks, ``walk_v`` values a tile of theirs."""
    return ChunksBackwardConfig(
        PrepareKernelConfig(walked, 16, 4, 2),
        ChunkKernelConfig(walked, walk_v, 4, 2, tma),
        TileKernelConfig(chunk, block_k, block_v, 4, 2, keep=keep),
        ChunkKernelConfig(16, 16, 4, 2, tma),
        segment,
    )


@dataclass(frozen=True)
class _Watched:
    """A kernel that keeps a copy of the flags each of its launches leaves."""

    kernel: Kernel
    flags: list[Tensor]

    def run(self, tensors: Sequence[Tensor | None], scalars: Sequence[Any], grid: int) -> None:
        self.kernel.run(tensors, scalars, grid)
        assert tensors[-1] is not None
        self.flags.append(tensors[-1].clone())


@dataclass(frozen=True)
class Backward:
    """What a backward pass gave.

    Attributes:
        grads: by name; dg, or dx, dweight and dbias.
        flags: of each window's programs, 1 where they left the fast kernel's range; windows from
            the last to the first.
    """

    grads: dict[str, Tensor]
    flags: list[Tensor]

    @property
    def redone(self) -> int:
        """Programs that the exact kernel did again."""
        return sum(int(flags.sum()) for flags in self.flags)


def windows_of(chunks: int) -> AbstractContextManager[object]:
    """Windows of so many chunks, however little memory they would take together."""

    def windows(problem: Problem, config: BackwardConfig) -> tuple[int, int]:
        length = chunks * config.chunk_step
        return math.ceil(problem.T / length), length

    return mock.patch.object(backward, "windows", windows)


def run_gradients(
    x: Inputs,
    cfg: BackwardConfig | ChunksBackwardConfig,
    do: Tensor,
    dht: Tensor | None = None,
    *,
    dh0: bool = True,
    scale: float | None = None,
    normalizer: float = 16.0,
    clamp_min: float | None = None,
) -> Backward:
    """Gradients by the kernels, in memory that held NaN."""
    problem = problem_of(x)
    spec = problem.spec
    assert legal(x, cfg)
    plan = interpreted_plan(problem, cfg)
    flags: list[Tensor] = []
    kernels = {**plan.kernels, cfg.main: _Watched(plan.kernels[cfg.main], flags)}
    with guarded():
        dq, dk, dv, gates, dstate = run_backward(
            replace(plan, kernels=kernels),
            laid_out(x.q, stride_unit(spec.K)),
            laid_out(x.k, stride_unit(spec.K)),
            laid_out(x.v, stride_unit(spec.V)),
            gate_input(x, normalizer, clamp_min),
            spec.K**-0.5 if scale is None else scale,
            x.initial_state,
            laid_out(do, stride_unit(spec.V)),
            dht,
            dh0=dh0,
        )
    names = ("dg",) if x.g is not None else ("dx", "dweight", "dbias")
    named = {"dq": dq, "dk": dk, "dv": dv, **dict(zip(names, gates, strict=True)), "dh0": dstate}
    assert (dstate is not None) == dh0
    assert all(bool(((f == 0) | (f == 1)).all()) for f in flags)
    return Backward({name: t for name, t in named.items() if t is not None}, flags)


def assert_gradients_right(
    x: Inputs,
    cfg: BackwardConfig | ChunksBackwardConfig,
    *,
    seed: int = 0,
    end: bool = True,
    dh0: bool = True,
    **options: Any,
) -> Backward:
    """Gradients by the kernels are those in fp64, within the budget of the input dtype."""
    do, dht = ends_of(x, seed)
    some = dht if end else None
    found = run_gradients(x, cfg, do, some, dh0=dh0, **options)
    true = true_gradients(x, do, some, **options)
    budgets = dict.fromkeys(found.grads, FP32_GRADIENT_BUDGET)
    if x.q.dtype == torch.float16:
        rounded = rounded_gradients(x, do, some, **options)
        for name, error in gradient_errors(rounded, *true).items():
            budgets[name] = max(2 * error, FP16_GRADIENT_FLOOR)
    for name, error in gradient_errors(found.grads, *true).items():
        assert error <= budgets[name], f"{name}: error {error:.2e}, budget {budgets[name]:.2e}"
    return found
