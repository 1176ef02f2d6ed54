"""Ops in plain NumPy, float32: the truth the fast devices are tested against. Weights are dequantised when loaded.

Here are the rows of activations; attention is beside it, what decides which cached tokens are kept in `eviction`, what
reads few of them in `sparse`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..checks import check_feed_forward, check_product, check_qkv, check_tokens
from ..dequantize import dequantize
from ..gguf_file import Tensor
from ..ops import Ops
from ..rope import Angles, Rope
from .attention import AttentionOps, turn
from .eviction import EvictionOps
from .sparse import SparseOps

if TYPE_CHECKING:
    from ..config import ModelConfig
    from ..weights import LayerWeights


@dataclass(frozen=True)
class DenseMatrix:
    """A dequantised weight."""

    values: np.ndarray  # float32 [n_out, n_in]
    nbytes: int  # in the file

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape


class ReferenceOps(AttentionOps, EvictionOps, SparseOps):
    name = "reference"

    def vector(self, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values, np.float32)

    def matrix(self, tensor: Tensor) -> DenseMatrix:
        return DenseMatrix(dequantize(tensor), tensor.data.nbytes)

    def table(self, tensor: Tensor) -> DenseMatrix:
        return self.matrix(tensor)

    def to_host(self, array: np.ndarray) -> np.ndarray:
        return array

    def record(self, step: Callable[[Ops], np.ndarray]) -> tuple[np.ndarray, None]:
        return step(self), None

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
        turn(q, angles)
        turn(k, angles)
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


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467)."""
    mean = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
    return (x * (1.0 / np.sqrt(mean + eps)).astype(np.float32)) * weight


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x) (arXiv 1702.03118); exp overflows to infinity for very negative x, which gives the right zero."""
    with np.errstate(over="ignore"):
        return x / (1.0 + np.exp(-x))
