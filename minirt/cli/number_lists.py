"""Options that take lists of numbers, as llama-bench's do: 512, 128,256, 1-4, 0-4096+1024, 1-64*2."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import click

MAX_NUMBER = 1 << 24
MAX_NUMBERS = 1000  # in one list

_RANGE = re.compile(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?", re.ASCII)


def expand(text: str) -> Iterator[int]:
    """The numbers of a list as llama-bench takes it: "512", "128,256", "1-4", "0-4096+1024", "1-64*2".

    Raises ValueError where it is none, or a range that does not move on.
    """
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ValueError(part)
        first, operator, step = int(match[1]), match[3] or "+", int(match[4] or 1)
        last = first if match[2] is None else int(match[2])
        number = first
        while True:
            yield number
            following = number + step if operator == "+" else number * step
            if last < first or following <= number:
                raise ValueError(part)
            if following > last:
                break
            number = following


def numbers(low: int, high: Callable[[], int] = lambda: MAX_NUMBER) -> Callable[..., list[int]]:
    """A callback: all numbers of a repeated option, each within low..high."""

    def check(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> list[int]:
        out: list[int] = []
        for value in values:
            try:
                out += itertools.islice(expand(value), MAX_NUMBERS + 1 - len(out))
            except ValueError:
                raise click.BadParameter(
                    f"'{value}' is not a list of numbers such as 512 or 128,256 or 1-8 or 0-4096+1024 or 1-64*2."
                ) from None
            for number in out:
                if not low <= number <= high():
                    raise click.BadParameter(f"{number} is out of range ({low} to {high()}).")
            if len(out) > MAX_NUMBERS:
                raise click.BadParameter(f"'{value}' is more than {MAX_NUMBERS} numbers.")
        return out

    return check


def usable_cpus() -> int:
    from ..devices import usable_cpus

    return usable_cpus()


def list_option(
    names: str, default: str, text: str, callback: Callable[..., Any], shown: str = "", metavar: str = "N,..."
) -> Any:
    """An option that takes a list and may be repeated."""
    text += f"  [default: {shown or default}]" if shown or default else ""
    values = (default,) if default else ()
    return click.option(*names.split(), multiple=True, default=values, callback=callback, metavar=metavar, help=text)
