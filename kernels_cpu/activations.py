"""Activations as the integer dot products want them: two signed bytes, a scale for each 32 columns.

x = scale * (256 * high + low); or, where two products with unsigned bytes must fit 16 bits (see ir_vectors.dot_bytes),
scale * (128 * high + low), high and low in -64 ... 63. The error, 2e-5 or 1e-4 of a typical value, is that of no
weight's quantisation and less than a half-precision cache has.
A block of 32 columns is one record of 96 bytes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .ir_vectors import (
    F32,
    I8,
    I32,
    I64,
    LANES,
    WIDE_BYTES,
    Value,
    across_lanes,
    at,
    constant,
    horizontal_sum,
    into_array,
    like,
    load,
    splat,
    store,
    to_float,
    vector,
)

BLOCK = 32  # columns
RADIX = 8 if WIDE_BYTES else 7  # bits of the low part
LARGEST = (2 ** (RADIX - 1) - 1) * (2**RADIX + 1)

HIGH, LOW, SCALE = 0, 32, 64  # byte offsets in a record
SUMS = 68  # int32 of each half's integers, then float32 of each half's values
WHOLE_SUMS = 84  # the same of all
BLOCK_BYTES = 96


@intrinsic
def quantize(typingctx: Any, x: Any, i: Any, out: Any) -> Any:
    """Row i of float32 x [N, n_in], n_in a multiple of 32, to row i of uint8 out [N, 96 n_in / 32]; C-ordered.

    A block with a value that is not finite has a scale of NaN.
    """

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        x, i, out = args
        row, (_, n), _ = into_array(context, b, signature.args[0], x, i)
        target, _, _ = into_array(context, b, signature.args[2], out, i)
        with cgutils.for_range(b, b.udiv(n, I64(BLOCK))) as loop:
            source = at(b, row, b.mul(loop.index, I64(4 * BLOCK)))
            record = at(b, target, b.mul(loop.index, I64(BLOCK_BYTES)))
            _quantize_block(b, [load(b, at(b, source, 4 * LANES * half), vector(F32)) for half in range(2)], record)
        return context.get_dummy_value()

    return types.void(x, types.int64, out), codegen


def _quantize_block(b: ir.IRBuilder, halves: list[Value], record: Value) -> None:
    zero = constant(F32, 0.0)
    sizes = [b.select(b.fcmp_ordered("<", v, zero), b.fneg(v), v) for v in halves]

    def larger(v: Value, w: Value) -> Value:
        return b.select(b.fcmp_ordered(">", v, w), v, w)

    largest = across_lanes(b, larger(*sizes), larger)
    # Zero times the sum is zero, or NaN if a value is NaN or infinite.
    spoiled = b.fmul(horizontal_sum(b, b.fadd(*halves)), F32(0.0))
    scale = b.fadd(b.fdiv(largest, F32(LARGEST)), spoiled)
    inverse = b.select(b.fcmp_ordered(">", scale, F32(1e-37)), b.fdiv(F32(1.0), scale), F32(0.0))
    store(b, scale, at(b, record, SCALE))
    totals = []
    for half, values in enumerate(halves):
        value = b.fmul(values, splat(b, inverse))
        value = b.fadd(value, b.select(b.fcmp_ordered("<", value, zero), constant(F32, -0.5), constant(F32, 0.5)))
        for limit, sign in ((float(LARGEST), ">"), (float(-LARGEST), "<")):
            bound = constant(F32, limit)
            value = b.select(b.fcmp_unordered(sign, value, bound), bound, value)  # NaN too: it has no integer
        whole = b.fptosi(value, vector(I32))
        for offset, part in zip((HIGH, LOW), split(b, whole), strict=True):
            store(b, b.trunc(part, vector(I8)), at(b, record, offset + LANES * half))
        totals.append(across_lanes(b, whole, b.add))
        _store_sums(b, totals[half], scale, at(b, record, SUMS + 4 * half), at(b, record, SUMS + 8 + 4 * half))
    _store_sums(b, b.add(*totals), scale, at(b, record, WHOLE_SUMS), at(b, record, WHOLE_SUMS + 4))


def split(b: ir.IRBuilder, whole: Value) -> tuple[Value, Value]:
    """High and low parts of integers, each in as many bits as these."""
    high = b.ashr(b.add(whole, like(whole, 1 << (RADIX - 1))), like(whole, RADIX))
    return high, b.sub(whole, b.shl(high, like(high, RADIX)))


def _store_sums(b: ir.IRBuilder, total: Value, scale: Value, whole: Value, exact: Value) -> None:
    store(b, total, whole)
    store(b, b.fmul(to_float(b, total), scale), exact)
