"""CpuOps: the Ops protocol on the CPU. Shapes are checked here, then a few compiled kernels and BLAS do the work."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import ThreadpoolController

from minirt.checks import (
    check_chunk,
    check_feed_forward,
    check_product,
    check_qkv,
    check_ranges,
    check_slots,
    check_tokens,
)
from minirt.config import ModelConfig
from minirt.gguf_file import Tensor, release
from minirt.ops import KV
from minirt.rope import Angles, Rope
from minirt.stores import Store

from . import kernels
from .activations import BLOCK, BLOCK_BYTES
from .blocks import FORMATS
from .crew import Crew
from .ir_vectors import LANES
from .memory import Arena
from .panels import PANEL_DTYPES, layout, panel_function

if TYPE_CHECKING:
    from minirt.weights import LayerWeights

FEW_ROWS = 8  # up to here a weight is multiplied block by block; beyond, a decoded panel and BLAS are faster
TASKS_PER_THREAD = 2  # of a weight in prefill
DECODED_BYTES = 4 << 20  # of a weight in one task
QUERY_TILE = 128  # prompt tokens scored at a time: the causal half of what they cannot see is mostly never computed
KEY_TILE = 1024  # cached rows decoded at a time in prefill
PARTS = 16  # of a weight in a decode step, so that a thread that lost its core for a moment does not hold up the rest
HELD_VECTORS = 16  # of queries or sums kept in registers
PART_ROWS = 256  # cached rows that are worth a task of their own in a decode step ...
MAX_PARTS = 32  # ... of which there are this many at most; by length alone, so results do not depend on threads

_FORMAT_OF_STORE = {"f32": "F32", "f16": "F16"}
_NOTHING = np.empty(0, np.float32)


@dataclass(frozen=True)
class Table:
    """A weight as it lies in the file, to look up rows."""

    rows: np.ndarray  # records [n_out, blocks of a row]
    shape: tuple[int, int]  # n_out, n_in


@dataclass(frozen=True, eq=False)
class PanelMatrix:
    """A weight with the blocks of 16 rows interleaved, so that the lanes of a vector are rows."""

    name: str  # of its format
    panels: np.ndarray  # records [n_out / 16 rounded up, blocks of a row]
    shape: tuple[int, int]  # n_out, n_in
    nbytes: int  # of the rows alone, without those that fill up the last panel

    @property
    def columns(self) -> int:
        """Of a product with it, those of the rows that fill up the last panel included."""
        return LANES * len(self.panels)

    def descriptor(self, rows: int) -> list[int]:
        """What kernels know of it (see `kernels`), to multiply so many rows of activations."""
        of_four = panel_function(self.name, 4).address if rows >= 4 else 0
        blocks, quantized = self.panels.shape[1], int(FORMATS[self.name].length > 1)
        where = self.panels.ctypes.data, self.panels.strides[0], blocks, len(self.panels)
        return [panel_function(self.name, 1).address, of_four, *where, quantized, self.shape[0]]


@dataclass(frozen=True)
class _Few:
    """How to multiply a few rows of activations by some matrices, side by side."""

    descriptors: np.ndarray  # int64 [matrices, 8], see `kernels`
    step: int  # panels in a task
    begins: list[int]  # columns of out where each product begins
    normed: np.ndarray  # scratch [N, n_in]
    codes: np.ndarray  # scratch: activations in 14 bits
    out: np.ndarray  # scratch: all products [N, columns]


class CpuOps:
    """The CPU.

    A decode step calls kernels that share their work out to a crew of threads. Prefill is cut into tasks for a pool of
    threads, each of which calls BLAS on its own.
    """

    name = "cpu"

    def __init__(self, threads: int):
        self.threads = threads
        self._crew, self._arena = Crew(threads), Arena()
        self._blas = ThreadpoolController()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="minirt") if threads > 1 else None
        self._known: dict[tuple[Any, ...], _Few] = {}
        self._scratch: dict[tuple[Any, ...], np.ndarray] = {}

    def vector(self, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values, np.float32)

    def table(self, tensor: Tensor) -> Table:
        return Table(tensor.data.view(FORMATS[tensor.type.name].dtype), (tensor.shape[0], tensor.shape[1]))

    def matrix(self, tensor: Tensor) -> PanelMatrix:
        name, (n_out, n_in) = tensor.type.name, tensor.shape
        f = FORMATS[name]
        blocks, size = n_in // f.length, f.dtype.itemsize
        panels = self._arena.array((_whole_vectors(n_out) // LANES, blocks, LANES * size))
        rows = tensor.data.view(np.uint8).reshape(n_out, blocks, size)
        kernels.interleave(self._crew.call(), rows, *layout(f), panels)
        release(tensor)
        records = panels.reshape(len(panels), -1).view(PANEL_DTYPES[name])
        return PanelMatrix(name, records, (n_out, n_in), tensor.data.nbytes)

    def to_host(self, array: np.ndarray) -> np.ndarray:
        return array

    def embed(self, table: Table, tokens: np.ndarray) -> np.ndarray:
        check_tokens(tokens, table.shape[0])
        out = np.empty((len(tokens), table.shape[1]), np.float32)
        kernels.gather_rows(table.rows, tokens, out)
        return out

    def qkv(
        self, x: np.ndarray, layer: LayerWeights, config: ModelConfig, angles: Angles
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n, d, n_head, n_head_kv = len(x), config.head_dim, config.n_head, config.n_head_kv
        check_qkv(x, layer, config, angles)
        cos, sin = angles.values
        (q, i), (k, j), (v, m) = self._norm_products(x, layer.attn_norm, config.rms_eps, layer.wq, layer.wk, layer.wv)
        optional = (layer.bq, layer.bk, layer.bv, layer.q_norm, layer.k_norm)
        kernels.finish_qkv(
            q, k, v, i, j, m, n_head, n_head_kv, d, *(_NOTHING if a is None else a for a in optional),
            np.float32(config.rms_eps), cos, sin, *((2, 1) if angles.interleaved else (1, cos.shape[1])),
        )  # fmt: skip
        return (
            np.ascontiguousarray(q[:, i : i + n_head * d]).reshape(n, n_head, d),
            np.ascontiguousarray(k[:, j : j + n_head_kv * d]).reshape(n, n_head_kv, d),
            np.ascontiguousarray(v[:, m : m + n_head_kv * d]).reshape(n, n_head_kv, d),
        )

    def add_linear(self, x: np.ndarray, h: np.ndarray, matrix: PanelMatrix) -> None:
        _check(x.shape == (len(h), matrix.shape[0]), "residual", x.shape, h.shape)
        _check(h.shape[1] == matrix.shape[1], "activations", h.shape, matrix.shape)
        if len(h) <= FEW_ROWS:
            self._add_product(x, np.ascontiguousarray(h), matrix)
        else:
            x += self._products(h, matrix)[0]

    def feed_forward(self, x: np.ndarray, layer: LayerWeights, config: ModelConfig) -> None:
        gate, up, down, n = layer.w_gate, layer.w_up, layer.w_down, len(x)
        check_feed_forward(x, layer)
        if n <= FEW_ROWS:
            f, h = self._few(n, gate, up), self._buffer("gated", (n, gate.columns))
            kernels.gated_products(
                self._crew.call(), x, layer.ffn_norm, np.float32(config.rms_eps), f.descriptors, f.step,
                f.normed, f.codes, f.out, h,
            )  # fmt: skip
            self._add_product(x, _columns(h, gate.shape[0]), down)
            return
        h = np.empty((n, gate.shape[0]), np.float32)
        normed = _rms_norm(x, layer.ffn_norm, config.rms_eps)

        def columns(part: slice) -> None:
            product = normed @ _decoded(gate, part)
            kernels.silu_times(product, normed @ _decoded(up, part))
            h[:, part] = product

        self._share(columns, _parts_of(gate, self.threads))
        x += self._products(h, down)[0]

    def logits(self, x: np.ndarray, norm: np.ndarray, eps: float, matrix: PanelMatrix) -> np.ndarray:
        check_product(x, norm, matrix)
        ((out, _),) = self._norm_products(x, norm, eps, matrix)
        return np.array(out[:, : matrix.shape[0]]) if len(x) <= FEW_ROWS else out

    def angles(self, rope: Rope, pos: np.ndarray) -> Angles:
        return Angles(rope.angles(pos), rope.interleaved)

    def allocate(self, store: Store, shape: tuple[int, int, int, int]) -> np.ndarray:
        f = FORMATS[_FORMAT_OF_STORE[store.name]]
        return np.zeros((*shape[:3], _whole_vectors(shape[3]) // f.length), f.dtype)

    def append(self, kv: KV, seq: np.ndarray, slot: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        check_slots(kv, seq, slot)
        _check(k.shape == v.shape == (len(seq), kv.k.shape[1], k.shape[2]), "keys and values", k.shape, v.shape)
        _check(kv.k.shape[3] == _whole_vectors(k.shape[2]), "keys and values", k.shape, kv.k.shape)
        kernels.append(kv.k, kv.v, seq, slot, np.ascontiguousarray(k), np.ascontiguousarray(v))

    def attend(self, q: np.ndarray, kv: KV, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
        d, q = q.shape[2], np.ascontiguousarray(_padded(q))
        check_ranges(q, kv, first, stop)
        parts = min(max(int((stop - first).max()) // PART_ROWS, 1), MAX_PARTS)
        group, n_vectors = q.shape[1] // kv.k.shape[1], q.shape[2] // LANES
        together = max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * n_vectors <= HELD_VECTORS))
        out = self._buffer("attended", q.shape)
        kernels.attend(
            self._crew.call(), q, kv.k, kv.v, first, stop, np.float32(1.0 / math.sqrt(d)), parts,
            (0,) * n_vectors, (0,) * together, out,
        )  # fmt: skip
        return _columns(out, d)

    def attend_chunk(self, q: np.ndarray, kv: KV, seq: int, start: int, window: int) -> np.ndarray:
        d, q = q.shape[2], _padded(q)
        check_chunk(q, kv, seq, start, window)
        n, n_head, width = q.shape
        n_head_kv = kv.k.shape[1]
        group = n_head // n_head_kv
        q = q.reshape(n, n_head_kv, group, width) / np.float32(math.sqrt(d))
        out = np.empty_like(q)

        def tile(part: tuple[int, int]) -> None:
            t, h = part
            queries, first = q[t : t + QUERY_TILE, h], max(0, start + t + 1 - window) if window else 0
            out[t : t + QUERY_TILE, h] = _attend_tile(queries, KV(kv.k[seq, h], kv.v[seq, h]), start + t, first, window)

        # The last queries see the most keys: the longest tasks first.
        self._share(tile, [(t, h) for t in reversed(range(0, n, QUERY_TILE)) for h in range(n_head_kv)])
        return _columns(out.reshape(n, n_head, width), d)

    def _norm_products(
        self, x: np.ndarray, norm: np.ndarray, eps: float, *matrices: PanelMatrix
    ) -> list[tuple[np.ndarray, int]]:
        """RMSNorm(x) times each matrix: for each an array [N, ...], and the column at which the product begins."""
        if len(x) > FEW_ROWS:
            return [(out, 0) for out in self._products(_rms_norm(x, norm, eps), *matrices)]
        f = self._few(len(x), *matrices)
        kernels.norm_products(
            self._crew.call(), x, norm, np.float32(eps), f.descriptors, f.step, f.normed, f.codes, f.out
        )
        return [(f.out, begin) for begin in f.begins]

    def _add_product(self, x: np.ndarray, h: np.ndarray, matrix: PanelMatrix) -> None:
        f = self._few(len(h), matrix)
        kernels.add_product(self._crew.call(), h, f.descriptors, f.step, f.codes, f.out, x)

    def _products(self, x: np.ndarray, *matrices: PanelMatrix) -> list[np.ndarray]:
        """x [N, n_in] times each matrix, for many rows: [N, n_out]."""
        outs = [np.empty((len(x), m.shape[0]), np.float32) for m in matrices]

        def columns(task: tuple[np.ndarray, PanelMatrix, slice]) -> None:
            out, matrix, part = task
            np.matmul(x, _decoded(matrix, part), out=out[:, part])

        parts = zip(outs, matrices, strict=True)
        self._share(columns, [(out, m, part) for out, m in parts for part in _parts_of(m, self.threads)])
        return outs

    def _few(self, n: int, *matrices: PanelMatrix) -> _Few:
        """How to multiply n rows by these matrices: made once, because a decode step has no time for it."""
        key = (n, *matrices)
        found = self._known.get(key)
        if found is None:
            n_in, panels = matrices[0].shape[1], [len(m.panels) for m in matrices]
            begins = itertools.accumulate((LANES * p for p in panels), initial=0)
            found = self._known[key] = _Few(
                descriptors=np.array([m.descriptor(n) for m in matrices], np.int64),
                step=max(1, sum(panels) // PARTS),
                begins=list(begins)[:-1],
                normed=self._buffer("normed", (n, n_in)),
                codes=self._buffer("codes", (n, n_in // BLOCK * BLOCK_BYTES), np.uint8),
                out=self._buffer(f"product of {len(matrices)}", (n, LANES * sum(panels))),
            )
        return found

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        """Scratch of an op, the same array at each call."""
        key = (name, *shape)
        if key not in self._scratch:
            self._scratch[key] = np.empty(shape, dtype)
        return self._scratch[key]

    def _share(self, work: Callable[[Any], None], tasks: Sequence[Any]) -> None:
        """Does work(task) for every task, on all threads, with BLAS on one thread in each."""

        def quietly(task: Any) -> None:
            with np.errstate(all="ignore"):  # each thread has its own; the decoder reports damaged weights, once
                work(task)

        with self._blas.limit(limits=1, user_api="blas"):
            for _ in self._pool.map(quietly, tasks) if self._pool else map(quietly, tasks):
                pass


def _parts_of(matrix: PanelMatrix, threads: int) -> list[slice]:
    """Rows of a weight for each task: a few tasks a thread, whole panels, not too much to decode at once."""
    n_out, n_in = matrix.shape
    step = min(-(-n_out // (TASKS_PER_THREAD * threads)), DECODED_BYTES // (4 * n_in))
    step = max(_whole_vectors(step), LANES)
    return [slice(r, min(r + step, n_out)) for r in range(0, n_out, step)]


def _decoded(matrix: PanelMatrix, rows: slice) -> np.ndarray:
    """Rows of a weight, float32 and transposed: [n_in, rows]. They begin at a panel."""
    panels = matrix.panels[rows.start // LANES : -(-rows.stop // LANES)]
    out = np.empty((matrix.shape[1], LANES * len(panels)), np.float32)
    kernels.decode_panels(panels, out)
    return out[:, : rows.stop - rows.start]


def _decode(rows: np.ndarray, n: int) -> np.ndarray:
    out = np.empty((len(rows), n), np.float32)
    kernels.decode_rows(rows, out)
    return out


def _attend_tile(q: np.ndarray, kv: KV, start: int, first: int, window: int) -> np.ndarray:
    """A few queries [T, g, d] from slot `start` on, and the keys and values [slots, blocks] of their KV head."""
    n, group, width = q.shape
    queries = q.reshape(n * group, width)
    sums = np.zeros((n * group, width), np.float32)
    largest = np.full(n * group, -np.inf, np.float32)
    total = np.zeros(n * group, np.float32)
    for tile in range(first, start + n, KEY_TILE):
        rows = slice(tile, min(tile + KEY_TILE, start + n))
        scores = queries @ _decode(kv.k[rows], width).T
        kernels.softmax_tile(scores, largest, total, sums, group, start, tile, window)
        sums += scores @ _decode(kv.v[rows], width)
    return (sums / total[:, None]).reshape(n, group, width)


def _whole_vectors(n: int) -> int:
    """n rounded up to whole vectors."""
    return -(-n // LANES) * LANES


def _padded(x: np.ndarray) -> np.ndarray:
    """x with zeros after its last axis to whole vectors: heads of 100 components, say."""
    missing = _whole_vectors(x.shape[-1]) - x.shape[-1]
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def _columns(x: np.ndarray, n: int) -> np.ndarray:
    """The first n of the last axis; a copy if some were padding."""
    return x if x.shape[-1] == n else np.ascontiguousarray(x[..., :n])


def _rms_norm(x: np.ndarray, norm: np.ndarray, eps: float) -> np.ndarray:
    out = np.empty(x.shape, np.float32)
    kernels.rms_norm(x, norm, np.float32(eps), out)
    return out


def _check(fits: bool, what: str, shape: tuple[int, ...], other: tuple[int, ...]) -> None:
    if not fits:
        raise ValueError(f"{what} of shape {shape} do not fit {other}")
