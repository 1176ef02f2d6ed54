"""The decoder of a Llama-family model, one page: it names no policy and no device.

Per layer: x += Wo . attention(RoPE(Wq n), RoPE(Wk n), Wv n), n = RMSNorm(x); then x += Wdown . (silu(Wgate n) * Wup n).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .cache import Cache
from .config import ModelConfig
from .errors import ModelError
from .ops import Array, Ops
from .policies import Policy
from .rope import make_rope
from .weights import Weights

Attention = Callable[[int, Array, Array, Array], Array]  # (layer, q, k, v) -> out [N, H_q, d]


class Decoder:
    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, policy: Policy):
        self.config, self.weights, self.ops, self.policy = config, weights, ops, policy
        self.rope = make_rope(config, weights.rope_freqs)

    def prefill(self, cache: Cache, tokens: Sequence[int], seq: int = 0, logits: str = "last") -> np.ndarray | None:
        """Runs a prompt chunk [T] of one sequence and caches it.

        Returns float32 logits: of the last token [n_vocab] ("last"), of all [T, n_vocab] ("all"), or None ("none").
        """
        start = int(cache.n_seen[seq])
        pos = np.arange(start, start + len(tokens), dtype=np.int32)
        x = self._layers(tokens, pos, lambda layer, q, k, v: self.policy.prefill(self.ops, cache, layer, seq, q, k, v))
        cache.n_seen[seq] += len(tokens)
        if logits == "none":
            return None
        return self._logits(x) if logits == "all" else self._logits(x[-1:])[0]

    def decode(self, cache: Cache, tokens: Sequence[int]) -> np.ndarray:
        """One step: a token for each of the cache's B sequences. Returns float32 logits [B, n_vocab]."""
        x = self._layers(
            tokens, cache.n_seen, lambda layer, q, k, v: self.policy.attend(self.ops, cache, layer, q, k, v)
        )
        cache.n_seen += 1
        return self._logits(x)

    @np.errstate(over="ignore", invalid="ignore")  # damaged weights are reported once, by _logits
    def _layers(self, tokens: Sequence[int], pos: np.ndarray, attention: Attention) -> Array:
        """Token ids [N] at true positions pos [N] -> residual stream [N, n_embd] after the last layer."""
        c, ops = self.config, self.ops
        n = len(tokens)
        x = ops.embed(self.weights.token_embd, np.asarray(tokens, np.int32))
        angles = ops.angles(self.rope, pos)
        for layer, w in enumerate(self.weights.layers):
            q, k, v = ops.qkv(x, w, c, angles)
            out = attention(layer, q, k, v)
            ops.add_linear(x, out.reshape(n, c.n_head * c.head_dim), w.wo)
            ops.feed_forward(x, w, c)
        return x

    @np.errstate(over="ignore", invalid="ignore")
    def _logits(self, x: Array) -> np.ndarray:
        w = self.weights
        out = self.ops.to_host(self.ops.logits(x, w.output_norm, self.config.rms_eps, w.output))
        if not np.isfinite(np.add.reduce(out, axis=None)):
            raise ModelError("the logits are not finite: the file's weights are damaged, or too large for --kv f16")
        return out
