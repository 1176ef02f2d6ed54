"""Results as JSON lines, one for each example, so that an interrupted evaluation goes on where it ended."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ..errors import ModelError

KEY = ("model", "fingerprint", "kv", "n_ctx", "policy", "task", "length", "seed", "example", "digest")

_NUMBERS = ("score", "n_prompt", "n_steps", "bytes_read", "dense_bytes", "bytes_held", "seconds")
_PIECES, _PIECE = 64, 4096  # of a model file that tell it from another of its size


class Results:
    """The rows of a file and those added; without a path they are only kept in memory. A context manager.

    A row is a dict with the fields of KEY, which no other row has alike. Raises ModelError if the file cannot be
    written or holds something else. The end of a line that was being written when the program was killed is dropped.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        try:
            self._file = path.open("a+b")
            self._read(self._file)
        except OSError as e:
            raise ModelError(f"{path}: cannot write: {e.strerror}") from None

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row with these values of KEY."""
        return self.rows.get(tuple(key[name] for name in KEY))

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a row, and writes it before anything else happens."""
        if self._file is not None:
            try:
                self._file.write(json.dumps(row).encode() + b"\n")
                self._file.flush()
            except OSError as e:
                raise ModelError(f"{self.path}: cannot write: {e.strerror}") from None
        self._keep(row)

    def _read(self, file: BinaryIO) -> None:
        file.seek(0)
        lines = file.read().split(b"\n")
        end = lines.pop()
        for i, line in enumerate(lines, 1):
            self._parse(line, i)
        if not end:
            return
        try:
            self._parse(end, len(lines) + 1)
        except ModelError:
            if not _begins_row(end):
                raise
            file.truncate(sum(len(line) + 1 for line in lines))
        else:
            file.write(b"\n")

    def _parse(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line)
            if not all(isinstance(row[name], (int, float)) for name in _NUMBERS):
                raise ValueError
            self._keep(row)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ModelError(f"{self.path}: line {number} is no result of minirt eval") from None

    def _keep(self, row: dict[str, Any]) -> None:
        self.rows[tuple(row[name] for name in KEY)] = row


def _begins_row(line: bytes) -> bool:
    """True if a line can be the beginning of a row, and so nothing else is lost with it."""
    begin = f'{{"{KEY[0]}": "'.encode()
    return line[: len(begin)] == begin[: len(line)]


def fingerprint(path: Path) -> str:
    """Tells a file from others of the same name: a hash of its size and of pieces all over it."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(_PIECES):
            file.seek(i * max(size - _PIECE, 0) // (_PIECES - 1))
            digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]
