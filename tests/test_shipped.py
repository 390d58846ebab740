"""What ships: every tuned row compiles to the machine code that was measured, for both archs."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest

from glac.build import build_packs
from glac.compile import PINNED_PTXAS, compile_many, toolchain
from glac.configs import (
    BackwardConfig,
    ChunksBackwardConfig,
    Config,
    ForwardConfig,
    default_config,
    why_illegal,
)
from glac.errors import GlacError
from glac.gpus import GPUS
from glac.kernelspec import config_kernels
from glac.problem import Op
from glac.templates import templates_sha256
from glac.tuned import TunedFile, TunedRow, shipped, shipped_names
from glac.tuning.space import space

FILES = shipped_names()


def tuned(name: str) -> TunedFile:
    file = shipped(name)
    assert file is not None
    return file


THOROUGH = 60
"""Candidates of a study whose winner counts as searched for, where a space has as many."""


def searched(row: TunedRow, gpu: str) -> bool:
    tried = row.stats.candidates
    return tried >= THOROUGH or tried >= len(space(row.problem, GPUS[gpu], op=row.op).configs)


def kernels_but_segments(row: TunedRow) -> tuple[Op, int, int, Config]:
    """What a row runs, for heads of which sizes, however sequences are cut."""
    config = row.config
    if isinstance(config, ForwardConfig):
        config = replace(config, segment=0, summary=None)
    if isinstance(config, BackwardConfig | ChunksBackwardConfig):
        config = replace(config, segment=0)
    return row.op, row.spec.K, row.spec.V, config


@functools.cache
def found_thoroughly() -> set[tuple[Op, int, int, Config]]:
    rows = [(row, name) for name in FILES for row in tuned(name).rows]
    return {kernels_but_segments(row) for row, name in rows if searched(row, name)}


def test_something_ships() -> None:
    assert {"h100", "h200"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_rows_were_measured_with_these_templates(name: str) -> None:
    file = tuned(name)
    assert file.gpu == name
    hashes = file.environment.templates_sha256
    assert hashes == templates_sha256(hashes), (
        f"the templates changed after {name}.yaml was measured: tune again"
    )
    assert file.environment.ptxas == PINNED_PTXAS
    assert file.rows
    for row in file.rows:
        assert row.stats.error <= 2 * row.stats.yardstick_error
        assert row.stats.error <= 4e-3 or row.op is not Op.FORWARD
        assert row.stats.us <= row.stats.default_us
        # A short study, started from winners, may only confirm: what a thorough one found, or that
        # nothing of it is faster than the default.
        if not searched(row, name):
            default = default_config(row.op, row.spec, GPUS[name], row.bucket)
            assert kernels_but_segments(row) in found_thoroughly() or row.config == default


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_row_compiles_to_what_was_measured(name: str) -> None:
    file = tuned(name)
    if file.environment.triton != toolchain().triton:
        pytest.skip(f"measured with Triton {file.environment.triton}")
    arch = GPUS[name].arch
    certified = {kernel.name: kernel for row in file.rows for kernel in row.kernels}
    wanted = [k for row in file.rows for k in config_kernels(row.spec, row.config, arch)]
    for kernel, built in compile_many(wanted).items():
        assert not isinstance(built, GlacError), built
        facts = certified[kernel.name]
        assert built.sha256 == facts.cubin_sha256, kernel.name
        assert built.spill_bytes == facts.spill_bytes, kernel.name
        assert built.registers == facts.registers, kernel.name
        assert built.shared == facts.shared, kernel.name


@pytest.mark.slow
def test_ampere_pack_builds(tmp_path: Path) -> None:
    (result,) = build_packs(["a100"], tmp_path)
    assert result.pack.arch == "sm_80"
    assert result.pack.rows
    limit = GPUS["a100"].shared_per_block
    for row in result.pack.rows:
        assert why_illegal(row.spec, row.config, GPUS["a100"]) is None
    for name, kernel in result.pack.kernels.items():
        assert kernel.shared <= limit, name
        assert kernel.registers <= 255, name
        # The exact kernel is for rare gates, and must have the tile of the fast one.
        rare = kernel.kernel.template == "gla_bwd_exact"
        assert kernel.spill_bytes <= (4096 if rare else 2048), name
