"""What candidates are called on: inputs of a problem, its truth in fp64, the yardstick's errors.

A case knows its op: it calls a plan and returns the results by name, for the forward pass
``output`` and ``final state``, for the backward pass the gradients ``dq dk dv``, ``dg`` or
``dx dweight dbias``, and ``dh0``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from glac import decode, scalar
from glac.backward import cut, cut_segments, run_backward
from glac.chunks_backward import kept_in_segment
from glac.configs import (
    BackwardConfig,
    ChunksBackwardConfig,
    Config,
    ForwardConfig,
    ScalarBackwardConfig,
    padded_k,
)
from glac.forward import chunk_slots, run_forward
from glac.gate import LOG2E, STEP_MIN, GateInput
from glac.heads import HeadGroups
from glac.plan import Plan
from glac.problem import Gate, Op, Problem
from glac.reference import (
    chunk_gla,
    chunk_gla_backward,
    decode_gla,
    lowrank_gate,
    lowrank_gate_backward,
    yardstick_chunk_gla,
    yardstick_chunk_gla_backward,
    yardstick_scalar_gla,
    yardstick_scalar_gla_backward,
)
from glac.templates import state_dtype
from glac.testing import Inputs, hard_gates, problem_inputs
from glac.validate import TORCH_DTYPES

RAGGED_TOKENS = 173
EVEN_TOKENS = 256
SHORT_TOKENS = 7
_SLICE_ELEMENTS = 1 << 25
_NORMALIZER = 16.0

Index = tuple[slice, ...]
Buffer = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Error:
    """Relative rms error over everything, and of the worst row in units of the mean row."""

    total: float
    row: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.total) and math.isfinite(self.row)


class ErrorSum:
    """Adds up squares part by part on the device; one transfer at the end."""

    def __init__(self, device: torch.device) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self._wrong, self._truth, self._row = zero, zero.clone(), zero.clone()
        self._rows = 0

    def add(self, actual: Tensor, expected: Tensor) -> None:
        truth = expected.double()
        rows = (actual.double() - truth).square().sum(-1)
        self._wrong = self._wrong + rows.sum()
        self._truth = self._truth + truth.square().sum()
        self._row = torch.maximum(self._row, rows.max())  # propagates NaN
        self._rows += rows.numel()

    def result(self) -> Error:
        wrong, truth, row = torch.stack((self._wrong, self._truth, self._row)).tolist()
        if not truth > 0:
            return Error(math.nan, math.nan)
        return Error(math.sqrt(wrong / truth), math.sqrt(row * self._rows / truth))


def error_of(actual: Tensor, expected: Tensor) -> Error:
    """The error of a result, with temporaries of bounded size."""
    total = ErrorSum(expected.device)
    width = expected.shape[-1]
    rows = max(1, _SLICE_ELEMENTS // width)
    flat, truth = actual.reshape(-1, width), expected.reshape(-1, width)
    for start in range(0, len(truth), rows):
        total.add(flat[start : start + rows], truth[start : start + rows])
    return total.result()


def slices(problem: Problem) -> Iterator[tuple[slice, slice]]:
    """Batch and head ranges that bound the temporaries of the reference."""
    per_head = problem.T * max(problem.spec.K, problem.spec.V)
    heads = max(1, min(problem.H, _SLICE_ELEMENTS // per_head))
    batches = max(1, _SLICE_ELEMENTS // (per_head * problem.H)) if heads == problem.H else 1
    for b in range(0, problem.B, batches):
        for h in range(0, problem.H, heads):
            yield slice(b, b + batches), slice(h, min(h + heads, problem.H))


class _Truth:
    """Collects truth (kept in fp32) and the yardstick's errors, slice by slice."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.values: dict[str, Tensor] = {}
        self._errors: dict[str, ErrorSum] = {}

    def add(
        self, name: str, shape: tuple[int, ...], where: Index, expected: Tensor, near: Tensor
    ) -> None:
        if name not in self.values:
            self.values[name] = torch.empty(shape, dtype=torch.float32, device=self._device)
            self._errors[name] = ErrorSum(self._device)
        self.values[name][where] = expected.float()
        self._errors[name].add(near, expected)

    @property
    def yardstick(self) -> dict[str, Error]:
        return {name: error.result() for name, error in self._errors.items()}


