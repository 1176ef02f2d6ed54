"""What is asked of the device, done at once or, as a stream of CUDA does, captured to be done later, several times.

Captured work knows arrays by their addresses alone and keeps no memory. Where CUDA would read what another array has
since been given, a StreamError says so; and where it would refuse to wait for the host while it captures.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np


class StreamError(RuntimeError):
    """What cannot be captured, or played."""


class Stream:
    def __init__(self) -> None:
        self.noted: list[Callable[[], None]] | None = None

    def do(self, work: Callable[..., None], *args: Any) -> None:
        if self.noted is None:
            work(*args)
        else:
            self.noted.append(functools.partial(_play, work, [_noted(x) for x in args]))

    def refuse(self, what: str) -> None:
        """For what needs the host: a StreamError while work is captured."""
        if self.noted is not None:
            raise StreamError(f"{what} while a stream is captured")

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Returns what does the work that run() asks for."""
        self.refuse("a capture")
        noted = self.noted = []
        try:
            run()
        finally:
            self.noted = None

        def play() -> None:
            for each in noted:
                each()

        return play


class _Place:
    """Where an array lies."""

    def __init__(self, array: np.ndarray) -> None:
        memory = array
        while isinstance(memory.base, np.ndarray):
            memory = memory.base
        self.memory, self.offset = weakref.ref(memory), array.ctypes.data - memory.ctypes.data
        self.type, self.shape, self.dtype, self.strides = type(array), array.shape, array.dtype, array.strides

    def array(self) -> np.ndarray:
        memory = self.memory()
        if memory is None:
            raise StreamError(f"captured work reads or writes memory that was freed, of an array {self.shape}")
        return self.type(self.shape, self.dtype, memory, self.offset, self.strides)


def _noted(value: Any) -> Any:
    return _Place(value) if isinstance(value, np.ndarray) else value


def _play(work: Callable[..., None], args: list[Any]) -> None:
    work(*(x.array() if isinstance(x, _Place) else x for x in args))


stream = Stream()
