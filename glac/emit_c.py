"""``glac build --emit c``: kernels that serve, and their launches, as one C source and its header.

The source holds the machine code of a pack, opens the CUDA driver by itself and needs no CUDA
header, no CUDA library to link with and no Python. What launches a row follows ``glac.forward``
or ``glac.decode`` launch by launch; the order of a kernel's arguments is the pack's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from glac import __version__
from glac.atomic import write_text
from glac.configs import MAX_SEGMENTS, DecodeConfig, ForwardConfig
from glac.errors import GlacError, PackError
from glac.fit import oldest_cuda
from glac.gate import LOG2E, STEP_MIN
from glac.pack import Pack, PackedKernel, PackRow
from glac.problem import Gate, Specialisation
from glac.record import dataclass
from glac.templates import stride_unit, tiles

MAX_TOKEN_STRIDE = 1 << 24  # glac.validate, which needs PyTorch
# Likewise. Positions are 32-bit, and kernels look a chunk ahead and round lengths up.
MAX_TOKENS = (1 << 31) - 1 - 65536

_DIM = {"q": "K", "k": "K", "v": "V", "g": "K", "x": "rank"}
"""What the last dimension of a tensor with strides is."""


@dataclass(frozen=True)
class _Function:
    """One C function: a config of a specialisation, and the rows that name it."""

    name: str
    config: ForwardConfig | DecodeConfig
    spec: Specialisation
    kernels: Mapping[str, str]
    rows: tuple[PackRow, ...]


def write_c(pack: Pack, folder: Path) -> list[Path]:
    """Write ``glac_<arch>.h`` and ``glac_<arch>.c`` for the forward and decode rows of a pack.

    ``left_out`` tells which rows are not among them.

    Returns:
        Both paths.

    Raises:
        GlacError: the pack has no such row, or a kernel takes an argument that has no meaning in
            C.
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
    functions = _functions(pack)
    if not functions:
        raise GlacError(
            f"{pack.path}: neither a forward nor a decode row, so there is nothing to write in C",
            hint="build for a GPU that has some: glac build --gpu h100 --emit c",
        )
    forward = [item for item in functions if isinstance(item.config, ForwardConfig)]
    decode = [item for item in functions if isinstance(item.config, DecodeConfig)]
    prefix = f"glac_{pack.arch.replace('_', '')}"
    names = sorted({name for item in functions for name in item.kernels.values()})
    kernels = {name: pack.kernels[name] for name in names}
    capability = pack.arch.removeprefix("sm_").removesuffix("a")
    fields = {
        "PREFIX": prefix,
        "UPPER": prefix.upper(),
        "ARCH": pack.arch,
        "VERSION": __version__,
        "TOOLS": ", ".join(f"{tool} {version}" for tool, version in pack.toolchain.items()),
        "KERNELS": str(len(kernels)),
        "ROWS": str(sum(len(item.rows) for item in functions)),
        "FLOOR": str(pack.driver_floor),
        "CUDA": "{}.{}".format(*oldest_cuda(pack.driver_floor)),
        "CUDA_NUMBER": "{}{:02}0".format(*oldest_cuda(pack.driver_floor)),
        "MAJOR": capability[:-1],
        "MINOR": capability[-1],
        "EXACT": "1" if pack.arch.endswith("a") else "0",
        "MAX_SEGMENTS": str(MAX_SEGMENTS),
        "MAX_TOKENS": str(MAX_TOKENS),
        "MAX_TOKEN_STRIDE": str(MAX_TOKEN_STRIDE),
        "STEP_MIN": repr(STEP_MIN),
        "LOG2E": repr(LOG2E),
    }
    # What only one of the ops needs is written only where there are rows of it.
    calls, tables, launches = "", "", ""
    for of_op, call, table, launch in (
        (forward, _FORWARD_CALL, _FORWARD_TABLE, _FORWARD_SOURCE),
        (decode, _DECODE_CALL, _DECODE_TABLE, _DECODE_SOURCE),
    ):
        if of_op:
            calls += call
            tables += _filled(table, {"DECLARATIONS": "\n\n".join(map(_declaration, of_op))})
            entries = (_row_entry(item, row) for item in of_op for row in item.rows)
            definitions = (_definition(item, kernels, names) for item in of_op)
            texts = {"FUNCTIONS": "\n".join(definitions), "ENTRIES": "\n".join(entries)}
            launches += _filled(launch, texts)
    header = _filled(_HEADER, {"CALLS": calls, "TABLES": tables, **fields})
    code = "\n".join(_cubins(pack, kernels))
    listed = "\n".join(_kernel_entry(kernels[name], index) for index, name in enumerate(names))
    source = _filled(
        _SOURCE, {"LAUNCHES": launches, **fields, "CODE": code, "KERNEL_LIST": listed}
    )
    return header, source


def function_names(pack: Pack) -> dict[tuple[Specialisation, ForwardConfig | DecodeConfig], str]:
    """What the C function of a row is called, by the row's specialisation and config.

    Dispatch may give a forward config other segments than its row's: take the row's here, and
    the others as ``segment`` of the call.
    """
    return {(item.spec, item.config): item.name for item in _functions(pack)}


def left_out(pack: Pack) -> list[PackRow]:
    """Forward rows without a C function: those that walk prepared chunks have none yet."""
    return [
        row
        for row in pack.rows
        if isinstance(row.config, ForwardConfig) and row.config.prepare is not None
    ]


def _filled(text: str, fields: Mapping[str, str]) -> str:
    for name, value in fields.items():
        text = text.replace(f"@{name}@", value)
    return text