@dataclass(frozen=True)
class Case(ABC):
    """An op of one problem.

    Attributes:
        problem: sizes and specialisation.
        inputs: of the forward pass.
        normalizer: of a low-rank gate.
        truth: results in fp64, kept in fp32.
        yardstick: errors of the same-dtype PyTorch form against the truth.
    """

    problem: Problem
    inputs: Inputs
    normalizer: float
    truth: dict[str, Tensor]
    yardstick: dict[str, Error]

    @property
    def gate(self) -> GateInput:
        i = self.inputs
        if i.g is not None:
            return GateInput((i.g,))
        return GateInput((i.x, i.weight, i.bias), 1.0 / self.normalizer)

    @property
    def scale(self) -> float:
        return float(self.problem.spec.K**-0.5)

    @abstractmethod
    def call(self, plan: Plan[Any]) -> dict[str, Tensor]:
        """The results of a plan, those that ``truth`` has."""

    @abstractmethod
    def buffers(self, config: Config) -> list[Buffer]:
        """What a call allocates, as well as that is known."""

    def poison(self, config: Config) -> None:
        """Fill with NaN the memory that the next call's results will most likely get.

        Without it a result that is never written may hold an earlier candidate's right one.
        """
        device = self.inputs.q.device
        held = [
            torch.full(shape, math.nan, dtype=dtype, device=device)
            for shape, dtype in self.buffers(config)
        ]
        del held


class ForwardCase(Case):
    """The forward pass."""

    def call(self, plan: Plan[Any]) -> dict[str, Tensor]:
        i, with_state = self.inputs, "final state" in self.truth
        output, state = run_forward(
            plan, i.q, i.k, i.v, self.gate, self.scale, i.initial_state, with_state
        )
        return {"output": output} if state is None else {"output": output, "final state": state}

    def buffers(self, config: Config) -> list[Buffer]:
        assert isinstance(config, ForwardConfig)
        problem, i = self.problem, self.inputs
        held: list[Buffer] = [(tuple(i.v.shape), i.v.dtype)]
        segments = config.segments(problem.T)
        if segments > 1:
            size = (problem.B * problem.H, segments, problem.spec.K, problem.spec.V)
            held += [(size, torch.float32), (size[:3], torch.float32)]
        if config.prepare is not None:
            chunk, keys = config.prepare.chunk, padded_k(problem.spec)
            lead = (problem.B, problem.H, chunk_slots(problem, chunk))
            tile = TORCH_DTYPES[state_dtype(problem.spec)]
            held += [((*lead, chunk, keys), tile)] * 2
            held += [((*lead, chunk, chunk), tile), ((*lead, keys), torch.float32)]
        return held


@dataclass(frozen=True)
class BackwardCase(Case):
    """The backward pass, from gradients of the output and, maybe, of the final state."""

    do: Tensor
    dht: Tensor | None

    def call(self, plan: Plan[Any]) -> dict[str, Tensor]:
        i = self.inputs
        dq, dk, dv, gates, dh0 = run_backward(
            plan,
            i.q,
            i.k,
            i.v,
            self.gate,
            self.scale,
            i.initial_state,
            self.do,
            self.dht,
            dh0="dh0" in self.truth,
        )
        names = ("dq", "dk", "dv", *_gate_names(i), "dh0")
        named = zip(names, (dq, dk, dv, *gates, dh0), strict=True)
        return {name: value for name, value in named if value is not None}

    def buffers(self, config: Config) -> list[Buffer]:
        if isinstance(config, ChunksBackwardConfig):
            return self._chunk_buffers(config)
        assert isinstance(config, BackwardConfig)
        problem, spec, i = self.problem, self.problem.spec, self.inputs
        grads, heads = config.grads, problem.B * problem.H
        v_tiles = math.ceil(spec.V / grads.block_v)
        in_parts = [i.q, i.k] if i.g is None else [i.q, i.k, i.g]
        held: list[Buffer] = [((v_tiles, *x.shape), x.dtype) for x in in_parts]
        held.append((tuple(i.v.shape), i.v.dtype))
        if i.g is None:
            rows = problem.H * math.ceil(spec.K / grads.block_k)
            size = (v_tiles, problem.B, rows, problem.T, spec.rank)
            held.append((size, torch.float32))
        way = cut(problem, config)
        slots = way.at_once * math.ceil(min(way.length, problem.T) / grads.chunk)
        held.append(((heads, slots, spec.K, spec.V), TORCH_DTYPES[state_dtype(spec)]))
        if way.segments > 1:
            state = (heads, way.segments, spec.K, spec.V)
            held += [(state, torch.float32)] * (1 if way.chained else 2)
        if "dh0" in self.truth:
            held.append((tuple(self.truth["dh0"].shape), torch.float32))
        return held

    def _chunk_buffers(self, config: ChunksBackwardConfig) -> list[Buffer]:
        problem, spec, i = self.problem, self.problem.spec, self.inputs
        segments, tile = cut_segments(problem, config)[0], TORCH_DTYPES[state_dtype(spec)]
        kept = segments * kept_in_segment(problem, config)
        slots = kept * config.chunks.keep
        heads, keys, walked = problem.B * problem.H, padded_k(spec), config.prepare.chunk
        prepared = chunk_slots(problem, walked)
        held: list[Buffer] = [(tuple(x.shape), x.dtype) for x in (i.q, i.k, i.v)]
        held += [((heads, kept, spec.K, spec.V), tile)] * 2
        held += [((heads, prepared, walked, keys), tile)] * 2
        held.append(((heads, prepared, walked, walked), tile))
        if i.g is None:
            tiles = math.ceil(spec.K / config.chunks.block_k)
            held.append(((heads * tiles, problem.T, spec.rank), torch.float32))
            held.append(((heads, slots, spec.K, spec.rank), torch.float32))
        else:
            held.append((tuple(i.g.shape), i.g.dtype))
        if segments > 1:
            held += [((heads, segments, spec.K, spec.V), torch.float32)] * 2
        if "dh0" in self.truth:
            held.append((tuple(self.truth["dh0"].shape), torch.float32))
        return held


