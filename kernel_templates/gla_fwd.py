"""Fused forward of gated linear attention: one program walks one segment of one head.

    S_t = diag(exp g_t) S_{t-1} + k_t^T v_t,   o_t = scale * q_t S_t     (arXiv 2312.06635, eq. 4)

in chunks of BT rows, anchored at the chunk's start (G = cumulative gate in the chunk, log2):

    qh = scale * q * 2^G       kh = k * 2^-G
    o  = tril(qh kh^T) v + qh S
    S  = 2^Gend . (S + kh^T v)

The anchor is in range while no channel decays by more than 2^-80 in a chunk. The fast loop only
keeps the smallest Gend it has seen; if that left the range, the program does its segment again in
16-row blocks that are exact for every gate, and overwrites what it wrote. So ordinary gates pay
one [BK] minimum per chunk, and there is no branch in the loop (a branch there cost 13 %).

The state before a segment is in ``starts``. With LEAD, for few and short sequences, a program
walks there from the first token itself (``_lead``), and leaves it there for its second pass.

| tensor | shape              | dtype            | layout                                        |
|--------|--------------------|------------------|-----------------------------------------------|
| q, k   | [B, T, H, K]       | io               | any b, t, h stride in units of UK, last dim 1 |
| v      | [B, T, H, V]       | io               | likewise, units of UV                         |
| g      | [B, T, H, K]       | io or fp32       | likewise (vector gate), natural log, <= 0     |
| x      | [B, T, R]          | io               | any b, t stride in units of UR (low rank)     |
| w      | [H*K, R]           | io               | contiguous                                    |
| bias   | [H*K]              | io or fp32       | contiguous, absent when has_bias == 0         |
| o      | [B, T, H, V]       | io               | contiguous                                    |
| cu     | [N + 1]            | int32            | boundaries of a packed batch, see ``_place``  |
| h0     | [N, HS, K, V]      | fp32             | contiguous, absent when has_h0 == 0           |
| starts | [B, HS, S, K, V]   | fp32             | contiguous, state before segments j > 0       |
| ht     | [N, HS, K, V]      | fp32             | contiguous, absent when has_ht == 0           |

H counts heads of the output. Head i reads q of head i // q_group, k of i // k_group, and v, gate
and state of i // s_group, of which there are HS = H / s_group. N = B in a dense batch.

Grid: x = V tiles (fastest, they share q, k and g in L2) x S segments x B*H.
"""

import triton
import triton.language as tl

from glac.kernel_templates._bwd import cumulative_log2_t
from glac.kernel_templates._exact import START_RANGE_LOG2, exact_segment, exact_segment_called
from glac.kernel_templates._gate import LOG2E, cumulative_log2, lowrank_gate_log2, operand
from glac.kernel_templates._lead import lead_rows, lead_walk
from glac.kernel_templates._place import place

CALLED_TILE = tl.constexpr(128 * 128)
"""State tiles from here on call the exact pass, smaller ones inline it (see ``_exact``)."""


