"""How K and V lie in memory: the blocks of llama.cpp, rotated or not, under every op and every policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_eviction_ops as eviction
import test_ops as attention
import test_sparse_ops as sparse
from conftest import Cli, only_line
from test_ops import INTEGERS, TRUTH, assert_close, codes_of, normal
from test_policies import OPS, POLICY_TABLE, Run, cut, distance, random_qkv

from kernels_cpu import CpuOps
from kernels_cpu.activations import LARGEST
from minirt.errors import UsageError
from minirt.ops import KV
from minirt.policies.evicting import Evicting
from minirt.reference.attention import store_of
from minirt.stores import STORES, get_stores, row_numbers, stores_text
from minirt.stores.hadamard import rotate, rotation_size

BLOCKS = [name for name, store in STORES.items() if store.length > 1]
HEADS = [(9, 3, 64), (8, 2, 96), (4, 1, 128), (2, 2, 32)]
# Each type of codes meets each shape, rotated or plain; the kernels of each pair are compiled for it.
CASES = [
    *((name, heads) for name in ("q8_0", "q4_0-plain") for heads in HEADS[:2]),
    *((name, heads) for name in ("q4_0", "q8_0-plain") for heads in HEADS[2:]),
]
TYPES = {"q8_0-plain": "Q8_0", "q4_0-plain": "Q4_0"}  # as gguf calls them


@pytest.fixture(scope="module", params=["cpu"])
def ops(request: pytest.FixtureRequest) -> Any:
    return {"cpu": lambda: CpuOps(threads=2)}[request.param]()


def hard_rows(n: int, d: int) -> np.ndarray:
    """Of all sizes; zeros, ties, numbers too small for a scale and too large for one, none at all."""
    rows = normal(n, d) * 10.0 ** np.random.RandomState(1).uniform(-9, 4, (n, 1))
    rows[0], rows[1, 3], rows[2], rows[3, 5], rows[4, 7], rows[5, 9] = 0, -rows[1].max() * 2, 1e-30, 1e9, np.inf, np.nan
    rows[1, 4], rows[6] = -rows[1, 3], np.round(rows[6] / np.abs(rows[6]).max() * 127) / 2
    return rows.astype(np.float32)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("d", [32, 64, 96, 128])
def test_blocks_are_those_of_gguf(name: str, d: int) -> None:
    gguf = pytest.importorskip("gguf")  # here: tests that a bare machine runs import this file
    kind = gguf.GGMLQuantizationType[TYPES[name]]
    store, rows = STORES[name], hard_rows(400, d)
    found, finite = store.encode(rows), np.r_[0:3, 6:400]
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(rows[finite], kind)
    assert np.array_equal(found[finite].view(np.uint8).reshape(len(finite), -1), expected)
    assert np.array_equal(store.decode(found[finite]), gguf.quants.dequantize(expected, kind))
    assert found.nbytes == 400 * store.row_bytes(d)


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_not_finite_shows(name: str) -> None:
    with np.errstate(all="ignore"):
        decoded = STORES[name].decode(STORES[name].encode(hard_rows(400, 64)))
    assert not np.isfinite(decoded[3:6]).all(axis=1).any()
    assert np.isfinite(decoded[6:]).all()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("d", [32, 64, 96, 128, 160, 256])
def test_kernels_make_the_same_blocks(ops: Any, name: str, d: int) -> None:
    """Bit by bit; what a block with numbers that are not finite says of the others does not matter."""
    rows, slots, arrays = hard_rows(60, d)[:, None], np.arange(60, dtype=np.int32), []
    with np.errstate(all="ignore"):
        for device in (ops, TRUTH):
            kv = KV(*(device.allocate(STORES[name], (1, 1, 60, d)) for _ in range(2)))
            device.append(kv, 0 * slots, slots, rows, rows[::-1])
            arrays.append([device.to_host(a).view(np.uint8).reshape(60, -1) for a in kv])
    finite = np.r_[0:3, 6:60]
    for i in range(2):
        ours, theirs = arrays[0][i][:: 1 - 2 * i], arrays[1][i][:: 1 - 2 * i]
        assert np.array_equal(ours[finite], theirs[finite])


def test_the_rotation() -> None:
    """Orthogonal, its own inverse, and Sylvester's."""
    for d in (32, 64, 96, 128):
        x, size = normal(7, d), rotation_size(d)
        assert d % size == 0
        assert_close(rotate(rotate(x, size), size), x)
        assert np.allclose(np.linalg.norm(rotate(x, size), axis=1), np.linalg.norm(x, axis=1))
    assert np.allclose(
        rotate(np.eye(4, dtype=np.float32), 4) * 2, [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    )


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_the_rotation_helps_where_components_stand_out(name: str) -> None:
    rows = normal(500, 64)
    rows[:, 5] += 30
    errors = [np.linalg.norm(STORES[s].decode(STORES[s].encode(rows)) - rows) for s in (name, f"{name}-plain")]
    assert errors[0] < 0.5 * errors[1]


# -- ops: as the tests of each say, for heads that fit -----------------------------------------------------------------


@pytest.mark.parametrize(("name", "heads"), CASES, ids=str)
def test_attention(ops: Any, name: str, heads: tuple[int, int, int]) -> None:
    for slots in (1, 2, 17, 63, 64, 65, 300):
        attention.test_attend(ops, name, *heads, slots)
    for slots in (1, 17, 300):
        attention.test_attend_to_far_slots(ops, name, *heads, slots)
    attention.test_attend_chunk(ops, name, *heads, 5, 70, 20)
    attention.test_attend_chunk(ops, name, *heads, 0, 33, 0)
    for slots in (1, 100):
        eviction.test_attend_weights(ops, name, *heads, slots)
    eviction.test_column_sums(ops, name, *heads, 5, 70)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("heads", HEADS[1:3], ids=str)
def test_only_queries_and_weights_are_rounded(ops: Any, name: str, heads: tuple[int, int, int]) -> None:
    """With queries as their integers stand for them, scores are exact; a weight is off by half a unit at most."""
    n_head, n_head_kv, d = heads
    for n in (*range(1, 20), 128, 300):
        q = normal(n_head, d, seed=n) * 10.0 ** np.random.RandomState(n).uniform(-2, 0.5, (n_head, 1))
        q, stop, found = codes_of(q.astype(np.float32))[1][None], np.full(1, n, np.int32), []
        for device in (ops, TRUTH):
            kv = attention.filled(device, name, 1, n_head_kv, n, d)
            weights = device.exact_top_k(q, kv, stop, n)[1]
            found.append([device.to_host(a).copy() for a in (weights, device.attend(q, kv, 0 * stop, stop))])
        (ours, out), (theirs, truth) = found
        assert_close(ours, theirs, 5e-6)
        unit = theirs.max(axis=2) * np.abs(STORES[name].decode(kv.v)).max() / LARGEST
        assert (np.abs(out - truth).max(axis=2) <= n * unit / 2 + 2e-6).all()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9])
