"""The lowest or the highest of many numbers, and where it first is: lane by lane, then across lanes."""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .ir_vectors import (
    F32,
    I32,
    I64,
    LANES,
    Value,
    across_lanes,
    at,
    constant,
    for_vectors,
    into_array,
    like,
    load,
    splat,
    vector,
)


class Extreme:
    """The best float32 seen so far in each lane, and its index. NaN is never best, nor is what is as good as nothing:
    infinity for the lowest, -infinity for the highest."""

    def __init__(self, b: ir.IRBuilder, lanes: int, highest: bool):
        self.b, self.lanes, self.sign = b, lanes, ">" if highest else "<"
        self.best = cgutils.alloca_once_value(b, constant(F32, -math.inf if highest else math.inf, lanes))
        self.where = cgutils.alloca_once_value(b, constant(I32, -1, lanes))

    def see(self, values: Value, first: Value, counts: Value) -> None:
        """The next values, whose indices (int64) begin with `first`; those lanes count for which `counts` is true."""
        b, old = self.b, self.b.load(self.best)
        better = b.and_(counts, b.fcmp_ordered(self.sign, values, old))
        b.store(b.select(better, values, old), self.best)
        b.store(b.select(better, indices(b, first, self.lanes), b.load(self.where)), self.where)

    def result(self) -> tuple[Value, Value]:
        """(the best, its lowest index as int64, or -1 if nothing was seen)."""
        b, values, where = self.b, self.b.load(self.best), self.b.load(self.where)
        best = across_lanes(b, values, lambda x, y: b.select(b.fcmp_ordered(self.sign, x, y), x, y))
        # As unsigned numbers, -1 is the largest.
        mine = b.select(b.fcmp_ordered("==", values, splat(b, best, self.lanes)), where, like(where, -1))
        index = across_lanes(b, mine, lambda x, y: b.select(b.icmp_unsigned("<", x, y), x, y))
        return best, b.sext(index, I64)


def indices(b: ir.IRBuilder, first: Value, lanes: int = LANES) -> Value:
    """first, first + 1 ... as int32."""
    return b.add(splat(b, b.trunc(first, I32), lanes), ir.Constant(vector(I32, lanes), list(range(lanes))))


@intrinsic
def lowest_before(
    typingctx: Any, scores: Any, positions: Any, b: Any, h: Any, begin: Any, end: Any, before: Any
) -> Any:
    """The slot begin <= s < end with the lowest of scores[b, h] among those with positions[b, h] below `before`.

    Of equal ones the first; -1 if there is none. scores float32, positions int32, [B, H, slots] with rows in order.
    """

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        scores, positions, seq, head, begin, end, before = args
        scores, _, _ = into_array(context, b, signature.args[0], scores, seq, head, begin)
        positions, _, _ = into_array(context, b, signature.args[1], positions, seq, head, begin)
        n = b.sub(end, begin)
        n = b.select(b.icmp_signed(">", n, I64(0)), n, I64(0))
        found = {lanes: Extreme(b, lanes, highest=False) for lanes in (LANES, 1)}

        def turn(index: Value, lanes: int) -> None:
            score, position = (
                load(b, at(b, row, b.mul(index, I64(4))), vector(kind, lanes))
                for row, kind in ((scores, F32), (positions, I32))
            )
            earlier = b.icmp_signed("<", position, splat(b, b.trunc(before, I32), lanes))
            found[lanes].see(score, b.add(begin, index), earlier)

        for_vectors(b, n, turn)
        (low, slot), (last_low, last_slot) = (found[lanes].result() for lanes in (LANES, 1))
        return b.select(b.fcmp_ordered("<", last_low, low), last_slot, slot)

    i = types.int64
    return i(scores, positions, i, i, i, i, i), codegen
