"""Ops of policies that evict and merge on an emulated card: tests of all devices, at sizes that emulation can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import test_eviction_ops as eviction
from emulated import EmulatedDevice, FromHost, emulated_ops
from test_eviction_ops import RULES, int32, ints, kept_rows, numbers
from test_ops import TRUTH, assert_close, filled, normal

from kernels_gpu.ops import GpuOps
from minirt.ops import KV, NO_POSITION

CASES = [("f16", (9, 3, 64)), ("f32", (4, 2, 100)), ("q4_0", (4, 2, 32))]  # store; H_q, H_kv, d


@pytest.fixture(scope="module")
def ops() -> Any:
    return emulated_ops()


@pytest.mark.parametrize("slots", [1, 150])
def test_attend_weights(ops: Any, slots: int) -> None:
    eviction.test_attend_weights(ops, "f16", 9, 3, 64, slots)
    eviction.test_weights_may_be_a_part_of_an_array(ops)


@pytest.mark.parametrize(("store", "heads"), [*CASES, ("f16", (16, 1, 64))], ids=str)
@pytest.mark.parametrize(("start", "n"), [(0, 1), (70, 1), (20, 40)])
def test_column_sums(ops: Any, store: str, heads: tuple[int, int, int], start: int, n: int) -> None:
    """Of 16 query heads that share a row of keys, in several parts."""
    n_head, n_head_kv, d = heads
    kv, truth = (filled(device, store, 2, n_head_kv, start + n, d) for device in (ops, TRUTH))
    q, ours = normal(n, n_head, d, seed=99), np.abs(normal(n_head_kv, start + n))
    theirs, lse = ours.copy(), np.zeros((n, n_head), np.float32)
    TRUTH.attend_chunk(q, truth, 1, start, lse=lse)
    ops.add_column_sums(q, kv, 1, start, lse, ours)
    TRUTH.add_column_sums(q, truth, 1, start, lse, theirs)
    assert_close(ours, theirs, 1e-6 if store == "f32" else 1e-3)


@pytest.mark.parametrize("n", [1, 17, 300])
def test_evict(ops: Any, n: int) -> None:
    eviction.test_evict(ops, 3, n)


def test_evict_by_hand(ops: Any) -> None:
    eviction.test_evict_by_hand(ops)


@pytest.mark.parametrize("n", [0, 1, 1024, 2500])
def test_orders(ops: Any, n: int) -> None:
    """Of numbers of which many are equal, in one tile or several."""
    values = np.random.RandomState(n).randint(-9, 9, (2, n)).astype(np.int32)
    values[:, ::7] = NO_POSITION
    assert np.array_equal(ops.argsort(values), TRUTH.argsort(values))


def test_argsort_and_take(ops: Any) -> None:
    eviction.test_argsort_and_take(ops)
    x, rows = normal(3, 50), ints(1, 20, high=50)
    assert np.array_equal(ops.take(x, rows), x[:, rows[0]])


@pytest.mark.parametrize(("store", "heads"), CASES, ids=str)
def test_rows(ops: Any, store: str, heads: tuple[int, int, int]) -> None:
    eviction.test_overwrite(ops, store, *heads[1:])
    eviction.test_copy_rows(ops, store, *heads[1:])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("store", "heads"), CASES, ids=str)
def test_merging(ops: Any, rule: Any, store: str, heads: tuple[int, int, int]) -> None:
    for slots in (2, 3, 70):
        eviction.test_merge(ops, rule, store, *heads[1:], slots)
    for n, m, head in ((2, 1, 0), (40, 38, 3), (200, 60, 4)):
        eviction.test_merge_evicted(ops, rule, store, *heads[1:], n, m, head)


def test_merging_by_hand(ops: Any) -> None:
    eviction.test_merge_by_hand(ops)
    eviction.test_a_shared_threshold(ops)
    eviction.test_merge_evicted_by_hand(ops)
    eviction.test_nothing_was_evicted(ops)


def test_rows_may_be_copied_within_a_cache(ops: Any) -> None:
    """More of them than a block holds at once, to the places of others that go the same way."""
    kv, rows = (
        filled(ops, "f32", 1, 2, 700, 2),
        np.stack([np.sort(np.random.RandomState(i).permutation(700)[:600]) for i in (0, 1)]),
    )
    expected = np.take_along_axis(numbers(ops, kv.v, 2)[0], rows[..., None], axis=1)
    ops.copy_rows(kv, rows.astype(np.int32), kv, 0)
    assert np.array_equal(numbers(ops, kv.v, 2)[0, :, :600], expected)


def test_parts_of_arrays(ops: Any) -> None:
    """Scores, positions and orders that lie between others."""
    gpu, wide = ops.ops, (3, 4, 40)
    scores, positions = normal(*wide), ints(*wide, high=99)
    stop, zero, before = int32(20, 25), int32(0, 0), int32(60, 99)
    results = []
    for device, there in ((gpu, gpu.device.upload), (TRUTH, np.copy)):
        s, p, slot = there(scores), there(positions), there(np.zeros((2, 2), np.int32))
        device.evict(s[1:, ::2, 5:30], p[1:, ::2, 5:30], stop, stop, zero, before, slot)
        order = device.argsort(p[1][:, 3:20])[:, :9]
        taken = device.take(s[1][:, 3:], order)
        results.append([device.to_host(a) for a in (s, p, slot, order, taken)])
    for ours, theirs in zip(*results, strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("outside", [-1, 12])
def test_slots_outside_the_cache_are_left_out(ops: Any, outside: int) -> None:
    kv, x, positions = filled(ops, "f16", 2, 3, 12, 64), normal(2, 3, 64), ints(2, 3, 12, high=9)
    before, old = [numbers(ops, a, 64) for a in kv], positions.copy()
    slot, threshold = np.full((2, 3), outside, np.int32), np.full((2, 3), -1, np.float32)
    slot[1] = 7
    ops.overwrite(kv, slot, x, x, positions, int32(70, 71))
    ops.merge(kv, slot, int32(12, 0), int32(0, 0), int32(1, 1), threshold, RULES[0])
    assert (threshold == -1).all()
    for a, b in zip(kv, before, strict=True):
        b[1, :, 7] = x[1].astype(np.float16)
        assert np.array_equal(numbers(ops, a, 64), b)
    old[1, :, 7] = 71
    assert np.array_equal(positions, old)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_of_threads_does_not_show(ops: Any, seed: int) -> None:
    results = []
    for device in (ops, emulated_ops(seed)):
        kv, q, threshold = filled(device, "f16", 2, 3, 150, 64), normal(2, 9, 64), np.zeros((2, 3), np.float32)
        weights, sums, lse = np.zeros((2, 3, 150), np.float32), np.zeros((3, 30), np.float32), normal(20, 9)
        out = device.attend_weights(q, kv, int32(150, 110), weights, False)
        device.add_column_sums(normal(20, 9, 64), kv, 1, 10, lse, sums)
        for rule in RULES:
            device.merge(kv, ints(2, 3, high=110), int32(150, 110), int32(0, 4), int32(1, 1), threshold, rule)
            device.merge_evicted(KV(kv.k[:1], kv.v[:1]), kept_rows(3, 150, 50), 4, threshold[0], rule)
        results.append([out, weights, sums, threshold, *(numbers(device, a, 64) for a in kv)])
    for ours, other in zip(*results, strict=True):
        assert np.array_equal(ours, other)


def test_a_recorded_step() -> None:
    """It does what the next steps are to do when the host's arrays say so, on slots that the card has found."""
    gpu = GpuOps(EmulatedDevice())
    kv, truth = (filled(device, "f16", 1, 3, 12, 64) for device in (FromHost(gpu), TRUTH))
    scores, positions = np.zeros((1, 3, 12), np.float32), np.full((1, 3, 12), NO_POSITION, np.int32)
    theirs = [scores, positions, np.full((1, 3), 9, np.int32), np.zeros((1, 3), np.float32)]
    ours = [gpu.device.upload(x) for x in theirs]
    k, q = (gpu.device.zeros((1, heads, 64), np.float32) for heads in (3, 9))
    stop, room, head, before, pos, active = (int32(n) for n in (10, 12, 1, 99, 9, 0))

    def step(device: Any, kv: KV, arrays: list[Any], k: Any, q: Any) -> Any:
        scores, positions, slot, threshold = arrays
        device.overwrite(kv, slot, k, k, positions, pos)
        out = device.attend_weights(q, kv, stop, scores, True)
        device.evict(scores, positions, stop, room, head, before, slot)
        device.merge(kv, slot, stop, head, active, threshold, RULES[0])
        return out

    again = None
    for i in range(6):
        new = normal(1, 3, 64, seed=i), normal(1, 9, 64, seed=20 + i)
        k.set(new[0])
        q.set(new[1])
        pos[0], stop[0], active[0] = 9 + i, min(10 + i, 12), i >= 2
        if again is None:
            out, again = gpu.record(lambda device: step(device, kv, ours, k, q))
        else:
            again()
        assert_close(gpu.device.download(out), step(TRUTH, truth, theirs, *new), 1e-3)
        for a, b in zip(ours, theirs, strict=True):
            assert np.allclose(gpu.device.download(a), b, atol=1e-3)
    assert again is not None


