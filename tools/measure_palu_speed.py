"""Measures decoding from Palu's latents on the CPU beside caches of whole keys and values, and what limits each.

    python tools/make_model.py --shape 7b --layers 4 --type Q4_0 -o 7b.gguf
    python tools/measure_palu_speed.py --model 7b.gguf -o tools/results/palu_speed.json

A copy of the model gets random factors: half the rank, a quarter of it for keys, groups of 4 heads. Caches are filled
with random rows, whose values no time depends on. A few steps at the depth, and at the beginning, are made from each
cache in turn, again and again; times are medians. What a layer's attention takes is the difference.

Attention can be no quicker than its cache is read, or than keys are rebuilt: the product alone, from cache, is timed.
OUTPUT has a part for each set of instructions that MINIRT_ISA asked for: the others stay.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from kernels_cpu.compiled import kernel
from kernels_cpu.memory import zeros
from kernels_cpu.rebuilding import TILE, multiply_panels, pack
from kernels_cpu.tile_registers import HAS_TILES
from minirt import Llama, __version__
from minirt.bandwidth.grid import commit
from minirt.bench import cpu_name, read_bandwidth
from minirt.cache import Cache
from minirt.decoder import Decoder
from minirt.gguf_file import GGUFFile
from minirt.palu import conversion, ranks
from minirt.palu.copying import NewTensor, write_copy
from minirt.policies import Dense
from minirt.stores import get_stores

WHOLE, LATENTS = ("f16", "q8_0", "q4_0"), ("latent-f16", "latent-q4", "latent-q3")
KEEP = 0.5
ROWS = 256  # that a cache is filled with at a time
PRODUCTS = 2000  # of a tile of keys, timed together


def random_copy(model: str, path: Path) -> tuple[conversion.Grouping, np.ndarray]:
    """Writes a copy with random factors; how heads are grouped, and the ranks of each layer."""
    rng = np.random.default_rng(0)
    with Llama.load(model, n_ctx=8) as llama, GGUFFile.open(model) as file:
        config, grouping = llama.config, conversion.group_heads(llama.config, None)
        chosen = ranks.prior(ranks.total_rank(KEEP, config.n_layer, grouping.width), config.n_layer, grouping.width)
        replaced = {}
        for layer, pair in enumerate(chosen.tolist()):
            for name, rank in zip(conversion.NAMES, pair, strict=True):
                stem, n_out = f"blk.{layer}.attn_{name}", config.n_head_kv * config.head_dim
                shapes = (grouping.n_groups * rank, config.n_embd), (n_out, rank)
                made = [NewTensor(f"{stem}_{x}.weight", "F16", shape) for x, shape in zip("ab", shapes, strict=True)]

                def draw(shapes: Any = shapes) -> list[np.ndarray]:
                    return [rng.standard_normal(s, np.float32) / np.float32(s[1] ** 0.5) for s in shapes]

                replaced[f"{stem}.weight"] = made, draw
        keys = {
            "palu.version": np.uint32(1), "palu.group_size": np.uint32(grouping.size), "palu.latent": "f16",
            "palu.k_rank": chosen[:, 0].astype(np.int32), "palu.v_rank": chosen[:, 1].astype(np.int32),
            "palu.hadamard": np.bool_(False),
        }  # fmt: skip
        with path.open("wb") as target:
            write_copy(target, file, keys, replaced)
    return grouping, chosen


def filled(decoder: Decoder, kv: str, n_ctx: int, depth: int) -> Cache:
    """A cache whose first slots hold random rows."""
    config, rng = decoder.config, np.random.default_rng(0)
    cache = decoder.new_cache(decoder.policy.plan(config, n_ctx, *get_stores(kv, config.palu)))
    for layer in cache.layers:
        shapes = [(ROWS, a.shape[1], getattr(a, "numbers", config.head_dim)) for a in layer]
        k, v = (rng.standard_normal(shape, np.float32) for shape in shapes)
        for start in range(0, depth, ROWS):
            slots = np.arange(start, min(start + ROWS, depth), dtype=np.int32)
            if cache.plan.k_store.latent:
                k[: len(slots), :, -1] = slots[:, None]
            decoder.ops.append(layer, 0 * slots, slots, k[: len(slots)], v[: len(slots)])
    return cache


def decoding(runs: dict[str, tuple[Decoder, Cache]], depth: int, steps: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a step at the beginning and at a depth, from each cache."""
    seconds: dict[str, list[list[float]]] = {kv: [[], []] for kv in runs}
    for turn in range(rounds + 1):
        for kv, (decoder, cache) in runs.items():
            for begin, times in zip((0, depth), seconds[kv], strict=True):
                decoder.rewind(cache, 0, begin)
                for token in range(steps):
                    begun = time.perf_counter()
                    decoder.decode(cache, [token])
                    if turn and token:  # the first one is not yet recorded
                        times.append(time.perf_counter() - begun)
    return {kv: [1e3 * statistics.median(times) for times in both] for kv, both in seconds.items()}


