"""Rows of blocks as kernels see them: decoding, compiled to explicit vectors for each block format.

A row is a row of a weight, or the keys or values of one cached token: both lie in memory as blocks.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .blocks import BY_RECORD, FORMATS, Format, Group, Rows
from .ir_vectors import (
    F32,
    I64,
    LANES,
    Value,
    at,
    float_to_half,
    into_array,
    load,
    minus,
    splat,
    store,
    to_float,
    vector,
)
from .quantise import encoder


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
    if group.scale is None:
        return group.q
    value = b.fmul(to_float(b, minus(b, group.q, group.bias)), splat(b, group.scale, lanes))
    return value if group.minimum is None else b.fadd(value, splat(b, group.minimum, lanes))


@intrinsic
def encode_row(typingctx: Any, cache: Any, b: Any, h: Any, slot: Any, x: Any, i: Any) -> Any:
    """cache[b, h, slot] = row x[i, h] of float32 x [N, H, d]: cache [B, H, slots, blocks]."""
    f = BY_RECORD[cache.dtype]
    encode = encoder(f)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        cache, seq, head, slot, x, i = args
        target, _, _ = into_array(context, b, signature.args[0], cache, seq, head, slot)
        source, (_, _, d), _ = into_array(context, b, signature.args[4], x, i, head)

        def put(index: Value, lanes: int) -> None:
            value = load(b, at(b, source, b.mul(index, I64(4))), vector(F32, lanes))
            value = float_to_half(b, value) if f is FORMATS["F16"] else value
            store(b, value, at(b, target, b.mul(index, I64(f.dtype.itemsize))))

        if encode is not None:
            with cgutils.for_range(b, b.udiv(d, I64(f.length))) as loop:
                block = at(b, target, b.mul(loop.index, I64(f.dtype.itemsize)))
                encode(b, at(b, source, b.mul(loop.index, I64(4 * f.length))), block)
            return context.get_dummy_value()
        whole = b.udiv(d, I64(LANES))
        with cgutils.for_range(b, whole) as loop:
            put(b.mul(loop.index, I64(LANES)), LANES)
        with cgutils.for_range_slice(b, b.mul(whole, I64(LANES)), d, I64(1)) as (index, _):
            put(index, 1)
        return context.get_dummy_value()

    n = types.int64
    return types.void(cache, n, n, n, x, n), codegen
