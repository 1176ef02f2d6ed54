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
from .formats import FORMATS, GROUP, NUMBERS
from .matrices import THREADS, Matrix, make_matrix

if TYPE_CHECKING:
    from minirt.weights import LayerWeights

FEW_ROWS = 8  # up to here weights may be multiplied as they are
ROWS_OF_ONE = 4  # up to here they are, where there are tensor cores: more activations take longer to read than weights
SOME_ROWS = 64  # up to here a block reads weights for all rows
TENSOR_CORES = (7, 5)  # capability; without, batches.cu has too few registers
TILE, BATCH_TILE = 64, 128  # rows of weights of a block of gemm.cu and of batches.cu
WARP = 32
PLAIN, NORMED, GATED = 0, 1, 2  # of activations.cuh
ROUNDED_BYTES = 80  # of 32 rounded activations
TOGETHER = 3  # matrices of a launch
BLOCK, WARPS = 256, 8  # threads and warps of a block of products
PART, PART_THREADS = 8192, 1024  # logits of a block that looks for the largest, and its threads
ROOM = 47 << 10  # bytes of shared memory that any card gives a block, beside what the kernel has itself


class RowOps(BaseOps):
    _q_and_latents: Any

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

    def angles(self, rope: Rope, pos: np.ndarray, out: Angles | None = None) -> Angles:
        values = rope.angles(pos)
        if out is not None:
            self.device.refresh(values, out.values)
            return out
        on_device = self.device.upload(values) if self._recording is None else self._recording.place(values)
        return Angles(on_device, rope.interleaved, pos)

    def embed(self, table: Matrix, tokens: np.ndarray) -> Array:
        check_tokens(tokens, table.shape[0])
        n, n_in = len(tokens), table.shape[1]
        out = self.device.empty((n, n_in), np.float32)
        width = n_in // GROUP if table.name in FORMATS else n_in
        grid = (n, -(-width // THREADS))
        where = self._on_device(tokens)
        self._launch("embed.cu", "embed", grid, THREADS, *table.planes, width, where, out, **table.constants)
        return out

    def qkv(self, x: Array, layer: LayerWeights, config: ModelConfig, angles: Angles) -> tuple[Array, Array, Array]:
        check_qkv(x, layer, config, angles)
        n, d, n_head, n_head_kv = len(x), config.head_dim, config.n_head, config.n_head_kv
        out = self._products(x, (layer.wq, layer.wk, layer.wv), NORMED, layer.attn_norm, config.rms_eps)
        if layer.k_factor is not None:
            found: tuple[Array, Array, Array] = self._q_and_latents(out, layer, config, angles)
            return found
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
        gate, up, down = layer.w_gate, layer.w_up, layer.w_down
        alike = gate.name == up.name and (gate.name in NUMBERS) == (down.name in NUMBERS)
        if alike and self._makes_input(len(x), gate):
            h = self._gated(x, layer, config.rms_eps)
            self._few(h, None, (down,), [0], PLAIN, None, 0.0, x, True)
            return
        h = self._products(x, (gate, up), NORMED, layer.ffn_norm, config.rms_eps)
        self._products(h, (down,), GATED, out=x)

    def logits(self, x: Array, norm: Array, eps: float, matrix: Matrix) -> Array:
        check_product(x, norm, matrix)
        return self._products(x, (matrix,), NORMED, norm, eps)

    def most_likely(self, logits: Array) -> Array:
        n, width = logits.shape
        parts = -(-width // PART)
        best, out = self._buffer("best of parts", (n, parts, 2)), self._buffer("most likely", (n,), np.int32)
        done = self._counters(n)
        self._launch("most_likely.cu", "most_likely", (parts, n), PART_THREADS, logits, width, best, done, out)
        return out

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
        begins = list(itertools.accumulate((m.shape[0] for m in matrices), initial=0))[:-1]
        if out is None:
            out = self._buffer(f"product of {len(matrices)}", (n, begins[-1] + matrices[-1].shape[0]))
        if n > FEW_ROWS or self._is_batch(n, n_in):
            self._many(x, matrices, begins, kind, norm, eps, out, add)
            return out
        for numbers in (False, True):
            own = [i for i, m in enumerate(matrices) if (m.name in NUMBERS) == numbers]
            if not own:
                continue
            made = kind != GATED and self._makes_input(n, matrices[own[0]])
            given = None if made else self._input(x, n_in, kind, norm, eps, numbers)
            some, places = [matrices[i] for i in own], [begins[i] for i in own]
            self._few(given, x, some, places, kind, norm, eps, out, add)
        return out

    def _is_batch(self, n: int, n_in: int) -> bool:
        """Whether n sequences, or tokens of a prompt, are multiplied on tensor cores, all of them by one block."""
        return ROWS_OF_ONE < n <= SOME_ROWS and n_in % 8 == 0 and self.device.capability >= TENSOR_CORES

    def _makes_input(self, n: int, m: Matrix) -> bool:
        """Whether a block of products makes its input: of one row, if its shared memory takes that."""
        return n == 1 and _room(m) <= ROOM

    def _input(self, x: Array, n_in: int, kind: int, norm: Array | None, eps: float, numbers: bool) -> Array:
        """Rows x as few products read them: rounded, or floats."""
        shape = (len(x), n_in) if numbers else (len(x), n_in // GROUP * ROUNDED_BYTES)
        out = self._buffer("floats", shape) if numbers else self._buffer("rounded", shape, np.uint8)
        rounded, floats = (None, out) if numbers else (out, None)
        self._prepare(x, n_in, kind, norm, eps, rounded, floats, None, None)
        return out

    def _prepare(self, x: Array, n_in: int, kind: int, norm: Array | None, eps: float, *outs: Array | None) -> None:
        rows, stride = len(x), np.int64(x.shape[1])
        # Of one row as many as products have, which then add up a norm's squares alike.
        threads = BLOCK if rows == 1 else min(1024, max(BLOCK, n_in // 4 // WARP * WARP))
        self._launch("activations.cu", "prepare", rows, threads, x, stride, n_in, kind, norm, eps, *outs)

    def _few(
        self,
        given: Array | None,
        x: Array | None,
        matrices: Sequence[Matrix],
        begins: Sequence[int],
        kind: int,
        norm: Array | None,
        eps: float,
        out: Array,
        add: bool,
    ) -> None:
        """Products of a few rows, which are given as input or made of the one row x; a launch for each format."""
        n, n_in = len(out), matrices[0].shape[1]
        size = next(size for size in (1, 2, 4, 8) if n <= size)
        for same in _alike(matrices, begins):
            m, absent = same[0][0], (*(None for _ in same[0][0].planes), 0, None)
            weights = [(*m.planes, m.shape[0], out[:, begin:]) for m, begin in same]
            weights += [absent] * (TOGETHER - len(same))
            self._launch(
                "products.cu", "products", self._blocks(n, sum(m.shape[0] for m, _ in same)), BLOCK,
                given, x, n, n_in, kind, norm, eps, add, np.int64(out.shape[1]), *sum(weights, ()),
                shared=0 if given is not None else _room(m), **m.constants, ROWS=size,
            )  # fmt: skip

    def _blocks(self, n: int, rows: int) -> int:
        """So many that each warp has as many rows of weights as any other, or one less, and all run at once."""
        most = (4 if n == 1 else 3) * self.device.multiprocessors * WARPS
        each = -(-rows // most)
        return -(-rows // (WARPS * each))

    def _gated(self, x: Array, layer: LayerWeights, eps: float) -> Array:
        """silu(gate) times up of one row, as input of `down`."""
        gate, up, numbers = layer.w_gate, layer.w_up, layer.w_down.name in NUMBERS
        n_ff, n_in = gate.shape
        shape = (1, n_ff) if numbers else (1, n_ff // GROUP * ROUNDED_BYTES)
        h = self._buffer("gated floats", shape) if numbers else self._buffer("gated", shape, np.uint8)
        outs = (None, h) if numbers else (h, None)
        self._launch(
            "products.cu", "gated_products", -(-n_ff // GROUP), BLOCK, x, n_in, NORMED, layer.ffn_norm, eps, *outs,
            *(argument for m in (gate, up) for argument in (*m.planes, n_ff, None)),
            shared=_room(gate), **gate.constants, ROWS=1,
        )  # fmt: skip
        return h

    def _many(
        self,
        x: Array,
        matrices: Sequence[Matrix],
        begins: Sequence[int],
        kind: int,
        norm: Array | None,
        eps: float,
        out: Array,
        add: bool,
    ) -> None:
        """Products of many rows, as halves."""
        n, n_in = len(x), matrices[0].shape[1]
        halves, factors = self._buffer("halves", (n, n_in), np.uint16), self._buffer("factors", (n,))
        self._prepare(x, n_in, kind, norm, eps, None, None, halves, factors)
        if self._is_batch(n, n_in):
            for same in _alike(matrices, begins):
                self._batch(halves, factors, same, out, add)
            return
        for m, begin in zip(matrices, begins, strict=True):
            self._launch(
                "gemm.cu", "gemm", (-(-n // TILE), -(-m.shape[0] // TILE)), 128, halves, factors, n, n_in, m.shape[0],
                m.largest, add, np.int64(out.shape[1]), out[:, begin:], *m.planes, **m.constants,
            )  # fmt: skip

    def _batch(self, halves: Array, factors: Array, matrices: list[tuple[Matrix, int]], out: Array, add: bool) -> None:
        """Products of a batch of sequences with matrices of a format, which begin in columns of out."""
        (n, n_in), m = halves.shape, matrices[0][0]
        size = next(size for size in (8, 16, 32, 64) if n <= size)
        tiles = sum(-(-m.shape[0] // BATCH_TILE) for m, _ in matrices)
        f = FORMATS.get(m.name)
        is_small = f is None or (f.low_bits == 4 and f.scales == "HALF")  # decoded in few registers
        at_once = 3 if is_small and size <= 32 else 2
        split = _split(tiles, n_in, at_once * self.device.multiprocessors)
        parts = self._buffer("parts", (tiles * split * size * BATCH_TILE,)) if split > 1 else None
        weights = [(*m.planes, m.largest, m.shape[0], out[:, begin:]) for m, begin in matrices]
        weights += [(*(None for _ in m.planes), None, 0, None)] * (TOGETHER - len(matrices))
        self._launch(
            "batches.cu", "batch_products", (tiles, split), 128, halves, factors, n, n_in, add,
            np.int64(out.shape[1]), parts, self._counters(tiles), *sum(weights, ()),
            **m.constants, SEQUENCES=size, BLOCKS=at_once,
        )  # fmt: skip


def _split(tiles: int, n_in: int, at_once: int) -> int:
    """Into how many parts the columns of tiles are split, of which so many are multiplied at once. Each takes as long
    as its steps, and as three more to begin and to end."""
    steps = -(-n_in // 128)

    def time(parts: int) -> int:
        return -(-tiles * parts // at_once) * (-(-steps // parts) + 3)

    return min(range(1, max(2, steps // 2)), key=time)


def _room(m: Matrix) -> int:
    """Bytes of one row of input of a matrix."""
    return m.shape[1] * 4 if m.name in NUMBERS else m.shape[1] // GROUP * ROUNDED_BYTES


def _alike(matrices: Sequence[Matrix], begins: Sequence[int]) -> list[list[tuple[Matrix, int]]]:
    """Matrices of a format together, each with where its products begin."""
    found: dict[str, list[tuple[Matrix, int]]] = {}
    for m, begin in zip(matrices, begins, strict=True):
        found.setdefault(m.name, []).append((m, begin))
    return list(found.values())
