"""D2O, Dynamic Discriminative Operations (arXiv 2406.13035): H2O that gives layers different budgets, and merges what
it evicts into what it keeps.

Layers (section 3.2): F is the variance over the tokens of the attention that each received from the prompt; where it is
high few tokens matter, and the layer gets little. Tokens (section 3.3): heavy hitters and newest are kept, 3 to 1, and
the first `sinks`; an evicted token i is merged into the kept one c whose key is most like its own (cosine u), keys and
values alike, if u is at least a threshold:
    w_c = e / D,  w_i = exp(u_i) / D,  D = e + sum of exp(u_i) over all merged into c
The threshold is the mean of the best similarities when the prompt is cut; each later eviction moves it by
beta u + (1 - beta) threshold. Budgets are found out once, from the first prompt.

Deviations, where the paper leaves a choice or its published code does otherwise:
  - Scores, tests and merges per KV head, of attention averaged over the query heads that share it.
  - F is scaled to 0 ... 1 across layers before the softmax of -F, or it would hang on the length of the prompt; the
    shares are then rounded so that all layers together keep what was promised. So budgets differ by e times at most,
    and a layer may evict although the text is shorter than the mean budget.
  - With one eviction a step the paper's test compares u with the last threshold.
  - Sinks receive nothing.
`d2o-code` does as the published code (github.com/AIoT-MLSys-Lab/D2O): F is scaled across the heads inside a layer, the
ratio of a layer is L rho softmax(-x) held between 0.01 and 1, rho = budget / prompt; layers 0, 1 and the last keep all,
which no other layer pays for; heavy and newest 1 to 1; the mean u of all heads is tested, by order of eviction;
beta = 1/2; k_c becomes (k_c + sum u_i k_i) / (1 + n).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..cache import Cache, CachePlan, SideArray
from ..config import ModelConfig
from ..errors import UsageError
from ..ops import KV, Array, MergeRule, Ops
from ..stores import Store
from .base import parameter
from .budget import FEWEST
from .evicting import Evicting, Room, Step, check_pinned


@dataclass(frozen=True)
class D2O(Evicting):
    name: ClassVar[str] = "d2o"
    sinks: int = parameter(4, "First tokens that are always kept.", least=0)
    recent: int | None = parameter(None, "Newest tokens that are kept.  [default: a share of the layer's]", least=0)
    beta: float = parameter(0.7, "How fast the threshold of merging moves.", float, least=0, most=1)
    e: float = parameter(float(np.e), "Weight of the token that others are merged into.", float, least=0, most=1000)
    share_of_newest: ClassVar[float] = 0.25
    needs_rows: ClassVar[str] = "merges keys and values"

    def check(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> None:
        super().check(config, n_ctx, k_store, v_store)
        if self.compress == "stepwise":
            raise UsageError(
                f"--compress stepwise does not go with --policy {self.name}: the attention of a prompt tells what its "
                "layers keep (oneshot, chunked)"
            )
        kept = self.kept(config, n_ctx, k_store, v_store)
        if self.sinks >= kept:
            raise UsageError(f"--sinks {self.sinks} is out of range (0 to {kept - 1}, within the budget)")
        if self.recent is not None and self.sinks + self.recent >= kept:
            most = kept - self.sinks - 1
            raise UsageError(f"--recent {self.recent} is out of range (0 to {most}, with --sinks within the budget)")

    def rule(self) -> MergeRule:
        return MergeRule(self.beta, self.e, normalised=True, shared=False)

    def newest(self, limit: int) -> int:
        return int(limit * self.share_of_newest) if self.recent is None else min(self.recent, limit - 1)

    def first(self) -> int:
        return self.sinks

    # -- layers ----------------------------------------------------------------------------------------------------
    def layer_limits(self, scores: list[np.ndarray], kept: int, n_ctx: int) -> np.ndarray:
        """Tokens that each layer keeps, int32 [n_layer], of column sums [H, n] of a prompt's attention."""
        share = np.exp(-_scaled(np.array([s.var(axis=1).mean() for s in scores])))
        return spread(share, kept * len(scores), n_ctx)

    def plan(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> CachePlan:
        plan = super().plan(config, n_ctx, k_store, v_store)
        threshold = (SideArray((config.n_head_kv,), np.dtype(np.float32)),) * config.n_layer
        return dataclasses.replace(plan, side={**plan.side, "threshold": threshold})

    def limits(self, cache: Cache, layer: int) -> np.ndarray:
        found = cache.limits[:, layer]
        return np.where(found > 0, found, super().limits(cache, layer))

    def _settle(self, ops: Ops, cache: Cache, layer: int, seq: int, room: Room) -> None:
        cache.pending[layer] = room  # until all layers are known

    def prefilled(self, ops: Ops, cache: Cache, seq: int) -> None:
        rooms = [cache.pending.pop(layer) for layer in sorted(cache.pending)]
        if not rooms:
            return
        if not cache.limits[seq].any():
            scores = [np.array(ops.to_host(room.scores)) for room in rooms]
            cache.limits[seq] = self.layer_limits(scores, min(cache.plan.slots) - 1, cache.plan.n_ctx)
            check_pinned(int(cache.pinned[seq]), int(cache.limits[seq].min()), 1)
        for layer, room in enumerate(rooms):
            resized = self._resize(ops, cache, layer, int(cache.limits[seq, layer]) + 1)
            super()._settle(ops, cache, layer, seq, room._replace(in_place=room.in_place and not resized))

    def rewind(self, ops: Ops, cache: Cache, seq: int, n: int) -> int:
        kept = super().rewind(ops, cache, seq, n)
        if kept == 0:
            for threshold in cache.side["threshold"]:
                threshold[seq] = 0
        if kept == 0 and cache.limits[seq].any():
            cache.limits[seq] = 0
            for layer, slots in enumerate(cache.plan.slots):
                self._resize(ops, cache, layer, slots)
        cache.pending.clear()
        return kept

    def _resize(self, ops: Ops, cache: Cache, layer: int, slots: int) -> bool:
        """Gives a layer so many slots; in a batch, whose sequences share the memory, at least so many."""
        kv, n_seq = cache.layers[layer], len(cache.n_seen)
        old = int(kv.k.shape[2])
        if old == slots or (n_seq > 1 and old > slots):
            return False
        both, heads, d = min(old, slots), kv.k.shape[1], cache.plan.head_dim
        stores = cache.plan.k_store, cache.plan.v_store
        new = KV(*(ops.allocate(store, (n_seq, heads, slots, d)) for store in stores))
        cache.layers[layer] = new
        for target, source in zip(new, kv, strict=True):
            target[:, :, :both] = source[:, :, :both]
        for name in ("positions", "scores"):
            before = cache.side[name][layer]
            cache.side[name][layer] = after = ops.zeros((*before.shape[:2], slots), before.dtype)
            after[:, :, :both] = before[:, :, :both]
        return True

    def bytes_read(self, config: ModelConfig, plan: CachePlan, n: int) -> int:
        """As for all that evict, and the keys once more where one is merged; of layers as they are planned."""
        keys = config.n_head_kv * plan.k_store.row_bytes(config.head_dim)
        return super().bytes_read(config, plan, n) + keys * sum(slots for slots in plan.slots if n >= slots)

    def bytes_touched(self, ops: Ops, config: ModelConfig, cache: Cache, seq: int, n: int) -> float:
        plan, found = cache.plan, cache.limits[seq].tolist()
        if any(found):
            plan = dataclasses.replace(plan, slots=tuple(limit + 1 for limit in found))
        return self.bytes_read(config, plan, n)

    # -- merging ---------------------------------------------------------------------------------------------------
    def cut(self, ops: Ops, own: Cache, layer: int, room: Room, rows: Array, head: int) -> None:
        used = KV(*(a[:, :, : room.n] for a in room.kv))
        ops.merge_evicted(used, rows, head, own.side["threshold"][layer][0], self.rule())

    def evicted(self, ops: Ops, cache: Cache, layer: int, step: Step) -> None:
        free, threshold = cache.side["free"][layer], cache.side["threshold"][layer]
        ops.merge(cache.layers[layer], free, step.stop, step.head, step.full, threshold, self.rule())


@dataclass(frozen=True)
class D2OCode(D2O):
    name: ClassVar[str] = "d2o-code"
    beta: float = parameter(0.5, "How fast the threshold of merging moves.", float, least=0, most=1)
    share_of_newest: ClassVar[float] = 0.5

    def small(self) -> D2O:  # type: ignore[override]  # of a model of a few layers, d2o-code would cut none
        return D2O(budget=8, compress=self.compress, sinks=self.sinks, recent=self.recent)

    def rule(self) -> MergeRule:
        return MergeRule(self.beta, self.e, normalised=False, shared=True)

    def plan(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> CachePlan:
        plan, heads = super().plan(config, n_ctx, k_store, v_store), config.n_head_kv
        full, slots = _full_layers(config.n_layer), list(plan.slots)
        side = {name: list(arrays) for name, arrays in plan.side.items()}
        for layer in full:
            slots[layer] = n_ctx + 1
            for name in ("positions", "scores"):
                side[name][layer] = dataclasses.replace(side[name][layer], shape=(heads, n_ctx + 1))
        arrays = {name: tuple(of_layers) for name, of_layers in side.items()}
        return dataclasses.replace(plan, slots=tuple(slots), side=arrays)

    def layer_limits(self, scores: list[np.ndarray], kept: int, n_ctx: int) -> np.ndarray:
        n, layers = scores[0].shape[1], len(scores)
        x = np.array([_scaled(s.var(axis=1)).mean() for s in scores])
        share = np.exp(-x) / np.exp(-x).sum()
        ratio = np.clip(layers * kept / n * share, 0.01, 1.0)
        limits = np.maximum(ratio * n, kept if kept >= n else FEWEST).astype(np.int32)
        limits[_full_layers(layers)] = n_ctx
        return np.minimum(limits, n_ctx)


def _full_layers(layers: int) -> list[int]:
    return [0, min(1, layers - 1), layers - 1]


def spread(share: np.ndarray, total: int, most: int) -> np.ndarray:
    """`total` tokens over layers in proportion to `share`, as int32: none above `most` or below FEWEST."""
    least = min(FEWEST, total // len(share), most)
    low, high = 0.0, float(total) / share.min()
    for _ in range(60):  # the factor at which what is cut off at the ends makes up for itself
        middle = (low + high) / 2
        if np.clip(middle * share, least, most).sum() < total:
            low = middle
        else:
            high = middle
    exact = np.clip(high * share, least, most)
    limits = np.floor(exact).astype(np.int32)
    missing = min(total, most * len(share)) - int(limits.sum())
    for i in np.argsort(limits - exact, kind="stable")[: max(missing, 0)]:
        limits[i] += limits[i] < most
    return limits


def _scaled(values: np.ndarray) -> np.ndarray:
    """Moved and scaled to 0 ... 1; zeros if all are equal."""
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else np.zeros_like(values)
