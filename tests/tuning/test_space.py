"""The search space: legal, pruned to what minutes of compiling allow, and led by the default."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from glac.configs import (
    BackwardConfig,
    ChunksBackwardConfig,
    ForwardConfig,
    default_config,
    is_legal,
)
from glac.errors import ConfigError
from glac.gpus import GPUS
from glac.kernelspec import config_kernels
from glac.problem import DType, Gate, Op, Problem
from glac.tuning.propose import coordinates
from glac.tuning.space import (
    EXHAUSTIVE,
    KEEPS_TRIED,
    QUICK_CANDIDATES,
    SUITES,
    Space,
    make_problem,
    space,
)

PROBLEMS = tuple(p for p in SUITES["full"] if p.ops == (Op.FORWARD, Op.BACKWARD))
STANDARD = tuple(p for p in SUITES["standard"] if p in PROBLEMS)
OTHERS = tuple(p for p in SUITES["full"] if p not in PROBLEMS)
ODD = tuple(
    make_problem(shape, dtype=dtype)
    for shape in ((1, 1, 1, 1, 1), (2, 100, 3, 40, 33), (1, 4096, 2, 256, 512), (3, 7, 5, 16, 16))
    for dtype in DType
)


def forward(problem: Problem, gpu: str = "h100") -> list[ForwardConfig]:
    found = space(problem, GPUS[gpu]).configs
    return [config for config in found if isinstance(config, ForwardConfig)]


def at_once(problem: Problem, gpu: str = "h100") -> list[ChunksBackwardConfig]:
    configs = space(problem, GPUS[gpu], op=Op.BACKWARD).configs
    return [c for c in configs if isinstance(c, ChunksBackwardConfig)]


def backward(problem: Problem, gpu: str = "h100") -> list[BackwardConfig]:
    found = space(problem, GPUS[gpu], op=Op.BACKWARD).configs
    return [config for config in found if isinstance(config, BackwardConfig)]


@pytest.mark.parametrize("op", list(Op))
@pytest.mark.parametrize("problem", [*PROBLEMS, *OTHERS, *ODD], ids=str)
@pytest.mark.parametrize("gpu", ["h100", "a100"])
def test_candidates_are_legal_and_distinct(problem: Problem, gpu: str, op: Op) -> None:
    if not op.serves(problem.spec.gate):
        return
    found = space(problem, GPUS[gpu], op=op)
    configs = found.configs
    assert found.op is op
    assert configs[0] == default_config(op, problem.spec, GPUS[gpu], problem.bucket)
    assert len(set(configs)) == len(configs) == len({c.slug for c in configs})
    assert all(is_legal(problem.spec, c, GPUS[gpu]) for c in configs)
    # A sampler must be able to tell all candidates apart.
    points = {tuple(sorted(coordinates(config).items())) for config in configs}
    assert len(points) == len(configs)


@pytest.mark.parametrize("problem", [*PROBLEMS, *ODD], ids=str)
def test_segments_are_at_most_half_a_sequence(problem: Problem) -> None:
    others = [c for c in forward(problem)[1:] if not c.fwd.lead]
    assert all(c.segment == 0 or 2 * c.segment <= problem.T for c in others)


def test_programs_walk_to_their_segments_where_heads_are_few_and_sequences_short() -> None:
    def leading(B: int, T: int, K: int = 64, gpu: str = "h100") -> tuple[int, int]:
        problem = make_problem((B, T, 8, K, K))
        return (
            sum(c.fwd.lead > 0 for c in forward(problem, gpu)),
            sum(c.grads.lead > 0 for c in backward(problem, gpu)),
        )

    assert min(leading(8, 1024)) >= 12
    assert leading(16, 1024) == leading(8, 16384) == leading(8, 128) == (0, 0)
    assert leading(8, 1024, gpu="a100") == leading(8, 2048, 256) == (0, 0)
    short = make_problem((8, 1024, 8, 64, 64))
    for c in forward(short):
        if c.fwd.lead:  # the first program has no way to go, so more to do there
            assert short.T / 2 <= c.segment < short.T


@pytest.mark.parametrize("problem", STANDARD, ids=str)
def test_standard_problems_can_be_tried_whole(problem: Problem) -> None:
    gpu = GPUS["h100"]
    found = forward(problem)
    assert 60 <= len(found) <= EXHAUSTIVE
    assert sum(c.segment == 0 for c in found) >= 50
    kernels = {k for c in found for k in config_kernels(problem.spec, c, gpu.arch)}
    assert len(kernels) <= EXHAUSTIVE


@pytest.mark.parametrize("problem", STANDARD, ids=str)
def test_backward_can_be_tried_whole(problem: Problem) -> None:
    found = backward(problem)
    assert 60 <= len(found) <= EXHAUSTIVE - len(at_once(problem))
    # Few kernels, combined: a kernel costs far more to compile than a combination to time.
    kernels = {k for c in found for k in config_kernels(problem.spec, c, "sm_90a")}
    assert len(kernels) <= 40
    for part in ("states", "grads", "dv"):
        assert len({getattr(c, part) for c in found}) >= 3
    if problem.spec.K <= 128:
        assert {c.dv is None for c in found} == {True, False}
    assert any(c.grads.tma for c in found)
    assert not any(c.grads.tma or (c.states and c.states.tma) for c in backward(problem, "a100"))
    assert {c.grads.keep for c in backward(problem, "a100")} == {1, *KEEPS_TRIED}
    # Where programs walk to their segments there are no windows to spare.
    keeps = () if any(c.grads.lead for c in found) else KEEPS_TRIED
    assert {c.grads.keep for c in found} == {1, *keeps}


def test_backward_candidates_fill_the_gpu_with_segments() -> None:
    few, many = make_problem((2, 16384, 16, 128, 128)), make_problem((4, 4096, 64, 128, 128))
    assert {c.segment for c in backward(few)} == {4096, 8192}  # by how many tiles share a head
    assert {c.segment for c in backward(many)} == {0}


def test_prepared_passes_only_where_a_head_has_several_tiles() -> None:
    wide, square = make_problem((8, 2048, 4, 128, 256)), make_problem((8, 2048, 4, 128, 128))
    assert {c.prepare.chunk for c in forward(wide) if c.prepare} == {32, 64}
    assert any(c.segment and c.prepare for c in forward(wide))
    assert any(c.prepare is None for c in forward(wide)[1:])
    assert not any(c.prepare for c in forward(square))
    assert not any(c.prepare for c in forward(wide, "a100"))
    half = make_problem((8, 2048, 4, 128, 256), dtype=DType.FP16)
    assert not any(c.prepare for c in forward(half))


def test_chunks_at_once_where_walks_repeat_themselves() -> None:
    wide, square = make_problem((8, 2048, 4, 128, 256)), make_problem((8, 2048, 4, 128, 128))
    assert {c.walks.chunk for c in at_once(wide)} == {32, 64}
    assert {c.chunks.block_k for c in at_once(wide)} == {64, 128}
    assert {c.chunks.keep for c in at_once(wide)} == {1, 2}
    assert not at_once(square)
    assert at_once(make_problem((8, 2048, 4, 128, 256), Gate.LOWRANK, 16)) == at_once(wide)
    assert not at_once(wide, "a100")
    assert not at_once(make_problem((8, 2048, 4, 128, 256), dtype=DType.FP16))
    long = at_once(make_problem((1, 32768, 4, 256, 512)))
    assert {c.segment for c in long} == {0, 8192, 16384}  # by how many tiles share a head
    kernels = {k for c in long for k in config_kernels(wide.spec, c, "sm_90a")}
    assert len(kernels) <= 20


def test_summaries_of_long_segments_stop() -> None:
    long = make_problem((1, 32768, 4, 128, 128))
    cut = [c for c in forward(long) if c.summary is not None]
    assert {c.segment >= 4096 for c in cut} == {True, False}
    assert all(c.summary.stops == (c.segment >= 4096) for c in cut if c.summary)
    assert any(c.fwd.product_ends for c in forward(long))
    assert not any(c.summary.product_ends for c in cut if c.summary)
    more = make_problem((2, 16384, 16, 128, 128))
    default, *others = backward(more)  # what runs untuned has been measured as it is
    assert default.segment == 8192
    walks = [c.states for c in others if c.states and c.segment >= 4096]
    assert walks
    assert all(states.stops for states in walks)
    wide = [c for c in at_once(make_problem((1, 32768, 4, 256, 512))) if c.segment]
    assert all(c.states.stops for c in wide)
    short = make_problem((8, 2048, 4, 128, 256))
    assert not any(c.states.stops for c in backward(short) if c.states)
    assert not any(c.states.stops for c in at_once(short))


def test_segments_only_where_programs_are_few() -> None:
    many = make_problem((16, 2048, 32, 128, 128))
    few = make_problem((1, 4096, 4, 128, 128))
    long = make_problem((16, 16384, 32, 128, 128))
    assert not any(c.segment for c in forward(many))
    assert {c.segment for c in forward(few)} >= {0, 256, 512}
    assert any(c.segment for c in forward(long))


@pytest.mark.parametrize("op", list(Op))
def test_quick_is_a_part_of_the_whole(op: Op) -> None:
    gpu = GPUS["h100"]
    for problem in SUITES["standard"]:
        if not op.serves(problem.spec.gate):
            continue
        quick = space(problem, gpu, "quick", op)
        assert 6 <= len(quick.configs) <= QUICK_CANDIDATES
        assert quick.configs[0] == quick.default
        assert set(quick.configs) <= set(space(problem, gpu, op=op).configs)
    with pytest.raises(ConfigError, match="effort"):
        space(SUITES["quick"][0], gpu, "heroic", op)


def test_descriptors_only_on_hopper() -> None:
    problem = SUITES["quick"][0]
    assert any(c.fwd.tma for c in forward(problem))
    assert not any(c.fwd.tma for c in forward(problem, "a100"))


def test_a_space_is_named_by_problem_and_op() -> None:
    problem = make_problem((1, 64, 2, 16, 16))
    found: Space = space(problem, GPUS["h100"], op=Op.BACKWARD)
    assert str(found) == f"{problem} backward"


@pytest.mark.parametrize("problem", [p for p in SUITES["standard"] if p in OTHERS], ids=str)
def test_other_ops_can_be_tried_whole(problem: Problem) -> None:
    gpu = GPUS["h100"]
    for op in problem.ops:
        found = space(problem, gpu, op=op).configs
        assert 6 <= len(found) <= EXHAUSTIVE
        kernels = {k for c in found for k in config_kernels(problem.spec, c, gpu.arch)}
        assert len(kernels) <= EXHAUSTIVE


def test_suites_hold_the_published_problems() -> None:
    assert [str(p) for p in SUITES["quick"]] == ["B=16 T=2048 H=8 k128_v128_vector_bf16"]
    assert len(STANDARD) == 7
    assert sum(p.spec.gate is Gate.LOWRANK for p in SUITES["standard"]) == 2
    assert set(SUITES["standard"]) < set(SUITES["full"])
    keys = [(p.spec, p.bucket) for p in SUITES["full"]]
    assert len(set(keys)) == len(keys), "two problems would fight for one row"


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="B,T,H,K,V"):
        make_problem((1, 2, 3))
    with pytest.raises(ConfigError, match="K must be"):
        make_problem((1, 2, 3, 4000, 5))
    with pytest.raises(ConfigError, match="rank"):
        make_problem((1, 2, 3, 64, 64), Gate.LOWRANK, 7)


def glac(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "glac", "tune", *words], capture_output=True, text=True, check=False
    )


def test_dry_run_needs_no_gpu() -> None:
    done = glac("--gpu", "h100", "--dry-run", "--suite", "quick", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["schema"] == 1
    assert data["ok"] is True
    assert data["data"]["candidates"] == 2 * QUICK_CANDIDATES
    assert [row["op"] for row in data["data"]["problems"]] == ["forward", "backward"]
    one = glac("--gpu", "h100", "--dry-run", "--suite", "quick", "--op", "forward", "--json")
    assert json.loads(one.stdout)["data"]["candidates"] == QUICK_CANDIDATES
    text = glac("--gpu", "a100", "--dry-run", "--shape", "1,64,2,16,16", "--rank", "16")
    assert text.returncode == 0, text.stderr
    assert "k16_v16_lowrank16_bf16" in text.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("--gpu", "h100", "--suite", "quick", "--shape", "1,2,3,4,5"),
        ("--gpu", "h100", "--rank", "16"),
        ("--gpu", "h100", "--shape", "1,2,3,4,5", "--gate", "vector", "--rank", "16"),
        ("--gpu", "h100", "--compile-only", "a", "--from", "b"),
        ("--gpu", "h100", "--shape", "1,2,3"),
        ("--gpu", "h100", "--op", "sideways"),
        ("--gpu", "tpu"),
    ],
)
def test_contradicting_options_are_usage_errors(words: tuple[str, ...]) -> None:
    assert glac(*words).returncode == 2


def test_the_light_modules_import_no_torch_and_no_optuna() -> None:
    code = (
        "import sys, glac.tuning.cli, glac.tuning.space, glac.tuning.candidates;"
        "import glac.tuning.worker, glac.tuning.study, glac.tuning.export, glac.tuning.run;"
        "print([m for m in ('torch', 'optuna', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
