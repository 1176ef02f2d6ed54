"""A crew: threads that share the tasks of one kernel call within microseconds, and go to sleep soon after the last.

The caller publishes a function and a number of tasks, and takes tasks itself until none is left; a worker that is
awake takes some too. Nobody waits for a thread that has not begun: if the other cores are busy, the caller does it all.
Tasks write to places of their own, so results do not depend on who did what.

A thread whose core was taken away in the middle of a task does hold up the others, for as long as the system likes. So
a caller that had to wait unusually long works alone for a while.

The state is one int64 array, a cache line a field. TICKET holds (calls so far << 32 | tasks left): a task is taken by a
compare-and-swap, so a thread that looked away cannot take one of a later call by mistake, and what is taken belongs to
a call that cannot end, or change FUNCTION and ENVIRONMENT, before the task is done.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiled import kernel
from .ir_vectors import I32, I64, Value, at, into_array
from .isa import ARM, X86

TICKET, FUNCTION, ENVIRONMENT, DONE, STALL, ALONE, STAY = 0, 8, 16, 64, 128, 136, 192  # byte offsets
TASK_BITS = 32
AWAKE = 200e-6  # seconds a worker looks for work before it sleeps: longer than the Python between two kernel calls
STALLED = 1e-3  # seconds of waiting for a task that tell of a lost core; STALL holds it in looks
SECONDS_ALONE = 20e-3  # after that, while ALONE is 1

_TASK = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, I64, I64])  # (environment, tasks left, thread)


def _field(b: ir.IRBuilder, state: Value, offset: int) -> Value:
    return b.bitcast(at(b, state, offset), I64.as_pointer())


def _pause(b: ir.IRBuilder) -> None:
    """Tells the core that it waits in a loop."""
    if X86:
        b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"), [])
    elif ARM:
        kind = ir.FunctionType(ir.VoidType(), [I32])
        b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.aarch64.hint"), [I32(1)])


def _offer_core(b: ir.IRBuilder) -> None:
    """Lets another thread have this core, where the system has a plain call for it."""
    if hasattr(ctypes.pythonapi, "sched_yield"):
        b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, []), "sched_yield"), [])


def _take_task(b: ir.IRBuilder, state: Value) -> tuple[Value, Value]:
    """(whether a task was taken, how many are left after it)."""
    ticket = _field(b, state, TICKET)
    seen = b.load_atomic(ticket, "acquire", 8)
    left = b.and_(seen, I64(2**TASK_BITS - 1))
    taken = cgutils.alloca_once_value(b, cgutils.false_bit)
    with b.if_then(b.icmp_signed(">", left, I64(0))):
        result = b.cmpxchg(ticket, seen, b.sub(seen, I64(1)), "acq_rel", "acquire")
        b.store(b.extract_value(result, 1), taken)
    return b.load(taken), b.sub(left, I64(1))


def _do_task(b: ir.IRBuilder, state: Value, left: Value, thread: Value) -> None:
    function = b.inttoptr(b.load(_field(b, state, FUNCTION)), _TASK.as_pointer())
    environment = b.inttoptr(b.load(_field(b, state, ENVIRONMENT)), cgutils.voidptr_t)
    b.call(function, [environment, left, thread])
    b.atomic_rmw("add", _field(b, state, DONE), I64(1), "acq_rel")


@intrinsic
def _serve(typingctx: Any, state: Any, patience: Any, thread: Any) -> Any:
    """Does tasks until none was found `patience` times in a row."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Value:
        state, _, _ = into_array(context, b, signature.args[0], args[0])
        idle = cgutils.alloca_once_value(b, I64(0))
        loop, end = b.append_basic_block("look"), b.append_basic_block("end")
        b.branch(loop)
        b.position_at_end(loop)
        taken, left = _take_task(b, state)
        with b.if_else(taken) as (yes, no):
            with yes:
                _do_task(b, state, left, args[2])
                b.store(I64(0), idle)
            with no:
                _pause(b)
                b.store(b.add(b.load(idle), I64(1)), idle)
        b.cbranch(b.icmp_signed("<", b.load(idle), args[1]), loop, end)
        b.position_at_end(end)
        return context.get_dummy_value()

    return types.void(state, types.int64, types.int64), codegen


