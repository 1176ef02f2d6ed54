"""Decode steps of a cache that is full: which slot goes, and the token that comes in its place.

Slots are found on the device, so these kernels look themselves whether an index lies in its array: they return False,
and have changed nothing, if one does not.
"""

from __future__ import annotations

import numpy as np

from minirt.ops import NO_POSITION

from .compiled import kernel
from .extremes import lowest_before
from .rows import encode_row


@kernel
def overwrite(k_cache, v_cache, slot, k, v, positions, pos):  # type: ignore[no-untyped-def]
    """Row b of k and v [B, H_kv, d] to slot[b, h] of the caches [B, H_kv, slots, blocks], pos[b] to positions.

    slot [B, H] and positions [B, H, slots] are int32; H = 1 serves all heads.
    """
    n_slot, heads = min(k_cache.shape[2], positions.shape[2]), slot.shape[1]
    for b in range(len(slot)):
        for h in range(heads):
            if not 0 <= slot[b, h] < n_slot:
                return False
    for b in range(len(slot)):
        for h in range(k.shape[1]):
            s = slot[b, min(h, heads - 1)]
            encode_row(k_cache, b, h, s, k, b)
            encode_row(v_cache, b, h, s, v, b)
        for h in range(heads):
            positions[b, h, slot[b, h]] = pos[b]
    return True


@kernel
def evict(scores, positions, stop, room, head, before, slot):  # type: ignore[no-untyped-def]
    """The slot that the next token will overwrite, to slot [B, H]; see `Ops.evict`. All of int32, scores float32."""
    n_seq, heads, n_slot = scores.shape
    for b in range(n_seq):
        last = stop[b] if stop[b] < room[b] else max(stop[b] - 1, head[b])
        if stop[b] < 0 or head[b] < 0 or last >= n_slot:
            return False
    for b in range(n_seq):
        for h in range(heads):
            s = np.int64(stop[b])
            if s >= room[b]:
                s = lowest_before(scores, positions, b, h, head[b], s, before[b])
                s = s if s >= 0 else np.int64(head[b])
            slot[b, h], scores[b, h, s], positions[b, h, s] = s, 0.0, NO_POSITION
    return True
