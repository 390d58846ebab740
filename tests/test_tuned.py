"""Tuned files: what is written is read back; anything doubtful is refused with its line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import yaml

from glac.configs import ChunkKernelConfig, ForwardConfig
from glac.errors import ConfigError
from glac.gpus import GPUS
from glac.problem import DType, Op, Problem
from glac.tuned import (
    TunedFile,
    TunedRow,
    available,
    diff_tuned,
    dump_tuned,
    effective_rows,
    header_conflicts,
    load_tuned,
    merge_tuned,
    parse_tuned,
    shipped,
    shipped_names,
    tuned_text,
    user_files,
)
from tests.helpers_packs import BACKWARD, SPLIT, VECTOR, WHOLE, tuned_file, tuned_row

FILE = tuned_file()
TEXT = tuned_text(FILE)


def _line(text: str, fragment: str, nth: int = 0) -> int:
    return [i for i, line in enumerate(text.splitlines(), 1) if fragment in line][nth]


def _refused(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_tuned(text, "x.yaml")
    return caught.value


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "h100.yaml"
    dump_tuned(FILE, path)
    again = load_tuned(path)
    assert tuned_text(again) == path.read_text() == TEXT
    assert set(again.rows) == set(FILE.rows)
    assert replace(again, rows=()) == replace(FILE, rows=())
    assert TEXT.startswith("# Written by `glac tune`")
    assert [item.name for item in tmp_path.iterdir()] == ["h100.yaml"]


def test_order_of_rows_does_not_matter() -> None:
    assert tuned_text(replace(FILE, rows=FILE.rows[::-1])) == TEXT


def test_any_yaml_reader_reads_it() -> None:
    data = yaml.safe_load(TEXT)
    assert data["schema"] == 3
    assert data["rows"][0]["op"] == "forward"
    assert data["environment"]["date"] == "2026-01-02"
    assert data["rows"][0]["stats"]["error"] == pytest.approx(2.1e-3)


@hypothesis.given(
    st.integers(1, 64), st.integers(1, 2**20), st.integers(1, 128), st.sampled_from(list(DType))
)
@hypothesis.settings(max_examples=30)
def test_round_trip_of_any_problem(B: int, T: int, H: int, dtype: DType) -> None:
    spec = replace(VECTOR, dtype=dtype, gate_dtype=dtype)
    file = replace(FILE, rows=(tuned_row(Problem(spec, B, T, H), WHOLE),))
    assert parse_tuned(tuned_text(file), "x.yaml") == file


def test_rows_of_two_ops_for_one_problem() -> None:
    problem = FILE.rows[0].problem
    rows = (tuned_row(replace(problem, spec=VECTOR), BACKWARD), *FILE.rows)
    hashes = {**FILE.environment.templates_sha256, Op.BACKWARD: "b" * 64}
    environment = replace(FILE.environment, templates_sha256=hashes)
    text = tuned_text(replace(FILE, environment=environment, rows=rows))
    again = parse_tuned(text, "x.yaml")
    assert tuned_text(again) == text
    assert [row.op for row in again.rows] == [Op.FORWARD, Op.FORWARD, Op.BACKWARD]
    assert again.rows[-1].config == BACKWARD
    assert again.environment.templates_sha256 == hashes
    illegal = text.replace("dv: true", "dv: false")
    assert "rows[2].config: illegal on h100: dv must be given" in _refused(illegal).message
    unsigned = tuned_text(replace(FILE, rows=rows))
    assert "templates_sha256: missing keys: backward" in _refused(unsigned).message


def test_illegal_file_is_not_written(tmp_path: Path) -> None:
    bad = ForwardConfig(ChunkKernelConfig(16, 32, 2, 1))
    file = replace(FILE, rows=(tuned_row(Problem(VECTOR, 1, 64, 1), bad),))
    with pytest.raises(ConfigError, match="block_v 32 exceeds V"):
        dump_tuned(file, tmp_path / "h100.yaml")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("gpu: h100", "gpu: v100", "gpu: unknown GPU 'v100'"),
        ("schema: 3", "schema: 4", "schema: version 4 is newer"),
        ("schema: 3", "schema: 1", "schema: version 1 is older"),
        ("schema: 3", "schema: true", "schema: wanted 3"),
        ("op: forward", "op: sideways", "rows[0].op: wanted forward or backward"),
        ("op: forward", "op: backward", "rows[0].config: unknown keys ['fwd', 'summary'"),
        ("{forward: ", "{backward: ", "environment.templates_sha256.backward: unknown key"),
        ("code_path: sm_90a", "code_path: sm_75", "code_path: wanted one of"),
        ("'2026-01-02'", "2026-01-02", "environment.date: wanted a text"),
        ("'2026-01-02'", "2026-13-02", "environment.date: '2026-13-02' is no valid value"),
        ("num_stages: 1", "num_stages: 9", "num_stages must be one of"),
        ("num_stages: 1", "num_stages: 1.0", "num_stages must be an integer"),
        ("num_stages: 1", "num_stages: true", "num_stages must be an integer"),
        ("K: 16", "K: 0", "K must be in 1..512"),
        ("K: 16", "K: 16, K: 16", "rows[0].spec.K: is given twice"),
        ("K: 16", "KK: 16", "unknown keys ['KK']"),
        ("bf16", "int8", "'int8' is not a valid DType"),
        ("T: 512", "T: 0", "rows[0].shape.T: wanted an integer in 1.."),
        ("T: 512", "T: 4096", "rows[0].bucket: wanted"),
        ("us: 118.25", "us: fast", "rows[0].stats.us: wanted a number"),
        ("us: 118.25", "us: .nan", "rows[0].stats.us: wanted a number"),
        ("us: 118.25", "us: -1", "rows[0].stats.us: wanted a number"),
        ("us: 118.25, ", "", "rows[0].stats: missing keys: us"),
        ("us: 118.25", "us: 118.25, notes: x", "rows[0].stats.notes: unknown key"),
        ("registers: 64", "registers: '64'", "rows[0].kernels[0].registers: wanted an integer"),
        ("c16_bv16", "c32_bv16", "rows[0].kernels: spec and config ask for"),
        ("gpu: h100", "gpu: &a h100", "anchors and aliases"),
        ("gpu: h100", "gpu: !!python/name:os.system h100", "not YAML"),
        ("gpu: h100", "gpu: [h100", "not YAML"),
        ("gpu: h100", "1: h100", "keys must be plain text"),
        ("gpu: h100", "gpu: {h100: 1}", "gpu: wanted a text"),
    ],
)
def test_refused(old: str, new: str, field: str) -> None:
    assert old in TEXT
    text = TEXT.replace(old, new, 1)
    error = _refused(text)
    assert field in error.message
    assert error.message.startswith("x.yaml:")
    assert error.hint
    line = int(error.message.split(":")[1])
    # An error about a mapping may name the line it begins on.
    assert abs(line - _line(TEXT, old)) <= 4 or "kernels" in field or "[h100" in new


def test_exact_line() -> None:
    text = TEXT.replace("gpu: h100", "gpu: v100", 1)
    assert _refused(text).message.startswith(f"x.yaml:{_line(text, 'gpu: v100')}: gpu: ")
    text = TEXT.replace("candidates: 64", "candidates: many", 1)
    line = _line(text, "candidates: many")
    assert _refused(text).message.startswith(f"x.yaml:{line}: rows[0].stats.candidates: ")


def test_duplicate_row() -> None:
    twice = replace(FILE, rows=(FILE.rows[0], FILE.rows[0]))
    error = _refused(tuned_text(twice))
    assert "rows[1]: same op, spec and bucket as rows[0]" in error.message


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "1", "a: b", "---\na: 1\n---\nb: 2", "[" * 10**5, "- " * 10**4]
)
def test_other_documents(text: str) -> None:
    assert _refused(text).message.startswith("x.yaml:")


@hypothesis.given(st.integers(0, 10**6), st.characters(codec="utf-8"))
@hypothesis.settings(max_examples=100)
def test_damage_is_refused_with_a_line_or_changes_a_free_value(place: int, char: str) -> None:
    place %= len(TEXT)
    message = "x.yaml:1: fine"
    try:
        parse_tuned(TEXT[:place] + char + TEXT[place + 1 :], "x.yaml")
    except ConfigError as error:
        message = error.message
    assert message.split(":")[1].isdigit()


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        load_tuned(tmp_path / "none.yaml")
    assert "glac tune" in caught.value.hint
    (tmp_path / "latin.yaml").write_bytes(b"schema: 1\ngpu: \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: file: not UTF-8"):
        load_tuned(tmp_path / "latin.yaml")


def test_shipped_files_are_valid() -> None:
    for name in shipped_names():
        file = shipped(name)
        assert file is not None
        assert file.gpu == name
    for name in set(GPUS) - set(shipped_names()):
        assert shipped(name) is None
    with pytest.raises(ConfigError, match="unknown GPU"):
        shipped("../h100")


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    dump_tuned(FILE, tmp_path / "new" / "h100.yaml")
    with pytest.raises(ConfigError, match="cannot be written"):
        dump_tuned(FILE, tmp_path / "new" / "h100.yaml" / "h100.yaml")


# ---- merge ----

FIRST, SECOND = FILE.rows
OTHER = tuned_row(Problem(VECTOR, 2, 4096, 16), WHOLE)


def _with(*rows: TunedRow, **environment: Any) -> TunedFile:
    """``FILE`` with other rows and another environment."""
    return replace(FILE, environment=replace(FILE.environment, **environment), rows=rows)


def test_merge_keeps_what_is_not_replaced() -> None:
    again = tuned_row(SECOND.problem, WHOLE)
    new = _with(again, OTHER, date="2026-02-03")
    merged, kept, replaced = merge_tuned(FILE, new)
    assert (kept, replaced) == (1, 1)
    assert set(merged.rows) == {FIRST, again, OTHER}
    assert merged.environment == new.environment
    assert header_conflicts(FILE, new) == []
    assert set(parse_tuned(tuned_text(merged), "x.yaml").rows) == set(merged.rows)


def test_merge_of_a_file_with_itself_is_the_file() -> None:
    assert merge_tuned(FILE, FILE) == (FILE, 0, 2)


def test_merge_takes_template_hashes_by_op() -> None:
    row = tuned_row(FIRST.problem, BACKWARD)
    backward = _with(row, templates_sha256={Op.BACKWARD: "b" * 64})
    merged, *_ = merge_tuned(backward, FILE)
    assert merged.environment.templates_sha256 == {
        **FILE.environment.templates_sha256,
        Op.BACKWARD: "b" * 64,
    }
    assert header_conflicts(backward, FILE) == []
    parse_tuned(tuned_text(merged), "x.yaml")


def test_merge_of_two_gpus_is_refused() -> None:
    with pytest.raises(ConfigError, match="rows for h200 cannot join rows for h100") as caught:
        merge_tuned(tuned_file("h200"), FILE)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"triton": "3.6.0"}, "triton 3.7.1 against 3.6.0"),
        ({"ptxas": ""}, "ptxas 12.9.86 against unknown"),
        ({"templates_sha256": {Op.FORWARD: "0" * 64}}, "forward templates"),
    ],
)
def test_header_that_would_be_wrong_about_rows(change: dict[str, object], text: str) -> None:
    (conflict,) = header_conflicts(FILE, _with(OTHER, **change))
    assert conflict.startswith(text)
    # Nothing stays of the old file, so there is nothing to be wrong about.
    assert header_conflicts(FILE, _with(*FILE.rows, **change)) == []


def test_header_may_differ_in_what_does_not_certify() -> None:
    assert header_conflicts(FILE, _with(OTHER, driver="1", torch="2", commit="a")) == []


def test_one_kernel_with_two_binaries_is_a_conflict() -> None:
    (kernel,) = OTHER.kernels
    near = tuned_row(Problem(VECTOR, 8, 4096, 16), WHOLE)
    other = replace(near, kernels=(replace(kernel, cubin_sha256="0" * 64),))
    assert header_conflicts(_with(OTHER), _with(near)) == []
    (conflict,) = header_conflicts(_with(OTHER), _with(other))
    assert kernel.name in conflict
    assert conflict.endswith("against 000000000000")


def test_a_kept_row_keeps_its_device() -> None:
    silent = replace(FIRST, stats=replace(FIRST.stats, measured_on=""))
    new = replace(_with(OTHER), measured_on="Other GPU")
    merged, *_ = merge_tuned(_with(silent), new)
    assert [row.stats.measured_on for row in merged.rows] == ["Some GPU", "Some GPU"]
    unmeasured = replace(_with(silent), measured_on="")
    assert header_conflicts(unmeasured, new) == ["measured on unknown against Other GPU"]


# ---- diff ----


def test_equal_files_have_no_difference() -> None:
    assert not diff_tuned(FILE, FILE)
    assert diff_tuned(FILE, replace(FILE, rows=FILE.rows[::-1])).same == 2


def test_diff_of_rows() -> None:
    faster = replace(FIRST, stats=replace(FIRST.stats, us=59.125))
    found = diff_tuned(FILE, _with(OTHER, faster))
    assert found
    assert (found.header, found.removed, found.added, found.same) == ({}, (SECOND,), (OTHER,), 0)
    (change,) = found.changed
    assert (change.old, change.new) == (FIRST, faster)
    assert (change.fields, change.ratio) == (("us",), 0.5)


def test_diff_names_what_changed() -> None:
    problem = replace(SECOND.problem, T=500)
    row = tuned_row(problem, WHOLE)
    row = replace(row, stats=replace(row.stats, candidates=7))
    (change,) = diff_tuned(FILE, _with(FIRST, row)).changed
    assert change.fields == ("shape", "config", "kernels", "candidates")
    assert SECOND.config == SPLIT
    kernel = replace(FIRST.kernels[0], cubin_sha256="0" * 64)
    (change,) = diff_tuned(FILE, _with(replace(FIRST, kernels=(kernel,)), SECOND)).changed
    assert change.fields == ("kernels",)
    untimed = replace(FIRST, stats=replace(FIRST.stats, us=0.0))
    (change,) = diff_tuned(_with(untimed), _with(FIRST)).changed
    assert change.ratio is None


def test_diff_of_headers() -> None:
    hashes = {Op.FORWARD: "0" * 64}
    other = replace(_with(*FILE.rows, ptxas="13", templates_sha256=hashes), measured_on="Other")
    found = diff_tuned(FILE, other)
    assert found.header == {
        "measured_on": ("Some GPU", "Other"),
        "ptxas": ("12.9.86", "13"),
        "templates_sha256.forward": (
            FILE.environment.templates_sha256[Op.FORWARD],
            "0" * 64,
        ),
    }
    assert found.same == 2
    backward = _with(tuned_row(FIRST.problem, BACKWARD), templates_sha256={Op.BACKWARD: "b" * 64})
    assert diff_tuned(FILE, backward).header["templates_sha256.backward"] == ("", "b" * 64)


OLD = re.sub(r"\n  provenance: \{[^}]*\}", "", TEXT.replace("schema: 3", "schema: 2"))
OLD = OLD.replace("\ndenied: []", "")


def test_a_file_of_the_schema_before_is_read_and_written_as_the_new_one() -> None:
    assert "provenance" not in OLD
    assert "denied" not in OLD
    file = parse_tuned(OLD, "x.yaml")
    assert file == parse_tuned(TEXT, "x.yaml")
    assert all(row.provenance == file.provenance for row in file.rows)
    assert tuned_text(file) == TEXT
    mixed = TEXT.replace("schema: 3", "schema: 2")
    assert "unknown key" in _refused(mixed).message


def test_each_row_says_where_it_comes_from() -> None:
    old = parse_tuned(TEXT, "x.yaml")
    environment = replace(FILE.environment, driver="600.1", date="2027-01-01", commit="new")
    problem = Problem(VECTOR, 4, 4096, 16)
    new = replace(FILE, environment=environment, rows=(tuned_row(problem, WHOLE),))
    merged, kept, replaced = merge_tuned(old, new)
    assert (kept, replaced) == (2, 0)
    again = parse_tuned(tuned_text(merged), "x.yaml")
    dates = {row.problem: again.row_provenance(row).date for row in again.rows}
    assert dates[problem] == "2027-01-01"
    assert {d for p, d in dates.items() if p != problem} == {"2026-01-02"}
    at = TEXT.index("provenance:")
    bad = TEXT[:at] + TEXT[at:].replace("code_path: sm_90a", "code_path: sm_75", 1)
    assert "rows[0].provenance.code_path: wanted one of" in _refused(bad).message


def test_a_users_own_files_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    row = replace(FILE.rows[0], stats=replace(FILE.rows[0].stats, us=1.0))
    dump_tuned(replace(FILE, rows=(row,)), first / "h100.yaml")
    dump_tuned(FILE, second / "h100.yaml")
    monkeypatch.setenv("GLAC_CONFIG_PATH", f"{first}:{second}:{tmp_path / 'none'}")
    assert [len(file.rows) for file in user_files("h100")] == [1, 2]
    files = available("h100")
    assert files[-1] == shipped("h100")
    rows = [row for _, row in effective_rows(files[:2])]
    assert sorted(row.stats.us for row in rows) == [1.0, 118.25]
    assert user_files("h200") == []
    (first / "h200.yaml").write_text((first / "h100.yaml").read_text())
    with pytest.raises(ConfigError, match=r"h200\.yaml: gpu: wanted h200, got h100"):
        user_files("h200")
