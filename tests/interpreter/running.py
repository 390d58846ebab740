"""How interpreter tests run a kernel, and what they compare it with."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from glac.attention import _laid_out
from glac.configs import ChunkKernelConfig, ForwardConfig, is_legal
from glac.forward import STEP_MIN, GateInput, run_forward
from glac.gpus import GPUS
from glac.interpret import interpreted_plan
from glac.problem import Problem
from glac.reference import lowrank_gate, recurrent_gla, relative_rms, yardstick_chunk_gla
from glac.templates import stride_unit
from glac.testing import Inputs
from glac.validate import check_lowrank, check_vector

FP32_BUDGET = 1e-5
FP16_FLOOR = 2e-3
"""The yardstick's error may be below this by luck where there are few elements."""

_empty = torch.empty


def nan_filled(*size: Any, **options: Any) -> Tensor:
    """``torch.empty`` whose memory holds NaN, as freed memory may."""
    tensor = _empty(*size, **options)
    return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor


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
) -> ForwardConfig:
    fwd = ChunkKernelConfig(chunk, block_v, 4, 2, tma)
    summary = replace(fwd, chunk=summary_chunk or chunk) if segment else None
    return ForwardConfig(fwd, segment, summary)


def legal(x: Inputs, cfg: ForwardConfig) -> bool:
    return is_legal(problem_of(x).spec, cfg, GPUS["h100"])


def run(
    x: Inputs,
    cfg: ForwardConfig,
    *,
    scale: float | None = None,
    normalizer: float = 16.0,
    clamp_min: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and final state of the kernels, every allocation filled with NaN before."""
    problem = problem_of(x)
    spec = problem.spec
    assert legal(x, cfg)
    if x.g is not None:
        gate = GateInput((_laid_out(x.g, stride_unit(spec.K)),))
    else:
        assert x.x is not None
        clamp = STEP_MIN if clamp_min is None else clamp_min
        gate = GateInput((x.x, x.weight, x.bias), 1.0 / normalizer, clamp)
    with mock.patch.object(torch, "empty", nan_filled):
        o, state = run_forward(
            interpreted_plan(problem, cfg),
            _laid_out(x.q, stride_unit(spec.K)),
            _laid_out(x.k, stride_unit(spec.K)),
            _laid_out(x.v, stride_unit(spec.V)),
            gate,
            spec.K**-0.5 if scale is None else scale,
            x.initial_state,
            True,
        )
    assert state is not None
    return o, state


def dense_gate(x: Inputs, dtype: torch.dtype, **gate: Any) -> Tensor:
    if x.g is not None:
        return x.g.to(dtype)
    assert x.x is not None
    assert x.weight is not None
    bias = None if x.bias is None else x.bias.to(dtype)
    heads = x.q.shape[2]
    return lowrank_gate(x.x.to(dtype), x.weight.to(dtype), bias, num_heads=heads, **gate)


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
    if segment % max(chunk, summary):
        segment = 64
    return config(
        chunk,
        draw(st.sampled_from([16, 32])),
        segment,
        summary_chunk=summary,
        tma=draw(st.booleans()),
    )
