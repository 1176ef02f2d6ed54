"""`minirt eval`: what KV policies cost in quality, task by task."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..progress import Progress, duration
from .bench_output import FORMATS
from .eval_output import check_writable, open_results, save_plot
from .options import KV_DEFAULT, KV_HELP, Engine, model_argument
from .policy_flags import PolicyCommand
from .terminal import read_file

if TYPE_CHECKING:
    from ..eval import Example, Results, Setup, Task
    from ..llama import Llama

MAX_TEXT = 64 << 20  # bytes
MIN_LENGTH, MAX_LENGTH = 64, 1 << 24  # tokens
MAX_EXAMPLES = 100_000
STEP = 8  # a decode step takes as long as so many tokens of a prompt, roughly: for the time that is left


def _names(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> list[str]:
    """All names of a repeated option, each once."""
    return list(dict.fromkeys(name.strip() for value in values for name in value.split(",")))


def _within(low: int, high: int) -> Callable[..., int | None]:
    def check(ctx: click.Context, option: click.Parameter, value: int | None) -> int | None:
        if value is not None and not low <= value <= high:
            raise click.BadParameter(f"{value} is out of range ({low} to {high}).")
        return value

    return check


@click.command(
    "eval",
    cls=PolicyCommand,
    epilog="""\b
Examples:
  minirt eval                                              every task, dense attention
  minirt eval --task repetition,qa --policy dense,sparq:r=16:k=128 -n 16
  minirt eval --policy dense,h2o,tova --budgets 1/2,1/4,1/8 --save eval.jsonl --plot eval.png
  minirt eval model.gguf --task qa --file dev-v1.1.json -n 100 --save squad.jsonl
