"""GGUF block formats, each described once: how its bytes become groups of 16 weights.

A decoder is written against a Reader, of which there are two:
  - rows: blocks as they lie in the file. Lanes are 16 columns of one row; a scale is a scalar.
  - panels: the blocks of 16 rows with their bytes interleaved. Lanes are the 16 rows; a group is a list of 16 columns,
    a scale a vector, and a dot product needs no sum over lanes.
A decoder yields Groups that stand for

    weights[start : start + 16] = scale * q + minimum

in the arithmetic of llama.cpp's ggml-quants.c, so that storing them is bit-equal to `minirt.dequantize`, while a dot
product can apply scale and minimum after summing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import from_dtype

from .ir_vectors import (
    F32,
    I8,
    I16,
    I32,
    LANES,
    Value,
    at,
    bits,
    half_to_float,
    join,
    like,
    load,
    look_up,
    minus,
    splat,
    to_float,
    vector,
)


class Group(NamedTuple):
    start: int  # index of the first weight within the block
    q: Value  # float32: a vector of columns, or a list of columns
    scale: Value | None  # float32, None = 1
    minimum: Value | None = None  # float32, None = 0


class Rows:
    """Reads a block in place. Bytes come as int32."""

    def __init__(self, b: ir.IRBuilder, pointer: Value, lanes: int = LANES):
        self.b, self.pointer, self.lanes = b, pointer, lanes  # lanes: 1 at the end of a row without blocks

    def byte(self, offset: int, signed: bool = False) -> Value:
        value = load(self.b, at(self.b, self.pointer, offset), I8)
        return (self.b.sext if signed else self.b.zext)(value, I32)

    def half(self, offset: int) -> Value:
        """A float16, as float32."""
        return half_to_float(self.b, load(self.b, at(self.b, self.pointer, offset), I16))

    def columns(self, offset: int, signed: bool = False) -> Value:
        """16 bytes, one for each column."""
        value = load(self.b, at(self.b, self.pointer, offset), vector(I8))
        return (self.b.sext if signed else self.b.zext)(value, vector(I32))

    def mask(self, offset: int, first: int) -> Value:
        """Bits first ... first + 15 of a 32-bit mask, one for each column."""
        mask = splat(self.b, load(self.b, at(self.b, self.pointer, offset), I32))
        places = ir.Constant(vector(I32), [first + j for j in range(LANES)])
        return self.b.and_(self.b.lshr(mask, places), like(mask, 1))


class Panels:
    """Reads a block of 16 rows at once: byte k of row r is at 16 k + r."""

    def __init__(self, b: ir.IRBuilder, pointer: Value):
        self.b, self.pointer = b, pointer

    def byte(self, offset: int, signed: bool = False) -> Value:
        value = load(self.b, at(self.b, self.pointer, LANES * offset), vector(I8))
        return (self.b.sext if signed else self.b.zext)(value, vector(I32))

    def half(self, offset: int) -> Value:
        both = join(self.b, self.byte(offset), self.byte(offset + 1), 8)
        return half_to_float(self.b, self.b.trunc(both, vector(I16)))

    def columns(self, offset: int, signed: bool = False) -> Value:
        return [self.byte(offset + j, signed) for j in range(LANES)]

    def mask(self, offset: int, first: int) -> Value:
        places = range(first, first + LANES)
        return [bits(self.b, self.byte(offset + i // 8), i % 8, 1) for i in places]


class Format(NamedTuple):
    dtype: np.dtype  # a record type of its own for each format: it chooses the decoder when a kernel is compiled
    length: int  # weights in a block
    decode: Callable[[ir.IRBuilder, Any], Iterator[Group]]  # (builder, reader)


FORMATS: dict[str, Format] = {}

# The sixteen levels of IQ4_NL and IQ4_XS.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _format(name: str, length: int, nbytes: int):  # type: ignore[no-untyped-def]
    """Registers the decorated decoder for blocks of `length` weights in `nbytes` bytes."""

    def register(decode):  # type: ignore[no-untyped-def]
        FORMATS[name] = Format(np.dtype([(name.lower(), "u1", nbytes)]), length, decode)
        return decode

    return register


# -- one number a weight, read by rows only ----------------------------------------------------------------------------


@_format("F32", 1, 4)
def _f32(b: ir.IRBuilder, r: Rows) -> Iterator[Group]:
    yield Group(0, load(b, r.pointer, vector(F32, r.lanes)), None)


@_format("F16", 1, 2)
def _f16(b: ir.IRBuilder, r: Rows) -> Iterator[Group]:
    yield Group(0, half_to_float(b, load(b, r.pointer, vector(I16, r.lanes))), None)


@_format("BF16", 1, 2)
def _bf16(b: ir.IRBuilder, r: Rows) -> Iterator[Group]:
    wide = b.zext(load(b, r.pointer, vector(I16, r.lanes)), vector(I32, r.lanes))
    yield Group(0, b.bitcast(b.shl(wide, like(wide, 16)), vector(F32, r.lanes)), None)


# -- blocks of 32: nibble j is weight j below, weight j + 16 above -----------------------------------------------------


@_format("Q4_0", 32, 18)
def _q4_0(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    d, qs = r.half(0), r.columns(2)
    for half in range(2):
        yield Group(16 * half, to_float(b, minus(b, bits(b, qs, 4 * half, 4), 8)), d)


@_format("Q4_1", 32, 20)
def _q4_1(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    d, m, qs = r.half(0), r.half(2), r.columns(4)
    for half in range(2):
        yield Group(16 * half, to_float(b, bits(b, qs, 4 * half, 4)), d, m)


@_format("Q5_0", 32, 22)
def _q5_0(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    d, qs = r.half(0), r.columns(6)
    for half in range(2):
        q = join(b, bits(b, qs, 4 * half, 4), r.mask(2, 16 * half), 4)
        yield Group(16 * half, to_float(b, minus(b, q, 16)), d)


@_format("Q5_1", 32, 24)
def _q5_1(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    d, m, qs = r.half(0), r.half(2), r.columns(8)
    for half in range(2):
        q = join(b, bits(b, qs, 4 * half, 4), r.mask(4, 16 * half), 4)
        yield Group(16 * half, to_float(b, q), d, m)


@_format("Q8_0", 32, 34)
def _q8_0(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    d = r.half(0)
    for half in range(2):
        yield Group(16 * half, to_float(b, r.columns(2 + 16 * half, signed=True)), d)


@_format("IQ4_NL", 32, 18)
def _iq4_nl(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    d, qs = r.half(0), r.columns(2)
    for half in range(2):
        yield Group(16 * half, to_float(b, look_up(b, IQ4_LEVELS, bits(b, qs, 4 * half, 4))), d)


# -- blocks of 256 with scales of their own for every 16 or 32 weights -------------------------------------------------


@_format("Q2_K", 256, 84)
def _q2_k(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    """16 bytes of scales (low nibble) and minima (high), 64 of two-bit numbers, d, dmin."""
    d, dmin = r.half(80), r.half(82)
    for i in range(16):
        part, shift, half = i // 8, i % 8 // 2, i % 2
        both = r.byte(i)
        q = bits(b, r.columns(16 + 32 * part + 16 * half), 2 * shift, 2)
        scale = b.fmul(d, to_float(b, bits(b, both, 0, 4)))
        minimum = b.fneg(b.fmul(dmin, to_float(b, bits(b, both, 4, 4))))
        yield Group(16 * i, to_float(b, q), scale, minimum)


@_format("Q3_K", 256, 110)
def _q3_k(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    """32 bytes of third bits, 64 of two-bit numbers, 12 of six-bit scales, d."""
    d = r.half(108)
    for i in range(16):
        part, shift, half = i // 8, i % 8 // 2, i % 2
        low, high = bits(b, r.byte(96 + i % 8), 4 * (i // 8), 4), bits(b, r.byte(104 + i % 4), 2 * (i // 4), 2)
        scale = b.fmul(d, to_float(b, minus(b, join(b, low, high, 4), 32)))
        third = bits(b, r.columns(16 * half), 4 * part + shift, 1)
        q = join(b, bits(b, r.columns(32 + 32 * part + 16 * half), 2 * shift, 2), third, 2)
        yield Group(16 * i, to_float(b, minus(b, q, 4)), scale)


def _scale_min(b: ir.IRBuilder, r: Any, i: int) -> tuple[Value, Value]:
    """Scale and minimum i of 8, six bits each, packed in the 12 bytes from byte 4."""
    if i < 4:
        return bits(b, r.byte(4 + i), 0, 6), bits(b, r.byte(8 + i), 0, 6)
    both = r.byte(8 + i)
    scale = join(b, bits(b, both, 0, 4), bits(b, r.byte(i), 6, 2), 4)
    return scale, join(b, bits(b, both, 4, 4), bits(b, r.byte(4 + i), 6, 2), 4)


def _q45_k(b: ir.IRBuilder, r: Any, qs: int, qh: int | None) -> Iterator[Group]:
    """d, dmin, scales, fifth bits at byte qh if any, and nibbles: two runs of 32 weights to each 32 bytes."""
    d, dmin = r.half(0), r.half(2)
    for i in range(8):
        whole, least = _scale_min(b, r, i)
        scale, minimum = b.fmul(d, to_float(b, whole)), b.fneg(b.fmul(dmin, to_float(b, least)))
        for half in range(2):
            q = bits(b, r.columns(qs + 32 * (i // 2) + 16 * half), 4 * (i % 2), 4)
            if qh is not None:
                q = join(b, q, bits(b, r.columns(qh + 16 * half), i, 1), 4)
            yield Group(32 * i + 16 * half, to_float(b, q), scale, minimum)


@_format("Q4_K", 256, 144)
def _q4_k(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    yield from _q45_k(b, r, 16, None)


@_format("Q5_K", 256, 176)
def _q5_k(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    yield from _q45_k(b, r, 48, 16)


@_format("Q6_K", 256, 210)
def _q6_k(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    """128 bytes of low nibbles, 64 of high pairs, 16 signed scales, d."""
    d = r.half(208)
    for i in range(16):
        part, run, half = i // 8, i % 8 // 2, i % 2  # runs of 32 within each 128
        low = bits(b, r.columns(64 * part + 32 * (run % 2) + 16 * half), 4 * (run // 2), 4)
        high = bits(b, r.columns(128 + 32 * part + 16 * half), 2 * run, 2)
        scale = b.fmul(d, to_float(b, r.byte(192 + i, signed=True)))
        yield Group(16 * i, to_float(b, minus(b, join(b, low, high, 4), 32)), scale)


@_format("IQ4_XS", 256, 136)
def _iq4_xs(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    """d, the high pairs of eight six-bit scales in 2 bytes, their low nibbles in 4, and nibbles."""
    d = r.half(0)
    for i in range(8):
        low, high = bits(b, r.byte(4 + i // 2), 4 * (i % 2), 4), bits(b, r.byte(2 + i // 4), 2 * (i % 4), 2)
        scale = b.fmul(d, to_float(b, minus(b, join(b, low, high, 4), 32)))
        qs = r.columns(8 + 16 * i)
        for half in range(2):
            yield Group(32 * i + 16 * half, to_float(b, look_up(b, IQ4_LEVELS, bits(b, qs, 4 * half, 4))), scale)


BY_RECORD = {from_dtype(f.dtype): f for f in FORMATS.values()}  # Numba's type of a row's items -> format
