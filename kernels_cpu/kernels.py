"""The compiled kernels. They trust their callers: `kernels_cpu.ops` checks every shape and index first.

Parallel ones are for a decode step, where a launch may only cost microseconds; serial ones are the pieces of prefill,
which `kernels_cpu.ops` shares out itself.
Threads share out whole rows or tasks whose number they do not decide, so results are the same for any thread count.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from .compiled import parallel, serial
from .panels import decode_panel, dot_panel
from .rows import decode_row, dot_row
from .softmax import exp, exp_row, row_maximum
from .tiles import add_rows, score_rows

TILE = 64  # cached rows scored before their values are added; whole vectors, because score_rows rounds up to them


@serial
def _sums_of_16(x):  # type: ignore[no-untyped-def]
    """Sums of every 16 columns of x [N, n_in]: [N, n_in / 16]."""
    rows, n = x.shape
    sums = np.empty((rows, n // 16), np.float32)
    for i in range(rows):
        for j in range(n // 16):
            total = np.float32(0.0)
            for c in range(16):
                total += x[i, 16 * j + c]
            sums[i, j] = total
    return sums


@parallel
def multiply_panels(w, x, out, parts):  # type: ignore[no-untyped-def]
    """out [N, 16 panels] = x [N, n_in] @ w.T for a few rows of x: a panel is read from memory once for all of them."""
    panels = w.shape[0]
    for part in prange(parts):
        sums = _sums_of_16(x)
        for p in range(panels * part // parts, panels * (part + 1) // parts):
            for i in range(x.shape[0]):
                dot_panel(w, p, x, sums, i, out)


@parallel
def multiply_three(a, b, c, x, out_a, out_b, out_c, parts):  # type: ignore[no-untyped-def]
    """As multiply_panels for three weights in one launch: queries, keys and values."""
    n_a, n_b = len(a), len(b)
    panels = n_a + n_b + len(c)
    for part in prange(parts):
        sums = _sums_of_16(x)
        for p in range(panels * part // parts, panels * (part + 1) // parts):
            for i in range(x.shape[0]):
                if p < n_a:
                    dot_panel(a, p, x, sums, i, out_a)
                elif p < n_a + n_b:
                    dot_panel(b, p - n_a, x, sums, i, out_b)
                else:
                    dot_panel(c, p - n_a - n_b, x, sums, i, out_c)


@parallel
def gated_panels(gate, up, x, out, parts):  # type: ignore[no-untyped-def]
    """out [N, 16 panels] = silu(x @ gate.T) * (x @ up.T) for a few rows of x."""
    panels = gate.shape[0]
    other = np.empty_like(out)
    for part in prange(parts):
        sums = _sums_of_16(x)
        for p in range(panels * part // parts, panels * (part + 1) // parts):
            for i in range(x.shape[0]):
                dot_panel(gate, p, x, sums, i, out)
                dot_panel(up, p, x, sums, i, other)
                for j in range(16 * p, 16 * p + 16):
                    g = out[i, j]
                    out[i, j] = g / (np.float32(1.0) + exp(-g)) * other[i, j]


@parallel
def multiply_rows(w, x, out, parts):  # type: ignore[no-untyped-def]
    """out [N, rows] = x [N, n_in] @ w.T for a few rows of x and a weight without blocks."""
    rows = w.shape[0]
    for part in prange(parts):
        for r in range(rows * part // parts, rows * (part + 1) // parts):
            for i in range(x.shape[0]):
                out[i, r] = dot_row(w, r, x, i)


@serial
def decode_panels(w, out):  # type: ignore[no-untyped-def]
    """out [n_in, 16 panels] = w.T as float32."""
    for p in range(len(w)):
        decode_panel(w, p, out, p)


@parallel
def interleave(rows, out, parts):  # type: ignore[no-untyped-def]
    """Bytes of a weight [n_out, blocks, block bytes] as panels [panels, blocks, block bytes, 16], filled up with 0."""
    n_out, blocks, size = rows.shape
    for part in prange(parts):
        for p in range(len(out) * part // parts, len(out) * (part + 1) // parts):
            for block in range(blocks):
                for r in range(16):
                    if 16 * p + r < n_out:
                        for k in range(size):
                            out[p, block, k, r] = rows[16 * p + r, block, k]
                    else:
                        for k in range(size):
                            out[p, block, k, r] = 0


@serial
def decode_rows(w, out):  # type: ignore[no-untyped-def]
    """out [rows, n_in] = w as float32."""
    for r in range(len(w)):
        decode_row(w, r, out, r)


@serial
def gather_rows(w, tokens, out):  # type: ignore[no-untyped-def]
    """out [N, n_in] = rows `tokens` of w as float32."""
    for i in range(len(tokens)):
        decode_row(w, tokens[i], out, i)


@serial
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


@serial
def silu_times(gate, up):  # type: ignore[no-untyped-def]
    """gate [N, n_ff] = silu(gate) * up, in place."""
    rows, n = gate.shape
    for i in range(rows):
        for j in range(n):
            g = gate[i, j]
            gate[i, j] = g / (np.float32(1.0) + exp(-g)) * up[i, j]


@serial
def rotate(x, cos, sin, stride, partner):  # type: ignore[no-untyped-def]
    """Turns components i * stride and i * stride + partner of each head of x [N, H, d] by cos, sin [N, pairs]."""
    rows, heads, _ = x.shape
    for n in range(rows):
        for h in range(heads):
            for i in range(cos.shape[1]):
                a, b = x[n, h, i * stride], x[n, h, i * stride + partner]
                x[n, h, i * stride] = a * cos[n, i] - b * sin[n, i]
                x[n, h, i * stride + partner] = a * sin[n, i] + b * cos[n, i]


@parallel
def attend(q, k, v, first, stop, scale, parts, vectors, heads, out):  # type: ignore[no-untyped-def]
    """One decode step over k, v [B, H_kv, slots, blocks]; q and out [B, H_q, d].

    A cached row is read once for its whole group of query heads. Each sequence is cut into parts, each part keeps the
    running maximum and sum of its softmax (arXiv 1805.02867), and the parts are joined at the end.
    vectors and heads: tuples with as many items as a head has vectors, and as heads go together (see tiles.py).
    """
    n_seq, n_head, d = q.shape
    n_head_kv = k.shape[1]
    group = n_head // n_head_kv
    sums = np.zeros((n_seq * n_head_kv * parts, group, d), np.float32)
    largest = np.full((n_seq * n_head_kv * parts, group), np.float32(-np.inf), np.float32)
    total = np.zeros((n_seq * n_head_kv * parts, group), np.float32)
    for task in prange(n_seq * n_head_kv * parts):
        b, h, part = task // (n_head_kv * parts), task // parts % n_head_kv, task % parts
        n = stop[b] - first[b]
        begin, end = first[b] + n * part // parts, first[b] + n * (part + 1) // parts
        keys, values, queries, acc = k[b, h], v[b, h], q[b], sums[task]
        scores = np.empty((group, TILE), np.float32)
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
    for b in range(n_seq):
        for h in range(n_head):
            tasks = (b * n_head_kv + h // group) * parts
            g = h % group
            high = largest[tasks : tasks + parts, g].max()
            mass = np.float32(0.0)
            out[b, h] = 0.0
            if first[b] < stop[b]:
                for task in range(tasks, tasks + parts):
                    weight = exp(largest[task, g] - high) * np.float32(total[task, g] > 0)
                    mass += weight * total[task, g]
                    for j in range(d):
                        out[b, h, j] += weight * sums[task, g, j]
                for j in range(d):
                    out[b, h, j] /= mass


@serial
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
