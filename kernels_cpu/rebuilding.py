"""Keys and values rebuilt from latents, a tile of TILE tokens and one group of KV heads at a time (Palu, arXiv
2407.21118, section 3.2): a product of matrices at the speed of `gemm`, once for all query heads.

A rebuilt tile is transposed, [components of the group's heads, TILE]: lanes are tokens. So norms and scores need no
sums over lanes, and pairs turn alike whether their components are neighbours or half a head apart.

The factor of a group [heads d, r] is packed as strips of HEIGHT rows, [strips, r, HEIGHT], filled up with zeros;
latents come as panels of PANEL tokens, [panels, r, PANEL]; r is filled up to blocks of 32. Where there are tile
registers, both are not float32 but words (`tile_registers`). Cosines and sines of positions lie in a table [positions,
2 pairs and padding], one for all layers, and a tile has those of its tokens as [2 pairs, TILE].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiled import kernel
from .crew import share_long
from .gemm import ROWS, VECTORS, WIDTH, multiply_tile, transpose_rows, variable
from .ir_vectors import F32, I64, LANES, Value, at, constant, load, multiply_add, splat, store, vector
from .latent_rows import BITS, BLOCKS, POSITION, UNIT, decode_latent, int_at, row_address
from .pointers import address, copy_floats
from .tile_registers import HAS_TILES, multiply_strips, pack_strips, split_row
from .tiles import square_root
from .unowned import unowned

TILE = 64  # tokens: whole panels
ADDRESS, COLUMNS = range(2)
HEIGHT, PANEL = (LANES, LANES) if HAS_TILES else (ROWS, WIDTH)

_ROWS, _VECTORS, _LANES = (0,) * ROWS, (0,) * VECTORS, (0,) * LANES


class Packed(NamedTuple):
    """A layer's factor of keys or values, and what comes after the product. Kernels are called with it as a plain
    tuple, whose types Numba tells much quicker."""

    values: np.ndarray  # float32 [groups, strips, rank, HEIGHT]
    bias: np.ndarray  # [H_kv d], or empty
    norm: np.ndarray  # [d], or empty
    table: np.ndarray  # of cosines and sines, int64: where it lies (ADDRESS), and numbers of a row (COLUMNS)
    heads: int  # of a group
    d: int
    eps: np.float32
    pairs: int  # components i * stride and i * stride + partner of a head turn together, i < pairs; of values none do
    stride: int
    partner: int


def pack(values: np.ndarray, groups: int) -> np.ndarray:
    """A factor [H_kv d, r] as float32 [groups, strips, r filled up, HEIGHT]."""
    rows, rank = len(values) // groups, values.shape[1]
    whole = np.zeros((groups, -(-rows // HEIGHT) * HEIGHT, -(-rank // UNIT) * UNIT), np.float32)
    whole[:, :rows, :rank] = values.reshape(groups, rows, rank)
    if HAS_TILES:
        return pack_strips(whole)
    return np.ascontiguousarray(whole.reshape(groups, -1, HEIGHT, whole.shape[2]).swapaxes(2, 3))


def rebuild_scratch(factor: Packed) -> int:
    """Numbers that rebuild_tile needs."""
    (_, strips, rank, _), turns = factor.values.shape, int(factor.table[COLUMNS])
    return (rank + strips * HEIGHT + turns) * TILE + LANES * max(rank, turns)


@intrinsic
def _finish_head(
    typingctx: Any, keys: Any, d: Any, bias: Any, norm: Any, eps: Any, turns: Any, pairs: Any, stride: Any, partner: Any
) -> Any:
    """Bias, norm and rotation of one head [d, TILE] at an address, in place. bias and norm: addresses, or 0; turns: of
    the cosines and sines [2 pairs, TILE]. Components i * stride and i * stride + partner turn together."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        keys, d, bias, norm, eps, turns, pairs, stride, partner = args
        keys_at, bias_at, norm_at, turns_at = (b.inttoptr(a, cgutils.voidptr_t) for a in (keys, bias, norm, turns))

        def line(pointer: Value, j: Value) -> list[Value]:
            row = at(b, pointer, b.mul(j, I64(4 * TILE)))
            return [at(b, row, 4 * LANES * i) for i in range(TILE // LANES)]

        def number(pointer: Value, j: Value) -> Value:
            return splat(b, load(b, at(b, pointer, b.mul(j, I64(4))), F32))

        with b.if_then(b.icmp_signed("!=", bias, I64(0))), cgutils.for_range(b, d) as each:
            more = number(bias_at, each.index)
            for place in line(keys_at, each.index):
                store(b, b.fadd(load(b, place, vector(F32)), more), place)
        with b.if_then(b.icmp_signed("!=", norm, I64(0))):
            totals = [variable(b, constant(F32, 0.0)) for _ in range(TILE // LANES)]
            with cgutils.for_range(b, d) as each:
                for place, total in zip(line(keys_at, each.index), totals, strict=True):
                    value = load(b, place, vector(F32))
                    b.store(multiply_add(b, value, value, b.load(total)), total)
            means = [b.fdiv(b.load(total), splat(b, b.sitofp(d, F32))) for total in totals]
            scales = [b.fdiv(constant(F32, 1.0), square_root(b, b.fadd(mean, splat(b, eps)))) for mean in means]
            with cgutils.for_range(b, d) as each:
                weight = number(norm_at, each.index)
                for place, scale in zip(line(keys_at, each.index), scales, strict=True):
                    store(b, b.fmul(load(b, place, vector(F32)), b.fmul(scale, weight)), place)
        with cgutils.for_range(b, pairs) as each:
            first = b.mul(each.index, stride)
            both = line(keys_at, first), line(keys_at, b.add(first, partner))
            turned = line(turns_at, each.index), line(turns_at, b.add(each.index, pairs))
            for places in zip(*both, *turned, strict=True):
                x, y, cos, sin = (load(b, place, vector(F32)) for place in places)
                store(b, b.fsub(b.fmul(x, cos), b.fmul(y, sin)), places[0])
                store(b, multiply_add(b, x, sin, b.fmul(y, cos)), places[1])
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i, i, types.float32, i, i, i, i), codegen


@kernel
def _latent_panels(cache, seq, group, first, width, panels, rows):  # type: ignore[no-untyped-def]
    """Latents of `width` slots from `first` on as panels; the last one is repeated up to whole panels."""
    bits, blocks = cache[BITS], cache[BLOCKS]
    rank = UNIT * blocks
    room = rows[: LANES * rank].reshape(LANES, rank)
    for i in range(0, (width + PANEL - 1) // PANEL * PANEL, LANES):
        count = max(1, min(LANES, width - i))
        for r in range(count):
            row = address(room[r])
            decode_latent(row_address(cache, seq, group, first + min(i + r, width - 1)), bits, blocks, row)
            if HAS_TILES:
                split_row(row, rank)
        transpose_rows(room, 0, count - 1, 0, rank, panels, i // PANEL * PANEL * rank + i % PANEL, PANEL, _LANES)


@kernel
def _turns_of_tokens(cache, seq, group, first, width, table, turns, rows):  # type: ignore[no-untyped-def]
    """Cosines and sines of the tokens in `width` slots from `first` on, [2 pairs and padding, TILE]."""
    columns = table[COLUMNS]
    room = rows[: LANES * columns].reshape(LANES, columns)
    for i in range(0, width, LANES):
        count = min(LANES, width - i)
        for r in range(count):
            position = int_at(row_address(cache, seq, group, first + i + r) + cache[POSITION])
            copy_floats(address(room[r]), table[ADDRESS] + 4 * columns * position, columns)
        transpose_rows(room, 0, count - 1, 0, columns, turns, i, TILE, _LANES)


@kernel
def multiply_panels(values, group, panels, width, keys):  # type: ignore[no-untyped-def]
    """keys [rows of the group and padding, TILE], 1-D = a group's part of a packed factor times panels of latents."""
    _, strips, rank, height = values.shape
    begin = group * strips * rank * height
    if HAS_TILES:
        multiply_strips(address(values) + 4 * begin, strips, address(panels), rank, address(keys), 4 * TILE)
        return
    flat = values.reshape(values.size)
    for p in range(0, width, WIDTH):
        for s in range(strips):
            a, to = begin + s * rank * ROWS, s * ROWS * TILE + p
            multiply_tile(flat, a, ROWS, panels, p * rank, WIDTH, rank, keys, to, TILE, False, _ROWS, _VECTORS)


@kernel
def rebuild_tile(cache, seq, group, first, width, factor, scratch):  # type: ignore[no-untyped-def]
    """(keys, turns) of `width` slots from `first` on, parts of scratch: keys or values of a group's heads, [heads d and
    padding, TILE], 1-D, each of which finish_head makes what it should be, with the turns.

    factor: Packed. scratch: rebuild_scratch(...) numbers, at a cache line.
    """
    (_, strips, rank, _), columns = factor.values.shape, factor.table[COLUMNS]
    panels, used = scratch[: rank * TILE], rank * TILE
    keys = scratch[used : used + strips * HEIGHT * TILE]
    used += strips * HEIGHT * TILE
    turns = scratch[used : used + columns * TILE]
    rows = scratch[used + columns * TILE :]
    _latent_panels(cache, seq, group, first, width, panels, rows)
    multiply_panels(factor.values, group, panels, width, keys)
    if factor.pairs > 0:
        _turns_of_tokens(cache, seq, group, first, width, factor.table, turns, rows)
    return keys, turns


@kernel
def finish_head(factor, group, h, keys, turns):  # type: ignore[no-untyped-def]
    """Adds the bias of head h of a group to what rebuild_tile gives, norms and turns it; returns its address."""
    d, pairs = factor.d, factor.pairs
    head = address(keys) + 4 * TILE * d * h
    bias = address(factor.bias) + 4 * (group * factor.heads + h) * d if len(factor.bias) > 0 else 0
    norm = address(factor.norm) if len(factor.norm) > 0 else 0
    _finish_head(head, d, bias, norm, factor.eps, address(turns), pairs, factor.stride, factor.partner)
    return head


@kernel
def shared(factor):  # type: ignore[no-untyped-def]
    """A tuple as what it stands for, for tasks: see unowned."""
    values, bias, norm, table, heads, d, eps, pairs, stride, partner = factor
    arrays = (unowned(values), unowned(bias), unowned(norm), unowned(table))
    return Packed(*arrays, heads, d, eps, pairs, stride, partner)


@kernel
def _some_rows(cache, seq, n, factor, scratch, out, task, thread):  # type: ignore[no-untyped-def]
    groups, (_, between, wide), d = len(factor.values), out.shape, factor.d
    group, first = task % groups, task // groups * TILE
    width, own = min(TILE, n - first), scratch[thread]
    keys, turns = rebuild_tile(cache, seq, group, first, width, factor, own)
    lines, rows = keys.reshape(keys.size // TILE, TILE), out.reshape(out.size)
    for h in range(factor.heads):
        finish_head(factor, group, h, keys, turns)
        for j in range(0, d, LANES):
            to = ((group * factor.heads + h) * between + first) * wide + j
            tokens = (width + LANES - 1) // LANES * LANES
            transpose_rows(lines, h * d + j, len(lines) - 1, 0, tokens, rows, to, wide, _LANES)


@kernel
def rebuild_rows(crew, cache, seq, n, factor, scratch, out):  # type: ignore[no-untyped-def]
    """out [H_kv, n in whole vectors, d in whole vectors] = keys or values of the first n slots; see rebuild_tile.

    What fills rows and heads up has no meaning. scratch: a row of rebuild_scratch(...) numbers for each thread.
    """
    packed = shared(factor)
    of = (unowned(cache), seq, n, packed, unowned(scratch), unowned(out))
    share_long(crew, (n + TILE - 1) // TILE * len(packed.values), _some_rows, of)