def _functions(pack: Pack) -> list[_Function]:
    """One for each config of a specialisation, whichever GPUs and buckets name it."""
    prefix = f"glac_{pack.arch.replace('_', '')}"
    groups: dict[tuple[Specialisation, ForwardConfig | DecodeConfig], list[PackRow]] = {}
    for row in pack.rows:
        config = row.config
        if isinstance(config, DecodeConfig) or (
            isinstance(config, ForwardConfig) and config.prepare is None
        ):
            groups.setdefault((row.spec, config), []).append(row)
    found: list[_Function] = []
    taken: set[str] = set()
    for (spec, config), rows in groups.items():
        first = rows[0]
        op = "decode" if isinstance(config, DecodeConfig) else "fwd"
        name = f"{prefix}_{op}_{spec.slug}_bh{first.bucket.bh}_t{first.bucket.t}"
        if name in taken:
            name += f"_{first.gpu.replace('-', '_')}"
        taken.add(name)
        found.append(_Function(name, config, spec, first.kernels, tuple(rows)))
    return found


# The header.


def _declaration(item: _Function) -> str:
    spec = item.spec
    gate = {
        Gate.VECTOR: "g",
        Gate.LOWRANK: f"x, w, bias of rank {spec.rank}",
        Gate.SCALAR: "g, one number for each token and head, or none",
    }[spec.gate]
    rows = "; ".join(
        f"{row.gpu}, 2^{row.bucket.bh} heads, 2^{row.bucket.t} tokens ({row.source})"
        for row in item.rows
    )
    about = (
        f"/* K = {spec.K}, V = {spec.V}, {spec.dtype.value}; gate {gate}, "
        f"{spec.gate_dtype.value}.\n   Config {item.config.slug}.\n   For {rows}. */\n"
    )
    if isinstance(item.config, DecodeConfig):
        return (
            f"{about}int {item.name}(glac_handle *handle, const glac_decode *call,\n"
            f"    void *stream);"
        )
    return (
        f"{about}size_t {item.name}_workspace(const glac_forward *call);\n"
        f"int {item.name}(glac_handle *handle, const glac_forward *call,\n"
        f"    uint64_t workspace, size_t workspace_bytes, void *stream);"
    )


_HEADER = """\
/* Gated linear attention: kernels for @ARCH@ and their launches. Made by glac @VERSION@
   (@TOOLS@); do not edit, run `glac build --emit c` again.

   @KERNELS@ kernels, @ROWS@ rows. Needs a driver for CUDA @CUDA@ (branch @FLOOR@) or newer, and
   -ldl where the C library keeps dlopen apart. There is no global state: what is loaded is in a
   handle, which belongs to the CUDA context that was current when it was opened. A handle may be
   used from several threads at once; calls only enqueue work on `stream` and never wait. */
#ifndef @UPPER@_H
#define @UPPER@_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef GLAC_CODES_DEFINED
#define GLAC_CODES_DEFINED

/* What a function returns: 0, one of these, or a positive CUresult of the driver. */
enum {
  GLAC_OK = 0,
  GLAC_NULL = -1,      /* a pointer that must be there is 0 */
  GLAC_ALIGNMENT = -2, /* a pointer is not a multiple of 16 bytes, or of what it is said to be */
  GLAC_SIZE = -3,      /* a size is below 1 or too large, or head counts do not divide */
  GLAC_STRIDE = -4,    /* a stride is one that the kernels cannot count in */
  GLAC_WORKSPACE = -5, /* the workspace is smaller than the function's size query says */
  GLAC_DEVICE = -6,    /* the current device does not run this code */
  GLAC_DRIVER = -7,    /* there is no CUDA driver, or it is too old */
  GLAC_MEMORY = -8,    /* no host memory */
  GLAC_SEGMENT = -9,   /* the function cannot cut sequences into segments of this length */
  GLAC_VALUE = -10     /* a field has none of its values, or excludes another one */
};

#endif /* GLAC_CODES_DEFINED */

/* In a call pointers are device addresses, multiples of 16 bytes but for those to int32 and int64.
   Shapes are [batch, tokens, heads, channels] with the channels contiguous; strides count
   elements, and all of a tensor at 0 stand for a contiguous one. A low-rank gate has x
   [batch, tokens, rank], w [Hs * K, rank] and bias [Hs * K] instead of g:
   g = max(logsigmoid(x w^T + bias) * inv_normalizer, clamp), computed in the kernel. */
@CALLS@
#ifndef GLAC_HANDLE_DEFINED
#define GLAC_HANDLE_DEFINED
typedef struct glac_handle glac_handle;
#endif

/* Load all kernels into the current CUDA context. */
int @PREFIX@_open(glac_handle **handle);

/* Unload them; their context must be current and their work done. 0 is allowed. */
void @PREFIX@_close(glac_handle *handle);

/* What a code stands for, in English; of a CUresult its number has to do. */
const char *@PREFIX@_error(int code);
@TABLES@
#ifdef __cplusplus
}
#endif

#endif
"""

