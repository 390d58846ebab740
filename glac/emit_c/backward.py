"""Backward rows in C, as ``glac.backward`` and ``glac.scalar`` launch them.

Heads are not shared: where they are, PyTorch adds up gradients of the heads that share a tensor.
For the same reason tiles of V are not either (``glac.emit_c.functions.why_left_out``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from glac.configs import (
    BackwardConfig,
    ChunksBackwardConfig,
    ScalarBackwardConfig,
    leads,
    padded_k,
)
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
from glac.settings import DEFAULT_SCRATCH_BYTES
from glac.templates import state_dtype

KEEP_BYTES = DEFAULT_SCRATCH_BYTES
"""What C takes where a call does not say: it reads no environment."""

_GRADIENTS = {
    **{name: f"call->{name}" for name in ("h0", "dht", "dq", "dk", "dv", "dg", "dh0")},
    "do": "call->dout",
    "q_group": "1",
    "k_group": "1",
    "s_group": "1",
    "has_h0": "call->h0 != 0",
    "has_dht": "call->dht != 0",
    "has_dg": "call->dg != 0",
    "has_dh0": "call->dh0 != 0",
}
_HEADS = "(int64_t)s->N * s->H"


def _scalar_launches(config: ScalarBackwardConfig, parts: int) -> tuple[Launch, ...]:
    """Those of ``glac.scalar.run_backward``; walking leaves dg in ``parts``."""
    kept = {
        **_GRADIENTS,
        "states": "s->states",
        "dstates": "s->dstates",
        "n_chunk": "s->slots",
        "direction": "0",
        "directions": "2",
        "keep_states": "1",
        "ends": "call->dh0",
        "has_ends": "call->dh0 != 0",
        "B": "call->B",
    }
    if config.grads is None:
        return (
            Launch("scalar_states", kept, f"2 * {_HEADS}"),
            Launch("scalar_bwd_chunks", kept, "(int64_t)s->slots * call->B * s->H"),
        )
    forward = {"directions": "1", "dht": "0", "has_dht": "0", "ends": "0", "has_ends": "0"}
    behind = {"parts": "s->parts", "n_parts": f"s->parts ? {parts} : 0"}
    return (
        Launch("scalar_states", {**kept, **forward}, _HEADS),
        Launch("scalar_bwd", {**kept, "dg": "s->parts ? s->parts : call->dg"}, _HEADS),
        Launch("scalar_bwd_dv", {**kept, **behind}, _HEADS),
    )


_AT_ONCE = "(int64_t)s->seg_count * call->B * s->H"
_WALK = {
    **_GRADIENTS,
    **SEGMENTS,
    **{f: f"s->{f}" for f in ("states", "ends", "flags", "n_kept")},
    "B": "call->B",
    "seg_first": "s->seg_first",
    "seg_count": "s->seg_count",
    "chain": "s->chained",
}
_DV = Launch("gla_bwd_dv", _WALK, "(int64_t)s->n_seg * call->B * s->H")
_BORDERS = (
    *segment_states("s->H", "1", "s->starts", "s->decay", "call->h0", "!s->chained"),
    *segment_states("s->H", "1", "s->ends", "s->d_ends", "call->dht", "!s->chained", reverse=True),
)
"""Launches that find the state before each segment, and the gradient of the one behind it."""


def _segment_launches(config: BackwardConfig) -> tuple[Launch, ...]:
    """Launches for some segments: the states that are kept, and gradients from them."""
    kept = {
        **_WALK,
        "starts": "s->starts",
        "decay": "0",
        "out_scale": "1.0f",
        "keep": str(config.grads.kept_tokens),
        "v_group": "1",
        "g_group": "1",
        "reverse": "0",
        "summarise": "0",
        "from_start": "s->from_start",
    }
    states = () if leads(config) else (Launch("gla_states", kept, _AT_ONCE),)
    return (
        *states,
        Launch("gla_bwd", _WALK, _AT_ONCE),
        Launch("gla_bwd_exact", _WALK, _AT_ONCE),
    )


_GROUPS_OF_ONE = {"q_group": "1", "k_group": "1", "s_group": "1"}
_PREPARED = {f: f"s->{f}" for f in ("qs", "ks", "scores", "n_chunks")}
_BOTH_SIDES = {**_GRADIENTS, **SEGMENTS, **{f: f"s->{f}" for f in ("states", "dstates", "n_kept")}}


def _at_once_launches(config: ChunksBackwardConfig) -> tuple[Launch, ...]:
    """Those of ``glac.chunks_backward``, behind the segments' borders."""
    prepare = {**_GROUPS_OF_ONE, **_PREPARED, "ends": "s->decays", "flags": "s->chunk_flags"}
    walks = {
        **{**_BOTH_SIDES, **_PREPARED},
        **{"starts": "s->starts", "ends": "s->ends", "decays": "s->decays"},
        **{"flags": "s->chunk_flags", "keep": str(config.chunks.kept_tokens)},
    }
    chunks = {
        **{**_BOTH_SIDES, **{f: f"s->{f}" for f in ("qs", "ks", "decays", "flags")}},
        **{"ranges": "s->chunk_flags", "n_prepared": "s->n_chunks"},
        "prepared": str(config.prepare.chunk),
    }
    segments = "(int64_t)s->n_seg * call->B * s->H"
    both = f"{segments} * s->n_kept * {config.chunks.keep}"
    return (
        Launch("gla_prepare", prepare, "(int64_t)s->n_chunks * call->B * s->H"),
        Launch("gla_bwd_walks", walks, segments),
        Launch("gla_bwd_walks_exact", walks, segments),
        Launch("gla_bwd_chunks", chunks, both),
        Launch("gla_bwd_chunks_exact", chunks, both),
    )


