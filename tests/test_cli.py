"""The command line: help, exit codes, one JSON object, results and errors in their streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from glac import __version__, cli
from glac.errors import GlacError
from tests.helpers_packs import FAKE_TOOLS, fake_compiled, fake_pack, tuned_file
from tests.test_docs import commands

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "triton", "optuna", "yaml", "numpy", "scipy", "rich", "matplotlib")


def glac(*words: str | Path) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli.cli, [str(word) for word in words])


def python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def document(result: Result) -> dict[str, Any]:
    """The one object on stdout, of the shape that docs/cli.md promises."""
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["schema"] == cli.JSON_SCHEMA
    assert found["ok"] is (result.exit_code == 0)
    if found["ok"]:
        assert set(found) == {"schema", "ok", "data"}
    else:
        assert set(found) - {"data"} == {"schema", "ok", "error"}
        assert set(found["error"]) == {"code", "message", "hint"}
        assert found["error"]["message"]
    return found


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the packs of the user who runs it."""
    from glac import dispatch

    monkeypatch.setenv("GLAC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("GLAC_PACK_PATH", raising=False)
    monkeypatch.delenv("GLAC_REQUIRE_AOT", raising=False)
    dispatch.clear()


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def configs_dir(tmp_path: Path) -> Path:
    from glac.tuned import dump_tuned

    folder = tmp_path / "tuned"
    folder.mkdir()
    dump_tuned(tuned_file(), folder / "h100.yaml")
    return folder


# ---- help ----


@pytest.mark.parametrize("name", ["glac", "glac pack", "glac configs", *commands()])
def test_every_command_has_help(name: str) -> None:
    result = glac(*name.split()[1:], "--help")
    assert result.exit_code == 0, result.output
    assert "Usage: glac" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("name", commands())
def test_every_command_takes_json_and_verbosity(name: str) -> None:
    text = glac(*name.split()[1:], "--help").stdout
    assert all(option in text for option in ("--json", "--verbose", "--quiet"))


def test_group_help_lists_every_command_with_a_line() -> None:
    text = glac("--help").stdout
    context = click.Context(cli.cli)
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    described = {words[0] for words in lines if len(words) == 2}
    assert set(cli.cli.list_commands(context)) <= described


LOADED = """
import sys
from glac.cli import cli
try:
    cli.main(sys.argv[2:])
finally:
    print(*(name for name in sys.argv[1].split(",") if name in sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["build", "--help"], ["quickstart", "-h"], ["completion", "zsh"]],
    ids=" ".join,
)
def test_help_loads_nothing_heavy(words: Sequence[str]) -> None:
    done = python("-c", LOADED, ",".join(HEAVY), *words)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == []


def test_help_of_the_tuner_loads_no_compiler_and_no_sampler() -> None:
    done = python("-c", LOADED, "torch,triton,optuna,scipy,rich", "tune", "--help")
    assert (done.returncode, done.stderr.split()) == (0, []), done.stderr


def test_module_runs_as_the_script_does() -> None:
    done = python("-m", "glac", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["glac,", "version", __version__]
    failed = python("-m", "glac", "pack", "verify", "no/such/pack")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("error: no/such/pack: no such pack\nhint: ")
    assert "Traceback" not in failed.stderr


# ---- exit codes and errors ----


@pytest.mark.parametrize(
    "words",
    [
        ["no-such-command"],
        ["build", "--no-such-option"],
        ["build", "--gpu", "v100"],
        ["build", "--jobs", "0"],
        ["explain"],
        ["explain", "1,2,3", "--gpu", "h100"],
        ["explain", "1,2,3,4,0", "--gpu", "h100"],
        ["bench", "--impl", "magic"],
        ["completion", "tcsh"],
        ["pack", "show"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(words: Sequence[str]) -> None:
    result = glac(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error" in result.stderr
    as_json = glac(*words, "--json")
    assert as_json.exit_code == 2
    assert document(as_json)["error"]["code"] == "usage"
    assert as_json.stderr == ""


@pytest.mark.parametrize(
    "words", [["explain", "1,64,2,64,64"], ["bench", "--shape", "1,64,2,64,64"]], ids=" ".join
)
@pytest.mark.usefixtures("no_gpu")
def test_missing_gpu_is_3(words: Sequence[str]) -> None:
    result = glac(*words)
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith("error: ")
    assert "\nhint: " in result.stderr
    assert document(glac(*words, "--json"))["error"]["code"] == "environment"


WITHOUT = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from glac.cli import cli
cli.main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("missing", "words", "remedy"),
    [
        ("torch", ["quickstart"], "pip install torch"),
        ("torch", ["explain", "1,64,2,64,64", "--gpu", "h100"], "pip install torch"),
        ("yaml", ["configs", "list"], "pip install pyyaml"),
        ("triton", ["build", "--gpu", "a100"], "glac[build]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_missing_package_is_3_and_names_the_remedy(
    missing: str, words: list[str], remedy: str
) -> None:
    done = python("-c", WITHOUT, missing, *words)
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    assert missing in done.stderr.lower()
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_answers_where_everything_is_missing() -> None:
    done = python("-c", WITHOUT, "torch,triton,yaml,optuna,numpy", "doctor", "-q")
    assert done.returncode == 1, done.stderr
    assert "fail  torch" in done.stdout
    assert "warn  triton" in done.stdout
    assert done.stderr.startswith("error: ")


def _failing(error: BaseException) -> click.Command:
    @click.command("fail")
    @cli.common_options
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "name"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyError("x"), 1, "unexpected"),
        (ModuleNotFoundError("no", name="optuna.samplers"), 3, "environment"),
        (ModuleNotFoundError("no", name="glac.nothing"), 1, "unexpected"),
        (cli.FailedError("off", {"x": 1}), 1, "failed"),
        (GlacError("sure", hint="do this"), 1, "error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_any_error_has_its_code_and_one_object(
    error: BaseException, code: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cli.cli.commands, "fail", _failing(error))
    result = glac("fail")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.strip().startswith("error: ")
    assert "Traceback" not in result.stderr
    found = document(glac("fail", "--json"))
    assert found["error"]["code"] == name
    assert ("data" in found) == isinstance(error, cli.FailedError)


def test_traceback_comes_with_vv_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.cli.commands, "fail", _failing(KeyError("x")))
    assert "-vv" in glac("fail", "-v").stderr
    assert "Traceback" in glac("fail", "-vv").stderr
    assert "Traceback" in glac("-vv", "fail").stderr


# ---- commands ----


def test_build_prints_facts_and_a_pack_that_verifies(
    tmp_path: Path, configs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_many(kernels: Any, jobs: int | None = None, on_done: Any = None) -> Any:
        results = {}
        for kernel in kernels:
            results[kernel] = fake_compiled(kernel)
            if on_done:
                on_done(kernel, results[kernel])
        return results

    monkeypatch.setattr("glac.build.compile_many", compile_many)
    monkeypatch.setattr("glac.build.toolchain", lambda: FAKE_TOOLS)
    monkeypatch.setattr("glac.build.STANDARD_PROBLEMS", ())
    out = tmp_path / "packs"
    words = ["build", "--gpu", "h100", "--configs", str(configs_dir), "--out", str(out)]
    result = glac(*words)
    assert result.exit_code == 0, result.output
    assert "registers" in result.stdout
    assert "gla_fwd_summary_k16_v16_vector_bf16" in result.stdout
    assert "[1/4]" in result.stderr
    assert glac(*words, "-q").stderr == ""
    (pack,) = document(glac(*words, "--json"))["data"]["packs"]
    assert (pack["arch"], len(pack["kernels"]), len(pack["rows"])) == ("sm_90a", 4, 2)
    # The folder of packs and the pack itself are both a PATH.
    for path in (out, out / "sm_90a"):
        assert glac("pack", "verify", path).stdout.startswith("ok: ")

    monkeypatch.setenv("GLAC_PACK_PATH", str(out))
    found = document(glac("explain", "2,512,16,16,16", "--gpu", "h100", "--json"))["data"]
    assert (found["provider"], found["pack"]) == ("pack", str(out / "sm_90a"))
    assert found["floor_us"] > 0
    assert found["op"] == "forward"
    text = glac("explain", "2,512,16,16,16", "--gpu", "h100").stdout
    assert "served by  pack: tuned row of h100" in text


def test_build_that_cannot_write_is_3(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_packs(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("glac.build.build_packs", build_packs)
    result = glac("build", "--out", "/nowhere")
    assert result.exit_code == 3
    assert result.stderr == (
        "error: cannot write /nowhere: Permission denied\nhint: choose a folder with --out\n"
    )


def test_pack_show_and_verify(tmp_path: Path) -> None:
    pack = fake_pack(tmp_path / "sm_90a")
    shown = glac("pack", "show", pack.path)
    assert shown.exit_code == 0, shown.output
    assert all(name in shown.stdout for name in pack.kernels)
    (data,) = document(glac("pack", "show", pack.path, "--json"))["data"]["packs"]
    assert len(data["rows"]) == len(pack.rows)
    assert {row["op"] for row in data["rows"]} == set(data["templates_sha256"]) == {"forward"}
    (data,) = document(glac("pack", "verify", pack.path, "--json"))["data"]["packs"]
    assert data["current_templates"] is True

    cubin = next((pack.path / "cubins").iterdir())
    cubin.write_bytes(cubin.read_bytes()[:-1] + b"?")
    broken = glac("pack", "verify", pack.path)
    assert (broken.exit_code, broken.stdout) == (1, "")
    assert "SHA-256" in broken.stderr
    assert document(glac("pack", "verify", pack.path, "--json"))["error"]["code"] == "pack"


def test_explain_says_why_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["explain", "2,1000,3,96,80", "--gpu", "a100", "--gate", "lowrank", "--rank", "32"]
    result = glac(*words)
    assert result.exit_code == 0, result.output
    assert "k96_v80_lowrank32_bf16" in result.stdout
    backward = document(glac(*words, "--op", "backward", "--json"))["data"]
    forward = document(glac(*words, "--json"))["data"]
    assert (forward["op"], backward["op"]) == ("forward", "backward")
    assert backward["floor_us"] > 1.5 * forward["floor_us"]
    assert glac("explain", "1,64,1,257,64", "--gpu", "h100").exit_code == 1
    monkeypatch.setenv("GLAC_REQUIRE_AOT", "1")
    refused = glac(*words, "--json")
    assert refused.exit_code == 1
    assert document(refused)["error"]["code"] == "kernel-not-found"


def test_configs_commands(configs_dir: Path) -> None:
    path = configs_dir / "h100.yaml"
    listed = document(glac("configs", "list", "--json"))["data"]["files"]
    shipped = {item.stem for item in (ROOT / "tuned_configs").glob("*.yaml")}
    assert {item["gpu"] for item in listed} == shipped
    assert glac("configs", "validate").exit_code == 0
    assert all("forward" in item["ops"] for item in listed)
    shown = glac("configs", "show", path).stdout
    assert "118.2" in shown
    assert "forward" in shown
    assert document(glac("configs", "show", path, "--json"))["data"]["gpu"] == "h100"
    assert glac("configs", "validate", path).stdout == f"ok: {path}: h100, 2 rows\n"

    path.write_text(path.read_text().replace("gpu: h100", "gpu: h900"))
    broken = glac("configs", "validate", path)
    assert (broken.exit_code, broken.stdout) == (1, "")
    assert f"error: {path}:" in broken.stderr
    assert glac("configs", "show", "no/such.yaml").exit_code == 1


def test_doctor_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    def good() -> list[cli.Probe]:
        return [cli.Probe("thing", "ok", "there"), cli.Probe("other", "warn", "gone", "get it")]

    def bad() -> list[cli.Probe]:
        raise RuntimeError("boom")

    monkeypatch.setattr(cli, "PROBES", (("good", good),))
    result = glac("doctor")
    assert result.exit_code == 0
    assert "hint: get it" in result.stdout
    monkeypatch.setattr(cli, "PROBES", (("good", good), ("bad", bad)))
    result = glac("doctor")
    assert result.exit_code == 1
    assert "fail  bad     RuntimeError: boom" in result.stdout
    found = document(glac("doctor", "--json"))
    assert [probe["status"] for probe in found["data"]["probes"]][-1] == "fail"


def test_doctor_looks_at_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = fake_pack(tmp_path / "packs" / "sm_90a")
    monkeypatch.setenv("GLAC_PACK_PATH", str(tmp_path / "packs"))
    monkeypatch.setattr(cli, "PROBES", (("packs", cli._probe_packs),))
    assert "3 rows, 4 kernels" in glac("doctor").stdout
    (pack.path / "manifest.json").write_text("{")
    assert glac("doctor").exit_code == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    result = glac("completion", shell)
    assert result.exit_code == 0
    assert "_GLAC_COMPLETE" in result.stdout
    assert document(glac("completion", shell, "--json"))["data"]["shell"] == shell


def test_completion_completes() -> None:
    done = python(
        "-m", "glac", _GLAC_COMPLETE="bash_complete", COMP_WORDS="glac qui", COMP_CWORD="1"
    )
    assert "quickstart" in done.stdout


def test_bench_fails_where_glac_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    row: dict[str, Any] = dict.fromkeys(
        ("us", "eager_us", "floor_us", "error", "config_id", "cubin_sha")
    )
    row.update(op="fwd", B=1, T=64, H=2, K=64, V=64, dtype="bf16", gate="vector", gate_rank=0)
    row.update(gate_dtype="bf16", impl="glac", date="", note="no such kernel")
    given: dict[str, Any] = {}

    def run_bench(*args: object, **options: object) -> dict[str, Any]:
        given.update(options, shapes=args[0])
        return {"schema": 1, "env": {}, "command": "", "rows": [row]}

    monkeypatch.setattr("glac.bench.run_bench", run_bench)
    words = ["bench", "--shape", "1,64,2,64,64", "--impl", "glac", "--dtype", "fp16"]
    result = glac(*words)
    assert result.exit_code == 1
    assert "no such kernel" in result.stderr
    assert "1,64,2,64,64" in result.stdout
    assert (given["shapes"], given["dtype"]) == (((1, 64, 2, 64, 64),), "fp16")
    assert document(glac(*words, "--json"))["data"]["rows"] == [row]
    row["us"] = 12.5
    assert glac(*words).exit_code == 0


def test_quickstart_turns_its_report_into_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    run = SimpleNamespace(problem="a problem", passed=True)
    report = SimpleNamespace(
        useful=True, runs=[run], missing=["x"], to_dict=lambda: {}, summary=lambda: "fine"
    )
    monkeypatch.setattr("glac.quickstart.run_quickstart", lambda *args, **options: report)
    assert (glac("quickstart").exit_code, glac("quickstart").stdout) == (0, "fine\n")
    document(glac("quickstart", "--json"))
    run.passed = False
    assert glac("quickstart").exit_code == 1
    assert "a problem" in document(glac("quickstart", "--json"))["error"]["message"]
    report.useful = False
    assert glac("quickstart").exit_code == 3


def test_tables_align_numbers_to_the_right() -> None:
    text = cli.format_table(("name", "us"), [("a", "9.5"), ("long name", "112.0"), ("b", "-")])
    assert text.splitlines() == [
        "name          us",
        "---------  -----",
        "a            9.5",
        "long name  112.0",
        "b              -",
    ]


def test_json_has_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command("numbers")
    @cli.common_options
    def numbers() -> None:
        cli.emit({"a": float("nan"), "b": [float("inf"), 1.5], "c": Path("x")}, "")

    monkeypatch.setitem(cli.cli.commands, "numbers", numbers)
    assert document(glac("numbers", "--json"))["data"] == {"a": None, "b": [None, 1.5], "c": "x"}
