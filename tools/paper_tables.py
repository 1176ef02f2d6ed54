"""The tables of paper_report.py: what `minirt bandwidth` measured beside what papers say, and its price in quality."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from paper_numbers import KEEPKV, PALU, SPARQ_CPU, SPARQ_GPU, TOVA

from minirt.bandwidth.attention import resolve

RESULTS = Path(__file__).with_name("results")
SPARSE, SMALL, CODED = "sparq:r=32:k=128", "sparq:r=16:k=64", "sparq:r=32:k=128:k_index=q4"
ONE_LAYOUT = "topk:k=128"
FIGURE_9_POLICY, FIGURE_10_POLICY = "sparq:r=d/12:k=S/12", "sparq:r=16:k=S/16"
MHA, GQA, MODEL, GQA_MODEL = "32/32x128", "32/8x128", "7b Q8_0, 4 layers", "8b-gqa Q8_0, 4 layers"

Row = dict[str, Any]


class Rows:
    """What `minirt bandwidth --save` kept; the newest row of those that are alike."""

    def __init__(self, path: Path):
        self.all: list[Row] = [json.loads(line) for line in path.read_text().splitlines()]

    def find(self, **wanted: Any) -> list[Row]:
        return [row for row in self.all if all(row.get(name) == value for name, value in wanted.items())]

    def one(self, **wanted: Any) -> Row | None:
        found = self.find(**wanted)
        return found[-1] if found else None

    def depths(self, **wanted: Any) -> list[int]:
        return sorted({row["depth"] for row in self.find(**wanted)})


class Quality:
    """What a policy costs on the real model, by its parameters."""

    def __init__(self, path: Path):
        self.data: Row = json.loads(path.read_text())
        self.points: list[Row] = self.data["points"]
        self.dense = next(p for p in self.points if (p["policy"], p["kv"]) == ("dense", "f16"))

    def of(self, policy: str, kv: str = "f16") -> str:
        """Divergence, same most likely token, and repetition as a share of dense; a dash if it was not measured."""
        numbers = self._numbers(policy, kv)
        return " / ".join(numbers) if numbers else "-"

    def sentence(self, policy: str) -> str:
        """The same in words."""
        numbers = self._numbers(policy, "f16")
        if not numbers:
            return "Quality was not measured."
        kld, same, repeated = numbers
        return (
            f"Quality of the same r and k on SmolLM2-135M, over windows of {self.data['n_ctx']} tokens: KL divergence "
            f"{kld}, same most likely token {same}, repetition {repeated} of dense."
        )

    def _numbers(self, policy: str, kv: str) -> tuple[str, ...]:
        name = resolve(policy, self.data["n_ctx"], 128)
        for point in self.points:
            if (point["policy"], point["kv"]) == (name, kv):
                repeated = point["repetition"] / self.dense["repetition"]
                return f"{point['kld']:.3f}", f"{100 * point['same_top']:.0f} %", f"{100 * repeated:.0f} %"
        return ()


def table(head: str, rows: Iterable[Sequence[str]]) -> str:
    """Markdown. head: the titles, with " | " between them."""
    lines = [f"| {head} |", f"|{' --- |' * len(head.split(' | '))}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def gain(row: Row) -> str:
    """Speed-up, the ratio of bytes, and what part of it that is."""
    most = row["ratio_of_bytes"]
    return f"{row['speed_up']:.2f}x of {most:.2f}x ({100 * row['speed_up'] / most:.0f} %)"


# -- sections ----------------------------------------------------------------------------------------------------------


def attention(rows: Rows, quality: Quality) -> str:
    own = {"benchmark": "attention", "model": MHA, "batch": 1, "kv": "f16"}
    lines = []
    for depth in rows.depths(**own, policy=SMALL):
        found = {p: rows.one(**own, depth=depth, policy=p) for p in ("dense", SMALL, SPARSE, CODED, ONE_LAYOUT)}
        dense = found["dense"]
        if dense is None or None in found.values():
            continue
        theirs = SPARQ_CPU.get(depth)
        lines.append([
            str(depth), ms(dense["ms"]), f"{dense['percent_of_memory']:.0f} %",
            *(gain(row) for p in (SMALL, SPARSE, CODED, ONE_LAYOUT) if (row := found[p])),
            "-" if theirs is None else f"{theirs[0] / theirs[1]:.2f}x / {theirs[0] / theirs[2]:.2f}x",
        ])  # fmt: skip
    head = "S | dense ms | of memory | r=16 k=64 | r=32 k=128 | ... 4-bit index | topk k=128 | authors: 16,64 / 32,128"
    lines.append(["quality", "", "", *(quality.of(p) for p in (SMALL, SPARSE, CODED, ONE_LAYOUT)), ""])
    return table(head, lines)


def batches(rows: Rows) -> str:
    own = {"benchmark": "attention", "model": MHA, "kv": "f16"}
    lines = []
    for (n_seq, depth), (a100, a10g) in SPARQ_GPU.items():
        dense = rows.one(**own, batch=n_seq, depth=depth, policy="dense")
        sparse = rows.one(**own, batch=n_seq, depth=depth, policy=SPARSE)
        if dense is not None and sparse is not None:
            lines.append([
                str(n_seq), str(depth), ms(dense["ms"]), gain(sparse),
                times(a100[0] / a100[1]), "-" if a10g is None else times(a10g[0] / a10g[1]),
            ])  # fmt: skip
    return table("B | S | dense ms | r=32 k=128 | authors, A100 | authors, A10G", lines)


def grouped(rows: Rows) -> str:
    own = {"benchmark": "attention", "model": GQA, "batch": 1, "kv": "f16"}
    lines = []
    for depth in rows.depths(**own, policy=SPARSE):
        found = [rows.one(**own, depth=depth, policy=p) for p in ("dense", SPARSE, CODED)]
        if all(found):
            dense, sparse, coded = (row or {} for row in found)
            lines.append([str(depth), ms(dense["ms"]), gain(sparse), gain(coded)])
    return table("S | dense ms | r=32 k=128 | ... 4-bit index", lines)


def policies(rows: Rows, quality: Quality) -> str:
    every = rows.find(benchmark="attention", model=MHA, batch=1, kv="f16", depth=8192)
    found = {row["policy"]: row for row in every}.values()
    lines = [
        [
            f"`{r['policy']}`", ms(r["ms"]), f"{r['percent_of_memory']:.0f} %", gain(r),
            f"{r['bytes_formula'] / 1e6:.2f} / {r['bytes_read'] / 1e6:.2f}", quality.of(_as_share(r["policy"])),
        ]
        for r in found
    ]  # fmt: skip
    head = "policy | ms | of memory | speed-up | MB by formula / touched | quality (512 tokens: 1/4 of the context)"
    return table(head, lines)


def _as_share(policy: str) -> str:
    """512 tokens are a quarter of the 2048 that quality was measured with."""
    return policy.replace("budget=512", "budget=1/4")


def caches(rows: Rows, quality: Quality) -> str:
    lines = []
    base = rows.one(benchmark="attention", model=MHA, batch=1, kv="f16", depth=16384, policy="dense")
    for kv in ("f16", "q8_0", "q4_0"):
        for policy in ("dense", SPARSE):
            row = rows.one(benchmark="attention", model=MHA, batch=1, kv=kv, depth=16384, policy=policy)
            if row is not None and base is not None:
                over = base["ms"] / row["ms"], base["bytes_formula"] / row["bytes_formula"]
                lines.append(
                    [kv, f"`{policy}`", ms(row["ms"]), f"{over[0]:.2f}x of {over[1]:.2f}x", quality.of(policy, kv)]
                )
    return table("kv | policy | ms | over dense f16 | quality", lines)


def models(rows: Rows, quality: Quality, model: str, policy: str, paper: dict[int, Any]) -> str:
    own = {"benchmark": "end-to-end", "model": model, "batch": 1, "kv": "f16", "context": "random"}
    lines = []
    for depth in rows.depths(**own, policy=policy):
        dense, row = rows.one(**own, depth=depth, policy="dense"), rows.one(**own, depth=depth, policy=policy)
        if dense is None or row is None:
            continue
        limit = 1e3 * (row["weight_bytes"] + row["kv_bytes"]) / row["memory_bytes_per_second"]
        theirs = paper.get(depth)
        shown = "-" if theirs is None else times(theirs[0] / theirs[1]) if isinstance(theirs, tuple) else times(theirs)
        lines.append([
            str(depth), f"{ms(dense['ms'])} / {ms(row['ms'])}", f"{row['ms'] / limit:.2f}x",
            f"{row['speed_up']:.2f}x of {row['theory']:.2f}x ({100 * row['speed_up'] / row['theory']:.0f} %)",
            f"{ms(dense['full_ms'])} / {ms(row['full_ms'])}",
            f"{row['full_speed_up']:.2f}x of {row['full_theory']:.2f}x", shown,
        ])  # fmt: skip
    head = (
        "S | ms, dense / sparse | over byte limit | speed-up of theory | 32 layers: ms | ... speed-up of theory | paper"
    )
    return f"{quality.sentence(policy)}\n\n{table(head, lines)}"


def real(rows: Rows, quality: Quality) -> str:
    found = [
        r
        for r in rows.find(benchmark="end-to-end", batch=1)
        if r["layers"] == r["full_layers"] and ".gguf" in r["model"]
    ]
    lines = [
        [
            str(r["depth"]), f"`{r['policy']}`", f"{r['tokens_per_second']:.0f}",
            f"{r['speed_up']:.2f}x of {r['theory']:.2f}x", quality.of(_as_share(r["policy"])),
        ]
        for r in found
    ]  # fmt: skip
    return table("S | policy | tokens/s | speed-up of theory | quality", lines)


def throughput(rows: Rows, quality: Quality) -> str:
    lines = []
    for row in rows.find(benchmark="throughput", same="memory"):
        equal = rows.one(
            benchmark="throughput", same="batch", model=row["model"], policy=row["policy"], depth=row["depth"]
        )
        policy = row["policy"]
        budget = re.fullmatch(r"tova:budget=(\d+)", policy)
        paper = times(TOVA[int(budget[1])][1]) if budget else "-"
        if policy.partition(":")[0] in KEEPKV and "1/5" in policy:
            paper = times(KEEPKV[policy.partition(":")[0]] / KEEPKV["dense"])
        share = policy if not budget else f"tova:budget=1/{row['depth'] // int(budget[1])}"
        lines.append([
            f"`{policy}`", str(row["n_sequences"]), f"{row['tokens_per_second']:.0f}", times(row["speed_up"]),
            times(equal and equal["speed_up"]), paper, quality.of(share.replace("budget=512", "budget=1/8")),
        ])  # fmt: skip
    head = "policy | sequences | tokens/s | over dense, same memory | ... same batch | papers, same memory | quality"
    return table(head, lines)


def palu() -> str:
    data = json.loads((RESULTS / "palu_speed.json").read_text())["native"]
    dense = data["caches"]["f16"]["attention_ms_per_layer"]
    lines = [
        [kv, ms(row["attention_ms_per_layer"]), times(dense / row["attention_ms_per_layer"]), times(PALU.get(kv))]
        for kv, row in data["caches"].items()
    ]
    return table("kv | ms a layer | over f16 | paper, RTX 4090, 64k", lines)


def adaptive() -> str:
    """Rows for each head by their weight, beside as many for all: sorted by the bytes."""
    found = json.loads((RESULTS / "adaptive_k.json").read_text())["policies"]
    lines = [
        [
            f"`{policy}`", f"{row['kv_bytes_read'] / 2**20:.2f}", f"{row['kld']:.4f} ± {row['kld_error']:.4f}",
            f"{100 * row['same_top']:.1f} %",
        ]
        for policy, row in sorted(found.items(), key=lambda item: item[1]["kv_bytes_read"])
    ]  # fmt: skip
    return table("policy | MiB read for a token | KL divergence | same token", lines)


# -- quality over bytes ------------------------------------------------------------------------------------------------


def frontier(points: Sequence[Row], axis: str) -> list[Row]:
    """Points of which no other has both fewer bytes and less divergence."""
    out: list[Row] = []
    for point in sorted(points, key=lambda p: (p[axis], p["kld"])):
        if not out or point["kld"] < out[-1]["kld"]:
            out.append(point)
    return out


def repeated(point: Row) -> str:
    return f"{point['repetition']:.1f} ± {point['repetition_error']:.1f}"


def pareto(quality: Quality, axis: str) -> str:
    lines = [
        [
            f"`{p['policy']}`", p["kv"], f"{100 * p['read']:.0f} %", f"{100 * p['held']:.0f} %", f"{p['kld']:.4f}",
            f"{100 * p['same_top']:.1f} %", repeated(p),
        ]
        for p in frontier(quality.points, axis)
    ]  # fmt: skip
    return table("policy | kv | read | held | KL divergence | same token | repeated", lines)
