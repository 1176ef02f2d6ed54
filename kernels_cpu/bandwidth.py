"""The fastest loop that reads every byte: what `minirt bench` holds the speed of decoding against."""

from __future__ import annotations

import numpy as np

from .compiled import kernel


@kernel
def total(values: np.ndarray) -> np.uint64:
    """Sum of uint64 values [n], modulo 2**64."""
    out = np.uint64(0)
    for i in range(len(values)):
        out += values[i]
    return out