_FORWARD_CALL = """
#ifndef GLAC_FORWARD_DEFINED
#define GLAC_FORWARD_DEFINED

/* One forward pass:  S_t = diag(exp g_t) S_{t-1} + k_t^T v_t,  o_t = scale * q_t S_t */
typedef struct glac_forward {
  uint64_t q, k, v;    /* [B, T, Hq, K], [B, T, Hk, K], [B, T, Hs, V] */
  uint64_t g;          /* [B, T, Hs, K], natural log of each step's decay */
  uint64_t x, w, bias; /* bias may be 0 */
  uint64_t cu;         /* [N + 1] in int32, boundaries of a packed batch, or 0 */
  uint64_t h0;         /* initial state [N, Hs, K, V] in fp32, or 0 for zeros */
  uint64_t o;          /* output [B, T, max(Hq, Hs), V], contiguous */
  uint64_t ht;         /* final state [N, Hs, K, V] in fp32, or 0 */
  int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, x_b, x_t;
  int32_t B, T;        /* B is 1 with cu */
  int32_t Hq, Hk, Hs;  /* Hk divides Hs; Hq divides Hs or is a multiple of it */
  int32_t N;           /* sequences of a packed batch; not read without cu */
  int32_t segment;     /* tokens of the segments that share a sequence, a multiple of the row's
                          step; 0 for the row's own, below 0 to cut none */
  double scale;        /* usually K^-0.5 */
  double inv_normalizer; /* of a low-rank gate: 1 / normalizer */
  double clamp;          /* of a low-rank gate: its lower bound, -INFINITY for none */
} glac_forward;

#endif /* GLAC_FORWARD_DEFINED */
"""

_FORWARD_TABLE = """
/* One row: which function serves a problem on a GPU near which sizes. */
typedef struct @PREFIX@_row {
  const char *name;
  const char *gpu;
  const char *dtype, *gate, *gate_dtype; /* bf16, fp16, fp32; vector, lowrank */
  int32_t K, V, rank;
  int32_t log2_heads, log2_tokens; /* rounded log2 of sequences * heads, and of their tokens */
  int32_t tuned;
  int32_t segment; /* what it cuts sequences into unless a call says otherwise, 0 for none */
  int32_t step;    /* of which segments are a multiple, 0 if it cannot cut */
  size_t (*workspace)(const glac_forward *call);
  int (*run)(glac_handle *handle, const glac_forward *call, uint64_t workspace,
             size_t workspace_bytes, void *stream);
} @PREFIX@_row;

extern const @PREFIX@_row @PREFIX@_rows[];
extern const int @PREFIX@_row_count;

/* One function for each row, its workspace in bytes (16-byte aligned device memory) asked for
   first. A workspace may be used again as soon as later work is enqueued on the same stream. */

@DECLARATIONS@
"""

_DECODE_CALL = """
#ifndef GLAC_DECODE_DEFINED
#define GLAC_DECODE_DEFINED

/* What states are stored in. */
enum { GLAC_FP32 = 0, GLAC_BF16 = 1 };

/* One or a few tokens of each sequence against a stored state, by the formula of a forward pass.
   Without cu there are N = B sequences. A slot outside the pool marks an inactive sequence: its
   output, and a new state of it, is 0, and the pool is left alone. Two sequences that update one
   slot leave parts of either. */
typedef struct glac_decode {
  uint64_t q, k, v;    /* [B, T, Hq, K], [B, T, Hk, K], [B, T, Hs, V] */
  uint64_t g;          /* [B, T, Hs, K]; of a scalar gate [B, T, Hs] of any strides (g_h alone for
                          one number per head), aligned as its elements are, or 0 for no decay */
  uint64_t x, w, bias; /* bias may be 0 */
  uint64_t cu;         /* [N + 1] in int32, boundaries of a packed batch, or 0 */
  uint64_t from;       /* states [N, Hs, K, V], with indices [slots, Hs, K, V]; or 0 for zeros */
  uint64_t to;         /* new states [N, Hs, K, V], with every [B, T, Hs, K, V]; or 0 */
  uint64_t indices;    /* [N], the slot of each sequence, or 0 */
  uint64_t o;          /* output [B, T, max(Hq, Hs), V], contiguous */
  int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, x_b, x_t;
  int64_t from_n, from_h; /* strides of slots and heads; each [K, V] is contiguous */
  int32_t B, T;        /* B is 1 with cu */
  int32_t Hq, Hk, Hs;  /* Hk divides Hs; Hq divides Hs or is a multiple of it */
  int32_t N;           /* sequences of a packed batch; not read without cu */
  int32_t slots;       /* states in the pool; not read without indices */
  int32_t index_bytes; /* 4 or 8; not read without indices */
  int32_t from_dtype, to_dtype; /* GLAC_FP32 or GLAC_BF16 */
  int32_t in_place;    /* 1: write states back to `from`; `to` is 0 */
  int32_t every;       /* 1: write the state after every token to `to` */
  double scale;        /* usually K^-0.5 */
  double inv_normalizer; /* of a low-rank gate: 1 / normalizer */
  double clamp;          /* of a low-rank gate: its lower bound, -INFINITY for none */
} glac_decode;

#endif /* GLAC_DECODE_DEFINED */
"""

_DECODE_TABLE = """
/* One row of decoding. */
typedef struct @PREFIX@_decode_row {
  const char *name;
  const char *gpu;
  const char *dtype, *gate, *gate_dtype; /* bf16, fp16, fp32; vector, lowrank, scalar */
  int32_t K, V, rank;
  int32_t log2_heads, log2_tokens; /* rounded log2 of sequences * Hs, and of their tokens */
  int32_t tuned;
  int (*run)(glac_handle *handle, const glac_decode *call, void *stream);
} @PREFIX@_decode_row;

extern const @PREFIX@_decode_row @PREFIX@_decode_rows[];
extern const int @PREFIX@_decode_row_count;

/* One function for each row. */

@DECLARATIONS@
"""


