"""Backward of gated linear attention: gradients of q, k, gate (and v), walking back in time.

With S the state at a chunk's start, dS the gradient of the state at its end, G the cumulative gate
in the chunk (log2), tiles anchored at the chunk's start and rounded once (docs/numerics.md):

    qh = scale * q * 2^G            kh = k * 2^-G            dA = tril(do v^T)
    D  = 2^Gend . dS                x  = dA kh + do S^T      y  = dA^T qh       z = v D^T
    dq = scale * 2^G . x            dk = 2^-G . (y + z)
    dg_t = sum_{i>=t} (qh x - kh y)_i + sum_{i<t} (kh z)_i + sum_v S . D
    dv = tril(qh kh^T)^T do + kh D
    dS_prev = D + qh^T do

Both sums of dg use the same rounded tiles, so what cancels cancels exactly, and the terms that
pass through the state are sums without cancellation. A program owns a [BK, BV] tile of dS, in
registers. Gradients of q, k and gate are complete over V tiles only as a sum, which the caller
makes; dv is written (DV) where one tile holds all of K, and otherwise by ``gla_bwd_dv``.

A program walks one segment of ``seg_count`` (``_place``). S at the start of every KEEP-th chunk
comes from ``gla_states``; those between are found again, KEEP chunks at a time.
They pass through memory, but through so little of it, and so soon after, that it stays in the
cache. dS at the segment's end is ``dht`` or a slot of ``ends``; with ``chain``, where one launch
follows another from the last segment to the first, the program leaves dS for the next.
With LEAD, for few and short sequences, nothing comes first: the program walks to its segment from
both ends of the sequence (``_lead``) and through it, and leaves ``states`` and ``ends`` as others
would have, for itself and ``gla_bwd_exact``.
The anchor's range is tested as in ``gla_fwd``; a program that left it says so in ``flags``, and
``gla_bwd_exact`` does its work again.

| tensor | shape           | dtype      | layout                                                |
|--------|-----------------|------------|-------------------------------------------------------|
| q, k   | [B, T, H, K]    | io         | any b, t, h stride in units of UK, last dim 1         |
| v, do  | [B, T, H, V]    | io         | likewise, units of UV                                 |
| g      | [B, T, H, K]    | io or fp32 | likewise, natural log, <= 0                           |
| cu     | [N + 1]         | int32      | boundaries of a packed batch, see ``_place``          |
| h0     | [N, HS, K, V]   | fp32       | contiguous, absent when has_h0 == 0 (LEAD)            |
| states | [B, HS, C, N_KEPT, K, V] | state | contiguous, slot j: before chunk j * KEEP        |
| behind | [grid, KEEP, BK, BV] | state | where KEEP > 1, a program's states between kept ones |
| dht    | [N, HS, K, V]   | fp32       | contiguous, absent when has_dht == 0                  |
| ends   | [B, H, S, K, V] | fp32       | contiguous, dS at segments' ends, not of the last     |
| dq, dk | [NV, B, T, H, K]| io         | contiguous                                            |
| dv     | [B, T, H, V]    | io         | contiguous                                            |
| dg     | [NV, B, T, H, K]| as g       | contiguous                                            |
| dh0    | [N, H, K, V]    | fp32       | contiguous, absent when has_dh0 == 0                  |
| flags  | [grid]          | int32      | 1 where the program left the range                    |

Heads and groups are those of ``gla_fwd``. All gradients are per head of the output: where heads
share an input, the caller adds them up.

Grid: x = V tiles (fastest) x K tiles x seg_count segments x B*H.
"""

import triton
import triton.language as tl

from glac.kernel_templates._bwd import (
    await_descriptor_stores,
    cumulative_log2_t,
    load_rows,
    store_rows,
    suffix_sum,
    triangles,
)
from glac.kernel_templates._exact import START_RANGE_LOG2
from glac.kernel_templates._gate import LOG2E, clamped, operand
from glac.kernel_templates._lead import lead_rows, lead_step, lead_walk
from glac.kernel_templates._place import place