""",
)
@model_argument
@click.option(
    "--task", "tasks", multiple=True, default=("repetition,needle,qa,summary,bpc",), metavar="NAME,...",
    callback=_names, help="What to ask: repetition, needle, qa, summary, bpc.  [default: all]",
)  # fmt: skip
@click.option(
    "--policy", "policies", multiple=True, default=("dense",), metavar="NAME,...", callback=_names,
    help="Which cached tokens are kept and read, also as NAME:r=16.  [default: dense]",
)  # fmt: skip
@click.option(
    "--budgets", multiple=True, metavar="N,...", callback=_names,
    help="Runs each policy that keeps only so many tokens once for each of these budgets, if it is named without one: "
    "tokens, or fractions such as 1/8, which are of each prompt here.",
)  # fmt: skip
@click.option(
    "-n", "--examples", "n_examples", type=int, default=8, metavar="N", callback=_within(1, MAX_EXAMPLES),
    help="Examples of each task.  [default: 8]",
)  # fmt: skip
@click.option(
    "--length", type=int, metavar="N", callback=_within(MIN_LENGTH, MAX_LENGTH),
    help="Tokens of each context, about.  [default: 2048, or what the model allows]",
)  # fmt: skip
@click.option(
    "--file", "-f", "paths", multiple=True, metavar="FILE",
    help="What to make examples of, instead of minirt's own: plain text (repetition, needle, bpc), a SQuAD JSON (qa), "
    "JSON of articles and summaries (summary). May be repeated.",
)  # fmt: skip
@click.option("--seed", "-s", type=int, default=0, metavar="N", help="Chooses other examples.  [default: 0]")
@click.option("--no-context", is_flag=True, help="Also asks each question without its context, of dense attention.")
@click.option(
    "--save", type=click.Path(path_type=Path), metavar="FILE",
    help="Keeps each example's result in FILE (JSON lines) and leaves out those that are there already.",
)  # fmt: skip
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE",
    help="Draws scores over cache bytes read, as PNG. Needs matplotlib: pip install 'minirt[plot]'",
)  # fmt: skip
@click.option(
    "--kv",
    default="auto",
    metavar="TYPE",
    help=f"{KV_HELP}  [default: {KV_DEFAULT}]",
)
@click.option(
    "--device", default="auto", metavar="NAME",
    help="auto, cpu, gpu, or reference (NumPy: slow, exact).  [default: auto]",
)  # fmt: skip
@click.option("--threads", "-t", type=int, metavar="N", help="CPU threads.  [default: physical cores]")
@click.option(
    "--ctx", "-c", "n_ctx", type=int, metavar="N", callback=_within(MIN_LENGTH, MAX_LENGTH),
    help="Context length in tokens.  [default: 256 more than --length]",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Choice(list(FORMATS)), default="md", metavar="FORMAT",
    help="md, csv, json or jsonl.  [default: md]",
)  # fmt: skip
def evaluate(
    model: str | None,
    tasks: list[str],
    policies: list[str],
    flags: list[tuple[str, str]],
    budgets: list[str],
    n_examples: int,
    length: int | None,
    paths: tuple[str, ...],
    seed: int,
    no_context: bool,
    save: Path | None,
    plot: Path | None,
    kv: str,
    device: str,
    threads: int | None,
    n_ctx: int | None,
    output: str,
) -> None:
    """Measures what KV-cache policies cost in quality.

    Each task puts questions on a context: repeat a passage of it (repetition), find a sentence in it (needle), answer
    from one of its paragraphs (qa), sum it up (summary), predict how it goes on (bpc, bits per character: less is
    better). Every policy gets the same examples. Policies act from the second token of the answer on, those with a
    window on the context too.

    The table has means and their standard errors; "vs dense" is the mean difference on the same examples; S the mean
    length of the prompt in tokens; KV read the bytes of cache that a token needs, as a share of what dense attention
    reads; KV held the memory of the cache.
    """
    from ..eval import BASELINE, NO_CONTEXT, File, Results, Setup, expand, make_tasks
    from ..eval.plot import check_matplotlib
    from ..llama import default_model_path

    grid = expand(policies, budgets, flags)
    made = make_tasks(tasks, [File(path, read_file(path, MAX_TEXT)) for path in paths])
    if plot is not None:
        check_matplotlib()
        check_writable(plot)
    path = Path(model if model is not None else default_model_path())
    with Results(save) as results:
        with Progress("making the examples"):
            setup = Setup.of(path, kv, made, n_examples, seed, length, n_ctx)
        setup.check(grid)
        engine = Engine(policy=BASELINE, kv=setup.kv, device=device, threads=threads, n_ctx=setup.n_ctx)
        with engine.load(str(path)) as llama:
            with Progress("compiling the policies' kernels"):
                for policy in grid:
                    llama.warm_up(policy)
            asked = [*grid, NO_CONTEXT] if no_context else grid
            records = _run(llama, setup, list(itertools.product(made, asked)), results, output)
    if plot is not None:
        save_plot(plot, records, f"{records[0]['model_type']}, {setup.kv} cache")


def _run(
    llama: Llama, setup: Setup, cells: Sequence[tuple[Task, str]], results: Results, output: str
) -> list[dict[str, Any]]:
    """Prints a record for each cell, also for the one that an error or Ctrl-C interrupts; returns them."""
    from ..eval import record, run

    missing = [e for task, policy in cells for e in setup.missing(task.name, policy, results)]
    clock, records = _Clock(missing), []
    width = max(len(policy) for _, policy in cells)
    with open_results(output, width) as write, Progress("", " tokens") as progress:
        for task, policy in cells:
            progress.label = f"{task.name}, {policy}: {clock}"
            try:
                for example in run(llama, setup, task, policy, results, progress):
                    clock.done(example)
                    progress.label = f"{task.name}, {policy}: {clock}"
            finally:
                progress.close()
                found = record(llama, setup, task, policy, results)
                if found is not None:
                    write(found)
                    records.append(found)
    return records


class _Clock:
    """Counts examples, and tells from those that are done how long the others will take."""

    def __init__(self, examples: Sequence[Example]):
        self.n, self.total, self.begun = len(examples), sum(map(_cost, examples)), time.perf_counter()
        self.n_done = self.cost_done = 0

    def done(self, example: Example) -> None:
        self.n_done += 1
        self.cost_done += _cost(example)

    def __str__(self) -> str:
        text = f"example {min(self.n_done + 1, self.n)} of {self.n}"
        if not self.cost_done:
            return text
        left = (time.perf_counter() - self.begun) / self.cost_done * (self.total - self.cost_done)
        return f"{text}, about {duration(left)} left"


def _cost(example: Example) -> int:
    return len(example.prompt) + STEP * example.n_gen
