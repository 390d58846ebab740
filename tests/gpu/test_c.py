"""C sources of packs on a real driver: the example and each function have the bits of Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glac import scalar
from glac.configs import (
    BackwardConfig,
    ChunksBackwardConfig,
    ForwardConfig,
    ScalarForwardConfig,
)
from glac.emit_c import function_names, write_c
from glac.heads import HeadGroups
from glac.pack import Pack, PackRow, read_pack
from glac.problem import DType, Gate, Op, Problem, Specialisation
from glac.scalar import ScalarInputs
from glac.testing import Inputs, problem_inputs
from tests.gpu import rows
from tests.gpu.conftest import Packed
from tests.gpu.rows import Tensors
from tests.helpers_c import Library
from tests.helpers_gradients import ends_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc"),
]

ROOT = Path(__file__).resolve().parents[2]
SIZES = (2, 700, 3)


@pytest.mark.parametrize(
    ("gate", "batch"),
    # On Hopper chunks of two sequences with low-rank gates are prepared, those of 16 are not.
    [("vector", 2), ("lowrank", 2), ("lowrank", 16), ("scalar", 16)],
)
def test_the_example_is_bit_identical(
    packed: Packed, tmp_path: Path, gate: str, batch: int
) -> None:
    folders = (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda")
    cuda = next((f for f in folders if f and (Path(f) / "include" / "cuda.h").is_file()), None)
    if cuda is None:
        pytest.skip("needs cuda.h")
    rank = 16 if gate == "lowrank" else 0
    spec = Specialisation(128, 128, DType.BF16, Gate(gate), DType.BF16, rank)
    problem = Problem(spec, batch, 1000, 8)
    path = packed.need(problem, spec.gate.passes[0]).path
    if packed.need(replace(problem, T=1), Op.DECODE).path != path:
        pytest.skip("forward and decode rows are in two packs")
    pack = read_pack(Path(path))
    header, source = write_c(pack, tmp_path)
    case = [sys.executable, "examples/c/make_case.py", str(tmp_path / "cases"), "--gate", gate]
    case += ["--sizes", *map(str, (problem.B, problem.T, problem.H, spec.K, spec.V))]
    program = tmp_path / "serve"
    compiler = ["gcc", "-O1", f"-I{tmp_path}", f"-I{cuda}/include"]
    compiler += [f'-DGLAC_HEADER="{header.name}"']
    compiler += [f"-DGLAC_PREFIX=glac_{pack.arch.replace('_', '')}"]
    compiler += ["examples/c/serve.c", str(source), "-ldl", _driver()]
    run = [str(program), str(tmp_path / "cases")]
    for command in (case, [*compiler, "-o", str(program)], run):
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "bit-identical"


def _driver() -> str:
    """The driver that this process has loaded."""
    torch.cuda.init()  # type: ignore[no-untyped-call]
    maps = Path("/proc/self/maps").read_text().split()
    return next(word for word in maps if "/libcuda.so" in word)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Pack], Library]]:
    """The compiled sources of a pack, its kernels loaded into the context of PyTorch."""
    made: dict[Path, Library] = {}

    def of(pack: Pack) -> Library:
        if pack.path not in made:
            folder = tmp_path_factory.mktemp("c")
            header, source = write_c(pack, folder)
            shared = folder / "glac.so"
            command = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(shared), str(source), "-ldl"]
            subprocess.run(command, check=True)
            torch.zeros(1, device="cuda")
            code = Library(header, shared)
            status = code.open()
            assert status == 0, code.error(status)
            made[pack.path] = code
        return made[pack.path]

    yield of
    torch.cuda.synchronize()
    for code in made.values():
        code.close()


def by_python(pack: Pack, row: PackRow, x: Inputs, do: Tensor, dht: Tensor) -> Tensors:
    """Results of a row's launcher, by the names that they have in C."""
    config = row.config
    if isinstance(config, ForwardConfig):
        found = rows.run_forward_row(pack, row, x)
        return {"o": found["o"], "ht": found["state"]}
    if isinstance(config, BackwardConfig | ChunksBackwardConfig):
        return rows.run_backward_row(pack, row, x, do, dht)
    plan, i = rows._plan(pack, row, x), ScalarInputs(x.q, x.k, x.v, x.g, x.initial_state)
    results: tuple[Tensor | None, ...]
    if isinstance(config, ScalarForwardConfig):
        names: tuple[str, ...] = ("o", "ht")
        results = scalar.run_forward(plan, HeadGroups(), i, row.spec.K**-0.5, True)
    else:
        names = ("dq", "dk", "dv", "dg", "dh0")
        results = scalar.run_backward(
            plan, HeadGroups(), i, row.spec.K**-0.5, do, dht, want_dg=True, want_dh0=True
        )
    return {n: t for n, t in zip(names, results, strict=True) if t is not None}


