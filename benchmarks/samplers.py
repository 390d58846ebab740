"""How many timed configs does a sampler need? Replayed on exhaustive tables, no GPU.

    cd benchmarks/results
    python ../samplers.py h200_forward_study.csv h200_backward_study.csv -o samplers.json
    python ../samplers.py --plot samplers.json

Each run starts from the default config and ends after 60 timed configs or at the optimum. "cold"
runs know nothing else; "warm" ones start as `glac tune` does: winners of the *other* tables of the
same op, and the favourites of the roofline and of the rules of thumb. Counted is the number of
timed configs until the best is within 2 % of the table's optimum. Repeats are never timed, so
random means random without repetition.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glac.atomic import write_text
from glac.gpus import GPUS
from glac.tuning.propose import SAMPLERS, Proposer, one_thread
from glac.tuning.replay import Table, load_table
from glac.tuning.space import Space
from glac.tuning.study import import_optuna
from glac.tuning.warm import Winner, warmed

BUDGET, SEEDS, NEAR = 60, 10, 1.02
LABELS = {
    "gp": "Gaussian process",
    "tpe": "TPE, multivariate (Optuna 5's default)",
    "tpe-independent": "TPE, independent (default before)",
    "random": "random",
}
# Okabe and Ito's palette, as in plot.py.
COLOURS = {"gp": "#0072B2", "tpe": "#E69F00", "tpe-independent": "#009E73", "random": "#999999"}


def run(
    optuna: Any, space: Space, times: Mapping[Any, Any], sampler: str, seed: int, warm: bool
) -> tuple[list[float], float]:
    """Best so far over the optimum after each timed config, and seconds spent in the sampler."""
    best = min(o.us for o in times.values() if o.us)
    starts = list(space.configs[: space.warm]) if warm else [space.default]
    proposer = Proposer(optuna, space, sampler, seed)
    outcomes: dict[Any, Any] = {}
    curve: list[float] = []
    seconds = 0.0
    while len(curve) < min(BUDGET, len(space.configs)):
        started = time.perf_counter()
        config = starts.pop(0) if starts else proposer.next(outcomes)
        seconds += time.perf_counter() - started
        assert config is not None
        outcomes[config] = times[config]
        ratio = (times[config].us or float("inf")) / best
        curve.append(min(ratio, curve[-1]) if curve else ratio)
        if curve[-1] == 1.0:
            break
    return curve, seconds


def spaces_of(table: Table, gpu_name: str, seed: int) -> list[tuple[Space, Space]]:
    """Each problem's space as it is, and with its warm starts from the other tables."""
    gpu = GPUS[gpu_name]
    plain = table.spaces(gpu)
    found = []
    for space in plain:
        known = [
            Winner(o.problem, min(rows, key=lambda c: rows[c].us or float("inf")))
            for o in plain
            if o.problem != space.problem
            for rows in [table.outcomes[o.problem, o.op]]
        ]
        found.append((space, warmed(space, gpu, known, add=False)))
    return found


def measure(tables: Sequence[Path], gpu: str, seeds: int) -> dict[str, Any]:
    optuna = import_optuna()
    rows = []
    for path in tables:
        table = load_table(path)
        for plain, warm in spaces_of(table, gpu, 0):
            times = table.outcomes[plain.problem, plain.op]
            for mode, space in (("cold", replace(plain, warm=1)), ("warm", warm)):
                for sampler in SAMPLERS:
                    for seed in range(seeds):
                        with one_thread():
                            curve, seconds = run(
                                optuna, space, times, sampler, seed, mode == "warm"
                            )
                        near = next((i + 1 for i, r in enumerate(curve) if r <= NEAR), None)
                        rows.append(
                            {
                                "table": path.name,
                                "problem": str(plain),
                                "configs": len(plain.configs),
                                "mode": mode,
                                "sampler": sampler,
                                "seed": seed,
                                "near_after": near,
                                "curve": [round(r, 4) for r in curve],
                                "seconds": round(seconds, 3),
                            }
                        )
                print(plain, mode, *_medians(rows, str(plain), mode), file=sys.stderr, flush=True)
    return {
        "schema": 1,
        "command": "python benchmarks/samplers.py " + " ".join(map(str, tables)),
        "optuna": optuna.__version__,
        "budget": BUDGET,
        "near": NEAR,
        "rows": rows,
    }


