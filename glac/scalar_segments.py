"""Long sequences with a scalar gate, where heads alone would leave most of a GPU idle.

The kernels of ``glac.scalar`` walk a sequence from its first chunk to its last. Here it is cut
into segments, which are to them what packed sequences are, and the states between are chained:

    S_j = 2^(sum of g in segment j-1) . S_{j-1} + C_{j-1}

with C_j the state that segment j leaves when it starts from zero; for gradients of states
likewise, backwards. So ``scalar_states``, or for want of it a forward pass, finds what each adds,
``gla_combine`` (a kernel of the vector gate, whose decays are one for each channel) chains them,
and the pass proper starts from the right states. More work, in as many programs as the GPU has
room for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glac import dispatch, scalar
from glac.configs import CombineKernelConfig, ScalarBackwardConfig, ScalarForwardConfig
from glac.gate import LOG2E, STEP_MIN
from glac.heads import HeadGroups
from glac.plan import Plan
from glac.problem import Gate, Op, Problem
from glac.templates import tiles

FEWEST = 4
"""Segments of a sequence, since each token is walked twice."""
PROGRAMS_PER_SM = 2
"""Measured on an H100 with 4 to 128 segments: 256 programs were the best or within 3 %, at 1 to 32
heads and 8192 to 131072 tokens (docs/performance.md)."""
SHORTEST = 8
"""Chunks of a segment."""
MOST = 256
"""Segments of a sequence: the chain of them is walked one after the other."""


def segment_length(problem: Problem, config: ScalarForwardConfig, sms: int) -> int:
    """Tokens per segment, or 0 for whole sequences.

    Two programs per SM, where whole sequences make less than a quarter of that.

    Args:
        problem: of packed sequences their mean counts.
        config: of the forward pass.
        sms: multiprocessors of the GPU.
    """
    sequences = problem.sequences
    tokens = max(1, problem.B * problem.T // sequences)  # the mean of packed ones
    programs = sequences * problem.H * tiles("scalar_fwd", problem.spec, config.fwd)
    room = PROGRAMS_PER_SM * sms
    if FEWEST * programs > room:
        return 0
    length = max(tokens * programs // room, tokens // MOST, SHORTEST * config.fwd.chunk)
    length = 1 << (length - 1).bit_length()
    return length if FEWEST * length <= tokens else 0


class Segments(NamedTuple):
    """A call cut into segments.

    Attributes:
        plan: of the forward pass.
        combine: the kernel ``gla_combine``.
        groups: how heads share tensors.
        whole: the call, its tensors as the kernels want them.
        cut: the same with each segment a sequence of a packed batch, without initial states.
        length: tokens of a segment.
        slots: segments of a row: of a sequence, or of all those that are packed into one row.
        first: of each sequence, its first segment.
        last: of each sequence, its last segment.
        decay: ``[rows, Hs, slots]`` in fp32, total gate of each segment in log2 units.
        walking: of the backward pass, whose first kernel finds what segments add; or None.
    """

    plan: Plan[ScalarForwardConfig]
    combine: Any
    groups: HeadGroups
    whole: scalar.ScalarInputs
    cut: scalar.ScalarInputs
    length: int
    slots: int
    first: Tensor
    last: Tensor
    decay: Tensor
    walking: Plan[ScalarBackwardConfig] | None = None

    @property
    def problem(self) -> Problem:
        """Segments as what they are to the kernels: a batch of short sequences."""
        rows = self.decay.shape[0]
        return replace(self.plan.problem, B=rows * self.slots, T=self.length, packed=0)

    def _chain(self, added: Tensor, ends: Tensor | None, *, reverse: bool = False) -> Tensor:
        """The state before each segment, or with ``reverse`` its gradient at the end of each.

        Args:
            added: ``[segments, Hs, K, V]``, what each segment adds to the next one's.
            ends: ``[N, Hs, K, V]`` to begin with, None for zeros.
            reverse: from the last segment to the first.
        """
        rows, heads, slots = self.decay.shape
        K, V = added.shape[2:]
        by_head = added.view(rows, slots, heads, K, V).transpose(1, 2)
        states = added.new_zeros((rows, heads, slots, K, V))
        if reverse:
            states[:, :, :-1] = by_head[:, :, 1:]
        else:
            states[:, :, 1:] = by_head[:, :, :-1]
        cu, N = self.whole.cu_seqlens, self.whole.sequences
        T = self.whole.q.shape[1]
        packed = int(cu is not None)
        spec = self.plan.problem.spec
        self.combine.run(
            (states, self.decay.unsqueeze(-1).expand(*self.decay.shape, K).contiguous(), ends, cu),
            (T, heads, slots, self.length, 1, int(reverse), packed, int(ends is not None)),
            tiles("gla_combine", spec, CombineKernelConfig()) * N * heads,
        )
        found = states.transpose(1, 2).reshape(rows * slots, heads, K, V)
        # The kernel leaves the slot that it begins with, and what it adds to itself is not there.
        edge = self.last if reverse else self.first
        begin = added.new_zeros((N, heads, K, V)) if ends is None else ends
        return found.index_copy(0, edge, begin)

    def starts(self, scale: float) -> Tensor:
        """The state before each segment, ``[segments, Hs, K, V]``."""
        if self.walking is not None:
            added = scalar.added_states(self.walking, self.groups, self.cut)
        else:
            _, ends = scalar.run_forward(self.plan, self.groups, self.cut, scale, True)
            assert ends is not None
            added = ends
        return self._chain(added, self.whole.initial_state)

    def forward(self, scale: float, output_final_state: bool) -> scalar.Result:
        """As ``glac.scalar.run_forward`` of the whole call."""
        i = replace(self.cut, initial_state=self.starts(scale))
        o, ends = scalar.run_forward(self.plan, self.groups, i, scale, output_final_state)
        o = o.view(*self.whole.q.shape[:2], *o.shape[2:])
        return o, None if ends is None else ends.index_select(0, self.last)

    def backward(
        self,
        plan: Plan[ScalarBackwardConfig],
        scale: float,
        do: Tensor,
        dht: Tensor | None,
        *,
        want_dg: bool,
        want_dh0: bool,
    ) -> scalar.Gradients:
        """As ``glac.scalar.run_backward`` of the whole call, by ``plan``."""
        do = do.reshape(1, -1, *do.shape[2:])
        i = replace(self.cut, initial_state=self.starts(scale))
        added = scalar.added_states(plan, self.groups, self.cut, scale, do)
        ends = self._chain(added, dht, reverse=True)
        dq, dk, dv, dg, dh0 = scalar.run_backward(
            plan, self.groups, i, scale, do, ends, want_dg=want_dg, want_dh0=want_dh0
        )
        B, T = self.whole.q.shape[:2]
        dq, dk, dv = (t.view(B, T, *t.shape[2:]) for t in (dq, dk, dv))
        return (
            *(dq, dk, dv),
            None if dg is None else dg.view(B, T, dg.shape[2]),
            None if dh0 is None else dh0.index_select(0, self.first),
        )


def _boundaries(i: scalar.ScalarInputs, length: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Boundaries of all segments ``[segments + 1]``, first and last of each sequence, slots.

    Slots of packed sequences are those of ``kernel_templates/_place.py``; nothing waits for the
    device.
    """
    B, T = i.q.shape[:2]
    N, device = i.sequences, i.q.device
    cu = i.cu_seqlens
    if cu is None:
        slots = -(-T // length)
        inside = torch.arange(slots, device=device) * length
        rows = torch.arange(B, device=device)
        cuts = (rows[:, None] * T + inside).flatten()
        first = rows * slots
        last = first + slots - 1
    else:
        slots = T // length + N
        bounds = cu.long().clamp(0, T)
        low, high = bounds[:-1], torch.maximum(bounds[1:], bounds[:-1])
        first = low // length + torch.arange(N, device=device)
        last = first + (-((low - high) // length)).clamp_min(1) - 1
        slot = torch.arange(slots, device=device)
        n = (torch.searchsorted(first, slot, right=True) - 1).clamp_min(0)
        cuts = torch.minimum(low[n] + (slot - first[n]) * length, high[n])
    end = torch.full((1,), B * T, device=device)
    return torch.cat((cuts, end)).int(), first, last, slots


def _decays(i: scalar.ScalarInputs, cuts: Tensor, slots: int, length: int) -> Tensor:
    """``[rows, Hs, slots]``: total gate of each segment in log2 units."""
    B, T, heads = *i.q.shape[:2], i.v.shape[2]
    least = STEP_MIN * LOG2E
    if i.g is None:
        return torch.zeros((B, heads, slots), device=i.q.device)
    steps = (i.g.float() * LOG2E).clamp_min(least)
    if i.g.dim() == 1:
        return steps[None, :, None] * (cuts[1:] - cuts[:-1]).view(-1, 1, slots)
    steps = steps.transpose(1, 2)  # [B, Hs, T]
    if i.cu_seqlens is None:
        padded = torch.nn.functional.pad(steps, (0, slots * length - T))
        return padded.view(B, heads, slots, length).sum(3)
    # Along the last dimension: along another one a thread walks all tokens of its head.
    sums = torch.nn.functional.pad(steps.double().cumsum(2), (1, 0))
    return (sums[:, :, cuts[1:].long()] - sums[:, :, cuts[:-1].long()]).float()


def segments(
    plan: Plan[ScalarForwardConfig],
    combine: Any,
    groups: HeadGroups,
    i: scalar.ScalarInputs,
    length: int,
    walking: Plan[ScalarBackwardConfig] | None = None,
) -> Segments:
    """``i``, laid out as the kernels want it, cut into segments of ``length`` tokens."""
    cuts, first, last, slots = _boundaries(i, length)

    def row(t: Tensor) -> Tensor:
        return t.reshape(1, -1, *t.shape[2:])

    g = i.g if i.g is None or i.g.dim() == 1 else row(i.g)
    parts = scalar.ScalarInputs(row(i.q), row(i.k), row(i.v), g, None, cuts)
    decay = _decays(i, cuts, slots, length)
    return Segments(plan, combine, groups, i, parts, length, slots, first, last, decay, walking)


def cut(
    plan: Plan[ScalarForwardConfig] | None,
    checked: scalar.ScalarProblem,
    i: scalar.ScalarInputs,
    device: int,
) -> Segments | None:
    """``i`` in segments, where that is faster and there is a kernel to chain them."""
    if plan is None:
        return None
    gpu = dispatch.device_gpu(device)[0]
    problem = scalar.bucketed(checked.problem, i)
    length = 0 if gpu is None else segment_length(problem, plan.config, gpu.sm_count)
    if not length:
        return None
    vector = replace(problem.spec, gate=Gate.VECTOR, gate_dtype=problem.spec.dtype)
    combine = dispatch.pack_kernel("gla_combine", vector, CombineKernelConfig(), device)
    if combine is None:
        return None
    walking = dispatch.plan_from_packs(problem, device, Op.SCALAR_BACKWARD)
    return segments(plan, combine, checked.groups, i, length, walking)
