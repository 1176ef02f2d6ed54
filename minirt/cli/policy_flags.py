"""The flags of KV policies: one for each parameter that any policy has."""

from __future__ import annotations

import functools
from typing import Any

import click

_PREFIX = "policy_"  # of the names that click knows them by
_DEFAULT = "  [default: "  # where the help of a parameter says what it is if it is not given


class PolicyCommand(click.Command):
    """A command that has these flags, and takes those given as `flags`: (parameter, text) pairs.

    They are made when the command is called or its help asked for, because importing the policies takes a while.
    """

    @functools.cached_property
    def policy_flags(self) -> list[click.Option]:
        from ..policies import POLICIES
        from ..policies.base import flag, parameters

        fields = {name: field for policy in POLICIES.values() for name, field in parameters(policy).items()}
        return [
            click.Option([flag(name), _PREFIX + name], multiple=True, metavar=_metavar(field), help=_help(name))
            for name, field in fields.items()
        ]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *self.policy_flags]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        names = [str(option.name) for option in self.policy_flags]
        given = {name.removeprefix(_PREFIX): ctx.params.pop(name) or () for name in names}
        ctx.params["flags"] = [(name, value) for name, values in given.items() for value in values]
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from ..policies import POLICIES

        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        ours = [option for option in options if option in self.policy_flags or "--policy" in option.opts]
        with formatter.section("Options"):
            formatter.write_dl(_records(ctx, [option for option in options if option not in ours]))
        with formatter.section("KV policy"):
            formatter.write_text(
                f"NAME is one of {', '.join(POLICIES)}. In brackets are the policies that have a flag, and its default."
            )
            formatter.write_dl(_records(ctx, ours))


def _records(ctx: click.Context, options: list[click.Option]) -> list[tuple[str, str]]:
    return [record for option in options if (record := option.get_help_record(ctx))]


def _metavar(field: Any) -> str:
    kinds = {int: "N", float: "X"}
    number = [] if field.metadata["kind"] is str else [kinds.get(field.metadata["kind"], "N|1/N|NMiB")]
    return "|".join([*number, *field.metadata["of"]])


def _help(name: str) -> str:
    """What a parameter is, and in brackets the policies that have it, with their defaults."""
    from ..policies import POLICIES
    from ..policies.base import parameters

    texts: dict[str, dict[str, list[str]]] = {}  # text -> default -> policies
    for policy in POLICIES.values():
        field = parameters(policy).get(name)
        if field is not None:
            text, _, shown = field.metadata["help"].partition(_DEFAULT)
            default = field.default
            shown = shown.rstrip("]") or (f"{default:.4g}" if isinstance(default, float) else str(default))
            texts.setdefault(text, {}).setdefault(shown, []).append(policy.name)
    return "  ".join(f"{text}  [{_defaults(defaults)}]" for text, defaults in texts.items())


def _defaults(defaults: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(policies)}: {shown}" for shown, policies in defaults.items())
