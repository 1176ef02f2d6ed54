"""The cells of a grid, one after the other: those that are known are left out, those too large are skipped."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..bench import cpu_name
from ..ops import Ops
from ..records import Records
from ..version import __version__
from .attention import BASELINE
from .caches import NoRoom
from .memory import available_memory, copy_bandwidth, memory_bandwidth, read_bandwidth

FREE_SHARE = 0.9  # of the memory that is free, that caches may take
LIBRARIES = ("numpy", "numba", "cupy-cuda12x", "cupy-cuda13x")

Record = dict[str, Any]
Advance = Callable[[], None]


class Rows(Records):
    """What was measured: a row for each policy of a cell."""

    key = (
        "benchmark", "version", "device", "threads", "model", "context", "kv", "batch", "depth", "rounds", "policy",
        "same",
    )  # fmt: skip
    numbers = ("threads", "batch", "depth", "ms")
    program = "minirt bandwidth"


@dataclass(frozen=True)
class Cell:
    """Policies that are compared, and on what."""

    benchmark: str  # attention, end-to-end, throughput
    model: str  # a file's name, or a shape
    context: str  # random, or a text's name
    kv: str
    batch: int
    depth: int
    rounds: int
    policies: tuple[str, ...]  # dense the first
    measure: Callable[[Sequence[str], Advance], list[Record]]
    stages: int  # how often it calls what it is given
    same: tuple[str, ...] = ("",)  # of each policy's records

    def key(self, policy: str, same: str, machine: Machine) -> Record:
        return {
            "benchmark": self.benchmark, "version": __version__, "device": machine.name, "threads": machine.threads,
            "model": self.model, "context": self.context, "kv": self.kv, "batch": self.batch, "depth": self.depth,
            "rounds": self.rounds, "policy": policy, "same": same,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{self.benchmark}, {self.model}, B={self.batch}, S={self.depth}, {self.kv}"


class Machine:
    """The device, as it is told of in each row."""

    def __init__(self, ops: Ops, threads: int):
        self.ops, self.threads = ops, threads
        self.name = ops.device_name or cpu_name()

    def bandwidth(self) -> float:
        """Bytes that its memory moves per second, now."""
        return memory_bandwidth(self.ops, self.threads)

    def room(self) -> int:
        """Bytes that caches may take."""
        own = self.ops.memory()
        return int(FREE_SHARE * (available_memory() if own is None else own[0]))

    def facts(self) -> Record:
        return {
            "date": time.strftime("%Y-%m-%d"), "os": platform.platform(), "python": platform.python_version(),
            "backend": self.ops.name, "versions": versions(), "commit": commit(), "seed": 0,
        }  # fmt: skip

    def measure(self, threads: Sequence[int]) -> Iterator[Record]:
        """What the memory does, by the number of threads; a card's as a whole."""
        for n in [self.threads] if self.ops.memory() else threads:
            read = self.ops.bandwidth() or read_bandwidth(n, self.ops.name)
            copied = None if self.ops.memory() else copy_bandwidth(n)
            yield {
                "benchmark": "machine", "device": self.name, "threads": n, "read_bytes_per_second": read,
                "copy_bytes_per_second": copied, **self.facts(),
            }  # fmt: skip


def known(cell: Cell, machine: Machine, rows: Rows) -> list[Record] | None:
    """The rows of a cell, if all were measured before."""
    found = [rows.find(**cell.key(policy, same, machine)) for same in cell.same for policy in cell.policies]
    return None if None in found else [row for row in found if row is not None]


def run(
    cells: Iterable[Cell], machine: Machine, rows: Rows, advance: Advance, skip: Callable[[str], None]
) -> Iterator[Record]:
    """Yields the rows of all cells, and adds those that are new. skip: told of a cell that the memory does not hold."""
    facts = machine.facts()
    for cell in cells:
        found = known(cell, machine, rows)
        if found is not None:
            yield from found
            continue
        limit = machine.bandwidth()
        try:
            measured = cell.measure(cell.policies, advance)
        except NoRoom as e:
            skip(str(e))
            continue
        dense = next(row["ms"] for row in measured if row["policy"] == BASELINE)
        for row in measured:
            own = cell.key(row["policy"], row.get("same", ""), machine) | row
            own |= {"dense_ms": dense, "memory_bytes_per_second": limit}
            own["percent_of_memory"] = 100 * row["gb_per_s"] * 1e9 / limit
            rows.add(own | facts)
            yield own | facts


def versions() -> dict[str, str]:
    """Of minirt and of what computes."""
    out = {"minirt": __version__}
    for name in LIBRARIES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def commit() -> str:
    """Of the checkout that this is; empty where it is none."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()
