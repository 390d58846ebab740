"""Signing tuned rows again: only while every kernel compiles to what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glac import certify as certify_module
from glac.certify import certify
from glac.errors import CompileError, ConfigError
from glac.kernelspec import KernelSpec, config_kernels
from glac.problem import Op, Problem
from glac.templates import templates_sha256
from glac.tuned import TunedFile, TunedRow, dump_tuned, load_tuned
from tests.helpers_packs import BACKWARD, FAKE_TOOLS, VECTOR, fake_compiled, tuned_file, tuned_row
from tests.test_cli import document, glac


def measured(stale: Op | None) -> TunedFile:
    """A file of today's toolchain with forward and backward rows, those of ``stale`` older."""
    file = tuned_file()
    rows = (*file.rows, tuned_row(Problem(VECTOR, 4, 4096, 8), BACKWARD))
    rows = tuple(
        replace(
            row,
            kernels=tuple(
                replace(facts, cubin_sha256=fake_compiled(kernel).sha256)
                for facts, kernel in zip(row.kernels, kernels_of(row), strict=True)
            ),
        )
        for row in rows
    )
    hashes = templates_sha256({row.op for row in rows})
    if stale is not None:
        hashes[stale] = "0" * 64
    environment = replace(
        file.environment,
        triton=FAKE_TOOLS.triton,
        ptxas=FAKE_TOOLS.ptxas,
        templates_sha256=hashes,
    )
    return replace(file, rows=rows, environment=environment)


def kernels_of(row: TunedRow) -> list[KernelSpec]:
    return config_kernels(row.spec, row.config, "sm_90a")


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What compiling gives instead of ``fake_compiled``, by template."""
    other: dict[str, Any] = {}

    def compile_many(kernels: Iterable[KernelSpec], *args: Any) -> dict[KernelSpec, Any]:
        return {k: other.get(k.template) or fake_compiled(k) for k in kernels}

    monkeypatch.setattr(certify_module, "compile_many", compile_many)
    monkeypatch.setattr(certify_module, "toolchain", lambda: FAKE_TOOLS)
    return other


def test_unchanged_machine_code_is_signed() -> None:
    file = measured(Op.BACKWARD)
    found = certify(file)
    assert found.ops == {"backward": 1}
    assert found.kernels == len(BACKWARD.kernels())
    assert found.file.rows == file.rows
    assert found.file.environment.templates_sha256 == templates_sha256({Op.FORWARD, Op.BACKWARD})


def test_what_is_signed_needs_nothing() -> None:
    file = measured(None)
    found = certify(file)
    assert (found.file, found.ops, found.kernels) == (file, {}, 0)


@pytest.mark.parametrize(
    "made", [CompileError("no"), fake_compiled(kernels_of(measured(None).rows[0])[0])]
)
def test_other_machine_code_is_not(made: object, compiled: dict[str, Any]) -> None:
    compiled["gla_bwd"] = made
    with pytest.raises(ConfigError, match="1 of 4 kernels are not what was measured") as caught:
        certify(measured(Op.BACKWARD))
    assert "tune these again" in str(caught.value.hint)
    certify(measured(Op.FORWARD))  # which has other kernels


def test_another_toolchain_cannot_tell() -> None:
    file = measured(Op.BACKWARD)
    file = replace(file, environment=replace(file.environment, triton="3.5.0"))
    with pytest.raises(ConfigError, match=r"Triton 3\.5\.0 and ptxas"):
        certify(file)


def test_command_writes_all_files_or_none(tmp_path: Path, compiled: dict[str, Any]) -> None:
    one, two = tmp_path / "a" / "h100.yaml", tmp_path / "b" / "h100.yaml"
    dump_tuned(measured(Op.BACKWARD), one)
    dump_tuned(measured(Op.FORWARD), two)
    before = one.read_text(), two.read_text()
    compiled["gla_fwd"] = CompileError("no")
    assert glac("configs", "certify", one, two).exit_code == 1
    assert (one.read_text(), two.read_text()) == before
    compiled.clear()
    files = document(glac("configs", "certify", one, two, "--json"))["data"]["files"]
    assert [file["rows"] for file in files] == [{"backward": 1}, {"forward": 2}]
    for path in (one, two):
        assert load_tuned(path).environment.templates_sha256 == templates_sha256(
            {Op.FORWARD, Op.BACKWARD}
        )
    assert "signed: nothing new" in glac("configs", "certify", one).stdout
