"""What a study may try: the declared search space of each problem.

Forward:

    chunk     16 32 64 128                block_v   32 64 128 256, at most V padded
    warps     4 8, and 2 for small tiles  stages    1 2 3 4
    tma       no, yes (Hopper)            segment   0, and powers of two from 256 to T/2

    lead      where heads are few and sequences short, bf16 on Hopper: the chunk; the first segment
              has half of the sequence or more

    prepare   where V >= 2K, bf16 on Hopper: chunk 32 64, block_k 32 64, warps 2 4, stages 1 2 3

Backward, the three kernels one after the other, so that each list is short:

    gradients of q, k, gate (and v)       chunk 16 32, block_k and block_v to 128, warps 4 8,
                                          stages 2 3 4, tma; with v only where a tile has all of K;
                                          states kept every chunk, or every 4 or 8
    lead                                  as forward, the chunk or twice as much; segments of a
                                          quarter to a half of the sequence
    states, gradient of v                 as forward
    all chunks' gradients at once         bf16 on Hopper, where V >= 2K, or a low-rank gate and
                                          K > 64: a few tiles for each kernel
    segment                               what suits the heads and the length, or 0

Scalar gate: the same tiles forward, each with the state either way round; backward a few of them
for each kernel. Decoding: block_v and warps.

Two filters make a list of candidates from it. Legality is ``glac.configs.why_illegal``. Pruning
drops what cannot win, on grounds that are written beside each rule, so that a problem costs
minutes of compilation and all that is left can be timed. Nothing here needs torch or a GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from glac.configs import (
    CHUNKS,
    MAX_REGISTERS,
    STAGES,
    WARPS,
    BackwardConfig,
    ChunkKernelConfig,
    ChunksBackwardConfig,
    Config,
    CutBackward,
    DecodeConfig,
    DecodeKernelConfig,
    ForwardConfig,
    PrepareKernelConfig,
    ScalarBackwardConfig,
    ScalarForwardConfig,
    TileKernelConfig,
    TurnedKernelConfig,
    chunks_illegal,
    cut_backward,
    default_config,
    grads_illegal,
    padded_k,
    padded_v,
    scalar_grads_illegal,
    why_illegal,
)
from glac.errors import ConfigError
from glac.gpus import GpuSpec
from glac.problem import DType, Op, Problem, Specialisation
from glac.suites import SUITES as SUITES
from glac.suites import make_problem as make_problem

BLOCKS_V = (32, 64, 128, 256)
GRADS_TRIED, WHOLE_TRIED, STATES_TRIED, DV_TRIED, DV_BESIDE = 5, 3, 3, 8, 5
"""Of a backward problem: gradient kernels without and with dv, states kernels, dv kernels, and
these where chunks at once are tried as well."""
KEEPS_TRIED = (4, 8)
"""Chunks between kept states, beside 1. On an H100 2 lost to 4 wherever it was timed, and where
one program fills an SM, as with dv at 128 channels, 4 and 8 gained nothing."""
SCALAR_STATES_TRIED, SCALAR_WALKS_TRIED = 2, 8
"""Of a backward problem with a scalar gate: states kernels for each gradient kernel, and such
gradient kernels as walk."""
PREPARES = {
    32: (
        PrepareKernelConfig(32, 64, 2, 2),
        PrepareKernelConfig(32, 32, 4, 3),
        PrepareKernelConfig(32, 64, 4, 2),
    ),
    64: (
        PrepareKernelConfig(64, 64, 4, 2),
        PrepareKernelConfig(64, 64, 4, 1),
        PrepareKernelConfig(64, 32, 4, 3),
    ),
}
"""For each chunk, the best first: measured on an H100 at K of 128 and 256."""
CHUNK_TILES = (
    TileKernelConfig(64, 64, 64, 4, 3),
    TileKernelConfig(64, 128, 64, 8, 3, keep=2),
    TileKernelConfig(64, 128, 64, 8, 3),
    TileKernelConfig(64, 64, 128, 4, 2),
    TileKernelConfig(64, 64, 64, 4, 2),
)
"""Of the kernel that makes all chunks' gradients at once, likewise."""
PREPARED_SPLIT = 3
"""Prepared configs of each segment length."""
LEAD_LONGEST = 4096
LEADS = (
    (64, 1, 3, True),
    (64, 1, 4, True),
    (64, 2, 3, True),
    (32, 1, 4, True),
    (32, 1, 3, True),
    (64, 1, 3, False),
)
"""Chunk, also on the way to a segment; V tiles; stages; descriptors: measured on an H100."""
LEAD_SPLITS = (8, 10, 11)
"""Sixteenths of a sequence that the first segment has, whose program has no way to go."""
LEAD_GRADS_SPLITS = (4, 8)
"""The same backward, where every program walks through the whole sequence."""
PRODUCT_ENDS_TRIED = 8
"""Tiles of ``gla_fwd`` that are also tried with a chunk's whole decay as a product. On an H100
that takes 3 % from 16,2048,8,128,128, and adds 7 % to 4,4096,64,128,128 with a low-rank gate."""
STOPPING_SEGMENT = 4096
"""From this length on summaries look whether anything is left to add. With the usual gates nothing
is after 2300 tokens."""
SMALLEST_SEGMENT = 256
LONG_SEQUENCE = 8192
PROGRAMS_PER_SM = 2
"""Two programs per SM hide each other's latency; with fewer, segments may pay."""

