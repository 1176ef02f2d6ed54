"""How many tokens per second the same memory makes: policies with a budget hold more sequences of it than dense does.

Each policy decodes as many sequences together as fit into what dense attention takes for some, and, beside that, as
many as dense. A weight is read once for all sequences of a step, so both show what a small cache gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..decoder import Decoder
from ..llama import bytes_per_token
from ..stores import get_stores
from .attention import BASELINE
from .caches import check_room, most_filling
from .counted import formula_bytes
from .models import Run, Workload, policies_of
from .paired import in_turn
from .synthetic import fill


def measure(
    decoder: Decoder,
    work: Workload,
    policies: Sequence[str],
    *,
    room: int,
    most: int,
    advance: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Two records for each policy (texts, dense the first): of work.n_seq sequences, of as many as their memory holds.

    room: bytes that all caches together may take. most: sequences at most. advance: called as often as `stages` says.
    """
    c, ops, stores = decoder.config, decoder.ops, get_stores(work.kv, decoder.config.palu)
    made = policies_of(decoder, work, policies)
    plans = {text: policy.plan(c, work.n_ctx, *stores) for text, policy in made.items()}
    one = {text: plan.nbytes(c) for text, plan in plans.items()}
    memory = work.n_seq * one[BASELINE]
    batches = {text: {"batch": work.n_seq, "memory": max(1, min(memory // one[text], most))} for text in made}
    distinct = {(text, n) for text, of in batches.items() for n in of.values()}
    need = sum(n * one[text] for text, n in distinct) + most_filling(c, made, plans, work.depth)
    check_room(work, need, room)
    runs = {}
    for text, n in sorted(distinct, key=lambda key: (policies.index(key[0]), key[1])):
        cache = decoder.new_cache(plans[text], n)
        fill(ops, cache, made[text], c, work.depth)
        cache.n_seen[:] = work.depth
        runs[f"{text} {n}"] = Run(decoder.under(made[text]), cache, replace(work, n_seq=n))
        advance()
    timed = in_turn(runs, lambda: None, work.rounds, advance, piece=0)
    records = []
    for same in ("batch", "memory"):
        base = timed[f"{BASELINE} {batches[BASELINE][same]}"].median / batches[BASELINE][same]
        for text, policy in made.items():
            n = batches[text][same]
            own = timed[f"{text} {n}"]
            cache = runs[f"{text} {n}"].cache
            read = bytes_per_token(decoder.weights) + formula_bytes(ops, policy, c, cache, work.depth)
            times = {name: value / work.steps for name, value in own.record().items()}
            records.append(
                {
                    "policy": text, "same": same, "n_sequences": n, "layers": c.n_layer, "steps": work.steps,
                    "rounds": work.rounds, **times, "tokens_per_second": n * work.steps / own.median,
                    "cache_bytes": n * one[text], "bytes_read": read,
                    "gb_per_s": read * work.steps / own.median / 1e9, "speed_up": base / (own.median / n),
                }
            )  # fmt: skip
    return records


def stages(policies: Sequence[str], rounds: int) -> int:
    """How often `measure` calls `advance`, at most."""
    return 2 * len(policies) * (rounds + 2)
