"""One line on stderr for work that takes longer than a second: loading, compiling, a long prompt."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from types import TracebackType
from typing import TextIO

PATIENCE = 1.0  # seconds before anything is said
INTERVAL = 0.1  # seconds between two redrawings

_CLEAR = "\r\x1b[K"


class Progress:
    """Reports on `with Progress("loading the model") as report: ...`, or `report(done, total)` from a callback.

    On a terminal the line is redrawn in place and erased at the end; elsewhere it is printed once. Work that is over
    within PATIENCE seconds says nothing. Calling it after `close` starts anew, so one object serves several prompts.
    """

    def __init__(self, label: str, unit: str = "", stream: TextIO | None = None):
        self.label, self.unit = label, unit
        self.stream = stream if stream is not None else sys.stderr
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._done, self._total = 0, 0
        self._shown, self._drawn_at = False, 0.0

    def __enter__(self) -> Progress:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        if self._timer is None:
            self.start()
        elif self._shown and time.monotonic() - self._drawn_at > INTERVAL:
            with self._lock:
                self._draw()

    def start(self) -> None:
        # A timer, because one long step (a compilation) would otherwise stay silent to its end.
        self._timer = threading.Timer(PATIENCE, self._show)
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        """Erases the line."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._shown and self._redraws():
                self._write(_CLEAR)
            self._shown, self._drawn_at = False, 0.0
            self._done, self._total = 0, 0

    def _show(self) -> None:
        with self._lock:
            if self._timer is threading.current_thread():
                self._shown = True
                self._draw()

    def _draw(self) -> None:
        if not self._redraws():
            if not self._drawn_at:
                self._write(f"minirt: {self.label} ...\n")
        elif self._total > 0:
            share = f"{100 * self._done // self._total:3d} %"
            self._write(f"{_CLEAR}{self.label} {share} ({self._done} of {self._total}{self.unit})")
        else:
            self._write(f"{_CLEAR}{self.label} ...")
        self._drawn_at = time.monotonic()

    def _redraws(self) -> bool:
        return self.stream is not None and not self.stream.closed and self.stream.isatty()

    def _write(self, text: str) -> None:
        if self.stream is None:  # as Python says that stderr was closed from the start
            return
        with contextlib.suppress(OSError, ValueError):  # closed since then: no reason to stop
            self.stream.write(text)
            self.stream.flush()


def duration(seconds: float) -> str:
    """As people say it: "2 h 5 min", "40 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
