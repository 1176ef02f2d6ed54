"""Dense: every token kept, every token read. The exact attention of the model, and what all others are compared with.

Slot and position are the same number. If the model was trained with a sliding window (Mistral 7B v0.1, arXiv
2310.06825, section 2) each query reads its last `window` positions, itself included; the rows before stay stored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ..cache import Cache, CachePlan
from ..config import ModelConfig
from ..ops import Array, Ops
from ..stores import Store
from .base import BasePolicy


@dataclass(frozen=True)
class Dense(BasePolicy):
    name: ClassVar[str] = "dense"

    def check(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> None:
        self.check_stores(config, n_ctx, k_store, v_store)

    def plan(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> CachePlan:
        plan = CachePlan((n_ctx,) * config.n_layer, k_store, v_store, n_ctx, config.head_dim)
        return replace(plan, window=config.sliding_window)

    def prefill(self, ops: Ops, cache: Cache, layer: int, seq: int, q: Array, k: Array, v: Array) -> Array:
        start, n = int(cache.n_seen[seq]), len(k)
        slots = np.arange(start, start + n, dtype=np.int32)
        ops.append(cache.layers[layer], np.full(n, seq, np.int32), slots, k, v)
        return ops.attend_chunk(q, cache.layers[layer], seq, start, cache.plan.window)

    def attend(self, ops: Ops, cache: Cache, layer: int, q: Array, k: Array, v: Array) -> Array:
        every, first, stop = cache.once(_ranges)
        ops.append(cache.layers[layer], every, cache.n_seen, k, v)
        return ops.attend(q, cache.layers[layer], first, stop)

    def bytes_read(self, config: ModelConfig, plan: CachePlan, n: int) -> int:
        return plan.rows_bytes(config, (min(n, plan.window) if plan.window else n,) * config.n_layer)


def _ranges(cache: Cache) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sequences, and from where to where each is attended."""
    stop, window = cache.n_seen + np.int32(1), cache.plan.window
    first = np.maximum(stop - window, 0) if window else np.zeros_like(stop)
    return np.arange(len(stop), dtype=np.int32), first, stop
