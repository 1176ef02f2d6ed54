"""Products of weights with many rows of activations, a prompt's: weights are decoded, a few panels at once.

They become 16-bit integers if all matrices that share the activations have blocks and the CPU is made for it (see
`integer_products`), else float32 (see `gemm`).

Kernels as in `kernels`, for matrices described as there; a task computes some columns of the result for all rows. Their
scratch: packed, of gemm.packed_size; for each thread a row of room, of room_size, and of ups, N * 16 * step numbers.
"""

from __future__ import annotations

import numpy as np

from .compiled import kernel
from .crew import share_long
from .gemm import FEW, ROWS, RUN, VECTORS, WIDTH, multiply_run, pack_rows, tile_counts
from .integer_products import HAS_WORDS, multiply_words, pack_words
from .ir_vectors import LANES
from .kernels import ADDRESS, BLOCKS, DECODE, FIELDS, LENGTH, MULTIPLY, PANEL_BYTES, PANELS, rms_norm
from .panels import call_decode
from .pointers import address, word
from .softmax import silu_times_floats

TILES = 4  # packed in one task


def room_size(panels: int) -> int:
    """Numbers a thread needs beside the arguments, for that many panels of 16 rows in a task, to begin at a line."""
    return -(-panels // VECTORS) * WIDTH * RUN + ROWS * WIDTH + LANES


@kernel
def _decode(matrix, first, panels, k, m, weights):  # type: ignore[no-untyped-def]
    """Columns k ... k + m - 1 of some panels: weights, 1-D, is [panels / VECTORS, m, WIDTH].

    Integers and their scales take fewer than m rows.
    """
    offset = k // word(matrix, LENGTH) * (word(matrix, PANEL_BYTES) // word(matrix, BLOCKS))
    for p in range(panels):
        to = p // VECTORS * m * WIDTH + p % VECTORS * LANES
        if first + p < word(matrix, PANELS):
            panel = word(matrix, ADDRESS) + (first + p) * word(matrix, PANEL_BYTES) + offset
            call_decode(word(matrix, DECODE), panel, m // word(matrix, LENGTH), address(weights) + 4 * to, 4 * WIDTH)
        else:
            for row in range(m):
                for j in range(LANES):
                    weights[to + row * WIDTH + j] = 0.0


@kernel
def _product(matrix, first, packed, n, n_in, out, column, width, add, room):  # type: ignore[no-untyped-def]
    """out[:, column : column + width] = x times the panels from `first` on, or += if add. room: see room_size."""
    skip = -(address(room) // 4) % LANES
    tile, weights = room[skip : skip + ROWS * WIDTH], room[skip + ROWS * WIDTH :]
    panels = (width + WIDTH - 1) // WIDTH * VECTORS
    for k in range(0, n_in, RUN):
        m = min(RUN, n_in - k)
        _decode(matrix, first, panels, k, m, weights)
        function = word(matrix, MULTIPLY)
        if HAS_WORDS and function:
            multiply_words(packed, n, k, function, weights, m, tile, out, column, width, add or k > 0)
        else:
            multiply_run(packed, n, k, weights, m, tile, out, column, width, add or k > 0)


@kernel
def _some_tiles(x, norm, eps, normed, words, packed, task, thread):  # type: ignore[no-untyped-def]
    tall, few = tile_counts(len(x))
    begin, end = TILES * task, min(TILES * (task + 1), tall + few)
    if len(norm):
        first, stop = _rows_before(begin, tall), min(_rows_before(end, tall), len(x))
        rms_norm(x, first, stop, norm, eps, normed)
    else:
        normed = x
    if HAS_WORDS and words:
        pack_words(normed, begin, end, packed)
    else:
        pack_rows(normed, begin, end, packed)


@kernel
def _rows_before(tile, tall):  # type: ignore[no-untyped-def]
    return min(tile, tall) * ROWS + max(tile - tall, 0) * FEW


@kernel
def _pack(crew, x, norm, eps, normed, matrices, packed):  # type: ignore[no-untyped-def]
    """Packs x, or RMSNorm(x) if norm is not empty, for these matrices."""
    tall, few = tile_counts(len(x))
    words = matrices[0, MULTIPLY] != 0
    share_long(crew, (tall + few + TILES - 1) // TILES, _some_tiles, (x, norm, eps, normed, words, packed))


@kernel
def _some_columns(matrices, step, packed, n, n_in, out, room, task, thread):  # type: ignore[no-untyped-def]
    i, first = 0, step * task
    while first >= -(-matrices[i, PANELS] // step) * step:
        first -= -(-matrices[i, PANELS] // step) * step
        i += 1
    column = 16 * (matrices[:i, PANELS].sum() + first)
    width = 16 * min(step, matrices[i, PANELS] - first)
    _product(address(matrices) + 8 * FIELDS * i, first, packed, n, n_in, out, column, width, False, room[thread])


@kernel
def many_norm_products(  # type: ignore[no-untyped-def]
    crew, x, norm, eps, matrices, step, normed, packed, room, out
):
    """out [N, 16 panels] = RMSNorm(x) times each matrix, side by side; normed is [N, n_in]."""
    _pack(crew, x, norm, eps, normed, matrices, packed)
    tasks = 0
    for i in range(len(matrices)):
        tasks += (matrices[i, PANELS] + step - 1) // step
    share_long(crew, tasks, _some_columns, (matrices, step, packed, len(x), x.shape[1], out, room))


@kernel
def _some_columns_added(matrices, step, packed, n, n_in, to, room, task, thread):  # type: ignore[no-untyped-def]
    column = 16 * step * task
    width = min(16 * step, to.shape[1] - column)
    _product(address(matrices), step * task, packed, n, n_in, to, column, width, True, room[thread])


@kernel
def many_add_product(crew, x, matrices, step, packed, room, to):  # type: ignore[no-untyped-def]
    """to [N, n_out] += x [N, n_in] times a matrix."""
    nothing = np.empty(0, np.float32)
    _pack(crew, x, nothing, np.float32(0.0), x, matrices, packed)
    tasks = (matrices[0, PANELS] + step - 1) // step
    share_long(crew, tasks, _some_columns_added, (matrices, step, packed, len(x), x.shape[1], to, room))


@kernel
def _some_columns_gated(matrices, step, packed, n, n_in, out, room, ups, task, thread):  # type: ignore[no-untyped-def]
    column = 16 * step * task
    width = min(16 * step, out.shape[1] - column)
    up = ups[thread, : n * width].reshape(n, width)
    _product(address(matrices), step * task, packed, n, n_in, out, column, width, False, room[thread])
    _product(address(matrices) + 8 * FIELDS, step * task, packed, n, n_in, up, 0, width, False, room[thread])
    for i in range(n):
        gate = address(out) + 4 * (i * out.shape[1] + column)
        silu_times_floats(gate, address(up) + 4 * i * width, width)


@kernel
def many_gated_products(  # type: ignore[no-untyped-def]
    crew, x, norm, eps, matrices, step, normed, packed, room, ups, out
):
    """out [N, n_ff] = silu(gate) * up of RMSNorm(x), for matrices gate and up; normed is [N, n_in]."""
    _pack(crew, x, norm, eps, normed, matrices, packed)
    tasks = (matrices[0, PANELS] + step - 1) // step
    share_long(crew, tasks, _some_columns_gated, (matrices, step, packed, len(x), x.shape[1], out, room, ups))
