"""Checks and times the GPU engine on a machine with a card. Needs this tree, CuPy, minirt's dependencies and pytest.

    python tools/gpu_check.py -o tools/results/gpu.json

First the tests of all ops and of whole models on the card, then compute-sanitizer over a few of them, where it is
installed, then benchmarks on random models and caches, those with a target first; then, if time is left, the races that
compute-sanitizer sees. A table comes last, and a JSON file with what the machine was. The exit code is 1 if something
failed, or if a target was not measured. It takes less than nine minutes: what would take more is not begun, or ended.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from kernels_gpu import open_card  # noqa: E402
from minirt.bandwidth import attention, models, synthetic, throughput  # noqa: E402
from minirt.bandwidth.grid import Machine, commit, versions  # noqa: E402
from minirt.decoder import Decoder  # noqa: E402
from minirt.errors import ModelError  # noqa: E402
from minirt.policies import Dense  # noqa: E402

PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
TESTS = ("test_ops", "test_sparse_ops", "test_eviction_ops", "test_gpu_decoder", "test_gpu_card")
ON_CARD = "gpu and not emulated"  # of their cases
WORKERS = 8  # processes that run them, at most: most of the time goes into compiling
SANITIZED = {"memcheck": "test_models or every_policy", "racecheck": "test_models and llama or sparq or h2o"}
SHARES = {"tests": 0.33, "memcheck": 0.14}  # of the time, at most
RACES = 20  # seconds, if no more are left racecheck does not begin
ATTENTION = [(64, 4096, ">= 5.0x"), (1, 16384, ">= 1.5x"), (1, 65536, ">= 3x")]
UNAIMED = [(1, 4096)]  # attention that has no target
HEADS = (32, 32, 128)
LATENTS = (1, 65536, {"latent-f16": ">= 2.5x", "latent-q4": ">= 4x"})
SHAPE, LAYERS, DEPTH = "7b", None, 32768  # of whole models
BATCH, FULL, BUDGET = 8, 4096, 512  # dense sequences of so many tokens, and the tokens that other policies keep instead
ROUNDS = 7
CHECKED = 1 << 18  # rows of keys that the reference is asked for
# What a benchmark should take, in seconds: kernels are compiled and checked, then weights and caches are made.
START, WEIGHTS_MADE, CACHES_MADE = 12.0, 1e9, 4e9  # bytes per second


class Found(NamedTuple):
    """By the tests, or by compute-sanitizer."""

    good: bool  # nothing that failed
    text: str


@dataclass(frozen=True)
class Benchmark:
    name: str
    measure: Callable[[], list[Row]]
    weights: float = 0.0  # bytes that it makes
    caches: float = 0.0
    aimed: bool = True  # whether it has a target

    @property
    def seconds(self) -> float:
        return START + self.weights / WEIGHTS_MADE + self.caches / CACHES_MADE


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    work: str
    ms: float
    gb_per_s: float
    share: float  # of the copy bandwidth
    ratio: float | None = None  # to what the target is over
    target: str = ""


def run_tests(seconds: float) -> Found:
    """Those of the card, on all shapes; by several processes if pytest-xdist is there."""
    several = importlib.util.find_spec("xdist") is not None
    n = max(1, min(WORKERS, (os.cpu_count() or 1) // 2))
    workers = ["-p", "xdist", "-n", str(n), "--dist", "worksteal"] if several else []
    files = [f"tests/{name}.py" for name in TESTS]
    code, said = ended([*PYTEST, *workers, "-k", ON_CARD, *files], seconds)
    click.echo(said, err=True)
    if code is None:
        return Found(False, f"not over after {seconds:.0f} s")
    summary = said.strip().rpartition("\n")[2]
    good = code == 0 and " passed" in summary  # not where all were skipped
    return Found(good, f"{'pass' if good else 'fail'}: {summary}")


def run_sanitizer(tool: str, seconds: float) -> Found:
    """What compute-sanitizer found in tests of whole models: "clean", its last lines, or why it did not run."""
    program = sanitizer()
    if program is None:
        return Found(True, "not installed")
    cases = ["-k", f"{ON_CARD} and ({SANITIZED[tool]})", "tests/test_gpu_decoder.py"]
    # Without CuPy's pool each array has an allocation of its own, whose bounds are known.
    code, said = ended([program, "--tool", tool, "--error-exitcode", "9", *PYTEST, *cases], seconds, MINIRT_POOL="off")
    if code is None:
        return Found(True, f"not over after {seconds:.0f} s")
    if "Device not supported" in said:
        return Found(True, "does not know this machine's card")
    return Found(code == 0, "clean" if code == 0 else "\n".join(said.splitlines()[-20:]))


def ended(command: Sequence[str], seconds: float, **variables: str) -> tuple[int | None, str]:
    """The exit code of a command, None if it took too long and was ended with all that it began, and what it said."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | variables
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            return None, said
    return process.returncode, said


