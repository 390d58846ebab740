"""What every test shares: which tests this machine can run, and how property tests behave."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

try:
    import hypothesis
except ModuleNotFoundError:  # GPU machines may carry only what the kernels need
    pass
else:
    # The first call of a kernel compiles it, so a deadline per example would fail at random.
    hypothesis.settings.register_profile("glac", deadline=None)
    hypothesis.settings.register_profile(
        "glac-ci", deadline=None, derandomize=True, database=None, print_blob=True
    )
    hypothesis.settings.load_profile("glac-ci" if os.environ.get("CI") else "glac")


# A developer's own tuned files are none of the tests' business.
os.environ["GLAC_CONFIG_PATH"] = ""


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _skip(
    items: list[pytest.Item], marker: str, *, unless: Callable[[], bool], reason: str
) -> None:
    marked = [item for item in items if item.get_closest_marker(marker)]
    if marked and not unless():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU or the interpreter where there is none."""
    _skip(items, "gpu", unless=_has_gpu, reason="needs a CUDA device")
    _skip(items, "interpreter", unless=_interprets, reason="needs TRITON_INTERPRET=1")
