"""tools/gpu_check.py and its benchmarks, on an emulated card: that they run, and count what they say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner
from emulated import emulated_ops

from minirt import ModelError
from minirt.bandwidth.synthetic import Shape

TOOLS = Path(__file__).parents[1] / "tools"


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
        "HEADS": (4, 2, 32), "ATTENTION": [(2, 64, ">= 1x")], "LATENTS": (1, 64, {"latent-q4": ">= 1x"}),
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


def test_no_benchmark_begins_when_time_is_over(check: Any) -> None:
    result = CliRunner().invoke(check.main, ["--no-tests", "--minutes", "0"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split(": ")[-1] for line in lines[1:-1]] == 5 * ["no time was left"]


def test_what_fails_stops_nothing_else(check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    for name in ("attention_rows", "throughput_rows", "latent_rows"):
        monkeypatch.setattr(check, name, fail)
    output = tmp_path / "gpu.json"
    result = CliRunner().invoke(check.main, ["--no-tests", "-o", str(output)])
    assert result.exit_code == 0, result.output
    facts = json.loads(output.read_text())
    assert facts["missing"] == dict.fromkeys(("attention, B=2 S=64", "throughput", "latents"), "out of memory")
    assert len(facts["rows"]) == 6


def test_no_card_is_one_line(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ModelError("--device gpu: no card")

    monkeypatch.setattr(check, "open_card", fail)
    result = CliRunner().invoke(check.main, [])
    assert (result.exit_code, result.stderr) == (1, "Error: --device gpu: no card\n")
