"""Results to YAML, and the whole command on a replayed table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glac import cli
from glac import compile as compile_module
from glac.configs import ChunkKernelConfig, Config, ForwardConfig
from glac.errors import ConfigError, StudyError
from glac.gpus import GPUS
from glac.problem import Gate, Op
from glac.tuned import dump_tuned, load_tuned
from glac.tuning import fleet as fleet_module
from glac.tuning import run as run_module
from glac.tuning.candidates import Candidates, compile_candidates
from glac.tuning.evaluate import Device, Outcome, ReplayEvaluator
from glac.tuning.export import export
from glac.tuning.space import Space, make_problem
from glac.tuning.study import Choice, Report, Result
from tests.helpers_packs import BACKWARD, tuned_file, tuned_row

pytest.importorskip("triton")
try:
    compile_module.toolchain()
except Exception:
    pytest.skip("needs the pinned assembler", allow_module_level=True)

GPU = GPUS["h100"]
DEVICE = Device("NVIDIA H200", "580.1", "2.11")
PROBLEMS = [make_problem((1, T, 1, 16, 16)) for T in (256, 1024)]


def config(chunk: int, segment: int = 0) -> ForwardConfig:
    tile = ChunkKernelConfig(chunk, 16, 4, 2)
    return ForwardConfig(tile, segment, tile if segment else None)


CONFIGS = (config(16), config(32), config(16, 64))
SPACES = [Space(p, CONFIGS[0], CONFIGS) for p in PROBLEMS]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Candidates:
    return compile_candidates(SPACES, GPU, tmp_path_factory.mktemp("tune") / "c", 2)


def result(index: int, winner: ForwardConfig, us: float = 50.0) -> Result:
    outcomes: dict[Config, Outcome] = {
        c: Outcome("ok", us=us + i, error=2e-3) for i, c in enumerate(CONFIGS)
    }
    choice = Choice(winner, us, 60.0, 0.01234567, True)
    return Result(PROBLEMS[index], CONFIGS[0], 1.5e-3, outcomes, choice, {}, 3)


def write(compiled: Candidates, path: Path, *results: Result, gpu: str = "h100") -> Any:
    report = Report(tuple(results), DEVICE)
    pack = compiled.read_pack()
    sha = compiled.templates_sha256
    return export(report, pack, GPUS[gpu], path, sha, "abc")


def test_a_row_says_what_was_measured(compiled: Candidates, tmp_path: Path) -> None:
    path = tmp_path / "new" / "h100.yaml"
    written = write(compiled, path, result(0, CONFIGS[2]))
    file = load_tuned(path)
    assert file.rows == written.rows
    assert (file.gpu, file.measured_on, file.code_path) == ("h100", "NVIDIA H200", "sm_90a")
    assert file.environment.driver == "580.1"
    assert file.environment.templates_sha256 == compiled.templates_sha256
    assert file.environment.ptxas == compiled.toolchain["ptxas"]
    (row,) = file.rows
    assert row.config == CONFIGS[2]
    assert (row.stats.us, row.stats.default_us, row.stats.noise) == (50.0, 60.0, 0.0123)
    assert (row.stats.error, row.stats.yardstick_error) == (2e-3, 1.5e-3)
    assert (row.stats.candidates, row.stats.measured_on) == (3, "NVIDIA H200")
    pack = compiled.read_pack()
    assert len(row.kernels) == 3
    assert all(pack.kernels[k.name].sha256 == k.cubin_sha256 for k in row.kernels)


def test_rows_of_other_problems_stay(compiled: Candidates, tmp_path: Path) -> None:
    path = tmp_path / "h100.yaml"
    write(compiled, path, result(0, CONFIGS[0]), result(1, CONFIGS[0]))
    written = write(compiled, path, result(1, CONFIGS[1], us=40.0))
    assert (written.kept, written.replaced) == (1, 1)
    assert written.warnings == ()
    rows = {row.problem: row for row in load_tuned(path).rows}
    assert rows[PROBLEMS[0]].config == CONFIGS[0]
    assert rows[PROBLEMS[1]].config == CONFIGS[1]
    other = replace(compiled, templates_sha256={Op.FORWARD: "0" * 64})
    (warning,) = write(other, path, result(1, CONFIGS[1])).warnings
    assert "certified with other templates" in warning
    assert "against 000000000000" in warning


def test_rows_of_another_op_stay(compiled: Candidates, tmp_path: Path) -> None:
    path = tmp_path / "h100.yaml"
    row = tuned_row(PROBLEMS[0], BACKWARD)
    old = tuned_file()
    hashes = {Op.BACKWARD: "0" * 64}
    environment = replace(
        old.environment, ptxas=compiled.toolchain["ptxas"], templates_sha256=hashes
    )
    dump_tuned(replace(old, environment=environment, rows=(row,)), path)
    written = write(compiled, path, result(0, CONFIGS[1]))
    assert (written.kept, written.replaced, written.warnings) == (1, 0, ())
    file = load_tuned(path)
    assert [r.op for r in file.rows] == [Op.FORWARD, Op.BACKWARD]
    assert file.environment.templates_sha256 == {**compiled.templates_sha256, **hashes}


def test_nothing_that_works_writes_nothing(compiled: Candidates, tmp_path: Path) -> None:
    path = tmp_path / "h100.yaml"
    assert write(compiled, path, replace(result(0, CONFIGS[0]), choice=None)) is None
    assert not path.exists()


def test_broken_and_foreign_targets_are_left_alone(compiled: Candidates, tmp_path: Path) -> None:
    path = tmp_path / "h100.yaml"
    path.write_text("gpu: [")
    with pytest.raises(ConfigError, match=r"h100\.yaml:\d"):
        write(compiled, path, result(0, CONFIGS[0]))
    assert path.read_text() == "gpu: ["
    path.unlink()
    write(compiled, path, result(0, CONFIGS[0]))
    with pytest.raises(StudyError, match="for h100"):
        write(compiled, path, result(0, CONFIGS[0]), gpu="h200")


def test_two_problems_of_one_bucket_make_one_row(compiled: Candidates, tmp_path: Path) -> None:
    near = replace(result(0, CONFIGS[1]), problem=make_problem((1, 250, 1, 16, 16)))
    written = write(compiled, tmp_path / "h100.yaml", near, result(0, CONFIGS[0]))
    assert [row.problem.T for row in written.rows] == [256]


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The command measures with a table instead of a GPU."""
    pytest.importorskip("optuna")
    table: dict[str, Any] = {c.slug: 100.0 - 20 * i for i, c in enumerate(CONFIGS)}

    class Device200(ReplayEvaluator):
        def device(self) -> Device:
            return DEVICE

        def evaluate(self, config: Config, best_us: float | None) -> Outcome:
            if table.get("interrupt") and len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().evaluate(config, best_us)

    monkeypatch.setattr(fleet_module, "WorkerEvaluator", lambda *_, **__: Device200(table))
    monkeypatch.setattr(run_module, "check_measurable", lambda *_: "sm_90a")
    return table


