"""What a problem costs at least, what its kernels cost, and how far apart the two are.

    memory floor    bytes that must move (``Problem.bytes``) / the GPU's copy bandwidth
    compute floor   FLOPs of the recurrence / the GPU's matrix rate
    floor           the larger of them
    predicted       a model of the chosen config, see ``predict``
    measured        tuned rows and results of `glac bench`, as found

FLOPs are those of matrix products, a multiplication and an addition each counted. Two numbers are
told apart: what the recurrence needs (``useful_flops``), and what the chunk algorithm does at the
config's tiles (``flops``), padding, cumulative gates and scores that V tiles repeat included.

Nothing here needs torch; only drawing needs matplotlib.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from glac.backward import cut, cut_segments
from glac.chunks_backward import kept_bytes, kept_in_segment
from glac.configs import (
    BackwardConfig,
    ChunkKernelConfig,
    ChunksBackwardConfig,
    CombineKernelConfig,
    Config,
    ForwardConfig,
    PrepareKernelConfig,
    TileKernelConfig,
    padded_k,
)
from glac.errors import ConfigError, MissingEnvironmentError
from glac.gpus import GPUS, RELATIVES, GpuSpec
from glac.lowrank_backward import parts_bytes, parts_of, sums_programs, written_programs
from glac.plan import segments_of
from glac.problem import DType, Gate, Op, Precision, Problem, Specialisation
from glac.templates import state_dtype, tiles

PASSES: dict[str, tuple[Op, ...]] = {
    "forward": (Op.FORWARD,),
    "backward": (Op.BACKWARD,),
    "training": (Op.FORWARD, Op.BACKWARD),
}
"""What can be asked for, and the passes of each."""

RESULTS_SCHEMA = 2
"""Of the files of `glac bench` that can be read."""

# The step model, fitted to the study of 2026-11-24 on an H200, forward, 98 candidates within 25 %
# of the best of their problem: 9 % off on average (docs/roofline.md). It holds what is common to
# all chunk kernels: a chunk's products follow each other, so each chunk costs a fixed latency, and
# small products and exponentials run at a fraction of their peak.
_STEP_US = 0.39
_PRODUCT_SLOWDOWN = 3.6
_EXP_SLOWDOWN = 1.7
_EXPS_PER_CLOCK = 16
_CLOCK = 1.755e9
_LAUNCH_US = 3.0


def matrix_rate(gpu: GpuSpec, dtype: DType) -> float:
    """Achievable FLOP/s of products beside inputs of ``dtype``.

    fp16 tiles are multiplied as TF32, at half the rate, fp32 tiles as three TF32 products.
    """
    slower = {DType.BF16: 1, DType.FP16: 2, DType.FP32: 6}
    return gpu.matrix_rate / slower[dtype]


def multiplied_as(spec: Specialisation) -> DType:
    """The inputs whose products take as long: fp32 ones multiplied once are like fp16 ones."""
    return spec.dtype if spec.precision is Precision.IEEE else DType.FP16


def useful_flops(problem: Problem, op: Op) -> int:
    """Matrix FLOPs of the recurrence, token by token.

    Forward the state's update and its read-out: 4 K V for a token of a head. Backward the same
    update once more, as nothing is saved, the update of the state's gradient, and dq, dk and dv:
    10 K V. A low-rank gate adds its product, and in the backward pass those of dx and dweight.

    Raises:
        ConfigError: the op has no such count.
    """
    spec = problem.spec
    known = {Op.FORWARD: (4, 2), Op.BACKWARD: (10, 6)}
    if op not in known:
        raise ConfigError(f"no count of FLOPs for op {op.value}", hint="ops are forward, backward")
    state, gate = known[op]
    per_token = state * spec.K * spec.V + gate * spec.rank * spec.K
    return problem.B * problem.T * problem.H * per_token


def floor_us(problem: Problem, gpu: GpuSpec, op: Op) -> float:
    """Microseconds that no implementation of one pass can go below: memory's or compute's."""
    memory = problem.bytes(op) / gpu.copy_bandwidth
    rate = matrix_rate(gpu, multiplied_as(problem.spec))
    return max(memory, useful_flops(problem, op) / rate) * 1e6


# ---- what kernels do ----


@dataclass(frozen=True)
class KernelWork:
    """All launches of one template in one pass.

    Attributes:
        template: its name.
        launches: how many.
        programs: of one launch.
        steps: chunks that a program walks, over all launches.
        warps: of a program.
        flops: matrix FLOPs of all programs.
        exps: exponentials of all programs.
        bytes: read and written, if the tiles of a head find each other's inputs in the L2 cache.
        us: predicted time.
    """

    template: str
    launches: int
    programs: int
    steps: int
    warps: int
    flops: int
    exps: int
    bytes: int
    us: float


def _gate_step(spec: Specialisation, chunk: int, keys: int) -> tuple[int, int]:
    """FLOPs and exponentials from a chunk's gate to its cumulative gate.

    The sum is a product with a triangle of ones; an fp32 gate beside bf16 takes two.
    """
    split = spec.gate is Gate.VECTOR and spec.gate_dtype is not spec.dtype
    sums = 2 * chunk * chunk * keys * (2 if split and spec.dtype is DType.BF16 else 1)
    if spec.gate is Gate.LOWRANK:
        return sums + 2 * chunk * max(16, spec.rank) * keys, chunk * keys
    if spec.gate is Gate.VECTOR:
        return sums, 0
    raise ConfigError(
        f"no count of FLOPs for a {spec.gate.value} gate", hint="gates are vector, lowrank"
    )


def _step(
    template: str,
    spec: Specialisation,
    config: ChunkKernelConfig | TileKernelConfig | PrepareKernelConfig,
) -> tuple[int, int]:
    """Matrix FLOPs and exponentials of one program for one chunk, padding included."""
    C = config.chunk
    BK = config.block_k if isinstance(config, TileKernelConfig) else padded_k(spec)
    flops, exps = _gate_step(spec, C, BK)
    by_key = 2 * C * C * BK
    if isinstance(config, PrepareKernelConfig):  # scores
        return flops + by_key, exps + 2 * C * BK
    BV = config.block_v
    state, by_value = 2 * C * BK * BV, 2 * C * C * BV
    if template == "gla_walk":  # read-out, update; scores times values
        return 2 * state + by_value, 0
    if template == "gla_walk_states":  # update
        return state, 0
    if template == "gla_bwd_walks":  # of two programs one makes an update, one as gla_walk
        return (3 * state + by_value) // 2, 0
    if template == "gla_bwd_chunks":  # S do, dS v, dA for each tile of V; then as gla_bwd
        tiles = math.ceil(spec.V / BV)
        found_again = int(isinstance(config, TileKernelConfig) and config.keep > 1)
        suffix = (2 if spec.dtype is DType.BF16 else 1) * by_key
        flops += tiles * ((2 + found_again) * state + by_value) + 2 * by_key + suffix
        return flops, exps + 2 * C * BK
    if template == "gla_fwd":  # read-out, update; scores; scores times values
        return flops + 2 * state + by_key + by_value, exps + 2 * C * BK
    if template == "gla_states":  # update
        return flops + state, exps + C * BK
    if template == "gla_bwd_dv":  # read-out, update; scores; scores times do
        return flops + 2 * state + by_key + by_value, exps + 2 * C * BK
    if template == "gla_bwd" and isinstance(config, TileKernelConfig):
        # S do, dS v, q do; dA; dA k and dA q; the suffix sum, in two parts beside bf16.
        suffix = (2 if spec.dtype is DType.BF16 else 1) * by_key
        flops += 3 * state + by_value + 2 * by_key + suffix
        if config.dv:  # k dS; scores; scores times do
            flops += state + by_key + by_value
        if config.keep > 1:  # states between kept ones
            again, more = _gate_step(spec, C, BK)
            flops += (again + state) * (config.keep - 1) // config.keep
            exps += (more + C * BK) * (config.keep - 1) // config.keep
        return flops, exps + 2 * C * BK
    raise ConfigError(
        f"no count of FLOPs for kernel {template}", hint="add it to glac.roofline._step"
    )


def predict(
    gpu: GpuSpec, dtype: DType, *, programs: int, steps: int, warps: int, flops: int, exps: int,
    bytes: int, launches: int,
) -> float:  # fmt: skip
    """Microseconds of a kernel that walks chunks, by the step model.

    A chunk takes a fixed latency and its work, at the model's share of the peak of one SM.
    Programs that share an SM (a thread has 255 registers, so 8 warps fill it) hide each other's
    latency and share its rates. The slower of this chain and of memory counts.

    Args:
        gpu: where.
        dtype: of the inputs.
        programs: of one launch.
        steps: chunks that each walks, over all launches.
        warps: of a program.
        flops, exps, bytes: of all programs.
        launches: each has its start.
    """
    memory = bytes / gpu.copy_bandwidth * 1e6
    chain = 0.0
    if steps:
        resident = min(math.ceil(programs / gpu.sm_count), max(1, 8 // warps))
        waves = math.ceil(programs / (gpu.sm_count * resident))
        share = 1e6 / (programs * steps)
        products = flops * share / (matrix_rate(gpu, dtype) / gpu.sm_count)
        work = _PRODUCT_SLOWDOWN * products + _EXP_SLOWDOWN * exps * share / (
            _EXPS_PER_CLOCK * _CLOCK
        )
        chain = waves * steps * max(resident * work, _STEP_US + work)
    return launches * _LAUNCH_US + max(memory, chain)


def _work(
    gpu: GpuSpec,
    spec: Specialisation,
    template: str,
    config: ChunkKernelConfig | TileKernelConfig | PrepareKernelConfig | None,
    programs: int,
    steps: int,
    moved: int,
    launches: int = 1,
) -> KernelWork:
    """``config`` is None for kernels that walk nothing."""
    flops, exps = _step(template, spec, config) if config else (0, 0)
    warps = config.num_warps if config else 4
    total = {"flops": flops * programs * steps, "exps": exps * programs * steps, "bytes": moved}
    us = predict(
        gpu,
        multiplied_as(spec),
        programs=programs,
        steps=steps,
        warps=warps,
        launches=launches,
        **total,
    )
    return KernelWork(template, launches, programs, steps, warps, us=us, **total)


def _summary_work(
    problem: Problem,
    gpu: GpuSpec,
    config: ChunkKernelConfig,
    segments: int,
    length: int,
    inputs: int,
    heads: int,
) -> list[KernelWork]:
    """What segments add to the state, and its chain; the last one adds to nothing."""
    spec = problem.spec
    states = segments * problem.B * heads * spec.K * spec.V * DType.FP32.itemsize
    programs = tiles("gla_states", spec, config) * (segments - 1) * problem.B * heads
    combine = tiles("gla_combine", spec, CombineKernelConfig()) * problem.B * heads
    read = inputs * (segments - 1) // segments
    steps = math.ceil(length / config.chunk)
    return [
        _work(gpu, spec, "gla_states", config, programs, steps, read + states),
        _work(gpu, spec, "gla_combine", None, combine, 0, 2 * states),
    ]


def _way_steps(tokens: int, lead: int) -> int:
    """Steps on the way to a segment, by what they take: half of one with outputs."""
    return math.ceil(tokens / lead / 2)


def _forward_work(problem: Problem, config: ForwardConfig, gpu: GpuSpec) -> list[KernelWork]:
    if config.prepare is not None:
        return _prepared_work(problem, config, config.prepare, gpu)
    spec, sizes = problem.spec, problem.tensor_bytes
    segments, length = segments_of(problem, config.segment)
    found = []
    moved = problem.bytes(Op.FORWARD)
    if segments > 1 and config.summary is not None:
        inputs = sizes["k"] + sizes["v"] + sizes["gate"]
        heads = problem.state_heads
        found = _summary_work(problem, gpu, config.summary, segments, length, inputs, heads)
        moved += segments * problem.state_bytes
    programs = tiles("gla_fwd", spec, config.fwd) * segments * problem.B * problem.H
    steps = math.ceil(length / config.fwd.chunk)
    if config.fwd.lead and segments > 1:
        # The first program has no way to go, the last one the longest.
        before = (segments - 1) * length
        last = math.ceil((problem.T - before) / config.fwd.chunk)
        steps = max(steps, last + _way_steps(before, config.fwd.lead))
        moved += segments * problem.state_bytes
    return [*found, _work(gpu, spec, "gla_fwd", config.fwd, programs, steps, moved)]


def _prepared_work(
    problem: Problem, config: ForwardConfig, prepare: PrepareKernelConfig, gpu: GpuSpec
) -> list[KernelWork]:
    """Scaled tiles and scores go through memory once; V tiles find each other's in L2."""
    spec, sizes, walk = problem.spec, problem.tensor_bytes, config.fwd
    segments, length = segments_of(problem, config.segment)
    heads = problem.B * problem.H
    programs = heads * math.ceil(problem.T / prepare.chunk)
    size = state_dtype(spec).itemsize
    tile = heads * problem.T * padded_k(spec) * size
    ends = heads * problem.T * padded_k(spec) * DType.FP32.itemsize // prepare.chunk
    made = 2 * tile + heads * problem.T * prepare.chunk * size + ends
    inputs = sizes["q"] + sizes["k"] + sizes["gate"]
    found = [_work(gpu, spec, "gla_prepare", prepare, programs, 1, inputs + made)]
    moved = problem.bytes(Op.FORWARD) - inputs + made
    if segments > 1 and config.summary is not None:
        states = segments * problem.state_bytes
        read = (tile + ends + sizes["v"]) * (segments - 1) // segments
        walkers = (segments - 1) * problem.B * problem.state_heads
        combine = tiles("gla_combine", spec, CombineKernelConfig()) * problem.B
        found += [
            _work(
                gpu,
                spec,
                "gla_walk_states",
                config.summary,
                tiles("gla_walk_states", spec, config.summary) * walkers,
                math.ceil(length / config.summary.chunk),
                read + states,
            ),
            _work(gpu, spec, "gla_combine", None, combine * problem.state_heads, 0, 2 * states),
        ]
        moved += states
    programs = tiles("gla_walk", spec, walk) * segments * heads
    steps = math.ceil(length / walk.chunk)
    return [*found, _work(gpu, spec, "gla_walk", walk, programs, steps, moved)]


