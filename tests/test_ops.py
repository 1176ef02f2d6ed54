"""Every op of every device against the NumPy reference, over odd shapes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest
from emulated import device_ops, devices
from test_dequantize import random_tensor

from kernels_cpu import CpuOps
from kernels_cpu.activations import LARGEST, RADIX, quantize
from kernels_cpu.integer_products import HAS_WORDS
from kernels_cpu.ops import FEW_ROWS
from kernels_gpu.row_ops import ROWS_OF_ONE
from minirt.gguf_file import TENSOR_TYPES
from minirt.ops import KV, Far
from minirt.reference import ReferenceOps, silu
from minirt.reference.attention import turn as rotate
from minirt.rope import Rope
from minirt.stores import STORES
from minirt.weights import LayerWeights

TRUTH = ReferenceOps()
NUMBERS = [name for name, store in STORES.items() if store.length == 1]  # heads of any size
# H_q, H_kv, d
HEADS = [(1, 1, 64), (6, 2, 64), (3, 3, 80), (8, 2, 80), (8, 1, 128), (4, 4, 128), (7, 1, 64), (4, 2, 100), (3, 1, 8)]


@pytest.fixture(scope="module", params=devices())
def ops(request: pytest.FixtureRequest) -> Any:
    return device_ops(request.param)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def assert_close(ours: np.ndarray, truth: np.ndarray, error: float = 1e-6) -> None:
    """Normalised error, and every element finite."""
    assert ours.shape == truth.shape
    assert np.isfinite(ours).all()
    assert np.linalg.norm((ours - truth).astype(np.float64)) <= error * np.linalg.norm(truth.astype(np.float64))


# -- rows --------------------------------------------------------------------------------------------------------------

# Where weights have blocks, activations are kept in 14 or 16 bits in a decode step (kernels_cpu.activations), and in 16
# in a prompt if the CPU multiplies them (kernels_cpu.integer_products); by a card in 15, and many rows as halves.
ROUNDED, WORDS, HALVES = 3e-4 if RADIX == 7 else 1.5e-4, 5e-5, 5e-4


# Queries, and what values are multiplied by, where the cache has blocks (kernels_cpu.block_products): what that does to
# attention by logits of some units.
INTEGERS = 4e-4 if RADIX == 7 else 1e-4


def rounding(store: str) -> float:
    return 0.0 if store in NUMBERS else INTEGERS


def allowed(ops: Any, name: str, n: int) -> float:
    if ops.name == "gpu" and n > ROWS_OF_ONE:
        return HALVES
    if ops.name == "gpu" and TENSOR_TYPES[name].block_size > 1:
        return 2e-4
    if TENSOR_TYPES[name].block_size == 1 or (n > FEW_ROWS and not HAS_WORDS):
        return 3e-6
    return ROUNDED if n <= FEW_ROWS else WORDS


def config(n_head: int, n_head_kv: int, d: int) -> Any:
    return SimpleNamespace(n_head=n_head, n_head_kv=n_head_kv, head_dim=d, rms_eps=1e-5)


def layer(device: Any, name: str, c: Any, n_embd: int, n_ff: int, extras: bool = False) -> LayerWeights:
    """Random weights of a type; with biases and norms of heads if `extras`."""
    q, kv = c.n_head * c.head_dim, c.n_head_kv * c.head_dim
    shapes = {
        "wq": (q, n_embd), "wk": (kv, n_embd), "wv": (kv, n_embd), "wo": (n_embd, q),
        "w_gate": (n_ff, n_embd), "w_up": (n_ff, n_embd), "w_down": (n_embd, n_ff),
    }  # fmt: skip
    weights = {
        field: device.matrix(random_tensor(name, *shape, seed=i)) for i, (field, shape) in enumerate(shapes.items())
    }
    vectors = {"attn_norm": n_embd, "ffn_norm": n_embd} | (
        {"bq": q, "bk": kv, "bv": kv, "q_norm": c.head_dim, "k_norm": c.head_dim} if extras else {}
    )
    optional = dict.fromkeys(("bq", "bk", "bv", "q_norm", "k_norm"))
    return LayerWeights(**optional | weights | {k: device.vector(normal(n, seed=n)) for k, n in vectors.items()})


def angles(device: Any, n: int, dim: int, interleaved: bool = True) -> Any:
    rope = Rope(10000.0 ** (-np.arange(dim // 2) / (dim // 2)), 1.1, interleaved)
    return device.angles(rope, np.arange(7, 7 + n, dtype=np.int32))


@pytest.mark.parametrize("name", TENSOR_TYPES)
@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 33])
def test_products_of_every_type(ops: Any, name: str, n: int) -> None:
    tensor = random_tensor(name, 37, 512)
    ours, truth = ops.matrix(tensor), TRUTH.matrix(tensor)
    assert ours.shape == truth.shape == (37, 512)
    assert ours.nbytes == tensor.data.nbytes
    x, norm = normal(n, 512), normal(512, seed=1)

    def run(device: Any, m: Any) -> list[np.ndarray]:
        grown = normal(n, 37, seed=3)
        device.add_linear(grown, x, m)
        return [device.to_host(a) for a in (grown, device.logits(x, norm, 1e-5, m))]

    for o, t in zip(run(ops, ours), run(TRUTH, truth), strict=True):
        assert_close(o, t, allowed(ops, name, n))


@pytest.mark.parametrize("width", [1, 31, 8192, 20001])
def test_most_likely(ops: Any, width: int) -> None:
    logits = normal(9, width)
    logits[1] = -3e38
    logits[2, [width // 2, -1]] = 40.0  # of equal ones the first
    logits[3:6, width * 2 // 3] = np.nan, np.inf, -np.inf
    logits[6, 0], logits[6, -1] = np.inf, np.nan
    found = ops.to_host(ops.most_likely(logits))
    assert found.dtype == np.int32
    assert np.array_equal(found, TRUTH.most_likely(logits))
    assert found[:3].tolist() == [int(np.argmax(logits[0])), 0, width // 2]
    assert found[3:].tolist() == [-1, -1, -1, -1, *np.argmax(logits[7:], axis=1)]


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "F16"])
@pytest.mark.parametrize("n", [1, 5, 33])
@pytest.mark.parametrize(("heads", "interleaved", "extras"), [((4, 4, 64), True, False), ((8, 2, 32), False, True)])
def test_layer(ops: Any, name: str, n: int, heads: tuple[int, int, int], interleaved: bool, extras: bool) -> None:
    c, x = config(*heads), normal(n, 256)

    def run(device: Any) -> list[np.ndarray]:
        w, grown = layer(device, name, c, 256, 512, extras), x.copy()
        found = device.qkv(x, w, c, angles(device, n, heads[2] // 2 if extras else heads[2], interleaved))
        device.feed_forward(grown, w, c)
        return [device.to_host(a).copy() for a in (*found, grown)]

    for o, t in zip(run(ops), run(TRUTH), strict=True):
        assert_close(o, t, allowed(ops, name, n) * 2)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("heads", [(3, 1, 100), (5, 5, 20)])
def test_heads_that_are_not_whole_vectors(ops: Any, n: int, heads: tuple[int, int, int]) -> None:
    c, x = config(*heads), normal(n, 72)
    ours, truth = (d.qkv(x, layer(d, "F32", c, 72, 56), c, angles(d, n, heads[2])) for d in (ops, TRUTH))
    for o, t in zip(ours, truth, strict=True):
        assert_close(ops.to_host(o), t)
    a, b = x.copy(), x.copy()
    ops.feed_forward(a, layer(ops, "F16", c, 72, 50), c)
    TRUTH.feed_forward(b, layer(TRUTH, "F16", c, 72, 50), c)
    assert_close(a, b, 3e-6)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 72])
def test_rows_that_are_not_whole_vectors(ops: Any, name: str, columns: int) -> None:
    tensor = random_tensor(name, 5, columns)
    for n in (2, 12):
        x, norm = normal(n, columns), np.ones(columns, np.float32)
        ours, truth = ops.logits(x, norm, 1e-5, ops.matrix(tensor)), TRUTH.logits(x, norm, 1e-5, TRUTH.matrix(tensor))
        assert_close(ours, truth, max(1e-6, allowed(ops, name, n) if ops.name == "gpu" else 0))
    rows = np.arange(5, dtype=np.int32)
    assert np.array_equal(ops.embed(ops.table(tensor), rows), TRUTH.embed(TRUTH.table(tensor), rows))


@pytest.mark.parametrize("name", TENSOR_TYPES)
def test_decoding_is_exact(ops: Any, name: str) -> None:
    tensor = random_tensor(name, 37, 512, seed=5)
    rows = np.arange(37, dtype=np.int32)
    assert np.array_equal(ops.embed(ops.table(tensor), rows), TRUTH.embed(TRUTH.table(tensor), rows))
    one = np.eye(512, dtype=np.float32)  # each product is one weight, and zeros
    found = np.zeros((512, 37), np.float32)
    ops.add_linear(found, one, ops.matrix(tensor))
    assert np.array_equal(found.T, TRUTH.matrix(tensor).values)


def codes_of(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The form of activations x [N, n], and what it stands for, by the definition in kernels_cpu.activations."""
    codes = np.zeros((len(x), x.shape[1] // 32 * 96), np.uint8)

    @numba.njit
    def encode(x: Any, codes: Any) -> None:
        for i in range(len(x)):
            quantize(x, i, codes)

    encode(x, codes)
    blocks = codes.reshape(len(x), -1, 96)
    high, low = (blocks[..., at : at + 32].view(np.int8).astype(np.int32) for at in (0, 32))
    return codes, ((2**RADIX * high + low) * blocks[..., 64:68].view(np.float32)).reshape(x.shape)


def test_activations_in_two_bytes() -> None:
    x = normal(5, 320) * 10.0 ** np.random.RandomState(1).uniform(-10, 10, (5, 320)).astype(np.float32)
    x[1, :32], x[2, 40] = 0.0, -1e30
    codes, rounded = codes_of(x)
    largest = np.abs(x.reshape(5, -1, 32)).max(axis=2, keepdims=True)
    assert (np.abs((rounded - x).reshape(5, -1, 32)) <= largest / (2 * LARGEST) * 1.001).all()
    blocks = codes.reshape(5, -1, 96)
    whole = 2**RADIX * blocks[..., :32].view(np.int8).astype(np.int32) + blocks[..., 32:64].view(np.int8)
    assert np.abs(blocks[..., :64].view(np.int8).astype(int)).max() <= 2 ** (RADIX - 1)
    sums = np.stack([whole[..., :16].sum(-1), whole[..., 16:].sum(-1), whole.sum(-1)])
    assert np.array_equal(sums, np.stack([blocks[..., at : at + 4].view(np.int32)[..., 0] for at in (68, 72, 84)]))


def in_16_bits(x: np.ndarray) -> np.ndarray:
    """What the 16-bit form of activations stands for, by the definition in kernels_cpu.integer_products."""
    blocks = x.reshape(len(x), -1, 32)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    scale, inverse = largest / np.float32(32767), np.float32(32767) / np.maximum(largest, np.float32(1e-33))
    return np.where(largest > 1e-33, np.rint(blocks * inverse) * scale, 0.0).reshape(x.shape)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q2_K", "Q6_K"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_show(ops: Any, bad: float, name: str) -> None:
    for n in (1, 33):
        x, out = normal(n, 256), np.zeros((n, 37), np.float32)
        x[n // 2, 100] = bad
        ops.add_linear(out, x, ops.matrix(random_tensor(name, 37, 256)))
        finite = np.isfinite(out)
        assert not finite[n // 2].any()
        assert finite.sum() == (n - 1) * 37


@pytest.mark.parametrize("name", [name for name in TENSOR_TYPES if TENSOR_TYPES[name].block_size > 1])
@pytest.mark.parametrize("n", [1, 6, 33])
def test_only_activations_are_rounded(ops: Any, name: str, n: int) -> None:
    """With activations as their integers stand for them, a product is as exact as float32 allows."""
    tensor, x = random_tensor(name, 37, 768), normal(n, 768)
    rounded = codes_of(x)[1] if n <= FEW_ROWS else in_16_bits(x) if HAS_WORDS else x
    ours, truth = np.zeros((n, 37), np.float32), np.zeros((n, 37), np.float32)
    ops.add_linear(ours, x, ops.matrix(tensor))
    TRUTH.add_linear(truth, rounded, TRUTH.matrix(tensor))
    assert_close(ours, truth, 3e-6)


@pytest.mark.skipif(not HAS_WORDS, reason="this CPU has no instruction for it")
@pytest.mark.parametrize("name", ["Q8_0", "Q5_K", "Q2_K", "Q3_K"])
def test_products_in_16_bits(ops: Any, name: str) -> None:
    """Of any number of rows, in several runs of the inner dimension, over many magnitudes."""
    for n_in, n_out, rows in ((2304, 20, range(9, 40)), (256, 130, (9, 100)), (1024, 3, (9, 24))):
        tensor = random_tensor(name, n_out, n_in)
        ours, truth = ops.matrix(tensor), TRUTH.matrix(tensor)
        for n in rows:
            x = normal(n, n_in, seed=n) * 10.0 ** np.random.RandomState(n).uniform(-3, 3, (n, 1)).astype(np.float32)
            x[0, 32:64], x[1, 3], x[2] = 0.0, 1e4, 1e-36
            found, expected = np.zeros((n, n_out), np.float32), np.zeros((n, n_out), np.float32)
            ops.add_linear(found, x, ours)
            TRUTH.add_linear(expected, in_16_bits(x), truth)
            for row in (0, 1, slice(2, 3), slice(3, n)):
                assert_close(found[row], expected[row], 3e-6)


@pytest.mark.parametrize("n", [1, 20])
def test_matrices_of_several_types(ops: Any, n: int) -> None:
    """One without blocks among those that share activations."""
    c, x, results = config(4, 2, 64), normal(n, 256), []
    for device in (ops, TRUTH):
        w = layer(device, "Q4_0", c, 256, 512)
        w = replace(
            w, wk=device.matrix(random_tensor("F16", 128, 256)), wv=device.matrix(random_tensor("Q6_K", 128, 256))
        )
        w = replace(w, w_up=device.matrix(random_tensor("BF16", 512, 256)))
        grown = x.copy()
        found = device.qkv(x, w, c, angles(device, n, 64))
        device.feed_forward(grown, w, c)
        results.append([device.to_host(a).copy() for a in (*found, grown)])
    for o, t in zip(*results, strict=True):
        assert_close(o, t, 2 * allowed(ops, "Q4_0", n))
    if n > FEW_ROWS:
        for o, t in zip(results[0][:3], results[1][:3], strict=True):
            assert_close(o, t, HALVES if ops.name == "gpu" else 3e-6)


def test_extreme_activations(ops: Any) -> None:
    """exp neither overflows nor loses a gate; a zero row keeps its epsilon."""
    c = config(1, 1, 64)
    x = np.stack([normal(64) * 1e4, np.zeros(64, np.float32), normal(64) * 1e-20])
    found = []
    for device in (ops, TRUTH):
        w, grown = layer(device, "F32", c, 64, 64), x.copy()
        device.feed_forward(grown, replace(w, ffn_norm=device.vector(np.full(64, 300.0))), c)
        found.append(grown)
    assert_close(*found)
    assert silu(np.float32([-1000.0])) == 0.0


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("d", "dim"), [(64, 64), (80, 80), (128, 128), (64, 32), (80, 20), (8, 2)])
def test_rotation(ops: Any, d: int, dim: int, interleaved: bool) -> None:
    c, x = config(3, 3, d), normal(4, 48)
    ours, truth = (
        dev.qkv(x, layer(dev, "F32", c, 48, 16), c, angles(dev, 4, dim, interleaved)) for dev in (ops, TRUTH)
    )
    for o, t in zip(ours, truth, strict=True):
        assert_close(ops.to_host(o), t, 3e-6)


def test_rotation_by_hand() -> None:
    """A quarter turn takes (1, 0) to (0, 1), in either pairing."""
    for interleaved, x in ((True, [1, 0, 3, 0]), (False, [1, 3, 0, 0])):
        turned = np.array(x, np.float32).reshape(1, 1, 4)
        rope = Rope(np.array([np.pi / 2, np.pi / 2]), 2.0, interleaved)
        rotate(turned, TRUTH.angles(rope, np.array([1])))
        expected = [0, 2, 0, 6] if interleaved else [0, 0, 2, 6]
        assert np.allclose(turned[0, 0], expected, atol=1e-6)


# -- cache -------------------------------------------------------------------------------------------------------------


def attention_error(ops: Any, store: str, chunk: bool = False) -> float:
    """A card multiplies a prompt's queries, keys and weights as halves, and rounds values of codes to them."""
    if ops.name != "gpu" or store == "f32":
        return 2e-6 if chunk else 1e-6 + rounding(store)
    return 1e-3 if chunk else 3e-4 if STORES[store].length > 1 else 1e-6


def filled(device: Any, store: str, n_seq: int, n_head_kv: int, slots: int, d: int) -> KV:
    kv = KV(*(device.allocate(STORES[store], (n_seq, n_head_kv, slots, d)) for _ in range(2)))
    for seq in range(n_seq):
        k, v = (normal(slots, n_head_kv, d, seed=10 * seq + i) for i in range(2))
        order = np.random.RandomState(seq).permutation(slots).astype(np.int32)
        device.append(kv, np.full(slots, seq, np.int32), order, k[order], v[order])
    return kv


@pytest.mark.parametrize("store", NUMBERS)
@pytest.mark.parametrize(("n_head", "n_head_kv", "d"), HEADS)
@pytest.mark.parametrize("slots", [1, 2, 63, 64, 65, 600])
def test_attend(ops: Any, store: str, n_head: int, n_head_kv: int, d: int, slots: int) -> None:
    first = np.array([0, slots // 3, slots], np.int32)  # all, some, none
    stop = np.array([slots, slots - slots // 4, slots], np.int32)
    q = normal(3, n_head, d, seed=99) * 3
    ours = ops.to_host(ops.attend(q, filled(ops, store, 3, n_head_kv, slots, d), first, stop))
    truth = TRUTH.attend(q, filled(TRUTH, store, 3, n_head_kv, slots, d), first, stop)
    assert_close(ours, truth, attention_error(ops, store))
    assert not ours[2].any()


@pytest.mark.parametrize("store", NUMBERS)
@pytest.mark.parametrize(("n_head", "n_head_kv", "d"), HEADS)
@pytest.mark.parametrize(
    ("start", "n", "window"), [(0, 1, 0), (0, 33, 0), (40, 33, 0), (40, 33, 7), (0, 50, 16), (70, 1, 70), (5, 20, 1)]
)
def test_attend_chunk(
    ops: Any, store: str, n_head: int, n_head_kv: int, d: int, start: int, n: int, window: int
) -> None:
    q = normal(n, n_head, d, seed=99) * 3
    ours = ops.to_host(ops.attend_chunk(q, filled(ops, store, 2, n_head_kv, 80, d), 1, start, window))
    truth = TRUTH.attend_chunk(q, filled(TRUTH, store, 2, n_head_kv, 80, d), 1, start, window)
    assert_close(ours, truth, attention_error(ops, store, True))


@pytest.mark.parametrize("store", NUMBERS)
@pytest.mark.parametrize(("n_head", "n_head_kv", "d"), HEADS)
@pytest.mark.parametrize("slots", [2, 63, 65, 600])
def test_attend_to_far_slots(ops: Any, store: str, n_head: int, n_head_kv: int, d: int, slots: int) -> None:
    """Some of them, none, only these, nothing at all."""
    first = np.array([min(slots, 4), slots // 3, slots, 1], np.int32)
    stop, far = np.array([slots, slots, slots, 1], np.int32), np.array([min(slots, 4), 0, slots - 1, 0], np.int32)
    q, other, outs = normal(4, n_head, d, seed=99) * 3, normal(4, n_head, d, seed=98) * 3, []
    for device in (ops, TRUTH):
        kv = filled(device, store, 4, n_head_kv, slots, d)
        outs.append(device.to_host(device.attend(q, kv, first, stop, Far(other, far))))
    assert_close(*outs, attention_error(ops, store))
    assert not outs[0][3].any()
    same = ops.to_host(ops.attend(q, filled(ops, store, 4, n_head_kv, slots, d), first, stop, Far(q, first)))
    truth = TRUTH.attend(q, filled(TRUTH, store, 4, n_head_kv, slots, d), 0 * stop, stop)
    assert_close(same, truth, attention_error(ops, store))


CUT_CHUNKS = [
    (10, 20, 0, 12), (-5, 20, 0, None), (-5, 20, 0, 9), (-5, 20, 4, 9), (-30, 20, 0, 0), (30, 20, 7, 25),
    (30, 20, 7, 33), (3, 60, 16, 40), (60, 1, 0, 10), (60, 1, 5, 10), (-1, 1, 0, 0), (-100, 170, 50, 64),
]  # fmt: skip


@pytest.mark.parametrize("store", NUMBERS)
@pytest.mark.parametrize(("n_head", "n_head_kv", "d"), HEADS)
@pytest.mark.parametrize(("start", "n", "window", "stop"), CUT_CHUNKS)
def test_attend_chunk_to_some_slots(
    ops: Any, store: str, n_head: int, n_head_kv: int, d: int, start: int, n: int, window: int, stop: int | None
) -> None:
    """Rows before the first slot, slots that are not seen, rows that see nothing; a part of a cache."""
    q, found = normal(n, n_head, d, seed=99) * 3, []
    for device in (ops, TRUTH):
        kv, lse = filled(device, store, 2, n_head_kv, 90, d), np.zeros((n, n_head), np.float32)
        some = KV(kv.k[:, :, 10:], kv.v[:, :, 10:])
        found.append((device.to_host(device.attend_chunk(q, some, 1, start, window, stop, lse)).copy(), lse))
    (ours, lse), (truth, true_lse) = found
    error = attention_error(ops, store, True)
    if truth.any():
        assert_close(ours, truth, error)
    empty = np.isneginf(true_lse)
    assert np.array_equal(np.isneginf(lse), empty)
    assert not ours[empty].any()
    assert np.allclose(lse[~empty], true_lse[~empty], atol=5 * error, rtol=error / 2)


@pytest.mark.parametrize(("start", "n"), [(40, 33), (0, 30), (10, 60)])
def test_joined_attention_is_the_whole(ops: Any, start: int, n: int) -> None:
    """Slots before 20 and from 20 on, of which some rows see nothing."""
    q = normal(n, 6, 64) * 3
    for device in (ops, TRUTH):
        kv = filled(device, "f16", 1, 2, 80, 64)
        late = KV(kv.k[:, :, 20:], kv.v[:, :, 20:])
        lse, other_lse = (device.zeros((n, 6), np.dtype(np.float32)) for _ in range(2))
        out = device.concatenate([device.attend_chunk(q, kv, 0, start, 0, min(20, start + n), lse)])
        other = device.concatenate([device.attend_chunk(q, late, 0, start - 20, 0, None, other_lse)])
        device.join_attention(out, lse, other, other_lse)
        truth = TRUTH.attend_chunk(q, filled(TRUTH, "f16", 1, 2, 80, 64), 0, start)
        assert_close(device.to_host(out), truth, attention_error(device, "f16", True))
        nothing = device.zeros((n, 6, 64), np.dtype(np.float32))
        device.join_attention(nothing, lse * 0 - np.inf, 0 * other, lse * 0 - np.inf)
        assert not device.to_host(nothing).any()


@pytest.mark.parametrize("window", [0, 9])
def test_a_chunk_is_its_steps(window: int) -> None:
    """Row t of a chunk sees what a decode step at its slot would see."""
    kv, q = filled(TRUTH, "f32", 1, 2, 40, 64), normal(12, 6, 64, seed=3)
    chunk = TRUTH.attend_chunk(q, kv, 0, 28, window)
    for t in range(12):
        stop = np.array([29 + t], np.int32)
        step = TRUTH.attend(q[t : t + 1], kv, np.maximum(stop - window, 0) if window else 0 * stop, stop)
        assert_close(chunk[t], step[0])


def test_attention_by_hand() -> None:
    """Two keys scored ln 3 and 0 share the weight 3 : 1."""
    kv = KV(*(TRUTH.allocate(STORES["f32"], (1, 1, 2, 1)) for _ in range(2)))
    k, v = np.float32([[[np.log(3.0)]], [[0.0]]]), np.float32([[[8.0]], [[4.0]]])
    TRUTH.append(kv, np.zeros(2, np.int32), np.arange(2, dtype=np.int32), k, v)
    out = TRUTH.attend(np.ones((1, 1, 1), np.float32), kv, np.array([0]), np.array([2]))
    assert np.isclose(out[0, 0, 0], 0.75 * 8 + 0.25 * 4)


def test_large_scores_do_not_overflow(ops: Any) -> None:
    kv = KV(*(ops.allocate(STORES["f32"], (1, 1, 3, 64)) for _ in range(2)))
    k = np.float32([1e4, -1e4, 0.0])[:, None, None] * np.ones((3, 1, 64), np.float32)
    ops.append(kv, np.zeros(3, np.int32), np.arange(3, dtype=np.int32), k, normal(3, 1, 64))
    out = ops.attend(np.full((1, 1, 64), 1e4, np.float32), kv, np.array([0], np.int32), np.array([3], np.int32))
    assert_close(out[0, 0], normal(3, 1, 64)[0, 0])


# -- the seam refuses what a kernel must not see -----------------------------------------------------------------------


@pytest.mark.parametrize("device", [CpuOps(threads=1), TRUTH], ids=["cpu", "reference"])
def test_what_does_not_fit_is_refused(device: Any) -> None:
    m, table = device.matrix(random_tensor("Q4_0", 8, 64)), device.table(random_tensor("Q4_0", 8, 64))
    kv = filled(device, "f16", 2, 2, 10, 64)
    c = config(4, 2, 64)
    w = layer(device, "Q4_0", c, 64, 96)
    one, q = np.array([1], np.int32), normal(2, 4, 64)
    k = normal(1, 2, 64)
    bad = [
        lambda: device.embed(table, np.array([8], np.int32)),
        lambda: device.embed(table, np.array([-1], np.int32)),
        lambda: device.logits(normal(1, 63), normal(63), 1e-5, m),
        lambda: device.logits(normal(1, 64), normal(63), 1e-5, m),
        lambda: device.qkv(normal(1, 32), w, c, angles(device, 1, 64)),
        lambda: device.qkv(normal(2, 64), w, c, angles(device, 1, 64)),
        lambda: device.qkv(normal(1, 64), w, c, angles(device, 1, 66)),
        lambda: device.qkv(normal(1, 64), replace(w, wk=m), c, angles(device, 1, 64)),
        lambda: device.feed_forward(normal(1, 32), w, c),
        lambda: device.feed_forward(normal(1, 64), replace(w, w_up=m), c),
        lambda: device.add_linear(normal(1, 8), normal(1, 65), m),
        lambda: device.append(kv, one, np.array([10], np.int32), k, k),
        lambda: device.append(kv, one, np.array([-1], np.int32), k, k),
        lambda: device.append(kv, np.array([2], np.int32), one, k, k),
        lambda: device.append(kv, one, one, normal(1, 3, 64), k),
        lambda: device.append(kv, one, one, k, normal(1, 2, 32)),
        lambda: device.attend(q, kv, np.zeros(2, np.int32), np.array([3, 11], np.int32)),
        lambda: device.attend(q, kv, np.array([-1, 0], np.int32), np.array([3, 3], np.int32)),
        lambda: device.attend(q, kv, np.zeros(1, np.int32), np.ones(1, np.int32)),
        lambda: device.attend(normal(2, 3, 64), kv, np.zeros(2, np.int32), np.ones(2, np.int32)),
        lambda: device.attend(normal(2, 4, 32), kv, np.zeros(2, np.int32), np.ones(2, np.int32)),
        lambda: device.attend_chunk(q, kv, 0, 9, 0),
        lambda: device.attend_chunk(q, kv, 2, 0, 0),
        lambda: device.attend_chunk(q, kv, 0, -3, 0),
        lambda: device.attend_chunk(q, kv, 0, 0, -1),
        lambda: device.attend_chunk(normal(2, 3, 64), kv, 0, 0, 0),
    ]  # fmt: skip
    for call in bad:
        with pytest.raises(ValueError, match=r"."):
            call()


@pytest.mark.parametrize("n", [2, 40])
def test_what_a_kernel_reads_by_address_is_float32_in_order(n: int) -> None:
    ops, c = CpuOps(threads=1), config(4, 2, 64)
    w, m = layer(ops, "Q4_0", c, 64, 96), ops.matrix(random_tensor("Q4_0", 64, 64))
    for x in (normal(n, 64).astype(np.float64), normal(64, n).T):
        for call in (
            lambda x=x: ops.qkv(x, w, c, angles(ops, n, 64)),
            lambda x=x: ops.feed_forward(x, w, c),
            lambda x=x: ops.logits(x, normal(64), 1e-5, m),
            lambda x=x: ops.add_linear(x, normal(n, 64), m),
        ):
            with pytest.raises(ValueError, match="not float32 in C order"):
                call()


def test_results_do_not_depend_on_threads() -> None:
    c, x, q = config(4, 4, 64), normal(1, 256), normal(1, 6, 64)
    stop = np.array([900], np.int32)
    outs = []
    for threads in (1, 2, 2):
        ops = CpuOps(threads)
        kv = filled(ops, "f16", 1, 2, 1000, 64)
        grown = x.copy()
        ops.feed_forward(grown, layer(ops, "Q4_1", c, 256, 800), c)
        outs.append((grown, ops.attend(q, kv, 0 * stop, stop)))
    for a, b in zip(outs[0], outs[1], strict=True):
        assert np.array_equal(a, b)
    for a, b in zip(outs[1], outs[2], strict=True):
        assert np.array_equal(a, b)
