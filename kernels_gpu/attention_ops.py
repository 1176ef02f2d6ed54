"""Writing a cache on a card, and exact attention to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from minirt.checks import check_chunk, check_far, check_join, check_ranges, check_rotation, check_slots
from minirt.ops import KV, Far
from minirt.rope import Angles

from .base import BaseOps
from .device import Array
from .latent_rows import LatentRows
from .rows import Rows

WARP = 32
LEAST_ROWS = 128  # of a part of a sequence
MOST_HEAD_DIM, MOST_IN_TILES = 256, 128
HALVES, TILES = (7, 5), (8, 0)  # capability from which tensor cores serve chunks, and decode steps


@dataclass(frozen=True)
class Reader:
    """What the launcher of float_reader.cuh or tensor_reader.cuh must know of it."""

    warps: int
    most: int  # query heads of a warp
    blocks: int  # of a multiprocessor

    def heads(self, group: int) -> tuple[int, int]:
        """Query heads that a block serves, and blocks that share those of a KV head."""
        sets = 1 << (-(-group // self.most) - 1).bit_length()
        of_block = min(sets, self.warps)
        return of_block * -(-group // sets), sets // of_block


FLOAT, TENSOR = Reader(8, 4, 2), Reader(4, 8, 3)


class AttentionOps(BaseOps):
    _append_latents: Any
    _attend_latents: Any
    _rebuilt: Any

    def append(self, kv: KV, seq: np.ndarray, slot: np.ndarray, k: Array, v: Array) -> None:
        check_slots(kv, seq, slot)
        if isinstance(kv.k, LatentRows):
            self._append_latents(kv, seq, slot, k, v)
            return
        n, n_head_kv, d = k.shape
        if k.shape != v.shape or (n, n_head_kv) != (len(seq), kv.k.shape[1]) or d != kv.k.numbers:
            raise ValueError(f"keys {k.shape} and values {v.shape} do not fit a cache {kv.k.shape}")
        self._launch(
            "cache.cu", "append", (n, n_head_kv, 2), min(256, -(-d // WARP) * WARP), *kv.k.arguments, *kv.v.arguments,
            self._on_device(seq), self._on_device(slot), k, v, **stores(kv),
        )  # fmt: skip

    def attend(self, q: Array, kv: KV, first: np.ndarray, stop: np.ndarray, far: Far | None = None) -> Array:
        check_ranges(q, kv, first, stop)
        if far is not None:
            check_far(q, far, first)
        out = self._buffer("attended", q.shape)
        ranges = [self._on_device(numbers) for numbers in (first, stop)]
        ranges.append(None if far is None else self._on_device(far.stop))
        self._attend(
            "attention.cu", "attend", q, kv, out, kv.k.shape[2], *ranges, far=None if far is None else far.q,
            FAR=int(far is not None),
        )  # fmt: skip
        return out

    def _attend(
        self,
        file: str,
        kernel: str,
        q: Array,
        kv: KV,
        out: Array,
        rows: int,
        *args: Any,
        far: Array | None = None,
        scores: Array | None = None,
        totals: Array | None = None,
        **constants: int | str,
    ) -> None:
        """Launches a kernel of attention.cuh on q and out [B, H_q, d], for at most so many rows of a sequence; args
        come after its own. scores [B, H_q, slots] and totals [B, H_q, 2] receive what they are there."""
        if isinstance(kv.k, LatentRows):
            self._attend_latents(q, kv, out, rows, *args, far=far, scores=scores, totals=totals)
            return
        (n_seq, n_head, d), n_head_kv = q.shape, kv.k.shape[1]
        check_heads(d, q, out)
        group, constants = n_head // n_head_kv, {**stores(kv), **constants}
        tiles = self.device.capability >= TILES and in_halves(kv) and d % 8 == 0 and d <= MOST_IN_TILES
        reader = TENSOR if tiles else FLOAT
        heads, split = reader.heads(group)
        # As many for each sequence of a batch as it would have alone, so that its sums are the same.
        parts = -(-reader.blocks * self.device.multiprocessors // (n_head_kv * split))
        parts = max(1, min(parts, -(-rows // LEAST_ROWS)))
        sums = self._buffer("sums of parts", (n_seq, n_head_kv * split, parts, heads, -(-d // 8) * 8))
        ends = self._buffer("ends of parts", (n_seq, n_head_kv * split, parts, heads, 2))
        self._launch(
            file, kernel, (parts, n_head_kv * split, n_seq), WARP * reader.warps, *kv.k.arguments, *kv.v.arguments,
            q, far, out, sums, ends, self._counters(n_seq * n_head_kv * split), scores, totals,
            0 if scores is None else int(scores.shape[2]), *args, GROUP=group, SCORES=int(scores is not None),
            TENSOR_CORES=int(reader is TENSOR), **constants,
        )  # fmt: skip

    def attend_chunk(
        self,
        q: Array,
        kv: KV,
        seq: int,
        start: int,
        window: int = 0,
        stop: int | None = None,
        lse: Array | None = None,
    ) -> Array:
        stop = start + len(q) if stop is None else stop
        check_chunk(q, kv, seq, start, window, stop, lse)
        if isinstance(kv.k, LatentRows):
            kv, seq = self._rebuilt(kv, seq, stop), 0
        (n, n_head, d), n_head_kv = q.shape, kv.k.shape[1]
        check_heads(d, q, *(() if lse is None else (lse,)))
        out, constants = self._buffer("chunk", q.shape), stores(kv)
        if constants["K_ROTATED"]:
            q = self._rotated(q, self._buffer("rotated queries", q.shape))
        since = HALVES if d <= MOST_IN_TILES else TILES  # older ones would run out of registers
        tensor_cores = self.device.capability >= since and d % 16 == 0 and in_halves(kv)
        file, rows = ("prefill_attention.cu", 64) if tensor_cores else ("prefill_float.cu", 32)
        group = n_head // n_head_kv
        self._launch(
            file, "attend_chunk", (-(-n * group // rows), n_head_kv), 128, q, *kv.k.arguments, *kv.v.arguments, seq, n,
            start, window, stop, out, lse, HEAD_DIM=d, GROUP=group, K_STORE=constants["K_STORE"],
            V_STORE=constants["V_STORE"],
        )  # fmt: skip
        return self._rotated(out, out) if constants["V_ROTATED"] else out

    def _rotated(self, x: Array, out: Array) -> Array:
        n, heads, d = x.shape
        self._launch("heads.cu", "rotate_heads", n * heads, 64, x, out, HEAD_DIM=d)
        return out

    def join_attention(self, out: Array, lse: Array, other: Array, other_lse: Array) -> None:
        check_join(out, lse, other, other_lse)
        n, heads, d = out.shape
        self._launch("heads.cu", "join_attention", (n, heads), 64, out, lse, other, other_lse, d)

    def rotate(self, x: Array, angles: Angles) -> Array:
        check_rotation(x, angles)
        n, heads, d = x.shape
        out = self.device.empty(x.shape, np.float32)
        cos, sin = angles.values[0], angles.values[1]
        self._launch(
            "heads.cu", "turn", (n, heads), 64, x, d, cos, sin, int(cos.shape[1]), int(angles.interleaved), out
        )
        return out


def stores(kv: KV) -> dict[str, int | str]:
    """How kernels read and write keys and values."""
    return {
        "HEAD_DIM": kv.k.numbers,
        "K_STORE": kv.k.kind.upper(),
        "V_STORE": kv.v.kind.upper(),
        "K_ROTATED": int(_is_rotated(kv.k)),
        "V_ROTATED": int(_is_rotated(kv.v)),
    }


def _is_rotated(rows: Rows) -> bool:
    return bool(rows.store.rotated)


def in_halves(kv: KV) -> bool:
    """Whether tensor cores can take rows: of halves, or of codes that are decoded to them."""
    return "f32" not in (kv.k.kind, kv.v.kind)


def check_heads(d: int, *arrays: Array) -> None:
    if d > MOST_HEAD_DIM:
        raise ValueError(f"heads of {d} numbers: kernels take at most {MOST_HEAD_DIM}")
    if not all(a.flags.c_contiguous for a in arrays):
        raise ValueError("queries and results are arrays without gaps")
