"""Several prompts answered together: a step appends a token to each sequence and reads every weight once for all.

A prompt beyond the size of the batch waits, and takes the place of the first sequence that ends. When none waits, the
batch shrinks: the last sequence moves to the place that became free, so that those at work are always the first of the
cache, and a step sees a cache of so many sequences. For that a policy's side arrays are [B, ...], written in place, and
a sequence of n tokens lies in its first n slots.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .answer import Answer
from .errors import ModelError, UsageError
from .session import Progress, Session

BATCH_SIZE = 8  # sequences; up to so many, the CPU multiplies a weight as it lies in memory

Row = tuple[Session, "BatchAnswer"]  # row i of a step is sequence i of the cache


class BatchAnswer(Answer):
    """An answer that grows by what a batch computes; complete when it is returned, so iterating gives nothing."""

    def _run(self, session: Session, prompt: Sequence[int], progress: Progress | None) -> Iterator[str]:
        return iter(())

    @property
    def is_greedy(self) -> bool:
        return self._sampler.is_greedy

    def choose(self, session: Session, logits: np.ndarray) -> int:
        """A token from the logits [n_vocab] after those of the session."""
        return self._sampler(logits, session.tokens)

    def grow(self, session: Session, token: int) -> None:
        """Takes one more token."""
        self.text += self._push(token)
        if self.finish_reason is None and len(self.tokens) == self._max_tokens:
            self.text += self._end("length")
        elif self.finish_reason is None and len(session.tokens) == session.n_ctx:
            self.text += self._end("context")


def complete(sessions: Iterable[Session], tasks: Iterable[tuple[Sequence[int], BatchAnswer]]) -> None:
    """Makes every (prompt, answer) grow to its end, as many at a time as there are sessions.

    The sessions are those of all sequences of one cache, in order. An error or an interrupt leaves the answers as far
    as they came, and the cache of no use.
    """
    waiting = iter(tasks)
    rows = [(session, answer) for session in sessions if (answer := _next(session, waiting))]
    while rows:
        _step(rows)
        for i in reversed(range(len(rows))):
            session, answer = rows[i]
            if answer.finish_reason is None:
                continue
            follower = _next(session, waiting)
            if follower is not None:
                rows[i] = session, follower
                continue
            last, _ = row = rows.pop()
            if last is not session:
                last.cache.move(last.seq, i)
                last.seq, rows[i] = i, row


def _next(session: Session, waiting: Iterator[tuple[Sequence[int], BatchAnswer]]) -> BatchAnswer | None:
    """Feeds waiting prompts until an answer needs more than its first token; None if none is left."""
    for prompt, answer in waiting:  # what the last text of this place has in common with the prompt is kept
        logits = session.feed(prompt)
        answer.timings = session.timings
        answer.grow(session, answer.choose(session, logits))
        if answer.finish_reason is None:
            return answer
    return None


def _step(rows: Sequence[Row]) -> None:
    """Appends the last token of each answer to its sequence, and chooses the next."""
    any_session, begun = rows[0][0], time.perf_counter()
    tokens = [answer.tokens[-1] for _, answer in rows]
    cache, decoder = any_session.cache, any_session.decoder
    part = cache if len(rows) == len(cache.n_seen) else cache.part(0, len(rows))
    greedy = all(answer.is_greedy for _, answer in rows)
    found: Any = decoder.choose(part, tokens) if greedy else decoder.decode(part, tokens)
    seconds = time.perf_counter() - begun
    for (session, answer), token, after in zip(rows, tokens, found, strict=True):
        session.stepped(token, seconds, len(rows))
        answer.grow(session, after if greedy else answer.choose(session, after))


def is_several(given: Any, single: type | tuple[type, ...]) -> bool:
    """Whether what was given is a list of prompts, rather than one prompt whose parts are `single`."""
    return isinstance(given, (list, tuple)) and not (given and isinstance(given[0], single))


def each(name: str, function: Callable[[Any], list[int]], prompts: Iterable[Any]) -> list[list[int]]:
    """function(prompt) for each prompt; its errors say which one."""
    out = []
    for i, prompt in enumerate(prompts):
        try:
            out.append(function(prompt))
        except (ModelError, UsageError) as e:
            raise type(e)(f"{name}[{i}]: {e}") from None
    return out
