"""What is said where a card, its driver or CuPy is not what is needed; a CuPy that has nothing stands in for it."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kernels_gpu.cuda import CudaDevice
from minirt.errors import ModelError


class FakeRuntimeError(RuntimeError):
    pass


class FakeOutOfMemory(Exception):
    pass


class FakeCompileError(Exception):
    pass


def fake_cupy(**changes: Any) -> Any:
    """One card of capability 9.0 with 8 GiB, of which changes tell otherwise."""
    has = {"count": 1, "capability": (9, 0), "error": "", "compiles": True, "room": True, "captures": True}
    has |= {"free": 2 << 30, "cached": 1 << 30} | changes
    properties = {"name": b"Card", "major": has["capability"][0], "minor": has["capability"][1]}
    properties |= {"multiProcessorCount": 4, "sharedMemPerBlockOptin": 65536}

    def count() -> int:
        if has["error"]:
            raise FakeRuntimeError(has["error"])
        return int(has["count"])

    def make(*args: Any) -> np.ndarray:
        if not has["room"]:
            raise FakeOutOfMemory
        return np.zeros(1)

    def get_function(name: str) -> Any:
        if not has["compiles"]:
            raise FakeCompileError("in file\nproducts.cu(3): error: no such instruction\n")
        found = SimpleNamespace(max_dynamic_shared_size_bytes=49152, calls=[])
        fake.functions.append(found)
        return lambda grid, block, args, shared_mem: found.calls.append((grid, block, args, shared_mem))

    def begin() -> None:
        if not has["captures"]:
            raise FakeRuntimeError("cudaErrorStreamCaptureUnsupported: no")

    graph = SimpleNamespace(launch=lambda stream: fake.launches.append(stream))
    stream = SimpleNamespace(use=lambda: None, begin_capture=begin, end_capture=lambda: graph)
    runtime = SimpleNamespace(
        CUDARuntimeError=FakeRuntimeError, getDeviceCount=count, getDeviceProperties=lambda i: properties,
        memGetInfo=lambda: (has["free"], 8 << 30), driverGetVersion=lambda: 13010,
    )  # fmt: skip
    fake = SimpleNamespace(
        functions=[], launches=[], empty=make, zeros=make, asarray=make, concatenate=make,
        get_default_memory_pool=lambda: SimpleNamespace(free_bytes=lambda: has["cached"]),
        RawModule=lambda **options: SimpleNamespace(get_function=get_function),
        cuda=SimpleNamespace(
            runtime=runtime, Device=lambda i: SimpleNamespace(use=lambda: None), Stream=lambda non_blocking: stream,
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
        with pytest.raises(ModelError, match=r"Card is out of memory \(3.00 of 8.00 GiB free\): a shorter prompt or"):
            call()


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    device = open_device(monkeypatch, compiles=False)
    with pytest.raises(
        ModelError, match=r"cache.cu does not compile for capability 9.0: products.cu\(3\): error: no such"
    ):
        device.kernel("cache.cu", "append", HEAD_DIM=64)


def test_what_cannot_be_recorded_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_device(monkeypatch, captures=False).capture(lambda: None) is None
