"""Reading few of the cached tokens: the ops, shapes checked."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from minirt.checks import (
    check_choice,
    check_components,
    check_counts,
    check_index,
    check_ranges,
    check_rows,
    index_slots,
)
from minirt.ops import KV, CodedIndex
from minirt.stores import row_numbers

from . import coded_index, coded_search, gathered, selection, sparse, token_index
from .blocks import FORMATS
from .ir_vectors import LANES
from .rotation import ROTATED
from .shapes import check, check_rows_in_order, check_width, whole_vectors

if TYPE_CHECKING:
    from .crew import Crew

HELD_QUERIES, HELD_SUMS = 32, 16  # vectors of a few heads at hand while rows pass; queries may come from memory
MOST_TOGETHER = 8  # query heads that see a number of the index when it is read

_RECORDS = {np.dtype(np.float32): FORMATS["F32"].dtype, np.dtype(np.float16): FORMATS["F16"].dtype}
_INT32, _FLOAT16 = np.dtype(np.int32), np.dtype(np.float16)
_NOTHING = np.empty((0, 0, 0), np.float32)
_NO_COUNTS = np.empty((0, 0, 0), np.int32)


class SparseOps:
    """The part of CpuOps for it."""

    _crew: Crew
    _buffer: Any
    _like: Any
    _back: Any
    _run: Any
    _in_order: Any
    _padded: Any
    _without_padding: Any

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
        k, v = self._in_order(k), self._in_order(v)
        mean = _NOTHING if mean is None else mean
        if isinstance(index, CodedIndex):
            arrays, rotated, vectors = _coded(index, k.shape[2])
            of = *arrays, mean, seq, slot, v, rotated, vectors
            self._run(coded_index.append_codes, self._crew.call(), *of)
            return
        self._run(token_index.append_index, self._crew.call(), _records(index), mean, seq, slot, k, v)

    def mean_rows(self, v: np.ndarray, seq: int, n: int, mean: np.ndarray) -> None:
        check(v.shape[:2] == mean.shape[:2], "means", mean.shape, v.shape)
        check_width(v, mean.shape[2], "means")
        if not 0 <= seq < len(v) or not 0 <= n <= v.shape[2]:
            raise ValueError(f"values {v.shape} have no rows 0..{n} of sequence {seq}")
        token_index.mean_rows(self._crew.call(), v[seq], n, mean[seq])
        self._back(v, mean[seq])

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
        check_choice(len(q), slots := index_slots(index), stop, k, 0, local)
        n_head_kv = (index.codes if isinstance(index, CodedIndex) else index).shape[1]
        if counts is None:
            counts = _NO_COUNTS
        else:
            check_counts(counts, len(q), n_head_kv, local)
        heads = _together(q.shape[1] // n_head_kv, MOST_TOGETHER)
        out, q = self._chosen(q.shape[:2], n_head_kv, whole_vectors(slots), k), self._in_order(q)
        how: tuple[Any, ...] = (r, local, sum_logits)
        of_counts = np.float32(least), counts
        if isinstance(index, CodedIndex):
            arrays, rotated, vectors = _coded(index, q.shape[2])
            _, scored, _ = _held(q.shape[1] // n_head_kv, len(vectors))
            how = (*how, rotated, heads, vectors, scored)
            self._run(coded_search.approximate_top_k, self._crew.call(), q, *arrays, stop, *how, *out, *of_counts)
        else:
            args = q, _records(index), stop, *how, heads, *out, *of_counts
            self._run(sparse.approximate_top_k, self._crew.call(), *args)
        return out[2], out[3]

    def exact_top_k(self, q: np.ndarray, kv: KV, stop: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scale, q = np.float32(1.0 / math.sqrt(q.shape[2])), self._in_order(self._padded(q))
        check_ranges(q, kv, stop, stop)
        n_seq, n_head_kv, slots, _ = kv.k.shape
        check_choice(n_seq, slots, stop, k)
        vectors, scored, _ = _held(q.shape[1] // n_head_kv, q.shape[2] // LANES)
        out = self._chosen(q.shape[:2], n_head_kv, whole_vectors(slots), k)
        q = self._like("queries", kv.k, q)
        self._run(sparse.exact_top_k, self._crew.call(), q, kv.k, stop, scale, vectors, scored, *out, _NO_COUNTS)
        return out[2], out[3]

    def _chosen(self, queries: tuple[int, ...], n_head_kv: int, slots: int, k: int) -> tuple[np.ndarray, ...]:
        """Logits and ranks of all slots, and what is chosen by them: rows and weights."""
        n_seq, n_head = queries
        return (
            self._buffer("logits of slots", (n_seq, n_head, slots)),
            self._buffer("ranks", (n_seq, n_head_kv, slots)),
            self._buffer("rows", (n_seq, n_head_kv, k), np.int32),
            self._buffer("weights of rows", (n_seq, n_head, k)),
        )

    def top_k(self, ranks: np.ndarray, stop: np.ndarray, k: int, head: int = 0, tail: int = 0) -> np.ndarray:
        check_rows(ranks, stop, k, head, tail)
        ranks = np.ascontiguousarray(ranks, np.float32)
        rows = self._buffer("top k", (*ranks.shape[:2], k), np.int32)
        selection.top_k(self._crew.call(), ranks, stop, k, head, tail, rows)
        return rows

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
        d, q = q.shape[2], self._in_order(self._padded(q))
        check_ranges(q, kv, stop, stop)
        check_rows_in_order(rows, _INT32)
        check(rows.shape[:2] == kv.k.shape[:2], "rows", rows.shape, kv.k.shape)
        if weights is None or mean is None:
            weights = mean = _NOTHING
        else:
            _check_weights(weights, q.shape[:2], rows)
            check(mean.shape == (*kv.v.shape[:2], d), "means", mean.shape, kv.v.shape)
            mean = self._like("means", kv.v, mean)
        if counts is None:
            counts = _NO_COUNTS
        else:
            check_counts(counts, *rows.shape[:2])
        out = self._buffer("attended rows", q.shape)
        held = _held(q.shape[1] // kv.k.shape[1], q.shape[2] // LANES)
        scale, q = np.float32(1.0 / math.sqrt(d)), self._like("queries", kv.k, q)
        of = q, kv.k, kv.v, rows, stop, counts, scale, weights, mean
        _check_done(self._run(gathered.attend_rows, self._crew.call(), *of, *held, out), kv)
        return self._without_padding(self._back(kv.v, out), d)

    def add_rows(self, kv: KV, rows: np.ndarray, stop: np.ndarray, weights: np.ndarray, d: int) -> np.ndarray:
        (n_seq, n_head), (n_head_kv, slots), width = weights.shape[:2], kv.v.shape[1:3], row_numbers(kv.v)
        check(len(kv.v) == n_seq and n_head % n_head_kv == 0, "weights", weights.shape, kv.v.shape)
        check_width(kv.v, d)
        check_rows_in_order(rows, _INT32)
        check(rows.shape[:2] == kv.v.shape[:2], "rows", rows.shape, kv.v.shape)
        _check_weights(weights, (n_seq, n_head), rows)
        check_choice(n_seq, slots, stop, rows.shape[2])
        out = self._buffer("added rows", (n_seq, n_head, width))
        vectors, _, summed = _held(n_head // n_head_kv, width // LANES)
        of = kv.v, rows, stop, weights, vectors, summed
        _check_done(self._run(gathered.add_rows, self._crew.call(), *of, out), kv)
        return self._without_padding(self._back(kv.v, out), d)


def _check_done(done: bool, kv: KV) -> None:
    if not done:
        raise ValueError(f"some rows are not slots of a cache {kv.v.shape}")


def _records(index: np.ndarray) -> np.ndarray:
    """The index as items of a store, whose format kernels know."""
    if index.dtype not in _RECORDS or not index.flags.c_contiguous:
        raise ValueError(f"an index of {index.dtype} with strides {index.strides} is not float32 or float16 in C order")
    return index.view(_RECORDS[index.dtype])


def _coded(index: CodedIndex, d: int) -> tuple[tuple[np.ndarray, ...], bool, tuple[int, ...]]:
    """Codes, scales and keys as kernels take them; whether those are rotated, and a tuple as long as their vectors."""
    codes, scales, k = index
    check_width(k, d)
    check_rows_in_order(scales, _FLOAT16)
    if codes.dtype != np.uint32 or not (codes.flags.c_contiguous and scales.flags.c_contiguous):
        raise ValueError(f"an index of {codes.dtype} with strides {codes.strides} is not uint32 in C order")
    return (codes, scales.view(np.uint16), k), k.dtype.names[0] in ROTATED, (0,) * (whole_vectors(d) // LANES)


def _check_weights(weights: np.ndarray, heads: tuple[int, ...], rows: np.ndarray) -> None:
    check(weights.shape == (*heads, rows.shape[2]), "weights", weights.shape, rows.shape)


# How many go together is part of the compiled code: tuples bring their lengths as types.


@functools.cache
def _together(group: int, most: int) -> tuple[int, ...]:
    """The query heads that go together of those that share a KV head: up to `most`."""
    return (0,) * max(n for n in range(1, group + 1) if group % n == 0 and n <= max(1, most))


@functools.cache
def _held(group: int, n_vectors: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A head's vectors, the heads that are scored together, and those that are summed up together: see tiles."""
    return (0,) * n_vectors, _together(group, HELD_QUERIES // n_vectors), _together(group, HELD_SUMS // n_vectors)