# The source.


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


def _row_entry(item: _Function, row: PackRow) -> str:
    spec, config = row.spec, item.config
    own = item.name
    if isinstance(config, ForwardConfig):
        step = config.chunk_step if config.summary else 0
        own = f"{config.segment}, {step}, {item.name}_workspace, {item.name}"
    return (
        f'  {{"{item.name}", "{row.gpu}", "{spec.dtype.value}", "{spec.gate.value}", '
        f'"{spec.gate_dtype.value}", {spec.K}, {spec.V}, {spec.rank}, {row.bucket.bh}, '
        f"{row.bucket.t}, {int(row.source == 'tuned')}, {own}}},"
    )


# What each argument of a kernel is in C, by its name in ``glac.templates``. The C variables are
# those of ``sizes`` and ``glac_forward``, or ``decode_sizes`` and ``glac_decode``, below.
_COMMON: dict[str, str] = {
    **{name: f"call->{name}" for name in ("q", "k", "v", "g", "x", "w", "bias", "cu")},
    "inv_normalizer": "(float)call->inv_normalizer",
    "clamp_log2": "(float)((call->clamp > STEP_MIN ? call->clamp : STEP_MIN) * LOG2E)",
    "T": "call->T",
    "N": "s.N",
    "n_seg": "s.n_seg",
    "seg_len": "s.seg_len",
    "has_cu": "call->cu != 0",
    "has_bias": "call->bias != 0",
}
_ARGUMENTS: dict[str, dict[str, str]] = {
    "gla_states": {
        "h0": "0",
        "starts": "s.states",
        "states": "0",
        "decay": "s.decay",
        "out_scale": "1.0f",
        "H": "call->Hs",
        "seg_first": "0",
        "seg_count": "s.n_seg",
        "keep": "1",
        "n_kept": "1",
        "k_group": "call->Hs / call->Hk",
        "v_group": "1",
        "g_group": "1",
        "reverse": "0",
        "summarise": "1",
        "from_start": "0",
        "has_h0": "0",
    },
    "gla_combine": {
        "states": "s.states",
        "decay": "s.decay",
        "ends": "call->h0",
        "H": "call->Hs",
        "group": "1",
        "reverse": "0",
        "has_ends": "call->h0 != 0",
    },
    "gla_fwd": {
        "o": "call->o",
        "h0": "call->h0",
        "starts": "s.segmented ? s.states : 0",
        "ht": "call->ht",
        "scale": "(float)call->scale",
        "H": "s.H",
        "q_group": "s.H / call->Hq",
        "k_group": "s.H / call->Hk",
        "s_group": "s.H / call->Hs",
        "has_h0": "call->h0 != 0",
        "has_ht": "call->ht != 0",
    },
    "gla_decode": {
        "from32": "s.state_in == 1 ? call->from : 0",
        "from16": "s.state_in == 2 ? call->from : 0",
        "to32": "s.state_out == 1 ? s.to : 0",
        "to16": "s.state_out == 2 ? s.to : 0",
        "idx": "call->indices",
        "o": "call->o",
        "scale": "(float)call->scale",
        "H": "s.H",
        "q_group": "s.H / call->Hq",
        "k_group": "s.H / call->Hk",
        "s_group": "s.H / call->Hs",
        "n_slots": "s.slots",
        "idx_step": "s.idx_step",
        "has_g": "s.has_g",
        "state_in": "s.state_in",
        "state_out": "s.state_out",
        "in_place": "call->in_place != 0",
        "per_token": "call->every != 0",
    },
}
_GRIDS = {
    "gla_states": "(int64_t)s.n_seg * call->B * call->Hs",
    "gla_combine": "(int64_t)s.N * call->Hs",
    "gla_fwd": "(int64_t)s.n_seg * call->B * s.H",
    "gla_decode": "(int64_t)s.N * call->Hs",
}
_C_TYPES = {"i32": "int32_t", "fp32": "float"}


def _expression(template: str, name: str, kind: str) -> str:
    known = {**_COMMON, **_ARGUMENTS[template]}
    tensor, _, axis = name.rpartition("_")
    if tensor in (*_DIM, "from", "to") and axis in ("b", "n", "t", "h"):
        return f"(int32_t)(s.{name} / unit_{tensor})"
    if name not in known:
        raise GlacError(
            f"argument {name} ({kind}) of {template} has no meaning in C yet",
            hint="add it to the table in glac/emit_c.py",
        )
    return known[name]


def _launch(
    kernel: PackedKernel, index: int, template: str, factor: int, indent: str
) -> Iterable[str]:
    """C statements that launch one kernel; ``status`` is set and checked."""
    lines, names = [], []
    for name, kind in kernel.args:
        c_type = "uint64_t" if kind.startswith("*") else _C_TYPES[kind]
        lines.append(f"{c_type} a_{name} = {_expression(template, name, kind)};")
        names.append(f"&a_{name}")
    lines.append(f"void *arguments[] = {{{', '.join(names)}, &s.scratch, &s.profile}};")
    lines.append(
        f"status = launch(handle, {index}, {factor} * ({_GRIDS[template]}), stream, arguments);"
    )
    lines.append("if (status) return status;")
    yield f"{indent}{{ /* {kernel.name} */"
    yield from (f"{indent}  {line}" for line in lines)
    yield f"{indent}}}"


