"""The tables of paper_report.py: what `minirt bandwidth` measured beside what papers say, and its price in quality."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from paper_numbers import DENSE_LINES, FIGURE_9, IPU, KEEPKV, PALU, SPARQ_CPU, SPARQ_GPU, TOVA
from paper_results import HEAD_DIM, RANDOM, RESULTS, SMALL_HEAD_DIM, Quality, Row, Rows, prices_of, repeated

SPARSE, SMALL, CODED = "sparq:r=32:k=128", "sparq:r=16:k=64", "sparq:r=32:k=128:k_index=q4"
ONE_SMALL, ONE_LAYOUT = f"{SMALL}:k_index=none", f"{SPARSE}:k_index=none"
FIGURE_9_POLICY, FIGURE_10_POLICY = "sparq:r=d/12:k=S/12", "sparq:r=16:k=S/16"
MHA, GQA, MODEL, GQA_MODEL = "32/32x128", "32/8x128", "7b Q8_0, 4 layers", "8b-gqa Q8_0, 4 layers"
ALONE = {"benchmark": "attention", "kv": "f16"}
WHOLE = {"benchmark": "end-to-end", "batch": 1, "kv": "f16", "context": RANDOM}


def table(head: str, rows: Iterable[Sequence[str]]) -> str:
    """Markdown. head: the titles, with " | " between them."""
    lines = [f"| {head} |", f"|{' --- |' * len(head.split(' | '))}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def quartiles(row: Row) -> str:
    return f"{ms(row['ms'])} ({ms(row['ms_low'])}-{ms(row['ms_high'])})"


def of_most(speed_up: float, most: float) -> str:
    """Speed-up, what it could be by the bytes, and what part of it that is."""
    return f"{speed_up:.2f}x of {most:.2f}x ({percent(speed_up / most)})"


def gain(row: Row) -> str:
    return of_most(row["speed_up"], row["ratio_of_bytes"])


def over_limit(row: Row) -> float:
    """A model's time over what its bytes take at the memory's speed."""
    return 1e-3 * float(row["ms"]) * row["memory_bytes_per_second"] / (row["weight_bytes"] + row["kv_bytes"])


# -- attention alone ---------------------------------------------------------------------------------------------------


def attention(rows: Rows, quality: Quality) -> str:
    sparse, lines = (SMALL, ONE_SMALL, SPARSE, ONE_LAYOUT, CODED), []
    for depth, cell in rows.by_depth(("dense", *sparse), **ALONE, model=MHA, batch=1).items():
        dense, *others = SPARQ_CPU.get(depth, (math.nan,))
        theirs = {policy: times(dense / ms) for policy, ms in zip((SMALL, ONE_SMALL, SPARSE), others, strict=False)}
        lines += [
            [
                str(depth), f"`{policy}`", ms(row["ms"]), f"{row['percent_of_memory']:.0f} %", gain(row),
                theirs.get(policy, "-"), quality.of(policy, depth, HEAD_DIM),
            ]
            for policy, row in ((policy, cell[policy]) for policy in ("dense", *sparse))
        ]  # fmt: skip
    return table("S | policy | ms | of memory | speed-up of the ratio of bytes | authors | quality", lines)


def over_dense(dense: float, *others: float) -> str:
    return " / ".join(times(dense / other) for other in others)


def batches(rows: Rows, quality: Quality) -> str:
    lines = []
    for (n_seq, depth), (a100, a10g) in SPARQ_GPU.items():
        cell = rows.by_depth(("dense", SPARSE, ONE_LAYOUT), **ALONE, model=MHA, batch=n_seq).get(depth)
        if cell is not None:
            lines.append([
                str(n_seq), str(depth), ms(cell["dense"]["ms"]), gain(cell[SPARSE]), gain(cell[ONE_LAYOUT]),
                over_dense(*a100), "-" if a10g is None else over_dense(*a10g), quality.of(SPARSE, depth, HEAD_DIM),
            ])  # fmt: skip
    head = "B | S | dense ms | r=32 k=128 | ... one layout of K | authors, A100: two / one | authors, A10G | quality"
    return table(head, lines)


def grouped(rows: Rows, quality: Quality) -> str:
    found = rows.by_depth(("dense", SPARSE, CODED), **ALONE, model=GQA, batch=1)
    lines = [
        [str(s), ms(cell["dense"]["ms"]), gain(cell[SPARSE]), gain(cell[CODED]), quality.of(SPARSE, s, HEAD_DIM)]
        for s, cell in found.items()
    ]
    return table("S | dense ms | r=32 k=128 | ... 4-bit index | quality of the first", lines)


def every_policy(rows: Rows) -> list[Row]:
    """Those of the cell that compares most policies, at S = 8192."""
    cells = rows.cells(**ALONE, model=MHA, batch=1, depth=8192)
    return list(max(reversed(cells), key=len, default={}).values())


def policies(rows: Rows, quality: Quality) -> str:
    lines = [
        [
            f"`{r['policy']}`", ms(r["ms"]), f"{r['percent_of_memory']:.0f} %", gain(r),
            f"{r['bytes_formula'] / 1e6:.2f} / {r['bytes_read'] / 1e6:.2f}",
            quality.of(r["policy"], r["depth"], HEAD_DIM),
        ]
        for r in every_policy(rows)
    ]  # fmt: skip
    return table("policy | ms | of memory | speed-up | MB by formula / touched | quality", lines)


def caches(rows: Rows, quality: Quality) -> str:
    own: dict[str, Any] = {"benchmark": "attention", "model": MHA, "batch": 1, "depth": 16384}
    found = {kv: rows.by_depth(("dense", SPARSE), **own, kv=kv).get(16384) for kv in ("f16", "q8_0", "q4_0")}
    lines = []
    for kv, cell in found.items():
        for policy in ("dense", SPARSE):
            if cell is not None and found["f16"] is not None:
                row, base = cell[policy], found["f16"]["dense"]
                over = times(base["ms"] / row["ms"]), times(base["bytes_formula"] / row["bytes_formula"])
                price = quality.of(policy, quality.n_ctx, SMALL_HEAD_DIM, kv)
                lines.append([kv, f"`{policy}`", ms(row["ms"]), " of ".join(over), price])
    return table("kv | policy | ms | over dense f16 | quality", lines)


# -- whole models ------------------------------------------------------------------------------------------------------


def models(rows: Rows, quality: Quality, model: str, policy: str, paper: dict[int, Any], short: bool = False) -> str:
    """paper: {S: speed-up, or (dense, sparse) ms}. short: without what the model of all layers takes."""
    head, lines = [], []
    for depth, cell in rows.by_depth(("dense", policy), **WHOLE, model=model).items():
        dense, row, theirs = cell["dense"], cell[policy], paper.get(depth)
        columns = {
            "S": str(depth), "dense ms (quartiles)": quartiles(dense),
            "of memory, dense": f"{dense['percent_of_memory']:.0f} %", "sparse ms (quartiles)": quartiles(row),
            "over byte limit": times(over_limit(row)), "speed-up of theory": of_most(row["speed_up"], row["theory"]),
            "32 layers: ms": f"{ms(dense['full_ms'])} / {ms(row['full_ms'])}",
            "32 layers: speed-up of theory": of_most(row["full_speed_up"], row["full_theory"]),
            "paper": times(theirs[0] / theirs[1] if isinstance(theirs, tuple) else theirs),
            "quality": quality.of(policy, depth, HEAD_DIM),
        }  # fmt: skip
        if short:
            del columns["32 layers: ms"]
        head = list(columns)
        lines.append(list(columns.values()))
    return f"{quality.sentence(policy, HEAD_DIM)}\n\n{table(' | '.join(head), lines)}"


def others(rows: Rows) -> str:
    """What papers say beside their tables: dense attention by the context, a machine of another kind."""
    cells = rows.by_depth(("dense",), **WHOLE, model=MODEL)
    lines = [
        [f"dense, seconds of a token at S, llama.cpp, {name}", f"{a:.3g} S + {b:.3g}", "-"]
        for name, (a, b) in DENSE_LINES.items()
    ]
    fits = {
        "dense, the same, fork of llama.cpp, EPYC (figure 9)": {s: dense for s, (dense, _) in FIGURE_9.items()},
        "dense, the same, 32 layers": {s: cell["dense"]["full_ms"] for s, cell in cells.items()},
    }
    for i, (what, points) in enumerate(fits.items()):
        if len(points) > 1:
            line = "{:.3g} S + {:.3g}".format(*np.polyfit([*points], [1e-3 * ms for ms in points.values()], 1))
            lines.append([what, *((line, "-") if i == 0 else ("-", line))])
    depth, dense, sparse = IPU
    own = rows.by_depth(("dense", SPARSE), **ALONE, model=MHA, batch=1).get(depth)
    ours = "-" if own is None else gain(own[SPARSE])
    lines.append([f"attention alone, r=32 k=128, S = {depth}, IPU with remote memory", times(dense / sparse), ours])
    return table("what | paper | ours", lines)


def machine(measured: Sequence[Row]) -> str:
    """What `minirt bandwidth machine` says."""
    lines = [
        [str(m["threads"]), f"{m['read_bytes_per_second'] / 1e9:.1f}", f"{m['copy_bytes_per_second'] / 1e9:.1f}"]
        for m in measured
    ]
    return table("threads | read GB/s | copied GB/s, both sides", lines)


def real(rows: Rows, quality: Quality, context: str = RANDOM) -> str:
    lines = [
        [
            str(depth), f"`{r['policy']}`", f"{r['tokens_per_second']:.0f}",
            f"{times(r['speed_up'])} of {times(r['theory'])}", quality.of(r["policy"], depth, SMALL_HEAD_DIM),
        ]
        for depth, cell in rows.by_depth(("dense",), **{**WHOLE, "context": context}, model=rows.file_model).items()
        for r in cell.values()
    ]  # fmt: skip
    return table("S | policy | tokens/s | speed-up of theory | quality", lines)


def throughput(rows: Rows, quality: Quality) -> str:
    own: dict[str, Any] = {"benchmark": "throughput", "model": rows.file_model}
    same_batch, lines = rows.by_depth(("dense",), **own, same="batch"), []
    for depth, cell in rows.by_depth(("dense",), **own, same="memory").items():
        for policy, row in cell.items():
            equal = same_batch.get(depth, {}).get(policy)
            lines.append([
                f"`{policy}`", str(row["n_sequences"]), f"{row['tokens_per_second']:.0f}", times(row["speed_up"]),
                times(equal and equal["speed_up"]), times(_papers_throughput(policy)),
                quality.of(policy, depth, SMALL_HEAD_DIM),
            ])  # fmt: skip
    head = "policy | sequences | tokens/s | over dense, same memory | ... same batch | papers, same memory | quality"
    return table(head, lines)


def _papers_throughput(policy: str) -> float | None:
    budget = re.fullmatch(r"tova:budget=(\d+)", policy)
    if budget:
        return TOVA[int(budget[1])][1]
    name = policy.partition(":")[0]
    return KEEPKV[name] / KEEPKV["dense"] if name in KEEPKV and "1/5" in policy else None


def palu(measured: Row, quality: Quality) -> str:
    dense = measured["caches"]["f16"]["attention_ms_per_layer"]
    half = {p["kv"]: p for p in quality.low_rank if (p["policy"], p["keep"]) == ("dense", 0.5)}
    lines = [
        [
            kv, ms(row["attention_ms_per_layer"]), times(dense / row["attention_ms_per_layer"]),
            " / ".join(times(x) for x in PALU.get(kv, (None,))),
            prices_of(half[kv]) if kv in half else quality.of("dense", measured["depth"], HEAD_DIM, kv),
        ]
        for kv, row in measured["caches"].items()
    ]  # fmt: skip
    return table("kv | ms a layer | over f16 | paper, RTX 4090, 64k: attention / model | quality", lines)


# -- quality over bytes ------------------------------------------------------------------------------------------------


def frontier(points: Sequence[Row], axis: str, cost: str = "kld") -> list[Row]:
    """Points of which no other has both fewer bytes and less divergence, or more characters repeated (cost:
    "repetition")."""
    sign = -1 if cost == "repetition" else 1
    out: list[Row] = []
    for point in sorted(points, key=lambda p: (p[axis], sign * p[cost])):
        if not out or sign * point[cost] < sign * out[-1][cost]:
            out.append(point)
    return out


def kv_of(point: Row) -> str:
    """The KV type, and how much of the rank Palu kept."""
    return f"{point['kv']}, {percent(point['keep'])} of the rank" if "keep" in point else str(point["kv"])


def prices(points: Sequence[Row]) -> str:
    """What they read, hold, and cost."""
    lines = [
        [
            f"`{p['policy']}`", kv_of(p), percent(p["read"]), percent(p["held"]), f"{p['kld']:.4f}",
            f"{100 * p['same_top']:.1f} %", repeated(p),
        ]
        for p in points
    ]  # fmt: skip
    return table("policy | kv | read | held | KL divergence | same token | repeated", lines)


def load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())
