"""Ops in plain NumPy, float32: the truth the fast devices are tested against. Weights are dequantised when loaded.

Here are the rows of activations; attention is beside it, what decides which cached tokens are kept in `eviction`, what
reads few of them in `sparse`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..checks import check_feed_forward, check_product, check_qkv, check_tokens
from ..dequantize import dequantize
from ..gguf_file import Tensor
from ..ops import Ops
from ..rope import Angles, Rope, host_angles
from ..sampling import most_likely
from .attention import AttentionOps
from .eviction import EvictionOps
from .low_rank import Factor, with_positions
from .rows import DenseMatrix, rms_norm, turn
from .sparse import SparseOps

if TYPE_CHECKING:
    from ..config import ModelConfig
    from ..weights import LayerWeights


class ReferenceOps(AttentionOps, EvictionOps, SparseOps):
    name, device_name = "reference", ""

    def memory(self) -> None:
        return None

    def bandwidth(self) -> None:
        return None

    def vector(self, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values, np.float32)

    def matrix(self, tensor: Tensor) -> DenseMatrix:
        return DenseMatrix(dequantize(tensor), tensor.data.nbytes)

    def table(self, tensor: Tensor) -> DenseMatrix:
        return self.matrix(tensor)

    def factor(
        self,
        tensor: Tensor,
        config: ModelConfig,
        bias: np.ndarray | None,
        norm: np.ndarray | None = None,
        rope: Rope | None = None,
    ) -> Factor:
        return Factor(self.matrix(tensor), config.n_head_kv, bias, norm, config.rms_eps, rope)

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

        def latents(matrix: DenseMatrix, factor: Factor) -> np.ndarray:
            return (h @ matrix.values.T).astype(np.float32).reshape(len(x), -1, factor.rank)

        def project(matrix: DenseMatrix, bias: np.ndarray | None, norm: np.ndarray | None) -> np.ndarray:
            out = h @ matrix.values.T + (0.0 if bias is None else bias)
            heads = out.astype(np.float32).reshape(len(x), -1, config.head_dim)
            return heads if norm is None else rms_norm(heads, norm, config.rms_eps)

        q = project(layer.wq, layer.bq, layer.q_norm)
        turn(q, angles)
        if layer.k_factor is not None and layer.v_factor is not None:
            k = with_positions(latents(layer.wk, layer.k_factor), angles)
            return q, k, latents(layer.wv, layer.v_factor)
        k = project(layer.wk, layer.bk, layer.k_norm)
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

    def most_likely(self, logits: np.ndarray) -> np.ndarray:
        return most_likely(logits)

    def angles(self, rope: Rope, pos: np.ndarray, out: Angles | None = None) -> Angles:
        return host_angles(rope, pos, out)


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x) (arXiv 1702.03118); exp overflows to infinity for very negative x, which gives the right zero."""
    with np.errstate(over="ignore"):
        return x / (1.0 + np.exp(-x))
