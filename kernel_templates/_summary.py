"""What a segment adds to the state behind it, walked from that border inwards.

    forward    C = sum_t (k_t * 2^(A_end - A_t))^T v_t         from the last chunk to the first
    reverse    D = sum_t (q_t * 2^(A_t))^T do_t                from the first chunk to the last

with A the cumulative gate (log2) since the segment began. A gate forgets: once every channel has
decayed by 2^160 between a token and the border, its factor is 0 in fp32, as are those of all
tokens beyond, and the walk stops. The result is the same, bit for bit, as if it went on. It looks
every SPAN tokens, as a loop of its own for each look is a pipeline that fills again. Gates that
forget slowly let it walk through the whole segment.

With gates logsigmoid(N(0, 1)) / 16 that is after 2300 tokens.
"""

import triton
import triton.language as tl

from glac.kernel_templates._bwd import cumulative_log2_t
from glac.kernel_templates._gate import LOG2E, STEP_MIN_LOG2, clamped, operand
from glac.kernel_templates._lead import load_step

SPAN = tl.constexpr(512)
"""Tokens between two looks."""


@triton.jit
def summary_walk(
    b_s,  # [BK, BV] zeros
    s_k,  # rows of keys, in reverse of queries: a descriptor of [BT, BK] tiles, or a pointer
    s_v,  # rows of values, in reverse of the output's gradient
    s_g,  # rows of the gate, or of x
    b_w,  # [BK, BR]
    b_bias,  # [BK] bias * log2(e)
    inv_normalizer,
    clamp_log2,
    upper,
    reverse,
    t_begin,
    t_end,
    n_tok,
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
    LOWRANK: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """The sum ``[BK, BV]``, and the decays ``[BK]`` of the tokens that were walked, in log2."""
    IO: tl.constexpr = s_v.dtype if TMA else s_v.dtype.element_ty
    row = tl.arange(0, BT)
    b_total = tl.zeros([BK], dtype=tl.float32)
    # Weights of G and Gend in the exponent of the factor: Gend - G, in reverse G.
    sign = tl.where(reverse != 0, 1.0, -1.0)
    whole = tl.where(reverse != 0, 0.0, 1.0)
    n_chunks = tl.cdiv(t_end - t_begin, BT)
    c_first = tl.where(reverse != 0, 0, n_chunks - 1)
    c_step = tl.where(reverse != 0, 1, -1)
    adds = n_chunks * 0 + 1
    seen = n_chunks * 0
    # Not a range with no steps in its later rounds: of a number that is carried along and used for
    # the bounds of an inner range alone, Triton 3.7 takes the first value for all of them.
    while (adds != 0) & (seen < n_chunks):
        n_here = tl.minimum(n_chunks - seen, SPAN // BT)
        for i in tl.range(0, n_here, num_stages=STAGES):
            t = t_begin + (c_first + (seen + i) * c_step) * BT
            b_k, b_v, b_g = load_step(
                s_k, s_v, s_g, b_w, b_bias, inv_normalizer, clamp_log2, t, n_tok, 0, v0,
                row_k, row_v, row_g, m_k, m_v, R, BR, BK, BV, BT, LOWRANK, BF16, PRECISION, TMA,
            )  # fmt: skip
            b_gt = b_g if LOWRANK else clamped(tl.trans(b_g))
            b_cum = cumulative_log2_t(b_gt, upper, LOWRANK, BF16)  # [BK, BT]
            b_end = tl.min(b_cum, 1)  # [BK], the last column: g <= 0 makes G fall
            if PRECISION == "tf32x3":
                # See gla_states.
                after = (row[:, None] > row[None, :]).to(tl.float32)
                x_log2 = b_gt if LOWRANK else b_gt * LOG2E
                b_after = tl.dot(x_log2, after, input_precision=PRECISION)
                b_e = tl.where(reverse != 0, b_cum, b_after) + b_total[:, None]
            else:
                b_e = b_cum * sign + (b_end * whole + b_total)[:, None]
            b_total += b_end
            kh = operand(tl.trans(b_k) * tl.exp2(b_e), IO)  # [BK, BT]
            b_s = tl.dot(kh, operand(b_v, IO), b_s, input_precision=PRECISION)
        # Written so that a NaN goes on.
        gone = (b_total < STEP_MIN_LOG2) | (m_k == 0)
        adds = 1 - tl.min(gone.to(tl.int32), 0)
        seen += n_here
    return b_s, b_total
