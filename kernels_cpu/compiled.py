"""How kernels are compiled: for this CPU, on first use, kept in the user's cache folder.

Numba's own cache looks only at the file a kernel stands in, but a kernel is made of intrinsics from several. So each
state of this package's sources has a folder of its own; Numba keys what is inside by CPU, features and its version.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Idle threads of GNU OpenMP spin for milliseconds by default and take the cores from BLAS, or from other programs.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numba

# Sums may be reordered into vector lanes; infinities and NaN keep their meaning.
_OPTIONS = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}


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


def _compiled(function: Callable[..., Any], **options: Any) -> Any:
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, _FOLDER or numba.config.CACHE_DIR
    try:
        dispatcher = numba.njit(cache=_FOLDER is not None, **_OPTIONS, **options)(function)
    finally:
        numba.config.CACHE_DIR = before  # the setting is the whole process's, not ours to keep
    if _FOLDER is not None and most_threads() > 0:
        dispatcher._cache = _ForgivingCache(dispatcher._cache)
    return dispatcher


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


def serial(function: Callable[..., Any]) -> Any:
    """Compiles a kernel that runs on the calling thread."""
    return _compiled(function)


def parallel(function: Callable[..., Any]) -> Any:
    """Compiles a kernel whose `prange` loops run on all threads."""
    return _compiled(function, parallel=True)


def most_threads() -> int:
    """Threads Numba can run, which NUMBA_NUM_THREADS may limit; 0 where it is told not to compile at all."""
    return 0 if numba.config.DISABLE_JIT else int(numba.config.NUMBA_NUM_THREADS)
