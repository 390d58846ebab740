"""Side-by-side times of GLA implementations on one GPU: ``glac bench``.

Every implementation is called through its public function. ``op`` is ``forward``, with autograd
off, or ``training``: a forward pass on inputs that require gradients, then ``torch.autograd.grad``
with respect to all of them. ``decode`` is ``recurrent_gla`` from fp32 states to new ones. What a
row's numbers mean:

    us          median device time of one call, replayed as a CUDA graph where it can be captured
    eager_us    median wall time of one call as a user makes it, from the call to the last result
    floor_us    bytes the problem must move / copy bandwidth measured in the same run
    errors      relative rms of o, or of each gradient, against fp64, batch element 0
    error       the worst of them
    scratch_mb  memory at its peak during one call beyond inputs and results, in 10^6 bytes
    saved_mb    what is held from the forward to the backward pass beyond inputs and output

256 MB are written before each timed call, so inputs come from memory and not from the L2 cache;
that write is not timed. Results are one JSON object per file, rewritten after each row: a run that
dies keeps what it measured. A rival that fails or is missing becomes a row without a time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from glac import __version__
from glac.errors import ConfigError, GlacError, MissingEnvironmentError
from glac.gpus import match_gpu
from glac.problem import DType, Gate, Op, Problem
from glac.suites import SHAPES, SUITES, Shape, make_problem
from glac.validate import TORCH_DTYPES

Step = Callable[[], Mapping[str, Tensor]]
"""One call of an implementation, returning its results by name."""

SCHEMA = 2
OPS = ("forward", "training")
"""What a run times unless told otherwise."""
ALL_OPS = (*OPS, "decode")
"""What can be timed."""
DECODE_SHAPES: tuple[Shape, ...] = ((32, 1, 16, 128, 128), (32, 1, 16, 64, 64))
"""What ``decode`` times where no shape is given."""


def passes(op: str, gate: Gate) -> tuple[Op, ...]:
    """The ops of kernels that an op of ``ALL_OPS`` runs."""
    if op == "decode":
        return (Op.DECODE,)
    return gate.passes if op == "training" else gate.passes[:1]


IMPLS = ("glac", "fla", "fa2", "cudnn")
"""What is timed if nobody says what."""
ALL_IMPLS = (*IMPLS, "glac-dense")
"""And glac with a low-rank gate that PyTorch computes first."""

_FLUSH_BYTES = 256 << 20  # several times the L2 cache of any listed GPU
_COPY_BYTES = 1 << 30
_NORMALIZER = 16.0


@dataclass(frozen=True)
class Row:
    """One measurement. ``us`` is None where there is no time; ``note`` says why.

    ``config_id`` and ``cubin_sha`` are those of glac's forward kernel.
    """

    op: str
    B: int
    T: int
    H: int
    K: int
    V: int
    dtype: str
    gate: str
    gate_rank: int
    gate_dtype: str
    impl: str
    us: float | None
    eager_us: float | None
    floor_us: float | None
    error: float | None
    errors: dict[str, float | None]
    scratch_mb: float | None
    saved_mb: float | None
    config_id: str | None
    cubin_sha: str | None
    backward_config_id: str | None
    backward_cubin_sha: str | None
    date: str
    note: str = ""


COLUMNS: tuple[str, ...] = tuple(f.name for f in fields(Row))


# ---- which problems ----


def parse_shape(text: str) -> Shape:
    """``"B,T,H,K,V"`` as five positive integers.

    Raises:
        ConfigError: if it is anything else.
    """
    try:
        B, T, H, K, V = (int(part) for part in text.split(","))
    except ValueError:
        B = T = H = K = V = 0
    if min(B, T, H, K, V) < 1:
        raise ConfigError(
            f"a shape is five positive integers B,T,H,K,V, got {text!r}",
            hint="for example 16,2048,8,128,128",
        )
    return B, T, H, K, V


def bench_problems(
    shapes: Sequence[Shape] | None = None,
    gates: Sequence[str] | None = None,
    *,
    suite: str | None = None,
    dtype: str | None = None,
    gate_dtype: str | None = None,
    rank: int | None = None,
) -> list[Problem]:
    """The problems of a run: every shape with every gate, or those of a suite.

    Args:
        shapes: those of the suite ``standard`` if None, with its gates if these are None too.
        gates: of ``"vector"``, ``"lowrank"`` and ``"scalar"``; the vector gate if None. Of a
            suite: which of its problems are wanted; all if None.
        suite: of ``glac.suites.SUITES``.
        dtype: of q, k, v and of the low-rank gate's tensors; bf16 if None.
        gate_dtype: of a dense gate; ``dtype`` if None.
        rank: of a low-rank gate; 16 if None.

    Raises:
        ConfigError: a shape, gate or dtype that no kernel could serve, an unknown suite, or a
            suite together with what it has of its own.
    """
    given = {"shapes": shapes or None, "dtype": dtype, "gate_dtype": gate_dtype, "rank": rank}
    try:
        kinds = [Gate(gate) for gate in gates or ()]
        element = DType(dtype or "bf16")
        wide = DType(gate_dtype) if gate_dtype else element
    except ValueError as error:
        raise ConfigError(
            str(error),
            hint=f"gates are {', '.join(g.value for g in Gate)}; "
            f"dtypes are {', '.join(d.value for d in DType)}",
        ) from None
    if suite is not None:
        own = [name for name, value in given.items() if value is not None]
        if own:
            raise ConfigError(
                f"suite {suite!r} has {', '.join(own)} of its own",
                hint="give shapes instead of a suite",
            )
        return _suite_problems(suite, kinds)
    pairs = [(shape, kind) for kind in kinds or (Gate.VECTOR,) for shape in shapes or SHAPES]
    if not shapes and not kinds:
        pairs = [((p.B, p.T, p.H, p.spec.K, p.spec.V), p.spec.gate) for p in SUITES["standard"]]
    return [
        make_problem(shape, kind, 16 if rank is None else rank, element)
        if kind is Gate.LOWRANK
        else make_problem(shape, kind, 0, element, wide)
        for shape, kind in pairs
    ]


def _suite_problems(suite: str, kinds: Sequence[Gate]) -> list[Problem]:
    if suite not in SUITES:
        raise ConfigError(f"unknown suite {suite!r}", hint=f"suites are {', '.join(SUITES)}")
    wanted = [p for p in SUITES[suite] if not kinds or p.spec.gate in kinds]
    if not wanted:
        raise ConfigError(
            f"suite {suite!r} has no problem with a {' or '.join(k.value for k in kinds)} gate",
            hint="leave the gate out, or give shapes instead of a suite",
        )
    return wanted


# ---- timing ----


class Clock(Protocol):
    """Where times come from: a GPU, or a fake in tests."""

    def event(self) -> Any:
        """A mark in the stream of device work."""

    def elapsed_us(self, start: Any, end: Any) -> float:
        """Device time between two marks that have passed."""

    def synchronize(self) -> None:
        """Wait until the device is idle."""

    def seconds(self) -> float:
        """Host time."""


class CudaClock:
    """CUDA events and the host's performance counter."""

    def event(self) -> Any:
        cuda: Any = torch.cuda  # whose classes carry types in some releases only
        event = cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_us(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) * 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self) -> float:
        return time.perf_counter()


