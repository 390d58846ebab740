"""The kernel templates: their arguments, their compile-time constants, their grids.

This table is the ABI. ``glac.generate`` compiles signatures from it, the pack manifest stores it,
and ``glac.launch`` packs arguments by it, so the three cannot disagree.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from glac.configs import (
    EXACT_ROWS,
    ChunkKernelConfig,
    CombineKernelConfig,
    DecodeKernelConfig,
    ExactKernelConfig,
    GateKernelConfig,
    KernelConfig,
    PrepareKernelConfig,
    SumsKernelConfig,
    TileKernelConfig,
    TurnedKernelConfig,
    padded_k,
)
from glac.problem import DType, Gate, Op, Precision, Specialisation
from glac.record import dataclass

TEMPLATE_DIR = Path(__file__).parent / "kernel_templates"


class Arg(NamedTuple):
    """A kernel parameter. ``kind``: a key of ``POINTERS``, i32 or fp32."""

    name: str
    kind: str

    @property
    def is_pointer(self) -> bool:
        return self.kind.startswith("*")


def _args(text: str) -> tuple[Arg, ...]:
    return tuple(Arg(*item.split(":")) for item in text.split())


@dataclass(frozen=True)
class Template:
    """One kernel template.

    Attributes:
        name: of the kernel function and of its file.
        args: parameters in declaration order, pointers first, without compile-time constants.
        grid: names of run-time factors of the one-dimensional grid (times ``tiles``).
    """

    name: str
    args: tuple[Arg, ...]
    grid: tuple[str, ...]

    @property
    def path(self) -> Path:
        return TEMPLATE_DIR / f"{self.name}.py"


_STRIDES = {
    name: " ".join(f"{name}_{axis}:i32" for axis in ("b", "t", "h"))
    for name in ("q", "k", "v", "do", "g")
}
_X_STRIDES = "x_b:i32 x_t:i32"
_GATE = "g:*gate x:*io w:*io bias:*gate"
_GATE_SCALARS = "inv_normalizer:fp32 clamp_log2:fp32"
_GROUPS = "q_group:i32 k_group:i32 s_group:i32"

_ALL_STRIDES = " ".join(_STRIDES[name] for name in ("q", "k", "v", "do", "g"))

_BWD_ARGS = (
    "q:*io k:*io v:*io g:*gate do:*io cu:*i32 h0:*fp32 states:*state dht:*fp32 ends:*fp32 dq:*io "
    "dk:*io dv:*io dg:*gate dh0:*fp32 flags:*i32 scale:fp32 T:i32 B:i32 N:i32 H:i32 n_seg:i32 "
    f"seg_first:i32 seg_count:i32 seg_len:i32 n_kept:i32 {_GROUPS} chain:i32 has_cu:i32 "
    f"has_h0:i32 has_dht:i32 has_dh0:i32 {_ALL_STRIDES}"
)

# Without what only the way from the first token takes.
_BWD_EXACT_ARGS = _BWD_ARGS.replace("h0:*fp32 ", "", 1).replace("has_h0:i32 ", "")

_WALKS_ARGS = (
    "q:*io k:*io v:*io g:*gate do:*io cu:*i32 h0:*fp32 starts:*fp32 dht:*fp32 ends:*fp32 "
    "qs:*state ks:*state scores:*state decays:*fp32 flags:*i32 states:*state dstates:*state "
    "dv:*io dh0:*fp32 scale:fp32 T:i32 N:i32 H:i32 n_seg:i32 seg_len:i32 n_chunks:i32 keep:i32 "
    f"n_kept:i32 {_GROUPS} has_cu:i32 has_h0:i32 has_dht:i32 has_dh0:i32 {_ALL_STRIDES}"
)
_CHUNKS_ARGS = (
    "q:*io k:*io v:*io g:*gate do:*io cu:*i32 qs:*state ks:*state decays:*fp32 ranges:*i32 "
    "states:*state dstates:*state dq:*io dk:*io dg:*gate flags:*i32 scale:fp32 T:i32 N:i32 "
    f"H:i32 n_seg:i32 seg_len:i32 n_kept:i32 n_prepared:i32 prepared:i32 {_GROUPS} has_cu:i32 "
    f"{_ALL_STRIDES}"
)

_QKV_STRIDES = "q_b:i32 q_t:i32 q_h:i32 k_b:i32 k_t:i32 k_h:i32 v_b:i32 v_t:i32 v_h:i32"

TEMPLATES: dict[str, Template] = {
    t.name: t
    for t in (
        Template(
            "gla_fwd",
            _args(
                f"q:*io k:*io v:*io {_GATE} o:*io cu:*i32 h0:*fp32 starts:*fp32 ht:*fp32 "
                f"scale:fp32 {_GATE_SCALARS} T:i32 N:i32 H:i32 n_seg:i32 seg_len:i32 {_GROUPS} "
                "has_cu:i32 has_h0:i32 has_ht:i32 has_bias:i32 "
                f"{_STRIDES['q']} {_STRIDES['k']} {_STRIDES['v']} {_STRIDES['g']} {_X_STRIDES}"
            ),
            ("segments", "heads"),
        ),
        Template(
            "gla_prepare",
            _args(
                f"q:*io k:*io {_GATE} cu:*i32 qs:*state ks:*state scores:*state ends:*fp32 "
                f"flags:*i32 scale:fp32 {_GATE_SCALARS} T:i32 N:i32 H:i32 n_chunks:i32 {_GROUPS} "
                f"has_cu:i32 has_bias:i32 {_STRIDES['q']} {_STRIDES['k']} {_STRIDES['g']} "
                f"{_X_STRIDES}"
            ),
            ("chunks", "heads"),
        ),
        Template(
            "gla_walk_states",
            _args(
                f"q:*io k:*io v:*io {_GATE} o:*io cu:*i32 starts:*fp32 decay:*fp32 ks:*state "
                f"ends:*fp32 flags:*i32 scale:fp32 {_GATE_SCALARS} T:i32 N:i32 H:i32 n_seg:i32 "
                f"seg_len:i32 n_chunks:i32 {_GROUPS} has_cu:i32 has_bias:i32 "
                f"{_STRIDES['q']} {_STRIDES['k']} {_STRIDES['v']} {_STRIDES['g']} {_X_STRIDES}"
            ),
            ("segments", "heads"),
        ),
        Template(
            "gla_walk",
            _args(
                f"q:*io k:*io v:*io {_GATE} o:*io cu:*i32 h0:*fp32 starts:*fp32 ht:*fp32 "
                "qs:*state ks:*state scores:*state ends:*fp32 flags:*i32 "
                f"scale:fp32 {_GATE_SCALARS} T:i32 N:i32 H:i32 n_seg:i32 seg_len:i32 "
                f"n_chunks:i32 {_GROUPS} has_cu:i32 has_h0:i32 has_ht:i32 has_bias:i32 "
                f"{_STRIDES['q']} {_STRIDES['k']} {_STRIDES['v']} {_STRIDES['g']} {_X_STRIDES}"
            ),
            ("segments", "heads"),
        ),
        Template(
            "gla_states",
            _args(
                f"k:*io v:*io {_GATE} cu:*i32 h0:*fp32 starts:*fp32 states:*state decay:*fp32 "
                f"out_scale:fp32 {_GATE_SCALARS} T:i32 N:i32 H:i32 n_seg:i32 seg_first:i32 "
                "seg_count:i32 seg_len:i32 keep:i32 n_kept:i32 k_group:i32 v_group:i32 "
                "g_group:i32 reverse:i32 summarise:i32 from_start:i32 has_cu:i32 has_h0:i32 "
                f"has_bias:i32 {_STRIDES['k']} {_STRIDES['v']} {_STRIDES['g']} {_X_STRIDES}"
            ),
            ("segments", "heads"),
        ),
        Template(
            "gla_combine",
            _args(
                "states:*fp32 decay:*fp32 ends:*fp32 cu:*i32 T:i32 H:i32 n_seg:i32 seg_len:i32 "
                "group:i32 reverse:i32 has_cu:i32 has_ends:i32"
            ),
            ("heads",),
        ),
        Template(
            "gla_gate",
            _args(
                "x:*io w:*io bias:*gate g:*dense inv_normalizer:fp32 clamp_log2:fp32 T:i32 "
                "H:i32 has_bias:i32 x_b:i32 x_t:i32"
            ),
            ("blocks",),
        ),
        Template(
            "gla_gate_bwd",
            _args(
                "x:*io w:*io bias:*gate dg:*dense dx:*fp32 dw:*fp32 db:*fp32 "
                "inv_normalizer:fp32 clamp_log2:fp32 B:i32 T:i32 H:i32 parts:i32 group:i32 "
                "length:i32 has_bias:i32 x_b:i32 x_t:i32"
            ),
            ("blocks",),
        ),
        Template(
            "gla_gate_sums",
            _args(
                "dx_parts:*fp32 dw_parts:*fp32 db_parts:*fp32 dx:*io dw:*fp32 db:*fp32 "
                "tokens:i32 channels:i32 n_n:i32 n_t:i32"
            ),
            ("blocks",),
        ),
        Template("gla_bwd", _args(_BWD_ARGS), ("segments", "heads")),
        Template("gla_bwd_exact", _args(_BWD_EXACT_ARGS), ("segments", "heads")),
        Template(
            "gla_bwd_dv",
            _args(
                "q:*io k:*io g:*gate do:*io cu:*i32 dht:*fp32 ends:*fp32 dv:*io scale:fp32 T:i32 "
                f"N:i32 H:i32 n_seg:i32 seg_len:i32 {_GROUPS} has_cu:i32 has_dht:i32 "
                f"{_STRIDES['q']} {_STRIDES['k']} {_STRIDES['do']} {_STRIDES['g']}"
            ),
            ("segments", "heads"),
        ),
        Template("gla_bwd_walks", _args(_WALKS_ARGS), ("segments", "heads")),
        Template("gla_bwd_walks_exact", _args(_WALKS_ARGS), ("segments", "heads")),
        Template("gla_bwd_chunks", _args(_CHUNKS_ARGS), ("chunks", "segments", "heads")),
        Template("gla_bwd_chunks_exact", _args(_CHUNKS_ARGS), ("chunks", "segments", "heads")),
        Template(
            "scalar_fwd",
            _args(
                "q:*io k:*io v:*io g:*gate cu:*i32 o:*io h0:*fp32 ht:*fp32 scale:fp32 T:i32 "
                f"H:i32 {_GROUPS} has_cu:i32 has_g:i32 has_h0:i32 has_ht:i32 {_QKV_STRIDES} "
                "g_b:i32 g_t:i32 g_h:i32"
            ),
            ("heads",),
        ),
        Template(
            "scalar_states",
            _args(
                "q:*io k:*io v:*io g:*gate do:*io cu:*i32 h0:*fp32 dht:*fp32 states:*state "
                "dstates:*state ends:*fp32 scale:fp32 T:i32 H:i32 n_chunk:i32 direction:i32 "
                f"directions:i32 {_GROUPS} has_cu:i32 has_g:i32 has_h0:i32 has_dht:i32 "
                f"keep_states:i32 has_ends:i32 {_ALL_STRIDES}"
            ),
            ("heads",),
        ),
        Template(
            "scalar_bwd_chunks",
            _args(
                "q:*io k:*io v:*io g:*gate do:*io cu:*i32 states:*state dstates:*state dq:*io "
                f"dk:*io dv:*io dg:*fp32 scale:fp32 T:i32 N:i32 H:i32 n_chunk:i32 {_GROUPS} "
                f"has_cu:i32 has_g:i32 has_dg:i32 {_ALL_STRIDES}"
            ),
            ("heads", "chunks"),
        ),
        Template(
            "scalar_bwd",
            _args(
                "q:*io k:*io v:*io g:*gate do:*io cu:*i32 dht:*fp32 states:*state dq:*io dk:*io "
                f"dg:*fp32 dh0:*fp32 scale:fp32 T:i32 B:i32 H:i32 n_chunk:i32 {_GROUPS} "
                f"has_cu:i32 has_g:i32 has_dht:i32 has_dg:i32 has_dh0:i32 {_ALL_STRIDES}"
            ),
            ("heads",),
        ),
        Template(
            "scalar_bwd_dv",
            _args(
                "q:*io k:*io g:*gate do:*io cu:*i32 dht:*fp32 dv:*io parts:*fp32 dg:*fp32 "
                f"scale:fp32 T:i32 B:i32 H:i32 n_parts:i32 {_GROUPS} has_cu:i32 has_g:i32 "
                f"has_dht:i32 {_STRIDES['q']} {_STRIDES['k']} {_STRIDES['do']} {_STRIDES['g']}"
            ),
            ("heads",),
        ),
        Template(
            "gla_decode",
            _args(
                "q:*io k:*io v:*io g:*gate x:*io w:*io bias:*gate from32:*fp32 from16:*bf16 "
                "to32:*fp32 to16:*bf16 idx:*i32 cu:*i32 o:*io scale:fp32 inv_normalizer:fp32 "
                f"clamp_log2:fp32 T:i32 H:i32 {_GROUPS} n_slots:i32 idx_step:i32 has_cu:i32 "
                "has_g:i32 state_in:i32 state_out:i32 in_place:i32 per_token:i32 has_bias:i32 "
                f"{_QKV_STRIDES} g_b:i32 g_t:i32 g_h:i32 x_b:i32 x_t:i32 from_n:i32 from_h:i32 "
                "to_n:i32 to_t:i32 to_h:i32"
            ),
            ("heads",),
        ),
    )
}

FORWARD = (
    "gla_fwd",
    "gla_states",
    "gla_combine",
    "gla_prepare",
    "gla_walk_states",
    "gla_walk",
)
"""Templates of the forward pass."""

BACKWARD = (
    *("gla_states", "gla_combine", "gla_bwd", "gla_bwd_exact", "gla_bwd_dv"),
    *("gla_prepare", "gla_bwd_walks", "gla_bwd_walks_exact"),
    *("gla_bwd_chunks", "gla_bwd_chunks_exact"),
)
"""Templates of the backward pass."""

AROUND_GATE = ("gla_gate", "gla_gate_bwd", "gla_gate_sums")
"""Templates that a low-rank gate adds to them."""

SCALAR_BACKWARD = ("scalar_states", "scalar_bwd_chunks", "scalar_bwd", "scalar_bwd_dv")
"""Templates of the backward pass with a scalar gate."""

OP_TEMPLATES: dict[Op, tuple[str, ...]] = {
    Op.FORWARD: FORWARD,
    Op.BACKWARD: (*BACKWARD, *AROUND_GATE),
    Op.SCALAR_FORWARD: ("scalar_fwd",),
    Op.SCALAR_BACKWARD: SCALAR_BACKWARD,
    Op.DECODE: ("gla_decode",),
}
"""Templates of each op."""


_VECTOR_ONLY = frozenset({"g", "g_b", "g_t", "g_h"})
_LOWRANK_ONLY = frozenset(
    {"x", "w", "bias", "inv_normalizer", "clamp_log2", "has_bias", "x_b", "x_t"}
)
_LEAD_ONLY = {"gla_bwd": frozenset({"h0", "has_h0"})}
"""What templates take for the way from the first token (``kernel_templates/_lead.py``)."""

_KEPT_APART = frozenset({"qs", "ks", "decays", "ranges", "n_prepared", "prepared"})
_KEEP_ONLY = {"gla_bwd_chunks": _KEPT_APART, "gla_bwd_chunks_exact": _KEPT_APART}
"""What templates take to find again states that were not kept."""


def unused_args(template: str, config: KernelConfig) -> frozenset[str]:
    """Parameters of ``template`` that a kernel with ``config`` does not have."""
    unused: frozenset[str] = frozenset()
    if getattr(config, "lead", 0) == 0:
        unused |= _LEAD_ONLY.get(template, unused)
    if getattr(config, "keep", 1) == 1:
        unused |= _KEEP_ONLY.get(template, unused)
    return unused


def kernel_specialisation(template: str, spec: Specialisation) -> Specialisation:
    """The part of ``spec`` that ``template`` depends on, the rest set to fixed values.

    Kernels that differ only in what they ignore are thus one kernel.
    """
    if template == "gla_combine":
        return Specialisation(spec.K, spec.V, DType.FP32, Gate.VECTOR, DType.FP32)
    if template == "gla_gate_sums":
        rank = spec.rank
        return replace(spec, K=rank, V=rank, gate_dtype=spec.dtype, precision=Precision.IEEE)
    if template in AROUND_GATE:
        return replace(spec, V=spec.K)
    if template in BACKWARD and template not in FORWARD:
        return spec.dense
    if template == "gla_decode":  # no product of tiles
        return replace(spec, precision=Precision.IEEE)
    return spec


def active_args(
    template: str, spec: Specialisation, unused: frozenset[str] = frozenset()
) -> tuple[Arg, ...]:
    """The parameters that exist at run time for ``spec`` (the others are compiled out).

    Args:
        template: of the kernel.
        spec: what it is compiled for.
        unused: those that its config has no use for (``unused_args``).
    """
    if template in AROUND_GATE:
        return TEMPLATES[template].args
    dropped = unused | (_VECTOR_ONLY if spec.gate is Gate.LOWRANK else _LOWRANK_ONLY)
    return tuple(a for a in TEMPLATES[template].args if a.name not in dropped)


def state_dtype(spec: Specialisation) -> DType:
    """Of states that one kernel keeps for another: half the traffic where inputs are bf16."""
    return DType.BF16 if spec.dtype is DType.BF16 else DType.FP32


POINTERS: dict[str, Callable[[Specialisation], str]] = {
    "*io": lambda spec: spec.dtype.value,
    "*gate": lambda spec: spec.gate_dtype.value,
    "*dense": lambda spec: spec.dense.gate_dtype.value,
    "*state": lambda spec: state_dtype(spec).value,
    "*fp32": lambda spec: "fp32",
    "*bf16": lambda spec: "bf16",
    "*i32": lambda spec: "i32",
}
"""Kinds of pointers, and the element type of each."""


def pointer_type(kind: str, spec: Specialisation) -> str:
    """Triton's name of a pointer kind, such as ``*bf16``."""
    return f"*{POINTERS[kind](spec)}"


