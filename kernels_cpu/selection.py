"""The largest of many numbers: exactly so many, of equal ones the first, in the order in which they lie.

Numbers are compared by keys, int32 in the same order, where NaN counts as -inf and both zeros are one. The m-th largest
of a few keys comes from counting: bit by bit, the largest number that m of them reach. Of many numbers most are ruled
out at a glance, 64 at a time: in m of several subsets the maximum reaches a bound, so the m largest of all do. Of large
m a sample says what about so many may reach, and counting whether they do. What reaches the bound is collected;
whenever that is too much, the m largest stay and the bound rises to what would displace one. So time grows with the
length, in whatever order the numbers lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiled import kernel
from .crew import share
from .ir_vectors import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    Value,
    across_lanes,
    at,
    constant,
    for_vectors,
    into_array,
    like,
    load,
    splat,
    store,
    vector,
)
from .isa import has
from .pointers import address
from .unowned import unowned

LOWEST = -(2**31)  # below the keys of all numbers
GLANCE = 64  # numbers compared with the bound together: the bits of a word
SPARE = 1024  # numbers collected beyond four times those wanted
SAMPLED = 16  # one of so many numbers is in a sample, 16 neighbours together
GUESSES = 2  # of a bound, each lower than the one before
PACKS = has("avx512f")  # an instruction moves the lanes of a mask together


# -- keys --------------------------------------------------------------------------------------------------------------


def _keys(b: ir.IRBuilder, x: Value) -> Value:
    """int32 in the order of float32 x, lane by lane: of negative numbers the other bits turn round."""
    lanes = x.type.count
    bits = b.bitcast(b.select(b.fcmp_ordered("ord", x, x), x, constant(F32, -math.inf, lanes)), vector(I32, lanes))
    bits = b.select(b.icmp_signed("==", bits, like(bits, LOWEST)), like(bits, 0), bits)  # -0.0
    return _turned(b, bits)


def _turned(b: ir.IRBuilder, bits: Value) -> Value:
    return b.xor(bits, b.lshr(b.ashr(bits, like(bits, 31)), like(bits, 1)))


@intrinsic
def keys_of(typingctx: Any, where: Any, n: Any, to: Any) -> Any:
    """Keys of n float32 at an address, to another or the same."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        source, n, to = b.inttoptr(args[0], cgutils.voidptr_t), args[1], b.inttoptr(args[2], cgutils.voidptr_t)

        def turn(index: Value, lanes: int) -> None:
            place = b.mul(index, I64(4))
            store(b, _keys(b, load(b, at(b, source, place), vector(F32, lanes))), at(b, to, place))

        for_vectors(b, n, turn)
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i), codegen


@intrinsic
def key_at(typingctx: Any, where: Any, i: Any) -> Any:
    """Key of the i-th float32 at an address."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        place = at(b, b.inttoptr(args[0], cgutils.voidptr_t), b.mul(args[1], I64(4)))
        return b.sext(b.extract_element(_keys(b, load(b, place, vector(F32, 1))), I32(0)), I64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def count_from(typingctx: Any, keys: Any, n: Any, least: Any) -> Any:
    """How many of the first n keys, an int32 array, reach `least`. n is rounded up to 16."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        keys, _, _ = into_array(context, b, signature.args[0], args[0])
        bound = splat(b, b.trunc(args[2], I32))
        total = cgutils.alloca_once_value(b, constant(I32, 0))
        with cgutils.for_range(b, b.udiv(b.add(args[1], I64(LANES - 1)), I64(LANES))) as loop:
            x = load(b, at(b, keys, b.mul(loop.index, I64(4 * LANES))), vector(I32))
            b.store(b.sub(b.load(total), b.sext(b.icmp_signed(">=", x, bound), x.type)), total)  # true is -1
        return b.zext(across_lanes(b, b.load(total), b.add), I64)

    return types.int64(keys, types.int64, types.int64), codegen


