"""Draw a results file of ``glac bench``.

    python benchmarks/plot.py benchmarks/results/h200.json -o benchmarks/results/h200.png

One panel for each op that has times, forward before training. Time over the memory floor (what
each pass reads and writes, once, at the copy bandwidth of the same run), or in microseconds with
``--metric us``. Up to eight problems become groups of bars; more of them become lines of a dot
plot on a logarithmic axis, where ten and twenty stay readable and a rival that is far off does
not squeeze the others. With ``--against T`` times are lines over the length, one for each
implementation and size, as the suite ``lengths`` is meant to be seen.
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
    "glac-dense": ("glac, low-rank gate computed first", "#009E73"),
    "fla": ("flash-linear-attention", "#E69F00"),
    "helion": ("Helion", "#CC79A7"),
    "fa2": ("FlashAttention-2 (softmax, same width)", "#999999"),
    "cudnn": ("cuDNN attention (softmax, same width)", "#56B4E9"),
}
FLOOR_COLOUR = "#D55E00"
MARKERS = {"glac": "o", "glac-dense": "P", "fla": "s", "helion": "v", "fa2": "D", "cudnn": "^"}
DASHES = ("-", "--", ":", "-.")

SCHEMA = 2
MOST_BARS = 8
"""Groups of bars that fit side by side with their labels."""
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
    """Everything that is drawn as bars or dots."""

    title: str
    subtitle: str
    ylabel: str
    panels: tuple[Panel, ...]
    decimals: int


class Line(NamedTuple):
    """One implementation at one size: times by length, the shortest first."""

    label: str
    colour: str
    dash: str
    lengths: tuple[int, ...]
    values: tuple[float, ...]


class LinePanel(NamedTuple):
    """One op over the length."""

    title: str
    lines: tuple[Line, ...]


class LineData(NamedTuple):
    """Everything that is drawn over the length."""

    title: str
    subtitle: str
    ylabel: str
    panels: tuple[LinePanel, ...]


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


class _Head(NamedTuple):
    rows: list[Mapping[str, Any]]
    impls: list[str]
    title: str
    subtitle: str


def _head(document: Mapping[str, Any], ops: Sequence[str]) -> _Head:
    """The rows that have a time, and what the titles say."""
    if document.get("schema") != SCHEMA:
        raise ResultsError(f"schema must be {SCHEMA}, got {document.get('schema')!r}")
    timed = [r for r in document["rows"] if r["op"] in ops and r["us"] and r["floor_us"]]
    if not timed:
        raise ResultsError(f"no row of {' or '.join(ops)} has a time")
    present = {r["impl"] for r in timed}
    env = document["env"]
    dtypes = "/".join(dict.fromkeys(r["dtype"] for r in timed))
    versions = [f"{n} {env[n]}" for n in ("glac", "fla", "torch", "triton") if env.get(n)]
    date = str(env.get("date") or timed[0]["date"])[:10]
    bandwidth = float(env["copy_bandwidth"]) / 1e12
    return _Head(
        timed,
        [impl for impl in STYLES if impl in present],
        f"Gated linear attention: {env['gpu']}, {dtypes}, {date}",
        ", ".join([*versions, f"floor at {bandwidth:.2f} TB/s measured"]),
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
    head = _head(document, ops)
    by_op = {op: [r for r in head.rows if r["op"] == op] for op in ops}
    return PlotData(
        title=head.title,
        subtitle=head.subtitle,
        ylabel="time / memory floor" if metric == "floor" else "time, us",
        panels=tuple(_panel(op, rows, head.impls, metric) for op, rows in by_op.items() if rows),
        decimals=1 if metric == "floor" else 0,
    )


def line_data(document: Mapping[str, Any], ops: Sequence[str] = tuple(OPS)) -> LineData:
    """Times over the length of a results file, and the memory floor.

    A line holds what differs in the length alone, at a fixed number of tokens: sizes that differ
    in tokens, heads or gate get lines of their own.

    Raises:
        ResultsError: another schema, or nothing that was timed at two lengths.
    """
    head = _head(document, ops)
    names = ("H", "K", "V", "dtype", "gate", "gate_rank", "gate_dtype")
    panels = []
    for op in ops:
        sizes: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for row in head.rows:
            if row["op"] == op:
                key = (row["B"] * row["T"], *(row[name] for name in names))
                sizes.setdefault(key, []).append(row)
        several = [rows for rows in sizes.values() if len({r["T"] for r in rows}) > 1]
        if not several:
            continue
        lines = []
        for index, rows in enumerate(several):
            what = f", {_size(rows[0])}" if len(several) > 1 else ""
            dash = DASHES[index % len(DASHES)]
            for impl in head.impls:
                times = {r["T"]: r["us"] for r in rows if r["impl"] == impl}
                if times:
                    label, colour = STYLES[impl]
                    lines.append(_line(label + what, colour, dash, times))
            floors = {r["T"]: r["floor_us"] for r in rows}
            lines.append(_line("memory floor" + what, FLOOR_COLOUR, dash, floors))
        title = OPS[op] if len(several) > 1 else f"{OPS[op]}\n{_size(several[0][0])}"
        panels.append(LinePanel(title, tuple(lines)))
    if not panels:
        raise ResultsError("no problem has times at two lengths with the same number of tokens")
    return LineData(head.title, head.subtitle, "time, us", tuple(panels))


def _size(row: Mapping[str, Any]) -> str:
    return (
        f"{row['B'] * row['T']} tokens, {row['H']} heads of {row['K']} x {row['V']}, {_gate(row)}"
    )


def _line(label: str, colour: str, dash: str, times: Mapping[int, float]) -> Line:
    lengths = tuple(sorted(times))
    return Line(label, colour, dash, lengths, tuple(times[t] for t in lengths))


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


def _draw_dots(axes: Any, panel: Panel, decimals: int) -> None:
    """One line of text for each problem, from top to bottom, one mark for each implementation."""
    markers = {label: MARKERS[impl] for impl, (label, _) in STYLES.items()}
    for series in panel.series:
        dots = [(v, y) for y, v in enumerate(series.values) if v is not None]
        axes.plot(
            [v for v, _ in dots],
            [y for _, y in dots],
            markers[series.label],
            color=series.colour,
            markersize=6.5 if series.label == "glac" else 5.5,
            label=series.label,
            linestyle="none",
            zorder=3,
        )
        if series.label != "glac":
            continue
        for value, y in dots:
            axes.annotate(
                f"{value:.{decimals}f}",
                (value, y),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7.5,
                color=series.colour,
                zorder=4,
            )
    axes.vlines(
        panel.floors,
        [y - 0.42 for y in range(len(panel.floors))],
        [y + 0.42 for y in range(len(panel.floors))],
        color=FLOOR_COLOUR,
        linewidth=1.8,
        zorder=2,
        label="memory floor",
    )
    values = [v for series in panel.series for v in series.values if v is not None]
    axes.set_xscale("log")
    axes.set_xlim(min([*values, *panel.floors]) / 1.3, max([*values, *panel.floors]) * 1.3)
    axes.set_ylim(len(panel.groups) - 0.4, -0.75)
    axes.set_yticks(range(len(panel.groups)))
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.grid(axis="x", which="both", color="#E8E8E8", linewidth=0.6, zorder=0)
    axes.hlines(
        range(len(panel.groups)), *axes.get_xlim(), color="#EFEFEF", linewidth=0.8, zorder=0
    )
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _plain_log(axis: Any, subs: tuple[int, ...]) -> None:
    """Ticks that read 2, 5, 10 instead of powers of ten."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(ticker.NullFormatter())


