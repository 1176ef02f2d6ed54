"""minirt eval: files of questions and articles that users bring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import asked, squad

from minirt import Llama, ModelError, UsageError
from minirt.eval import File, Setup, make_tasks
from minirt.eval.documents import QA, Article, Question, Summary
from minirt.eval.sources import read_articles, read_squad
from minirt.eval.texts import BitsPerCharacter, Repetition


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
