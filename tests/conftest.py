"""Models and ways to run minirt that several tests share."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cuda_host import HostDevice, missing_compiler
from make_gguf import tiny_model

from minirt.errors import ModelError

Cli = Callable[..., Result]

# A shell's background job ignores Ctrl-C, and the processes that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure() -> None:
    """MINIRT_POOL=off: no two of CuPy's arrays in one allocation, so that compute-sanitizer knows where each ends."""
    if os.environ.get("MINIRT_POOL") == "off":
        import cupy

        cupy.cuda.set_allocator(None)


LONGEST = ("test_isa.py", "test_gpu_variants.py", "test_compiled.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes comes first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a byte-level BPE vocabulary: 268 tokens, context 256."""
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a SentencePiece vocabulary that adds BOS."""
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny-spm.gguf", tokenizer="llama")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct; the test is skipped where it is not installed."""
    from minirt.llama import default_model_path

    try:
        return default_model_path()
    except ModelError as e:
        pytest.skip(str(e))


@pytest.fixture
def cuda_host(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> HostDevice:
    """CUDA kernels on the CPU, built into pytest's own cache if it has one; skipped where there is no g++."""
    if reason := missing_compiler():
        pytest.skip(reason)
    cache = getattr(pytestconfig, "cache", None)
    return HostDevice(cache.mkdir("cuda_host") if cache else tmp_path_factory.getbasetemp() / "cuda_host")


@pytest.fixture
def cli() -> Cli:
    """cli("run", model, "-p", ..., input=b"...") in this process: .exit_code, .stdout, .stderr."""

    def invoke(*args: object, input: bytes | str | None = None) -> Result:
        from minirt.cli import main

        return CliRunner().invoke(main, [str(a) for a in args], input=input, prog_name="minirt")

    return invoke


def minirt(*args: object, shell: str = "", **options: object) -> subprocess.CompletedProcess[bytes]:
    """`python -m minirt ARGS` in a process of its own, or `... ARGS SHELL` with a pipe or a redirection in bash."""
    command = [sys.executable, "-m", "minirt", *(str(a) for a in args)]
    options = {"stdin": subprocess.DEVNULL, "timeout": 120, "capture_output": True, "env": quiet_env(), **options}
    if not shell:
        return subprocess.run(command, **options)  # type: ignore[call-overload, no-any-return]
    return subprocess.run(["bash", "-c", f'"$@" {shell}', "bash", *command], **options)  # type: ignore[call-overload, no-any-return]


def on_terminal(*args: object) -> str:
    """What `python -m minirt ARGS` prints when its standard output is a terminal."""
    master, slave = pty.openpty()
    command, out = [sys.executable, "-m", "minirt", *(str(a) for a in args)], b""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=slave, stderr=subprocess.PIPE, env=quiet_env())
    os.close(slave)
    try:
        while chunk := os.read(master, 65536):
            out += chunk
    except OSError:  # Linux's way to say that the other side is closed
        pass
    _, err = process.communicate(timeout=30)
    os.close(master)
    assert process.returncode == 0, err
    return out.decode().replace("\r\n", "\n")


def quiet_env() -> dict[str, str]:
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}


def only_line(text: str | bytes) -> str:
    """The one line on stderr; fails if there are more, or a traceback."""
    if isinstance(text, bytes):
        text = text.decode()
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("minirt: "), text
    return lines[0]


@pytest.fixture(scope="session")
def slow_tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command like `minirt`, but its default model is tiny, never ends an answer, and takes 50 ms for a token."""
    model = tiny_model(tmp_path_factory.mktemp("slow") / "slow.gguf")
    return [sys.executable, "-c", SLOW.format(model=str(model))]


SLOW = """
import time
import numpy as np
import minirt.llama
from minirt.cli import main
from minirt.sampling import Sampler
from minirt.session import Session

feed, step = Session.feed, Session.step

def without_end(logits):
    logits[[0, 1, 2, 3]] = -np.inf
    return logits

def slow_step(self, token):
    time.sleep(0.05)
    return without_end(step(self, token))

minirt.llama.default_model_path = lambda: {model!r}
Session.feed = lambda self, tokens, progress=None: without_end(feed(self, tokens, progress))
Session.step = slow_step
Sampler.is_greedy = False  # or steps would bring back tokens, not logits
main(prog_name="minirt")
"""


@pytest.fixture
def words() -> str:
    """Words of four characters and a space, each one different: 5 characters a word."""
    return " ".join(f"{i:04x}" for i in range(6000))


def squad(*questions: dict[str, Any], title: str = "A_title") -> dict[str, Any]:
    return {"data": [{"title": title, "paragraphs": [{"context": "A context.", "qas": list(questions)}]}]}


def asked(number: int = 0, *answers: str, **more: Any) -> dict[str, Any]:
    return {"id": f"id{number}", "question": f"What {number}?", "answers": [{"text": a} for a in answers], **more}
