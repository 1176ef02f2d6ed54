"""Reading few of the cached tokens on an emulated card: tests of all devices, at sizes that emulation can do, and those
of paths that only a card has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import test_coded_index
import test_sparse_ops
from cuda_host.arrays import DeviceArray
from emulated import emulated_ops
from gpu_variants import NotingDevice
from test_ops import NUMBERS, TRUTH, assert_close, normal
from test_sparse_ops import assert_best, int32, until

from kernels_gpu import sparse_ops
from kernels_gpu.rows import Rows
from minirt.ops import CODED_UNIT, INDEX_UNIT, KV
from minirt.stores import STORES


@pytest.fixture(scope="module")
def ops() -> Any:
    return emulated_ops()


def on(device: Any, array: np.ndarray) -> Any:
    return array if device is TRUTH else device.ops.device.upload(array)


def index_of(device: Any, k: np.ndarray, tokens: int = INDEX_UNIT) -> Any:
    """An index of keys [B, H_kv, S, d], in blocks of so many tokens."""
    n_seq, heads, n, d = k.shape
    blocks = -(-n // tokens)
    padded = np.zeros((n_seq, heads, blocks * tokens, d), k.dtype)
    padded[:, :, :n] = k
    by_component = padded.reshape(n_seq, heads, blocks, tokens, d).swapaxes(3, 4)
    return on(device, np.ascontiguousarray(by_component))


def assert_same_choice(ops: Any, q: np.ndarray, index: Any, theirs: Any, stop: Any, r: int, k: int, local: int) -> None:
    p = until(stop, TRUTH.approximate_top_k(q, theirs, stop, r, int(stop.max()), 0, False)[1])
    for sum_logits in (False, True):
        rows, weights = ops.approximate_top_k(q, index, stop, r, k, local, sum_logits)
        for b, n in enumerate(stop):
            m = min(k, n)
            assert_best(rows[b, :, :m], weights[b, :, :m], p[b], n, min(local, m), sum_logits)


# -- selection ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", test_sparse_ops.orders(1))
def test_top_k(ops: Any, order: str) -> None:
    for n, chosen in ((1, (1, 0, 0)), (65, (16, 3, 5)), (700, (16, 16, 0)), (700, (100, 1, 9)), (700, (700, 0, 0))):
        ranks, stop = test_sparse_ops.orders(n)[order], int32(n, n - n // 4)
        ranks = np.stack([ranks, ranks[::-1] * np.float32(0.5)])
        for ours, truth in zip(
            *(until(stop, device.top_k(ranks, stop, *chosen)) for device in (ops, TRUTH)), strict=True
        ):
            assert np.array_equal(ours, truth), (n, chosen)


@pytest.mark.parametrize("order", test_sparse_ops.orders(1))
def test_the_best_of_all_kinds(ops: Any, order: str) -> None:
    """Few, by what is noted of runs, and many: of logits that are an index's only component."""
    index, q, stop = np.zeros((2, 1, 700, 8), np.float32), np.zeros((2, 1, 8), np.float32), int32(700, 650)
    index[..., 0], q[..., 0] = test_sparse_ops.orders(700)[order][:, None], 1.0
    for k in (8, 200):
        ours, truth = (d.approximate_top_k(q, index_of(d, index), stop, 1, k, 2, True) for d in (ops, TRUTH))
        assert np.array_equal(ours[0], truth[0]), k
        assert_close(ours[1], truth[1], 1e-5)


def test_marks_that_fit_no_shared_memory(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_ops, "STANDARD", 0)
    test_the_best_of_all_kinds(ops, "random")
    test_top_k(ops, "random")


def test_top_k_of_a_part_of_an_array(ops: Any) -> None:
    ranks, stop = normal(2, 5, 300), int32(200, 70)
    ours = ops.ops.top_k(on(ops, ranks)[:, ::2, 50:], stop, 64)
    assert np.array_equal(ops.to_host(ours), TRUTH.top_k(ranks[:, ::2, 50:], stop, 64))


