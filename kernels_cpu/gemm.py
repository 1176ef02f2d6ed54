"""Products of float32 matrices: activations packed into tiles of a few rows, times panels of decoded weights.

A tile of the result stays in registers while a run of the inner dimension passes by: each step loads a few vectors of
weights and one number for each row. A run is short enough for its weights to stay in the first cache while all tiles
pass, and for the activations to stay in the second while all panels do. (Goto and van de Geijn 2008, "Anatomy of
High-Performance Matrix Multiplication"; the tile in registers is that of BLIS, Van Zee and van de Geijn 2015.)

x [N, n_in] is packed as runs of RUN columns; in each, tile after tile; in each, column after column, so that the
numbers a step needs lie side by side. Most tiles have ROWS rows, and those at the end FEW if that wastes less.
Weights come as panels [panels, n_in, WIDTH].
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiled import kernel
from .ir_vectors import (
    F32,
    I32,
    I64,
    LANES,
    Value,
    at,
    into_array,
    load,
    multiply_add,
    prefetch_line,
    splat,
    store,
    vector,
)
from .isa import has
from .pointers import add_floats, address, copy_floats

RUN = 1024  # of the inner dimension: whole blocks of every format
AHEAD = 4096  # bytes: packed activations may still be in the last cache, or out of it


def tile_shape() -> tuple[int, int, int]:
    """Rows of a tile, vectors of 16 lanes in each, rows of a small tile: sums and factors fill the registers."""
    if has("avx512f"):
        return 12, 2, 4
    if has("avx2", "fma") or has("neon"):
        return 6, 1, 4
    return 2, 1, 2


ROWS, VECTORS, FEW = tile_shape()
WIDTH = LANES * VECTORS

# Numbers as lengths of tuples, which are types: they decide what is compiled.
_ROWS, _FEW, _VECTORS = (0,) * ROWS, (0,) * FEW, (0,) * VECTORS


def number_at(context: Any, b: ir.IRBuilder, kind: Any, array: Value, offset: Value) -> Value:
    """Pointer to a number of a C-ordered float32 array."""
    base, _, _ = into_array(context, b, kind, array)
    return at(b, base, b.mul(offset, I64(4)))


def variable(b: ir.IRBuilder, value: Value) -> Value:
    place = cgutils.alloca_once(b, value.type)
    b.store(value, place)
    return place


def tile_sums(
    b: ir.IRBuilder, a: Value, lda: Value, w: Value, ldw: Value, n: Value, rows: int, vectors: int, ahead: int = 0
) -> list[list[Value]]:
    """The vectors sum over k < n of a[k lda + i] * w[k ldw + 16 v : k ldw + 16 v + 16] for i < rows, v < vectors."""
    zero = ir.Constant(vector(F32), [0.0] * LANES)
    sums = [[variable(b, zero) for _ in range(vectors)] for _ in range(rows)]
    a_now, w_now = variable(b, a), variable(b, w)
    with cgutils.for_range(b, n):
        a, w = b.load(a_now), b.load(w_now)
        columns = [load(b, at(b, w, 4 * LANES * v), vector(F32)) for v in range(vectors)]
        if ahead:
            prefetch_line(b, at(b, a, ahead))
        for i in range(rows):
            factor = splat(b, load(b, at(b, a, 4 * i), F32))
            for total, column in zip(sums[i], columns, strict=True):
                b.store(multiply_add(b, factor, column, b.load(total)), total)
        b.store(at(b, a, b.mul(lda, I64(4))), a_now)
        b.store(at(b, w, b.mul(ldw, I64(4))), w_now)
    return [[b.load(total) for total in row] for row in sums]


@intrinsic
def multiply_tile(
    typingctx: Any,
    a: Any,
    a_at: Any,
    lda: Any,
    w: Any,
    w_at: Any,
    ldw: Any,
    n: Any,
    c: Any,
    c_at: Any,
    ldc: Any,
    add: Any,
    rows: Any,
    vectors: Any,
) -> Any:
    """C = A^T W, or C += A^T W: A is [n, rows], W [n, 16 vectors], C [rows, 16 vectors], parts of float32 arrays.

    Each begins at number `*_at` of a C-ordered array and has its rows `ld*` numbers apart. rows and vectors are tuples
    of that length.
    """
    n_rows, n_vectors = len(rows), len(vectors)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        _, _, lda, _, _, ldw, n, _, _, ldc, add, _, _ = args
        a, w, c = (number_at(context, b, signature.args[i], args[i], args[i + 1]) for i in (0, 3, 7))
        sums = tile_sums(b, a, lda, w, ldw, n, n_rows, n_vectors, AHEAD)
        places = [
            [at(b, at(b, c, b.mul(ldc, I64(4 * i))), 4 * LANES * v) for v in range(n_vectors)] for i in range(n_rows)
        ]
        with b.if_else(add) as (then, otherwise):
            for branch in (then, otherwise):
                with branch:
                    for i in range(n_rows):
                        for total, place in zip(sums[i], places[i], strict=True):
                            old = branch is then
                            store(b, b.fadd(load(b, place, vector(F32)), total) if old else total, place)
        return context.get_dummy_value()

    i = types.int64
    return types.void(a, i, i, w, i, i, i, c, i, i, types.boolean, rows, vectors), codegen


@intrinsic
def transpose_rows(
    typingctx: Any,
    x: Any,
    first: Any,
    last: Any,
    begin: Any,
    end: Any,
    out: Any,
    out_at: Any,
    ld: Any,
    rows: Any,
) -> Any:
    """out[out_at + k ld + i] = x[min(first + i, last), begin + k] for begin + k < end and i < rows; all float32.

    end - begin is a multiple of 16. rows is a tuple of that length.
    """
    n_rows = len(rows)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        x, first, last, begin, end, out, out_at, ld, _ = args
        place = number_at(context, b, signature.args[5], out, out_at)
        lines = []
        for i in range(n_rows):
            row = b.add(first, I64(i))
            row = b.select(b.icmp_signed("<", row, last), row, last)
            lines.append(into_array(context, b, signature.args[0], x, row, begin)[0])
        with cgutils.for_range(b, b.sdiv(b.sub(end, begin), I64(LANES))) as loop:
            offset = b.mul(loop.index, I64(4 * LANES))
            columns = columns_of(b, [load(b, at(b, line, offset), vector(F32)) for line in lines])
            here = at(b, place, b.mul(b.mul(loop.index, I64(4 * LANES)), ld))
            for k, column in enumerate(columns):
                store(b, column, at(b, here, b.mul(ld, I64(4 * k))))
        return context.get_dummy_value()

    i = types.int64
    return types.void(x, i, i, i, i, out, i, i, rows), codegen


def columns_of(b: ir.IRBuilder, rows: list[Value]) -> list[Value]:
    """The 16 columns of a few vectors.

    Merging the first half of the rows with the second, number by number, turns the bits of a number's index by one
    place: row and column have changed places when the bits of the row have come round.
    """
    n = len(rows)
    width = 1
    while width < n:
        width *= 2
    rows = rows + [ir.Constant(vector(F32), ir.Undefined)] * (width - n)
    halves = [
        ir.Constant(vector(I32), [LANES * (i % 2) + (i + side * LANES) // 2 for i in range(LANES)]) for side in range(2)
    ]
    for _ in range(width.bit_length() - 1):
        pairs = zip(rows[: width // 2], rows[width // 2 :], strict=True)
        rows = [b.shuffle_vector(x, y, half) for x, y in pairs for half in halves]
    found = []
    for k in range(LANES):
        at_lane = k * width % LANES
        row = rows[k * width // LANES]
        lanes = ir.Constant(vector(I32, n), list(range(at_lane, at_lane + n)))
        found.append(b.shuffle_vector(row, row, lanes))
    return found


@kernel
def tile_counts(n):  # type: ignore[no-untyped-def]
    """Tiles of ROWS and of FEW rows for n rows."""
    tall = n // ROWS
    few = (n % ROWS + FEW - 1) // FEW
    return (tall, few) if few * FEW < ROWS else (tall + 1, 0)


def packed_size(n: int, n_in: int) -> int:
    """Numbers in the packed form of [n, n_in]."""
    tall, few = tile_counts(n)
    return (tall * ROWS + few * FEW) * n_in


@kernel
def pack_rows(x, begin, end, packed):  # type: ignore[no-untyped-def]
    """Tiles begin ... end - 1 of x [N, n_in] to packed, 1-D; rows that fill up a tile repeat the last one."""
    n, n_in = x.shape
    tall, few = tile_counts(n)
    padded = tall * ROWS + few * FEW
    for k in range(0, n_in, RUN):
        size = min(RUN, n_in - k)
        whole = k + size // 16 * 16
        for t in range(begin, end):
            row = t * ROWS if t < tall else tall * ROWS + (t - tall) * FEW
            height = ROWS if t < tall else FEW
            to = k * padded + row * size
            if t < tall:
                transpose_rows(x, row, n - 1, k, whole, packed, to, ROWS, _ROWS)
            else:
                transpose_rows(x, row, n - 1, k, whole, packed, to, FEW, _FEW)
            for c in range(whole, k + size):
                for i in range(height):
                    packed[to + (c - k) * height + i] = x[min(row + i, n - 1), c]


@kernel
def add_tile(tile, out, row, rows, column, columns, add):  # type: ignore[no-untyped-def]
    """out[row : row + rows, column : column + columns] = what tile [rows, WIDTH] has there, or += if add."""
    for i in range(rows):
        to, source = address(out) + 4 * ((row + i) * out.shape[1] + column), address(tile) + 4 * i * WIDTH
        if add:
            add_floats(to, source, columns)
        else:
            copy_floats(to, source, columns)


@kernel
def multiply_run(packed, n, k, weights, m, tile, out, column, width, add):  # type: ignore[no-untyped-def]
    """out[:, column : column + width] = x[:, k : k + m] @ weights, or += if add. out [n, n_out] is C-ordered.

    packed: x [n, n_in] from pack_rows; k ... k + m - 1 is one run of it. weights, 1-D, holds panels [m, WIDTH] one
    after the other: the first `width` of their columns count, the rest must be numbers nonetheless, zeros for example,
    because denormal ones are slow. tile, 1-D: ROWS * WIDTH numbers of scratch. Both should begin at a cache line, since
    a load that spans two counts as two.
    """
    tall, few = tile_counts(n)
    padded = tall * ROWS + few * FEW
    for p in range((width + WIDTH - 1) // WIDTH):
        w_at, first, columns = p * m * WIDTH, column + p * WIDTH, min(WIDTH, width - p * WIDTH)
        for t in range(tall + few):
            row = t * ROWS if t < tall else tall * ROWS + (t - tall) * FEW
            x_at = k * padded + row * m
            if t < tall:
                multiply_tile(packed, x_at, ROWS, weights, w_at, WIDTH, m, tile, 0, WIDTH, False, _ROWS, _VECTORS)
            else:
                multiply_tile(packed, x_at, FEW, weights, w_at, WIDTH, m, tile, 0, WIDTH, False, _FEW, _VECTORS)
            add_tile(tile, out, row, min(ROWS if t < tall else FEW, n - row), first, columns, add)
