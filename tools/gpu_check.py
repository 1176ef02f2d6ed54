"""Checks and times the GPU engine on a machine with a card; needs no network, and nothing but this tree and CuPy.

    python tools/gpu_check.py -o tools/results/gpu.json

First the tests of all ops and of whole models on the card, then compute-sanitizer over a few of them, where it is
installed, then benchmarks on random models and caches. A table comes last, and a JSON file with what the machine was.
It shall take less than nine minutes on an H200; --minutes cuts the benchmarks short.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from kernels_gpu import open_card  # noqa: E402
from minirt.bandwidth import attention, models, synthetic, throughput  # noqa: E402
from minirt.bandwidth.grid import Machine, commit, versions  # noqa: E402
from minirt.decoder import Decoder  # noqa: E402
from minirt.policies import Dense  # noqa: E402

TESTS = ("test_ops", "test_sparse_ops", "test_eviction_ops", "test_gpu_decoder")
ON_CARD = "gpu and not emulated"  # of their cases
ATTENTION = [
    (64, 4096, ">= 5.0x"), (64, 16384, ""), (16, 4096, ""), (1, 4096, ""), (1, 16384, ">= 1.5x"), (1, 65536, ">= 3x"),
]  # fmt: skip
HEADS = (32, 32, 128)
LATENTS = (1, 65536, {"latent-f16": ">= 2.5x", "latent-q4": ">= 4x"})
SHAPE, LAYERS, DEPTH = "7b", None, 32768  # of whole models
BATCH, FULL, BUDGET = 8, 4096, 512  # dense sequences of so many tokens, and the tokens that other policies keep instead
ROUNDS = 7


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    work: str
    ms: float
    gb_per_s: float
    share: float  # of the copy bandwidth
    ratio: float | None = None  # to what the target is over
    target: str = ""


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
    here = Machine(ops, 1)
    yield from attention_rows(here, copy)
    yield from latent_rows(here, copy)
    for kind in ("Q8_0", "F16"):
        config = synthetic.config_of(SHAPE, LAYERS)
        decoder = Decoder(config, synthetic.weights_of(ops, config, kind), ops, Dense())
        yield from model_rows(here, copy, decoder, f"{SHAPE} {kind}")
        if kind == "Q8_0":
            yield from throughput_rows(here, copy, decoder)


def row_of(record: dict[str, Any], copy: float, work: str, ratio: float | None = None, target: str = "") -> Row:
    return Row(work, record["ms"], record["gb_per_s"], 1e9 * record["gb_per_s"] / copy, ratio, target)


def alone(here: Machine, n_seq: int, depth: int, kv: str, policies: list[str]) -> list[dict[str, Any]]:
    cell = attention.Cell(n_seq, depth, *HEADS, kv)
    return attention.measure(here.ops, cell, policies, rounds=ROUNDS, room=here.room())


def attention_rows(here: Machine, copy: float) -> Iterator[Row]:
    """Dense, SparQ over it, and quantised caches, at (sequences, depth, target)."""
    for n_seq, depth, target in ATTENTION:
        spec, name = f"sparq:r={min(32, HEADS[2])}:k={min(128, depth // 2)}", f"B={n_seq} S={depth}"
        dense, sparq = alone(here, n_seq, depth, "f16", ["dense", spec])
        yield row_of(dense, copy, f"dense attention f16 {name}", target=">= 85 % of copy" if n_seq == 64 else "")
        yield row_of(sparq, copy, f"{spec} {name}", sparq["speed_up"], target)
        for kv in ("q8_0", "q4_0"):
            (other,) = alone(here, n_seq, depth, kv, ["dense"])
            yield row_of(other, copy, f"dense attention {kv} {name}", dense["ms"] / other["ms"])


def latent_rows(here: Machine, copy: float) -> Iterator[Row]:
    """Palu's latents over dense attention to float16."""
    n_seq, depth, targets = LATENTS
    (dense,) = alone(here, n_seq, depth, "f16", ["dense"])
    for kv, target in targets.items():
        (latent,) = alone(here, n_seq, depth, kv, ["dense"])
        yield row_of(latent, copy, f"{kv} B={n_seq} S={depth}", dense["ms"] / latent["ms"], target)


def model_rows(here: Machine, copy: float, decoder: Decoder, name: str) -> Iterator[Row]:
    """A model decoding at depth 0, and deep with SparQ over dense."""
    for depth, policies in ((0, ["dense"]), (DEPTH, ["dense", "sparq:r=16:k=S/16"])):
        work = models.Workload(1, depth, "f16", 8, ROUNDS)
        for record in models.measure(decoder, work, policies, room=here.room()):
            first = record["policy"] == "dense"
            target = "" if depth and first else ">= 2.0x" if depth else ">= 80 % of copy"
            ratio = None if first else record["speed_up"]
            yield row_of(record, copy, f"{name} decode at {depth}, {record['policy']}", ratio, target)


def throughput_rows(here: Machine, copy: float, decoder: Decoder) -> Iterator[Row]:
    """Policies with a budget beside dense, as many sequences of each as the same memory holds."""
    work = models.Workload(BATCH, FULL, "f16", 4, ROUNDS)
    policies = ["dense", *(f"{name}:budget={BUDGET}" for name in ("window", "tova", "h2o"))]
    for record in throughput.measure(decoder, work, policies, room=here.room(), most=1024):
        if record["same"] == "memory":
            ratio = None if record["policy"] == "dense" else record["speed_up"]
            target = "" if ratio is None else ">= 6x"
            yield row_of(record, copy, f"{record['policy']}, {record['n_sequences']} sequences", ratio, target)


def table(rows: list[Row]) -> str:
    lines = [f"{'work':44}{'ms':>10}{'GB/s':>9}{'of copy':>9}{'ratio':>8}  target"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        lines.append(f"{row.work:44}{row.ms:10.4f}{row.gb_per_s:9.0f}{100 * row.share:8.0f}%{ratio:>8}  {row.target}")
    return "\n".join(lines)


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
        "versions": versions(), "commit": commit(), "rows": [asdict(row) for row in rows],
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
