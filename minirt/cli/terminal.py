"""What the commands hear and say: standard input and files, lines on stderr."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from pathlib import Path
from typing import BinaryIO

from ..errors import ModelError, UsageError
from ..progress import Progress

# C0 and C1 control characters and DEL, save newline and tab: what can move the cursor or reprogram a terminal.
_CONTROLS = {c: None for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\n\t"}


def printable(text: str) -> str:
    """Text without control characters: what a model says is data, not commands to a terminal."""
    return text.translate(_CONTROLS)


def one_line(text: str) -> str:
    """Text whose line ends became spaces: a name in a file may hold anything."""
    return " ".join(text.split())


def for_stdout(text: str) -> str:
    """What a model or its file says, fit for standard output: printable on a terminal, else as it is."""
    return printable(text) if sys.stdout.isatty() else text


def describe(error: OSError) -> str:
    """What went wrong with which file. Errors of writing name none: that is standard output, others are caught."""
    full = error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))
    name = error.filename or ("standard output" if full else "")
    return ": ".join(part for part in (str(name), error.strerror or str(error)) if part)


def say(text: str, *, faint: bool = False) -> None:
    """A line on stderr, if there is one."""
    if sys.stderr is None:
        return
    text = printable(text)
    if faint and sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb":
        text = f"\x1b[2m{text}\x1b[0m"
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def stdin_is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def read_all(source: BinaryIO, name: str, limit: int) -> bytes:
    """All of a stream; ModelError if that is more than `limit` bytes."""
    data = source.read(limit + 1)
    if len(data) > limit:
        raise ModelError(f"{name}: more than {limit >> 20} MiB")
    return data


def read_file(path: str, limit: int) -> bytes:
    """The bytes of a file or a named pipe. A device is refused: some never end."""
    if not path:
        raise UsageError("the name of a file is empty")
    try:
        with Path(path).open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
                raise ModelError(f"{path}: not a regular file")
            return read_all(file, path, limit)
    except OSError as e:
        raise ModelError(f"{path}: cannot read: {e.strerror}") from None


def read_stdin(limit: int) -> bytes:
    """All of standard input; says what it waits for if nothing comes."""
    if sys.stdin is None:
        return b""
    if stdin_is_terminal():
        say("(type the text, then Ctrl-D on a line of its own)", faint=True)
        return read_all(sys.stdin.buffer, "standard input", limit)
    with Progress("waiting for the end of standard input (to give none: < /dev/null)"):
        return read_all(sys.stdin.buffer, "standard input", limit)


def stdin_is_piped() -> bool:
    """True if standard input is a pipe or a file that someone meant us to read: no terminal, not /dev/null."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISREG(mode)


def argument_text(text: str, name: str) -> str:
    """A command line argument, which the system may have passed with bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{name}: not UTF-8 text") from None
    return text