def _repetitions(
    fn: Callable[[], object],
    flush: Callable[[], object],
    clock: Clock,
    *,
    budget_ms: float,
    min_reps: int,
    max_reps: int,
) -> int:
    """How many flush-and-call rounds fit the budget, from two rounds after a warm-up."""
    for _ in range(3):
        fn()
    flush()
    clock.synchronize()
    start = clock.seconds()
    for _ in range(2):
        flush()
        fn()
    clock.synchronize()
    round_ms = max((clock.seconds() - start) * 1e3 / 2, 1e-6)
    return min(max_reps, max(min_reps, int(budget_ms / round_ms)))


def _nothing() -> None:
    return None


def time_cuda(
    fn: Callable[[], object],
    flush: Callable[[], object] | None = None,
    *,
    budget_ms: float = 200.0,
    min_reps: int = 20,
    max_reps: int = 2000,
    clock: Clock | None = None,
) -> float:
    """Median device time of ``fn`` in microseconds.

    Rounds are queued without waiting, so the host's share of a launch hides behind the flush as
    long as it is the shorter of the two.

    Args:
        fn: Queues the work to time.
        flush: Runs before each call and is not timed; evicts the L2 cache.
        budget_ms: About how long to measure.
        min_reps: Rounds whatever the budget.
        max_reps: Rounds at most.
        clock: A CUDA clock if None.
    """
    clock = clock or CudaClock()
    flush = flush or _nothing
    reps = _repetitions(
        fn, flush, clock, budget_ms=budget_ms, min_reps=min_reps, max_reps=max_reps
    )
    marks = []
    for _ in range(reps):
        flush()
        start = clock.event()
        fn()
        marks.append((start, clock.event()))
    clock.synchronize()
    return statistics.median(clock.elapsed_us(start, end) for start, end in marks)


def time_host(
    fn: Callable[[], object],
    flush: Callable[[], object] | None = None,
    *,
    budget_ms: float = 200.0,
    min_reps: int = 20,
    max_reps: int = 2000,
    clock: Clock | None = None,
) -> float:
    """Median wall time of one call of ``fn`` on an idle device, until its work is done."""
    clock = clock or CudaClock()
    flush = flush or _nothing
    reps = _repetitions(
        fn, flush, clock, budget_ms=budget_ms, min_reps=min_reps, max_reps=max_reps
    )
    times = []
    for _ in range(reps):
        flush()
        clock.synchronize()
        start = clock.seconds()
        fn()
        clock.synchronize()
        times.append((clock.seconds() - start) * 1e6)
    return statistics.median(times)


