"""The compiled kernels. They trust their callers: `kernels_cpu.ops` checks every shape and index first.

A kernel that takes `crew` shares its tasks out (see `crew`); the others run on the calling thread. What a task computes
never depends on how many threads there are, so results do not either.

Weights come as rows of `matrices`, int64 [n, 8], so that one compiled kernel serves every format: FUNCTION and
FUNCTION_4 (`panel_function` for one and four rows of activations; 0: not there), ADDRESS of the panels, PANEL_BYTES,
BLOCKS in a row, PANELS, QUANTIZED (whether it takes activations in 14 bits, the `codes`) and N_OUT.
"""

from __future__ import annotations

import numpy as np

from .activations import quantize
from .compiled import kernel
from .crew import share
from .panels import call_panel, decode_panel
from .rows import decode_row, encode_row
from .softmax import exp, exp_row, row_maximum
from .tiles import add_rows, score_rows

FUNCTION, FUNCTION_4, ADDRESS, PANEL_BYTES, BLOCKS, PANELS, QUANTIZED, N_OUT = range(8)

TILE = 64  # cached rows scored before their values are added; whole vectors, because score_rows rounds up to them


# -- products of weights with a few rows of activations ----------------------------------------------------------------


@kernel
def _panel(matrices, i, p, x, codes, out, column):  # type: ignore[no-untyped-def]
    """out[:, column : column + 16] = panel p of matrix i times every row of x."""
    rows = len(x)
    if matrices[i, QUANTIZED]:
        source, stride = np.int64(codes.ctypes.data), np.int64(codes.shape[1])
    else:
        source, stride = np.int64(x.ctypes.data), np.int64(4 * x.shape[1])
    panel = matrices[i, ADDRESS] + p * matrices[i, PANEL_BYTES]
    target, width = np.int64(out.ctypes.data) + 4 * column, np.int64(4 * out.shape[1])
    row = 0
    while row < rows:
        four = row + 4 <= rows and matrices[i, FUNCTION_4] != 0
        function = matrices[i, FUNCTION_4] if four else matrices[i, FUNCTION]
        call_panel(function, panel, matrices[i, BLOCKS], source + row * stride, stride, target + row * width, width)
        row += 4 if four else 1


@kernel
def _panels(matrices, step, x, codes, out, task):  # type: ignore[no-untyped-def]
    """Some panels of several matrices, one after the other in the columns of out."""
    total = matrices[:, PANELS].sum()
    for p in range(step * task, min(step * (task + 1), total)):
        i, rest = 0, p
        while rest >= matrices[i, PANELS]:
            rest -= matrices[i, PANELS]
            i += 1
        _panel(matrices, i, rest, x, codes, out, 16 * p)


@kernel
def _panels_added(matrices, step, x, codes, out, to, task):  # type: ignore[no-untyped-def]
    """Some panels of a matrix; the products are added to `to` [N, n_out]."""
    for p in range(step * task, min(step * (task + 1), matrices[0, PANELS])):
        _panel(matrices, 0, p, x, codes, out, 16 * p)
        for i in range(len(x)):
            for j in range(16 * p, min(16 * p + 16, to.shape[1])):
                to[i, j] += out[i, j]


@kernel
def _gated_panels(matrices, step, x, codes, out, up, task):  # type: ignore[no-untyped-def]
    """Some panels of out = silu(gate) * up."""
    for p in range(step * task, min(step * (task + 1), matrices[0, PANELS])):
        _panel(matrices, 0, p, x, codes, out, 16 * p)
        _panel(matrices, 1, p, x, codes, up, 16 * p)
        for i in range(len(x)):
            for j in range(16 * p, 16 * p + 16):
                g = out[i, j]
                out[i, j] = g / (np.float32(1.0) + exp(-g)) * up[i, j]


@kernel
def _encode(matrices, x, codes):  # type: ignore[no-untyped-def]
    """The 14-bit form of x, if one of the matrices wants it."""
    if matrices[:, QUANTIZED].any():
        for i in range(len(x)):
            quantize(x, i, codes)


@kernel
def _tasks(n, step):  # type: ignore[no-untyped-def]
    return (n + step - 1) // step


