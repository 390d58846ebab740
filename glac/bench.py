"""Side-by-side times of GLA implementations on one GPU: ``glac bench``.

Every implementation is called through its public function. What a row's numbers mean:

    us        median device time of one call, replayed as a CUDA graph where it can be captured
    eager_us  median wall time of one call as a user makes it, from the call to the finished output
    floor_us  bytes the problem must move / copy bandwidth measured in the same run
    error     relative rms against fp64, batch element 0

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
from glac.problem import DType, Gate, Problem, Specialisation
from glac.validate import TORCH_DTYPES

Shape = tuple[int, int, int, int, int]
"""B, T, H, K, V."""

SCHEMA = 1
IMPLS = ("glac", "fla", "fa2", "cudnn")
DEFAULT_SHAPES: tuple[Shape, ...] = (
    (8, 2048, 16, 64, 64),
    (16, 2048, 8, 128, 128),
    (4, 4096, 64, 128, 128),
    (8, 2048, 4, 128, 256),
    (8, 2048, 4, 256, 512),
)
LOWRANK_SHAPES: tuple[Shape, ...] = ((16, 2048, 8, 128, 128), (8, 2048, 16, 64, 64))
"""Shapes of the default run that are also timed with a low-rank gate."""

_FLUSH_BYTES = 256 << 20  # several times the L2 cache of any listed GPU
_COPY_BYTES = 1 << 30
_NORMALIZER = 16.0


@dataclass(frozen=True)
class Row:
    """One measurement. ``us`` is None where there is no time; ``note`` says why."""

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
    config_id: str | None
    cubin_sha: str | None
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
    dtype: str = "bf16",
    gate_dtype: str | None = None,
    rank: int = 16,
) -> list[Problem]:
    """The problems of a run: every shape with every gate.

    Args:
        shapes: ``DEFAULT_SHAPES`` if None.
        gates: of ``"vector"`` and ``"lowrank"``; if None, the vector gate, and for the default
            shapes the low-rank gate at ``LOWRANK_SHAPES`` as well.
        dtype: of q, k, v and of the low-rank gate's tensors.
        gate_dtype: of a vector gate; ``dtype`` if None.
        rank: of a low-rank gate.

    Raises:
        ConfigError: a shape, gate or dtype that no kernel could serve.
    """
    pairs: list[tuple[Shape, str]] = [
        (shape, gate) for gate in gates or ("vector",) for shape in shapes or DEFAULT_SHAPES
    ]
    if not shapes and not gates:
        pairs += [(shape, "lowrank") for shape in LOWRANK_SHAPES]
    problems = []
    for (B, T, H, K, V), gate in pairs:
        if min(B, T, H) < 1:
            raise ConfigError(f"B, T and H must be positive, got {B}, {T}, {H}")
        try:
            kind, element = Gate(gate), DType(dtype)
            gate_element = DType(gate_dtype or dtype) if kind is Gate.VECTOR else element
        except ValueError as error:
            raise ConfigError(
                str(error),
                hint=f"gates are {', '.join(g.value for g in Gate)}; "
                f"dtypes are {', '.join(d.value for d in DType)}",
            ) from None
        spec = Specialisation(
            K, V, element, kind, gate_element, rank if kind is Gate.LOWRANK else 0
        )
        problems.append(Problem(spec, B, T, H))
    return problems


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


def record_graph(fn: Callable[[], Tensor]) -> Callable[[], None]:
    """Capture one call of ``fn`` as a CUDA graph and return its replay.

    Raises:
        RuntimeError: the call cannot be captured, or a replay does not write its output, as when
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
        out = fn()
    out.fill_(math.nan)
    graph.replay()
    cuda.synchronize()
    if not bool(torch.isfinite(out).all()):
        raise RuntimeError("a replay leaves its output unwritten")
    replay: Callable[[], None] = graph.replay
    return replay


