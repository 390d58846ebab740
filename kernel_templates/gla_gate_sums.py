"""Gradients of a low-rank gate's inputs: sums of the parts that ``gla_gate_bwd`` leaves.

    dx = sum_n dx_n       dw = sum_{b, t} dw_{b, t}       db = sum_{b, t} db_{b, t}

Each element is summed by one program in a fixed order, in fp32.

| tensor   | shape           | dtype | layout     |
|----------|-----------------|-------|------------|
| dx_parts | [NN, M, R]      | fp32  | contiguous |
| dw_parts | [NT, C, R]      | fp32  | contiguous |
| db_parts | [NT, C]         | fp32  | contiguous |
| dx       | [M, R]          | io    | contiguous |
| dw       | [C, R]          | fp32  | contiguous |
| db       | [C]             | fp32  | contiguous |

M counts the tokens of all sequences, C = H*K channels, NT blocks of tokens of all sequences.

Grid: blocks of BLOCK elements of dx, then of dw, then of db.
"""

import triton
import triton.language as tl


@triton.jit
def _summed(parts, count, size, first, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Sums over ``count`` parts of ``size`` elements each, of the block ``first`` of BLOCK."""
    o_e = first.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < size
    b_sum = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for i in range(0, count, ROWS):
        o_p = i + tl.arange(0, ROWS)
        p_e = o_p.to(tl.int64)[:, None] * size + o_e[None, :]
        b_sum += tl.load(parts + p_e, mask=(o_p < count)[:, None] & m_e[None, :], other=0.0)
    return tl.sum(b_sum, 0), o_e, m_e


@triton.jit
def gla_gate_sums(
    dx_parts,  # [NN, M, R]
    dw_parts,  # [NT, C, R]
    db_parts,  # [NT, C]
    dx,  # [M, R]
    dw,  # [C, R]
    db,  # [C]
    tokens,
    channels,
    n_n,
    n_t,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    pid = tl.program_id(0)
    of_x = tokens.to(tl.int64) * R
    of_w = channels.to(tl.int64) * R
    x_blocks = tl.cdiv(of_x, BLOCK)
    w_blocks = tl.cdiv(of_w, BLOCK)
    if pid < x_blocks:
        b_sum, o_e, m_e = _summed(dx_parts, n_n, of_x, pid, BLOCK, ROWS)
        tl.store(dx + o_e, b_sum.to(dx.dtype.element_ty), mask=m_e)
    elif pid < x_blocks + w_blocks:
        b_sum, o_e, m_e = _summed(dw_parts, n_t, of_w, pid - x_blocks, BLOCK, ROWS)
        tl.store(dw + o_e, b_sum, mask=m_e)
    else:
        at = pid - x_blocks - w_blocks
        b_sum, o_e, m_e = _summed(db_parts, n_t, channels.to(tl.int64), at, BLOCK, ROWS)
        tl.store(db + o_e, b_sum, mask=m_e)
