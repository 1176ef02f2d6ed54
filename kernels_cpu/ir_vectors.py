"""LLVM vectors as Python values: the few operations that weight decoders are written in.

16 lanes throughout: one register of AVX-512, two of AVX2, four of SSE or NEON. LLVM splits them as the CPU needs, so
one description serves every instruction set.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

LANES = 16
F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)

_FEATURES = llvm.get_host_cpu_features()
# Without these LLVM turns a half conversion into a library call that a JIT process may not have.
HAS_HALF = bool(_FEATURES.get("f16c") or _FEATURES.get("fullfp16") or _FEATURES.get("fp-armv8"))

Value = Any  # llvmlite's ir.Value


def vector(element: ir.Type, lanes: int = LANES) -> ir.Type:
    return ir.VectorType(element, lanes)


def splat(b: ir.IRBuilder, scalar: Value, lanes: int = LANES) -> Value:
    """The scalar in every lane."""
    kind = ir.VectorType(scalar.type, lanes)
    one = b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
    return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(vector(I32, lanes), [0] * lanes))


def constant(element: ir.Type, value: float, lanes: int = LANES) -> Value:
    return ir.Constant(vector(element, lanes), [value] * lanes)


def at(b: ir.IRBuilder, pointer: Value, offset: int | Value) -> Value:
    """A byte pointer moved by an offset in bytes."""
    return b.gep(pointer, [I64(offset) if isinstance(offset, int) else offset], source_etype=I8)


def load(b: ir.IRBuilder, pointer: Value, kind: ir.Type) -> Value:
    """Reads a value of any alignment at a byte pointer."""
    return b.load(b.bitcast(pointer, kind.as_pointer()), align=1)


def store(b: ir.IRBuilder, value: Value, pointer: Value) -> None:
    b.store(value, b.bitcast(pointer, value.type.as_pointer()), align=1)


def load_bytes(b: ir.IRBuilder, pointer: Value, offset: int) -> Value:
    """16 unsigned bytes as 16 int32 lanes."""
    return b.zext(load(b, at(b, pointer, offset), vector(I8)), vector(I32))


def load_byte(b: ir.IRBuilder, pointer: Value, offset: int, signed: bool = False) -> Value:
    """One byte as int32."""
    byte = load(b, at(b, pointer, offset), I8)
    return b.sext(byte, I32) if signed else b.zext(byte, I32)


def bits(b: ir.IRBuilder, value: Value, shift: int, width: int) -> Value:
    """(value >> shift) & (2^width - 1), on an int32 or on int32 lanes."""
    if isinstance(value.type, ir.VectorType):
        lanes = value.type.count
        return b.and_(b.lshr(value, constant(I32, shift, lanes)), constant(I32, 2**width - 1, lanes))
    return b.and_(b.lshr(value, I32(shift)), I32(2**width - 1))


def shift_left(b: ir.IRBuilder, value: Value, shift: int) -> Value:
    if isinstance(value.type, ir.VectorType):
        return b.shl(value, constant(I32, shift, value.type.count))
    return b.shl(value, I32(shift))


def minus(b: ir.IRBuilder, value: Value, amount: int) -> Value:
    if isinstance(value.type, ir.VectorType):
        return b.sub(value, constant(I32, amount, value.type.count))
    return b.sub(value, I32(amount))


def to_float(b: ir.IRBuilder, value: Value) -> Value:
    """Signed integers to float32, lane by lane."""
    return b.sitofp(value, vector(F32, value.type.count) if isinstance(value.type, ir.VectorType) else F32)


def half_to_float(b: ir.IRBuilder, half: Value) -> Value:
    """float16 bits (int16) to float32, a scalar or lane by lane."""
    lanes = half.type.count if isinstance(half.type, ir.VectorType) else 0
    shaped = (lambda t: vector(t, lanes)) if lanes else (lambda t: t)
    if HAS_HALF:
        return b.fpext(b.bitcast(half, shaped(ir.HalfType())), shaped(F32))

    def c(value: int) -> Value:
        return constant(I32, value, lanes) if lanes else I32(value)

    wide = b.zext(half, shaped(I32))
    sign = b.shl(b.and_(wide, c(0x8000)), c(16))
    rest = b.shl(b.and_(wide, c(0x7FFF)), c(13))
    # The exponents differ by 112. Multiplying instead of adding gets subnormals right; infinity and NaN are set apart.
    scaled = b.bitcast(b.fmul(b.bitcast(rest, shaped(F32)), b.bitcast(c(239 << 23), shaped(F32))), shaped(I32))
    special = b.icmp_unsigned(">=", rest, c(0x7C00 << 13))
    magnitude = b.select(special, b.or_(rest, c(0x7F800000)), scaled)
    return b.bitcast(b.or_(sign, magnitude), shaped(F32))


def load_half(b: ir.IRBuilder, pointer: Value, offset: int) -> Value:
    """One float16 as float32."""
    return half_to_float(b, load(b, at(b, pointer, offset), I16))


def multiply_add(b: ir.IRBuilder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z in one rounding where the CPU can."""
    return b.fadd(b.fmul(x, y, flags=("contract",)), z, flags=("contract",))


def horizontal_sum(b: ir.IRBuilder, value: Value) -> Value:
    """Sum of all lanes, halving the vector each time."""
    lanes = value.type.count
    while lanes > 1:
        lanes //= 2
        halves = (ir.Constant(vector(I32, lanes), [i + side * lanes for i in range(lanes)]) for side in range(2))
        low, high = (b.shuffle_vector(value, value, half) for half in halves)
        value = b.fadd(low, high)
    return b.extract_element(value, I32(0))
