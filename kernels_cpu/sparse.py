"""The k tokens of most weight, by a few components of their keys (SparQ, arXiv 2312.04985) or by whole keys.

The index keeps the components of keys apart: [B, H_kv, blocks, d, tokens], where a component of a block of tokens is
one run of memory. The lanes of a vector are tokens, so a logit needs no sum over lanes, and components that were not
chosen are not touched. A number of the index is read, and converted, once for all query heads that share it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .block_products import queries_for
from .blocks import BY_RECORD
from .choice import (
    OF_LOGITS,
    OF_PROBABILITIES,
    TILE,
    finish_part,
    logits_of,
    part,
    part_tokens,
    parts_of_heads,
    tiles_of_heads,
    weigh,
    whole_tiles,
)
from .compiled import kernel
from .crew import share
from .ir_vectors import F32, I64, LANES, Value, at, constant, load, multiply_add, prefetch_line, splat, store, vector
from .memory import LINE
from .pointers import address
from .selection import keep_largest, keys_of
from .tiles import cached_vectors, score_rows
from .unowned import hold, unowned

ROWS = 64  # of whole keys that are scored for some heads, then for others, while they are in the first cache
TOGETHER = 8  # runs that pass by at once: memory keeps up with as many streams


@intrinsic
def add_runs(
    typingctx: Any, index: Any, where: Any, ahead: Any, offsets: Any, weights: Any, group: Any, r: Any, n: Any,
    out: Any, out_bytes: Any, heads: Any,
) -> Any:  # fmt: skip
    """out[g, 0 : n] = sum over i < r of weights[i, g] * run i, for g < len(heads); n is rounded up to a line of memory.

    Run i lies at where + offsets[i], offsets int64, in items of the index; weights float32 [r, group], out float32 with
    rows of out_bytes. The runs that are read next are asked for meanwhile, the last time those at `ahead`.
    """
    f, n_heads = BY_RECORD[index.dtype], len(heads)
    tokens = LINE // f.dtype.itemsize

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        group, r, n, out_bytes = args[5], args[6], args[7], args[9]
        where, ahead, offsets, weights, out = (b.inttoptr(args[i], cgutils.voidptr_t) for i in (1, 2, 3, 4, 8))
        rows = [at(b, out, b.mul(I64(g), out_bytes)) for g in range(n_heads)]
        lines = b.udiv(b.add(n, I64(tokens - 1)), I64(tokens))
        zero = constant(F32, 0.0)

        def run(tile: Value, i: Value) -> Value:
            return at(b, tile, load(b, at(b, offsets, b.mul(i, I64(8))), I64))

        def next_run(i: Value) -> Value:
            past = b.icmp_signed(">=", i, r)
            i = b.select(past, b.sub(i, r), i)
            return run(b.select(past, ahead, where), b.select(b.icmp_signed("<", i, r), i, b.sub(r, I64(1))))

        def add(first: Value, count: int) -> None:
            places = [b.add(first, I64(i)) for i in range(count)]
            runs = [run(where, place) for place in places]
            later = [next_run(b.add(places[-1], I64(1 + i))) for i in range(TOGETHER)]
            factors = [
                [splat(b, load(b, at(b, weights, b.mul(b.add(b.mul(p, group), I64(g)), I64(4))), F32)) for p in places]
                for g in range(n_heads)
            ]
            with cgutils.for_range(b, lines) as loop:
                for pointer in later:
                    prefetch_line(b, at(b, pointer, b.mul(loop.index, I64(LINE))))
                for part in range(0, tokens, LANES):
                    start = b.add(b.mul(loop.index, I64(tokens)), I64(part))
                    source, target = b.mul(start, I64(f.dtype.itemsize)), b.mul(start, I64(4))
                    values = [cached_vectors(b, f, at(b, pointer, source), 1)[0] for pointer in runs]
                    for row, of_head in zip(rows, factors, strict=True):
                        total = load(b, at(b, row, target), vector(F32))
                        for x, factor in zip(values, of_head, strict=True):
                            total = multiply_add(b, x, factor, total)
                        store(b, total, at(b, row, target))

        with cgutils.for_range(b, b.mul(lines, I64(tokens // LANES))) as loop:
            for row in rows:
                store(b, zero, at(b, row, b.mul(loop.index, I64(4 * LANES))))
        begin, count = I64(0), TOGETHER
        while count > 0:  # the rest two at a time, then alone
            end = b.sub(r, b.urem(r, I64(count)))
            with cgutils.for_range_slice(b, begin, end, I64(count)) as (first, _):
                add(first, count)
            begin, count = end, count // 2
        return context.get_dummy_value()

    i = types.int64
    return types.void(index, i, i, i, i, i, i, i, i, i, heads), codegen


# -- by a few components -----------------------------------------------------------------------------------------------


@kernel
def choose_components(q, r, run_bytes, offsets, factors, seen, task):  # type: ignore[no-untyped-def]
    """For a KV head: the r components of largest sum |q|, their share of |q|, and the queries' there, over tau."""
    heads, (_, d, group) = len(factors) // len(q), factors.shape
    b, first = task // heads, task % heads * group
    sums, keys, chosen = np.zeros(d, np.float32), np.empty(d + 16, np.int32), np.empty(d, np.int32)
    of_few, of_every = np.float32(0.0), np.float32(0.0)
    for j in range(d):
        chosen[j] = j
    for g in range(group):
        for j in range(d):
            sums[j] += abs(q[b, first + g, j])
    keys_of(address(sums), d, address(keys))
    keep_largest(keys, chosen, d, r)
    for i in range(r):
        offsets[task, i] = chosen[i] * run_bytes
    for g in range(group):
        few, every = np.float32(0.0), np.float32(0.0)
        for j in range(d):
            every += abs(q[b, first + g, j])
        for i in range(r):
            few += abs(q[b, first + g, chosen[i]])
        of_few, of_every = of_few + few, of_every + every
        tau = np.sqrt(np.float32(d) * (few / max(every, np.float32(1e-30))))
        for i in range(r):
            factors[task, i, g] = q[b, first + g, chosen[i]] / tau if tau > 0 else np.float32(0.0)
    seen[task] = of_few / max(of_every, np.float32(1e-30))


