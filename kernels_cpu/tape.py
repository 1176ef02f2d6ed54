"""A decode step as a tape: the kernel calls it made, with their arguments, played again by one loop of compiled code.

A step of a small model is a hundred and more kernel calls of some 20 microseconds each, and Python needs a third of
that to make one. From step to step the calls are the same, on the same arrays; only what lies in the arrays differs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, errors
from numba.extending import intrinsic

from . import (
    attention,
    coded_index,
    coded_search,
    eviction,
    gathered,
    kernels,
    latent_attention,
    latent_cache,
    merging,
    probabilities,
    rotation,
    sparse,
    token_index,
)
from .compiled import kernel
from .ir_vectors import I64
from .unowned import without_owner

ENTRY = 2048  # bytes, at most, of a call's arguments

_CALL = ir.FunctionType(I64, [cgutils.voidptr_t])  # (arguments) -> whether it failed


@intrinsic
def _prepare(typingctx: Any, function: Any, args: Any, place: Any) -> Any:
    """Writes the arguments of function(*args) to an address; returns that of code which makes the call with them.

    The references to arrays are not counted: who plays the call holds them.
    """
    call = function.get_call_type(typingctx, args.types, {})
    compiled = function.dispatcher.get_compile_result(call)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> Any:
        items = [
            _without_owners(context, b, kind, item)
            for kind, item in zip(args.types, cgutils.unpack_tuple(b, values[1]), strict=True)
        ]
        stored = cgutils.pack_struct(b, items)
        if context.get_abi_sizeof(stored.type) > ENTRY:
            raise errors.TypingError(f"the arguments of a call take more than {ENTRY} bytes")
        b.store(stored, b.inttoptr(values[2], stored.type.as_pointer()))
        context.active_code_library.add_linking_library(compiled.library)
        code = ir.Function(b.module, _CALL, name=b.module.get_unique_name("call"))
        code.linkage = "internal"
        inner = ir.IRBuilder(code.append_basic_block())
        loaded = inner.load(inner.bitcast(code.args[0], stored.type.as_pointer()))
        arguments = [inner.extract_value(loaded, i) for i in range(len(args.types))]
        status, result = context.call_internal_no_propagate(inner, compiled.fndesc, call, arguments)
        failed = status.is_error
        if call.return_type == types.boolean:  # whether it was done
            failed = inner.or_(failed, inner.not_(result))
        inner.ret(inner.zext(failed, I64))
        return b.ptrtoint(code, I64)

    return types.int64(function, args, types.int64), codegen


def _without_owners(context: Any, b: ir.IRBuilder, kind: Any, item: Any) -> Any:
    """The same item; references to it, or to what a tuple holds, are not counted if it is an array."""
    if isinstance(kind, types.Array):
        return without_owner(context, b, kind, item)
    if isinstance(kind, types.BaseTuple):
        parts = zip(kind.types, cgutils.unpack_tuple(b, item), strict=True)
        return context.make_tuple(b, kind, [_without_owners(context, b, *part) for part in parts])
    return item


@intrinsic
def _make(typingctx: Any, code: Any, arguments: Any) -> Any:
    """Makes a prepared call; returns whether it failed."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        function = b.inttoptr(args[0], _CALL.as_pointer())
        return b.call(function, [b.inttoptr(args[1], cgutils.voidptr_t)])

    return types.int64(types.int64, types.int64), codegen


@kernel
def _play(calls):  # type: ignore[no-untyped-def]
    """Makes prepared calls, rows (code, arguments) of int64, in order; returns the first that failed, or -1."""
    for i in range(len(calls)):
        if _make(calls[i, 0], calls[i, 1]) != 0:
            return i
    return -1


# A kernel is known to compiled code by its name, so each has a function of its own that prepares it.


