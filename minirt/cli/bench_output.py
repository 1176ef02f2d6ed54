"""What `minirt bench` prints: a table that grows test by test, or records for programs."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import click

Record = dict[str, Any]  # of minirt.bench.record
FORMATS = ("md", "csv", "json", "jsonl")


class Column(NamedTuple):
    """Of the Markdown table: a right-aligned one ends its rule with a colon."""

    title: str
    width: int
    right: bool
    cell: Callable[[Record], str]


_COLUMNS = (
    Column("model", 24, False, lambda r: r["model_type"]),
    Column("size", 10, True, lambda r: _size(r["model_size"])),
    Column("params", 10, True, lambda r: _count(r["model_n_params"])),
    Column("backend", 10, False, lambda r: r["backends"]),
    Column("threads", 7, True, lambda r: str(r["n_threads"])),
    Column("policy", 10, False, lambda r: r["policy"]),
    Column("kv", 9, False, lambda r: r["type_k"] if r["type_k"] == r["type_v"] else f"{r['type_k']}/{r['type_v']}"),
    Column("batch", 5, True, lambda r: str(r["n_sequences"])),
    Column("test", 15, True, lambda r: _test(r)),
    Column("t/s", 18, True, lambda r: f"{r['avg_ts']:.2f} ± {r['stddev_ts']:.2f}"),
    Column("GB/s", 7, True, lambda r: _number(r["bytes_per_second"], 1e9, 2)),
    Column("% of bandwidth", 14, True, lambda r: _number(r["percent_of_memory"], 1, 1)),
)
OPTIONAL = ("policy", "kv", "batch")


@contextlib.contextmanager
def open_output(kind: str, optional: Collection[str], policy_width: int = 0) -> Iterator[Callable[[Record], None]]:
    """Yields a function that prints one record; json comes as a whole, also when an error or Ctrl-C ends the run.

    optional: which of the columns policy, kv and batch the Markdown table has. policy_width: of the longest policy.
    """
    columns = [c for c in _COLUMNS if c.title not in OPTIONAL or c.title in optional]
    with open_table(kind, columns, policy_width) as write:
        yield write


@contextlib.contextmanager
def open_table(kind: str, columns: Sequence[Column], policy_width: int = 0) -> Iterator[Callable[[Record], None]]:
    """`open_output` for records of other kinds, with the columns that their Markdown table has."""
    if kind == "json":
        records: list[Record] = []
        try:
            yield records.append
        finally:
            if records:
                click.echo(json.dumps(records, indent=2))
    elif kind == "jsonl":
        yield lambda record: click.echo(json.dumps(record))
    elif kind == "csv":
        yield _Csv()
    else:
        yield Markdown([c._replace(width=max(c.width, policy_width)) if c.title == "policy" else c for c in columns])


class _Csv:
    """A header and a line per record, as llama-bench's but flat; what does not apply is empty."""

    begun = False

    def __call__(self, record: Record) -> None:
        row = {name: value for name, value in record.items() if not isinstance(value, (dict, list))}
        text = io.StringIO()
        writer = csv.DictWriter(text, row, lineterminator="\n")
        if not self.begun:
            writer.writeheader()
        writer.writerow(row)
        self.begun = True
        click.echo(text.getvalue(), nl=False)


class Markdown:
    def __init__(self, columns: list[Column]):
        self.columns, self.begun = columns, False

    def __call__(self, record: Record) -> None:
        if not self.begun:
            rules = ["-" * (c.width - c.right) + ":" * c.right for c in self.columns]
            click.echo(f"{self._line([c.title for c in self.columns])}\n{self._line(rules)}")
            self.begun = True
        click.echo(self._line([c.cell(record) for c in self.columns]))

    def _line(self, cells: list[str]) -> str:
        padded = (f"{text:{'>' if c.right else '<'}{c.width}}" for text, c in zip(cells, self.columns, strict=True))
        return f"| {' | '.join(padded)} |"


def _test(record: Record) -> str:
    from ..bench import Workload

    return Workload(record["n_prompt"], record["n_gen"], record["n_depth"]).name


def _size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.2f} MiB"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"


def _number(value: float | None, unit: float, digits: int) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"
