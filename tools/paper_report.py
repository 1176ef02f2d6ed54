"""Makes the tables of README.md, tools/results/REPORT.md with its plots, and minirt/frontier.json, of measured results.

    tools/paper_grids.sh tools/results/bandwidth_cpu.jsonl
    python tools/measure_pareto.py --model smollm2-q4_0.gguf --text tinyshakespeare.txt -o tools/results/pareto.json
    python tools/paper_report.py

Nothing is measured here and no measured number is written by hand; papers' numbers are in paper_numbers.py with their
sources. Plots need matplotlib (minirt[plot]); without it the others are made.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import paper_adaptive  # noqa: E402
import paper_plots  # noqa: E402
import paper_tables as tables  # noqa: E402
import readme_tables  # noqa: E402
from paper_numbers import FIGURE_9, FIGURE_10  # noqa: E402
from paper_results import RESULTS, Quality, Rows, repeated  # noqa: E402
from paper_tables import FIGURE_9_POLICY, FIGURE_10_POLICY, GQA_MODEL, MODEL, SPARSE  # noqa: E402
from paper_targets import targets  # noqa: E402

from minirt.attention_speed import method_of  # noqa: E402
from minirt.auto import FRONTIER  # noqa: E402
from minirt.policies import parse_policy  # noqa: E402

TEXT = Path(__file__).with_suffix(".md")
SPEED, BEFORE = RESULTS / "bandwidth_cpu.jsonl", RESULTS / "bandwidth_xeon.jsonl"
README = Path(__file__).parents[1] / "README.md"


def frontier(rows: Rows, quality: Quality) -> str:
    """What --policy auto chooses from, as JSON."""
    reach: dict[tuple[str, ...], dict[str, Any]] = {}  # the newest row of those that are alike
    for row in rows.find(benchmark="attention", batch=1):
        query_heads, key_heads, head_dim = map(int, re.split("[/x]", row["model"]))
        reach[row["model"], row["kv"], row["policy"], row["depth"]] = {
            "method": method_of(parse_policy(row["resolved"])), "kv": row["kv"], "grouped": query_heads != key_heads,
            "depth": row["depth"], "width": key_heads * head_dim, "read": round(1 / row["ratio_of_bytes"], 4),
            "share": round(row["percent_of_memory"] / 100, 3),
        }  # fmt: skip
    short = min(
        (r for r in rows.find(benchmark="end-to-end", policy="dense") if ".gguf" in r["model"]),
        key=lambda r: r["depth"],
    )
    weights = round(short["percent_of_memory"] / 100, 3)
    names = ("policy", "kv", "read", "kld", "kld_error", "same_top", "repetition", "repetition_error")
    points = [{name: point[name] for name in names} for point in quality.points]
    data = {
        "model": quality.data["model"].removesuffix(".gguf"), "text": quality.data["text"], "head_dim": 64,
        "n_ctx": quality.data["n_ctx"], "points": points,
        "efficiency": {"cpu": {"weights": weights, "attention": list(reach.values())}},
    }  # fmt: skip
    text = json.dumps(data, indent=1)
    return re.sub(r"\{[^{}]*\}", lambda point: re.sub(r"\s+", " ", point[0]), text) + "\n"  # a line each


def commits(rows: Rows) -> str:
    return ", ".join(sorted({row["commit"] for row in rows.all}))


def report(rows: Rows, before: Rows, quality: Quality) -> str:
    """paper_report.md with its tables."""
    first, palu, adaptive = rows.all[0], tables.load("palu_speed.json")["native"], tables.load("adaptive_k.json")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(TEXT.read_text()).render(
        first=first,
        q=quality.data,
        versions=", ".join(f"{name} {version}" for name, version in first["versions"].items()),
        commits=commits(rows),
        peak=f"{rows.peak / 1e9:.1f}",
        samples=len(rows.samples),
        slowest=f"{rows.samples[0] / 1e9:.1f}",
        fastest=f"{rows.samples[-1] / 1e9:.1f}",
        fastest_over=f"{rows.samples[-1] / rows.peak:.2g}",
        dense_repeated=repeated(quality.dense),
        file_model=rows.file_model,
        targets=targets(rows, before, adaptive["policies"]),
        before=before.all[0]["device"],
        before_commits=commits(before),
        palu_cpu=palu["cpu"],
        attention=tables.attention(rows, quality),
        batches=tables.batches(rows, quality),
        grouped=tables.grouped(rows, quality),
        policies=tables.policies(rows, quality),
        caches=tables.caches(rows, quality),
        figure_9=tables.models(rows, quality, MODEL, FIGURE_9_POLICY, FIGURE_9),
        figure_10=tables.models(rows, quality, MODEL, FIGURE_10_POLICY, FIGURE_10),
        alone=tables.models(rows, quality, MODEL, SPARSE, {}),
        grouped_model=tables.models(rows, quality, GQA_MODEL, FIGURE_9_POLICY, {}),
        real=tables.real(rows, quality),
        text=rows.text,
        real_text=tables.real(rows, quality, rows.text),
        others=tables.others(rows),
        machine=tables.machine(tables.load("bandwidth_cpu_machine.json")),
        throughput=tables.throughput(rows, quality),
        palu=tables.palu(palu, quality),
        palu_depth=palu["depth"],
        palu_work=f"{palu['multiply_adds_per_layer'] / 1e9:.1f}",
        adaptive=paper_adaptive.adaptive(adaptive["policies"]),
        adaptive_by_r=paper_adaptive.by_r(adaptive["policies"]),
        adaptive_others=paper_adaptive.others(adaptive["policies"]),
        adaptive_text=f"{adaptive['chunks']} windows of {adaptive['n_ctx']} tokens of {adaptive['text']}",
        beside_fixed=paper_adaptive.beside_fixed(quality),
        by_read=tables.prices(tables.frontier(quality.every, "read")),
        by_held=tables.prices(tables.frontier(quality.every, "held")),
        repeated_by_read=tables.prices(tables.frontier(quality.every, "read", "repetition")),
        repeated_by_held=tables.prices(tables.frontier(quality.every, "held", "repetition")),
        low_rank=tables.prices(quality.low_rank),
    )


def fill_in(text: str, name: str, content: str) -> str:
    """The text with what stands between the marks of that name renewed."""
    begin, end = f"<!-- {name}: made by tools/paper_report.py -->", f"<!-- end of {name} -->"
    found = re.search(f"{re.escape(begin)}.*?{re.escape(end)}", text, re.DOTALL)
    if found is None:
        raise SystemExit(f"README.md has no marks '{begin}' and '{end}'")
    return text.replace(found[0], f"{begin}\n{content}\n{end}")


def readme(rows: Rows, quality: Quality, text: str) -> str:
    """README.md with its tables renewed."""
    for name, table in readme_tables.tables(rows, quality).items():
        text = fill_in(text, name, table())
    return text


def main() -> None:
    rows, before, quality = Rows(SPEED), Rows(BEFORE), Quality(RESULTS / "pareto.json")
    (RESULTS / "REPORT.md").write_text(report(rows, before, quality))
    FRONTIER.write_text(frontier(rows, quality))
    README.write_text(readme(rows, quality, README.read_text()))
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: they need matplotlib, pip install 'minirt[plot]'", file=sys.stderr)
        return
    paper_plots.draw(rows, quality.every, tables.frontier, RESULTS / "plots")


if __name__ == "__main__":
    main()
