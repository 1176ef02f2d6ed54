"""Products with cached rows of blocks, on the integers of the blocks: scores of keys, weighted sums of values.

Queries, and what values are multiplied by, are rounded to integers as activations are (see `activations`), which is
less than the rounding of any cached block. Four products an instruction: of keys the lanes are rows and the bytes
components, so that a score needs no sum over lanes; of values the lanes are components and the bytes rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import overload

from .activations import BLOCK, BLOCK_BYTES, LARGEST, RADIX, quantize, split
from .blocks import BY_RECORD, Format, Panels
from .extremes import indices
from .ir_vectors import (
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    Value,
    across_lanes,
    at,
    concatenate,
    constant,
    dot_bytes,
    half_to_float,
    like,
    load,
    multiply_add,
    splat,
    store,
    to_float,
    vector,
)
from .panels import dot_blocks

ROWS = 64  # of values whose weights have a scale together
TOGETHER = 4  # of them in an instruction
HIGH, LOW, SCALE, SUM = 0, ROWS, 2 * ROWS, 2 * ROWS + 4  # byte offsets in a record of weights
RECORD = 2 * ROWS + 8
MAGIC = 1.5 * 2.0**23  # a float32 of this size has no fraction: adding it rounds


class CachedRows(Protocol):
    """Rows of a cache, in the order in which kernels read them."""

    def row(self, i: Value) -> Value:
        """Pointer to row i, or to the last if there are not so many."""

    def sixteen(self, start: Value) -> list[Value]:
        """Pointers to rows start ... start + 15; of those that are not there, to anything of a row's size."""

    def ask(self, start: Value, count: int, part: Value, parts: int) -> None:
        """Asks for what will be read soon, when that part of rows start ... start + count - 1 is read."""


class RowLanes(Panels):
    """Reads a block of 16 rows, wherever they lie, as if they were a panel."""

    def __init__(self, b: ir.IRBuilder, rows: Sequence[Value]):
        self.b, self.rows = b, rows

    def half(self, offset: int) -> Value:
        """Infinity becomes NaN: times a sum below zero it would make a score that no softmax shows."""
        halves = ir.Constant(vector(I16), ir.Undefined)
        for i, row in enumerate(self.rows):
            halves = self.b.insert_element(halves, load(self.b, at(self.b, row, offset), I16), I32(i))
        magnitude = self.b.and_(halves, constant(I16, 0x7FFF))
        finite = self.b.icmp_unsigned("<", magnitude, constant(I16, 0x7C00))
        return half_to_float(self.b, self.b.select(finite, halves, constant(I16, 0x7E00)))

    def columns(self, offset: int) -> list[Value]:
        """Squares of 4 rows by 4 words are transposed, four at once."""
        quarters = [load(self.b, at(self.b, row, offset), vector(I32, 4)) for row in self.rows]
        words = [concatenate(self.b, quarters[i::4]) for i in range(4)]
        low, high = (_of_quarters(lane, lane + 16, lane + 1, lane + 17) for lane in (0, 2))
        pairs = [self.b.shuffle_vector(words[i], words[i + 1], half) for i in (0, 2) for half in (low, high)]
        low, high = (_of_quarters(lane, lane + 1, lane + 16, lane + 17) for lane in (0, 2))
        return [self.b.shuffle_vector(pairs[i], pairs[i + 2], half) for i in (0, 1) for half in (low, high)]


def _of_quarters(*lanes: int) -> Value:
    """A shuffle that does the same in each four lanes of 16."""
    return ir.Constant(vector(I32), [first + lane for first in range(0, LANES, 4) for lane in lanes])


class ColumnLanes(Panels):
    """Reads a block of 4 rows: the lanes of a vector are 16 columns, the bytes of a lane are the rows."""

    def __init__(self, b: ir.IRBuilder, rows: Sequence[Value]):
        self.b, self.rows = b, rows

    def half(self, offset: int) -> None:
        """Scales are part of the weights."""

    def columns(self, offset: int) -> list[Value]:
        b = self.b
        whole = concatenate(b, [load(b, at(b, row, offset), vector(I8)) for row in self.rows])
        order = [LANES * row + column for column in range(LANES) for row in range(TOGETHER)]
        return [b.bitcast(b.shuffle_vector(whole, whole, ir.Constant(vector(I32, 4 * LANES), order)), vector(I32))]


