"""Backward of linear attention with a scalar gate: dq, dk and dg, walking back in time.

With S the state at a chunk's start, dS the gradient of the state at its end, and G, D as in
``scalar_fwd``:

    dA = scale * (do v^T * D)                z = 2^(Gend - G) . (v dS^T)
    dq = dA k + scale * 2^G . (do S^T)       dk = dA^T q + z
    dg_t = sum_{i>=t} (q dq - k dk)_i + sum_i (k z)_i + 2^Gend sum S * dS
    dS_prev = 2^Gend dS + scale * (2^G . q)^T do

Every sum of dg stays inside the chunk, and what cancels in it comes from the same rounded dA: a
running sum over the sequence would not cancel. fp32 inputs (EXACT) leave out what two sums share,
the diagonal of dA, and take k z once for both: beside fast decays there is nothing else. Tiles of
dq and dk are transposed, as in ``gla_bwd``: channels are rows, tokens columns.

A program owns a [BK, BV] tile of dS, in registers, for one sequence. dq and dk are complete as
sums over V tiles, which the caller makes, dg over all tiles, which ``scalar_bwd_dv`` makes beside
dv. Gradients are written for each of the H heads; heads that share a tensor are summed
by the caller. A step that is a reset (2^-160) gets exactly 0.

| tensor  | shape             | dtype      | layout                                          |
|---------|-------------------|------------|-------------------------------------------------|
| q, k    | [B, T, H?, K]     | io         | b, t, h strides in units of UK, last dim 1      |
| v       | [B, T, Hs, V]     | io         | likewise, units of UV                           |
| do      | [B, T, H, V]      | io         | likewise, units of UV                           |
| g       | [B, T, Hs]        | io or fp32 | any b, t, h stride; absent when has_g == 0      |
| cu      | [N + 1]           | i32        | absent when has_cu == 0                         |
| dht     | [N, Hs, K, V]     | fp32       | contiguous, absent when has_dht == 0            |
| states  | [B, H, C, K, V]   | state      | contiguous, slots as in ``scalar_states``       |
| dq, dk  | [NV, B, T, H, K]  | io         | contiguous                                      |
| dg      | [NK, NV, B, T, H] | fp32       | contiguous, absent when has_dg == 0             |
| dh0     | [N, H, K, V]      | fp32       | contiguous, absent when has_dh0 == 0            |

Grid: x = V tiles (fastest) x K tiles x N*H.
"""

import triton
import triton.language as tl

from glac.kernel_templates._bwd import load_rows, store_rows
from glac.kernel_templates._gate import STEP_MIN_LOG2, operand
from glac.kernel_templates._scalar import (
    chunk_gate,
    first_slot,
    gate_sums,
    pair_decays,
    sequence_bounds,
    total,
)


