"""`minirt perplexity`: how well a model predicts a text, and how far it is from another."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click
from click.core import ParameterSource

from ..errors import ModelError, UsageError
from ..progress import Progress
from .files import whole_file
from .options import Engine, engine_options, json_option, model_argument, positive_or_all
from .terminal import read_file, say

if TYPE_CHECKING:
    import numpy as np

    from ..llama import Llama

MAX_TEXT = 64 << 20  # bytes


@click.command(
    epilog="""\b
Examples:
  minirt perplexity model.gguf -f wiki.test.raw
  minirt perplexity exact-f16.gguf -f text.txt --chunks 20 --kld base.kld    save the base
  minirt perplexity small-q4.gguf --kld base.kld                             compare with it
"""
)
@model_argument
@click.option("--file", "-f", "path", metavar="FILE", help="The text.")
@click.option(
    "--chunks", "n_chunks", type=int, metavar="N", default=-1, callback=positive_or_all,
    help="Only the first N windows.  [default: -1, all]",
)  # fmt: skip
@click.option(
    "--kld", metavar="FILE", type=click.Path(path_type=Path),
    help="Log-probabilities of a base model, as llama-perplexity writes them: saved to FILE if it is not there, "
    "else compared with.",
)  # fmt: skip
@engine_options(n_ctx=512, templates=False)
@json_option
def perplexity(
    model: str | None, path: str | None, n_chunks: int | None, kld: Path | None, engine: Engine, as_json: bool
) -> None:
    """Measures how well a model predicts a text: its perplexity.

    The figures are llama-perplexity's. The text is cut into windows of --ctx tokens, and the second half of each is
    predicted. With --kld the Kullback-Leibler divergence from a base model is measured too, on the windows saved in
    the base file.
    """
    compare = kld is not None and kld.exists()
    if path is None and not compare:
        raise UsageError("no text: give -f FILE" + (f" (there is no {kld} to compare with)" if kld else ""))
    text = read_file(path, MAX_TEXT) if path is not None else None
    report = _Report(as_json)
    if compare:
        assert kld is not None
        given = click.get_current_context().get_parameter_source("n_ctx") is not ParameterSource.DEFAULT
        result = _compare(model, text, n_chunks, kld, engine, engine.n_ctx if given else None, report)
    else:
        assert text is not None
        result = _measure(model, text, n_chunks, kld, engine, report)
    if as_json:
        click.echo(json.dumps(result, indent=1))


class _Report:
    """Window by window: a running figure on stdout, or a progress line with --json; on stderr how long it will take."""

    def __init__(self, as_json: bool):
        self.as_json = as_json
        self.progress = Progress("scoring", " windows")
        self.n, self.n_ctx, self.begun = 0, 0, 0.0

    def windows(self, windows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (number from 1, window); the caller answers each with `scored`."""
        self.n, self.n_ctx = windows.shape
        with self.progress:
            self.begun = time.perf_counter()
            yield from enumerate(windows, 1)

    def scored(self, i: int, text: str, nl: bool = True) -> None:
        """The figures after window i. The first tells how long the others will take: on a line before the figures."""
        if i == 1 and self.n > 1:
            each = time.perf_counter() - self.begun
            self.progress.close()
            say(
                f"{self.n} windows of {self.n_ctx} tokens, {each:.1f} s each: about {_duration(self.n * each)}",
                faint=True,
            )
        if self.as_json and sys.stderr is not None and sys.stderr.isatty():
            self.progress(i, self.n)
        self.write(text, nl=nl)

    def write(self, text: str, nl: bool = True) -> None:
        if self.as_json:
            return
        self.progress.close()  # the running figures show progress from here on
        try:
            click.echo(text, nl=nl)
        except OSError as e:
            e.filename = "standard output"  # not the base file that is being written
            raise


def _measure(
    model: str | None, text: bytes, n_chunks: int | None, save: Path | None, engine: Engine, report: _Report
) -> dict[str, Any]:
    with engine.load(model) as llama:
        from .. import perplexity as scoring

        windows = scoring.cut_windows(_tokens(llama, text), llama.n_ctx, n_chunks)
        running = scoring.Perplexity()
        with _base_file(save, windows.shape, llama.config.n_vocab) as base:
            if base is not None:
                scoring.write_header(base, windows, llama.config.n_vocab)
            for i, window in report.windows(windows):
                for logits, tokens in scoring.window_logits(llama, window):
                    running.add(logits, tokens)
                    if base is not None:
                        base.write(scoring.encode_log_probs(logits).tobytes())
                report.scored(i, f"[{i}]{running.value:.4f},", nl=False)
        report.write("")
        report.write(f"Final estimate: PPL = {running.value:.4f} +/- {running.error:.5f}")
        if save is not None:
            say(f"saved {save}: compare another model with minirt perplexity OTHER --kld {save}")
        return _header(llama, engine, windows) | {
            "n_scored": running.count,
            "ppl": running.value,
            "ppl_error": running.error,
        }


