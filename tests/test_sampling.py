"""From logits to a token: every rule on distributions small enough to work out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from minirt.errors import UsageError
from minirt.sampling import Sampler, Sampling

OPEN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}  # nothing is cut


def logits_of(*p: float) -> np.ndarray:
    return np.log(np.array(p)).astype(np.float32)


def drawn(sampling: Sampling, logits: np.ndarray, n: int = 4000, recent: tuple[int, ...] = ()) -> np.ndarray:
    """How often each token came, as fractions."""
    sampler = Sampler(sampling)
    tokens = [sampler(logits, recent) for _ in range(n)]
    return np.bincount(tokens, minlength=len(logits)) / n


def support(sampling: Sampling, logits: np.ndarray, recent: tuple[int, ...] = ()) -> set[int]:
    return set(np.flatnonzero(drawn(sampling, logits, 2000, recent)).tolist())


def test_greedy_takes_the_largest_ties_by_lowest_id() -> None:
    assert Sampler(Sampling(temperature=0))(np.array([1, 3, 2, 3], np.float32)) == 1


def test_same_seed_same_tokens_and_another_seed_others() -> None:
    logits = np.random.default_rng(0).standard_normal((100, 500)).astype(np.float32)
    one, two, three = ([Sampler(Sampling(seed=s))(row) for row in logits] for s in (7, 7, 8))
    a, b = Sampler(Sampling(seed=7)), Sampler(Sampling(seed=7))
    assert [a(row) for row in logits] == [b(row) for row in logits]
    assert one == two != three


def test_frequencies_follow_the_probabilities() -> None:
    p = np.array([0.5, 0.25, 0.15, 0.1])
    found = drawn(Sampling(seed=1, **OPEN), logits_of(*p), 20000)
    assert np.abs(found - p).max() < 0.015  # four standard deviations


def test_temperature_divides_the_logits() -> None:
    p = np.array([0.6, 0.3, 0.1])
    for t in (0.5, 2.0):
        expected = p ** (1 / t) / (p ** (1 / t)).sum()
        found = drawn(Sampling(seed=2, **{**OPEN, "temperature": t}), logits_of(*p), 20000)
        assert np.abs(found - expected).max() < 0.015


def test_order_of_ids_does_not_matter() -> None:
    found = drawn(Sampling(seed=3, **OPEN), logits_of(0.1, 0.7, 0.2), 20000)
    assert np.abs(found - [0.1, 0.7, 0.2]).max() < 0.015


@pytest.mark.parametrize(("k", "kept"), [(1, {2}), (2, {2, 0}), (3, {2, 0, 3}), (0, {0, 1, 2, 3}), (9, {0, 1, 2, 3})])
def test_top_k(k: int, kept: set[int]) -> None:
    assert support(Sampling(seed=4, **{**OPEN, "top_k": k}), logits_of(0.3, 0.1, 0.4, 0.2)) == kept


def test_top_k_ties_by_lowest_id() -> None:
    assert support(Sampling(seed=4, **{**OPEN, "top_k": 2}), logits_of(0.2, 0.2, 0.4, 0.2)) == {0, 2}


@pytest.mark.parametrize(
    ("p", "kept"), [(0.0, {0}), (0.49, {0}), (0.51, {0, 1}), (0.79, {0, 1}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_set_with_that_probability(p: float, kept: set[int]) -> None:
    assert support(Sampling(seed=5, **{**OPEN, "top_p": p}), logits_of(0.5, 0.3, 0.15, 0.05)) == kept


@pytest.mark.parametrize(
    ("p", "kept"), [(0.0, {0, 1, 2, 3}), (0.11, {0, 1, 2}), (0.5, {0, 1}), (0.61, {0}), (1.0, {0})]
)
def test_min_p_drops_below_a_share_of_the_best(p: float, kept: set[int]) -> None:
    assert support(Sampling(seed=6, **{**OPEN, "min_p": p}), logits_of(0.5, 0.3, 0.15, 0.05)) == kept


def test_top_p_counts_within_top_k() -> None:
    # of the best two, 0.5 and 0.3, the first alone has 0.625
    assert support(Sampling(seed=7, **{**OPEN, "top_k": 2, "top_p": 0.6}), logits_of(0.5, 0.3, 0.2)) == {0}


def test_repeat_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = np.array([4.0, 3.0, -1.0, -1.5], np.float32)
    greedy = Sampling(temperature=0, repeat_penalty=2.0)
    assert Sampler(greedy)(logits) == 0
    assert Sampler(greedy)(logits, [0]) == 1  # 4 / 2 < 3
    assert Sampler(greedy)(logits, [0, 0, 0]) == 1  # once, however often it came
    assert Sampler(greedy)(logits[2:], [0]) == 1  # -1 * 2 < -1.5
    assert logits[0] == 4.0, "the caller's logits stay as they are"


def test_repeat_penalty_forgets_what_is_not_recent() -> None:
    logits = np.array([4.0, 3.0, 0.0], np.float32)
    assert Sampler(Sampling(temperature=0, repeat_penalty=2.0, repeat_last_n=2))(logits, [0, 2, 2]) == 0
    assert Sampler(Sampling(temperature=0, repeat_penalty=2.0, repeat_last_n=0))(logits, [0]) == 0


def test_extreme_logits_give_a_valid_token() -> None:
    for logits in ([np.float32(3e38), -3e38, 0], [-np.inf, 0, -np.inf], [0, 0, 0]):
        for t in (5e-324, 1e-320, 1e-3, 1.0, 1e3):
            assert Sampler(Sampling(temperature=t, seed=0))(np.array(logits, np.float32)) in (0, 1, 2)


def test_a_temperature_next_to_nothing_is_greedy_and_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    assert support(Sampling(seed=0, **{**OPEN, "temperature": 1e-320}), logits_of(0.3, 0.1, 0.6)) == {2}
    assert not recwarn.list


def test_bounds_are_written_out() -> None:
    with pytest.raises(UsageError, match=r"--top-k -1 is out of range \(0 to 2147483648\)"):
        Sampling(top_k=-1)
    with pytest.raises(UsageError, match=r"\(0 to 1000\)"):
        Sampling(temperature=-1)
    with pytest.raises(UsageError, match=r"\(0 to 18446744073709551615; on the command line -1: a new one each time\)"):
        Sampling(seed=-2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 1.1},
        {"top_p": -0.1},
        {"min_p": 2.0},
        {"repeat_penalty": 0.0},
        {"repeat_last_n": -1},
        {"seed": -5},
        {"seed": 2**64},
    ],
)
def test_values_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(wrong)).replace('_', '-')} .* out of range"):
        Sampling(**wrong)  # type: ignore[arg-type]
