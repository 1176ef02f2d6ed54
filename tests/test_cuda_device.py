"""What is said where a card, its driver or CuPy is not what is needed; a CuPy that has nothing stands in for it."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kernels_gpu.cuda import CudaDevice
from minirt.errors import ModelError

FULL = r"Card is out of memory \(3.00 of 8.00 GiB free\): a shorter prompt or"
NO_NVRTC = "CuPy failed to load libnvrtc.so.13: OSError: libnvrtc.so.13: cannot open shared object file"


class FakeRuntimeError(RuntimeError):
    pass


class FakeOutOfMemory(Exception):
    pass


class FakeCompileError(Exception):
    pass


def fake_cupy(**changes: Any) -> Any:
    """One card of capability 9.0 with 8 GiB, of which changes tell otherwise."""
    has = {"count": 1, "capability": (9, 0), "error": "", "compiles": True, "room": True, "captures": True}
    has |= {"stream": "", "nvrtc": "", "launch": "", "module": ""}
    has |= {"free": 2 << 30, "cached": 1 << 30} | changes
    properties = {"name": b"Card", "major": has["capability"][0], "minor": has["capability"][1]}
    properties |= {"multiProcessorCount": 4, "sharedMemPerBlockOptin": 65536}

    def count() -> int:
        if has["error"]:
            raise FakeRuntimeError(has["error"])
        return int(has["count"])

    def make(*args: Any) -> SimpleNamespace:
        if not has["room"]:
            raise FakeOutOfMemory("Out of memory allocating 512 bytes (allocated so far: 0 bytes).")
        return SimpleNamespace(data=fake.allocator(512), set=lambda host: failing("launch", None))

    class Memory:
        """A place, which is given to others when nobody holds it any more."""

        def __init__(self) -> None:
            self.place = free.pop() if free else next(places)

        def __del__(self) -> None:
            free.append(self.place)

    class Pool:
        def malloc(self, n: int) -> Memory:
            return Memory()

        def free_bytes(self) -> int:
            return int(has["cached"])

    free: list[int] = []
    places, pool = itertools.count(), Pool()

    @contextmanager
    def using_allocator(malloc: Any) -> Iterator[None]:
        fake.allocator, before = malloc, fake.allocator
        yield
        fake.allocator = before

    def use() -> None:
        fake.user = threading.get_ident()

    def failing(name: str, result: Any) -> Any:
        if has[name]:
            raise FakeRuntimeError(has[name])
        return result

    def get_function(name: str) -> Any:
        if not has["compiles"]:
            raise FakeCompileError("in file\nproducts.cu(3): error: no such instruction\n")
        return failing("module", Function())

    class Function:
        max_dynamic_shared_size_bytes = 49152

        def __call__(self, grid: Any, block: Any, args: Any, shared_mem: int) -> None:
            failing("launch", None)

    def begin() -> None:
        if not has["captures"]:
            raise FakeRuntimeError("cudaErrorStreamCaptureUnsupported: no")

    graph = SimpleNamespace(launch=lambda stream: failing("launch", None))
    stream = SimpleNamespace(use=use, begin_capture=begin, end_capture=lambda: graph)
    runtime = SimpleNamespace(
        CUDARuntimeError=FakeRuntimeError, getDeviceCount=count, getDeviceProperties=lambda i: properties,
        memGetInfo=lambda: (has["free"], 8 << 30), driverGetVersion=lambda: 13010,
    )  # fmt: skip
    fake = SimpleNamespace(
        allocator=pool.malloc, user=None, empty=make, zeros=make, asarray=make, concatenate=make,
        asnumpy=lambda array: failing("launch", array),
        get_default_memory_pool=lambda: pool,
        RawModule=lambda **options: SimpleNamespace(get_function=get_function),
        cuda=SimpleNamespace(
            runtime=runtime, Device=lambda i: SimpleNamespace(use=lambda: None),
            Stream=lambda non_blocking: failing("stream", stream), using_allocator=using_allocator,
            nvrtc=SimpleNamespace(getVersion=lambda: failing("nvrtc", (13, 0))),
            memory=SimpleNamespace(OutOfMemoryError=FakeOutOfMemory),
            compiler=SimpleNamespace(CompileException=FakeCompileError),
        ),
    )  # fmt: skip
    return fake


def open_device(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> CudaDevice:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(**changes))
    return CudaDevice()


def test_what_a_card_is(monkeypatch: pytest.MonkeyPatch) -> None:
    device = open_device(monkeypatch)
    assert (device.name, device.capability, device.multiprocessors) == ("Card", (9, 0), 4)
    assert device.memory == (3 << 30, 8 << 30)
    assert device.driver == "13.1"
    launch = device.capture(lambda: None)
    assert launch is not None
    launch()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"count": 0}, "no NVIDIA card was found"),
        (
            {"error": "cudaErrorInsufficientDriver: CUDA driver version is insufficient"},
            "driver is too old for this CuPy",
        ),
        ({"error": "cudaErrorNoDevice: no CUDA-capable device is detected"}, "no CUDA-capable device is detected"),
        ({"capability": (5, 2)}, "Card has compute capability 5.2, minirt needs 6.1 or newer"),
        ({"stream": "cudaErrorMemoryAllocation: out of memory"}, "--device gpu: out of memory"),
        ({"stream": "cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy"}, "is/are busy"),
        ({"nvrtc": NO_NVRTC}, NO_NVRTC),
    ],
)
def test_no_such_card(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match="--device gpu") as e:
        open_device(monkeypatch, **changes)
    assert says in str(e.value)
    assert "\n" not in str(e.value)


def test_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = open_device(monkeypatch, room=False)
    for call in (
        lambda: device.empty((1,), np.int8),
        lambda: device.concatenate([]),
        lambda: device.upload(np.ones(1)),
    ):
        with pytest.raises(ModelError, match=FULL):
            call()


def test_out_of_memory_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """When they are loaded, and when they are launched."""
    full = "CUDA_ERROR_OUT_OF_MEMORY: out of memory"
    with pytest.raises(ModelError, match=FULL):
        open_device(monkeypatch, module=full).kernel("cache.cu", "append", HEAD_DIM=64)
    with pytest.raises(ModelError, match=FULL):
        open_device(monkeypatch, launch=full).kernel("cache.cu", "append", HEAD_DIM=64)((1,), (1,), shared=1 << 16)


def test_a_kernel_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is found out by whoever asks the card next."""
    device = open_device(monkeypatch, launch="CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")
    again = device.capture(lambda: None)
    assert again is not None
    calls = [
        lambda: device.kernel("cache.cu", "append")((1,), (1,)), lambda: device.download(None), again,
        lambda: device.refresh(np.zeros(1), device.empty((1,), np.int8)),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ModelError, match=r"^Card: an illegal memory access was encountered$"):
            call()


