"""Decoding: one or a few tokens of each sequence against a stored state.

    S_t = diag(exp g_t) S_{t-1} + k_t^T v_t          o_t = scale * q_t S_t

``recurrent_gla`` and ``recurrent_gla_lowrank`` serve every kind of gate. Their work is reading and
writing the state once, so what the host does matters as much: ``glac.fast`` remembers calls.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glac import dispatch, fast
from glac.autograd import _observed as observed
from glac.configs import DecodeConfig
from glac.errors import InputError, InputTypeError, NotDifferentiableError
from glac.gate import LOG2E, STEP_MIN
from glac.heads import HeadGroups, head_groups
from glac.plan import Plan
from glac.problem import LOWRANK_RANKS, DType, Gate, Op, Problem, Specialisation
from glac.record import dataclass
from glac.settings import checked_mode
from glac.templates import stride_unit, tiles
from glac.validate import (
    DTYPES,
    MAX_PROGRAMS,
    check_gate_values,
    check_scalar,
    check_sizes,
    same_device,
    want_dtype,
    want_rank,
    want_shape,
    want_tensor,
)

STATE_DTYPES = {torch.float32: 1, torch.bfloat16: 2}
"""Dtypes a state may be stored in, as the kernel counts them."""
INDEX_DTYPES = {torch.int32: 1, torch.int64: 2}
"""Dtypes of slot indices, and the 32-bit words of each."""


class Gated(NamedTuple):
    """The gate as it came: ``g``, or what a low-rank gate is made of; nothing for no gate."""

    g: Tensor | None = None
    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def kind(self) -> Gate:
        if self.x is not None:
            return Gate.LOWRANK
        return Gate.VECTOR if self.g is not None and self.g.dim() == 4 else Gate.SCALAR


class DecodeInputs(NamedTuple):
    """The tensors of a call.

    Attributes:
        q: ``[B, T, Hq, K]``.
        k: ``[B, T, Hk, K]``.
        v: ``[B, T, Hs, V]``.
        gate: of the tokens.
        state: ``[B, Hs, K, V]``, or a pool ``[slots, Hs, K, V]`` with ``indices``; may be None.
        indices: ``[N]`` rows of the pool, or None.
        cu_seqlens: ``[N + 1]`` int32 where sequences are packed into one row, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Gated
    state: Tensor | None = None
    indices: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def sequences(self) -> int:
        cu = self.cu_seqlens
        return self.q.shape[0] if cu is None else cu.shape[0] - 1

    @property
    def all(self) -> tuple[Tensor | None, ...]:
        return (self.q, self.k, self.v, *self.gate, self.state, self.indices, self.cu_seqlens)


class Want(NamedTuple):
    """What a call asks for besides the output.

    Attributes:
        in_place: write the state back to where it came from.
        final: a new state after the last token.
        every: new states after every token.
        dtype: of new states.
    """

    in_place: bool = False
    final: bool = False
    every: bool = False
    dtype: torch.dtype = torch.float32


# ---- checks ----


def _check_gate(i: DecodeInputs, H: int, K: int) -> tuple[DType, int]:
    """The gate's dtype and rank."""
    q, (g, x, weight, bias) = i.q, i.gate
    B, T = q.shape[:2]
    dtypes = tuple({q.dtype: 0, torch.float32: 0})
    if x is not None:
        want_tensor("x", x)
        want_rank("x", x, "[B, T, R]")
        rank = x.shape[2]
        if rank not in LOWRANK_RANKS:
            raise InputError(
                f"x must be [B, T, R] with R one of {LOWRANK_RANKS}, got shape {tuple(x.shape)}",
                hint="compute the gate yourself and call recurrent_gla for other ranks",
            )
        want_shape("x", x, "[B, T, R]", (B, T, rank))
        want_tensor("weight", weight)
        assert weight is not None
        want_shape("weight", weight, "[H*K, R]", (H * K, rank))
        want_dtype("x", x, (q.dtype,), "as q")
        want_dtype("weight", weight, (q.dtype,), "as q")
        if bias is None:
            return DTYPES[q.dtype], rank
        want_tensor("bias", bias)
        want_shape("bias", bias, "[H*K]", (H * K,))
        want_dtype("bias", bias, dtypes, "q's dtype or float32")
        return DTYPES[bias.dtype], rank
    if g is None:
        return DType.FP32, 0
    want_tensor("g", g)
    shapes = {4: ("[B, T, H, K]", (B, T, H, K)), 3: ("[B, T, H]", (B, T, H)), 1: ("[H]", (H,))}
    if g.dim() not in shapes:
        raise InputError(
            "g must be [B, T, H, K] (one gate per channel), [B, T, H] (per token and head), [H] "
            f"(per head) or None, got shape {tuple(g.shape)}"
        )
    want_shape("g", g, *shapes[g.dim()])
    want_dtype("g", g, dtypes, "q's dtype or float32")
    return DTYPES[g.dtype], 0


