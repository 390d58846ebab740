"""Gate arithmetic shared by the chunk kernels: from what is stored to cumulative log2 decays.

    log2 units        g2 = g * log2(e), so that decays are exp2
    low-rank gate     g2 = log2(sigmoid(x W^T + b)) / normalizer, clamped from below
    cumulative gate   G_t = sum_{i<=t} g2_i inside the chunk, as a product with a lower triangle
                      of ones (much faster than a scan, and exact: see docs/numerics.md)
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# One step never decays by more than 2^-160 (-111 in natural log), which is 0 in fp32. The clamp
# keeps -inf out of triangular products, where 0 * -inf would poison earlier rows.
STEP_MIN_LOG2 = tl.constexpr(-160.0)


@triton.jit
def lowrank_gate_log2(
    b_x,  # [BT, BR]
    b_w,  # [BR, BK]
    b_bias,  # [BK]
    inv_normalizer,
    clamp_log2,
    m_t,  # [BT] rows that exist
    PRECISION: tl.constexpr,
):
    """``[BT, BK]`` gate in log2 units; rows outside the sequence get 0 (no decay)."""
    y = (tl.dot(b_x, b_w, input_precision=PRECISION) + b_bias[None, :]) * LOG2E
    u = tl.exp2(-tl.abs(y))
    # log2(1 + u) loses all of u below 2^-24: two terms of the series serve below 2^-10.
    softplus = tl.where(u < 0.0009765625, u * (1.0 - 0.5 * u) * LOG2E, tl.log2(1.0 + u))
    b_g = tl.maximum((tl.minimum(y, 0.0) - softplus) * inv_normalizer, clamp_log2)
    return tl.where(m_t[:, None], b_g, 0.0)


@triton.jit
def cumulative_log2(b_g, m_tri, IN_LOG2: tl.constexpr, SPLIT: tl.constexpr):
    """``[BT, BK]`` cumulative gate in log2 units, in fp32.

    ``b_g`` is a dense gate in natural log, or (IN_LOG2) an fp32 gate in log2 units. A 16-bit gate
    is an exact matrix operand. An fp32 gate is split into two bf16 parts (SPLIT, relative error
    2^-17, enough beside 16-bit tiles) or multiplied as three TF32 products (2^-22).
    """
    if b_g.dtype == tl.float32:
        x = b_g if IN_LOG2 else b_g * LOG2E
        x = tl.maximum(x, STEP_MIN_LOG2)
        if SPLIT:
            tri = m_tri.to(tl.bfloat16)
            hi = x.to(tl.bfloat16)
            lo = (x - hi.to(tl.float32)).to(tl.bfloat16)
            return tl.dot(tri, lo, tl.dot(tri, hi))
        else:
            return tl.dot(m_tri.to(tl.float32), x, input_precision="tf32x3")
    else:
        # Not clamped: with -inf the row of the last token is -inf, which fails the range test.
        return tl.dot(m_tri.to(b_g.dtype), b_g) * LOG2E
