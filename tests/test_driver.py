"""Loading kernels through the CUDA driver, seen by a driver that only takes notes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from glac import driver
from glac.driver import DriverKernel
from glac.errors import PackError

KINDS = ("*io", "*fp32", "i32")
SIZES = (8, 8, 4, 8, 8)


class Driver:
    """Tells a kernel's parameters only to a thread that has a context, as the real one does."""

    def __init__(self, context: int) -> None:
        self.context = context
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            answer = vars(Driver).get(f"_{name}")
            return answer(self, *arguments) if answer else 0

        return call

    def _cuCtxGetCurrent(self, context: Any) -> int:
        context._obj.value = self.context
        return 0

    def _cuCtxSetCurrent(self, context: Any) -> int:
        self.context = 1
        return 0

    def _cuKernelGetParamInfo(self, kernel: Any, index: Any, offset: Any, size: Any) -> int:
        if not self.context or index.value >= len(SIZES):
            return 1
        size._obj.value = SIZES[index.value]
        return 0


def load(monkeypatch: pytest.MonkeyPatch, context: int, kinds: tuple[str, ...] = KINDS) -> Driver:
    library = Driver(context)
    monkeypatch.setattr(driver, "_library", lambda: library)
    monkeypatch.setattr(driver, "_launcher", lambda: ctypes.c_void_p())
    DriverKernel("kernel", b"code", "kernel", kinds, 4, 1024, 0, 0)
    return library


def test_a_thread_without_a_context_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first backward pass of a process loads its kernels in a thread of autograd."""
    calls = load(monkeypatch, 0).calls
    assert calls.index("cuCtxSetCurrent") < calls.index("cuLibraryLoadData")


def test_a_context_that_is_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cuCtxSetCurrent" not in load(monkeypatch, 1).calls


def test_other_parameters_than_the_manifest_says(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PackError, match=r"takes parameters of \[8, 8, 4, 8, 8\] bytes"):
        load(monkeypatch, 1, ("*io", "i32", "i32"))
