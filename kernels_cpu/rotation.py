"""The Hadamard rotation of `minirt.stores.hadamard`, for queries and sums beside a cache whose rows are rotated."""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minirt.stores import STORES
from minirt.stores.hadamard import rotation_size

from .compiled import kernel
from .ir_vectors import F32, I32, LANES, Value, at, constant, load, multiply_add, store, vector
from .pointers import address

ROTATED = frozenset(store.dtype.names[0] for store in STORES.values() if store.rotated and store.dtype.names)


def _within(b: ir.IRBuilder, x: Value, step: int) -> Value:
    """Of lanes i and i + step the sum and the difference."""
    swapped = b.shuffle_vector(x, x, ir.Constant(vector(I32), [i ^ step for i in range(LANES)]))
    signs = ir.Constant(vector(F32), [-1.0 if i & step else 1.0 for i in range(LANES)])
    return multiply_add(b, x, signs, swapped)


@intrinsic
def _rotate_floats(typingctx: Any, source: Any, target: Any, vectors: Any) -> Any:
    """16 len(vectors) float32 at an address, rotated, to another or the same."""
    n = len(vectors)
    size = rotation_size(LANES * n)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        source, target = (b.inttoptr(a, cgutils.voidptr_t) for a in args[:2])
        scale = constant(F32, 1 / math.sqrt(size))
        x = [b.fmul(load(b, at(b, source, 4 * LANES * i), vector(F32)), scale) for i in range(n)]
        for step in (1, 2, 4, 8):
            x = [_within(b, value, step) for value in x]
        step = 1
        while LANES * step < size:
            for i in range(n):
                if not i & step:
                    x[i], x[i + step] = b.fadd(x[i], x[i + step]), b.fsub(x[i], x[i + step])
            step *= 2
        for i, value in enumerate(x):
            store(b, value, at(b, target, 4 * LANES * i))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, vectors), codegen


@kernel
def rotate_rows(x, out, vectors):  # type: ignore[no-untyped-def]
    """Each head of x, float32 in C order, rotated, to out. vectors: as many items as a head has vectors."""
    for i in range(x.size // (16 * len(vectors))):
        place = 64 * len(vectors) * i
        _rotate_floats(address(x) + place, address(out) + place, vectors)
