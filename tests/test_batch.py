"""Several prompts together say what each says alone: lengths, ends and places in the batch do not matter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minirt.llama
from minirt import Answer, Llama, ModelError, Sampling, UsageError
from minirt.cache import SideArray, allocate_cache
from minirt.decoder import Decoder
from minirt.sampling import Sampler

GREEDY = Sampling(temperature=0)
PROMPTS = ["hello", "a", "the third of them is the longest of all", "x y z", "12345", "!"]


@pytest.fixture
def llama(tiny: Path) -> Iterator[Llama]:
    with Llama.load(tiny, device="reference", kv="f32") as model:
        yield model


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences of every decode step from now on."""
    seen: list[int] = []
    step = Decoder._step

    def counted(self: Decoder, cache: Any, tokens: Any) -> np.ndarray:
        assert len(cache.n_seen) == len(tokens)
        seen.append(len(tokens))
        return step(self, cache, tokens)

    monkeypatch.setattr(Decoder, "_step", counted)
    return seen


def alone(llama: Llama, prompts: list[str], **options: Any) -> list[Answer]:
    answers = []
    for prompt in prompts:
        llama.session.reset()
        answers.append(llama.generate(prompt, **options))
    return answers


def facts(answers: list[Answer]) -> list[tuple[str, list[int], str | None]]:
    return [(a.text, a.tokens, a.finish_reason) for a in answers]


def script(llama: Llama, ends: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer ends after ends[prompt] tokens; those of other prompts go on and on."""
    choose, eog = Sampler.__call__, sorted(llama.tokenizer.eog_ids)
    whole = {prompt: llama.tokenize(prompt) for prompt in ends}

    def scripted(self: Sampler, logits: np.ndarray, recent: Any = ()) -> int:
        for prompt, tokens in whole.items():
            if list(recent[: len(tokens)]) == tokens and len(recent) == len(tokens) + ends[prompt]:
                return eog[0]
        logits = logits.copy()
        logits[eog] = -np.inf
        return choose(self, logits, recent)

    monkeypatch.setattr(Sampler, "__call__", scripted)
    monkeypatch.setattr(Sampler, "is_greedy", False)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6, 100])
def test_a_batch_says_what_each_prompt_says_alone(llama: Llama, batch_size: int) -> None:
    expected = facts(alone(llama, PROMPTS, max_tokens=12, sampling=GREEDY))
    together = llama.generate(PROMPTS, max_tokens=12, sampling=GREEDY, batch_size=batch_size)
    assert facts(together) == expected
    assert all(list(answer) == [] and answer.finish() is answer for answer in together)


@pytest.mark.parametrize("batch_size", [2, 3, 6])
def test_who_has_ended_is_not_computed_and_who_waits_takes_the_place(
    llama: Llama, batch_size: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = dict(zip(PROMPTS, [3, 9, 0, 5, 1, 7], strict=True))
    script(llama, ends, monkeypatch)
    expected = facts(alone(llama, PROMPTS, sampling=GREEDY))
    assert [(len(tokens), reason) for _, tokens, reason in expected] == [(n, "stop") for n in ends.values()]
    sizes.clear()
    answers = llama.generate(PROMPTS, sampling=GREEDY, batch_size=batch_size)
    assert facts(answers) == expected
    assert sum(sizes) == sum(a.timings.tokens for a in answers) == sum(ends.values())
    # Full while someone waits; then as many as are left.
    assert sizes == {2: [2] * 9 + [1] * 7, 3: [3] * 5 + [2] * 4 + [1] * 2, 6: [5, 4, 4, 3, 3, 2, 2, 1, 1]}[batch_size]


def test_the_ends_may_differ(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop string, the end of a turn, max_tokens and a full context, all in one batch."""
    script(llama, {"a": 4}, monkeypatch)
    prompts = ["hello", "a", "b", "x" * (llama.n_ctx - 5), "y" * llama.n_ctx]
    text = llama.generate("hello", max_tokens=20, sampling=GREEDY).text
    options: dict[str, Any] = {"max_tokens": 20, "sampling": GREEDY, "stop": text[5:8]}
    answers = llama.generate(prompts, batch_size=3, **options)
    assert facts(answers) == facts(alone(llama, prompts, **options))
    assert answers[0].text == text[: text.find(text[5:8])]
    assert [a.finish_reason for a in answers] == ["stop", "stop", "length", "context", "context"]
    assert [len(a.tokens) for a in answers[2:]] == [20, 6, 1]
    without_limit = llama.generate(prompts[3:], sampling=GREEDY)
    assert [a.finish_reason for a in without_limit] == ["context", "context"]


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.5, seed=3), Sampling(repeat_penalty=1.3, seed=1)])
def test_each_answer_has_the_seed_to_itself(llama: Llama, sampling: Sampling) -> None:
    together = llama.generate([*PROMPTS, PROMPTS[0]], max_tokens=10, sampling=sampling, batch_size=4)
    assert facts(together[:-1]) == facts(alone(llama, PROMPTS, max_tokens=10, sampling=sampling))
    assert together[-1].tokens == together[0].tokens
    fresh = llama.generate(["hello"] * 3, max_tokens=10, sampling=Sampling(temperature=2.0))
    assert len({a.text for a in fresh}) == 3


