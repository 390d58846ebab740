"""Both walks that a backward pass needs before ``gla_bwd_chunks``, side by side, with dv.

From what ``gla_prepare`` made of each chunk of BT rows (qs, ks, scores, decay), transposed as in
``gla_walk``:

    forward    S^T  = (S^T + v^T ks) . decay
    back       D^T  = dS^T . decay          dS^T = D^T + do^T qs
               dv^T = D^T ks^T + do^T scores

The first stores the state S before every ``keep`` tokens of a segment (``_place``), the second the
gradient dS of the state behind them. Neither waits for the other, so one launch has programs of
both kinds: where heads are few, half of the GPU would idle in each of two launches. With states on
both sides all chunks' gradients are independent of each other, and complete.

A segment with a flag set is left to ``gla_bwd_walks_exact``: with its blocks in this kernel the
loops spilled 2 KB at K = 256.

| tensor  | shape           | dtype      | layout                                                 |
|---------|-----------------|------------|--------------------------------------------------------|
| q, k    | [B, T, H, K]    | io         | any b, t, h stride in units of UK, last dim 1          |
| v, do   | [B, T, H, V]    | io         | likewise, units of UV                                  |
| g       | [B, T, H, K]    | io or fp32 | likewise, natural log, <= 0                            |
| cu      | [N + 1]         | int32      | boundaries of a packed batch, see ``_place``           |
| h0      | [N, HS, K, V]   | fp32       | contiguous, absent when has_h0 == 0                    |
| starts  | [B, HS, S, K, V] | fp32      | contiguous, state before segments, not the first       |
| dht     | [N, HS, K, V]   | fp32       | contiguous, absent when has_dht == 0                   |
| ends    | [B, H, S, K, V] | fp32       | contiguous, dS at segments' ends, not of the last      |
| qs, ks, scores, decays, flags | | | of ``gla_prepare``, whose decays are called ends          |
| states  | [B, HS, S, N_KEPT, K, V] | state | contiguous, slot j: before token j * keep          |
| dstates | [B, H, S, N_KEPT, K, V]  | state | contiguous, slot j: behind those tokens            |
| dv      | [B, T, H, V]    | io         | contiguous                                             |
| dh0     | [N, H, K, V]    | fp32       | contiguous, absent when has_dh0 == 0                   |

Heads and groups are those of ``gla_fwd``; of heads that share a state the first walks forward.

Grid: x = V tiles (fastest, they share what was prepared in L2) x the two walks x S segments x B*H.
"""

import triton
import triton.language as tl

from glac.kernel_templates._bwd import load_rows, store_rows
from glac.kernel_templates._flags import flagged
from glac.kernel_templates._gate import operand
from glac.kernel_templates._place import place


