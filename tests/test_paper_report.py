"""tools/paper_report.py: what its tables say, and that report, README and frontier are those of the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

import paper_report  # noqa: E402
import paper_tables as tables  # noqa: E402

SAME = {"same_top": 0.9, "repetition": 8.0, "repetition_error": 1.0}
POINTS = [
    {"policy": policy, "kv": kv, "read": read, "held": held, "kld": kld, **SAME}
    for policy, kv, read, held, kld in (
        ("dense", "f16", 1.0, 1.0, 0.0), ("dense", "q8_0", 0.53, 0.53, 0.001),
        ("sparq:r=10:k=170", "f16", 0.16, 1.5, 0.05), ("sparq:r=16:k=64", "f16", 0.16, 1.5, 0.08),
        ("tova:budget=1/8", "f16", 0.13, 0.13, 0.3),
    )
]  # fmt: skip


@pytest.fixture
def quality(tmp_path: Path) -> tables.Quality:
    file = tmp_path / "pareto.json"
    file.write_text(json.dumps({"n_ctx": 2048, "points": POINTS}))
    return tables.Quality(file)


def rows_of(tmp_path: Path, *rows: dict[str, Any]) -> tables.Rows:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tables.Rows(file)


def test_the_frontier_is_what_nothing_beats(quality: tables.Quality) -> None:
    assert [p["policy"] for p in tables.frontier(quality.points, "read")] == [
        "tova:budget=1/8", "sparq:r=10:k=170", "dense", "dense",
    ]  # fmt: skip
    assert [p["kv"] for p in tables.frontier(quality.points, "held")] == ["f16", "q8_0", "f16"]


def test_quality_at_the_same_parameters(quality: tables.Quality) -> None:
    assert quality.of("sparq:r=d/12:k=S/12") == "0.050 / 90 % / 100 %"
    assert quality.of("dense", "q8_0") == "0.001 / 90 % / 100 %"
    assert quality.of("window:budget=1/8") == "-"


def test_advice_takes_the_least_divergence_within_each_limit(quality: tables.Quality) -> None:
    lines = [line.split(" | ")[1] for line in paper_report.advice(quality).splitlines()[2:]]
    assert lines == [
        "`--policy dense`", "`--policy dense --kv q8_0`", "`--policy sparq:r=10:k=170`", "`--policy tova:budget=1/8`",
        "`--policy dense --kv q8_0`", "`--policy tova:budget=1/8`", "`--policy tova:budget=1/8`",
    ]  # fmt: skip


def test_a_model_beside_its_paper(tmp_path: Path, quality: tables.Quality) -> None:
    common = {"benchmark": "end-to-end", "model": "m", "batch": 1, "kv": "f16", "context": "random", "depth": 4096}
    sizes = {"weight_bytes": 10**9, "kv_bytes": 10**9, "memory_bytes_per_second": 40e9}
    dense = common | sizes | {"policy": "dense", "ms": 100.0, "full_ms": 500.0}
    sparse = (
        common | sizes | {"policy": "sparq:r=d/12:k=S/12", "ms": 62.5, "full_ms": 250.0, "speed_up": 1.6, "theory": 2.0}
    )
    sparse |= {"full_speed_up": 2.0, "full_theory": 2.5}
    rows = rows_of(tmp_path, dense, sparse | {"ms": 1.0}, sparse)  # the last of those that are alike counts
    table = tables.models(rows, quality, "m", "sparq:r=d/12:k=S/12", {4096: (54.0, 45.0)})
    assert table.splitlines()[0].endswith(
        ": KL divergence 0.050, same most likely token 90 %, repetition 100 % of dense."
    )
    assert table.splitlines()[-1] == (
        "| 4096 | 100 / 62.5 | 1.25x | 1.60x of 2.00x (80 %) | 500 / 250 | 2.00x of 2.50x | 1.20x |"
    )


def test_marks_in_a_text() -> None:
    text = "a\n<!-- x: made by tools/paper_report.py -->\nold\n<!-- end of x -->\nb\n"
    new = paper_report.fill_in(text, "x", "new")
    assert new == text.replace("old", "new")
    with pytest.raises(SystemExit):
        paper_report.fill_in(text, "y", "new")


def test_what_is_committed_was_made_of_the_results() -> None:
    rows = tables.Rows(tables.RESULTS / "bandwidth_cpu.jsonl")
    quality = tables.Quality(tables.RESULTS / "pareto.json")
    assert (tables.RESULTS / "REPORT.md").read_text() == paper_report.report(rows, quality)
    assert paper_report.FRONTIER.read_text() == paper_report.frontier(rows, quality)
    text = paper_report.README.read_text()
    assert text == paper_report.readme(rows, quality, text)
