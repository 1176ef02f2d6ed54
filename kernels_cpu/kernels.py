"""The compiled kernels. They trust their callers: `kernels_cpu.ops` checks every shape and index first.

Threads share out whole rows or tasks whose number they do not decide, so results are the same for any thread count.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from .compiled import parallel, serial
from .rows import add_row, decode_row, dot_row

TILE = 64  # cached rows scored before their values are added


@intrinsic
def _bits_float(typingctx: Any, x: Any) -> Any:
    """uint32 bits -> float32."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return b.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@njit(inline="always")
def exp(x):  # type: ignore[no-untyped-def]
    """e^x for float32 x, clamped to -87..88; within 2e-7. Plain arithmetic, so that loops over it vectorise.

    2^n times a polynomial in what is left after splitting off n = round(x / ln 2), as in the Cephes library's expf.
    """
    x = min(max(x, np.float32(-87.3)), np.float32(88.3))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    y = p * r * r + r + np.float32(1.0)
    return y * _bits_float(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))


@parallel
def multiply_rows(w, x, out, parts):  # type: ignore[no-untyped-def]
    """out [N, rows] = x [N, n_in] @ w.T for a few rows of x: a weight row is read once for all of them."""
    rows = w.shape[0]
    for part in prange(parts):
        for r in range(rows * part // parts, rows * (part + 1) // parts):
            for i in range(x.shape[0]):
                out[i, r] = dot_row(w, r, x, i)


@parallel
def gated_rows(gate, up, x, out, parts):  # type: ignore[no-untyped-def]
    """out [N, rows] = silu(x @ gate.T) * (x @ up.T) for a few rows of x."""
    rows = gate.shape[0]
    for part in prange(parts):
        for r in range(rows * part // parts, rows * (part + 1) // parts):
            for i in range(x.shape[0]):
                g = dot_row(gate, r, x, i)
                out[i, r] = g / (np.float32(1.0) + exp(-g)) * dot_row(up, r, x, i)


@parallel
def decode_rows(w, out, parts):  # type: ignore[no-untyped-def]
    """out [rows, n_in] = w as float32."""
    rows = w.shape[0]
    for part in prange(parts):
        for r in range(rows * part // parts, rows * (part + 1) // parts):
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


@parallel
def silu_times(gate, up):  # type: ignore[no-untyped-def]
    """gate [N, n_ff] = silu(gate) * up, in place."""
    rows, n = gate.shape
    for i in prange(rows):
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
def attend(q, k, v, first, stop, scale, parts, out):  # type: ignore[no-untyped-def]
    """One decode step over k, v [B, H_kv, slots, blocks]; q and out [B, H_q, d].

    A cached row is read once for its whole group of query heads. Each sequence is cut into parts, each part keeps the
    running maximum and sum of its softmax (arXiv 1805.02867), and the parts are joined at the end.
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
            for s in range(width):
                for g in range(group):
                    scores[g, s] = dot_row(keys, tile + s, queries, h * group + g) * scale
            for g in range(group):
                high = largest[task, g]
                for s in range(width):
                    high = max(high, scores[g, s])
                shrink = exp(largest[task, g] - high)
                added = np.float32(0.0)
                for s in range(width):
                    scores[g, s] = exp(scores[g, s] - high)
                    added += scores[g, s]
                largest[task, g] = high
                total[task, g] = total[task, g] * shrink + added
                for j in range(d):
                    acc[g, j] *= shrink
            for s in range(width):
                for g in range(group):
                    add_row(values, tile + s, scores[g, s], acc, g)
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


@parallel
def softmax_tile(scores, largest, total, sums, group, start, tile, window):  # type: ignore[no-untyped-def]
    """A tile of prefill scores [T * group, width] becomes unnormalised probabilities, in place.

    Row i is a query at slot start + i // group, column s the key in slot tile + s: later keys and those out of the
    window are masked. Updates the row's running maximum and sum, and rescales its output so far, sums [T * group, d].
    """
    rows, width = scores.shape
    for i in prange(rows):
        slot = start + i // group
        end = min(width, slot + 1 - tile)
        begin = max(0, slot + 1 - window - tile) if window > 0 else 0
        high = largest[i]
        for s in range(begin, end):
            high = max(high, scores[i, s])
        shrink = exp(largest[i] - high)
        for s in range(min(begin, width)):
            scores[i, s] = 0.0
        added = np.float32(0.0)
        for s in range(begin, end):
            scores[i, s] = exp(scores[i, s] - high)
            added += scores[i, s]
        for s in range(max(end, 0), width):
            scores[i, s] = 0.0
        if begin < end:
            largest[i] = high
            total[i] = total[i] * shrink + added
            for j in range(sums.shape[1]):
                sums[i, j] *= shrink