# -- many numbers at once ----------------------------------------------------------------------------------------------


@intrinsic
def subset_maxima(typingctx: Any, where: Any, rows: Any, vectors: Any, to: Any) -> Any:
    """Maxima of the columns of float32 [rows, 16 vectors] at an address, to another; NaN is passed over."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        where, rows, vectors, to = args
        to, n = b.inttoptr(to, cgutils.voidptr_t), b.mul(vectors, I64(4 * LANES))
        with cgutils.for_range(b, vectors) as loop:
            store(b, constant(F32, -math.inf), at(b, to, b.mul(loop.index, I64(4 * LANES))))
        with cgutils.for_range(b, rows) as row:
            source = at(b, b.inttoptr(where, cgutils.voidptr_t), b.mul(row.index, n))
            with cgutils.for_range(b, vectors) as loop:
                place = b.mul(loop.index, I64(4 * LANES))
                new, old = load(b, at(b, source, place), vector(F32)), load(b, at(b, to, place), vector(F32))
                store(b, b.select(b.fcmp_ordered(">", new, old), new, old), at(b, to, place))
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i, i), codegen


@intrinsic
def keys_of_sample(typingctx: Any, where: Any, n: Any, to: Any) -> Any:
    """Keys of the first 16 of each 16 SAMPLED of n float32 at an address, to another; returns how many these are."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        source, n, to = b.inttoptr(args[0], cgutils.voidptr_t), args[1], b.inttoptr(args[2], cgutils.voidptr_t)
        vectors = b.udiv(n, I64(LANES * SAMPLED))
        with cgutils.for_range(b, vectors) as loop:
            place = b.mul(loop.index, I64(4 * LANES))
            x = load(b, at(b, source, b.mul(place, I64(SAMPLED))), vector(F32))
            store(b, _keys(b, x), at(b, to, place))
        return b.mul(vectors, I64(LANES))

    i = types.int64
    return types.int64(i, i, i), codegen


@intrinsic
def count_reaching(typingctx: Any, where: Any, n: Any, key: Any) -> Any:
    """How many of n float32 at an address have this key or a larger one; n is rounded down to 16."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        source = b.inttoptr(args[0], cgutils.voidptr_t)
        bound = splat(b, b.bitcast(_turned(b, b.trunc(args[2], I32)), F32))
        total = cgutils.alloca_once_value(b, constant(I32, 0))
        with cgutils.for_range(b, b.udiv(args[1], I64(LANES))) as loop:
            x = load(b, at(b, source, b.mul(loop.index, I64(4 * LANES))), vector(F32))
            reached = b.sext(b.fcmp_ordered(">=", x, bound), vector(I32))  # true is -1
            b.store(b.sub(b.load(total), reached), total)
        return b.zext(across_lanes(b, b.load(total), b.add), I64)

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def glance(typingctx: Any, where: Any, key: Any) -> Any:
    """Bit i: whether the i-th of 64 float32 at an address may have this key or a larger one; NaN always may."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        pointer = b.inttoptr(args[0], cgutils.voidptr_t)
        bound = splat(b, b.bitcast(_turned(b, b.trunc(args[1], I32)), F32))
        bits = I64(0)
        for first in range(0, GLANCE, LANES):
            x = load(b, at(b, pointer, 4 * first), vector(F32))
            reached = b.zext(b.bitcast(b.fcmp_unordered(">=", x, bound), I16), I64)
            bits = b.or_(bits, b.shl(reached, I64(first)))
        return bits

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def lowest_bit(typingctx: Any, bits: Any) -> Any:
    """Which is the lowest bit set of a word that is not 0."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        return b.cttz(args[0], cgutils.true_bit)

    return types.int64(types.int64), codegen


# -- those that reach a bound, side by side: where PACKS ---------------------------------------------------------------


def _pack(b: ir.IRBuilder, mask: Value, places: Sequence[tuple[Value, Value]], count: Value) -> Value:
    """Writes the lanes of 16 int32 where the mask is set, side by side, to `count` items behind a pointer: of each pair
    (lanes, pointer). Returns the count with them. Up to 16 items are written, whatever they are."""
    to, whole = b.mul(count, I64(4)), vector(I32)
    kind = ir.FunctionType(whole, [whole, whole, mask.type])
    compress = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512.mask.compress.v16i32")
    for lanes, pointer in places:
        store(b, b.call(compress, [lanes, like(lanes, 0), mask]), at(b, pointer, to))
    return b.add(count, b.zext(b.ctpop(b.bitcast(mask, I16)), I64))


@intrinsic
def collect(typingctx: Any, values: Any, first: Any, least: Any, keys: Any, indices: Any, count: Any) -> Any:
    """Of 16 float32 at `values`, from the number `first` on, those whose keys reach `least`, appended to keys and
    indices, int32 arrays that have `count` of them. Returns how many they have then."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        values, first, least, keys, indices, count = args
        place = at(b, b.inttoptr(values, cgutils.voidptr_t), b.mul(first, I64(4)))
        found = _keys(b, load(b, place, vector(F32)))
        numbers = b.add(splat(b, b.trunc(first, I32)), ir.Constant(vector(I32), list(range(LANES))))
        (keys, _, _), (indices, _, _) = (
            into_array(context, b, signature.args[i], array) for i, array in ((3, keys), (4, indices))
        )
        mask = b.icmp_signed(">=", found, splat(b, b.trunc(least, I32)))
        return _pack(b, mask, ((found, keys), (numbers, indices)), count)

    i = types.int64
    return i(i, i, i, keys, indices, i), codegen


