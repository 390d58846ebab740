"""The build: tuned rows as certified, heuristic rows that fit, the same pack with any jobs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glac import build
from glac.build import build_packs, build_single
from glac.compile import CompiledKernel
from glac.configs import (
    BackwardConfig,
    ChunkKernelConfig,
    Config,
    ForwardConfig,
    TileKernelConfig,
    default_backward,
    default_config,
    is_legal,
    leads,
    without_way,
)
from glac.dispatch import miss_config
from glac.errors import CompileError, ConfigError, GlacError, MissingEnvironmentError, PackError
from glac.gpus import GPUS
from glac.kernelspec import KernelSpec
from glac.pack import read_pack
from glac.problem import DType, Gate, Op, Problem
from glac.suites import make_problem
from glac.templates import templates_sha256
from glac.tuned import TunedFile, dump_tuned
from tests.helpers_packs import (
    BACKWARD,
    FAKE_TOOLS,
    VECTOR,
    WHOLE,
    fake_compiled,
    tuned_file,
    tuned_row,
)

TINY = Problem(VECTOR, 2, 512, 16)
Compiler = Callable[[KernelSpec], CompiledKernel | GlacError]


class FakeToolchain:
    """In place of ``compile_many``: fast, and failing where a test wants it."""

    def __init__(self) -> None:
        self.compile: Compiler = fake_compiled
        self.compiled: list[KernelSpec] = []

    def __call__(
        self,
        kernels: Iterable[KernelSpec],
        jobs: int | None = None,
        on_done: Callable[[KernelSpec, CompiledKernel | GlacError], None] | None = None,
    ) -> dict[KernelSpec, CompiledKernel | GlacError]:
        results = {}
        for kernel in kernels:
            self.compiled.append(kernel)
            results[kernel] = self.compile(kernel)
            if on_done:
                on_done(kernel, results[kernel])
        return results


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeToolchain:
    fake = FakeToolchain()
    monkeypatch.setattr(build, "compile_many", fake)
    monkeypatch.setattr(build, "toolchain", lambda: FAKE_TOOLS)
    return fake


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A folder with a tuned file for h100 alone."""
    folder = tmp_path / "configs"
    folder.mkdir()
    dump_tuned(tuned_file(), folder / "h100.yaml")
    return folder


