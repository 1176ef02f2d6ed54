"""The rows of a cache of latents (minirt.stores.latent) on a card: codes in whole words, and what is beside them apart.

So codes lie where wide loads want them, and the rows of neighbouring slots are a run of memory without gaps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minirt.stores import Latents, LatentStore
from minirt.stores.latent import POSITION_BYTES, SCALE_BYTES, UNIT

from .device import Array, Device
from .factors import Factor
from .rows import Rows

WORD = 4  # bytes


class LatentRows(Rows, Latents):
    """Latents [B, G, slots, bytes]; indexed like an array, along the first three axes.

    codes: uint8 [..., bytes of the blocks], as the store has them. scales: uint32 [..., words]: scale and minimum of
    coded rows, as float16 the one below the other, then of keys the position; of f16 values None.
    """

    store: LatentStore
    factor: Factor

    def __init__(self, store: LatentStore, codes: Array, scales: Array | None, factor: Factor):
        super().__init__(store, codes, scales)
        self.factor = factor

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:3], self.store.items(self.numbers))

    @property
    def numbers(self) -> int:
        return self.factor.rank + self.store.keys

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As kernels take them: codes, what is beside them, spans, r."""
        return (*super().arguments, self.factor.rank)

    def __getitem__(self, index: Any) -> LatentRows:
        return LatentRows(
            self.store, self.codes[index], None if self.scales is None else self.scales[index], self.factor
        )

    def __setitem__(self, index: Any, rows: Any) -> None:
        super().__setitem__(index, rows)


def allocate_latents(
    device: Device, store: LatentStore, shape: tuple[int, int, int, int], factor: Factor
) -> LatentRows:
    """Of zeros."""
    *leading, numbers = shape
    if numbers != factor.rank + store.keys:
        raise ValueError(f"rows of {numbers} numbers do not fit a factor of rank {factor.rank}")
    width = -(-factor.rank // UNIT) * store.block_bytes
    words = (store.scale_bytes + POSITION_BYTES * store.keys) // WORD
    codes = device.zeros((*leading, width), np.uint8)
    return LatentRows(store, codes, device.zeros((*leading, words), np.uint32) if words else None, factor)


def encoded(device: Device, rows: LatentRows) -> np.ndarray:
    """The rows as the store itself encodes them, for comparison: uint8 [..., bytes]."""
    codes = device.download(rows.codes)
    if rows.scales is None:
        return codes
    beside = np.ascontiguousarray(device.download(rows.scales)).view(np.uint8)
    head = SCALE_BYTES if rows.store.scale_bytes else 0
    return np.concatenate([beside[..., :head], codes, beside[..., head:]], axis=-1)
