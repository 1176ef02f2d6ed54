"""CpuOps: the Ops protocol on the CPU. Shapes are checked here, then a few compiled kernels and BLAS do the work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
from threadpoolctl import ThreadpoolController

from minirt.checks import check_chunk, check_ranges, check_slots, check_tokens
from minirt.gguf_file import Tensor
from minirt.ops import KV
from minirt.rope import Rope
from minirt.stores import STORES, Store

from . import kernels
from .blocks import FORMATS

FEW_ROWS = 4  # up to here a weight is multiplied block by block; beyond, a decoded panel and BLAS are faster
PANEL_BYTES = 8 << 20  # of decoded weights at a time
KEY_TILE = 1024  # cached rows decoded at a time in prefill
PARTS_PER_THREAD = 4  # of a weight, so that a thread that lost its core for a moment does not hold up the rest
PART_ROWS = 256  # cached rows that are worth a task of their own in a decode step ...
MAX_PARTS = 32  # ... of which there are this many at most; by length alone, so results do not depend on threads

_FORMAT_OF_STORE = {"f32": "F32", "f16": "F16"}
_STORE_OF_DTYPE = {FORMATS[f].dtype: STORES[name] for name, f in _FORMAT_OF_STORE.items()}


@dataclass(frozen=True)
class BlockMatrix:
    """A weight as it lies in the file."""

    blocks: np.ndarray  # records [n_out, blocks of a row]
    shape: tuple[int, int]  # n_out, n_in

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes


class CpuOps:
    name = "cpu"

    def __init__(self, threads: int):
        self._parts = threads * PARTS_PER_THREAD
        numba.set_num_threads(threads)
        self._blas = ThreadpoolController().limit(limits=threads, user_api="blas")

    def vector(self, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values, np.float32)

    def matrix(self, tensor: Tensor) -> BlockMatrix:
        n_out, n_in = tensor.shape
        return BlockMatrix(tensor.data.view(FORMATS[tensor.type.name].dtype), (n_out, n_in))

    def to_host(self, array: np.ndarray) -> np.ndarray:
        return array

    def embed(self, table: BlockMatrix, tokens: np.ndarray) -> np.ndarray:
        check_tokens(tokens, table.shape[0])
        out = np.empty((len(tokens), table.shape[1]), np.float32)
        kernels.gather_rows(table.blocks, tokens, out)
        return out

    def norm_linear(
        self,
        x: np.ndarray,
        norm: np.ndarray,
        eps: float,
        matrices: Sequence[BlockMatrix],
        biases: Sequence[np.ndarray | None],
    ) -> list[np.ndarray]:
        h = _rms_norm(x, norm, eps)
        out = [self._multiply(h, m) for m in matrices]
        for o, bias in zip(out, biases, strict=True):
            if bias is not None:
                o += bias
        return out

    def gated(self, x: np.ndarray, norm: np.ndarray, eps: float, gate: BlockMatrix, up: BlockMatrix) -> np.ndarray:
        h = _rms_norm(x, norm, eps)
        if len(x) <= FEW_ROWS:
            _check(gate.shape == up.shape and gate.shape[1] == x.shape[1], "activations", x.shape, gate.shape)
            out = np.empty((len(x), gate.shape[0]), np.float32)
            kernels.gated_rows(gate.blocks, up.blocks, h, out, self._parts)
            return out
        out = self._multiply(h, gate)
        kernels.silu_times(out, self._multiply(h, up))
        return out

    def add_linear(self, x: np.ndarray, h: np.ndarray, matrix: BlockMatrix) -> None:
        x += self._multiply(h, matrix)

    def norm_heads(self, x: np.ndarray, norm: np.ndarray, eps: float) -> None:
        rows = x.reshape(-1, x.shape[-1])
        kernels.rms_norm(rows, norm, np.float32(eps), rows)

    def angles(self, rope: Rope, pos: np.ndarray) -> np.ndarray:
        theta = pos[:, None] * rope.frequency
        return (rope.magnitude * np.stack([np.cos(theta), np.sin(theta)])).astype(np.float32)

    def rotate(self, x: np.ndarray, angles: np.ndarray, rope: Rope) -> None:
        _check(angles.shape[1:] == (len(x), rope.dim // 2) and rope.dim <= x.shape[2], "angles", angles.shape, x.shape)
        kernels.rotate(x, angles[0], angles[1], *((2, 1) if rope.interleaved else (1, rope.dim // 2)))

    def allocate(self, store: Store, shape: tuple[int, int, int, int]) -> np.ndarray:
        f = FORMATS[_FORMAT_OF_STORE[store.name]]
        return np.zeros((*shape[:3], shape[3] // f.length), f.dtype)

    def append(self, kv: KV, seq: np.ndarray, slot: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        check_slots(kv, seq, slot)
        for cache, rows in ((kv.k, k), (kv.v, v)):
            cache[seq, :, slot] = _STORE_OF_DTYPE[cache.dtype].encode(rows).view(cache.dtype)

    def attend(self, q: np.ndarray, kv: KV, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
        check_ranges(q, kv, first, stop)
        longest = int((stop - first).max())
        parts = min(max(longest // PART_ROWS, 1), MAX_PARTS)
        out = np.empty_like(q)
        kernels.attend(q, kv.k, kv.v, first, stop, np.float32(1.0 / math.sqrt(q.shape[2])), parts, out)
        return out

    def attend_chunk(self, q: np.ndarray, kv: KV, seq: int, start: int, window: int) -> np.ndarray:
        check_chunk(q, kv, seq, start, window)
        n, n_head, d = q.shape
        n_head_kv = kv.k.shape[1]
        group, stop = n_head // n_head_kv, start + n
        out = np.empty((n, n_head_kv, group, d), np.float32)
        for h in range(n_head_kv):
            queries = q[:, h * group : (h + 1) * group].reshape(n * group, d) / np.float32(math.sqrt(d))
            sums = np.zeros((n * group, d), np.float32)
            largest = np.full(n * group, -np.inf, np.float32)
            total = np.zeros(n * group, np.float32)
            for tile in range(max(0, start + 1 - window) if window else 0, stop, KEY_TILE):
                rows = slice(tile, min(tile + KEY_TILE, stop))
                scores = queries @ self._decode(kv.k[seq, h, rows], d).T
                kernels.softmax_tile(scores, largest, total, sums, group, start, tile, window)
                sums += scores @ self._decode(kv.v[seq, h, rows], d)
            out[:, h] = (sums / total[:, None]).reshape(n, group, d)
        return out.reshape(n, n_head, d)

    def _multiply(self, x: np.ndarray, matrix: BlockMatrix) -> np.ndarray:
        """x [N, n_in] @ matrix.T: [N, n_out]."""
        n_out, n_in = matrix.shape
        _check(x.shape[1] == n_in, "activations", x.shape, matrix.shape)
        out = np.empty((len(x), n_out), np.float32)
        if len(x) <= FEW_ROWS:
            kernels.multiply_rows(matrix.blocks, x, out, self._parts)
            return out
        step = max(1, PANEL_BYTES // (4 * n_in))
        panel = np.empty((min(step, n_out), n_in), np.float32)
        for r in range(0, n_out, step):
            rows = matrix.blocks[r : r + step]
            kernels.decode_rows(rows, panel, self._parts)
            np.matmul(x, panel[: len(rows)].T, out=out[:, r : r + step])
        return out

    def _decode(self, rows: np.ndarray, d: int) -> np.ndarray:
        out = np.empty((len(rows), d), np.float32)
        kernels.decode_rows(rows, out, self._parts)
        return out


def _rms_norm(x: np.ndarray, norm: np.ndarray, eps: float) -> np.ndarray:
    _check(norm.shape == x.shape[1:], "norm", norm.shape, x.shape)
    out = np.empty_like(x)
    kernels.rms_norm(x, norm, np.float32(eps), out)
    return out


def _check(fits: bool, what: str, shape: tuple[int, ...], other: tuple[int, ...]) -> None:
    if not fits:
        raise ValueError(f"{what} of shape {shape} do not fit {other}")
