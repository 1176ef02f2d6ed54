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
        self._session, self._tokenizer, self._prompt = session, tokenizer, prompt
        self._sampler, self._stop, self._progress = Sampler(sampling), tuple(stop), progress
        self._max_tokens = max_tokens if max_tokens is not None else session.n_ctx
        self._pieces = self._run()

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

    def _run(self) -> Iterator[str]:
        logits = self._session.feed(self._prompt, self._progress)
        self.timings = self._session.timings
        decoder = self._tokenizer.stream_decoder(start=False)  # it continues the prompt
        held = ""  # text that might be the beginning of a stop string
        for token in self._session.generate(logits, self._sampler, self._max_tokens):
            if token in self._tokenizer.eog_ids:
                self.finish_reason = "stop"
                break
            self.tokens.append(token)
            held += decoder.push(token)
            found = min((i for i in (held.find(s) for s in self._stop) if i >= 0), default=-1)
            if found >= 0:
                self.finish_reason = "stop"
                if found:
                    yield held[:found]
                return
            ready = len(held) - _possible_stop(held, self._stop)
            if ready:
                yield held[:ready]
                held = held[ready:]
        else:
            full = len(self._session.tokens) == self._session.n_ctx and len(self.tokens) < self._max_tokens
            self.finish_reason = "context" if full else "length"
        held += decoder.flush()
        if held:
            yield held


def _possible_stop(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of text that begins a stop string."""
    longest = max((len(s) for s in stop), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-n:]) for s in stop):
            return n
    return 0
