"""The report: one page, whole, for finished, failed and running studies."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from glac import cli
from glac.gpus import GPUS
from glac.problem import Op
from glac.tuning.evaluate import ILLEGAL, WRONG, Outcome, ReplayEvaluator
from glac.tuning.report import page, read_rivals, read_studies, rival_times
from glac.tuning.space import make_problem, space
from glac.tuning.study import run_study

pytest.importorskip("optuna")
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
PROBLEM = make_problem((16, 2048, 8, 128, 128))


class Page(HTMLParser):
    """Checks that tags close in order, and collects what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "s.journal"
    spaces = [space(PROBLEM, GPUS["h200"], "quick", op) for op in PROBLEM.ops]
    table: dict[str, float | Outcome] = {}
    for item in spaces:
        for index, config in enumerate(item.configs):
            table[config.slug] = 400.0 - 10 * index
        table[item.configs[2].slug] = Outcome(WRONG, reason="output: error 4.1e-01 <b>")
    table[spaces[0].configs[3].slug] = Outcome(ILLEGAL, reason="worker died of SIGABRT")
    facts = {"triton": "3.7.1", "ptxas": "12.9.86", "glac": "0", "commit": "abc"}
    large = spaces[0].configs[4]
    run_study(
        spaces,
        ReplayEvaluator(table),
        path,
        gpu="h200",
        facts={**facts, "code_path": "sm_90a"},
        missing=lambda _, c: "needs 99 bytes of shared memory" if c == large else None,
    )
    return path


def test_the_page_is_whole_and_needs_nothing_else(storage: Path) -> None:
    views = read_studies(str(storage))
    assert [view.op for view in views] == [Op.FORWARD, Op.BACKWARD]
    rivals = read_rivals([RESULTS / "h200.json", RESULTS / "h200_training.json"])
    text = page(views, rivals, str(storage))
    found = Page(text)
    assert found.links == []
    assert "http" not in text
    assert '<meta name="viewport"' in text
    shown = " ".join(found.texts)
    for part in ("Results", "Speed", "Roofline", "History", "What matters", "Failures by reason",
                 "Environment", "illegal-access", "shared memory", "flash-linear-attention",
                 "3.7.1", "12.9.86", "sm_90a"):  # fmt: skip
        assert part in shown, part
    assert "error ... <b>" in shown, "escaped, so that it shows as it is"
    assert text.count("<svg") == 3
    assert text.count('class="bad"') == 3


def test_numbers_are_those_of_the_study(storage: Path) -> None:
    forward, backward = read_studies(str(storage))
    assert forward.best is not None
    count = len(forward.tried)
    assert count == 11, "one was not compiled"
    assert forward.best[1] == min(t.outcome.us for t in forward.tried if t.outcome.us)
    assert forward.default_us == 400.0
    assert set(forward.finals) >= {forward.best[0], forward.facts["default"]}
    assert abs(sum(backward.importance.values()) - 1) < 1e-6
    assert forward.facts["left_out"] == {"shared memory": 1}


def test_rivals_are_those_of_the_same_problem() -> None:
    rows = read_rivals([RESULTS / "h200.json", RESULTS / "h200_training.json"])
    times = rival_times(PROBLEM, "forward", rows)
    assert set(times) == {"fla", "fa2", "cudnn"}
    training = rival_times(PROBLEM, "training", rows)
    assert training["fla"] > times["fla"]
    assert rival_times(make_problem((1, 1, 1, 16, 16)), "forward", rows) == {}


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.cli.main(["report", *map(str, words)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_command(storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sub" / "r.html"
    assert run(storage, "-o", out, "--bench", RESULTS / "h200.json", "--json") == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert [s["op"] for s in data["studies"]] == ["forward", "backward"]
    assert out.read_text().startswith("<!doctype html>")
    assert run(tmp_path / "none.journal", "-o", out) == 1
    assert "no study here" in capsys.readouterr().err
    (tmp_path / "empty.journal").write_text("")
    assert run(tmp_path / "empty.journal", "-o", out) == 1
    (tmp_path / "bad.json").write_text("[]")
    assert run(storage, "-o", out, "--bench", tmp_path / "bad.json") == 1
    assert "no results of glac bench" in capsys.readouterr().err
    assert run("--help") == 0
