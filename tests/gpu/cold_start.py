"""Time to the first output in a new process that has a pack, and neither Triton nor a PATH.

Measured: importing glac, finding and reading the pack, loading the kernels, one call, one
synchronise. Before that: torch imported, inputs on the GPU, one synchronise. With ``--backward``
the first backward pass too; its kernels are loaded in a thread of autograd. There PyTorch's own
first backward pass comes before the clock starts: it imports 500 modules (sympy among them) when
it is first given gradients, 300 to 700 ms that every process with a backward pass pays.

    GLAC_PACK_PATH=... python tests/gpu/cold_start.py [--lowrank] [--backward] [--sizes B T H K V]

Prints one JSON object. Exit code 1: no pack served a call.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description="time to the first output in a new process")
    parser.add_argument("--lowrank", action="store_true", help="with the gate in the kernel")
    parser.add_argument("--backward", action="store_true", help="the first backward pass too")
    parser.add_argument(
        "--sizes", type=int, nargs=5, default=(1, 1024, 8, 128, 128), metavar=tuple("BTHKV")
    )
    options = parser.parse_args()
    B, T, H, K, V = options.sizes

    os.environ["PATH"] = ""
    sys.modules["triton"] = None  # type: ignore[assignment]  # to imports it does not exist
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import torch

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(torch.bfloat16)

    q, k, v = draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V)
    if options.lowrank:
        gate = [draw(B, T, 16), draw(H * K, 16), draw(H * K)]
    else:
        gate = [-draw(B, T, H, K).abs() / 16]
    leaves = [t.requires_grad_(options.backward) for t in (q, k, v, *gate)]
    do = draw(B, T, H, V)
    if options.backward:
        torch.autograd.grad(2 * v, [v], do)
    torch.cuda.synchronize()

    start = time.perf_counter()
    from glac import attention

    imported = time.perf_counter()
    if options.lowrank:
        o, _ = attention.chunk_gla_lowrank(q, k, v, gate[0], gate[1], gate[2])
    else:
        o, _ = attention.chunk_gla(q, k, v, gate[0])
    torch.cuda.synchronize()
    done = time.perf_counter()
    grads: tuple[torch.Tensor, ...] = ()
    if options.backward:
        grads = torch.autograd.grad(o, leaves, do)
        torch.cuda.synchronize()
    ended = time.perf_counter()

    from glac import dispatch
    from glac.problem import Op
    from glac.validate import check_lowrank, check_vector

    if options.lowrank:
        problem = check_lowrank(q, k, v, gate[0], gate[1], gate[2], None)
    else:
        problem = check_vector(q, k, v, gate[0], None)
    decisions = [dispatch.explain(problem, q.device)]
    if options.backward:
        decisions.append(dispatch.explain(problem, q.device, Op.BACKWARD))
    decision = decisions[-1]
    result = {
        "ms": round(1e3 * (done - start), 2),
        "backward_ms": round(1e3 * (ended - start), 2) if options.backward else None,
        "import_ms": round(1e3 * (imported - start), 2),
        "provider": decision.provider,
        "compiled": dispatch.stats().compiled,
        "config": decision.config_id,
        "problem": str(problem),
        "finite": all(bool(t.isfinite().all()) for t in (o, *grads)),
        "triton_loaded": sys.modules["triton"] is not None,
    }
    print(json.dumps(result))
    if any(d.provider != "pack" for d in decisions):
        print(f"no pack: {decision.reason}; {'; '.join(decision.tried)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
