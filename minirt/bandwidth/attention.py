"""Attention alone: what a policy does in one layer of a decode step, over the bytes it must read.

A step is the policy's own: the new token is appended to every copy it keeps, means and scores are renewed, tokens are
chosen and read. Keys and values are normal random numbers in so many layers, one after the other, that no cache of the
processor holds them; a policy is first checked against the NumPy reference. All policies of a cell (a shape and a KV
type) read the same keys and values, in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..cache import Cache, CachePlan
from ..config import ModelConfig
from ..decoder import Decoder
from ..errors import ModelError, UsageError
from ..ops import Array, Ops
from ..policies import Policy, in_proportion, parse_policy
from ..reference import ReferenceOps
from ..stores import Store, get_stores
from .caches import caches_bytes, caches_of, check_room, fill_all, most_filling
from .counted import CountedOps, formula_bytes
from .paired import in_turn
from .synthetic import SEED, RandomRows, Shape, config_of, factors_of, fill, random_queries, with_latents

TOUCHED = 1 << 30  # bytes that the policy which reads least shall read before it comes to a layer again, unless ...
MOST_LAYERS, MOST_BYTES = 64, 6 << 30  # ... so many would not be enough
CHECKED = 1 << 19  # rows of keys that the reference is asked for, if nobody says otherwise
# Of the norm of a head's result: what most heads may be off, and one whose choice of rows turns on the last bit.
MOST_OFF, ONE_OFF = 2e-3, 0.3
BASELINE = "dense"
LATENT = "latent-"  # in the names of KV types that are Palu's


@dataclass(frozen=True)
class Cell:
    """What is compared: policies on the same keys and values."""

    n_seq: int  # B
    depth: int  # S: tokens in the context, the new one included
    n_head: int
    n_head_kv: int
    head_dim: int
    kv: str

    @property
    def config(self) -> ModelConfig:
        """A layer of that shape; with low-rank keys and values, if latents are cached."""
        one = config_of(Shape(1, 32, self.n_head, self.n_head_kv, self.head_dim, 32, 32))
        return with_latents(one) if LATENT in self.kv else one

    @property
    def stores(self) -> tuple[Store, Store]:
        return get_stores(self.kv, self.config.palu)

    def __str__(self) -> str:
        heads = f"{self.n_head}/{self.n_head_kv}x{self.head_dim}"
        return f"B={self.n_seq} S={self.depth} {heads} {self.kv}"


def resolve(spec: str, depth: int, head_dim: int) -> str:
    """A policy's text in which parameters may be shares of the shape: "sparq:r=d/12:k=S/12"."""
    name, *parameters = spec.split(":")
    for i, parameter in enumerate(parameters):
        key, _, value = parameter.partition("=")
        for letter, whole in (("S", depth), ("d", head_dim)):
            if value.startswith(f"{letter}/"):
                if not value[2:].isdecimal() or int(value[2:]) == 0:
                    raise UsageError(f"--policy {spec}: '{parameter}' is not PARAMETER={letter}/NUMBER")
                parameters[i] = f"{key}={max(1, whole // int(value[2:]))}"
    return ":".join([name, *parameters])


def policies_of(cell: Cell, texts: Sequence[str]) -> dict[str, Policy]:
    """The policies by their texts, in which parameters may be shares; UsageError if one does not fit."""
    made = {}
    for text in texts:
        made[text] = parse_policy(resolve(text, cell.depth, cell.head_dim))
        made[text].check(cell.config, cell.depth, *cell.stores)
    return made


