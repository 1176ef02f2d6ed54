"""The KV cache: what a policy planned, allocated by a device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from .config import ModelConfig
from .ops import KV, Array, Factor, Ops
from .rope import Angles, Rope
from .stores import Latents, Store

T = TypeVar("T")


@dataclass(frozen=True)
class SideArray:
    """An array that a policy keeps beside K and V of a layer, [B, *shape]."""

    shape: tuple[int, ...]
    dtype: np.dtype
    block: int = 0  # tokens that an item of shape[1] holds, if that axis follows the tokens

    @property
    def nbytes(self) -> int:
        """Of one sequence."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True)
class CachePlan:
    """What a policy needs for a sequence: slots in each layer, the stores of K and V, arrays of its own.

    A slot is where a row lies; a position is where its token stood in the text. They are different numbers as soon as
    something is evicted.
    """

    slots: tuple[int, ...]  # per layer
    k_store: Store
    v_store: Store
    n_ctx: int = 0  # tokens a sequence may have
    head_dim: int = 0
    window: int = 0  # of the model: a query sees its last `window` positions; 0: all
    side: Mapping[str, tuple[SideArray, ...]] = field(default_factory=dict)  # per layer

    def slot_bytes(self, config: ModelConfig, layer: int) -> int:
        """Bytes of the keys and values of one slot of a layer, all heads."""
        return self.k_store.slot_bytes(config, layer) + self.v_store.slot_bytes(config, layer)

    def rows_bytes(self, config: ModelConfig, slots: Sequence[int]) -> int:
        """Bytes of the keys and values of so many slots of each layer."""
        return sum(n * self.slot_bytes(config, layer) for layer, n in enumerate(slots))

    def room(self, ops: Ops, slots: int, like: KV) -> KV:
        """Memory for so many rows of one sequence of a layer's cache, for as long as a prompt is read."""

        def rows(store: Store, array: Array) -> Array:
            if isinstance(array, Latents):
                return ops.allocate(store, (1, array.shape[1], slots, array.numbers), array.factor)
            return ops.allocate(store, (1, array.shape[1], slots, self.head_dim))

        return KV(rows(self.k_store, like.k), rows(self.v_store, like.v))

    def nbytes(self, config: ModelConfig, n_sequences: int = 1) -> int:
        """Bytes of all K and V, and of the policy's arrays."""
        own = sum(array.nbytes for arrays in self.side.values() for array in arrays)
        return n_sequences * (self.rows_bytes(config, self.slots) + own)


