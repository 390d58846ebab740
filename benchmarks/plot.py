"""Draw a results file of ``glac bench``.

    python benchmarks/plot.py benchmarks/results/h200.json -o benchmarks/results/h200.png

Bars per problem: forward time over the memory floor (every input read once, the output written
once, at the copy bandwidth of the same run), or in microseconds with ``--metric us``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Okabe and Ito's palette: told apart with any colour vision, and in grey by their order.
STYLES: dict[str, tuple[str, str]] = {
    "glac": ("glac", "#0072B2"),
    "fla": ("flash-linear-attention", "#E69F00"),
    "helion": ("Helion", "#CC79A7"),
    "fa2": ("FlashAttention-2 (softmax, same width)", "#999999"),
    "cudnn": ("cuDNN attention (softmax, same width)", "#56B4E9"),
}
FLOOR_COLOUR = "#D55E00"


class Series(NamedTuple):
    """One implementation: its bar per group, None where it has no time."""

    label: str
    colour: str
    values: tuple[float | None, ...]


class PlotData(NamedTuple):
    """Everything that is drawn."""

    title: str
    subtitle: str
    ylabel: str
    groups: tuple[str, ...]
    series: tuple[Series, ...]
    floors: tuple[float, ...]
    decimals: int


class ResultsError(Exception):
    """The file is not one that can be drawn."""


def _group(row: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("B", "T", "H", "K", "V", "dtype", "gate", "gate_rank", "gate_dtype")
    return tuple(row[name] for name in names)


def _gate(row: Mapping[str, Any]) -> str:
    if row["gate"] == "lowrank":
        return f"low-rank gate, R = {row['gate_rank']}"
    wide = f" in {row['gate_dtype']}" if row["gate_dtype"] != row["dtype"] else ""
    return f"{row['gate']} gate{wide}"


def plot_data(document: Mapping[str, Any], metric: str = "floor", op: str = "fwd") -> PlotData:
    """What to draw of a results file.

    Args:
        document: the parsed file.
        metric: ``"floor"`` for time over the memory floor, ``"us"`` for microseconds.
        op: which rows.

    Raises:
        ResultsError: another schema, or no row with a time.
    """
    if document.get("schema") != 1:
        raise ResultsError(f"schema must be 1, got {document.get('schema')!r}")
    rows = [r for r in document["rows"] if r["op"] == op and r["us"] and r["floor_us"]]
    if not rows:
        raise ResultsError(f"no row of op {op!r} has a time")
    groups: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    times: dict[tuple[tuple[Any, ...], str], float] = {}
    for row in rows:
        key = _group(row)
        groups.setdefault(key, row)
        times[key, row["impl"]] = row["us"] / (row["floor_us"] if metric == "floor" else 1.0)
    series = []
    for impl, (label, colour) in STYLES.items():
        values = tuple(times.get((key, impl)) for key in groups)
        if any(value is not None for value in values):
            series.append(Series(label, colour, values))
    labels = tuple(
        f"B {r['B']}, T {r['T']}, H {r['H']}\nK {r['K']}, V {r['V']}\n{_gate(r)}"
        for r in groups.values()
    )
    env = document["env"]
    dtypes = "/".join(dict.fromkeys(r["dtype"] for r in rows))
    name = {"fwd": "forward", "bwd": "backward", "fwdbwd": "forward + backward"}.get(op, op)
    versions = [f"{n} {env[n]}" for n in ("glac", "fla", "torch", "triton") if env.get(n)]
    date = str(env.get("date") or rows[0]["date"])[:10]
    bandwidth = float(env["copy_bandwidth"]) / 1e12
    return PlotData(
        title=f"Gated linear attention, {name}: {env['gpu']}, {dtypes}, {date}",
        subtitle=", ".join([*versions, f"floor at {bandwidth:.2f} TB/s measured"]),
        ylabel="time / memory floor" if metric == "floor" else "time, us",
        groups=labels,
        series=tuple(series),
        floors=tuple(1.0 if metric == "floor" else r["floor_us"] for r in groups.values()),
        decimals=1 if metric == "floor" else 0,
    )


def draw(data: PlotData, out: Path) -> None:
    """Write the plot; the suffix of ``out`` decides the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(data.series)
    width = 0.84 / count
    figure, axes = pyplot.subplots(figsize=(max(7.0, 1.2 + 1.85 * len(data.groups)), 5.2), dpi=150)
    for i, series in enumerate(data.series):
        shift = (i - (count - 1) / 2) * width
        bars = [(x + shift, v) for x, v in enumerate(series.values) if v is not None]
        axes.bar(
            [x for x, _ in bars],
            [v for _, v in bars],
            width * 0.94,
            color=series.colour,
            label=series.label,
            zorder=2,
        )
        for group, missing in enumerate(series.values):
            if missing is None:
                axes.annotate(
                    "no time",
                    (group + shift, 0),
                    xytext=(0, 14),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    rotation=90,
                    fontsize=7.5,
                    color="#666666",
                )
        for x, value in bars:
            axes.annotate(
                f"{value:.{data.decimals}f}",
                (x, value),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7.5,
            )
    for group, floor in enumerate(data.floors):
        axes.plot(
            [group - 0.46, group + 0.46],
            [floor, floor],
            color=FLOOR_COLOUR,
            linewidth=1.8,
            linestyle=(0, (4, 2)),
            zorder=3,
            label="memory floor" if group == 0 else None,
        )
    axes.set_xticks(range(len(data.groups)), data.groups, fontsize=8)
    axes.set_xlim(-0.6, len(data.groups) - 0.4)
    axes.set_ylabel(data.ylabel)
    axes.margins(y=0.08)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="x", length=0)
    figure.text(0.01, 0.955, data.title, fontsize=12, ha="left")
    figure.text(0.01, 0.915, data.subtitle, fontsize=8.5, color="#444444", ha="left")
    columns = min(count + 1, 3)
    lines = -(-(count + 1) // columns)
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(0.0, 0.91),
        ncols=columns,
        frameon=False,
        fontsize=8.5,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.905 - 0.042 * lines))
    figure.savefig(out)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw a results file of `glac bench`.")
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    parser.add_argument("-o", "--out", type=Path, help="default: beside the results, as .png")
    parser.add_argument("--metric", choices=("floor", "us"), default="floor")
    parser.add_argument("--op", default="fwd")
    options = parser.parse_args(argv)
    try:
        document = json.loads(options.results.read_text(encoding="utf-8"))
        data = plot_data(document, options.metric, options.op)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ResultsError) as error:
        print(f"{options.results} cannot be drawn: {error}", file=sys.stderr)
        return 1
    out = options.out or options.results.with_suffix(".png")
    try:
        draw(data, out)
    except ModuleNotFoundError as error:
        print(f"{error}: pip install 'glac[bench]'", file=sys.stderr)
        return 3
    print(out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
