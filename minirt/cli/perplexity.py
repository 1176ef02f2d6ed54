"""`minirt perplexity`: how well a model predicts a text, and how far it is from another."""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click
from click.core import ParameterSource

from ..errors import ModelError, UsageError
from ..files import whole_file
from ..progress import Progress
from .options import Engine, engine_options, json_option, model_argument, positive_or_all
from .policy_flags import PolicyCommand
from .terminal import read_file, say

if TYPE_CHECKING:
    import numpy as np

    from ..llama import Llama
    from ..perplexity import Scored

MAX_TEXT = 64 << 20  # bytes


@click.command(
    cls=PolicyCommand,
    epilog="""\b
Examples:
  minirt perplexity model.gguf -f wiki.test.raw
  minirt perplexity exact-f16.gguf -f text.txt --chunks 20 --kld base.kld    save the base
  minirt perplexity small-q4.gguf --kld base.kld                             compare with it
  minirt perplexity -f text.txt --policy sparq --r 16 --k 64 --kld           compare with dense attention
""",
)
@model_argument
@click.option("--file", "-f", "path", metavar="FILE", help="The text.")
@click.option(
    "--chunks", "n_chunks", type=int, metavar="N", default=-1, callback=positive_or_all,
    help="Only the first N windows.  [default: -1, all]",
)  # fmt: skip
@click.option(
    "--kld", metavar="[FILE]", is_flag=False, flag_value="",
    help="Without FILE: compares the policy with dense attention. With it: log-probabilities of a base model, as "
    "llama-perplexity writes them, saved to FILE if it is not there, else compared with.",
)  # fmt: skip
@click.option("--decode", is_flag=True, help="Decode what is scored step by step with dense attention too.")
@engine_options(n_ctx=512, templates=False)
@json_option
def perplexity(
    model: str | None,
    path: str | None,
    n_chunks: int | None,
    kld: str | None,
    decode: bool,
    engine: Engine,
    as_json: bool,
) -> None:
    """Measures how well a model predicts a text: its perplexity.

    The figures are llama-perplexity's. The text is cut into windows of --ctx tokens, and the second half of each is
    predicted. With --kld the Kullback-Leibler divergence from a base is measured too: from the same model with dense
    attention and a cache that is not quantised, or from another model on the windows saved in its base file.

    With dense attention the second half is read as a prompt. A policy acts on what is generated: then the first half is
    the prompt, and the tokens of the second are decoded one by one as if they had been generated.
    """
    base = Path(kld) if kld else None
    compare = base is not None and base.exists()
    if path is None and not compare:
        raise UsageError("no text: give -f FILE" + (f" (there is no {base} to compare with)" if base else ""))
    if kld == "" and not _decodes(engine, decode):
        raise UsageError("--kld without FILE compares with dense attention: give another --policy, or --decode")
    text = read_file(path, MAX_TEXT) if path is not None else None
    report = _Report(as_json)
    if compare:
        assert base is not None
        given = click.get_current_context().get_parameter_source("n_ctx") is not ParameterSource.DEFAULT
        result = _compare(model, text, n_chunks, base, engine, decode, engine.n_ctx if given else None, report)
    else:
        assert text is not None
        measure = _compare_with_dense if kld == "" else partial(_measure, save=base)
        result = measure(model, text, n_chunks, engine, decode, report)
    if as_json:
        click.echo(json.dumps(result, indent=1))


class _Report:
    """Window by window: a running figure on stdout, or a progress line with --json; on stderr how long it will take."""

    def __init__(self, as_json: bool):
        self.as_json = as_json
        self.progress = Progress("scoring", " windows")
        self.n, self.n_ctx, self.begun, self.first = 0, 0, 0.0, True

    def groups(self, windows: np.ndarray, size: int) -> Iterator[slice]:
        """Yields which windows come next, `size` at a time; the caller answers each with `scored`."""
        self.n, self.n_ctx = windows.shape
        with self.progress:
            self.begun = time.perf_counter()
            for start in range(0, self.n, size):
                self.first = start == 0
                yield slice(start, min(start + size, self.n))

    def scored(self, done: int, text: str, nl: bool = True) -> None:
        """The figures after so many windows. The first tell how long the others will take: on a line before them."""
        if self.first and done < self.n:
            each = (time.perf_counter() - self.begun) / done
            self.progress.close()
            say(
                f"{self.n} windows of {self.n_ctx} tokens, {each:.1f} s each: about {_duration(self.n * each)}",
                faint=True,
            )
        if self.as_json and sys.stderr is not None and sys.stderr.isatty():
            self.progress(done, self.n)
        self.write(text, nl=nl)

    def read(self, nbytes: list[float]) -> None:
        """The bytes of cache that a step of each window read, if they were decoded."""
        if nbytes:
            self.write(f"KV cache read: {statistics.fmean(nbytes) / 2**20:.2f} MiB per token")

    def write(self, text: str, nl: bool = True) -> None:
        if self.as_json:
            return
        self.progress.close()  # the running figures show progress from here on
        try:
            click.echo(text, nl=nl)
        except OSError as e:
            e.filename = "standard output"  # not the base file that is being written
            raise


