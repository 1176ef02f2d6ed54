"""Ops of the policies that read few of the cached tokens, on every device against the NumPy reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from emulated import device_ops, devices
from test_ops import NUMBERS, TRUTH, assert_close, normal, rounding

from kernels_cpu import CpuOps
from minirt.ops import INDEX_BLOCK, INDEX_UNIT, KV
from minirt.reference.sparse import keep_heavy, tempered, top_components
from minirt.stores import STORES

# store, H_q, H_kv, d
CASES = [
    ("f16", 2, 2, 128), ("f16", 9, 3, 64), ("f16", 8, 2, 80), ("f16", 8, 1, 64), ("f16", 4, 2, 100), ("f16", 3, 1, 8),
    ("f32", 3, 3, 64), ("f32", 4, 1, 128), ("f32", 7, 1, 8),
]  # fmt: skip
LENGTHS = [(1, 2, 3), (511, 512, 513), (3000, 1, 0), (1500, 2900, 64)]


@pytest.fixture(scope="module", params=devices())
def ops(request: pytest.FixtureRequest) -> Any:
    return device_ops(request.param)


def int32(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def cached(device: Any, store: str, n_seq: int, n_head_kv: int, slots: int, d: int, bad: float = 0.0) -> tuple[KV, Any]:
    """A full cache and its index; slot 7 holds a number that is not finite, if there is to be one."""
    kv = KV(*(device.allocate(STORES[store], (n_seq, n_head_kv, slots, d)) for _ in range(2)))
    tokens, dtype = (INDEX_UNIT, np.float32) if store == "f32" else (INDEX_BLOCK, np.float16)
    index = device.zeros((n_seq, n_head_kv, -(-slots // tokens), d, tokens), np.dtype(dtype))
    for seq in range(n_seq):
        k, v = (normal(slots, n_head_kv, d, seed=10 * seq + i) for i in range(2))
        k[7 % slots, 0, d // 2] += bad
        where = np.full(slots, seq, np.int32), np.random.RandomState(seq).permutation(slots).astype(np.int32)
        device.append(kv, *where, k[where[1]], v[where[1]])
        device.append_index(index, None, *where, k[where[1]], v[where[1]])
    return kv, index


def every(device: Any, q: np.ndarray, kv: KV, index: Any, stop: np.ndarray, r: int) -> list[np.ndarray]:
    """Probabilities of all slots, approximate and exact: [H_q, stop[b]] of each sequence, twice."""
    k = max(int(stop.max()), 1)
    few = device.to_host(device.approximate_top_k(q, index, stop, r, k, 0, False)[1]).copy()
    exact = device.to_host(device.exact_top_k(q, kv, stop, k)[1]).copy()
    return until(stop, few, exact)


def until(stop: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
    """What counts of each: slots before stop[b]."""
    return [array[b, :, :n] for array in arrays for b, n in enumerate(stop)]


def assert_best(
    rows: np.ndarray, weights: np.ndarray, p: np.ndarray, stop: int, local: int, sum_logits: bool, error: float = 0.0
) -> None:
    """rows [H_kv, k] are the best by probabilities p [H_q, stop], up to rounding; weights [H_q, k] are theirs."""
    group, (_, k) = len(p) // len(rows), rows.shape
    assert_close(weights, np.take_along_axis(p, np.repeat(rows, group, axis=0), axis=1), 1e-5 + error)
    ranks = (np.log(p) if sum_logits else p).reshape(len(rows), group, stop).sum(axis=1)
    for own, rank in zip(rows, ranks, strict=True):
        assert (np.diff(own) > 0).all()
        assert own[k - local :].tolist() == list(range(stop - local, stop))
        if k > local:
            least = np.sort(rank[: stop - local])[local - k]
            assert (rank[own[: k - local]] >= least - (1e-4 + 3 * error) * abs(least)).all()


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
            k = k.astype(np.float32)
            device.append_index(index, None, seq[distinct], slot[distinct], k, k)
        found.append(device.to_host(index))
    assert np.array_equal(*found)


@pytest.mark.parametrize(("store", "n_head", "n_head_kv", "d"), CASES)
def test_means(ops: Any, store: str, n_head: int, n_head_kv: int, d: int) -> None:
    found = []
    for device in (ops, TRUTH):
        kv, index = cached(device, store, 2, n_head_kv, 90, d)
        mean, new = device.zeros((2, n_head_kv, d), np.dtype(np.float32)), normal(3, n_head_kv, d, seed=5)
        device.mean_rows(kv.v, 1, 90, mean)
        device.append_index(index, mean, int32(0, 1, 0), int32(0, 90, 1), new, new)
        found.append(device.to_host(mean).copy())
        device.mean_rows(kv.v, 0, 1, mean)
        device.mean_rows(kv.v, 1, 0, mean)
        found.append(device.to_host(mean))
    assert_close(found[0], found[2])
    assert np.array_equal(found[1], found[3])
    assert not found[1][1].any()


# -- the best ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("store", "n_head", "n_head_kv", "d"), CASES)
@pytest.mark.parametrize("stop", LENGTHS)
def test_probabilities(ops: Any, store: str, n_head: int, n_head_kv: int, d: int, stop: tuple[int, ...]) -> None:
    caches = [cached(device, store, 3, n_head_kv, max(stop), d) for device in (ops, TRUTH)]
    for r in (1, 5, d // 2, d, d + 1):
        q = normal(3, n_head, d, seed=r) * 3
        ours, truth = (every(on, q, *of, int32(*stop), r) for on, of in zip((ops, TRUTH), caches, strict=True))
        for a, b in zip(ours, truth, strict=True):
            assert_close(a, b, 1e-5)


@pytest.mark.parametrize(("store", "n_head", "n_head_kv", "d"), CASES)
@pytest.mark.parametrize("stop", LENGTHS)
@pytest.mark.parametrize(("k", "local"), [(1, 0), (16, 0), (16, 16), (130, 33)])
def test_the_best(
    ops: Any, store: str, n_head: int, n_head_kv: int, d: int, stop: tuple[int, ...], k: int, local: int
) -> None:
    kv, index = cached(ops, store, 3, n_head_kv, max(stop), d)
    q, r = normal(3, n_head, d, seed=k), max(1, d // 4)
    p = every(TRUTH, q, *cached(TRUTH, store, 3, n_head_kv, max(stop), d), int32(*stop), r)
    for sum_logits in (False, True):
        rows, weights = ops.approximate_top_k(q, index, int32(*stop), r, k, local, sum_logits)
        assert rows.dtype == np.int32
        for b, n in enumerate(stop):
            m = min(k, n)
            assert_best(rows[b, :, :m], weights[b, :, :m], p[b], n, min(local, m), sum_logits)
    rows, weights = ops.exact_top_k(q, kv, int32(*stop), k)
    for b, n in enumerate(stop):
        m = min(k, n)
        assert_best(rows[b, :, :m], weights[b, :, :m], p[3 + b], n, 0, False, rounding(store))


@pytest.mark.parametrize("n_head_kv", [17, 32])
def test_long_passes(ops: Any, n_head_kv: int) -> None:
    """So many heads that each is a part of its own: more than a tile is scored before its exponentials are made, but
    never beyond a block of the index, here of 1,536 tokens."""
    stop, d, r = int32(3013, 2000), 32, 20
    found = []
    for device in (ops, TRUTH):
        index = device.zeros((2, n_head_kv, 2, d, 3 * INDEX_UNIT), np.dtype(np.float16))
        for seq, n in enumerate(stop):
            rows = normal(int(n), n_head_kv, d, seed=seq)
            device.append_index(index, None, np.full(n, seq, np.int32), np.arange(n, dtype=np.int32), rows, rows)
        q = normal(2, n_head_kv, d, seed=9) * 2
        found.append(until(stop, device.to_host(device.approximate_top_k(q, index, stop, r, 3013, 0, False)[1]).copy()))
    for ours, truth in zip(*found, strict=True):
        assert_close(ours, truth, 1e-5)


def test_all_components_give_exact_probabilities(ops: Any) -> None:
    kv, index = cached(ops, "f16", 2, 2, 700, 64)
    found = every(ops, normal(2, 6, 64), kv, index, int32(700, 30), 64)
    for few, exact in zip(found[:2], found[2:], strict=True):
        assert_close(few, exact, 1e-5)


def test_chosen_components(ops: Any) -> None:
    """The largest sums of |q| over the group, of equal ones the first."""
    d = 16
    index = ops.zeros((1, 1, 1, d, INDEX_BLOCK), np.dtype(np.float32))
    k = np.eye(d, dtype=np.float32)[:, None]  # token i is component i
    ops.append_index(index, None, np.zeros(d, np.int32), np.arange(d, dtype=np.int32), k, k)
    q = np.zeros((1, 2, d), np.float32)
    q[0, 0, [3, 5, 12]], q[0, 1, [5, 9, 12, 14]] = [-1.5, 1, 1], [1, -2, 1, 1.5]
    for r, chosen in ((3, [5, 9, 12]), (4, [3, 5, 9, 12])):  # not 14, whose sum is that of 3
        p = ops.approximate_top_k(q, index, int32(d), r, d, 0, False)[1][0]
        assert np.flatnonzero((p != p[:, :1]).any(axis=0)).tolist() == chosen  # 0 was not


@pytest.mark.parametrize("store", NUMBERS)
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
            few = device.approximate_top_k(q, index, stop, 64, 16, 0, sum_logits)
            rows, weights = (device.to_host(a).copy() for a in few)
            found.append([rows, *until(int32(16, 8), weights)])
            found[-1] += every(device, q, kv, index, stop, 64)
            assert rows[1, :, :8].tolist() == [list(range(8))] * 2
            device.attend_rows(q, kv, device.indices(rows), stop, None, None)
    for ours, truth in zip(found[:2], found[2:], strict=True):
        counting = np.concatenate([ours[0][0].ravel(), ours[0][1, :, :8].ravel()])  # what follows has no meaning
        assert 0 <= counting.min() <= counting.max() < 600
        assert np.array_equal(ours[0][0], truth[0][0])
        for a, b in zip(ours[1:], truth[1:], strict=True):
            assert np.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_zero_queries(ops: Any) -> None:
    """Every token is as good as any other."""
    _, index = cached(ops, "f16", 1, 1, 600, 64)
    rows, weights = ops.approximate_top_k(np.zeros((1, 2, 64), np.float32), index, int32(600), 8, 5, 0, False)
    assert np.allclose(weights, 1 / 600)
    assert rows[0, 0].tolist() == [0, 1, 2, 3, 4]


def test_logits_far_apart(ops: Any) -> None:
    """The largest in another part than most, so far away that theirs become nothing."""
    index = ops.zeros((1, 1, -(-3000 // INDEX_BLOCK), 16, INDEX_BLOCK), np.dtype(np.float32))
    for size, slot in ((1e4, 2900), (-1e4, 5)):
        key = np.full((1, 1, 16), size, np.float32)
        ops.append_index(index, None, int32(0), int32(slot), key, key)
    rows, weights = ops.approximate_top_k(np.ones((1, 1, 16), np.float32), index, int32(3000), 4, 3, 0, False)
    assert rows[0, 0].tolist() == [0, 1, 2900]
    assert weights[0, 0].tolist() == [0, 0, 1]


# -- those of them that weigh enough -----------------------------------------------------------------------------------


def test_heavy_rows_by_hand() -> None:
    """Logits are logarithms: with all 16 components tau is 4, and a query of one component 4 gives the key's."""
    index, counts = TRUTH.zeros((1, 1, 1, 16, INDEX_UNIT), np.dtype(np.float32)), np.zeros((1, 1, 3), np.int32)
    weights = [
        [0.5, 0.06, 0.28, 0.15, 0.01],
        [0.1, 0.3, 0.04, 0.55, 0.01],
    ]  # .3 .18 .16 .35 .01 on average: of four of them .36 .21 .42 .01
    index[0, 0, 0, :2, :5] = np.log(weights)
    q = np.zeros((1, 2, 16), np.float32)
    q[0, [0, 1], [0, 1]] = 4
    for call, (k, least, kept) in enumerate(
        [(4, 0.1, [0, 1, 3, 4]), (4, 0.25, [0, 3, 4]), (3, 0.1, [0, 3, 4]), (2, 0.0, [3, 4]), (4, 0.36, [4])]
    ):
        if least == 0.36:
            q[:] = 0  # all weigh 1/5
        rows, found = TRUTH.approximate_top_k(q, index, int32(5), 16, k, 1, False, least, counts)
        n = len(kept)
        assert (rows[0, 0, :n].tolist(), counts[0, 0, 0], counts[0, 0, 2]) == (kept, n, call + 1)
        assert least == 0.36 or np.allclose(found[0, :, :n], np.array(weights)[:, kept])
    assert counts[0, 0, 1] == 4 + 3 + 3 + 2 + 1
    assert TRUTH.approximate_top_k(q, index, int32(5), 16, 5, 1, False, 0.9, counts)[0].tolist() == [[[0, 1, 2, 3, 4]]]
    assert counts.tolist() == [[[5, 13, 5]]]  # all stay where there are no more than k