def _check_state(i: DecodeInputs, want: Want, sizes: tuple[int, int, int]) -> None:
    state, indices = i.state, i.indices
    layout = "[slots, H, K, V]" if indices is not None else "[N, H, K, V]"
    if state is not None:
        want_tensor("initial_state", state)
        want_rank("initial_state", state, layout)
        rows = state.shape[0] if indices is not None else i.sequences
        want_shape("initial_state", state, layout, (rows, *sizes))
        want_dtype("initial_state", state, tuple(STATE_DTYPES), "states are stored so")
    elif want.in_place or indices is not None:
        what = "inplace=True" if want.in_place else "state_indices"
        raise InputError(f"{what} needs initial_state, the memory that holds the states")
    if want.in_place and want.every:
        raise InputError(
            "inplace=True and output_states=True exclude each other",
            hint="take the states after each token, and copy the accepted one into the pool",
        )
    if want.dtype not in STATE_DTYPES:
        raise InputTypeError(f"state_dtype must be float32 or bfloat16, got {want.dtype}")
    if indices is not None:
        want_tensor("state_indices", indices)
        want_shape("state_indices", indices, "[N]", (i.sequences,))
        want_dtype("state_indices", indices, tuple(INDEX_DTYPES), "rows of the pool")
    if want.in_place:
        assert state is not None
        if state.requires_grad:
            raise InputError("initial_state requires a gradient and cannot be updated in place")
        if not _state_usable(state):
            raise InputError(
                "initial_state is updated in place, so each [K, V] must be contiguous, "
                f"its strides whole multiples of {stride_unit(sizes[1] * sizes[2])} elements and "
                f"its memory 16-byte aligned; got strides {state.stride()}",
                hint="pass a contiguous pool",
            )


def _check(i: DecodeInputs, want: Want) -> tuple[Problem, HeadGroups]:
    """Validate a call; its problem (H: state heads) and head groups."""
    q, k, v = i.q, i.k, i.v
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        want_tensor(name, tensor)
    want_rank("q", q, "[B, T, H, K]")
    want_rank("k", k, "[B, T, H, K]")
    want_rank("v", v, "[B, T, H, V]")
    B, T, Hq, K = q.shape
    Hk, (Hs, V) = k.shape[2], v.shape[2:]
    for name, size in (("B", B), ("T", T), ("H of q", Hq), ("H of k", Hk), ("H of v", Hs)):
        if size < 1:
            raise InputError(f"{name} must be at least 1, got q of shape {tuple(q.shape)}")
    want_shape("k", k, "[B, T, Hk, K]", (B, T, Hk, K))
    want_shape("v", v, "[B, T, Hs, V]", (B, T, Hs, V))
    check_sizes(K, V, max(Hq, Hs))
    if q.dtype not in DTYPES:
        raise InputTypeError(f"q must be bfloat16, float16 or float32, got {q.dtype}")
    want_dtype("k", k, (q.dtype,), "as q")
    want_dtype("v", v, (q.dtype,), "as q")
    groups = head_groups(q, k, v)
    cu = i.cu_seqlens
    if cu is not None:
        want_tensor("cu_seqlens", cu)
        want_rank("cu_seqlens", cu, "[N + 1]")
        want_dtype("cu_seqlens", cu, (torch.int32,), "token offsets")
        if B != 1 or cu.shape[0] < 2:
            raise InputError(
                f"cu_seqlens [N + 1] goes with tensors [1, T, H, D] and N >= 1, got B={B} and "
                f"{tuple(cu.shape)}"
            )
    gate_dtype, rank = _check_gate(i, Hs, K)
    _check_state(i, want, (Hs, K, V))
    g, x, weight, bias = i.gate
    same_device(
        q, k=k, v=v, g=g, x=x, weight=weight, bias=bias, initial_state=i.state,
        state_indices=i.indices, cu_seqlens=cu,
    )  # fmt: skip
    spec = Specialisation(K, V, DTYPES[q.dtype], i.gate.kind, gate_dtype, rank)
    return Problem(spec, i.sequences, T, Hs), groups


