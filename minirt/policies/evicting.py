"""What TOVA, H2O and D2O share: a layer keeps `budget` tokens, and the lowest score makes room for the next.

A layer has one slot more than its budget. A step writes its token into the free slot, attends to all, and then frees
the slot whose token scores lowest, so that the next token overwrites it: nothing is ever moved. Keys lie as they were
turned at their true positions; `positions` says which these are, `scores` what the method thinks of each slot, `free`
which slot is next: per KV head, or one for the layer (`shared`).

A prompt that does not fit is attended densely with what is there, and then cut to the budget at once:
  oneshot   the whole prompt, as the papers do; a layer of it is in memory at a time
  chunked   chunk by chunk, so that a prompt of any length runs in flat memory
  stepwise  token by token, as if it had been generated
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..cache import Cache, CachePlan, SideArray
from ..config import ModelConfig
from ..errors import ModelError
from ..ops import KV, NO_POSITION, Array, Ops
from ..stores import Store
from .base import BoundedPolicy, parameter
from .budget import FEWEST

_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)


class Room(NamedTuple):
    """The tokens of one sequence in a layer while a prompt is read, in the order of their positions."""

    kv: KV  # [1, H_kv, n, d]
    positions: Array  # int32 [H, n]
    scores: Array  # float32 [H, n]
    n: int
    in_place: bool  # the cache's own slots, in which they stand already


class Step(NamedTuple):
    """What a decode step of a layer does; arrays are int32 [B]."""

    stop: np.ndarray  # tokens that are attended, the new one included
    room: np.ndarray  # slots: at `stop` = `room` one is evicted
    head: np.ndarray  # first slots that are not evicted
    before: np.ndarray  # positions from here on are not evicted
    full: np.ndarray  # 1 where stop = room
    any_full: bool


@dataclass(frozen=True)
class Evicting(BoundedPolicy):
    compress: str = parameter(
        "oneshot", "How a prompt beyond the budget is cut: oneshot, chunked, or stepwise.", str,
        of=("oneshot", "chunked", "stepwise"),
    )  # fmt: skip

    @property
    def whole_prompt(self) -> bool:  # type: ignore[override]
        return self.compress == "oneshot"

    @property
    def shared(self) -> bool:
        """Whether all KV heads of a layer keep the same tokens."""
        return False

    accumulates = True  # scores are summed over the steps; else the last step's alone count

    def newest(self, limit: int) -> int:
        """How many of the newest tokens are not evicted, of `limit` that are kept."""
        return 0

    def first(self) -> int:
        """How many of the first tokens are not evicted."""
        return 0

    def score(self, ops: Ops, q: Array, room: Room, start: int, lse: Array) -> None:
        """Scores of a prompt chunk, whose rows stand in slots start ... of the room."""
        ops.add_column_sums(q, room.kv, 0, start, lse, room.scores)

    # -- the protocol --------------------------------------------------------------------------------------------------
    def plan(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> CachePlan:
        slots, heads = self.kept(config, n_ctx, k_store, v_store) + 1, 1 if self.shared else k_store.heads(config)
        arrays = {
            "positions": SideArray((heads, slots), _INT32),
            "scores": SideArray((heads, slots), _FLOAT32),
            "free": SideArray((heads,), _INT32),
        }
        side = {name: (array,) * config.n_layer for name, array in arrays.items()}
        return CachePlan((slots,) * config.n_layer, k_store, v_store, n_ctx, config.head_dim, side=side)

    def prefill(self, ops: Ops, cache: Cache, layer: int, seq: int, q: Array, k: Array, v: Array) -> Array:
        own = cache.part(seq, seq + 1)
        check_pinned(int(own.pinned[0]), own.plan.slots[layer] - 1)
        if self.compress == "stepwise":
            return self._steps(ops, own, layer, q, k, v)
        room, start = self._room(ops, own, layer, k, v)
        lse = ops.zeros(q.shape[:2], _FLOAT32)
        out = ops.attend_chunk(q, room.kv, 0, start, lse=lse)
        self.score(ops, q, room, start, lse)
        self._settle(ops, cache, layer, seq, room)
        return out

    def attend(self, ops: Ops, cache: Cache, layer: int, q: Array, k: Array, v: Array) -> Array:
        step = cache.once(self._steps_of_layers)[layer]
        kv, side = cache.layers[layer], cache.side
        positions, scores, free = side["positions"][layer], side["scores"][layer], side["free"][layer]
        ops.overwrite(kv, free, k, v, positions, cache.n_seen)
        out = ops.attend_weights(q, kv, step.stop, scores, self.accumulates)
        ops.evict(scores, positions, step.stop, step.room, step.head, step.before, free)
        if step.any_full:
            self.evicted(ops, cache, layer, step)
        return out

    def evicted(self, ops: Ops, cache: Cache, layer: int, step: Step) -> None:
        """The slots in `free` will be overwritten in the next step, of sequences that are full."""

    def rewind(self, ops: Ops, cache: Cache, seq: int, n: int) -> int:
        seen = int(cache.n_seen[seq])
        if n == seen and not cache.torn[seq]:
            return n
        smallest = min(int(self.limits(cache, layer)[seq]) for layer in range(len(cache.layers)))
        if cache.torn[seq] or self.accumulates or seen > smallest:
            n = 0
        for scores, free in zip(cache.side["scores"], cache.side["free"], strict=True):
            scores[seq], free[seq] = 0, n
        return super().rewind(ops, cache, seq, n)

    def held(self, config: ModelConfig, cache: Cache, seq: int) -> int:
        limits = [int(self.limits(cache, layer)[seq]) for layer in range(len(cache.layers))]
        return sum(min(int(cache.n_seen[seq]), n) for n in limits) // len(limits)

    def bytes_read(self, config: ModelConfig, plan: CachePlan, n: int) -> int:
        """K and V of the budget and of the new token, and the scores: 2 k d + 2 d + S (SparQ, appendix F; writes are
        not counted)."""
        held = [min(n, slots) for slots in plan.slots]
        of_scores = sum(4 * m * scores.shape[0] for m, scores in zip(held, plan.side["scores"], strict=True))
        return plan.rows_bytes(config, held) + of_scores

    # -- the pieces ----------------------------------------------------------------------------------------------------
    def limits(self, cache: Cache, layer: int) -> np.ndarray:
        """Tokens that a layer keeps of each sequence, int32 [B]."""
        return np.full(len(cache.n_seen), cache.plan.slots[layer] - 1, np.int32)

    def _steps_of_layers(self, cache: Cache) -> list[Step]:
        steps: list[Step] = []
        for layer in range(len(cache.layers)):
            limit = self.limits(cache, layer)
            if steps and (limit + 1 == steps[-1].room).all():
                steps.append(steps[-1])
                continue
            room, stop = limit + np.int32(1), np.minimum(cache.n_seen, limit) + np.int32(1)
            head, newest = self._protected(cache, limit)
            full = (stop == room).astype(np.int32)
            steps.append(Step(stop, room, head, cache.n_seen + np.int32(1) - newest, full, bool(full.any())))
        return steps

    def _protected(self, cache: Cache, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(first slots, newest positions) that are not evicted, int32 [B] each; together they leave one that is."""
        head = np.minimum(np.maximum(cache.pinned, self.first()), limit - 1)
        newest = np.array([self.newest(n) for n in limit.tolist()], np.int32)
        return head, np.minimum(newest, limit - head)

    def _room(self, ops: Ops, own: Cache, layer: int, k: Array, v: Array) -> tuple[Room, int]:
        """What is held and a chunk after it; and where the chunk begins. In the cache itself if it fits."""
        kv, n, t = own.layers[layer], int(own.n_seen[0]), len(k)
        limit = int(self.limits(own, layer)[0])
        held = min(n, limit)
        arrays = [own.side[name][layer][0] for name in ("positions", "scores")]
        if held + t <= limit:
            room = Room(kv, arrays[0][:, : held + t], arrays[1][:, : held + t], held + t, True)
        else:
            rows = ops.argsort(arrays[0][:, : min(n, limit + 1)])[:, :held]  # a free slot comes after all others
            heads, total = arrays[0].shape[0], held + t
            new = ops.zeros((heads, total), _INT32), ops.zeros((heads, total), _FLOAT32)
            room = Room(own.plan.room(ops, total, kv), *new, total, False)
            ops.copy_rows(kv, rows, room.kv, 0)
            for target, source in zip(room[1:3], arrays, strict=True):
                target[:, :held] = ops.take(source, rows)
        slots = np.arange(held, held + t, dtype=np.int32)
        ops.append(room.kv, np.zeros(t, np.int32), slots, k, v)
        room.positions[:, held:] = ops.indices(np.arange(n, n + t, dtype=np.int32))
        return room, held

    def _settle(self, ops: Ops, cache: Cache, layer: int, seq: int, room: Room) -> None:
        """Cuts a room to what the layer keeps, and puts that into the cache."""
        own = cache.part(seq, seq + 1)
        limit = self.limits(own, layer)
        positions, scores, free = (own.side[name][layer] for name in ("positions", "scores", "free"))
        n = min(room.n, int(limit[0]))
        if n < room.n or not room.in_place:
            rows = ops.indices(np.arange(n, dtype=np.int32)[None])
            if n < room.n:
                head, newest = (int(a[0]) for a in self._protected(own, limit))
                rows = ops.top_k(room.scores[None], np.array([room.n], np.int32), n, head, newest)[0]
                self.cut(ops, own, layer, room, rows, head)
            ops.copy_rows(room.kv, rows, own.layers[layer], 0)
            positions[0][:, :n] = ops.take(room.positions, rows)
            scores[0][:, :n] = ops.take(room.scores, rows)
        scores[0][:, n], positions[0][:, n], free[0] = 0, NO_POSITION, n

    def cut(self, ops: Ops, own: Cache, layer: int, room: Room, rows: Array, head: int) -> None:
        """Before all but `rows` [H, m] of a room are forgotten."""

    def _steps(self, ops: Ops, own: Cache, layer: int, q: Array, k: Array, v: Array) -> Array:
        """A chunk as so many decode steps; all layers count from the same position."""
        begun, outs = own.n_seen.copy(), []
        for t in range(len(k)):
            outs.append(ops.concatenate([self.attend(ops, own, layer, *(x[t : t + 1] for x in (q, k, v)))]))
            own.n_seen += 1
        own.n_seen[:] = begun
        return ops.concatenate(outs)


def check_pinned(pinned: int, limit: int, others: int = FEWEST) -> None:
    """Raises ModelError if a layer that keeps `limit` tokens has too few for others than those that are pinned."""
    if pinned and pinned + others > limit:
        raise ModelError(f"{pinned} tokens are pinned, which leaves no room in a budget of {limit}")
