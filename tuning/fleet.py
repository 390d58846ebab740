"""Several timing workers on one study, each a process of its own.

``glac tune --gpus all`` starts one for each GPU. A worker runs the whole study beside the others:
it takes a candidate, times it, takes the next, waits for what others hold, and knows everybody's
results in the end. So any of them may die; the rest goes on, and the parent, which runs the same
study last, finds everything done or finishes it.

    python -m glac.tuning.fleet < plan.json
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import glac
from glac.configs import Config, config_from_dict
from glac.problem import Op, Problem
from glac.tuning.progress import Progress
from glac.tuning.space import Space
from glac.tuning.worker import (
    CUDA_SESSION,
    WorkerEvaluator,
    end_with_parent,
    problem_from_dict,
    problem_to_dict,
)

RESTARTS = 3
"""Times a worker that died by itself is started again."""
_PATIENCE = 30.0


def space_to_dict(space: Space) -> dict[str, Any]:
    """JSON form of a space."""
    return {
        "problem": problem_to_dict(space.problem),
        "op": space.op.value,
        "default": space.default.to_dict(),
        "configs": [config.to_dict() for config in space.configs],
        "incumbent": space.incumbent.to_dict() if space.incumbent else None,
        "warm": space.warm,
    }


def space_from_dict(data: Mapping[str, Any], where: str) -> Space:
    """Read what ``space_to_dict`` wrote; the last two keys may be missing.

    Raises:
        ConfigError, StudyError, KeyError: it is something else.
    """
    op = Op(data["op"])

    def config(value: Any, name: str) -> Config:
        return config_from_dict(op, value, f"{where}.{name}")

    configs = tuple(config(c, "configs") for c in data["configs"])
    incumbent = data.get("incumbent")
    space = Space(
        problem_from_dict(data["problem"], where), config(data["default"], "default"), configs
    )
    return Space(
        space.problem,
        space.default,
        configs,
        config(incumbent, "incumbent") if incumbent else None,
        int(data.get("warm", space.warm)),
    )


@dataclass(frozen=True)
class Plan:
    """All that a worker needs to know, JSON-able.

    Attributes:
        spaces: what is studied.
        session: arguments of the session's factory; ``device`` is each worker's own.
        factory: of the session.
        storage: path or URL.
        study: further arguments of ``run_study``.
        missing: configs that cannot be measured, with the reason, for each space.
        timeout: seconds a candidate may take.
    """

    spaces: Sequence[Space]
    session: Mapping[str, Any]
    factory: str
    storage: str
    study: Mapping[str, Any]
    missing: Sequence[Mapping[str, str]]
    timeout: float

    def to_dict(self) -> dict[str, Any]:
        study = dict(self.study)
        study["key"] = {op.value: text for op, text in study.get("key", {}).items()}
        return {
            "spaces": [space_to_dict(space) for space in self.spaces],
            "session": dict(self.session),
            "factory": self.factory,
            "storage": self.storage,
            "study": study,
            "missing": [dict(reasons) for reasons in self.missing],
            "timeout": self.timeout,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        study = dict(data["study"])
        study["key"] = {Op(op): text for op, text in study["key"].items()}
        spaces = [space_from_dict(item, "plan") for item in data["spaces"]]
        return cls(
            spaces,
            data["session"],
            data["factory"],
            data["storage"],
            study,
            data["missing"],
            data["timeout"],
        )

    def why_missing(self, problem: Problem, config: Config) -> str | None:
        for space, reasons in zip(self.spaces, self.missing, strict=True):
            if (space.problem, space.op) == (problem, config.op):
                return reasons.get(config.slug)
        return None

    def evaluator(self, device: int) -> WorkerEvaluator:
        """The evaluator of the worker on a device."""
        session = dict(self.session)
        if self.factory == CUDA_SESSION:
            session["device"] = device
        return WorkerEvaluator(session, self.factory, self.timeout)

    def run(self, device: int, seed: int, progress: Progress) -> Any:
        """Run the study on a device, beside whoever else does; its report."""
        from glac.tuning.study import run_study

        study = {**self.study, "seed": self.study.get("seed", 0) + seed}
        return run_study(
            self.spaces,
            self.evaluator(device),
            self.storage,
            missing=self.why_missing,
            progress=progress,
            **study,
        )


def main() -> None:
    """A worker: reads the plan from standard input and runs it."""
    options = json.load(sys.stdin)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    if os.getppid() != options["parent"]:
        return  # it died before we looked
    report = Plan.from_dict(options["plan"]).run(
        options["device"], options["index"], Progress(quiet=True)
    )
    print(json.dumps({"held": report.held, "wall": report.wall}))
    sys.stdout.flush()
    # Interrupted or not: what there is lies in the storage.
    os._exit(130 if report.interrupted else 0)


@dataclass
class _Member:
    """The parent's side of a worker."""

    index: int
    device: int
    process: subprocess.Popen[str]
    errors: TextIO
    starts: int = 1


class Fleet:
    """Workers of one plan on this machine.

    Args:
        plan: what they do.
        devices: CUDA device of each worker.
        progress: told of workers that die.
        poll: called now and then while they work.
    """

    def __init__(
        self,
        plan: Plan,
        devices: Sequence[int],
        progress: Progress,
        poll: Callable[[], None] | None = None,
    ) -> None:
        self._plan, self._devices, self._progress = plan, devices, progress
        self._poll = poll
        self._members: list[_Member] = []

    def _start(self, index: int, device: int) -> tuple[subprocess.Popen[str], TextIO]:
        import tempfile

        root = str(Path(glac.__file__).resolve().parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed when the worker is done
        process = subprocess.Popen(
            [sys.executable, "-m", "glac.tuning.fleet"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C in the terminal is the parent's to hand on
        )
        assert process.stdin
        plan = {"plan": self._plan.to_dict(), "device": device, "index": index}
        with contextlib.suppress(OSError):  # it died at once: its exit status tells
            process.stdin.write(json.dumps({**plan, "parent": os.getpid()}))
            process.stdin.close()
        return process, errors

    def run(self) -> None:
        """Start the workers and wait until they are done.

        Raises:
            KeyboardInterrupt: after they have ended too.
        """
        try:
            for index, device in enumerate(self._devices):
                self._members.append(_Member(index, device, *self._start(index, device)))
            while sum(self._alive(member) for member in self._members):
                if self._poll:
                    self._poll()
                time.sleep(0.1)
        except BaseException:
            self._end(signal.SIGINT)
            raise
        finally:
            for member in self._members:
                member.errors.close()

    def _alive(self, member: _Member) -> bool:
        """Whether a worker still works; one that died by itself is started again."""
        code = member.process.poll()
        if code is None:
            return True
        if code in (0, 130) or member.starts > RESTARTS + 1:
            return False
        member.errors.seek(0)
        lines = member.errors.read().strip().splitlines()
        member.errors.close()
        last = f": {lines[-1][:200]}" if lines else ""
        again = member.starts <= RESTARTS
        self._progress.note(
            f"worker {member.index} on device {member.device} ended with status {code}{last}"
            f"{'; started again' if again else ''}"
        )
        member.starts += 1
        if not again:
            return False
        member.process, member.errors = self._start(member.index, member.device)
        return True

    def _end(self, how: signal.Signals) -> None:
        for member in self._members:
            with contextlib.suppress(OSError):
                member.process.send_signal(how)
        until = time.monotonic() + _PATIENCE
        for member in self._members:
            try:
                member.process.wait(timeout=max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                member.process.kill()
                member.process.wait()


if __name__ == "__main__":
    main()
