"""Packs: the same bytes every time, and never a wrong kernel from a damaged one."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from glac.archive import MANIFEST
from glac.compile import Toolchain, compile_kernel, toolchain
from glac.errors import PackError
from glac.gpus import GPUS
from glac.kernelspec import KernelSpec, config_kernels
from glac.merge import merge_packs
from glac.pack import Pack, PackRow, manifest_sha256, open_pack, read_pack, write_pack
from glac.problem import Bucket, Op, Specialisation
from glac.templates import templates_sha256
from tests.helpers_packs import (
    BACKWARD,
    CHUNK,
    FAKE_TOOLS,
    LOWRANK,
    SPLIT,
    VECTOR,
    WHOLE,
    fake_compiled,
    fake_pack,
)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return fake_pack(tmp_path_factory.mktemp("packs") / "sm_90a")


@pytest.fixture(scope="module")
def manifest(pack: Pack) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((pack.path / MANIFEST).read_text())
    return data


@pytest.fixture(scope="module")
def scratch(pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to spoil."""
    path = tmp_path_factory.mktemp("spoilt") / "pack"
    shutil.copytree(pack.path, path)
    return path


def _write(path: Path, data: Any, *, sign: bool = False) -> Path:
    if sign:
        data = {**data, "sha256": manifest_sha256(data)}
    (path / MANIFEST).write_text(json.dumps(data))
    return path


def _files(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file()
    }


def test_round_trip(pack: Pack) -> None:
    again = read_pack(pack.path)
    assert again == pack
    assert len(pack.kernels) == 4
    assert len(pack.rows) == 3
    for name in pack.kernels:
        assert pack.read_cubin(name) == name.encode()


def test_real_kernel(tmp_path: Path) -> None:
    tools = toolchain()
    kernel = KernelSpec("gla_fwd", VECTOR, CHUNK, "sm_90a")
    built = compile_kernel(kernel, tools)
    row = PackRow.make("h100", "heuristic", "", VECTOR, Bucket(5, 9), WHOLE)
    write_pack(tmp_path / "p", "sm_90a", [built], [row], tools)
    pack = read_pack(tmp_path / "p")
    packed = pack.kernels[kernel.name]
    assert pack.read_cubin(kernel.name) == built.cubin
    assert pack.toolchain == tools.to_dict()
    assert packed.symbol == "gla_fwd"
    assert packed.args[:2] == (("q", "*bf16"), ("k", "*bf16"))
    assert (packed.registers, packed.shared) == (built.registers, built.shared)


def test_same_bytes_in_any_order_and_place(pack: Pack, tmp_path: Path) -> None:
    other = fake_pack(tmp_path / "elsewhere" / "p", reverse=True)
    assert _files(other.path) == _files(pack.path)
    assert str(pack.path) not in (pack.path / MANIFEST).read_text()


def test_replaces_a_pack_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "p"
    fake_pack(path)
    (path / "cubins" / "stale.cubin").write_bytes(b"x")
    fake_pack(path)
    assert not (path / "cubins" / "stale.cubin").exists()
    assert [item.name for item in tmp_path.iterdir()] == ["p"]