def kept_states_bytes(problem: Problem, config: BackwardConfig | ChunksBackwardConfig) -> int:
    """States that a backward pass keeps for itself at the most: of chunks, and of segments."""
    spec = problem.spec
    if isinstance(config, ChunksBackwardConfig):
        segments = cut_segments(problem, config)[0]
        marks = 0 if segments == 1 else (problem.H + problem.state_heads) * segments
        marks *= problem.B * spec.K * spec.V * DType.FP32.itemsize
        return kept_bytes(problem, config) + marks
    way = cut(problem, config)
    grads = config.grads
    slots = way.at_once * math.ceil(min(way.length, problem.T) / grads.kept_tokens)
    kept = slots * problem.B * problem.state_heads * spec.K * spec.V
    programs = tiles("gla_bwd", spec, grads) * problem.B * problem.H * way.at_once
    kept += programs * grads.found_again
    kept *= state_dtype(spec).itemsize
    if way.segments == 1:
        return kept
    starts = problem.B * problem.H * way.segments * spec.K * spec.V * DType.FP32.itemsize
    # Windows keep both in one place unless heads share a state.
    shared = way.chained and problem.s_group == 1
    return kept + (starts if shared else starts + way.segments * problem.state_bytes)


def _borders_work(
    problem: Problem, gpu: GpuSpec, states: ChunkKernelConfig, segments: int, length: int
) -> list[KernelWork]:
    """What finds the state before each segment and, back in time, the gradient behind it."""
    sizes = problem.tensor_bytes
    inputs = sizes["k"] + sizes["v"] + sizes["gate"]
    back = sizes["q"] + sizes["o"] + sizes["gate"]
    forward = _summary_work(problem, gpu, states, segments, length, inputs, problem.state_heads)
    return [*forward, *_summary_work(problem, gpu, states, segments, length, back, problem.H)]


