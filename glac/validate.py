"""Checks of public arguments, before anything is launched: rank, shape, dtype, device, values.

Each message names the argument, what was wanted and what came.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from glac.errors import InputError, InputTypeError
from glac.problem import (
    LOWRANK_RANKS,
    MAX_K,
    MAX_V,
    DType,
    Gate,
    Precision,
    Problem,
    Specialisation,
)
from glac.record import dataclass

DTYPES: dict[torch.dtype, DType] = {
    torch.bfloat16: DType.BF16,
    torch.float16: DType.FP16,
    torch.float32: DType.FP32,
}
TORCH_DTYPES: dict[DType, torch.dtype] = {ours: theirs for theirs, ours in DTYPES.items()}
_SUPPORTED = "torch.bfloat16, torch.float16 or torch.float32"
# Offsets inside a tile are 32-bit: 128 rows of a token stride must stay below 2^31 elements.
MAX_TOKEN_STRIDE = 2**24
MAX_PROGRAMS = 2**31 - 1
# Positions are 32-bit, and kernels look a chunk ahead and round lengths up.
MAX_TOKENS = 2**31 - 1 - 65536


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def want_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise InputTypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        raise InputTypeError(
            f"{name} must be a dense tensor, got layout {value.layout}",
            hint=f"pass {name}.to_dense(), or pad a nested tensor",
        )


def want_rank(name: str, tensor: Tensor, layout: str) -> None:
    rank = layout.count(",") + 1
    if tensor.dim() != rank:
        raise InputError(
            f"{name} must be {layout} ({rank} dimensions), got shape {_shape(tensor)}",
            hint="the token dimension comes before the heads: [B, T, H, D]" if rank == 4 else "",
        )


def want_shape(name: str, tensor: Tensor, layout: str, wanted: Sequence[int]) -> None:
    if _shape(tensor) != tuple(wanted):
        raise InputError(f"{name} must be {layout} = {tuple(wanted)}, got {_shape(tensor)}")


def want_dtype(name: str, tensor: Tensor, wanted: Sequence[torch.dtype], why: str) -> None:
    if tensor.dtype not in wanted:
        names = " or ".join(str(d) for d in wanted)
        raise InputTypeError(f"{name} must be {names} ({why}), got {tensor.dtype}")


def check_scalar(name: str, value: float, *, positive: bool = False) -> float:
    """``value`` as a finite float.

    Raises:
        InputTypeError: it is not a number.
        InputError: it is NaN, infinite, or not positive where it must be.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputTypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not -math.inf < number < math.inf:  # torch.compile cannot trace math.isfinite
        raise InputError(f"{name} must be finite, got {number}")
    if positive and not (number > 0 and 1 / number < math.inf):
        raise InputError(f"{name} must be greater than 0 (and 1/{name} finite), got {number}")
    return number


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises ``InputError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_precision(precision: object, dtype: torch.dtype) -> Precision:
    """How products are made, from the public argument of the same name.

    Args:
        precision: ``"ieee"`` or ``"tf32"``.
        dtype: of q, k and v.

    Raises:
        InputError: it is neither, or TF32 is asked for beside inputs that are not fp32.
    """
    check_choice("precision", precision, ("ieee", "tf32"))
    if precision == "ieee":
        return Precision.IEEE
    if dtype != torch.float32:
        raise InputError(
            f"precision 'tf32' goes with torch.float32 inputs, got q in {dtype}",
            hint="leave precision out: products of bf16 and fp16 inputs have one form",
        )
    return Precision.TF32


def check_chunk_size(value: int | None) -> int:
    """The PyTorch path's chunk: ``value``, or 64.

    Raises:
        InputTypeError: it is not an integer.
        InputError: it is not a power of two.
    """
    if value is None:
        return 64
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputTypeError(f"chunk_size must be an integer, got {type(value).__name__}")
    if value < 1 or value & (value - 1):
        raise InputError(f"chunk_size must be a power of two, got {value}")
    return value


