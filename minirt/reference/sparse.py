"""Reading few of the cached tokens, in NumPy: SparQ (arXiv 2312.04985, algorithm 1), top-k (FlexGen, 2303.06865)."""

from __future__ import annotations

import numpy as np

from ..checks import check_choice, check_components, check_counts, check_index, check_ranges, index_slots
from ..ops import KV, CodedIndex
from .attention import decoded, scaled_logits, softmax, store_of, weighted_values
from .eviction import largest
from .index import decode_index, encode_units


class SparseOps:
    def append_index(
        self,
        index: np.ndarray | CodedIndex,
        mean: np.ndarray | None,
        seq: np.ndarray,
        slot: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
    ) -> None:
        check_index(index, mean, seq, slot, k, v)
        if isinstance(index, CodedIndex):
            encode_units(index, seq, slot)
        else:
            tokens = index.shape[4]
            index[seq, :, slot // tokens, :, slot % tokens] = store_of(index).encode(k)
        if mean is not None:
            for i, b in enumerate(seq):
                mean[b] += (v[i] - mean[b]) / np.float32(slot[i] + 1)

    def mean_rows(self, v: np.ndarray, seq: int, n: int, mean: np.ndarray) -> None:
        rows = store_of(v).decode(v[seq, :, :n])
        mean[seq] = rows.mean(axis=1, dtype=np.float64) if n else 0.0

    def approximate_top_k(
        self,
        q: np.ndarray,
        index: np.ndarray | CodedIndex,
        stop: np.ndarray,
        r: int,
        k: int,
        local: int,
        sum_logits: bool,
        least: float = 0.0,
        counts: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        check_components(q, index, r)
        check_choice(len(q), index_slots(index), stop, k, 0, local)
        n_head_kv, d = index[0].shape[1] if isinstance(index, CodedIndex) else index.shape[1], q.shape[2]
        if counts is not None:
            check_counts(counts, len(q), n_head_kv, local)
        rows, weights = _empty(q, n_head_kv, k)
        for b, n in enumerate(stop):
            keys = (decode_index if isinstance(index, CodedIndex) else _keys)(index, b, int(n))  # type: ignore[arg-type]
            for h, heads in enumerate(_heads(q, n_head_kv)):
                chosen = top_components(q[b, heads], r)
                few = q[b, heads][:, chosen]
                share = np.abs(few).sum(axis=1) / np.maximum(np.abs(q[b, heads]).sum(axis=1), 1e-30)
                tau = np.sqrt(d * share)[:, None]
                logits = np.divide(few, tau, out=np.zeros_like(few), where=tau > 0) @ keys[h][:, chosen].T
                _choose(logits, local, sum_logits, rows[b, h], weights[b, heads])
                if counts is not None and n:
                    seen = np.abs(few).sum() / np.maximum(np.abs(q[b, heads]).sum(), np.float32(1e-30))
                    kept = keep_heavy(rows[b, h], weights[b, heads], int(n), local, least, seen)
                    counts[b, h, 0] = kept
                    counts[b, h, 1:] += (kept, 1) if n > k else (0, 0)
        return rows, weights

    def exact_top_k(self, q: np.ndarray, kv: KV, stop: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        check_ranges(q, kv, np.zeros_like(stop), stop)
        check_choice(len(q), kv.k.shape[2], stop, k)
        rows, weights = _empty(q, kv.k.shape[1], k)
        for b, n in enumerate(stop):
            logits = scaled_logits(q[b], kv.k[b, :, :n])
            for h, heads in enumerate(_heads(q, kv.k.shape[1])):
                _choose(logits[heads], 0, False, rows[b, h], weights[b, heads])
        return rows, weights

    def attend_rows(
        self,
        q: np.ndarray,
        kv: KV,
        rows: np.ndarray,
        stop: np.ndarray,
        weights: np.ndarray | None,
        mean: np.ndarray | None,
        counts: np.ndarray | None = None,
    ) -> np.ndarray:
        out = np.zeros_like(q)
        if counts is not None:
            check_counts(counts, *rows.shape[:2])
        for b, h, heads, chosen in _groups(q, kv, rows, stop):
            chosen = chosen if counts is None else chosen[: counts[b, h, 0]]
            p = softmax(scaled_logits(q[b, heads], kv.k[b, h : h + 1][:, chosen]))
            y = weighted_values(p, decoded(kv.v[b, h : h + 1][:, chosen]))
            if weights is not None and mean is not None:
                alpha = weights[b, heads, : len(chosen)].sum(axis=1)[:, None]
                y = alpha * y + (1 - alpha) * mean[b, h]
            out[b, heads] = y
        return out

    def add_rows(self, kv: KV, rows: np.ndarray, stop: np.ndarray, weights: np.ndarray, d: int) -> np.ndarray:
        out = np.zeros((*weights.shape[:2], d), np.float32)
        for b, h, heads, chosen in _groups(out, kv, rows, stop):
            out[b, heads] = weighted_values(weights[b, heads, : len(chosen)], decoded(kv.v[b, h : h + 1][:, chosen]))
        return out


def _keys(index: np.ndarray, b: int, n: int) -> np.ndarray:
    """The first n keys of a sequence: float32 [H_kv, n, d]."""
    n_head_kv, d = index.shape[1], index.shape[3]
    return store_of(index).decode(index[b].swapaxes(2, 3).reshape(n_head_kv, -1, d)[:, :n])


def top_components(q: np.ndarray, r: int) -> np.ndarray:
    """The r components of largest sum of |q| over the heads of q [g, d], of equal ones the first; ascending."""
    return np.sort(np.argsort(-np.abs(q).sum(axis=0), kind="stable")[:r])


def _heads(q: np.ndarray, n_head_kv: int) -> list[slice]:
    """The query heads of each KV head."""
    group = q.shape[1] // n_head_kv
    return [slice(h, h + group) for h in range(0, q.shape[1], group)]


def _empty(q: np.ndarray, n_head_kv: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((len(q), n_head_kv, k), np.int32), np.zeros((*q.shape[:2], k), np.float32)


def _choose(logits: np.ndarray, local: int, sum_logits: bool, rows: np.ndarray, weights: np.ndarray) -> None:
    """By the logits [g, n] of a group: its rows [k], and what they weigh [g, k]."""
    logits = np.where(np.isnan(logits), -np.inf, logits)
    with np.errstate(invalid="ignore"):  # nothing but -inf
        p = np.nan_to_num(softmax(logits)) if logits.shape[1] else logits
    ranks = (logits if sum_logits else p).sum(axis=0)
    rows[:] = largest(ranks, len(rows), tail=local)
    n = min(len(rows), len(ranks))
    weights[:, :n] = p[:, rows[:n]]


def tempered(weights: np.ndarray, seen: np.float32) -> np.ndarray:
    """Weights [k] to the power of `seen`, rounded to quarters, which square roots can do."""
    half = np.sqrt(weights)
    powers = np.sqrt(half), half, half * np.sqrt(half), weights
    return powers[int(np.clip(np.floor(4 * seen + np.float32(0.5)), 1, 4)) - 1]


def keep_heavy(rows: np.ndarray, weights: np.ndarray, stop: int, local: int, least: float, seen: np.float32) -> int:
    """Of rows [k] of a text of `stop` tokens, the newest and those that weigh enough become the first; how many."""
    if stop <= len(rows):
        return stop
    own = tempered(weights.sum(axis=0), seen)
    kept = (own >= np.float32(least) * own.sum()) | (rows >= stop - local)
    m = int(kept.sum())
    rows[:m], weights[:, :m] = rows[kept], weights[:, kept]
    return m


def _groups(q, kv, rows, stop):  # type: ignore[no-untyped-def]
    """(sequence, KV head, its query heads, the rows that count) for all that read something."""
    for b, n in enumerate(stop):
        for h, heads in enumerate(_heads(q, kv.k.shape[1])):
            if n:
                yield b, h, heads, rows[b, h, : min(int(n), rows.shape[2])]
