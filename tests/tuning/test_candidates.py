"""Compiled candidates: complete, resumable, honest about what failed, refused when foreign."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glac import compile as compile_module
from glac.compile import CompiledKernel
from glac.compile_worker import Worker
from glac.configs import ChunkKernelConfig, ForwardConfig
from glac.errors import CompileError, GlacError, StudyError
from glac.gpus import GPUS
from glac.kernelspec import KernelSpec
from glac.pack import Pack, read_pack
from glac.problem import Op
from glac.tuning import candidates as candidates_module
from glac.tuning.candidates import (
    TWINS,
    check_usable,
    compile_candidates,
    current_commit,
    kernels_of,
    load_candidates,
)
from glac.tuning.run import choose_spaces
from glac.tuning.space import Space, make_problem

pytest.importorskip("triton")
try:
    compile_module.toolchain()
except Exception:
    pytest.skip("needs the pinned assembler", allow_module_level=True)

GPU = GPUS["h100"]
PROBLEM = make_problem((1, 256, 1, 16, 16))
OTHER = make_problem((1, 256, 1, 16, 32))


def config(chunk: int, stages: int = 2, segment: int = 0) -> ForwardConfig:
    tile = ChunkKernelConfig(chunk, 16, 4, stages)
    return ForwardConfig(tile, segment, tile if segment else None)


SPACE = Space(PROBLEM, config(16), (config(16), config(16, segment=64), config(32)))


class Counting:
    """Compiles for real, counting; may refuse some kernels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuse: int = -1) -> None:
        self.names: list[str] = []
        compile_one = Worker.compile

        def compile_counted(
            worker: Worker, kernel: KernelSpec, twin_arch: str = ""
        ) -> CompiledKernel | GlacError:
            self.names.append(kernel.name)
            if getattr(kernel.config, "chunk", 0) == refuse:
                return CompileError("needs 999999 bytes of shared memory,\nsm_90a has 232448")
            return compile_one(worker, kernel, twin_arch)

        monkeypatch.setattr(Worker, "compile", compile_counted)


def test_everything_is_compiled_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(monkeypatch)
    steps: list[tuple[int, int, int]] = []
    made = compile_candidates([SPACE], GPU, tmp_path / "c", 2, lambda *s: steps.append(s))
    assert len(counting.names) == 4  # two forward tiles, one summary, one combine
    assert steps[-1] == (4, 4, 0), made.failures
    read = load_candidates(tmp_path / "c")
    assert read == made
    assert read.complete
    assert read.spaces == (SPACE,)
    pack = read.read_pack()
    assert set(pack.kernels) == {k.name for k in kernels_of([SPACE], GPU.arch)}
    assert pack.rows == ()
    assert all(read.why_missing(PROBLEM, c, pack) is None for c in SPACE.configs)
    assert read.commit == current_commit()
    # Again, and with another problem: only what is new is compiled.
    counting.names.clear()
    compile_candidates([SPACE], GPU, tmp_path / "c", 2)
    assert counting.names == []
    more = Space(OTHER, config(16), (config(16),))
    both = compile_candidates([more], GPU, tmp_path / "c", 2)
    assert len(counting.names) == 1
    assert both.spaces == (SPACE, more)
    assert len(both.read_pack().kernels) == 5


def test_a_kernel_that_fails_is_named_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(monkeypatch, refuse=32)
    made = compile_candidates([SPACE], GPU, tmp_path / "c", 2)
    assert made.complete
    assert list(made.failures.values()) == [
        "needs 999999 bytes of shared memory, sm_90a has 232448"
    ]
    reason = made.why_missing(PROBLEM, config(32), made.read_pack())
    assert reason is not None
    assert "999999" in reason
    assert made.why_missing(PROBLEM, config(16), made.read_pack()) is None
    counting.names.clear()
    compile_candidates([SPACE], GPU, tmp_path / "c", 2)
    assert counting.names == [], "a failure is final for a toolchain"


