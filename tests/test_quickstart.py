"""The quickstart: the whole CPU run as a user starts it, and the GPU steps with fakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glac import dispatch, quickstart
from glac.dispatch import Decision
from glac.errors import MissingEnvironmentError
from glac.gpus import GPUS
from glac.kernelspec import KernelSpec
from glac.pack import read_pack
from glac.problem import Op
from glac.settings import load_settings
from tests.helpers_packs import FAKE_TOOLS, fake_compiled

ROOT = Path(__file__).resolve().parent.parent


class Page:
    """What a run prints."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self, text: str) -> None:
        self.text += text + "\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLAC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("GLAC_PACK_PATH", raising=False)
    monkeypatch.delenv("GLAC_REQUIRE_AOT", raising=False)
    dispatch.clear()


@pytest.fixture
def fake_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_many(
        kernels: Iterable[KernelSpec], jobs: int | None = None, on_done: Any = None
    ) -> Any:
        results = {kernel: fake_compiled(kernel) for kernel in kernels}
        for kernel, built in results.items():
            if on_done:
                on_done(kernel, built)
        return results

    monkeypatch.setattr("glac.compile.compile_many", compile_many)
    monkeypatch.setattr("glac.compile.toolchain", lambda: FAKE_TOOLS)


@pytest.fixture
def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "ON_CPU", (quickstart.SINGLE, quickstart.ON_CPU[1]))


@pytest.mark.slow
def test_cpu_run_as_a_user_starts_it(tmp_path: Path) -> None:
    if not dispatch.can_build():
        pytest.skip("needs the extra build")
    # A compiler cache of its own would double the time; the packs are the run's own.
    done = subprocess.run(
        [sys.executable, "-m", "glac", "quickstart", "--cpu", "--out", str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "GLAC_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for arch in ("sm_90a", "sm_80"):
        pack = read_pack(tmp_path / "out" / arch)
        assert len(pack.rows) == len(quickstart.CROSS_BUILT)
        for name, kernel in pack.kernels.items():
            assert pack.read_cubin(name).startswith(b"\x7fELF")
            (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{name} ")]
            facts = (kernel.registers, kernel.spill_bytes, kernel.shared, kernel.size)
            assert line.split()[1:5] == [str(fact) for fact in facts]
    assert "on an H100 with these packs" in done.stdout
    count = len(quickstart.ON_CPU)
    assert f"{count} of {count} results within budget" in done.stdout
    assert "skipped" not in done.stdout
    assert f"[1/{len(pack.kernels)}" not in done.stdout


@pytest.mark.usefixtures("fake_compiler", "few_runs")
def test_cpu_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    page, progress = Page(), Page()
    report = quickstart.run_quickstart(page, progress)
    assert (report.mode, report.missing) == ("cpu", [])
    assert [pack["arch"] for pack in report.packs] == ["sm_90a", "sm_80"]
    assert Path(report.packs[0]["path"]) == tmp_path / "cache" / "quickstart" / "sm_90a"
    served = [decision["provider"] for decision in report.decisions]
    assert served[: len(quickstart.CROSS_BUILT)] == ["pack"] * len(quickstart.CROSS_BUILT)
    assert all(run.passed for run in report.runs)
    data = json.loads(json.dumps(report.to_dict()))
    assert all(run["passed"] for run in data["runs"])
    assert "glac build` makes all" in page.text
    # Outside the run, dispatch is as it was.
    assert "GLAC_PACK_PATH" not in os.environ


@pytest.mark.usefixtures("few_runs")
def test_without_a_compiler_the_rest_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def toolchain() -> None:
        raise MissingEnvironmentError("no Triton", hint="get it")

    monkeypatch.setattr("glac.compile.toolchain", toolchain)
    page = Page()
    report = quickstart.run_quickstart(page, Page(), use_gpu=False)
    assert report.useful
    assert (report.packs, report.missing) == ([], ["building packs: no Triton (get it)"])
    assert "no pack was built: no Triton" in page.text
    assert "skipped: building packs" in report.summary()
    assert all(run.passed for run in report.runs)


def test_a_result_beyond_its_budget_fails() -> None:
    good = quickstart.Run("p", None, None, 1e-3, 2e-3, "torch")
    assert good.passed
    assert not replace(good, error=3e-3).passed
    assert not replace(good, error=float("nan")).passed
    assert not replace(good, error=None).passed


@pytest.mark.usefixtures("fake_compiler")
def test_gpu_steps_tune_build_and_serve_from_the_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    from glac.tuning import fleet, run, space
    from glac.tuning.evaluate import ReplayEvaluator

    gpu = GPUS["h100"]
    few = space.space(quickstart.TUNED, gpu, "quick").configs
    times = {config.slug: 100.0 - 5 * index for index, config in enumerate(few)}
    monkeypatch.setattr(fleet, "WorkerEvaluator", lambda *a, **o: ReplayEvaluator(times))
    monkeypatch.setattr(run, "check_measurable", lambda *a: gpu.arch)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    page, report = Page(), quickstart.Report("gpu", "fake")
    quickstart._build_here(report, gpu, tmp_path, 1, True, page, Page())
    assert report.missing == []
    assert report.tuned is not None
    assert report.tuned["config_id"] == few[-1].slug
    pack = read_pack(tmp_path / "sm_90a")
    rows = {(row.spec, row.source): row.config for row in pack.rows}
    assert rows[quickstart.TUNED.spec, "tuned"] == few[-1]
    assert len(rows) == 3
    with quickstart._packs_first(tmp_path):
        settings = load_settings()
        for problem in (quickstart.TUNED, quickstart.LOWRANK, quickstart.ODD, quickstart.SINGLE):
            assert dispatch.decide(problem, gpu, settings=settings).path == str(
                tmp_path / "sm_90a"
            )
    assert "GLAC_PACK_PATH" not in os.environ
    assert "tuned B=16 T=2048" in page.text


@pytest.mark.usefixtures("fake_compiler")
def test_gpu_steps_without_optuna_use_shipped_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("glac.tuning.study")

    def import_optuna() -> None:
        raise MissingEnvironmentError("no Optuna", hint="get it")

    monkeypatch.setattr("glac.tuning.study.import_optuna", import_optuna)
    report = quickstart.Report("gpu", "fake")
    quickstart._build_here(report, GPUS["h200"], tmp_path, 1, True, Page(), Page())
    assert report.missing == ["tuning: no Optuna (get it); shipped configs are used"]
    assert {row.gpu for row in read_pack(tmp_path / "sm_90a").rows} == {"h200"}


def test_gpu_results_are_timed_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(impl: str, work: Any, harness: Any) -> Any:
        wrong = work.problem is quickstart.ODD
        return SimpleNamespace(us=99.5, floor_us=50.0, error=1.0 if wrong else 1e-3, note="")

    harness = SimpleNamespace(device="cpu")
    monkeypatch.setattr("glac.bench.cuda_harness", lambda **options: harness)
    monkeypatch.setattr("glac.bench.measure", measure)
    monkeypatch.setattr("glac.bench.measure_yardstick", lambda *a: SimpleNamespace(error=1e-3))
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    decision = Decision(Op.FORWARD, "pack", None, "c32", "", {}, "", "")
    monkeypatch.setattr("glac.dispatch.explain", lambda *a: decision)
    page, report = Page(), quickstart.Report("gpu", "fake")
    quickstart._run_on_gpu(report, page, Page())
    assert [run.passed for run in report.runs] == [True, True, False, True]
    assert {run.served_by for run in report.runs} == {"pack c32"}
    assert "99.5" in page.text
    assert " NO " in page.text
