"""Reading few of the cached tokens, in NumPy: SparQ (arXiv 2312.04985, algorithm 1), top-k (FlexGen, 2303.06865)."""

from __future__ import annotations

import numpy as np

from ..checks import check_index, check_ranges
from ..ops import INDEX_BLOCK, KV
from .attention import scaled_logits, softmax, store_of, weighted_values


class SparseOps:
    def append_index(self, index: np.ndarray, seq: np.ndarray, slot: np.ndarray, k: np.ndarray) -> None:
        check_index(index, seq, slot, k)
        index[seq, :, slot // INDEX_BLOCK, :, slot % INDEX_BLOCK] = store_of(index).encode(k)

    def update_mean(self, mean: np.ndarray, seq: np.ndarray, count: np.ndarray, v: np.ndarray) -> None:
        for i, b in enumerate(seq):
            mean[b] += (v[i] - mean[b]) / np.float32(count[i])

    def mean_rows(self, v: np.ndarray, seq: int, n: int, mean: np.ndarray) -> None:
        rows = store_of(v).decode(v[seq, :, :n])
        mean[seq] = rows.mean(axis=1, dtype=np.float64) if n else 0.0

    def approximate_scores(
        self, q: np.ndarray, index: np.ndarray, stop: np.ndarray, r: int, sum_logits: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        n_head_kv, d = index.shape[1], q.shape[2]
        scores, ranks = _empty(q, n_head_kv, stop)
        for b, n in enumerate(stop):
            keys = store_of(index).decode(index[b].swapaxes(2, 3).reshape(n_head_kv, -1, d)[:, :n])
            for h, heads in enumerate(_heads(q, n_head_kv)):
                chosen = top_components(q[b, heads], r)
                few = q[b, heads][:, chosen]
                share = np.abs(few).sum(axis=1) / np.maximum(np.abs(q[b, heads]).sum(axis=1), 1e-30)
                tau = np.sqrt(d * share)[:, None]
                logits = np.divide(few, tau, out=np.zeros_like(few), where=tau > 0) @ keys[h][:, chosen].T
                _rank(logits, scores[b, heads, :n], ranks[b, h, :n], sum_logits)
        return scores, ranks

    def exact_scores(self, q: np.ndarray, kv: KV, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        check_ranges(q, kv, np.zeros_like(stop), stop)
        n_head_kv = kv.k.shape[1]
        scores, ranks = _empty(q, n_head_kv, stop)
        for b, n in enumerate(stop):
            logits = scaled_logits(q[b], kv.k[b, :, :n])
            for h, heads in enumerate(_heads(q, n_head_kv)):
                _rank(logits[heads], scores[b, heads, :n], ranks[b, h, :n], False)
        return scores, ranks

    def attend_rows(
        self,
        q: np.ndarray,
        kv: KV,
        rows: np.ndarray,
        stop: np.ndarray,
        scores: np.ndarray | None,
        mean: np.ndarray | None,
    ) -> np.ndarray:
        out = np.zeros_like(q)
        for b, h, heads, chosen in _groups(q, kv, rows, stop):
            p = softmax(scaled_logits(q[b, heads], kv.k[b, h : h + 1][:, chosen]))
            y = weighted_values(p, kv.v[b, h : h + 1][:, chosen])
            if scores is not None and mean is not None:
                alpha = scores[b, heads][:, chosen].sum(axis=1)[:, None]
                y = alpha * y + (1 - alpha) * mean[b, h]
            out[b, heads] = y
        return out

    def add_rows(self, kv: KV, rows: np.ndarray, stop: np.ndarray, scores: np.ndarray, d: int) -> np.ndarray:
        out = np.zeros((len(scores), scores.shape[1], d), np.float32)
        for b, h, heads, chosen in _groups(out, kv, rows, stop):
            out[b, heads] = weighted_values(scores[b, heads][:, chosen], kv.v[b, h : h + 1][:, chosen])
        return out


def top_components(q: np.ndarray, r: int) -> np.ndarray:
    """The r components of largest sum of |q| over the heads of q [g, d], of equal ones the first; ascending."""
    return np.sort(np.argsort(-np.abs(q).sum(axis=0), kind="stable")[:r])


def _heads(q: np.ndarray, n_head_kv: int) -> list[slice]:
    """The query heads of each KV head."""
    group = q.shape[1] // n_head_kv
    return [slice(h, h + group) for h in range(0, q.shape[1], group)]


def _empty(q: np.ndarray, n_head_kv: int, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n = int(stop.max())
    return np.zeros((len(q), q.shape[1], n), np.float32), np.zeros((len(q), n_head_kv, n), np.float32)


def _rank(logits: np.ndarray, scores: np.ndarray, ranks: np.ndarray, sum_logits: bool) -> None:
    """Logits [g, S] of a group become its scores and ranks."""
    logits = np.where(np.isnan(logits), -np.inf, logits)
    with np.errstate(invalid="ignore"):  # nothing but -inf
        scores[:] = np.nan_to_num(softmax(logits)) if logits.shape[1] else logits
    ranks[:] = (logits if sum_logits else scores).sum(axis=0)


def _groups(q, kv, rows, stop):  # type: ignore[no-untyped-def]
    """(sequence, KV head, its query heads, the rows that count) for all that read something."""
    for b, n in enumerate(stop):
        for h, heads in enumerate(_heads(q, kv.k.shape[1])):
            if n:
                yield b, h, heads, rows[b, h, : min(int(n), rows.shape[2])]