EFFORTS = ("quick", "standard", "full")
QUICK_CANDIDATES = 12
EXHAUSTIVE = 150
"""How many configs a problem's space is meant to have at most."""


@dataclass(frozen=True)
class Space:
    """The candidates for one op of one problem.

    Attributes:
        problem: what is tuned.
        default: the config used without tuning, always among ``configs``.
        configs: what is tried, most promising first.
        incumbent: what serves the problem now, if not the default; among ``configs``.
        warm: how many of the first configs are worth a try before any sampler is asked.
    """

    problem: Problem
    default: Config
    configs: tuple[Config, ...]
    incumbent: Config | None = None
    warm: int = 8

    @property
    def op(self) -> Op:
        return self.default.op

    def __str__(self) -> str:
        return f"{self.problem} {self.op.value}"


def _tiles(spec: Specialisation, gpu: GpuSpec) -> Iterator[ChunkKernelConfig]:
    for chunk in CHUNKS:
        for block_v in BLOCKS_V:
            for warps in WARPS:
                for stages in STAGES:
                    yield ChunkKernelConfig(chunk, block_v, warps, stages)
                    if gpu.capability >= (9, 0):
                        yield ChunkKernelConfig(chunk, block_v, warps, stages, tma=True)


def _worth_compiling(config: ChunkKernelConfig, spec: Specialisation, gpu: GpuSpec) -> bool:
    """Rules of thumb measured on Hopper at K = V = 128; each cuts where losers were far behind."""
    rows, width = padded_k(spec), min(padded_v(spec), BLOCKS_V[-1])
    narrow_v = min(padded_v(spec), 32)
    state = rows * config.block_v // (32 * config.num_warps)  # registers per thread
    if state > 128:  # with the operands beside it, it lives in local memory
        return False
    if config.num_warps == 2 and (rows * config.block_v > 64 * 64 or config.chunk > 32):
        return False
    if config.num_warps == 8 and rows * config.block_v < 64 * 64:  # threads with nothing to hold
        return False
    # q, k and gate are read once per V tile: more than four tiles only adds traffic.
    if config.block_v < max(narrow_v, width // 4):
        return False
    if config.chunk == 128 and (config.num_stages > 2 or rows * config.block_v > 128 * 64):
        return False  # shared memory rises fast with the chunk
    if config.chunk == 64 and config.num_stages > 3:
        return False
    if config.num_stages == 1 and (config.tma or config.chunk < 32):
        return False  # no overlap of copies with so little work per chunk
    # Descriptors pay by saving address arithmetic: only in a pipeline, on wide tiles.
    return not (config.tma and (config.num_stages < 2 or config.block_v < min(64, padded_v(spec))))


def _prior(config: ForwardConfig, problem: Problem, gpu: GpuSpec) -> float:
    """Smaller is more promising: distance from what has been fast on Hopper."""
    programs = problem.B * problem.H * config.tiles(problem.spec)
    if config.segment:
        programs *= config.segments(problem.T)
    empty = math.log2(gpu.sm_count / programs)
    cost = max(0.0, empty) + 0.5 * max(0.0, 1.0 + empty)
    if config.segment:
        # With a way to it a segment takes no other kernels.
        apart = 0.0 if config.fwd.lead else 0.8
        cost += apart + (1.0 if config.segment < 8 * config.fwd.chunk else 0.0)
    if config.prepare is None:
        return cost + _tile_prior(config.fwd, problem.spec)
    # Before most others, where there are any.
    choices = PREPARES[config.prepare.chunk]
    return cost + 0.4 * choices.index(config.prepare) + 0.5 * abs(config.fwd.num_stages - 3)


def _tile_prior(fwd: ChunkKernelConfig, spec: Specialisation) -> float:
    """``_prior`` of the tile of ``gla_fwd`` alone."""
    size = 1 if spec.dtype is not DType.FP32 else 2
    block_v = min(padded_v(spec), max(32, 128 * 128 // (padded_k(spec) * size)))
    chunk = 32 if spec.dtype is DType.BF16 else 16
    cost = abs(math.log2(fwd.chunk / chunk)) + 1.5 * abs(math.log2(fwd.block_v / block_v))
    state = padded_k(spec) * fwd.block_v // (32 * fwd.num_warps)
    cost += 0.7 * abs(math.log2(state / 128)) if state >= 32 else 1.5
    return cost + 0.5 * abs(fwd.num_stages - 3) + (0.4 if fwd.tma else 0.0)


def _segment_lengths(problem: Problem, gpu: GpuSpec) -> list[int]:
    """Segment lengths worth a try: they must raise the number of programs towards full waves."""
    spec = problem.spec
    heads = problem.B * problem.H
    tiles = math.ceil(spec.V / min(padded_v(spec), 128))
    wave = PROGRAMS_PER_SM * gpu.sm_count
    if heads * tiles >= 0.9 * wave and problem.T < LONG_SEQUENCE:
        return []
    lengths = []
    length = SMALLEST_SEGMENT
    while 2 * length <= problem.T:
        # Beyond 16 waves shorter segments only add summaries.
        if heads * tiles * math.ceil(problem.T / length) <= 16 * wave:
            lengths.append(length)
        length *= 2
    return lengths[-6:]


def _leading(problem: Problem, gpu: GpuSpec) -> bool:
    """Whether programs that walk to their segments are worth a try.

    Measured on an H100: at 32 and 64 heads, 1024 and 2048 tokens, 64 and 128 channels they win.
    What each walks grows with T.
    """
    spec = problem.spec
    few = gpu.sm_count >= 2 * problem.B * problem.H and padded_k(spec) <= 128
    hopper = spec.dtype is DType.BF16 and gpu.capability >= (9, 0)
    return few and hopper and SMALLEST_SEGMENT <= problem.T <= LEAD_LONGEST


def _split(problem: Problem, step: int, sixteenths: Sequence[int]) -> list[int]:
    """Segments that are such parts of the sequence, in multiples of ``step``, each once."""
    parts = [step * max(1, round(problem.T * part / 16 / step)) for part in sixteenths]
    return [length for length in dict.fromkeys(parts) if length < problem.T]


def _lead_configs(problem: Problem, gpu: GpuSpec) -> list[ForwardConfig]:
    """Programs that walk to their segments, each with all of V or half of it."""
    spec = problem.spec
    # Wider values gain more from chunks that are prepared once for all tiles of V.
    if not _leading(problem, gpu) or spec.V >= 2 * spec.K:
        return []
    whole = min(padded_v(spec), 128)
    warps = 8 if whole * padded_k(spec) > 64 * 64 else 4
    tiles = [
        ChunkKernelConfig(chunk, max(16, whole // tiles), warps, stages, tma, lead=chunk)
        for chunk, tiles, stages, tma in LEADS
    ]
    found = [
        ForwardConfig(tile, length)
        for tile in tiles
        for length in _split(problem, tile.chunk, LEAD_SPLITS)
    ]
    return [config for config in found if why_illegal(spec, config, gpu) is None]


def _lead_gradients(
    problem: Problem,
    gpu: GpuSpec,
    tiles: Sequence[TileKernelConfig],
    values: Sequence[ChunkKernelConfig | None],
) -> list[BackwardConfig]:
    """The best tiles of gradients with the way to each segment, and kernels for dv beside them.

    On an H100 dv apart won with a low-rank gate at 128 channels, and nowhere else.
    """
    if not _leading(problem, gpu):
        return []
    leading = [tile for tile in tiles if tile.tma and tile.chunk >= 32]
    found = [
        BackwardConfig(None, replace(tile, lead=lead), dv, length)
        for tile in (leading if values == [None] else leading[:1])
        for lead in (tile.chunk, 2 * tile.chunk)
        for dv in values
        for length in _split(problem, lead, LEAD_GRADS_SPLITS if dv is None else (8,))
    ]
    return [config for config in found if why_illegal(problem.spec, config, gpu) is None]


def _summary(tile: ChunkKernelConfig, segment: int) -> ChunkKernelConfig:
    """``tile`` as the kernel that finds what segments add."""
    return replace(tile, product_ends=False, stops=segment >= STOPPING_SEGMENT)


def _prepared_configs(problem: Problem, gpu: GpuSpec) -> list[ForwardConfig]:
    """Whole sequences with ``gla_prepare``: pays where heads have several V tiles.

    Measured on an H100 with bf16 inputs. A thread holds 64 values of the state, or 128 where K is
    256: more spill, and fewer tiles of V read what was prepared less often.
    """
    spec = problem.spec
    if spec.V < 2 * spec.K or spec.dtype is not DType.BF16 or gpu.capability < (9, 0):
        return []
    block_v, warps = (64, 4) if padded_k(spec) <= 128 else (128, 8)
    found = [
        ForwardConfig(ChunkKernelConfig(chunk, block_v, warps, stages, tma=True), prepare=prepare)
        for chunk, prepares in PREPARES.items()
        for stages in ((3, 4) if chunk == 32 else (2, 3))
        for prepare in prepares
    ]
    return [config for config in found if why_illegal(spec, config, gpu) is None]


def _forward_configs(
    problem: Problem, gpu: GpuSpec, default: ForwardConfig
) -> list[ForwardConfig]:
    spec = problem.spec

    def promising(config: ForwardConfig) -> tuple[float, str]:
        return _prior(config, problem, gpu), config.slug

    tiles = [
        tile
        for tile in _tiles(spec, gpu)
        if why_illegal(spec, ForwardConfig(tile), gpu) is None
        and _worth_compiling(tile, spec, gpu)
    ]
    single = sorted(map(ForwardConfig, tiles), key=promising)
    # Fewer instructions for more products: whether that pays has to be timed.
    single += [
        ForwardConfig(replace(c.fwd, product_ends=True)) for c in single[:PRODUCT_ENDS_TRIED]
    ]
    # A segmented run repeats part of the work, so only tiles that are good at walking chunks, each
    # with a summary kernel of the same tile.
    single.sort(key=promising)
    lengths = _segment_lengths(problem, gpu)
    prepared = _prepared_configs(problem, gpu)
    prepared.sort(key=promising)
    leading = _lead_configs(problem, gpu)
    split = [
        replace(config, segment=length, summary=_summary(config.fwd, length))
        for config in prepared[:PREPARED_SPLIT]
        for length in lengths
    ]
    left = EXHAUSTIVE - len(single) - len(prepared) - len(leading) - len(split) - 1
    room = min(60, max(20, left)) // max(1, len(lengths))
    walkers = [c.fwd for c in single if c.fwd.num_stages >= 2][:room]
    split += [
        ForwardConfig(tile, length, _summary(tile, length))
        for tile in walkers
        for length in lengths
    ]
    found = (*single, *prepared, *leading, *split)
    legal = [c for c in found if why_illegal(spec, c, gpu) is None]
    legal = [c for c in dict.fromkeys(legal) if c != default]
    legal.sort(key=promising)
    return legal


def _quick_forward(legal: Sequence[ForwardConfig], default: ForwardConfig) -> list[ForwardConfig]:
    # Tiles first: with few tries, segments matter only where the default needs them too.
    cut = QUICK_CANDIDATES if default.segment else QUICK_CANDIDATES // 3
    keep = [c for c in legal if c.segment][:cut]
    return [c for c in legal if not c.segment or c in keep][: QUICK_CANDIDATES - 1]


def _walk_prior(tile: ChunkKernelConfig, spec: Specialisation, gpu: GpuSpec) -> float:
    """Smaller is more promising for ``gla_states`` and ``gla_bwd_dv``.

    Measured on Hopper at K = V = 128: what walks chunks with a tile of [128, 128] and no spills.
    """
    size = 1 if spec.dtype is DType.BF16 else 2
    block_v = min(padded_v(spec), max(32, 128 * 128 // (padded_k(spec) * size)))
    warps = 8 if padded_k(spec) * tile.block_v > 64 * 64 else 4
    cost = abs(math.log2(tile.chunk * size / 32)) + abs(math.log2(tile.block_v / block_v))
    cost += 0.8 * abs(math.log2(tile.num_warps / warps)) + 0.5 * abs(tile.num_stages - 3)
    return cost + float(gpu.capability >= (9, 0) and not tile.tma)


def _grads_prior(tile: TileKernelConfig, spec: Specialisation, gpu: GpuSpec) -> float:
    """Smaller is more promising for ``gla_bwd``: 64 rows to four warps, all of V, no spills."""
    size = 1 if spec.dtype is DType.BF16 else 2
    cost = abs(math.log2(tile.chunk * size / 32)) + abs(
        math.log2(tile.num_warps * 16 / tile.block_k)
    )
    cost += 1.5 * abs(math.log2(tile.block_v / min(padded_v(spec), 128 // size)))
    cost += 1.2 * abs(math.log2(tile.block_k / min(padded_k(spec), 64)))
    cost += 0.5 * abs(tile.num_stages - 3)
    return cost + float(gpu.capability >= (9, 0) and not tile.tma)


def _grads_tiles(spec: Specialisation, gpu: GpuSpec, dv: bool) -> list[TileKernelConfig]:
    """The most promising tiles of the gradient kernel."""
    tmas = (False, True) if gpu.capability >= (9, 0) else (False,)
    tiles = [
        TileKernelConfig(*values, dv=dv)
        for values in itertools.product(
            (16, 32), (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (2, 3, 4), tmas
        )
        # A thread holds its part of the state's gradient beside tiles of the chunk.
        if values[1] * values[2] // (32 * values[3]) <= 64
    ]
    legal = [tile for tile in tiles if grads_illegal(spec, tile, gpu) is None]
    legal.sort(key=lambda t: (_grads_prior(t, spec, gpu), t.slug))
    return legal[: WHOLE_TRIED if dv else GRADS_TRIED]


def _walks(spec: Specialisation, gpu: GpuSpec) -> list[ChunkKernelConfig]:
    """The most promising tiles of the kernels beside it."""
    tiles = [t for t in _tiles(spec, gpu) if t.num_stages > 1 and _worth_compiling(t, spec, gpu)]
    return sorted(tiles, key=lambda t: (_walk_prior(t, spec, gpu), t.slug))


def _by_tile(walks: Sequence[ChunkKernelConfig]) -> list[ChunkKernelConfig]:
    """The most promising schedule of each tile, in the order of ``walks``."""
    found: dict[tuple[int, int, int], ChunkKernelConfig] = {}
    for walk in walks:
        found.setdefault((walk.chunk, walk.block_v, walk.num_warps), walk)
    return list(found.values())


def _chunks_configs(problem: Problem, gpu: GpuSpec) -> list[ChunksBackwardConfig]:
    """Gradients of all chunks at once: pays where heads have several V tiles.

    Walking back, each of these makes dq, dk and dg in parts, which are then added up, and the
    gate's exponentials again. Measured on an H100: 810 us instead of 1467 at 8,2048,4,256,512 and
    299 instead of 438 at 8,2048,4,128,256, but 393 instead of 395 at 4,2048,16,128,128.
    """
    spec = problem.spec
    if spec.V < 2 * spec.K or spec.dtype is not DType.BF16 or gpu.capability < (9, 0):
        return []
    tiles = [t for t in CHUNK_TILES if chunks_illegal(spec, t, gpu) is None]
    if padded_k(spec) > 128:
        walks = [ChunkKernelConfig(32, 128, 8, 3, tma=True), ChunkKernelConfig(64, 64, 4, 2, True)]
    else:
        walks = [
            ChunkKernelConfig(chunk, min(padded_v(spec), block_v), warps, stages, tma=True)
            for chunk, block_v, warps, stages in (
                (32, 64, 4, 3),
                (32, 64, 4, 4),
                (64, 64, 4, 3),
                (32, 128, 8, 3),
            )
        ]
    states = next(t for t in _walks(spec, gpu) if t.chunk <= CHUNK_TILES[0].chunk)
    return [
        ChunksBackwardConfig(prepare, walk, tile, states)
        for tile in tiles
        for walk in walks
        for prepare in PREPARES[walk.chunk][:2]
    ]


def _stopping(config: CutBackward) -> CutBackward:
    """A config whose summaries stop where its segments are long."""
    if config.states is None or config.segment < STOPPING_SEGMENT:
        return config
    return replace(config, states=replace(config.states, stops=True))


def _in_segments(
    whole: ChunksBackwardConfig, problem: Problem, gpu: GpuSpec
) -> list[ChunksBackwardConfig]:
    """As many segments as elsewhere, and half as many: at 256 x 512 summaries cost more."""
    cut = cut_backward(whole, problem.spec, problem.bucket, gpu)
    found = [cut, replace(cut, segment=2 * cut.segment)]
    return [_stopping(c) for c in found if 0 < c.segment < problem.T]


def _backward_configs(
    problem: Problem, gpu: GpuSpec, default: BackwardConfig | ChunksBackwardConfig
) -> list[BackwardConfig | ChunksBackwardConfig]:
    """All combinations of a few choices for each kernel."""
    spec = problem.spec
    room = 64 if gpu.capability >= (9, 0) else 32  # registers; 1500 bytes of spills on Ampere
    walks = [t for t in _walks(spec, gpu) if t.block_v <= padded_v(spec)]
    # For the values' gradient every tile once: which one wins changes with the number of heads.
    by_tile = _by_tile(walks)
    chunks = _chunks_configs(problem, gpu)
    found: list[BackwardConfig] = []
    leading: list[BackwardConfig] = []
    for dv in (False, True):
        tiles = _grads_tiles(spec, gpu, dv)
        # The state that is walked again lives beside the state's gradient.
        roomy = [
            t
            for t in tiles
            if t.block_k * t.block_v // (32 * t.num_warps) <= room and (t.num_warps == 4 or not dv)
        ]
        # It spares windows, which few heads and short sequences do not have.
        keeps = () if _leading(problem, gpu) else KEEPS_TRIED
        apart = [replace(tile, keep=keep) for tile in roomy[:1] for keep in keeps]
        for grads in (*tiles, *apart):
            states = [t for t in walks if grads.chunk % t.chunk == 0]
            states = states[: STATES_TRIED if grads.keep == 1 else 1]
            values = [None] if dv else by_tile[: DV_BESIDE if chunks else DV_TRIED]
            found += [BackwardConfig(s, grads, v) for s in states for v in values]
        leading += _lead_gradients(problem, gpu, tiles, [None] if dv else by_tile[:2])
    cut = [_stopping(cut_backward(c, spec, problem.bucket, gpu)) for c in found] + leading
    legal = [c for c in cut if why_illegal(spec, c, gpu) is None and c != default]
    legal.sort(key=lambda c: (_grads_prior(c.grads, spec, gpu), c.slug))
    at_once = [
        cut
        for whole in chunks
        for cut in dict.fromkeys((whole, *_in_segments(whole, problem, gpu)))
    ]
    first = [c for c in at_once if why_illegal(spec, c, gpu) is None]
    return [*first, *legal]


def _scalar_forward_configs(
    problem: Problem, gpu: GpuSpec, default: ScalarForwardConfig
) -> list[ScalarForwardConfig]:
    """Tiles that hold the state in registers, each both ways round."""
    spec = problem.spec
    tiles = [t for t in _walks(spec, gpu) if t.block_v <= padded_v(spec)]
    found = [
        ScalarForwardConfig(TurnedKernelConfig(**tile.to_dict(), turned=turned))
        for tile in tiles
        for turned in (True, False)
    ]
    legal = [c for c in found if why_illegal(spec, c, gpu) is None and c != default]
    return legal[: EXHAUSTIVE - 1]


def _scalar_backward_configs(
    problem: Problem, gpu: GpuSpec, default: ScalarBackwardConfig
) -> list[ScalarBackwardConfig]:
    """A few tiles for chunks at once, without descriptors: each program would make nine of them,
    and lives for one chunk (905 us instead of 496 at 16,2048,8,128,128); and a few that walk."""
    spec, hopper = problem.spec, gpu.capability >= (9, 0)
    walks = [t for t in _walks(spec, gpu) if t.block_v <= padded_v(spec)]
    by_chunk = {
        chunk: [t for t in walks if t.chunk == chunk][:SCALAR_STATES_TRIED]
        for chunk in (16, 32, 64)
    }
    # Not timed beside chunks: it serves where nobody wants dg.
    dv = default.dv if spec.K == spec.V else None
    at_once = [
        ScalarBackwardConfig(states, ChunkKernelConfig(chunk, block_v, warps, stages), None, dv)
        for chunk, block_v, warps, stages in itertools.product(
            (16, 32, 64), (32, 64, 128), (4, 8), (1, 2)
        )
        for states in by_chunk[chunk]
    ]
    at_once.sort(key=lambda c: (abs(c.chunk - 64), abs(c.chunks.block_v - 64) if c.chunks else 0))
    tiles = [
        TileKernelConfig(*values)
        for values in itertools.product(
            (32, 64), (64, 128), (64, 128, 256), (4, 8), (2, 3), (hopper,)
        )
        # Whole tiles of 128 x 128 won; parts of dq and dk have to be added up.
        if values[1] * values[2] // (32 * values[3]) <= 64
    ]
    tiles.sort(key=lambda t: (-t.block_k * t.block_v, -t.chunk, t.num_warps, t.num_stages))
    tiles = [t for t in tiles if scalar_grads_illegal(spec, t, gpu) is None]
    walking = [
        ScalarBackwardConfig(states, None, grads, values)
        for grads in tiles[:SCALAR_WALKS_TRIED]
        for states in by_chunk[grads.chunk]
        for values in _by_tile(walks)[:STATES_TRIED]
    ]
    found = [*at_once, *walking] if default.grads is None else [*walking, *at_once]
    return [c for c in found if why_illegal(spec, c, gpu) is None and c != default]


def _decode_configs(problem: Problem, gpu: GpuSpec, default: DecodeConfig) -> list[DecodeConfig]:
    spec = problem.spec

    def sensible(c: DecodeKernelConfig) -> bool:
        # A limit below twice the state spills; one that the kernel stays under changes nothing.
        state = padded_k(spec) * c.block_v // (32 * c.num_warps)
        return 2 * state <= c.max_registers <= 4 * state if c.max_registers else state <= 128

    choices = itertools.product((16, *BLOCKS_V), WARPS, MAX_REGISTERS)
    found = [
        DecodeConfig(c) for c in itertools.starmap(DecodeKernelConfig, choices) if sensible(c)
    ]
    return [c for c in found if c != default and why_illegal(spec, c, gpu) is None]


def space(problem: Problem, gpu: GpuSpec, effort: str = "standard", op: Op = Op.FORWARD) -> Space:
    """The candidates for ``op`` of ``problem`` on ``gpu``, the most promising first.

    Args:
        problem: what is tuned.
        gpu: where.
        effort: ``quick`` keeps the ``QUICK_CANDIDATES`` best by rule of thumb.
        op: what is tuned of it.

    Raises:
        ConfigError: unknown effort.
    """
    if effort not in EFFORTS:
        raise ConfigError(f"effort must be one of {', '.join(EFFORTS)}, got {effort!r}")
    configs: Sequence[Config]
    default = default_config(op, problem.spec, gpu, problem.bucket)
    if isinstance(default, ForwardConfig):
        forward = _forward_configs(problem, gpu, default)
        configs = _quick_forward(forward, default) if effort == "quick" else forward
    else:
        if isinstance(default, BackwardConfig | ChunksBackwardConfig):
            configs = _backward_configs(problem.dense, gpu, default)
        elif isinstance(default, ScalarForwardConfig):
            configs = _scalar_forward_configs(problem, gpu, default)
        elif isinstance(default, ScalarBackwardConfig):
            configs = _scalar_backward_configs(problem, gpu, default)
        else:
            configs = _decode_configs(problem, gpu, default)
        if effort == "quick":
            configs = configs[: QUICK_CANDIDATES - 1]
    return Space(problem, default, (default, *configs))
