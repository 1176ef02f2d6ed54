"""Panels of 16 rows as kernels see them: interleaving, dot products and decoding, compiled for each block format.

A dot product works on integers, four columns an instruction where the CPU can, and on activations in 14 or 16 bits (see
`activations`): the weights are what memory must deliver, and no arithmetic may take longer than that.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .activations import BLOCK, BLOCK_BYTES, HIGH, LOW, RADIX, SCALE, SUMS, WHOLE_SUMS
from .blocks import FORMATS, MASK, Format, Group, Panels
from .compiled import callback
from .ir_vectors import (
    F32,
    I32,
    I64,
    LANES,
    Value,
    at,
    bits,
    dot_bytes,
    like,
    load,
    minus,
    multiply_add,
    prefetch,
    splat,
    store,
    to_float,
    vector,
)

COLUMNS = 8  # of a weight without blocks, in one turn


def layout(f: Format) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each byte of a block of 16 rows comes from: row and byte, int32; and where its masks begin, int32."""
    rows, places, masks, begin = [], [], [], 0
    for size, unit in f.units:
        if unit == MASK:
            masks.append(LANES * begin)
            unit = MASK // 8
        for first, row in itertools.product(range(begin, begin + size, unit), range(LANES)):
            rows += [row] * unit
            places += range(first, first + unit)
        begin += size
    return np.array(rows, np.int32), np.array(places, np.int32), np.array(masks, np.int32)


