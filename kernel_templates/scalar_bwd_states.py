"""States of a scalar gate at every chunk, and the gradients of these: both walks in one launch.

    forward in time     S_{c+1} = 2^Gend S_c + (2^(Gend - G) . k)^T v         S_0 = h0
    backward in time    dS_{c-1} = 2^Gend dS_c + scale * (2^G . q)^T do       dS_last = dht

with the sums G of ``scalar_fwd``. ``states`` gets S at the start of each chunk and ``dstates`` dS
at its end, which is what ``scalar_bwd`` needs to take all chunks at once. dS ends as the gradient
of the initial state.

Chunk j of sequence n is in slot n * ceil(T / BT) + j, or cu[n] // BT + n + j where sequences are
packed: slots of different sequences never meet, and none is known to the host.

| tensor          | shape            | dtype      | layout                                     |
|-----------------|------------------|------------|--------------------------------------------|
| q, k            | [B, T, H?, K]    | io         | b, t, h strides in units of UK, last dim 1 |
| v               | [B, T, Hs, V]    | io         | likewise, units of UV                      |
| do              | [B, T, H, V]     | io         | likewise, units of UV                      |
| g               | [B, T, Hs]       | io or fp32 | any b, t, h stride; absent when has_g == 0 |
| cu              | [N + 1]          | i32        | absent when has_cu == 0                    |
| h0, dht         | [N, Hs, K, V]    | fp32       | contiguous, absent without has_h0, has_dht |
| states, dstates | [H, slots, K, V] | state      | contiguous                                 |
| dh0             | [N, H, K, V]     | fp32       | contiguous, absent when has_dh0 == 0       |

Grid: x = direction (fastest) x V tiles x N*H.
"""

import triton
import triton.language as tl

from glac.kernel_templates._bwd import load_rows
from glac.kernel_templates._gate import operand
from glac.kernel_templates._scalar import chunk_gate, gate_sums, sequence_bounds, total


