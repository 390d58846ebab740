"""Row format, timers, failures of rivals, table and plot data: everything that needs no GPU."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from glac import bench
from glac.cli import cli
from glac.errors import ConfigError, MissingEnvironmentError
from glac.problem import Op, Problem
from glac.reference import chunk_gla, lowrank_gate
from glac.suites import SUITES, make_problem

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PROMISED_COLUMNS = (
    "op B T H K V dtype gate gate_rank gate_dtype impl us eager_us floor_us error errors "
    "scratch_mb saved_mb config_id cubin_sha backward_config_id backward_cubin_sha date"
)
SMALL = (2, 12, 2, 16, 32)


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class FakeClock:
    """A device and a host that share one clock; calls advance it."""

    def __init__(self) -> None:
        self.now_us = 0.0
        self.broken = False

    def spend(self, us: float) -> None:
        self.now_us += us

    def event(self) -> float:
        return self.now_us

    def elapsed_us(self, start: float, end: float) -> float:
        return end - start

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.now_us += 1.0

    def seconds(self) -> float:
        return self.now_us / 1e6


class Ticking(FakeClock):
    """Each call of the host's clock takes a while, so CPU work has a duration."""

    def seconds(self) -> float:
        self.spend(1000.0)
        return super().seconds()

    def event(self) -> float:
        self.spend(100.0)
        return super().event()


def harness(clock: bench.Clock | None = None, **options: Any) -> bench.Harness:
    return bench.Harness(
        torch.device("cpu"), clock or Ticking(), lambda: None, 4e12, budget_ms=0.0, **options
    )


