"""Hadamard matrices of many sizes: Sylvester's doubling of Paley's two constructions (J. Math. Phys. 12, 1933)."""

from __future__ import annotations

import numpy as np


def rotation(n: int) -> np.ndarray:
    """An orthonormal matrix float64 [n, n] that spreads every component over as many others as a construction reaches.

    Where n has no construction (n = 2^m k with k of Paley's, over prime fields), blocks of the largest power of two
    that divides n stand along the diagonal.
    """
    block = _signs(n)
    if block is None:
        block = _sylvester(n & -n)
    return np.kron(np.eye(n // len(block)), block) / np.sqrt(len(block))


def _signs(n: int) -> np.ndarray | None:
    """A Hadamard matrix of +1 and -1 [n, n], the smallest possible core doubled; None if there is none here."""
    core = n // (n & -n)
    while n % core == 0:
        signs = _paley(core)
        if signs is not None:
            return np.kron(_sylvester(n // core), signs)
        core *= 2
    return None


def _sylvester(n: int) -> np.ndarray:
    """n: a power of two."""
    signs: np.ndarray = np.ones((1, 1))
    while len(signs) < n:
        signs = np.kron([[1, 1], [1, -1]], signs)
    return signs


def _paley(n: int) -> np.ndarray | None:
    if n == 1:
        return np.ones((1, 1))
    if n % 4:
        return None
    if n % 4 == 0 and _is_prime(n - 1):  # a prime of 4 i + 3
        jacobsthal = _jacobsthal(n - 1)
        return np.block([[np.ones((1, 1)), np.ones((1, n - 1))], [-np.ones((n - 1, 1)), jacobsthal + np.eye(n - 1)]])
    q = n // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        ones = np.ones((1, q))
        conference = np.block([[np.zeros((1, 1)), ones], [ones.T, _jacobsthal(q)]])
        return np.kron(conference, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])
    return None


def _jacobsthal(q: int) -> np.ndarray:
    """[q, q]: +1 where i - j is a square modulo the prime q, -1 where it is not, 0 on the diagonal."""
    character = -np.ones(q)
    character[np.arange(q) ** 2 % q] = 1
    character[0] = 0
    difference = np.arange(q)[:, None] - np.arange(q)
    return character[difference % q]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))
