"""Chain the segments' own contributions into the state at every border between segments.

    S_j = 2^d_{j-1} . S_{j-1} + C_{j-1}        (forward, j = 1 .. S-1, S_0 = initial state or 0)

GLA's transition is diagonal, so the combination is a multiply-add per element and exact. Slot j of
``states`` arrives holding C_{j-1} and leaves holding S_j. ``reverse`` does the same for gradients
of states, from the last segment to the first: slot j then is about the end of segment j.

| tensor | shape           | dtype | layout                                                  |
|--------|-----------------|-------|---------------------------------------------------------|
| states | [B, H, S, K, V] | fp32  | contiguous, in and out; slots as in ``_place``          |
| decay  | [B, H, S, K]    | fp32  | contiguous, total gate of a segment in log2 units       |
| ends   | [N, HE, K, V]   | fp32  | contiguous, the state to begin with (has_ends)          |
| cu     | [N + 1]         | int32 | boundaries of a packed batch, see ``_place``            |

HE = H / group: of heads that share a state the first takes ``ends``.

Grid: x = blocks of the K*V state elements (fastest) x H x N.
"""

import triton
import triton.language as tl

from glac.kernel_templates._place import boundary


@triton.jit
def gla_combine(
    states,  # [B, H, S, K, V]
    decay,  # [B, H, S, K]
    ends,  # [N, HE, K, V]
    cu,  # [N + 1]
    T,
    H,
    n_seg,
    seg_len,
    group,
    reverse,
    has_cu,
    has_ends,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    NB: tl.constexpr = (K * V + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    i_nh = pid // NB
    i_n = i_nh // H
    i_h = i_nh % H
    o_kv = (pid % NB) * BLOCK + tl.arange(0, BLOCK)
    m_kv = o_kv < K * V
    first = i_nh.to(tl.int64) * n_seg
    count = n_seg
    if has_cu != 0:
        bos = boundary(cu, i_n, T)
        first = i_h.to(tl.int64) * n_seg + bos // seg_len + i_n
        count = tl.cdiv(tl.maximum(boundary(cu, i_n + 1, T) - bos, 0), seg_len)
        count = tl.minimum(count, n_seg - (bos // seg_len + i_n))
    step = 1 - 2 * reverse
    slot = first + reverse * (count - 1)

    m_end = m_kv & (has_ends != 0) & (i_h % group == 0)
    i_end = (i_n * (H // group) + i_h // group).to(tl.int64)
    b_s = tl.load(ends + i_end * (K * V) + o_kv, mask=m_end, other=0.0)  # [BLOCK]
    for _ in range(1, count):
        b_d = tl.load(decay + slot * K + o_kv // V, mask=m_kv, other=0.0)
        slot += step
        b_c = tl.load(states + slot * (K * V) + o_kv, mask=m_kv, other=0.0)
        b_s = b_s * tl.exp2(b_d) + b_c
        tl.store(states + slot * (K * V) + o_kv, b_s, mask=m_kv)
