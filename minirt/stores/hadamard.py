"""The Hadamard rotation: orthogonal, its own inverse, made of additions (Sylvester's construction)."""

from __future__ import annotations

import numpy as np


def rotation_size(d: int) -> int:
    """The largest power of two that divides d: so many components are mixed."""
    return d & -d


def rotate(x: np.ndarray, size: int) -> np.ndarray:
    """float32 [..., d], each run of `size` components times the Hadamard matrix of that size, of orthonormal rows.

    In the order in which kernels add, so that what is rounded afterwards is rounded alike.
    """
    shape, x, step = x.shape, x * np.float32(1 / np.sqrt(size)), 1
    while step < size:
        first, second = np.moveaxis(x.reshape(x.size // (2 * step), 2, step), 1, 0)
        x, step = np.stack((first + second, first - second), axis=1), 2 * step
    return x.reshape(shape)