@kernel
def _gather_rows(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(kernels.gather_rows, args, place)


@kernel
def _norm_products(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(kernels.norm_products, args, place)


@kernel
def _finish_qkv(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(kernels.finish_qkv, args, place)


@kernel
def _add_product(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(kernels.add_product, args, place)


@kernel
def _gated_products(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(kernels.gated_products, args, place)


@kernel
def _copy_columns(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(kernels.copy_columns, args, place)


@kernel
def _turned(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(kernels.turned, args, place)


@kernel
def _side_by_side(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(kernels.side_by_side, args, place)


@kernel
def _append(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(attention.append, args, place)


@kernel
def _attend(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(attention.attend, args, place)


@kernel
def _finish_heads(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(kernels.finish_heads, args, place)


@kernel
def _with_positions(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(latent_cache.with_positions, args, place)


@kernel
def _append_latents(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(latent_cache.append, args, place)


@kernel
def _overwrite_latents(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(latent_cache.overwrite, args, place)


@kernel
def _attend_latents(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(latent_attention.attend, args, place)


@kernel
def _rotate_rows(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(rotation.rotate_rows, args, place)


@kernel
def _append_index(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(token_index.append_index, args, place)


@kernel
def _approximate_top_k(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(sparse.approximate_top_k, args, place)


@kernel
def _append_codes(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(coded_index.append_codes, args, place)


@kernel
def _approximate_top_k_of_codes(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(coded_search.approximate_top_k, args, place)


@kernel
def _exact_top_k(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(sparse.exact_top_k, args, place)


@kernel
def _attend_rows(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(gathered.attend_rows, args, place)


@kernel
def _add_rows(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(gathered.add_rows, args, place)


@kernel
def _overwrite(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(eviction.overwrite, args, place)


@kernel
def _evict(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(eviction.evict, args, place)


@kernel
def _spread_weights(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(probabilities.spread_weights, args, place)


@kernel
def _merge(place, *args):  # type: ignore[no-untyped-def]
    return _prepare(merging.merge, args, place)


_PREPARE = {
    kernels.gather_rows: _gather_rows,
    kernels.norm_products: _norm_products,
    kernels.finish_qkv: _finish_qkv,
    kernels.copy_columns: _copy_columns,
    kernels.turned: _turned,
    kernels.side_by_side: _side_by_side,
    kernels.add_product: _add_product,
    kernels.gated_products: _gated_products,
    attention.append: _append,
    attention.attend: _attend,
    kernels.finish_heads: _finish_heads,
    latent_cache.with_positions: _with_positions,
    latent_cache.append: _append_latents,
    latent_cache.overwrite: _overwrite_latents,
    latent_attention.attend: _attend_latents,
    rotation.rotate_rows: _rotate_rows,
    token_index.append_index: _append_index,
    sparse.approximate_top_k: _approximate_top_k,
    coded_index.append_codes: _append_codes,
    coded_search.approximate_top_k: _approximate_top_k_of_codes,
    sparse.exact_top_k: _exact_top_k,
    gathered.attend_rows: _attend_rows,
    gathered.add_rows: _add_rows,
    eviction.overwrite: _overwrite,
    eviction.evict: _evict,
    probabilities.spread_weights: _spread_weights,
    merging.merge: _merge,
}


class Tape:
    """Kernel calls, noted as they are made."""

    def __init__(self) -> None:
        self.whole = True  # nothing was computed but by the calls on the tape
        self._held: list[Any] = []
        self._calls: list[tuple[int, int]] = []
        self._tables: dict[Any, np.ndarray] = {}

    def begin_with(self, table: Any, pos: np.ndarray) -> None:
        """Before the calls, table.cover_all(pos): of the positions of that time."""
        self._tables[table] = pos

    def note(self, kernel: Any, args: tuple[Any, ...]) -> None:
        """A call kernel(*args), whose arrays must not be garbage before the tape is."""
        if not self.whole:
            return
        place = np.empty(ENTRY // 8, np.int64)
        self._calls.append((_PREPARE[kernel](place.ctypes.data, *args), place.ctypes.data))
        self._held.append((place, args))

    def play(self) -> None:
        """Makes the calls again. RuntimeError if one fails; those after it are not made."""
        for table, pos in self._tables.items():
            table.cover_all(pos)
        failed = _play(self._table)
        if failed >= 0:
            raise RuntimeError(f"kernel call {failed} of {len(self._table)} failed")

    def end(self) -> None:
        """No more calls will be noted."""
        self._table = np.array(self._calls, np.int64).reshape(-1, 2)
