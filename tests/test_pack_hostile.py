"""Packs that somebody damaged or made up: refused in one line, or right; never a wrong kernel."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import shutil
import stat
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from click.testing import CliRunner

from glac import pack as pack_module
from glac.archive import MANIFEST, members, read_member, zip_bytes
from glac.cli import cli
from glac.errors import PackError
from glac.fit import Device, check_fit, driver_branch, runs_on
from glac.kernelspec import config_kernels
from glac.pack import Pack, PackRow, manifest_sha256, read_pack, write_pack
from glac.problem import Bucket
from tests.helpers_packs import FAKE_TOOLS, VECTOR, WHOLE, fake_compiled, fake_pack

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return fake_pack(tmp_path_factory.mktemp("good") / "sm_90a")


@pytest.fixture(scope="module")
def zipped(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return fake_pack(tmp_path_factory.mktemp("zipped") / "sm_90a.zip")


def contents(pack: Pack) -> dict[str, bytes]:
    return {name: read_member(pack.path, name, 1 << 20) for name in members(pack.path)}


def check(path: Path) -> Pack:
    """What ``glac pack verify`` does."""
    found = read_pack(path)
    for name in found.kernels:
        found.read_cubin(name)
    return found


def refused(path: Path, message: str) -> None:
    """The reader refuses, and the command line says so in one line, with something to do."""
    with pytest.raises(PackError, match=message) as caught:
        check(path)
    assert "\n" not in caught.value.message
    assert str(path) in caught.value.message
    done = CliRunner().invoke(cli, ["pack", "verify", str(path), "--json"])
    assert done.exit_code == 1
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "pack"
    assert error["hint"]


# Folders.


def _cubins(path: Path) -> list[Path]:
    return sorted((path / "cubins").iterdir())


def _swap_cubins(path: Path) -> None:
    first, second = _cubins(path)[:2]
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def _link_cubin(path: Path) -> None:
    file = _cubins(path)[0]
    target = file.rename(path.parent / "elsewhere")
    file.symlink_to(target)


def _link_cubins(path: Path) -> None:
    target = (path / "cubins").rename(path.parent / "cubins")
    (path / "cubins").symlink_to(target)


def _link_manifest(path: Path) -> None:
    target = (path / MANIFEST).rename(path.parent / MANIFEST)
    (path / MANIFEST).symlink_to(target)


def _pipe(path: Path) -> None:
    _cubins(path)[0].unlink()
    os.mkfifo(path / "cubins" / f"{'0' * 64}.cubin")
    (path / MANIFEST).unlink()
    os.mkfifo(path / MANIFEST)


def _grow(path: Path) -> None:
    with _cubins(path)[0].open("r+b") as file:
        file.truncate(8 << 30)  # sparse; reading it would not end


def _grow_manifest(path: Path) -> None:
    with (path / MANIFEST).open("r+b") as file:
        file.truncate(pack_module.MAX_MANIFEST + 2)


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the manifest, and sign it anew."""

    def spoil(path: Path) -> None:
        data = json.loads((path / MANIFEST).read_text())
        change(data)
        (path / MANIFEST).write_text(json.dumps({**data, "sha256": manifest_sha256(data)}))

    return spoil


def _rename_kernel(data: dict[str, Any]) -> None:
    first, second = list(data["kernels"])[:2]
    data["kernels"][first], data["kernels"][second] = (
        data["kernels"][second],
        data["kernels"][first],
    )


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing cubin": (lambda p: _cubins(p)[0].unlink(), "No such file"),
    "renamed cubin": (lambda p: _cubins(p)[0].rename(p / "cubins" / "x.cubin"), "No such file"),
    "swapped cubins": (_swap_cubins, "wanted SHA-256|bytes, got"),
    "grown cubin": (_grow, "got more than"),
    "linked cubin": (_link_cubin, "wanted an ordinary file, got a link"),
    "linked cubins": (_link_cubins, "wanted a folder, got a link"),
    "linked manifest": (_link_manifest, "wanted an ordinary file, got a link"),
    "pipe": (_pipe, "wanted an ordinary file, got something else"),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), "No such file"),
    "grown manifest": (_grow_manifest, "wanted at most"),
    "foreign arch": (_edit(lambda d: d.update(arch="sm_80")), "wanted sm_80, got sm_90a"),
    "newer format": (_edit(lambda d: d.update(format=99)), "is newer than this glac reads"),
    "swapped kernels": (_edit(_rename_kernel), "its content is that of"),
    "huge kernel": (
        _edit(lambda d: next(iter(d["kernels"].values())).update(size=1 << 40)),
        "size: wanted an integer in",
    ),
}