def record_graph(fn: Step) -> Callable[[], None]:
    """Capture one call of ``fn`` as a CUDA graph and return its replay.

    Raises:
        RuntimeError: the call cannot be captured, or a replay does not write a result, as when
            work was launched outside the captured stream: its time would be too short.
    """
    cuda: Any = torch.cuda
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        for _ in range(2):
            fn()
    cuda.current_stream().wait_stream(side)
    cuda.synchronize()
    graph = cuda.CUDAGraph()
    with cuda.graph(graph, capture_error_mode="thread_local"):
        results = fn()
    for result in results.values():
        result.fill_(math.nan)
    graph.replay()
    cuda.synchronize()
    for name, result in results.items():
        if not bool(torch.isfinite(result).all()):
            raise RuntimeError(f"a replay leaves {name} unwritten")
    replay: Callable[[], None] = graph.replay
    return replay


class Memory(Protocol):
    """Where memory sizes come from: a GPU, or a fake in tests."""

    def allocated(self) -> int:
        """Bytes that tensors hold now."""

    def reset_peak(self) -> None:
        """Start watching for the highest value."""

    def peak(self) -> int:
        """The highest value since then."""


class CudaMemory:
    """PyTorch's caching allocator on the current device."""

    def allocated(self) -> int:
        return torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()


@dataclass
class Harness:
    """How this run measures.

    Attributes:
        device: where tensors live.
        clock: where times come from.
        flush: evicts the L2 cache.
        copy_bandwidth: bytes per second, read plus written.
        record: turns a call into the replay of its graph; None times eager calls.
        memory: where memory sizes come from; None records none.
        budget_ms: measuring time per number.
        dead: why nothing can be measured any more; empty while it can.
    """

    device: torch.device
    clock: Clock
    flush: Callable[[], object]
    copy_bandwidth: float
    record: Callable[[Step], Callable[[], None]] | None = None
    memory: Memory | None = None
    budget_ms: float = 200.0
    dead: str = ""

    def host_us(self, fn: Step) -> float:
        return time_host(fn, self.flush, budget_ms=self.budget_ms, clock=self.clock)

    def device_us(self, fn: Step) -> tuple[float, str]:
        """Device time, and a note if it is not that of a graph replay."""
        note = "eager calls, no CUDA graph"
        if self.record is not None:
            try:
                replay = self.record(fn)
            except Exception as error:
                self.clock.synchronize()
                note += f": {_first_line(error)}"
            else:
                us = time_cuda(replay, self.flush, budget_ms=self.budget_ms, clock=self.clock)
                return us, ""
        us = time_cuda(fn, self.flush, budget_ms=self.budget_ms, clock=self.clock)
        return us, note


