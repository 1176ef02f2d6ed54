"""Shapes and indices, checked at the seam before a kernel sees them: Numba and CUDA kernels trust their callers."""

from __future__ import annotations

import numpy as np

from .ops import KV


def check_tokens(tokens: np.ndarray, n_vocab: int) -> None:
    if tokens.ndim != 1 or (tokens.size and not 0 <= tokens.min() <= tokens.max() < n_vocab):
        raise ValueError(f"token ids must be a list of numbers from 0 to {n_vocab - 1}")


def check_slots(kv: KV, seq: np.ndarray, slot: np.ndarray) -> None:
    n_seq, _, n_slot, _ = kv.k.shape
    if seq.min() < 0 or seq.max() >= n_seq or slot.min() < 0 or slot.max() >= n_slot:
        raise ValueError(f"cache of {n_seq} sequences x {n_slot} slots cannot take slots {slot.min()}..{slot.max()}")


def check_ranges(q: np.ndarray, kv: KV, first: np.ndarray, stop: np.ndarray) -> None:
    n_seq, n_head_kv, n_slot, head_dim = kv.k.shape
    if q.shape[0] != n_seq or q.shape[1] % n_head_kv or q.shape[2] != head_dim:
        raise ValueError(f"queries {q.shape} do not fit a cache {kv.k.shape}")
    if len(first) != n_seq or len(stop) != n_seq or first.min() < 0 or stop.max() > n_slot:
        raise ValueError(f"slot ranges {first}..{stop} lie outside a cache of {n_slot} slots")


def check_chunk(q: np.ndarray, kv: KV, seq: int, start: int, window: int) -> None:
    n_seq, n_head_kv, n_slot, head_dim = kv.k.shape
    if q.shape[1] % n_head_kv or q.shape[2] != head_dim:
        raise ValueError(f"queries {q.shape} do not fit a cache {kv.k.shape}")
    if not 0 <= seq < n_seq or start < 0 or start + len(q) > n_slot or window < 0:
        raise ValueError(f"chunk {start}..{start + len(q)} of sequence {seq} lies outside a cache {kv.k.shape}")
