"""Scores that decide which cached tokens are kept, and what becomes of the others, in NumPy."""

from __future__ import annotations

import numpy as np

from ..checks import (
    check_columns,
    check_copy,
    check_eviction,
    check_indices,
    check_merge,
    check_merge_evicted,
    check_overwrite,
    check_ranges,
    check_rows,
    check_scores,
)
from ..ops import KV, NO_POSITION, MergeRule
from .attention import decoded, scaled_logits, softmax, store_of, stored, weighted_values


class EvictionOps:
    def attend_weights(
        self, q: np.ndarray, kv: KV, stop: np.ndarray, weights: np.ndarray, accumulate: bool
    ) -> np.ndarray:
        check_ranges(q, kv, np.zeros_like(stop), stop)
        check_scores(weights, kv, stop)
        out = np.zeros_like(q)
        for b, n in enumerate(stop):
            if n:
                p = softmax(scaled_logits(q[b], kv.k[b, :, :n]))
                out[b] = weighted_values(p, decoded(kv.v[b, :, :n]))
                mean = p.reshape(weights.shape[1], -1, n).mean(axis=1)
                weights[b, :, :n] = weights[b, :, :n] + mean if accumulate else mean
        return out

    def add_column_sums(self, q: np.ndarray, kv: KV, seq: int, start: int, lse: np.ndarray, sums: np.ndarray) -> None:
        check_columns(q, kv, seq, start, lse, sums)
        for t in range(len(q)):
            n = start + t + 1
            p = np.exp(scaled_logits(q[t], kv.k[seq, :, :n]) - lse[t][:, None])
            sums[:, :n] += p.reshape(len(sums), -1, n).mean(axis=1)

    def overwrite(
        self, kv: KV, slot: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray, pos: np.ndarray
    ) -> None:
        check_overwrite(kv, slot, k, v, positions, pos)
        check_indices(slot, positions.shape[2])
        for b in range(len(k)):
            for h in range(k.shape[1]):
                s = slot[b, min(h, slot.shape[1] - 1)]
                stored(kv.k)[b, h, s] = store_of(kv.k).encode(k[b, h])
                stored(kv.v)[b, h, s] = store_of(kv.v).encode(v[b, h])
            positions[b, np.arange(slot.shape[1]), slot[b]] = pos[b]

    def evict(
        self,
        scores: np.ndarray,
        positions: np.ndarray,
        stop: np.ndarray,
        room: np.ndarray,
        head: np.ndarray,
        before: np.ndarray,
        slot: np.ndarray,
    ) -> None:
        check_eviction(scores, positions, stop, room, head, before, slot)
        last = np.where(stop < room, stop, np.maximum(stop - 1, head))
        check_indices(np.append(last, np.minimum(head, 0)), scores.shape[2])
        for b, n in enumerate(stop):
            for h in range(scores.shape[1]):
                found = int(n)
                if n >= room[b]:
                    may_go = (np.arange(n) >= head[b]) & (positions[b, h, :n] < before[b])
                    values = np.where(may_go & ~np.isnan(scores[b, h, :n]), scores[b, h, :n], np.inf)
                    found = int(values.argmin() if (values < np.inf).any() else head[b])
                slot[b, h] = found
                scores[b, h, found], positions[b, h, found] = 0, NO_POSITION

    def top_k(self, ranks: np.ndarray, stop: np.ndarray, k: int, head: int = 0, tail: int = 0) -> np.ndarray:
        check_rows(ranks, stop, k, head, tail)
        rows = np.zeros((*ranks.shape[:2], k), np.int32)
        for b, n in enumerate(stop):
            for h in range(ranks.shape[1]):
                rows[b, h] = largest(ranks[b, h, :n], k, head, tail)
        return rows

    def argsort(self, values: np.ndarray) -> np.ndarray:
        return np.argsort(values, axis=1, kind="stable").astype(np.int32)

    def take(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        check_indices(rows, values.shape[1])
        return np.take_along_axis(values, rows, axis=1)

    def copy_rows(self, source: KV, rows: np.ndarray, target: KV, start: int) -> None:
        check_copy(source, rows, target, start)
        check_indices(rows, source.k.shape[2])
        heads, n = np.arange(source.k.shape[1])[:, None], rows.shape[1]
        for a, b in zip(source, target, strict=True):
            b[0, :, start : start + n] = a[0, heads, rows]

    def merge(
        self,
        kv: KV,
        slot: np.ndarray,
        stop: np.ndarray,
        head: np.ndarray,
        active: np.ndarray,
        threshold: np.ndarray,
        rule: MergeRule,
    ) -> None:
        check_merge(kv, slot, stop, head, active, threshold)
        for b in np.flatnonzero(active).tolist():
            check_indices(np.append(slot[b], (head[b], max(head[b], stop[b] - 1))), kv.k.shape[2])
            n_head_kv = kv.k.shape[1]
            best, where = np.full(n_head_kv, -np.inf, np.float32), np.zeros(n_head_kv, int)
            for h in range(n_head_kv):
                s = slot[b, h]
                receivers = np.setdiff1d(np.arange(head[b], stop[b]), s)
                if len(receivers):
                    u = cosines(kv.k[b, h, s : s + 1], kv.k[b, h, receivers])[0]
                    best[h], where[h] = u.max(), receivers[u.argmax()]
            decisive = np.full_like(best, best.mean()) if rule.shared else best
            for h in np.flatnonzero(np.isfinite(decisive)).tolist():
                if decisive[h] >= threshold[b, h]:
                    merge_rows(kv, b, h, where[h], np.array([slot[b, h]]), best[h : h + 1], rule)
                threshold[b, h] = rule.beta * decisive[h] + (1 - rule.beta) * threshold[b, h]

    def merge_evicted(self, kv: KV, kept: np.ndarray, head: int, threshold: np.ndarray, rule: MergeRule) -> None:
        check_merge_evicted(kv, kept, head, threshold)
        n = kv.k.shape[2]
        evicted = np.stack([np.setdiff1d(np.arange(n), rows) for rows in kept])
        if not evicted.size:
            return
        u, where = np.zeros(evicted.shape, np.float32), np.zeros(evicted.shape, int)
        for h, rows in enumerate(kept):
            receivers = rows[rows >= head]
            similar = cosines(kv.k[0, h, evicted[h]], kv.k[0, h, receivers])
            u[h], where[h] = similar.max(axis=1), receivers[similar.argmax(axis=1)]
        decisive = np.broadcast_to(u.mean(axis=0), u.shape) if rule.shared else u
        threshold[:] = decisive.mean(axis=1)
        for h in range(len(kept)):
            merged = decisive[h] >= threshold[h]
            for c in np.unique(where[h][merged]):
                of = merged & (where[h] == c)
                merge_rows(kv, 0, h, c, evicted[h][of], u[h][of], rule)


def cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosines of stored rows x [n, d] and y [m, d]: [n, m]; 0 where a row is all zeros."""
    x, y = store_of(x).decode(x), store_of(y).decode(y)
    lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(y, axis=1)
    return np.divide(x @ y.T, lengths, out=np.zeros_like(lengths), where=lengths > 0)


def merge_rows(kv: KV, b: int, h: int, c: int, evicted: np.ndarray, u: np.ndarray, rule: MergeRule) -> None:
    """Merges evicted slots into slot c, of keys and of values alike."""
    own, weights = (rule.e, np.exp(u)) if rule.normalised else (1.0, u)
    total = own + (weights.sum() if rule.normalised else len(u))
    for array in kv:
        store, rows = store_of(array), array[b, h]
        rows[c] = store.encode(
            ((own * store.decode(rows[c]) + weights @ store.decode(rows[evicted])) / total).astype(np.float32)
        )


def largest(values: np.ndarray, k: int, head: int = 0, tail: int = 0) -> np.ndarray:
    """Where the k largest of values [n] stand, the first `head` and the last `tail` among them; ascending: int32 [k].

    NaN comes last, of equal ones the first; if n < k, zeros follow.
    """
    n = len(values)
    if n <= k:
        return np.pad(np.arange(n, dtype=np.int32), (0, k - n))
    values = np.nan_to_num(values, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    middle = head + np.argsort(-values[head : n - tail], kind="stable")[: k - head - tail]
    return np.concatenate([np.arange(head), np.sort(middle), np.arange(n - tail, n)]).astype(np.int32)
