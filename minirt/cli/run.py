"""`minirt run`: one text in, its continuation out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from ..errors import ModelError, UsageError
from ..progress import Progress
from .answering import show_answer
from .options import Engine, answer_options, engine_options, model_argument, sampling_options, stats_option
from .policy_flags import PolicyCommand
from .terminal import read_file, read_stdin, say, stdin_is_piped, stdin_is_terminal

if TYPE_CHECKING:
    from ..sampling import Sampling

MAX_PROMPT = 8 << 20  # bytes; more than any context holds


@click.command(
    cls=PolicyCommand,
    epilog="""\b
Examples:
  minirt run -p "The capital of France is" -n 8 --temp 0
  minirt run model.gguf -f story.txt -n 200
  cat notes.txt | minirt run --chat -p "Summarise these notes."
  minirt run --system "Answer in one word." -p "Is water wet?"
""",
)
@model_argument
@click.option("--prompt", "-p", metavar="TEXT", help="The text to continue; - reads it from standard input.")
@click.option("--file", "-f", "path", metavar="FILE", help="Read the text from a file.")
@click.option("--chat", is_flag=True, help="Ask instead: the text is a user's message in the model's chat template.")
@click.option("--system", metavar="TEXT", help="A system prompt; implies --chat.")
@click.option("--special", is_flag=True, help="Read special tokens such as <|im_end|> in the text.")
@answer_options(256, "At most N tokens; -1: until the model ends or the context is full.", "256")
@sampling_options
@engine_options(auto=True)
@stats_option
def run(
    model: str | None,
    prompt: str | None,
    path: str | None,
    chat: bool,
    system: str | None,
    special: bool,
    max_tokens: int | None,
    stop: tuple[str, ...],
    sampling: Sampling,
    engine: Engine,
    stats: bool,
) -> None:
    """Continues a text, once.

    The text is what comes through a pipe, then FILE, then TEXT, joined by newlines. Only the answer goes to standard
    output. With --chat or --system the text is a question to the model instead of the beginning of its answer.
    """
    text = _prompt(prompt, path)
    with engine.load(model) as llama:
        if chat or system is not None:
            messages = [{"role": "system", "content": system}] if system else []
            tokens = llama.chat_prompt([*messages, {"role": "user", "content": text}])
        else:
            tokens = llama.prompt_tokens(text, parse_special=special)
        with Progress("reading the prompt", " tokens") as progress:
            answer = llama.stream(tokens, max_tokens=max_tokens, sampling=sampling, stop=stop, progress=progress)
            show_answer(llama, answer, progress, stats)
    unasked = click.get_current_context().get_parameter_source("max_tokens") is ParameterSource.DEFAULT
    if answer.finish_reason == "length" and unasked:
        say(f"minirt: stopped after {max_tokens} tokens (see -n)")


def _prompt(prompt: str | None, path: str | None) -> str:
    """The text to continue. Bytes that are not UTF-8 pass through as surrogate escapes."""
    parts, names = [], []
    if prompt == "-" or stdin_is_piped() or (prompt is None and path is None and not stdin_is_terminal()):
        parts.append(read_stdin(MAX_PROMPT).decode(errors="surrogateescape"))
        names.append("standard input")
    if path is not None:
        parts.append(read_file(path, MAX_PROMPT).decode(errors="surrogateescape"))
        names.append(path)
    if prompt is not None and prompt != "-":
        parts.append(prompt)
        names.append("-p")
    if not parts:
        raise UsageError("nothing to continue: give -p TEXT, -f FILE, or a text through a pipe")
    parts = [part for part in parts if part]
    if not parts:
        raise ModelError(f"{', '.join(names)}: the prompt is empty")
    return "".join(part if part.endswith("\n") else part + "\n" for part in parts[:-1]) + parts[-1]
