"""Adaptive k beside a fixed k at equal bytes: tables of paper_report.py."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from paper_results import Quality, Row
from paper_tables import table

MORE = 1.02  # bytes of a fixed k over those of an adaptive one, at most, to be called equal

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


def lower_than_fixed(measured: Mapping[str, Row]) -> tuple[int, int, int]:
    """Adaptive points below the line of a fixed k with the same r, those that no fixed k beats, and all of them."""
    found: dict[str, dict[bool, list[tuple[float, float]]]] = {}
    for policy, row in measured.items():
        match = _SPARQ.fullmatch(policy)
        if match:
            of_r = found.setdefault(match[1] or "", {True: [], False: []})
            of_r[match[2] == "auto"].append((row["kv_bytes_read"], row["kld"]))
    every = [point for of_r in found.values() for point in of_r[False]]
    below = unbeaten = total = 0
    for of_r in found.values():
        nbytes, divergence = np.array(sorted(of_r[False])).T
        for own, kld in of_r[True]:
            below += bool(np.log(kld) < np.interp(own, nbytes, np.log(divergence)))
            unbeaten += not any(other <= own and d <= kld for other, d in every)
            total += 1
    return below, unbeaten, total
