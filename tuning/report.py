"""``glac report``: what a study found, as one web page that needs nothing else."""

from __future__ import annotations

import html
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from glac import __version__, cli
from glac.atomic import write_text
from glac.errors import ConfigError, StudyError
from glac.gpus import GPUS
from glac.problem import Gate, Op, Problem
from glac.tuning.evaluate import Outcome, reason_kind
from glac.tuning.storage import open_storage, shown
from glac.tuning.study import FINALS, STUDY_FORMAT, import_optuna
from glac.tuning.worker import problem_from_dict

IMPLS = {
    "fla": "flash-linear-attention",
    "fa2": "FlashAttention-2 *",
    "cudnn": "cuDNN attention *",
}


# ---- what a storage holds ----


@dataclass(frozen=True)
class Tried:
    """A candidate, in the order in which they were finished."""

    config: str
    outcome: Outcome
    params: Mapping[str, Any]
    distributions: Mapping[str, Any]


@dataclass(frozen=True)
class StudyView:
    """The study of one op of one problem.

    Attributes:
        facts: what the study noted about itself.
        problem, op: what was tuned.
        tried: its candidates.
        finals: times of the last comparison by config, empty if there was none.
        importance: share of each coordinate in how fast a config is.
        running: candidates that are being tried now.
        lost: trials that ended without a result.
    """

    facts: Mapping[str, Any]
    problem: Problem
    op: Op
    tried: tuple[Tried, ...]
    finals: Mapping[str, Sequence[float]]
    importance: Mapping[str, float]
    running: int
    lost: int

    @property
    def title(self) -> str:
        p = self.problem
        return f"{p.B},{p.T},{p.H},{p.spec.K},{p.spec.V} {p.spec.slug} {self.op.value}"

    @property
    def floor_us(self) -> float:
        gpu = GPUS.get(str(self.facts.get("gpu")))
        return self.problem.bytes(self.op) / gpu.copy_bandwidth * 1e6 if gpu else math.nan

    def us(self, config: str | None) -> float | None:
        """The time of a config: from the comparison, else from its own trial."""
        if config is None:
            return None
        if self.finals.get(config):
            return statistics.median(self.finals[config])
        return next((t.outcome.us for t in self.tried if t.config == config), None)

    @property
    def default_us(self) -> float | None:
        return self.us(self.facts.get("default"))

    @property
    def best(self) -> tuple[str, float] | None:
        """The fastest config, by the comparison if there was one."""
        names = self.finals or [t.config for t in self.tried if t.outcome.ok]
        timed = [(us, name) for name in names if (us := self.us(name)) is not None]
        if not timed:
            return None
        us, name = min(timed)
        return name, us


def read_studies(where: str) -> list[StudyView]:
    """All studies in a storage.

    Raises:
        StudyError: there is no storage, or no study in it.
    """
    optuna = import_optuna()
    views = []
    with open_storage(optuna, where, create=False) as storage:
        studies = list(storage.get_all_studies())
        trials = {
            s.study_name: storage.get_all_trials(s._study_id, deepcopy=False) for s in studies
        }
        for study in studies:
            name, facts = study.study_name, study.user_attrs
            if not name.startswith(f"{STUDY_FORMAT}:") or name.endswith(f"|{FINALS}"):
                continue
            if "problem" not in facts:
                continue
            views.append(_view(optuna, facts, trials[name], trials.get(f"{name}|{FINALS}", ())))
    if not views:
        raise StudyError(f"{shown(where)}: holds no study of this glac")
    return sorted(views, key=lambda v: (str(v.facts.get("gpu")), str(v.problem), v.op.order))


def _view(
    optuna: Any, facts: Mapping[str, Any], trials: Iterable[Any], finals: Iterable[Any]
) -> StudyView:
    states = optuna.trial.TrialState
    done = sorted(
        (t for t in trials if t.state is states.COMPLETE and "outcome" in t.user_attrs),
        key=lambda t: (t.datetime_complete, t.number),
    )
    tried = tuple(
        Tried(
            str(t.user_attrs["config"]),
            Outcome.from_dict(t.user_attrs["outcome"]),
            t.params,
            t.distributions,
        )
        for t in done
    )
    compared = [t for t in finals if t.state is states.COMPLETE and "times" in t.user_attrs]
    last = max(compared, key=lambda t: t.number).user_attrs["times"] if compared else {}
    counts = Counter(t.state for t in trials)
    return StudyView(
        facts,
        problem_from_dict(facts["problem"]),
        Op(facts["op"]),
        tried,
        last,
        _importance(optuna, tried),
        counts[states.RUNNING],
        counts[states.FAIL],
    )