@dataclass
class Cache:
    """Keys, values and side arrays of every layer for B sequences."""

    plan: CachePlan
    layers: list[KV]
    n_seen: np.ndarray  # int32 [B]: tokens seen, which is the next token's true position
    side: dict[str, list[Array]]  # a policy's own arrays, one per layer, each [B, ...]
    pinned: np.ndarray  # int32 [B]: so many tokens at the beginning are never evicted
    torn: np.ndarray  # bool [B]: a forward pass was interrupted, so layers may not hold the same tokens
    limits: np.ndarray  # int32 [B, n_layer]: tokens that a layer keeps, where that is found out from the prompt; else 0
    rope: Rope | None = None  # of the model, for policies that turn queries to other positions
    pending: dict[int, Any] = field(default_factory=dict)  # of a policy, while a prompt is read: by layer
    lasting: bool = True  # not made for one step
    recorded: Any = None  # the decoder's, of the last step
    _made: tuple[bytes, Any] = (b"", None)  # the last answer of `once` ...
    _make: Callable[[Cache], Any] | None = None  # ... and what gave it
    _turned: tuple[bytes, Any] = (b"", None)  # the last answer of `turns`: all layers of a step ask for the same

    def once(self, make: Callable[[Cache], T]) -> T:
        """What make(self) gives, made once for all layers of a step: it depends on the sequences' lengths alone.

        It is kept, so it must not hold the cache itself: memory would not be given back with the last reference.
        """
        key = self._lengths()
        if self._made[0] != key:
            self._made, self._make = (key, make(self)), make
        made: T = self._made[1]
        return made

    def renew(self) -> bool:
        """What `once` gave in the step before, now for this one and in the same arrays; False if it is of another kind,
        and a step so that does something else."""
        if self._make is None:
            return True
        old, new = self._made[1], self._make(self)
        self._made = b"", old  # of no step, if it is interrupted
        same = _renew(old, new, {})
        self._made = self._lengths(), old if same else new
        return same

    def _lengths(self) -> bytes:
        return self.n_seen.tobytes() + self.pinned.tobytes() + self.limits.tobytes()

    def turns(self, ops: Ops, by: np.ndarray) -> Angles:
        """The angles that move rows by so many positions each."""
        if self._turned[0] != by.tobytes():
            assert self.rope is not None
            rotation = replace(self.rope, magnitude=1.0)  # they have it already
            self._turned = by.tobytes(), ops.angles(rotation, by)
        angles: Angles = self._turned[1]
        return angles

    def nbytes(self, config: ModelConfig, seq: int) -> int:
        """Bytes that a sequence has filled."""
        n = int(self.n_seen[seq])
        total = self.plan.rows_bytes(config, [min(n, int(kv.k.shape[2])) for kv in self.layers])
        for arrays in self.plan.side.values():
            for array in arrays:
                blocks = array.shape[1] if array.block else 1
                total += array.nbytes // blocks * (min(blocks, -(-n // array.block)) if array.block else 1)
        return total

    def part(self, first: int, stop: int) -> Cache:
        """Sequences first ... stop - 1, in the same memory."""
        side = {name: [array[first:stop] for array in arrays] for name, arrays in self.side.items()}
        hosts = (a[first:stop] for a in (self.n_seen, self.pinned, self.torn, self.limits))
        n_seen, pinned, torn, limits = hosts
        layers = [KV(k[first:stop], v[first:stop]) for k, v in self.layers]
        return Cache(self.plan, layers, n_seen, side, pinned, torn, limits, self.rope, lasting=False)

    def move(self, source: int, target: int) -> None:
        """Copies one sequence over another, without touching memory that the first has not filled."""
        n = int(self.n_seen[source])
        for kv in self.layers:
            for array in kv:
                array[target, :, :n] = array[source, :, :n]
        for name, arrays in self.side.items():
            for array, spec in zip(arrays, self.plan.side[name], strict=True):
                if spec.block:
                    used = slice(-(-n // spec.block))
                    array[target, :, used] = array[source, :, used]
                else:
                    array[target] = array[source]
        for host in (self.n_seen, self.pinned, self.torn, self.limits):
            host[target] = host[source]


def _renew(old: Any, new: Any, seen: dict[int, Any]) -> bool:
    """Copies the arrays in one value to those in another; False if the two differ in anything else. seen: by the
    identity of a part of the old value, which may be there several times, the new one for it."""
    if id(old) in seen:
        return seen[id(old)] is new
    if isinstance(old, (list, tuple)):
        seen[id(old)] = new
        return type(old) is type(new) and len(old) == len(new) and all(map(_renew, old, new, itertools.repeat(seen)))
    if not hasattr(old, "shape"):
        return type(old) is type(new) and bool(old == new)
    seen[id(old)] = new
    if not hasattr(new, "shape") or old.shape != new.shape or old.dtype != new.dtype:
        return False
    old[...] = new
    return True


def allocate_cache(
    plan: CachePlan,
    config: ModelConfig,
    ops: Ops,
    n_sequences: int = 1,
    rope: Rope | None = None,
    factors: Sequence[tuple[Factor | None, Factor | None]] = (),
) -> Cache:
    """An empty cache. Memory is only touched as it fills, so a long context costs nothing until it is used.

    factors: what rebuilds keys and values of each layer, if the stores are of latents.
    """
    layers = []
    for layer, slots in enumerate(plan.slots):
        of_layer = zip((plan.k_store, plan.v_store), factors[layer] if factors else (None, None), strict=True)
        shapes = (
            (store, (n_sequences, store.heads(config), slots, store.numbers(config, layer)), factor)
            for store, factor in of_layer
        )
        layers.append(KV(*(ops.allocate(*rows) for rows in shapes)))
    side = {name: [ops.zeros((n_sequences, *a.shape), a.dtype) for a in arrays] for name, arrays in plan.side.items()}
    n_seen, pinned = np.zeros(n_sequences, np.int32), np.zeros(n_sequences, np.int32)
    limits = np.zeros((n_sequences, config.n_layer), np.int32)
    return Cache(plan, layers, n_seen, side, pinned, np.zeros(n_sequences, bool), limits, rope)
