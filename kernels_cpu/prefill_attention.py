"""Attention of a block of prompt tokens to the cached rows of one KV head: exact, a tile of keys at a time.

Each query keeps the running maximum and sum of its softmax, and rescales its output when the maximum grows (arXiv
1805.02867), so that no more than a tile of scores exists at a time (arXiv 2205.14135). Both products are tiles of
`gemm`. Scores are held transposed, [keys, queries]: a lane is a query, so maxima, sums and masks need no reduction
over lanes, and the probabilities lie as the second product wants its rows.

Queries are token after token with all heads of the group, so that neighbours see nearly the same keys, and go in
panels of whole vectors and whole tiles.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiled import kernel
from .crew import share_long
from .gemm import ROWS, VECTORS, WIDTH, multiply_tile, number_at, tile_sums, transpose_rows, variable
from .ir_vectors import (
    F32,
    I32,
    I64,
    LANES,
    Value,
    at,
    constant,
    into_array,
    load,
    multiply_add,
    splat,
    store,
    vector,
)
from .rows import decode_row
from .softmax import exp_below_zero

QUERIES = 384  # that share decoded keys and values
KEYS = 96  # decoded and scored at a time: whole tiles and whole vectors
PANEL = math.lcm(ROWS, WIDTH, 48)  # queries

_ROWS, _VECTORS, _ONE, _LANES = (0,) * ROWS, (0,) * VECTORS, (0,), (0,) * LANES
_LOWEST = np.float32(-1e30)  # not infinite: the difference of two is a number


@intrinsic
def softmax_columns(
    typingctx: Any,
    scores: Any,
    scores_at: Any,
    begin: Any,
    end: Any,
    stop: Any,
    slots: Any,
    column: Any,
    tile: Any,
    window: Any,
    masked: Any,
    state: Any,
) -> Any:
    """Rows begin ... end - 1 of WIDTH columns of scores [keys, PANEL] become unnormalised probabilities, in place.

    Rows end ... stop - 1 become zero. If masked, a key counts only for queries that see it: its slot, tile + row, is
    one of the `window` that end with the query's, slots[column], int32. state [3, queries], float32: running maximum,
    running sum, and the factor for what was summed up before this tile.
    """

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        scores, scores_at, begin, end, stop, slots, column, tile, window, masked, state = args
        place = number_at(context, b, signature.args[0], scores, scores_at)
        slots_at = number_at(context, b, signature.args[5], slots, column)  # as wide as float32
        states = number_at(context, b, signature.args[10], state, column)
        _, (_, n), _ = into_array(context, b, signature.args[10], state)
        highs, totals, factors = (at(b, states, b.mul(n, I64(4 * i))) for i in range(3))

        def score(row: Value, v: int) -> Value:
            return at(b, at(b, place, b.mul(row, I64(4 * PANEL))), 4 * LANES * v)

        old = [load(b, at(b, highs, 4 * LANES * v), vector(F32)) for v in range(VECTORS)]
        query = [load(b, at(b, slots_at, 4 * LANES * v), vector(I32)) for v in range(VECTORS)]
        high = [variable(b, value) for value in old]
        reach = splat(b, b.trunc(window, I32))
        out_of_sight = constant(F32, -math.inf)

        def larger(v: int, x: Value) -> None:
            value = b.load(high[v])
            b.store(b.select(b.fcmp_ordered(">", x, value), x, value), high[v])

        with b.if_else(masked) as (some, all_of_them):
            with some, cgutils.for_range_slice(b, begin, end, I64(1)) as (row, _):
                key = splat(b, b.trunc(b.add(tile, row), I32))
                for v in range(VECTORS):
                    distance = b.sub(query[v], key)
                    seen = b.icmp_unsigned("<", distance, reach)  # a later key is at a huge distance
                    x = b.select(seen, load(b, score(row, v), vector(F32)), out_of_sight)
                    store(b, x, score(row, v))
                    larger(v, x)
            with all_of_them, cgutils.for_range_slice(b, begin, end, I64(1)) as (row, _):
                for v in range(VECTORS):
                    larger(v, load(b, score(row, v), vector(F32)))
        new = [b.load(value) for value in high]
        sums = [variable(b, constant(F32, 0.0)) for _ in range(VECTORS)]
        with cgutils.for_range_slice(b, begin, end, I64(1)) as (row, _):
            for v in range(VECTORS):
                p = exp_below_zero(b, b.fsub(load(b, score(row, v), vector(F32)), new[v]))
                store(b, p, score(row, v))
                b.store(b.fadd(b.load(sums[v]), p), sums[v])
        with cgutils.for_range_slice(b, end, stop, I64(1)) as (row, _):
            for v in range(VECTORS):
                store(b, constant(F32, 0.0), score(row, v))
        for v in range(VECTORS):
            factor, total = exp_below_zero(b, b.fsub(old[v], new[v])), at(b, totals, 4 * LANES * v)
            store(b, new[v], at(b, highs, 4 * LANES * v))
            store(b, factor, at(b, factors, 4 * LANES * v))
            store(b, multiply_add(b, load(b, total, vector(F32)), factor, b.load(sums[v])), total)
        return context.get_dummy_value()

    i = types.int64
    return types.void(scores, i, i, i, i, slots, i, i, i, types.boolean, state), codegen


@intrinsic
def add_to_scaled(
    typingctx: Any,
    a: Any,
    a_at: Any,
    lda: Any,
    w: Any,
    w_at: Any,
    ldw: Any,
    n: Any,
    c: Any,
    c_at: Any,
    ldc: Any,
    factors: Any,
    factors_at: Any,
    rows: Any,
    vectors: Any,
) -> Any:
    """C[i] = factors[i] C[i] + (A^T W)[i]: otherwise as gemm.multiply_tile."""
    n_rows, n_vectors = len(rows), len(vectors)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        _, _, lda, _, _, ldw, n, _, _, ldc, _, _, _, _ = args
        a, w, c, factors = (number_at(context, b, signature.args[i], args[i], args[i + 1]) for i in (0, 3, 7, 10))
        for i, sums in enumerate(tile_sums(b, a, lda, w, ldw, n, n_rows, n_vectors)):
            row = at(b, c, b.mul(ldc, I64(4 * i)))
            factor = splat(b, load(b, at(b, factors, 4 * i), F32))
            for v, total in enumerate(sums):
                place = at(b, row, 4 * LANES * v)
                store(b, multiply_add(b, load(b, place, vector(F32)), factor, total), place)
        return context.get_dummy_value()

    i = types.int64
    return types.void(a, i, i, w, i, i, i, c, i, i, factors, i, rows, vectors), codegen


def block_tokens(group: int) -> int:
    """Tokens of a block, for `group` query heads to a KV head."""
    return max(1, QUERIES // group)


def attention_scratch(tokens: int, group: int, d: int) -> int:
    """Numbers that attend_block keeps beside its arguments."""
    padded = -(-tokens * group // PANEL) * PANEL
    return 2 * padded * d + 2 * KEYS * d + KEYS * PANEL + LANES * d + LANES


@kernel
def _transpose(rows, last, out, out_at, ld):  # type: ignore[no-untyped-def]
    """Rows 0 ... last, and the last again up to 16, become columns."""
    transpose_rows(rows, 0, last, 0, rows.shape[1], out, out_at, ld, _LANES)


@kernel
def _attend_tile(keys, values, queries, scores, sums, slots, state, n, tile, width, reach):  # type: ignore[no-untyped-def]
    """Adds `width` keys from slot `tile` on to the state and the sums of n queries: see attend_block."""
    padded, d = len(slots), values.shape[1]
    for panel in range(0, padded, PANEL):
        begin = max(0, slots[panel] + 1 - reach - tile) // ROWS * ROWS
        stop = min(width, slots[panel + PANEL - 1] + 1 - tile)
        if begin >= stop:
            continue
        for i in range(0, PANEL, WIDTH):
            low, high = slots[panel + i], slots[panel + i + WIDTH - 1]
            end = max(begin, min(stop, high + 1 - tile))
            q_at = panel * d + i
            for s in range(begin, end, ROWS):
                to = s * PANEL + i
                multiply_tile(keys, s, KEYS, queries, q_at, PANEL, d, scores, to, PANEL, False, _ROWS, _VECTORS)
            masked = tile + end - 1 > low or tile + begin <= high - reach
            softmax_columns(scores, i, begin, end, stop, slots, panel + i, tile, reach, masked, state)
        for i in range(0, min(PANEL, n - panel), ROWS):
            row = panel + i
            seen = min(stop, slots[row + ROWS - 1] + 1 - tile) - begin
            p_at, f_at = begin * PANEL + i, 2 * padded + row
            for j in range(0, d, WIDTH):
                v_at, to = begin * d + j, row * d + j
                if j + WIDTH <= d:
                    add_to_scaled(scores, p_at, PANEL, values, v_at, d, seen, sums, to, d, state, f_at, _ROWS, _VECTORS)
                else:
                    add_to_scaled(scores, p_at, PANEL, values, v_at, d, seen, sums, to, d, state, f_at, _ROWS, _ONE)


@kernel
def attend_block(  # type: ignore[no-untyped-def]
    q, k, v, between, group, head, token, tokens, start, window, stop, scale, scratch, out, kept
):
    """Attention of a few tokens' queries to one KV head, for all query heads that share it.

    q, out [N, H_q, d] float32, C-ordered, of which rows token ... token + tokens - 1 count, and of these the queries of
    KV head `head`, `group` of them; d is a multiple of 16. k, v [rows, blocks] of any store with d numbers a row, a
    head's `between` rows after those of the head before. Row i of q is in slot start + i and sees the slots up to its
    own, or only the last `window` of them if that is not 0; none before slot 0, none from `stop` on. kept
    [N, 2 H_q], if it has rows, receives the largest score of each query, and then for each the sum of exponentials
    below it. scratch, 1-D float32: at least attention_scratch(tokens, group, d).
    """
    d, first_row = q.shape[2], head * between
    n, first_slot, first_head = tokens * group, start + token, head * group
    padded = (n + PANEL - 1) // PANEL * PANEL
    reach = window if window > 0 else 1 << 30
    used = -(scratch.ctypes.data // 4) % LANES  # a load that spans two cache lines counts as two
    queries = scratch[used : used + padded * d]  # [panels, d, PANEL]
    used += padded * d
    sums = scratch[used : used + padded * d]  # [padded, d]
    used += padded * d
    keys = scratch[used : used + KEYS * d]  # [d, KEYS]
    used += KEYS * d
    values = scratch[used : used + KEYS * d].reshape(KEYS, d)
    used += KEYS * d
    scores = scratch[used : used + KEYS * PANEL]  # [KEYS, PANEL]
    used += KEYS * PANEL
    rows = scratch[used : used + LANES * d].reshape(LANES, d)
    slots = np.empty(padded, np.int32)
    state = np.empty((3, padded), np.float32)
    state[0] = _LOWEST
    state[1] = 0.0
    sums[:] = 0.0
    keys[:] = 0.0  # tiles of keys may reach past the last one
    scale = np.float64(scale)  # rounded to float32 it would pull all scores the same way
    for i in range(0, padded, LANES):
        for r in range(LANES):
            query = min(i + r, n - 1)
            slots[i + r] = first_slot + query // group
            for j in range(d):
                rows[r, j] = scale * q[token + query // group, first_head + query % group, j]
        _transpose(rows, LANES - 1, queries, i // PANEL * PANEL * d + i % PANEL, PANEL)
    end = min(first_slot + tokens, stop)
    for tile in range(max(0, first_slot + 1 - reach), end, KEYS):
        width = min(KEYS, end - tile)
        for s in range(width):
            decode_row(k, first_row + tile + s, rows, s % LANES)
            if s % LANES == LANES - 1 or s == width - 1:
                _transpose(rows, s % LANES, keys, s // LANES * LANES, KEYS)
            decode_row(v, first_row + tile + s, values, s)
        _attend_tile(keys, values, queries, scores, sums, slots, state, n, tile, width, reach)
    for i in range(n):
        t, h, some = token + i // group, first_head + i % group, state[1, i] != 0
        share = np.float32(1.0) / state[1, i] if some else np.float32(0.0)
        for j in range(d):
            out[t, h, j] = sums[i * d + j] * share
        if len(kept):
            kept[t, h], kept[t, q.shape[1] + h] = state[0, i], state[1, i]


@kernel
def _some_queries(  # type: ignore[no-untyped-def]
    q, k, v, between, group, start, window, stop, scale, block, scratch, out, kept, task, thread
):
    heads, n = q.shape[1] // group, len(q)
    # The last queries see the most keys: the longest tasks first.
    token = ((n + block - 1) // block - 1 - task // heads) * block
    tokens, room = min(block, n - token), scratch[thread]
    attend_block(q, k, v, between, group, task % heads, token, tokens, start, window, stop, scale, room, out, kept)


@kernel
def attend_chunk(crew, q, k, v, between, group, start, window, stop, scale, block, scratch, out, kept):  # type: ignore[no-untyped-def]
    """All query heads of a chunk, `block` tokens in a task, a row of scratch for each thread; see attend_block."""
    tasks = (len(q) + block - 1) // block * (q.shape[1] // group)
    of = (q, k, v, between, group, start, window, stop, scale, block, scratch, out, kept)
    share_long(crew, tasks, _some_queries, of)
