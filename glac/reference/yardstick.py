"""The same-precision yardstick: chunked GLA (arXiv 2312.06635) as a kernel would round it.

Cumulative gate ``G`` per chunk in log2 units, ``Gend`` its last row, one anchor ``r`` per channel:

    qh = q * 2^(G-r)          kh = k * 2^(r-G)
    o      = scale * ( tril(qh kh^T) v  +  qh (2^r . S) )
    S_next = 2^Gend . S + 2^(Gend-r) . (kh^T v)

Every matrix operand is rounded to the input precision, every product accumulates in fp32, and the
state stays in fp32. ``r = 0`` while ``max(-Gend) <= 80``, else the midpoint of ``G`` while its
range is <= 128; a chunk beyond that is split into blocks of 16 rows whose off-diagonal products
are anchored at the block boundary and whose diagonal is elementwise fp32.

It sets error budgets: a kernel may be at most twice as far from the fp64 truth as this is.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from glac.errors import InputError, InputTypeError
from glac.reference._common import check_shapes, start_state, without_autocast

_BLOCK = 16
_START_LIMIT = 80.0  # log2 units
_RANGE_LIMIT = 128.0  # log2 units
_STEP_FLOOR = -160.0  # log2 units: a reset, small enough to be 0 and finite enough for a cumsum
_FP16_SIGNIFICANT_BITS = 11


def yardstick_chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Chunked GLA with the roundings of a tensor-core kernel, for error budgets.

    Forward only (it runs without autograd: gradients through roundings would not be those of a
    kernel). The precision of the matrix operands follows ``q.dtype``: bf16 operands, fp32
    operands, or for fp16 operands with fp16's 11 significant bits and fp32's exponent range, which
    is what TF32 offers. Source: arXiv 2312.06635.

    Args:
        q: Queries ``[B, T, H, K]`` in bf16, fp16 or fp32.
        k: Keys ``[B, T, H, K]``.
        v: Values ``[B, T, H, V]``.
        g: Natural log of the decay, per step (not cumulative), <= 0, ``[B, T, H, K]``.
        scale: Factor on the output; ``K ** -0.5`` if None.
        initial_state: State before the first token ``[B, H, K, V]``; zeros if None.
        output_final_state: Whether to return the state after the last token.
        chunk_size: Tokens per chunk, a multiple of 16.

    Returns:
        ``o`` ``[B, T, H, V]`` in v's dtype, and the final state ``[B, H, K, V]`` in fp32 or None.

    Raises:
        InputError: Shapes disagree, there is no token, or ``chunk_size`` is not a multiple of 16.
        InputTypeError: ``q`` is not bf16, fp16 or fp32.
    """
    check_shapes(q, k, v, g, initial_state)
    if chunk_size < _BLOCK or chunk_size % _BLOCK:
        raise InputError(f"chunk_size must be a multiple of {_BLOCK}, got {chunk_size}")
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise InputTypeError(f"q must be bf16, fp16 or fp32, got {q.dtype}")
    with torch.no_grad(), without_autocast(q.device):
        return _forward(q, k, v, g, scale, initial_state, output_final_state, chunk_size)


def round_mantissa(x: Tensor, bits: int) -> Tensor:
    """Round fp32 values to ``bits`` significant bits, ties to even, with fp32's exponent range.

    Args:
        x: fp32 tensor of any shape; inf and nan pass unchanged.
        bits: Significant bits to keep, the leading one included (fp16 and TF32: 11), 2 to 24.

    Returns:
        fp32 tensor of x's shape; subnormal results keep fewer bits.

    Raises:
        InputError: ``bits`` is out of range.
        InputTypeError: ``x`` is not fp32.
    """
    if x.dtype != torch.float32:
        raise InputTypeError(f"x must be fp32, got {x.dtype}")
    if not 2 <= bits <= 24:
        raise InputError(f"bits must lie in 2..24, got {bits}")
    if bits == 24:
        return x
    drop = 24 - bits
    pattern = x.contiguous().view(torch.int32)
    # Half of the last kept place, less one unless that place is odd; a carry may reach the
    # exponent, which is then right.
    bump = ((pattern >> drop) & 1) + ((1 << (drop - 1)) - 1)
    rounded = ((pattern + bump) & -(1 << drop)).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x)


