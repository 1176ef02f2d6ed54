"""How kernels are compiled: for this CPU, on first use, kept in the user's cache folder.

Numba's own cache looks only at the file a kernel stands in, but a kernel is made of intrinsics from several. So each
state of this package's sources has a folder of its own; Numba keys what is inside by CPU, features and its version.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba.core import sigutils
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc

# Sums may be reordered into vector lanes; infinities and NaN keep their meaning.
_OPTIONS = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}


def _cache_folder() -> str | None:
    """A folder for compiled kernels that can be written, or None."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):  # the specification says to ignore a relative one
        home = os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(numba.config.CACHE_DIR or os.path.join(home, "minirt")) / f"kernels-{digest.hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
        return str(folder)
    except OSError:
        return None


_FOLDER = _cache_folder()


@contextlib.contextmanager
def _our_folder() -> Iterator[None]:
    """Numba's cache folder is the whole process's setting, not ours to keep."""
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, _FOLDER or numba.config.CACHE_DIR
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a function when it is first called, for the types it is called with."""
    with _our_folder():
        dispatcher = numba.njit(cache=_FOLDER is not None, nogil=True, **_OPTIONS)(function)
    if _FOLDER is not None and may_compile():
        dispatcher._cache = _ForgivingCache(dispatcher._cache)
    return dispatcher


def callback(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compiles a function at once, as one that kernels may call by its address: `.address`."""

    def compiled(function: Callable[..., Any]) -> Any:
        c = CFunc(function, sigutils.normalize_signature(signature), locals={}, options=_OPTIONS)
        with _our_folder():
            if _FOLDER is not None:
                c._cache = _ForgivingCache(FunctionCache(function))
            c.compile()
        return c

    return compiled


class _ForgivingCache:
    """Numba's cache of a kernel, for which a damaged file, or a full disk, only means to compile."""

    def __init__(self, cache: Any):
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load_overload(self, signature: Any, context: Any) -> Any:
        try:
            return self._cache.load_overload(signature, context)
        except Exception:  # whatever unpickling damaged bytes raises
            with contextlib.suppress(Exception):
                self._cache.flush()
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        with contextlib.suppress(OSError, EOFError):
            self._cache.save_overload(signature, compiled)


def may_compile() -> bool:
    """Whether Numba is allowed to."""
    return not numba.config.DISABLE_JIT
