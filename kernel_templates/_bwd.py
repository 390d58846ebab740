"""What the backward kernels share. Their tiles are transposed: channels are rows, tokens columns.

With rows of channels every product has at least 64 rows, which is what Hopper's matrix unit takes,
and the tiles made in registers (scaled queries and keys, the state's gradient) are left operands,
which it reads from registers: nothing of them passes through shared memory. Measured against the
same kernel with tokens as rows: 223 us instead of 345 at 16,2048,8,128,128.
"""

import triton
import triton.language as tl

from glac.kernel_templates._gate import FP16_SCALE, LOG2E, STEP_MIN_LOG2, log2_1p


@triton.jit
def lowrank_logits_t(b_w, b_x, b_bias_log2, PRECISION: tl.constexpr):
    """``[BK, BT]`` logits of a low-rank gate in log2 units, from ``[BK, BR]`` and ``[BT, BR]``."""
    y = tl.dot(b_w, tl.trans(b_x), input_precision=PRECISION)
    return y * LOG2E + b_bias_log2[:, None]


@triton.jit
def logsigmoid_gate(y, inv_normalizer, clamp_log2, BF16: tl.constexpr):
    """Gate in log2 units from logits in log2 units."""
    u = tl.exp2(-tl.abs(y))
    free = (tl.minimum(y, 0.0) - log2_1p(u, BF16)) * inv_normalizer
    return tl.maximum(free, clamp_log2)


@triton.jit
def triangles(BT: tl.constexpr, GATE: tl.constexpr, BF16: tl.constexpr):
    """Triangles of ones as right operands: upper for prefix sums, lower for suffix sums.

    Made outside the loop, so that they stay in shared memory. ``GATE`` is the element type of what
    the upper one multiplies, as in ``cumulative_log2_t``.
    """
    row = tl.arange(0, BT)
    upper = (row[:, None] <= row[None, :]).to(GATE)
    lower = (row[:, None] >= row[None, :]).to(tl.bfloat16 if BF16 else tl.float32)
    return upper, lower


@triton.jit
def cumulative_log2_t(b_g, upper, IN_LOG2: tl.constexpr, BF16: tl.constexpr):
    """``[BK, BT]`` cumulative gate: ``_gate.cumulative_log2`` transposed, same arithmetic."""
    if IN_LOG2 and BF16:
        b_h = (b_g * FP16_SCALE).to(tl.float16)
        return tl.dot(b_h, upper) * (1.0 / FP16_SCALE)
    elif b_g.dtype == tl.float32:
        x = b_g if IN_LOG2 else b_g * LOG2E
        x = tl.maximum(x, STEP_MIN_LOG2)
        if BF16:
            hi = x.to(tl.bfloat16)
            lo = (x - hi.to(tl.float32)).to(tl.bfloat16)
            return tl.dot(lo, upper, tl.dot(hi, upper))
        else:
            return tl.dot(x, upper, input_precision="tf32x3")
    else:
        return tl.dot(b_g, upper) * LOG2E


@triton.jit
def suffix_sum(x, lower, BF16: tl.constexpr):
    """``[BK, BT]`` sums over the columns from t on: a product with a lower triangle of ones.

    Beside BF16 tiles as two bf16 parts (2^-17): rounded once, the sums would lose 5e-3 of dg.
    """
    if BF16:
        hi = x.to(tl.bfloat16)
        lo = (x - hi.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(lo, lower, tl.dot(hi, lower))
    else:
        return tl.dot(x, lower, input_precision="tf32x3")


@triton.jit
def load_rows(src, t, col, stride, o_col, mask, BT: tl.constexpr, TMA: tl.constexpr):
    """``[BT, columns]`` tile from token t on; ``src`` is a descriptor, or else a pointer."""
    if TMA:
        return src.load([t, col])
    else:
        offsets = tl.arange(0, BT)[:, None] * stride.to(tl.int32) + o_col[None, :]
        return tl.load(src + t * stride + offsets, mask=mask, other=0.0)


@triton.jit
def store_rows(dst, tile, t, col, stride, o_col, mask, BT: tl.constexpr, TMA: tl.constexpr):
    """Store a ``[BT, columns]`` tile."""
    if TMA:
        dst.store([t, col], tile)
    else:
        offsets = tl.arange(0, BT)[:, None] * stride.to(tl.int32) + o_col[None, :]
        tl.store(dst + t * stride + offsets, tile, mask=mask)


@triton.jit
def await_descriptor_stores(x, INTERPRETED: tl.constexpr):
    """Wait until this program's descriptor stores, which are asynchronous, have landed."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; mov.b32 $0, $1;",
            "=r,r",
            [x],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        tl.debug_barrier()
