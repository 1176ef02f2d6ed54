"""Models and caches of random numbers: the speed of any shape, without a file. They are of no use for quality."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ..cache import Cache, CachePlan
from ..config import ModelConfig, PaluConfig, RopeScaling
from ..errors import UsageError
from ..gguf_file import TENSOR_TYPES, Tensor
from ..ops import Array, Ops
from ..palu import ranks
from ..palu.conversion import group_heads
from ..policies import Policy
from ..policies.base import BoundedPolicy
from ..rope import make_rope
from ..session import PREFILL_CHUNK, prompt_chunks
from ..weights import LayerWeights, Weights

ROWS = 64  # random rows of a matrix; the others repeat them
SCALE = 0.02  # of quantised blocks
SEED = 0
KEPT = 0.5  # of the rank of keys and values, in latents

_NOTHING: dict[str, Any] = dict.fromkeys(field.name for field in fields(LayerWeights))


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int


SHAPES = {
    "7b": Shape(32, 4096, 32, 32, 128, 11008, 32000),
    "8b-gqa": Shape(32, 4096, 32, 8, 128, 14336, 128256),
    "llama-1b": Shape(16, 2048, 32, 8, 64, 8192, 128256),
    "smollm2-135m": Shape(30, 576, 9, 3, 64, 1536, 49152),
    "tiny": Shape(2, 256, 4, 2, 64, 512, 512),
}
TYPES = ("F16", "Q8_0", "Q4_0")  # of random weights


def config_of(shape: str | Shape, layers: int | None = None) -> ModelConfig:
    """A Llama of a shape, with fewer layers or as many as it has."""
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise UsageError(f"unknown shape '{shape}' (one of: {', '.join(SHAPES)})")
        name, s = shape, SHAPES[shape]
    else:
        name, s = "random", shape
    return ModelConfig(
        architecture="llama", name=name, n_layer=s.n_layer if layers is None else layers, n_embd=s.n_embd,
        n_head=s.n_head, n_head_kv=s.n_head_kv, head_dim=s.head_dim, n_ff=s.n_ff, n_vocab=s.n_vocab,
        n_ctx_train=1 << 20, rms_eps=1e-5, rope_base=1e4, rope_dim=s.head_dim, rope_scaling=RopeScaling("none"),
        rope_interleaved=True, sliding_window=0, palu=None,
    )  # fmt: skip


def weights_of(ops: Ops, config: ModelConfig, kind: str, seed: int = SEED) -> Weights:
    """Random weights of one type of TYPES on a device; no two layers share memory.

    A card gets copies: of the same numbers for all layers, since making others takes the host longer than copying.
    """
    rng = np.random.default_rng(seed)
    tensor: Callable[[int, int], Tensor] = functools.partial(_tensor, rng, kind)
    if ops.memory() is not None:
        tensor = functools.cache(tensor)

    def matrix(n_out: int, n_in: int) -> Any:
        return ops.matrix(tensor(n_out, n_in))

    c = config
    q, kv, n, ff = c.n_head * c.head_dim, c.n_head_kv * c.head_dim, c.n_embd, c.n_ff
    shapes = {"wq": (q, n), "wk": (kv, n), "wv": (kv, n), "wo": (n, q)}
    shapes |= {"w_gate": (ff, n), "w_up": (ff, n), "w_down": (n, ff)}
    norm = ops.vector(np.ones(n, np.float32))
    norms = {"attn_norm": norm, "ffn_norm": norm}
    layers = [
        LayerWeights(**_NOTHING | norms | {x: matrix(*shape) for x, shape in shapes.items()}) for _ in range(c.n_layer)
    ]
    return Weights(ops.table(_tensor(rng, kind, c.n_vocab, n)), layers, norm, matrix(c.n_vocab, n), None)


def weight_bytes(config: ModelConfig, kind: str) -> int:
    """Bytes of what `weights_of` makes, about."""
    c, t = config, TENSOR_TYPES[kind]
    heads = 2 * (c.n_head + c.n_head_kv) * c.head_dim
    numbers = c.n_layer * c.n_embd * (heads + 3 * c.n_ff) + 2 * c.n_vocab * c.n_embd
    return numbers // t.block_size * t.block_bytes


def _tensor(rng: np.random.Generator, kind: str, n_out: int, n_in: int) -> Tensor:
    """A matrix whose products with normal numbers are about as large as these."""
    t, rows = TENSOR_TYPES[kind], min(ROWS, n_out)
    if n_in % t.block_size:
        raise UsageError(f"{kind} takes rows of a multiple of {t.block_size} numbers, not {n_in}")
    if kind == "F16":
        some = (rng.standard_normal((rows, n_in)) / n_in**0.5).astype(np.float16).view(np.uint8)
    else:
        some = rng.integers(0, 256, (rows, n_in // t.block_size, t.block_bytes), np.uint8)
        some[:, :, :2] = np.frombuffer(np.float16(SCALE / n_in**0.5).tobytes(), np.uint8)
    row_bytes = n_in // t.block_size * t.block_bytes
    return Tensor("random", t, (n_out, n_in), np.resize(some.reshape(rows, row_bytes), (n_out, row_bytes)))


def with_latents(config: ModelConfig) -> ModelConfig:
    """The same model with low-rank keys and values, as `minirt palu` makes them by default: half the rank, a quarter of
    it for keys, groups of four KV heads."""
    grouping = group_heads(config, None)
    total = ranks.total_rank(KEPT, config.n_layer, grouping.width)
    k_ranks, v_ranks = ranks.prior(total, config.n_layer, grouping.width).T.tolist()
    return replace(config, palu=PaluConfig(grouping.size, tuple(k_ranks), tuple(v_ranks), "f16", False))


def factors_of(ops: Ops, config: ModelConfig, seed: int = SEED) -> Weights:
    """Weights of which there are only the factors that rebuild keys and values from latents, if the model has these."""
    rng, rope = np.random.default_rng(seed), make_rope(config, None)
    n_out, layers = config.n_head_kv * config.head_dim, []
    for of_layer in zip(config.palu.k_ranks, config.palu.v_ranks, strict=True) if config.palu else ():
        tensors = [_tensor(rng, "F16", n_out, rank) for rank in of_layer]
        k, v = ops.factor(tensors[0], config, None, rope=rope), ops.factor(tensors[1], config, None)
        layers.append(LayerWeights(**_NOTHING | {"k_factor": k, "v_factor": v}))
    return Weights(None, layers, None, None, None)


def random_queries(ops: Ops, rng: np.random.Generator, n: int, config: ModelConfig) -> Array:
    """Normal numbers [n, H_q, d]."""
    return ops.vector(rng.standard_normal((n, config.n_head, config.head_dim), np.float32))


class RandomRows:
    """Keys and values of a layer of a cache: normal numbers, drawn once for so many tokens, which others repeat."""

    def __init__(
        self, ops: Ops, rng: np.random.Generator, most: int, plan: CachePlan, config: ModelConfig, layer: int = 0
    ):
        self.ops, self.rng, self.latent = ops, rng, plan.k_store.latent
        shapes = ((store.heads(config), store.numbers(config, layer)) for store in (plan.k_store, plan.v_store))
        self.drawn = [ops.vector(rng.standard_normal((most, *shape), np.float32)) for shape in shapes]

    def __call__(self, pos: np.ndarray) -> tuple[Array, Array]:
        """Those of tokens at positions pos [n]: [n, heads, numbers]. With signs drawn anew, so that none come twice."""
        k, v = (self._signed(rows, len(pos)) for rows in self.drawn)
        if self.latent:
            k[:, :, -1] = self.ops.vector(pos.astype(np.float32))[:, None]  # the last number of a key's latent
        return k, v

    def _signed(self, rows: Array, n: int) -> Array:
        """On the device: to draw as many numbers on the host, and bring them there, would take minutes."""
        out = self.ops.zeros((n, *rows.shape[1:]), np.dtype(np.float32))
        for start in range(0, n, len(rows)):
            part = out[start : start + len(rows)]
            part[...] = rows[: len(part)]
            part *= self.ops.vector(2 * self.rng.integers(0, 2, rows.shape[1:]).astype(np.float32) - 1)
        return out


def filled_tokens(policy: Policy, plan: CachePlan, depth: int) -> int:
    """Of how many tokens `fill` makes a sequence of that depth."""
    return min(depth, 2 * max(plan.slots, default=0)) if isinstance(policy, BoundedPolicy) else depth


def filling_bytes(policy: Policy, plan: CachePlan, config: ModelConfig, depth: int) -> int:
    """Memory that `fill` takes besides the cache, at most; only the merging of D2O takes some more.

    Of one layer the longest chunk of a prompt, what attends it and what comes of it, in float32; of every layer the
    rows that are drawn and, with a budget, the prompt as it is cached, which D2O holds until it has seen all layers.
    """
    filled, c = filled_tokens(policy, plan, depth), config
    chunk = max((stop - start for start, stop in prompt_chunks(policy, 0, filled)), default=0)
    numbers = 2 * chunk * (c.n_head + c.n_head_kv) + 2 * min(filled, PREFILL_CHUNK) * c.n_layer * c.n_head_kv
    held = plan.rows_bytes(c, [filled] * c.n_layer) if isinstance(policy, BoundedPolicy) else 0
    return 4 * c.head_dim * numbers + held


def fill(ops: Ops, cache: Cache, policy: Policy, config: ModelConfig, depth: int, seed: int = SEED) -> None:
    """Makes every sequence one of `depth` random tokens, as the policy would keep them.

    A policy that keeps all tokens is not asked for their attention, which nobody needs. One with a budget gets twice as
    many as it holds, if the depth is more, and the same in every sequence: then it is full, and a step costs what it
    costs at any depth.
    """
    rng = np.random.default_rng(seed)
    keeps_all = not isinstance(policy, BoundedPolicy)
    using: Any = _Unattended(ops) if keeps_all else ops
    depth = filled_tokens(policy, cache.plan, depth)
    most = min(depth, PREFILL_CHUNK)
    rows = [RandomRows(ops, rng, most, cache.plan, config, layer) for layer in range(config.n_layer)]

    def prefill(layer: int, seq: int, pos: np.ndarray) -> None:  # a function, so that a layer's are gone with it
        k, v = rows[layer](pos)
        q = k if keeps_all else random_queries(ops, rng, len(pos), config)
        policy.prefill(using, cache, layer, seq, q, k, v)

    for seq in range(len(cache.n_seen)):
        if seq and not keeps_all:
            cache.move(0, seq)
            continue
        for start, stop in prompt_chunks(policy, 0, depth):
            for layer in range(config.n_layer):
                prefill(layer, seq, np.arange(start, stop))
            policy.prefilled(ops, cache, seq)
            cache.n_seen[seq] += stop - start


class _Unattended:
    """Ops with which a prompt is cached and not attended."""

    def __init__(self, ops: Ops):
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def attend_chunk(self, q: Array, *_: Any, **__: Any) -> Array:
        return q
