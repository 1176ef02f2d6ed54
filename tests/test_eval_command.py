"""minirt eval, the command."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, asked, only_line, quiet_env, squad

from minirt import Llama
from minirt.eval import expand
from minirt.eval import plot as plotting


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
        (["--save", "."], 1, ".: not a regular file"),
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
