"""SparQ's index in 4 bits (`minirt.ops.CodedIndex`): units of keys are coded as in `minirt.reference.index`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minirt.ops import CODED_UNIT

from .compiled import kernel
from .crew import share
from .ir_vectors import (
    F32,
    I32,
    I64,
    LANES,
    Value,
    at,
    constant,
    float_to_half,
    half_to_float,
    like,
    load,
    store,
    vector,
)
from .pointers import address
from .rotation import rotate_rows
from .rows import decode_row
from .token_index import add_to_mean
from .unowned import unowned

PARTS = 8  # codes in a word
RUN = PARTS * LANES  # tokens of a line of memory


@intrinsic
def encode_components(typingctx: Any, rows: Any, row_bytes: Any, to: Any) -> Any:
    """Codes 16 components of a unit: float32 [CODED_UNIT, 16] with rows of row_bytes at an address.

    To another address go words [CODED_UNIT / 8, 16 components], then 16 float16 scales, then what is least of each.
    """

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        rows, to = (b.inttoptr(args[i], cgutils.voidptr_t) for i in (0, 2))
        zero, nan = constant(F32, 0.0), constant(F32, math.nan)

        def numbers(t: Value) -> Value:
            return load(b, at(b, rows, b.mul(t, args[1])), vector(F32))

        first = numbers(I64(0))
        low, high, total = (cgutils.alloca_once_value(b, x) for x in (first, first, zero))
        with cgutils.for_range(b, I64(CODED_UNIT)) as loop:
            x = numbers(loop.index)
            b.store(b.select(b.fcmp_ordered("<", x, b.load(low)), x, b.load(low)), low)
            b.store(b.select(b.fcmp_ordered(">", x, b.load(high)), x, b.load(high)), high)
            b.store(b.select(b.fcmp_unordered("uno", x, x), x, b.load(total)), total)
        broken = b.fcmp_unordered("uno", b.load(total), zero)
        least16 = float_to_half(b, b.select(broken, nan, b.load(low)))
        least = half_to_float(b, least16)
        scale16 = float_to_half(b, b.fdiv(b.fsub(b.load(high), least), constant(F32, 15.0)))
        scale = half_to_float(b, scale16)
        inverse = b.select(b.fcmp_ordered("==", scale, zero), zero, b.fdiv(constant(F32, 1.0), scale))
        with cgutils.for_range(b, I64(CODED_UNIT // PARTS)) as loop:
            run, lane = b.udiv(loop.index, I64(LANES)), b.urem(loop.index, I64(LANES))
            word = constant(I32, 0)
            for p in range(PARTS):
                x = numbers(b.add(b.add(b.mul(run, I64(RUN)), I64(LANES * p)), lane))
                x = b.fadd(b.fmul(b.fsub(x, least), inverse), constant(F32, 0.5))
                x = b.select(b.fcmp_ordered(">", x, zero), x, zero)
                x = b.select(b.fcmp_ordered("<", x, constant(F32, 15.0)), x, constant(F32, 15.0))
                word = b.or_(word, b.shl(b.fptosi(x, vector(I32)), like(word, 4 * p)))
            store(b, word, at(b, to, b.mul(loop.index, I64(4 * LANES))))
        end = 4 * LANES * CODED_UNIT // PARTS
        store(b, scale16, at(b, to, end))
        store(b, least16, at(b, to, end + 2 * LANES))
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i), codegen


@kernel
def _encode_unit(codes, scales, k, first, rotated, vectors):  # type: ignore[no-untyped-def]
    """codes [d, words] and scales [d, 2] of the unit of keys k [slots, blocks] that begins with slot `first`."""
    rows = np.empty((CODED_UNIT, 16 * len(vectors)), np.float32)
    for t in range(CODED_UNIT):
        decode_row(k, first + t, rows, t)
    if rotated:
        rotate_rows(rows, rows, vectors)
    n_words = CODED_UNIT // PARTS
    coded = np.empty(16 * (n_words + 1), np.uint32)
    halves = coded[16 * n_words :].view(np.uint16)
    for j in range(0, len(codes), 16):
        encode_components(address(rows) + 4 * j, rows.strides[0], address(coded))
        for i in range(min(16, len(codes) - j)):
            for w in range(n_words):
                codes[j + i, w] = coded[16 * w + i]
            scales[j + i, 0], scales[j + i, 1] = halves[i], halves[16 + i]


@kernel
def _append_head(codes, scales, k_cache, mean, seq, slot, v, rotated, vectors, h):  # type: ignore[no-untyped-def]
    per_block, n_words = scales.shape[4], CODED_UNIT // PARTS
    for i in range(len(seq)):
        if slot[i] % CODED_UNIT == CODED_UNIT - 1 and per_block > 0:
            unit = slot[i] // CODED_UNIT
            block, place = unit // per_block, unit % per_block
            words = codes[seq[i], h, block, :, place * n_words : (place + 1) * n_words]
            own = scales[seq[i], h, block, :, place]
            _encode_unit(words, own, k_cache[seq[i], h], unit * CODED_UNIT, rotated, vectors)
    add_to_mean(mean, seq, slot, v, h)


@kernel
def append_codes(crew, codes, scales, k_cache, mean, seq, slot, v, rotated, vectors):  # type: ignore[no-untyped-def]
    """Codes the units whose last slot is among slot [N] of sequences seq [N], and takes v [N, H_kv, d] into the means.

    k_cache [B, H_kv, slots, blocks], whose rows are to be rotated if `rotated`; scales: bits of float16; mean as in
    token_index.append_index. vectors: as many items as a head has vectors.
    """
    arrays = (unowned(codes), unowned(scales), unowned(k_cache), unowned(mean), unowned(seq), unowned(slot), unowned(v))
    share(crew, v.shape[1], _append_head, (*arrays, rotated, vectors))
