"""What the reference makes of rows of activations: weights as float32, norms, rotation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..rope import Angles


@dataclass(frozen=True)
class DenseMatrix:
    """A dequantised weight."""

    values: np.ndarray  # float32 [n_out, n_in]
    nbytes: int  # in the file

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape


def turn(x: np.ndarray, angles: Angles) -> None:
    """Rotates the leading components of each head of x [N, H, d], in place."""
    cos, sin = angles.values[:, :, None, :]
    dim = 2 * cos.shape[-1]
    a, b = (x[..., 0:dim:2], x[..., 1:dim:2]) if angles.interleaved else (x[..., : dim // 2], x[..., dim // 2 : dim])
    a[:], b[:] = a * cos - b * sin, a * sin + b * cos


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467)."""
    mean = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
    return (x * (1.0 / np.sqrt(mean + eps)).astype(np.float32)) * weight
