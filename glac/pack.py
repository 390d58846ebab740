"""Kernel packs: machine code and everything needed to launch it, without Triton or a compiler.

A pack is a folder, or a zip of one::

    manifest.json             what there is: kernels, their ABI, and which problem gets which
    cubins/<sha256>.cubin     machine code, named by its content

One pack serves one arch. Its bytes depend on templates, rows and toolchain alone, not on date,
checkout or number of compile jobs. ``read_pack`` takes nothing on trust: every field is checked,
each row's kernels are derived again and compared, and the manifest carries its own hash. A pack
that fails a check is refused as a whole. ``open_pack`` checks the hash, the rest as it is used.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from glac import __version__
from glac.archive import CUBINS, MANIFEST, REBUILD, is_zip, members, read_member, zip_bytes
from glac.atomic import sync_folder, write_bytes
from glac.configs import Config, config_from_dict, why_illegal
from glac.errors import ConfigError, PackError
from glac.gpus import ARCHS, GPUS
from glac.kernelspec import KernelSpec, config_kernels
from glac.problem import Bucket, Op, Specialisation
from glac.record import dataclass
from glac.templates import (
    TEMPLATES,
    active_args,
    pointer_type,
    template_ops,
    templates_sha256,
    tiles,
    unused_args,
)

if TYPE_CHECKING:
    from glac.compile import CompiledKernel, Toolchain

FORMAT = 2
SOURCES = ("tuned", "heuristic")
_OPS = tuple(op.value for op in Op)
MAX_MANIFEST = 64 << 20
"""Bytes of a manifest that are read; those of the shipped packs have a hundredth."""
MAX_CUBIN = 64 << 20
ELSEWHERE = "choose another place: glac build --out, or OUT of glac pack merge"

_TOP_KEYS = frozenset(
    {
        "format",
        "glac",
        "arch",
        "driver_floor",
        "toolchain",
        "templates_sha256",
        "kernels",
        "rows",
        "sha256",
    }
)
_HEX64 = re.compile(r"[0-9a-f]{64}")
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INT32_MAX = 2**31 - 1
# Sizes are below 2**62, and their logarithms are rounded.
_MAX_BUCKET = 62
_MAX_DRIVER = 99999


@dataclass(frozen=True)
class PackedKernel:
    """One kernel of a pack: how to launch it, and which cubin holds it.

    Attributes:
        name: ``kernel.name``, the key in the manifest.
        kernel: what was compiled.
        symbol: entry point in the cubin.
        args: name and type (``*bf16``, ``fp32``, ``i32``) of the run-time arguments, in order.
        tiles: compile-time factor of the grid.
        grid: names of the run-time factors of the grid.
        num_warps: warps per program.
        shared: dynamic shared memory, bytes.
        registers: per thread.
        spill_bytes: stored to local memory because registers ran out.
        scratch_bytes: global scratch per program.
        sha256: of the cubin, in hex.
        size: of the cubin, bytes.
    """

    name: str
    kernel: KernelSpec
    symbol: str
    args: tuple[tuple[str, str], ...]
    tiles: int
    grid: tuple[str, ...]
    num_warps: int
    shared: int
    registers: int
    spill_bytes: int
    scratch_bytes: int
    sha256: str
    size: int

    def to_dict(self) -> dict[str, Any]:
        """The manifest entry, without the name."""
        return {
            "kernel": self.kernel.to_dict(),
            "symbol": self.symbol,
            "args": [list(pair) for pair in self.args],
            "tiles": self.tiles,
            "grid": list(self.grid),
            "num_warps": self.num_warps,
            "shared": self.shared,
            "registers": self.registers,
            "spill_bytes": self.spill_bytes,
            "scratch_bytes": self.scratch_bytes,
            "sha256": self.sha256,
            "size": self.size,
        }


@dataclass(frozen=True)
class PackRow:
    """Which config, and so which kernels, one GPU uses for an op near a bucket.

    Attributes:
        gpu: a key of ``glac.gpus.GPUS``.
        source: ``tuned`` by a study on this GPU, or ``heuristic``.
        measured_on: title of the device whose timings chose the config, empty if none did.
        spec: the specialisation served.
        bucket: the sizes the config was chosen for.
        config: how the problem runs.
        kernels: template to kernel name, in launch order.
    """

    gpu: str
    source: str
    measured_on: str
    spec: Specialisation
    bucket: Bucket
    config: Config
    kernels: Mapping[str, str]

    @property
    def op(self) -> Op:
        """What the row serves; its config says so."""
        return self.config.op

    @classmethod
    def make(
        cls,
        gpu: str,
        source: str,
        measured_on: str,
        spec: Specialisation,
        bucket: Bucket,
        config: Config,
    ) -> PackRow:
        """A row whose kernel names follow from the other fields."""
        kernels = config_kernels(spec, config, GPUS[gpu].arch)
        names = {kernel.template: kernel.name for kernel in kernels}
        return cls(gpu, source, measured_on, spec, bucket, config, names)

    def to_dict(self) -> dict[str, Any]:
        """The manifest entry."""
        return {
            "op": self.op.value,
            "gpu": self.gpu,
            "source": self.source,
            "measured_on": self.measured_on,
            "spec": self.spec.to_dict(),
            "bucket": self.bucket.to_dict(),
            "config": self.config.to_dict(),
            "kernels": dict(self.kernels),
        }


@dataclass(frozen=True)
class Pack:
    """A checked manifest. Cubins are read, and checked, when they are asked for.

    Attributes:
        path: folder or zip.
        arch: code target of every kernel.
        driver_floor: oldest driver branch that loads the cubins.
        toolchain: versions of ``triton`` and ``ptxas``.
        templates_sha256: of the kernel sources, for each op that has kernels here.
        kernels: by name.
        rows: which problem gets which kernels.
        glac: version that wrote the pack.
    """

    path: Path
    arch: str
    driver_floor: int
    toolchain: Mapping[str, str]
    templates_sha256: Mapping[Op, str]
    kernels: Mapping[str, PackedKernel]
    rows: Sequence[PackRow]
    glac: str = __version__

    def rows_of(self, op: Op, spec: Specialisation) -> list[PackRow]:
        """The rows that serve ``op`` of ``spec``.

        Raises:
            PackError: the pack was opened and not read, and one of them fails its checks.
        """
        if isinstance(self.rows, _Rows):
            return self.rows.of(op, spec)
        return [row for row in self.rows if row.op is op and row.spec == spec]

    @property
    def code_bytes(self) -> int:
        """Size of the machine code; kernels with equal code share a file, which counts once."""
        return sum({kernel.sha256: kernel.size for kernel in self.kernels.values()}.values())

    def read_cubin(self, name: str) -> bytes:
        """The machine code of kernel ``name``.

        Raises:
            PackError: there is no such kernel, or its file is missing or not what was packed.
        """
        kernel = self.kernels.get(name)
        if kernel is None:
            raise PackError(f"{self.path}: no kernel {name!r} in this pack", hint=REBUILD)
        member = cubin_member(kernel.sha256)
        data = read_member(self.path, member, kernel.size)
        if len(data) != kernel.size:
            got = f"more than {kernel.size}" if len(data) > kernel.size else str(len(data))
            raise PackError(
                f"{self.path}: {member}: wanted {kernel.size} bytes, got {got} (kernel {name})",
                hint=REBUILD,
            )
        digest = hashlib.sha256(data).hexdigest()
        if digest != kernel.sha256:
            raise PackError(
                f"{self.path}: {member}: wanted SHA-256 {kernel.sha256}, got {digest} "
                f"(kernel {name})",
                hint=REBUILD,
            )
        return data


# An entry holds the fields of its class, the name of a kernel being its key.
_KERNEL_KEYS = frozenset(field.name for field in fields(PackedKernel)) - {"name"}
_ROW_KEYS = frozenset(field.name for field in fields(PackRow)) | {"op"}


def run_time_args(kernel: KernelSpec) -> tuple[tuple[str, str], ...]:
    """Names and types of a kernel's run-time arguments, in order."""
    unused = unused_args(kernel.template, kernel.config)
    return _run_time_args(kernel.template, kernel.spec, unused)


