"""tools/paper_report.py: what its tables say, and that report, README and frontier are those of the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

import paper_adaptive  # noqa: E402
import paper_report  # noqa: E402
import paper_tables as tables  # noqa: E402
import readme_tables  # noqa: E402
from paper_results import shares  # noqa: E402
from paper_targets import targets  # noqa: E402

SAME = {"kld_error": 0.001, "same_top": 0.9, "repetition": 8.0, "repetition_error": 1.0}
POINTS = [
    {"policy": policy, "kv": kv, "read": read, "held": held, "kld": kld, **SAME}
    for policy, kv, read, held, kld in (
        ("dense", "f16", 1.0, 1.0, 0.0), ("dense", "q8_0", 0.53, 0.53, 0.001),
        ("sparq:r=5:k=170", "f16", 0.16, 1.5, 0.05), ("sparq:r=16:k=64", "f16", 0.16, 1.5, 0.08),
        ("tova:budget=1/8", "f16", 0.13, 0.13, 0.3),
    )
]  # fmt: skip
PALU = {"policy": "dense", "kv": "latent-q4", "read": 0.14, "held": 0.14, "kld": 0.1, "keep": 0.5} | SAME


SPARQ = tables.FIGURE_9_POLICY


@pytest.fixture
def quality(tmp_path: Path) -> tables.Quality:
    file = tmp_path / "pareto.json"
    file.write_text(json.dumps({"model": "smollm2.gguf", "n_ctx": 2048, "points": [*POINTS, PALU]}))
    return tables.Quality(file)


def rows_of(tmp_path: Path, *rows: dict[str, Any]) -> tables.Rows:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tables.Rows(file)


def whole_model(depth: int, policy: str) -> list[dict[str, Any]]:
    common = {"benchmark": "end-to-end", "model": tables.MODEL, "batch": 1, "kv": "f16", "context": "random"}
    common |= {"depth": depth, "weight_bytes": 10**9, "kv_bytes": 10**9, "memory_bytes_per_second": 40e9}
    dense = {"policy": "dense", "ms": 100.0, "ms_low": 90.0, "ms_high": 120.0, "full_ms": 500.0}
    own = {"policy": policy, "ms": 62.5, "ms_low": 60.0, "ms_high": 70.0, "full_ms": 250.0}
    own |= {"speed_up": 1.6, "theory": 2.0, "full_speed_up": 2.0, "full_theory": 2.5}
    return [common | dense | {"percent_of_memory": 62.0}, common | own]


def test_the_frontier_is_what_nothing_beats(quality: tables.Quality) -> None:
    assert [p["policy"] for p in tables.frontier(quality.points, "read")] == [
        "tova:budget=1/8", "sparq:r=5:k=170", "dense", "dense",
    ]  # fmt: skip
    assert [p["kv"] for p in tables.frontier(quality.points, "held")] == ["f16", "q8_0", "f16"]
    more = {**POINTS[0], "policy": "better", "read": 2.0, "repetition": 9.0}
    best = tables.frontier([*quality.points, more], "read", "repetition")
    assert [p["policy"] for p in best] == ["tova:budget=1/8", "better"]


def test_copies_of_the_model_are_a_way_of_their_own(quality: tables.Quality) -> None:
    """On the frontier, but not what the README or --policy auto tell to take: they need another file."""
    frontier = tables.frontier(quality.every, "read")
    assert PALU in frontier
    assert "| `dense` | latent-q4, 50 % of the rank | 14 % | 14 % | 0.1000 |" in tables.prices(frontier)
    assert quality.low_rank == [PALU]
    assert "latent" not in readme_tables.advice(quality)


def test_a_policy_by_its_shares() -> None:
    assert shares("sparq:r=d/4:k=S/16:k_index=q4", 4096, 128) == (("sparq", "k_index=q4"), {"r": 1 / 4, "k": 1 / 16})
    assert shares("sparq:r=16:k=64:k_index=none", 2048, 64) == shares("sparq:r=16:k=64", 2048, 64)
    assert shares("sparq:r=16:k=auto", 4096, 128) == (("sparq", "k=auto"), {"r": 1 / 8})
    assert shares("tova:budget=512", 4096, 128) == shares("tova:budget=1/8", 2048, 64) == (("tova",), {"budget": 1 / 8})


def test_quality_is_that_of_the_same_shares_or_names_others(quality: tables.Quality) -> None:
    assert quality.of("sparq:r=d/12:k=S/12", 32768, 128) == "0.050 / 90 % / 8.0 ± 1.0"  # r = 10 of 128 is 5 of 64
    assert quality.of("sparq:r=32:k=64", 2048, 128) == "0.080 / 90 % / 8.0 ± 1.0"
    assert quality.of("sparq:r=32:k=64", 4096, 128) == "0.080 / 90 % / 8.0 ± 1.0 (k = S/32)"
    assert quality.of("sparq:r=16:k=64", 2048, 64) == "0.080 / 90 % / 8.0 ± 1.0"
    assert quality.of("tova:budget=512", 4096, 64) == "0.300 / 90 % / 8.0 ± 1.0"
    assert quality.of("tova:budget=512", 8192, 64) == "0.300 / 90 % / 8.0 ± 1.0 (budget = S/8)"
    assert quality.of("tova:budget=511", 8192, 64) == quality.of("sparq:r=16:k=64", 4097, 64) == "not measured"
    assert quality.of("dense", 4096, 64, "q8_0") == "0.001 / 90 % / 8.0 ± 1.0"
    assert (
        quality.of("window:budget=1/8", 4096, 64) == quality.of("tova:budget=1/8", 4096, 64, "q8_0") == "not measured"
    )


def test_advice_takes_what_reads_less_at_the_same_divergence_and_does_not_forget(quality: tables.Quality) -> None:
    point, best = POINTS[2], {"kld": 0.049, "read": 0.2}
    quality.points.append(point | best | {"policy": "sparq:r=6:k=170"})
    assert "r=6" not in readme_tables.advice(quality)
    quality.points.append(point | best | {"policy": "sparq:r=7:k=170", "kld": 0.046})
    assert "| 30 % to read | `--policy sparq:r=7:k=170` |" in readme_tables.advice(quality)
    quality.points[-1] |= {"repetition": 2.0}
    assert "r=7" not in readme_tables.advice(quality)
    for p in quality.points[1:]:
        p["repetition"] = 2.9
    assert readme_tables.advice(quality).count("2.9 ± 1.0, forgets |") == 6


def test_advice_takes_the_least_divergence_within_each_limit(quality: tables.Quality) -> None:
    lines = [line.split(" | ")[1] for line in readme_tables.advice(quality).splitlines()[2:]]
    assert lines == [
        "`--policy dense`", "`--policy dense --kv q8_0`", "`--policy sparq:r=5:k=170`", "`--policy tova:budget=1/8`",
        "`--policy dense --kv q8_0`", "`--policy tova:budget=1/8`", "`--policy tova:budget=1/8`",
    ]  # fmt: skip


def test_a_model_beside_its_paper(tmp_path: Path, quality: tables.Quality) -> None:
    rows = rows_of(tmp_path, *(row | {"model": "m"} for row in whole_model(4096, SPARQ)))
    table = tables.models(rows, quality, "m", SPARQ, {4096: (54.0, 45.0)})
    assert table.splitlines()[0] == (
        "Quality at r = d/12.8, k = S/12 on smollm2.gguf (`sparq:r=5:k=170`, heads of 64, 2048 tokens): KL divergence "
        "0.050, same most likely token 90 %, characters repeated 8.0 ± 1.0 (dense: 8.0 ± 1.0)."
    )
    before, after = (
        "| 4096 | 100 (90.0-120) | 62 % | 62.5 (60.0-70.0) | 1.25x | 1.60x of 2.00x (80 %) |",
        (" 2.00x of 2.50x (80 %) | 1.20x | 0.050 / 90 % / 8.0 ± 1.0 |"),
    )
    assert table.splitlines()[-1] == f"{before} 500 / 250 |{after}"
    assert tables.models(rows, quality, "m", SPARQ, {4096: 1.2}, short=True).splitlines()[-1] == before + after


def test_what_papers_say_besides(tmp_path: Path) -> None:
    """A line through times that lie on one; a cell of the paper's setting, or none."""
    models = [row | {"full_ms": 100 + row["depth"] / 32} for s in (4096, 8192) for row in whole_model(s, SPARQ)]
    alone = {"benchmark": "attention", "model": tables.MHA, "kv": "f16", "batch": 1, "depth": 16384}
    alone |= {"memory_bytes_per_second": 40e9}
    dense, own = (alone | {"policy": policy} for policy in ("dense", tables.SPARSE))
    text = tables.others(rows_of(tmp_path, *models, dense, own | {"speed_up": 7.0, "ratio_of_bytes": 7.5}))
    assert "| dense, the same, 32 layers | - | 3.12e-05 S + 0.1 |" in text
    assert "IPU with remote memory | 7.41x | 7.00x of 7.50x (93 %) |" in text
    assert "IPU with remote memory | 7.41x | - |" in tables.others(rows_of(tmp_path, *models))