def _titled(
    figure: Any, axes: Any, title: str, subtitle: str, columns: int, fontsize: float = 8.5
) -> None:
    """Title, subtitle and legend above the panels, in the order of the first panel's legend."""
    height = figure.get_figheight()
    figure.text(0.01, 1 - 0.24 / height, title, fontsize=12, ha="left")
    figure.text(0.01, 1 - 0.45 / height, subtitle, fontsize=8.5, color="#444444", ha="left")
    handles, labels = axes.get_legend_handles_labels()
    lines = -(-len(labels) // columns)
    figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - 0.47 / height),
        ncols=columns,
        frameon=False,
        fontsize=fontsize,
    )
    # In inches: title, subtitle, legend.
    figure.tight_layout(rect=(0, 0, 1, 1 - (0.5 + 0.22 * lines) / height))


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(data: PlotData, out: Path) -> None:
    """Write bars or dots; the suffix of ``out`` decides the format."""
    pyplot = _pyplot()
    groups = max(len(panel.groups) for panel in data.panels)
    entries = len(data.panels[0].series) + 1  # and the floor
    columns = min(entries, 3 if groups > 3 else 2)  # a narrow figure has no room for three
    head = 0.5 + 0.22 * -(-entries // columns)
    if groups <= MOST_BARS:
        figure, axes = pyplot.subplots(
            len(data.panels),
            squeeze=False,
            figsize=(max(7.0, 1.2 + 1.85 * groups), head + 4.2 * len(data.panels)),
            dpi=150,
        )
        for panel_axes, panel in zip(axes[:, 0], data.panels, strict=True):
            _draw_panel(panel_axes, panel, data.decimals)
            panel_axes.set_ylabel(data.ylabel)
        _titled(figure, axes[0, 0], data.title, data.subtitle, columns)
    else:
        figure, axes = pyplot.subplots(
            1,
            len(data.panels),
            squeeze=False,
            figsize=(2.6 + 4.6 * len(data.panels), head + 0.9 + 0.42 * groups),
            dpi=150,
        )
        shown: tuple[str, ...] = ()
        for panel_axes, panel in zip(axes[0], data.panels, strict=True):
            _draw_dots(panel_axes, panel, data.decimals)
            _plain_log(panel_axes.xaxis, (1, 2, 5))
            panel_axes.set_xlabel(data.ylabel)
            # Panels side by side share the labels of the first where they have the same rows.
            texts = [_one_line(label) for label in panel.groups]
            panel_axes.set_yticklabels([] if panel.groups == shown else texts, fontsize=8)
            shown = shown or panel.groups
        _titled(figure, axes[0, 0], data.title, data.subtitle, columns)
    figure.savefig(out)
    pyplot.close(figure)


def _one_line(label: str) -> str:
    """A group's label for a dot plot: shape on one line, gate on the next."""
    sizes, heads, gate = label.split("\n")
    return f"{sizes}, {heads}\n{gate}"


def draw_lines(data: LineData, out: Path) -> None:
    """Write times over the length; the suffix of ``out`` decides the format."""
    pyplot = _pyplot()
    columns = min(len(data.panels[0].lines), 3 if len(data.panels) > 1 else 2)
    lines = -(-len(data.panels[0].lines) // columns)
    figure, axes = pyplot.subplots(
        1,
        len(data.panels),
        squeeze=False,
        figsize=(max(7.5, 1.0 + 5.2 * len(data.panels)), 4.9 + 0.22 * lines),
        dpi=150,
    )
    for panel_axes, panel in zip(axes[0], data.panels, strict=True):
        for line in panel.lines:
            floor = line.colour == FLOOR_COLOUR
            panel_axes.plot(
                line.lengths,
                line.values,
                line.dash,
                color=line.colour,
                marker="" if floor else "o",
                markersize=4,
                linewidth=1.8 if floor else 1.4,
                label=line.label,
            )
        lengths = sorted({t for line in panel.lines for t in line.lengths})
        panel_axes.set_xscale("log", base=2)
        panel_axes.set_yscale("log")
        panel_axes.set_xticks(
            lengths, [f"{t // 1024}K" if t % 1024 == 0 else str(t) for t in lengths]
        )
        panel_axes.minorticks_off()
        _plain_log(panel_axes.yaxis, (1, 2, 5))
        panel_axes.set_xlabel("tokens in a sequence")
        panel_axes.set_title(panel.title, fontsize=9, loc="left")
        panel_axes.grid(color="#E5E5E5", linewidth=0.6)
        panel_axes.set_axisbelow(True)
        for side in ("top", "right"):
            panel_axes.spines[side].set_visible(False)
    axes[0, 0].set_ylabel(data.ylabel)
    _titled(figure, axes[0, 0], data.title, data.subtitle, columns)
    figure.savefig(out)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw a results file of `glac bench`.")
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    parser.add_argument("-o", "--out", type=Path, help="default: beside the results, as .png")
    parser.add_argument("--metric", choices=("floor", "us"), default="floor")
    parser.add_argument("--op", choices=(*OPS, "both"), default="both")
    parser.add_argument("--against", choices=("T",), help="draw time over the length")
    options = parser.parse_args(argv)
    if options.against and options.metric != "floor":
        parser.error("--against draws microseconds and takes no --metric")
    try:
        document = json.loads(options.results.read_text(encoding="utf-8"))
        ops = tuple(OPS) if options.op == "both" else (options.op,)
        if options.against:
            lines = line_data(document, ops)
        else:
            data = plot_data(document, options.metric, ops)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ResultsError) as error:
        print(f"{options.results} cannot be drawn: {error}", file=sys.stderr)
        return 1
    out = options.out or options.results.with_suffix(".png")
    try:
        if options.against:
            draw_lines(lines, out)
        else:
            draw(data, out)
    except ModuleNotFoundError as error:
        print(f"{error}: pip install 'glac[bench]'", file=sys.stderr)
        return 3
    print(out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
