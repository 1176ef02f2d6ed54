"""Products in the tile registers of AMX, which multiply 16 x 32 by 32 x 16 bfloat16 in 16 cycles.

A float32 is taken as the sum of two bfloat16, high and low, which it is up to 2^-18 of itself. Of the four products the
one of two low parts, as small as that, is left out. Three take a fifth of the time of one in float32.

A block is 16 rows of 32 columns: [16 rows, 16 words of 32 bits], number i of the 32 in the lower half of word i and
number i + 16 in the upper. A block of high parts is followed by that of the low ones, so that both together take the
room of the float32. What is multiplied lies as such blocks: rows of one matrix (`pack_strips`); and of the other, whose
rows are made of words in place (`split_row`) and then transposed, [16 words, 16 rows].

(Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .ir_vectors import F32, I8, I32, I64, LANES, Value, at, constant, like, load, store, vector
from .isa import has

HAS_TILES = has("amx-tile", "amx-bf16")
COLUMNS = 2 * LANES  # of a block
BLOCK = 4 * LANES * LANES  # bytes

_SUMS, _LEFT, _RIGHT = (0, 1, 2, 3), (4, 5), (6, 7)  # tile registers
_HIGH = 0xFFFF0000


def pack_strips(values: np.ndarray) -> np.ndarray:
    """float32 [..., 16 s, 32 k], finite, as blocks: float32 [..., s, 32 k, 16], whose bits are words."""
    *shape, rows, columns = values.shape
    blocks = values.reshape(*shape, rows // LANES, LANES, columns // COLUMNS, 2, LANES).astype(np.float32)
    blocks = np.moveaxis(blocks, -4, -3)  # [..., s, k, 16 rows, 2, 16]
    high = _rounded(blocks)
    words = [part[..., 0, :] >> 16 | part[..., 1, :] for part in (high, _rounded(blocks - high.view(np.float32)))]
    return np.stack(words, axis=-3).view(np.float32).reshape(*shape, rows // LANES, columns, LANES)


def _rounded(x: np.ndarray) -> np.ndarray:
    """The nearest bfloat16, as the bits of a float32."""
    return x.view(np.uint32) + np.uint32(0x8000) & np.uint32(_HIGH)


@intrinsic
def split_row(typingctx: Any, row: Any, n: Any) -> Any:
    """Makes words of n float32 at an address, n a multiple of 32, in place: of each 32, 16 of high parts and 16 of low.

    What is not finite stays so.
    """

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        row = b.inttoptr(args[0], cgutils.voidptr_t)

        def rounded(x: Value) -> Value:
            bits = b.bitcast(x, vector(I32))
            nearest = b.select(b.fcmp_unordered("uno", x, x), bits, b.add(bits, constant(I32, 0x8000)))
            return b.and_(nearest, constant(I32, _HIGH))

        with cgutils.for_range(b, b.udiv(args[1], I64(COLUMNS))) as loop:
            places = [at(b, row, b.add(b.mul(loop.index, I64(4 * COLUMNS)), I64(4 * LANES * i))) for i in range(2)]
            numbers = [load(b, place, vector(F32)) for place in places]
            high = [rounded(x) for x in numbers]
            low = [rounded(b.fsub(x, b.bitcast(h, vector(F32)))) for x, h in zip(numbers, high, strict=True)]
            for part, place in zip((high, low), places, strict=True):
                store(b, b.or_(b.lshr(part[0], like(part[0], 16)), part[1]), place)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def multiply_strips(typingctx: Any, strips: Any, n: Any, panels: Any, columns: Any, to: Any, stride: Any) -> Any:
    """to [16 n, 64] = strips times panels, float32 at addresses; rows of it are `stride` bytes apart.

    strips: n of them, of so many columns, a multiple of 32; panels: four of 16 rows and as many columns, transposed.
    Memory should begin at cache lines.
    """

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        strips, n, panels, columns, to, stride = args
        strips, panels, to = (b.inttoptr(pointer, cgutils.voidptr_t) for pointer in (strips, panels, to))

        def call(name: str, *operands: Value) -> None:
            kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
            b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.x86.{name}"), operands)

        def read(tile: int, pointer: Value) -> None:
            call("tileloadd64", I8(tile), pointer, I64(4 * LANES))

        bytes_of_all = [1] + [0] * 15 + [4 * LANES, 0] * 8 + [0] * 16 + [LANES] * 8 + [0] * 8  # palette, lengths, rows
        shape = cgutils.alloca_once(b, vector(I8, 64))
        b.store(ir.Constant(vector(I8, 64), bytes_of_all), shape)
        call("ldtilecfg", b.bitcast(shape, cgutils.voidptr_t))
        size = b.mul(columns, I64(4 * LANES))  # of a strip, or a panel
        with cgutils.for_range(b, n) as each:
            strip = at(b, strips, b.mul(each.index, size))
            for tile in _SUMS:
                call("tilezero", I8(tile))
            with cgutils.for_range(b, b.udiv(columns, I64(COLUMNS))) as loop:
                offset = b.mul(loop.index, I64(2 * BLOCK))
                high, low = (at(b, at(b, strip, offset), BLOCK * i) for i in range(2))
                rights = [at(b, panels, b.add(b.mul(size, I64(i)), offset)) for i in range(len(_SUMS))]
                read(_LEFT[0], high)
                read(_LEFT[1], low)
                # A sum takes its next product when those of the three others are on their way.
                for left, part in ((_LEFT[0], 0), (_LEFT[1], 0), (_LEFT[0], BLOCK)):
                    for i, tile in enumerate(_SUMS):
                        right = _RIGHT[i % 2]
                        read(right, at(b, rights[i], part))
                        call("tdpbf16ps", I8(tile), I8(left), I8(right))
            place = at(b, to, b.mul(b.mul(each.index, I64(LANES)), stride))
            for i, tile in enumerate(_SUMS):
                call("tilestored64", I8(tile), at(b, place, 4 * LANES * i), stride)
        call("tilerelease")
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i, i, i, i), codegen