def _backward_work(
    problem: Problem, config: BackwardConfig, gpu: GpuSpec, lowrank: bool
) -> list[KernelWork]:
    """Of a dense gate; ``lowrank``: it was written out."""
    spec, grads, sizes = problem.spec, config.grads, problem.tensor_bytes
    way = cut(problem, config)
    launches = math.ceil(way.segments / way.at_once)
    k_tiles, v_tiles = math.ceil(spec.K / grads.block_k), math.ceil(spec.V / grads.block_v)
    inputs = sizes["k"] + sizes["v"] + sizes["gate"]
    found = []
    walked = launches * way.length  # by each program of gla_states, over all launches
    if config.states is None:
        # What programs read on their ways, their neighbours read as well.
        marks = way.segments * problem.state_bytes
    elif way.chained:
        # The first launch walks the whole sequence, each later one its window: all but the last.
        walked = problem.T + (launches - 1) * way.length
        inputs = inputs * walked // problem.T
        marks = 2 * (way.segments - 1) * problem.state_bytes
    else:
        found += _borders_work(problem, gpu, config.states, way.segments, way.length)
        marks = 2 * way.segments * problem.state_bytes
    chunks = math.ceil(problem.T / grads.chunk)
    states = math.ceil(problem.T / grads.kept_tokens)
    states *= problem.B * problem.state_heads * spec.K * spec.V * state_dtype(spec).itemsize
    if config.states is not None:
        found.append(
            _work(
                gpu,
                spec,
                "gla_states",
                config.states,
                tiles("gla_states", spec, config.states)
                * way.at_once
                * problem.B
                * problem.state_heads,
                math.ceil(walked / config.states.chunk),
                inputs + states + marks,
                launches,
            )
        )
    # Gradients come out for each head of the output, and for each tile.
    token_heads = problem.B * problem.T * problem.H
    gate_parts = v_tiles * token_heads * spec.K * spec.gate_dtype.itemsize
    key_parts = 2 * v_tiles * token_heads * spec.K * spec.dtype.itemsize
    values = token_heads * spec.V * spec.dtype.itemsize
    moved = sum(sizes.values()) + states + key_parts + gate_parts + (values if grads.dv else 0)
    programs = k_tiles * v_tiles * problem.B * problem.H * way.at_once
    steps = chunks if way.chained else launches * math.ceil(way.length / grads.chunk)
    if grads.lead:
        # To the segment from both ends, and through it for its states.
        steps += launches * _way_steps(problem.T, grads.lead)
        moved += marks
    found += [
        _work(gpu, spec, "gla_bwd", grads, programs, steps, moved, launches),
        _work(gpu, spec, "gla_bwd_exact", None, programs, 0, 0, launches),
    ]
    if config.dv is not None:
        found.append(
            _work(
                gpu,
                spec,
                "gla_bwd_dv",
                config.dv,
                tiles("gla_bwd_dv", spec, config.dv) * way.segments * problem.B * problem.H,
                math.ceil(min(way.length, problem.T) / config.dv.chunk),
                sizes["q"] + sizes["k"] + sizes["gate"] + sizes["o"] + values,
            )
        )
    if v_tiles > 1:
        summed = key_parts + sizes["q"] + sizes["k"]
        if not lowrank:  # else what follows adds them up
            summed += gate_parts + sizes["gate"]
        found.append(_work(gpu, spec, "sums of parts", None, 1, 0, summed, 3))
    return found


