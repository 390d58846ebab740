"""Gradients of q, k and gate, a chunk in each program, from the states around it.

With S the state before a chunk of BT tokens, dS the gradient of the state behind it, and G the
cumulative gate (log2) since the middle of the chunk, Gm that from its start to its middle:

    qh = scale * q * 2^G           kh = k * 2^-G            dA = tril(do v^T)
    x  = dA kh + 2^Gm . (do S^T)   y  = dA^T qh             z  = 2^(Gend) . (v dS^T)
    dq = scale * 2^G . x           dk = 2^-G . (y + z)
    dg_t = sum_{i>=t} (qh x - kh y)_i + sum_{i<t} (kh z)_i + 2^(Gm + Gend) . sum_v S dS

With KEEP = 2 states are kept before, and gradients behind, every second chunk. Of its two states
a program then finds one again, from what ``gla_prepare`` made of the other chunk of its pair, with
Ga and Gb the whole decays of that one's first part and of its second, if it has two:

    first of the pair     dS = 2^(Ga + Gb) . dS' + (qs . 2^(0 or Ga))^T do    of the second
    second of the pair    S  = 2^(Ga + Gb) . S'  + (ks . 2^(Ga + Gb or Gb))^T v    of the first

The rounding is that of ``gla_bwd``, but for dS, which has been rounded as S has. Anchored in the
middle, a chunk may decay by twice as much as from its start. A program walks over all of V, so
that nothing is left to be summed. One whose chunk left the range says so in ``flags``, and
``gla_bwd_chunks_exact`` does it again.

| tensor  | shape           | dtype      | layout                                                 |
|---------|-----------------|------------|--------------------------------------------------------|
| q, k    | [B, T, H, K]    | io         | any b, t, h stride in units of UK, last dim 1          |
| v, do   | [B, T, H, V]    | io         | likewise, units of UV                                  |
| g       | [B, T, H, K]    | io or fp32 | likewise, natural log, <= 0                            |
| cu      | [N + 1]         | int32      | boundaries of a packed batch, see ``_place``           |
| qs, ks, decays, ranges | | | of ``gla_prepare`` (ends and flags there), not with KEEP = 1    |
| states  | [B, HS, S, N_KEPT, K, V] | state | contiguous, before each KEEP chunks             |
| dstates | [B, H, S, N_KEPT, K, V]  | state | contiguous, behind them, of ``gla_bwd_walks``   |
| dq, dk  | [B, T, H, K]    | io         | contiguous                                             |
| dg      | [B, T, H, K]    | as g       | contiguous                                             |
| flags   | [grid]          | int32      | 1 where the chunk left the range                       |

Segments are those of ``_place``, heads and groups those of ``gla_fwd``; all gradients are per head
of the output.

Grid: x = K tiles (fastest, they share v and do in L2) x chunks x S segments x B*H; the two chunks
of a pair follow each other, so that the second finds its states in L2.
"""

import triton
import triton.language as tl

from glac.kernel_templates._bwd import (
    cumulative_log2_t,
    load_rows,
    store_rows,
    suffix_sum,
)
from glac.kernel_templates._exact import START_RANGE_LOG2
from glac.kernel_templates._gate import LOG2E, operand
from glac.kernel_templates._place import place


