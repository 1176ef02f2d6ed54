"""What slow stages have found so far, in a file beside the output: an interrupted conversion goes on from there."""

from __future__ import annotations

import contextlib
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..errors import ModelError
from ..files import whole_file

SAVE_SECONDS = 10.0  # between two savings, or ...
SAVE_SHARE = 20  # ... so many times what the last one took, where that is more, but ...
MOST_SECONDS = 300.0  # ... never more than this

_MAGIC = "minirt-palu"
_DAMAGED = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError, MemoryError)

Report = Callable[[str, int, int], None]  # (stage, steps done, in all)


class SideFile:
    """The sums of every stage, by a key that names all they depend on.

    A file that is there is read at once: ModelError if it is damaged, or something else that must not be overwritten.
    """

    def __init__(self, path: Path, report: Report):
        self.path, self.report = path, report
        self._saved: dict[str, list[np.ndarray]] = {}  # of stages not yet asked for
        self._sums: dict[str, list[np.ndarray]] = {}
        self._due = 0.0
        if path.exists():
            self._saved = self._read()

    def steps(self, label: str, key: str, n: int, *sums: np.ndarray) -> Iterator[int]:
        """Yields the steps 0 ... n - 1 that are still to be done; the caller adds each step's share to the sums.

        sums come as zeros and leave with what was saved under the key. They are saved between two steps now and then,
        and after the last.
        """
        done = self._resume(key, n, sums)
        self.report(label, done, n)
        self._due = time.monotonic() + SAVE_SECONDS
        for i in range(done, n):
            yield i
            self._sums[key] = [np.array(i + 1), *sums]
            self.report(label, i + 1, n)
            if time.monotonic() >= self._due or i + 1 == n:
                self._save()

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _resume(self, key: str, n: int, sums: tuple[np.ndarray, ...]) -> int:
        """How many steps are in the sums now."""
        found = self._sums.get(key) or self._saved.pop(key, None)
        if found is None:
            if self._saved and not self._sums:
                warnings.warn(f"{self.path}: of another model or text, begins anew", stacklevel=3)
            return 0
        done, *values = found
        shapes = [(a.shape, a.dtype) for a in values]
        if shapes != [(a.shape, a.dtype) for a in sums] or done.shape or not 0 <= int(done) <= n:
            raise self._damaged()
        for into, value in zip(sums, values, strict=True):
            into[...] = value
        self._sums[key] = [done, *sums]
        return int(done)

    def _save(self) -> None:
        begun = time.monotonic()
        arrays = {f"{key}/{i}": a for key, found in self._sums.items() for i, a in enumerate(found)}
        with whole_file(self.path) as file:
            np.savez(file, **{_MAGIC: np.array(1)} | arrays)  # type: ignore[arg-type]
        now = time.monotonic()
        self._due = now + max(SAVE_SECONDS, min(SAVE_SHARE * (now - begun), MOST_SECONDS))

    def _read(self) -> dict[str, list[np.ndarray]]:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                if _MAGIC not in file.files:
                    raise KeyError(_MAGIC)
                found: dict[str, list[np.ndarray]] = {}
                for name in file.files:  # in the order in which they were written
                    if name != _MAGIC:
                        found.setdefault(name.rpartition("/")[0], []).append(file[name])
                return found
        except (*_DAMAGED, AttributeError, TypeError):  # the last two: an array, not an archive of arrays
            raise self._damaged() from None

    def _damaged(self) -> ModelError:
        return ModelError(f"{self.path}: damaged, or not made by minirt palu: remove it to begin anew")