def _chunks_work(problem: Problem, config: ChunksBackwardConfig, gpu: GpuSpec) -> list[KernelWork]:
    spec, sizes = problem.spec, problem.tensor_bytes
    (segments, length), walks, tile = cut_segments(problem, config), config.walks, config.chunks
    found: list[KernelWork] = []
    if segments > 1:
        found += _borders_work(problem, gpu, config.states, segments, length)
    heads, token_heads = problem.B * problem.H, problem.B * problem.T * problem.H
    size = state_dtype(spec).itemsize
    prepared = heads * math.ceil(problem.T / walks.chunk)
    scaled = 2 * token_heads * padded_k(spec) * size
    scores = token_heads * walks.chunk * size
    read = sizes["q"] + sizes["k"] + sizes["gate"]
    pre = config.prepare
    found.append(_work(gpu, spec, "gla_prepare", pre, prepared, 1, read + scaled + scores))
    # The walk back reads both scaled tiles, the walk forward one; each V tile, from L2.
    values = token_heads * spec.V * spec.dtype.itemsize
    states = kept_bytes(problem, config)
    programs = tiles("gla_bwd_walks", spec, walks) * segments * heads
    steps = math.ceil(min(length, problem.T) / walks.chunk)
    moved = scaled * 3 // 2 + scores + sizes["v"] + sizes["o"] + values + states
    found += [
        _work(gpu, spec, "gla_bwd_walks", walks, programs, steps, moved),
        _work(gpu, spec, "gla_bwd_walks_exact", None, programs, 0, 0),
    ]
    programs = tiles("gla_bwd_chunks", spec, tile) * segments * heads
    programs *= kept_in_segment(problem, config) * tile.keep
    gate = token_heads * spec.K * spec.gate_dtype.itemsize
    moved = sum(sizes.values()) + states + 2 * token_heads * spec.K * spec.dtype.itemsize + gate
    found += [
        _work(gpu, spec, "gla_bwd_chunks", tile, programs, 1, moved),
        _work(gpu, spec, "gla_bwd_chunks_exact", None, programs, 0, 0),
    ]
    if problem.s_group > 1 or problem.q_group > 1 or problem.k_group > 1:
        summed = 3 * token_heads * spec.K * spec.dtype.itemsize + values
        found.append(_work(gpu, spec, "sums of parts", None, 1, 0, summed, 3))
    return found


