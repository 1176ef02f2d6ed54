"""Adaptive k beside a fixed k at equal bytes: tables of paper_report.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from paper_results import Quality, Row
from paper_tables import table

MORE = 1.02  # bytes of a fixed k over those of an adaptive one, at most, to be called equal

_SPARQ = re.compile(r"sparq:r=(\d+):k=(auto|\d+)(?::eps=[\d.]+)?")


class Beside(NamedTuple):
    """An adaptive point, and the fixed ones that read as many bytes, or a few more: of the same r, and the best of
    any."""

    r: str
    auto: str  # policies
    same: str
    best: str


def adaptive(measured: Mapping[str, Row]) -> str:
    """Each adaptive point and what was measured at as many bytes."""
    lines = [
        [
            f"`{pair.auto}`", f"{measured[pair.auto]['kv_bytes_read'] / 2**20:.2f}", _kld(measured[pair.auto]),
            *(f"{_kld(measured[other])} (`{other}`)" for other in (pair.same, pair.best)),
            f"{less_than_best(measured, pair):+.0f} %",
        ]
        for pair in pairs(measured)
    ]  # fmt: skip
    return table("adaptive | MiB for a token | KL divergence | fixed, same r | best fixed | adaptive over best", lines)


def others(measured: Mapping[str, Row]) -> str:
    """Those that are no `sparq`."""
    lines = [
        [f"`{policy}`", f"{row['kv_bytes_read'] / 2**20:.2f}", _kld(row), f"{100 * row['same_top']:.1f} %"]
        for policy, row in measured.items()
        if not policy.startswith("sparq")
    ]
    return table("rule | MiB for a token | KL divergence | same token", lines)


def pairs(measured: Mapping[str, Row]) -> list[Beside]:
    """By the bytes."""
    found = []
    for auto, row in sorted(measured.items(), key=lambda item: item[1]["kv_bytes_read"]):
        match = _SPARQ.fullmatch(auto)
        if match is None or match[2] != "auto":
            continue
        as_much = [other for other in measured if _is_fixed(other) and _as_much(measured[other], row)]
        same = [other for other in as_much if other.startswith(f"sparq:r={match[1]}:")]
        if same:
            found.append(Beside(match[1], auto, _least(measured, same), _least(measured, as_much)))
    return found


def less_than_best(measured: Mapping[str, Row], pair: Beside) -> float:
    """By how many percent an adaptive point's divergence differs from that of the best fixed one."""
    return float(100 * (measured[pair.auto]["kld"] / measured[pair.best]["kld"] - 1))


def lower(measured: Mapping[str, Row], of: list[Beside], kind: str) -> int:
    """How many adaptive points have less divergence than those beside them. kind: a field of Beside."""
    return sum(measured[pair.auto]["kld"] < measured[getattr(pair, kind)]["kld"] for pair in of)


def by_r(measured: Mapping[str, Row]) -> str:
    """How many have, by their r."""
    found = pairs(measured)
    lines = []
    for r in sorted({pair.r for pair in found}, key=int):
        own = [pair for pair in found if pair.r == r]
        lines.append([r, *(f"{lower(measured, own, kind)} of {len(own)}" for kind in ("same", "best"))])
    return table("r of heads of 64 | below a fixed k of the same r | below the best fixed one", lines)


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


def _kld(row: Row) -> str:
    return f"{row['kld']:.4f} ± {row['kld_error']:.4f}"


def _is_fixed(policy: str) -> bool:
    match = _SPARQ.fullmatch(policy)
    return match is not None and match[2] != "auto"


def _as_much(fixed: Row, auto: Row) -> bool:
    return bool(1 <= fixed["kv_bytes_read"] / auto["kv_bytes_read"] <= MORE)


def _least(measured: Mapping[str, Row], policies: list[str]) -> str:
    return min(policies, key=lambda policy: measured[policy]["kld"])
