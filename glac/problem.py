"""What a caller brings, and which part of it a kernel is compiled for.

A *specialisation* is compile time: head dims, dtypes, gate kind. Batch, length, heads, strides,
states and scale are run time, so a few hundred kernels serve everyone. A *bucket* is a coarse
power-of-two view of the run-time sizes; it chooses a config and never decides correctness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from enum import Enum
from typing import Any

from glac.errors import ConfigError
from glac.record import dataclass

MAX_K = 512
MAX_V = 512
LOWRANK_RANKS = (8, 16, 32, 64)
DECODE_TOKENS = 16
"""Up to so many tokens a problem stands for decoding, where one op of it has to be chosen."""


class DType(str, Enum):
    """Element types of the input tensors."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    @property
    def itemsize(self) -> int:
        return 4 if self is DType.FP32 else 2


class Precision(str, Enum):
    """How kernels multiply fp32 inputs; other inputs are always multiplied once."""

    IEEE = "ieee"
    """As three TF32 products, which is close to fp32."""
    TF32 = "tf32"
    """As one TF32 product, about 1e-3."""


class Op(str, Enum):
    """What is computed. Each op has kernels, configs and tuned rows of its own."""

    FORWARD = "forward"
    BACKWARD = "backward"
    SCALAR_FORWARD = "scalar-forward"
    SCALAR_BACKWARD = "scalar-backward"
    DECODE = "decode"

    @property
    def order(self) -> int:
        """Place among the ops, for listings."""
        return list(Op).index(self)

    def serves(self, gate: Gate) -> bool:
        """Whether the op exists for a kind of gate."""
        return self is Op.DECODE or gate.is_scalar == (
            self in (Op.SCALAR_FORWARD, Op.SCALAR_BACKWARD)
        )


class Gate(str, Enum):
    """How the forget gate arrives: a dense ``[B, T, H, K]`` tensor, a low-rank product, or one
    number per token and head.

    A gate that is constant per head, or absent, is a scalar one with strides of 0.
    """

    VECTOR = "vector"
    LOWRANK = "lowrank"
    SCALAR = "scalar"

    @property
    def is_scalar(self) -> bool:
        return self is Gate.SCALAR

    @property
    def passes(self) -> tuple[Op, Op]:
        """The forward and the backward op of chunked attention with this gate."""
        if self.is_scalar:
            return Op.SCALAR_FORWARD, Op.SCALAR_BACKWARD
        return Op.FORWARD, Op.BACKWARD


def strict_fields(cls: type, data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``data`` if its keys are exactly the fields of dataclass ``cls``, else ``ConfigError``."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: wanted a mapping, got {type(data).__name__}")
    names = {f.name for f in fields(cls)}
    unknown = sorted(set(map(str, data)) - names)
    missing = sorted(names - set(map(str, data)))
    if unknown or missing:
        parts = []
        if unknown:
            parts.append(f"unknown keys {unknown}")
        if missing:
            parts.append(f"missing keys {missing}")
        raise ConfigError(
            f"{where}: {' and '.join(parts)} in a {cls.__name__}",
            hint=f"the keys are {sorted(names)}",
        )
    return dict(data)