def test_damage_shows_in_attention(ops: Any, name: str, bad: float) -> None:
    """A block whose scale is NaN or infinite, of a key or of a value, wherever it lies; and only where it is seen."""
    for part in ("k", "v"):
        for n, slot in ((1, 0), (20, 17), (70, 3), (200, 199)):
            rows = {"k": normal(n, 2, 64, seed=1), "v": normal(n, 2, 64, seed=2)}
            rows[part][slot, 1, 40] = bad
            kv, slots = KV(*(ops.allocate(STORES[name], (1, 2, n, 64)) for _ in range(2))), np.arange(n, dtype=np.int32)
            ops.append(kv, 0 * slots, slots, rows["k"], rows["v"])
            stop, q = np.full(1, n, np.int32), normal(1, 6, 64)
            every = np.tile(slots, (1, 2, 1))
            for out in (ops.attend(q, kv, 0 * stop, stop), ops.attend_rows(q, kv, every, stop, None, None)):
                finite = np.isfinite(out).all(axis=2)
                assert finite.tolist() == [[True] * 3 + [False] * 3], (part, n)


@pytest.mark.parametrize(("name", "heads"), CASES, ids=str)
def test_eviction(ops: Any, name: str, heads: tuple[int, int, int]) -> None:
    eviction.test_overwrite(ops, name, *heads[1:])
    eviction.test_copy_rows(ops, name, *heads[1:])
    for rule in eviction.RULES:
        eviction.test_merge(ops, rule, name, *heads[1:], slots=65)
        eviction.test_merge_evicted(ops, rule, name, *heads[1:], n=40, m=5, head=0)


@pytest.mark.parametrize(("name", "heads"), CASES, ids=str)
def test_sparse_reading(ops: Any, name: str, heads: tuple[int, int, int]) -> None:
    sparse.test_means(ops, name, *heads)
    sparse.test_the_best(ops, name, *heads, stop=(700, 64, 0), k=33, local=8)
    sparse.test_attention_to_rows(ops, name, *heads, k=64)


@pytest.mark.parametrize("kv", ["q8_0/f16", "f32/q4_0", "q4_0/q8_0-plain"])
def test_keys_and_values_of_different_types(ops: Any, kv: str) -> None:
    stores, n, found = get_stores(kv), 200, []
    assert stores_text(*stores) == kv
    for device in (ops, TRUTH):
        cache = KV(*(device.allocate(store, (1, 2, n, 64)) for store in stores))
        assert [row_numbers(array) for array in cache] == [64, 64]
        slots = np.arange(n, dtype=np.int32)
        device.append(cache, 0 * slots, slots, normal(n, 2, 64, seed=1), normal(n, 2, 64, seed=2))
        first, stop, q = np.zeros(1, np.int32), np.full(1, n, np.int32), normal(1, 6, 64)
        mean = normal(1, 2, 64, seed=5)
        rows, weights = (device.to_host(a).copy() for a in device.exact_top_k(q, cache, stop, 50))
        outs = (
            device.attend(q, cache, first, stop),
            device.attend_chunk(normal(9, 6, 64), cache, 0, n - 9),
            device.attend_rows(q, cache, rows, stop, weights, mean),
            device.add_rows(cache, rows, stop, weights, 64),
        )
        found.append([device.to_host(out).copy() for out in outs])
    for ours, truth in zip(*found, strict=True):
        assert_close(ours, truth, 2e-6 + INTEGERS)


