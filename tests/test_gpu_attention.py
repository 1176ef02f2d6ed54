"""A cache and attention to it on an emulated card: tests of all devices, at sizes that emulation can do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import test_ops
from emulated import EmulatedDevice, FromHost, emulated_ops
from test_ops import TRUTH, assert_close, filled, normal
from test_stores import hard_rows

from kernels_gpu.attention_ops import FLOAT, TENSOR
from kernels_gpu.ops import GpuOps
from kernels_gpu.rows import encoded
from minirt.ops import KV, Far
from minirt.reference.attention import scaled_logits
from minirt.stores import STORES

FLOATS, HALVES = ["f32", "f16"], [name for name, store in STORES.items() if store.length > 1]


@pytest.fixture(scope="module")
def ops() -> Any:
    return emulated_ops()


@pytest.fixture(scope="module")
def old(ops: Any) -> Any:
    """A card without tensor cores."""
    device = EmulatedDevice()
    device.capability = (6, 1)
    return FromHost(GpuOps(device))


@pytest.mark.parametrize(("store", "d"), [("f32", 10), ("f16", 100), *((name, 96) for name in HALVES)])
def test_rows_are_as_the_reference_stores_them(ops: Any, store: str, d: int) -> None:
    """Bit by bit; what a block with numbers that are not finite says of the others does not matter."""
    rows, slots = hard_rows(40, d)[:, None], np.arange(40, dtype=np.int32)[::-1].copy()
    caches = [KV(*(device.allocate(STORES[store], (2, 1, 40, d)) for _ in range(2))) for device in (ops, TRUTH)]
    with np.errstate(all="ignore"):
        for device, kv in zip((ops, TRUTH), caches, strict=True):
            device.append(kv, 0 * slots + 1, slots, rows, rows[::-1].copy())
    finite = np.r_[0:3, 6:40]
    for ours, theirs, order in zip(*caches, (slots, slots[::-1]), strict=True):
        found, expected = (a[1, 0][order].reshape(40, -1) for a in (encoded(ops.ops.device, ours), theirs))
        assert np.array_equal(found[finite], expected[finite])
        assert np.isnan(STORES[store].decode(found[5:6])).any()


# Groups of query heads that a warp serves, that several share, that several blocks do; chunks of heads that are not
# whole; sequences of one part and of several.
@pytest.mark.parametrize(
    ("store", "heads"),
    [
        ("f16", (2, 2, 80)), ("f16", (4, 2, 100)), ("f32", (3, 3, 64)), ("f32", (7, 1, 8)), ("f16", (2, 1, 256)),
        ("f16", (6, 2, 64)), ("f16", (33, 1, 16)), ("f16", (3, 1, 32)),
        ("q8_0", (4, 4, 64)), ("q8_0-plain", (8, 1, 32)), ("q4_0", (4, 2, 96)),
    ],
    ids=str,
)  # fmt: skip
def test_attend(ops: Any, store: str, heads: tuple[int, int, int]) -> None:
    for slots in (1, 64, 190):
        test_ops.test_attend(ops, store, *heads, slots)


@pytest.mark.parametrize(
    ("store", "heads"), [("f16", (1, 1, 80)), ("f16", (8, 1, 64)), ("f16", (34, 1, 16)), ("q4_0", (3, 1, 64))], ids=str
)
def test_attend_without_tensor_cores(old: Any, store: str, heads: tuple[int, int, int]) -> None:
    for slots in (65, 190):
        test_ops.test_attend(old, store, *heads, slots)


@pytest.mark.parametrize(("store", "heads"), [("f16", (2, 2, 64)), ("q8_0", (4, 2, 32))], ids=str)
def test_attend_to_far_slots(ops: Any, store: str, heads: tuple[int, int, int]) -> None:
    for slots in (2, 65, 190):
        test_ops.test_attend_to_far_slots(ops, store, *heads, slots)


@pytest.mark.parametrize("store", ["f16", "q8_0/f16"])
@pytest.mark.parametrize("group", [1, 3])
def test_scores_and_their_totals(ops: Any, store: str, group: int) -> None:
    """From which weights are made: powers of 2, the same in all kernels."""
    k_store, _, v_store = store.partition("/")
    stop, q, gpu = np.array([200, 0], np.int32), normal(2, 2 * group, 32) * 3, ops.ops
    kv = KV(filled(ops, k_store, 2, 2, 210, 32).k, filled(ops, v_store or k_store, 2, 2, 210, 32).v)
    scores, totals = gpu.device.empty((2, 2 * group, 210), np.float32), gpu.device.empty((2, 2 * group, 2), np.float32)
    out, on_card = gpu.device.empty(q.shape, np.float32), gpu.device.upload
    ranges = on_card(0 * stop), on_card(stop), None
    gpu._attend(
        "attention.cu", "attend", on_card(q), kv, out, 210, *ranges, scores=scores, totals=totals, FAR=0
    )  # fmt: skip
    found, (high, total) = gpu.to_host(scores)[0, :, :200], gpu.to_host(totals)[0].T[..., None]
    weights = np.exp2(found - high) / total
    values = filled(TRUTH, v_store or k_store, 2, 2, 210, 32).v
    keys = filled(TRUTH, k_store, 2, 2, 210, 32).k
    logits = scaled_logits(q[0], keys[0, :, :200])
    assert_close(found * np.log(2), logits, 2e-6)
    assert_close(weights.sum(axis=1), np.ones(2 * group), 2e-6)
    assert_close(gpu.to_host(out)[0], TRUTH.attend(q, KV(keys, values), 0 * stop, stop)[0], 2e-6)
    assert (gpu.to_host(totals)[1, :, 1] == 0).all()
    assert np.isnan(gpu.to_host(scores)[0, :, 200:]).all()  # nothing was written there


@pytest.mark.parametrize(("store", "heads"), [("f16", (6, 2, 64)), ("q4_0", (4, 2, 96)), ("f32", (3, 1, 100))], ids=str)
def test_attend_chunk(ops: Any, store: str, heads: tuple[int, int, int]) -> None:
    test_ops.test_attend_chunk(ops, store, *heads, 5, 70, 20)
    for start, n, window, stop in test_ops.CUT_CHUNKS[::2]:
        test_ops.test_attend_chunk_to_some_slots(ops, store, *heads, start, n, window, stop)


@pytest.mark.parametrize("heads", [(1, 1, 256), (7, 1, 16), (3, 1, 8)], ids=str)
def test_chunks_of_odd_heads(ops: Any, old: Any, heads: tuple[int, int, int]) -> None:
    test_ops.test_attend_chunk(ops, "f16", *heads, 0, 33, 0)
    test_ops.test_attend_chunk(old, "f16", *heads, 5, 20, 1)


@pytest.mark.parametrize(("store", "group"), [("q8_0", 1), ("q4_0", 3), ("q8_0/q4_0", 2)])
def test_long_chunks_of_rotated_rows(ops: Any, store: str, group: int) -> None:
    """Several blocks of rows that see several tiles of keys, and of a window the first slots from far away."""
    n, start, sinks, k_store, v_store = 150, 30, 4, *(store.split("/") * 2)[:2]
    q, far, found = normal(n, group, 32, seed=9) * 3, normal(n, group, 32, seed=8) * 3, []
    for device in (ops, TRUTH):
        kv = KV(filled(device, k_store, 1, 1, 180, 32).k, filled(device, v_store, 1, 1, 180, 32).v)
        ring, lse, far_lse = KV(kv.k[:, :, sinks:], kv.v[:, :, sinks:]), *(np.zeros((2, n, group), np.float32))
        whole = device.attend_chunk(q, kv, 0, start).copy()
        out = device.attend_chunk(q, ring, 0, start - sinks, 100, None, lse).copy()
        device.join_attention(out, lse, device.attend_chunk(far, kv, 0, start - 104, 0, sinks, far_lse).copy(), far_lse)
        found.append((whole, out))
    for ours, truth in zip(*found, strict=True):
        assert_close(ours, truth, 1e-3)


@pytest.mark.parametrize("store", ["q8_0", "q4_0"])
def test_far_slots_of_several_parts(ops: Any, old: Any, store: str) -> None:
    """That end within a part, at its border, and with the last."""
    first, stop, far = (np.array(x, np.int32) for x in ([200, 130, 290], [300, 300, 300], [150, 128, 290]))
    q, other = normal(3, 3, 32, seed=9) * 3, normal(3, 3, 32, seed=8) * 3
    truth = TRUTH.attend(q, filled(TRUTH, store, 3, 1, 300, 32), first, stop, Far(other, far))
    for device in (ops, old):
        found = device.attend(q, filled(device, store, 3, 1, 300, 32), first, stop, Far(other, far))
        assert_close(found, truth, test_ops.attention_error(ops, store))


def test_joined_attention(ops: Any) -> None:
    test_ops.test_joined_attention_is_the_whole(ops, 10, 60)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("d", "dim"), [(80, 80), (80, 20), (8, 2)])
def test_turning(ops: Any, d: int, dim: int, interleaved: bool) -> None:
    x = normal(4, 3, d)
    ours, truth = (device.rotate(x, test_ops.angles(device, 4, dim, interleaved)) for device in (ops, TRUTH))
    assert_close(ours, truth, 1e-6)


def test_large_scores(ops: Any, old: Any) -> None:
    for device, group in ((ops, 3), (old, 8)):
        kv = KV(*(device.allocate(STORES["f16"], (1, 1, 3, 64)) for _ in range(2)))
        k = np.float32([6e4, -6e4, 0.0])[:, None, None] * np.ones((3, 1, 64), np.float32)
        device.append(kv, np.zeros(3, np.int32), np.arange(3, dtype=np.int32), k, normal(3, 1, 64))
        first, stop, value = np.zeros(1, np.int32), np.full(1, 3, np.int32), normal(3, 1, 64)[0, 0]
        for large in (1e-25, 1e20):  # too small to tell keys apart, and larger than a half
            out = device.attend(np.full((1, group, 64), large, np.float32), kv, first, stop)
            mean = normal(3, 1, 64).mean(axis=(0, 1))
            for head in out[0]:
                assert_close(head, value if large > 1 else mean, 1e-3)


@pytest.mark.parametrize(("store", "group"), [("f16", 3), ("q8_0-plain", 8)])
def test_nan_shows(ops: Any, store: str, group: int) -> None:
    """Of a key in all heads of its group, of a value where it is; of other sequences and heads nothing."""
    for of_keys in (True, False):
        kv = KV(*(ops.allocate(STORES[store], (2, 2, 40, 32)) for _ in range(2)))
        k, v = normal(80, 2, 32), normal(80, 2, 32, seed=1)
        (k if of_keys else v)[50, 1, 3] = np.nan
        slots = np.arange(80, dtype=np.int32)
        ops.append(kv, slots // 40, slots % 40, k, v)
        out = ops.attend(normal(2, 2 * group, 32), kv, np.zeros(2, np.int32), np.full(2, 40, np.int32))
        assert np.isfinite(out[0]).all()
        assert np.isfinite(out[1, :group]).all()
        assert np.isnan(out[1, group:]).any(axis=1).all()


@pytest.mark.parametrize(("store", "heads"), [("f32", (2, 2, 32)), ("f16", (3, 1, 32))], ids=str)
def test_the_order_of_threads_does_not_show(ops: Any, store: str, heads: tuple[int, int, int]) -> None:
    """Nor the rest of a batch."""
    n_head, n_head_kv, d = heads
    first, stop, q = np.zeros(2, np.int32), np.array([200, 130], np.int32), normal(2, n_head, d)
    kv = filled(ops, store, 2, n_head_kv, 200, d)
    one = ops.attend(q, kv, first, stop)
    for seed in (1, 2):
        other = emulated_ops(seed)
        assert np.array_equal(one, other.attend(q, filled(other, store, 2, n_head_kv, 200, d), first, stop))
    alone = ops.attend(q[1:], KV(kv.k[1:], kv.v[1:]), first[1:], stop[1:])
    assert np.array_equal(alone, one[1:])


def test_what_readers_serve() -> None:
    """Query heads of a block and blocks of a KV head, together at least the group, and none without a head."""
    for reader in (FLOAT, TENSOR):
        for group in range(1, 130):
            heads, split = reader.heads(group)
            assert heads * split >= group
            assert heads <= reader.most * reader.warps
            assert heads * (split // 2) < group


def test_what_does_not_fit_is_refused(ops: Any) -> None:
    kv, one = filled(ops, "f16", 1, 1, 8, 264), np.ones(1, np.int32)
    k = normal(1, 1, 264)
    for call in (
        lambda: ops.attend(k, kv, 0 * one, one),
        lambda: ops.attend_chunk(k, kv, 0, 0),
        lambda: ops.append(kv, 0 * one, one, k, k[..., :256]),
        lambda: ops.append(kv, 0 * one, one, k[..., :256], k[..., :256]),
        lambda: ops.append(kv, 0 * one, one, normal(1, 2, 264), normal(1, 2, 264)),
    ):
        with pytest.raises(ValueError, match=r"."):
            call()
