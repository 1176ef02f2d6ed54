"""From logits to the next token: repeat penalty, top-k, top-p, min-p, temperature, in llama.cpp's order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. Temperature 0 is greedy: the most likely token, ties by lowest id."""

    temperature: float = 0.8
    top_k: int = 40  # keep the k most likely; 0 = all
    top_p: float = 0.95  # keep the smallest set with this much probability (arXiv 1904.09751); 1 = all
    min_p: float = 0.05  # drop what is less likely than this share of the best (arXiv 2407.01082); 0 = none
    repeat_penalty: float = 1.0  # divides the logits of recent tokens (arXiv 1909.05858, section 4.1); 1 = off
    repeat_last_n: int = 64  # how many tokens are recent
    seed: int | None = None  # None: a fresh one

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, 1e3)
        _check("top-k", self.top_k, 0, 2**31)
        _check("top-p", self.top_p, 0.0, 1.0)
        _check("min-p", self.min_p, 0.0, 1.0)
        _check("repeat-penalty", self.repeat_penalty, 1e-3, 1e3)
        _check("repeat-last-n", self.repeat_last_n, 0, 2**31)
        if self.seed is not None:
            _check("seed", self.seed, 0, 2**64 - 1, "; on the command line -1: a new one each time")


class Sampler:
    """A Sampling with its random state: the same seed and logits give the same tokens."""

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self.random = np.random.default_rng(sampling.seed)

    @property
    def is_greedy(self) -> bool:
        """Whether it only asks for the most likely token."""
        return self.sampling.temperature == 0.0 and self.sampling.repeat_penalty == 1.0

    def __call__(self, logits: np.ndarray, recent: Sequence[int] = ()) -> int:
        """Chooses a token id from float32 logits [n_vocab]; `recent` are the tokens so far, newest last."""
        s = self.sampling
        if s.repeat_penalty != 1.0 and s.repeat_last_n:
            logits = _penalise(logits, recent[-s.repeat_last_n :], s.repeat_penalty)
        if s.temperature == 0.0:
            return int(np.argmax(logits))
        ids = _top_k(logits, s.top_k)  # most likely first
        p = _softmax(logits[ids])
        keep = len(p)
        if s.top_p < 1.0:
            keep = int(np.searchsorted(np.cumsum(p), s.top_p)) + 1
        if s.min_p > 0.0:
            keep = min(keep, int(np.count_nonzero(p >= s.min_p * p[0])))
        ids = ids[: max(keep, 1)]
        total = np.cumsum(_softmax(logits[ids], s.temperature))
        return int(ids[min(np.searchsorted(total, self.random.random() * total[-1], side="right"), len(ids) - 1)])


def most_likely(logits: np.ndarray) -> np.ndarray:
    """`Ops.most_likely` of devices that compute in the host's memory."""
    return np.where(np.isfinite(logits).all(axis=1), np.argmax(logits, axis=1), -1).astype(np.int32)


def _penalise(logits: np.ndarray, recent: Sequence[int], penalty: float) -> np.ndarray:
    logits = logits.copy()
    seen = np.unique(np.asarray(recent, np.int64))
    values = logits[seen]
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    return logits


def _top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k largest logits, largest first; ties by lowest id."""
    if 0 < k < len(logits):
        bound = np.partition(logits, len(logits) - k)[len(logits) - k]
        ids = np.flatnonzero(logits >= bound)
    else:
        ids = np.arange(len(logits))
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return ids[:k] if k else ids


def _softmax(x: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities of logits, the largest first."""
    with np.errstate(over="ignore"):  # at a tiny temperature: -inf, which has probability 0
        p = np.exp((x.astype(np.float64) - x[0]) / temperature)
    return p / p.sum()


def _check(name: str, value: float, low: float, high: float, more: str = "") -> None:
    if not (math.isfinite(value) and low <= value <= high):
        bounds = " to ".join(str(bound) if isinstance(bound, int) else f"{bound:g}" for bound in (low, high))
        raise UsageError(f"--{name} {value} is out of range ({bounds}{more})")