def _define(item: Function, kernels: Kernels) -> Iterator[str]:
    spec, config = item.spec, item.config
    gate, strided = gate_of(spec), units(spec)
    strided["do"] = strided["v"]
    sized = [
        f"  int status = gradient_sizes_of(call, workspace, s, {gate}, {spec.K}, {spec.V});",
        "  if (status) return status;",
    ]
    bytes_each = state_dtype(spec).itemsize
    if isinstance(config, ScalarBackwardConfig):
        parts = 1 if config.grads is None else config.grads.tiles(spec)
        launches = _scalar_launches(config, parts)
        body = _launched(item, kernels, launches)
        sizes = (config.chunk, spec.K, spec.V, bytes_each, int(config.grads is None), parts)
        sized.append(f"  status = take_chunk_states(call, s, {', '.join(map(str, sizes))});")
    elif isinstance(config, ChunksBackwardConfig):
        launches = (*_BORDERS, *_at_once_launches(config))
        body = _launched(item, kernels, launches)
        segment, step = cuts(config)
        way = {
            "segment": segment,
            "step": step,
            "kept_tokens": config.chunks.kept_tokens,
            "tiles": kernels.of(item, launches[-1]).tiles * config.chunks.keep,
            "state_bytes": spec.K * spec.V * bytes_each,
        }
        tile = (config.prepare.chunk, padded_k(spec), bytes_each, spec.K, spec.V)
        sized = [
            f"  static const row_way way = {{{_fields(way)}}};",
            *sized,
            f"  status = take_at_once(call, s, &way, {', '.join(map(str, tile))});",
        ]
    else:
        assert isinstance(config, BackwardConfig)
        inner = _segment_launches(config)
        borders = () if leads(config) else _BORDERS
        behind = () if config.dv is None else (_DV,)
        launches = (*borders, *inner, *behind)
        body = [
            *_launched(item, kernels, borders),
            "  while (next_segments(s)) {",
            *_launched(item, kernels, inner, "    "),
            "  }",
            *_launched(item, kernels, behind),
        ]
        segment, step = cuts(config)
        grads = config.grads
        way = {
            "segment": segment,
            "step": step,
            "kept_tokens": grads.kept_tokens,
            "tiles": kernels.of(item, inner[-1]).tiles,
            "state_bytes": spec.K * spec.V * bytes_each,
            "again_bytes": grads.found_again * bytes_each,
            "leads": int(leads(config)),
        }
        sized = [
            f"  static const row_way way = {{{_fields(way)}}};",
            *sized,
            f"  status = take_segments(call, s, &way, {spec.K}, {spec.V});",
        ]
    return workspace_functions(
        item,
        kernels,
        launches,
        types=("glac_backward", "gradient_sizes"),
        sized=sized,
        checks=(
            *constants(strided),
            f"  status = check_gradients(call, {gate});",
            "  if (status) return status;",
            *stride_checks(spec, strided, rows=True),
        ),
        body=body,
    )


def _fields(values: Mapping[str, int]) -> str:
    return ", ".join(f".{name} = {value}" for name, value in values.items())


def _launched(
    item: Function, kernels: Kernels, launches: Iterable[Launch], indent: str = "  "
) -> list[str]:
    return [line for launch in launches for line in kernels.lines(item, launch, indent)]