def _around_gate(
    problem: Problem, dense: Iterable[KernelWork], parts: int, gpu: GpuSpec
) -> Iterator[KernelWork]:
    """The backward pass of a low-rank gate, from that of a dense one, its gradient in parts."""
    spec = problem.spec
    tokens, channels = problem.B * problem.T, problem.state_heads * spec.K
    inputs = problem.tensor_bytes["gate"]
    gate = tokens * channels * spec.dense.gate_dtype.itemsize
    sums = parts_bytes(problem)
    product = 2 * tokens * channels * max(16, spec.rank)

    def moving(
        template: str, programs: int, moved: int, products: int = 0, exps: int = 0
    ) -> KernelWork:
        total = {"flops": products * product, "exps": exps, "bytes": moved}
        us = predict(
            gpu, multiplied_as(spec), programs=programs, steps=0, warps=4, launches=1, **total
        )
        return KernelWork(template, 1, programs, 0, 4, us=us, **total)

    written = written_programs(problem)
    yield moving("gla_gate", written, inputs + gate, 1, tokens * channels)
    yield from dense
    in_x, in_w = parts_of(problem)
    read = inputs + gate * parts * problem.s_group
    yield moving("gla_gate_bwd", in_x * in_w, read + sums, 3, tokens * channels)
    yield moving("gla_gate_sums", sums_programs(problem), sums + inputs)


def kernel_work(problem: Problem, config: Config, gpu: GpuSpec) -> tuple[KernelWork, ...]:
    """What each kernel of a config does for a problem, in launch order.

    Raises:
        ConfigError: a kernel whose work is not known here, or a packed batch.
    """
    if problem.packed:
        raise ConfigError(
            "the work of a packed batch is not counted: it depends on the sequences' lengths",
            hint="count a dense batch of their mean length",
        )
    if isinstance(config, ForwardConfig):
        return tuple(_forward_work(problem, config, gpu))
    if isinstance(config, BackwardConfig | ChunksBackwardConfig):
        dense, lowrank = problem.dense, problem.spec.gate is Gate.LOWRANK
        if isinstance(config, BackwardConfig):
            found = _backward_work(dense, config, gpu, lowrank)
            parts = math.ceil(dense.spec.V / config.grads.block_v)
        else:
            found, parts = _chunks_work(dense, config, gpu), 1
        return tuple(_around_gate(problem, found, parts, gpu) if lowrank else found)
    raise ConfigError(f"no count of FLOPs for a {type(config).__name__}")


# ---- what was measured ----


@dataclass(frozen=True)
class Measurement:
    """A time that was measured for exactly this problem.

    Attributes:
        us: device time, microseconds.
        floor_us: on that device; of results of `glac bench`, at the bandwidth of the same run.
        device: its name.
        gpu: the listed GPU that it is, empty if it is none.
        source: file.
        date: of the measurement, ISO.
        config_id: what served it, empty if unknown.
    """

    us: float
    floor_us: float
    device: str
    gpu: str
    source: str
    date: str
    config_id: str

    @property
    def share(self) -> float:
        """Of the floor: 1.0 is as fast as memory allows."""
        return self.floor_us / self.us


def named_gpu(device: str) -> GpuSpec | None:
    """The listed GPU in a device's name, such as ``NVIDIA H200``; None if there is none."""
    text = device.lower()
    for gpu in GPUS.values():
        model, *variant = gpu.name.split("-")
        # An H100 NVL or an A100 PCIe is neither an H100 nor an A100 with the listed bandwidth.
        if model in text and all((word in text) is (word in variant) for word in ("pcie", "nvl")):
            return gpu
    return None


