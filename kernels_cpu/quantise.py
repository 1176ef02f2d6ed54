"""Numbers into blocks of a quantised cache, as `minirt.stores.blocks` makes them."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba.core import cgutils

from .blocks import Format
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
    constant,
    float_to_half,
    like,
    load,
    splat,
    store,
    to_float,
    vector,
)

Encoder = Callable[[ir.IRBuilder, Value, Value], None]  # (builder, 32 float32 at a pointer, the block's pointer)


def _numbers(b: ir.IRBuilder, source: Value) -> list[Value]:
    return [load(b, at(b, source, 4 * LANES * i), vector(F32)) for i in range(2)]


def _magnitudes(b: ir.IRBuilder, x: list[Value]) -> tuple[list[Value], Value]:
    """Bits of |x|, which are in the order of |x| with NaN above all; and the largest of all."""
    bits = [b.and_(b.bitcast(v, vector(I32)), constant(I32, 0x7FFFFFFF)) for v in x]

    def larger(u: Value, v: Value) -> Value:
        return b.select(b.icmp_signed(">", u, v), u, v)

    return bits, across_lanes(b, larger(*bits), larger)


def _divided(b: ir.IRBuilder, x: list[Value], scale: Value) -> list[Value]:
    """x / scale; 0 where that is no number or beyond all that a block holds."""
    zero, limit = constant(F32, 0.0), constant(F32, 256.0)
    inverse = b.select(b.fcmp_ordered("==", scale, F32(0.0)), F32(0.0), b.fdiv(F32(1.0), scale))
    q = [b.fmul(v, splat(b, inverse)) for v in x]
    inside = [b.and_(b.fcmp_ordered("<", v, limit), b.fcmp_ordered(">", v, b.fneg(limit))) for v in q]
    return [b.select(ok, v, zero) for ok, v in zip(inside, q, strict=True)]


def _put_scale(b: ir.IRBuilder, scale: Value, block: Value) -> None:
    store(b, float_to_half(b, splat(b, scale, 1)), block)


def _q8_0(b: ir.IRBuilder, source: Value, block: Value) -> None:
    x = _numbers(b, source)
    scale = b.fdiv(b.bitcast(_magnitudes(b, x)[1], F32), F32(127.0))
    _put_scale(b, scale, block)
    for i, q in enumerate(_divided(b, x, scale)):
        whole = b.fptosi(q, vector(I32))
        rest = b.fsub(q, to_float(b, whole))  # a half goes away from zero
        up, down = b.fcmp_ordered(">=", rest, constant(F32, 0.5)), b.fcmp_ordered("<=", rest, constant(F32, -0.5))
        whole = b.sub(b.add(whole, b.zext(up, whole.type)), b.zext(down, whole.type))
        store(b, b.trunc(whole, vector(I8)), at(b, block, 2 + LANES * i))


def _q4_0(b: ir.IRBuilder, source: Value, block: Value) -> None:
    x = _numbers(b, source)
    bits, most = _magnitudes(b, x)
    equal = [b.zext(b.bitcast(b.icmp_signed("==", v, splat(b, most)), I16), I32) for v in bits]
    first = b.cttz(b.or_(equal[0], b.shl(equal[1], I32(LANES))), cgutils.true_bit)  # of those that are as large
    scale = b.fdiv(load(b, at(b, source, b.mul(b.zext(first, I64), I64(4))), F32), F32(-8.0))
    _put_scale(b, scale, block)
    low, high = (b.fptosi(b.fadd(q, constant(F32, 8.5)), vector(I32)) for q in _divided(b, x, scale))
    low, high = (b.select(b.icmp_signed("<", q, like(q, 15)), q, like(q, 15)) for q in (low, high))
    store(b, b.trunc(b.or_(low, b.shl(high, like(high, 4))), vector(I8)), at(b, block, 2))


_ENCODERS = {"q8_0": _q8_0, "q4_0": _q4_0}


def encoder(f: Format) -> Encoder | None:
    """What makes a block of this format; None if its items are plain numbers."""
    (name,) = f.dtype.names or ("",)
    return _ENCODERS.get(name.removesuffix("_plain"))
