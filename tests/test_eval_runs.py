"""minirt eval: running examples, keeping results, and the grid of policies and budgets."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minirt import Llama, ModelError, UsageError
from minirt.eval import NO_CONTEXT, Example, Results, Setup, attempt, expand, fitted, record, run, summarise
from minirt.eval.results import fingerprint
from minirt.eval.texts import BitsPerCharacter, Repetition

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
