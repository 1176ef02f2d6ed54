"""Rows of activations on a card: embeddings, norms, products with weights, heads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from minirt.checks import check_feed_forward, check_product, check_qkv, check_tokens
from minirt.config import ModelConfig
from minirt.gguf_file import Tensor
from minirt.rope import Angles, Rope

from .base import BaseOps
from .device import Array
from .formats import FORMATS, GROUP
from .matrices import THREADS, Matrix, make_matrix

if TYPE_CHECKING:
    from minirt.weights import LayerWeights

FEW_ROWS = 8  # up to here weights are multiplied as they are; beyond, on tensor cores
TILE = 64  # of gemm.cu
WARP = 32
PLAIN, NORMED, GATED = 0, 1, 2  # of activations.cu
CODES_BYTES, SUMS_BYTES = 64, 16  # of 32 rounded activations
TOGETHER = 3  # matrices of a launch


class RowOps(BaseOps):
    def __init__(self, *args: Any):
        super().__init__(*args)
        self._table: tuple[Tensor, Matrix] | None = None

    def matrix(self, tensor: Tensor) -> Matrix:
        if self._table is not None and self._table[0] is tensor:  # embeddings that are the output's weights too
            return self._table[1]
        return make_matrix(self.device, tensor)

    def table(self, tensor: Tensor) -> Matrix:
        self._table = tensor, make_matrix(self.device, tensor)
        return self._table[1]

    def angles(self, rope: Rope, pos: np.ndarray) -> Angles:
        return Angles(self.device.upload(rope.angles(pos)), rope.interleaved, pos)

    def embed(self, table: Matrix, tokens: np.ndarray) -> Array:
        check_tokens(tokens, table.shape[0])
        n, n_in = len(tokens), table.shape[1]
        out = self.device.empty((n, n_in), np.float32)
        width = n_in // GROUP if table.name in FORMATS else n_in
        grid = (n, -(-width // THREADS))
        where = self.device.upload(np.ascontiguousarray(tokens, np.int32))
        self._launch("embed.cu", "embed", grid, THREADS, *table.planes, width, where, out, **table.constants)
        return out

    def qkv(self, x: Array, layer: LayerWeights, config: ModelConfig, angles: Angles) -> tuple[Array, Array, Array]:
        check_qkv(x, layer, config, angles)
        n, d, n_head, n_head_kv = len(x), config.head_dim, config.n_head, config.n_head_kv
        out = self._products(x, (layer.wq, layer.wk, layer.wv), NORMED, layer.attn_norm, config.rms_eps)
        cos, sin = angles.values[0], angles.values[1]
        shapes = (("queries", n_head), ("keys", n_head_kv), ("values", n_head_kv))
        q, k, v = (self._own(name, (n, heads, d)) for name, heads in shapes)
        self._launch(
            "activations.cu", "finish_qkv", (n, n_head + 2 * n_head_kv), 64,
            out, np.int64(out.shape[1]), n_head, n_head_kv, d, layer.bq, layer.bk, layer.bv, layer.q_norm,
            layer.k_norm, config.rms_eps, cos, sin, int(cos.shape[1]), angles.interleaved, q, k, v,
            shared=4 * (d + WARP),
        )  # fmt: skip
        return q, k, v

    def add_linear(self, x: Array, h: Array, matrix: Matrix) -> None:
        if x.shape != (len(h), matrix.shape[0]) or h.shape[1] != matrix.shape[1]:
            raise ValueError(f"residual {x.shape} and activations {h.shape} do not fit a weight {matrix.shape}")
        self._products(h, (matrix,), PLAIN, out=x)

    def feed_forward(self, x: Array, layer: LayerWeights, config: ModelConfig) -> None:
        check_feed_forward(x, layer)
        h = self._products(x, (layer.w_gate, layer.w_up), NORMED, layer.ffn_norm, config.rms_eps)
        self._products(h, (layer.w_down,), GATED, out=x)

    def logits(self, x: Array, norm: Array, eps: float, matrix: Matrix) -> Array:
        check_product(x, norm, matrix)
        out = self.device.zeros((len(x), matrix.shape[0]), np.float32)
        return self._products(x, (matrix,), NORMED, norm, eps, out)

    def _own(self, name: str, shape: tuple[int, ...]) -> Array:
        """Memory for a result: of few rows scratch, of many its own, because results of several chunks are joined."""
        return self._buffer(name, shape) if shape[0] <= FEW_ROWS else self.device.empty(shape, np.float32)

    def _products(
        self,
        x: Array,
        matrices: Sequence[Matrix],
        kind: int,
        norm: Array | None = None,
        eps: float = 0.0,
        out: Array | None = None,
    ) -> Array:
        """Rows x times each matrix, side by side in scratch; or added to out [N, n_out], which is then the result."""
        n, n_in, add = len(x), matrices[0].shape[1], out is not None
        begins = list(itertools.accumulate((m.shape[0] for m in matrices), initial=0))
        if out is None:
            out = self._buffer(f"product of {len(matrices)}", (n, begins[-1]))
        coded, few = [m for m in matrices if m.name in FORMATS], n <= FEW_ROWS
        columns = n_in // GROUP
        codes = self._buffer("codes", (n, columns * CODES_BYTES), np.uint8) if few and coded else None
        sums = self._buffer("sums", (n, columns * SUMS_BYTES), np.uint8) if few and coded else None
        floats = self._buffer("floats", (n, n_in)) if few and len(coded) < len(matrices) else None
        halves = None if few else self._buffer("halves", (n, n_in), np.uint16)
        factors = None if few else self._buffer("factors", (n,))
        self._launch(
            "activations.cu", "prepare", n, 256, x, np.int64(x.shape[1]), n_in, kind, norm, eps, codes, sums, floats,
            halves, factors,
        )  # fmt: skip
        stride = np.int64(out.shape[1])
        if not few:
            for m, begin in zip(matrices, begins, strict=False):
                grid = (-(-n // TILE), -(-m.shape[0] // TILE))
                self._launch(
                    "gemm.cu", "gemm", grid, 128, halves, factors, n, n_in, m.shape[0], m.largest, add, stride,
                    out[:, begin:], *m.planes, **m.constants,
                )  # fmt: skip
            return out
        rows = next(size for size in (1, 2, 4, 8) if n <= size)
        for same in _alike(matrices, begins):
            warps = sum(m.shape[0] for m, _ in same)
            m, absent = same[0][0], (*(None for _ in same[0][0].planes), 0, None)
            weights = [(*m.planes, m.shape[0], out[:, begin:]) for m, begin in same]
            weights += [absent] * (TOGETHER - len(same))
            inputs = (codes, sums, n, columns) if m.name in FORMATS else (floats, n, n_in)
            grid, constants = -(-warps * WARP // THREADS), {**m.constants, "ROWS": rows}
            self._launch(
                "products.cu", "products", grid, THREADS, *inputs, add, stride, *sum(weights, ()), **constants
            )  # fmt: skip
        return out


def _alike(matrices: Sequence[Matrix], begins: Sequence[int]) -> list[list[tuple[Matrix, int]]]:
    """Matrices of a format together, each with where its products begin."""
    found: dict[str, list[tuple[Matrix, int]]] = {}
    for m, begin in zip(matrices, begins, strict=False):
        found.setdefault(m.name, []).append((m, begin))
    return list(found.values())
