"""Tables: what is read, what is refused, and the whole command on one, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glac import cli
from glac.configs import default_config
from glac.errors import ConfigError
from glac.gpus import GPUS
from glac.problem import Gate, Op
from glac.tuned import load_tuned
from glac.tuning.evaluate import ILLEGAL
from glac.tuning.replay import load_table, parse_slug
from glac.tuning.space import SUITES, space
from tests.tuning import kills

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
HEADER = "B,T,H,K,V,gate,config,status,us"
ROW = "1,256,1,16,16,vector,c16_bv16_w2_s1,ok,50"


def tune(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.cli.main(["tune", *map(str, words)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("op", list(Op))
def test_every_candidate_is_found_by_its_name(op: Op) -> None:
    for problem in (*SUITES["standard"], *SUITES["scalar"], *SUITES["decode"]):
        if op not in problem.ops:
            continue
        for config in space(problem, GPUS["h100"], op=op).configs:
            assert parse_slug(config.slug, problem.spec.gate) == config


@pytest.mark.parametrize(
    "slug", ["", "c16", "c16_bv16_w2_s1-seg64", "c16_bk16_bv16_w2_s1", "x-y-z"]
)
def test_a_name_that_is_nobodys_is_refused(slug: str) -> None:
    with pytest.raises(ConfigError, match="config: "):
        parse_slug(slug)


@pytest.mark.parametrize(("name", "rows"), [("forward", 893), ("backward", 787)])
def test_the_committed_tables_are_whole(name: str, rows: int) -> None:
    table = load_table(RESULTS / f"h200_{name}_study.csv")
    assert sum(map(len, table.outcomes.values())) == rows
    assert {op.value for _, op in table.outcomes} == {name}
    assert {p.spec.gate for p, _ in table.outcomes} == {Gate.VECTOR, Gate.LOWRANK}
    gpu = GPUS["h200"]
    for item in table.spaces(gpu):
        usual = default_config(item.op, item.problem.spec, gpu, item.problem.bucket)
        assert item.default == usual
        assert all(o.ok for o in table.outcomes[item.problem, item.op].values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: header: missing columns B, T"),
        (HEADER, "holds no rows"),
        (f"{HEADER}\n{ROW}\n{ROW}", ":3: config: c16_bv16_w2_s1 is given twice"),
        (f"{HEADER}\n{ROW.replace(',50', ',0')}", ":2: us: wanted a positive time, got '0'"),
        (f"{HEADER}\n{ROW.replace(',50', ',fast')}", ":2: could not convert"),
        (f"{HEADER}\n{ROW.replace('ok', 'fine')}", ":2: status: wanted one of ok"),
        (f"{HEADER}\n{ROW.replace('vector', 'Vector')}", ":2: gate: wanted"),
        (f"{HEADER}\n{ROW.replace('256', 'many')}", ":2: T: wanted a positive integer"),
        (f"{HEADER}\n{ROW},7", ":2: row: wanted as many fields"),
    ],
)
def test_a_broken_table_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_table(path)
    assert f"{path}" in caught.value.message
    assert message in caught.value.message


def test_the_whole_command_on_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Workers, storage, outcomes, finals, export, deny-list: all but the timing is real."""
    pytest.importorskip("optuna")
    pytest.importorskip("triton")
    table = kills.small_table(tmp_path / "h100_small.csv")
    out = tmp_path / "h100.yaml"
    words = ["--replay", table, "--out", out, "--json", "--no-progress", "--workers", "2"]
    assert tune(*words) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    (result,) = data["results"]
    assert (result["tried"], result["planned"], result["config_id"]) == (24, 24, "c32_bv16_w2_s1")
    assert result["counts"][ILLEGAL] == 1
    assert [f["status"] for f in result["failures"]] == [ILLEGAL]
    file = load_tuned(out)
    (row,) = file.rows
    assert row.stats.us == 40.0
    assert row.stats.measured_on == "replay of h100_small.csv"
    assert file.row_provenance(row).code_path == "sm_90a"
    (denied,) = file.denied
    assert denied.evidence[0].config == "c16_bv16_w2_s4"
    # Again: nothing is tried, the same file.
    log = tmp_path / "log"
    assert tune(*words[:-2], "--replay-log", log) == 0
    assert json.loads(capsys.readouterr().out)["data"]["results"][0]["us"] == 40.0
    assert not log.exists()
    assert load_tuned(out).rows == file.rows


def test_a_sampler_finds_the_best_of_a_real_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within 2 % of the optimum after 30 of 138 configs; benchmarks/samplers.py has all tables."""
    pytest.importorskip("optuna")
    pytest.importorskip("scipy")
    words = ["--replay", RESULTS / "h200_forward_study.csv", "--shape", "8,2048,4,128,256"]
    words += ["--op", "forward", "--trials", "30", "--storage", tmp_path / "s.journal"]
    assert tune(*words, "--json", "--no-progress") == 0
    (result,) = json.loads(capsys.readouterr().out)["data"]["results"]
    assert result["tried"] == 30
    assert result["us"] <= 1.02 * 109.8


@pytest.mark.parametrize(
    "words",
    [
        ["--replay-sleep", "1"],
        ["--workers", "2"],
        ["--replay", RESULTS / "h200_forward_study.csv", "--gpus", "all"],
        ["--replay", RESULTS / "h200_forward_study.csv", "--compile-only", "x"],
    ],
)
def test_options_that_do_not_fit_are_usage_errors(words: list[object]) -> None:
    assert tune(*words) == 2


def test_a_table_named_after_no_gpu_needs_one(tmp_path: Path) -> None:
    table = kills.small_table(tmp_path / "mine.csv")
    assert tune("--replay", table, "--storage", tmp_path / "s.journal") == 2


def test_a_problem_that_the_table_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = kills.small_table(tmp_path / "h100_small.csv")
    assert tune("--replay", table, "--shape", "1,1,1,16,16") == 1
    assert "has no rows for what was asked" in capsys.readouterr().err
