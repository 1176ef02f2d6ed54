"""Perplexity of a text, and the Kullback-Leibler divergence from a base model, with llama.cpp's windows and scoring.

The text is cut into windows of n_ctx tokens; each begins with BOS where the file adds one. The first half of a window
is context; what is scored are the predictions at the positions n_ctx/2 ... n_ctx-2, of the token that follows each.

Dense attention predicts the second half as a prompt, many positions in a call. Any other policy acts when a text is
generated, so its second half is generated, with the window's own tokens: one decode step a position. Several windows
are decoded together, because a step then reads the weights once for all.

A base file holds the base model's log-probabilities in the format of `llama-perplexity --kl-divergence-base`:

    "_logits_"  int32 n_ctx, n_vocab, n_chunk  int32 tokens [n_chunk, n_ctx]
    per scored position: float32 scale, min_log_prob  uint16 code [n_vocab, made even]

with log p = scale * code + min_log_prob, cut off at 16 below the most likely token.
"""

from __future__ import annotations

import math
import os
import statistics
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from .bandwidth import available_memory
from .batch import BATCH_SIZE
from .decoder import Decoder
from .errors import ModelError
from .policies import Dense
from .session import prompt_chunks
from .stores import Store, get_store, get_stores

if TYPE_CHECKING:
    from .cache import Cache
    from .llama import Llama

MAGIC = b"_logits_"
LOGITS_BYTES = 64 << 20  # of logits in memory at once
MAX_TOKENS = 1 << 26  # in a base file
MAX_CHUNK = 512  # tokens per prefill call
MEMORY_SHARE = 2  # caches of several windows may take one part in so many of the memory that is free

_HEADER = struct.Struct("<8siii")
_CUTOFF = np.float32(16.0)


def first_scored(n_ctx: int) -> int:
    """The first position of a window whose prediction counts."""
    return n_ctx // 2


def cut_windows(tokens: Sequence[int], n_ctx: int, n_chunks: int | None = None) -> np.ndarray:
    """The text as int32 [n_chunk, n_ctx]. ModelError if it is shorter than two windows, as in llama.cpp."""
    if len(tokens) < 2 * n_ctx:
        raise ModelError(f"the text is too short: needs at least {2 * n_ctx} tokens, has {len(tokens)} (see --ctx)")
    n = len(tokens) // n_ctx if n_chunks is None else min(n_chunks, len(tokens) // n_ctx)
    return np.asarray(tokens[: n * n_ctx], np.int32).reshape(n, n_ctx)


class Scored(NamedTuple):
    """Predictions at n of the scored positions."""

    rows: np.ndarray  # int [n]: which they are, all windows counted one after the other
    logits: np.ndarray  # float32 [n, n_vocab]
    tokens: np.ndarray  # int32 [n]: what followed


