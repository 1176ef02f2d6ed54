"""Measures minirt beside llama.cpp on the same files: decode, prefill, start, memory. Prints a table, writes JSON.

    pip install llama-cpp-python
    python tools/compare_llamacpp.py model.gguf -t 2 -o results.json

The engines work in turn, each in a process of its own, and are timed on the same random token ids: minirt, llama.cpp,
llama.cpp with flash attention, and again. llama.cpp's better variant counts. Ratios are above 1 where minirt is ahead.
The byte limit is the speed at which memory delivers the weights and the cache that a decode step must read.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from compare_worker import LLAMA_BATCH, LLAMA_UBATCH, MINIRT_CHUNK, PROMPT

from minirt import __version__
from minirt.devices import physical_cores

OURS = "minirt"
ENGINES: dict[str, dict[str, Any]] = {
    OURS: {"engine": "minirt"},
    "llama.cpp": {"engine": "llama.cpp", "flash": False},
    "llama.cpp fa": {"engine": "llama.cpp", "flash": True},
}
WORKER = Path(__file__).with_name("compare_worker.py")
START_TOKENS, START_CONTEXT = (1, 16), 4096
PAUSE = 0.05  # seconds until the idle threads of the engine before have stopped spinning
AMX_HINT = (
    "; where its AMX path crashes, as on some virtual machines, build it without: "
    'CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON" '
    "pip install --force-reinstall --no-binary llama-cpp-python llama-cpp-python"
)
HEADINGS = ("model", "test", "minirt", "llama.cpp", "ratio", "paired", "% of byte limit")


@dataclass(frozen=True)
class Settings:
    threads: int
    depths: tuple[int, ...]  # tokens in the cache before the steps that are timed
    prompts: tuple[int, ...]
    steps: int
    rounds: int

    @property
    def n_ctx(self) -> int:
        return -(-max(max(self.depths, default=0) + self.steps, *self.prompts, 256) // 256) * 256


# -- processes ---------------------------------------------------------------------------------------------------------


class Worker:
    """A process with one engine that answers orders in JSON lines. Once it fails, `failure` says how, in one line."""

    def __init__(self, name: str, command: list[str]):
        self.name, self.failure = name, ""
        self.stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, text=True
        )
        self.about = self._answer("loading")

    def ask(self, doing: str, **order: Any) -> dict[str, Any]:
        """Sends an order and returns the answer, empty if the process has failed, now or before."""
        if self.failure:
            return {}
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died; the answer will say of what
            print(json.dumps(order), file=self.process.stdin, flush=True)
        return self._answer(doing)

    def _answer(self, doing: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        status = self.process.wait()
        self.stderr.seek(0)
        self.failure = failure(self.name, doing, status, self.stderr.read())
        say(self.failure)
        return {}

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.stderr.close()


def failure(name: str, doing: str, status: int, stderr: str) -> str:
    """One line about a process that ended with an exit status, or by the signal -status."""
    if status < 0:
        hint = AMX_HINT if name != OURS and -status in (signal.SIGSEGV, signal.SIGILL) else ""
        return f"{name} died of {signal.Signals(-status).name} ({doing}){hint}"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return f"{name} failed ({doing}): {lines[-1] if lines else f'exit status {status}'}"


def say(text: str) -> None:
    click.echo(f"compare_llamacpp: {text}", err=True)


def worker_command(**spec: Any) -> list[str]:
    return [sys.executable, str(WORKER), json.dumps(spec)]


# -- measuring ---------------------------------------------------------------------------------------------------------


def compare(model: Path, settings: Settings) -> dict[str, Any]:
    """Everything about one file."""
    say(f"{model.name}: loading")
    bandwidth = [read_bandwidth(settings.threads)]
    common = {"model": str(model), "threads": settings.threads, "n_ctx": settings.n_ctx}
    # kernels are compiled here: the compiler's memory would count as the worker's
    run(worker_command(**ENGINES[OURS], **common))
    workers = [Worker(name, worker_command(**engine, **common)) for name, engine in ENGINES.items()]
    try:
        tests = [test for depth in settings.depths for test in decode(model, workers, depth, settings)]
        tests += [prefill(model, workers, n, settings) for n in settings.prompts]
        about = {key: value for worker in workers for key, value in worker.about.items()}
        failures = [worker.failure for worker in workers if worker.failure]
    finally:
        for worker in workers:
            worker.close()
    bandwidth.append(read_bandwidth(settings.threads))
    for test in tests:
        add_limit(test, max(bandwidth))
    return {
        "model": model.name,
        "file_bytes": model.stat().st_size,
        **about,
        "read_bytes_per_s": bandwidth,
        "tests": tests,
        "failures": failures,
    }


def decode(model: Path, workers: list[Worker], depth: int, settings: Settings) -> list[dict[str, Any]]:
    """Tokens per second of single steps after `depth` tokens, and the memory that was needed until then."""
    name = f"decode at {depth}"
    answers = in_turn(model, workers, name, settings.rounds, do="decode", depth=depth, n=settings.steps)
    facts = {key: a[-1][key] for a in answers.values() for key in ("bytes_per_step", "kv_bytes") if a and key in a[-1]}
    speed = summary(name, "t/s", {e: [settings.steps / a["seconds"] for a in answers[e]] for e in answers})
    peaks = {e: [answer["peak"] / 2**20 for answer in answers[e][-1:]] for e in answers}
    memory = summary(f"peak memory at {depth}", "MiB", peaks)
    return [speed | facts, memory | facts]


def prefill(model: Path, workers: list[Worker], n: int, settings: Settings) -> dict[str, Any]:
    """Tokens per second of a prompt of n tokens."""
    name = f"prefill {n}"
    answers = in_turn(model, workers, name, settings.rounds, do="prefill", n=n)
    return summary(name, "t/s", {e: [n / a["seconds"] for a in answers[e]] for e in answers})


def in_turn(
    model: Path, workers: list[Worker], name: str, rounds: int, **order: Any
) -> dict[str, list[dict[str, Any]]]:
    """Each worker's answers to the same order, asked one after the other in every round; the first round is dropped."""
    answers: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    workers = [worker for worker in workers if not worker.failure]
    if workers:
        say(f"{model.name}: {name}")
    for i in range(1 + rounds):
        for worker in workers:
            time.sleep(PAUSE)
            answer = worker.ask(name, seed=1 + i, **order)
            if answer and i:
                answers[worker.name].append(answer)
    return answers


