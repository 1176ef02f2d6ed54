"""What the policies have in common: parameters that check themselves, and the defaults of the protocol."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ..cache import Cache, CachePlan
from ..config import ModelConfig
from ..errors import UsageError
from ..ops import Ops
from ..stores import MAX_POSITION, Store
from .budget import Budget

Own = TypeVar("Own", bound="BasePolicy")
Bounded = TypeVar("Bounded", bound="BoundedPolicy")
DEFAULT_BUDGET = 512  # tokens, or the context if that is shorter


def parameter(
    default: Any,
    text: str,
    kind: type = int,
    least: int | None = None,
    most: int | None = None,
    of: tuple[str, ...] = (),
) -> Any:
    """A field of a policy that is a flag of the command line: its help, its type, what it may be. of: the texts that it
    may be, or words that may stand in place of a number."""
    metadata = {"help": text, "kind": kind, "least": least, "most": most, "of": of}
    return dataclasses.field(default=default, metadata=metadata)


def parameters(policy: type[BasePolicy] | BasePolicy) -> dict[str, dataclasses.Field[Any]]:
    """The parameters of a policy by name."""
    return {f.name: f for f in dataclasses.fields(policy) if f.metadata}


def flag(name: str) -> str:
    """The name of a parameter on the command line."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class BasePolicy:
    name: ClassVar[str] = ""
    whole_prompt: ClassVar[bool] = False  # a prompt must come in one call of `prefill`, not in chunks
    needs_rows: ClassVar[str] = ""  # what it does with keys and values as they are, which latents are not

    def __post_init__(self) -> None:
        for name, f in parameters(self).items():
            value, least, most, of = getattr(self, name), *(f.metadata[key] for key in ("least", "most", "of"))
            if value is None:
                continue
            value = _convert(name, value, f.metadata["kind"], of)
            object.__setattr__(self, name, value)
            if value in of:
                continue
            if (least is not None and not least <= value < math.inf) or (most is not None and not value <= most):
                allowed = f"{least} or more" if most is None else f"{least} to {most}"
                raise UsageError(f"{flag(name)} {value} is out of range ({allowed})")
            if f.metadata["kind"] is str and of:
                raise UsageError(f"{flag(name)} {value} is not one of: {', '.join(of)}")

    def __str__(self) -> str:
        """As `parse_policy` reads it: the parameters that are not at their default."""
        given = [(name, getattr(self, name), f.default) for name, f in parameters(self).items()]
        return ":".join([self.name, *(f"{name}={value}" for name, value, default in given if value != default)])

    def check(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> None:
        """Raises UsageError if the parameters do not fit the model or the context."""
        self.check_stores(config, n_ctx, k_store, v_store)
        if config.sliding_window:
            raise UsageError(
                f"--policy {self.name}: this model itself reads only the last {config.sliding_window} tokens; "
                "it runs with --policy dense"
            )

    def check_stores(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> None:
        """Raises UsageError if rows cannot be stored so, or be used so."""
        for store in (k_store, v_store):
            store.check(config.head_dim)
            if store.latent and self.needs_rows:
                raise UsageError(f"--policy {self.name} {self.needs_rows}, which --kv {store.name} does not store")
            if store.latent and n_ctx > MAX_POSITION:
                raise UsageError(f"--ctx {n_ctx} is out of range (up to {MAX_POSITION} with --kv {store.name})")

    def small(self: Own) -> Own:
        """The same method with parameters that act on a text of a few tokens: to compile its kernels."""
        return self

    def prefilled(self, ops: Ops, cache: Cache, seq: int) -> None:
        """After `prefill` of all layers."""

    def rewind(self, ops: Ops, cache: Cache, seq: int, n: int) -> int:
        """Nothing is lost by default: the first n tokens are in the first n slots."""
        cache.n_seen[seq] = n
        cache.torn[seq] = False
        return n

    def held(self, config: ModelConfig, cache: Cache, seq: int) -> int:
        """Tokens whose keys and values the layers hold, on average."""
        return int(cache.n_seen[seq])

    def bytes_read(self, config: ModelConfig, plan: CachePlan, n: int) -> int:
        """See Policy."""
        raise NotImplementedError

    def bytes_touched(self, ops: Ops, config: ModelConfig, cache: Cache, seq: int, n: int) -> float:
        """Nothing is found out while a text is read, by default."""
        return self.bytes_read(config, cache.plan, n)


@dataclass(frozen=True)
class BoundedPolicy(BasePolicy):
    """One that keeps so many tokens and forgets the others."""

    budget: Budget | str | int | None = parameter(  # noqa: RUF009
        None,
        "Tokens a layer keeps: a number, a fraction of the context (1/8), or bytes of cache (64MiB).  "
        f"[default: {DEFAULT_BUDGET}]",
        Budget,
    )

    def check(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> None:
        super().check(config, n_ctx, k_store, v_store)
        if isinstance(self.budget, Budget):
            self.budget.check(n_ctx, self._nbytes(config, n_ctx, k_store, v_store))

    def kept(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> int:
        """Tokens that a layer keeps."""
        if not isinstance(self.budget, Budget):
            return min(DEFAULT_BUDGET, n_ctx)
        return max(1, min(n_ctx, self.budget.tokens(n_ctx, self._nbytes(config, n_ctx, k_store, v_store))))

    def plan(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> CachePlan:
        """See Policy."""
        raise NotImplementedError

    def _nbytes(self, config: ModelConfig, n_ctx: int, k_store: Store, v_store: Store) -> Callable[[int], int]:
        """Bytes of a cache with a budget of so many tokens, all that a policy keeps included."""

        def nbytes(n: int) -> int:
            policy = dataclasses.replace(self, budget=n)
            return policy.plan(config, max(n_ctx, n), k_store, v_store).nbytes(config)

        return nbytes

    def small(self: Bounded) -> Bounded:
        return dataclasses.replace(self, budget=8)


def _convert(name: str, value: Any, kind: type, words: tuple[str, ...] = ()) -> Any:
    """A value, or the text of one, as its type. words: that may stand in its place."""
    if kind is not str and value in words:
        return value
    if kind is Budget:
        return value if isinstance(value, Budget) else Budget.parse(value)
    if kind is str:
        return str(value)
    try:
        text = str(value)
        if isinstance(value, bool) or not text.isascii() or "_" in text:
            raise ValueError
        return kind(text)
    except ValueError:
        wanted = " or ".join(["a whole number" if kind is int else "a number", *words])
        raise UsageError(f"{flag(name)} {value} is not {wanted}") from None