def test_a_table_takes_the_times_of_one_cell(tmp_path: Path) -> None:
    """The newest that has all policies: a later cell with others must not lend it its dense attention."""
    sparse, other = (row | {"dense_ms": 100.0} for row in whole_model(8192, SPARQ)), whole_model(8192, "topk:k=128")
    rows = rows_of(tmp_path, *sparse, *(row | {"ms": 7.0, "dense_ms": 7.0} for row in other))
    cell = rows.by_depth(("dense", SPARQ))[8192]
    assert (cell["dense"]["ms"], cell[SPARQ]["ms"]) == (100.0, 62.5)
    assert rows.by_depth(("dense",))[8192].keys() == {"dense", "topk:k=128"}
    assert rows.by_depth((SPARQ, "topk:k=128")) == {}


def test_misses_of_targets_are_said(tmp_path: Path) -> None:
    of_any = {"sparq:r=16:k=auto:eps=0.5": (3.0, 0.15), "sparq:r=16:k=58": (3.01, 0.2), "sparq:r=12:k=64": (3.02, 0.12)}
    of_any |= {"sparq:r=12:k=auto": (2.7, 0.1), "sparq:r=12:k=50": (2.7, 0.11), "sparq:r=12:k=49": (2.69, 0.05)}
    of_any |= {"share:eps=0.1": (3.0, 0.01), "sparq:r=16:k=auto": (2.0, 0.1), "sparq:r=12:k=20": (2.01, 0.2)}
    adaptive = {policy: {"kv_bytes_read": nbytes, "kld": kld} for policy, (nbytes, kld) in of_any.items()}
    pairs = paper_adaptive.pairs(adaptive)
    assert pairs == [
        ("12", "sparq:r=12:k=auto", *2 * ("sparq:r=12:k=50",)),
        ("16", "sparq:r=16:k=auto:eps=0.5", "sparq:r=16:k=58", "sparq:r=12:k=64"),
    ]
    assert [paper_adaptive.less_than_best(adaptive, pair) for pair in pairs] == pytest.approx([-100 / 11, 25])
    assert "| 16 | 1 of 1 | 0 of 1 |" in paper_adaptive.by_r(adaptive)
    rows, before = (
        rows_of(tmp_path, *(row for s in depths for row in whole_model(s, SPARQ)))
        for depths in ((32768, 131072), (32768,))
    )
    text = targets(rows, before, adaptive)
    assert "| figure 9, S = 32768: speed-up over theory | 85 % or more | 80 % | **no** | 80 % |" in text
    assert "| figure 9, S = 131072: speed-up over theory | 85 % or more | 80 % | **no** | not measured |" in text
    assert "S = 16384: speed-up over ratio of bytes | 0.8 or more | not measured | **no** | not measured |" in text
    assert "of the same r | all points | 2 of 2 | yes | - |" in text
    assert "of the best r for these bytes | all points | 1 of 2 | **no** | - |" in text


