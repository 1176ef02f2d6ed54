"""Latents of Palu in the place of keys and values: what CpuOps does with them, shapes checked."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minirt.checks import check_far, check_ranges
from minirt.config import ModelConfig
from minirt.dequantize import dequantize
from minirt.gguf_file import Tensor
from minirt.ops import KV, Far
from minirt.rope import Angles, Rope
from minirt.stores import Latents, LatentStore
from minirt.stores.latent import POSITION_BYTES, UNIT

from . import latent_attention, latent_cache
from .blocks import FORMATS
from .crew import Crew
from .ir_vectors import LANES
from .kernels import finish_heads, side_by_side
from .memory import zeros
from .rebuilding import Packed, pack, rebuild_rows, rebuild_scratch
from .shapes import check, whole_vectors

if TYPE_CHECKING:
    from minirt.weights import LayerWeights

POSITIONS = 1024  # for which cosines and sines are computed at a time, at least
_EMPTY = np.empty(0, np.float32)
_NO_TURNS = np.zeros(2, np.int64)
_F32 = FORMATS["F32"].dtype


class Turns:
    """Cosines and sines of all positions there are so far, one table for all layers, which `described` follows."""

    def __init__(self, rope: Rope):
        self.rope = rope
        self.described = np.zeros(2, np.int64)  # see rebuilding.Packed
        self.table = np.empty((0, whole_vectors(rope.dim)), np.float32)
        self.cover(POSITIONS)

    def cover(self, n: int) -> None:
        """Makes the table hold positions 0 ... n - 1."""
        have = len(self.table)
        if n <= have:
            return
        table = zeros((max(n, 2 * have), self.table.shape[1]), np.float32)
        table[:have] = self.table
        for begin in range(have, len(table), POSITIONS):  # what is float64 stays small
            rows = table[begin : begin + POSITIONS]
            cos, sin = self.rope.angles(np.arange(begin, begin + len(rows)))
            rows[:, : self.rope.dim // 2], rows[:, self.rope.dim // 2 : self.rope.dim] = cos, sin
        self.table = table
        self.described[:] = table.ctypes.data, table.shape[1]

    def cover_all(self, pos: np.ndarray) -> None:
        """Makes the table hold these positions."""
        self.cover(int(pos.max(initial=0)) + 1)


@dataclass(frozen=True, eq=False)
class KeyFactor:
    """The second factor of keys, [H_kv d, r], and what comes after it."""

    head_dim: int
    rank: int
    n_head_kv: int
    values: np.ndarray  # float32: see rebuilding.pack
    bias: np.ndarray
    norm: np.ndarray
    eps: np.float32
    turns: Turns

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def packed(self, groups: int) -> Packed:
        """For kernels that rebuild tiles."""
        rope, heads = self.turns.rope, self.n_head_kv // groups
        arrays, pairs = (self.values, self.bias, self.norm, self.turns.described), rope.dim // 2
        return Packed(*arrays, heads, self.head_dim, self.eps, pairs, *((2, 1) if rope.interleaved else (1, pairs)))


@dataclass(frozen=True, eq=False)
class ValueFactor:
    """The second factor of values, [H_kv d, r], and their bias.

    Decode steps read it once, for sums of latents, in the type it has; a prompt rebuilds values.
    """

    head_dim: int
    rank: int
    n_head_kv: int
    nbytes: int
    matrix: Any  # PanelMatrix, F16 or F32, in which heads are filled up to whole vectors, and r to blocks
    descriptor: np.ndarray  # of the matrix
    bias: np.ndarray

    def packed(self, groups: int) -> Packed:
        """For kernels that rebuild tiles; nothing turns."""
        kind = {"F16": np.float16, "F32": np.float32}[self.matrix.name]
        panels = self.matrix.panels.view(kind).reshape(len(self.matrix.panels), -1, LANES).swapaxes(1, 2)
        heads = panels.reshape(self.n_head_kv, -1, panels.shape[2])[:, : self.head_dim, : self.rank]
        values = pack(heads.reshape(-1, self.rank).astype(np.float32), groups)
        arrays, each = (values, self.bias, _EMPTY, _NO_TURNS), self.n_head_kv // groups
        return Packed(*arrays, each, self.head_dim, np.float32(0.0), 0, 1, 1)


class CpuLatents(Latents):
    """Latents in memory."""

    @functools.cached_property
    def described(self) -> np.ndarray:
        """What kernels know of it: see latent_rows."""
        row = self.rows.shape[3]
        if self.rows.strides[2:] != (row, 1):
            raise ValueError(f"latents with strides {self.rows.strides} do not hold their rows in order")
        store, rank = self.store, self.factor.rank
        place = row - POSITION_BYTES if store.keys else 0
        strides = self.rows.strides[:3]
        numbers = (self.rows.ctypes.data, *strides, rank, -(-rank // UNIT), store.bits, place)
        return np.array(numbers, np.int64)


class LatentOps:
    """The part of CpuOps for it."""

    threads: int
    _crew: Crew
    _buffer: Any
    matrix: Any
    _turns: list[Turns]
    _run: Any
    _in_order: Any
    _columns: Any
    _tape: Any

    def factor(
        self,
        tensor: Tensor,
        config: ModelConfig,
        bias: np.ndarray | None,
        norm: np.ndarray | None = None,
        rope: Rope | None = None,
    ) -> KeyFactor | ValueFactor:
        (n_out, rank), heads = tensor.shape, config.n_head_kv
        d, (bias, norm) = n_out // heads, (_EMPTY if a is None else a for a in (bias, norm))
        if rope is not None:
            packed = pack(dequantize(tensor), _groups(config))
            values = zeros(packed.shape, np.float32)
            values[:] = packed
            return KeyFactor(d, rank, heads, values, bias, norm, np.float32(config.rms_eps), self._turns_of(rope))
        kind = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}[tensor.type.name]
        whole = np.zeros((heads, whole_vectors(d), -(-rank // UNIT) * UNIT), kind)
        whole[:, :d, :rank] = tensor.data.view(kind).reshape(heads, d, rank)
        rows = whole.reshape(-1, whole.shape[2])
        matrix = self.matrix(Tensor(tensor.name, tensor.type, rows.shape, rows.view(np.uint8)))
        described = np.array(matrix.descriptor(4, False), np.int64)
        return ValueFactor(d, rank, heads, tensor.data.nbytes, matrix, described, bias)

    def _q_and_latents(
        self, out: np.ndarray, begins: Sequence[int], layer: LayerWeights, config: ModelConfig, angles: Angles
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What CpuOps.qkv returns of such a layer, of the products that begin at these columns of out [N, ...]."""
        n, d, (cos, sin), pos = len(out), config.head_dim, angles.values, angles.pos
        assert pos is not None
        assert layer.k_factor is not None
        assert layer.v_factor is not None
        bias, norm = (_EMPTY if a is None else a for a in (layer.bq, layer.q_norm))
        pairing = (2, 1) if angles.interleaved else (1, cos.shape[1])
        self._run(
            finish_heads,
            out, begins[0], config.n_head, d, bias, norm, np.float32(config.rms_eps), cos, sin, *pairing,
        )  # fmt: skip
        groups, k_rank, v_rank = _groups(config), layer.k_factor.rank, layer.v_factor.rank
        q = self._columns("queries", out, begins[0], (n, config.n_head, d))
        v = self._columns("values", out, begins[2], (n, groups, v_rank))
        k = np.empty((n, groups, k_rank + 1), np.float32)
        self._run(latent_cache.with_positions, out, begins[1], pos, k)
        if self._tape is not None:
            self._tape.begin_with(layer.k_factor.turns, pos)
        return q, k, v

    def _turns_of(self, rope: Rope) -> Turns:
        for turns in self._turns:
            if turns.rope is rope:
                return turns
        self._turns.append(Turns(rope))
        return self._turns[-1]

    def _write(self, kv: KV, seq: np.ndarray, slot: np.ndarray, k: np.ndarray, v: np.ndarray, *positions: Any) -> None:
        """Rows i of k [N, G, r + 1] and v [N, G, r] to slot[i, g] (or slot[i, 0]) of sequence seq[i].

        positions: where those of the tokens are noted too, if anywhere, and what they are: see `Ops.overwrite`.
        """
        for rows, x in zip(kv, (k, v), strict=True):
            check(x.shape == (len(seq), rows.shape[1], rows.numbers), "latents", x.shape, rows.shape)
        k, v = self._in_order(k), self._in_order(v)
        kernel = latent_cache.overwrite if positions else latent_cache.append
        if not self._run(kernel, kv.k.described, kv.v.described, kv.k.shape[2], seq, slot, k, v, *positions):
            raise ValueError(f"slots {slot} lie outside a cache {kv.k.shape}, or positions outside a text")
        kv.k.factor.turns.cover_all(k[..., -1])

    def _attend_latents(
        self, name: str, q: np.ndarray, kv: KV, first: np.ndarray, stop: np.ndarray, far: Far | None, kept: np.ndarray
    ) -> np.ndarray:
        """As CpuOps._attend."""
        check_ranges(q, kv, first, stop)
        shape, until, queries = q.shape, first, q
        if far is not None:
            check_far(q, far, first)
            queries, until = self._buffer("near and far", (shape[0], 2 * shape[1], shape[2])), far.stop
            self._run(side_by_side, self._in_order(q), self._in_order(far.q), queries)
        groups, (keys, values) = kv.k.shape[1], (kv.k.factor, kv.v.factor)
        packed, rank = keys.packed(groups), values.matrix.shape[1]
        rebuild = rebuild_scratch(packed)
        size = latent_attention.attention_scratch(rebuild, shape[1] // groups, rank, shape[2])
        bias = values.bias if len(values.bias) else self._buffer("no bias", (keys.n_head_kv * shape[2],))
        out = self._buffer(name, shape)
        self._run(
            latent_attention.attend,
            self._crew.call(), self._in_order(queries), kv.k.described, kv.v.described, first, stop,
            until, np.float32(1.0 / math.sqrt(shape[2])), tuple(packed), values.descriptor,
            bias.reshape(keys.n_head_kv, shape[2]), rank, self._scratch_of(size), rebuild, out, kept,
        )  # fmt: skip
        return out

    def _rebuilt(self, kv: KV, seq: int, n: int, keys_only: bool = False) -> KV:
        """Keys and values of the first n slots of a sequence, as a float32 cache of one: scratch."""
        arrays = []
        for name, rows in zip(("keys",) if keys_only else ("keys", "values"), kv, strict=False):
            packed = rows.factor.packed(rows.shape[1])
            shape = (rows.factor.n_head_kv, whole_vectors(n), whole_vectors(rows.factor.head_dim))
            out = self._buffer(f"rebuilt {name}", shape)
            scratch = self._scratch_of(rebuild_scratch(packed))
            rebuild_rows(self._crew.call(), rows.described, seq, n, tuple(packed), scratch, out)
            arrays.append(out[None, :, :n].view(_F32))
        return KV(arrays[0], arrays[-1])

    def _scratch_of(self, size: int) -> np.ndarray:
        """So many numbers for each thread, at cache lines."""
        found: np.ndarray = self._buffer("latents", (self.threads, whole_vectors(size)))
        return found


def allocate_latents(
    store: LatentStore, shape: tuple[int, int, int, int], factor: KeyFactor | ValueFactor
) -> CpuLatents:
    """Room for rows of latents [B, G, slots, numbers]."""
    return CpuLatents(zeros((*shape[:3], store.items(shape[3])), np.uint8), store, factor)


def _groups(config: ModelConfig) -> int:
    assert config.palu is not None
    return config.n_head_kv // config.palu.group_size