def input_precision(spec: Specialisation) -> str:
    """Triton's name of how products of fp32 tiles are made; those of bf16 tiles do not ask.

    fp16 inputs have fp32 tiles, which the kernels round to what one TF32 product takes.
    """
    wide = spec.dtype is DType.FP32 and spec.precision is Precision.IEEE
    return "tf32x3" if wide else "tf32"


def stride_unit(dim: int) -> int:
    """Strides reach the kernels in units of this: the largest power of two in ``dim``, up to 16.

    The compiler then knows that rows are aligned and copies 16 bytes at a time.
    """
    return min(16, dim & -dim)


LEADING = ("gla_fwd", "gla_bwd")
"""Templates whose programs may find the way to their segments."""

SUMMARISING = ("gla_states", "gla_walk_states")
"""Templates that find what segments add."""

_TILED_K = (TileKernelConfig, ExactKernelConfig)
"""Configs of kernels whose programs hold a tile of K, not all of it."""

_OF_LOWRANK = ("R", "BR", "UR", "LOWRANK")
_WITHOUT = {
    "scalar_fwd": (*_OF_LOWRANK, "BX", "BF16", "INTERPRETED"),
    "scalar_states": (*_OF_LOWRANK, "BX", "BF16", "INTERPRETED"),
    "scalar_bwd_chunks": (*_OF_LOWRANK, "BX", "BF16", "INTERPRETED"),
    "scalar_bwd": (*_OF_LOWRANK, "BX", "BF16", "INTERPRETED", "DV", "KEEP"),
    "scalar_bwd_dv": (*_OF_LOWRANK, "BX", "BF16", "INTERPRETED"),
    "gla_states": ("BX", "INTERPRETED"),
    "gla_prepare": ("V", "UV", "BX", "INTERPRETED"),
    "gla_walk_states": ("INTERPRETED",),
    "gla_walk": ("INTERPRETED",),
    "gla_bwd": (*_OF_LOWRANK, "BX"),
    "gla_bwd_dv": _OF_LOWRANK,
    "gla_bwd_exact": (*_OF_LOWRANK, "BF16", "INTERPRETED", "KEEP"),
    "gla_bwd_walks": (*_OF_LOWRANK, "UK", "BX", "BF16", "INTERPRETED"),
    "gla_bwd_walks_exact": (*_OF_LOWRANK, "BF16", "INTERPRETED", "STAGES", "TMA"),
    "gla_bwd_chunks": (*_OF_LOWRANK, "BX", "INTERPRETED", "TMA", "DV"),
    "gla_bwd_chunks_exact": (*_OF_LOWRANK, "BF16", "INTERPRETED", "DV"),
}
"""Constants of the others that a template does not take."""


