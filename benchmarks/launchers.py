"""What it costs to import and use each way of launching a precompiled kernel.

    python benchmarks/launchers.py PACK [-o launchers.json]

Loads one small kernel of a pack with ctypes (what glac uses), cuda.bindings and cuda.core, and
reports import time (fresh process), load time, and host time per launch with arguments built anew
each time. Needs a GPU; libraries that are not installed are reported as such.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

IMPORTS = {
    "ctypes": "import ctypes; ctypes.CDLL('libcuda.so.1').cuInit(0)",
    "cuda.bindings": "import cuda.bindings.driver as d; d.cuInit(0)",
    "cuda.core": "import cuda.core",
    "triton": "import triton.runtime",
}
GRID = 1
COUNT = 1000


def import_ms(code: str) -> float | None:
    """Time of ``code`` in a fresh interpreter that has already imported torch."""
    script = (
        f"import torch, time; torch.zeros(1, device='cuda'); t = time.perf_counter(); {code}; "
        "print((time.perf_counter() - t) * 1e3)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    return round(float(done.stdout), 1) if done.returncode == 0 else None


def per_launch_us(launch: Callable[[], Any]) -> float:
    """Host microseconds per call, best of five batches. The kernel itself must be short."""
    import torch

    for _ in range(50):
        launch()
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(COUNT):
            launch()
        best = min(best, time.perf_counter() - start)
    torch.cuda.synchronize()
    return round(best / COUNT * 1e6, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack", type=Path)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout is enough
    import torch

    from glac.launch import load_from_pack
    from glac.pack import read_pack

    pack = read_pack(options.pack)
    name = next(n for n, k in pack.kernels.items() if k.kernel.template == "gla_combine")
    info = pack.kernels[name]
    states = torch.zeros(1 << 20, device="cuda")
    decay = torch.zeros(1 << 12, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    results: dict[str, dict[str, Any]] = {}

    start = time.perf_counter()
    kernel = load_from_pack(pack, name, 0)
    loaded = (time.perf_counter() - start) * 1e3
    tensors, scalars = (states, decay, None), (1, 0)
    results["ctypes"] = {
        "load_ms": round(loaded, 2),
        "launch_us": per_launch_us(lambda: kernel.run(tensors, scalars, GRID)),
    }

    cubin = pack.read_cubin(name)
    try:
        import ctypes

        from cuda.bindings import driver as cuda

        start = time.perf_counter()
        _, library = cuda.cuLibraryLoadData(cubin, [], [], 0, [], [], 0)
        _, handle = cuda.cuLibraryGetKernel(library, info.symbol.encode())
        _, function = cuda.cuKernelGetFunction(handle)
        loaded = (time.perf_counter() - start) * 1e3
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        kinds = (pointer, pointer, pointer, integer, integer, pointer, pointer)

        def with_bindings() -> None:
            values = (states.data_ptr(), decay.data_ptr(), 0, 1, 0, 0, 0)
            cuda.cuLaunchKernel(
                function, GRID, 1, 1, 32 * info.num_warps, 1, 1, info.shared, stream,
                (values, kinds), 0,
            )  # fmt: skip

        results["cuda.bindings"] = {
            "load_ms": round(loaded, 2),
            "launch_us": per_launch_us(with_bindings),
        }
    except Exception as error:
        results["cuda.bindings"] = {"error": f"{type(error).__name__}: {error}"}

    try:
        import numpy as np
        from cuda.core import Device, LaunchConfig, ObjectCode, launch

        device = Device(0)
        device.set_current()
        start = time.perf_counter()
        core = ObjectCode.from_cubin(cubin).get_kernel(info.symbol)
        loaded = (time.perf_counter() - start) * 1e3

        class Current:
            def __cuda_stream__(self) -> tuple[int, int]:
                return (0, stream)

        wrapped = device.create_stream(Current())
        config = LaunchConfig(grid=GRID, block=32 * info.num_warps, shmem_size=info.shared)

        def with_core() -> None:
            launch(
                wrapped, config, core, states.data_ptr(), decay.data_ptr(), 0,
                np.int32(1), np.int32(0), 0, 0,
            )  # fmt: skip

        results["cuda.core"] = {
            "load_ms": round(loaded, 2),
            "launch_us": per_launch_us(with_core),
        }
    except Exception as error:
        results["cuda.core"] = {"error": f"{type(error).__name__}: {error}"}

    for library_name, code in IMPORTS.items():
        results.setdefault(library_name, {})["import_ms"] = import_ms(code)
    results["torch.cuda.current_stream"] = {
        "launch_us": per_launch_us(lambda: torch.cuda.current_stream().cuda_stream)
    }
    results["raw stream"] = {
        "launch_us": per_launch_us(lambda: torch._C._cuda_getCurrentRawStream(0))
    }
    document = {"schema": 1, "gpu": torch.cuda.get_device_name(), "results": results}
    text = json.dumps(document, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
