"""GpuOps: the Ops protocol on a card."""

from __future__ import annotations

from .attention_ops import AttentionOps
from .row_ops import RowOps


class GpuOps(RowOps, AttentionOps):
    """All that a model computes stays on the card; what comes back is logits."""
