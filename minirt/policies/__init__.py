"""KV-cache policies by name: which cached tokens are kept, which are read.

A policy is a frozen dataclass of hyper-parameters with the four methods of `Policy`, written in ops, so one page
serves every device. It holds no state: what changes lives in the cache.
"""

from __future__ import annotations

from typing import Protocol

from ..cache import Cache, CachePlan
from ..config import ModelConfig
from ..errors import UsageError
from ..ops import Array, Ops
from ..stores import Store
from .dense import Dense


class Policy(Protocol):
    name: str

    def plan(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> CachePlan:
        """What to allocate for contexts of up to n_ctx tokens."""

    def prefill(self, ops: Ops, cache: Cache, layer: int, seq: int, q: Array, k: Array, v: Array) -> Array:
        """A prompt chunk of one sequence: takes q [T, H_q, d], k and v [T, H_kv, d], rotated; returns [T, H_q, d]."""

    def attend(self, ops: Ops, cache: Cache, layer: int, q: Array, k: Array, v: Array) -> Array:
        """One decode step, a token per sequence: q [B, H_q, d], k and v [B, H_kv, d]; returns [B, H_q, d]."""

    def rewind(self, cache: Cache, seq: int, n: int) -> int:
        """Forgets all but the first n tokens of a sequence; returns how many it could keep (n, or fewer)."""

    def bytes_read(self, config: ModelConfig, plan: CachePlan, n: int) -> int:
        """Bytes of cache that one decode step must read with n tokens seen, all layers, one sequence."""


POLICIES = {"dense": Dense}


def make_policy(name: str, config: ModelConfig) -> Policy:
    """The policy of that name for a model; UsageError lists what there is."""
    if name not in POLICIES:
        raise UsageError(f"unknown policy '{name}' (one of: {', '.join(POLICIES)})")
    return POLICIES[name](window=config.sliding_window)
