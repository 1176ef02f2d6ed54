"""Attention of a decode step: one query for each head, exact, over cached rows of any store.

A sequence is cut into parts, each of which keeps the running maximum and sum of its softmax (arXiv 1805.02867); they
are joined at the end. A cached row is read once for its whole group of query heads.
"""

from __future__ import annotations

import numpy as np

from .block_products import queries_for
from .compiled import kernel
from .crew import share
from .pointers import address, copy_floats
from .rows import encode_row
from .softmax import exp, exp_row, row_maximum
from .tiles import add_rows, score_rows
from .unowned import hold, unowned

TILE = 64  # cached rows scored before their values are added; whole vectors, because score_rows rounds up to them
TASKS = 8  # of attention in a decode step, if there are so many ...
FEWEST_ROWS, MOST_ROWS = 128, 1024  # ... of this size: where each begins, memory is not yet asked for ahead


@kernel
def _parts_of(n, heads):  # type: ignore[no-untyped-def]
    """Into how many parts n slots are cut; never by the number of threads, on which results must not depend."""
    return max(1, min(n // FEWEST_ROWS, max(n // MOST_ROWS, (TASKS + heads - 1) // heads)))


@kernel
def most_parts(first, stop, heads):  # type: ignore[no-untyped-def]
    """The most parts that any of the ranges first[b] ... stop[b] - 1 is cut into."""
    most = 1
    for b in range(len(first)):
        most = max(most, _parts_of(stop[b] - first[b], heads))
    return most


@kernel
def part_of(first, stop, heads, part):  # type: ignore[no-untyped-def]
    """(begin, end) of one part of the slots first ... stop - 1; of those after the last part nothing."""
    n = max(0, stop - first)
    parts = _parts_of(n, heads)
    return first + n * min(part, parts) // parts, first + n * min(part + 1, parts) // parts


@kernel
def append(k_cache, v_cache, seq, slot, k, v):  # type: ignore[no-untyped-def]
    """Writes row i of k and v [N, H_kv, d] to slot[i] of sequence seq[i] of the caches [B, H_kv, slots, blocks]."""
    for i in range(len(seq)):
        for h in range(k.shape[1]):
            encode_row(k_cache, seq[i], h, slot[i], k, i)
            encode_row(v_cache, seq[i], h, slot[i], v, i)


@kernel
def _attend_part(  # type: ignore[no-untyped-def]
    q, k, v, first, stop, far, scale, most, vectors, scored, summed, sums, largest, total, kept, columns, task
):
    n_head_kv = k.shape[1]
    _, group, d = sums.shape
    b, h, part = task // (n_head_kv * most), task // most % n_head_kv, task % most
    n_head = n_head_kv * group
    if q.shape[1] > n_head and part == most - 1:
        head, begin, end = n_head + h * group, 0, far[b]
    else:
        head = h * group
        begin, end = part_of(first[b], stop[b], n_head_kv, part)
    # What changes with every tile lies in memory of its own: neighbouring tasks would fight for lines of memory.
    scores, own, highs = (
        np.empty((group, TILE), np.float32),
        np.zeros((1, group, d), np.float32),
        np.empty(group, np.float32),
    )
    masses = np.zeros(group, np.float32)
    highs[:] = -np.inf
    for tile in range(begin, end, TILE):
        width = min(TILE, end - tile)
        for g in range(0, group, len(scored)):
            score_rows(k, b, h, tile, width, q, head + g, scale, scores, g, v, 0, vectors, scored)
        for g in range(group):
            if columns > 0:
                to = kept + 4 * ((b * n_head + head + g) * columns + tile)
                copy_floats(to, address(scores) + 4 * TILE * g, width)
            high = row_maximum(scores, g, 0, width, highs[g])
            shrink = exp(highs[g] - high)
            highs[g] = high
            masses[g] = masses[g] * shrink + exp_row(scores, g, 0, width, high)
            for j in range(d):
                own[0, g, j] *= shrink
        for g in range(0, group, len(summed)):
            add_rows(v, b, h, tile, width, scores, own, 0, g, k, TILE, vectors, summed)
    for g in range(group):
        largest[task, g], total[task, g] = highs[g], masses[g]
        for j in range(d):
            sums[task, g, j] = own[0, g, j]


@kernel
def attend(crew, q, k, v, first, stop, far, scale, vectors, scored, summed, out, kept):  # type: ignore[no-untyped-def]
    """One decode step over k, v [B, H_kv, slots, blocks]; q and out [B, H_q, d].

    vectors, scored, summed: tuples with as many items as a head has vectors, and as heads are scored and summed up
    together (see tiles.py).
    If q is [B, 2 H_q, d], the second half of the heads attends slots 0 ... far[b] - 1, in the same softmax.
    If kept [B H_q, columns] has columns, each row receives the scores of its slots (to [slot]), and in its last two
    columns their maximum, and one over the sum of their exponentials below it.
    """
    n_seq, n_head, d = out.shape
    n_head_kv = k.shape[1]
    group = n_head // n_head_kv
    most = most_parts(first, stop, n_head_kv) + (1 if q.shape[1] > n_head else 0)
    tasks = n_seq * n_head_kv * most
    sums = np.empty((tasks, group, d), np.float32)
    largest, total = np.empty((tasks, group), np.float32), np.empty((tasks, group), np.float32)
    columns = kept.shape[1]
    queries = queries_for(k, q)
    of = (unowned(queries), unowned(k), unowned(v), unowned(first), unowned(stop), unowned(far), scale, most)
    to = (unowned(sums), unowned(largest), unowned(total), address(kept), columns)
    share(crew, tasks, _attend_part, (*of, vectors, scored, summed, *to))
    hold((queries,))
    for b in range(n_seq):
        for h in range(n_head):
            begin, g = (b * n_head_kv + h // group) * most, h % group
            high = np.float32(-np.inf)
            for task in range(begin, begin + most):
                high = max(high, largest[task, g])
            mass = np.float32(0.0)
            for task in range(begin, begin + most):
                # Of parts that saw nothing, which an empty range has only, the sums are 0.
                largest[task, g] = exp(largest[task, g] - high) if total[task, g] > 0 else np.float32(0.0)
                mass += largest[task, g] * total[task, g]
            for task in range(begin, begin + most):
                weight = largest[task, g] / mass if mass != 0 else np.float32(0.0)
                for j in range(d):
                    out[b, h, j] = sums[task, g, j] * weight + (out[b, h, j] if task > begin else np.float32(0.0))
            if columns > 0:
                kept[b * n_head + h, columns - 2], kept[b * n_head + h, columns - 1] = high, np.float32(1.0) / mass
