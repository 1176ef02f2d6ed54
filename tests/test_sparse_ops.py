"""Ops of the policies that read few of the cached tokens, on every device against the NumPy reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_ops import TRUTH, assert_close, normal

from kernels_cpu import CpuOps
from minirt.ops import INDEX_BLOCK, KV
from minirt.stores import STORES

# store, H_q, H_kv, d
CASES = [
    ("f16", 2, 2, 128), ("f16", 9, 3, 64), ("f16", 8, 2, 80), ("f16", 8, 1, 64), ("f16", 4, 2, 100), ("f16", 3, 1, 8),
    ("f32", 3, 3, 64), ("f32", 4, 1, 128), ("f32", 7, 1, 8),
]  # fmt: skip
LENGTHS = [(1, 2, 3), (511, 512, 513), (3000, 1, 0), (1500, 2900, 64)]


@pytest.fixture(scope="module", params=["cpu"])
def ops(request: pytest.FixtureRequest) -> Any:
    return {"cpu": lambda: CpuOps(threads=2)}[request.param]()


def int32(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def cached(device: Any, store: str, n_seq: int, n_head_kv: int, slots: int, d: int, bad: float = 0.0) -> tuple[KV, Any]:
    """A full cache and its index; slot 7 holds a number that is not finite, if there is to be one."""
    kv = KV(*(device.allocate(STORES[store], (n_seq, n_head_kv, slots, d)) for _ in range(2)))
    index = device.zeros((n_seq, n_head_kv, -(-slots // INDEX_BLOCK), d, INDEX_BLOCK), STORES[store].dtype)
    for seq in range(n_seq):
        k, v = (normal(slots, n_head_kv, d, seed=10 * seq + i) for i in range(2))
        k[7 % slots, 0, d // 2] += bad
        where = np.full(slots, seq, np.int32), np.random.RandomState(seq).permutation(slots).astype(np.int32)
        device.append(kv, *where, k[where[1]], v[where[1]])
        device.append_index(index, *where, k[where[1]])
    return kv, index


def until(stop: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
    """What counts of each: slots before stop[b]."""
    return [array[b, :, :n] for array in arrays for b, n in enumerate(stop)]


def assert_scores(ours: tuple[Any, Any], truth: tuple[Any, Any], stop: np.ndarray, error: float = 1e-5) -> None:
    for a, b in zip(until(stop, *ours), until(stop, *truth), strict=True):
        assert a.shape == b.shape
        assert np.array_equal(np.isneginf(a), np.isneginf(b))
        finite = np.isfinite(b)
        assert np.linalg.norm((a - b)[finite].astype(float)) <= error * np.linalg.norm(b[finite].astype(float))


# -- the index and the mean --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("store", "n_head", "n_head_kv", "d"), CASES)
def test_the_index_holds_what_the_cache_holds(ops: Any, store: str, n_head: int, n_head_kv: int, d: int) -> None:
    """Rows of several sequences, in any order, and one at a time."""
    found = []
    for device in (ops, TRUTH):
        index = device.zeros((3, n_head_kv, 2, d, INDEX_BLOCK), STORES[store].dtype)
        for n in (1, 7, 8, 9, 30):
            seq, slot = (np.random.RandomState(n).randint(0, m, n).astype(np.int32) for m in (3, 2 * INDEX_BLOCK))
            distinct = np.unique(seq * 2 * INDEX_BLOCK + slot, return_index=True)[1]
            k = normal(n, n_head_kv, d, seed=n)[distinct] * 10.0 ** np.random.RandomState(n).uniform(-9, 6)
            device.append_index(index, seq[distinct], slot[distinct], k.astype(np.float32))
        found.append(device.to_host(index))
    assert np.array_equal(*found)


@pytest.mark.parametrize(("store", "n_head", "n_head_kv", "d"), CASES)
def test_means(ops: Any, store: str, n_head: int, n_head_kv: int, d: int) -> None:
    found = []
    for device in (ops, TRUTH):
        kv, _ = cached(device, store, 2, n_head_kv, 90, d)
        mean = device.zeros((2, n_head_kv, d), np.dtype(np.float32))
        device.mean_rows(kv.v, 1, 90, mean)
        device.update_mean(mean, int32(0, 1, 0), int32(1, 91, 2), normal(3, n_head_kv, d, seed=5))
        found.append(device.to_host(mean).copy())
        device.mean_rows(kv.v, 0, 1, mean)
        device.mean_rows(kv.v, 1, 0, mean)
        found.append(device.to_host(mean))
    assert_close(found[0], found[2])
    assert np.array_equal(found[1], found[3])
    assert not found[1][1].any()


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("store", "n_head", "n_head_kv", "d"), CASES)
@pytest.mark.parametrize("stop", LENGTHS)
@pytest.mark.parametrize("sum_logits", [False, True])
def test_approximate_scores(
    ops: Any, store: str, n_head: int, n_head_kv: int, d: int, stop: tuple[int, ...], sum_logits: bool
) -> None:
    ours, truth = (cached(device, store, 3, n_head_kv, max(stop), d)[1] for device in (ops, TRUTH))
    for r in (1, 5, d // 2, d, d + 1):
        q = normal(3, n_head, d, seed=r) * 3
        args = int32(*stop), r, sum_logits
        assert_scores(ops.approximate_scores(q, ours, *args), TRUTH.approximate_scores(q, truth, *args), int32(*stop))


@pytest.mark.parametrize(("store", "n_head", "n_head_kv", "d"), CASES)
@pytest.mark.parametrize("stop", LENGTHS)
def test_exact_scores(ops: Any, store: str, n_head: int, n_head_kv: int, d: int, stop: tuple[int, ...]) -> None:
    q = normal(3, n_head, d, seed=9) * 3
    ours, truth = (
        device.exact_scores(q, cached(device, store, 3, n_head_kv, max(stop), d)[0], int32(*stop))
        for device in (ops, TRUTH)
    )
    assert_scores(ours, truth, int32(*stop))


def test_all_components_give_exact_scores(ops: Any) -> None:
    kv, index = cached(ops, "f16", 2, 2, 700, 64)
    q, stop = normal(2, 6, 64), int32(700, 30)
    exact = [a.copy() for a in ops.exact_scores(q, kv, stop)]
    assert_scores(ops.approximate_scores(q, index, stop, 64, False), tuple(exact), stop)


def test_chosen_components(ops: Any) -> None:
    """The largest sums of |q| over the group, of equal ones the first."""
    d = 16
    index = ops.zeros((1, 1, 1, d, INDEX_BLOCK), np.dtype(np.float32))
    k = np.eye(d, dtype=np.float32)[:, None]  # token i is component i
    ops.append_index(index, np.zeros(d, np.int32), np.arange(d, dtype=np.int32), k)
    q = np.zeros((1, 2, d), np.float32)
    q[0, 0, [3, 5, 12]], q[0, 1, [5, 9, 12, 14]] = [-1.5, 1, 1], [1, -2, 1, 1.5]
    ranks = ops.approximate_scores(q, index, int32(d), 3, True)[1][0, 0, :d]
    assert np.flatnonzero(ranks).tolist() == [5, 9, 12]
    ranks = ops.approximate_scores(q, index, int32(d), 4, True)[1][0, 0, :d]
    assert np.flatnonzero(ranks).tolist() == [3, 5, 9, 12]  # not 14, whose sum is that of 3


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sum_logits", [False, True])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite(ops: Any, store: str, bad: float, sum_logits: bool) -> None:
    """In a key, and in a query too: the same numbers as the reference, and no row outside the cache."""
    stop, found = int32(600, 8), []
    for device in (ops, TRUTH):
        kv, index = cached(device, store, 2, 2, 600, 64, bad)
        for broken in (False, True):
            q = normal(2, 4, 64)
            q[0, 1, 3] = bad if broken else q[0, 1, 3]
            few = device.approximate_scores(q, index, stop, 64, sum_logits)
            found.append([device.to_host(a).copy() for a in until(stop, *few)])
            rows = device.to_host(device.top_k(few[1], stop, 16)).copy()
            found[-1] += [device.to_host(a).copy() for a in until(stop, *device.exact_scores(q, kv, stop))]
            assert np.array_equal(rows[0], TRUTH.top_k(device.to_host(few[1])[:1], stop[:1], 16)[0])
            assert rows[1, :, :8].tolist() == [list(range(8))] * 2
            device.attend_rows(q, kv, rows, stop, None, None)
    for ours, truth in zip(found[:2], found[2:], strict=True):
        for a, b in zip(ours, truth, strict=True):
            assert np.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_zero_queries(ops: Any) -> None:
    """Every token is as good as any other."""
    _, index = cached(ops, "f16", 1, 1, 600, 64)
    scores, ranks = ops.approximate_scores(np.zeros((1, 2, 64), np.float32), index, int32(600), 8, False)
    assert np.allclose(scores[0, :, :600], 1 / 600)
    assert ops.top_k(ranks, int32(600), 5)[0, 0].tolist() == [0, 1, 2, 3, 4]


def test_logits_far_apart(ops: Any) -> None:
    """The largest in another part than most, so far away that theirs become nothing."""
    index = ops.zeros((1, 1, 6, 16, INDEX_BLOCK), np.dtype(np.float32))
    for size, slot in ((1e4, 2900), (-1e4, 5)):
        ops.append_index(index, int32(0), int32(slot), np.full((1, 1, 16), size, np.float32))
    scores, ranks = ops.approximate_scores(np.ones((1, 1, 16), np.float32), index, int32(3000), 4, False)
    assert np.flatnonzero(scores[0, 0, :3000]).tolist() == [2900]
    assert scores[0, 0, 2900] == ranks[0, 0, 2900] == 1


# -- selection ---------------------------------------------------------------------------------------------------------


def orders(n: int) -> dict[str, np.ndarray]:
    """Numbers [2, n] in all kinds of orders."""
    random, places = np.random.RandomState(n), np.arange(n)
    x = random.standard_normal((2, n)).astype(np.float32)
    some = random.random_sample((2, n)) < 0.3
    return {
        "random": x,
        "ascending": np.sort(x),
        "descending": -np.sort(x),
        "constant": np.ones_like(x),
        "few values": np.round(x),
        "softmax": np.exp(9 * x) / np.exp(9 * x).sum(),
        "both zeros": np.where(some, np.float32(0.0), np.float32(-0.0)),
        "hidden from subsets": np.float32([np.where(places % 512 == 5, places, 0), places % 16]),
        "infinite": np.where(some, np.float32(np.inf), x),
        "negative and infinite": np.where(some, np.float32(-np.inf), -np.abs(x)),
        "NaN": np.where(some, np.float32(np.nan), x),
        "mostly NaN": np.where(some, x, np.float32(np.nan)),
        "nothing but NaN": np.full_like(x, np.nan),
        "NaN and infinite": np.where(some, np.float32(np.nan), np.float32(-np.inf)),
        "tiny": x * np.float32(1e-44),
    }


@pytest.mark.parametrize("order", orders(1))
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 700, 5000])
def test_top_k(ops: Any, order: str, n: int) -> None:
    ranks = np.stack([orders(n)[order], orders(n)[order][::-1] * np.float32(0.5)])
    stop = int32(n, n - n // 4)
    chosen = [(1, 0, 0), (16, 0, 0), (16, 3, 5), (40, 40, 0), (40, 0, 40), (100, 1, 0), (n, 0, 0), (2000, 0, 9)]
    for k, head, tail in chosen:
        ours, truth = ops.to_host(ops.top_k(ranks, stop, k, head, tail)), TRUTH.top_k(ranks, stop, k, head, tail)
        assert ours.dtype == np.int32
        for a, b in zip(until(stop, ours), until(stop, truth), strict=True):
            assert np.array_equal(a, b), (k, head, tail)


def test_top_k_of_a_part_of_an_array(ops: Any) -> None:
    ranks, stop = normal(2, 5, 3000), int32(2000, 70)
    for some in (ranks[:, ::2, 50:], ranks[:, 1:4], ranks[:, :, ::-1], ranks.astype(np.float64)):
        assert np.array_equal(ops.top_k(some, stop, 64), TRUTH.top_k(some, stop, 64))


# -- attention to chosen rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("store", "n_head", "n_head_kv", "d"), CASES)
@pytest.mark.parametrize("k", [1, 15, 64, 130, 700])
def test_attention_to_rows(ops: Any, store: str, n_head: int, n_head_kv: int, d: int, k: int) -> None:
    """With and without the mean; a sequence with fewer rows than k, and one with none."""
    stop, q, mean = int32(600, 40, 0), normal(3, n_head, d, seed=3) * 3, normal(3, n_head_kv, d, seed=4)
    scores = np.random.RandomState(1).random_sample((3, n_head, 600)).astype(np.float32) / 600
    rows = np.full((3, n_head_kv, k), 10**6, np.int32)
    for b, n in enumerate(stop):
        for h in range(n_head_kv):
            chosen = np.random.RandomState(10 * b + h).choice(n, min(n, k), replace=False) if n else []
            rows[b, h, : len(chosen)] = np.sort(chosen)
    found = []
    for device in (ops, TRUTH):
        kv, _ = cached(device, store, 3, n_head_kv, 600, d)
        for blend in ((scores, mean), (None, None)):
            found.append(device.to_host(device.attend_rows(q, kv, rows, stop, *blend)).copy())
        found.append(device.to_host(device.add_rows(kv, rows, stop, scores, d)).copy())
    for ours, truth in zip(found[:3], found[3:], strict=True):
        assert_close(ours, truth, 2e-6)
        assert not ours[2].any()


def test_all_rows_are_dense_attention(ops: Any) -> None:
    kv, _ = cached(ops, "f16", 1, 2, 200, 64)
    q, stop = normal(1, 6, 64), int32(200)
    rows = np.tile(np.arange(200, dtype=np.int32), (1, 2, 1))
    dense = ops.attend(q, kv, 0 * stop, stop).copy()
    assert_close(ops.attend_rows(q, kv, rows, stop, None, None), dense)
    assert_close(ops.add_rows(kv, rows, stop, ops.exact_scores(q, kv, stop)[0], 64), dense)


def test_nan_shows(ops: Any) -> None:
    kv, _ = cached(ops, "f32", 1, 1, 600, 64, np.nan)
    rows = np.arange(64, dtype=np.int32)[None, None]
    assert np.isnan(ops.attend_rows(normal(1, 2, 64), kv, rows, int32(600), None, None)).all()
    assert np.isfinite(ops.attend_rows(normal(1, 2, 64), kv, rows + 64, int32(600), None, None)).all()


# -- the seam ----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    ops = CpuOps(threads=1)
    kv, index = cached(ops, "f16", 2, 2, 600, 64)
    mean, q, k, stop = np.zeros((2, 2, 64), np.float32), normal(2, 4, 64), normal(1, 2, 64), int32(600, 30)
    one, rows, scores = int32(1), np.zeros((2, 2, 8), np.int32), np.zeros((2, 4, 600), np.float32)
    bad_row, low_row = rows.copy(), rows.copy()
    bad_row[0, 1, 7], low_row[1, 1, 0] = 600, -1
    bad: list[Callable[[], Any]] = [
        lambda: ops.append_index(index, one, int32(2 * INDEX_BLOCK), k),
        lambda: ops.append_index(index, one, int32(-1), k),
        lambda: ops.append_index(index, int32(2), one, k),
        lambda: ops.append_index(index, one, one, normal(1, 2, 63)),
        lambda: ops.append_index(index[:, :, :, ::2], one, one, normal(1, 2, 32)),
        lambda: ops.append_index(index.astype(np.float64), one, one, k),
        lambda: ops.update_mean(mean, int32(2), one, k),
        lambda: ops.update_mean(mean, int32(-1), one, k),
        lambda: ops.update_mean(mean, one, one, normal(2, 2, 64)),
        lambda: ops.update_mean(mean, one, one, normal(1, 2, 32)),
        lambda: ops.mean_rows(kv.v, 2, 5, mean),
        lambda: ops.mean_rows(kv.v, 0, 601, mean),
        lambda: ops.mean_rows(kv.v, 0, -1, mean),
        lambda: ops.mean_rows(kv.v, 0, 5, mean[:1]),
        lambda: ops.mean_rows(kv.v, 0, 5, mean[..., :32]),
        lambda: ops.approximate_scores(q, index, int32(2 * INDEX_BLOCK + 1, 1), 8, False),
        lambda: ops.approximate_scores(q, index, int32(-1, 1), 8, False),
        lambda: ops.approximate_scores(q, index, int32(5), 8, False),
        lambda: ops.approximate_scores(normal(2, 3, 64), index, stop, 8, False),
        lambda: ops.approximate_scores(normal(2, 4, 32), index, stop, 8, False),
        lambda: ops.approximate_scores(normal(1, 4, 64), index, stop, 8, False),
        lambda: ops.approximate_scores(q, index, stop, 0, False),
        lambda: ops.exact_scores(q, kv, int32(601, 1)),
        lambda: ops.exact_scores(q, kv, int32(-1, 1)),
        lambda: ops.exact_scores(normal(2, 3, 64), kv, stop),
        lambda: ops.top_k(scores, int32(601, 1), 8),
        lambda: ops.top_k(scores, int32(-1, 1), 8),
        lambda: ops.top_k(scores, stop, 0),
        lambda: ops.top_k(scores, stop, 8, 5, 4),
        lambda: ops.top_k(scores, stop, 8, -1, 4),
        lambda: ops.attend_rows(q, kv, bad_row, stop, None, None),
        lambda: ops.attend_rows(q, kv, low_row, stop, None, None),
        lambda: ops.attend_rows(q, kv, rows[:1], stop, None, None),
        lambda: ops.attend_rows(q, kv, rows[..., ::2], stop, None, None),
        lambda: ops.attend_rows(q, kv, rows.astype(np.int64), stop, None, None),
        lambda: ops.attend_rows(q, kv, rows, int32(601, 1), None, None),
        lambda: ops.attend_rows(normal(2, 3, 64), kv, rows, stop, None, None),
        lambda: ops.attend_rows(normal(2, 4, 32), kv, rows, stop, None, None),
        lambda: ops.attend_rows(q, kv, rows, stop, scores[:, :, :599], mean),
        lambda: ops.attend_rows(q, kv, rows, stop, scores[:, :2], mean),
        lambda: ops.attend_rows(q, kv, rows, stop, scores, mean[:, :1]),
        lambda: ops.add_rows(kv, bad_row, stop, scores, 64),
        lambda: ops.add_rows(kv, rows, stop, scores, 48),
        lambda: ops.add_rows(kv, rows, stop, scores[:, :, :599], 64),
        lambda: ops.add_rows(kv, rows, stop, scores[:1], 64),
        lambda: ops.add_rows(kv, rows, stop, scores[:, :3], 64),
    ]  # fmt: skip
    for call in bad:
        with pytest.raises(ValueError, match=r"."):
            call()
    far = np.full((2, 2, 40), 10**6, np.int32)
    far[..., :30] = 0
    ops.attend_rows(q, kv, far, int32(30, 30), None, None)  # what does not count is not read


@pytest.mark.parametrize(("n_head", "n_head_kv", "d"), [(2, 2, 64), (9, 3, 64), (8, 1, 128)])
def test_results_do_not_depend_on_threads(n_head: int, n_head_kv: int, d: int) -> None:
    q, stop, outs = normal(2, n_head, d), int32(5000, 700), []
    for threads in (1, 2, 2):
        ops = CpuOps(threads)
        kv, index = cached(ops, "f16", 2, n_head_kv, 5000, d)
        mean = np.zeros((2, n_head_kv, d), np.float32)
        ops.mean_rows(kv.v, 0, 5000, mean)
        few = [a.copy() for a in ops.approximate_scores(q, index, stop, 16, False)]
        rows = ops.top_k(few[1], stop, 100, 2, 20).copy()
        read = ops.attend_rows(q, kv, rows, stop, few[0], mean).copy()
        every = [a.copy() for a in ops.exact_scores(q, kv, stop)]
        outs.append([*until(stop, *few, *every), rows, read, ops.add_rows(kv, rows, stop, every[0], d), mean, index])
    for other in outs[1:]:
        for a, b in zip(outs[0], other, strict=True):
            assert np.array_equal(a, b)