@pytest.mark.parametrize("kv", ["f16", "f32"])
def test_the_kernels_choose_the_most_likely_tokens_too(tiny: Path, kv: str) -> None:
    with Llama.load(tiny, device="cpu", kv=kv) as llama:
        answers = llama.generate(PROMPTS * 2, max_tokens=12, sampling=GREEDY, batch_size=9)
        for prompt, answer in zip(PROMPTS * 2, answers, strict=True):
            assert_most_likely(llama, prompt, answer)


def test_a_batch_of_a_real_model(smollm2: Path) -> None:
    with Llama.load(smollm2, n_ctx=128) as llama:
        prompts = [f"The capital of {name} is" for name in ("France", "Italy", "Spain", "Japan", "Germany")]
        answers = llama.generate(prompts, max_tokens=8, sampling=GREEDY, batch_size=4)
        for prompt, answer, city in zip(prompts, answers, ["Paris", "Rome", "Madrid", "Tokyo", "Berlin"], strict=True):
            assert city in answer.text
            assert_most_likely(llama, prompt, answer)


def assert_most_likely(llama: Llama, prompt: str, answer: Answer) -> None:
    """Each token's logit is the largest, up to rounding."""
    start = llama.tokenize(prompt)
    for row, token in zip(llama.logits(start + answer.tokens)[len(start) - 1 :], answer.tokens, strict=False):
        assert row[token] >= row.max() - 2e-3 * np.abs(row).max()


def test_what_is_one_prompt_and_what_are_several(llama: Llama) -> None:
    ids = llama.tokenize("hello")
    one = llama.generate("hello", max_tokens=3, sampling=GREEDY)
    for prompt in (ids, tuple(ids), np.array(ids), list(np.array(ids))):
        answer = llama.generate(prompt, max_tokens=3, sampling=GREEDY)
        assert isinstance(answer, Answer)
        assert answer.tokens == one.tokens
    for prompts in (["hello"], [ids], ("hello",), [np.array(ids)]):
        (answer,) = llama.generate(prompts, max_tokens=3, sampling=GREEDY)
        assert answer.tokens == one.tokens
    assert llama.generate([]) == llama.chat([]) == []


@pytest.mark.parametrize(
    ("prompts", "line"),
    [
        (["a", ""], r"prompts\[1\]: the prompt is empty"),
        ([[]], r"prompts\[0\]: the prompt is empty"),
        ([[1], [2], [1] * 257], r"prompts\[2\]: the prompt has 257 tokens, the context holds 256"),
        (["a", "b" * 100_000], r"prompts\[1\]: the prompt has 100000 bytes"),
        (["a", [5, 99999]], r"prompts\[1\]: token id 99999 is out of range"),
    ],
)
def test_an_error_names_the_prompt_and_nothing_is_computed(llama: Llama, prompts: list, line: str) -> None:
    del llama.decoder.policy  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match=line):
        llama.generate(prompts)


def test_impossible_arguments(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"batch_size": 0}, {"max_tokens": 0}, {"stop": ""}):
        with pytest.raises(UsageError):
            llama.generate(["a", "b"], **wrong)
    one = llama.session.cache.plan.nbytes(llama.config)
    monkeypatch.setattr(minirt.llama, "physical_memory", lambda: 3 * one)
    with pytest.raises(UsageError, match=r"a batch of 4 sequences of up to 256 tokens needs .* GiB of KV cache"):
        llama.generate(["a"] * 4)
    assert len(llama.generate(["a"] * 4, batch_size=3, max_tokens=2)) == 4
    assert len(llama.generate(["a"] * 4, max_tokens=2)) == 4  # short answers need little


def test_the_session_is_left_alone(llama: Llama) -> None:
    going_on = llama.stream("hello", max_tokens=6, sampling=GREEDY)
    next(going_on)
    before = list(llama.session.tokens)
    llama.generate(PROMPTS, max_tokens=4)
    assert llama.session.tokens == before
    text = going_on.finish().text
    assert text == alone(llama, ["hello"], max_tokens=6, sampling=GREEDY)[0].text