def test_does_not_replace_what_is_no_pack(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(PackError, match="not a kernel pack"):
        fake_pack(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PackError, match="cannot be written"):
        fake_pack(tmp_path / "file" / "p")


def test_rows_without_their_kernel_are_not_written(tmp_path: Path) -> None:
    row = PackRow.make("h100", "tuned", "", VECTOR, Bucket(5, 9), SPLIT)
    kernels = config_kernels(VECTOR, WHOLE, "sm_90a")
    with pytest.raises(PackError, match=r"rows\[0\].kernels.gla_states: no kernel"):
        write_pack(tmp_path / "p", "sm_90a", map(fake_compiled, kernels), [row], FAKE_TOOLS)
    assert not any(tmp_path.iterdir())


def test_zip(pack: Pack, tmp_path: Path) -> None:
    path = tmp_path / "pack.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in _files(pack.path).items():
            archive.writestr(name, data)
    zipped = read_pack(path)
    assert replace(zipped, path=pack.path) == pack
    assert zipped.read_cubin(next(iter(pack.kernels))) == next(iter(pack.kernels)).encode()
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(PackError, match=r"pack\.zip"):
        read_pack(path)


def test_import_is_light() -> None:
    code = (
        "import sys, glac.pack; "
        "print(sorted({'torch', 'triton', 'yaml', 'numpy'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# What is wrong, and what the message must name.


@pytest.mark.parametrize("content", [b"", b"{", b"[1,", b"\xff\xfe", b"nonsense", b"9" * 5000])
def test_no_json(scratch: Path, content: bytes) -> None:
    (scratch / MANIFEST).write_bytes(content)
    with pytest.raises(PackError, match=r"manifest\.json"):
        read_pack(scratch)


def test_json_error_has_line_and_column(scratch: Path) -> None:
    (scratch / MANIFEST).write_text('{\n "format": 1,\n "arch" "sm_90a"}')
    with pytest.raises(PackError, match="line 3, column 9"):
        read_pack(scratch)


def test_deep_json(scratch: Path) -> None:
    (scratch / MANIFEST).write_text("[" * 200_000)
    with pytest.raises(PackError, match="not JSON"):
        read_pack(scratch)


def test_missing_pack(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="no such pack") as caught:
        read_pack(tmp_path / "nowhere")
    assert "glac build" in caught.value.hint


def test_newer_format(scratch: Path, manifest: dict[str, Any]) -> None:
    _write(scratch, {"format": 3, "new": "things"})
    with pytest.raises(PackError, match="newer") as caught:
        read_pack(scratch)
    assert "upgrade glac" in caught.value.hint


def test_older_format(scratch: Path) -> None:
    _write(scratch, {"format": 1, "templates_sha256": "0" * 64})
    with pytest.raises(
        PackError, match="format: version 1 is older than this glac reads"
    ) as caught:
        read_pack(scratch)
    assert "glac build" in caught.value.hint


def _kernel_named(manifest: dict[str, Any], template: str) -> dict[str, Any]:
    found: dict[str, Any] = next(
        k for k in manifest["kernels"].values() if k["kernel"]["template"] == template
    )
    return found


def _wrong_manifests() -> Iterator[tuple[str, Any]]:
    def fwd(m: dict[str, Any]) -> dict[str, Any]:
        return _kernel_named(m, "gla_fwd")

    yield "arch: wanted one of", lambda m: m.update(arch="sm_75")
    yield "driver_floor", lambda m: m.update(driver_floor=True)
    yield r"toolchain.*unknown keys.*'nvcc'", lambda m: m["toolchain"].update(nvcc="1")
    yield "templates_sha256: wanted an object", lambda m: m.update(templates_sha256="A" * 64)
    yield (
        "templates_sha256.forward: wanted 64 hex",
        lambda m: m["templates_sha256"].update(forward="A" * 64),
    )
    yield (
        r"templates_sha256: unknown keys \['backward'\]",
        lambda m: m["templates_sha256"].update(backward="a" * 64),
    )
    yield "missing keys .*'rows'", lambda m: m.pop("rows")
    yield "symbol: wanted an identifier", lambda m: fwd(m).update(symbol="a;b")
    yield "sha256: wanted 64 hex", lambda m: fwd(m).update(sha256="../../../etc/passwd")
    yield "shared: wanted an integer in 0..232448", lambda m: fwd(m).update(shared=232449)
    yield "registers", lambda m: fwd(m).update(registers=256)
    yield "size", lambda m: fwd(m).update(size=-1)
    yield "another glac version", lambda m: fwd(m)["args"].reverse()
    yield "another glac version", lambda m: fwd(m).update(grid=["heads"])
    yield "another glac version", lambda m: fwd(m).update(num_warps=8)
    yield "another glac version", lambda m: fwd(m).update(tiles=True)
    yield "its content is that of", lambda m: fwd(m)["kernel"]["spec"].update(K=32)
    yield "unknown template", lambda m: fwd(m)["kernel"].update(template="gla_new")
    yield "sm_80", lambda m: fwd(m)["kernel"].update(arch="sm_80")
    yield r"rows\[0\].op: wanted one of", lambda m: m["rows"][0].update(op="sideways")
    yield r"rows\[0\]: config: unknown keys", lambda m: m["rows"][0].update(op="backward")
    yield r"rows\[0\].gpu: a100 runs sm_80", lambda m: m["rows"][0].update(gpu="a100")
    yield r"rows\[0\].gpu: wanted one of", lambda m: m["rows"][0].update(gpu="v100")
    yield r"rows\[1\].source", lambda m: m["rows"][1].update(source="guessed")
    yield r"rows\[0\].config: segment", lambda m: m["rows"][0]["config"].update(segment=65)
    yield r"rows\[0\].config: segment", lambda m: m["rows"][0]["config"].update(segment=-64)
    yield r"rows\[0\].bucket.bh", lambda m: m["rows"][0]["bucket"].update(bh=-1)
    yield (
        r"rows\[0\].kernels.gla_fwd: no kernel",
        lambda m: m["rows"][0]["kernels"].update(gla_fwd="x"),
    )
    yield (
        r"rows\[2\].kernels.gla_fwd: wanted",
        lambda m: m["rows"][2]["kernels"].update(gla_fwd=m["rows"][0]["kernels"]["gla_fwd"]),
    )
    yield r"rows\[3\]: same GPU", lambda m: m["rows"].append(m["rows"][0])


@pytest.mark.parametrize(("message", "spoil"), list(_wrong_manifests()))
def test_wrong_field(scratch: Path, manifest: dict[str, Any], message: str, spoil: Any) -> None:
    data = copy.deepcopy(manifest)
    spoil(data)
    # Signed anew, so that the check of the field itself is seen.
    with pytest.raises(PackError, match=message) as caught:
        read_pack(_write(scratch, data, sign=True))
    assert str(scratch) in caught.value.message
    assert "glac build" in caught.value.hint
    if "same GPU" not in message and "unknown keys" not in message:  # which no one field shows
        with pytest.raises(PackError, match=message):
            _look_at_all(scratch)
    _write(scratch, {**data, "sha256": manifest["sha256"]})
    with pytest.raises(PackError, match=message):
        open_pack(scratch)


def _look_at_all(path: Path) -> None:
    opened = open_pack(path)
    assert list(opened.kernels.values())
    assert list(opened.rows)


def test_opened_is_as_read(pack: Pack) -> None:
    opened = open_pack(pack.path)
    for row in pack.rows:
        wanted = [other for other in pack.rows if (other.op, other.spec) == (row.op, row.spec)]
        assert opened.rows_of(row.op, row.spec) == wanted == pack.rows_of(row.op, row.spec)
        for name in row.kernels.values():
            assert opened.kernels[name] == pack.kernels[name]
            assert opened.read_cubin(name) == pack.read_cubin(name)
    assert tuple(opened.rows[:]) == tuple(pack.rows)
    assert dict(opened.kernels) == dict(pack.kernels)
    assert opened.rows_of(Op.DECODE, pack.rows[0].spec) == []
    assert (opened.arch, opened.driver_floor, opened.glac) == (
        pack.arch,
        pack.driver_floor,
        pack.glac,
    )
    assert (opened.toolchain, opened.templates_sha256) == (pack.toolchain, pack.templates_sha256)


def test_opening_looks_at_no_other_row(scratch: Path, manifest: dict[str, Any]) -> None:
    data = copy.deepcopy(manifest)
    wrong = next(row for row in data["rows"] if row["spec"] != data["rows"][0]["spec"])
    wrong["config"] = {}
    opened = open_pack(_write(scratch, data, sign=True))
    spec = Specialisation.from_dict(data["rows"][0]["spec"], "spec")
    assert opened.rows_of(Op(data["rows"][0]["op"]), spec)
    with pytest.raises(PackError, match="config"):
        opened.rows_of(Op(wrong["op"]), Specialisation.from_dict(wrong["spec"], "spec"))


def test_plausible_edit_is_refused(scratch: Path, manifest: dict[str, Any]) -> None:
    data = copy.deepcopy(manifest)
    data["rows"][0]["bucket"]["bh"] += 1
    with pytest.raises(PackError, match="changed after it was written"):
        read_pack(_write(scratch, data))


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in items:
            yield from _places(child, (*path, key))


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["sm_80", "sm_90a", "gla_fwd", "h200", "bf16", "fp32", 16, 32, 64, 10**6]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=4,
)


def _spoil(data: st.DataObject, manifest: dict[str, Any]) -> dict[str, Any]:
    """``manifest`` with one value replaced, removed, or added."""
    spoilt: Any = {"root": copy.deepcopy(manifest)}
    places = [("root", *place) for place in _places(manifest)]
    place = data.draw(st.sampled_from(places))
    parent = spoilt
    for key in place[:-1]:
        parent = parent[key]
    action = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if action == "replace" or len(place) == 1:
        parent[place[-1]] = data.draw(JSON_VALUES)
    elif action == "remove":
        del parent[place[-1]]
    elif isinstance(parent, dict):
        parent[data.draw(st.text(max_size=8))] = data.draw(JSON_VALUES)
    else:
        parent.append(data.draw(JSON_VALUES))
    result: dict[str, Any] = spoilt["root"]
    return result


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=400)
def test_any_change_is_refused(
    scratch: Path, manifest: dict[str, Any], data: st.DataObject
) -> None:
    spoilt = _spoil(data, manifest)
    hypothesis.assume(json.dumps(spoilt, sort_keys=True) != json.dumps(manifest, sort_keys=True))
    with pytest.raises(PackError):
        read_pack(_write(scratch, spoilt))
    with pytest.raises(PackError):
        open_pack(scratch)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=300)