def _medians(rows: Sequence[Mapping[str, Any]], problem: str, mode: str) -> list[str]:
    texts = []
    for sampler in SAMPLERS:
        counts = [
            row["near_after"] or BUDGET + 1
            for row in rows
            if (row["problem"], row["mode"], row["sampler"]) == (problem, mode, sampler)
        ]
        texts.append(f"{sampler}={statistics.median(counts):g}")
    return texts


def summary(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each mode and sampler: runs that came near, and after how many configs."""
    found = []
    for mode in ("cold", "warm"):
        for sampler in SAMPLERS:
            rows = [r for r in document["rows"] if r["mode"] == mode and r["sampler"] == sampler]
            counts = sorted(r["near_after"] or BUDGET + 1 for r in rows)
            by_table: dict[str, list[int]] = {}
            for row in rows:
                near = int(row["near_after"] is not None)
                by_table.setdefault(row["problem"], []).append(near)
            timed = sum(len(r["curve"]) for r in rows)
            found.append(
                {
                    "mode": mode,
                    "sampler": sampler,
                    "runs": len(rows),
                    "near": sum(c <= BUDGET for c in counts) / len(counts),
                    "worst_table": min(statistics.mean(v) for v in by_table.values()),
                    "median": statistics.median(counts),
                    "p90": counts[max(0, -(-9 * len(counts) // 10) - 1)],
                    "ms_a_proposal": 1e3 * sum(r["seconds"] for r in rows) / timed,
                }
            )
    return found


def table_text(document: Mapping[str, Any]) -> str:
    head = (
        f"{'start':6} {'sampler':16} {'near':>6} {'worst':>6} {'median':>6} {'90 %':>5} {'ms':>6}"
    )
    lines = [head]
    for row in summary(document):
        p90 = str(row["p90"]) if row["p90"] <= BUDGET else f">{BUDGET}"
        lines.append(
            f"{row['mode']:6} {row['sampler']:16} {row['near']:6.1%} {row['worst_table']:6.0%} "
            f"{row['median']:6g} {p90:>5} {row['ms_a_proposal']:6.1f}"
        )
    return "\n".join(lines)


def plot(document: Mapping[str, Any], out: Path) -> None:
    """Share of runs within 2 % of the optimum against the number of timed configs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    titles = {
        "cold": "from the default config alone",
        "warm": "as glac tune starts: other problems' winners, roofline, rules",
    }
    for axis, mode in zip(axes, titles, strict=True):
        for sampler in SAMPLERS:
            near = [
                r["near_after"] or BUDGET + 1
                for r in document["rows"]
                if r["mode"] == mode and r["sampler"] == sampler
            ]
            share = [100 * sum(n <= i for n in near) / len(near) for i in range(BUDGET + 1)]
            axis.step(
                range(BUDGET + 1),
                share,
                where="post",
                color=COLOURS[sampler],
                label=LABELS[sampler],
                linewidth=2,
            )
        axis.axhline(90, color="#444444", linewidth=0.8, linestyle=":")
        axis.text(1, 90.8, "9 runs of 10", ha="left", va="bottom", fontsize=8)
        axis.set_title(titles[mode], fontsize=10)
        axis.set_xlabel("timed configs")
        axis.set_xlim(0, BUDGET)
        axis.set_ylim(0, 102)
        axis.grid(alpha=0.25)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("runs within 2 % of the optimum, %")
    axes[1].legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1.0, 0.05))
    problems = len({r["problem"] for r in document["rows"]})
    seeds = len({r["seed"] for r in document["rows"]})
    figure.suptitle(
        f"Samplers on {problems} exhaustive tables from an H200, {seeds} seeds each", fontsize=12
    )
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("samplers.json"))
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h200")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--plot", type=Path, help="draw this results file")
    options = parser.parse_args()
    if options.plot:
        document = json.loads(options.plot.read_text())
        out = options.plot.with_suffix(".png")
        plot(document, out)
        print(table_text(document))
        print(out)
        return
    if not options.tables:
        parser.error("no table")
    document = measure(options.tables, options.gpu, options.seeds)
    write_text(options.out, json.dumps(document) + "\n")
    print(table_text(document))


if __name__ == "__main__":
    main()
