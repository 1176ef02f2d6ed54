"""What one example asks of a model, and the parts of text that tasks are made of."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import ModelError
from ..tokenizer import Tokenizer

CHARACTERS, TOKENS = 6000, 2048  # of context in the paper (arXiv 2312.04985), and the length that stands for it here
FULL_LENGTH = 1024  # tokens of context from which on prompts and references are as long as in the paper

_SPACE = re.compile(r"\s")


@dataclass(frozen=True)
class Example:
    """Token ids to prefill, and what is to follow: n_gen tokens of the model's own, or those of `forced`, scored."""

    name: str  # unique in its task
    prompt: tuple[int, ...]  # context and question as one string
    question: tuple[int, ...]  # the same without the context
    references: tuple[str, ...]  # the right outputs
    n_gen: int
    forced: tuple[int, ...] = ()  # n_gen tokens, or none

    @functools.cached_property
    def digest(self) -> str:
        """Tells it from an example of the same name that was made of another text or with another tokenizer."""
        parts = (self.prompt, self.question, self.references, self.n_gen, self.forced)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Token ids of a text that is to be continued: BOS where the file adds one, never EOS."""
    ids = tokenizer.encode(text, add_bos=False)
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    return (*bos, *ids)


def count(tokenizer: Tokenizer, text: str) -> int:
    """Tokens of a text, without special ones."""
    return len(tokenizer.encode(text, add_bos=False))


def cut(text: str, start: int, n: int) -> int | None:
    """Where the piece from `start` on ends that has n characters and more, up to white space or the end of the text.

    None if the text is over before.
    """
    if len(text) - start < n:
        return None
    space = _SPACE.search(text, start + n)
    return space.start() if space else len(text)


def context_characters(tokenizer: Tokenizer, text: str, length: int) -> int:
    """Characters of context for `length` tokens: the paper's 6000 for 2048, and in proportion.

    Fewer for a tokenizer that needs more tokens for this text: then nine tenths of what it fits in on average, so that
    there is room for the prompt and for denser parts.
    """
    sample = text[: 1 << 16]
    per_token = len(sample) / max(count(tokenizer, sample), 1)
    return max(1, int(length * min(CHARACTERS / TOKENS, 0.9 * per_token)))


def scaled(n: int, length: int) -> int:
    """n characters, or fewer, in proportion, where the context is shorter than FULL_LENGTH."""
    return max(1, n * min(length, FULL_LENGTH) // FULL_LENGTH)


def fitting(examples: Iterable[Example], n: int, n_ctx: int, task: str) -> list[Example]:
    """The first n that the context holds with what is generated. Raises ModelError if there is none."""
    found: list[Example] = []
    needs: list[int] = []
    for example in examples:
        needs.append(len(example.prompt) + example.n_gen)
        if needs[-1] <= n_ctx:
            found.append(example)
        if len(found) == n:
            break
    if not needs:
        raise ModelError(f"{task}: the data has no example for this length (see --length)")
    if not found:
        raise ModelError(f"{task}: needs {min(needs)} tokens, the context holds {n_ctx} (see --length and --ctx)")
    return found
