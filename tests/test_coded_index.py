"""SparQ's index in 4 bits: what it holds, what is found by it, and that a text may come and go in any way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_ops import TRUTH, assert_close, normal, rounding
from test_policies import OPS, Run, cut, distance, random_qkv
from test_sparse_ops import assert_best, int32, shares_seen

from kernels_cpu import CpuOps
from minirt.ops import CODED_BLOCK, CODED_UNIT, KV, CodedIndex
from minirt.policies import parse_policy
from minirt.reference.index import decode, decode_index, encode
from minirt.reference.sparse import keep_heavy
from minirt.stores import STORES

# store, H_q, H_kv, d
CASES = [("f16", 2, 2, 128), ("f16", 6, 2, 64), ("f32", 8, 1, 100), ("q8_0", 6, 2, 64), ("q4_0-plain", 6, 2, 64)]
BORDERS = (1, CODED_UNIT - 1, CODED_UNIT, CODED_UNIT + 1, 2 * CODED_UNIT, 5 * CODED_UNIT + 17)
SPEC = "sparq:r=4:k=12:k_index=q4"


@pytest.fixture(scope="module", params=["cpu"])
def ops(request: pytest.FixtureRequest) -> Any:
    return {"cpu": lambda: CpuOps(threads=2)}[request.param]()


def empty(device: Any, store: str, n_seq: int, n_head_kv: int, slots: int, d: int, tokens: int = 1024) -> Any:
    """A cache and its index, in blocks of so many tokens; 0: none, and no codes."""
    kv = KV(*(device.allocate(STORES[store], (n_seq, n_head_kv, slots, d)) for _ in range(2)))
    blocks = -(-slots // tokens) if tokens else 0
    codes = device.zeros((n_seq, n_head_kv, blocks, d, tokens // 8), np.dtype(np.uint32))
    scales = device.zeros((n_seq, n_head_kv, blocks, d, tokens // CODED_UNIT, 2), np.dtype(np.float16))
    return kv, CodedIndex(codes, scales, kv.k)


def keys(n: int, n_head_kv: int, d: int, seed: int = 0) -> np.ndarray:
    """Components of different sizes, around different numbers."""
    shape = np.random.RandomState(99).uniform(0.1, 3, (2, 1, n_head_kv, d)).astype(np.float32)
    return normal(n, n_head_kv, d, seed=seed) * shape[0] + 4 * shape[1]


def append(device: Any, kv: KV, index: CodedIndex, seq: int, start: int, k: np.ndarray) -> None:
    slot, seqs = np.arange(start, start + len(k), dtype=np.int32), np.full(len(k), seq, np.int32)
    device.append(kv, seqs, slot, k, k)
    device.append_index(index, None, seqs, slot, k, k)


def same(ours: CodedIndex, theirs: CodedIndex) -> bool:
    return np.array_equal(ours.codes, theirs.codes) and np.array_equal(
        np.asarray(ours.scales), np.asarray(theirs.scales), equal_nan=True
    )


# -- what it holds -----------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    """Numbers 0 ... 255 have the scale 17: code 0 up to 8, 1 from 9 on; token 16 p + w is in bits 4 p of word w."""
    words, scales = encode(np.arange(CODED_UNIT, dtype=np.float32))
    assert scales.tolist() == [17, 0]
    codes = [sum((16 * p + 128 * run + w + 8) // 17 << 4 * p for p in range(8)) for run in range(2) for w in range(16)]
    assert words.tolist() == codes
    assert decode(words, scales).tolist() == [17 * ((x + 8) // 17) for x in range(CODED_UNIT)]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_numbers_come_back(scale: float) -> None:
    """Within half a step of 16 between the least and the largest, and the rounding of these to float16."""
    x = scale * keys(CODED_UNIT, 3, 20).T
    words, scales = encode(x)
    step = (x.max(axis=-1, keepdims=True) - x.min(axis=-1, keepdims=True)) / 15
    assert (np.abs(decode(words, scales) - x) <= 0.5 * step + 2e-3 * np.abs(x).max(axis=-1, keepdims=True) + 6e-7).all()
    assert (decode(*encode(np.full((2, CODED_UNIT), -0.5 * scale, np.float32))) == np.float16(-0.5 * scale)).all()


@pytest.mark.parametrize(("store", "n_head", "n_head_kv", "d"), CASES)
def test_codes_are_those_of_the_rows(ops: Any, store: str, n_head: int, n_head_kv: int, d: int) -> None:
    """Bit for bit as the reference, however the text comes: whole, in chunks, token by token."""
    n, found = BORDERS[-1], []
    k = keys(n, n_head_kv, d)
    for device, chunk in ((TRUTH, n), (ops, n), (ops, 100), (ops, 1)):
        kv, index = empty(device, store, 2, n_head_kv, n, d)
        for seq, shift in ((0, 0), (1, 7)):
            for start in range(0, n - shift, chunk):
                append(device, kv, index, seq, start, k[shift:][start : start + chunk])
        found.append(index)
    for index in found[1:]:
        assert same(index, found[0])
    coded = decode_index(found[0], 1, n - 7)
    exact = STORES[store].decode(STORES[store].encode(k[7:])).swapaxes(0, 1)
    last = (n - 7) // CODED_UNIT * CODED_UNIT
    assert np.array_equal(coded[:, last:], exact[:, last:])
    assert 0 < np.abs(coded[:, :last] - exact[:, :last]).max() <= np.ptp(exact, axis=1).max() / 29


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite(ops: Any, bad: float) -> None:
    """It hides its unit of the component, and nothing else; rows stay within the cache."""
    n, stop, found = 2 * CODED_UNIT + 9, int32(2 * CODED_UNIT + 9), []
    k, q = keys(n, 2, 64), normal(1, 6, 64)
    k[7, 0, 32] = bad
    for device in (ops, TRUTH):
        kv, index = empty(device, "f16", 1, 2, n, 64)
        append(device, kv, index, 0, 0, k)
        found.append([index, *(a.copy() for a in device.approximate_top_k(q, index, stop, 64, 16, 0, False))])
    (ours, rows, weights), (theirs, truth, of_truth) = found
    assert same(ours, theirs)
    assert np.array_equal(rows[0, 0], truth[0, 0])
    assert CODED_UNIT <= rows[0, 0].min() <= rows[0].max() < n
    assert_close(weights, of_truth, 1e-4)


# -- what is found -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1024, 0])
@pytest.mark.parametrize(("store", "n_head", "n_head_kv", "d"), CASES)
def test_probabilities_and_the_best(ops: Any, store: str, n_head: int, n_head_kv: int, d: int, tokens: int) -> None:
    """Sequences that end at the borders of units; several blocks, or all tokens as rows."""
    lengths, found = BORDERS, []
    q, stop = 2 * normal(len(lengths), n_head, d), int32(*lengths)
    for device in (ops, TRUTH):
        kv, index = empty(device, store, len(lengths), n_head_kv, max(lengths), d, tokens)
        for seq, n in enumerate(lengths):
            append(device, kv, index, seq, 0, keys(n, n_head_kv, d, seed=seq))
        every = [device.approximate_top_k(q, index, stop, r, max(lengths), 0, False)[1].copy() for r in (1, d // 4, d)]
        chosen = [
            [a.copy() for a in device.approximate_top_k(q, index, stop, d // 4, 40, 10, mode)] for mode in (False, True)
        ]
        found.append((every, chosen))
    (ours, few), (theirs, _) = found
    for a, b in zip(ours, theirs, strict=True):
        for seq, n in enumerate(lengths):
            assert_close(a[seq, :, :n], b[seq, :, :n], 3e-5 + rounding(store))
    for sum_logits, (rows, weights) in zip((False, True), few, strict=True):
        for seq, n in enumerate(lengths):
            m = min(40, n)
            p = theirs[1][seq, :, :n]
            assert_best(rows[seq, :, :m], weights[seq, :, :m], p, n, min(10, m), sum_logits, rounding(store))


def test_without_codes_keys_are_exact(ops: Any) -> None:
    """All components of the rows: what FlexGen's scores are, too."""
    n, q, stop = 2 * CODED_UNIT + 9, normal(1, 6, 64), int32(2 * CODED_UNIT + 9)
    kv, index = empty(ops, "f16", 1, 2, n, 64, tokens=0)
    append(ops, kv, index, 0, 0, keys(n, 2, 64))
    few = [a.copy() for a in ops.approximate_top_k(q, index, stop, 64, 20, 0, False)]
    for a, b in zip(few, ops.exact_top_k(q, kv, stop, 20), strict=True):
        assert_close(a, b, 1e-5)


