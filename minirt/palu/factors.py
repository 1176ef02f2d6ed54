"""Factors of a projection, W_g = B_g A_g for each group g of KV heads, best for the inputs it really gets.

Palu (arXiv 2407.21118) whitens: with C = L L^T, the mean of x x^T over the inputs, the SVD of W_g L, cut off at rank r,
loses the least of the outputs' energy E|W_g x|^2. Its left vectors and squared singular values are those of the
symmetric matrix W_g C W_g^T, so neither L nor its inverse is needed: W' = U_r U_r^T W.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .hadamard import rotation

LEAST = 0.5  # of the mean singular value: smaller ones scale the factors no more


class Spectrum(NamedTuple):
    """Where the outputs of a projection have their energy, group by group."""

    energies: np.ndarray  # float64 [G, w], descending: mean squared length of an output along each vector
    vectors: np.ndarray  # float64 [G, w, w]: columns


def spectrum(weight: np.ndarray, moment: np.ndarray | None, width: int) -> Spectrum:
    """Of a projection float32 [G w, n] in groups of `width` rows; moment float64 [n, n] is C, None for plain SVD."""
    w = weight.reshape(-1, width, weight.shape[1]).astype(np.float64)
    energy = (w if moment is None else w @ moment) @ w.swapaxes(1, 2)
    values, vectors = np.linalg.eigh((energy + energy.swapaxes(1, 2)) / 2)
    return Spectrum(np.maximum(values[:, ::-1], 0.0), vectors[:, :, ::-1])


def factorise(weight: np.ndarray, found: Spectrum, rank: int, rotated: bool) -> tuple[np.ndarray, np.ndarray]:
    """A [G r, n] and B [G w, r], float32, of a projection [G w, n] and its spectrum.

    A = S^-1/2 U_r^T W and B = U_r S^1/2, S the singular values, as in Palu's code: what A gives and what B expects are
    equally large then. rotated: A <- H A and B <- B H^T with an orthonormal Hadamard matrix, which changes no product.

    A row of A grows as its singular value shrinks, which is 0 where the calibration text had no inputs: the first such
    input would be a latent so large that the others of its row vanish in a few bits. So each counts as LEAST of their
    mean. In trade, errors of all latents alike become 1 + LEAST times as much error of the outputs, squared, at most.
    """
    n_groups, width, _ = found.vectors.shape
    w = weight.reshape(n_groups, width, -1).astype(np.float64)
    u = found.vectors[:, :, :rank]
    scale = np.sqrt(found.energies[:, :rank])
    scale = np.maximum(scale, LEAST * scale.mean(axis=1, keepdims=True))
    root = np.sqrt(np.where(scale > 0, scale, 1.0))[:, None]
    a, b = u.swapaxes(1, 2) @ w / root.swapaxes(1, 2), u * root
    if rotated:
        h = rotation(rank)
        a, b = h @ a, b @ h.T
    return a.reshape(n_groups * rank, -1).astype(np.float32), b.reshape(-1, rank).astype(np.float32)


def compose(a: np.ndarray, b: np.ndarray, n_groups: int) -> np.ndarray:
    """The projection [G w, n] that factors A [G r, n] and B [G w, r] stand for."""
    rank = b.shape[1]
    product = b.reshape(n_groups, -1, rank) @ a.reshape(n_groups, rank, -1)
    return product.reshape(len(b), -1)