def together(llama: Llama, n_ctx: int, dense: bool = False) -> int:
    """How many windows to decode together: as many as make it faster and fit into memory. dense: twice each."""
    plans = [llama.decoder.policy.plan(llama.config, n_ctx, *_stores(llama))]
    if dense:
        plans.append(Dense().plan(llama.config, n_ctx, *_exact_stores(llama)))
    each = sum(plan.nbytes(llama.config) for plan in plans)
    return max(1, min(BATCH_SIZE, available_memory() // MEMORY_SHARE // each))


def score(
    llama: Llama, windows: np.ndarray, group: slice, decode: bool, read: list[float] | None = None
) -> Iterator[Scored]:
    """Runs some of the windows [n_chunk, n_ctx] and yields what is predicted at each of their scored positions.

    decode: by decode steps of all of them together; else each window as a prompt, which shows nothing of a policy.
    read: see `decoded_logits`.
    """
    n_scored = len(windows[0]) - 1 - first_scored(len(windows[0]))
    if decode:
        rows = np.arange(len(windows))[group] * n_scored
        for logits, tokens in decoded_logits(llama, windows[group], read):
            yield Scored(rows, logits, tokens)
            rows = rows + 1
        return
    for i in range(len(windows))[group]:
        row = i * n_scored
        for logits, tokens in window_logits(llama, windows[i]):
            yield Scored(np.arange(row, row + len(tokens)), logits, tokens)
            row += len(tokens)


def window_logits(llama: Llama, window: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Reads one window [n_ctx]; yields (logits [n, n_vocab], next tokens [n]) over the scored positions, in order."""
    decoder, cache, tokens = llama.decoder, llama.session.cache, _fed(llama, window)
    first, stop = first_scored(len(window)), len(window) - 1  # nothing follows the last token
    llama.session.reset()
    _read(decoder, cache, 0, tokens[:first])
    rows = _rows_at_once(llama, 1)
    for start in range(first, stop, rows):
        end = min(start + rows, stop)
        logits = decoder.prefill(cache, tokens[start:end], logits="all")
        assert logits is not None
        yield logits, window[start + 1 : end + 1]


def decoded_logits(
    llama: Llama, windows: np.ndarray, read: list[float] | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Decodes windows [B, n_ctx] together after their first halves; yields (logits [B, n_vocab], next tokens [B]).

    read: receives, at the end, the bytes of cache that a step read on average, of each window.
    """
    b, n_ctx = windows.shape
    decoder, fed = llama.decoder, [_fed(llama, window) for window in windows]
    cache = decoder.new_cache(decoder.policy.plan(llama.config, n_ctx, *_stores(llama)), b)
    for seq, tokens in enumerate(fed):
        _read(decoder, cache, seq, tokens[: first_scored(n_ctx)])
    for at in range(first_scored(n_ctx), n_ctx - 1):
        yield decoder.decode(cache, [tokens[at] for tokens in fed]), windows[:, at + 1]
    if read is not None:
        seen, touched = range(first_scored(n_ctx) + 1, n_ctx), decoder.policy.bytes_touched
        for seq in range(b):
            read.append(statistics.fmean(touched(decoder.ops, llama.config, cache, seq, n) for n in seen))


def dense_log_probs(llama: Llama, windows: np.ndarray) -> Iterator[np.ndarray]:
    """The log-probabilities [B, n_vocab] that dense attention gives at each scored position of windows [B, n_ctx].

    They are computed many positions at a time, into one block of memory: each is valid until the next.
    """
    b, n_ctx = windows.shape
    first, stop = first_scored(n_ctx), n_ctx - 1
    decoder = Decoder(llama.config, llama.decoder.weights, llama.decoder.ops, Dense())
    cache = decoder.new_cache(decoder.policy.plan(llama.config, n_ctx, *_exact_stores(llama)), b)
    fed = [_fed(llama, window) for window in windows]
    for seq, tokens in enumerate(fed):
        _read(decoder, cache, seq, tokens[:first])
    rows = min(_rows_at_once(llama, b), stop - first)
    block = np.empty((b, rows, llama.config.n_vocab), np.float32)
    for start in range(first, stop, rows):
        end = min(start + rows, stop)
        for seq, tokens in enumerate(fed):
            logits = decoder.prefill(cache, tokens[start:end], seq, logits="all")
            assert logits is not None
            highest, log_sum = log_sum_exp(logits)
            np.subtract(logits, (highest + log_sum.astype(np.float32))[:, None], out=block[seq, : end - start])
        yield from block[:, : end - start].swapaxes(0, 1)


def _fed(llama: Llama, window: np.ndarray) -> list[int]:
    """The tokens of a window as the model gets them."""
    tokens: list[int] = window.tolist()
    if llama.tokenizer.add_bos and llama.tokenizer.bos_id is not None:
        tokens[0] = llama.tokenizer.bos_id
    return tokens


def _read(decoder: Decoder, cache: Cache, seq: int, tokens: Sequence[int]) -> None:
    """Prefills the beginning of a window, in chunks as the policy wants them."""
    for start, stop in prompt_chunks(decoder.policy, 0, len(tokens)):
        decoder.prefill(cache, tokens[start:stop], seq, logits="none")


def _rows_at_once(llama: Llama, n_windows: int) -> int:
    return max(1, min(MAX_CHUNK, LOGITS_BYTES // (4 * llama.config.n_vocab * n_windows)))


def _stores(llama: Llama) -> tuple[Store, Store]:
    plan = llama.session.cache.plan
    return plan.k_store, plan.v_store


def _exact_stores(llama: Llama) -> tuple[Store, Store]:
    """Those of the cache that a policy or a quantised cache is compared with."""
    if llama.session.cache.plan.k_store.latent:
        return get_stores("latent-f16", llama.config.palu)
    k, v = (get_store("f16") if store.length > 1 else store for store in _stores(llama))
    return k, v


def log_sum_exp(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The maximum of each row [n, n_vocab], and log(sum(exp(row - maximum))): float32 [n], float64 [n]."""
    highest = logits.max(axis=1)
    return highest, np.log(np.exp(logits - highest[:, None]).sum(axis=1, dtype=np.float64))


@dataclass
class Perplexity:
    """A running perplexity: exp of the mean negative log-likelihood (nll) of the scored tokens."""

    count: int = 0
    nll: float = 0.0
    nll2: float = 0.0

    def add(self, logits: np.ndarray, tokens: np.ndarray) -> None:
        """Scores logits [n, n_vocab] against the tokens [n] that came."""
        highest, log_sum = log_sum_exp(logits)
        nll = log_sum + highest - logits[np.arange(len(tokens)), tokens]
        self.count += len(tokens)
        self.nll += float(nll.sum())
        self.nll2 += float((nll * nll).sum())

    @property
    def value(self) -> float:
        return _exp(self.nll / self.count)

    @property
    def error(self) -> float:
        """The standard error of `value`, 0 where it cannot be told."""
        mean = self.nll / self.count
        variance = self.nll2 / self.count - mean * mean
        return self.value * math.sqrt(variance / (self.count - 1)) if variance > 0 and self.count > 1 else 0.0


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


# -- the base file -----------------------------------------------------------------------------------------------------


def row_codes(n_vocab: int) -> int:
    """uint16 numbers per scored position: two float32, then the codes, an even number of them."""
    return 4 + 2 * ((n_vocab + 1) // 2)


def base_size(n_ctx: int, n_vocab: int, n_chunk: int) -> int:
    """Bytes of a base file."""
    rows = n_chunk * (n_ctx - 1 - first_scored(n_ctx))
    return _HEADER.size + 4 * n_chunk * n_ctx + 2 * rows * row_codes(n_vocab)


def write_header(file: BinaryIO, windows: np.ndarray, n_vocab: int) -> None:
    n_chunk, n_ctx = windows.shape
    file.write(_HEADER.pack(MAGIC, n_ctx, n_vocab, n_chunk))
    file.write(windows.astype("<i4").tobytes())


def write_rows(file: BinaryIO, windows: np.ndarray, scored: Scored) -> None:
    """Writes predictions to their places in a base file that begins with a header for these windows."""
    n_vocab = scored.logits.shape[1]
    begin = _HEADER.size + 4 * windows.size
    for row, codes in zip(scored.rows.tolist(), encode_log_probs(scored.logits), strict=True):
        file.seek(begin + 2 * row_codes(n_vocab) * row)
        file.write(codes.tobytes())


def encode_log_probs(logits: np.ndarray) -> np.ndarray:
    """float32 logits [n, n_vocab] -> rows of a base file, uint16 [n, row_codes]."""
    n, n_vocab = logits.shape
    highest, log_sum = log_sum_exp(logits)
    lowest = np.maximum(logits.min(axis=1), highest - _CUTOFF)
    scale = (highest - lowest) / np.float32(65535.0)
    rows = np.zeros((n, row_codes(n_vocab)), "<u2")
    rows[:, :4] = np.stack([scale, lowest - highest - log_sum.astype(np.float32)], axis=1).astype("<f4").view("<u2")
    inverse = np.divide(np.float32(1.0), scale, out=np.zeros_like(scale), where=scale > 0)
    rows[:, 4 : 4 + n_vocab] = np.rint(np.maximum(logits - lowest[:, None], 0) * inverse[:, None]).clip(0, 65535)
    return rows


class BaseFile:
    """A base file opened for reading. It is untrusted: sizes are checked before anything is allocated."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.file = path.open("rb")
            size = os.fstat(self.file.fileno()).st_size
            header = self.file.read(_HEADER.size)
        except OSError as e:
            raise ModelError(f"{path}: cannot read: {e.strerror}") from None
        if len(header) < _HEADER.size or not header.startswith(MAGIC):
            raise ModelError(f"{path}: not a file of log-probabilities (it does not begin with '{MAGIC.decode()}')")
        _, self.n_ctx, self.n_vocab, self.n_chunk = _HEADER.unpack(header)
        if self.n_ctx < 4 or self.n_vocab < 1 or self.n_chunk < 1 or self.n_ctx * self.n_chunk > MAX_TOKENS:
            raise ModelError(
                f"{path}: impossible header: n_ctx {self.n_ctx}, n_vocab {self.n_vocab}, n_chunk {self.n_chunk}"
            )
        expected = base_size(self.n_ctx, self.n_vocab, self.n_chunk)
        if size != expected:
            raise ModelError(f"{path}: has {size} bytes, its header says {expected}")
        tokens = np.fromfile(self.file, "<i4", self.n_ctx * self.n_chunk)
        if tokens.min() < 0 or tokens.max() >= self.n_vocab:
            raise ModelError(f"{path}: a token id is outside 0 to {self.n_vocab - 1}")
        self.windows = tokens.reshape(self.n_chunk, self.n_ctx)
        self._begin = self.file.tell()

    def read(self, rows: Iterable[int]) -> np.ndarray:
        """Log-probabilities at scored positions, all windows counted one after the other: float32 [n, n_vocab]."""
        rows = np.stack([self._row(row) for row in rows])
        scale, low = np.ascontiguousarray(rows[:, :4]).view("<f4").T
        if not ((scale >= 0) & (low > -1e4) & (low + 65535 * scale < 0.01)).all():  # false for NaN too
            raise ModelError(f"{self.path}: scale and smallest log-probability of a position give no probabilities")
        return rows[:, 4 : 4 + self.n_vocab].astype(np.float32) * scale[:, None] + low[:, None]

    def _row(self, row: int) -> np.ndarray:
        self.file.seek(self._begin + 2 * row_codes(self.n_vocab) * row)
        return np.frombuffer(self.file.read(2 * row_codes(self.n_vocab)), "<u2")

    def close(self) -> None:
        self.file.close()


# -- divergence --------------------------------------------------------------------------------------------------------


@dataclass
class Divergence:
    """How far a model is from the base, position by position."""

    nll: list[np.ndarray] = field(default_factory=list)
    nll_base: list[np.ndarray] = field(default_factory=list)
    kld: list[np.ndarray] = field(default_factory=list)
    same_top: list[np.ndarray] = field(default_factory=list)

    def add(self, logits: np.ndarray, tokens: np.ndarray, log_base: np.ndarray) -> None:
        """Compares logits [n, n_vocab] with the base's log-probabilities [n, n_vocab]; tokens [n] are what came."""
        highest, log_sum = log_sum_exp(logits)
        rows = np.arange(len(tokens))
        log_p = logits - (highest + log_sum.astype(np.float32))[:, None]
        self.nll.append(-log_p[rows, tokens].astype(np.float64))
        self.nll_base.append(-log_base[rows, tokens].astype(np.float64))
        self.same_top.append(logits.argmax(axis=1) == log_base.argmax(axis=1))
        terms = np.exp(log_base) * (log_base - log_p)
        self.kld.append(np.where(log_base > -_CUTOFF, terms, 0).sum(axis=1, dtype=np.float64))

    def statistics(self) -> dict[str, float]:
        """All figures; `x_error` is the standard error of the mean `x`. Probabilities are fractions, not percent."""
        nll, base = np.concatenate(self.nll), np.concatenate(self.nll_base)
        kld, same = np.concatenate(self.kld), np.concatenate(self.same_top)
        delta = np.exp(-nll) - np.exp(-base)
        same_top = float(same.mean())
        squares, squares_error = _mean(delta**2)
        rms = math.sqrt(squares)
        out: dict[str, float] = {"n_scored": len(nll)}
        for name, logs in (("ppl", nll), ("ppl_base", base), ("ppl_ratio", nll - base)):
            mean, error = _mean(logs)
            out |= {name: _exp(mean), f"{name}_error": _exp(mean) * error}
        for name, values in (("ln_ppl_ratio", nll - base), ("kld", kld), ("delta_p", delta)):
            mean, error = _mean(values)
            out |= {name: mean, f"{name}_error": error}
        for name, values in (("kld", kld), ("delta_p", delta)):
            out |= {f"{name}_max": float(values.max()), f"{name}_min": float(values.min())}
        for percent in (99.9, 99, 95, 90, 50, 10, 5, 1, 0.1):
            out[f"kld_p{percent:g}"] = float(np.percentile(kld, percent))
        return out | {
            "delta_p_rms": rms,
            "delta_p_rms_error": 0.5 / rms * squares_error if rms else 0.0,
            "same_top": same_top,
            "same_top_error": math.sqrt(same_top * (1 - same_top) / max(len(same) - 1, 1)),
        }


def _mean(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error (population variance over n - 1, as in llama.cpp)."""
    return float(values.mean()), float(math.sqrt(values.var() / max(len(values) - 1, 1)))
