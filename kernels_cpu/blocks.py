"""GGUF weight blocks: a NumPy record type for each, and how a block becomes 16-lane groups of float32.

A weight is an array [rows, blocks] of its record, viewed in place on the mapped file. The record type chooses the
decoder when a kernel is compiled, so kernels are written once for all types. A decoder yields Groups that stand for

    weights[start : start + 16] = scale * q + minimum

in the arithmetic of llama.cpp's ggml-quants.c, so that storing them is bit-equal to `minirt.dequantize`, while a dot
product can apply scale and minimum after summing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from llvmlite import ir

from .ir_vectors import (
    F32,
    I16,
    I32,
    LANES,
    Value,
    at,
    bits,
    constant,
    half_to_float,
    load,
    load_byte,
    load_bytes,
    load_half,
    minus,
    shift_left,
    splat,
    to_float,
    vector,
)


class Group(NamedTuple):
    start: int  # index of the first weight within the block
    q: Value  # 16 float32 lanes
    scale: Value | None  # float32, None = 1
    minimum: Value | None = None  # float32, None = 0


class Format(NamedTuple):
    dtype: np.dtype
    length: int  # weights in a block
    decode: Callable[[ir.IRBuilder, Value, int], Iterator[Group]]  # (builder, byte pointer to a block, lanes)


FORMATS: dict[str, Format] = {}

# The sixteen levels of IQ4_NL and IQ4_XS.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _format(name: str, length: int, *fields: tuple):  # type: ignore[no-untyped-def]
    """Registers the decorated decoder for blocks of `length` weights with these record fields."""

    def register(decode):  # type: ignore[no-untyped-def]
        FORMATS[name] = Format(np.dtype(list(fields)), length, decode)
        return decode

    return register


# -- one number a weight; `lanes` is 1 for the end of a row ------------------------------------------------------------


@_format("F32", 1, ("f32", "<f4"))
def _f32(b: ir.IRBuilder, p: Value, lanes: int) -> Iterator[Group]:
    yield Group(0, load(b, p, vector(F32, lanes)), None)


@_format("F16", 1, ("f16", "<u2"))
def _f16(b: ir.IRBuilder, p: Value, lanes: int) -> Iterator[Group]:
    yield Group(0, half_to_float(b, load(b, p, vector(I16, lanes))), None)


@_format("BF16", 1, ("bf16", "<u2"))
def _bf16(b: ir.IRBuilder, p: Value, lanes: int) -> Iterator[Group]:
    wide = b.zext(load(b, p, vector(I16, lanes)), vector(I32, lanes))
    yield Group(0, b.bitcast(shift_left(b, wide, 16), vector(F32, lanes)), None)


# -- blocks of 32: nibble j is weight j below, weight j + 16 above -----------------------------------------------------


@_format("Q4_0", 32, ("d", "<u2"), ("q4_0", "u1", 16))
def _q4_0(b: ir.IRBuilder, p: Value, lanes: int) -> Iterator[Group]:
    d, qs = load_half(b, p, 0), load_bytes(b, p, 2)
    for half in range(2):
        yield Group(16 * half, to_float(b, minus(b, bits(b, qs, 4 * half, 4), 8)), d)


@_format("Q4_1", 32, ("d", "<u2"), ("m", "<u2"), ("q4_1", "u1", 16))
def _q4_1(b: ir.IRBuilder, p: Value, lanes: int) -> Iterator[Group]:
    d, m, qs = load_half(b, p, 0), load_half(b, p, 2), load_bytes(b, p, 4)
    for half in range(2):
        yield Group(16 * half, to_float(b, bits(b, qs, 4 * half, 4)), d, m)


def _fifth_bits(b: ir.IRBuilder, p: Value, offset: int, half: int) -> Value:
    """Bit j of a 32-bit mask for each weight j of one half, moved to the value 16."""
    mask = splat(b, load(b, at(b, p, offset), I32))
    places = ir.Constant(vector(I32), [16 * half + j for j in range(LANES)])
    return shift_left(b, b.and_(b.lshr(mask, places), constant(I32, 1)), 4)


@_format("Q5_0", 32, ("d", "<u2"), ("qh", "u1", 4), ("q5_0", "u1", 16))
def _q5_0(b: ir.IRBuilder, p: Value, lanes: int) -> Iterator[Group]:
    d, qs = load_half(b, p, 0), load_bytes(b, p, 6)
    for half in range(2):
        q = b.or_(bits(b, qs, 4 * half, 4), _fifth_bits(b, p, 2, half))
        yield Group(16 * half, to_float(b, minus(b, q, 16)), d)


@_format("Q5_1", 32, ("d", "<u2"), ("m", "<u2"), ("qh", "u1", 4), ("q5_1", "u1", 16))
def _q5_1(b: ir.IRBuilder, p: Value, lanes: int) -> Iterator[Group]:
    d, m, qs = load_half(b, p, 0), load_half(b, p, 2), load_bytes(b, p, 8)
    for half in range(2):
        q = b.or_(bits(b, qs, 4 * half, 4), _fifth_bits(b, p, 4, half))
        yield Group(16 * half, to_float(b, q), d, m)


@_format("Q8_0", 32, ("d", "<u2"), ("q8_0", "i1", 32))
def _q8_0(b: ir.IRBuilder, p: Value, lanes: int) -> Iterator[Group]:
    d = load_half(b, p, 0)
    for half in range(2):
        q = b.sext(load(b, at(b, p, 2 + 16 * half), ir.VectorType(ir.IntType(8), LANES)), vector(I32))
        yield Group(16 * half, to_float(b, q), d)


def _iq4(b: ir.IRBuilder, nibbles: Value) -> Value:
    """The level of each 4-bit index, chosen bit by bit."""
    levels = [constant(F32, level) for level in IQ4_LEVELS]
    for bit in range(4):
        odd = b.icmp_signed("!=", bits(b, nibbles, bit, 1), constant(I32, 0))
        levels = [b.select(odd, levels[i + 1], levels[i]) for i in range(0, len(levels), 2)]
    return levels[0]


@_format("IQ4_NL", 32, ("d", "<u2"), ("iq4_nl", "u1", 16))
def _iq4_nl(b: ir.IRBuilder, p: Value, lanes: int) -> Iterator[Group]:
    d, qs = load_half(b, p, 0), load_bytes(b, p, 2)
    for half in range(2):
        yield Group(16 * half, _iq4(b, bits(b, qs, 4 * half, 4)), d)


# -- blocks of 256 with scales of their own for every 16 or 32 weights -------------------------------------------------


@_format("Q2_K", 256, ("scales", "u1", 16), ("q2_k", "u1", 64), ("d", "<u2"), ("dmin", "<u2"))
def _q2_k(b: ir.IRBuilder, p: Value, lanes: int) -> Iterator[Group]:
    d, dmin = load_half(b, p, 80), load_half(b, p, 82)
    for i in range(16):
        part, shift, half = i // 8, i % 8 // 2, i % 2
        both = load_byte(b, p, i)
        q = bits(b, load_bytes(b, p, 16 + 32 * part + 16 * half), 2 * shift, 2)
        scale = b.fmul(d, to_float(b, bits(b, both, 0, 4)))
        minimum = b.fneg(b.fmul(dmin, to_float(b, bits(b, both, 4, 4))))
        yield Group(16 * i, to_float(b, q), scale, minimum)


@_format("Q3_K", 256, ("hmask", "u1", 32), ("q3_k", "u1", 64), ("scales", "u1", 12), ("d", "<u2"))
def _q3_k(b: ir.IRBuilder, p: Value, lanes: int) -> Iterator[Group]:
    d = load_half(b, p, 108)
    for i in range(16):
        part, shift, half = i // 8, i % 8 // 2, i % 2
        low = bits(b, load_byte(b, p, 96 + i % 8), 4 * (i // 8), 4)
        high = bits(b, load_byte(b, p, 104 + i % 4), 2 * (i // 4), 2)
        scale = b.fmul(d, to_float(b, minus(b, b.or_(low, shift_left(b, high, 4)), 32)))
        q = bits(b, load_bytes(b, p, 32 + 32 * part + 16 * half), 2 * shift, 2)
        third = bits(b, load_bytes(b, p, 16 * half), 4 * part + shift, 1)
        yield Group(16 * i, to_float(b, minus(b, b.or_(q, shift_left(b, third, 2)), 4)), scale)


def _scale_min(b: ir.IRBuilder, p: Value, i: int) -> tuple[Value, Value]:
    """Scale and minimum i of 8, six bits each, packed in 12 bytes at p."""
    if i < 4:
        return bits(b, load_byte(b, p, i), 0, 6), bits(b, load_byte(b, p, i + 4), 0, 6)
    low = load_byte(b, p, i + 4)
    scale = b.or_(bits(b, low, 0, 4), shift_left(b, bits(b, load_byte(b, p, i - 4), 6, 2), 4))
    minimum = b.or_(bits(b, low, 4, 4), shift_left(b, bits(b, load_byte(b, p, i), 6, 2), 4))
    return scale, minimum


def _q45_k(b: ir.IRBuilder, p: Value, qs: int, qh: int | None) -> Iterator[Group]:
    """Q4_K, and Q5_K with its fifth bits at byte qh: eight runs of 32, two to each 32 bytes of nibbles."""
    d, dmin = load_half(b, p, 0), load_half(b, p, 2)
    for i in range(8):
        whole, least = _scale_min(b, at(b, p, 4), i)
        scale, minimum = b.fmul(d, to_float(b, whole)), b.fneg(b.fmul(dmin, to_float(b, least)))
        for half in range(2):
            q = bits(b, load_bytes(b, p, qs + 32 * (i // 2) + 16 * half), 4 * (i % 2), 4)
            if qh is not None:
                q = b.or_(q, shift_left(b, bits(b, load_bytes(b, p, qh + 16 * half), i, 1), 4))
            yield Group(32 * i + 16 * half, to_float(b, q), scale, minimum)


@_format("Q4_K", 256, ("d", "<u2"), ("dmin", "<u2"), ("scales", "u1", 12), ("q4_k", "u1", 128))
def _q4_k(b: ir.IRBuilder, p: Value, lanes: int) -> Iterator[Group]:
    yield from _q45_k(b, p, 16, None)


@_format("Q5_K", 256, ("d", "<u2"), ("dmin", "<u2"), ("scales", "u1", 12), ("qh", "u1", 32), ("q5_k", "u1", 128))
def _q5_k(b: ir.IRBuilder, p: Value, lanes: int) -> Iterator[Group]:
    yield from _q45_k(b, p, 48, 16)


@_format("Q6_K", 256, ("q6_k", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<u2"))
def _q6_k(b: ir.IRBuilder, p: Value, lanes: int) -> Iterator[Group]:
    d = load_half(b, p, 208)
    for i in range(16):
        part, run, half = i // 8, i % 8 // 2, i % 2  # runs of 32 within each 128
        low = bits(b, load_bytes(b, p, 64 * part + 32 * (run % 2) + 16 * half), 4 * (run // 2), 4)
        high = bits(b, load_bytes(b, p, 128 + 32 * part + 16 * half), 2 * run, 2)
        q = minus(b, b.or_(low, shift_left(b, high, 4)), 32)
        scale = b.fmul(d, to_float(b, load_byte(b, p, 192 + i, signed=True)))
        yield Group(16 * i, to_float(b, q), scale)


@_format("IQ4_XS", 256, ("d", "<u2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("iq4_xs", "u1", 128))
def _iq4_xs(b: ir.IRBuilder, p: Value, lanes: int) -> Iterator[Group]:
    d, high = load_half(b, p, 0), b.zext(load(b, at(b, p, 2), I16), I32)
    for i in range(8):
        low = bits(b, load_byte(b, p, 4 + i // 2), 4 * (i % 2), 4)
        scale = b.fmul(d, to_float(b, minus(b, b.or_(low, shift_left(b, bits(b, high, 2 * i, 2), 4)), 32)))
        qs = load_bytes(b, p, 8 + 16 * i)
        for half in range(2):
            yield Group(32 * i + 16 * half, _iq4(b, bits(b, qs, 4 * half, 4)), scale)
