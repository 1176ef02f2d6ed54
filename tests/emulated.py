"""A device on which the kernels of a card run on the CPU, slowly and checked: see cuda_host."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from cuda_host import HostDevice, missing_compiler, stream

from kernels_cpu import CpuOps
from kernels_gpu.cuda import CudaDevice
from kernels_gpu.device import source_of
from kernels_gpu.rows import Rows, encoded
from minirt.errors import ModelError
from minirt.ops import Far

BUILT = Path(__file__).parents[1] / ".pytest_cache" / "d" / "cuda_host"  # kept from run to run, as pytest keeps it


class EmulatedDevice:
    """A `kernels_gpu.device.Device`. seed: of the order in which blocks and threads run."""

    name, capability, multiprocessors, shared_memory = "emulated", (9, 0), 4, 99 << 10
    memory, driver = (1 << 40, 1 << 40), "13.0"

    def __init__(self, seed: int = 0):
        self.host = HostDevice(BUILT, seed)
        self._kernels: dict[Any, Any] = {}
        self._owned: list[Any] | None = None  # what was asked for while launches are captured
        self.xp = self.host.xp

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self._kept(self.xp.empty(shape, dtype))

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self._kept(self.xp.zeros(shape, dtype))

    def upload(self, array: np.ndarray) -> Any:
        return self.xp.asarray(array)

    def download(self, array: Any) -> np.ndarray:
        found: np.ndarray = self.xp.asnumpy(array)
        return found

    def view(self, array: Any, dtype: Any) -> Any:
        return array.view(dtype)

    def concatenate(self, arrays: list[Any]) -> Any:
        return self._kept(self.xp.concatenate(arrays))

    def _kept(self, array: Any) -> Any:
        """The array, which has memory of the capture's own if one is under way."""
        if self._owned is not None:
            self._owned.append(array)
        return array

    def kernel(self, file: str, name: str, **constants: int | str) -> Any:
        key = file, name, *sorted(constants.items())
        if key not in self._kernels:
            options = [f"-D{macro}={value}" for macro, value in constants.items()]
            function = self.host.compile(source_of(file), options=options, name=file).get_function(name)

            def launch(grid: Any, block: Any, *args: Any, shared: int = 0) -> None:
                function.max_dynamic_shared_size_bytes = max(shared, function.max_dynamic_shared_size_bytes)
                function(grid, block, args, shared_mem=shared)

            self._kernels[key] = launch
        return self._kernels[key]

    def capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        owned = self._owned = []
        try:
            play = stream.capture(run)
        finally:
            self._owned = None

        def launch() -> None:
            assert owned is not None
            play()

        return launch

    def refresh(self, host: np.ndarray, array: Any) -> None:
        array.set(host)

    def synchronize(self) -> None:
        stream.refuse("waiting")


class FromHost:
    """Ops of a card as tests of all devices call them: with NumPy arrays, which are brought there and, since an op may
    change them in place, back, if they are of float32 or numbers that a device finds; results come back too, but for
    what a later op is meant to get."""

    STAY = frozenset(("allocate", "zeros", "indices", "vector", "matrix", "table", "factor", "angles"))
    FOUND: ClassVar = {  # arguments of int32 that are the device's
        "overwrite": (1, 4), "evict": (1, 6), "argsort": (0,), "take": (0, 1), "copy_rows": (1,), "merge": (1,),
        "merge_evicted": (1,), "approximate_top_k": (8,), "attend_rows": (6,),
    }  # fmt: skip

    def __init__(self, ops: Any):
        self.ops, self.name = ops, ops.name

    def to_host(self, array: Any) -> np.ndarray:
        return encoded(self.ops.device, array) if isinstance(array, Rows) else self.ops.device.download(array)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.ops, name)
        return function if name in self.STAY or not callable(function) else functools.partial(self._call, name)

    def _call(self, name: str, *args: Any, **named: Any) -> Any:
        device, found, moved = self.ops.device, self.FOUND.get(name, ()), []

        def there(x: Any, is_found: bool = False) -> Any:
            if type(x) is np.ndarray and (x.dtype == np.float32 or is_found):
                moved.append((x, device.upload(np.ascontiguousarray(x))))
                return moved[-1][1]
            if type(x) in (list, tuple):
                return type(x)(map(there, x))
            return x._replace(q=there(x.q)) if isinstance(x, Far) else x

        result = getattr(self.ops, name)(
            *(there(x, i in found) for i, x in enumerate(args)), **{key: there(x) for key, x in named.items()}
        )
        for host, array in moved:
            host[...] = device.download(array)
        if isinstance(result, tuple):
            return tuple(map(device.download, result))
        return None if result is None else device.download(result)


def emulated_ops(seed: int = 0) -> Any:
    """The ops of a card, emulated; the test is skipped where nothing can be built."""
    if reason := missing_compiler():
        pytest.skip(reason)
    from kernels_gpu.ops import GpuOps

    return FromHost(GpuOps(EmulatedDevice(seed)))


@functools.cache
def has_card() -> bool:
    try:
        CudaDevice()
    except ModelError:
        return False
    return True


def devices() -> list[str]:
    """On which the ops are tested over all shapes; emulated cards are too slow for that."""
    return ["cpu", "gpu"] if has_card() else ["cpu"]


def device_ops(name: str) -> Any:
    if name == "cpu":
        return CpuOps(threads=2)
    from kernels_gpu.ops import GpuOps

    return FromHost(GpuOps(CudaDevice()))
