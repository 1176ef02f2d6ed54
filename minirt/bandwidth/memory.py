"""How fast this machine's memory can be read: the limit of decoding, which reads all weights for every token."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..ops import Ops

BUFFER_BYTES = 1 << 30  # far more than caches hold ...
MEMORY_SHARE = 8  # ... but at most one part in so many of the memory that is free
PIECES = 32  # of the buffer, written until there is no time left
WRITE_SECONDS = 0.8  # fresh memory of a virtual machine may take seconds a GiB
READ_SECONDS = 0.4
PASSES = 3  # at least


def read_bandwidth(threads: int, device: str = "cpu") -> float:
    """Bytes of memory that `threads` threads read per second together, the best of a few passes. Takes about a second.

    device: the name of an Ops. The CPU reads with a compiled loop, the reference with NumPy.
    """
    read = _reader(device)
    with ThreadPoolExecutor(threads) as pool:
        values = _written(pool, threads)
        return values.nbytes / _best_seconds(pool, read, np.array_split(values, threads))


def copy_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads read and write together when each copies: both sides count."""
    with ThreadPoolExecutor(threads) as pool:
        values = _written(pool, threads)
        values = values[: values.size // (2 * threads) * 2 * threads]
        return values.nbytes / _best_seconds(pool, _copy, list(values.reshape(threads, 2, -1)))


def _written(pool: ThreadPoolExecutor, threads: int) -> np.ndarray:
    """Memory that was written, as much as there is time for."""
    n = min(BUFFER_BYTES, available_memory() // MEMORY_SHARE) // (8 * PIECES)
    buffer = np.empty((PIECES, max(n, 1)), np.uint64)
    written, deadline = 0, time.perf_counter() + WRITE_SECONDS
    while written == 0 or (written < PIECES and time.perf_counter() < deadline):
        written += len(list(pool.map(_write, buffer[written : written + threads])))
    return buffer[:written].reshape(-1)


def _best_seconds(pool: ThreadPoolExecutor, work: Callable[[Any], Any], parts: Sequence[Any]) -> float:
    """Of a few passes in which each thread does its part."""
    best, passes, deadline = math.inf, 0, time.perf_counter() + READ_SECONDS
    while passes < PASSES or time.perf_counter() < deadline:
        begun = time.perf_counter()
        list(pool.map(work, parts))
        best = min(best, time.perf_counter() - begun)
        passes += 1
    return best


def memory_bandwidth(ops: Ops, threads: int) -> float:
    """Of the memory that holds the weights: a card's own, or this machine's, read by so many threads."""
    return ops.bandwidth() or read_bandwidth(threads, ops.name)


def available_memory() -> int:
    """Bytes that programs can still take without swapping; all of the memory where the system does not say."""
    from ..llama import physical_memory

    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return physical_memory()


def _reader(device: str) -> Callable[[np.ndarray], Any]:
    if device == "reference":
        return np.add.reduce
    from kernels_cpu.bandwidth import total

    total(np.ones(1, np.uint64))  # compiled before anything is timed
    return total


def _copy(halves: np.ndarray) -> None:
    np.copyto(halves[1], halves[0])


def _write(piece: np.ndarray) -> None:
    piece.fill(1)  # memory that was never written is one page of zeros, over and over
