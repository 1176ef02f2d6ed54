"""CpuOps: the Ops protocol on the CPU. Shapes are checked here, then a few compiled kernels and BLAS do the work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from threadpoolctl import ThreadpoolController

from minirt.checks import check_chunk, check_ranges, check_slots, check_tokens
from minirt.gguf_file import Tensor, release
from minirt.ops import KV, Matrix
from minirt.rope import Rope
from minirt.stores import STORES, Store

from . import kernels
from .blocks import FORMATS
from .ir_vectors import LANES
from .panels import PANEL_DTYPES

FEW_ROWS = 4  # up to here a weight is multiplied block by block; beyond, a decoded panel and BLAS are faster
TASKS_PER_THREAD = 2  # of a weight in prefill
DECODED_BYTES = 4 << 20  # of a weight in one task
QUERY_TILE = 128  # prompt tokens scored at a time: the causal half of what they cannot see is mostly never computed
KEY_TILE = 1024  # cached rows decoded at a time in prefill
PARTS_PER_THREAD = 4  # of a weight, so that a thread that lost its core for a moment does not hold up the rest
HELD_VECTORS = 16  # of queries or sums kept in registers
PART_ROWS = 256  # cached rows that are worth a task of their own in a decode step ...
MAX_PARTS = 32  # ... of which there are this many at most; by length alone, so results do not depend on threads

_FORMAT_OF_STORE = {"f32": "F32", "f16": "F16"}
_STORE_OF_DTYPE = {FORMATS[f].dtype: STORES[name] for name, f in _FORMAT_OF_STORE.items()}


@dataclass(frozen=True)
class Table:
    """A weight as it lies in the file, to look up rows."""

    rows: np.ndarray  # records [n_out, blocks of a row]
    shape: tuple[int, int]  # n_out, n_in

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes


@dataclass(frozen=True)
class PanelMatrix:
    """A weight with the bytes of 16 rows interleaved, so that a vector holds one column of all of them."""

    panels: np.ndarray  # records [n_out / 16 rounded up, blocks of a row]
    shape: tuple[int, int]  # n_out, n_in
    nbytes: int  # of the rows alone, without those that fill up the last panel


class CpuOps:
    """The CPU.

    A decode step runs kernels that are parallel themselves. Prefill is cut into tasks for a pool of threads, each of
    which calls BLAS on its own: BLAS's threads and the kernels' would take the cores from one another.
    """

    name = "cpu"

    def __init__(self, threads: int):
        self.threads = threads
        self._parts = threads * PARTS_PER_THREAD
        self._blas = ThreadpoolController()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="minirt") if threads > 1 else None

    def vector(self, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values, np.float32)

    def table(self, tensor: Tensor) -> Table:
        return Table(tensor.data.view(FORMATS[tensor.type.name].dtype), (tensor.shape[0], tensor.shape[1]))

    def matrix(self, tensor: Tensor) -> Table | PanelMatrix:
        f = FORMATS[tensor.type.name]
        if f.length == 1:
            return self.table(tensor)
        numba.set_num_threads(self.threads)
        n_out, n_in = tensor.shape
        blocks, size = n_in // f.length, f.dtype.itemsize
        panels = np.empty((_whole_vectors(n_out) // LANES, blocks, size, LANES), np.uint8)
        kernels.interleave(tensor.data.reshape(n_out, blocks, size), panels, self._parts)
        release(tensor)
        records = panels.reshape(len(panels), -1).view(PANEL_DTYPES[tensor.type.name])
        return PanelMatrix(records, (n_out, n_in), tensor.data.nbytes)

    def to_host(self, array: np.ndarray) -> np.ndarray:
        return array

    def embed(self, table: Table, tokens: np.ndarray) -> np.ndarray:
        check_tokens(tokens, table.shape[0])
        numba.set_num_threads(self.threads)  # the calling thread's own; a forward pass begins here
        out = np.empty((len(tokens), table.shape[1]), np.float32)
        kernels.gather_rows(table.rows, tokens, out)
        return out

    def norm_linear(
        self,
        x: np.ndarray,
        norm: np.ndarray,
        eps: float,
        matrices: Sequence[Matrix],
        biases: Sequence[np.ndarray | None],
    ) -> list[np.ndarray]:
        h = _rms_norm(x, norm, eps)
        out = self._multiply(h, *matrices)
        for o, bias in zip(out, biases, strict=True):
            if bias is not None:
                o += bias
        return out

    def gated(self, x: np.ndarray, norm: np.ndarray, eps: float, gate: Matrix, up: Matrix) -> np.ndarray:
        _check(gate.shape == up.shape, "gate", gate.shape, up.shape)
        _check(gate.shape[1] == x.shape[1], "activations", x.shape, gate.shape)
        h = _rms_norm(x, norm, eps)
        if len(x) <= FEW_ROWS:
            if isinstance(gate, PanelMatrix) and isinstance(up, PanelMatrix):
                out = np.empty((len(x), LANES * len(gate.panels)), np.float32)
                kernels.gated_panels(gate.panels, up.panels, h, out, self._parts)
                return _columns(out, gate.shape[0])
            out = self._multiply_few(h, gate)
            kernels.silu_times(out, self._multiply_few(h, up))
            return out
        out = np.empty((len(x), gate.shape[0]), np.float32)

        def columns(part: slice) -> None:
            product = h @ _decoded(gate, part)
            kernels.silu_times(product, h @ _decoded(up, part))
            out[:, part] = product

        self._share(columns, _parts_of(gate, self.threads))
        return out

    def add_linear(self, x: np.ndarray, h: np.ndarray, matrix: Matrix) -> None:
        _check(x.shape == (len(h), matrix.shape[0]), "residual", x.shape, h.shape)
        x += self._multiply(np.ascontiguousarray(h), matrix)[0]

    def norm_heads(self, x: np.ndarray, norm: np.ndarray, eps: float) -> None:
        _check(norm.shape == x.shape[2:] and x.flags.c_contiguous, "norm", norm.shape, x.shape)
        rows = x.reshape(-1, x.shape[-1])
        kernels.rms_norm(rows, norm, np.float32(eps), rows)

    def angles(self, rope: Rope, pos: np.ndarray) -> np.ndarray:
        return rope.angles(pos)

    def rotate(self, x: np.ndarray, angles: np.ndarray, rope: Rope) -> None:
        _check(angles.shape[1:] == (len(x), rope.dim // 2) and rope.dim <= x.shape[2], "angles", angles.shape, x.shape)
        kernels.rotate(x, angles[0], angles[1], *((2, 1) if rope.interleaved else (1, rope.dim // 2)))

    def allocate(self, store: Store, shape: tuple[int, int, int, int]) -> np.ndarray:
        f = FORMATS[_FORMAT_OF_STORE[store.name]]
        return np.zeros((*shape[:3], _whole_vectors(shape[3]) // f.length), f.dtype)

    def append(self, kv: KV, seq: np.ndarray, slot: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        check_slots(kv, seq, slot)
        for cache, rows in ((kv.k, k), (kv.v, v)):
            encoded = _STORE_OF_DTYPE[cache.dtype].encode(_padded(rows)).view(cache.dtype)
            if len(rows) <= FEW_ROWS:
                for i in range(len(rows)):  # plain indices cost a few microseconds less than arrays of them
                    cache[seq[i], :, slot[i]] = encoded[i]
            else:
                cache[seq, :, slot] = encoded

    def attend(self, q: np.ndarray, kv: KV, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
        d, q = q.shape[2], np.ascontiguousarray(_padded(q))
        check_ranges(q, kv, first, stop)
        parts = min(max(int((stop - first).max()) // PART_ROWS, 1), MAX_PARTS)
        group, n_vectors = q.shape[1] // kv.k.shape[1], q.shape[2] // LANES
        together = max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * n_vectors <= HELD_VECTORS))
        out = np.empty_like(q)
        scale = np.float32(1.0 / math.sqrt(d))
        kernels.attend(q, kv.k, kv.v, first, stop, scale, parts, (0,) * n_vectors, (0,) * together, out)
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

    def _multiply(self, x: np.ndarray, *matrices: Matrix) -> list[np.ndarray]:
        """x [N, n_in] @ matrix.T for each matrix: [N, n_out]."""
        for m in matrices:
            _check(x.shape[1] == m.shape[1], "activations", x.shape, m.shape)
        if len(x) <= FEW_ROWS:
            if len(matrices) == 3 and all(isinstance(m, PanelMatrix) for m in matrices):
                outs = [np.empty((len(x), LANES * len(m.panels)), np.float32) for m in matrices]
                kernels.multiply_three(*(m.panels for m in matrices), x, *outs, self._parts)
                return [_columns(out, m.shape[0]) for out, m in zip(outs, matrices, strict=True)]
            return [self._multiply_few(x, m) for m in matrices]
        outs = [np.empty((len(x), m.shape[0]), np.float32) for m in matrices]

        def columns(task: tuple[np.ndarray, Matrix, slice]) -> None:
            out, matrix, part = task
            np.matmul(x, _decoded(matrix, part), out=out[:, part])

        parts = zip(outs, matrices, strict=True)
        self._share(columns, [(out, m, part) for out, m in parts for part in _parts_of(m, self.threads)])
        return outs

    def _multiply_few(self, x: np.ndarray, matrix: Matrix) -> np.ndarray:
        n_out = matrix.shape[0]
        if isinstance(matrix, PanelMatrix):
            out = np.empty((len(x), LANES * len(matrix.panels)), np.float32)
            kernels.multiply_panels(matrix.panels, x, out, self._parts)
            return _columns(out, n_out)
        out = np.empty((len(x), n_out), np.float32)
        kernels.multiply_rows(matrix.rows, x, out, self._parts)
        return out

    def _share(self, work: Callable[[Any], None], tasks: Sequence[Any]) -> None:
        """Does work(task) for every task, on all threads, with BLAS on one thread in each."""

        def quietly(task: Any) -> None:
            with np.errstate(all="ignore"):  # each thread has its own; the decoder reports damaged weights, once
                work(task)

        with self._blas.limit(limits=1, user_api="blas"):
            for _ in self._pool.map(quietly, tasks) if self._pool else map(quietly, tasks):
                pass


def _parts_of(matrix: Matrix, threads: int) -> list[slice]:
    """Rows of a weight for each task: a few tasks a thread, whole panels, not too much to decode at once."""
    n_out, n_in = matrix.shape
    step = min(-(-n_out // (TASKS_PER_THREAD * threads)), DECODED_BYTES // (4 * n_in))
    step = max(_whole_vectors(step), LANES)
    return [slice(r, min(r + step, n_out)) for r in range(0, n_out, step)]


def _decoded(matrix: Matrix, rows: slice) -> np.ndarray:
    """Rows of a weight, float32 and transposed: [n_in, rows]. They begin at a panel."""
    if isinstance(matrix, Table):
        return _decode(matrix.rows[rows], matrix.shape[1]).T
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
    _check(norm.shape == x.shape[1:], "norm", norm.shape, x.shape)
    out = np.empty(x.shape, np.float32)
    kernels.rms_norm(x, norm, np.float32(eps), out)
    return out


def _check(fits: bool, what: str, shape: tuple[int, ...], other: tuple[int, ...]) -> None:
    if not fits:
        raise ValueError(f"{what} of shape {shape} do not fit {other}")