def by_c(code: Library, name: str, tensors: dict[str, Tensor | None], **numbers: Any) -> None:
    """Call a function with tensors, results among them, and with numbers."""
    fields = {**numbers, **{n: t.data_ptr() for n, t in tensors.items() if t is not None}}
    size = code.workspace(name, fields)
    assert size is not None
    # Ones are NaN: what a kernel reads before it was written shows.
    memory = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    status = code.run(name, fields, stream, (memory.data_ptr(), size))
    assert status == 0, f"{name}: {code.error(status)} ({status})"


def ways(config: Any) -> list[tuple[int, int]]:
    """Segments and MiB of kept states with which to run a config; 0 segments are none."""
    if isinstance(config, BackwardConfig):
        return [(0, 80), (0, 0), (2 * config.chunk_step, 80)]
    cuts = isinstance(config, ForwardConfig) and config.summary is not None
    if cuts or isinstance(config, ChunksBackwardConfig):
        return [(0, 80), (2 * config.chunk_step, 80)]
    return [(0, 80)]


@pytest.mark.parametrize(
    "op",
    [Op.FORWARD, Op.SCALAR_FORWARD, Op.BACKWARD, Op.SCALAR_BACKWARD],
    ids=lambda op: str(op.value),
)
def test_functions_have_the_bits_of_their_rows(
    packed: Packed,
    library: Callable[[Pack], Library],
    monkeypatch: pytest.MonkeyPatch,
    op: Op,
) -> None:
    """Each row's function, prepared chunks among them; whole, in segments and in windows."""
    tried = 0
    for pack, row in packed.rows(op):
        name = function_names(pack).get((row.spec, row.config))
        if name is None:
            continue
        x = problem_inputs(Problem(row.spec, *SIZES), device=packed.device, initial_state=True)
        do, dht = ends_of(x)
        B, T, H = SIZES
        numbers: dict[str, Any] = {"B": B, "T": T, "scale": row.spec.K**-0.5}
        given = {"q": x.q, "k": x.k, "v": x.v, "g": x.g, "h0": x.initial_state}
        if op in (Op.BACKWARD, Op.SCALAR_BACKWARD):
            numbers.update(H=H)
            given.update(dout=do, dht=dht)
        else:
            given.update(x=x.x, w=x.weight, bias=x.bias)
            numbers.update(Hq=H, Hk=H, Hs=H, inv_normalizer=1 / 16, clamp=float("-inf"))
        for segment, mebibytes in ways(row.config):
            config: Any = row.config
            if hasattr(config, "segment"):
                config = replace(config, segment=segment)
            monkeypatch.setenv("GLAC_SCRATCH_MIB", str(mebibytes))
            wanted = by_python(pack, replace(row, config=config), x, do, dht)
            got = {n: torch.full_like(t, torch.nan) for n, t in wanted.items()}
            if op is Op.BACKWARD:
                numbers["keep_bytes"] = max(1, mebibytes << 20)
            numbers["segment"] = segment or -1
            by_c(library(pack), name, {**given, **got}, **numbers)
            for result, theirs in wanted.items():
                bits = (t.contiguous().view(torch.uint8) for t in (got[result], theirs))
                assert torch.equal(*bits), f"{name}, segment {segment}, {mebibytes} MiB: {result}"
            tried += 1
    if not tried:
        pytest.skip(f"no {op.value} row has a function")
