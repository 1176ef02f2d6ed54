"""Measures quantised KV caches on the CPU beside float16: speed of decoding in turn, and quality. Writes JSON.

    python tools/measure_stores.py --model smollm2-q4_0.gguf --exact smollm2-f16.gguf --text tinyshakespeare.txt \\
        -o tools/results/stores_cpu.json

Speed: one model, a dense cache of each type filled to a depth, then a few steps of each in turn, again and again;
medians. Quality: `minirt perplexity --kld --decode` of each type, whose base is dense attention to a float16 cache.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from minirt import Llama, __version__
from minirt.bandwidth.grid import commit
from minirt.bench import cpu_name, read_bandwidth
from minirt.decoder import Decoder
from minirt.policies import Dense
from minirt.session import prompt_chunks
from minirt.stores import get_stores

SPEED = ("f16", "q8_0", "q4_0", "q8_0/q4_0")
QUALITY = ("q8_0", "q8_0-plain", "q4_0", "q4_0-plain", "q8_0/q4_0")


def speed(model: str, threads: int, depth: int, steps: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step at a depth, by the type of the cache."""
    n_ctx = depth + 4 * steps * (rounds + 1)
    with Llama.load(model, n_ctx=n_ctx, threads=threads) as llama:
        decoder = Decoder(llama.config, llama.decoder.weights, llama.decoder.ops, Dense())
        tokens = np.random.default_rng(0).integers(100, llama.config.n_vocab - 100, size=n_ctx).tolist()
        caches = {kv: decoder.new_cache(Dense().plan(llama.config, n_ctx, *get_stores(kv))) for kv in SPEED}
        for cache in caches.values():
            for start, stop in prompt_chunks(decoder.policy, 0, depth):
                decoder.prefill(cache, tokens[start:stop], logits="none")
        seconds: dict[str, list[float]] = {kv: [] for kv in caches}
        for turn in range(rounds + 1):
            for kv, cache in caches.items():
                decoder.rewind(cache, 0, depth)
                for token in tokens[depth : depth + steps]:
                    begun = time.perf_counter()
                    decoder.decode(cache, [token])
                    if turn:
                        seconds[kv].append(time.perf_counter() - begun)
        ms = {kv: 1e3 * statistics.median(values) for kv, values in seconds.items()}
        read = {kv: decoder.policy.bytes_read(llama.config, cache.plan, depth) for kv, cache in caches.items()}
    return {
        kv: {"ms_per_token": t, "tokens_per_second": 1e3 / t, "kv_bytes_read": read[kv], "speed_up": ms["f16"] / t}
        for kv, t in ms.items()
    }


def quality(model: str, text: str, threads: int, n_ctx: int, chunks: int) -> dict[str, Any]:
    """Perplexity and divergence from a float16 cache, by type."""
    found = {}
    for kv in QUALITY:
        flags = ["--kld", "--decode", "--json", "-c", n_ctx, "--chunks", chunks, "-t", threads, "--kv", kv]
        command = [sys.executable, "-m", "minirt", "perplexity", model, "-f", text, *map(str, flags)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        numbers = json.loads(run.stdout)
        names = ("ppl", "ppl_base", "ppl_ratio", "ppl_ratio_error", "kld", "kld_error", "same_top")
        found[kv] = {name: numbers[name] for name in names}
    return found


@click.command()
@click.option("--model", required=True, help="A GGUF file, for speed.")
@click.option("--exact", required=True, help="... and for quality.")
@click.option("--text", required=True, help="... measured on it.")
@click.option("--threads", default=2, show_default=True)
@click.option("--depth", default=7168, show_default=True)
@click.option("--speed-only", is_flag=True, help="Keep the quality that OUTPUT holds.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(model: str, exact: str, text: str, threads: int, depth: int, speed_only: bool, output: Path) -> None:
    """Measures KV cache types, and writes OUTPUT."""
    known = json.loads(output.read_text())["quality"] if speed_only else None
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "cpu": cpu_name(), "threads": threads, "os": platform.platform(),
        "commit": commit(),
        "versions": {"minirt": __version__} | {name: version(name) for name in ("numpy", "numba")},
        "read_bandwidth_gb_per_s": read_bandwidth(threads) / 1e9, "model": Path(model).name, "depth": depth,
        "speed": speed(model, threads, depth, steps=6, rounds=8), "quality_model": Path(exact).name,
        "text": Path(text).name, "n_ctx": 2048, "chunks": 4,
        "quality": known or quality(exact, text, threads, 2048, 4),
    }  # fmt: skip
    output.write_text(json.dumps(result, indent=1) + "\n")
    for kv, row in result["speed"].items():
        click.echo(f"{kv:12} {row['tokens_per_second']:7.1f} t/s  {row['speed_up']:5.2f}x f16 @ {depth}")
    for kv, row in result["quality"].items():
        click.echo(f"{kv:12} perplexity {100 * (row['ppl_ratio'] - 1):+6.2f} %  KLD {row['kld']:.5f}")


if __name__ == "__main__":
    main()
