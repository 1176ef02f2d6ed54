"""Rows of latents as kernels see them: encoding and decoding, as `minirt.stores.latent` says what lies in them.

A cache of latents is described by eight int64, so that one compiled kernel serves every rank and every store: ADDRESS
of the rows, bytes from one sequence to the next (SEQUENCE), from one group (GROUP) and from one slot (ROW); RANK,
BLOCKS of 32 numbers, BITS of a number, and where the position of a key lies in a row (POSITION; 0: nowhere).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minirt.stores.latent import BEYOND_HALF, MAX_POSITION, SCALE_BYTES, UNIT

from .compiled import kernel
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
    concatenate,
    constant,
    float_to_half,
    for_vectors,
    half_to_float,
    like,
    load,
    part,
    splat,
    store,
    to_float,
    vector,
)
from .pointers import address, copy_floats

ADDRESS, SEQUENCE, GROUP, ROW, RANK, BLOCKS, BITS, POSITION = range(8)


@intrinsic
def _range_of(typingctx: Any, x: Any, n: Any) -> Any:
    """(smallest, largest) of n float32 at an address, 0 for -0; NaN both if one is not finite.

    What is not finite, or -0, is told by its bits: a compiler that may reorder sums takes x - x for 0.
    """

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        source = b.inttoptr(args[0], cgutils.voidptr_t)
        first = splat(b, load(b, source, F32))
        low, high = cgutils.alloca_once_value(b, first), cgutils.alloca_once_value(b, first)
        most = cgutils.alloca_once_value(b, constant(I32, 0))  # bits of the largest |x|, above which NaN is

        def turn(index: Value, lanes: int) -> None:
            value = load(b, at(b, source, b.mul(index, I64(4))), vector(F32, lanes))
            value = value if lanes == LANES else splat(b, b.extract_element(value, I32(0)))
            b.store(smaller(b.load(low), value), low)
            b.store(larger(b.load(high), value), high)
            magnitude = b.and_(b.bitcast(value, vector(I32)), constant(I32, 0x7FFFFFFF))
            b.store(farther(b.load(most), magnitude), most)

        def farther(old: Value, new: Value) -> Value:
            return b.select(b.icmp_signed(">", new, old), new, old)

        def smaller(old: Value, new: Value) -> Value:
            return b.select(b.fcmp_ordered("<", new, old), new, old)

        def larger(old: Value, new: Value) -> Value:
            return b.select(b.fcmp_ordered(">", new, old), new, old)

        for_vectors(b, args[1], turn)
        odd = b.icmp_signed(">=", across_lanes(b, b.load(most), farther), I32(0x7F800000))

        def result(value: Value) -> Value:
            bits = b.bitcast(value, I32)
            bits = b.select(b.icmp_signed("==", b.shl(bits, I32(1)), I32(0)), I32(0), bits)
            return b.bitcast(b.select(odd, I32(0x7FC00000), bits), F32)

        found = [result(across_lanes(b, b.load(v), join)) for v, join in ((low, smaller), (high, larger))]
        return context.make_tuple(b, signature.return_type, found)

    return types.UniTuple(types.float32, 2)(types.int64, types.int64), codegen


@intrinsic
def _put_halves(typingctx: Any, to: Any, first: Any, second: Any) -> Any:
    """Two float32 as float16 at an address; returns them rounded."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        to, rounded = b.inttoptr(args[0], cgutils.voidptr_t), []
        for i, value in enumerate(args[1:]):
            half = float_to_half(b, splat(b, value, 1))
            store(b, half, at(b, to, 2 * i))
            rounded.append(half_to_float(b, b.extract_element(half, I32(0))))
        return context.make_tuple(b, signature.return_type, rounded)

    return types.UniTuple(types.float32, 2)(types.int64, types.float32, types.float32), codegen


