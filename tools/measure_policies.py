"""Measures what KV policies save on the CPU, each beside dense in the same minutes. Writes JSON.

    python tools/measure_policies.py --model smollm2-q4_0.gguf -o tools/results/policies_cpu.json

Decoding: one model, a cache per policy filled to a depth, then a few steps of each in turn, again and again. Ops: the
calls of SparQ's decode step beside dense attention, on random caches that change from call to call, so that they come
from memory; and alone, for one head, the choice with which SparQ's step 1 ends. Times are medians; bytes are
the policies' formulas.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from kernels_cpu import CpuOps
from minirt import Llama, __version__
from minirt.bandwidth.grid import commit
from minirt.bench import cpu_name, read_bandwidth
from minirt.decoder import Decoder
from minirt.ops import INDEX_BLOCK, KV
from minirt.policies import parse_policy
from minirt.policies.base import BoundedPolicy
from minirt.session import prompt_chunks
from minirt.stores import get_store

DECODING = {  # policies at a depth, and what they are compared with
    7168: ["dense", "sparq:r=16:k=128", "topk:k=128"]
    + [f"{name}:budget=512" for name in ("window", "streaming", "lm-infinite", "h2o", "tova", "d2o")],
    512: ["dense"],
}
OPS = [(32, 32, 128, 32, 8192), (32, 32, 128, 32, 32768), (9, 3, 64, 16, 7168), (32, 8, 128, 32, 8192)]
K = 128  # tokens that SparQ reads
CACHES = 300 << 20  # bytes, so that no cache of the CPU holds them


def decoding(model: str, threads: int, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step, by "policy @ depth"."""
    depth_most = max(DECODING) + 4 * steps * (rounds + 1)
    with Llama.load(model, n_ctx=depth_most, threads=threads) as llama:
        config, store = llama.config, get_store("f16")
        tokens = np.random.default_rng(0).integers(100, config.n_vocab - 100, size=depth_most).tolist()
        runs = {}
        for depth, policies in DECODING.items():
            for spec in policies:
                decoder = Decoder(config, llama.decoder.weights, llama.decoder.ops, parse_policy(spec))
                cache = decoder.new_cache(decoder.policy.plan(config, depth_most, store, store))
                for start, stop in prompt_chunks(decoder.policy, 0, depth):
                    decoder.prefill(cache, tokens[start:stop], logits="none")
                runs[f"{spec} @ {depth}"] = decoder, cache, depth
                click.echo(f"{spec} @ {depth}: filled", err=True)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(rounds + 1):
            for name, (decoder, cache, depth) in runs.items():
                if not isinstance(decoder.policy, BoundedPolicy):  # those go on: what they read does not grow
                    decoder.rewind(cache, 0, depth)
                for _ in range(steps):
                    begun = time.perf_counter()
                    decoder.decode(cache, [tokens[int(cache.n_seen[0])]])
                    if turn:
                        seconds[name].append(time.perf_counter() - begun)
        dense = {
            depth: parse_policy("dense").bytes_read(config, runs[f"dense @ {depth}"][1].plan, depth)
            for depth in DECODING
        }
        out = {}
        for name, (decoder, cache, depth) in runs.items():
            read = decoder.policy.bytes_read(config, cache.plan, depth)
            ms = 1e3 * statistics.median(seconds[name])
            out[name] = {
                "ms_per_token": ms,
                "tokens_per_second": 1e3 / ms,
                "kv_bytes_read": read,
                "share_of_dense_bytes": read / dense[depth],
                "kv_bytes_held": sum(a.nbytes for kv in cache.layers for a in kv)
                + sum(a.nbytes for arrays in cache.side.values() for a in arrays),
            }
        for row in out.values():
            for depth in DECODING:
                row[f"speed_up_over_dense_{depth}"] = out[f"dense @ {depth}"]["ms_per_token"] / row["ms_per_token"]
    return out


