"""The decoder once more, in NumPy and differentiable: gradients of the loss with respect to keys and values.

Written out by hand. A layer is computed again when its gradient is due, so that between the two passes only the
layers' inputs are kept. Symbols as in `minirt.config`; a name d_x is the gradient of the loss by x, of x's shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..config import ModelConfig
from ..dequantize import dequantize
from ..gguf_file import GGUFFile
from ..rope import make_rope
from ..weights import LAYER_TENSORS, LayerWeights

ROWS = 128  # of logits at a time


class KVGradient(NamedTuple):
    """Of a layer's projections: W_k's gradient is d_k^T x, W_v's d_v^T x."""

    layer: int
    x: np.ndarray  # [T, n_embd]: their input
    d_k: np.ndarray  # [T, H_kv d]: by W_k x
    d_v: np.ndarray  # [T, H_kv d]: by W_v x


class Network:
    """A model that can be differentiated. Weights are dequantised when they are needed, but for the embeddings."""

    def __init__(self, file: GGUFFile, config: ModelConfig, dtype: type = np.float32):
        self.file, self.config, self.dtype = file, config, dtype
        factors = file.tensors.get("rope_freqs.weight")
        self.rope = make_rope(config, None if factors is None else dequantize(factors))
        self.table = self._tensor("token_embd.weight")
        self.output_norm = self._tensor("output_norm.weight")
        self.output = self._tensor("output.weight") if "output.weight" in file.tensors else self.table

    def layer(self, i: int) -> LayerWeights:
        names = {field: f"blk.{i}.{name}" for field, name in LAYER_TENSORS.items()}
        return LayerWeights(**{f: self._tensor(n) if n in self.file.tensors else None for f, n in names.items()})

    def loss(self, tokens: np.ndarray) -> float:
        """Mean cross-entropy, in nats, of each token of [T] but the first, given those before it."""
        return self._loss(self._inputs(tokens)[-1], tokens)[0]

    def gradients(self, tokens: np.ndarray) -> Iterator[KVGradient]:
        """Of `loss`, from the last layer to the first."""
        inputs = self._inputs(tokens)
        d_x = self._loss(inputs.pop(), tokens)[1]
        for i in reversed(range(self.config.n_layer)):
            d_x, gradient = self._layer_back(i, inputs.pop(), d_x)
            yield gradient

    def _tensor(self, name: str) -> np.ndarray:
        return dequantize(self.file.tensors[name]).astype(self.dtype, copy=False)

    def _inputs(self, tokens: np.ndarray) -> list[np.ndarray]:
        """What enters each layer, and what leaves the last: [T, n_embd] each."""
        inputs = [self.table[tokens]]
        for i in range(self.config.n_layer):
            inputs.append(self._layer(self.layer(i), inputs[-1]).out)
        return inputs

    def _loss(self, x: np.ndarray, tokens: np.ndarray) -> tuple[float, np.ndarray]:
        """And its gradient by x [T, n_embd]; the last row predicts nothing that is known."""
        n, total, d_x = len(tokens) - 1, 0.0, np.zeros_like(x)
        normed = rms_norm(x[:n], self.output_norm, self.config.rms_eps)
        for i in range(0, n, ROWS):
            logits = normed[i : i + ROWS] @ self.output.T
            logits -= logits.max(axis=1, keepdims=True)
            target = np.arange(len(logits)), tokens[i + 1 : i + 1 + len(logits)]
            chosen = logits[target]
            p = np.exp(logits, out=logits)
            sums = p.sum(axis=1, keepdims=True)
            total += float((np.log(sums[:, 0]) - chosen).sum(dtype=np.float64))
            p /= sums
            p[target] -= 1
            d_x[i : i + len(p)] = p @ self.output
        d_x[:n] = rms_norm_back(x[:n], self.output_norm, self.config.rms_eps, d_x[:n] / n)
        return total / n, d_x

    def _layer(self, w: LayerWeights, x: np.ndarray) -> _Layer:
        """One layer [T, n_embd] -> [T, n_embd], with all that its gradient needs."""
        c, n = self.config, len(x)
        h = rms_norm(x, w.attn_norm, c.rms_eps)

        def project(matrix: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
            out = h @ matrix.T
            return (out if bias is None else out + bias).reshape(n, -1, c.head_dim)

        raw_q, raw_k, v = project(w.wq, w.bq), project(w.wk, w.bk), project(w.wv, w.bv)
        q, k = (
            self._turn(a if norm is None else rms_norm(a, norm, c.rms_eps), 1)
            for a, norm in ((raw_q, w.q_norm), (raw_k, w.k_norm))
        )
        scores = self._grouped(q) @ _heads(k)[:, None].swapaxes(2, 3)
        scores *= c.head_dim**-0.5
        distance = np.arange(n)[:, None] - np.arange(n)
        scores[..., (distance < 0) | (distance >= (c.sliding_window or n))] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        p = np.exp(scores, out=scores)
        p /= p.sum(axis=-1, keepdims=True)
        attended = self._rows(p @ _heads(v)[:, None])
        middle = x + attended @ w.wo.T
        f = rms_norm(middle, w.ffn_norm, c.rms_eps)
        gate, up = f @ w.w_gate.T, f @ w.w_up.T
        out = middle + (gate * sigmoid(gate) * up) @ w.w_down.T
        return _Layer(h, raw_q, raw_k, q, k, v, p, middle, gate, up, out)

    def _layer_back(self, i: int, x: np.ndarray, d_out: np.ndarray) -> tuple[np.ndarray, KVGradient]:
        """The gradients by the input [T, n_embd] of layer i, and by its keys and values."""
        c, w, n = self.config, self.layer(i), len(x)
        s = self._layer(w, x)

        d_hidden, gated = d_out @ w.w_down, sigmoid(s.gate)
        d_gate = d_hidden * s.up * gated * (1 + s.gate * (1 - gated))
        d_up = d_hidden * s.gate * gated
        d_middle = d_out + rms_norm_back(s.middle, w.ffn_norm, c.rms_eps, d_gate @ w.w_gate + d_up @ w.w_up)

        d_attended = self._grouped((d_middle @ w.wo).reshape(n, c.n_head, c.head_dim))
        d_v = (s.p.swapaxes(2, 3) @ d_attended).sum(axis=1)
        d_p = d_attended @ _heads(s.v)[:, None].swapaxes(2, 3)
        d_scores = s.p * (d_p - (d_p * s.p).sum(axis=-1, keepdims=True))
        d_scores *= c.head_dim**-0.5
        d_q = self._rows(d_scores @ _heads(s.k)[:, None]).reshape(s.q.shape)
        d_k = _heads((d_scores.swapaxes(2, 3) @ self._grouped(s.q)).sum(axis=1))

        d_q, d_k = self._turn(d_q, -1), self._turn(d_k, -1)
        if w.q_norm is not None:
            d_q = rms_norm_back(s.raw_q, w.q_norm, c.rms_eps, d_q)
            d_k = rms_norm_back(s.raw_k, w.k_norm, c.rms_eps, d_k)
        rows = d_q.reshape(n, -1), d_k.reshape(n, -1), _heads(d_v).reshape(n, -1)
        d_h = rows[0] @ w.wq + rows[1] @ w.wk + rows[2] @ w.wv
        d_x = d_middle + rms_norm_back(x, w.attn_norm, c.rms_eps, d_h)
        return d_x, KVGradient(i, s.h, rows[1], rows[2])

    def _turn(self, heads: np.ndarray, sign: int) -> np.ndarray:
        """Heads [T, H, d] rotated to their positions (sign 1), or times the transposed rotation (-1)."""
        cos, sin = self.rope.angles(np.arange(len(heads)))[:, :, None].astype(self.dtype)
        sin = sign * sin
        half = self.rope.dim // 2
        pairs = (np.s_[..., 0 : 2 * half : 2], np.s_[..., 1 : 2 * half : 2])
        first, second = pairs if self.rope.interleaved else (np.s_[..., :half], np.s_[..., half : 2 * half])
        out = heads.copy()
        out[first] = heads[first] * cos - heads[second] * sin
        out[second] = heads[first] * sin + heads[second] * cos
        return out

    def _grouped(self, q: np.ndarray) -> np.ndarray:
        """[T, H_q, d] -> [H_kv, g, T, d]"""
        return _heads(q).reshape(self.config.n_head_kv, -1, *q.shape[::2])

    def _rows(self, grouped: np.ndarray) -> np.ndarray:
        """[H_kv, g, T, d] -> [T, H_q d]"""
        n, d = grouped.shape[2:]
        return _heads(grouped.reshape(-1, n, d)).reshape(n, -1)


class _Layer(NamedTuple):
    h: np.ndarray  # [T, n_embd]: normed input
    raw_q: np.ndarray  # [T, H_q, d]: before norm and rotation
    raw_k: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    p: np.ndarray  # [H_kv, g, T, T]: probabilities
    middle: np.ndarray  # [T, n_embd]: after attention
    gate: np.ndarray  # [T, n_ff]
    up: np.ndarray
    out: np.ndarray  # [T, n_embd]


def _heads(a: np.ndarray) -> np.ndarray:
    """[T, H, d] -> [H, T, d], or back."""
    return np.ascontiguousarray(a.swapaxes(0, 1))


def rms_norm(x: np.ndarray, weight: Any, eps: float) -> np.ndarray:
    """Over the last axis, in x's own precision."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rms_norm_back(x: np.ndarray, weight: Any, eps: float, d_y: np.ndarray) -> np.ndarray:
    """The gradient by x of y = rms_norm(x)."""
    scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    d_y = d_y * weight
    return scale * (d_y - x * scale * scale * np.mean(d_y * x, axis=-1, keepdims=True))


def sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))
