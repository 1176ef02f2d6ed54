"""Renders chat templates in a process of its own, where a hostile one can be killed, starved and shut in.

A program: `python -I -S template_worker.py FOLDER...` with the folders of jinja2 and markupsafe. It says "ready", then
answers each line of JSON {"source", "context"} with a line {"text"} or {"error"}, until stdin ends.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
from datetime import datetime
from typing import Any

MEMORY = 512 << 20  # bytes of address space
SECONDS = 10  # the asking process kills sooner; this is for when it has died itself
MAX_OUTPUT = 4 << 20  # characters


def environment() -> Any:
    """The Jinja environment that transformers gives a template, whose authors rely on every detail of it."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}...{% endgeneration %} marks training targets; here it just shows its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def raise_exception(message: Any) -> None:
        raise TemplateError(f"refused: {message}")

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def render(template: Any, context: dict[str, Any]) -> str:
    parts, size = [], 0
    for part in template.generate(context):
        size += len(part)
        if size > MAX_OUTPUT:
            raise ValueError(f"prints more than {MAX_OUTPUT} characters")
        parts.append(part)
    return "".join(parts)


def shut_in(folders: tuple[str, ...]) -> None:
    """From here on: no more than MEMORY, no new process, no socket, no file but Python's own in `folders`."""

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(("socket.", "subprocess.", "ctypes.", "os.")) and event not in ("os.listdir", "os.scandir"):
            raise PermissionError(f"{event} is not allowed")
        if event == "open" and not str(args[0]).startswith(folders):
            raise PermissionError("opening files is not allowed")

    datetime.now().astimezone()  # reads the time zone
    try:
        import resource
    except ImportError:  # Windows
        resource = None  # type: ignore[assignment]
    for name, limit in (("AS", MEMORY), ("NPROC", 0), ("FSIZE", 0), ("CORE", 0)):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # where one is missing, the deadline still holds
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    sys.addaudithook(audit)


def problem(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"needs more than {MEMORY >> 20} MB of memory"
    if isinstance(error, RecursionError):
        return "recurses too deeply"
    line = getattr(error, "lineno", None)
    name = "" if type(error).__module__.startswith("jinja2") or type(error) is ValueError else type(error).__name__
    return ": ".join(part for part in (f"line {line}" if line else "", name, str(error)) if part)


def main() -> None:
    sys.path += sys.argv[1:]
    compiled = functools.lru_cache(maxsize=1)(environment().from_string)
    shut_in(tuple(sys.path))
    alarm = getattr(signal, "alarm", abs)  # Windows has none
    print("ready", flush=True)
    for line in sys.stdin:
        alarm(SECONDS)
        try:
            request = json.loads(line)
            answer = json.dumps({"text": render(compiled(request["source"]), request["context"])})
        except Exception as error:
            answer = json.dumps({"error": problem(error)[:1000]})
        alarm(0)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
