"""Problems, configs, kernel names, GPUs, templates: what every other room relies on."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from glac import templates
from glac.configs import (
    BLOCKS_V,
    CHUNKS,
    MAX_SEGMENTS,
    STAGES,
    WARPS,
    ChunkKernelConfig,
    CombineKernelConfig,
    ForwardConfig,
    default_forward,
    is_legal,
    why_illegal,
)
from glac.errors import ConfigError
from glac.gpus import ARCHS, GPUS, RELATIVES, gpu_by_name, match_gpu
from glac.kernelspec import KernelSpec, forward_kernels
from glac.problem import LOWRANK_RANKS, Bucket, DType, Gate, Problem, Specialisation
from glac.templates import (
    TEMPLATES,
    active_args,
    constants,
    pointer_type,
    stride_unit,
    templates_sha256,
    tiles,
)


@st.composite
def specs(draw: st.DrawFn) -> Specialisation:
    dtype = draw(st.sampled_from(list(DType)))
    gate = draw(st.sampled_from(list(Gate)))
    return Specialisation(
        K=draw(st.integers(1, 256)),
        V=draw(st.integers(1, 512)),
        dtype=dtype,
        gate=gate,
        gate_dtype=draw(st.sampled_from([dtype, DType.FP32])),
        rank=draw(st.sampled_from(LOWRANK_RANKS)) if gate is Gate.LOWRANK else 0,
    )


CHUNK_CONFIGS = st.builds(
    ChunkKernelConfig,
    st.sampled_from(CHUNKS),
    st.sampled_from(BLOCKS_V),
    st.sampled_from(WARPS),
    st.sampled_from(STAGES),
    st.booleans(),
)
FORWARD_CONFIGS = st.builds(ForwardConfig, CHUNK_CONFIGS) | st.builds(
    ForwardConfig, CHUNK_CONFIGS, st.sampled_from([128, 256, 1024]), CHUNK_CONFIGS
)
BUCKETS = st.builds(Bucket, st.integers(0, 30), st.integers(0, 30))
JUNK = st.none() | st.booleans() | st.floats() | st.text() | st.lists(st.integers(), max_size=2)

SPEC = Specialisation(128, 128, DType.BF16, Gate.VECTOR, DType.BF16)
CONFIG = ForwardConfig(ChunkKernelConfig(32, 128, 8, 3))
H100 = GPUS["h100"]


@hypothesis.given(specs(), FORWARD_CONFIGS, BUCKETS)
def test_round_trips(spec: Specialisation, config: ForwardConfig, bucket: Bucket) -> None:
    assert Specialisation.from_dict(spec.to_dict()) == spec
    assert ForwardConfig.from_dict(config.to_dict()) == config
    assert Bucket.from_dict(bucket.to_dict()) == bucket
    for kernel in forward_kernels(spec, config, "sm_90a"):
        again = KernelSpec.from_dict(kernel.to_dict())
        assert again == kernel
        assert hash(again) == hash(kernel)
        assert again.name == kernel.name


STRICT: list[tuple[Any, Any]] = [
    (Specialisation, SPEC),
    (Bucket, Bucket(7, 11)),
    (ChunkKernelConfig, CONFIG.fwd),
    (CombineKernelConfig, CombineKernelConfig()),
    (ForwardConfig, CONFIG),
    (KernelSpec, KernelSpec("gla_fwd", SPEC, CONFIG.fwd, "sm_90a")),
]


@hypothesis.given(st.sampled_from(STRICT), st.data())
def test_from_dict_is_strict(case: tuple[Any, Any], data: st.DataObject) -> None:
    cls, value = case
    good = value.to_dict()
    key = data.draw(st.sampled_from([field.name for field in fields(cls)]))
    without = {k: v for k, v in good.items() if k != key}
    with pytest.raises(ConfigError, match="missing keys"):
        cls.from_dict(without)
    with pytest.raises(ConfigError, match="unknown keys"):
        cls.from_dict({**good, "surprise": 1})
    junk = data.draw(JUNK)
    hypothesis.assume(not (junk is None and key == "summary"))
    hypothesis.assume(not (isinstance(junk, bool) and key == "tma"))
    with pytest.raises(ConfigError):
        cls.from_dict({**good, key: junk})
    with pytest.raises(ConfigError, match="wanted a mapping"):
        cls.from_dict(data.draw(JUNK))


@pytest.mark.parametrize(
    "change",
    [
        {"K": 0},
        {"K": 257},
        {"V": 0},
        {"V": 513},
        {"gate_dtype": "fp16"},
        {"rank": 16},
        {"gate": "lowrank", "rank": 12},
        {"gate": "lowrank"},
        {"dtype": "fp64"},
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


# Names.


@hypothesis.given(st.lists(st.tuples(specs(), FORWARD_CONFIGS), min_size=2, max_size=6))
def test_names_are_unique_and_safe(pairs: list[tuple[Specialisation, ForwardConfig]]) -> None:
    kernels = {
        kernel
        for spec, config in pairs
        for arch in ARCHS
        for kernel in forward_kernels(spec, config, arch)
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
    one, other = (KernelSpec("gla_fwd_combine", s, config, "sm_80") for s in (SPEC, lowrank))
    assert one == other


def test_unknown_template_or_arch() -> None:
    with pytest.raises(ConfigError, match="unknown template"):
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
    ],
)
def test_illegal(config: ForwardConfig, reason: str) -> None:
    assert (why_illegal(SPEC, config, H100) or "").find(reason) >= 0
    assert is_legal(SPEC, config, H100) == (reason == "")


def test_descriptors_need_hopper_and_whole_rows() -> None:
    config = ForwardConfig(_chunk(tma=True, block_v=64, num_stages=2))
    assert is_legal(SPEC, config, H100)
    assert "needs capability 9.0" in str(why_illegal(SPEC, config, GPUS["a100"]))
    odd = Specialisation(100, 128, DType.BF16, Gate.VECTOR, DType.BF16)
    assert "whole 16 bytes" in str(why_illegal(odd, config, H100))


def test_shared_memory_differs_between_gpus() -> None:
    spec = Specialisation(256, 256, DType.BF16, Gate.VECTOR, DType.BF16)
    config = ForwardConfig(ChunkKernelConfig(64, 64, 8, 3))
    assert is_legal(spec, config, H100)
    assert "shared memory" in str(why_illegal(spec, config, GPUS["a100"]))


@hypothesis.given(specs(), st.sampled_from(sorted(GPUS)), BUCKETS)
def test_default_is_legal(spec: Specialisation, gpu: str, bucket: Bucket) -> None:
    config = default_forward(spec, GPUS[gpu], bucket)
    assert why_illegal(spec, config, GPUS[gpu]) is None


@hypothesis.given(FORWARD_CONFIGS, st.integers(1, 10**6))
def test_segments_cover_the_sequence(config: ForwardConfig, T: int) -> None:
    count, length = config.segmentation(T)
    assert 1 <= count <= MAX_SEGMENTS
    assert count == config.segments(T)
    assert (count - 1) * length < T <= count * length
    if config.segment:
        assert length % config.segment == 0
        assert length == config.segment or MAX_SEGMENTS * config.segment < T
    assert len(config.kernels()) == (3 if config.segment else 1)


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


@hypothesis.given(specs(), CHUNK_CONFIGS)
def test_abi(spec: Specialisation, config: ChunkKernelConfig) -> None:
    for name, template in TEMPLATES.items():
        kernel_config = CombineKernelConfig() if name == "gla_fwd_combine" else config
        kernel = KernelSpec(name, spec, kernel_config, "sm_90a")
        args = active_args(name, kernel.spec)
        # What exists at run time and what is compiled in share no name.
        assert not {arg.name for arg in args} & set(
            constants(name, kernel.spec, kernel_config)
        ) - {
            "K",
            "V",
        }
        kinds = [arg.is_pointer for arg in args]
        assert kinds == sorted(kinds, reverse=True)
        for arg in args:
            if arg.is_pointer:
                assert re.fullmatch(r"\*(bf16|fp16|fp32)", pointer_type(arg.kind, kernel.spec))
            else:
                assert arg.kind in ("i32", "fp32")
        assert set(args) <= set(template.args)
        assert tiles(name, kernel.spec, kernel_config) >= 1


def test_template_files_exist_and_are_hashed() -> None:
    assert all(template.path.is_file() for template in TEMPLATES.values())
    assert re.fullmatch(r"[0-9a-f]{64}", templates_sha256())
    assert templates_sha256() == templates_sha256()


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
    before = templates.templates_sha256()
    names = {path.stem for path in templates.template_sources(templates.FORWARD)}
    assert names >= {"__init__", "_exact", "_gate", *templates.FORWARD}
    (tmp_path / "t" / "gla_new.py").write_text("from glac.kernel_templates._gate import LOG2E\n")
    assert templates.templates_sha256() == before
    assert templates.templates_sha256(["gla_new"]) != before
    for name in ("gla_fwd_summary", "_gate"):
        path = tmp_path / "t" / f"{name}.py"
        path.write_text(path.read_text() + "# changed\n")
        assert templates.templates_sha256() != before