def _check_values(i: DecodeInputs, want: Want) -> None:
    """Checked mode: values that only the device knows. Synchronises."""
    if i.gate.g is not None:
        check_gate_values(i.gate.g)
    if i.indices is not None:
        assert i.state is not None
        slots = i.indices.tolist()
        rows, seen = i.state.shape[0], dict[int, int]()
        for n, slot in enumerate(slots):
            if slot >= rows:
                raise InputError(
                    f"state_indices[{n}] is {slot}, the pool has {rows} slots",
                    hint="a negative index marks an inactive sequence",
                )
            if want.in_place and slot >= 0 and slot in seen:
                raise InputError(
                    f"state_indices[{n}] is {slot}, as is state_indices[{seen[slot]}]: two "
                    "sequences cannot update one state",
                    hint="give each active sequence a slot of its own",
                )
            seen[slot] = n
    if i.cu_seqlens is not None:
        bounds, T = i.cu_seqlens.tolist(), i.q.shape[1]
        for n, (low, high) in enumerate(itertools.pairwise(bounds)):
            if (n == 0 and low != 0) or high < low or high > T:
                raise InputError(
                    f"cu_seqlens[{n}:{n + 2}] is {[low, high]}: offsets start at 0, never fall "
                    f"and end at T={T} at most"
                )


# ---- kernels ----


def _usable(t: Tensor, unit: int) -> bool:
    """Whether the kernel reads ``[B, T, H, D]`` as it lies."""
    batch, token, head, last = t.stride()
    return (
        (last == 1 or t.shape[-1] == 1)
        and batch % unit == token % unit == head % unit == 0
        and max(batch, token, head) < unit * 2**31
        and t.data_ptr() % 16 == 0
    )


def _state_usable(t: Tensor) -> bool:
    unit = stride_unit(t.shape[2] * t.shape[3])
    slot, head, row, last = t.stride()
    return (
        (last == 1 or t.shape[3] == 1)
        and (row == t.shape[3] or t.shape[2] == 1)
        and slot % unit == head % unit == 0
        and max(slot, head) < unit * 2**31
        and t.data_ptr() % 16 == 0
    )


def _plain(t: Tensor | None) -> Tensor | None:
    if t is None or (t.is_contiguous() and t.data_ptr() % 16 == 0):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def laid_out(i: DecodeInputs) -> DecodeInputs:
    """The inputs in layouts that the kernel reads, copied only where they are not."""
    K, V = i.q.shape[3], i.v.shape[3]
    units = (stride_unit(K), stride_unit(K), stride_unit(V))
    q, k, v = (
        t if _usable(t, unit) else t.clone(memory_format=torch.contiguous_format)
        for t, unit in zip((i.q, i.k, i.v), units, strict=True)
    )
    g, x, weight, bias = i.gate
    if g is not None and g.dim() == 4 and not _usable(g, units[0]):
        g = g.clone(memory_format=torch.contiguous_format)
    if x is not None and not _usable(x.unsqueeze(2), stride_unit(x.shape[2])):
        x = x.clone(memory_format=torch.contiguous_format)
    state = i.state
    if state is not None and not _state_usable(state):
        state = state.clone(memory_format=torch.contiguous_format)
    gate = Gated(g, x, _plain(weight), _plain(bias))
    return DecodeInputs(q, k, v, gate, state, _plain(i.indices), _plain(i.cu_seqlens))


@dataclass(frozen=True)
class Launch:
    """Everything about a launch that does not depend on addresses.

    Attributes:
        kernel: what runs.
        rest: scalars behind the gate's numbers.
        grid: programs.
        o: shape of the output.
        state: shape of the new state, None where none is made.
        lowrank: whether the gate is low-rank.
    """

    kernel: Any
    rest: tuple[int, ...]
    grid: int
    o: tuple[int, ...]
    state: tuple[int, ...] | None
    lowrank: bool


