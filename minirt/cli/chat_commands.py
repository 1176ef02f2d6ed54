"""The slash commands of `minirt chat`. A command is one function; its docstring is its line of /help."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelError, UsageError
from ..progress import Progress
from .answering import peak_memory, timings_line
from .conversation import load_conversation, save_conversation
from .terminal import one_line, say

if TYPE_CHECKING:
    from .chat import Chat

COMMANDS: dict[str, Callable[[Chat, str], None]] = {}
_ALONE: set[str] = set()  # names of commands that take no arguments
_USAGE: dict[str, str] = {}  # the first name of each command, with its arguments -> its help
_SHORT = {"temp": "temperature", "n": "max_tokens"}


def execute(chat: Chat, line: str) -> None:
    """Runs "/name arguments". Raises UsageError for an unknown name, or arguments where there are none."""
    name, _, argument = line.strip().partition(" ")
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name} (/help lists them; a space before the / makes it a message)")
    argument = argument.strip()
    if argument and name in _ALONE:
        raise UsageError(f"{name}: unexpected argument '{argument}'")
    COMMANDS[name](chat, argument)


def _command(*names: str, arguments: str = "") -> Callable[[Callable], Callable]:
    def register(function: Callable[[Chat, str], None]) -> Callable:
        _USAGE[f"{names[0]} {arguments}".rstrip()] = function.__doc__ or ""
        COMMANDS.update(dict.fromkeys(names, function))
        if not arguments:
            _ALONE.update(names)
        return function

    return register


@_command("/help", "/?")
def _help(chat: Chat, argument: str) -> None:
    """These lines."""
    for usage, text in _USAGE.items():
        say(f"  {usage:20} {text}")
    say('  """                  Begins and ends a message of several lines; so does \\ at the end of a line.')
    say("  Ctrl-C               Stops the answer, keeping what there is of it. Ctrl-D leaves.")


@_command("/clear")
def _clear(chat: Chat, argument: str) -> None:
    """Starts anew; the system prompt stays."""
    chat.begin()


@_command("/regen")
def _regen(chat: Chat, argument: str) -> None:
    """Answers the last message again."""
    conversation = chat.conversation
    answer = conversation.drop("assistant")
    if answer is None:
        raise UsageError("/regen: there is no answer yet")
    try:
        chat.respond()
    finally:
        if conversation.messages[-1]["role"] == "user":  # nothing came instead of it
            conversation.add("assistant", answer)


@_command("/system", arguments="[TEXT]")
def _system(chat: Chat, argument: str) -> None:
    """Sets the system prompt, from the next answer on; - removes it; alone, shows it."""
    if argument:
        chat.conversation.set_system("" if argument == "-" else argument)
    else:
        say(chat.conversation.system or "(no system prompt)")


@_command("/set", arguments="[NAME VALUE]")
def _set(chat: Chat, argument: str) -> None:
    """Sets a sampling parameter, or the KV policy: policy sparq:r=16:k=64. Alone, shows them all."""
    values = {**dataclasses.asdict(chat.sampling), "max_tokens": chat.max_tokens}
    if not argument:
        for name, value in values.items():
            say(f"  {name.replace('_', '-'):20} {value if value is not None else -1}")
        say(f"  {'policy':20} {chat.llama.decoder.policy}")
        return
    given, text = (part.strip() for part in re.split(r"\s*=\s*|\s+", f"{argument} ", maxsplit=1))
    if given == "policy":
        _set_policy(chat, text)
        return
    name = given.lstrip("-").replace("-", "_")
    name = _SHORT.get(name, name)
    if name not in values:
        raise UsageError(f"/set: unknown parameter {given} (one of: {', '.join(values).replace('_', '-')})")
    whole = not isinstance(getattr(type(chat.sampling), name, None), float)
    try:
        if not text.isascii() or "_" in text:  # Python's numbers, but nobody's here
            raise ValueError
        value = int(text) if whole else float(text)
    except ValueError:
        raise UsageError(f"/set {given}: '{text}' is not {'an integer' if whole else 'a number'}") from None
    if name in ("seed", "max_tokens") and value == -1:
        value = None
    if name != "max_tokens":
        try:
            chat.sampling = dataclasses.replace(chat.sampling, **{name: value})
        except UsageError as e:  # "--flag value is ..."
            raise UsageError(f"/set {given}: {str(e).partition(' ')[2]}") from None
        if name == "seed":
            chat.n_answers = 0
    elif value is None or value >= 1:
        chat.max_tokens = value
    else:
        raise UsageError(f"/set {given}: {value} is out of range (1 or more, or -1 for no limit)")