_CALL = """
#ifndef GLAC_BACKWARD_DEFINED
#define GLAC_BACKWARD_DEFINED

/* The gradients of one forward pass, from its inputs and the gradients of its results:
   S_t = diag(exp g_t) S_{t-1} + k_t^T v_t,  o_t = scale * q_t S_t
   All have the same heads. A scalar gate is one number for all channels, and its sequences are
   never cut. */
typedef struct glac_backward {
  uint64_t q, k, v;    /* [B, T, H, K], [B, T, H, K], [B, T, H, V] */
  uint64_t g;          /* [B, T, H, K], natural log of each step's decay; of a scalar gate
                          [B, T, H] of any strides (g_h alone for one number per head), or 0 for
                          no decay */
  uint64_t cu;         /* [N + 1] in int32, boundaries of a packed batch, or 0 */
  uint64_t h0;         /* initial state [N, H, K, V] in fp32, or 0 for zeros */
  uint64_t dout;       /* gradient of o, [B, T, H, V] */
  uint64_t dht;        /* gradient of the final state [N, H, K, V] in fp32, or 0 for zeros */
  uint64_t dq, dk, dv; /* gradients, contiguous */
  uint64_t dg;         /* gradient of g in its dtype, contiguous; of a scalar gate [B, T, H] in
                          fp32 whatever its strides and dtype, or 0 */
  uint64_t dh0;        /* gradient of the initial state [N, H, K, V] in fp32, or 0 */
  int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, g_b, g_t, g_h;
  int32_t B, T;        /* B is 1 with cu */
  int32_t H;
  int32_t N;           /* sequences of a packed batch; not read without cu */
  int32_t segment;     /* tokens of the segments that share a sequence, a multiple of the row's
                          step; 0 for the row's own, below 0 to cut none */
  int64_t keep_bytes;  /* of states that are kept at a time, where there is a choice; 0 for what
                          GLAC_SCRATCH_MIB is by default */
  double scale;        /* of the forward pass */
} glac_backward;

#endif /* GLAC_BACKWARD_DEFINED */
"""