def measure_copy_bandwidth(device: torch.device, clock: Clock | None = None) -> float:
    """Bytes per second, read plus written, of copying 1 GiB on the device."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    us = time_cuda(lambda: target.copy_(source), clock=clock)
    return 2 * _COPY_BYTES / us * 1e6


def cuda_harness(budget_ms: float = 200.0) -> Harness:
    """The harness of the current CUDA device.

    Raises:
        MissingEnvironmentError: there is none.
    """
    if not torch.cuda.is_available():
        raise MissingEnvironmentError(
            "glac bench times kernels on a CUDA GPU, and PyTorch finds none",
            hint="without a GPU, `glac build` compiles packs, `glac quickstart` checks the "
            "operator on the CPU, and `python benchmarks/plot.py RESULTS.json` draws results "
            "measured elsewhere",
        )
    device = torch.device("cuda", torch.cuda.current_device())
    bandwidth = measure_copy_bandwidth(device)
    torch.cuda.empty_cache()
    scratch = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    return Harness(
        device, CudaClock(), scratch.zero_, bandwidth, record_graph, CudaMemory(), budget_ms
    )


# ---- the rivals ----


@dataclass
class Work:
    """One problem's tensors, drawn once and given to every implementation."""

    problem: Problem
    device: torch.device
    seed: int = 0
    _truths: dict[str, dict[str, Tensor]] = field(default_factory=dict, init=False)

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The inputs by name, in the order in which the operations take them."""
        from glac.testing import problem_inputs

        inputs = problem_inputs(self.problem, device=self.device, seed=self.seed)
        gate = ("x", "weight", "bias") if self.problem.spec.gate is Gate.LOWRANK else ("g",)
        return {name: getattr(inputs, name) for name in ("q", "k", "v", *gate)}

    @functools.cached_property
    def do(self) -> Tensor:
        """The gradient of the output, in training."""
        return self._normal(self.tensors["v"].shape, self.seed + 1)

    @functools.cached_property
    def do_first(self) -> Tensor:
        """``do`` of batch element 0, zero elsewhere: nothing else reaches weight and bias."""
        do = torch.zeros_like(self.do)
        do[0] = self.do[0]
        return do

    def _normal(self, shape: Sequence[int], seed: int) -> Tensor:
        generator = torch.Generator(device=self.device).manual_seed(seed)
        values = torch.randn(tuple(shape), generator=generator, device=self.device)
        return values.to(TORCH_DTYPES[self.problem.spec.dtype])

    def reference(self, op: str, *, exact: bool) -> dict[str, Tensor]:
        """Results for batch element 0: from fp64, or from PyTorch in kernel precision."""
        from glac import reference

        # q, k, v, g and x have a batch dimension.
        first = {n: t[:1] if t.dim() > 2 else t for n, t in self.tensors.items()}
        do = self.do[:1]
        if exact:
            first, do = {n: t.double() for n, t in first.items()}, do.double()
        q, k, v, *gate = first.values()
        gate = [t.detach().requires_grad_(op == "training") for t in gate]
        g = gate[0]
        if self.problem.spec.gate is Gate.LOWRANK:
            with torch.enable_grad():
                g = reference.lowrank_gate(*gate, num_heads=self.problem.H, normalizer=_NORMALIZER)
        if op == "decode":
            dense = g[..., None] if self.problem.spec.gate.is_scalar else g
            return {"o": reference.decode_gla(q, k, v, dense, initial_state=self.states[:1])[0]}
        if self.problem.spec.gate.is_scalar:
            return self._scalar_reference(
                op, exact, dict(zip("qkvg", (q, k, v, g), strict=True)), do
            )
        if op == "forward":
            forward = reference.chunk_gla if exact else reference.yardstick_chunk_gla
            return {"o": forward(q, k, v, g)[0]}
        backward = (
            reference.chunk_gla_backward if exact else reference.yardstick_chunk_gla_backward
        )
        dq, dk, dv, dg, _ = backward(q, k, v, g.detach(), do)
        gradients = (dq, dk, dv, *torch.autograd.grad(g, gate, dg))
        return {f"d{name}": gradient for name, gradient in zip(first, gradients, strict=True)}

    def _scalar_reference(
        self, op: str, exact: bool, inputs: dict[str, Tensor], do: Tensor
    ) -> dict[str, Tensor]:
        """``reference`` for a gate of one number per token and head."""
        from glac import reference

        q, k, v, g = (t.detach() for t in inputs.values())
        dense = g[..., None].expand(q.shape)
        if op == "forward":
            o = (
                reference.chunk_gla(q, k, v, dense)[0]
                if exact
                else reference.yardstick_scalar_gla(q, k, v, g)[0]
            )
            return {"o": o}
        if exact:
            dq, dk, dv, dg, _ = reference.chunk_gla_backward(q, k, v, dense, do)
            dg = dg.sum(-1)
        else:
            dq, dk, dv, dg, _ = reference.yardstick_scalar_gla_backward(q, k, v, g, do)
        return {"dq": dq, "dk": dk, "dv": dv, "dg": dg}

    @functools.cached_property
    def states(self) -> Tensor:
        """Fp32 states for decoding."""
        p, spec = self.problem, self.problem.spec
        generator = torch.Generator(device=self.device).manual_seed(self.seed + 2)
        size = (p.B, p.H, spec.K, spec.V)
        return torch.randn(size, generator=generator, device=self.device)

    def truth(self, op: str) -> dict[str, Tensor]:
        """The fp64 results for batch element 0, computed once."""
        if op not in self._truths:
            self._truths[op] = self.reference(op, exact=True)
        return self._truths[op]

    def errors(self, op: str, results: Mapping[str, Tensor]) -> dict[str, float]:
        """Relative rms of each result against fp64.

        Gradients of weight and bias must come from ``do_first``: they sum over the batch.
        """
        from glac.reference import relative_rms

        return {
            name: relative_rms(results[name][: expected.shape[0]], expected)
            for name, expected in self.truth(op).items()
        }

    def yardstick_errors(self, op: str) -> dict[str, float]:
        """The errors of PyTorch in kernel precision: a kernel may have twice these."""
        return self.errors(op, self.reference(op, exact=False))

    @functools.cached_property
    def attention(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, do ``[B, Hs, T, D]`` of softmax attention at the model width H*V."""
        p, spec = self.problem, self.problem.spec
        D = min(spec.V, 128)
        if p.H * spec.V % D:
            raise GlacError(f"a model width of {p.H * spec.V} is no multiple of {D}")
        shape = (p.B, p.H * spec.V // D, p.T, D)
        q, k, v, do = (self._normal(shape, self.seed + i) for i in range(4))
        return q, k, v, do


@dataclass
class Call:
    """An implementation, ready to run.

    Attributes:
        forward: from the tensors, in their order, to the output.
        tensors: inputs by name. Training differentiates with respect to each of them.
        do: gradient of the output, in training.
        around: entered around every call that is made.
        first: entered around the first call only.
        exact: whether results are to be compared with the truth.
        identify: what served a pass: config id, cubin hash and note, asked after the first call.
        notes: what a reader of the time must know.
    """

    forward: Callable[..., Tensor]
    tensors: Mapping[str, Tensor]
    do: Tensor
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    first: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    exact: bool = True
    identify: Callable[[Op], tuple[str | None, str | None, str]] = lambda op: (None, None, "")
    notes: list[str] = field(default_factory=list)

    def step(
        self, op: str, do: Tensor | None = None, between: Callable[[], object] = _nothing
    ) -> Step:
        """One call of ``op``, to be made with autograd on in training and off otherwise.

        Args:
            op: Of ``OPS``.
            do: Gradient of the output, in training; the problem's if None.
            between: Runs after the forward pass.
        """
        if op != "training":
            tensors = tuple(self.tensors.values())

            def forward() -> dict[str, Tensor]:
                o = self.forward(*tensors)
                between()
                return {"o": o}

            return forward

        leaves = [tensor.detach().requires_grad_() for tensor in self.tensors.values()]
        names = [f"d{name}" for name in self.tensors]
        upstream = self.do if do is None else do

        def training() -> dict[str, Tensor]:
            o = self.forward(*leaves)
            between()
            gradients = torch.autograd.grad(o, leaves, upstream)
            return {"o": o.detach(), **dict(zip(names, gradients, strict=True))}

        return training


def _output(operation: Callable[..., Any], **options: Any) -> Callable[..., Tensor]:
    """``operation`` without the states that it returns behind its output."""

    def call(*tensors: Tensor) -> Tensor:
        o: Tensor = operation(*tensors, **options)[0]
        return o

    return call


def _glac(work: Work, op: str = "forward") -> Call:
    ops: Any = importlib.import_module("glac.attention")
    gate = work.problem.spec.gate
    lowrank = gate is Gate.LOWRANK
    options = {"normalizer": _NORMALIZER} if lowrank else {}

    def decode(*tensors: Tensor) -> Tensor:
        fn = ops.recurrent_gla_lowrank if lowrank else ops.recurrent_gla
        o: Tensor = fn(*tensors, initial_state=work.states, output_final_state=True, **options)[0]
        return o

    def identify(op: Op) -> tuple[str | None, str | None, str]:
        try:
            dispatch: Any = importlib.import_module("glac.dispatch")
            served = dispatch.explain(work.problem, work.device, op=op)
        except Exception as error:
            return None, None, f"{op.value} dispatch unknown: {_first_line(error)}"
        provider = _text(getattr(served, "provider", None))
        reason = _text(getattr(served, "reason", None))
        note = "" if provider in (None, "pack") else f"{op.value} served by {provider}"
        if note and reason:
            note += f" ({reason})"
        sha = _text(getattr(served, "cubin_sha", None)) or None
        return _text(getattr(served, "config_id", None)), sha, note

    if op == "decode":
        return Call(decode, work.tensors, work.do, identify=identify)
    names = {
        Gate.VECTOR: "chunk_gla",
        Gate.LOWRANK: "chunk_gla_lowrank",
        Gate.SCALAR: "chunk_simple_gla",
    }
    fn = _output(getattr(ops, names[gate]), **options)
    return Call(fn, work.tensors, work.do, identify=identify)


_SEPARATE = "separate gate"


def _behind_gate(dense: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``dense`` for a low-rank gate that is computed as a layer without such kernels does."""

    def lowrank(
        q: Tensor, k: Tensor, v: Tensor, x: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        g = F.logsigmoid(F.linear(x, weight, bias)) / _NORMALIZER
        return dense(q, k, v, g.view_as(k))

    return lowrank


def _glac_dense(work: Work, op: str = "forward") -> Call:
    _only_chunks("glac-dense", op)
    if work.problem.spec.gate is not Gate.LOWRANK:
        raise GlacError("glac-dense is for low-rank gates; others are dense for glac, too")
    ops: Any = importlib.import_module("glac.attention")
    fn = _behind_gate(_output(ops.chunk_gla))
    return Call(fn, work.tensors, work.do, notes=[_SEPARATE])


def _fla(work: Work, op: str = "forward") -> Call:
    _only_chunks("fla", op)
    if work.problem.spec.gate.is_scalar:
        scalar = _output(_import_fla("simple_gla", "chunk_simple_gla"))
        return Call(scalar, work.tensors, work.do, first=quick_autotune)
    vector = _output(_import_fla())
    if work.problem.spec.gate is Gate.VECTOR:
        return Call(vector, work.tensors, work.do, first=quick_autotune)
    lowrank = _behind_gate(vector)
    return Call(lowrank, work.tensors, work.do, first=quick_autotune, notes=[_SEPARATE])


def _only_chunks(impl: str, op: str) -> None:
    if op == "decode":
        raise GlacError(f"decoding is timed for glac alone, not for {impl}")


def _sdpa(backend: str) -> Callable[..., Call]:
    def build(work: Work, op: str = "forward") -> Call:
        _only_chunks(backend, op)
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v, do = work.attention
        return Call(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            {"q": q, "k": k, "v": v},
            do,
            around=lambda: sdpa_kernel(getattr(SDPBackend, backend)),
            exact=False,
            notes=[f"causal softmax attention, {q.shape[1]} heads of {q.shape[3]}, no gate"],
        )

    return build


_BUILDERS: dict[str, Callable[..., Call]] = {
    "glac": _glac,
    "glac-dense": _glac_dense,
    "fla": _fla,
    "fa2": _sdpa("FLASH_ATTENTION"),
    "cudnn": _sdpa("CUDNN_ATTENTION"),
}


def _import_fla(room: str = "gla", name_of: str = "chunk_gla") -> Any:
    """fla's ``chunk_gla``, or another of its operations.

    fla keeps tuning results on disk under keys that leave out the number of heads and, for some
    kernels, K and V: a config found for one shape would be used for another. It reads the switch
    for that once, when it is imported.
    """
    name = "FLA_CACHE_RESULTS"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        return getattr(importlib.import_module(f"fla.ops.{room}"), name_of)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "fla":
            raise
        raise MissingEnvironmentError(
            "not installed (pip install flash-linear-attention)"
        ) from None
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


_tuned: dict[int, Any] = {}


@contextlib.contextmanager
def quick_autotune() -> Iterator[None]:
    """Let Triton's autotuner choose afresh, with ten timed rounds a config instead of 125 ms.

    Afresh, because its keys can leave out sizes that matter: each problem is tuned on its own
    tensors.
    """
    try:
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        yield
        return
    for tuner in _tuned.values():
        tuner.cache.clear()
    scratch: list[Tensor] = []

    def bench(kernel_call: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
        try:
            kernel_call()  # compiles
        except Exception:
            torch.cuda.synchronize()  # raises if the GPU itself has failed
            return [math.inf] * len(quantiles)
        if not scratch:
            scratch.append(torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda"))
        us = time_cuda(kernel_call, scratch[0].zero_, budget_ms=2.0, min_reps=10, max_reps=20)
        return [us / 1e3] * len(quantiles)

    def benchmarker(tuner: Any) -> Callable[..., list[float]]:
        _tuned[id(tuner)] = tuner
        return bench

    missing = object()
    original = Autotuner.__dict__.get("do_bench", missing)
    Autotuner.do_bench = property(benchmarker)
    try:
        yield
    finally:
        if original is missing:
            del Autotuner.do_bench
        else:
            Autotuner.do_bench = original


# ---- rows ----


def _first_line(error: BaseException) -> str:
    lines = str(getattr(error, "message", "") or error).strip().splitlines()
    text = lines[0] if lines else ""
    name = "" if isinstance(error, GlacError) else type(error).__name__
    return ": ".join(part for part in (name, text) if part)[:200]


def _text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return ",".join(str(item) for item in value)
    return str(getattr(value, "value", value))


def _finite(value: float, what: str, notes: list[str]) -> float | None:
    """JSON has no nan: a number that is none becomes None and a note."""
    if math.isfinite(value):
        return value
    notes.append(f"{what} is {value}")
    return None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _row(problem: Problem, op: str, impl: str, harness: Harness, **values: Any) -> Row:
    spec = problem.spec
    moved = sum(problem.bytes(part) for part in passes(op, problem.spec.gate))
    known: dict[str, Any] = dict.fromkeys(COLUMNS)
    known.update(
        op=op,
        B=problem.B,
        T=problem.T,
        H=problem.H,
        K=spec.K,
        V=spec.V,
        dtype=spec.dtype.value,
        gate=spec.gate.value,
        gate_rank=spec.rank,
        gate_dtype=spec.gate_dtype.value,
        impl=impl,
        floor_us=moved / harness.copy_bandwidth * 1e6,
        errors={},
        date=_now(),
    )
    return Row(**{**known, **values})


def _error_values(errors: Mapping[str, float], notes: list[str]) -> dict[str, Any]:
    """A row's ``errors`` and ``error``."""
    finite = {name: _finite(value, f"error of {name}", notes) for name, value in errors.items()}
    known = [value for value in finite.values() if value is not None]
    return {"errors": finite, "error": max(known) if len(known) == len(errors) else None}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def measure_memory(call: Call, op: str, memory: Memory) -> dict[str, float]:
    """``scratch_mb`` of one call, and in training ``saved_mb``.

    What was allocated once and for all, such as a library's workspace, has to be there already.
    """
    held = 0

    def between() -> None:
        nonlocal held
        held = memory.allocated()

    step = call.step(op, between=between)
    before = memory.allocated()
    memory.reset_peak()
    results = step()
    scratch = memory.peak() - before - sum(map(_bytes, results.values()))
    values = {"scratch_mb": scratch / 1e6}
    if op == "training":
        values["saved_mb"] = (held - before - _bytes(results["o"])) / 1e6
    return values


_IDENTITY = {
    Op.FORWARD: ("config_id", "cubin_sha"),
    Op.SCALAR_FORWARD: ("config_id", "cubin_sha"),
    Op.DECODE: ("config_id", "cubin_sha"),
    Op.BACKWARD: ("backward_config_id", "backward_cubin_sha"),
    Op.SCALAR_BACKWARD: ("backward_config_id", "backward_cubin_sha"),
}


def measure(impl: str, work: Work, harness: Harness, op: str = "forward") -> Row:
    """Time and check one implementation. Never raises for what the implementation does."""
    values: dict[str, Any] = {}
    notes: list[str] = []
    if harness.dead:
        return _row(work.problem, op, impl, harness, note=harness.dead)
    try:
        call = _BUILDERS[impl](work, op)
        notes += call.notes
        step = call.step(op)
        with call.around(), torch.set_grad_enabled(op == "training"):
            start = harness.clock.seconds()
            with call.first():
                step()
                harness.clock.synchronize()
            if impl == "fla":
                notes.append(f"first call {harness.clock.seconds() - start:.1f} s")
            for part in passes(op, work.problem.spec.gate):
                *identity, note = call.identify(part)
                values.update(zip(_IDENTITY[part], identity, strict=True))
                notes.append(note)
            if call.exact:
                try:
                    errors = work.errors(op, call.step(op, work.do_first)())
                    values.update(_error_values(errors, notes))
                except Exception as error:
                    notes.append(f"error unknown: {_first_line(error)}")
            if harness.memory is not None:
                values.update(measure_memory(call, op, harness.memory))
            values["us"], note = harness.device_us(step)
            notes.append(note)
            values["eager_us"] = harness.host_us(step)
    except Exception as error:
        notes.append(_first_line(error))
        try:
            harness.clock.synchronize()
        except Exception:
            # A CUDA context that has seen an illegal access never works again.
            harness.dead = f"not run: the GPU stopped working in the call of {impl}"
    return _row(work.problem, op, impl, harness, note="; ".join(n for n in notes if n), **values)


def measure_yardstick(work: Work, harness: Harness, op: str = "forward") -> Row:
    """A row without a time: the error of PyTorch in kernel precision."""
    notes = ["PyTorch in kernel precision: a kernel may have twice its error"]
    values: dict[str, Any] = {}
    if harness.dead:
        notes = [harness.dead]
    else:
        try:
            values = _error_values(work.yardstick_errors(op), notes)
        except Exception as error:
            notes.append(_first_line(error))
    return _row(work.problem, op, "yardstick", harness, note="; ".join(notes), **values)


# ---- the run ----


def _version(*distributions: str) -> str | None:
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _nvidia_smi(device: torch.device) -> dict[str, str | None]:
    """Driver and clocks as nvidia-smi reads them; nothing where it cannot be asked."""
    names = {
        "driver": "driver_version",
        "sm_mhz": "clocks.sm",
        "memory_mhz": "clocks.mem",
        "sm_max_mhz": "clocks.max.sm",
        "memory_max_mhz": "clocks.max.memory",
        "power_limit_w": "power.limit",
        "temperature_c": "temperature.gpu",
    }
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(names.values())}",
        "--format=csv,noheader,nounits",
    ]
    try:
        uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
        which = ["-i", f"GPU-{uuid}"] if uuid is not None else []
        for arguments in (which, []):
            done = subprocess.run(
                command + arguments, capture_output=True, text=True, timeout=20, check=False
            )
            values = [part.strip() for part in done.stdout.strip().split("\n")[0].split(",")]
            if done.returncode == 0 and len(values) == len(names):
                return dict(zip(names, values, strict=True))
    except Exception:
        pass
    return dict.fromkeys(names)