def test_signed_changes_never_give_a_wrong_kernel(
    scratch: Path, manifest: dict[str, Any], data: st.DataObject
) -> None:
    spoilt = _spoil(data, manifest)
    signed = isinstance(spoilt, dict)
    try:
        pack = read_pack(_write(scratch, spoilt, sign=signed))
    except PackError:
        return
    for row in pack.rows:
        for kernel in config_kernels(row.spec, row.config, pack.arch):
            assert pack.kernels[row.kernels[kernel.template]].kernel == kernel
            assert row.kernels[kernel.template] == kernel.name


@hypothesis.given(st.integers(0, 10**6), st.integers(0, 255))
@hypothesis.settings(max_examples=150)
def test_any_damage_to_the_manifest_is_refused_or_harmless(
    scratch: Path, pack: Pack, place: int, byte: int
) -> None:
    raw = bytearray((pack.path / MANIFEST).read_bytes())
    raw[place % len(raw)] = byte
    (scratch / MANIFEST).write_bytes(raw)
    try:
        again = read_pack(scratch)
    except PackError:
        return
    assert replace(again, path=pack.path) == pack  # only white space changed


@hypothesis.given(st.integers(0, 10**6))
@hypothesis.settings(max_examples=50)
def test_truncated_manifest_is_refused(scratch: Path, pack: Pack, length: int) -> None:
    raw = (pack.path / MANIFEST).read_bytes().rstrip()
    (scratch / MANIFEST).write_bytes(raw[: length % len(raw)])
    with pytest.raises(PackError):
        read_pack(scratch)


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "empty", "missing", "folder"])
def test_damaged_cubin(tmp_path: Path, damage: str) -> None:
    pack = fake_pack(tmp_path / "p")
    name = next(iter(pack.kernels))
    path = pack.path / "cubins" / f"{pack.kernels[name].sha256}.cubin"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[random.Random(0).randrange(len(data))] ^= 1
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        spoilt = {"cut": data[:-1], "grow": data + b"x", "empty": b""}
        path.write_bytes(bytes(spoilt.get(damage, data)))
    with pytest.raises(PackError, match=r"cubins/.*\.cubin") as caught:
        pack.read_cubin(name)
    assert "glac build" in caught.value.hint
    with pytest.raises(PackError, match="no kernel 'other'"):
        pack.read_cubin("other")