def start(model: Path, settings: Settings, failures: list[str]) -> list[dict[str, Any]]:
    """Seconds from the command to its end, for n tokens after a short prompt; files and kernels are cached."""
    tests, running = [], dict(ENGINES)
    for n in START_TOKENS:
        name = f"start, {n} token" + "s" * (n > 1)
        say(f"{model.name}: {name}")
        samples: dict[str, list[float]] = {engine: [] for engine in ENGINES}
        for i in range(1 + settings.rounds):
            for engine in list(running):
                begun = time.perf_counter()
                done = run(start_command(engine, model, n, settings.threads))
                seconds = time.perf_counter() - begun
                if done.returncode:
                    failures.append(failure(engine, name, done.returncode, done.stderr))
                    say(failures[-1])
                    del running[engine]
                elif i:
                    samples[engine].append(seconds)
        tests.append(summary(name, "s", samples))
    return tests


def start_command(engine: str, model: Path, n: int, threads: int) -> list[str]:
    if engine == OURS:
        command = [sys.executable, "-m", "minirt", "run", str(model), "-p", PROMPT, "-n", str(n), "--temp", "0"]
        return [*command, "-t", str(threads), "-c", str(START_CONTEXT)]
    return worker_command(**ENGINES[engine], model=str(model), threads=threads, n_ctx=START_CONTEXT, start=n)


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")


def read_bandwidth(threads: int) -> float:
    """Bytes per second, measured in a process of its own: the buffer would count as memory of those started later."""
    done = run(worker_command(engine="bandwidth", threads=threads))
    if done.returncode:
        raise click.ClickException(failure("bandwidth", "measuring", done.returncode, done.stderr))
    return json.loads(done.stdout)


# -- results -----------------------------------------------------------------------------------------------------------


