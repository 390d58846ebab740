"""Gradients of a low-rank gate's inputs in parts, from the gradient of the gate.

With y = x W^T + b the logits and s = sigmoid(-y) / normalizer, 0 where the gate is clamped:

    dz = s . sum of the parts and heads of dg
    dx = dz W            for each tile of channels
    dw = dz^T x          for each block of tokens
    db = sum_t dz_t      likewise

A program walks over a block of ``length`` tokens with BN channels. ``gla_gate_sums`` adds up what
the programs leave, so that no sum depends on which of them comes first.

| tensor | shape             | dtype         | layout                                     |
|--------|-------------------|---------------|--------------------------------------------|
| x      | [B, T, R]         | io            | any b, t stride in units of UR, last dim 1 |
| w      | [H*K, R]          | io            | contiguous                                 |
| bias   | [H*K]             | io or fp32    | contiguous, absent when has_bias == 0      |
| dg     | [P, B, T, H*S, K] | that of ``gla_gate`` | contiguous, S heads share one gate  |
| dx     | [NN, B, T, R]     | fp32          | contiguous                                 |
| dw     | [B, NT, H*K, R]   | fp32          | contiguous                                 |
| db     | [B, NT, H*K]      | fp32          | contiguous                                 |

H are the heads of the gate, P the parts that tiles of V leave (``glac.backward``).

Grid: x = NN tiles of BN of the H*K channels (fastest, they share x in L2) x NT blocks of
``length`` tokens, a multiple of BT, x B.
"""

import triton
import triton.language as tl

from glac.kernel_templates._gate import LOG2E, operand


@triton.jit
def _tile(
    b_dg, b_dw, b_db, x, b_w, b_bias, dx, inv_normalizer, least, o_t, m_t, o_r, m_r, row_x,
    R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dx of tokens ``o_t``; return dw and db with theirs added. ``least``: see below."""
    IO: tl.constexpr = x.dtype.element_ty
    t = o_t.to(tl.int64)[:, None]
    m_x = m_t[:, None] & m_r[None, :]
    b_x = tl.load(x + t * row_x + o_r[None, :], mask=m_x, other=0.0)  # [BT, BR]
    b_y = tl.dot(b_x, tl.trans(b_w), input_precision=PRECISION) * LOG2E + b_bias[None, :]
    slope = tl.where(b_y >= least, inv_normalizer / (1.0 + tl.exp2(b_y)), 0.0)  # [BT, BN]
    b_dz = b_dg * slope
    b_db += tl.sum(b_dz, 0)
    b_dz = operand(b_dz, IO)
    b_dx = tl.dot(b_dz, operand(b_w, IO), input_precision=PRECISION)  # [BT, BR]
    tl.store(dx + t * R + o_r[None, :], b_dx, mask=m_x)
    return tl.dot(tl.trans(b_dz), operand(b_x, IO), b_dw, input_precision=PRECISION), b_db


@triton.jit
def gla_gate_bwd(
    x,  # [B, T, R]
    w,  # [H*K, R]
    bias,  # [H*K]
    dg,  # [P, B, T, H*S, K]
    dx,  # [NN, B, T, R]
    dw,  # [B, NT, H*K, R]
    db,  # [B, NT, H*K]
    inv_normalizer,
    clamp_log2,
    B,
    T,
    H,
    parts,
    group,
    length,
    has_bias,
    x_b,
    x_t,
    K: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    UR: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    channels = H * K
    n_n = tl.cdiv(channels, BN)
    n_t = tl.cdiv(T, length)
    pid = tl.program_id(0)
    i_n = pid % n_n
    i_t = (pid // n_n) % n_t
    i_b = (pid // n_n // n_t).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
    o_r = tl.arange(0, BR)
    m_n = o_n < channels
    m_r = o_r < R
    m_w = m_n[:, None] & m_r[None, :]
    row = tl.arange(0, BT)
    # Of dg: heads that share one of the gate lie side by side.
    wide = group.to(tl.int64) * channels
    o_g = o_n // K * K * group + o_n % K

    x += i_b * x_b * UR
    row_x = x_t.to(tl.int64) * UR
    dg += i_b * T * wide
    dx += (i_n.to(tl.int64) * B + i_b) * T * R
    b_w = tl.load(w + o_n[:, None] * R + o_r[None, :], mask=m_w, other=0.0)  # [BN, BR]
    b_bias = tl.load(bias + o_n, mask=m_n & (has_bias != 0), other=0.0).to(tl.float32) * LOG2E
    b_dw = tl.zeros([BN, BR], dtype=tl.float32)
    b_db = tl.zeros([BN], dtype=tl.float32)
    # The logit (log2) from which on the gate is free: 2^clamp' = sigmoid, clamp' before division.
    clamp = clamp_log2 / inv_normalizer
    least = tl.where(clamp < -64.0, clamp, -tl.log2(tl.exp2(tl.minimum(-clamp, 64.0)) - 1.0))
    # Two loops, as only one without another inside is pipelined.
    if parts * group == 1:
        for t0 in tl.range(0, length, BT, num_stages=STAGES):
            o_t = i_t * length + t0 + row
            m_t = o_t < T
            p_g = o_t.to(tl.int64)[:, None] * wide + o_g[None, :]
            b_dg = tl.load(dg + p_g, mask=m_t[:, None] & m_n[None, :], other=0.0).to(tl.float32)
            b_dw, b_db = _tile(
                b_dg, b_dw, b_db, x, b_w, b_bias, dx, inv_normalizer, least, o_t, m_t, o_r,
                m_r, row_x, R, PRECISION,
            )  # fmt: skip
    else:
        for t0 in tl.range(0, length, BT, num_stages=1):
            o_t = i_t * length + t0 + row
            m_t = o_t < T
            p_g = o_t.to(tl.int64)[:, None] * wide + o_g[None, :]
            b_dg = tl.zeros([BT, BN], dtype=tl.float32)
            for i in range(parts * group):
                at = (i // group).to(tl.int64) * B * T * wide + i % group * K
                m_g = m_t[:, None] & m_n[None, :]
                b_dg += tl.load(dg + at + p_g, mask=m_g, other=0.0).to(tl.float32)
            b_dw, b_db = _tile(
                b_dg, b_dw, b_db, x, b_w, b_bias, dx, inv_normalizer, least, o_t, m_t, o_r,
                m_r, row_x, R, PRECISION,
            )  # fmt: skip
    first = (i_b * n_t + i_t) * channels
    tl.store(dw + first * R + o_n[:, None] * R + o_r[None, :], b_dw, mask=m_w)
    tl.store(db + first + o_n, b_db, mask=m_n)
