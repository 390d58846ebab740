"""The process that touches the GPU, and the parent's side of it.

A candidate may crash its process (an illegal access makes the CUDA context useless) or never come
back. So candidates run in a long-lived worker; the parent sends it one JSON line per request, ends
it when it does not answer in time, starts a new one when it has died, and goes on.

    -> {"id": 3, "do": "evaluate", "op": "forward", "config": {...}, "best_us": 212.4}
    <- {"id": 3, "value": {"status": "ok", "us": 208.1, ...}}

The worker imports torch; this module does not until it is the worker.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import glac
from glac.configs import Config, config_from_dict
from glac.errors import GlacError, StudyError
from glac.problem import Op, Problem, Specialisation
from glac.tuning.evaluate import (
    CRASHED,
    DEADLY,
    ERROR,
    HUNG,
    OUT_OF_MEMORY,
    Device,
    Effort,
    Outcome,
    Yardstick,
    failure_status,
)

CUDA_SESSION = "glac.tuning.worker:cuda_session"
"""Factory of the session that measures on a CUDA device."""
_MAX_LINE = 1 << 24
_STARTS = 3
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)
"""No kernel ends its process so: somebody did, or the kernel of a machine without memory left."""
_REASON = 300


class Session(Protocol):
    """What a worker does; made by a factory from JSON-able arguments."""

    def device(self) -> Device: ...

    def prepare(self, problem: Problem, op: Op) -> Yardstick: ...

    def evaluate(self, config: Config, best_us: float | None) -> Outcome: ...

    def compare(self, configs: Sequence[Config], rounds: int) -> list[list[float]]: ...

    def healthy(self) -> bool:
        """Whether the device still works after an error."""
        ...


def problem_to_dict(problem: Problem) -> dict[str, Any]:
    """JSON form of a problem."""
    return {"spec": problem.spec.to_dict(), "B": problem.B, "T": problem.T, "H": problem.H}


def problem_from_dict(data: Mapping[str, Any], where: str = "problem") -> Problem:
    """Read what ``problem_to_dict`` wrote.

    Raises:
        StudyError: it is something else.
    """
    try:
        sizes = [int(data[key]) for key in ("B", "T", "H")]
        return Problem(Specialisation.from_dict(data["spec"], f"{where}.spec"), *sizes)
    except (KeyError, TypeError, ValueError) as error:
        raise StudyError(f"{where}: not a problem ({error})") from None


# The worker's side.


class CudaSession:
    """Measures on a CUDA device with kernels from a pack."""

    def __init__(self, pack: str, device: int, effort: Mapping[str, Any], seed: int) -> None:
        import torch

        from glac.pack import read_pack

        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest")  # the yardstick's fp32 must not be TF32
        self._torch = torch
        self._pack = read_pack(pack)
        self._index = device
        self._effort = Effort(**effort)
        self._seed = seed
        self._checker: Any = None
        self._clock: Any = None

    def device(self) -> Device:
        props = self._torch.cuda.get_device_properties(self._index)
        return Device(str(props.name), driver_branch(), str(self._torch.__version__))

    def _load(self, spec: Specialisation, config: Config) -> dict[str, Any]:
        from glac.kernelspec import config_kernels
        from glac.launch import load_from_pack

        kernels = config_kernels(spec, config, self._pack.arch)
        return {k.template: load_from_pack(self._pack, k.name, self._index) for k in kernels}

    def prepare(self, problem: Problem, op: Op) -> Yardstick:
        from glac.tuning.checks import Checker
        from glac.tuning.clocks import ClockReader
        from glac.tuning.timing import CudaStopwatch

        self._checker = None
        self._torch.cuda.empty_cache()
        if self._clock is None:
            uuid = getattr(self._torch.cuda.get_device_properties(self._index), "uuid", "")
            self._clock = ClockReader(str(uuid))
        self._checker = Checker(
            problem,
            self._torch.device("cuda", self._index),
            self._load,
            CudaStopwatch(self._index),
            self._effort,
            self._seed,
            op,
            self._clock.read,
        )
        yardstick: Yardstick = self._checker.yardstick
        return yardstick

    def evaluate(self, config: Config, best_us: float | None) -> Outcome:
        with self._torch.no_grad():
            outcome: Outcome = self._checker.evaluate(config, best_us)
        return outcome

    def compare(self, configs: Sequence[Config], rounds: int) -> list[list[float]]:
        with self._torch.no_grad():
            times: list[list[float]] = self._checker.compare(configs, rounds)
        return times

    def healthy(self) -> bool:
        try:
            self._torch.cuda.synchronize()
            self._torch.zeros(1, device=self._torch.device("cuda", self._index)).item()
            self._torch.cuda.empty_cache()
        except Exception:  # whatever the broken context raises
            return False
        return True


def cuda_session(**arguments: Any) -> CudaSession:
    """A session on a CUDA device."""
    return CudaSession(**arguments)


def driver_branch() -> str:
    """Version of the NVIDIA driver, or the CUDA version it supports where that is all there is."""
    with contextlib.suppress(OSError):
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
        found = [w for w in words if w.count(".") >= 1 and w.replace(".", "").isdigit()]
        if found:
            return found[0]
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        return done.stdout.split()[0]
    with contextlib.suppress(GlacError):
        from glac.driver import driver_version

        return "CUDA {}.{}".format(*driver_version())
    return "unknown"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(getattr(error, "message", error)).split())
    return f"{type(error).__name__}: {text}"[:_REASON]


def _answer(session: Session, request: Mapping[str, Any]) -> tuple[Any, bool]:
    """The value for a request, and whether the worker must end after it."""
    what = request["do"]
    if what == "device":
        return asdict(session.device()), False
    op = Op(request["op"])
    if what == "prepare":
        return asdict(session.prepare(problem_from_dict(request["problem"]), op)), False
    if what == "compare":
        configs = [config_from_dict(op, c) for c in request["configs"]]
        return session.compare(configs, int(request["rounds"])), False
    config = config_from_dict(op, request["config"])
    try:
        return session.evaluate(config, request["best_us"]).to_dict(), False
    except Exception as error:
        healthy = session.healthy()
        reason = _one_line(error)
        status = failure_status(reason, ERROR if healthy else CRASHED)
        return Outcome(status, reason=reason).to_dict(), not healthy


def end_with_parent(parent: int) -> None:
    """End when the parent is gone, even in the middle of a kernel that never ends."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve requests from standard input until it closes."""
    parser = argparse.ArgumentParser(prog="glac.tuning.worker")
    parser.add_argument("factory")
    parser.add_argument("arguments")
    options = parser.parse_args(argv)
    # Replies go to a private copy of stdout; whatever else prints goes to stderr.
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()

    def reply(message: Mapping[str, Any]) -> None:
        replies.write(json.dumps(message).encode() + b"\n")

    session: Session | None = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            if session is None:
                module, _, name = options.factory.partition(":")
                factory = getattr(importlib.import_module(module), name)
                session = factory(**json.loads(options.arguments))
            value, last = _answer(session, request)
        except Exception as error:
            reply({"id": request["id"], "error": _one_line(error)})
            continue
        reply({"id": request["id"], "value": value})
        if last:
            os._exit(1)
    os._exit(0)  # tearing down a CUDA context can take seconds and tells nobody anything