def constants(template: str, spec: Specialisation, config: KernelConfig) -> dict[str, Any]:
    """Compile-time constants of the kernel, by parameter name."""
    if isinstance(config, CombineKernelConfig):
        return {"K": spec.K, "V": spec.V, "BLOCK": config.block}
    if isinstance(config, DecodeKernelConfig):
        return _decode_constants(template, spec, config)
    if isinstance(config, SumsKernelConfig):
        return {"R": spec.rank, "BLOCK": config.block, "ROWS": config.rows}
    if isinstance(config, GateKernelConfig):
        return _gate_constants(template, spec, config)
    lowrank = spec.gate is Gate.LOWRANK
    values: dict[str, Any] = {
        "K": spec.K,
        "V": spec.V,
        "R": spec.rank,
        "BK": config.block_k if isinstance(config, _TILED_K) else padded_k(spec),
        "BR": max(16, spec.rank),
        "UK": stride_unit(spec.K),
        "UV": stride_unit(spec.V),
        "UR": stride_unit(spec.rank) if lowrank else 1,
        "BT": config.chunk,
        "BX": EXACT_ROWS,
        "LOWRANK": lowrank,
        "BF16": spec.dtype is DType.BF16,
        "PRECISION": input_precision(spec),
        "INTERPRETED": False,
    }
    if template in SUMMARISING:
        values["STOPS"] = getattr(config, "stops", False)
    if template == "gla_fwd":
        values["ENDS"] = getattr(config, "product_ends", False)
    if isinstance(config, PrepareKernelConfig):
        values.update(BC=config.block_k, STAGES=config.num_stages)
    else:
        values["BV"] = config.block_v
    if isinstance(config, ChunkKernelConfig | TurnedKernelConfig | TileKernelConfig):
        values.update(STAGES=config.num_stages, TMA=config.tma)
    if isinstance(config, TurnedKernelConfig):
        values["TURNED"] = config.turned
    elif isinstance(config, _TILED_K):
        values.update(DV=config.dv, KEEP=config.keep)
    if template == "gla_bwd_chunks":
        values["PK"] = padded_k(spec)
    if template in LEADING:
        values["LEAD"] = getattr(config, "lead", 0)
    for name in _WITHOUT.get(template, ()):
        del values[name]
    return {**values, **_inactive(template, spec, unused_args(template, config))}


