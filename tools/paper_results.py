"""What was measured, as paper_report.py reads it: times by the cell they are of, quality by shares of a model."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

from minirt.bandwidth.attention import resolve

RESULTS = Path(__file__).with_name("results")
HEAD_DIM = 128  # of the shapes whose speed is measured
SMALL_HEAD_DIM = 64  # of SmolLM2, whose quality is
RANDOM = "random"  # a cache of random numbers
NEAR = math.log2(1.1)  # shares that differ by less are the same
FAR = math.log2(2)  # of those that differ by more one says nothing of the other

Row = dict[str, Any]
Cell = dict[str, Row]  # of each policy that was timed in turn with the others

_CELL = (
    "benchmark", "model", "fingerprint", "context", "kv", "batch", "depth", "rounds", "steps", "most", "same",
    "dense_ms",
)  # fmt: skip


class Rows:
    """What `minirt bandwidth --save` kept. Shares of the memory's speed are of one speed for all: a cell's own sample
    may be of a moment when others had the memory, or left all of it."""

    def __init__(self, path: Path):
        self.all: list[Row] = [json.loads(line) for line in path.read_text().splitlines()]
        samples = {tuple(r.get(name) for name in _CELL): r["memory_bytes_per_second"] for r in self.all}
        self.samples: list[float] = sorted(samples.values())
        self.peak = statistics.median(self.samples) if samples else math.nan
        for row in self.all:
            row |= {"memory_bytes_per_second": self.peak}
            if "gb_per_s" in row:
                row["percent_of_memory"] = 100 * row["gb_per_s"] * 1e9 / self.peak

    def find(self, **wanted: Any) -> list[Row]:
        return [row for row in self.all if all(row.get(name) == value for name, value in wanted.items())]

    def cells(self, **wanted: Any) -> list[Cell]:
        """In the order of the file; the time of dense attention tells those of the same settings apart."""
        made: dict[tuple[Any, ...], Cell] = {}
        for row in self.find(**wanted):
            made.setdefault(tuple(row.get(name) for name in _CELL), {})[row["policy"]] = row
        return list(made.values())

    def by_depth(self, policies: Iterable[str], **wanted: Any) -> dict[int, Cell]:
        """The newest cell of each depth that has all these policies."""
        needed = set(policies)
        found = {next(iter(c.values()))["depth"]: c for c in self.cells(**wanted) if needed <= c.keys()}
        return dict(sorted(found.items()))

    @property
    def file_model(self) -> str:
        """The file of the real model whose speed was measured."""
        return next((row["model"] for row in reversed(self.all) if ".gguf" in row["model"]), "")

    @property
    def text(self) -> str:
        """The text that was read into a cache, if one was."""
        return next((row["context"] for row in reversed(self.all) if row["context"] != RANDOM), "")


class Quality:
    """What policies cost on a real model: points of policy and KV type."""

    def __init__(self, path: Path):
        self.data: Row = json.loads(path.read_text())
        self.every: list[Row] = self.data["points"]
        self.points = [p for p in self.every if "keep" not in p]
        self.low_rank = [p for p in self.every if "keep" in p]  # of copies of the model that Palu made
        self.n_ctx: int = self.data["n_ctx"]
        self.dense = next(p for p in self.points if (p["policy"], p["kv"]) == ("dense", "f16"))

    def nearest(self, policy: str, depth: int, head_dim: int, kv: str = "f16") -> tuple[Row, tuple[str, ...]] | None:
        """The point of nearest shares of the head and the context, and those of its shares that are others; None if
        none is near."""
        words, wanted = shares(policy, depth, head_dim)
        best, found = math.inf, None
        for point in self.points:
            own_words, own = shares(point["policy"], self.n_ctx, SMALL_HEAD_DIM)
            if (own_words, own.keys(), point["kv"]) != (words, wanted.keys(), kv):
                continue
            far = {name: abs(math.log2(own[name] / wanted[name])) for name in own}
            if sum(far.values()) < best and max(far.values(), default=0) <= FAR:
                best = sum(far.values())
                found = point, tuple(share(name, own[name]) for name in own if far[name] > NEAR)
        return found

    def of(self, policy: str, depth: int, head_dim: int, kv: str = "f16") -> str:
        """Divergence, same most likely token, characters repeated, and at what shares if at others."""
        found = self.nearest(policy, depth, head_dim, kv)
        if found is None:
            return "not measured"
        p, others = found
        return f"{prices_of(p)} ({', '.join(others)})" if others else prices_of(p)

    def sentence(self, policy: str, head_dim: int) -> str:
        """The same in words, of a context as long as was measured."""
        found = self.nearest(policy, self.n_ctx, head_dim)
        if found is None:
            return "Quality was not measured."
        p = found[0]
        parts = (share(*part) for part in shares(p["policy"], self.n_ctx, SMALL_HEAD_DIM)[1].items())
        return (
            f"Quality at {', '.join(parts)} on {self.data['model']} (`{p['policy']}`, heads of {SMALL_HEAD_DIM}, "
            f"{self.n_ctx} tokens): KL divergence {p['kld']:.3f}, same most likely token {100 * p['same_top']:.0f} %, "
            f"characters repeated {repeated(p)} (dense: {repeated(self.dense)})."
        )


def shares(policy: str, depth: int, head_dim: int) -> tuple[tuple[str, ...], dict[str, float]]:
    """A policy's name and what else is no number; r as a share of the head, k and the budget of the context."""
    name, *parameters = resolve(policy, depth, head_dim).split(":")
    words, numbers = [name], {}
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key == "budget" and "/" in value:
            numbers[key] = float(Fraction(value))
        elif key in ("r", "k", "budget") and value.isdecimal():
            numbers[key] = int(value) / (head_dim if key == "r" else depth)
        elif parameter != "k_index=none":  # the same keys, in fewer places
            words.append(parameter)
    return tuple(words), numbers


def share(name: str, value: float) -> str:
    return f"{name} = {'d' if name == 'r' else 'S'}/{1 / value:.3g}"


def prices_of(point: Row) -> str:
    return f"{point['kld']:.3f} / {100 * point['same_top']:.0f} % / {repeated(point)}"


def repeated(point: Row) -> str:
    return f"{point['repetition']:.1f} ± {point['repetition_error']:.1f}"