@kernel
def pass_tokens(r):  # type: ignore[no-untyped-def]
    """Tokens that are scored before their exponentials are made: the longer a run, the better it is foreseen, but
    memory rests while little is read for them."""
    return TILE if r <= 16 else 4 * TILE


@kernel
def _score_few(  # type: ignore[no-untyped-def]
    index, stop, tokens, most, r, offsets, factors, heads, logits, of_tiles, of_choice, task
):
    group, n_head_kv, block = factors.shape[2], index.shape[1], index.shape[4]
    b, h, begin, end = part(task, tokens, most, n_head_kv, stop)
    if begin >= end:
        return
    kv_head = b * n_head_kv + h
    chosen, by = address(offsets) + kv_head * offsets.strides[0], address(factors) + kv_head * factors.strides[0]
    head = address(index) + b * index.strides[0] + h * index.strides[1]
    # Of a head that is one part they are in memory that this core had for the last one, and need not leave its cache.
    alone = np.empty((group, whole_tiles(end) if most == 1 else 0), np.float32)
    (own, own_bytes), weighed = logits_of(logits, b, h, group), begin
    if most == 1:
        own, own_bytes = address(alone), alone.strides[0]
    first = begin
    while first < end:
        where = head + first // block * index.strides[2] + first % block * index.strides[4]
        n = min(pass_tokens(r), block - first % block, end - first)
        later = first + n if first + n < end else first
        ahead = head + later // block * index.strides[2] + later % block * index.strides[4]
        for g in range(0, group, len(heads)):
            to = own + g * own_bytes + 4 * first
            add_runs(index, where, ahead, chosen, by + 4 * g, group, r, n, to, own_bytes, heads)
        first += n
        weighed = weigh(b, h, weighed, first, end, own, own_bytes, *of_tiles)
    finish_part(b, h, stop, own, own_bytes, *of_tiles, *of_choice)
    hold((alone,))


