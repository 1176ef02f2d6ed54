"""Memory by its address, for tasks that several threads run on the same arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .ir_vectors import F32, I64, Value, at, for_vectors, into_array, load, store, vector


@intrinsic
def address(typingctx: Any, array: Any) -> Any:
    """Where the first item of an array lies."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        return b.ptrtoint(into_array(context, b, signature.args[0], args[0])[0], I64)

    return types.int64(array), codegen


@intrinsic
def word(typingctx: Any, where: Any, i: Any) -> Any:
    """The i-th int64 at an address."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        return load(b, at(b, b.inttoptr(args[0], cgutils.voidptr_t), b.mul(args[1], I64(8))), I64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def float_at(typingctx: Any, where: Any, i: Any) -> Any:
    """The i-th float32 at an address."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        return load(b, at(b, b.inttoptr(args[0], cgutils.voidptr_t), b.mul(args[1], I64(4))), F32)

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def add_floats(typingctx: Any, to: Any, source: Any, n: Any) -> Any:
    """to += source for n float32 at two addresses."""
    return _store_floats(lambda b, old, new: b.fadd(old, new))


@intrinsic
def copy_floats(typingctx: Any, to: Any, source: Any, n: Any) -> Any:
    """to = source for n float32 at two addresses."""
    return _store_floats(lambda b, old, new: new)


def _store_floats(join: Callable[[ir.IRBuilder, Value, Value], Value]) -> Any:
    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        to, source = (b.inttoptr(a, cgutils.voidptr_t) for a in args[:2])

        def turn(index: Value, lanes: int) -> None:
            x, y = (load(b, at(b, p, b.mul(index, I64(4))), vector(F32, lanes)) for p in (to, source))
            store(b, join(b, x, y), at(b, to, b.mul(index, I64(4))))

        for_vectors(b, args[2], turn)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(i64, i64, i64), codegen
