"""Adaptive k beside a fixed k at equal bytes: tables of paper_report.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from paper_results import Quality, Row
from paper_tables import table

MORE = 1.02  # bytes of a fixed k over those of an adaptive one, at most, to be called equal

Point = tuple[float, float]  # bytes, divergence

_SPARQ = re.compile(r"sparq(:r=\d+)?:k=(auto|\d+)(?::eps=[\d.]+)?")


def adaptive(measured: Mapping[str, Row]) -> str:
    """Rows for each head by their weight, beside as many for all: sorted by the bytes."""
    lines = [
        [
            f"`{policy}`", f"{row['kv_bytes_read'] / 2**20:.2f}", f"{row['kld']:.4f} ± {row['kld_error']:.4f}",
            f"{100 * row['same_top']:.1f} %",
        ]
        for policy, row in sorted(measured.items(), key=lambda item: item[1]["kv_bytes_read"])
    ]  # fmt: skip
    return table("policy | MiB read for a token | KL divergence | same token", lines)


def beside_fixed(quality: Quality) -> str:
    """The best fixed k, of any r, that reads no more than an adaptive one with the same KV type and index."""
    lines = []
    for auto in quality.points:
        if ":k=auto" not in auto["policy"]:
            continue
        fixed = [
            p for p in quality.points
            if p["policy"].startswith("sparq:") and ":k=auto" not in p["policy"] and p["kv"] == auto["kv"]
            and ("k_index" in p["policy"]) == ("k_index" in auto["policy"]) and p["read"] <= MORE * auto["read"]
        ]  # fmt: skip
        best = min(fixed, key=lambda p: p["kld"], default=None)
        shown = ["-"] * 3 if best is None else _point(best)
        lines.append([auto["kv"], *_point(auto), *shown])
    return table("kv | adaptive | read | KL divergence | best fixed | read | KL divergence", lines)


def _point(p: Row) -> list[str]:
    return [f"`{p['policy']}`", f"{100 * p['read']:.1f} %", f"{p['kld']:.4f}"]


class Beside(NamedTuple):
    """Adaptive points that have less divergence than a fixed k with as many bytes, and how many there are."""

    same_r: int  # than one of the same r
    best_r: int  # than one of whatever r is best
    total: int


def lower_than_fixed(measured: Mapping[str, Row]) -> dict[str, Beside]:
    """By r, and of all: points beside lines through those of a fixed k."""
    auto, fixed = _points(measured, True), _points(measured, False)
    best, found = _best(fixed), {}
    for r, points in auto.items():
        same, other = (sum(_over(p, line) < 1 for p in points) for line in (fixed[r], best))
        found[r] = Beside(same, other, len(points))
    return found | {"all": Beside(*np.sum(list(found.values()), axis=0).tolist())}


def less_than_best(measured: Mapping[str, Row], r: str) -> str:
    """By how much adaptive points of that r have less divergence than a fixed k of the best one, with as many bytes."""
    best = _best(_points(measured, False))
    less = [100 * (1 - _over(p, best)) for p in _points(measured, True)[r]]
    return f"{min(less):.0f} to {max(less):.0f} %"


def _points(measured: Mapping[str, Row], adaptive: bool) -> dict[str, list[Point]]:
    """By r."""
    found: dict[str, list[Point]] = {}
    for policy, row in measured.items():
        match = _SPARQ.fullmatch(policy)
        if match and (match[2] == "auto") == adaptive:
            found.setdefault(match[1] or "", []).append((row["kv_bytes_read"], row["kld"]))
    return found


def _best(fixed: Mapping[str, list[Point]]) -> list[Point]:
    """Those that no other beats in both."""
    every = [point for points in fixed.values() for point in points]
    return [p for p in every if not any(_beats(q, p) for q in every)]


def _beats(p: Point, q: Point) -> bool:
    return p != q and p[0] <= q[0] and p[1] <= q[1]


def _over(point: Point, line: list[Point]) -> float:
    """A point's divergence over the line's at as many bytes."""
    nbytes, divergence = np.array(sorted(line)).T
    return point[1] / float(np.exp(np.interp(point[0], nbytes, np.log(divergence))))
