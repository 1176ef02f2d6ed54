"""Scores of an output against its references, by hand: prefix match, matched characters, ROUGE-L."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .porter import stem

_MARKS = " \t\n\v\f\r\"'_.,"
_ARTICLE = re.compile(r"(?:the|an|a) ")
_NO_WORD = re.compile(r"[^a-z0-9]+")
_STEMMED = 4  # characters from which on rouge-score stems a word


def normalise(text: str) -> str:
    """Lower case, without white space and " ' _ . , at both ends, without one article (the, a, an) at the start."""
    text = text.lower().lstrip(_MARKS)
    article = _ARTICLE.match(text)
    return text[article.end() if article else 0 :].rstrip(_MARKS)


def prefix_match(output: str, answers: Sequence[str]) -> bool:
    """True if the normalised output begins with a normalised answer and the word ends there.

    The authors of SparQ (arXiv 2312.04985) leave out the second condition, and so take "19" for a match of "1978".
    """
    said = normalise(output)
    for answer in map(normalise, answers):
        if answer and said.startswith(answer) and not said[len(answer) : len(answer) + 1].isalnum():
            return True
    return False


def matched_characters(output: str, reference: str) -> int:
    """How many characters of the reference the output repeats before it errs or ends; white space before both is cut.

    The authors of SparQ score an output that ends early as if it were all of the reference.
    """
    output, reference = output.lstrip(), reference.lstrip()
    n = min(len(output), len(reference))
    return next((i for i in range(n) if output[i] != reference[i]), n)


def rouge_l(output: str, reference: str) -> float:
    """ROUGE-L F1 (Lin 2004) of two texts, each taken as one sequence of words, 0 to 1.

    Words as in the package rouge-score with stemming: runs of a-z and 0-9 in lower case, those of four or more
    characters stemmed. It stems with NLTK's own variant of Porter's algorithm, so a few words may differ.
    """
    said, wanted = _words(output), _words(reference)
    common = _longest_common_subsequence(said, wanted)
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def _words(text: str) -> list[str]:
    words = _NO_WORD.sub(" ", text.lower()).split()
    return [stem(word) if len(word) >= _STEMMED else word for word in words]


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Its length."""
    row = [0] * (len(b) + 1)  # of the part of a so far and of each beginning of b
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
