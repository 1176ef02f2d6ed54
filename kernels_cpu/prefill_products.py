"""Products of weights with many rows of activations, a prompt's: weights are decoded to float32, a few panels at once.

Kernels as in `kernels`, for matrices described as there; a task computes some columns of the result for all rows.
"""

from __future__ import annotations

import numpy as np

from .compiled import kernel
from .crew import share_long
from .gemm import FEW, ROWS, RUN, VECTORS, WIDTH, multiply_task, pack_rows, tile_counts
from .kernels import ADDRESS, BLOCKS, DECODE, FIELDS, LENGTH, PANEL_BYTES, PANELS, rms_norm
from .panels import call_decode
from .pointers import address, word
from .softmax import silu_times_floats

TILES = 4  # packed in one task


@kernel
def _aligned(n):  # type: ignore[no-untyped-def]
    """n float32 that begin at a cache line."""
    room = np.empty(n + 16, np.float32)
    skip = -(address(room) // 4) % 16
    return room[skip : skip + n]


@kernel
def _decode(matrix, first, k, m, weights):  # type: ignore[no-untyped-def]
    """Columns k ... k + m - 1 of the matrix for panels from `first` on: weights [groups, m, WIDTH]."""
    offset = k // word(matrix, LENGTH) * (word(matrix, PANEL_BYTES) // word(matrix, BLOCKS))
    for p in range(len(weights) * VECTORS):
        to = address(weights) + 4 * (p // VECTORS * m * WIDTH + p % VECTORS * 16)
        if first + p < word(matrix, PANELS):
            panel = word(matrix, ADDRESS) + (first + p) * word(matrix, PANEL_BYTES)
            call_decode(word(matrix, DECODE), panel + offset, m // word(matrix, LENGTH), to, 4 * WIDTH)
        else:
            for row in range(m):
                for j in range(16):
                    weights[p // VECTORS, row, p % VECTORS * 16 + j] = 0.0


@kernel
def _product(matrix, first, packed, n, n_in, out, column, width, add):  # type: ignore[no-untyped-def]
    """out[:, column : column + width] = x times the panels from `first` on, or += if add."""
    groups, (tall, few) = (width + WIDTH - 1) // WIDTH, tile_counts(n)
    room, scratch = _aligned(groups * RUN * WIDTH), _aligned((tall * ROWS + few * FEW) * groups * WIDTH)
    for k in range(0, n_in, RUN):
        m = min(RUN, n_in - k)
        weights = room[: groups * m * WIDTH].reshape(groups, m, WIDTH)
        _decode(matrix, first, k, m, weights)
        multiply_task(packed, n, k, weights, scratch, out, column, width, add or k > 0)


@kernel
def _some_tiles(x, norm, eps, normed, packed, task):  # type: ignore[no-untyped-def]
    tall, few = tile_counts(len(x))
    begin, end = TILES * task, min(TILES * (task + 1), tall + few)
    if len(norm):
        first, stop = _rows_before(begin, tall), min(_rows_before(end, tall), len(x))
        rms_norm(x, first, stop, norm, eps, normed)
        pack_rows(normed, begin, end, packed)
    else:
        pack_rows(x, begin, end, packed)


@kernel
def _rows_before(tile, tall):  # type: ignore[no-untyped-def]
    return min(tile, tall) * ROWS + max(tile - tall, 0) * FEW


@kernel
def _pack(crew, x, norm, eps, normed, packed):  # type: ignore[no-untyped-def]
    """Packs x, or RMSNorm(x) if norm is not empty."""
    tall, few = tile_counts(len(x))
    share_long(crew, (tall + few + TILES - 1) // TILES, _some_tiles, (x, norm, eps, normed, packed))


@kernel
def _some_columns(matrices, step, packed, n, n_in, out, task):  # type: ignore[no-untyped-def]
    i, first = 0, step * task
    while first >= -(-matrices[i, PANELS] // step) * step:
        first -= -(-matrices[i, PANELS] // step) * step
        i += 1
    column = 16 * (matrices[:i, PANELS].sum() + first)
    width = 16 * min(step, matrices[i, PANELS] - first)
    _product(address(matrices) + 8 * FIELDS * i, first, packed, n, n_in, out, column, width, False)


@kernel
def many_norm_products(crew, x, norm, eps, matrices, step, normed, packed, out):  # type: ignore[no-untyped-def]
    """out [N, 16 panels] = RMSNorm(x) times each matrix, side by side. normed [N, n_in] and packed are scratch."""
    _pack(crew, x, norm, eps, normed, packed)
    tasks = 0
    for i in range(len(matrices)):
        tasks += (matrices[i, PANELS] + step - 1) // step
    share_long(crew, tasks, _some_columns, (matrices, step, packed, len(x), x.shape[1], out))


@kernel
def _some_columns_added(matrices, step, packed, n, n_in, to, task):  # type: ignore[no-untyped-def]
    column = 16 * step * task
    width = min(16 * step, to.shape[1] - column)
    _product(address(matrices), step * task, packed, n, n_in, to, column, width, True)


@kernel
def many_add_product(crew, x, matrices, step, packed, to):  # type: ignore[no-untyped-def]
    """to [N, n_out] += x [N, n_in] times a matrix. packed is scratch."""
    nothing = np.empty(0, np.float32)
    _pack(crew, x, nothing, np.float32(0.0), x, packed)
    tasks = (matrices[0, PANELS] + step - 1) // step
    share_long(crew, tasks, _some_columns_added, (matrices, step, packed, len(x), x.shape[1], to))


@kernel
def _some_columns_gated(matrices, step, packed, n, n_in, out, task):  # type: ignore[no-untyped-def]
    column = 16 * step * task
    width = min(16 * step, out.shape[1] - column)
    up = np.empty((n, width), np.float32)
    _product(address(matrices), step * task, packed, n, n_in, out, column, width, False)
    _product(address(matrices) + 8 * FIELDS, step * task, packed, n, n_in, up, 0, width, False)
    for i in range(n):
        gate = address(out) + 4 * (i * out.shape[1] + column)
        silu_times_floats(gate, address(up) + 4 * i * width, width)


@kernel
def many_gated_products(crew, x, norm, eps, matrices, step, normed, packed, out):  # type: ignore[no-untyped-def]
    """out [N, n_ff] = silu(gate) * up of RMSNorm(x), for matrices gate and up. normed and packed are scratch."""
    _pack(crew, x, norm, eps, normed, packed)
    tasks = (matrices[0, PANELS] + step - 1) // step
    share_long(crew, tasks, _some_columns_gated, (matrices, step, packed, len(x), x.shape[1], out))
