"""How much of a context a policy keeps: so many tokens, a fraction of the context, or so many bytes of cache."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from ..errors import UsageError

FEWEST = 8  # tokens
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Budget:
    """`512`, `1/8` or `64MiB`: the same for every layer, all heads of a sequence together."""

    text: str
    amount: Fraction
    unit: str  # "tokens" | "context" | "bytes"

    @classmethod
    def parse(cls, text: str | int) -> Budget:
        """Raises UsageError on what is none of the three."""
        text = str(text)
        found = re.fullmatch(r"(\d{1,15})(?:/(\d{1,15})|(\.\d{1,9})?([kmg]i?b)|())", text, re.ASCII | re.IGNORECASE)
        if found is None:
            raise UsageError(f"--budget {text} is not a number of tokens, a fraction like 1/8, or bytes like 64MiB")
        whole, below, decimals, unit, _ = found.groups()
        if below is not None:
            if not 0 < int(whole) <= int(below):
                raise UsageError(f"--budget {text} is out of range (a fraction above 0, at most 1)")
            return cls(text, Fraction(int(whole), int(below)), "context")
        if unit is not None:
            return cls(text, Fraction(whole + (decimals or "")) * _UNITS[unit.upper()], "bytes")
        return cls(text, Fraction(int(whole)), "tokens")

    def __str__(self) -> str:
        return self.text

    def tokens(self, n_ctx: int, nbytes: Callable[[int], int]) -> int:
        """Tokens a layer keeps of a sequence of up to n_ctx, be it 0; nbytes: what a budget of so many tokens takes."""
        if self.unit == "tokens":
            return int(self.amount)
        if self.unit == "context":
            return int(self.amount * n_ctx)
        least, next_to_it = nbytes(FEWEST), nbytes(FEWEST + 1)
        return max(0, FEWEST + (int(self.amount) - least) // max(1, next_to_it - least))

    def check(self, n_ctx: int, nbytes: Callable[[int], int]) -> None:
        """Raises UsageError if that is too little, or more than the context."""
        n = self.tokens(n_ctx, nbytes)
        meaning = "" if self.unit == "tokens" else f" gives {n} tokens per layer, which"
        if not FEWEST <= n <= n_ctx:
            raise UsageError(f"--budget {self}{meaning} is out of range ({FEWEST} to {n_ctx} tokens, the context)")
