"""Options that several commands share, and what becomes of them: an Engine that loads the model, a Sampling."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import DeviceError, UsageError
from ..progress import Progress
from .terminal import argument_text, say

if TYPE_CHECKING:
    from ..auto import Auto
    from ..llama import Llama
    from ..policies import Policy

Command = TypeVar("Command", bound=Callable[..., Any])

model_argument = click.argument("model", required=False)
KV_HELP = "How keys and values are stored: f32, f16, q8_0, q4_0; of a `minirt palu` file palu, latent-f16, -q4 or -q3."
KV_DEFAULT = "f16; palu of a file that has it"
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
stats_option = click.option(
    "--stats/--no-stats", default=True, help="Speed and memory, a line on stderr.  [default: on]"
)


@dataclass(frozen=True)
class Engine:
    """How to compute: what `Llama.load` takes besides the file."""

    policy: str | Policy | Auto
    kv: str
    device: str
    threads: int | None
    n_ctx: int
    chat_template: str | None = None

    def template_source(self, model: str | None) -> str:
        """The chat template that would be used; nothing but the file's tables is read."""
        from ..chat_template import load_template
        from ..gguf_file import GGUFFile
        from ..llama import default_model_path

        with GGUFFile.open(model if model is not None else default_model_path()) as file:
            return load_template(self.chat_template, file.metadata).source

    def load(self, model: str | None) -> Llama:
        """The model, ready, with a progress line."""
        from ..auto import Auto

        if isinstance(self.policy, Auto):
            return self._settled(self.policy, model).load(model)
        try:
            return self._loaded(model, self.policy)
        except DeviceError as e:
            if self.device != "auto":
                raise
            say(f"minirt: {e}; the CPU computes")
        return replace(self, device="cpu")._loaded(model, self.policy)

    def _loaded(self, model: str | None, policy: str | Policy) -> Llama:
        with Progress("loading the model", " tensors") as progress:
            from ..llama import Llama

            llama = Llama.load(
                model,
                n_ctx=self.n_ctx,
                policy=policy,
                kv=self.kv,
                device=self.device,
                threads=self.threads,
                chat_template=self.chat_template,
                progress=progress,
            )
        try:
            with Progress("compiling kernels"):
                llama.warm_up()
        except BaseException:
            llama.close()
            raise
        if llama.n_ctx > llama.config.n_ctx_train:
            trained = llama.config.n_ctx_train
            say(f"minirt: --ctx {llama.n_ctx} is more than the {trained} tokens the model was trained for")
        return llama

    def _settled(self, wanted: Auto, model: str | None) -> Engine:
        """With the policy and the KV type that --policy auto stands for, which a line on stderr tells."""
        from ..auto import choose, read_per_token, reason
        from ..bandwidth import read_bandwidth
        from ..config import ModelConfig
        from ..devices import has_card, physical_cores
        from ..gguf_file import GGUFFile
        from ..llama import DEFAULT_CONTEXT, default_model_path
        from ..stores import AUTO, get_stores, stores_text

        with GGUFFile.open(model if model is not None else default_model_path()) as file:
            config, weights = ModelConfig.from_gguf(file), read_per_token(file)
        n_ctx = self.n_ctx or min(config.n_ctx_train, DEFAULT_CONTEXT)
        device = ("gpu" if has_card() else "cpu") if self.device == "auto" else self.device
        kv = AUTO if self.kv == f"{AUTO}/{AUTO}" else stores_text(*get_stores(self.kv, config.palu))
        chosen = choose(wanted, config, n_ctx, weights, kv, device)
        limit = read_bandwidth(self.threads or physical_cores()) if device == "cpu" else None
        say(f"minirt: --policy auto: {reason(chosen, config, n_ctx, limit)}")
        return replace(self, policy=chosen.policy, kv=chosen.kv)


def engine_options(
    n_ctx: int = 0, templates: bool = True, auto: bool = False
) -> Callable[[Command], Callable[..., Any]]:
    """Adds --policy, --kv, --kv-k, --kv-v, --device, --threads, --ctx and --chat-template to a PolicyCommand.

    It takes them and the flags of its policy as `engine`. auto: also --policy auto, with --speed and --kv-bytes.
    """
    ctx_default = str(n_ctx) if n_ctx else "the model's, at most 8192"
    options = [
        _option("--policy", str, "dense", "Which cached tokens are kept and read, also as NAME:r=16.", metavar="NAME"),
        _option("--kv", str, "auto", KV_HELP, KV_DEFAULT, metavar="TYPE"),
        _option("--kv-k", str, None, "... keys, if not as values.", metavar="TYPE"),
        _option("--kv-v", str, None, "... values, if not as keys.", metavar="TYPE"),
        _option("--device", str, "auto", "auto, cpu, gpu, or reference (NumPy: slow, exact).", metavar="NAME"),
        _option("--threads -t", int, None, "CPU threads.", "physical cores"),
        _option("--ctx -c n_ctx", int, n_ctx, "Context length in tokens.", ctx_default, callback=_context),
    ]
    if templates:
        options.append(
            _option("--chat-template", str, None, "A Jinja template, not the file's own.", metavar="FILE|TEXT")
        )
    if auto:
        options += [
            _option("--speed", str, None, "--policy auto: so much faster than dense, such as 2x.", metavar="X"),
            _option("--kv-bytes", str, None, "... or a cache of this share of dense's, or size.", metavar="1/N|NMiB"),
        ]
    return gather("engine", options, _engine, ["flags"])


