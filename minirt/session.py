"""A session: one text in the cache. Feeding a text that begins as the last one did only computes what is new."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cache import Cache
from .decoder import CHUNK, Decoder
from .errors import ModelError, UsageError
from .policies import Policy
from .sampling import Sampler

PREFILL_CHUNK = CHUNK  # tokens: small enough to show progress

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)


@dataclass
class Timings:
    """What one answer cost; of a batch, its share of the steps: sums over its answers are what the batch cost."""

    prompt_tokens: int = 0  # computed, that is without what the cache already held
    prompt_seconds: float = 0.0
    tokens: int = 0  # decode steps
    seconds: float = 0.0
    bytes_read: int = 0  # weights and cache that the decode steps had to read


class Session:
    """The tokens whose keys and values are in the cache, and how to go on from them.

    Of a cache of several sequences it is one, `seq`; all of them step together then, which `minirt.batch` does.
    """

    def __init__(self, decoder: Decoder, cache: Cache, n_ctx: int, weight_bytes: int, seq: int = 0):
        self.decoder, self.cache, self.n_ctx, self.seq = decoder, cache, n_ctx, seq
        self.weight_bytes = weight_bytes  # read by each decode step
        self.tokens: list[int] = []
        self.pinned = 0  # tokens at the beginning that are never evicted; another number begins the text anew
        self.timings = Timings()

    def check(self, tokens: Sequence[int]) -> None:
        """Raises ModelError if there are none or more than the context holds."""
        if not len(tokens):
            raise ModelError("the prompt is empty")
        if len(tokens) > self.n_ctx:
            raise ModelError(f"the prompt has {len(tokens)} tokens, the context holds {self.n_ctx} (see --ctx)")

    def feed(self, tokens: Sequence[int], progress: Progress | None = None) -> np.ndarray:
        """Makes the cache hold exactly `tokens`; returns float32 logits [n_vocab] after the last one.

        Raises ModelError as `check`; the session is then unchanged.
        """
        self.check(tokens)
        begun = time.perf_counter()
        pinned = min(self.pinned, len(tokens))
        same = min(common_prefix(self.tokens, tokens), len(tokens) - 1)
        kept = self._rewind(same if pinned == self.cache.pinned[self.seq] else 0)
        if kept == 0:
            self.cache.pinned[self.seq] = pinned
        n, logits = len(tokens) - kept, None
        for start, stop in prompt_chunks(self.decoder.policy, kept, len(tokens)):
            # A prompt in one piece goes through all layers at once: progress is how many of them are done.
            layers = None if progress is None else lambda done, total: progress(n * done // total, n)
            whole = self.decoder.policy.whole_prompt
            logits = self.decoder.prefill(
                self.cache,
                tokens[start:stop],
                self.seq,
                "last" if stop == len(tokens) else "none",
                layers if whole else None,
            )
            self.tokens.extend(tokens[start:stop])
            if progress is not None:
                progress(stop - kept, n)
        self.timings = Timings(n, time.perf_counter() - begun)
        assert logits is not None
        return logits

    def step(self, token: int) -> np.ndarray:
        """Appends one token and returns the float32 logits [n_vocab] after it."""
        logits: np.ndarray = self._decode(self.decoder.decode, token)
        return logits

    def follow(self, token: int, sampler: Sampler, recent: Sequence[int]) -> int:
        """Appends one token and returns the next; `recent` are the tokens that the sampler shall know of."""
        if sampler.is_greedy:
            return int(self._decode(self.decoder.choose, token))
        return sampler(self.step(token), recent)

    def _decode(self, decode: Callable[[Cache, Sequence[int]], Any], token: int) -> Any:
        """What decode(cache, [token]) gives for this sequence, its only one."""
        begun = time.perf_counter()
        n = len(self.tokens)
        if self._rewind(n) < n:
            raise ModelError(
                "the last step was interrupted, and this policy cannot go on from there: feed the text anew"
            )
        (found,) = decode(self.cache, [token])
        self.stepped(token, time.perf_counter() - begun)
        return found

    def stepped(self, token: int, seconds: float, together: int = 1) -> None:
        """Notes that the decoder appended a token, in a step of so many seconds for so many sequences together."""
        self.tokens.append(token)
        read = self.decoder.policy.bytes_read(self.decoder.config, self.cache.plan, len(self.tokens))
        self.timings.tokens += 1
        self.timings.bytes_read += self.weight_bytes // together + read
        self.timings.seconds += seconds / together

    def generate(self, logits: np.ndarray, sampler: Sampler, max_tokens: int) -> Iterator[int]:
        """Yields up to max_tokens sampled ids, stopping when the context is full.

        A token is in the cache only once the next one is asked for, so the last one costs nothing.
        """
        recent, begun = list(self.tokens), self.timings
        token = sampler(logits, recent)
        for i in range(max_tokens):
            recent.append(token)
            yield token
            if self.timings is not begun:
                raise UsageError("another answer was begun in this session; this one cannot go on")
            if i + 1 == max_tokens or len(self.tokens) == self.n_ctx:
                return
            token = self.follow(token, sampler, recent)

    def reset(self) -> None:
        """Forgets everything."""
        self._rewind(0)
        self.timings = Timings()

    def _rewind(self, n: int) -> int:
        """Keeps the first n tokens at most. Also heals a cache that an interrupt left ahead of `tokens`."""
        kept = self.decoder.rewind(self.cache, self.seq, n)
        del self.tokens[kept:]
        return kept


def prompt_chunks(policy: Policy, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Where the chunks of tokens start ... stop - 1 begin and end, as the policy wants them."""
    size = stop - start if policy.whole_prompt else PREFILL_CHUNK
    for begin in range(start, stop, max(size, 1)):
        yield begin, min(begin + size, stop)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common at the beginning."""
    n = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(different[0]) if len(different) else n
