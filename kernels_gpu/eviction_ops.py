"""Scores that decide which cached tokens are kept, and what becomes of the others, on a card.

Where a slot that a kernel has found lies outside its cache, the kernels of a decode step leave that sequence as it is:
to look would be to wait. After a prompt such slots are brought to the host and checked.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from minirt.checks import (
    check_columns,
    check_copy,
    check_eviction,
    check_indices,
    check_merge,
    check_merge_evicted,
    check_overwrite,
    check_ranges,
    check_scores,
)
from minirt.ops import KV, MergeRule

from .attention_ops import check_heads, stores
from .base import BaseOps
from .device import Array
from .latent_rows import LatentRows

WARP = 32
TILE = 1024  # numbers that a block sorts, in eviction.cu
PASSING, WARPS = 32, 8  # of column_products.cuh
ROWS_THREADS, AHEAD = 128, 4  # of merging.cuh
WAVES = 2  # blocks that a multiprocessor is given where work is cut to fill the card
WORDS = {16: "uint4", 8: "uint2", 4: "u32", 2: "u16", 1: "u8"}


class EvictionOps(BaseOps):
    _attend: Any
    _rotated: Any
    _add_group_sums: Any
    _overwrite_latents: Any

    # -- attention -----------------------------------------------------------------------------------------------------
    def attend_weights(self, q: Array, kv: KV, stop: np.ndarray, weights: Array, accumulate: bool) -> Array:
        first = _zeros(len(stop))
        check_ranges(q, kv, first, stop)
        check_scores(weights, kv, stop)
        (n_seq, n_head, _), (_, heads, slots) = q.shape, weights.shape
        out = self._buffer("attended with weights", q.shape)
        scores, totals = self._buffer("scores", (n_seq, n_head, slots)), self._buffer("totals", (n_seq, n_head, 2))
        ranges, group = [self._on_device(numbers) for numbers in (first, stop)], n_head // heads
        self._attend(
            "attention.cu", "attend", q, kv, out, slots, *ranges, None, scores=scores, totals=totals, FAR=0
        )  # fmt: skip
        self._launch(
            "eviction.cu", "average_weights", (_over(slots, WARP), heads, n_seq), (WARP, min(8, group)), scores, totals,
            slots, ranges[1], group, int(accumulate), *_spans(weights, np.float32),
        )  # fmt: skip
        return out

    def add_column_sums(self, q: Array, kv: KV, seq: int, start: int, lse: Array, sums: Array) -> None:
        check_columns(q, kv, seq, start, lse, sums)
        if isinstance(kv.k, LatentRows):
            self._add_group_sums(q, kv, seq, start, lse, sums)
            return
        (t, n_head, d), (heads, columns) = q.shape, sums.shape
        check_heads(d, q, lse)
        constants, group = _keys_of(kv), n_head // heads
        if constants.pop("K_ROTATED"):
            q = self._rotated(q, self._buffer("rotated queries", q.shape))
        rows, blocks = t * group, _over(columns, _staying(d, kv.k.kind == "f32"))
        parts = _over(WAVES * 2 * self.device.multiprocessors, blocks * heads)
        parts = max(1, min(parts, rows // (8 * PASSING)))
        rows_each = _over(_over(rows, parts), PASSING) * PASSING
        parts = _over(rows, rows_each)
        partial = self._buffer("partial sums", (parts, heads, columns))
        self._launch(
            "column_sums.cu", "add_probabilities", (blocks, heads, parts), WARPS * WARP, *kv.k.arguments, seq, columns,
            q, lse, group, start, rows, rows_each, partial, **constants,
        )  # fmt: skip
        self._launch(
            "column_sums.cu", "join_probabilities", (_over(columns, 256), heads), 256, partial, parts, rows_each, group,
            start, columns, *_row_span(sums, np.float32), **constants,
        )  # fmt: skip

    # -- decode steps --------------------------------------------------------------------------------------------------
    def overwrite(self, kv: KV, slot: Array, k: Array, v: Array, positions: Array, pos: np.ndarray) -> None:
        check_overwrite(kv, slot, k, v, positions, pos)
        if isinstance(kv.k, LatentRows):
            self._overwrite_latents(kv, _in_order(slot)[0], k, v, positions, pos)
            return
        n_seq, n_head_kv, d = k.shape
        if k.shape != v.shape or d != kv.k.numbers:
            raise ValueError(f"keys {k.shape} and values {v.shape} do not fit a cache {kv.k.shape}")
        self._launch(
            "cache.cu", "overwrite", (n_head_kv, n_seq, 2), min(256, _over(d, WARP) * WARP), *kv.k.arguments,
            *kv.v.arguments, *_in_order(slot), slot.shape[1], positions.shape[2], k, v, *_spans(positions, np.int32),
            self._on_device(pos), **stores(kv),
        )  # fmt: skip

    def evict(
        self,
        scores: Array,
        positions: Array,
        stop: np.ndarray,
        room: np.ndarray,
        head: np.ndarray,
        before: np.ndarray,
        slot: Array,
    ) -> None:
        check_eviction(scores, positions, stop, room, head, before, slot)
        n_seq, heads, slots = scores.shape
        last = np.where(stop < room, stop, np.maximum(stop - 1, head))
        check_indices(np.concatenate([last, np.minimum(head, 0), np.minimum(stop, 0)]), slots)
        threads = min(1024, max(64, _over(slots, 8 * WARP) * WARP))
        self._launch(
            "eviction.cu", "evict", (heads, n_seq), threads, *_spans(scores, np.float32), *_spans(positions, np.int32),
            slots, *map(self._on_device, (stop, room, head, before)), *_in_order(slot),
        )  # fmt: skip

    def merge(
        self,
        kv: KV,
        slot: Array,
        stop: np.ndarray,
        head: np.ndarray,
        active: np.ndarray,
        threshold: Array,
        rule: MergeRule,
    ) -> None:
        check_merge(kv, slot, stop, head, active, threshold)
        n_seq, n_head_kv, slots, _ = kv.k.shape
        check_indices(np.concatenate([head, np.maximum(head, stop - 1)])[np.tile(active != 0, 2)], slots)
        rows = AHEAD * ROWS_THREADS // _lanes(kv.k.numbers)  # that a block reads at once
        parts = _over(WAVES * self.device.multiprocessors, n_seq * n_head_kv)
        parts = max(1, min(parts, _over(slots, rows)))
        best = self._buffer("most similar", (n_seq, n_head_kv, parts, 2))
        self._launch(
            "merging.cu", "merge", (parts, n_head_kv, n_seq), ROWS_THREADS, *kv.k.arguments, *kv.v.arguments, slots,
            *_in_order(slot), *map(self._on_device, (stop, head, active)), *_in_order(threshold), float(rule.beta),
            float(rule.e), int(rule.normalised), int(rule.shared), best, self._counters(n_seq * n_head_kv),
            **_unrotated(kv),
        )  # fmt: skip

    # -- prompts -------------------------------------------------------------------------------------------------------
    def argsort(self, values: Array) -> Array:
        heads, n = values.shape
        keys = [self._buffer(f"sort keys {i}", (heads, n), np.uint64) for i in range(2)]
        grid = _over(n, TILE), heads
        self._launch("eviction.cu", "sort_tiles", grid, 256, *_row_span(values, np.int32), n, keys[0])
        run = TILE
        while run < n:
            self._launch("eviction.cu", "merge_runs", (_over(n, 256), heads), 256, keys[0], n, run, keys[1])
            keys.reverse()
            run *= 2
        order = self._buffer("order", (heads, n), np.int32)
        self._launch("eviction.cu", "places", _over(heads * n, 256), 256, keys[0], np.int64(heads * n), order)
        return order

    def take(self, values: Array, rows: Array) -> Array:
        (heads, n), (_, m) = values.shape, rows.shape
        if len(rows) not in (1, heads) or values.dtype.itemsize != 4:
            raise ValueError(f"rows {rows.shape} do not fit values {values.shape} of {values.dtype}")
        check_indices(self.device.download(rows), n)
        out = self._buffer("taken", (heads, m), values.dtype)
        self._launch(
            "eviction.cu", "take", (_over(m, 256), heads), 256, *_row_span(values, values.dtype), *_rows(rows), m, out
        )
        return out

    def copy_rows(self, source: KV, rows: Array, target: KV, start: int) -> None:
        check_copy(source, rows, target, start)
        check_indices(self.device.download(rows), source.k.shape[2])
        end = start + rows.shape[1]
        for a, b in zip(source, target, strict=True):
            b = b[:, :, start:end]
            self._copy_rows(a.codes, rows, b.codes)
            if a.scales is not None:
                self._copy_rows(a.scales, rows, b.scales)

    def _copy_rows(self, source: Array, rows: Array, target: Array) -> None:
        heads, row = source.shape[1], source.strides[2]
        word, n = math.gcd(row, 16), rows.shape[1]
        spans = [np.int64(a.strides[1] // row) for a in (source, target)]
        grid = (_over(row, 32), heads) if n else 0
        self._launch(
            "copying.cu", "copy_rows", grid, 256, source, spans[0], target, spans[1], *_rows(rows), n, row // word,
            WORD=WORDS[word],
        )  # fmt: skip

    def merge_evicted(self, kv: KV, kept: Array, head: int, threshold: Array, rule: MergeRule) -> None:
        check_merge_evicted(kv, self.device.download(kept), head, threshold)
        (_, heads, n, _), m, constants = kv.k.shape, kept.shape[1], _keys_of(kv)
        if n == m:
            return
        check_heads(kv.k.numbers, kept, threshold)
        del constants["K_ROTATED"]
        blocks = _over(n - m, _staying(kv.k.numbers, kv.k.kind != "f16"))
        evicted = self._buffer("evicted", (heads, n - m), np.int32)
        inverse = self._buffer("inverse lengths", (heads, n))
        cosines = self._buffer("cosines", (heads, n - m))
        receivers = self._buffer("receivers", (heads, n - m), np.int32)
        self._launch(
            "similarity.cu", "find_evicted", (_over(n, 128), heads), 128, *kv.k.arguments, kept, n, m, evicted, inverse,
            **constants,
        )  # fmt: skip
        self._launch(
            "similarity.cu", "find_similar", (blocks, heads), WARPS * WARP, *kv.k.arguments, kept, evicted, inverse, n,
            m, head, cosines, receivers, **constants,
        )  # fmt: skip
        how = _unrotated(kv)
        self._launch("merging.cu", "decide", heads, 1024, cosines, n - m, int(rule.shared), threshold, receivers, **how)
        self._launch(
            "merging.cu", "merge_evicted", (m, heads, 2), ROWS_THREADS, *kv.k.arguments, *kv.v.arguments, kept, evicted,
            cosines, receivers, self.argsort(receivers), n - m, float(rule.e), int(rule.normalised), **how,
        )  # fmt: skip


@functools.cache
def _zeros(n: int) -> np.ndarray:
    """The same at each call, so that a recorded step has it once."""
    return np.zeros(n, np.int32)


def _keys_of(kv: KV) -> dict[str, int | str]:
    """How kernels read keys alone."""
    return {name: value for name, value in stores(kv).items() if not name.startswith("V_")}


def _unrotated(kv: KV) -> dict[str, int | str]:
    """How kernels read and write rows for which a rotation does not matter."""
    return {name: value for name, value in stores(kv).items() if not name.endswith("ROTATED")}


def _over(n: int, size: int) -> int:
    """Pieces of a size that n take."""
    return -(-n // size)


def _lanes(d: int) -> int:
    """That hold a row, 8 numbers each: a power of two."""
    return 1 << (_over(d, 8) - 1).bit_length()


def _staying(d: int, split: bool) -> int:
    """Rows that stay with a block of column_products.cuh."""
    return WARPS * 16 * (2 if _over(d, 32) * (2 if split else 1) <= 4 else 1)


def _in_order(array: Array) -> tuple[Array]:
    if not array.flags.c_contiguous:
        raise ValueError(f"slots or thresholds {array.shape} are an array with gaps")
    return (array,)


def _spans(array: Array, dtype: Any) -> tuple[Any, ...]:
    """[B, H, slots] as kernels take it: the array, and numbers from one sequence, and one head, to the next."""
    _check_type(array, dtype)
    return array, *(np.int64(stride // array.itemsize) for stride in array.strides[:2])


def _row_span(array: Array, dtype: Any) -> tuple[Any, ...]:
    """The same of [H, n]."""
    _check_type(array, dtype)
    return array, np.int64(array.strides[0] // array.itemsize)


def _rows(rows: Array) -> tuple[Any, ...]:
    """Slots [H, n]; a single row serves all heads."""
    array, span = _row_span(rows, np.int32)
    return array, span if len(rows) > 1 else np.int64(0)


def _check_type(array: Array, dtype: Any) -> None:
    if array.dtype != dtype or (array.size and array.strides[-1] != array.itemsize):
        raise ValueError(f"an array {array.shape} of {array.dtype} does not hold {np.dtype(dtype)} in order")