_HELPERS = {
    "gradient_sizes_of": """
/* What follows from the sizes of a call, and where the parts of its workspace are. */
typedef struct gradient_sizes {
  int32_t H, N, has_g, slots, n_seg, seg_len, at_once, seg_first, seg_count, n_kept, n_chunks;
  int32_t chained, from_start;
  int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, g_b, g_t, g_h;
  uint64_t states, dstates, parts, starts, decay, ends, d_ends, flags;
  uint64_t qs, ks, scores, decays, chunk_flags;
  uint64_t scratch, end, nothing;
} gradient_sizes;

static int gradient_sizes_of(const glac_backward *call, uint64_t workspace, gradient_sizes *s,
                             int gate, int64_t K, int64_t V) {
  static const gradient_sizes none;
  *s = none;
  int status = check_sizes(call->B, call->T, call->H, call->H, call->H, call->cu != 0, call->N,
                           K > V ? K : V);
  if (status) return status;
  s->H = call->H;
  s->N = call->cu ? call->N : call->B;
  s->end = workspace;
  s->has_g = call->g != 0;
  s->q_b = call->q_b, s->q_t = call->q_t, s->q_h = call->q_h;
  s->k_b = call->k_b, s->k_t = call->k_t, s->k_h = call->k_h;
  s->v_b = call->v_b, s->v_t = call->v_t, s->v_h = call->v_h;
  s->do_b = call->do_b, s->do_t = call->do_t, s->do_h = call->do_h;
  strides(&s->q_b, &s->q_t, &s->q_h, call->T, call->H, K);
  strides(&s->k_b, &s->k_t, &s->k_h, call->T, call->H, K);
  strides(&s->v_b, &s->v_t, &s->v_h, call->T, call->H, V);
  strides(&s->do_b, &s->do_t, &s->do_h, call->T, call->H, V);
  if (s->has_g) {
    s->g_b = call->g_b, s->g_t = call->g_t, s->g_h = call->g_h;
    strides(&s->g_b, &s->g_t, &s->g_h, call->T, call->H, gate == SCALAR_GATE ? 1 : K);
  }
  return GLAC_OK;
}
""",
    "take_chunk_states": """
/* Memory for the state at the start of each chunk of `chunk` tokens, in elements of `bytes`, with
   `both` for its gradient at the end, and for `parts` of the gradient of g if they are several. */
static int take_chunk_states(const glac_backward *call, gradient_sizes *s, int64_t chunk,
                             int64_t K, int64_t V, size_t bytes, int both, int parts) {
  if (call->segment > 0) return GLAC_SEGMENT;
  int64_t slots = call->cu ? call->T / chunk + s->N : ceil_div(call->T, chunk);
  /* Programs of all launches, which are counted in 31 bits. */
  int64_t tiles = ceil_div(V, 16) * ceil_div(K, 16) * 2 * s->N, rows = slots * call->B;
  if (s->H > 2147483647 / (rows > tiles ? rows : tiles)) return GLAC_SIZE;
  size_t states = (size_t)rows * (size_t)s->H * (size_t)(K * V) * bytes;
  s->slots = (int32_t)slots;
  s->states = take(&s->end, states);
  if (both) s->dstates = take(&s->end, states);
  if (parts > 1 && call->dg)
    s->parts = take(&s->end, (size_t)parts * (size_t)call->B * (size_t)call->T * (size_t)s->H * 4);
  return GLAC_OK;
}
""",
    "cut_segments": """
/* What a row says of its way through sequences. */
typedef struct row_way {
  int64_t segment, step;  /* tokens of its segments, what others are a multiple of */
  int64_t kept_tokens;    /* from one kept state to the next */
  int64_t tiles;          /* programs of a segment of a head, or of one of its kept states */
  int64_t state_bytes;    /* of one that is kept */
  int64_t again_bytes;    /* of those that a program finds again between kept ones */
  int64_t leads;          /* whether programs find the states before and behind segments */
} row_way;

/* Slots of segments in a row of the tensors, and tokens of each, as a row or a call wants them. */
static int cut_segments(const glac_backward *call, const row_way *way, int64_t *count,
                        int64_t *length) {
  int64_t T = call->T, packed = call->cu ? call->N : 0, segment = way->segment;
  if (call->segment > 0 && call->segment % way->step) return GLAC_SEGMENT;
  if (call->segment) segment = call->segment > 0 ? call->segment : 0;
  if (packed && !segment) segment = way->step * ceil_div(@PACKED_SEGMENT@, way->step);
  if (packed && segment >= T) {
    *count = packed + 1;
    *length = way->step * ceil_div(T, way->step);
  } else {
    segments_of(T, segment, packed, count, length);
  }
  return GLAC_OK;
}
""",
    "cut": """
/* Segments, or windows of whole sequences, and how many go into one launch: glac.backward.cut. */
static int cut(const glac_backward *call, gradient_sizes *s, const row_way *way) {
  int64_t T = call->T, count, length;
  int64_t keep_bytes = call->keep_bytes ? call->keep_bytes : @KEEP_BYTES@;
  int64_t states = (int64_t)call->B * call->H; /* that are kept at one token */
  int status = cut_segments(call, way, &count, &length);
  if (status) return status;
  if (call->keep_bytes < 0) return GLAC_SIZE;
  s->chained = count == 1 && !call->cu && !way->leads;
  int64_t at_once = 1;
  if (s->chained) {
    int64_t steps = ceil_div(T, way->step), windows = 1;
    if (ceil_div(T, way->kept_tokens) > keep_bytes / way->state_bytes / states)
      windows = steps < @WINDOWS@ ? steps : @WINDOWS@;
    length = way->step * ceil_div(steps, windows);
    count = ceil_div(T, length);
  } else {
    int64_t fitting = keep_bytes / way->state_bytes / states / ceil_div(length, way->kept_tokens);
    int64_t filling = ceil_div(@PROGRAMS@, way->tiles * states);
    at_once = ceil_div(count, ceil_div(count, fitting > filling ? fitting : filling));
  }
  /* The largest grid of any config counts programs in 31 bits: 32 tiles have 16 channels. */
  if (count > 2147483647 / 32 / states) return GLAC_SIZE;
  s->n_seg = s->seg_first = (int32_t)count;
  s->at_once = s->seg_count = (int32_t)at_once;
  s->seg_len = (int32_t)length;
  s->n_kept = (int32_t)ceil_div(length < T ? length : T, way->kept_tokens);
  return GLAC_OK;
}
""",
    "take_borders": """
/* Memory for the states at `borders` of segments, for their gradients, and for both chains. */
static void take_borders(gradient_sizes *s, size_t borders, int64_t K, int64_t V) {
  size_t state = (size_t)(K * V) * 4, gates = (size_t)K * 4;
  s->starts = take(&s->end, borders * state);
  s->decay = take(&s->end, borders * gates);
  s->ends = take(&s->end, borders * state);
  s->d_ends = take(&s->end, borders * gates);
}
""",
    "take_segments": """
/* Memory for the states at borders of segments, and for those that are kept. */
static int take_segments(const glac_backward *call, gradient_sizes *s, const row_way *way,
                         int64_t K, int64_t V) {
  int status = cut(call, s, way);
  if (status) return status;
  size_t heads = (size_t)call->B * (size_t)s->H, programs = heads * (size_t)s->at_once;
  size_t borders = heads * (size_t)s->n_seg, state = (size_t)(K * V) * 4;
  if (way->leads) {
    s->ends = take(&s->end, borders * state);
  } else if (!s->chained) {
    take_borders(s, borders, K, V);
  } else if (s->n_seg > 1) {
    /* The gradient behind window j - 1 takes the place of the state before window j. */
    s->starts = take(&s->end, borders * state);
    s->ends = s->starts + state;
  }
  /* Behind the kept states those that programs find again. */
  size_t kept = programs * (size_t)s->n_kept * (size_t)way->state_bytes;
  programs *= (size_t)way->tiles;
  s->states = take(&s->end, kept + programs * (size_t)way->again_bytes);
  s->flags = take(&s->end, programs * 4);
  return GLAC_OK;
}
""",
    "take_at_once": """
/* Memory for chunks of `walked` tokens in tiles of `keys` channels with elements of `bytes`, as
   gla_prepare makes them, and for the states on both sides of chunks of gradients, or of pairs. */
static int take_at_once(const glac_backward *call, gradient_sizes *s, const row_way *way,
                        int64_t walked, int64_t keys, size_t bytes, int64_t K, int64_t V) {
  int64_t T = call->T, count, length;
  int status = cut_segments(call, way, &count, &length);
  if (status) return status;
  s->chained = count == 1 && !call->cu;
  int64_t kept = ceil_div(length < T ? length : T, way->kept_tokens);
  int64_t slots = call->cu ? T / walked + s->N : ceil_div(T, walked);
  int64_t states = (int64_t)call->B * s->H, most = slots > count * kept ? slots : count * kept;
  /* Programs are counted in 31 bits: a chunk of a head has at most 32 tiles. */
  if (most > 2147483647 / 64 / states) return GLAC_SIZE;
  s->n_seg = (int32_t)count, s->seg_len = (int32_t)length;
  s->n_kept = (int32_t)kept, s->n_chunks = (int32_t)slots;
  size_t heads = (size_t)states, borders = heads * (size_t)count;
  if (!s->chained) take_borders(s, borders, K, V);
  size_t chunks = heads * (size_t)slots, tile = (size_t)(walked * keys) * bytes;
  s->qs = take(&s->end, chunks * tile);
  s->ks = take(&s->end, chunks * tile);
  s->scores = take(&s->end, chunks * (size_t)(walked * walked) * bytes);
  s->decays = take(&s->end, chunks * (size_t)keys * 4);
  s->chunk_flags = take(&s->end, chunks * 4);
  size_t both = borders * (size_t)kept;
  s->states = take(&s->end, both * (size_t)way->state_bytes);
  s->dstates = take(&s->end, both * (size_t)way->state_bytes);
  s->flags = take(&s->end, both * (size_t)way->tiles * 4);
  return GLAC_OK;
}
""",
    "next_segments": """
/* The segments of the next launch, from the last one back; 0 when there are no more. */
static int next_segments(gradient_sizes *s) {
  int32_t last = s->seg_first;
  if (!last) return 0;
  s->seg_first = last > s->at_once ? last - s->at_once : 0;
  s->seg_count = last - s->seg_first;
  /* The last window's walk starts at the first token, and leaves the windows' own starts. */
  s->from_start = s->chained && last == s->n_seg && last > 1;
  return 1;
}
""",
    "check_gradients": """
static int check_gradients(const glac_backward *call, int gate) {
  if (!call->q || !call->k || !call->v || !call->dout) return GLAC_NULL;
  if (!call->dq || !call->dk || !call->dv) return GLAC_NULL;
  if (gate == VECTOR_GATE && (!call->g || !call->dg)) return GLAC_NULL;
  uint64_t all = call->q | call->k | call->v | call->g | call->h0 | call->dout | call->dht;
  all |= call->dq | call->dk | call->dv | call->dg | call->dh0;
  return all % 16 || call->cu % 4 ? GLAC_ALIGNMENT : GLAC_OK;
}
""",
}

BACKWARD = Part(
    serves=(BackwardConfig, ChunksBackwardConfig, ScalarBackwardConfig),
    call="glac_backward",
    call_text=_CALL,
    row="backward_row",
    about_row="One row of the backward pass.",
    row_fields=row_fields("glac_backward"),
    about_functions=ABOUT_FUNCTIONS,
    workspace=True,
    helpers=_HELPERS,
    own_fields=own_fields,
    define=_define,
)