def _inactive(
    template: str, spec: Specialisation, unused: frozenset[str] = frozenset()
) -> dict[str, None]:
    """What stands in for the parameters that do not exist at run time."""
    active = {a.name for a in active_args(template, spec, unused)}
    return {a.name: None for a in TEMPLATES[template].args if a.name not in active}


def _gate_constants(
    template: str, spec: Specialisation, config: GateKernelConfig
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "K": spec.K,
        "R": spec.rank,
        "BR": max(16, spec.rank),
        "UR": stride_unit(spec.rank),
        "BT": config.chunk,
        "BN": config.block_n,
        "PRECISION": input_precision(spec),
    }
    if template == "gla_gate":
        return {**values, "BF16": spec.dtype is DType.BF16}
    return {**values, "STAGES": config.num_stages}


def _decode_constants(
    template: str, spec: Specialisation, config: DecodeKernelConfig
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "K": spec.K,
        "V": spec.V,
        "R": spec.rank,
        "BK": padded_k(spec),
        "BR": max(16, spec.rank),
        "UK": stride_unit(spec.K),
        "UV": stride_unit(spec.V),
        "UR": stride_unit(spec.rank) if spec.rank else 1,
        "UH": stride_unit(spec.K * spec.V),
        "BV": config.block_v,
        "LOWRANK": spec.gate is Gate.LOWRANK,
        "SCALAR": spec.gate.is_scalar,
    }
    return {**values, **_inactive(template, spec)}


