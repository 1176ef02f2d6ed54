"""Keys and values from latents (Palu, arXiv 2407.21118), in NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..rope import Angles, Rope
from ..stores import Latents
from .rows import DenseMatrix, rms_norm, turn


@dataclass(frozen=True)
class Factor:
    """The second factor of low-rank keys or values, and what comes after it."""

    matrix: DenseMatrix  # [H_kv d, r]
    n_head_kv: int
    bias: np.ndarray | None  # [H_kv d]
    norm: np.ndarray | None  # [d]
    eps: float
    rope: Rope | None  # of keys

    @property
    def head_dim(self) -> int:
        return self.matrix.shape[0] // self.n_head_kv

    @property
    def rank(self) -> int:
        return self.matrix.shape[1]

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes


def rebuilt(rows: Latents) -> np.ndarray:
    """Keys or values float32 [H_kv, n, d] of latents [G, n, r] of one sequence."""
    f: Factor = rows.factor
    (groups, n, _), heads = rows.shape, (f.n_head_kv, f.head_dim)
    latents = rows.store.decode(rows.rows)[..., : f.rank]
    out = np.einsum("gnr,gmr->gnm", latents, f.matrix.values.reshape(groups, -1, f.rank)).astype(np.float32)
    out = out.reshape(groups, n, f.n_head_kv // groups, f.head_dim).swapaxes(1, 2).reshape(f.n_head_kv, n, f.head_dim)
    if f.bias is not None:
        out = out + f.bias.reshape(heads)[:, None]
    if f.norm is not None:
        out = rms_norm(out, f.norm, f.eps)
    if f.rope is not None:
        pos = rows.store.positions(rows.rows).repeat(f.n_head_kv // groups, axis=0)
        flat = np.ascontiguousarray(out, np.float32).reshape(f.n_head_kv * n, 1, f.head_dim)
        turn(flat, Angles(f.rope.angles(pos.ravel()), f.rope.interleaved))
        out = flat.reshape(out.shape)
    return out


def with_positions(latents: np.ndarray, angles: Angles) -> np.ndarray:
    """Latents of keys [N, G, r] and the true positions of their tokens, as one more number: [N, G, r + 1]."""
    assert angles.pos is not None
    pos = np.broadcast_to(angles.pos[:, None, None], (*latents.shape[:2], 1))
    return np.concatenate([latents, pos.astype(np.float32)], axis=-1)
