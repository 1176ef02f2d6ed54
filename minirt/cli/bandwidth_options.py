"""What the benchmarks of `minirt bandwidth` are given: options that they share, and a model of a file or at random."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ModelError, UsageError
from ..progress import Progress
from .bench_output import FORMATS
from .number_lists import list_option, numbers
from .options import KV_HELP, Command, Engine, gather
from .terminal import read_file

if TYPE_CHECKING:
    from ..bandwidth.grid import Machine
    from ..decoder import Decoder

MAX_TEXT = 64 << 20  # bytes
MAX_LAYERS = 1000
BASELINE = "dense"


@dataclasses.dataclass(frozen=True)
class Common:
    """What the three benchmarks have in common."""

    policies: tuple[str, ...]
    kvs: tuple[str, ...]
    batches: list[int]
    depths: list[int]
    rounds: int
    device: str
    threads: int | None
    save: Path | None
    output: str


def names(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for value in values for name in value.split(",")))


def _with_dense(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((BASELINE, *names(ctx, option, values))))


def common_options(policies: str, batch: str, depth: str, rounds: int) -> Callable[[Command], Callable[..., Any]]:
    """Adds what the benchmarks share, with defaults of their own; the command takes it as `common`."""
    options = [
        click.option(
            "--policy", "policies", multiple=True, default=(policies,), metavar="NAME,...", callback=_with_dense,
            help="What is compared with dense attention, also as NAME:r=16; S/12 and d/12 are shares of the depth and "
            f"of the size of a head.  [default: {policies}]",
        ),
        click.option(
            "--kv", "kvs", multiple=True, default=("f16",), metavar="TYPE,...", callback=names,
            help=f"{KV_HELP}  [default: f16]",
        ),
        list_option("-b --batch batches", batch, "Sequences that are decoded together.", numbers(1)),
        list_option("-d --depth depths", depth, "Tokens in the context.", numbers(2)),
        click.option(
            "--rounds", type=click.IntRange(1, 10_000), default=rounds, metavar="N",
            help=f"Turns of each policy that count.  [default: {rounds}]",
        ),
        click.option("--device", default="auto", metavar="NAME", help="auto, cpu, gpu, or reference.  [default: auto]"),
        click.option("--threads", "-t", type=int, metavar="N", help="CPU threads.  [default: physical cores]"),
        click.option(
            "--save", type=click.Path(path_type=Path), metavar="FILE",
            help="Keeps each result in FILE (JSON lines) and leaves out those that are there already.",
        ),
        click.option(
            "-o", "--output", type=click.Choice(list(FORMATS)), default="md", metavar="FORMAT",
            help="md, csv, json or jsonl.  [default: md]",
        ),
    ]  # fmt: skip

    return gather("common", options, Common)


def model_options(command: Command) -> Callable[..., Any]:
    """Adds MODEL, or a random one instead."""
    for option in (
        click.option("--layers", type=click.IntRange(1, MAX_LAYERS), metavar="N", help="... with so many layers."),
        click.option("--type", "kind", default="Q8_0", metavar="TYPE", help="... F16, Q8_0 or Q4_0.  [default: Q8_0]"),
        click.option(
            "--shape", metavar="NAME",
            help="Random weights instead of a file: 7b, 8b-gqa, llama-1b, smollm2-135m or tiny.",
        ),
        click.argument("model", required=False),
    ):  # fmt: skip
        command = option(command)
    return command


def machine_of(ops: Any, common: Common) -> Machine:
    from ..bandwidth.grid import Machine
    from ..devices import physical_cores

    return Machine(ops, common.threads or physical_cores())


class Loaded:
    """A model on its device, of a file or of random weights. A context manager."""

    decoder: Decoder
    machine: Machine
    name: str
    full_layers: int  # of the model that it stands for
    fingerprint = ""  # of a file that is not the default one

    def __init__(self, model: str | None, shape: str | None, kind: str, layers: int | None, common: Common):
        if shape is not None and model is not None:
            raise UsageError("--shape goes without a MODEL")
        if shape is None and layers is not None:
            raise UsageError("--layers goes with --shape")
        self._file: Any = None
        self._load_file(model, common) if shape is None else self._make(shape, kind, layers, common)

    def _load_file(self, model: str | None, common: Common) -> None:
        from ..eval.results import fingerprint
        from ..llama import MIN_CONTEXT

        llama = Engine(BASELINE, common.kvs[0], common.device, common.threads, MIN_CONTEXT).load(model)
        self._file, self.decoder, self.name = llama, llama.decoder, llama.file.path.name
        self.full_layers = llama.config.n_layer
        if model is not None:
            self.fingerprint = fingerprint(llama.file.path)
        self.machine = machine_of(llama.decoder.ops, common)

    def _make(self, shape: str, kind: str, layers: int | None, common: Common) -> None:
        from ..bandwidth.synthetic import TYPES, config_of, weight_bytes, weights_of
        from ..decoder import Decoder
        from ..devices import open_ops
        from ..policies import Dense

        if kind not in TYPES:
            raise UsageError(f"--type {kind} is not one of: {', '.join(TYPES)}")
        config = config_of(shape, layers)
        ops = open_ops(common.device, common.threads)
        self.machine, self.full_layers = machine_of(ops, common), config_of(shape).n_layer
        need, room = weight_bytes(config, kind), self.machine.room()
        if need > room:
            sizes = f"the weights need {need / 2**30:.1f} GiB, {room / 2**30:.1f} GiB are free"
            raise ModelError(f"--shape {shape}: {sizes} (see --layers)")
        with Progress("making random weights"):
            self.decoder = Decoder(config, weights_of(ops, config, kind), ops, Dense())
        self.name = f"{shape} {kind}, {config.n_layer} layers"

    def tokens(self, path: str, n: int) -> list[int]:
        """The first n tokens of a text."""
        if self._file is None:
            raise UsageError("--text goes with a MODEL")
        text = read_file(path, MAX_TEXT).decode(errors="replace")
        found: list[int] = self._file.tokenize(text)[:n]
        if len(found) < n:
            raise ModelError(f"{path}: {len(found)} tokens, and the context shall have {n}")
        return found

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