def test_ctrl_c_keeps_what_was_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(monkeypatch)

    def stop(done: int, total: int, failed: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_candidates([SPACE], GPU, tmp_path / "c", 1, stop)
    half = load_candidates(tmp_path / "c")
    assert not half.complete
    kept = set(half.read_pack().kernels)
    assert len(kept) == 2
    pack = half.read_pack()
    assert any(
        "was not compiled" in (half.why_missing(PROBLEM, c, pack) or "") for c in SPACE.configs
    )
    counting.names.clear()
    assert compile_candidates([SPACE], GPU, tmp_path / "c", 1).complete
    assert not kept & set(counting.names)


def test_other_templates_or_toolchains_start_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Space(PROBLEM, config(16), (config(16),))
    compile_candidates([small], GPU, tmp_path / "c", 2)
    made = load_candidates(tmp_path / "c")
    check_usable(made, GPU)
    check_usable(made, GPUS["h200"])
    with pytest.raises(StudyError, match="needs sm_80"):
        check_usable(made, GPUS["a100"])
    index = tmp_path / "c" / "candidates.json"
    data = json.loads(index.read_text())
    data["templates_sha256"]["forward"] = "0" * 64
    index.write_text(json.dumps(data))
    with pytest.raises(StudyError, match="other kernel templates"):
        check_usable(load_candidates(tmp_path / "c"), GPU)
    counting = Counting(monkeypatch)
    compile_candidates([small], GPU, tmp_path / "c", 2)
    assert len(counting.names) == 1


def test_broken_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no compiled candidates"):
        load_candidates(tmp_path)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StudyError, match="left as it is"):
        compile_candidates([SPACE], GPU, tmp_path)
    broken: list[Any] = ["", "[]", "{}", '{"schema": 1}', '{"schema": 2, "problems": [1]}']
    for text in broken:
        (tmp_path / "candidates.json").write_text(text)
        with pytest.raises(StudyError, match="broken"):
            load_candidates(tmp_path)


def test_problems_are_chosen_from_the_folder(tmp_path: Path) -> None:
    made = candidates_module.Candidates(
        tmp_path, "h100", "sm_90a", (SPACE,), {}, {"triton": "3", "ptxas": "12"}, {}, "", True
    )
    assert choose_spaces(made, None, GPU, "standard") == [SPACE]
    with pytest.raises(StudyError, match="no candidates for"):
        choose_spaces(made, [OTHER], GPU, "standard")
    assert len(choose_spaces(made, [PROBLEM], GPU, "quick")[0].configs) >= 1
    with pytest.raises(StudyError, match="no candidates for backward"):
        choose_spaces(made, None, GPU, "standard", [Op.BACKWARD])


def test_code_for_the_a100_has_a_twin_that_a_hopper_runs(tmp_path: Path) -> None:
    """Same kernels and names; what is recorded is what ships, what is timed obeys A100 limits."""
    a100 = GPUS["a100"]
    tried = Space(PROBLEM, config(16), (config(16),))
    made = compile_candidates([tried], a100, tmp_path / "c", 2)
    assert made.twin
    ships, timed = made.pack_for("sm_80"), made.pack_for("sm_90a")
    assert ships == made.pack_path
    assert timed is not None
    assert made.pack_for("sm_90") is None
    pack, twin = read_pack(ships), read_pack(timed)
    assert pack.kernels.keys() == twin.kernels.keys()
    for name in pack.kernels:
        assert pack.read_cubin(name)[48] == 0x50, "the flags of an ELF file name its arch"
        assert twin.read_cubin(name)[48] == 0x5A
        assert twin.kernels[name].shared >= pack.kernels[name].shared
    # Nothing is compiled again, and the twin is not lost on the way.
    again = compile_candidates([tried], a100, tmp_path / "c", 2)
    assert again == replace(made, commit=again.commit)
    assert read_pack(timed).kernels == twin.kernels
    hopper = compile_candidates([tried], GPU, tmp_path / "h", 2)
    assert not hopper.twin
    assert hopper.pack_for("sm_80") is None


@pytest.mark.parametrize("shared", [0, 4096, 20480, 41984, 54000, 83968, 116736, 166912])
def test_a_twin_shares_an_sm_with_as_many_blocks_as_on_the_a100(shared: int) -> None:
    twin = TWINS["sm_80"]
    padded = twin.padded(shared)
    there = min(32, (164 << 10) // (shared + 1024))
    here = min(32, (228 << 10) // (padded + 1024))
    assert here == there
    assert shared <= padded <= max(shared, GPUS["a100"].shared_per_block)


def test_spills_beyond_two_kilobytes_are_not_timed_on_hopper(tmp_path: Path) -> None:
    made = compile_candidates([Space(PROBLEM, config(16), (config(16),))], GPU, tmp_path / "c", 2)
    pack = made.read_pack()
    assert made.why_missing(PROBLEM, config(16), pack) is None

    def spilled(size: int) -> Pack:
        kernels = {n: replace(k, spill_bytes=size) for n, k in pack.kernels.items()}
        return replace(pack, kernels=kernels)

    assert made.why_missing(PROBLEM, config(16), spilled(2048)) is None
    reason = made.why_missing(PROBLEM, config(16), spilled(2049))
    assert reason is not None
    assert "spills 2049 bytes" in reason


def test_a_compiler_that_died_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = Space(PROBLEM, config(16), (config(16),))
    with monkeypatch.context() as patch:
        error = CompileError("the compiler died on gla_fwd (exit status -11)")
        patch.setattr(Worker, "compile", lambda *_: error)
        made = compile_candidates([tried], GPU, tmp_path / "c", 1)
        assert list(made.failures.values()) == [error.message]
    assert compile_candidates([tried], GPU, tmp_path / "c", 1).failures == {}