def queries_for(k: Any, q: Any) -> Any:
    """Queries [B, H, d], in C order, as they are multiplied with keys of k: float32, or records of `activations`."""


@overload(queries_for, strict=False)  # a lambda has no annotations
def _queries_for(k: Any, q: Any) -> Any:
    def coded(k, q):  # type: ignore[no-untyped-def]
        n_seq, n_head, d = q.shape
        rows, codes = q.reshape(n_seq * n_head, d), np.empty((n_seq * n_head, d // BLOCK * BLOCK_BYTES), np.uint8)
        for i in range(len(rows)):
            quantize(rows, i, codes)
        return codes.reshape(n_seq, n_head, codes.shape[1])

    return coded if BY_RECORD[k.dtype].length > 1 else lambda k, q: q


def score_blocks(
    b: ir.IRBuilder, f: Format, rows: CachedRows, start: Value, queries: list[Value], n_blocks: int
) -> list[Value]:
    """Products of 16 rows with each query, in records of `activations`."""
    totals, sixteen = [cgutils.alloca_once_value(b, constant(F32, 0.0)) for _ in queries], rows.sixteen(start)
    with cgutils.for_range(b, I64(n_blocks)) as loop:
        rows.ask(start, LANES, loop.index, n_blocks)
        offset, record = b.mul(loop.index, I64(f.dtype.itemsize)), b.mul(loop.index, I64(BLOCK_BYTES))
        reader = RowLanes(b, [at(b, row, offset) for row in sixteen])
        dot_blocks(b, f, reader, [at(b, query, record) for query in queries], totals)
    return [b.load(total) for total in totals]


def add_blocks(
    b: ir.IRBuilder, f: Format, n: Value, rows: CachedRows, weights: list[Value], sums: list[Value], n_blocks: int
) -> None:
    """sums[g] += weights[g][0 : n] times rows 0 ... n - 1, n <= ROWS, for float32 at two pointers for each head.

    There is room for ROWS weights. Four rows go together that are a quarter of all apart.
    """
    quarter = b.lshr(b.add(n, I64(3)), I64(2))
    begins = [b.mul(quarter, I64(i)) for i in range(TOGETHER)]
    counts = [
        b.icmp_signed("<", indices(b, I64(0)), splat(b, b.trunc(lesser(b, quarter, b.sub(n, begin)), I32)))
        for begin in begins
    ]
    scales, records = scratch(b, 4 * ROWS), [scratch(b, RECORD) for _ in weights]
    with cgutils.for_range(b, I64(n_blocks)) as block:
        offset = b.mul(block.index, I64(f.dtype.itemsize))
        with cgutils.for_range_slice(b, I64(0), n, I64(LANES)) as (start, _):
            rows.ask(start, LANES, block.index, n_blocks)
            reader = RowLanes(b, [at(b, row, offset) for row in rows.sixteen(start)])
            store(b, next(f.decode(b, reader)).scale, at(b, scales, b.mul(start, I64(4))))
        factors = [load(b, at(b, scales, b.mul(begin, I64(4))), vector(F32)) for begin in begins]
        for place, record in zip(weights, records, strict=True):
            w = [load(b, at(b, place, b.mul(begin, I64(4))), vector(F32)) for begin in begins]
            of_rows = zip(counts, w, factors, strict=True)
            w = [b.select(some, b.fmul(u, v), constant(F32, 0.0)) for some, u, v in of_rows]
            _quantize_weights(b, w, record)
        targets = [at(b, place, b.mul(block.index, I64(4 * f.length))) for place in sums]
        _add_block(b, f, rows, begins, offset, records, targets)


def scratch(b: ir.IRBuilder, size: int) -> Value:
    """Pointer to so many bytes, for this call."""
    return b.bitcast(cgutils.alloca_once(b, vector(I8, size)), cgutils.voidptr_t)


def lesser(b: ir.IRBuilder, x: Value, y: Value) -> Value:
    return b.select(b.icmp_signed("<", x, y), x, y)


def _quantize_weights(b: ir.IRBuilder, w: list[Value], record: Value) -> None:
    """Four vectors of weights to a record: high and low bytes, of each four with the same lane; a scale, NaN if one is
    not finite; the integers' sum."""
    sizes = [b.and_(b.bitcast(v, vector(I32)), constant(I32, 0x7FFFFFFF)) for v in w]

    def larger(u: Value, v: Value) -> Value:  # floats above 0 are ordered as their bits are, NaN last
        return b.select(b.icmp_signed(">", u, v), u, v)

    largest = across_lanes(b, functools.reduce(larger, sizes), larger)
    finite, size = b.icmp_signed("<", largest, I32(0x7F800000)), b.bitcast(largest, F32)
    scale = b.select(finite, b.fdiv(size, F32(LARGEST)), F32(math.nan))
    some = b.and_(finite, b.fcmp_ordered(">", size, F32(1e-33)))  # what is smaller counts as 0
    inverse = splat(b, b.select(some, b.fdiv(F32(LARGEST), size), F32(0.0)))
    moved = [b.bitcast(multiply_add(b, value, inverse, constant(F32, MAGIC)), vector(I32)) for value in w]
    whole = [b.sub(value, constant(I32, int(np.float32(MAGIC).view(np.int32)))) for value in moved]
    # Integers of 16 bits, of two vectors each.
    words = [b.bitcast(_beside(b, moved[i], moved[i + 2], 16), vector(I16, 2 * LANES)) for i in range(2)]
    for part, place in zip(zip(*(split(b, word) for word in words), strict=True), (HIGH, LOW), strict=True):
        store(b, _beside(b, *part, 8), at(b, record, place))
    store(b, scale, at(b, record, SCALE))
    store(b, across_lanes(b, functools.reduce(b.add, whole), b.add), at(b, record, SUM))


def _beside(b: ir.IRBuilder, low: Value, high: Value, width: int) -> Value:
    """The lower half of each lane of two vectors, together in the lane."""
    return b.or_(b.and_(low, like(low, 2**width - 1)), b.shl(high, like(high, width)))


def _add_block(
    b: ir.IRBuilder, f: Format, rows: CachedRows, begins: list[Value], offset: Value, codes: list[Value],
    sums: list[Value],
) -> None:  # fmt: skip
    """The block at an offset of all rows, by weights from `_quantize_weights`."""
    halves = f.length // LANES
    totals = [
        [[cgutils.alloca_once_value(b, constant(I32, 0)) for _ in range(halves)] for _ in range(2)] for _ in codes
    ]
    with cgutils.for_range(b, begins[1]) as loop:
        four = [at(b, rows.row(b.add(begin, loop.index)), offset) for begin in begins]
        groups = list(f.decode(b, ColumnLanes(b, four)))
        for record, of_head in zip(codes, totals, strict=True):
            for place, high_or_low in zip((HIGH, LOW), of_head, strict=True):
                factor = splat(b, load(b, at(b, at(b, record, place), b.mul(loop.index, I64(TOGETHER))), I32))
                for group, total in zip(groups, high_or_low, strict=True):
                    b.store(dot_bytes(b, b.load(total), group.q[0], factor), total)
    for (highs, lows), record, target in zip(totals, codes, sums, strict=True):
        scale, whole = (load(b, at(b, record, place), kind) for place, kind in ((SCALE, F32), (SUM, I32)))
        for group, high, low in zip(groups, highs, lows, strict=True):
            total = b.add(b.shl(b.load(high), constant(I32, RADIX)), b.load(low))
            total = b.sub(total, splat(b, b.mul(whole, I32(group.bias))))
            place = at(b, target, 4 * group.start)
            value = multiply_add(b, to_float(b, total), splat(b, scale), load(b, place, vector(F32)))
            store(b, value, place)