def measure(
    ops: Ops,
    cell: Cell,
    policies: Sequence[str],
    *,
    rounds: int,
    room: int,
    checked: int = CHECKED,
    advance: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """A record for each policy (texts, dense the first), in milliseconds of a layer and bytes of all its sequences.

    room: bytes that the caches may take. checked: rows of keys, all heads and sequences, that the reference is asked
    for. advance: called whenever something was checked, filled or timed: see `stages`.
    Raises NoRoom, UsageError if a policy does not fit, ModelError if one is not what the reference computes.
    """
    made, stores = policies_of(cell, policies), cell.stores
    layers = _layers_of(cell, made, stores, room)
    errors = {}
    for text, policy in made.items():
        errors[text], worst = error_of(ops, cell, policy, checked)
        if not (errors[text] <= MOST_OFF and worst <= ONE_OFF):
            off = f"the result is off by {errors[text]:.2g} of its norm, that of a head by {worst:.2g}"
            raise ModelError(f"{cell}, {text}: {off}")
        advance()
    config = cell.config.of_layers([0] * layers)
    plans = {text: policy.plan(config, cell.depth, *stores) for text, policy in made.items()}
    decoder = Decoder(config, factors_of(ops, config), ops, made[BASELINE])
    caches = caches_of(decoder, made, plans, cell.n_seq)
    fill_all(ops, caches, made, config, cell.depth - 1)
    advance()
    inputs = _inputs(ops, cell, plans[BASELINE], config)
    steps = {text: _Step(ops, policy, caches[text], inputs, range(layers)) for text, policy in made.items()}
    timed = in_turn(steps, steps[BASELINE].settle, rounds, advance)
    records: list[dict[str, Any]] = []
    for text, policy in made.items():
        own, formula = timed[text], formula_bytes(ops, policy, config, caches[text], cell.depth) // layers
        read, written = _touched(ops, policy, caches[text], inputs, layers)
        ms = own.record()
        records.append(
            {"policy": text, "resolved": str(policy), "layers": layers, "rounds": rounds}
            | {name: value / layers for name, value in ms.items()}
            | {"bytes_formula": formula, "bytes_read": read, "bytes_written": written, "error": errors[text]}
        )
    dense = records[list(made).index(BASELINE)]
    for record in records:
        record["speed_up"] = dense["ms"] / record["ms"]
        record["ratio_of_bytes"] = dense["bytes_formula"] / record["bytes_formula"]
        record["gb_per_s"] = record["bytes_read"] / record["ms"] / 1e6
    return records


def stages(policies: Sequence[str], rounds: int) -> int:
    """How often `measure` calls `advance`."""
    return len(policies) * (rounds + 2) + 1


def _inputs(ops: Ops, cell: Cell, plan: CachePlan, config: ModelConfig) -> tuple[Array, Array, Array]:
    """Queries, keys and values of each sequence's last token."""
    rng = np.random.default_rng((SEED, 1))  # others than those in the cache
    q, rows = random_queries(ops, rng, cell.n_seq, config), RandomRows(ops, rng, cell.n_seq, plan, config)
    return (q, *rows(np.full(cell.n_seq, cell.depth - 1)))


class _Step:
    """A policy's attention in several layers, recorded if the device can."""

    def __init__(self, ops: Ops, policy: Policy, cache: Cache, inputs: tuple[Array, ...], layers: range):
        self.ops = ops

        def step(ops: Ops) -> Array:
            return [policy.attend(ops, cache, layer, *inputs) for layer in layers][-1]

        ops.record(step)  # compiles, and makes room
        self.out, again = ops.record(step)
        self._again = again or (lambda: step(ops))

    def __call__(self) -> None:
        self._again()

    def settle(self) -> None:
        self.ops.to_host(self.out)


def _touched(ops: Ops, policy: Policy, cache: Cache, inputs: tuple[Array, ...], layers: int) -> tuple[int, int]:
    """Bytes that a layer reads and writes of the cache, on average."""
    counted = CountedOps(ops, cache.plan)
    for layer in range(layers):
        policy.attend(counted, cache, layer, *inputs)
    return counted.read // layers, counted.written // layers


def _layers_of(cell: Cell, policies: Mapping[str, Policy], stores: tuple[Store, Store], room: int) -> int:
    """How many layers have a cache each: as many as are needed, or fit."""
    one = cell.config
    plans = {text: policy.plan(one, cell.depth, *stores) for text, policy in policies.items()}
    need, filling = caches_bytes(one, policies, plans, cell.n_seq), most_filling(one, policies, plans, cell.depth)
    check_room(cell, need + filling, room)
    least = cell.n_seq * min(policy.bytes_read(one, plans[text], cell.depth) for text, policy in policies.items())
    return max(1, min(MOST_LAYERS, -(-TOUCHED // max(least, 1)), min(room - filling, MOST_BYTES) // need))


def error_of(ops: Ops, cell: Cell, policy: Policy, checked: int = CHECKED) -> tuple[float, float]:
    """How far a policy's attention is from the reference's, as a share of a head's norm: in half of the heads of all
    sequences at most, and in any.

    At the cell's own depth, or at as many tokens as the reference is asked for.
    """
    most = max(checked // (cell.n_seq * cell.n_head_kv), 64)
    depth = min(cell.depth, most)
    config, stores, found = cell.config, cell.stores, []
    for device in (ops, ReferenceOps()):
        small = in_proportion(policy, depth, cell.depth)
        decoder = Decoder(config, factors_of(device, config), device, small)
        cache = decoder.new_cache(small.plan(config, depth, *stores), cell.n_seq)
        fill(device, cache, small, config, depth - 1)
        inputs = _inputs(device, replace(cell, depth=depth), cache.plan, config)
        heads = np.array(device.to_host(small.attend(device, cache, 0, *inputs)))
        found.append(heads.reshape(cell.n_seq * cell.n_head, -1))
    off = np.linalg.norm(found[0] - found[1], axis=1) / np.linalg.norm(found[1], axis=1)
    return float(np.median(off)), float(off.max())
