"""Scores that decide which cached tokens are kept, and what becomes of the others: the ops, shapes checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from minirt.checks import (
    check_columns,
    check_copy,
    check_eviction,
    check_indices,
    check_join,
    check_merge,
    check_merge_evicted,
    check_overwrite,
    check_rotation,
    check_scores,
)
from minirt.ops import KV, MergeRule
from minirt.rope import Angles
from minirt.stores import Latents, row_numbers

from . import eviction, kernels, memory, merging
from .column_products import add_column_sums, most_similar_rows, scratch_size
from .crew import Crew
from .ir_vectors import LANES
from .probabilities import spread_weights
from .shapes import check_float_rows, check_rows_in_order, padded, rows_of

_F32, _I32 = np.dtype(np.float32), np.dtype(np.int32)


class EvictionOps:
    """The part of CpuOps for it."""

    threads: int
    _crew: Crew
    _rows: Any
    _like: Any
    _run: Any
    _in_order: Any
    _rebuilt: Any
    _not_recorded: Any

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return memory.zeros(shape, dtype)

    def indices(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(values, np.int32)

    def join_attention(self, out: np.ndarray, lse: np.ndarray, other: np.ndarray, other_lse: np.ndarray) -> None:
        check_join(out, lse, other, other_lse)
        with np.errstate(invalid="ignore"):  # neither saw anything: inf - inf
            share = np.nan_to_num(np.exp(other_lse - np.logaddexp(lse, other_lse)))
        out += share[..., None] * (other - out)

    def rotate(self, x: np.ndarray, angles: Angles) -> np.ndarray:
        check_rotation(x, angles)
        out, (cos, sin) = np.empty(x.shape, np.float32), angles.values
        strides = (2, 1) if angles.interleaved else (1, cos.shape[1])
        self._run(kernels.turned, self._in_order(x), out, cos, sin, *strides)
        return out

    def concatenate(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts)

    def attend_weights(
        self, q: np.ndarray, kv: KV, stop: np.ndarray, weights: np.ndarray, accumulate: bool
    ) -> np.ndarray:
        check_scores(weights, kv, stop)
        check_rows_in_order(weights, _F32)
        kept = self._buffer("kept scores", (q.shape[0] * q.shape[1], weights.shape[2] + 2))
        out = self._attend("attended with weights", q, kv, np.zeros(len(stop), np.int32), stop, None, kept)
        self._run(spread_weights, self._crew.call(), kept, stop, weights, accumulate)
        return out

    def add_column_sums(self, q: np.ndarray, kv: KV, seq: int, start: int, lse: np.ndarray, sums: np.ndarray) -> None:
        of_heads = sums
        if isinstance(kv.k, Latents):
            check_columns(q, kv, seq, start, lse, sums)
            kv, seq = self._rebuilt(kv, seq, start + len(q), keys_only=True), 0
            of_heads = np.zeros((kv.k.shape[1], sums.shape[1]), np.float32)
        d, q = q.shape[2], np.ascontiguousarray(padded(q), np.float32)
        check_columns(q, kv, seq, start, lse, of_heads)
        check_float_rows(lse)
        q = self._like("queries", kv.k, q)
        scratch = self._buffer("column products", (self.threads, scratch_size(q.shape[2])))
        keys, _, between = rows_of(kv, seq)
        add_column_sums(self._crew.call(), q, keys, between, start, lse, 1.0 / math.sqrt(d), scratch, of_heads)
        if of_heads is not sums:
            sums += of_heads.reshape(len(sums), -1, sums.shape[1]).mean(axis=1)

    def overwrite(
        self, kv: KV, slot: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray, pos: np.ndarray
    ) -> None:
        check_overwrite(kv, slot, k, v, positions, pos)
        if isinstance(kv.k, Latents):
            self._write(kv, np.arange(len(slot), dtype=np.int32), slot, k, v, positions, pos)
            return
        if not self._run(eviction.overwrite, kv.k, kv.v, slot, *self._rows(kv, k, v), positions, pos):
            raise ValueError(f"slots {slot} lie outside a cache {kv.k.shape}")

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
        check_rows_in_order(scores, _F32)
        check_rows_in_order(positions, _I32)
        if not self._run(eviction.evict, scores, positions, stop, room, head, before, slot):
            raise ValueError(f"slots {head}..{stop}, room for {room}, lie outside scores {scores.shape}")

    def argsort(self, values: np.ndarray) -> np.ndarray:
        return np.argsort(values, axis=1, kind="stable").astype(np.int32)

    def take(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        check_indices(rows, values.shape[1])
        return np.take_along_axis(values, rows, axis=1)

    def copy_rows(self, source: KV, rows: np.ndarray, target: KV, start: int) -> None:
        check_copy(source, rows, target, start)
        check_indices(rows, source.k.shape[2])
        heads, end = np.arange(source.k.shape[1])[:, None], start + rows.shape[1]
        for a, b in zip(source, target, strict=True):
            a, b = (x.rows if isinstance(x, Latents) else x for x in (a, b))
            a, b = (x.view(f"V{x.itemsize * x.shape[3]}")[0, :, :, 0] for x in (a, b))  # a row in one piece
            b[:, start:end] = a[heads, rows]

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
        vectors = (0,) * (row_numbers(kv.k) // LANES)
        how = np.float32(rule.beta), np.float32(rule.e), rule.normalised, rule.shared
        if not self._run(merging.merge, self._crew.call(), *kv, slot, stop, head, active, threshold, *how, vectors):
            raise ValueError(f"slots {slot} or {head}..{stop} lie outside a cache {kv.k.shape}")

    def merge_evicted(self, kv: KV, kept: np.ndarray, head: int, threshold: np.ndarray, rule: MergeRule) -> None:
        check_merge_evicted(kv, kept, head, threshold)
        heads, n = kv.k.shape[1:3]
        goes = np.ones((heads, n), bool)
        goes[np.arange(heads)[:, None], kept] = False
        evicted = np.nonzero(goes)[1].astype(np.int32).reshape(heads, -1)
        if not evicted.size:
            return
        u, where = np.empty(evicted.shape, np.float32), np.empty(evicted.shape, np.int32)
        scratch = self._buffer("column products", (self.threads, scratch_size(row_numbers(kv.k))))
        crew, (keys, _, between) = self._crew.call(), rows_of(kv, 0)
        d = row_numbers(kv.k)
        most_similar_rows(crew, keys, between, d, kept, head, evicted, scratch, u, where)
        decisive = np.broadcast_to(u.mean(axis=0), u.shape) if rule.shared else u
        threshold[:] = decisive.mean(axis=1)
        merged = decisive >= threshold[:, None]
        weights, own = (np.exp(u), rule.e) if rule.normalised else (u, 1.0)
        how = np.float32(own), rule.normalised
        merging.merge_rows(crew, *kv, d, kept, evicted, weights, where, merged, *how)
