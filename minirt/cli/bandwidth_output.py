"""What `minirt bandwidth` prints: a table for each benchmark, or records for programs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from .bench_output import Column, Record, open_table

_WHERE = (
    Column("model", 14, False, lambda r: r["model"]),
    Column("kv", 10, False, lambda r: r["kv"]),
    Column("S", 6, True, lambda r: str(r["depth"])),
    Column("policy", 10, False, lambda r: r["policy"]),
)
_SPEED = (
    Column("ms", 22, True, lambda r: f"{_digits(r['ms'])} ({_digits(r['ms_low'])}-{_digits(r['ms_high'])})"),
    Column("GB/s", 6, True, lambda r: f"{r['gb_per_s']:.1f}"),
    Column("% of memory", 11, True, lambda r: f"{r['percent_of_memory']:.0f}"),
    Column("speed-up", 8, True, lambda r: f"{r['speed_up']:.2f}x"),
)
COLUMNS = {
    "machine": (
        Column("device", 10, False, lambda r: r["device"]),
        Column("threads", 7, True, lambda r: str(r["threads"])),
        Column("read GB/s", 9, True, lambda r: f"{r['read_bytes_per_second'] / 1e9:.1f}"),
        Column("copy GB/s", 9, True, lambda r: _billions(r["copy_bytes_per_second"])),
    ),
    "attention": (
        *_WHERE,
        Column("B", 3, True, lambda r: str(r["batch"])),
        Column("MB", 8, True, lambda r: f"{r['bytes_read'] / 1e6:.2f}"),
        Column("formula", 8, True, lambda r: f"{r['bytes_formula'] / 1e6:.2f}"),
        *_SPEED,
        Column("bytes", 6, True, lambda r: f"{r['ratio_of_bytes']:.2f}x"),
        Column("of it", 5, True, lambda r: f"{100 * r['speed_up'] / r['ratio_of_bytes']:.0f} %"),
    ),
    "end-to-end": (
        *_WHERE,
        Column("B", 3, True, lambda r: str(r["batch"])),
        *_SPEED,
        Column("theory", 6, True, lambda r: f"{r['theory']:.2f}x"),
    ),
    "throughput": (
        *_WHERE,
        Column("same", 6, False, lambda r: r["same"]),
        Column("B", 4, True, lambda r: str(r["n_sequences"])),
        Column("cache MiB", 9, True, lambda r: f"{r['cache_bytes'] / 2**20:.1f}"),
        Column("t/s", 7, True, lambda r: f"{r['tokens_per_second']:.1f}"),
        *_SPEED,
    ),
}
_WHOLE = (
    Column("all layers: ms", 14, True, lambda r: _digits(r["full_ms"])),
    Column("speed-up", 8, True, lambda r: f"{r['full_speed_up']:.2f}x"),
    Column("theory", 6, True, lambda r: f"{r['full_theory']:.2f}x"),
)


def open_rows(
    kind: str, benchmark: str, policy_width: int, some_layers: bool = False
) -> contextlib.AbstractContextManager[Callable[[Record], None]]:
    """Yields a function that prints one row: a line of a Markdown table (md), or as `minirt bench` does.

    some_layers: whether models have fewer layers than those that they stand for.
    """
    return open_table(kind, COLUMNS[benchmark] + _WHOLE * some_layers, policy_width)


def _digits(ms: float) -> str:
    """Three digits and more."""
    return f"{ms:.1f}" if ms >= 100 else f"{ms:.2f}" if ms >= 10 else f"{ms:.4f}"


def _billions(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.1f}"