def tune(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.cli.main(["tune", *map(str, words)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_command_writes_the_winners(
    compiled: Candidates,
    replayed: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "h100.yaml"
    code = tune("--gpu", "h100", "--from", compiled.path, "--out", out, "--no-progress", "--json")
    captured = capsys.readouterr()
    assert code == 0, captured.err
    data = json.loads(captured.out)["data"]
    assert data["measured_on"] == "NVIDIA H200"
    assert [r["config_id"] for r in data["results"]] == [CONFIGS[2].slug] * 2
    assert [r["us"] for r in data["results"]] == [60.0, 60.0]
    assert captured.err == ""
    assert len(load_tuned(out).rows) == 2
    assert out.with_suffix(".journal").is_file()
    # The same command again: same file, nothing measured.
    replayed.clear()
    assert tune("--gpu", "h100", "--from", compiled.path, "--out", out) == 0
    captured = capsys.readouterr()
    assert CONFIGS[2].slug in captured.out
    assert "2 rows written" in captured.out


def test_an_interrupted_command_exports_and_says_so(
    compiled: Candidates,
    replayed: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    replayed["interrupt"] = True
    out = tmp_path / "h100.yaml"
    assert tune("--gpu", "h100", "--from", compiled.path, "--out", out) == 130
    captured = capsys.readouterr()
    assert "goes on where this one ended" in captured.err
    (row,) = load_tuned(out).rows
    assert row.config == CONFIGS[1]
    assert row.stats.candidates == 2


def test_a_study_without_any_result_fails(
    compiled: Candidates,
    replayed: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    replayed.clear()
    out = tmp_path / "h100.yaml"
    assert tune("--gpu", "h100", "--from", compiled.path, "--out", out, "--json") == 1
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] is False
    assert data["data"]["results"][0]["failures"][0]["reason"] == "not in the table"
    assert not out.exists()


def test_without_a_gpu_the_command_says_what_still_works(
    compiled: Candidates, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    pytest.importorskip("optuna")
    assert tune("--gpu", "h100", "--from", compiled.path, "--out", tmp_path / "o.yaml") == 3
    assert "--compile-only" in capsys.readouterr().err


@pytest.mark.parametrize("op", list(Op))
def test_compile_only_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], op: Op
) -> None:
    words = ["--gpu", "h100", "--shape", "1,64,1,16,16", "--op", op.value, "--effort", "quick"]
    gate = "vector" if op.serves(Gate.VECTOR) else "scalar"
    words += ["--gate", gate]
    assert tune(*words, "--compile-only", tmp_path / "c", "--no-progress", "--json") == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert data["kernels"] + len(data["failures"]) == data["problems"][0]["kernels"]
    assert data["problems"][0]["candidates"] <= 12
    assert [item["op"] for item in data["problems"]] == [op.value]


def test_what_a_file_says_now_is_the_incumbent(
    compiled: Candidates,
    replayed: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another config must beat the row by more than 1 %, not only the default."""
    out = tmp_path / "h100.yaml"
    write(compiled, out, result(0, CONFIGS[1]), result(1, CONFIGS[1]))
    replayed.update({CONFIGS[1].slug: 60.4})
    assert tune("--gpu", "h100", "--from", compiled.path, "--out", out, "--json") == 0
    results = json.loads(capsys.readouterr().out)["data"]["results"]
    assert [r["config_id"] for r in results] == [CONFIGS[1].slug] * 2
    replayed.update({CONFIGS[1].slug: 61.0})
    words = ["--gpu", "h100", "--from", compiled.path, "--out", out, "--json"]
    assert tune(*words, "--storage", tmp_path / "other.journal") == 0
    results = json.loads(capsys.readouterr().out)["data"]["results"]
    assert [r["config_id"] for r in results] == [CONFIGS[2].slug] * 2
