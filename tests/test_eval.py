"""minirt eval: every score and every rule of construction by hand, resuming, pairing, and the command itself."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Cli, only_line, quiet_env

from minirt import Llama, ModelError, UsageError
from minirt.eval import (
    NO_CONTEXT,
    Example,
    File,
    Results,
    Setup,
    attempt,
    expand,
    fitted,
    make_tasks,
    record,
    run,
    summarise,
)
from minirt.eval import plot as plotting
from minirt.eval.documents import QA, Article, Question, Summary
from minirt.eval.example import context_characters, cut, encode, fitting, scaled
from minirt.eval.porter import stem
from minirt.eval.results import fingerprint
from minirt.eval.runner import mean_and_error, surprise
from minirt.eval.scoring import matched_characters, normalise, prefix_match, rouge_l
from minirt.eval.sources import read_articles, read_squad
from minirt.eval.texts import (
    BitsPerCharacter,
    Needle,
    Repetition,
    halving,
    haystack_lengths,
    passages,
    pieces,
    split,
)  # fmt: skip
from minirt.tokenizer import Tokenizer

ROWS = {
    "score": 1.0,
    "n_prompt": 10,
    "n_steps": 4,
    "bytes_read": 40,
    "dense_bytes": 80,
    "bytes_held": 7,
    "seconds": 0.5,
}


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


@pytest.fixture
def words() -> str:
    """Words of four characters and a space, each one different: 5 characters a word."""
    return " ".join(f"{i:04x}" for i in range(6000))


def text_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens)


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" The Harbour.\n", "harbour"),
        ('"the" end', 'the" end'),
        ("_.,an apple_", "apple"),
        ("a the b", "the b"),  # one article only
        ("another", "another"),
        (" ,. ", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("output", "answers", "expected"),
    [
        (" The harbour, of course\nQuestion:", ["a harbour"], True),
        (" in the harbour", ["harbour"], False),  # not at the start
        (" 1978", ["19"], False),  # the authors' rule takes it
        (" 19", ["19"], True),
        (" 19, or so", ["19"], True),
        (" Ada Lovelace's", ["Ada Lovelace"], True),
        (" Ada Lovelaces", ["Ada Lovelace"], False),
        (" Adam", ["Eve", "ADAM"], True),
        ("anything", ["the", ". "], False),  # nothing is left of the second; "the" alone is no article
        ("", ["x"], False),
    ],
)
def test_prefix_match(output: str, answers: list[str], expected: bool) -> None:
    assert prefix_match(output, answers) is expected


@pytest.mark.parametrize(
    ("output", "reference", "expected"),
    [
        (" to be or not", " to be, or", 5),
        ("\n to be", " to be or not to be", 5),  # ends early: what is there counts, no more
        ("", " to be", 0),
        (" to be or not to be", " to be", 5),  # no more than the reference
        ("x", "y", 0),
    ],
)
def test_matched_characters(output: str, reference: str, expected: int) -> None:
    assert matched_characters(output, reference) == expected


def test_rouge_l_by_hand() -> None:
    # the cat sat on mat / the cat lay on the mat: common "the cat on mat" = 4, of 5 and of 6 words
    assert rouge_l("The cat sat on (mat)!", "the cat lay on the mat") == pytest.approx(2 * 4 / (5 + 6))
    # order counts: of a b c / c b a only one word is common in sequence
    assert rouge_l("a b c", "c b a") == pytest.approx(2 / 6)
    assert rouge_l("same words", "Same, words") == 1.0
    assert rouge_l("", "words") == rouge_l("words", "") == rouge_l("...", "...") == 0.0


def test_rouge_l_stems_words_of_four_characters_and_more() -> None:
    assert rouge_l("connected", "connections") == 1.0
    assert rouge_l("ties", "tie") == 0.0  # four characters: "ti"; three are left alone
    assert rouge_l("bus", "bu") == 0.0


@pytest.mark.parametrize(
    ("word", "expected"),
    [  # the examples of Porter's paper, step by step
        ("caresses", "caress"), ("ponies", "poni"), ("caress", "caress"), ("cats", "cat"),
        ("feed", "feed"), ("agreed", "agre"), ("plastered", "plaster"), ("bled", "bled"), ("motoring", "motor"),
        ("sing", "sing"), ("conflated", "conflat"), ("troubled", "troubl"), ("sized", "size"), ("hopping", "hop"),
        ("tanned", "tan"), ("falling", "fall"), ("hissing", "hiss"), ("fizzed", "fizz"), ("failing", "fail"),
        ("filing", "file"), ("happy", "happi"), ("sky", "sky"),
        ("relational", "relat"), ("conditional", "condit"), ("rational", "ration"), ("digitizer", "digit"),
        ("vietnamization", "vietnam"), ("operator", "oper"), ("decisiveness", "decis"), ("sensibiliti", "sensibl"),
        ("triplicate", "triplic"), ("formative", "form"), ("electrical", "electr"), ("hopeful", "hope"),
        ("goodness", "good"), ("revival", "reviv"), ("allowance", "allow"), ("replacement", "replac"),
        ("adjustment", "adjust"), ("adoption", "adopt"), ("homologou", "homolog"), ("effective", "effect"),
        ("probate", "probat"), ("rate", "rate"), ("cease", "ceas"), ("controll", "control"), ("roll", "roll"),
        ("generalizations", "gener"), ("oscillators", "oscil"), ("1978", "1978"), ("be", "be"), ("eed", "eed"),
        ("ing", "ing"), ("eing", "e"),
    ],
)  # fmt: skip
def test_porter(word: str, expected: str) -> None:
    assert stem(word) == expected


def test_surprise_by_hand() -> None:
    # p = 1/8, 1/8, 6/8
    logits = np.log(np.array([1, 1, 6], np.float32)) + 100
    assert [surprise(logits, i) for i in range(3)] == pytest.approx([3.0, 3.0, math.log2(8 / 6)], abs=1e-4)


def test_mean_and_its_error() -> None:
    assert mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2) / math.sqrt(2)))
    assert mean_and_error([5.0]) == (5.0, 0.0)


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


# -- files -------------------------------------------------------------------------------------------------------------


def squad(*questions: dict[str, Any], title: str = "A_title") -> dict[str, Any]:
    return {"data": [{"title": title, "paragraphs": [{"context": "A context.", "qas": list(questions)}]}]}


def asked(number: int = 0, *answers: str, **more: Any) -> dict[str, Any]:
    return {"id": f"id{number}", "question": f"What {number}?", "answers": [{"text": a} for a in answers], **more}


def file(value: Any, name: str = "x.json") -> File:
    return File(name, value if isinstance(value, bytes) else json.dumps(value).encode())


def test_a_squad_file() -> None:
    found = read_squad(file(squad(asked(0, "one", "two", "one"), asked(1, is_impossible=True), asked(2, " "))))
    assert found == [Question("A_title", "A context.", "What 0?", ("one", "two"), "id0")]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"plain text", r"x.json: not JSON \(Expecting value: line 1 column 1 \(char 0\)\)"),
        (b'{"data": []}\n{"data": ', r"x.json: not JSON \(line 2\)"),
        (b"\xff{}", r"x.json: not UTF-8 text \(byte 0\)"),
        (b"[" * 100_000, r"x.json: JSON nested too deeply"),
        (b"", r"x.json: no question with an answer"),
        ([], r"x.json: data: no list"),
        ({"data": {}}, r"x.json: data: no list"),
        ({"data": [1]}, r"x.json: data\[0\].title: no text"),
        ({"data": [{"title": "T"}]}, r"x.json: data\[0\].paragraphs: no list"),
        (squad(asked(0), title=3), r"x.json: data\[0\].title: no text"),  # type: ignore[arg-type]
        (squad({"question": "Q"}), r"x.json: data\[0\].paragraphs\[0\].qas\[0\].answers: no list"),
        (squad({"answers": []}), r"x.json: data\[0\].paragraphs\[0\].qas\[0\].question: no text"),
        (squad(asked(0)), r"x.json: no question with an answer"),
    ],
)
def test_not_a_squad_file(value: Any, expected: str) -> None:
    with pytest.raises(ModelError, match=f"^{expected}$"):
        read_squad(file(value))


ARTICLE = {"article": "Text.", "summary": "Sum."}


@pytest.mark.parametrize(
    "value",
    [[ARTICLE, ARTICLE], b'{"article": "Text.", "highlights": "Sum."}\n\n{"article": "Text.", "summary": "Sum."}\n'],
)
def test_articles(value: Any) -> None:
    assert read_articles(file(value)) == 2 * [Article("Text.", "Sum.")]
    assert read_articles(file(ARTICLE)) == [Article("Text.", "Sum.")]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([ARTICLE, {"article": "Text."}], r"x.json: \[1\].summary: no text"),
        ([{"summary": "Sum."}], r"x.json: \[0\].article: no text"),
        (["Text."], r"x.json: \[0\].summary: no text"),
        ([], r"x.json: no article"),
        (b"Text.", r"x.json: not JSON .*"),
    ],
)
def test_not_articles(value: Any, expected: str) -> None:
    with pytest.raises(ModelError, match=f"^{expected}$"):
        read_articles(file(value))


def test_a_file_goes_to_the_tasks_that_read_its_kind() -> None:
    names = ["bpc", "qa", "summary", "repetition"]
    files = [file(b"some text", "a.txt"), file(squad(asked(0, "x"))), file([ARTICLE], "b.JSON"), file(b"more", "c")]
    bits, qa, summary, repetition = make_tasks(names, files)
    assert [task.name for task in (bits, qa, summary, repetition)] == names
    assert isinstance(bits, BitsPerCharacter)
    assert isinstance(qa, QA)
    assert isinstance(summary, Summary)
    assert bits.texts == ("some text", "more")
    assert [q.id for q in qa.questions] == ["id0"]
    assert summary.articles == (Article("Text.", "Sum."),)
    assert summary.shortest == 4000
    (text,) = make_tasks(["repetition"], [file([1], "x.json")])
    assert text == Repetition(("[1]",)), "the one kind there is"


def test_what_no_task_reads() -> None:
    with pytest.raises(ModelError, match=r"a\.txt: plain text, which none of these tasks reads: qa, summary"):
        make_tasks(["qa", "summary"], [file(b"some text", "a.txt")])
    with pytest.raises(ModelError, match=r"x\.json: articles, which none of these tasks reads: qa, bpc"):
        make_tasks(["qa", "bpc"], [file([ARTICLE])])
    with pytest.raises(UsageError, match=r"unknown task 'squad' \(one of: repetition, needle, qa, summary, bpc\)"):
        make_tasks(["squad"])


def test_data_of_its_own(smollm2: Path) -> None:
    """It is there, in its format, large enough for 4096 tokens, and answers stand in their paragraphs."""
    tasks = make_tasks(["repetition", "needle", "qa", "summary", "bpc"])
    setup = Setup.of(smollm2, "f16", tasks, 8, 0, 4096, None)
    assert {name: len(examples) for name, examples in setup.examples.items()} == dict.fromkeys(setup.examples, 8)
    assert max(len(e.prompt) for e in setup.examples["needle"]) > 3968
    assert min(len(e.prompt) for e in setup.examples["repetition"]) > 3300
    qa, summary = tasks[2:4]
    assert isinstance(qa, QA)
    assert isinstance(summary, Summary)
    assert len({q.context for q in qa.questions}) == 20
    assert len(qa.questions) == 40
    assert all(answer in q.context for q in qa.questions for answer in q.answers)
    assert all(80 <= len(q.context.split()) <= 150 for q in qa.questions)
    assert len(summary.articles) == 8


def test_sizes_of_the_paper_at_2048_tokens(smollm2: Path) -> None:
    setup = Setup.of(smollm2, "f16", make_tasks(["repetition", "bpc", "qa"]), 8, 0, None, None)
    assert (setup.length, setup.n_ctx) == (2048, 2304)
    with Llama.load(smollm2, n_ctx=8) as llama:
        for e in setup.examples["repetition"]:
            context = llama.detokenize(e.prompt).removesuffix(llama.detokenize(e.question))
            assert 6000 <= len(context) < 6030
        for e in setup.examples["bpc"]:
            assert 6000 <= len(llama.detokenize(e.prompt)) < 6030
        for e in setup.examples["qa"]:
            assert llama.detokenize(e.prompt).count("Background:") == 8


# -- running -----------------------------------------------------------------------------------------------------------


class Steps:
    """A session that answers from a script, and notes what it is told."""

    def __init__(self, session: Any, answers: list[int]):
        self.session, self.answers, self.told = session, iter(answers), []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def _logits(self) -> np.ndarray:
        logits = np.zeros(268, np.float32)
        logits[next(self.answers)] = 1.0
        return logits

    def feed(self, tokens: Sequence[int], progress: Any = None) -> np.ndarray:
        self.told.append(tuple(tokens))
        return self._logits()

    def step(self, token: int) -> np.ndarray:
        self.told.append(token)
        return self._logits()


def test_greedy_decoding_goes_on_after_the_end_of_the_text(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = llama.tokenize("a")[0], llama.tokenize("b")[0]
    end = llama.tokenizer.eos_id
    assert end is not None
    steps = Steps(llama.session, [a, end, b])
    monkeypatch.setattr(llama, "session", steps)
    example = Example("0", (5, 6, 7, 8), (8,), ("abc",), 3)
    outcome = attempt(llama, Repetition(("",)), example)
    assert steps.told == [(5, 6, 7, 8), a, end], "the last token is not computed"
    assert (outcome.output, outcome.score) == ("ab", 2)
    # 2 layers, 2 KV heads of 16 in f16, K and V: 256 bytes a token; the steps read 5 and 6 tokens
    assert (outcome.n_prompt, outcome.n_steps) == (4, 2)
    assert outcome.bytes_read == outcome.dense_bytes == 11 * 256
    assert outcome.bytes_held == 4096 * 256


def test_without_context_the_question_alone_is_asked(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(llama.session, [9])
    monkeypatch.setattr(llama, "session", steps)
    outcome = attempt(llama, Repetition(("",)), Example("0", (5, 6, 7, 8), (8,), ("abc",), 1), context=False)
    assert steps.told == [(8,)]
    assert (outcome.n_prompt, outcome.n_steps, outcome.bytes_read) == (1, 0, 0)


def test_a_bounded_policy_reads_less_than_dense(tiny: Path, words: str) -> None:
    (example,) = BitsPerCharacter((words,)).examples(Llama.load(tiny).tokenizer, 160, 300, 1, 0)
    with Llama.load(tiny, device="reference", n_ctx=300) as llama:
        dense = attempt(llama, BitsPerCharacter(()), example)
        llama.set_policy("window:budget=32")
        window = attempt(llama, BitsPerCharacter(()), example)
        llama.set_policy("window:budget=300")
        full = attempt(llama, BitsPerCharacter(()), example)
    assert window.bytes_read == 256 * 32 * window.n_steps
    assert window.dense_bytes == dense.bytes_read == dense.dense_bytes
    assert window.bytes_held < dense.bytes_held
    assert window.score != pytest.approx(dense.score, rel=1e-3)
    assert full.score == pytest.approx(dense.score, rel=1e-4)


def row(example: str, score: float, **more: Any) -> dict[str, Any]:
    key = {"model": "m", "fingerprint": "f", "kv": "f16", "n_ctx": 64, "policy": "dense", "task": "qa", "length": 32}
    return {**key, "seed": 0, "example": example, "digest": "d", **ROWS, "score": score, **more}


def test_summaries_pair_examples() -> None:
    baseline = [row("a", 5.0), row("b", 1.0), row("c", 3.0)]
    rows = [row("b", 2.0), row("a", 8.0), row("d", 100.0), row("c", 9.0, digest="another")]
    s = summarise(rows, baseline)
    assert s["n_examples"] == 4
    assert s["n_paired"] == 2, "one is not in the baseline, one was made of another text"
    assert s["difference"] == pytest.approx((1.0 + 3.0) / 2)
    assert s["difference_error"] == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert s["score"] == pytest.approx((2 + 8 + 100 + 9) / 4)
    assert s["share_of_dense"] == 0.5
    assert s["kv_bytes_per_token"] == 10.0
    assert s["n_gen"] == 5.0
    alone = summarise([row("a", 1.0, n_steps=0, bytes_read=0, dense_bytes=0)])
    assert (alone["difference"], alone["share_of_dense"], alone["kv_bytes_per_token"]) == (None, None, None)


# -- results -----------------------------------------------------------------------------------------------------------


def test_results_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with Results(path) as results:
        results.add(row("a", 1.0))
        assert len(path.read_text().splitlines()) == 1, "written at once"
        results.add(row("b", 2.0))
    with Results(path) as results:
        key = {name: value for name, value in row("b", 0.0).items() if name not in ROWS}
        assert results.find(**key) == row("b", 2.0)
        assert results.find(**key | {"seed": 1}) is None
        assert results.find(**key | {"digest": "another text"}) is None
    assert Results(None).find(**key) is None


@pytest.mark.parametrize("cut_off", range(1, 12))
def test_a_line_that_a_kill_cut_is_dropped(tmp_path: Path, cut_off: int) -> None:
    path = tmp_path / "r.jsonl"
    whole = json.dumps(row("a", 1.0)).encode() + b"\n"
    last = json.dumps(row("b", 2.0)).encode() + b"\n"
    path.write_bytes(whole + last[: -cut_off * len(last) // 12])
    with Results(path) as results:
        assert len(results.rows) == 1
        results.add(row("c", 3.0))
    assert path.read_bytes() == whole + json.dumps(row("c", 3.0)).encode() + b"\n"


def test_a_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row("a", 1.0)))
    with Results(path) as results:
        results.add(row("b", 2.0))
    assert [json.loads(line)["example"] for line in path.read_text().splitlines()] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("My only copy of a novel", 1),
        ("My only copy of a novel\n", 1),
        ('{"other": 1}\n', 1),
        ("[]\n", 1),
        ('{"model": "m"}\n', 1),
        (
            json.dumps(row("a", 1.0)) + "\n" + json.dumps(row("b", 1.0))[:50] + "\n" + json.dumps(row("c", 1.0)) + "\n",
            2,
        ),
        (json.dumps(row("a", 1.0)) + "\n\n", 2),
        (json.dumps(row("a", 1.0) | {"score": "high"}) + "\n", 1),
        (json.dumps(row("a", 1.0, seed=[])) + "\n", 1),
        ("[" * 100_000 + "\n", 1),
    ],
)
def test_another_file_is_refused_and_left_alone(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(ModelError, match=f"r.jsonl: line {line} is no result of minirt eval"):
        Results(path)
    assert path.read_text() == text


def test_a_fingerprint_tells_files_of_one_size_apart(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    data = random.Random(0).randbytes(1 << 20)
    a.write_bytes(data)
    b.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert fingerprint(a) == fingerprint(a) != fingerprint(b)
    b.write_bytes(b"")
    assert len(fingerprint(b)) == 16


# -- the grid ----------------------------------------------------------------------------------------------------------


def test_a_grid_of_policies_and_budgets() -> None:
    assert expand(["h2o", "tova:budget=64", "sparq:r=16:k=64", "dense"], ["1/8", "512"]) == [
        "dense", "h2o:budget=1/8", "h2o:budget=512", "tova:budget=64", str(expand(["sparq:r=16:k=64"])[0]),
    ]  # fmt: skip
    assert expand(["h2o", "h2o", "dense"]) == ["dense", "h2o"]
    assert expand(["dense", "window"], flags=[("budget", "64")]) == ["dense", "window:budget=64"]
    with pytest.raises(UsageError, match="flags of a policy go with one --policy"):
        expand(["sparq", "window"], flags=[("budget", "64")])
    with pytest.raises(UsageError, match="--budget is not a parameter of --policy dense"):
        expand(["dense"], flags=[("budget", "64")])
    for wrong in ("zip", "h2o:budget=x", "h2o:rank=3"):
        with pytest.raises(UsageError):
            expand(["dense", wrong])
    with pytest.raises(UsageError):
        expand(["h2o"], ["half"])


def test_a_fraction_is_one_of_the_prompt() -> None:
    assert [str(fitted("h2o:budget=1/8:recent=4", n)) for n in (2048, 100, 10)] == [
        "h2o:budget=256:recent=4", "h2o:budget=12:recent=4", "h2o:budget=8:recent=4",
    ]  # fmt: skip
    assert [str(fitted(p, 100)) for p in ("h2o", "h2o:budget=64", "window:budget=1MiB", "sparq:r=8", "dense")] == [
        "h2o", "h2o:budget=64", "window:budget=1MiB", "sparq:r=8", "dense",
    ]  # fmt: skip
    assert str(fitted(NO_CONTEXT, 100)) == "dense"


def test_length_and_context(tiny: Path) -> None:
    def sizes(length: int | None, n_ctx: int | None) -> tuple[int, int]:
        setup = Setup.of(tiny, "f16", [], 1, 0, length, n_ctx)
        return setup.length, setup.n_ctx

    assert sizes(None, None) == (128, 256), "a model of 256 tokens"
    assert sizes(None, 4096) == (2048, 4096)
    assert sizes(None, 1024) == (768, 1024)
    assert sizes(200, None) == (200, 256)
    assert sizes(200, 300) == (200, 300)
    with pytest.raises(UsageError, match="--length 256 does not fit the context of 256 tokens"):
        sizes(256, None)
    with pytest.raises(UsageError, match="--length 300 does not fit the context of 300 tokens"):
        sizes(300, 300)


def test_a_policy_that_does_not_fit(tiny: Path, words: str) -> None:
    setup = Setup.of(tiny, "f16", [BitsPerCharacter((words,))], 1, 0, 100, None)
    setup.check(["dense", "window:budget=1/8", "streaming:budget=1/2"])
    with pytest.raises(UsageError, match="--sinks 40 is out of range"):
        setup.check(["dense", "streaming:sinks=40:budget=1/8"])  # of 40 slots in 256, of 12 for the prompt
    with pytest.raises(UsageError, match="f12"):
        Setup.of(tiny, "f12", [BitsPerCharacter((words,))], 1, 0, 100, None).check(["dense"])


def test_what_is_known_is_not_run_again(tiny: Path, words: str) -> None:
    task = BitsPerCharacter((words,))
    setup = Setup.of(tiny, "f16", [task], 3, 0, 100, None)
    results = Results(None)
    with Llama.load(tiny, device="reference", n_ctx=setup.n_ctx) as llama:
        begun = run(llama, setup, task, "dense", results)
        first = next(begun)
        assert [e.name for e in setup.missing("bpc", "dense", results)] == [e.name for e in setup.examples["bpc"][1:]]
        assert len(setup.rows("bpc", "dense", results)) == 1
        begun.close()  # interrupted
        assert first not in list(run(llama, setup, task, "dense", results))
        assert list(run(llama, setup, task, "dense", results)) == []
        assert record(llama, setup, task, "window", results) is None
        assert len(list(run(llama, setup, task, "window:budget=16", results))) == 3
        found = record(llama, setup, task, "window:budget=16", results)
        assert found is not None
        assert found["n_paired"] == 3
        assert found["difference"] == pytest.approx(
            found["score"] - record(llama, setup, task, "dense", results)["score"]  # type: ignore[index]
        )
        assert len(list(run(llama, setup, task, NO_CONTEXT, results))) == 3
        assert llama.decoder.policy.name == "dense"
        assert setup.rows("bpc", NO_CONTEXT, results)[0]["n_prompt"] == 1


# -- the command -------------------------------------------------------------------------------------------------------


def line(stderr: str) -> str:
    """The one line on stderr, without those of progress, which a slow machine has too."""
    return only_line("\n".join(line for line in stderr.splitlines() if not line.endswith(" ...")))


SMALL = ["--length", 160, "--ctx", 1400, "--device", "reference", "-n", 2]


@pytest.fixture
def small(tmp_path: Path, words: str) -> list[Path]:
    """Files for every task, small enough for a model that takes a token a letter."""
    paths = [tmp_path / "text.txt", tmp_path / "squad.json", tmp_path / "articles.jsonl"]
    paths[0].write_text(words)
    paths[1].write_text(json.dumps(squad(*(asked(i, "context") for i in range(4)))))
    paths[2].write_text(3 * (json.dumps({"article": " the" * 100, "highlights": "The one."}) + "\n"))
    return paths


def files(paths: list[Path]) -> list[object]:
    return [part for path in paths for part in ("-f", path)]


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_every_task_and_policy(cli: Cli, tiny: Path, small: list[Path], tmp_path: Path) -> None:
    save = tmp_path / "r.jsonl"
    grid = ["--policy", "window,dense", "--policy", "sparq:r=8:k=32", "--budgets", "1/4,64", "--no-context"]
    args = ["eval", tiny, *SMALL, *files(small), *grid, "--save", save]
    result = cli(*args)
    assert result.exit_code == 0, result.output
    assert line(result.stderr) == ("minirt: --ctx 1400 is more than the 256 tokens the model was trained for")
    head, _, *rows = table(result.stdout)
    assert head == ["task", "metric", "policy", "n", "S", "score", "vs dense", "KV read", "KV held"]
    policies = ["dense", "window:budget=1/4", "window:budget=64", *expand(["sparq:r=8:k=32"]), "no context"]
    names = ["repetition", "needle", "qa", "summary", "bpc"]
    assert [r[0] for r in rows] == [name for name in names for _ in policies]
    assert [r[2] for r in rows] == policies * len(names)
    assert {r[3] for r in rows} == {"2"}
    for r in rows:
        assert (r[6] == "") == (r[2] == "dense")
        share = float(r[7].rstrip(" %") or 0)
        assert share == 100 if r[2] == "dense" else share == 0 if r[2] == "no context" else 0 < share <= 100
        assert share < 100 or r[2] in ("dense", "window:budget=1/4")
    again = cli(*args)
    assert again.stdout == result.stdout, "every result was there"
    saved = save.read_text().splitlines()
    assert len(saved) == 2 * len(rows)
    more = cli(*args, "-n", 3)
    assert more.exit_code == 0
    assert save.read_text().splitlines()[: len(saved)] == saved
    assert len(save.read_text().splitlines()) == len(saved) + len(policies) * len(names)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_records(cli: Cli, tiny: Path, small: list[Path], kind: str) -> None:
    grid = ["--task", "bpc,qa", "--policy", "dense,window:budget=64"]
    result = cli("eval", tiny, *SMALL, *files(small[:2]), *grid, "-o", kind)
    assert result.exit_code == 0, result.output
    records: list[dict[str, Any]]
    if kind == "csv":
        records = list(csv.DictReader(io.StringIO(result.stdout)))
    else:
        records = json.loads(result.stdout if kind == "json" else f"[{','.join(result.stdout.splitlines())}]")
    assert [(r["task"], r["policy"]) for r in records] == [
        (task, policy) for task in ("bpc", "qa") for policy in ("dense", "window:budget=64")
    ]
    for r in records:
        assert float(r["n_examples"]) == 2
        assert Path(r["model_filename"]) == tiny
        assert (r["type_k"], r["backends"], int(r["n_ctx"]), int(r["length"])) == ("f16", "reference", 1400, 160)
        assert float(r["share_of_dense"]) == pytest.approx(1.0 if r["policy"] == "dense" else 64 / 160, rel=0.75)


def test_tiny_without_flags_of_length(cli: Cli, tiny: Path, small: list[Path]) -> None:
    result = cli("eval", tiny, "--device", "reference", "--task", "repetition,bpc", *files(small[:1]), "-n", 1)
    assert result.exit_code == 0, result.output
    assert [r[0] for r in table(result.stdout)[2:]] == ["repetition", "bpc"]


@pytest.mark.parametrize(
    ("flags", "code", "expected"),
    [
        (["--task", "squad"], 2, "unknown task 'squad' (one of: repetition, needle, qa, summary, bpc)"),
        (["--task", ""], 2, "unknown task '' (one of: repetition, needle, qa, summary, bpc)"),
        (["--policy", "zip"], 2, "unknown policy 'zip'"),
        (["--policy", "window:budget=2"], 2, "--budget 2 is out of range"),
        (["--policy", "window:budget=300"], 2, "--budget 300 is out of range"),
        (["--policy", "sparq:r=999"], 2, "--r 999"),
        (["--policy", "h2o,tova", "--budget", "64"], 2, "flags of a policy go with one --policy"),
        (["--policy", "window", "--budgets", "much"], 2, "--budget much is not"),
        (["-n", "0"], 2, "0 is out of range (1 to 100000)"),
        (["--length", "10"], 2, "10 is out of range (64 to "),
        (["--length", "256"], 2, "--length 256 does not fit the context of 256 tokens"),
        (["--length", "5000", "--ctx", "4096"], 2, "--length 5000 does not fit the context of 4096 tokens"),
        (["--kv", "f12"], 2, "f12"),
        (["-f", "nothing.txt"], 1, "nothing.txt: cannot read: No such file or directory"),
        (["-f", ""], 2, "the name of a file is empty"),
        (["--task", "qa", "-f", "text.txt"], 1, "text.txt: not JSON ("),
        (["--task", "qa", "-f", "articles.jsonl"], 1, "articles.jsonl: data: no list"),
        (["--task", "qa,summary", "-f", "text.txt"], 1, "text.txt: plain text, which none of these tasks reads"),
        (["--task", "needle", "-f", "short.txt"], 1, "needle: the text has 5 tokens, too few for --length 128"),
        (["--task", "repetition", "-f", "short.txt"], 1, "repetition: the data has no example for this length"),
        (["--task", "bpc", "-f", "short.txt"], 1, "bpc: the data has no example for this length"),
        (["-f", "empty.txt"], 1, "repetition: the data has no example for this length"),
        (["--task", "bpc", "-f", "empty.txt"], 1, "bpc: the data has no example for this length"),
        (["--task", "qa"], 1, "qa: needs "),
        (["--save", "no/where.jsonl"], 1, "no/where.jsonl: cannot write: No such file or directory"),
        (["--save", "text.txt"], 1, "text.txt: line 1 is no result of minirt eval"),
        (["--save", "."], 1, ".: cannot write: Is a directory"),
        (["--plot", "no/where.png"], 1, "no/where.png: cannot write"),
        (["--plot", "."], 1, ".: cannot write"),
    ],
)
def test_bad_input_ends_in_a_line(
    cli: Cli, tiny: Path, small: list[Path], flags: list[str], code: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small[0].parent)
    monkeypatch.setattr(plotting, "check_matplotlib", lambda: None)
    monkeypatch.setattr(Llama, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    Path("short.txt").write_text("short")
    Path("empty.txt").write_text("")
    result = cli("eval", tiny, *flags, *([] if "--task" in flags else ["--task", "repetition"]))
    assert result.exit_code == code, result.output
    assert expected in line(result.stderr)
    assert result.stdout == ""


def test_a_model_that_is_none(cli: Cli, tmp_path: Path) -> None:
    result = cli("eval", tmp_path / "none.gguf")
    assert result.exit_code == 1
    assert "none.gguf" in line(result.stderr)


def test_no_matplotlib(cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = cli("eval", tiny, "--plot", tmp_path / "x.png")
    assert result.exit_code == 2
    assert line(result.stderr) == "minirt: --plot needs matplotlib: pip install 'minirt[plot]'"


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_a_figure(cli: Cli, tiny: Path, small: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    grid = ["--task", "bpc,qa", "--policy", "dense,window:budget=64,window:budget=128,sparq:r=8:k=32", "--no-context"]
    result = cli("eval", tiny, *SMALL, *files(small[:2]), *grid, "--plot", path)
    assert result.exit_code == 0, result.output
    png = path.read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    assert width > height > 400, "two panels"


def test_an_interrupted_run_keeps_what_is_done_and_goes_on(
    slow_tiny: list[str], small: list[Path], tmp_path: Path
) -> None:
    """Each token takes 50 ms, each example about 2 s."""
    save = tmp_path / "r.jsonl"
    flags = ["eval", "--task", "repetition", "-n", "4", *map(str, files(small[:1])), "--save", str(save), "-o", "jsonl"]
    command = [*slow_tiny, *flags, "--device", "reference"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=quiet_env())
    wait_for(lambda: process.poll() is not None or (save.exists() and b"\n" in save.read_bytes()))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"Traceback" not in err
    done = save.read_text().splitlines()
    assert 1 <= len(done) < 4
    assert json.loads(out)["n_examples"] == len(done)
    again = subprocess.run(command, capture_output=True, env=quiet_env(), timeout=120)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["n_examples"] == 4
    assert save.read_text().splitlines()[: len(done)] == done
    assert len(save.read_text().splitlines()) == 4


def wait_for(done: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_data_is_in_the_package() -> None:
    """What setuptools puts into a wheel."""
    folder = Path(plotting.__file__).parent / "data"
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".json", ".txt"))
    assert names == ["articles.json", "questions.json", "shakespeare.txt"]
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '"minirt.eval", "minirt.eval.data"' in project
    assert '"minirt.eval.data" = ["*.json", "*.txt"]' in project
