"""A process that compiles kernels for ``glac.compile.compile_many``.

The compiler's front end is Python and holds the interpreter lock, so two threads of one process
compile hardly faster than one (2.4 s a kernel; two processes on two cores: 1.1 s). And a compiler
that crashes takes only its worker along. One JSON line per kernel in, one line back:

    -> {"kernel": {...}, "ptxas": "/path/to/ptxas"}
    <- {"compiled": {"cubin": "<base64>", "symbol": ...}}   or   {"error": ..., "hint": ...}
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from glac.compile import CompiledKernel, Toolchain, compile_kernel
from glac.errors import CompileError, GlacError
from glac.kernelspec import KernelSpec

TIMEOUT = 300.0
"""Seconds for one kernel; the slowest of all candidates so far took 14."""
_TRIES = 3


def _serve() -> None:
    # Replies go to a private copy of stdout; whatever the compiler prints goes to stderr.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        kernel = KernelSpec.from_dict(request["kernel"])
        tools = Toolchain(request["triton"], request["ptxas"], Path(request["ptxas_path"]))
        answer: dict[str, Any]
        try:
            compiled = dataclasses.asdict(compile_kernel(kernel, tools, request["twin_arch"]))
            compiled.pop("kernel")
            for code in ("cubin", "twin"):
                compiled[code] = base64.b64encode(compiled[code]).decode()
            answer = {"compiled": compiled}
        except GlacError as error:
            answer = {"error": error.message, "hint": error.hint}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


class Worker:
    """The parent's side: one compile process, replaced when it dies."""

    def __init__(self, tools: Toolchain) -> None:
        self._tools = tools
        self._process: subprocess.Popen[str] | None = None

    def _start(self) -> subprocess.Popen[str]:
        root = str(Path(__file__).resolve().parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        return subprocess.Popen(
            [sys.executable, "-m", "glac.compile_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=root,  # "-m" looks into the current folder first, and that may hold another glac
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def compile(self, kernel: KernelSpec, twin_arch: str = "") -> CompiledKernel | GlacError:
        """Compile one kernel; what goes wrong is returned, a hanging compiler too.

        A process that was killed from outside says nothing about the kernel: it is tried again.
        """
        for _ in range(_TRIES):
            result, killed = self._compile(kernel, twin_arch)
            if not killed:
                break
        return result

    def _compile(
        self, kernel: KernelSpec, twin_arch: str
    ) -> tuple[CompiledKernel | GlacError, bool]:
        """The result, and whether the process was killed from outside."""
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        tools = self._tools
        request = {
            "kernel": kernel.to_dict(),
            "triton": tools.triton,
            "ptxas": tools.ptxas,
            "ptxas_path": str(tools.ptxas_path),
            "twin_arch": twin_arch,
        }
        watch = threading.Timer(TIMEOUT, process.kill)
        watch.daemon = True
        watch.start()
        started = time.monotonic()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        finally:
            watch.cancel()
        if not line:
            code = self.close()
            if time.monotonic() - started >= TIMEOUT:
                text = f"the compiler did not answer for {TIMEOUT:g} s on {kernel.name}"
                return CompileError(text), False
            text = f"the compiler died on {kernel.name} (exit status {code})"
            return CompileError(text), code in (-signal.SIGKILL, -signal.SIGTERM)
        answer = json.loads(line)
        if "error" in answer:
            return CompileError(answer["error"], hint=answer["hint"]), False
        compiled = answer["compiled"]
        for code_ in ("cubin", "twin"):
            compiled[code_] = base64.b64decode(compiled[code_])
        return CompiledKernel(kernel=kernel, **compiled), False

    def close(self) -> int | None:
        """End the process; its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            return process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


if __name__ == "__main__":
    _serve()
