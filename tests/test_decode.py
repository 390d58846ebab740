"""Decoding on the CPU: semantics, checks, operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glac import decode_ops
from glac.attention import chunk_gla, recurrent_gla, recurrent_gla_lowrank
from glac.errors import InputError, InputTypeError, NotDifferentiableError
from glac.reference import lowrank_gate
from glac.testing import make_inputs

FP32 = torch.float32


def drawn(T: int = 3, **options: Any) -> Any:
    return make_inputs(2, T, 4, 16, 24, dtype=FP32, initial_state=True, **options)


def test_equals_the_chunk_form() -> None:
    x = drawn(7)
    o, state = recurrent_gla(
        x.q, x.k, x.v, x.g, initial_state=x.initial_state, output_final_state=True
    )
    wanted, end = chunk_gla(
        x.q, x.k, x.v, x.g, initial_state=x.initial_state, output_final_state=True
    )
    torch.testing.assert_close(o, wanted)
    torch.testing.assert_close(state, end)


def test_one_token_after_the_other_in_a_pool() -> None:
    x = drawn(5)
    o, end = recurrent_gla(
        x.q, x.k, x.v, x.g, initial_state=x.initial_state, output_final_state=True
    )
    assert x.initial_state is not None
    assert end is not None
    pool = torch.full((6, 4, 16, 24), 7.0)
    slots = torch.tensor([4, 1])
    pool[slots] = x.initial_state
    for t in range(5):
        step = (tensor[:, t : t + 1] for tensor in (x.q, x.k, x.v, x.g))
        piece, same = recurrent_gla(*step, initial_state=pool, state_indices=slots, inplace=True)
        assert same is pool
        torch.testing.assert_close(piece, o[:, t : t + 1])
    torch.testing.assert_close(pool[slots], end)
    assert bool((pool[[0, 2, 3, 5]] == 7.0).all())


def test_inactive_sequences_are_left_alone() -> None:
    x = drawn(1)
    pool = torch.randn(3, 4, 16, 24)
    before = pool.clone()
    slots = torch.tensor([-1, 2], dtype=torch.int32)
    o, _ = recurrent_gla(x.q, x.k, x.v, x.g, initial_state=pool, state_indices=slots, inplace=True)
    assert not bool(o[0].any())
    assert torch.equal(pool[:2], before[:2])
    assert not torch.equal(pool[2], before[2])


def test_states_after_each_token() -> None:
    x = drawn(4)
    _, states = recurrent_gla(
        x.q, x.k, x.v, x.g, initial_state=x.initial_state, output_states=True
    )
    assert states is not None
    assert states.shape == (2, 4, 4, 16, 24)
    for n in range(1, 5):
        piece = (tensor[:, :n] for tensor in (x.q, x.k, x.v, x.g))
        _, end = recurrent_gla(*piece, initial_state=x.initial_state, output_final_state=True)
        torch.testing.assert_close(states[:, n - 1], end)


@pytest.mark.parametrize("shape", [(2, 3, 4), (4,), None])
def test_gates_with_fewer_dimensions(shape: tuple[int, ...] | None) -> None:
    x = drawn(3)
    g = None if shape is None else -torch.rand(shape)
    dense = torch.zeros(2, 3, 4, 1) if g is None else g.expand(2, 3, 4)[..., None]
    o, _ = recurrent_gla(x.q, x.k, x.v, g, initial_state=x.initial_state)
    wanted, _ = recurrent_gla(
        x.q, x.k, x.v, dense.expand(2, 3, 4, 16), initial_state=x.initial_state
    )
    torch.testing.assert_close(o, wanted)


def test_the_lowrank_gate() -> None:
    x = drawn(3, gate="lowrank")
    o, _ = recurrent_gla_lowrank(x.q, x.k, x.v, x.x, x.weight, x.bias, clamp_min=-0.01)
    g = lowrank_gate(x.x, x.weight, x.bias, num_heads=4, clamp_min=-0.01)
    wanted, _ = recurrent_gla(x.q, x.k, x.v, g)
    torch.testing.assert_close(o, wanted)


def test_head_groups() -> None:
    x = drawn(3)
    q = torch.randn(2, 3, 8, 16)
    k = torch.randn(2, 3, 2, 16)
    o, _ = recurrent_gla(q, k, x.v, x.g)
    assert o.shape == (2, 3, 8, 24)
    wanted, _ = recurrent_gla(
        q,
        k.repeat_interleave(4, 2),
        x.v.repeat_interleave(2, 2),
        x.g.repeat_interleave(2, 2),
    )
    torch.testing.assert_close(o, wanted)


def test_packed_sequences() -> None:
    x = make_inputs(1, 6, 2, 16, 16, dtype=FP32)
    state = torch.randn(3, 2, 16, 16)
    cu = torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    o, end = recurrent_gla(
        x.q, x.k, x.v, x.g, initial_state=state, cu_seqlens=cu, output_final_state=True
    )
    assert end is not None
    assert torch.equal(end[1], state[1])
    assert x.g is not None
    for n, part in ((0, slice(0, 2)), (2, slice(2, 6))):
        piece = (x.q[:, part], x.k[:, part], x.v[:, part], x.g[:, part])
        wanted, last = recurrent_gla(
            *piece, initial_state=state[n : n + 1], output_final_state=True
        )
        torch.testing.assert_close(o[:, part], wanted)
        assert last is not None
        torch.testing.assert_close(end[n], last[0])


def test_states_stored_in_bf16() -> None:
    x = drawn(1)
    assert x.initial_state is not None
    narrow = x.initial_state.bfloat16()
    _, end = recurrent_gla(x.q, x.k, x.v, x.g, initial_state=narrow, output_final_state=True)
    assert end is not None
    assert end.dtype == torch.bfloat16
    _, wide = recurrent_gla(
        x.q, x.k, x.v, x.g, initial_state=narrow, output_final_state=True, state_dtype=FP32
    )
    assert wide is not None
    assert torch.equal(wide.bfloat16(), end)


def refused(kind: type[Exception], match: str, **changes: Any) -> None:
    x = drawn(1)
    call = {"q": x.q, "k": x.k, "v": x.v, "g": x.g, "initial_state": x.initial_state, **changes}
    with pytest.raises(kind, match=match):
        recurrent_gla(**call)


def test_what_is_refused() -> None:
    refused(InputError, "initial_state must be", initial_state=torch.zeros(2, 4, 16, 16))
    refused(
        InputTypeError, "initial_state must be", initial_state=torch.zeros(2, 4, 16, 24).half()
    )
    refused(InputError, "inplace=True needs initial_state", initial_state=None, inplace=True)
    refused(InputError, "state_indices needs", initial_state=None, state_indices=torch.zeros(2))
    refused(InputTypeError, "state_indices must be", state_indices=torch.zeros(2))
    refused(InputError, "state_indices must be", state_indices=torch.zeros(3, dtype=torch.int32))
    refused(InputError, "exclude each other", inplace=True, output_states=True)
    refused(InputError, "g must be", g=torch.zeros(2, 1))
    refused(InputError, "k must be .* with Hk a divisor", k=torch.zeros(2, 1, 3, 16))
    refused(InputError, "q must be .* with Hq a divisor", q=torch.zeros(2, 1, 3, 16))
    refused(InputTypeError, "k must be", k=torch.zeros(2, 1, 4, 16).half())
    refused(InputTypeError, "q must be a torch.Tensor", q=None)
    refused(InputTypeError, "state_dtype", state_dtype=torch.float16)
    refused(InputError, "cu_seqlens", cu_seqlens=torch.zeros(2, dtype=torch.int32))
    pool = torch.zeros(2, 4, 24, 16).transpose(2, 3)
    refused(InputError, "contiguous", initial_state=pool, inplace=True)


def test_checked_mode_reads_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLAC_CHECKED", "1")
    repeated = torch.tensor([1, 1])
    refused(InputError, r"state_indices\[1\] is 1, as is", state_indices=repeated, inplace=True)
    refused(InputError, r"state_indices\[1\] is 9, the pool", state_indices=torch.tensor([0, 9]))
    refused(InputError, "g must be <= 0", g=torch.ones(2, 1, 4, 16))
    x = drawn(1)
    recurrent_gla(  # two readers of a slot, and two inactive sequences, are fine
        x.q, x.k, x.v, x.g, initial_state=x.initial_state, state_indices=repeated
    )
    recurrent_gla(
        x.q, x.k, x.v, x.g, initial_state=x.initial_state, state_indices=-repeated, inplace=True
    )


def test_has_no_gradient() -> None:
    x = drawn(1)
    with pytest.raises(NotDifferentiableError):
        recurrent_gla(x.q.requires_grad_(), x.k, x.v, x.g)
    with torch.no_grad():
        recurrent_gla(x.q, x.k, x.v, x.g)


def test_the_operators() -> None:
    x = drawn(2)
    pool = torch.randn(3, 4, 16, 24)
    slots = torch.tensor([2, 0])
    inputs = (x.q, x.k, x.v, x.g, None, None, None, pool, slots, None)
    torch.library.opcheck(decode_ops.recurrent_gla, (*inputs, [0.25], True, False, FP32))
    torch.library.opcheck(decode_ops.recurrent_gla, (*inputs, [0.25], False, True, FP32))
    torch.library.opcheck(decode_ops.recurrent_gla_, (*inputs, [0.25]))


def test_compiles_with_the_state_in_place() -> None:
    x = drawn(1)
    pools = [torch.ones(3, 4, 16, 24) for _ in range(2)]
    slots = torch.tensor([2, 0])

    def step(q: Tensor, pool: Tensor) -> Tensor:
        o, _ = recurrent_gla(
            2 * q, x.k, x.v, x.g, initial_state=pool, state_indices=slots, inplace=True
        )
        return o + 1

    wanted = step(x.q, pools[0])
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x.q, pools[1]), wanted)
    torch.testing.assert_close(pools[1], pools[0])
