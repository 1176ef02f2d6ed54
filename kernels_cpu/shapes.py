"""Shapes as kernels want them: rows of whole vectors, float32 in C order."""

from __future__ import annotations

import numpy as np

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


def check_float_rows(*arrays: np.ndarray) -> None:
    """Kernels read these by their address."""
    for array in arrays:
        if array.dtype != _FLOAT32 or not array.flags.c_contiguous:
            raise ValueError(f"an array of {array.dtype} with strides {array.strides} is not float32 in C order")


def check(fits: bool, what: str, shape: tuple[int, ...], other: tuple[int, ...]) -> None:
    if not fits:
        raise ValueError(f"{what} of shape {shape} do not fit {other}")
