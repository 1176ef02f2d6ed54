"""`minirt palu`: a model file with low-rank keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import UsageError
from ..progress import Progress
from .options import model_argument
from .terminal import read_file, say

if TYPE_CHECKING:
    from ..palu import Conversion

MAX_TEXT = 64 << 20  # bytes


def _group(ctx: click.Context, option: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == "all":
        return value
    if not value.isascii() or not value.isdigit():
        raise click.BadParameter(f"'{value}' is neither a number of KV heads nor all.")
    return int(value)


@click.command(
    "palu",
    epilog="""\b
Examples:
  minirt palu model.gguf -o model-palu.gguf
  minirt palu model.gguf -o half.gguf --keep 0.5 --allocate fisher --latent q4
  minirt palu model.gguf -o out.gguf --keep 0.7 --group all --calib mytext.txt --windows 128
""",
)
@model_argument
@click.option("-o", "--output", "out", required=True, metavar="OUT.gguf", help="The file to write; a new one.")
@click.option(
    "--keep", type=float, default=0.5, metavar="X", help="Share of the rank to keep, up to 1.  [default: 0.5]"
)
@click.option(
    "--group", metavar="N|all", callback=_group,
    help="KV heads factored together: more is better, and slower to use.  [default: 4, or the next that divides them]",
)  # fmt: skip
@click.option(
    "--allocate", default="prior", metavar="NAME",
    help="How keys, values and layers share the rank: uniform; prior (a quarter to keys); kl (by what cutting each "
    "does to the predictions); fisher (by gradients). The last two take minutes.  [default: prior]",
)  # fmt: skip
@click.option("--calib", "path", metavar="FILE", help="Text like what the model will read.  [default: minirt's own]")
@click.option(
    "--windows", "n_windows", type=int, default=64, metavar="N",
    help="How many windows of 1024 tokens of it to read.  [default: 64]",
)  # fmt: skip
@click.option(
    "--latent", default="f16", metavar="TYPE", help="How the cache holds latents: f16, q4 or q3.  [default: f16]"
)
@click.option("--hadamard/--no-hadamard", default=True, help="Rotate latents, for q4 and q3.  [default: on]")
@click.option("--threads", "-t", type=int, metavar="N", help="CPU threads.  [default: physical cores]")
def palu(
    model: str | None,
    out: str,
    keep: float,
    group: int | str | None,
    allocate: str,
    path: str | None,
    n_windows: int,
    latent: str,
    hadamard: bool,
    threads: int | None,
) -> None:
    """Writes a copy of a model with low-rank keys and values.

    This is Palu: the cache of the copy holds latents, from which keys and values are rebuilt as they are read. Each
    layer's projections to keys and values become two factors, chosen so that the least is lost on a calibration
    text. All else in the file stays as it is. What slow stages found is kept in OUT.gguf.part until the end: after
    Ctrl-C the same command goes on from there.
    """
    from ..llama import default_model_path
    from ..palu import convert

    if not out:
        raise UsageError("the name of the output is empty")
    text = read_file(path, MAX_TEXT) if path is not None else None
    with _Stages() as stages:
        try:
            result = convert(
                model if model is not None else default_model_path(),
                out,
                keep=keep,
                group=group,
                allocate=allocate,
                calibration=text,
                n_windows=n_windows,
                latent=latent,
                hadamard=hadamard,
                threads=threads,
                report=stages,
            )
        except KeyboardInterrupt:
            part = Path(out + ".part")
            stages.close()
            if part.exists():
                say(f"minirt: interrupted; {part} keeps what was found, the same command goes on from there")
            raise
    click.echo(_summary(out, result))


class _Stages:
    """A progress line for each stage."""

    def __init__(self) -> None:
        self.line: Progress | None = None

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, label: str, done: int, total: int) -> None:
        if self.line is None or self.line.label != label:
            self.close()
            self.line = Progress(label)
        self.line(done, total)

    def close(self) -> None:
        if self.line is not None:
            self.line.close()


def _summary(out: str, result: Conversion) -> str:
    grouping, (k, v) = result.grouping, result.ranks.T
    kept = result.ranks.mean() / grouping.width
    return "\n".join(
        [
            f"{out}: ranks of keys {_range(k)}, of values {_range(v)}, of {grouping.width} "
            f"({grouping.size} KV heads a group): {100 * kept:.1f} % kept",
            f"cache: {result.latent_bytes} bytes a token as {result.latent}, "
            f"{100 * result.latent_bytes / result.dense_bytes:.1f} % of the {result.dense_bytes} of a dense f16 cache",
        ]
    )


def _range(values: object) -> str:
    low, high = min(values), max(values)  # type: ignore[call-overload]
    return str(low) if low == high else f"{low} to {high}"
