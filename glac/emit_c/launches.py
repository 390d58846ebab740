"""How one launch is written in C: arguments by the pack's own list of them, grid, scratch.

In a function, ``call`` is what the caller gave and ``s`` what follows from it; each op has its own
types for both, with the same names for the same things.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from glac.emit_c.functions import Function
from glac.errors import GlacError
from glac.pack import Pack, PackedKernel
from glac.problem import Gate, Specialisation
from glac.record import dataclass
from glac.templates import stride_unit

MAX_TOKEN_STRIDE = 1 << 24  # glac.validate, which needs PyTorch
# Likewise. Positions are 32-bit, and kernels look a chunk ahead and round lengths up.
MAX_TOKENS = (1 << 31) - 1 - 65536

_DIM = {"q": "K", "k": "K", "v": "V", "do": "V", "g": "K", "x": "rank"}
"""What the last dimension of a tensor with strides is."""

_COMMON: dict[str, str] = {
    **{name: f"call->{name}" for name in ("q", "k", "v", "g", "x", "w", "bias", "cu")},
    "scale": "(float)call->scale",
    "inv_normalizer": "(float)call->inv_normalizer",
    "clamp_log2": "(float)((call->clamp > STEP_MIN ? call->clamp : STEP_MIN) * LOG2E)",
    "T": "call->T",
    "N": "s->N",
    "H": "s->H",
    "q_group": "s->H / call->Hq",
    "k_group": "s->H / call->Hk",
    "s_group": "s->H / call->Hs",
    "has_cu": "call->cu != 0",
    "has_bias": "call->bias != 0",
    "has_g": "s->has_g",
}
"""Arguments that are the same in most launches."""
_C_TYPES = {"i32": "int32_t", "fp32": "float"}


@dataclass(frozen=True)
class Launch:
    """One launch in a C function.

    Attributes:
        template: of the kernel.
        arguments: in C, by their names in ``glac.templates``; those that are not common.
        grid: run-time factor of the grid in C, in 64 bits.
        when: whether it takes place in C, empty if it always does.
    """

    template: str
    arguments: Mapping[str, str]
    grid: str
    when: str = ""


class Kernels:
    """The kernels of the sources, in the order of their table in C."""

    def __init__(self, pack: Pack, functions: Iterable[Function]) -> None:
        names = sorted({name for item in functions for name in item.kernels.values()})
        self.listed = {name: pack.kernels[name] for name in names}
        self._places = {name: place for place, name in enumerate(names)}

    def of(self, item: Function, launch: Launch) -> PackedKernel:
        """The kernel that ``item`` launches."""
        return self.listed[item.kernels[launch.template]]

    def grid(self, item: Function, launch: Launch) -> str:
        """Programs of a launch."""
        return f"{self.of(item, launch).tiles} * ({launch.grid})"

    def lines(self, item: Function, launch: Launch, indent: str = "  ") -> Iterator[str]:
        """C statements that launch; ``status`` is set and checked."""
        kernel = self.of(item, launch)
        if launch.when:
            yield f"{indent}if ({launch.when})"
        yield f"{indent}{{ /* {kernel.name} */"
        names = []
        for name, kind in kernel.args:
            c_type = "uint64_t" if kind.startswith("*") else _C_TYPES[kind]
            yield f"{indent}  {c_type} a_{name} = {_expression(launch, name, kind)};"
            names.append(f"&a_{name}")
        # Behind its own arguments a kernel takes memory for scratch and memory for profiles.
        scratch = "&s->scratch" if kernel.scratch_bytes else "&s->nothing"
        pointers = ", ".join([*names, scratch, "&s->nothing"])
        yield f"{indent}  void *arguments[] = {{{pointers}}};"
        place, grid = self._places[kernel.name], self.grid(item, launch)
        yield f"{indent}  status = launch(handle, {place}, {grid}, stream, arguments);"
        yield f"{indent}  if (status) return status;"
        yield f"{indent}}}"


def _expression(launch: Launch, name: str, kind: str) -> str:
    if name in launch.arguments:
        return launch.arguments[name]
    tensor, _, axis = name.rpartition("_")
    if tensor in (*_DIM, "from", "to") and axis in ("b", "n", "t", "h"):
        return stride_of(tensor, axis)
    if name not in _COMMON:
        raise GlacError(
            f"argument {name} ({kind}) of {launch.template} has no meaning in C yet",
            hint="add it to the launch in glac/emit_c",
        )
    return _COMMON[name]


def stride_of(tensor: str, axis: str) -> str:
    """A stride as the kernels take it."""
    return f"(int32_t)(s->{tensor}_{axis} / unit_{tensor})"


def units(spec: Specialisation) -> dict[str, int]:
    """In which elements the strides of each input of a row are counted."""
    found = {"q": stride_unit(spec.K), "k": stride_unit(spec.K), "v": stride_unit(spec.V)}
    if spec.gate is Gate.LOWRANK:
        return {**found, "x": stride_unit(spec.rank)}
    return {**found, "g": 1 if spec.gate.is_scalar else stride_unit(spec.K)}


def constants(strided: Mapping[str, int]) -> Iterator[str]:
    """The units of strides as constants in C."""
    for name, unit in strided.items():
        yield f"  const int64_t unit_{name} = {unit};"


def gate_of(spec: Specialisation) -> str:
    """The gate as C knows it."""
    return f"{spec.gate.name}_GATE"


def stride_checks(spec: Specialisation, strided: Iterable[str], *, rows: bool) -> Iterator[str]:
    """Statements that refuse strides which kernels cannot count in.

    Args:
        spec: of the function.
        strided: names of tensors.
        rows: whether tokens are read as rows of a tile, which may not overlap; not so decoding,
            nor a scalar gate.
    """
    for name in strided:
        last = "0" if name == "x" else f"s->{name}_h"
        wrong = f"!strides_fit(s->{name}_b, s->{name}_t, {last}, unit_{name})"
        if rows and not (name == "g" and spec.gate.is_scalar):
            wrong += f" || !rows_fit(s->{name}_t, {getattr(spec, _DIM[name])})"
        yield f"  if ({wrong}) return GLAC_STRIDE;"


def workspace_functions(
    item: Function,
    kernels: Kernels,
    launches: Sequence[Launch],
    *,
    types: tuple[str, str],
    sized: Iterable[str],
    checks: Iterable[str],
    body: Iterable[str],
) -> Iterator[str]:
    """The C functions of a row that works in memory of the caller's: its size, and the launches.

    Args:
        item: the function.
        kernels: of the sources.
        launches: of which some may want scratch.
        types: C types of the call and of what follows from it.
        sized: statements that fill ``s``, and set ``status``.
        checks: statements that return where tensors are wrong.
        body: the launches.
    """
    call, found = types
    scratch = [
        f"  scratch = larger(scratch, {_scratch(kernels, item, launch)});"
        for launch in launches
        if kernels.of(item, launch).scratch_bytes
    ]
    if scratch:
        scratch = [
            "  size_t scratch = 0;",
            *scratch,
            "  s->scratch = scratch ? take(&s->end, scratch) : 0;",
        ]
    yield from (
        f"static int {item.name}_sizes(const {call} *call, uint64_t workspace, {found} *s) {{",
        *sized,
        "  if (status) return status;",
        *scratch,
        "  return GLAC_OK;",
        "}",
        "",
        f"size_t {item.name}_workspace(const {call} *call) {{",
        f"  {found} s;",
        f"  return call && !{item.name}_sizes(call, 0, &s) ? s.end : 0;",
        "}",
        "",
        f"int {item.name}(glac_handle *handle, const {call} *call,",
        "    uint64_t workspace, size_t workspace_bytes, void *stream) {",
        f"  {found} sizes_of_call, *s = &sizes_of_call;",
        "  if (!handle || !call) return GLAC_NULL;",
        f"  int status = {item.name}_sizes(call, workspace, s);",
        "  if (status) return status;",
        *checks,
        "  status = check_workspace(workspace, workspace_bytes, s->end - workspace);",
        "  if (status) return status;",
        *body,
        "  return GLAC_OK;",
        "}",
        "",
    )


def _scratch(kernels: Kernels, item: Function, launch: Launch) -> str:
    """Bytes that the programs of a launch want, in C."""
    grid, bytes_each = kernels.grid(item, launch), kernels.of(item, launch).scratch_bytes
    size = f"(size_t)({grid}) * {bytes_each}"
    return f"{launch.when} ? {size} : 0" if launch.when else size
