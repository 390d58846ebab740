"""Forward of gated linear attention from what ``gla_prepare`` made: products and nothing else.

    S_t = diag(exp g_t) S_{t-1} + k_t^T v_t,   o_t = scale * q_t S_t     (arXiv 2312.06635, eq. 4)

in chunks of BT rows, with the prepared tiles of each:

    o^T = S^T qs^T + v^T scores^T
    S^T = (S^T + v^T ks) . ends

The state is kept transposed, ``[BV, BK]``: then it is the left operand of the read-out, which
Hopper's matrix unit reads from registers, and nothing passes through shared memory but the copies.
That takes chunks whose scaled tiles come from elsewhere, because in ``gla_fwd`` they would have to
be right operands and go through shared memory themselves.

A segment with a flag set does not enter the loop: it goes through the 16-row blocks of ``_exact``,
which are exact for every gate, and reads q, k and the gate itself.

| tensor | shape             | dtype      | layout                                        |
|--------|-------------------|------------|-----------------------------------------------|
| q, k   | [B, T, H, K]      | io         | any b, t, h stride in units of UK, last dim 1 |
| v      | [B, T, H, V]      | io         | likewise, units of UV                         |
| g      | [B, T, H, K]      | io or fp32 | likewise (vector gate), natural log, <= 0     |
| x      | [B, T, R]         | io         | any b, t stride in units of UR (low rank)     |
| w      | [H*K, R]          | io         | contiguous                                    |
| bias   | [H*K]             | io or fp32 | contiguous, absent when has_bias == 0         |
| o      | [B, T, H, V]      | io         | contiguous                                    |
| cu     | [N + 1]           | int32      | boundaries of a packed batch, see ``_place``  |
| h0     | [N, HS, K, V]     | fp32       | contiguous, absent when has_h0 == 0           |
| starts | [B, HS, S, K, V]  | fp32       | contiguous, state before segments j > 0       |
| ht     | [N, HS, K, V]     | fp32       | contiguous, absent when has_ht == 0           |
| qs, ks | [B, H, C, BT, BK] | state      | contiguous, as are the following: C chunks    |
| scores | [B, H, C, BT, BT] | state      |                                               |
| ends   | [B, H, C, BK]     | fp32       |                                               |
| flags  | [B, H, C]         | int32      |                                               |

Heads and groups as in ``gla_fwd``. Grid: x = V tiles (fastest, they share qs, ks and scores in L2)
x S segments x B*H.
"""

import triton
import triton.language as tl

from glac.kernel_templates._exact import exact_segment
from glac.kernel_templates._flags import flagged
from glac.kernel_templates._gate import operand
from glac.kernel_templates._place import place


