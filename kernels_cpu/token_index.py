"""What SparQ (arXiv 2312.04985) keeps beside the cache: the components of keys apart, and the mean of all values."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .blocks import BY_RECORD, FORMATS
from .compiled import kernel
from .crew import share, share_long
from .ir_vectors import Value, float_to_half, splat, store
from .pointers import address
from .rows import decode_row
from .unowned import unowned


@intrinsic
def put_number(typingctx: Any, index: Any, where: Any, x: Any) -> Any:
    """Writes a float32 as an item of the index to an address."""
    f = BY_RECORD[index.dtype]

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        x = splat(b, args[2], 1)
        store(b, float_to_half(b, x) if f is FORMATS["F16"] else x, b.inttoptr(args[1], cgutils.voidptr_t))
        return context.get_dummy_value()

    return types.void(index, types.int64, types.float32), codegen


@kernel
def _append_head(index, mean, seq, slot, k, v, h):  # type: ignore[no-untyped-def]
    tokens, (head_bytes, block_bytes, run_bytes, item_bytes) = index.shape[4], index.strides[1:]
    places = np.empty(8, np.int64)
    for first in range(0, len(seq), len(places)):  # neighbours share lines of memory
        n = min(len(places), len(seq) - first)
        for i in range(n):
            block, place = slot[first + i] // tokens, slot[first + i] % tokens
            start = address(index) + seq[first + i] * index.strides[0] + h * head_bytes
            places[i] = start + block * block_bytes + place * item_bytes
        for j in range(k.shape[2]):
            for i in range(n):
                put_number(index, places[i] + j * run_bytes, k[first + i, h, j])
    add_to_mean(mean, seq, slot, v, h)


@kernel
def add_to_mean(mean, seq, slot, v, h):  # type: ignore[no-untyped-def]
    """The means of a head [B, H_kv, d] take up its rows of v, one after the other; or there are none."""
    for i in range(len(seq) if len(mean) else 0):
        b, n = seq[i], np.float32(slot[i] + 1)
        for j in range(v.shape[2]):
            mean[b, h, j] += (v[i, h, j] - mean[b, h, j]) / n


@kernel
def append_index(crew, index, mean, seq, slot, k, v):  # type: ignore[no-untyped-def]
    """Writes row i of k [N, H_kv, d] to slot[i] of sequence seq[i] of the index, and row i of v to the means.

    mean [B, H_kv, d] += (v[i] - mean) / (slot[i] + 1), row after row; or empty.
    """
    args = (unowned(index), unowned(mean), unowned(seq), unowned(slot), unowned(k), unowned(v))
    share(crew, k.shape[1], _append_head, args)


@kernel
def _mean_of_head(v, n, mean, h, thread):  # type: ignore[no-untyped-def]
    rows, d = v[h], mean.shape[1]
    row, sums = np.empty((1, (d + 15) // 16 * 16), np.float32), np.zeros(d)
    for s in range(n):
        decode_row(rows, s, row, 0)
        for j in range(d):
            sums[j] += row[0, j]
    for j in range(d):
        mean[h, j] = sums[j] / max(n, 1)


@kernel
def mean_rows(crew, v, n, mean):  # type: ignore[no-untyped-def]
    """mean [H_kv, d] = that of the first n rows of v [H_kv, slots, blocks], summed up in float64."""
    share_long(crew, len(v), _mean_of_head, (unowned(v), n, unowned(mean)))