@pytest.mark.parametrize("damage", FOLDERS)
def test_damaged_folder(good: Pack, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "sm_90a"
    shutil.copytree(good.path, path)
    spoil, message = FOLDERS[damage]
    spoil(path)
    start = time.perf_counter()
    refused(path, message)
    assert time.perf_counter() - start < 5


def test_a_pack_may_itself_be_reached_through_a_link(good: Pack, tmp_path: Path) -> None:
    (tmp_path / "sm_90a").symlink_to(good.path)
    assert check(tmp_path / "sm_90a").kernels == good.kernels


def test_a_row_whose_kernel_its_gpu_cannot_hold(tmp_path: Path) -> None:
    row = PackRow.make("rtx3090", "heuristic", "", VECTOR, Bucket(5, 9), WHOLE)
    (kernel,) = config_kernels(VECTOR, WHOLE, "sm_80")
    built = replace(fake_compiled(kernel), shared=101377)
    with pytest.raises(PackError, match="needs 101377 bytes of shared memory, rtx3090 has 101376"):
        write_pack(tmp_path / "sm_80", "sm_80", [built], [row], FAKE_TOOLS)
    assert list(tmp_path.iterdir()) == []


# Zip files.


def test_a_zip_holds_what_its_folder_does(good: Pack, zipped: Pack, tmp_path: Path) -> None:
    assert contents(zipped) == contents(good)
    assert replace(read_pack(zipped.path), path=good.path) == good
    with zipfile.ZipFile(zipped.path) as archive:  # readable by others
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == contents(good)
    other = fake_pack(tmp_path / "elsewhere" / "other.zip", reverse=True)
    assert other.path.read_bytes() == zipped.path.read_bytes()
    # Made by hand, with another tool, compressed or not, with entries for folders.
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "hand.zip", "w", method) as archive:
            archive.mkdir("cubins") if hasattr(archive, "mkdir") else None
            for name, data in contents(good).items():
                archive.writestr(name, data)
        assert check(tmp_path / "hand.zip").kernels == good.kernels


