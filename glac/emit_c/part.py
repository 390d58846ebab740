"""What the sources hold of one kind of call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from glac.configs import Config
from glac.emit_c.functions import Function
from glac.emit_c.launches import Kernels
from glac.pack import PackRow
from glac.problem import Gate, Specialisation
from glac.record import dataclass


@dataclass(frozen=True)
class Part:
    """A kind of call: its C types, and how functions for it are written.

    Attributes:
        serves: types of the configs of its rows.
        call: C type of what a call takes.
        call_text: its definition.
        row: last part of the C name of a row.
        about_row: what a row is, in words.
        row_fields: what a row has besides what all have.
        about_functions: what functions have in common, in words.
        workspace: whether functions work in memory of the caller's.
        helpers: C functions that some of them call, by name, each behind those that it calls.
        own_fields: values of ``row_fields``.
        define: a function in C.
    """

    serves: tuple[type[Config], ...]
    call: str
    call_text: str
    row: str
    about_row: str
    row_fields: str
    about_functions: str
    workspace: bool
    helpers: Mapping[str, str]
    own_fields: Callable[[Function], str]
    define: Callable[[Function, Kernels], Iterable[str]]

    def declaration(self, item: Function) -> str:
        """A function in the header."""
        spec = item.spec
        rows = "; ".join(
            f"{row.gpu}, 2^{row.bucket.bh} heads, 2^{row.bucket.t} tokens ({row.source})"
            for row in item.rows
        )
        about = (
            f"/* K = {spec.K}, V = {spec.V}, {spec.dtype.value}; gate {_gate(spec)}, "
            f"{spec.gate_dtype.value}.\n   Config {item.config.slug}.\n   For {rows}. */\n"
        )
        run = f"int {item.name}(glac_handle *handle, const {self.call} *call,\n    "
        if not self.workspace:
            return f"{about}{run}void *stream);"
        return (
            f"{about}size_t {item.name}_workspace(const {self.call} *call);\n"
            f"{run}uint64_t workspace, size_t workspace_bytes, void *stream);"
        )

    def entry(self, item: Function, row: PackRow) -> str:
        """A row of the table."""
        spec = row.spec
        return (
            f'  {{"{item.name}", "{row.gpu}", "{spec.dtype.value}", "{spec.gate.value}", '
            f'"{spec.gate_dtype.value}", {spec.K}, {spec.V}, {spec.rank}, {row.bucket.bh}, '
            f"{row.bucket.t}, {int(row.source == 'tuned')}, {self.own_fields(item)}}},"
        )


def _gate(spec: Specialisation) -> str:
    return {
        Gate.VECTOR: "g",
        Gate.LOWRANK: f"x, w, bias of rank {spec.rank}",
        Gate.SCALAR: "g, one number for each token and head, or none",
    }[spec.gate]
