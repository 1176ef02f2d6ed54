"""The factors that rebuild keys and values from latents (Palu, arXiv 2407.21118), as tensor cores want them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from minirt.rope import Rope

from .device import Array, Device

COLUMN = 8  # numbers of a head that a product of tiles takes at once
UNIT = 32  # numbers of a latent: two such products


@dataclass(frozen=True, eq=False)
class Factor:
    """The second factor of a layer's keys or values, [H_kv d, r], and what comes after it."""

    head_dim: int
    rank: int
    n_head_kv: int
    values: Array  # float16 [H_kv, columns, blocks, 32 lanes, 8]: see packed
    power: float  # of two, times which the values count: so floats of any size are halves
    bias: Array | None  # float32 [H_kv, 8 columns], in the order of the values
    norm: Array | None  # float32 [8 columns]
    eps: float
    frequencies: Array | None  # uint64 [pairs]: turns of a position, in 2^-64
    pairs: int
    interleaved: bool
    magnitude: float

    @property
    def nbytes(self) -> int:
        return int(self.values.nbytes)

    @property
    def blocks(self) -> int:
        """Of a latent."""
        return -(-self.rank // UNIT)

    @property
    def columns(self) -> int:
        """Of eight numbers, in a head."""
        return -(-self.head_dim // COLUMN)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As kernels take it: see rebuilding.cuh."""
        turns = (self.frequencies, self.pairs, int(self.interleaved), self.magnitude)
        return (self.values, self.power, self.bias, self.norm, self.eps, *turns)


def make_factor(
    device: Device,
    values: np.ndarray,
    n_head_kv: int,
    bias: np.ndarray | None,
    norm: np.ndarray | None,
    eps: float,
    rope: Rope | None,
) -> Factor:
    """Of float32 values [H_kv d, r], bias [H_kv d], norm [d]."""
    rank, d = values.shape[1], len(values) // n_head_kv
    pairs, interleaved = (0, True) if rope is None else (rope.dim // 2, rope.interleaved)
    order = np.arange(d)
    if not interleaved:
        order[: 2 * pairs] = np.arange(2 * pairs).reshape(2, pairs).T.ravel()
    most = float(np.abs(values).max(initial=0.0))
    power = 2.0 ** (math.frexp(most)[1] - 1) if 0 < most < math.inf else 1.0

    def columns(x: np.ndarray) -> np.ndarray:
        """Along the last axis of d numbers in their order, filled up with 0."""
        return np.pad(x[..., order], [*[(0, 0)] * (x.ndim - 1), (0, -d % COLUMN)]).astype(np.float32)

    halves = packed(columns((values / np.float32(power)).reshape(n_head_kv, d, rank).swapaxes(1, 2)).swapaxes(1, 2))
    frequencies = None
    if rope is not None and pairs:
        turns = [int(x * 2.0**64) % 2**64 for x in (rope.frequency / (2 * math.pi)).tolist()]
        frequencies = device.upload(np.array(turns, np.uint64))
    return Factor(
        d, rank, n_head_kv, device.upload(halves), power,
        None if bias is None else device.upload(columns(bias.reshape(n_head_kv, d))),
        None if norm is None else device.upload(columns(norm)), eps, frequencies, pairs, interleaved,
        1.0 if rope is None else rope.magnitude,
    )  # fmt: skip


def packed(rows: np.ndarray) -> np.ndarray:
    """float32 [H, 8 columns, r] -> float16 [H, columns, blocks, 32, 8].

    Lane 4 g + t has of row g of its column the numbers 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of the block, and those 16 later:
    what `multiply_tiles` of mma.cuh takes of its right side, twice.
    """
    heads, n, rank = rows.shape
    x = np.pad(rows, [(0, 0), (0, 0), (0, -rank % UNIT)]).astype(np.float16)
    x = x.reshape(heads, n // COLUMN, COLUMN, -1, 2, 2, 4, 2)  # heads, columns, g, blocks, 16, 8, t, 2
    return np.ascontiguousarray(x.transpose(0, 1, 3, 2, 6, 4, 5, 7)).reshape(heads, n // COLUMN, -1, 32, 8)