@kernel
def norm_products(crew, x, norm, eps, matrices, step, normed, codes, out):  # type: ignore[no-untyped-def]
    """out [N, 16 panels] = RMSNorm(x) times each matrix, side by side. normed [N, n_in] and codes are scratch."""
    rms_norm(x, norm, eps, normed)
    _encode(matrices, normed, codes)
    share(crew, _tasks(matrices[:, PANELS].sum(), step), _panels, (matrices, step, normed, codes, out))


@kernel
def add_product(crew, x, matrices, step, codes, out, to):  # type: ignore[no-untyped-def]
    """to [N, n_out] += x [N, n_in] times a matrix. codes and out [N, 16 panels] are scratch."""
    _encode(matrices, x, codes)
    share(crew, _tasks(matrices[0, PANELS], step), _panels_added, (matrices, step, x, codes, out, to))


@kernel
def gated_products(crew, x, norm, eps, matrices, step, normed, codes, up, out):  # type: ignore[no-untyped-def]
    """out [N, 16 panels] = silu(gate) * up of RMSNorm(x), for matrices gate and up. normed, codes, up are scratch."""
    rms_norm(x, norm, eps, normed)
    _encode(matrices, normed, codes)
    share(crew, _tasks(matrices[0, PANELS], step), _gated_panels, (matrices, step, normed, codes, out, up))


# -- weights -----------------------------------------------------------------------------------------------------------


@kernel
def _some_interleaved(rows, source_rows, source_bytes, masks, out, task):  # type: ignore[no-untyped-def]
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
    share(crew, len(out), _some_interleaved, (rows, source_rows, source_bytes, masks, out))


@kernel
def decode_panels(w, out):  # type: ignore[no-untyped-def]
    """out [n_in, 16 panels] = w.T as float32."""
    for p in range(len(w)):
        decode_panel(w, p, 0, w.shape[1], out, p)


@kernel
def decode_rows(w, out):  # type: ignore[no-untyped-def]
    """out [rows, n_in] = w as float32."""
    for r in range(len(w)):
        decode_row(w, r, out, r)


@kernel
def gather_rows(w, tokens, out):  # type: ignore[no-untyped-def]
    """out [N, n_in] = rows `tokens` of w as float32."""
    for i in range(len(tokens)):
        decode_row(w, tokens[i], out, i)


# -- rows of activations -----------------------------------------------------------------------------------------------


@kernel
def rms_norm(x, weight, eps, out):  # type: ignore[no-untyped-def]
    """out [N, n] = x / sqrt(mean(x^2) + eps) * weight."""
    rows, n = x.shape
    for i in range(rows):
        total = np.float32(0.0)
        for j in range(n):
            total += x[i, j] * x[i, j]
        scale = np.float32(1.0) / np.sqrt(total / np.float32(n) + eps)
        for j in range(n):
            out[i, j] = x[i, j] * scale * weight[j]


@kernel
def silu_times(gate, up):  # type: ignore[no-untyped-def]
    """gate [N, n_ff] = silu(gate) * up, in place."""
    rows, n = gate.shape
    for i in range(rows):
        for j in range(n):
            g = gate[i, j]
            gate[i, j] = g / (np.float32(1.0) + exp(-g)) * up[i, j]


@kernel
def _finish_heads(x, begin, heads, d, bias, norm, eps, cos, sin, stride, partner):  # type: ignore[no-untyped-def]
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
def finish_qkv(  # type: ignore[no-untyped-def]
    q, k, v, q_begin, k_begin, v_begin, n_head, n_head_kv, d, bq, bk, bv, q_norm, k_norm, eps, cos, sin, stride, partner
):
    """What comes after the projections, in place: biases, norms of heads (either may have length 0), rotation.

    The product of each lies in q, k, v [N, ...] from its column on. Components i * stride and i * stride + partner of a
    head turn by cos, sin [N, pairs].
    """
    none = cos[:, :0]
    _finish_heads(q, q_begin, n_head, d, bq, q_norm, eps, cos, sin, stride, partner)
    _finish_heads(k, k_begin, n_head_kv, d, bk, k_norm, eps, cos, sin, stride, partner)
    _finish_heads(v, v_begin, n_head_kv, d, bv, q_norm[:0], eps, none, none, stride, partner)


# -- attention ---------------------------------------------------------------------------------------------------------


