"""Gradient of the values with a scalar gate, walking back in time: the forward's mirror image.

    dv = scale * (q k^T * D)^T do + 2^(Gend - G) . (k dS)
    dS = 2^Gend dS + scale * (2^G . q)^T do                at the chunk's start, dS_last = dht

with G and D as in ``scalar_fwd``, dS the gradient of the state at the chunk's end. A program holds
all key channels and a tile of values, for one sequence. At its end it adds up the parts of dg that
``scalar_bwd`` left, at most MOST_PARTS.

dv is the forward pass of (q, k, v) = (k, q, do) backwards in time, and dk that of (v, do, q). So
where K = V this kernel makes dk, too, if nobody wants dg.

| tensor  | shape            | dtype      | layout                                      |
|---------|------------------|------------|---------------------------------------------|
| q, k    | [B, T, H?, K]    | io         | b, t, h strides in units of UK, last dim 1  |
| do      | [B, T, H, V]     | io         | likewise, units of UV                       |
| g       | [B, T, Hs]       | io or fp32 | any b, t, h stride; absent when has_g == 0  |
| cu      | [N + 1]          | i32        | absent when has_cu == 0                     |
| dht     | [N, Hs, K, V]    | fp32       | contiguous, absent when has_dht == 0        |
| dv      | [B, T, H, V]     | io         | contiguous                                  |
| parts   | [parts, B, T, H] | fp32       | contiguous, absent when n_parts == 0        |
| dg      | [B, T, H]        | fp32       | contiguous, absent when n_parts == 0        |

dv is written for each of the H heads; heads that share values are summed by the caller.

Grid: x = V tiles (fastest) x N*H.
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

MOST_PARTS = tl.constexpr(8)


@triton.jit
def scalar_bwd_dv(
    q,  # [B, T, H?, K]
    k,  # [B, T, H?, K]
    g,  # [B, T, Hs]
    do,  # [B, T, H, V]
    cu,  # [N + 1]
    dht,  # [N, Hs, K, V]
    dv,  # [B, T, H, V]
    parts,  # [parts, B, T, H]
    dg,  # [B, T, H]
    scale,
    T,
    B,
    H,
    n_parts,
    q_group,
    k_group,
    s_group,
    has_cu,
    has_g,
    has_dht,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    do_b,
    do_t,
    do_h,
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
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    NV: tl.constexpr = (V + BV - 1) // BV
    IO: tl.constexpr = do.dtype.element_ty

    pid = tl.program_id(0)
    i_v = pid % NV
    i_nh = pid // NV
    i_n = i_nh // H
    i_h = i_nh % H
    i_s = i_h // s_group
    bos, n_tok, i_b = sequence_bounds(cu, i_n, T, has_cu)
    bos = bos.to(tl.int64)

    row = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    v0 = i_v * BV
    o_v = v0 + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V

    q += (i_b * q_b + bos * q_t + (i_h // q_group).to(tl.int64) * q_h) * UK
    k += (i_b * k_b + bos * k_t + (i_h // k_group).to(tl.int64) * k_h) * UK
    do += (i_b * do_b + bos * do_t + i_h.to(tl.int64) * do_h) * UV
    g += i_b * g_b + bos * g_t + i_s.to(tl.int64) * g_h
    out = (i_b * T + bos) * H + i_h
    dv += out * V
    row_q = q_t.to(tl.int64) * UK
    row_k = k_t.to(tl.int64) * UK
    row_do = do_t.to(tl.int64) * UV
    row_dv = H.to(tl.int64) * V
    rows = tl.maximum(n_tok, 1)
    s_q = tl.make_tensor_descriptor(q, [rows, K], [row_q, 1], [BT, BK]) if TMA else q
    s_k = tl.make_tensor_descriptor(k, [rows, K], [row_k, 1], [BT, BK]) if TMA else k
    s_do = tl.make_tensor_descriptor(do, [rows, V], [row_do, 1], [BT, BV]) if TMA else do
    s_dv = tl.make_tensor_descriptor(dv, [rows, V], [row_dv, 1], [BT, BV]) if TMA else dv

    # The state's gradient as [V, K]: a left operand from registers. Heads that share a state
    # share its gradient, which one of them takes in.
    p_state = o_v[:, None] + o_k[None, :] * V
    m_state = m_v[:, None] & m_k[None, :] & (has_dht != 0) & (i_h % s_group == 0)
    end = dht + (i_n * (H // s_group) + i_s).to(tl.int64) * K * V
    b_ds = tl.load(end + p_state, mask=m_state, other=0.0)  # [BV, BK]
    n_chunks = tl.cdiv(n_tok, BT)
    b_next = chunk_gate(g, (n_chunks - 1) * BT, n_tok, g_t, has_g, BT)
    for i in tl.range(0, n_chunks, num_stages=STAGES):
        t = (n_chunks - 1 - i) * BT
        m_t = t + row < n_tok
        m_tk = m_t[:, None] & m_k[None, :]
        m_tv = m_t[:, None] & m_v[None, :]
        b_q = load_rows(s_q, t, 0, row_q, o_k, m_tk, BT, TMA)  # [BT, BK]
        b_k = load_rows(s_k, t, 0, row_k, o_k, m_tk, BT, TMA)  # [BT, BK]
        b_do = load_rows(s_do, t, v0, row_do, o_v, m_tv, BT, TMA)  # [BT, BV]
        _, coarse, fine = gate_sums(b_next)
        b_next = chunk_gate(g, t - BT, n_tok, g_t, has_g, BT)
        end_c, end_f = total(coarse, fine, BT)
        d_read = tl.exp2(coarse + fine) * scale  # [BT]
        d_write = tl.exp2((end_c - coarse) + (end_f - fine))  # [BT]
        b_a = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BT, BT]
        b_a = operand(b_a * (pair_decays(coarse, fine, BT) * scale), IO)
        b_dot = tl.trans(operand(b_do, IO))  # [BV, BT]
        b_dv = tl.dot(
            operand(b_ds, IO), tl.trans(operand(b_k, IO)), input_precision=PRECISION
        )  # [BV, BT]
        b_dv = tl.dot(b_dot, b_a, b_dv * d_write[None, :], input_precision=PRECISION)
        b_u = operand(b_dot * d_read[None, :], IO)
        b_ds = tl.dot(
            b_u, operand(b_q, IO), b_ds * tl.exp2(end_c + end_f), input_precision=PRECISION
        )
        store_rows(s_dv, tl.trans(b_dv.to(IO)), t, v0, row_dv, o_v, m_tv, BT, TMA)

    if (n_parts != 0) & (i_v == 0):
        o_p = tl.arange(0, MOST_PARTS)
        m_p = o_p < n_parts
        p_part = parts + out + o_p.to(tl.int64) * B * T * H
        for t in tl.range(0, n_tok, 256, num_stages=1):
            o_t = t + tl.arange(0, 256)
            m_t = o_t < n_tok
            at = o_t.to(tl.int64) * H
            b_part = tl.load(
                p_part[:, None] + at[None, :], mask=m_p[:, None] & m_t[None, :], other=0.0
            )
            tl.store(dg + out + at, tl.sum(b_part, 0), mask=m_t)
