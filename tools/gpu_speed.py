"""Benchmarks of the GPU engine, on models and caches of random numbers made on the card. `gpu_check.py` runs them.

An op is timed as it runs in a decode step: launches recorded once and played again, over so many caches in turn that
none is left in the card's own caches. Times are medians, bytes the policies' formulas.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minirt.cache import Cache, allocate_cache
from minirt.config import ModelConfig, RopeScaling
from minirt.decoder import Decoder
from minirt.gguf_file import TENSOR_TYPES, Tensor
from minirt.llama import bytes_per_token
from minirt.policies import Policy, parse_policy
from minirt.stores import get_stores
from minirt.weights import LayerWeights, Weights

TOUCHED = 2 << 30  # bytes of caches that the calls of a recording read in turn, at least
ROUNDS, SECONDS = 7, 0.05  # medians over so many rounds of at least so long
SEED_NUMBERS = 1 << 20  # random numbers of which larger arrays are made


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    work: str
    ms: float
    gb_per_s: float
    share: float  # of the copy bandwidth
    ratio: float | None = None  # to what the target is over
    target: str = ""


def config_of(shape: str, layers: int = 0) -> ModelConfig:
    """A Llama of the shape of 7b (32 heads of 128), or small."""
    sizes = {"7b": (32, 4096, 32, 32, 128, 11008, 32000), "small": (2, 64, 4, 2, 32, 128, 96)}[shape]
    n_layer, n_embd, n_head, n_head_kv, d, n_ff, n_vocab = sizes
    return ModelConfig(
        architecture="llama", name=shape, n_layer=layers or n_layer, n_embd=n_embd, n_head=n_head, n_head_kv=n_head_kv,
        head_dim=d, n_ff=n_ff, n_vocab=n_vocab, n_ctx_train=1 << 20, rms_eps=1e-5, rope_base=1e4, rope_dim=d,
        rope_scaling=RopeScaling("none"), rope_interleaved=True, sliding_window=0, palu=None,
    )  # fmt: skip


def weights_of(ops: Any, c: ModelConfig, kind: str) -> Weights:
    """Random weights of a type, on the card; all layers are apart in memory."""
    rng = np.random.default_rng(0)

    def matrix(n_out: int, n_in: int) -> Any:
        t = TENSOR_TYPES[kind]
        n_bytes = n_in // t.block_size * t.block_bytes
        if kind == "F16":
            some = (rng.standard_normal(n_in * 64) / n_in**0.5).astype(np.float16).view(np.uint8)
        else:
            some = rng.integers(0, 255, 64 * n_bytes, np.uint8)
            scale = np.frombuffer(np.float16(0.02 / n_in**0.5).tobytes(), np.uint8)
            some.reshape(-1, t.block_bytes)[:, :2] = scale
        data = np.resize(some.reshape(64, -1), (n_out, n_bytes))
        return ops.matrix(Tensor("random", t, (n_out, n_in), data))

    q, kv, n, ff = c.n_head * c.head_dim, c.n_head_kv * c.head_dim, c.n_embd, c.n_ff
    shapes = {"wq": (q, n), "wk": (kv, n), "wv": (kv, n), "wo": (n, q)}
    shapes |= {"w_gate": (ff, n), "w_up": (ff, n), "w_down": (n, ff)}
    none = dict.fromkeys(("bq", "bk", "bv", "q_norm", "k_norm"))
    norm = ops.vector(np.ones(n, np.float32))
    layers = [
        LayerWeights(attn_norm=norm, ffn_norm=norm, **none, **{x: matrix(*shape) for x, shape in shapes.items()})
        for _ in range(c.n_layer)
    ]
    output = matrix(c.n_vocab, n)
    return Weights(output, layers, norm, output, None)


def fill(ops: Any, cache: Cache, depth: int) -> None:
    """Random numbers in all rows and indices; every sequence has `depth` tokens."""
    rng = np.random.default_rng(1)
    some = {
        "f": ops.device.upload(rng.standard_normal(SEED_NUMBERS).astype(np.float16)),
        "i": ops.device.upload(rng.integers(0, 255, SEED_NUMBERS).astype(np.uint8)),
    }

    def spread(array: Any) -> None:
        flat = array.reshape(-1)
        source = some[np.dtype(array.dtype).kind if array.dtype == np.float16 else "i"]
        source = source if array.dtype == np.float16 else ops.device.view(source, array.dtype)
        for begin in range(0, flat.size, source.size):
            part = flat[begin : begin + source.size]
            part[...] = source[: part.size]

    for kv in cache.layers:
        for rows in kv:
            for array in (rows.codes, rows.scales):
                if array is not None:
                    spread(array)
    for array in cache.side.get("index", ()):
        spread(array)
    for positions in cache.side.get("positions", ()):
        positions[...] = ops.device.upload(np.arange(positions.shape[2], dtype=np.int32))
    cache.n_seen[:] = depth


def timed(ops: Any, step: Callable[[Any], Any], calls: int) -> float:
    """Seconds of one of the `calls` that a step makes."""
    ops.record(step)
    again = ops.record(step)[1] or (lambda: step(ops))

    def seconds(n: int) -> float:
        ops.device.synchronize()
        begun = time.perf_counter()
        for _ in range(n):
            again()
        ops.device.synchronize()
        return (time.perf_counter() - begun) / n

    n = max(1, round(SECONDS / seconds(2)))
    return statistics.median(seconds(n) for _ in range(ROUNDS)) / calls


def attention(ops: Any, spec: str, kv: str, c: ModelConfig, n_seq: int, depth: int) -> tuple[float, int]:
    """Seconds of a policy's attention in one layer of a decode step, appending included, and the bytes it must read."""
    policy = parse_policy(spec)
    stores = get_stores(kv)
    one = policy.plan(replace(c, n_layer=1), depth, *stores)
    layers = max(1, min(64, TOUCHED // max(1, n_seq * policy.bytes_read(replace(c, n_layer=1), one, depth))))
    c = replace(c, n_layer=layers)
    decoder = Decoder(c, Weights(None, [], None, None, None), ops, policy)
    plan = policy.plan(c, depth, *stores)
    cache = allocate_cache(plan, c, ops, n_seq, decoder.rope)
    fill(ops, cache, depth - 1)
    rng = np.random.default_rng(2)
    heads = (c.n_head, c.n_head_kv, c.n_head_kv)
    q, k, v = (ops.vector(rng.standard_normal((n_seq, h, c.head_dim)).astype(np.float32)) for h in heads)

    def step(ops: Any) -> Any:
        return [policy.attend(ops, cache, layer, q, k, v) for layer in range(layers)][-1]

    return timed(ops, step, layers), n_seq * policy.bytes_read(c, plan, depth) // layers


def decoding(ops: Any, weights: Weights, c: ModelConfig, spec: str, kv: str, n_seq: int, depth: int) -> float:
    """Seconds of a decode step of a whole model, from tokens to logits on the host."""
    policy: Policy = parse_policy(spec)
    steps = 8 * (ROUNDS + 1)
    decoder = Decoder(c, weights, ops, policy)
    cache = allocate_cache(policy.plan(c, depth + steps, *get_stores(kv)), c, ops, n_seq, decoder.rope)
    fill(ops, cache, depth)
    tokens, seconds = list(range(n_seq)), []
    for i in range(steps):
        begun = time.perf_counter()
        decoder.decode(cache, [t % c.n_vocab for t in tokens])
        if i >= 8:
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def attention_rows(ops: Any, copy: float, c: ModelConfig, shapes: list[tuple[int, int, str]]) -> Iterator[Row]:
    """Dense, and SparQ over it (r=32, k=128), at (sequences, depth, target)."""
    for n_seq, depth, target in shapes:
        own, nbytes = attention(ops, "dense", "f16", c, n_seq, depth)
        name = f"B={n_seq} S={depth}"
        yield Row(f"dense attention f16 {name}", 1e3 * own, nbytes / own / 1e9, nbytes / own / copy)
        few = min(128, depth // 2)
        sparse, nbytes = attention(ops, f"sparq:r={min(32, c.head_dim)}:k={few}", "f16", c, n_seq, depth)
        rate = nbytes / sparse
        yield Row(f"sparq r=32 k={few} {name}", 1e3 * sparse, rate / 1e9, rate / copy, own / sparse, target)
        for kv in ("q8_0", "q4_0"):
            other, nbytes = attention(ops, "dense", kv, c, n_seq, depth)
            rate = nbytes / other
            yield Row(f"dense attention {kv} {name}", 1e3 * other, rate / 1e9, rate / copy, own / other)


def model_rows(ops: Any, copy: float, c: ModelConfig, depth: int, kinds: tuple[str, ...]) -> Iterator[Row]:
    """A model decoding at depth 0, and deep with SparQ over dense."""
    for kind in kinds:
        weights = weights_of(ops, c, kind)
        nbytes, seconds = bytes_per_token(weights), decoding(ops, weights, c, "dense", "f16", 1, 0)
        rate = nbytes / seconds
        yield Row(f"{c.name} {kind} decode, depth 0", 1e3 * seconds, rate / 1e9, rate / copy, target="80 % of copy")
        cached = parse_policy("dense")
        own = decoding(ops, weights, c, "dense", "f16", 1, depth)
        rate = (nbytes + cached.bytes_read(c, cached.plan(c, depth, *get_stores("f16")), depth)) / own
        yield Row(f"{c.name} {kind} decode, depth {depth}, dense", 1e3 * own, rate / 1e9, rate / copy)
        sparq = parse_policy(f"sparq:r=16:k={depth // 16}")
        sparse = decoding(ops, weights, c, str(sparq), "f16", 1, depth)
        rate = (nbytes + sparq.bytes_read(c, sparq.plan(c, depth, *get_stores("f16")), depth)) / sparse
        yield Row(f"... sparq r=16 k={depth // 16}", 1e3 * sparse, rate / 1e9, rate / copy, own / sparse, ">= 2.0x")


def throughput_rows(ops: Any, copy: float, c: ModelConfig, depth: int, budget: int, batch: int) -> Iterator[Row]:
    """Policies with a budget beside dense, as many sequences of each as the same memory holds."""
    weights = weights_of(ops, c, "Q8_0")
    own = decoding(ops, weights, c, "dense", "f16", batch, depth)
    yield Row(f"{c.name} dense, {batch} sequences at {depth}", 1e3 * own, 0.0, 0.0)
    for name in ("window", "tova", "h2o"):
        many = batch * depth // budget
        seconds = decoding(ops, weights, c, f"{name}:budget={budget}", "f16", many, depth)
        ratio = (many / seconds) / (batch / own)
        yield Row(f"... {name} {budget}, {many} sequences", 1e3 * seconds, 0.0, 0.0, ratio, ">= 6x")


def table(rows: list[Row]) -> str:
    lines = [f"{'work':44}{'ms':>10}{'GB/s':>9}{'of copy':>9}{'ratio':>8}  target"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        lines.append(
            f"{row.work:44}{row.ms:10.4f}{row.gb_per_s:9.0f}{100 * row.share:8.0f}%{ratio:>8}  {row.target}"
        )
    return "\n".join(lines)
