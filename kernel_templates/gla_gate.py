"""A low-rank gate written out, for the backward pass.

    g = max(log(sigmoid(x W^T + b)) / normalizer, clamp)

Written once it costs a pass over one tensor, and more than that in each kernel that needs it
(docs/performance.md).

| tensor | shape        | dtype                | layout                                     |
|--------|--------------|----------------------|--------------------------------------------|
| x      | [B, T, R]    | io                   | any b, t stride in units of UR, last dim 1 |
| w      | [H*K, R]     | io                   | contiguous                                 |
| bias   | [H*K]        | io or fp32           | contiguous, absent when has_bias == 0      |
| g      | [B, T, H, K] | bf16 if io, or fp32  | contiguous, natural log                    |

Grid: x = tiles of BN of the H*K channels (fastest, they share x in L2) x blocks of BT tokens x B.
"""

import triton
import triton.language as tl

from glac.kernel_templates._gate import LOG2E, lowrank_gate_log2


@triton.jit
def gla_gate(
    x,  # [B, T, R]
    w,  # [H*K, R]
    bias,  # [H*K]
    g,  # [B, T, H, K]
    inv_normalizer,
    clamp_log2,
    T,
    H,
    has_bias,
    x_b,
    x_t,
    K: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    UR: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):
    channels = H * K
    n_n = tl.cdiv(channels, BN)
    n_t = tl.cdiv(T, BT)
    pid = tl.program_id(0)
    o_n = (pid % n_n) * BN + tl.arange(0, BN)
    o_t = (pid // n_n) % n_t * BT + tl.arange(0, BT)
    i_b = (pid // n_n // n_t).to(tl.int64)
    o_r = tl.arange(0, BR)
    m_n = o_n < channels
    m_t = o_t < T
    m_r = o_r < R

    x += i_b * x_b * UR
    row_x = x_t.to(tl.int64) * UR
    b_x = tl.load(
        x + o_t.to(tl.int64)[:, None] * row_x + o_r[None, :],
        mask=m_t[:, None] & m_r[None, :],
        other=0.0,
    )  # [BT, BR]
    m_w = m_r[:, None] & m_n[None, :]
    b_w = tl.load(w + o_n[None, :] * R + o_r[:, None], mask=m_w, other=0.0)  # [BR, BN]
    b_bias = tl.load(bias + o_n, mask=m_n & (has_bias != 0), other=0.0).to(tl.float32)  # [BN]
    # With both numbers in natural log, so is the gate.
    b_g = lowrank_gate_log2(
        b_x, b_w, b_bias * LOG2E, inv_normalizer / LOG2E, clamp_log2 / LOG2E, BF16, PRECISION
    )  # [BT, BN]
    p_g = (i_b * T + o_t)[:, None] * channels + o_n[None, :]
    tl.store(g + p_g, b_g.to(g.dtype.element_ty), mask=m_t[:, None] & m_n[None, :])