def _decodes(engine: Engine, decode: bool) -> bool:
    """Whether what is scored is decoded step by step."""
    return decode or str(engine.policy) != "dense"


def _measure(
    model: str | None,
    text: bytes,
    n_chunks: int | None,
    engine: Engine,
    decode: bool,
    report: _Report,
    save: Path | None = None,
) -> dict[str, Any]:
    from .. import perplexity as scoring

    decode = _decodes(engine, decode)
    with engine.load(model) as llama:
        windows = scoring.cut_windows(_tokens(llama, text), llama.n_ctx, n_chunks)
        running, read = scoring.Perplexity(), list[float]()
        with _base_file(save, windows.shape, llama.config.n_vocab) as base:
            if base is not None:
                scoring.write_header(base, windows, llama.config.n_vocab)
            for group in report.groups(windows, scoring.together(llama, llama.n_ctx) if decode else 1):
                for scored in scoring.score(llama, windows, group, decode, read):
                    running.add(scored.logits, scored.tokens)
                    if base is not None:
                        scoring.write_rows(base, windows, scored)
                report.scored(group.stop, f"[{group.stop}]{running.value:.4f},", nl=False)
        report.write("")
        report.write(f"Final estimate: PPL = {running.value:.4f} +/- {running.error:.5f}")
        report.read(read)
        if save is not None:
            say(f"saved {save}: compare another model with minirt perplexity OTHER --kld {save}")
        return _header(llama, windows, decode, read) | {
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
    decode: bool,
    n_ctx: int | None,
    report: _Report,
) -> dict[str, Any]:
    from .. import perplexity as scoring

    decode = _decodes(engine, decode)
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

            read: list[float] = []

            def pairs(group: slice) -> Iterator[tuple[Scored, np.ndarray]]:
                for scored in scoring.score(llama, windows, group, decode, read):
                    yield scored, base.read(scored.rows.tolist())

            size = scoring.together(llama, llama.n_ctx) if decode else 1
            found = _diverge(windows, size, pairs, report)
            report.read(read)
            return _header(llama, windows, decode, read) | {"base": str(kld)} | found


def _compare_with_dense(
    model: str | None, text: bytes, n_chunks: int | None, engine: Engine, decode: bool, report: _Report
) -> dict[str, Any]:
    from .. import perplexity as scoring

    with engine.load(model) as llama:
        windows, read = scoring.cut_windows(_tokens(llama, text), llama.n_ctx, n_chunks), list[float]()

        def pairs(group: slice) -> Iterator[tuple[Scored, np.ndarray]]:
            scored = scoring.score(llama, windows, group, True, read)
            return zip(scored, scoring.dense_log_probs(llama, windows[group]), strict=True)

        size = scoring.together(llama, llama.n_ctx, dense=True)
        found = _diverge(windows, size, pairs, report)
        report.read(read)
        return _header(llama, windows, True, read) | {"base": "dense"} | found


def _diverge(
    windows: np.ndarray,
    size: int,
    pairs: Callable[[slice], Iterator[tuple[Scored, np.ndarray]]],
    report: _Report,
) -> dict[str, float]:
    """The divergence of predictions from the base's log-probabilities, which `pairs` yields for a group of windows."""
    from ..perplexity import Divergence

    divergence = Divergence()
    report.write("window        PPL    ln(PPL/base)          KLD  same top")
    for group in report.groups(windows, size):
        for scored, log_base in pairs(group):
            divergence.add(scored.logits, scored.tokens, log_base)
        s = divergence.statistics()
        report.scored(
            group.stop,
            f"{group.stop:6d} {s['ppl']:10.4f} {s['ln_ppl_ratio']:15.5f} {s['kld']:12.6f} {100 * s['same_top']:7.3f} %",
        )
    report.write(_summary(s))
    return s


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


def _header(llama: Llama, windows: np.ndarray, decode: bool, read: list[float]) -> dict[str, Any]:
    from ..stores import stores_text

    (n_chunk, n_ctx), plan = windows.shape, llama.session.cache.plan
    return {
        "model": llama.config.name,
        "policy": str(llama.decoder.policy),
        "kv": stores_text(plan.k_store, plan.v_store),
        "device": llama.decoder.ops.name,
        "decode": decode,
        "n_ctx": n_ctx,
        "n_chunk": n_chunk,
        "kv_bytes_read": statistics.fmean(read) if read else None,
    }


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