@kernel
def append(k_cache, v_cache, seq, slot, k, v):  # type: ignore[no-untyped-def]
    """Writes row i of k and v [N, H_kv, d] to slot[i] of sequence seq[i] of the caches [B, H_kv, slots, blocks]."""
    for i in range(len(seq)):
        for h in range(k.shape[1]):
            encode_row(k_cache, seq[i], h, slot[i], k, i)
            encode_row(v_cache, seq[i], h, slot[i], v, i)


@kernel
def _attend_part(q, k, v, first, stop, scale, parts, vectors, heads, sums, largest, total, task):  # type: ignore[no-untyped-def]
    n_head_kv = k.shape[1]
    group = q.shape[1] // n_head_kv
    d = q.shape[2]
    b, h, part = task // (n_head_kv * parts), task // parts % n_head_kv, task % parts
    n = stop[b] - first[b]
    begin, end = first[b] + n * part // parts, first[b] + n * (part + 1) // parts
    keys, values, queries, acc = k[b, h], v[b, h], q[b], sums[task]
    scores = np.empty((group, TILE), np.float32)
    acc[:] = 0.0
    largest[task], total[task] = -np.inf, 0.0
    for tile in range(begin, end, TILE):
        width = min(TILE, end - tile)
        for g in range(0, group, len(heads)):
            score_rows(keys, tile, width, queries, h * group + g, scores, g, vectors, heads)
        for g in range(group):
            for s in range(width):
                scores[g, s] *= scale
            high = row_maximum(scores, g, 0, width, largest[task, g])
            shrink = exp(largest[task, g] - high)
            largest[task, g] = high
            total[task, g] = total[task, g] * shrink + exp_row(scores, g, 0, width, high)
            for j in range(d):
                acc[g, j] *= shrink
        for g in range(0, group, len(heads)):
            add_rows(values, tile, width, scores, acc, g, vectors, heads)


@kernel
def attend(crew, q, k, v, first, stop, scale, parts, vectors, heads, out):  # type: ignore[no-untyped-def]
    """One decode step over k, v [B, H_kv, slots, blocks]; q and out [B, H_q, d].

    A cached row is read once for its whole group of query heads. Each sequence is cut into parts, each part keeps the
    running maximum and sum of its softmax (arXiv 1805.02867), and the parts are joined at the end.
    vectors and heads: tuples with as many items as a head has vectors, and as heads go together (see tiles.py).
    """
    n_seq, n_head, d = q.shape
    n_head_kv = k.shape[1]
    group = n_head // n_head_kv
    tasks = n_seq * n_head_kv * parts
    sums = np.empty((tasks, group, d), np.float32)
    largest, total = np.empty((tasks, group), np.float32), np.empty((tasks, group), np.float32)
    share(crew, tasks, _attend_part, (q, k, v, first, stop, scale, parts, vectors, heads, sums, largest, total))
    for b in range(n_seq):
        for h in range(n_head):
            begin = (b * n_head_kv + h // group) * parts
            g = h % group
            high = largest[begin : begin + parts, g].max()
            mass = np.float32(0.0)
            out[b, h] = 0.0
            if first[b] < stop[b]:
                for task in range(begin, begin + parts):
                    weight = exp(largest[task, g] - high) * np.float32(total[task, g] > 0)
                    mass += weight * total[task, g]
                    for j in range(d):
                        out[b, h, j] += weight * sums[task, g, j]
                for j in range(d):
                    out[b, h, j] /= mass


@kernel
def softmax_tile(scores, largest, total, sums, group, start, tile, window):  # type: ignore[no-untyped-def]
    """A tile of prefill scores [T * group, width] becomes unnormalised probabilities, in place.

    Row i is a query at slot start + i // group, column s the key in slot tile + s: later keys and those out of the
    window are masked. Updates the row's running maximum and sum, and rescales its output so far, sums [T * group, d].
    """
    rows, width = scores.shape
    for i in range(rows):
        slot = start + i // group
        end = min(width, slot + 1 - tile)
        begin = max(0, slot + 1 - window - tile) if window > 0 else 0
        high = row_maximum(scores, i, begin, end, largest[i])
        shrink = exp(largest[i] - high)
        for s in range(min(begin, width)):
            scores[i, s] = 0.0
        for s in range(max(end, 0), width):
            scores[i, s] = 0.0
        if begin < end:
            largest[i] = high
            total[i] = total[i] * shrink + exp_row(scores, i, begin, end, high)
            for j in range(sums.shape[1]):
                sums[i, j] *= shrink
