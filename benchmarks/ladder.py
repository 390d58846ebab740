"""What exactness costs ordinary gates: kernels as shipped, and without range test and redo.

    python benchmarks/ladder.py --gpu h100 --compile DIR      # on any machine with the toolchain
    python benchmarks/ladder.py --gpu h100 --run DIR          # where the GPU is

Both folders of kernels are compiled from the tuned rows of the GPU: once as they are, once from
sources in which the second pass is cut out. The calls then differ in nothing else, except that
``gla_bwd_exact`` is not launched. Rows that walk prepared chunks have no such pass to cut out.
Times are medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from glac import compile as compiler
from glac import generate
from glac.configs import BackwardConfig, ForwardConfig
from glac.gpus import gpu_by_name
from glac.kernelspec import KernelSpec, config_kernels
from glac.pack import read_pack, write_pack
from glac.templates import TEMPLATES
from glac.tuned import TunedRow, shipped

TEST = "if not (tl.min(worst, 0) >= -START_RANGE_LOG2):"
FLAG = "bad = tl.where(tl.min(worst, 0) >= -START_RANGE_LOG2, 0, 1)"
KERNEL_FUNCTION = generate.kernel_function


def without_ladder(template: str) -> Any:
    """The template's function, from a source without its second pass, if it has one."""
    source = TEMPLATES[template].path.read_text(encoding="utf-8")
    if TEST not in source and FLAG not in source:
        return KERNEL_FUNCTION(template)
    source = source.replace(TEST, "if False:").replace(FLAG, "bad = 0")
    folder = Path(tempfile.mkdtemp())
    (folder / f"{template}.py").write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"plain_{template}", folder / f"{template}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, template)


def rows_of(gpu: str) -> Sequence[TunedRow]:
    file = shipped(gpu)
    if file is None:
        raise SystemExit(f"no tuned rows came for {gpu}")
    return file.rows


def compile_both(gpu: str, folder: Path) -> None:
    arch = gpu_by_name(gpu).arch
    kernels: dict[KernelSpec, None] = {}
    for row in rows_of(gpu):
        kernels.update(dict.fromkeys(config_kernels(row.spec, row.config, arch)))
    tools = compiler.toolchain()
    for name, plain in (("shipped", False), ("plain", True)):
        built = []
        for kernel in kernels:
            if plain and kernel.template in ("gla_bwd_exact", "gla_combine"):
                continue
            with mock.patch.object(
                generate, "kernel_function", without_ladder if plain else KERNEL_FUNCTION
            ):
                built.append(compiler.compile_kernel(kernel, tools))
            made = built[-1]
            print(
                f"{name} {kernel.name}: {made.registers} registers, {made.spill_bytes} B spilled"
            )
        write_pack(folder / name, arch, built, [], tools)


class Nothing:
    """Stands in for the exact kernel."""

    def run(self, tensors: Sequence[Any], scalars: Sequence[Any], grid: int) -> None:
        pass


def call_of(row: TunedRow, kernels: Mapping[str, Any]) -> Callable[[], object]:
    """The pass of one row, on random inputs with ordinary gates."""
    import torch

    from glac.backward import run_backward
    from glac.forward import run_forward
    from glac.gate import GateInput
    from glac.plan import Plan
    from glac.testing import problem_inputs

    x = problem_inputs(row.problem, device="cuda")
    gate = GateInput((x.g,)) if x.g is not None else GateInput((x.x, x.weight, x.bias), 1 / 16)
    scale = row.spec.K**-0.5
    if isinstance(row.config, ForwardConfig):
        forward = Plan(row.problem, row.config, kernels)
        return lambda: run_forward(forward, x.q, x.k, x.v, gate, scale, None, False)
    assert isinstance(row.config, BackwardConfig)
    backward = Plan(row.problem, row.config, kernels)
    do = torch.randn_like(x.v)
    return lambda: run_backward(backward, x.q, x.k, x.v, gate, scale, None, do, None, dh0=False)


def run_both(gpu: str, folder: Path, rounds: int) -> list[dict[str, Any]]:
    import torch

    from glac.launch import load_from_pack

    arch = gpu_by_name(gpu).arch
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    packs = {name: read_pack(folder / name) for name in ("shipped", "plain")}
    results = []
    for row in rows_of(gpu):
        times: dict[str, list[float]] = {name: [] for name in packs}
        graphs, calls = {}, []
        for name, pack in packs.items():
            kernels: dict[str, Any] = {}
            for k in config_kernels(row.spec, row.config, arch):
                there = k.name in pack.kernels
                kernels[k.template] = load_from_pack(pack, k.name, 0) if there else Nothing()
            call = call_of(row, kernels)
            calls.append(call)  # a graph does not keep the memory of its inputs
            call()
            torch.cuda.synchronize()
            graphs[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[name]):
                call()
        for turn in range(rounds):
            for name in packs if turn % 2 else reversed(packs):
                flush.zero_()
                start, end = (
                    torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                    for _ in range(2)
                )
                start.record()
                graphs[name].replay()
                end.record()
                torch.cuda.synchronize()
                times[name].append(start.elapsed_time(end) * 1e3)
        us = {name: statistics.median(values) for name, values in times.items()}
        cost = us["shipped"] / us["plain"] - 1
        results.append({"op": row.op.value, "problem": str(row.problem), **us, "cost": cost})
        print(f"{row.op.value:9} {row.problem}: {us['shipped']:.1f} us, "
              f"{us['plain']:.1f} without, {100 * cost:+.1f} %")  # fmt: skip
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="what exactness costs ordinary gates")
    parser.add_argument("--gpu", default="h100", help="whose tuned rows")
    parser.add_argument("--compile", type=Path, metavar="DIR", help="compile both builds into DIR")
    parser.add_argument("--run", type=Path, metavar="DIR", help="time the builds in DIR")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, help="JSON file for the times")
    options = parser.parse_args()
    if options.compile is None and options.run is None:
        parser.error("wanted --compile DIR or --run DIR")
    if options.compile is not None:
        compile_both(options.gpu, options.compile)
    if options.run is not None:
        results = run_both(options.gpu, options.run, options.rounds)
        if options.out is not None:
            options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