def launch(plan: Plan[DecodeConfig], groups: HeadGroups, i: DecodeInputs, want: Want) -> Launch:
    """Work out a launch for tensors in layouts that the kernel reads."""
    problem, spec = plan.problem, plan.problem.spec
    K, V, Hs, N = spec.K, spec.V, problem.H, problem.B
    B, T = i.q.shape[:2]
    H = Hs * groups.s
    unit_k, unit_v, unit_h = stride_unit(K), stride_unit(V), stride_unit(K * V)
    gate, state = i.gate, i.state
    strides = [s // unit_k for t in (i.q, i.k) for s in t.stride()[:3]]
    strides += [s // unit_v for s in i.v.stride()[:3]]
    lowrank = gate.x is not None
    if gate.x is not None:
        unit = stride_unit(spec.rank)
        strides += [s // unit for s in gate.x.stride()[:2]]
    elif gate.g is None:
        strides += [0, 0, 0]
    elif gate.g.dim() == 1:
        strides += [0, 0, gate.g.stride(0)]
    else:
        strides += [s // (unit_k if gate.g.dim() == 4 else 1) for s in gate.g.stride()[:3]]
    from_strides = (0, 0) if state is None else tuple(s // unit_h for s in state.stride()[:2])
    size = K * V // unit_h
    made: tuple[int, ...] | None = None
    to_strides = (from_strides[0], 0, from_strides[1])
    if want.every:
        rows = (N, T) if i.cu_seqlens is None else (1, T)
        made = (*rows, Hs, K, V)
        to_strides = (T * Hs * size if i.cu_seqlens is None else 0, Hs * size, size)
    elif want.final:
        made = (N, Hs, K, V)
        to_strides = (Hs * size, 0, size)
    state_in = 0 if state is None else STATE_DTYPES[state.dtype]
    state_out = state_in if want.in_place else (STATE_DTYPES[want.dtype] if made else 0)
    rest = (
        T,
        H,
        *groups.arguments,
        N if i.indices is None or state is None else state.shape[0],
        0 if i.indices is None else INDEX_DTYPES[i.indices.dtype],
        int(i.cu_seqlens is not None),
        int(gate.g is not None),
        state_in,
        state_out,
        # In place, or into rows of its own where the sequences are the pool.
        int(want.in_place),
        int(want.every),
        *((int(gate.bias is not None),) if lowrank else ()),
        *strides,
        *from_strides,
        *to_strides,
    )
    grid = tiles("gla_decode", spec, plan.config.decode) * N * Hs
    return Launch(plan.kernels["gla_decode"], rest, grid, (B, T, H, V), made, lowrank)


def run_launch(
    run: Launch, i: DecodeInputs, want: Want, numbers: tuple[float, ...]
) -> tuple[Tensor, Tensor | None]:
    """Launch. ``numbers``: scale, and for a low-rank gate its ``inv_normalizer`` and clamp."""
    q, state = i.q, i.state
    o = q.new_empty(run.o)
    made = None
    if run.state is not None:
        made = torch.empty(run.state, dtype=want.dtype, device=q.device)
    target = state if want.in_place else made
    wide_in, narrow_in = (None, state) if _narrow(state) else (state, None)
    wide_out, narrow_out = (None, target) if _narrow(target) else (target, None)
    g, x, weight, bias = i.gate
    gate = (x, weight, bias) if run.lowrank else (g,)
    idx = i.indices
    if idx is not None and idx.dtype is torch.int64:
        idx = idx.view(torch.int32)  # the kernel steps over the high halves
    run.kernel.run(
        (q, i.k, i.v, *gate, wide_in, narrow_in, wide_out, narrow_out, idx, i.cu_seqlens, o),
        (*numbers, *run.rest),
        run.grid,
    )
    return o, target


def _narrow(t: Tensor | None) -> bool:
    return t is not None and t.dtype is torch.bfloat16


# ---- PyTorch ----


def _torch_sequences(
    i: DecodeInputs, groups: HeadGroups, numbers: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the dense gate, all with one head per state head or query."""
    g, x, weight, bias = i.gate
    B, T = i.q.shape[:2]
    Hs = i.v.shape[2]
    if x is not None:
        from glac.reference import lowrank_gate

        assert weight is not None
        clamp = numbers[2] / LOG2E
        g = lowrank_gate(
            x, weight, bias, num_heads=Hs, normalizer=1 / numbers[1],
            clamp_min=clamp if clamp > STEP_MIN else None,
        )  # fmt: skip
    elif g is None:
        g = i.q.new_zeros((B, T, Hs, 1), dtype=torch.float32)
    elif g.dim() < 4:
        g = g.expand(B, T, Hs).unsqueeze(-1)
    q, k, v, dense = groups.expand(i.q, i.k, i.v, g)
    assert q is not None
    assert k is not None
    assert v is not None
    assert dense is not None
    return q, k, v, dense


def run_torch(
    groups: HeadGroups, i: DecodeInputs, want: Want, numbers: tuple[float, ...]
) -> tuple[Tensor, Tensor | None]:
    """The same in PyTorch, with the same results in memory."""
    from glac.reference.decode import decode_gla

    q, k, v, g = _torch_sequences(i, groups, numbers)
    N, H, group = i.sequences, q.shape[2], groups.s
    state = i.state
    K, V = q.shape[3], v.shape[3]
    active = torch.ones(N, dtype=torch.bool, device=q.device)
    rows = torch.arange(N, device=q.device)
    if i.indices is not None:
        assert state is not None
        active = (i.indices >= 0) & (i.indices < state.shape[0])
        rows = torch.where(active, i.indices.long(), 0)
    start = q.new_zeros((N, H, K, V), dtype=torch.float32)
    if state is not None:
        start = state[rows].float().repeat_interleave(group, 1)
    bounds = [(n, 0, q.shape[1]) for n in range(N)]
    if i.cu_seqlens is not None:
        offsets = i.cu_seqlens.tolist()
        bounds = [(0, low, high) for low, high in itertools.pairwise(offsets)]
    o = torch.zeros((*q.shape[:3], V), dtype=q.dtype, device=q.device)
    ends: list[Tensor] = []
    steps: list[Tensor] = []
    for n, (b, low, high) in enumerate(bounds):
        part = (slice(b, b + 1), slice(low, high))
        out, end = decode_gla(
            q[part], k[part], v[part], g[part], scale=numbers[0],
            initial_state=start[n : n + 1], every_state=want.every,
        )  # fmt: skip
        alive = active[n]
        o[part] = torch.where(alive, out, 0)
        end = torch.where(alive, end, 0)
        (steps if want.every else ends).append(end[..., ::group, :, :])
    if want.every:
        return o, torch.cat(steps, 1 if i.cu_seqlens is not None else 0).to(want.dtype)
    final = torch.cat(ends) if ends else start[:, ::group]
    if want.in_place:
        assert state is not None
        state[rows[active]] = final[active].to(state.dtype)
        return o, state
    return o, final.to(want.dtype) if want.final else None


# ---- the operation ----


def _launchable(problem: Problem, q: Tensor) -> bool:
    return q.is_cuda and problem.B * problem.H * -(-problem.spec.V // 16) <= MAX_PROGRAMS


def execute(
    i: DecodeInputs, want: Want, numbers: tuple[float, ...]
) -> tuple[Tensor, Tensor | None]:
    """Check a call and run it, by kernels where there are some; the short way if it is known."""
    tensors = i.all
    key = fast.key_of(tensors, numbers, want)
    bound = fast.find(key)
    if bound is not None:
        made = bound.run(tensors)
        if made is not None:
            o, state = made
            assert o is not None
            return o, i.state if want.in_place else state
    problem, groups = _check(i, want)
    if checked_mode():
        _check_values(i, want)
    plan = None
    if _launchable(problem, i.q):
        plan = dispatch.resolve(problem, i.q.device.index, Op.DECODE)[1]
    if plan is None:
        return run_torch(groups, i, want, numbers)
    usable = laid_out(i)
    with torch.cuda.device(i.q.device):
        result = run_launch(launch(plan, groups, usable, want), usable, want, numbers)
    if key is not None and key not in fast.bound:
        from glac.binding import bind_decode

        bind_decode(key, plan, groups, i, want, numbers)
    return result


def decode(
    i: DecodeInputs, want: Want, numbers: tuple[float, ...]
) -> tuple[Tensor, Tensor | None]:
    """``execute``, or the operators of ``glac.decode_ops`` where something watches the call."""
    tensors = i.all
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotDifferentiableError(
            "decoding has no gradient, and an input requires one",
            hint="call it in torch.no_grad(), or train with the chunk operations",
        )
    if observed(tensors):
        from glac import decode_ops

        return decode_ops.call(i, want, numbers)
    return execute(i, want, numbers)


def _want(
    state: Tensor | None,
    inplace: bool,
    output_final_state: bool,
    output_states: bool,
    state_dtype: torch.dtype | None,
) -> Want:
    stored = state.dtype if isinstance(state, Tensor) else torch.float32
    dtype = stored if state_dtype is None else state_dtype
    every, in_place = bool(output_states), bool(inplace)
    return Want(in_place, bool(output_final_state) and not (in_place or every), every, dtype)


def _scale(q: Tensor, scale: float | None) -> float:
    if scale is not None:
        return check_scalar("scale", scale)
    return float(q.shape[-1] ** -0.5) if isinstance(q, Tensor) and q.dim() == 4 else 1.0


def recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    inplace: bool = False,
    output_final_state: bool = False,
    output_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One or a few tokens of gated linear attention against a stored state, for decoding.

    The recurrence in fp32, token by token, so every gate is exact; for long sequences
    ``chunk_gla`` is far faster. It has no gradient. Calls can be captured in CUDA graphs.

    Args:
        q: queries ``[B, T, Hq, K]`` in bf16, fp16 or fp32; K <= 256.
        k: keys ``[B, T, Hk, K]``.
        v: values ``[B, T, H, V]``, V <= 512. Hk divides H; Hq divides H or is a multiple of it.
        g: natural log of each step's decay, <= 0, in q's dtype or fp32: ``[B, T, H, K]`` (per
            channel), ``[B, T, H]`` (per token and head), ``[H]`` (per head), or None (no decay).
        scale: factor on the queries, default ``K ** -0.5``.
        initial_state: states ``[B, H, K, V]`` in fp32 or bf16, default zeros; with
            ``state_indices`` a pool ``[slots, H, K, V]``.
        state_indices: ``[B]`` in int32 or int64: the slot of each sequence's state. A negative
            slot marks an inactive sequence, whose output is 0 and whose state is left alone; so is
            one beyond the pool. In checked mode (``GLAC_CHECKED=1``) the latter, and slots that
            two sequences update, are errors; otherwise such a state ends as one of the updates,
            in parts.
        cu_seqlens: ``[N + 1]`` in int32, on the device: offsets of N sequences packed into tensors
            of batch size 1. N then takes the place of B in states and indices.
        inplace: write the states back to where they came from.
        output_final_state: return new states instead, ``[B, H, K, V]``.
        output_states: return the state after every token, ``[B, T, H, K, V]``, as speculative
            decoding wants.
        state_dtype: fp32 or bf16, of new states; that of ``initial_state`` by default, or fp32.

    Returns:
        ``o [B, T, max(Hq, H), V]`` in q's dtype; and the states: ``initial_state`` itself if
        updated in place, new ones, or None. A new state of an inactive sequence is 0.

    Raises:
        InputError: a shape or value is wrong.
        InputTypeError: a dtype or device is wrong.
        KernelNotFoundError: ``GLAC_REQUIRE_AOT=1`` and no pack serves this problem.
        NotDifferentiableError: a gradient is wanted.
    """
    i = DecodeInputs(q, k, v, Gated(g), initial_state, state_indices, cu_seqlens)
    want = _want(initial_state, inplace, output_final_state, output_states, state_dtype)
    return decode(i, want, (_scale(q, scale),))


def recurrent_gla_lowrank(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    normalizer: float = 16.0,
    clamp_min: float | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    inplace: bool = False,
    output_final_state: bool = False,
    output_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``recurrent_gla`` with the gate of ``chunk_gla_lowrank``, computed in the kernel.

    Args:
        q: queries ``[B, T, Hq, K]``.
        k: keys ``[B, T, Hk, K]``.
        v: values ``[B, T, H, V]``.
        x: gate input ``[B, T, R]`` in q's dtype, R one of 8, 16, 32, 64.
        weight: ``[H*K, R]`` in q's dtype, as ``torch.nn.Linear`` stores it.
        bias: ``[H*K]`` in q's dtype or fp32, or None.
        normalizer: the gate logits' divisor (tau), > 0.
        clamp_min: lower bound of the gate (natural log, <= 0), default none.
        scale, initial_state, state_indices, cu_seqlens: as for ``recurrent_gla``.
        inplace, output_final_state, output_states, state_dtype: likewise.

    Returns:
        As ``recurrent_gla``.

    Raises:
        InputError, InputTypeError, KernelNotFoundError, NotDifferentiableError: likewise.
    """
    tau = check_scalar("normalizer", normalizer, positive=True)
    clamp = STEP_MIN if clamp_min is None else check_scalar("clamp_min", clamp_min)
    if clamp > 0:
        raise InputError(f"clamp_min must be <= 0 (a bound on a log-decay), got {clamp}")
    gate = Gated(None, x, weight, bias)
    i = DecodeInputs(q, k, v, gate, initial_state, state_indices, cu_seqlens)
    want = _want(initial_state, inplace, output_final_state, output_states, state_dtype)
    return decode(i, want, (_scale(q, scale), 1.0 / tau, max(clamp, STEP_MIN) * LOG2E))