@kernel
def approximate_top_k(  # type: ignore[no-untyped-def]
    crew, q, index, stop, r, local, sum_logits, heads, logits, ranks, rows, weights, least, counts
):
    """rows [B, H_kv, k], weights [B, H_q, k]: see Ops; queries q [B, H_q, d]. The last `local` are among them.

    counts [B, H_kv, 3], or empty: all k stay.

    logits [B, H_q, slots], ranks [B, H_kv, slots]: scratch, with the slots of the index.
    """
    n_seq, n_head_kv, _, d, _ = index.shape
    group, r = q.shape[1] // n_head_kv, min(r, d)
    offsets, factors = np.empty((n_seq * n_head_kv, d), np.int64), np.empty((n_seq * n_head_kv, d, group), np.float32)
    chosen, seen = (unowned(offsets), unowned(factors)), np.empty(n_seq * n_head_kv, np.float32)
    share(crew, n_seq * n_head_kv, choose_components, (unowned(q), r, index.strides[3], *chosen, unowned(seen)))
    tokens, most = part_tokens(stop, n_head_kv)
    tiles, unfinished = tiles_of_heads(stop, n_head_kv, group), parts_of_heads(stop, tokens, n_head_kv)
    mode = OF_LOGITS if sum_logits else OF_PROBABILITIES
    of_tiles = (unowned(tiles[0]), unowned(tiles[1]), unowned(ranks), mode)
    of_choice = (unowned(unfinished), local, unowned(rows), unowned(weights), least, unowned(counts), unowned(seen))
    args = (unowned(index), unowned(stop), tokens, most, r, *chosen, heads, unowned(logits), of_tiles, of_choice)
    share(crew, n_seq * n_head_kv * most, _score_few, args)
    hold((offsets, factors, seen, tiles, unfinished))


# -- by whole keys -----------------------------------------------------------------------------------------------------


@kernel
def _score_all(  # type: ignore[no-untyped-def]
    q, k, stop, scale, tokens, most, vectors, heads, logits, of_tiles, of_choice, task
):
    n_head_kv, group = k.shape[1], q.shape[1] // k.shape[1]
    b, h, begin, end = part(task, tokens, most, n_head_kv, stop)
    if begin >= end:
        return
    own, weighed = logits_of(logits, b, h, group), begin
    for first in range(begin, end, ROWS):
        to, n = logits[b, :, first:], min(ROWS, end - first)
        for g in range(h * group, (h + 1) * group, len(heads)):
            score_rows(k, b, h, first, n, q, g, scale, to, g, k, ROWS, vectors, heads)
        weighed = weigh(b, h, weighed, first + n, end, *own, *of_tiles)
    finish_part(b, h, stop, *own, *of_tiles, *of_choice)


@kernel
def exact_top_k(crew, q, k, stop, scale, vectors, heads, logits, ranks, rows, weights, counts):  # type: ignore[no-untyped-def]
    """The same by whole keys k [B, H_kv, slots, blocks].

    logits and ranks have the slots of k, rounded up to 16; vectors, heads: see tiles.score_rows.
    """
    n_seq, n_head_kv, group = k.shape[0], k.shape[1], q.shape[1] // k.shape[1]
    tokens, most = part_tokens(stop, n_head_kv)
    tiles, unfinished = tiles_of_heads(stop, n_head_kv, group), parts_of_heads(stop, tokens, n_head_kv)
    of_tiles = (unowned(tiles[0]), unowned(tiles[1]), unowned(ranks), OF_PROBABILITIES)
    seen = np.empty(0, np.float32)
    no_counts = np.float32(0.0), unowned(counts), unowned(seen)
    of_choice = (unowned(unfinished), 0, unowned(rows), unowned(weights), *no_counts)
    queries = queries_for(k, q)
    args = (unowned(queries), unowned(k), unowned(stop), scale, tokens, most, vectors, heads, unowned(logits))
    share(crew, n_seq * n_head_kv * most, _score_all, (*args, of_tiles, of_choice))
    hold((queries, seen, tiles, unfinished))
