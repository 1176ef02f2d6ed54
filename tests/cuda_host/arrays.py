"""The part of CuPy that launchers of kernels need, on NumPy: arrays of a device that is the CPU.

As with CuPy, data goes to the device by asarray, array or set and comes back by asnumpy or get, neither of them while a
stream is captured; arithmetic between the two sorts is a TypeError. Memory of `empty` is filled with a pattern that is
NaN in every type of float.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from .stream import stream

ALIGNMENT = 512  # bytes, as CuPy's memory pool gives
PATTERN = 0xFF
TOGETHER = 8  # arrays that CuPy concatenates by a copy of each

exposed: dict[int, weakref.ref[np.ndarray]] = {}  # arrays whose address was asked for, by id


class Pointer:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class DeviceArray(np.ndarray):
    """An array on the device."""

    @property
    def data(self) -> Any:
        """`.data.ptr` is the address. Kernels may then touch the array though they do not get it as an argument."""
        key = id(self)
        exposed[key] = weakref.ref(self, lambda _: exposed.pop(key, None))
        return Pointer(self.ctypes.data)

    def get(self) -> np.ndarray:
        return asnumpy(self)

    def set(self, values: np.ndarray) -> None:
        stream.refuse("a copy from the host")
        if (values.dtype, values.shape) != (self.dtype, self.shape) or not self.flags.forc:
            raise ValueError(f"{values.dtype} {values.shape} is not set to {self.dtype} {self.shape}, without gaps")
        self.view(np.ndarray)[...] = values

    def __setitem__(self, index: Any, value: Any) -> None:
        if type(value) is np.ndarray:
            raise TypeError(f"Unsupported type {type(value)}: an array of the host for one of the device")
        stream.do(_assign, self, index, value)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        for x in (*inputs, *(kwargs.get("out") or ())):
            if type(x) is np.ndarray:
                raise TypeError(f"Unsupported type {type(x)}: {ufunc.__name__} of arrays of the device and of the host")
        plain = [x.view(np.ndarray) if isinstance(x, DeviceArray) else x for x in inputs]
        if out := kwargs.get("out"):
            kwargs["out"] = tuple(x.view(np.ndarray) for x in out)
        result = getattr(ufunc, method)(*plain, **kwargs)
        return out[0] if out else on_device(result)


def _assign(target: DeviceArray, index: Any, value: Any) -> None:
    target.view(np.ndarray)[index] = value


class Cupy:
    """What `import cupy` would be: NumPy's functions, with arrays of the device as results."""

    ndarray = DeviceArray

    def __getattr__(self, name: str) -> Any:
        function = getattr(np, name)
        if isinstance(function, type) or not callable(function):
            return function
        return lambda *args, **kwargs: on_device(function(*args, **kwargs))

    @staticmethod
    def empty(shape: Any, dtype: Any = float) -> DeviceArray:
        shape, dtype = tuple(np.atleast_1d(shape).tolist()), np.dtype(dtype)
        n_bytes = math.prod(shape) * dtype.itemsize
        memory = np.full(n_bytes + ALIGNMENT, PATTERN, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        return memory[start : start + n_bytes].view(dtype).reshape(shape).view(DeviceArray)

    @classmethod
    def empty_like(cls, a: np.ndarray) -> DeviceArray:
        return cls.empty(a.shape, a.dtype)

    @classmethod
    def full(cls, shape: Any, value: Any, dtype: Any = None) -> DeviceArray:
        out = cls.empty(shape, dtype or np.asarray(value).dtype)
        out[...] = value
        return out

    @classmethod
    def zeros(cls, shape: Any, dtype: Any = float) -> DeviceArray:
        return cls.full(shape, 0, dtype)

    @classmethod
    def zeros_like(cls, a: np.ndarray) -> DeviceArray:
        return cls.zeros(a.shape, a.dtype)

    @classmethod
    def array(cls, a: Any, dtype: Any = None) -> DeviceArray:
        a = np.asarray(a, dtype)
        out = cls.empty(a.shape, a.dtype)
        out.set(a)
        return out

    @classmethod
    def asarray(cls, a: Any, dtype: Any = None) -> DeviceArray:
        same = isinstance(a, DeviceArray) and dtype in (None, a.dtype)
        return a if same else cls.array(a, dtype)

    @classmethod
    def ascontiguousarray(cls, a: Any, dtype: Any = None) -> DeviceArray:
        a = cls.asarray(a, dtype)
        return a if a.flags.c_contiguous else cls.array(a)

    @classmethod
    def concatenate(cls, arrays: Sequence[Any], axis: int = 0) -> DeviceArray:
        if not all(isinstance(a, DeviceArray) for a in arrays):
            raise TypeError("Only cupy arrays can be concatenated")
        if len(arrays) > TOGETHER:
            stream.refuse(f"concatenating {len(arrays)} arrays, whose addresses are copied from the host,")
        sizes = [a.shape[axis] for a in arrays]
        shape = (*arrays[0].shape[:axis], sum(sizes), *arrays[0].shape[axis + 1 :])
        out = cls.empty(shape, np.result_type(*(a.dtype for a in arrays)))
        for a, end in zip(arrays, itertools.accumulate(sizes), strict=True):
            out[(slice(None),) * axis + (slice(end - a.shape[axis], end),)] = a
        return out

    @staticmethod
    def asnumpy(a: Any) -> np.ndarray:
        stream.refuse("a copy to the host")
        return np.array(a)


def asnumpy(a: Any) -> np.ndarray:
    return Cupy.asnumpy(a)


def on_device(result: Any) -> Any:
    """Results of NumPy, scalars too, as arrays of the device."""
    if isinstance(result, tuple):
        return tuple(on_device(r) for r in result)
    if isinstance(result, np.ndarray | np.generic) and not isinstance(result, DeviceArray):
        return Cupy.array(result)
    return result
