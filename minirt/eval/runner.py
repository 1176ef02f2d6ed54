"""Runs examples under the model's policy, and sums up what came out.

The first token comes from the logits after the prompt, which policies prefill densely, so that they act from the second
token on; those with a window, and others that are told to (`compress`), act on the prompt too. Decoding is greedy and
does not stop at the end of the text.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..llama import Llama
from ..perplexity import log_sum_exp
from ..policies import parse_policy
from ..session import Progress
from .example import Example
from .sources import Task

BASELINE = "dense"  # the policy that others are compared with
NO_CONTEXT = "no context"  # in its place: dense, with the question alone


@dataclass(frozen=True)
class Outcome:
    """What one example came to. The bytes are of the cache and of all decode steps together."""

    score: float
    output: str
    n_prompt: int  # tokens prefilled
    n_steps: int  # decode steps, one less than the tokens that are scored
    bytes_read: int
    dense_bytes: int  # what dense attention would have read at the same lengths
    bytes_held: int  # of the whole cache
    seconds: float


def attempt(
    llama: Llama, task: Task, example: Example, *, context: bool = True, progress: Progress | None = None
) -> Outcome:
    """Runs one example under the model's policy. context: False asks the question alone. progress: of the prefill."""
    begun, session = time.perf_counter(), llama.session
    prompt = example.prompt if context else example.question
    logits = session.feed(prompt, progress)
    tokens: list[int] = []
    bits = 0.0
    for i in range(example.n_gen):
        if i:
            logits = session.step(tokens[-1])
        token = example.forced[i] if example.forced else int(np.argmax(logits))
        if example.forced:
            bits += surprise(logits, token)
        tokens.append(token)
    output = llama.tokenizer.decode(tokens, start=False)
    config, plan = llama.config, session.cache.plan
    dense, policy = parse_policy(BASELINE), llama.decoder.policy
    dense_plan = dense.plan(config, llama.n_ctx, plan.k_store, plan.v_store)
    seen = range(len(prompt) + 1, len(prompt) + example.n_gen)
    return Outcome(
        score=task.score(example, output, bits),
        output=output,
        n_prompt=len(prompt),
        n_steps=len(seen),
        bytes_read=round(sum(policy.bytes_touched(llama.decoder.ops, config, session.cache, 0, n) for n in seen)),
        dense_bytes=sum(dense.bytes_read(config, dense_plan, n) for n in seen),
        bytes_held=plan.nbytes(config),
        seconds=time.perf_counter() - begun,
    )


def surprise(logits: np.ndarray, token: int) -> float:
    """-log2 of a token's probability, from float32 logits [n_vocab]."""
    highest, log_sum = log_sum_exp(logits[None])
    return float(log_sum[0] + highest[0] - logits[token]) / math.log(2)


Row = Mapping[str, Any]  # an Outcome's fields, and which example it is of


def summarise(rows: Sequence[Row], baseline: Sequence[Row] = ()) -> dict[str, Any]:
    """The means over examples, with standard errors; and of the differences from a baseline, example by example.

    Only examples that the baseline has too are compared; None stands for what cannot be told.
    """
    by_example = {_example(row): row["score"] for row in baseline}
    pairs = [row["score"] - by_example[_example(row)] for row in rows if _example(row) in by_example]
    steps = sum(row["n_steps"] for row in rows)
    read, dense = sum(row["bytes_read"] for row in rows), sum(row["dense_bytes"] for row in rows)
    score, score_error = mean_and_error([row["score"] for row in rows])
    difference, difference_error = mean_and_error(pairs) if pairs else (None, None)
    return {
        "n_examples": len(rows),
        "n_prompt": statistics.fmean(row["n_prompt"] for row in rows),
        "n_gen": steps / len(rows) + 1,
        "score": score,
        "score_error": score_error,
        "n_paired": len(pairs),
        "difference": difference,
        "difference_error": difference_error,
        "kv_bytes_per_token": read / steps if steps else None,
        "dense_bytes_per_token": dense / steps if steps else None,
        "share_of_dense": read / dense if dense else None,
        "kv_bytes_held": statistics.fmean(row["bytes_held"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, 0 for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def _example(row: Row) -> tuple[str, str]:
    return row["example"], row["digest"]
