"""Evicted rows merged into the kept ones most like them: D2O (arXiv 2406.13035, section 3.3).

The weights of a merge are e for the kept row and e^u for each evicted one of cosine u, divided by their sum
(`normalised`), or 1 and u, divided by their number.
"""

from __future__ import annotations

import numpy as np

from .attention import most_parts, part_of
from .compiled import kernel
from .crew import share, share_long
from .rows import decode_row, encode_row
from .softmax import exp
from .tiles import most_similar


@kernel
def _part_most_similar(k, slot, stop, head, active, most, best, where, vectors, task):  # type: ignore[no-untyped-def]
    n_head_kv = k.shape[1]
    b, h, part = task // (n_head_kv * most), task // most % n_head_kv, task % most
    best[task] = -np.inf
    begin, end = part_of(head[b], stop[b], n_head_kv, part)
    if active[b] != 0 and begin < end:
        most_similar(k, b, h, begin, end - begin, slot[b, h], best, where, task, vectors)


@kernel
def _merge_row(cache, b, h, s, evicted, weights, following, i, own, total, row, mixed):  # type: ignore[no-untyped-def]
    """Row s of cache[b, h] becomes (own times itself + the sum of weights[i] times row evicted[i]) / total.

    i: the first of a list, and after it following[i] ... until -1. row [1, d] and mixed [1, H_kv, d] are scratch.
    """
    rows, d = cache[b, h], row.shape[1]
    decode_row(rows, s, row, 0)
    for j in range(d):
        mixed[0, h, j] = own * row[0, j]
    while i >= 0:
        decode_row(rows, evicted[i], row, 0)
        for j in range(d):
            mixed[0, h, j] += weights[i] * row[0, j]
        i = following[i]
    for j in range(d):
        mixed[0, h, j] /= total
    encode_row(cache, b, h, s, mixed, 0)


@kernel
def _exp(u):  # type: ignore[no-untyped-def]
    return exp(u) if u <= 0 else np.float32(1.0) / exp(-u)


@kernel
def merge(crew, k, v, slot, stop, head, active, threshold, beta, e, normalised, shared, vectors):  # type: ignore[no-untyped-def]
    """One decode step, see `Ops.merge`: k, v [B, H_kv, slots, blocks], slot int32 [B, H_kv], threshold [B, H_kv].

    vectors: a tuple with as many items as a head has vectors. False, and nothing changed, if an index lies outside the
    caches.
    """
    (n_seq, n_head_kv, n_slot, _), d = k.shape, 16 * len(vectors)
    for b in range(n_seq):
        if head[b] < 0 or stop[b] > n_slot:
            return False
        for h in range(n_head_kv):
            if active[b] != 0 and not 0 <= slot[b, h] < n_slot:
                return False
    most = most_parts(head, stop, n_head_kv)
    tasks = n_seq * n_head_kv * most
    best, where = np.empty(tasks, np.float32), np.empty(tasks, np.int64)
    share(crew, tasks, _part_most_similar, (k, slot, stop, head, active, most, best, where, vectors))
    row, mixed = np.empty((1, d), np.float32), np.empty((1, n_head_kv, d), np.float32)
    evicted, weights, following = np.empty(1, np.int32), np.empty(1, np.float32), np.full(1, -1, np.int32)
    first = np.int64(0)  # not a literal, which would be another type than in _merge_head
    for b in range(n_seq):
        if active[b] == 0:
            continue
        mean = np.float32(0.0)
        for h in range(n_head_kv):
            begin = (b * n_head_kv + h) * most
            for task in range(begin + 1, begin + most):
                if best[task] > best[begin]:
                    best[begin], where[begin] = best[task], where[task]
            mean += best[begin] / np.float32(n_head_kv)
        for h in range(n_head_kv):
            u, c = best[(b * n_head_kv + h) * most], where[(b * n_head_kv + h) * most]
            decisive = mean if shared else u
            if not decisive > -np.inf:  # there is none that may receive
                continue
            if decisive >= threshold[b, h]:
                evicted[0], weights[0] = slot[b, h], _exp(u) if normalised else u
                own, total = (e, e + weights[0]) if normalised else (np.float32(1.0), np.float32(2.0))
                _merge_row(k, b, h, c, evicted, weights, following, first, own, total, row, mixed)
                _merge_row(v, b, h, c, evicted, weights, following, first, own, total, row, mixed)
            threshold[b, h] = beta * decisive + (np.float32(1.0) - beta) * threshold[b, h]
    return True


@kernel
def _merge_head(k, v, d, kept, evicted, weights, where, merged, own, normalised, h, thread):  # type: ignore[no-untyped-def]
    b = np.int64(0)
    # The evicted of each kept row as a list, in the order of slots.
    first, following = np.full(kept.shape[1], -1, np.int32), np.empty(evicted.shape[1], np.int32)
    for i in range(evicted.shape[1] - 1, -1, -1):
        if merged[h, i]:
            c = where[h, i]
            following[i], first[c] = first[c], i
    row, mixed = np.empty((1, d), np.float32), np.empty((1, k.shape[1], d), np.float32)
    for c in range(kept.shape[1]):
        begin, s, total = np.int64(first[c]), np.int64(kept[h, c]), own
        i = begin
        while i >= 0:
            total += weights[h, i] if normalised else np.float32(1.0)
            i = np.int64(following[i])
        if begin >= 0:
            _merge_row(k, b, h, s, evicted[h], weights[h], following, begin, own, total, row, mixed)
            _merge_row(v, b, h, s, evicted[h], weights[h], following, begin, own, total, row, mixed)


@kernel
def merge_rows(crew, k, v, d, kept, evicted, weights, where, merged, own, normalised):  # type: ignore[no-untyped-def]
    """Merges the evicted rows [H_kv, n] of k, v [1, H_kv, slots, blocks] for which merged [H_kv, n] is true.

    d: numbers in a row. Each goes to the kept one [H_kv, m] whose index is where [H_kv, n], with its weight [H_kv, n];
    own: that of the kept one itself.
    """
    share_long(crew, len(kept), _merge_head, (k, v, d, kept, evicted, weights, where, merged, own, normalised))
