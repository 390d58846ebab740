"""Which kernel serves a problem, decided from stand-in packs; settings; what importing loads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glac import dispatch
from glac.chunks_backward import kept_bytes
from glac.configs import (
    ChunkKernelConfig,
    ChunksBackwardConfig,
    Config,
    ForwardConfig,
    PrepareKernelConfig,
    TileKernelConfig,
    default_backward,
    default_forward,
    packed_segment,
    suitable_segment,
    why_illegal,
)
from glac.errors import ConfigError, KernelNotFoundError
from glac.gpus import GPUS, GpuSpec
from glac.pack import Pack, PackRow
from glac.problem import Bucket, DType, Gate, Op, Precision, Problem, Specialisation
from glac.settings import Settings, load_settings, shipped_pack_dir

ROOT = Path(__file__).resolve().parent.parent
SPEC = Specialisation(64, 64, DType.BF16, Gate.VECTOR, DType.BF16)
OTHER = replace(SPEC, K=128)
H100, H200, A100 = GPUS["h100"], GPUS["h200"], GPUS["a100"]
PROBLEM = Problem(SPEC, B=16, T=1024, H=16)  # bucket 8, 10
CONFIG = ForwardConfig(ChunkKernelConfig(32, 64, 4, 2))
BACKWARD = default_backward(SPEC, H100, PROBLEM.bucket)


def row(
    bh: int = 8,
    t: int = 10,
    *,
    gpu: str = "h100",
    source: str = "tuned",
    spec: Specialisation = SPEC,
    config: Config = CONFIG,
) -> PackRow:
    return PackRow.make(gpu, source, "", spec, Bucket(bh, t), config)


@dataclass(frozen=True)
class FakeKernel:
    sha256: str
    shared: int = 0


@dataclass(frozen=True)
class FakePack:
    path: Path
    rows: tuple[PackRow, ...]
    arch: str = "sm_90a"
    kernels: dict[str, FakeKernel] = field(default_factory=dict)

    def rows_of(self, op: Op, spec: Specialisation) -> list[PackRow]:
        return [row for row in self.rows if row.op is op and row.spec == spec]


def pack(name: str, *rows: PackRow) -> Pack:
    kernels = {k: FakeKernel(f"{name}:{k}") for r in rows for k in r.kernels.values()}
    return cast(Pack, FakePack(Path(name), rows, kernels=kernels))


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("GLAC_CHECKED", "GLAC_REQUIRE_AOT", "GLAC_PACK_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLAC_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    def put(*packs: Pack, refused: Sequence[str] = ()) -> None:
        found = (tuple(packs), tuple(refused))
        monkeypatch.setattr(dispatch, "installed_packs", lambda settings, arch: found)

    return put


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        pytest.param([row(7, 10), row(8, 10), row(9, 10)], 1, id="the exact bucket"),
        pytest.param([row(12, 10), row(10, 9), row(8, 13)], 1, id="the nearest bucket"),
        pytest.param([row(9, 10), row(7, 10)], 1, id="a tie goes to the smaller"),
        pytest.param([row(7, 10), row(8, 11)], 0, id="a tie goes to the smaller, other axis"),
        pytest.param([row(8, 10, source="heuristic"), row(12, 15)], 1, id="tuned before guessed"),
        pytest.param([row(8, 10, gpu="h200"), row(11, 14)], 1, id="its own GPU before a relative"),
        pytest.param(
            [row(gpu="h100-pcie"), row(10, 12, gpu="h200")], 1, id="the closer relative first"
        ),
        pytest.param(
            [row(source="heuristic"), row(gpu="h200")], 1, id="a relative's tuned before a guess"
        ),
        pytest.param([row(spec=OTHER), row(12, 15)], 1, id="only its own specialisation"),
    ],
)
def test_best_row(rows: list[PackRow], best: int) -> None:
    assert dispatch.best_row(rows, PROBLEM, H100) is rows[best]


def test_a_precision_has_rows_of_its_own(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = replace(SPEC, dtype=DType.FP32, gate_dtype=DType.FP32)
    once = replace(usual, precision=Precision.TF32)
    far, near = row(15, 20, spec=once, source="heuristic"), row(spec=usual)
    for spec, wanted in ((usual, near), (once, far)):
        problem = replace(PROBLEM, spec=spec)
        assert dispatch.best_row([far, near], problem, H100) is wanted
    monkeypatch.setenv("GLAC_REQUIRE_AOT", "1")
    install(pack("usual", near), pack("once", far))
    assert dispatch.decide(replace(PROBLEM, spec=usual), H100).path == "usual"
    assert dispatch.decide(replace(PROBLEM, spec=once), H100).path == "once"
    install(pack("usual", near))
    with pytest.raises(KernelNotFoundError, match="k64_v64_vector_fp32_tf32"):
        dispatch.decide(replace(PROBLEM, spec=once), H100)


@pytest.mark.parametrize(
    "change",
    [
        {"K": 32},
        {"V": 128},
        {"gate_dtype": DType.FP32},
        {"gate": Gate.LOWRANK, "rank": 16},
        {"dtype": DType.FP16, "gate_dtype": DType.FP16},
    ],
)
def test_another_specialisation_is_no_hit(change: dict[str, Any]) -> None:
    rows = [row(spec=replace(SPEC, **change))]
    assert dispatch.best_row(rows, PROBLEM, H100) is None
    assert dispatch.best_row([], PROBLEM, H100) is None


def test_a_row_serves_its_own_op() -> None:
    rows = [row(config=BACKWARD), row(9, 15)]
    assert dispatch.best_row(rows, PROBLEM, H100) is rows[1]
    assert dispatch.best_row(rows, PROBLEM, H100, Op.BACKWARD) is rows[0]
    assert dispatch.best_row(rows[1:], PROBLEM, H100, Op.BACKWARD) is None


def test_states_are_found_again_only_where_that_spares_windows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = replace(SPEC, K=128, V=128)
    every = default_backward(spec, H100, Bucket(7, 11))
    apart = replace(every, grads=replace(every.grads, keep=4))
    rows = [row(7, 11, spec=spec, config=apart), row(9, 13, spec=spec, config=every)]
    fits, many = Problem(spec, 16, 2048, 8), Problem(spec, 32, 2048, 8)
    few, packed = Problem(spec, 1, 2048, 2), Problem(spec, 1, 32768, 8, packed=16)

    def best(problem: Problem, among: Sequence[PackRow] = rows) -> PackRow | None:
        return dispatch.best_row(among, problem, H100, Op.BACKWARD)

    assert best(fits) is rows[0]
    assert [best(problem) for problem in (many, few, packed)] == [rows[1]] * 3
    assert best(many, rows[:1]) is rows[0]  # better than none
    guessed = replace(rows[1], source="heuristic")
    assert best(many, [rows[0], guessed]) is rows[0]
    monkeypatch.setenv("GLAC_SCRATCH_MIB", "256")
    assert best(fits) is rows[1]  # every chunk's states fit
    assert best(many) is rows[0]


def test_chunks_at_once_only_with_memory_for_their_states(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = replace(SPEC, K=128, V=256)
    tile = ChunkKernelConfig(32, 64, 4, 3)
    once = ChunksBackwardConfig(
        PrepareKernelConfig(32, 64, 2, 2), tile, TileKernelConfig(64, 64, 64, 4, 3), tile
    )
    walking = default_backward(spec, H100, Bucket(8, 11))
    rows = [row(5, 11, spec=spec, config=once), row(8, 11, spec=spec, config=walking)]

    def best(problem: Problem) -> PackRow | None:
        return dispatch.best_row(rows, problem, H100, Op.BACKWARD)

    few = Problem(spec, 8, 2048, 4)
    # 128 MiB of states, and of their gradients, are less than all tensors of the pass.
    assert kept_bytes(few, once) == 128 << 20
    assert kept_bytes(few, replace(once, chunks=replace(once.chunks, keep=2))) == 64 << 20
    assert best(few) is rows[0]
    # In fp16 they would be four bytes each.
    wide = replace(spec, dtype=DType.FP16, gate_dtype=DType.FP16, K=256, V=512)
    others = [replace(r, spec=wide) for r in rows]
    problem = Problem(wide, 8, 2048, 4)
    assert dispatch.best_row(others, problem, H100, Op.BACKWARD) is others[1]
    monkeypatch.setenv("GLAC_SCRATCH_MIB", "64")
    assert best(few) is rows[1]
    monkeypatch.setenv("GLAC_SCRATCH_MIB", "2048")
    assert dispatch.best_row(others, problem, H100, Op.BACKWARD) is others[0]


def test_programs_walk_to_their_segments_only_where_that_was_measured() -> None:
    led = ForwardConfig(replace(CONFIG.fwd, lead=32), 704)
    back = replace(BACKWARD, states=None, grads=replace(BACKWARD.grads, lead=32), segment=256)
    for op, config, other in ((Op.FORWARD, led, CONFIG), (Op.BACKWARD, back, BACKWARD)):
        rows = [row(6, 10, config=config), row(8, 12, config=other)]
        rows[1] = replace(rows[1], source="heuristic")

        def best(among: Sequence[PackRow], *sizes: int, op: Op = op, packed: int = 0) -> Any:
            problem = replace(Problem(SPEC, *sizes), packed=packed)
            return dispatch.best_row(among, problem, H100, op)

        assert best(rows, 8, 1024, 8) is best(rows, 5, 1400, 13) is rows[0]
        for sizes in ((8, 2048, 8), (8, 512, 8), (16, 1024, 8), (1, 65536, 64)):
            assert best(rows, *sizes) is rows[1]
            assert best(rows[:1], *sizes) is rows[0]  # better than none, and right
        assert best(rows, 1, 8192, 8, packed=8) is rows[1]


def test_what_programs_walk_is_not_cut_for_others(install: Any) -> None:
    led = ForwardConfig(replace(CONFIG.fwd, lead=32), 704)
    install(pack("p", row(6, 10, config=led)))
    for problem in (Problem(SPEC, 1, 32768, 1), Problem(SPEC, 1, 8192, 8, packed=8)):
        assert dispatch.decide(problem, H100).config == led


ROWS = st.builds(
    row,
    st.integers(0, 12),
    st.integers(0, 20),
    gpu=st.sampled_from(["h100", "h200", "h100-pcie"]),
    source=st.sampled_from(["tuned", "heuristic"]),
    spec=st.sampled_from([SPEC, OTHER]),
)


@settings(max_examples=50)
@given(rows=st.lists(ROWS, max_size=6), heads=st.integers(1, 4096), tokens=st.integers(1, 2**20))
def test_the_best_row_is_beaten_by_none(rows: list[PackRow], heads: int, tokens: int) -> None:
    problem = Problem(SPEC, 1, tokens, heads)
    best = dispatch.best_row(rows, problem, H100)
    hits = [r for r in rows if r.spec == SPEC]
    if best is None:
        assert not hits
        return
    # Where whole sequences would idle the GPU, rows of other buckets come last.
    if suitable_segment(CONFIG, SPEC, problem.bucket, H100):
        own = [r for r in hits if r.bucket == problem.bucket]
        assert best in own or not own
        hits = own or hits
    for other in hits:
        if (other.source, other.gpu) == (best.source, best.gpu):
            assert best.bucket.distance(problem.bucket) <= other.bucket.distance(problem.bucket)
        if other.source == "tuned":
            assert best.source == "tuned"
        if (other.source, other.gpu) == (best.source, "h100"):
            assert best.gpu == "h100"


WHOLE = ForwardConfig(ChunkKernelConfig(32, 64, 4, 3))
CUT = ForwardConfig(ChunkKernelConfig(32, 64, 4, 3), 1024, ChunkKernelConfig(64, 64, 4, 2))


@pytest.mark.parametrize(
    ("heads", "tokens", "served", "segment"),
    [
        pytest.param(128, 2048, WHOLE, 0, id="the bucket of the tuned one"),
        pytest.param(256, 2048, WHOLE, 0, id="more heads: the tuned one comes first"),
        pytest.param(16, 256, WHOLE, 0, id="few heads, but short sequences"),
        pytest.param(4, 32768, CUT, 1024, id="the bucket of the one that cuts"),
        pytest.param(4, 65536, CUT, 1024, id="twice as long"),
        pytest.param(32, 16384, CUT, 2048, id="more heads, fewer segments"),
        pytest.param(1, 4096, CUT, 512, id="one head"),
        pytest.param(64, 2048, WHOLE, 0, id="two segments would gain nothing"),
        pytest.param(64, 8192, CUT, 2048, id="half of the SMs idle"),
    ],
)
def test_sequences_are_cut_where_heads_are_few(
    install: Any, heads: int, tokens: int, served: ForwardConfig, segment: int
) -> None:
    install(pack("p", row(7, 11, config=WHOLE), row(2, 15, source="heuristic", config=CUT)))
    decision = dispatch.decide(Problem(SPEC, 1, tokens, heads), H100)
    assert isinstance(decision.config, ForwardConfig)
    assert decision.config.fwd == served.fwd
    assert decision.config.segment == segment
    assert (decision.config.summary is None) == (segment == 0)
    assert decision.config_id == decision.config.slug
    # The kernels of the row serve the config of the decision.
    needed = PackRow.make("h100", "tuned", "", SPEC, Bucket(0, 0), decision.config).kernels
    assert needed.items() <= decision.kernels.items()
    assert ("segments of" in decision.reason) == (segment not in (0, CUT.segment))


@pytest.mark.parametrize(
    ("heads", "sequences", "tokens", "segment"),
    [
        (8, 16, 32768, 4096),  # twice the mean
        (64, 16, 32768, 16384),  # what each SM has to do
        (8, 16, 1000, 128),
        (4, 1, 32768, CUT.segment),  # as the row of its bucket
        (2, 1, 32768, 512),  # as one sequence of a dense batch
    ],
)
def test_packed_batches_are_cut(
    install: Any, heads: int, sequences: int, tokens: int, segment: int
) -> None:
    install(pack("p", row(7, 11, config=WHOLE), row(2, 15, source="heuristic", config=CUT)))
    problem = Problem(SPEC, 1, tokens, heads, packed=sequences)
    decision = dispatch.decide(problem, H100)
    assert isinstance(decision.config, ForwardConfig)
    # The kernel that walks is that of the nearest row, those that cut come from another one.
    assert decision.config.fwd == (CUT.fwd if sequences == 1 else WHOLE.fwd)
    assert decision.config.summary == CUT.summary
    assert decision.config.segment == segment
    needed = PackRow.make("h100", "tuned", "", SPEC, Bucket(0, 0), decision.config).kernels
    assert needed.items() <= decision.kernels.items()
    assert f"segments of {segment}" in decision.reason


def test_packed_batches_where_nothing_can_cut(install: Any) -> None:
    install(pack("p", row(7, 11, config=WHOLE)))
    decision = dispatch.decide(Problem(SPEC, 1, 32768, 8, packed=16), H100)
    assert decision.config == WHOLE
    assert "not cut" in decision.reason


@settings(max_examples=200)
@given(
    sequences=st.integers(1, 4096),
    heads=st.integers(1, 128),
    tokens=st.integers(1, 1 << 40),
    gpu=st.sampled_from(list(GPUS.values())),
)
def test_segments_of_packed_batches(sequences: int, heads: int, tokens: int, gpu: GpuSpec) -> None:
    bucket = Problem(SPEC, 1, tokens, heads, packed=sequences).bucket
    forward, backward = default_forward(SPEC, gpu, bucket), default_backward(SPEC, gpu, bucket)
    for config in (replace(forward, summary=forward.summary or forward.fwd), backward):
        segment = packed_segment(config, SPEC, bucket, gpu)
        assert why_illegal(SPEC, replace(config, segment=segment), gpu) is None
        assert segment < 2**31


def test_a_row_that_cuts_serves_whole_sequences_too(install: Any) -> None:
    install(pack("p", row(2, 15, config=CUT)))
    decision = dispatch.decide(Problem(SPEC, 16, 2048, 16), H100)
    assert decision.config == replace(CUT, segment=0, summary=None)
    assert "not cut" in decision.reason


@settings(max_examples=200)
@given(
    k=st.integers(1, 512),
    v=st.integers(1, 512),
    bh=st.integers(0, 12),
    t=st.integers(0, 21),
    gpu=st.sampled_from(list(GPUS.values())),
    dtype=st.sampled_from(list(DType)),
)
def test_segments_that_suit(k: int, v: int, bh: int, t: int, gpu: GpuSpec, dtype: DType) -> None:
    spec = Specialisation(k, v, dtype, Gate.VECTOR, dtype)
    bucket = Bucket(bh, t)
    for config in (default_forward(spec, gpu, bucket), default_backward(spec, gpu, bucket)):
        assert why_illegal(spec, config, gpu) is None
        programs = 2**bh * config.tiles(spec)
        if config.segment:
            assert config.segment * 2 <= 2**t
            assert programs * 2 <= gpu.sm_count
            # Not more programs than two for each SM, or what rounding makes of it.
            assert programs * 2**t / config.segment <= 3 * gpu.sm_count
        elif 2**t >= 2**17:
            # Fewer than four segments of a power of two of tokens would fill the GPU.
            assert programs * 6 > gpu.sm_count


def test_a_backward_row_is_cut_as_the_problem_wants(install: Any) -> None:
    config = default_backward(OTHER, H100, Bucket(7, 11))
    assert config.segment == 0
    install(pack("p", row(7, 11, spec=OTHER, config=config)))
    decision = dispatch.decide(Problem(OTHER, 1, 65536, 4), H100, Op.BACKWARD)
    assert decision.config == replace(config, segment=4096)  # 16 segments of 8 tiles: 128 programs
    again = dispatch.decide(Problem(OTHER, 4, 65536, 64), H100, Op.BACKWARD)
    assert again.config == config


def test_the_first_pack_with_a_row_wins(install: Any) -> None:
    empty, far, near = pack("empty"), pack("far", row(9, 15)), pack("near", row())
    install(empty, far, near, refused=["broken: refused"])
    decision = dispatch.decide(PROBLEM, H100)
    assert (decision.provider, decision.path) == ("pack", "far")
    assert decision.config == CONFIG
    assert decision.config_id == CONFIG.slug
    main = row().kernels["gla_fwd"]
    assert decision.kernels == {"gla_fwd": main}
    assert decision.cubin_sha == f"far:{main}"
    assert decision.tried == ["broken: refused", f"empty: no forward row for {SPEC.slug}"]
    assert "nearest bucket (2^9 heads, 2^15 tokens)" in decision.reason


def test_each_op_is_decided_for_itself(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "can_build", lambda: False)
    forward, both = pack("forward", row()), pack("both", row(9, 15), row(config=BACKWARD))
    install(forward, both)
    decision = dispatch.decide(PROBLEM, H100)
    assert (decision.op, decision.path) == (Op.FORWARD, "forward")
    decision = dispatch.decide(PROBLEM, H100, Op.BACKWARD)
    assert (decision.op, decision.path, decision.config) == (Op.BACKWARD, "both", BACKWARD)
    assert list(decision.kernels) == list(BACKWARD.kernels())
    assert decision.cubin_sha == f"both:{decision.kernels['gla_bwd']}"
    assert decision.tried == [f"forward: no backward row for {SPEC.slug}"]
    install(forward)
    assert dispatch.decide(PROBLEM, H100, Op.BACKWARD).provider == "torch"
    monkeypatch.setenv("GLAC_REQUIRE_AOT", "1")
    with pytest.raises(KernelNotFoundError, match="no pack has a backward kernel"):
        dispatch.decide(PROBLEM, H100, Op.BACKWARD)


def test_decisions_are_kept_for_each_op(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.clear()
    install(pack("p", row(), row(config=BACKWARD)))
    monkeypatch.setattr(dispatch, "device_gpu", lambda device: (H100, ""))
    monkeypatch.setattr(dispatch, "_load", lambda pack, row, device: dict(row.kernels))
    monkeypatch.setattr(dispatch, "_served", {})
    for _ in range(2):
        decision, plan = dispatch.resolve(PROBLEM, 0)
        assert plan is not None
        assert (decision.op, plan.config, set(plan.kernels)) == (Op.FORWARD, CONFIG, {"gla_fwd"})
        decision, other = dispatch.resolve(PROBLEM, 0, Op.BACKWARD)
        assert other is not None
        assert (decision.op, other.config) == (Op.BACKWARD, BACKWARD)
        assert set(other.kernels) == set(BACKWARD.kernels())
    assert dispatch.stats().decisions == {"pack": 2}


def test_the_reason_names_source_and_gpu(install: Any) -> None:
    install(pack("p", row(gpu="h200", source="heuristic")))
    assert dispatch.decide(PROBLEM, H100).reason == "heuristic row of h200, its bucket"


@pytest.mark.parametrize("compiler", [False, True])
def test_a_miss_where_only_packs_are_allowed(
    install: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: bool
) -> None:
    monkeypatch.setenv("GLAC_REQUIRE_AOT", "1")
    monkeypatch.setenv("GLAC_PACK_PATH", str(tmp_path / "mine"))
    monkeypatch.setattr(dispatch, "can_build", lambda: compiler)
    install(pack("other", row(spec=OTHER)), refused=["broken: refused: no manifest"])
    with pytest.raises(KernelNotFoundError) as caught:
        dispatch.decide(PROBLEM, H100)
    text = str(caught.value)
    for part in (
        "GLAC_REQUIRE_AOT=1",
        str(PROBLEM),
        "h100",
        "broken: refused: no manifest",
        f"other: no forward row for {SPEC.slug}",
        str(tmp_path / "mine"),
        str(tmp_path / "cache" / "packs"),
        str(shipped_pack_dir()),
    ):
        assert part in text
    assert "glac tune --gpu h100" in caught.value.hint
    assert "glac build --gpu h100" in caught.value.hint


def test_a_hit_where_only_packs_are_allowed(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLAC_REQUIRE_AOT", "1")
    install(pack("p", row()))
    assert dispatch.decide(PROBLEM, H100).provider == "pack"


def test_a_miss_without_a_compiler_goes_to_pytorch(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "can_build", lambda: False)
    install(pack("other", row(spec=OTHER)))
    decision = dispatch.decide(PROBLEM, H100)
    assert (decision.provider, decision.config, decision.cubin_sha) == ("torch", None, "")
    assert decision.config_id == "torch-chunk"
    assert decision.reason == "no pack has it and no compiler is installed"
    assert decision.tried == [f"other: no forward row for {SPEC.slug}"]


@pytest.mark.parametrize("op", list(Op))
@pytest.mark.parametrize("gpu", [H100, H200, A100])
def test_a_miss_with_a_compiler_is_built(
    install: Any, monkeypatch: pytest.MonkeyPatch, gpu: Any, op: Op
) -> None:
    monkeypatch.setattr(dispatch, "can_build", lambda: True)
    install()
    problem = PROBLEM
    if not op.serves(SPEC.gate):
        problem = replace(problem, spec=replace(SPEC, gate=Gate.SCALAR))
    decision = dispatch.decide(problem, gpu, op)
    assert decision.provider == "build"
    assert decision.config == dispatch.miss_config(problem, gpu, op)
    assert decision.config.op is op
    assert "compiled at first use" in decision.reason


def write_manifest(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    return folder


def test_where_packs_are_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dispatch, "shipped_pack_dir", lambda: tmp_path / "shipped")
    wanted = [
        write_manifest(tmp_path / "a pack"),
        write_manifest(tmp_path / "packs" / "sm_90a"),
        write_manifest(tmp_path / "cache" / "packs" / "sm_90a"),
        write_manifest(tmp_path / "shipped" / "sm_90a"),
    ]
    write_manifest(tmp_path / "packs" / "sm_80")
    (tmp_path / "no pack").mkdir()
    roots = [tmp_path / name for name in ("missing", "no pack", "a pack", "packs")]
    monkeypatch.setenv("GLAC_PACK_PATH", os.pathsep.join(map(str, roots)))
    assert dispatch.pack_folders(load_settings(), "sm_90a") == wanted


def test_a_broken_pack_is_refused_and_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = write_manifest(tmp_path / "broken")
    monkeypatch.setenv("GLAC_PACK_PATH", str(folder))
    dispatch.clear()
    packs, refused = dispatch.installed_packs(load_settings(), "sm_90a")
    assert folder not in [p.path for p in packs]
    assert any(str(folder) in line and "refused" in line for line in refused)


def test_settings_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLAC_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("GLAC_CONFIG_PATH", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/conf")
    assert load_settings() == Settings(
        False, (), Path("/somewhere/glac"), False, (Path("/conf/glac/tuned"),)
    )
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert load_settings().cache_dir == Path.home() / ".cache" / "glac"


@pytest.mark.parametrize("name", ["GLAC_REQUIRE_AOT", "GLAC_CHECKED"])
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        *((text, True) for text in ("1", "TRUE", " yes ", "on")),
        *((text, False) for text in ("0", "", "no", "Off", "false")),
    ],
)
def test_flags(monkeypatch: pytest.MonkeyPatch, name: str, text: str, wanted: bool) -> None:
    monkeypatch.setenv(name, text)
    loaded = load_settings()
    values = {"GLAC_REQUIRE_AOT": loaded.require_aot, "GLAC_CHECKED": loaded.checked}
    assert values.pop(name) is wanted
    assert not any(values.values())


@pytest.mark.parametrize("name", ["GLAC_REQUIRE_AOT", "GLAC_CHECKED"])
@pytest.mark.parametrize("text", ["2", "maybe", "-1", "1.0"])
def test_a_flag_that_means_nothing(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=f"{name} must be 0 or 1, got '{text}'") as caught:
        load_settings()
    assert f"export {name}=1" in caught.value.hint


def test_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLAC_PACK_PATH", os.pathsep.join(["/a", "", "~/b"]))
    monkeypatch.setenv("GLAC_CACHE_DIR", "~/c")
    loaded = load_settings()
    assert loaded.pack_path == (Path("/a"), Path.home() / "b")
    assert loaded.cache_dir == Path.home() / "c"
    assert loaded.build_dir == Path.home() / "c" / "packs"


@pytest.mark.parametrize("module", ["glac", "glac.attention", "glac.dispatch", "glac.launch"])
def test_importing_loads_neither_triton_nor_yaml(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "heavy = {'triton', 'yaml', 'optuna', 'click', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    if module == "glac":
        code += "assert 'torch' not in sys.modules\n"
    else:
        code += "import torch; assert not torch.cuda.is_initialized()\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("capability", "sms", "shared", "arch", "first"),
    [
        ((8, 0), 56, 166912, "sm_80", "a30"),
        ((8, 0), 98, 166912, "sm_80", "a100"),  # a part of an A100
        ((8, 6), 84, 101376, "sm_80", "rtx3090"),
        ((8, 9), 128, 101376, "sm_80", "rtx3090"),
        ((8, 7), 16, 166912, "sm_80", "a30"),
        ((9, 0), 60, 232448, "sm_90a", "h100-pcie"),
    ],
)
def test_devices_and_whose_rows_serve_them(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    sms: int,
    shared: int,
    arch: str,
    first: str,
) -> None:
    properties = SimpleNamespace(
        name="Some GPU",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=sms,
        shared_memory_per_block_optin=shared,
    )
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    monkeypatch.setattr("glac.driver.driver_version", lambda: (12, 4))
    dispatch.device_gpu.cache_clear()
    dispatch.device_facts.cache_clear()
    try:
        gpu, _ = dispatch.device_gpu(0)
        assert gpu is not None
        assert (gpu.arch, gpu.shared_per_block) == (arch, shared)
        assert dispatch.family_of(gpu)[0] == first
        assert all(GPUS[name].arch == arch for name in dispatch.family_of(gpu))
        facts = dispatch.device_facts(0)
        assert (facts.capability, facts.shared_per_block) == (capability, shared)
        assert facts.cuda == (12, 4)
    finally:
        dispatch.device_gpu.cache_clear()
        dispatch.device_facts.cache_clear()


def test_a_device_of_another_kind_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="New GPU", major=10, minor=0, multi_processor_count=148)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    dispatch.device_gpu.cache_clear()
    try:
        gpu, note = dispatch.device_gpu(0)
        assert gpu is None
        assert "no kernels for capability 10.0" in note
    finally:
        dispatch.device_gpu.cache_clear()
