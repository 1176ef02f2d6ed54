"""A card, and all that minirt asks of CuPy: memory, kernels compiled from the .cu files beside this one, recorded runs.

What launches kernels takes a device as an argument and names no library, so that tests can run the same sources and the
same launchers on the CPU.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

FOLDER = Path(__file__).parent
INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$')
STANDARD = 49152  # bytes of shared memory that a block may have without being granted more

Array = Any  # cupy.ndarray; of the tests' device numpy.ndarray
Kernel = Callable[..., None]  # (grid, block, *args, shared=bytes)


class Device(Protocol):
    """Arrays are contiguous unless sliced; a launch takes them, and NumPy scalars, in the order of the kernel."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # bytes that a block may have at most
    memory: tuple[int, int]  # bytes: free, and in all
    driver: str  # the newest CUDA that it knows

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array: ...

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array: ...

    def upload(self, array: np.ndarray) -> Array: ...

    def download(self, array: Array) -> np.ndarray: ...

    def view(self, array: Array, dtype: Any) -> Array:
        """The same bytes of a contiguous array as another type."""

    def concatenate(self, arrays: list[Array]) -> Array: ...

    def kernel(self, file: str, name: str, **constants: int | str) -> Kernel:
        """A kernel of a .cu file, compiled with these constants as macros; once for all calls."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        """Notes the launches that run() makes, without making them; returns what makes them. None if it cannot.

        run() may ask for memory, which is given once while the result lives, and copy on the device, but wait
        for nothing and copy nothing from or to the host. What else the launches read and write is the caller's to keep.
        """

    def refresh(self, host: np.ndarray, array: Array) -> None:
        """Copies a host array to its place on the device, before what is launched next."""

    def synchronize(self) -> None: ...


@functools.cache
def source_of(file: str) -> str:
    """The text of a .cu file with the headers it includes in their places."""

    def expand(name: str) -> str:
        lines = (FOLDER / name).read_text().replace("#pragma once\n", "\n").split("\n")
        return "\n".join(included(line, name, number) for number, line in enumerate(lines, 1))

    def included(line: str, by: str, number: int) -> str:
        if not (match := INCLUDE.match(line)):
            return line
        guard = f"INCLUDED_{match[1].removesuffix('.cuh').upper()}"
        text = f'#ifndef {guard}\n#define {guard}\n#line 1 "{match[1]}"\n{expand(match[1])}\n#endif'
        return f'{text}\n#line {number + 1} "{by}"'

    return f'#line 1 "{file}"\n{expand(file)}'
