"""The compiled kernels. They trust their callers: `kernels_cpu.ops` checks every shape and index first.

A kernel that takes `crew` shares its tasks out (see `crew`); the others run on the calling thread. What a task computes
never depends on how many threads there are, so results do not either.

Weights come as rows of `matrices`, int64 [n, 10], so that one compiled kernel serves every format: FUNCTION and
FUNCTION_4 (`panel_function` for one and four rows of activations; 0: not there), ADDRESS of the panels, PANEL_BYTES,
BLOCKS in a row, PANELS, QUANTIZED (whether it takes activations as integers, the `codes`), DECODE (`decode_function`,
or `pairs_function` if activations come as `pack_words` makes them), LENGTH of a block, and MULTIPLY (`tile_function`
for such activations; else 0).
"""

from __future__ import annotations

import numpy as np

from .activations import quantize
from .compiled import kernel
from .crew import share, share_long
from .panels import call_panel
from .pointers import add_floats, address, word
from .rows import decode_row
from .softmax import silu_times_floats

FUNCTION, FUNCTION_4, ADDRESS, PANEL_BYTES, BLOCKS, PANELS, QUANTIZED, DECODE, LENGTH, MULTIPLY = range(10)
FIELDS = 10


# -- products of weights with a few rows of activations ----------------------------------------------------------------
# Tasks take addresses, not arrays: counting references to one array from several threads costs more than the work.


@kernel
def _panel(matrix, p, rows, x, x_bytes, codes, codes_bytes, out, out_bytes):  # type: ignore[no-untyped-def]
    """Panel p of the matrix times each row: 16 numbers to out."""
    if word(matrix, QUANTIZED):
        x, x_bytes = codes, codes_bytes
    panel, row = word(matrix, ADDRESS) + p * word(matrix, PANEL_BYTES), 0
    while row < rows:
        four = row + 4 <= rows and word(matrix, FUNCTION_4) != 0
        function = word(matrix, FUNCTION_4) if four else word(matrix, FUNCTION)
        call_panel(function, panel, word(matrix, BLOCKS), x + row * x_bytes, x_bytes, out + row * out_bytes, out_bytes)
        row += 4 if four else 1


@kernel
def _panels(matrices, total, step, rows, x, x_bytes, codes, codes_bytes, out, out_bytes, task):  # type: ignore[no-untyped-def]
    """Some panels of several matrices, one after the other in the columns of out."""
    for p in range(step * task, min(step * (task + 1), total)):
        matrix, rest = matrices, p
        while rest >= word(matrix, PANELS):
            rest -= word(matrix, PANELS)
            matrix += 8 * FIELDS
        _panel(matrix, rest, rows, x, x_bytes, codes, codes_bytes, out + 64 * p, out_bytes)


