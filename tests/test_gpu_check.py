"""tools/gpu_check.py and its benchmarks, on an emulated card: that they run, and count what they say."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import conftest
import pytest
from click.testing import CliRunner
from emulated import emulated_ops, has_card

from minirt import ModelError
from minirt.bandwidth.synthetic import Shape, config_of, weights_of

TOOLS = Path(__file__).parents[1] / "tools"
COLLECT = """
import sys
import pytest

class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
sys.exit(pytest.main(["--collect-only", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool, with the emulated card and small sizes."""
    module, ops = tool("gpu_check"), emulated_ops().ops
    monkeypatch.setattr(ops.device, "memory", (512 << 20, 1 << 30))
    monkeypatch.setattr(module, "open_card", lambda: ops)
    shape = Shape(2, 64, 4, 2, 32, 128, 96)
    sizes = {
        "HEADS": (4, 2, 32), "ATTENTION": [(2, 64, ">= 1x")], "UNAIMED": [], "LATENTS": (1, 64, {"latent-q4": ">= 1x"}),
        "SHAPE": shape, "DEPTH": 64, "BUDGET": 16, "FULL": 64, "BATCH": 1, "ROUNDS": 1,
    }  # fmt: skip
    for name, value in sizes.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr("minirt.bandwidth.attention.TOUCHED", 0)
    monkeypatch.setattr("minirt.bandwidth.paired.PIECE", 0.0)
    return module


def test_benchmarks(check: Any, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    result = CliRunner().invoke(check.main, ["--no-tests", "-o", str(output)])
    assert result.exit_code == 0, (result.output, result.exception)
    facts = json.loads(output.read_text())
    rows = {row["work"]: row for row in facts["rows"]}
    assert facts["card"] == "emulated"
    assert rows["sparq:r=32:k=32 B=2 S=64"]["ratio"] > 0
    assert rows["latent-q4 B=1 S=64"]["ratio"] > 0
    dense = rows["dense attention f16 B=2 S=64"]
    assert dense["gb_per_s"] * dense["ms"] == pytest.approx(2 * 64 * 2 * 32 * 2 * 2 / 1e6)
    assert "tova:budget=16, 4 sequences" in rows
    assert result.output.splitlines()[-1].startswith("emulated, copy ")


def test_layers_of_a_random_model_are_apart_on_a_card() -> None:
    ops, config = emulated_ops().ops, config_of(Shape(3, 64, 4, 2, 32, 128, 96))
    layers = weights_of(ops, config, "Q8_0").layers
    assert len({m.planes[0].ctypes.data for layer in layers for m in (layer.wq, layer.wo)}) == 3 * 2


def test_no_benchmark_begins_that_would_take_too_long(check: Any) -> None:
    result = CliRunner().invoke(check.main, ["--no-tests", "--minutes", "0"])
    assert result.exit_code == 1, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == 1 + 6 + 1
    assert all("no time was left" in line for line in lines[1:-1])


def test_what_is_slow_is_expected_of_the_others(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]

    def taking(seconds: float) -> Any:
        def measure() -> list[Any]:
            clock[0] += seconds
            return []

        return measure

    monkeypatch.setattr(check.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(check, "START", 10.0)
    some = [check.Benchmark("as expected", taking(10)), check.Benchmark("slow", taking(30))]
    some += [check.Benchmark("too long", taking(0), weights=1e9), check.Benchmark("fits", taking(30))]
    found = [result for _, result in check.measured(iter(some), 170.0)]
    assert found == [[], [], "no time was left for what may take 33 s", []]


def test_what_fails_stops_nothing_else(check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    for name in ("attention_rows", "throughput_rows", "latent_rows"):
        monkeypatch.setattr(check, name, fail)
    monkeypatch.setenv("MINIRT_COMMIT", "abc123")
    output = tmp_path / "gpu.json"
    result = CliRunner().invoke(check.main, ["--no-tests", "-o", str(output)])
    assert result.exit_code == 1, result.output
    facts = json.loads(output.read_text())
    assert facts["commit"] == "abc123"
    assert facts["missing"] == dict.fromkeys(("attention, B=2 S=64", "throughput", "latents"), "out of memory")
    assert [row["target"] for row in facts["rows"]] == [">= 80 % of copy", ">= 80 % of copy", "", ">= 2.0x"]


def test_what_has_no_target_may_fail(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "benchmarks", lambda *_: iter([check.Benchmark("other", lambda: 1 / 0, aimed=False)]))
    monkeypatch.setattr(check, "commit", lambda: "")
    result = CliRunner().invoke(check.main, ["--no-tests"])
    assert result.exit_code == 0, result.output
    assert "not measured: other: division by zero" in result.stdout


@pytest.mark.parametrize(("code", "text"), [(0, "clean"), (9, "ERROR SUMMARY: 1 error")])
def test_what_the_sanitizer_finds(
    check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, text: str
) -> None:
    """It is found in CUDA's folder, given the small tests without the pool, and an error is one of the whole check."""
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$MINIRT_POOL $@" >> {tmp_path}/calls\necho "ERROR SUMMARY: 1 error"\nexit {code}'
    )
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(check, "benchmarks", lambda *_: iter([]))
    monkeypatch.setattr(check, "run_tests", lambda _: check.Found(True, "pass"))
    output = tmp_path / "gpu.json"
    result = CliRunner().invoke(check.main, ["-o", str(output)])
    assert result.exit_code == (1 if code else 0), result.output
    facts = json.loads(output.read_text())
    assert [facts["tests"], facts["memcheck"], facts["racecheck"]] == ["pass", text, text]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[:3] for call in calls] == [["off", "--tool", name] for name in ("memcheck", "racecheck")]
    assert all("tests/test_gpu_decoder.py" in call for call in calls)


def test_what_takes_too_long_is_ended_with_all_it_began(check: Any) -> None:
    begun = time.monotonic()
    assert check.ended(["sh", "-c", "echo begun; sleep 60 & sleep 60"], 0.5) == (None, "begun\n")
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize(
    ("file", "cases", "start"),
    [
        ("test_progress", "not emulated", "pass: "),
        ("test_progress", "no such test", "fail: no tests ran"),
        *([] if has_card() else [("test_gpu_card", "a_prompt", "fail: 1 skipped")]),
    ],
)
def test_tests_of_the_card(check: Any, monkeypatch: pytest.MonkeyPatch, file: str, cases: str, start: str) -> None:
    """Several at once, where that is installed; if none ran, that is a failure."""
    monkeypatch.setattr(check, "TESTS", (file,))
    monkeypatch.setattr(check, "ON_CARD", cases)
    found = check.run_tests(120)
    assert (found.good, found.text[: len(start)]) == (start == "pass: ", start)


def test_arrays_without_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    allocators: list[Any] = []
    cuda = SimpleNamespace(set_allocator=allocators.append)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    for value, expected in (("", []), ("off", [None])):
        monkeypatch.setenv("MINIRT_POOL", value)
        conftest.pytest_configure()
        assert allocators == expected


def test_no_card_is_one_line(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ModelError("--device gpu: no card")

    monkeypatch.setattr(check, "open_card", fail)
    result = CliRunner().invoke(check.main, [])
    assert (result.exit_code, result.stderr) == (1, "Error: --device gpu: no card\n")


def test_its_tests_need_nothing_but_minirt_and_pytest() -> None:
    """Of what the extra "dev" brings: a bare machine has not all of it, and one file that cannot be imported ends a run
    of pytest before the first test, or is left out in silence."""
    needed, dev = {"pytest"}, set()
    for requirement in requires("minirt") or []:
        name = re.split(r"[^\w-]", requirement)[0]
        (dev if 'extra == "dev"' in requirement else needed if "extra ==" not in requirement else set()).add(name)
    absent = [module for module, names in packages_distributions().items() if dev.intersection(names) - needed]
    assert "gguf" in absent
    files, tests = [f"{name}.py" for name in tool("gpu_check").TESTS], Path(__file__).parent
    command = [sys.executable, "-c", COLLECT.format(absent=absent), *files]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    found = subprocess.run(command, cwd=tests, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    collected = {line.partition("::")[0].rpartition("/")[2] for line in found.stdout.splitlines() if "::" in line}
    assert collected == {*files}