def tuned_measurements(problem: Problem, gpu: GpuSpec, op: Op) -> list[Measurement]:
    """Times in the tuned files that came with glac, of the GPU and its relatives."""
    if op is Op.DECODE:  # a row's time is that of two calls, with fp32 and with bf16 states
        return []
    from glac.tuned import shipped

    found: dict[tuple[str, float], Measurement] = {}
    for name in (gpu.name, *RELATIVES.get(gpu.name, ())):
        file = shipped(name) if name in GPUS else None
        for row in file.rows if file else ():
            device = row.stats.measured_on or (file.measured_on if file else "")
            spec = named_gpu(device)
            if row.op is not op or row.problem != problem or spec is None or not row.stats.us:
                continue
            key = device, row.stats.us  # a file may hold the rows of a relative
            found.setdefault(
                key,
                Measurement(
                    us=row.stats.us,
                    floor_us=floor_us(problem, spec, op),
                    device=device,
                    gpu=spec.name,
                    source=f"tuned_configs/{name}.yaml",
                    date=file.environment.date if file else "",
                    config_id=row.config.slug,
                ),
            )
    return list(found.values())


Results = Sequence[tuple[str, Mapping[str, Any]]]
"""Parsed files of `glac bench`, with the name of each."""


def load_results(paths: Iterable[Path]) -> list[tuple[str, Mapping[str, Any]]]:
    """Read results of `glac bench`.

    Raises:
        ConfigError: a file cannot be read, or is none.
    """
    found = []
    for path in paths:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"{path}: cannot be read ({reason})", hint="`glac bench --out FILE` writes one"
            ) from None
        found.append((path.name, _checked(path.name, document)))
    return found


def _checked(name: str, document: Any) -> Mapping[str, Any]:
    fields = {"env": dict, "rows": list}
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != RESULTS_SCHEMA or not all(
        isinstance(document.get(key), kind) for key, kind in fields.items()
    ):
        raise ConfigError(
            f"{name}: wanted results of `glac bench` of schema {RESULTS_SCHEMA}, got "
            f"schema {schema!r}",
            hint="run `glac bench` again",
        )
    return dict(document)


def checkout_results() -> list[tuple[str, Mapping[str, Any]]]:
    """Results in a checkout's ``benchmarks/results``; none where glac is installed."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found += load_results([path])
        except ConfigError:  # results of another benchmark
            continue
    return found


def bench_measurements(problem: Problem, op: str, results: Results) -> list[Measurement]:
    """Times of glac for ``op`` (a key of ``PASSES``) of exactly this problem.

    Raises:
        ConfigError: a row lacks what it must have.
    """
    spec = problem.spec
    wanted = {
        **{"op": op, "impl": "glac", "B": problem.B, "T": problem.T, "H": problem.H},
        **{"K": spec.K, "V": spec.V, "dtype": spec.dtype.value, "gate": spec.gate.value},
        **{"gate_rank": spec.rank, "gate_dtype": spec.gate_dtype.value},
    }
    found = []
    for name, document in results:
        for row in document["rows"]:
            try:
                if any(row[key] != value for key, value in wanted.items()) or not row["us"]:
                    continue
                device = str(document["env"]["gpu"])
                floor = float(row["floor_us"])
                listed = named_gpu(device)
                if listed is not None:
                    copy = float(document["env"]["copy_bandwidth"])
                    spec_then = replace(listed, copy_bandwidth=copy)
                    floor = sum(floor_us(problem, spec_then, part) for part in PASSES[op])
                found.append(
                    Measurement(
                        us=float(row["us"]),
                        floor_us=floor,
                        device=device,
                        gpu=listed.name if listed else "",
                        source=name,
                        date=str(row["date"]),
                        config_id=str(row.get("config_id") or ""),
                    )
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"{name}: a row has no valid {error}") from None
    return found


# ---- together ----


@dataclass(frozen=True)
class Roofline:
    """Costs of one op of a problem on a GPU.

    Attributes:
        problem: what.
        op: a key of ``PASSES``.
        gpu: where.
        bytes: that must move.
        useful_flops: of the recurrence.
        config_id: of the chosen kernels.
        served_by: pack, build or torch, and why.
        kernels: what they do.
        measured: times of exactly this problem, those of this GPU first, then the newest first.
    """

    problem: Problem
    op: str
    gpu: GpuSpec
    bytes: int
    useful_flops: int
    config_id: str
    served_by: str
    kernels: tuple[KernelWork, ...]
    measured: tuple[Measurement, ...] = ()

    @property
    def rate(self) -> float:
        """Achievable FLOP/s for this dtype and precision."""
        return matrix_rate(self.gpu, multiplied_as(self.problem.spec))

    @property
    def flops(self) -> int:
        """Matrix FLOPs of the chosen kernels."""
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def moved_bytes(self) -> int:
        """What the chosen kernels read and write."""
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def intensity(self) -> float:
        """FLOPs of the chosen kernels for each byte that must move."""
        return self.flops / self.bytes

    @property
    def memory_us(self) -> float:
        return self.bytes / self.gpu.copy_bandwidth * 1e6

    @property
    def compute_us(self) -> float:
        """Of the recurrence's FLOPs."""
        return self.useful_flops / self.rate * 1e6

    @property
    def algorithm_us(self) -> float:
        """Of the chosen kernels' FLOPs: what their tiles cost at the matrix units' best."""
        return self.flops / self.rate * 1e6

    @property
    def floor_us(self) -> float:
        """The larger of memory's and compute's, of each pass."""
        return sum(floor_us(self.problem, self.gpu, part) for part in PASSES[self.op])

    @property
    def predicted_us(self) -> float:
        return sum(kernel.us for kernel in self.kernels)

    @property
    def predicted_share(self) -> float:
        """Of the floor."""
        return self.floor_us / self.predicted_us

    @property
    def best_measured(self) -> Measurement | None:
        return self.measured[0] if self.measured else None

    def to_dict(self) -> dict[str, Any]:
        spec = self.problem.spec
        return {
            "op": self.op,
            **{"B": self.problem.B, "T": self.problem.T, "H": self.problem.H},
            **spec.to_dict(),
            "gpu": self.gpu.name,
            "bytes": self.bytes,
            "moved_bytes": self.moved_bytes,
            "flops": self.flops,
            "useful_flops": self.useful_flops,
            "intensity": self.intensity,
            "memory_us": self.memory_us,
            "compute_us": self.compute_us,
            "algorithm_us": self.algorithm_us,
            "floor_us": self.floor_us,
            "config_id": self.config_id,
            "served_by": self.served_by,
            "predicted_us": self.predicted_us,
            "predicted_share": self.predicted_share,
            "kernels": [vars(kernel) for kernel in self.kernels],
            "measured": [{**vars(item), "share": item.share} for item in self.measured],
        }


