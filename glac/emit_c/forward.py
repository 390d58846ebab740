"""Forward rows in C, as ``glac.forward`` and ``glac.scalar`` launch them.

A scalar gate's sequences are walked whole. Where Python cuts them (``glac.scalar_segments``),
PyTorch sums up the gates of each segment.
"""

from __future__ import annotations

from collections.abc import Iterator

from glac.configs import ForwardConfig, ScalarForwardConfig, padded_k
from glac.emit_c.functions import Function
from glac.emit_c.launches import (
    Kernels,
    Launch,
    constants,
    gate_of,
    stride_checks,
    units,
    workspace_functions,
)
from glac.emit_c.part import Part
from glac.emit_c.passes import (
    ABOUT_FUNCTIONS,
    SEGMENTS,
    cuts,
    own_fields,
    row_fields,
    segment_states,
)
from glac.templates import state_dtype

_CHUNKS = {name: f"s->{name}" for name in ("qs", "ks", "scores", "ends", "flags", "n_chunks")}
_RESULTS = {
    "o": "call->o",
    "h0": "call->h0",
    "ht": "call->ht",
    "has_h0": "call->h0 != 0",
    "has_ht": "call->ht != 0",
}
_OUTPUT = {**_RESULTS, **SEGMENTS, "starts": "s->segmented ? s->states : 0"}
_SUMMARY = {"o": "call->o", "starts": "s->states", "decay": "s->decay"}
_STATE_HEADS = "(int64_t)s->n_seg * call->B * call->Hs"
_HEADS = "(int64_t)s->n_seg * call->B * s->H"
_LAUNCHES = {
    launch.template: launch
    for launch in (
        Launch("gla_prepare", _CHUNKS, "(int64_t)s->n_chunks * call->B * s->H"),
        *segment_states(
            heads="call->Hs",
            k_group="call->Hs / call->Hk",
            states="s->states",
            decay="s->decay",
            ends="call->h0",
            when="s->segmented",
        ),
        Launch(
            "gla_walk_states", {**_CHUNKS, **SEGMENTS, **_SUMMARY}, _STATE_HEADS, "s->segmented"
        ),
        Launch("gla_fwd", _OUTPUT, _HEADS),
        Launch("gla_walk", {**_CHUNKS, **_OUTPUT}, _HEADS),
        Launch("scalar_fwd", _RESULTS, "(int64_t)s->N * s->H"),
    )
}


def _define(item: Function, kernels: Kernels) -> Iterator[str]:
    spec, config = item.spec, item.config
    gate, strided = gate_of(spec), units(spec)
    launches = [_LAUNCHES[template] for template in config.kernels()]
    segment, step = cuts(config)
    numbers = f"{gate}, {spec.K}, {spec.V}, {spec.rank}, {segment}, {step}"
    sized = [f"  int status = sizes_of(call, workspace, s, {numbers});"]
    if isinstance(config, ForwardConfig) and config.prepare is not None:
        tile = f"{config.prepare.chunk}, {padded_k(spec)}, {state_dtype(spec).itemsize}"
        sized += [
            "  if (status) return status;",
            f"  status = take_chunks(call, s, {tile});",
        ]
    return workspace_functions(
        item,
        kernels,
        launches,
        types=("glac_forward", "sizes"),
        sized=sized,
        checks=(
            *constants(strided),
            f"  status = check_pointers(call, {gate});",
            "  if (status) return status;",
            *stride_checks(spec, strided, rows=True),
        ),
        body=(line for launch in launches for line in kernels.lines(item, launch)),
    )


_CALL = """
#ifndef GLAC_FORWARD_DEFINED
#define GLAC_FORWARD_DEFINED

/* One forward pass:  S_t = diag(exp g_t) S_{t-1} + k_t^T v_t,  o_t = scale * q_t S_t
   A scalar gate is one number for all channels, and its sequences are never cut. */
typedef struct glac_forward {
  uint64_t q, k, v;    /* [B, T, Hq, K], [B, T, Hk, K], [B, T, Hs, V] */
  uint64_t g;          /* [B, T, Hs, K], natural log of each step's decay; of a scalar gate
                          [B, T, Hs] of any strides (g_h alone for one number per head), or 0 for
                          no decay */
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

_HELPERS = {
    "sizes_of": """
/* What follows from the sizes of a call, and where the parts of its workspace are. */
typedef struct sizes {
  int32_t H, N, n_seg, seg_len, segmented, n_chunks, has_g;
  int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, x_b, x_t;
  uint64_t states, decay, qs, ks, scores, ends, flags, scratch, end, nothing;
} sizes;

