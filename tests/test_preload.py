"""Preloading, with packs of made-up kernels and a device that is not there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import glac
from glac import dispatch, launch
from glac.errors import InputError, KernelNotFoundError, MissingEnvironmentError
from glac.fit import Device
from glac.gpus import GPUS
from glac.pack import Pack
from glac.problem import Op, Problem
from tests.helpers_packs import LOWRANK, VECTOR, fake_pack

TINY = Problem(VECTOR, 2, 512, 16)


class FakeKernel:
    def __init__(self, name: str) -> None:
        self.name = name
        self.loaded = False

    def load_now(self) -> None:
        self.loaded = True


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[FakeKernel]]:
    """An H100 that takes notes of the kernels it gets; packs come from ``tmp_path/packs``."""
    kernels: list[FakeKernel] = []

    def load(pack: Pack, name: str, device: int) -> FakeKernel:
        assert device == 1
        pack.read_cubin(name)
        kernels.append(FakeKernel(name))
        return kernels[-1]

    @contextlib.contextmanager
    def entered(index: int) -> Iterator[None]:
        yield

    monkeypatch.setenv("GLAC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("GLAC_PACK_PATH", str(tmp_path / "packs"))
    monkeypatch.delenv("GLAC_REQUIRE_AOT", raising=False)
    monkeypatch.setattr(dispatch, "shipped_pack_dir", lambda: tmp_path / "shipped")
    monkeypatch.setattr(dispatch, "can_build", lambda: False)
    monkeypatch.setattr(dispatch, "device_gpu", lambda index: (GPUS["h100"], "H100"))
    facts = Device("H100", (9, 0), 232448, (12, 4))
    monkeypatch.setattr(dispatch, "device_facts", lambda index: facts)
    monkeypatch.setattr(launch, "load_from_pack", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", entered)
    dispatch.clear()
    yield kernels
    dispatch.clear()


def test_every_row_that_can_serve(gpu: list[FakeKernel], tmp_path: Path) -> None:
    pack = fake_pack(tmp_path / "packs" / "sm_90a")
    found = glac.preload()
    assert [(item.op, item.spec, item.bucket) for item in found] == [
        (row.op, row.spec, row.bucket) for row in pack.rows
    ]
    assert {item.provider for item in found} == {"pack"}
    assert {item.path for item in found} == {str(pack.path)}
    assert {name for item in found for name in item.kernels} == set(pack.kernels)
    assert {kernel.name for kernel in gpu} == set(pack.kernels)
    assert all(kernel.loaded for kernel in gpu)
    # What was preloaded is what serves: nothing is loaded again.
    count = len(gpu)
    dispatch.resolve(TINY, 1)
    assert glac.preload() == found
    assert len(gpu) == count
    # A bucket between those of the rows is served by kernels that are there.
    dispatch.resolve(Problem(VECTOR, 7, 5000, 3), 1)
    assert {kernel.name for kernel in gpu} == set(pack.kernels)
    assert glac.stats().decisions["pack"] == len(found) + 1
    assert glac.stats().compiled == 0


def test_some_problems(gpu: list[FakeKernel], tmp_path: Path) -> None:
    fake_pack(tmp_path / "packs" / "sm_90a")
    wanted = [TINY, Problem(VECTOR, 2, 500, 16), Problem(LOWRANK, 1, 1, 1)]
    found = glac.preload(wanted, device="cuda:1", ops=["forward"])
    assert [(item.spec, item.provider) for item in found] == [
        (VECTOR, "pack"),  # the second falls into the bucket of the first
        (LOWRANK, "pack"),
    ]
    assert found[0].bucket == TINY.bucket
    both = glac.preload([TINY], device=1)
    assert [(item.op, item.provider) for item in both] == [
        (Op.FORWARD, "pack"),
        (Op.BACKWARD, "torch"),
    ]
    assert both[1].kernels == ()
    assert "no pack has it" in both[1].reason


def test_rows_behind_an_earlier_pack_are_not_loaded(
    gpu: list[FakeKernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (fake_pack(tmp_path / name / "sm_90a") for name in ("a", "b"))
    monkeypatch.setenv("GLAC_PACK_PATH", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    assert {item.path for item in glac.preload()} == {str(first.path)}
    assert second.path.exists()


def test_a_damaged_pack_is_passed_over(
    gpu: list[FakeKernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (fake_pack(tmp_path / name / "sm_90a") for name in ("a", "b"))
    monkeypatch.setenv("GLAC_PACK_PATH", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    for cubin in (first.path / "cubins").iterdir():
        cubin.write_bytes(b"x")
    assert {item.path for item in glac.preload()} == {str(second.path)}


def test_an_old_driver_is_found_out_before_it_sees_code(
    gpu: list[FakeKernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pack(tmp_path / "packs" / "sm_90a")
    old = Device("H100", (9, 0), 232448, (11, 8))
    monkeypatch.setattr(dispatch, "device_facts", lambda index: old)
    found = glac.preload()
    assert {item.provider for item in found} == {"torch"}
    assert gpu == []
    tried = dispatch.explain(TINY, 1).tried
    assert any("needs driver 525 or newer" in line for line in tried)


def test_what_is_refused(
    gpu: list[FakeKernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert glac.preload() == []
    with pytest.raises(InputError, match="must be a CUDA device, got cpu"):
        glac.preload(device="cpu")
    with pytest.raises(ValueError, match="sideways"):
        glac.preload([TINY], ops=["sideways"])
    monkeypatch.setenv("GLAC_REQUIRE_AOT", "1")
    with pytest.raises(KernelNotFoundError, match="no pack has a forward kernel"):
        glac.preload([TINY])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingEnvironmentError, match="no CUDA GPU"):
        glac.preload()


def test_shared_memory_of_a_smaller_device(
    gpu: list[FakeKernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row whose kernels need more than the device has is passed over, with the reason."""
    fake_pack(tmp_path / "packs" / "sm_90a")
    small = replace(GPUS["h100"], shared_per_block=1000)
    monkeypatch.setattr(dispatch, "device_gpu", lambda index: (small, "small"))
    assert {item.provider for item in glac.preload()} == {"torch"}
    assert any("within 1000 bytes" in line for line in dispatch.explain(TINY, 1).tried)


def test_names_of_the_package() -> None:
    assert {"preload", "stats"} <= set(dir(glac))
    assert isinstance(glac.stats(), dispatch.Stats)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        glac.nothing  # noqa: B018
