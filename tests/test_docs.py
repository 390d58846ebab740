"""The pages follow the code: links lead somewhere, no variable and no command is missing."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from glac import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every command as it is typed, such as ``glac pack show``."""
    context = click.Context(cli.cli, info_name="glac")
    names = []
    for name in cli.cli.list_commands(context):
        inner = None if name in cli.LAZY_COMMANDS else cli.cli.get_command(context, name)
        if isinstance(inner, click.Group):
            names += [f"glac {name} {child}" for child in inner.list_commands(context)]
        else:
            names.append(f"glac {name}")
    return names


def anchors(page: Path) -> set[str]:
    """Heading anchors of a page, as they are made on the web."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert broken == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"({name})" not in index} == set()


def test_environment_page_and_settings_name_the_same_variables() -> None:
    settings = (ROOT / "glac" / "settings.py").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    names = set(re.findall(r"GLAC_[A-Z_]+", settings))
    assert names
    assert set(re.findall(r"GLAC_[A-Z_]+", page)) == names


def test_command_page_lists_every_command() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [name for name in commands() if name not in page] == []


def test_command_page_lists_every_exit_and_error_code() -> None:
    from glac import errors

    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    classes = [item for item in vars(errors).values() if isinstance(item, type)]
    # A command is not given tensors, so the operations' own errors cannot come out of one.
    of_operations = {"error", "input", "input-type", "not-differentiable"}
    codes = {kind.code for kind in classes if issubclass(kind, errors.GlacError)} - of_operations
    assert [code for code in codes if f"`{code}`" not in page] == []


def test_readme_starts_with_the_two_commands() -> None:
    first = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:12]
    assert any(line.startswith("make quickstart") for line in first)
    assert any(line.startswith("make test") for line in first)


def test_python_in_the_readme_runs() -> None:
    torch = pytest.importorskip("torch")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        names: dict[str, object] = {}
        exec(block, names)
        o = names["o"]
        assert isinstance(o, torch.Tensor)
        assert bool(torch.isfinite(o).all())
