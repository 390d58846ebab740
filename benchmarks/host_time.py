"""What a call costs the host: calls per second on a problem that costs the GPU next to nothing.

    GLAC_PACK_PATH=... python benchmarks/host_time.py [-o results.json] [--fla]

Batches of calls are enqueued without waiting; the time of a batch over its calls is what the
host spends on each. The GPU is idle at the start of a batch and may finish behind its end.
"long way" is the same call past what ``glac.fast`` remembers: all checks and arguments anew.
"autograd alone" is a node with as many tensors that launches nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from glac import preload, stats
from glac.attention import chunk_gla, chunk_gla_lowrank, recurrent_gla

CALLS, BATCHES = 100, 30


def host_us(call: Callable[[], Any]) -> dict[str, float]:
    """Microseconds per call: median and best batch."""
    for _ in range(20):
        call()
    times = []
    for _ in range(BATCHES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    torch.cuda.synchronize()
    return {"median_us": round(statistics.median(times), 2), "best_us": round(min(times), 2)}


class _Nothing(torch.autograd.Function):
    """A node like glac's that computes nothing: what is left is PyTorch's own time."""

    @staticmethod
    def forward(ctx: Any, o: torch.Tensor, ready: list[torch.Tensor], *tensors: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.ready = ready
        return o.detach()

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor) -> Any:
        assert ctx.saved_tensors
        return None, None, *ctx.ready


def main() -> None:
    parser = argparse.ArgumentParser(description="host time per call")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--fla", action="store_true", help="flash-linear-attention beside it")
    parser.add_argument(
        "--sizes", type=int, nargs=5, default=(1, 16, 2, 64, 64), metavar=tuple("BTHKV")
    )
    options = parser.parse_args()
    B, T, H, K, V = options.sizes

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(torch.bfloat16)

    q, k, v, g = draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V), -draw(B, T, H, K).abs()
    x, w, bias = draw(B, T, 16), draw(H * K, 16), draw(H * K)
    state, do = torch.randn(B, H, K, V, device="cuda"), draw(B, T, H, V)
    results: dict[str, Any] = {}

    start = time.perf_counter()
    loaded = preload()
    results["preload"] = {
        "ms": round((time.perf_counter() - start) * 1e3, 1),
        "rows": len(loaded),
        "kernels": stats().loaded,
    }

    dense = lambda: chunk_gla(q, k, v, g)  # noqa: E731
    both = lambda: chunk_gla(q, k, v, g, initial_state=state, output_final_state=True)  # noqa: E731
    lowrank = lambda: chunk_gla_lowrank(q, k, v, x, w, bias)  # noqa: E731
    with torch.no_grad():
        results["forward"] = host_us(dense)
        results["forward with states"] = host_us(both)
        results["forward, low-rank gate"] = host_us(lowrank)
        token = [t[:, :1].contiguous() for t in (q, k, v, g)]
        results["decoding in place"] = host_us(
            lambda: recurrent_gla(*token, initial_state=state, inplace=True)
        )
        slots = torch.zeros(B, dtype=torch.int64, device="cuda")
        results["decoding in a pool"] = host_us(
            lambda: recurrent_gla(*token, initial_state=state, state_indices=slots, inplace=True)
        )
        # Any option that the short way does not take; chunk_size changes nothing for kernels.
        results["forward, long way"] = host_us(lambda: chunk_gla(q, k, v, g, chunk_size=64))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            dense()
        results["replay of a CUDA graph"] = host_us(graph.replay)

    def training(call: Callable[[], Any], leaves: list[torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(call()[0], leaves, do)

    o = dense()[0]
    ready = [t.clone() for t in (q, k, v, g)]
    for t in (q, k, v, g, x, w, bias):
        t.requires_grad_()
    results["forward and backward"] = host_us(training(dense, [q, k, v, g]))
    results["forward and backward, low-rank gate"] = host_us(
        training(lowrank, [q, k, v, x, w, bias])
    )
    results["autograd alone"] = host_us(
        lambda: torch.autograd.grad(_Nothing.apply(o, ready, q, k, v, g), [q, k, v, g], do)
    )
    long = lambda: chunk_gla(q, k, v, g, chunk_size=64)  # noqa: E731
    results["forward and backward, long way"] = host_us(training(long, [q, k, v, g]))
    if options.fla:
        from fla.ops.gla import chunk_gla as fla_chunk_gla

        theirs = lambda: fla_chunk_gla(q, k, v, g)  # noqa: E731
        with torch.no_grad():
            results["fla, forward"] = host_us(theirs)
        results["fla, forward and backward"] = host_us(training(theirs, [q, k, v, g]))

    document = {
        "schema": 1,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "sizes": dict(zip("BTHKV", options.sizes, strict=True)),
        "results": results,
    }
    text = json.dumps(document, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
