"""What the launchers of all ops share: scratch, host numbers on the device, and steps that are recorded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from minirt.ops import Array as DeviceArray
from minirt.ops import Ops
from minirt.stores import LatentStore, Store

from .device import Array, Device
from .latent_rows import allocate_latents
from .rows import Rows, allocate_rows

COPY_BYTES, COPIES = 1 << 30, 12
ATTEMPTS = 3  # to record a step; a card that fails as often makes every step anew
MEMO = 64  # small index arrays that stay on the device


class BaseOps:
    name = "gpu"

    def __init__(self, device: Device):
        self.device = device
        self._scratch: dict[str, Array] = {}
        self._memo: dict[tuple[bytes, tuple[int, ...]], Array] = {}
        self._recording: _Recording | None = None
        self._recorded_before = False
        self._failures = 0  # of captures, one after the other

    @property
    def device_name(self) -> str:
        return self.device.name

    def memory(self) -> tuple[int, int]:
        return self.device.memory

    def bandwidth(self) -> float:
        """By copies of an array that no cache holds, read and written; the best of a few."""
        n, best = max(1, min(COPY_BYTES, self.device.memory[0] // 4)), 0.0
        source, target = (self.device.zeros((n,), np.uint8) for _ in range(2))
        for _ in range(COPIES):
            self.device.synchronize()
            begun = time.perf_counter()
            target[...] = source
            self.device.synchronize()
            best = max(best, 2 * n / (time.perf_counter() - begun))
        return best

    # -- arrays --------------------------------------------------------------------------------------------------------
    def vector(self, values: np.ndarray) -> Array:
        return self.device.upload(np.ascontiguousarray(values, np.float32))

    def to_host(self, array: Array) -> np.ndarray:
        return self.device.download(array)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        return self.device.zeros(shape, dtype)

    def indices(self, values: np.ndarray) -> Array:
        return self.device.upload(np.ascontiguousarray(values, np.int32))

    def concatenate(self, parts: list[Array]) -> Array:
        return self.device.concatenate(list(parts))

    def allocate(self, store: Store, shape: tuple[int, int, int, int], factor: Any = None) -> Rows:
        if isinstance(store, LatentStore):
            return allocate_latents(self.device, store, shape, factor)
        return allocate_rows(self.device, store, shape)

    # -- launches ------------------------------------------------------------------------------------------------------
    def _launch(
        self,
        file: str,
        name: str,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        *args: Any,
        shared: int = 0,
        **constants: int | str,
    ) -> None:
        """Runs a kernel of a file compiled with these constants. Python's integers go as int32, its floats as float32;
        None is a null pointer. An empty grid is nothing to do."""
        grid, block = (three if isinstance(three, tuple) else (three,) for three in (grid, block))
        if 0 in grid:
            return
        kernel = self.device.kernel(file, name, **constants)
        kernel(_three(grid), _three(block), *map(_argument, args), shared=shared)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        """Scratch of an op: the same memory at each call, unless more is asked for than before."""
        size, key = math.prod(shape), f"{name} {np.dtype(dtype)}"
        if key not in self._scratch or self._scratch[key].size < size:
            self._scratch[key] = self.device.empty((size,), dtype)
        if self._recording is not None:
            self._recording.held.append(self._scratch[key])
        return self._scratch[key][:size].reshape(shape)

    def _counters(self, size: int) -> Array:
        """int32 zeros for kernels that count the blocks that are done, and leave zeros."""
        if "counters" not in self._scratch or self._scratch["counters"].size < size:
            self._scratch["counters"] = self.device.zeros((size,), np.int32)
        if self._recording is not None:
            self._recording.held.append(self._scratch["counters"])
        return self._scratch["counters"]

    def _on_device(self, numbers: np.ndarray) -> Array:
        """Host int32 numbers for a kernel to read. A recorded step reads what they are when it is made again."""
        if self._recording is not None:
            return self._recording.place(numbers)
        key = numbers.tobytes(), numbers.shape
        if key not in self._memo:
            if len(self._memo) >= MEMO:
                self._memo.pop(next(iter(self._memo)))
            self._memo[key] = self.device.upload(np.ascontiguousarray(numbers, np.int32))
        return self._memo[key]

    def record(self, step: Callable[[Ops], DeviceArray]) -> tuple[DeviceArray, Callable[[], None] | None]:
        """The first step runs as it is, so that kernels are compiled and scratch is there; the next one is recorded."""
        if not self._recorded_before or self._failures == ATTEMPTS:
            self._recorded_before = True
            return step(self), None  # type: ignore[arg-type]
        recording, scratch, again = _Recording(self.device), dict(self._scratch), None
        found: list[DeviceArray] = []
        try:
            self._recording = recording
            run = self.device.capture(lambda: found.append(step(self)))  # type: ignore[arg-type]
            self._recording = None
            self._failures = self._failures + 1 if run is None else 0
            if run is not None:
                play = recording.player(run)
                play()
                again = play
        finally:
            self._recording = None
            if again is None:
                self._scratch = scratch  # counters that were made for the recording are not zeros before it is played
                recording.renew()  # a policy may have kept turns that were made for it
        return (step(self) if again is None else found[0]), again  # type: ignore[arg-type]


class _Recording:
    """Host arrays that the calls of a step were given, and their places on the device, renewed before it is played."""

    def __init__(self, device: Device):
        self.device = device
        self.held: list[Any] = []  # scratch, which must live as long as the recorded launches
        self.pairs: dict[int, tuple[np.ndarray, Array]] = {}
        self.there: dict[int, bytes] = {}  # what lies in these places

    def place(self, host: np.ndarray) -> Array:
        if id(host) not in self.pairs:
            self.pairs[id(host)] = host, self.device.empty(host.shape, host.dtype)
        return self.pairs[id(host)][1]

    def player(self, run: Callable[[], None]) -> Callable[[], None]:
        def play() -> None:
            self.renew()
            run()

        return play

    def renew(self) -> None:
        """Brings what has changed on the host to the device."""
        for key, (host, array) in self.pairs.items():
            if self.there.get(key) != (now := host.tobytes()):
                self.device.refresh(host, array)
                self.there[key] = now


def _three(sizes: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*sizes, 1, 1)[:3]
    return int(x), int(y), int(z)


def _argument(value: Any) -> Any:
    if value is None:
        return np.uint64(0)
    if isinstance(value, (bool, int)):
        return np.int32(value)
    return np.float32(value) if isinstance(value, float) else value