@dataclass
class Harness:
    """How this run measures.

    Attributes:
        device: where tensors live.
        clock: where times come from.
        flush: evicts the L2 cache.
        copy_bandwidth: bytes per second, read plus written.
        record: turns a call into the replay of its graph; None times eager calls.
        budget_ms: measuring time per number.
    """

    device: torch.device
    clock: Clock
    flush: Callable[[], object]
    copy_bandwidth: float
    record: Callable[[Callable[[], Tensor]], Callable[[], None]] | None = None
    budget_ms: float = 200.0
    dead: str = ""

    def host_us(self, fn: Callable[[], Tensor]) -> float:
        return time_host(fn, self.flush, budget_ms=self.budget_ms, clock=self.clock)

    def device_us(self, fn: Callable[[], Tensor]) -> tuple[float, str]:
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
    return Harness(device, CudaClock(), scratch.zero_, bandwidth, record_graph, budget_ms)


# ---- the rivals ----


@dataclass
class Work:
    """One problem's tensors, drawn once and given to every implementation."""

    problem: Problem
    device: torch.device
    seed: int = 0

    @functools.cached_property
    def inputs(self) -> Any:
        from glac.testing import problem_inputs

        return problem_inputs(self.problem, device=self.device, seed=self.seed)

    def _first(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, g of batch element 0 in ``dtype``, or as they are; a gate made exactly."""
        from glac.reference import lowrank_gate

        x = self.inputs
        q, k, v = (t[:1] if dtype is None else t[:1].to(dtype) for t in (x.q, x.k, x.v))
        if self.problem.spec.gate is Gate.VECTOR:
            return q, k, v, x.g[:1] if dtype is None else x.g[:1].to(dtype)
        wide = dtype or torch.float32
        bias = None if x.bias is None else x.bias.to(wide)
        g = lowrank_gate(
            x.x[:1].to(wide),
            x.weight.to(wide),
            bias,
            num_heads=self.problem.H,
            normalizer=_NORMALIZER,
        )
        return q, k, v, g

    @functools.cached_property
    def truth(self) -> Tensor:
        """The fp64 output of batch element 0."""
        from glac.reference import chunk_gla

        return chunk_gla(*self._first(torch.float64))[0]

    def error(self, o: Tensor) -> float:
        """Relative rms of an output's batch element 0 against fp64."""
        from glac.reference import relative_rms

        return relative_rms(o[:1], self.truth)

    def yardstick_error(self) -> float:
        """The error of PyTorch in kernel precision: a kernel may have twice this."""
        from glac.reference import yardstick_chunk_gla

        return self.error(yardstick_chunk_gla(*self._first(None))[0])

    @functools.cached_property
    def attention(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v ``[B, Hs, T, D]`` of softmax attention at the model width H*V."""
        p, spec = self.problem, self.problem.spec
        D = min(spec.V, 128)
        if p.H * spec.V % D:
            raise GlacError(f"a model width of {p.H * spec.V} is no multiple of {D}")
        generator = torch.Generator(device=self.device).manual_seed(self.seed)
        shape = (p.B, p.H * spec.V // D, p.T, D)
        q, k, v = (
            torch.randn(shape, generator=generator, device=self.device).to(
                TORCH_DTYPES[spec.dtype]
            )
            for _ in range(3)
        )
        return q, k, v


@dataclass
class Call:
    """A rival, ready to run.

    Attributes:
        fn: one call on the problem's tensors, returning the output.
        around: entered around every call that is made.
        first: entered around the first call only.
        exact: whether the output is to be compared with the truth.
        identify: config id, cubin hash and note, asked after the first call.
        notes: what a reader of the time must know.
    """

    fn: Callable[[], Tensor]
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    first: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    exact: bool = True
    identify: Callable[[], tuple[str | None, str | None, str]] = lambda: (None, None, "")
    notes: list[str] = field(default_factory=list)


def _glac(work: Work) -> Call:
    ops: Any = importlib.import_module("glac.attention")
    x = work.inputs

    def vector() -> Tensor:
        o: Tensor = ops.chunk_gla(x.q, x.k, x.v, x.g)[0]
        return o

    def lowrank() -> Tensor:
        o: Tensor = ops.chunk_gla_lowrank(
            x.q, x.k, x.v, x.x, x.weight, x.bias, normalizer=_NORMALIZER
        )[0]
        return o

    def identify() -> tuple[str | None, str | None, str]:
        try:
            dispatch: Any = importlib.import_module("glac.dispatch")
            served = dispatch.explain(work.problem, work.device)
        except Exception as error:
            return None, None, f"dispatch unknown: {_first_line(error)}"
        provider = _text(getattr(served, "provider", None))
        reason = _text(getattr(served, "reason", None))
        note = "" if provider in (None, "pack") else f"served by {provider}"
        if note and reason:
            note += f" ({reason})"
        sha = _text(getattr(served, "cubin_sha", None)) or None
        return _text(getattr(served, "config_id", None)), sha, note

    fn = vector if work.problem.spec.gate is Gate.VECTOR else lowrank
    return Call(fn, identify=identify)


def _fla(work: Work) -> Call:
    chunk_gla = _import_fla()
    x, spec = work.inputs, work.problem.spec

    def vector() -> Tensor:
        o: Tensor = chunk_gla(x.q, x.k, x.v, x.g)[0]
        return o

    def lowrank() -> Tensor:
        g = F.logsigmoid(F.linear(x.x, x.weight, x.bias)) / _NORMALIZER
        o: Tensor = chunk_gla(x.q, x.k, x.v, g.view_as(x.k))[0]
        return o

    if spec.gate is Gate.VECTOR:
        return Call(vector, first=quick_autotune)
    return Call(lowrank, first=quick_autotune, notes=["separate gate"])


def _sdpa(backend: str) -> Callable[[Work], Call]:
    def build(work: Work) -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = work.attention
        return Call(
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            around=lambda: sdpa_kernel(getattr(SDPBackend, backend)),
            exact=False,
            notes=[f"causal softmax attention, {q.shape[1]} heads of {q.shape[3]}, no gate"],
        )

    return build


_BUILDERS: dict[str, Callable[[Work], Call]] = {
    "glac": _glac,
    "fla": _fla,
    "fa2": _sdpa("FLASH_ATTENTION"),
    "cudnn": _sdpa("CUDNN_ATTENTION"),
}


def _import_fla() -> Any:
    """fla's ``chunk_gla``.

    fla keeps tuning results on disk under keys that leave out the number of heads and, for some
    kernels, K and V: a config found for one shape would be used for another. It reads the switch
    for that once, when it is imported.
    """
    name = "FLA_CACHE_RESULTS"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        return importlib.import_module("fla.ops.gla").chunk_gla
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


def _row(problem: Problem, impl: str, floor_us: float, **values: Any) -> Row:
    spec = problem.spec
    known: dict[str, Any] = {
        "us": None,
        "eager_us": None,
        "error": None,
        "config_id": None,
        "cubin_sha": None,
    }
    known.update(values)
    return Row(
        op="fwd",
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
        floor_us=floor_us,
        date=_now(),
        **known,
    )


def _floor_us(problem: Problem, harness: Harness) -> float:
    return problem.forward_bytes / harness.copy_bandwidth * 1e6


def measure(impl: str, work: Work, harness: Harness) -> Row:
    """Time and check one implementation. Never raises for what the implementation does."""
    floor = _floor_us(work.problem, harness)
    values: dict[str, Any] = {}
    notes: list[str] = []
    if harness.dead:
        return _row(work.problem, impl, floor, note=harness.dead)
    try:
        call = _BUILDERS[impl](work)
        notes += call.notes
        with torch.no_grad(), call.around():
            start = harness.clock.seconds()
            with call.first():
                o = call.fn()
                harness.clock.synchronize()
            if impl == "fla":
                notes.append(f"first call {harness.clock.seconds() - start:.1f} s")
            values["config_id"], values["cubin_sha"], note = call.identify()
            notes.append(note)
            if call.exact:
                try:
                    values["error"] = _finite(work.error(o), "error", notes)
                except Exception as error:
                    notes.append(f"error unknown: {_first_line(error)}")
            del o
            values["us"], note = harness.device_us(call.fn)
            notes.append(note)
            values["eager_us"] = harness.host_us(call.fn)
    except Exception as error:
        notes.append(_first_line(error))
        try:
            harness.clock.synchronize()
        except Exception:
            # A CUDA context that has seen an illegal access never works again.
            harness.dead = f"not run: the GPU stopped working in the call of {impl}"
    return _row(work.problem, impl, floor, note="; ".join(n for n in notes if n), **values)


def measure_yardstick(work: Work, harness: Harness) -> Row:
    """A row without a time: the error of PyTorch in kernel precision."""
    notes = ["PyTorch in kernel precision: a kernel may have twice its error"]
    value = None
    if harness.dead:
        notes = [harness.dead]
    else:
        try:
            value = _finite(work.yardstick_error(), "error", notes)
        except Exception as error:
            notes.append(_first_line(error))
    floor = _floor_us(work.problem, harness)
    return _row(work.problem, "yardstick", floor, error=value, note="; ".join(notes))


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
    impls: Sequence[str],
    harness: Harness,
    document: dict[str, Any],
    out: Path,
    *,
    seed: int = 0,
) -> None:
    """Measure and save row by row; ``document["rows"]`` grows. Progress goes to stderr."""
    total = len(problems) * len(impls)
    number = 0
    for problem in problems:
        work = Work(problem, harness.device, seed)
        if "glac" in impls:
            document["rows"].append(asdict(measure_yardstick(work, harness)))
        for impl in impls:
            number += 1
            print(f"[{number}/{total}] {problem} {impl} ...", file=sys.stderr, flush=True)
            row = measure(impl, work, harness)
            document["rows"].append(asdict(row))
            write_results(out, document)
            took = "no time" if row.us is None else f"{row.us:.1f} us"
            note = f" ({row.note})" if row.note else ""
            print(f"[{number}/{total}] {problem} {impl}: {took}{note}", file=sys.stderr)
            if harness.device.type == "cuda" and not harness.dead:
                torch.cuda.empty_cache()
        del work


def run_bench(
    shapes: Sequence[Shape] | None = None,
    gates: Sequence[str] | None = None,
    impls: Sequence[str] = IMPLS,
    *,
    out: Path | None = None,
    op: str = "fwd",
    dtype: str = "bf16",
    gate_dtype: str | None = None,
    rank: int = 16,
    seed: int = 0,
    budget_ms: float = 200.0,
    command: str | None = None,
    table: bool = True,
) -> dict[str, Any]:
    """Time implementations of GLA side by side, and save the results.

    Args:
        shapes: (B, T, H, K, V) each; the default list if None.
        gates: ``"vector"``, ``"lowrank"``; see :func:`bench_problems`.
        impls: Of ``IMPLS``, measured in this order.
        out: Results file; ``benchmarks/results/<gpu>.json`` if None.
        op: ``"fwd"``.
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
        ConfigError: an unknown op, implementation, gate, dtype or shape.
        MissingEnvironmentError: there is no GPU, or the results cannot be written.
    """
    if op != "fwd":
        raise ConfigError(f"op must be 'fwd', got {op!r}")
    unknown = [impl for impl in impls if impl not in _BUILDERS]
    if unknown or not impls:
        raise ConfigError(
            f"unknown implementations {unknown}" if unknown else "no implementation to time",
            hint=f"implementations are {', '.join(_BUILDERS)}",
        )
    problems = bench_problems(shapes, gates, dtype=dtype, gate_dtype=gate_dtype, rank=rank)
    harness = cuda_harness(budget_ms)
    env = environment(harness)
    if out is None:
        out = Path("benchmarks", "results", f"{env['gpu_spec'] or 'gpu'}.json")
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
    run_problems(problems, impls, harness, document, out, seed=seed)
    if table:
        copy = f"copy {harness.copy_bandwidth / 1e12:.2f} TB/s"
        print(f"{env['gpu']}, {dtype}, {copy}, saved: {out}")
        print(format_table(document["rows"]))
    return document


# ---- the table ----


def _problem_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("op", "B", "T", "H", "K", "V", "dtype", "gate", "gate_rank", "gate_dtype")
    return tuple(row[name] for name in names)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of a results file as text.

    ``x floor`` is time over the memory floor, ``vs glac`` time over glac's on the same problem.
    """
    ours = {_problem_key(r): r["us"] for r in rows if r["impl"] == "glac" and r["us"]}
    header = ["shape", "gate", "impl", "us", "x floor", "vs glac", "error", "note"]
    lines = [header]
    for row in rows:
        us, floor, error = row["us"], row["floor_us"], row["error"]
        glac_us = ours.get(_problem_key(row))
        note = str(row.get("note") or "")
        lines.append(
            [
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
            cell.rjust(width) if 3 <= i <= 6 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        texts.append("  ".join(cells).rstrip())
    texts.insert(1, "  ".join("-" * width for width in widths[:-1]))
    return "\n".join(texts)
