"""How fast attention is where it was measured, and what to expect where it was not: as a share of the memory's speed.

Bytes alone do not say how long attention takes. A type must be unpacked; query heads that share keys compute more with
each; SparQ's index in 4 bits is an eighth of dense's bytes and not an eighth of its time; little work leaves threads
waiting. So each kind of attention (policy, index, KV type, shared keys or not) has a share of its own, which changes
with the context, the size of the model, and the part of the cache that is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .policies import Policy, SparQ

DENSE, F16 = "dense", "f16"


def method_of(policy: Policy) -> str:
    """What a policy does, whatever its numbers: its name, and how SparQ keeps its index."""
    return f"{policy.name} {policy.k_index}" if isinstance(policy, SparQ) else policy.name


@dataclass(frozen=True)
class Measured:
    method: str  # see `method_of`
    kv: str
    grouped: bool  # query heads share keys
    depth: int  # tokens in the cache
    width: int  # numbers of a token's keys in a layer
    read: float  # of the bytes that dense attention to the same KV type reads
    share: float  # of the memory's speed


class Shares:
    """The shares of the memory's speed that attention reaches on a device; 1 if nothing was measured there.

    rows: the fields of `Measured`.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]):
        self._rows: dict[tuple[str, str, bool], list[Measured]] = {}
        for row in (Measured(**fields) for fields in rows):
            self._rows.setdefault((row.method, row.kv, row.grouped), []).append(row)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def of(self, method: str, kv: str, grouped: bool, depth: int, width: int, read: float) -> float:
        """For a cache of this depth and width, of which that part of dense's bytes is read: what was measured nearest.

        A type with which the method was not measured costs what it costs dense attention, and so do shared keys; a
        method that never was is taken for the slowest.
        """
        if not self._rows:
            return 1.0
        for base_kv, base_grouped in ((kv, grouped), (F16, grouped), (kv, not grouped), (F16, not grouped)):
            base = self._nearest(method, base_kv, base_grouped, depth, width, read)
            if base is not None:
                of_type = self._of_types(kv, depth, width) if kv != base_kv else 1.0
                of_groups = self._of_groups(grouped, depth, width) if grouped != base_grouped else 1.0
                return base.share * of_type * of_groups
        return min(row.share for rows in self._rows.values() for row in rows)

    def _nearest(
        self, method: str, kv: str, grouped: bool, depth: int, width: int, read: float = 1.0
    ) -> Measured | None:
        def distance(row: Measured) -> float:
            ratios = row.depth / depth, row.width / width, row.read / read
            return sum(abs(math.log(ratio)) for ratio in ratios)

        return min(self._rows.get((method, kv, grouped), ()), key=distance, default=None)

    def _of_types(self, kv: str, depth: int, width: int) -> float:
        """What dense attention has left of its share with the slower of these types, or with the slowest if one of them
        was not measured."""
        left = {key[1]: [1.0] for key in self._rows if key[0] == DENSE}
        for kind, found in left.items():
            for grouped in (False, True):
                row = self._nearest(DENSE, kind, grouped, depth, width)
                base = self._nearest(DENSE, F16, grouped, row.depth, row.width) if row else None
                if row and base:
                    found.append(row.share / base.share)
        kinds = set(kv.split("/"))
        return min((min(left[kind]) for kind in (kinds if kinds <= left.keys() else left)), default=1.0)

    def _of_groups(self, grouped: bool, depth: int, width: int) -> float:
        """The same for heads that share keys, or do not."""
        own, other = (self._nearest(DENSE, F16, g, depth, width) for g in (grouped, not grouped))
        return min(1.0, own.share / other.share) if own and other else 1.0
