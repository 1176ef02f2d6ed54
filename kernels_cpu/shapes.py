"""Shapes as kernels want them: rows of whole vectors, float32 in C order."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided

from minirt.ops import KV
from minirt.stores import row_numbers

from .ir_vectors import LANES

_FLOAT32 = np.dtype(np.float32)


def whole_vectors(n: int) -> int:
    """n rounded up to whole vectors."""
    return -(-n // LANES) * LANES


def padded(x: np.ndarray) -> np.ndarray:
    """x with zeros after its last axis to whole vectors: heads of 100 components, say."""
    missing = whole_vectors(x.shape[-1]) - x.shape[-1]
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def without_padding(x: np.ndarray, n: int) -> np.ndarray:
    """The first n of the last axis; a copy if some were padding."""
    return x if x.shape[-1] == n else np.ascontiguousarray(x[..., :n])


def check_width(cache: np.ndarray, d: int, what: str = "keys and values") -> None:
    """Rows of a cache hold heads of d numbers, filled up to whole vectors."""
    check(row_numbers(cache) == whole_vectors(d), what, (d,), cache.shape)


def rows_of(kv: KV, seq: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Keys and values of one sequence of a cache [B, H_kv, slots, blocks] as rows in order, and how many of them lie
    from one head to the next: more than `slots` if it is a part of a cache. So kernels see one type of array."""
    (k, between), (v, other) = (_rows_of(array[seq]) for array in kv)
    if between != other:
        raise ValueError(f"keys with {between} rows a head and values with {other} are parts of different caches")
    return k, v, between


def _rows_of(array: np.ndarray) -> tuple[np.ndarray, int]:
    heads, slots, blocks = array.shape
    size = blocks * array.itemsize
    between, rest = divmod(array.strides[0], size)
    if rest or array.strides[1:] != (size, array.itemsize):
        raise ValueError(f"a cache with strides {array.strides} does not hold its rows in order")
    return as_strided(array[0], ((heads - 1) * between + slots, blocks)), between


def check_float_rows(*arrays: np.ndarray) -> None:
    """Kernels read these by their address."""
    for array in arrays:
        if array.dtype != _FLOAT32 or not array.flags.c_contiguous:
            raise ValueError(f"an array of {array.dtype} with strides {array.strides} is not float32 in C order")


def check_rows_in_order(array: np.ndarray, dtype: np.dtype) -> None:
    """Kernels read its last axis as it lies in memory."""
    if array.dtype != dtype or array.strides[-1] != dtype.itemsize:
        raise ValueError(f"an array of {array.dtype} with strides {array.strides} does not hold {dtype} in order")


def check(fits: bool, what: str, shape: tuple[int, ...], other: tuple[int, ...]) -> None:
    if not fits:
        raise ValueError(f"{what} of shape {shape} do not fit {other}")
