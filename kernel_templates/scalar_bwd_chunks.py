"""Backward of linear attention with a scalar gate: all gradients of a chunk, all chunks at once.

With S the state at the chunk's start, dS the gradient of the state at its end (both kept by
``scalar_states``), and G, D as in ``scalar_fwd``:

    A  = scale * tril(q k^T * D)        dA = do v^T        P = A * dA, strictly below the diagonal
    dq = scale * ( (dA * D) k + 2^G . do S^T )
    dk = scale * (dA * D)^T q + 2^(Gend - G) . v dS^T
    dv = A^T do + 2^(Gend - G) . k dS
    dg_t = sum_{i>=t} (rows of P - columns of P + x)_i + sum_{i<t} z_i + 2^Gend sum S * dS

with x_i = scale 2^(G_i) q_i . (do S^T)_i and z_i = 2^(Gend - G_i) k_i . (v dS^T)_i. Every sum of
dg stays inside the chunk, and its pairs cancel in fp32: a running sum over the sequence would not.

A program walks the V tiles of its chunk. Chunks in parallel suit few heads; many are faster by
``scalar_bwd``, which needs no dS in memory. Gradients are written for each of the H heads; heads
that share a tensor are summed by the caller. A step that is a reset (2^-160) gets exactly 0.

| tensor          | shape            | dtype      | layout                                        |
|-----------------|------------------|------------|-----------------------------------------------|
| q, k            | [B, T, H?, K]    | io         | b, t, h strides in units of UK, last dim 1    |
| v               | [B, T, Hs, V]    | io         | likewise, units of UV                         |
| do              | [B, T, H, V]     | io         | likewise, units of UV                         |
| g               | [B, T, Hs]       | io or fp32 | any b, t, h stride; absent when has_g == 0    |
| cu              | [N + 1]          | i32        | absent when has_cu == 0                       |
| states, dstates | [B, H, C, K, V]  | state      | contiguous, slots as in ``scalar_states``     |
| dq, dk          | [B, T, H, K]     | io         | contiguous                                    |
| dv              | [B, T, H, V]     | io         | contiguous                                    |
| dg              | [B, T, H]        | fp32       | contiguous, absent when has_dg == 0           |

Grid: x = H (fastest) x C slots x B.
"""

import triton
import triton.language as tl

from glac.kernel_templates._bwd import load_rows, store_rows
from glac.kernel_templates._gate import STEP_MIN_LOG2, operand
from glac.kernel_templates._place import place
from glac.kernel_templates._scalar import chunk_gate, gate_sums, pair_decays, total

SUMMED = tl.constexpr(8192)
"""Elements of a state and its gradient that are multiplied at a time."""


