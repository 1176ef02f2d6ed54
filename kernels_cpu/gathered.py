"""Attention to chosen rows of the cache: the second step of SparQ (arXiv 2312.04985) and of FlexGen (2303.06865).

Memory cannot guess which row comes next, but the list says so: keys are asked for a few rows ahead, and the values of a
tile while its keys are scored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .block_products import lesser, queries_for
from .blocks import BY_RECORD
from .compiled import kernel
from .crew import share
from .ir_vectors import (
    I32,
    I64,
    LANES,
    Value,
    at,
    into_array,
    load,
    prefetch_line,
)
from .softmax import exp, exp_row, row_maximum
from .tiles import add_weighted, cached_bytes, each_of, score_all
from .unowned import hold, unowned

TILE = 64  # rows scored before their values are added; whole vectors, because score_listed rounds up to them
TASKS = 8  # if parts ...
FEWEST = 32  # ... have so many rows
AHEAD = 16  # rows of keys


class _Listed:
    """Rows of one head whose numbers a list holds, int32: n of them, of a list that goes on to place `end`."""

    def __init__(self, b: ir.IRBuilder, base: Value, row_bytes: Value, size: int, listed: Value, n: Value, end: Value):
        self.b, self.base, self.row_bytes, self.size, self.listed = b, base, row_bytes, size, listed
        self.last, self.very_last = b.sub(n, I64(1)), b.sub(end, I64(1))

    def row(self, i: Value, last: Value | None = None) -> Value:
        b = self.b
        place = lesser(b, i, self.last if last is None else last)
        index = b.sext(load(b, at(b, self.listed, b.mul(place, I64(4))), I32), I64)
        return at(b, self.base, b.mul(index, self.row_bytes))

    def sixteen(self, start: Value) -> list[Value]:
        return [self.row(self.b.add(start, I64(i))) for i in range(LANES)]

    def ask(self, start: Value, count: int, part: Value, parts: int) -> None:
        for i in range(count):
            self._ask(self.row(self.b.add(start, I64(i + AHEAD)), self.very_last), part, parts, 1)

    def _ask(self, row: Value, part: Value, parts: int, cache: int) -> None:
        size = self.size // parts
        for offset in range(0, size, 64):
            prefetch_line(self.b, at(self.b, row, self.b.add(self.b.mul(part, I64(size)), I64(offset))), cache)


class _Keys(_Listed):
    """Those, and the values that will be read after them."""

    def __init__(self, *of: Any, values: _Listed):
        super().__init__(*of)
        self.values = values

    def ask(self, start: Value, count: int, part: Value, parts: int) -> None:
        super().ask(start, count, part, parts)
        for i in range(count):
            self.values._ask(self.values.row(self.b.add(start, I64(i))), part, parts, 2)


@intrinsic
def score_listed(
    typingctx: Any, k: Any, v: Any, b: Any, h: Any, rows: Any, first: Any, n: Any, end: Any, q: Any, head: Any,
    scale: Any, scores: Any, to: Any, vectors: Any, heads: Any,
) -> Any:  # fmt: skip
    """scores[to + g, 0 : n] = scale k[b, h, rows[b, h, first : first + n]] . q[b, head + g], g < len(heads).

    n is rounded up to 16. Asks for the values v of these rows, and for keys up to place `end`
    of the list. 16 len(vectors) = d.
    """
    (f, f_v), n_vectors, n_heads = (BY_RECORD[a.dtype] for a in (k, v)), len(vectors), len(heads)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        k, v, seq, h, rows, first, n, end, q, head, scale, scores, to = args[:13]
        keys, _, (_, _, k_bytes, _) = into_array(context, b, signature.args[0], k, seq, h)
        values, _, (_, _, v_bytes, _) = into_array(context, b, signature.args[1], v, seq, h)
        listed, _, _ = into_array(context, b, signature.args[4], rows, seq, h, first)
        queries, _, (_, q_bytes, _) = into_array(context, b, signature.args[8], q, seq, head)
        target, _, (score_bytes, _) = into_array(context, b, signature.args[11], scores, to)
        to_end = listed, n, b.sub(end, first)
        of_values = _Listed(b, values, v_bytes, cached_bytes(f_v, n_vectors), *to_end)
        rows = _Keys(b, keys, k_bytes, cached_bytes(f, n_vectors), *to_end, values=of_values)
        queries, targets = each_of(b, queries, q_bytes, n_heads), each_of(b, target, score_bytes, n_heads)
        score_all(b, f, n, rows, queries, n_vectors, scale, targets)
        return context.get_dummy_value()

    i = types.int64
    return types.void(k, v, i, i, rows, i, i, i, q, i, types.float32, scores, i, vectors, heads), codegen


@intrinsic
def add_listed(
    typingctx: Any, v: Any, b: Any, h: Any, rows: Any, first: Any, n: Any, end: Any, p: Any, sums: Any, i: Any,
    to: Any, vectors: Any, heads: Any,
) -> Any:  # fmt: skip
    """sums[i, to + g] += p[to + g, 0 : n] . v[b, h, rows[b, h, first : first + n]] for g < len(heads).

    Asks for the values up to place `end` of the list. n <= 64, and p has 64 columns; 16 len(vectors) = d.
    """
    f, n_vectors, n_heads = BY_RECORD[v.dtype], len(vectors), len(heads)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        v, seq, h, rows, first, n, end, p, sums, index, to = args[:11]
        values, _, (_, _, v_bytes, _) = into_array(context, b, signature.args[0], v, seq, h)
        listed, _, _ = into_array(context, b, signature.args[3], rows, seq, h, first)
        weights, _, (p_bytes, _) = into_array(context, b, signature.args[7], p, to)
        target, _, (_, sum_bytes, _) = into_array(context, b, signature.args[8], sums, index, to)
        chosen = _Listed(b, values, v_bytes, cached_bytes(f, n_vectors), listed, n, b.sub(end, first))
        heads = (each_of(b, *of, n_heads) for of in ((weights, p_bytes), (target, sum_bytes)))
        add_weighted(b, f, n, chosen, *heads, n_vectors)
        return context.get_dummy_value()

    x = types.int64
    return types.void(v, x, x, rows, x, x, x, p, sums, x, x, vectors, heads), codegen


@kernel
def _counted(rows, stop, counts, b, h):  # type: ignore[no-untyped-def]
    """How many of rows [B, H_kv, k] count: the first stop[b], or counts[b, h, 0] of them if there are counts."""
    n = min(rows.shape[2], np.int64(stop[b]))
    return max(0, min(n, np.int64(counts[b, h, 0]))) if len(counts) > 0 else n


@kernel
def _rows_fit(rows, stop, counts, slots):  # type: ignore[no-untyped-def]
    """Whether all rows [B, H_kv, k] that count are slots."""
    for b in range(len(rows)):
        for h in range(rows.shape[1]):
            least, most = np.int32(0), np.int32(0)
            for i in range(_counted(rows, stop, counts, b, h)):
                least, most = min(least, rows[b, h, i]), max(most, rows[b, h, i])
            if least < 0 or most >= slots:
                return False
    return True


@kernel
def _parts(k, heads):  # type: ignore[no-untyped-def]
    """Into how many parts the rows of a head are cut, and how long these are: whole vectors."""
    parts = max(1, min(k // FEWEST, (TASKS + heads - 1) // heads))
    length = ((k + parts - 1) // parts + 15) // 16 * 16
    return (k + length - 1) // length, length


@kernel
def _attend_part(  # type: ignore[no-untyped-def]
    q, k, v, rows, stop, counts, scale, parts, length, weights, vectors, scored, summed, sums, largest, total, alpha,
    task,
):  # fmt: skip
    n_head_kv, group = k.shape[1], q.shape[1] // k.shape[1]
    b, h = task // (parts * n_head_kv), task // parts % n_head_kv
    count = _counted(rows, stop, counts, b, h)
    if len(counts) > 0:
        length = ((count + parts - 1) // parts + 15) // 16 * 16  # threads share what is there, not what might be
    begin = task % parts * length
    end = min(begin + length, count)
    p, first, d = np.empty((group, TILE), np.float32), h * group, sums.shape[2]
    for g in range(group):
        largest[task, g], total[task, g], alpha[task, g] = -np.inf, 0.0, 0.0
        for j in range(d):
            sums[task, g, j] = 0.0
    for tile in range(begin, end, TILE):
        n = min(TILE, end - tile)
        for g in range(0, group, len(scored)):
            score_listed(k, v, b, h, rows, tile, n, end, q, first + g, scale, p, g, vectors, scored)
        for g in range(group):
            high = row_maximum(p, g, 0, n, largest[task, g])
            shrink = exp(largest[task, g] - high)
            largest[task, g] = high
            total[task, g] = total[task, g] * shrink + exp_row(p, g, 0, n, high)
            for j in range(d):
                sums[task, g, j] *= shrink
        for g in range(0, group, len(summed)):
            add_listed(v, b, h, rows, tile, n, tile + n, p, sums, task, g, vectors, summed)
        for g in range(group if len(weights) else 0):
            weight = np.float32(0.0)
            for i in range(tile, tile + n):
                weight += weights[b, first + g, i]
            alpha[task, g] += weight


@kernel
def attend_rows(  # type: ignore[no-untyped-def]
    crew, q, k, v, rows, stop, counts, scale, weights, mean, vectors, scored, summed, out
):
    """out [B, H_q, d] = attention of q to slots rows [B, H_kv, k], the first stop[b] of them; with counts [B, H_kv, 3],
    which may be empty, the first counts[b, h, 0].

    With a mean [B, H_kv, d or less]: alpha times that and 1 - alpha times the mean, where alpha is the sum of the rows'
    weights [B, H_q, k]; without, both are empty. vectors, scored, summed: as in `attend`. Returns whether rows are
    those of the cache; otherwise nothing is done.
    """
    n_seq, n_head, d = q.shape
    n_head_kv = k.shape[1]
    if not _rows_fit(rows, stop, counts, k.shape[2]):
        return False
    group = n_head // n_head_kv
    parts, length = _parts(rows.shape[2], n_seq * n_head_kv)
    tasks = n_seq * n_head_kv * parts
    sums, state = np.empty((tasks, group, d), np.float32), np.empty((3, tasks, group), np.float32)
    largest, total, alpha = state[0], state[1], state[2]
    queries = queries_for(k, q)
    chosen = (unowned(rows), unowned(stop), unowned(counts), scale, parts, length, unowned(weights))
    of = (unowned(queries), unowned(k), unowned(v), *chosen)
    to = (unowned(sums), unowned(largest), unowned(total), unowned(alpha))
    share(crew, tasks, _attend_part, (*of, vectors, scored, summed, *to))
    hold((queries,))
    for b in range(n_seq):
        for h in range(n_head):
            first, g = (b * n_head_kv + h // group) * parts, h % group
            high, mass, share_read = np.float32(-np.inf), np.float32(0.0), np.float32(0.0)
            for task in range(first, first + parts):
                high = max(high, largest[task, g])
            for task in range(first, first + parts):
                # Of parts that saw nothing the sums are 0.
                largest[task, g] = exp(largest[task, g] - high) if total[task, g] != 0 else np.float32(0.0)
                mass += largest[task, g] * total[task, g]
                share_read += alpha[task, g]
            blended = len(mean) > 0 and stop[b] > 0
            for task in range(first, first + parts):
                weight = largest[task, g] / mass if mass != 0 else np.float32(0.0)
                weight = weight * share_read if blended else weight
                for j in range(d):
                    out[b, h, j] = sums[task, g, j] * weight + (out[b, h, j] if task > first else np.float32(0.0))
            if blended:
                for j in range(mean.shape[2]):
                    out[b, h, j] += (np.float32(1.0) - share_read) * mean[b, h // group, j]
    return True


@kernel
def _add_part(v, rows, stop, parts, length, weights, vectors, summed, sums, task):  # type: ignore[no-untyped-def]
    n_head_kv, group = v.shape[1], sums.shape[1]
    b, h, begin = task // (parts * n_head_kv), task // parts % n_head_kv, task % parts * length
    end = min(begin + length, min(rows.shape[2], np.int64(stop[b])))
    for g in range(group):
        for j in range(sums.shape[2]):
            sums[task, g, j] = 0.0
    p = np.empty((group, TILE), np.float32)
    for tile in range(begin, end, TILE):
        n = min(TILE, end - tile)
        for g in range(group):
            for i in range(n):
                p[g, i] = weights[b, h * group + g, tile + i]
        for g in range(0, group, len(summed)):
            add_listed(v, b, h, rows, tile, n, end, p, sums, task, g, vectors, summed)


@kernel
def add_rows(crew, v, rows, stop, weights, vectors, summed, out):  # type: ignore[no-untyped-def]
    """out [B, H_q, d] = weights [B, H_q, k] times the values of rows [B, H_kv, k], the first stop[b] of them.

    Returns whether rows are those of the cache; otherwise nothing is done.
    """
    n_seq, n_head, d = out.shape
    n_head_kv = v.shape[1]
    if not _rows_fit(rows, stop, np.empty((0, 0, 0), np.int32), v.shape[2]):
        return False
    parts, length = _parts(rows.shape[2], n_seq * n_head_kv)
    sums = np.empty((n_seq * n_head_kv * parts, n_head // n_head_kv, d), np.float32)
    of = (unowned(v), unowned(rows), unowned(stop), parts, length, unowned(weights), vectors, summed, unowned(sums))
    share(crew, len(sums), _add_part, of)
    hold((sums,))
    for b in range(n_seq):
        for h in range(n_head):
            first, g = (b * n_head_kv + h // sums.shape[1]) * parts, h % sums.shape[1]
            for task in range(first, first + parts):
                for j in range(d):
                    out[b, h, j] = sums[task, g, j] + (out[b, h, j] if task > first else np.float32(0.0))
    return True
