"""Several things timed in turn, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

PIECE = 0.05  # seconds that a sample takes at least: what is quick is repeated within it


class Timed(NamedTuple):
    """Seconds of one call: the median over the rounds, and the quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Timed:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)

    def record(self) -> dict[str, float]:
        """As fields of a record, in milliseconds."""
        return {"ms": 1e3 * self.median, "ms_low": 1e3 * self.low, "ms_high": 1e3 * self.high}


def in_turn(
    calls: Mapping[str, Callable[[], Any]],
    settle: Callable[[], Any],
    rounds: int,
    advance: Callable[[], None] = lambda: None,
    piece: float = PIECE,
) -> dict[str, Timed]:
    """Times every call `rounds` times, one after the other in each round, after a round that does not count.

    settle: returns when everything that was called before has run; a call may be asynchronous. advance: called after
    each sample, while no clock runs. piece: seconds of a sample, at least; 0: of one call.
    """
    repeats: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in calls}

    def seconds(call: Callable[[], Any], n: int) -> float:
        settle()
        begun = time.perf_counter()
        for _ in range(n):
            call()
        settle()
        return max(time.perf_counter() - begun, 1e-9) / n

    for name, call in calls.items():
        call()
        repeats[name] = max(1, round(piece / seconds(call, 1)))
        advance()
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(seconds(call, repeats[name]))
            advance()
    return {name: Timed.of(of_call) for name, of_call in samples.items()}
