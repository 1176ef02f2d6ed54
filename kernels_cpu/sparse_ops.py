"""Reading few of the cached tokens: the ops, shapes checked."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from minirt.checks import check_index, check_ranges, check_rows
from minirt.ops import KV

from . import gathered, selection, sparse, token_index
from .blocks import FORMATS
from .ir_vectors import LANES
from .shapes import check, check_rows_in_order, padded, whole_vectors, without_padding

if TYPE_CHECKING:
    from .crew import Crew

HELD_QUERIES, HELD_SUMS = 32, 16  # vectors of a few heads at hand while rows pass; queries may come from memory
MOST_TOGETHER = 8  # query heads whose scores a number of the index is added to

_RECORDS = {np.dtype(np.float32): FORMATS["F32"].dtype, np.dtype(np.float16): FORMATS["F16"].dtype}
_INT32 = np.dtype(np.int32)
_NOTHING = np.empty((0, 0, 0), np.float32)


class SparseOps:
    """The part of CpuOps for it."""

    _crew: Crew
    _buffer: Any

    def append_index(self, index: np.ndarray, seq: np.ndarray, slot: np.ndarray, k: np.ndarray) -> None:
        check_index(index, seq, slot, k)
        token_index.append_index(self._crew.call(), _records(index), seq, slot, np.ascontiguousarray(k))

    def update_mean(self, mean: np.ndarray, seq: np.ndarray, count: np.ndarray, v: np.ndarray) -> None:
        check(v.shape == (len(seq), *mean.shape[1:]) and len(count) == len(seq), "values", v.shape, mean.shape)
        sequences = seq.tolist()
        if min(sequences) < 0 or max(sequences) >= len(mean):
            raise ValueError(f"sequences {seq} have no means {mean.shape}")
        token_index.update_mean(mean, seq, count, np.ascontiguousarray(v))

    def mean_rows(self, v: np.ndarray, seq: int, n: int, mean: np.ndarray) -> None:
        check(v.shape[:2] == mean.shape[:2], "means", mean.shape, v.shape)
        check(v.shape[3] == whole_vectors(mean.shape[2]), "means", mean.shape, v.shape)
        if not 0 <= seq < len(v) or not 0 <= n <= v.shape[2]:
            raise ValueError(f"values {v.shape} have no rows 0..{n} of sequence {seq}")
        token_index.mean_rows(self._crew.call(), v[seq], n, mean[seq])

    def approximate_scores(
        self, q: np.ndarray, index: np.ndarray, stop: np.ndarray, r: int, sum_logits: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        n_seq, n_head_kv, blocks, d, tokens = index.shape
        n_head, slots = q.shape[1], blocks * tokens
        check(q.shape[::2] == (n_seq, d) and n_head % n_head_kv == 0, "queries", q.shape, index.shape)
        _check_stop(stop, n_seq, slots)
        if r < 1 or tokens % sparse.TILE:
            raise ValueError(f"{r} components of blocks of {tokens} tokens: none, or not whole tiles of {sparse.TILE}")
        scores = self._buffer("few scores", (n_seq, n_head, slots))
        alone = n_head == n_head_kv and not sum_logits
        ranks = scores if alone else self._buffer("few ranks", (n_seq, n_head_kv, slots))
        heads = _together(n_head // n_head_kv, MOST_TOGETHER)
        sparse.approximate_scores(
            self._crew.call(), np.ascontiguousarray(q), _records(index), stop, r, sum_logits, heads, scores, ranks
        )
        return scores, ranks

    def exact_scores(self, q: np.ndarray, kv: KV, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        d, q = q.shape[2], np.ascontiguousarray(padded(q))
        check_ranges(q, kv, stop, stop)
        n_seq, n_head_kv, slots, _ = kv.k.shape
        n_head, slots = q.shape[1], whole_vectors(slots)
        scores = self._buffer("exact scores", (n_seq, n_head, slots))
        ranks = scores if n_head == n_head_kv else self._buffer("exact ranks", (n_seq, n_head_kv, slots))
        vectors, scored, _ = _held(n_head // n_head_kv, q.shape[2] // LANES)
        scale = np.float32(1.0 / math.sqrt(d))
        sparse.exact_scores(self._crew.call(), q, kv.k, stop, scale, vectors, scored, scores, ranks)
        return scores, ranks

    def top_k(self, ranks: np.ndarray, stop: np.ndarray, k: int, head: int = 0, tail: int = 0) -> np.ndarray:
        check_rows(ranks, stop, k, head, tail)
        ranks = np.ascontiguousarray(ranks, np.float32)
        rows = self._buffer("rows", (*ranks.shape[:2], k), np.int32)
        selection.top_k(self._crew.call(), ranks, stop, k, head, tail, rows)
        return rows

    def attend_rows(
        self,
        q: np.ndarray,
        kv: KV,
        rows: np.ndarray,
        stop: np.ndarray,
        scores: np.ndarray | None,
        mean: np.ndarray | None,
    ) -> np.ndarray:
        d, q = q.shape[2], np.ascontiguousarray(padded(q))
        check_ranges(q, kv, stop, stop)
        check_rows_in_order(rows, _INT32)
        check(rows.shape[:2] == kv.k.shape[:2], "rows", rows.shape, kv.k.shape)
        if scores is None or mean is None:
            scores = mean = _NOTHING
        else:
            check(scores.shape[:2] == q.shape[:2], "scores", scores.shape, q.shape)
            _check_stop(stop, len(q), scores.shape[2])
            check(mean.shape == (*kv.v.shape[:2], d), "means", mean.shape, kv.v.shape)
        out = self._buffer("attended rows", q.shape)
        held = _held(q.shape[1] // kv.k.shape[1], q.shape[2] // LANES)
        scale = np.float32(1.0 / math.sqrt(d))
        _check_done(
            gathered.attend_rows(self._crew.call(), q, kv.k, kv.v, rows, stop, scale, scores, mean, *held, out), kv
        )
        return without_padding(out, d)

    def add_rows(self, kv: KV, rows: np.ndarray, stop: np.ndarray, scores: np.ndarray, d: int) -> np.ndarray:
        n_seq, n_head, slots = scores.shape
        n_head_kv, width = kv.v.shape[1], kv.v.shape[3]
        check(len(kv.v) == n_seq and n_head % n_head_kv == 0, "scores", scores.shape, kv.v.shape)
        check(width == whole_vectors(d), "heads", (d,), kv.v.shape)
        check_rows_in_order(rows, _INT32)
        check(rows.shape[:2] == kv.v.shape[:2], "rows", rows.shape, kv.v.shape)
        _check_stop(stop, n_seq, min(slots, kv.v.shape[2]))
        out = self._buffer("added rows", (n_seq, n_head, width))
        vectors, _, summed = _held(n_head // n_head_kv, width // LANES)
        _check_done(gathered.add_rows(self._crew.call(), kv.v, rows, stop, scores, vectors, summed, out), kv)
        return without_padding(out, d)


def _check_done(done: bool, kv: KV) -> None:
    if not done:
        raise ValueError(f"some rows are not slots of a cache {kv.v.shape}")


def _records(index: np.ndarray) -> np.ndarray:
    """The index as items of a store, whose format kernels know."""
    if index.dtype not in _RECORDS or not index.flags.c_contiguous:
        raise ValueError(f"an index of {index.dtype} with strides {index.strides} is not float32 or float16 in C order")
    return index.view(_RECORDS[index.dtype])


def _check_stop(stop: np.ndarray, n_seq: int, slots: int) -> None:
    values = stop.tolist()
    if len(values) != n_seq or min(values) < 0 or max(values) > slots:
        raise ValueError(f"{n_seq} sequences of {slots} slots have none up to {stop}")


# How many go together is part of the compiled code: tuples bring their lengths as types.


@functools.cache
def _together(group: int, most: int) -> tuple[int, ...]:
    """The query heads that go together of those that share a KV head: up to `most`."""
    return (0,) * max(n for n in range(1, group + 1) if group % n == 0 and n <= max(1, most))


@functools.cache
def _held(group: int, n_vectors: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A head's vectors, the heads that are scored together, and those that are summed up together: see tiles."""
    return (0,) * n_vectors, _together(group, HELD_QUERIES // n_vectors), _together(group, HELD_SUMS // n_vectors)
