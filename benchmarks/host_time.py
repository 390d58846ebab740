"""What a call costs the host: calls per second on a problem that costs the GPU next to nothing.

    GLAC_PACK_PATH=... python benchmarks/host_time.py [-o results.json] [--fla]

Batches of calls are enqueued without waiting; the time of a batch over its calls is what the
host spends on each. The GPU is idle at the start of a batch and may finish behind its end.
"long way" is the same call past what ``glac.fast`` remembers: all checks and arguments anew.
"autograd alone" is a node with as many tensors that launches nothing.

The split of a training step, as a table on stderr and under "split" in the results, tells where
its time goes. "alone" is a part called in a loop of its own, "in the step" the same part timed
inside of training steps, with a clock that takes 0.1 us: there the processor's caches hold other
code, and the backward pass runs in a thread of autograd, so parts take up to twice as long. "until
the GPU is done" is a step with the wait at the end of a batch: if it is more than the step, the
GPU is what a step waits for, and the host's time is that of its queue.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from glac import autograd, driver, fast, preload, stats
from glac.attention import chunk_gla, chunk_gla_lowrank, recurrent_gla

CALLS, BATCHES = 100, 30


def host_us(call: Callable[[], Any], *, wait: bool = False) -> dict[str, float]:
    """Microseconds per call: median and best batch; with ``wait``, until the GPU is done."""
    for _ in range(20):
        call()
    times = []
    for _ in range(BATCHES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        if wait:
            torch.cuda.synchronize()
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


@contextlib.contextmanager
def _timed(owner: Any, name: str, label: Callable[..., str]) -> Iterator[dict[str, list[float]]]:
    """Microseconds of each call of a function, by what ``label`` makes of its arguments."""
    found: dict[str, list[float]] = {}
    inner, entry = getattr(owner, name), vars(owner)[name]

    def timed(*args: Any) -> Any:
        start = time.perf_counter_ns()
        try:
            return inner(*args)
        finally:
            spent = (time.perf_counter_ns() - start) / 1e3
            found.setdefault(label(*args), []).append(spent)

    setattr(owner, name, staticmethod(timed) if isinstance(entry, staticmethod) else timed)
    try:
        yield found
    finally:
        setattr(owner, name, entry)


def in_the_step(
    step: Callable[[], Any], owner: Any, name: str, label: Callable[..., str]
) -> dict[str, dict[str, float]]:
    """A function inside of steps: median, and the best tenth, whose worst this is."""
    with _timed(owner, name, label) as found:
        for _ in range(10):
            torch.cuda.synchronize()
            for _ in range(CALLS):
                step()
    torch.cuda.synchronize()
    return {
        what: {
            "median_us": round(statistics.median(times), 2),
            "best_us": round(sorted(times)[len(times) // 10], 2),
        }
        for what, times in found.items()
    }


def split_of_a_step(leaves: list[torch.Tensor], do: torch.Tensor) -> dict[str, dict[str, float]]:
    """Of ``o, _ = chunk_gla(q, k, v, g); o.backward(do)``, by name."""
    q, k, v, g = leaves

    def forward() -> torch.Tensor:
        return chunk_gla(q, k, v, g)[0]

    def forget() -> None:
        for t in leaves:
            t.grad = None

    def step() -> None:
        forward().backward(do)  # type: ignore[no-untyped-call]
        forget()

    for _ in range(3):
        step()
    with torch.no_grad():
        o = forward()
    ready = [t.detach().clone() for t in leaves]

    def node() -> torch.Tensor:
        made: torch.Tensor = _Nothing.apply(o, ready, *leaves)  # type: ignore[no-untyped-call]
        return made

    def nothing() -> None:
        node().backward(do)  # type: ignore[no-untyped-call]
        forget()

    rows = {
        "a step": host_us(step),
        "a step until the GPU is done": host_us(step, wait=True),
        "a node that does nothing": host_us(nothing),
        "its forward": host_us(node),
        "forward with a node": host_us(forward),
    }
    with torch.no_grad():
        rows["forward without"] = host_us(forward)

    # glac's part of a step, from the outside to the inside.
    def passes(call: fast.Bound, given: Any) -> str:
        return "forward" if len(given) == len(leaves) else "backward"

    places: list[tuple[Any, str, Callable[..., str]]] = [
        (autograd._Remembered, "backward", lambda *args: "node, backward"),
        (autograd._Remembered, "forward", lambda *args: "node, forward"),
        (autograd, "_attach", lambda *args: "node, made by PyTorch"),
        (fast, "recall", lambda *args: "finding the call"),
        (fast, "gradients", lambda *args: "finding, allocating and launching, backward"),
        (fast.Bound, "launch", lambda *args: f"allocating and launching, {passes(*args)}"),
        (driver.BoundLaunches, "run", lambda own, *args: f"{len(own.launches)} launches"),
        (fast, "_empty_like", lambda *args: "one allocation"),
    ]
    for owner, name, label in places:
        for what, row in in_the_step(step, owner, name, label).items():
            rows[f"{what}, in the step"] = row

    # The same parts alone.
    def find() -> fast.Bound:
        found = fast.recall("chunk_gla", (q, k, v, g), (q, k, v, g, None), (None,), False)[1]
        assert found is not None
        return found

    bound = find()
    backward = next(iter(bound.backward.values()))[1]
    with torch.no_grad():
        for call, given in ((bound, (q, k, v, g)), (backward, (q, k, v, g, do))):
            rows[f"allocating and launching, {passes(call, given)}, alone"] = host_us(
                lambda call=call, given=given: call.launch(given)  # type: ignore[misc]
            )
    pattern = torch.empty((), dtype=q.dtype, device=q.device).expand(q.shape)
    rows["one allocation, alone"] = host_us(lambda: torch.empty_like(pattern))
    rows["finding the call, alone"] = host_us(find)
    return rows


def print_split(rows: dict[str, dict[str, float]]) -> None:
    """As a table, for people."""
    width = max(map(len, rows))
    print(f"{'a training step, us':{width}}  median    best", file=sys.stderr)
    for name, row in rows.items():
        print(f"{name:{width}}  {row['median_us']:6.1f}  {row['best_us']:6.1f}", file=sys.stderr)


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
    split: dict[str, Any]
    try:
        split = split_of_a_step([q, k, v, g], do)
        print_split(split)
    except Exception as error:  # it looks inside of glac, and the rows above should not be lost
        split = {"error": f"{type(error).__name__}: {error}"}
        print(f"no split of a step: {split['error']}", file=sys.stderr)
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
        "split": split,
    }
    text = json.dumps(document, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