def _units(spec: Specialisation) -> dict[str, int]:
    """In which elements the strides of each tensor of a row are counted."""
    units = {"q": stride_unit(spec.K), "k": stride_unit(spec.K), "v": stride_unit(spec.V)}
    if spec.gate is Gate.LOWRANK:
        return {**units, "x": stride_unit(spec.rank)}
    return {**units, "g": 1 if spec.gate.is_scalar else stride_unit(spec.K)}


def _axes(tensor: str) -> str:
    """Its strides, as arguments."""
    last = "0" if tensor == "x" else f"s.{tensor}_h"
    return f"s.{tensor}_b, s.{tensor}_t, {last}"


def _constants(units: Mapping[str, int]) -> Iterable[str]:
    for name, unit in units.items():
        yield f"  const int64_t unit_{name} = {unit};"


def _definition(item: _Function, kernels: Mapping[str, PackedKernel], names: Sequence[str]) -> str:
    if isinstance(item.config, DecodeConfig):
        lines = _decode_definition(item, kernels, names)
    else:
        lines = _forward_definition(item, item.config, kernels, names)
    return "\n".join([*lines, "  return GLAC_OK;", "}", ""])


def _forward_definition(
    item: _Function,
    config: ForwardConfig,
    kernels: Mapping[str, PackedKernel],
    names: Sequence[str],
) -> Iterable[str]:
    spec = item.spec
    lowrank = spec.gate is Gate.LOWRANK
    units = _units(spec)
    configs = config.kernels()
    scratch = []
    for template, name in item.kernels.items():
        if kernels[name].scratch_bytes:
            factor = tiles(template, spec, configs[template])
            grid = f"{factor} * ({_GRIDS[template]})"
            size = f"(size_t)({grid}) * {kernels[name].scratch_bytes}"
            used = "s->segmented" if template != "gla_fwd" else "1"
            scratch.append((used, size.replace("s.", "s->")))
    step = config.chunk_step if config.summary else 0
    sizes = f"{spec.K}, {spec.V}, {spec.rank}, {config.segment}, {step}"
    yield from (
        f"static int {item.name}_sizes(const glac_forward *call, sizes *s) {{",
        f"  int status = sizes_of(call, s, {sizes});",
        "  if (status) return status;",
        *(
            f"  if ({used} && {size} > s->scratch_bytes) s->scratch_bytes = {size};"
            for used, size in scratch
        ),
        "  s->workspace = s->state_bytes + s->decay_bytes + s->scratch_bytes;",
        "  return GLAC_OK;",
        "}",
        "",
        f"size_t {item.name}_workspace(const glac_forward *call) {{",
        "  sizes s;",
        f"  return call && !{item.name}_sizes(call, &s) ? s.workspace : 0;",
        "}",
        "",
        f"int {item.name}(glac_handle *handle, const glac_forward *call,",
        "    uint64_t workspace, size_t workspace_bytes, void *stream) {",
        "  sizes s;",
        "  if (!handle || !call) return GLAC_NULL;",
        f"  int status = {item.name}_sizes(call, &s);",
        "  if (status) return status;",
        *_constants(units),
        f"  status = check_pointers(call, {int(lowrank)});",
        "  if (status) return status;",
        *(
            f"  if (!strides_fit({_axes(name)}, unit_{name}) || "
            f"!rows_fit(s.{name}_t, {getattr(spec, _DIM[name])})) return GLAC_STRIDE;"
            for name in units
        ),
        "  status = place_workspace(&s, workspace, workspace_bytes);",
        "  if (status) return status;",
    )
    for template, name in item.kernels.items():
        index = names.index(name)
        factor = tiles(template, spec, configs[template])
        optional = template != "gla_fwd"
        if optional:
            yield "  if (s.segmented)"
        yield from _launch(kernels[name], index, template, factor, "  ")


def _decode_definition(
    item: _Function, kernels: Mapping[str, PackedKernel], names: Sequence[str]
) -> Iterable[str]:
    spec = item.spec
    state = stride_unit(spec.K * spec.V)
    units = _units(spec)
    gate = f"{spec.gate.name}_GATE"
    yield from (
        f"int {item.name}(glac_handle *handle, const glac_decode *call,",
        "    void *stream) {",
        "  decode_sizes s;",
        "  if (!handle || !call) return GLAC_NULL;",
        f"  int status = decode_sizes_of(call, &s, {gate}, {spec.K}, {spec.V}, {spec.rank});",
        "  if (status) return status;",
        *_constants({**units, "from": state, "to": state}),
        f"  status = check_decode_pointers(call, {gate}, {spec.gate_dtype.itemsize});",
        "  if (status) return status;",
        *(
            f"  if (!strides_fit({_axes(name)}, unit_{name})) return GLAC_STRIDE;"
            for name in units
        ),
        "  if (!strides_fit(s.from_n, 0, s.from_h, unit_from)) return GLAC_STRIDE;",
        "  if (!strides_fit(s.to_n, s.to_t, s.to_h, unit_to)) return GLAC_STRIDE;",
    )
    for template, config in item.config.kernels().items():
        kernel = kernels[item.kernels[template]]
        if kernel.scratch_bytes:
            raise GlacError(f"{kernel.name} wants scratch memory, which decoding in C has not")
        factor = tiles(template, spec, config)
        yield from _launch(kernel, names.index(kernel.name), template, factor, "  ")


