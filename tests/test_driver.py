"""Loading kernels through the CUDA driver, seen by a driver that only takes notes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glac import driver
from glac.driver import DriverKernel
from glac.errors import PackError

ROOT = Path(__file__).resolve().parent.parent
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


def test_preloading_puts_code_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Driver(1)
    monkeypatch.setattr(driver, "_library", lambda: library)
    monkeypatch.setattr(driver, "_launcher", lambda: ctypes.c_void_p())
    kernel = DriverKernel("kernel", b"code", "kernel", KINDS, 4, 1024, 0, 0)
    assert "cuFuncLoad" not in library.calls
    kernel.load_now()
    assert library.calls[-2:] == ["cuKernelGetFunction", "cuFuncLoad"]


FORK = """
import ctypes, os, sys
sys.path.insert(0, sys.argv[1])
from glac import driver
from glac.errors import DriverError
from tests.test_driver import KINDS, Driver

driver._open_library.__wrapped__.__globals__["ctypes"].CDLL = lambda name: Driver(1)
driver._launcher = lambda: lambda *args: 0
kernel = driver.DriverKernel("kernel", b"code", "kernel", KINDS, 4, 1024, 0, 0)
kernel.launch([1, 2, 3], 1, 0)
if os.fork() == 0:
    for what in (
        lambda: kernel.launch([1, 2, 3], 1, 0),
        lambda: driver.DriverKernel("other", b"code", "kernel", KINDS, 4, 1024, 0, 0),
        kernel.load_now,
        driver.driver_version,
    ):
        try:
            what()
        except DriverError as error:
            print(error.message, "|", error.hint)
        else:
            print("went on")
    os._exit(0)
os.wait()
kernel.launch([1, 2, 3], 1, 0)
print("parent goes on")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_gets_an_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-u", "-c", FORK, str(ROOT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *child, parent = done.stdout.splitlines()
    assert parent == "parent goes on"
    assert len(child) == 4
    assert all("forked" in line and "spawn" in line for line in child)


def test_a_child_of_a_process_without_kernels_may_use_the_driver() -> None:
    code = (
        "import os, glac.driver as d\n"
        "if os.fork() == 0:\n"
        "    d.check_fork(); print('fine', flush=True); os._exit(0)\n"
        "os.wait()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "fine\n"
