"""Tuned files: what is written is read back; anything doubtful is refused with its line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import yaml

from glac.configs import ChunkKernelConfig, ForwardConfig
from glac.errors import ConfigError
from glac.gpus import GPUS
from glac.problem import DType, Op, Problem
from glac.tuned import dump_tuned, load_tuned, parse_tuned, shipped, shipped_names, tuned_text
from tests.helpers_packs import BACKWARD, VECTOR, WHOLE, tuned_file, tuned_row

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
    assert data["schema"] == 2
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
        ("schema: 2", "schema: 3", "schema: version 3 is newer"),
        ("schema: 2", "schema: 1", "schema: version 1 is older"),
        ("schema: 2", "schema: true", "schema: wanted 2"),
        ("op: forward", "op: sideways", "rows[0].op: wanted forward or backward"),
        ("op: forward", "op: backward", "rows[0].config: unknown keys ['fwd', 'segment'"),
        ("{forward: ", "{backward: ", "environment.templates_sha256.backward: unknown key"),
        ("code_path: sm_90a", "code_path: sm_75", "code_path: wanted one of"),
        ("'2026-01-02'", "2026-01-02", "environment.date: wanted a text"),
        ("'2026-01-02'", "2026-13-02", "environment.date: '2026-13-02' is no valid value"),
        ("num_stages: 1", "num_stages: 9", "num_stages must be one of"),
        ("num_stages: 1", "num_stages: 1.0", "num_stages must be an integer"),
        ("num_stages: 1", "num_stages: true", "num_stages must be an integer"),
        ("K: 16", "K: 0", "K must be in 1..256"),
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
