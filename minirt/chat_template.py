"""Chat templates: the file's own Jinja, rendered where it can do no harm.

A template is code from a stranger. Jinja's sandbox keeps it from the interpreter's insides, but not from looping or
from asking for a gigabyte, and neither can be stopped from inside a Python process: a single C call may run for ever.
So a small worker process renders, under the system's own limits (see template_worker.py), and is killed at a deadline.
It starts in about 0.1 s, beside whatever the caller does meanwhile, and then answers in a millisecond.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ModelError, UsageError
from .template_worker import MAX_OUTPUT

MAX_SOURCE = 256 << 10  # characters; the longest template in use has 30,000
DEADLINE = 2.0  # seconds for one rendering
START_DEADLINE = 20.0  # seconds for the worker to start, on a busy machine

# For files without a template: each message under its role. Any model can follow it, none was trained on it.
FALLBACK = """\
{% for message in messages %}
{{ message.role | capitalize }}: {{ message.content }}

{% endfor %}
{% if add_generation_prompt %}
Assistant:
{%- endif %}
"""


class ChatTemplate:
    """A Jinja chat template with the texts of its BOS and EOS tokens. Safe to use from several threads.

    `origin` opens every error: where the template came from. Raises ModelError where the source is too long.
    """

    def __init__(self, source: str, bos: str = "", eos: str = "", origin: str = "chat template") -> None:
        self.source, self.bos, self.eos, self.origin = source, bos, eos, origin
        if len(source) > MAX_SOURCE:
            raise ModelError(f"{origin}: larger than {MAX_SOURCE >> 10} KiB, the most that is supported")
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    def warm(self) -> None:
        """Starts the worker and returns at once, so that it is ready when the model is loaded."""
        with self._lock:
            self._worker = self._worker or _Worker(self.origin)

    def close(self) -> None:
        """Ends the worker; rendering again starts another."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any) -> str:
        """The text of a conversation, special tokens spelled out; `messages` are {"role": ..., "content": ...}.

        `extra` is what else the template may ask for (tools, documents, enable_thinking ...), of JSON's types.
        Raises ModelError: malformed, refuses the conversation, prints nothing or half a character, or takes over 2 s,
        512 MB or 4 M characters of output.
        """
        context = {"tools": None, "documents": None, "bos_token": self.bos, "eos_token": self.eos, **extra}
        context |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        try:
            request = json.dumps({"source": self.source, "context": context})
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"{self.origin}: messages must be of JSON's types: {error}") from None
        with self._lock:
            worker, self._worker = self._worker, None  # an interrupted rendering gives its worker up, answer and all
            if worker is None or worker.process.poll() is not None:
                worker = _Worker(self.origin)
            answer = worker.ask(request)
            self._worker = worker
        if "text" not in answer:
            raise ModelError(f"{self.origin}: {_one_line(answer['error'])}")
        text = str(answer["text"])
        if not text:
            raise ModelError(f"{self.origin}: prints nothing for this conversation")
        try:
            text.encode(errors="surrogateescape")  # bytes that are not UTF-8 may pass through, as everywhere
        except UnicodeEncodeError as error:
            raise ModelError(f"{self.origin}: prints the lone surrogate {text[error.start]!a}") from None
        return text


class _Worker:
    """A process that renders. It ends with this object, with this program, or when it misses a deadline."""

    def __init__(self, origin: str) -> None:
        self.origin, self.ready, self.late = origin, False, False
        modules = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
        folders = sorted({str(Path(module.origin).parents[1]) for module in modules if module and module.origin})
        program = str(Path(__file__).with_name("template_worker.py"))
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", program, *folders],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=os.name == "posix",  # Ctrl-C at the terminal is not for the worker
            )
        except OSError as error:
            raise ModelError(f"{origin}: cannot start the renderer {sys.executable!r}: {error.strerror}") from None
        self.stop = weakref.finalize(self, _stop, self.process)

    def ask(self, request: str) -> dict[str, str]:
        """The worker's answer, {"text"} or {"error"}. Raises ModelError where it died or had to be killed."""
        if not self.ready:
            self.ready = self._line("", START_DEADLINE) == "ready\n"
        answer = self._line(request + "\n", DEADLINE) if self.ready else ""
        if answer.endswith("\n"):
            return dict(json.loads(answer))
        self.stop()
        if self.late:
            what = f"takes over {DEADLINE:g} s to render" if self.ready else "the renderer does not start"
            raise ModelError(f"{self.origin}: {what}")
        raise ModelError(f"{self.origin}: the renderer broke down (exit code {self.process.returncode})")

    def _line(self, request: str, seconds: float) -> str:
        """Send a request, read a line; "" if there is none before the time is up."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        watchdog = threading.Timer(seconds, self.process.kill)
        watchdog.daemon = True
        start = time.monotonic()
        watchdog.start()
        try:
            self.process.stdin.write(request.encode())
            self.process.stdin.flush()
            # JSON's escapes take up to 12 bytes a character
            return self.process.stdout.readline(12 * MAX_OUTPUT + 100).decode("ascii", "replace")
        except OSError:
            return ""
        finally:
            watchdog.cancel()
            self.late = time.monotonic() - start >= seconds


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:
                continue  # a request that was never read


def _one_line(message: str) -> str:
    """A stranger's message, fit for a terminal: one line, no control characters, at most 200 characters."""
    text = "".join(c if c.isprintable() else " " for c in message)
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:197] + "..."


def load_template(arg: str | None, metadata: Mapping[str, Any], path: str = "") -> ChatTemplate:
    """The template of `--chat-template` (a file, or Jinja text), else the GGUF file's own, else FALLBACK.

    `path` is the GGUF file's, for messages. Raises ModelError: unreadable, not text, too long.
    """
    origin = f"{path}: tokenizer.chat_template" if path else "tokenizer.chat_template"
    source = metadata.get("tokenizer.chat_template")
    if arg is not None:
        inline = "{{" in arg or "{%" in arg
        origin, source = ("--chat-template", arg) if inline else (arg, _read(arg))
    elif source is not None and not isinstance(source, str):
        raise ModelError(f"{origin}: expected str, found {type(source).__name__}")
    return ChatTemplate(source or FALLBACK, _token(metadata, "bos", 1), _token(metadata, "eos", 2), origin)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(MAX_SOURCE + 1)
    except OSError as error:
        raise ModelError(f"{path}: cannot read the chat template: {error.strerror}") from None
    except ValueError:
        raise ModelError(f"{path}: the chat template is not UTF-8 text") from None


def _token(metadata: Mapping[str, Any], name: str, spm_default: int) -> str:
    """The text of the BOS or EOS token, "" where there is none."""
    default = spm_default if metadata.get("tokenizer.ggml.model") == "llama" else None
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id", default)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and isinstance(token_id, int) and 0 <= token_id < len(tokens):
        return str(tokens[token_id])
    return ""
