"""H2O, Heavy-Hitter Oracle (arXiv 2306.14048, algorithm 1): tokens that much attention went to stay, and the newest.

A token's score is the sum of the probabilities that all queries since it came gave it, those of the prompt included.
When the budget is exceeded, the lowest score among all but the newest `recent` goes, and its score with it.

Deviations: scores are kept per KV head, as the mean over the query heads that share it (the paper's models share none;
the SparQ authors, arXiv 2312.04985, do the same); sums are float32. Keys keep their true positions. Half of the budget
is for the newest tokens, as in the paper's experiments. Of cached latents (--kv palu) KV heads that share one decide
together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config import ModelConfig
from ..errors import UsageError
from ..stores import Store
from .base import parameter
from .evicting import Evicting


@dataclass(frozen=True)
class H2O(Evicting):
    name: ClassVar[str] = "h2o"
    recent: int | None = parameter(None, "Newest tokens that are kept.  [default: half of the budget]", least=0)

    def check(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> None:
        super().check(config, n_ctx, k_store, v_store)
        kept = self.kept(config, n_ctx, k_store, v_store)
        if self.recent is not None and self.recent >= kept:
            raise UsageError(f"--recent {self.recent} is out of range (0 to {kept - 1}, within the budget)")

    def newest(self, limit: int) -> int:
        return limit // 2 if self.recent is None else min(self.recent, limit - 1)