def _with(good: Pack, path: Path, *more: tuple[Any, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in [*contents(good).items(), *more]:
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/passwd",
        "cubins/../../x",
        "cubins/x.cubin",
        "a.py",
        "sm_90a/manifest.json",
    ],
)
def test_names_that_a_pack_has_no_use_for(good: Pack, tmp_path: Path, name: str) -> None:
    path = _with(good, tmp_path / "p.zip", (name, b"x"))
    refused(path, "a pack holds no")
    assert [item.name for item in tmp_path.iterdir()] == ["p.zip"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_odd_members(good: Pack, tmp_path: Path) -> None:
    refused(_with(good, tmp_path / "twice.zip", (MANIFEST, b"{}")), "twice")
    files = contents(good)
    link = zipfile.ZipInfo(MANIFEST)
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    refused(tmp_path / "link.zip", "is a link or a device")
    with zipfile.ZipFile(tmp_path / "bz.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr(MANIFEST, files[MANIFEST])
    refused(tmp_path / "bz.zip", "compressed in a way")
    raw = bytearray(zip_bytes(files))
    at = raw.rindex(b"PK\x01\x02")
    raw[at + 8] |= 1
    (tmp_path / "secret.zip").write_bytes(raw)
    refused(tmp_path / "secret.zip", "encrypted")
    (tmp_path / "long.zip").write_bytes(zip_bytes(files) + b"more")
    refused(tmp_path / "long.zip", "something follows|is not where it says")
    (tmp_path / "text.zip").write_text("no zip at all")
    refused(tmp_path / "text.zip", "no table of contents")
    os.mkfifo(tmp_path / "pipe.zip")
    start = time.perf_counter()
    (tmp_path / "folder.zip").mkdir()
    refused(tmp_path / "folder.zip", "No such file")
    assert time.perf_counter() - start < 5


def test_bombs_are_not_expanded(good: Pack, tmp_path: Path) -> None:
    """A member that would expand to far more than a pack can be is read as far as it may be."""
    files = contents(good)
    name = next(name for name in files if name != MANIFEST)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"".join(deflate.compress(bytes(1 << 20)) for _ in range(512)) + deflate.flush()
    for member, message in ((name, "got more than"), (MANIFEST, "wanted at most")):
        body = io.BytesIO()
        with zipfile.ZipFile(body, "w", zipfile.ZIP_DEFLATED) as archive:
            for other, data in files.items():
                archive.writestr(other, b"" if other == member else data)
        path = tmp_path / "bomb.zip"
        path.write_bytes(_planted(body.getvalue(), member, bomb))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        refused(path, message)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown * 1024 < 3 * pack_module.MAX_MANIFEST


def _planted(raw: bytes, member: str, data: bytes) -> bytes:
    """``raw`` with ``data`` as the compressed bytes of its (empty) ``member``."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        info = archive.getinfo(member)
        directory = archive.start_dir
    start = info.header_offset + 30 + len(member)
    end = start + info.compress_size
    grown = len(data) - info.compress_size
    out = bytearray(raw[:start] + data + raw[end:])
    at = directory + grown
    while out[at : at + 4] == b"PK\x01\x02":
        named, extra, note = struct.unpack_from("<3H", out, at + 28)
        if out[at + 46 : at + 46 + named] == member.encode():
            struct.pack_into("<I", out, at + 20, len(data))
        offset = struct.unpack_from("<I", out, at + 42)[0]
        if offset > info.header_offset:
            struct.pack_into("<I", out, at + 42, offset + grown)
        at += 46 + named + extra + note
    struct.pack_into("<I", out, at + 16, directory + grown)
    return bytes(out)


def _refused_or_right(path: Path, pack: Pack) -> None:
    try:
        again = read_pack(path)
    except PackError:
        return
    assert replace(again, path=pack.path) == pack
    for name, kernel in again.kernels.items():
        try:
            data = again.read_cubin(name)
        except PackError:
            continue
        assert hashlib.sha256(data).hexdigest() == kernel.sha256


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spoilt") / "p.zip"


@hypothesis.given(st.integers(0, 10**6), st.integers(1, 255))
@hypothesis.settings(max_examples=300)
def test_any_damage_to_a_zip(zipped: Pack, spoilt: Path, place: int, change: int) -> None:
    raw = bytearray(zipped.path.read_bytes())
    raw[place % len(raw)] ^= change
    spoilt.write_bytes(raw)
    _refused_or_right(spoilt, zipped)


@hypothesis.given(st.integers(0, 10**6))
@hypothesis.settings(max_examples=100)
def test_a_truncated_zip(zipped: Pack, spoilt: Path, length: int) -> None:
    raw = zipped.path.read_bytes()
    spoilt.write_bytes(raw[: length % len(raw)])
    with pytest.raises(PackError):
        check(spoilt)


@hypothesis.given(st.binary(max_size=300))
@hypothesis.settings(max_examples=100)
def test_what_is_no_zip(spoilt: Path, data: bytes) -> None:
    spoilt.write_bytes(data)
    with pytest.raises(PackError):
        check(spoilt)


# Places.


@pytest.mark.parametrize("name", ["sm_90a", "sm_90a.zip"])
def test_a_place_that_takes_no_files(name: str) -> None:
    with pytest.raises(PackError, match="cannot be written") as caught:
        fake_pack(Path("/proc") / name)
    assert "\n" not in caught.value.message
    assert "another place" in caught.value.hint


FULL = """
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.path.insert(0, sys.argv[1])
from glac.errors import PackError
from tests.helpers_packs import fake_pack
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    fake_pack(Path(sys.argv[2]))
except PackError as error:
    print(error.message)
else:
    print("written")
"""


@pytest.mark.parametrize("name", ["sm_90a", "sm_90a.zip"])
@pytest.mark.parametrize("room", [0, 50, 1000])
def test_a_disk_that_is_full(tmp_path: Path, name: str, room: int) -> None:
    """Files may not grow beyond ``room`` bytes: as on a full disk, a write ends half-way."""
    old = fake_pack(tmp_path / name)
    before = {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(ROOT), str(tmp_path / name), str(room)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot be written" in done.stdout
    assert done.stdout.count("\n") == 1
    assert {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert check(old.path) == old


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.helpers_packs import fake_pack
for turn in range(30):
    fake_pack(Path(sys.argv[2]), reverse=bool(turn % 2))
"""


@pytest.mark.parametrize("name", ["sm_90a", "sm_90a.zip"])
def test_several_processes_write_one_pack(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    old = fake_pack(path)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(ROOT), str(path)], stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    missing = 0
    while any(writer.poll() is None for writer in writers):
        try:
            assert check(path) == old
        except PackError:
            missing += 1  # a folder is away for a moment between two renames
    said = [writer.communicate()[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0], "\n".join(said)
    assert check(path) == old
    assert [item.name for item in tmp_path.iterdir()] == [name]
    if path.suffix == ".zip":
        assert missing == 0


def test_a_pack_comes_and_goes_between_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other, third = (tmp_path / name for name in ("sm_90a", "other", "third"))
    old = fake_pack(path)
    fake_pack(other)
    rename = Path.rename
    seen: list[Path] = []

    def interfered(self: Path, target: Path) -> Path:
        if target != path or seen:
            return rename(self, target)
        seen.append(self)
        rename(other, path)
        try:
            return rename(self, target)
        finally:
            rename(path, third)

    monkeypatch.setattr(Path, "rename", interfered)
    assert fake_pack(path, reverse=True) == old
    assert seen
    assert check(path) == old
    assert sorted(item.name for item in tmp_path.iterdir()) == ["sm_90a", "third"]


@pytest.mark.parametrize("away", [True, False])
def test_a_pack_is_replaced_while_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: bool
) -> None:
    path, other = tmp_path / "sm_90a", tmp_path / "other"
    old = fake_pack(path)
    fake_pack(other)
    listed = Path.iterdir
    seen: list[Path] = []

    def interfered(folder: Path) -> Iterator[Path]:
        if folder != path or seen:
            return listed(folder)
        seen.append(folder)
        path.rename(tmp_path / "third")
        if away:
            return listed(folder)
        other.rename(path)
        return iter([path / "cubins"])  # left of the first one, which the other process removes

    monkeypatch.setattr(Path, "iterdir", interfered)
    assert fake_pack(path) == old
    assert seen
    assert check(path) == old


@pytest.mark.parametrize("name", ["thesis.zip", "thesis"])
def test_something_else_is_not_overwritten(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    place.write_text("years of work")
    with pytest.raises(PackError, match="is not a kernel pack"):
        fake_pack(place)
    assert place.read_text() == "years of work"


def test_a_damaged_pack_is_replaced(tmp_path: Path) -> None:
    for name in ("a", "b.zip"):
        path = tmp_path / name
        pack = fake_pack(path)
        damaged = path / MANIFEST if path.is_dir() else path
        data = bytearray(damaged.read_bytes())
        data[random.Random(1).randrange(40, 400)] ^= 1
        damaged.write_bytes(data)
        fake_pack(path)
        assert check(path) == pack


# The device.


HOPPER = Device("H100", (9, 0), 232448, (12, 4))


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (
            {"capability": (10, 0)},
            "its code is for sm_90a, H100 has capability 10.0",
            "glac build",
        ),
        ({"capability": (8, 0)}, "has capability 8.0", "glac build"),
        (
            {"cuda": (11, 8)},
            "needs driver 525 .* CUDA 11.8, of branch 520",
            "driver 525",
        ),
        (
            {"shared_per_block": 1000},
            "needs 1024 bytes .* H100 has 1000",
            "rtx3090",
        ),
    ],
)
def test_a_device_that_does_not_fit(
    good: Pack, change: dict[str, Any], message: str, hint: str
) -> None:
    check_fit(good, good.kernels, HOPPER)
    with pytest.raises(PackError, match=message) as caught:
        check_fit(good, good.kernels, replace(HOPPER, **change))
    assert hint in caught.value.hint


def test_driver_branches_and_archs() -> None:
    assert [driver_branch(v) for v in ((10, 2), (12, 0), (12, 7), (12, 9), (13, 0), (99, 0))] == [
        0,
        525,
        560,
        575,
        580,
        590,
    ]
    assert runs_on("sm_80", (8, 6))
    assert runs_on("sm_80", (8, 9))
    assert not runs_on("sm_80", (9, 0))
    assert runs_on("sm_90a", (9, 0))
    assert not runs_on("sm_90a", (9, 1))
    assert not runs_on("sm_90a", (8, 0))
