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

from .block_products import CachedRows, add_blocks, lesser, score_blocks, scratch
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
    prefetch_line,
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


class InOrder:
    """n rows of so many bytes, one after the other; and as many, of others, that will be read after them.

    A core follows a stream on its own, but these are streams of few rows, keys and values in turn: while it works on
    the ones, it can ask for the others.
    """

    def __init__(self, b: ir.IRBuilder, n: Value, base: Value, size: int, later: Value, later_size: int):
        self.b, self.n, self.base, self.size, self.later, self.later_size = b, n, base, size, later, later_size

    def _at(self, i: Value) -> Value:
        return at(self.b, self.base, self.b.mul(i, I64(self.size)))

    def row(self, i: Value) -> Value:
        return self._at(lesser(self.b, i, self.b.sub(self.n, I64(1))))

    def sixteen(self, start: Value) -> list[Value]:
        """At fixed distances: the last rows, if fewer, where there is room for 16."""
        b, copy = self.b, scratch(self.b, LANES * self.size)
        few = b.icmp_signed("<", b.sub(self.n, start), I64(LANES))
        with b.if_then(few, likely=False):
            cgutils.raw_memcpy(b, copy, self._at(start), b.sub(self.n, start), I64(self.size))
        first = b.select(few, copy, self._at(start))
        return [at(b, first, i * self.size) for i in range(LANES)]

    def ask(self, start: Value, count: int, part: Value, parts: int) -> None:
        b, size = self.b, count * self.later_size // parts
        first = at(b, self.later, b.add(b.mul(start, I64(self.later_size)), b.mul(part, I64(size))))
        for offset in range(0, size, 64):
            prefetch_line(b, at(b, first, offset))


