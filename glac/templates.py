"""The kernel templates: their arguments, their compile-time constants, their grids.

This table is the ABI. ``glac.generate`` compiles signatures from it, the pack manifest stores it,
and ``glac.launch`` packs arguments by it, so the three cannot disagree.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glac.configs import (
    EXACT_ROWS,
    ChunkKernelConfig,
    CombineKernelConfig,
    KernelConfig,
    block_k,
)
from glac.problem import DType, Gate, Specialisation

TEMPLATE_DIR = Path(__file__).parent / "kernel_templates"


@dataclass(frozen=True)
class Arg:
    """A kernel parameter. ``kind``: ``*io``, ``*gate`` or ``*fp32`` (pointers), i32 or fp32."""

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


TEMPLATES: dict[str, Template] = {
    t.name: t
    for t in (
        Template(
            "gla_fwd",
            _args(
                "q:*io k:*io v:*io g:*gate x:*io w:*io bias:*gate o:*io h0:*fp32 ht:*fp32 "
                "scale:fp32 inv_normalizer:fp32 clamp_log2:fp32 T:i32 H:i32 n_seg:i32 seg_len:i32 "
                "has_h0:i32 has_ht:i32 has_bias:i32 q_b:i32 q_t:i32 q_h:i32 k_b:i32 k_t:i32 "
                "k_h:i32 v_b:i32 v_t:i32 v_h:i32 g_b:i32 g_t:i32 g_h:i32 x_b:i32 x_t:i32"
            ),
            ("segments", "heads"),
        ),
        Template(
            "gla_fwd_summary",
            _args(
                "k:*io v:*io g:*gate x:*io w:*io bias:*gate states:*fp32 decay:*fp32 "
                "inv_normalizer:fp32 clamp_log2:fp32 T:i32 H:i32 n_seg:i32 seg_len:i32 "
                "has_bias:i32 k_b:i32 k_t:i32 k_h:i32 v_b:i32 v_t:i32 v_h:i32 g_b:i32 g_t:i32 "
                "g_h:i32 x_b:i32 x_t:i32"
            ),
            ("segments_before_last", "heads"),
        ),
        Template(
            "gla_fwd_combine",
            _args("states:*fp32 decay:*fp32 h0:*fp32 n_seg:i32 has_h0:i32"),
            ("heads",),
        ),
    )
}

FORWARD = ("gla_fwd", "gla_fwd_summary", "gla_fwd_combine")
"""Templates of the forward pass."""

_VECTOR_ONLY = frozenset({"g", "g_b", "g_t", "g_h"})
_LOWRANK_ONLY = frozenset(
    {"x", "w", "bias", "inv_normalizer", "clamp_log2", "has_bias", "x_b", "x_t"}
)


def kernel_specialisation(template: str, spec: Specialisation) -> Specialisation:
    """The part of ``spec`` that ``template`` depends on, the rest set to fixed values.

    Kernels that differ only in what they ignore are thus one kernel.
    """
    if template == "gla_fwd_combine":
        return Specialisation(spec.K, spec.V, DType.FP32, Gate.VECTOR, DType.FP32)
    return spec


def active_args(template: str, spec: Specialisation) -> tuple[Arg, ...]:
    """The parameters that exist at run time for ``spec`` (the others are compiled out)."""
    dropped = _VECTOR_ONLY if spec.gate is Gate.LOWRANK else _LOWRANK_ONLY
    return tuple(a for a in TEMPLATES[template].args if a.name not in dropped)


def pointer_type(kind: str, spec: Specialisation) -> str:
    """Triton's name of a pointer kind, such as ``*bf16``."""
    dtype = {"*io": spec.dtype, "*gate": spec.gate_dtype, "*fp32": DType.FP32}[kind]
    return f"*{dtype.value}"


def stride_unit(dim: int) -> int:
    """Strides reach the kernels in units of this: the largest power of two in ``dim``, up to 16.

    The compiler then knows that rows are aligned and copies 16 bytes at a time.
    """
    return min(16, dim & -dim)


def constants(template: str, spec: Specialisation, config: KernelConfig) -> dict[str, Any]:
    """Compile-time constants of the kernel, by parameter name."""
    if template == "gla_fwd_combine":
        assert isinstance(config, CombineKernelConfig)
        return {"K": spec.K, "V": spec.V, "BLOCK": config.block}
    assert isinstance(config, ChunkKernelConfig)
    lowrank = spec.gate is Gate.LOWRANK
    values: dict[str, Any] = {
        "K": spec.K,
        "V": spec.V,
        "R": spec.rank,
        "BK": block_k(spec),
        "BR": max(16, spec.rank),
        "UK": stride_unit(spec.K),
        "UV": stride_unit(spec.V),
        "UR": stride_unit(spec.rank) if lowrank else 1,
        "BT": config.chunk,
        "BV": config.block_v,
        "BX": EXACT_ROWS,
        "STAGES": config.num_stages,
        "LOWRANK": lowrank,
        "BF16": spec.dtype is DType.BF16,
        "PRECISION": "tf32x3" if spec.dtype is DType.FP32 else "tf32",
        "TMA": config.tma,
    }
    if template == "gla_fwd":
        values["INTERPRETED"] = False
    active = {a.name for a in active_args(template, spec)}
    values.update({a.name: None for a in TEMPLATES[template].args if a.name not in active})
    return values


def tiles(template: str, spec: Specialisation, config: KernelConfig) -> int:
    """Programs per (segment, head): the compile-time factor of the grid."""
    if isinstance(config, CombineKernelConfig):
        return math.ceil(spec.K * spec.V / config.block)
    return math.ceil(spec.V / config.block_v)


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


def templates_sha256(names: Iterable[str] = FORWARD) -> str:
    """Hash of the sources of some templates: what a tuned row or a pack was made from.

    Other templates do not enter, so a new one leaves what was measured before valid.
    """
    digest = hashlib.sha256()
    for path in sorted(template_sources(names)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
