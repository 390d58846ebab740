"""What a config should take by the roofline: a guess to start a study from, never a result.

The larger of three times: bytes that have to move, products that have to be computed, and the
latency of walking chunks one after the other with as many programs at a time as fit. It knows
nothing of spills or of a compiler's whims, so it only orders candidates.
"""

from __future__ import annotations

import math

from glac.chunks_backward import kept_bytes
from glac.configs import (
    BackwardConfig,
    ChunkKernelConfig,
    ChunksBackwardConfig,
    Config,
    ForwardConfig,
    TileKernelConfig,
    padded_k,
    padded_v,
)
from glac.gpus import GpuSpec
from glac.problem import Gate, Op, Problem

_REGISTERS = 65536
_CHUNK_LATENCY = 1.1e-6
"""Seconds from one chunk to the next in a pipelined walk of [128, 128] tiles on Hopper."""
_LAUNCH = 3e-6


def _row_bytes(problem: Problem) -> tuple[float, float]:
    """Bytes a token and head has of K-wide inputs (q, k, gate), and of one V-wide tensor."""
    spec = problem.spec
    size = spec.dtype.itemsize
    gate = 0 if spec.gate is Gate.LOWRANK else spec.gate_dtype.itemsize
    return spec.K * (2 * size + gate), spec.V * size


def _at_a_time(
    problem: Problem, tile: ChunkKernelConfig | TileKernelConfig, gpu: GpuSpec, block_k: int
) -> int:
    """Programs that run at a time, limited by registers and by the stages' shared memory."""
    spec = problem.spec
    threads = 32 * tile.num_warps
    state = block_k * tile.block_v // threads
    registers = min(255, 72 + state + tile.chunk * block_k // threads)
    row = (3 * block_k + 2 * tile.block_v) * spec.dtype.itemsize
    shared = tile.chunk * row * max(1, tile.num_stages - 1)
    fit = min(_REGISTERS // (registers * threads), gpu.shared_per_block // max(1, shared), 16)
    return max(1, fit) * gpu.sm_count


def _walk_seconds(
    problem: Problem,
    tile: ChunkKernelConfig | TileKernelConfig,
    gpu: GpuSpec,
    moved: float,
    products: int,
    segments: int = 1,
) -> float:
    """One kernel, with ``products`` products a chunk of [chunk, block_k] by [block_k, block_v]."""
    spec = problem.spec
    block_k = tile.block_k if isinstance(tile, TileKernelConfig) else padded_k(spec)
    heads = problem.B * problem.H
    k_tiles = math.ceil(padded_k(spec) / block_k)
    v_tiles = math.ceil(padded_v(spec) / tile.block_v)
    programs = heads * k_tiles * v_tiles * segments
    at_a_time = _at_a_time(problem, tile, gpu, block_k)
    chunks = math.ceil(problem.T / segments / tile.chunk)
    flops = 2.0 * programs * chunks * tile.chunk * block_k * (products * tile.block_v + tile.chunk)
    waves = math.ceil(programs / at_a_time)
    # Fewer stages hide less of the copies; small tiles have less to do per chunk.
    depth = 1.0 + 0.4 * max(0, 3 - tile.num_stages)
    work = 0.35 + 0.65 * block_k * tile.block_v * tile.chunk / (128 * 128 * 32)
    step = _CHUNK_LATENCY * depth * work * max(1.0, at_a_time / gpu.sm_count / 2)
    latency = waves * chunks * step
    return _LAUNCH + max(moved / gpu.copy_bandwidth, flops / gpu.matrix_rate, latency)


def predicted_us(problem: Problem, config: Config, gpu: GpuSpec) -> float:
    """Microseconds that ``config`` should take for its op of ``problem`` on ``gpu``."""
    if config.op is Op.BACKWARD:
        # What a low-rank gate adds is the same for all configs.
        problem = problem.dense
    spec = problem.spec
    rows = problem.B * problem.H * problem.T
    k_bytes, v_bytes = _row_bytes(problem)
    if isinstance(config, ForwardConfig):
        v_tiles = math.ceil(padded_v(spec) / config.fwd.block_v)
        moved = rows * (k_bytes * v_tiles + 2 * v_bytes)
        segments = config.segments(problem.T) if config.segment else 1
        seconds = _walk_seconds(problem, config.fwd, gpu, moved, 3, segments)
        if config.summary is not None and segments > 1:
            tiles = math.ceil(padded_v(spec) / config.summary.block_v)
            again = rows * (0.7 * k_bytes * tiles + v_bytes)
            states = 8.0 * problem.B * problem.H * segments * spec.K * spec.V
            seconds += _walk_seconds(problem, config.summary, gpu, again, 1, segments)
            seconds += _LAUNCH + states / gpu.copy_bandwidth
        return seconds * 1e6
    if isinstance(config, ChunksBackwardConfig):
        v_tiles = math.ceil(padded_v(spec) / config.walks.block_v)
        k_tiles = math.ceil(padded_k(spec) / config.chunks.block_k)
        kept = float(kept_bytes(problem, config))  # written, then read
        scaled = rows * (2.0 * spec.K * spec.dtype.itemsize)
        seconds = _LAUNCH + (rows * k_bytes + 1.5 * scaled) / gpu.copy_bandwidth
        moved = 2 * scaled * v_tiles + 3 * rows * v_bytes + kept
        seconds += 2 * _walk_seconds(problem, config.walks, gpu, moved / 2, 2)
        moved = kept + rows * (2 * k_bytes + 2 * v_bytes * k_tiles)
        return (seconds + _LAUNCH + moved / gpu.copy_bandwidth) * 1e6
    if not isinstance(config, BackwardConfig):
        # An op without a model of its own: nothing to choose by but what has to move.
        return problem.bytes(config.op) / gpu.copy_bandwidth * 1e6
    grads = config.grads
    v_tiles = math.ceil(padded_v(spec) / grads.block_v)
    k_tiles = math.ceil(padded_k(spec) / grads.block_k)
    states = problem.B * problem.H * spec.K * spec.V * spec.dtype.itemsize
    states *= math.ceil(problem.T / grads.kept_tokens)
    moved = rows * (2 * k_bytes * v_tiles + 2 * v_bytes * k_tiles) + states
    seconds = _walk_seconds(problem, grads, gpu, moved, 8 if grads.dv else 6)
    if config.states is not None:
        v_tiles = math.ceil(padded_v(spec) / config.states.block_v)
        moved = rows * (k_bytes * v_tiles + v_bytes) + states
        seconds += _walk_seconds(problem, config.states, gpu, moved, 1)
    if config.dv is not None:
        tiles = math.ceil(padded_v(spec) / config.dv.block_v)
        moved = rows * (k_bytes * tiles + 2 * v_bytes)
        seconds += _walk_seconds(problem, config.dv, gpu, moved, 3)
    return seconds * 1e6
