"""Measures minirt on the default model: start, speed, memory, and distance from exact weights. Writes JSON.

    python tools/measure_smollm2.py --truth logprobs.npy --text tinyshakespeare.txt -o tools/results/smollm2_minirt.json

--truth: log-probabilities of llama.cpp on an F16 copy, float32 [windows, 255, n_vocab], as tests/make_smollm2_golden.py
saves them for windows of 512 tokens of --text (scored as llama-perplexity does). Without it, quality is left out.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from minirt import Llama, __version__
from minirt.bandwidth.grid import commit

WINDOW = 512
ROUNDS = 5


def start() -> dict[str, float]:
    """Seconds from typing `minirt run` to its end after one token: kernels compiled, and kernels found on disk."""
    command = [sys.executable, "-m", "minirt", "run", "-p", "The capital of France is", "-n", "1", "--temp", "0"]
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"XDG_CACHE_HOME": cache}
        seconds = []
        for _ in range(1 + ROUNDS):
            begun = time.perf_counter()
            subprocess.run(command, env=env, check=True, capture_output=True)
            seconds.append(time.perf_counter() - begun)
    return {"first_run_s": round(seconds[0], 2), "warm_s": round(statistics.median(seconds[1:]), 2)}


def speed() -> dict[str, float]:
    """Tokens per second: a prompt of 512, then single steps at an empty context; the largest memory of `minirt run`."""
    tokens = list(np.random.RandomState(0).randint(100, 40_000, WINDOW))
    with Llama.load() as llama:
        session, prefill, decode = llama.session, [], []
        for i in range(1 + ROUNDS):
            session.reset()
            session.feed(tokens)
            prefill.append(WINDOW / session.timings.prompt_seconds)
            session.feed([tokens[i]])
            for token in tokens[:64]:
                session.step(token)
            decode.append(session.timings.tokens / session.timings.seconds)
    line = subprocess.run(
        [sys.executable, "-m", "minirt", "run", "-p", "Once", "-n", "128"], capture_output=True, text=True, check=True
    ).stderr
    return {
        "prefill_512_tps": round(statistics.median(prefill[1:]), 1),
        "decode_tps": round(statistics.median(decode[1:]), 1),
        "peak_memory_mib": int(line.rsplit("peak memory ", 1)[1].split()[0]),
    }


def quality(truth: np.ndarray, windows: np.ndarray, device: str, kv: str, by_steps: bool) -> dict[str, Any]:
    """Perplexity, KL divergence (nats, whole vocabulary) from the truth, and how often the top token is the same."""
    nll, kld, same = [], [], []
    half = WINDOW // 2
    with Llama.load(device=device, kv=kv, n_ctx=WINDOW) as llama:
        for tokens, expected in zip(windows, truth, strict=True):
            if by_steps:
                llama.session.reset()
                steps = [llama.session.feed(tokens[:1]), *(llama.session.step(int(t)) for t in tokens[1 : WINDOW - 1])]
                logits = np.stack(steps[half:])
            else:
                logits = llama.logits(tokens)[half : WINDOW - 1]
            ours = logits - np.logaddexp.reduce(logits.astype(np.float64), axis=1, keepdims=True)
            p = np.exp(expected.astype(np.float64))
            kld.append((p * (expected - ours)).sum(axis=1))
            same.append(ours.argmax(axis=1) == expected.argmax(axis=1))
            nll.append(-ours[np.arange(half - 1), tokens[half + 1 :]])
    return {
        "device": device,
        "kv": kv,
        "path": "decode" if by_steps else "prefill",
        "windows": len(windows),
        "ppl": round(float(np.exp(np.mean(nll))), 4),
        "mean_kld": float(f"{np.mean(kld):.3g}"),
        "max_kld": float(f"{np.max(kld):.3g}"),
        "same_top1": round(float(np.mean(same)), 5),
    }


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--truth", type=click.Path(exists=True, dir_okay=False))
@click.option("--text", type=click.Path(exists=True, dir_okay=False))
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False))
def main(truth: str | None, text: str | None, output: str) -> None:
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu_name(),
        "python": platform.python_version(),
        "versions": {"minirt": __version__} | {name: version(name) for name in ("numpy", "numba", "llvmlite")},
        "commit": commit(),
        "settings": "SmolLM2-135M-Instruct Q4_1, f16 KV cache, threads = physical cores, medians of 5",
        "speed": start() | speed(),
    }
    if truth and text:
        logprobs = np.load(truth, mmap_mode="r")
        with Llama.load(n_ctx=WINDOW) as llama:
            tokens = llama.tokenize(Path(text).read_text(encoding="utf-8"))
        windows = np.array(tokens[: len(logprobs) * WINDOW], np.int32).reshape(-1, WINDOW)
        runs = (("reference", "f32", False, len(windows)), ("cpu", "f16", False, len(windows)), ("cpu", "f16", True, 4))
        result["quality"] = [quality(logprobs[:n], windows[:n], device, kv, steps) for device, kv, steps, n in runs]
    Path(output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps(result, indent=1))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {os.cpu_count()} CPUs"


if __name__ == "__main__":
    main()
