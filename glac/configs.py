"""What a tuner may change about a kernel, and which choices are legal.

One frozen dataclass per template. ``is_legal`` is the one statement of legality; the tuner, the
YAML loader, the build and the tests all ask it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from glac.errors import ConfigError
from glac.gpus import GpuSpec
from glac.problem import Bucket, DType, Gate, Specialisation, strict_fields, strict_int

CHUNKS = (16, 32, 64, 128)
BLOCKS_V = (16, 32, 64, 128, 256)
WARPS = (2, 4, 8)
STAGES = (1, 2, 3, 4)
EXACT_ROWS = 16
MAX_SEGMENTS = 256


@dataclass(frozen=True, order=True)
class ChunkKernelConfig:
    """Tiles and schedule of a kernel that walks chunks (``gla_fwd``, ``gla_fwd_summary``).

    Attributes:
        chunk: tokens per chunk (BT).
        block_v: value channels per program (BV).
        num_warps: warps per program.
        num_stages: chunks in flight in the load pipeline.
        tma: load and store through tensor descriptors (Hopper only).
    """

    chunk: int
    block_v: int
    num_warps: int
    num_stages: int
    tma: bool = False

    @property
    def slug(self) -> str:
        tma = "_tma" if self.tma else ""
        return f"c{self.chunk}_bv{self.block_v}_w{self.num_warps}_s{self.num_stages}{tma}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config") -> ChunkKernelConfig:
        d = strict_fields(cls, data, where)
        if not isinstance(d["tma"], bool):
            raise ConfigError(f"{where}: tma must be true or false, got {d['tma']!r}")
        return cls(
            chunk=strict_int(d, "chunk", where),
            block_v=strict_int(d, "block_v", where),
            num_warps=strict_int(d, "num_warps", where),
            num_stages=strict_int(d, "num_stages", where),
            tma=d["tma"],
        )


@dataclass(frozen=True, order=True)
class CombineKernelConfig:
    """Schedule of ``gla_fwd_combine``: state elements per program, warps."""

    block: int = 1024
    num_warps: int = 4

    @property
    def slug(self) -> str:
        return f"b{self.block}_w{self.num_warps}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config") -> CombineKernelConfig:
        d = strict_fields(cls, data, where)
        return cls(strict_int(d, "block", where), strict_int(d, "num_warps", where))


KernelConfig = ChunkKernelConfig | CombineKernelConfig


@dataclass(frozen=True)
class ForwardConfig:
    """How one forward problem runs.

    Attributes:
        fwd: the fused kernel.
        segment: tokens per segment, a multiple of both chunk sizes; 0 walks the whole sequence in
            one program and needs neither ``summary`` nor the combine kernel.
        summary: the kernel that prepares segment states, ``None`` exactly when ``segment`` is 0.
    """

    fwd: ChunkKernelConfig
    segment: int = 0
    summary: ChunkKernelConfig | None = None

    def kernels(self) -> dict[str, KernelConfig]:
        """Template name to kernel config, in launch order."""
        if self.summary is None:
            return {"gla_fwd": self.fwd}
        return {
            "gla_fwd_summary": self.summary,
            "gla_fwd_combine": CombineKernelConfig(),
            "gla_fwd": self.fwd,
        }

    def segmentation(self, T: int) -> tuple[int, int]:
        """How many segments ``T`` tokens fall into, and the tokens of each but the last.

        Very long sequences get longer segments, so that the states between them stay bounded.
        """
        if self.segment == 0:
            return 1, T
        length = self.segment * math.ceil(T / (self.segment * MAX_SEGMENTS))
        return math.ceil(T / length), length

    def segments(self, T: int) -> int:
        """How many segments a sequence of ``T`` tokens falls into."""
        return self.segmentation(T)[0]

    @property
    def slug(self) -> str:
        if self.summary is None:
            return self.fwd.slug
        return f"{self.fwd.slug}-seg{self.segment}-{self.summary.slug}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "fwd": self.fwd.to_dict(),
            "segment": self.segment,
            "summary": self.summary.to_dict() if self.summary else None,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config") -> ForwardConfig:
        d = strict_fields(cls, data, where)
        summary = d["summary"]
        return cls(
            ChunkKernelConfig.from_dict(d["fwd"], f"{where}.fwd"),
            strict_int(d, "segment", where),
            None if summary is None else ChunkKernelConfig.from_dict(summary, f"{where}.summary"),
        )


def block_k(spec: Specialisation) -> int:
    """K padded to the tile the kernels use: a power of two, at least 16."""
    return max(16, 1 << (spec.K - 1).bit_length())


def padded_v(spec: Specialisation) -> int:
    return max(16, 1 << (spec.V - 1).bit_length())


def _pow2(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def _why_illegal_chunk(
    spec: Specialisation, config: ChunkKernelConfig, gpu: GpuSpec, what: str
) -> str | None:
    choices: tuple[tuple[str, int, tuple[int, ...]], ...] = (
        ("chunk", config.chunk, CHUNKS),
        ("block_v", config.block_v, BLOCKS_V),
        ("num_warps", config.num_warps, WARPS),
        ("num_stages", config.num_stages, STAGES),
    )
    for name, value, allowed in choices:
        if value not in allowed:
            return f"{what}.{name} must be one of {allowed}, got {value}"
    if config.block_v > padded_v(spec):
        return f"{what}.block_v {config.block_v} exceeds V padded to {padded_v(spec)}"
    # The state tile alone; a thread has 255 registers.
    state = block_k(spec) * config.block_v // (32 * config.num_warps)
    if state > 256:
        return f"{what}: the [{block_k(spec)}, {config.block_v}] state needs {state} registers"
    if config.tma:
        if gpu.capability < (9, 0):
            return f"{what}.tma needs capability 9.0, {gpu.name} has {gpu.capability}"
        row_bytes = {
            "K": spec.K * spec.dtype.itemsize,
            "V": spec.V * spec.dtype.itemsize,
            "gate": spec.K * spec.gate_dtype.itemsize,
        }
        for name, size in row_bytes.items():
            if size % 16:
                return f"{what}.tma needs rows of whole 16 bytes, {name} has {size}"
    # What every implementation must hold: one stage of inputs.
    gate = 0 if spec.gate is Gate.LOWRANK else block_k(spec) * spec.gate_dtype.itemsize
    tiles = 2 if what == "fwd" else 1
    row = (tiles * block_k(spec) + config.block_v) * spec.dtype.itemsize + gate
    stages = max(1, config.num_stages - 1)
    if config.chunk * row * stages > gpu.shared_per_block:
        return (
            f"{what}: {stages} stages of inputs need {config.chunk * row * stages} bytes of "
            f"shared memory, {gpu.name} has {gpu.shared_per_block} per block"
        )
    return None


def why_illegal(spec: Specialisation, config: ForwardConfig, gpu: GpuSpec) -> str | None:
    """Why ``config`` cannot serve ``spec`` on ``gpu``, or ``None`` if it can be tried.

    A legal config may still need more shared memory than there is; only compiling tells, and
    ``glac.compile`` refuses it then.
    """
    reason = _why_illegal_chunk(spec, config.fwd, gpu, "fwd")
    if reason:
        return reason
    if (config.segment == 0) != (config.summary is None):
        return "summary must be given exactly when segment is not 0"
    if config.summary is not None:
        reason = _why_illegal_chunk(spec, config.summary, gpu, "summary")
        if reason:
            return reason
        step = max(config.fwd.chunk, config.summary.chunk)
        if config.segment < step or config.segment % step:
            return f"segment must be a positive multiple of {step}, got {config.segment}"
    return None


def is_legal(spec: Specialisation, config: ForwardConfig, gpu: GpuSpec) -> bool:
    return why_illegal(spec, config, gpu) is None


def default_forward(spec: Specialisation, gpu: GpuSpec, bucket: Bucket) -> ForwardConfig:
    """The config used where nothing was tuned: safe on every listed GPU, decent on Hopper.

    From measurements on Hopper at K = V = 128 (docs/performance.md): 32-token chunks and the whole
    V per program; the sequence is split when the heads alone would leave most of the GPU idle.
    """
    wide = spec.dtype is DType.FP32 or spec.dtype is DType.FP16
    bk = block_k(spec)
    block_v = min(padded_v(spec), 64 if wide or bk > 128 else 128)
    warps = 8 if bk * block_v > 64 * 64 else 4
    chunk = 16 if wide and bk > 64 else 32
    stages = 2 if wide or bk > 128 or gpu.capability < (9, 0) else 3
    fwd = ChunkKernelConfig(chunk, block_v, warps, stages)
    programs = (1 << max(0, bucket.bh)) * math.ceil(spec.V / block_v)
    tokens = 1 << max(0, bucket.t)
    if 2 * programs > gpu.sm_count or tokens < 1024:
        return ForwardConfig(fwd)
    # FlashQLA's latency model as start value: 3 * sqrt(programs * chunks / SMs) chunks a segment.
    chunks = 3.0 * math.sqrt(programs * (tokens / chunk) / gpu.sm_count)
    segment = max(8 * chunk, chunk * (1 << round(math.log2(max(1.0, chunks)))))
    if 2 * segment > tokens:
        return ForwardConfig(fwd)
    return ForwardConfig(fwd, segment, fwd)
