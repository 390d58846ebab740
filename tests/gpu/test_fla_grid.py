"""The sizes and tolerances of flash-linear-attention's own GLA tests, with harder inputs.

Sizes and tolerances are those of its tests/ops/test_gla.py (version 0.6.0). Its inputs are all
positive, which hides cancellation, and its fp32 tests switch TF32 off; here queries, keys and
values have signs and kernels run as they are. The reference is fp64.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glac import fallback
from glac.attention import chunk_gla
from glac.gate import GateInput
from glac.problem import Op
from glac.reference import relative_rms
from glac.validate import check_vector

if TYPE_CHECKING:
    from tests.gpu.conftest import Packed

pytestmark = pytest.mark.gpu

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
OUTPUT, REST = 0.004, 0.005

DENSE = [
    (1, 63, 1, 64, 1, FP32),
    (2, 1024, 4, 60, 1, FP32),
    (2, 1024, 8, 128, 0.1, FP32),
    (2, 1024, 8, 128, 1, FP32),
    (2, 1024, 8, 128, 10, FP32),
    (4, 2048, 8, 64, 1, FP32),
    (1, 63, 1, 64, 1, FP16),
    (2, 1024, 4, 60, 1, FP16),
    (2, 1024, 8, 128, 0.1, FP16),
    (2, 1024, 8, 128, 1, FP16),
    (2, 1024, 8, 128, 10, FP16),
    (4, 2048, 8, 64, 1, FP16),
    (1, 128, 4, 256, 1, FP16),
    (1, 64, 2, 320, 1, FP16),
    (1, 128, 4, 512, 1, BF16),
]
PACKED = [
    (4, 64, (0, 15), FP32),
    (4, 64, (0, 256, 500, 1000), FP32),
    (4, 100, (0, 15, 100, 300, 1200, 2000), FP32),
    (4, 64, (0, 1, 100, 300, 1200, 2048), FP16),
    (4, 128, (0, 200, 512, 1200, 2048), FP16),
    (4, 64, (0, 15), FP16),
    (4, 64, (0, 0, 16), FP16),
    (4, 64, (0, 256, 500, 1000), FP16),
    (4, 100, (0, 15, 100, 300, 1200, 2000), FP16),
]


def check(
    packed: Packed,
    B: int,
    T: int,
    H: int,
    D: int,
    tau: float,
    dtype: torch.dtype,
    cu: Tensor | None,
) -> None:
    torch.manual_seed(42)
    device = packed.device
    sequences = B if cu is None else cu.shape[0] - 1
    q, k, v = (torch.randn(B, T, H, D, device=device).to(dtype) for _ in range(3))
    g = (F.logsigmoid(torch.randn(B, T, H, D, device=device)) / tau).to(dtype)
    h0 = torch.randn(sequences, H, D, D, device=device)
    problem = check_vector(q, k, v, g, h0, cu)
    for op in (Op.FORWARD, Op.BACKWARD):
        packed.need(problem, op)

    leaves = [t.requires_grad_() for t in (q, k, v, g, h0)]
    o, ht = chunk_gla(q, k, v, g, initial_state=h0, output_final_state=True, cu_seqlens=cu)
    assert ht is not None
    do, dht = torch.randn_like(o), torch.randn_like(ht)
    grads = torch.autograd.grad((o, ht), leaves, (do, dht))

    wide = [t.detach().double() for t in leaves]
    gate = GateInput((wide[3],))
    inputs = (problem, wide[0], wide[1], wide[2], gate, D**-0.5, wide[4])
    true_o, true_ht = fallback.forward(*inputs, True, 64, cu)
    dq, dk, dv, (dg,), dh0 = fallback.backward(*inputs, do.double(), dht.double(), 64, True, cu)
    assert true_ht is not None
    assert relative_rms(o.detach().double(), true_o) < OUTPUT
    assert relative_rms(ht.detach().double(), true_ht) < REST
    for name, grad, true in zip("qkvgh", grads, (dq, dk, dv, dg, dh0), strict=True):
        assert true is not None
        error = relative_rms(grad.double(), true)
        assert error < REST, f"d{name}: {error:.2e}"


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_dense(packed: Packed, case: tuple[int, int, int, int, float, torch.dtype]) -> None:
    check(packed, *case, None)


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed(packed: Packed, case: tuple[int, int, tuple[int, ...], torch.dtype]) -> None:
    H, D, bounds, dtype = case
    assert all(a <= b for a, b in itertools.pairwise(bounds))
    cu = torch.tensor(bounds, dtype=torch.int32, device=packed.device)
    check(packed, 1, bounds[-1], H, D, 1, dtype, cu)
