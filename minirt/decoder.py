"""The decoder of a Llama-family model, one page: it names no policy and no device.

Per layer: x += Wo . attention(RoPE(Wq n), RoPE(Wk n), Wv n), n = RMSNorm(x); then x += Wdown . (silu(Wgate n) * Wup n).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .cache import Cache, CachePlan, allocate_cache
from .checks import check_tokens
from .config import ModelConfig
from .errors import ModelError
from .ops import Array, Ops
from .policies import Policy
from .rope import Angles, make_rope
from .weights import Weights

CHUNK = 512  # rows that go through a layer together: enough for matrix products to run at full speed

NOT_FINITE = "the logits are not finite: the file's weights are damaged, or too large for --kv f16"

Attention = Callable[[Ops, int, Array, Array, Array], Array]  # (ops, layer, q, k, v) -> out [N, H_q, d]


@dataclass(frozen=True)
class RecordedStep:
    """A decode step that can be made again: on other tokens at other positions, in the same memory."""

    tokens: np.ndarray  # int32 [B]
    angles: Angles
    logits: Array
    again: Callable[[], None]


class Decoder:
    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, policy: Policy):
        self.config, self.weights, self.ops, self.policy = config, weights, ops, policy
        self.rope = make_rope(config, weights.rope_freqs)

    def under(self, policy: Policy) -> Decoder:
        """The same model with another policy."""
        return Decoder(self.config, self.weights, self.ops, policy)

    def new_cache(self, plan: CachePlan, n_sequences: int = 1) -> Cache:
        """An empty cache for this model."""
        factors = [(layer.k_factor, layer.v_factor) for layer in self.weights.layers]
        return allocate_cache(plan, self.config, self.ops, n_sequences, self.rope, factors)

    def prefill(
        self,
        cache: Cache,
        tokens: Sequence[int],
        seq: int = 0,
        logits: str = "last",
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray | None:
        """Runs a prompt chunk [T] of one sequence and caches it.

        Returns float32 logits: of the last token [n_vocab] ("last"), of all [T, n_vocab] ("all"), or None ("none").
        progress: called with (layers done, in all).
        """
        start = int(cache.n_seen[seq])
        pos = np.arange(start, start + len(tokens), dtype=np.int32)
        cache.torn[seq] = True
        cache.recorded = None
        x = self.ops.embed(self.weights.token_embd, np.asarray(tokens, np.int32))
        angles = self.ops.angles(self.rope, pos)
        self._layers(
            self.ops,
            x,
            angles,
            lambda ops, layer, q, k, v: self.policy.prefill(ops, cache, layer, seq, q, k, v),
            progress,
        )
        self.policy.prefilled(self.ops, cache, seq)
        cache.n_seen[seq] += len(tokens)
        cache.torn[seq] = False
        if logits == "none":
            return None
        found = self._finite(self._logits(self.ops, x if logits == "all" else x[-1:]))
        return found if logits == "all" else found[0]

    def decode(self, cache: Cache, tokens: Sequence[int]) -> np.ndarray:
        """One step: a token for each of the cache's B sequences. Returns float32 logits [B, n_vocab]."""
        return np.array(self._finite(self._step(cache, tokens)))

    def choose(self, cache: Cache, tokens: Sequence[int]) -> list[int]:
        """As `decode`, but returns the most likely token after each, the first of equally likely ones: nothing else
        leaves the device."""
        found = self.ops.to_host(self.ops.most_likely(self._step(cache, tokens)))
        if (found < 0).any():
            raise ModelError(NOT_FINITE)
        return [int(token) for token in found]

    def rewind(self, cache: Cache, seq: int, n: int) -> int:
        """Forgets all but the first n tokens of a sequence; returns how many the policy could keep (n, or fewer)."""
        if n != cache.n_seen[seq] or cache.torn[seq]:
            cache.recorded = None
        return self.policy.rewind(self.ops, cache, seq, n)

    def _step(self, cache: Cache, tokens: Sequence[int]) -> Array:
        """The logits [B, n_vocab] after a decode step, on the device; valid until the next one."""
        ids = np.array(tokens, np.int32)
        if len(ids) != len(cache.n_seen):
            raise ValueError(f"{len(ids)} tokens for {len(cache.n_seen)} sequences")
        cache.torn[:] = True
        logits = self._logits_of_step(cache, ids)
        cache.n_seen += 1
        cache.torn[:] = False
        return logits

    def _logits_of_step(self, cache: Cache, tokens: np.ndarray) -> Array:
        step: RecordedStep | None = cache.recorded
        if step is not None and cache.renew() and max(cache.n_seen.tolist()) < cache.plan.n_ctx:
            check_tokens(tokens, self.config.n_vocab)
            step.tokens[...] = tokens
            self.ops.angles(self.rope, cache.n_seen, step.angles)
            step.again()
            return step.logits
        cache.recorded = step = None  # its memory is free, and it is not made again if this one is interrupted
        angles = self.ops.angles(self.rope, cache.n_seen)

        def attention(ops: Ops, layer: int, q: Array, k: Array, v: Array) -> Array:
            return self.policy.attend(ops, cache, layer, q, k, v)

        def whole(ops: Ops) -> Array:
            x = ops.embed(self.weights.token_embd, tokens)
            return self._logits(ops, self._layers(ops, x, angles, attention))

        if not cache.lasting:
            return whole(self.ops)
        logits, again = self.ops.record(whole)
        cache.recorded = None if again is None else RecordedStep(tokens, angles, logits, again)
        return logits

    @np.errstate(over="ignore", invalid="ignore")  # damaged weights are reported once, by _finite
    def _layers(
        self,
        ops: Ops,
        x: Array,
        angles: Angles,
        attention: Attention,
        progress: Callable[[int, int], None] | None = None,
    ) -> Array:
        """Takes the residual stream x [N, n_embd] through all layers, in place, and returns it.

        What a row costs in memory while it goes through a layer is bounded by going through it chunk by chunk; only
        attention sees all rows at once.
        """
        c, n = self.config, len(x)
        chunks = [slice(i, i + CHUNK) for i in range(0, n, CHUNK)]
        turns = [angles.part(chunk) for chunk in chunks]
        for layer, w in enumerate(self.weights.layers):
            parts = [ops.qkv(x[chunk], w, c, turn) for chunk, turn in zip(chunks, turns, strict=True)]
            q, k, v = parts[0] if len(parts) == 1 else (ops.concatenate(p) for p in zip(*parts, strict=True))
            out = attention(ops, layer, q, k, v).reshape(n, c.n_head * c.head_dim)
            for chunk in chunks:
                ops.add_linear(x[chunk], out[chunk], w.wo)
                ops.feed_forward(x[chunk], w, c)
            if progress is not None:
                progress(layer + 1, c.n_layer)
        return x

    @np.errstate(over="ignore", invalid="ignore")
    def _logits(self, ops: Ops, x: Array) -> Array:
        return ops.logits(x, self.weights.output_norm, self.config.rms_eps, self.weights.output)

    @np.errstate(over="ignore", invalid="ignore")
    def _finite(self, logits: Array) -> np.ndarray:
        """The logits on the host."""
        out = self.ops.to_host(logits)
        if not np.isfinite(np.add.reduce(out, axis=None)):
            raise ModelError(NOT_FINITE)
        return out