def _compare(
    model: str | None,
    text: bytes | None,
    n_chunks: int | None,
    kld: Path,
    engine: Engine,
    n_ctx: int | None,
    report: _Report,
) -> dict[str, Any]:
    from .. import perplexity as scoring

    with contextlib.closing(scoring.BaseFile(kld)) as base:
        if n_ctx not in (None, base.n_ctx):
            raise UsageError(f"--ctx {n_ctx}: {kld} was made with windows of {base.n_ctx} tokens")
        with replace(engine, n_ctx=base.n_ctx).load(model) as llama:
            if base.n_vocab != llama.config.n_vocab:
                raise ModelError(f"{kld}: has {base.n_vocab} tokens, the model has {llama.config.n_vocab}")
            windows = base.windows[:n_chunks]
            if text is not None:
                given = scoring.cut_windows(_tokens(llama, text), base.n_ctx, len(windows))
                if given.shape != windows.shape or (given != windows).any():
                    raise ModelError(f"{kld}: was made from another text, or with another tokenizer")
            divergence = scoring.Divergence()
            report.write("window        PPL    ln(PPL/base)          KLD  same top")
            for i, window in report.windows(windows):
                for logits, tokens in scoring.window_logits(llama, window):
                    divergence.add(logits, tokens, base.read(len(tokens)))
                s = divergence.statistics()
                report.scored(
                    i,
                    f"{i:6d} {s['ppl']:10.4f} {s['ln_ppl_ratio']:15.5f} {s['kld']:12.6f} {100 * s['same_top']:7.3f} %",
                )
            report.write(_summary(s))
            return _header(llama, engine, windows) | {"base": str(kld)} | s


def _tokens(llama: Llama, text: bytes) -> list[int]:
    # llama.cpp drops one newline at the end of a file
    with Progress("reading the text"):
        return llama.tokenizer.encode_bytes(text[:-1] if text.endswith(b"\n") else text)


@contextlib.contextmanager
def _base_file(path: Path | None, shape: tuple[int, ...], n_vocab: int) -> Iterator[BinaryIO | None]:
    """The file to save, if one is asked for and there is room for it."""
    if path is None:
        yield None
        return
    from ..perplexity import base_size

    size = base_size(shape[1], n_vocab, shape[0])
    with whole_file(path) as file:
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise ModelError(f"{path}: needs {size / 2**20:.1f} MiB, the disk has {free / 2**20:.1f} MiB free")
        yield file


def _header(llama: Llama, engine: Engine, windows: np.ndarray) -> dict[str, Any]:
    n_chunk, n_ctx = windows.shape
    names = {"model": llama.config.name, "policy": engine.policy, "kv": engine.kv, "device": llama.decoder.ops.name}
    return names | {"n_ctx": n_ctx, "n_chunk": n_chunk}


def _summary(s: dict[str, float]) -> str:
    """The figures of `Divergence.statistics`, in llama-perplexity's words."""

    def line(label: str, name: str, scale: float = 1.0, unit: str = "") -> str:
        return f"{label:31}: {scale * s[name]:10.6f} ± {scale * s[name + '_error']:.6f}{unit}"

    def kld(label: str, name: str) -> str:
        return f"{label:7} KLD: {s[name]:10.6f}"

    percentiles = [kld(f"{p:.1f}%", f"kld_p{p:g}") for p in (99.9, 99, 95, 90)]
    low = [kld(f"{p:.1f}%", f"kld_p{p:g}") for p in (10, 5, 1, 0.1)]
    return "\n".join(
        [
            "",
            "====== Perplexity statistics ======",
            line("Mean PPL(Q)", "ppl"),
            line("Mean PPL(base)", "ppl_base"),
            line("Mean ln(PPL(Q)/PPL(base))", "ln_ppl_ratio"),
            line("Mean PPL(Q)/PPL(base)", "ppl_ratio"),
            "",
            "====== KL divergence statistics ======",
            f"Mean    KLD: {s['kld']:10.6f} ± {s['kld_error']:10.6f}",
            kld("Maximum", "kld_max"),
            *percentiles,
            kld("Median", "kld_p50"),
            *low,
            kld("Minimum", "kld_min"),
            "",
            "====== Token probability statistics ======",
            f"Mean    Δp: {100 * s['delta_p']:6.3f} ± {100 * s['delta_p_error']:5.3f} %",
            f"Maximum Δp: {100 * s['delta_p_max']:6.3f} %",
            f"Minimum Δp: {100 * s['delta_p_min']:6.3f} %",
            f"RMS Δp    : {100 * s['delta_p_rms']:6.3f} ± {100 * s['delta_p_rms_error']:5.3f} %",
            f"Same top p: {100 * s['same_top']:6.3f} ± {100 * s['same_top_error']:5.3f} %",
        ]
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