def summary(name: str, unit: str, samples: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, llama.cpp's better variant, and how far minirt is ahead of it: by medians, and by pairs of a round."""
    rates = unit == "t/s"
    medians = {engine: statistics.median(values) for engine, values in samples.items() if values}
    result: dict[str, Any] = {"test": name, "unit": unit, "samples": samples, "median": medians}
    peers = [engine for engine in medians if engine != OURS]
    if not peers:
        return result
    best = (max if rates else min)(peers, key=lambda engine: medians[engine])
    result["best"] = best
    if OURS in medians:
        pairs = zip(samples[OURS], samples[best], strict=False)  # an engine that died has fewer
        ratios = [ours / theirs if rates else theirs / ours for ours, theirs in pairs]
        result["ratio"] = medians[OURS] / medians[best] if rates else medians[best] / medians[OURS]
        result["paired_ratio"] = statistics.median(ratios)
    return result


def add_limit(test: dict[str, Any], bandwidth: float) -> None:
    """How much of the bandwidth the steps of a decode test used, in percent; for llama.cpp, the same bytes count."""
    if test["unit"] == "t/s" and "bytes_per_step" in test:
        scale = 100 * test["bytes_per_step"] / bandwidth
        test["limit_percent"] = {engine: rate * scale for engine, rate in test["median"].items()}


def table(models: list[dict[str, Any]]) -> str:
    """A row for each model and test."""
    rows = [HEADINGS, *(row(Path(model["model"]).stem, test) for model in models for test in model["tests"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows)


def row(model: str, test: dict[str, Any]) -> tuple[str, ...]:
    digits, best = {"t/s": 1, "s": 2, "MiB": 0}[test["unit"]], test.get("best", "")
    cells = [f"{test['median'][e]:.{digits}f} {test['unit']}" if e in test["median"] else "-" for e in (OURS, best)]
    if best:
        cells[1] += best.removeprefix("llama.cpp").replace(" fa", " (fa)")
    ratios = [f"{test[key]:.2f}" if key in test else "-" for key in ("ratio", "paired_ratio")]
    limits = test.get("limit_percent", {})
    limit = " / ".join(f"{limits[e]:.0f}" if e in limits else "-" for e in (OURS, best)) if limits else ""
    return (model, test["test"], *cells, *ratios, limit)


def environment() -> dict[str, Any]:
    """The machine and the versions of what ran on it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    git = shutil.which("git")
    describe = [git or "", "-C", str(WORKER.parent), "describe", "--always", "--dirty"]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],  # before anything is measured; not small, another program worked
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {"minirt": __version__}
        | {name: version(name) for name in ("numpy", "numba", "llvmlite", "llama-cpp-python")},
        "commit": subprocess.run(describe, capture_output=True, text=True).stdout.strip() if git else "",
    }


# -- command -----------------------------------------------------------------------------------------------------------


def numbers(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    """ "0,2048" -> (0, 2048), ascending, as memory is a peak. An empty text: none."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    lowest = 0 if option.name == "depths" else 1
    if any(not part.isascii() or not part.isdigit() or int(part) < lowest for part in parts):
        raise click.BadParameter(f"{text!r} is not a list of numbers from {lowest} on, like 512,4096")
    return tuple(sorted({int(part) for part in parts}))


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", type=click.Path(exists=True, dir_okay=False))
@click.option("-t", "--threads", type=click.IntRange(1), help="Of both engines.  [default: physical cores]")
@click.option("-d", "--depths", default="0,2048,7168", callback=numbers, help="Tokens in the cache.", show_default=True)
@click.option("-p", "--prompts", default="512,4096", callback=numbers, help="Tokens of a prompt.", show_default=True)
@click.option("-n", "--steps", default=32, type=click.IntRange(1), help="Tokens of a decode sample.", show_default=True)
@click.option("-r", "--rounds", default=5, type=click.IntRange(1), help="Samples of each engine.", show_default=True)
@click.option("--skip-start", is_flag=True, help="Do not time fresh processes.")
@click.option("--label", default="", help="A name for the machine or the state of the code, kept in the JSON.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, writable=True), help="Write JSON here.")
def main(
    models: tuple[str, ...],
    threads: int | None,
    depths: tuple[int, ...],
    prompts: tuple[int, ...],
    steps: int,
    rounds: int,
    skip_start: bool,
    label: str,
    output: str | None,
) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        raise click.ClickException("llama-cpp-python is not installed here: pip install llama-cpp-python")
    settings = Settings(threads or physical_cores(), depths, prompts, steps, rounds)
    constants = {"start_prompt": PROMPT, "start_context": START_CONTEXT, "kv": "f16", "minirt_chunk": MINIRT_CHUNK}
    constants |= {"n_batch": LLAMA_BATCH, "n_ubatch": LLAMA_UBATCH}
    result = {
        "label": label,
        **environment(),
        "settings": {**asdict(settings), "n_ctx": settings.n_ctx, **constants},
        "models": [],
    }
    for model in map(Path, models):
        measured = compare(model, settings)
        if not skip_start:
            measured["tests"] += start(model, settings, measured["failures"])
        result["models"].append(measured)
        if output:  # after each model, so that an interrupt loses one at most
            Path(output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(table(result["models"]))
    sys.exit(any(model["failures"] for model in result["models"]))


if __name__ == "__main__":
    main()