def _chosen(problem: Problem, gpu: GpuSpec, op: Op) -> tuple[Config, str]:
    """The config that serves, and by what; where PyTorch serves, what a build would take."""
    from glac.dispatch import decide, miss_config
    from glac.settings import load_settings

    # GLAC_REQUIRE_AOT forbids to run without a pack, not to reckon.
    decision = decide(problem, gpu, op, replace(load_settings(), require_aot=False))
    config = decision.config or miss_config(problem, gpu, op)
    return config, f"{decision.provider}: {decision.reason}"


def chosen_config(problem: Problem, gpu: GpuSpec, op: Op) -> Config:
    """The config that serves an op of a problem, or would if there were a compiler."""
    return _chosen(problem, gpu, op)[0]


def _ordered(found: Iterable[Measurement], gpu: GpuSpec) -> tuple[Measurement, ...]:
    newest = sorted(found, key=lambda item: item.date, reverse=True)
    return tuple(sorted(newest, key=lambda item: item.gpu != gpu.name))


def roofline(
    problem: Problem,
    gpu: GpuSpec,
    op: str = "forward",
    *,
    config: Config | None = None,
    results: Results = (),
) -> Roofline:
    """Floors, the chosen kernels' work and times of one op of a problem.

    Args:
        problem: what.
        gpu: where.
        op: ``forward``, ``backward``, or ``training`` for both together.
        config: instead of the one that dispatch chooses; not for ``training``.
        results: files of `glac bench` to look for times in, beside the tuned files.

    Raises:
        ConfigError: unknown op, a config of another op, or kernels whose work is not known.
    """
    if op not in PASSES:
        raise ConfigError(f"unknown op {op!r}", hint=f"ops are {', '.join(PASSES)}")
    if config is not None and PASSES[op] != (config.op,):
        raise ConfigError(f"a config of the {config.op.value} pass is none of op {op}")
    kernels: list[KernelWork] = []
    names, served = [], []
    for part in PASSES[op]:
        chosen, why = (config, "as given") if config else _chosen(problem, gpu, part)
        kernels += kernel_work(problem, chosen, gpu)
        names.append(chosen.slug)
        served.append(why)
    measured = bench_measurements(problem, op, results)
    if len(PASSES[op]) == 1:
        measured += tuned_measurements(problem, gpu, PASSES[op][0])
    return Roofline(
        problem=problem,
        op=op,
        gpu=gpu,
        bytes=sum(problem.bytes(part) for part in PASSES[op]),
        useful_flops=sum(useful_flops(problem, part) for part in PASSES[op]),
        config_id=" | ".join(names),
        served_by=" | ".join(dict.fromkeys(served)),
        kernels=tuple(kernels),
        measured=_ordered(measured, gpu),
    )


# ---- the chart ----


class ChartPoint(NamedTuple):
    """Something with an arithmetic intensity.

    Attributes:
        label: what it is.
        intensity: FLOP for each byte.
        bound: FLOP/s under the roof.
        predicted: FLOP/s of the model, None if there is no prediction.
        measured: FLOP/s on this GPU, None if it was not measured there.
    """

    label: str
    intensity: float
    bound: float
    predicted: float | None = None
    measured: float | None = None


class Chart(NamedTuple):
    """Everything that is drawn."""

    title: str
    subtitle: str
    bandwidth: float
    rate: float
    points: tuple[ChartPoint, ...]


