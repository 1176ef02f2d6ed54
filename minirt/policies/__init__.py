"""KV-cache policies by name: which cached tokens are kept, which are read.

A policy is a frozen dataclass of parameters with the methods of `Policy`, written in ops, so one page serves every
device. It holds no state: what changes lives in the cache. A policy is written as its name and the parameters that are
not at their default: "sparq:r=16:k=64", "tova:budget=1/8".

A method added later is one page here, one line in POLICIES, and a row of tests/test_policies.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from ..cache import Cache, CachePlan
from ..config import ModelConfig
from ..errors import UsageError
from ..ops import Array, Ops
from ..stores import Store
from .base import BasePolicy, flag, parameters
from .budget import Budget
from .d2o import D2O, D2OCode
from .dense import Dense
from .h2o import H2O
from .sparq import SparQ
from .topk import TopK
from .tova import TOVA
from .window import LMInfinite, Streaming, Window

__all__ = [
    "D2O", "H2O", "POLICIES", "TOVA", "BasePolicy", "Budget", "D2OCode", "Dense", "LMInfinite", "Policy", "SparQ",
    "Streaming", "TopK", "Window", "in_proportion", "make_policy", "parse_policy",
]  # fmt: skip


class Policy(Protocol):
    """What decoder and session ask of a method. `BasePolicy` has what most of them have in common."""

    @property
    def name(self) -> str: ...

    @property
    def whole_prompt(self) -> bool:
        """Whether a prompt must come in one call of `prefill`, not in chunks."""

    def check(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> None:
        """Raises UsageError if the parameters do not fit the model or a context of n_ctx tokens."""

    def plan(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> CachePlan:
        """What to allocate for contexts of up to n_ctx tokens."""

    def prefill(self, ops: Ops, cache: Cache, layer: int, seq: int, q: Array, k: Array, v: Array) -> Array:
        """A prompt chunk of one sequence: takes q [T, H_q, d], k and v [T, H_kv, d], rotated; returns [T, H_q, d]."""

    def prefilled(self, ops: Ops, cache: Cache, seq: int) -> None:
        """After `prefill` of all layers."""

    def attend(self, ops: Ops, cache: Cache, layer: int, q: Array, k: Array, v: Array) -> Array:
        """One decode step, a token per sequence: q [B, H_q, d], k and v [B, H_kv, d]; returns [B, H_q, d].

        It calls ops with arrays of the cache and of other ops. What changes from step to step comes from one call of
        `cache.once`, so that the calls may be recorded, and made again in the next step without a call of `attend`.
        """

    def rewind(self, ops: Ops, cache: Cache, seq: int, n: int) -> int:
        """Forgets all but the first n tokens of a sequence; returns how many it could keep (n, or fewer)."""

    def held(self, config: ModelConfig, cache: Cache, seq: int) -> int:
        """Tokens of a sequence whose keys and values a layer holds, on average."""

    def bytes_read(self, config: ModelConfig, plan: CachePlan, n: int) -> int:
        """Bytes of cache that one decode step must read with n tokens seen, all layers, one sequence: the most, if
        that is found out step by step."""

    def bytes_touched(self, ops: Ops, config: ModelConfig, cache: Cache, seq: int, n: int) -> float:
        """Bytes that it reads by what was found out so far: the mean of the steps that a sequence has made."""

    def small(self) -> Policy:
        """The same method with parameters that act on a text of a few tokens: to compile its kernels."""


POLICIES: dict[str, type[BasePolicy]] = {
    policy.name: policy for policy in (Dense, SparQ, TopK, Window, Streaming, LMInfinite, H2O, TOVA, D2O, D2OCode)
}


def make_policy(name: str, values: Mapping[str, Any] | None = None) -> Policy:
    """The policy of that name with these parameters; UsageError lists what there is."""
    if name not in POLICIES:
        raise UsageError(f"unknown policy '{name}' (one of: {', '.join(POLICIES)})")
    known = parameters(POLICIES[name])
    for parameter in values or {}:
        if parameter not in known:
            flags = ", ".join(flag(p) for p in known) or "none"
            raise UsageError(f"{flag(parameter)} is not a parameter of --policy {name} (it has: {flags})")
    return POLICIES[name](**values or {})  # type: ignore[return-value]


def in_proportion(policy: Policy, n: int, of: int) -> Policy:
    """The policy for a text of n tokens that reads the same share of them as this one does of a text of `of` tokens.

    A budget that is a share is one already; one of so many tokens stays what it is.
    """
    if isinstance(policy, TopK):
        return replace(policy, k=max(1, policy.k * n // of))
    if isinstance(policy, SparQ):
        rows = max(1, policy.rows * n // of)
        return replace(policy, most=rows) if policy.adaptive else replace(policy, k=rows)
    return policy


def parse_policy(text: str | Policy, flags: Iterable[tuple[str, str]] = ()) -> Policy:
    """A policy from its text, "name" or "name:parameter=value:...", and parameters given besides; a policy as it is."""
    if not isinstance(text, str):
        return text
    name, *rest = text.split(":")
    values: dict[str, str] = {}
    for part in rest:
        parameter, equals, value = part.partition("=")
        if not equals or not value:
            raise UsageError(f"--policy {text}: '{part}' is not PARAMETER=VALUE")
        if parameter.replace("-", "_") in values:
            raise UsageError(f"--policy {text}: {parameter} is given twice")
        values[parameter.replace("-", "_")] = value
    for parameter, value in flags:
        if parameter in values:
            raise UsageError(f"{flag(parameter)} is given twice")
        values[parameter] = value
    return make_policy(name, values)
