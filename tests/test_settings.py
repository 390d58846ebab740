"""What glac reads from the environment."""

from __future__ import annotations

import pytest

from glac.backward import cut, windows
from glac.configs import default_backward
from glac.errors import ConfigError
from glac.gpus import gpu_by_name
from glac.problem import DType, Gate, Problem, Specialisation
from glac.settings import scratch_bytes

SPEC = Specialisation(128, 128, DType.BF16, Gate.VECTOR, DType.BF16)


def test_memory_for_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLAC_SCRATCH_MIB", raising=False)
    assert scratch_bytes() == 80 << 20
    problem = Problem(SPEC, 16, 2048, 8)
    config = default_backward(SPEC, gpu_by_name("h100"), problem.bucket)
    assert windows(problem, config)[0] == 3
    # 16 * 8 heads, 64 chunks of 32 tokens, 32 KiB each: 256 MiB.
    monkeypatch.setenv("GLAC_SCRATCH_MIB", "255")
    assert windows(problem, config)[0] == 3
    monkeypatch.setenv("GLAC_SCRATCH_MIB", " 256 ")
    assert windows(problem, config) == (1, 2048)
    packed = Problem(SPEC, 1, 32768, 8, packed=16)
    most = cut(packed, config).at_once
    monkeypatch.setenv("GLAC_SCRATCH_MIB", "0")
    assert windows(problem, config)[0] == 3
    assert cut(packed, config).at_once <= most


@pytest.mark.parametrize("value", ["-1", "1.5", "many", "1e3", "9" * 30, "٣"])
def test_memory_for_states_that_is_no_number(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLAC_SCRATCH_MIB", value)
    with pytest.raises(ConfigError, match="GLAC_SCRATCH_MIB must be a whole number"):
        scratch_bytes()
