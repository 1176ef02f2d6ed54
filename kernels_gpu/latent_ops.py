"""Latents of Palu in the place of keys and values on a card: written, attended, rebuilt for what reads a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minirt.checks import check_positions
from minirt.config import ModelConfig
from minirt.dequantize import dequantize
from minirt.errors import DeviceError
from minirt.gguf_file import Tensor
from minirt.ops import KV
from minirt.rope import Angles, Rope
from minirt.stores import STORES

from .base import BaseOps
from .device import Array
from .factors import COLUMN, UNIT, Factor, make_factor
from .latent_rows import LatentRows
from .rows import Rows

if TYPE_CHECKING:
    from minirt.weights import LayerWeights

WARPS, THREADS = 8, 256  # of rebuilding.cuh
TILES = (64, 32, 16)  # slots that a block may rebuild at once
STATIC = 16  # bytes of shared memory that kernels have besides what they are given
LEAST_ROWS, WAVES = 128, 2  # of a part of a sequence; blocks of a multiprocessor that one sequence asks for


class Shape(NamedTuple):
    """How a block of latent_attention.cu is cut: its macros."""

    KV_HEADS: int
    TILE: int
    RESIDENT: int


class LatentOps(BaseOps):
    _own: Any
    add_column_sums: Any

    def factor(
        self,
        tensor: Tensor,
        config: ModelConfig,
        bias: Array | None,
        norm: Array | None = None,
        rope: Rope | None = None,
    ) -> Factor:
        hosts = (None if a is None else self.device.download(a) for a in (bias, norm))
        return make_factor(self.device, dequantize(tensor), config.n_head_kv, *hosts, config.rms_eps, rope)

    # -- rows ----------------------------------------------------------------------------------------------------------
    def _q_and_latents(
        self, out: Array, layer: LayerWeights, config: ModelConfig, angles: Angles
    ) -> tuple[Array, Array, Array]:
        """What `qkv` returns of a layer with factors, of its three products, side by side in out."""
        n, d, n_head, stride = len(out), config.head_dim, config.n_head, np.int64(out.shape[1])
        assert angles.pos is not None
        check_positions(angles.pos)
        cos, sin = angles.values[0], angles.values[1]
        q = self._own("queries", (n, n_head, d))
        self._launch(
            "activations.cu", "finish_qkv", (n, n_head), 64, out, stride, n_head, 1, d, layer.bq, None, None,
            layer.q_norm, None, config.rms_eps, cos, sin, int(cos.shape[1]), angles.interleaved, q, None, None,
            shared=4 * (d + 32),
        )  # fmt: skip
        found, first = [q], n_head * d
        both = ((layer.wk, layer.k_factor, self._on_device(angles.pos)), (layer.wv, layer.v_factor, None))
        for name, (matrix, factor, pos) in zip(("keys", "values"), both, strict=True):
            groups, rank = matrix.shape[0] // factor.rank, factor.rank
            latents = self._own(name, (n, groups, rank + (pos is not None)))
            self._launch("latent_heads.cu", "take_latents", (n, groups), 128, out, stride, first, rank, pos, latents)
            found.append(latents)
            first += matrix.shape[0]
        q, k, v = found
        return q, k, v

    def _append_latents(self, kv: KV, seq: np.ndarray, slot: np.ndarray, k: Array, v: Array) -> None:
        check_latents(kv, len(seq), k, v)
        self._launch(
            "latents.cu", "append", (len(seq), k.shape[1], 2), 128, *kv.k.arguments, *kv.v.arguments,
            self._on_device(seq), self._on_device(slot), k, v, **bits(kv),
        )  # fmt: skip

    def _overwrite_latents(self, kv: KV, slot: Array, k: Array, v: Array, positions: Array, pos: np.ndarray) -> None:
        """As `overwrite`; a slot outside the cache is left out."""
        n_seq, groups = kv.k.shape[:2]
        check_latents(kv, n_seq, k, v)
        check_positions(pos)
        spans = (np.int64(stride // positions.itemsize) for stride in positions.strides[:2])
        self._launch(
            "latents.cu", "overwrite", (groups, n_seq, 2), 128, *kv.k.arguments, *kv.v.arguments, slot, slot.shape[1],
            positions.shape[2], k, v, positions, *spans, self._on_device(pos), **bits(kv),
        )  # fmt: skip

    # -- attention -----------------------------------------------------------------------------------------------------
    def _attend_latents(
        self,
        q: Array,
        kv: KV,
        out: Array,
        rows: int,
        first: Array,
        stop: Array,
        far_stop: Array | None,
        far: Array | None = None,
        scores: Array | None = None,
        totals: Array | None = None,
    ) -> None:
        """As `AttentionOps._attend`."""
        (n_seq, n_head, d), keys, values = q.shape, kv.k.factor, kv.v.factor
        group, in_group = n_head // keys.n_head_kv, keys.n_head_kv // kv.k.shape[1]
        shape = self._shape(kv, group)
        split, heads, width = in_group // shape.KV_HEADS, shape.KV_HEADS * group, UNIT * values.blocks
        blocks = kv.k.shape[1] * split  # of a part
        # As many for each sequence of a batch as it would have alone, so that its sums are the same.
        parts = max(1, min(-(-WAVES * self.device.multiprocessors // blocks), -(-rows // LEAST_ROWS)))
        sums = self._buffer("sums of latents", (n_seq, blocks, parts, heads, width))
        ends = self._buffer("ends of latents", (n_seq, blocks, parts, heads, 2))
        joined = self._buffer("joined latents", (n_seq, n_head, width))
        totals = self._buffer("totals of latents", (n_seq, n_head, 2)) if totals is None else totals
        self._launch(
            "latent_attention.cu", "attend", (parts, blocks, n_seq), THREADS, *kv.k.arguments, *kv.v.arguments,
            *keys.arguments, split, q, far, sums, ends, self._counters(n_seq * blocks), joined, totals, scores,
            0 if scores is None else int(scores.shape[2]), first, stop, far_stop, HEAD_DIM=d, GROUP=group,
            shared=self._shared_bytes(kv, group, shape), **bits(kv), **shape._asdict(),
        )  # fmt: skip
        self._launch(
            "latent_heads.cu", "rebuild_sums", (-(-values.columns // 4), keys.n_head_kv, n_seq), 128, joined, totals,
            values.values, values.blocks, values.power, values.bias, out, HEAD_DIM=d, GROUP=group,
        )  # fmt: skip

    def _shape(self, kv: KV, group: int) -> Shape:
        """The most KV heads of a group to a block that the card's shared memory has room for: latents are read once for
        all of them, and the factor once for all tiles."""
        in_group = kv.k.factor.n_head_kv // kv.k.shape[1]
        counts = [n for n in range(min(WARPS, in_group), 0, -1) if in_group % n == 0]
        resident = [Shape(n, tile, 1) for n in counts for tile in TILES[:2]]
        for shape in (*resident, *(Shape(n, tile, 0) for tile in TILES for n in counts)):
            if self._shared_bytes(kv, group, shape) <= self.device.shared_memory - STATIC:
                return shape
        raise _too_large(self.device, kv.k)

    def _shared_bytes(self, kv: KV, group: int, shape: Shape) -> int:
        """Room of latent_attention.cu."""
        (heads, tile, resident), f = shape, kv.k.factor
        queries, row_parts = heads * group, max(1, tile // 32)
        column_parts = max(1, WARPS // heads // row_parts)
        sizes = (
            resident * heads * f.columns * f.blocks * 512,
            *tile_bytes(kv.k, tile), *tile_bytes(kv.v, tile), tile * turns_bytes(f),
            4 * queries * COLUMN * f.columns, 4 * column_parts * queries * tile, 4 * column_parts * heads * tile,
            4 * queries * pitch(kv.v), *(3 * [4 * queries]), 2 * (-(-queries // 16) * 16) * (tile + 8),
        )  # fmt: skip
        return sum(map(aligned, sizes))

    # -- prompts -------------------------------------------------------------------------------------------------------
    def _rebuilt(self, kv: KV, seq: int, n: int, keys_only: bool = False) -> KV:
        """Keys and values of the first n slots of a sequence, as a float16 cache of one: scratch."""
        keys = self._rebuilt_rows("rebuilt keys", kv.k, seq, n)
        return KV(keys, keys if keys_only else self._rebuilt_rows("rebuilt values", kv.v, seq, n))

    def _rebuilt_rows(self, name: str, rows: LatentRows, seq: int, n: int) -> Rows:
        f, groups = rows.factor, rows.shape[1]
        codes = self._buffer(name, (1, f.n_head_kv, n, f.head_dim), np.float16)
        sizes = {tile: sum(map(aligned, (*tile_bytes(rows, tile), tile * turns_bytes(f)))) for tile in TILES}
        fitting = [item for item in sizes.items() if item[1] <= self.device.shared_memory]
        if not fitting:
            raise _too_large(self.device, rows)
        tile, shared = fitting[0]
        self._launch(
            "rebuilding.cu", "rebuild", (-(-n // tile), groups), THREADS, *rows.arguments, *f.arguments,
            f.n_head_kv // groups, seq, n, codes, np.int64(n), shared=shared, HEAD_DIM=f.head_dim,
            ROW_BITS=rows.store.bits, OF_KEYS=int(rows.store.keys), TILE=tile,
        )  # fmt: skip
        return Rows(STORES["f16"], codes, None)

    def _add_group_sums(self, q: Array, kv: KV, seq: int, start: int, lse: Array, sums: Array) -> None:
        """As `add_column_sums`: sums [G, n] += the mean over a group's KV heads of what each of them would get."""
        n = sums.shape[1]
        keys = self._rebuilt(kv, seq, n, keys_only=True)
        of_heads = self.device.zeros((keys.k.shape[1], n), np.float32)
        self.add_column_sums(q, keys, 0, start, lse, of_heads)
        self._average_heads(of_heads, sums)

    def _average_heads(self, of_heads: Array, sums: Array) -> None:
        """sums [G, n] += the mean over the KV heads of a group of [H_kv, n]."""
        groups, n = sums.shape
        self._launch(
            "latent_heads.cu", "average_heads", (-(-n // 128), groups), 128, of_heads, len(of_heads) // groups, n, sums,
            np.int64(sums.strides[0] // sums.itemsize),
        )  # fmt: skip


def _too_large(device: Any, rows: LatentRows) -> DeviceError:
    return DeviceError(
        f"{device.name}: latents of {rows.numbers} numbers do not fit its {device.shared_memory >> 10} KiB of shared "
        "memory; --device cpu does without"
    )


def bits(kv: KV) -> dict[str, int]:
    """How kernels read and write rows."""
    return {"K_BITS": kv.k.store.bits, "V_BITS": kv.v.store.bits}


def check_latents(kv: KV, n: int, k: Array, v: Array) -> None:
    for rows, x in zip(kv, (k, v), strict=True):
        if x.shape != (n, rows.shape[1], rows.numbers) or not x.flags.c_contiguous:
            raise ValueError(f"latents {x.shape} do not fit a cache {rows.shape}")


def pitch(rows: LatentRows) -> int:
    """Halves from one row of a tile to the next."""
    return UNIT * rows.factor.blocks + 8


def tile_bytes(rows: LatentRows, tile: int) -> tuple[int, ...]:
    """Of the parts of a Tile of latents.cuh."""
    raw = tile * int(rows.codes.shape[3]) if rows.store.bits < 16 else 0
    words = 0 if rows.scales is None else int(rows.scales.shape[3])
    return 2 * tile * pitch(rows), raw, 4 * tile * words


def turns_bytes(factor: Factor) -> int:
    """Of a slot; see turns_pitch of rebuilding.cuh."""
    return 8 * (-(-factor.pairs // 16) * 16 + 4)


def aligned(n: int) -> int:
    return -(-n // 16) * 16
