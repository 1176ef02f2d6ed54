"""Window, StreamingLLM and LM-Infinite: the newest tokens, and for two of them the first ones, the attention sinks.

A cache of `budget` slots is cut in two: the first `sinks` slots hold the first tokens of the text for good, the others
are a ring of the last L = budget - sinks tokens, position p in slot sinks + p mod L. While a sink is still among the
last L tokens it is read there, at its true distance like all of them. Later it is read in its own slot, with a query
turned to where the method wants it to be. So no key is ever moved or turned again (the reference codes do, each step):

  window             no sinks
  streaming, true    the query as it is: the sink's true distance
  streaming, reindexed  the query at the last index of the cache, so that positions in the cache count without a gap
                     (StreamingLLM, arXiv 2309.17453, section 3.2)
  lm-infinite        the sink's key not turned at all and the query at `limit`: one distance for all sinks
                     (LM-Infinite, arXiv 2308.16137, section 3.1); it is dense while nothing is beyond the window

A prompt is attended by the same rule, query by query, so it does not matter in what chunks it comes. The reference code
of StreamingLLM attends prompts densely.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from ..cache import Cache, CachePlan
from ..config import ModelConfig
from ..errors import ModelError, UsageError
from ..ops import KV, Array, Far, Ops
from ..rope import Angles
from ..stores import Store
from .base import BoundedPolicy, parameter
from .budget import FEWEST, Budget


class _Step(NamedTuple):
    """What a decode step does, the same for all layers; arrays are int32 [B]."""

    every: np.ndarray  # the sequences
    slot: np.ndarray  # of the ring, for the token
    begin: list[int]  # sequences whose token is one of the first, and goes to their slots too
    sinks: np.ndarray  # slots of the first tokens, after which the ring begins
    stop: np.ndarray
    far: np.ndarray | None  # first tokens that are out of the window, if any are
    turns: Angles | None  # of the queries that these are attended with
    key_turns: list[Angles | None]  # of the keys in `begin`


@dataclass(frozen=True)
class Window(BoundedPolicy):
    name: ClassVar[str] = "window"

    @property
    def n_sinks(self) -> int:
        return 0

    def far_position(self, pos: np.ndarray, sinks: np.ndarray, length: np.ndarray) -> np.ndarray:
        """Where queries at positions pos stand for sinks outside the window: `pos` itself, or a smaller one."""
        return pos

    def sink_turns(self, ops: Ops, cache: Cache, pos: np.ndarray) -> Angles | None:
        """By how much keys at positions pos are turned to be those of sinks; None: not at all."""
        return None

    def sink_keys(self, ops: Ops, cache: Cache, k: Array, turns: Angles | None) -> Array:
        """What is stored as keys of sinks."""
        return _turned(ops, k, turns)

    def plan(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> CachePlan:
        kept = self.kept(config, n_ctx, k_store, v_store)
        return CachePlan((kept,) * config.n_layer, k_store, v_store, n_ctx, config.head_dim)

    def prefill(self, ops: Ops, cache: Cache, layer: int, seq: int, q: Array, k: Array, v: Array) -> Array:
        n, t = int(cache.n_seen[seq]), len(k)
        kv = KV(*(a[seq : seq + 1] for a in cache.layers[layer]))
        sinks, length = self._layout(cache, seq)
        ring = KV(kv.k[:, :, sinks:], kv.v[:, :, sinks:])
        pos = np.arange(n, n + t, dtype=np.int32)
        if n < sinks:
            m = min(sinks - n, t)
            keys = self.sink_keys(ops, cache, k[:m], self.sink_turns(ops, cache, pos[:m]))
            ops.append(kv, np.zeros(m, np.int32), pos[:m], keys, v[:m])
        if n + t <= length:
            ops.append(ring, np.zeros(t, np.int32), pos, k, v)
            return ops.attend_chunk(q, ring, 0, n)
        held = min(n, length)
        before = np.arange(n - held, n, dtype=np.int32) % length
        room = cache.plan.room(ops, held + t, kv)
        ops.copy_rows(ring, ops.indices(before[None]), room, 0)
        ops.append(room, np.zeros(t, np.int32), np.arange(held, held + t, dtype=np.int32), k, v)
        last = min(t, length)
        if not sinks:
            out = ops.attend_chunk(q, room, 0, held, length)
        else:
            lse, far_lse = (ops.zeros(q.shape[:2], np.dtype(np.float32)) for _ in range(2))
            back = self.far_position(pos, np.full(t, sinks, np.int32), np.full(t, length, np.int32)) - pos
            far = ops.rotate(q, cache.turns(ops, back)) if back.any() else q
            # A copy, because the op's scratch is used again.
            from_sinks = ops.concatenate([ops.attend_chunk(far, kv, 0, n - length, 0, sinks, far_lse)])
            out = ops.attend_chunk(q, room, 0, held, length, None, lse)
            ops.join_attention(out, lse, from_sinks, far_lse)
        ops.append(ring, np.zeros(last, np.int32), pos[t - last :] % length, k[t - last :], v[t - last :])
        return out

    def attend(self, ops: Ops, cache: Cache, layer: int, q: Array, k: Array, v: Array) -> Array:
        kv, pos, step = cache.layers[layer], cache.n_seen, cache.once(lambda own: self._step(ops, own))
        ops.append(kv, step.every, step.slot, k, v)
        for b, turns in zip(step.begin, step.key_turns, strict=True):
            key = self.sink_keys(ops, cache, k[b : b + 1], turns)
            ops.append(kv, step.every[b : b + 1], pos[b : b + 1], key, v[b : b + 1])
        far = None if step.far is None else Far(_turned(ops, q, step.turns), step.far)
        return ops.attend(q, kv, step.sinks, step.stop, far)

    def _step(self, ops: Ops, cache: Cache) -> _Step:
        pos = cache.n_seen
        sinks = np.maximum(cache.pinned, np.int32(self.n_sinks))
        length = np.int32(cache.plan.slots[0]) - sinks
        every, begin = np.arange(len(pos), dtype=np.int32), np.flatnonzero(pos < sinks).tolist()
        far = np.clip(pos + np.int32(1) - length, 0, sinks)
        back = self.far_position(pos, sinks, length) - pos
        turns = cache.turns(ops, back) if back.any() else None
        key_turns = [self.sink_turns(ops, cache, pos[b : b + 1]) for b in begin]
        stop = sinks + np.minimum(pos + np.int32(1), length)
        return _Step(every, sinks + pos % length, begin, sinks, stop, far if far.any() else None, turns, key_turns)

    def _layout(self, cache: Cache, seq: int) -> tuple[int, int]:
        """(slots for sinks, slots of the ring) of a sequence; what is pinned are sinks."""
        sinks, slots = max(self.n_sinks, int(cache.pinned[seq])), cache.plan.slots[0]
        if sinks + FEWEST > slots and sinks > self.n_sinks:
            raise ModelError(f"{sinks} tokens are pinned, which leaves no room in a budget of {slots}")
        return sinks, slots - sinks

    def rewind(self, ops: Ops, cache: Cache, seq: int, n: int) -> int:
        seen, torn = int(cache.n_seen[seq]), bool(cache.torn[seq])
        sinks = max(self.n_sinks, int(cache.pinned[seq]))
        nothing_lost = not torn and (n == seen or seen <= cache.plan.slots[0] - sinks)
        return super().rewind(ops, cache, seq, n if nothing_lost else 0)

    def held(self, config: ModelConfig, cache: Cache, seq: int) -> int:
        return min(int(cache.n_seen[seq]), cache.plan.slots[0])

    def bytes_read(self, config: ModelConfig, plan: CachePlan, n: int) -> int:
        return plan.rows_bytes(config, [min(n, slots) for slots in plan.slots])


def _turned(ops: Ops, x: Array, turns: Angles | None) -> Array:
    return x if turns is None else ops.rotate(x, turns)


@dataclass(frozen=True)
class _WithSinks(Window):
    sinks: int = parameter(4, "First tokens that are always kept.", least=0)
    recent: int | None = parameter(None, "Newest tokens that are kept.  [default: the rest of the budget]", least=1)

    @property
    def n_sinks(self) -> int:
        return self.sinks

    def check(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> None:
        super().check(config, n_ctx, k_store, v_store)
        kept = self.kept(config, n_ctx, k_store, v_store)
        if self.recent is not None and self.recent > n_ctx:
            raise UsageError(f"--recent {self.recent} is out of range (1 to {n_ctx}, the context)")
        if isinstance(self.budget, Budget) and self.recent is not None and self.n_sinks + self.recent != kept:
            together = f"--sinks {self.n_sinks} and --recent {self.recent} together"
            raise UsageError(f"--budget {self.budget} is not {together}: leave out --budget or --recent")
        most = min(kept, n_ctx) - 1
        if self.sinks > most:
            raise UsageError(f"--sinks {self.sinks} is out of range (0 to {most}, within the budget)")

    def small(self) -> _WithSinks:
        sinks = min(self.sinks, 1)
        return dataclasses.replace(self, sinks=sinks, budget=sinks + FEWEST, recent=None)

    def kept(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> int:
        if self.recent is not None and self.budget is None:
            return self.n_sinks + min(self.recent, n_ctx)
        return super().kept(config, n_ctx, k_store, v_store)


@dataclass(frozen=True)
class Streaming(_WithSinks):
    name: ClassVar[str] = "streaming"
    positions: str = parameter(
        "true", "Of the first tokens: true, or reindexed as if nothing were missing.", str, of=("true", "reindexed")
    )

    def far_position(self, pos: np.ndarray, sinks: np.ndarray, length: np.ndarray) -> np.ndarray:
        return pos if self.positions == "true" else np.minimum(pos, sinks + length - 1)


@dataclass(frozen=True)
class LMInfinite(_WithSinks):
    name: ClassVar[str] = "lm-infinite"
    sinks: int = parameter(16, "First tokens that are always kept.", least=0)
    limit: int | None = parameter(
        None, "Distance at which the first tokens are seen.  [default: the newest that are kept]", least=1
    )

    def check(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> None:
        super().check(config, n_ctx, k_store, v_store)
        if self.limit is not None and self.limit > n_ctx:
            raise UsageError(f"--limit {self.limit} is out of range (1 to {n_ctx}, the context)")

    def far_position(self, pos: np.ndarray, sinks: np.ndarray, length: np.ndarray) -> np.ndarray:
        return np.minimum(pos, length if self.limit is None else self.limit)

    def sink_turns(self, ops: Ops, cache: Cache, pos: np.ndarray) -> Angles | None:
        return None if cache.plan.k_store.latent else cache.turns(ops, -pos)

    def sink_keys(self, ops: Ops, cache: Cache, k: Array, turns: Angles | None) -> Array:
        if not cache.plan.k_store.latent:
            return super().sink_keys(ops, cache, k, turns)
        k = ops.concatenate([k])  # turned when they are rebuilt, at the position that is their last number
        k[..., -1] = 0
        return k