def strict_int(data: Mapping[str, Any], key: str, where: str) -> int:
    value = data[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{where}: {key} must be an integer, got {value!r}")
    return value


@dataclass(frozen=True, order=True)
class Specialisation:
    """The compile-time part of a problem.

    Attributes:
        K: key (and query, and gate) channels per head, 1..512.
        V: value channels per head, 1..512.
        dtype: of q, k, v and of the output.
        gate: how the forget gate arrives.
        gate_dtype: of the dense gate, or of the low-rank gate's bias: ``dtype`` or fp32.
        rank: of the low-rank gate (8, 16, 32, 64), 0 for a dense one.
        precision: of the products of fp32 inputs, ``ieee`` for others.
    """

    K: int
    V: int
    dtype: DType
    gate: Gate
    gate_dtype: DType
    rank: int = 0
    precision: Precision = Precision.IEEE

    def __post_init__(self) -> None:
        if not 1 <= self.K <= MAX_K:
            raise ConfigError(f"K must be in 1..{MAX_K}, got {self.K}")
        if not 1 <= self.V <= MAX_V:
            raise ConfigError(f"V must be in 1..{MAX_V}, got {self.V}")
        if self.gate_dtype not in (self.dtype, DType.FP32):
            raise ConfigError(
                f"gate_dtype must be {self.dtype.value} or fp32, got {self.gate_dtype.value}"
            )
        if self.gate is Gate.LOWRANK and self.rank not in LOWRANK_RANKS:
            raise ConfigError(f"rank must be one of {LOWRANK_RANKS}, got {self.rank}")
        if self.gate is not Gate.LOWRANK and self.rank != 0:
            raise ConfigError(f"a {self.gate.value} gate has rank 0, got {self.rank}")
        if self.precision is not Precision.IEEE and self.dtype is not DType.FP32:
            raise ConfigError(
                f"precision {self.precision.value} goes with fp32 inputs, got {self.dtype.value}"
            )

    @property
    def dense(self) -> Specialisation:
        """With a low-rank gate written out, as the backward pass has it; others are themselves.

        Beside fp16 the gate is fp32: in fp16 slow gates would lose too much.
        """
        if self.gate is not Gate.LOWRANK:
            return self
        gate_dtype = DType.BF16 if self.dtype is DType.BF16 else DType.FP32
        return replace(self, gate=Gate.VECTOR, gate_dtype=gate_dtype, rank=0)

    def in_pass(self, op: Op) -> Specialisation:
        """What the kernels of a config for ``op`` are compiled for."""
        return self.dense if op is Op.BACKWARD else self

    @property
    def slug(self) -> str:
        """Readable part of kernel names, for example ``k128_v128_lowrank16_bf16``."""
        gate = self.gate.value + (str(self.rank) if self.rank else "")
        wide = "_gfp32" if self.gate_dtype is not self.dtype else ""
        once = "" if self.precision is Precision.IEEE else f"_{self.precision.value}"
        return f"k{self.K}_v{self.V}_{gate}_{self.dtype.value}{wide}{once}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data; ``precision`` is left out where it is ``ieee``, as in most rows."""
        once = {} if self.precision is Precision.IEEE else {"precision": self.precision.value}
        return {
            "K": self.K,
            "V": self.V,
            "dtype": self.dtype.value,
            "gate": self.gate.value,
            "gate_dtype": self.gate_dtype.value,
            "rank": self.rank,
            **once,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "specialisation") -> Specialisation:
        if isinstance(data, Mapping):
            data = {"precision": Precision.IEEE.value, **data}
        d = strict_fields(cls, data, where)
        try:
            return cls(
                K=strict_int(d, "K", where),
                V=strict_int(d, "V", where),
                dtype=DType(d["dtype"]),
                gate=Gate(d["gate"]),
                gate_dtype=DType(d["gate_dtype"]),
                rank=strict_int(d, "rank", where),
                precision=Precision(d["precision"]),
            )
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.message}", hint=error.hint) from None
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None


def _round_log2(value: int) -> int:
    return math.floor(math.log2(value) + 0.5)


@dataclass(frozen=True, order=True)
class Bucket:
    """Rounded log2 of the number of heads in flight (B*H) and of the length (T)."""

    bh: int
    t: int

    def distance(self, other: Bucket) -> int:
        return abs(self.bh - other.bh) + abs(self.t - other.t)

    def to_dict(self) -> dict[str, int]:
        return {"bh": self.bh, "t": self.t}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "bucket") -> Bucket:
        d = strict_fields(cls, data, where)
        return cls(strict_int(d, "bh", where), strict_int(d, "t", where))