class ScalarForwardCase(Case):
    """The forward pass with a scalar gate."""

    @property
    def tensors(self) -> scalar.ScalarInputs:
        i = self.inputs
        return scalar.ScalarInputs(i.q, i.k, i.v, i.g, i.initial_state)

    def call(self, plan: Plan[Any]) -> dict[str, Tensor]:
        with_state = "final state" in self.truth
        o, end = scalar.run_forward(plan, HeadGroups(), self.tensors, self.scale, with_state)
        return {"output": o} if end is None else {"output": o, "final state": end}

    def buffers(self, config: Config) -> list[Buffer]:
        return [(tuple(t.shape), self.inputs.q.dtype) for t in self.truth.values()]


@dataclass(frozen=True)
class ScalarBackwardCase(ScalarForwardCase):
    """The backward pass with a scalar gate."""

    do: Tensor
    dht: Tensor | None

    def call(self, plan: Plan[Any]) -> dict[str, Tensor]:
        grads = scalar.run_backward(
            plan,
            HeadGroups(),
            self.tensors,
            self.scale,
            self.do,
            self.dht,
            want_dg=True,
            want_dh0="dh0" in self.truth,
        )
        named = zip(("dq", "dk", "dv", "dg", "dh0"), grads, strict=True)
        return {name: value for name, value in named if value is not None}

    def buffers(self, config: Config) -> list[Buffer]:
        assert isinstance(config, ScalarBackwardConfig)
        p, spec, dtype = self.problem, self.problem.spec, self.inputs.q.dtype
        slots = math.ceil(p.T / config.chunk)
        kept = ((p.B, p.H, slots, spec.K, spec.V), TORCH_DTYPES[state_dtype(spec)])
        held: list[Buffer] = [kept, kept]
        if config.grads is not None:
            held = [kept, ((config.grads.tiles(spec), p.B, p.T, p.H), torch.float32)]
        for name, value in self.truth.items():
            held.append((tuple(value.shape), torch.float32 if name in ("dg", "dh0") else dtype))
        return held


@dataclass(frozen=True)
class DecodeCase(Case):
    """A few tokens against states into new states, once in fp32 and once in bf16.

    One config serves both, and what is fastest for one may not be for the other.

    Attributes:
        states: the initial states of each call.
    """

    states: tuple[Tensor, ...]

    def call(self, plan: Plan[Any]) -> dict[str, Tensor]:
        i = self.inputs
        gate = decode.Gated(i.g, i.x, i.weight, i.bias)
        numbers: tuple[float, ...] = (self.scale,)
        if i.x is not None:
            numbers = (self.scale, 1.0 / self.normalizer, STEP_MIN * LOG2E)
        found: dict[str, Tensor] = {}
        for state in self.states:
            tensors = decode.DecodeInputs(i.q, i.k, i.v, gate, state)
            want = decode.Want(final=True, dtype=state.dtype)
            run = decode.launch(plan, HeadGroups(), tensors, want)
            o, end = decode.run_launch(run, tensors, want, numbers)
            assert end is not None
            names = _decode_names(state)
            found.update(zip(names, (o, end), strict=True))
        return found

    def buffers(self, config: Config) -> list[Buffer]:
        dtypes = (d for state in self.states for d in (self.inputs.q.dtype, state.dtype))
        shapes = (tuple(t.shape) for t in self.truth.values())
        return list(zip(shapes, dtypes, strict=True))