def remembered(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn``, without autograd computed once per q: timing loops call it dozens of times."""
    last: dict[str, Any] = {"q": None}

    def call(q: torch.Tensor, *args: Any, **options: Any) -> Any:
        if q.requires_grad:
            return fn(q, *args, **options)
        if last["q"] is not q:
            last.update(q=q, result=fn(q, *args, **options))
        return last["result"]

    return call


def lowrank_gla(
    q: Any, k: Any, v: Any, x: Any, weight: Any, bias: Any, *, normalizer: float
) -> Any:
    g = lowrank_gate(x, weight, bias, num_heads=q.shape[2], normalizer=normalizer)
    return chunk_gla(q, k, v, g)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """glac and fla played by the reference, served by a pack."""
    fla: Any = ModuleType("fla.ops.gla")
    fla.chunk_gla = remembered(chunk_gla)
    dispatch: Any = ModuleType("glac.dispatch")
    dispatch.explain = lambda problem, device, op: SimpleNamespace(
        provider="pack",
        config_id=f"c32_{op.value}",
        cubin_sha="0123abcd" if op is Op.FORWARD else "4567cdef",
        reason="exact bucket",
    )
    ours: Any = ModuleType("glac.attention")
    ours.chunk_gla, ours.chunk_gla_lowrank = remembered(chunk_gla), remembered(lowrank_gla)
    monkeypatch.setitem(sys.modules, "glac.attention", ours)
    monkeypatch.setitem(sys.modules, "glac.dispatch", dispatch)
    monkeypatch.setitem(sys.modules, "fla.ops.gla", fla)
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return SimpleNamespace(glac=ours, dispatch=dispatch, fla=fla)


def run(
    tmp_path: Path,
    impls: tuple[str, ...],
    gates: tuple[str, ...],
    ops: tuple[str, ...] = ("forward",),
    **options: Any,
) -> Any:
    out = tmp_path / "gpu.json"
    document: dict[str, Any] = {"schema": 2, "env": {}, "command": "glac bench", "rows": []}
    problems = bench.bench_problems([SMALL], gates)
    bench.run_problems(problems, ops, impls, harness(**options), document, out)
    assert json.loads(out.read_text()) == document
    return document


# ---- problems ----


def test_default_problems() -> None:
    problems = bench.bench_problems()
    assert [p.spec.gate.value for p in problems] == ["vector"] * 5 + ["lowrank"] * 2
    assert {p.spec.dtype.value for p in problems} == {"bf16"}
    assert (problems[5].B, problems[5].H, problems[5].spec.rank) == (16, 8, 16)


def test_defaults_with_another_dtype_keep_their_shapes_and_gates() -> None:
    problems = bench.bench_problems(dtype="fp16", rank=32)
    assert [p.spec.gate.value for p in problems] == ["vector"] * 5 + ["lowrank"] * 2
    assert {p.spec.dtype.value for p in problems} == {"fp16"}
    assert problems[5].spec.rank == 32


def test_problems_of_a_suite() -> None:
    assert tuple(bench.bench_problems(suite="grid")) == SUITES["grid"]
    half = bench.bench_problems(gates=("lowrank",), suite="grid")
    assert half == [p for p in SUITES["grid"] if p.spec.rank == 16]
    assert bench.bench_problems() == list(SUITES["standard"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "nope"}, "unknown suite 'nope'"),
        ({"suite": "grid", "shapes": [(1, 1, 1, 16, 16)]}, "has shapes of its own"),
        ({"suite": "grid", "rank": 16, "dtype": "bf16"}, "has dtype, rank of its own"),
        ({"suite": "lengths", "gates": ("lowrank",)}, "no problem with a lowrank gate"),
    ],
)
def test_problems_of_a_suite_refuse(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.bench_problems(**options)


def test_parse_shape() -> None:
    assert bench.parse_shape("16,2048,8,128,128") == (16, 2048, 8, 128, 128)


@pytest.mark.parametrize("text", ["", "1,2,3,4", "1,2,3,4,5,6", "a,2,3,4,5", "0,2,3,4,5"])
def test_parse_shape_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="B,T,H,K,V"):
        bench.parse_shape(text)


@pytest.mark.parametrize(
    "options",
    [
        {"ops": ("backward",)},
        {"ops": ()},
        {"impls": ("glac", "nope")},
        {"impls": ()},
        {"gates": ("head",)},
        {"dtype": "int8"},
        {"suite": "nope"},
        {"shapes": [(1, 1, 1, 1024, 16)]},
        {"shapes": [(0, 1, 1, 16, 16)]},
    ],
)
def test_run_bench_refuses_before_it_needs_a_gpu(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        bench.run_bench(out=tmp_path / "x.json", **options)


@pytest.mark.parametrize(
    ("words", "ops"),
    [
        ([], ("forward", "training")),
        (["--op", "both"], ("forward", "training")),
        (["--op", "training"], ("training",)),
    ],
)
def test_the_command_times_the_ops_asked_for(
    words: list[str], ops: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def run_bench(*args: object, **options: object) -> dict[str, Any]:
        given.update(options)
        return {"rows": []}

    monkeypatch.setattr(bench, "run_bench", run_bench)
    assert CliRunner().invoke(cli, ["bench", *words]).exit_code == 0
    assert given["ops"] == ops


def test_the_command_times_a_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def run_bench(shapes: Any, gates: Any, *args: object, **options: object) -> dict[str, Any]:
        given.update(options, shapes=shapes, gates=gates)
        return {"rows": []}

    monkeypatch.setattr(bench, "run_bench", run_bench)
    words = ["bench", "--suite", "grid", "--gate", "lowrank"]
    assert CliRunner().invoke(cli, words).exit_code == 0
    assert (given["suite"], given["gates"], given["shapes"]) == ("grid", ("lowrank",), None)
    assert (given["dtype"], given["rank"]) == (None, None)
    for more in (["--shape", "1,2,3,4,5"], ["--rank", "32"], ["--dtype", "bf16"]):
        assert CliRunner().invoke(cli, [*words, *more]).exit_code == 2


def test_suites_have_files_of_their_own() -> None:
    names = [bench.default_out(*pair).name for pair in (("h100", None), ("h100", "standard"))]
    assert names == ["h100.json"] * 2
    assert bench.default_out(None, "grid") == Path("benchmarks", "results", "gpu_grid.json")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingEnvironmentError, match="GPU") as caught:
        bench.run_bench(out=tmp_path / "x.json")
    assert caught.value.exit_code == 3
    assert "plot.py" in caught.value.hint
    assert not list(tmp_path.iterdir())


# ---- timers ----


def test_time_cuda_is_the_median_without_the_flush() -> None:
    clock = FakeClock()
    durations = iter([5.0] * 5 + [10.0, 1000.0, 30.0] * 7)

    us = bench.time_cuda(
        lambda: clock.spend(next(durations)),
        lambda: clock.spend(500.0),
        clock=clock,
        budget_ms=0.0,
        min_reps=21,
    )
    assert us == 30.0


def test_time_host_waits_for_the_device() -> None:
    clock = FakeClock()
    us = bench.time_host(
        lambda: clock.spend(10.0), lambda: clock.spend(500.0), clock=clock, budget_ms=0.0
    )
    assert us == pytest.approx(11.0)  # the call and one synchronise


@pytest.mark.parametrize(
    ("budget_ms", "expected"), [(0.0, 20), (100.0, 100), (1e9, 2000)], ids=["min", "mid", "max"]
)
def test_repetitions_follow_the_budget(budget_ms: float, expected: int) -> None:
    clock, calls = FakeClock(), 0

    def fn() -> None:
        nonlocal calls
        calls += 1
        clock.spend(999.5)  # two rounds and one synchronise: 1 ms each

    bench.time_cuda(fn, clock=clock, budget_ms=budget_ms)
    assert calls - 5 == expected


def test_device_time_prefers_the_graph() -> None:
    clock, log = FakeClock(), []

    def fn() -> dict[str, torch.Tensor]:
        log.append("eager")
        clock.spend(50.0)
        return {}

    measured = harness(clock, record=lambda fn: lambda: clock.spend(7.0)).device_us(fn)
    assert measured == (7.0, "")
    assert not log


def test_device_time_without_a_graph_says_so() -> None:
    clock = FakeClock()

    def fn() -> dict[str, torch.Tensor]:
        clock.spend(50.0)
        return {}

    def refuse(fn: bench.Step) -> Callable[[], None]:
        raise RuntimeError("a replay leaves o unwritten")

    us, note = harness(clock, record=refuse).device_us(fn)
    assert us == 50.0
    assert "no CUDA graph: RuntimeError: a replay" in note


@pytest.mark.parametrize("unwritten", [None, "o", "dq"])
def test_a_graph_must_write_every_result(
    unwritten: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = {"o": torch.zeros(3), "dq": torch.zeros(2)}

    class Graph:
        def replay(self) -> None:
            for name, result in results.items():
                if name != unwritten:
                    result.fill_(1.0)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=lambda stream: nullcontext(),
        synchronize=lambda: None,
        CUDAGraph=Graph,
        graph=lambda graph, capture_error_mode: nullcontext(),
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    if unwritten is None:
        bench.record_graph(lambda: results)()
        assert all(bool((result == 1.0).all()) for result in results.values())
    else:
        with pytest.raises(RuntimeError, match=f"leaves {unwritten} unwritten"):
            bench.record_graph(lambda: results)


# ---- rows ----


def test_columns() -> None:
    assert " ".join(bench.COLUMNS) == f"{PROMISED_COLUMNS} note"


@pytest.mark.usefixtures("fakes")
def test_rows(tmp_path: Path) -> None:
    document = run(tmp_path, ("glac", "fla"), ("vector", "lowrank"))
    rows = document["rows"]
    assert [(r["gate"], r["impl"]) for r in rows] == [
        (gate, impl) for gate in ("vector", "lowrank") for impl in ("yardstick", "glac", "fla")
    ]
    for row in rows:
        assert list(row) == list(bench.COLUMNS)
        assert row["op"] == "forward"
        assert tuple(row[c] for c in "BTHKV") == SMALL
        problem = bench.bench_problems([SMALL], [row["gate"]])[0]
        assert row["floor_us"] == pytest.approx(problem.bytes(Op.FORWARD) / 4e12 * 1e6)
        assert 0 < row["error"] < 2e-2
        assert row["errors"] == {"o": row["error"]}
        assert (row["us"] is None) == (row["impl"] == "yardstick")
    ours = rows[1]
    assert (ours["config_id"], ours["cubin_sha"]) == ("c32_forward", "0123abcd")
    assert (ours["backward_config_id"], ours["backward_cubin_sha"]) == (None, None)
    assert "first call" in rows[2]["note"]
    assert "separate gate" in rows[5]["note"]
    assert (rows[5]["gate_rank"], rows[5]["gate_dtype"]) == (16, "bf16")


@pytest.mark.usefixtures("fakes")
def test_glac_behind_a_gate_of_its_own(tmp_path: Path) -> None:
    """What a layer pays that hands dense kernels a gate from a low-rank projection."""
    assert set(bench.ALL_IMPLS) == set(bench._BUILDERS)
    impls = ("glac", "glac-dense")
    rows = run(tmp_path, impls, ("vector", "lowrank"), ("forward", "training"))["rows"]
    apart = [r for r in rows if r["impl"] == "glac-dense"]
    assert [(r["gate"], r["op"]) for r in apart] == [
        (gate, op) for gate in ("vector", "lowrank") for op in ("forward", "training")
    ]
    for row in apart:
        if row["gate"] == "vector":
            assert row["us"] is None
            assert "for low-rank gates" in row["note"]
        else:
            assert row["us"] is not None
            assert 0 < row["error"] < 2e-2
            assert "separate gate" in row["note"]


@pytest.mark.usefixtures("fakes")
def test_training_rows(tmp_path: Path) -> None:
    gates = {"vector": ["dg"], "lowrank": ["dx", "dweight", "dbias"]}
    rows = run(tmp_path, ("glac", "fla"), tuple(gates), ("forward", "training"))["rows"]
    assert [(r["gate"], r["op"], r["impl"]) for r in rows] == [
        (gate, op, impl)
        for gate in gates
        for op in ("forward", "training")
        for impl in ("yardstick", "glac", "fla")
    ]
    for row in rows:
        if row["op"] == "forward":
            continue
        problem = bench.bench_problems([SMALL], [row["gate"]])[0]
        moved = problem.bytes(Op.FORWARD) + problem.bytes(Op.BACKWARD)
        assert row["floor_us"] == pytest.approx(moved / 4e12 * 1e6)
        assert list(row["errors"]) == ["dq", "dk", "dv", *gates[row["gate"]]]
        assert row["error"] == max(row["errors"].values())
        assert 0 < row["error"] < 3e-2
        assert (row["us"] is None) == (row["impl"] == "yardstick")
    ours = rows[4]
    assert (ours["config_id"], ours["cubin_sha"]) == ("c32_forward", "0123abcd")
    assert ours["backward_config_id"] == "c32_backward"
    assert ours["backward_cubin_sha"] == "4567cdef"


def test_training_without_a_gradient_is_a_note(fakes: SimpleNamespace, tmp_path: Path) -> None:
    fakes.fla.chunk_gla = lambda q, k, v, g: (chunk_gla(q, k, v, g.detach())[0], None)
    row = run(tmp_path, ("fla",), ("vector",), ("training",))["rows"][0]
    assert row["us"] is None
    assert "RuntimeError" in row["note"]


def test_the_worst_gradient_is_the_error(fakes: SimpleNamespace, tmp_path: Path) -> None:
    def wrong(q: Any, k: Any, v: Any, g: Any) -> Any:
        return chunk_gla(q, k, 2 * v - v.detach(), g)

    fakes.fla.chunk_gla = wrong
    row = run(tmp_path, ("fla",), ("vector",), ("training",))["rows"][0]
    assert row["error"] == row["errors"]["dv"] == pytest.approx(1.0, rel=0.1)
    assert row["errors"]["dq"] < 3e-2


def test_gradients_are_those_of_autograd_in_fp64() -> None:
    problem = bench.bench_problems([SMALL], ["lowrank"], dtype="fp32")[0]
    work = bench.Work(problem, torch.device("cpu"))
    leaves = [t.double().requires_grad_() for t in work.tensors.values()]
    q, k, v, *gate = leaves
    o = chunk_gla(q, k, v, lowrank_gate(*gate, num_heads=SMALL[2]))[0]
    expected = torch.autograd.grad(o, leaves, work.do_first.double())
    assert bool((work.do[1] != 0).any())
    results = dict(zip(work.truth("training"), expected, strict=True))
    assert max(work.errors("training", results).values()) < 1e-10


class ScriptedMemory:
    """Bytes before the call and between the passes, and the peak of the call."""

    def __init__(self, allocated: list[int], peak: int) -> None:
        self.values, self.highest, self.resets = iter(allocated), peak, 0

    def allocated(self) -> int:
        return next(self.values)

    def reset_peak(self) -> None:
        self.resets += 1

    def peak(self) -> int:
        assert self.resets == 1
        return self.highest


def test_memory_beyond_inputs_and_results() -> None:
    work = bench.Work(bench.bench_problems([SMALL])[0], torch.device("cpu"))
    call = bench.Call(lambda q, k, v, g: chunk_gla(q, k, v, g)[0], work.tensors, work.do)
    B, T, H, K, V = SMALL
    o, gradients = 2 * B * T * H * V, 2 * B * T * H * (3 * K + V)
    before = 1_000_000
    memory = ScriptedMemory([before, before + o + 300], before + o + gradients + 5000)
    values = bench.measure_memory(call, "training", memory)
    assert values == {"scratch_mb": 5000 / 1e6, "saved_mb": 300 / 1e6}
    with torch.no_grad():
        memory = ScriptedMemory([before, before + o], before + o + 700)
        assert bench.measure_memory(call, "forward", memory) == {"scratch_mb": 700 / 1e6}


def test_attention_at_equal_width(tmp_path: Path) -> None:
    rows = run(tmp_path, ("fa2",), ("vector",), ("forward", "training"))["rows"]
    assert [row["op"] for row in rows] == ["forward", "training"]
    for row in rows:
        assert "2 heads of 32" in row["note"]
        assert row["us"] is not None
        assert (row["error"], row["errors"]) == (None, {})
    wide = bench.bench_problems([(1, 8, 4, 16, 256)])[0]
    shapes = {tuple(t.shape) for t in bench.Work(wide, torch.device("cpu")).attention}
    assert shapes == {(1, 8, 8, 128)}


def test_other_providers_are_named(fakes: SimpleNamespace, tmp_path: Path) -> None:
    fakes.dispatch.explain = lambda problem, device, op: SimpleNamespace(
        provider="torch", reason="no pack", config_id="torch-chunk", cubin_sha=""
    )
    row = run(tmp_path, ("glac",), ("vector",))["rows"][1]
    assert "forward served by torch (no pack)" in row["note"]
    assert row["cubin_sha"] is None


def test_missing_fla_is_a_note(
    fakes: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    for name in ("fla", "fla.ops", "fla.ops.gla"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delenv("FLA_CACHE_RESULTS", raising=False)
    rows = run(tmp_path, ("fla", "glac"), ("vector",))["rows"]
    missing = next(r for r in rows if r["impl"] == "fla")
    assert missing["us"] is None
    assert "pip install flash-linear-attention" in missing["note"]
    assert next(r for r in rows if r["impl"] == "glac")["us"] is not None
    assert "FLA_CACHE_RESULTS" not in os.environ


def test_a_failing_rival_stops_nothing(fakes: SimpleNamespace, tmp_path: Path) -> None:
    def fail(*args: Any) -> Any:
        raise ValueError("no such luck\nsecond line")

    fakes.fla.chunk_gla = fail
    rows = run(tmp_path, ("fla", "glac"), ("vector",))["rows"]
    assert [r["us"] is None for r in rows] == [True, True, False]
    assert rows[1]["note"] == "ValueError: no such luck"


def test_a_dead_gpu_is_named_once_and_not_used_again(
    fakes: SimpleNamespace, tmp_path: Path
) -> None:
    clock = Ticking()

    def crash(*args: Any) -> Any:
        clock.broken = True
        raise RuntimeError("illegal memory access")

    fakes.fla.chunk_gla = crash
    rows = run(tmp_path, ("fla", "glac"), ("vector", "lowrank"), clock=clock)["rows"]
    notes = {(r["gate"], r["impl"]): r["note"] for r in rows}
    assert "illegal memory access" in notes["vector", "fla"]
    assert "in the call of fla" in notes["vector", "glac"]
    assert "in the call of fla" in notes["lowrank", "yardstick"]


def test_a_nan_output_is_a_note(fakes: SimpleNamespace, tmp_path: Path) -> None:
    fakes.fla.chunk_gla = lambda q, k, v, g: (torch.full_like(v, math.nan), None)
    row = run(tmp_path, ("fla",), ("vector",))["rows"][0]
    assert (row["error"], row["errors"]) == (None, {"o": None})
    assert "error of o is nan" in row["note"]


@pytest.mark.usefixtures("fakes")
def test_the_file_is_replaced_after_each_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    write = bench.write_results

    def watch(path: Path, document: Any) -> None:
        write(path, document)
        counts.append(len(json.loads(path.read_text())["rows"]))

    monkeypatch.setattr(bench, "write_results", watch)
    run(tmp_path, ("glac", "fla"), ("vector",))
    assert counts == [2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["gpu.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    bench.write_results(out, {"rows": [1]})
    with pytest.raises(ValueError, match="JSON"):
        bench.write_results(out, {"rows": [math.nan]})
    assert json.loads(out.read_text()) == {"rows": [1]}


def test_command_holds_no_folder_of_the_interpreter() -> None:
    assert bench._command(["/a/b/bin/glac", "bench", "--gate", "x"]) == "glac bench --gate x"
    assert bench._command(["/a/b/glac/__main__.py", "bench"]) == "glac bench"


def test_autotune_patch_is_undone() -> None:
    autotuner = pytest.importorskip("triton.runtime.autotuner").Autotuner
    before = autotuner.__dict__["do_bench"]

    def tune_and_fail() -> None:
        with bench.quick_autotune():
            assert isinstance(autotuner.__dict__["do_bench"], property)
            raise KeyError

    with pytest.raises(KeyError):
        tune_and_fail()
    assert autotuner.__dict__["do_bench"] is before


# ---- table and plot ----


def row(impl: str, us: float | None, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        **{"op": "forward", "B": 8, "T": 2048, "H": 16, "K": 64, "V": 64, "dtype": "bf16"},
        **{"gate": "vector", "gate_rank": 0, "gate_dtype": "bf16", "impl": impl, "us": us},
        **{"eager_us": us, "floor_us": 50.0, "error": None, "config_id": None},
        **{"cubin_sha": None, "date": "2026-01-02T03:04:05+00:00", "note": ""},
    }
    return {**values, **changes}


ROWS = [
    row("yardstick", None, error=2.0e-3),
    row("glac", 100.0, error=2.1e-3),
    row("fla", 400.0, error=3e-3),
    row("cudnn", None, note="RuntimeError: no kernel " + "x" * 80),
    row("glac", 80.0, gate="lowrank", gate_rank=16, floor_us=40.0),
]
TRAINING = [
    row("glac", 300.0, op="training", floor_us=150.0),
    row("fla", 900.0, op="training", floor_us=150.0),
]


def test_format_table() -> None:
    lines = bench.format_table([*ROWS, *TRAINING]).splitlines()
    header = "op shape gate impl us x floor speed-up error note"
    assert " ".join(lines[0].split()) == header
    first = "forward 8,2048,16,64,64 vector"
    assert " ".join(lines[2].split()) == f"{first} yardstick - - - 2.0e-03"
    assert " ".join(lines[3].split()) == f"{first} glac 100.0 2.00 1.00x 2.1e-03"
    assert " ".join(lines[4].split()) == f"{first} fla 400.0 8.00 4.00x 3.0e-03"
    assert lines[5].split()[4:8] == ["-"] * 4
    assert lines[5].endswith("...")
    assert lines[6].split()[2:7] == ["lowrank16", "glac", "80.0", "2.00", "1.00x"]
    assert lines[8].split()[0] == "training"
    assert lines[8].split()[3:7] == ["fla", "900.0", "6.00", "3.00x"]


def test_format_table_of_nothing() -> None:
    assert bench.format_table([]).startswith("op  shape")


def document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    env = {"gpu": "NVIDIA H200", "copy_bandwidth": 4.2e12, "torch": "2.11.0", "glac": "0.1.0"}
    return {"schema": bench.SCHEMA, "env": env, "command": "glac bench", "rows": rows}


def test_plot_data_over_floor() -> None:
    data = script("plot").plot_data(document(ROWS))
    (panel,) = data.panels
    assert panel.title == "forward"
    assert len(panel.groups) == 2
    assert "low-rank gate, R = 16" in panel.groups[1]
    assert [(s.label, s.values) for s in panel.series] == [
        ("glac", (2.0, 2.0)),
        ("flash-linear-attention", (8.0, None)),
    ]
    assert panel.floors == (1.0, 1.0)
    for part in ("NVIDIA H200", "bf16", "2026-01-02"):
        assert part in data.title


def test_plot_data_in_us() -> None:
    (panel,) = script("plot").plot_data(document(ROWS), "us").panels
    assert panel.series[0].values == (100.0, 80.0)
    assert panel.floors == (50.0, 40.0)


def test_plot_data_of_both_ops() -> None:
    plot = script("plot")
    assert tuple(plot.OPS) == bench.OPS
    both = document([*ROWS, *TRAINING[:1]])
    forward, training = plot.plot_data(both).panels
    assert [s.label for s in training.series] == [s.label for s in forward.series]
    assert [s.values for s in training.series] == [(2.0,), (None,)]
    assert plot.plot_data(both, ops=("training",)).panels[0].groups == training.groups


def test_plot_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    source = tmp_path / "h200.json"
    source.write_text(json.dumps(document([*ROWS, *TRAINING])))
    assert script("plot").main([str(source)]) == 0
    picture = tmp_path / "h200.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.strip() == str(picture)


def timed(problems: Sequence[Problem], op: str, impls: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for index, p in enumerate(problems):
        for impl in impls:
            row = {
                **{"op": op, "B": p.B, "T": p.T, "H": p.H, "K": p.spec.K, "V": p.spec.V},
                **{"dtype": "bf16", "gate": p.spec.gate.value, "gate_rank": p.spec.rank},
                **{"gate_dtype": "bf16", "impl": impl, "us": 100.0 + index, "floor_us": 50.0},
                "date": "2026-01-02",
            }
            rows.append(row)
    return rows


def test_many_problems_become_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    plot = script("plot")
    drawn = []
    for name in ("_draw_panel", "_draw_dots"):
        real = getattr(plot, name)

        def seen(*args: Any, name: str = name, real: Any = real) -> Any:
            drawn.append(name)
            return real(*args)

        monkeypatch.setattr(plot, name, seen)
    for count, way in ((8, "_draw_panel"), (9, "_draw_dots"), (20, "_draw_dots")):
        rows = timed(SUITES["grid"][:count], "forward", ("glac", "fla"))
        rows += timed(SUITES["grid"][: count - 1], "training", ("glac",))
        data = plot.plot_data(document(rows))
        assert [len(panel.groups) for panel in data.panels] == [count, count - 1]
        plot.draw(data, tmp_path / "x.png")
        assert drawn == [way] * 2
        drawn.clear()


def test_times_over_the_length() -> None:
    plot = script("plot")
    lengths = SUITES["lengths"]
    rows = timed(lengths[::-1], "forward", ("fla", "glac"))
    for row in rows:
        if row["impl"] == "fla" and row["T"] > 65536:
            row["us"] = None
    (panel,) = plot.line_data(document(rows)).panels
    assert panel.title == "forward\n131072 tokens, 16 heads of 128 x 128, vector gate"
    assert [line.label for line in panel.lines] == [
        *("glac", "flash-linear-attention", "memory floor"),
    ]
    ours, theirs, floor = panel.lines
    assert ours.lengths == floor.lengths == tuple(1024 << i for i in range(8))
    assert ours.values == tuple(107.0 - i for i in range(8))
    assert theirs.lengths == ours.lengths[:-1]
    assert set(floor.values) == {50.0}


def test_sizes_of_one_plot_have_lines_of_their_own() -> None:
    small = [make_problem((64 // n, 1024 * n, 2, 64, 64)) for n in (1, 2)]
    rows = timed([*SUITES["lengths"], *small], "training", ("glac",))
    (panel,) = script("plot").line_data(document(rows)).panels
    assert panel.title == "training: forward and backward"
    assert [line.label.partition(", ")[0] for line in panel.lines] == ["glac", "memory floor"] * 2
    assert len({line.label for line in panel.lines}) == 4
    assert [line.dash for line in panel.lines] == ["-", "-", "--", "--"]


def test_plot_command_against_the_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    plot, source = script("plot"), tmp_path / "lengths.json"
    source.write_text(json.dumps(document(timed(SUITES["lengths"], "forward", ("glac",)))))
    assert plot.main([str(source), "--against", "T"]) == 0
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    source.write_text(json.dumps(document(ROWS)))
    assert plot.main([str(source), "--against", "T"]) == 1
    assert "times at two lengths" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plot.main([str(source), "--against", "T", "--metric", "us"])


def test_saved_results_can_be_drawn() -> None:
    saved = json.loads((BENCHMARKS / "results" / "h200.json").read_text())
    assert {tuple(row) for row in saved["rows"]} == {bench.COLUMNS}
    assert len(script("plot").plot_data(saved).panels[0].groups) == 7


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 2}'])
def test_plot_refuses(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "bad.json"
    source.write_text(text)
    assert script("plot").main([str(source)]) == 1
    assert "bad.json cannot be drawn" in capsys.readouterr().err


# ---- warming fla ----


class FakeTuner:
    """As much of Triton's autotuner as the warm-up uses."""

    def __init__(self, configs: int) -> None:
        self.arg_names = ["q"]
        self.configs = [
            SimpleNamespace(all_kwargs=lambda i=i: {"BK": i}, i=i) for i in range(configs)
        ]
        self.base_fn = SimpleNamespace(__name__="kernel")
        self.fn = SimpleNamespace(run=self.compile)
        self.seen: list[int] = []
        self.nargs: Any = None

    def prune_configs(self, kwargs: dict[str, Any]) -> list[Any]:
        return self.configs

    def compile(self, *args: Any, grid: Any, warmup: bool, BK: int) -> None:
        assert warmup, "a candidate must not be launched"
        self.seen.append(BK)
        if BK == 3:
            raise RuntimeError("out of shared memory")


def test_warm_processes_share_the_candidates(tmp_path: Path) -> None:
    fla_warm = script("fla_warm")
    tuner = FakeTuner(6)
    first, second = fla_warm.Compiler(tmp_path), fla_warm.Compiler(tmp_path)
    for i in (4, 5):
        path_owner = f" 1 kernel {tuner.configs[i]}"
        assert second.claim(path_owner)
    for compiler in (first, second):
        compiler.run(tuner, 1, grid=(1,), warmup=False)
    assert sorted(tuner.seen) == [0, 1, 2, 3]
    assert (first.compiled, second.compiled) == (3, 0)
    assert "out of shared memory" in first.errors[0]
    first.run(tuner, 1, grid=(1,), warmup=False)  # the next call may have other dtypes
    assert len(tuner.seen) == 10


@pytest.mark.parametrize("backward", [False, True])
def test_warm_walks_both_passes(
    backward: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    autotuner = pytest.importorskip("triton.runtime.autotuner").Autotuner
    monkeypatch.setattr(autotuner, "run", autotuner.run)  # both are put back afterwards
    monkeypatch.setenv("FLA_CACHE_RESULTS", "1")
    forward, gradient = FakeTuner(2), FakeTuner(3)

    class Rival(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any, g: Any) -> Any:
            autotuner.run(forward, q, grid=(1,), warmup=False)
            return torch.empty_like(v)

        @staticmethod
        def backward(ctx: Any, do: Any) -> Any:
            autotuner.run(gradient, do, grid=(1,), warmup=False)
            return tuple(torch.empty(1, 256, 2, D) for D in (16, 16, 32, 16))

    fla: Any = ModuleType("fla.ops.gla")
    fla.chunk_gla = lambda *tensors: (Rival.apply(*tensors), None)  # type: ignore[no-untyped-call]
    monkeypatch.setitem(sys.modules, "fla.ops.gla", fla)
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    done = script("fla_warm").compile_shard(
        [(1, 2048, 2, 16, 32)],
        tmp_path,
        dtype="bfloat16",
        gate_dtype="float32",
        backward=backward,
        device="cpu",
    )
    assert (forward.seen, gradient.seen) == ([0, 1], [0, 1, 2] if backward else [])
    assert done.errors == []


def test_warm_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script("fla_warm").main(["--shape", "1,256,2,64,64"]) == 3
    assert "no CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("gate", ["vector", "lowrank", "scalar"])
@pytest.mark.parametrize("op", bench.ALL_OPS)
def test_every_gate_and_op_runs_glac_itself(gate: str, op: str) -> None:
    (problem,) = bench.bench_problems([(2, 33, 2, 16, 16)], [gate], dtype="fp32")
    work = bench.Work(problem, torch.device("cpu"))
    call = bench._BUILDERS["glac"](work, op)
    with torch.set_grad_enabled(op == "training"):
        results = call.step(op, work.do_first)()
    errors = work.errors(op, results)
    assert set(errors) == ({"o"} if op != "training" else {f"d{name}" for name in work.tensors})
    assert max(errors.values()) < 1e-5
    assert all(math.isfinite(e) for e in work.yardstick_errors(op).values())
    assert len(bench.passes(op, problem.spec.gate)) == (2 if op == "training" else 1)


def test_rivals_do_not_decode() -> None:
    (problem,) = bench.bench_problems([(2, 1, 2, 16, 16)], ["scalar"])
    row = bench.measure("fla", bench.Work(problem, torch.device("cpu")), harness(), "decode")
    assert row.us is None
    assert "not for fla" in row.note
