"""Decode rows in C, as ``glac.decode`` launches them."""

from __future__ import annotations

from collections.abc import Iterator

from glac.configs import DecodeConfig
from glac.emit_c.functions import Function
from glac.emit_c.launches import Kernels, Launch, constants, gate_of, stride_checks, units
from glac.emit_c.part import Part
from glac.errors import GlacError
from glac.templates import stride_unit

_LAUNCH = Launch(
    "gla_decode",
    {
        "from32": "s->state_in == 1 ? call->from : 0",
        "from16": "s->state_in == 2 ? call->from : 0",
        "to32": "s->state_out == 1 ? s->to : 0",
        "to16": "s->state_out == 2 ? s->to : 0",
        "idx": "call->indices",
        "o": "call->o",
        "n_slots": "s->slots",
        "idx_step": "s->idx_step",
        "state_in": "s->state_in",
        "state_out": "s->state_out",
        "in_place": "call->in_place != 0",
        "per_token": "call->every != 0",
    },
    "(int64_t)s->N * call->Hs",
)


def _define(item: Function, kernels: Kernels) -> Iterator[str]:
    spec = item.spec
    kernel = kernels.of(item, _LAUNCH)
    if kernel.scratch_bytes:
        raise GlacError(f"{kernel.name} wants scratch memory, which decoding in C has not")
    state = stride_unit(spec.K * spec.V)
    strided, gate = units(spec), gate_of(spec)
    yield from (
        f"int {item.name}(glac_handle *handle, const glac_decode *call,",
        "    void *stream) {",
        "  decode_sizes sizes_of_call, *s = &sizes_of_call;",
        "  if (!handle || !call) return GLAC_NULL;",
        f"  int status = decode_sizes_of(call, s, {gate}, {spec.K}, {spec.V}, {spec.rank});",
        "  if (status) return status;",
        *constants({**strided, "from": state, "to": state}),
        f"  status = check_decode_pointers(call, {gate}, {spec.gate_dtype.itemsize});",
        "  if (status) return status;",
        *stride_checks(spec, strided, rows=False),
        "  if (!strides_fit(s->from_n, 0, s->from_h, unit_from)) return GLAC_STRIDE;",
        "  if (!strides_fit(s->to_n, s->to_t, s->to_h, unit_to)) return GLAC_STRIDE;",
        *kernels.lines(item, _LAUNCH),
        "  return GLAC_OK;",
        "}",
        "",
    )


_CALL = """
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

_ROW_FIELDS = """\
  int (*run)(glac_handle *handle, const glac_decode *call, void *stream);"""

_HELPERS = {
    "decode_sizes_of": """
/* What follows from the sizes of a call for decoding: glac.decode.launch. */
typedef struct decode_sizes {
  int32_t H, N, slots, idx_step, has_g, state_in, state_out;
  int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, x_b, x_t;
  int64_t from_n, from_h, to_n, to_t, to_h;
  uint64_t to, nothing;
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
""",
    "check_decode_pointers": """
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
""",
}

DECODE = Part(
    serves=(DecodeConfig,),
    call="glac_decode",
    call_text=_CALL,
    row="decode_row",
    about_row="One row of decoding.",
    row_fields=_ROW_FIELDS,
    about_functions="/* One function for each row. */",
    workspace=False,
    helpers=_HELPERS,
    own_fields=lambda item: item.name,
    define=_define,
)
