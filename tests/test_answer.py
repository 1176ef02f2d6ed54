"""Answers: whole characters, stop strings across pieces, why they end, and what an interrupt leaves behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from minirt import Llama, ModelError, Sampling, UsageError
from minirt.answer import Answer
from minirt.gguf_file import GGUFFile
from minirt.sampling import Sampler
from minirt.session import Session, Timings
from minirt.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0)


class Script:
    """A session that says what it is told to, in a context without end."""

    n_ctx = 10_000
    timings = Timings()

    def __init__(self, tokens: Sequence[int]):
        self.script, self.tokens = tokens, []  # type: ignore[var-annotated]

    def feed(self, tokens: Sequence[int], progress: object) -> None:
        self.tokens = list(tokens)

    def generate(self, logits: object, sampler: object, max_tokens: int) -> Iterator[int]:
        yield from self.script[:max_tokens]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    with GGUFFile.open(tiny) as file:
        return Tokenizer.from_metadata(file.metadata, "tiny")


def answer(
    tokenizer: Tokenizer, tokens: Sequence[int], max_tokens: int | None = None, stop: Sequence[str] = ()
) -> Answer:
    return Answer(Script(tokens), tokenizer, [5], GREEDY, max_tokens, stop)  # type: ignore[arg-type]


def test_a_stop_string_across_pieces_ends_the_answer_before_it(tokenizer: Tokenizer) -> None:
    a = answer(tokenizer, tokenizer.encode("one STOP two"), stop=["STOP"])
    assert "".join(a) == a.text == "one "
    assert a.finish_reason == "stop"


def test_what_may_begin_a_stop_string_waits_and_comes_out_if_it_does_not(tokenizer: Tokenizer) -> None:
    pieces = list(answer(tokenizer, tokenizer.encode("STOCK STO"), stop=["STOP"]))
    assert "".join(pieces) == "STOCK STO"
    assert "STOC" in pieces


def test_the_first_of_several_stop_strings_counts(tokenizer: Tokenizer) -> None:
    assert answer(tokenizer, tokenizer.encode("a\n\nb###"), stop=["###", "\n\n"]).finish().text == "a"
    assert answer(tokenizer, tokenizer.encode("aab"), stop=["aab", "ab"]).finish().text == ""


def test_pieces_are_whole_characters(tokenizer: Tokenizer) -> None:
    text = "é 漢 🙂"
    pieces = list(answer(tokenizer, tokenizer.encode(text)))
    assert "".join(pieces) == text
    assert "🙂" in pieces


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("ok 🙂")
    assert answer(tokenizer, tokens, max_tokens=len(tokens) - 1).finish().text == "ok \N{REPLACEMENT CHARACTER}"


def test_finish_reasons(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("abcd")
    end = next(iter(tokenizer.eog_ids))
    ended = answer(tokenizer, [*tokens, end, *tokens]).finish()
    assert (ended.text, ended.finish_reason, ended.tokens) == ("abcd", "stop", tokens)
    cut = answer(tokenizer, tokens, max_tokens=2).finish()
    assert (cut.text, cut.finish_reason, len(cut.tokens)) == ("ab", "length", 2)
    half = answer(tokenizer, tokens)
    assert next(half) == half.text == "a"
    assert half.finish_reason is None


@pytest.mark.parametrize(("max_tokens", "stop"), [(0, ()), (-5, ()), (1, ("",))])
def test_wrong_arguments(tokenizer: Tokenizer, max_tokens: int, stop: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        answer(tokenizer, [5], max_tokens, stop)


# -- on a model --------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tiny: Path) -> Iterator[Llama]:
    with Llama.load(tiny, device="reference", kv="f32") as model:
        yield model


def endless(llama: Llama) -> None:
    """Takes the end from the model: its end-of-generation tokens become as unlikely as can be."""
    step = llama.session.step

    def without_end(token: int) -> np.ndarray:
        logits = step(token)
        logits[list(llama.tokenizer.eog_ids)] = -np.inf
        return logits

    llama.session.step = without_end  # type: ignore[method-assign]
    llama.session.follow = lambda token, sampler, recent: sampler(without_end(token), recent)  # type: ignore[method-assign]


def test_a_full_context_ends_the_answer_and_says_so(llama: Llama) -> None:
    endless(llama)
    prompt = llama.tokenize("x" * 250)
    a = llama.stream(prompt, sampling=GREEDY).finish()
    assert a.finish_reason == "context"
    assert len(llama.session.tokens) == llama.n_ctx == 256
    assert len(a.tokens) == 7  # the last one has no place any more, but is known


def test_a_prompt_of_exactly_the_context_still_gives_one_token(llama: Llama) -> None:
    a = llama.generate(llama.tokenize("x" * 256), sampling=GREEDY)
    assert len(a.tokens) <= 1
    with pytest.raises(ModelError, match=r"257 tokens.* 256"):
        llama.generate(llama.tokenize("x" * 257))
    with pytest.raises(ModelError, match="empty"):
        llama.generate("")


def test_same_seed_same_text(llama: Llama) -> None:
    def say(seed: int) -> str:
        return llama.generate("hello", max_tokens=40, sampling=Sampling(temperature=2.0, seed=seed)).text

    assert say(3) == say(3) != say(4)


def test_a_longer_text_computes_only_what_is_new(llama: Llama) -> None:
    endless(llama)
    first = llama.generate("hello", max_tokens=8, sampling=GREEDY)
    prompt = llama.tokenize("hello")
    assert first.timings.prompt_tokens == len(prompt)
    assert first.timings.tokens == 7
    again = [*prompt, *first.tokens, *llama.tokenize(" and")]
    assert llama.generate(again, max_tokens=1).timings.prompt_tokens == len(again) - len(prompt) - 7


class Nines(Sampler):
    def __call__(self, *_: object) -> int:
        return 9


@pytest.mark.parametrize("op", ["angles", "append", "attend", "feed_forward", "qkv"])
@pytest.mark.parametrize("calls", [1, 2, 5, 8])
def test_an_interrupt_anywhere_leaves_a_session_that_goes_on_correctly(llama: Llama, op: str, calls: int) -> None:
    prompt = llama.tokenize("the interrupted one")
    exact = llama.logits([*prompt, 9, 10])[-1]
    logits = llama.session.feed(prompt)
    interrupt_at(llama, op, calls)
    with pytest.raises(KeyboardInterrupt):
        for _ in llama.session.generate(logits, Nines(Sampling()), 20):
            pass
    stand = len(llama.session.tokens)
    assert llama.session.tokens == [*prompt, *[9] * (stand - len(prompt))]
    np.testing.assert_allclose(llama.session.feed([*prompt, 9, 10]), exact, atol=1e-5)


def test_an_interrupted_prompt_can_be_fed_again(llama: Llama) -> None:
    prompt = llama.tokenize("the interrupted one")
    exact = llama.logits(prompt)[-1]
    interrupt_at(llama, "feed_forward", 2)
    with pytest.raises(KeyboardInterrupt):
        llama.session.feed(prompt)
    np.testing.assert_allclose(llama.session.feed(prompt), exact, atol=1e-5)


def test_an_interrupted_answer_keeps_what_it_said(llama: Llama) -> None:
    endless(llama)
    whole = llama.generate("hello", max_tokens=12, sampling=GREEDY)
    llama.session.reset()
    a = llama.stream("hello", max_tokens=12, sampling=GREEDY)
    interrupt_at(llama, "feed_forward", 9)
    with pytest.raises(KeyboardInterrupt):
        a.finish()
    assert a.finish_reason is None
    assert 0 < len(a.tokens) < 12
    assert a.tokens == whole.tokens[: len(a.tokens)]
    assert whole.text.startswith(a.text)


def interrupt_at(llama: Llama, op: str, calls: int) -> None:
    """Ctrl-C in the middle of the n-th call of an op from now on; then never again."""
    ops, method, left = llama.decoder.ops, getattr(llama.decoder.ops, op), [calls]

    def interrupted(*args: object) -> object:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return method(*args)

    setattr(ops, op, interrupted)


def test_timings_are_of_the_last_answer(llama: Llama) -> None:
    llama.generate("hello", max_tokens=3)
    assert llama.generate("x", max_tokens=1).timings.tokens == 0
    assert isinstance(llama.session, Session)
    assert set(dataclasses.asdict(llama.session.timings)) >= {"prompt_tokens", "tokens", "bytes_read"}
