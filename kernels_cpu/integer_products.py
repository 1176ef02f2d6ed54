"""Products of many rows of activations with weights in blocks, on 16-bit integers.

An instruction that adds two products of 16-bit integers to each 32-bit lane does twice the work of a float32
multiply-add. A weight is scale * (q - bias) + minimum, and q - bias, below 256, is taken as it is. Activations are
rounded: x = scale * integer, with a scale for each 32 columns and integers up to 32767, so that the sum of 32 products
fits 32 bits. That sum times both scales is added to float32 totals, which stay in the first cache.

As in `gemm` a tile of a few rows of activations meets two panels of 16 weights, in runs of the inner dimension:
  - Weights are rows of 16 int32 lanes, panels side by side: for each group of columns with one scale, 32 or 16 of them,
    the integers of two columns a lane, the scales, and the minima if there are any (`pairs_function`).
  - Activations are records of 32 columns and the rows of a tile: 16 times two columns a lane, the scales, and three
    sums of the rounded values, of the first half, the second, and both (`pack_words`).
Columns 4 k and 4 k + 2 are a pair, and 4 k + 1 and 4 k + 3: the bytes of a word that a mask separates.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .activations import BLOCK
from .blocks import FORMATS, Panels
from .compiled import callback, kernel
from .gemm import AHEAD, FEW, ROWS, RUN, VECTORS, WIDTH, add_tile, columns_of, number_at, tile_counts, variable
from .ir_vectors import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    WIDE_BYTES,
    Value,
    at,
    bits,
    concatenate,
    constant,
    into_array,
    like,
    load,
    multiply_add,
    part,
    prefetch_line,
    splat,
    store,
    to_float,
    vector,
)
from .isa import has
from .panels import merged
from .pointers import address

HAS_WORDS = WIDE_BYTES  # the same instructions came together
LARGEST = 32767
PAIRS = BLOCK // 2
SCALES, SUMS, BOTH = PAIRS, PAIRS + 1, PAIRS + 3  # rows of a record
RECORD = PAIRS + 4  # numbers of one row of activations

_ROWS, _FEW = (0,) * ROWS, (0,) * FEW


# -- weights -----------------------------------------------------------------------------------------------------------


@functools.cache
def groups_of(name: str) -> tuple[int, bool]:
    """How many columns of a format have one scale, 16 or 32, and whether it has minima."""
    function = ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t]), "nobody's")
    b = ir.IRBuilder(function.append_basic_block())
    group = next(merged(FORMATS[name].decode(b, Panels(b, function.args[0]))))
    return 4 * len(group.q), group.minimum is not None


def _rows_of(columns: int, minimum: bool) -> int:
    """Rows that a group of weights takes."""
    return columns // 2 + 1 + minimum


@intrinsic(prefer_literal=True)
def _decode_pairs(typingctx: Any, name: Any, panel: Any, n: Any, out: Any, out_stride: Any) -> Any:
    f, size = FORMATS[name.literal_value], _rows_of(*groups_of(name.literal_value))

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        _, panel, n, out, stride = args
        words, place = vector(I16, 2 * LANES), variable(b, out)

        def put(value: Value) -> None:
            here = b.load(place)
            store(b, value, here)
            b.store(at(b, here, stride), place)

        with cgutils.for_range(b, n) as loop:
            groups = list(
                merged(f.decode(b, Panels(b, at(b, panel, b.mul(loop.index, I64(LANES * f.dtype.itemsize))))))
            )
            for group in groups:
                for word in group.q:
                    for shift in (0, 8):
                        pair = b.lshr(word, like(word, shift)) if shift else word
                        pair = b.bitcast(b.and_(pair, like(word, 0x00FF00FF)), words)
                        put(b.sub(pair, constant(I16, group.bias, 2 * LANES)))
                put(group.scale)
                if group.minimum is not None:
                    put(group.minimum)
            assert all(_rows_of(4 * len(group.q), group.minimum is not None) == size for group in groups)
        return context.get_dummy_value()

    i, p = types.int64, types.voidptr
    return types.void(name, p, i, p, i), codegen


@functools.cache
def pairs_function(name: str) -> Any:
    """C function (panel, blocks, out, bytes from row to row of out), called as a `decode_function` is."""

    @callback(types.void(types.voidptr, types.int64, types.voidptr, types.int64))
    def decode_pairs(panel, n, out, out_stride):  # type: ignore[no-untyped-def]
        _decode_pairs(name, panel, n, out, out_stride)

    return decode_pairs


# -- activations -------------------------------------------------------------------------------------------------------


@intrinsic
def _pack_blocks(
    typingctx: Any, x: Any, first: Any, last: Any, begin: Any, end: Any, out: Any, out_at: Any, rows: Any
) -> Any:
    """Columns begin ... end - 1, whole blocks, of rows min(first + i, last), i < rows, to records from out[out_at] on.

    rows is a tuple of that length. A block with a value that is not finite has a scale of NaN.
    """
    n_rows = len(rows)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        x, first, last, begin, end, out, out_at, _ = args
        place, lines = number_at(context, b, signature.args[5], out, out_at), []
        for i in range(n_rows):
            row = b.add(first, I64(i))
            row = b.select(b.icmp_signed("<", row, last), row, last)
            lines.append(into_array(context, b, signature.args[0], x, row, begin)[0])
        lines += lines[-1:] * (2 ** (n_rows - 1).bit_length() - n_rows)
        with cgutils.for_range(b, b.sdiv(b.sub(end, begin), I64(BLOCK))) as loop:
            columns = []
            for half in range(2):
                offset = b.add(b.mul(loop.index, I64(4 * BLOCK)), I64(4 * LANES * half))
                columns += columns_of(b, [load(b, at(b, line, offset), vector(F32)) for line in lines])
            record = at(b, place, b.mul(loop.index, I64(4 * RECORD * n_rows)))
            for k, value in enumerate(_record(b, columns)):
                store(b, part(b, value, 0, n_rows), at(b, record, 4 * n_rows * k))
        return context.get_dummy_value()

    i = types.int64
    return types.void(x, i, i, i, i, out, i, rows), codegen


def _record(b: ir.IRBuilder, columns: list[Value]) -> list[Value]:
    """The rows of a record, for 32 columns of float32 whose lanes are rows of activations."""
    lanes = columns[0].type.count
    floats, integers = vector(F32, lanes), vector(I32, lanes)
    sizes = [b.and_(b.bitcast(c, integers), constant(I32, 0x7FFFFFFF, lanes)) for c in columns]
    while len(sizes) > 1:  # floats above 0 are ordered as their bits are, NaN last
        sizes = [b.select(b.icmp_signed(">", u, v), u, v) for u, v in zip(sizes[::2], sizes[1::2], strict=True)]
    finite, size = b.icmp_signed("<", sizes[0], constant(I32, 0x7F800000, lanes)), b.bitcast(sizes[0], floats)
    scale = b.select(finite, b.fdiv(size, constant(F32, LARGEST, lanes)), constant(F32, math.nan, lanes))
    inverse = b.fdiv(constant(F32, LARGEST, lanes), size)
    usable = b.and_(finite, b.fcmp_ordered(">", size, constant(F32, 1e-33, lanes)))  # what is smaller counts as 0
    kind = ir.FunctionType(floats, [floats])
    nearest = cgutils.get_or_insert_function(b.module, kind, f"llvm.rint.v{lanes}f32")
    whole = []
    for column in columns:
        value = b.call(nearest, [b.fmul(column, inverse)])
        whole.append(b.fptosi(b.select(usable, value, constant(F32, 0.0, lanes)), integers))
    halves = [functools.reduce(b.add, whole[i : i + LANES]) for i in (0, LANES)]
    sums = [b.fmul(to_float(b, total), scale) for total in (*halves, b.add(*halves))]
    pairs = ((whole[k + i], whole[k + i + 2]) for k in range(0, BLOCK, 4) for i in range(2))
    return [b.or_(bits(b, u, 0, 16), b.shl(v, like(v, 16))) for u, v in pairs] + [scale, *sums]


@kernel
def pack_words(x, begin, end, packed):  # type: ignore[no-untyped-def]
    """Tiles begin ... end - 1 of x [N, n_in], n_in a multiple of 32, to packed, 1-D float32 of `gemm.packed_size`.

    The tiles, and rows that fill up the last of them, are those of gemm.pack_rows.
    """
    n, n_in = x.shape
    tall, few = tile_counts(n)
    padded = tall * ROWS + few * FEW
    for k in range(0, n_in, RUN):
        size = min(RUN, n_in - k)
        for t in range(begin, end):
            row = t * ROWS if t < tall else tall * ROWS + (t - tall) * FEW
            to = (k * padded + row * size) // BLOCK * RECORD
            if t < tall:
                _pack_blocks(x, row, n - 1, k, k + size, packed, to, _ROWS)
            else:
                _pack_blocks(x, row, n - 1, k, k + size, packed, to, _FEW)


# -- products ----------------------------------------------------------------------------------------------------------


def dot_words(b: ir.IRBuilder, total: Value, x: Value, y: Value) -> Value:
    """total + the sum of two products of signed 16-bit integers, in each of 16 int32 lanes."""
    lanes = LANES if has("avx512vnni", "avx512bw") else 8
    kind = ir.FunctionType(vector(I32, lanes), [vector(I32, lanes)] * 3)
    name = f"llvm.x86.avx512.vpdpwssd.{32 * lanes}"
    function = cgutils.get_or_insert_function(b.module, kind, name)
    parts = ([part(b, v, i, lanes) for v in (total, x, y)] for i in range(0, LANES, lanes))
    return concatenate(b, [b.call(function, arguments) for arguments in parts])


def _multiply_tile(
    b: ir.IRBuilder, x: Value, w: Value, n: Value, tile: Value, rows: int, columns: int, minimum: bool
) -> None:
    vectors, line, wide = range(VECTORS), 4 * rows, 4 * WIDTH

    def places(tile: Value) -> list[list[Value]]:
        return [[at(b, tile, wide * i + 4 * LANES * v) for v in vectors] for i in range(rows)]

    for place in itertools.chain(*places(tile)):
        store(b, constant(F32, 0.0), place)
    sums = [[cgutils.alloca_once(b, vector(I32)) for _ in vectors] for _ in range(rows)]
    groups, size = BLOCK // columns, _rows_of(columns, minimum)
    with cgutils.for_range(b, b.mul(n, I64(groups))) as loop:
        record = at(b, x, b.mul(b.udiv(loop.index, I64(groups)), I64(RECORD * line)))
        part_of_record = b.urem(loop.index, I64(groups))
        first = at(b, record, b.mul(part_of_record, I64(columns // 2 * line)))
        group = at(b, w, b.mul(loop.index, I64(size * wide)))
        for total in itertools.chain(*sums):
            b.store(constant(I32, 0), total)
        # One pair a turn: where LLVM sees sums in a row, it thinks that a product and an addition are quicker.
        with cgutils.for_range(b, I64(columns // 2)) as pairs:
            a, q = at(b, first, b.mul(pairs.index, I64(line))), at(b, group, b.mul(pairs.index, I64(wide)))
            weights = [load(b, at(b, q, 4 * LANES * v), vector(I32)) for v in vectors]
            prefetch_line(b, at(b, a, AHEAD))
            for i in range(rows):
                pair = splat(b, load(b, at(b, a, 4 * i), I32))
                for total, weight in zip(sums[i], weights, strict=True):
                    b.store(dot_words(b, b.load(total), weight, pair), total)

        def of_group(row: int) -> list[Value]:
            return [load(b, at(b, group, wide * row + 4 * LANES * v), vector(F32)) for v in vectors]

        scales, minima = of_group(columns // 2), of_group(columns // 2 + 1) if minimum else []
        sums_at = at(b, record, BOTH * line if groups == 1 else b.mul(b.add(part_of_record, I64(SUMS)), I64(line)))
        # Always the same place, which LLVM must not know: it would keep all totals in registers that are not there.
        for i, row in enumerate(places(at(b, tile, b.lshr(loop.index, I64(48))))):
            scale = splat(b, load(b, at(b, record, SCALES * line + 4 * i), F32))
            for v, place in enumerate(row):
                value = b.fmul(to_float(b, b.load(sums[i][v])), scale)
                value = multiply_add(b, value, scales[v], load(b, place, vector(F32)))
                if minimum:
                    value = multiply_add(b, minima[v], splat(b, load(b, at(b, sums_at, 4 * i), F32)), value)
                store(b, value, place)


@intrinsic(prefer_literal=True)
def _multiply_tiles(typingctx: Any, columns: Any, minimum: Any, x: Any, w: Any, n: Any, tile: Any, rows: Any) -> Any:
    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        _, _, x, w, n, tile, rows = args
        with b.if_else(b.icmp_signed("==", rows, I64(ROWS))) as (tall, few):
            for branch, n_rows in ((tall, ROWS), (few, FEW)):
                with branch:
                    _multiply_tile(b, x, w, n, tile, n_rows, columns.literal_value, bool(minimum.literal_value))
        return context.get_dummy_value()

    i, p = types.int64, types.voidptr
    return types.void(columns, minimum, p, p, i, p, i), codegen


@functools.cache
def tile_function(columns: int, minimum: int) -> Any:
    """C function (records, weights, blocks of 32 columns, tile, rows) for groups as in `groups_of`.

    tile [rows, WIDTH] = their product, for ROWS or FEW rows.
    """

    @callback(types.void(types.voidptr, types.voidptr, types.int64, types.voidptr, types.int64))
    def multiply_tiles(x, w, n, tile, rows):  # type: ignore[no-untyped-def]
        _multiply_tiles(columns, minimum, x, w, n, tile, rows)

    return multiply_tiles


@intrinsic
def _call_tile(typingctx: Any, function: Any, x: Any, w: Any, n: Any, tile: Any, rows: Any) -> Any:
    """Calls a `tile_function` by its address; x, w and tile are addresses too."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        function, x, w, n, tile, rows = args
        p = cgutils.voidptr_t
        kind = ir.FunctionType(ir.VoidType(), [p, p, I64, p, I64])
        x, w, tile = (b.inttoptr(v, p) for v in (x, w, tile))
        b.call(b.inttoptr(function, kind.as_pointer()), [x, w, n, tile, rows])
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i, i, i, i), codegen