def test_rows_of_two_ops_for_one_problem(tmp_path: Path) -> None:
    rows = [
        PackRow.make("h100", "tuned", "", VECTOR, Bucket(5, 9), config)
        for config in (BACKWARD, WHOLE)
    ]
    kernels = [k for row in rows for k in config_kernels(VECTOR, row.config, "sm_90a")]
    write_pack(tmp_path / "p", "sm_90a", map(fake_compiled, kernels), rows, FAKE_TOOLS)
    pack = read_pack(tmp_path / "p")
    assert [row.op for row in pack.rows] == [Op.FORWARD, Op.BACKWARD]
    assert pack.templates_sha256 == templates_sha256([Op.FORWARD, Op.BACKWARD])
    assert pack.rows[1].config == BACKWARD
    assert list(pack.rows[1].kernels) == list(BACKWARD.kernels())
    twice = [rows[0], rows[0], rows[1]]
    with pytest.raises(PackError, match="same GPU, op, spec and bucket"):
        write_pack(tmp_path / "q", "sm_90a", map(fake_compiled, kernels), twice, FAKE_TOOLS)
    data = json.loads((tmp_path / "p" / MANIFEST).read_text())
    data["rows"][1]["config"]["states"]["chunk"] = 32
    with pytest.raises(PackError, match=r"rows\[1\].config: grads.chunk times grads.keep must be"):
        read_pack(_write(tmp_path / "p", data, sign=True))