@dataclass(frozen=True)
class _Sizes:
    """What q, k, v and ``cu_seqlens`` say; the names are those of ``Problem``."""

    B: int
    T: int
    H: int
    K: int
    V: int
    dtype: DType
    packed: int
    q_heads: int
    k_heads: int
    state_heads: int

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        return self.packed or self.B, self.state_heads, self.K, self.V

    def problem(self, gate: Gate, gate_dtype: DType, rank: int, precision: Precision) -> Problem:
        return Problem(
            Specialisation(self.K, self.V, self.dtype, gate, gate_dtype, rank, precision),
            self.B,
            self.T,
            self.H,
            self.packed,
            self.H // self.q_heads,
            self.H // self.k_heads,
            self.H // self.state_heads,
        )


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse heads that do not divide: neighbours share keys, queries, or a state.

    Raises:
        InputError: those of k do not divide those of v, or those of q neither do nor are a
            multiple of them.
    """
    q_heads, k_heads, v_heads = q.shape[2], k.shape[2], v.shape[2]
    if v_heads % k_heads:
        raise InputError(
            f"k must be [B, T, Hk, K] with Hk a divisor of the {v_heads} heads of v, "
            f"got {_shape(k)}",
            hint="several heads of v, neighbours, may share a head of k, not the other way round",
        )
    if v_heads % q_heads and q_heads % v_heads:
        raise InputError(
            f"q must be [B, T, Hq, K] with Hq a divisor or a multiple of the {v_heads} heads of "
            f"v, got {_shape(q)}",
            hint="heads that share a state are neighbours: head i reads state i // (Hq // Hv)",
        )


def check_cu(cu_seqlens: Tensor | None, q: Tensor) -> int:
    """How many sequences a packed batch has; 0 without ``cu_seqlens``.

    Raises:
        InputError: its shape is wrong, or the batch is not packed into one row.
        InputTypeError: it is no tensor of integers.
    """
    if cu_seqlens is None:
        return 0
    want_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise InputError(
            f"cu_seqlens must be [N + 1] with N >= 1 sequences, got shape {_shape(cu_seqlens)}",
            hint="the first token of each sequence, and the number of all tokens: [0, 5, 12]",
        )
    integers = (torch.int32, torch.int64)
    want_dtype("cu_seqlens", cu_seqlens, integers, "positions of tokens")
    if q.shape[0] != 1:
        raise InputError(
            f"with cu_seqlens the batch is packed into one row, got q of shape {_shape(q)}",
            hint="q[B, T, ...].reshape(1, B * T, ...)",
        )
    return cu_seqlens.shape[0] - 1


def check_sizes(K: int, V: int, H: int) -> None:
    """Refuse what no kernel addresses: channels per head, and elements of a token in H heads.

    Raises:
        InputError: channels or heads are out of range.
    """
    for name, size, limit in (("K", K, MAX_K), ("V", V, MAX_V)):
        if not 1 <= size <= limit:
            raise InputError(
                f"{name} must be in 1..{limit} channels per head, got {size}",
                hint="use more heads of fewer channels" if size > limit else "",
            )
    if H * max(K, V) >= MAX_TOKEN_STRIDE:
        raise InputError(
            f"one token has {H * max(K, V)} elements (H={H}, K={K}, V={V}), "
            f"fewer than {MAX_TOKEN_STRIDE} are addressable",
            hint="split the heads over several calls",
        )


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> _Sizes:
    for name, value in (("q", q), ("k", k), ("v", v)):
        want_tensor(name, value)
    want_rank("q", q, "[B, T, H, K]")
    want_rank("k", k, "[B, T, H, K]")
    want_rank("v", v, "[B, T, H, V]")
    B, T, q_heads, K = q.shape
    k_heads, v_heads, V = k.shape[2], v.shape[2], v.shape[3]
    want_shape("k", k, "[B, T, Hk, K]", (B, T, k_heads, K))
    want_shape("v", v, "[B, T, Hs, V]", (B, T, v_heads, V))
    for name, size in (("B", B), ("T", T), ("H", min(q_heads, k_heads, v_heads))):
        if size < 1:
            raise InputError(f"{name} must be at least 1, got q of shape {_shape(q)}")
    check_heads(q, k, v)
    H = max(q_heads, v_heads)
    check_sizes(K, V, H)
    if T > MAX_TOKENS:
        raise InputError(f"T must be below 2^31 - 65536, got {T}")
    if q.dtype not in DTYPES:
        raise InputTypeError(f"q must be {_SUPPORTED}, got {q.dtype}")
    want_dtype("k", k, (q.dtype,), "as q")
    want_dtype("v", v, (q.dtype,), "as q")
    packed = check_cu(cu_seqlens, q)
    return _Sizes(B, T, H, K, V, DTYPES[q.dtype], packed, q_heads, k_heads, v_heads)


def same_device(q: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != q.device:
            raise InputTypeError(
                f"{name} is on {tensor.device}, q is on {q.device}",
                hint=f"move it: {name}.to(q.device)",
            )


def check_state(state: Tensor | None, wanted: tuple[int, int, int, int]) -> None:
    """Refuse an initial state that is not ``[N, Hs, K, V]``, as ``wanted``, in fp32.

    Raises:
        InputError: its shape is wrong.
        InputTypeError: it is no tensor, or of another dtype.
    """
    if state is None:
        return
    want_tensor("initial_state", state)
    want_rank("initial_state", state, "[N, Hs, K, V]")
    want_shape("initial_state", state, "[N, Hs, K, V]", wanted)
    want_dtype("initial_state", state, (torch.float32,), "states are fp32 or bf16")


def check_vector(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None = None,
    precision: str = "ieee",
) -> Problem:
    """Validate the arguments of ``chunk_gla``."""
    sizes = _check_qkv(q, k, v, cu_seqlens)
    want_tensor("g", g)
    want_rank("g", g, "[B, T, H, K]")
    want_shape("g", g, "[B, T, Hs, K]", (sizes.B, sizes.T, sizes.state_heads, sizes.K))
    want_dtype("g", g, tuple({q.dtype: 0, torch.float32: 0}), "q's dtype or float32")
    check_state(initial_state, sizes.state_shape)
    same_device(q, k=k, v=v, g=g, initial_state=initial_state, cu_seqlens=cu_seqlens)
    return sizes.problem(Gate.VECTOR, DTYPES[g.dtype], 0, check_precision(precision, q.dtype))


def check_lowrank(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None = None,
    precision: str = "ieee",
) -> Problem:
    """Validate the arguments of ``chunk_gla_lowrank``."""
    sizes = _check_qkv(q, k, v, cu_seqlens)
    want_tensor("x", x)
    want_rank("x", x, "[B, T, R]")
    rank = x.shape[2]
    if rank not in LOWRANK_RANKS:
        raise InputError(
            f"x must be [B, T, R] with R one of {LOWRANK_RANKS}, got shape {_shape(x)}",
            hint="compute the gate yourself and call chunk_gla for other ranks",
        )
    channels = sizes.state_heads * sizes.K
    want_shape("x", x, "[B, T, R]", (sizes.B, sizes.T, rank))
    want_tensor("weight", weight)
    want_rank("weight", weight, "[Hs*K, R]")
    want_shape("weight", weight, "[Hs*K, R]", (channels, rank))
    want_dtype("x", x, (q.dtype,), "as q")
    want_dtype("weight", weight, (q.dtype,), "as q")
    gate_dtype = sizes.dtype
    if bias is not None:
        want_tensor("bias", bias)
        want_rank("bias", bias, "[Hs*K]")
        want_shape("bias", bias, "[Hs*K]", (channels,))
        want_dtype("bias", bias, tuple({q.dtype: 0, torch.float32: 0}), "q's dtype or float32")
        gate_dtype = DTYPES[bias.dtype]
    check_state(initial_state, sizes.state_shape)
    same_device(
        q,
        k=k,
        v=v,
        x=x,
        weight=weight,
        bias=bias,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
    return sizes.problem(Gate.LOWRANK, gate_dtype, rank, check_precision(precision, q.dtype))


def check_boundaries(cu_seqlens: Tensor, T: int) -> None:
    """Checks the values of ``cu_seqlens``; on a GPU tensor this synchronises.

    Raises:
        InputError: they do not begin with 0, decrease, or do not end with T.
    """
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise InputError(f"cu_seqlens must begin with 0, got {values[0]} at position 0")
    for at, (before, here) in enumerate(itertools.pairwise(values), 1):
        if here < before:
            raise InputError(
                f"cu_seqlens must not decrease, got {here} after {before} at position {at}"
            )
    if values[-1] != T:
        raise InputError(
            f"cu_seqlens must end with the number of tokens, T = {T}, "
            f"got {values[-1]} at position {len(values) - 1}"
        )


def check_gate_values(g: Tensor) -> None:
    """Checked mode: every gate is a log-decay (``<= 0``) and none is NaN. Synchronises."""
    bad = ~(g <= 0)
    if bool(bad.any()):
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise InputError(
            f"g must be <= 0 (natural log of a decay), got {float(g[where])} at {where}",
            hint="pass logsigmoid(...) or -softplus(...), not the decay itself",
        )
