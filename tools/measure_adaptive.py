"""Measures SparQ with so many rows for each head, and as many as it has use for: quality against bytes. Writes JSON.

    python tools/measure_adaptive.py --model smollm2-q4_0.gguf --text tinyshakespeare.txt \\
        -o tools/results/adaptive_k.json

Windows of a text are decoded as by `minirt perplexity --kld`, and compared with dense attention to a float16 cache. The
bytes are what steps read of the cache on average, as counted. OUTPUT is written after each policy; those that it holds
for the same settings are not measured again.

Each k = auto is then compared with numbers k that read as much, or one row more, for several r. Beside them is the rule
that auto could be instead: the fewest rows that cover a share 1 - eps of each head's weight, the newest and then the
heaviest first.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from minirt import Llama, __version__
from minirt.bandwidth.grid import commit
from minirt.bench import cpu_name
from minirt.cache import Cache
from minirt.config import ModelConfig
from minirt.ops import Array, Ops
from minirt.perplexity import Divergence, cut_windows, decoded_logits, dense_log_probs
from minirt.policies import parse_policy
from minirt.policies.base import BasePolicy
from minirt.policies.sparq import MOST, SparQ

POLICIES = (
    *(f"sparq:r={r}:k={k}" for r in (16, 32) for k in (128, 64, 256, 32)),
    *(f"sparq:r={r}:k={k}" for r in (8, 12) for k in (128, 64, 256, 512)),
    *(f"sparq:r={r}:k=auto:eps={eps}" for r in (12, 16, 32, 8, 10) for eps in (0.75, 1.0, 0.5, 1.5)),
    *(f"share:eps={eps}" for eps in (0.1, 0.05, 0.2)),
)
BESIDE_R, LEAST_K = (6, 8, 10, 12, 16, 20, 24, 32), 16  # of a fixed k that reads as much as an adaptive one


@dataclass(frozen=True)
class Share(SparQ):
    """The fewest rows that cover 1 - eps of the weight, head by head; without what `most` leaves out, and the mean."""

    def attend(self, ops: Ops, cache: Cache, layer: int, q: Array, k: Array, v: Array) -> Array:
        n_seq, kv, counts = len(q), cache.layers[layer], cache.side["counts"][layer]
        every, stop = np.arange(n_seq, dtype=np.int32), cache.n_seen + np.int32(1)
        self._append(ops, cache, layer, every, cache.n_seen, k, v)
        how = self.r, self.rows, self.newest, False
        rows, weights = ops.approximate_top_k(q, cache.side["index"][layer], stop, *how)
        mean = weights.reshape(n_seq, rows.shape[1], -1, self.rows).mean(axis=2)
        newest = rows >= (stop - self.newest)[:, None, None]
        order = np.argsort(-mean - newest, axis=2)
        mean, rows = np.take_along_axis(mean, order, 2), np.take_along_axis(rows, order, 2)
        before = mean.cumsum(axis=2) - mean
        wanted = (before < 1 - self.eps) | np.take_along_axis(newest, order, 2)
        counts[:, :, 0] = wanted.sum(axis=2)
        counts[:, :, 1:] += np.stack([counts[:, :, 0], np.ones_like(counts[:, :, 0])], axis=2)
        return ops.attend_rows(q, kv, np.ascontiguousarray(rows), stop, None, None, counts)


def made(spec: str) -> BasePolicy:
    name, _, eps = spec.partition(":eps=")
    return Share(k="auto", eps=float(eps)) if name == "share" else parse_policy(spec)  # type: ignore[return-value]


def as_much(c: ModelConfig, measured: Mapping[str, dict[str, Any]]) -> list[str]:
    """SparQ with a fixed k that reads what an adaptive one does, as those show that were measured."""
    first, row = POLICIES[0], c.n_layer * c.n_head_kv * 2 * c.head_dim * 2  # bytes of keys and values of a token
    known = parse_policy(first)
    assert isinstance(known, SparQ)
    component = (measured[first]["kv_bytes_read"] - known.rows * row) / known.r
    adaptive = [found["kv_bytes_read"] for spec, found in measured.items() if ":k=auto" in spec]
    wanted = [(r, math.ceil((nbytes - r * component) / row)) for nbytes in adaptive for r in BESIDE_R]
    return list(dict.fromkeys(f"sparq:r={r}:k={k}" for r, k in wanted if k >= LEAST_K))


def measure(llama: Llama, spec: str, windows: np.ndarray, base: list[np.ndarray]) -> dict[str, Any]:
    decoder, divergence, read = llama.decoder, Divergence(), list[float]()
    decoder.policy, begun = made(spec), time.perf_counter()
    for (logits, tokens), log_base in zip(decoded_logits(llama, windows, read), base, strict=True):
        divergence.add(logits, tokens, log_base)
    found = divergence.statistics()
    names = ("kld", "kld_error", "kld_p50", "kld_p99", "same_top", "ppl_ratio", "ppl_ratio_error")
    numbers = {"kv_bytes_read": statistics.fmean(read)} | {name: found[name] for name in names}
    return numbers | {"seconds": time.perf_counter() - begun, "commit": commit()}


@click.command()
@click.option("--model", required=True, help="A GGUF file.")
@click.option("--text", required=True, type=click.Path(path_type=Path), help="... measured on it.")
@click.option("--threads", default=2, show_default=True)
@click.option("--ctx", default=2048, show_default=True, help="Tokens of a window.")
@click.option(
    "--chunks", default=2, show_default=True, help="Windows, spread over the text, that are decoded together."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(model: str, text: Path, threads: int, ctx: int, chunks: int, output: Path) -> None:
    """Measures fixed and adaptive k, and writes OUTPUT."""
    settings = {
        "model": Path(model).name, "text": text.name, "n_ctx": ctx, "chunks": chunks, "kv": "f16", "most": MOST,
    }  # fmt: skip
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "cpu": cpu_name(), "threads": threads, "os": platform.platform(),
        "versions": {"minirt": __version__} | {name: version(name) for name in ("numpy", "numba")},
        **settings, "policies": {},
    }  # fmt: skip
    known = json.loads(output.read_text()) if output.exists() else {}
    if all(known.get(name) == value for name, value in settings.items()):
        result["policies"] = known["policies"]
    with Llama.load(model, n_ctx=ctx, threads=threads) as llama:
        record = llama.decoder.ops.record
        every = cut_windows(llama.tokenizer.encode_bytes(text.read_bytes()), ctx)
        windows = every[:: len(every) // chunks][:chunks]
        base = [log_probs.copy() for log_probs in dense_log_probs(llama, windows)]
        specs = list(POLICIES)
        for spec in specs:
            if spec not in result["policies"]:
                # What Share does between the calls of ops is not recorded.
                llama.decoder.ops.record = (
                    record if spec.startswith("sparq") else lambda step: (step(llama.decoder.ops), None)
                )
                result["policies"][spec] = measure(llama, spec, windows, base)
                output.write_text(json.dumps(result, indent=1) + "\n")
            row = result["policies"][spec]
            click.echo(f"{spec:28} {row['kv_bytes_read'] / 2**20:6.2f} MiB/token  KLD {row['kld']:.5f}")
            if spec == POLICIES[-1]:
                specs += as_much(llama.config, result["policies"])


if __name__ == "__main__":
    main()