# -- the index and the mean --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("store", "n_head_kv", "d"), [("f16", 2, 100), ("f32", 1, 8)])
def test_the_index_and_the_mean(ops: Any, store: str, n_head_kv: int, d: int) -> None:
    test_sparse_ops.test_the_index_holds_what_the_cache_holds(ops, store, 0, n_head_kv, d)
    test_sparse_ops.test_means(ops, store, 0, n_head_kv, d)


def test_means_of_rotated_rows(ops: Any) -> None:
    store, found = "q8_0", []
    for device in (ops, TRUTH):
        kv = KV(*(device.allocate(STORES[store], (1, 2, 40, 64)) for _ in range(2)))
        v, mean = normal(40, 2, 64), device.zeros((1, 2, 64), np.dtype(np.float32))
        device.append(kv, np.zeros(40, np.int32), np.arange(40, dtype=np.int32), v, v)
        device.mean_rows(kv.v, 0, 37, mean)
        found.append(device.to_host(mean))
    assert_close(*found)


def test_a_mean_takes_rows_up_in_order(ops: Any) -> None:
    """Rows of three sequences, mixed."""
    seq, slot, v = int32(*(2, 0, 2, 1, 2) * 4), int32(*range(20)), normal(20, 2, 64) * 100
    found = []
    for device in (ops, TRUTH):
        index, mean = index_of(device, np.zeros((3, 2, 20, 64), np.float16)), on(device, normal(3, 2, 64))
        device.append_index(index, mean, seq, slot, v, v)
        found.append(device.to_host(mean))
    assert np.array_equal(*found)


# -- the best ----------------------------------------------------------------------------------------------------------

# store, H_q, H_kv, d, r
CASES = [
    ("f16", 4, 2, 64, 7), ("f16", 8, 2, 128, 33), ("f16", 16, 1, 80, 16), ("f16", 6, 3, 100, 100), ("f32", 7, 1, 8, 3),
]  # fmt: skip


@pytest.mark.parametrize(("store", "n_head", "n_head_kv", "d", "r"), CASES)
def test_the_best(ops: Any, store: str, n_head: int, n_head_kv: int, d: int, r: int) -> None:
    """By bounds of runs, by all tokens, and where all are chosen; probabilities too."""
    stop, q = int32(1100, 513, 3), normal(3, n_head, d)
    k = normal(3, n_head_kv, 1100, d, seed=2).astype(STORES[store].dtype)
    for tokens in (1024, 512):
        ours, theirs = (index_of(device, k, tokens) for device in (ops, TRUTH))
        assert_same_choice(ops, q, ours, theirs, stop, r, *((12, 3) if tokens == 1024 else (400, 100)))
    found = [
        until(stop, on.approximate_top_k(q, i, stop, r, 1100, 9, False)[1]) for on, i in ((ops, ours), (TRUTH, theirs))
    ]
    for a, b in zip(*found, strict=True):
        assert_close(a, b, 1e-5)