def gate_label(spec: Specialisation) -> str:
    """The gate as tables show it, such as ``lowrank16`` or ``vector fp32``."""
    rank = str(spec.rank) if spec.rank else ""
    wide = f" {spec.gate_dtype.value}" if spec.gate_dtype is not spec.dtype else ""
    return f"{spec.gate.value}{rank}{wide}"


def chart(rows: Sequence[Roofline]) -> Chart:
    """The roofline chart of problems on one GPU with inputs of one dtype.

    Raises:
        ConfigError: nothing to draw, or several GPUs or dtypes, which have several roofs.
    """
    roofs = {(row.gpu.name, row.problem.spec.dtype) for row in rows}
    if len(roofs) != 1:
        raise ConfigError(
            f"a chart has one roof, got {len(roofs)}", hint="draw one GPU and one dtype at a time"
        )
    first = rows[0]
    points = []
    for row in rows:
        p, spec = row.problem, row.problem.spec
        time = row.best_measured
        here = time is not None and time.gpu == row.gpu.name
        points.append(
            ChartPoint(
                label=f"{p.B},{p.T},{p.H},{spec.K},{spec.V} {gate_label(spec)} {row.op}",
                intensity=row.intensity,
                bound=min(row.rate, row.intensity * row.gpu.copy_bandwidth),
                predicted=row.flops / row.predicted_us * 1e6,
                measured=row.flops / time.us * 1e6 if time and here else None,
            )
        )
    return Chart(
        title=f"Gated linear attention on {first.gpu.title}, {first.problem.spec.dtype.value}",
        subtitle=f"{first.gpu.copy_bandwidth / 1e12:.2f} TB/s of copies, "
        f"{first.rate / 1e12:.0f} TFLOP/s of products; FLOPs of the chosen kernels for each byte "
        "that must move",
        bandwidth=first.gpu.copy_bandwidth,
        rate=first.rate,
        points=tuple(points),
    )


def draw(data: Chart, out: Path) -> None:
    """Write a chart; the suffix of ``out`` decides the format.

    Raises:
        MissingEnvironmentError: matplotlib is missing, or the file cannot be written.
        ConfigError: a format that matplotlib does not know.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise MissingEnvironmentError(
            "drawing needs the Python package matplotlib, which is not installed",
            hint="pip install 'glac[bench]', or leave -o out",
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    tera = 1e-12
    xs = [point.intensity for point in data.points]
    ridge = data.rate / data.bandwidth
    low, high = min([*xs, ridge]) / 2, max([*xs, ridge]) * 2
    lines = len(data.points)
    height = max(5.0, 1.4 + 0.19 * lines)
    figure, axes = pyplot.subplots(figsize=(11.5, height), dpi=150)
    roof = [low * data.bandwidth * tera, data.rate * tera, data.rate * tera]
    axes.loglog([low, ridge, high], roof, color="#D55E00", lw=1.6, zorder=1)
    colours = matplotlib.colormaps["viridis"].resampled(max(2, lines))
    for index, point in enumerate(data.points):
        # The lightest colours cannot be told from the paper.
        colour = colours(0.8 * index / max(1, lines - 1))
        known = [value for value in (point.measured, point.predicted) if value is not None]
        heights = [value * tera for value in (point.bound, *known)]
        axes.plot([point.intensity] * len(heights), heights, color=colour, lw=0.7, zorder=2)
        if not known:
            axes.plot(point.intensity, heights[0], "o", color=colour, ms=6)
        if point.predicted is not None:
            axes.plot(point.intensity, point.predicted * tera, "o", mfc="white", mec=colour, ms=6)
        if point.measured is not None:
            axes.plot(point.intensity, point.measured * tera, "o", color=colour, ms=6)
        # Tiles of one size give one intensity: neighbours are named on different sides.
        side = 1 if index % 2 else -1
        axes.annotate(
            str(index + 1),
            (point.intensity, heights[1] if known else heights[0]),
            xytext=(5 * side, 0) if known else (5, -8 if side > 0 else -13),
            textcoords="offset points",
            ha="left" if side > 0 or not known else "right",
            va="center",
            fontsize=7,
            color="#222222",
        )
        axes.plot([], [], "o", color=colour, ms=5, label=f"{index + 1}  {point.label}")
    axes.set_xlim(low, high)
    axes.set_xlabel("FLOP / byte")
    axes.set_ylabel("TFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(which="both", color="#E8E8E8", lw=0.5, zorder=0)
    axes.set_axisbelow(True)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=7.5, borderpad=0
    )
    if any(point.predicted is not None for point in data.points):
        note = "; filled: measured, open: predicted"
    else:
        note = ""
    top = 1 - 0.22 / height
    figure.text(0.01, top, data.title, fontsize=11.5)
    figure.text(0.01, top - 0.2 / height, data.subtitle + note, fontsize=8, color="#444444")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / height))
    try:
        figure.savefig(out)
    except ValueError as error:
        raise ConfigError(
            f"{out}: cannot be drawn ({error})", hint="for example -o x.png"
        ) from None
    except OSError as error:
        raise MissingEnvironmentError(
            f"cannot write {out}: {error.strerror or error}", hint="choose another file with -o"
        ) from None
    finally:
        pyplot.close(figure)
