"""C sources of a pack: they compile without warnings, and launch what Python launches.

The driver is a stand-in that takes notes; machine code is the name of its kernel, so the notes say
which kernel got which arguments.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glac import dispatch, emit_c, scalar, validate
from glac.backward import run_backward
from glac.configs import (
    BackwardConfig,
    ChunkKernelConfig,
    ChunksBackwardConfig,
    Config,
    DecodeConfig,
    DecodeKernelConfig,
    ForwardConfig,
    PrepareKernelConfig,
    ScalarBackwardConfig,
    ScalarForwardConfig,
    TileKernelConfig,
    TurnedKernelConfig,
)
from glac.decode import DecodeInputs, Gated, Want, _check, launch, run_launch
from glac.emit_c import c_sources, function_names, left_out, write_c
from glac.errors import GlacError, PackError
from glac.forward import run_forward
from glac.gate import LOG2E, GateInput
from glac.gpus import GPUS
from glac.kernelspec import config_kernels
from glac.pack import Pack, PackRow, read_pack, write_pack
from glac.plan import Plan
from glac.problem import Bucket, DType, Gate, Op, Problem, Specialisation
from glac.scalar import ScalarInputs
from glac.settings import scratch_bytes
from glac.validate import check_lowrank, check_vector
from tests.helpers_packs import FAKE_TOOLS, fake_compiled, fake_pack

ROOT = Path(__file__).resolve().parent.parent
K, V, RANK = 64, 48, 16
CHUNK = ChunkKernelConfig(chunk=32, block_v=16, num_warps=4, num_stages=2)
DENSE = Specialisation(K, V, DType.BF16, Gate.VECTOR, DType.FP32)
LOWRANK = Specialisation(K, V, DType.BF16, Gate.LOWRANK, DType.BF16, RANK)
SCALAR = Specialisation(K, V, DType.BF16, Gate.SCALAR, DType.FP32)
WHOLE, SPLIT = ForwardConfig(CHUNK), ForwardConfig(CHUNK, 64, CHUNK)
PREPARED = ForwardConfig(CHUNK, prepare=PrepareKernelConfig(32, 16, 4, 2))
PREPARED_SPLIT = replace(PREPARED, segment=64, summary=CHUNK)
ONE_NUMBER = ScalarForwardConfig(TurnedKernelConfig(32, 16, 4, 2))
ONE_NUMBER_BACK = ScalarBackwardConfig(CHUNK, CHUNK)
ONE_NUMBER_WALK = ScalarBackwardConfig(
    CHUNK, None, TileKernelConfig(32, 32, 64, 4, 2), replace(CHUNK, chunk=64)
)
ONE_NUMBER_IN_TILES = ScalarBackwardConfig(CHUNK, None, TileKernelConfig(32, 32, 16, 4, 2), CHUNK)
BACK = BackwardConfig(CHUNK, TileKernelConfig(32, 64, 64, 4, 2, dv=True))
BACK_CUT = BackwardConfig(CHUNK, TileKernelConfig(32, 32, 64, 4, 2, keep=2), CHUNK, 64)
BACK_IN_TILES = BackwardConfig(CHUNK, TileKernelConfig(32, 32, 16, 4, 2), CHUNK)
AT_ONCE = ChunksBackwardConfig(
    PrepareKernelConfig(32, 16, 4, 2), CHUNK, TileKernelConfig(64, 32, 16, 4, 2), CHUNK
)
IN_PAIRS = replace(AT_ONCE, chunks=TileKernelConfig(32, 32, 16, 4, 2, keep=2))
LED = ForwardConfig(replace(CHUNK, lead=32), 64)
BACK_LED = BackwardConfig(None, TileKernelConfig(32, 64, 64, 4, 2, dv=True, lead=32), None, 64)
DECODE = DecodeConfig(DecodeKernelConfig(block_v=16, num_warps=2))
BASE = 1 << 40
"""Where workspaces are said to be."""

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")

# Reads the name of a kernel from its code, and its arguments by their sizes.
DRIVER = """
#include <stdio.h>
#include <string.h>
static const struct { const char *name; const char *sizes; } table[] = { @TABLE@ };
static FILE *notes(void) { return fopen("@NOTES@", "a"); }
int cuDriverGetVersion(int *v) { *v = @VERSION@; return 0; }
int cuCtxGetDevice(int *d) { *d = 3; return 0; }
int cuDeviceGetAttribute(int *v, int what, int device) {
  if (device != 3) return 101;
  *v = what == 75 ? @MAJOR@ : what == 76 ? 0 : @SHARED@;
  return 0;
}
int cuModuleLoadData(void **module, const void *code) { *module = (void *)code; return 0; }
int cuModuleUnload(void *module) { return module ? 0 : 400; }
int cuModuleGetFunction(void **function, void *module, const char *symbol) {
  *function = module;
  return symbol[0] ? 0 : 500;
}
int cuFuncSetAttribute(void *f, int what, int value) { return f && what == 8 && value ? 0 : 1; }
int cuLaunchKernel(void *f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *stream, void **args, void **extra) {
  FILE *out = notes();
  if (y != 1 || z != 1 || by != 1 || bz != 1 || extra || stream != (void *)77) return 1;
  for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
    if (strncmp(table[i].name, f, strlen(table[i].name))) continue; /* code has no final 0 */
    fprintf(out, "%s %u %u %u", table[i].name, x, bx, shared);
    for (size_t a = 0; table[i].sizes[a]; a++) {
      fprintf(out, " ");
      for (int b = 0; b < table[i].sizes[a] - '0'; b++)
        fprintf(out, "%02x", ((unsigned char *)args[a])[b]);
    }
    fprintf(out, "\\n");
  }
  fclose(out);
  return 0;
}
"""

# What the example calls besides, with the host's memory for the device's.
MEMORY = """
#include <stdlib.h>
typedef unsigned long long place;
int cuInit(unsigned flags) { return (int)flags; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = context; return device; }
int cuCtxSetCurrent(void *context) { return !context; }
int cuStreamCreate(void **stream, unsigned flags) { *stream = (void *)77; return !flags; }
int cuStreamSynchronize(void *stream) { return stream != (void *)77; }
int cuMemAlloc(place *at, size_t n) {
  *at = (place)aligned_alloc(256, (n / 256 + 1) * 256);
  return !*at;
}
int cuMemcpyHtoD(place to, const void *from, size_t n) { return !memcpy((void *)to, from, n); }
int cuMemcpyDtoH(void *to, place from, size_t n) { return !memcpy(to, (void *)from, n); }
int cuMemsetD8(place to, unsigned char value, size_t n) { return !memset((void *)to, value, n); }
int cuGetErrorString(int code, const char **text) { *text = "an error"; return !code; }
"""

# Runs in a process of its own, which finds the stand-in by LD_LIBRARY_PATH.
CALLER = """
import json, sys
from pathlib import Path
from tests.helpers_c import Library
header, library, function, base, fields, given = json.loads(sys.argv[1])
code = Library(Path(header), Path(library))
status = code.open()
if status == 0:
    size = code.workspace(function, fields)
    place = None
    if size is not None:
        print(size, end=" ")
        place = base, size if given is None else given
    status = code.run(function, fields, 77, place)
    code.close()