def test_heavy_rows(ops: Any) -> None:
    """Found by codes: the best, without those that weigh too little."""
    kv, index = empty(ops, "q8_0", 2, 2, 700, 64)
    for seq, n in enumerate((700, 90)):
        append(ops, kv, index, seq, 0, keys(n, 2, 64, seed=seq))
    q, stop, counts = 2 * normal(2, 6, 64), int32(700, 90), np.zeros((2, 2, 3), np.int32)
    every = [a.copy() for a in ops.approximate_top_k(q, index, stop, 16, 150, 5, False)]
    rows, weights = ops.approximate_top_k(q, index, stop, 16, 150, 5, False, 0.003, counts)
    for b, n in enumerate(stop.tolist()):
        for h in range(2):
            heads = slice(3 * h, 3 * h + 3)
            m = keep_heavy(every[0][b, h], every[1][b, heads], n, 5, 0.003, shares_seen(q[b], 2, 16)[h])
            assert counts[b, h].tolist() == ([m, m, 1] if n > 150 else [n, 0, 0])
            assert 5 < m < 150
            assert np.array_equal(rows[b, h, :m], every[0][b, h, :m])
            assert np.array_equal(weights[b, heads, :m], every[1][b, heads, :m])


def test_blocks_of_any_size(ops: Any) -> None:
    """Parts of the text begin and end anywhere in them."""
    n, found = 9000, []
    for tokens in (9216, 512, 1536, 3072):
        kv, index = empty(ops, "f16", 1, 2, n, 64, tokens)
        append(ops, kv, index, 0, 0, keys(n, 2, 64))
        q, stop = normal(1, 6, 64), int32(n)
        found.append([a.copy() for a in ops.approximate_top_k(q, index, stop, 7, n, 9, False)])
    truth, theirs = empty(TRUTH, "f16", 1, 2, n, 64)
    append(TRUTH, truth, theirs, 0, 0, keys(n, 2, 64))
    assert_close(found[0][1], TRUTH.approximate_top_k(q, theirs, stop, 7, n, 9, False)[1], 1e-5)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert np.array_equal(a, b)


