"""GGUF block formats, each described once: how its bytes become groups of 16 weights.

A format is written against a Reader, of which there are two:
  - Rows: blocks as they lie in the file. The lanes of a vector are 16 columns of one row; a number of the block, such
    as a scale, is a scalar.
  - Panels: the blocks of 16 rows interleaved. The lanes are the 16 rows; 16 columns are 4 vectors whose int32 lanes
    hold 4 columns as bytes, a number of the block is a vector, and a dot product needs no sum over lanes.
It yields Groups that stand for

    weights[start : start + 16] = scale * (q - bias) + minimum

in the arithmetic of llama.cpp's ggml-quants.c, so that decoding is bit-equal to `minirt.dequantize`, while a dot
product can work on the integers q and apply the rest to its sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    shuffle_bytes,
    splat,
    to_float,
    vector,
)

MASK = 32  # the unit of 32 bits, one for each column


class Group(NamedTuple):
    start: int  # index of the first weight within the block
    q: Value  # unsigned: int32 lanes of columns (Rows), or 4 vectors of 4 columns as bytes (Panels)
    scale: Value | None  # float32; None: q are the weights, as float32
    minimum: Value | None = None  # float32, None = 0
    bias: int = 0


class Rows:
    """Reads a block in place."""

    def __init__(self, b: ir.IRBuilder, pointer: Value, lanes: int = LANES):
        self.b, self.pointer, self.lanes = b, pointer, lanes  # lanes: 1 at the end of a row without blocks

    def byte(self, offset: int, signed: bool = False) -> Value:
        """A number of the block, int32."""
        value = load(self.b, at(self.b, self.pointer, offset), I8)
        return (self.b.sext if signed else self.b.zext)(value, I32)

    def half(self, offset: int) -> Value:
        """A float16 of the block, as float32."""
        return half_to_float(self.b, load(self.b, at(self.b, self.pointer, offset), I16))

    def columns(self, offset: int) -> Value:
        """16 bytes, one for each column."""
        return self.b.zext(load(self.b, at(self.b, self.pointer, offset), vector(I8)), vector(I32))

    def flags(self, offset: int, first: int) -> Value:
        """Bits first ... first + 15 of a 32-bit mask, one for each column."""
        mask = splat(self.b, load(self.b, at(self.b, self.pointer, offset), I32))
        places = ir.Constant(vector(I32), [first + j for j in range(LANES)])
        return self.b.and_(self.b.lshr(mask, places), like(mask, 1))

    def bits(self, columns: Value, shift: int, width: int) -> Value:
        return bits(self.b, columns, shift, width)

    def join(self, low: Value, high: Value, shift: int) -> Value:
        """low | high << shift."""
        return join(self.b, low, high, shift)

    def flip(self, columns: Value) -> Value:
        """Signed bytes become unsigned, 128 larger."""
        return self.b.xor(columns, like(columns, 128))

    def look_up(self, table: Sequence[int], columns: Value) -> Value:
        """table[column] of 16 unsigned bytes."""
        return look_up(self.b, table, columns)


class Panels:
    """Reads a block of 16 rows at once: what stands at byte k of the block is at 16 k, row by row (`Format.units`)."""

    lanes = LANES

    def __init__(self, b: ir.IRBuilder, pointer: Value):
        self.b, self.pointer = b, pointer

    def _at(self, offset: int) -> Value:
        return at(self.b, self.pointer, LANES * offset)

    def byte(self, offset: int, signed: bool = False) -> Value:
        value = load(self.b, self._at(offset), vector(I8))
        return (self.b.sext if signed else self.b.zext)(value, vector(I32))

    def half(self, offset: int) -> Value:
        return half_to_float(self.b, load(self.b, self._at(offset), vector(I16)))

    def columns(self, offset: int) -> list[Value]:
        return [load(self.b, self._at(offset + k), vector(I32)) for k in range(0, LANES, 4)]

    def flags(self, offset: int, first: int) -> list[Value]:
        mask = load(self.b, self._at(offset), vector(I32))  # bit 4 k + c of the mask was moved to 8 c + k
        return [self._bytes(mask, first // 4 + k, 1) for k in range(LANES // 4)]

    def _bytes(self, word: Value, shift: int, width: int) -> Value:
        word = self.b.lshr(word, like(word, shift)) if shift else word
        return self.b.and_(word, like(word, (2**width - 1) * 0x01010101))

    def bits(self, columns: list[Value], shift: int, width: int) -> list[Value]:
        return [self._bytes(word, shift, width) for word in columns]

    def join(self, low: list[Value], high: list[Value], shift: int) -> list[Value]:
        return [join(self.b, x, y, shift) for x, y in zip(low, high, strict=True)]

    def flip(self, columns: list[Value]) -> list[Value]:
        return [self.b.xor(word, like(word, 0x80808080)) for word in columns]

    def look_up(self, table: Sequence[int], columns: list[Value]) -> list[Value]:
        return [shuffle_bytes(self.b, table, word) for word in columns]


class Format(NamedTuple):
    dtype: np.dtype  # a record type of its own for each format: it chooses the decoder when a kernel is compiled
    length: int  # weights in a block
    units: tuple[tuple[int, int], ...]  # what a block is made of: (bytes, how many of a row lie together in a panel)
    decode: Callable[[ir.IRBuilder, Any], Iterator[Group]]  # (builder, reader)


FORMATS: dict[str, Format] = {}

# The sixteen levels of IQ4_NL and IQ4_XS, 128 larger.
IQ4_LEVELS = [128 + x for x in (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)]


def _format(name: str, length: int, *units: tuple[int, int]):  # type: ignore[no-untyped-def]
    """Registers the decorated decoder for blocks of `length` weights, made of runs (bytes, unit)."""

    def register(decode):  # type: ignore[no-untyped-def]
        dtype = np.dtype([(name.lower(), "u1", sum(size for size, _ in units))])
        FORMATS[name] = Format(dtype, length, units, decode)
        return decode

    return register


# -- one number a weight, whose q is the weight itself -----------------------------------------------------------------


@_format("F32", 1, (4, 4))
def _f32(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    yield Group(0, load(b, r.pointer, vector(F32, r.lanes)), None)


@_format("F16", 1, (2, 2))
def _f16(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    yield Group(0, half_to_float(b, load(b, r.pointer, vector(I16, r.lanes))), None)


@_format("BF16", 1, (2, 2))
def _bf16(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    wide = b.zext(load(b, r.pointer, vector(I16, r.lanes)), vector(I32, r.lanes))
    yield Group(0, b.bitcast(b.shl(wide, like(wide, 16)), vector(F32, r.lanes)), None)


# -- blocks of 32: nibble j is weight j below, weight j + 16 above -----------------------------------------------------


@_format("Q4_0", 32, (2, 2), (16, 4))
def _q4_0(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    d, qs = r.half(0), r.columns(2)
    for half in range(2):
        yield Group(16 * half, r.bits(qs, 4 * half, 4), d, bias=8)


@_format("Q4_1", 32, (4, 2), (16, 4))
def _q4_1(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    d, m, qs = r.half(0), r.half(2), r.columns(4)
    for half in range(2):
        yield Group(16 * half, r.bits(qs, 4 * half, 4), d, m)


@_format("Q5_0", 32, (2, 2), (4, MASK), (16, 4))
def _q5_0(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    d, qs = r.half(0), r.columns(6)
    for half in range(2):
        yield Group(16 * half, r.join(r.bits(qs, 4 * half, 4), r.flags(2, 16 * half), 4), d, bias=16)


@_format("Q5_1", 32, (4, 2), (4, MASK), (16, 4))
def _q5_1(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    d, m, qs = r.half(0), r.half(2), r.columns(8)
    for half in range(2):
        yield Group(16 * half, r.join(r.bits(qs, 4 * half, 4), r.flags(4, 16 * half), 4), d, m)


@_format("Q8_0", 32, (2, 2), (32, 4))
def _q8_0(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    d = r.half(0)
    for half in range(2):
        yield Group(16 * half, r.flip(r.columns(2 + 16 * half)), d, bias=128)


@_format("IQ4_NL", 32, (2, 2), (16, 4))
def _iq4_nl(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    d, qs = r.half(0), r.columns(2)
    for half in range(2):
        yield Group(16 * half, r.look_up(IQ4_LEVELS, r.bits(qs, 4 * half, 4)), d, bias=128)


# -- blocks of 256 with scales of their own for every 16 or 32 weights -------------------------------------------------


@_format("Q2_K", 256, (16, 1), (64, 4), (4, 2))
def _q2_k(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    """16 bytes of scales (low nibble) and minima (high), 64 of two-bit numbers, d, dmin."""
    d, dmin = r.half(80), r.half(82)
    for i in range(16):
        part, shift, half = i // 8, i % 8 // 2, i % 2
        both = r.byte(i)
        scale = b.fmul(d, to_float(b, bits(b, both, 0, 4)))
        minimum = b.fneg(b.fmul(dmin, to_float(b, bits(b, both, 4, 4))))
        yield Group(16 * i, r.bits(r.columns(16 + 32 * part + 16 * half), 2 * shift, 2), scale, minimum)


@_format("Q3_K", 256, (96, 4), (12, 1), (2, 2))
def _q3_k(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    """32 bytes of third bits, 64 of two-bit numbers, 12 of six-bit scales, d."""
    d = r.half(108)
    for i in range(16):
        part, shift, half = i // 8, i % 8 // 2, i % 2
        low, high = bits(b, r.byte(96 + i % 8), 4 * (i // 8), 4), bits(b, r.byte(104 + i % 4), 2 * (i // 4), 2)
        scale = b.fmul(d, to_float(b, minus(b, join(b, low, high, 4), 32)))
        third = r.bits(r.columns(16 * half), 4 * part + shift, 1)
        q = r.join(r.bits(r.columns(32 + 32 * part + 16 * half), 2 * shift, 2), third, 2)
        yield Group(16 * i, q, scale, bias=4)


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
            q = r.bits(r.columns(qs + 32 * (i // 2) + 16 * half), 4 * (i % 2), 4)
            if qh is not None:
                q = r.join(q, r.bits(r.columns(qh + 16 * half), i, 1), 4)
            yield Group(32 * i + 16 * half, q, scale, minimum)


@_format("Q4_K", 256, (4, 2), (12, 1), (128, 4))
def _q4_k(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    yield from _q45_k(b, r, 16, None)


@_format("Q5_K", 256, (4, 2), (12, 1), (160, 4))
def _q5_k(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    yield from _q45_k(b, r, 48, 16)


@_format("Q6_K", 256, (192, 4), (16, 1), (2, 2))
def _q6_k(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    """128 bytes of low nibbles, 64 of high pairs, 16 signed scales, d."""
    d = r.half(208)
    for i in range(16):
        part, run, half = i // 8, i % 8 // 2, i % 2  # runs of 32 within each 128
        low = r.bits(r.columns(64 * part + 32 * (run % 2) + 16 * half), 4 * (run // 2), 4)
        high = r.bits(r.columns(128 + 32 * part + 16 * half), 2 * run, 2)
        scale = b.fmul(d, to_float(b, r.byte(192 + i, signed=True)))
        yield Group(16 * i, r.join(low, high, 4), scale, bias=32)


@_format("IQ4_XS", 256, (2, 2), (6, 1), (128, 4))
def _iq4_xs(b: ir.IRBuilder, r: Any) -> Iterator[Group]:
    """d, the high pairs of eight six-bit scales in 2 bytes, their low nibbles in 4, and nibbles."""
    d = r.half(0)
    for i in range(8):
        low, high = bits(b, r.byte(4 + i // 2), 4 * (i % 2), 4), bits(b, r.byte(2 + i // 4), 2 * (i % 4), 2)
        scale = b.fmul(d, to_float(b, minus(b, join(b, low, high, 4), 32)))
        qs = r.columns(8 + 16 * i)
        for half in range(2):
            yield Group(32 * i + 16 * half, r.look_up(IQ4_LEVELS, r.bits(qs, 4 * half, 4)), scale, bias=128)


# Blocks of a cache whose rows are not rotated: the type of its items tells (minirt.stores).
for _name in ("Q8_0", "Q4_0"):
    _same = FORMATS[_name]
    _type = np.dtype([(f"{_name.lower()}_plain", "u1", _same.dtype.itemsize)])
    FORMATS[f"{_name}_PLAIN"] = _same._replace(dtype=_type)

BY_RECORD = {from_dtype(f.dtype): f for f in FORMATS.values()}  # Numba's type of a row's items -> format
