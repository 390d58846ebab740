"""Progress of long runs on stderr: a live line on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

_LIVE_SECONDS = 0.1
_PLAIN_SECONDS = 5.0


def duration(seconds: float) -> str:
    """``75`` as ``1m15s``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """Counts steps of one task after the other.

    Args:
        stream: where to; stderr if None.
        quiet: print notes only.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._live = self._stream.isatty()
        self._title, self._total, self._done = "", 0, 0
        self._begun = self._shown = 0.0
        self._fresh = 0
        self._open = False

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """Start a task of ``total`` steps, ``done`` of which an earlier run did."""
        self._title, self._total, self._done, self._fresh = title, total, done, 0
        self._begun, self._shown = time.monotonic(), 0.0
        if not self._live:
            earlier = f", {done} done before" if done else ""
            self._line(f"{title}: {total} to do{earlier}")

    def step(self, detail: str = "", count: int = 1) -> None:
        """``count`` steps are done; ``detail`` says how it looks."""
        self._done += count
        self._fresh += count
        now = time.monotonic()
        last = self._done >= self._total
        pause = _LIVE_SECONDS if self._live else _PLAIN_SECONDS
        if self._quiet or (now - self._shown < pause and not last):
            return
        self._shown = now
        left = (self._total - self._done) * (now - self._begun) / max(1, self._fresh)
        eta = "" if last else f", ETA {duration(left)}"
        took = f", {duration(now - self._begun)}" if last else ""
        text = f"{self._title}: {self._done}/{self._total}"
        text += f", {detail}" if detail else ""
        self._line(text + eta + took, keep=last)

    def note(self, text: str) -> None:
        """A line that stays, shown even when quiet."""
        self._end_live()
        print(text, file=self._stream, flush=True)

    def end(self) -> None:
        """Finish a live line that was left open."""
        self._end_live()

    def _line(self, text: str, keep: bool = True) -> None:
        if self._quiet:
            return
        if not self._live:
            print(text, file=self._stream, flush=True)
            return
        width = shutil.get_terminal_size().columns - 1
        end = "\n" if keep else ""
        print(f"\r{text[:width]:<{width}}", end=end, file=self._stream, flush=True)
        self._open = not keep

    def _end_live(self) -> None:
        if self._open:
            print(file=self._stream, flush=True)
            self._open = False