@triton.jit
def _moved(
    tiles, decays, ranges, at, t, t_end, prepared, WHOLE: tl.constexpr, o_k,
    PK: tl.constexpr, BT: tl.constexpr, IO: tl.constexpr,
):  # fmt: skip
    """What moves a state over the chunk of tokens from t on, prepared in one part or two.

    Args:
        tiles: ks or qs of ``gla_prepare``.
        at: its first chunk of the sequence.
        prepared: tokens of one of its chunks.
        WHOLE: tiles decay to the end of their part (ks), else from its start (qs).

    Returns:
        The tile ``[BK, BT]``, all decays ``[BK]``, and 1 if a part had left the range.
    """
    row = tl.arange(0, BT)
    first = at + t // prepared
    there = t < t_end
    also = (prepared < BT) & (t + prepared < t_end)
    m_k = o_k < PK
    b_a = tl.load(decays + first * PK + o_k, mask=m_k & there, other=1.0)
    b_b = tl.load(decays + (first + 1) * PK + o_k, mask=m_k & also, other=1.0)
    bad = tl.load(ranges + first, mask=there, other=0)
    bad = tl.maximum(bad, tl.load(ranges + first + 1, mask=also, other=0))
    m_t = (row < prepared) & there | (row >= prepared) & also
    p_m = (first * prepared + row)[:, None] * PK + o_k[None, :]
    b_m = tl.load(tiles + p_m, mask=m_t[:, None] & m_k[None, :], other=0.0)  # [BT, BK]
    if WHOLE:
        b_f = tl.where(row[None, :] < prepared, (b_a * b_b)[:, None], b_b[:, None])
    else:
        b_f = tl.where(row[None, :] < prepared, 1.0, b_a[:, None])
    return operand(tl.trans(b_m).to(tl.float32) * b_f, IO), b_a * b_b, bad


