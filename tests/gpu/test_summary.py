"""Summaries of segments that stop where the gate lets nothing through.

On a GPU, because a compiler may take the stop away, which changes no result: tokens that must
not be read are NaN here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from glac.configs import BackwardConfig, ChunksBackwardConfig, Config, ForwardConfig
from glac.pack import Pack, PackRow
from glac.problem import Op
from glac.testing import Inputs
from tests.gpu.conftest import Packed
from tests.gpu.rows import Tensors, row_inputs, run_backward_row, run_forward_row
from tests.helpers_gradients import ends_of

pytestmark = pytest.mark.gpu

SEGMENT, TOKENS = 2048, 3 * 2048
FAR = 256
"""Tokens at the far end of a segment. With these gates nothing is left of them after 223 more."""


def stops(config: Config) -> bool:
    if isinstance(config, ForwardConfig):
        return config.summary is not None and config.summary.stops
    if isinstance(config, BackwardConfig | ChunksBackwardConfig):
        return config.states is not None and config.states.stops
    return False


def stopping_rows(packed: Packed, op: Op) -> Iterator[tuple[Pack, PackRow]]:
    found = [(pack, row) for pack, row in packed.rows(op) if stops(row.config)]
    if not found:
        pytest.skip("no pack has a row whose summaries stop; set GLAC_PACK_PATH")
    for pack, row in found:
        assert isinstance(row.config, ForwardConfig | BackwardConfig | ChunksBackwardConfig)
        yield pack, replace(row, config=replace(row.config, segment=SEGMENT))


def fast_gates(row: PackRow, device: torch.device) -> Inputs:
    """Every channel decays by exp(-0.5) in each step."""
    x = row_inputs(row, 1, TOKENS, 2, device)
    if x.g is not None:
        return replace(x, g=torch.full_like(x.g, -0.5))
    assert x.weight is not None
    assert x.bias is not None
    return replace(x, weight=torch.zeros_like(x.weight), bias=torch.full_like(x.bias, -8.0))


def assert_same(got: Tensors, wanted: Tensors, tokens: slice, name: str) -> None:
    for key, value in wanted.items():
        if key in ("o", "dq", "dk", "dv", "dg", "dx"):
            assert torch.equal(got[key][:, tokens], value[:, tokens]), f"{name}: {key}"


def test_forward(packed: Packed) -> None:
    for pack, row in stopping_rows(packed, Op.FORWARD):
        x = fast_gates(row, packed.device)
        wanted = run_forward_row(pack, row, x)
        v = x.v.clone()
        v[:, :FAR] = torch.nan
        got = run_forward_row(pack, row, replace(x, v=v))
        assert bool(got["o"][:, :FAR].isnan().any())
        name = f"{row.spec.slug} {row.config.slug}"
        assert_same(got, wanted, slice(SEGMENT, TOKENS), name)
        assert torch.equal(got["state"], wanted["state"]), name


def test_backward(packed: Packed) -> None:
    for pack, row in stopping_rows(packed, Op.BACKWARD):
        x = fast_gates(row, packed.device)
        do, dht = ends_of(x)
        wanted = run_backward_row(pack, row, x, do, dht)
        name = f"{row.spec.slug} {row.config.slug}"
        v, late = x.v.clone(), do.clone()
        v[:, :FAR] = torch.nan
        got = run_backward_row(pack, row, replace(x, v=v), do, dht)
        assert_same(got, wanted, slice(SEGMENT, TOKENS), name)
        late[:, 2 * SEGMENT - FAR : 2 * SEGMENT] = torch.nan
        got = run_backward_row(pack, row, x, late, dht)
        assert_same(got, wanted, slice(0, SEGMENT), name)
