"""Checks and times the GPU engine on a machine with a card. Needs this tree, CuPy, minirt's dependencies and pytest.

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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from kernels_gpu import open_card  # noqa: E402
from minirt.bandwidth import attention, models, synthetic, throughput  # noqa: E402
from minirt.bandwidth.grid import Machine, commit, versions  # noqa: E402
from minirt.decoder import Decoder  # noqa: E402
from minirt.errors import ModelError, UsageError  # noqa: E402
from minirt.policies import Dense  # noqa: E402

TESTS = ("test_ops", "test_sparse_ops", "test_eviction_ops", "test_gpu_decoder", "test_gpu_card")
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


def run_tests(seconds: float) -> str:
    """Those of the card, on all shapes: "pass", "fail", or that there was no time."""
    files = [str(ROOT / "tests" / f"{name}.py") for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-k", ON_CARD, "-p", "no:cacheprovider", *files]
    try:
        found = subprocess.run(command, cwd=ROOT, env=environment(), check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not over after {seconds:.0f} s"
    return "pass" if found.returncode == 0 else "fail"


def run_sanitizer(seconds: float) -> str:
    """What compute-sanitizer found in the test of a whole model: "clean", its last lines, or why it did not run."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "not installed"
    cases = ["-q", "-k", f"{ON_CARD} and (models or every_policy)", "tests/test_gpu_decoder.py"]
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", *cases]
    try:
        found = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"not over after {seconds:.0f} s"
    return "clean" if found.returncode == 0 else "\n".join(found.stdout.splitlines()[-20:])


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


def driver() -> str:
    """Its version; empty if nvidia-smi is not there."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def benchmarks(ops: Any, copy: float) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """What is measured, by name, the targets first. One that fails, for want of memory perhaps, stops no other."""
    here = Machine(ops, 1)
    for at in ATTENTION:
        yield f"attention, B={at[0]} S={at[1]}", partial(attention_rows, here, copy, *at)
    for kind in ("Q8_0", "F16"):
        made: list[Decoder] = []  # by the first that needs it, and none of the type before
        yield f"{SHAPE} {kind}", partial(model_rows, here, copy, kind, made)
        if kind == "Q8_0":
            yield "throughput", partial(throughput_rows, here, copy, kind, made)
        made.clear()
    yield "latents", partial(latent_rows, here, copy)


def decoder_of(ops: Any, kind: str, made: list[Decoder]) -> Decoder:
    if not made:
        config = synthetic.config_of(SHAPE, LAYERS)
        made.append(Decoder(config, synthetic.weights_of(ops, config, kind), ops, Dense()))
    return made[0]


def row_of(record: dict[str, Any], copy: float, work: str, ratio: float | None = None, target: str = "") -> Row:
    return Row(work, record["ms"], record["gb_per_s"], 1e9 * record["gb_per_s"] / copy, ratio, target)


def alone(here: Machine, n_seq: int, depth: int, kv: str, policies: list[str]) -> list[dict[str, Any]]:
    cell = attention.Cell(n_seq, depth, *HEADS, kv)
    return attention.measure(here.ops, cell, policies, rounds=ROUNDS, room=here.room())


def attention_rows(here: Machine, copy: float, n_seq: int, depth: int, target: str) -> list[Row]:
    """Dense, SparQ over it, and quantised caches."""
    spec, name = f"sparq:r={min(32, HEADS[2])}:k={min(128, depth // 2)}", f"B={n_seq} S={depth}"
    dense, sparq = alone(here, n_seq, depth, "f16", ["dense", spec])
    rows = [
        row_of(dense, copy, f"dense attention f16 {name}", target=">= 85 % of copy" if n_seq == 64 else ""),
        row_of(sparq, copy, f"{spec} {name}", sparq["speed_up"], target),
    ]
    for kv in ("q8_0", "q4_0"):
        (other,) = alone(here, n_seq, depth, kv, ["dense"])
        rows.append(row_of(other, copy, f"dense attention {kv} {name}", dense["ms"] / other["ms"]))
    return rows


def latent_rows(here: Machine, copy: float) -> list[Row]:
    """Palu's latents over dense attention to float16."""
    n_seq, depth, targets = LATENTS
    (dense,) = alone(here, n_seq, depth, "f16", ["dense"])
    found = {kv: alone(here, n_seq, depth, kv, ["dense"])[0] for kv in targets}
    return [
        row_of(row, copy, f"{kv} B={n_seq} S={depth}", dense["ms"] / row["ms"], targets[kv])
        for kv, row in found.items()
    ]


