"""GpuOps: the Ops protocol on a card."""

from __future__ import annotations

from .attention_ops import AttentionOps
from .row_ops import RowOps
from .sparse_ops import SparseOps


class GpuOps(RowOps, AttentionOps, SparseOps):
    """All that a model computes stays on the card; what comes back is logits."""
