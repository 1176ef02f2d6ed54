"""The pieces of a softmax over a row: its maximum, its exponentials and their sum, as vectors."""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .ir_vectors import (
    F32,
    I32,
    I64,
    LANES,
    Value,
    across_lanes,
    at,
    constant,
    for_vectors,
    horizontal_sum,
    into_array,
    like,
    load,
    multiply_add,
    splat,
    store,
    vector,
)


@intrinsic
def row_maximum(typingctx: Any, x: Any, i: Any, begin: Any, end: Any, start: Any) -> Any:
    """The largest of `start` and x[i, begin:end], float32; NaN is passed over, which a compiler may not do unasked."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        x, i, begin, end, start = args
        row, _, _ = into_array(context, b, signature.args[0], x, i, begin)
        n = b.sub(end, begin)
        n = b.select(b.icmp_signed(">", n, I64(0)), n, I64(0))
        high = cgutils.alloca_once_value(b, splat(b, start))

        def larger(old: Value, new: Value) -> Value:
            return b.select(b.fcmp_ordered(">", new, old), new, old)

        whole = b.udiv(n, I64(LANES))
        with cgutils.for_range(b, whole) as loop:
            b.store(larger(b.load(high), load(b, at(b, row, b.mul(loop.index, I64(4 * LANES))), vector(F32))), high)
        with cgutils.for_range_slice(b, b.mul(whole, I64(LANES)), n, I64(1)) as (index, _):
            b.store(larger(b.load(high), splat(b, load(b, at(b, row, b.mul(index, I64(4))), F32))), high)
        return across_lanes(b, b.load(high), larger)

    i64, f32 = types.int64, types.float32
    return f32(x, i64, i64, i64, f32), codegen


def _exp(b: ir.IRBuilder, x: Value) -> Value:
    """e^x, float32 lane by lane, for x up to 88; below -87 it stays at e^-87. Within 2 units in the last place.

    2^n times a polynomial in what is left after splitting off n = round(x / ln 2), as in the Cephes library's expf.
    """

    def c(value: float) -> Value:
        return ir.Constant(x.type, [value] * x.type.count)

    x = b.select(b.fcmp_ordered("<", x, c(-87.0)), c(-87.0), x)  # in this order NaN stays NaN
    x = b.select(b.fcmp_ordered(">", x, c(88.0)), c(88.0), x)
    ints = vector(I32, x.type.count)
    half = b.select(b.fcmp_ordered("<", x, c(0.0)), c(-0.5), c(0.5))
    whole = b.fptosi(multiply_add(b, x, c(1.44269502), half), ints)  # towards zero, so this rounds to the nearest
    n = b.sitofp(whole, x.type)
    r = multiply_add(b, n, c(-0.693359375), x)
    r = multiply_add(b, n, c(2.12194440e-4), r)
    p = c(1.9875691500e-4)
    for k in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
        p = multiply_add(b, p, r, c(k))
    power = b.shl(b.add(whole, like(whole, 127)), like(whole, 23))
    return b.fmul(p, b.bitcast(power, x.type))


def exp_below_zero(b: ir.IRBuilder, x: Value) -> Value:
    """e^x for x <= 0, float32 lane by lane: zero below -88, else within 2e-7 and the rounding of x / ln 2.

    A power of two: what is left after splitting off the whole part lies in (-1, 0], where a polynomial with the least
    relative error takes five steps.
    """
    lanes = x.type.count
    x, low = b.fmul(x, constant(F32, 1.0 / math.log(2.0), lanes)), constant(F32, -127.0, lanes)
    x = b.select(b.fcmp_ordered("<", x, low), low, x)  # in this order NaN stays NaN
    whole = b.fptosi(x, vector(I32, lanes))
    r = b.fsub(x, b.sitofp(whole, x.type))
    p = constant(F32, 9.44903644e-4, lanes)
    for c in (9.20579769e-3, 5.52973598e-2, 2.4018015e-1, 6.93143725e-1, 1.0):
        p = multiply_add(b, p, r, constant(F32, c, lanes))
    power = b.shl(b.add(whole, like(whole, 127)), like(whole, 23))
    return b.fmul(p, b.bitcast(power, x.type))


@intrinsic
def exp(typingctx: Any, x: Any) -> Any:
    """e^x for one float32 x <= 0."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        return b.extract_element(exp_below_zero(b, splat(b, args[0], 1)), I32(0))

    return types.float32(types.float32), codegen


