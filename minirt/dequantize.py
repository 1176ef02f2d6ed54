"""Weights to float32, one function per block type: bit for bit what ggml's C code gives.

Each takes blocks as uint8 [n, block_bytes] and returns float32 [n, block_size]. `d` is a block's scale, `m` its
minimum, both half precision in the file; `q` are its small integers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .gguf_file import Tensor

CHUNK = 1 << 20  # elements decoded at a time, so that the intermediate arrays stay small


def dequantize(tensor: Tensor) -> np.ndarray:
    """The weight as a new float32 array of `tensor.shape`."""
    kind = tensor.type
    blocks = tensor.data.reshape(-1, kind.block_bytes)
    out = np.empty((len(blocks), kind.block_size), np.float32)
    step = CHUNK // kind.block_size
    with np.errstate(all="ignore"):  # scales of a damaged file may be infinite or NaN
        for i in range(0, len(blocks), step):
            out[i : i + step] = DECODERS[kind.name](blocks[i : i + step])
    return out.reshape(tensor.shape)


def f32(b: np.ndarray) -> np.ndarray:
    return b.view("<f4")


def f16(b: np.ndarray) -> np.ndarray:
    return b.view("<f2").astype(np.float32)


def bf16(b: np.ndarray) -> np.ndarray:
    return (b.view("<u2").astype(np.uint32) << 16).view(np.float32)


def q4_0(b: np.ndarray) -> np.ndarray:
    """d * (q - 8)"""
    return f16(b[:, :2]) * (nibbles(b[:, 2:]).view(np.int8) - 8)


def q4_1(b: np.ndarray) -> np.ndarray:
    """d * q + m"""
    return f16(b[:, :2]) * nibbles(b[:, 4:]) + f16(b[:, 2:4])


def q5_0(b: np.ndarray) -> np.ndarray:
    """d * (q - 16), the fifth bits of q in four bytes of their own"""
    q = nibbles(b[:, 6:]) | bits(b[:, 2:6]) << 4
    return f16(b[:, :2]) * (q.view(np.int8) - 16)


def q5_1(b: np.ndarray) -> np.ndarray:
    """d * q + m"""
    q = nibbles(b[:, 8:]) | bits(b[:, 4:8]) << 4
    return f16(b[:, :2]) * q + f16(b[:, 2:4])


def q8_0(b: np.ndarray) -> np.ndarray:
    """d * q"""
    return f16(b[:, :2]) * b[:, 2:].view(np.int8)


def q2_k(b: np.ndarray) -> np.ndarray:
    """d * scale * q - m * minimum, with a 4-bit scale and minimum for each of 16 groups of 16"""
    scales, q, d, m = np.split(b, [16, 80, 82], axis=1)
    scale = f16(d) * (scales & 15)
    minimum = f16(m) * (scales >> 4)
    return (scale[:, :, None] * crumbs(q).reshape(-1, 16, 16) - minimum[:, :, None]).reshape(-1, 256)


def q3_k(b: np.ndarray) -> np.ndarray:
    """d * (scale - 32) * (q - 4), with a 6-bit scale for each of 16 groups of 16 and the third bits of q apart"""
    high, low, scales, d = np.split(b, [32, 96, 108], axis=1)
    scale = nibbles(scales[:, :8]) | fields(scales[:, 8:], (0, 2, 4, 6), 3).reshape(-1, 16) << 4
    q = crumbs(low) | fields(high, range(8), 1).reshape(-1, 256) << 2
    scale = f16(d) * (scale.view(np.int8) - 32)
    return (scale[:, :, None] * (q.view(np.int8) - 4).reshape(-1, 16, 16)).reshape(-1, 256)


def q4_k(b: np.ndarray) -> np.ndarray:
    """d * scale * q - m * minimum, with a 6-bit scale and minimum for each of 8 groups of 32"""
    d, m, scales, q = np.split(b, [2, 4, 16], axis=1)
    return scaled_k(d, m, scales, pairs(q))


def q5_k(b: np.ndarray) -> np.ndarray:
    """As q4_k, the fifth bits of q apart: bit g of the 32 bytes for group g"""
    d, m, scales, high, q = np.split(b, [2, 4, 16, 48], axis=1)
    return scaled_k(d, m, scales, pairs(q) | fields(high, range(8), 1).reshape(-1, 256) << 4)


def q6_k(b: np.ndarray) -> np.ndarray:
    """d * scale * (q - 32), with an 8-bit scale for each of 16 groups of 16 and the upper two bits of q apart"""
    low, high, scales, d = np.split(b, [128, 192, 208], axis=1)
    q = fields(low.reshape(-1, 2, 64), (0, 4), 15).reshape(-1, 256) | crumbs(high) << 4
    scale = f16(d) * scales.view(np.int8)
    return (scale[:, :, None] * (q.view(np.int8) - 32).reshape(-1, 16, 16)).reshape(-1, 256)


IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def iq4_nl(b: np.ndarray) -> np.ndarray:
    """d * IQ4_VALUES[q]"""
    return f16(b[:, :2]) * IQ4_VALUES[nibbles(b[:, 2:])]


def iq4_xs(b: np.ndarray) -> np.ndarray:
    """d * (scale - 32) * IQ4_VALUES[q], with a 6-bit scale for each of 8 groups of 32"""
    d, high, low, q = np.split(b, [2, 4, 8], axis=1)
    scale = pairs(low, 1) | fields(high, (0, 2, 4, 6), 3).swapaxes(1, 2).reshape(-1, 8) << 4
    scale = f16(d) * (scale.view(np.int8) - 32)
    return (scale[:, :, None] * IQ4_VALUES[pairs(q, 16)].reshape(-1, 8, 32)).reshape(-1, 256)


DECODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    decoder.__name__.upper(): decoder
    for decoder in (
        f32, f16, bf16, q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs
    )
}  # fmt: skip


def fields(b: np.ndarray, shifts: tuple[int, ...] | range, mask: int) -> np.ndarray:
    """The bit fields of bytes [..., k], those of the first shift first: [..., len(shifts), k]."""
    return b[..., None, :] >> np.array(shifts, np.uint8)[:, None] & np.uint8(mask)


def nibbles(b: np.ndarray) -> np.ndarray:
    """[n, k] -> [n, 2k]: the low halves of all bytes, then the high halves."""
    return fields(b, (0, 4), 15).reshape(len(b), -1)


def pairs(b: np.ndarray, run: int = 32) -> np.ndarray:
    """[n, k] -> [n, 2k]: as `nibbles`, within each run of bytes."""
    return fields(b.reshape(len(b), -1, run), (0, 4), 15).reshape(len(b), -1)


def crumbs(b: np.ndarray) -> np.ndarray:
    """[n, k] -> [n, 4k]: the lowest two bits of 32 bytes, then the next two, and so on; then the next 32 bytes."""
    return fields(b.reshape(len(b), -1, 32), (0, 2, 4, 6), 3).reshape(len(b), -1)


def bits(b: np.ndarray) -> np.ndarray:
    """[n, k] -> [n, 8k]: the bits of each byte, lowest first."""
    return np.unpackbits(b, axis=1, bitorder="little")


def scaled_k(d: np.ndarray, m: np.ndarray, scales: np.ndarray, q: np.ndarray) -> np.ndarray:
    """d * scale * q - m * minimum. Of 12 bytes, the first 4 hold scales 0-3, the next 4 minima 0-3, six bits each; the
    last 4 hold the low halves of scales and minima 4-7, whose upper two bits top the first 8 bytes."""
    first, second, last = scales[:, :4], scales[:, 4:8], scales[:, 8:]
    scale = np.concatenate([first & 63, last & 15 | first >> 6 << 4], axis=1)
    minimum = np.concatenate([second & 63, last >> 4 | second >> 6 << 4], axis=1)
    scale, minimum = f16(d) * scale, f16(m) * minimum
    return (scale[:, :, None] * q.reshape(-1, 8, 32) - minimum[:, :, None]).reshape(-1, 256)