def model_rows(here: Machine, copy: float, kind: str, made: list[Decoder]) -> list[Row]:
    """A model decoding at depth 0, and deep with SparQ over dense."""
    decoder, rows = decoder_of(here.ops, kind, made), []
    for depth, policies in ((0, ["dense"]), (DEPTH, ["dense", "sparq:r=16:k=S/16"])):
        work = models.Workload(1, depth, "f16", 8, ROUNDS)
        for record in models.measure(decoder, work, policies, room=here.room()):
            first, work_name = record["policy"] == "dense", f"{decoder.config.name} {kind} decode at {depth}"
            target = "" if depth and first else ">= 2.0x" if depth else ">= 80 % of copy"
            ratio = None if first else record["speed_up"]
            rows.append(row_of(record, copy, f"{work_name}, {record['policy']}", ratio, target))
    return rows


def throughput_rows(here: Machine, copy: float, kind: str, made: list[Decoder]) -> list[Row]:
    """Policies with a budget beside dense, as many sequences of each as the same memory holds."""
    work, rows = models.Workload(BATCH, FULL, "f16", 4, ROUNDS), []
    policies = ["dense", *(f"{name}:budget={BUDGET}" for name in ("window", "tova", "h2o"))]
    decoder = decoder_of(here.ops, kind, made)
    for record in throughput.measure(decoder, work, policies, room=here.room(), most=1024):
        if record["same"] == "memory":
            ratio = None if record["policy"] == "dense" else record["speed_up"]
            name = f"{record['policy']}, {record['n_sequences']} sequences"
            rows.append(row_of(record, copy, name, ratio, "" if ratio is None else ">= 6x"))
    return rows


def table(rows: list[Row]) -> str:
    lines = [f"{'work':44}{'ms':>10}{'GB/s':>9}{'of copy':>9}{'ratio':>8}  target"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        lines.append(f"{row.work:44}{row.ms:10.4f}{row.gb_per_s:9.0f}{100 * row.share:8.0f}%{ratio:>8}  {row.target}")
    return "\n".join(lines)


@click.command()
@click.option("--output", "-o", type=click.Path(dir_okay=False), help="A JSON file, renewed after each benchmark.")
@click.option("--minutes", default=8.5, show_default=True, help="No benchmark begins after so long.")
@click.option("--no-tests", is_flag=True, help="Benchmarks alone.")
def main(output: str | None, minutes: float, no_tests: bool) -> None:
    """Tests, sanitizes and times the GPU engine."""
    begun = time.monotonic()
    try:
        ops = open_card()
    except ModelError as e:
        raise click.ClickException(str(e)) from None
    facts: dict[str, Any] = {} if no_tests else {"tests": run_tests(30 * minutes)}
    if not no_tests:
        facts["sanitizer"] = run_sanitizer(10 * minutes)
    copy, rows, missing = ops.bandwidth(), [], {}
    facts |= {
        "date": time.strftime("%Y-%m-%d"), "card": ops.device.name, "capability": ops.device.capability,
        "driver": driver(), "cuda_of_driver": ops.device.driver, "copy_bandwidth_gb_per_s": copy / 1e9,
        "os": platform.platform(), "versions": versions(), "commit": commit(),
    }  # fmt: skip
    for name, measure in benchmarks(ops, copy):
        try:
            found = measure() if time.monotonic() - begun < 60 * minutes else None
        except (ModelError, UsageError, MemoryError, RuntimeError) as e:  # CuPy's errors are RuntimeErrors
            missing[name] = str(e)
            continue
        if found is None:
            missing[name] = "no time was left"
            continue
        rows += found
        click.echo(f"{name}: {time.monotonic() - begun:.0f} s", err=True)
        if output:
            Path(output).write_text(json.dumps(facts | {"rows": list(map(asdict, rows))}, indent=1) + "\n")
    facts |= {"rows": list(map(asdict, rows)), "missing": missing}
    if output:
        Path(output).write_text(json.dumps(facts, indent=1) + "\n")
    click.echo(table(rows))
    for name, why in missing.items():
        click.echo(f"not measured: {name}: {why}")
    tests, sanitizer = facts.get("tests", "not run"), facts.get("sanitizer", "not run")
    click.echo(f"{ops.device.name}, copy {copy / 1e9:.0f} GB/s; tests: {tests}, sanitizer: {sanitizer}")
    sys.exit(0 if tests in ("pass", "not run") else 1)


if __name__ == "__main__":
    main()
