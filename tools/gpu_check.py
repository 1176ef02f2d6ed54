"""Checks and times the GPU engine on a machine with a card; needs no network, and nothing but this tree and CuPy.

    python tools/gpu_check.py -o tools/results/gpu.json

First the tests of all ops and of whole models on the card, then compute-sanitizer over a few of them, where it is
installed, then the benchmarks of gpu_speed.py. A table comes last, and a JSON file with what the machine was. Takes
less than nine minutes on an H200; --minutes cuts the benchmarks short.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from gpu_speed import Row, attention_rows, config_of, model_rows, table, throughput_rows  # noqa: E402

import minirt  # noqa: E402
from kernels_gpu import open_card  # noqa: E402

TESTS = ("test_ops", "test_sparse_ops", "test_eviction_ops", "test_gpu_decoder")
ON_CARD = "gpu and not emulated"  # of their cases
ATTENTION = [
    (64, 4096, ">= 5.0x"), (64, 16384, ""), (16, 4096, ""), (1, 4096, ""), (1, 16384, ">= 1.5x"), (1, 65536, ">= 3x"),
]  # fmt: skip
DEPTH = 32768  # of whole models
BATCH, FULL, BUDGET = 8, 4096, 512  # dense sequences of so many tokens, and the tokens that other policies keep instead


def run_tests() -> bool:
    """Those of the card, on all shapes."""
    files = [str(ROOT / "tests" / f"{name}.py") for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-k", ON_CARD, "-p", "no:cacheprovider", *files]
    return subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode == 0


def run_sanitizer() -> str:
    """What compute-sanitizer found in the test of a whole model: "clean", its last lines, or that it is not there."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "not installed"
    cases = ["-q", "-k", f"{ON_CARD} and (models or every_policy)", "tests/test_gpu_decoder.py"]
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", *cases]
    found = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    return "clean" if found.returncode == 0 else "\n".join(found.stdout.splitlines()[-20:])


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


def benchmarks(ops: Any, copy: float) -> Iterator[Row]:
    model = config_of("7b")
    yield from attention_rows(ops, copy, model, ATTENTION)
    yield from model_rows(ops, copy, model, DEPTH, ("Q8_0", "F16"))
    yield from throughput_rows(ops, copy, model, FULL, BUDGET, BATCH)


def commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


@click.command()
@click.option("--output", "-o", type=click.Path(dir_okay=False), help="A JSON file.")
@click.option("--minutes", default=8.5, show_default=True, help="No benchmark begins after so long.")
@click.option("--no-tests", is_flag=True, help="Benchmarks alone.")
def main(output: str | None, minutes: float, no_tests: bool) -> None:
    """Tests, sanitizes and times the GPU engine."""
    begun, facts = time.monotonic(), {}
    if not no_tests:
        facts["tests_pass"] = run_tests()
        facts["sanitizer"] = run_sanitizer()
    ops = open_card()
    copy = ops.bandwidth()
    rows: list[Row] = []
    for row in benchmarks(ops, copy):
        rows.append(row)
        click.echo(f"{row.work}: {row.ms:.4f} ms", err=True)
        if time.monotonic() - begun > 60 * minutes:
            break
    facts |= {
        "date": time.strftime("%Y-%m-%d"), "card": ops.device.name, "capability": ops.device.capability,
        "driver_cuda": ops.device.driver, "copy_bandwidth_gb_per_s": copy / 1e9, "os": platform.platform(),
        "versions": {"minirt": minirt.__version__, **{name: version(name) for name in ("numpy", "cupy-cuda13x")}},
        "commit": commit(), "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    if output:
        Path(output).write_text(json.dumps(facts, indent=1) + "\n")
    click.echo(table(rows))
    click.echo(
        f"{ops.device.name}, copy {copy / 1e9:.0f} GB/s; tests: {facts.get('tests_pass')}, "
        f"sanitizer: {facts.get('sanitizer')}"
    )
    sys.exit(0 if facts.get("tests_pass", True) else 1)


if __name__ == "__main__":
    main()