def _set_policy(chat: Chat, text: str) -> None:
    """Takes "sparq:r=16:k=64", "sparq r=16 k=64" and "sparq --r 16 --k 64". The next answer reads all of the
    conversation anew."""
    from ..auto import AUTO

    words = re.sub(r"--([\w-]+)[\s=]+", r"\1=", text).split()
    policy = ":".join(words)
    if policy.partition(":")[0] == AUTO:
        raise UsageError("/set policy: auto is for the start, minirt chat --policy auto --speed 2x")
    try:
        chat.llama.set_policy(policy)
    except UsageError as e:
        raise UsageError(f"/set policy: {e}") from None
    with Progress("compiling kernels"):
        chat.llama.warm_up()


@_command("/stats")
def _stats(chat: Chat, argument: str) -> None:
    """What the last answer cost, what the session holds, and what a token reads."""
    from ..policies import Dense

    llama, session = chat.llama, chat.llama.session
    config, policy, cache, plan = llama.config, llama.decoder.policy, session.cache, session.cache.plan
    n, held, stores = len(session.tokens), policy.held(config, cache, session.seq), (plan.k_store, plan.v_store)
    read = policy.bytes_touched(llama.decoder.ops, config, cache, session.seq, n)
    dense = Dense().bytes_read(config, Dense().plan(config, session.n_ctx, *stores), n)
    share = f", {100 * read / dense:.1f} % of dense" if dense else ""
    say(f"  model            {one_line(config.name)}, {_mib(session.weight_bytes)} of weights read per token")
    say(f"  policy           {policy}, {_mib(read)} of cache read per token{share}")
    say(f"  context          {n} of {session.n_ctx} tokens")
    pinned = f", the first {session.pinned} pinned" if session.pinned else ""
    say(f"  tokens held      {held} of {n} per layer{pinned}, {n - held} evicted")
    say(
        f"  KV cache         {_mib(cache.nbytes(config, session.seq))}, {_mib(plan.nbytes(config))} when full "
        f"({', '.join(store.name for store in stores)})"
    )
    say(f"  peak memory      {peak_memory() / 2**20:.0f} MiB")
    if chat.last is not None and chat.last.timings.prompt_tokens:
        say(f"  last answer      {timings_line(chat.last.timings, n, session.n_ctx)}")


def _mib(n: float) -> str:
    return f"{n / 2**20:.1f} MiB"


@_command("/show")
def _show(chat: Chat, argument: str) -> None:
    """Shows the conversation."""
    for message in chat.conversation.messages:
        say(f"{message['role']}: {message['content']}")


@_command("/save", arguments="FILE")
def _save(chat: Chat, argument: str) -> None:
    """Saves the conversation and the sampling parameters as JSON."""
    path = _path("/save", argument)
    if path.exists() and path != chat.file:
        raise UsageError(f"/save: {path} exists; /save! {path} overwrites it")
    _save_over(chat, argument)


@_command("/save!", arguments="FILE")
def _save_over(chat: Chat, argument: str) -> None:
    """... over a file that is there."""
    path = _path("/save!", argument)
    save_conversation(path, chat.llama.config.name, chat.conversation.messages, chat.sampling)
    chat.file = path
    say(f"({len(chat.conversation.messages)} messages saved)")


@_command("/load", arguments="FILE")
def _load(chat: Chat, argument: str) -> None:
    """Goes on with a saved conversation and its settings."""
    path = _path("/load", argument)
    messages, sampling = load_conversation(path)
    chat.begin()
    chat.conversation.messages, chat.sampling, chat.file = messages, sampling, path
    say(f"({len(messages)} messages loaded)")


@_command("/exit", "/quit", "/bye")
def _exit(chat: Chat, argument: str) -> None:
    """Leaves."""
    raise EOFError


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise UsageError(f"{command} needs the name of a file")
    if "\0" in argument:
        raise UsageError(f"{command}: the name of a file cannot have a NUL character in it")
    try:
        return Path(argument).expanduser()
    except RuntimeError as e:
        raise ModelError(f"{argument}: {e}") from None