def _engine(
    policy: str,
    flags: list[tuple[str, str]],
    kv: str,
    kv_k: str | None,
    kv_v: str | None,
    speed: str | None = None,
    kv_bytes: str | None = None,
    **values: Any,
) -> Engine:
    from ..auto import AUTO, Auto
    from ..policies import parse_policy
    from ..policies.base import flag
    from ..stores import store_names

    if policy == AUTO and flags:
        raise UsageError(f"{flag(flags[0][0])} goes with a policy, --policy auto chooses its own")
    if policy != AUTO and (speed, kv_bytes) != (None, None):
        raise UsageError(f"{'--speed' if speed is not None else '--kv-bytes'} goes with --policy auto")
    k, v = store_names(kv)
    kv = "/".join(store_names(f"{kv_k or k}/{kv_v or v}"))
    made = Auto.parse(speed, kv_bytes) if policy == AUTO else parse_policy(policy, flags)
    return Engine(policy=made, kv=kv, **values)


def sampling_options(command: Command) -> Callable[..., Any]:
    """Adds the sampling flags; the command takes them as `sampling`."""
    options = [
        _option("--temp --temperature temperature", float, 0.8, "Randomness; 0: always the most likely token."),
        _option("--top-k", int, 40, "Choose among the N most likely; 0: all."),
        _option("--top-p", float, 0.95, "... the most likely with this probability together; 1: all."),
        _option("--min-p", float, 0.05, "... those with this share of the best one's probability; 0: all."),
        _option("--repeat-penalty", float, 1.0, "Divides the logits of recent tokens; 1: off."),
        _option("--repeat-last-n", int, 64, "How many tokens are recent."),
        _option("--seed -s", int, -1, "Same seed, same text.", "-1, a new one each time"),
    ]

    def make(seed: int, **values: Any) -> Any:
        from ..sampling import Sampling

        return Sampling(seed=None if seed == -1 else seed, **values)

    return gather("sampling", options, make)(command)


def answer_options(n: int, n_help: str, n_default: str) -> Callable[[Command], Callable[..., Any]]:
    """Adds -n and --stop, as `max_tokens` (None: no limit) and `stop`."""

    def add(command: Command) -> Callable[..., Any]:
        stop_help = "End the answer before this text; may be repeated."
        stop = click.option("--stop", "-r", multiple=True, metavar="TEXT", callback=_stop, help=stop_help)
        return _option("-n max_tokens", int, n, n_help, n_default, callback=positive_or_all)(stop(command))

    return add


def _option(names: str, kind: type, default: Any, text: str, shown: str = "", **more: Any) -> Callable[..., Any]:
    """A click option whose help ends with its default."""
    shown = shown or ("" if default is None else str(default))
    text += f"  [default: {shown}]" if shown else ""
    more.setdefault("metavar", {int: "N", float: "X", str: "TEXT"}[kind])
    return click.option(*names.split(), type=kind, default=default, help=text, **more)


def gather(
    name: str, options: list[Callable], make: Callable[..., Any], others: Sequence[str] = ()
) -> Callable[[Command], Callable[..., Any]]:
    """A decorator that adds options and hands them to the command as one value, `name` = make(**options).

    others: what make() takes besides, of what the command is given.
    """

    def add(command: Command) -> Callable[..., Any]:
        own = set(others)

        @functools.wraps(command)
        def gathered(**values: Any) -> Any:
            return command(**{name: make(**{key: values.pop(key) for key in own})}, **values)

        for option in reversed(options):
            option(gathered)
            own.add(gathered.__click_params__[-1].name)  # type: ignore[attr-defined]
        return gathered

    return add


def _context(ctx: click.Context, option: click.Parameter, value: int) -> int:
    if value < 0:
        raise click.BadParameter(f"{value} is out of range (0 for the model's own, or the number of tokens).")
    return value


def positive_or_all(ctx: click.Context, option: click.Parameter, value: int) -> int | None:
    """Checks a count: 1 or more, or -1 for no limit, which becomes None."""
    if value == -1:
        return None
    if value < 1:
        raise click.BadParameter(f"{value} is out of range (1 or more, or -1 for no limit).")
    return value


def _stop(ctx: click.Context, option: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    if "" in value:
        raise click.BadParameter("a stop string is empty.")
    return tuple(argument_text(text, "--stop") for text in value)