def test_shares_of_flattened_weights_by_hand() -> None:
    """Powers 1/4, 1/2, 3/4 and 1 of 16, 1 and 0, by what of the queries was seen."""
    weights = np.array([16, 1, 0], np.float32)
    for seen, first in ((0.0, 2), (0.37, 2), (0.38, 4), (0.5, 4), (0.7, 8), (1.0, 16)):
        assert tempered(weights, np.float32(seen)).tolist() == [first, 1, 0]


def shares_seen(q: np.ndarray, n_head_kv: int, r: int) -> list[np.float32]:
    """For each KV head the share of |q| of its queries, of [H_q, d], that r components have."""
    groups = np.abs(q).reshape(n_head_kv, -1, q.shape[1])
    return [of[:, top_components(of, r)].sum() / of.sum() for of in groups]


@pytest.mark.parametrize(("store", "n_head", "n_head_kv", "d"), CASES)
@pytest.mark.parametrize(("k", "local", "longest"), [(1, 1, 600), (40, 3, 2900), (700, 16, 1500)])
def test_heavy_rows(
    ops: Any, store: str, n_head: int, n_head_kv: int, d: int, k: int, local: int, longest: int
) -> None:
    """What stays of the best, and attention to it; a sequence with fewer than k, and one with none."""
    stop, q, mean = int32(longest, 35, 0), 3 * normal(3, n_head, d, seed=k), normal(3, n_head_kv, d, seed=4)
    kv, index = cached(ops, store, 3, n_head_kv, longest, d)
    theirs, _ = cached(TRUTH, store, 3, n_head_kv, longest, d)
    counts, truth = np.zeros((3, n_head_kv, 3), np.int32), np.zeros((3, n_head_kv, 3), np.int32)
    for sum_logits, least in ((False, 0.004), (True, 0.004), (False, 0.0), (False, 1.0)):
        every = [a.copy() for a in ops.approximate_top_k(q, index, stop, d // 4, k, local, sum_logits)]
        rows, weights = (
            a.copy() for a in ops.approximate_top_k(q, index, stop, d // 4, k, local, sum_logits, least, counts)
        )
        for b, n in enumerate(stop[:2].tolist()):
            for h, heads in enumerate(np.arange(n_head).reshape(n_head_kv, -1)):
                own, its = every[0][b, h], every[1][b, heads]
                m = keep_heavy(own, its, n, local, least, shares_seen(q[b], n_head_kv, d // 4)[h])
                assert least or m == min(n, k)
                truth[b, h] = m, truth[b, h, 1] + m * (n > k), truth[b, h, 2] + (n > k)
                assert np.array_equal(rows[b, h, :m], own[:m])
                assert np.array_equal(weights[b, heads, :m], its[:, :m])
        assert np.array_equal(counts, truth)
        for blend in ((weights, mean), (None, None)):
            ours = ops.attend_rows(q, kv, ops.indices(rows), stop, *blend, counts)
            assert_close(ours, TRUTH.attend_rows(q, theirs, rows, stop, *blend, counts), 2e-6 + rounding(store))
            assert not ours[2].any()
    with pytest.raises(ValueError, match="the last is not always among them"):
        ops.approximate_top_k(q, index, stop, 1, k, 0, False, 0.1, counts)
    with pytest.raises(ValueError, match="counts"):
        ops.attend_rows(q, kv, ops.indices(rows), stop, None, None, counts[:2])


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
        "of the sample": np.float32([places % 256 < 16, places % 256 >= 16]) * (2 + x),
        "infinite": np.where(some, np.float32(np.inf), x),
        "negative and infinite": np.where(some, np.float32(-np.inf), -np.abs(x)),
        "NaN": np.where(some, np.float32(np.nan), x),
        "mostly NaN": np.where(some, x, np.float32(np.nan)),
        "nothing but NaN": np.full_like(x, np.nan),
        "NaN and infinite": np.where(some, np.float32(np.nan), np.float32(-np.inf)),
        "tiny": x * np.float32(1e-44),
    }


@pytest.mark.parametrize("order", orders(1))
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 700, 5000, 40000])
def test_top_k(ops: Any, order: str, n: int) -> None:
    ranks = np.stack([orders(n)[order], orders(n)[order][::-1] * np.float32(0.5)])
    stop = int32(n, n - n // 4)
    chosen = [(1, 0, 0), (16, 0, 0), (16, 3, 5), (40, 40, 0), (40, 0, 40), (100, 1, 0), (n, 0, 0), (2000, 0, 9)]
    chosen += [(n // 12, 0, 0), (n // 3, 1, 1)]
    for k, head, tail in chosen:
        if k < head + tail or k == 0:
            continue
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
    weights = np.random.RandomState(1).random_sample((3, n_head, k)).astype(np.float32) / k
    rows = np.full((3, n_head_kv, k), 10**6, np.int32)
    for b, n in enumerate(stop):
        for h in range(n_head_kv):
            chosen = np.random.RandomState(10 * b + h).choice(n, min(n, k), replace=False) if n else []
            rows[b, h, : len(chosen)] = np.sort(chosen)
    found = []
    for device in (ops, TRUTH):
        kv, _ = cached(device, store, 3, n_head_kv, 600, d)
        for blend in ((weights, mean), (None, None)):
            found.append(device.to_host(device.attend_rows(q, kv, device.indices(rows), stop, *blend)).copy())
        found.append(device.to_host(device.add_rows(kv, device.indices(rows), stop, weights, d)).copy())
    for ours, truth in zip(found[:3], found[3:], strict=True):
        assert_close(ours, truth, 2e-6 + rounding(store))
        assert not ours[2].any()


def test_all_rows_are_dense_attention(ops: Any) -> None:
    kv, _ = cached(ops, "f16", 1, 2, 200, 64)
    q, stop = normal(1, 6, 64), int32(200)
    rows = np.tile(np.arange(200, dtype=np.int32), (1, 2, 1))
    dense = ops.attend(q, kv, 0 * stop, stop).copy()
    assert_close(ops.attend_rows(q, kv, ops.indices(rows), stop, None, None), dense)
    every_row, weights = ops.exact_top_k(q, kv, stop, 200)
    assert_close(ops.add_rows(kv, ops.indices(every_row), stop, weights, 64), dense)


def test_nan_shows(ops: Any) -> None:
    kv, _ = cached(ops, "f32", 1, 1, 600, 64, np.nan)
    rows = np.arange(64, dtype=np.int32)[None, None]
    first, next_ones = ops.indices(rows), ops.indices(rows + 64)
    assert np.isnan(ops.attend_rows(normal(1, 2, 64), kv, first, int32(600), None, None)).all()
    assert np.isfinite(ops.attend_rows(normal(1, 2, 64), kv, next_ones, int32(600), None, None)).all()


# -- the seam ----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    ops = CpuOps(threads=1)
    kv, index = cached(ops, "f16", 2, 2, 600, 64)
    mean, q, k, stop = np.zeros((2, 2, 64), np.float32), normal(2, 4, 64), normal(1, 2, 64), int32(600, 30)
    one, rows, weights = int32(1), np.zeros((2, 2, 8), np.int32), np.zeros((2, 4, 8), np.float32)
    ranks = np.zeros((2, 4, 600), np.float32)
    bad_row, low_row = rows.copy(), rows.copy()
    bad_row[0, 1, 7], low_row[1, 1, 0] = 600, -1
    bad: list[Callable[[], Any]] = [
        lambda: ops.append_index(index, mean, one, int32(INDEX_BLOCK), k, k),
        lambda: ops.append_index(index, mean, one, int32(-1), k, k),
        lambda: ops.append_index(index, mean, int32(2), one, k, k),
        lambda: ops.append_index(index, mean, int32(-1), one, k, k),
        lambda: ops.append_index(index, None, one, one, normal(1, 2, 63), normal(1, 2, 63)),
        lambda: ops.append_index(index, mean, one, one, k, normal(2, 2, 64)),
        lambda: ops.append_index(index, mean, one, one, k, normal(1, 2, 32)),
        lambda: ops.append_index(index, mean[:1], one, one, k, k),
        lambda: ops.append_index(index[:, :, :, ::2], None, one, one, normal(1, 2, 32), normal(1, 2, 32)),
        lambda: ops.append_index(index.astype(np.float64), None, one, one, k, k),
        lambda: ops.mean_rows(kv.v, 2, 5, mean),
        lambda: ops.mean_rows(kv.v, 0, 601, mean),
        lambda: ops.mean_rows(kv.v, 0, -1, mean),
        lambda: ops.mean_rows(kv.v, 0, 5, mean[:1]),
        lambda: ops.mean_rows(kv.v, 0, 5, mean[..., :32]),
        lambda: ops.approximate_top_k(q, index, int32(INDEX_BLOCK + 1, 1), 8, 8, 0, False),
        lambda: ops.approximate_top_k(q, index, int32(-1, 1), 8, 8, 0, False),
        lambda: ops.approximate_top_k(q, index, int32(5), 8, 8, 0, False),
        lambda: ops.approximate_top_k(q, index[..., :500], int32(5, 5), 8, 8, 0, False),
        lambda: ops.approximate_top_k(normal(2, 3, 64), index, stop, 8, 8, 0, False),
        lambda: ops.approximate_top_k(normal(2, 4, 32), index, stop, 8, 8, 0, False),
        lambda: ops.approximate_top_k(normal(1, 4, 64), index, stop, 8, 8, 0, False),
        lambda: ops.approximate_top_k(q, index, stop, 0, 8, 0, False),
        lambda: ops.approximate_top_k(q, index, stop, 8, 0, 0, False),
        lambda: ops.approximate_top_k(q, index, stop, 8, 8, 9, False),
        lambda: ops.approximate_top_k(q, index, stop, 8, 8, -1, False),
        lambda: ops.exact_top_k(q, kv, int32(601, 1), 8),
        lambda: ops.exact_top_k(q, kv, int32(-1, 1), 8),
        lambda: ops.exact_top_k(q, kv, stop, 0),
        lambda: ops.exact_top_k(normal(2, 3, 64), kv, stop, 8),
        lambda: ops.top_k(ranks, int32(601, 1), 8),
        lambda: ops.top_k(ranks, int32(-1, 1), 8),
        lambda: ops.top_k(ranks, stop, 0),
        lambda: ops.top_k(ranks, stop, 8, 5, 4),
        lambda: ops.top_k(ranks, stop, 8, -1, 4),
        lambda: ops.attend_rows(q, kv, bad_row, stop, None, None),
        lambda: ops.attend_rows(q, kv, low_row, stop, None, None),
        lambda: ops.attend_rows(q, kv, rows[:1], stop, None, None),
        lambda: ops.attend_rows(q, kv, rows[..., ::2], stop, None, None),
        lambda: ops.attend_rows(q, kv, rows.astype(np.int64), stop, None, None),
        lambda: ops.attend_rows(q, kv, rows, int32(601, 1), None, None),
        lambda: ops.attend_rows(normal(2, 3, 64), kv, rows, stop, None, None),
        lambda: ops.attend_rows(normal(2, 4, 32), kv, rows, stop, None, None),
        lambda: ops.attend_rows(q, kv, rows, stop, weights[:, :, :7], mean),
        lambda: ops.attend_rows(q, kv, rows, stop, weights[:, :2], mean),
        lambda: ops.attend_rows(q, kv, rows, stop, weights, mean[:, :1]),
        lambda: ops.add_rows(kv, bad_row, stop, weights, 64),
        lambda: ops.add_rows(kv, rows, int32(601, 1), weights, 64),
        lambda: ops.add_rows(kv, rows, stop, weights, 48),
        lambda: ops.add_rows(kv, rows, stop, weights[:, :, :7], 64),
        lambda: ops.add_rows(kv, rows, stop, weights[:1], 64),
        lambda: ops.add_rows(kv, rows, stop, weights[:, :3], 64),
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
        few = [a.copy() for a in ops.approximate_top_k(q, index, stop, 16, 100, 20, False)]
        read = ops.attend_rows(q, kv, few[0], stop, few[1], mean).copy()
        best = [a.copy() for a in ops.exact_top_k(q, kv, stop, 100)]
        outs.append([*few, *best, read, ops.add_rows(kv, best[0], stop, best[1], d), mean, index])
    for other in outs[1:]:
        for a, b in zip(outs[0], other, strict=True):
            assert np.array_equal(a, b)