def sanitizer() -> str | None:
    """compute-sanitizer, where programs are or where CUDA's toolkit usually is."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def driver() -> str:
    """Its version; empty if nvidia-smi is not there."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def nvrtc() -> str:
    """The version of what compiles the kernels; empty if CuPy has none."""
    try:
        from cupy.cuda import nvrtc as library

        return ".".join(map(str, library.getVersion()))
    except (ImportError, OSError, RuntimeError):
        return ""


def benchmarks(ops: Any, copy: float) -> Iterator[Benchmark]:
    """What is measured, in the order of the targets."""
    here, made, config = Machine(ops, 1), list[Decoder](), synthetic.config_of(SHAPE, LAYERS)
    token = 4 * config.n_layer * config.n_head_kv * config.head_dim  # bytes in a cache of float16
    for n_seq, depth, target in ATTENTION:
        measure = partial(attention_rows, here, copy, n_seq, depth, target)
        yield Benchmark(f"attention, B={n_seq} S={depth}", measure, caches=attention.MOST_BYTES)
    for kind in ("F16", "Q8_0"):
        made.clear()
        weights = synthetic.weight_bytes(config, kind)
        yield Benchmark(f"{SHAPE} {kind}", partial(model_rows, here, copy, kind, made, 0), weights)
    weights = 0 if made else weights
    deep = partial(model_rows, here, copy, kind, made, DEPTH)
    yield Benchmark(f"{SHAPE} {kind} at {DEPTH}", deep, weights, 1.5 * DEPTH * token)
    weights = 0 if made else weights
    yield Benchmark("throughput", partial(throughput_rows, here, copy, kind, made), weights, 5 * BATCH * FULL * token)
    made.clear()
    yield Benchmark("latents", partial(latent_rows, here, copy), caches=3 * attention.MOST_BYTES)
    for n_seq, depth in UNAIMED:
        measure = partial(attention_rows, here, copy, n_seq, depth, "")
        yield Benchmark(f"attention, B={n_seq} S={depth}", measure, caches=attention.MOST_BYTES, aimed=False)


def decoder_of(ops: Any, kind: str, made: list[Decoder]) -> Decoder:
    """A random model, made by the first that needs it."""
    if not made:
        config = synthetic.config_of(SHAPE, LAYERS)
        made.append(Decoder(config, synthetic.weights_of(ops, config, kind), ops, Dense()))
    return made[0]


def row_of(record: dict[str, Any], copy: float, work: str, ratio: float | None = None, target: str = "") -> Row:
    return Row(work, record["ms"], record["gb_per_s"], 1e9 * record["gb_per_s"] / copy, ratio, target)


def alone(here: Machine, n_seq: int, depth: int, kv: str, policies: list[str]) -> list[dict[str, Any]]:
    cell = attention.Cell(n_seq, depth, *HEADS, kv)
    return attention.measure(here.ops, cell, policies, rounds=ROUNDS, room=here.room(), checked=CHECKED)


def attention_rows(here: Machine, copy: float, n_seq: int, depth: int, target: str) -> list[Row]:
    """Dense, and SparQ over it."""
    spec, name = f"sparq:r={min(32, HEADS[2])}:k={min(128, depth // 2)}", f"B={n_seq} S={depth}"
    dense, sparq = alone(here, n_seq, depth, "f16", ["dense", spec])
    return [
        row_of(dense, copy, f"dense attention f16 {name}", target=">= 85 % of copy" if n_seq == 64 else ""),
        row_of(sparq, copy, f"{spec} {name}", sparq["speed_up"], target),
    ]


def latent_rows(here: Machine, copy: float) -> list[Row]:
    """Palu's latents over dense attention to float16."""
    n_seq, depth, targets = LATENTS
    (dense,) = alone(here, n_seq, depth, "f16", ["dense"])
    found = {kv: alone(here, n_seq, depth, kv, ["dense"])[0] for kv in targets}
    return [
        row_of(row, copy, f"{kv} B={n_seq} S={depth}", dense["ms"] / row["ms"], targets[kv])
        for kv, row in found.items()
    ]