@kernel
def _panels_added(matrix, step, rows, x, x_bytes, codes, codes_bytes, out, out_bytes, to, to_bytes, task):  # type: ignore[no-untyped-def]
    """Some panels of a matrix; the products are added to `to`."""
    for p in range(step * task, min(step * (task + 1), word(matrix, PANELS))):
        _panel(matrix, p, rows, x, x_bytes, codes, codes_bytes, out + 64 * p, out_bytes)
        for row in range(rows):
            source, target = out + row * out_bytes + 64 * p, to + row * to_bytes + 64 * p
            add_floats(target, source, min(16, to_bytes // 4 - 16 * p))


@kernel
def _gated_panels(gate, step, rows, x, x_bytes, codes, codes_bytes, out, up, out_bytes, task):  # type: ignore[no-untyped-def]
    """Some panels of out = silu(gate) * up; the matrix after `gate` is up's."""
    for p in range(step * task, min(step * (task + 1), word(gate, PANELS))):
        _panel(gate, p, rows, x, x_bytes, codes, codes_bytes, out + 64 * p, out_bytes)
        _panel(gate + 8 * FIELDS, p, rows, x, x_bytes, codes, codes_bytes, up + 64 * p, out_bytes)
        for row in range(rows):
            silu_times_floats(out + row * out_bytes + 64 * p, up + row * out_bytes + 64 * p, 16)


@kernel
def _encode(matrices, x, codes):  # type: ignore[no-untyped-def]
    """The integers of x, if one of the matrices wants it."""
    if matrices[:, QUANTIZED].any():
        for i in range(len(x)):
            quantize(x, i, codes)


@kernel
def _tasks(n, step):  # type: ignore[no-untyped-def]
    return (n + step - 1) // step


@kernel
def _rows_and_addresses(x, codes):  # type: ignore[no-untyped-def]
    return len(x), address(x), 4 * x.shape[1], address(codes), codes.shape[1]


@kernel
def norm_products(crew, x, norm, eps, matrices, step, normed, codes, out):  # type: ignore[no-untyped-def]
    """out [N, 16 panels] = RMSNorm(x) times each matrix, side by side. normed [N, n_in] and codes are scratch."""
    rms_norm(x, 0, len(x), norm, eps, normed)
    _encode(matrices, normed, codes)
    total = matrices[:, PANELS].sum()
    of = (address(matrices), total, step, *_rows_and_addresses(normed, codes), address(out), 4 * out.shape[1])
    share(crew, _tasks(total, step), _panels, of)


@kernel
def add_product(crew, x, matrices, step, codes, out, to):  # type: ignore[no-untyped-def]
    """to [N, n_out] += x [N, n_in] times a matrix. codes and out [N, 16 panels] are scratch."""
    _encode(matrices, x, codes)
    arrays = (address(out), 4 * out.shape[1], address(to), 4 * to.shape[1])
    of = (address(matrices), step, *_rows_and_addresses(x, codes), *arrays)
    share(crew, _tasks(matrices[0, PANELS], step), _panels_added, of)


@kernel
def gated_products(crew, x, norm, eps, matrices, step, normed, codes, up, out):  # type: ignore[no-untyped-def]
    """out [N, 16 panels] = silu(gate) * up of RMSNorm(x), for matrices gate and up. normed, codes, up are scratch."""
    rms_norm(x, 0, len(x), norm, eps, normed)
    _encode(matrices, normed, codes)
    of = (address(matrices), step, *_rows_and_addresses(normed, codes), address(out), address(up), 4 * out.shape[1])
    share(crew, _tasks(matrices[0, PANELS], step), _gated_panels, of)


# -- weights -----------------------------------------------------------------------------------------------------------


@kernel
def _some_interleaved(rows, source_rows, source_bytes, masks, out, task, thread):  # type: ignore[no-untyped-def]
    n_out, blocks, _ = rows.shape
    for block in range(blocks):
        for i in range(len(source_rows)):
            r = 16 * task + source_rows[i]
            out[task, block, i] = rows[r, block, source_bytes[i]] if r < n_out else 0
        for m in range(len(masks)):
            for r in range(16):
                place = masks[m] + 4 * r
                mask = np.uint32(0)
                for byte in range(4):
                    mask |= np.uint32(out[task, block, place + byte]) << np.uint32(8 * byte)
                for c in range(4):  # bits c, c + 4, c + 8 ... become byte c
                    every = (mask >> np.uint32(c)) & np.uint32(0x11111111)
                    every = (every | every >> np.uint32(3)) & np.uint32(0x03030303)
                    every = (every | every >> np.uint32(6)) & np.uint32(0x000F000F)
                    out[task, block, place + c] = np.uint8((every | every >> np.uint32(12)) & np.uint32(0xFF))


@kernel
def interleave(crew, rows, source_rows, source_bytes, masks, out):  # type: ignore[no-untyped-def]
    """Blocks of a weight [n_out, blocks, block bytes] as panels [panels, blocks, 16 block bytes], see panels.layout.

    Rows that fill up the last panel are 0.
    """
    share_long(crew, len(out), _some_interleaved, (rows, source_rows, source_bytes, masks, out))


@kernel
def gather_rows(w, tokens, out):  # type: ignore[no-untyped-def]
    """out [N, n_in] = rows `tokens` of w as float32."""
    for i in range(len(tokens)):
        decode_row(w, tokens[i], out, i)


# -- rows of activations -----------------------------------------------------------------------------------------------


@kernel
def rms_norm(x, begin, end, weight, eps, out):  # type: ignore[no-untyped-def]
    """Rows begin ... end - 1 of out [N, n] = x / sqrt(mean(x^2) + eps) * weight."""
    n = x.shape[1]
    for i in range(begin, end):
        total = np.float32(0.0)
        for j in range(n):
            total += x[i, j] * x[i, j]
        scale = np.float32(1.0) / np.sqrt(total / np.float32(n) + eps)
        for j in range(n):
            out[i, j] = x[i, j] * scale * weight[j]


@kernel
def finish_heads(x, begin, heads, d, bias, norm, eps, cos, sin, stride, partner):  # type: ignore[no-untyped-def]
    """Columns begin ... begin + heads * d - 1 of x [N, n]: adds the bias, norms each head, turns it."""
    for n in range(len(x)):
        for j in range(len(bias)):
            x[n, begin + j] += bias[j]
        for first in range(begin, begin + heads * d, d):
            if len(norm):
                total = np.float32(0.0)
                for j in range(first, first + d):
                    total += x[n, j] * x[n, j]
                scale = np.float32(1.0) / np.sqrt(total / np.float32(d) + eps)
                for j in range(d):
                    x[n, first + j] *= scale * norm[j]
            for i in range(cos.shape[1]):
                at = first + i * stride
                a, b = x[n, at], x[n, at + partner]
                x[n, at] = a * cos[n, i] - b * sin[n, i]
                x[n, at + partner] = a * sin[n, i] + b * cos[n, i]


@kernel
def turned(x, out, cos, sin, stride, partner):  # type: ignore[no-untyped-def]
    """out = heads x [N, H, d], turned as in `finish_qkv`."""
    n, heads, d = x.shape
    rows, nothing = out.reshape(n, heads * d), cos[0, :0]
    for i in range(n):
        for h in range(heads):
            for j in range(d):
                out[i, h, j] = x[i, h, j]
    finish_heads(rows, 0, heads, d, nothing, nothing, np.float32(0.0), cos, sin, stride, partner)


@kernel
def copy_columns(x, begin, out):  # type: ignore[no-untyped-def]
    """out [N, H, d] = columns of x [N, ...] from `begin` on."""
    n, heads, d = out.shape
    for i in range(n):
        for h in range(heads):
            for j in range(d):
                out[i, h, j] = x[i, begin + h * d + j]


@kernel
def side_by_side(x, y, out):  # type: ignore[no-untyped-def]
    """out [N, 2 H, d] = heads x and y [N, H, d], one after the other."""
    n, heads, d = x.shape
    for i in range(n):
        for h in range(heads):
            for j in range(d):
                out[i, h, j], out[i, heads + h, j] = x[i, h, j], y[i, h, j]


@kernel
def finish_qkv(  # type: ignore[no-untyped-def]
    x, q_begin, k_begin, v_begin, n_head, n_head_kv, d, bq, bk, bv, q_norm, k_norm, eps, cos, sin, stride, partner
):
    """What comes after the projections, in place: biases, norms of heads (either may have length 0), rotation.

    Queries, keys and values are columns of x [N, ...] from their begin on. Components i * stride and
    i * stride + partner of a head turn by cos, sin [N, pairs].
    """
    none = cos[:, :0]
    finish_heads(x, q_begin, n_head, d, bq, q_norm, eps, cos, sin, stride, partner)
    finish_heads(x, k_begin, n_head_kv, d, bk, k_norm, eps, cos, sin, stride, partner)
    finish_heads(x, v_begin, n_head_kv, d, bv, q_norm[:0], eps, none, none, stride, partner)
