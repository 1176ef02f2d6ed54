"""Products of two long lists of rows of which only little is wanted: one number for each row of the second list.

The second list is cut into blocks of COLUMNS, whose rows become the columns of panels; the first passes by in tiles of
a few rows, and each tile of products is used up while it is in registers (see `gemm`), so that no matrix of products
ever exists. Lanes are columns: what is wanted of them needs no reduction over lanes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compiled import kernel
from .crew import share_long
from .extremes import indices
from .gemm import ROWS, VECTORS, WIDTH, number_at, tile_sums, transpose_rows
from .ir_vectors import F32, I32, I64, LANES, Value, at, constant, load, splat, store, vector
from .rows import decode_row
from .softmax import exp_below_zero

COLUMNS = 192  # whole panels, of every width; a block stays in the second cache

_ROWS, _VECTORS, _LANES = (0,) * ROWS, (0,) * VECTORS, (0,) * LANES


def scratch_size(d: int) -> int:
    """Numbers that a thread needs beside its arguments."""
    return (COLUMNS + LANES + ROWS) * d + LANES


@kernel
def _divided(scratch, d):  # type: ignore[no-untyped-def]
    """Scratch as (columns: panels [d, WIDTH] one after the other, tile [d, ROWS], rows [LANES, d])."""
    used = -(scratch.ctypes.data // 4) % LANES  # a load that spans two cache lines counts as two
    columns = scratch[used : used + COLUMNS * d]
    used += COLUMNS * d
    rows = scratch[used : used + LANES * d].reshape(LANES, d)
    used += LANES * d
    return columns, scratch[used : used + ROWS * d], rows


@kernel
def _into_columns(rows, last, columns, i):  # type: ignore[no-untyped-def]
    """Rows 0 ... last, and the last again up to 16, become columns i ... i + 15 of the panels; 16 divides i."""
    d = rows.shape[1]
    transpose_rows(rows, 0, last, 0, d, columns, i // WIDTH * WIDTH * d + i % WIDTH, WIDTH, _LANES)


@kernel
def _into_tile(rows, last, tile):  # type: ignore[no-untyped-def]
    """Rows 0 ... last, and the last again up to ROWS, become a tile."""
    transpose_rows(rows, 0, last, 0, rows.shape[1], tile, 0, ROWS, _ROWS)


@intrinsic
def _add_probabilities(
    typingctx: Any, tile: Any, columns: Any, at_column: Any, n: Any, lse: Any, lasts: Any, sums: Any
) -> Any:
    """sums[c] += the sum over the tile's rows i of e^(product - lse[i]), for WIDTH columns c from at_column on.

    Only columns up to lasts[i], int32, count in row i. sums float32 [COLUMNS], n: length of the rows.
    """

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        tile, columns, column, n, lse, lasts, sums = args
        arrays = zip((0, 4, 5), (tile, lse, lasts), strict=True)
        tile_at, lse_at, lasts_at = (number_at(context, b, signature.args[i], a, I64(0)) for i, a in arrays)
        columns_at = number_at(context, b, signature.args[1], columns, b.mul(column, n))
        sums_at = number_at(context, b, signature.args[6], sums, column)
        places = [at(b, sums_at, 4 * LANES * v) for v in range(VECTORS)]
        totals = [load(b, place, vector(F32)) for place in places]
        products = tile_sums(b, tile_at, I64(ROWS), columns_at, I64(WIDTH), n, ROWS, VECTORS)
        for i in range(ROWS):
            shift, last = splat(b, load(b, at(b, lse_at, 4 * i), F32)), splat(b, load(b, at(b, lasts_at, 4 * i), I32))
            for v in range(VECTORS):
                p = exp_below_zero(b, b.fsub(products[i][v], shift))
                seen = b.icmp_signed("<=", indices(b, b.add(column, I64(LANES * v))), last)
                totals[v] = b.fadd(totals[v], b.select(seen, p, constant(F32, 0.0)))
        for place, total in zip(places, totals, strict=True):
            store(b, total, place)
        return context.get_dummy_value()

    i = types.int64
    return types.void(tile, columns, i, i, lse, lasts, sums), codegen


@intrinsic
def _keep_largest(
    typingctx: Any, tile: Any, columns: Any, at_column: Any, n: Any, first: Any, best: Any, where: Any
) -> Any:
    """best[c] = the largest of itself and the tile's products, where[c] = first + the row of it; of equals the first.

    For WIDTH columns c from at_column on. best float32, where int32 [COLUMNS], n: length of the rows.
    """

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        tile, columns, column, n, first = args[:5]
        tile_at = number_at(context, b, signature.args[0], tile, I64(0))
        columns_at = number_at(context, b, signature.args[1], columns, b.mul(column, n))
        best_at, where_at = (number_at(context, b, signature.args[i], args[i], column) for i in (5, 6))
        products = tile_sums(b, tile_at, I64(ROWS), columns_at, I64(WIDTH), n, ROWS, VECTORS)
        for v in range(VECTORS):
            best_place, where_place = (at(b, pointer, 4 * LANES * v) for pointer in (best_at, where_at))
            high, row = load(b, best_place, vector(F32)), load(b, where_place, vector(I32))
            for i in range(ROWS):
                better = b.fcmp_ordered(">", products[i][v], high)
                high = b.select(better, products[i][v], high)
                row = b.select(better, splat(b, b.trunc(b.add(first, I64(i)), I32)), row)
            store(b, high, best_place)
            store(b, row, where_place)
        return context.get_dummy_value()

    i = types.int64
    return types.void(tile, columns, i, i, i, best, where), codegen


@kernel
def _sums_of_block(q, k, between, start, lse, scale, scratch, sums, task, thread):  # type: ignore[no-untyped-def]
    heads, (n, n_head, d) = len(sums), q.shape
    group, h, first = n_head // heads, task % heads, task // heads * COLUMNS
    width = min(COLUMNS, start + n - first)
    columns, tile, rows = _divided(scratch[thread], d)
    for i in range(0, (width + WIDTH - 1) // WIDTH * WIDTH, LANES):
        count = min(LANES, width - i)
        for r in range(count):
            decode_row(k, h * between + first + i + r, rows, r)
        _into_columns(rows, max(0, count - 1), columns, i)
    totals, shifts, lasts = np.zeros(COLUMNS, np.float32), np.zeros(ROWS, np.float32), np.empty(ROWS, np.int32)
    scale = np.float64(scale)  # rounded to float32 it would pull all products the same way
    for begin in range(max(0, first - start) * group, n * group, ROWS):
        count = min(ROWS, n * group - begin)
        lasts[:] = -1
        for r in range(count):
            t, head = (begin + r) // group, h * group + (begin + r) % group
            shifts[r], lasts[r] = lse[t, head], start + t - first
            for j in range(d):
                rows[r, j] = scale * q[t, head, j]
        _into_tile(rows, count - 1, tile)
        for c in range(0, min(width, lasts[count - 1] + 1), WIDTH):
            _add_probabilities(tile, columns, c, d, shifts, lasts, totals)
    for c in range(width):
        sums[h, first + c] += totals[c] / np.float32(group)


@kernel
def add_column_sums(crew, q, k, between, start, lse, scale, scratch, sums):  # type: ignore[no-untyped-def]
    """sums [H_kv, start + T] += the probabilities that the rows of q [T, H_q, d] give each slot, averaged over the
    query heads of a KV head.

    Row t is in slot start + t, sees the slots up to its own, and has the softmax's denominator e^lse[t], lse [T, H_q].
    k [rows, blocks], a head's `between` rows after those of the head before; scratch: scratch_size(d) numbers for each
    thread.
    """
    blocks = (start + len(q) + COLUMNS - 1) // COLUMNS
    of = (q, k, between, start, lse, scale, scratch, sums)
    share_long(crew, blocks * len(sums), _sums_of_block, of)  # the longest tasks first


@kernel
def _decode_direction(cache, s, rows, r):  # type: ignore[no-untyped-def]
    """Row r of rows [LANES, d] becomes cached row s, divided by its length if it has one."""
    decode_row(cache, s, rows, r)
    total = np.float32(0.0)
    for j in range(rows.shape[1]):
        total += rows[r, j] * rows[r, j]
    inverse = np.float32(1.0) / np.sqrt(total) if total > 0 else np.float32(0.0)
    for j in range(rows.shape[1]):
        rows[r, j] *= inverse


@kernel
def _most_similar_to_block(k, between, d, kept, head, evicted, scratch, best, where, task, thread):  # type: ignore[no-untyped-def]
    h, first = task % len(kept), task // len(kept) * COLUMNS
    width = min(COLUMNS, evicted.shape[1] - first)
    columns, tile, rows = _divided(scratch[thread], d)
    for i in range(0, (width + WIDTH - 1) // WIDTH * WIDTH, LANES):
        count = min(LANES, width - i)
        for r in range(count):
            _decode_direction(k, h * between + evicted[h, first + i + r], rows, r)
        _into_columns(rows, max(0, count - 1), columns, i)
    begin = 0
    while kept[h, begin] < head:
        begin += 1
    highest, of = np.full(COLUMNS, -np.inf, np.float32), np.full(COLUMNS, begin, np.int32)
    for row in range(begin, kept.shape[1], ROWS):
        count = min(ROWS, kept.shape[1] - row)
        for r in range(count):
            _decode_direction(k, h * between + kept[h, row + r], rows, r)
        _into_tile(rows, count - 1, tile)  # the last row once more is never better than itself
        for c in range(0, width, WIDTH):
            _keep_largest(tile, columns, c, d, row, highest, of)
    for c in range(width):
        best[h, first + c], where[h, first + c] = highest[c], of[c]


@kernel
def most_similar_rows(crew, k, between, d, kept, head, evicted, scratch, best, where):  # type: ignore[no-untyped-def]
    """For each evicted slot [H_kv, n] of the keys, the one of kept [H_kv, m] most like it.

    Keys are as in add_column_sums, of d numbers. best [H_kv, n]: its cosine; where [H_kv, n]: its index among the kept,
    which are ascending: those before `head` do not count, but the last of them is not before it. scratch:
    scratch_size(d) numbers for each thread.
    """
    blocks = (evicted.shape[1] + COLUMNS - 1) // COLUMNS
    of = (k, between, d, kept, head, evicted, scratch, best, where)
    share_long(crew, blocks * len(kept), _most_similar_to_block, of)
