"""`minirt chat`: a conversation, on a terminal or through a pipe."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import ModelError, UsageError
from ..progress import Progress
from .answering import show_answer
from .chat_commands import execute
from .conversation import Conversation
from .lines import open_lines, read_message
from .options import Engine, answer_options, engine_options, model_argument, sampling_options, stats_option
from .policy_flags import PolicyCommand
from .terminal import argument_text, describe, for_stdout, one_line, read_file, say, stdin_is_terminal

if TYPE_CHECKING:
    from ..answer import Answer
    from ..llama import Llama
    from ..sampling import Sampling

MAX_SYSTEM = 1 << 20  # bytes


@click.command(
    cls=PolicyCommand,
    epilog="""\b
Examples:
  minirt chat
  minirt chat model.gguf --system "Answer like a pirate." --temp 0.5
  minirt chat --ctx 100000 --policy streaming --budget 2048 --pin-system
  printf 'Name a colour.\\nAnother one.\\n' | minirt chat --no-stats
""",
)
@model_argument
@click.option("--system", metavar="TEXT", help="The system prompt.")
@click.option("--system-file", metavar="FILE", help="Read the system prompt from a file.")
@answer_options(-1, "At most N tokens an answer.", "-1, until the model ends")
@sampling_options
@engine_options(auto=True)
@click.option("--pin-system", is_flag=True, help="No policy evicts the system prompt and the template's head.")
@click.option("--show-template", is_flag=True, help="Print the chat template and exit.")
@stats_option
def chat(
    model: str | None,
    system: str | None,
    system_file: str | None,
    max_tokens: int | None,
    stop: tuple[str, ...],
    sampling: Sampling,
    engine: Engine,
    pin_system: bool,
    show_template: bool,
    stats: bool,
) -> int:
    """Talks with a model. /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.

    Without a terminal each line of standard input is a message, and only the answers go to standard output.
    """
    if system is not None and system_file is not None:
        raise UsageError("--system and --system-file cannot be used together")
    if show_template:
        click.echo(for_stdout(engine.template_source(model)))
        return 0
    text = argument_text(system or "", "--system")
    if system_file is not None:
        text = read_file(system_file, MAX_SYSTEM).decode(errors="replace").rstrip("\n")
    with engine.load(model) as llama:
        return Chat(llama, Conversation(llama, text), sampling, max_tokens, stop, stats, pin_system).loop()


class Chat:
    """The loop, and what its commands may change."""

    def __init__(
        self,
        llama: Llama,
        conversation: Conversation,
        sampling: Sampling,
        max_tokens: int | None,
        stop: tuple[str, ...],
        stats: bool,
        pin_system: bool = False,
    ):
        self.llama, self.conversation, self.pin_system = llama, conversation, pin_system
        self.sampling, self.max_tokens, self.stop, self.stats = sampling, max_tokens, stop, stats
        self.interactive = stdin_is_terminal()
        self.last: Answer | None = None
        self.n_answers = 0
        self.file: Path | None = None  # saved to or loaded from

    def loop(self) -> int:
        """Reads and answers messages to the end of the input; returns the exit code."""
        lines = open_lines()
        interrupts, failed = 0, False
        if self.interactive:
            name = one_line(self.llama.config.name)
            say(f"{name}, {self.llama.n_ctx} tokens of context. /help for commands, Ctrl-D leaves.")
        try:
            while True:
                try:
                    message, may_command = read_message(lines)
                    interrupts = 0
                    failed |= not self.handle(message, may_command)
                except KeyboardInterrupt:
                    interrupts += 1
                    if not self.interactive or interrupts == 2:
                        raise
                    say("\n(Ctrl-C again, /exit or Ctrl-D leaves)")
        except EOFError:
            return 1 if failed and not self.interactive else 0
        finally:
            lines.close()

    def handle(self, message: str, may_command: bool) -> bool:
        """A command or a message to answer; False if it did not work, and the line that says why is out."""
        try:
            if may_command and message.startswith("/"):
                execute(self, message)
            elif message.strip():
                self.ask(message)
        except (ModelError, UsageError) as e:
            say(f"minirt: {e}")
            return False
        except OSError as e:
            if e.errno == errno.EPIPE:
                raise
            say(f"minirt: {describe(e)}")
            return False
        return True

    def begin(self) -> None:
        """Begins anew: only the system prompt stays, and a seed gives its texts again."""
        self.conversation.clear()
        self.llama.session.reset()
        self.last, self.n_answers = None, 0

    def ask(self, text: str) -> None:
        """Answers a message. One that gets no answer is not part of the conversation."""
        self.conversation.add("user", text)
        try:
            self.respond()
        finally:
            self.conversation.drop("user")

    def respond(self) -> None:
        """The assistant's turn. Ctrl-C stops the answer; what there is of it stays."""
        self.last = None
        try:
            prompt = self._prompt()
            with Progress("reading the conversation", " tokens") as progress:
                self.last = self.llama.stream(
                    prompt, max_tokens=self.max_tokens, sampling=self._sampling(), stop=self.stop, progress=progress
                )
                show_answer(self.llama, self.last, progress, self.stats)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            if self.last is None or not self.last.text:
                say("\n(stopped before the answer began: the message is not part of the conversation)")
                return
        self.conversation.answered(prompt, self.last.text, self.last.tokens)

    def _prompt(self) -> list[int]:
        prompt = self.conversation.prompt()
        if len(prompt) > self.llama.n_ctx:
            raise ModelError(
                f"the context is full: the conversation takes {len(prompt)} tokens, the context holds "
                f"{self.llama.n_ctx}; /clear starts anew, --ctx makes it larger"
            )
        if self.pin_system:
            self.llama.session.pinned = self.llama.head_length(self.conversation.messages, prompt)
        return prompt

    def _sampling(self) -> Sampling:
        """The same session gives the same text, and /regen another one: each answer has a seed of its own."""
        self.n_answers += 1
        if self.sampling.seed is None:
            return self.sampling
        return dataclasses.replace(self.sampling, seed=(self.sampling.seed + self.n_answers - 1) % 2**64)
