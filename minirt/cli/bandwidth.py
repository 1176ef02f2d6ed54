"""`minirt bandwidth`: what KV policies gain, beside the bytes they must move and what the memory can."""

from __future__ import annotations

import functools
import itertools
import re
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from ..progress import Progress, duration
from .bandwidth_options import BASELINE, Common, Loaded, common_options, machine_of, model_options, names
from .bandwidth_output import open_rows
from .bench_output import FORMATS
from .number_lists import list_option, numbers, usable_cpus
from .terminal import say

if TYPE_CHECKING:
    from ..bandwidth.grid import Cell, Machine

_HEADS = re.compile(r"(\d{1,4})(?:/(\d{1,4}))?x(\d{1,4})", re.ASCII)


@click.group("bandwidth", invoke_without_command=True)
@click.pass_context
def bandwidth(ctx: click.Context) -> None:
    """Measures what KV policies gain, beside the bytes they move.

    Policies are timed in turn with dense attention on the same keys and values. Tables show medians, what was read as a
    share of what the memory can, and the speed-up beside the ratio of the bytes, which is the most it could be.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@bandwidth.command(short_help="Memory read and copied per second.")
@list_option("-t --threads threads", "", "CPU threads.", numbers(1, usable_cpus), "1, and physical cores")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, gpu, or reference.  [default: auto]")
@click.option(
    "-o", "--output", type=click.Choice(list(FORMATS)), default="md", metavar="FORMAT",
    help="md, csv, json or jsonl.  [default: md]",
)  # fmt: skip
def machine(threads: list[int], device: str, output: str) -> None:
    """Memory that is read, and copied (both sides count), per second."""
    from ..bandwidth.grid import Machine
    from ..devices import open_ops, physical_cores

    counts = list(dict.fromkeys(threads or (1, physical_cores())))
    with open_rows(output, "machine", 0) as write:
        for row in Machine(open_ops(device, max(counts)), max(counts)).measure(counts):
            write(row)


@bandwidth.command(
    short_help="Attention alone.",
    epilog="""\b
Examples:
  minirt bandwidth attention
  minirt bandwidth attention --heads 32x128,32/8x128 -b 1,16 -d 4096-65536*2 --policy sparq:r=32:k=128 --save a.jsonl
  minirt bandwidth attention -d 7168 --heads 9/3x64 --kv f16,q8_0 --policy sparq:r=16:k=128,tova:budget=512
""",
)
@click.option(
    "--heads", "shapes", multiple=True, default=("32x128",), metavar="N/KVxD,...", callback=names,
    help="Query heads, KV heads if they are fewer, and the size of a head.  [default: 32x128]",
)  # fmt: skip
@common_options("sparq:r=32:k=128", "1", "4096,16384", 9)
def attention(shapes: tuple[str, ...], common: Common) -> None:
    """Attention alone, a layer of a decode step, on random keys and values.

    A step is the policy's own, with all that it keeps beside the cache; each is checked against the NumPy reference
    before it is timed.
    """
    from ..bandwidth import attention as benchmark
    from ..bandwidth.grid import Cell
    from ..devices import open_ops

    made = list(map(_heads, shapes))
    ops = open_ops(common.device, common.threads)
    here = machine_of(ops, common)
    cells, fit = [], _Fit(common.policies)
    for (n_head, n_head_kv, d), kv, batch, depth in itertools.product(made, common.kvs, common.batches, common.depths):
        what = benchmark.Cell(batch, depth, n_head, n_head_kv, d, kv)
        policies = fit(what, functools.partial(benchmark.policies_of, what))

        def measure(policies: Sequence[str], advance: Callable[[], None], what: Any = what) -> Any:
            return benchmark.measure(ops, what, policies, rounds=common.rounds, room=here.room(), advance=advance)

        cells.append(
            Cell(
                "attention", f"{n_head}/{n_head_kv}x{d}", "random", kv, batch, depth, common.rounds, policies, measure,
                benchmark.stages(policies, common.rounds),
            )
        )  # fmt: skip
    fit.tell()
    _run(cells, here, common)


@bandwidth.command(
    "end-to-end",
    short_help="The time of a token of a whole model.",
    epilog="""\b