def test_the_reference_is_exact_but_for_what_is_stored() -> None:
    """Attention to a rotated cache is attention to the rows it gives back."""
    k, v, q = normal(40, 2, 64, seed=1), normal(40, 2, 64, seed=2), normal(1, 6, 64)
    slots, outs = np.arange(40, dtype=np.int32), []
    kv = KV(*(TRUTH.allocate(STORES["q4_0"], (1, 2, 40, 64)) for _ in range(2)))
    TRUTH.append(kv, 0 * slots, slots, k, v)
    plain = KV(*(store_of(a).decode(a) for a in kv))
    for cache in (kv, plain):
        outs.append(TRUTH.attend(q, cache, np.zeros(1, np.int32), np.full(1, 40, np.int32)))
    assert_close(*outs)


# -- policies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["q8_0", "q4_0"])
@pytest.mark.parametrize("device", OPS)
@pytest.mark.parametrize("full", sorted(set(POLICY_TABLE.values())))
def test_a_full_budget_is_dense(full: str, device: str, kv: str) -> None:
    """Of the same cache: what a prompt's own rule reads before it is stored differs, so only steps are compared."""
    heads, n, prompt = (6, 2, 64), 64, 40
    qkv = random_qkv(heads, n)
    ours, truth = (Run(spec, OPS[device], heads, n_ctx=n, kv=kv) for spec in (full.format(n=n), "dense"))
    for run in (ours, truth):
        run.prompt(cut(qkv, 0, prompt))
    a, b = (run.steps(cut(qkv, prompt, n)) for run in (ours, truth))
    assert distance(a, b) <= (2e-6 if device == "reference" else INTEGERS)


@pytest.mark.parametrize("kv", ["q8_0", "q4_0"])
@pytest.mark.parametrize("spec", POLICY_TABLE)
def test_the_cpu_does_as_the_reference(spec: str, kv: str) -> None:
    """A prompt and 80 steps: outputs, and which tokens are held. A merged row may be rounded to a neighbour.

    Scores are off by the rounding of queries, so that of two rows as good as equal topk may read the other, in a step.
    """
    heads, error = (6, 2, 32), 1e-2 if "d2o" in spec else INTEGERS
    qkv = random_qkv(heads, 120, n_layer=2, seed=1)
    ours, truth = (Run(spec, OPS[device], heads, n_layer=2, kv=kv) for device in ("cpu", "reference"))
    assert distance(ours.prompt(cut(qkv, 0, 40)), truth.prompt(cut(qkv, 0, 40))) <= error
    apart: list[int] = []
    for t in range(40, 120):
        a, b = (run.step(cut(qkv, t, t + 1)) for run in (ours, truth))
        apart += [t] if distance(a, b) > error else []
    assert len(apart) <= (1 if "topk" in spec else 0), apart
    if isinstance(truth.policy, Evicting) and "d2o" not in spec:
        for layer in range(2):
            assert ours.positions(layer) == truth.positions(layer)


# -- the seam ----------------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert get_stores("q8_0") == (STORES["q8_0"],) * 2
    assert stores_text(*get_stores("q8_0/q8_0")) == "q8_0"
    for text in ("q3_0", "f16/", "/f16", "f16/f16/f16", ""):
        with pytest.raises(UsageError, match=r"unknown KV type .* \(one of: f32, f16, q8_0, q4_0, "):
            get_stores(text)


def test_heads_that_do_not_fit(cli: Cli, tiny: Path) -> None:
    for size in (16, 80):
        with pytest.raises(UsageError, match=f"--kv q8_0 takes heads of a multiple of 32 numbers.* have {size}"):
            STORES["q8_0"].check(size)
    for policy in ("dense", "topk", "sparq", "tova"):
        for flags in (("--kv", "q4_0"), ("--kv-k", "q4_0"), ("--kv-v", "q4_0-plain")):
            result = cli("run", tiny, "-p", "x", "--device", "reference", "--policy", policy, *flags)
            assert (result.exit_code, result.stdout) == (2, "")
            assert "takes heads of a multiple of 32 numbers, this model's have 16" in only_line(result.stderr)


def test_flags_for_keys_and_values(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("one and the other and the rest of them, " * 20)
    for flags, kv in (
        (("--kv", "f32"), "f32"),
        (("--kv-v", "f32"), "f16/f32"),
        (("--kv", "f32", "--kv-k", "f16"), "f16/f32"),
        (("--kv", "f16/f32", "--kv-v", "f16"), "f16"),
    ):
        result = cli("perplexity", tiny, "-f", text, "-c", 64, "--chunks", 1, "--json", "--device", "reference", *flags)
        assert json.loads(result.stdout)["kv"] == kv
    result = cli("run", tiny, "-p", "x", "--kv-v", "q3")
    assert result.exit_code == 2
    assert "unknown KV type 'q3' (one of: f32, f16, q8_0, q4_0," in only_line(result.stderr)
