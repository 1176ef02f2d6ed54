"""The crew: every task once, whoever does it; nothing is left hanging by sleep, fork, exit, or a dropped crew."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from conftest import quiet_env

from kernels_cpu.compiled import kernel
from kernels_cpu.crew import ALONE, AWAKE, SECONDS_ALONE, Crew, _Bell, _work, share


@kernel
def _count(counts, step, task):  # type: ignore[no-untyped-def]
    counts[task] += step


@kernel
def count(crew, counts, n, step):  # type: ignore[no-untyped-def]
    share(crew, n, _count, (counts, step))


@kernel
def count_many(crew, counts, calls):  # type: ignore[no-untyped-def]
    for call in range(calls):
        share(crew, call % (len(counts) + 1), _count, (counts, 1))


@kernel
def _raise_at(bad, done, task):  # type: ignore[no-untyped-def]
    if task == bad:
        raise ValueError("task")
    done[task] = 1


@kernel
def raise_at(crew, n, bad, done):  # type: ignore[no-untyped-def]
    share(crew, n, _raise_at, (bad, done))


def workers() -> int:
    return sum(thread.name == "minirt" for thread in threading.enumerate())


def test_who_is_about_to_sleep_when_a_call_comes_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller saw it awake, and rings no bell; between the two lies Python's lock, which a worker may wait for."""
    crew, looked = Crew(1), 0
    bell = _Bell()
    crew._bells.append(bell)

    def look(*_: object) -> None:
        nonlocal looked
        looked += 1
        if looked == 1:
            crew.call()
        else:
            bell.dismissed = True
            bell.rung.release()

    monkeypatch.setattr("kernels_cpu.crew._serve_until_idle", look)
    worker = threading.Thread(target=_work, args=(crew.state, bell, 1, 1), daemon=True)
    worker.start()
    worker.join(10)
    asleep = worker.is_alive()
    bell.dismissed = True
    bell.rung.release()
    assert (asleep, looked) == (False, 2)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_task_once(threads: int) -> None:
    crew = Crew(threads)
    for n in (0, 1, 2, 3, 16, 17, 1000):
        counts = np.zeros(1001, np.int64)
        for _ in range(20):
            count(crew.call(), counts, n, 1)
        assert (counts[:n] == 20).all()
        assert not counts[n:].any()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_many_calls(threads: int) -> None:
    """100,000 of them, of 0 to 20 tasks, without a look at Python in between."""
    crew, counts = Crew(threads), np.zeros(20, np.int64)
    for _ in range(100):
        count_many(crew.call(), counts, 1000)
    expected = np.zeros(20, np.int64)
    for call in range(1000):
        expected[: call % 21] += 100
    assert np.array_equal(counts, expected)


def test_workers_that_slept_are_woken() -> None:
    """Each call finds workers asleep, awake, or on the way to either."""
    crew, counts = Crew(2), np.zeros(64, np.int64)
    pauses = [0.0, AWAKE / 2, AWAKE, AWAKE * 1.1, AWAKE * 20]
    for i in range(200):
        count(crew.call(), counts, 64, 1)
        time.sleep(pauses[i % len(pauses)])
    assert (counts == 200).all()


_thread = getattr(ctypes.pythonapi, "pthread_self", None)
if _thread is not None:
    _thread.argtypes, _thread.restype = [], ctypes.c_uint64


@kernel
def _sign(who, work, task):  # type: ignore[no-untyped-def]
    for i in range(work):
        who[task] += i * who[task - 1]
    who[task] = _thread()


@kernel
def sign(crew, who, work):  # type: ignore[no-untyped-def]
    share(crew, len(who), _sign, (who, work))


@pytest.mark.skipif(_thread is None or (os.cpu_count() or 1) < 2, reason="nothing to see here")
def test_workers_take_part() -> None:
    """Or else the other tests have tested nothing."""
    crew, who, deadline = Crew(2), np.zeros(64, np.uint64), time.monotonic() + 30
    while len(set(who)) < 2 and time.monotonic() < deadline:
        crew.state[ALONE // 8] = 0
        sign(crew.call(), who, 10_000)
    assert len(set(who)) == 2


def test_after_a_stall_the_caller_works_alone_for_a_while() -> None:
    crew, counts, n = Crew(2), np.zeros(8, np.int64), 0
    crew.state[ALONE // 8] = 1
    begun = time.perf_counter()
    while crew.state[ALONE // 8]:
        count(crew.call(), counts, 8, 1)
        n += 1
    assert time.perf_counter() - begun >= SECONDS_ALONE
    assert (counts == n).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_task_that_fails_is_heard_of(threads: int) -> None:
    crew, done = Crew(threads), np.zeros(10, np.int64)
    with pytest.raises(RuntimeError, match="a shared task failed"):
        raise_at(crew.call(), 10, 4, done)
    assert done.sum() == 9
    raise_at(crew.call(), 10, -1, done)
    assert done.all()


def test_several_crews_at_once() -> None:
    """Each of four Python threads has a crew of its own, and they outnumber the cores."""
    found: list[bool] = []

    def work(step: int) -> None:
        crew, counts = Crew(2), np.zeros(32, np.int64)
        for _ in range(2000):
            count(crew.call(), counts, 32, step)
        found.append(bool((counts == 2000 * step).all()))

    threads = [threading.Thread(target=work, args=(step,)) for step in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_a_dropped_crew_takes_its_threads_along() -> None:
    gc.collect()
    before, since = workers(), time.monotonic()
    while time.monotonic() < since + 1:  # those of crews that other tests dropped may be about to end
        time.sleep(0.01)
        if (now := workers()) != before:
            before, since = now, time.monotonic()
    counts = np.zeros(4, np.int64)
    for _ in range(20):
        crew = Crew(4)
        count(crew.call(), counts, 4, 1)
        del crew
    deadline = time.monotonic() + 10
    while workers() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert workers() == before
    assert (counts == 20).all()


SETUP = """
import os, sys, time
import numpy as np
from test_crew import Crew, count
crew, counts = Crew(3), np.zeros(64, np.int64)
count(crew.call(), counts, 64, 1)
"""


def script(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SETUP + textwrap.dedent(code)]
    env = quiet_env() | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_computes() -> None:
    """Its workers are gone; forks find them awake and asleep, and a child's child works too."""
    result = script("""
        for i in range(40):
            time.sleep(1e-4 * (i % 5))
            count(crew.call(), counts, 64, 1)
            pid = os.fork()
            if pid == 0:
                count(crew.call(), counts, 64, 1)
                if i == 20 and (pid := os.fork()):
                    assert os.waitpid(pid, 0)[1] == 0
                count(crew.call(), counts, 64, 1)
                (sys.exit if i % 20 == 0 else os._exit)(0 if (counts == i + 4).all() else 1)
            assert os.waitpid(pid, 0)[1] == 0
        count(crew.call(), counts, 64, 1)
        print((counts == 42).all())
    """)
    assert (result.stdout, result.stderr, result.returncode) == ("True\n", "", 0)


@pytest.mark.parametrize("idle", [0.0, AWAKE, 0.1])
def test_exit_does_not_wait_for_workers(idle: float) -> None:
    result = script(f"""
        crews = [Crew(3) for _ in range(5)]
        count(crews[0].call(), counts, 64, 1)
        time.sleep({idle})
        count(crew.call(), counts, 64, 1)
        print(time.time(), flush=True)
    """)
    ended = time.time()
    assert (result.stderr, result.returncode) == ("", 0)
    assert ended - float(result.stdout) < 5
