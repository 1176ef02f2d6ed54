"""SparQ's copy of the keys in 4 bits, in NumPy: see `minirt.ops.CodedIndex`."""

from __future__ import annotations

import numpy as np

from ..ops import CODED_UNIT, CodedIndex
from .attention import store_of

PARTS, WORDS = 8, 16  # numbers in a word, words of a run


def encode_units(index: CodedIndex, seq: np.ndarray, slot: np.ndarray) -> None:
    """Writes the units whose last slot is among slot [N] of sequences seq [N]."""
    per_block = index.scales.shape[4]
    for b, s in zip(seq.tolist(), slot.tolist(), strict=True):
        unit, rest = divmod(s + 1, CODED_UNIT)
        if rest == 0 and per_block:
            rows = store_of(index.k).decode(index.k[b, :, s + 1 - CODED_UNIT : s + 1])
            block, place = divmod(unit - 1, per_block)
            words, scales = encode(rows.swapaxes(1, 2))
            index.codes[b, :, block, :, place * words.shape[2] : (place + 1) * words.shape[2]] = words
            index.scales[b, :, block, :, place] = scales


def decode_index(index: CodedIndex, b: int, n: int) -> np.ndarray:
    """The first n keys of a sequence, those that fill no unit from their rows: float32 [H_kv, n, d]."""
    coded, (_, n_head_kv, blocks, d, _) = n // CODED_UNIT * CODED_UNIT, index.codes.shape
    if not blocks:
        return store_of(index.k).decode(index.k[b, :, :n])
    keys = decode(index.codes[b], index.scales[b]).reshape(n_head_kv, blocks, d, -1).swapaxes(2, 3)
    keys = keys.reshape(n_head_kv, -1, d)[:, :coded]
    return np.concatenate([keys, store_of(index.k).decode(index.k[b, :, coded:n])], axis=1)


def encode(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [..., CODED_UNIT] -> words [..., CODED_UNIT / 8], float16 scale and least [..., 2]."""
    with np.errstate(all="ignore"):  # a number that is not finite makes the scale so, and all codes 0
        low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
        least = low.astype(np.float16)
        scale = ((high - least.astype(np.float32)) / np.float32(15)).astype(np.float16)
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale.astype(np.float32))
        c = (x - least.astype(np.float32)) * inverse + np.float32(0.5)
        c = np.where(c > 0, np.minimum(c, 15), 0).astype(np.uint32)
    parts = c.reshape(*x.shape[:-1], -1, PARTS, WORDS) << 4 * np.arange(PARTS, dtype=np.uint32)[:, None]
    words = np.bitwise_or.reduce(parts, axis=-2).reshape(*x.shape[:-1], -1)
    return words, np.concatenate([scale, least], axis=-1)


def decode(words: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Words [..., n / 8] and scales [..., n / CODED_UNIT, 2] -> float32 [..., n]."""
    runs = words.reshape(*words.shape[:-1], -1, 1, WORDS)
    c = (runs >> 4 * np.arange(PARTS, dtype=np.uint32)[:, None] & 15).reshape(*scales.shape[:-1], CODED_UNIT)
    scale, least = (scales[..., i, None].astype(np.float32) for i in range(2))
    with np.errstate(invalid="ignore"):
        return (least + scale * c.astype(np.float32)).reshape(*words.shape[:-1], -1)
