"""Head groups: which heads share what, and packed sequences, for the operations that take them.

With Hq query heads, Hk key heads and Hs state heads (those of values, gate and state), an
operation computes H = max(Hq, Hs) heads. Head i reads query head ``i // q_group``, key head
``i // k_group`` and state head ``i // s_group``. Hk divides Hs; Hq divides Hs or is a
multiple of it.
"""

from __future__ import annotations

from torch import Tensor

from glac.errors import InputError
from glac.record import dataclass


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


def head_groups(Hq: int, Hk: int, Hs: int) -> HeadGroups:
    """The groups of an operation with so many query, key and state heads.

    Raises:
        InputError: they do not divide.
    """
    if Hs % Hk:
        raise InputError(
            f"k has {Hk} heads, which must divide the {Hs} heads of v",
            hint="heads that share keys are neighbours: head i reads key head i // (Hv // Hk)",
        )
    if Hq % Hs and Hs % Hq:
        raise InputError(
            f"q has {Hq} heads, which must divide the {Hs} heads of v or be a multiple of them",
            hint="heads that share a state are neighbours: head i reads state i // (Hq // Hv)",
        )
    heads = max(Hq, Hs)
    return HeadGroups(heads // Hq, heads // Hk, heads // Hs)
