"""`--policy auto`: from how fast, or how small, a cache shall be to the policy and the KV type that cost the least.

What policies cost in quality was measured on one model (`frontier.json`, made by tools/paper_report.py): points of a
policy and a KV type with their divergence from dense attention, and the characters of a passage that they repeat. Those
that repeat, with a standard error more, less than half of what dense attention does have forgotten the text, however
small their divergence is, and are taken only if no other will do. Of those whose divergence is the least but for the
error of measuring it, the fastest is taken. A point is taken to another model and context in
proportion: the same share of a head's components, of the tokens, of the budget. What it reads and holds there is the
policy's own account; of the rows that k = auto may read it is the part that was read where it was measured. A token's
time is its bytes over the memory's speed, each at the share of that speed at which attention of its kind was measured
(attention_speed.py), or in proportion to the bytes alone on a device where nothing was. So the speed is an estimate for
this machine, and the divergence is another model's: a guide, not a promise.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from .attention_speed import DENSE, F16, Shares, method_of
from .cache import CachePlan
from .config import ModelConfig
from .errors import UsageError
from .gguf_file import GGUFFile
from .policies import Policy, SparQ, in_proportion, parse_policy
from .policies.budget import Budget
from .stores import get_stores

FRONTIER = Path(__file__).with_name("frontier.json")
AUTO = "auto"
STEP = 256  # tokens
REPEATED = 0.5  # of what dense attention repeats: with less a policy has forgotten
ERRORS = 2.0  # standard errors of a divergence, by which another one is no better


@dataclass(frozen=True)
class Auto:
    """What is wanted: a speed over dense attention with a float16 cache, or a cache of no more than so much."""

    speed: float = 0.0
    kv_bytes: Budget | None = None

    @classmethod
    def parse(cls, speed: str | None, kv_bytes: str | None) -> Auto:
        """From "2x" and "1/8" or "64MiB"; UsageError."""
        if speed is None and kv_bytes is None:
            raise UsageError("--policy auto takes --speed, such as 2x, or --kv-bytes, such as 1/8")
        wanted = cls()
        if speed is not None:
            if not re.fullmatch(r"\d{1,4}(\.\d{1,4})?x?", speed, re.ASCII) or float(speed.rstrip("x")) < 1:
                raise UsageError(f"--speed {speed} is not a factor of 1 or more, such as 2x")
            wanted = replace(wanted, speed=float(speed.rstrip("x")))
        if kv_bytes is not None:
            try:
                budget = Budget.parse(kv_bytes)
            except UsageError:
                budget = None
            if budget is None or budget.unit == "tokens":
                raise UsageError(f"--kv-bytes {kv_bytes} is not a share of dense's such as 1/8, or bytes such as 64MiB")
            wanted = replace(wanted, kv_bytes=budget)
        return wanted


@dataclass(frozen=True)
class Candidate:
    """A policy and a KV type, and what they come to for a model and a context."""

    policy: Policy
    kv: str
    kld: float  # nats, of the model that was measured
    kld_error: float  # standard error of that
    repeated: float  # characters of a passage that model repeats, as a share of what it does with dense attention
    repeated_error: float  # standard error of that
    speed: float  # over dense with a float16 cache, at the end of the context
    full_bytes: float  # that the memory would move in a token's time, if it did nothing else
    held: int  # bytes of cache
    timed: bool  # the speed is of what was measured on this kind of device, not of bytes alone

    @property
    def forgets(self) -> bool:
        return self.repeated + self.repeated_error < REPEATED


@functools.cache
def frontier() -> Mapping[str, Any]:
    """What was measured."""
    found: Mapping[str, Any] = json.loads(FRONTIER.read_text())
    return found


def choose(wanted: Auto, config: ModelConfig, n_ctx: int, weight_bytes: int, kv: str, device: str) -> Candidate:
    """The fastest candidate of least divergence that is wanted, if possible one that does not forget; UsageError with
    what there is, if there is none.

    weight_bytes: that a token reads. kv: "auto", or the one type that may be. device: the name of an Ops.
    """
    dense = parse_policy(DENSE)
    if config.sliding_window or config.palu is not None:
        raise UsageError("--policy auto takes a model without a sliding window or latents of its own")
    whole = dense.plan(config, n_ctx, *get_stores(F16)).nbytes(config)
    most = whole if wanted.kv_bytes is None else _bytes(wanted.kv_bytes, whole)
    found = list(_candidates(config, n_ctx, weight_bytes, kv, device))
    if not found:
        raise UsageError(
            f"--kv {kv}: --policy auto has measured no policy with it that fits this model (of {', '.join(_types())})"
        )
    good = [c for c in found if c.speed >= wanted.speed and (wanted.kv_bytes is None or c.held <= most)]
    if good:
        best = min(good, key=lambda c: (c.forgets, c.kld, -c.speed))
        return max((c for c in good if is_as_good(c, best)), key=lambda c: c.speed)
    small = [c for c in found if wanted.kv_bytes is None or c.held <= most]
    if not small:
        least = min(found, key=lambda c: c.held)
        raise UsageError(f"--kv-bytes {wanted.kv_bytes}: the least is {_share(least.held, whole)} ({_text(least)})")
    best = max(small, key=lambda c: c.speed)
    raise UsageError(
        f"--speed {wanted.speed:g}x: the most to expect at {n_ctx} tokens is {best.speed:.2f}x ({_text(best)}); "
        "a longer --ctx gains more"
    )


def is_as_good(point: Candidate, best: Candidate) -> bool:
    """As far as can be told from divergences that were measured."""
    return point.forgets == best.forgets and point.kld <= best.kld + ERRORS * best.kld_error


def reason(chosen: Candidate, config: ModelConfig, n_ctx: int, bandwidth: float | None) -> str:
    """What was picked and why, in a line. bandwidth: of the memory, in bytes per second, if it is known."""
    whole = parse_policy(DENSE).plan(config, n_ctx, *get_stores(F16)).nbytes(config)
    speed = "" if bandwidth is None else f" ({bandwidth / chosen.full_bytes:.0f} tokens/s)"
    return (
        f"{_text(chosen)}: about {chosen.speed:.1f}x dense at {n_ctx} tokens{speed}, {_share(chosen.held, whole)} of "
        f"its cache; of {len(frontier()['points'])} that were measured the one that does at the least divergence "
        + ("" if chosen.forgets else "and does not forget the text ")
        + f"({chosen.kld:.3f} nats, on {frontier()['model']})"
        + (f"; it forgets: it repeats {100 * chosen.repeated:.0f} % of what dense does" if chosen.forgets else "")
        + ("" if chosen.timed else "; the speed is of bytes alone: it was not measured on this device")
    )


def read_per_token(file: GGUFFile) -> int:
    """Bytes of weights that a decode step reads: all but embeddings that are not the output too."""
    unread = ("token_embd.weight",) if "output.weight" in file.tensors else ()
    return sum(tensor.data.nbytes for name, tensor in file.tensors.items() if name not in unread)


def _types() -> list[str]:
    """The KV types of all points."""
    return list(dict.fromkeys(point["kv"] for point in frontier()["points"]))


def _candidates(config: ModelConfig, n_ctx: int, weight_bytes: int, wanted: str, device: str) -> Iterator[Candidate]:
    """All measured points that fit this model, of the wanted KV type or any."""
    data = frontier()
    reach = data["efficiency"].get(device, {})
    shares, weights = Shares(reach.get("attention", ())), weight_bytes / reach.get("weights", 1.0)
    dense, grouped, width = parse_policy(DENSE), config.n_head != config.n_head_kv, config.n_head_kv * config.head_dim
    dense_plans = {kv: dense.plan(config, n_ctx, *get_stores(kv)) for kv in (F16, *_types())}

    def full_bytes(policy: Policy, kv: str, plan: CachePlan, n: int = n_ctx, part: float = 1.0) -> float:
        """part: of the rows that it may read."""
        every = dense.bytes_read(config, dense_plans[kv], n)
        if isinstance(policy, SparQ) and n <= policy.until:
            return weights + every / shares.of(DENSE, kv, grouped, n, width, 1.0)
        read: float = policy.bytes_read(config, plan, n)
        if isinstance(policy, SparQ):
            read -= (1 - part) * _rows_bytes(policy, config, plan)
        return weights + read / shares.of(method_of(policy), kv, grouped, n, width, read / every)

    base = full_bytes(dense, F16, dense_plans[F16])
    most = max(point["repetition"] for point in data["points"] if point["policy"] == DENSE)
    for point in data["points"]:
        kv, measured = point["kv"], parse_policy(point["policy"])
        if wanted not in (AUTO, kv):
            continue
        policy, part = _scaled(measured, config, n_ctx, data), _part_of_rows(measured, point, config, data)
        try:
            policy.check(config, n_ctx, *get_stores(kv))
        except UsageError:
            continue
        plan = policy.plan(config, n_ctx, *get_stores(kv))
        if isinstance(policy, SparQ):  # while it would take longer than dense does, it need not be sparse
            for until in range(policy.rows, n_ctx, STEP):
                if full_bytes(policy, kv, plan, until, part) < full_bytes(dense, kv, dense_plans[kv], until):
                    break
            else:
                continue  # dense attention is a point of its own
            policy = replace(policy, dense_until=until)
        own = full_bytes(policy, kv, plan, part=part)
        repeated = point["repetition"] / most, point["repetition_error"] / most
        kld = point["kld"], point["kld_error"]
        yield Candidate(policy, kv, *kld, *repeated, base / own, own, plan.nbytes(config), bool(shares))


def _part_of_rows(policy: Policy, point: Mapping[str, Any], config: ModelConfig, data: Mapping[str, Any]) -> float:
    """Of the rows that a policy may read, what it did read on average, over the second half of the context."""
    if not isinstance(policy, SparQ) or not policy.adaptive:
        return 1.0
    config, n_ctx, dense = replace(config, head_dim=data["head_dim"]), data["n_ctx"], parse_policy(DENSE)
    mean, plan = n_ctx * 3 // 4, policy.plan(config, n_ctx, *get_stores(point["kv"]))
    read = point["read"] * dense.bytes_read(config, dense.plan(config, n_ctx, *get_stores(F16)), mean)
    rows = _rows_bytes(policy, config, plan)
    return min(max((read - policy.bytes_read(config, plan, mean)) / rows + 1, 0.0), 1.0)


def _rows_bytes(policy: SparQ, config: ModelConfig, plan: CachePlan) -> int:
    return plan.rows_bytes(config, (policy.rows,) * config.n_layer)


def _scaled(policy: Policy, config: ModelConfig, n_ctx: int, data: Mapping[str, Any]) -> Policy:
    """The same shares of this model's heads and context."""
    policy = in_proportion(policy, n_ctx, data["n_ctx"])
    if isinstance(policy, SparQ):
        policy = replace(policy, r=max(1, min(policy.r * config.head_dim // data["head_dim"], config.head_dim)))
    return policy


def _bytes(budget: Budget, whole: int) -> int:
    return int(budget.amount if budget.unit == "bytes" else budget.amount * whole)


def _share(nbytes: int, whole: int) -> str:
    share = Fraction(nbytes, max(whole, 1))
    return f"{100 * float(share):.0f} %"


def _text(candidate: Candidate) -> str:
    return f"{candidate.policy} with --kv {candidate.kv}"
