"""What goes wrong with a card, as the command line tells it: one line, an exit code, no traceback; a chat goes on."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Cli, only_line
from emulated import emulated_ops
from test_cuda_device import fake_cupy

import kernels_gpu
from minirt.devices import has_card, open_ops
from minirt.errors import ModelError

COMMANDS: dict[str, Callable[[Path], tuple[Any, ...]]] = {
    "run": lambda model: ("run", model, "-p", "the", "-n", "2", "--device", "gpu"),
    "chat": lambda model: ("chat", model, "-n", "2", "--device", "gpu"),
    "info": lambda model: ("info", model, "--device"),
}

FAULTS: list[tuple[dict[str, Any], int, str]] = [
    ({"count": 0}, 1, "no NVIDIA card was found"),
    ({"error": "cudaErrorInsufficientDriver: CUDA driver version is insufficient"}, 1, "driver is too old"),
    ({"error": "cudaErrorNoDevice: no CUDA-capable device is detected"}, 1, "no CUDA-capable device is detected"),
    ({"capability": (5, 2)}, 1, "has compute capability 5.2, minirt needs 6.1 or newer"),
]
OF_MODELS: list[tuple[dict[str, Any], int, str]] = [
    ({"free": 0, "cached": 0}, 2, "do not fit into 0.00 GiB that are free"),
    (
        {"compiles": False},
        1,
        "does not compile for capability 9.0 (6.1 or newer should do): products.cu(3): error: no such instruction",
    ),
    ({"room": False}, 1, "Card is out of memory"),
]
LONG = 33  # tokens, more than are read to warm up


class Broken(importlib.abc.MetaPathFinder):
    """A CuPy that is installed, and cannot be imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "cupy":
            raise ImportError("\n=====\nFailed to import CuPy.\n\nOriginal error:\n  libcudart.so.13: no such file")


def fails(cli: Cli, command: str, model: Path, code: int, says: str) -> None:
    result = cli(*COMMANDS[command](model), input="hello\n")
    assert (result.exit_code, result.stdout) == (code, "")
    lines = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]  # progress, of a slow machine
    assert says in only_line("\n".join(lines))


@pytest.mark.parametrize("command", COMMANDS)
def test_no_cupy(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    fails(cli, command, tiny, 1, "--device gpu needs CuPy: pip install 'minirt[cuda13]'")
    monkeypatch.delitem(sys.modules, "cupy")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    fails(cli, command, tiny, 1, "--device gpu: CuPy cannot be imported: Original error:")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("changes", "code", "says"), FAULTS, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_no_such_card(
    cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch, command: str, changes: dict[str, Any], code: int, says: str
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(**changes))
    fails(cli, command, tiny, code, says)


@pytest.mark.parametrize("command", ["run", "chat"])
@pytest.mark.parametrize(
    ("changes", "code", "says"), OF_MODELS, ids=lambda x: "-".join(x) if isinstance(x, dict) else ""
)
def test_a_card_that_takes_no_model(
    cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch, command: str, changes: dict[str, Any], code: int, says: str
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(**changes))
    fails(cli, command, tiny, code, says)


@pytest.mark.parametrize("changes", [{"compiles": False}, {"room": False}], ids=str)
def test_the_cpu_computes_what_a_card_cannot(
    cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Unless the card was asked for."""
    command = ("run", tiny, "-p", "the", "-n", 4, "--temp", 0, "--no-stats")
    monkeypatch.setattr("minirt.devices.has_cupy", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(**changes))
    result = cli(*command)
    assert result.exit_code == 0, result.stderr
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("minirt: Card"))
    assert line.endswith("; the CPU computes")
    assert result.stdout == cli(*command, "--device", "cpu").stdout


def test_a_card_that_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is not told of: the CPU computes."""
    monkeypatch.setattr("minirt.devices.has_cupy", lambda: True)
    for cupy in (None, fake_cupy(count=0), fake_cupy(capability=(5, 2))):
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        assert open_ops("auto", 1).name == "cpu"
        assert not has_card()


@pytest.mark.parametrize("of_steps", [False, True])
def test_out_of_memory_in_a_chat(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch, of_steps: bool) -> None:
    """One answer is missing, and said so; the others are as they would be without it."""
    card = emulated_ops().ops
    monkeypatch.setattr(card.device, "memory", (512 << 20, 1 << 30))
    monkeypatch.setattr(kernels_gpu, "open_card", lambda: card)
    empty, long = card.device.empty, False

    def limited(shape: tuple[int, ...], dtype: Any) -> Any:
        nonlocal long
        rows = shape[0] if len(shape) == 2 and dtype == np.float32 else 0  # of activations
        long = long or rows > LONG
        if long and rows == 1 if of_steps else rows > LONG:
            long = False
            raise ModelError("Card is out of memory: a shorter prompt takes less")
        return empty(shape, dtype)

    def chat(*messages: str) -> Any:
        short = ("--chat-template", "{% for m in messages %}{{ m.content }}{% endfor %}", "--no-stats", "--temp", 0)
        return cli("chat", tiny, "-n", 3, *short, "--device", "gpu", input="\n".join(messages))

    monkeypatch.setattr(card.device, "empty", limited)
    whole, cut = chat("hello", "the hen"), chat("hello", "the hen in the inn had ten men and a tin pan", "the hen")
    assert whole.exit_code == 0, whole.stderr
    first, *rest = cut.stdout.splitlines()
    assert (cut.exit_code, [first, rest[-1]]) == (1, whole.stdout.splitlines())
    assert len(rest) == 1 + of_steps  # the beginning of an answer
    assert "minirt: Card is out of memory: a shorter prompt takes less" in cut.stderr.splitlines()