@dataclass(frozen=True)
class Problem:
    """A specialisation with the run-time sizes.

    Attributes:
        spec: the compile-time part.
        B: sequences of a dense batch; 1 for a packed one.
        T: tokens of each, or of all sequences of a packed batch.
        H: heads of the output.
        packed: sequences of a packed batch (``cu_seqlens``), 0 for a dense one.
        q_group: heads of the output that share a head of the queries, 1 unless heads are grouped.
        k_group: likewise of the keys.
        s_group: likewise of the values, the gate and the state.
    """

    spec: Specialisation
    B: int
    T: int
    H: int
    packed: int = 0
    q_group: int = 1
    k_group: int = 1
    s_group: int = 1

    @property
    def sequences(self) -> int:
        """Sequences of the batch, each with a state of its own."""
        return self.packed or self.B

    @property
    def state_heads(self) -> int:
        """Heads of values, gate and state."""
        return self.H // self.s_group

    @property
    def bucket(self) -> Bucket:
        """Of a packed batch that of a dense one with as many sequences and tokens."""
        mean = max(1, self.B * self.T // self.sequences)
        return Bucket(_round_log2(self.sequences * self.H), _round_log2(mean))

    @property
    def dense(self) -> Problem:
        """With the gate of ``Specialisation.dense``."""
        return self if self.spec.gate is not Gate.LOWRANK else replace(self, spec=self.spec.dense)

    @property
    def ops(self) -> tuple[Op, ...]:
        """What is tuned, and built untuned, of a problem: both passes, or decoding few tokens.

        Decoding multiplies nothing on the matrix units, and takes no precision.
        """
        few = self.T <= DECODE_TOKENS and self.spec.precision is Precision.IEEE
        return (Op.DECODE,) if few else self.spec.gate.passes

    def bytes(self, op: Op) -> int:
        """Bytes that ``op`` must move through memory: inputs read once, results written once.

        The forward pass reads q, k, v and the gate's inputs and writes o. The backward pass reads
        these inputs and do, and writes a gradient of each input's size. Neither counts states,
        which are optional, nor what kernels keep for each other. Decoding also reads and writes
        one fp32 state per sequence and head.
        """
        s = self.spec
        tokens = self.B * self.T
        keys = s.K * (self.H // self.q_group + self.H // self.k_group)
        inputs = (keys + s.V * self.state_heads) * s.dtype.itemsize * tokens + self._gate_bytes
        output = s.V * self.H * s.dtype.itemsize * tokens
        if op is Op.DECODE:
            states = 2 * self.sequences * self.state_heads * s.K * s.V * 4
            return inputs + output + states
        backward = op in (Op.BACKWARD, Op.SCALAR_BACKWARD)
        return 2 * inputs + output if backward else inputs + output

    @property
    def tensor_bytes(self) -> dict[str, int]:
        """Bytes of each input (the gate's tensors together) and of the output, as in ``bytes``."""
        channel = self.B * self.T * self.spec.dtype.itemsize
        return {
            "q": channel * self.spec.K * (self.H // self.q_group),
            "k": channel * self.spec.K * (self.H // self.k_group),
            "v": channel * self.spec.V * self.state_heads,
            "gate": self._gate_bytes,
            "o": channel * self.spec.V * self.H,
        }

    @property
    def state_bytes(self) -> int:
        """Bytes of one state of every sequence and head: ``[N, Hs, K, V]`` in fp32."""
        states = self.sequences * self.state_heads
        return states * self.spec.K * self.spec.V * DType.FP32.itemsize

    @property
    def _gate_bytes(self) -> int:
        """Of the dense gate, or of x, weight and bias."""
        s = self.spec
        heads = self.state_heads
        if s.gate is not Gate.LOWRANK:
            width = 1 if s.gate.is_scalar else s.K
            return self.B * self.T * heads * width * s.gate_dtype.itemsize
        per_head = (s.rank * s.dtype.itemsize + s.gate_dtype.itemsize) * s.K
        return self.B * self.T * s.rank * s.dtype.itemsize + heads * per_head

    @property
    def forward_bytes(self) -> int:
        """Bytes that a forward pass must move, see ``bytes``."""
        return self.bytes(self.spec.gate.passes[0])

    def __str__(self) -> str:
        return f"B={self.B} T={self.T} H={self.H} {self.spec.slug}"
