"""Whole models: the time of a token at a depth of the context, policy beside policy.

All policies decode the same tokens behind the same context, a few of each in turn; the context is random, or a text
that the model reads. A step ends with the most likely token of each sequence, which is all that leaves a card. What it
must read (weights, and the cache by the policy's formula) over the memory's speed is the least it could take; what
dense attention must read over what a policy must is the most it could gain.

Fewer layers than a model has fit more machines, and are as fast, layer by layer. So the time of all comes of two
measurements: all = none + (some - none) / layers * all layers, where none is a step without any layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..cache import Cache, CachePlan
from ..decoder import Decoder
from ..llama import MIN_CONTEXT, bytes_per_token
from ..policies import Dense, Policy, parse_policy
from ..session import prompt_chunks
from ..stores import get_stores
from .attention import BASELINE, resolve
from .caches import caches_bytes, caches_of, check_room, fill_all, most_filling
from .counted import formula_bytes
from .paired import Timed, in_turn
from .synthetic import SEED

WITHOUT = "no layers"  # in the place of a policy


@dataclass(frozen=True)
class Workload:
    """What is compared: policies behind the same context."""

    n_seq: int
    depth: int  # tokens of each sequence before the first step
    kv: str
    steps: int  # tokens in a turn
    rounds: int  # turns that count

    @property
    def n_ctx(self) -> int:
        return max(self.depth + self.steps * (self.rounds + 2), MIN_CONTEXT)

    def __str__(self) -> str:
        return f"B={self.n_seq} S={self.depth} {self.kv}"


def policies_of(decoder: Decoder, work: Workload, texts: Sequence[str]) -> dict[str, Policy]:
    """The policies by their texts, in which parameters may be shares; UsageError if one does not fit."""
    c, made = decoder.config, {}
    for text in texts:
        made[text] = parse_policy(resolve(text, work.depth, c.head_dim))
        made[text].check(c, work.n_ctx, *get_stores(work.kv, c.palu))
    return made


def measure(
    decoder: Decoder,
    work: Workload,
    policies: Sequence[str],
    *,
    room: int,
    context: Sequence[int] | None = None,
    full_layers: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """A record for each policy (texts, dense the first) of a step of the decoder's model, whatever its own policy.

    room: bytes that the caches may take. context: token ids of a text, at least as many as the depth; None: random
    caches. full_layers: of the model that this one stands for; 0: itself. advance: called as often as `stages` says.
    """
    c, stores = decoder.config, get_stores(work.kv, decoder.config.palu)
    made = policies_of(decoder, work, policies)
    plans = {text: policy.plan(c, work.n_ctx, *stores) for text, policy in made.items()}
    need = caches_bytes(c, made, plans, work.n_seq) + most_filling(c, made, plans, work.depth)
    check_room(work, need, room)
    caches = caches_of(decoder, made, plans, work.n_seq)
    runs = {text: Run(decoder.under(policy), caches[text], work) for text, policy in made.items()}
    if context is None:
        fill_all(decoder.ops, caches, made, c, work.depth)
    else:
        for run in runs.values():
            run.read(context)
    advance()
    bare = replace(decoder.weights, layers=[])
    without = Decoder(c.of_layers([]), bare, decoder.ops, Dense())
    plan = CachePlan((), *stores, work.n_ctx, c.head_dim)
    runs[WITHOUT] = Run(without, without.new_cache(plan, work.n_seq), work)
    timed = in_turn(runs, lambda: None, work.rounds, advance, piece=0)
    weights = bytes_per_token(decoder.weights), bytes_per_token(bare)
    read = {text: formula_bytes(decoder.ops, policy, c, caches[text], work.depth) for text, policy in made.items()}
    return list(_records(work, timed, read, weights, c.n_layer, full_layers or c.n_layer))


def stages(policies: Sequence[str], rounds: int) -> int:
    """How often `measure` calls `advance`."""
    return 1 + (len(policies) + 1) * (rounds + 1)


class Run:
    """A model that decodes `steps` tokens in each turn."""

    def __init__(self, decoder: Decoder, cache: Cache, work: Workload):
        self.decoder, self.cache, self.steps = decoder, cache, work.steps
        rng = np.random.default_rng(SEED)
        self.tokens = rng.integers(decoder.config.n_vocab, size=(work.n_ctx, work.n_seq)).tolist()

    def read(self, context: Sequence[int]) -> None:
        """Prefills every sequence with a text."""
        for seq in range(len(self.cache.n_seen)):
            for start, stop in prompt_chunks(self.decoder.policy, 0, len(context)):
                self.decoder.prefill(self.cache, context[start:stop], seq, "none")

    def __call__(self) -> None:
        for _ in range(self.steps):
            self.decoder.choose(self.cache, self.tokens[int(self.cache.n_seen[0])])


def _records(
    work: Workload,
    timed: Mapping[str, Timed],
    read: Mapping[str, int],
    weights: tuple[int, int],
    layers: int,
    full_layers: int,
) -> Any:
    """weights: bytes that a step reads, with all layers and without any."""

    def whole(some: float, none: float) -> float:
        return none + (some - none) / layers * full_layers

    def ms(text: str) -> float:
        return 1e3 * timed[text].median / work.steps

    def nbytes(text: str, whole_model: bool) -> float:
        some, none = weights[0] + read[text], weights[1]
        return whole(some, none) if whole_model else some

    none = ms(WITHOUT)
    for text in read:
        own, full = ms(text), whole(ms(text), none)
        times = {name: value / work.steps for name, value in timed[text].record().items()}
        yield {
            "policy": text, "layers": layers, "steps": work.steps, "rounds": work.rounds, **times,
            "tokens_per_second": 1e3 * work.n_seq / own,
            "weight_bytes": weights[0], "kv_bytes": read[text], "gb_per_s": (weights[0] + read[text]) / own / 1e6,
            "speed_up": ms(BASELINE) / own, "theory": nbytes(BASELINE, False) / nbytes(text, False),
            "ms_without_layers": none, "full_layers": full_layers, "full_ms": full,
            "full_speed_up": whole(ms(BASELINE), none) / full,
            "full_theory": nbytes(BASELINE, True) / nbytes(text, True),
        }  # fmt: skip
