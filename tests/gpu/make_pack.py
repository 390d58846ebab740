"""Build the pack of heuristic rows that tests/gpu needs beside the tuned ones.

    python tests/gpu/make_pack.py --gpu h100 --out testpack        # where the toolchain is
    GLAC_PACK_PATH=packs:testpack python -m pytest -m gpu tests/gpu -rs

Head sizes that are no powers of two, sizes up to 512, fp16, fp32 and fp32 in TF32: what no tuned
row covers.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from glac import build
from glac.compile import toolchain
from glac.configs import default_config
from glac.errors import GlacError
from glac.gpus import GPUS, gpu_by_name
from glac.pack import write_pack
from glac.problem import DType, Gate, Precision, Problem, Specialisation

BF16, FP16, FP32 = DType.BF16, DType.FP16, DType.FP32


def specialisations() -> list[Specialisation]:
    """What is built, small sizes first."""

    def vector(K: int, V: int, dtype: DType, gate_dtype: DType | None = None) -> Specialisation:
        return Specialisation(K, V, dtype, Gate.VECTOR, gate_dtype or dtype)

    def lowrank(K: int, V: int, dtype: DType, rank: int) -> Specialisation:
        return Specialisation(K, V, dtype, Gate.LOWRANK, dtype, rank)

    def once(spec: Specialisation) -> Specialisation:
        return replace(spec, precision=Precision.TF32)

    scalar = Specialisation(64, 64, FP32, Gate.SCALAR, FP32)
    return [
        vector(16, 16, BF16),
        vector(60, 60, FP16),
        vector(60, 60, FP32),
        vector(60, 100, BF16),
        *(vector(64, 64, dtype) for dtype in (FP16, FP32)),
        once(vector(64, 64, FP32)),
        lowrank(64, 64, FP32, 16),
        once(lowrank(64, 64, FP32, 16)),
        scalar,
        once(scalar),
        lowrank(96, 64, BF16, 8),
        *(vector(100, 100, dtype) for dtype in (FP16, FP32)),
        *(vector(128, 128, dtype) for dtype in (FP16, FP32)),
        once(vector(128, 128, FP32)),
        vector(128, 128, BF16, FP32),
        vector(256, 256, FP16),
        vector(320, 320, FP16),
        vector(512, 512, BF16),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="the pack of rows that only tests need")
    parser.add_argument("--gpu", default="h100", choices=sorted(GPUS))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()

    gpu = gpu_by_name(options.gpu)
    wanted = [
        build._Wanted(gpu, "heuristic", "", problem, default_config(op, spec, gpu, problem.bucket))
        for spec in specialisations()
        for problem in (Problem(spec, 4, 1024, 8),)
        for op in spec.gate.passes
    ]

    rows, results, _ = build._compile_rows(wanted, options.jobs, None)
    needed = {kernel for row in rows for kernel in row.kernels()}
    kernels = [
        made
        for kernel, made in results.items()
        if kernel in needed and not isinstance(made, GlacError)
    ]
    write_pack(options.out, gpu.arch, kernels, [row.row() for row in rows], toolchain())
    print(f"{options.out}: {len(rows)} rows, {len(kernels)} kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