@intrinsic
def _prefetch_rows(typingctx: Any, where: Any, stride: Any, rows: Any) -> Any:
    """Asks for WIDTH numbers of each row, to write; the address and the bytes from row to row are given."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        first = b.inttoptr(args[0], cgutils.voidptr_t)
        with cgutils.for_range(b, args[2]) as loop:
            row = at(b, first, b.mul(loop.index, args[1]))
            for v in range(VECTORS):
                prefetch_line(b, at(b, row, 4 * LANES * v), write=True)
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i), codegen


@kernel
def multiply_words(packed, n, k, function, weights, m, tile, out, column, width, add):  # type: ignore[no-untyped-def]
    """gemm.multiply_run for packed from `pack_words` and weights from a `pairs_function`; function: a `tile_function`.

    The weights of VECTORS panels begin m * WIDTH numbers after those before.
    """
    tall, few = tile_counts(n)
    padded = tall * ROWS + few * FEW
    for p in range((width + WIDTH - 1) // WIDTH):
        w_at, first, columns = address(weights) + 4 * p * m * WIDTH, column + p * WIDTH, min(WIDTH, width - p * WIDTH)
        for t in range(tall + few):
            row = t * ROWS if t < tall else tall * ROWS + (t - tall) * FEW
            x_at = address(packed) + (k * padded + row * m) // BLOCK * RECORD * 4
            rows = ROWS if t < tall else FEW
            _prefetch_rows(address(out) + 4 * (row * out.shape[1] + first), 4 * out.shape[1], min(rows, n - row))
            _call_tile(function, x_at, w_at, m // BLOCK, address(tile), rows)
            add_tile(tile, out, row, min(rows, n - row), first, columns, add)