def merged(groups: Iterator[Group]) -> Iterator[Group]:
    """Groups of one scale within a block of activations become one, so that the scale is applied once."""
    for _, run in itertools.groupby(groups, lambda g: (id(g.scale), id(g.minimum), g.start // BLOCK)):
        same = list(run)
        yield same[0]._replace(q=[word for group in same for word in group.q])


def dot_blocks(b: ir.IRBuilder, f: Format, rows: Panels, x: list[Value], totals: list[Value]) -> None:
    """Adds the product of one block of 16 rows and each row of activations x to the totals."""
    for group in merged(f.decode(b, rows)):
        half = None if len(group.q) == BLOCK // 4 else group.start % BLOCK // LANES
        for row, total in zip(x, totals, strict=True):
            block = at(b, row, group.start // BLOCK * BLOCK_BYTES)
            high = low = like(group.q[0], 0)
            for k, word in enumerate(group.q):
                place = group.start % BLOCK + 4 * k
                high = dot_bytes(b, high, word, splat(b, load(b, at(b, block, HIGH + place), I32)))
                low = dot_bytes(b, low, word, splat(b, load(b, at(b, block, LOW + place), I32)))
            dot = b.add(b.shl(high, like(high, RADIX)), low)
            whole, exact = (SUMS + 4 * half, SUMS + 8 + 4 * half) if half is not None else (WHOLE_SUMS, WHOLE_SUMS + 4)
            if group.bias:
                sum_x = load(b, at(b, block, whole), I32)
                dot = b.sub(dot, splat(b, b.mul(sum_x, I32(group.bias))))
            scale = b.fmul(group.scale, splat(b, load(b, at(b, block, SCALE), F32)))
            value = multiply_add(b, to_float(b, dot), scale, b.load(total))
            if group.minimum is not None:
                value = multiply_add(b, group.minimum, splat(b, load(b, at(b, block, exact), F32)), value)
            b.store(value, total)


def _dot(b: ir.IRBuilder, f: Format, panel: Value, n: Value, x: list[Value]) -> list[Value]:
    """A panel of n blocks times each row of activations."""
    zero = ir.Constant(vector(F32), [0.0] * LANES)
    if f.length > 1:
        totals = [cgutils.alloca_once_value(b, zero) for _ in x]
        with cgutils.for_range(b, n) as loop:
            rows = [at(b, row, b.mul(loop.index, I64(f.length // BLOCK * BLOCK_BYTES))) for row in x]
            block = at(b, panel, b.mul(loop.index, I64(LANES * f.dtype.itemsize)))
            prefetch(b, block, LANES * f.dtype.itemsize)
            dot_blocks(b, f, Panels(b, block), rows, totals)
        return [b.load(total) for total in totals]

    chains = 2  # of sums for each row, because a multiply-add takes four cycles; the same however many rows there are
    totals = [cgutils.alloca_once_value(b, zero) for _ in range(chains * len(x))]

    def column(index: Value, chain: int) -> None:
        (group,) = f.decode(b, Panels(b, at(b, panel, b.mul(index, I64(LANES * f.dtype.itemsize)))))
        for i, row in enumerate(x):
            total = totals[i * chains + chain % chains]
            value = splat(b, load(b, at(b, row, b.mul(index, I64(4))), F32))
            b.store(multiply_add(b, group.q, value, b.load(total)), total)

    whole = b.udiv(n, I64(COLUMNS))
    with cgutils.for_range(b, whole) as loop:
        size = COLUMNS * LANES * f.dtype.itemsize
        prefetch(b, at(b, panel, b.mul(loop.index, I64(size))), size)
        for c in range(COLUMNS):
            column(b.add(b.mul(loop.index, I64(COLUMNS)), I64(c)), c)
    with cgutils.for_range_slice(b, b.mul(whole, I64(COLUMNS)), n, I64(1)) as (index, _):
        column(index, 0)
    found = []
    for i in range(len(x)):
        value = b.load(totals[i * chains])
        for total in totals[i * chains + 1 : (i + 1) * chains]:
            value = b.fadd(value, b.load(total))
        found.append(value)
    return found


@intrinsic(prefer_literal=True)
def _dot_panel(
    typingctx: Any, name: Any, rows: Any, panel: Any, n: Any, x: Any, x_stride: Any, out: Any, out_stride: Any
) -> Any:
    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        _, _, panel, n, x, x_stride, out, out_stride = args
        x_rows = [at(b, x, b.mul(x_stride, I64(i))) for i in range(rows.literal_value)]
        for i, value in enumerate(_dot(b, FORMATS[name.literal_value], panel, n, x_rows)):
            store(b, value, at(b, out, b.mul(out_stride, I64(i))))
        return context.get_dummy_value()

    i, p = types.int64, types.voidptr
    return types.void(name, rows, p, i, p, i, p, i), codegen


@functools.cache
def panel_function(name: str, rows: int) -> Any:
    """C function (panel, blocks, x, bytes from row to row of x, out, the same of out) for a few rows of x at once.

    Writes 16 float32 of each row: the panel's product with activations of `activations`, or with float32 ones if the
    format has no blocks.
    """

    @callback(types.void(types.voidptr, types.int64, types.voidptr, types.int64, types.voidptr, types.int64))
    def dot_panel(panel, n, x, x_stride, out, out_stride):  # type: ignore[no-untyped-def]
        _dot_panel(name, rows, panel, n, x, x_stride, out, out_stride)

    return dot_panel


@intrinsic
def call_panel(
    typingctx: Any, function: Any, panel: Any, n: Any, x: Any, x_stride: Any, out: Any, out_stride: Any
) -> Any:
    """Calls a `panel_function` by its address; panel, x and out are addresses too."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        function, panel, n, x, x_stride, out, out_stride = args
        p = cgutils.voidptr_t
        kind = ir.FunctionType(ir.VoidType(), [p, I64, p, I64, p, I64])
        panel, x, out = (b.inttoptr(v, p) for v in (panel, x, out))
        b.call(b.inttoptr(function, kind.as_pointer()), [panel, n, x, x_stride, out, out_stride])
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i, i, i, i, i), codegen


@intrinsic(prefer_literal=True)
def _decode_panel(typingctx: Any, name: Any, panel: Any, n: Any, out: Any, out_stride: Any) -> Any:
    f = FORMATS[name.literal_value]

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        _, panel, n, out, stride = args
        with cgutils.for_range(b, n) as loop:
            first = at(b, out, b.mul(b.mul(loop.index, I64(f.length)), stride))
            for group in f.decode(b, Panels(b, at(b, panel, b.mul(loop.index, I64(LANES * f.dtype.itemsize))))):
                if group.scale is None:
                    store(b, group.q, first)
                    continue
                for k, byte in itertools.product(range(LANES // 4), range(4)):
                    q = minus(b, bits(b, group.q[k], 8 * byte, 8), group.bias)
                    value = b.fmul(to_float(b, q), group.scale)
                    if group.minimum is not None:
                        value = b.fadd(value, group.minimum)
                    store(b, value, at(b, first, b.mul(stride, I64(group.start + 4 * k + byte))))
        return context.get_dummy_value()

    i, p = types.int64, types.voidptr
    return types.void(name, p, i, p, i), codegen


@functools.cache
def decode_function(name: str) -> Any:
    """C function (panel, blocks, out, bytes from row to row of out): the blocks as float32, transposed.

    Row k of out is column k of the weight, for the panel's 16 rows.
    """

    @callback(types.void(types.voidptr, types.int64, types.voidptr, types.int64))
    def decode_panel(panel, n, out, out_stride):  # type: ignore[no-untyped-def]
        _decode_panel(name, panel, n, out, out_stride)

    return decode_panel


@intrinsic
def call_decode(typingctx: Any, function: Any, panel: Any, n: Any, out: Any, out_stride: Any) -> Any:
    """Calls a `decode_function` by its address; panel and out are addresses too."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        function, panel, n, out, stride = args
        p = cgutils.voidptr_t
        kind = ir.FunctionType(ir.VoidType(), [p, I64, p, I64])
        b.call(b.inttoptr(function, kind.as_pointer()), [b.inttoptr(panel, p), n, b.inttoptr(out, p), stride])
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i, i, i), codegen
