"""The cache, and exact attention to it, in NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..checks import check_chunk, check_far, check_join, check_ranges, check_rotation, check_slots
from ..ops import KV, Far
from ..rope import Angles
from ..stores import STORES, Latents, LatentStore, Store
from .low_rank import Factor, rebuilt
from .rows import turn

Rows = np.ndarray | Latents  # of a cache


class AttentionOps:
    def allocate(self, store: Store, shape: tuple[int, int, int, int], factor: Factor | None = None) -> Rows:
        rows = np.zeros((*shape[:3], store.items(shape[3])), store.dtype)
        return Latents(rows, store, factor) if isinstance(store, LatentStore) else rows

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return np.zeros(shape, dtype)

    def indices(self, values: np.ndarray) -> np.ndarray:
        return values

    def append(self, kv: KV, seq: np.ndarray, slot: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        check_slots(kv, seq, slot)
        stored(kv.k)[seq, :, slot] = store_of(kv.k).encode(k)
        stored(kv.v)[seq, :, slot] = store_of(kv.v).encode(v)

    def attend(self, q: np.ndarray, kv: KV, first: np.ndarray, stop: np.ndarray, far: Far | None = None) -> np.ndarray:
        check_ranges(q, kv, first, stop)
        out = np.zeros_like(q)
        for b, (i, j) in enumerate(zip(first, stop, strict=True)):
            logits = scaled_logits(q[b], kv.k[b, :, i:j])
            values = decoded(kv.v[b, :, i:j])
            if far is not None:
                check_far(q, far, first)
                n = far.stop[b]
                logits = np.concatenate([scaled_logits(far.q[b], kv.k[b, :, :n]), logits], axis=1)
                values = np.concatenate([decoded(kv.v[b, :, :n]), values], axis=1)
            if logits.shape[1]:
                out[b] = weighted_values(softmax(logits), values)
        return out

    def attend_chunk(
        self,
        q: np.ndarray,
        kv: KV,
        seq: int,
        start: int,
        window: int = 0,
        stop: int | None = None,
        lse: np.ndarray | None = None,
    ) -> np.ndarray:
        stop = start + len(q) if stop is None else stop
        check_chunk(q, kv, seq, start, window, stop, lse)
        row, slot = np.arange(start, start + len(q))[:, None], np.arange(stop)
        visible = (slot <= row) & ((slot > row - window) if window else True)
        mask = np.where(visible, 0.0, -np.inf).astype(np.float32)
        keys, values = (decoded(a[seq, :, :stop]) for a in kv)
        group, scale = q.shape[1] // len(keys), np.float32(np.sqrt(q.shape[2]))
        out = np.empty_like(q)
        for h in range(q.shape[1]):
            logits = q[:, h] @ keys[h // group].T / scale + mask
            high = logits.max(axis=1, initial=-np.inf, keepdims=True)
            p = np.exp(logits - np.where(high > -np.inf, high, 0))
            total = p.sum(axis=1, keepdims=True)
            out[:, h] = (p @ values[h // group]) / np.where(total > 0, total, 1)
            if lse is not None:
                with np.errstate(divide="ignore"):
                    lse[:, h] = (np.log(total) + high)[:, 0]
        return out

    def join_attention(self, out: np.ndarray, lse: np.ndarray, other: np.ndarray, other_lse: np.ndarray) -> None:
        check_join(out, lse, other, other_lse)
        with np.errstate(invalid="ignore"):  # neither saw anything: inf - inf
            share = np.nan_to_num(np.exp(other_lse - np.logaddexp(lse, other_lse)))[..., None]
        out[:] = out * (1 - share) + other * share

    def rotate(self, x: np.ndarray, angles: Angles) -> np.ndarray:
        check_rotation(x, angles)
        out = x.copy()
        turn(out, angles)
        return out

    def concatenate(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts)


def scaled_logits(q: np.ndarray, k: Rows) -> np.ndarray:
    """q.k / sqrt(d) of queries [H_q, d] and stored keys [H_kv, S, d]: [H_q, S]. Query head h reads KV head h // g."""
    keys = decoded(k)
    logits = np.einsum("hgd,hsd->hgs", q.reshape(len(keys), -1, q.shape[1]), keys).reshape(len(q), -1)
    return logits / np.float32(np.sqrt(q.shape[1]))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, which is not empty."""
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def weighted_values(p: np.ndarray, values: np.ndarray) -> np.ndarray:
    """p [H_q, S] times values [H_kv, S, d]: [H_q, d]."""
    return np.einsum("hgs,hsd->hgd", p.reshape(len(values), -1, p.shape[1]), values).reshape(len(p), -1)


def decoded(rows: Rows) -> np.ndarray:
    """Stored keys or values [H_kv, S, d], or latents of them [G, S, r], as float32 [H_kv, S, d]."""
    if isinstance(rows, Latents):
        return rebuilt(rows)
    return store_of(rows).decode(rows)


def stored(rows: Rows) -> np.ndarray:
    """Rows of any store as they lie in memory."""
    return rows.rows if isinstance(rows, Latents) else rows


def store_of(array: Rows) -> Store:
    """The store a cache array was allocated with."""
    if isinstance(array, Latents):
        return array.store
    return next(s for s in STORES.values() if s.dtype == array.dtype)
