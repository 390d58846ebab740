"""What segments add to the state, from what ``gla_prepare`` made.

    S^T = (S^T + v^T ks) . ends        from zero, chunk by chunk

is stored into the next slot of ``starts``, and the segment's total gate into ``decay``;
``gla_combine`` chains these. The last segment of a sequence adds to nothing and returns. This is
``gla_walk`` without its read-out, and it does for it what ``gla_states`` does for ``gla_fwd``.
With STOPS the walk begins where the gate lets something through to the border (``_summary``).

A segment with a flag set goes through the blocks of ``_exact``. These write its rows of ``o`` as
well, as if it began with a state of 0; ``gla_walk`` overwrites them afterwards.

Tensors as in ``gla_walk``, and

| tensor | shape            | dtype | layout                                               |
|--------|------------------|-------|------------------------------------------------------|
| starts | [B, HS, S, K, V] | fp32  | contiguous                                           |
| decay  | [B, HS, S, K]    | fp32  | contiguous, in log2 units                            |

Only the first of the heads that share a state is walked.

Grid: x = V tiles (fastest) x S segments x B*HS.
"""

import triton
import triton.language as tl

from glac.kernel_templates._exact import exact_segment
from glac.kernel_templates._flags import flagged
from glac.kernel_templates._gate import STEP_MIN_LOG2, operand
from glac.kernel_templates._place import place

ROWS = tl.constexpr(16)
"""Rows of ``ends`` that are read at once."""


@triton.jit
def gla_walk_states(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    g,  # [B, T, H, K]
    x,  # [B, T, R]
    w,  # [H*K, R]
    bias,  # [H*K]
    o,  # [B, T, H, V]
    cu,  # [N + 1]
    starts,  # [B, HS, S, K, V]
    decay,  # [B, HS, S, K]
    ks,  # [B, H, C, BT, BK]
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
    STOPS: tl.constexpr,
    LOWRANK: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    NV: tl.constexpr = (V + BV - 1) // BV
    IO: tl.constexpr = v.dtype.element_ty

    pid = tl.program_id(0)
    i_v = pid % NV
    HS = H // s_group
    i_b, i_n, i_hs, slot, bos, n_tok, t_begin, t_end, _is_first, is_last = place(
        pid // NV, cu, T, N, HS, 0, n_seg, seg_len, has_cu
    )
    if is_last | (t_begin >= t_end):
        return
    i_h = i_hs * s_group

    row = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V

    v += (i_b * v_b + bos * v_t + i_hs.to(tl.int64) * v_h) * UV
    row_v = v_t.to(tl.int64) * UV
    row_s = tl.full([], BK, tl.int64)
    chunk = (i_b * H + i_h) * n_chunks + tl.where(has_cu != 0, bos // BT + i_n, 0)
    ks += chunk * (BT * BK)
    ends += chunk * BK
    flags += chunk
    if TMA:
        rows = tl.maximum(n_tok, 1)
        full = tl.cdiv(rows, BT) * BT
        d_k = tl.make_tensor_descriptor(ks, [full, BK], [BK, 1], [BT, BK])
        d_v = tl.make_tensor_descriptor(v, [rows, V], [row_v, 1], [BT, BV])
    i_bh = i_b * HS + i_hs
    starts += (i_bh * n_seg + slot + 1) * (K * V)
    decay += (i_bh * n_seg + slot) * K

    c_first = t_begin // BT
    c_end = tl.cdiv(t_end, BT)
    if i_v == 0:
        b_total = tl.zeros([BK], dtype=tl.float32)
        for c in tl.range(c_first, c_end, ROWS, num_stages=1):
            o_c = c + tl.arange(0, ROWS)
            p_e = o_c.to(tl.int64)[:, None] * BK + o_k[None, :]
            b_e = tl.load(ends + p_e, mask=(o_c < c_end)[:, None], other=1.0)
            b_total += tl.sum(tl.log2(b_e), 0)
        tl.store(decay + o_k, b_total, mask=m_k)

    if flagged(flags, t_begin, t_end, BT) != 0:
        q += (i_b * q_b + bos * q_t + (i_h // q_group).to(tl.int64) * q_h) * UK
        k += (i_b * k_b + bos * k_t + (i_h // k_group).to(tl.int64) * k_h) * UK
        o += ((i_b * T + bos) * H + i_h) * V
        if LOWRANK:
            x += (i_b * x_b + bos * x_t) * UR
        else:
            g += (i_b * g_b + bos * g_t + i_hs.to(tl.int64) * g_h) * UK
        exact_segment(
            q, k, v, g, x, w, bias, o, starts, starts, scale, inv_normalizer, clamp_log2,
            n_tok, t_begin, t_end, i_hs, i_v, 0, 1, has_bias,
            q_t, k_t, v_t, g_t, x_t, H * V,
            K, V, R, BK, BR, UK, UV, UR, BV, BX, LOWRANK, BF16, PRECISION,
        )  # fmt: skip
    else:
        b_s = tl.zeros([BV, BK], dtype=tl.float32)
        if STOPS:
            # Back over the chunks' decays, until nothing before them reaches the border.
            b_after = tl.zeros([BK], dtype=tl.float32)
            adds = c_end * 0 + 1
            while (adds != 0) & (c_end > c_first):
                o_c = c_end - 1 - tl.arange(0, ROWS)
                p_e = o_c.to(tl.int64)[:, None] * BK + o_k[None, :]
                b_e = tl.load(ends + p_e, mask=(o_c >= c_first)[:, None], other=1.0)
                b_after += tl.sum(tl.log2(b_e), 0)
                c_end = tl.maximum(c_end - ROWS, c_first)
                # Written so that a NaN goes on.
                gone = (b_after < STEP_MIN_LOG2) | (m_k == 0)
                adds = 1 - tl.min(gone.to(tl.int32), 0)
            t_begin = c_end * BT
        for t in tl.range(t_begin, t_end, BT, num_stages=STAGES):
            if TMA:
                b_k = d_k.load([t, 0])
                b_v = d_v.load([t, i_v * BV])
            else:
                m_t = t + row < n_tok
                m_tv = m_t[:, None] & m_v[None, :] if V % BV != 0 else m_t[:, None]
                p_s = t * row_s + row[:, None] * BK + o_k[None, :]
                b_k = tl.load(ks + p_s)
                p_v = row[:, None] * (v_t * UV) + o_v[None, :]
                b_v = tl.load(v + t * row_v + p_v, mask=m_tv, other=0.0)
            b_vt = tl.trans(operand(b_v, IO))  # [BV, BT]
            b_s = tl.dot(b_vt, b_k, b_s, input_precision=PRECISION)
            b_e = tl.load(ends + t // BT * row_s + o_k)
            b_s = b_s * b_e[None, :]
        p_state = o_k[None, :] * V + o_v[:, None]
        tl.store(starts + p_state, b_s, mask=m_k[None, :] & m_v[:, None])