@pytest.mark.parametrize("op", ["embed", "append", "attend", "feed_forward", "attend_chunk"])
@pytest.mark.parametrize("calls", [1, 5, 11])
def test_an_interrupt_is_raised_and_harms_nothing(
    llama: Llama, op: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama.session.feed(llama.tokenize("before"))
    expected = facts(llama.generate(PROMPTS, max_tokens=12, sampling=GREEDY, batch_size=2))
    method, left = getattr(llama.decoder.ops, op), [calls]

    def interrupted(*args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return method(*args)

    with monkeypatch.context() as patch:
        patch.setattr(llama.decoder.ops, op, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llama.generate(PROMPTS, max_tokens=12, sampling=GREEDY, batch_size=2)
    assert llama.session.tokens == llama.tokenize("before")
    assert facts(llama.generate(PROMPTS, max_tokens=12, sampling=GREEDY, batch_size=2)) == expected


def test_the_costs_add_up(llama: Llama, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    script(llama, {}, monkeypatch)
    prompts = [p * 3 for p in PROMPTS]
    answers = llama.generate(prompts, max_tokens=5, batch_size=3)
    assert sizes == [3] * 8
    c, n = llama.config, [len(llama.tokenize(p)) for p in prompts]
    assert [a.timings.prompt_tokens for a in answers] == n
    assert [a.timings.tokens for a in answers] == [4] * 6
    row = 2 * c.head_dim * 4 * c.n_head_kv * c.n_layer
    weights = llama.session.weight_bytes
    for answer, length in zip(answers, n, strict=True):
        assert answer.timings.bytes_read == 4 * (weights // 3) + row * sum(range(length + 1, length + 5))
        assert answer.timings.seconds > 0 < answer.timings.prompt_seconds


def test_a_follower_keeps_the_common_beginning(llama: Llama) -> None:
    first, second = llama.generate([[5, 6, 7, 8], [5, 6, 7, 9]], max_tokens=3, batch_size=1)
    assert (first.timings.prompt_tokens, second.timings.prompt_tokens) == (4, 1)


def test_moving_a_sequence_takes_all_that_is_its_own(llama: Llama) -> None:
    plan = llama.session.cache.plan
    side = {"scores": (SideArray((1, 2), np.dtype(np.float64)),), "blocks": (SideArray((1, 3), np.dtype(float), 4),)}
    cache = allocate_cache(replace(plan, side=side), llama.config, llama.decoder.ops, n_sequences=3)
    cache.side["scores"][0][:] = np.arange(6.0).reshape(3, 1, 2)
    cache.side["blocks"][0][:] = np.arange(9.0).reshape(3, 1, 3)
    cache.pinned[:] = 1, 2, 3
    cache.n_seen[:] = 7, 9, 5
    for i, kv in enumerate(array for layer in cache.layers for array in layer):
        kv[:] = 100 * i + np.arange(3)[:, None, None, None]
    cache.move(2, 0)
    view = cache.part(0, 1)
    assert view.n_seen.tolist() == [5]
    assert view.side["scores"][0].tolist() == [[[4.0, 5.0]]]
    assert view.side["blocks"][0].tolist() == [[[6.0, 7.0, 2.0]]]  # 5 tokens are in two blocks of 4
    assert view.pinned.tolist() == [3]
    for i, kv in enumerate(array for layer in view.layers for array in layer):
        assert kv.shape[0] == 1
        assert (kv[0, :, :5] == 100 * i + 2).all()
        assert (kv[0, :, 5:] == 100 * i).all()  # never filled: not copied
    view.n_seen += 1
    assert cache.n_seen.tolist() == [6, 9, 5]


def test_conversations_together(smollm2: Path) -> None:
    with Llama.load(smollm2, n_ctx=256) as llama:
        questions = ["What is the capital of France?", "What is 2 + 2?", "Name a colour."]
        conversations = [[{"role": "user", "content": question}] for question in questions]
        answers = llama.chat(conversations, max_tokens=20, sampling=GREEDY)
        assert "Paris" in answers[0].text
        assert isinstance(llama.chat(conversations[0], max_tokens=1), Answer)
        assert llama.chat(conversations[:1], max_tokens=20, sampling=GREEDY)[0].text == answers[0].text
        with pytest.raises(ModelError, match=r"messages\[1\]: the prompt has \d+ tokens, the context holds 256"):
            llama.chat([conversations[0], [{"role": "user", "content": "again " * 300}]])
