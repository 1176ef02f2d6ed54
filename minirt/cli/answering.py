"""An answer on its way to standard output, and the line about what it cost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..progress import Progress
from .terminal import for_stdout, say

if TYPE_CHECKING:
    from ..answer import Answer
    from ..llama import Llama
    from ..session import Timings


def show_answer(llama: Llama, answer: Answer, progress: Progress, stats: bool) -> None:
    """Streams the answer to stdout, ends it with a newline, and says on stderr what it cost and if it was cut.

    KeyboardInterrupt passes through once the line is ended; what was shown is in `answer.text`.
    """
    last = ""
    try:
        for piece in answer:
            progress.close()
            last = for_stdout(piece)
            sys.stdout.write(last)
            sys.stdout.flush()
    finally:
        progress.close()
        if answer.finish_reason is not None or answer.text:
            sys.stdout.write("" if last.endswith("\n") else "\n")
            sys.stdout.flush()
            if stats:
                say(timings_line(answer.timings, len(llama.session.tokens), llama.n_ctx), faint=True)
    if answer.finish_reason == "context":
        say(f"minirt: the context is full, {llama.n_ctx} of {llama.n_ctx} tokens: the answer is cut (see --ctx)")


def timings_line(timings: Timings, n_tokens: int, n_ctx: int) -> str:
    """Speeds, bandwidth, context and memory of one answer."""
    parts = [f"prompt {timings.prompt_tokens} tokens"]
    if timings.prompt_seconds > 0:
        parts[0] += f" {timings.prompt_tokens / timings.prompt_seconds:.1f} t/s"
    if timings.seconds > 0:
        parts.append(f"generation {timings.tokens} tokens {timings.tokens / timings.seconds:.1f} t/s")
        parts.append(f"{timings.bytes_read / timings.seconds / 1e9:.2f} GB/s")
    parts.append(f"context {n_tokens}/{n_ctx}")
    memory = peak_memory()
    if memory:
        parts.append(f"peak memory {memory / 2**20:.0f} MiB")
    return "[" + " | ".join(parts) + "]"


def peak_memory() -> int:
    """Most bytes this process ever held in memory, the mapped model included; 0 if the system does not say."""
    try:  # on Linux ru_maxrss also counts the process that started us
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
