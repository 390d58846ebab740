"""Chunkwise gated linear attention, exact for every gate (arXiv 2312.06635, section 4.2).

With ``G`` the cumulative gate inside a chunk and ``Gend`` its last row, per chunk and head:

    A_ij   = sum_c q_ic k_jc exp(G_ic - G_jc)     for j <= i
    o      = scale * ( A v + (q * exp G) S )
    S_next = exp(Gend) . S + (k * exp(Gend - G))^T v

The decay ``exp(G_i - G_j)`` does not factor into a row and a column term without overflow when the
gate is strong. Here the causal triangle is built by doubling instead: two neighbouring diagonal
blocks of s rows become one of 2s rows by adding the square below the diagonal,

    X_ij = sum_c ( q_ic exp(sum of g from the boundary to i) )
               * ( k_jc exp(sum of g after j up to the boundary) )

For ``g <= 0`` both exponents are <= 0, so no factor overflows and none underflows unless the
product does. All exponents are sums of gates, grown by doubling together with the blocks and never
formed as a difference of two cumulative sums: nothing cancels, ``-inf`` never meets ``-inf`` with
the opposite sign, and a reset decays by exactly 0, forward and backward. The largest temporaries
have the size of q, per level, instead of [C, C, K] per chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glac.errors import InputError
from glac.reference._common import (
    accumulation_dtype,
    check_shapes,
    start_state,
    without_autocast,
)

# Elements of q (or v) that one slab of chunks may hold: bounds the temporaries of inference on
# long sequences while leaving enough work per operation.
_SLAB_ELEMENTS = 1 << 24
# Up to this block size scores are a broadcast product and a sum: a matrix product per 1x1 or 2x2
# block is mostly overhead on a GPU (on a CPU core both took the same time at T = 2048).
_ELEMENTWISE_ROWS = 2


def chunk_gla(
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
    """Gated linear attention in chunks, by matrix products.

    Equal to :func:`glac.reference.recurrent_gla` up to rounding for every gate ``<= 0``, including
    0 and ``-inf`` (a reset). Moderate positive gates work too, as long as their sum over one chunk
    stays inside the exponent range. Accumulates in fp64 if an input is fp64, else in fp32;
    differentiable in all tensors. A nan or inf in ``v`` reaches every output of its chunk, earlier
    ones included; otherwise earlier outputs do not depend on later tokens.
    Source: arXiv 2312.06635.

    Args:
        q: Queries ``[B, T, H, K]``.
        k: Keys ``[B, T, H, K]``.
        v: Values ``[B, T, H, V]``.
        g: Natural log of the decay, per step (not cumulative), <= 0, ``[B, T, H, K]``.
        scale: Factor on the output; ``K ** -0.5`` if None.
        initial_state: State before the first token ``[B, H, K, V]``; zeros if None.
        output_final_state: Whether to return the state after the last token.
        chunk_size: Tokens per chunk, a power of two. It changes speed and rounding only.

    Returns:
        ``o`` ``[B, T, H, V]`` in v's dtype, and the final state ``[B, H, K, V]`` in the
        accumulation dtype or None.

    Raises:
        InputError: Shapes disagree, there is no token, or ``chunk_size`` is not a power of two.
        InputTypeError: A tensor is not floating point.
    """
    check_shapes(q, k, v, g, initial_state)
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise InputError(f"chunk_size must be a power of two, got {chunk_size}")
    dtype = accumulation_dtype(q, k, v, g, initial_state)
    n_batch, n_tokens, n_heads, n_keys = q.shape
    factor = n_keys**-0.5 if scale is None else scale
    rows = min(chunk_size, 1 << (n_tokens - 1).bit_length())
    row_elements = max(1, n_batch * n_heads * max(n_keys, v.shape[-1]))
    slab = rows * max(1, _SLAB_ELEMENTS // (row_elements * rows))

    outputs = []
    with without_autocast(q.device):
        state = start_state(q, v, initial_state, dtype)
        for start in range(0, n_tokens, slab):
            query, key, value, gate = (
                _to_chunks(x[:, start : start + slab].to(dtype), rows) for x in (q, k, v, g)
            )
            out, state = _slab(query * factor, key, value, gate, state)
            out = out.flatten(2, 3).transpose(1, 2)  # [B, T', H, V], T' padded
            outputs.append(out[:, : n_tokens - start].to(v.dtype))
        o = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0].contiguous()
    return o, state if output_final_state else None


def _to_chunks(x: Tensor, rows: int) -> Tensor:
    """``[B, T, H, D]`` to ``[B, H, N, C, D]``, padded with zeros: no decay, nothing added."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % rows))
    return torch.unflatten(x, 1, (-1, rows)).permute(0, 3, 1, 2, 4).contiguous()


def _slab(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs ``[B, H, N, C, V]`` of N chunks and the state behind them; q is already scaled."""
    scores, from_start, to_end = _causal_scores(q, k, g)
    intra = scores @ v  # [B, H, N, C, V]
    read = q * from_start.exp()  # [B, H, N, C, K]
    write = (k * to_end.exp()).mT  # [B, H, N, K, C]
    decay = from_start[..., -1, :, None].exp()  # [B, H, N, K, 1]
    inter = []
    for i in range(q.shape[2]):
        inter.append(read[:, :, i] @ state)
        state = decay[:, :, i] * state + write[:, :, i] @ v[:, :, i]
    return intra + torch.stack(inter, dim=2), state


def _causal_scores(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The decayed causal scores of each chunk, and each row's distance to both chunk ends.

    Args:
        q: ``[..., C, K]``, C a power of two.
        k: ``[..., C, K]``.
        g: ``[..., C, K]``.

    Returns:
        The scores ``[..., C, C]``, zero above the diagonal; the sum of the gates from the chunk's
        first row to each row inclusive ``[..., C, K]``; the sum of those after each row.
    """
    n_rows = q.shape[-2]
    scores = (q * k).sum(-1)[..., None, None]  # [..., n, s, s] with n blocks of s = 1 rows
    upto = g.unsqueeze(-2)  # [..., n, s, K]: from the block's first row, inclusive
    after = torch.zeros_like(upto)  # [..., n, s, K]: to the block's last row, exclusive
    size = 1
    while size < n_rows:
        scores_0, scores_1 = torch.unflatten(scores, -3, (-1, 2)).unbind(-3)
        upto_0, upto_1 = torch.unflatten(upto, -3, (-1, 2)).unbind(-3)
        after_0, after_1 = torch.unflatten(after, -3, (-1, 2)).unbind(-3)
        late = torch.unflatten(q, -2, (-1, 2, size))[..., 1, :, :] * upto_1.exp()
        early = torch.unflatten(k, -2, (-1, 2, size))[..., 0, :, :] * after_0.exp()
        if size <= _ELEMENTWISE_ROWS:
            cross = (late.unsqueeze(-2) * early.unsqueeze(-3)).sum(-1)
        else:
            cross = late @ early.mT  # [..., n/2, s, s]
        top = torch.cat((scores_0, torch.zeros_like(cross)), dim=-1)
        scores = torch.cat((top, torch.cat((cross, scores_1), dim=-1)), dim=-2)
        total_0, total_1 = upto_0[..., -1:, :], upto_1[..., -1:, :]
        upto = torch.cat((upto_0, total_0 + upto_1), dim=-2)
        after = torch.cat((after_0 + total_1, after_1), dim=-2)
        size *= 2
    return scores.squeeze(-3), upto.squeeze(-3), after.squeeze(-3)
