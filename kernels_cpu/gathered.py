"""Attention to chosen rows of the cache: the second step of SparQ (arXiv 2312.04985) and of FlexGen (2303.06865).

Memory cannot guess which row comes next, but the list says so: keys are asked for a few rows ahead, and the values of a
tile while its keys are scored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .blocks import BY_RECORD
from .compiled import kernel
from .crew import share
from .ir_vectors import (
    F32,
    I32,
    I64,
    LANES,
    Value,
    at,
    into_array,
    load,
    multiply_add,
    prefetch_line,
    splat,
    store,
    vector,
)
from .softmax import exp, exp_row, row_maximum
from .tiles import TransposedSum, cached_bytes, cached_vectors
from .unowned import hold, unowned

TILE = 64  # rows scored before their values are added; whole vectors, because score_listed rounds up to them
TASKS = 8  # if parts ...
FEWEST = 32  # ... have so many rows
AHEAD = 16  # rows of keys


def _row_at(b: ir.IRBuilder, base: Value, rows: Value, row_bytes: Value, i: Value) -> Value:
    """Where the row lies that stands at place i of the list."""
    index = b.sext(load(b, at(b, rows, b.mul(i, I64(4))), I32), I64)
    return at(b, base, b.mul(index, row_bytes))


def _ask_for(b: ir.IRBuilder, row: Value, size: int, cache: int) -> None:
    for offset in range(0, size, 64):
        prefetch_line(b, at(b, row, offset), cache)


@intrinsic
def score_listed(
    typingctx: Any, k: Any, v: Any, b: Any, h: Any, rows: Any, first: Any, n: Any, end: Any, q: Any, head: Any,
    scale: Any, scores: Any, to: Any, vectors: Any, heads: Any,
) -> Any:  # fmt: skip
    """scores[to + g, 0 : n] = scale k[b, h, rows[b, h, first : first + n]] . q[b, head + g], g < len(heads).

    n is rounded up to 16 by repeating the last row. Asks for the values v of these rows, and for keys up to place `end`
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
        factor = splat(b, scale)
        held = [
            [
                b.fmul(load(b, at(b, at(b, queries, b.mul(I64(g), q_bytes)), 64 * i), vector(F32)), factor)
                for i in range(n_vectors)
            ]
            for g in range(n_heads)
        ]
        last, very_last = b.sub(n, I64(1)), b.sub(b.sub(end, first), I64(1))
        with cgutils.for_range(b, b.udiv(b.add(n, I64(LANES - 1)), I64(LANES))) as loop:
            start = b.mul(loop.index, I64(LANES))
            sums = [TransposedSum(b) for _ in range(n_heads)]
            for r in range(LANES):
                i, later = b.add(start, I64(r)), b.add(start, I64(r + AHEAD))
                i = b.select(b.icmp_signed("<", i, last), i, last)
                later = b.select(b.icmp_signed("<", later, very_last), later, very_last)
                _ask_for(b, _row_at(b, keys, listed, k_bytes, later), cached_bytes(f, n_vectors), 1)
                _ask_for(b, _row_at(b, values, listed, v_bytes, i), cached_bytes(f_v, n_vectors), 2)
                key = cached_vectors(b, f, _row_at(b, keys, listed, k_bytes, i), n_vectors)
                for g in range(n_heads):
                    total = b.fmul(key[0], held[g][0])
                    for i in range(1, n_vectors):
                        total = multiply_add(b, key[i], held[g][i], total)
                    sums[g].add(total)
            for g in range(n_heads):
                place = at(b, at(b, target, b.mul(I64(g), score_bytes)), b.mul(start, I64(4)))
                store(b, sums[g].result(), place)
        return context.get_dummy_value()

    i = types.int64
    return types.void(k, v, i, i, rows, i, i, i, q, i, types.float32, scores, i, vectors, heads), codegen