def environment(harness: Harness) -> dict[str, Any]:
    """What a reader must know to repeat the run."""
    properties = torch.cuda.get_device_properties(harness.device)
    spec = match_gpu(
        (properties.major, properties.minor), properties.multi_processor_count, properties.name
    )
    clocks = _nvidia_smi(harness.device)
    driver = clocks.pop("driver")
    cudnn: Any = torch.backends.cudnn
    return {
        "gpu": properties.name,
        "gpu_spec": spec.name if spec else None,
        "driver": driver,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version(),
        "triton": _version("triton", "pytorch-triton"),
        "fla": _version("fla-core", "flash-linear-attention"),
        "glac": __version__,
        "copy_bandwidth": harness.copy_bandwidth,
        "clocks": clocks,
        "date": _now(),
    }


def _command(argv: Sequence[str]) -> str:
    """The command line as someone else would type it."""
    name = Path(argv[0]).name
    if name in ("__main__.py", "-m", "glac"):
        return shlex.join(["glac", *argv[1:]])
    return shlex.join(["python", name, *argv[1:]] if name.endswith(".py") else [name, *argv[1:]])


def write_results(path: Path, document: Mapping[str, Any]) -> None:
    """Replace the file in one step: a reader sees the old results or the new ones."""
    from glac.atomic import write_text

    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def run_problems(
    problems: Sequence[Problem],
    ops: Sequence[str],
    impls: Sequence[str],
    harness: Harness,
    document: dict[str, Any],
    out: Path,
    *,
    seed: int = 0,
) -> None:
    """Measure and save row by row; ``document["rows"]`` grows. Progress goes to stderr."""
    total = len(problems) * len(ops) * len(impls)
    number = 0
    for problem in problems:
        work = Work(problem, harness.device, seed)
        for op in ops:
            if "glac" in impls:
                document["rows"].append(asdict(measure_yardstick(work, harness, op)))
            for impl in impls:
                number += 1
                what = f"[{number}/{total}] {problem} {op} {impl}"
                print(f"{what} ...", file=sys.stderr, flush=True)
                row = measure(impl, work, harness, op)
                document["rows"].append(asdict(row))
                write_results(out, document)
                took = "no time" if row.us is None else f"{row.us:.1f} us"
                note = f" ({row.note})" if row.note else ""
                print(f"{what}: {took}{note}", file=sys.stderr)
                if harness.device.type == "cuda" and not harness.dead:
                    torch.cuda.empty_cache()
        del work