_SOURCE = """\
/* Made by glac @VERSION@; see the header. */
#include "glac_@ARCH@.h"

#include <dlfcn.h>
#include <stdlib.h>

#define STEP_MIN (@STEP_MIN@)
#define LOG2E (@LOG2E@)

/* Machine code, as little-endian words. */

@CODE@

typedef struct kernel_info {
  const uint64_t *code;
  const char *symbol;
  unsigned shared; /* bytes of dynamic shared memory */
  unsigned threads;
} kernel_info;

enum { KERNELS = @KERNELS@ };

static const kernel_info kernels[KERNELS] = {
@KERNEL_LIST@
};

/* The driver, as far as it is used: opened at run time, so nothing of CUDA is needed to build. */
typedef int (*get_version_t)(int *);
typedef int (*get_device_t)(int *);
typedef int (*get_attribute_t)(int *, int, int);
typedef int (*load_t)(void **, const void *);
typedef int (*unload_t)(void *);
typedef int (*get_function_t)(void **, void *, const char *);
typedef int (*set_attribute_t)(void *, int, int);
typedef int (*launch_t)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                        unsigned, void *, void **, void **);

struct glac_handle {
  void *library;
  unload_t unload;
  launch_t launch;
  void *modules[KERNELS];
  void *functions[KERNELS];
};

/* ISO C has no conversion from an object pointer to a function pointer; POSIX asks for one. */
static int symbol_of(void *library, const char *name, void *into) {
  void *found = dlsym(library, name);
  *(void **)into = found;
  return found ? 0 : GLAC_DRIVER;
}

void @PREFIX@_close(glac_handle *handle) {
  if (!handle) return;
  for (int i = 0; i < KERNELS; i++)
    if (handle->modules[i]) handle->unload(handle->modules[i]);
  if (handle->library) dlclose(handle->library);
  free(handle);
}

static int open_into(glac_handle *handle) {
  get_version_t get_version;
  get_device_t get_device;
  get_attribute_t get_attribute;
  load_t load;
  get_function_t get_function;
  set_attribute_t set_attribute;
  handle->library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!handle->library) return GLAC_DRIVER;
  if (symbol_of(handle->library, "cuDriverGetVersion", &get_version) ||
      symbol_of(handle->library, "cuCtxGetDevice", &get_device) ||
      symbol_of(handle->library, "cuDeviceGetAttribute", &get_attribute) ||
      symbol_of(handle->library, "cuModuleLoadData", &load) ||
      symbol_of(handle->library, "cuModuleUnload", &handle->unload) ||
      symbol_of(handle->library, "cuModuleGetFunction", &get_function) ||
      symbol_of(handle->library, "cuFuncSetAttribute", &set_attribute) ||
      symbol_of(handle->library, "cuLaunchKernel", &handle->launch))
    return GLAC_DRIVER;
  int version = 0, device = 0, major = 0, minor = 0, shared = 0;
  int status = get_version(&version);
  if (status) return status;
  if (version < @CUDA_NUMBER@) return GLAC_DRIVER;
  if ((status = get_device(&device)) || (status = get_attribute(&major, 75, device)) ||
      (status = get_attribute(&minor, 76, device)) ||
      (status = get_attribute(&shared, 97, device)))
    return status;
  if (major != @MAJOR@ || (@EXACT@ ? minor != @MINOR@ : minor < @MINOR@)) return GLAC_DEVICE;
  for (int i = 0; i < KERNELS; i++) {
    /* A kernel that the device cannot hold stays unloaded; calling it is GLAC_DEVICE. */
    if (kernels[i].shared > (unsigned)shared) continue;
    if ((status = load(&handle->modules[i], kernels[i].code))) return status;
    status = get_function(&handle->functions[i], handle->modules[i], kernels[i].symbol);
    if (status) return status;
    if (kernels[i].shared > 48 * 1024) {
      status = set_attribute(handle->functions[i], 8, (int)kernels[i].shared);
      if (status) return status;
    }
  }
  return GLAC_OK;
}

int @PREFIX@_open(glac_handle **handle) {
  if (!handle) return GLAC_NULL;
  *handle = NULL;
  glac_handle *made = calloc(1, sizeof *made);
  if (!made) return GLAC_MEMORY;
  int status = open_into(made);
  if (status) {
    @PREFIX@_close(made);
    return status;
  }
  *handle = made;
  return GLAC_OK;
}

const char *@PREFIX@_error(int code) {
  switch (code) {
    case GLAC_OK: return "done";
    case GLAC_NULL: return "a pointer that must be there is 0";
    case GLAC_ALIGNMENT: return "a pointer is not a multiple of 16 bytes, or of an index or a "
                                "number that it points to";
    case GLAC_SIZE: return "a size is below 1 or too large, or head counts do not divide";
    case GLAC_STRIDE: return "a stride is one that the kernels cannot count in";
    case GLAC_WORKSPACE: return "the workspace is too small";
    case GLAC_DEVICE: return "the current device does not run code for @ARCH@, or has too little "
                             "shared memory for this kernel";
    case GLAC_DRIVER: return "no CUDA driver, or one older than for CUDA @CUDA@";
    case GLAC_MEMORY: return "no host memory";
    case GLAC_SEGMENT: return "a segment is no multiple of the row's step, or the row cannot cut";
    case GLAC_VALUE: return "a dtype or a size of indices is none that there is, or states are "
                            "wanted in place and elsewhere";
    default: return code > 0 ? "an error of the CUDA driver (CUresult)" : "an unknown code";
  }
}

static void strides(int64_t *b, int64_t *t, int64_t *h, int64_t T, int64_t heads, int64_t dim) {
  if (*b || *t || *h) return;
  *h = dim;
  *t = heads * dim;
  *b = T * heads * dim;
}

/* Batch, token and head stride, in units of `unit` elements. */
static int strides_fit(int64_t b, int64_t t, int64_t h, int64_t unit) {
  if (b < 0 || t < 0 || h < 0 || b % unit || t % unit || h % unit) return 0;
  return b / unit <= 2147483647 && t / unit <= 2147483647 && h / unit <= 2147483647;
}

static int check_sizes(int64_t B, int64_t T, int64_t Hq, int64_t Hk, int64_t Hs, int packed,
                       int64_t N, int64_t width) {
  if (B < 1 || T < 1 || T > @MAX_TOKENS@ || Hq < 1 || Hk < 1 || Hs < 1) return GLAC_SIZE;
  if (Hs % Hk || (Hs % Hq && Hq % Hs) || (packed && (N < 1 || B != 1))) return GLAC_SIZE;
  return (Hq > Hs ? Hq : Hs) * width < @MAX_TOKEN_STRIDE@ ? GLAC_OK : GLAC_SIZE;
}

static int launch(const glac_handle *handle, int kernel, int64_t grid, void *stream,
                  void **arguments) {
  if (!handle->functions[kernel]) return GLAC_DEVICE;
  return handle->launch(handle->functions[kernel], (unsigned)grid, 1, 1, kernels[kernel].threads,
                        1, 1, kernels[kernel].shared, stream, arguments, NULL);
}
@LAUNCHES@"""

