"""Kernels of single rows of packs, whatever dispatch would choose, and what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from glac import backward, dispatch
from glac.configs import BackwardConfig, ChunksBackwardConfig, Config, ForwardConfig
from glac.forward import run_forward
from glac.gate import GateInput
from glac.launch import load_from_pack
from glac.pack import Pack, PackRow
from glac.plan import Plan
from glac.problem import Op, Precision, Problem
from glac.reference import chunk_gla as reference_chunk_gla
from glac.settings import load_settings
from glac.testing import Inputs, hard_gates, problem_inputs
from tests.helpers_gradients import (
    FEW,
    dense_gate,
    gradient_errors,
    rounded_gradients,
    true_gradients,
)

Tensors = dict[str, Tensor]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CEILING = {BF16: 4e-3, FP16: 2e-3, FP32: 1e-5}
GATE_CEILING = {BF16: 5e-3, FP16: 2e-3, FP32: 1e-5}
"""Of the gradients that the gate and its inputs get."""
TF32_CEILING = 3e-3
"""Of fp32 inputs multiplied once. Operands are cut off after 11 bits, which alone is 1e-3 to 2e-3
(the kernels in Triton's interpreter, with such operands)."""
TF32_STEEP = 8e-3
"""Of dx, dweight and dbias then, as the gate's logits are such products too (likewise: 2e-3, and
6e-3 for logits of several hundred)."""
PLAIN = ("o", "state", "dq", "dk", "dv", "dh0")


def in_tf32(problem: Problem) -> Problem:
    """The same problem, its fp32 inputs multiplied once."""
    return replace(problem, spec=replace(problem.spec, precision=Precision.TF32))


def rows_here(op: Op, device: int = 0) -> list[tuple[Pack, PackRow]]:
    """The rows of an op in all packs for a device, each config once."""
    gpu, note = dispatch.device_gpu(device)
    assert gpu is not None, note
    packs, refused = dispatch.installed_packs(load_settings(), gpu.arch)
    assert not refused
    rows = [(pack, row) for pack in packs for row in pack.rows if row.op is op]
    return list({(row.spec, row.config): (pack, row) for pack, row in rows}.values())


def _plan(pack: Pack, row: PackRow, x: Inputs) -> Plan[Any]:
    index = x.q.device.index
    kernels = {name: load_from_pack(pack, kernel, index) for name, kernel in row.kernels.items()}
    batch, tokens, heads, _ = x.q.shape
    return Plan(Problem(row.spec, batch, tokens, heads), row.config, kernels)


def _gate(x: Inputs) -> GateInput:
    return GateInput((x.g,)) if x.g is not None else GateInput((x.x, x.weight, x.bias), 1 / 16)


def backward_chunk(config: Config) -> int:
    """Tokens of a chunk of the kernel that makes gradients."""
    if isinstance(config, ChunksBackwardConfig):
        return config.chunks.chunk
    assert isinstance(config, BackwardConfig)
    return config.grads.chunk


def run_forward_row(pack: Pack, row: PackRow, x: Inputs) -> Tensors:
    """Output and final state."""
    assert isinstance(row.config, ForwardConfig)
    scale = row.spec.K**-0.5
    plan = _plan(pack, row, x)
    o, state = run_forward(plan, x.q, x.k, x.v, _gate(x), scale, x.initial_state, True)
    assert state is not None
    return {"o": o, "state": state}


def run_backward_row(
    pack: Pack, row: PackRow, x: Inputs, do: Tensor, dht: Tensor | None
) -> Tensors:
    """Gradients by name."""
    assert isinstance(row.config, BackwardConfig | ChunksBackwardConfig)
    scale = row.spec.K**-0.5
    dq, dk, dv, gates, dh0 = backward.run_backward(
        _plan(pack, row, x),
        x.q,
        x.k,
        x.v,
        _gate(x),
        scale,
        x.initial_state,
        do,
        dht,
        dh0=True,
    )
    assert dh0 is not None
    names = ("dg",) if x.g is not None else ("dx", "dweight", "dbias")
    found = {"dq": dq, "dk": dk, "dv": dv, **dict(zip(names, gates, strict=True)), "dh0": dh0}
    return {name: t for name, t in found.items() if t is not None}


@contextmanager
def windows_of(chunks: int) -> Iterator[None]:
    """Windows of so many chunks, however little memory they would take together."""

    def windows(problem: Problem, config: BackwardConfig) -> tuple[int, int]:
        length = chunks * config.chunk_step
        return math.ceil(problem.T / length), length

    with mock.patch.object(backward, "windows", windows):
        yield


def row_inputs(
    row: PackRow, B: int, T: int, H: int, device: torch.device, seed: int = 0
) -> Inputs:
    problem = Problem(row.spec, B, T, H)
    return problem_inputs(problem, device=device, seed=seed, initial_state=True)


def hard(x: Inputs, seed: int = 0) -> Inputs:
    assert x.g is not None
    g = hard_gates(x.q.shape, seed=seed, device=x.g.device, dtype=x.g.dtype)
    return replace(x, g=g)


def partly_hard(x: Inputs) -> Inputs:
    """The first sequence stays in the fast kernels' range, the others leave it."""
    if x.g is not None:
        others = hard(x).g
        assert others is not None
        return replace(x, g=torch.cat((x.g[:1], others[1:])))
    assert x.x is not None
    return replace(x, x=torch.cat((x.x[:1], 100 * x.x[1:])))


def ceiling(name: str, x: Inputs, precision: Precision = Precision.IEEE) -> float:
    """The most that a result may be wrong; more where tokens are few and luck decides."""
    limit = (CEILING if name in PLAIN else GATE_CEILING)[x.q.dtype]
    if precision is Precision.TF32:
        limit = TF32_CEILING if name in (*PLAIN, "dg") else TF32_STEEP
    count = x.q.shape[:3].numel()
    return limit * (1 + 4 / math.sqrt(count)) if count < FEW else limit


def why_wrong(
    x: Inputs,
    got: Tensors,
    do: Tensor,
    dht: Tensor | None = None,
    *,
    true: tuple[Tensors, dict[str, float]] | None = None,
    measured: bool = False,
    precision: Precision = Precision.IEEE,
) -> str:
    """What is wrong with results and gradients, empty if nothing is.

    Args:
        x: the problem.
        got: results and gradients by name, or some of them.
        do: gradient of the output.
        dht: gradient of the final state.
        true: what ``true_gradients`` gives for these, if that is known.
        measured: no gradient may be more than twice as wrong as the same arithmetic in PyTorch
            either.
        precision: of the products of fp32 inputs.
    """
    errors: dict[str, float] = {}
    limits = {name: ceiling(name, x, precision) for name in got}
    gradients = {name: t for name, t in got.items() if name not in ("o", "state")}
    if gradients:
        true = true or true_gradients(x, do, dht)
        errors.update(gradient_errors(gradients, *true))
        if measured and x.q.dtype != FP32:
            for name, error in gradient_errors(rounded_gradients(x, do, dht), *true).items():
                if name in limits:
                    limits[name] = min(limits[name], 2 * error)
    if len(gradients) < len(got):
        q, k, v = (t.double() for t in (x.q, x.k, x.v))
        h0 = None if x.initial_state is None else x.initial_state.double()
        gate = dense_gate(x, torch.float64)
        o, state = reference_chunk_gla(q, k, v, gate, initial_state=h0, output_final_state=True)
        assert state is not None
        wanted = {"o": o, "state": state}
        results = {name: got[name] for name in wanted if name in got}
        errors.update(gradient_errors(results, wanted, {}))
    return "; ".join(
        f"{name}: error {error:.2e}, budget {limits[name]:.2e}"
        for name, error in errors.items()
        if not error <= limits[name]
    )