def default_out(gpu: str | None, suite: str | None) -> Path:
    """Where results go: a file for each GPU, and for suites other than the default one's."""
    name = gpu or "gpu"
    if suite not in (None, "standard"):
        name += f"_{suite}"
    return Path("benchmarks", "results", f"{name}.json")


def run_bench(
    shapes: Sequence[Shape] | None = None,
    gates: Sequence[str] | None = None,
    impls: Sequence[str] = IMPLS,
    *,
    ops: Sequence[str] = OPS,
    out: Path | None = None,
    suite: str | None = None,
    dtype: str | None = None,
    gate_dtype: str | None = None,
    rank: int | None = None,
    seed: int = 0,
    budget_ms: float = 200.0,
    command: str | None = None,
    table: bool = True,
) -> dict[str, Any]:
    """Time implementations of GLA side by side, and save the results.

    Args:
        shapes: (B, T, H, K, V) each; see :func:`bench_problems` for this and for what follows.
        gates: ``"vector"``, ``"lowrank"``, ``"scalar"``.
        impls: Of ``ALL_IMPLS``, measured in this order.
        ops: Of ``ALL_OPS``, each timed on every problem.
        out: Results file; :func:`default_out` if None.
        suite: Of ``glac.suites.SUITES``.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        gate_dtype: Of a vector gate: ``dtype`` (None) or ``"fp32"``.
        rank: Of a low-rank gate.
        seed: Of the inputs.
        budget_ms: Measuring time per number.
        command: Recorded in the file; this process's command line if None.
        table: Print a table on stdout at the end.

    Returns:
        What the file holds: ``{"schema", "env", "command", "rows"}``.

    Raises:
        ConfigError: an unknown op, implementation, suite, gate, dtype or shape.
        MissingEnvironmentError: there is no GPU, or the results cannot be written.
    """
    for what, given, known in (("op", ops, ALL_OPS), ("implementation", impls, tuple(_BUILDERS))):
        unknown = [name for name in given if name not in known]
        if unknown or not given:
            raise ConfigError(
                f"unknown {what}s {unknown}" if unknown else f"no {what} to time",
                hint=f"{what}s are {', '.join(known)}",
            )
    if tuple(ops) == ("decode",) and suite is None:
        shapes = shapes or DECODE_SHAPES
    problems = bench_problems(
        shapes, gates, suite=suite, dtype=dtype, gate_dtype=gate_dtype, rank=rank
    )
    harness = cuda_harness(budget_ms)
    env = environment(harness)
    if out is None:
        out = default_out(env["gpu_spec"], suite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MissingEnvironmentError(f"cannot write {out}: {error.strerror}") from None
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "env": env,
        "command": command or _command(sys.argv),
        "rows": [],
    }
    run_problems(problems, ops, impls, harness, document, out, seed=seed)
    if table:
        copy = f"copy {harness.copy_bandwidth / 1e12:.2f} TB/s"
        dtypes = "/".join(dict.fromkeys(p.spec.dtype.value for p in problems))
        print(f"{env['gpu']}, {dtypes}, {copy}, saved: {out}")
        print(format_table(document["rows"]))
    return document


