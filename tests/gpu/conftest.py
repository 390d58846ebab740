"""Kernels from packs on the GPU: what is served, inputs, the truth in fp64 and error budgets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from glac import dispatch
from glac.attention import chunk_gla, chunk_gla_lowrank
from glac.errors import KernelNotFoundError
from glac.pack import Pack, PackRow
from glac.problem import Op, Precision, Problem
from glac.reference import chunk_gla as reference_chunk_gla
from glac.reference import yardstick_chunk_gla
from glac.testing import Inputs, make_inputs
from glac.validate import check_lowrank, check_vector
from tests.gpu.rows import TF32_CEILING, rows_here
from tests.helpers_gradients import dense_gate

CEILING = {torch.bfloat16: 4e-3, torch.float16: 2e-3, torch.float32: 1e-5}
FEW = 512  # token-heads


def problem_of(x: Inputs) -> Problem:
    if x.g is not None:
        return check_vector(x.q, x.k, x.v, x.g, x.initial_state)
    assert x.x is not None
    assert x.weight is not None
    return check_lowrank(x.q, x.k, x.v, x.x, x.weight, x.bias, x.initial_state)


def truth(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output and final state in fp64 (tests/reference holds this form against the token loop)."""
    h0 = None if x.initial_state is None else x.initial_state.double()
    o, state = reference_chunk_gla(
        x.q.double(),
        x.k.double(),
        x.v.double(),
        dense_gate(x, torch.float64),
        initial_state=h0,
        output_final_state=True,
    )
    assert state is not None
    return o, state


def expected_size(x: Inputs) -> tuple[float, float]:
    """Norms that output and state have on average over signs: few elements may all cancel."""
    h0 = None if x.initial_state is None else x.initial_state.abs()
    g = dense_gate(x, torch.float64)
    y = replace(x, q=x.q.abs(), k=x.k.abs(), v=x.v.abs(), g=g, initial_state=h0)
    o, state = truth(y)
    _, tokens, _, keys = x.q.shape
    return float(o.norm()) / math.sqrt(keys * (tokens + 1)), float(state.norm()) / math.sqrt(
        tokens + 1
    )


@dataclass(frozen=True)
class Packed:
    """The public operations, with a skip where no pack serves the problem."""

    device: torch.device

    def need(self, problem: Problem, op: Op = Op.FORWARD) -> dispatch.Decision:
        """Skip the test unless a pack has kernels for an op of the problem."""
        try:
            decision = dispatch.explain(problem, self.device, op)
        except KernelNotFoundError:
            pytest.skip(
                f"no pack has a {op.value} kernel for {problem}; set GLAC_PACK_PATH "
                "(tests/gpu/README.md)"
            )
        assert decision.provider == "pack", decision
        return decision

    def draw(
        self, B: int, T: int, H: int, K: int, V: int, *, backward: bool = False, **options: Any
    ) -> Inputs:
        """Inputs of a problem that a pack serves, in bf16 unless ``dtype`` says otherwise."""
        options.setdefault("dtype", torch.bfloat16)
        x = make_inputs(B, T, H, K, V, device=self.device, **options)
        self.need(problem_of(x))
        if backward:
            self.need(problem_of(x), Op.BACKWARD)
        return x

    def rows(self, op: Op) -> list[tuple[Pack, PackRow]]:
        """The rows of an op in all packs, each config once; skips where there is none."""
        found = rows_here(op, self.device.index)
        if not found:
            pytest.skip(f"no pack has a {op.value} row; set GLAC_PACK_PATH (tests/gpu/README.md)")
        return found

    def call(self, x: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
        """Output and final state through the public operation."""
        options = {"initial_state": x.initial_state, "output_final_state": True, **options}
        if x.g is not None:
            o, state = chunk_gla(x.q, x.k, x.v, x.g, **options)
        else:
            assert x.x is not None
            assert x.weight is not None
            o, state = chunk_gla_lowrank(x.q, x.k, x.v, x.x, x.weight, x.bias, **options)
        assert state is not None
        return o, state

    def why_wrong(
        self,
        x: Inputs,
        got: tuple[Tensor, Tensor],
        precision: Precision = Precision.IEEE,
    ) -> str:
        """What is wrong with a result, empty if nothing is.

        The error may be twice that of the same arithmetic in PyTorch, and no more than the ceiling
        of the dtype. Where tokens are few the ceiling alone decides, and is higher, because both
        errors are then a matter of luck.
        """
        ceiling = TF32_CEILING if precision is Precision.TF32 else CEILING[x.q.dtype]
        wanted = truth(x)
        count = x.q.shape[:3].numel()
        if count < FEW:
            ceiling *= 1 + 4 / math.sqrt(count)
        budget = ceiling
        if x.q.dtype != torch.float32 and count >= FEW:
            measure, _ = yardstick_chunk_gla(
                x.q, x.k, x.v, dense_gate(x, torch.float32), initial_state=x.initial_state
            )
            error = (measure.double() - wanted[0]).norm() / wanted[0].norm()
            budget = min(ceiling, 2 * float(error))
        named = zip(("o", "state"), got, wanted, expected_size(x), (budget, ceiling), strict=True)
        for name, a, w, size, limit in named:
            if not bool(a.isfinite().all()):
                return f"{name} is not finite"
            scale = max(float(w.norm()), size)
            difference = float((a.double() - w).norm())
            if difference > limit * scale:
                return f"{name}: error {difference / scale:.2e}, budget {limit:.2e}"
        return ""

    def check(self, x: Inputs) -> None:
        reason = self.why_wrong(x, self.call(x))
        assert not reason, f"{problem_of(x)}: {reason}"


@pytest.fixture(scope="session")
def packed() -> Iterator[Packed]:
    """Packs only: a problem that none serves is skipped, never built here or run by PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLAC_REQUIRE_AOT", "1")
        dispatch.clear()
        yield Packed(torch.device("cuda", 0))
    dispatch.clear()