@triton.jit
def _store_state(
    dst, desc, slot, v0, tile, p_state, m_state, K: tl.constexpr, V: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Store ``[BV, BK]`` as a part of the ``[K, V]`` state of a slot."""
    if TMA:
        desc.store([slot * K, v0], tl.trans(tile))
    else:
        tl.store(dst + slot.to(tl.int64) * (K * V) + p_state, tile, mask=m_state)


@triton.jit
def gla_bwd_walks(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    g,  # [B, T, H, K]
    do,  # [B, T, H, V]
    cu,  # [N + 1]
    h0,  # [N, HS, K, V]
    starts,  # [B, HS, S, K, V]
    dht,  # [N, HS, K, V]
    ends,  # [B, H, S, K, V]
    qs,  # [B, H, C, BT, BK]
    ks,  # [B, H, C, BT, BK]
    scores,  # [B, H, C, BT, BT]
    decays,  # [B, H, C, BK]
    flags,  # [B, H, C]
    states,  # [B, HS, S, N_KEPT, K, V]
    dstates,  # [B, H, S, N_KEPT, K, V]
    dv,  # [B, T, H, V]
    dh0,  # [N, H, K, V]
    scale,
    T,
    N,
    H,
    n_seg,
    seg_len,
    n_chunks,
    keep,
    n_kept,
    q_group,
    k_group,
    s_group,
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
    BK: tl.constexpr,
    UV: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    NV: tl.constexpr = (V + BV - 1) // BV
    IO: tl.constexpr = do.dtype.element_ty
    STATE: tl.constexpr = states.dtype.element_ty
    # Where K is padded the copy of a state would reach into the next one.
    WHOLE: tl.constexpr = TMA and BK == K

    pid = tl.program_id(0)
    i_v = pid % NV
    walks_back = (pid // NV) % 2 == 0
    i_b, i_n, i_h, slot, bos, n_tok, t_begin, t_end, is_first, is_last = place(
        pid // (2 * NV), cu, T, N, H, 0, n_seg, seg_len, has_cu
    )
    i_hs = i_h // s_group
    HS = H // s_group

    row = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    v0 = i_v * BV
    o_v = v0 + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    p_state = o_k[None, :] * V + o_v[:, None]  # [BV, BK]
    m_state = m_k[None, :] & m_v[:, None]

    m_all = (row < BT)[:, None]  # what was prepared is whole
    # The sequence's first chunk, as gla_prepare placed it.
    chunk = (i_b * H + i_h) * n_chunks + tl.where(has_cu != 0, bos // BT + i_n, 0)
    ks += chunk * (BT * BK)
    decays += chunk * BK
    row_s = tl.full([], BK, tl.int64)
    rows = tl.maximum(n_tok, 1)
    full = tl.cdiv(rows, BT) * BT
    s_ks = tl.make_tensor_descriptor(ks, [full, BK], [BK, 1], [BT, BK]) if TMA else ks
    n_walked = tl.cdiv(t_end - t_begin, BT)

    if flagged(flags + chunk, t_begin, t_end, BT) != 0:
        return

    if walks_back:
        qs += chunk * (BT * BK)
        scores += chunk * (BT * BT)
        do += (i_b * do_b + bos * do_t + i_h.to(tl.int64) * do_h) * UV
        dv += ((i_b * T + bos) * H + i_h) * V
        row_do = do_t.to(tl.int64) * UV
        row_dv = H.to(tl.int64) * V
        row_a = tl.full([], BT, tl.int64)
        dstates += ((i_b * H + i_h) * n_seg + slot) * n_kept * (K * V)
        s_qs = tl.make_tensor_descriptor(qs, [full, BK], [BK, 1], [BT, BK]) if TMA else qs
        s_a = tl.make_tensor_descriptor(scores, [full, BT], [BT, 1], [BT, BT]) if TMA else scores
        s_do = tl.make_tensor_descriptor(do, [rows, V], [row_do, 1], [BT, BV]) if TMA else do
        s_dv = tl.make_tensor_descriptor(dv, [rows, V], [row_dv, 1], [BT, BV]) if TMA else dv
        s_ds = dstates
        if WHOLE:
            s_ds = tl.make_tensor_descriptor(dstates, [n_kept * K, V], [V, 1], [BK, BV])
        end = dht + (i_n * HS + i_hs) * (K * V)
        # Heads that share a state take its gradient once.
        has_end = tl.where(i_h % s_group == 0, has_dht, 0)
        if not is_last:
            end = ends + ((i_b * H + i_h) * n_seg + slot) * (K * V)
            has_end = tl.where(t_begin < t_end, 1, 0)
        b_ds = tl.load(end + p_state, mask=m_state & (has_end != 0), other=0.0)  # [BV, BK]
        if n_walked > 0:
            i_kept = (n_walked - 1) * BT // keep
            _store_state(dstates, s_ds, i_kept, v0, b_ds.to(STATE), p_state, m_state, K, V, WHOLE)
        # The decay of the chunk that comes next: loaded behind the products of the one before,
        # as it would take registers beside their operands (796 bytes of spills at K = 256).
        p_e = decays + (t_begin // BT + n_walked - 1) * row_s + o_k
        b_e = tl.load(p_e, mask=(o_k < BK) & (n_walked > 0), other=1.0)
        b_ds = b_ds * b_e[None, :]
        for i in tl.range(0, n_walked, num_stages=STAGES):
            t_in = (n_walked - 1 - i) * BT
            t = t_begin + t_in
            m_tv = (t + row < n_tok)[:, None] & m_v[None, :]
            b_do = operand(load_rows(s_do, t, v0, row_do, o_v, m_tv, BT, TMA), IO)  # [BT, BV]
            b_k = load_rows(s_ks, t, 0, row_s, o_k, m_all, BT, TMA)  # [BT, BK]
            b_a = load_rows(s_a, t, 0, row_a, row, m_all, BT, TMA)  # [BT, BT]
            b_q = load_rows(s_qs, t, 0, row_s, o_k, m_all, BT, TMA)
            b_dot = tl.trans(b_do)  # [BV, BT]
            # [BV, BT]
            b_dv = tl.dot(operand(b_ds, IO), tl.trans(b_k), input_precision=PRECISION)
            b_dv = tl.dot(b_dot, b_a, b_dv, input_precision=PRECISION)
            b_ds = tl.dot(b_dot, b_q, b_ds, input_precision=PRECISION)
            if (t_in % keep == 0) & (t_in > 0):
                i_kept = t_in // keep - 1
                _store_state(
                    dstates, s_ds, i_kept, v0, b_ds.to(STATE), p_state, m_state, K, V, WHOLE
                )
            p_e = decays + (t // BT - 1) * row_s + o_k
            b_e = tl.load(p_e, mask=(o_k < BK) & (t_in > 0), other=1.0)
            b_ds = b_ds * b_e[None, :]
            store_rows(s_dv, tl.trans(b_dv.to(IO)), t, v0, row_dv, o_v, m_tv, BT, TMA)
        p_dh0 = dh0 + (i_n * H + i_h) * (K * V) + p_state
        tl.store(p_dh0, b_ds, mask=m_state & is_first & (has_dh0 != 0))
    elif i_h % s_group == 0:
        v += (i_b * v_b + bos * v_t + i_hs.to(tl.int64) * v_h) * UV
        row_v = v_t.to(tl.int64) * UV
        states += ((i_b * HS + i_hs) * n_seg + slot) * n_kept * (K * V)
        s_v = tl.make_tensor_descriptor(v, [rows, V], [row_v, 1], [BT, BV]) if TMA else v
        s_s = states
        if WHOLE:
            s_s = tl.make_tensor_descriptor(states, [n_kept * K, V], [V, 1], [BK, BV])
        start = h0 + (i_n * HS + i_hs) * (K * V)
        has_start = has_h0
        if not is_first:
            start = starts + ((i_b * HS + i_hs) * n_seg + slot) * (K * V)
            has_start = tl.where(t_begin < t_end, 1, 0)
        b_s = tl.load(start + p_state, mask=m_state & (has_start != 0), other=0.0)  # [BV, BK]
        if n_walked > 0:
            _store_state(
                states, s_s, t_begin * 0, v0, b_s.to(STATE), p_state, m_state, K, V, WHOLE
            )
        for i in tl.range(0, n_walked - 1, num_stages=STAGES):
            t_in = i * BT
            t = t_begin + t_in
            m_tv = (t + row < n_tok)[:, None] & m_v[None, :]
            b_k = load_rows(s_ks, t, 0, row_s, o_k, m_all, BT, TMA)
            b_v = operand(load_rows(s_v, t, v0, row_v, o_v, m_tv, BT, TMA), IO)
            b_s = tl.dot(tl.trans(b_v), b_k, b_s, input_precision=PRECISION)
            b_e = tl.load(decays + t // BT * row_s + o_k)
            b_s = b_s * b_e[None, :]
            # Behind the products: before them it spilled 640 bytes at K = 256.
            if (t_in + BT) % keep == 0:
                i_kept = (t_in + BT) // keep
                _store_state(states, s_s, i_kept, v0, b_s.to(STATE), p_state, m_state, K, V, WHOLE)