def test_blocks_of_several_tiles(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, however many blocks share the tokens."""
    stop, q, k = int32(2900, 700), normal(2, 4, 64), normal(2, 2, 2900, 64).astype(np.float16)
    index, found = index_of(ops, k), []
    for blocks in (1, 2, 100):
        monkeypatch.setattr(sparse_ops, "BLOCKS", blocks)
        found.append(ops.approximate_top_k(q, index, stop, 16, 30, 5, False))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert np.array_equal(a[1, :, :30], b[1, :, :30])
            assert np.array_equal(a, b)


@pytest.mark.parametrize("k", [5, 2900])
def test_more_equals_than_are_listed(ops: Any, k: int) -> None:
    """All tokens alike; then a few that are larger than the others, and none of the last."""
    index, q, stop = np.zeros((1, 1, 3000, 64), np.float16), np.ones((1, 2, 64), np.float32), int32(3000)
    for _ in range(2):
        ours, theirs = (
            device.approximate_top_k(q, index_of(device, index), stop, 8, k, 2, False) for device in (ops, TRUTH)
        )
        assert np.array_equal(ours[0], theirs[0])
        assert_close(ours[1], theirs[1], 1e-5)
        index[0, 0, [100, 2990, 7, 2999]] = [[0.5], [1.0], [1.0], [-3.0]]


def test_special_numbers(ops: Any) -> None:
    test_sparse_ops.test_chosen_components(ops)
    test_sparse_ops.test_zero_queries(ops)
    test_sparse_ops.test_logits_far_apart(ops)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite(ops: Any, bad: float) -> None:
    test_sparse_ops.test_what_is_not_finite(ops, "f16", bad, bad != bad)


def test_nothing_is_left_over(ops: Any) -> None:
    """Of a call with more tokens, in scratch."""
    q, k = normal(1, 2, 64), normal(1, 1, 900, 64).astype(np.float16)
    index = index_of(ops, k)
    for n in (900, 40, 300):
        assert_same_choice(ops, q, index, index_of(TRUTH, k), int32(n), 9, 20, 2)


@pytest.mark.parametrize("k", [1, 40, 300])
@pytest.mark.parametrize(("store", "n_head", "n_head_kv", "d", "r"), CASES)
def test_heavy_rows(ops: Any, store: str, n_head: int, n_head_kv: int, d: int, r: int, k: int) -> None:
    test_sparse_ops.test_heavy_rows(ops, store, n_head, n_head_kv, d, k, 1, 600)


def test_heavy_rows_by_codes(ops: Any) -> None:
    test_coded_index.test_heavy_rows(ops)


def choosers(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(sparse_ops.SparseOps, "_choosers", lambda *_: n)


def test_several_blocks_choose(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one would."""
    choosers(monkeypatch, 3)
    test_the_best_of_all_kinds(ops, "infinite")
    test_the_best(ops, *CASES[0])
    test_the_best(ops, *CASES[-1])
    test_blocks_of_several_tiles(ops, monkeypatch)
    test_more_equals_than_are_listed(ops, 5)
    test_what_is_not_finite(ops, np.nan)
    test_nothing_is_left_over(ops)
    test_heavy_rows(ops, *CASES[0], 40)
    test_heavy_rows_by_codes(ops)
    monkeypatch.setattr(sparse_ops, "STANDARD", 0)
    test_the_best_of_all_kinds(ops, "random")


@pytest.mark.parametrize(("lengths", "k", "local"), [((700, 0, 20, 131, 46), 20, 2), ((43, 30, 31, 32, 33), 17, 0)])
def test_more_blocks_than_have_a_share(
    ops: Any, lengths: tuple[int, ...], k: int, local: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sequences of any length; the same rows as one."""
    keys, q, stop, found = normal(5, 2, 700, 64).astype(np.float16), normal(5, 4, 64), int32(*lengths), []
    index = index_of(ops, keys)
    for n in (0, 2, 16):
        choosers(monkeypatch, n)
        found.append([a.copy() for a in ops.approximate_top_k(q, index, stop, 9, k, local, False)])
    for rows, weights in found[1:]:
        for b, n in enumerate(lengths):
            assert np.array_equal(rows[b][:, : min(k, n)], found[0][0][b][:, : min(k, n)])
            assert_close(weights[b][:, : min(k, n)], found[0][1][b][:, : min(k, n)], 1e-5)


@pytest.mark.parametrize("lengths", [range(640, 648), range(648, 656)])
def test_every_end_of_a_run(ops: Any, lengths: range) -> None:
    """Of which a part is no token's."""
    keys = normal(8, 1, 656, 32).astype(np.float16)
    for local in (0, 3):
        assert_same_choice(
            ops, normal(8, 2, 32), index_of(ops, keys), index_of(TRUTH, keys), int32(*lengths), 9, 7 + local, local
        )


def test_several_blocks_choose_by_codes(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    choosers(monkeypatch, 3)
    monkeypatch.setattr(test_coded_index, "BORDERS", (1, 257, 529))
    test_coded_index.test_probabilities_and_the_best(ops, "f16", 2, 1, 64, 1024)


def test_what_was_cut_short_leaves_nothing(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the launches of a choice."""
    choosers(monkeypatch, 3)
    q, keys, launch = normal(1, 2, 64), normal(1, 1, 900, 64).astype(np.float16), ops.ops._launch
    for cut in ("rank_tokens", "choose_ranked"):

        def until_then(file: str, name: str, *args: Any, cut: str = cut, **named: Any) -> None:
            if name == cut:
                raise KeyboardInterrupt
            launch(file, name, *args, **named)

        with monkeypatch.context() as m:
            m.setattr(ops.ops, "_launch", until_then)
            with pytest.raises(KeyboardInterrupt):
                ops.approximate_top_k(q, index_of(ops, keys), int32(900), 9, 100, 2, False)
        test_sparse_ops.test_zero_queries(ops)
        assert_same_choice(ops, q, index_of(ops, keys), index_of(TRUTH, keys), int32(900), 9, 100, 2)


def test_they_do_where_one_would_be_long_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = sparse_ops.SparseOps(NotingDevice(90))
    for expected, heads, group, slots, k in (
        (4, 32, 1, 65536, 2049), (0, 32, 1, 65536, 2048), (0, 32, 1, 32768, 4096), (0, 128, 1, 65536, 4096),
        (16, 8, 4, 131072, 128), (4, 8, 4, 16384, 1024), (0, 8, 4, 16384, 256), (4, 32, 1, 1 << 20, 128),
    ):  # fmt: skip
        assert ops._choosers(heads, group, slots, k) == expected


# -- the index in 4 bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1024, 0])
@pytest.mark.parametrize(("store", "n_head", "n_head_kv", "d"), [("f16", 3, 1, 100), ("q8_0", 2, 2, 64)])
def test_codes(ops: Any, store: str, n_head: int, n_head_kv: int, d: int, tokens: int, monkeypatch: Any) -> None:
    """Codes bit for bit, and what is found by them, or by rows where there are none."""
    monkeypatch.setattr(test_coded_index, "BORDERS", (1, 255, 256, 257, 529))
    test_coded_index.test_probabilities_and_the_best(ops, store, n_head, n_head_kv, d, tokens)


@pytest.mark.parametrize(("store", "d"), [("f16", 32), ("q4_0-plain", 32)])
def test_codes_in_chunks(ops: Any, store: str, d: int) -> None:
    """Bit for bit, however the text comes, from one unit into the next."""
    n, found = CODED_UNIT + 90, []
    k = test_coded_index.keys(n, 1, d)
    for device, stops in ((TRUTH, [n]), (ops, [n]), (ops, [100, 255, 256, 257, 300, n]), (ops, [40, CODED_UNIT, n])):
        kv, index = test_coded_index.empty(device, store, 2, 1, n, d)
        for seq, start, stop in zip([1] * len(stops), [0, *stops], stops, strict=False):
            test_coded_index.append(device, kv, index, seq, start, k[start:stop])
        found.append([device.to_host(array) for array in index[:2]])
    for ours in found[1:]:
        for a, b in zip(ours, found[0], strict=True):
            assert np.array_equal(a.view(np.uint16), b.view(np.uint16))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_codes_of_what_is_not_finite(ops: Any, bad: float) -> None:
    """It hides its unit of the component, and nothing else; rows stay within the cache."""
    n, found = CODED_UNIT + 40, []
    k, q = test_coded_index.keys(n, 2, 32), normal(1, 4, 32)
    k[7, 0, 5] = bad
    for device in (ops, TRUTH):
        kv, index = test_coded_index.empty(device, "f16", 1, 2, n, 32)
        test_coded_index.append(device, kv, index, 0, 0, k)
        choice = device.approximate_top_k(q, index, int32(n), 32, 16, 0, False)
        found.append([device.to_host(array).copy() for array in (*index[:2], *choice)])
    (codes, scales, rows, weights), (true_codes, true_scales, truth, of_truth) = found
    assert np.array_equal(codes, true_codes)
    assert np.array_equal(scales, true_scales, equal_nan=True)
    assert np.array_equal(rows[0, 0], truth[0, 0])
    assert CODED_UNIT <= rows[0, 0].min() <= rows[0].max() < n
    assert_close(weights, of_truth, 1e-4)


# -- caches of many gigabytes ------------------------------------------------------------------------------------------


def test_places_beyond_32_bits(ops: Any) -> None:
    """Of the last sequence of a large batch; memory that is not touched takes none."""
    d, tokens = 64, INDEX_UNIT
    last = 2**31 // (d * tokens) + 3
    index = np.zeros((last + 1, 1, 1, d, tokens), np.float16).view(DeviceArray)
    rows = (np.zeros((last + 1, 1, tokens, d), np.float16).view(DeviceArray) for _ in range(2))
    kv = KV(*(Rows(STORES["f16"], codes, None) for codes in rows))
    x = ops.ops.device.upload(normal(1, 1, d))
    where = int32(last), int32(5)
    ops.ops.append_index(index, None, *where, x, x)
    ops.ops.append(kv, *where, x, x)
    expected = normal(1, 1, d)[0, 0].astype(np.float16)
    for found in (index[last, 0, 0, :, 5], kv.k.codes[last, 0, 5], kv.v.codes[last, 0, 5]):
        assert np.array_equal(np.asarray(found).ravel(), expected)


# -- whole keys, and attention to chosen rows --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("store", "n_head", "n_head_kv", "d"),
    [
        ("f16", 2, 2, 128),
        ("f16", 7, 1, 100),
        ("f32", 16, 1, 8),
        ("f16", 8, 1, 64),
        ("q8_0", 6, 2, 64),
        ("q4_0-plain", 3, 1, 96),
    ],
)
def test_whole_keys_and_rows(ops: Any, store: str, n_head: int, n_head_kv: int, d: int) -> None:
    """With and without the mean; a sequence with fewer rows than k, and one with none."""
    stop, k, q, mean = int32(300, 20, 0), 33, normal(3, n_head, d), normal(3, n_head_kv, d, seed=4)
    error = 3e-6 if store in NUMBERS else 5e-4  # on tensor cores, values that have codes are rounded to halves
    found = []
    for device in (ops, TRUTH):
        kv, _ = test_sparse_ops.cached(device, store, 3, n_head_kv, 300, d)
        p = device.exact_top_k(q, kv, stop, 300)[1].copy()
        rows, weights = (a.copy() for a in device.exact_top_k(q, kv, stop, k))
        found.append([p, rows, weights, kv])
    (p, rows, weights, kv), (truth, _, _, theirs) = found
    for a, b in zip(until(stop, p), until(stop, truth), strict=True):
        assert_close(a, b, 1e-5)
    for b, n in enumerate(stop[:2]):
        m = min(k, n)
        assert_best(rows[b, :, :m], weights[b, :, :m], truth[b, :, :n], n, 0, False)
    rows[0, :, 5], rows[1, :, 20:] = 0, 10**6  # in any order, and what does not count
    for blend in ((weights, mean), (None, None)):
        ours = ops.attend_rows(q, kv, ops.indices(rows), stop, *blend)
        assert_close(ours, TRUTH.attend_rows(q, theirs, rows, stop, *blend), error)
        assert not ours[2].any()
    ours = ops.add_rows(kv, ops.indices(rows), stop, weights, d)
    assert_close(ours, TRUTH.add_rows(theirs, rows, stop, weights, d), 3e-6)
    rows[0, :, 7] = -1
    without = np.delete(rows[:1], 7, axis=2), stop[:1] * 0 + k - 1
    one = KV(*(a[:1] for a in theirs))
    ours = ops.attend_rows(q, kv, ops.indices(rows), stop, None, None)
    assert_close(ours[:1], TRUTH.attend_rows(q[:1], one, *without, None, None), error)


@pytest.mark.parametrize("seed", [1, 2])
def test_in_another_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of blocks and of threads."""
    ops = emulated_ops(seed)
    test_the_best(ops, *CASES[1])
    test_codes(ops, "q8_0", 2, 2, 64, 1024, monkeypatch)
    test_whole_keys_and_rows(ops, "f16", 7, 1, 100)
    test_heavy_rows(ops, *CASES[0], 300)
    test_more_equals_than_are_listed(ops, 5)