@triton.jit
def _sums(
    states, dstates, v, do, b_m, b_end, t, t_other, row_v, row_do, n_tok, o_k, m_k,
    V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
    FOUND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``do v^T``, ``S do^T``, ``dS v^T`` and the sums of ``S dS``, over all of V.

    Args:
        FOUND: 1 where dS is that behind the other chunk, at t_other, 2 where S is that before it.
        b_m, b_end: of ``_moved``.
    """
    IO: tl.constexpr = v.dtype.element_ty
    row = tl.arange(0, BT)
    m_t = t + row < n_tok
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
        if FOUND != 0:
            m_other = (t_other + row < n_tok)[:, None] & m_v[None, :]
            if FOUND == 1:
                b_u = load_rows(do, t_other, 0, row_do, o_v, m_other, BT, False)  # [BT, BV]
                b_d = b_ds.to(tl.float32) * b_end[:, None]
                b_ds = operand(tl.dot(b_m, operand(b_u, IO), b_d, input_precision=PRECISION), IO)
            else:
                b_u = load_rows(v, t_other, 0, row_v, o_v, m_other, BT, False)  # [BT, BV]
                b_d = b_s.to(tl.float32) * b_end[:, None]
                b_s = operand(tl.dot(b_m, operand(b_u, IO), b_d, input_precision=PRECISION), IO)
        b_da = tl.dot(b_do, tl.trans(b_v), b_da, input_precision=PRECISION)
        b_xt = tl.dot(b_s, tl.trans(b_do), b_xt, input_precision=PRECISION)
        b_zt = tl.dot(b_ds, tl.trans(b_v), b_zt, input_precision=PRECISION)
        b_total += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), 1)
    return b_da, b_xt, b_zt, b_total


@triton.jit
def gla_bwd_chunks(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    g,  # [B, T, H, K]
    do,  # [B, T, H, V]
    cu,  # [N + 1]
    qs,  # [B, H, P, BP, BK']
    ks,  # [B, H, P, BP, BK']
    decays,  # [B, H, P, BK']
    ranges,  # [B, H, P]
    states,  # [B, HS, S, N_KEPT, K, V]
    dstates,  # [B, H, S, N_KEPT, K, V]
    dq,  # [B, T, H, K]
    dk,  # [B, T, H, K]
    dg,  # [B, T, H, K]
    flags,  # [grid]
    scale,
    T,
    N,
    H,
    n_seg,
    seg_len,
    n_kept,
    n_prepared,
    prepared,
    q_group,
    k_group,
    s_group,
    has_cu,
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
    PK: tl.constexpr,
    STAGES: tl.constexpr,
    KEEP: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):
    NK: tl.constexpr = (K + BK - 1) // BK
    MIDDLE: tl.constexpr = BT // 2 - 1
    IO: tl.constexpr = v.dtype.element_ty

    pid = tl.program_id(0)
    i_k = pid % NK
    i_c = (pid // NK) % (n_kept * KEEP)
    i_b, i_n, i_h, slot, bos, n_tok, t_begin, t_end, _is_first, _is_last = place(
        pid // (NK * n_kept * KEEP), cu, T, N, H, 0, n_seg, seg_len, has_cu
    )
    t = t_begin + i_c * BT
    i_hs = i_h // s_group
    HS = H // s_group
    chunk = slot.to(tl.int64) * (n_kept * KEEP) + i_c
    n_chunks = n_seg * (n_kept * KEEP)

    row = tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < K
    m_t = t + row < n_tok
    m_tk = m_t[:, None] & m_k[None, :]
    m_low = row[:, None] >= row[None, :]
    if t >= t_end:
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
    states += ((i_b * HS + i_hs) * n_chunks + chunk) // KEEP * (K * V)
    dstates += ((i_b * H + i_h) * n_chunks + chunk) // KEEP * (K * V)

    # Asked for before the loop, and there when it ends.
    GATE: tl.constexpr = g.dtype.element_ty
    g += (i_b * g_b + bos * g_t + i_hs.to(tl.int64) * g_h) * UK
    row_g = g_t.to(tl.int64) * UK
    b_g = load_rows(g, t, 0, row_g, o_k, m_tk, BT, False)  # [BT, BK]
    b_first = tl.load(g + t * row_g + o_k, mask=m_k, other=0.0).to(tl.float32) * LOG2E
    SUMMAND: tl.constexpr = tl.bfloat16 if BF16 and GATE == tl.float32 else GATE
    b_q = load_rows(q, t, 0, row_q, o_k, m_tk, BT, False)  # [BT, BK]
    b_k = load_rows(k, t, 0, row_k, o_k, m_tk, BT, False)  # [BT, BK]

    if KEEP == 1:
        b_da, b_xt, b_zt, b_total = _sums(
            states, dstates, v, do, 0.0, 0.0, t, t, row_v, row_do, n_tok, o_k, m_k,
            V, BT, BK, BV, STAGES, 0, PRECISION,
        )  # fmt: skip
    else:
        at = (i_b * H + i_h) * n_prepared + tl.where(has_cu != 0, bos // prepared + i_n, 0)
        if i_c % KEEP == 0:
            b_m, b_end, out_of_range = _moved(
                qs, decays, ranges, at, t + BT, t_end, prepared, False, o_k, PK, BT, IO
            )
            b_da, b_xt, b_zt, b_total = _sums(
                states, dstates, v, do, b_m, b_end, t, t + BT, row_v, row_do, n_tok, o_k, m_k,
                V, BT, BK, BV, STAGES, 1, PRECISION,
            )  # fmt: skip
        else:
            b_m, b_end, out_of_range = _moved(
                ks, decays, ranges, at, t - BT, t_end, prepared, True, o_k, PK, BT, IO
            )
            b_da, b_xt, b_zt, b_total = _sums(
                states, dstates, v, do, b_m, b_end, t, t - BT, row_v, row_do, n_tok, o_k, m_k,
                V, BT, BK, BV, STAGES, 2, PRECISION,
            )  # fmt: skip
    b_da = operand(tl.where(m_low, b_da, 0.0), IO)

    b_gt = tl.trans(b_g)
    # The triangle of the cumulative gate less what the middle has: sums from there at once.
    since = (row[:, None] <= row[None, :]).to(tl.float32) - (row <= MIDDLE).to(tl.float32)[:, None]
    b_cum = cumulative_log2_t(b_gt, since.to(SUMMAND), False, BF16)  # [BK, BT]
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
    store_rows(dg + out, tl.trans(b_dg.to(GATE)), t, 0, row_dk, o_k, m_tk, BT, False)
    # For each channel, and so that a NaN counts as out of range: a minimum over channels drops it.
    in_range = (b_mid >= -START_RANGE_LOG2) & (b_end >= -START_RANGE_LOG2)
    b_bad = 1 - tl.min(in_range.to(tl.int32), 0)
    if KEEP > 1:
        b_bad = tl.maximum(b_bad, out_of_range)
    tl.store(flags + pid, b_bad)
