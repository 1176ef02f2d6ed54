"""Measures SparQ's index in 4 bits on the CPU beside the one in float16: memory, speed, quality. Writes JSON.

    python tools/measure_index.py --model smollm2-q4_0.gguf --text tinyshakespeare.txt -o tools/results/index_cpu.json

Memory: what the plans of the policies say. Step 1: one call for each index in turn, on random numbers that change from
call to call, so that they come from memory. Decoding: a cache for each index filled to a depth, then a few steps of
each in turn, again and again. Times are medians. Quality: `minirt perplexity --kld` of each, whose base is dense
attention to a float16 cache.
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
from types import SimpleNamespace
from typing import Any

import click
import numpy as np

from kernels_cpu import CpuOps
from minirt import Llama, __version__
from minirt.bandwidth.grid import commit
from minirt.bench import cpu_name, read_bandwidth
from minirt.cache import allocate_cache
from minirt.decoder import Decoder
from minirt.ops import CodedIndex
from minirt.policies import parse_policy
from minirt.session import prompt_chunks
from minirt.stores import get_store

KINDS = ("f16", "q4")
SHAPES = [  # query heads, KV heads, size of a head, r
    (32, 32, 128, 32),
    (32, 32, 128, 16),
    (9, 3, 64, 32),
    (9, 3, 64, 16),
]
LENGTHS = (8192, 32768, 131072)
K = 128  # tokens that are read
BYTES = 400 << 20  # of float16 indices that take turns, so that no cache of the CPU holds them


def shape_config(n_head: int, n_head_kv: int, d: int) -> Any:
    """One layer of such heads, for the plan of a cache."""
    return SimpleNamespace(n_layer=1, n_head=n_head, n_head_kv=n_head_kv, head_dim=d, sliding_window=0)


def memory() -> dict[str, Any]:
    """Bytes of a cache of so many tokens over one of dense attention, float16, by index."""
    config, store = shape_config(32, 32, 128), get_store("f16")
    found = {}
    for n in (2048, *LENGTHS):
        size = {k: parse_policy(f"sparq:k_index={k}").plan(config, n, store, store).nbytes(config) for k in KINDS}
        dense = parse_policy("dense").plan(config, n, store, store).nbytes(config)
        found[str(n)] = {kind: nbytes / dense for kind, nbytes in size.items()}
    return found


def step_1(ops: CpuOps, n_head: int, n_head_kv: int, d: int, r: int, s: int, rounds: int) -> dict[str, Any]:
    """Microseconds of `approximate_top_k` on s tokens, by index."""
    config, store, rng = shape_config(n_head, n_head_kv, d), get_store("f16"), np.random.default_rng(0)
    policies = {kind: parse_policy(f"sparq:r={r}:k={K}:k_index={kind}") for kind in KINDS}
    plans = {kind: policy.plan(config, s, store, store) for kind, policy in policies.items()}
    copies = max(2, BYTES // (2 * n_head_kv * s * d))
    halves, words = rng.standard_normal(1 << 16).astype(np.float16), rng.integers(0, 2**32, 1 << 15, np.uint32)
    indices: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for _ in range(copies):
        for kind, plan in plans.items():
            cache = allocate_cache(plan, config, ops)
            for name, (array,) in cache.side.items():
                if name != "mean":
                    fill(array, {"codes": words, "index": halves, "scales": np.abs(halves)}[name])
            coded = kind == "q4"
            index = CodedIndex(*(cache.side[n][0] for n in ("codes", "scales")), cache.layers[0].k) if coded else None
            indices[kind].append(index or cache.side["index"][0])
    q, stop = rng.standard_normal((1, n_head, d)).astype(np.float32), np.array([s], np.int32)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range((rounds + 1) * copies):
        for kind in KINDS:
            begun = time.perf_counter()
            ops.approximate_top_k(q, indices[kind][turn % copies], stop, r, K, K // 4, False)
            if turn >= copies:  # the first round compiles
                seconds[kind].append(time.perf_counter() - begun)
    us = {kind: 1e6 * statistics.median(values) for kind, values in seconds.items()}
    rows = plans["f16"].row_bytes(config) * K
    mean = 4 * n_head_kv * d if policies["f16"].reallocates(config) else 0  # type: ignore[attr-defined]
    read = {kind: policy.bytes_read(config, plans[kind], s) - rows - mean for kind, policy in policies.items()}
    return {
        "n_head": n_head, "n_head_kv": n_head_kv, "head_dim": d, "r": r, "k": K, "s": s, "us": us,
        "speed_up": us["f16"] / us["q4"], "bytes": read, "ratio_of_bytes": read["f16"] / read["q4"],
        "gb_per_s": {kind: read[kind] / us[kind] / 1e3 for kind in KINDS},
    }  # fmt: skip


def fill(array: np.ndarray, values: np.ndarray) -> None:
    """With these values, again and again."""
    flat = array.reshape(-1)
    for i in range(0, flat.size, values.size):
        flat[i : i + values.size] = values[: flat.size - i]


def decoding(model: str, threads: int, depth: int, steps: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step at a depth, dense and by index."""
    n_ctx, store = depth + steps, get_store("f16")
    specs = ["dense", *(f"sparq:r=16:k={K}:k_index={kind}" for kind in KINDS)]
    with Llama.load(model, n_ctx=n_ctx, threads=threads) as llama:
        tokens = np.random.default_rng(0).integers(100, llama.config.n_vocab - 100, size=n_ctx).tolist()
        runs = {}
        for spec in specs:
            decoder = Decoder(llama.config, llama.decoder.weights, llama.decoder.ops, parse_policy(spec))
            cache = decoder.new_cache(decoder.policy.plan(llama.config, n_ctx, store, store))
            for start, stop in prompt_chunks(decoder.policy, 0, depth):
                decoder.prefill(cache, tokens[start:stop], logits="none")
            runs[spec] = decoder, cache
        seconds: dict[str, list[float]] = {spec: [] for spec in specs}
        for turn in range(rounds + 1):
            for spec, (decoder, cache) in runs.items():
                decoder.rewind(cache, 0, depth)
                for token in tokens[depth:]:
                    begun = time.perf_counter()
                    decoder.decode(cache, [token])
                    if turn:
                        seconds[spec].append(time.perf_counter() - begun)
        found = {}
        for spec, (decoder, cache) in runs.items():
            ms = 1e3 * statistics.median(seconds[spec])
            found[spec] = {
                "ms_per_token": ms,
                "tokens_per_second": 1e3 / ms,
                "kv_bytes_read": decoder.policy.bytes_read(llama.config, cache.plan, depth),
                "kv_bytes_held": cache.plan.nbytes(llama.config),
            }
    return found