@triton.jit
def scalar_bwd_states(
    q,  # [B, T, H?, K]
    k,  # [B, T, H?, K]
    v,  # [B, T, Hs, V]
    g,  # [B, T, Hs]
    do,  # [B, T, H, V]
    cu,  # [N + 1]
    h0,  # [N, Hs, K, V]
    dht,  # [N, Hs, K, V]
    states,  # [H, slots, K, V]
    dstates,  # [H, slots, K, V]
    dh0,  # [N, H, K, V]
    scale,
    T,
    H,
    slots,
    q_group,
    k_group,
    s_group,
    has_cu,
    has_g,
    has_h0,
    has_dht,
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
    NV: tl.constexpr = (V + BV - 1) // BV
    IO: tl.constexpr = v.dtype.element_ty
    STATE: tl.constexpr = states.dtype.element_ty

    pid = tl.program_id(0)
    i_d = pid % 2
    i_v = (pid // 2) % NV
    i_nh = pid // (2 * NV)
    i_n = i_nh // H
    i_h = i_nh % H
    i_s = i_h // s_group
    begin, length, i_b = sequence_bounds(cu, i_n, T, has_cu)
    t0 = begin.to(tl.int64)
    n_chunks = tl.cdiv(length, BT)
    slot = i_n.to(tl.int64) * n_chunks
    if has_cu != 0:
        slot = (begin // BT + i_n).to(tl.int64)

    row = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    v0 = i_v * BV
    o_v = v0 + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    p_state = o_k[:, None] * V + o_v[None, :]
    m_state = m_k[:, None] & m_v[None, :]
    given = (i_n * (H // s_group) + i_s).to(tl.int64) * K * V
    g += i_b * g_b + t0 * g_t + i_s.to(tl.int64) * g_h
    first = (i_h.to(tl.int64) * slots + slot) * K * V

    if i_d == 0:
        k += (i_b * k_b + t0 * k_t + (i_h // k_group).to(tl.int64) * k_h) * UK
        v += (i_b * v_b + t0 * v_t + i_s.to(tl.int64) * v_h) * UV
        states += first
        row_k = k_t.to(tl.int64) * UK
        row_v = v_t.to(tl.int64) * UV
        s_k = tl.make_tensor_descriptor(k, [length, K], [row_k, 1], [BT, BK]) if TMA else k
        s_v = tl.make_tensor_descriptor(v, [length, V], [row_v, 1], [BT, BV]) if TMA else v
        b_s = tl.load(h0 + given + p_state, mask=m_state & (has_h0 != 0), other=0.0)  # [BK, BV]
        b_next = chunk_gate(g, 0, length, g_t, has_g, BT)
        for t in tl.range(0, length, BT, num_stages=STAGES):
            m_t = t + row < length
            b_k = load_rows(s_k, t, 0, row_k, o_k, m_t[:, None] & m_k[None, :], BT, TMA)
            b_v = load_rows(s_v, t, v0, row_v, o_v, m_t[:, None] & m_v[None, :], BT, TMA)
            _, coarse, fine = gate_sums(b_next)
            b_next = chunk_gate(g, t + BT, length, g_t, has_g, BT)
            end_c, end_f = total(coarse, fine, BT)
            p_kept = states + (slot * 0 + t // BT) * (K * V) + p_state
            tl.store(p_kept, b_s.to(STATE), mask=m_state)
            b_e = tl.exp2((end_c - coarse) + (end_f - fine))
            b_u = operand(tl.trans(b_k) * b_e[None, :], IO)  # [BK, BT]
            b_s = b_s * tl.exp2(end_c + end_f)
            b_s = tl.dot(b_u, operand(b_v, IO), b_s, input_precision=PRECISION)
    else:
        q += (i_b * q_b + t0 * q_t + (i_h // q_group).to(tl.int64) * q_h) * UK
        do += (i_b * do_b + t0 * do_t + i_h.to(tl.int64) * do_h) * UV
        dstates += first
        row_q = q_t.to(tl.int64) * UK
        row_do = do_t.to(tl.int64) * UV
        s_q = tl.make_tensor_descriptor(q, [length, K], [row_q, 1], [BT, BK]) if TMA else q
        s_do = tl.make_tensor_descriptor(do, [length, V], [row_do, 1], [BT, BV]) if TMA else do
        # Heads that share a state share its gradient, which one of them takes in.
        mine = (has_dht != 0) & (i_h % s_group == 0)
        b_ds = tl.load(dht + given + p_state, mask=m_state & mine, other=0.0)  # [BK, BV]
        b_next = chunk_gate(g, (n_chunks - 1) * BT, length, g_t, has_g, BT)
        for i in tl.range(0, n_chunks, num_stages=STAGES):
            i_c = n_chunks - 1 - i
            t = i_c * BT
            m_t = t + row < length
            b_q = load_rows(s_q, t, 0, row_q, o_k, m_t[:, None] & m_k[None, :], BT, TMA)
            b_do = load_rows(s_do, t, v0, row_do, o_v, m_t[:, None] & m_v[None, :], BT, TMA)
            _, coarse, fine = gate_sums(b_next)
            b_next = chunk_gate(g, t - BT, length, g_t, has_g, BT)
            end_c, end_f = total(coarse, fine, BT)
            p_kept = dstates + i_c.to(tl.int64) * (K * V) + p_state
            tl.store(p_kept, b_ds.to(STATE), mask=m_state)
            b_e = tl.exp2(coarse + fine) * scale
            b_u = operand(tl.trans(b_q) * b_e[None, :], IO)  # [BK, BT]
            b_ds = b_ds * tl.exp2(end_c + end_f)
            b_ds = tl.dot(b_u, operand(b_do, IO), b_ds, input_precision=PRECISION)
        out = i_nh.to(tl.int64) * K * V
        tl.store(dh0 + out + p_state, b_ds, mask=m_state & (has_dh0 != 0))