@triton.jit
def scalar_bwd_chunks(
    q,  # [B, T, H?, K]
    k,  # [B, T, H?, K]
    v,  # [B, T, Hs, V]
    g,  # [B, T, Hs]
    do,  # [B, T, H, V]
    cu,  # [N + 1]
    states,  # [B, H, C, K, V]
    dstates,  # [B, H, C, K, V]
    dq,  # [B, T, H, K]
    dk,  # [B, T, H, K]
    dv,  # [B, T, H, V]
    dg,  # [B, T, H]
    scale,
    T,
    N,
    H,
    n_chunk,
    q_group,
    k_group,
    s_group,
    has_cu,
    has_g,
    has_dg,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
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
    IO: tl.constexpr = v.dtype.element_ty

    pid = tl.program_id(0)
    i_h = pid % H
    i_bc = pid // H
    i_b, _n, _h, slot, bos, length, t, t_end, _first, _last = place(
        (i_bc // n_chunk * H + i_h) * n_chunk + i_bc % n_chunk, cu, T, N, H, 0, n_chunk, BT, has_cu
    )
    if t >= t_end:
        return
    i_s = i_h // s_group
    row = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    m_t = t + row < length
    m_k = o_k < K
    m_tk = m_t[:, None] & m_k[None, :]
    q += (i_b * q_b + bos * q_t + (i_h // q_group).to(tl.int64) * q_h) * UK
    k += (i_b * k_b + bos * k_t + (i_h // k_group).to(tl.int64) * k_h) * UK
    v += (i_b * v_b + bos * v_t + i_s.to(tl.int64) * v_h) * UV
    do += (i_b * do_b + bos * do_t + i_h.to(tl.int64) * do_h) * UV
    g += i_b * g_b + bos * g_t + i_s.to(tl.int64) * g_h
    out = (i_b * T + bos) * H + i_h
    dq += out * K
    dk += out * K
    dv += out * V
    row_q = q_t.to(tl.int64) * UK
    row_k = k_t.to(tl.int64) * UK
    row_v = v_t.to(tl.int64) * UV
    row_do = do_t.to(tl.int64) * UV
    row_dk = H.to(tl.int64) * K
    row_dv = H.to(tl.int64) * V
    kept = ((i_b * H + i_h) * n_chunk + slot) * K * V
    states += kept
    dstates += kept
    s_q = tl.make_tensor_descriptor(q, [length, K], [row_q, 1], [BT, BK]) if TMA else q
    s_k = tl.make_tensor_descriptor(k, [length, K], [row_k, 1], [BT, BK]) if TMA else k
    s_v = tl.make_tensor_descriptor(v, [length, V], [row_v, 1], [BT, BV]) if TMA else v
    s_do = tl.make_tensor_descriptor(do, [length, V], [row_do, 1], [BT, BV]) if TMA else do
    s_dq = tl.make_tensor_descriptor(dq, [length, K], [row_dk, 1], [BT, BK]) if TMA else dq
    s_dk = tl.make_tensor_descriptor(dk, [length, K], [row_dk, 1], [BT, BK]) if TMA else dk
    s_dv = tl.make_tensor_descriptor(dv, [length, V], [row_dv, 1], [BT, BV]) if TMA else dv
    if TMA:
        s_s = tl.make_tensor_descriptor(states, [K, V], [V, 1], [BK, BV])
        s_ds = tl.make_tensor_descriptor(dstates, [K, V], [V, 1], [BK, BV])

    b_q = load_rows(s_q, t, 0, row_q, o_k, m_tk, BT, TMA)  # [BT, BK]
    b_k = load_rows(s_k, t, 0, row_k, o_k, m_tk, BT, TMA)  # [BT, BK]
    q_op = operand(b_q, IO)
    k_op = operand(b_k, IO)
    step, coarse, fine = gate_sums(chunk_gate(g, t, length, g_t, has_g, BT))
    end_c, end_f = total(coarse, fine, BT)
    d_read = tl.exp2(coarse + fine) * scale  # [BT]
    d_write = tl.exp2((end_c - coarse) + (end_f - fine))  # [BT]

    b_sum = 0.0  # of S * dS, while registers are free
    if has_dg != 0:
        for first in tl.static_range(0, K * V, SUMMED):
            o_s = first + tl.arange(0, SUMMED)
            b_s = tl.load(states + o_s, mask=o_s < K * V, other=0.0).to(tl.float32)
            b_e = tl.load(dstates + o_s, mask=o_s < K * V, other=0.0).to(tl.float32)
            b_sum += tl.sum(b_s * b_e, 0)

    # First what the queries need, then what keys and values need: with both sums alive at once
    # a program takes all registers of an SM, and nothing hides its loads.
    b_da = tl.zeros([BT, BT], dtype=tl.float32)
    b_dq = tl.zeros([BT, BK], dtype=tl.float32)
    for v0 in tl.range(0, V, BV, num_stages=STAGES):
        o_v = v0 + tl.arange(0, BV)
        m_v = o_v < V
        m_tv = m_t[:, None] & m_v[None, :]
        b_v = operand(load_rows(s_v, t, v0, row_v, o_v, m_tv, BT, TMA), IO)  # [BT, BV]
        b_do = operand(load_rows(s_do, t, v0, row_do, o_v, m_tv, BT, TMA), IO)  # [BT, BV]
        if TMA:
            b_s = s_s.load([0, v0])  # [BK, BV]
        else:
            p_state = o_k[:, None] * V + o_v[None, :]
            m_state = m_k[:, None] & m_v[None, :]
            b_s = operand(tl.load(states + p_state, mask=m_state, other=0.0), IO)
        b_da = tl.dot(b_do, tl.trans(b_v), b_da, input_precision=PRECISION)
        b_dq = tl.dot(b_do, tl.trans(b_s), b_dq, input_precision=PRECISION)

    b_d = pair_decays(coarse, fine, BT) * scale  # [BT, BT]
    b_a = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_d  # [BT, BT]
    b_p = tl.where(row[:, None] > row[None, :], b_a * b_da, 0.0)
    b_w = tl.sum(b_p, 1)
    b_w -= tl.sum(b_p, 0)
    b_at = tl.trans(operand(b_a, IO))
    b_da = operand(b_da * b_d, IO)
    b_dq = b_dq * d_read[:, None]
    b_w += tl.sum(b_q.to(tl.float32) * b_dq, 1)  # [BT]
    b_dq = tl.dot(b_da, k_op, b_dq, input_precision=PRECISION)
    store_rows(s_dq, b_dq.to(IO), t, 0, row_dk, o_k, m_tk, BT, TMA)

    b_dk = tl.zeros([BT, BK], dtype=tl.float32)
    for v0 in tl.range(0, V, BV, num_stages=STAGES):
        o_v = v0 + tl.arange(0, BV)
        m_v = o_v < V
        m_tv = m_t[:, None] & m_v[None, :]
        b_v = operand(load_rows(s_v, t, v0, row_v, o_v, m_tv, BT, TMA), IO)  # [BT, BV]
        b_do = operand(load_rows(s_do, t, v0, row_do, o_v, m_tv, BT, TMA), IO)  # [BT, BV]
        if TMA:
            b_ds = s_ds.load([0, v0])  # [BK, BV]
        else:
            p_state = o_k[:, None] * V + o_v[None, :]
            m_state = m_k[:, None] & m_v[None, :]
            b_ds = operand(tl.load(dstates + p_state, mask=m_state, other=0.0), IO)
        b_dk = tl.dot(b_v, tl.trans(b_ds), b_dk, input_precision=PRECISION)
        b_dv = tl.dot(k_op, b_ds, input_precision=PRECISION) * d_write[:, None]  # [BT, BV]
        b_dv = tl.dot(b_at, b_do, b_dv, input_precision=PRECISION)
        store_rows(s_dv, b_dv.to(IO), t, v0, row_dv, o_v, m_tv, BT, TMA)

    b_dk = b_dk * d_write[:, None]
    b_z = tl.sum(b_k.to(tl.float32) * b_dk, 1)  # [BT]
    b_dk = tl.dot(tl.trans(b_da), q_op, b_dk, input_precision=PRECISION)
    store_rows(s_dk, b_dk.to(IO), t, 0, row_dk, o_k, m_tk, BT, TMA)
    if has_dg != 0:
        through = tl.sum(b_z, 0) + b_sum * tl.exp2(end_c + end_f)
        b_dg = tl.cumsum(b_w - b_z, 0, reverse=True) + through
        b_dg = tl.where(step > STEP_MIN_LOG2, b_dg, 0.0)
        tl.store(dg + out + (t + row).to(tl.int64) * H, b_dg, mask=m_t)
