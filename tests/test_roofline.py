"""Floors and FLOPs by hand, times that were found, the chart's data, and `glac roofline`."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from click.testing import CliRunner, Result

from glac import dispatch
from glac.backward import cut
from glac.cli import cli
from glac.configs import (
    BackwardConfig,
    ChunkKernelConfig,
    ChunksBackwardConfig,
    ForwardConfig,
    PrepareKernelConfig,
    TileKernelConfig,
    default_config,
)
from glac.errors import ConfigError, MissingEnvironmentError
from glac.gpus import GPUS, GpuSpec
from glac.problem import DType, Gate, Op, Problem
from glac.roofline import (
    PASSES,
    Roofline,
    bench_measurements,
    chart,
    draw,
    floor_us,
    kept_states_bytes,
    kernel_work,
    load_results,
    matrix_rate,
    named_gpu,
    predict,
    roofline,
    tuned_measurements,
    useful_flops,
)
from glac.suites import SUITES, make_problem

H200 = GPUS["h200"]
PROBLEM = make_problem((16, 2048, 8, 128, 128))
TOKEN_HEADS = 16 * 2048 * 8
WALK = ChunkKernelConfig(32, 128, 8, 4, tma=True)
FORWARD = ForwardConfig(WALK)
BACKWARD = BackwardConfig(WALK, TileKernelConfig(32, 128, 128, 8, 2, dv=True))


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the packs of the user who runs it."""
    monkeypatch.setenv("GLAC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("GLAC_PACK_PATH", raising=False)
    monkeypatch.delenv("GLAC_REQUIRE_AOT", raising=False)
    dispatch.clear()


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    gate = draw(st.sampled_from((Gate.VECTOR, Gate.LOWRANK)))
    shape = (
        draw(st.integers(1, 64)),
        draw(st.integers(1, 1 << 17)),
        draw(st.integers(1, 64)),
        draw(st.integers(1, 256)),
        draw(st.integers(1, 512)),
    )
    rank = draw(st.sampled_from((8, 16, 64))) if gate is Gate.LOWRANK else 0
    return make_problem(shape, gate, rank, draw(st.sampled_from(list(DType))))


# ---- by hand ----


def test_useful_flops_by_hand() -> None:
    assert useful_flops(PROBLEM, Op.FORWARD) == TOKEN_HEADS * 4 * 128 * 128
    assert useful_flops(PROBLEM, Op.BACKWARD) == TOKEN_HEADS * 10 * 128 * 128
    lowrank = make_problem((16, 2048, 8, 128, 128), Gate.LOWRANK, 16)
    gate = TOKEN_HEADS * 2 * 16 * 128
    assert useful_flops(lowrank, Op.FORWARD) == useful_flops(PROBLEM, Op.FORWARD) + gate
    assert useful_flops(lowrank, Op.BACKWARD) == useful_flops(PROBLEM, Op.BACKWARD) + 3 * gate


def test_forward_flops_by_hand() -> None:
    (work,) = kernel_work(PROBLEM, FORWARD, H200)
    # Cumulative gate and scores 2 C K each, scores times values 2 C V, state 4 K V.
    assert work.flops == TOKEN_HEADS * (2 * 2 * 32 * 128 + 2 * 32 * 128 + 4 * 128 * 128)
    assert work.exps == TOKEN_HEADS * 2 * 128
    assert (work.programs, work.steps, work.launches) == (128, 64, 1)
    assert work.bytes == PROBLEM.bytes(Op.FORWARD)


def test_v_tiles_repeat_scores_and_gates() -> None:
    wide = make_problem((8, 2048, 4, 128, 256))
    one, two = (
        kernel_work(wide, ForwardConfig(ChunkKernelConfig(32, block_v, 8, 3)), H200)[0]
        for block_v in (256, 128)
    )
    assert two.programs == 2 * one.programs
    assert two.flops - one.flops == 8 * 2048 * 4 * 2 * 2 * 32 * 128


def test_a_low_rank_gate_is_written_out_for_the_backward_pass() -> None:
    lowrank = make_problem((16, 2048, 8, 128, 128), Gate.LOWRANK, 16)
    first, *dense, parts, sums = kernel_work(lowrank, BACKWARD, H200)
    assert tuple(dense) == kernel_work(PROBLEM, BACKWARD, H200)
    tokens = 16 * 2048
    inputs = 2 * (tokens * 16 + 1024 * 16 + 1024)
    assert (first.template, first.bytes) == ("gla_gate", inputs + 2 * tokens * 1024)
    # 8 tiles of 128 channels, 64 blocks of 512 tokens.
    made = 4 * (8 * tokens * 16 + 64 * 1024 * 17)
    assert parts.bytes == inputs + 2 * tokens * 1024 + made
    assert (parts.programs, sums.bytes) == (8 * 64, made + inputs)
    # With two tiles of V their parts are added up here, not before.
    wide = make_problem((8, 2048, 4, 128, 256), Gate.LOWRANK, 16)
    tiles = replace(BACKWARD, grads=TileKernelConfig(32, 64, 128, 4, 2), dv=WALK)
    *_, plain = kernel_work(replace(wide, spec=wide.spec.dense), tiles, H200)
    *_, found, parts, _ = kernel_work(wide, tiles, H200)
    gate = 2 * 8 * 2048 * 512
    assert (found.template, plain.template) == ("sums of parts", "sums of parts")
    assert plain.bytes - found.bytes == 3 * gate
    assert parts.bytes > 2 * gate


def test_prepared_chunks_are_made_once_for_all_v_tiles() -> None:
    wide = make_problem((8, 2048, 4, 128, 256))
    config = ForwardConfig(
        ChunkKernelConfig(64, 64, 4, 3), prepare=PrepareKernelConfig(64, 64, 4, 2)
    )
    prepare, walk = kernel_work(wide, config, H200)
    tokens = 8 * 2048 * 4
    # Cumulative gate and scores; then read-out, update, scores times values.
    assert prepare.flops == tokens * (2 * 64 * 128 + 2 * 64 * 128)
    assert prepare.exps == tokens * 2 * 128
    assert walk.flops == tokens * (4 * 128 * 256 + 2 * 64 * 256)
    assert walk.exps == 0
    assert (prepare.programs, prepare.steps) == (tokens // 64, 1)
    assert (walk.programs, walk.steps) == (8 * 4 * 4, 32)
    # Scaled q and k, scores in bf16, the decay of a chunk in fp32.
    made = tokens * (2 * 128 * 2 + 64 * 2 + 128 * 4 // 64)
    assert prepare.bytes == tokens * 3 * 128 * 2 + made
    assert walk.bytes == tokens * 2 * 256 * 2 + made


def test_prepared_segments_read_what_was_prepared() -> None:
    long = make_problem((1, 32768, 4, 256, 512))
    tile = ChunkKernelConfig(32, 128, 8, 3)
    config = ForwardConfig(tile, 2048, tile, PrepareKernelConfig(32, 64, 4, 2))
    prepare, summary, combine, walk = kernel_work(long, config, H200)
    assert prepare.programs == 4 * 32768 // 32
    assert (summary.programs, summary.steps, summary.exps) == (4 * 4 * 15, 64, 0)
    assert (walk.programs, walk.steps) == (4 * 4 * 16, 64)
    states = 16 * 4 * 256 * 512 * 4
    assert combine.bytes == 2 * states
    assert summary.bytes == 15 * 2048 * 4 * (256 * 2 + 256 * 4 // 32 + 512 * 2) + states


def test_backward_flops_by_hand() -> None:
    states, grads, exact = kernel_work(PROBLEM, BACKWARD, H200)
    # 256 MiB of states: three windows of 22, 22 and 20 chunks, and all but the last walked twice.
    assert (states.launches, states.steps) == (3, 64 + 2 * 22)
    assert states.flops == 128 * 108 * 32 * (2 * 32 * 128 + 2 * 128 * 128)
    by_chunk, state = 2 * 32 * 128, 2 * 128 * 128
    # G; S do, dS v, q do; dA, dA k, dA q; the suffix sum in two parts; k dS, scores, scores do.
    assert grads.flops == TOKEN_HEADS * (
        by_chunk + 3 * state + 5 * by_chunk + state + 2 * by_chunk
    )
    assert (exact.flops, exact.steps) == (0, 0)


def test_segments_add_summaries_and_states() -> None:
    long = make_problem((1, 32768, 4, 256, 512))
    tile = ChunkKernelConfig(32, 128, 8, 3)
    summary, combine, fwd = kernel_work(long, ForwardConfig(tile, 2048, tile), H200)
    assert (summary.programs, summary.steps) == (4 * 4 * 15, 64)
    assert (fwd.programs, fwd.steps) == (4 * 4 * 16, 64)
    states = 16 * 4 * 256 * 512 * 4
    assert combine.bytes == 2 * states
    assert fwd.bytes == long.bytes(Op.FORWARD) + states
    assert summary.bytes == long.B * 15 * 2048 * 4 * 2 * (256 + 512 + 256) + states


def test_programs_that_walk_to_their_segments_take_half_steps() -> None:
    short = make_problem((8, 1024, 8, 64, 64))
    (fwd,) = kernel_work(short, ForwardConfig(ChunkKernelConfig(64, 64, 4, 3, lead=64), 640), H200)
    # The first program: 10 chunks; the second: 10 on its way, 6 with outputs.
    assert (fwd.programs, fwd.steps) == (128, 11)
    states = 2 * 64 * 64 * 64 * 4
    assert fwd.bytes == short.bytes(Op.FORWARD) + states
    grads = TileKernelConfig(32, 64, 64, 4, 3, dv=True, lead=32)
    back, exact = kernel_work(short, BackwardConfig(None, grads, None, 256), H200)
    assert (back.template, exact.template) == ("gla_bwd", "gla_bwd_exact")
    assert (back.programs, back.steps) == (4 * 64, 8 + 16)


def test_backward_segments_add_states_in_both_directions() -> None:
    long = make_problem((1, 32768, 4, 128, 128))
    config = BackwardConfig(WALK, TileKernelConfig(32, 64, 128, 4, 3), WALK, segment=1024)
    names = [kernel.template for kernel in kernel_work(long, config, H200)]
    assert names == [
        *("gla_states", "gla_combine", "gla_states", "gla_combine"),
        *("gla_states", "gla_bwd", "gla_bwd_exact", "gla_bwd_dv"),
    ]
    _, _, back, _, keep, grads, _, values = kernel_work(long, config, H200)
    assert (back.programs, back.steps) == (4 * 31, 32)
    assert keep.programs * keep.steps == 4 * 1024
    assert grads.programs * grads.steps == 2 * 4 * 1024
    assert (values.programs, values.steps) == (4 * 32, 32)


def test_states_kept_apart_take_less_memory_and_more_work() -> None:
    every = BackwardConfig(WALK, TileKernelConfig(32, 64, 128, 4, 3), WALK)
    apart = replace(every, grads=replace(every.grads, keep=4))
    heads, state = PROBLEM.B * PROBLEM.H, 128 * 128 * 2
    assert cut(PROBLEM, every).segments == 3
    assert cut(PROBLEM, apart).segments == 1
    # A state of all heads every 128 tokens, and four of each program's tile, half of K.
    kept = PROBLEM.T // 128 * heads * state + 2 * heads * 4 * state // 2
    assert kept_states_bytes(PROBLEM, apart) == kept < kept_states_bytes(PROBLEM, every)
    one = {kernel.template: kernel for kernel in kernel_work(PROBLEM, every, H200)}
    two = {kernel.template: kernel for kernel in kernel_work(PROBLEM, apart, H200)}
    saved = 3 * PROBLEM.T // 128 * heads * state
    assert one["gla_bwd"].bytes - two["gla_bwd"].bytes == saved
    assert two["gla_states"].bytes < one["gla_states"].bytes - saved
    assert two["gla_bwd"].flops > one["gla_bwd"].flops
    assert two["gla_bwd"].exps > one["gla_bwd"].exps


def test_chunks_at_once_make_each_gradient_once() -> None:
    wide = make_problem((8, 2048, 4, 256, 512))
    tile = TileKernelConfig(64, 64, 64, 4, 3)
    walk = ChunkKernelConfig(32, 128, 8, 3)
    once = ChunksBackwardConfig(PrepareKernelConfig(32, 64, 2, 2), walk, tile, walk)
    prepare, walks, again, chunks, exact = kernel_work(wide, once, H200)
    assert [k.template for k in (again, exact)] == ["gla_bwd_walks_exact", "gla_bwd_chunks_exact"]
    tokens, states = 8 * 2048 * 4, 2 * 8 * 4 * 32 * 256 * 512 * 2
    assert kept_states_bytes(wide, once) == states
    assert (prepare.programs, prepare.steps) == (32 * 64, 1)
    assert (walks.programs, walks.steps) == (2 * 4 * 32, 64)
    # Three scaled tiles and scores; v, do and dv; a state and its gradient for each chunk.
    assert walks.bytes == tokens * 2 * (3 * 256 + 32 + 3 * 512) + states
    assert (chunks.programs, chunks.steps) == (4 * 32 * 32, 1)
    # q, k, gate and their gradients; v and do; the states again.
    assert chunks.bytes == tokens * 2 * (6 * 256 + 2 * 512) + states
    pairs = replace(once, chunks=replace(tile, keep=2))
    half = {k.template: k for k in kernel_work(wide, pairs, H200)}
    assert kept_states_bytes(wide, pairs) == states // 2
    assert half["gla_bwd_walks"].bytes == walks.bytes - states // 2
    assert half["gla_bwd_chunks"].bytes == chunks.bytes - states // 2
    assert half["gla_bwd_chunks"].programs == chunks.programs
    assert half["gla_bwd_chunks"].flops > chunks.flops
    cut_twice = replace(once, segment=1024)
    names = [kernel.template for kernel in kernel_work(wide, cut_twice, H200)]
    assert names[:4] == ["gla_states", "gla_combine"] * 2
    assert kept_states_bytes(wide, cut_twice) == states + 2 * 2 * 32 * 256 * 512 * 4


def test_grouped_heads_move_less() -> None:
    grouped = replace(PROBLEM, q_group=1, k_group=4, s_group=2)
    sizes = grouped.tensor_bytes
    assert sizes["k"] * 4 == sizes["q"]
    assert sizes["v"] * 2 == sizes["o"]
    assert sum(sizes.values()) == grouped.bytes(Op.FORWARD)
    assert roofline(grouped, H200, config=FORWARD).bytes == grouped.bytes(Op.FORWARD)


def test_floors_by_hand() -> None:
    row = roofline(PROBLEM, GPUS["h100"], config=FORWARD)
    moved = TOKEN_HEADS * 2 * (3 * 128 + 2 * 128)
    assert row.bytes == moved
    assert row.memory_us == pytest.approx(moved / 3.0e12 * 1e6)
    assert row.compute_us == pytest.approx(TOKEN_HEADS * 4 * 128 * 128 / 750e12 * 1e6)
    assert row.floor_us == row.memory_us > row.compute_us
    assert row.intensity == pytest.approx(90112 / 1280)
    # Where heads are large and memory fast, the recurrence is what bounds the backward pass.
    large = make_problem((8, 2048, 4, 256, 512))
    assert floor_us(large, H200, Op.BACKWARD) == pytest.approx(
        useful_flops(large, Op.BACKWARD) / 750e12 * 1e6
    )


def test_matrix_rates_follow_the_operands() -> None:
    rates = [matrix_rate(H200, dtype) for dtype in (DType.BF16, DType.FP16, DType.FP32)]
    assert rates == [750e12, 375e12, 125e12]


def test_the_step_model_by_hand() -> None:
    options: dict[str, Any] = {"bytes": 0, "launches": 1}
    # One program walks 100 chunks that do nothing: latency alone, and a launch.
    idle = predict(H200, DType.BF16, programs=1, steps=100, warps=8, flops=0, exps=0, **options)
    assert idle == pytest.approx(3.0 + 100 * 0.39)
    # Half as many programs as fit take as long; one more than fit takes a second wave.
    fits = {"steps": 100, "warps": 8, "exps": 0, **options}
    whole = predict(H200, DType.BF16, programs=132, flops=132 * 10**9, **fits)
    assert predict(H200, DType.BF16, programs=66, flops=66 * 10**9, **fits) == whole
    assert predict(H200, DType.BF16, programs=133, flops=133 * 10**9, **fits) == pytest.approx(
        2 * whole - 3.0
    )
    memory = predict(
        H200, DType.BF16, programs=132, steps=1, warps=8, flops=0, exps=0,
        bytes=42 * 10**9, launches=2,
    )  # fmt: skip
    assert memory == pytest.approx(6.0 + 10_000)


# ---- properties ----


@hypothesis.given(
    problems(), st.sampled_from(sorted(GPUS)), st.sampled_from((Op.FORWARD, Op.BACKWARD))
)
def test_bytes_are_those_of_the_problem(problem: Problem, name: str, op: Op) -> None:
    gpu = GPUS[name]
    config = default_config(op, problem.spec, gpu, problem.bucket)
    row = roofline(problem, gpu, op.value, config=config)
    assert row.bytes == problem.bytes(op)
    sizes = problem.tensor_bytes
    gradients = sum(sizes[name] for name in ("q", "k", "v", "gate")) if op is Op.BACKWARD else 0
    assert sum(sizes.values()) + gradients == problem.bytes(op)
    assert row.moved_bytes >= row.bytes
    assert row.flops >= row.useful_flops
    assert row.floor_us == pytest.approx(max(row.memory_us, row.compute_us))
    assert row.predicted_us >= row.memory_us
    assert row.predicted_us >= row.algorithm_us


@hypothesis.given(problems(), st.integers(2, 5))
def test_work_is_linear_in_tokens_and_heads(problem: Problem, times: int) -> None:
    problem = replace(problem, T=128 * (1 + problem.T // 128 % 64))
    config = default_config(Op.FORWARD, problem.spec, H200, replace(problem, B=256).bucket)
    assert isinstance(config, ForwardConfig)
    config = ForwardConfig(config.fwd)
    base = roofline(problem, H200, config=config)
    for more in (replace(problem, T=times * problem.T), replace(problem, B=times * problem.B)):
        row = roofline(more, H200, config=config)
        assert row.flops == times * base.flops
        assert row.useful_flops == times * base.useful_flops
        if problem.spec.gate is Gate.VECTOR:
            assert row.bytes == times * base.bytes


COUNTED = [problem for problem in SUITES["full"] if not problem.spec.gate.is_scalar]


@pytest.mark.parametrize("problem", COUNTED, ids=str)
def test_training_is_forward_and_backward(problem: Problem) -> None:
    forward, backward, both = (roofline(problem, H200, op) for op in PASSES)
    for name in ("bytes", "useful_flops", "flops", "moved_bytes", "floor_us", "predicted_us"):
        parts = getattr(forward, name) + getattr(backward, name)
        assert getattr(both, name) == pytest.approx(parts), name
    assert both.kernels == forward.kernels + backward.kernels


@pytest.mark.parametrize("name", sorted(GPUS))
def test_every_problem_of_the_grid_has_a_row_on_every_gpu(name: str) -> None:
    for problem in SUITES["grid"]:
        row = roofline(problem, GPUS[name], "training")
        assert 0 < row.predicted_share <= 1
        json.dumps(row.to_dict())


STUDIES = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def chunk_kernel(slug: str) -> ChunkKernelConfig:
    found = re.fullmatch(r"c(\d+)_bv(\d+)_w(\d)_s(\d)(_tma)?", slug)
    assert found, slug
    chunk, block_v, warps, stages = map(int, found.groups()[:4])
    return ChunkKernelConfig(chunk, block_v, warps, stages, bool(found[5]))


def forward_config(slug: str) -> ForwardConfig:
    fwd, *rest = slug.split("-")
    if not rest:
        return ForwardConfig(chunk_kernel(fwd))
    return ForwardConfig(
        chunk_kernel(fwd), int(rest[0].removeprefix("seg")), chunk_kernel(rest[1])
    )


def backward_config(slug: str) -> BackwardConfig:
    grads, states, *dv = slug.split("-")
    found = re.fullmatch(r"c(\d+)_bk(\d+)_bv(\d+)_w(\d)_s(\d)(_tma)?(_dv)?", grads)
    assert found, grads
    chunk, block_k, block_v, warps, stages = map(int, found.groups()[:5])
    tma, dv_too = bool(found[6]), bool(found[7])
    tile = TileKernelConfig(chunk, block_k, block_v, warps, stages, tma, dv_too)
    values = chunk_kernel(dv[0].removeprefix("dv_")) if dv else None
    return BackwardConfig(chunk_kernel(states.removeprefix("st_")), tile, values)


def study(name: str) -> dict[Problem, list[tuple[float, str]]]:
    """Problem to (us, config), the fastest first."""
    found: dict[Problem, list[tuple[float, str]]] = {}
    with (STUDIES / name).open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["us"]:
                shape = tuple(int(row[key]) for key in "BTHKV")
                lowrank = row["gate"].startswith("lowrank")
                gate = (Gate.LOWRANK, 16) if lowrank else (Gate.VECTOR, 0)
                found.setdefault(make_problem(shape, *gate), []).append(
                    (float(row["us"]), row["config"])
                )
    return {problem: sorted(rows) for problem, rows in found.items()}


def test_the_model_is_as_good_as_its_page_says() -> None:
    errors, winners = [], []
    for problem, candidates in study("h200_forward_study.csv").items():
        best = candidates[0][0]
        for us, slug in candidates:
            config = forward_config(slug)
            if us < 1.25 * best and config.fwd.num_stages > 1:
                predicted = roofline(problem, H200, config=config).predicted_us
                errors.append(abs(math.log(predicted / us)))
                if us == best:
                    winners.append(predicted / us)
    assert len(errors) == 98
    assert sum(errors) / len(errors) < 0.095
    assert 1.02 < min(winners) < max(winners) < 1.31
    backward = [
        roofline(problem, H200, "backward", config=backward_config(slug)).predicted_us / us
        for problem, ((us, slug), *_) in study("h200_backward_study.csv").items()
        if problem.spec.gate is Gate.VECTOR  # the others' kernels are gone
    ]
    assert len(backward) == 5
    assert 0.77 < min(backward) < max(backward) < 0.96


# ---- what was measured ----


def test_names_of_devices() -> None:
    def name(device: str) -> str | None:
        found: GpuSpec | None = named_gpu(device)
        return found.name if found else None

    assert name("NVIDIA H200") == "h200"
    assert name("NVIDIA H100 80GB HBM3") == "h100"
    assert name("NVIDIA H100 PCIe") == "h100-pcie"
    assert name("NVIDIA A100-SXM4-80GB") == "a100"
    assert name("NVIDIA H100 NVL") is None
    assert name("NVIDIA A100-PCIE-40GB") is None
    assert name("NVIDIA L4") is None
    assert name("") is None


def test_tuned_times_belong_to_their_device() -> None:
    h100 = GPUS["h100"]
    here = tuned_measurements(PROBLEM, h100, Op.FORWARD)
    assert [(item.gpu, item.device[:11]) for item in here] == [
        ("h100", "NVIDIA H100"),
        ("h200", "NVIDIA H200"),
    ]
    rate = h100.copy_bandwidth / 1e6
    assert here[0].share == pytest.approx(PROBLEM.bytes(Op.FORWARD) / rate / here[0].us)
    # A relative's file with the same measurement does not count twice.
    borrowed = tuned_measurements(PROBLEM, H200, Op.FORWARD)
    assert len({(item.device, item.us) for item in borrowed}) == len(borrowed) >= 1
    # Another length of the same bucket was not measured.
    assert tuned_measurements(replace(PROBLEM, T=2047), h100, Op.FORWARD) == []


def results(**changes: Any) -> dict[str, Any]:
    row = {
        **{"op": "forward", "impl": "glac", "B": 16, "T": 2048, "H": 8, "K": 128, "V": 128},
        **{"dtype": "bf16", "gate": "vector", "gate_rank": 0, "gate_dtype": "bf16", "us": 100.0},
        **{"floor_us": 80.0, "date": "2026-01-02T03:04:05+00:00", "config_id": "c32"},
        **changes,
    }
    return {"schema": 2, "env": {"gpu": "NVIDIA H200", "copy_bandwidth": 4.0e12}, "rows": [row]}


def test_results_of_exactly_this_problem() -> None:
    (found,) = bench_measurements(PROBLEM, "forward", [("mine.json", results())])
    assert (found.us, found.gpu, found.source) == (100.0, "h200", "mine.json")
    assert found.floor_us == pytest.approx(PROBLEM.bytes(Op.FORWARD) / 4.0e12 * 1e6)
    for change in ({"T": 2047}, {"impl": "fla"}, {"op": "training"}, {"us": None}):
        assert bench_measurements(PROBLEM, "forward", [("x", results(**change))]) == []
    unlisted = results()
    unlisted["env"]["gpu"] = "NVIDIA L4"
    (other,) = bench_measurements(PROBLEM, "forward", [("x", unlisted)])
    assert (other.gpu, other.floor_us, other.share) == ("", 80.0, 0.8)


def test_this_gpus_newest_time_comes_first() -> None:
    old, new = results(us=90.0, date="2025-01-01"), results(us=70.0, date="2099-01-01")
    elsewhere = results(us=10.0, date="2099-01-02")
    elsewhere["env"]["gpu"] = "NVIDIA A100-SXM4-80GB"
    found = [("old", old), ("elsewhere", elsewhere), ("new", new)]
    best = roofline(PROBLEM, H200, results=found).best_measured
    assert best is not None
    assert best.us == 70.0


@pytest.mark.parametrize(
    "document", [[], {}, {"schema": 1}, {"schema": 2, "env": {}, "rows": None}, "text"]
)
def test_results_that_are_none_are_refused(document: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document) if document != "text" else "no json")
    with pytest.raises(ConfigError, match=r"x\.json"):
        load_results([path])


def test_a_row_without_a_column_is_named() -> None:
    broken = results()
    del broken["rows"][0]["gate_rank"]
    with pytest.raises(ConfigError, match="mine: a row has no valid 'gate_rank'"):
        bench_measurements(PROBLEM, "forward", [("mine", broken)])


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="unknown op 'sideways'"):
        roofline(PROBLEM, H200, "sideways")
    with pytest.raises(ConfigError, match="packed batch is not counted"):
        roofline(replace(PROBLEM, B=1, packed=16), H200, config=FORWARD)
    with pytest.raises(ConfigError, match="forward pass is none of op backward"):
        roofline(PROBLEM, H200, "backward", config=FORWARD)


# ---- the chart ----


def rows() -> list[Roofline]:
    timed = [("r", results(date="2099-01-01"))]
    return [roofline(PROBLEM, H200, op, results=timed) for op in ("forward", "backward")]


def test_chart_data() -> None:
    data = chart(rows())
    forward, backward = data.points
    assert forward.label == "16,2048,8,128,128 vector forward"
    assert forward.bound == pytest.approx(forward.intensity * 4.2e12)
    assert forward.measured == pytest.approx(rows()[0].flops / 100e-6)
    assert forward.predicted is not None
    assert backward.bound <= data.rate == 750e12


def test_times_of_another_gpu_are_not_drawn() -> None:
    row = roofline(PROBLEM, GPUS["a100"], results=[("r", results())])
    assert row.measured
    assert chart([row]).points[0].measured is None


def test_a_chart_has_one_roof() -> None:
    with pytest.raises(ConfigError, match="one roof, got 2"):
        chart([roofline(PROBLEM, GPUS[name]) for name in ("h100", "h200")])
    with pytest.raises(ConfigError, match="one roof, got 0"):
        chart([])


def test_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    draw(chart(rows()), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot be drawn"):
        draw(chart(rows()), tmp_path / "x.gif2")
    with pytest.raises(MissingEnvironmentError, match="cannot write"):
        draw(chart(rows()), tmp_path / "missing" / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingEnvironmentError, match="matplotlib") as caught:
        draw(chart(rows()), tmp_path / "y.png")
    assert "glac[bench]" in caught.value.hint


# ---- the command ----


def glac(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, ["roofline", *map(str, words)])


def test_one_problem() -> None:
    done = glac("16,2048,8,128,128", "--gpu", "h200")
    assert done.exit_code == 0, done.output
    for text in ("16,2048,8,128,128", "training", "gla_states", "ridge at 179", "served by"):
        assert text in done.stdout


def test_json_of_a_suite() -> None:
    done = glac("--suite", "lengths", "--op", "forward", "--json")
    data = json.loads(done.stdout)["data"]
    assert (done.exit_code, data["gpu"]) == (0, "h100")
    assert [row["T"] for row in data["rows"]] == [1024 << i for i in range(8)]
    assert len({row["floor_us"] for row in data["rows"]}) == 1
    assert all(row["kernels"] for row in data["rows"])


def test_a_part_of_a_suite() -> None:
    done = glac("--suite", "grid", "--gate", "lowrank", "--op", "backward", "--json")
    found = json.loads(done.stdout)["data"]["rows"]
    assert len(found) == 10
    assert {row["rank"] for row in found} == {16}


def test_chart_and_results_of_the_command(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(results(us=79.0, date="2099-01-01")))
    picture = tmp_path / "x.png"
    words = ("16,2048,8,128,128", "--gpu", "h200", "--results", mine, "-o", picture, "--json")
    done = glac(*words)
    assert done.exit_code == 0, done.output
    first = json.loads(done.stdout)["data"]["rows"][0]
    assert first["measured"][0]["source"] == "mine.json"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_required_packs_do_not_forbid_to_reckon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLAC_REQUIRE_AOT", "1")
    assert glac("1,64,1,16,16").exit_code == 0


def test_without_a_compiler_the_same_config_is_reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    with_compiler = roofline(PROBLEM, H200)
    monkeypatch.setattr(dispatch, "can_build", lambda: False)
    without = roofline(PROBLEM, H200)
    assert without.config_id == with_compiler.config_id
    assert without.served_by.startswith("torch: ")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("1,2,3",),
        ("1,64,1,16,16", "--suite", "grid"),
        ("--suite", "grid", "--rank", "16"),
        ("--suite", "lengths", "--gate", "lowrank"),
        ("1,64,1,16,16", "--rank", "16"),
        ("1,64,1,16,16", "--op", "sideways"),
        ("1,64,1,16,16", "--gpu", "tpu"),
        ("1,64,1,16,16", "--length", "5"),
        ("--model", "gla-1.3b", "--gate", "vector"),
        ("--model", "gla-1.3b", "1,64,1,16,16"),
        ("--model", "gla-1.3b", "--length", "0"),
    ],
)
def test_wrong_usage(words: tuple[str, ...]) -> None:
    assert glac(*words).exit_code == 2


@pytest.mark.parametrize(
    "words",
    [
        ("1,64,1,1024,16",),
        ("1,64,1,16,16", "--gate", "lowrank", "--rank", "7"),
        ("1,64,1,16,16", "--dtype", "bf16", "--gate-dtype", "fp16"),
        ("1,64,1,16,16", "--results", "no/such.json"),
        ("--suite", "full", "-o", "x.png"),
        ("--model", "no-such-model"),
    ],
)
def test_impossible_requests(words: tuple[str, ...]) -> None:
    done = glac(*words, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["code"] == "config"


@pytest.mark.parametrize("words", [("16,2048,8,128,128",), ("--model", "gla-340m")])
def test_it_needs_no_torch(words: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom glac.cli import cli\ntry:\n    cli.main(sys.argv[1:])\n"
        "except SystemExit as done:\n    assert not done.code\n"
        "print([m for m in ('torch', 'triton', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "roofline", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
