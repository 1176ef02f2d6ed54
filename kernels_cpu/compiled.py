"""How kernels are compiled: for this CPU, on first use, kept in the user's cache folder.

Numba's own cache looks only at the file a kernel stands in, but a kernel is made of intrinsics from several; it has an
index that processes at the same time can bring out of step with the code; and it believes every byte it reads. So
there is a folder for each state of these sources and of all that decides what becomes of them, and in it a file for
each kernel and signature, with a checksum.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import sigutils
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from .isa import FEATURES

# Sums may be reordered into vector lanes; infinities and NaN keep their meaning.
_OPTIONS = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}

# What else changes the code that Numba makes.
_SETTINGS = ("BOUNDSCHECK", "DEBUGINFO_DEFAULT", "LOOP_VECTORIZE", "OPT", "SLP_VECTORIZE")

_DAY = 86400.0
_UNUSED = 30 * _DAY  # seconds after which a folder is removed

compilations: list[str] = []  # names of the kernels that this process had to compile ...
unkept: list[str] = []  # ... and of those among them that could not be written to the cache folder


def _cache_folder() -> Path:
    """Where compiled kernels are kept."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {sys.version} {sorted(FEATURES)}".encode())
    digest.update(repr([getattr(numba.config, name, None) for name in _SETTINGS]).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):  # the specification says to ignore a relative one
        home = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(numba.config.CACHE_DIR or os.path.join(home, "minirt")) / f"kernels-{digest.hexdigest()[:16]}"


def _use(folder: Path) -> None:
    """Makes the folder and notes, once a day, that it is in use; then removes those nobody has used for long."""
    with contextlib.suppress(OSError):  # a folder that cannot be written may still be read
        folder.mkdir(parents=True, exist_ok=True)
        marker, now = folder / "used", time.time()
        if marker.exists() and now - marker.stat().st_mtime < _DAY:
            return
        marker.touch()
        for other in folder.parent.glob("kernels-*"):
            newest = max((path.stat().st_mtime for path in (other, other / "used") if path.exists()), default=now)
            if now - newest > _UNUSED:
                shutil.rmtree(other, ignore_errors=True)


_FOLDER = _cache_folder()
_use(_FOLDER)


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a function when it is first called, for the types it is called with."""
    dispatcher = numba.njit(nogil=True, **_OPTIONS)(function)
    if may_compile():
        dispatcher._cache = _Cache(function)
        dispatcher.compile = _uninterrupted(dispatcher.compile)
    return dispatcher


def callback(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compiles a function at once, as one that kernels may call by its address: `.address`."""

    def compiled(function: Callable[..., Any]) -> Any:
        c = CFunc(function, sigutils.normalize_signature(signature), locals={}, options=_OPTIONS)
        c._cache = _Cache(function)
        _uninterrupted(c.compile)()
        return c

    return compiled


def _uninterrupted(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same work, but Ctrl-C waits for its end: LLVM's callbacks would swallow it and leave a kernel half made."""

    @functools.wraps(work)
    def wrapped(*args: Any) -> Any:
        before, pressed = signal.getsignal(signal.SIGINT), []
        if threading.current_thread() is not threading.main_thread() or not callable(before):
            return work(*args)
        signal.signal(signal.SIGINT, lambda *event: pressed.append(event))
        try:
            return work(*args)
        finally:
            signal.signal(signal.SIGINT, before)
            if pressed:
                before(*pressed[0])

    return wrapped


class _Cache(FunctionCache):
    """The files of one function. One that is damaged, missing, or cannot be written only means to compile."""

    def __init__(self, function: Callable[..., Any]):
        self._py_func = function  # what _index_key looks at
        self._name = f"{function.__module__}.{function.__qualname__}:{function.__code__.co_firstlineno}"

    def load_overload(self, signature: Any, context: Any) -> Any:
        context.refresh()
        key = self._index_key(signature, context.codegen())
        with contextlib.suppress(Exception):  # whatever unpickling, or Numba, makes of a stranger's bytes
            data = memoryview(self._path(key).read_bytes())
            if hashlib.sha256(data[32:]).digest() == data[:32]:
                name, stored_key, compiled = pickle.loads(data[32:])
                if (name, stored_key) == (self._name, key):
                    return CompileResult._rebuild(context, *compiled)
        return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        compilations.append(self._name)
        if compiled.library.has_dynamic_globals or compiled.lifted:  # good for this process only
            return
        key = self._index_key(signature, compiled.codegen)
        data = dumps((self._name, key, compiled._reduce()))
        path = self._path(key)
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            part.write_bytes(hashlib.sha256(data).digest() + data)
            part.replace(path)
        except OSError:
            unkept.append(self._name)
            with contextlib.suppress(OSError):
                part.unlink()

    def _path(self, key: Any) -> Path:
        digest = hashlib.sha256(f"{self._name} {key!r}".encode()).hexdigest()
        return _FOLDER / f"{self._py_func.__name__}-{digest[:32]}"


def may_compile() -> bool:
    """Whether Numba is allowed to."""
    return not numba.config.DISABLE_JIT
