"""Arrays as tasks that several threads run should take them: counting references to one array from several threads
costs more than a short task does, and who called the kernel holds it anyway."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def without_owner(context: Any, b: ir.IRBuilder, kind: Any, array: Any) -> Any:
    """The same array, whose references are not counted."""
    a = context.make_array(kind)(context, b, array)
    a.meminfo, a.parent = (cgutils.get_null_value(value.type) for value in (a.meminfo, a.parent))
    return a._getvalue()


@intrinsic
def unowned(typingctx: Any, array: Any) -> Any:
    """The same array, whose references are not counted. The true one must live on: see `hold`."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return without_owner(context, b, array, args[0])

    return array(array), codegen


@intrinsic
def hold(typingctx: Any, arrays: Any) -> Any:
    """Keeps a tuple of arrays alive up to here: Numba lets go of one after its last use."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return context.get_dummy_value()

    return types.void(arrays), codegen