def test_lowrank_row_has_its_own_abi(pack: Pack) -> None:
    row = next(row for row in pack.rows if row.spec == LOWRANK)
    names = [name for name, _ in pack.kernels[row.kernels["gla_fwd"]].args]
    assert "x" in names
    assert "g" not in names


# Merging.


def _one_row(path: Path, row: PackRow, tools: Toolchain = FAKE_TOOLS) -> Pack:
    arch = GPUS[row.gpu].arch
    kernels = config_kernels(row.spec, row.config, arch)
    return write_pack(path, arch, map(fake_compiled, kernels), [row], tools)


def test_merge_is_what_one_build_would_have_written(pack: Pack, tmp_path: Path) -> None:
    backward = PackRow.make("h200", "tuned", "", VECTOR, Bucket(5, 9), BACKWARD)
    other = _one_row(tmp_path / "b", backward)
    result = merge_packs(tmp_path / "out", [pack, other])
    assert result.dropped == ()
    kernels = [packed.kernel for p in (pack, other) for packed in p.kernels.values()]
    rows = [*pack.rows, *other.rows]
    write_pack(tmp_path / "one", "sm_90a", map(fake_compiled, kernels), rows, FAKE_TOOLS)
    assert _files(tmp_path / "out") == _files(tmp_path / "one")
    assert read_pack(tmp_path / "out") == result.pack
    assert set(result.pack.templates_sha256) == {Op.FORWARD, Op.BACKWARD}


