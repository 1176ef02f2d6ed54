"""What was aimed at, and what was reached: a table of paper_report.py, misses included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paper_adaptive import lower, pairs
from paper_results import Row, Rows
from paper_tables import ALONE, FIGURE_9_POLICY, MHA, MODEL, SPARSE, WHOLE, every_policy, over_limit, percent, table

EVICTING = ("h2o", "tova", "d2o")
OF_THEORY, OVER_LIMIT, OF_BYTES = 0.85, 1.3, 0.8


Reached = tuple[str, str, bool]  # what was wanted, what was reached, whether that is enough


def targets(rows: Rows, before: Rows, adaptive: Mapping[str, Row]) -> str:
    """before: of an earlier version, on another machine. adaptive: the policies of adaptive_k.json."""
    found, earlier = _speeds(rows), _speeds(before)
    every = every_policy(rows)
    other = [row["policy"] for row in every if row["bytes_formula"] != row["bytes_read"]]
    explained = all(policy.startswith(EVICTING) for policy in other)  # they read positions and sums, too: see below
    reached = f"{len(every) - len(other)} of {len(every)} policies exactly" + ", the others explained" * explained
    found["bytes by formula and as touched"] = "alike, or explained", reached, explained
    beside = pairs(adaptive)
    for kind, of in (("same", "of the same r"), ("best", "of the best r for these bytes")):
        below = lower(adaptive, beside, kind)
        found[f"adaptive k, equal bytes: divergence below that of a fixed k {of}"] = (
            "all points", f"{below} of {len(beside)}", below == len(beside)
        )  # fmt: skip
    lines = [
        [work, wanted, reached, "yes" if met else "**no**", earlier[work][1] if work in earlier else "-"]
        for work, (wanted, reached, met) in found.items()
    ]
    return table("work | target | reached | met | before", lines)


def _speeds(rows: Rows) -> dict[str, Reached]:
    """By the work."""
    alone = "attention alone, r=32 k=128, S = {}: speed-up over ratio of bytes"
    figure_9, over_bytes = (
        "figure 9, S = {}: speed-up over theory",
        "7B shape, r=32 k=128, S = {}: time over byte limit",
    )
    found: dict[str, Reached] = {}
    for work, depths, wanted in (
        (figure_9, (32768, 131072), f"{percent(OF_THEORY)} or more"), (over_bytes, (32768,), f"{OVER_LIMIT}x or less"),
        (alone, (16384, 65536), f"{OF_BYTES} or more"),
    ):  # fmt: skip
        found |= {work.format(depth): (wanted, "not measured", False) for depth in depths}

    def reached(work: str, depth: int, value: str, met: bool) -> None:
        if (name := work.format(depth)) in found:
            found[name] = found[name][0], value, met

    own: dict[str, Any] = {**WHOLE, "model": MODEL}
    for depth, cell in rows.by_depth(("dense", FIGURE_9_POLICY), **own).items():
        share = cell[FIGURE_9_POLICY]["speed_up"] / cell[FIGURE_9_POLICY]["theory"]
        reached(figure_9, depth, percent(share), share >= OF_THEORY)
    for depth, cell in rows.by_depth(("dense", SPARSE), **own).items():
        over = over_limit(cell[SPARSE])
        reached(over_bytes, depth, f"{over:.2f}x", over <= OVER_LIMIT)
    for depth, cell in rows.by_depth(("dense", SPARSE), **ALONE, model=MHA, batch=1).items():
        share = cell[SPARSE]["speed_up"] / cell[SPARSE]["ratio_of_bytes"]
        reached(alone, depth, f"{share:.2f}", share >= OF_BYTES)
    return found
