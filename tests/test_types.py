"""Problems, configs, kernel names, GPUs, templates: what every other room relies on."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from glac import templates
from glac.configs import (
    BLOCKS_K,
    BLOCKS_V,
    CHUNKS,
    CONFIGS,
    KEEPS,
    KERNEL_CONFIGS,
    LEADS,
    MAX_SEGMENTS,
    STAGES,
    WARPS,
    BackwardConfig,
    ChunkKernelConfig,
    ChunksBackwardConfig,
    CombineKernelConfig,
    Config,
    DecodeConfig,
    DecodeKernelConfig,
    ExactKernelConfig,
    ForwardConfig,
    GateKernelConfig,
    KernelConfig,
    PrepareKernelConfig,
    ScalarBackwardConfig,
    ScalarForwardConfig,
    SumsKernelConfig,
    TileKernelConfig,
    TurnedKernelConfig,
    config_from_dict,
    default_config,
    is_legal,
    lesser_choices,
    segmentation,
    walking_programs,
    why_illegal,
)
from glac.errors import ConfigError
from glac.gpus import ARCHS, GPUS, RELATIVES, gpu_by_name, match_gpu
from glac.kernelspec import KernelSpec, config_kernels
from glac.problem import (
    LOWRANK_RANKS,
    Bucket,
    DType,
    Gate,
    Op,
    Precision,
    Problem,
    Specialisation,
)
from glac.templates import (
    AROUND_GATE,
    OP_TEMPLATES,
    TEMPLATES,
    active_args,
    constants,
    pointer_type,
    sources_sha256,
    state_dtype,
    stride_unit,
    template_ops,
    templates_sha256,
    tiles,
    unused_args,
)


@st.composite
def specs(draw: st.DrawFn) -> Specialisation:
    dtype = draw(st.sampled_from(list(DType)))
    gate = draw(st.sampled_from(list(Gate)))
    forms = list(Precision) if dtype is DType.FP32 else [Precision.IEEE]
    return Specialisation(
        K=draw(st.integers(1, 256)),
        V=draw(st.integers(1, 512)),
        dtype=dtype,
        gate=gate,
        gate_dtype=draw(st.sampled_from([dtype, DType.FP32])),
        rank=draw(st.sampled_from(LOWRANK_RANKS)) if gate is Gate.LOWRANK else 0,
        precision=draw(st.sampled_from(forms)),
    )


CHUNK_CONFIGS = st.builds(
    ChunkKernelConfig,
    st.sampled_from(CHUNKS),
    st.sampled_from(BLOCKS_V),
    st.sampled_from(WARPS),
    st.sampled_from(STAGES),
    st.booleans(),
    st.sampled_from(LEADS),
)
TILE_CONFIGS = st.builds(
    TileKernelConfig,
    st.sampled_from(CHUNKS),
    st.sampled_from(BLOCKS_K),
    st.sampled_from(BLOCKS_V),
    st.sampled_from(WARPS),
    st.sampled_from(STAGES),
    st.booleans(),
    st.booleans(),
    st.sampled_from(KEEPS),
    st.sampled_from(LEADS),
)
EXACT_CONFIGS = st.builds(
    ExactKernelConfig,
    st.sampled_from(CHUNKS),
    st.sampled_from(BLOCKS_K),
    st.sampled_from(BLOCKS_V),
    st.sampled_from(WARPS),
    st.booleans(),
)
TURNED_CONFIGS = st.builds(
    TurnedKernelConfig,
    st.sampled_from(CHUNKS),
    st.sampled_from(BLOCKS_V),
    st.sampled_from(WARPS),
    st.sampled_from(STAGES),
    st.booleans(),
    st.booleans(),
)
DECODE_CONFIGS = st.builds(DecodeKernelConfig, st.sampled_from(BLOCKS_V), st.sampled_from(WARPS))
PREPARE_CONFIGS = st.builds(
    PrepareKernelConfig,
    st.sampled_from(CHUNKS),
    st.sampled_from(BLOCKS_K),
    st.sampled_from(WARPS),
    st.sampled_from(STAGES),
)
FORWARD_CONFIGS = st.builds(
    ForwardConfig, CHUNK_CONFIGS, prepare=st.none() | PREPARE_CONFIGS
) | st.builds(
    ForwardConfig,
    CHUNK_CONFIGS,
    st.sampled_from([128, 256, 1024]),
    CHUNK_CONFIGS,
    st.none() | PREPARE_CONFIGS,
)
BACKWARD_CONFIGS = st.builds(
    BackwardConfig, st.none() | CHUNK_CONFIGS, TILE_CONFIGS, st.none() | CHUNK_CONFIGS
)
ALL_CONFIGS = (
    FORWARD_CONFIGS
    | BACKWARD_CONFIGS
    | st.builds(ChunksBackwardConfig, PREPARE_CONFIGS, CHUNK_CONFIGS, TILE_CONFIGS, CHUNK_CONFIGS)
    | st.builds(ScalarForwardConfig, TURNED_CONFIGS)
    | st.builds(
        ScalarBackwardConfig, CHUNK_CONFIGS, CHUNK_CONFIGS, st.none(), st.none() | CHUNK_CONFIGS
    )
    | st.builds(ScalarBackwardConfig, CHUNK_CONFIGS, st.none(), TILE_CONFIGS, CHUNK_CONFIGS)
    | st.builds(DecodeConfig, DECODE_CONFIGS)
)
BUCKETS = st.builds(Bucket, st.integers(0, 30), st.integers(0, 30))
JUNK = st.none() | st.booleans() | st.floats() | st.text() | st.lists(st.integers(), max_size=2)

SPEC = Specialisation(128, 128, DType.BF16, Gate.VECTOR, DType.BF16)
CONFIG = ForwardConfig(ChunkKernelConfig(32, 128, 8, 3))
PREPARE = PrepareKernelConfig(32, 64, 4, 2)
PREPARED = replace(CONFIG, prepare=PREPARE)
BACKWARD = BackwardConfig(
    states=ChunkKernelConfig(16, 128, 8, 3),
    grads=TileKernelConfig(32, 64, 128, 4, 3),
    dv=ChunkKernelConfig(32, 128, 8, 3),
)
AT_ONCE = ChunksBackwardConfig(
    PREPARE, ChunkKernelConfig(32, 64, 4, 3), TileKernelConfig(64, 64, 64, 4, 3), CONFIG.fwd
)
H100 = GPUS["h100"]


@hypothesis.given(specs(), ALL_CONFIGS, BUCKETS)
def test_round_trips(spec: Specialisation, config: Config, bucket: Bucket) -> None:
    assert Specialisation.from_dict(spec.to_dict()) == spec
    assert config_from_dict(config.op, config.to_dict()) == config
    assert Bucket.from_dict(bucket.to_dict()) == bucket
    for kernel in config_kernels(spec, config, "sm_90a"):
        again = KernelSpec.from_dict(kernel.to_dict())
        assert again == kernel
        assert hash(again) == hash(kernel)
        assert again.name == kernel.name


STRICT: list[tuple[Any, Any]] = [
    (Specialisation, SPEC),
    (Bucket, Bucket(7, 11)),
    (ChunkKernelConfig, CONFIG.fwd),
    (CombineKernelConfig, CombineKernelConfig()),
    (TileKernelConfig, BACKWARD.grads),
    (ExactKernelConfig, BACKWARD.exact),
    (TurnedKernelConfig, TurnedKernelConfig(32, 128, 8, 3)),
    (DecodeKernelConfig, DecodeKernelConfig(32, 2)),
    (DecodeConfig, DecodeConfig(DecodeKernelConfig(32, 2))),
    (ScalarForwardConfig, ScalarForwardConfig(TurnedKernelConfig(32, 128, 8, 3))),
    (ScalarBackwardConfig, ScalarBackwardConfig(CONFIG.fwd, CONFIG.fwd)),
    (
        ScalarBackwardConfig,
        ScalarBackwardConfig(CONFIG.fwd, None, BACKWARD.grads, CONFIG.fwd),
    ),
    (PrepareKernelConfig, PREPARE),
    (ForwardConfig, CONFIG),
    (ForwardConfig, PREPARED),
    (BackwardConfig, BACKWARD),
    (ChunksBackwardConfig, AT_ONCE),
    (KernelSpec, KernelSpec("gla_fwd", SPEC, CONFIG.fwd, "sm_90a")),
    (KernelSpec, KernelSpec("gla_bwd", SPEC, BACKWARD.grads, "sm_90a")),
]


MAY_BE_MISSING = {
    (ForwardConfig, "summary"),
    (BackwardConfig, "states"),
    (BackwardConfig, "dv"),
    *((ScalarBackwardConfig, part) for part in ("chunks", "grads", "dv")),
}


@hypothesis.given(st.sampled_from(STRICT), st.data())
def test_from_dict_is_strict(case: tuple[Any, Any], data: st.DataObject) -> None:
    cls, value = case
    good = value.to_dict()
    # Forward configs and specialisations are older than these keys, and usually without them.
    optional = {(ForwardConfig, "prepare"), (Specialisation, "precision")}
    optional |= {(cls, name) for name in getattr(cls, "OMITTED", ())}
    keys = [field.name for field in fields(cls) if (cls, field.name) not in optional]
    key = data.draw(st.sampled_from(keys))
    without = {k: v for k, v in good.items() if k != key}
    with pytest.raises(ConfigError, match="missing keys"):
        cls.from_dict(without)
    with pytest.raises(ConfigError, match="unknown keys"):
        cls.from_dict({**good, "surprise": 1})
    junk = data.draw(JUNK)
    hypothesis.assume(junk is not None or (cls, key) not in MAY_BE_MISSING)
    hypothesis.assume(not (isinstance(junk, bool) and key in ("tma", "dv", "turned")))
    with pytest.raises(ConfigError):
        cls.from_dict({**good, key: junk})
    with pytest.raises(ConfigError, match="wanted a mapping"):
        cls.from_dict(data.draw(JUNK))


@pytest.mark.parametrize(
    "change",
    [
        {"K": 0},
        {"K": 513},
        {"V": 0},
        {"V": 513},
        {"gate_dtype": "fp16"},
        {"rank": 16},
        {"gate": "lowrank", "rank": 12},
        {"gate": "lowrank"},
        {"dtype": "fp64"},
        {"precision": "tf32"},  # beside bf16
        {"dtype": "fp16", "gate_dtype": "fp16", "precision": "tf32"},
        {"precision": "tf32x3"},
        {"precision": None},
    ],
)
def test_impossible_specialisations(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="here"):
        Specialisation.from_dict({**SPEC.to_dict(), **change}, "here")


@hypothesis.given(st.integers(1, 2**20), st.integers(1, 2**10), st.integers(1, 2**24))
def test_bucket_is_the_rounded_logarithm(B: int, H: int, T: int) -> None:
    bucket = Problem(SPEC, B, T, H).bucket
    for log2, value in ((bucket.bh, B * H), (bucket.t, T)):
        assert log2 == math.floor(math.log2(value) + 0.5)
        # Rounding, in integers: 2^(2n-1) <= value^2 <= 2^(2n+1).
        assert 2 ** (2 * log2) <= 2 * value**2 <= 4 * 2 ** (2 * log2)


def test_buckets_of_benchmarked_shapes() -> None:
    assert Problem(SPEC, 16, 2048, 8).bucket == Bucket(7, 11)
    assert Problem(SPEC, 1, 1, 1).bucket == Bucket(0, 0)
    assert Problem(SPEC, 1, 3, 3).bucket == Bucket(2, 2)
    assert Bucket(7, 11).distance(Bucket(5, 12)) == 3


@pytest.mark.parametrize(
    ("spec", "forward", "backward"),
    [
        # q k (4 each) v o (2 each), g as q: per token and head, 2 bytes each
        (replace(SPEC, K=4, V=2), 2 * 16, 2 * (2 * 14 + 2)),
        (replace(SPEC, K=4, V=2, gate_dtype=DType.FP32), 2 * 12 + 16, 2 * (2 * 10 + 2) + 32),
    ],
)
def test_bytes(spec: Specialisation, forward: int, backward: int) -> None:
    problem = Problem(spec, B=2, T=5, H=3)
    assert problem.bytes(Op.FORWARD) == problem.forward_bytes == 30 * forward
    assert problem.bytes(Op.BACKWARD) == 30 * backward


def test_bytes_of_a_lowrank_gate() -> None:
    spec = Specialisation(4, 2, DType.BF16, Gate.LOWRANK, DType.FP32, 8)
    problem = Problem(spec, B=2, T=5, H=3)
    # x, weight in bf16, bias in fp32
    gate = 2 * 5 * 8 * 2 + 3 * 4 * 8 * 2 + 3 * 4 * 4
    inputs = 30 * 2 * (4 + 4 + 2) + gate
    assert problem.bytes(Op.FORWARD) == inputs + 30 * 2 * 2
    assert problem.bytes(Op.BACKWARD) == 2 * inputs + 30 * 2 * 2


# Names.


@hypothesis.given(st.lists(st.tuples(specs(), ALL_CONFIGS), min_size=2, max_size=6))
def test_names_are_unique_and_safe(pairs: list[tuple[Specialisation, Config]]) -> None:
    kernels = {
        kernel
        for spec, config in pairs
        for arch in ARCHS
        for kernel in config_kernels(spec, config, arch)
    }
    names = {kernel.name for kernel in kernels}
    assert len(names) == len(kernels)
    assert all(re.fullmatch(r"[a-z0-9_]+-[0-9a-f]{8}", name) for name in names)


def test_names_are_stable() -> None:
    # Packs and tuned files store names: a change here makes all of them foreign.
    name = KernelSpec("gla_fwd", SPEC, CONFIG.fwd, "sm_90a").name
    assert name == "gla_fwd_k128_v128_vector_bf16_c32_bv128_w8_s3_sm90a-a86fe0a4"


def test_combine_kernel_is_shared_by_all_inputs() -> None:
    config = CombineKernelConfig()
    lowrank = Specialisation(128, 128, DType.FP16, Gate.LOWRANK, DType.FP32, 64)
    one, other = (KernelSpec("gla_combine", s, config, "sm_80") for s in (SPEC, lowrank))
    assert one == other


def test_a_precision_is_named_where_it_is_not_the_usual_one() -> None:
    usual = Specialisation(64, 128, DType.FP32, Gate.LOWRANK, DType.FP32, 16)
    once = replace(usual, precision=Precision.TF32)
    assert once.slug == usual.slug + "_tf32" == "k64_v128_lowrank16_fp32_tf32"
    assert once.to_dict() == {**usual.to_dict(), "precision": "tf32"}
    assert "precision" not in usual.to_dict()
    assert Specialisation.from_dict({**usual.to_dict(), "precision": "ieee"}) == usual
    assert usual < once or once < usual
    # Names of kernels from before there was a choice, as packs and tuned files have them.
    one, other = (KernelSpec("gla_fwd", s, CONFIG.fwd, "sm_90a") for s in (usual, once))
    assert one.name == "gla_fwd_k64_v128_lowrank16_fp32_c32_bv128_w8_s3_sm90a-930dfb58"
    assert other.name.startswith("gla_fwd_k64_v128_lowrank16_fp32_tf32_c32_bv128_w8_s3_sm90a-")
    assert one.hash8 != other.hash8


@hypothesis.given(specs(), ALL_CONFIGS)
def test_kernels_with_products_are_apart(spec: Specialisation, config: Config) -> None:
    """By precision; those without products are one kernel."""
    spec = replace(spec, dtype=DType.FP32, gate_dtype=DType.FP32, precision=Precision.IEEE)
    once = replace(spec, precision=Precision.TF32)
    pairs = zip(*(config_kernels(s, config, "sm_90a") for s in (spec, once)), strict=True)
    for usual, other in pairs:
        apart = usual.template not in ("gla_combine", "gla_decode", "gla_gate_sums")
        assert (usual != other) is apart
        if apart:
            found = [constants(k.template, k.spec, k.config) for k in (usual, other)]
            assert [c.pop("PRECISION") for c in found] == ["tf32x3", "tf32"]
            assert found[0] == found[1]
        else:
            assert "PRECISION" not in constants(usual.template, usual.spec, usual.config)


def test_unknown_template_or_arch() -> None:
    with pytest.raises(ConfigError, match="unknown template"):
        KernelSpec("gla_new", SPEC, CONFIG.fwd, "sm_80")
    with pytest.raises(ConfigError, match="gla_bwd takes a TileKernelConfig, got a Chunk"):
        KernelSpec("gla_bwd", SPEC, CONFIG.fwd, "sm_80")
    with pytest.raises(ConfigError, match="unknown arch"):
        KernelSpec("gla_fwd", SPEC, CONFIG.fwd, "sm_75")


# Legality.


def _chunk(**changes: Any) -> ChunkKernelConfig:
    return ChunkKernelConfig.from_dict({**CONFIG.fwd.to_dict(), **changes})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ForwardConfig(_chunk(chunk=48)), "fwd.chunk must be one of"),
        (ForwardConfig(_chunk(block_v=8)), "fwd.block_v must be one of"),
        (ForwardConfig(_chunk(num_warps=3)), "fwd.num_warps must be one of"),
        (ForwardConfig(_chunk(num_stages=0)), "fwd.num_stages must be one of"),
        (ForwardConfig(_chunk(block_v=256)), "exceeds V padded to 128"),
        (ForwardConfig(_chunk(num_warps=2)), ""),
        (ForwardConfig(_chunk(), 256), "summary must be given"),
        (ForwardConfig(_chunk(), 0, _chunk()), "summary must be given"),
        (ForwardConfig(_chunk(), 48, _chunk()), "segment must be a positive multiple of 32"),
        (ForwardConfig(_chunk(), 96, _chunk(chunk=64)), "multiple of 64"),
        (ForwardConfig(_chunk(), -32, _chunk()), "segment must be a positive multiple"),
        (ForwardConfig(_chunk(), 256, _chunk(chunk=8)), "summary.chunk"),
        (ForwardConfig(_chunk(lead=64), 192), ""),
        (ForwardConfig(_chunk(lead=64)), "segment must be a positive multiple of 64"),
        (ForwardConfig(_chunk(lead=64), 160), "segment must be a positive multiple of 64"),
        (ForwardConfig(_chunk(lead=24), 192), "fwd.lead must be one of"),
        (ForwardConfig(_chunk(lead=32), 192, _chunk()), "needs neither summary nor prepare"),
        (ForwardConfig(_chunk(lead=32), 192, None, PREPARE), "needs neither summary nor"),
        (ForwardConfig(_chunk(), 192, _chunk(lead=32)), "summary.lead must be 0"),
        (ForwardConfig(_chunk(), prepare=PREPARE), ""),
        (ForwardConfig(_chunk(), 256, _chunk(), PREPARE), ""),
        (ForwardConfig(_chunk(chunk=64), prepare=PREPARE), "fwd.chunk must be prepare.chunk 32"),
        (ForwardConfig(_chunk(), 256, _chunk(chunk=64), PREPARE), "summary.chunk must be prepare"),
        (ForwardConfig(_chunk(), prepare=replace(PREPARE, num_warps=3)), "prepare.num_warps must"),
        (ForwardConfig(_chunk(), prepare=replace(PREPARE, block_k=256)), "exceeds K padded to"),
        (ForwardConfig(_chunk(), 48, _chunk(), PREPARE), "segment must be a positive multiple"),
        (
            ForwardConfig(
                _chunk(chunk=128, num_stages=4), prepare=PrepareKernelConfig(128, 64, 4, 2)
            ),
            "fwd: 3 stages of inputs need",
        ),
    ],
)
def test_illegal(config: ForwardConfig, reason: str) -> None:
    assert (why_illegal(SPEC, config, H100) or "").find(reason) >= 0
    assert is_legal(SPEC, config, H100) == (reason == "")


def _tile(**changes: Any) -> TileKernelConfig:
    return TileKernelConfig.from_dict({**BACKWARD.grads.to_dict(), **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"grads": _tile(block_k=256)}, "grads.block_k 256 exceeds K padded to 128"),
        ({"grads": _tile(block_k=48)}, "grads.block_k must be one of"),
        ({"grads": _tile(block_v=256)}, "grads.block_v 256 exceeds V padded to 128"),
        ({"grads": _tile(num_warps=2)}, ""),
        ({"grads": _tile(num_warps=1)}, "grads.num_warps must be one of"),
        ({"grads": _tile(chunk=128, num_stages=4)}, "grads: 3 stages of inputs need"),
        ({"grads": _tile(dv=True), "dv": None}, "grads.dv takes all of K in a tile"),
        ({"grads": _tile(dv=True, block_k=128), "dv": None}, ""),
        ({"grads": _tile(dv=True, block_k=128)}, "dv must be given exactly when"),
        ({"dv": None}, "dv must be given exactly when"),
        ({"dv": _chunk(block_v=256)}, "dv.block_v 256 exceeds V padded to 128"),
        ({"grads": _tile(lead=64), "states": None, "segment": 192}, ""),
        ({"grads": _tile(lead=64), "states": None}, "segment must be a positive multiple of 64"),
        ({"grads": _tile(lead=64), "segment": 192}, "states must be given exactly when"),
        ({"states": None}, "states must be given exactly when grads.lead is 0"),
        ({"grads": _tile(lead=32, keep=2), "states": None, "segment": 192}, "needs grads.keep 1"),
        ({"states": _chunk(lead=32)}, "states.lead must be 0"),
        ({"states": _chunk(chunk=8)}, "states.chunk must be one of"),
        ({"states": _chunk(chunk=64)}, "must be a multiple of states.chunk 64"),
    ],
)
def test_illegal_backward(changes: dict[str, Any], reason: str) -> None:
    config = replace(BACKWARD, **changes)
    assert (why_illegal(SPEC, config, H100) or "").find(reason) >= 0
    assert is_legal(SPEC, config, H100) == (reason == "")


def test_state_tiles_have_registers() -> None:
    spec = replace(SPEC, K=256, V=256)
    grads = TileKernelConfig(16, 256, 128, 2, 1)
    config = replace(BACKWARD, states=_chunk(block_v=64, chunk=16), grads=grads)
    assert "the [256, 128] state needs 512 registers" in str(why_illegal(spec, config, H100))


def test_descriptors_need_hopper_and_whole_rows() -> None:
    config = ForwardConfig(_chunk(tma=True, block_v=64, num_stages=2))
    assert is_legal(SPEC, config, H100)
    assert "needs capability 9.0" in str(why_illegal(SPEC, config, GPUS["a100"]))
    odd = Specialisation(100, 128, DType.BF16, Gate.VECTOR, DType.BF16)
    assert "whole 16 bytes" in str(why_illegal(odd, config, H100))
    backward = replace(BACKWARD, grads=_tile(tma=True, chunk=32))
    assert is_legal(SPEC, backward, H100)
    assert "grads.tma needs" in str(why_illegal(SPEC, backward, GPUS["a100"]))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chunks": TileKernelConfig(64, 64, 64, 4, 3, tma=True)}, "kernels that walk"),
        ({"chunks": TileKernelConfig(64, 64, 64, 4, 3, dv=True)}, "kernels that walk"),
        ({"chunks": TileKernelConfig(64, 64, 64, 4, 3, keep=4)}, "keep must be 1 or 2"),
        ({"chunks": TileKernelConfig(64, 256, 64, 4, 3)}, "chunks.block_k 256 exceeds"),
        ({"chunks": TileKernelConfig(16, 64, 64, 4, 3)}, "multiple of walks.chunk 32"),
        ({"walks": ChunkKernelConfig(16, 64, 4, 3)}, "walks.chunk must be prepare.chunk 32"),
        ({"segment": 96}, "segment must be a positive multiple of 64"),
    ],
)
def test_chunks_at_once_are_checked(changes: dict[str, Any], reason: str) -> None:
    assert is_legal(SPEC, AT_ONCE, H100)
    assert is_legal(SPEC, replace(AT_ONCE, segment=128), H100)
    assert reason in str(why_illegal(SPEC, replace(AT_ONCE, **changes), H100))


def test_ways_of_a_kernel_are_for_some_parts_alone() -> None:
    stops, ends = _chunk(stops=True), _chunk(product_ends=True)
    cut = ForwardConfig(_chunk(), 64, stops)
    assert is_legal(SPEC, cut, H100)
    assert is_legal(SPEC, replace(cut, fwd=ends), H100)
    assert is_legal(SPEC, replace(BACKWARD, states=_chunk(chunk=16, stops=True)), H100)
    for config, reason in (
        (ForwardConfig(stops), "fwd.stops must be false"),
        (replace(cut, summary=ends), "summary.product_ends must be false"),
        (replace(BACKWARD, dv=_chunk(stops=True)), "dv.stops must be false"),
        (ForwardConfig(replace(ends, lead=32), 64), "fwd.product_ends must be false"),
        (ForwardConfig(ends, prepare=PREPARE), "chunks that nothing prepared"),
    ):
        assert reason in str(why_illegal(SPEC, config, H100))
    scalar = replace(SPEC, gate=Gate.SCALAR)
    walking = ScalarBackwardConfig(stops, _chunk(), None)
    assert "states.stops must be false" in str(why_illegal(scalar, walking, H100))
    for kernel in (stops, ends):
        assert ChunkKernelConfig.from_dict(kernel.to_dict()) == kernel
        assert kernel.slug != _chunk().slug
    assert "stops" not in _chunk().to_dict()


def test_parts_of_chunks_at_once_stay_legal() -> None:
    """What the build does where a kernel does not fit: walked chunks change together."""
    for part, kernel in (
        ("walks", ChunkKernelConfig(16, 64, 4, 3)),
        ("prepare", PrepareKernelConfig(16, 64, 4, 2)),
        ("chunks", TileKernelConfig(16, 64, 64, 4, 3)),
    ):
        changed = AT_ONCE.with_part(part, kernel)
        assert is_legal(SPEC, changed, H100)
        assert changed.walks.chunk == changed.prepare.chunk == 16
        assert getattr(changed, part) == kernel
    exact = AT_ONCE.kernels()["gla_bwd_chunks_exact"]
    assert exact == ExactKernelConfig(64, 64, 64, 4)
    pairs = AT_ONCE.with_part("chunks", replace(AT_ONCE.chunks, keep=2))
    assert pairs.kernels()["gla_bwd_chunks_exact"] == replace(exact, keep=2)
    assert is_legal(SPEC, pairs, H100)
    assert is_legal(SPEC, pairs.with_part("walks", ChunkKernelConfig(16, 64, 4, 3)), H100)
    short = replace(pairs, walks=replace(pairs.walks, chunk=16))
    short = replace(short, prepare=replace(pairs.prepare, chunk=16))
    assert "chunks.keep takes at most two" in str(why_illegal(SPEC, short, H100))
    many = replace(pairs, chunks=replace(pairs.chunks, keep=4))
    assert "chunks.keep must be 1 or 2" in str(why_illegal(SPEC, many, H100))
    assert "multiple of 128" in str(why_illegal(SPEC, replace(pairs, segment=64), H100))
    walks = AT_ONCE.kernels()["gla_bwd_walks_exact"]
    assert tiles("gla_bwd_walks", SPEC, AT_ONCE.walks) == tiles("gla_bwd_walks_exact", SPEC, walks)


def test_shared_memory_differs_between_gpus() -> None:
    spec = Specialisation(256, 256, DType.BF16, Gate.VECTOR, DType.BF16)
    config = ForwardConfig(ChunkKernelConfig(64, 64, 8, 3))
    assert is_legal(spec, config, H100)
    assert "shared memory" in str(why_illegal(spec, config, GPUS["a100"]))


@pytest.mark.parametrize("op", list(Op))
@hypothesis.given(specs(), st.sampled_from(sorted(GPUS)), BUCKETS)
def test_default_is_legal(op: Op, spec: Specialisation, gpu: str, bucket: Bucket) -> None:
    hypothesis.assume(op.serves(spec.gate))
    config = default_config(op, spec, GPUS[gpu], bucket)
    assert config.op is op
    assert isinstance(config, CONFIGS[op][0])
    assert why_illegal(spec, config, GPUS[gpu]) is None


def test_a_forward_config_from_before_prepare_is_read() -> None:
    """Most rows have none, and those that were written before it look the same."""
    assert "prepare" not in CONFIG.to_dict()
    assert ForwardConfig.from_dict({**CONFIG.to_dict(), "prepare": None}) == CONFIG
    with pytest.raises(ConfigError, match=r"config\.prepare: missing keys"):
        ForwardConfig.from_dict({**CONFIG.to_dict(), "prepare": {}})


def test_the_kernels_of_a_prepared_pass() -> None:
    assert list(PREPARED.kernels()) == ["gla_prepare", "gla_walk"]
    split = replace(PREPARED, segment=256, summary=_chunk())
    order = ["gla_prepare", "gla_walk_states", "gla_combine", "gla_walk"]
    assert list(split.kernels()) == order
    assert {PREPARED.slug, split.slug, CONFIG.slug, replace(split, prepare=None).slug} == {
        "c32_bv128_w8_s3",
        "c32_bv128_w8_s3-pre_c32_bk64_w4_s2",
        "c32_bv128_w8_s3-seg256-c32_bv128_w8_s3",
        "c32_bv128_w8_s3-pre_c32_bk64_w4_s2-seg256-c32_bv128_w8_s3",
    }
    # All of them work on the same chunks.
    shorter = split.with_part("fwd", replace(split.fwd, chunk=16))
    assert shorter.prepare is not None
    assert shorter.summary is not None
    assert (shorter.prepare.chunk, shorter.summary.chunk) == (16, 16)
    assert is_legal(SPEC, shorter, H100)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        ForwardConfig(_chunk(), 256, _chunk()),
        ForwardConfig(_chunk(), 256, _chunk(), PREPARE),
        BACKWARD,
    ],
)
def test_parts_are_what_kernels_are_made_of(config: Config) -> None:
    kernels = config.kernels()
    assert config.main in kernels
    assert set(kernels) <= set(OP_TEMPLATES[config.op])
    assert set(config.PARTS) <= set(OP_TEMPLATES[config.op])
    for template, kernel in kernels.items():
        if template in config.PARTS:
            part = config.PARTS[template]
            tile = "block_k" if part == "prepare" else "block_v"
            change: dict[str, Any] = {tile: 16}
            smaller = replace(getattr(config, part), **change)
            changed = config.with_part(part, smaller).kernels()[template]
            assert changed != kernel
            assert getattr(changed, tile, 0) == 16


def test_the_exact_kernel_has_the_tile_of_the_fast_one() -> None:
    assert BACKWARD.exact == ExactKernelConfig(32, 64, 128, 8)
    whole = replace(BACKWARD, grads=_tile(block_k=128, block_v=32, dv=True), dv=None)
    assert whole.exact == ExactKernelConfig(32, 128, 32, 4, dv=True)
    assert "gla_bwd_dv" not in whole.kernels()


def test_states_follow_shorter_chunks() -> None:
    config = replace(BACKWARD, states=_chunk(chunk=32))
    assert config.with_part("grads", _tile(chunk=16)).states == _chunk(chunk=16)
    assert config.with_part("grads", _tile(chunk=64)).states == _chunk(chunk=32)


def test_lesser_choices() -> None:
    assert lesser_choices(BACKWARD.grads, "block_k") == [32, 16]
    assert lesser_choices(BACKWARD.exact, "num_stages") == []


@hypothesis.given(FORWARD_CONFIGS, st.integers(1, 10**6))
def test_segments_cover_the_sequence(config: ForwardConfig, T: int) -> None:
    count, length = segmentation(config.segment, T)
    assert 1 <= count <= MAX_SEGMENTS
    assert count == config.segments(T)
    assert (count - 1) * length < T <= count * length
    if count > 1:
        assert length % config.segment == 0
        assert length == config.segment or MAX_SEGMENTS * config.segment < T
    else:
        assert config.segment == 0 or config.segment >= T
    extra = config.prepare is not None
    assert len(config.kernels()) == (3 if config.segment else 1) + extra


# GPUs.


def test_gpus() -> None:
    assert gpu_by_name("H100") is H100
    assert match_gpu((9, 0), 132, "NVIDIA H200") is GPUS["h200"]
    assert match_gpu((9, 0), 132, "NVIDIA H100 80GB HBM3") is H100
    assert match_gpu((9, 0), 114, "NVIDIA H100 PCIe") is GPUS["h100-pcie"]
    assert match_gpu((8, 0), 108, "NVIDIA A100-SXM4-80GB") is GPUS["a100"]
    assert match_gpu((7, 0), 80, "Tesla V100") is None
    for name, gpu in GPUS.items():
        assert gpu.name == name
        assert gpu.arch in ARCHS
        assert all(GPUS[other].arch == gpu.arch for other in RELATIVES[name])
    with pytest.raises(ConfigError, match="unknown GPU") as caught:
        gpu_by_name("v100")
    assert "h100" in caught.value.hint


# Templates: the ABI.


KERNEL_CONFIG_STRATEGIES: dict[type[KernelConfig], st.SearchStrategy[Any]] = {
    ChunkKernelConfig: CHUNK_CONFIGS,
    TileKernelConfig: TILE_CONFIGS,
    ExactKernelConfig: EXACT_CONFIGS,
    PrepareKernelConfig: PREPARE_CONFIGS,
    CombineKernelConfig: st.just(CombineKernelConfig()),
    GateKernelConfig: st.just(GateKernelConfig(64, 128, 4, 3)),
    SumsKernelConfig: st.just(SumsKernelConfig(64, 16, 2)),
    TurnedKernelConfig: TURNED_CONFIGS,
    DecodeKernelConfig: DECODE_CONFIGS,
}


@pytest.mark.parametrize("name", list(TEMPLATES))
@hypothesis.given(specs(), st.data())
def test_abi(name: str, spec: Specialisation, data: st.DataObject) -> None:
    hypothesis.assume(template_ops(name)[0].serves(spec.gate))
    hypothesis.assume(name not in AROUND_GATE or spec.gate is Gate.LOWRANK)
    config = data.draw(KERNEL_CONFIG_STRATEGIES[KERNEL_CONFIGS[name]])
    kernel = KernelSpec(name, spec, config, "sm_90a")
    args = active_args(name, kernel.spec, unused_args(name, config))
    # What exists at run time and what is compiled in share no name.
    assert not {arg.name for arg in args} & set(constants(name, kernel.spec, config))
    kinds = [arg.is_pointer for arg in args]
    assert kinds == sorted(kinds, reverse=True)
    for arg in args:
        if arg.is_pointer:
            assert re.fullmatch(r"\*(bf16|fp16|fp32|i32)", pointer_type(arg.kind, kernel.spec))
        else:
            assert arg.kind in ("i32", "fp32")
    assert set(args) <= set(TEMPLATES[name].args)
    assert tiles(name, kernel.spec, config) >= 1


def test_tiles_cover_what_a_kernel_computes() -> None:
    spec = replace(SPEC, K=100, V=72)
    assert tiles("gla_fwd", spec, _chunk(block_v=32)) == 3
    assert tiles("gla_states", spec, _chunk(block_v=64)) == 2
    assert tiles("gla_walk", spec, _chunk(block_v=64)) == 2
    assert tiles("gla_prepare", spec, PREPARE) == 1
    assert constants("gla_prepare", spec, PREPARE)["BC"] == 64
    assert constants("gla_prepare", spec, PREPARE)["BK"] == 128
    assert tiles("gla_bwd", spec, _tile(block_k=64, block_v=32)) == 2 * 3
    assert tiles("gla_bwd_exact", spec, ExactKernelConfig(16, 32, 64, 4)) == 4 * 2
    assert tiles("gla_bwd_dv", spec, _chunk(block_v=64)) == 2
    assert tiles("gla_bwd_walks", spec, _chunk(block_v=64)) == 2 * 2  # forward and back
    assert tiles("gla_bwd_walks_exact", spec, _chunk(block_v=64)) == 2 * 2
    assert tiles("gla_bwd_chunks", spec, _tile(block_k=64, block_v=32)) == 2
    assert tiles("gla_bwd_chunks_exact", spec, ExactKernelConfig(64, 32, 64, 4)) == 4
    assert constants("gla_bwd", spec, _tile(block_k=64))["BK"] == 64
    assert constants("gla_states", spec, _chunk())["BK"] == 128


def test_kept_states_are_as_wide_as_they_need() -> None:
    assert state_dtype(SPEC) is DType.BF16
    wide = replace(SPEC, gate_dtype=DType.FP32)
    assert pointer_type("*state", wide) == "*bf16"
    half = replace(SPEC, dtype=DType.FP16, gate_dtype=DType.FP16)
    assert pointer_type("*state", half) == "*fp32"


def test_every_template_serves_an_op_and_has_one_config() -> None:
    assert {name for names in OP_TEMPLATES.values() for name in names} == set(TEMPLATES)
    assert set(KERNEL_CONFIGS) == set(TEMPLATES)
    assert template_ops("gla_fwd") == (Op.FORWARD,)
    assert template_ops("gla_bwd") == (Op.BACKWARD,)
    assert template_ops("gla_states") == (Op.FORWARD, Op.BACKWARD)


@pytest.mark.parametrize("op", list(Op))
def test_template_files_exist_and_are_hashed(op: Op) -> None:
    assert all(TEMPLATES[name].path.is_file() for name in OP_TEMPLATES[op])
    assert re.fullmatch(r"[0-9a-f]{64}", templates_sha256([op])[op])
    assert templates_sha256([op]) == templates_sha256([op])


@hypothesis.given(st.integers(1, 4096))
def test_stride_unit(dim: int) -> None:
    unit = stride_unit(dim)
    assert dim % unit == 0
    assert unit in (1, 2, 4, 8, 16)
    assert unit == 16 or dim % (2 * unit)


def test_template_sources_are_what_is_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(templates.TEMPLATE_DIR, tmp_path / "t")
    monkeypatch.setattr(templates, "TEMPLATE_DIR", tmp_path / "t")
    before = sources_sha256(templates.FORWARD)
    names = {path.stem for path in templates.template_sources(templates.FORWARD)}
    assert names >= {"__init__", "_exact", "_gate", *templates.FORWARD}
    (tmp_path / "t" / "gla_new.py").write_text("from glac.kernel_templates._gate import LOG2E\n")
    assert sources_sha256(templates.FORWARD) == before
    assert sources_sha256(["gla_new"]) != before
    for name in ("gla_states", "_gate"):
        path = tmp_path / "t" / f"{name}.py"
        path.write_text(path.read_text() + "# changed\n")
        assert sources_sha256(templates.FORWARD) != before


@pytest.mark.parametrize("gate", list(Gate))
def test_each_gate_has_its_ops(gate: Gate) -> None:
    served = {op for op in Op if op.serves(gate)}
    assert served == {*gate.passes, Op.DECODE}
    spec = Specialisation(16, 16, DType.BF16, gate, DType.BF16, 16 * (gate is Gate.LOWRANK))
    assert Problem(spec, 1, 1, 1).ops == (Op.DECODE,)
    assert Problem(spec, 1, 2048, 1).ops == gate.passes
    wide = replace(spec, dtype=DType.FP32, gate_dtype=DType.FP32, precision=Precision.TF32)
    assert Problem(wide, 1, 1, 1).ops == gate.passes  # decoding has no precision
    for op in set(Op) - served:
        config = default_config(op, spec, H100, Bucket(0, 0))
        assert "has no" in str(why_illegal(spec, config, H100))


def test_a_scalar_backward_pass_has_one_chunk() -> None:
    spec = Specialisation(16, 16, DType.BF16, Gate.SCALAR, DType.FP32)
    tile = ChunkKernelConfig(32, 16, 4, 2)
    config = ScalarBackwardConfig(tile, replace(tile, chunk=64))
    assert "chunks.chunk" in str(why_illegal(spec, config, H100))
    changed = config.with_part("chunks", replace(tile, chunk=16))
    assert why_illegal(spec, changed, H100) is None
    assert changed.main == "scalar_bwd_chunks"
    walking = ScalarBackwardConfig(tile, None, TileKernelConfig(64, 16, 16, 4, 2), tile)
    assert "grads.chunk" in str(why_illegal(spec, walking, H100))
    changed = walking.with_part("states", replace(tile, chunk=64))
    assert why_illegal(spec, changed, H100) is None
    assert changed.main == "scalar_bwd"


def test_a_scalar_backward_pass_goes_one_way() -> None:
    spec = Specialisation(256, 512, DType.BF16, Gate.SCALAR, DType.FP32)
    tile, grads = ChunkKernelConfig(32, 16, 8, 2), TileKernelConfig(32, 64, 256, 8, 2)
    for config, reason in (
        (ScalarBackwardConfig(tile), "one of chunks and grads"),
        (ScalarBackwardConfig(tile, tile, grads, tile), "one of chunks and grads"),
        (ScalarBackwardConfig(tile, None, grads), "dv must be given"),
        (ScalarBackwardConfig(tile, None, replace(grads, keep=2), tile), "grads.keep"),
        (ScalarBackwardConfig(tile, None, replace(grads, block_v=16), tile), "128 tiles"),
    ):
        assert reason in str(why_illegal(spec, config, H100))
    assert why_illegal(spec, ScalarBackwardConfig(tile, None, grads, tile), H100) is None


def test_few_heads_do_not_walk() -> None:
    spec = Specialisation(128, 128, DType.BF16, Gate.SCALAR, DType.BF16)
    many = default_config(Op.SCALAR_BACKWARD, spec, H100, Bucket(7, 11))
    few = default_config(Op.SCALAR_BACKWARD, spec, H100, Bucket(5, 11))
    assert isinstance(many, ScalarBackwardConfig)
    assert isinstance(few, ScalarBackwardConfig)
    assert many.grads is not None
    assert walking_programs(many, spec, Bucket(7, 11)) == 128
    assert few.grads is None
    assert walking_programs(few, spec, Bucket(5, 11)) == 0
