"""The progress line: silence first, one line in a log, redrawn and erased on a terminal."""

from __future__ import annotations

import io
import os
import pty
import select
import time
from collections.abc import Iterator
from typing import TextIO

import pytest

import minirt.progress
from minirt.progress import Progress


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minirt.progress, "PATIENCE", 0.02)
    monkeypatch.setattr(minirt.progress, "INTERVAL", 0.0)


@pytest.fixture
def terminal() -> Iterator[tuple[TextIO, int]]:
    master, slave = pty.openpty()
    with open(slave, "w") as stream:
        yield stream, master
    os.close(master)


def shown(master: int) -> str:
    text = b""
    while select.select([master], [], [], 0.2)[0]:
        text += os.read(master, 65536)
    return text.decode().replace("\r\x1b[K", "^")


def test_quick_work_says_nothing() -> None:
    log = io.StringIO()
    with Progress("working", stream=log) as report:
        for i in range(9):
            report(i, 9)
            time.sleep(0.05)
    time.sleep(1.0)  # a timer left behind would speak now
    assert log.getvalue() == ""


def test_a_second_of_work_is_one_plain_line_in_a_log() -> None:
    log, begun = io.StringIO(), time.monotonic()
    with Progress("working", " steps", log) as report:
        while time.monotonic() < begun + 1.4:
            report(1, 2)
            time.sleep(0.05)
            assert not log.getvalue() or time.monotonic() > begun + 0.95
    assert log.getvalue() == "minirt: working ...\n"


def test_one_long_step_is_not_silent(impatient: None) -> None:
    log = io.StringIO()
    with Progress("compiling", stream=log):
        time.sleep(0.3)
    assert log.getvalue() == "minirt: compiling ...\n"


def test_a_terminal_sees_it_redrawn_and_erased(impatient: None, terminal: tuple[TextIO, int]) -> None:
    stream, master = terminal
    with Progress("working", " steps", stream) as report:
        time.sleep(0.3)
        report(1, 4)
        report(4, 4)
    assert shown(master) == "^working ...^working  25 % (1 of 4 steps)^working 100 % (4 of 4 steps)^"


def test_it_can_begin_again(impatient: None) -> None:
    log = io.StringIO()
    report = Progress("working", stream=log)
    for _ in range(2):
        report(0, 2)
        time.sleep(0.3)
        report.close()
    assert log.getvalue() == 2 * "minirt: working ...\n"


@pytest.mark.parametrize("closed", [True, False])
def test_without_stderr_the_work_goes_on(impatient: None, closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    log.close()
    monkeypatch.setattr("sys.stderr", None)
    with Progress("working", stream=log if closed else None) as report:
        time.sleep(0.3)
        report(1, 2)
