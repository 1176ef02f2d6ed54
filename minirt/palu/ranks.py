"""How the ranks of all projections share what is to be kept.

Ranks are those of one group, equal for all groups of a projection: arrays [n_layer, 2], keys and values. They go in
units of 32 up to the full width, which is always allowed, and are 32 at least (less only if the width is). Every rule
spends the same total, in whole units: it is never exceeded, and less than a unit of it is left over.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import UsageError

UNIT = 32
K_SHARE = 0.25  # of a layer's rank, by `prior`; values have the rest
FLOOR = 0.25  # of the width, by `prior`

_GOLDEN = (5**0.5 - 1) / 2


def total_rank(keep: float, n_layer: int, width: int) -> int:
    """The sum of all ranks that may be spent; UsageError if the smallest ranks take more."""
    full, least = 2 * n_layer * width, 2 * n_layer * min(UNIT, width)
    total = int(keep * full + 1e-6)  # 0.7 is a little less than 0.7
    if total < least:
        raise UsageError(
            f"--keep {keep:g} is too little: ranks are multiples of {UNIT}, and of groups {width} wide "
            f"{least / full:.3g} is the least that can be kept"
        )
    return total


def is_choice(total: int, n_layer: int, width: int) -> bool:
    """Whether there is more to spend than the smallest ranks, and less than the largest."""
    return 2 * n_layer * min(UNIT, width) < total < 2 * n_layer * width


def spend(total: int, n_layer: int, width: int, wanted: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Ranks int64 [n_layer, 2] from the smallest up, unit by unit, each to the projection that wants it most.

    wanted(ranks) gives float64 [n_layer, 2]. Between equal ones the units are spread over the layers.
    """
    ranks = np.full((n_layer, 2), min(UNIT, width))
    turn = np.arange(ranks.size) * _GOLDEN % 1.0
    while True:
        room = np.minimum(ranks + UNIT, width) - ranks
        open_ = (room > 0) & (room <= total - ranks.sum())
        if not open_.any():
            return ranks
        urge = np.where(open_, wanted(ranks), -np.inf).ravel()
        best = np.lexsort((turn, -urge))[0]
        ranks.ravel()[best] += room.ravel()[best]


def near(targets: np.ndarray, total: int, width: int) -> np.ndarray:
    """Ranks nearest to targets float64 [n_layer, 2]: a unit goes where most is missing."""
    return spend(total, len(targets), width, lambda ranks: targets - ranks)


def proportional(weights: np.ndarray, total: int, width: int, least: float) -> np.ndarray:
    """Targets in proportion to weights [n_layer, 2] > 0, none below `least` or above the width: float64, sum total.

    What the bounds take or leave is shared among the others, by bisection for the common factor.
    """
    low, high = 0.0, width / weights.min()
    for _ in range(200):
        factor = (low + high) / 2
        if np.clip(factor * weights, least, width).sum() < total:
            low = factor
        else:
            high = factor
    return np.clip(high * weights, least, width)


def uniform(total: int, n_layer: int, width: int) -> np.ndarray:
    """The same everywhere."""
    return near(proportional(np.ones((n_layer, 2)), total, width, 0), total, width)


def prior(total: int, n_layer: int, width: int) -> np.ndarray:
    """A quarter of each layer's rank to keys, three to values, which need more; but no less than a quarter of the
    width, before rounding."""
    weights = np.tile([K_SHARE, 1 - K_SHARE], (n_layer, 1))
    return near(proportional(weights, total, width, min(FLOOR * width, total / (2 * n_layer))), total, width)


def by_scores(scores: np.ndarray, total: int, width: int) -> np.ndarray:
    """In proportion to each projection's score [n_layer, 2], as Palu shares ranks by Fisher information (section 3.3).

    Palu cuts off what exceeds the full width and drops it; here the others get it.
    """
    scores = np.maximum(scores, 1e-6 * scores.max()) if scores.max() > 0 else np.ones_like(scores)
    return near(proportional(scores, total, width, 0), total, width)


def by_gain(gain: np.ndarray, total: int, width: int) -> np.ndarray:
    """Unit by unit where it gains most: gain [n_layer, 2, w] of each rank, descending."""
    sums = np.concatenate([np.zeros((*gain.shape[:2], 1)), gain.cumsum(axis=2)], axis=2)

    def wanted(ranks: np.ndarray) -> np.ndarray:
        after = np.minimum(ranks + UNIT, width)
        gained = np.take_along_axis(sums, after[..., None], 2) - np.take_along_axis(sums, ranks[..., None], 2)
        return gained[..., 0] / np.maximum(after - ranks, 1)

    return spend(total, len(gain), width, wanted)