def _decode_names(state: Tensor) -> tuple[str, str]:
    """Of the results of a call from ``state``."""
    kind = "" if state.dtype is torch.float32 else ", bf16 states"
    return f"output{kind}", f"final state{kind}"


def _gate_names(inputs: Inputs) -> tuple[str, ...]:
    return ("dg",) if inputs.g is not None else ("dx", "dweight", "dbias")


def _gate_slice(
    inputs: Inputs, K: int, batch: slice, heads: slice, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The gate's part of a slice: ``(g,)`` or ``(x, weight, bias)``."""
    if inputs.g is not None:
        return (inputs.g[batch, :, heads].to(dtype),)
    assert inputs.x is not None
    assert inputs.weight is not None
    assert inputs.bias is not None
    rows = slice(heads.start * K, heads.stop * K)
    return tuple(x.to(dtype) for x in (inputs.x[batch], inputs.weight[rows], inputs.bias[rows]))


def _gate_values(gate: tuple[Tensor, ...], heads: int, normalizer: float) -> Tensor:
    if len(gate) == 1:
        return gate[0]
    return lowrank_gate(*gate, num_heads=heads, normalizer=normalizer)


def _forward_case(
    problem: Problem, inputs: Inputs, normalizer: float, with_state: bool
) -> ForwardCase:
    spec = problem.spec
    truth = _Truth(inputs.q.device)
    for b, h in slices(problem):
        q, k, v = (x[b, :, h] for x in (inputs.q, inputs.k, inputs.v))
        h0 = None if inputs.initial_state is None else inputs.initial_state[b, h]
        parts = _gate_slice(inputs, spec.K, b, h, torch.float64)
        gate = _gate_values(parts, h.stop - h.start, normalizer)
        o, end = chunk_gla(
            q.double(), k.double(), v.double(), gate, initial_state=h0, output_final_state=True
        )
        near, near_end = yardstick_chunk_gla(
            q, k, v, gate.float(), initial_state=h0, output_final_state=True
        )
        truth.add("output", tuple(inputs.v.shape), (b, slice(None), h), o, near)
        if with_state:
            assert end is not None
            assert near_end is not None
            size = (problem.B, problem.H, spec.K, spec.V)
            truth.add("final state", size, (b, h), end, near_end)
    return ForwardCase(problem, inputs, normalizer, truth.values, truth.yardstick)


class _GateSums:
    """Gradients of a low-rank gate's inputs: sums over slices, whose errors come at the end."""

    def __init__(self, problem: Problem, inputs: Inputs, normalizer: float) -> None:
        self._problem, self._inputs, self._normalizer = problem, inputs, normalizer
        whole = self._slice(slice(None), slice(0, problem.H), torch.float64)
        self._exact = [torch.zeros_like(x) for x in whole]
        self._near = [x.float() for x in self._exact]

    def _slice(self, batch: slice, heads: slice, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return _gate_slice(self._inputs, self._problem.spec.K, batch, heads, dtype)

    def add(self, batch: slice, heads: slice, exact: Tensor, near: Tensor) -> None:
        """Take the gradient of a slice's gate through the gate.

        The yardstick's is rounded to the inputs' dtype on its way, as PyTorch would do.
        """
        K = self._problem.spec.K
        rows = slice(heads.start * K, heads.stop * K)
        rounded = near.to(self._inputs.q.dtype)
        for sums, dg, dtype in (
            (self._exact, exact, torch.float64),
            (self._near, rounded, torch.float32),
        ):
            x, weight, bias = self._slice(batch, heads, dtype)
            parts = lowrank_gate_backward(
                x, weight, bias, dg.to(dtype), normalizer=self._normalizer
            )
            for total, region, part in zip(sums, (batch, rows, rows), parts, strict=True):
                assert part is not None
                total[region] += part

    def finish(self, truth: _Truth) -> None:
        """Put the sums beside the other gradients."""
        i = self._inputs
        sources = (i.x, i.weight, i.bias)
        for name, exact, near, source in zip(
            _gate_names(i), self._exact, self._near, sources, strict=True
        ):
            assert source is not None
            truth.add(name, tuple(exact.shape), (slice(None),), exact, near.to(source.dtype))


def _backward_case(
    problem: Problem, inputs: Inputs, normalizer: float, with_state: bool, seed: int
) -> BackwardCase:
    spec, device = problem.spec, inputs.q.device
    generator = torch.Generator(device=device).manual_seed(seed)
    do = torch.randn(inputs.v.shape, generator=generator, device=device).to(inputs.v.dtype)
    size = (problem.B, problem.H, spec.K, spec.V)
    dht = torch.randn(size, generator=generator, device=device) if with_state else None
    truth = _Truth(device)
    sums = _GateSums(problem, inputs, normalizer) if spec.gate is Gate.LOWRANK else None
    for b, h in slices(problem):
        where: Index = (b, slice(None), h)
        q, k, v, dout = (x[where] for x in (inputs.q, inputs.k, inputs.v, do))
        h0 = None if inputs.initial_state is None else inputs.initial_state[b, h]
        dend = None if dht is None else dht[b, h]
        parts = _gate_slice(inputs, spec.K, b, h, torch.float64)
        gate = _gate_values(parts, h.stop - h.start, normalizer)
        exact = chunk_gla_backward(
            q.double(), k.double(), v.double(), gate, dout.double(), initial_state=h0, dht=dend
        )
        stored = gate.float() if inputs.g is None else inputs.g[where]
        near = yardstick_chunk_gla_backward(q, k, v, stored, dout, initial_state=h0, dht=dend)
        for name in ("dq", "dk", "dv") if sums else ("dq", "dk", "dv", "dg"):
            expected = getattr(exact, name)
            shape = (problem.B, problem.T, problem.H, expected.shape[-1])
            truth.add(name, shape, where, expected, getattr(near, name))
        if sums:
            sums.add(b, h, exact.dg, near.dg)
        if h0 is not None:
            assert exact.dh0 is not None
            assert near.dh0 is not None
            truth.add("dh0", size, (b, h), exact.dh0, near.dh0)
    if sums:
        sums.finish(truth)
    return BackwardCase(problem, inputs, normalizer, truth.values, truth.yardstick, do=do, dht=dht)


def _scalar_case(
    problem: Problem, inputs: Inputs, normalizer: float, with_state: bool
) -> ScalarForwardCase:
    truth = _Truth(inputs.q.device)
    assert inputs.g is not None
    for b, h in slices(problem):
        q, k, v, g = (x[b, :, h] for x in (inputs.q, inputs.k, inputs.v, inputs.g))
        h0 = None if inputs.initial_state is None else inputs.initial_state[b, h]
        o, end = chunk_gla(
            q.double(),
            k.double(),
            v.double(),
            g.double()[..., None].expand(q.shape),
            initial_state=h0,
            output_final_state=True,
        )
        near, near_end = yardstick_scalar_gla(
            q, k, v, g, initial_state=h0, output_final_state=True
        )
        truth.add("output", tuple(inputs.v.shape), (b, slice(None), h), o, near)
        if with_state:
            assert end is not None
            assert near_end is not None
            size = (problem.B, problem.H, problem.spec.K, problem.spec.V)
            truth.add("final state", size, (b, h), end, near_end)
    return ScalarForwardCase(problem, inputs, normalizer, truth.values, truth.yardstick)


def _scalar_backward_case(
    problem: Problem, inputs: Inputs, normalizer: float, with_state: bool, seed: int
) -> ScalarBackwardCase:
    spec, device = problem.spec, inputs.q.device
    generator = torch.Generator(device=device).manual_seed(seed)
    do = torch.randn(inputs.v.shape, generator=generator, device=device).to(inputs.v.dtype)
    size = (problem.B, problem.H, spec.K, spec.V)
    dht = torch.randn(size, generator=generator, device=device) if with_state else None
    truth = _Truth(device)
    assert inputs.g is not None
    for b, h in slices(problem):
        where: Index = (b, slice(None), h)
        q, k, v, g, dout = (x[where] for x in (inputs.q, inputs.k, inputs.v, inputs.g, do))
        h0 = None if inputs.initial_state is None else inputs.initial_state[b, h]
        dend = None if dht is None else dht[b, h]
        exact = chunk_gla_backward(
            q.double(),
            k.double(),
            v.double(),
            g.double()[..., None].expand(q.shape),
            dout.double(),
            initial_state=h0,
            dht=dend,
        )
        near = yardstick_scalar_gla_backward(q, k, v, g, dout, initial_state=h0, dht=dend)
        for name in ("dq", "dk", "dv"):
            expected = getattr(exact, name)
            shape = (problem.B, problem.T, problem.H, expected.shape[-1])
            truth.add(name, shape, where, expected, getattr(near, name))
        truth.add("dg", tuple(inputs.g.shape), where, exact.dg.sum(-1), near.dg)
        if h0 is not None:
            assert exact.dh0 is not None
            assert near.dh0 is not None
            truth.add("dh0", size, (b, h), exact.dh0, near.dh0)
    return ScalarBackwardCase(
        problem, inputs, normalizer, truth.values, truth.yardstick, do=do, dht=dht
    )


def _decode_case(problem: Problem, inputs: Inputs, normalizer: float) -> DecodeCase:
    """Against fp64; the yardstick is the same loop in fp32, which is what the kernel computes."""
    spec, i = problem.spec, inputs
    truth = _Truth(i.q.device)
    everything = slice(None)
    if spec.gate.is_scalar:
        assert i.g is not None
        gate = i.g.double()[..., None]
    else:
        parts = _gate_slice(i, spec.K, everything, slice(0, problem.H), torch.float64)
        gate = _gate_values(parts, problem.H, normalizer)
    assert i.initial_state is not None
    states = (i.initial_state, i.initial_state.bfloat16())
    for state in states:
        h0 = state.float()
        o, end = decode_gla(i.q.double(), i.k.double(), i.v.double(), gate, initial_state=h0)
        near, near_end = decode_gla(i.q, i.k, i.v, gate.float(), initial_state=h0)
        output, final = _decode_names(state)
        truth.add(output, tuple(o.shape), (everything,), o, near)
        truth.add(final, tuple(end.shape), (everything,), end, near_end.to(state.dtype))
    return DecodeCase(problem, inputs, normalizer, truth.values, truth.yardstick, states)


def _make(
    op: Op, problem: Problem, inputs: Inputs, normalizer: float, with_state: bool, seed: int
) -> Case:
    if op is Op.FORWARD:
        return _forward_case(problem, inputs, normalizer, with_state)
    if op is Op.BACKWARD:
        return _backward_case(problem, inputs, normalizer, with_state, seed)
    if op is Op.SCALAR_FORWARD:
        return _scalar_case(problem, inputs, normalizer, with_state)
    if op is Op.SCALAR_BACKWARD:
        return _scalar_backward_case(problem, inputs, normalizer, with_state, seed)
    return _decode_case(problem, inputs, normalizer)


def tuned_case(op: Op, problem: Problem, device: torch.device, seed: int) -> Case:
    """The tuned shape itself, without states."""
    inputs = problem_inputs(problem, device=device, seed=seed, initial_state=op is Op.DECODE)
    return _make(op, problem, inputs, _NORMALIZER, False, seed + 3)


def small_cases(
    op: Op, problem: Problem, tokens: int, device: torch.device, seed: int
) -> dict[str, Case]:
    """Mild and hard gates on a few heads of ``tokens`` tokens, with initial and final state."""
    spec = problem.spec
    small = Problem(spec, B=2, T=tokens, H=3)
    mild = problem_inputs(small, device=device, seed=seed + 1, initial_state=True)
    normalizer = _NORMALIZER
    if spec.gate is not Gate.LOWRANK:
        gates = hard_gates(
            (2, tokens, 3, 1 if spec.gate.is_scalar else spec.K),
            seed=seed + 2,
            device=device,
            dtype=TORCH_DTYPES[spec.gate_dtype],
        )
        gates = gates[..., 0] if spec.gate.is_scalar else gates
        hard = replace(mild, g=gates)
    else:
        # Steep logits without a normalizer: gates from none to e^-50 and beyond.
        assert mild.weight is not None
        hard, normalizer = replace(mild, weight=mild.weight * 16), 1.0
    return {
        "mild gates": _make(op, small, mild, _NORMALIZER, True, seed + 3),
        "hard gates": _make(op, small, hard, normalizer, True, seed + 3),
    }


def neighbour_cases(op: Op, problem: Problem, device: torch.device, seed: int) -> dict[str, Case]:
    """Other batches, heads and lengths: whole chunks, and less than any chunk."""
    found = {}
    for name, B, tokens, H in (("even", 3, EVEN_TOKENS, 1), ("short", 1, SHORT_TOKENS, 5)):
        shape = Problem(problem.spec, B=B, T=tokens, H=H)
        inputs = problem_inputs(shape, device=device, seed=seed + 4, initial_state=True)
        found[name] = _make(op, shape, inputs, _NORMALIZER, True, seed + 3)
    return found
