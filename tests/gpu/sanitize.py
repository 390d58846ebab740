"""Small cases through the kernels of every row of the packs, for NVIDIA's compute-sanitizer.

    export GLAC_PACK_PATH=packs:testpack PYTORCH_NO_CUDA_MEMORY_CACHING=1
    run="compute-sanitizer --error-exitcode 9"
    $run --tool memcheck --report-api-errors no python tests/gpu/sanitize.py
    $run --tool racecheck --print-level error python tests/gpu/sanitize.py
    $run --tool racecheck python tests/gpu/sanitize.py --copies pointers
    $run --tool initcheck python tests/gpu/sanitize.py --copies pointers

``testpack`` is what ``make_pack.py`` builds: rows whose kernels copy through pointers. Three
things are not faults of a kernel. Loading a kernel asks the driver for parameters until there are
no more, which memcheck counts as a failed call. racecheck warns of every mbarrier of descriptor
copies, which a thread sets up and then arrives at itself (SYNCS.EXCH and SYNCS.ARRIVE in the
machine code). initcheck does not see what descriptor copies and descriptors themselves write.

Without the variable PyTorch hands out parts of large blocks, in which the tools see neither what
is out of bounds nor what was never written. Inputs are drawn and results checked on the CPU: on
the device run the kernels, and the sums over tiles that ``run_backward`` makes. Each row runs
once over two heads, of which one keeps to mild gates, with a tail that fills no chunk; a backward
row once more in windows of one chunk.

Prints each row and how many cases ran. Exit code 0: all right; 1: a result is wrong; 2: no GPU, or
no row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description="small cases for compute-sanitizer")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument(
        "--copies",
        choices=("all", "pointers", "descriptors"),
        default="all",
        help="rows whose main kernel loads and stores so",
    )
    parser.add_argument("--limit", type=int, help="run no more than so many rows of each op")
    options = parser.parse_args()

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import torch

    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 2

    from glac.configs import ForwardConfig
    from glac.pack import Pack, PackRow
    from glac.problem import Op
    from glac.testing import Inputs
    from tests.gpu import rows
    from tests.helpers_gradients import ends_of

    device = torch.device("cuda", 0)

    def on_device(x: Inputs) -> Inputs:
        return replace(x, **{n: t.to(device) for n, t in vars(x).items() if t is not None})

    def case(row: PackRow, tokens: int) -> Inputs:
        """Of two sequences of one head, the second with hard gates; on the CPU."""
        return rows.partly_hard(rows.row_inputs(row, 2, tokens, 1, torch.device("cpu")))

    def run_forward(pack: Pack, row: PackRow) -> list[str]:
        assert isinstance(row.config, ForwardConfig)
        chunk, segment = row.config.fwd.chunk, row.config.segment
        x = case(row, (segment or chunk) + chunk + 5)
        got = rows.run_forward_row(pack, row, on_device(x))
        results = {n: t.cpu() for n, t in got.items()}
        return [rows.why_wrong(x, results, x.v, precision=row.spec.precision)]

    def run_backward(pack: Pack, row: PackRow) -> list[str]:
        x = case(row, 2 * rows.backward_chunk(row.config) + 5)
        do, dht = ends_of(x)
        tensors = (on_device(x), do.to(device), dht.to(device))
        whole = rows.run_backward_row(pack, row, *tensors)
        with rows.windows_of(1):
            pieces = rows.run_backward_row(pack, row, *tensors)
        results = ({n: t.cpu() for n, t in grads.items()} for grads in (whole, pieces))
        precision = row.spec.precision
        return [rows.why_wrong(x, grads, do, dht, precision=precision) for grads in results]

    def wanted(row: PackRow) -> bool:
        main_kernel = row.config.kernels()[row.config.main]
        copies = "descriptors" if getattr(main_kernel, "tma", False) else "pointers"
        return options.copies in ("all", copies) and options.only in name_of(row)

    def name_of(row: PackRow) -> str:
        return f"{row.op.value} {row.spec.slug} {row.config.slug}"

    runs: dict[Op, Callable[[Pack, PackRow], list[str]]] = {
        Op.FORWARD: run_forward,
        Op.BACKWARD: run_backward,
    }
    count = wrong = 0
    for op, run in runs.items():
        found = [(pack, row) for pack, row in rows.rows_here(op, device.index) if wanted(row)]
        for pack, row in found[: options.limit]:
            reasons = run(pack, row)
            count += len(reasons)
            bad = [reason for reason in reasons if reason]
            wrong += len(bad)
            print(f"{name_of(row)}: {'; '.join(bad) or 'right'}", flush=True)
    print(f"{count} cases ran, {wrong} wrong")
    if not count:
        print("no row: set GLAC_PACK_PATH (tests/gpu/README.md)", file=sys.stderr)
        return 2
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