@pytest.fixture
def uncut(monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward rows beyond those that were tuned or stand for the standard problems."""
    monkeypatch.setattr(build, "_cut_rows", lambda gpu, rows: ())


def _files(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file()
    }


def test_tuned_rows(
    fake: FakeToolchain,
    uncut: None,
    configs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "STANDARD_PROBLEMS", ())  # no rows of ops that were not tuned
    seen: list[tuple[int, int, str]] = []
    (result,) = build_packs(
        ["h100"], tmp_path / "out", progress=lambda *args: seen.append(args), configs_dir=configs
    )
    assert result.path == tmp_path / "out" / "sm_90a"
    assert read_pack(result.path) == result.pack
    assert result.warnings == ()
    assert {row.source for row in result.pack.rows} == {"tuned"}
    assert {row.measured_on for row in result.pack.rows} == {"Some GPU"}
    assert [row.config for row in sorted(result.pack.rows, key=lambda r: r.spec.gate)] == [
        row.config for row in tuned_file().rows
    ]
    assert [(done, total) for done, total, _ in seen] == [(i, 4) for i in range(1, 5)]
    facts = result.facts
    assert [fact.name for fact in facts] == sorted(result.pack.kernels)
    assert facts[0].size == len(facts[0].name)


def test_one_pack_for_each_arch(
    fake: FakeToolchain,
    uncut: None,
    configs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    standard = {(problem.spec, problem.bucket) for problem in build.STANDARD_PROBLEMS}
    results = build_packs(["h200", "h100", "a100", "H100"], tmp_path, configs_dir=configs)
    assert [result.pack.arch for result in results] == ["sm_80", "sm_90a"]
    # Relatives share code: h200 adds rows but no kernels.
    monkeypatch.setattr(build, "STANDARD_PROBLEMS", ())
    (result,) = build_packs(["h200", "h100"], tmp_path / "tuned", configs_dir=configs)
    hopper = result.pack
    assert {(row.gpu, row.source) for row in hopper.rows} == {
        ("h100", "tuned"),
        ("h200", "heuristic"),
    }
    assert len(hopper.rows) == 4
    assert len(hopper.kernels) == 4
    ampere = results[0].pack
    assert {(row.gpu, row.source, row.measured_on) for row in ampere.rows} == {
        ("a100", "heuristic", "")
    }
    assert {(row.spec, row.bucket) for row in ampere.rows} == standard


@pytest.mark.parametrize("op", list(Op))
def test_standard_configs_are_legal_everywhere(op: Op) -> None:
    for gpu in GPUS.values():
        for problem in build.STANDARD_PROBLEMS:
            if not op.serves(problem.spec.gate):
                continue
            config = default_config(op, problem.spec, gpu, problem.bucket)
            assert is_legal(problem.spec, config, gpu)


def test_each_op_has_rows_of_its_own(fake: FakeToolchain, uncut: None, tmp_path: Path) -> None:
    # h100 has forward rows, its relative h200 has both, of a further problem.
    other = Problem(VECTOR, 1, 512, 1)
    hashes = templates_sha256(Op)
    made: dict[str, tuple[Problem, list[Config]]] = {
        "h100": (TINY, [WHOLE]),
        "h200": (other, [WHOLE, BACKWARD]),
    }
    for name, (problem, tuned) in made.items():
        file = tuned_file(name)
        rows = tuple(tuned_row(problem, config, name) for config in tuned)
        kept = {op: hashes[op] for op in {row.op for row in rows}}
        environment = replace(file.environment, templates_sha256=kept)
        dump_tuned(replace(file, environment=environment, rows=rows), tmp_path / f"{name}.yaml")
    (result,) = build_packs(["h100"], tmp_path / "out", configs_dir=tmp_path)
    passes = [row for row in result.pack.rows if row.op in (Op.FORWARD, Op.BACKWARD)]
    assert [(row.op, row.source, row.bucket) for row in passes] == [
        (Op.FORWARD, "tuned", TINY.bucket),
        (Op.BACKWARD, "heuristic", other.bucket),
    ]
    (result,) = build_packs(["a100"], tmp_path / "out", configs_dir=tmp_path)
    standard = [(op, p.bucket) for p in build.STANDARD_PROBLEMS for op in p.ops]
    assert sorted((row.op, row.bucket) for row in result.pack.rows) == sorted(standard)
    # Another binary of one op only concerns that op.
    fake.compile = lambda k: (_other_binary if k.template == "gla_bwd" else fake_compiled)(k)
    with pytest.raises(CompileError, match=r"h200\.yaml: gla_bwd_k16"):
        build_packs(["h100"], tmp_path / "out", configs_dir=tmp_path, fresh=True)


@pytest.mark.parametrize("gpu", list(GPUS))
def test_every_specialisation_has_kernels_that_cut_sequences(gpu: str) -> None:
    rows = [row for row in build._planned(GPUS[gpu], None)[0] if row.config.op is Op.FORWARD]
    assert rows
    for spec in {row.problem.spec for row in rows}:
        cutting = [
            row
            for row in rows
            if row.problem.spec == spec and isinstance(row.config, ForwardConfig)
            if row.config.summary is not None
        ]
        assert cutting
        for row in cutting:
            assert is_legal(spec, row.config, GPUS[gpu])
            # Those that nobody measured are no more than guesses.
            assert row.source == "heuristic" or row.measured_on


def test_a_row_that_cuts_is_made_of_the_nearest_one(
    fake: FakeToolchain, configs: Path, tmp_path: Path
) -> None:
    (result,) = build_packs(["h100"], tmp_path, configs_dir=configs)
    forward = [row for row in result.pack.rows if row.op is Op.FORWARD]
    (made,) = [row for row in forward if row.source == "heuristic"]
    (near,) = [row for row in forward if row.spec == made.spec and row is not made]
    assert isinstance(made.config, ForwardConfig)
    assert isinstance(near.config, ForwardConfig)
    assert made.bucket == Problem(made.spec, *build._LONG).bucket
    assert near.config == replace(made.config, segment=0, summary=None)
    assert made.config.summary == near.config.fwd


def test_what_walks_to_its_segments_has_others_for_other_lengths() -> None:
    gpu, problem = GPUS["h100"], make_problem((8, 1024, 8, 64, 64))
    spec = problem.spec
    fwd = ForwardConfig(ChunkKernelConfig(64, 64, 4, 3, True, lead=64), 704)
    grads = TileKernelConfig(32, 64, 64, 4, 3, True, True, lead=32)
    back = BackwardConfig(None, grads, None, 256)
    for config, others in ((fwd, build._cut_rows), (back, build._plain_rows)):
        rows = [build._Wanted(gpu, "tuned", "GPU", problem, config)]
        (made,) = others(gpu, rows)
        assert made.source == "heuristic"
        assert made.problem == Problem(spec, *build._LONG)
        assert is_legal(spec, made.config, gpu)
        assert not leads(made.config)
        assert made.config.kernels().keys() > {config.main}
        whole = without_way(config, spec, gpu)
        assert without_way(whole, spec, gpu) == whole
    assert isinstance(made.config, BackwardConfig)
    assert made.config.grads == replace(grads, lead=0)
    plain = build._Wanted(gpu, "tuned", "GPU", problem, without_way(back, spec, gpu))
    assert not list(build._plain_rows(gpu, [*rows, plain]))


def test_bad_requests(fake: FakeToolchain, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown GPU 'v100'"):
        build_packs(["v100"], tmp_path)
    with pytest.raises(ConfigError, match="no GPU"):
        build_packs([], tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        build_packs(["h100"], tmp_path, configs_dir=tmp_path / "none")
    (tmp_path / "h200.yaml").write_text("schema: 1\n")
    with pytest.raises(ConfigError, match=r"h200\.yaml:\d+: "):
        build_packs(["h200"], tmp_path / "out", configs_dir=tmp_path)
    dump_tuned(tuned_file(), tmp_path / "h200.yaml")
    with pytest.raises(ConfigError, match="gpu: wanted h200, got h100"):
        build_packs(["h200"], tmp_path / "out", configs_dir=tmp_path)
    assert not (tmp_path / "out").exists()


# The certified binary.


def _other_binary(kernel: KernelSpec) -> CompiledKernel:
    cubin = b"other" + kernel.name.encode()
    return replace(fake_compiled(kernel), cubin=cubin, sha256=hashlib.sha256(cubin).hexdigest())


def test_other_binary_from_the_same_tools_is_an_error(
    fake: FakeToolchain, configs: Path, tmp_path: Path
) -> None:
    fake.compile = _other_binary
    with pytest.raises(CompileError, match=r"certified was .* same toolchain") as caught:
        build_packs(["h100"], tmp_path / "out", configs_dir=configs)
    assert "glac tune --gpu h100" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["triton", "ptxas", "templates_sha256"])
def test_other_binary_from_other_tools_is_a_warning(
    fake: FakeToolchain, configs: Path, tmp_path: Path, what: str
) -> None:
    fake.compile = _other_binary
    file: TunedFile = tuned_file()
    old: Any = {Op.FORWARD: "1.2.3"} if what == "templates_sha256" else "1.2.3"
    environment = replace(file.environment, **{what: old})
    dump_tuned(replace(file, environment=environment), configs / "h100.yaml")
    (result,) = build_packs(["h100"], tmp_path / "out", configs_dir=configs)
    (warning,) = result.warnings
    assert warning.startswith("not the certified binary: 4 forward kernels of h100.yaml differ")
    assert f"{what.split('_')[0]} 1.2.3 then" in warning


# Kernels that do not compile.


def _fails(test: Callable[[ChunkKernelConfig], bool]) -> Compiler:
    def compiler(kernel: KernelSpec) -> CompiledKernel | GlacError:
        if isinstance(kernel.config, ChunkKernelConfig) and test(kernel.config):
            return CompileError(f"{kernel.name} does not fit")
        return fake_compiled(kernel)

    return compiler


def test_heuristics_step_down(
    fake: FakeToolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "STANDARD_PROBLEMS", (Problem(VECTOR, 8, 2048, 4),))
    (tmp_path / "none").mkdir()
    fake.compile = _fails(lambda config: config.num_stages > 1 or config.chunk > 16)
    (result,) = build_packs(["h100"], tmp_path / "out", configs_dir=tmp_path / "none")
    row = next(row for row in result.pack.rows if row.op is Op.FORWARD)
    config = row.config
    assert isinstance(config, ForwardConfig)
    assert (config.fwd.chunk, config.fwd.num_stages) == (16, 1)
    assert config.summary == config.fwd
    assert is_legal(VECTOR, config, GPUS["h100"])
    assert all("steps down" in warning for warning in result.warnings)
    assert not any(kernel.kernel.config.num_warps == 0 for kernel in result.pack.kernels.values())
    assert {k.kernel for k in result.pack.kernels.values()} < set(fake.compiled)


@pytest.mark.parametrize("template", ["gla_bwd", "gla_bwd_exact"])
def test_backward_heuristics_step_down(
    fake: FakeToolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    problem = build.STANDARD_PROBLEMS[1]
    monkeypatch.setattr(build, "STANDARD_PROBLEMS", (problem,))
    (tmp_path / "none").mkdir()

    def compiler(kernel: KernelSpec) -> CompiledKernel | GlacError:
        config = kernel.config
        if kernel.template == template and getattr(config, "block_v", 0) > 32:
            return CompileError(f"{kernel.name} does not fit")
        return fake_compiled(kernel)

    fake.compile = compiler
    (result,) = build_packs(["h100"], tmp_path / "out", configs_dir=tmp_path / "none")
    row = next(row for row in result.pack.rows if row.op is Op.BACKWARD)
    default = default_backward(problem.spec, GPUS["h100"], problem.bucket)
    # Stages, then chunk and with it that of the states, then columns of V; K is cut last.
    assert row.config == replace(
        default,
        states=replace(default.states, chunk=16) if default.states else None,
        grads=replace(default.grads, num_stages=1, chunk=16, block_v=32),
    )
    assert is_legal(problem.spec, row.config, GPUS["h100"])
    assert all("backward: " in warning for warning in result.warnings)


def test_heuristic_without_a_way_out_is_left_out(
    fake: FakeToolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "STANDARD_PROBLEMS", (TINY,))
    (tmp_path / "none").mkdir()
    fake.compile = _fails(lambda config: True)
    (result,) = build_packs(["a100"], tmp_path / "out", configs_dir=tmp_path / "none")
    assert result.pack.rows == ()
    assert any(warning.startswith("no kernel for a100 B=2") for warning in result.warnings)


def test_tuned_kernel_that_fails_is_an_error(
    fake: FakeToolchain, configs: Path, tmp_path: Path
) -> None:
    fake.compile = _fails(lambda config: True)
    with pytest.raises(CompileError, match="does not fit"):
        build_packs(["h100"], tmp_path / "out", configs_dir=configs)


def test_missing_tools_are_no_reason_to_step_down(fake: FakeToolchain, tmp_path: Path) -> None:
    fake.compile = lambda kernel: MissingEnvironmentError("no assembler")
    (tmp_path / "none").mkdir()
    with pytest.raises(MissingEnvironmentError):
        build_packs(["h100"], tmp_path / "out", configs_dir=tmp_path / "none")


# The build on a miss.


def test_single(fake: FakeToolchain, tmp_path: Path) -> None:
    gpu = GPUS["h100"]
    pack, compiled = build_single(TINY, gpu, WHOLE, tmp_path / "p")
    assert compiled == len(pack.kernels) == 1
    assert (pack.rows[0].source, pack.rows[0].config) == ("heuristic", WHOLE)
    again, compiled = build_single(TINY, gpu, WHOLE, tmp_path / "p")
    assert compiled == 0
    assert again == pack
    other = ForwardConfig(replace(WHOLE.fwd, num_warps=4))
    again, compiled = build_single(TINY, gpu, other, tmp_path / "p")
    assert compiled == 1
    assert again.rows[0].config == other


def test_single_of_the_backward_pass(fake: FakeToolchain, tmp_path: Path) -> None:
    gpu = GPUS["h100"]
    pack, compiled = build_single(TINY, gpu, BACKWARD, tmp_path / "p")
    assert compiled == len(pack.kernels) == len(BACKWARD.kernels())
    assert pack.rows[0].config == BACKWARD
    assert set(pack.templates_sha256) == {Op.BACKWARD}
    again, compiled = build_single(TINY, gpu, BACKWARD, tmp_path / "p")
    assert (again, compiled) == (pack, 0)


def test_single_heals_a_broken_pack(fake: FakeToolchain, tmp_path: Path) -> None:
    build_single(TINY, GPUS["h100"], WHOLE, tmp_path / "p")
    (tmp_path / "p" / "manifest.json").write_text("{")
    pack, compiled = build_single(TINY, GPUS["h100"], WHOLE, tmp_path / "p")
    assert compiled == 1
    assert read_pack(tmp_path / "p") == pack


def test_single_on_a_gpu_that_is_not_listed(fake: FakeToolchain, tmp_path: Path) -> None:
    gpu = replace(GPUS["a100"], name="cc86-84sm", title="Small GPU", shared_per_block=3000)
    fake.compile = lambda kernel: replace(
        fake_compiled(kernel), shared=2000 * getattr(kernel.config, "num_stages", 1)
    )
    config = ForwardConfig(replace(WHOLE.fwd, num_stages=3))
    pack, compiled = build_single(TINY, gpu, config, tmp_path / "p")
    assert compiled == 3
    assert pack.rows[0].config == ForwardConfig(replace(WHOLE.fwd, num_stages=1))
    assert pack.rows[0].gpu == "a100"
    assert len(pack.kernels) == 1


def test_single_that_cannot_be(fake: FakeToolchain, tmp_path: Path) -> None:
    fake.compile = _fails(lambda config: True)
    with pytest.raises(CompileError, match="no kernel for h100"):
        build_single(TINY, GPUS["h100"], WHOLE, tmp_path / "p")
    fake.compile = fake_compiled
    (tmp_path / "file").write_text("")
    with pytest.raises(PackError, match="cannot be written"):
        build_single(TINY, GPUS["h100"], WHOLE, tmp_path / "file" / "p")


@pytest.mark.parametrize("dtype", [DType.FP16, DType.FP32])
def test_other_element_types(
    fake: FakeToolchain, uncut: None, configs: Path, tmp_path: Path, dtype: DType
) -> None:
    def build_for(*dtypes: DType) -> set[tuple[DType, str]]:
        (result,) = build_packs(
            ["h100"], tmp_path / "out", configs_dir=configs, dtypes=dtypes, fresh=True
        )
        for row in result.pack.rows:
            assert is_legal(row.spec, row.config, GPUS["h100"])
            assert row.spec.gate_dtype is row.spec.dtype or row.spec.gate is Gate.SCALAR
        counts = {op: sum(row.op is op for row in result.pack.rows) for op in Op}
        assert counts[Op.FORWARD] >= 2
        trained = sum(Op.BACKWARD in problem.ops for problem in build.STANDARD_PROBLEMS)
        assert counts[Op.BACKWARD] == len(dtypes) * trained
        return {(row.spec.dtype, row.source) for row in result.pack.rows if row.op is Op.FORWARD}

    assert build_for(dtype) == {(dtype, "heuristic")}
    assert build_for(DType.BF16) == {(DType.BF16, "tuned")}
    both = {(DType.BF16, "tuned"), (dtype, "heuristic")}
    assert build_for(DType.BF16, dtype) == both


# A second build.


def _times(path: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in [path, *path.rglob("*")]}


@pytest.mark.parametrize("zipped", [False, True])
def test_a_second_build_compiles_nothing_and_touches_nothing(
    fake: FakeToolchain, configs: Path, tmp_path: Path, zipped: bool
) -> None:
    def make(**options: Any) -> build.BuildResult:
        fake.compiled.clear()
        (result,) = build_packs(
            ["h100", "h200"], tmp_path / "out", configs_dir=configs, zipped=zipped, **options
        )
        assert len(fake.compiled) == result.compiled
        return result

    first = make()
    assert first.compiled == len(first.pack.kernels)
    assert first.path.name == ("sm_90a.zip" if zipped else "sm_90a")
    assert first.path.is_file() == zipped
    before = _times(tmp_path / "out")
    second = make()
    assert second.compiled == 0
    assert second.pack == first.pack
    assert second.warnings == first.warnings
    assert _times(tmp_path / "out") == before
    again = make(fresh=True)
    assert again.compiled == first.compiled
    assert again.pack == first.pack


def test_a_second_build_takes_over_what_is_the_same(
    fake: FakeToolchain,
    uncut: None,
    configs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "STANDARD_PROBLEMS", ())
    out = tmp_path / "out"
    (first,) = build_packs(["h100"], out, configs_dir=configs)
    # A further row of the tuned file: its kernels alone are compiled.
    fake.compiled.clear()
    file = tuned_file()
    more = tuned_row(Problem(replace(VECTOR, V=32), 2, 512, 16), WHOLE)
    dump_tuned(replace(file, rows=(*file.rows, more)), configs / "h100.yaml")
    (second,) = build_packs(["h100"], out, configs_dir=configs)
    assert [kernel.name for kernel in fake.compiled] == [k.name for k in more.kernels]
    assert len(second.pack.rows) == len(first.pack.rows) + 1
    # A row less: nothing is compiled, and the pack loses it.
    fake.compiled.clear()
    dump_tuned(file, configs / "h100.yaml")
    (third,) = build_packs(["h100"], out, configs_dir=configs)
    assert fake.compiled == []
    assert third.pack == first.pack
    # Damage and other tools: all again.
    next((third.path / "cubins").iterdir()).write_bytes(b"x")
    (healed,) = build_packs(["h100"], out, configs_dir=configs)
    assert healed.compiled == len(first.pack.kernels)
    assert healed.pack == first.pack
    for name in healed.pack.kernels:
        healed.pack.read_cubin(name)
    monkeypatch.setattr(build, "toolchain", lambda: replace(FAKE_TOOLS, triton="3.8.0"))
    (other,) = build_packs(["h100"], out, configs_dir=configs)
    assert other.compiled == len(first.pack.kernels)


def test_a_second_build_does_not_try_what_failed(
    fake: FakeToolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "STANDARD_PROBLEMS", build.STANDARD_PROBLEMS[1:2])
    fake.compile = _fails(lambda config: config.num_stages > 1 or config.chunk > 16)
    (first,) = build_packs(["a100"], tmp_path / "out", configs_dir=_empty(tmp_path))
    assert first.warnings
    fake.compiled.clear()
    (second,) = build_packs(["a100"], tmp_path / "out", configs_dir=_empty(tmp_path))
    assert fake.compiled == []
    assert second.pack == first.pack
    assert all("steps down" in warning for warning in second.warnings)
    assert len(second.warnings) == len({w.partition(":")[0] for w in first.warnings})


def _empty(tmp_path: Path) -> Path:
    folder = tmp_path / "none"
    folder.mkdir(exist_ok=True)
    return folder


def test_a_binary_that_was_not_certified_is_not_taken_over(
    fake: FakeToolchain,
    uncut: None,
    configs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "STANDARD_PROBLEMS", ())
    monkeypatch.setattr(build, "_check_certified", lambda *args: None)
    fake.compile = _other_binary
    build_packs(["h100"], tmp_path / "out", configs_dir=configs)
    monkeypatch.undo()
    monkeypatch.setattr(build, "_cut_rows", lambda gpu, rows: ())
    monkeypatch.setattr(build, "STANDARD_PROBLEMS", ())
    monkeypatch.setattr(build, "compile_many", fake)
    monkeypatch.setattr(build, "toolchain", lambda: FAKE_TOOLS)
    fake.compile = fake_compiled
    (result,) = build_packs(["h100"], tmp_path / "out", configs_dir=configs)
    assert result.compiled == len(result.pack.kernels)


def test_real_build_is_the_same_with_any_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "STANDARD_PROBLEMS", (TINY,))
    (tmp_path / "none").mkdir()
    (first,) = build_packs(["h100"], tmp_path / "a", jobs=1, configs_dir=tmp_path / "none")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    (second,) = build_packs(["h100"], tmp_path / "b", jobs=4, configs_dir=tmp_path / "none")
    assert first.warnings == ()
    assert _files(first.path) == _files(second.path)
    for name in first.pack.kernels:
        assert first.pack.read_cubin(name).startswith(b"\x7fELF")


def test_a_users_own_rows_are_built_instead_of_those_that_came(
    fake: FakeToolchain, uncut: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "mine", tmp_path / "team"
    whole, split = tuned_file().rows
    other = replace(split, config=WHOLE, kernels=tuned_row(split.problem, WHOLE).kernels)
    dump_tuned(replace(tuned_file(), rows=(other,)), first / "h100.yaml")
    dump_tuned(tuned_file(), second / "h100.yaml")
    monkeypatch.setenv("GLAC_CONFIG_PATH", os.pathsep.join(map(str, (first, second))))
    monkeypatch.setattr("glac.tuned.shipped", lambda name: None)
    monkeypatch.setattr(build, "STANDARD_PROBLEMS", ())
    (result,) = build_packs(["h100"], tmp_path / "out")
    assert result.warnings == ()
    configs = {row.spec: row.config for row in result.pack.rows}
    assert configs == {whole.spec: whole.config, split.spec: WHOLE}
    # And a build on a miss starts from the nearest row of all of them.
    problem = replace(split.problem, T=700)
    assert miss_config(problem, GPUS["h100"]) == WHOLE
    # With segments where the GPU would idle without them.
    cut = miss_config(replace(problem, B=1, T=65536, H=1), GPUS["h100"])
    assert isinstance(cut, ForwardConfig)
    assert cut == replace(WHOLE, segment=cut.segment, summary=WHOLE.fwd)
    assert 0 < cut.segment < 65536 // 4