def _importance(optuna: Any, tried: Sequence[Tried]) -> dict[str, float]:
    """How much each coordinate matters among configs that work; empty if there are too few."""
    working = [t for t in tried if t.outcome.ok and t.outcome.us]
    if len(working) < 10:
        return {}
    names = [
        name
        for name in working[0].params
        if all(name in t.params for t in working) and len({t.params[name] for t in working}) > 1
    ]
    study = optuna.create_study()
    for t in working:
        assert t.outcome.us
        study.add_trial(
            optuna.trial.create_trial(
                value=math.log(t.outcome.us),
                params={name: t.params[name] for name in names},
                distributions={name: t.distributions[name] for name in names},
            )
        )
    try:
        found = optuna.importance.get_param_importances(study)
    except (RuntimeError, ValueError):
        return {}
    return {name: float(value) for name, value in found.items()}


# ---- rivals ----


def read_rivals(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Rows of ``glac bench`` results.

    Raises:
        ConfigError: a file is none.
    """
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            rows += json.loads(path.read_text(encoding="utf-8"))["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: no results of glac bench ({error})", hint="glac bench --out FILE"
            ) from None
    return rows


def rival_times(problem: Problem, op: str, rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Times of other implementations for ``forward`` or ``training`` of a problem."""
    spec = problem.spec
    found = {}
    for row in rows:
        gate = row["gate_rank"] if row["gate"] == Gate.LOWRANK.value else 0
        same = (
            (row["B"], row["T"], row["H"], row["K"], row["V"])
            == (problem.B, problem.T, problem.H, spec.K, spec.V)
            and (row["op"], row["dtype"], row["gate"], gate)
            == (op, spec.dtype.value, spec.gate.value, spec.rank)
            and row["us"]
        )
        if same and row["impl"] in IMPLS:
            found[row["impl"]] = float(row["us"])
    return found


# ---- the page ----

_STYLE = """
:root{--ink:#1a1a1a;--soft:#5f6368;--line:#d7dade;--paper:#fff;--tile:#f6f7f8;--good:#0072B2;
--bad:#D55E00;--other:#999;--warm:#E69F00;--green:#009E73}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#a0a4aa;--line:#3c4043;--paper:#17181a;
--tile:#202225;--good:#56B4E9;--bad:#ff8a3c;--other:#8a8d91}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:70rem;padding:1rem;color:var(--ink);background:var(--paper);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.5rem;margin:.2em 0}h2{font-size:1.2rem;margin:1.6em 0 .4em}
h3{font-size:1rem;margin:1.2em 0 .3em}
p{margin:.4em 0}.soft{color:var(--soft)}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.875rem;min-width:100%}
th,td{padding:.35em .6em;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{font-weight:600;white-space:nowrap}.num{text-align:right;white-space:nowrap;
font-variant-numeric:tabular-nums}
code{font:.85em ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}
details{border:1px solid var(--line);border-radius:.5rem;margin:.7rem 0;background:var(--tile)}
summary{cursor:pointer;padding:.7rem .9rem;font-weight:600;overflow-wrap:anywhere}
details>div{padding:0 .9rem .9rem}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:0 1.5rem}
svg{width:100%;height:auto;display:block}
svg text{fill:var(--soft);font:13px system-ui,sans-serif}
@media(max-width:600px){svg text{font-size:21px}}
.axis{stroke:var(--line);stroke-width:1}.ok{fill:var(--good)}.pruned{fill:var(--other)}
.bad{stroke:var(--bad);stroke-width:1.6;fill:none}
.best{stroke:var(--warm);stroke-width:2;fill:none}
.mark{stroke:var(--soft);stroke-dasharray:4 3;stroke-width:1}
.roof{stroke:var(--ink);stroke-width:1.5;fill:none}.hollow{fill:none;stroke:var(--good)}
.legend span{display:inline-block;margin-right:1.1em;white-space:nowrap;font-size:.85rem}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.35em}
.row{display:grid;grid-template-columns:minmax(6.5rem,10rem) 1fr 4.2rem;gap:.5rem;
align-items:center;font-size:.875rem;margin:.2rem 0}
.bar{height:.8rem;border-radius:.2rem;background:var(--good);min-width:2px}
.bar.rival{background:var(--other)}.bar.default{background:var(--warm)}
"""


def _e(value: object) -> str:
    return html.escape(str(value))


def _time(us: float | None) -> str:
    return "-" if us is None else f"{us:.1f}"


def _table(headers: Sequence[str], rows: Iterable[Sequence[object]], text: int = 1) -> str:
    """A table whose first ``text`` columns are text and the others numbers."""

    def cell(tag: str, index: int, value: object) -> str:
        kind = "" if index < text else ' class="num"'
        return f"<{tag}{kind}>{value}</{tag}>"

    head = "".join(cell("th", i, _e(h)) for i, h in enumerate(headers))
    body = "".join(
        f"<tr>{''.join(cell('td', i, v) for i, v in enumerate(row))}</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>{body}</table></div>'


def _bar(label: str, share: float, value: str, kind: str = "") -> str:
    width = max(0.0, min(100.0, 100 * share))
    return (
        f'<div class="row"><span>{_e(label)}</span>'
        f'<div><div class="bar {kind}" style="width:{width:.1f}%"></div></div>'
        f'<span class="num">{_e(value)}</span></div>'
    )


class _Scale:
    """A logarithmic axis from data to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._span = math.log(low), max(1e-9, math.log(high) - math.log(low))
        self._start, self._length = start, end - start
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        return self._start + self._length * (math.log(value) - self._low) / self._span

    def ticks(self) -> list[float]:
        """Round values: 1, 2 and 5 times powers of ten, finer ones on short axes."""
        steps = (1, 2, 5) if self.high / self.low > 4 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
        first = math.floor(math.log10(self.low))
        values = [s * 10.0**d for d in range(first, first + 12) for s in steps]
        return [v for v in values if self.low <= v <= self.high]


def _history(view: StudyView) -> str:
    """Time of each candidate in order, the best so far, the default and the memory floor."""
    timed = [t.outcome.us for t in view.tried if t.outcome.us]
    if not timed:
        return '<p class="soft">Nothing has a time yet.</p>'
    width, height, left, right, top, bottom = 720, 320, 60, 12, 34, 36
    floor = view.floor_us
    values = [*timed, *([view.default_us] if view.default_us else [])]
    low = min([*values, *([floor] if math.isfinite(floor) else [])]) * 0.94
    y = _Scale(low, max(values) * 1.05, height - bottom, top)
    count = max(2, len(view.tried))

    def x(index: int) -> float:
        return left + (width - left - right) * index / (count - 1)

    parts = []
    for tick in y.ticks():
        level = y(tick)
        parts.append(
            f'<line class="axis" x1="{left}" x2="{width - right}" y1="{level:.1f}" '
            f'y2="{level:.1f}"/><text x="{left - 6}" y="{level + 4:.1f}" '
            f'text-anchor="end">{tick:g}</text>'
        )
    marks = (("memory floor", floor), ("default", view.default_us))
    for label, us in marks:
        if us is not None and math.isfinite(us):
            level = y(us)
            parts.append(
                f'<line class="mark" x1="{left}" x2="{width - right}" y1="{level:.1f}" '
                f'y2="{level:.1f}"/><text x="{width - right}" y="{level - 4:.1f}" '
                f'text-anchor="end">{label} {us:.1f}</text>'
            )
    path: list[str] = []
    best = math.inf
    for index, t in enumerate(view.tried):
        us, at = t.outcome.us, x(index)
        tip = f"<title>{_e(t.config)}: {_e(t.outcome.status)}, {_time(us)} us</title>"
        if us is None:
            parts.append(
                f'<path class="bad" d="M{at - 4:.1f} {top - 10}l8 8m0 -8l-8 8">{tip}</path>'
            )
            continue
        kind = "pruned" if t.outcome.pruned else "ok"
        parts.append(f'<circle class="{kind}" cx="{at:.1f}" cy="{y(us):.1f}" r="3">{tip}</circle>')
        if us < best:
            best = us
            path.append(f"{'H' if path else 'M'}{at:.1f}{'V' if path else ' '}{y(us):.1f}")
    path.append(f"H{width - right}")
    parts.append(f'<path class="best" d="{"".join(path)}"/>')
    parts.append(
        f'<text x="{left}" y="{height - 8}">1</text><text x="{width - right}" '
        f'y="{height - 8}" text-anchor="end">{len(view.tried)} candidates</text>'
        f'<text x="4" y="18">us</text>'
    )
    legend = (
        '<p class="legend"><span><i class="dot" style="background:var(--good)"></i>timed</span>'
        '<span><i class="dot" style="background:var(--other)"></i>given up early</span>'
        '<span><i class="dot" style="background:var(--bad)"></i>failed (crosses)</span>'
        '<span><i class="dot" style="background:var(--warm)"></i>best so far</span></p>'
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="history">'
        f"{''.join(parts)}</svg>{legend}"
    )


def _flops(view: StudyView) -> float:
    """Least multiplications and additions: update and read-out, five such products backward."""
    p = view.problem
    products = 2 if view.op is Op.FORWARD else 5
    return 2.0 * products * p.B * p.T * p.H * p.spec.K * p.spec.V


def _roofline(views: Sequence[StudyView]) -> str:
    """Where tuned and default configs are under the roof of their GPU."""
    gpu = GPUS.get(str(views[0].facts.get("gpu")))
    points = [(v, b[1]) for v in views if (b := v.best) is not None]
    if gpu is None or not points:
        return ""
    width, height, left, right, top, bottom = 720, 350, 60, 16, 30, 58
    loads = [_flops(v) / v.problem.bytes(v.op) for v, _ in points]
    rates = [_flops(v) / us / 1e6 for v, us in points]
    ridge = gpu.matrix_rate / gpu.copy_bandwidth
    x = _Scale(min(loads) / 1.6, max(ridge * 1.6, max(loads) * 1.6), left, width - right)
    roof_low = x.low * gpu.copy_bandwidth / 1e12
    y = _Scale(
        min(roof_low, *rates, *rates) / 1.8, gpu.matrix_rate / 1e12 * 1.3, height - bottom, top
    )
    parts = []
    for tick in y.ticks():
        parts.append(
            f'<line class="axis" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" '
            f'y2="{y(tick):.1f}"/><text x="{left - 6}" y="{y(tick) + 4:.1f}" '
            f'text-anchor="end">{tick:g}</text>'
        )
    for tick in x.ticks():
        parts.append(
            f'<text x="{x(tick):.1f}" y="{height - bottom + 22}" '
            f'text-anchor="middle">{tick:g}</text>'
        )
    peak = gpu.matrix_rate / 1e12
    parts.append(
        f'<path class="roof" d="M{x(x.low):.1f} {y(roof_low):.1f}L{x(ridge):.1f} {y(peak):.1f}'
        f'H{width - right}"/>'
    )
    for (view, us), load, rate in zip(points, loads, rates, strict=True):
        tip = f"<title>{_e(view.title)}: {us:.1f} us, {rate:.0f} TFLOP/s</title>"
        kind = "ok" if view.op is Op.FORWARD else "second"
        colour = "var(--good)" if kind == "ok" else "var(--green)"
        if view.default_us:
            old = _flops(view) / view.default_us / 1e6
            parts.append(
                f'<line x1="{x(load):.1f}" x2="{x(load):.1f}" y1="{y(old):.1f}" '
                f'y2="{y(rate):.1f}" stroke="{colour}" opacity=".5"/>'
                f'<circle cx="{x(load):.1f}" cy="{y(old):.1f}" r="4" fill="none" '
                f'stroke="{colour}">{tip}</circle>'
            )
        parts.append(
            f'<circle cx="{x(load):.1f}" cy="{y(rate):.1f}" r="4.5" fill="{colour}">{tip}</circle>'
        )
    parts.append(
        f'<text x="4" y="18">TFLOP/s</text><text x="{width - right}" y="{height - 8}" '
        f'text-anchor="end">FLOP per byte that must move</text>'
    )
    legend = (
        '<p class="legend"><span><i class="dot" style="background:var(--good)"></i>forward</span>'
        '<span><i class="dot" style="background:var(--green)"></i>backward</span>'
        "<span>filled: best config, hollow: default</span></p>"
        f'<p class="soft">Roof of {_e(gpu.title)}: {gpu.copy_bandwidth / 1e12:g} TB/s copied, '
        f"{peak:g} TFLOP/s. Counted are the least operations (state update and read-out, five "
        "such products backward), not those that the chunked form adds.</p>"
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="roofline">'
        f"{''.join(parts)}</svg>{legend}"
    )


def _summary(views: Sequence[StudyView]) -> str:
    rows = []
    for view in views:
        best, default = view.best, view.default_us
        us = best[1] if best else None
        failed = sum(not t.outcome.ok for t in view.tried)
        planned = view.facts.get("planned", "?")
        rows.append(
            (
                _e(view.title),
                _time(us),
                _time(default),
                f"{default / us:.2f}" if us and default else "-",
                f"{us / view.floor_us:.2f}" if us and math.isfinite(view.floor_us) else "-",
                f"{len(view.tried)}/{planned}",
                failed,
            )
        )
    headers = ("problem", "best us", "default us", "faster", "x floor", "tried", "failed")
    return _table(headers, rows)


def _speed(views: Sequence[StudyView], rivals: Sequence[Mapping[str, Any]]) -> str:
    """Bars for tuned, default and other implementations."""
    parts = []
    for view in views:
        best = view.best
        if best is None or view.op is not Op.FORWARD:
            continue
        backward = next(
            (v for v in views if v.problem == view.problem and v.op is Op.BACKWARD), None
        )
        parts.append(_bars(view.problem, "forward", best[1], view.default_us, rivals))
        if backward is not None and backward.best is not None:
            default = (
                view.default_us + backward.default_us
                if view.default_us and backward.default_us
                else None
            )
            total = best[1] + backward.best[1]
            parts.append(_bars(view.problem, "training", total, default, rivals))
    note = (
        '<p class="soft">* softmax attention of the same model width. Other times come from '
        "<code>glac bench</code>, training is forward and backward together.</p>"
        if rivals
        else '<p class="soft">Other implementations: give the results of <code>glac bench</code> '
        "with <code>--bench FILE</code>.</p>"
    )
    return f'<div class="grid">{"".join(parts)}</div>{note}'


def _bars(
    problem: Problem,
    op: str,
    us: float,
    default: float | None,
    rivals: Iterable[Mapping[str, Any]],
) -> str:
    others = rival_times(problem, op, rivals)
    most = max([us, default or 0.0, *others.values()])
    lines = [_bar("glac, tuned", us / most, f"{us:.0f} us")]
    if default:
        lines.append(_bar("glac, default", default / most, f"{default:.0f} us", "default"))
    for impl, time in others.items():
        lines.append(_bar(IMPLS[impl], time / most, f"{time:.0f} us", "rival"))
    p = problem
    title = f"{p.B},{p.T},{p.H},{p.spec.K},{p.spec.V} {p.spec.gate.value}, {op}"
    return f"<div><h3>{_e(title)}</h3>{''.join(lines)}</div>"


def _failures(view: StudyView) -> str:
    """What failed, by reason, and what was not tried."""
    kinds: dict[tuple[str, str], list[Tried]] = {}
    for t in view.tried:
        if not t.outcome.ok:
            kinds.setdefault((t.outcome.status, reason_kind(t.outcome.reason)), []).append(t)
    rows = [
        (_e(status), _e(kind) or "-", f"<code>{_e(members[0].config)}</code>", len(members))
        for (status, kind), members in sorted(kinds.items(), key=lambda k: -len(k[1]))
    ]
    rows += [
        ("not tried", _e(kind), "-", count)
        for kind, count in sorted(dict(view.facts.get("left_out") or {}).items())
    ]
    if not rows:
        return '<p class="soft">Every candidate compiled, was right and repeated.</p>'
    return _table(("outcome", "reason", "such as", "configs"), rows, text=3)


def _details(view: StudyView, opened: bool) -> str:
    best, facts = view.best, view.facts
    lines = []
    if best is not None:
        lines.append(f"Fastest: <code>{_e(best[0])}</code>, {best[1]:.1f} us")
    default = facts.get("default")
    lines.append(f"Default: <code>{_e(default)}</code>, {_time(view.default_us)} us")
    if facts.get("incumbent"):
        name = str(facts["incumbent"])
        lines.append(f"Incumbent: <code>{_e(name)}</code>, {_time(view.us(name))} us")
    noisy = sum(t.outcome.noisy for t in view.tried)
    held = Counter(t.outcome.throttle for t in view.tried if t.outcome.throttle)
    clocks = [t.outcome.clock_mhz for t in view.tried if t.outcome.clock_mhz]
    if noisy:
        lines.append(f"{noisy} candidates stayed noisier than 2 %")
    if clocks:
        lines.append(f"SM clock {min(clocks)} to {max(clocks)} MHz")
    lines += [f"{count} timed with the clock held back: {_e(why)}" for why, count in held.items()]
    if view.running or view.lost:
        lines.append(f"{view.running} running, {view.lost} ended without a result")
    finals = ""
    if view.finals:
        rows = [
            (
                f"<code>{_e(name)}</code>",
                f"{statistics.median(times):.1f}",
                f"{min(times):.1f}",
                f"{max(times):.1f}",
            )
            for name, times in sorted(view.finals.items(), key=lambda i: statistics.median(i[1]))
        ]
        table = _table(("finalist", "median us", "least", "most"), rows)
        finals = f"<h3>Finalists, timed in turn</h3>{table}"
    importance = "".join(
        _bar(name, value, f"{value:.0%}") for name, value in list(view.importance.items())[:10]
    )
    importance = importance or '<p class="soft">Fewer than ten configs work.</p>'
    text = "".join(f"<p>{line}</p>" for line in lines)
    return (
        f"<details{' open' if opened else ''}><summary>{_e(view.title)}</summary><div>"
        f"{text}<h3>History</h3>{_history(view)}"
        f'<div class="grid"><div><h3>What matters</h3>{importance}</div>'
        f"<div><h3>Failures by reason</h3>{_failures(view)}</div></div>{finals}</div></details>"
    )


def _environment(views: Sequence[StudyView]) -> str:
    """Where it was measured; one line for each combination."""
    names = ("driver", "torch")
    rows: dict[tuple[str, ...], None] = {}
    for view in views:
        f = view.facts
        device = f.get("device") or {}
        row = (
            _e(device.get("name", "-")),
            _e(f.get("gpu", "-")),
            _e(f.get("code_path") or "-"),
            *(_e(device.get(n) or "-") for n in names),
            *(_e(f.get(n) or "-") for n in ("triton", "ptxas", "glac")),
            f"<code>{_e(str(f.get('commit') or '-')[:12])}</code>",
        )
        rows[row] = None
    headers = ("device", "rows for", "code path", *names, "triton", "ptxas", "glac", "commit")
    return _table(headers, rows, text=len(headers))


def page(views: Sequence[StudyView], rivals: Sequence[Mapping[str, Any]], where: str) -> str:
    """The report as HTML."""
    devices = sorted({str((v.facts.get("device") or {}).get("name", "?")) for v in views})
    gained = [v.default_us / b[1] for v in views if (b := v.best) and v.default_us]
    mean = f"{statistics.geometric_mean(gained):.2f} times" if gained else "not"
    timed = sum(len(v.tried) for v in views)
    failed = sum(not t.outcome.ok for v in views for t in v.tried)
    lead = (
        f"{len(views)} {'study' if len(views) == 1 else 'studies'}, "
        f"{timed} candidates tried, {failed} failed. "
        f"The fastest configs are {mean} as fast as the defaults (geometric mean)."
    )
    body = "".join(_details(view, len(views) == 1) for view in views)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>glac tune: {_e(', '.join(devices))}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Tuning study</h1><p>{_e(', '.join(devices))}</p><p>{lead}</p>"
        f"<h2>Results</h2>{_summary(views)}"
        f"<h2>Speed</h2>{_speed(views, rivals)}"
        f"<h2>Roofline</h2>{_roofline(views)}"
        f"<h2>Studies</h2>{body}"
        f"<h2>Environment</h2>{_environment(views)}"
        f'<p class="soft">From {_e(shown(where))}, by glac {__version__}.</p>'
        "</body></html>\n"
    )


@click.command("report")
@click.argument("study")
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="Page to write.",
)
@click.option(
    "--bench",
    "benches",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="Results of glac bench, for the speed of others; repeatable.",
)
@cli.common_options
def report_command(study: str, out: Path, benches: tuple[Path, ...]) -> None:
    """Write what is in STUDY, a journal file or a storage's URL, as one web page.

    The page needs no network and no other file. A study that still runs can be looked at too.
    """
    views = read_studies(study)
    text = page(views, read_rivals(benches), study)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror or error})") from None
    data = {
        "out": str(out),
        "studies": [
            {
                "problem": str(view.problem),
                "op": view.op.value,
                "tried": len(view.tried),
                "best": view.best[0] if view.best else None,
                "us": view.best[1] if view.best else None,
                "default_us": view.default_us,
            }
            for view in views
        ],
    }
    cli.emit(data, f"{out}: {len(views)} studies, {len(text) // 1024} KiB")
