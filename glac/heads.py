"""Head groups: which heads share what, and packed sequences, for the operations that take them.

With Hq query heads, Hk key heads and Hs state heads (those of values, gate and state), an
operation computes H = max(Hq, Hs) heads. Head i reads query head ``i // q_group``, key head
``i // k_group`` and state head ``i // s_group``. Hk divides Hs; Hq divides Hs or is a
multiple of it.
"""

from __future__ import annotations

from torch import Tensor

from glac.record import dataclass
from glac.validate import check_heads


@dataclass(frozen=True)
class HeadGroups:
    """How heads share tensors.

    Attributes:
        q: heads that share a query head.
        k: heads that share a key head.
        s: heads that share values, gate and state.
    """

    q: int = 1
    k: int = 1
    s: int = 1

    @property
    def arguments(self) -> tuple[int, int, int]:
        """As the kernels take them."""
        return self.q, self.k, self.s

    def expand(self, q: Tensor, k: Tensor, *of_states: Tensor | None) -> tuple[Tensor | None, ...]:
        """The tensors ``[B, T, heads, ...]`` with a head of their own for each head computed."""
        groups = (self.q, self.k, *(self.s for _ in of_states))
        return tuple(
            t if t is None or group == 1 else t.repeat_interleave(group, 2)
            for t, group in zip((q, k, *of_states), groups, strict=True)
        )


def head_groups(q: Tensor, k: Tensor, v: Tensor) -> HeadGroups:
    """The groups of an operation on ``[B, T, heads, D]``.

    Raises:
        InputError: heads do not divide.
    """
    check_heads(q, k, v)
    Hq, Hk, Hs = q.shape[2], k.shape[2], v.shape[2]
    heads = max(Hq, Hs)
    return HeadGroups(heads // Hq, heads // Hk, heads // Hs)