@functools.lru_cache(maxsize=256)  # many kernels of a pack share them
def _run_time_args(
    template: str, spec: Specialisation, unused: frozenset[str]
) -> tuple[tuple[str, str], ...]:
    return tuple(
        (arg.name, pointer_type(arg.kind, spec) if arg.is_pointer else arg.kind)
        for arg in active_args(template, spec, unused)
    )


def cubin_member(sha256: str) -> str:
    """Where in a pack the machine code with this hash lies."""
    return f"{CUBINS}/{sha256}.cubin"


def _full_text(value: object) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # integers of more digits than Python prints
        return f"a huge {type(value).__name__}"


def _shown(value: object) -> str:
    text = _full_text(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


_T = TypeVar("_T")


class _Checker:
    """Typed access to the fields of one manifest; every failure names pack and field."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parsed: dict[tuple[Callable[..., Any], str], Any] = {}
        self._kernels: dict[tuple[Specialisation, Config], list[KernelSpec]] = {}

    def parsed(self, parse: Callable[[Any, str], _T], value: Any, what: str) -> _T:
        """``parse(value, what)``, once for equal content: rows repeat few specs and configs."""
        # By its text, because 1, 1.0 and True are equal keys.
        key = (parse, _full_text(value))
        if key not in self._parsed:
            self._parsed[key] = parse(value, what)
        found: _T = self._parsed[key]
        return found

    def kernels(self, spec: Specialisation, config: Config, arch: str) -> list[KernelSpec]:
        """``config_kernels``, once where rows of several GPUs have the same config."""
        key = (spec, config)
        if key not in self._kernels:
            self._kernels[key] = config_kernels(spec, config, arch)
        return self._kernels[key]

    def fail(self, field: str, reason: str, hint: str = REBUILD) -> PackError:
        return PackError(f"{self.path}: {MANIFEST}: {field}: {reason}", hint=hint)

    def mapping(self, value: object, keys: frozenset[str] | None, field: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(field, f"wanted an object, got {_shown(value)}")
        if keys is not None and value.keys() != keys:
            unknown, missing = sorted(value.keys() - keys), sorted(keys - value.keys())
            raise self.fail(field, f"unknown keys {_shown(unknown)}, missing keys {missing}")
        return value

    def items(self, value: object, field: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.fail(field, f"wanted a list, got {_shown(value)}")
        return value

    def text(self, value: object, field: str, *, empty: bool = False) -> str:
        if not isinstance(value, str) or not (value or empty):
            raise self.fail(field, f"wanted a text, got {_shown(value)}")
        return value

    def one_of(self, value: object, choices: Iterable[str], field: str) -> str:
        choices = tuple(choices)
        if not isinstance(value, str) or value not in choices:
            raise self.fail(field, f"wanted one of {', '.join(choices)}; got {_shown(value)}")
        return value

    def matching(self, value: object, pattern: re.Pattern[str], what: str, field: str) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise self.fail(field, f"wanted {what}, got {_shown(value)}")
        return value

    def integer(self, value: object, low: int, high: int, field: str) -> int:
        # bool is an int to isinstance.
        if type(value) is not int or not low <= value <= high:
            raise self.fail(field, f"wanted an integer in {low}..{high}, got {_shown(value)}")
        return value

    def abi(self, value: object, wanted: object, field: str) -> None:
        # 1 == 1.0 == True in Python, hence the types.
        if type(value) is not type(wanted) or value != wanted:
            raise self.fail(
                field,
                f"made for another glac version: wanted {_shown(wanted)}, got {_shown(value)}",
                hint="rebuild it with this version: glac build",
            )


def _check_kernel(
    check: _Checker, name: str, value: object, arch: str, shared_limit: int
) -> PackedKernel:
    field = f"kernels[{_shown(name)}]"
    data = check.mapping(value, _KERNEL_KEYS, field)
    try:
        kernel = KernelSpec.from_dict(data["kernel"], "kernel")
    except ConfigError as error:
        raise check.fail(field, error.message) from None
    if kernel.arch != arch:
        raise check.fail(f"{field}.kernel.arch", f"wanted {arch}, got {kernel.arch}")
    if kernel.name != name:
        raise check.fail(field, f"its content is that of {kernel.name}")
    args = run_time_args(kernel)
    grid = TEMPLATES[kernel.template].grid
    check.abi(data["args"], [list(pair) for pair in args], f"{field}.args")
    check.abi(data["grid"], list(grid), f"{field}.grid")
    blocks = tiles(kernel.template, kernel.spec, kernel.config)
    check.abi(data["tiles"], blocks, f"{field}.tiles")
    check.abi(data["num_warps"], kernel.config.num_warps, f"{field}.num_warps")
    return PackedKernel(
        name=name,
        kernel=kernel,
        symbol=check.matching(data["symbol"], _SYMBOL, "an identifier", f"{field}.symbol"),
        args=args,
        tiles=blocks,
        grid=grid,
        num_warps=kernel.config.num_warps,
        shared=check.integer(data["shared"], 0, shared_limit, f"{field}.shared"),
        registers=check.integer(data["registers"], 1, 255, f"{field}.registers"),
        spill_bytes=check.integer(data["spill_bytes"], 0, _INT32_MAX, f"{field}.spill_bytes"),
        scratch_bytes=check.integer(
            data["scratch_bytes"], 0, _INT32_MAX, f"{field}.scratch_bytes"
        ),
        sha256=check.matching(data["sha256"], _HEX64, "64 hex digits", f"{field}.sha256"),
        size=check.integer(data["size"], 1, MAX_CUBIN, f"{field}.size"),
    )


@functools.cache
def _config_parser(op: Op) -> Callable[[Any, str], Config]:
    """One for each op, as ``_Checker.parsed`` remembers by it."""
    return functools.partial(config_from_dict, op)


def _check_row(
    check: _Checker, index: int, value: object, arch: str, kernels: Mapping[str, PackedKernel]
) -> PackRow:
    field = f"rows[{index}]"
    data = check.mapping(value, _ROW_KEYS, field)
    op = Op(check.one_of(data["op"], _OPS, f"{field}.op"))
    gpu = check.one_of(data["gpu"], GPUS, f"{field}.gpu")
    if GPUS[gpu].arch != arch:
        raise check.fail(f"{field}.gpu", f"{gpu} runs {GPUS[gpu].arch}, this pack is {arch}")
    try:
        spec = check.parsed(Specialisation.from_dict, data["spec"], "spec")
        bucket = check.parsed(Bucket.from_dict, data["bucket"], "bucket")
        config = check.parsed(_config_parser(op), data["config"], "config")
    except ConfigError as error:
        raise check.fail(field, error.message) from None
    check.integer(bucket.bh, 0, _MAX_BUCKET, f"{field}.bucket.bh")
    check.integer(bucket.t, 0, _MAX_BUCKET, f"{field}.bucket.t")
    # The segment length is no part of any kernel, and a wrong one gives wrong results.
    reason = why_illegal(spec, config, GPUS[gpu])
    if reason:
        raise check.fail(f"{field}.config", reason)
    wanted = check.kernels(spec, config, arch)
    named = check.mapping(
        data["kernels"], frozenset(kernel.template for kernel in wanted), f"{field}.kernels"
    )
    names = {}
    for kernel in wanted:
        name = named[kernel.template]
        packed = kernels.get(name) if isinstance(name, str) else None
        if packed is None:
            raise check.fail(f"{field}.kernels.{kernel.template}", f"no kernel {_shown(name)}")
        if packed.kernel != kernel:
            raise check.fail(
                f"{field}.kernels.{kernel.template}", f"wanted {kernel.name}, got {name}"
            )
        if packed.shared > GPUS[gpu].shared_per_block:
            raise check.fail(
                f"{field}.kernels.{kernel.template}",
                f"needs {packed.shared} bytes of shared memory, {gpu} has "
                f"{GPUS[gpu].shared_per_block}",
            )
        names[kernel.template] = packed.name
    return PackRow(
        gpu=gpu,
        source=check.one_of(data["source"], SOURCES, f"{field}.source"),
        measured_on=check.text(data["measured_on"], f"{field}.measured_on", empty=True),
        spec=spec,
        bucket=bucket,
        config=config,
        kernels=names,
    )


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """Hash of what a manifest says, whatever its white space, without its own ``sha256``."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    # Compact because json's C encoder cannot indent: 20 times faster.
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def ops_of(kernels: Iterable[KernelSpec]) -> list[Op]:
    """The ops that kernels were compiled for; one that serves several goes with the others."""
    served = [template_ops(kernel.template) for kernel in kernels]
    alone = {ops[0] for ops in served if len(ops) == 1}
    found = alone or {op for ops in served for op in ops}
    return sorted(found, key=lambda op: op.order)


def _check_format(check: _Checker, value: object) -> dict[str, Any]:
    """The manifest of a format that is read here, with all its keys."""
    version = check.mapping(value, None, "manifest").get("format")
    if type(version) is int and version > FORMAT:
        raise check.fail(
            "format",
            f"version {_shown(version)} is newer than this glac reads ({FORMAT})",
            hint="upgrade glac, or rebuild the pack with this one: glac build",
        )
    if type(version) is int and version < FORMAT:
        raise check.fail(
            "format", f"version {_shown(version)} is older than this glac reads ({FORMAT})"
        )
    check.integer(version, FORMAT, FORMAT, "format")
    return check.mapping(value, _TOP_KEYS, "manifest")


def _check_pack(
    check: _Checker,
    data: dict[str, Any],
    ops: Sequence[Op],
    kernels: Mapping[str, PackedKernel],
    rows: Sequence[PackRow],
) -> Pack:
    """The pack, its other fields checked."""
    tools = check.mapping(data["toolchain"], frozenset({"triton", "ptxas"}), "toolchain")
    hashes = check.mapping(
        data["templates_sha256"], frozenset(op.value for op in ops), "templates_sha256"
    )
    return Pack(
        path=check.path,
        arch=check.one_of(data["arch"], ARCHS, "arch"),
        driver_floor=check.integer(data["driver_floor"], 1, _MAX_DRIVER, "driver_floor"),
        toolchain={key: check.text(tools[key], f"toolchain.{key}") for key in sorted(tools)},
        templates_sha256={
            op: check.matching(hashes[op], _HEX64, "64 hex digits", f"templates_sha256.{op.value}")
            for op in ops
        },
        kernels=kernels,
        rows=rows,
        glac=check.text(data["glac"], "glac"),
    )


def _shared_limit(arch: str) -> int:
    return max(gpu.shared_per_block for gpu in GPUS.values() if gpu.arch == arch)


def _check_manifest(path: Path, value: object) -> Pack:
    check = _Checker(path)
    data = _check_format(check, value)
    arch = check.one_of(data["arch"], ARCHS, "arch")
    limit = _shared_limit(arch)
    kernels = {
        name: _check_kernel(check, name, entry, arch, limit)
        for name, entry in check.mapping(data["kernels"], None, "kernels").items()
    }
    rows = tuple(
        _check_row(check, index, entry, arch, kernels)
        for index, entry in enumerate(check.items(data["rows"], "rows"))
    )
    seen: dict[tuple[str, Op, Specialisation, Bucket], int] = {}
    for index, row in enumerate(rows):
        first = seen.setdefault((row.gpu, row.op, row.spec, row.bucket), index)
        if first != index:
            raise check.fail(f"rows[{index}]", f"same GPU, op, spec and bucket as rows[{first}]")
    ops = ops_of(packed.kernel for packed in kernels.values())
    pack = _check_pack(check, data, ops, kernels, rows)
    # Last, so that a message about one field comes first. This catches the edits that leave every
    # field plausible, such as another bucket or another segment length.
    wanted = check.matching(data["sha256"], _HEX64, "64 hex digits", "sha256")
    got = manifest_sha256(data)
    if got != wanted:
        raise check.fail(
            "sha256", f"the manifest was changed after it was written: wanted {wanted}, got {got}"
        )
    return pack


class _Kernels(Mapping[str, PackedKernel]):
    """Kernels of a manifest, each checked when it is looked at."""

    def __init__(self, check: _Checker, data: dict[str, Any], arch: str) -> None:
        self._check, self._data, self._arch = check, data, arch
        self._limit = _shared_limit(arch)
        self._checked: dict[str, PackedKernel] = {}

    def __getitem__(self, name: str) -> PackedKernel:
        if name not in self._checked:
            entry = self._data[name]
            kernel = _check_kernel(self._check, name, entry, self._arch, self._limit)
            self._checked[name] = kernel
        return self._checked[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)


class _Rows(Sequence[PackRow]):
    """Rows of a manifest, each checked when it is looked at."""

    def __init__(self, check: _Checker, data: list[Any], arch: str, kernels: _Kernels) -> None:
        self._check, self._data, self._arch, self._kernels = check, data, arch, kernels
        self._checked: dict[int, PackRow] = {}

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        index = range(len(self._data))[index]
        if index not in self._checked:
            entry = self._data[index]
            self._checked[index] = _check_row(self._check, index, entry, self._arch, self._kernels)
        return self._checked[index]

    def __len__(self) -> int:
        return len(self._data)

    def of(self, op: Op, spec: Specialisation) -> list[PackRow]:
        """Those that serve ``op`` of ``spec``; no other is looked at."""
        wanted = {"op": op.value, "spec": spec.to_dict()}
        return [
            self[index]
            for index, entry in enumerate(self._data)
            if isinstance(entry, dict) and {key: entry.get(key) for key in wanted} == wanted
        ]


def _manifest(path: Path) -> Any:
    """What the manifest of a pack says, unchecked."""
    raw = read_member(path, MANIFEST, MAX_MANIFEST)
    if len(raw) > MAX_MANIFEST:
        raise PackError(
            f"{path}: {MANIFEST}: wanted at most {MAX_MANIFEST} bytes, got more", hint=REBUILD
        )
    try:
        return json.loads(raw.decode())
    except json.JSONDecodeError as error:
        raise PackError(
            f"{path}: {MANIFEST}: line {error.lineno}, column {error.colno}: not JSON "
            f"({error.msg})",
            hint=REBUILD,
        ) from None
    except (ValueError, RecursionError) as error:
        raise PackError(f"{path}: {MANIFEST}: not JSON ({error})", hint=REBUILD) from None


def read_pack(path: Path | str) -> Pack:
    """Read and check the manifest of a pack, a folder or a zip.

    Raises:
        PackError: the pack is missing, broken, foreign, or of a newer format; names pack and
            field.
    """
    path = Path(path)
    return _check_manifest(path, _manifest(path))


def open_pack(path: Path | str) -> Pack:
    """``read_pack`` that checks a row and its kernels when they are first looked at.

    The manifest's own hash, which is checked now, says that it is as it was written; so what
    remains to be found is a pack of another version of glac, or one that something else wrote.
    A first call needs a few rows of hundreds, whose checks take most of its time.

    Raises:
        PackError: as ``read_pack``; looking at a row or a kernel raises it, too.
    """
    path = Path(path)
    value = _manifest(path)
    check = _Checker(path)
    data = _check_format(check, value)
    if manifest_sha256(data) != data["sha256"]:
        return _check_manifest(path, value)  # which says what is wrong
    arch = check.one_of(data["arch"], ARCHS, "arch")
    named = check.mapping(data["templates_sha256"], None, "templates_sha256")
    ops = [Op(check.one_of(op, _OPS, "templates_sha256")) for op in named]
    kernels = _Kernels(check, check.mapping(data["kernels"], None, "kernels"), arch)
    rows = _Rows(check, check.items(data["rows"], "rows"), arch, kernels)
    return _check_pack(check, data, ops, kernels, rows)


def _packed(built: CompiledKernel) -> PackedKernel:
    kernel = built.kernel
    return PackedKernel(
        name=kernel.name,
        kernel=kernel,
        symbol=built.symbol,
        args=run_time_args(kernel),
        tiles=tiles(kernel.template, kernel.spec, kernel.config),
        grid=TEMPLATES[kernel.template].grid,
        num_warps=built.num_warps,
        shared=built.shared,
        registers=built.registers,
        spill_bytes=built.spill_bytes,
        scratch_bytes=built.scratch_bytes,
        sha256=built.sha256,
        size=len(built.cubin),
    )


_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
"""How a rename fails where another process has put its pack in between."""


def _swap_in(new: Path, path: Path) -> None:
    """Put folder ``new`` where ``path`` is; a reader sees the old pack, none, or the new one."""
    # Two steps, as a rename replaces no full folder. Whenever a process has to try again, another
    # has succeeded, so this ends; the bound is there for file systems with odd errors.
    for attempt in range(1000):
        old = path.with_name(f".{path.name}.{secrets.token_hex(8)}.old")
        with contextlib.suppress(FileNotFoundError):
            path.rename(old)
        try:
            new.rename(path)
        except OSError as error:
            if error.errno in _TAKEN and attempt < 999:
                _remove(old)
                continue
            # The old pack comes back, unless there is another one by now.
            with contextlib.suppress(OSError):
                old.rename(path)
            if path.exists():
                _remove(old)
            raise
        _remove(old)
        break
    sync_folder(path.parent)


def _remove(pack: Path) -> None:
    """A pack folder, or the link to one; nothing is fine too."""
    if pack.is_symlink():
        pack.unlink()
    else:
        shutil.rmtree(pack, ignore_errors=True)


def write_pack(
    path: Path | str,
    arch: str,
    compiled: Iterable[CompiledKernel],
    rows: Iterable[PackRow],
    tools: Toolchain,
) -> Pack:
    """Write a pack at ``path``, in place of the pack that may be there.

    Args:
        path: of the folder, or of the zip if it ends in ``.zip``; parents are made.
        arch: code target of all kernels.
        compiled: the kernels, in any order.
        rows: which problem gets which; every kernel they name must be among ``compiled``.
        tools: what compiled them.

    Returns:
        The pack, as ``read_pack`` would return it.

    Raises:
        PackError: the content is inconsistent, or ``path`` holds something that is no pack or
            cannot be written.
    """
    built = {item.kernel.name: item for item in compiled}
    return write_parts(
        Path(path),
        arch=arch,
        driver_floor=tools.driver_floor,
        toolchain=tools.to_dict(),
        templates=templates_sha256(ops_of(item.kernel for item in built.values())),
        kernels=[_packed(item) for item in built.values()],
        rows=rows,
        cubins={item.sha256: item.cubin for item in built.values()},
    )


def _sorted_rows(rows: Iterable[PackRow]) -> list[PackRow]:
    return sorted(rows, key=lambda row: (row.gpu, row.op.order, row.spec, row.bucket))


def same_rows(rows: Iterable[PackRow], others: Iterable[PackRow]) -> bool:
    """Whether packs of these rows, in any order, would have the same rows."""
    return _sorted_rows(rows) == _sorted_rows(others)


def write_parts(
    path: Path,
    *,
    arch: str,
    driver_floor: int,
    toolchain: Mapping[str, str],
    templates: Mapping[Op, str],
    kernels: Iterable[PackedKernel],
    rows: Iterable[PackRow],
    cubins: Mapping[str, bytes],
) -> Pack:
    """Write a pack, folder or zip, from its parts, in place of the pack that may be there.

    ``cubins`` is machine code by its SHA-256; the rest is as in ``Pack``. What was written is read
    back and checked before it takes its place.

    Raises:
        PackError: as for ``write_pack``.
    """
    rows = _sorted_rows(rows)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "glac": __version__,
        "arch": arch,
        "driver_floor": driver_floor,
        "toolchain": dict(toolchain),
        "templates_sha256": {op.value: sha for op, sha in templates.items()},
        "kernels": {kernel.name: kernel.to_dict() for kernel in kernels},
        "rows": [row.to_dict() for row in rows],
    }
    manifest["sha256"] = manifest_sha256(manifest)
    # The reader's checks, before anything is written.
    pack = _check_manifest(path, manifest)
    if not _replaceable(path):
        raise PackError(
            f"{path}: exists and is not a kernel pack; it was left as it is",
            hint=ELSEWHERE,
        )
    text = json.dumps(manifest, sort_keys=True, indent=1) + "\n"
    files = {cubin_member(digest): cubin for digest, cubin in cubins.items()}
    files[MANIFEST] = text.encode()
    ending = f".{secrets.token_hex(8)}.tmp"
    # A zip is known by its ending.
    temporary = path.with_name(f".{path.name}{ending}{'.zip' if is_zip(path) else ''}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_zip(path):
            write_bytes(temporary, zip_bytes(files))
        else:
            (temporary / CUBINS).mkdir(parents=True)
            for name, data in files.items():
                write_bytes(temporary / name, data)
        written = read_pack(temporary)
        for name in written.kernels:
            written.read_cubin(name)
        if is_zip(path):
            temporary.replace(path)
            sync_folder(path.parent)
        else:
            _swap_in(temporary, path)
    except OSError as error:
        raise PackError(f"{path}: cannot be written ({error})", hint=ELSEWHERE) from None
    finally:
        if is_zip(path):
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        else:
            shutil.rmtree(temporary, ignore_errors=True)
    return pack


def _replaceable(path: Path) -> bool:
    """Whether nothing is at ``path``, or a pack of the form that is to be written there."""
    if is_zip(path):
        if not path.exists():
            return not path.is_symlink()
        # By what it lists, as a damaged pack or one of another format may be replaced.
        try:
            return MANIFEST in members(path)
        except PackError:
            return False
    while True:
        try:
            before = path.stat()
            names = {item.name for item in path.iterdir()}
            after = path.stat()
        except FileNotFoundError:
            return not path.is_symlink()
        except NotADirectoryError:
            return not os.path.lexists(path)  # a file is there, or is its parent
        if MANIFEST in names or not names:
            return True
        # Of a folder that another process has just replaced, the listing says nothing.
        if (before.st_ino, before.st_ctime_ns) == (after.st_ino, after.st_ctime_ns):
            return False
