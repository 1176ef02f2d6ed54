"""Tasks made of plain text: repetition, needle, bits per character."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import ModelError
from ..tokenizer import Tokenizer
from .example import Example, context_characters, count, cut, encode, fitting, scaled
from .scoring import matched_characters

MAX_GENERATED = 128  # tokens
MAX_FORCED = 256  # tokens


@dataclass(frozen=True)
class Repetition:
    """A passage of the context again: its first words are given, how much of the rest follows letter by letter?

    The texts, joined, are cut into chunks of 6000 characters and more; inside each, passages follow one another, of 128
    characters and more for the prompt and 256 and more for the reference, which begins with white space.
    """

    texts: tuple[str, ...]
    name = "repetition"
    metric = "matched characters"

    def examples(self, tokenizer: Tokenizer, length: int, n_ctx: int, n: int, seed: int) -> list[Example]:
        text = "\n".join(self.texts)
        found = [
            (start, end, at)
            for start, end in pieces(text, context_characters(tokenizer, text, length))
            for at in passages(text, start, end, scaled(128, length), scaled(256, length))
        ]
        random.Random(f"{self.name} {seed}").shuffle(found)

        def make() -> Iterator[Example]:
            for start, end, (first, middle, last) in found:
                question, reference = "\n" + text[first:middle], text[middle:last]
                yield Example(
                    name=str(first),  # characters into the text
                    prompt=encode(tokenizer, text[start:end] + question),
                    question=encode(tokenizer, question),
                    references=(reference,),
                    n_gen=min(MAX_GENERATED, count(tokenizer, reference)),
                )

        # In the order of the text, so that a session computes a chunk once for all of its passages.
        return sorted(fitting(make(), n, n_ctx, self.name), key=lambda example: int(example.name))

    def score(self, example: Example, output: str, bits: float) -> float:
        return matched_characters(output, example.references[0])


def pieces(text: str, n: int) -> Iterator[tuple[int, int]]:
    """(start, end) of consecutive pieces of n characters and more, each but the last followed by white space."""
    start, end = 0, cut(text, 0, n)
    while end is not None:
        yield start, end
        start, end = end, cut(text, end, n)


def passages(text: str, start: int, end: int, n_prompt: int, n_reference: int) -> Iterator[tuple[int, int, int]]:
    """(start of the prompt, of the reference, its end) of consecutive passages of a chunk."""
    chunk, at = text[start:end], 0
    while (middle := cut(chunk, at, n_prompt)) is not None and (last := cut(chunk, middle, n_reference)) is not None:
        yield start + at, start + middle, start + last
        at = last


@dataclass(frozen=True)
class Needle:
    """A sentence hidden in the context is to be repeated: right or wrong.

    The cells are 17 even depths for each length of 1024 i - 128 tokens of haystack up to the one asked for; the first n
    of them are spread over both. The texts, in random order, are the haystack. It is cut by tokens and then joined with
    the needle and the query as text, so that the tokenizer sees one string. The title is the paper's, whatever the
    texts are.
    """

    texts: tuple[str, ...]
    name = "needle"
    metric = "% correct"

    TITLE = "Articles by Paul Graham:\n"
    NEEDLE = "The best thing to do in San Francisco is to eat a sandwich and sit in Dolores Park on a sunny day."
    QUERY = '\n\nWhat is the best thing to do in San Francisco? "The best thing to do in San Francisco is to'
    ANSWER = "eat a sandwich and sit in Dolores Park on a sunny day"

    def examples(self, tokenizer: Tokenizer, length: int, n_ctx: int, n: int, seed: int) -> list[Example]:
        texts, sizes, random_order = list(self.texts), haystack_lengths(length), random.Random(f"{self.name} {seed}")
        random_order.shuffle(texts)
        # No token is longer than `longest`, so more text than this is never needed.
        haystack = tokenizer.encode("\n\n".join(texts)[: length * tokenizer.longest], add_bos=False)
        if len(haystack) < max(sizes):
            raise ModelError(f"{self.name}: the text has {len(haystack)} tokens, too few for --length {length}")
        random_order.shuffle(sizes)
        depths, n_gen = halving(16), count(tokenizer, self.ANSWER) + 5

        def make() -> Iterator[Example]:
            for first, (i, size) in itertools.product(range(len(depths)), enumerate(sizes)):
                depth = depths[(first + i) % len(depths)]
                at = size * depth // 16
                before, after = tokenizer.decode(haystack[:at]), tokenizer.decode(haystack[at:size], start=at == 0)
                needle = (".\n" if at else "") + self.NEEDLE
                yield Example(
                    name=f"{size} tokens, depth {depth}/16",
                    prompt=encode(tokenizer, f"{self.TITLE}{before}{needle}\n{after}.\n{self.QUERY}"),
                    question=encode(tokenizer, self.QUERY),
                    references=(self.ANSWER,),
                    n_gen=n_gen,
                )

        return fitting(make(), n, n_ctx, self.name)

    def score(self, example: Example, output: str, bits: float) -> float:
        return 100.0 * output.lstrip().startswith(self.ANSWER)


def haystack_lengths(length: int) -> list[int]:
    """Tokens of haystack: 128 less than each 1024 up to `length`; of a shorter one an eighth less."""
    return [n - 128 for n in range(1024, length + 1, 1024)] or [length - length // 8]


def halving(n: int) -> list[int]:
    """0 to n, a power of two, in an order whose beginnings are spread evenly: 0, n, n/2, n/4, 3n/4, ..."""
    order, step = [0, n], n
    while step > 1:
        order += range(step // 2, n, step)
        step //= 2
    return order


@dataclass(frozen=True)
class BitsPerCharacter:
    """How well a text is predicted after 6000 characters of it: bits per character of the next 400 and more.

    The reference is given token by token. Context and reference are tokenised as one string, so no special token and no
    space of the tokenizer's own is among the tokens that count; where a token spans the seam, it counts with all of its
    characters. Each text is cut into consecutive documents of that length.
    """

    texts: tuple[str, ...]
    name = "bpc"
    metric = "bits per character"

    def examples(self, tokenizer: Tokenizer, length: int, n_ctx: int, n: int, seed: int) -> list[Example]:
        found = []
        for i, text in enumerate(self.texts):
            n_context, start = context_characters(tokenizer, text, length), 0
            while (middle := cut(text, start, n_context)) and (end := cut(text, middle, scaled(400, length))):
                found.append((i, start, middle, end))
                start = end
        random.Random(f"{self.name} {seed}").shuffle(found)

        def make() -> Iterator[Example]:
            for i, start, middle, end in found:
                prompt, forced = split(tokenizer, self.texts[i][start:end], middle - start)
                if len(forced) > MAX_FORCED:
                    raise ModelError(
                        f"{self.name}: {end - middle} characters take {len(forced)} tokens, over {MAX_FORCED}"
                    )
                reference = tokenizer.decode(forced, start=False)
                if not reference:  # of characters that the vocabulary cannot spell
                    continue
                yield Example(f"{i}:{start}", prompt, prompt[-1:], (reference,), len(forced), forced)

        return fitting(make(), n, n_ctx, self.name)

    def score(self, example: Example, output: str, bits: float) -> float:
        return bits / len(output)


def split(tokenizer: Tokenizer, text: str, at: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of a text, cut where the first token ends or begins that holds something of text[at:]."""
    whole, before = encode(tokenizer, text), encode(tokenizer, text[:at])
    same = next(
        (i for i, (a, b) in enumerate(zip(whole, before, strict=False)) if a != b), min(len(whole), len(before))
    )
    return whole[:same], whole[same:]
