"""Attention of a decode step to cached latents: keys are rebuilt tile by tile, values once per query.

A task takes some tiles of one group of KV heads. It rebuilds the keys of a tile for all its heads (`rebuilding`),
scores them for all query heads, and sums up latents of values, weighted: o = B (sum of p h) + b is exact, because the
factor B of a head and its bias b do not depend on the token. Parts of a sequence are joined as in `attention`; then
each sum passes through its head's factor, panels of which are multiplied as any weight's (`panels`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiled import kernel
from .crew import share_long
from .gemm import FEW, VECTORS, WIDTH, multiply_tile, transpose_rows
from .ir_vectors import F32, I64, LANES, Value, at, constant, load, multiply_add, splat, store, vector
from .kernels import ADDRESS, BLOCKS, FUNCTION, FUNCTION_4, PANEL_BYTES
from .latent_rows import BITS, decode_latent, row_address
from .latent_rows import BLOCKS as LATENT_BLOCKS
from .panels import call_panel
from .pointers import address, copy_floats
from .rebuilding import TILE, finish_head, rebuild_tile, shared
from .shapes import whole_vectors
from .softmax import exp, exp_row, row_maximum
from .unowned import hold, unowned

TASKS = 8  # in a decode step, if there are so many ...
FEWEST_TILES, MOST_TILES = 2, 4  # ... of this size

_FEW, _VECTORS = (0,) * FEW, (0,) * VECTORS


@kernel
def _parts_of(tiles, groups):  # type: ignore[no-untyped-def]
    """Into how many parts so many tiles are cut; never by the number of threads, on which results must not depend."""
    return max(1, min(tiles // FEWEST_TILES, max(tiles // MOST_TILES, (TASKS + groups - 1) // groups)))


@kernel
def _tiles_of(first, stop):  # type: ignore[no-untyped-def]
    return max(0, stop - first + TILE - 1) // TILE


@kernel
def _part_of(first, stop, groups, part):  # type: ignore[no-untyped-def]
    """(begin, end) of one part of the slots first ... stop - 1, whole tiles but the last; nothing after the last."""
    tiles = _tiles_of(first, stop)
    parts = _parts_of(tiles, groups)
    begin, end = first + tiles * min(part, parts) // parts * TILE, first + tiles * min(part + 1, parts) // parts * TILE
    return min(begin, stop), min(end, stop)


def attention_scratch(rebuild: int, heads: int, rank: int, d: int) -> int:
    """Numbers that a task needs: `rebuild` for keys, and for a group's query heads, a rank of values, heads of d."""
    padded = -(-heads // FEW) * FEW
    return max(rebuild + (TILE + padded) * rank + 2 * padded * TILE, heads * (rank + whole_vectors(d)))


@intrinsic
def _score_tile(typingctx: Any, keys: Any, d: Any, q: Any, scale: Any, to: Any) -> Any:
    """TILE float32 at `to` = scale * q . keys, of keys [d, TILE] and q [d] at addresses."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        keys, q, to = (b.inttoptr(args[i], cgutils.voidptr_t) for i in (0, 2, 4))
        sums = [cgutils.alloca_once(b, vector(F32)) for _ in range(TILE // LANES)]
        for total in sums:
            b.store(constant(F32, 0.0), total)
        with cgutils.for_range(b, args[1]) as loop:
            factor = splat(b, load(b, at(b, q, b.mul(loop.index, I64(4))), F32))
            row = at(b, keys, b.mul(loop.index, I64(4 * TILE)))
            for i, total in enumerate(sums):
                key = load(b, at(b, row, 4 * LANES * i), vector(F32))
                b.store(multiply_add(b, factor, key, b.load(total)), total)
        for i, total in enumerate(sums):
            store(b, b.fmul(b.load(total), splat(b, args[3])), at(b, to, 4 * LANES * i))
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i, types.float32, i), codegen


@kernel
def _add_values(cache, seq, group, first, width, p, heads, rank, values, turned, sums):  # type: ignore[no-untyped-def]
    """sums [heads and padding, rank] += p [heads and padding, TILE] times the latents in `width` slots, of values."""
    bits, blocks = cache[BITS], cache[LATENT_BLOCKS]
    for i in range(width):
        decode_latent(row_address(cache, seq, group, first + i), bits, blocks, address(values) + 4 * rank * i)
    for h in range(0, heads, FEW):
        transpose_rows(p, h, heads - 1, 0, TILE, turned, h * TILE, FEW, _FEW)
    for j in range(0, rank, WIDTH):
        for h in range(0, heads, FEW):
            to = h * rank + j
            multiply_tile(turned, h * TILE, FEW, values, j, rank, width, sums, to, rank, True, _FEW, _VECTORS)


@kernel
def _attend_part(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    first,
    stop,
    far,
    scale,
    most,
    factor,
    rank,
    scratch,
    rebuild,
    sums,
    largest,
    total,
    kept,
    columns,
    task,
    thread,
):
    groups, (_, heads, _) = len(factor.values), sums.shape
    b, group, part = task // (groups * most), task // most % groups, task % most
    d, n_head, each = factor.d, groups * heads, heads // factor.heads
    padded = (heads + FEW - 1) // FEW * FEW
    if q.shape[1] > n_head and part == most - 1:
        head, begin, end = n_head + group * heads, np.int64(0), np.int64(far[b])
    else:
        head = group * heads
        begin, end = _part_of(first[b], stop[b], groups, part)
    own = scratch[thread]
    used = rebuild
    values = own[used : used + TILE * rank]
    used += TILE * rank
    added = own[used : used + padded * rank]
    used += padded * rank
    scores = own[used : used + padded * TILE].reshape(padded, TILE)
    turned = own[used + padded * TILE : used + 2 * padded * TILE]
    highs, masses = np.empty(heads, np.float32), np.zeros(heads, np.float32)
    highs[:] = -np.inf
    added[:] = 0.0
    scores[:] = 0.0
    for tile in range(begin, end, TILE):
        width = min(TILE, end - tile)
        keys, turns = rebuild_tile(k, b, group, tile, width, factor, own)
        key = np.int64(0)
        for h in range(heads):
            if h % each == 0:  # while a head is at hand
                key = finish_head(factor, group, h // each, keys, turns)
            query = address(q) + 4 * d * (b * q.shape[1] + head + h)
            _score_tile(key, d, query, scale, address(scores) + 4 * TILE * h)
            if columns > 0:
                to = kept + 4 * ((b * n_head + head + h) * columns + tile)
                copy_floats(to, address(scores) + 4 * TILE * h, width)
            high = row_maximum(scores, h, 0, width, highs[h])
            shrink = exp(highs[h] - high)
            highs[h] = high
            masses[h] = masses[h] * shrink + exp_row(scores, h, 0, width, high)
            if shrink != 1:
                for j in range(h * rank, (h + 1) * rank):
                    added[j] *= shrink
        _add_values(v, b, group, tile, width, scores, padded, rank, values, turned, added)
    for h in range(heads):
        largest[task, h], total[task, h] = highs[h], masses[h]
    copy_floats(address(sums) + 4 * task * heads * rank, address(added), heads * rank)


@kernel
def _rebuild_values(matrix, bias, groups, most, sums, largest, total, scratch, out, kept, columns, task, thread):  # type: ignore[no-untyped-def]
    """The outputs of a KV head's query heads: parts joined, and the sums of latents through the factor."""
    (_, heads, rank), (_, n_head, d), n_kv = sums.shape, out.shape, len(bias)
    b, h = task // n_kv, task % n_kv
    each, group = n_head // n_kv, h * groups // n_kv
    begin, wide = (b * groups + group) * most, (d + LANES - 1) // LANES * LANES
    joined, found = scratch[thread, : each * rank], scratch[thread, each * rank : each * (rank + wide)]
    some = np.zeros(each, np.float32)
    for i in range(each):
        head = h * each + i
        g, high = head - group * heads, np.float32(-np.inf)
        for part in range(begin, begin + most):
            high = max(high, largest[part, g])
        mass, to = np.float32(0.0), i * rank
        joined[to : to + rank] = 0.0
        for part in range(begin, begin + most):
            # Of parts that saw nothing, which an empty range has only, the sums are 0.
            weight = exp(largest[part, g] - high) if total[part, g] > 0 else np.float32(0.0)
            mass += weight * total[part, g]
            for j in range(rank):
                joined[to + j] += sums[part, g, j] * weight
        some[i] = mass
        if mass != 0:
            for j in range(rank):
                joined[to + j] /= mass
        if columns > 0:
            row = b * n_head + head
            kept[row, columns - 2], kept[row, columns - 1] = high, np.float32(1.0) / mass
    for p in range(wide // LANES):
        panel = matrix[ADDRESS] + (h * (wide // LANES) + p) * matrix[PANEL_BYTES]
        i = 0
        while i < each:
            four = i + 4 <= each
            x, to = address(joined) + 4 * rank * i, address(found) + 4 * (wide * i + LANES * p)
            call_panel(
                matrix[FUNCTION_4] if four else matrix[FUNCTION], panel, matrix[BLOCKS], x, 4 * rank, to, 4 * wide
            )
            i += 4 if four else 1
    for i in range(each):
        for j in range(d):
            value = found[wide * i + j] + bias[h, j]
            out[b, h * each + i, j] = value if some[i] != 0 else np.float32(0.0)


@kernel
def attend(crew, q, k, v, first, stop, far, scale, k_factor, matrix, bias, rank, scratch, rebuild, out, kept):  # type: ignore[no-untyped-def]
    """One decode step over described latents k, v (see latent_rows); q [B, H_q, d], or [B, 2 H_q, d], first, stop, far,
    out and kept as in `attention.attend`.

    k_factor: Packed, as a tuple. matrix: of the values' factor as kernels take weights (see `kernels`), each head's
    rows filled up to whole vectors; bias [H_kv, d]; rank: columns of the matrix. scratch: attention_scratch(`rebuild`,
    ...) numbers for each thread.
    """
    (n_seq, n_head, _), keys = out.shape, shared(k_factor)
    groups = len(keys.values)
    heads, most = n_head // groups, 1
    for b in range(n_seq):
        most = max(most, _parts_of(_tiles_of(first[b], stop[b]), groups))
    most += 1 if q.shape[1] > n_head else 0
    tasks = n_seq * groups * most
    sums = np.empty((tasks, heads, rank), np.float32)
    largest, total = np.empty((tasks, heads), np.float32), np.empty((tasks, heads), np.float32)
    columns = kept.shape[1]
    of = (unowned(q), unowned(k), unowned(v), unowned(first), unowned(stop), unowned(far), scale, most)
    how = (keys, rank, unowned(scratch), rebuild)
    to = (unowned(sums), unowned(largest), unowned(total))
    share_long(crew, tasks, _attend_part, (*of, *how, *to, address(kept), columns))
    values = (unowned(matrix), unowned(bias), groups, most)
    results = (unowned(scratch), unowned(out), unowned(kept), columns)
    share_long(crew, n_seq * len(bias), _rebuild_values, (*values, *to, *results))
    hold((sums, largest, total))
