"""Small kernels, packs and tuned files, most of them without compiling anything."""

from __future__ import annotations

import hashlib
from pathlib import Path

from glac.compile import CompiledKernel, Toolchain
from glac.configs import (
    BackwardConfig,
    ChunkKernelConfig,
    Config,
    ForwardConfig,
    TileKernelConfig,
)
from glac.gpus import GPUS
from glac.kernelspec import KernelSpec, config_kernels
from glac.pack import Pack, PackRow, write_pack
from glac.problem import Bucket, DType, Gate, Op, Problem, Specialisation
from glac.templates import templates_sha256
from glac.tuned import TunedEnvironment, TunedFile, TunedKernel, TunedRow, TunedStats

VECTOR = Specialisation(16, 16, DType.BF16, Gate.VECTOR, DType.BF16)
LOWRANK = Specialisation(16, 16, DType.BF16, Gate.LOWRANK, DType.BF16, 16)
CHUNK = ChunkKernelConfig(chunk=16, block_v=16, num_warps=2, num_stages=1)
WHOLE = ForwardConfig(CHUNK)
SPLIT = ForwardConfig(CHUNK, 64, CHUNK)
BACKWARD = BackwardConfig(CHUNK, TileKernelConfig(16, 16, 16, 2, 1, dv=True))
FAKE_TOOLS = Toolchain("3.7.1", "12.9.86", Path("ptxas"))


def fake_compiled(kernel: KernelSpec) -> CompiledKernel:
    """Stands for a compiled kernel; its cubin is its name."""
    cubin = kernel.name.encode()
    sha = hashlib.sha256(cubin).hexdigest()
    return CompiledKernel(
        kernel, cubin, sha, kernel.template, 1024, 64, 0, 0, kernel.config.num_warps
    )


def fake_pack(path: Path, reverse: bool = False) -> Pack:
    """Three rows and four kernels."""
    rows = [
        PackRow.make("h100", "tuned", "Some GPU", VECTOR, Bucket(5, 9), SPLIT),
        PackRow.make("h100", "tuned", "Some GPU", VECTOR, Bucket(7, 11), WHOLE),
        PackRow.make("h200", "heuristic", "", LOWRANK, Bucket(5, 9), WHOLE),
    ]
    kernels = list(
        dict.fromkeys(k for r in rows for k in config_kernels(r.spec, r.config, "sm_90a"))
    )
    if reverse:
        rows.reverse()
        kernels.reverse()
    return write_pack(path, "sm_90a", map(fake_compiled, kernels), rows, FAKE_TOOLS)


def tuned_row(problem: Problem, config: Config, gpu: str = "h100") -> TunedRow:
    """A row that certifies the fake binaries."""
    built = map(fake_compiled, config_kernels(problem.spec, config, GPUS[gpu].arch))
    kernels = tuple(
        TunedKernel(b.kernel.name, b.registers, b.spill_bytes, b.shared, b.sha256) for b in built
    )
    stats = TunedStats(118.25, 171.0, 0.004, 2.1e-3, 1.9e-3, 64, "Some GPU")
    return TunedRow(problem, config, stats, kernels)


def tuned_file(gpu: str = "h100") -> TunedFile:
    """Two rows, made by the toolchain that is called fake here and by today's templates."""
    return TunedFile(
        gpu=gpu,
        measured_on="Some GPU",
        code_path=GPUS[gpu].arch,
        environment=TunedEnvironment(
            driver="575.57.08",
            torch="2.13.0",
            triton=FAKE_TOOLS.triton,
            ptxas=FAKE_TOOLS.ptxas,
            glac="0.1.0",
            commit="",
            templates_sha256=templates_sha256([Op.FORWARD]),
            date="2026-01-02",
        ),
        rows=(
            tuned_row(Problem(LOWRANK, 2, 512, 16), WHOLE, gpu),
            tuned_row(Problem(VECTOR, 2, 512, 16), SPLIT, gpu),
        ),
    )
