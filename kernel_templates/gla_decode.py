"""Decoding: one or a few tokens of gated linear attention against a stored state.

    S_t = diag(exp g_t) S_{t-1} + k_t^T v_t,   o_t = scale * q_t S_t     (arXiv 2312.06635, eq. 4)

A program holds a [BK, BV] tile of one head's state in registers: it reads it once, walks the
tokens, and writes it once, or (per_token) after every token. All arithmetic is fp32; there are no
matrix products and no chunks, so every gate g <= 0 is exact. The work is moving the state.

Where a state lies: row ``slot`` of a pool, with slot = idx[n], or row n where idx_step == 0. A
slot outside [0, n_slots) is an inactive sequence: its output is 0 and no pool row is touched.
Slots are read as 32-bit words idx_step apart, so that 64-bit indices are read by their low halves.

Head groups: o has H heads; head i reads q head i // q_group, k head i // k_group and state
i // s_group, which owns v and the gate. One program serves all s_group heads of a state.

| tensor    | shape               | dtype      | layout                                        |
|-----------|---------------------|------------|-----------------------------------------------|
| q, k      | [B, T, H?, K]       | io         | b, t, h strides in units of UK, last dim 1    |
| v         | [B, T, Hs, V]       | io         | likewise, units of UV                         |
| g         | [B, T, Hs, K]       | io or fp32 | likewise (vector gate), natural log, <= 0     |
|           | [B, T, Hs]          | io or fp32 | any b, t, h stride, absent when has_g == 0    |
| x         | [B, T, R]           | io         | any b, t stride in units of UR (low rank)     |
| w         | [Hs*K, R]           | io         | contiguous                                    |
| bias      | [Hs*K]              | io or fp32 | contiguous, absent when has_bias == 0         |
| from32/16 | [slots, Hs, K, V]   | fp32, bf16 | state_in 0: zeros, 1: fp32, 2: bf16; units UH |
| to32/16   | [rows, T, Hs, K, V] | fp32, bf16 | state_out likewise, 0: not written            |
| idx       | [N]                 | i32        | idx_step words apart, absent if idx_step == 0 |
| cu        | [N + 1]             | i32        | absent when has_cu == 0; tensors [1, T,]      |
| o         | [B, T, H, V]        | io         | contiguous                                    |

Grid: x = V tiles (fastest) x state heads x sequences.
"""

import triton
import triton.language as tl

from glac.kernel_templates._gate import LOG2E, STEP_MIN_LOG2, log2_1p