def test_a_short_run_of_slots(ops: Any) -> None:
    """A cache of one unit, filled: nothing is written behind it."""
    kv, index = empty(ops, "f16", 1, 1, CODED_UNIT, 64, tokens=512)
    append(ops, kv, index, 0, 0, keys(CODED_UNIT, 1, 64))
    q, stop = normal(1, 3, 64), int32(CODED_UNIT)
    ops.approximate_top_k(q, index, stop, 8, 4, 0, False)
    logits = ops._scratch["logits of slots"]
    logits[3 * CODED_UNIT :] = 77
    ops.approximate_top_k(q, index, stop, 8, 4, 0, False)
    assert (logits[3 * CODED_UNIT :] == 77).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_results_do_not_depend_on_threads(threads: int) -> None:
    found = []
    for device in (CpuOps(1), CpuOps(threads)):
        kv, index = empty(device, "f16", 1, 2, 3000, 64)
        append(device, kv, index, 0, 0, keys(3000, 2, 64))
        found.append(
            [a.copy() for a in device.approximate_top_k(normal(1, 6, 64), index, int32(3000), 16, 99, 9, False)]
        )
    for a, b in zip(*found, strict=True):
        assert np.array_equal(a, b)


def test_what_does_not_fit_is_refused(ops: Any) -> None:
    _, index = empty(ops, "f16", 2, 2, 600, 64, tokens=512)
    q, k, one = normal(2, 4, 64), normal(1, 2, 64), int32(1)
    broken = [
        index._replace(codes=index.codes[:1]),
        index._replace(codes=index.codes[:, :, :1]),
        index._replace(codes=index.codes[..., :32]),
        index._replace(codes=index.codes.view(np.float32)),
        index._replace(codes=index.codes[:, ::-1]),
        index._replace(scales=index.scales[:, :, :, :, :1]),
        index._replace(scales=index.scales.astype(np.float32)),
        index._replace(scales=index.scales[:, :, :, ::-1]),
        index._replace(k=index.k[:, :1]),
        index._replace(k=np.zeros_like(index.k, shape=(2, 2, 1300, index.k.shape[3]))),
    ]
    for bad in broken:
        with pytest.raises(ValueError, match=r"."):
            ops.approximate_top_k(q, bad, int32(5, 5), 8, 8, 0, False)
        with pytest.raises(ValueError, match=r"."):
            ops.append_index(bad, None, one, one, k, k)
    for slot in (-1, 600):
        with pytest.raises(ValueError, match=r"cannot take slots"):
            ops.append_index(index, None, one, int32(slot), k, k)
    for other, stop in ((q[:, :3], (5, 5)), (normal(2, 4, 32), (5, 5)), (q[:1], (5, 5)), (q, (601, 5)), (q, (-1, 5))):
        with pytest.raises(ValueError, match=r"."):
            ops.approximate_top_k(other, index, int32(*stop), 8, 8, 0, False)