@triton.jit
def gla_walk(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    g,  # [B, T, H, K]
    x,  # [B, T, R]
    w,  # [H*K, R]
    bias,  # [H*K]
    o,  # [B, T, H, V]
    cu,  # [N + 1]
    h0,  # [N, HS, K, V]
    starts,  # [B, HS, S, K, V]
    ht,  # [N, HS, K, V]
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
    n_seg,
    seg_len,
    n_chunks,
    q_group,
    k_group,
    s_group,
    has_cu,
    has_h0,
    has_ht,
    has_bias,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    g_b,
    g_t,
    g_h,
    x_b,
    x_t,
    K: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    UK: tl.constexpr,
    UV: tl.constexpr,
    UR: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BX: tl.constexpr,
    STAGES: tl.constexpr,
    LOWRANK: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    NV: tl.constexpr = (V + BV - 1) // BV
    IO: tl.constexpr = v.dtype.element_ty

    pid = tl.program_id(0)
    i_v = pid % NV
    i_b, i_n, i_h, slot, bos, n_tok, t_begin, t_end, is_first, is_last = place(
        pid // NV, cu, T, N, H, 0, n_seg, seg_len, has_cu
    )
    i_hs = i_h // s_group
    HS = H // s_group

    row = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < V

    v += (i_b * v_b + bos * v_t + i_hs.to(tl.int64) * v_h) * UV
    o += ((i_b * T + bos) * H + i_h) * V
    row_v = v_t.to(tl.int64) * UV
    row_s = tl.full([], BK, tl.int64)
    row_a = tl.full([], BT, tl.int64)
    row_o = H.to(tl.int64) * V
    # The sequence's first chunk, as gla_prepare placed it.
    chunk = (i_b * H + i_h) * n_chunks + tl.where(has_cu != 0, bos // BT + i_n, 0)
    qs += chunk * (BT * BK)
    ks += chunk * (BT * BK)
    scores += chunk * (BT * BT)
    ends += chunk * BK
    flags += chunk
    if TMA:
        rows = tl.maximum(n_tok, 1)
        full = tl.cdiv(rows, BT) * BT
        d_q = tl.make_tensor_descriptor(qs, [full, BK], [BK, 1], [BT, BK])
        d_k = tl.make_tensor_descriptor(ks, [full, BK], [BK, 1], [BT, BK])
        d_a = tl.make_tensor_descriptor(scores, [full, BT], [BT, 1], [BT, BT])
        d_v = tl.make_tensor_descriptor(v, [rows, V], [row_v, 1], [BT, BV])
        d_o = tl.make_tensor_descriptor(o, [rows, V], [row_o, 1], [BT, BV])

    start = h0 + (i_n * HS + i_hs) * (K * V)
    has_start = has_h0
    if not is_first:
        start = starts + ((i_b * HS + i_hs) * n_seg + slot) * (K * V)
        has_start = tl.where(t_begin < t_end, 1, 0)
    ht += (i_n * HS + i_hs) * (K * V)
    # Heads that share a state write it once.
    keep = (has_ht != 0) & is_last & (i_h % s_group == 0)

    if flagged(flags, t_begin, t_end, BT) != 0:
        q += (i_b * q_b + bos * q_t + (i_h // q_group).to(tl.int64) * q_h) * UK
        k += (i_b * k_b + bos * k_t + (i_h // k_group).to(tl.int64) * k_h) * UK
        if LOWRANK:
            x += (i_b * x_b + bos * x_t) * UR
        else:
            g += (i_b * g_b + bos * g_t + i_hs.to(tl.int64) * g_h) * UK
        # Inlined, because a call would serialise the asynchronous products of the loop below.
        exact_segment(
            q, k, v, g, x, w, bias, o, start, ht, scale, inv_normalizer, clamp_log2,
            n_tok, t_begin, t_end, i_hs, i_v, has_start, keep.to(tl.int32), has_bias,
            q_t, k_t, v_t, g_t, x_t, H * V,
            K, V, R, BK, BR, UK, UV, UR, BV, BX, LOWRANK, BF16, PRECISION,
        )  # fmt: skip
    else:
        p_state = o_k[None, :] * V + o_v[:, None]
        m_state = (o_k < K)[None, :] & m_v[:, None]
        b_s = tl.load(start + p_state, mask=m_state & (has_start != 0), other=0.0)  # [BV, BK]
        for t in tl.range(t_begin, t_end, BT, num_stages=STAGES):
            if TMA:
                b_q = d_q.load([t, 0])
                b_k = d_k.load([t, 0])
                b_a = d_a.load([t, 0])
                b_v = d_v.load([t, i_v * BV])
            else:
                m_t = t + row < n_tok
                m_tv = m_t[:, None] & m_v[None, :] if V % BV != 0 else m_t[:, None]
                p_s = t * row_s + row[:, None] * BK + o_k[None, :]
                b_q = tl.load(qs + p_s)
                b_k = tl.load(ks + p_s)
                b_a = tl.load(scores + t * row_a + row[:, None] * BT + row[None, :])
                p_v = row[:, None] * (v_t * UV) + o_v[None, :]
                b_v = tl.load(v + t * row_v + p_v, mask=m_tv, other=0.0)
            b_vt = tl.trans(operand(b_v, IO))  # [BV, BT]
            b_o = tl.dot(operand(b_s, IO), tl.trans(b_q), input_precision=PRECISION)  # [BV, BT]
            b_o = tl.dot(b_vt, tl.trans(b_a), b_o, input_precision=PRECISION)
            b_s = tl.dot(b_vt, b_k, b_s, input_precision=PRECISION)
            # Loaded here and not above: a thread needs a quarter of the row, and those registers
            # beside the operands above spilled 320 bytes at K = 256.
            b_e = tl.load(ends + t // BT * row_s + o_k)
            b_s = b_s * b_e[None, :]
            b_o = tl.trans(b_o.to(IO))
            if TMA:
                d_o.store([t, i_v * BV], b_o)
            else:
                p_o = row[:, None] * (H * V) + o_v[None, :]
                tl.store(o + t * row_o + p_o, b_o, mask=m_tv)
        tl.store(ht + p_state, b_s, mask=m_state & keep)
