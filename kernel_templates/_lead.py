"""The way of a program to its own segment: the state alone, from one end of the sequence.

Where sequences are short and heads few, segments that wait for the states of others cost more
launches than they save steps. A program can find the state at its segment's border by itself:

    forward    S' = 2^Gend . S + (k * 2^(Gend - G))^T v      from the first token to the segment
    reverse    D' = 2^Gend . D + (factor * q * 2^G)^T do     from the last token back to it

as ``gla_states`` does. Both factors are at most 1 for every gate <= 0, so there is no range to
leave. A step has one product beside the gate's sum and no output: half the work of others.
Measured at 8,1024,8,64,64: 35 us instead of 39 forward, 85 instead of 125 backward.
"""

import triton
import triton.language as tl

from glac.kernel_templates._bwd import (
    cumulative_log2_t,
    load_rows,
    logsigmoid_gate,
    lowrank_logits_t,
    triangles,
)
from glac.kernel_templates._gate import LOG2E, clamped, operand


@triton.jit
def lead_rows(src, rows, width, stride, BT: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr):
    """What ``load_rows`` reads tiles ``[BT, BC]`` from: a descriptor, or the pointer itself."""
    if TMA:
        return tl.make_tensor_descriptor(src, [rows, width], [stride, 1], [BT, BC])
    else:
        return src


@triton.jit
def load_step(
    s_k, s_v, s_g, b_w, b_bias, inv_normalizer, clamp_log2, t, n_tok, k0, v0, row_k, row_v, row_g,
    m_k, m_v, R: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BT: tl.constexpr, LOWRANK: tl.constexpr, BF16: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Keys ``[BT, BK]``, values ``[BT, BV]`` and gate of the chunk at t; names of ``lead_walk``.

    The gate is as it was loaded, ``[BT, BK]``, but a low-rank one ``[BK, BT]`` in log2.
    """
    row = tl.arange(0, BT)
    o_k = k0 + tl.arange(0, BK)
    o_v = v0 + tl.arange(0, BV)
    m_t = t + row < n_tok
    if LOWRANK:
        o_r = tl.arange(0, BR)
        m_tr = m_t[:, None] & (o_r < R)[None, :]
        b_x = load_rows(s_g, t, 0, row_g, o_r, m_tr, BT, False)
    else:
        b_g = load_rows(s_g, t, k0, row_g, o_k, m_t[:, None] & m_k[None, :], BT, TMA)
    b_k = load_rows(s_k, t, k0, row_k, o_k, m_t[:, None] & m_k[None, :], BT, TMA)
    b_v = load_rows(s_v, t, v0, row_v, o_v, m_t[:, None] & m_v[None, :], BT, TMA)
    if LOWRANK:
        b_y = lowrank_logits_t(b_w, b_x, b_bias, PRECISION)
        b_g = logsigmoid_gate(b_y, inv_normalizer, clamp_log2, BF16)
        b_g = tl.where(m_t[None, :], b_g, 0.0)  # tokens outside must not decay
    return b_k, b_v, b_g


@triton.jit
def lead_step(
    b_s,  # [BK, BV]
    b_k,  # [BT, BK], in reverse q
    b_v,  # [BT, BV], in reverse do
    b_g,  # [BT, BK] gate, low rank: [BK, BT] in log2
    upper,
    factor,
    BT: tl.constexpr,
    REVERSE: tl.constexpr,
    LOWRANK: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk of the walk."""
    row = tl.arange(0, BT)
    IO: tl.constexpr = b_v.dtype
    b_gt = b_g if LOWRANK else clamped(tl.trans(b_g))
    b_cum = cumulative_log2_t(b_gt, upper, LOWRANK, BF16)  # [BK, BT]
    b_end = tl.min(b_cum, 1)  # [BK], the last column: g <= 0 makes G fall along the chunk
    if REVERSE:
        kh = operand(tl.trans(b_k) * (tl.exp2(b_cum) * factor), IO)  # [BK, BT]
    else:
        b_after = b_end[:, None] - b_cum
        if PRECISION == "tf32x3":
            # See gla_states.
            m_after = (row[:, None] > row[None, :]).to(tl.float32)
            x_log2 = b_gt if LOWRANK else b_gt * LOG2E
            b_after = tl.dot(x_log2, m_after, input_precision=PRECISION)
        kh = operand(tl.trans(b_k) * tl.exp2(b_after), IO)  # [BK, BT]
    b_s = b_s * tl.exp2(b_end)[:, None]
    return tl.dot(kh, operand(b_v, IO), b_s, input_precision=PRECISION)


@triton.jit
def lead_walk(
    b_s,  # [BK, BV]
    s_k,  # rows of keys, in reverse of queries: descriptors of [BT, BK] tiles, or pointers
    s_v,  # rows of values, in reverse of the output's gradient
    s_g,  # rows of the gate, or of x
    b_w,  # [BK, BR]
    b_bias,  # [BK] bias * log2(e)
    factor,
    inv_normalizer,
    clamp_log2,
    t_begin,
    t_end,
    n_tok,
    k0,
    v0,
    row_k,
    row_v,
    row_g,
    m_k,
    m_v,
    R: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    STAGES: tl.constexpr,
    REVERSE: tl.constexpr,
    LOWRANK: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """The state behind tokens ``t_begin`` to ``t_end``; in reverse its gradient before them.

    ``t_begin`` is where a chunk begins; tokens from ``n_tok`` on do not exist.
    """
    if LOWRANK:
        SUMMAND: tl.constexpr = tl.float16 if BF16 else tl.float32
    else:
        GATE: tl.constexpr = s_g.dtype if TMA else s_g.dtype.element_ty
        SUMMAND: tl.constexpr = tl.bfloat16 if BF16 and GATE == tl.float32 else GATE
    upper, _lower = triangles(BT, SUMMAND, BF16)
    n_chunks = tl.cdiv(t_end - t_begin, BT)
    for i in tl.range(0, n_chunks, num_stages=STAGES):
        t = t_begin + (n_chunks - 1 - i if REVERSE else i) * BT
        b_k, b_v, b_g = load_step(
            s_k, s_v, s_g, b_w, b_bias, inv_normalizer, clamp_log2, t, n_tok, k0, v0,
            row_k, row_v, row_g, m_k, m_v, R, BR, BK, BV, BT, LOWRANK, BF16, PRECISION, TMA,
        )  # fmt: skip
        b_s = lead_step(b_s, b_k, b_v, b_g, upper, factor, BT, REVERSE, LOWRANK, BF16, PRECISION)
    return b_s
