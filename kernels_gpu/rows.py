"""The rows of a cache on a card: numbers as they are, or codes and scales apart, so that both lie where wide loads want
them."""

from __future__ import annotations

from typing import Any

import numpy as np

from minirt.stores import BlockStore, Store

from .device import Array, Device

BLOCK = 32  # numbers that share a scale


class Rows:
    """Keys or values [B, H_kv, slots, items] of a store; indexed like an array, along the first three axes.

    codes: f32 or f16 [..., d]; q8_0 int8 [..., d]; q4_0 uint8 [..., d / 2], number 2 i of a row in the low half of byte
    i and number 2 i + 1 in the high half, each 8 larger. scales: float16 [..., d / 32]; of f32 and f16 None.
    """

    def __init__(self, store: Store, codes: Array, scales: Array | None):
        self.store, self.codes, self.scales = store, codes, scales

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the reference: items of the store's dtype."""
        return (*self.codes.shape[:3], self.store.items(self.numbers))

    @property
    def numbers(self) -> int:
        """In a row."""
        return int(self.codes.shape[3]) * (2 if self.kind == "q4_0" else 1)

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes) + (0 if self.scales is None else int(self.scales.nbytes))

    @property
    def spans(self) -> tuple[np.int64, np.int64]:
        """Rows from one sequence, and from one head, to the next: of a part of a cache more than it has."""
        row = self.codes.strides[2]
        return np.int64(self.codes.strides[0] // row), np.int64(self.codes.strides[1] // row)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As kernels take them: codes, scales, spans."""
        return self.codes, self.scales, *self.spans

    @property
    def kind(self) -> str:
        """How kernels read it: f32, f16, q8_0 or q4_0."""
        return self.store.name.removesuffix("-plain")

    def __getitem__(self, index: Any) -> Rows:
        return Rows(self.store, self.codes[index], None if self.scales is None else self.scales[index])

    def __setitem__(self, index: Any, rows: Rows) -> None:
        self.codes[index] = rows.codes
        if self.scales is not None:
            self.scales[index] = rows.scales


def allocate_rows(device: Device, store: Store, shape: tuple[int, int, int, int]) -> Rows:
    """Of zeros."""
    *leading, d = shape
    if not isinstance(store, BlockStore):
        return Rows(store, device.zeros(shape, store.dtype), None)
    kind = store.name.removesuffix("-plain")
    width, dtype = (d, np.int8) if kind == "q8_0" else (d // 2, np.uint8)
    return Rows(store, device.zeros((*leading, width), dtype), device.zeros((*leading, d // BLOCK), np.float16))


def encoded(device: Device, rows: Rows) -> np.ndarray:
    """The rows as the store itself encodes them, for comparison: [..., items] of its dtype."""
    codes = device.download(rows.codes)
    if rows.scales is None:
        return codes
    blocks = codes.view(np.uint8).reshape(*rows.shape, -1)
    if rows.kind == "q4_0":
        numbers = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*rows.shape, BLOCK)
        blocks = numbers[..., : BLOCK // 2] | numbers[..., BLOCK // 2 :] << 4
    scales = np.ascontiguousarray(device.download(rows.scales)).view(np.uint8).reshape(*rows.shape, 2)
    return np.concatenate([scales, blocks], axis=-1).view(rows.dtype)[..., 0]
