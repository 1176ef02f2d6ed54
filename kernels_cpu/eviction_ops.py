"""Scores that decide which cached tokens are kept, and what becomes of the others: the ops, shapes checked."""

from __future__ import annotations


class EvictionOps:
    """The part of CpuOps for it."""