def test_merge_keeps_the_earlier_row_and_only_its_kernels(tmp_path: Path) -> None:
    first = _one_row(
        tmp_path / "a", PackRow.make("h100", "heuristic", "", VECTOR, Bucket(5, 9), WHOLE)
    )
    rival = PackRow.make("h100", "tuned", "Some GPU", VECTOR, Bucket(5, 9), SPLIT)
    second = _one_row(tmp_path / "b", rival)
    result = merge_packs(tmp_path / "out", [first, second])
    assert result.pack.rows == first.rows
    assert result.pack.kernels == first.kernels
    (dropped,) = result.dropped
    assert (dropped.row, dropped.path, dropped.kept) == (rival, second.path, first.path)
    # The other way round, and in place of one of the two.
    result = merge_packs(second.path, [second, first])
    assert result.pack.rows == (rival,)
    assert set(_files(second.path)) == {MANIFEST} | {
        f"cubins/{kernel.sha256}.cubin" for kernel in second.kernels.values()
    }


def _untouched(tmp_path: Path, message: str, packs: list[Pack]) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PackError, match=message) as caught:
        merge_packs(tmp_path / "out", packs)
    assert caught.value.hint
    assert sorted(tmp_path.rglob("*")) == before


def test_merge_refuses_what_one_manifest_cannot_say(pack: Pack, tmp_path: Path) -> None:
    row = PackRow.make("h100", "tuned", "", VECTOR, Bucket(5, 9), WHOLE)
    a100 = _one_row(tmp_path / "a", replace(row, gpu="a100", kernels=_names(row, "sm_80")))
    _untouched(tmp_path, "arch: wanted sm_90a as in .*, got sm_80", [pack, a100])
    newer = _one_row(tmp_path / "b", row, replace(FAKE_TOOLS, ptxas="13.0.48"))
    _untouched(tmp_path, r"toolchain: wanted .*12\.9\.86.*got .*13\.0\.48", [pack, newer])
    old = _one_row(tmp_path / "c", row)
    data = json.loads((old.path / MANIFEST).read_text())
    data["templates_sha256"]["forward"] = "0" * 64
    _write(old.path, data, sign=True)
    _untouched(tmp_path, "templates_sha256.forward: wanted", [pack, read_pack(old.path)])
    _untouched(tmp_path, "no pack to merge", [])


def _names(row: PackRow, arch: str) -> dict[str, str]:
    return {kernel.template: kernel.name for kernel in config_kernels(row.spec, row.config, arch)}


def test_merge_refuses_one_name_for_two_kernels(pack: Pack, tmp_path: Path) -> None:
    row = PackRow.make("h200", "tuned", "", VECTOR, Bucket(9, 9), WHOLE)
    (kernel,) = config_kernels(VECTOR, WHOLE, "sm_90a")
    for name, change, message in (
        ("a", {"cubin": b"other", "sha256": hashlib.sha256(b"other").hexdigest()}, "sha256"),
        ("b", {"registers": 65}, "content"),
    ):
        built = replace(fake_compiled(kernel), **change)
        other = write_pack(tmp_path / name, "sm_90a", [built], [row], FAKE_TOOLS)
        message = rf"kernels\['{kernel.name}'\].{message}: wanted .* one name cannot"
        _untouched(tmp_path, message, [pack, other])


def test_merge_checks_the_code_and_leaves_other_packs_alone(pack: Pack, tmp_path: Path) -> None:
    row = PackRow.make("h200", "tuned", "", VECTOR, Bucket(9, 9), WHOLE)
    damaged = _one_row(tmp_path / "a", row)
    next((damaged.path / "cubins").iterdir()).write_bytes(b"x")
    _untouched(tmp_path, "wanted .* bytes, got 1", [pack, damaged])
    fake_pack(tmp_path / "out")
    _untouched(tmp_path, "got another pack; it was left as it is", [pack])


def test_what_was_written_badly_takes_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(path: Path, data: bytes) -> None:
        path.write_bytes(data[:-1] if path.suffix == ".cubin" else data)

    old = fake_pack(tmp_path / "p")
    before = _files(tmp_path)
    monkeypatch.setattr("glac.pack.write_bytes", spoil)
    with pytest.raises(PackError, match="bytes, got"):
        fake_pack(old.path)
    assert _files(tmp_path) == before
