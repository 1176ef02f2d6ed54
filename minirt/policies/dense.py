"""Dense: every token kept, every token read. The exact attention of the model, and what all others are compared with.

Slot and position are the same number. If the model was trained with a sliding window (Mistral 7B v0.1, arXiv
2310.06825, section 2) each query reads its last `window` positions, itself included; the rows before stay stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..cache import Cache, CachePlan
from ..config import ModelConfig
from ..stores import Store

if TYPE_CHECKING:
    from ..ops import Array, Ops


@dataclass(frozen=True)
class Dense:
    window: int = 0  # 0: all
    name = "dense"

    def plan(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> CachePlan:
        return CachePlan((n_ctx,) * config.n_layer, k_store, v_store)

    def prefill(self, ops: Ops, cache: Cache, layer: int, seq: int, q: Array, k: Array, v: Array) -> Array:
        start, n = int(cache.n_seen[seq]), len(k)
        slots = np.arange(start, start + n, dtype=np.int32)
        ops.append(cache.layers[layer], np.full(n, seq, np.int32), slots, k, v)
        return ops.attend_chunk(q, cache.layers[layer], seq, start, self.window)

    def attend(self, ops: Ops, cache: Cache, layer: int, q: Array, k: Array, v: Array) -> Array:
        ops.append(cache.layers[layer], np.arange(len(k), dtype=np.int32), cache.n_seen, k, v)
        stop = cache.n_seen + np.int32(1)
        first = np.maximum(stop - self.window, 0) if self.window else np.zeros_like(stop)
        return ops.attend(q, cache.layers[layer], first, stop)

    def rewind(self, cache: Cache, seq: int, n: int) -> int:
        cache.n_seen[seq] = n
        return n

    def bytes_read(self, config: ModelConfig, plan: CachePlan, n: int) -> int:
        rows = min(n, self.window) if self.window else n
        row = plan.k_store.row_bytes(config.head_dim) + plan.v_store.row_bytes(config.head_dim)
        return config.n_layer * config.n_head_kv * row * rows
