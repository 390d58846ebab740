"""The folders, the links and the build file describe the same package, and it imports lightly."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import glac
from tests.helpers_packs import fake_pack

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("kernel_templates", "tuned_configs", "tuning")
FOLDERS = {"glac": ROOT / "glac", **{f"glac.{name}": ROOT / name for name in MAPPED}}


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def folders_with(pattern: str) -> set[str]:
    """Dotted names of the folders that hold such a file, each seen once, past the links."""
    found = set()
    for package, folder in FOLDERS.items():
        for path in folder.rglob(pattern):
            inner = path.parent.relative_to(folder).parts
            link = package == "glac" and inner[:1] and inner[0] in MAPPED
            if not link and "__pycache__" not in inner:
                found.add(".".join((package, *inner)))
    return found


def run_python(code: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_build_file_lists_every_package() -> None:
    listed = pyproject()["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == folders_with("__init__.py")


def test_every_code_folder_is_a_package() -> None:
    assert folders_with("*.py") == folders_with("__init__.py")


def test_map_names_the_folders() -> None:
    mapped = pyproject()["tool"]["setuptools"]["package-dir"]
    assert {name: ROOT / folder for name, folder in mapped.items()} == FOLDERS


@pytest.mark.parametrize("name", MAPPED)
def test_link_is_relative_and_points_at_its_folder(name: str) -> None:
    link = ROOT / "glac" / name
    if not link.is_symlink():
        pytest.skip("this checkout was made without links; the map alone serves it")
    assert link.readlink() == Path("..", name)
    assert link.resolve() == ROOT / name


def test_locked_versions_are_exact_and_satisfy_the_pins() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.match(r"[a-z0-9-]+==[0-9.]+( ;|$)", pin)] == []
    names = {pin.partition("==")[0] for pin in pins}
    extras = pyproject()["project"]["optional-dependencies"]
    wanted = [*pyproject()["project"]["dependencies"], *(w for e in extras.values() for w in e)]
    asked = {re.split(r"[\[><=;]", want)[0].lower() for want in wanted}
    assert asked - {"glac"} <= names
    assert [want for want in extras["build"] if "==" in want and want not in pins] == []


def test_version_is_the_installed_one() -> None:
    try:
        installed = version("glac")
    except PackageNotFoundError:
        pytest.skip("glac runs from an uninstalled checkout")
    assert installed == glac.__version__


def test_importing_glac_stays_light() -> None:
    heavy = ("torch", "triton", "optuna", "numpy", "scipy", "matplotlib")
    loaded = run_python(
        "import sys, glac; print(*(name for name in sys.argv[1:] if name in sys.modules))", *heavy
    )
    assert loaded.split() == []


# Modules that need an extra which is not installed are passed over.
IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import glac
for module in pkgutil.walk_packages(glac.__path__, "glac."):
    if module.name.rpartition(".")[2] == "__main__":
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("glac", *sys.argv[1:]):
            raise
print(*(name for name in sys.argv[1:] if name in sys.modules))
print(*(name for name in sys.modules if name.startswith("glac.")))
"""


def test_no_folder_is_imported_under_its_bare_name() -> None:
    bare, inside = run_python(IMPORT_EVERYTHING, *MAPPED).splitlines()
    assert bare.split() == []
    assert {f"glac.{name}" for name in MAPPED} <= set(inside.split())


READ_INSTALLED = """
import sys
from importlib.resources import files
import glac, glac.tuned_configs
assert glac.__file__.startswith(sys.argv[1]), glac.__file__
for entry in files(glac.tuned_configs).iterdir():
    if entry.name.endswith(".yaml"):
        print(entry.name, len(entry.read_text(encoding="utf-8")))
"""


SERVED_INSTALLED = """
import json, sys
import glac
from glac.pack import read_pack
from glac.settings import shipped_pack_dir
assert glac.__file__.startswith(sys.argv[1]), glac.__file__
for path in sorted(shipped_pack_dir().iterdir()):
    pack = read_pack(path)
    print(path.name, pack.arch, len([pack.read_cubin(name) for name in pack.kernels]))
"""


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="builds without isolation")
    source, installed = tmp_path / "source", tmp_path / "installed"
    # A copy, because setuptools would take up whatever an earlier build left in the checkout.
    source.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "packs")
    for name in ("glac", *MAPPED):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)

    # As `glac build --shipped` leaves them, but with made-up kernels.
    shipped = fake_pack(source / "glac" / "packs" / "sm_90a.zip")

    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    build = ["wheel", *offline, "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("glac-*.whl")
    install = ["install", *offline, "--target", str(installed), str(wheel)]
    subprocess.run([*pip, *install], check=True, capture_output=True)

    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"glac", f"glac-{glac.__version__}.dist-info"}
    expected = {"glac/py.typed", "glac/packs/sm_90a.zip"}
    for package, folder in FOLDERS.items():
        inside = package.replace(".", "/")
        for pattern in ("*.py", "*.yaml"):
            copied = (source / folder.relative_to(ROOT)).glob(pattern)
            expected |= {f"{inside}/{path.name}" for path in copied}
    assert expected <= names

    read = run_python(READ_INSTALLED, str(installed), cwd=tmp_path, PYTHONPATH=str(installed))
    configs = {line.split()[0]: int(line.split()[1]) for line in read.splitlines()}
    present = {path.name for path in (source / "tuned_configs").glob("*.yaml")}
    assert set(configs) == present
    assert all(length > 0 for length in configs.values())
    served = run_python(SERVED_INSTALLED, str(installed), cwd=tmp_path, PYTHONPATH=str(installed))
    assert served.split() == ["sm_90a.zip", "sm_90a", str(len(shipped.kernels))]

    # The source distribution carries them as well, so a wheel made from it does.
    sdist = "from setuptools.build_meta import build_sdist; import sys; build_sdist(sys.argv[1])"
    run_python(sdist, str(tmp_path), cwd=source)
    (archive,) = tmp_path.glob("glac-*.tar.gz")
    with tarfile.open(archive) as files:
        assert f"glac-{glac.__version__}/glac/packs/sm_90a.zip" in files.getnames()
