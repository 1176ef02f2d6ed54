"""Choosing the k tokens of most weight, as SparQ and FlexGen do: what the two ways to score them have in common.

Tokens are cut into parts of the same length, whatever the number of threads: whole heads, if there are enough of them,
because what another core has written is far away. A part is scored a tile at a time. Each tile keeps its own maximum
and sum of exponentials (arXiv 1805.02867), which are made while memory brings the next one. Whoever ends the last part
of a KV head makes ranks of them and chooses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compiled import kernel
from .ir_vectors import I64, Value
from .pointers import add_floats, address, copy_floats, float_at
from .selection import choose_largest
from .softmax import add_scaled, exp, exp_floats, largest_logit

TASKS = 16
TILE = 512

OF_PROBABILITIES, OF_LOGITS = range(2)


@kernel
def part_tokens(stop, heads):  # type: ignore[no-untyped-def]
    """Tokens in a part, a multiple of TILE; and the parts of the longest sequence."""
    total, longest = 0, 0
    for n in stop:
        total, longest = total + n, max(longest, n)
    tokens = max(total * heads // TASKS // TILE * TILE, TILE)
    return tokens, (longest + tokens - 1) // tokens


@kernel
def part(task, tokens, most, heads, stop):  # type: ignore[no-untyped-def]
    """Sequence, KV head, first token and the one after the last (not above the first if there is none)."""
    b, begin = task // (most * heads), task % most * tokens
    return b, task // most % heads, begin, min(begin + tokens, np.int64(stop[b]))


@kernel
def parts_of_heads(stop, tokens, heads):  # type: ignore[no-untyped-def]
    found = np.empty(len(stop) * heads, np.int64)
    for i in range(len(found)):
        found[i] = (stop[i // heads] + tokens - 1) // tokens
    return found


@intrinsic
def count_down(typingctx: Any, where: Any) -> Any:
    """Takes 1 from the int64 at an address and returns what is left; whoever sees 0 sees all that was done before."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        place = b.inttoptr(args[0], I64.as_pointer())
        return b.sub(b.atomic_rmw("sub", place, I64(1), "acq_rel"), I64(1))

    return types.int64(types.int64), codegen


@kernel
def whole_tiles(n):  # type: ignore[no-untyped-def]
    return (n + TILE - 1) // TILE * TILE