@kernel
def _serve_until_idle(state, patience, thread):  # type: ignore[no-untyped-def]
    _serve(state, patience, thread)


@intrinsic
def share(typingctx: Any, state: Any, n: Any, function: Any, args: Any) -> Any:
    """Calls function(*args, i) for every i < n on the threads of the crew with this state; returns when all is done.

    function: a compiled kernel that returns nothing. RuntimeError if it raises. Tasks are short: see STALLED.
    """
    return _share(typingctx, state, n, function, args, long=False)


@intrinsic
def share_long(typingctx: Any, state: Any, n: Any, function: Any, args: Any) -> Any:
    """The same with function(*args, i, thread), for tasks that may take milliseconds: waiting for one is no surprise.

    thread: 0 for the caller, from 1 on for the workers; what it indexes belongs to the task while it runs.
    """
    return _share(typingctx, state, n, function, args, long=True)


def _share(typingctx: Any, state: Any, n: Any, function: Any, args: Any, long: bool) -> Any:
    numbers = (types.int64,) * (2 if long else 1)
    call = function.get_call_type(typingctx, (*args.types, *numbers), {})
    compiled = function.dispatcher.get_compile_result(call)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> Value:
        state, _, _ = into_array(context, b, signature.args[0], values[0])
        n = values[1]
        # What the tasks read: arguments, whether one of them failed, how many there are.
        environment = cgutils.alloca_once_value(b, cgutils.pack_struct(b, [values[3], I64(0), n]))
        context.active_code_library.add_linking_library(compiled.library)
        task = ir.Function(b.module, _TASK, name=b.module.get_unique_name("task"))
        task.linkage = "internal"
        inner = ir.IRBuilder(task.append_basic_block())
        shared = inner.bitcast(task.args[0], environment.type)
        stored = inner.load(cgutils.gep_inbounds(inner, shared, 0, 0))
        arguments = [inner.extract_value(stored, i) for i in range(len(args.types))]
        _, left, thread = task.args
        number = inner.sub(inner.sub(inner.load(cgutils.gep_inbounds(inner, shared, 0, 2)), left), I64(1))
        arguments += [number, thread] if long else [number]
        status, _ = context.call_internal_no_propagate(inner, compiled.fndesc, call, arguments)
        with inner.if_then(status.is_error, likely=False):
            inner.store_atomic(I64(1), cgutils.gep_inbounds(inner, shared, 0, 1), "monotonic", 8)
        inner.ret_void()

        alone = _field(b, state, ALONE)
        lost = cgutils.false_bit if long else b.icmp_signed(">", b.load(alone), I64(0))
        with b.if_else(lost) as (by_itself, together):
            with by_itself, cgutils.for_range(b, n) as loop:
                b.call(task, [b.bitcast(environment, cgutils.voidptr_t), loop.index, I64(0)])
            with together, b.if_then(b.icmp_signed(">", n, I64(0))):
                b.store(I64(0), _field(b, state, DONE))
                b.store(b.ptrtoint(task, I64), _field(b, state, FUNCTION))
                b.store(b.ptrtoint(environment, I64), _field(b, state, ENVIRONMENT))
                ticket = _field(b, state, TICKET)
                calls = b.lshr(b.load_atomic(ticket, "monotonic", 8), I64(TASK_BITS))
                b.store_atomic(b.or_(b.shl(b.add(calls, I64(1)), I64(TASK_BITS)), n), ticket, "release", 8)
                _work_and_wait(b, state, n, long)
        failed = b.load(cgutils.gep_inbounds(b, environment, 0, 1))
        with b.if_then(b.icmp_signed("!=", failed, I64(0)), likely=False):
            context.call_conv.return_user_exc(b, RuntimeError, ("a shared task failed",))
        return context.get_dummy_value()

    return types.void(state, types.int64, function, args), codegen


