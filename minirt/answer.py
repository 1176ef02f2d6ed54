"""An answer as it grows: text piece by piece, then why it ended and what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .errors import UsageError
from .sampling import Sampler, Sampling
from .session import Progress, Session, Timings
from .tokenizer import Tokenizer


class Answer(Iterator[str]):
    """Iterate for the text; each piece is whole characters. A session gives one answer at a time: going on with one
    after another was begun raises UsageError. Afterwards (or when interrupted, so far):

    text           all pieces
    tokens         the ids generated, without the one that ended it
    finish_reason  "stop" (end of turn, or a stop string), "length" (max_tokens), "context" (full), None (unfinished)
    timings        Timings
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        sampling: Sampling,
        max_tokens: int | None,
        stop: Sequence[str] = (),
        progress: Progress | None = None,
    ):
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"max_tokens {max_tokens} is out of range (1 or more)")
        if any(not s for s in stop):
            raise UsageError("a stop string is empty")
        self.text = ""
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.timings = Timings()
        self._sampler, self._stop, self._eog_ids = Sampler(sampling), tuple(stop), tokenizer.eog_ids
        self._max_tokens = max_tokens if max_tokens is not None else session.n_ctx
        self._decoder = tokenizer.stream_decoder(start=False)  # it continues the prompt
        self._held = ""  # text that might be the beginning of a stop string
        self._pieces = filter(None, self._run(session, prompt, progress))

    def __iter__(self) -> Answer:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def finish(self) -> Answer:
        """Runs to the end."""
        for _ in self:
            pass
        return self

    def _run(self, session: Session, prompt: Sequence[int], progress: Progress | None) -> Iterator[str]:
        logits = session.feed(prompt, progress)
        self.timings = session.timings
        for token in session.generate(logits, self._sampler, self._max_tokens):
            yield self._push(token)
            if self.finish_reason is not None:
                return
        full = len(session.tokens) == session.n_ctx and len(self.tokens) < self._max_tokens
        yield self._end("context" if full else "length")

    def _push(self, token: int) -> str:
        """Takes a sampled token; returns the text that is now certain, possibly ""."""
        if token in self._eog_ids:
            return self._end("stop")
        self.tokens.append(token)
        held = self._held + self._decoder.push(token)
        found = min((i for i in (held.find(s) for s in self._stop) if i >= 0), default=-1)
        if found >= 0:
            self.finish_reason = "stop"
            return held[:found]
        ready = len(held) - _possible_stop(held, self._stop)
        self._held = held[ready:]
        return held[:ready]

    def _end(self, reason: str) -> str:
        """Notes why no token follows; returns the text that was held back."""
        self.finish_reason = reason
        return self._held + self._decoder.flush()


def _possible_stop(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of text that begins a stop string."""
    longest = max((len(s) for s in stop), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-n:]) for s in stop):
            return n
    return 0
