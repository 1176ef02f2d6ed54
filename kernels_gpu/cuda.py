"""An NVIDIA card through CuPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minirt.errors import DeviceError

from .device import STANDARD, Array, Kernel, source_of

OLDEST = (6, 1)  # dp4a, the product of bytes


class CudaDevice:
    """The first card that CUDA shows."""

    def __init__(self) -> None:
        self._cupy = cupy = _cupy()
        try:
            if cupy.cuda.runtime.getDeviceCount() == 0:
                raise DeviceError("--device gpu: no NVIDIA card was found")
            card = cupy.cuda.Device(0)
            card.use()
            properties = cupy.cuda.runtime.getDeviceProperties(0)
            self._stream = cupy.cuda.Stream(non_blocking=True)  # of its own: only there launches can be recorded
            cupy.cuda.nvrtc.getVersion()  # loads it, so that --device auto knows in time that it is missing
        except (RuntimeError, OSError) as e:  # CUDA's, or libraries that CuPy does not find
            raise DeviceError(f"--device gpu: {_meaning(e)}") from None
        self.name = properties["name"].decode()
        self.capability = properties["major"], properties["minor"]
        self.multiprocessors = int(properties["multiProcessorCount"])
        self.shared_memory = int(properties.get("sharedMemPerBlockOptin", STANDARD))
        if self.capability < OLDEST:
            raise DeviceError(
                f"--device gpu: {self.name} has compute capability {'.'.join(map(str, self.capability))}, "
                f"minirt needs {'.'.join(map(str, OLDEST))} or newer"
            )
        self._stream.use()
        self._modules: dict[tuple[Any, ...], Any] = {}
        self._kernels: dict[tuple[Any, ...], Kernel] = {}

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and of all."""
        free, total = self._cupy.cuda.runtime.memGetInfo()
        return int(free) + self._cupy.get_default_memory_pool().free_bytes(), int(total)

    @property
    def driver(self) -> str:
        """The newest CUDA that the driver knows."""
        return _version(self._cupy.cuda.runtime.driverGetVersion())

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return self._allocated(self._cupy.empty, shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return self._allocated(self._cupy.zeros, shape, dtype)

    def upload(self, array: np.ndarray) -> Array:
        return self._allocated(self._cupy.asarray, array)

    def _allocated(self, make: Callable[..., Array], *args: Any) -> Array:
        """make(*args). DeviceError if the card has no room, after which all that was there still is."""
        self._stream.use()  # of this thread too: every pass through a model begins here, or with `refresh`
        try:
            return make(*args)
        except (RuntimeError, self._cupy.cuda.memory.OutOfMemoryError) as e:
            raise self._failure(e) from None

    def _failure(self, error: Exception) -> DeviceError:
        """What CUDA says, in a line, and what to do."""
        if not _is_full(error):
            return DeviceError(f"{self.name}: {_meaning(error)}")
        free, total = (n / 2**30 for n in self.memory)
        return DeviceError(
            f"{self.name} is out of memory ({free:.2f} of {total:.2f} GiB free): a shorter prompt or --ctx, "
            "--kv q8_0 or a --policy with a budget takes less"
        )

    def download(self, array: Array) -> np.ndarray:
        try:
            return self._cupy.asnumpy(array)  # type: ignore[no-any-return]
        except RuntimeError as e:  # of a kernel before, too
            raise self._failure(e) from None

    def view(self, array: Array, dtype: Any) -> Array:
        return array.view(dtype)

    def concatenate(self, arrays: list[Array]) -> Array:
        return self._allocated(self._cupy.concatenate, arrays)

    def kernel(self, file: str, name: str, **constants: int | str) -> Kernel:
        key = file, name, *sorted(constants.items())
        if key not in self._kernels:
            self._kernels[key] = self._compiled(file, name, constants)
        return self._kernels[key]

    def _compiled(self, file: str, name: str, constants: dict[str, int | str]) -> Kernel:
        key = file, *sorted(constants.items())
        try:
            if key not in self._modules:
                macros = (f"-D{macro}={value}" for macro, value in constants.items())
                self._modules[key] = self._cupy.RawModule(
                    code=source_of(file), options=("-std=c++17", *macros), backend="nvrtc"
                )
            function = self._modules[key].get_function(name)
        except (self._cupy.cuda.compiler.CompileException, RuntimeError, OSError) as e:  # NVRTC may be missing, too
            if _is_full(e):
                raise self._failure(e) from None
            capability, needed = (".".join(map(str, version)) for version in (self.capability, OLDEST))
            raise DeviceError(
                f"{self.name}: {file} does not compile for capability {capability} ({needed} or newer should do): "
                f"{_first_error(e)}; --device cpu does without"
            ) from None

        def launch(grid: tuple[int, ...], block: tuple[int, ...], *args: Any, shared: int = 0) -> None:
            try:
                if shared > function.max_dynamic_shared_size_bytes:
                    function.max_dynamic_shared_size_bytes = shared
                function(grid, block, args, shared_mem=shared)
            except (RuntimeError, self._cupy.cuda.memory.OutOfMemoryError) as e:
                raise self._failure(e) from None

        return launch

    def capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        pool, memory = self._cupy.get_default_memory_pool(), []

        def kept(n_bytes: int) -> Any:
            # What run() drops would else be given to others, or to a later part of it, to which numbers of the host are
            # brought before all of it is done; and the graph goes on writing there.
            memory.append(pool.malloc(n_bytes))
            return memory[-1]

        try:
            with self._cupy.cuda.using_allocator(kept):
                self._stream.begin_capture()
                try:
                    run()
                finally:
                    graph = self._stream.end_capture()
        except (DeviceError, RuntimeError):
            return None

        def launch(memory: Any = memory) -> None:
            try:
                graph.launch(self._stream)
            except RuntimeError as e:
                raise self._failure(e) from None

        return launch

    def refresh(self, host: np.ndarray, array: Array) -> None:
        self._stream.use()  # of this thread too: a pass that was recorded begins here
        try:
            array.set(host)
        except RuntimeError as e:
            raise self._failure(e) from None

    def synchronize(self) -> None:
        self._stream.synchronize()


def _cupy() -> Any:
    try:
        import cupy
    except (ImportError, RuntimeError, OSError, AttributeError) as e:  # of another NumPy, without CUDA's libraries ...
        if getattr(e, "name", "") == "cupy":
            raise DeviceError(
                "--device gpu needs CuPy: pip install 'minirt[cuda13]', or 'minirt[cuda12]' for an older driver or card"
            ) from None
        raise DeviceError(f"--device gpu: CuPy cannot be imported: {_first_error(e)}") from None
    return cupy


def _first_error(error: Exception) -> str:
    """The line of a longer text that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" =-\t")]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else type(error).__name__)


def _is_full(error: Exception) -> bool:
    return "out of memory" in str(error).lower()  # of CuPy's pool, of the driver, which loads kernels, of the runtime


def _meaning(error: Exception) -> str:
    """What CUDA says, without its numbers."""
    name, _, says = str(error).partition(": ")
    text = says if name.lower().startswith("cuda") else str(error)
    return "the driver is too old for this CuPy, or there is none" if "insufficient" in text else text


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