@kernel
def tiles_of_heads(stop, heads, group):  # type: ignore[no-untyped-def]
    """Room for the maxima of logits and the sums of exponentials: float32 [2, B H_kv, tiles, group]."""
    longest = 0
    for n in stop:
        longest = max(longest, n)
    return np.empty((2, len(stop) * heads, (longest + TILE - 1) // TILE, group), np.float32)


@kernel
def logits_of(logits, b, h, group):  # type: ignore[no-untyped-def]
    """Those [B, H_q, slots] of a KV head, [group, slots]: their address, and bytes from row to row."""
    return address(logits) + b * logits.strides[0] + h * group * logits.strides[1], logits.strides[1]


@kernel
def weigh(b, h, weighed, scored, end, own, own_bytes, largest, total, ranks, mode):  # type: ignore[no-untyped-def]
    """Logits of a KV head (see logits_of) become exponentials: of tiles from `weighed` on that are scored, the last one
    up to `end`. Returns where the next one begins. Ranks by logits are made of them before."""
    group, kv_head = largest.shape[2], b * ranks.shape[1] + h
    to = address(ranks) + b * ranks.strides[0] + h * ranks.strides[1]
    while weighed < end and min(weighed + TILE, end) <= scored:
        n, tile = min(TILE, end - weighed), weighed // TILE
        for g in range(group):
            here = own + g * own_bytes + 4 * weighed
            high = largest_logit(here, n)
            if mode == OF_LOGITS and g == 0:
                copy_floats(to + 4 * weighed, here, n)
            elif mode == OF_LOGITS:
                add_floats(to + 4 * weighed, here, n)
            largest[kv_head, tile, g] = high
            total[kv_head, tile, g] = exp_floats(here, n, high) if high > -np.inf else np.float32(0.0)
        weighed += TILE
    return weighed


@kernel
def finish_part(  # type: ignore[no-untyped-def]
    b, h, stop, own, own_bytes, largest, total, ranks, mode, unfinished, local, rows, weights, least, counts, seen
):
    """The last part of a KV head makes a choice of its exponentials, the logits that were."""
    group, kv_head, n = largest.shape[2], b * ranks.shape[1] + h, np.int64(stop[b])
    if count_down(address(unfinished) + 8 * kv_head) > 0:
        return
    to = address(ranks) + b * ranks.strides[0] + h * ranks.strides[1]
    factors, chosen = largest[kv_head, : (n + TILE - 1) // TILE], (rows[b, h], weights[b, h * group : (h + 1) * group])
    _normalise(factors, total[kv_head])
    _choose_rows(n, own, own_bytes, factors, to, mode, local, *chosen)
    if len(counts) > 0:
        _keep_heavy(*chosen, n, local, least, seen[kv_head], counts[b, h])


@kernel
def _normalise(largest, total):  # type: ignore[no-untyped-def]
    """largest [tiles, group] become what exponentials must be multiplied by: 0 if one of the sums is NaN."""
    for g in range(largest.shape[1]):
        high, mass = np.float32(-np.inf), np.float32(0.0)
        for tile in range(len(largest)):
            high = max(high, largest[tile, g])
        for tile in range(len(largest)):
            largest[tile, g] = exp(largest[tile, g] - high) if total[tile, g] != 0 else np.float32(0.0)
            mass += largest[tile, g] * total[tile, g]
        for tile in range(len(largest)):
            largest[tile, g] = largest[tile, g] / mass if mass > 0 else np.float32(0.0)


@kernel
def _choose_rows(n, own, own_bytes, factors, ranks, mode, local, rows, weights):  # type: ignore[no-untyped-def]
    """rows [k]: the largest of n ranks, and their probabilities, weights [group, k].

    own: address of exponentials [group, n], to be multiplied by factors [tiles, group]. ranks: that of n float32.
    """
    group, k = weights.shape
    if mode == OF_PROBABILITIES:
        ranks = own if group == 1 else ranks  # of one query head the probabilities are the ranks
        for tile in range(len(factors)):
            begin = tile * TILE
            for g in range(group):
                here = own + g * own_bytes + 4 * begin
                add_scaled(ranks + 4 * begin, here, min(TILE, n - begin), factors[tile, g], g > 0)
    choose_largest(ranks, n, k, 0, local, rows)
    if ranks == own:
        factors[:] = 1.0
    for g in range(group):
        tile = 0
        for i in range(min(n, k)):
            while rows[i] >= (tile + 1) * TILE:
                tile += 1
            p = float_at(own + g * own_bytes, rows[i]) * factors[tile, g]
            weights[g, i] = p if p > 0 else np.float32(0.0)


@kernel
def _temper(weights, seen, to):  # type: ignore[no-untyped-def]
    """to [k] = weights [k] to the power of `seen`, rounded to quarters; returns their sum."""
    k, quarters, total = len(weights), min(max(int(4 * seen + np.float32(0.5)), 1), 4), np.float32(0.0)
    if quarters == 4:
        for i in range(k):
            to[i] = weights[i]
    elif quarters == 3:
        for i in range(k):
            to[i] = np.sqrt(weights[i]) * np.sqrt(np.sqrt(weights[i]))
    elif quarters == 2:
        for i in range(k):
            to[i] = np.sqrt(weights[i])
    else:
        for i in range(k):
            to[i] = np.sqrt(np.sqrt(weights[i]))
    for i in range(k):
        total += to[i]
    return total


@kernel
def _keep_heavy(rows, weights, stop, local, least, seen, counts):  # type: ignore[no-untyped-def]
    """Of rows [k] of a text of `stop` tokens and weights [group, k], those that stay become the first: see Ops."""
    group, k = weights.shape
    if stop <= k:
        counts[0] = stop
        return
    of_group, own, kept = np.zeros(k, np.float32), np.empty(k, np.float32), 0
    for g in range(group):
        for i in range(k):
            of_group[i] += weights[g, i]
    bound = least * _temper(of_group, seen, own)
    for i in range(k):
        rows[kept] = rows[i]
        for g in range(group):
            weights[g, kept] = weights[g, i]
        kept += own[i] >= bound or rows[i] >= stop - local
    counts[0] = kept
    counts[1] += kept
    counts[2] += 1
