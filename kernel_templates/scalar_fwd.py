"""Forward of linear attention with one gate per token and head: one program walks one sequence.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t,   o_t = scale * q_t S_t   (arXiv 2405.21060, section 2.3)

in chunks of BT rows, G the cumulative gate in the chunk (log2) and D_ij = 2^(G_i - G_j), j <= i:

    o = scale * ( (q k^T * D) v + 2^G . (q S) )
    S = 2^Gend S + (2^(Gend - G) . k)^T v

Decays multiply scores and rows, never channels, so the tiles of the products are the loaded tiles
themselves and every gate <= 0 is exact, -inf included (see ``_scalar``). A gate that is constant
in time, or absent, has stride 0.

Head groups: o has H heads; head i reads q head i // q_group, k head i // k_group, and v, gate and
state i // s_group.

| tensor | shape         | dtype      | layout                                             |
|--------|---------------|------------|----------------------------------------------------|
| q, k   | [B, T, H?, K] | io         | any b, t, h stride in units of UK, last dim 1      |
| v      | [B, T, Hs, V] | io         | likewise, units of UV                              |
| g      | [B, T, Hs]    | io or fp32 | any b, t, h stride, 0 included; natural log, <= 0; |
|        |               |            | absent when has_g == 0: no decay                   |
| cu     | [N + 1]       | i32        | absent when has_cu == 0; else tensors are [1, T, ] |
| o      | [B, T, H, V]  | io         | contiguous                                         |
| h0     | [N, Hs, K, V] | fp32       | contiguous, absent when has_h0 == 0                |
| ht     | [N, Hs, K, V] | fp32       | contiguous, absent when has_ht == 0                |

Grid: x = V tiles (fastest, they share q and k in L2) x N*H.
"""

import triton
import triton.language as tl

from glac.kernel_templates._bwd import load_rows, store_rows
from glac.kernel_templates._gate import operand
from glac.kernel_templates._scalar import (
    chunk_gate,
    gate_sums,
    pair_decays,
    sequence_bounds,
    total,
)


@triton.jit
def scalar_fwd(
    q,  # [B, T, H?, K]
    k,  # [B, T, H?, K]
    v,  # [B, T, Hs, V]
    g,  # [B, T, Hs]
    cu,  # [N + 1]
    o,  # [B, T, H, V]
    h0,  # [N, Hs, K, V]
    ht,  # [N, Hs, K, V]
    scale,
    T,
    H,
    q_group,
    k_group,
    s_group,
    has_cu,
    has_g,
    has_h0,
    has_ht,
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
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    UK: tl.constexpr,
    UV: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    STAGES: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    NV: tl.constexpr = (V + BV - 1) // BV
    IO: tl.constexpr = v.dtype.element_ty

    pid = tl.program_id(0)
    i_v = pid % NV
    i_nh = pid // NV
    i_n = i_nh // H
    i_h = i_nh % H
    i_s = i_h // s_group
    begin, length, i_b = sequence_bounds(cu, i_n, T, has_cu)
    t0 = begin.to(tl.int64)

    row = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    v0 = i_v * BV
    o_v = v0 + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V

    q += (i_b * q_b + t0 * q_t + (i_h // q_group).to(tl.int64) * q_h) * UK
    k += (i_b * k_b + t0 * k_t + (i_h // k_group).to(tl.int64) * k_h) * UK
    v += (i_b * v_b + t0 * v_t + i_s.to(tl.int64) * v_h) * UV
    g += i_b * g_b + t0 * g_t + i_s.to(tl.int64) * g_h
    o += ((i_b * T + t0) * H + i_h) * V
    row_q = q_t.to(tl.int64) * UK
    row_k = k_t.to(tl.int64) * UK
    row_v = v_t.to(tl.int64) * UV
    row_o = H.to(tl.int64) * V
    s_q = tl.make_tensor_descriptor(q, [length, K], [row_q, 1], [BT, BK]) if TMA else q
    s_k = tl.make_tensor_descriptor(k, [length, K], [row_k, 1], [BT, BK]) if TMA else k
    s_v = tl.make_tensor_descriptor(v, [length, V], [row_v, 1], [BT, BV]) if TMA else v
    s_o = tl.make_tensor_descriptor(o, [length, V], [row_o, 1], [BT, BV]) if TMA else o

    state = (i_n * (H // s_group) + i_s).to(tl.int64) * K * V
    if TURNED:  # [BV, BK], a left operand from registers
        p_state = o_v[:, None] + o_k[None, :] * V
        m_state = m_v[:, None] & m_k[None, :]
    else:  # [BK, BV]
        p_state = o_k[:, None] * V + o_v[None, :]
        m_state = m_k[:, None] & m_v[None, :]
    b_s = tl.load(h0 + state + p_state, mask=m_state & (has_h0 != 0), other=0.0)

    b_next = chunk_gate(g, 0, length, g_t, has_g, BT)
    for t in tl.range(0, length, BT, num_stages=STAGES):
        m_t = t + row < length
        m_tk = m_t[:, None] & m_k[None, :]
        m_tv = m_t[:, None] & m_v[None, :]
        b_q = load_rows(s_q, t, 0, row_q, o_k, m_tk, BT, TMA)  # [BT, BK]
        b_k = load_rows(s_k, t, 0, row_k, o_k, m_tk, BT, TMA)  # [BT, BK]
        b_v = load_rows(s_v, t, v0, row_v, o_v, m_tv, BT, TMA)  # [BT, BV]
        _, coarse, fine = gate_sums(b_next)
        b_next = chunk_gate(g, t + BT, length, g_t, has_g, BT)
        end_c, end_f = total(coarse, fine, BT)
        d_read = tl.exp2(coarse + fine) * scale  # [BT]
        d_write = tl.exp2((end_c - coarse) + (end_f - fine))  # [BT]
        if TURNED:
            b_d = tl.trans(pair_decays(coarse, fine, BT))
            b_a = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BT, BT], transposed
            b_a = operand(b_a * (b_d * scale), IO)
            b_vt = tl.trans(operand(b_v, IO))  # [BV, BT]
            b_o = tl.dot(
                operand(b_s, IO), tl.trans(operand(b_q, IO)), input_precision=PRECISION
            )  # [BV, BT]
            b_o = tl.dot(b_vt, b_a, b_o * d_read[None, :], input_precision=PRECISION)
            b_u = operand(b_vt * d_write[None, :], IO)
            b_s = tl.dot(
                b_u, operand(b_k, IO), b_s * tl.exp2(end_c + end_f), input_precision=PRECISION
            )
            b_o = tl.trans(b_o)
        else:
            b_a = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BT, BT]
            b_a = operand(b_a * (pair_decays(coarse, fine, BT) * scale), IO)
            b_w = operand(b_v, IO)
            b_o = tl.dot(operand(b_q, IO), operand(b_s, IO), input_precision=PRECISION)
            b_o = tl.dot(b_a, b_w, b_o * d_read[:, None], input_precision=PRECISION)  # [BT, BV]
            b_u = operand(tl.trans(b_k) * d_write[None, :], IO)  # [BK, BT]
            b_s = tl.dot(b_u, b_w, b_s * tl.exp2(end_c + end_f), input_precision=PRECISION)
        store_rows(s_o, b_o.to(IO), t, v0, row_o, o_v, m_tv, BT, TMA)

    keep = (has_ht != 0) & (i_h % s_group == 0)
    tl.store(ht + state + p_state, b_s, mask=m_state & keep)