@intrinsic
def add_listed(
    typingctx: Any, v: Any, b: Any, h: Any, rows: Any, first: Any, n: Any, end: Any, p: Any, sums: Any, i: Any,
    to: Any, vectors: Any, heads: Any,
) -> Any:  # fmt: skip
    """sums[i, to + g] += p[to + g, 0 : n] . v[b, h, rows[b, h, first : first + n]] for g < len(heads).

    Asks for the values up to place `end` of the list. 16 len(vectors) = d.
    """
    f, n_vectors, n_heads = BY_RECORD[v.dtype], len(vectors), len(heads)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        v, seq, h, rows, first, n, end, p, sums, index, to = args[:11]
        values, _, (_, _, v_bytes, _) = into_array(context, b, signature.args[0], v, seq, h)
        listed, _, _ = into_array(context, b, signature.args[3], rows, seq, h, first)
        weights, _, (p_bytes, _) = into_array(context, b, signature.args[7], p, to)
        target, _, (_, sum_bytes, _) = into_array(context, b, signature.args[8], sums, index, to)
        places = [
            [at(b, at(b, target, b.mul(I64(g), sum_bytes)), 64 * i) for i in range(n_vectors)] for g in range(n_heads)
        ]
        held = [[cgutils.alloca_once_value(b, load(b, place, vector(F32))) for place in row] for row in places]
        very_last = b.sub(b.sub(end, first), I64(1))
        with cgutils.for_range(b, n) as loop:
            later = b.add(loop.index, I64(AHEAD))
            later = b.select(b.icmp_signed("<", later, very_last), later, very_last)
            _ask_for(b, _row_at(b, values, listed, v_bytes, later), cached_bytes(f, n_vectors), 1)
            value = cached_vectors(b, f, _row_at(b, values, listed, v_bytes, loop.index), n_vectors)
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
    return types.void(v, x, x, rows, x, x, x, p, sums, x, x, vectors, heads), codegen


@kernel
def _rows_fit(rows, stop, slots):  # type: ignore[no-untyped-def]
    """Whether all rows [B, H_kv, k] that count, the first stop[b] of them, are slots."""
    for b in range(len(rows)):
        for h in range(rows.shape[1]):
            outside = False
            for i in range(min(rows.shape[2], stop[b])):
                outside |= rows[b, h, i] < 0 or rows[b, h, i] >= slots
            if outside:
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
    q, k, v, rows, stop, scale, parts, length, weights, vectors, scored, summed, sums, largest, total, alpha, task
):
    n_head_kv, group = k.shape[1], q.shape[1] // k.shape[1]
    b, h, begin = task // (parts * n_head_kv), task // parts % n_head_kv, task % parts * length
    end = min(begin + length, min(rows.shape[2], np.int64(stop[b])))
    p, first = np.empty((group, TILE), np.float32), h * group
    for g in range(group):
        largest[task, g], total[task, g], alpha[task, g] = -np.inf, 0.0, 0.0
        for j in range(q.shape[2]):
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
            for j in range(q.shape[2]):
                sums[task, g, j] *= shrink
        for g in range(0, group, len(summed)):
            add_listed(v, b, h, rows, tile, n, tile + n, p, sums, task, g, vectors, summed)
        for g in range(group if len(weights) else 0):
            weight = np.float32(0.0)
            for i in range(tile, tile + n):
                weight += weights[b, first + g, i]
            alpha[task, g] += weight


@kernel
def attend_rows(crew, q, k, v, rows, stop, scale, weights, mean, vectors, scored, summed, out):  # type: ignore[no-untyped-def]
    """out [B, H_q, d] = attention of q to slots rows [B, H_kv, k], the first stop[b] of them.

    With a mean [B, H_kv, d or less]: alpha times that and 1 - alpha times the mean, where alpha is the sum of the rows'
    weights [B, H_q, k]; without, both are empty. vectors, scored, summed: as in `attend`. Returns whether rows are
    those of the cache; otherwise nothing is done.
    """
    n_seq, n_head, d = q.shape
    n_head_kv = k.shape[1]
    if not _rows_fit(rows, stop, k.shape[2]):
        return False
    group = n_head // n_head_kv
    parts, length = _parts(rows.shape[2], n_seq * n_head_kv)
    tasks = n_seq * n_head_kv * parts
    sums, state = np.empty((tasks, group, d), np.float32), np.empty((3, tasks, group), np.float32)
    largest, total, alpha = state[0], state[1], state[2]
    of = (unowned(q), unowned(k), unowned(v), unowned(rows), unowned(stop), scale, parts, length, unowned(weights))
    to = (unowned(sums), unowned(largest), unowned(total), unowned(alpha))
    share(crew, tasks, _attend_part, (*of, vectors, scored, summed, *to))
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
    own = weights[b, h * group : (h + 1) * group, begin:]
    for g in range(0, group if begin < end else 0, len(summed)):
        add_listed(v, b, h, rows, begin, end - begin, end, own, sums, task, g, vectors, summed)


@kernel
def add_rows(crew, v, rows, stop, weights, vectors, summed, out):  # type: ignore[no-untyped-def]
    """out [B, H_q, d] = weights [B, H_q, k] times the values of rows [B, H_kv, k], the first stop[b] of them.

    Returns whether rows are those of the cache; otherwise nothing is done.
    """
    n_seq, n_head, d = out.shape
    n_head_kv = v.shape[1]
    if not _rows_fit(rows, stop, v.shape[2]):
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
