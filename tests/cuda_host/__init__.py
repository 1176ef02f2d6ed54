"""CUDA kernels run on the CPU, for tests: the same sources, the launchers of CuPy, every access to memory checked.

    device = HostDevice(cache_directory)
    module = device.compile(source, name_expressions=["scores<half, 64>"], options=["-DTILE=32"])
    x = device.xp.asarray(numpy_array)
    module.get_function("scores<half, 64>")((blocks,), (threads,), (x, np.int32(n)), shared_mem=1024)

A KernelError says what a kernel did wrong, in which thread and line: a race, an access out of bounds or misaligned, a
barrier that some threads never reach ... What is checked is in memory.cpp and meetings.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .arrays import Cupy, DeviceArray
from .build import BuildError, build, missing_compiler
from .module import Function, KernelError, Module
from .stream import StreamError, stream

__all__ = [
    "BuildError", "DeviceArray", "Function", "HostDevice", "KernelError", "Module", "StreamError", "missing_compiler",
    "stream",
]  # fmt: skip


class HostDevice:
    """What a launcher needs of a device: `xp` instead of CuPy, and `compile`.

    `seed` draws the order of blocks and threads of the launches that follow, `seconds` of CPU time end each.
    """

    xp = Cupy()

    def __init__(self, cache: Path, seed: int = 0) -> None:
        self.cache, self.seed, self.seconds = cache, seed, 60
        cache.mkdir(parents=True, exist_ok=True)

    def compile(
        self, source: str, name_expressions: Sequence[str] = (), options: Sequence[str] = (), name: str = "kernel.cu"
    ) -> Module:
        """A module of CUDA C++, called `name` in messages. Raises BuildError with the compiler's."""
        return Module(build(source, name, tuple(name_expressions), tuple(options), self.cache), self)