def _exponentials(b: ir.IRBuilder, row: Value, n: Value, high: Value) -> Value:
    """n float32 become e^(x - high), in place; their sum."""
    total = cgutils.alloca_once_value(b, constant(F32, 0.0))
    rest = cgutils.alloca_once_value(b, F32(0.0))

    def turn(index: Value, lanes: int) -> None:
        place = at(b, row, b.mul(index, I64(4)))
        value = exp_below_zero(b, b.fsub(load(b, place, vector(F32, lanes)), splat(b, high, lanes)))
        store(b, value, place)
        value, sums = (value, total) if lanes == LANES else (b.extract_element(value, I32(0)), rest)
        b.store(b.fadd(b.load(sums), value), sums)

    for_vectors(b, n, turn)
    return b.fadd(horizontal_sum(b, b.load(total)), b.load(rest))


@intrinsic
def exp_row(typingctx: Any, x: Any, i: Any, begin: Any, end: Any, high: Any) -> Any:
    """x[i, begin:end] becomes e^(x - high), float32, in place; returns the sum. None is larger than `high`."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        x, i, begin, end, high = args
        row, _, _ = into_array(context, b, signature.args[0], x, i, begin)
        n = b.sub(end, begin)
        return _exponentials(b, row, b.select(b.icmp_signed(">", n, I64(0)), n, I64(0)), high)

    i64, f32 = types.int64, types.float32
    return f32(x, i64, i64, i64, f32), codegen


@intrinsic
def exp_floats(typingctx: Any, where: Any, n: Any, high: Any) -> Any:
    """The same for n float32 at an address."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        return _exponentials(b, b.inttoptr(args[0], cgutils.voidptr_t), args[1], args[2])

    return types.float32(types.int64, types.int64, types.float32), codegen


@intrinsic
def largest_logit(typingctx: Any, where: Any, n: Any) -> Any:
    """The largest of n float32 at an address, among which NaN becomes -inf."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        row = b.inttoptr(args[0], cgutils.voidptr_t)
        highs = {n: cgutils.alloca_once_value(b, constant(F32, -math.inf, n)) for n in (LANES, 1)}

        def larger(old: Value, new: Value) -> Value:
            return b.select(b.fcmp_ordered(">", new, old), new, old)

        def turn(index: Value, lanes: int) -> None:
            place = at(b, row, b.mul(index, I64(4)))
            x = load(b, place, vector(F32, lanes))
            x = b.select(b.fcmp_ordered("ord", x, x), x, constant(F32, -math.inf, lanes))
            store(b, x, place)
            b.store(larger(b.load(highs[lanes]), x), highs[lanes])

        for_vectors(b, args[1], turn)
        return larger(*(across_lanes(b, b.load(high), larger) for high in highs.values()))

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def add_scaled(typingctx: Any, to: Any, source: Any, n: Any, factor: Any, more: Any) -> Any:
    """to = factor * source, or += if `more`, for n float32 at two addresses; products not above 0, or NaN, are 0."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        to, source = (b.inttoptr(a, cgutils.voidptr_t) for a in args[:2])

        def turn(index: Value, lanes: int) -> None:
            place, zero = b.mul(index, I64(4)), constant(F32, 0.0, lanes)
            x = b.fmul(load(b, at(b, source, place), vector(F32, lanes)), splat(b, args[3], lanes))
            old = b.select(args[4], load(b, at(b, to, place), vector(F32, lanes)), zero)
            store(b, b.fadd(old, b.select(b.fcmp_ordered(">", x, zero), x, zero)), at(b, to, place))

        for_vectors(b, args[2], turn)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(i64, i64, i64, types.float32, types.boolean), codegen


@intrinsic
def silu_times_floats(typingctx: Any, gate: Any, up: Any, n: Any) -> Any:
    """gate = silu(gate) * up for n float32 at two addresses, in place (silu(x) = x / (1 + e^-x), arXiv 1702.03118)."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        gate, up = (b.inttoptr(a, cgutils.voidptr_t) for a in args[:2])

        def turn(index: Value, lanes: int) -> None:
            place = b.mul(index, I64(4))
            x, y = (load(b, at(b, pointer, place), vector(F32, lanes)) for pointer in (gate, up))
            one = ir.Constant(x.type, [1.0] * lanes)
            store(b, b.fmul(b.fdiv(x, b.fadd(one, _exp(b, b.fneg(x)))), y), at(b, gate, place))

        for_vectors(b, args[2], turn)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(i64, i64, i64), codegen