print(status, code.error(status))
"""


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    rows = [
        PackRow.make("h100", "tuned", "Some GPU", DENSE, Bucket(5, 9), SPLIT),
        PackRow.make("h200", "heuristic", "", DENSE, Bucket(5, 9), SPLIT),
        PackRow.make("h200", "heuristic", "", DENSE, Bucket(7, 9), WHOLE),
        PackRow.make("h100", "tuned", "Some GPU", LOWRANK, Bucket(5, 9), SPLIT),
        PackRow.make("h200", "heuristic", "", LOWRANK, Bucket(5, 9), WHOLE),
        PackRow.make("h100", "tuned", "", DENSE, Bucket(9, 9), PREPARED),
        PackRow.make("h100", "tuned", "", DENSE, Bucket(9, 13), PREPARED_SPLIT),
        PackRow.make("h100", "tuned", "", LOWRANK, Bucket(9, 13), PREPARED_SPLIT),
        PackRow.make("h100", "tuned", "", SCALAR, Bucket(5, 9), ONE_NUMBER),
        PackRow.make("h100", "tuned", "", SCALAR, Bucket(5, 9), ONE_NUMBER_BACK),
        PackRow.make("h100", "tuned", "", SCALAR, Bucket(7, 9), ONE_NUMBER_WALK),
        PackRow.make("h100", "tuned", "", SCALAR, Bucket(8, 9), ONE_NUMBER_IN_TILES),
        PackRow.make("h100", "tuned", "", DENSE, Bucket(5, 9), BACK),
        PackRow.make("h100", "tuned", "", DENSE, Bucket(5, 13), BACK_CUT),
        PackRow.make("h100", "tuned", "", LOWRANK, Bucket(5, 9), BACK),
        PackRow.make("h100", "tuned", "", DENSE, Bucket(7, 9), BACK_IN_TILES),
        PackRow.make("h100", "tuned", "", DENSE, Bucket(8, 9), AT_ONCE),
        PackRow.make("h100", "tuned", "", DENSE, Bucket(8, 13), IN_PAIRS),
        PackRow.make("h100", "tuned", "", DENSE, Bucket(6, 10), LED),
        PackRow.make("h100", "tuned", "", LOWRANK, Bucket(6, 10), LED),
        PackRow.make("h100", "tuned", "", DENSE, Bucket(6, 10), BACK_LED),
        *(
            PackRow.make("h100", "heuristic", "", spec, Bucket(9, bucket), DECODE)
            for spec in (DENSE, LOWRANK, SCALAR)
            for bucket in (0, 2)
        ),
    ]
    kernels = dict.fromkeys(k for r in rows for k in config_kernels(r.spec, r.config, "sm_90a"))
    path = tmp_path_factory.mktemp("emit") / "sm_90a"
    return write_pack(path, "sm_90a", map(fake_compiled, kernels), rows, FAKE_TOOLS)


NAMES = {
    (DENSE, SPLIT): "glac_sm90a_fwd_k64_v48_vector_bf16_gfp32_bh5_t9",
    (DENSE, WHOLE): "glac_sm90a_fwd_k64_v48_vector_bf16_gfp32_bh7_t9",
    (LOWRANK, SPLIT): "glac_sm90a_fwd_k64_v48_lowrank16_bf16_bh5_t9",
    (LOWRANK, WHOLE): "glac_sm90a_fwd_k64_v48_lowrank16_bf16_bh5_t9_h200",
    (DENSE, PREPARED): "glac_sm90a_fwd_k64_v48_vector_bf16_gfp32_bh9_t9",
    (DENSE, PREPARED_SPLIT): "glac_sm90a_fwd_k64_v48_vector_bf16_gfp32_bh9_t13",
    (LOWRANK, PREPARED_SPLIT): "glac_sm90a_fwd_k64_v48_lowrank16_bf16_bh9_t13",
    (DENSE, BACK): "glac_sm90a_bwd_k64_v48_vector_bf16_gfp32_bh5_t9",
    (DENSE, BACK_CUT): "glac_sm90a_bwd_k64_v48_vector_bf16_gfp32_bh5_t13",
    (DENSE, LED): "glac_sm90a_fwd_k64_v48_vector_bf16_gfp32_bh6_t10",
    (LOWRANK, LED): "glac_sm90a_fwd_k64_v48_lowrank16_bf16_bh6_t10",
    (DENSE, BACK_LED): "glac_sm90a_bwd_k64_v48_vector_bf16_gfp32_bh6_t10",
    (DENSE, AT_ONCE): "glac_sm90a_bwd_k64_v48_vector_bf16_gfp32_bh8_t9",
    (DENSE, IN_PAIRS): "glac_sm90a_bwd_k64_v48_vector_bf16_gfp32_bh8_t13",
    (SCALAR, ONE_NUMBER): "glac_sm90a_fwd_k64_v48_scalar_bf16_gfp32_bh5_t9",
    (SCALAR, ONE_NUMBER_BACK): "glac_sm90a_bwd_k64_v48_scalar_bf16_gfp32_bh5_t9",
    (SCALAR, ONE_NUMBER_WALK): "glac_sm90a_bwd_k64_v48_scalar_bf16_gfp32_bh7_t9",
    (DENSE, DECODE): "glac_sm90a_decode_k64_v48_vector_bf16_gfp32_bh9_t0",
    (LOWRANK, DECODE): "glac_sm90a_decode_k64_v48_lowrank16_bf16_bh9_t0",
    (SCALAR, DECODE): "glac_sm90a_decode_k64_v48_scalar_bf16_gfp32_bh9_t0",
}


def test_rows_whose_results_pytorch_adds_up_have_no_function(pack: Pack) -> None:
    assert set(function_names(pack)) == set(NAMES)
    assert [(row.spec, row.config, reason) for row, reason in left_out(pack)] == [
        (LOWRANK, BACK, "the kernels around the pass of a low-rank gate have no C yet"),
        (DENSE, BACK_IN_TILES, "PyTorch adds up gradients of 3 tiles of V"),
        (SCALAR, ONE_NUMBER_IN_TILES, "PyTorch adds up gradients of 3 tiles of V"),
    ]


class Built:
    """The compiled sources beside the stand-in."""

    def __init__(self, pack: Pack, folder: Path, **device: int) -> None:
        self.folder = folder
        self.notes = folder / "notes"
        write_c(pack, folder)
        table = []
        for name, kernel in pack.kernels.items():
            sizes = "".join("8" if kind.startswith("*") else "4" for _, kind in kernel.args)
            table.append(f'{{"{name}", "{sizes}88"}}')
        values = {"MAJOR": 9, "SHARED": 232448, "VERSION": 12040, **device}
        text = (
            (DRIVER + MEMORY)
            .replace("@TABLE@", ", ".join(table))
            .replace("@NOTES@", str(self.notes))
        )
        for key, value in values.items():
            text = text.replace(f"@{key}@", str(value))
        (folder / "driver.c").write_text(text)
        strict = [
            "-std=c99",
            "-Wall",
            "-Wextra",
            "-Wpedantic",
            "-Werror",
            "-D_POSIX_C_SOURCE=200809L",
        ]
        shared = ["gcc", "-shared", "-fPIC", "-O1"]
        self.library = folder / "glac.so"
        for command in (
            [*shared, *strict, "-o", str(self.library), str(folder / "glac_sm_90a.c"), "-ldl"],
            [*shared, "-o", str(folder / "libcuda.so.1"), str(folder / "driver.c")],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr

    def call(
        self, function: str, fields: dict[str, Any], workspace: int | None = None
    ) -> tuple[str, list[list[str]]]:
        """What was returned, and what was launched."""
        self.notes.write_text("")
        header = str(self.folder / "glac_sm_90a.h")
        request = [header, str(self.library), function, BASE, fields, workspace]
        done = subprocess.run(
            [sys.executable, "-c", CALLER, json.dumps(request)],
            env={**os.environ, "LD_LIBRARY_PATH": str(self.folder), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip(), [line.split() for line in self.notes.read_text().splitlines()]


@pytest.fixture(scope="module")
def built(pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(pack, tmp_path_factory.mktemp("built"))


class Notes:
    """What Python launches, in the form that the stand-in notes it."""

    def __init__(self, pack: Pack, spec: Specialisation, config: Config) -> None:
        self.pack = pack
        self.lines: list[list[str]] = []
        self.memory: dict[int, torch.UntypedStorage] = {}  # kept: no address is used twice
        self.kernels = {
            kernel.template: Recorder(self, kernel.name)
            for kernel in config_kernels(spec, config, "sm_90a")
        }

    def compare(self, got: list[list[str]], workspace: int = 0) -> None:
        """Whether C launched the same, with memory of its own for what Python allocates."""
        assert len(got) == len(self.lines)
        places: dict[int, int] = {}
        for ours, theirs in zip(got, self.lines, strict=True):
            args = [("kernel", ""), ("grid", ""), ("threads", ""), ("shared", "")]
            args += [*self.pack.kernels[ours[0]].args, ("scratch", "*"), ("profile", "*")]
            for (name, kind), mine, other in zip(args, ours, theirs, strict=True):
                where = f"{name} of {ours[0]}"
                address = _number(mine) if kind.startswith("*") else 0
                if not BASE <= address < BASE + workspace:
                    assert mine == other, where
                    continue
                assert _number(other), where
                storage = self.memory[_number(other)]
                begin = address - (_number(other) - storage.data_ptr())
                assert places.setdefault(storage.data_ptr(), begin) == begin, where
        end = BASE
        sizes = {storage.data_ptr(): storage.nbytes() for storage in self.memory.values()}
        for memory, begin in sorted(places.items(), key=lambda item: item[1]):
            assert end <= begin
            end = begin + sizes[memory]
        assert end <= BASE + workspace


def _number(text: str) -> int:
    return int.from_bytes(bytes.fromhex(text), "little")


class Recorder:
    """A kernel that takes notes."""

    def __init__(self, notes: Notes, name: str) -> None:
        self.info, self.notes = notes.pack.kernels[name], notes

    def run(self, tensors: Any, scalars: Any, grid: int) -> None:
        given = {t.data_ptr(): t.untyped_storage() for t in tensors if t is not None}
        self.notes.memory.update(given)
        values = [0 if t is None else t.data_ptr() for t in tensors] + list(scalars)
        info = self.info
        texts = [info.name, str(grid), str(32 * info.num_warps), str(info.shared)]
        for (_, kind), value in zip(info.args, values, strict=True):
            code = "<Q" if kind.startswith("*") else {"i32": "<i", "fp32": "<f"}[kind]
            texts.append(struct.pack(code, value).hex())
        self.notes.lines.append([*texts, "00" * 8, "00" * 8])


def _spread(x: torch.Tensor) -> torch.Tensor:
    """The same values with space between heads and tokens."""
    wide = torch.empty((*x.shape[:2], x.shape[2] + 1, x.shape[3]), dtype=x.dtype)
    wide[:, :, :-1] = x
    return wide[:, :, :-1]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one token": {"T": 1},
    "states": {"states": True},
    "strides": {"spread": True, "T": 100},
    "groups": {"heads": (2, 1, 4)},
    "shared states": {"heads": (8, 2, 4), "states": True},
    "packed": {"B": 1, "cu": (0, 70, 70, 300), "states": True},
    "packed and short": {"B": 1, "T": 50, "cu": (0, 20, 50)},
    "other segments": {"segment": 96},
    "packed, other segments": {"B": 1, "cu": (0, 70, 70, 300), "segment": 128, "states": True},
    "segments that are longer": {"segment": 512},
    "not cut": {"segment": -1},
}


@needs_gcc
@pytest.mark.parametrize(
    ("spec", "config", "case"),
    [
        pytest.param(spec, config, case, id=f"{spec.gate.value}-{name}-{case}")
        for config, name in (
            (SPLIT, "split"),
            (WHOLE, "whole"),
            (PREPARED_SPLIT, "prepared, split"),
            (PREPARED, "prepared"),
            (LED, "led"),
        )
        for spec in (DENSE, LOWRANK)
        for case in CASES
        # The others have no kernels to cut with.
        if (config.segment or CASES[case].get("segment", 0) <= 0) and (spec, config) in NAMES
    ],
)
def test_launches_are_those_of_python(
    pack: Pack, built: Built, spec: Specialisation, config: ForwardConfig, case: str
) -> None:
    options: dict[str, Any] = {"B": 2, "T": 300, "heads": (4, 4, 4), "segment": 0, **CASES[case]}
    B, T, segment = options["B"], options["T"], options["segment"]
    Hq, Hk, Hs = options["heads"]
    sequences = len(options["cu"]) - 1 if "cu" in options else B

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        x = torch.zeros(shape, dtype=dtype)
        return _spread(x) if options.get("spread") and len(shape) == 4 else x

    q, k, v = make(B, T, Hq, K), make(B, T, Hk, K), make(B, T, Hs, V)
    h0 = torch.zeros(sequences, Hs, K, V) if options.get("states") else None
    cu = torch.tensor(options["cu"], dtype=torch.int32) if "cu" in options else None
    problem: Problem
    if spec.gate is Gate.VECTOR:
        g = make(B, T, Hs, K, dtype=torch.float32)
        gate, named = GateInput((g,)), {"g": g}
        problem = check_vector(q, k, v, g, h0, cu)
    else:
        x, w, bias = make(B, T, RANK), make(Hs * K, RANK), make(Hs * K)
        gate, named = GateInput((x, w, bias), 1 / 16.0, -3.25), {"x": x, "w": w, "bias": bias}
        problem = check_lowrank(q, k, v, x, w, bias, h0, cu)
    notes = Notes(pack, spec, config)
    cut = replace(config, segment=max(segment, 0)) if segment else config
    plan = Plan(problem, cut, notes.kernels)
    o, ht = run_forward(plan, q, k, v, gate, 0.125, h0, bool(options.get("states")), cu)

    tensors = {"q": q, "k": k, "v": v, "cu": cu, "h0": h0, "o": o, "ht": ht, **named}
    fields: dict[str, Any] = {n: 0 if t is None else t.data_ptr() for n, t in tensors.items()}
    if options.get("spread"):
        for name in ("q", "k", "v", "g"):
            if name in tensors:
                t = tensors[name]
                assert t is not None
                fields.update(zip((f"{name}_{a}" for a in "bth"), t.stride(), strict=False))
    fields.update(B=B, T=T, Hq=Hq, Hk=Hk, Hs=Hs, N=sequences, segment=segment)
    fields.update(scale=0.125, inv_normalizer=gate.inv_normalizer, clamp=gate.clamp)
    answer, got = built.call(NAMES[spec, config], fields)
    assert answer.split(maxsplit=1)[1] == "0 done"
    notes.compare(got, int(answer.split()[0]))


SCALAR_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one token": {"T": 1},
    "states": {"states": True},
    "strides": {"spread": True, "T": 100},
    "packed": {"B": 1, "cu": (0, 70, 70, 300), "states": True},
    "one gate for each head": {"gate": "head"},
    "no gate": {"gate": None},
}


def _scalar_call(
    case: str, heads: tuple[int, int, int] = (4, 4, 4)
) -> tuple[ScalarInputs, dict[str, Any]]:
    """Tensors of a case, and the fields of a C call for them."""
    options: dict[str, Any] = {"B": 2, "T": 300, "gate": "token", **SCALAR_CASES.get(case, {})}
    B, T = options["B"], options["T"]
    sequences = len(options["cu"]) - 1 if "cu" in options else B
    Hq, Hk, Hs = heads
    q, k, v = (
        torch.zeros(B, T, count, dim, dtype=torch.bfloat16)
        for count, dim in ((Hq, K), (Hk, K), (Hs, V))
    )
    g = None
    if options["gate"] is not None:
        g = torch.zeros((Hs,) if options["gate"] == "head" else (B, T, Hs))
    spread = bool(options.get("spread"))
    if spread:
        assert g is not None
        q, k, v, g = _spread(q), _spread(k), _spread(v), torch.stack((g, g), -1)[..., 0]
    h0 = torch.zeros(sequences, Hs, K, V) if options.get("states") else None
    cu = torch.tensor(options["cu"], dtype=torch.int32) if "cu" in options else None
    given = {"q": q, "k": k, "v": v, "g": g, "h0": h0, "cu": cu}
    fields: dict[str, Any] = {n: 0 if t is None else t.data_ptr() for n, t in given.items()}
    for name, tensor in (("q", q), ("k", k), ("v", v), ("g", g)):
        if spread and tensor is not None:
            fields.update(zip((f"{name}_{a}" for a in "bth"), tensor.stride(), strict=False))
    if options["gate"] == "head":
        fields["g_h"] = 1
    fields.update(B=B, T=T, Hq=Hq, Hk=Hk, Hs=Hs, N=sequences, scale=0.125)
    return ScalarInputs(q, k, v, g, h0, cu), fields


@needs_gcc
@pytest.mark.parametrize(
    ("case", "heads"),
    [*((case, (4, 4, 4)) for case in SCALAR_CASES), ("groups", (2, 1, 4)), ("shared", (8, 2, 4))],
)
def test_scalar_gates_launch_what_python_does(
    pack: Pack, built: Built, case: str, heads: tuple[int, int, int]
) -> None:
    inputs, fields = _scalar_call(case, heads)
    checked = scalar.check(inputs)
    assert checked.problem.spec == SCALAR
    notes = Notes(pack, SCALAR, ONE_NUMBER)
    plan = Plan(checked.problem, ONE_NUMBER, notes.kernels)
    o, ht = scalar.run_forward(
        plan, checked.groups, inputs, 0.125, inputs.initial_state is not None
    )
    fields.update(o=o.data_ptr(), ht=0 if ht is None else ht.data_ptr())
    answer, got = built.call(NAMES[SCALAR, ONE_NUMBER], fields)
    assert answer == "0 0 done"
    notes.compare(got)


@needs_gcc
@pytest.mark.parametrize("config", [ONE_NUMBER_BACK, ONE_NUMBER_WALK], ids=["chunks", "walk"])
@pytest.mark.parametrize("case", SCALAR_CASES)
def test_gradients_of_scalar_gates_launch_what_python_does(
    pack: Pack, built: Built, case: str, config: ScalarBackwardConfig
) -> None:
    inputs, fields = _scalar_call(case)
    states = inputs.initial_state is not None
    checked = scalar.check(inputs)
    notes = Notes(pack, SCALAR, config)
    plan = Plan(checked.problem, config, notes.kernels)
    do = torch.zeros(inputs.v.shape, dtype=torch.bfloat16)
    if case == "strides":
        do = _spread(do)
        fields.update(zip(("do_b", "do_t", "do_h"), do.stride(), strict=False))
    dht = torch.zeros(inputs.sequences, 4, K, V) if states else None
    wanted = {"want_dg": inputs.g is not None, "want_dh0": states}
    results = scalar.run_backward(plan, checked.groups, inputs, 0.125, do, dht, **wanted)
    names = ("dq", "dk", "dv", "dg", "dh0")
    tensors = {**dict(zip(names, results, strict=True)), "dout": do, "dht": dht}
    fields.update((n, 0 if t is None else t.data_ptr()) for n, t in tensors.items())
    heads = fields.pop("Hs")
    del fields["Hq"], fields["Hk"]
    answer, got = built.call(NAMES[SCALAR, config], {**fields, "H": heads})
    assert answer.split(maxsplit=1)[1] == "0 done"
    notes.compare(got, int(answer.split()[0]))


BACK_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one token": {"T": 1},
    "states": {"states": True},
    "strides": {"spread": True, "T": 100},
    "windows": {"scratch": 0, "states": True},
    "packed": {"B": 1, "cu": (0, 70, 70, 300), "states": True},
    "packed and short": {"B": 1, "T": 50, "cu": (0, 20, 50)},
    "segments": {"segment": 128, "T": 3000, "states": True},
    "segments, few at once": {"segment": 64, "T": 9000, "heads": 32, "scratch": 0},
    "segments, some at once": {"segment": 128, "T": 9000, "heads": 32, "scratch": 16},
    "packed, segments": {"B": 1, "cu": (0, 70, 70, 300), "segment": 64, "states": True},
    "not cut": {"segment": -1},
}


@needs_gcc
@pytest.mark.parametrize(
    "config",
    [BACK, BACK_CUT, BACK_LED, AT_ONCE, IN_PAIRS],
    ids=["whole", "cut", "led", "at once", "in pairs"],
)
@pytest.mark.parametrize("case", BACK_CASES)
def test_gradients_launch_what_python_does(
    pack: Pack, built: Built, monkeypatch: pytest.MonkeyPatch, config: BackwardConfig, case: str
) -> None:
    options: dict[str, Any] = {"B": 2, "T": 300, "heads": 4, "segment": 0, **BACK_CASES[case]}
    B, T, H, segment = (options[name] for name in ("B", "T", "heads", "segment"))
    sequences = len(options["cu"]) - 1 if "cu" in options else B
    states, spread = bool(options.get("states")), bool(options.get("spread"))

    def make(dim: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        x = torch.empty(B, T, H, dim, dtype=dtype)
        return _spread(x) if spread else x

    q, k, v, do, g = make(K), make(K), make(V), make(V), make(K, torch.float32)
    h0, dht = (torch.empty(sequences, H, K, V) if states else None for _ in range(2))
    cu = torch.tensor(options["cu"], dtype=torch.int32) if "cu" in options else None
    if "scratch" in options:
        monkeypatch.setenv("GLAC_SCRATCH_MIB", str(options["scratch"]))
    notes = Notes(pack, DENSE, config)
    cut = replace(config, segment=max(segment, 0)) if segment else config
    plan = Plan(check_vector(q, k, v, g, h0, cu), cut, notes.kernels)
    dq, dk, dv, (dg,), dh0 = run_backward(
        plan, q, k, v, GateInput((g,)), 0.125, h0, do, dht, dh0=states, cu=cu
    )
    tensors = {"q": q, "k": k, "v": v, "g": g, "cu": cu, "h0": h0, "dout": do, "dht": dht}
    tensors.update(dq=dq, dk=dk, dv=dv, dg=dg, dh0=dh0)
    fields: dict[str, Any] = {n: 0 if t is None else t.data_ptr() for n, t in tensors.items()}
    if spread:
        for name, tensor in (("q", q), ("k", k), ("v", v), ("do", do), ("g", g)):
            fields.update(zip((f"{name}_{a}" for a in "bth"), tensor.stride(), strict=False))
    fields.update(B=B, T=T, H=H, N=sequences, segment=segment, scale=0.125)
    fields["keep_bytes"] = max(1, options["scratch"] << 20) if "scratch" in options else 0
    answer, got = built.call(NAMES[DENSE, config], fields)
    assert answer.split(maxsplit=1)[1] == "0 done"
    notes.compare(got, int(answer.split()[0]))


DECODE_CASES: dict[str, dict[str, Any]] = {
    "zeros": {"state": None},
    "output alone": {},
    "in place": {"want": Want(in_place=True)},
    "in place in bf16": {"state": torch.bfloat16, "want": Want(in_place=True)},
    "new states": {"want": Want(final=True, dtype=torch.bfloat16)},
    "from bf16": {"state": torch.bfloat16, "want": Want(final=True), "T": 3},
    "states of each token": {"want": Want(every=True), "T": 3},
    "slots": {"index": torch.int32, "want": Want(in_place=True), "bias": False},
    "slots in int64": {"index": torch.int64, "want": Want(in_place=True)},
    "slots in bf16": {"index": torch.int64, "state": torch.bfloat16, "want": Want(in_place=True)},
    "slots, new states": {"index": torch.int32, "want": Want(final=True)},
    "groups": {"heads": (2, 1, 4), "T": 2, "want": Want(in_place=True)},
    "shared states": {"heads": (8, 2, 4), "want": Want(in_place=True)},
    "strides": {"spread": True, "T": 2, "index": torch.int32, "want": Want(in_place=True)},
    "packed": {"B": 1, "T": 7, "cu": (0, 3, 3, 7), "want": Want(in_place=True)},
    "packed, states of each token": {"B": 1, "T": 7, "cu": (0, 3, 7), "want": Want(every=True)},
    "one gate for each head": {"gate": "head", "want": Want(in_place=True)},
    "no gate": {"gate": None, "want": Want(in_place=True)},
}


@needs_gcc
@pytest.mark.parametrize(
    ("spec", "case"),
    [
        pytest.param(spec, case, id=f"{spec.gate.value}-{case}")
        for spec in (DENSE, LOWRANK, SCALAR)
        for case in DECODE_CASES
        if spec is SCALAR or "gate" not in DECODE_CASES[case]
    ],
)
def test_decoding_launches_what_python_does(
    pack: Pack, built: Built, spec: Specialisation, case: str
) -> None:
    defaults = {"B": 2, "T": 1, "heads": (4, 4, 4), "state": torch.float32, "index": None}
    options: dict[str, Any] = {**defaults, "want": Want(), "gate": "token", **DECODE_CASES[case]}
    B, T, want = options["B"], options["T"], options["want"]
    Hq, Hk, Hs = options["heads"]

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        x = torch.zeros(shape, dtype=dtype)
        return _spread(x) if options.get("spread") and len(shape) == 4 else x

    cu = torch.tensor(options["cu"], dtype=torch.int32) if "cu" in options else None
    sequences = B if cu is None else cu.shape[0] - 1
    indices = None
    if options["index"] is not None:
        indices = torch.arange(sequences, dtype=options["index"])
    state = None
    slots = 7 if indices is not None else sequences
    if options["state"] is not None:
        state = torch.zeros(slots, 2 * Hs if "spread" in options else Hs, K, V)[:, :Hs]
        state = state.to(options["state"])
    gate = Gated()
    numbers: tuple[float, ...] = (0.125,)
    if spec.gate is Gate.LOWRANK:
        bias = make(Hs * K) if options.get("bias", True) else None
        gate = Gated(None, make(B, T, RANK), make(Hs * K, RANK), bias)
        numbers = (0.125, 1 / 16.0, -3.25 * LOG2E)
    elif options["gate"] is not None:
        shapes = {"token": (B, T, Hs), "head": (Hs,)}
        shape = (B, T, Hs, K) if spec is DENSE else shapes[options["gate"]]
        g = make(*shape, dtype=torch.float32)
        if options.get("spread") and spec is SCALAR:
            g = torch.stack((g, g), -1)[..., 0]
        gate = Gated(g)
    q, k, v = make(B, T, Hq, K), make(B, T, Hk, K), make(B, T, Hs, V)
    inputs = DecodeInputs(q, k, v, gate, state, indices, cu)
    problem, groups = _check(inputs, want)
    assert problem.spec == spec
    notes = Notes(pack, spec, DECODE)
    plan = Plan(problem, DECODE, notes.kernels)
    o, new = run_launch(launch(plan, groups, inputs, want), inputs, want, numbers)

    x = gate.x
    named = {"q": q, "k": k, "v": v, "g": gate.g, "x": x, "w": gate.weight, "bias": gate.bias}
    named.update({"cu": cu, "from": state, "to": None if want.in_place else new})
    named.update(indices=indices, o=o)
    fields: dict[str, Any] = {n: 0 if t is None else t.data_ptr() for n, t in named.items()}
    if options.get("spread"):
        for name in ("q", "k", "v", "g"):
            tensor = named[name]
            if tensor is not None:
                fields.update(zip((f"{name}_{a}" for a in "bth"), tensor.stride(), strict=False))
        assert state is not None
        fields.update(from_n=state.stride(0), from_h=state.stride(1))
    if options["gate"] == "head":
        fields["g_h"] = 1
    fields.update(B=B, T=T, Hq=Hq, Hk=Hk, Hs=Hs, N=sequences, slots=slots)
    fields.update(index_bytes=8 if options["index"] is torch.int64 else 4)
    fields.update(in_place=int(want.in_place), every=int(want.every))
    fields.update(from_dtype=int(options["state"] is torch.bfloat16))
    fields.update(to_dtype=int(want.dtype is torch.bfloat16))
    fields.update(scale=0.125, inv_normalizer=1 / 16.0, clamp=-3.25)
    answer, got = built.call(NAMES[spec, DECODE], fields)
    assert answer == "0 done"
    notes.compare(got)


def _good() -> dict[str, Any]:
    fields = dict.fromkeys(("q", "k", "v", "g", "o"), 1 << 30)
    return {**fields, "B": 2, "T": 300, "Hq": 4, "Hk": 4, "Hs": 4, "scale": 1.0}


def test_limits_are_those_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLAC_SCRATCH_MIB", raising=False)
    assert scratch_bytes() == emit_c.KEEP_BYTES
    assert emit_c.MAX_TOKEN_STRIDE == validate.MAX_TOKEN_STRIDE
    assert emit_c.MAX_TOKENS == validate.MAX_TOKENS


@needs_gcc
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": 0}, "-1 a pointer that must be there"),
        ({"g": 0}, "-1 a pointer"),
        ({"o": (1 << 30) + 8}, "-2 a pointer is not a multiple of 16"),
        ({"h0": 4}, "-2 a pointer is not"),
        ({"T": 0}, "-3 a size"),
        ({"T": 2**31 - 1}, "-3 a size"),
        ({"Hk": 3}, "-3 a size"),
        ({"Hq": 6}, "-3 a size"),
        ({"cu": 1 << 20, "N": 4}, "-3 a size"),
        ({"B": 2**20, "Hq": 2**16, "Hk": 2**16, "Hs": 2**16}, "-3 a size"),
        ({"q_t": 200, "q_h": 64, "q_b": 60000}, "-4 a stride"),
        ({"k_t": 32, "k_h": 64, "k_b": 64000}, "-4 a stride"),
        ({"v_t": 1 << 24, "v_h": 48, "v_b": 0}, "-4 a stride"),
        ({"segment": 48}, "-9 a segment is no multiple"),
    ],
)
def test_wrong_calls_are_refused(built: Built, change: dict[str, Any], message: str) -> None:
    answer, launched = built.call(NAMES[DENSE, SPLIT], {**_good(), **change})
    assert answer.split(maxsplit=1)[1].startswith(message)
    assert launched == []


@needs_gcc
@pytest.mark.parametrize("row", [(DENSE, WHOLE), (DENSE, PREPARED), (SCALAR, ONE_NUMBER)])
def test_segments_without_kernels_for_them_are_refused(built: Built, row: Any) -> None:
    answer, launched = built.call(NAMES[row], {**_good(), "segment": 64})
    assert answer.startswith("0 -9 a segment is no multiple of the row's step, or the row cannot")
    assert launched == []


@needs_gcc
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": 0}, "-1 a pointer"),
        ({"from": 0, "in_place": 1}, "-1 a pointer"),
        ({"from": 0, "indices": 1 << 20, "slots": 3, "index_bytes": 4}, "-1 a pointer"),
        ({"every": 1}, "-1 a pointer"),
        ({"from": (1 << 30) + 8}, "-2 a pointer"),
        ({"indices": (1 << 20) + 4, "slots": 3, "index_bytes": 8}, "-2 a pointer"),
        ({"B": 0}, "-3 a size"),
        ({"Hk": 3}, "-3 a size"),
        ({"B": 2**28}, "-3 a size"),
        ({"Hq": 2**18, "Hk": 2**18, "Hs": 2**18}, "-3 a size"),
        ({"cu": 1 << 20, "N": 4}, "-3 a size"),
        ({"indices": 1 << 20, "index_bytes": 4}, "-3 a size"),
        ({"k_t": 200, "k_h": 64, "k_b": 60000}, "-4 a stride"),
        ({"from_n": 4 * 64 * 48, "from_h": 8}, "-4 a stride"),
        ({"to": 1 << 20, "every": 1, "T": 1 << 22}, "-4 a stride"),
        ({"indices": 1 << 20, "slots": 3, "index_bytes": 2}, "-10 a dtype"),
        ({"from_dtype": 2}, "-10 a dtype"),
        ({"to_dtype": -1}, "-10 a dtype"),
        ({"to": 1 << 20, "in_place": 1}, "-10 a dtype"),
    ],
)
def test_wrong_calls_of_decoding_are_refused(
    built: Built, change: dict[str, Any], message: str
) -> None:
    call = {**_good(), "T": 1, "from": 1 << 30}
    answer, launched = built.call(NAMES[DENSE, DECODE], {**call, **change})
    assert answer.startswith(message)
    assert launched == []


@needs_gcc
@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        (SCALAR, {"dout": 0}, "-1 a pointer"),
        (SCALAR, {"dk": 0}, "-1 a pointer"),
        (SCALAR, {"dg": 8}, "-2 a pointer"),
        (SCALAR, {"g": (1 << 30) + 4}, "-2 a pointer"),
        (SCALAR, {"H": 0}, "-3 a size"),
        (SCALAR, {"cu": 1 << 20, "N": 4}, "-3 a size"),
        (SCALAR, {"T": 2**30, "H": 2**10}, "-3 a size"),
        (SCALAR, {"do_t": 40, "do_h": 48, "do_b": 40 * 300}, "-4 a stride"),
        (SCALAR, {"g_h": 1 << 31}, "-4 a stride"),
        (SCALAR, {"segment": 64}, "-9 a segment"),
        (DENSE, {"dg": 0}, "-1 a pointer"),
        (DENSE, {"g": 0}, "-1 a pointer"),
        (DENSE, {"T": 2**24, "B": 2**20, "segment": 64}, "-3 a size"),
        (DENSE, {"keep_bytes": -1}, "-3 a size"),
        (DENSE, {"g_t": 32, "g_h": 64, "g_b": 64000}, "-4 a stride"),
        (DENSE, {"segment": 48}, "-9 a segment"),
    ],
)
def test_wrong_calls_for_gradients_are_refused(
    built: Built, spec: Specialisation, change: dict[str, Any], message: str
) -> None:
    call = dict.fromkeys(("q", "k", "v", "g", "dout", "dq", "dk", "dv", "dg"), 1 << 30)
    call = {**call, "B": 2, "T": 300, "H": 4, **change}
    name = NAMES[spec, ONE_NUMBER_BACK if spec is SCALAR else BACK]
    answer, launched = built.call(name, call)
    assert answer.split(maxsplit=1)[1].startswith(message)
    assert launched == []


@needs_gcc
def test_scalar_gates_are_aligned_as_numbers(built: Built) -> None:
    call = {**_good(), "T": 1, "g": (1 << 30) + 4}
    assert built.call(NAMES[SCALAR, DECODE], call)[0] == "0 done"
    call["g"] += 2
    assert built.call(NAMES[SCALAR, DECODE], call)[0].startswith("-2 a pointer")


@needs_gcc
def test_workspace(built: Built) -> None:
    answer, launched = built.call(NAMES[DENSE, SPLIT], _good())
    size = int(answer.split()[0])
    assert size >= 2 * 4 * 5 * K * V * 4
    assert len(launched) == 3
    answer, launched = built.call(NAMES[DENSE, SPLIT], _good(), workspace=size - 1)
    assert answer.split(maxsplit=1)[1].startswith("-5 the workspace is too small")
    assert launched == []
    answer, launched = built.call(NAMES[DENSE, WHOLE], _good(), workspace=0)
    assert answer == "0 0 done"
    assert len(launched) == 1
    few = {**_good(), "T": 2**31 - 70000, "Hq": 64, "Hk": 64, "Hs": 64}
    assert built.call(NAMES[DENSE, PREPARED], few)[0].startswith("0 -3 a size")


@needs_gcc
def test_kernels_get_the_scratch_that_they_want(tmp_path: Path) -> None:
    """A part of the workspace for the largest launch, which the others use before and after it."""
    row = PackRow.make("h100", "tuned", "", DENSE, Bucket(5, 9), PREPARED_SPLIT)
    kernels = config_kernels(DENSE, PREPARED_SPLIT, "sm_90a")
    plain = {kernel.template: fake_compiled(kernel) for kernel in kernels}
    wanting = {"gla_walk": 128, "gla_walk_states": 640}
    with_scratch = [
        replace(made, scratch_bytes=wanting.get(template, 0)) for template, made in plain.items()
    ]
    pack = write_pack(tmp_path / "p", "sm_90a", with_scratch, [row], FAKE_TOOLS)
    built = Built(pack, tmp_path)
    (name,) = function_names(pack).values()
    for segment, largest in ((0, "gla_walk_states"), (-1, "gla_walk")):
        answer, launches = built.call(name, {**_good(), "segment": segment})
        programs = {pack.kernels[line[0]].kernel.template: int(line[1]) for line in launches}
        places = [_number(line[-2]) for line in launches]
        templates = [template for template, place in zip(programs, places, strict=True) if place]
        assert templates == [template for template in programs if template in wanting]
        (place,) = set(places) - {0}
        end = place + programs[largest] * wanting[largest]
        assert 0 <= BASE + int(answer.split()[0]) - end < 256


@needs_gcc
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ({"MAJOR": 10}, "-6 the current device does not run code for sm_90a"),
        ({"VERSION": 11080}, "-7 no CUDA driver, or one older than for CUDA 12.0"),
        ({"SHARED": 1000}, "-6 the current device does not run code"),
    ],
)
def test_wrong_devices(pack: Pack, tmp_path: Path, device: dict[str, int], message: str) -> None:
    answer, launched = Built(pack, tmp_path, **device).call(NAMES[DENSE, WHOLE], _good())
    assert message in answer
    assert launched == []


@needs_gcc
def test_header_is_cpp_too(pack: Pack, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    write_c(pack, tmp_path)
    (tmp_path / "use.cpp").write_text(
        '#include "glac_sm_90a.h"\n'
        "int main() { glac_forward call{}; return glac_sm90a_rows[0].run(nullptr, &call, 0, 0, "
        "nullptr) == GLAC_NULL ? 0 : 1; }\n"
    )
    for command in (
        ["gcc", "-c", "glac_sm_90a.c", "-o", "glac.o"],
        ["g++", "-Wall", "-Wextra", "-Werror", "use.cpp", "glac.o", "-ldl", "-o", "use"],
        ["./use"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True)


def test_the_text_depends_on_the_pack_alone(pack: Pack, tmp_path: Path) -> None:
    again = tmp_path / "deeper" / "copy"
    shutil.copytree(pack.path, again)
    assert c_sources(read_pack(again)) == c_sources(pack)
    header, source = c_sources(pack)
    assert str(pack.path) not in header + source
    assert max(map(len, header.splitlines())) <= 100
    # Two GPUs with one config share a function; rows whose results PyTorch adds up have none.
    assert {name for name in NAMES.values() if f"int {name}(" in header} == set(NAMES.values())
    assert header.count("_workspace(const glac_forward *call);") == 10
    assert header.count("_workspace(const glac_backward *call);") == 7
    assert header.count("const glac_decode *call,\n    void *stream);") == 3
    assert "gla_bwd_k64_v48_lowrank16" not in source
    assert function_names(pack) == NAMES


@needs_gcc
@pytest.mark.parametrize(
    ("spec", "config", "op"),
    [
        (DENSE, WHOLE, "forward"),
        (SCALAR, ONE_NUMBER, "forward"),
        (DENSE, BACK, "backward"),
        (SCALAR, ONE_NUMBER_BACK, "backward"),
        (DENSE, DECODE, "decode"),
    ],
    ids=["forward", "scalar forward", "backward", "scalar backward", "decode"],
)
def test_one_op_alone(tmp_path: Path, spec: Specialisation, config: Config, op: str) -> None:
    """Nothing is said of what a pack has no rows of, and nothing is left over."""
    row = PackRow.make("h100", "tuned", "", spec, Bucket(5, 9), config)
    kernels = config_kernels(spec, config, "sm_90a")
    only = write_pack(tmp_path / "p", "sm_90a", map(fake_compiled, kernels), [row], FAKE_TOOLS)
    for text in c_sources(only):
        for absent in {"forward", "backward", "decode"} - {op}:
            assert f"glac_{absent}" not in text
        assert re.search(r"@\w+@", text) is None
    Built(only, tmp_path)


def test_what_cannot_be_written(pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(PackError, match="cannot be written"):
        write_c(pack, Path("/proc/glac"))
    row = PackRow.make("h100", "tuned", "", LOWRANK, Bucket(5, 9), BACK)
    kernels = config_kernels(LOWRANK, BACK, "sm_90a")
    only = write_pack(tmp_path / "b", "sm_90a", map(fake_compiled, kernels), [row], FAKE_TOOLS)
    with pytest.raises(GlacError, match="no row that can be launched from C"):
        c_sources(only)
    damaged = fake_pack(tmp_path / "d")
    for cubin in (damaged.path / "cubins").iterdir():
        cubin.write_bytes(b"x")
    with pytest.raises(PackError, match="bytes, got"):
        c_sources(damaged)


def _make_case() -> Any:
    """The example's script as a module."""
    spec = importlib.util.spec_from_file_location("make_case", ROOT / "examples/c/make_case.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@needs_gcc
def test_the_example_builds_and_runs(pack: Pack, tmp_path: Path) -> None:
    """With a header and a library that only know what it uses: neither needs to be installed."""
    built = Built(pack, tmp_path)
    (tmp_path / "cuda.h").write_text(STAND_IN_HEADER)
    configure = ["cmake", "-S", str(ROOT / "examples" / "c"), "-B", str(tmp_path / "build")]
    driver = tmp_path / "libcuda.so.1"
    places = {"GLAC_SOURCES": tmp_path, "CUDA_INCLUDE": tmp_path, "CUDA_DRIVER": driver}
    configure += [f"-D{key}={value}" for key, value in places.items()]
    configure += ["-DCMAKE_C_FLAGS=-Wall -Wextra -Werror"]
    for command in (configure, ["cmake", "--build", str(tmp_path / "build")]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def untouched(*shape: int) -> torch.Tensor:
        """What results are filled with, as no kernel runs."""
        return torch.full(shape, 255, dtype=torch.uint8)

    for name, config, T in (("prefill", SPLIT, 300), ("decode", DECODE, 1)):
        inputs = dict.fromkeys("qkvg", torch.zeros(2, T, 4, 64))
        results = {"o": untouched(2, T, 4, V * 2), "ht": untouched(2, 4, K, V * 4)}
        numbers = {"row": NAMES[DENSE, config], "segment": 96, "B": 2, "T": T, "H": 4}
        numbers.update(scale=0.125, inv_normalizer=1 / 16.0, clamp=float("-inf"))
        _make_case().write(tmp_path / "cases" / name, numbers, {**inputs, **results})

    def run() -> subprocess.CompletedProcess[str]:
        built.notes.write_text("")
        return subprocess.run(
            [str(tmp_path / "build" / "serve"), str(tmp_path / "cases")],
            env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "bit-identical"
    launches = [line.split() for line in built.notes.read_text().splitlines()]
    templates = [pack.kernels[launch[0]].kernel.template for launch in launches]
    assert templates == ["gla_states", "gla_combine", "gla_fwd", "gla_decode"]
    forward, decode = (
        dict(zip((name for name, _ in pack.kernels[launch[0]].args), launch[4:], strict=False))
        for launch in launches[2:]
    )
    assert forward["seg_len"] == struct.pack("<i", 96).hex()
    assert decode["from32"] == decode["to32"] == forward["ht"] != "00" * 8
    assert decode["in_place"] == struct.pack("<i", 1).hex()
    state = tmp_path / "cases" / "decode" / "ht.bin"
    state.write_bytes(b"\0" + state.read_bytes()[1:])
    done = run()
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "DIFFERENT")


def _decided_for_an_h100(pack: Pack, patch: pytest.MonkeyPatch) -> None:
    """Dispatch as on an H100 that has this pack alone."""
    patch.setenv("GLAC_PACK_PATH", str(pack.path))
    patch.setattr(dispatch, "explain", functools.partial(dispatch.decide, gpu=GPUS["h100"]))
    patch.setattr(dispatch, "device_gpu", lambda device: (GPUS["h100"], ""))


@pytest.mark.parametrize(
    ("sizes", "op", "row", "segment"),
    [
        ((1, 512, 32), Op.FORWARD, (DENSE, SPLIT), 64),
        ((1, 4096, 4), Op.FORWARD, (DENSE, SPLIT), 256),
        ((1, 300, 4), Op.FORWARD, (DENSE, SPLIT), -1),
        ((2, 8000, 256), Op.FORWARD, (DENSE, PREPARED_SPLIT), 64),
        ((2, 8000, 128), Op.FORWARD, (DENSE, PREPARED_SPLIT), -1),
        ((1, 512, 32), Op.SCALAR_FORWARD, (SCALAR, ONE_NUMBER), -1),
        ((8, 1, 4), Op.DECODE, (DENSE, DECODE), -1),
    ],
)
def test_the_example_finds_the_function_of_a_decision(
    pack: Pack, monkeypatch: pytest.MonkeyPatch, sizes: Any, op: Op, row: Any, segment: int
) -> None:
    """Also where dispatch cuts sequences into other segments than the row's."""
    _decided_for_an_h100(pack, monkeypatch)
    found = _make_case().served_by(Problem(row[0], *sizes), op)
    assert found == {"row": NAMES[row], "segment": segment}


def test_the_example_refuses_what_python_cuts_and_c_does_not(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    _decided_for_an_h100(pack, monkeypatch)
    with pytest.raises(SystemExit, match="Python cuts the sequences of B=1 T=16384 H=4"):
        _make_case().served_by(Problem(SCALAR, 1, 16384, 4), Op.SCALAR_FORWARD)


STAND_IN_HEADER = """
#include <stddef.h>
typedef int CUresult, CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
enum { CUDA_SUCCESS, CU_STREAM_NON_BLOCKING };
CUresult cuInit(unsigned);
CUresult cuDeviceGet(CUdevice *, int);
CUresult cuDevicePrimaryCtxRetain(CUcontext *, CUdevice);
CUresult cuCtxSetCurrent(CUcontext);
CUresult cuStreamCreate(CUstream *, unsigned);
CUresult cuStreamSynchronize(CUstream);
CUresult cuMemAlloc(CUdeviceptr *, size_t);
CUresult cuMemcpyHtoD(CUdeviceptr, const void *, size_t);
CUresult cuMemcpyDtoH(void *, CUdeviceptr, size_t);
CUresult cuMemsetD8(CUdeviceptr, unsigned char, size_t);
CUresult cuGetErrorString(CUresult, const char **);
"""
