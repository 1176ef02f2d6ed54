"""Blocks of 32 numbers as llama.cpp's ggml-quants.c makes them: uint8 [..., 34] (Q8_0) or [..., 18] (Q4_0)."""

from __future__ import annotations

import numpy as np


def encode_q8_0(x: np.ndarray) -> np.ndarray:
    """float32 [..., 32] -> a float16 scale, the largest |x| / 127, and 32 signed bytes."""
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    q = _divided(x, scale)
    whole = np.trunc(q)
    q = whole + np.where(np.abs(q - whole) >= 0.5, np.sign(q), 0)  # halves away from zero
    return np.concatenate([_half(scale), q.astype(np.int8).view(np.uint8)], axis=-1)


def decode_q8_0(blocks: np.ndarray) -> np.ndarray:
    """uint8 [..., 34] -> float32 [..., 32]."""
    return _scale(blocks) * blocks[..., 2:].view(np.int8).astype(np.float32)


def encode_q4_0(x: np.ndarray) -> np.ndarray:
    """float32 [..., 32] -> a float16 scale, the number of largest |x| / -8, and 32 numbers of 4 bits, 8 larger.

    Byte i holds number i below and number i + 16 above.
    """
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
    scale = largest / np.float32(-8)
    q = np.trunc(_divided(x, scale) + np.float32(8.5)).clip(0, 15).astype(np.uint8)
    return np.concatenate([_half(scale), q[..., :16] | q[..., 16:] << 4], axis=-1)


def decode_q4_0(blocks: np.ndarray) -> np.ndarray:
    """uint8 [..., 18] -> float32 [..., 32]."""
    q = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)
    return _scale(blocks) * (q.astype(np.float32) - 8)


def _divided(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """x / scale; 0 where that is no number: of a block with one that is not finite the scale tells."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        q = x * np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    return np.nan_to_num(q, nan=0, posinf=0, neginf=0)


def _half(scale: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return scale.astype(np.float16).view(np.uint8)


def _scale(blocks: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)


CODECS = {"q8_0": (encode_q8_0, decode_q8_0), "q4_0": (encode_q4_0, decode_q4_0)}
