"""Where a program works: which sequence, head and segment, and which tokens of memory.

A *segment* is a run of ``seg_len`` tokens of one sequence. Dense batches have ``n_seg`` of them in
each of the B sequences. Packed batches (``has_cu``) are one row of T tokens with boundaries
``cu [N + 1]``; segment j of sequence n then has slot

    cu[n] // seg_len + n + j        of        T // seg_len + N

which needs no table and no knowledge of the lengths on the host: the slots of one sequence follow
each other, those of two sequences never meet, and a few stay unused. With ``seg_len > T`` the slot
is n. Boundaries are clamped into [0, T], so wrong ones give wrong results and no wrong access.
"""

import triton
import triton.language as tl


@triton.jit
def boundary(cu, n, T):
    """First token of sequence n, in [0, T]."""
    return tl.minimum(tl.maximum(tl.load(cu + n), 0), T)


@triton.jit
def place(index, cu, T, N, H, seg_first, seg_count, seg_len, has_cu):
    """The segment of program ``index`` in a grid of ``B * H * seg_count``, slots from seg_first.

    Returns:
        i_b: row of the tensors, int64 (0 in a packed batch).
        i_n: sequence, which indexes states, int64.
        i_h: head.
        slot: of the segment among those of its row and head.
        bos: first token of the sequence in its row, int64.
        n_tok: tokens of the sequence.
        t_begin: first token of the segment in its sequence.
        t_end: the token behind its last one; t_begin in an unused slot.
        is_first: whether the segment is the first of its sequence.
        is_last: whether it is the last.
    """
    slot = seg_first + index % seg_count
    i_bh = index // seg_count
    i_h = i_bh % H
    i_b = (i_bh // H).to(tl.int64)
    i_n = i_b
    bos = T * 0
    n_tok = T
    i_s = slot
    if has_cu != 0:
        low = N * 0
        high = N - 1
        while low < high:
            middle = (low + high + 1) // 2
            fits = boundary(cu, middle, T) // seg_len + middle <= slot
            low = tl.where(fits, middle, low)
            high = tl.where(fits, high, middle - 1)
        bos = boundary(cu, low, T)
        n_tok = tl.maximum(boundary(cu, low + 1, T) - bos, 0)
        i_s = slot - (bos // seg_len + low)
        i_n = low.to(tl.int64)
    start = i_s.to(tl.int64) * seg_len
    used = (i_s == 0) | ((i_s > 0) & (start < n_tok))
    t_begin = tl.where(used, start, n_tok).to(tl.int32)
    t_end = tl.where(used, tl.minimum(start + seg_len, n_tok), n_tok).to(tl.int32)
    is_first = i_s == 0
    is_last = used & (start + seg_len >= n_tok)
    return i_b, i_n, i_h, slot, bos.to(tl.int64), n_tok, t_begin, t_end, is_first, is_last
