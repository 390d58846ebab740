"""The oldest and the newest Triton that glac accepts compile with the pinned assembler.

Each is downloaded into a folder of its own (200 to 300 MB), so this runs where GLAC_TEST_TRITON=1,
as in CI. GLAC_TEST_TRITON=FOLDER keeps the downloads in FOLDER/<version>.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest

from glac.compile import PINNED_PTXAS

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("3.6.0", "3.9.0")

# One small kernel of each kind for each arch, or the error that says what is needed.
COMPILE = """
import json
from glac.compile import compile_kernel, toolchain
from glac.configs import (
    BackwardConfig, ChunkKernelConfig, ForwardConfig, TileKernelConfig
)
from glac.errors import GlacError
from glac.gpus import ARCHS
from glac.kernelspec import config_kernels
from glac.problem import DType, Gate, Specialisation

spec = Specialisation(16, 16, DType.BF16, Gate.LOWRANK, DType.BF16, 16)
out = {"toolchain": toolchain().to_dict(), "kernels": {}}
for arch in ARCHS:
    walk = ChunkKernelConfig(16, 16, 2, 2, tma=arch == "sm_90a")
    tile = TileKernelConfig(16, 16, 16, 2, 1, tma=arch == "sm_90a", dv=True)
    configs = ForwardConfig(walk, 64, walk), BackwardConfig(walk, tile)
    for kernel in dict.fromkeys(k for c in configs for k in config_kernels(spec, c, arch)):
        try:
            built = compile_kernel(kernel)
            assert built.cubin.startswith(b"\\x7fELF")
            out["kernels"][kernel.name] = [built.registers, built.spill_bytes, built.shared]
        except GlacError as error:
            out["kernels"][kernel.name] = f"{error.message} | {error.hint}"
print(json.dumps(out))
"""


@pytest.fixture(params=VERSIONS)
def triton(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where that Triton is installed; skips where it cannot be had."""
    version: str = request.param
    wish = os.environ.get("GLAC_TEST_TRITON", "")
    if wish in ("", "0"):
        pytest.skip("GLAC_TEST_TRITON=1 downloads other versions of Triton")
    folder = (tmp_path if wish == "1" else Path(wish)) / version
    if not (folder / "triton").is_dir():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
        options = ["--quiet", "--retries", "1", "--target", str(folder), f"triton=={version}"]
        done = subprocess.run([*pip, *options], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"Triton {version} cannot be had here: {done.stderr.strip()[-200:]}")
    yield folder
    # A gigabyte each, and pytest keeps its folders.
    shutil.rmtree(tmp_path / version, ignore_errors=True)


def test_the_range_is_the_one_that_the_package_asks_for() -> None:
    wanted = next(r for r in requires("glac") or [] if r.startswith("triton"))
    found = dict(re.findall(r"(>=|<)([0-9.]+)", wanted))
    assert VERSIONS[0].startswith(found[">="])
    major, minor = map(int, VERSIONS[1].split(".")[:2])
    assert found["<"] == f"{major}.{minor + 1}"


@pytest.mark.slow
def test_kernels_compile(triton: Path, tmp_path: Path) -> None:
    paths = [str(triton), str(ROOT)]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["toolchain"] == {"triton": triton.name, "ptxas": PINNED_PTXAS}
    failed = {name: facts for name, facts in found["kernels"].items() if isinstance(facts, str)}
    assert failed == {}
    # Three of the forward pass; of the backward pass those of the dense gate, and three around.
    assert len(found["kernels"]) == 2 * (3 + 3 + 3)
    for registers, _, shared in found["kernels"].values():
        assert 16 <= registers <= 255
        assert shared <= 101376
