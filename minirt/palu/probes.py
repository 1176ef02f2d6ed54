"""How much each projection matters: one of them is cut to a lower rank, and the predictions are compared.

The Kullback-Leibler divergence from the exact model is what is measured, and not the loss, in whose noise a single
layer drowns. Divided by the energy that the cut dropped it says what a unit of energy is worth in that projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..decoder import Decoder
from ..gguf_file import TENSOR_TYPES, Tensor
from ..llama import Llama
from ..ops import Matrix
from ..policies import Dense
from ..stores import get_store
from ..weights import LayerWeights
from .calibration import Windows, reader
from .factors import Spectrum
from .ranks import UNIT
from .side_file import SideFile

N_WINDOWS, LENGTH = 4, 512  # of the calibration text, and tokens of each
EVERY = 2  # of so many predictions, one is compared
ROWS = 64  # compared at a time

FIELDS = ("wk", "wv")


def probe_rank(keep: float, width: int) -> int:
    """The rank that a projection is cut to: what it would have if all had the same, at least a unit less than all."""
    return max(UNIT, min(int(keep * width / UNIT + 0.5) * UNIT, width - UNIT))


def gains(
    llama: Llama,
    windows: Windows,
    projections: Callable[[int], Sequence[tuple[np.ndarray, Spectrum]]],
    width: int,
    rank: int,
    side: SideFile,
    key: str,
) -> np.ndarray:
    """What each rank of each projection is worth, in nats a token: float64 [n_layer, 2, w], descending.

    projections: W_k and W_v of a layer, and their spectra, in groups of `width`; rank: what each in turn is cut to.
    """
    n_layer = llama.config.n_layer
    energies, divergence = np.zeros((n_layer, 2, width)), np.zeros((n_layer, 2))
    exact: list[_Exact] = []
    for layer in side.steps("probing the layers", key, n_layer, energies, divergence):
        exact = exact or [_Exact(llama, tokens[:LENGTH]) for tokens in spread(windows.tokens, N_WINDOWS)]
        for i, (weight, found) in enumerate(projections(layer)):
            energies[layer, i] = found.energies.sum(axis=0)
            changed = llama.decoder.ops.matrix(_f32(project(weight, found, rank)))
            divergence[layer, i] = np.mean([one.divergence(layer, FIELDS[i], changed) for one in exact])
    dropped = energies[:, :, rank:].sum(axis=2)
    worth = np.divide(divergence, dropped, out=np.zeros_like(dropped), where=dropped > 0)
    return worth[:, :, None] * energies


def spread(rows: np.ndarray, n: int) -> np.ndarray:
    """Up to n of the rows, evenly."""
    n = min(n, len(rows))
    return rows[np.arange(n) * len(rows) // n]


def project(weight: np.ndarray, found: Spectrum, rank: int) -> np.ndarray:
    """U_r U_r^T W, float32 [G w, n]: the projection at that rank."""
    u = found.vectors[:, :, :rank]
    w = weight.reshape(*found.energies.shape, -1)
    return (u @ (u.swapaxes(1, 2) @ w)).astype(np.float32).reshape(weight.shape)


class _Exact:
    """A window as the exact model sees it: what enters each layer, and what is predicted."""

    def __init__(self, llama: Llama, tokens: np.ndarray):
        self.llama, self.tokens = llama, tokens
        parts: list[list[np.ndarray]] = [[] for _ in range(llama.config.n_layer)]
        reader(llama, len(tokens), lambda layer, x: parts[layer].append(x.copy()))(tokens)
        self.inputs = [np.concatenate(part) for part in parts]  # [T, n] each
        self.logits = self._logits(0, llama.decoder.weights.layers[0])

    def divergence(self, layer: int, field: str, matrix: Matrix) -> float:
        """The mean divergence from the exact predictions if a layer has another matrix, in nats a token."""
        changed = replace(self.llama.decoder.weights.layers[layer], **{field: matrix})
        return mean_divergence(self.logits, self._logits(layer, changed))

    def _logits(self, first: int, changed: LayerWeights) -> np.ndarray:
        """Of the model from a layer on, which is given."""
        d, store = self.llama.decoder, get_store("f32")
        layers = [changed, *d.weights.layers[first + 1 :]]
        config = replace(d.config, n_layer=len(layers))
        ops: Any = _Continuing(d.ops, self.inputs[first])
        decoder = Decoder(config, replace(d.weights, layers=layers), ops, Dense())
        cache = decoder.new_cache(Dense().plan(config, len(self.tokens), store, store))
        logits = decoder.prefill(cache, self.tokens.tolist(), logits="all")
        assert logits is not None
        return logits


class _Continuing:
    """The model's Ops, but a text begins in the middle of the model, and not all of its predictions are asked for."""

    def __init__(self, ops: Any, x: np.ndarray):
        self._ops, self._x = ops, x

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def embed(self, table: Any, tokens: np.ndarray) -> np.ndarray:
        return self._x.copy()

    def logits(self, x: np.ndarray, *output: Any) -> Any:
        return self._ops.logits(np.ascontiguousarray(x[::EVERY]), *output)


def _f32(values: np.ndarray) -> Tensor:
    return Tensor("", TENSOR_TYPES["F32"], values.shape, np.ascontiguousarray(values, np.float32).view(np.uint8))


def mean_divergence(exact: np.ndarray, other: np.ndarray) -> float:
    """KL(exact, other) in nats, the mean over rows of logits float32 [n, n_vocab].

    With p of the exact ones and d the difference of the logits it is log(sum p exp(d)) - sum p d: no large terms whose
    difference would be lost.
    """
    total = 0.0
    for i in range(0, len(exact), ROWS):
        p = np.exp(exact[i : i + ROWS] - exact[i : i + ROWS].max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        d = np.minimum(other[i : i + ROWS] - exact[i : i + ROWS], np.float32(80))
        mean = (p * d).sum(axis=1, dtype=np.float64)
        total += float((np.log1p((p * np.expm1(d)).sum(axis=1, dtype=np.float64)) - mean).sum())
    return total / len(exact)
