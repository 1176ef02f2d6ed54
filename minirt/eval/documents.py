"""Tasks made of documents with questions: question answering from SQuAD files, summaries of articles."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..tokenizer import Tokenizer
from .example import TOKENS, Example, count, encode, fitting
from .scoring import prefix_match, rouge_l

DISTRACTORS = 7
MAX_ANSWER, SPARE = 30, 5  # tokens
MAX_SUMMARY = 128  # tokens


@dataclass(frozen=True)
class Question:
    title: str
    context: str
    question: str
    answers: tuple[str, ...]
    id: str

    @property
    def asked(self) -> str:
        return f"Question: {self.question}\nAnswer:"


@dataclass(frozen=True)
class QA:
    """A question on one of several paragraphs, after an answered one: right or wrong.

    The paragraph stands among 7 others for 2048 tokens of context, so many that 8 become 16 for twice the length; fewer
    if they do not fit or there are not enough. Other than the authors' they come from other articles and none comes
    twice. The answered question is on the same paragraph if that has two, else any.
    """

    questions: tuple[Question, ...]
    name = "qa"
    metric = "% correct"

    def examples(self, tokenizer: Tokenizer, length: int, n_ctx: int, n: int, seed: int) -> list[Example]:
        order = list(self.questions)
        random.Random(f"{self.name} {seed}").shuffle(order)
        contexts = sorted({(q.title, q.context) for q in order})
        n_others = max((DISTRACTORS + 1) * length // TOKENS - 1, 0)

        def make() -> Iterator[Example]:
            for q in order:
                # A generator for each question: its example is the same however many are asked for.
                chance = random.Random(f"{self.name} {seed} {q.id}")
                others = [c for c in contexts if c[0] != q.title]
                others = chance.sample(others, min(n_others, len(others)))
                question = self._question(q, chance)
                for size in range(len(others), -1, -1):
                    passages = [(q.title, q.context), *others[:size]]
                    chance.shuffle(passages)
                    prompt = encode(tokenizer, _background(passages) + question)
                    if len(prompt) <= length:
                        break
                longest = max(count(tokenizer, " " + answer) for answer in q.answers)
                n_gen = min(MAX_ANSWER, longest + SPARE)
                yield Example(q.id, prompt, encode(tokenizer, question), q.answers, n_gen)

        return fitting(make(), n, n_ctx, self.name)

    def _question(self, q: Question, chance: random.Random) -> str:
        """What follows the paragraphs."""
        rest = [other for other in self.questions if other.id != q.id]
        shots = [other for other in rest if other.context == q.context] or rest
        text = f"From what you've just read about {_words(q.title)}, please answer the following questions.\n"
        if shots:
            shot = chance.choice(shots)
            text += f"{shot.asked} {min(shot.answers, key=len)}\n"
        return text + q.asked

    def score(self, example: Example, output: str, bits: float) -> float:
        return 100.0 * prefix_match(output, example.references)


def _background(passages: Sequence[tuple[str, str]]) -> str:
    return "".join(f"Title: {_words(title)}. Background: {context}\n" for title, context in passages)


def _words(title: str) -> str:
    return title.replace("_", " ")


@dataclass(frozen=True)
class Article:
    text: str
    summary: str


@dataclass(frozen=True)
class Summary:
    """A summary of an article, cut to the length of the reference in tokens: ROUGE-L F1 in percent.

    Articles have `shortest` to 8000 characters for 2048 tokens of context, and in proportion.
    """

    articles: tuple[Article, ...]
    shortest: int = 4000
    name = "summary"
    metric = "ROUGE-L F1, %"

    LONGEST = 8000

    def examples(self, tokenizer: Tokenizer, length: int, n_ctx: int, n: int, seed: int) -> list[Example]:
        found = [
            (i, article)
            for i, article in enumerate(self.articles)
            if self.shortest * length <= len(article.text) * TOKENS <= self.LONGEST * length
        ]
        random.Random(f"{self.name} {seed}").shuffle(found)

        def make() -> Iterator[Example]:
            question = "\nSummary:"
            for i, article in found:
                prompt = encode(tokenizer, f"Article: {article.text}{question}")
                n_gen = min(MAX_SUMMARY, count(tokenizer, article.summary))
                if len(prompt) <= length and n_gen:
                    yield Example(str(i), prompt, encode(tokenizer, question), (article.summary,), n_gen)

        return fitting(make(), n, n_ctx, self.name)

    def score(self, example: Example, output: str, bits: float) -> float:
        return 100 * rouge_l(output, example.references[0])