# -- the policy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", OPS)
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_a_text_may_come_and_go(device: str, kv: str) -> None:
    """Back into the middle of a unit that is coded, to its border, and to the beginning: as if that was never there."""
    heads, n = (6, 2, 64), 2 * CODED_UNIT + 40
    qkv, other = (random_qkv(heads, n, n_layer=1, seed=seed) for seed in (0, 1))
    fresh, used = (Run(SPEC, OPS[device], heads, n_ctx=n, n_layer=1, kv=kv) for _ in range(2))
    fresh.prompt(cut(qkv, 0, n - 20))
    for back in (CODED_UNIT + 100, 2 * CODED_UNIT, 0):
        used.rewind(min(int(used.cache.n_seen[0]), back))
        for text, stop in ((qkv, back), (other, n)):
            if stop > used.cache.n_seen[0]:
                used.prompt(cut(text, int(used.cache.n_seen[0]), stop), chunk=99)
        assert used.rewind(back) == back
    used.prompt(cut(qkv, 0, CODED_UNIT - 2))
    used.steps(cut(qkv, CODED_UNIT - 2, CODED_UNIT + 3))
    used.prompt(cut(qkv, CODED_UNIT + 3, n - 20))
    for name in ("codes", "scales"):
        ours, theirs = (np.asarray(run.cache.side[name][0]).view(np.uint16) for run in (used, fresh))
        assert np.array_equal(ours, theirs), name
    assert np.array_equal(used.steps(cut(qkv, n - 20, n)), fresh.steps(cut(qkv, n - 20, n)))


@pytest.mark.parametrize("device", OPS)
def test_sequences_of_a_batch_and_one_that_moves(device: str) -> None:
    heads, lengths = (6, 2, 64), (3, CODED_UNIT - 5, 2 * CODED_UNIT - 8)
    n = max(lengths) + 20
    texts = [random_qkv(heads, n, n_layer=1, seed=length) for length in lengths]
    batch = Run(SPEC, OPS[device], heads, n_ctx=n, n_layer=1, n_seq=3, kv="f16")
    alone = [Run(SPEC, OPS[device], heads, n_ctx=n, n_layer=1, kv="f16") for _ in lengths]
    for seq, (length, text) in enumerate(zip(lengths, texts, strict=True)):
        batch.prompt(cut(text, 0, length), seq)
        alone[seq].prompt(cut(text, 0, length))
    for s in range(10):
        ours = batch.step(
            [
                np.concatenate([t[i][:, m + s : m + s + 1] for m, t in zip(lengths, texts, strict=True)], 1)
                for i in range(3)
            ]
        )
        for seq, (length, text) in enumerate(zip(lengths, texts, strict=True)):
            assert distance(ours[:, seq], alone[seq].step(cut(text, length + s, length + s + 1))[:, 0]) <= 1e-5
    batch.cache.move(2, 0)
    batch.cache = batch.cache.part(0, 1)
    rest = cut(texts[2], lengths[2] + 10, n)
    assert distance(batch.steps(rest), alone[2].steps(rest)) <= 1e-6


