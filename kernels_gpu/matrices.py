"""Weights on a card: the blocks of a file as planes (formats.cuh), or numbers as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from minirt.gguf_file import Tensor, release

from .device import Array, Device
from .formats import FORMATS, GROUP, NUMBERS, SUPER

WARP, THREADS = 32, 128
_BITS = {"F32": np.float32, "F16": np.uint16, "BF16": np.uint16}


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight [n_out, n_in]."""

    name: str  # of its format
    planes: tuple[Array | None, ...]  # low, high, scales, supers; or numbers alone
    largest: Array  # uint32 [n_out]: the bits of each row's largest magnitude
    shape: tuple[int, int]
    nbytes: int  # in the file, which is about what reading it takes

    @property
    def constants(self) -> dict[str, int | str]:
        """What kernels are compiled with to read it."""
        if self.name in NUMBERS:
            return {"NUMBER": f"KIND_{self.name}"}
        return FORMATS[self.name].constants


def make_matrix(device: Device, tensor: Tensor) -> Matrix:
    name, (n_out, n_in) = tensor.type.name, tensor.shape
    largest, n = device.zeros((n_out,), np.uint32), n_out * n_in
    data = device.upload(np.ascontiguousarray(tensor.data).view(_BITS.get(name, np.uint8)).reshape(-1))
    release(tensor)
    if name in NUMBERS:
        kernel = device.kernel("maxima.cu", "find_largest", NUMBER=f"KIND_{name}")
        grid = (-(-n_out // (THREADS // WARP)), 1, 1)
        kernel(grid, (THREADS, 1, 1), data, np.int32(n_out), np.int32(n_in), largest)
        return Matrix(name, (data,), largest, (n_out, n_in), tensor.data.nbytes)
    f, groups = FORMATS[name], n // GROUP
    planes: list[Any] = [
        device.empty((groups * 4 * f.low_bits,), np.uint8),
        device.empty((groups * 4 * f.high_bits,), np.uint8) if f.high_bits else None,
        device.empty((groups * f.scale_bytes,), np.uint8),
        device.empty((n // SUPER,), np.uint32) if f.is_super else None,
    ]
    block = {"BLOCK_BYTES": tensor.type.block_bytes, "BLOCK_GROUPS": tensor.type.block_size // GROUP}
    kernel = device.kernel("repack.cu", "repack", SOURCE=f"FROM_{name}", **block, **f.constants)
    arguments = (np.uint64(0) if plane is None else plane for plane in planes)
    sizes = np.int64(groups), np.int32(n_in // GROUP)
    kernel((-(-groups // THREADS), 1, 1), (THREADS, 1, 1), data, *sizes, *arguments, largest)
    return Matrix(name, tuple(planes), largest, (n_out, n_in), tensor.data.nbytes)