def score_all(
    b: ir.IRBuilder, f: Format, n: Value, rows: CachedRows, queries: list[Value], n_vectors: int, scale: Value,
    targets: list[Value],
) -> None:  # fmt: skip
    """targets[g][0 : n] = scale times rows 0 ... n - 1 times queries[g], from `queries_for`; writes 16 at a time."""
    factor = splat(b, scale)
    if f.length == 1:
        held = [[b.fmul(load(b, at(b, q, 64 * i), vector(F32)), factor) for i in range(n_vectors)] for q in queries]
    with cgutils.for_range_slice(b, I64(0), n, I64(LANES)) as (start, _):
        if f.length == 1:
            scores = _score_numbers(b, f, rows, start, held)
        else:
            found = score_blocks(b, f, rows, start, queries, LANES * n_vectors // f.length)
            scores = [b.fmul(score, factor) for score in found]
        for place, score in zip(targets, scores, strict=True):
            store(b, score, at(b, place, b.mul(start, I64(4))))


def _score_numbers(
    b: ir.IRBuilder, f: Format, rows: CachedRows, start: Value, queries: list[list[Value]]
) -> list[Value]:
    sums = [TransposedSum(b) for _ in queries]
    for i in range(LANES):
        rows.ask(b.add(start, I64(i)), 1, I64(0), 1)
        key = cached_vectors(b, f, rows.row(b.add(start, I64(i))), len(queries[0]))
        for total, query in zip(sums, queries, strict=True):
            total.add(_dot(b, key, query))
    return [total.result() for total in sums]


def add_weighted(
    b: ir.IRBuilder, f: Format, n: Value, rows: CachedRows, weights: list[Value], sums: list[Value], n_vectors: int
) -> None:
    """See `block_products.add_blocks`."""
    if f.length > 1:
        add_blocks(b, f, n, rows, weights, sums, LANES * n_vectors // f.length)
        return
    places = [[at(b, s, 64 * i) for i in range(n_vectors)] for s in sums]
    held = [[cgutils.alloca_once_value(b, load(b, place, vector(F32))) for place in of_head] for of_head in places]
    with cgutils.for_range(b, n) as loop:
        rows.ask(loop.index, 1, I64(0), 1)
        value = cached_vectors(b, f, rows.row(loop.index), n_vectors)
        for place, totals in zip(weights, held, strict=True):
            weight = splat(b, load(b, at(b, place, b.mul(loop.index, I64(4))), F32))
            for x, total in zip(value, totals, strict=True):
                b.store(multiply_add(b, x, weight, b.load(total)), total)
    for of_head, totals in zip(places, held, strict=True):
        for place, total in zip(of_head, totals, strict=True):
            store(b, b.load(total), place)


def each_of(b: ir.IRBuilder, first: Value, stride: Value, n: int) -> list[Value]:
    """Pointers to n items."""
    return [at(b, first, b.mul(I64(i), stride)) for i in range(n)]


@intrinsic
def score_rows(
    typingctx: Any, k: Any, b: Any, h: Any, first: Any, n: Any, q: Any, head: Any, scale: Any, scores: Any, to: Any,
    then: Any, ahead: Any, vectors: Any, heads: Any,
) -> Any:  # fmt: skip
    """scores[to + g, 0 : n] = scale k[b, h, first : first + n] . q[b, head + g], g < len(heads); 16 len(vectors) = d.

    q is from `queries_for`. n is rounded up to 16: scores [heads, columns], float32, has that many columns.
    Asks for then[b, h, first + ahead : first + ahead + n], which may lie outside of it.
    """
    f, n_vectors, n_heads, f_then = BY_RECORD[k.dtype], len(vectors), len(heads), BY_RECORD[then.dtype]

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        k, seq, h, first, n, q, head, scale, scores, to, then, ahead = args[:12]
        base, _, _ = into_array(context, b, signature.args[0], k, seq, h, first)
        later, _, _ = into_array(context, b, signature.args[10], then, seq, h, b.add(first, ahead))
        queries, _, (_, q_bytes, _) = into_array(context, b, signature.args[5], q, seq, head)
        target, _, (score_bytes, _) = into_array(context, b, signature.args[8], scores, to)
        queries, targets = each_of(b, queries, q_bytes, n_heads), each_of(b, target, score_bytes, n_heads)
        rows = InOrder(b, n, base, cached_bytes(f, n_vectors), later, cached_bytes(f_then, n_vectors))
        score_all(b, f, n, rows, queries, n_vectors, scale, targets)
        return context.get_dummy_value()

    i = types.int64
    return types.void(k, i, i, i, i, q, i, types.float32, scores, i, then, i, vectors, heads), codegen


@intrinsic
def add_rows(
    typingctx: Any, v: Any, b: Any, h: Any, first: Any, n: Any, p: Any, sums: Any, i: Any, to: Any, then: Any,
    ahead: Any, vectors: Any, heads: Any,
) -> Any:  # fmt: skip
    """sums[i, to + g] += p[to + g, 0 : n] . v[b, h, first : first + n] for g < len(heads); 16 len(vectors) = d.

    n <= 64, and p has 64 columns. Asks for then[b, h, first + ahead : first + ahead + n], as `score_rows` does.
    """
    f, n_vectors, n_heads, f_then = BY_RECORD[v.dtype], len(vectors), len(heads), BY_RECORD[then.dtype]

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        v, seq, h, first, n, p, sums, index, to, then, ahead = args[:11]
        base, _, _ = into_array(context, b, signature.args[0], v, seq, h, first)
        later, _, _ = into_array(context, b, signature.args[9], then, seq, h, b.add(first, ahead))
        weights, _, (p_bytes, _) = into_array(context, b, signature.args[5], p, to)
        target, _, (_, sum_bytes, _) = into_array(context, b, signature.args[6], sums, index, to)
        heads = (each_of(b, *of, n_heads) for of in ((weights, p_bytes), (target, sum_bytes)))
        rows = InOrder(b, n, base, cached_bytes(f, n_vectors), later, cached_bytes(f_then, n_vectors))
        add_weighted(b, f, n, rows, *heads, n_vectors)
        return context.get_dummy_value()

    x = types.int64
    return types.void(v, x, x, x, x, p, sums, x, x, then, x, vectors, heads), codegen


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