# ---- the table ----


def _problem_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("op", "B", "T", "H", "K", "V", "dtype", "gate", "gate_rank", "gate_dtype")
    return tuple(row[name] for name in names)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of a results file as text, one line each.

    ``x floor`` is time over the memory floor, ``speed-up`` how many times faster glac is on the
    same problem, and ``note`` says why there is no time.
    """
    ours = {_problem_key(r): r["us"] for r in rows if r["impl"] == "glac" and r["us"]}
    header = ["op", "shape", "gate", "impl", "us", "x floor", "speed-up", "error", "note"]
    lines = [header]
    for row in rows:
        us, floor, error = row["us"], row["floor_us"], row["error"]
        glac_us = ours.get(_problem_key(row))
        note = str(row.get("note") or "") if us is None and row["impl"] != "yardstick" else ""
        lines.append(
            [
                row["op"],
                ",".join(str(row[name]) for name in ("B", "T", "H", "K", "V")),
                row["gate"] + (str(row["gate_rank"]) if row["gate_rank"] else ""),
                row["impl"],
                "-" if us is None else f"{us:.1f}",
                "-" if us is None or not floor else f"{us / floor:.2f}",
                "-" if us is None or not glac_us else f"{us / glac_us:.2f}x",
                "-" if error is None else f"{error:.1e}",
                note if len(note) <= 60 else note[:57] + "...",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    texts = []
    for line in lines:
        cells = [
            cell.rjust(width) if 4 <= i <= 7 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        texts.append("  ".join(cells).rstrip())
    texts.insert(1, "  ".join("-" * width for width in widths[:-1]))
    return "\n".join(texts)
