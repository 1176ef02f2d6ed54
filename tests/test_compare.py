"""tools/compare_llamacpp.py: what it makes of samples, and of a process that dies. llama.cpp is not needed."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import compare_llamacpp as compare
from compare_worker import Engine, Minirt, random_tokens

ECHO = "import sys\nprint('{\"ready\": 1}', flush=True)\nfor line in sys.stdin: print(line, end='', flush=True)"
CRASH = "import os, signal\nprint('{}', flush=True)\ninput()\nos.kill(os.getpid(), signal.SIGSEGV)"


def test_rates_are_compared_with_the_faster_variant() -> None:
    samples = {"minirt": [10.0, 30.0, 20.0], "llama.cpp": [10.0, 10.0, 10.0], "llama.cpp fa": [20.0, 20.0, 25.0]}
    test = compare.summary("decode at 0", "t/s", samples)
    assert (test["best"], test["ratio"], test["paired_ratio"]) == ("llama.cpp fa", 1.0, 0.8)
    compare.add_limit(test, 1000.0)
    assert "limit_percent" not in test
    test["bytes_per_step"] = 5
    compare.add_limit(test, 1000.0)
    assert test["limit_percent"]["minirt"] == 10.0


def test_of_seconds_and_bytes_less_is_better() -> None:
    test = compare.summary("start, 1 token", "s", {"minirt": [2.0], "llama.cpp": [1.0], "llama.cpp fa": [4.0]})
    assert (test["best"], test["ratio"], test["paired_ratio"]) == ("llama.cpp", 0.5, 0.5)


def test_an_engine_that_died_early_leaves_the_rest() -> None:
    alone = compare.summary("prefill 512", "t/s", {"minirt": [5.0, 6.0], "llama.cpp": [], "llama.cpp fa": []})
    assert alone["median"] == {"minirt": 5.5}
    assert "ratio" not in alone
    partly = compare.summary("prefill 512", "t/s", {"minirt": [5.0, 6.0], "llama.cpp": [10.0], "llama.cpp fa": []})
    assert partly["paired_ratio"] == 0.5
    lines = compare.table([{"model": "a.gguf", "tests": [alone, partly]}]).splitlines()
    assert lines[1].split() == ["a", "prefill", "512", "5.5", "t/s", "-", "-", "-"]
    assert lines[2].split() == ["a", "prefill", "512", "5.5", "t/s", "10.0", "t/s", "0.55", "0.50"]


def test_a_worker_answers_until_it_dies(capfd: pytest.CaptureFixture[str]) -> None:
    worker = compare.Worker("minirt", [sys.executable, "-c", ECHO])
    assert worker.about == {"ready": 1}
    assert worker.ask("decode at 0", do="decode", depth=0) == {"do": "decode", "depth": 0}
    worker.close()

    worker = compare.Worker("llama.cpp", [sys.executable, "-c", CRASH])
    assert worker.ask("prefill 512", do="prefill") == worker.ask("prefill 512", do="prefill") == {}
    worker.close()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("compare_llamacpp: llama.cpp died of SIGSEGV (prefill 512); where its AMX path crashes")


def test_a_failure_is_one_line() -> None:
    assert compare.failure("minirt", "loading", 1, "Traceback:\n  x\nModelError: bad\n\n") == (
        "minirt failed (loading): ModelError: bad"
    )
    assert compare.failure("minirt", "loading", 3, "") == "minirt failed (loading): exit status 3"
    assert compare.failure("minirt", "loading", -signal.SIGKILL, "") == "minirt died of SIGKILL (loading)"


def test_lists_of_numbers() -> None:
    context = click.Context(compare.main)
    depths, prompts = (next(p for p in compare.main.params if p.name == name) for name in ("depths", "prompts"))
    assert compare.numbers(context, depths, "2048, 0,2048") == (0, 2048)
    assert compare.numbers(context, prompts, "") == ()
    for text in ("0", "-1", "a", "1;2", "²"):
        with pytest.raises(click.BadParameter, match="not a list of numbers from 1"):
            compare.numbers(context, prompts, text)
    assert compare.Settings(2, (0, 7168), (512,), 32, 5).n_ctx == 7424
    assert compare.Settings(2, (), (), 32, 5).n_ctx == 256


def test_llama_cpp_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    done = CliRunner().invoke(compare.main, [__file__])
    assert done.exit_code == 1
    assert done.stderr == "Error: llama-cpp-python is not installed here: pip install llama-cpp-python\n"


class Recorder(Engine):
    n_vocab = 100

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.lengths: list[int] = []  # of the texts read

    def rewind(self, n: int) -> None:
        del self.tokens[n:]

    def read(self, tokens: list[int]) -> None:
        self.tokens += tokens
        self.lengths.append(len(tokens))

    def step(self, tokens: list[int]) -> None:
        self.tokens += tokens


def test_a_depth_is_read_once_and_grows() -> None:
    engine = Recorder()
    for depth, seed in ((0, 1), (20, 1), (20, 2), (50, 1)):
        assert engine.decode(depth, 4, seed)["seconds"] >= 0
        assert engine.tokens == random_tokens(100, depth, 0) + random_tokens(100, 4, seed)
    assert engine.lengths == [20, 30]
    engine.prefill(30, 7)
    engine.decode(10, 4, 1)
    assert engine.tokens == random_tokens(100, 10, 0) + random_tokens(100, 4, 1)


def test_minirt_counts_the_bytes_of_a_step(tiny: Path) -> None:
    engine = Minirt(str(tiny), 1, 64)
    answer, config = engine.decode(9, 3, 1), engine.llama.config
    row = 2 * 2 * config.n_layer * config.n_head_kv * config.head_dim  # bytes of a token's K and V in float16
    assert answer["kv_bytes"] == 12 * row
    assert answer["bytes_per_step"] == engine.llama.session.weight_bytes + 11 * row
    assert engine.cache.n_seen[0] == 12
    engine.prefill(20, 1)
    assert engine.cache.n_seen[0] == 20
    engine.llama.close()