Examples:
  minirt bandwidth end-to-end -d 1024,4096 --policy sparq:r=16:k=128,tova:budget=512
  minirt bandwidth end-to-end --shape 7b --layers 4 -d 4096-131072*2 --policy sparq:r=d/12:k=S/12 --save a.jsonl
  minirt bandwidth end-to-end model.gguf -d 4096 --text book.txt
""",
)
@model_options
@common_options("sparq:r=32:k=128", "1", "4096", 9)
@click.option(
    "--steps", type=click.IntRange(1, 1000), default=4, metavar="N", help="Tokens in each turn.  [default: 4]"
)
@click.option("--text", metavar="FILE", help="The context is this text, not a random cache.")
def end_to_end(
    model: str | None, shape: str | None, kind: str, layers: int | None, steps: int, text: str | None, common: Common
) -> None:
    """The time of a token of a whole model, at a depth of the context.

    A model of fewer layers stands for the whole one: its time is computed from a step without any layer and one with
    these.
    """
    from ..bandwidth import models
    from ..bandwidth.grid import Cell

    with Loaded(model, shape, kind, layers, common) as loaded:
        context = None if text is None else loaded.tokens(text, max(common.depths))
        cells, fit = [], _Fit(common.policies)
        for kv, batch, depth in itertools.product(common.kvs, common.batches, common.depths):
            work = models.Workload(batch, depth, kv, steps, common.rounds)
            policies = fit(work, functools.partial(models.policies_of, loaded.decoder, work))

            def measure(policies: Sequence[str], advance: Callable[[], None], work: Any = work) -> Any:
                return models.measure(
                    loaded.decoder, work, policies, room=loaded.machine.room(), full_layers=loaded.full_layers,
                    context=context and context[: work.depth], advance=advance,
                )  # fmt: skip

            cells.append(
                Cell(
                    "end-to-end", loaded.name, Path(text).name if text else "random", kv, batch, depth, common.rounds,
                    policies, measure, models.stages(policies, common.rounds),
                    settings={"steps": steps, "fingerprint": loaded.fingerprint + _digest(context, depth)},
                )
            )  # fmt: skip
        fit.tell()
        _run(cells, loaded.machine, common, loaded.full_layers != loaded.decoder.config.n_layer)


@bandwidth.command(
    short_help="Tokens per second of many sequences.",
    epilog="""\b
Examples:
  minirt bandwidth throughput -b 4 -d 4096 --policy window:budget=512,tova:budget=512,h2o:budget=512
