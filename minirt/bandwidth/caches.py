"""Caches of several policies over the same tokens: those that keep every token share its keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..cache import Cache, CachePlan, SideArray, allocate_cache
from ..config import ModelConfig
from ..decoder import Decoder
from ..errors import UsageError
from ..ops import Ops
from ..policies import Policy
from ..policies.base import BoundedPolicy
from .synthetic import fill, filling_bytes

Policies = Mapping[str, Policy]
Plans = Mapping[str, CachePlan]


def keeps_all(policy: Policy) -> bool:
    """Whether its keys and values are those of dense attention, so that the two may lie in the same memory."""
    return not isinstance(policy, BoundedPolicy)


class NoRoom(UsageError):
    """A cell of a grid needs more memory than there is."""


def check_room(what: object, need: int, room: int) -> None:
    if need > room:
        raise NoRoom(f"{what}: the caches need {need / 2**30:.1f} GiB, {max(room, 0) / 2**30:.1f} GiB are free")


def caches_bytes(config: ModelConfig, policies: Policies, plans: Plans, n_seq: int = 1) -> int:
    """Bytes of what `caches_of` allocates."""
    common = _common(policies, plans)
    total = 0 if common is None else common.nbytes(config, n_seq)
    return total + sum(plans[name].nbytes(config, n_seq) for name, policy in policies.items() if not keeps_all(policy))


def most_filling(config: ModelConfig, policies: Policies, plans: Plans, depth: int) -> int:
    """Bytes that `fill_all` takes besides, at most."""
    return max(filling_bytes(policy, plans[name], config, depth) for name, policy in policies.items())


def caches_of(decoder: Decoder, policies: Policies, plans: Plans, n_seq: int = 1) -> dict[str, Cache]:
    """A cache for each policy, empty, on the decoder's device. Of what is shared the last one that wrote counts."""
    common, caches = _common(policies, plans), {}
    together = None if common is None else decoder.new_cache(common, n_seq)
    for name, policy in policies.items():
        if together is None or not keeps_all(policy):
            caches[name] = decoder.new_cache(plans[name], n_seq)
            continue
        side = {array: together.side[_name(array, of_layers)] for array, of_layers in plans[name].side.items()}
        own = allocate_cache(dataclasses.replace(plans[name], slots=(), side={}), decoder.config, decoder.ops, n_seq)
        caches[name] = dataclasses.replace(own, plan=plans[name], layers=together.layers, side=side, rope=decoder.rope)
    return caches


def fill_all(ops: Ops, caches: Mapping[str, Cache], policies: Policies, config: ModelConfig, depth: int) -> None:
    """Fills each cache with the same random tokens. One whose policy has a budget holds the last of them."""
    filled: set[int] = set()  # arrays that policies which keep all tokens have beside K and V
    rows = False
    for name in sorted(caches, key=lambda name: -len(caches[name].side)):
        cache, arrays = caches[name], {id(array) for arrays in caches[name].side.values() for array in arrays}
        if not (keeps_all(policies[name]) and rows and arrays <= filled):
            fill(ops, cache, policies[name], config, depth)
        if keeps_all(policies[name]):
            rows, filled = True, filled | arrays
        cache.n_seen[:] = depth


def _common(policies: Policies, plans: Plans) -> CachePlan | None:
    """Slots of every token, and the arrays of all policies that keep them; alike ones are one."""
    keeping = [plans[name] for name, policy in policies.items() if keeps_all(policy)]
    if not keeping:
        return None
    side = {_name(array, of_layers): of_layers for plan in keeping for array, of_layers in plan.side.items()}
    return dataclasses.replace(keeping[0], side=side)


def _name(array: str, of_layers: tuple[SideArray, ...]) -> str:
    return f"{array} {of_layers}"
