"""The header and the source of a pack, put together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from glac import __version__
from glac.atomic import write_text
from glac.backward import PACKED_SEGMENT, PROGRAMS, WINDOWS
from glac.configs import MAX_SEGMENTS
from glac.emit_c.backward import BACKWARD, KEEP_BYTES
from glac.emit_c.decode import DECODE
from glac.emit_c.forward import FORWARD
from glac.emit_c.frame import HEADER, ROWS, SOURCE, TABLE
from glac.emit_c.functions import Function, functions_of, prefix_of
from glac.emit_c.launches import MAX_TOKEN_STRIDE, MAX_TOKENS, Kernels
from glac.emit_c.part import Part
from glac.emit_c.passes import HELPERS
from glac.errors import GlacError, PackError
from glac.fit import oldest_cuda
from glac.gate import LOG2E, STEP_MIN
from glac.pack import Pack, PackedKernel

_PARTS = (FORWARD, BACKWARD, DECODE)


def write_c(pack: Pack, folder: Path) -> list[Path]:
    """Write ``glac_<arch>.h`` and ``glac_<arch>.c`` for the rows of a pack.

    ``left_out`` tells which rows are not among them.

    Returns:
        Both paths.

    Raises:
        GlacError: the pack has no row that can be written, or a kernel takes an argument that has
            no meaning in C.
        PackError: the machine code is damaged, or the folder cannot be written.
    """
    header, source = c_sources(pack)
    stem = f"glac_{pack.arch}"
    paths = [folder / f"{stem}.h", folder / f"{stem}.c"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in zip(paths, (header, source), strict=True):
            write_text(path, text)
    except OSError as error:
        raise PackError(
            f"{folder}: cannot be written ({error})", hint="choose another folder: --out"
        ) from None
    return paths


def c_sources(pack: Pack) -> tuple[str, str]:
    """The header and the source, the same text for the same pack wherever it lies.

    Raises:
        GlacError: as for ``write_c``.
        PackError: the machine code is damaged.
    """
    functions = functions_of(pack)
    if not functions:
        raise GlacError(
            f"{pack.path}: no row that can be launched from C, so there is nothing to write",
            hint="build for a GPU that has some: glac build --gpu h100 --emit c",
        )
    kernels = Kernels(pack, functions)
    capability = pack.arch.removeprefix("sm_").removesuffix("a")
    prefix = prefix_of(pack)
    fields = {
        "PREFIX": prefix,
        "UPPER": prefix.upper(),
        "ARCH": pack.arch,
        "VERSION": __version__,
        "TOOLS": ", ".join(f"{tool} {version}" for tool, version in pack.toolchain.items()),
        "KERNELS": str(len(kernels.listed)),
        "COUNT": str(sum(len(item.rows) for item in functions)),
        "FLOOR": str(pack.driver_floor),
        "CUDA": "{}.{}".format(*oldest_cuda(pack.driver_floor)),
        "CUDA_NUMBER": "{}{:02}0".format(*oldest_cuda(pack.driver_floor)),
        "MAJOR": capability[:-1],
        "MINOR": capability[-1],
        "EXACT": "1" if pack.arch.endswith("a") else "0",
        "MAX_SEGMENTS": str(MAX_SEGMENTS),
        "MAX_TOKENS": str(MAX_TOKENS),
        "MAX_TOKEN_STRIDE": str(MAX_TOKEN_STRIDE),
        "KEEP_BYTES": str(KEEP_BYTES),
        "WINDOWS": str(WINDOWS),
        "PROGRAMS": str(PROGRAMS),
        "PACKED_SEGMENT": str(PACKED_SEGMENT),
        "STEP_MIN": repr(STEP_MIN),
        "LOG2E": repr(LOG2E),
    }
    # What only one kind of call needs is written only where there are rows of it.
    calls, tables, rows = "", "", ""
    helpers = dict(HELPERS)
    for part in _PARTS:
        items = [item for item in functions if isinstance(item.config, part.serves)]
        if items:
            calls += part.call_text
            tables += _table(part, items)
            rows += _rows(part, items, kernels)
            helpers.update(part.helpers)
    header = _filled(HEADER, {"CALLS": calls, "TABLES": tables, **fields})
    places = enumerate(kernels.listed.values())
    code = {
        "CODE": "\n".join(_cubins(pack, kernels.listed)),
        "KERNEL_LIST": "\n".join(_kernel_entry(kernel, place) for place, kernel in places),
    }
    source = _filled(SOURCE + _called(helpers, rows) + rows, {**fields, **code})
    return header, source


def _filled(text: str, fields: Mapping[str, str]) -> str:
    for name, value in fields.items():
        text = text.replace(f"@{name}@", value)
    return text


def _table(part: Part, items: Iterable[Function]) -> str:
    """What the header says of rows."""
    fields = {
        "ROW": part.row,
        "ABOUT_ROW": part.about_row,
        "ROW_FIELDS": part.row_fields,
        "ABOUT_FUNCTIONS": part.about_functions,
        "DECLARATIONS": "\n\n".join(map(part.declaration, items)),
    }
    return _filled(TABLE, fields)


def _rows(part: Part, items: Iterable[Function], kernels: Kernels) -> str:
    """Functions and the rows that name them."""
    lines = [line for item in items for line in part.define(item, kernels)]
    entries = [part.entry(item, row) for item in items for row in item.rows]
    fields = {"ROW": part.row, "FUNCTIONS": "\n".join(lines), "ENTRIES": "\n".join(entries)}
    return _filled(ROWS, fields)


def _called(helpers: Mapping[str, str], code: str) -> str:
    """The helpers that ``code`` or another of them calls; of others a C compiler warns."""
    text = ""
    for name in reversed(list(helpers)):
        if re.search(rf"\b{name}\(", text + code):
            text = helpers[name] + text
    return text


def _cubins(pack: Pack, kernels: Mapping[str, PackedKernel]) -> Iterable[str]:
    """Machine code as little-endian 64-bit words, each code once."""
    seen: dict[str, str] = {}
    for name, kernel in kernels.items():
        seen.setdefault(kernel.sha256, name)
    for sha256, name in seen.items():
        data = pack.read_cubin(name)
        padded = data + bytes(-len(data) % 8)
        words = [
            f"0x{int.from_bytes(padded[at : at + 8], 'little'):x}"
            for at in range(0, len(padded), 8)
        ]
        lines = (",".join(words[at : at + 8]) for at in range(0, len(words), 8))
        body = ",\n".join(lines)
        yield f"/* {name}, SHA-256 {sha256} */"
        yield f"static const uint64_t code_{sha256[:16]}[] = {{\n{body}}};"


def _kernel_entry(kernel: PackedKernel, index: int) -> str:
    return (
        f'  {{code_{kernel.sha256[:16]}, "{kernel.symbol}", {kernel.shared}, '
        f"{32 * kernel.num_warps}}}, /* {index}: {kernel.name} */"
    )
