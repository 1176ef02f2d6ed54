"""Reading few of the cached tokens on a card: SparQ's index, the tokens of most weight, attention to them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minirt.checks import (
    check_choice,
    check_components,
    check_counts,
    check_index,
    check_ranges,
    check_rows,
    index_slots,
)
from minirt.ops import CODED_UNIT, KV, CodedIndex

from .attention_ops import check_heads, stores
from .base import BaseOps
from .device import STANDARD, Array
from .rows import Rows

WARP, THREADS = 32, 256  # of choice.cuh
RUN = 16  # tokens of which the maximum is noted
INDEX_TILE, UNITS = 512, 8  # tokens, and units of a coded index, that a block scores at a time
HEADS_ADDED = 4  # of a block of added.cu
BLOCKS = 16  # of a multiprocessor that a launch asks for
LONG = 1 << 16  # logits of a KV head for which launches that choose take less time than one block would
CHOOSERS, DIGITS = 1024, 2048  # threads of their blocks, and parts that counted ranks have
CHOOSER = 32 << 10  # bytes of shared memory that blocks have beside a bit for each token
_NUMBERS = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}


class SparseOps(BaseOps):
    """The part of GpuOps for it. Rows are on the device, where those that are no slots of the cache are left out."""

    _attend: Any

    # -- what SparQ keeps beside the cache -----------------------------------------------------------------------------
    def append_index(
        self, index: Array | CodedIndex, mean: Array | None, seq: np.ndarray, slot: np.ndarray, k: Array, v: Array
    ) -> None:
        check_index(index, mean, seq, slot, k, v)
        n, n_head_kv, d = k.shape
        grid, where = (n, n_head_kv), (self._on_device(seq), self._on_device(slot))
        if isinstance(index, CodedIndex):
            codes, _, keys = arguments = _coded(index, d)
            self._launch(
                "coded_index.cu", "append_codes", grid, THREADS, *arguments[:2], *_blocks(codes, 8), *keys.arguments,
                mean, *where, v, **_keys(keys),
            )  # fmt: skip
            return
        self._launch(
            "token_index.cu", "append_index", grid, min(THREADS, -(-d // WARP) * WARP), index, *_blocks(index), mean,
            *where, k, v, HEAD_DIM=d, STORE=_number(index),
        )  # fmt: skip

    def mean_rows(self, v: Rows, seq: int, n: int, mean: Array) -> None:
        n_seq, n_head_kv, slots, _ = v.shape
        if mean.shape != (n_seq, n_head_kv, v.numbers):
            raise ValueError(f"means {mean.shape} do not fit values {v.shape}")
        if not 0 <= seq < n_seq or not 0 <= n <= slots:
            raise ValueError(f"values {v.shape} have no rows 0..{n} of sequence {seq}")
        rotated = int(v.store.rotated)
        of: dict[str, Any] = {"HEAD_DIM": v.numbers, "V_STORE": v.kind.upper(), "V_ROTATED": rotated}
        self._launch("mean_rows.cu", "mean_rows", n_head_kv, 512, *v.arguments, seq, n, mean, **of)

    # -- the tokens of most weight -------------------------------------------------------------------------------------
    def approximate_top_k(
        self,
        q: Array,
        index: Array | CodedIndex,
        stop: np.ndarray,
        r: int,
        k: int,
        local: int,
        sum_logits: bool,
        least: float = 0.0,
        counts: Array | None = None,
    ) -> tuple[Array, Array]:
        check_components(q, index, r)
        check_choice(len(q), slots := index_slots(index), stop, k, 0, local)
        check_heads(q.shape[2], q)
        components, n_head_kv = min(r, q.shape[2]), (index[0] if isinstance(index, CodedIndex) else index).shape[1]
        if counts is not None:
            check_counts(counts, len(q), n_head_kv, local)
        how = components, k, local, sum_logits, least, counts
        if isinstance(index, CodedIndex):
            codes, scales, keys = _coded(index, q.shape[2])
            tile, units = UNITS * CODED_UNIT if codes.shape[2] else THREADS, -(-slots // CODED_UNIT)
            arrays: tuple[Any, ...] = (codes, scales, *_blocks(codes, 8), *keys.arguments)
            launch = "coded_search.cu", "approximate_top_k", units * CODED_UNIT, tile
            return self._choose(launch, q, n_head_kv, arrays, stop, *how, **_keys(keys))
        constants: dict[str, Any] = {"HEAD_DIM": q.shape[2], "STORE": _number(index)}
        launch, arrays = ("sparse.cu", "approximate_top_k", slots, INDEX_TILE), (index, *_blocks(index))
        return self._choose(launch, q, n_head_kv, arrays, stop, *how, **constants)

    def exact_top_k(self, q: Array, kv: KV, stop: np.ndarray, k: int) -> tuple[Array, Array]:
        check_ranges(q, kv, stop, stop)
        check_choice(len(q), kv.k.shape[2], stop, k)
        check_heads(q.shape[2], q)
        launch = "key_search.cu", "exact_top_k", -(-kv.k.shape[2] // THREADS) * THREADS, THREADS
        return self._choose(launch, q, kv.k.shape[1], kv.k.arguments, stop, None, k, 0, False, 0.0, None, **_keys(kv.k))

    def _choose(
        self,
        launch: tuple[str, str, int, int],
        q: Array,
        n_head_kv: int,
        arrays: tuple[Any, ...],
        stop: np.ndarray,
        components: int | None,
        k: int,
        local: int,
        sum_logits: bool,
        least: float,
        counts: Array | None,
        **constants: int | str,
    ) -> tuple[Array, Array]:
        """Launches a kernel of choice.cuh: file, name, positions of logits, tokens that a block scores at a time."""
        (n_seq, n_head, _), (file, name, positions, tile) = q.shape, launch
        heads, group, where = n_seq * n_head_kv, n_head // n_head_kv, self._on_device(stop)
        logits = self._buffer("logits of slots", (n_seq, n_head, positions))
        runs = self._buffer("runs of slots", (n_seq, n_head, positions // RUN, 2))
        sums = self._buffer("sums of logits", (n_seq, n_head_kv, positions // RUN)) if sum_logits else None
        ranks = self._buffer("ranks", (n_seq, n_head_kv, positions), np.uint32)
        listed = self._buffer("listed", (n_seq, n_head_kv, positions), np.uint64)
        shared, marks = self._marks(heads, positions)
        rows = self._buffer("rows", (n_seq, n_head_kv, k), np.int32)
        weights = self._buffer("weights of rows", (n_seq, n_head, k))
        choosers = self._choosers(heads, group, positions, k - local)
        found = self._buffer("found of heads", (heads, 2 * group + 5 + DIGITS)) if choosers else None
        how = (
            logits, runs, sums, ranks, listed, marks, found, rows, weights, counts, positions, k, local, float(least)
        )  # fmt: skip
        # A block more for rows that a coded index has not.
        parts = min(-(-positions // tile) + 1, -(-BLOCKS * self.device.multiprocessors // heads))
        self._launch(
            file, name, (parts, n_head_kv, n_seq), THREADS, *arrays, q, where,
            *(() if components is None else (components,)), self._counters(heads), *how,
            shared=0 if choosers else shared, GROUP=group, **constants,
        )  # fmt: skip
        if choosers:
            of = {"GROUP": group, "INTERLEAVED": int(file == "coded_search.cu")}
            grid = choosers, n_head_kv, n_seq
            self._launch("choice.cu", "rank_tokens", grid, CHOOSERS, where, *how, **of)
            self._launch("choice.cu", "choose_ranked", grid, CHOOSERS, where, *how, shared=shared, **of)
        return rows, weights

    def _choosers(self, heads: int, group: int, positions: int, m: int) -> int:
        """Blocks that choose the m best for a KV head, in launches of their own; 0: the last one that scores does it.
        That looks at all logits where many are wanted, and at what is noted of runs, twice, where few are."""
        few = (4 if group > 1 else 2) * m <= positions // RUN  # see choice.cuh
        looked = positions * group // (RUN // 2 if few else 1)
        several = min(self.device.multiprocessors // heads, -(-positions // (4 * CHOOSERS)))
        return several if looked >= LONG and several > 1 else 0

    def _marks(self, heads: int, slots: int) -> tuple[int, Array | None]:
        """A bit for each slot: bytes of shared memory, or where these are too many, scratch of the heads."""
        words = -(-slots // 32)
        if 4 * words + CHOOSER <= STANDARD:
            return 4 * words, None
        return 0, self._buffer("marks", (heads, words), np.uint32)

    def top_k(self, ranks: Array, stop: np.ndarray, k: int, head: int = 0, tail: int = 0) -> Array:
        check_rows(ranks, stop, k, head, tail)
        n_seq, heads, slots = ranks.shape
        if ranks.dtype != np.float32 or ranks.strides[2] != ranks.itemsize:
            raise ValueError(f"ranks of {ranks.dtype} with strides {ranks.strides} are no rows of float32")
        rows = self._buffer("top k", (n_seq, heads, k), np.int32)
        spans = (np.int64(stride // ranks.itemsize) for stride in ranks.strides[:2])
        shared, marks = self._marks(n_seq * heads, slots)
        threads = max(THREADS, min(1024, 1 << math.ceil(math.log2(max(1, slots // 8)))))
        self._launch(
            "selection.cu", "top_k", (heads, n_seq), threads, ranks, *spans, self._on_device(stop), k, head, tail, rows,
            marks, -(-slots // 32), shared=shared,
        )  # fmt: skip
        return rows

    # -- attention to them ---------------------------------------------------------------------------------------------
    def attend_rows(
        self,
        q: Array,
        kv: KV,
        rows: Array,
        stop: np.ndarray,
        weights: Array | None,
        mean: Array | None,
        counts: Array | None = None,
    ) -> Array:
        check_ranges(q, kv, stop, stop)
        _check_rows(rows, kv.k)
        k, out = rows.shape[2], self._buffer("attended rows", q.shape)
        if weights is None or mean is None:
            weights = mean = None
        else:
            _check_weights(weights, q.shape[:2], rows)
            if mean.shape != (*kv.v.shape[:2], q.shape[2]):
                raise ValueError(f"means {mean.shape} do not fit values {kv.v.shape}")
            check_heads(q.shape[2], mean)
        if counts is not None:
            check_counts(counts, *rows.shape[:2])
        of = rows, self._on_device(stop), k, kv.k.shape[2], weights, mean, counts
        self._attend("gathered.cu", "attend_rows", q, kv, out, k, *of)
        return out

    def add_rows(self, kv: KV, rows: Array, stop: np.ndarray, weights: Array, d: int) -> Array:
        (n_seq, n_head), (n_head_kv, slots) = weights.shape[:2], kv.v.shape[1:3]
        if len(kv.v.codes) != n_seq or n_head % n_head_kv or d != kv.v.numbers:
            raise ValueError(f"weights {weights.shape} do not fit values {kv.v.shape}, heads of {d}")
        _check_rows(rows, kv.v)
        _check_weights(weights, (n_seq, n_head), rows)
        check_choice(n_seq, slots, stop, rows.shape[2])
        out, group = self._buffer("added rows", (n_seq, n_head, d)), n_head // n_head_kv
        check_heads(d, out)
        of = stores(kv)
        self._launch(
            "added.cu", "add_rows", (-(-group // HEADS_ADDED), n_head_kv, n_seq), THREADS, *kv.v.arguments, rows,
            self._on_device(stop), rows.shape[2], slots, weights, out, GROUP=group,
            **{name: of[name] for name in ("HEAD_DIM", "V_STORE", "V_ROTATED")},
        )  # fmt: skip
        return out


def _number(index: Array) -> str:
    """The store of an index of numbers."""
    if index.dtype not in _NUMBERS or not index.flags.c_contiguous:
        raise ValueError(f"an index of {index.dtype} with strides {index.strides} is not float32 or float16 in C order")
    return _NUMBERS[index.dtype]


def _blocks(index: Array, tokens: int = 1) -> tuple[int, int]:
    """Blocks of an index, and tokens of one, of which an item holds so many."""
    return int(index.shape[2]), int(index.shape[4]) * tokens


def _coded(index: CodedIndex, d: int) -> tuple[Array, Array, Rows]:
    codes, scales, k = index
    if codes.dtype != np.uint32 or scales.dtype != np.float16 or k.numbers != d:
        raise ValueError(f"an index of {codes.dtype} and {scales.dtype}, keys {k.shape} do not fit heads of {d}")
    if not (codes.flags.c_contiguous and scales.flags.c_contiguous):
        raise ValueError(f"an index with strides {codes.strides} and {scales.strides} is not in C order")
    return codes, scales, k


def _keys(k: Rows) -> dict[str, int | str]:
    """How kernels read keys."""
    return {"HEAD_DIM": k.numbers, "K_STORE": k.kind.upper(), "K_ROTATED": int(k.store.rotated)}


def _check_rows(rows: Array, cache: Rows) -> None:
    if rows.dtype != np.int32 or rows.ndim != 3 or rows.shape[:2] != cache.shape[:2] or not rows.flags.c_contiguous:
        raise ValueError(f"rows {rows.shape} of {rows.dtype} do not fit a cache {cache.shape}")


def _check_weights(weights: Array, heads: tuple[int, ...], rows: Array) -> None:
    if weights.shape != (*heads, rows.shape[2]) or not weights.flags.c_contiguous:
        raise ValueError(f"weights {weights.shape} do not fit rows {rows.shape}")
