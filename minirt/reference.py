"""Ops in plain NumPy, float32: the truth the fast devices are tested against. Weights are dequantised when loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .checks import check_chunk, check_feed_forward, check_product, check_qkv, check_ranges, check_slots, check_tokens
from .dequantize import dequantize
from .gguf_file import Tensor
from .ops import KV
from .rope import Angles, Rope
from .stores import STORES, Store

if TYPE_CHECKING:
    from .config import ModelConfig
    from .weights import LayerWeights


@dataclass(frozen=True)
class DenseMatrix:
    """A dequantised weight."""

    values: np.ndarray  # float32 [n_out, n_in]
    nbytes: int  # in the file

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape


class ReferenceOps:
    name = "reference"

    def vector(self, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values, np.float32)

    def matrix(self, tensor: Tensor) -> DenseMatrix:
        return DenseMatrix(dequantize(tensor), tensor.data.nbytes)

    def table(self, tensor: Tensor) -> DenseMatrix:
        return self.matrix(tensor)

    def to_host(self, array: np.ndarray) -> np.ndarray:
        return array

    def embed(self, table: DenseMatrix, tokens: np.ndarray) -> np.ndarray:
        check_tokens(tokens, table.shape[0])
        return table.values[tokens]

    def qkv(
        self, x: np.ndarray, layer: LayerWeights, config: ModelConfig, angles: Angles
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        check_qkv(x, layer, config, angles)
        h = rms_norm(x, layer.attn_norm, config.rms_eps)

        def project(matrix: DenseMatrix, bias: np.ndarray | None, norm: np.ndarray | None) -> np.ndarray:
            out = h @ matrix.values.T + (0.0 if bias is None else bias)
            heads = out.astype(np.float32).reshape(len(x), -1, config.head_dim)
            return heads if norm is None else rms_norm(heads, norm, config.rms_eps)

        q, k = project(layer.wq, layer.bq, layer.q_norm), project(layer.wk, layer.bk, layer.k_norm)
        rotate(q, angles)
        rotate(k, angles)
        return q, k, project(layer.wv, layer.bv, None)

    def add_linear(self, x: np.ndarray, h: np.ndarray, matrix: DenseMatrix) -> None:
        x += h @ matrix.values.T

    def feed_forward(self, x: np.ndarray, layer: LayerWeights, config: ModelConfig) -> None:
        check_feed_forward(x, layer)
        h = rms_norm(x, layer.ffn_norm, config.rms_eps)
        x += (silu(h @ layer.w_gate.values.T) * (h @ layer.w_up.values.T)) @ layer.w_down.values.T

    def logits(self, x: np.ndarray, norm: np.ndarray, eps: float, matrix: DenseMatrix) -> np.ndarray:
        check_product(x, norm, matrix)
        return rms_norm(x, norm, eps) @ matrix.values.T

    def angles(self, rope: Rope, pos: np.ndarray) -> Angles:
        return Angles(rope.angles(pos), rope.interleaved)

    def allocate(self, store: Store, shape: tuple[int, int, int, int]) -> np.ndarray:
        return np.zeros(shape, store.dtype)

    def append(self, kv: KV, seq: np.ndarray, slot: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        check_slots(kv, seq, slot)
        kv.k[seq, :, slot] = store_of(kv.k).encode(k)
        kv.v[seq, :, slot] = store_of(kv.v).encode(v)

    def attend(self, q: np.ndarray, kv: KV, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
        check_ranges(q, kv, first, stop)
        out = np.zeros_like(q)
        for b, (i, j) in enumerate(zip(first, stop, strict=True)):
            if i < j:
                mask = np.zeros((1, j - i), np.float32)
                out[b] = attention(q[b : b + 1], KV(kv.k[b, :, i:j], kv.v[b, :, i:j]), mask)[0]
        return out

    def attend_chunk(self, q: np.ndarray, kv: KV, seq: int, start: int, window: int) -> np.ndarray:
        check_chunk(q, kv, seq, start, window)
        stop = start + len(q)
        row, slot = np.arange(start, stop)[:, None], np.arange(stop)
        visible = (slot <= row) & ((slot > row - window) if window else True)
        mask = np.where(visible, 0.0, -np.inf).astype(np.float32)
        return attention(q, KV(kv.k[seq, :, :stop], kv.v[seq, :, :stop]), mask)


def rotate(x: np.ndarray, angles: Angles) -> None:
    """Turns the leading components of each head of x [N, H, d], in place."""
    cos, sin = angles.values[:, :, None, :]
    dim = 2 * cos.shape[-1]
    a, b = (x[..., 0:dim:2], x[..., 1:dim:2]) if angles.interleaved else (x[..., : dim // 2], x[..., dim // 2 : dim])
    a[:], b[:] = a * cos - b * sin, a * sin + b * cos


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467)."""
    mean = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
    return (x * (1.0 / np.sqrt(mean + eps)).astype(np.float32)) * weight


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x) (arXiv 1702.03118); exp overflows to infinity for very negative x, which gives the right zero."""
    with np.errstate(over="ignore"):
        return x / (1.0 + np.exp(-x))


def attention(q: np.ndarray, kv: KV, mask: np.ndarray) -> np.ndarray:
    """Softmax attention of q [T, H_q, d] over stored k, v [H_kv, S, d] with an additive mask [T, S]: [T, H_q, d].

    Query head h reads KV head h // g.
    """
    k, v = store_of(kv.k).decode(kv.k), store_of(kv.v).decode(kv.v)
    group = q.shape[1] // len(k)
    out = np.empty_like(q)
    for h in range(q.shape[1]):
        scores = q[:, h] @ k[h // group].T / np.float32(np.sqrt(q.shape[2])) + mask
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, h] = (p / p.sum(axis=1, keepdims=True)) @ v[h // group]
    return out


def store_of(array: np.ndarray) -> Store:
    """The store a cache array was allocated with."""
    return next(s for s in STORES.values() if s.dtype == array.dtype)
