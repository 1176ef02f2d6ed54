"""LLVM vectors as Python values: the few operations that weight decoders are written in.

16 lanes throughout: one register of AVX-512, two of AVX2, four of SSE or NEON. LLVM splits them as the CPU needs, so
one description serves every instruction set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from .isa import X86, has

LANES = 16
F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)

# Without these LLVM turns a half conversion into a library call that a JIT process may not have.
HAS_HALF = has("f16c") or has("fullfp16") or has("fp-armv8")

# Whether a product of bytes is added to 32 bits at once (see dot_bytes).
WIDE_BYTES = has("avx512vnni", "avx512bw") or has("avxvnni")

# A shuffle of 16 bytes by 16 indices has no word of its own in LLVM.
SHUFFLE = "llvm.x86.ssse3.pshuf.b.128" if has("ssse3") else "llvm.aarch64.neon.tbl1.v16i8" if has("neon") else ""

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


NEAR, FAR = 512, 4096  # bytes ahead: to the first cache, to the second


def prefetch(b: ir.IRBuilder, pointer: Value, size: int) -> None:
    """Asks for the memory that a loop will read soon, which now reads `size` bytes at the pointer.

    A core follows a stream on its own, but not far enough ahead to use the memory fully; it has few places to wait for
    lines of the first cache, so what is far away goes to the second.
    """
    for ahead, cache in ((NEAR, 1), (FAR, 2)):
        for offset in range(ahead, ahead + size, 64):
            prefetch_line(b, at(b, pointer, offset), cache)


def prefetch_line(b: ir.IRBuilder, pointer: Value, cache: int = 1, write: bool = False) -> None:
    """Asks for one line of memory, to the first or the second cache, to be read or written. It may lie anywhere."""
    kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, I32, I32, I32])
    function = b.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], kind)
    b.call(function, [b.bitcast(pointer, cgutils.voidptr_t), I32(int(write)), I32(4 - cache), I32(1)])  # 1: data


def for_vectors(b: ir.IRBuilder, n: Value, turn: Callable[[Value, int], None]) -> None:
    """Loops over n items: turn(index of the first, 16), then turn(index, 1) for those left over."""
    whole = b.udiv(n, I64(LANES))
    with cgutils.for_range(b, whole) as loop:
        turn(b.mul(loop.index, I64(LANES)), LANES)
    with cgutils.for_range_slice(b, b.mul(whole, I64(LANES)), n, I64(1)) as (index, _):
        turn(index, 1)


def bits(b: ir.IRBuilder, value: Value, shift: int, width: int) -> Value:
    """(value >> shift) & (2^width - 1) of int32 numbers."""
    return b.and_(b.lshr(value, like(value, shift)) if shift else value, like(value, 2**width - 1))


def join(b: ir.IRBuilder, low: Value, high: Value, shift: int) -> Value:
    """low | high << shift of int32 numbers."""
    return b.or_(low, b.shl(high, like(high, shift)))


def minus(b: ir.IRBuilder, value: Value, amount: int) -> Value:
    return b.sub(value, like(value, amount)) if amount else value


def to_float(b: ir.IRBuilder, value: Value) -> Value:
    """Signed integers to float32."""
    return b.sitofp(value, vector(F32, value.type.count) if isinstance(value.type, ir.VectorType) else F32)


def look_up(b: ir.IRBuilder, table: Sequence[int], index: Value) -> Value:
    """table[index] of 16 unsigned bytes, for int32 indices below 16: int32."""
    if SHUFFLE:
        bytes16 = ir.VectorType(I8, LANES)
        shuffle = cgutils.get_or_insert_function(b.module, ir.FunctionType(bytes16, [bytes16, bytes16]), SHUFFLE)
        return b.zext(b.call(shuffle, [ir.Constant(bytes16, list(table)), b.trunc(index, bytes16)]), index.type)
    values = [like(index, value) for value in table]
    for bit in range(4):
        odd = b.icmp_signed("!=", bits(b, index, bit, 1), like(index, 0))
        values = [b.select(odd, values[i + 1], values[i]) for i in range(0, len(values), 2)]
    return values[0]


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


def float_to_half(b: ir.IRBuilder, value: Value) -> Value:
    """A float32 vector to float16 bits (int16), to the nearest, ties to even; too large becomes infinite."""
    lanes = value.type.count
    if HAS_HALF:
        return b.bitcast(b.fptrunc(value, vector(ir.HalfType(), lanes)), vector(I16, lanes))

    def c(number: int) -> Value:
        return constant(I32, number, lanes)

    whole = b.bitcast(value, vector(I32, lanes))
    sign, rest = b.and_(b.lshr(whole, c(16)), c(0x8000)), b.and_(whole, c(0x7FFFFFFF))
    odd = b.and_(b.lshr(rest, c(13)), c(1))
    normal = b.lshr(b.add(b.add(rest, c(0xFFF - (112 << 23))), odd), c(13))
    # Below the smallest normal half, adding 0.5 moves the mantissa to where a half has it, rounded.
    moved = b.fadd(b.bitcast(rest, vector(F32, lanes)), constant(F32, 0.5, lanes))
    small = b.sub(b.bitcast(moved, vector(I32, lanes)), c(126 << 23))
    large = b.select(b.icmp_unsigned(">", rest, c(0x7F800000)), c(0x7E00), c(0x7C00))
    found = b.select(b.icmp_unsigned("<", rest, c(113 << 23)), small, normal)
    found = b.select(b.icmp_unsigned(">=", rest, c(143 << 23)), large, found)
    return b.trunc(b.or_(sign, found), vector(I16, lanes))


def multiply_add(b: ir.IRBuilder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z in one rounding where the CPU can."""
    return b.fadd(b.fmul(x, y, flags=("contract",)), z, flags=("contract",))