def test_what_does_not_fit_is_refused(ops: Any) -> None:
    kv, one = filled(ops, "f16", 2, 3, 10, 64), filled(ops, "f16", 1, 3, 10, 64)
    zero, ten, some = int32(0, 0), int32(10, 10), int32(5, 5)
    slot, scores, positions = ints(2, 3, high=10), normal(2, 3, 10), ints(2, 3, 10, high=10)
    kept, threshold, rule = kept_rows(3, 10, 4), normal(2, 3), RULES[0]
    outside = np.where(kept == kept.max(), 10, kept)
    bad: list[Callable[[], Any]] = [
        lambda: ops.evict(scores, positions, int32(5, 11), zero, zero, ten, slot),
        lambda: ops.evict(scores, positions, int32(5, -1), zero, zero, ten, slot),
        lambda: ops.evict(scores, positions, int32(5, 10), int32(5, 11), zero, ten, slot),
        lambda: ops.evict(scores, positions, some, zero, int32(0, 10), ten, slot),
        lambda: ops.evict(scores, positions, some, zero, int32(0, -1), ten, slot),
        lambda: ops.merge(kv, slot, int32(5, 11), zero, some, threshold, rule),
        lambda: ops.merge(kv, slot, ten, int32(0, -1), some, threshold, rule),
        lambda: ops.overwrite(kv, slot, normal(2, 3, 32), normal(2, 3, 32), positions, some),
        lambda: ops.take(scores[0], outside),
        lambda: ops.take(scores[0], kept[:2]),
        lambda: ops.copy_rows(one, outside, one, 0),
        lambda: ops.copy_rows(one, kept - 9, one, 0),
        lambda: ops.merge_evicted(one, outside, 0, threshold[0], rule),
        lambda: ops.merge_evicted(one, kept[:, ::-1], 0, threshold[0], rule),
        lambda: ops.ops.evict(*(ops.ops.device.upload(a) for a in (positions, scores)), some, ten, zero, ten, slot),
    ]  # fmt: skip
    for call in bad:
        with pytest.raises(ValueError, match=r"."):
            call()