@triton.jit
def gla_decode(
    q,  # [B, T, H?, K]
    k,  # [B, T, H?, K]
    v,  # [B, T, Hs, V]
    g,  # [B, T, Hs, K] or [B, T, Hs]
    x,  # [B, T, R]
    w,  # [Hs*K, R]
    bias,  # [Hs*K]
    from32,  # [slots, Hs, K, V]
    from16,  # [slots, Hs, K, V]
    to32,  # [rows, T, Hs, K, V]
    to16,  # [rows, T, Hs, K, V]
    idx,  # [N]
    cu,  # [N + 1]
    o,  # [B, T, H, V]
    scale,
    inv_normalizer,
    clamp_log2,
    T,
    H,
    q_group,
    k_group,
    s_group,
    n_slots,
    idx_step,
    has_cu,
    has_g,
    state_in,
    state_out,
    in_place,
    per_token,
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
    from_n,
    from_h,
    to_n,
    to_t,
    to_h,
    K: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    UK: tl.constexpr,
    UV: tl.constexpr,
    UR: tl.constexpr,
    UH: tl.constexpr,
    BV: tl.constexpr,
    LOWRANK: tl.constexpr,
    SCALAR: tl.constexpr,
):
    NV: tl.constexpr = (V + BV - 1) // BV
    IO: tl.constexpr = v.dtype.element_ty

    pid = tl.program_id(0)
    n_states = H // s_group
    i_v = pid % NV
    i_s = (pid // NV) % n_states
    i_n = (pid // (NV * n_states)).to(tl.int64)
    o_k = tl.arange(0, BK)
    # Four channels a thread for fp32 and for bf16: with eight for the latter, its layout is the
    # tile's, and fp32 states cross shared memory, eight barriers a store.
    o_v = i_v * BV + tl.max_contiguous(tl.arange(0, BV), 4)
    m_k = o_k < K
    m_v = o_v < V

    slot = i_n
    if idx_step != 0:
        slot = tl.load(idx + i_n * idx_step).to(tl.int64)
    active = (slot >= 0) & (slot < n_slots)
    begin = T - T
    end = T
    i_b = i_n
    if has_cu != 0:
        begin = tl.minimum(tl.maximum(tl.load(cu + i_n), 0), T)
        end = tl.minimum(tl.maximum(tl.load(cu + i_n + 1), begin), T)
        i_b = tl.zeros_like(i_n)
    row = i_n
    if in_place != 0:
        row = slot

    # Both loads are without a branch, the unwanted one masked, and used only behind those of the
    # first token: at the end of a branch a bf16 state would be waited for. States pass through the
    # L2 cache once: one that is kept there displaces another one.
    p_state = o_k[:, None] * V + o_v[None, :]
    m_state = m_k[:, None] & m_v[None, :] & active
    offset = (slot * from_n + i_s.to(tl.int64) * from_h) * UH
    p_from = from32 + offset + p_state
    m_from = m_state & (state_in == 1)
    b_s32 = tl.load(p_from, mask=m_from, other=0.0, eviction_policy="evict_first")
    p_from = from16 + offset + p_state
    m_from = m_state & (state_in == 2)
    b_s16 = tl.load(p_from, mask=m_from, other=0.0, eviction_policy="evict_first")

    first = i_s * s_group  # of the heads that read this state
    k += (i_b * k_b + (first // k_group).to(tl.int64) * k_h) * UK
    v += (i_b * v_b + i_s.to(tl.int64) * v_h) * UV
    q += i_b * q_b * UK
    o += i_b * T * H * V
    to = (row * to_n + i_s.to(tl.int64) * to_h) * UH
    # A new state of an inactive sequence is 0; in a pool nothing is written for it.
    m_store = m_k[:, None] & m_v[None, :] & (active | (in_place == 0))
    if LOWRANK:
        o_r = tl.arange(0, BR)
        m_r = o_r < R
        x += i_b * x_b * UR
        p_w = (i_s * K + o_k)[:, None] * R + o_r[None, :]
        b_w = tl.load(w + p_w, mask=m_k[:, None] & m_r[None, :], other=0.0).to(tl.float32)
        b_bias = tl.load(bias + i_s * K + o_k, mask=m_k & (has_bias != 0), other=0.0)
        b_bias = b_bias.to(tl.float32)
    elif SCALAR:
        g += i_b * g_b + i_s.to(tl.int64) * g_h
    else:
        g += (i_b * g_b + i_s.to(tl.int64) * g_h) * UK

    # The vectors of a token are loaded one token, and queries one head, before they are used.
    i_t = i_n * 0 + begin
    m_t = begin < end
    b_k = tl.load(k + i_t * k_t * UK + o_k, mask=m_k & m_t, other=0.0)  # [BK]
    b_v = tl.load(v + i_t * v_t * UV + o_v, mask=m_v & m_t, other=0.0)  # [BV]
    p_q = q + (i_t * q_t + (first // q_group).to(tl.int64) * q_h) * UK
    b_q = tl.load(p_q + o_k, mask=m_k & m_t, other=0.0)  # [BK]
    if LOWRANK:
        b_g = tl.load(x + i_t * x_t * UR + o_r, mask=m_r & m_t, other=0.0)  # [BR]
    elif SCALAR:
        b_g = tl.load(g + i_t * g_t, mask=(has_g != 0) & m_t, other=0.0)
    else:
        b_g = tl.load(g + i_t * g_t * UK + o_k, mask=m_k & m_t, other=0.0)  # [BK]
    b_s = tl.where(state_in == 2, b_s16.to(tl.float32), b_s32)  # [BK, BV]

    for t in tl.range(begin, end):
        i_t = i_n * 0 + t
        i_u = i_t + 1
        m_t = t + 1 < end
        b_kv = b_k.to(tl.float32)[:, None] * b_v.to(tl.float32)[None, :]
        b_k = tl.load(k + i_u * k_t * UK + o_k, mask=m_k & m_t, other=0.0)
        b_v = tl.load(v + i_u * v_t * UV + o_v, mask=m_v & m_t, other=0.0)
        if LOWRANK:
            y = (tl.sum(b_w * b_g.to(tl.float32)[None, :], 1) + b_bias) * LOG2E
            b_y = (tl.minimum(y, 0.0) - log2_1p(tl.exp2(-tl.abs(y)), False)) * inv_normalizer
            b_s = b_s * tl.exp2(tl.maximum(b_y, clamp_log2))[:, None]
            b_g = tl.load(x + i_u * x_t * UR + o_r, mask=m_r & m_t, other=0.0)
        elif SCALAR:
            b_s = b_s * tl.exp2(tl.maximum(b_g.to(tl.float32) * LOG2E, STEP_MIN_LOG2))
            b_g = tl.load(g + i_u * g_t, mask=(has_g != 0) & m_t, other=0.0)
        else:
            b_s = b_s * tl.exp2(tl.maximum(b_g.to(tl.float32) * LOG2E, STEP_MIN_LOG2))[:, None]
            b_g = tl.load(g + i_u * g_t * UK + o_k, mask=m_k & m_t, other=0.0)
        b_s += b_kv
        for r in tl.range(0, s_group):
            i_h = first + r
            b_qs = b_q.to(tl.float32) * scale
            last = r + 1 == s_group
            n_h = tl.where(last, first, i_h + 1)
            p_q = q + (tl.where(last, i_u, i_t) * q_t + (n_h // q_group).to(tl.int64) * q_h) * UK
            b_q = tl.load(p_q + o_k, mask=m_k & (m_t | (r + 1 < s_group)), other=0.0)
            b_o = tl.where(active, tl.sum(b_qs[:, None] * b_s, 0), 0.0)  # [BV]
            tl.store(o + (i_t * H + i_h) * V + o_v, b_o.to(IO), mask=m_v)
        if per_token != 0:
            b_e = tl.where(active, b_s, 0.0)
            p_to = to + i_t * to_t * UH + p_state
            if state_out == 1:
                tl.store(to32 + p_to, b_e, mask=m_store)
            elif state_out == 2:
                tl.store(to16 + p_to, b_e.to(tl.bfloat16), mask=m_store)
    if per_token == 0:
        b_e = tl.where(active, b_s, 0.0)
        if state_out == 1:
            tl.store(to32 + to + p_state, b_e, mask=m_store, eviction_policy="evict_first")
        elif state_out == 2:
            b_n = b_e.to(tl.bfloat16)
            tl.store(to16 + to + p_state, b_n, mask=m_store, eviction_policy="evict_first")
