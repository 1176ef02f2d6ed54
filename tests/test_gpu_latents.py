"""Palu's latents on an emulated card, at sizes that emulation can do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emulated import emulated_ops
from test_latents import FINITE, NAMES, TRUTH, Shape, factors, filled, hard_rows, latents, model, rope_of
from test_ops import assert_close, normal

from kernels_gpu import latent_ops
from kernels_gpu.latent_rows import encoded
from minirt.ops import KV, Far
from minirt.reference.attention import decoded
from minirt.stores import MAX_POSITION, get_stores

HALVES = 2e-3  # of weights and of what was coded, as tensor cores take them

SHAPES = [
    Shape(3, 3, 64, 3, 96, 64),
    Shape(8, 2, 128, 2, 64, 96, False, 64, True),
    Shape(4, 4, 20, 2, 40, 32, True, 12),
    Shape(8, 1, 100, 1, 64, 32, False, extras=True),
]
CASES = [
    (SHAPES[0], "latent-q3"),
    *((SHAPES[1], name) for name in NAMES),
    (SHAPES[2], "latent-q4"),
    (SHAPES[3], "latent-f16"),
]


@pytest.fixture(scope="module")
def ops() -> Any:
    return emulated_ops()


def cache_of(ops: Any, s: Shape, name: str, slots: int, layer: int = 1) -> KV:
    """A cache of one sequence; factors of an odd layer are halves, of an even one floats."""
    both = zip(get_stores(name, model(s).palu), factors(ops, s, rope_of(s), layer), strict=True)
    shape = 1, s.n_head_kv // s.group_size, slots
    return KV(*(ops.allocate(store, (*shape, store.numbers(model(s), 0)), factor) for store, factor in both))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank", [32, 96, 100])
def test_rows_are_the_same(ops: Any, name: str, rank: int) -> None:
    """Bit by bit; what a row with numbers that are not finite says of the others does not matter."""
    s = Shape(1, 1, 100, 1, rank, rank)
    rows, slots = hard_rows(60, rank), np.arange(60, dtype=np.int32)
    ours, truth = (cache_of(device, s, name, 60) for device in (ops, TRUTH))
    with np.errstate(all="ignore"):
        for device, kv in ((ops, ours), (TRUTH, truth)):
            device.append(kv, 0 * slots, slots, rows, np.ascontiguousarray(rows[..., :-1]))
        for a, b in zip(ours, truth, strict=True):
            found = encoded(ops.ops.device, a)
            assert np.array_equal(found[0, 0, FINITE], b.rows[0, 0, FINITE])
            assert not np.isfinite(b.store.decode(found)[0, 0, 6:11, :rank]).all(axis=1).any()


@pytest.mark.parametrize(("s", "name"), CASES, ids=str)
def test_rebuilt_rows(ops: Any, s: Shape, name: str) -> None:
    """Keys are turned, and halves."""
    ours, truth = (filled(device, s, name, 70) for device in (ops, TRUTH))
    found = ops.ops._rebuilt(ours, 1, 67)
    for a, b in zip(found, truth, strict=True):
        assert_close(ops.to_host(a.codes)[0].astype(np.float32), decoded(b[1, :, :67]), 1e-3)


@pytest.mark.parametrize(("s", "name"), CASES, ids=str)
def test_attention(ops: Any, s: Shape, name: str) -> None:
    first, stop, found = np.array([0, 23], np.int32), np.array([1, 70], np.int32), []
    q = 0.1 * normal(2, s.n_head, s.d, seed=9)
    for device in (ops, TRUTH):
        kv = filled(device, s, name, 70)
        found.append([device.attend(q, kv, first, stop).copy(), device.attend(q, kv, stop, stop).copy()])
    assert_close(found[0][0], found[1][0], HALVES)
    assert not found[0][1].any()


@pytest.mark.parametrize("seed", [1, 2])
def test_parts_and_far_slots(seed: int) -> None:
    """Of sequences alone and side by side, which get the same numbers; in any order of threads."""
    s, first, stop = SHAPES[2], np.array([0, 40], np.int32), np.array([300, 150], np.int32)
    far, q, near = np.array([0, 30], np.int32), *(0.1 * normal(2, s.n_head, s.d, seed=i) for i in (8, 9))
    ops, found = emulated_ops(seed), []
    for device in (ops, TRUTH):
        kv = filled(device, s, "latent-q4", 300)
        found.append([device.attend(near, kv, first, stop, Far(q, far)), device.attend(near, kv, first, stop)])
        for b in range(2):
            own = slice(b, b + 1)
            part = device.attend(near[own], KV(kv.k[own], kv.v[own]), first[own], stop[own])
            assert np.array_equal(part[0], found[-1][1][b]) or device is TRUTH
    for ours, truth in zip(*found, strict=True):
        assert_close(ours, truth, HALVES)


@pytest.mark.parametrize("shape", [(1, 64, 0), (4, 16, 0), (2, 32, 1), (1, 16, 1)], ids=str)
def test_ways_to_cut_a_group(ops: Any, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    s, stop = Shape(8, 4, 32, 4, 64, 96), np.full(2, 50, np.int32)
    q = 0.1 * normal(2, s.n_head, s.d, seed=9)
    monkeypatch.setattr(ops.ops, "_shape", lambda *args: latent_ops.Shape(*shape))
    found = [device.attend(q, filled(device, s, "latent-f16", 50), 0 * stop, stop) for device in (ops, TRUTH)]
    assert_close(*found, HALVES)


@pytest.mark.parametrize("s", [SHAPES[0], SHAPES[1]], ids=str)
def test_prompts(ops: Any, s: Shape) -> None:
    for start, n, window in ((0, 5, 0), (33, 10, 20)):
        q, found = 0.1 * normal(n, s.n_head, s.d, seed=9), []
        for device in (ops, TRUTH):
            kv, lse = filled(device, s, "latent-q4", start + n + 3), np.zeros((n, s.n_head), np.float32)
            out = device.attend_chunk(q, kv, 1, start, window, None, lse).copy()
            found.append((out, lse, device.attend_chunk(q, kv, 1, -3, 0, 0).copy()))
        for ours, truth in zip(*found, strict=True):
            assert_close(ours, truth, HALVES)


def test_overwritten_rows(ops: Any) -> None:
    """One slot for all groups, one of each, one that is not there."""
    s, device = SHAPES[2], ops.ops.device
    k, v = latents(s, 2, np.array([500, 600]), seed=7)
    for heads in (1, 2):
        slot = np.array([[3, 9], [2, 40]], np.int32)[:, :heads]
        kv, before = (filled(ops, s, "latent-q3", 20) for _ in range(2))
        positions = device.zeros((2, heads, 20), np.int32)
        where, pos = device.upload(np.ascontiguousarray(slot)), np.array([500, 600], np.int32)
        ops.ops._overwrite_latents(kv, where, device.upload(k), device.upload(v), positions, pos)
        found = [encoded(device, rows) for rows in kv]
        wanted = [encoded(device, rows) for rows in before]
        places = np.zeros((2, heads, 20), np.int32)
        for b in range(2):
            for g in range(2):
                at = slot[b, min(g, heads - 1)]
                if at < 20:
                    for rows, store, x in zip(wanted, (kv.k.store, kv.v.store), (k, v), strict=True):
                        rows[b, g, at] = store.encode(x[b, g])
                    places[b, min(g, heads - 1), at] = pos[b]
        assert np.array_equal(device.download(positions), places)
        for a, b in zip(found, wanted, strict=True):
            assert np.array_equal(a, b)


def test_far_positions(ops: Any) -> None:
    """Keys turn as exactly at the end of a long text as at its beginning."""
    s, n = Shape(2, 2, 64, 2, 64, 64), 16
    k, v = latents(s, n, 2**24 - 1000 + np.arange(n))
    found = []
    for device in (ops, TRUTH):
        kv = cache_of(device, s, "latent-f16", n)
        device.append(kv, np.zeros(n, np.int32), np.arange(n, dtype=np.int32), k, v)
        found.append(kv)
    ours = ops.to_host(ops.ops._rebuilt(found[0], 0, n, True).k.codes)[0].astype(np.float32)
    assert_close(ours, decoded(found[1].k[0]), 1e-3)


@pytest.mark.parametrize("pos", [-1, MAX_POSITION + 1])
def test_positions_outside_a_text_are_refused(ops: Any, pos: int) -> None:
    """Where the host knows them; the keys of those that are turn by numbers, not by a table."""
    s, device, where = SHAPES[0], ops.ops.device, np.array([pos], np.int32)
    kv, (k, v) = filled(ops, s, "latent-f16", 5, 1), map(device.upload, latents(s, 1, where))
    slot, positions = device.zeros((1, 1), np.int32), device.zeros((1, 1, 5), np.int32)
    with pytest.raises(ValueError, match="lie outside a text"):
        ops.ops._overwrite_latents(kv, slot, k, v, positions, where)
    angles, config = ops.angles(rope_of(s), where), SimpleNamespace(head_dim=s.d, n_head=s.n_head)
    with pytest.raises(ValueError, match="lie outside a text"):
        ops.ops._q_and_latents(device.zeros((1, 512), np.float32), None, config, angles)


def test_sums_of_groups(ops: Any) -> None:
    of_heads, sums = normal(6, 50), normal(2, 50, seed=1)
    device = ops.ops.device
    there = device.upload(sums)
    ops.ops._average_heads(device.upload(of_heads), there)
    assert_close(device.download(there), sums + of_heads.reshape(2, 3, 50).mean(axis=1), 1e-6)