""",
)
@model_options
@common_options("window:budget=512,h2o:budget=512,tova:budget=512", "2", "4096", 5)
@click.option(
    "--steps", type=click.IntRange(1, 1000), default=2, metavar="N", help="Tokens in each turn.  [default: 2]"
)
@click.option(
    "--most", type=click.IntRange(1, 65536), default=256, metavar="N", help="Sequences at most.  [default: 256]"
)
def throughput(
    model: str | None, shape: str | None, kind: str, layers: int | None, steps: int, most: int, common: Common
) -> None:
    """Tokens per second of many sequences: as many as dense has, and as many as fit into its memory."""
    from ..bandwidth import throughput as benchmark
    from ..bandwidth.grid import Cell
    from ..bandwidth.models import Workload, policies_of

    with Loaded(model, shape, kind, layers, common) as loaded:
        cells, fit = [], _Fit(common.policies)
        for kv, batch, depth in itertools.product(common.kvs, common.batches, common.depths):
            work = Workload(batch, depth, kv, steps, common.rounds)
            policies = fit(work, functools.partial(policies_of, loaded.decoder, work))

            def measure(policies: Sequence[str], advance: Callable[[], None], work: Any = work) -> Any:
                room = loaded.machine.room()
                return benchmark.measure(loaded.decoder, work, policies, room=room, most=most, advance=advance)

            cells.append(
                Cell(
                    "throughput", loaded.name, "random", kv, batch, depth, common.rounds, policies, measure,
                    benchmark.stages(policies, common.rounds), ("batch", "memory"),
                    {"steps": steps, "most": most, "fingerprint": loaded.fingerprint},
                )
            )  # fmt: skip
        fit.tell()
        _run(cells, loaded.machine, common)


def _heads(text: str) -> tuple[int, int, int]:
    match = _HEADS.fullmatch(text)
    n_head, n_head_kv, d = (int(x) for x in match.groups(match[1])) if match else (0, 0, 0)
    if not n_head or not n_head_kv or n_head % n_head_kv or not d or d % 2:
        raise UsageError(f"--heads {text} is not N/KVxD such as 32/8x128: query heads, a divisor of them, an even size")
    return n_head, n_head_kv, d


def _digest(context: Sequence[int] | None, depth: int) -> str:
    """Tells a text from others of its name."""
    return "" if context is None else f"{zlib.crc32(repr(context[:depth]).encode()):08x}"


def _run(cells: Sequence[Cell], here: Machine, common: Common, some_layers: bool = False) -> None:
    """Prints the rows of all cells, with a progress line; what Ctrl-C interrupts loses its own cell alone."""
    from ..bandwidth.grid import Rows, commit, known, run

    with Rows(common.save) as rows:
        kept = [known(cell, here, rows) for cell in cells]
        others = {row["commit"] for of_cell in kept for row in of_cell or ()} - {commit(), ""}
        if others:
            say(f"minirt: {common.save}: results of commit {', '.join(sorted(others))} are not measured again")
        clock = _Clock([cell for cell, of_cell in zip(cells, kept, strict=True) if of_cell is None])
        width = max(len(policy) for policy in common.policies)
        with open_rows(common.output, cells[0].benchmark, width, some_layers) as write, Progress("") as progress:
            for cell in cells:
                progress.label = f"{cell}{clock}"

                def advance(cell: Cell = cell) -> None:
                    clock.advance(cell)
                    progress.label = f"{cell}{clock}"
                    progress(clock.n, clock.total)

                for row in run([cell], here, rows, advance, lambda text: say(f"minirt: skipped: {text}")):
                    progress.close()
                    write(row)
                clock.end(cell)


class _Fit:
    """Which policies fit a cell; those that fit some cells are left out of the others, with a line."""

    def __init__(self, policies: tuple[str, ...]):
        self.policies, self.n = policies, 0
        self.others: dict[str, list[tuple[object, UsageError]]] = {}

    def __call__(self, cell: object, make: Callable[[Sequence[str]], object]) -> tuple[str, ...]:
        """make: raises UsageError for a policy that does not fit the cell."""
        self.n += 1
        out = []
        for text in self.policies:
            try:
                make([text])
            except UsageError as e:
                self.others.setdefault(text, []).append((cell, e))
            else:
                out.append(text)
        return tuple(out)

    def tell(self) -> None:
        """Raises UsageError for a policy that fits no cell, and for cells without dense attention."""
        for text, cells in self.others.items():
            if len(cells) == self.n or text == BASELINE:
                raise cells[0][1]
        for text, cells in self.others.items():
            for cell, e in cells:
                say(f"minirt: skipped: {cell}, {text}: {e}")


class _Clock:
    """Counts stages, and tells from those that are done how long the others will take."""

    def __init__(self, cells: Sequence[Cell]):
        self.left = {id(cell): cell.stages for cell in cells}
        self.total = sum(self.left.values())
        self.cost = sum(cell.stages * _cost(cell) for cell in cells)
        self.n = self.done = 0
        self.begun = time.perf_counter()

    def advance(self, cell: Cell) -> None:
        self.n += 1
        self.left[id(cell)] -= 1
        self.done += _cost(cell)

    def end(self, cell: Cell) -> None:
        """What is left of a cell, of one that was skipped all, will not be done."""
        n = self.left.pop(id(cell), 0)
        self.total -= n
        self.cost -= n * _cost(cell)

    def __str__(self) -> str:
        if not self.done:
            return ""
        left = (time.perf_counter() - self.begun) / self.done * max(self.cost - self.done, 0)
        return f", about {duration(left)} left"


def _cost(cell: Cell) -> int:
    return cell.batch * cell.depth + (1 << 14)