def quality(model: str, text: str, threads: int, n_ctx: int, chunks: int) -> dict[str, Any]:
    """Perplexity and divergence from dense attention, by policy."""
    found = {}
    for r in (16, 32):
        for kind in KINDS:
            spec = f"sparq:r={r}:k={K}:k_index={kind}"
            flags = ["--kld", "--json", "-c", n_ctx, "--chunks", chunks, "-t", threads, "--policy", spec]
            command = [sys.executable, "-m", "minirt", "perplexity", model, "-f", text, *map(str, flags)]
            numbers = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            names = ("ppl", "ppl_base", "ppl_ratio", "ppl_ratio_error", "kld", "kld_error", "same_top")
            found[spec] = {name: numbers[name] for name in names}
    return found


@click.command()
@click.option("--model", required=True, help="A GGUF file.")
@click.option("--text", required=True, help="... whose quality is measured on it.")
@click.option("--threads", default=2, show_default=True)
@click.option("--depth", default=7168, show_default=True)
@click.option("--rounds", default=8, show_default=True)
@click.option("--chunks", default=4, show_default=True, help="Windows of 2048 tokens.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(model: str, text: str, threads: int, depth: int, rounds: int, chunks: int, output: Path) -> None:
    """Measures SparQ's index, and writes OUTPUT."""
    ops = CpuOps(threads)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "cpu": cpu_name(), "threads": threads, "os": platform.platform(),
        "commit": commit(),
        "versions": {"minirt": __version__} | {name: version(name) for name in ("numpy", "numba")},
        "read_bandwidth_gb_per_s": read_bandwidth(threads) / 1e9, "model": Path(model).name, "memory": memory(),
        "step_1": [step_1(ops, *shape, s, rounds) for shape in SHAPES for s in LENGTHS],
        "read_bandwidth_after_gb_per_s": read_bandwidth(threads) / 1e9, "depth": depth,
        "decoding": decoding(model, threads, depth, 6, rounds), "text": Path(text).name, "n_ctx": 2048,
        "chunks": chunks, "quality": quality(model, text, threads, 2048, chunks),
    }  # fmt: skip
    output.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["step_1"]:
        click.echo(
            f"{row['n_head']}/{row['n_head_kv']} heads of {row['head_dim']}, r={row['r']}, S={row['s']}: "
            f"{row['us']['f16']:.0f} / {row['us']['q4']:.0f} us, {row['speed_up']:.2f}x"
        )
    for spec, row in result["decoding"].items():
        click.echo(f"{spec:32} {row['tokens_per_second']:7.1f} t/s @ {depth}")
    for spec, row in result["quality"].items():
        click.echo(f"{spec:32} KLD {row['kld']:.5f}  same top {100 * row['same_top']:.2f} %")


if __name__ == "__main__":
    main()
