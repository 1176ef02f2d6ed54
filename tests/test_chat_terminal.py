"""minirt chat on a terminal: Ctrl-C, history, pasted texts."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import quiet_env
from test_chat import CHATML, FLAGS


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, command: list[str], home: Path):
        self.master, slave = pty.openpty()
        env = {**quiet_env(), "XDG_STATE_HOME": str(home), "TERM": "xterm", "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True, preexec_fn=_take_terminal
        )
        os.close(slave)
        self.text = ""

    def wait_for(self, pattern: str, seconds: float = 30) -> str:
        """Reads until the pattern is there; returns what came up to its end, and forgets that."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.text)):
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.text!r}"
            try:
                self.text += os.read(self.master, 65536).decode(errors="replace")
            except OSError:  # Linux's way to say that the other side is closed
                raise AssertionError(f"no {pattern!r} before the end, in {self.text!r}") from None
        found, self.text = self.text[: match.end()], self.text[match.end() :]
        return found

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C, a moment after what was waited for: between printing its prompt and waiting for keys Python's
        readline does not notice a signal."""
        time.sleep(0.3)
        self.type("\x03")

    def exit_code(self) -> int:
        deadline = time.monotonic() + 30
        while self.process.poll() is None and time.monotonic() < deadline:  # drained, or it could not end
            if select.select([self.master], [], [], 0.05)[0]:
                try:
                    self.text += os.read(self.master, 65536).decode(errors="replace")
                except OSError:
                    break
        return self.process.wait(5)

    def close(self) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.master)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


PROMPT = "> "
BEGUN = "\x1b\\[\\?2004l\r[^\r]{3}"  # the beginning of an answer, after readline has left the terminal


@pytest.fixture
def terminal(slow_tiny: list[str], tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal([*slow_tiny, "chat", *FLAGS[:4], "--chat-template", CHATML], tmp_path)
    terminal.wait_for("Ctrl-D leaves")
    terminal.wait_for(PROMPT)
    yield terminal
    assert "Traceback" not in terminal.text
    terminal.close()


def test_ctrl_c_stops_an_answer_and_keeps_it(terminal: Terminal) -> None:
    terminal.type("hello\n")
    terminal.wait_for(BEGUN)
    terminal.interrupt()
    terminal.wait_for("t/s.*MiB")
    terminal.wait_for(PROMPT)
    terminal.type("/show\n")
    terminal.wait_for("user: hello\r\nassistant: .{3}")
    terminal.wait_for(PROMPT)
    terminal.type("next\n")
    terminal.wait_for(BEGUN)
    terminal.interrupt()
    line = terminal.wait_for(r"prompt \d+ tokens")
    assert int(line.split()[-2]) < 30, "23 tokens of the first prompt and those of the answer are not computed again"
    terminal.wait_for(PROMPT)
    terminal.type("\x04")
    assert terminal.exit_code() == 0


def test_ctrl_c_at_the_prompt_hints_and_twice_exits(terminal: Terminal) -> None:
    terminal.interrupt()
    terminal.wait_for("Ctrl-C again")
    terminal.wait_for(PROMPT)
    terminal.type("/system\n")
    terminal.wait_for("no system prompt")
    terminal.wait_for(PROMPT)
    terminal.type("half a line")
    terminal.interrupt()  # not in a row with the first
    terminal.wait_for("Ctrl-C again")
    terminal.wait_for(PROMPT)
    terminal.interrupt()
    assert terminal.exit_code() == 130


def test_exit_and_end_of_input_exit_0(terminal: Terminal) -> None:
    terminal.type("/exit\n")
    assert terminal.exit_code() == 0


def test_history_is_kept_across_sessions(slow_tiny: list[str], terminal: Terminal, tmp_path: Path) -> None:
    pytest.importorskip("readline")
    terminal.type("/system remembered words\n")
    terminal.wait_for(PROMPT)
    terminal.type("\x04")
    assert terminal.exit_code() == 0
    history = tmp_path / "minirt" / "history"
    assert history.stat().st_mode & 0o777 == 0o600
    second = Terminal([*slow_tiny, "chat", *FLAGS[:4]], tmp_path)
    second.wait_for(PROMPT)
    second.type("\x1b[A")
    second.wait_for("remembered words")
    second.type("\n\x04")
    assert second.exit_code() == 0
    second.close()


def test_a_pasted_text_is_one_message(terminal: Terminal) -> None:
    readline = pytest.importorskip("readline")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("libedit knows no bracketed paste")
    terminal.type("\x1b[200~/system first\nsecond\x1b[201~\n")
    terminal.wait_for(PROMPT)
    terminal.type("/system\n")
    terminal.wait_for("first\r\nsecond")


def test_a_history_that_cannot_be_written_is_no_matter(slow_tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    terminal = Terminal([*slow_tiny, "chat", *FLAGS[:4]], tmp_path / "file")
    terminal.wait_for(PROMPT)
    terminal.type("/system\n")
    terminal.wait_for("no system prompt")
    terminal.wait_for(PROMPT)
    terminal.type("\x04")
    assert terminal.exit_code() == 0
    assert "Traceback" not in terminal.text
    terminal.close()
