"""Named sets of problems: what `glac tune`, `glac bench` and `glac roofline` mean by ``--suite``.

    quick      one problem, to see that everything works
    standard   what a first study tunes and `glac bench` times by default
    grid       the performance grid: ten shapes, each with a dense and a low-rank gate
    lengths    1K to 131K tokens per sequence, always 131072 tokens in all
    scalar     four of the standard shapes with one gate per token and head, and few heads
    decode     one token for each of 32 sequences, with gates per channel and per head
    full       all of these but grid and lengths, and more lengths, head counts, ranks and dtypes

Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from glac.errors import ConfigError
from glac.problem import DType, Gate, Precision, Problem, Specialisation

Shape = tuple[int, int, int, int, int]
"""B, T, H, K, V."""

SHAPES: tuple[Shape, ...] = (
    (8, 2048, 16, 64, 64),
    (16, 2048, 8, 128, 128),
    (4, 4096, 64, 128, 128),
    (8, 2048, 4, 128, 256),
    (8, 2048, 4, 256, 512),
)
"""Shapes of the standard problems."""

GRID: tuple[Shape, ...] = (
    (8, 1024, 8, 64, 64),
    (8, 2048, 16, 64, 64),
    (4, 2048, 16, 128, 128),
    (16, 2048, 8, 128, 128),
    (4, 4096, 64, 128, 128),
    (2, 16384, 16, 128, 128),
    (8, 2048, 4, 128, 256),
    (8, 2048, 4, 256, 512),
    (1, 32768, 4, 256, 512),
    (1, 131072, 16, 128, 128),
)
"""Shapes of the performance grid: heads of 64 to 512 channels, few and many, up to 131K tokens."""

LENGTHS: tuple[Shape, ...] = tuple(
    (131072 // T, T, 16, 128, 128) for T in (1024 << i for i in range(8))
)
"""Equal work, cut into ever longer sequences: time that is linear in T is constant here."""


def make_problem(
    shape: Sequence[int],
    gate: Gate = Gate.VECTOR,
    rank: int = 0,
    dtype: DType = DType.BF16,
    gate_dtype: DType | None = None,
    precision: Precision = Precision.IEEE,
) -> Problem:
    """The problem of a ``(B, T, H, K, V)`` shape.

    Raises:
        ConfigError: the shape, the gate or the precision is impossible.
    """
    if len(shape) != 5 or min(shape) < 1:
        raise ConfigError(f"a shape is B,T,H,K,V, all positive; got {tuple(shape)}")
    B, T, H, K, V = shape
    spec = Specialisation(K, V, dtype, gate, gate_dtype or dtype, rank, precision)
    return Problem(spec, B, T, H)


def _suites() -> dict[str, tuple[Problem, ...]]:
    vector = tuple(make_problem(shape) for shape in SHAPES)
    lowrank = tuple(make_problem(SHAPES[i], Gate.LOWRANK, 16) for i in (1, 0))
    more = tuple(
        make_problem(shape)
        for shape in (
            (1, 2048, 16, 64, 64),
            (32, 1024, 16, 64, 64),
            (1, 2048, 8, 128, 128),
            (2, 8192, 8, 128, 128),
            (1, 32768, 8, 128, 128),
            (8, 1024, 32, 128, 128),
            (1, 8192, 4, 128, 256),
            (1, 8192, 4, 256, 512),
        )
    )
    wide_gate = (make_problem(SHAPES[1], gate_dtype=DType.FP32),)
    ranks = tuple(make_problem(SHAPES[1], Gate.LOWRANK, rank) for rank in (32, 64))
    long_lowrank = (
        make_problem(SHAPES[2], Gate.LOWRANK, 16),
        make_problem((1, 2048, 8, 128, 128), Gate.LOWRANK, 16),
        make_problem(SHAPES[3], Gate.LOWRANK, 16),
    )
    few_heads = ((8, 1024, 8, 64, 64), (8, 2048, 4, 128, 128))
    scalar = tuple(make_problem(shape, Gate.SCALAR) for shape in (*SHAPES[:4], *few_heads))
    wide_scalar = tuple(make_problem(s, Gate.SCALAR, gate_dtype=DType.FP32) for s in SHAPES[:2])
    decode = tuple(
        make_problem((32, 1, 16, width, width), gate)
        for width in (64, 128)
        for gate in (Gate.VECTOR, Gate.SCALAR)
    )
    halves = (make_problem(SHAPES[1], dtype=DType.FP16), make_problem(SHAPES[0], dtype=DType.FP16))
    standard = (*vector, *lowrank)
    return {
        "quick": (vector[1],),
        "standard": standard,
        "grid": (
            *(make_problem(shape) for shape in GRID),
            *(make_problem(shape, Gate.LOWRANK, 16) for shape in GRID),
        ),
        "lengths": tuple(make_problem(shape) for shape in LENGTHS),
        "scalar": scalar,
        "decode": decode,
        "full": (
            *(*standard, *scalar, *decode, *more, *wide_gate, *wide_scalar),
            *(*ranks, *long_lowrank, *halves),
        ),
    }


SUITES: dict[str, tuple[Problem, ...]] = _suites()
"""Named sets of problems."""