def _work_and_wait(b: ir.IRBuilder, state: Value, n: Value, long: bool) -> None:
    work, wait, again, stalled, end = (
        b.append_basic_block(name) for name in ("work", "wait", "again", "stalled", "end")
    )
    looks = cgutils.alloca_once(b, I64)
    b.store(I64(0), looks)
    b.branch(work)
    b.position_at_end(work)
    taken, left = _take_task(b, state)
    with b.if_then(taken):
        _do_task(b, state, left, I64(0))
    # Another thread may have been quicker with one task while more are left.
    left = b.and_(b.load_atomic(_field(b, state, TICKET), "acquire", 8), I64(2**TASK_BITS - 1))
    b.cbranch(b.icmp_signed(">", left, I64(0)), work, wait)
    b.position_at_end(wait)
    b.cbranch(b.icmp_signed("<", b.load_atomic(_field(b, state, DONE), "acquire", 8), n), again, end)
    b.position_at_end(again)
    _pause(b)
    count = b.add(b.load(looks), I64(1))
    b.store(count, looks)
    b.cbranch(b.icmp_signed(">", count, b.load(_field(b, state, STALL))), stalled, wait)
    b.position_at_end(stalled)
    if not long:
        b.store(I64(1), _field(b, state, ALONE))
    _offer_core(b)
    b.branch(wait)
    b.position_at_end(end)


class Crew:
    """The caller and `threads` - 1 workers. One call at a time: its users take turns."""

    def __init__(self, threads: int):
        self.threads = threads
        self.state, self._alone_until = np.zeros(64, np.int64), 0.0
        self._bells: list[_Bell] = []
        if threads > 1:
            patience = _looks_in(AWAKE)
            self.state[STALL // 8] = _looks_in(STALLED)
        for number in range(1, threads):
            bell = _Bell()
            worker = threading.Thread(
                target=_work, args=(self.state, bell, patience, number), name="minirt", daemon=True
            )
            try:
                worker.start()
            except RuntimeError:  # no more threads are allowed: fewer do the same
                break
            self._bells.append(bell)
        weakref.finalize(self, _dismiss, self._bells)
        _crews.add(self)

    def call(self) -> np.ndarray:
        """The state, for a kernel that will share tasks: wakes those who sleep."""
        if self.state[ALONE // 8]:
            now = time.perf_counter()
            self._alone_until = self._alone_until or now + SECONDS_ALONE
            if now < self._alone_until:
                return self.state
            self.state[ALONE // 8] = self._alone_until = 0
        for bell in self._bells:
            bell.wanted = True
            if bell.asleep:
                bell.asleep = False
                bell.rung.release()
        return self.state

    def play(self, calls: Callable[[], None]) -> None:
        """Runs kernel calls that follow each other without Python between them, through which nobody sleeps.

        One who was about to sleep when the first was made would not be woken before the last.
        """
        self.state[STAY // 8] = 1
        try:
            self.call()
            calls()
        finally:
            self.state[STAY // 8] = 0


class _Bell:
    """How a worker is woken."""

    def __init__(self) -> None:
        self.asleep = False
        self.wanted = False  # since the worker last began to look for work
        self.dismissed = False
        self.rung = threading.Semaphore(0)


def _dismiss(bells: list[_Bell]) -> None:
    for bell in bells:
        bell.dismissed = True
        bell.rung.release()


_crews: weakref.WeakSet[Crew] = weakref.WeakSet()


def _forget_workers() -> None:
    """A forked process has the caller only, and perhaps a bell that was being rung."""
    for crew in _crews:
        crew._bells.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


def _work(state: np.ndarray, bell: _Bell, patience: int, number: int) -> None:
    while not bell.dismissed:
        bell.wanted = False
        _serve_until_idle(state, patience, number)
        bell.asleep = True
        # Until here it may have waited for Python's lock, while the caller took it for awake.
        if bell.wanted or state[STAY // 8]:
            bell.asleep = False
        else:
            bell.rung.acquire()


@functools.cache
def _looks_in(seconds: float) -> int:
    """How many times a worker looks for work in that time: a pause takes from 10 to 140 cycles."""
    nothing, looks, times = np.zeros(64, np.int64), 1000, []
    for _ in range(5):  # the first one compiles; any may be interrupted
        begun = time.perf_counter()
        _serve_until_idle(nothing, looks, 1)
        times.append(time.perf_counter() - begun)
    return max(looks, int(looks * seconds / min(times)))