_FORWARD_SOURCE = """
/* What follows from the sizes of a call. */
typedef struct sizes {
  int32_t H, N, n_seg, seg_len, segmented;
  int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, x_b, x_t;
  size_t state_bytes, decay_bytes, scratch_bytes, workspace;
  uint64_t states, decay, scratch, profile;
} sizes;

static size_t padded(size_t bytes) { return (bytes + 255) / 256 * 256; }

/* `segment` is the row's own; `step` is what others are a multiple of, 0 if there are none. */
static int sizes_of(const glac_forward *call, sizes *s, int64_t K, int64_t V, int64_t rank,
                    int64_t segment, int64_t step) {
  static const sizes none;
  *s = none;
  int status = check_sizes(call->B, call->T, call->Hq, call->Hk, call->Hs, call->cu != 0, call->N,
                           K > V ? K : V);
  if (status) return status;
  if (call->segment > 0 && (!step || call->segment % step)) return GLAC_SEGMENT;
  if (call->segment) segment = call->segment > 0 ? call->segment : 0;
  s->H = call->Hq > call->Hs ? call->Hq : call->Hs;
  s->N = call->cu ? call->N : call->B;
  /* Segments, as glac.plan.segments_of counts them. */
  int64_t T = call->T, count = 1, length = T;
  if (segment && segment < T) {
    length = segment * ((T + segment * @MAX_SEGMENTS@ - 1) / (segment * @MAX_SEGMENTS@));
    count = (T + length - 1) / length;
  }
  if (call->cu) {
    if (count == 1) {
      count = call->N;
      length = T + 1;
    } else {
      count = T / length + call->N;
    }
  }
  /* The largest grid of any config counts programs in 31 bits. */
  int64_t tiles = ((K > V ? K : V) + 15) / 16;
  if (s->H > 2147483647 / tiles / call->B / count) return GLAC_SIZE;
  s->n_seg = (int32_t)count;
  s->seg_len = (int32_t)length;
  s->segmented = length < T;
  if (s->segmented) {
    size_t states = (size_t)call->B * (size_t)call->Hs * (size_t)count;
    s->state_bytes = padded(states * (size_t)K * (size_t)V * 4);
    s->decay_bytes = padded(states * (size_t)K * 4);
  }
  s->q_b = call->q_b, s->q_t = call->q_t, s->q_h = call->q_h;
  s->k_b = call->k_b, s->k_t = call->k_t, s->k_h = call->k_h;
  s->v_b = call->v_b, s->v_t = call->v_t, s->v_h = call->v_h;
  s->g_b = call->g_b, s->g_t = call->g_t, s->g_h = call->g_h;
  s->x_b = call->x_b, s->x_t = call->x_t;
  strides(&s->q_b, &s->q_t, &s->q_h, T, call->Hq, K);
  strides(&s->k_b, &s->k_t, &s->k_h, T, call->Hk, K);
  strides(&s->v_b, &s->v_t, &s->v_h, T, call->Hs, V);
  strides(&s->g_b, &s->g_t, &s->g_h, T, call->Hs, K);
  int64_t unused = 0;
  strides(&s->x_b, &s->x_t, &unused, T, 1, rank);
  return GLAC_OK;
}

static int check_pointers(const glac_forward *call, int lowrank) {
  if (!call->q || !call->k || !call->v || !call->o) return GLAC_NULL;
  if (lowrank ? !call->x || !call->w : !call->g) return GLAC_NULL;
  uint64_t all = call->q | call->k | call->v | call->o | call->h0 | call->ht;
  all |= lowrank ? call->x | call->w | call->bias : call->g;
  return all % 16 || call->cu % 4 ? GLAC_ALIGNMENT : GLAC_OK;
}

/* Rows of `width` elements do not overlap, and offsets in a tile of them have 32 bits. */
static int rows_fit(int64_t t, int64_t width) { return t >= width && t < @MAX_TOKEN_STRIDE@; }

static int place_workspace(sizes *s, uint64_t workspace, size_t bytes) {
  if (s->workspace && (!workspace || bytes < s->workspace)) return GLAC_WORKSPACE;
  if (s->workspace && workspace % 16) return GLAC_ALIGNMENT;
  s->states = workspace;
  s->decay = workspace + s->state_bytes;
  s->scratch = s->scratch_bytes ? s->decay + s->decay_bytes : 0;
  return GLAC_OK;
}

@FUNCTIONS@
const @PREFIX@_row @PREFIX@_rows[] = {
@ENTRIES@
};

const int @PREFIX@_row_count = sizeof @PREFIX@_rows / sizeof @PREFIX@_rows[0];
"""

