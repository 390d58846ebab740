"""What a tuner may change about kernels, and which choices are legal.

One frozen dataclass per kind of kernel, and one per op that puts kernels together. ``why_illegal``
is the one statement of legality; the tuner, the YAML loader, the build and the tests all ask it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, ClassVar, TypeVar

from glac.errors import ConfigError
from glac.gpus import GpuSpec
from glac.problem import Bucket, DType, Gate, Op, Specialisation, strict_fields, strict_int
from glac.record import dataclass

CHUNKS = (16, 32, 64, 128)
BLOCKS_K = (16, 32, 64, 128, 256)
BLOCKS_V = (16, 32, 64, 128, 256)
WARPS = (2, 4, 8)
STAGES = (1, 2, 3, 4)
MAX_REGISTERS = (0, 64, 80, 96, 128, 168)
EXACT_ROWS = 16
KEEPS = (1, 2, 4, 8)
MOST_PREPARED = 2
"""Prepared chunks in one of ``gla_bwd_chunks``, where it finds states again from them."""
LEADS = (0, 16, 32, 64, 128)
MAX_SEGMENTS = 256
MOST_PARTS = 8
"""Of the gradient of a scalar gate, as in ``kernel_templates/scalar_bwd_dv.py``."""
MAX_STATE_REGISTERS = 256
"""Of a state tile per thread: one that has 255 and spills a little can still be the fastest."""

Flat = TypeVar("Flat", bound="_KernelConfig")
CutBackward = TypeVar("CutBackward", "BackwardConfig", "ChunksBackwardConfig")


@dataclass(frozen=True)
class _KernelConfig:
    """Base of configs of single kernels: flat dataclasses of integers and truth values.

    Attributes:
        OMITTED: fields that data leaves out at these values: what was measured and built before
            they existed stays valid.
    """

    OMITTED: ClassVar[Mapping[str, int]] = {}

    def to_dict(self) -> dict[str, Any]:
        # A quarter of the time of reading a pack went into asdict, which copies deeply.
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, usual in self.OMITTED.items():
            if values[name] == usual:
                del values[name]
        return values

    @classmethod
    def from_dict(cls: type[Flat], data: Mapping[str, Any], where: str = "config") -> Flat:
        if cls.OMITTED and isinstance(data, Mapping):
            data = {**cls.OMITTED, **data}
        values = strict_fields(cls, data, where)
        for field in fields(cls):
            value = values[field.name]
            if field.type != "bool":  # annotations are text in this module
                strict_int(values, field.name, where)
            elif not isinstance(value, bool):
                raise ConfigError(f"{where}: {field.name} must be true or false, got {value!r}")
        return cls(**values)


@dataclass(frozen=True, order=True)
class ChunkKernelConfig(_KernelConfig):
    """Tiles and schedule of a kernel that walks chunks with all of K in each program.

    Attributes:
        chunk: tokens per chunk (BT).
        block_v: value channels per program (BV).
        num_warps: warps per program.
        num_stages: chunks in flight in the load pipeline.
        tma: load and store through tensor descriptors (Hopper only).
        lead: of ``gla_fwd``, tokens per chunk on each program's way to its segment
            (``kernel_templates/_lead.py``); 0 where other kernels find the state before it.
        stops: of ``gla_states`` and ``gla_walk_states``, find what a segment adds from no further
            than the gate lets anything through (``kernel_templates/_summary.py``).
        product_ends: of ``gla_fwd`` without ``lead``, a chunk's whole decay as a product of its
            own instead of the last row of the cumulative gate.
    """

    OMITTED: ClassVar[Mapping[str, int]] = {"lead": 0, "stops": False, "product_ends": False}

    chunk: int
    block_v: int
    num_warps: int
    num_stages: int
    tma: bool = False
    lead: int = 0
    stops: bool = False
    product_ends: bool = False

    @property
    def slug(self) -> str:
        tma = "_tma" if self.tma else ""
        lead = f"_l{self.lead}" if self.lead else ""
        ways = "_stop" * self.stops + "_pe" * self.product_ends
        tile = f"c{self.chunk}_bv{self.block_v}_w{self.num_warps}_s{self.num_stages}"
        return f"{tile}{tma}{lead}{ways}"


@dataclass(frozen=True, order=True)
class TurnedKernelConfig(_KernelConfig):
    """``ChunkKernelConfig`` of ``scalar_fwd``, whose state can lie in registers either way.

    Attributes:
        chunk, block_v, num_warps, num_stages, tma: as in ``ChunkKernelConfig``.
        turned: keep the state as [V, K], so that it is a left operand from registers.
    """

    chunk: int
    block_v: int
    num_warps: int
    num_stages: int
    tma: bool = False
    turned: bool = False

    @property
    def slug(self) -> str:
        tma, turned = "_tma" if self.tma else "", "_turned" if self.turned else ""
        return f"c{self.chunk}_bv{self.block_v}_w{self.num_warps}_s{self.num_stages}{tma}{turned}"


@dataclass(frozen=True, order=True)
class DecodeKernelConfig(_KernelConfig):
    """Tile of ``gla_decode``.

    Attributes:
        block_v: value channels per program.
        num_warps: warps per program.
        max_registers: per thread, so that more programs share an SM; 0 for as many as it takes.
    """

    block_v: int
    num_warps: int
    max_registers: int = 0

    @property
    def slug(self) -> str:
        limit = f"_r{self.max_registers}" if self.max_registers else ""
        return f"bv{self.block_v}_w{self.num_warps}{limit}"


@dataclass(frozen=True, order=True)
class TileKernelConfig(_KernelConfig):
    """Tiles and schedule of a kernel that walks chunks with a tile of the state in each program.

    Attributes:
        chunk: tokens per chunk (BT).
        block_k: key channels per program (BK).
        block_v: value channels per program (BV).
        num_warps: warps per program.
        num_stages: chunks in flight in the load pipeline.
        tma: load and store through tensor descriptors (Hopper only).
        dv: also write the gradient of the values, which takes all of K in one tile.
        keep: chunks from one kept state to the next; the program finds those between again.
        lead: of ``gla_bwd``, tokens per chunk on each program's ways to its segment, from both
            ends of the sequence (``kernel_templates/_lead.py``); 0 where other kernels find the
            states before chunks and behind segments.
    """

    OMITTED: ClassVar[Mapping[str, int]] = {"keep": 1, "lead": 0}

    chunk: int
    block_k: int
    block_v: int
    num_warps: int
    num_stages: int
    tma: bool = False
    dv: bool = False
    keep: int = 1
    lead: int = 0

    @property
    def slug(self) -> str:
        tma = "_tma" if self.tma else ""
        dv = "_dv" if self.dv else ""
        keep = f"_k{self.keep}" if self.keep > 1 else ""
        lead = f"_l{self.lead}" if self.lead else ""
        return (
            f"c{self.chunk}_bk{self.block_k}_bv{self.block_v}_w{self.num_warps}"
            f"_s{self.num_stages}{tma}{dv}{keep}{lead}"
        )

    @property
    def kept_tokens(self) -> int:
        """Tokens from one kept state to the next."""
        return self.chunk * self.keep

    def tiles(self, spec: Specialisation) -> int:
        """Tiles that a state of ``spec`` has, each of a program."""
        return -(-spec.K // self.block_k) * -(-spec.V // self.block_v)

    @property
    def found_again(self) -> int:
        """Elements of the states that a program finds again at a time, 0 where all are kept."""
        return self.keep * self.block_k * self.block_v if self.keep > 1 else 0


@dataclass(frozen=True, order=True)
class ExactKernelConfig(_KernelConfig):
    """Tile of ``gla_bwd_exact``, which walks in blocks of ``EXACT_ROWS`` tokens.

    Attributes:
        chunk: tokens from kept state to kept state (BT).
        block_k: key channels per program (BK).
        block_v: value channels per program (BV).
        num_warps: warps per program.
        dv: also write the gradient of the values.
        keep: of ``gla_bwd_chunks_exact``, chunks from one kept state to the next.
    """

    OMITTED: ClassVar[Mapping[str, int]] = {"keep": 1}

    chunk: int
    block_k: int
    block_v: int
    num_warps: int
    dv: bool = False
    keep: int = 1

    @property
    def slug(self) -> str:
        dv = "_dv" if self.dv else ""
        keep = f"_k{self.keep}" if self.keep > 1 else ""
        return f"c{self.chunk}_bk{self.block_k}_bv{self.block_v}_w{self.num_warps}{dv}{keep}"


@dataclass(frozen=True, order=True)
class PrepareKernelConfig(_KernelConfig):
    """Tile and schedule of ``gla_prepare``, whose programs do one chunk each.

    Attributes:
        chunk: tokens per chunk (BT), that of the kernels which read what it makes.
        block_k: key channels at a time (BC).
        num_warps: warps per program.
        num_stages: tiles of key channels in flight.
    """

    chunk: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def slug(self) -> str:
        return f"c{self.chunk}_bk{self.block_k}_w{self.num_warps}_s{self.num_stages}"


@dataclass(frozen=True, order=True)
class CombineKernelConfig(_KernelConfig):
    """Schedule of ``gla_combine``: state elements per program, warps."""

    block: int = 1024
    num_warps: int = 4

    @property
    def slug(self) -> str:
        return f"b{self.block}_w{self.num_warps}"


@dataclass(frozen=True, order=True)
class GateKernelConfig(_KernelConfig):
    """Tile of ``gla_gate`` and ``gla_gate_bwd``.

    Attributes:
        chunk: tokens at a time (BT).
        block_n: channels of all heads per program (BN).
        num_warps: warps per program.
        num_stages: tiles in flight.
    """

    chunk: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def slug(self) -> str:
        return f"c{self.chunk}_bn{self.block_n}_w{self.num_warps}_s{self.num_stages}"


@dataclass(frozen=True, order=True)
class SumsKernelConfig(_KernelConfig):
    """Schedule of ``gla_gate_sums``: elements per program, parts at a time, warps."""

    block: int
    rows: int
    num_warps: int

    @property
    def slug(self) -> str:
        return f"b{self.block}_r{self.rows}_w{self.num_warps}"


KernelConfig = (
    ChunkKernelConfig
    | TurnedKernelConfig
    | DecodeKernelConfig
    | TileKernelConfig
    | ExactKernelConfig
    | PrepareKernelConfig
    | CombineKernelConfig
    | GateKernelConfig
    | SumsKernelConfig
)

KERNEL_CONFIGS: dict[str, type[KernelConfig]] = {
    "gla_fwd": ChunkKernelConfig,
    "gla_prepare": PrepareKernelConfig,
    "gla_walk_states": ChunkKernelConfig,
    "gla_walk": ChunkKernelConfig,
    "gla_states": ChunkKernelConfig,
    "gla_combine": CombineKernelConfig,
    "gla_gate": GateKernelConfig,
    "gla_gate_bwd": GateKernelConfig,
    "gla_gate_sums": SumsKernelConfig,
    "gla_bwd_dv": ChunkKernelConfig,
    "gla_bwd": TileKernelConfig,
    "gla_bwd_exact": ExactKernelConfig,
    "gla_bwd_walks": ChunkKernelConfig,
    "gla_bwd_walks_exact": ChunkKernelConfig,
    "gla_bwd_chunks": TileKernelConfig,
    "gla_bwd_chunks_exact": ExactKernelConfig,
    "scalar_fwd": TurnedKernelConfig,
    "scalar_states": ChunkKernelConfig,
    "scalar_bwd_chunks": ChunkKernelConfig,
    "scalar_bwd": TileKernelConfig,
    "scalar_bwd_dv": ChunkKernelConfig,
    "gla_decode": DecodeKernelConfig,
}
"""Which config each template takes."""


def gate_kernels(spec: Specialisation) -> dict[str, KernelConfig]:
    """What a low-rank gate adds to a backward config, whose kernels are those of the dense gate.

    They move memory and are the same for all problems: at rank 16 beside bf16 the best of 9, 18
    and 12 on an H100, at three shapes (docs/performance.md).
    """
    high = spec.rank > 32  # as much shared memory and registers as at 32, not more
    tile = GateKernelConfig(32, 32 if high else 64, 4, 2)
    if spec.dtype is DType.BF16:
        tile = GateKernelConfig(64, 64, 4, 2) if high else GateKernelConfig(64, 128, 4, 3)
    return {
        "gla_gate": GateKernelConfig(32, 256 if spec.dtype is DType.BF16 else 64, 4, 1),
        "gla_gate_bwd": tile,
        "gla_gate_sums": SumsKernelConfig(64, 16, 2),
    }


def segmentation(segment: int, T: int) -> tuple[int, int]:
    """How many segments ``T`` tokens fall into, and the tokens of each but the last.

    Very long sequences get longer segments than the config's, so that the states between them
    stay bounded.
    """
    if segment == 0 or segment >= T:
        return 1, T
    length = segment * math.ceil(T / (segment * MAX_SEGMENTS))
    return math.ceil(T / length), length


@dataclass(frozen=True)
class ForwardConfig:
    """How one forward problem runs.

    Attributes:
        op: what it is a config of.
        PARTS: the field that each template's config is in, or follows from.
        fwd: the kernel that walks the sequence: ``gla_fwd``, or ``gla_walk`` after ``prepare``.
        segment: tokens per segment, a multiple of all chunk sizes; 0 walks the whole sequence in
            one program and needs neither ``summary`` nor the combine kernel.
        summary: the kernel that prepares segment states, ``None`` exactly when ``segment`` is 0
            or ``fwd`` finds them itself (``lead``).
        prepare: the kernel that makes scaled tiles and scores once for all V tiles of a head;
            ``None`` where ``gla_fwd`` makes its own. All kernels then have the same chunk size.
    """

    op: ClassVar[Op] = Op.FORWARD
    PARTS: ClassVar[Mapping[str, str]] = {
        "gla_states": "summary",
        "gla_fwd": "fwd",
        "gla_prepare": "prepare",
        "gla_walk_states": "summary",
        "gla_walk": "fwd",
    }

    fwd: ChunkKernelConfig
    segment: int = 0
    summary: ChunkKernelConfig | None = None
    prepare: PrepareKernelConfig | None = None

    @property
    def main(self) -> str:
        """The template that does most of the work."""
        return "gla_fwd" if self.prepare is None else "gla_walk"

    def kernels(self) -> dict[str, KernelConfig]:
        """Template name to kernel config, in launch order."""
        kernels: dict[str, KernelConfig] = {}
        if self.prepare is not None:
            kernels["gla_prepare"] = self.prepare
        if self.summary is not None:
            summary = "gla_states" if self.prepare is None else "gla_walk_states"
            kernels.update({summary: self.summary, "gla_combine": CombineKernelConfig()})
        return {**kernels, self.main: self.fwd}

    def with_part(self, part: str, kernel: Any) -> ForwardConfig:
        """This config with another kernel config in field ``part``, and chunks that go with it."""
        change: dict[str, Any] = {part: kernel}
        if self.prepare is not None:
            for name in ("fwd", "summary", "prepare"):
                other = change.get(name, getattr(self, name))
                if other is not None:
                    change[name] = replace(other, chunk=kernel.chunk)
        return replace(self, **change)

    @property
    def chunk_step(self) -> int:
        """What segments are a multiple of."""
        return max(self.fwd.chunk, self.fwd.lead, self.summary.chunk if self.summary else 0)

    def tiles(self, spec: Specialisation) -> int:
        """Programs that share a sequence of a head."""
        return math.ceil(spec.V / self.fwd.block_v)

    def segments(self, T: int) -> int:
        """How many segments a sequence of ``T`` tokens falls into."""
        return segmentation(self.segment, T)[0]

    @property
    def slug(self) -> str:
        prepare = "" if self.prepare is None else f"-pre_{self.prepare.slug}"
        segment = f"-seg{self.segment}" if self.segment else ""
        summary = "" if self.summary is None else f"-{self.summary.slug}"
        return f"{self.fwd.slug}{prepare}{segment}{summary}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data; ``prepare`` is left out where there is none, as in most rows."""
        prepare = {} if self.prepare is None else {"prepare": self.prepare.to_dict()}
        return {
            "fwd": self.fwd.to_dict(),
            "segment": self.segment,
            "summary": self.summary.to_dict() if self.summary else None,
            **prepare,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config") -> ForwardConfig:
        if isinstance(data, Mapping):
            data = {"prepare": None, **data}
        d = strict_fields(cls, data, where)
        summary, before = d["summary"], d["prepare"]
        return cls(
            ChunkKernelConfig.from_dict(d["fwd"], f"{where}.fwd"),
            strict_int(d, "segment", where),
            None if summary is None else ChunkKernelConfig.from_dict(summary, f"{where}.summary"),
            None if before is None else PrepareKernelConfig.from_dict(before, f"{where}.prepare"),
        )


@dataclass(frozen=True)
class BackwardConfig:
    """How one backward problem runs.

    Attributes:
        op, PARTS: as in ``ForwardConfig``.
        states: the kernel that walks forward again and keeps the states that ``grads`` asks for,
            at multiples of its own chunk size; with segments also the one that finds what they
            add to the state and to its gradient. ``None`` exactly if ``grads`` finds all of them
            itself (``lead``).
        grads: the kernel that walks back and makes the gradients.
        dv: the kernel that makes the gradient of the values, ``None`` exactly if ``grads`` does.
        segment: tokens per segment, a multiple of all chunk sizes; 0 walks a whole sequence in one
            program. Packed batches have segments in any case.
    """

    op: ClassVar[Op] = Op.BACKWARD
    PARTS: ClassVar[Mapping[str, str]] = {
        "gla_states": "states",
        "gla_bwd": "grads",
        "gla_bwd_exact": "grads",
        "gla_bwd_dv": "dv",
    }

    states: ChunkKernelConfig | None
    grads: TileKernelConfig
    dv: ChunkKernelConfig | None = None
    segment: int = 0

    @property
    def main(self) -> str:
        """The template that does most of the work."""
        return "gla_bwd"

    @property
    def chunk_step(self) -> int:
        """What segments are a multiple of."""
        chunks = [part.chunk for part in (self.states, self.dv) if part is not None]
        return max(self.grads.kept_tokens, self.grads.lead, *chunks)

    def tiles(self, spec: Specialisation) -> int:
        """Programs that share a sequence of a head."""
        return self.grads.tiles(spec)

    @property
    def exact(self) -> ExactKernelConfig:
        """The kernel that does again what ``grads`` could not; its tile has to be the same."""
        g = self.grads
        warps = 8 if g.block_k * g.block_v > 64 * 64 else 4
        return ExactKernelConfig(g.kept_tokens, g.block_k, g.block_v, warps, g.dv)

    def kernels(self) -> dict[str, KernelConfig]:
        """Template name to kernel config, in launch order."""
        kernels: dict[str, KernelConfig] = {}
        if self.states is not None:
            kernels.update({"gla_states": self.states, "gla_combine": CombineKernelConfig()})
        kernels.update({"gla_bwd": self.grads, "gla_bwd_exact": self.exact})
        if self.dv is not None:
            kernels["gla_bwd_dv"] = self.dv
        return kernels

    def with_part(self, part: str, kernel: Any) -> BackwardConfig:
        """This config with another kernel config in field ``part``, and states that go with it."""
        change: dict[str, Any] = {part: kernel}
        if part == "grads" and self.states and kernel.kept_tokens < self.states.chunk:
            change["states"] = replace(self.states, chunk=kernel.kept_tokens)
        return replace(self, **change)

    @property
    def slug(self) -> str:
        dv = "" if self.dv is None else f"-dv_{self.dv.slug}"
        segment = f"-seg{self.segment}" if self.segment else ""
        states = "" if self.states is None else f"-st_{self.states.slug}"
        return f"{self.grads.slug}{states}{dv}{segment}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "states": None if self.states is None else self.states.to_dict(),
            "grads": self.grads.to_dict(),
            "dv": None if self.dv is None else self.dv.to_dict(),
            "segment": self.segment,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config") -> BackwardConfig:
        d = strict_fields(cls, data, where)
        states, dv = d["states"], d["dv"]
        return cls(
            None if states is None else ChunkKernelConfig.from_dict(states, f"{where}.states"),
            TileKernelConfig.from_dict(d["grads"], f"{where}.grads"),
            None if dv is None else ChunkKernelConfig.from_dict(dv, f"{where}.dv"),
            strict_int(d, "segment", where),
        )


@dataclass(frozen=True)
class ChunksBackwardConfig:
    """How one backward problem runs that makes the gradients of all chunks at once.

    Attributes:
        op, main, PARTS: as in ``ForwardConfig``.
        prepare: the kernel that makes scaled tiles and scores once for all V tiles of a head.
        walks: the kernel that keeps the state before each chunk and its gradient behind it, or
            before and behind two, and makes the gradient of the values, from chunks as
            ``prepare`` made them.
        chunks: the kernel that makes the other gradients of a chunk, which may be a longer one;
            with ``keep`` 2 states are kept for every second of them.
        states: the kernel that finds what segments add to the state and to its gradient.
        segment: tokens per segment, a multiple of all chunk sizes; 0 walks whole sequences.
    """

    op: ClassVar[Op] = Op.BACKWARD
    main: ClassVar[str] = "gla_bwd_chunks"
    PARTS: ClassVar[Mapping[str, str]] = {
        "gla_states": "states",
        "gla_prepare": "prepare",
        "gla_bwd_walks": "walks",
        "gla_bwd_walks_exact": "walks",
        "gla_bwd_chunks": "chunks",
        "gla_bwd_chunks_exact": "chunks",
    }

    prepare: PrepareKernelConfig
    walks: ChunkKernelConfig
    chunks: TileKernelConfig
    states: ChunkKernelConfig
    segment: int = 0

    @property
    def chunk_step(self) -> int:
        """What segments are a multiple of."""
        return max(self.chunks.kept_tokens, self.states.chunk)

    def tiles(self, spec: Specialisation) -> int:
        """Programs that share a sequence of a head, of which half walk back."""
        return 2 * math.ceil(spec.V / self.walks.block_v)

    def kernels(self) -> dict[str, KernelConfig]:
        """Template name to kernel config, in launch order."""
        c = self.chunks
        return {
            "gla_states": self.states,
            "gla_combine": CombineKernelConfig(),
            "gla_prepare": self.prepare,
            "gla_bwd_walks": self.walks,
            # The same grids, so the same tiles; of V a program of the second walks over any.
            "gla_bwd_walks_exact": replace(self.walks, num_warps=8, num_stages=1, tma=False),
            "gla_bwd_chunks": c,
            "gla_bwd_chunks_exact": ExactKernelConfig(
                *(c.chunk, c.block_k, min(c.block_v, 64), 8 if c.block_k > 64 else 4), keep=c.keep
            ),
        }

    def with_part(self, part: str, kernel: Any) -> ChunksBackwardConfig:
        """This config with another kernel config in field ``part``, and chunks that go with it."""
        change: dict[str, Any] = {part: kernel}
        walked = self.walks.chunk
        if part in ("walks", "prepare"):
            walked = kernel.chunk
        elif part == "chunks":
            walked = min(walked, kernel.chunk)
        for other in ("walks", "prepare"):
            change[other] = replace(change.get(other, getattr(self, other)), chunk=walked)
        chunks = change.get("chunks", self.chunks)
        if chunks.keep > 1 and chunks.chunk > MOST_PREPARED * walked:
            change["chunks"] = replace(chunks, keep=1)
        return replace(self, **change)

    @property
    def slug(self) -> str:
        segment = f"-seg{self.segment}" if self.segment else ""
        before = f"wk_{self.walks.slug}-pre_{self.prepare.slug}-st_{self.states.slug}"
        return f"{self.chunks.slug}-{before}{segment}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "prepare": self.prepare.to_dict(),
            "walks": self.walks.to_dict(),
            "chunks": self.chunks.to_dict(),
            "states": self.states.to_dict(),
            "segment": self.segment,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config") -> ChunksBackwardConfig:
        d = strict_fields(cls, data, where)
        return cls(
            PrepareKernelConfig.from_dict(d["prepare"], f"{where}.prepare"),
            ChunkKernelConfig.from_dict(d["walks"], f"{where}.walks"),
            TileKernelConfig.from_dict(d["chunks"], f"{where}.chunks"),
            ChunkKernelConfig.from_dict(d["states"], f"{where}.states"),
            strict_int(d, "segment", where),
        )


@dataclass(frozen=True)
class ScalarForwardConfig:
    """How one forward problem with a scalar gate runs: one kernel.

    Attributes:
        op, main, PARTS: as in ``ForwardConfig``.
        fwd: the kernel.
    """

    op: ClassVar[Op] = Op.SCALAR_FORWARD
    main: ClassVar[str] = "scalar_fwd"
    PARTS: ClassVar[Mapping[str, str]] = {"scalar_fwd": "fwd"}

    fwd: TurnedKernelConfig

    def kernels(self) -> dict[str, KernelConfig]:
        """Template name to kernel config, in launch order."""
        return {"scalar_fwd": self.fwd}

    def with_part(self, part: str, kernel: Any) -> ScalarForwardConfig:
        """This config with another kernel config in field ``part``."""
        change: dict[str, Any] = {part: kernel}
        return replace(self, **change)

    @property
    def slug(self) -> str:
        return self.fwd.slug

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config") -> ScalarForwardConfig:
        d = strict_fields(cls, data, where)
        return cls(TurnedKernelConfig.from_dict(d["fwd"], f"{where}.fwd"))


@dataclass(frozen=True)
class ScalarBackwardConfig:
    """How one backward problem with a scalar gate runs: ``chunks``, or ``grads`` and ``dv``.

    Attributes:
        op, PARTS: as in ``ForwardConfig``.
        states: the kernel that keeps the state at the start of each chunk, and for ``chunks`` the
            gradient of the state at its end.
        chunks: the kernel that makes all gradients of a chunk, for all chunks at once; or None.
        grads: the kernel that makes dq, dk and dg on its way back through a sequence; or None.
        dv: the kernel that makes dv likewise. Beside ``chunks`` it may be missing; where K = V it
            makes dk, too, if nobody wants dg.
    """

    op: ClassVar[Op] = Op.SCALAR_BACKWARD
    PARTS: ClassVar[Mapping[str, str]] = {
        "scalar_states": "states",
        "scalar_bwd_chunks": "chunks",
        "scalar_bwd": "grads",
        "scalar_bwd_dv": "dv",
    }

    states: ChunkKernelConfig
    chunks: ChunkKernelConfig | None = None
    grads: TileKernelConfig | None = None
    dv: ChunkKernelConfig | None = None

    @property
    def main(self) -> str:
        """The kernel that decides how long it takes."""
        return "scalar_bwd" if self.chunks is None else "scalar_bwd_chunks"

    @property
    def chunk(self) -> int:
        """Tokens from one kept state to the next."""
        return self.states.chunk

    def kernels(self) -> dict[str, KernelConfig]:
        """Template name to kernel config, in launch order."""
        found = {name: getattr(self, part) for name, part in self.PARTS.items()}
        return {name: config for name, config in found.items() if config is not None}

    def with_part(self, part: str, kernel: Any) -> ScalarBackwardConfig:
        """This config with another kernel config in field ``part``, and equal chunks."""
        change: dict[str, Any] = {part: kernel}
        if part != "dv":
            for other in ("states", "chunks", "grads"):
                old = getattr(self, other)
                if other != part and old is not None:
                    change[other] = replace(old, chunk=kernel.chunk)
        return replace(self, **change)

    @property
    def slug(self) -> str:
        main = self.grads or self.chunks
        dv = f"-dv_{self.dv.slug}" if self.dv else ""
        return f"{main.slug if main else ''}-st_{self.states.slug}{dv}"

    def to_dict(self) -> dict[str, Any]:
        parts = {part: getattr(self, part) for part in self.PARTS.values()}
        return {part: None if c is None else c.to_dict() for part, c in parts.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config") -> ScalarBackwardConfig:
        d = strict_fields(cls, data, where)
        chunks, grads, dv = d["chunks"], d["grads"], d["dv"]
        return cls(
            ChunkKernelConfig.from_dict(d["states"], f"{where}.states"),
            None if chunks is None else ChunkKernelConfig.from_dict(chunks, f"{where}.chunks"),
            None if grads is None else TileKernelConfig.from_dict(grads, f"{where}.grads"),
            None if dv is None else ChunkKernelConfig.from_dict(dv, f"{where}.dv"),
        )


@dataclass(frozen=True)
class DecodeConfig:
    """How decoding runs: one kernel.

    Attributes:
        op, main, PARTS: as in ``ForwardConfig``.
        decode: the kernel.
    """

    op: ClassVar[Op] = Op.DECODE
    main: ClassVar[str] = "gla_decode"
    PARTS: ClassVar[Mapping[str, str]] = {"gla_decode": "decode"}

    decode: DecodeKernelConfig

    def kernels(self) -> dict[str, KernelConfig]:
        """Template name to kernel config, in launch order."""
        return {"gla_decode": self.decode}

    def with_part(self, part: str, kernel: Any) -> DecodeConfig:
        """This config with another kernel config in field ``part``."""
        change: dict[str, Any] = {part: kernel}
        return replace(self, **change)

    @property
    def slug(self) -> str:
        return self.decode.slug

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config") -> DecodeConfig:
        d = strict_fields(cls, data, where)
        return cls(DecodeKernelConfig.from_dict(d["decode"], f"{where}.decode"))


Config = (
    ForwardConfig
    | BackwardConfig
    | ChunksBackwardConfig
    | ScalarForwardConfig
    | ScalarBackwardConfig
    | DecodeConfig
)

CONFIGS: dict[Op, tuple[type[Config], ...]] = {
    Op.FORWARD: (ForwardConfig,),
    Op.BACKWARD: (BackwardConfig, ChunksBackwardConfig),
    Op.SCALAR_FORWARD: (ScalarForwardConfig,),
    Op.SCALAR_BACKWARD: (ScalarBackwardConfig,),
    Op.DECODE: (DecodeConfig,),
}
"""Which configs each op takes, that of its default first."""


def config_from_dict(op: Op, data: Mapping[str, Any], where: str = "config") -> Config:
    """The config of an op that ``to_dict`` gave.

    Raises:
        ConfigError: keys or types are wrong.
    """
    kinds = CONFIGS[op]
    if len(kinds) > 1 and isinstance(data, Mapping):
        # Which one it is, the parts tell that only one of them has.
        for kind in kinds[1:]:
            if set(data) & (set(kind.PARTS.values()) - set(kinds[0].PARTS.values())):
                return kind.from_dict(data, where)
    return kinds[0].from_dict(data, where)


def padded_k(spec: Specialisation) -> int:
    """K padded to what kernels that hold all of it use: a power of two, at least 16."""
    return max(16, 1 << (spec.K - 1).bit_length())


def padded_v(spec: Specialisation) -> int:
    return max(16, 1 << (spec.V - 1).bit_length())


# Legality.


_CHOICES: dict[str, tuple[int, ...]] = {
    "chunk": CHUNKS,
    "block_k": BLOCKS_K,
    "block_v": BLOCKS_V,
    "num_warps": WARPS,
    "num_stages": STAGES,
    "max_registers": MAX_REGISTERS,
    "keep": KEEPS,
    "lead": LEADS,
}


def lesser_choices(config: KernelConfig, name: str) -> list[int]:
    """The choices below that of field ``name``, downwards; none if there is no such choice."""
    current = getattr(config, name, 0)
    return [value for value in reversed(_CHOICES[name]) if value < current]


LEADING = ("fwd", "grads")
"""Parts of configs whose kernels may find the way to their segments themselves."""
STOPPING = ("summary", "states")
"""Parts whose kernels find what segments add."""


def _why_illegal_kernel(
    spec: Specialisation,
    config: KernelConfig,
    gpu: GpuSpec,
    what: str,
) -> str | None:
    """What is wrong with choices, tiles and descriptors of one kernel."""
    values = config.to_dict()
    for name, allowed in _CHOICES.items():
        if name in values and values[name] not in allowed:
            return f"{what}.{name} must be one of {allowed}, got {values[name]}"
    if values.get("lead") and what not in LEADING:
        return f"{what}.lead must be 0"
    if values.get("stops") and (what not in STOPPING or spec.gate.is_scalar):
        return f"{what}.stops must be false"
    if values.get("product_ends") and (what != "fwd" or values.get("lead")):
        return f"{what}.product_ends must be false"
    # Without a tile of its own a program holds all of K.
    block_k = values.get("block_k", padded_k(spec))
    if block_k > padded_k(spec):
        return f"{what}.block_k {block_k} exceeds K padded to {padded_k(spec)}"
    if isinstance(config, PrepareKernelConfig):
        return None
    block_v = values["block_v"]
    if block_v > padded_v(spec):
        return f"{what}.block_v {block_v} exceeds V padded to {padded_v(spec)}"
    # The state tile alone; a thread has 255 registers.
    state = block_k * block_v // (32 * config.num_warps)
    if state > MAX_STATE_REGISTERS:
        return f"{what}: the [{block_k}, {block_v}] state needs {state} registers"
    if values.get("tma"):
        if gpu.capability < (9, 0):
            return f"{what}.tma needs capability 9.0, {gpu.name} has {gpu.capability}"
        row_bytes = {
            "K": spec.K * spec.dtype.itemsize,
            "V": spec.V * spec.dtype.itemsize,
            "gate": 0 if spec.gate.is_scalar else spec.K * spec.gate_dtype.itemsize,
        }
        for name, size in row_bytes.items():
            if size % 16:
                return f"{what}.tma needs rows of whole 16 bytes, {name} has {size}"
    return None


def _why_too_large(
    spec: Specialisation,
    config: ChunkKernelConfig | TurnedKernelConfig | TileKernelConfig,
    gpu: GpuSpec,
    what: str,
    k_tiles: int,
    v_tiles: int,
) -> str | None:
    """Whether the inputs of the stages fit, which every implementation must hold.

    Args:
        spec: of the problem.
        config: of the kernel.
        gpu: where it runs.
        what: the kernel's part in the config.
        k_tiles: inputs with K channels, apart from the gate.
        v_tiles: inputs with V channels.
    """
    block_k = config.block_k if isinstance(config, TileKernelConfig) else padded_k(spec)
    gate = block_k * spec.gate_dtype.itemsize if spec.gate is Gate.VECTOR else 0
    row = (k_tiles * block_k + v_tiles * config.block_v) * spec.dtype.itemsize + gate
    stages = max(1, config.num_stages - 1)
    if config.chunk * row * stages > gpu.shared_per_block:
        return (
            f"{what}: {stages} stages of inputs need {config.chunk * row * stages} bytes of "
            f"shared memory, {gpu.name} has {gpu.shared_per_block} per block"
        )
    return None


def _why_illegal_walk(
    spec: Specialisation,
    config: ChunkKernelConfig | TurnedKernelConfig | TileKernelConfig,
    gpu: GpuSpec,
    what: str,
    k_tiles: int,
    v_tiles: int,
) -> str | None:
    return _why_illegal_kernel(spec, config, gpu, what) or _why_too_large(
        spec, config, gpu, what, k_tiles, v_tiles
    )


def _why_illegal_prepared(
    spec: Specialisation,
    config: ChunkKernelConfig,
    prepare: PrepareKernelConfig,
    gpu: GpuSpec,
    what: str,
    k_tiles: int,
) -> str | None:
    """What is wrong with a kernel that reads prepared chunks: v, and one tile or two with scores.

    Args:
        spec: of the problem.
        config: of the kernel.
        prepare: of the kernel that makes the chunks.
        gpu: where it runs.
        what: the kernel's part in the config.
        k_tiles: 2 for scaled queries and keys and their scores, 1 for the keys alone.
    """
    reason = _why_illegal_kernel(spec, config, gpu, what)
    if reason:
        return reason
    if config.chunk != prepare.chunk:
        return f"{what}.chunk must be prepare.chunk {prepare.chunk}, got {config.chunk}"
    size = DType.BF16.itemsize if spec.dtype is DType.BF16 else DType.FP32.itemsize
    row = (k_tiles * padded_k(spec) + (k_tiles - 1) * config.chunk) * size
    row += config.block_v * spec.dtype.itemsize
    stages = max(1, config.num_stages - 1)
    if config.chunk * row * stages > gpu.shared_per_block:
        return (
            f"{what}: {stages} stages of inputs need {config.chunk * row * stages} bytes of "
            f"shared memory, {gpu.name} has {gpu.shared_per_block} per block"
        )
    return None


def _why_illegal_forward(spec: Specialisation, config: ForwardConfig, gpu: GpuSpec) -> str | None:
    if config.prepare is not None:
        if config.fwd.product_ends:
            return "fwd.product_ends is for chunks that nothing prepared"
        reason = _why_illegal_kernel(
            spec, config.prepare, gpu, "prepare"
        ) or _why_illegal_prepared(spec, config.fwd, config.prepare, gpu, "fwd", 2)
    else:
        reason = _why_illegal_walk(spec, config.fwd, gpu, "fwd", 2, 1)
    if reason:
        return reason
    if config.fwd.lead:
        return _why_illegal_lead(config)
    if (config.segment == 0) != (config.summary is None):
        return "summary must be given exactly when segment is not 0"
    if config.summary is not None:
        if config.prepare is not None:
            reason = _why_illegal_prepared(spec, config.summary, config.prepare, gpu, "summary", 1)
        else:
            reason = _why_illegal_walk(spec, config.summary, gpu, "summary", 1, 1)
        if reason:
            return reason
        return _segment_illegal(config.segment, config.chunk_step)
    return None


def _why_illegal_lead(config: ForwardConfig) -> str | None:
    """What is wrong with a config whose programs find the states before their segments."""
    if config.prepare is not None or config.summary is not None:
        return "fwd.lead needs neither summary nor prepare"
    return _segment_illegal(config.segment, config.chunk_step)


def _segment_illegal(segment: int, step: int) -> str | None:
    if segment < step or segment % step:
        return f"segment must be a positive multiple of {step}, got {segment}"
    return None


def grads_illegal(spec: Specialisation, grads: TileKernelConfig, gpu: GpuSpec) -> str | None:
    """``why_illegal`` of the gradient kernel alone."""
    reason = _why_illegal_walk(spec, grads, gpu, "grads", 2, 2)
    if reason is None and grads.dv and grads.block_k < padded_k(spec):
        return f"grads.dv takes all of K in a tile, block_k {grads.block_k} is less"
    return reason


def _why_illegal_backward(
    spec: Specialisation, config: BackwardConfig, gpu: GpuSpec
) -> str | None:
    grads, states = config.grads, config.states
    reason = (
        (states and _why_illegal_walk(spec, states, gpu, "states", 1, 1))
        or grads_illegal(spec, grads, gpu)
        or (config.dv and _why_illegal_walk(spec, config.dv, gpu, "dv", 2, 1))
    )
    if reason:
        return reason
    if grads.dv == (config.dv is not None):
        return "dv must be given exactly when grads.dv is false"
    if (states is None) != (grads.lead > 0):
        return "states must be given exactly when grads.lead is 0"
    if states is None and grads.keep > 1:
        return "grads.lead needs grads.keep 1"
    if states is not None and grads.kept_tokens % states.chunk:
        return f"grads.chunk times grads.keep must be a multiple of states.chunk {states.chunk}"
    if config.segment or states is None:
        return _segment_illegal(config.segment, config.chunk_step)
    return None


def chunks_illegal(spec: Specialisation, chunks: TileKernelConfig, gpu: GpuSpec) -> str | None:
    """``why_illegal`` of the kernel that makes all chunks' gradients at once, alone."""
    reason = _why_illegal_walk(spec, chunks, gpu, "chunks", 0, 2)
    if reason is None and (chunks.tma or chunks.dv):
        return "chunks.tma and chunks.dv are for kernels that walk"
    if reason is None and chunks.keep > 2:
        return f"chunks.keep must be 1 or 2, got {chunks.keep}"
    return reason


def _why_illegal_chunks_backward(
    spec: Specialisation, config: ChunksBackwardConfig, gpu: GpuSpec
) -> str | None:
    reason = (
        _why_illegal_walk(spec, config.states, gpu, "states", 1, 1)
        or _why_illegal_kernel(spec, config.prepare, gpu, "prepare")
        or _why_illegal_prepared(spec, config.walks, config.prepare, gpu, "walks", 2)
        or chunks_illegal(spec, config.chunks, gpu)
    )
    if reason:
        return reason
    if config.chunks.chunk % config.walks.chunk:
        return f"chunks.chunk must be a multiple of walks.chunk {config.walks.chunk}"
    if config.chunks.keep > 1 and config.chunks.chunk > MOST_PREPARED * config.walks.chunk:
        return f"chunks.keep takes at most two chunks of walks in one, {config.walks.chunk} each"
    kept = config.chunks.kept_tokens
    if config.states.chunk % kept and kept % config.states.chunk:
        return f"states.chunk and chunks.chunk times chunks.keep, {kept}, must fit into each other"
    return _segment_illegal(config.segment, config.chunk_step) if config.segment else None


def scalar_grads_illegal(
    spec: Specialisation, grads: TileKernelConfig, gpu: GpuSpec
) -> str | None:
    """``why_illegal`` of the gradient kernel that walks, alone."""
    reason = _why_illegal_walk(spec, grads, gpu, "grads", 2, 2)
    if reason:
        return reason
    if grads.dv or grads.keep > 1 or grads.lead:
        return "grads.dv, grads.keep and grads.lead are not for scalar gates"
    parts = grads.tiles(spec)
    if parts > MOST_PARTS:
        return f"grads cut the state into {parts} tiles, at most {MOST_PARTS} can be added up"
    return None


def _why_illegal_scalar_backward(
    spec: Specialisation, config: ScalarBackwardConfig, gpu: GpuSpec
) -> str | None:
    states, chunks, grads, dv = config.states, config.chunks, config.grads, config.dv
    reason = (
        _why_illegal_walk(spec, states, gpu, "states", 1, 1)
        or (chunks and _why_illegal_walk(spec, chunks, gpu, "chunks", 1, 2))
        or (grads and scalar_grads_illegal(spec, grads, gpu))
        or (dv and _why_illegal_walk(spec, dv, gpu, "dv", 2, 1))
    )
    if reason:
        return reason
    if (chunks is None) == (grads is None):
        return "one of chunks and grads must be given"
    for name, part in (("chunks", chunks), ("grads", grads)):
        if part is not None and part.chunk != states.chunk:
            return f"{name}.chunk must be that of states, {states.chunk}"
    return "dv must be given beside grads" if grads is not None and dv is None else None


def why_illegal(spec: Specialisation, config: Config, gpu: GpuSpec) -> str | None:
    """Why ``config`` cannot serve ``spec`` on ``gpu``, or ``None`` if it can be tried.

    A legal config may still need more shared memory than there is; only compiling tells, and
    ``glac.compile`` refuses it then.
    """
    if not config.op.serves(spec.gate):
        return f"a {spec.gate.value} gate has no {config.op.value}"
    spec = spec.in_pass(config.op)
    if isinstance(config, ForwardConfig):
        return _why_illegal_forward(spec, config, gpu)
    if isinstance(config, BackwardConfig):
        return _why_illegal_backward(spec, config, gpu)
    if isinstance(config, ChunksBackwardConfig):
        return _why_illegal_chunks_backward(spec, config, gpu)
    if isinstance(config, ScalarForwardConfig):
        return _why_illegal_walk(spec, config.fwd, gpu, "fwd", 2, 1)
    if isinstance(config, ScalarBackwardConfig):
        return _why_illegal_scalar_backward(spec, config, gpu)
    return _why_illegal_kernel(spec, config.decode, gpu, "decode")


def is_legal(spec: Specialisation, config: Config, gpu: GpuSpec) -> bool:
    return why_illegal(spec, config, gpu) is None


# Defaults.


def _walking_kernel(spec: Specialisation, gpu: GpuSpec) -> ChunkKernelConfig:
    """Measured on Hopper at K = V = 128: 32-token chunks and the whole V per program."""
    wide = spec.dtype is DType.FP32 or spec.dtype is DType.FP16
    bk = padded_k(spec)
    block_v = min(padded_v(spec), 64 if wide or bk > 128 else 128)
    if bk > 256:
        block_v = min(block_v, 32)
    warps = 8 if bk * block_v > 64 * 64 else 4
    chunk = 16 if (wide and bk > 64) or bk > 256 else 32
    stages = 2 if wide or bk > 128 or gpu.capability < (9, 0) else 3
    return ChunkKernelConfig(chunk, block_v, warps, stages)


def default_forward(spec: Specialisation, gpu: GpuSpec, bucket: Bucket) -> ForwardConfig:
    """The forward config used where nothing was tuned: safe on every listed GPU, decent on Hopper.

    The sequence is split when the heads alone would leave most of the GPU idle
    (docs/performance.md).
    """
    return cut_forward(ForwardConfig(_walking_kernel(spec, gpu)), spec, bucket, gpu)


def cut_forward(
    config: ForwardConfig, spec: Specialisation, bucket: Bucket, gpu: GpuSpec
) -> ForwardConfig:
    """``config`` with segments that suit ``bucket``, by the tile that it walks with."""
    segment = suitable_segment(config, spec, bucket, gpu)
    if not segment:
        return replace(config, segment=0, summary=None)
    return replace(config, segment=segment, summary=config.summary or config.fwd)


def default_backward(spec: Specialisation, gpu: GpuSpec, bucket: Bucket) -> BackwardConfig:
    """The backward config used where nothing was tuned: safe on every listed GPU.

    Measured on Hopper at K = V = 128: half of K and the whole V per program, four warps, so that
    two programs share an SM; heads of 64 channels get all four gradients from one kernel.
    """
    wide = spec.dtype is DType.FP32 or spec.dtype is DType.FP16
    block_k, block_v = min(padded_k(spec), 64), min(padded_v(spec), 64 if wide else 128)
    walk = _walking_kernel(spec, gpu)
    chunk = 16 if wide or gpu.capability < (9, 0) else 32
    whole = block_k == padded_k(spec)
    config = BackwardConfig(
        states=replace(walk, chunk=min(walk.chunk, chunk)),
        grads=TileKernelConfig(chunk, block_k, block_v, 4, walk.num_stages, dv=whole),
        dv=None if whole else walk,
    )
    return cut_backward(config, spec, bucket, gpu)


def cut_backward(
    config: CutBackward, spec: Specialisation, bucket: Bucket, gpu: GpuSpec
) -> CutBackward:
    """``config`` with segments that suit ``bucket``, which needs no other kernels."""
    return replace(config, segment=suitable_segment(config, spec, bucket, gpu))


def suitable_segment(
    config: ForwardConfig | BackwardConfig | ChunksBackwardConfig,
    spec: Specialisation,
    bucket: Bucket,
    gpu: GpuSpec,
) -> int:
    """Tokens per segment where whole sequences would leave most of the GPU idle, else 0.

    As many segments as lead to two programs per SM forward, where they cost a pass over keys and
    values, so that fewer than four gain nothing; and to one per SM backward, which makes that pass
    anyway. 25 of the 28 rows tuned on an H100 have just these (docs/performance.md). But none are
    shorter than suits the chain of states that links them, by FlashQLA's latency model: 3 *
    sqrt(programs * chunks / SMs) chunks.
    """
    tokens = 1 << max(0, bucket.t)
    programs = (1 << max(0, bucket.bh)) * config.tiles(spec)
    if 2 * programs > gpu.sm_count or tokens < 1024:
        return 0
    forward = config.op is Op.FORWARD
    wanted = 1 << round(math.log2(gpu.sm_count * (2 if forward else 1)))
    step = config.chunk_step
    chunks = 3.0 * math.sqrt(programs * (tokens / step) / gpu.sm_count)
    shortest = step * (1 << max(3, round(math.log2(chunks))))
    # Rounded up to a power of two, as some heads have three tiles.
    segment = max(shortest, 1 << (tokens * programs // wanted - 1).bit_length())
    return 0 if segment * (4 if forward else 2) > tokens else segment


def packed_segment(
    config: ForwardConfig | BackwardConfig | ChunksBackwardConfig,
    spec: Specialisation,
    bucket: Bucket,
    gpu: GpuSpec,
) -> int:
    """Tokens per segment of sequences whose lengths only the device knows; never 0.

    Their mean is that of the bucket. Backward a segment has as many tokens: with N sequences there
    is memory for N more segments than tokens fill. Forward, where a cut costs a pass over what was
    cut, twice as many, or what each SM has to do if that is more: at 16 sequences of 8 heads of
    128 channels, in which the longest has 1.3, 1.6 and 5.8 times the mean, whole sequences took
    200, 233 and 821 us, these segments 222, 254 and 448, segments of half the mean 310 to 320.
    """
    tokens = 1 << max(0, bucket.t)
    if config.op is Op.FORWARD:
        share = (tokens << max(0, bucket.bh)) * config.tiles(spec) // gpu.sm_count
        tokens = max(2 * tokens, 1 << share.bit_length())
    tokens = suitable_segment(config, spec, bucket, gpu) or tokens
    return min(max(tokens, config.chunk_step), 1 << 30)  # the kernels count in 32 bits


def leads(config: Config) -> bool:
    """Whether programs walk to their segments from the ends of the sequence.

    What each walks grows with the sequence, so such a config is for the lengths it was tuned at.
    """
    if isinstance(config, ForwardConfig):
        return config.fwd.lead > 0
    return isinstance(config, BackwardConfig) and config.grads.lead > 0


def without_way(config: Config, spec: Specialisation, gpu: GpuSpec) -> Config:
    """The same tiles for whole sequences, if programs walk to their segments; else ``config``."""
    if isinstance(config, ForwardConfig) and leads(config):
        return ForwardConfig(replace(config.fwd, lead=0))
    if isinstance(config, BackwardConfig) and leads(config):
        grads = replace(config.grads, lead=0)
        walk = _walking_kernel(spec, gpu)
        states = replace(walk, chunk=min(walk.chunk, grads.chunk), tma=grads.tma)
        return BackwardConfig(states, grads, config.dv)
    return config


def suited(
    config: Config,
    spec: Specialisation,
    bucket: Bucket,
    gpu: GpuSpec,
    *,
    new_kernels: bool = False,
) -> Config:
    """A config that was made for another bucket, with the segments that suit this one.

    It needs no other kernels, as the length of a segment is an argument at run time; with
    ``new_kernels`` a forward config may also get the kernel for segments that it lacks. One whose
    programs walk to their segments stays as it is: what suits others was not measured.
    """
    if leads(config):
        return config
    if isinstance(config, BackwardConfig):
        return cut_backward(config, spec, bucket, gpu)
    if isinstance(config, ChunksBackwardConfig):
        return cut_backward(config, spec, bucket, gpu)
    if isinstance(config, ForwardConfig) and (config.summary is not None or new_kernels):
        return cut_forward(config, spec, bucket, gpu)
    return config


def default_scalar_forward(spec: Specialisation, gpu: GpuSpec) -> ScalarForwardConfig:
    """The forward config of a scalar gate where nothing was tuned."""
    wide = spec.dtype is not DType.BF16
    hopper = gpu.capability >= (9, 0)
    bk, bv = padded_k(spec), padded_v(spec)
    if hopper and not wide and bk <= 64:
        return ScalarForwardConfig(TurnedKernelConfig(64, min(bv, 64), 4, 3))
    if hopper and not wide and bk <= 128:
        # Measured on an H100: 120, 459 and 88 us at 16,2048,8,128,128, 4,4096,64,128,128 and
        # 8,2048,4,128,256, where tiles of 64 tokens, 128 channels and 8 warps take 124, 461, 121.
        aligned = spec.K % 8 == spec.V % 8 == 0
        tile = TurnedKernelConfig(32, min(bv, 64), 4, 4, tma=aligned, turned=True)
        return ScalarForwardConfig(tile)
    block_v = min(bv, 32 if wide and bk > 64 else 64)
    warps = 8 if bk * block_v > 128 * 64 else 4
    return ScalarForwardConfig(TurnedKernelConfig(32 if wide else 64, block_v, warps, 2))


def default_scalar_backward(
    spec: Specialisation, gpu: GpuSpec, bucket: Bucket
) -> ScalarBackwardConfig:
    """The backward config of a scalar gate where nothing was tuned.

    Measured on an H100: with as many heads as SMs, walking takes 503 us at 16,2048,8,128,128 where
    chunks at once take 627; with 32 heads 392 instead of 301 at 8,2048,4,128,256.
    """
    wide = spec.dtype is not DType.BF16
    bk, bv = padded_k(spec), padded_v(spec)
    chunk = 32 if wide else 64
    plain = ChunkKernelConfig(chunk, min(bv, 32 if wide else 64), 4 if bk <= 128 else 8, 2)
    states, grads = plain, None
    if gpu.capability >= (9, 0) and not wide and bk <= 128:
        tile = min(bv, 128)
        aligned = spec.K % 8 == spec.V % 8 == 0
        states = ChunkKernelConfig(chunk, tile, 8 if bk * tile > 64 * 64 else 4, 3, aligned)
        if bk == 128 == bv and aligned:
            grads = TileKernelConfig(chunk, bk, bv, 8, 2, tma=True)
    dv = replace(states, chunk=32) if bk > 128 else states
    walking = ScalarBackwardConfig(states, None, grads, dv)
    if 2 * walking_programs(walking, spec, bucket) >= gpu.sm_count:
        return walking
    # Without descriptors: a program would make nine of them, and lives for one chunk.
    at_once = replace(plain, num_stages=1 if wide else 2)
    bare = spec.K == spec.V and 2 << max(0, bucket.bh) >= gpu.sm_count
    return ScalarBackwardConfig(states, at_once, None, dv if bare else None)


def walking_programs(config: ScalarBackwardConfig, spec: Specialisation, bucket: Bucket) -> int:
    """Programs that walk back through the sequences of ``bucket``, 0 for chunks at once."""
    return 0 if config.grads is None else config.grads.tiles(spec) << max(0, bucket.bh)


def default_decode(spec: Specialisation) -> DecodeConfig:
    """The decode config where nothing was tuned: small tiles, many programs on an SM.

    What limits decoding is how many bytes an SM has on their way, so how many programs share it:
    at K = V = 128 and bf16 states it took 16.0 us with five programs on an SM and 17.7 with four.
    """
    block_v = min(padded_v(spec), 32)
    if spec.gate is Gate.LOWRANK:  # which also holds its [K, R] weight in registers
        return DecodeConfig(DecodeKernelConfig(block_v, 4))
    if padded_k(spec) <= 64:
        return DecodeConfig(DecodeKernelConfig(block_v, 2))
    return DecodeConfig(DecodeKernelConfig(block_v, 4, 96 if padded_k(spec) == 128 else 0))


def default_config(op: Op, spec: Specialisation, gpu: GpuSpec, bucket: Bucket) -> Config:
    """The config used where nothing was tuned."""
    if op is Op.FORWARD:
        return default_forward(spec, gpu, bucket)
    if op is Op.BACKWARD:
        return default_backward(spec, gpu, bucket)
    if op is Op.SCALAR_FORWARD:
        return default_scalar_forward(spec, gpu)
    if op is Op.SCALAR_BACKWARD:
        return default_scalar_backward(spec, gpu, bucket)
    return default_decode(spec)
