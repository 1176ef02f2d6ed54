"""What a step writes to a cache of latents: rows of keys, with their tokens' positions, and of values.

Slots may have been found on the device, so these kernels look themselves whether all is in place: they return False,
and have written nothing, if not.
"""

from __future__ import annotations

from .compiled import kernel
from .latent_rows import places_exist, write_rows


@kernel
def with_positions(x, begin, pos, out):  # type: ignore[no-untyped-def]
    """out [N, G, r + 1] = columns of x [N, ...] from `begin` on, as latents, and pos [N] after each."""
    n, groups, rank = out.shape[0], out.shape[1], out.shape[2] - 1
    for i in range(n):
        for g in range(groups):
            for j in range(rank):
                out[i, g, j] = x[i, begin + g * rank + j]
            out[i, g, rank] = pos[i]


@kernel
def append(keys, values, n_slot, seq, slot, k, v):  # type: ignore[no-untyped-def]
    """Rows i of k [N, G, r + 1] and v [N, G, r] to slot[i, g] of sequence seq[i] of two described caches of n_slot
    slots; slot [N, 1] serves all groups. k and v are float32 in C order."""
    if not places_exist(keys, n_slot, slot, k):
        return False
    write_rows(keys, seq, slot, k)
    write_rows(values, seq, slot, v)
    return True


@kernel
def overwrite(keys, values, n_slot, seq, slot, k, v, positions, pos):  # type: ignore[no-untyped-def]
    """The same for all sequences, and pos[b] to positions [B, G or 1, slots] of int32."""
    if not append(keys, values, min(n_slot, positions.shape[2]), seq, slot, k, v):
        return False
    for b in range(len(slot)):
        for g in range(slot.shape[1]):
            positions[b, g, slot[b, g]] = pos[b]
    return True
