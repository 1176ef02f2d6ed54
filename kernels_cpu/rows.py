"""Rows of blocks as kernels see them: dot product and decoding, compiled to explicit vectors for each block format.

A row is a row of a weight, or the keys or values of one cached token: both lie in memory as blocks.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .blocks import BY_RECORD, Format, Group, Rows
from .ir_vectors import (
    F32,
    I32,
    I64,
    LANES,
    Value,
    at,
    horizontal_sum,
    into_array,
    load,
    multiply_add,
    splat,
    store,
    vector,
)


def _for_groups(b: ir.IRBuilder, f: Format, row: Value, n_blocks: Value, use: Any) -> None:
    """Loops over a row, calling use(group, index of the group's first weight, lanes) for every group in it."""
    step = LANES if f.length == 1 else 1  # blocks per turn
    whole = b.udiv(n_blocks, I64(step))
    with cgutils.for_range(b, whole) as loop:
        first = b.mul(loop.index, I64(step))
        for group in f.decode(b, Rows(b, at(b, row, b.mul(first, I64(f.dtype.itemsize))))):
            use(group, b.add(b.mul(first, I64(f.length)), I64(group.start)), LANES)
    if step > 1:
        with cgutils.for_range_slice(b, b.mul(whole, I64(step)), n_blocks, I64(1)) as (index, _):
            for group in f.decode(b, Rows(b, at(b, row, b.mul(index, I64(f.dtype.itemsize))), lanes=1)):
                use(group, index, 1)


@intrinsic
def dot_row(typingctx: Any, w: Any, r: Any, x: Any, i: Any) -> Any:
    """float32 dot product of row r of w [rows, blocks] with row i of float32 x [N, n_in], both C-ordered."""
    f = BY_RECORD[w.dtype]

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        row, (_, n_blocks), _ = into_array(context, b, signature.args[0], args[0], args[1])
        x_row, _, _ = into_array(context, b, signature.args[2], args[2], args[3])
        sums = [cgutils.alloca_once_value(b, ir.Constant(vector(F32), [0.0] * LANES)) for _ in range(4)]
        tail = cgutils.alloca_once_value(b, ir.Constant(vector(F32, 1), [0.0]))
        turn = 0

        def use(group: Group, index: Value, lanes: int) -> None:
            nonlocal turn
            total = sums[turn % len(sums)] if lanes == LANES else tail
            turn += 1
            xs = load(b, at(b, x_row, b.mul(index, I64(4))), vector(F32, lanes))
            value = b.load(total)
            if group.scale is None:
                value = multiply_add(b, group.q, xs, value)
            elif group.minimum is None:
                value = multiply_add(b, b.fmul(group.q, xs), splat(b, group.scale), value)
            else:
                weights = multiply_add(b, group.q, splat(b, group.scale), splat(b, group.minimum))
                value = multiply_add(b, weights, xs, value)
            b.store(value, total)

        _for_groups(b, f, row, n_blocks, use)
        lanes = b.fadd(b.fadd(b.load(sums[0]), b.load(sums[1])), b.fadd(b.load(sums[2]), b.load(sums[3])))
        return b.fadd(horizontal_sum(b, lanes), b.extract_element(b.load(tail), I32(0)))

    return types.float32(w, types.int64, x, types.int64), codegen


@intrinsic
def decode_row(typingctx: Any, w: Any, r: Any, out: Any, i: Any) -> Any:
    """Writes row r of w [rows, blocks] as float32 to row i of out [N, n_in], both C-ordered."""
    f = BY_RECORD[w.dtype]

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        row, (_, n_blocks), _ = into_array(context, b, signature.args[0], args[0], args[1])
        out_row, _, _ = into_array(context, b, signature.args[2], args[2], args[3])

        def use(group: Group, index: Value, lanes: int) -> None:
            store(b, weights_of(b, group, lanes), at(b, out_row, b.mul(index, I64(4))))

        _for_groups(b, f, row, n_blocks, use)
        return context.get_dummy_value()

    return types.void(w, types.int64, out, types.int64), codegen


def weights_of(b: ir.IRBuilder, group: Group, lanes: int) -> Value:
    """The group's weights, rounded after the product and after the sum as ggml does."""
    value = group.q
    if group.scale is not None:
        value = b.fmul(value, splat(b, group.scale, lanes))
    if group.minimum is not None:
        value = b.fadd(value, splat(b, group.minimum, lanes))
    return value