@kernel
def _products(values, panels, keys, n):  # type: ignore[no-untyped-def]
    for _ in range(n):
        multiply_panels(values, 0, panels, TILE, keys)


def product_speed(rows: int, rank: int, threads: int) -> float:
    """Multiply-adds a second of all threads together, each rebuilding one tile of a group's keys over and over."""
    rng = np.random.default_rng(0)
    packed = pack(rng.standard_normal((rows, rank), np.float32), 1)
    values = zeros(packed.shape, np.float32)
    values[:] = packed
    panels = [zeros((values.shape[2] * TILE,), np.float32) for _ in range(threads)]
    keys = [zeros((values[..., 0, :].size * TILE,), np.float32) for _ in range(threads)]
    best = np.inf
    with ThreadPoolExecutor(threads) as pool:
        for n in (1, *[PRODUCTS] * 5):  # the first one compiles
            begun = time.perf_counter()
            list(pool.map(lambda i, n=n: _products(values, panels[i], keys[i], n), range(threads)))
            best = min(best, (time.perf_counter() - begun) / n)
    return threads * rows * rank * TILE / best


@click.command()
@click.option("--model", required=True, help="A GGUF file.")
@click.option("--threads", default=2, show_default=True)
@click.option("--depth", default=7168, show_default=True)
@click.option("--steps", default=5, show_default=True)
@click.option("--rounds", default=4, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(model: str, threads: int, depth: int, steps: int, rounds: int, output: Path) -> None:
    """Measures the speed of Palu, and writes OUTPUT."""
    n_ctx = depth + steps
    with tempfile.TemporaryDirectory() as folder:
        low_rank = Path(folder) / "palu.gguf"
        grouping, chosen = random_copy(model, low_rank)
        with (
            Llama.load(model, n_ctx=n_ctx, threads=threads) as whole,
            Llama.load(low_rank, n_ctx=n_ctx, threads=threads) as palu,
        ):
            runs = dict(_runs(whole, WHOLE, n_ctx, depth)) | dict(_runs(palu, LATENTS, n_ctx, depth))
            bandwidth = read_bandwidth(threads)
            found, config = decoding(runs, depth, steps, rounds), whole.config
            bandwidth = max(bandwidth, read_bandwidth(threads))
            read = {kv: d.policy.bytes_read(d.config, cache.plan, depth) for kv, (d, cache) in runs.items()}
    rank = int(chosen[0, 0])
    speed = product_speed(grouping.width, rank, threads)
    multiplications = depth * config.n_head_kv * config.head_dim * rank
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "cpu": cpu_name(), "threads": threads, "os": platform.platform(),
        "commit": commit(),
        "versions": {"minirt": __version__} | {name: version(name) for name in ("numpy", "numba")},
        "model": Path(model).name, "n_layer": config.n_layer, "heads": [config.n_head, config.n_head_kv],
        "head_dim": config.head_dim, "group": grouping.size, "k_rank": rank, "v_rank": int(chosen[0, 1]),
        "depth": depth, "rows": "random", "tile_registers": HAS_TILES, "read_bandwidth_gb_per_s": bandwidth / 1e9,
        "rebuilding_gflop_per_s": 2 * speed / 1e9, "multiply_adds_per_layer": multiplications, "caches": {},
    }  # fmt: skip
    for kv, (begin, at_depth) in found.items():
        row = {
            "ms_per_token": at_depth, "ms_per_token_at_0": begin, "kv_bytes_read": read[kv],
            "attention_ms_per_layer": (at_depth - begin) / config.n_layer,
            "bytes_limit_ms_per_layer": 1e3 * read[kv] / config.n_layer / bandwidth,
        }  # fmt: skip
        if kv in LATENTS:
            row["arithmetic_limit_ms_per_layer"] = 1e3 * multiplications / speed
        result["caches"][kv] = row
        limits = "  ".join(f"{name} {row[name]:6.2f}" for name in row if name.endswith("per_layer"))
        click.echo(f"{kv:10} {at_depth:7.1f} ms  {limits}")
    before = json.loads(output.read_text()) if output.exists() else {}
    whole = before | {os.environ.get("MINIRT_ISA") or "native": result}
    output.write_text(json.dumps(whole, indent=1) + "\n")


def _runs(llama: Llama, kvs: tuple[str, ...], n_ctx: int, depth: int) -> Iterator[tuple[str, tuple[Decoder, Cache]]]:
    for kv in kvs:
        decoder = Decoder(llama.config, llama.decoder.weights, llama.decoder.ops, Dense())
        yield kv, (decoder, filled(decoder, kv, n_ctx, depth))


if __name__ == "__main__":
    main()
