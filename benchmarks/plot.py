"""Draw a results file of ``glac bench``.

    python benchmarks/plot.py benchmarks/results/h200.json -o benchmarks/results/h200.png

One panel for each op that has times, forward above training. Bars per problem: time over the
memory floor (what each pass reads and writes, once, at the copy bandwidth of the same run), or in
microseconds with ``--metric us``.
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


SCHEMA = 2
OPS = {"forward": "forward", "training": "training: forward and backward"}


class Series(NamedTuple):
    """One implementation: its bar per group, None where it has no time."""

    label: str
    colour: str
    values: tuple[float | None, ...]


class Panel(NamedTuple):
    """One op. Panels of a plot have the same implementations in the same order."""

    title: str
    groups: tuple[str, ...]
    series: tuple[Series, ...]
    floors: tuple[float, ...]


class PlotData(NamedTuple):
    """Everything that is drawn."""

    title: str
    subtitle: str
    ylabel: str
    panels: tuple[Panel, ...]
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


def _panel(op: str, rows: Sequence[Mapping[str, Any]], impls: Sequence[str], metric: str) -> Panel:
    groups: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    times: dict[tuple[tuple[Any, ...], str], float] = {}
    for row in rows:
        key = _group(row)
        groups.setdefault(key, row)
        times[key, row["impl"]] = row["us"] / (row["floor_us"] if metric == "floor" else 1.0)
    labels = (
        f"B {r['B']}, T {r['T']}, H {r['H']}\nK {r['K']}, V {r['V']}\n{_gate(r)}"
        for r in groups.values()
    )
    return Panel(
        title=OPS[op],
        groups=tuple(labels),
        series=tuple(
            Series(*STYLES[impl], tuple(times.get((key, impl)) for key in groups))
            for impl in impls
        ),
        floors=tuple(1.0 if metric == "floor" else r["floor_us"] for r in groups.values()),
    )


def plot_data(
    document: Mapping[str, Any], metric: str = "floor", ops: Sequence[str] = tuple(OPS)
) -> PlotData:
    """What to draw of a results file.

    Args:
        document: the parsed file.
        metric: ``"floor"`` for time over the memory floor, ``"us"`` for microseconds.
        ops: which rows; an op without a time gets no panel.

    Raises:
        ResultsError: another schema, or no row with a time.
    """
    if document.get("schema") != SCHEMA:
        raise ResultsError(f"schema must be {SCHEMA}, got {document.get('schema')!r}")
    timed = [r for r in document["rows"] if r["op"] in ops and r["us"] and r["floor_us"]]
    if not timed:
        raise ResultsError(f"no row of {' or '.join(ops)} has a time")
    present = {r["impl"] for r in timed}
    impls = [impl for impl in STYLES if impl in present]
    by_op = {op: [r for r in timed if r["op"] == op] for op in ops}
    env = document["env"]
    dtypes = "/".join(dict.fromkeys(r["dtype"] for r in timed))
    versions = [f"{n} {env[n]}" for n in ("glac", "fla", "torch", "triton") if env.get(n)]
    date = str(env.get("date") or timed[0]["date"])[:10]
    bandwidth = float(env["copy_bandwidth"]) / 1e12
    return PlotData(
        title=f"Gated linear attention: {env['gpu']}, {dtypes}, {date}",
        subtitle=", ".join([*versions, f"floor at {bandwidth:.2f} TB/s measured"]),
        ylabel="time / memory floor" if metric == "floor" else "time, us",
        panels=tuple(_panel(op, rows, impls, metric) for op, rows in by_op.items() if rows),
        decimals=1 if metric == "floor" else 0,
    )


def _draw_panel(axes: Any, panel: Panel, decimals: int) -> None:
    count = len(panel.series)
    width = 0.84 / count
    for i, series in enumerate(panel.series):
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
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                    zorder=4,
                )
        for x, value in bars:
            axes.annotate(
                f"{value:.{decimals}f}",
                (x, value),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7.5,
            )
    for group, floor in enumerate(panel.floors):
        axes.plot(
            [group - 0.46, group + 0.46],
            [floor, floor],
            color=FLOOR_COLOUR,
            linewidth=1.8,
            linestyle=(0, (4, 2)),
            zorder=3,
            label="memory floor" if group == 0 else None,
        )
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xticks(range(len(panel.groups)), panel.groups, fontsize=8)
    axes.set_xlim(-0.6, len(panel.groups) - 0.4)
    axes.margins(y=0.08)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="x", length=0)


def draw(data: PlotData, out: Path) -> None:
    """Write the plot; the suffix of ``out`` decides the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = len(data.panels[0].series) + 1  # and the floor
    columns = min(entries, 3)
    lines = -(-entries // columns)
    head = 0.5 + 0.22 * lines  # inches: title, subtitle, legend
    groups = max(len(panel.groups) for panel in data.panels)
    height = head + 4.2 * len(data.panels)
    figure, axes = pyplot.subplots(
        len(data.panels),
        squeeze=False,
        figsize=(max(7.0, 1.2 + 1.85 * groups), height),
        dpi=150,
    )
    for panel_axes, panel in zip(axes[:, 0], data.panels, strict=True):
        _draw_panel(panel_axes, panel, data.decimals)
        panel_axes.set_ylabel(data.ylabel)
    figure.text(0.01, 1 - 0.24 / height, data.title, fontsize=12, ha="left")
    figure.text(0.01, 1 - 0.45 / height, data.subtitle, fontsize=8.5, color="#444444", ha="left")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - 0.47 / height),
        ncols=columns,
        frameon=False,
        fontsize=8.5,
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - head / height))
    figure.savefig(out)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw a results file of `glac bench`.")
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    parser.add_argument("-o", "--out", type=Path, help="default: beside the results, as .png")
    parser.add_argument("--metric", choices=("floor", "us"), default="floor")
    parser.add_argument("--op", choices=(*OPS, "both"), default="both")
    options = parser.parse_args(argv)
    try:
        document = json.loads(options.results.read_text(encoding="utf-8"))
        ops = tuple(OPS) if options.op == "both" else (options.op,)
        data = plot_data(document, options.metric, ops)
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
