"""GpuOps: the Ops protocol on a card."""

from __future__ import annotations

from .attention_ops import AttentionOps
from .eviction_ops import EvictionOps
from .latent_ops import LatentOps
from .row_ops import RowOps
from .sparse_ops import SparseOps


class GpuOps(RowOps, AttentionOps, EvictionOps, SparseOps, LatentOps):
    """All that a model computes stays on the card; what comes back is logits."""
