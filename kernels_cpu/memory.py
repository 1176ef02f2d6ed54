"""Memory that is quick to read: in huge pages where the system has them, because with small ones looking up addresses
costs as much time as reading does; from the beginning of a cache line, because what lies across two costs both."""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import Any

import numpy as np

PAGE = 2 << 20  # bytes of a huge page
CHUNK = 64 << 20  # what is asked for at once; pages that are never written cost nothing
LINE = 64  # bytes of a cache line


class Arena:
    """Hands out arrays one after the other; their memory is freed with the last of a chunk."""

    def __init__(self) -> None:
        self._chunk, self._used = np.empty(0, np.uint8), 0

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """uint8, at a cache line; its bytes are undefined."""
        size = int(np.prod(shape, dtype=np.int64))
        if self._used + size > len(self._chunk):
            self._chunk, self._used = _huge_pages(-(-max(size, CHUNK) // PAGE) * PAGE), 0
        found = self._chunk[self._used : self._used + size]
        self._used += -(-size // LINE) * LINE
        return found.reshape(shape)


def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of its own; memory is touched when it is written first, a page at a time."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size >= PAGE:
        memory = _huge_pages(size)
    else:
        memory = np.zeros(size + LINE, np.uint8)
        memory = memory[-memory.ctypes.data % LINE :]
    return memory[:size].view(dtype).reshape(shape)


def _huge_pages(size: int) -> np.ndarray:
    """At least so many bytes; those behind the last whole huge page lie in small ones."""
    # Shared memory, which is Python's default, has no huge pages on most systems, and a forked child would write to it.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        memory = mmap.mmap(-1, size + PAGE, **private)
    except OSError as error:
        raise MemoryError(f"unable to allocate {size / 2**30:.1f} GiB") from error
    whole = np.frombuffer(memory, np.uint8)
    first = -whole.ctypes.data % PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, first, size // PAGE * PAGE)
    return whole[first:]
