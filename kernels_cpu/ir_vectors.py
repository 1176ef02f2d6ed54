"""LLVM vectors as Python values: the few operations that weight decoders are written in.

16 lanes throughout: one register of AVX-512, two of AVX2, four of SSE or NEON. LLVM splits them as the CPU needs, so
one description serves every instruction set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba.core import cgutils

LANES = 16
F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)

_FEATURES = llvm.get_host_cpu_features()
# Without these LLVM turns a half conversion into a library call that a JIT process may not have. A user may have told
# Numba to compile for another CPU than this one.
_OTHER_CPU = bool(numba.config.CPU_NAME or numba.config.CPU_FEATURES)
HAS_HALF = not _OTHER_CPU and bool(_FEATURES.get("f16c") or _FEATURES.get("fullfp16") or _FEATURES.get("fp-armv8"))

# A shuffle of 16 bytes by 16 indices has no word of its own in LLVM.
SHUFFLE = (
    "llvm.x86.ssse3.pshuf.b.128"
    if _FEATURES.get("ssse3") and not _OTHER_CPU
    else "llvm.aarch64.neon.tbl1.v16i8"
    if _FEATURES.get("neon") and not _OTHER_CPU
    else ""
)

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


def into_array(context: Any, b: ir.IRBuilder, kind: Any, array: Value, *indices: Value) -> tuple[Value, Any, Any]:
    """Byte pointer to array[indices] of a Numba array, with the array's shape and its strides in bytes."""
    a = context.make_array(kind)(context, b, array)
    shape, strides = cgutils.unpack_tuple(b, a.shape), cgutils.unpack_tuple(b, a.strides)
    pointer = b.bitcast(a.data, cgutils.voidptr_t)
    for index, stride in zip(indices, strides, strict=False):
        pointer = at(b, pointer, b.mul(index, stride))
    return pointer, shape, strides


def load(b: ir.IRBuilder, pointer: Value, kind: ir.Type) -> Value:
    """Reads a value of any alignment at a byte pointer."""
    return b.load(b.bitcast(pointer, kind.as_pointer()), align=1)


def store(b: ir.IRBuilder, value: Value, pointer: Value) -> None:
    b.store(value, b.bitcast(pointer, value.type.as_pointer()), align=1)


def bits(b: ir.IRBuilder, value: Value, shift: int, width: int) -> Value:
    """(value >> shift) & (2^width - 1) of int32 numbers."""
    return each(lambda v: b.and_(b.lshr(v, like(v, shift)), like(v, 2**width - 1)), value)


def join(b: ir.IRBuilder, low: Value, high: Value, shift: int) -> Value:
    """low | high << shift of int32 numbers."""
    return each(lambda v, w: b.or_(v, b.shl(w, like(w, shift))), low, high)


def minus(b: ir.IRBuilder, value: Value, amount: int) -> Value:
    return each(lambda v: b.sub(v, like(v, amount)), value)


def to_float(b: ir.IRBuilder, value: Value) -> Value:
    """Signed integers to float32."""
    return each(lambda v: b.sitofp(v, vector(F32, v.type.count) if isinstance(v.type, ir.VectorType) else F32), value)


def look_up(b: ir.IRBuilder, table: Sequence[int], index: Value) -> Value:
    """table[index] of 16 signed bytes, for int32 indices below 16: int32."""

    def one(index: Value) -> Value:
        if SHUFFLE:
            bytes16 = ir.VectorType(I8, LANES)
            kind = ir.FunctionType(bytes16, [bytes16, bytes16])
            shuffle = cgutils.get_or_insert_function(b.module, kind, SHUFFLE)
            return b.sext(b.call(shuffle, [ir.Constant(bytes16, list(table)), b.trunc(index, bytes16)]), index.type)
        values = [like(index, value) for value in table]
        for bit in range(4):
            odd = b.icmp_signed("!=", bits(b, index, bit, 1), like(index, 0))
            values = [b.select(odd, values[i + 1], values[i]) for i in range(0, len(values), 2)]
        return values[0]

    return each(one, index)


def each(operation: Callable[..., Value], *values: Value) -> Value:
    """The operation on values, or on each item of lists of them."""
    if isinstance(values[0], list):
        return [operation(*items) for items in zip(*values, strict=True)]
    return operation(*values)


def like(value: Value, number: int) -> Value:
    """The number as a constant of the value's type."""
    if isinstance(value.type, ir.VectorType):
        return ir.Constant(value.type, [number] * value.type.count)
    return value.type(number)


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
