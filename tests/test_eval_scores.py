"""minirt eval: scores, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from minirt.eval.porter import stem
from minirt.eval.runner import mean_and_error, surprise
from minirt.eval.scoring import matched_characters, normalise, prefix_match, rouge_l


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
