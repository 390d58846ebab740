"""Calls of what ``glac build --emit c`` wrote, by the types that its header defines."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TYPES: dict[str, Any] = {
    "uint64_t": ctypes.c_uint64,
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "double": ctypes.c_double,
}


class Library:
    """The compiled source.

    Attributes:
        prefix: of its names.
        calls: C type of what a function takes, by the function's name.
    """

    def __init__(self, header: Path, library: Path) -> None:
        text = re.sub(r"/\*.*?\*/", "", header.read_text(encoding="utf-8"), flags=re.DOTALL)
        self.prefix = re.findall(r"int (\w+)_open\(", text)[0]
        self.calls = dict(re.findall(r"int (\w+)\(glac_handle \*\w+, const (\w+) \*call", text))
        bodies = {n: b for b, n in re.findall(r"struct \w+ \{(.*?)\} (\w+);", text, re.DOTALL)}
        self._types = {name: _struct(bodies[name]) for name in set(self.calls.values())}
        self._code = ctypes.CDLL(str(library))
        self._handle = ctypes.c_void_p()

    def open(self) -> int:
        status: int = self._named("open")(ctypes.byref(self._handle))
        return status

    def close(self) -> None:
        self._named("close")(self._handle)

    def error(self, status: int) -> str:
        text = self._named("error")
        text.restype = ctypes.c_char_p
        return str(text(status).decode())

    def _named(self, name: str) -> Any:
        return getattr(self._code, f"{self.prefix}_{name}")

    def _call(self, function: str, fields: Mapping[str, Any]) -> Any:
        return ctypes.byref(self._types[self.calls[function]](**fields))

    def workspace(self, function: str, fields: Mapping[str, Any]) -> int | None:
        """Bytes of workspace, None for a function that takes none."""
        ask = getattr(self._code, f"{function}_workspace", None)
        if ask is None:
            return None
        ask.restype = ctypes.c_size_t
        return int(ask(self._call(function, fields)))

    def run(
        self,
        function: str,
        fields: Mapping[str, Any],
        stream: int,
        workspace: tuple[int, int] | None = None,
    ) -> int:
        """The status of a call; ``workspace`` is its address and its bytes."""
        arguments = [self._handle, self._call(function, fields)]
        if workspace is not None:
            arguments += [ctypes.c_uint64(workspace[0]), ctypes.c_size_t(workspace[1])]
        status: int = getattr(self._code, function)(*arguments, ctypes.c_void_p(stream))
        return status


def _struct(body: str) -> Any:
    """A ctypes structure like one in C, whose fields are all numbers."""
    fields = [
        (name, _TYPES[kind])
        for kind, names in re.findall(r"(\w+) ([\w, ]+);", body)
        for name in names.split(", ")
    ]
    return type("Call", (ctypes.Structure,), {"_fields_": fields})