_DECODE_SOURCE = """
enum { VECTOR_GATE, LOWRANK_GATE, SCALAR_GATE };

/* What follows from the sizes of a call for decoding: glac.decode.launch. */
typedef struct decode_sizes {
  int32_t H, N, slots, idx_step, has_g, state_in, state_out;
  int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, x_b, x_t;
  int64_t from_n, from_h, to_n, to_t, to_h;
  uint64_t to, scratch, profile;
} decode_sizes;

static int decode_sizes_of(const glac_decode *call, decode_sizes *s, int gate, int64_t K,
                           int64_t V, int64_t rank) {
  static const decode_sizes none;
  *s = none;
  int status = check_sizes(call->B, call->T, call->Hq, call->Hk, call->Hs, call->cu != 0, call->N,
                           K > V ? K : V);
  if (status) return status;
  if (call->indices && call->slots < 1) return GLAC_SIZE;
  if (call->indices && call->index_bytes != 4 && call->index_bytes != 8) return GLAC_VALUE;
  if (call->from_dtype != GLAC_FP32 && call->from_dtype != GLAC_BF16) return GLAC_VALUE;
  if (call->to_dtype != GLAC_FP32 && call->to_dtype != GLAC_BF16) return GLAC_VALUE;
  if (call->in_place && (call->to || call->every)) return GLAC_VALUE;
  s->H = call->Hq > call->Hs ? call->Hq : call->Hs;
  s->N = call->cu ? call->N : call->B;
  if (call->Hs > 2147483647 / ((V + 15) / 16) / s->N) return GLAC_SIZE;
  s->slots = call->indices ? call->slots : s->N;
  s->idx_step = call->indices ? call->index_bytes / 4 : 0;
  s->has_g = gate != LOWRANK_GATE && call->g;
  s->to = call->in_place ? call->from : call->to;
  s->state_in = !call->from ? 0 : call->from_dtype == GLAC_BF16 ? 2 : 1;
  s->state_out = !call->to ? 0 : call->to_dtype == GLAC_BF16 ? 2 : 1;
  if (call->in_place) s->state_out = s->state_in;
  s->q_b = call->q_b, s->q_t = call->q_t, s->q_h = call->q_h;
  s->k_b = call->k_b, s->k_t = call->k_t, s->k_h = call->k_h;
  s->v_b = call->v_b, s->v_t = call->v_t, s->v_h = call->v_h;
  strides(&s->q_b, &s->q_t, &s->q_h, call->T, call->Hq, K);
  strides(&s->k_b, &s->k_t, &s->k_h, call->T, call->Hk, K);
  strides(&s->v_b, &s->v_t, &s->v_h, call->T, call->Hs, V);
  if (s->has_g) {
    s->g_b = call->g_b, s->g_t = call->g_t, s->g_h = call->g_h;
    strides(&s->g_b, &s->g_t, &s->g_h, call->T, call->Hs, gate == SCALAR_GATE ? 1 : K);
  }
  s->x_b = call->x_b, s->x_t = call->x_t;
  int64_t unused = 0, row = call->Hs * K * V;
  strides(&s->x_b, &s->x_t, &unused, call->T, 1, rank);
  if (call->from) {
    int given = call->from_n || call->from_h;
    s->from_n = given ? call->from_n : row;
    s->from_h = given ? call->from_h : K * V;
  }
  s->to_n = s->from_n, s->to_h = s->from_h;
  if (call->to) {
    if (call->every && !call->cu && call->T > 2147483647 * (int64_t)16 / row) return GLAC_STRIDE;
    s->to_h = K * V;
    s->to_t = call->every ? row : 0;
    s->to_n = !call->every ? row : call->cu ? 0 : call->T * row;
  }
  return GLAC_OK;
}

/* `bytes` of an element of the gate. */
static int check_decode_pointers(const glac_decode *call, int gate, uint64_t bytes) {
  if (!call->q || !call->k || !call->v || !call->o) return GLAC_NULL;
  if (gate == LOWRANK_GATE ? !call->x || !call->w : gate == VECTOR_GATE && !call->g)
    return GLAC_NULL;
  if ((call->in_place || call->indices) && !call->from) return GLAC_NULL;
  if (call->every && !call->to) return GLAC_NULL;
  uint64_t all = call->q | call->k | call->v | call->o | call->from | call->to;
  if (gate == LOWRANK_GATE) all |= call->x | call->w | call->bias;
  if (gate == VECTOR_GATE) all |= call->g;
  if (all % 16 || call->cu % 4) return GLAC_ALIGNMENT;
  if (gate == SCALAR_GATE && call->g % bytes) return GLAC_ALIGNMENT;
  return call->indices && call->indices % (uint64_t)call->index_bytes ? GLAC_ALIGNMENT : GLAC_OK;
}

@FUNCTIONS@
const @PREFIX@_decode_row @PREFIX@_decode_rows[] = {
@ENTRIES@
};

const int @PREFIX@_decode_row_count =
    sizeof @PREFIX@_decode_rows / sizeof @PREFIX@_decode_rows[0];
"""