# The parent's side.


class _Died(Exception):
    pass


class _Hung(Exception):
    pass


class _Refused(Exception):
    pass


class WorkerEvaluator:
    """An evaluator in a process of its own, replaced when it dies or hangs.

    Args:
        arguments: for the session's factory, JSON-able.
        factory: ``module:function`` that makes the session in the worker.
        timeout: seconds a candidate may take.
        start_timeout: seconds for starting, and for the inputs and truth of a problem.
        env: added to the environment of the worker.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        factory: str = CUDA_SESSION,
        timeout: float = 60.0,
        start_timeout: float = 300.0,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._arguments, self._factory = json.dumps(dict(arguments)), factory
        self._timeout, self._start_timeout = timeout, start_timeout
        self._env = dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: BinaryIO | None = None
        self._pending = b""
        self._id = 0
        self._prepared: tuple[Problem, Op] | None = None
        self._yardstick: Yardstick | None = None
        self._killed = self._aborted = False
        self.starts = 0

    def _start(self) -> None:
        roots = [str(Path(glac.__file__).resolve().parent.parent)]
        roots += [p for p in (self._env.get("PYTHONPATH"), os.environ.get("PYTHONPATH")) if p]
        env = {**os.environ, **self._env, "PYTHONPATH": os.pathsep.join(roots)}
        # A file, not a pipe: nobody has to read it for the worker to go on.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._pending = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "glac.tuning.worker", self._factory, self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=env,
            start_new_session=True,  # Ctrl-C in the terminal is the parent's to handle
        )

    def _stop(self) -> int | None:
        """End the worker at once; its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            return process.wait(timeout=30)
        except subprocess.TimeoutExpired:  # stuck in the driver: nothing more can be done
            return None

    def _last_words(self, process: subprocess.Popen[bytes]) -> str:
        """How the worker ended: signal or exit status, and the end of what it wrote."""
        try:
            code = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            how = "closed its output"
        else:
            how = f"exit status {code}"
            if code < 0:
                known = {s.value: s.name for s in signal.Signals}
                how = f"died of {known.get(-code, f'signal {-code}')}"
                if code in _FROM_OUTSIDE:
                    self._killed = True
        text = ""
        if self._stderr:
            with contextlib.suppress(OSError, ValueError):
                self._stderr.seek(0, os.SEEK_END)
                self._stderr.seek(max(0, self._stderr.tell() - 4096))
                lines = self._stderr.read().decode(errors="replace").strip().splitlines()
                text = lines[-1].strip() if lines else ""
        return f"worker {how}{f': {text}' if text else ''}"[:_REASON]

    def _read_line(self, process: subprocess.Popen[bytes], deadline: float) -> bytes:
        assert process.stdout
        handle = process.stdout.fileno()
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([handle], [], [], left)[0]:
                raise _Hung
            data = os.read(handle, 1 << 16)
            if not data:
                raise _Died(self._last_words(process))
            self._pending += data
            if len(self._pending) > _MAX_LINE:
                raise _Died("worker answered with an endless line")
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _ask(self, timeout: float, do: str, **fields: Any) -> Any:
        """One request and its answer.

        Raises:
            _Died, _Hung: the worker is no more, or was ended because it did not answer.
            _Refused: it answered that it cannot.
        """
        if self._process is None:
            self._start()
        process = self._process
        assert process
        assert process.stdin
        self._id += 1
        try:
            message = json.dumps({"id": self._id, "do": do, **fields}).encode() + b"\n"
            try:
                process.stdin.write(message)
                process.stdin.flush()
            except OSError:
                raise _Died(self._last_words(process)) from None
            line = self._read_line(process, time.monotonic() + timeout)
            try:
                answer = json.loads(line)
                if answer["id"] != self._id:
                    raise ValueError("an answer to another question")
                if "error" not in answer:
                    return answer["value"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise _Died(f"worker answered nonsense ({error}): {line[:80]!r}") from None
        except BaseException:
            self._stop()
            raise
        raise _Refused(str(answer["error"]))

    def _ready(self) -> None:
        """A worker that knows the problem.

        Raises:
            StudyError: it cannot be started, or the problem cannot be prepared.
        """
        if self._process is not None:
            return
        reason = ""
        for _ in range(_STARTS):
            try:
                self._ask(self._start_timeout, "device")
                if self._prepared is not None:
                    self._prepare(*self._prepared)
                return
            except _Refused as error:
                reason = str(error)
                break
            except _Died as error:
                reason = str(error)
            except _Hung:
                reason = f"no answer in {self._start_timeout:g} s"
            finally:
                self.starts += 1
        self._stop()
        raise StudyError(f"the measuring process cannot be started: {reason}")

    def _prepare(self, problem: Problem, op: Op) -> Yardstick:
        value = self._ask(
            self._start_timeout, "prepare", op=op.value, problem=problem_to_dict(problem)
        )
        try:
            return Yardstick(float(value["error"]))
        except (TypeError, KeyError, ValueError):
            self._stop()
            raise _Died("worker answered nonsense") from None

    def device(self) -> Device:
        """Where the worker measures.

        Raises:
            StudyError: no worker can be started.
        """
        self._ready()
        try:
            return Device(**self._ask(self._start_timeout, "device"))
        except (_Died, _Hung, _Refused, TypeError) as error:
            raise StudyError(f"the measuring process does not answer: {error}") from None

    def prepare(self, problem: Problem, op: Op) -> Yardstick:
        """Inputs and truth of an op of ``problem``.

        Raises:
            StudyError: it cannot be prepared.
        """
        self._prepared = None
        self._ready()
        try:
            self._yardstick = self._prepare(problem, op)
        except _Hung:
            raise StudyError(
                f"{problem}: inputs and truth not ready in {self._start_timeout:g} s"
            ) from None
        except (_Died, _Refused) as error:
            raise StudyError(f"{problem}: cannot be prepared: {error}") from None
        self._prepared = (problem, op)
        return self._yardstick

    def evaluate(self, config: Config, best_us: float | None) -> Outcome:
        """What becomes of a candidate; a dead or hung worker is an outcome too.

        A worker that was killed from outside says nothing about the candidate, which is tried
        again; if that goes on, the machine is out of memory.

        Raises:
            StudyError: the worker cannot be started again.
        """
        for _ in range(_STARTS):
            self._killed = False
            outcome = self._evaluate(config, best_us)
            if not self._killed or self._aborted:
                return outcome
        return Outcome(OUT_OF_MEMORY, reason=f"{_STARTS} times: {outcome.reason}"[:_REASON])

    def _evaluate(self, config: Config, best_us: float | None) -> Outcome:
        self._ready()
        try:
            value = self._ask(
                self._timeout,
                "evaluate",
                op=config.op.value,
                config=config.to_dict(),
                best_us=best_us,
            )
        except _Hung:
            return Outcome(HUNG, reason=f"no answer in {self._timeout:g} s")
        except _Died as error:
            return Outcome(failure_status(str(error), CRASHED), reason=str(error))
        except _Refused as error:
            return Outcome(ERROR, reason=str(error))
        try:
            outcome = Outcome.from_dict(value)
        except ValueError as error:
            self._stop()
            return Outcome(CRASHED, reason=f"worker answered nonsense: {error}"[:_REASON])
        if outcome.status in DEADLY:
            self._stop()
        return outcome

    def compare(self, configs: Sequence[Config], rounds: int) -> list[list[float]]:
        """Interleaved times; empty lists when the worker dies of it twice."""
        for _ in range(2):
            self._ready()
            with contextlib.suppress(_Died, _Hung, _Refused, TypeError, ValueError):
                value = self._ask(
                    self._timeout * (1 + len(configs)),
                    "compare",
                    op=configs[0].op.value,
                    configs=[c.to_dict() for c in configs],
                    rounds=rounds,
                )
                times = [[float(us) for us in row] for row in value]
                if len(times) == len(configs):
                    return times
        return [[] for _ in configs]

    def abort(self) -> None:
        """End the worker in the middle of what another thread asked of it."""
        self._aborted = True
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the worker."""
        self._stop()
        if self._stderr:
            self._stderr.close()
            self._stderr = None


if __name__ == "__main__":
    main()
