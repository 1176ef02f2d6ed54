"""Tiles of cached rows as attention sees them: scores of 16 keys at a time, and weighted sums of values.

The queries of a few heads, or the sums of a few heads, stay in registers while the rows pass by once. How many
vectors that takes is part of the compiled code: a tuple for the head's vectors and one for the heads bring their
lengths as types.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .blocks import BY_RECORD, Format, Rows
from .extremes import Extreme, indices
from .ir_vectors import (
    F32,
    I32,
    I64,
    LANES,
    Value,
    at,
    constant,
    horizontal_sum,
    into_array,
    load,
    multiply_add,
    prefetch,
    splat,
    store,
    vector,
)
from .rows import weights_of


def cached_bytes(f: Format, n_vectors: int) -> int:
    """What so many vectors of a row take."""
    return LANES * n_vectors // f.length * f.dtype.itemsize


def cached_vectors(b: ir.IRBuilder, f: Format, row: Value, n: int) -> list[Value]:
    """A cached row as n float32 vectors."""
    found: list[Value] = []
    block = 0
    while len(found) < n:
        reader = Rows(b, at(b, row, block * f.dtype.itemsize))
        found += [weights_of(b, group, LANES) for group in f.decode(b, reader)]
        block += LANES if f.length == 1 else 1
    return found


def _dot(b: ir.IRBuilder, x: list[Value], y: list[Value]) -> Value:
    """Lane by lane."""
    total = b.fmul(x[0], y[0])
    for u, v in zip(x[1:], y[1:], strict=True):
        total = multiply_add(b, u, v, total)
    return total


class TransposedSum:
    """Sums over lanes of 16 vectors, as one vector: neighbours are added in pairs, four times.

    A pair is added as soon as both are there, so that few vectors wait in registers.
    """

    def __init__(self, b: ir.IRBuilder):
        self.b, self.waiting = b, []  # (vectors in it, sum)

    def add(self, value: Value) -> None:
        evens = ir.Constant(vector(I32), [2 * i for i in range(LANES)])
        odds = ir.Constant(vector(I32), [2 * i + 1 for i in range(LANES)])
        size = 1
        while self.waiting and self.waiting[-1][0] == size:
            other = self.waiting.pop()[1]
            halves = (self.b.shuffle_vector(other, value, half) for half in (evens, odds))
            size, value = 2 * size, self.b.fadd(*halves)
        self.waiting.append((size, value))

    def result(self) -> Value:
        ((_, value),) = self.waiting
        return value


@intrinsic
def score_rows(
    typingctx: Any, k: Any, b: Any, h: Any, first: Any, n: Any, q: Any, head: Any, scale: Any, scores: Any, to: Any,
    vectors: Any, heads: Any,
) -> Any:  # fmt: skip
    """scores[to + g, 0 : n] = scale k[b, h, first : first + n] . q[b, head + g], g < len(heads); 16 len(vectors) = d.

    n is rounded up to 16 by repeating the last row: scores [heads, columns], float32, has that many columns.
    """
    f, n_vectors, n_heads = BY_RECORD[k.dtype], len(vectors), len(heads)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        k, seq, h, first, n, q, head, scale, scores, to = args[:10]
        base, _, (_, _, row_bytes, _) = into_array(context, b, signature.args[0], k, seq, h, first)
        queries, _, (_, q_bytes, _) = into_array(context, b, signature.args[5], q, seq, head)
        target, _, (score_bytes, _) = into_array(context, b, signature.args[8], scores, to)
        factor = splat(b, scale)
        held = [
            [
                b.fmul(load(b, at(b, at(b, queries, b.mul(I64(g), q_bytes)), 64 * i), vector(F32)), factor)
                for i in range(n_vectors)
            ]
            for g in range(n_heads)
        ]
        last = b.sub(n, I64(1))
        with cgutils.for_range(b, b.udiv(b.add(n, I64(LANES - 1)), I64(LANES))) as loop:
            start = b.mul(loop.index, I64(LANES))
            sums = [TransposedSum(b) for _ in range(n_heads)]
            for r in range(LANES):
                index = b.add(start, I64(r))
                index = b.select(b.icmp_signed("<", index, last), index, last)
                row = at(b, base, b.mul(index, row_bytes))
                prefetch(b, row, cached_bytes(f, n_vectors))
                key = cached_vectors(b, f, row, n_vectors)
                for g in range(n_heads):
                    sums[g].add(_dot(b, key, held[g]))
            for g in range(n_heads):
                place = at(b, at(b, target, b.mul(I64(g), score_bytes)), b.mul(start, I64(4)))
                store(b, sums[g].result(), place)
        return context.get_dummy_value()

    i = types.int64
    return types.void(k, i, i, i, i, q, i, types.float32, scores, i, vectors, heads), codegen


@intrinsic
def add_rows(
    typingctx: Any, v: Any, b: Any, h: Any, first: Any, n: Any, p: Any, sums: Any, i: Any, to: Any, vectors: Any,
    heads: Any,
) -> Any:  # fmt: skip
    """sums[i, to + g] += p[to + g, 0 : n] . v[b, h, first : first + n] for g < len(heads); 16 len(vectors) = d."""
    f, n_vectors, n_heads = BY_RECORD[v.dtype], len(vectors), len(heads)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        v, seq, h, first, n, p, sums, index, to = args[:9]
        base, _, (_, _, row_bytes, _) = into_array(context, b, signature.args[0], v, seq, h, first)
        weights, _, (p_bytes, _) = into_array(context, b, signature.args[5], p, to)
        target, _, (_, sum_bytes, _) = into_array(context, b, signature.args[6], sums, index, to)
        places = [
            [at(b, at(b, target, b.mul(I64(g), sum_bytes)), 64 * i) for i in range(n_vectors)] for g in range(n_heads)
        ]
        held = [[cgutils.alloca_once_value(b, load(b, place, vector(F32))) for place in row] for row in places]
        with cgutils.for_range(b, n) as loop:
            row = at(b, base, b.mul(loop.index, row_bytes))
            prefetch(b, row, cached_bytes(f, n_vectors))
            value = cached_vectors(b, f, row, n_vectors)
            for g in range(n_heads):
                place = at(b, at(b, weights, b.mul(I64(g), p_bytes)), b.mul(loop.index, I64(4)))
                weight = splat(b, load(b, place, F32))
                for i in range(n_vectors):
                    b.store(multiply_add(b, value[i], weight, b.load(held[g][i])), held[g][i])
        for places_of_head, held_of_head in zip(places, held, strict=True):
            for place, total in zip(places_of_head, held_of_head, strict=True):
                store(b, b.load(total), place)
        return context.get_dummy_value()

    x = types.int64
    return types.void(v, x, x, x, x, p, sums, x, x, vectors, heads), codegen


def square_root(b: ir.IRBuilder, x: Value) -> Value:
    name = f"llvm.sqrt.v{x.type.count}f32" if isinstance(x.type, ir.VectorType) else "llvm.sqrt.f32"
    return b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(x.type, [x.type]), name), [x])


@intrinsic
def most_similar(
    typingctx: Any, k: Any, b: Any, h: Any, first: Any, n: Any, s: Any, best: Any, where: Any, i: Any, vectors: Any
) -> Any:
    """The row of k[b, h, first : first + n] most like row s, itself excepted: best[i] its cosine, where[i] its slot.

    -inf and -1 if there is none. A row of zeros is like nothing: 0. best float32, where int64; 16 len(vectors) = d.
    """
    f, n_vectors = BY_RECORD[k.dtype], len(vectors)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        k, seq, h, first, n, s, best, where, i = args[:9]
        head, _, (_, _, row_bytes, _) = into_array(context, b, signature.args[0], k, seq, h)
        best_at, where_at = (into_array(context, b, signature.args[j], a, i)[0] for j, a in ((6, best), (7, where)))
        own = cached_vectors(b, f, at(b, head, b.mul(s, row_bytes)), n_vectors)
        length = splat(b, square_root(b, horizontal_sum(b, _dot(b, own, own))))
        end, found = b.add(first, n), Extreme(b, LANES, highest=True)
        last = b.sub(end, I64(1))
        with cgutils.for_range(b, b.udiv(b.add(n, I64(LANES - 1)), I64(LANES))) as loop:
            start = b.add(first, b.mul(loop.index, I64(LANES)))
            products, squares = TransposedSum(b), TransposedSum(b)
            for r in range(LANES):
                index = b.add(start, I64(r))
                row = at(b, head, b.mul(b.select(b.icmp_signed("<", index, last), index, last), row_bytes))
                prefetch(b, row, cached_bytes(f, n_vectors))
                key = cached_vectors(b, f, row, n_vectors)
                products.add(_dot(b, key, own))
                squares.add(_dot(b, key, key))
            lengths = b.fmul(square_root(b, squares.result()), length)
            some = b.fcmp_ordered(">", lengths, constant(F32, 0.0))
            cosines = b.select(some, b.fdiv(products.result(), lengths), constant(F32, 0.0))
            slots = indices(b, start)
            inside = b.icmp_signed("<", slots, splat(b, b.trunc(end, I32)))
            found.see(cosines, start, b.and_(inside, b.icmp_signed("!=", slots, splat(b, b.trunc(s, I32)))))
        cosine, slot = found.result()
        store(b, cosine, best_at)
        store(b, slot, where_at)
        return context.get_dummy_value()

    x = types.int64
    return types.void(k, x, x, x, x, x, best, where, x, vectors), codegen