@pytest.mark.parametrize("heads", [(2, 2, 128), (6, 2, 64)], ids=str)
@pytest.mark.parametrize("device", OPS)
def test_a_full_budget_is_dense(device: str, heads: tuple[int, int, int]) -> None:
    """Read by codes, what is chosen is all: alpha is 1."""
    n, prompt = 2 * CODED_UNIT + 30, 2 * CODED_UNIT
    qkv = random_qkv(heads, n, n_layer=1)
    full, dense = (
        Run(spec, OPS[device], heads, n_ctx=n, n_layer=1, kv="f16")
        for spec in (f"sparq:r=4:k={n - 10}:k_index=q4", "dense")
    )
    for run in (full, dense):
        run.prompt(cut(qkv, 0, prompt))
    assert distance(full.steps(cut(qkv, prompt, n - 10)), dense.steps(cut(qkv, prompt, n - 10))) <= 2e-6
    few, exact = full.step(cut(qkv, n - 10, n - 9)), dense.step(cut(qkv, n - 10, n - 9))  # all but one
    assert 0 < distance(few, exact) <= 0.05


def test_memory_and_bytes() -> None:
    """At most 13 % of a float16 cache; what a step must read, from the numbers of units and rows."""
    config: Any = SimpleNamespace(n_layer=3, n_head=9, n_head_kv=3, head_dim=64, sliding_window=0)
    f16, dense = STORES["f16"], parse_policy("dense")
    policy = parse_policy("sparq:r=16:k=128:k_index=q4")
    for n_ctx in (512, 2048, 8192, 8193, 32768, 100_000, 131_072):
        plan = policy.plan(config, n_ctx, f16, f16)
        cache = dense.plan(config, n_ctx, f16, f16).nbytes(config)
        assert 1.128 * (n_ctx - CODED_UNIT) / n_ctx <= plan.nbytes(config) / cache <= 1.13
        assert plan.side["codes"][0].shape[3] <= CODED_BLOCK // 8
    row = 3 * 2 * 64 * 2
    assert policy.bytes_read(config, plan, 128) == 3 * 128 * row
    for n in (129, CODED_UNIT - 1, CODED_UNIT, 8192 + 5):
        coded = n // CODED_UNIT * CODED_UNIT
        index = 3 * (16 * coded // 2 + 16 * 4 * coded // CODED_UNIT) + (n - coded) * row // 2
        assert policy.bytes_read(config, plan, n) == 3 * (index + 128 * row)
    half = parse_policy("sparq:r=16:k=128").bytes_read(config, parse_policy("sparq").plan(config, 8192, f16, f16), 8192)
    once = parse_policy("sparq:r=16:k=128:k_index=none")
    plan_of_one = once.plan(config, 8192, f16, f16)
    assert plan_of_one.nbytes(config) == dense.plan(config, 8192, f16, f16).nbytes(config)
    assert once.bytes_read(config, plan_of_one, 8192) == 3 * (8192 * row // 2 + 128 * row)
    quarter = policy.bytes_read(config, plan, 8192) - 3 * 128 * row
    assert quarter / (half - 3 * 128 * row) == pytest.approx(0.25 + 1 / 128)


@pytest.mark.parametrize("device", OPS)
def test_bytes_filled(device: str) -> None:
    run = Run(SPEC, OPS[device], (4, 2, 32), n_ctx=2 * CODED_UNIT + 40, n_layer=1, kv="f16")
    run.prompt(random_qkv((4, 2, 32), 2 * CODED_UNIT + 40, n_layer=1))
    assert run.cache.nbytes(run.config, 0) == run.cache.plan.nbytes(run.config)