@triton.jit
def gla_fwd(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    g,  # [B, T, H, K]
    x,  # [B, T, R]
    w,  # [H*K, R]
    bias,  # [H*K]
    o,  # [B, T, H, V]
    cu,  # [N + 1]
    h0,  # [N, HS, K, V]
    starts,  # [B, HS, S, K, V]
    ht,  # [N, HS, K, V]
    scale,
    inv_normalizer,
    clamp_log2,
    T,
    N,
    H,
    n_seg,
    seg_len,
    q_group,
    k_group,
    s_group,
    has_cu,
    has_h0,
    has_ht,
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
    g_b,
    g_t,
    g_h,
    x_b,
    x_t,
    K: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    UK: tl.constexpr,
    UV: tl.constexpr,
    UR: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BX: tl.constexpr,
    LEAD: tl.constexpr,
    ENDS: tl.constexpr,
    STAGES: tl.constexpr,
    LOWRANK: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    NV: tl.constexpr = (V + BV - 1) // BV
    IO: tl.constexpr = v.dtype.element_ty

    pid = tl.program_id(0)
    i_v = pid % NV
    i_b, i_n, i_h, slot, bos, n_tok, t_begin, t_end, is_first, is_last = place(
        pid // NV, cu, T, N, H, 0, n_seg, seg_len, has_cu
    )
    i_hs = i_h // s_group
    HS = H // s_group

    row = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_tri = row[:, None] >= row[None, :]

    q += (i_b * q_b + bos * q_t + (i_h // q_group).to(tl.int64) * q_h) * UK
    k += (i_b * k_b + bos * k_t + (i_h // k_group).to(tl.int64) * k_h) * UK
    v += (i_b * v_b + bos * v_t + i_hs.to(tl.int64) * v_h) * UV
    o += ((i_b * T + bos) * H + i_h) * V
    row_q = q_t.to(tl.int64) * UK
    row_k = k_t.to(tl.int64) * UK
    row_v = v_t.to(tl.int64) * UV
    row_o = H.to(tl.int64) * V
    if LOWRANK:
        o_r = tl.arange(0, BR)
        m_r = o_r < R
        x += (i_b * x_b + bos * x_t) * UR
        row_x = x_t.to(tl.int64) * UR
        p_w = (i_hs * K + o_k)[None, :] * R + o_r[:, None]
        b_w = tl.load(w + p_w, mask=m_k[None, :] & m_r[:, None], other=0.0)  # [BR, BK]
        b_bias = tl.load(bias + i_hs * K + o_k, mask=m_k & (has_bias != 0), other=0.0)
        b_bias = b_bias.to(tl.float32) * LOG2E
    else:
        g += (i_b * g_b + bos * g_t + i_hs.to(tl.int64) * g_h) * UK
        row_g = g_t.to(tl.int64) * UK

    if TMA:
        rows = tl.maximum(n_tok, 1)
        d_q = tl.make_tensor_descriptor(q, [rows, K], [row_q, 1], [BT, BK])
        d_k = tl.make_tensor_descriptor(k, [rows, K], [row_k, 1], [BT, BK])
        d_v = tl.make_tensor_descriptor(v, [rows, V], [row_v, 1], [BT, BV])
        d_o = tl.make_tensor_descriptor(o, [rows, V], [row_o, 1], [BT, BV])
        if not LOWRANK:
            d_g = tl.make_tensor_descriptor(g, [rows, K], [row_g, 1], [BT, BK])

    p_state = o_k[:, None] * V + o_v[None, :]
    m_state = m_k[:, None] & m_v[None, :]
    start = h0 + (i_n * HS + i_hs) * (K * V)
    has_start = has_h0
    if LEAD == 0:
        if not is_first:
            start = starts + ((i_b * HS + i_hs) * n_seg + slot) * (K * V)
            has_start = tl.where(t_begin < t_end, 1, 0)
    b_s = tl.load(start + p_state, mask=m_state & (has_start != 0), other=0.0)  # [BK, BV]
    if LEAD > 0:
        if LEAD == BT and TMA:
            l_k = d_k
            l_v = d_v
        else:
            l_k = lead_rows(k, tl.maximum(n_tok, 1), K, row_k, LEAD, BK, TMA)
            l_v = lead_rows(v, tl.maximum(n_tok, 1), V, row_v, LEAD, BV, TMA)
        if LOWRANK:
            l_g = x
            l_w = tl.trans(b_w)
            l_bias = b_bias
            row_l = row_x
        else:
            l_w = 0.0
            l_bias = 0.0
            row_l = row_g
            if LEAD == BT and TMA:
                l_g = d_g
            else:
                l_g = lead_rows(g, tl.maximum(n_tok, 1), K, row_g, LEAD, BK, TMA)
        b_s = lead_walk(
            b_s, l_k, l_v, l_g, l_w, l_bias, 1.0, inv_normalizer, clamp_log2,
            0, t_begin, n_tok, 0, i_v * BV, row_k, row_v, row_l, m_k, m_v,
            R, BR, BK, BV, LEAD, STAGES + 1, False, LOWRANK, BF16, PRECISION, TMA,
        )  # fmt: skip
        # For the second pass. Heads that share a state write equal values.
        if not is_first:
            start = starts + ((i_b * HS + i_hs) * n_seg + slot) * (K * V)
            has_start = tl.where(t_begin < t_end, 1, 0)
            tl.store(start + p_state, b_s, mask=m_state & (has_start != 0))

    worst = tl.zeros([BK], dtype=tl.float32)
    m_cum = m_tri
    # Gend from a product of its own, whose rows are channels as those of the state are, costs a
    # chunk 143 instructions and two barriers less than a minimum over rows: 1.56 us instead of
    # 1.68 at 64 channels and 64 tokens. At 128 channels it depends: 3 % less time for
    # 16,2048,8,128,128, 7 % more for 4,4096,64 with a low-rank gate.
    BY_PRODUCT: tl.constexpr = ENDS or (LEAD > 0 and BF16 and not LOWRANK)
    if BY_PRODUCT and not LOWRANK:
        GATE: tl.constexpr = g.dtype.element_ty
        ones = tl.full([BT, 16], 1.0, tl.bfloat16 if BF16 and GATE == tl.float32 else GATE)
    for t in tl.range(t_begin, t_end, BT, num_stages=STAGES):
        m_t = t + row < n_tok
        m_tk = m_t[:, None] & m_k[None, :] if BK != K else m_t[:, None]
        m_tv = m_t[:, None] & m_v[None, :] if V % BV != 0 else m_t[:, None]
        if LOWRANK:
            p_x = row[:, None] * (x_t * UR) + o_r[None, :]
            b_x = tl.load(x + t * row_x + p_x, mask=m_t[:, None] & m_r[None, :], other=0.0)
            b_g = lowrank_gate_log2(b_x, b_w, b_bias, inv_normalizer, clamp_log2, BF16, PRECISION)
            # Rows outside the sequence must not decay: cheaper on the triangle than on the gate.
            m_cum = m_tri & m_t[None, :]
            if BY_PRODUCT:
                ones = tl.where(m_t, 1.0, 0.0)[:, None] + tl.zeros([BT, 16], dtype=tl.float32)
                ones = ones.to(tl.float16 if BF16 else tl.float32)
        elif TMA:
            b_g = d_g.load([t, 0])
        else:
            p_g = row[:, None] * (g_t * UK) + o_k[None, :]
            b_g = tl.load(g + t * row_g + p_g, mask=m_tk, other=0.0)
        if TMA:
            b_k = d_k.load([t, 0])
            b_q = d_q.load([t, 0])
            b_v = d_v.load([t, i_v * BV])
        else:
            p_k = row[:, None] * (k_t * UK) + o_k[None, :]
            b_k = tl.load(k + t * row_k + p_k, mask=m_tk, other=0.0)
            p_q = row[:, None] * (q_t * UK) + o_k[None, :]
            b_q = tl.load(q + t * row_q + p_q, mask=m_tk, other=0.0)
            p_v = row[:, None] * (v_t * UV) + o_v[None, :]
            b_v = tl.load(v + t * row_v + p_v, mask=m_tv, other=0.0)
        b_v = operand(b_v, IO)

        b_cum = cumulative_log2(b_g, m_cum, LOWRANK, BF16)  # [BT, BK]
        if BY_PRODUCT:
            # All columns are equal. What G is summed from is the same and in fp32 as exact.
            b_end = tl.min(cumulative_log2_t(tl.trans(b_g), ones, LOWRANK, BF16), 1)  # [BK]
        else:
            # The last row as a minimum: g <= 0 makes G fall along the chunk. (Summing g again
            # costs a layout conversion of the whole tile: 266 us instead of 150 at
            # 16,2048,8,128,128.)
            b_end = tl.min(b_cum, 0)  # [BK]
        worst = tl.minimum(worst, b_end)
        qh = operand(b_q * (tl.exp2(b_cum) * scale), IO)
        kh = operand(b_k * tl.exp2(-b_cum), IO)

        b_o = tl.dot(qh, operand(b_s, IO), input_precision=PRECISION)  # [BT, BV]
        b_a = tl.dot(qh, tl.trans(kh), input_precision=PRECISION)  # [BT, BT]
        b_s = tl.dot(tl.trans(kh), b_v, b_s, input_precision=PRECISION)
        b_a = operand(tl.where(m_tri, b_a, 0.0), IO)
        b_o = tl.dot(b_a, b_v, b_o, input_precision=PRECISION)
        b_s = b_s * tl.exp2(b_end)[:, None]
        if TMA:
            d_o.store([t, i_v * BV], b_o.to(IO))
        else:
            p_o = row[:, None] * (H * V) + o_v[None, :]
            tl.store(o + t * row_o + p_o, b_o.to(IO), mask=m_tv)

    ht += (i_n * HS + i_hs) * (K * V)
    # Heads that share a state write it once.
    keep = (has_ht != 0) & is_last & (i_h % s_group == 0)
    # Written so that a NaN counts as out of range.
    if not (tl.min(worst, 0) >= -START_RANGE_LOG2):
        if TMA and not INTERPRETED:
            # The descriptor stores above are asynchronous: they must have landed before this
            # overwrites them.
            tl.inline_asm_elementwise(
                "cp.async.bulk.wait_group 0; mov.b32 $0, $1;",
                "=r,r",
                [t_begin],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
            tl.debug_barrier()
        elif LEAD > 0 and not INTERPRETED:
            tl.debug_barrier()  # the start state was written by other threads
        if BK * BV >= CALLED_TILE:
            exact_segment_called(
                q, k, v, g, x, w, bias, o, start, ht, scale, inv_normalizer, clamp_log2,
                n_tok, t_begin, t_end, i_hs, i_v, has_start, keep.to(tl.int32), has_bias,
                q_t, k_t, v_t, g_t, x_t, H * V,
                K, V, R, BK, BR, UK, UV, UR, BV, BX, LOWRANK, BF16, PRECISION,
            )  # fmt: skip
        else:
            exact_segment(
                q, k, v, g, x, w, bias, o, start, ht, scale, inv_normalizer, clamp_log2,
                n_tok, t_begin, t_end, i_hs, i_v, has_start, keep.to(tl.int32), has_bias,
                q_t, k_t, v_t, g_t, x_t, H * V,
                K, V, R, BK, BR, UK, UV, UR, BV, BX, LOWRANK, BF16, PRECISION,
            )  # fmt: skip
    else:
        tl.store(ht + p_state, b_s, mask=m_state & keep)
