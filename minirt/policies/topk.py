"""Top-k, FlexGen's sparse attention (arXiv 2303.06865, section 4.3): all keys are read, the values of the best k.

The probabilities are exact and are not renormalised over the k (as the SparQ authors implement it, arXiv 2312.04985,
appendix E); query heads that share keys choose the k of largest probability together. It never moves less than half of
the dense cache, and shows what choosing by the true scores would give. The prompt is attended densely.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from ..cache import Cache, CachePlan
from ..config import ModelConfig
from ..ops import Array, Ops
from ..stores import Store
from .base import parameter
from .dense import Dense
from .sparq import check_k, every_token


@dataclass(frozen=True)
class TopK(Dense):
    name: ClassVar[str] = "topk"
    k: int = parameter(128, "Tokens whose values are read.", least=1)
    needs_rows: ClassVar[str] = "reads values of single tokens"

    def check(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> None:
        super(Dense, self).check(config, n_ctx, k_store, v_store)
        check_k(self.k, n_ctx)

    def small(self) -> TopK:
        return dataclasses.replace(self, k=4)

    def attend(self, ops: Ops, cache: Cache, layer: int, q: Array, k: Array, v: Array) -> Array:
        every, first, stop, few = cache.once(lambda own: every_token(own, self.k))
        kv = cache.layers[layer]
        ops.append(kv, every, cache.n_seen, k, v)
        if few:
            return ops.attend(q, kv, first, stop)
        rows, weights = ops.exact_top_k(q, kv, stop, self.k)
        return ops.add_rows(kv, rows, stop, weights, cache.plan.head_dim)

    def bytes_read(self, config: ModelConfig, plan: CachePlan, n: int) -> int:
        d, heads = config.head_dim, config.n_layer * config.n_head_kv
        return heads * (n * plan.k_store.row_bytes(d) + min(n, self.k) * plan.v_store.row_bytes(d))
