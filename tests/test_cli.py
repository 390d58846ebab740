"""The command line: help, exit codes, one JSON object, results and errors in their streams."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from glac import __version__, cli
from glac.build import STANDARD_PROBLEMS
from glac.errors import GlacError
from glac.fit import Device
from glac.gpus import GPUS
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
    monkeypatch.setattr(dispatch, "shipped_pack_dir", lambda: tmp_path / "shipped")
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


@pytest.mark.parametrize("name", ["glac", "glac pack", "glac cache", "glac configs", *commands()])
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
        ["pack", "list", "--arch", "sm_75"],
        ["pack", "merge", "out"],
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


@pytest.fixture
def fake_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr("glac.build._cut_rows", lambda gpu, rows: ())


def test_build_prints_facts_and_a_pack_that_verifies(
    fake_compiler: None, tmp_path: Path, configs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "packs"
    words = ["build", "--gpu", "h100", "--configs", str(configs_dir), "--out", str(out)]
    result = glac(*words)
    assert result.exit_code == 0, result.output
    assert "registers" in result.stdout
    assert "gla_states_k16_v16_vector_bf16" in result.stdout
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


def test_build_of_zips_again_and_of_c_sources(
    fake_compiler: None, tmp_path: Path, configs_dir: Path
) -> None:
    words: list[str | Path] = ["build", "--gpu", "h100", "--configs", configs_dir]
    words += ["--out", tmp_path, "--zip"]
    first = document(glac(*words, "--json"))["data"]["packs"][0]
    assert (first["path"], first["compiled"]) == (str(tmp_path / "sm_90a.zip"), 4)
    assert document(glac(*words, "--json"))["data"]["packs"][0]["compiled"] == 0
    assert document(glac(*words, "--fresh", "--json"))["data"]["packs"][0]["compiled"] == 4
    for path in (tmp_path, tmp_path / "sm_90a.zip"):
        assert glac("pack", "verify", path).stdout.startswith("ok: ")
    made = document(glac(*words, "--emit", "c", "--json"))["data"]["sources"]
    assert made == [str(tmp_path / "glac_sm_90a.h"), str(tmp_path / "glac_sm_90a.c")]
    assert made[1] in glac(*words, "--emit", "c").stdout


def test_build_of_what_ships(
    fake_compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glac.settings.shipped_pack_dir", lambda: tmp_path / "packs")
    monkeypatch.setattr("glac.build.user_files", lambda name, folders: [])
    monkeypatch.setattr("glac.build.STANDARD_PROBLEMS", STANDARD_PROBLEMS[:1])
    packs = document(glac("build", "--shipped", "--json"))["data"]["packs"]
    assert [Path(pack["path"]).name for pack in packs] == ["sm_80.zip", "sm_90a.zip"]
    assert {row["gpu"] for pack in packs for row in pack["rows"]} == set(GPUS)
    for words, message in (
        (["--shipped", "--gpu", "h100"], "--shipped has its own"),
        (["--zip"], "--zip needs --out"),
    ):
        refused = glac("build", *words)
        assert refused.exit_code == 2
        assert message in refused.stderr


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
    assert data["others"] == []
    (pack.path / "notes.txt").write_text("mine")
    assert (
        "1 files that it does not use, such as notes.txt"
        in glac("pack", "verify", pack.path).stdout
    )

    cubin = next((pack.path / "cubins").iterdir())
    cubin.write_bytes(cubin.read_bytes()[:-1] + b"?")
    broken = glac("pack", "verify", pack.path)
    assert (broken.exit_code, broken.stdout) == (1, "")
    assert "SHA-256" in broken.stderr
    assert document(glac("pack", "verify", pack.path, "--json"))["error"]["code"] == "pack"


def test_pack_verify_on_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_gpu: None
) -> None:
    pack = fake_pack(tmp_path / "sm_90a")
    refused = glac("pack", "verify", pack.path, "--device")
    assert refused.exit_code == 3
    assert "no CUDA GPU" in refused.stderr
    loaded: list[str] = []

    class Kernel:
        def load_now(self) -> None:
            loaded.append("now")

    def load(pack: object, name: str, device: int) -> Kernel:
        loaded.append(name)
        return Kernel()

    facts = Device("H100", (9, 0), 232448, (12, 4))
    monkeypatch.setattr(cli, "_device_spec", lambda: GPUS["h100"])
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.synchronize", lambda index: None)
    monkeypatch.setattr("glac.dispatch.device_facts", lambda index: facts)
    monkeypatch.setattr("glac.launch.load_from_pack", load)
    (data,) = document(glac("pack", "verify", pack.path, "--device", "--json"))["data"]["packs"]
    assert data["load_ms"] > 0
    assert set(loaded) == {*pack.kernels, "now"}
    old = replace(facts, cuda=(11, 8))
    monkeypatch.setattr("glac.dispatch.device_facts", lambda index: old)
    refused = glac("pack", "verify", pack.path, "--device")
    assert refused.exit_code == 1
    assert "needs driver 525 or newer" in refused.stderr
    assert "install driver 525" in refused.stderr


def test_pack_list_says_what_is_used_in_which_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glac import dispatch

    monkeypatch.setattr(dispatch, "shipped_pack_dir", lambda: tmp_path / "shipped")
    empty = glac("pack", "list")
    assert (empty.exit_code, empty.stdout.startswith("no packs; looked in ")) == (0, True)
    own = fake_pack(tmp_path / "own")
    cached = fake_pack(tmp_path / "cache" / "packs" / "sm_90a")
    broken = fake_pack(tmp_path / "shipped" / "sm_90a")
    (broken.path / "manifest.json").write_text("{}")
    monkeypatch.setenv("GLAC_PACK_PATH", str(own.path))
    data = document(glac("pack", "list", "--json"))["data"]
    assert data["searched"] == [str(own.path), *(str(p.path.parent) for p in (cached, broken))]
    assert [row["path"] for row in data["packs"]] == [str(p.path) for p in (own, cached, broken)]
    assert [row["used"] for row in data["packs"]] == [True, True, False]
    first, last = data["packs"][0], data["packs"][2]
    assert (first["arch"], first["rows"], first["kernels"]) == ("sm_90a", {"forward": 3}, 4)
    assert first["bytes"] == sum(kernel.size for kernel in own.kernels.values())
    assert first["toolchain"] == own.toolchain
    assert (last["arch"], last["rows"], last["kernels"], last["bytes"]) == (None, {}, None, None)
    assert last["reason"].startswith(f"refused: {broken.path}: manifest.json")
    assert "glac build" in last["hint"]
    text = glac("pack", "list")
    assert f"not used: {broken.path}: refused: " in text.stdout
    assert text.stderr == ""
    # A GPU of the other arch looks at the root that is a pack, and refuses it.
    (other,) = document(glac("pack", "list", "--arch", "sm_80", "--json"))["data"]["packs"]
    assert (other["path"], other["used"]) == (str(own.path), False)
    assert other["reason"] == "for sm_90a, this device needs sm_80"


def test_pack_merge_says_what_was_dropped(tmp_path: Path) -> None:
    first, second = fake_pack(tmp_path / "a"), fake_pack(tmp_path / "b")
    words: list[str | Path] = ["pack", "merge", tmp_path / "out", first.path, second.path]
    data = document(glac(*words, "--json"))["data"]
    assert len(data["pack"]["rows"]) == len(data["dropped"]) == 3
    assert {row["path"] for row in data["dropped"]} == {str(second.path)}
    assert {row["kept"] for row in data["dropped"]} == {str(first.path)}
    assert glac("pack", "verify", tmp_path / "out").exit_code == 0
    again = glac(*words)
    assert (again.exit_code, again.stdout) == (1, "")
    assert "got another pack; it was left as it is" in again.stderr
    into = glac(*words, tmp_path / "out")
    assert into.exit_code == 0, into.output
    assert into.stdout.count("dropped: ") == 6


def test_cache_dir_prints_the_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "packs"
    empty = glac("cache", "dir")
    assert (empty.exit_code, empty.stdout.strip()) == (0, str(folder))
    assert "0 packs, 0 bytes" in empty.stderr
    pack = fake_pack(folder / "sm_90a")
    (folder / "notes.txt").write_text("mine")
    data = document(glac("cache", "dir", "--json"))["data"]
    size = sum(file.stat().st_size for file in pack.path.rglob("*") if file.is_file())
    assert (data["folder"], data["bytes"]) == (str(folder), size)
    assert data["packs"] == [{"path": str(pack.path), "bytes": size}]
    assert data["others"] == [str(folder / "notes.txt")]


def test_cache_clear_asks_and_removes_packs_only(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    built = fake_pack(cache / "packs" / "sm_90a").path
    missed = fake_pack(cache / "on-miss" / "sm_90a" / "forward-x").path
    tuned = fake_pack(cache / "quickstart" / "sm_90a").path
    runner = CliRunner()
    declined = runner.invoke(cli.cli, ["cache", "clear"], input="n\n")
    assert (declined.exit_code, built.exists(), missed.exists()) == (0, True, True)
    assert str(built) in declined.stdout
    assert str(missed) in declined.stdout
    assert "nothing was removed" in declined.stdout
    unasked = glac("cache", "clear", "--json")
    assert unasked.exit_code == 2
    assert "--yes" in document(unasked)["error"]["message"]
    # A pack of an older format is still one that glac wrote.
    (built / "manifest.json").write_text('{"format": 1}')
    data = document(glac("cache", "clear", "--yes", "--json"))["data"]
    assert [row["path"] for row in data["removed"]] == [str(built), str(missed)]
    assert (list(built.parent.iterdir()), list(missed.parent.iterdir())) == ([], [])
    assert tuned.exists()
    assert glac("cache", "clear", "--yes").stdout == "no packs to remove\n"


def _stray_file(pack: Path) -> None:
    (pack.parent / "thesis.txt").write_text("years of work")


def _stray_file_in_the_pack(pack: Path) -> None:
    (pack / "thesis.txt").write_text("years of work")


def _stray_cubin(pack: Path) -> None:
    (pack / "cubins" / "mine.cubin").write_text("years of work")


def _foreign_manifest(pack: Path) -> None:
    (pack / "manifest.json").write_text('{"name": "an app"}')


def _link(pack: Path) -> None:
    pack.rename(pack.parent.parent / "elsewhere")
    pack.symlink_to(pack.parent.parent / "elsewhere")


@pytest.mark.parametrize(
    "spoil", [_stray_file, _stray_file_in_the_pack, _stray_cubin, _foreign_manifest, _link]
)
def test_cache_clear_refuses_what_is_no_pack(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    packs = tmp_path / "cache" / "packs"
    spoil(fake_pack(packs / "sm_90a").path)
    fake_pack(packs / "sm_80")
    before = sorted(packs.rglob("*"))
    result = glac("cache", "clear", "--yes", "--json")
    assert result.exit_code == 1
    error = document(result)["error"]
    assert error["code"] == "pack"
    assert "nothing was removed" in error["message"]
    assert sorted(packs.rglob("*")) == before


def test_cache_clear_removes_all_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = tmp_path / "cache" / "packs"
    for name in ("sm_80", "sm_90a"):
        fake_pack(packs / name)
    before = sorted(packs.rglob("*"))
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "sm_90a":
            raise PermissionError("not yours")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    result = glac("cache", "clear", "--yes")
    assert result.exit_code == 1
    assert "not yours" in result.stderr
    assert sorted(packs.rglob("*")) == before


def test_explain_says_why_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["explain", "2,1000,3,96,80", "--gpu", "a100", "--gate", "lowrank", "--rank", "32"]
    result = glac(*words)
    assert result.exit_code == 0, result.output
    assert "k96_v80_lowrank32_bf16" in result.stdout
    backward = document(glac(*words, "--op", "backward", "--json"))["data"]
    forward = document(glac(*words, "--json"))["data"]
    assert (forward["op"], backward["op"]) == ("forward", "backward")
    assert backward["floor_us"] > 1.5 * forward["floor_us"]
    assert glac("explain", "1,64,1,513,64", "--gpu", "h100").exit_code == 1
    monkeypatch.setenv("GLAC_REQUIRE_AOT", "1")
    refused = glac(*words, "--json")
    assert refused.exit_code == 1
    assert document(refused)["error"]["code"] == "kernel-not-found"


def test_explain_knows_the_precision() -> None:
    words = ["explain", "2,1000,3,64,64", "--gpu", "h100", "--precision", "tf32"]
    for op in ("forward", "backward"):
        result = glac(*words, "--dtype", "fp32", "--op", op)
        assert result.exit_code == 0, result.output
        assert "k64_v64_vector_fp32_tf32" in result.stdout
    assert "goes with fp32 inputs, got bf16" in glac(*words).stderr
    assert glac(*words, "--dtype", "fp32", "--op", "decode").exit_code == 2


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


def test_configs_diff(configs_dir: Path) -> None:
    path, other = configs_dir / "h100.yaml", configs_dir / "other.yaml"
    other.write_text(path.read_text())
    equal = glac("configs", "diff", path, other)
    assert (equal.exit_code, equal.stdout, equal.stderr) == (0, "equal: 2 rows\n", "")
    assert document(glac("configs", "diff", path, other, "--json"))["data"]["same"] == 2

    text = path.read_text().replace("us: 118.25", "us: 59.125", 1)
    other.write_text(text.replace("ptxas: 12.9.86", "ptxas: '13'"))
    differs = glac("configs", "diff", path, other)
    assert differs.exit_code == 1
    header, row = (differs.stdout.splitlines()[i] for i in (2, -1))
    assert header.split() == ["ptxas", "12.9.86", "13"]
    assert row.split()[-4:] == ["118.2", "59.1", "0.500", "us"]
    assert differs.stderr == (
        f"error: {path} and {other} differ: 1 changed, 1 in the header; 1 equal\n"
    )
    found = document(glac("configs", "diff", path, other, "--json"))
    assert found["error"]["code"] == "failed"
    assert found["data"]["header"] == {"ptxas": {"old": "12.9.86", "new": "13"}}
    (change,) = found["data"]["changed"]
    assert (change["fields"], change["ratio"]) == (["us"], 0.5)
    assert change["old"]["stats"]["us"] == 118.25
    assert change["new"]["config_id"] == change["old"]["config_id"]

    missing = glac("configs", "diff", path, "no/such.yaml", "--json")
    assert (missing.exit_code, document(missing)["error"]["code"]) == (1, "config")
    assert glac("configs", "diff", path).exit_code == 2


def test_configs_diff_lists_rows_of_one_file_only(configs_dir: Path) -> None:
    from glac.tuned import dump_tuned

    path, other = configs_dir / "h100.yaml", configs_dir / "other.yaml"
    file = tuned_file()
    dump_tuned(replace(file, rows=file.rows[:1]), other)
    removed = glac("configs", "diff", path, other)
    assert removed.stdout.splitlines()[-1].startswith("removed  forward  k16_v16_vector_bf16")
    assert f"1 only in {path}; 1 equal" in removed.stderr
    added = glac("configs", "diff", other, path)
    assert added.stdout.splitlines()[-1].startswith("added  forward  k16_v16_vector_bf16")
    assert f"1 only in {path}; 1 equal" in added.stderr


def test_configs_merge(configs_dir: Path) -> None:
    from glac.tuned import dump_tuned, load_tuned

    file = tuned_file()
    path, new, out = (configs_dir / f"{name}.yaml" for name in ("h100", "new", "out"))
    (row, _) = file.rows
    faster = replace(row, stats=replace(row.stats, us=59.0))
    dump_tuned(replace(file, rows=(faster,)), new)
    merged = glac("configs", "merge", out, path, new)
    assert (merged.exit_code, merged.stderr) == (0, "")
    assert merged.stdout.endswith(f"\n\n{out}: h100, 2 rows\n")
    assert set(load_tuned(out).rows) == {faster, file.rows[1]}
    # In the other order the row of the whole file stays, and OUT may be one of the files.
    again = document(glac("configs", "merge", out, out, new, path, "--json"))["data"]
    assert [(item["kept"], item["replaced"]) for item in again["files"]] == [
        (0, 2),
        (0, 1),
        (2, 0),
    ]
    assert (again["path"], again["gpu"], again["rows"]) == (str(out), "h100", 2)
    assert out.read_bytes() == path.read_bytes()


def test_configs_merge_refuses(configs_dir: Path) -> None:
    from glac.tuned import dump_tuned

    file = tuned_file()
    path, new, out = (configs_dir / f"{name}.yaml" for name in ("h100", "new", "out"))
    older = replace(file.environment, triton="3.6.0")
    dump_tuned(replace(file, environment=older, rows=file.rows[:1]), new)
    refused = glac("configs", "merge", out, path, new)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert f"{path}: the header of {new} would be wrong about 1 rows" in refused.stderr
    assert "triton 3.7.1 against 3.6.0" in refused.stderr
    assert "\nhint: tune these rows again" in refused.stderr
    assert (
        document(glac("configs", "merge", out, path, new, "--json"))["error"]["code"] == "config"
    )
    # What a later file replaces is not held against the header.
    assert glac("configs", "merge", out, new, path).exit_code == 0
    out.unlink()
    assert glac("configs", "merge", out, path, new, path).exit_code == 0
    out.unlink()

    dump_tuned(tuned_file("h200"), new)
    foreign = glac("configs", "merge", out, new, path)
    assert foreign.exit_code == 1
    assert f"error: {new}: rows for h200 cannot join rows for h100" in foreign.stderr
    assert not out.exists()
    before = new.read_bytes()
    there = glac("configs", "merge", new, path, path)
    assert there.exit_code == 1
    assert "is there already" in there.stderr
    assert f"hint: to update it: glac configs merge {new} {new} {path} {path}" in there.stderr
    assert new.read_bytes() == before
    assert glac("configs", "merge", out, path).exit_code == 2


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


def test_your_own_files_are_listed_first(
    configs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLAC_CONFIG_PATH", str(configs_dir))
    files = document(glac("configs", "list", "--json"))["data"]["files"]
    assert files[0]["from"] == str(configs_dir / "h100.yaml")
    assert {file["from"] for file in files[1:]} == {"glac"}


def test_an_older_file_is_migrated_in_place(tmp_path: Path) -> None:
    from glac.tuned import load_tuned, tuned_text

    text = tuned_text(tuned_file()).replace("schema: 3", "schema: 2").replace("denied: []\n", "")
    old = re.sub(r"\n  provenance: \{[^}]*\}", "", text)
    path = tmp_path / "h100.yaml"
    path.write_text(old)
    done = glac("configs", "migrate", path)
    assert (done.exit_code, "schema 3" in done.stdout) == (0, True)
    assert path.read_text() == tuned_text(load_tuned(path)) != old
    (tmp_path / "bad.yaml").write_text("schema: 1\n")
    path.write_text(old)
    assert glac("configs", "migrate", path, tmp_path / "bad.yaml").exit_code == 1
    assert path.read_text() == old