@triton.jit
def scalar_bwd(
    q,  # [B, T, H?, K]
    k,  # [B, T, H?, K]
    v,  # [B, T, Hs, V]
    g,  # [B, T, Hs]
    do,  # [B, T, H, V]
    cu,  # [N + 1]
    dht,  # [N, Hs, K, V]
    states,  # [B, H, C, K, V]
    dq,  # [NV, B, T, H, K]
    dk,  # [NV, B, T, H, K]
    dg,  # [NK, NV, B, T, H]
    dh0,  # [N, H, K, V]
    scale,
    T,
    B,
    H,
    n_chunk,
    q_group,
    k_group,
    s_group,
    has_cu,
    has_g,
    has_dht,
    has_dg,
    has_dh0,
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
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    IO: tl.constexpr = v.dtype.element_ty
    EXACT: tl.constexpr = IO == tl.float32

    pid = tl.program_id(0)
    i_v = pid % NV
    i_k = (pid // NV) % NK
    i_nh = pid // (NV * NK)
    i_n = i_nh // H
    i_h = i_nh % H
    i_s = i_h // s_group
    bos, n_tok, i_b = sequence_bounds(cu, i_n, T, has_cu)
    bos = bos.to(tl.int64)

    row = tl.arange(0, BT)
    k0 = i_k * BK
    v0 = i_v * BV
    o_k = k0 + tl.arange(0, BK)
    o_v = v0 + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V

    q += (i_b * q_b + bos * q_t + (i_h // q_group).to(tl.int64) * q_h) * UK
    k += (i_b * k_b + bos * k_t + (i_h // k_group).to(tl.int64) * k_h) * UK
    v += (i_b * v_b + bos * v_t + i_s.to(tl.int64) * v_h) * UV
    do += (i_b * do_b + bos * do_t + i_h.to(tl.int64) * do_h) * UV
    g += i_b * g_b + bos * g_t + i_s.to(tl.int64) * g_h
    out = ((i_v.to(tl.int64) * B + i_b) * T + bos) * H + i_h
    dq += out * K
    dk += out * K
    dg += out + i_k.to(tl.int64) * NV * B * T * H
    row_q = q_t.to(tl.int64) * UK
    row_k = k_t.to(tl.int64) * UK
    row_v = v_t.to(tl.int64) * UV
    row_do = do_t.to(tl.int64) * UV
    row_dk = H.to(tl.int64) * K
    states += ((i_b * H + i_h) * n_chunk + first_slot(bos, i_n, has_cu, BT)) * K * V
    rows = tl.maximum(n_tok, 1)
    s_q = tl.make_tensor_descriptor(q, [rows, K], [row_q, 1], [BT, BK]) if TMA else q
    s_k = tl.make_tensor_descriptor(k, [rows, K], [row_k, 1], [BT, BK]) if TMA else k
    s_v = tl.make_tensor_descriptor(v, [rows, V], [row_v, 1], [BT, BV]) if TMA else v
    s_do = tl.make_tensor_descriptor(do, [rows, V], [row_do, 1], [BT, BV]) if TMA else do
    s_dq = tl.make_tensor_descriptor(dq, [rows, K], [row_dk, 1], [BT, BK]) if TMA else dq
    s_dk = tl.make_tensor_descriptor(dk, [rows, K], [row_dk, 1], [BT, BK]) if TMA else dk
    if TMA:
        kept = tl.cdiv(rows, BT) * K
        s_kept = tl.make_tensor_descriptor(states, [kept, V], [V, 1], [BK, BV])

    # Heads that share a state share its gradient, which one of them takes in.
    end = dht + (i_n * (H // s_group) + i_s).to(tl.int64) * K * V
    has_end = (has_dht != 0) & (i_h % s_group == 0)
    b_ds = tl.zeros([BK, BV], dtype=tl.float32)
    if TMA:
        # Pointers would stay alive in registers for the whole loop.
        if has_end:
            b_ds = tl.make_tensor_descriptor(end, [K, V], [V, 1], [BK, BV]).load([k0, v0])
    else:
        p_state = o_k[:, None] * V + o_v[None, :]
        m_state = m_k[:, None] & m_v[None, :]
        b_ds = tl.load(end + p_state, mask=m_state & has_end, other=0.0)

    n_chunks = tl.cdiv(n_tok, BT)
    b_next = chunk_gate(g, (n_chunks - 1) * BT, n_tok, g_t, has_g, BT)
    for i in tl.range(0, n_chunks, num_stages=STAGES):
        t = (n_chunks - 1 - i) * BT
        m_t = t + row < n_tok
        m_tk = m_t[:, None] & m_k[None, :]
        m_tv = m_t[:, None] & m_v[None, :]
        b_q = operand(load_rows(s_q, t, k0, row_q, o_k, m_tk, BT, TMA), IO)  # [BT, BK]
        b_k = operand(load_rows(s_k, t, k0, row_k, o_k, m_tk, BT, TMA), IO)  # [BT, BK]
        b_v = operand(load_rows(s_v, t, v0, row_v, o_v, m_tv, BT, TMA), IO)  # [BT, BV]
        b_do = operand(load_rows(s_do, t, v0, row_do, o_v, m_tv, BT, TMA), IO)  # [BT, BV]
        if TMA:
            b_s = s_kept.load([t // BT * K + k0, v0])  # [BK, BV]
        else:
            p_s = states + (t // BT).to(tl.int64) * (K * V) + p_state
            b_s = operand(tl.load(p_s, mask=m_state, other=0.0), IO)
        step, coarse, fine = gate_sums(b_next)
        b_next = chunk_gate(g, t - BT, n_tok, g_t, has_g, BT)
        end_c, end_f = total(coarse, fine, BT)
        d_read = tl.exp2(coarse + fine) * scale  # [BT]
        d_write = tl.exp2((end_c - coarse) + (end_f - fine))  # [BT]
        b_pair = pair_decays(coarse, fine, BT) * scale  # [BT, BT]

        b_da = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) * b_pair  # [BT, BT]
        if EXACT:
            own = tl.sum(tl.where(row[:, None] == row[None, :], b_da, 0.0), 1)  # [BT]
            b_da = tl.where(row[:, None] > row[None, :], b_da, 0.0)
        b_da = operand(b_da, IO)
        # One gradient after the other, so that few tiles are alive at a time.
        b_dk = tl.dot(operand(b_ds, IO), tl.trans(b_v), input_precision=PRECISION)  # [BK, BT]
        b_dk *= d_write[None, :]
        b_kt = tl.trans(b_k).to(tl.float32)  # [BK, BT]
        if EXACT:
            b_z = tl.sum(b_kt * b_dk, 0)  # [BT]
            through = tl.zeros([BK], dtype=tl.float32)
            b_y = tl.dot(tl.trans(b_q), b_da, input_precision=PRECISION)
            b_u = tl.sum(b_kt * b_y, 0) + b_z  # [BT]
            b_dk += b_y + tl.trans(b_q).to(tl.float32) * own[None, :]
        else:
            through = tl.sum(b_kt * b_dk, 1)  # [BK]
            b_dk = tl.dot(tl.trans(b_q), b_da, b_dk, input_precision=PRECISION)
            b_u = tl.sum(b_kt * b_dk, 0)
        store_rows(s_dk, tl.trans(b_dk.to(v.dtype.element_ty)), t, k0, row_dk, o_k, m_tk, BT, TMA)
        b_ds *= tl.exp2(end_c + end_f)
        through += tl.sum(b_s.to(tl.float32) * b_ds, 1)
        b_dq = tl.dot(b_s, tl.trans(b_do), input_precision=PRECISION)  # [BK, BT]
        b_dq *= d_read[None, :]
        b_dq = tl.dot(tl.trans(b_k), tl.trans(b_da), b_dq, input_precision=PRECISION)
        b_qt = tl.trans(b_q).to(tl.float32)  # [BK, BT]
        b_u = tl.sum(b_qt * b_dq, 0) - b_u
        if EXACT:
            b_dq += tl.trans(b_k).to(tl.float32) * own[None, :]
        store_rows(s_dq, tl.trans(b_dq.to(v.dtype.element_ty)), t, k0, row_dk, o_k, m_tk, BT, TMA)
        if has_dg != 0:
            across = tl.sum(through, 0)
            if EXACT:
                across += tl.sum(b_z, 0)
            b_dg = tl.cumsum(b_u, 0, reverse=True) + across
            b_dg = tl.where(step > STEP_MIN_LOG2, b_dg, 0.0)
            tl.store(dg + (t + row).to(tl.int64) * H, b_dg, mask=m_t)
        b_ds = tl.dot(operand(b_qt * d_read[None, :], IO), b_do, b_ds, input_precision=PRECISION)

    # Not through a descriptor, whose copy of the tile would need shared memory of its own.
    p_out = o_k[:, None] * V + o_v[None, :]
    start = dh0 + i_nh.to(tl.int64) * K * V
    tl.store(start + p_out, b_ds, mask=m_k[:, None] & m_v[None, :] & (has_dh0 != 0))