def test_what_is_said_of_adaptive_k() -> None:
    """In the README and the report."""
    measured = tables.load("adaptive_k.json")["policies"]
    for pair in paper_adaptive.pairs(measured):
        if int(pair.r) >= 10:
            assert measured[pair.auto]["kld"] < measured[pair.same]["kld"], pair
        if pair.r in ("10", "12") and float(pair.auto.rpartition("=")[2]) <= 0.75:
            assert measured[pair.auto]["kld"] < measured[pair.best]["kld"], pair


def test_marks_in_a_text() -> None:
    text = "a\n<!-- x: made by tools/paper_report.py -->\nold\n<!-- end of x -->\nb\n"
    new = paper_report.fill_in(text, "x", "new")
    assert new == text.replace("old", "new")
    with pytest.raises(SystemExit):
        paper_report.fill_in(text, "y", "new")


def test_what_is_committed_was_made_of_the_results() -> None:
    rows, before = tables.Rows(paper_report.SPEED), tables.Rows(paper_report.BEFORE)
    quality = tables.Quality(tables.RESULTS / "pareto.json")
    assert (tables.RESULTS / "REPORT.md").read_text() == paper_report.report(rows, before, quality)
    assert paper_report.FRONTIER.read_text() == paper_report.frontier(rows, quality)
    text = paper_report.README.read_text()
    assert text == paper_report.readme(rows, quality, text)
