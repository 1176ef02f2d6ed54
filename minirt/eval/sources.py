"""What tasks are made of: files that a user names, or those that come with minirt.

A file's name says what it is: .json and .jsonl hold SQuAD questions or articles, any other name is plain text. Where
all the tasks asked for read the same kind, every file is taken for that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..errors import ModelError, UsageError
from ..tokenizer import Tokenizer
from .documents import QA, Article, Question, Summary
from .example import Example
from .texts import BitsPerCharacter, Needle, Repetition

DATA = Path(__file__).parent / "data"

_TEXT, _SQUAD, _ARTICLES = "plain text", "SQuAD questions", "articles"
_DEFAULT = {_TEXT: "shakespeare.txt", _SQUAD: "questions.json", _ARTICLES: "articles.json"}


class File(NamedTuple):
    name: str
    data: bytes


class Task(Protocol):
    name: str
    metric: str  # what the mean of the scores is, and its unit

    def examples(self, tokenizer: Tokenizer, length: int, n_ctx: int, n: int, seed: int) -> list[Example]:
        """The first n examples, or fewer, with prompts of about `length` tokens that n_ctx holds with what follows.

        A larger n goes on where a smaller one ends. Raises ModelError if there are none.
        """

    def score(self, example: Example, output: str, bits: float) -> float:
        """Of an output; bits: the sum of -log2 p of its tokens."""


def make_tasks(names: Sequence[str], files: Sequence[File] = ()) -> list[Task]:
    """The tasks of these names on the files, or on minirt's own data if none is of a task's kind.

    Raises UsageError for an unknown name, ModelError for a file that no task reads or that is not in its format.
    """
    for name in names:
        if name not in TASKS:
            raise UsageError(f"unknown task '{name}' (one of: {', '.join(TASKS)})")
    wanted = {TASKS[name].reads for name in names}
    kinds: dict[str, list[File]] = {}
    for file in files:
        kind = next(iter(wanted)) if len(wanted) == 1 else _kind(file)
        if kind not in wanted:
            raise ModelError(f"{file.name}: {kind}, which none of these tasks reads: {', '.join(names)}")
        kinds.setdefault(kind, []).append(file)
    return [TASKS[name].make(kinds.get(TASKS[name].reads, [])) for name in names]


def _kind(file: File) -> str:
    if Path(file.name).suffix.lower() not in (".json", ".jsonl"):
        return _TEXT
    value = next(_values(file), None)
    return _SQUAD if isinstance(value, dict) and "data" in value else _ARTICLES


def _default(kind: str) -> File:
    name = _DEFAULT[kind]
    return File(name, (DATA / name).read_bytes())


def _texts(files: Sequence[File]) -> tuple[str, ...]:
    return tuple(_text(file) for file in files or [_default(_TEXT)])


def _text(file: File) -> str:
    try:
        return file.data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ModelError(f"{file.name}: not UTF-8 text (byte {e.start})") from None


def _values(file: File) -> Iterator[Any]:
    """The JSON value of a file, or of each of its lines."""
    text = _text(file)
    try:
        yield json.loads(text)
        return
    except RecursionError:
        raise ModelError(f"{file.name}: JSON nested too deeply") from None
    except ValueError as e:
        whole = e
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    for i, line in lines:
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            where = whole if i == lines[0][0] else f"line {i}"
            raise ModelError(f"{file.name}: not JSON ({where})") from None


def read_squad(file: File) -> list[Question]:
    """The questions of a file in SQuAD's format (v1.1 and v2.0); those without an answer are left out.

    {"data": [{"title": T, "paragraphs": [{"context": C, "qas": [QA, ...]}, ...]}, ...]}, where each QA is
    {"id": I, "question": Q, "answers": [{"text": A}, ...]}.
    """
    found: list[Question] = []
    for value in _values(file):
        for i, article in enumerate(_list(file, value, "", "data")):
            here = f"data[{i}]"
            title = _string(file, article, here, "title")
            for j, paragraph in enumerate(_list(file, article, here, "paragraphs")):
                inner = f"{here}.paragraphs[{j}]"
                context = _string(file, paragraph, inner, "context")
                for k, qa in enumerate(_list(file, paragraph, inner, "qas")):
                    at = f"{inner}.qas[{k}]"
                    texts = [
                        _string(file, answer, f"{at}.answers", "text") for answer in _list(file, qa, at, "answers")
                    ]
                    answers = tuple(dict.fromkeys(text for text in texts if text.strip()))
                    asked = _string(file, qa, at, "question")
                    if answers:
                        found.append(Question(title, context, asked, answers, str(qa.get("id", at))))
    if not found:
        raise ModelError(f"{file.name}: no question with an answer")
    return found


def read_articles(file: File) -> list[Article]:
    """The articles of a JSON list, or of JSON lines: {"article": TEXT, "summary" or "highlights": TEXT}."""
    values = list(_values(file))
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    found = []
    for i, value in enumerate(values):
        other = isinstance(value, dict) and "highlights" in value and "summary" not in value
        summary = _string(file, value, f"[{i}]", "highlights" if other else "summary")
        found.append(Article(_string(file, value, f"[{i}]", "article"), summary))
    if not found:
        raise ModelError(f"{file.name}: no article")
    return found


def _string(file: File, value: Any, where: str, key: str) -> str:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, str):
        raise ModelError(f"{file.name}: {_path(where, key)}: no text")
    return found


def _list(file: File, value: Any, where: str, key: str) -> list[Any]:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise ModelError(f"{file.name}: {_path(where, key)}: no list")
    return found


def _path(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _qa(files: Sequence[File]) -> QA:
    return QA(tuple(question for file in files or [_default(_SQUAD)] for question in read_squad(file)))


def _summary(files: Sequence[File]) -> Summary:
    if not files:  # minirt's own articles are short
        return Summary(tuple(read_articles(_default(_ARTICLES))), shortest=0)
    return Summary(tuple(article for file in files for article in read_articles(file)))


class _Maker(NamedTuple):
    reads: str  # the kind of file
    make: Callable[[Sequence[File]], Task]  # of those given, or of minirt's own


TASKS = {
    "repetition": _Maker(_TEXT, lambda files: Repetition(_texts(files))),
    "needle": _Maker(_TEXT, lambda files: Needle(_texts(files))),
    "qa": _Maker(_SQUAD, _qa),
    "summary": _Maker(_ARTICLES, _summary),
    "bpc": _Maker(_TEXT, lambda files: BitsPerCharacter(_texts(files))),
}
