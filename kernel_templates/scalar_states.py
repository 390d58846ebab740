"""The recurrence of a scalar gate without its read-out: states inside sequences, or at their ends.

    direction 0    S' = 2^Gend S + (2^(Gend - G) . k)^T v            forward in time, S_0 = h0
    direction 1    D' = 2^Gend D + scale * (2^G . q)^T do            backward, D_last = dht

chunk by chunk, G the cumulative gate in the chunk (``scalar_fwd``). ``states`` gets S before each
chunk and ``dstates`` D behind it, for ``scalar_bwd`` and ``scalar_bwd_chunks``. A launch does as
many ``directions`` as it is told, from ``direction`` on; ``ends`` gets the end of the last one.

Slots are those of ``_place`` with chunks as segments: chunk c of sequence n is in slot c of the C
of its row, or cu[n] // BT + n + c where sequences are packed.

| tensor  | shape           | dtype      | layout                                     |
|---------|-----------------|------------|--------------------------------------------|
| q, k    | [B, T, H?, K]   | io         | b, t, h strides in units of UK, last dim 1 |
| v       | [B, T, Hs, V]   | io         | likewise, units of UV                      |
| do      | [B, T, H, V]    | io         | likewise, units of UV                      |
| g       | [B, T, Hs]      | io or fp32 | any b, t, h stride; absent when has_g == 0 |
| cu      | [N + 1]         | i32        | absent when has_cu == 0                    |
| h0, dht | [N, Hs, K, V]   | fp32       | contiguous, absent without has_h0, has_dht |
| states  | [B, H, C, K, V] | state      | contiguous, absent when keep_states == 0   |
| dstates | [B, H, C, K, V] | state      | likewise, absent without direction 1       |
| ends    | [N, H, K, V]    | fp32       | contiguous, absent when has_ends == 0      |

Grid: x = direction (fastest) x V tiles x N*H.
"""

import triton
import triton.language as tl

from glac.kernel_templates._bwd import load_rows
from glac.kernel_templates._gate import operand
from glac.kernel_templates._scalar import (
    chunk_gate,
    first_slot,
    gate_sums,
    sequence_bounds,
    total,
)


@triton.jit
def scalar_states(
    q,  # [B, T, H?, K]
    k,  # [B, T, H?, K]
    v,  # [B, T, Hs, V]
    g,  # [B, T, Hs]
    do,  # [B, T, H, V]
    cu,  # [N + 1]
    h0,  # [N, Hs, K, V]
    dht,  # [N, Hs, K, V]
    states,  # [B, H, C, K, V]
    dstates,  # [B, H, C, K, V]
    ends,  # [N, H, K, V]
    scale,
    T,
    H,
    n_chunk,
    direction,
    directions,
    q_group,
    k_group,
    s_group,
    has_cu,
    has_g,
    has_h0,
    has_dht,
    keep_states,
    has_ends,
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
    back = direction + pid % directions != 0
    i_v = (pid // directions) % NV
    i_nh = pid // (NV * directions)
    i_n = i_nh // H
    i_h = i_nh % H
    i_s = i_h // s_group
    begin, length, i_b = sequence_bounds(cu, i_n, T, has_cu)
    t0 = begin.to(tl.int64)
    n_chunks = tl.cdiv(length, BT)

    row = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    v0 = i_v * BV
    o_v = v0 + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    p_state = o_k[:, None] * V + o_v[None, :]
    m_state = m_k[:, None] & m_v[None, :]

    # From here on a is k or q, c is v or do, and kept gets the states.
    g += i_b * g_b + t0 * g_t + i_s.to(tl.int64) * g_h
    given = (i_n * (H // s_group) + i_s).to(tl.int64) * K * V
    first = ((i_b * H + i_h) * n_chunk + first_slot(begin, i_n, has_cu, BT)) * K * V
    a = k + (i_b * k_b + t0 * k_t + (i_h // k_group).to(tl.int64) * k_h) * UK
    c = v + (i_b * v_b + t0 * v_t + i_s.to(tl.int64) * v_h) * UV
    row_a = k_t.to(tl.int64) * UK
    row_c = v_t.to(tl.int64) * UV
    kept = states + first
    start = h0 + given
    has_start = has_h0 != 0
    if back:
        a = q + (i_b * q_b + t0 * q_t + (i_h // q_group).to(tl.int64) * q_h) * UK
        c = do + (i_b * do_b + t0 * do_t + i_h.to(tl.int64) * do_h) * UV
        row_a = q_t.to(tl.int64) * UK
        row_c = do_t.to(tl.int64) * UV
        kept = dstates + first
        # Heads that share a state share its gradient, which one of them takes in.
        start = dht + given
        has_start = (has_dht != 0) & (i_h % s_group == 0)
    rows = tl.maximum(length, 1)
    s_a = tl.make_tensor_descriptor(a, [rows, K], [row_a, 1], [BT, BK]) if TMA else a
    s_c = tl.make_tensor_descriptor(c, [rows, V], [row_c, 1], [BT, BV]) if TMA else c
    if TMA and BK == K:
        most = tl.maximum(n_chunks, 1) * K
        d_s = tl.make_tensor_descriptor(kept, [most, V], [V, 1], [BK, BV])

    b_s = tl.load(start + p_state, mask=m_state & has_start, other=0.0)  # [BK, BV]
    # The exponent of the factor is Gend - G, or backwards G; sums of coarse parts are exact.
    sign = tl.where(back, 1.0, -1.0)
    whole = tl.where(back, 0.0, 1.0)
    factor = tl.where(back, scale, 1.0)
    t_first = tl.where(back, (n_chunks - 1) * BT, 0)
    t_step = tl.where(back, -BT, BT)
    b_next = chunk_gate(g, t_first, length, g_t, has_g, BT)
    for i in tl.range(0, n_chunks, num_stages=STAGES):
        t = t_first + i * t_step
        m_t = t + row < length
        b_a = load_rows(s_a, t, 0, row_a, o_k, m_t[:, None] & m_k[None, :], BT, TMA)
        b_c = load_rows(s_c, t, v0, row_c, o_v, m_t[:, None] & m_v[None, :], BT, TMA)
        _, coarse, fine = gate_sums(b_next)
        b_next = chunk_gate(g, t + t_step, length, g_t, has_g, BT)
        end_c, end_f = total(coarse, fine, BT)
        if keep_states != 0:
            if TMA and BK == K:
                d_s.store([t // BT * K, v0], b_s.to(STATE))
            else:
                p_kept = kept + (t // BT).to(tl.int64) * (K * V) + p_state
                tl.store(p_kept, b_s.to(STATE), mask=m_state)
        b_e = tl.exp2((end_c * whole + coarse * sign) + (end_f * whole + fine * sign)) * factor
        b_u = operand(tl.trans(b_a) * b_e[None, :], IO)  # [BK, BT]
        b_s = b_s * tl.exp2(end_c + end_f)
        b_s = tl.dot(b_u, operand(b_c, IO), b_s, input_precision=PRECISION)
    if (has_ends != 0) & (pid % directions == directions - 1):
        tl.store(ends + i_nh.to(tl.int64) * K * V + p_state, b_s, mask=m_state)