def model_rows(here: Machine, copy: float, kind: str, made: list[Decoder], depth: int) -> list[Row]:
    """A model decoding at depth 0, or deep with SparQ over dense."""
    decoder, rows = decoder_of(here.ops, kind, made), []
    work = models.Workload(1, depth, "f16", 8, ROUNDS)
    for record in models.measure(decoder, work, ["dense", "sparq:r=16:k=S/16"][: 2 if depth else 1], room=here.room()):
        first, name = record["policy"] == "dense", f"{decoder.config.name} {kind} decode at {depth}"
        target = "" if depth and first else ">= 2.0x" if depth else ">= 80 % of copy"
        ratio = None if first else record["speed_up"]
        rows.append(row_of(record, copy, f"{name}, {record['policy']}", ratio, target))
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


def measured(benchmarks: Iterator[Benchmark], end: float) -> Iterator[tuple[Benchmark, list[Row] | str]]:
    """Each benchmark with its rows, or why it has none.

    None begins that would not be over at the end, by what it should take, and by how much slower others were. One that
    fails, for want of memory perhaps, stops no other.
    """
    slower = 1.0
    for benchmark in benchmarks:
        begun, expected = time.monotonic(), slower * benchmark.seconds
        if begun + expected > end:
            yield benchmark, f"no time was left for what may take {expected:.0f} s"
            continue
        try:
            found: list[Row] | str = benchmark.measure()
        except Exception as e:
            found = str(e) or type(e).__name__
        took = time.monotonic() - begun
        slower = max(slower, took / benchmark.seconds)
        click.echo(f"{benchmark.name}: {took:.0f} s", err=True)
        yield benchmark, found


@click.command()
@click.option("--output", "-o", type=click.Path(dir_okay=False), help="A JSON file, renewed after each benchmark.")
@click.option("--minutes", default=8.5, show_default=True, help="That all of it may take.")
@click.option("--no-tests", is_flag=True, help="Benchmarks alone.")
@click.option("--commit", "revision", envvar="MINIRT_COMMIT", help="Of this tree, if it is no checkout of git.")
def main(output: str | None, minutes: float, no_tests: bool, revision: str | None) -> None:
    """Tests, sanitizes and times the GPU engine."""
    seconds, begun = 60 * minutes, time.monotonic()
    try:
        ops = open_card()
    except ModelError as e:
        raise click.ClickException(str(e)) from None
    rows: list[Row] = []
    found: dict[str, Found] = {}
    missing: dict[str, str] = {}
    good = True
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "commit": revision or commit() or "unknown", "card": ops.device.name,
        "capability": ops.device.capability, "driver": driver(), "cuda_of_driver": ops.device.driver, "nvrtc": nvrtc(),
        "os": platform.platform(), "python": platform.python_version(), "versions": versions(),
    }  # fmt: skip

    def save() -> None:
        said = {name: text for name, (_, text) in found.items()}
        if output:
            record = facts | said | {"rows": list(map(asdict, rows)), "missing": missing}
            Path(output).write_text(json.dumps(record, indent=1) + "\n")

    if not no_tests:
        found["tests"] = run_tests(SHARES["tests"] * seconds)
        found["memcheck"] = run_sanitizer("memcheck", SHARES["memcheck"] * seconds)
        save()
    copy = ops.bandwidth()
    facts["copy_bandwidth_gb_per_s"] = copy / 1e9
    for benchmark, result in measured(benchmarks(ops, copy), begun + seconds):
        if isinstance(result, str):
            missing[benchmark.name] = result
            good = good and not benchmark.aimed
        else:
            rows += result
        save()
    left = begun + seconds - time.monotonic()
    if not no_tests and left > RACES:
        found["racecheck"] = run_sanitizer("racecheck", left)
    save()
    click.echo(table(rows))
    for name, why in missing.items():
        click.echo(f"not measured: {name}: {why}")
    said = [f"{name}: {text}" for name, (_, text) in found.items()]
    click.echo("; ".join([f"{ops.device.name}, copy {copy / 1e9:.0f} GB/s", *said]))
    sys.exit(0 if good and all(of_tool for of_tool, _ in found.values()) else 1)


if __name__ == "__main__":
    main()
