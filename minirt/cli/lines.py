"""Messages from the user: line editing and history on a terminal, plain lines from a pipe; several lines make one
message between triple quotes, after a trailing backslash, or when pasted."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..errors import ModelError
from .terminal import stdin_is_terminal

PROMPT, CONTINUED = "> ", ". "
MAX_LINE = 1 << 20  # bytes of a line through a pipe
MAX_HISTORY = 1000  # lines
_QUOTES = '"""'


class Lines(Protocol):
    def __call__(self, prompt: str) -> str:
        """The next line without its end. Raises EOFError, KeyboardInterrupt."""

    def close(self) -> None: ...


def open_lines() -> Lines:
    return TerminalLines() if stdin_is_terminal() else PipedLines()


def read_message(line: Callable[[str], str]) -> tuple[str, bool]:
    """The next message, and whether it may be a command: what stands between triple quotes may not."""
    text = line(PROMPT)
    if text.lstrip().startswith(_QUOTES):
        return _quoted(text.lstrip()[len(_QUOTES) :], line), False
    while _continues(text):
        text = text[:-1] + "\n" + line(CONTINUED)
    return text, True


def _quoted(text: str, line: Callable[[str], str]) -> str:
    with contextlib.suppress(EOFError):  # the end of the input ends the message too
        while not text.rstrip().endswith(_QUOTES):
            text += "\n" + line(CONTINUED)
        text = text.rstrip()[: -len(_QUOTES)]
    return text.strip("\n")


def _continues(text: str) -> bool:
    """True after an odd number of backslashes: a doubled one is meant."""
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1


class PipedLines:
    """Lines of standard input."""

    def __call__(self, prompt: str) -> str:
        line = sys.stdin.buffer.readline(MAX_LINE + 1) if sys.stdin is not None else b""
        if not line:
            raise EOFError
        if len(line) > MAX_LINE:
            raise ModelError(f"standard input: a line of more than {MAX_LINE >> 20} MiB")
        return line.decode(errors="replace").rstrip("\r\n")

    def close(self) -> None:
        pass


class TerminalLines:
    """Lines typed, with the editing and the history of readline where Python has it."""

    def __init__(self) -> None:
        self.readline: Any = None
        if sys.stdout.isatty():
            with contextlib.suppress(ImportError):
                import readline

                self.readline = readline
        if self.readline is not None:
            # A pasted text stays one message, line ends and all; Python switches this off by default.
            self.readline.parse_and_bind("set enable-bracketed-paste on")
            self.readline.set_history_length(MAX_HISTORY)
            with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
                self.readline.read_history_file(history_path())

    def __call__(self, prompt: str) -> str:
        if self.readline is not None:
            return input(prompt)
        if sys.stderr is not None:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def close(self) -> None:
        """Keeps the history for the next time, if the disk lets us."""
        if self.readline is not None:
            with contextlib.suppress(OSError, RuntimeError):
                path = history_path()
                path.parent.mkdir(parents=True, exist_ok=True)
                self.readline.write_history_file(path)
                path.chmod(0o600)


def history_path() -> Path:
    """$XDG_STATE_HOME/minirt/history, by default in ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path("~/.local/state").expanduser()) / "minirt" / "history"
