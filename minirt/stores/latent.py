"""Latents of Palu (arXiv 2407.21118) as they lie in a cache, in place of keys and values.

A row is the latent of one token and one group of KV heads, r numbers in blocks of 32, the last one filled up:
    f16        64 bytes a block
    q4, q3     float16 scale and minimum of the row, then 16 or 12 bytes a block: number = scale * code + minimum
    keys only  int32, the token's true position: keys are turned when they are rebuilt
Whatever moves a row moves its position along. All rows are plain bytes, so that kernels do not depend on ranks.

Byte i of a q4 block holds number i below and number i + 16 above. Of a q3 block, byte i of the first 8 holds the low
two bits of numbers i, i + 8, i + 16 and i + 24, lowest first; the last 4 hold the high bits, number i at bit i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import Store

if TYPE_CHECKING:
    from ..config import ModelConfig

UNIT = 32  # numbers in a block
POSITION_BYTES = 4
SCALE_BYTES = 4  # of the scale and the minimum together
BEYOND_HALF = 65520  # and larger numbers become infinite as float16
MAX_POSITION = 1 << 24  # of a token: positions come as float32, in which numbers up to here are exact


@dataclass(frozen=True)
class LatentStore(Store):
    """Rows of latents; of keys, the last number of a row is its token's position."""

    bits: int = 16
    keys: bool = False
    latent = True

    @property
    def block_bytes(self) -> int:
        return UNIT * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        return 0 if self.bits == 16 else SCALE_BYTES

    def heads(self, config: ModelConfig) -> int:
        return config.n_head_kv // _palu(config).group_size

    def numbers(self, config: ModelConfig, layer: int) -> int:
        palu = _palu(config)
        return palu.k_ranks[layer] + 1 if self.keys else palu.v_ranks[layer]

    def items(self, numbers: int) -> int:
        rank = numbers - self.keys
        return self.scale_bytes + -(-rank // UNIT) * self.block_bytes + POSITION_BYTES * self.keys

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """float32 [..., r] or [..., r + 1] -> uint8 [..., bytes]. What is not finite, or beyond float16, is not finite
        when it is decoded; of rows of codes, then nothing is."""
        x = np.ascontiguousarray(rows[..., :-1] if self.keys else rows, np.float32)
        fill = np.zeros((*x.shape[:-1], -x.shape[-1] % UNIT), np.float32)
        with np.errstate(all="ignore"):
            parts = _encode_half(x, fill) if self.bits == 16 else _encode_codes(x, fill, self.bits)
        if self.keys:
            parts.append(_bytes(rows[..., -1:].astype(np.int32)))
        return np.concatenate(parts, axis=-1)

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [..., bytes] -> latents, float32 [..., 32 * blocks]; what fills up the last block has no meaning."""
        end = rows.shape[-1] - POSITION_BYTES * self.keys
        if self.bits == 16:
            return _as(rows[..., :end], np.float16).astype(np.float32)
        scale, minimum = np.split(_as(rows[..., :SCALE_BYTES], np.float16).astype(np.float32), 2, axis=-1)
        n = (end - SCALE_BYTES) // self.block_bytes
        blocks = rows[..., SCALE_BYTES:end].reshape(*rows.shape[:-1], n, self.block_bytes)
        codes = (_codes4 if self.bits == 4 else _codes3)(blocks)
        with np.errstate(invalid="ignore"):
            return scale * codes.reshape(*rows.shape[:-1], UNIT * n).astype(np.float32) + minimum

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Of rows of keys: int32 [...]."""
        return _as(rows[..., -POSITION_BYTES:], np.int32)[..., 0]


class Latents:
    """The cached rows of a layer's keys or values, and the factor that rebuilds them. Indexed as its rows are."""

    def __init__(self, rows: Any, store: LatentStore, factor: Any):
        self.rows = rows  # the device's array, uint8 [B, G, slots, bytes]
        self.store, self.factor = store, factor

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.rows.shape
        return shape

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype

    @property
    def numbers(self) -> int:
        """Numbers in a row as it is written."""
        return int(self.factor.rank) + self.store.keys

    def __getitem__(self, index: Any) -> Latents:
        return type(self)(self.rows[index], self.store, self.factor)

    def __setitem__(self, index: Any, rows: Latents) -> None:
        self.rows[index] = rows.rows


def _palu(config: ModelConfig) -> Any:
    assert config.palu is not None  # or get_stores would have refused latents
    return config.palu


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)


def _as(data: np.ndarray, dtype: Any) -> np.ndarray:
    return np.ascontiguousarray(data).view(dtype)


def _encode_half(x: np.ndarray, fill: np.ndarray) -> list[np.ndarray]:
    return [_bytes(np.concatenate([x, fill], axis=-1).astype(np.float16))]


def _encode_codes(x: np.ndarray, fill: np.ndarray, bits: int) -> list[np.ndarray]:
    most = np.float32(2**bits - 1)
    low, high = (f(x, axis=-1, keepdims=True) + np.float32(0) for f in (np.min, np.max))  # 0, not -0
    head = np.concatenate([(high - low) / most, low], axis=-1).astype(np.float16)
    scale, minimum = np.split(head.astype(np.float32), 2, axis=-1)
    head[(scale * most + minimum >= BEYOND_HALF)[..., 0]] = np.nan  # a card decodes to float16
    q = (x - minimum) * np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    q = np.where(q > 0, q, np.float32(0))  # NaN too
    q = np.where(q < most, q, most) + np.float32(0.5)
    q = np.concatenate([q, fill], axis=-1).astype(np.uint8)
    blocks = q.reshape(*q.shape[:-1], -1, UNIT)
    packed = (_pack4 if bits == 4 else _pack3)(blocks)
    return [_bytes(head), packed.reshape(*x.shape[:-1], -1)]


def _pack4(q: np.ndarray) -> np.ndarray:
    return q[..., :16] | q[..., 16:] << 4


def _codes4(blocks: np.ndarray) -> np.ndarray:
    return np.concatenate([blocks & 15, blocks >> 4], axis=-1)


def _pack3(q: np.ndarray) -> np.ndarray:
    low = q & 3
    crumbs = low[..., :8] | low[..., 8:16] << 2 | low[..., 16:24] << 4 | low[..., 24:] << 6
    return np.concatenate([crumbs, np.packbits(q >> 2, axis=-1, bitorder="little")], axis=-1)


def _codes3(blocks: np.ndarray) -> np.ndarray:
    low = np.concatenate([blocks[..., :8] >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    return low | np.unpackbits(blocks[..., 8:], axis=-1, bitorder="little") << 2
