"""What all stores have in common: how a row of numbers lies in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..config import ModelConfig


@dataclass(frozen=True)
class Store:
    """Rows of items of `dtype`, of which an item holds one number."""

    name: str
    dtype: np.dtype
    length = 1  # numbers in an item
    rotated = False
    latent = False  # rows are Palu's latents, from which keys and values are rebuilt

    def heads(self, config: ModelConfig) -> int:
        """Rows of a slot: one for each KV head, or each group of them that shares a latent."""
        return config.n_head_kv

    def numbers(self, config: ModelConfig, layer: int) -> int:
        """Numbers in a row of a layer."""
        return config.head_dim

    def items(self, numbers: int) -> int:
        """Items of a row of so many numbers."""
        return numbers // self.length

    def row_bytes(self, numbers: int) -> int:
        """Bytes of a row of so many numbers."""
        return self.items(numbers) * self.dtype.itemsize

    def slot_bytes(self, config: ModelConfig, layer: int) -> int:
        """Bytes of all rows of a slot of a layer."""
        return self.heads(config) * self.row_bytes(self.numbers(config, layer))

    def check(self, head_dim: int) -> None:
        """UsageError if heads of this size cannot be stored."""

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """float32 [..., d] -> stored rows. The reference; values beyond the type's range become infinite."""
        with np.errstate(over="ignore"):
            return rows.astype(self.dtype)

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """Stored rows -> float32 [..., d]."""
        return rows.astype(np.float32)
