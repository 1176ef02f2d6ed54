"""What `minirt eval` prints and draws: a table that grows cell by cell, records for programs, a figure."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..files import whole_file
from .bench_output import Column, open_table

Record = dict[str, Any]  # of minirt.eval.grid.record

_COLUMNS = (
    Column("task", 10, False, lambda r: r["task"]),
    Column("metric", 18, False, lambda r: r["metric"]),
    Column("policy", 10, False, lambda r: r["policy"]),
    Column("n", 4, True, lambda r: str(r["n_examples"])),
    Column("S", 6, True, lambda r: f"{r['n_prompt']:.0f}"),
    Column("score", 15, True, lambda r: _mean(r["score"], r["score_error"])),
    Column("vs dense", 16, True, lambda r: _mean(r["difference"], r["difference_error"], "+")),
    Column("KV read", 8, True, lambda r: _percent(r["share_of_dense"])),
    Column("KV held", 9, True, lambda r: f"{r['kv_bytes_held'] / 2**20:.1f} MiB"),
)


def open_results(kind: str, policy_width: int) -> contextlib.AbstractContextManager[Callable[[Record], None]]:
    """Yields a function that prints one record: a line of a Markdown table (md), or as `minirt bench` does."""
    return open_table(kind, _COLUMNS, policy_width)


def _mean(mean: float | None, error: float | None, sign: str = "") -> str:
    """Two decimals where the numbers are small."""
    if mean is None or error is None:
        return ""
    digits = 2 if abs(mean) < 20 else 1
    return f"{mean:{sign}.{digits}f} ± {error:.{digits}f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def check_writable(path: Path) -> None:
    """Raises ModelError if a file cannot be written there, before time is spent on what it shall hold."""
    if (path.exists() and not path.is_file()) or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ModelError(f"{path}: cannot write")


def save_plot(path: Path, records: Sequence[Record], title: str) -> None:
    from ..eval.plot import write_png

    with whole_file(path) as file:
        write_png(records, file, title)
