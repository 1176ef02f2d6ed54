"""Palu's latents on an emulated card, at sizes that emulation can do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from emulated import emulated_ops
from test_latents import FINITE, NAMES, TRUTH, Shape, factors, filled, hard_rows, model, rope_of
from test_ops import assert_close, normal

from kernels_gpu.latent_rows import encoded
from minirt.ops import KV
from minirt.reference.attention import decoded
from minirt.stores import get_stores

HALVES = 2e-3  # of weights and of what was coded, as tensor cores take them

SHAPES = [
    Shape(3, 3, 64, 3, 96, 64),
    Shape(8, 2, 128, 2, 64, 96, False, 64, True),
    Shape(4, 4, 20, 2, 40, 32, True, 12),
    Shape(8, 1, 100, 1, 64, 32, False, extras=True),
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
            assert not np.isfinite(b.store.decode(found)[0, 0, 6:10, :rank]).all(axis=1).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("s", SHAPES, ids=str)
def test_rebuilt_rows(ops: Any, s: Shape, name: str) -> None:
    """Keys are turned, and halves."""
    ours, truth = (filled(device, s, name, 70) for device in (ops, TRUTH))
    found = ops.ops._rebuilt(ours, 1, 67)
    for a, b in zip(found, truth, strict=True):
        assert_close(ops.to_host(a.codes)[0].astype(np.float32), decoded(b[1, :, :67]), 1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("s", SHAPES, ids=str)
def test_attention(ops: Any, s: Shape, name: str) -> None:
    for slots in (1, 70):
        first, stop = np.array([0, slots // 3], np.int32), np.array([slots, slots], np.int32)
        q, found = 0.1 * normal(2, s.n_head, s.d, seed=9), []
        for device in (ops, TRUTH):
            kv = filled(device, s, name, slots)
            found.append([device.attend(q, kv, first, stop).copy(), device.attend(q, kv, stop, stop).copy()])
        assert_close(found[0][0], found[1][0], HALVES)
        assert not found[0][1].any()
