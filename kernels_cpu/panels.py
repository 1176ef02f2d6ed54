"""Panels of 16 rows as kernels see them: dot products and decoding, compiled to explicit vectors for each format."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numba.core import cgutils
from numba.extending import intrinsic

from .blocks import FORMATS, Format, Panels
from .ir_vectors import F32, I64, LANES, Value, at, into_array, load, multiply_add, splat, store, vector

CHAINS = 4  # sums in flight: a multiply-add takes about four cycles and two can start in each

PANEL_DTYPES = {name: np.dtype([(f"{name}_panel", "u1", (f.dtype.itemsize, LANES))]) for name, f in FORMATS.items()}
_BY_RECORD = {from_dtype(PANEL_DTYPES[name]): f for name, f in FORMATS.items()}


@intrinsic
def dot_panel(typingctx: Any, w: Any, p: Any, x: Any, sums: Any, i: Any, out: Any) -> Any:
    """out[i, 16 p : 16 p + 16] = panel p of w [panels, blocks] times row i of float32 x [N, n_in].

    sums [N, n_in / 16] are those of every 16 columns of x, for the minima. out [N, 16 panels] is float32, C-ordered.
    """
    f: Format = _BY_RECORD[w.dtype]

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        w, p, x, sums, i, out = args
        panel, shape, _ = into_array(context, b, signature.args[0], w, p)
        x_row, _, _ = into_array(context, b, signature.args[2], x, i)
        sum_row, _, _ = into_array(context, b, signature.args[3], sums, i)
        target, _, _ = into_array(context, b, signature.args[5], out, i, b.mul(p, I64(LANES)))
        zero = ir.Constant(vector(F32), [0.0] * LANES)
        total = cgutils.alloca_once_value(b, zero)
        with cgutils.for_range(b, shape[1]) as loop:
            xs = at(b, x_row, b.mul(loop.index, I64(4 * f.length)))
            x16 = at(b, sum_row, b.mul(loop.index, I64(4 * f.length // LANES)))
            reader = Panels(b, at(b, panel, b.mul(loop.index, I64(LANES * f.dtype.itemsize))))
            value = b.load(total)
            for group in f.decode(b, reader):
                chains = [zero] * CHAINS
                for c, q in enumerate(group.q):
                    column = splat(b, load(b, at(b, xs, 4 * (group.start + c)), F32))
                    chains[c % CHAINS] = multiply_add(b, q, column, chains[c % CHAINS])
                dot = b.fadd(b.fadd(chains[0], chains[1]), b.fadd(chains[2], chains[3]))
                value = multiply_add(b, dot, group.scale, value)
                if group.minimum is not None:
                    sum16 = splat(b, load(b, at(b, x16, 4 * (group.start // LANES)), F32))
                    value = multiply_add(b, group.minimum, sum16, value)
            b.store(value, total)
        store(b, b.load(total), target)
        return context.get_dummy_value()

    return types.void(w, types.int64, x, sums, types.int64, out), codegen


@intrinsic
def decode_panel(typingctx: Any, w: Any, p: Any, out: Any, i: Any) -> Any:
    """out[:, 16 i : 16 i + 16] = panel p of w [panels, blocks], transposed; out [n_in, columns], float32, C-ordered."""
    f: Format = _BY_RECORD[w.dtype]

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        w, p, out, i = args
        panel, shape, _ = into_array(context, b, signature.args[0], w, p)
        target, (_, width), _ = into_array(context, b, signature.args[2], out, I64(0), b.mul(i, I64(LANES)))
        with cgutils.for_range(b, shape[1]) as loop:
            reader = Panels(b, at(b, panel, b.mul(loop.index, I64(LANES * f.dtype.itemsize))))
            first = b.mul(loop.index, I64(f.length))
            for group in f.decode(b, reader):
                for c, q in enumerate(group.q):
                    value = b.fmul(q, group.scale)
                    if group.minimum is not None:
                        value = b.fadd(value, group.minimum)
                    column = b.add(first, I64(group.start + c))
                    store(b, value, at(b, target, b.mul(b.mul(column, width), I64(4))))
        return context.get_dummy_value()

    return types.void(w, types.int64, out, types.int64), codegen
