"""The KV cache: what a policy planned, allocated by a device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .config import ModelConfig
from .stores import Store

if TYPE_CHECKING:
    from .ops import KV, Array, Ops


@dataclass(frozen=True)
class CachePlan:
    """What a policy needs: slots per sequence in each layer, and the stores of K and V.

    A slot is where a row lies; a position is where its token stood in the text. They are different numbers as soon as
    something is evicted.
    """

    slots: tuple[int, ...]  # per layer
    k_store: Store
    v_store: Store

    def nbytes(self, config: ModelConfig, n_sequences: int = 1) -> int:
        """Bytes of all K and V."""
        row = self.k_store.row_bytes(config.head_dim) + self.v_store.row_bytes(config.head_dim)
        return n_sequences * config.n_head_kv * row * sum(self.slots)


@dataclass
class Cache:
    """Keys, values and side arrays of every layer for B sequences."""

    plan: CachePlan
    layers: list[KV]
    n_seen: np.ndarray  # int32 [B]: tokens seen, which is the next token's true position
    side: dict[str, list[Array]] = field(default_factory=dict)  # a policy's own arrays, one per layer


def allocate_cache(plan: CachePlan, config: ModelConfig, ops: Ops, n_sequences: int = 1) -> Cache:
    """An empty cache. Memory is only touched as it fills, so a long context costs nothing until it is used."""
    from .ops import KV

    layers = []
    for slots in plan.slots:
        shape = (n_sequences, config.n_head_kv, slots, config.head_dim)
        layers.append(KV(ops.allocate(plan.k_store, shape), ops.allocate(plan.v_store, shape)))
    return Cache(plan, layers, np.zeros(n_sequences, np.int32))