def _store_blocks(bits: int) -> Any:
    """An intrinsic that encodes blocks of 32 float32 at an address: code = (x - minimum) * inverse, to the nearest."""

    @intrinsic
    def store_blocks(typingctx: Any, x: Any, blocks: Any, minimum: Any, inverse: Any, to: Any) -> Any:
        def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
            x, blocks, minimum, inverse, to = args
            x, to = (b.inttoptr(v, cgutils.voidptr_t) for v in (x, to))
            with cgutils.for_range(b, blocks) as loop:
                source = at(b, x, b.mul(loop.index, I64(4 * UNIT)))
                block = at(b, to, b.mul(loop.index, I64(UNIT * bits // 8)))
                values = [load(b, at(b, source, 4 * LANES * i), vector(F32)) for i in range(2)]
                if bits == 16:
                    for i, value in enumerate(values):
                        store(b, float_to_half(b, value), at(b, block, 2 * LANES * i))
                else:
                    codes = [_code(b, value, minimum, inverse, 2**bits - 1) for value in values]
                    (_put_nibbles if bits == 4 else _put_three_bits)(b, codes, block)
            return context.get_dummy_value()

        i, f = types.int64, types.float32
        return types.void(i, i, f, f, i), codegen

    return store_blocks


def _code(b: ir.IRBuilder, x: Value, minimum: Value, inverse: Value, most: int) -> Value:
    q = b.fmul(b.fsub(x, splat(b, minimum)), splat(b, inverse))
    q = b.select(b.fcmp_ordered(">", q, constant(F32, 0.0)), q, constant(F32, 0.0))
    q = b.select(b.fcmp_ordered("<", q, constant(F32, float(most))), q, constant(F32, float(most)))
    return b.fptosi(b.fadd(q, constant(F32, 0.5)), vector(I32))  # not in one rounding with the product


def _put_nibbles(b: ir.IRBuilder, codes: list[Value], block: Value) -> None:
    both = b.or_(codes[0], b.shl(codes[1], like(codes[1], 4)))
    store(b, b.trunc(both, vector(I8)), block)


def _put_three_bits(b: ir.IRBuilder, codes: list[Value], block: Value) -> None:
    crumbs = None
    for i, code in enumerate(codes):
        for half in range(2):
            eight = b.and_(part(b, code, 8 * half, 8), constant(I32, 3, 8))
            eight = b.shl(eight, constant(I32, 2 * (2 * i + half), 8))
            crumbs = eight if crumbs is None else b.or_(crumbs, eight)
    store(b, b.trunc(crumbs, vector(I8, 8)), block)
    for i, code in enumerate(codes):
        high = b.icmp_signed(">", code, constant(I32, 3))
        store(b, b.bitcast(high, I16), at(b, block, 8 + 2 * i))


def _load_blocks(bits: int) -> Any:
    """An intrinsic that decodes blocks to 32 float32 each at an address: scale * code + minimum."""

    @intrinsic
    def load_blocks(typingctx: Any, row: Any, blocks: Any, to: Any) -> Any:
        def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
            row, to = (b.inttoptr(v, cgutils.voidptr_t) for v in (args[0], args[2]))
            if bits < 16:
                halves = (half_to_float(b, load(b, at(b, row, 2 * i), I16)) for i in range(2))
                scale, minimum = (splat(b, half) for half in halves)
            head = 0 if bits == 16 else SCALE_BYTES
            with cgutils.for_range(b, args[1]) as loop:
                block = at(b, at(b, row, head), b.mul(loop.index, I64(UNIT * bits // 8)))
                target = at(b, to, b.mul(loop.index, I64(4 * UNIT)))
                if bits == 16:
                    halves = (load(b, at(b, block, 2 * LANES * i), vector(I16)) for i in range(2))
                    values = [half_to_float(b, half) for half in halves]
                else:
                    codes = (_nibbles if bits == 4 else _three_bits)(b, block)
                    values = [b.fadd(b.fmul(to_float(b, code), scale), minimum) for code in codes]
                for i, value in enumerate(values):
                    store(b, value, at(b, target, 4 * LANES * i))
            return context.get_dummy_value()

        i = types.int64
        return types.void(i, i, i), codegen

    return load_blocks


def _nibbles(b: ir.IRBuilder, block: Value) -> list[Value]:
    both = b.zext(load(b, block, vector(I8)), vector(I32))
    return [b.and_(both, like(both, 15)), b.lshr(both, like(both, 4))]


def _three_bits(b: ir.IRBuilder, block: Value) -> list[Value]:
    crumbs = b.zext(load(b, block, vector(I8, 8)), vector(I32, 8))
    twice, codes = concatenate(b, [crumbs, crumbs]), []
    for i in range(2):
        shifts = ir.Constant(vector(I32), [4 * i] * 8 + [4 * i + 2] * 8)
        low = b.and_(b.lshr(twice, shifts), like(twice, 3))
        high = b.zext(b.bitcast(load(b, at(b, block, 8 + 2 * i), I16), vector(ir.IntType(1))), vector(I32))
        codes.append(b.or_(low, b.shl(high, like(high, 2))))
    return codes


_store16, _store4, _store3 = (_store_blocks(bits) for bits in (16, 4, 3))
_load16, _load4, _load3 = (_load_blocks(bits) for bits in (16, 4, 3))


@intrinsic
def _put_int(typingctx: Any, to: Any, value: Any) -> Any:
    """An int32 at an address."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        store(b, b.trunc(args[1], I32), b.inttoptr(args[0], cgutils.voidptr_t))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def int_at(typingctx: Any, where: Any) -> Any:
    """The int32 at an address."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        return b.sext(load(b, b.inttoptr(args[0], cgutils.voidptr_t), I32), I64)

    return types.int64(types.int64), codegen


@kernel
def row_address(cache, seq, group, slot):  # type: ignore[no-untyped-def]
    """Where a row of a described cache lies."""
    return cache[ADDRESS] + seq * cache[SEQUENCE] + group * cache[GROUP] + slot * cache[ROW]


@kernel
def decode_latent(row, bits, blocks, to):  # type: ignore[no-untyped-def]
    """The row at an address as 32 * blocks float32 at another."""
    if bits == 16:
        _load16(row, blocks, to)
    elif bits == 4:
        _load4(row, blocks, to)
    else:
        _load3(row, blocks, to)


@kernel
def _encode_latent(x, n, bits, blocks, room, row):  # type: ignore[no-untyped-def]
    """n float32 at an address as a row at another; room: 32 * blocks float32 of scratch."""
    to, minimum, inverse = address(room), np.float32(0.0), np.float32(0.0)
    copy_floats(to, x, n)
    if bits < 16:
        most = np.float32((1 << bits) - 1)
        low, high = _range_of(x, n)
        scale, minimum = _put_halves(row, (high - low) / most, low)
        if scale * most + minimum >= BEYOND_HALF:
            _put_halves(row, np.float32(np.nan), np.float32(np.nan))
        inverse = np.float32(0.0) if scale == 0 else np.float32(1.0) / scale
        row += SCALE_BYTES
    room[n:] = minimum  # which gives code 0
    if bits == 16:
        _store16(to, blocks, minimum, inverse, row)
    elif bits == 4:
        _store4(to, blocks, minimum, inverse, row)
    else:
        _store3(to, blocks, minimum, inverse, row)


@kernel
def places_exist(cache, n_slot, slot, x):  # type: ignore[no-untyped-def]
    """Whether each slot is one of n_slot, and each position of keys x [N, G, r + 1] can be one."""
    for i in range(len(slot)):
        for g in range(slot.shape[1]):
            if not 0 <= slot[i, g] < n_slot:
                return False
        for g in range(x.shape[1]):
            if not 0 <= x[i, g, cache[RANK]] <= MAX_POSITION:
                return False
    return True


@kernel
def write_rows(cache, seq, slot, x):  # type: ignore[no-untyped-def]
    """Writes x [N, G, r], or [N, G, r + 1] with positions, to slot[i, g] of sequence seq[i]; slot [N, 1] serves all.

    x is float32 in C order.
    """
    rank, blocks, bits, place = cache[RANK], cache[BLOCKS], cache[BITS], cache[POSITION]
    room = np.empty(UNIT * blocks, np.float32)
    for i in range(len(seq)):
        for g in range(x.shape[1]):
            row = row_address(cache, seq[i], g, slot[i, min(g, slot.shape[1] - 1)])
            source = address(x) + 4 * x.shape[2] * (i * x.shape[1] + g)
            _encode_latent(source, rank, bits, blocks, room, row)
            if place:
                _put_int(row + place, np.int64(x[i, g, rank]))
