"""Compile what flash-linear-attention's autotuner will try, in many processes at once.

    python benchmarks/fla_warm.py --backward --shards 16 --cache-dir DIR
    TRITON_CACHE_DIR=DIR glac bench

fla compiles every candidate of its tuning spaces on the first call, one after the other: minutes
per shape. Here N processes walk the same calls, share the candidates between them and only
compile, into one Triton cache; no candidate is launched, so a bad one cannot take the GPU down.
The run that measures then finds every candidate compiled and only times them.

Every kernel that fla 0.6.0 launches for GLA (``--gate vector``) goes through the autotuner, so
none runs here. What they would have written stays uninitialised, and only casts of gradients read
it. A shape has 122 candidates in the forward pass and up to 198 in the backward pass.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Shape = tuple[int, int, int, int, int]

ROOT = Path(__file__).resolve().parents[1]
TOKENS = (
    256  # fla's kernels are not specialised on T, only on its chunk size, which is 64 from here
)


KINDS = {
    "vector": ("gla", "chunk_gla"),
    "scalar": ("simple_gla", "chunk_simple_gla"),
    "head": ("retention", "chunk_retention"),
}
"""For each kind of gate where fla has its operation, and the name of it."""


class Compiler:
    """Stands in for ``Autotuner.run``: compiles the candidates that this process claims.

    A claim is a file that only one process can create, so fast processes take more.
    """

    def __init__(self, claims: Path) -> None:
        self.claims = claims
        self.shape = ""
        self.calls = 0
        self.compiled = 0
        self.errors: list[str] = []

    def claim(self, name: str) -> bool:
        path = self.claims / hashlib.sha256(name.encode()).hexdigest()
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def run(self, tuner: Any, *args: Any, **kwargs: Any) -> None:
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        kernel = tuner.base_fn.__name__
        # Every process makes the same calls; one kernel may be called twice with other dtypes.
        self.calls += 1
        configs = tuner.prune_configs(kwargs) if len(tuner.configs) > 1 else tuner.configs
        for config in configs:
            if not self.claim(f"{self.shape} {self.calls} {kernel} {config}"):
                continue
            try:
                tuner.fn.run(*args, **{**kwargs, **config.all_kwargs(), "warmup": True})
                self.compiled += 1
            except Exception as error:
                self.errors.append(f"{kernel} {config}: {error!r}"[:300])
        tuner.nargs = None


def compile_shard(
    shapes: Sequence[Shape],
    claims: Path,
    *,
    dtype: str,
    gate_dtype: str,
    kinds: Sequence[str] = ("vector",),
    backward: bool,
    device: str = "cuda",
) -> Compiler:
    """The work of one process."""
    os.environ["FLA_CACHE_RESULTS"] = "0"  # before fla is imported; this process is a child
    import torch
    from triton.runtime.autotuner import Autotuner

    compiler = Compiler(claims)

    def run(tuner: Any, *args: Any, **kwargs: Any) -> None:
        compiler.run(tuner, *args, **kwargs)

    Autotuner.run = run
    element, gate_element = getattr(torch, dtype), getattr(torch, gate_dtype)
    for kind, (B, T, H, K, V) in itertools.product(kinds, shapes):
        room, name = KINDS[kind]
        operation: Callable[..., Any] = getattr(importlib.import_module(f"fla.ops.{room}"), name)
        # B and H are compile-time constants of fla's cumsum.
        compiler.shape, compiler.calls = f"{kind} {B} {H} {K} {V}", 0
        tokens = min(T, TOKENS)
        sizes = [(B, tokens, H, D) for D in (K, K, V)]
        gates = {"vector": [(B, tokens, H, K)], "scalar": [(B, tokens, H)], "head": []}[kind]

        def zeros(size: tuple[int, ...], of: torch.dtype) -> torch.Tensor:
            return torch.zeros(size, device=device, dtype=of, requires_grad=backward)

        try:
            inputs = [zeros(size, element) for size in sizes]
            inputs += [zeros(size, gate_element) for size in gates]
            o = operation(*inputs)[0]
            if backward:
                torch.autograd.grad(o, inputs, torch.zeros_like(o))
        except Exception as error:
            compiler.errors.append(f"{compiler.shape}: {error!r}"[:300])
    return compiler


def warm(
    shapes: Sequence[Shape],
    *,
    shards: int,
    cache_dir: Path,
    dtype: str,
    gate_dtype: str,
    kinds: Sequence[str] = ("vector",),
    backward: bool,
    timeout: float,
) -> int:
    """Start the processes, wait, report on stderr. Returns how many candidates were compiled."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    env = {
        **os.environ,
        "TRITON_CACHE_DIR": str(cache_dir.resolve()),
        "FLA_CACHE_RESULTS": "0",
        "OMP_NUM_THREADS": "1",
    }
    compiled, silent, errors = 0, 0, []
    with tempfile.TemporaryDirectory(prefix="fla-warm-") as claims:
        command = [sys.executable, __file__, "--claims", claims]
        command += ["--dtype", dtype, "--gate-dtype", gate_dtype]
        command += ["--backward"] if backward else []
        for kind in kinds:
            command += ["--gate", kind]
        for shape in shapes:
            command += ["--shape", ",".join(map(str, shape))]
        children = [
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
            for _ in range(shards)
        ]
        try:
            for child in children:
                left = max(0.1, timeout - (time.monotonic() - start))
                try:
                    output = child.communicate(timeout=left)[0]
                    report = json.loads(output.strip().splitlines()[-1])
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.communicate()
                    silent += 1
                except (ValueError, IndexError):
                    silent += 1
                else:
                    compiled += report["compiled"]
                    errors += report["errors"]
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                    child.wait()
    seconds = time.monotonic() - start
    print(f"compiled {compiled} candidates in {seconds:.0f} s", file=sys.stderr)
    if silent:
        print(f"{silent} of {shards} processes died or ran out of time", file=sys.stderr)
    if errors:
        print(f"{len(errors)} did not compile, for example {errors[0]}", file=sys.stderr)
    return compiled


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compile fla's autotuning candidates into one Triton cache."
    )
    default_cache = os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")
    parser.add_argument("--shards", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--shape", action="append", metavar="B,T,H,K,V", help="repeatable")
    parser.add_argument("--suite", help="the shapes of a suite of `glac bench` [standard]")
    parser.add_argument(
        "--gate", action="append", choices=KINDS, help="repeatable; of g: head is chunk_retention"
    )
    parser.add_argument("--backward", action="store_true", help="the backward kernels as well")
    parser.add_argument("--dtype", default="bfloat16", help="of q, k and v")
    parser.add_argument("--gate-dtype", default=None, help="of g; like --dtype if left out")
    parser.add_argument("--cache-dir", type=Path, default=Path(default_cache))
    parser.add_argument("--timeout", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)

    sys.path.insert(0, str(ROOT))  # a checkout need not be installed
    from glac.bench import bench_problems, parse_shape
    from glac.errors import GlacError

    if options.shape and options.suite:
        parser.error("--suite and --shape exclude each other")
    try:
        shapes = [parse_shape(s) for s in options.shape or ()]
        if not shapes:
            problems = bench_problems(suite=options.suite or "standard")
            sizes = [(p.B, p.T, p.H, p.spec.K, p.spec.V) for p in problems]
            shapes = list(dict.fromkeys(sizes))  # a shape is in a suite once for each gate
    except GlacError as error:
        parser.error(str(error))
    gate_dtype = options.gate_dtype or options.dtype
    kinds = options.gate or ["vector"]
    if options.claims is not None:
        done = compile_shard(
            shapes,
            options.claims,
            dtype=options.dtype,
            gate_dtype=gate_dtype,
            kinds=kinds,
            backward=options.backward,
        )
        print(json.dumps({"compiled": done.compiled, "errors": done.errors}), flush=True)
        return 0

    import torch

    if not torch.cuda.is_available():
        print("no CUDA GPU: fla compiles for the one it runs on", file=sys.stderr)
        return 3
    if importlib.util.find_spec("fla") is None:
        print("fla is missing: pip install flash-linear-attention", file=sys.stderr)
        return 3
    compiled = warm(
        shapes,
        shards=max(1, options.shards),
        cache_dir=options.cache_dir,
        dtype=options.dtype,
        gate_dtype=gate_dtype,
        kinds=kinds,
        backward=options.backward,
        timeout=options.timeout,
    )
    return 0 if compiled else 1


if __name__ == "__main__":
    raise SystemExit(main())
