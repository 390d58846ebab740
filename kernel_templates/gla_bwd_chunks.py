"""Gradients of q, k and gate, a chunk in each program, from the states around it.

With S the state before a chunk of BT tokens, dS the gradient of the state behind it, and G the
cumulative gate (log2) since the middle of the chunk, Gm that from its start to its middle:

    qh = scale * q * 2^G           kh = k * 2^-G            dA = tril(do v^T)
    x  = dA kh + 2^Gm . (do S^T)   y  = dA^T qh             z  = 2^(Gend) . (v dS^T)
    dq = scale * 2^G . x           dk = 2^-G . (y + z)
    dg_t = sum_{i>=t} (qh x - kh y)_i + sum_{i<t} (kh z)_i + 2^(Gm + Gend) . sum_v S dS

The rounding is that of ``gla_bwd``, but for dS, which has been rounded as S has. Anchored in the
middle, a chunk may decay by twice as much as from its start. A program walks over all of V, so
that nothing is left to be summed but, over tiles of K, the gradients of a low-rank gate's input.
One whose chunk left the range says so in ``flags``, and ``gla_bwd_chunks_exact`` does it again.

| tensor  | shape           | dtype      | layout                                                 |
|---------|-----------------|------------|--------------------------------------------------------|
| q, k    | [B, T, H, K]    | io         | any b, t, h stride in units of UK, last dim 1          |
| v, do   | [B, T, H, V]    | io         | likewise, units of UV                                  |
| g       | [B, T, H, K]    | io or fp32 | likewise (vector gate), natural log, <= 0              |
| x       | [B, T, R]       | io         | any b, t stride in units of UR (low rank)              |
| w       | [H*K, R]        | io         | contiguous                                             |
| bias    | [H*K]           | io or fp32 | contiguous, absent when has_bias == 0                  |
| cu      | [N + 1]         | int32      | boundaries of a packed batch, see ``_place``           |
| states  | [B, HS, C, K, V] | state     | contiguous, before chunks, from ``gla_bwd_walks``      |
| dstates | [B, H, C, K, V] | state      | contiguous, behind chunks                              |
| dq, dk  | [B, T, H, K]    | io         | contiguous                                             |
| dg      | [B, T, H, K]    | as g       | contiguous (vector gate)                               |
| dx      | [B, H*NK, T, R] | fp32       | contiguous, a part of each head and K tile             |
| dw      | [B, C, H*K, R]  | fp32       | contiguous, a part of each chunk                       |
| db      | [B, C, H*K]     | fp32       | contiguous, likewise                                   |
| flags   | [grid]          | int32      | 1 where the chunk left the range                       |

C counts the N_KEPT chunks of each of S segments (``_place``). Heads and groups are those of
``gla_fwd``; all gradients are per head of the output.

Grid: x = K tiles (fastest, they share v and do in L2) x N_KEPT x S segments x B*H.
"""

import triton
import triton.language as tl

from glac.kernel_templates._bwd import (
    cumulative_log2_t,
    load_rows,
    logsigmoid_gate,
    lowrank_logits_t,
    store_rows,
    suffix_sum,
)
from glac.kernel_templates._exact import START_RANGE_LOG2
from glac.kernel_templates._gate import LOG2E, operand
from glac.kernel_templates._place import place


