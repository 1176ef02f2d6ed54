"""The cache, and exact attention to it, in NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..checks import check_chunk, check_far, check_join, check_ranges, check_rotation, check_slots
from ..ops import KV, Far
from ..rope import Angles
from ..stores import STORES, Store


class AttentionOps:
    def allocate(self, store: Store, shape: tuple[int, int, int, int]) -> np.ndarray:
        return np.zeros((*shape[:3], store.items(shape[3])), store.dtype)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return np.zeros(shape, dtype)

    def indices(self, values: np.ndarray) -> np.ndarray:
        return values

    def append(self, kv: KV, seq: np.ndarray, slot: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        check_slots(kv, seq, slot)
        kv.k[seq, :, slot] = store_of(kv.k).encode(k)
        kv.v[seq, :, slot] = store_of(kv.v).encode(v)

    def attend(self, q: np.ndarray, kv: KV, first: np.ndarray, stop: np.ndarray, far: Far | None = None) -> np.ndarray:
        check_ranges(q, kv, first, stop)
        out = np.zeros_like(q)
        for b, (i, j) in enumerate(zip(first, stop, strict=True)):
            logits = scaled_logits(q[b], kv.k[b, :, i:j])
            values = kv.v[b, :, i:j]
            if far is not None:
                check_far(q, far, first)
                n = far.stop[b]
                logits = np.concatenate([scaled_logits(far.q[b], kv.k[b, :, :n]), logits], axis=1)
                values = np.concatenate([kv.v[b, :, :n], values], axis=1)
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
        keys, values = (store_of(a).decode(a[seq, :, :stop]) for a in kv)
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


def turn(x: np.ndarray, angles: Angles) -> None:
    """Rotates the leading components of each head of x [N, H, d], in place."""
    cos, sin = angles.values[:, :, None, :]
    dim = 2 * cos.shape[-1]
    a, b = (x[..., 0:dim:2], x[..., 1:dim:2]) if angles.interleaved else (x[..., : dim // 2], x[..., dim // 2 : dim])
    a[:], b[:] = a * cos - b * sin, a * sin + b * cos


def scaled_logits(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """q.k / sqrt(d) of queries [H_q, d] and stored keys [H_kv, S, d]: [H_q, S]. Query head h reads KV head h // g."""
    group = len(q) // len(k)
    keys = store_of(k).decode(k)
    logits = np.einsum("hgd,hsd->hgs", q.reshape(len(k), group, -1), keys).reshape(len(q), -1)
    return logits / np.float32(np.sqrt(q.shape[1]))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, which is not empty."""
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def weighted_values(p: np.ndarray, v: np.ndarray) -> np.ndarray:
    """p [H_q, S] times stored values [H_kv, S, d]: [H_q, d]."""
    values = store_of(v).decode(v)
    return np.einsum("hgs,hsd->hgd", p.reshape(len(v), -1, p.shape[1]), values).reshape(len(p), -1)


def store_of(array: np.ndarray) -> Store:
    """The store a cache array was allocated with."""
    return next(s for s in STORES.values() if s.dtype == array.dtype)