@triton.jit
def gla_bwd(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    g,  # [B, T, H, K]
    do,  # [B, T, H, V]
    cu,  # [N + 1]
    h0,  # [N, HS, K, V]
    states,  # [B, HS, C, N_KEPT, K, V]
    dht,  # [N, HS, K, V]
    ends,  # [B, H, S, K, V]
    dq,  # [NV, B, T, H, K]
    dk,  # [NV, B, T, H, K]
    dv,  # [B, T, H, V]
    dg,  # [NV, B, T, H, K]
    dh0,  # [N, H, K, V]
    flags,  # [grid]
    scale,
    T,
    B,
    N,
    H,
    n_seg,
    seg_first,
    seg_count,
    seg_len,
    n_kept,
    q_group,
    k_group,
    s_group,
    chain,
    has_cu,
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
    UK: tl.constexpr,
    UV: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    LEAD: tl.constexpr,
    STAGES: tl.constexpr,
    KEEP: tl.constexpr,
    DV: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    IO: tl.constexpr = v.dtype.element_ty
    STATE: tl.constexpr = states.dtype.element_ty

    pid = tl.program_id(0)
    i_v = pid % NV
    i_k = (pid // NV) % NK
    i_b, i_n, i_h, slot, bos, n_tok, t_begin, t_end, is_first, is_last = place(
        pid // (NV * NK), cu, T, N, H, seg_first, seg_count, seg_len, has_cu
    )
    i_hs = i_h // s_group
    HS = H // s_group

    row = tl.arange(0, BT)
    k0 = i_k * BK
    v0 = i_v * BV
    o_k = k0 + tl.arange(0, BK)
    o_v = v0 + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_low = row[:, None] >= row[None, :]
    m_up = row[:, None] <= row[None, :]

    q += (i_b * q_b + bos * q_t + (i_h // q_group).to(tl.int64) * q_h) * UK
    k += (i_b * k_b + bos * k_t + (i_h // k_group).to(tl.int64) * k_h) * UK
    v += (i_b * v_b + bos * v_t + i_hs.to(tl.int64) * v_h) * UV
    do += (i_b * do_b + bos * do_t + i_h.to(tl.int64) * do_h) * UV
    row_q = q_t.to(tl.int64) * UK
    row_k = k_t.to(tl.int64) * UK
    row_v = v_t.to(tl.int64) * UV
    row_do = do_t.to(tl.int64) * UV
    out = (((i_v.to(tl.int64) * B + i_b) * T + bos) * H + i_h) * K
    dq += out
    dk += out
    dv += ((i_b * T + bos) * H + i_h) * V
    row_dk = H.to(tl.int64) * K
    row_dv = H.to(tl.int64) * V
    g += (i_b * g_b + bos * g_t + i_hs.to(tl.int64) * g_h) * UK
    row_g = g_t.to(tl.int64) * UK
    dg += out
    # What the cumulative gate is a product of, see cumulative_log2_t.
    GATE: tl.constexpr = g.dtype.element_ty
    SUMMAND: tl.constexpr = tl.bfloat16 if BF16 and GATE == tl.float32 else GATE
    upper, lower = triangles(BT, SUMMAND, BF16)

    n_chunks = tl.cdiv(t_end - t_begin, BT)
    if KEEP > 1:
        between = states + B.to(tl.int64) * HS * seg_count * n_kept * (K * V)
        between += pid.to(tl.int64) * (KEEP * BK * BV)
    states += ((i_b * HS + i_hs) * seg_count + slot - seg_first) * n_kept * (K * V)
    # Descriptors, or the pointers themselves.
    rows = tl.maximum(n_tok, 1)
    s_q = tl.make_tensor_descriptor(q, [rows, K], [row_q, 1], [BT, BK]) if TMA else q
    s_k = tl.make_tensor_descriptor(k, [rows, K], [row_k, 1], [BT, BK]) if TMA else k
    s_v = tl.make_tensor_descriptor(v, [rows, V], [row_v, 1], [BT, BV]) if TMA else v
    s_do = tl.make_tensor_descriptor(do, [rows, V], [row_do, 1], [BT, BV]) if TMA else do
    s_dq = tl.make_tensor_descriptor(dq, [rows, K], [row_dk, 1], [BT, BK]) if TMA else dq
    s_dk = tl.make_tensor_descriptor(dk, [rows, K], [row_dk, 1], [BT, BK]) if TMA else dk
    s_dv = tl.make_tensor_descriptor(dv, [rows, V], [row_dv, 1], [BT, BV]) if TMA else dv
    if TMA:
        s_kept = tl.make_tensor_descriptor(states, [n_kept * K, V], [V, 1], [BK, BV])
    if KEEP > 1:
        p_between = tl.arange(0, BK)[:, None] * BV + tl.arange(0, BV)[None, :]
        if TMA:
            s_between = tl.make_tensor_descriptor(between, [KEEP * BK, BV], [BV, 1], [BK, BV])
    s_g = tl.make_tensor_descriptor(g, [rows, K], [row_g, 1], [BT, BK]) if TMA else g
    s_dg = tl.make_tensor_descriptor(dg, [rows, K], [row_dk, 1], [BT, BK]) if TMA else dg

    # What enters at the segment's end. Heads that share a state take its gradient once.
    ends += ((i_b * H + i_h) * n_seg + slot) * (K * V)
    end = dht + (i_n * HS + i_hs) * (K * V)
    has_end = tl.where(i_h % s_group == 0, has_dht, 0)
    if LEAD == 0:
        if not is_last:
            end = ends
            has_end = tl.where(t_begin < t_end, 1, 0)
    b_ds = tl.zeros([BK, BV], dtype=tl.float32)
    if TMA:
        # Pointers would stay alive in registers for the whole loop.
        if has_end != 0:
            b_ds = tl.make_tensor_descriptor(end, [K, V], [V, 1], [BK, BV]).load([k0, v0])
    else:
        p_state = o_k[:, None] * V + o_v[None, :]
        m_state = m_k[:, None] & m_v[None, :]
        b_ds = tl.load(end + p_state, mask=m_state & (has_end != 0), other=0.0)

    if LEAD > 0:
        if LEAD == BT:
            l_q = s_q
            l_k = s_k
            l_v = s_v
            l_do = s_do
        else:
            l_q = lead_rows(q, rows, K, row_q, LEAD, BK, TMA)
            l_k = lead_rows(k, rows, K, row_k, LEAD, BK, TMA)
            l_v = lead_rows(v, rows, V, row_v, LEAD, BV, TMA)
            l_do = lead_rows(do, rows, V, row_do, LEAD, BV, TMA)
        if LEAD == BT:
            l_g = s_g
        else:
            l_g = lead_rows(g, rows, K, row_g, LEAD, BK, TMA)
        # States before the chunks of the segment. Heads that share them write equal values.
        p_lead = o_k[:, None] * V + o_v[None, :]
        m_lead = m_k[:, None] & m_v[None, :]
        initial = h0 + (i_n * HS + i_hs) * (K * V)
        b_r = tl.load(initial + p_lead, mask=m_lead & (has_h0 != 0), other=0.0)
        b_r = lead_walk(
            b_r, l_k, l_v, l_g, 0.0, 0.0, 1.0, 0.0, 0.0,
            0, t_begin, n_tok, k0, v0, row_k, row_v, row_g, m_k, m_v,
            1, 16, BK, BV, LEAD, STAGES + 1, False, False, BF16, PRECISION, TMA,
        )  # fmt: skip
        for i in tl.range(0, n_chunks, num_stages=STAGES + 1):
            t = t_begin + i * BT
            m_t = t + row < n_tok
            m_tk = m_t[:, None] & m_k[None, :]
            m_tv = m_t[:, None] & m_v[None, :]
            b_g = load_rows(s_g, t, k0, row_g, o_k, m_tk, BT, TMA)
            b_k = load_rows(s_k, t, k0, row_k, o_k, m_tk, BT, TMA)
            b_v = load_rows(s_v, t, v0, row_v, o_v, m_tv, BT, TMA)
            if TMA:
                s_kept.store([i * K + k0, v0], b_r.to(STATE))
            else:
                p_s = states + ((t - t_begin) // BT).to(tl.int64) * (K * V) + p_state
                tl.store(p_s, b_r.to(STATE), mask=m_state)
            b_r = lead_step(b_r, b_k, b_v, b_g, upper, 1.0, BT, False, False, BF16, PRECISION)
        b_ds = lead_walk(
            b_ds, l_q, l_do, l_g, 0.0, 0.0, scale, 0.0, 0.0,
            t_end, n_tok, n_tok, k0, v0, row_q, row_do, row_g, m_k, m_v,
            1, 16, BK, BV, LEAD, STAGES + 1, True, False, BF16, PRECISION, TMA,
        )  # fmt: skip
        # For gla_bwd_exact.
        tl.store(ends + p_lead, b_ds, mask=m_lead & (t_begin < t_end) & (t_end < n_tok))
        if TMA:
            await_descriptor_stores(t_begin, INTERPRETED)
        elif not INTERPRETED:
            tl.debug_barrier()

    worst = tl.zeros([BK], dtype=tl.float32)
    # Without states between, one group is all.
    n_groups = tl.cdiv(n_chunks, KEEP) if KEEP > 1 else 1
    for i_back in tl.range(0, n_groups, num_stages=1):
        t_group = t_begin
        n_here = n_chunks
        if KEEP > 1:
            i_group = n_groups - 1 - i_back
            t_group = t_begin + i_group * (KEEP * BT)
            n_here = tl.minimum(n_chunks - i_group * KEEP, KEEP)
            if TMA:
                b_r = s_kept.load([i_group * K + k0, v0]).to(tl.float32)  # [BK, BV]
            else:
                p_s = states + i_group.to(tl.int64) * (K * V) + p_state
                b_r = tl.load(p_s, mask=m_state, other=0.0).to(tl.float32)
            # Nothing else is in shared memory meanwhile: one stage more is free.
            for i in tl.range(0, n_here - 1, num_stages=STAGES + 1):
                t = t_group + i * BT
                m_t = t + row < n_tok
                m_tk = m_t[:, None] & m_k[None, :]
                m_tv = m_t[:, None] & m_v[None, :]
                b_g = load_rows(s_g, t, k0, row_g, o_k, m_tk, BT, TMA)
                b_k = load_rows(s_k, t, k0, row_k, o_k, m_tk, BT, TMA)
                b_v = operand(load_rows(s_v, t, v0, row_v, o_v, m_tv, BT, TMA), IO)
                if TMA:
                    s_between.store([i * BK, 0], b_r.to(STATE))
                else:
                    tl.store(between + i * (BK * BV) + p_between, b_r.to(STATE))
                b_gt = clamped(tl.trans(b_g))
                b_cum = cumulative_log2_t(b_gt, upper, False, BF16)
                b_end = tl.min(b_cum, 1)
                b_after = b_end[:, None] - b_cum
                if PRECISION == "tf32x3":
                    # See gla_states.
                    m_after = (row[:, None] > row[None, :]).to(tl.float32)
                    x_log2 = b_gt * LOG2E
                    b_after = tl.dot(x_log2, m_after, input_precision=PRECISION)
                kr = operand(tl.trans(b_k) * tl.exp2(b_after), IO)
                b_r = b_r * tl.exp2(b_end)[:, None]
                b_r = tl.dot(kr, b_v, b_r, input_precision=PRECISION)
            if TMA:
                s_between.store([(n_here - 1) * BK, 0], b_r.to(STATE))
                await_descriptor_stores(t_begin, INTERPRETED)
            else:
                tl.store(between + (n_here - 1) * (BK * BV) + p_between, b_r.to(STATE))
                if not INTERPRETED:
                    tl.debug_barrier()
        for i in tl.range(0, n_here, num_stages=STAGES):
            i_c = n_here - 1 - i
            t = t_group + i_c * BT
            m_t = t + row < n_tok
            m_tk = m_t[:, None] & m_k[None, :]
            m_tv = m_t[:, None] & m_v[None, :]
            # All loads first: with those of q and do further down, the loop spilled 200 bytes.
            b_g = load_rows(s_g, t, k0, row_g, o_k, m_tk, BT, TMA)  # [BT, BK]
            b_q = load_rows(s_q, t, k0, row_q, o_k, m_tk, BT, TMA)  # [BT, BK]
            b_k = load_rows(s_k, t, k0, row_k, o_k, m_tk, BT, TMA)  # [BT, BK]
            b_v = operand(load_rows(s_v, t, v0, row_v, o_v, m_tv, BT, TMA), IO)  # [BT, BV]
            b_do = operand(load_rows(s_do, t, v0, row_do, o_v, m_tv, BT, TMA), IO)  # [BT, BV]
            if TMA and KEEP > 1:
                b_s = s_between.load([i_c * BK, 0])  # [BK, BV]
            elif TMA:
                b_s = s_kept.load([i_c * K + k0, v0])
            elif KEEP > 1:
                b_s = operand(tl.load(between + i_c * (BK * BV) + p_between), IO)
            else:
                p_s = states + i_c.to(tl.int64) * (K * V) + p_state
                b_s = operand(tl.load(p_s, mask=m_state, other=0.0), IO)

            b_gt = tl.trans(b_g)
            b_cum = cumulative_log2_t(b_gt, upper, False, BF16)  # [BK, BT]
            b_end = tl.min(b_cum, 1)  # [BK], the last column: g <= 0 makes G fall along the chunk
            worst = tl.minimum(worst, b_end)
            b_e = tl.exp2(b_cum) * scale  # [BK, BT]
            qh = operand(tl.trans(b_q) * b_e, IO)  # [BK, BT]
            kh = operand(tl.trans(b_k) * tl.exp2(-b_cum), IO)  # [BK, BT]
            b_da = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)  # [BT, BT]
            b_da = operand(tl.where(m_low, b_da, 0.0), IO)

            b_xt = tl.dot(b_s, tl.trans(b_do), input_precision=PRECISION)  # [BK, BT]
            b_xt = tl.dot(kh, tl.trans(b_da), b_xt, input_precision=PRECISION)
            store_rows(s_dq, tl.trans((b_xt * b_e).to(IO)), t, k0, row_dk, o_k, m_tk, BT, TMA)
            b_yt = tl.dot(qh, b_da, input_precision=PRECISION)  # [BK, BT]
            b_p = qh.to(tl.float32) * b_xt - kh.to(tl.float32) * b_yt

            b_ds = b_ds * tl.exp2(b_end)[:, None]
            b_total = tl.sum(b_s.to(tl.float32) * b_ds, 1)  # [BK]
            b_d = operand(b_ds, IO)
            b_zt = tl.dot(b_d, tl.trans(b_v), input_precision=PRECISION)  # [BK, BT]
            b_dk = (b_yt + b_zt) * tl.exp2(-b_cum)
            store_rows(s_dk, tl.trans(b_dk.to(IO)), t, k0, row_dk, o_k, m_tk, BT, TMA)
            # Prefix sums of kh z as total minus suffix sum: then one triangle serves both terms.
            b_u = kh.to(tl.float32) * b_zt
            b_total += tl.sum(b_u, 1)
            b_dg = suffix_sum(b_p - b_u, lower, BF16) + b_total[:, None]  # [BK, BT]
            store_rows(s_dg, tl.trans(b_dg.to(GATE)), t, k0, row_dk, o_k, m_tk, BT, TMA)
            if DV:
                b_a = tl.dot(tl.trans(kh), qh, input_precision=PRECISION)  # [BT, BT], transposed
                b_a = operand(tl.where(m_up, b_a, 0.0), IO)
                b_dv = tl.dot(tl.trans(kh), b_d, input_precision=PRECISION)  # [BT, BV]
                b_dv = tl.dot(b_a, b_do, b_dv, input_precision=PRECISION)
                store_rows(s_dv, b_dv.to(IO), t, v0, row_dv, o_v, m_tv, BT, TMA)
            b_ds = tl.dot(qh, b_do, b_ds, input_precision=PRECISION)

    # What leaves at its start: to the caller, or to the end of the segment before.
    start = dh0 + (i_n * H + i_h) * (K * V)
    has_start = has_dh0
    if not is_first:
        start = ends - K * V
        has_start = chain
    # Not through a descriptor, whose copy of the tile would need shared memory of its own.
    p_out = o_k[:, None] * V + o_v[None, :]
    tl.store(start + p_out, b_ds, mask=m_k[:, None] & m_v[None, :] & (has_start != 0))
    # Written so that a NaN counts as out of range.
    bad = tl.where(tl.min(worst, 0) >= -START_RANGE_LOG2, 0, 1)
    tl.store(flags + pid, bad)
