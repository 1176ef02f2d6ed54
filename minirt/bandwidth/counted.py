"""The bytes of a cache that a step touches, counted call by call: what a policy's `bytes_read` must agree with.

A call is counted by its arguments: the slots it is told to attend, the rows it was given, the components it chooses.
Kernels read these and nothing else of a cache. What is written is counted apart: the papers' formulas leave it out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..cache import Cache, CachePlan
from ..config import ModelConfig
from ..ops import CODED_UNIT, KV, Array, CodedIndex, Far, IntArray, Ops
from ..policies import Policy
from ..stores import Latents, Store

_FLOAT32 = _INT32 = 4  # bytes


def formula_bytes(ops: Ops, policy: Policy, config: ModelConfig, cache: Cache, n: int) -> int:
    """Bytes that a step reads of the caches of all sequences, with n tokens each, by the policy's formula: for as many
    rows as it read if it finds out by itself how many."""
    n_seq = len(cache.n_seen)
    if "counts" in cache.side:
        return round(sum(policy.bytes_touched(ops, config, cache, seq, n) for seq in range(n_seq)))
    return n_seq * policy.bytes_read(config, cache.plan, n)


class CountedOps:
    """Ops that note the bytes they read and write of K, V and a policy's arrays, of all sequences together."""

    def __init__(self, ops: Ops, plan: CachePlan):
        self._ops, self._plan = ops, plan
        self.read = self.written = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def _row(self, array: Array, store: Store) -> int:
        """Bytes of a slot of keys or values, all heads."""
        numbers = array.numbers if isinstance(array, Latents) else self._plan.head_dim
        return int(array.shape[1]) * store.row_bytes(numbers)

    def _keys(self, k: Array) -> int:
        return self._row(k, self._plan.k_store)

    def _values(self, v: Array) -> int:
        return self._row(v, self._plan.v_store)

    def _both(self, kv: KV) -> int:
        return self._keys(kv.k) + self._values(kv.v)

    # -- attention -------------------------------------------------------------------------------------------------
    def attend(self, q: Array, kv: KV, first: IntArray, stop: IntArray, far: Far | None = None) -> Array:
        slots = np.maximum(stop - first, 0).sum() + (0 if far is None else far.stop.sum())
        self.read += int(slots) * self._both(kv)
        return self._ops.attend(q, kv, first, stop, far)

    def attend_weights(self, q: Array, kv: KV, stop: IntArray, weights: Array, accumulate: bool) -> Array:
        n, scores = int(stop.sum()), _FLOAT32 * int(weights.shape[1])
        self.read += n * (self._both(kv) + (scores if accumulate else 0))
        self.written += n * scores
        return self._ops.attend_weights(q, kv, stop, weights, accumulate)

    def evict(self, scores: Array, positions: Array, stop: IntArray, room: IntArray, *others: Any) -> None:
        self.read += (_FLOAT32 + _INT32) * int(scores.shape[1]) * int(stop[stop >= room].sum())
        self._ops.evict(scores, positions, stop, room, *others)

    def merge(self, kv: KV, slot: Array, stop: IntArray, head: IntArray, active: IntArray, *others: Any) -> None:
        self.read += int((stop - head)[active != 0].sum()) * self._keys(kv.k)  # one of these rows is the evicted one
        self._ops.merge(kv, slot, stop, head, active, *others)

    # -- few of the tokens -----------------------------------------------------------------------------------------
    def approximate_top_k(
        self, q: Array, index: Array | CodedIndex, stop: IntArray, r: int, *others: Any
    ) -> tuple[Array, Array]:
        if isinstance(index, CodedIndex):
            coded = stop if index.codes.shape[2] else np.zeros_like(stop)
            units, rest = coded // CODED_UNIT, stop - coded // CODED_UNIT * CODED_UNIT
            unit = int(index.codes.shape[1]) * r * (CODED_UNIT // 2 + 4)
            self.read += int(units.sum()) * unit + int(rest.sum()) * self._keys(index.k)
        else:
            self.read += int(stop.sum()) * r * int(index.shape[1]) * np.dtype(index.dtype).itemsize
        return self._ops.approximate_top_k(q, index, stop, r, *others)

    def exact_top_k(self, q: Array, kv: KV, stop: IntArray, k: int) -> tuple[Array, Array]:
        self.read += int(stop.sum()) * self._keys(kv.k)
        return self._ops.exact_top_k(q, kv, stop, k)

    def attend_rows(
        self,
        q: Array,
        kv: KV,
        rows: Array,
        stop: IntArray,
        weights: Array | None,
        mean: Array | None,
        counts: Array | None = None,
    ) -> Array:
        n_head_kv = int(rows.shape[1])
        found = n_head_kv * np.minimum(stop, rows.shape[2]) if counts is None else self._ops.to_host(counts)[..., 0]
        self.read += int(found.sum()) * self._both(kv) // n_head_kv
        self.read += 0 if mean is None else _FLOAT32 * int(np.prod(mean.shape))
        return self._ops.attend_rows(q, kv, rows, stop, weights, mean, counts)

    def add_rows(self, kv: KV, rows: Array, stop: IntArray, weights: Array, d: int) -> Array:
        self.read += int(np.minimum(stop, rows.shape[2]).sum()) * self._values(kv.v)
        return self._ops.add_rows(kv, rows, stop, weights, d)

    # -- what is written -------------------------------------------------------------------------------------------
    def append(self, kv: KV, seq: IntArray, slot: IntArray, k: Array, v: Array) -> None:
        self.written += len(seq) * self._both(kv)
        self._ops.append(kv, seq, slot, k, v)

    def overwrite(self, kv: KV, slot: Array, k: Array, v: Array, positions: Array, pos: IntArray) -> None:
        self.written += len(pos) * (self._both(kv) + _INT32 * int(positions.shape[1]))
        self._ops.overwrite(kv, slot, k, v, positions, pos)

    def append_index(
        self, index: Array | CodedIndex, mean: Array | None, seq: IntArray, slot: IntArray, k: Array, v: Array
    ) -> None:
        if not isinstance(index, CodedIndex):
            self.written += len(seq) * int(index.shape[1] * index.shape[3]) * np.dtype(index.dtype).itemsize
        if mean is not None:
            self.written += len(seq) * _FLOAT32 * int(np.prod(mean.shape[1:]))
        self._ops.append_index(index, mean, seq, slot, k, v)