@intrinsic
def keep(typingctx: Any, keys: Any, indices: Any, first: Any, least: Any, count: Any) -> Any:
    """The same of keys and indices themselves: those of the 16 from `first` on, which is not before `count`."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        arrays, first, least, count = args[:2], *args[2:]
        pointers = [into_array(context, b, signature.args[i], array)[0] for i, array in enumerate(arrays)]
        lanes = [load(b, at(b, pointer, b.mul(first, I64(4))), vector(I32)) for pointer in pointers]
        mask = b.icmp_signed(">=", lanes[0], splat(b, b.trunc(least, I32)))
        return _pack(b, mask, tuple(zip(lanes, pointers, strict=True)), count)

    i = types.int64
    return i(keys, indices, i, i, i), codegen


# -- selection ---------------------------------------------------------------------------------------------------------


@kernel
def _reached_by(keys, n, m):  # type: ignore[no-untyped-def]
    """The m-th largest of the first n keys, or a smaller number that no more than these m reach.

    The 16 keys behind the first n are overwritten.
    """
    for i in range(n, n + 16):
        keys[i] = LOWEST
    found = LOWEST
    for bit in range(31, -1, -1):
        count = count_from(keys, n, found + (1 << bit))
        if count >= m:
            found += 1 << bit
        if count == m:
            break
    return found


@kernel
def keep_largest(keys, indices, n, m):  # type: ignore[no-untyped-def]
    """Of the first n keys, int32, and their indices, the m <= n largest become the first m, in order.

    Returns what _reached_by does. The 16 keys behind the first n are overwritten.
    """
    least = _reached_by(keys, n, m)
    kept = begin = 0
    if PACKS and count_from(keys, n, least) == m:  # all that equal it stay
        begin = n // 16 * 16
        for i in range(0, begin, 16):
            kept = keep(keys, indices, i, least, kept)
    equal = m - kept - count_from(keys[begin:], n - begin, least + 1)  # that stay
    for i in range(begin, n):
        key, index = np.int64(keys[i]), indices[i]
        tie = key == least and equal > 0
        keys[kept], indices[kept] = key, index
        kept += key > least or tie
        equal -= tie
    return least


@kernel
def _bound(values, n, m, keys):  # type: ignore[no-untyped-def]
    """A key that at least m of n float32 at an address reach, and few more. keys: scratch."""
    vectors = (4 * m + 15) // 16
    rows = n // (16 * vectors)
    subset_maxima(values + 4 * (n - rows * 16 * vectors), rows, vectors, address(keys))
    keys_of(address(keys), 16 * vectors, address(keys))
    return _reached_by(keys, 16 * vectors, m)


@kernel
def _sampled_bound(values, n, m, keys):  # type: ignore[no-untyped-def]
    """The same for any m < n, or LOWEST if the sample misleads."""
    size = keys_of_sample(values, n, address(keys))
    wanted = m * size // n
    for _ in range(GUESSES):
        wanted += 8 + 2 * int(np.sqrt(wanted))  # neighbours are alike, so a sample errs by more than its root
        if wanted >= size:
            break
        least = _reached_by(keys, size, wanted)
        if least > LOWEST and count_reaching(values, n, least) >= m:
            return least
    return LOWEST


@kernel
def _collect_largest(values, n, m, keys, indices):  # type: ignore[no-untyped-def]
    """The first m of indices become those of the m <= n largest of n float32 at an address, ascending.

    keys, indices: int32, of 4 m + SPARE + GLANCE numbers.
    """
    least = _bound(values, n, m, keys) if n >= 16 * m else _sampled_bound(values, n, m, keys)
    room, count = 4 * m + SPARE - GLANCE, 0
    for first in range(0, n, GLANCE):
        if first + GLANCE > n:
            for i in range(first, n):
                keys[count], indices[count] = key_at(values, i), i
                count += keys[count] >= least
        else:
            lanes = glance(values + 4 * first, least)
            if PACKS:
                for i in range(first, first + GLANCE if lanes != 0 else first, 16):
                    count = collect(values, i, least, keys, indices, count)
            else:
                while lanes != 0:
                    lane = lowest_bit(lanes)
                    lanes ^= 1 << lane
                    keys[count], indices[count] = key_at(values, first + lane), first + lane
                    count += keys[count] >= least
        if count > room:
            least, count = keep_largest(keys, indices, count, m) + 1, m
    keep_largest(keys, indices, count, m)


@kernel
def choose_largest(values, n, k, head, tail, rows):  # type: ignore[no-untyped-def]
    """rows [k], int32 = the k largest of n float32 at an address, ascending; the first min(n, k) of rows count.

    The first `head` and the last `tail` numbers are always among them.
    """
    m = k - head - tail
    if n <= k or m == 0:
        for i in range(k):
            rows[i] = i if n <= k or i < head else n - k + i
        return
    keys = np.empty(4 * m + SPARE + GLANCE, np.int32)
    indices = np.empty(4 * m + SPARE + GLANCE, np.int32)
    _collect_largest(values + 4 * head, n - head - tail, m, keys, indices)
    for i in range(k):
        rows[i] = i if i < head else indices[i - head] + head if i < head + m else n - k + i


@kernel
def _top_k_row(ranks, stop, k, head, tail, rows, task):  # type: ignore[no-untyped-def]
    b, h = task // rows.shape[1], task % rows.shape[1]
    values = address(ranks) + b * ranks.strides[0] + h * ranks.strides[1]
    choose_largest(values, np.int64(stop[b]), k, head, tail, rows[b, h])


@kernel
def top_k(crew, ranks, stop, k, head, tail, rows):  # type: ignore[no-untyped-def]
    """rows [B, H, k], int32 = the k largest of slots 0 ... stop[b] - 1 by ranks [B, H, slots], float32, ascending.

    The first `head` and the last `tail` slots are always among them; if stop[b] <= k, rows are 0, 1, 2 ...
    """
    n_seq, heads, _ = rows.shape
    share(crew, n_seq * heads, _top_k_row, (unowned(ranks), unowned(stop), k, head, tail, unowned(rows)))