def test_memory_of_a_recording_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of nobody else, as long as it may be played; nor is it given twice within the recording, before which numbers
    of the host come to their places."""
    device, places = open_device(monkeypatch), []

    def new_place() -> int:
        places.append(device.empty((1,), np.int8).data.place)  # and drops the array
        return places[-1]

    assert new_place() == new_place()
    launch = device.capture(lambda: [new_place() for _ in range(3)].clear())
    assert len(set(places[2:])) == 3
    assert new_place() not in places[2:5]
    del launch
    assert new_place() in places[2:5]


def test_a_recorded_pass_of_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stream is the device's, as each thread begins with one that waits for no other."""
    device = open_device(monkeypatch)
    array = device.empty((1,), np.int8)
    thread = threading.Thread(target=lambda: device.refresh(np.zeros(1, np.int8), array))
    thread.start()
    thread.join()
    assert device._cupy.user == thread.ident


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    device = open_device(monkeypatch, compiles=False)
    with pytest.raises(
        ModelError,
        match=r"cache.cu does not compile for capability 9.0 \(6.1 or newer should do\): products.cu\(3\): error",
    ):
        device.kernel("cache.cu", "append", HEAD_DIM=64)


def test_what_cannot_be_recorded_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_device(monkeypatch, captures=False).capture(lambda: None) is None
