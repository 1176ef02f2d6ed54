"""The cells of a grid, one after the other: those that are known are left out, those too large are skipped."""

from __future__ import annotations

import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from ..bench import cpu_name
from ..ops import Ops
from ..records import Records
from ..version import __version__
from .attention import BASELINE
from .caches import NoRoom
from .memory import available_memory, copy_bandwidth, memory_bandwidth, read_bandwidth
from .synthetic import SEED

FREE_SHARE = 0.9  # of the memory that is free, that caches may take
RESULTS_APART = ":(top,exclude)tools/results"
LIBRARIES = ("numpy", "numba", "cupy-cuda12x", "cupy-cuda13x")

Record = dict[str, Any]
Advance = Callable[[], None]


class Rows(Records):
    """What was measured: a row for each policy of a cell."""

    key = (
        "benchmark", "version", "device", "threads", "model", "context", "kv", "batch", "depth", "rounds", "policy",
        "same", "steps", "most", "fingerprint", "beside",
    )  # fmt: skip
    # of rows that were kept before these fields were: as the default model and options have them
    defaults: ClassVar[Record] = {"steps": 0, "most": 256, "fingerprint": "", "beside": ""}
    numbers = (
        "threads", "batch", "depth", "rounds", "ms", "ms_low", "ms_high", "gb_per_s", "percent_of_memory", "speed_up",
    )  # fmt: skip
    of_benchmark: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("bytes_read", "bytes_formula", "ratio_of_bytes"),
        "end-to-end": ("theory", "full_ms", "full_speed_up", "full_theory"),
        "throughput": ("n_sequences", "cache_bytes", "tokens_per_second"),
    }
    program = "minirt bandwidth"

    def check(self, row: Record) -> None:
        """All that is printed of it: texts, and numbers above 0."""
        super().check(row)
        of_row = [float(row[name]) for name in (*self.numbers, *self.of_benchmark[row["benchmark"]])]
        texts = all(isinstance(row[name], str) for name in ("model", "context", "kv", "policy", "same"))
        if not texts or not all(0 < number < math.inf for number in of_row):
            raise ValueError


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
    settings: Mapping[str, Any] = field(default_factory=dict)  # others of its own: fields of Rows.defaults

    def key(self, policy: str, same: str, machine: Machine) -> Record:
        return {
            "benchmark": self.benchmark, "version": __version__, "device": machine.name, "threads": machine.threads,
            "model": self.model, "context": self.context, "kv": self.kv, "batch": self.batch, "depth": self.depth,
            "rounds": self.rounds, "policy": policy, "same": same, "beside": " ".join(self.policies), **self.settings,
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
            "backend": self.ops.name, "versions": versions(), "commit": commit(), "seed": SEED,
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
    """The rows of a cell, if all were measured before, in turn."""
    every = [rows.find(**cell.key(policy, same, machine)) for same in cell.same for policy in cell.policies]
    found = [row for row in every if row is not None]
    return found if len(found) == len(every) else None


def run(
    cells: Iterable[Cell], machine: Machine, rows: Rows, advance: Advance, skip: Callable[[str], None]
) -> Iterator[Record]:
    """Yields the rows of all cells, and adds those that are new. skip: told of a cell that the memory does not hold.

    That is known before it is allocated, as far as caches go; what else runs out of memory ends its cell alone.
    """
    facts = machine.facts()
    for cell in cells:
        found = known(cell, machine, rows)
        if found is not None:
            yield from found
            continue
        try:
            limit = machine.bandwidth()
            measured = cell.measure(cell.policies, advance)
            limit = max(limit, machine.bandwidth())  # others may have had the memory the first time
        except NoRoom as e:
            skip(str(e))
            continue
        except MemoryError:
            skip(f"{cell}: out of memory")
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
    """Of the checkout that this is, "-dirty" if anything but results differs from it; empty where it is none."""

    def git(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)

    try:
        found, changed = git("describe", "--always"), git("diff", "--quiet", "HEAD", "--", ":/", RESULTS_APART)
    except OSError:
        return ""
    return "" if found.returncode else found.stdout.strip() + "-dirty" * bool(changed.returncode)
