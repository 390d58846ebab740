"""What all V tiles of a head need of its chunks, made once: scaled tiles, scores, decays.

With G the cumulative gate from the start of a chunk of BT tokens, in log2 (docs/numerics.md):

    qs = scale * q * 2^G       ks = k * 2^-G       scores = tril(qs ks^T)       ends = 2^Gend

``gla_walk`` reads them instead of q, k and the gate. Where a head has several V tiles, as with
V >= 2K, that saves every tile but one its exponentials, sums and scores (arXiv 2312.06635, eq. 4,
in the form of ``gla_fwd``). The rounding is that of ``gla_fwd``, and so is the range test:
``flags`` is 1 where a channel decays by more than 2^-80 in the chunk, and then the chunk's other
outputs mean nothing.

| tensor | shape            | dtype      | layout                                            |
|--------|------------------|------------|---------------------------------------------------|
| q, k   | [B, T, H, K]     | io         | any b, t, h stride in units of UK, last dim 1     |
| g      | [B, T, H, K]     | io or fp32 | likewise (vector gate), natural log, <= 0         |
| x      | [B, T, R]        | io         | any b, t stride in units of UR (low rank)         |
| w      | [H*K, R]         | io         | contiguous                                        |
| bias   | [H*K]            | io or fp32 | contiguous, absent when has_bias == 0             |
| cu     | [N + 1]          | int32      | boundaries of a packed batch, see ``_place``      |
| qs, ks | [B, H, C, BT, BK] | state     | contiguous, BK is K padded                        |
| scores | [B, H, C, BT, BT] | state     | contiguous, row i holds the scores of token i     |
| ends   | [B, H, C, BK]    | fp32       | contiguous                                        |
| flags  | [B, H, C]        | int32      | contiguous                                        |

H counts heads of the output, with groups as in ``gla_fwd``. C counts slots of chunks, which are
segments of BT tokens in the sense of ``_place``; slots that hold no token are left as they are.

Grid: B*H (fastest, neighbours share rows of memory) x C chunks, the last one first: what was
written last is in L2 when ``gla_walk`` begins at the first.
"""

import triton
import triton.language as tl

from glac.kernel_templates._exact import START_RANGE_LOG2
from glac.kernel_templates._gate import LOG2E, cumulative_log2, lowrank_gate_log2, operand
from glac.kernel_templates._place import place


@triton.jit
def gla_prepare(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    g,  # [B, T, H, K]
    x,  # [B, T, R]
    w,  # [H*K, R]
    bias,  # [H*K]
    cu,  # [N + 1]
    qs,  # [B, H, C, BT, BK]
    ks,  # [B, H, C, BT, BK]
    scores,  # [B, H, C, BT, BT]
    ends,  # [B, H, C, BK]
    flags,  # [B, H, C]
    scale,
    inv_normalizer,
    clamp_log2,
    T,
    N,
    H,
    n_chunks,
    q_group,
    k_group,
    s_group,
    has_cu,
    has_bias,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    g_b,
    g_t,
    g_h,
    x_b,
    x_t,
    K: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    UK: tl.constexpr,
    UR: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
    LOWRANK: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):
    IO: tl.constexpr = q.dtype.element_ty

    pid = tl.program_id(0)
    heads = tl.num_programs(0) // n_chunks
    index = (pid % heads) * n_chunks + n_chunks - 1 - pid // heads
    i_b, _i_n, i_h, slot, bos, n_tok, t_begin, t_end, _is_first, _is_last = place(
        index, cu, T, N, H, 0, n_chunks, BT, has_cu
    )
    if t_begin >= t_end:
        return
    i_hs = i_h // s_group

    row = tl.arange(0, BT)
    m_t = t_begin + row < n_tok
    m_tri = row[:, None] >= row[None, :]
    first = bos + t_begin
    q += (i_b * q_b + first * q_t + (i_h // q_group).to(tl.int64) * q_h) * UK
    k += (i_b * k_b + first * k_t + (i_h // k_group).to(tl.int64) * k_h) * UK
    m_cum = m_tri
    if LOWRANK:
        o_r = tl.arange(0, BR)
        m_r = o_r < R
        p_x = row[:, None] * (x_t * UR) + o_r[None, :]
        x += (i_b * x_b + first * x_t) * UR
        b_x = tl.load(x + p_x, mask=m_t[:, None] & m_r[None, :], other=0.0)  # [BT, BR]
        # Rows outside the sequence must not decay.
        m_cum = m_tri & m_t[None, :]
    else:
        g += (i_b * g_b + first * g_t + i_hs.to(tl.int64) * g_h) * UK
    chunk = (i_b * H + i_h) * n_chunks + slot
    qs += chunk * (BT * BK)
    ks += chunk * (BT * BK)
    ends += chunk * BK

    b_a = tl.zeros([BT, BT], dtype=tl.float32)
    worst = tl.zeros([BC], dtype=tl.float32)
    for c in tl.range(0, BK, BC, num_stages=STAGES):
        o_k = c + tl.arange(0, BC)
        m_k = o_k < K
        m_tk = m_t[:, None] & m_k[None, :] if BK != K else m_t[:, None]
        if LOWRANK:
            p_w = (i_hs * K + o_k)[None, :] * R + o_r[:, None]
            b_w = tl.load(w + p_w, mask=m_k[None, :] & m_r[:, None], other=0.0)  # [BR, BC]
            b_bias = tl.load(bias + i_hs * K + o_k, mask=m_k & (has_bias != 0), other=0.0)
            b_bias = b_bias.to(tl.float32) * LOG2E
            b_g = lowrank_gate_log2(b_x, b_w, b_bias, inv_normalizer, clamp_log2, BF16, PRECISION)
        else:
            p_g = row[:, None] * (g_t * UK) + o_k[None, :]
            b_g = tl.load(g + p_g, mask=m_tk, other=0.0)
        p_q = row[:, None] * (q_t * UK) + o_k[None, :]
        b_q = tl.load(q + p_q, mask=m_tk, other=0.0)
        p_k = row[:, None] * (k_t * UK) + o_k[None, :]
        b_k = tl.load(k + p_k, mask=m_tk, other=0.0)

        b_cum = cumulative_log2(b_g, m_cum, LOWRANK, BF16)  # [BT, BC]
        b_end = tl.min(b_cum, 0)  # [BC], the last row: g <= 0 makes G fall along the chunk
        worst = tl.minimum(worst, b_end)
        qh = operand(b_q * (tl.exp2(b_cum) * scale), IO)
        kh = operand(b_k * tl.exp2(-b_cum), IO)
        b_a = tl.dot(qh, tl.trans(kh), b_a, input_precision=PRECISION)
        p_s = row[:, None] * BK + o_k[None, :]
        tl.store(qs + p_s, qh)
        tl.store(ks + p_s, kh)
        tl.store(ends + o_k, tl.exp2(b_end))

    b_a = operand(tl.where(m_tri, b_a, 0.0), IO)
    tl.store(scores + chunk * (BT * BT) + row[:, None] * BT + row[None, :], b_a)
    # Written so that a NaN counts as out of range.
    in_range = tl.min(worst, 0) >= -START_RANGE_LOG2
    tl.store(flags + chunk, tl.where(in_range, 0, 1))
