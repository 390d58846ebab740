"""What the forward and the backward pass share in C."""

from __future__ import annotations

from collections.abc import Mapping

from glac.configs import BackwardConfig, ChunksBackwardConfig, Config, ForwardConfig, leads
from glac.emit_c.functions import Function
from glac.emit_c.launches import Launch, stride_of

ABOUT_FUNCTIONS = """\
/* One function for each row, its workspace in bytes (16-byte aligned device memory) asked for
   first. A workspace may be used again as soon as later work is enqueued on the same stream. */"""
SEGMENTS = {"n_seg": "s->n_seg", "seg_len": "s->seg_len"}


def cuts(config: Config) -> tuple[int, int]:
    """Tokens of a row's own segments, and what others are a multiple of; 0 where it has none."""
    if isinstance(config, BackwardConfig | ChunksBackwardConfig):
        return config.segment, config.chunk_step
    if isinstance(config, ForwardConfig) and (config.summary is not None or leads(config)):
        return config.segment, config.chunk_step
    return 0, 0


def row_fields(call: str) -> str:
    """The fields that only rows of passes have, whose functions take a ``call``."""
    return f"""\
  int32_t segment; /* what it cuts sequences into unless a call says otherwise, 0 for none */
  int32_t step;    /* of which segments are a multiple, 0 if it cannot cut */
  size_t (*workspace)(const {call} *call);
  int (*run)(glac_handle *handle, const {call} *call, uint64_t workspace,
             size_t workspace_bytes, void *stream);"""


def own_fields(item: Function) -> str:
    """Their values."""
    segment, step = cuts(item.config)
    return f"{segment}, {step}, {item.name}_workspace, {item.name}"


def segment_states(
    heads: str,
    k_group: str,
    states: str,
    decay: str,
    ends: str,
    when: str,
    *,
    reverse: bool = False,
) -> tuple[Launch, Launch]:
    """The launches of ``glac.plan.segment_states``; arguments are those, in C."""
    direction: Mapping[str, str] = {"reverse": str(int(reverse)), "out_scale": "1.0f"}
    if reverse:
        turned = {"k": "q", "v": "do"}
        direction = {
            **direction,
            "k": "call->q",
            "v": "call->dout",
            "out_scale": "(float)call->scale",
            **{f"{n}_{axis}": stride_of(o, axis) for n, o in turned.items() for axis in "bth"},
        }
    summary = Launch(
        "gla_states",
        {
            **SEGMENTS,
            "h0": "0",
            "starts": states,
            "states": "0",
            "decay": decay,
            "H": heads,
            "seg_first": "0",
            "seg_count": "s->n_seg",
            "keep": "1",
            "n_kept": "1",
            "k_group": k_group,
            "v_group": "1",
            "g_group": "1",
            "summarise": "1",
            "from_start": "0",
            "has_h0": "0",
            **direction,
        },
        f"(int64_t)s->n_seg * call->B * {heads}",
        when,
    )
    combine = Launch(
        "gla_combine",
        {
            **SEGMENTS,
            "states": states,
            "decay": decay,
            "ends": ends,
            "H": heads,
            "group": "1",
            "reverse": direction["reverse"],
            "has_ends": f"{ends} != 0",
        },
        f"(int64_t)s->N * {heads}",
        when,
    )
    return summary, combine


HELPERS = {
    "rows_fit": """
/* Rows of `width` elements do not overlap, and offsets in a tile of them have 32 bits. */
static int rows_fit(int64_t t, int64_t width) { return t >= width && t < @MAX_TOKEN_STRIDE@; }
""",
    "take": """
/* Where the next `bytes` of a workspace begin, which ends at `end` so far. */
static uint64_t take(uint64_t *end, size_t bytes) {
  uint64_t begin = *end;
  *end += (bytes + 255) / 256 * 256;
  return begin;
}
""",
    "larger": """
static size_t larger(size_t a, size_t b) { return a > b ? a : b; }
""",
    "check_workspace": """
static int check_workspace(uint64_t workspace, size_t bytes, uint64_t needed) {
  if (needed && (!workspace || bytes < needed)) return GLAC_WORKSPACE;
  return needed && workspace % 16 ? GLAC_ALIGNMENT : GLAC_OK;
}
""",
    "ceil_div": """
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
""",
    "segments_of": """
/* Slots of segments in a row of the tensors, and the tokens of a segment: glac.plan.segments_of.
   `segment` is 0 for whole sequences, `packed` counts the sequences of a packed batch. */
static void segments_of(int64_t T, int64_t segment, int64_t packed, int64_t *count,
                        int64_t *length) {
  *count = 1, *length = T;
  if (segment && segment < T) {
    *length = segment * ceil_div(T, segment * @MAX_SEGMENTS@);
    *count = ceil_div(T, *length);
  }
  if (!packed) return;
  if (*count > 1) {
    *count = T / *length + packed;
  } else {
    *count = packed;
    *length = T + 1;
  }
}
""",
}
"""C functions by name, each behind those that it calls."""
