"""The messages of a chat, their token ids, and the file they are saved in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, UsageError
from ..files import whole_file
from .terminal import read_file

if TYPE_CHECKING:
    from ..llama import Llama
    from ..sampling import Sampling

MAX_FILE = 16 << 20  # bytes of a saved conversation
FORMAT = "minirt conversation"

Messages = list[dict[str, str]]


class Conversation:
    """Messages {"role": ..., "content": ...}: a system message or none, then user and assistant in turn."""

    def __init__(self, llama: Llama, system: str = ""):
        self.llama = llama
        self.messages: Messages = []
        self.set_system(system)
        # Texts already turned into ids. The ids of an answer are the model's own, which encoding its text again need
        # not give: by keeping them the next turn finds all of the last one in the cache.
        self._known: list[tuple[str, list[int]]] = []

    @property
    def system(self) -> str:
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else ""

    def set_system(self, text: str) -> None:
        """Sets the system message; an empty text removes it."""
        rest = [m for m in self.messages if m["role"] != "system"]
        self.messages = ([{"role": "system", "content": text}] if text else []) + rest

    def clear(self) -> None:
        """Forgets all but the system message."""
        self.messages = [m for m in self.messages if m["role"] == "system"]
        self._known.clear()

    def add(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def drop(self, role: str) -> str | None:
        """Takes the last message back if it is of that role, and returns its content."""
        return self.messages.pop()["content"] if self.messages and self.messages[-1]["role"] == role else None

    def prompt(self) -> list[int]:
        """The token ids of the conversation, ready for the assistant's turn."""
        text, tokenizer = self._render(), self.llama.tokenizer
        for known, tokens in sorted(self._known, key=lambda entry: -len(entry[0])):
            if text.startswith(known):
                added = tokenizer.encode(text[len(known) :], add_bos=False, parse_special=True)
                # Only at a special token do two texts encode apart as they do together.
                if not added or tokenizer.is_special(added[0]):
                    return tokens + added
        return self.llama.chat_prompt(self.messages)

    def answered(self, prompt: Sequence[int], text: str, tokens: Sequence[int]) -> None:
        """Adds the assistant's message, whole or stopped: its text, and the ids it is made of."""
        rendered = self._render()
        self._known = [entry for entry in self._known if rendered.startswith(entry[0])]
        self._known.append((rendered, list(prompt)))
        if self.llama.tokenizer.decode(tokens, start=False) == text:
            self._known.append((rendered + text, [*prompt, *tokens]))
        self.add("assistant", text)

    def _render(self) -> str:
        return self.llama.template.render(self.messages, add_generation_prompt=True)


def save_conversation(path: Path, model: str, messages: Messages, sampling: Sampling) -> None:
    """Writes the file whole or not at all."""
    data = {"format": FORMAT, "version": 1, "model": model, "sampling": dataclasses.asdict(sampling)}
    data["messages"] = messages
    with whole_file(path) as file:
        file.write(json.dumps(data, indent=1).encode() + b"\n")


def load_conversation(path: Path) -> tuple[Messages, Sampling]:
    """Reads and checks a saved conversation. ModelError names the file and what is wrong with it."""
    from ..sampling import Sampling

    try:
        data = json.loads(read_file(str(path), MAX_FILE))
    except (ValueError, RecursionError) as e:
        if isinstance(e, ModelError):
            raise
        raise ModelError(f"{path}: not a saved conversation: not JSON") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != 1:
        raise ModelError(f"{path}: not a saved conversation (format is not '{FORMAT}', version 1)")
    messages = data.get("messages")
    if not isinstance(messages, list):
        raise ModelError(f"{path}: messages is not a list")
    for i, message in enumerate(messages):
        _check_message(path, i, message, messages[i - 1]["role"] if i else "")
    if messages and messages[-1]["role"] == "user":
        raise ModelError(f"{path}: the last message is the user's, expected an answer after it")
    values = data.get("sampling", {})
    names = {field.name: field.type for field in dataclasses.fields(Sampling)}
    if not isinstance(values, dict) or not values.keys() <= names.keys():
        raise ModelError(f"{path}: sampling may have {', '.join(names)} only")
    for name, value in values.items():
        allowed = (int, float) if names[name] == "float" else int
        if isinstance(value, bool) or not (isinstance(value, allowed) or (name == "seed" and value is None)):
            raise ModelError(f"{path}: sampling.{name} is {json.dumps(value)[:60]}, expected a number")
    try:
        return [{"role": m["role"], "content": m["content"]} for m in messages], Sampling(**values)
    except UsageError as e:
        raise ModelError(f"{path}: {e}") from None


def _check_message(path: Path, i: int, message: Any, before: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise ModelError(f"{path}: message {i} has no text as its content")
    role = message.get("role")
    allowed = {"": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}[before]
    if role not in allowed:
        raise ModelError(f"{path}: message {i} has the role {json.dumps(role)[:60]}, expected {' or '.join(allowed)}")
    try:
        message["content"].encode()
    except UnicodeEncodeError:
        raise ModelError(f"{path}: message {i} is not valid Unicode") from None