def _as_operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 values to what a matrix operand of this input dtype can hold; fp32 comes back."""
    if dtype == torch.bfloat16:
        return x.to(torch.bfloat16).float()
    if dtype == torch.float16:
        return round_mantissa(x, _FP16_SIGNIFICANT_BITS)
    return x


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor | None]:
    dtype = q.dtype
    factor = q.shape[-1] ** -0.5 if scale is None else scale

    def to_chunks(x: Tensor) -> Tensor:  # [B, H, N, C, D]
        x = F.pad(x.float(), (0, 0, 0, 0, 0, -x.shape[1] % chunk_size))
        return torch.unflatten(x, 1, (-1, chunk_size)).permute(0, 3, 1, 2, 4)

    query, key = to_chunks(q), to_chunks(k)
    value = _as_operand(to_chunks(v), dtype)
    gate = (to_chunks(g) * math.log2(math.e)).clamp(min=_STEP_FLOOR)

    cumulative = gate.cumsum(-2)  # [B, H, N, C, K]
    first, end = cumulative[..., :1, :], cumulative[..., -1:, :]
    starts = (-end).amax((-2, -1), keepdim=True) <= _START_LIMIT  # [B, H, N, 1, 1]
    fits = starts | ((first - end).amax((-2, -1), keepdim=True) <= _RANGE_LIMIT)
    anchor = torch.where(starts, 0.0, (first + end) / 2)  # [B, H, N, 1, K]
    read = _as_operand(query * torch.exp2(cumulative - anchor), dtype)
    write = _as_operand(key * torch.exp2(anchor - cumulative), dtype)
    scores = torch.tril(read @ write.mT)  # [B, H, N, C, C]
    lift = torch.exp2(end - anchor)  # [B, H, N, 1, K]
    if not bool(fits.all()):
        block_scores, from_start, to_end = _block_scores(query, key, gate, dtype)
        scores = torch.where(fits, scores, block_scores)
        read = torch.where(fits, read, _as_operand(query * torch.exp2(from_start), dtype))
        write = torch.where(fits, write, _as_operand(key * torch.exp2(to_end), dtype))
        anchor = torch.where(fits, anchor, 0.0)
        lift = torch.where(fits, lift, 1.0)

    out = _as_operand(scores, dtype) @ value  # [B, H, N, C, V]
    state = start_state(q, v, initial_state, torch.float32)  # [B, H, K, V]
    for i in range(out.shape[2]):
        seen = _as_operand(torch.exp2(anchor[:, :, i]).mT * state, dtype)
        out[:, :, i] += read[:, :, i] @ seen
        added = lift[:, :, i].mT * (write[:, :, i].mT @ value[:, :, i])
        state = torch.exp2(end[:, :, i]).mT * state + added
    o = (factor * out).flatten(2, 3).transpose(1, 2)[:, : q.shape[1]].to(v.dtype)
    return o.contiguous(), state if output_final_state else None


def _block_scores(
    q: Tensor, k: Tensor, g: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores by blocks of 16 rows for any gate, and each row's distance to both chunk ends.

    All of ``q``, ``k``, ``g`` are ``[..., C, K]``, the gate in log2 units and finite. The
    cumulative sums restart in every block, so a reset costs no precision outside its own.
    """
    q, k, g = (torch.unflatten(x, -2, (-1, _BLOCK)) for x in (q, k, g))  # [..., n, 16, K]
    n_blocks = q.shape[-3]
    upto = g.cumsum(-2)
    after = F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)
    total = upto[..., -1:, :]  # [..., n, 1, K]
    diagonal = _diagonal_scores(q, k, g)  # [..., n, 16, 16]

    rows, before, behind = [], [], []
    for i in range(n_blocks):
        late = _as_operand(q[..., i, :, :] * torch.exp2(upto[..., i, :, :]), dtype)
        row = []
        for j in range(i):
            gap = total[..., j + 1 : i, :, :].sum(-3)
            early = _as_operand(k[..., j, :, :] * torch.exp2(after[..., j, :, :] + gap), dtype)
            row.append(late @ early.mT)
        row.append(diagonal[..., i, :, :])
        width = _BLOCK * (n_blocks - 1 - i)
        rows.append(F.pad(torch.cat(row, dim=-1), (0, width)))
        before.append(upto[..., i, :, :] + total[..., :i, :, :].sum(-3))
        behind.append(after[..., i, :, :] + total[..., i + 1 :, :, :].sum(-3))
    return torch.cat(rows, dim=-2), torch.cat(before, dim=-2), torch.cat(behind, dim=-2)


def _diagonal_scores(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """``[..., s, s]`` causal scores of one block, column by column, elementwise in fp32."""
    columns = []
    for j in range(q.shape[-2]):
        exponent = F.pad(g[..., j + 1 :, :], (0, 0, 1, 0)).cumsum(-2)  # rows j.., never > 0
        column = (q[..., j:, :] * k[..., j : j + 1, :] * torch.exp2(exponent)).sum(-1)
        columns.append(F.pad(column, (j, 0)))
    return torch.stack(columns, dim=-1)
