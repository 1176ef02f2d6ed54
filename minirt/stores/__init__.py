"""How K and V lie in memory, by name. A store says what a row [d] costs and how it is encoded; kernels read it as is.

A store added later is one entry here, its two tile primitives in each device (rows in, rows out), and the shared tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import UsageError


@dataclass(frozen=True)
class Store:
    """Rows of `dtype`, one number an element."""

    name: str
    dtype: np.dtype

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of one row of one head."""
        return head_dim * self.dtype.itemsize

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """float32 [..., d] -> stored rows. The reference; values beyond the type's range become infinite."""
        with np.errstate(over="ignore"):
            return rows.astype(self.dtype)

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """Stored rows -> float32 [..., d]."""
        return rows.astype(np.float32)


STORES = {
    "f32": Store("f32", np.dtype(np.float32)),
    "f16": Store("f16", np.dtype(np.float16)),
}


def get_store(name: str) -> Store:
    """The store of that name; UsageError lists what there is."""
    if name not in STORES:
        raise UsageError(f"unknown KV type '{name}' (one of: {', '.join(STORES)})")
    return STORES[name]
