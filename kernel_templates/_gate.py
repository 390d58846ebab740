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


# The same bound in natural log, which bf16 and fp16 hold exactly.
STEP_MIN = tl.constexpr(-111.0)

# A low-rank gate is rounded to fp16 after this factor: 2^-160 * 256 still fits, and the smallest
# step that is not lost is 2^-32.
FP16_SCALE = tl.constexpr(256.0)


@triton.jit
def log2_1p(u, BF16: tl.constexpr):
    """``log2(1 + u)`` for u in [0, 1], with small *relative* error however small u is."""
    if BF16:
        # Minimax polynomial, relative error 9e-6: the fused multiply-adds are free where the
        # special-function unit is busy with exponentials. The gate is rounded to 2^-12 after this.
        p = -0.034435838 * u + 0.1460327059
        p = p * u - 0.303036034
        p = p * u + 0.469173998
        p = p * u - 0.720426142
        p = p * u + 1.442682862
        return p * u
    else:
        # log2(1 + u) loses all of u below 2^-24: two terms of the series serve below 2^-10.
        return tl.where(u < 0.0009765625, u * (LOG2E - 0.5 * LOG2E * u), tl.log2(1.0 + u))


@triton.jit
def lowrank_gate_log2(
    b_x,  # [BT, BR]
    b_w,  # [BR, BK]
    b_bias_log2,  # [BK] bias * log2(e)
    inv_normalizer,
    clamp_log2,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``[BT, BK]`` gate in log2 units. Rows outside the sequence hold the bias's gate, not 0."""
    y = tl.dot(b_x, b_w, input_precision=PRECISION) * LOG2E + b_bias_log2[None, :]
    softplus = log2_1p(tl.exp2(-tl.abs(y)), BF16)
    return tl.maximum((tl.minimum(y, 0.0) - softplus) * inv_normalizer, clamp_log2)


@triton.jit
def cumulative_log2(b_g, m_tri, IN_LOG2: tl.constexpr, BF16: tl.constexpr):
    """``[BT, BK]`` cumulative gate in log2 units, in fp32: ``m_tri`` (lower triangle) times gate.

    ``b_g`` is a dense gate in natural log, or (IN_LOG2) an fp32 gate in log2 units. A 16-bit gate
    is an exact matrix operand. Beside BF16 tiles a low-rank gate is rounded to fp16 (2^-12, an
    eighth of what a bf16 gate tensor would lose), an fp32 gate is split into two bf16 parts
    (2^-17). Everything else is multiplied as three TF32 products (2^-22).
    """
    if b_g.dtype == tl.float32:
        if IN_LOG2 and BF16:
            b_h = (b_g * FP16_SCALE).to(tl.float16)
            return tl.dot(m_tri.to(tl.float16), b_h) * (1.0 / FP16_SCALE)
        x = b_g if IN_LOG2 else b_g * LOG2E
        x = tl.maximum(x, STEP_MIN_LOG2)
        if BF16:
            tri = m_tri.to(tl.bfloat16)
            hi = x.to(tl.bfloat16)
            lo = (x - hi.to(tl.float32)).to(tl.bfloat16)
            return tl.dot(tri, lo, tl.dot(tri, hi))
        else:
            return tl.dot(m_tri.to(tl.float32), x, input_precision="tf32x3")
    else:
        # Not clamped: with -inf the row of the last token is -inf, which fails the range test.
        return tl.dot(m_tri.to(b_g.dtype), b_g) * LOG2E


@triton.jit
def clamped(b_g):
    """A dense gate without steps beyond the bound, so that sums and products of it are finite."""
    return tl.where(b_g < STEP_MIN, tl.full([], STEP_MIN, b_g.dtype), b_g)  # NaN stays


@triton.jit
def operand(x, IO: tl.constexpr):
    """``x`` as a matrix operand beside inputs of type IO.

    fp16 inputs: scaled tiles would leave fp16's range, so they stay fp32 and multiply as TF32,
    which has fp16's mantissa. The tensor cores cut TF32 off instead of rounding it, which would
    nearly triple the error; hence the rounding here. fp32 inputs: three TF32 products, unrounded.
    """
    if IO == tl.bfloat16:
        return x.to(tl.bfloat16)
    elif IO == tl.float16 and x.dtype != tl.float16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x)  # the carry turns some NaNs into -0.0
    else:
        return x.to(tl.float32)