def across_lanes(b: ir.IRBuilder, value: Value, join: Callable[[Value, Value], Value]) -> Value:
    """All lanes joined into one number, halving the vector each time."""
    lanes = value.type.count
    while lanes > 1:
        lanes //= 2
        value = join(part(b, value, 0, lanes), part(b, value, lanes, lanes))
    return b.extract_element(value, I32(0))


def horizontal_sum(b: ir.IRBuilder, value: Value) -> Value:
    """Sum of all lanes."""
    return across_lanes(b, value, b.fadd)


def part(b: ir.IRBuilder, value: Value, first: int, count: int) -> Value:
    """Lanes first ... first + count - 1."""
    return b.shuffle_vector(value, value, ir.Constant(vector(I32, count), list(range(first, first + count))))


def concatenate(b: ir.IRBuilder, parts: list[Value]) -> Value:
    """Vectors one after the other; their number is a power of two."""
    while len(parts) > 1:
        lanes = ir.Constant(vector(I32, 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
        parts = [b.shuffle_vector(x, y, lanes) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def dot_bytes(b: ir.IRBuilder, total: Value, q: Value, x: Value) -> Value:
    """total + the sum of four products in each of 16 int32 lanes: q holds 4 unsigned bytes, x 4 signed ones.

    Unless WIDE_BYTES, x lies in -64 ... 63, so that two products fit the signed 16 bits of AVX2's multiply-add.
    """

    def call(name: str, result: ir.Type, *args: Value) -> Value:
        kind = ir.FunctionType(result, [a.type for a in args])
        return b.call(cgutils.get_or_insert_function(b.module, kind, name), list(args))

    def in_parts(lanes: int, one: Callable[[Value, Value, Value], Value]) -> Value:
        return concatenate(b, [one(*(part(b, v, i, lanes) for v in (total, q, x))) for i in range(0, LANES, lanes)])

    def multiply_add_pairs(lanes: int, bytes_name: str, words_name: str) -> Callable[[Value, Value, Value], Value]:
        """Products of bytes are added in pairs to 16 bits, and these in pairs to 32."""
        eights, sixteens, whole = vector(I8, 4 * lanes), vector(I16, 2 * lanes), vector(I32, lanes)

        def one(t: Value, q: Value, x: Value) -> Value:
            pairs = call(bytes_name, sixteens, b.bitcast(q, eights), b.bitcast(x, eights))
            return b.add(t, call(words_name, whole, pairs, constant(I16, 1, 2 * lanes)))

        return one

    if has("avx512vnni", "avx512bw"):
        return call("llvm.x86.avx512.vpdpbusd.512", total.type, total, q, x)
    if has("avxvnni"):
        return in_parts(8, lambda t, q, x: call("llvm.x86.avx512.vpdpbusd.256", t.type, t, q, x))
    if has("avx512bw"):
        names = "llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"
        return multiply_add_pairs(LANES, *names)(total, q, x)
    if has("avx2"):
        return in_parts(8, multiply_add_pairs(8, "llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"))
    if has("dotprod"):
        eights = vector(I8)
        name, limit = "llvm.aarch64.neon.udot.v4i32.v16i8", constant(I8, 64)

        def unsigned(t: Value, q: Value, x: Value) -> Value:
            # x + 64 is unsigned, and 64 times the sum of q comes off again.
            q, x = b.bitcast(q, eights), b.add(b.bitcast(x, eights), limit)
            return b.sub(call(name, t.type, t, q, x), call(name, t.type, like(t, 0), q, limit))

        return in_parts(4, unsigned)
    if X86:  # SSE2, which all have, multiplies words: first those of the even bytes, then those of the odd
        words, eight = vector(I16, 2 * LANES), constant(I16, 8, 2 * LANES)
        q, x = b.bitcast(q, words), b.bitcast(x, words)
        even = b.and_(q, constant(I16, 255, 2 * LANES)), b.ashr(b.shl(x, eight), eight)
        for u, v in (even, (b.lshr(q, eight), b.ashr(x, eight))):
            halves = ((part(b, u, i, 8), part(b, v, i, 8)) for i in range(0, 2 * LANES, 8))
            parts = [call("llvm.x86.sse2.pmadd.wd", vector(I32, 4), *half) for half in halves]
            total = b.add(total, concatenate(b, parts))
        return total
    for byte in range(4):
        factor = b.ashr(b.shl(x, like(x, 24 - 8 * byte)), like(x, 24))
        total = b.add(total, b.mul(bits(b, q, 8 * byte, 8), factor))
    return total


def shuffle_bytes(b: ir.IRBuilder, table: Sequence[int], index: Value) -> Value:
    """table[index] of 16 bytes, for each of the 4 bytes, all below 16, in 16 int32 lanes."""
    names = (("avx512bw", 16, "llvm.x86.avx512.pshuf.b.512"), ("avx2", 8, "llvm.x86.avx2.pshuf.b"), ("", 4, SHUFFLE))
    lanes, name = next((n, name) for feature, n, name in names if not feature or has(feature))
    if not name:
        found = [b.shl(look_up(b, table, bits(b, index, 8 * byte, 4)), like(index, 8 * byte)) for byte in range(4)]
        return b.or_(b.or_(found[0], found[1]), b.or_(found[2], found[3]))
    kind = vector(I8, 4 * lanes)
    shuffle = cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, [kind, kind]), name)
    entries, parts = ir.Constant(kind, list(table) * (lanes // 4)), []
    for i in range(0, LANES, lanes):
        parts.append(b.call(shuffle, [entries, b.bitcast(part(b, index, i, lanes), kind)]))
    return concatenate(b, [b.bitcast(p, vector(I32, lanes)) for p in parts])
