"""minirt eval: how examples are made: what a prompt holds, how long it is, in what order examples come."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from minirt import Llama, ModelError
from minirt.eval import Example, attempt
from minirt.eval.documents import QA, Article, Question, Summary
from minirt.eval.example import context_characters, cut, encode, fitting, scaled
from minirt.eval.texts import BitsPerCharacter, Needle, Repetition, halving, haystack_lengths, passages, pieces, split
from minirt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def llama(tiny: Path) -> Iterator[Llama]:
    with Llama.load(tiny, device="reference", n_ctx=4096) as model:
        yield model


@pytest.fixture(scope="module")
def bpe(llama: Llama) -> Tokenizer:
    """Nearly a token for each character, no BOS."""
    return llama.tokenizer


@pytest.fixture(scope="module")
def spm(tiny_spm: Path) -> Iterator[Tokenizer]:
    """SentencePiece: BOS, and a space before every text."""
    with Llama.load(tiny_spm, device="reference", n_ctx=64) as model:
        yield model.tokenizer


def text_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens)


# -- sizes and cuts ----------------------------------------------------------------------------------------------------


def test_a_cut_ends_before_white_space_at_or_after_its_length() -> None:
    text = "abc defg\nhi"
    assert [cut(text, 0, n) for n in (1, 3, 4, 8, 9, 11, 12)] == [3, 3, 8, 8, 11, 11, None]
    assert cut(text, 3, 1) == 8, "it begins with white space, of which one character is its length"


def test_context_is_6000_characters_for_2048_tokens_or_what_the_tokenizer_can_hold() -> None:
    class Words:
        """A token for every n characters."""

        def __init__(self, n: int):
            self.n = n

        def encode(self, text: str, add_bos: bool) -> list[int]:
            assert add_bos is False
            return [0] * (len(text) // self.n)

    text = "x" * 12000
    assert context_characters(Words(4), text, 2048) == 6000  # type: ignore[arg-type]
    assert context_characters(Words(4), text, 4096) == 12000  # type: ignore[arg-type]
    assert context_characters(Words(1), text, 2000) == 1800  # type: ignore[arg-type]
    assert context_characters(Words(1), "", 2000) == 1  # type: ignore[arg-type]
    assert [scaled(128, n) for n in (4096, 1024, 512, 64, 1)] == [128, 128, 64, 8, 1]


def test_prompts_have_bos_where_the_file_adds_one_and_never_eos(bpe: Tokenizer, spm: Tokenizer) -> None:
    assert encode(bpe, "ab") == tuple(bpe.encode("ab"))
    assert encode(spm, "ab")[0] == spm.bos_id
    spm_with_eos = Tokenizer(spm.vocab, "test")
    spm_with_eos.add_eos = True
    assert encode(spm_with_eos, "ab") == encode(spm, "ab")


def test_only_examples_that_fit_are_taken() -> None:
    examples = [Example(str(n), (1,) * n, (1,), ("x",), 2) for n in (5, 9, 6, 7)]
    assert [e.name for e in fitting(examples, 2, 8, "qa")] == ["5", "6"]
    with pytest.raises(ModelError, match="qa: needs 7 tokens, the context holds 6"):
        fitting(examples, 2, 6, "qa")
    with pytest.raises(ModelError, match="qa: the data has no example"):
        fitting([], 2, 6, "qa")


# -- repetition --------------------------------------------------------------------------------------------------------


def test_chunks_and_passages_follow_one_another() -> None:
    text = "aaaa bbbb cccc dddd eeee ffff gggg hhhh"
    assert [text[a:b] for a, b in pieces(text, 12)] == ["aaaa bbbb cccc", " dddd eeee ffff"]
    found = [(text[a:b], text[b:c]) for a, b, c in passages(text, 0, 29, 3, 6)]
    assert found == [("aaaa", " bbbb cccc"), (" dddd", " eeee ffff")], "the second begins where the first ended"


def test_repetition(bpe: Tokenizer, words: str) -> None:
    examples = Repetition((words,)).examples(bpe, 2048, 4096, 3, seed=0)
    assert len(examples) == 3
    n = context_characters(bpe, words, 2048)
    for e in examples:
        context, newline, prompt = text_of(bpe, e.prompt).rpartition("\n")
        reference = e.references[0]
        assert newline
        assert prompt + reference in context
        assert context in words
        assert n <= len(context) < n + 5
        assert 128 <= len(prompt) < 128 + 5
        assert 256 <= len(reference) < 256 + 5
        assert reference[0] == " "
        assert reference[-1] != " "
        assert words.index(prompt + reference) == int(e.name)
        assert e.n_gen == min(128, len(bpe.encode(reference)))
        assert text_of(bpe, e.question) == "\n" + prompt


def test_repetition_in_the_order_of_the_text_whatever_was_drawn(bpe: Tokenizer, words: str) -> None:
    few, more, other = (
        [e.name for e in Repetition((words,)).examples(bpe, 512, 4096, n, seed)] for n, seed in ((4, 0), (9, 0), (4, 1))
    )
    assert set(few) < set(more)
    assert more == sorted(more, key=int)
    assert set(other) != set(few)


def test_repetition_score() -> None:
    example = Example("0", (1,), (1,), (" to be or not",), 5)
    assert Repetition(("",)).score(example, " to be and", 0.0) == 6


# -- needle ------------------------------------------------------------------------------------------------------------


def test_needle_cells() -> None:
    assert haystack_lengths(4096) == [896, 1920, 2944, 3968]
    assert haystack_lengths(1023) == [896]
    assert haystack_lengths(160) == [140]
    assert halving(16)[:7] == [0, 16, 8, 4, 12, 2, 6]
    assert sorted(halving(16)) == list(range(17))


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_needle(kind: str, words: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    length = 1200
    examples = Needle((words,)).examples(tokenizer, length, 4096, 17, seed=0)
    assert len({e.name for e in examples}) == 17
    haystack = tokenizer.encode(words, add_bos=False)[:896]
    for e in examples:
        depth = int(re.fullmatch(r"896 tokens, depth (\d+)/16", e.name)[1])  # type: ignore[index]
        before = tokenizer.decode(haystack[: 896 * depth // 16])
        after = tokenizer.decode(haystack)[len(before) :]
        needle = "The best thing to do in San Francisco is to eat a sandwich and sit in Dolores Park on a sunny day."
        query = 'What is the best thing to do in San Francisco? "The best thing to do in San Francisco is to'
        dot = ".\n" if depth else ""
        expected = f"Articles by Paul Graham:\n{before}{dot}{needle}\n{after}.\n\n\n{query}"
        assert e.prompt == encode(tokenizer, expected), "one string, with no space of the tokenizer's own inside"
        assert (
            e.n_gen == len(tokenizer.encode("eat a sandwich and sit in Dolores Park on a sunny day", add_bos=False)) + 5
        )
    assert [e.name for e in Needle((words,)).examples(tokenizer, length, 4096, 3, 0)] == [e.name for e in examples[:3]]


def test_few_needles_are_spread_over_lengths_and_depths(bpe: Tokenizer, words: str) -> None:
    cells = [e.name.split(" tokens, depth ") for e in Needle((words,)).examples(bpe, 4096, 1 << 20, 8, 0)]
    assert sorted(size for size, _ in cells) == sorted(2 * ["896", "1920", "2944", "3968"])
    assert len({depth for _, depth in cells}) >= 4
    everything = Needle((words,)).examples(bpe, 4096, 1 << 20, 1000, 0)
    assert len({e.name for e in everything}) == len(everything) == 4 * 17


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (" \neat a sandwich and sit in Dolores Park on a sunny day.", 100.0),
        (" eat a sandwich and sit in the park", 0.0),
        (" to eat a sandwich and sit in Dolores Park on a sunny day", 0.0),
    ],
)
def test_needle_score(output: str, expected: float) -> None:
    assert Needle(()).score(Example("", (), (), (), 1), output, 0.0) == expected


def test_a_haystack_that_is_too_small(bpe: Tokenizer) -> None:
    with pytest.raises(ModelError, match="needle: the text has 40 tokens, too few for --length 1024"):
        Needle(("zq" * 20,)).examples(bpe, 1024, 4096, 1, 0)


# -- bits per character ------------------------------------------------------------------------------------------------


def test_documents_of_bits_per_character(bpe: Tokenizer, words: str) -> None:
    examples = BitsPerCharacter((words, words[:100])).examples(bpe, 500, 4096, 100, seed=0)
    n, m = context_characters(bpe, words, 500), scaled(400, 500)
    starts = sorted(int(e.name.partition(":")[2]) for e in examples)
    assert {e.name[0] for e in examples} == {"0"}, "the second text is too short"
    assert starts[0] == 0
    for e in examples:
        start = int(e.name.partition(":")[2])
        context, reference = text_of(bpe, e.prompt), e.references[0]
        assert words[start:].startswith(context + reference)
        assert n <= len(context) < n + 5
        assert m <= len(reference) < m + 5
        assert reference[0] == " "
        assert e.forced == tuple(bpe.encode(reference))
        assert e.n_gen == len(e.forced)
        assert e.question == e.prompt[-1:]
        assert start + len(context) + len(reference) in [*starts, len(words)] or start == starts[-1]


def test_no_special_token_and_no_space_of_its_own_in_the_reference(spm: Tokenizer) -> None:
    prompt, forced = split(spm, "in the rain\non the train", 11)
    assert prompt + forced == encode(spm, "in the rain\non the train")
    assert text_of(spm, prompt) == "in the rain"
    assert spm.decode(forced, start=False) == "\non the train"
    assert len(forced) < len(spm.encode("\non the train", add_bos=False)), "alone it would get a space in front"


def test_a_token_across_the_seam_counts_whole(bpe: Tokenizer) -> None:
    prompt, forced = split(bpe, "do the", 4)  # " the" is a token, "do t" ends inside it
    assert (text_of(bpe, prompt), text_of(bpe, forced)) == ("do", " the")


def test_a_reference_of_too_many_tokens(bpe: Tokenizer, words: str) -> None:
    with pytest.raises(ModelError, match=r"bpc: 40\d characters take 40\d tokens, over 256"):
        BitsPerCharacter((words,)).examples(bpe, 1024, 4096, 1, 0)


def test_bits_per_character_by_hand_from_logits(llama: Llama, words: str) -> None:
    task = BitsPerCharacter((words,))
    (example,) = task.examples(llama.tokenizer, 200, 400, 1, 0)
    outcome = attempt(llama, task, example)
    logits = llama.logits(example.prompt + example.forced).astype(np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    first = len(example.prompt) - 1
    bits = -sum(math.log2(p[first + i, token]) for i, token in enumerate(example.forced))
    assert outcome.score == pytest.approx(bits / len(example.references[0]), rel=1e-4)
    assert outcome.output == example.references[0]
    assert outcome.n_steps == len(example.forced) - 1


# -- question answering and summaries ----------------------------------------------------------------------------------


def question(
    n: int, title: str = "", context: str = "", answers: tuple[str, ...] = ("long answer", "short")
) -> Question:
    return Question(title or f"Title_{n}", context or f"Context {n}.", f"What is {n}?", answers, f"q{n}")


def test_question_answering(bpe: Tokenizer) -> None:
    questions = tuple(question(i, f"Title_{i // 2}", f"Context {i // 2}.") for i in range(40))
    examples = QA(questions).examples(bpe, 2048, 4096, 40, seed=0)
    assert {e.name for e in examples} == {q.id for q in questions}
    orders = set()
    for e in examples:
        i = int(e.name[1:])
        other = i ^ 1  # the one other question on this context
        lines = text_of(bpe, e.prompt).split("\n")
        assert lines[8:] == [
            f"From what you've just read about Title {i // 2}, please answer the following questions.",
            f"Question: What is {other}?", "Answer: short", f"Question: What is {i}?", "Answer:",
        ]  # fmt: skip
        found = [re.fullmatch(r"Title: Title (\d+)\. Background: Context \1\.", line) for line in lines[:8]]
        titles = [int(match[1]) for match in found if match]
        assert len(set(titles)) == 8, "all different"
        assert i // 2 in titles
        orders.add(titles.index(i // 2))
        assert text_of(bpe, e.question) == "\n".join(lines[8:])
        assert e.references == ("long answer", "short")
        assert e.n_gen == len(bpe.encode(" long answer")) + 5
    assert len(orders) > 3, "the paragraph that is asked about stands anywhere"


def test_distractors_are_of_other_articles_and_as_many_as_there_are(bpe: Tokenizer) -> None:
    same = [question(i, "One", f"Context {i}.") for i in range(5)]
    examples = QA((*same, question(5, "Two"), question(6, "Three"))).examples(bpe, 2048, 4096, 7, 0)
    for e in examples:
        titles = re.findall(r"^Title: (\w+)\.", text_of(bpe, e.prompt), re.MULTILINE)
        assert titles.count("One") <= 1 or int(e.name[1:]) > 4
        if int(e.name[1:]) < 5:
            assert sorted(titles) == ["One", "Three", "Two"]


@pytest.mark.parametrize(("length", "expected"), [(1024, 4), (2048, 8), (4096, 16), (100, 1)])
def test_eight_paragraphs_for_2048_tokens_and_in_proportion(bpe: Tokenizer, length: int, expected: int) -> None:
    examples = QA(tuple(question(i) for i in range(40))).examples(bpe, length, 1 << 20, 3, 0)
    assert [text_of(bpe, e.prompt).count("Background:") for e in examples] == 3 * [expected]


def test_fewer_paragraphs_where_they_do_not_fit(bpe: Tokenizer) -> None:
    long = tuple(question(i, context=f"{i} " + 500 * "x") for i in range(40))
    (example,) = QA(long).examples(bpe, 2048, 4096, 1, 0)
    assert text_of(bpe, example.prompt).count("Background:") == 3
    assert len(example.prompt) <= 2048


def test_an_answered_question_on_another_paragraph_where_there_is_but_one(bpe: Tokenizer) -> None:
    (example,) = QA((question(0), question(1))).examples(bpe, 2048, 4096, 1, 0)
    other = 1 - int(example.name[1:])
    assert f"Question: What is {other}?\nAnswer: short\n" in text_of(bpe, example.prompt)
    (alone,) = QA((question(0),)).examples(bpe, 2048, 4096, 1, 0)
    assert text_of(bpe, alone.prompt).count("Question:") == 1


def test_answers_have_at_most_30_tokens(bpe: Tokenizer) -> None:
    (example,) = QA((question(0, answers=("z" * 50,)),)).examples(bpe, 2048, 4096, 1, 0)
    assert example.n_gen == 30
    assert QA(()).score(example, " " + "z" * 50, 0.0) == 100.0
    assert QA(()).score(example, " " + "z" * 30, 0.0) == 0.0


def test_a_question_is_the_same_however_many_are_asked(bpe: Tokenizer) -> None:
    task = QA(tuple(question(i) for i in range(40)))
    more = task.examples(bpe, 2048, 4096, 9, 0)
    assert task.examples(bpe, 2048, 4096, 4, 0) == more[:4]
    assert task.examples(bpe, 2048, 4096, 4, 1) != more[:4]


def test_articles_have_4000_to_8000_characters(bpe: Tokenizer) -> None:
    articles = tuple(Article(n * " the", "Two words.") for n in (999, 1000, 2000, 2001))  # a token each
    examples = Summary(articles).examples(bpe, 2048, 4096, 9, 0)
    assert sorted(e.name for e in examples) == ["1", "2"]


def test_summaries_fit_the_length(bpe: Tokenizer) -> None:
    articles = tuple(Article(n * "x", "Two words.") for n in (999, 1000, 1400, 2001))
    examples = Summary(articles, shortest=2000).examples(bpe, 1024, 4096, 9, 0)
    assert sorted(len(e.prompt) for e in examples) == [1000 + len("Article: \nSummary:")]
    (example,) = examples
    assert text_of(bpe, example.prompt) == f"Article: {1000 * 'x'}\nSummary:"
    assert text_of(bpe, example.question) == "\nSummary:"
    assert example.n_gen == len(bpe.encode("Two words."))
    assert Summary(()).score(example, " two, WORDS and no more", 0.0) == pytest.approx(100 * 4 / 7)


def test_summaries_have_at_most_128_tokens(bpe: Tokenizer) -> None:
    (example,) = Summary((Article("x", "z" * 500),), shortest=0).examples(bpe, 1024, 4096, 1, 0)
    assert example.n_gen == 128