/* `segment` is the row's own; `step` is what others are a multiple of, 0 if there are none. */
static int sizes_of(const glac_forward *call, uint64_t workspace, sizes *s, int gate, int64_t K,
                    int64_t V, int64_t rank, int64_t segment, int64_t step) {
  static const sizes none;
  *s = none;
  int status = check_sizes(call->B, call->T, call->Hq, call->Hk, call->Hs, call->cu != 0, call->N,
                           K > V ? K : V);
  if (status) return status;
  if (call->segment > 0 && (!step || call->segment % step)) return GLAC_SEGMENT;
  if (call->segment) segment = call->segment > 0 ? call->segment : 0;
  s->H = call->Hq > call->Hs ? call->Hq : call->Hs;
  s->N = call->cu ? call->N : call->B;
  int64_t T = call->T, count, length;
  segments_of(T, segment, call->cu ? call->N : 0, &count, &length);
  /* The largest grid of any config counts programs in 31 bits. */
  int64_t tiles = ((K > V ? K : V) + 15) / 16;
  if (s->H > 2147483647 / tiles / call->B / count) return GLAC_SIZE;
  s->n_seg = (int32_t)count;
  s->seg_len = (int32_t)length;
  s->segmented = length < T;
  s->end = workspace;
  if (s->segmented) {
    size_t states = (size_t)call->B * (size_t)call->Hs * (size_t)count;
    s->states = take(&s->end, states * (size_t)K * (size_t)V * 4);
    s->decay = take(&s->end, states * (size_t)K * 4);
  }
  s->has_g = gate != LOWRANK_GATE && call->g;
  s->q_b = call->q_b, s->q_t = call->q_t, s->q_h = call->q_h;
  s->k_b = call->k_b, s->k_t = call->k_t, s->k_h = call->k_h;
  s->v_b = call->v_b, s->v_t = call->v_t, s->v_h = call->v_h;
  s->x_b = call->x_b, s->x_t = call->x_t;
  strides(&s->q_b, &s->q_t, &s->q_h, T, call->Hq, K);
  strides(&s->k_b, &s->k_t, &s->k_h, T, call->Hk, K);
  strides(&s->v_b, &s->v_t, &s->v_h, T, call->Hs, V);
  if (s->has_g) {
    s->g_b = call->g_b, s->g_t = call->g_t, s->g_h = call->g_h;
    strides(&s->g_b, &s->g_t, &s->g_h, T, call->Hs, gate == SCALAR_GATE ? 1 : K);
  }
  int64_t unused = 0;
  strides(&s->x_b, &s->x_t, &unused, T, 1, rank);
  return GLAC_OK;
}
""",
    "take_chunks": """
/* Memory for what gla_prepare makes of chunks of `chunk` tokens, in tiles of `keys` channels with
   elements of `bytes`. */
static int take_chunks(const glac_forward *call, sizes *s, int64_t chunk, int64_t keys,
                       size_t bytes) {
  int64_t slots = call->cu ? call->T / chunk + call->N : ceil_div(call->T, chunk);
  if (s->H > 2147483647 / call->B / slots) return GLAC_SIZE;
  size_t chunks = (size_t)slots * (size_t)call->B * (size_t)s->H;
  s->n_chunks = (int32_t)slots;
  s->qs = take(&s->end, chunks * (size_t)(chunk * keys) * bytes);
  s->ks = take(&s->end, chunks * (size_t)(chunk * keys) * bytes);
  s->scores = take(&s->end, chunks * (size_t)(chunk * chunk) * bytes);
  s->ends = take(&s->end, chunks * (size_t)keys * 4);
  s->flags = take(&s->end, chunks * 4);
  return GLAC_OK;
}
""",
    "check_pointers": """
static int check_pointers(const glac_forward *call, int gate) {
  if (!call->q || !call->k || !call->v || !call->o) return GLAC_NULL;
  if (gate == LOWRANK_GATE ? !call->x || !call->w : gate == VECTOR_GATE && !call->g)
    return GLAC_NULL;
  uint64_t all = call->q | call->k | call->v | call->o | call->h0 | call->ht;
  all |= gate == LOWRANK_GATE ? call->x | call->w | call->bias : call->g;
  return all % 16 || call->cu % 4 ? GLAC_ALIGNMENT : GLAC_OK;
}
""",
}

FORWARD = Part(
    serves=(ForwardConfig, ScalarForwardConfig),
    call="glac_forward",
    call_text=_CALL,
    row="row",
    about_row="One row: which function serves a problem on a GPU near which sizes.",
    row_fields=row_fields("glac_forward"),
    about_functions=ABOUT_FUNCTIONS,
    workspace=True,
    helpers=_HELPERS,
    own_fields=own_fields,
    define=_define,
)
