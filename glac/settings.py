"""Everything glac reads from the environment, and nothing else does.

| variable         | meaning                                                         | default    |
|------------------|-----------------------------------------------------------------|------------|
| GLAC_REQUIRE_AOT | 1: a problem that no pack serves is an error, nothing is built  | 0          |
| GLAC_PACK_PATH   | packs, or folders with packs, searched first                    | empty      |
| GLAC_CACHE_DIR   | where ``glac build`` and build-on-miss put packs                | user cache |
| GLAC_CONFIG_PATH | folders with tuned files that count before those that came      | ~/.config  |
| GLAC_CHECKED     | 1: check gate values on every call (synchronises the device)    | 0          |
| GLAC_SCRATCH_MIB | memory for states that the backward pass keeps at a time        | 80         |
"""

from __future__ import annotations

import os
from collections.abc import Container
from pathlib import Path

from glac.errors import ConfigError
from glac.record import dataclass


def _flag(name: str) -> bool:
    raw = os.environ.get(name, "").strip().lower()
    if raw in ("", "0", "false", "no", "off"):
        return False
    if raw in ("1", "true", "yes", "on"):
        return True
    raise ConfigError(f"{name} must be 0 or 1, got {raw!r}", hint=f"export {name}=1, or unset it")


def _cache_dir() -> Path:
    raw = os.environ.get("GLAC_CACHE_DIR")
    if raw:
        return Path(raw).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "glac"


# CPython keeps the environment encoded in this dict; looking there takes 0.05 us instead of 0.7.
_present: Container[object] = getattr(os.environ, "_data", os.environ)
_CHECKED, _REQUIRE_AOT = (
    name if _present is os.environ else os.environ.encodekey(name)
    for name in ("GLAC_CHECKED", "GLAC_REQUIRE_AOT")
)


def _config_path() -> tuple[Path, ...]:
    raw = os.environ.get("GLAC_CONFIG_PATH")
    if raw is not None:
        return tuple(Path(p).expanduser() for p in raw.split(os.pathsep) if p)
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return (Path(base) / "glac" / "tuned",)


def checked_mode() -> bool:
    """Whether ``GLAC_CHECKED`` is on. The one variable that every call reads."""
    return _CHECKED in _present and _flag("GLAC_CHECKED")


def require_aot() -> bool:
    """Whether ``GLAC_REQUIRE_AOT`` is on. Read by every call whose gradients are wanted."""
    return _REQUIRE_AOT in _present and _flag("GLAC_REQUIRE_AOT")


DEFAULT_SCRATCH_BYTES = 80 << 20


def scratch_bytes() -> int:
    """``GLAC_SCRATCH_MIB`` in bytes: of states that a backward pass keeps all at once.

    Raises:
        ConfigError: it is no whole number of at least 0.
    """
    raw = os.environ.get("GLAC_SCRATCH_MIB", "").strip()
    if not raw:
        return DEFAULT_SCRATCH_BYTES
    if not (raw.isascii() and raw.isdigit()) or len(raw) > 9:
        raise ConfigError(
            f"GLAC_SCRATCH_MIB must be a whole number of MiB, got {raw!r}",
            hint="export GLAC_SCRATCH_MIB=80, or unset it",
        )
    return int(raw) << 20


@dataclass(frozen=True)
class Settings:
    """A snapshot of the environment; see the module docstring for each field's variable."""

    require_aot: bool
    pack_path: tuple[Path, ...]
    cache_dir: Path
    checked: bool
    config_path: tuple[Path, ...] = ()

    @property
    def build_dir(self) -> Path:
        """Where ``glac build`` writes by default; searched after ``pack_path``."""
        return self.cache_dir / "packs"

    @property
    def miss_dir(self) -> Path:
        """Where kernels built on a miss are kept."""
        return self.cache_dir / "on-miss"


def shipped_pack_dir() -> Path:
    """Packs inside the installed package; ``glac build --shipped`` makes them."""
    return Path(__file__).parent / "packs"


def load_settings() -> Settings:
    """Read the environment.

    Raises:
        ConfigError: a variable has a value that means nothing.
    """
    raw = os.environ.get("GLAC_PACK_PATH", "")
    paths = tuple(Path(p).expanduser() for p in raw.split(os.pathsep) if p)
    return Settings(
        _flag("GLAC_REQUIRE_AOT"), paths, _cache_dir(), _flag("GLAC_CHECKED"), _config_path()
    )