def ops_alone(ops: CpuOps, n_head: int, n_head_kv: int, d: int, r: int, s: int, rounds: int) -> dict[str, Any]:
    """Microseconds of each call of a SparQ step, and of dense attention to the same cache."""
    store, rng = get_store("f16"), np.random.default_rng(0)
    copies = max(2, CACHES // (4 * n_head_kv * s * d))
    caches = []
    for _ in range(copies):
        kv = KV(*(ops.allocate(store, (1, n_head_kv, s, d)) for _ in range(2)))
        index = ops.zeros((1, n_head_kv, -(-s // INDEX_BLOCK), d, INDEX_BLOCK), np.dtype(np.float16))
        for array in (*kv, index):
            flat = array.view(np.float16).reshape(-1)
            some = rng.standard_normal(1 << 16).astype(np.float16)
            for i in range(0, flat.size, some.size):
                flat[i : i + some.size] = some[: flat.size - i]
        caches.append((kv, index))
    q = rng.standard_normal((1, n_head, d)).astype(np.float32)
    k = v = rng.standard_normal((1, n_head_kv, d)).astype(np.float32)
    mean = np.zeros((1, n_head_kv, d), np.float32) if n_head == n_head_kv else None
    seq, last, stop = (np.array([n], np.int32) for n in (0, s - 1, s))
    ranks = rng.standard_normal((1, 1, s)).astype(np.float32)
    times: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        out = call()
        times.setdefault(name, []).append(time.perf_counter() - begun)
        return out

    for i in range((rounds + 1) * copies):
        if i == copies:
            times.clear()  # the first round compiles and touches memory
        (kv, index), first = caches[i % copies], np.zeros(1, np.int32)
        timed("append", lambda kv=kv: ops.append(kv, seq, last, k, v))
        timed("append_index", lambda index=index: ops.append_index(index, mean, seq, last, k, v))
        chosen = timed(
            "approximate_top_k", lambda index=index: ops.approximate_top_k(q, index, stop, r, K, K // 4, False)
        )
        timed("attend_rows", lambda kv=kv, chosen=chosen: ops.attend_rows(q, kv, chosen[0], stop, chosen[1], mean))
        for _ in range(2):  # the second one finds the scores in a cache, as the choice within step 1 does
            timed("top_k_of_a_head", lambda: ops.top_k(ranks, stop, K, tail=K // 4))
        other = caches[(i + copies // 2) % copies][0]
        timed("dense", lambda kv=other, first=first: ops.attend(q, kv, first, stop))
    times["top_k_of_a_head"] = times["top_k_of_a_head"][1::2]
    us = {name: 1e6 * statistics.median(values) for name, values in times.items()}
    sparq = sum(us[name] for name in ("append", "append_index", "approximate_top_k", "attend_rows"))
    dense = us["dense"] + us["append"]
    few = s * r + 2 * K * d
    return {
        "n_head": n_head, "n_head_kv": n_head_kv, "head_dim": d, "r": r, "k": K, "s": s,
        "us": us, "speed_up": dense / sparq, "ratio_of_bytes": 2 * s * d / few,
        "speed_up_over_ratio": dense / sparq / (2 * s * d / few),
        "dense_gb_per_s": 4 * n_head_kv * s * d / us["dense"] / 1e3,
        "index_gb_per_s": 2 * n_head_kv * s * r / us["approximate_top_k"] / 1e3,
        "top_k_share": us["top_k_of_a_head"] * n_head_kv / ops.threads / us["approximate_top_k"],
    }  # fmt: skip


@click.command()
@click.option("--model", required=True, help="A GGUF file; left out of the ops.")
@click.option("--threads", default=2, show_default=True)
@click.option("--steps", default=8, show_default=True, help="Steps of each policy in turn.")
@click.option("--rounds", default=8, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(model: str, threads: int, steps: int, rounds: int, output: Path) -> None:
    """Measures policies, and writes OUTPUT."""
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "cpu": cpu_name(), "threads": threads, "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {"minirt": __version__} | {name: version(name) for name in ("numpy", "numba")},
        "commit": commit(), "model": Path(model).name, "read_bandwidth_gb_per_s": read_bandwidth(threads) / 1e9,
    }  # fmt: skip
    result["decoding"] = decoding(model, threads, steps, rounds)
    ops = CpuOps(threads)
    result["sparq_ops"] = [ops_alone(ops, *shape, rounds=rounds) for shape in OPS]
    result["top_k_131072"] = ops_alone(ops, 8, 8, 128, 32, 131072, rounds)
    result["read_bandwidth_after_gb_per_s"] = read_bandwidth(threads) / 1e9
    output.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in result["decoding"].items():
        click.echo(
            f"{name:32} {row['tokens_per_second']:7.1f} t/s  {row['speed_up_over_dense_7168']:5.2f}x dense @ 7168"
        )
    for row in (*result["sparq_ops"], result["top_k_131072"]):
        click.echo(
            f"{row['n_head']}/{row['n_head_kv']} heads of {row['head_dim']}, S={row['s']}: {row['speed_up']:.2f}x of "
            f"{row['ratio_of_bytes']:.2f}x bytes, top-k {100 * row['top_k_share']:.1f} % of step 1"
        )


if __name__ == "__main__":
    main()
