"""The Porter stemmer: connected, connecting, connection -> connect.

M. F. Porter, "An algorithm for suffix stripping", Program 14 (1980), steps 1a to 5b. A stem's *measure* is how often a
vowel is followed by a consonant in it, runs counted once: tr-ee 0, tr-ou-bl-e 1, pr-i-v-a-t-e 2.
"""

from __future__ import annotations

import functools

# Of each step the first suffix that a word ends with decides, so longer ones stand before those they end with.
_STEP_2 = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "abli": "able", "alli": "al",
    "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate", "ator": "ate", "alism": "al",
    "iveness": "ive", "fulness": "ful", "ousness": "ous", "aliti": "al", "iviti": "ive", "biliti": "ble",
}  # fmt: skip
_STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
_STEP_4 = (
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate", "iti",
    "ous", "ive", "ize",
)  # fmt: skip


@functools.lru_cache(1 << 16)
def stem(word: str) -> str:
    """The stem of a lower-case word; one of one or two letters is its own."""
    if len(word) < 3:
        return word
    word = _plurals_and_participles(word)
    if word.endswith("y") and "v" in _shape(word[:-1]):
        word = word[:-1] + "i"
    for endings in (_STEP_2, _STEP_3):
        ending = next((e for e in endings if word.endswith(e)), None)
        if ending is not None and _measure(word[: -len(ending)]) > 0:
            word = word[: -len(ending)] + endings[ending]
    ending = next((e for e in _STEP_4 if word.endswith(e)), None)
    if ending is not None:
        rest = word[: -len(ending)]
        if _measure(rest) > 1 and (ending != "ion" or rest[-1] in "st"):
            word = rest
    if word.endswith("e"):
        measure = _measure(word[:-1])
        if measure > 1 or (measure == 1 and not _is_short(word[:-1])):
            word = word[:-1]
    return word[:-1] if word.endswith("ll") and _measure(word) > 1 else word


def _plurals_and_participles(word: str) -> str:
    """Steps 1a and 1b."""
    if word.endswith(("sses", "ies")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    rest = next((word[: -len(e)] for e in ("ed", "ing") if word.endswith(e)), None)
    if rest is None or "v" not in _shape(rest):
        return word
    if rest.endswith(("at", "bl", "iz")):
        return rest + "e"
    if rest[-1:] == rest[-2:-1] and _shape(rest)[-1] == "c":
        return rest if rest[-1] in "lsz" else rest[:-1]
    return rest + "e" if _measure(rest) == 1 and _is_short(rest) else rest


def _shape(word: str) -> str:
    """A "v" for each vowel and a "c" for each consonant; y is a vowel after a consonant."""
    shape = ""
    for letter in word:
        shape += "v" if letter in "aeiou" or (letter == "y" and shape[-1:] == "c") else "c"
    return shape


def _measure(word: str) -> int:
    return _shape(word).count("vc")


def _is_short(word: str) -> bool:
    """Ends consonant, vowel, consonant, and the last is not w, x or y: such words take an e (hop-ing, hope)."""
    return _shape(word)[-3:] == "cvc" and word[-1] not in "wxy"
