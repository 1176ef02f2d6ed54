"""How K and V lie in memory, by name. A store says what a row [d] costs and how it is encoded; kernels read it as is.

The quantised ones are the blocks of llama.cpp: 32 numbers and a float16 scale. A block is as coarse as its largest
number makes it, and heads have components that are always large, so a row is first rotated by a Hadamard matrix, which
spreads them over all components (QuaRot, arXiv 2404.00456). Scores do not change if queries are rotated as the keys
were, and a sum of values is rotated back. "-plain" leaves the rotation out.

Of a model with low-rank keys and values the cache may hold latents, from which they are rebuilt: see `latent`.

A store added later is one entry here, what devices need to read and write its rows, and the shared tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from .base import Store
from .blocks import CODECS
from .hadamard import rotate, rotation_size
from .latent import MAX_POSITION, Latents, LatentStore

if TYPE_CHECKING:
    from ..config import PaluConfig

__all__ = [
    "LATENT_BITS", "MAX_POSITION", "STORES", "BlockStore", "LatentStore", "Latents", "Store", "get_store", "get_stores",
    "row_numbers", "store_names", "stores_text",
]  # fmt: skip

BLOCK = 32  # numbers that share a scale


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
LATENT_BITS = {"latent-f16": 16, "latent-q4": 4, "latent-q3": 3}
AUTO, PALU = "auto", "palu"  # latents if the file has them, else f16; latents as the file says
NAMES = (*STORES, PALU, *LATENT_BITS, AUTO)

_LENGTHS = {store.dtype.itemsize: store.length for store in STORES.values()}


def row_numbers(array: Any) -> int:
    """Numbers of a key or a value that a row of a cache [B, H_kv, slots, items] holds, or is rebuilt to."""
    if isinstance(array, Latents):
        return int(array.factor.head_dim)
    return int(array.shape[3]) * _LENGTHS[array.dtype.itemsize]


def get_store(name: str) -> Store:
    """The store of that name, if it is not one of latents; UsageError lists what there is."""
    return _store(_checked(name), None, False)


def get_stores(text: str, palu: PaluConfig | None = None) -> tuple[Store, Store]:
    """The stores of keys and of values: "q8_0" for both, "q8_0/q4_0" for each.

    palu: what a file with low-rank projections says, which can be cached as latents: "palu" (as it says), "latent-f16",
    "latent-q4", "latent-q3", keys and values alike latents. "auto": latents if there are any, else f16. UsageError.
    """
    k_name, v_name = store_names(text)
    k, v = _store(k_name, palu, True), _store(v_name, palu, False)
    if k.latent != v.latent:
        raise UsageError(f"--kv {text}: latents of keys go with latents of values (--kv-k and --kv-v, or --kv palu)")
    return k, v


def store_names(text: str) -> tuple[str, str]:
    """The names of the stores of keys and of values in "q8_0" or "q8_0/q4_0"; UsageError lists what there is."""
    k, slash, v = text.partition("/")
    return _checked(k), _checked(v if slash else k)


def stores_text(k: Store, v: Store) -> str:
    """What `get_stores` reads."""
    return k.name if k.name == v.name else f"{k.name}/{v.name}"


def _checked(name: str) -> str:
    if name not in NAMES:
        raise UsageError(f"unknown KV type '{name}' (one of: {', '.join(NAMES)})")
    return name


def _store(name: str, palu: PaluConfig | None, keys: bool) -> Store:
    if name == AUTO:
        name = "f16" if palu is None else PALU
    if name in STORES:
        return STORES[name]
    if palu is None:
        raise UsageError(f"--kv {name} takes a file made by `minirt palu`; this one has no low-rank keys and values")
    name = f"latent-{palu.latent}" if name == PALU else name
    return LatentStore(name, np.dtype(np.uint8), LATENT_BITS[name], keys)
