"""Scores that attention kept become probabilities, averaged over heads: what TOVA, H2O and D2O decide by."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiled import kernel
from .crew import share
from .ir_vectors import F32, I64, Value, at, constant, for_vectors, into_array, load, multiply_add, splat, store, vector
from .pointers import address
from .softmax import exp_below_zero

SLOTS = 1024  # of a task


@intrinsic
def _mean_of_rows(
    typingctx: Any, kept: Any, first: Any, rows: Any, begin: Any, end: Any, to: Any, accumulate: Any
) -> Any:
    """Slots begin ... end - 1 of some rows of `kept` (see `attention.attend`) as probabilities; their mean, float32, is
    written to an address, or added to what is there."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        kept, first, rows, begin, end, to, accumulate = args
        row, (_, columns), (row_bytes, _) = into_array(context, b, signature.args[0], kept, first)
        to = b.inttoptr(to, cgutils.voidptr_t)
        mean = b.fdiv(F32(1.0), b.sitofp(rows, F32))

        def turn(index: Value, lanes: int) -> None:
            total = cgutils.alloca_once(b, vector(F32, lanes))
            b.store(constant(F32, 0.0, lanes), total)
            with cgutils.for_range(b, rows) as loop:
                scores = at(b, row, b.mul(loop.index, row_bytes))
                high, inverse = (
                    splat(b, load(b, at(b, scores, b.mul(b.sub(columns, I64(i)), I64(4))), F32), lanes) for i in (2, 1)
                )
                x = load(b, at(b, scores, b.mul(b.add(begin, index), I64(4))), vector(F32, lanes))
                b.store(multiply_add(b, exp_below_zero(b, b.fsub(x, high)), inverse, b.load(total)), total)
            place = at(b, to, b.mul(index, I64(4)))
            old = load(b, place, vector(F32, lanes))
            old = b.select(accumulate, old, constant(F32, 0.0, lanes))
            store(b, multiply_add(b, b.load(total), splat(b, mean, lanes), old), place)

        for_vectors(b, b.sub(end, begin), turn)
        return context.get_dummy_value()

    i = types.int64
    return types.void(kept, i, i, i, i, i, types.boolean), codegen


@kernel
def _spread_part(kept, stop, weights, accumulate, tasks_each, task):  # type: ignore[no-untyped-def]
    b, part = task // tasks_each, task % tasks_each
    n_head, heads = len(kept) // len(stop), weights.shape[1]
    begin, end, group = part * SLOTS, min((part + 1) * SLOTS, stop[b]), n_head // heads
    if begin < end:
        for h in range(heads):
            to = address(weights) + b * weights.strides[0] + h * weights.strides[1] + 4 * begin
            _mean_of_rows(kept, b * n_head + h * group, group, begin, end, to, accumulate)


@kernel
def spread_weights(crew, kept, stop, weights, accumulate):  # type: ignore[no-untyped-def]
    """What `attend` kept [B H_q, columns] as probabilities, averaged over as many heads as share a row of weights.

    weights [B, H, slots], whose rows lie in order: slots 0 ... stop[b] - 1 are written, or added to if `accumulate`.
    """
    tasks_each = (stop.max() + SLOTS - 1) // SLOTS
    share(crew, len(stop) * tasks_each, _spread_part, (kept, stop, weights, accumulate, tasks_each))