@triton.jit
def gla_bwd_chunks(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    g,  # [B, T, H, K]
    x,  # [B, T, R]
    w,  # [H*K, R]
    bias,  # [H*K]
    do,  # [B, T, H, V]
    cu,  # [N + 1]
    states,  # [B, HS, C, K, V]
    dstates,  # [B, H, C, K, V]
    dq,  # [B, T, H, K]
    dk,  # [B, T, H, K]
    dg,  # [B, T, H, K]
    dx,  # [B, H*NK, T, R]
    dw,  # [B, C, H*K, R]
    db,  # [B, C, H*K]
    flags,  # [grid]
    scale,
    inv_normalizer,
    clamp_log2,
    T,
    N,
    H,
    n_seg,
    seg_len,
    n_kept,
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
    do_b,
    do_t,
    do_h,
    g_b,
    g_t,
    g_h,
    x_b,
    x_t,
    K: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    UK: tl.constexpr,
    UV: tl.constexpr,
    UR: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    STAGES: tl.constexpr,
    LOWRANK: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):
    NK: tl.constexpr = (K + BK - 1) // BK
    MIDDLE: tl.constexpr = BT // 2 - 1
    IO: tl.constexpr = v.dtype.element_ty

    pid = tl.program_id(0)
    i_k = pid % NK
    i_c = (pid // NK) % n_kept
    i_b, _i_n, i_h, slot, bos, n_tok, t_begin, t_end, _is_first, _is_last = place(
        pid // (NK * n_kept), cu, T, N, H, 0, n_seg, seg_len, has_cu
    )
    t = t_begin + i_c * BT
    i_hs = i_h // s_group
    HS = H // s_group
    chunk = slot.to(tl.int64) * n_kept + i_c
    n_chunks = n_seg * n_kept

    row = tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < K
    m_t = t + row < n_tok
    m_tk = m_t[:, None] & m_k[None, :]
    m_low = row[:, None] >= row[None, :]
    if LOWRANK:
        o_r = tl.arange(0, BR)
        m_r = o_r < R
        p_dw = (i_h * K + o_k)[:, None] * R + o_r[None, :]
        m_w = m_k[:, None] & m_r[None, :]
        dw += (i_b * n_chunks + chunk) * H * K * R
        db += (i_b * n_chunks + chunk) * H * K
    if t >= t_end:
        if LOWRANK:
            # The caller adds up the parts of all slots.
            tl.store(dw + p_dw, tl.zeros([BK, BR], dtype=tl.float32), mask=m_w)
            tl.store(db + i_h * K + o_k, tl.zeros([BK], dtype=tl.float32), mask=m_k)
        tl.store(flags + pid, 0)
        return

    q += (i_b * q_b + bos * q_t + (i_h // q_group).to(tl.int64) * q_h) * UK
    k += (i_b * k_b + bos * k_t + (i_h // k_group).to(tl.int64) * k_h) * UK
    v += (i_b * v_b + bos * v_t + i_hs.to(tl.int64) * v_h) * UV
    do += (i_b * do_b + bos * do_t + i_h.to(tl.int64) * do_h) * UV
    row_q = q_t.to(tl.int64) * UK
    row_k = k_t.to(tl.int64) * UK
    row_v = v_t.to(tl.int64) * UV
    row_do = do_t.to(tl.int64) * UV
    out = ((i_b * T + bos) * H + i_h) * K
    row_dk = H.to(tl.int64) * K
    states += ((i_b * HS + i_hs) * n_chunks + chunk) * (K * V)
    dstates += ((i_b * H + i_h) * n_chunks + chunk) * (K * V)

    # Asked for before the loop, and there when it ends.
    if LOWRANK:
        p_w = (i_hs * K + o_k)[:, None] * R + o_r[None, :]
        b_w = tl.load(w + p_w, mask=m_w, other=0.0)  # [BK, BR]
        b_bias = tl.load(bias + i_hs * K + o_k, mask=m_k & (has_bias != 0), other=0.0)
        x += (i_b * x_b + bos * x_t) * UR
        row_x = x_t.to(tl.int64) * UR
        b_x = load_rows(x, t, 0, row_x, o_r, m_t[:, None] & m_r[None, :], BT, False)
        SUMMAND: tl.constexpr = tl.float16 if BF16 else tl.float32
    else:
        GATE: tl.constexpr = g.dtype.element_ty
        g += (i_b * g_b + bos * g_t + i_hs.to(tl.int64) * g_h) * UK
        row_g = g_t.to(tl.int64) * UK
        b_g = load_rows(g, t, 0, row_g, o_k, m_tk, BT, False)  # [BT, BK]
        b_first = tl.load(g + t * row_g + o_k, mask=m_k, other=0.0).to(tl.float32) * LOG2E
        SUMMAND: tl.constexpr = tl.bfloat16 if BF16 and GATE == tl.float32 else GATE
    b_q = load_rows(q, t, 0, row_q, o_k, m_tk, BT, False)  # [BT, BK]
    b_k = load_rows(k, t, 0, row_k, o_k, m_tk, BT, False)  # [BT, BK]

    b_da = tl.zeros([BT, BT], dtype=tl.float32)
    b_xt = tl.zeros([BK, BT], dtype=tl.float32)
    b_zt = tl.zeros([BK, BT], dtype=tl.float32)
    b_total = tl.zeros([BK], dtype=tl.float32)
    for v0 in tl.range(0, V, BV, num_stages=STAGES):
        o_v = v0 + tl.arange(0, BV)
        m_v = o_v < V
        m_tv = m_t[:, None] & m_v[None, :]
        p_s = o_k[:, None] * V + o_v[None, :]
        m_s = m_k[:, None] & m_v[None, :]
        b_v = operand(load_rows(v, t, 0, row_v, o_v, m_tv, BT, False), IO)  # [BT, BV]
        b_do = operand(load_rows(do, t, 0, row_do, o_v, m_tv, BT, False), IO)  # [BT, BV]
        b_s = operand(tl.load(states + p_s, mask=m_s, other=0.0), IO)  # [BK, BV]
        b_ds = operand(tl.load(dstates + p_s, mask=m_s, other=0.0), IO)  # [BK, BV]
        b_da = tl.dot(b_do, tl.trans(b_v), b_da, input_precision=PRECISION)
        b_xt = tl.dot(b_s, tl.trans(b_do), b_xt, input_precision=PRECISION)
        b_zt = tl.dot(b_ds, tl.trans(b_v), b_zt, input_precision=PRECISION)
        b_total += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), 1)
    b_da = operand(tl.where(m_low, b_da, 0.0), IO)

    if LOWRANK:
        b_y = lowrank_logits_t(b_w, b_x, b_bias.to(tl.float32) * LOG2E, PRECISION)
        b_gt, slope = logsigmoid_gate(b_y, inv_normalizer, clamp_log2, BF16)
        b_gt = tl.where(m_t[None, :], b_gt, 0.0)  # tokens outside must not decay
        b_first = tl.sum(tl.where((row == 0)[None, :], b_gt, 0.0), 1)
    else:
        b_gt = tl.trans(b_g)
    # The triangle of the cumulative gate less what the middle has: sums from there at once.
    since = (row[:, None] <= row[None, :]).to(tl.float32) - (row <= MIDDLE).to(tl.float32)[:, None]
    b_cum = cumulative_log2_t(b_gt, since.to(SUMMAND), LOWRANK, BF16)  # [BK, BT]
    b_end = tl.min(b_cum, 1)  # [BK], the last column: g <= 0 makes G fall along the chunk
    b_mid = b_first - tl.max(b_cum, 1)  # [BK], Gm: the first column holds the first gate less it
    b_e = tl.exp2(b_cum) * scale  # [BK, BT]
    b_f = tl.exp2(-b_cum)
    qh = operand(tl.trans(b_q) * b_e, IO)  # [BK, BT]
    kh = operand(tl.trans(b_k) * b_f, IO)  # [BK, BT]
    b_xt = b_xt * tl.exp2(b_mid)[:, None]
    b_zt = b_zt * tl.exp2(b_end)[:, None]
    b_xt = tl.dot(kh, tl.trans(b_da), b_xt, input_precision=PRECISION)
    store_rows(dq + out, tl.trans((b_xt * b_e).to(IO)), t, 0, row_dk, o_k, m_tk, BT, False)
    b_yt = tl.dot(qh, b_da, input_precision=PRECISION)  # [BK, BT]
    b_p = qh.to(tl.float32) * b_xt - kh.to(tl.float32) * b_yt
    b_dk = (b_yt + b_zt) * b_f
    store_rows(dk + out, tl.trans(b_dk.to(IO)), t, 0, row_dk, o_k, m_tk, BT, False)
    # Prefix sums of kh z as total minus suffix sum: then one triangle serves both terms.
    b_u = kh.to(tl.float32) * b_zt
    b_total = b_total * tl.exp2(b_mid + b_end) + tl.sum(b_u, 1)
    lower = m_low.to(tl.bfloat16 if BF16 else tl.float32)
    b_dg = suffix_sum(b_p - b_u, lower, BF16) + b_total[:, None]  # [BK, BT]
    if LOWRANK:
        b_dz = operand(tl.where(m_t[None, :], b_dg * slope, 0.0), IO)  # [BK, BT]
        tl.store(db + i_h * K + o_k, tl.sum(b_dz.to(tl.float32), 1), mask=m_k)
        b_dw = tl.dot(b_dz, operand(b_x, IO), input_precision=PRECISION)
        tl.store(dw + p_dw, b_dw, mask=m_w)
        b_dx = tl.dot(tl.trans(b_dz), operand(b_w, IO), input_precision=PRECISION)  # [BT, BR]
        p_dx = ((i_b * H + i_h) * NK + i_k) * T + bos + t + row
        p_dx = p_dx[:, None] * R + o_r[None, :]
        tl.store(dx + p_dx, b_dx, mask=m_t[:, None] & m_r[None, :])
    else:
        store_rows(dg + out, tl.trans(b_dg.to(GATE)), t, 0, row_dk, o_k, m_tk, BT, False)
    # For each channel, and so that a NaN counts as out of range: a minimum over channels drops it.
    in_range = (b_mid >= -START_RANGE_LOG2) & (b_end >= -START_RANGE_LOG2)
    tl.store(flags + pid, 1 - tl.min(in_range.to(tl.int32), 0))
