"""How K and V lie in memory, by name. A store says what a row [d] costs and how it is encoded; kernels read it as is.

The quantised ones are the blocks of llama.cpp: 32 numbers and a float16 scale. A block is as coarse as its largest
number makes it, and heads have components that are always large, so a row is first rotated by a Hadamard matrix, which
spreads them over all components (QuaRot, arXiv 2404.00456). Scores do not change if queries are rotated as the keys
were, and a sum of values is rotated back. "-plain" leaves the rotation out.

A store added later is one entry here, what devices need to read and write its rows, and the shared tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError
from .blocks import CODECS
from .hadamard import rotate, rotation_size

BLOCK = 32  # numbers that share a scale


@dataclass(frozen=True)
class Store:
    """Rows of items of `dtype`, of which an item holds one number."""

    name: str
    dtype: np.dtype
    length = 1  # numbers in an item
    rotated = False

    def items(self, head_dim: int) -> int:
        """Items of a row of one head."""
        return head_dim // self.length

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of one row of one head."""
        return self.items(head_dim) * self.dtype.itemsize

    def check(self, head_dim: int) -> None:
        """UsageError if heads of this size cannot be stored."""

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """float32 [..., d] -> stored rows. The reference; values beyond the type's range become infinite."""
        with np.errstate(over="ignore"):
            return rows.astype(self.dtype)

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """Stored rows -> float32 [..., d]."""
        return rows.astype(np.float32)


@dataclass(frozen=True)
class BlockStore(Store):
    """Rows of quantised blocks."""

    rotated: bool = False
    length = BLOCK

    @property
    def _codec(self) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]:
        return CODECS[self.name.removesuffix("-plain")]

    def check(self, head_dim: int) -> None:
        if head_dim % BLOCK:
            raise UsageError(
                f"--kv {self.name} takes heads of a multiple of {BLOCK} numbers, this model's have {head_dim}"
            )

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """float32 [..., d] -> blocks [..., d / 32]."""
        rows = rotate(rows, rotation_size(rows.shape[-1])) if self.rotated else rows
        blocks = np.ascontiguousarray(rows, np.float32).reshape(*rows.shape[:-1], rows.shape[-1] // BLOCK, BLOCK)
        return self._codec[0](blocks).view(self.dtype)[..., 0]

    def decode(self, rows: np.ndarray) -> np.ndarray:
        data = np.ascontiguousarray(rows).view(np.uint8).reshape(*rows.shape, self.dtype.itemsize)
        values = self._codec[1](data).reshape(*rows.shape[:-1], BLOCK * rows.shape[-1])
        return rotate(values, rotation_size(values.shape[-1])) if self.rotated else values


def _blocks(name: str, size: int, rotated: bool) -> BlockStore:
    return BlockStore(name, np.dtype([(name.replace("-", "_"), "u1", size)]), rotated)


STORES: dict[str, Store] = {
    store.name: store
    for store in (
        Store("f32", np.dtype(np.float32)),
        Store("f16", np.dtype(np.float16)),
        _blocks("q8_0", 34, True),
        _blocks("q4_0", 18, True),
        _blocks("q8_0-plain", 34, False),
        _blocks("q4_0-plain", 18, False),
    )
}


_LENGTHS = {store.dtype.itemsize: store.length for store in STORES.values()}


def row_numbers(array: np.ndarray) -> int:
    """Numbers in a row of a cache [B, H_kv, slots, items]."""
    return array.shape[3] * _LENGTHS[array.dtype.itemsize]


def get_store(name: str) -> Store:
    """The store of that name; UsageError lists what there is."""
    if name not in STORES:
        raise UsageError(f"unknown KV type '{name}' (one of: {', '.join(STORES)})")
    return STORES[name]


def get_stores(text: str) -> tuple[Store, Store]:
    """The stores of keys and of values: "q8_0" for both, "q8_0/q4_0" for each."""
    k, _, v = text.partition("/")
    return get_store(k), get_store(v if "/" in text else k)


def stores_text(k: Store, v: Store) -> str:
    """What `get_stores` reads."""
    return k.name if k == v else f"{k.name}/{v.name}"