def tiles(template: str, spec: Specialisation, config: KernelConfig) -> int:
    """Programs per head, or per (segment, head): the compile-time factor of the grid."""
    if isinstance(config, CombineKernelConfig):
        return math.ceil(spec.K * spec.V / config.block)
    if isinstance(config, PrepareKernelConfig | GateKernelConfig | SumsKernelConfig):
        return 1
    v_tiles = math.ceil(spec.V / config.block_v)
    if template == "scalar_bwd_chunks":  # walks all V tiles of its chunk
        return 1
    if template in ("gla_bwd_walks", "gla_bwd_walks_exact"):  # forward and back
        return 2 * v_tiles
    if template.startswith("gla_bwd_chunks") and isinstance(
        config, TileKernelConfig | ExactKernelConfig
    ):
        return math.ceil(spec.K / config.block_k)
    if isinstance(config, TileKernelConfig | ExactKernelConfig):
        return math.ceil(spec.K / config.block_k) * v_tiles
    return v_tiles


_IMPORT = re.compile(r"^from glac\.kernel_templates\.(\w+) import", re.MULTILINE)


def template_sources(names: Iterable[str]) -> list[Path]:
    """The files that templates are made of: their own and, in turn, those they import."""
    found: dict[str, Path] = {"__init__": TEMPLATE_DIR / "__init__.py"}
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = TEMPLATE_DIR / f"{name}.py"
            todo.extend(_IMPORT.findall(found[name].read_text(encoding="utf-8")))
    return [found[name] for name in sorted(found)]


def sources_sha256(names: Iterable[str]) -> str:
    """Hash of the sources of some templates. Other templates do not enter."""
    digest = hashlib.sha256()
    for path in sorted(template_sources(names)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def templates_sha256(ops: Iterable[Op]) -> dict[Op, str]:
    """For each op the hash of its templates: what a tuned row or a packed kernel was made from.

    One hash for each, so that a change to one op leaves what was measured of the others valid.
    """
    return {op: sources_sha256(OP_TEMPLATES[op]) for op in ops}


def template_ops(template: str) -> tuple[Op, ...]:
    """The ops that a template serves."""
    return tuple(op for op, names in OP_TEMPLATES.items() if template in names)
