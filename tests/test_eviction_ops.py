"""Ops of the policies that evict and merge, on every device against the NumPy reference, over odd shapes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from emulated import device_ops, devices
from test_ops import NUMBERS, TRUTH, angles, assert_close, filled, normal, rounding

from kernels_cpu import CpuOps
from minirt.ops import KV, NO_POSITION, Far, MergeRule
from minirt.reference.attention import store_of
from minirt.stores import STORES

# H_q, H_kv, d
HEADS = [(3, 3, 64), (9, 3, 64), (8, 2, 80), (8, 1, 128), (4, 2, 100), (3, 1, 8)]
LENGTHS = [1, 2, 63, 64, 65, 700]
RULES = [MergeRule(0.7, float(np.e), True, False), MergeRule(0.5, 1.0, False, True)]


@pytest.fixture(scope="module", params=devices())
def ops(request: pytest.FixtureRequest) -> Any:
    return device_ops(request.param)


def allowed(ops: Any, store: str, exact: float) -> float:
    """On a card, numbers that are stored in fewer bits are multiplied as halves."""
    return 3e-3 if ops.name == "gpu" and store != "f32" else exact + rounding(store)


def int32(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def ints(*shape: int, high: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, high, shape).astype(np.int32)


def numbers(device: Any, array: Any, d: int) -> np.ndarray:
    """A cache as float32 [B, H_kv, slots, d]."""
    array = device.to_host(array)
    if array.dtype.itemsize > 4:
        return store_of(array).decode(array)
    plain = array.view({2: np.float16, 4: np.float32}[array.dtype.itemsize]) if array.dtype.fields else array
    return plain[..., :d].astype(np.float32)


def cache_of(device: Any, store: str, k: Any, v: Any) -> KV:
    """Keys and values [B, H_kv, slots, d] in a cache."""
    k, v = np.float32(k), np.float32(v)
    kv = KV(*(device.allocate(STORES[store], k.shape) for _ in range(2)))
    n_seq, _, slots, _ = k.shape
    seq, slot = np.repeat(np.arange(n_seq, dtype=np.int32), slots), np.tile(np.arange(slots, dtype=np.int32), n_seq)
    device.append(kv, seq, slot, *(np.concatenate(x.transpose(0, 2, 1, 3)) for x in (k, v)))
    return kv


def assert_caches_close(device: Any, kv: KV, truth: KV, d: int, store: str) -> None:
    """But for a unit in the last place of a float16 now and then, where a merge lies between two."""
    for ours, theirs in zip(kv, truth, strict=True):
        a, b = numbers(device, ours, d), numbers(TRUTH, theirs, d)
        if store == "f32":
            assert_close(a, b)
        elif store not in NUMBERS:  # another rounding of one number may change the scale of a block
            assert np.mean(a != b) < 0.02
            assert np.abs(a - b).max() <= 0.2 * np.abs(b).max()
        else:
            assert np.mean(a != b) < 0.01
            assert np.abs(a - b).max() <= 1e-3 * np.abs(b).max()


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", NUMBERS)
@pytest.mark.parametrize(("n_head", "n_head_kv", "d"), HEADS)
@pytest.mark.parametrize("slots", LENGTHS)
def test_attend_weights(ops: Any, store: str, n_head: int, n_head_kv: int, d: int, slots: int) -> None:
    stop, q = int32(slots, slots - slots // 3, 0), normal(3, n_head, d, seed=99) * 3
    kv, truth = (filled(device, store, 3, n_head_kv, slots + 2, d) for device in (ops, TRUTH))
    for heads in {1, n_head_kv}:
        for accumulate in (False, True):
            begin = np.abs(normal(3, heads, slots + 1, seed=5))
            ours, theirs = begin.copy(), begin.copy()
            out = ops.to_host(ops.attend_weights(q, kv, stop, ours, accumulate)).copy()
            assert_close(out, TRUTH.attend_weights(q, truth, stop, theirs, accumulate), allowed(ops, store, 1e-6))
            assert not out[2].any()
            for b, n in enumerate(stop):
                assert np.array_equal(ours[b, :, n:], begin[b, :, n:])
                if n:
                    assert_close(ours[b, :, :n], theirs[b, :, :n], allowed(ops, store, 1e-5))
                    added = ours[b, :, :n] - (begin[b, :, :n] if accumulate else 0)
                    assert np.allclose(added.sum(axis=1), 1, atol=1e-4)
            assert_close(out, ops.to_host(ops.attend(q, kv, 0 * stop, stop)))


def test_weights_may_be_a_part_of_an_array(ops: Any) -> None:
    """As in a chunk of a prompt, where the cache has more slots than are filled."""
    kv, truth = (filled(device, "f16", 2, 2, 90, 64) for device in (ops, TRUTH))
    q, stop = normal(2, 6, 64), int32(70, 80)
    ours, theirs = (np.zeros((4, 3, 100), np.float32) for _ in range(2))
    ops.attend_weights(q, kv, stop, ours[1:3, ::2, 5:85], False)
    TRUTH.attend_weights(q, truth, stop, theirs[1:3, ::2, 5:85], False)
    assert_close(ours, theirs, allowed(ops, "f16", 1e-5))


@pytest.mark.parametrize("store", NUMBERS)
@pytest.mark.parametrize(("n_head", "n_head_kv", "d"), HEADS)
@pytest.mark.parametrize(("start", "n"), [(0, 1), (70, 1), (0, 33), (5, 70), (150, 240)])
def test_column_sums(ops: Any, store: str, n_head: int, n_head_kv: int, d: int, start: int, n: int) -> None:
    kv, truth = (filled(device, store, 2, n_head_kv, 400, d) for device in (ops, TRUTH))
    q, begin = normal(n, n_head, d, seed=99) * 3, np.abs(normal(n_head_kv, start + n))
    ours, theirs, lse = begin.copy(), begin.copy(), np.zeros((n, n_head), np.float32)
    ops.attend_chunk(q, kv, 1, start, lse=lse)
    ops.add_column_sums(q, kv, 1, start, lse, ours)
    TRUTH.add_column_sums(q, truth, 1, start, lse, theirs)
    error = allowed(ops, store, 1e-5)
    assert_close(ours, theirs, error)
    # The matrix itself.
    keys = numbers(TRUTH, truth.k, d)[1, :, : start + n].astype(np.float64).repeat(n_head // n_head_kv, axis=0)
    logits = np.einsum("thd,hsd->hts", q.astype(np.float64), keys) / np.sqrt(d)
    logits[:, np.arange(start + n) > start + np.arange(n)[:, None]] = -np.inf
    p = np.exp(logits - logits.max(axis=2, keepdims=True))
    p /= p.sum(axis=2, keepdims=True)
    assert_close(ours - begin, p.sum(axis=1).reshape(n_head_kv, -1, start + n).mean(axis=1).astype(np.float32), error)


def test_column_sums_into_a_part_of_an_array(ops: Any) -> None:
    kv, q, lse = filled(ops, "f16", 1, 2, 40, 64), normal(30, 6, 64), np.zeros((30, 6), np.float32)
    ops.attend_chunk(q, kv, 0, 10, lse=lse)
    whole, part = np.zeros((2, 40), np.float32), np.zeros((2, 50), np.float32)
    ops.add_column_sums(q, kv, 0, 10, lse, whole)
    ops.add_column_sums(q, kv, 0, 10, lse, part[:, 3:43])
    assert np.array_equal(part[:, 3:43], whole)
    assert not part[:, :3].any()
    assert not part[:, 43:].any()


def test_chunks_add_up(ops: Any) -> None:
    """The column sums of a prompt in two chunks, and the weights summed over its decode steps."""
    kv, q = filled(ops, "f32", 1, 2, 50, 64), normal(50, 6, 64)
    whole, parts, steps = (np.zeros((2, 50), np.float32) for _ in range(3))
    for sums, cuts in ((whole, (0, 50)), (parts, (0, 21, 50))):
        for i, j in itertools.pairwise(cuts):
            lse = np.zeros((j - i, 6), np.float32)
            ops.attend_chunk(q[i:j], kv, 0, i, lse=lse)
            ops.add_column_sums(q[i:j], kv, 0, i, lse, sums[:, :j])
    for t in range(50):
        ops.attend_weights(q[t : t + 1], kv, int32(t + 1), steps[None], True)
    assert_close(parts, whole, 1e-5)
    assert_close(steps, whole, 1e-5)


@pytest.mark.parametrize(("d", "dim", "interleaved"), [(64, 64, True), (100, 50, False), (8, 2, False)])
def test_rotate(ops: Any, d: int, dim: int, interleaved: bool) -> None:
    x = normal(5, 3, d)
    before = x.copy()
    turned = ops.rotate(x, angles(ops, 5, dim, interleaved))
    assert_close(ops.to_host(turned), TRUTH.rotate(x, angles(TRUTH, 5, dim, interleaved)))
    assert np.array_equal(x, before)
    assert np.array_equal(ops.to_host(turned)[..., dim:], x[..., dim:])


def test_concatenate_and_zeros(ops: Any) -> None:
    parts = normal(2, 3, 4), normal(5, 3, 4)
    assert np.array_equal(ops.to_host(ops.concatenate(parts)), np.concatenate(parts))
    assert np.array_equal(ops.to_host(ops.zeros((2, 3), np.dtype(np.int32))), np.zeros((2, 3), np.int32))


# -- which slot goes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", NUMBERS)
@pytest.mark.parametrize(("n_head_kv", "d"), [(3, 64), (1, 100), (2, 8)])
def test_overwrite(ops: Any, store: str, n_head_kv: int, d: int) -> None:
    for heads in {1, n_head_kv}:
        slot, pos, found = ints(2, heads, high=9), int32(70, 3), []
        k, v = normal(2, n_head_kv, d, seed=1), normal(2, n_head_kv, d, seed=2)
        for device in (ops, TRUTH):
            kv, positions = filled(device, store, 2, n_head_kv, 12, d), ints(2, heads, 9, high=99)
            device.overwrite(kv, slot, k, v, positions, pos)
            found.append([positions, *(numbers(device, a, d) for a in kv)])
        for ours, theirs in zip(*found, strict=True):
            assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 63, 64, 65, 700])
def test_evict(ops: Any, heads: int, n: int) -> None:
    """With few different scores, so that there are ties, and some that are no number."""
    for seed in range(20):
        r = np.random.RandomState(seed)
        scores = r.randint(0, 5, (6, heads, n + 1)).astype(np.float32)
        scores[r.uniform(size=scores.shape) < 0.2] = np.nan
        scores[r.uniform(size=scores.shape) < 0.1] = np.inf
        positions = np.argsort(r.uniform(size=scores.shape)).astype(np.int32)
        stop, room = r.randint(0, n + 1, 6).astype(np.int32), r.randint(0, n + 1, 6).astype(np.int32)
        stop[:2] = n
        head, before = r.randint(0, max(1, n // 2), 6).astype(np.int32), r.randint(0, 2 * n + 1, 6).astype(np.int32)
        found = []
        for device in (ops, TRUTH):
            slot, s, p = np.full((6, heads), -1, np.int32), scores.copy(), positions.copy()
            device.evict(s, p, stop, room, head, before, slot)
            found.append((slot, s, p))
        for ours, theirs in zip(*found, strict=True):
            assert np.array_equal(ours, theirs, equal_nan=True)


def test_evict_by_hand(ops: Any) -> None:
    nan = np.nan
    cases: list[tuple[list[float], list[int], int, int, int, int, int]] = [
        # scores, positions, stop, room, head, before, slot
        ([5, 1, 4, 1, 9], [0, 1, 2, 3, 0], 4, 4, 0, 9, 1),  # of equal ones the first
        ([5, 1, 4, 1, 9], [0, 1, 2, 3, 0], 4, 5, 0, 9, 4),  # there is room
        ([5, 1, 4, 1, 9], [0, 1, 2, 3, 0], 4, 4, 2, 9, 3),  # the head stays
        ([5, 1, 4, 1, 9], [0, 6, 2, 7, 0], 4, 4, 0, 6, 2),  # the newest stay
        ([5, nan, 4, nan, 9], [0, 1, 2, 3, 0], 4, 4, 0, 9, 2),  # NaN is never lowest
        ([nan, nan, nan, nan, 0], [0, 1, 2, 3, 0], 4, 4, 1, 9, 1),  # there is none: the head
        ([5, 1, 4, 1, 9], [7, 7, 7, 7, 0], 4, 4, 3, 7, 3),
        ([-1, -5, -np.inf, 1, 9], [0, 1, 2, 3, 0], 4, 4, 0, 9, 2),
        ([0, 0, 0, 0, 0], [0, 1, 2, 3, 0], 0, 4, 0, 9, 0),  # empty
    ]
    for device in (ops, TRUTH):
        for scores, where, stop, room, head, before, expected in cases:
            s, p, slot = np.float32([[scores]]), np.int32([[where]]), int32(-1)[None]
            device.evict(s, p, int32(stop), int32(room), int32(head), int32(before), slot)
            assert slot[0, 0] == expected
            assert (s[0, 0, expected], p[0, 0, expected]) == (0, NO_POSITION)


def test_argsort_and_take(ops: Any) -> None:
    values = np.stack([np.random.RandomState(i).permutation(50) for i in range(3)]).astype(np.int32)
    order = ops.argsort(values)
    assert order.dtype == np.int32
    assert np.array_equal(ops.to_host(order), TRUTH.argsort(values))
    rows, x = ints(3, 20, high=50), normal(3, 50)
    assert np.array_equal(ops.to_host(ops.take(x, rows)), np.take_along_axis(x, rows, axis=1))
    assert np.array_equal(ops.to_host(ops.take(values, order)), np.sort(values, axis=1))


@pytest.mark.parametrize("store", NUMBERS)
@pytest.mark.parametrize(("n_head_kv", "d"), [(3, 64), (1, 100), (2, 8)])
def test_copy_rows(ops: Any, store: str, n_head_kv: int, d: int) -> None:
    for heads in {1, n_head_kv}:
        rows, found = ints(heads, 7, high=20), []
        for device in (ops, TRUTH):
            both = [filled(device, store, 3, n_head_kv, slots, d) for slots in (20, 12)]
            source, target = (KV(kv.k[1:2], kv.v[1:2]) for kv in both)
            device.copy_rows(source, rows, target, 4)
            device.copy_rows(target, rows[:, :2] % 8, target, 1)  # within one cache
            found.append([numbers(device, a, d) for a in both[1]])
        for ours, theirs in zip(*found, strict=True):
            assert np.array_equal(ours, theirs)


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("store", NUMBERS)
@pytest.mark.parametrize(("n_head_kv", "d"), [(3, 64), (2, 80), (1, 128), (2, 100), (1, 8)])
@pytest.mark.parametrize("slots", [2, 3, 16, 17, 64, 65, 700])
def test_merge(ops: Any, rule: MergeRule, store: str, n_head_kv: int, d: int, slots: int) -> None:
    stop, head, active = (
        int32(slots, slots - slots // 3, slots, 1),
        int32(0, min(2, slots - 1), 0, 0),
        int32(1, 1, 0, 1),
    )
    slot = np.stack([ints(n_head_kv, high=n, seed=n) for n in stop])
    threshold, found = np.tile(np.float32([[0.1], [0.9], [0.0], [-np.inf]]), (1, n_head_kv)), []
    for device in (ops, TRUTH):
        kv, moved = filled(device, store, 4, n_head_kv, slots + 1, d), threshold.copy()
        device.merge(kv, slot, stop, head, active, moved, rule)
        found.append((kv, moved))
    (kv, ours), (truth, theirs) = found
    assert np.allclose(ours, theirs, rtol=0, atol=5e-7)
    assert np.array_equal(ours[2:], threshold[2:])  # not active, and nothing to receive
    assert_caches_close(ops, kv, truth, d, store)
    assert np.array_equal(
        numbers(ops, kv.k, d)[2], numbers(ops, filled(ops, store, 4, n_head_kv, slots + 1, d).k, d)[2]
    )


def test_merge_by_hand(ops: Any) -> None:
    """The evicted key (.6, .8) has cosines .6, .8, .96 with the kept ones."""
    k, v = [[[[1, 0], [0, 1], [0.6, 0.8], [1.6, 1.2]]]], [[[[1, 0], [2, 0], [4, 8], [8, 0]]]]
    w = np.exp(0.96)
    for device in (ops, TRUTH):
        kv, threshold = cache_of(device, "f32", k, v), np.float32([[0.9]])
        device.merge(kv, int32(2)[None], int32(4), int32(0), int32(1), threshold, MergeRule(0.7, 2.0, True, False))
        assert np.allclose(threshold, 0.7 * 0.96 + 0.3 * 0.9)
        keys, values = (numbers(device, a, 2)[0, 0] for a in kv)
        assert np.allclose(keys[3], (2 * np.array([1.6, 1.2]) + w * np.array([0.6, 0.8])) / (2 + w), atol=1e-6)
        assert np.allclose(values[3], (2 * np.array([8, 0]) + w * np.array([4, 8])) / (2 + w), atol=1e-6)
        assert np.allclose(keys[:3], k[0][0][:3])
        assert np.allclose(values[:3], v[0][0][:3])
        # Below the threshold nothing is merged, but the threshold moves; the other slots are out of bounds.
        device.merge(kv, int32(2)[None], int32(3), int32(1), int32(1), threshold, MergeRule(0.5, 2.0, True, False))
        assert np.allclose(threshold, 0.5 * 0.8 + 0.5 * (0.7 * 0.96 + 0.3 * 0.9))
        assert np.allclose(numbers(device, kv.k, 2)[0, 0, :3], k[0][0][:3])
        # Weights 1 and u, divided by 2.
        kv, threshold = cache_of(device, "f32", k, v), np.float32([[0.9]])
        device.merge(kv, int32(2)[None], int32(4), int32(0), int32(1), threshold, MergeRule(0.7, 2.0, False, False))
        assert np.allclose(numbers(device, kv.v, 2)[0, 0, 3], (np.array([8, 0]) + 0.96 * np.array([4, 8])) / 2)


def test_a_shared_threshold(ops: Any) -> None:
    """Cosines 1 and .6: their mean .8 decides for both heads; each weighs with its own."""
    k = [[[[1, 0], [1, 0]], [[1, 0], [0.6, 0.8]]]]
    v = [[[[2, 0], [0, 2]], [[2, 0], [0, 2]]]]
    for device in (ops, TRUTH):
        for first, merged in ((0.75, True), (0.85, False)):
            kv, threshold = cache_of(device, "f32", k, v), np.full((1, 2), first, np.float32)
            device.merge(kv, int32(1, 1)[None], int32(2), int32(0), int32(1), threshold, MergeRule(0.5, 1, False, True))
            assert np.allclose(threshold, 0.5 * 0.8 + 0.5 * first)
            values = numbers(device, kv.v, 2)[0, :, 0]
            assert np.allclose(values, [[1, 1], [1, 0.6]] if merged else [[2, 0], [2, 0]])


def test_merge_of_equals_and_of_zeros(ops: Any) -> None:
    """Of rows that are as like, the first receives; a row of zeros is like nothing."""
    k = np.zeros((1, 1, 40, 8), np.float32)
    k[0, 0, [5, 20, 21, 37]] = 1.0
    for device in (ops, TRUTH):
        kv, threshold = cache_of(device, "f16", k, k), np.float32([[0.5]])
        device.merge(kv, int32(20)[None], int32(40), int32(6), int32(1), threshold, MergeRule(0, 1, False, False))
        assert threshold[0, 0] == 0.5
        assert np.array_equal(numbers(device, kv.k, 8)[0, 0], k[0, 0])  # (1 + 1) / 2
        kv = cache_of(device, "f16", k, 2 * k + np.arange(40)[:, None])
        device.merge(kv, int32(37)[None], int32(40), int32(6), int32(1), threshold, MergeRule(0, 1, False, False))
        values = numbers(device, kv.v, 8)[0, 0, :, 0]
        assert values[20] == (22 + 39) / 2
        assert values[21] == 23
        kv = cache_of(device, "f16", k, k)
        device.merge(kv, int32(0)[None], int32(5), int32(0), int32(1), threshold, MergeRule(1, 1, False, False))
        assert threshold[0, 0] == 0


def kept_rows(n_head_kv: int, n: int, m: int) -> np.ndarray:
    rows = (np.sort(np.random.RandomState(h).permutation(n)[:m]) for h in range(n_head_kv))
    return np.stack(list(rows)).astype(np.int32)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("store", NUMBERS)
@pytest.mark.parametrize(("n_head_kv", "d"), [(3, 64), (2, 80), (1, 128), (2, 100), (1, 8)])
@pytest.mark.parametrize(("n", "m", "head"), [(2, 1, 0), (40, 5, 0), (40, 38, 3), (300, 50, 4), (450, 200, 0)])
def test_merge_evicted(
    ops: Any, rule: MergeRule, store: str, n_head_kv: int, d: int, n: int, m: int, head: int
) -> None:
    kept, found = kept_rows(n_head_kv, n, m), []
    for device in (ops, TRUTH):
        kv, threshold = filled(device, store, 2, n_head_kv, n, d), np.zeros(n_head_kv, np.float32)
        device.merge_evicted(KV(kv.k[1:], kv.v[1:]), kept, head, threshold, rule)
        found.append((kv, threshold))
    (kv, ours), (truth, theirs) = found
    assert np.abs(ours - theirs).max() < 5e-7
    assert_caches_close(ops, kv, truth, d, store)
    before = filled(TRUTH, store, 2, n_head_kv, n, d)
    changed = (numbers(ops, kv.k, d) != numbers(TRUTH, before.k, d)).any(axis=3)
    assert not changed[0].any()
    for h, rows in enumerate(kept):
        assert set(np.flatnonzero(changed[1, h])) <= set(rows[rows >= head])


def test_merge_evicted_by_hand(ops: Any) -> None:
    """Slots 1, 3 and 4 go. Cosines with the kept: 0 (.8, 0), 2 (.6, 1) and 0 (.28, .96): 1 and 4 tell nothing new."""
    k = [[[[1, 0], [0.8, 0.6], [0, 1], [0, 2], [0.28, 0.96]]]]
    v = [[[[1, 0], [2, 0], [4, 0], [8, 0], [16, 0]]]]
    mean = (0.8 + 1 + 0.96) / 3  # 0.92: slots 3 and 4 reach it, 1 does not
    a, b = np.exp(1.0), np.exp(0.96)
    for device in (ops, TRUTH):
        kv, threshold = cache_of(device, "f32", k, v), np.zeros(1, np.float32)
        device.merge_evicted(kv, int32(0, 2)[None], 0, threshold, MergeRule(0.7, 3.0, True, False))
        assert np.allclose(threshold, mean)
        values = numbers(device, kv.v, 2)[0, 0, :, 0]
        assert np.allclose(values, [1, 2, (3 * 4 + a * 8 + b * 16) / (3 + a + b), 8, 16])
        assert np.allclose(
            numbers(device, kv.k, 2)[0, 0, 2], [b * 0.28 / (3 + a + b), (3 + a * 2 + b * 0.96) / (3 + a + b)]
        )
        kv = cache_of(device, "f32", k, v)
        device.merge_evicted(kv, int32(0, 2)[None], 1, threshold, MergeRule(0.7, 3.0, False, False))
        values = numbers(device, kv.v, 2)[0, 0, :, 0]  # slot 0 receives nothing now
        assert np.allclose(threshold, (0.6 + 1 + 0.96) / 3)
        assert np.allclose(values, [1, 2, (4 + 8 + 0.96 * 16) / 3, 8, 16])


def test_nothing_was_evicted(ops: Any) -> None:
    for device in (ops, TRUTH):
        kv, threshold = filled(device, "f16", 1, 2, 5, 64), np.float32([0.25, 0.5])
        before = numbers(device, kv.k, 64)
        device.merge_evicted(kv, np.tile(np.arange(5, dtype=np.int32), (2, 1)), 0, threshold, RULES[0])
        assert np.array_equal(threshold, [0.25, 0.5])
        assert np.array_equal(numbers(device, kv.k, 64), before)


# -- threads, and what is refused --------------------------------------------------------------------------------------


def test_results_do_not_depend_on_threads() -> None:
    found = []
    for threads in (1, 2, 2):
        ops = CpuOps(threads)
        kv = filled(ops, "f16", 2, 3, 1500, 64)
        q, stop = normal(2, 9, 64), int32(1500, 1100)
        results = [ops.attend(q, kv, stop // 2, stop, Far(q * 2, stop // 4)).copy()]
        weights, sums = np.zeros((2, 3, 1500), np.float32), np.zeros((3, 400), np.float32)
        results += [ops.attend_weights(q, kv, stop, weights, False).copy(), weights]
        chunk, lse = normal(300, 9, 64), np.zeros((300, 9), np.float32)
        results += [ops.attend_chunk(chunk, kv, 1, 100, lse=lse).copy(), lse, sums]
        ops.add_column_sums(chunk, kv, 1, 100, lse, sums)
        threshold = np.zeros((2, 3), np.float32)
        ops.merge(kv, ints(2, 3, high=1100), stop, int32(0, 4), int32(1, 1), threshold, RULES[0])
        ops.merge_evicted(KV(kv.k[:1], kv.v[:1]), kept_rows(3, 1500, 500), 4, threshold[0], RULES[0])
        found.append([*results, threshold, *(numbers(ops, a, 64) for a in kv)])
    for ours in found[1:]:
        for a, b in zip(ours, found[0], strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("device", [CpuOps(threads=1), TRUTH], ids=["cpu", "reference"])
def test_what_does_not_fit_is_refused(device: Any) -> None:
    kv, one = filled(device, "f16", 2, 2, 10, 64), filled(device, "f16", 1, 2, 10, 64)
    q, k, chunk = normal(2, 4, 64), normal(2, 2, 64), normal(3, 4, 64)
    zero, ten, some = int32(0, 0), int32(10, 10), int32(5, 5)
    slot, scores, lse = ints(2, 2, high=10), normal(2, 2, 10), normal(3, 4)
    positions, threshold, rule = ints(2, 2, 10, high=10), normal(2, 2), RULES[0]
    kept, out = np.tile(np.arange(4, dtype=np.int32), (2, 1)), normal(3, 4, 64)

    def with_one(array: np.ndarray, value: int) -> np.ndarray:
        array = array.copy()
        array.flat[-1] = value
        return array

    bad: list[Callable[[], Any]] = [
        lambda: device.attend(q, kv, some, ten, Far(q, int32(2, 6))),
        lambda: device.attend(q, kv, some, ten, Far(q, int32(2, -1))),
        lambda: device.attend(q, kv, some, ten, Far(q[:1], some)),
        lambda: device.attend(q, kv, some, ten, Far(q, some[:1])),
        lambda: device.attend_weights(q, kv, some, scores[:, :, :4], False),
        lambda: device.attend_weights(q, kv, some, normal(2, 3, 10), False),
        lambda: device.attend_weights(q, kv, int32(5, 11), scores, False),
        lambda: device.attend_weights(q, kv, int32(5, -1), scores, False),
        lambda: device.attend_chunk(chunk, kv, 0, 0, stop=11),
        lambda: device.attend_chunk(chunk, kv, 0, 0, stop=-1),
        lambda: device.attend_chunk(chunk, kv, 0, 0, lse=normal(3, 3)),
        lambda: device.add_column_sums(chunk, kv, 0, 2, lse, normal(2, 6)),
        lambda: device.add_column_sums(chunk, kv, 0, -1, lse, normal(2, 2)),
        lambda: device.add_column_sums(chunk, kv, 0, 8, lse, normal(2, 11)),
        lambda: device.add_column_sums(chunk, kv, 2, 2, lse, normal(2, 5)),
        lambda: device.overwrite(kv, with_one(slot, 10), k, k, positions, some),
        lambda: device.overwrite(kv, with_one(slot, -1), k, k, positions, some),
        lambda: device.overwrite(kv, slot, k[:1], k, positions, some),
        lambda: device.overwrite(kv, slot, k, k, positions, some[:1]),
        lambda: device.overwrite(kv, slot[:, :1], k, k, positions, some),
        lambda: device.overwrite(kv, slot, k, k, ints(2, 2, 11, high=3), some),
        lambda: device.evict(scores, positions, int32(5, 11), zero, zero, ten, slot),
        lambda: device.evict(scores, positions, int32(5, -1), zero, zero, ten, slot),
        lambda: device.evict(scores, positions, int32(5, 10), int32(5, 11), zero, ten, slot),
        lambda: device.evict(scores, positions, some, zero, int32(0, 10), ten, slot),
        lambda: device.evict(scores, positions, some, zero, int32(0, -1), ten, slot),
        lambda: device.evict(scores, positions[:, :, :9], some, zero, zero, ten, slot),
        lambda: device.evict(scores, positions, some, zero[:1], zero, ten, slot),
        lambda: device.evict(scores, positions, some, zero, zero, ten, slot[:, :1]),
        lambda: device.take(scores[0], with_one(slot, 10)),
        lambda: device.take(scores[0], with_one(slot, -1)),
        lambda: device.copy_rows(one, with_one(kept, 10), one, 0),
        lambda: device.copy_rows(one, with_one(kept, -1), one, 0),
        lambda: device.copy_rows(one, kept, one, 7),
        lambda: device.copy_rows(kv, kept, kv, 0),
        lambda: device.copy_rows(one, kept, filled(device, "f16", 1, 2, 10, 80), 0),
        lambda: device.copy_rows(one, kept, filled(device, "f32", 1, 2, 10, 64), 0),
        lambda: device.merge(kv, with_one(slot, 10), ten, zero, some, threshold, rule),
        lambda: device.merge(kv, with_one(slot, -1), ten, zero, some, threshold, rule),
        lambda: device.merge(kv, slot, int32(5, 11), zero, some, threshold, rule),
        lambda: device.merge(kv, slot, ten, int32(0, -1), some, threshold, rule),
        lambda: device.merge(kv, slot[:, :1], ten, zero, some, threshold, rule),
        lambda: device.merge(kv, slot, ten, zero, some, threshold[:1], rule),
        lambda: device.merge_evicted(kv, kept, 0, threshold[0], rule),
        lambda: device.merge_evicted(one, with_one(kept, 10), 0, threshold[0], rule),
        lambda: device.merge_evicted(one, with_one(kept, 2), 0, threshold[0], rule),
        lambda: device.merge_evicted(one, kept - 1, 0, threshold[0], rule),
        lambda: device.merge_evicted(one, kept, 4, threshold[0], rule),
        lambda: device.merge_evicted(one, kept, 0, threshold, rule),
        lambda: device.join_attention(out, lse, out[:2], lse),
        lambda: device.join_attention(out, lse, out, lse[:2]),
        lambda: device.rotate(k, angles(device, 3, 64)),
        lambda: device.rotate(k, angles(device, 2, 66)),
    ]  # fmt: skip
    before = [numbers(device, a, 64) for cache in (kv, one) for a in cache] + [scores.copy(), positions.copy()]
    for call in bad:
        with pytest.raises(ValueError, match=r"."):
            call()
    after = [numbers(device, a, 64) for cache in (kv, one) for a in cache] + [scores, positions]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_arrays_of_another_type_or_order_are_refused() -> None:
    ops = CpuOps(threads=1)
    kv, q, n = filled(ops, "f16", 1, 2, 10, 64), normal(1, 4, 64), int32(5)
    scores, positions, slot = normal(1, 2, 10), ints(1, 2, 10, high=9), ints(1, 2, high=9)
    for wrong in (scores.astype(np.float64), normal(1, 2, 20)[:, :, ::2]):
        with pytest.raises(ValueError, match="in order"):
            ops.attend_weights(q, kv, n, wrong, False)
        with pytest.raises(ValueError, match="in order"):
            ops.evict(wrong, positions, n, n, n, n, slot)
    with pytest.raises(ValueError, match="in order"):
        ops.evict(scores, positions.astype(np.int64), n, n, n, n, slot)
    with pytest.raises(ValueError, match="in order"):
        ops.attend_chunk(normal(3, 4, 64), KV(kv.k[:, :, ::2], kv.v[:, :, ::2]), 0, 0)
    with pytest.raises(ValueError, match="different caches"):
        ops.attend_chunk(normal(3, 4, 64), KV(filled(ops, "f16", 1, 2, 20, 64).k[:, :, 10:], kv.v), 0, 0)
    for wrong in (normal(4, 3).T, normal(3, 4).astype(np.float64)):
        with pytest.raises(ValueError, match="in C order"):
            ops.attend_chunk(normal(3, 4, 64), kv, 0, 0, lse=wrong)
