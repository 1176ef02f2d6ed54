"""SparQ's step 1 (arXiv 2312.04985) by an index in 4 bits: see `minirt.ops.CodedIndex`.

A run of 128 codes of a component is one line of memory, in which part p of a lane's word is token 16 p + lane: a shift
brings the same part of 16 words to where a float32 has the upper bits of its fraction, and with the exponent of one it
is the number 1 + c / 16. So least + scale c is 16 scale (1 + c / 16) + (least - 16 scale), of which the second term is
added once for all components. Runs pass by, a few at once, as in `sparse`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minirt.ops import CODED_UNIT

from .block_products import queries_for
from .choice import (
    OF_LOGITS,
    OF_PROBABILITIES,
    finish_part,
    logits_of,
    part,
    part_tokens,
    parts_of_heads,
    tiles_of_heads,
    weigh,
)
from .coded_index import PARTS, RUN
from .compiled import kernel
from .crew import share
from .ir_vectors import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    Value,
    at,
    constant,
    half_to_float,
    like,
    load,
    multiply_add,
    prefetch_line,
    splat,
    store,
    vector,
)  # fmt: skip
from .memory import LINE
from .pointers import address
from .rotation import rotate_rows
from .sparse import ROWS, TOGETHER, choose_components
from .tiles import score_rows
from .unowned import hold, unowned

RUNS = CODED_UNIT // RUN  # of a unit
TILE = 2048  # tokens whose sums stay in the first cache
UNITS = TILE // CODED_UNIT
SCALE_SHARE = 5  # a component has 2^5 bytes of codes for each byte of scales


@intrinsic
def add_codes(
    typingctx: Any, codes: Any, ahead: Any, scales: Any, offsets: Any, weights: Any, group: Any, r: Any, runs: Any,
    out: Any, out_bytes: Any, room: Any, heads: Any,
) -> Any:  # fmt: skip
    """out[g, 0 : 128 runs] = sum over i < r of weights[i, g] * component i, for g < len(heads).

    The codes of component i begin at address codes + offsets[i], offsets int64, its scales at a 32nd of that after
    `scales`; weights float32 [r, group], out float32 with rows of out_bytes. room: for float32 [r, len(heads), UNITS].
    The codes that are read next are asked for meanwhile, the last time those at `ahead`.
    """
    n_heads = len(heads)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        group, r, runs, out_bytes = args[5], args[6], args[7], args[9]
        codes, ahead, scales, offsets, weights, out, room = (
            b.inttoptr(args[i], cgutils.voidptr_t) for i in (0, 1, 2, 3, 4, 8, 10)
        )
        rows = [at(b, out, b.mul(I64(g), out_bytes)) for g in range(n_heads)]
        units = b.udiv(runs, I64(RUNS))

        def offset(i: Value) -> Value:
            return load(b, at(b, offsets, b.mul(i, I64(8))), I64)

        def factor_at(i: Value, g: int, unit: Value) -> Value:
            """Of component i, times 16."""
            row = b.add(b.mul(i, I64(n_heads)), I64(g))
            return at(b, room, b.mul(b.add(b.mul(row, I64(UNITS)), unit), I64(4)))

        def next_run(i: Value) -> Value:
            past = b.icmp_signed(">=", i, r)
            i = b.select(past, b.sub(i, r), i)
            i = b.select(b.icmp_signed("<", i, r), i, b.sub(r, I64(1)))
            return at(b, b.select(past, ahead, codes), offset(i))

        def begin_units(unit: Value) -> None:
            """Factors of two units, and their sums begin with what does not depend on codes."""
            rests = [cgutils.alloca_once(b, vector(F32, 2)) for _ in rows]
            for rest in rests:
                b.store(constant(F32, 0.0, 2), rest)
            with cgutils.for_range(b, r) as loop:
                pairs = at(b, scales, b.add(b.lshr(offset(loop.index), I64(SCALE_SHARE)), b.mul(unit, I64(4))))
                pairs = half_to_float(b, load(b, pairs, vector(I16, 4)))
                scale, least = (
                    b.shuffle_vector(pairs, pairs, ir.Constant(vector(I32, 2), [i, i + 2])) for i in range(2)
                )
                scale = b.fmul(scale, constant(F32, 16.0, 2))
                for g, rest in enumerate(rests):
                    weight = load(b, at(b, weights, b.mul(b.add(b.mul(loop.index, group), I64(g)), I64(4))), F32)
                    weight = splat(b, weight, 2)
                    factor = b.fmul(scale, weight)
                    store(b, factor, factor_at(loop.index, g, unit))
                    b.store(b.fadd(b.load(rest), b.fsub(b.fmul(least, weight), factor)), rest)
            for u in range(2):
                own = b.add(unit, I64(u))
                with b.if_then(b.icmp_signed("<", own, units)):
                    for row, rest in zip(rows, rests, strict=True):
                        begin = splat(b, b.extract_element(b.load(rest), I32(u)))
                        for i in range(0, CODED_UNIT, LANES):
                            store(b, begin, at(b, row, b.add(b.mul(own, I64(4 * CODED_UNIT)), I64(4 * i))))

        def numbers(line: Value, p: int) -> Value:
            """1 + c / 16 of part p."""
            shift = 4 * p - 19  # to the upper four of the 23 bits of a fraction
            bits = b.lshr(line, like(line, shift)) if shift > 0 else b.shl(line, like(line, -shift))
            return b.bitcast(b.or_(b.and_(bits, like(line, 15 << 19)), like(line, 127 << 23)), vector(F32))

        def add(first: Value, count: int) -> None:
            places = [b.add(first, I64(i)) for i in range(count)]
            pointers = [at(b, codes, offset(place)) for place in places]
            later = [next_run(b.add(places[-1], I64(1 + i))) for i in range(TOGETHER)]
            with cgutils.for_range(b, runs) as loop:
                start, unit = b.mul(loop.index, I64(LINE)), b.udiv(loop.index, I64(RUNS))
                for pointer in later:
                    prefetch_line(b, at(b, pointer, start))
                lines = [load(b, at(b, pointer, start), vector(I32)) for pointer in pointers]
                factors = [[splat(b, load(b, factor_at(i, g, unit), F32)) for i in places] for g in range(n_heads)]
                for p in range(PARTS):
                    values = [numbers(line, p) for line in lines]
                    target = b.add(b.mul(loop.index, I64(4 * RUN)), I64(4 * LANES * p))
                    for row, of_head in zip(rows, factors, strict=True):
                        total = load(b, at(b, row, target), vector(F32))
                        for x, factor in zip(values, of_head, strict=True):
                            total = multiply_add(b, x, factor, total)
                        store(b, total, at(b, row, target))

        with cgutils.for_range_slice(b, I64(0), units, I64(2)) as (unit, _):
            begin_units(unit)
        whole = b.sub(r, b.urem(r, I64(TOGETHER)))
        with cgutils.for_range_slice(b, I64(0), whole, I64(TOGETHER)) as (first, _):
            add(first, TOGETHER)
        with cgutils.for_range_slice(b, whole, r, I64(1)) as (first, _):
            add(first, 1)
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i, i, i, i, i, i, i, i, i, heads), codegen


@kernel
def _choose(q, r, run_bytes, offsets, factors, seen, few, task):  # type: ignore[no-untyped-def]
    """choose_components; and few [B, H_q, width], of zeros, becomes q / tau where they are."""
    choose_components(q, r, run_bytes, offsets, factors, seen, task)
    heads, group = len(factors) // len(q), factors.shape[2]
    for i in range(r):
        for g in range(group):
            few[task // heads, task % heads * group + g, offsets[task, i] // run_bytes] = factors[task, i, g]


@kernel
def _score(  # type: ignore[no-untyped-def]
    codes, scales, k, few, stop, tokens, most, r, offsets, factors, coded_heads, vectors, heads, logits,
    of_tiles, of_choice, task,
):  # fmt: skip
    group, n_head_kv, block = factors.shape[2], codes.shape[1], PARTS * codes.shape[4]
    b, h, begin, end = part(task, tokens, most, n_head_kv, stop)
    if begin >= end:
        return
    kv_head, coded = b * n_head_kv + h, begin
    if block > 0:
        coded = max(begin, min(end, stop[b] // CODED_UNIT * CODED_UNIT))
    chosen, by = address(offsets) + kv_head * offsets.strides[0], address(factors) + kv_head * factors.strides[0]
    (own, own_bytes), weighed = logits_of(logits, b, h, group), begin
    head = address(codes) + b * codes.strides[0] + h * codes.strides[1]
    head_scales = address(scales) + b * scales.strides[0] + h * scales.strides[1]
    room = np.empty((r, len(coded_heads), UNITS), np.float32)
    tile = begin
    while tile < coded:
        n = min(TILE, coded - tile, block - tile % block)
        later = tile + n if tile + n < coded else tile
        where = head + tile // block * codes.strides[2] + tile % block // 2
        ahead = head + later // block * codes.strides[2] + later % block // 2
        scales_at = head_scales + tile // block * scales.strides[2] + tile % block // CODED_UNIT * scales.strides[4]
        for g in range(0, group, len(coded_heads)):
            of_runs = (where, ahead, scales_at, chosen, by + 4 * g, group, r, n // RUN)
            add_codes(*of_runs, own + g * own_bytes + 4 * tile, own_bytes, address(room), coded_heads)
        tile += n
        weighed = weigh(b, h, weighed, tile, end, own, own_bytes, *of_tiles)
    for first in range(coded, end, ROWS):
        columns, n = logits[b, :, first:], min(ROWS, end - first)
        for g in range(h * group, (h + 1) * group, len(heads)):
            score_rows(k, b, h, first, n, few, g, np.float32(1.0), columns, g, k, ROWS, vectors, heads)
        weighed = weigh(b, h, weighed, first + n, end, own, own_bytes, *of_tiles)
    finish_part(b, h, stop, own, own_bytes, *of_tiles, *of_choice)


@kernel
def approximate_top_k(  # type: ignore[no-untyped-def]
    crew, q, codes, scales, k, stop, r, local, sum_logits, rotated, coded_heads, vectors, heads, logits, ranks, rows,
    weights, least, counts,
):  # fmt: skip
    """sparse.approximate_top_k by codes; by rows of k [B, H_kv, slots, blocks], rotated or not, where there are none.

    logits and ranks have the slots of k, rounded up to 16. coded_heads: as many items as query heads see a code when it
    is read; vectors, heads: see tiles.score_rows.
    """
    n_seq, n_head_kv, _, d, _ = codes.shape
    group, r = q.shape[1] // n_head_kv, min(r, d)
    offsets, factors = np.empty((n_seq * n_head_kv, d), np.int64), np.empty((n_seq * n_head_kv, d, group), np.float32)
    few = np.zeros((n_seq, q.shape[1], 16 * len(vectors)), np.float32)
    chosen, seen = (unowned(offsets), unowned(factors)), np.empty(n_seq * n_head_kv, np.float32)
    choice = (unowned(q), r, max(1, codes.strides[3]), *chosen, unowned(seen), unowned(few))
    share(crew, n_seq * n_head_kv, _choose, choice)
    if rotated:
        rotate_rows(few, few, vectors)
    queries = queries_for(k, few)
    tokens, most = part_tokens(stop, n_head_kv)
    tiles, unfinished = tiles_of_heads(stop, n_head_kv, group), parts_of_heads(stop, tokens, n_head_kv)
    mode = OF_LOGITS if sum_logits else OF_PROBABILITIES
    of_tiles = (unowned(tiles[0]), unowned(tiles[1]), unowned(ranks), mode)
    of_choice = (unowned(unfinished), local, unowned(rows), unowned(weights), least, unowned(counts), unowned(seen))
    args = (unowned(codes), unowned(scales), unowned(k), unowned(queries), unowned(stop), tokens, most, r, *chosen)
    how = coded_heads, vectors, heads
    share(crew, n_seq * n_head_kv * most, _score, (*args, *how, unowned(logits), of_tiles, of_choice))
    hold((offsets, factors, seen, queries, tiles, unfinished))
