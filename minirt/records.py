"""Results as JSON lines, so that an interrupted run goes on where it ended."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, ClassVar, TypeVar

from .errors import ModelError

Own = TypeVar("Own", bound="Records")


class Records:
    """The rows of a file and those added; without a path they are only kept in memory. A context manager.

    A row is a dict with the fields of `key`, which no other row has alike; one that lacks a field of `defaults` has its
    value there, so that a key can grow. Raises ModelError if the file cannot be
    written or holds something else. The end of a line that was being written when the program was killed is dropped.
    """

    key: ClassVar[tuple[str, ...]] = ()
    numbers: ClassVar[tuple[str, ...]] = ()  # fields that are numbers, by which a row is known
    defaults: ClassVar[dict[str, Any]] = {}
    program: ClassVar[str] = ""

    def __init__(self, path: Path | None):
        self.path = path
        self.rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        if path.exists() and not path.is_file():  # a device may have no end
            raise ModelError(f"{path}: not a regular file")
        try:
            self._file = path.open("a+b")
            self._read(self._file)
        except OSError as e:
            raise ModelError(f"{path}: cannot write: {e.strerror}") from None

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row with these values of the key."""
        return self.rows.get(self._key(key))

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
            if not self._begins_row(end):
                raise
            file.truncate(sum(len(line) + 1 for line in lines))
        else:
            file.write(b"\n")

    def _parse(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line)
            self.check(row)
            self._keep(row)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            raise ModelError(f"{self.path}: line {number} is no result of {self.program}") from None

    def check(self, row: dict[str, Any]) -> None:
        """Raises ValueError, TypeError, KeyError or OverflowError if a row that was read is none of these."""
        if not all(isinstance(row[name], (int, float)) for name in self.numbers):
            raise ValueError

    def _keep(self, row: dict[str, Any]) -> None:
        self.rows[self._key(row)] = row

    def _key(self, row: dict[str, Any]) -> tuple[Any, ...]:
        own = self.defaults | row
        return tuple(own[name] for name in self.key)

    def _begins_row(self, line: bytes) -> bool:
        """True if a line can be the beginning of a row, and so nothing else is lost with it."""
        begin = f'{{"{self.key[0]}": "'.encode()
        return line[: len(begin)] == begin[: len(line)]
