"""Reading few of the cached tokens: the ops, shapes checked."""

from __future__ import annotations


class SparseOps:
    """The part of CpuOps for it."""
