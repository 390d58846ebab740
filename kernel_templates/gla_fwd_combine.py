"""Turn the segments' own contributions into the state at the start of every segment.

    S_0 = initial state or 0,     S_j = 2^d_{j-1} . S_{j-1} + C_{j-1}        (j = 1 .. S-1)

GLA's transition is diagonal, so the combination is a multiply-add per element and exact. Slot j of
``states`` arrives holding C_{j-1} (slot 0 holds nothing) and leaves holding S_j.

| tensor | shape           | dtype | layout                                              |
|--------|-----------------|-------|-----------------------------------------------------|
| states | [B, H, S, K, V] | fp32  | contiguous, in and out                              |
| decay  | [B, H, S, K]    | fp32  | contiguous, total gate of a segment in log2 units   |
| h0     | [B, H, K, V]    | fp32  | contiguous, absent when has_h0 == 0                 |

Grid: x = blocks of the K*V state elements (fastest) x B*H.
"""

import triton
import triton.language as tl


@triton.jit
def gla_fwd_combine(
    states,  # [B, H, S, K, V]
    decay,  # [B, H, S, K]
    h0,  # [B, H, K, V]
    n_seg,
    has_h0,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    NB: tl.constexpr = (K * V + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    i_bh = (pid // NB).to(tl.int64)
    o_kv = (pid % NB) * BLOCK + tl.arange(0, BLOCK)
    m_kv = o_kv < K * V
    states += i_bh * n_seg * K * V
    decay += i_bh * n_seg * K

    b_s = tl.load(h0 + i_bh * K * V + o_kv, mask=m_kv & (has_h0 != 0), other=0.0)  # [BLOCK]
    tl.store(states + o_kv, b_s, mask=m_kv)
    for _ in range(1, n_seg):
        states += K * V
        b_d = tl.load(decay + o_kv // V, mask=m_kv, other=0.0)
        b_c = tl.load(states + o_kv, mask=m_kv, other=0.0)
        b_s = b_s * tl.exp2(b_d) + b_c
        tl.store(states + o_kv, b_s, mask=m_kv)
        decay += K
