"""Latents in the place of keys and values: how they are stored, and every op and policy on them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from test_dequantize import random_tensor
from test_ops import assert_close, normal
from test_policies import OPS, POLICY_TABLE, Run, cut, distance, random_qkv

from kernels_cpu import CpuOps
from kernels_cpu.tile_registers import HAS_TILES
from minirt.cache import allocate_cache
from minirt.config import PaluConfig
from minirt.ops import KV
from minirt.policies.evicting import Evicting
from minirt.reference import ReferenceOps
from minirt.reference.attention import decoded
from minirt.rope import Rope
from minirt.stores import LATENT_BITS, LatentStore, get_stores

NAMES = list(LATENT_BITS)
TRUTH = ReferenceOps()
REBUILT = 3e-5 if HAS_TILES else 1e-5  # scores are large here: keys are exact to 2^-18, or to 2^-24


class Shape(NamedTuple):
    n_head: int
    n_head_kv: int
    d: int
    group_size: int
    k_rank: int
    v_rank: int
    interleaved: bool = True
    rope_dim: int = 0  # 0: d
    extras: bool = False  # biases, and norms of keys


SHAPES = [
    Shape(3, 3, 64, 1, 32, 64),
    Shape(9, 3, 64, 3, 96, 192),
    Shape(8, 2, 80, 1, 80, 32, False, 40, True),
    Shape(8, 2, 128, 2, 96, 224, False, extras=True),
    Shape(8, 1, 64, 1, 32, 64, extras=True),
    Shape(4, 4, 20, 2, 40, 32, True, 12),
    Shape(6, 2, 100, 2, 64, 200, False),
]


def model(s: Shape, n_layer: int = 1) -> Any:
    palu = PaluConfig(s.group_size, (s.k_rank,) * n_layer, (s.v_rank,) * n_layer, "f16", False)
    return SimpleNamespace(
        n_layer=n_layer, n_head=s.n_head, n_head_kv=s.n_head_kv, head_dim=s.d, rms_eps=1e-5, sliding_window=0, palu=palu
    )


def rope_of(s: Shape) -> Rope:
    pairs = (s.rope_dim or s.d) // 2
    return Rope(1e4 ** (-np.arange(pairs) / pairs), 1.25, s.interleaved)


def factors(ops: Any, s: Shape, rope: Rope, layer: int = 0) -> tuple[Any, Any]:
    width, c = s.n_head_kv * s.d, model(s)
    k, v = (
        random_tensor("F16" if layer % 2 else "F32", width, rank, seed=7 * layer + i)
        for i, rank in enumerate((s.k_rank, s.v_rank))
    )
    biases = [ops.vector(normal(width, seed=i)) if s.extras else None for i in (3, 4)]
    norm = ops.vector(normal(s.d, seed=5)) if s.extras else None
    return ops.factor(k, c, biases[0], norm, rope), ops.factor(v, c, biases[1])


def latents(s: Shape, n: int, pos: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of keys, with positions, and of values."""
    groups = s.n_head_kv // s.group_size
    k, v = normal(n, groups, s.k_rank + 1, seed=seed), normal(n, groups, s.v_rank, seed=seed + 1)
    k[..., -1] = pos[:, None]
    return k, v


def filled(ops: Any, s: Shape, name: str, slots: int, n_seq: int = 2) -> KV:
    """A cache with all slots in use, at positions in no order."""
    both = zip(get_stores(name, model(s).palu), factors(ops, s, rope_of(s)), strict=True)
    shape = n_seq, s.n_head_kv // s.group_size, slots
    kv = KV(*(ops.allocate(store, (*shape, store.numbers(model(s), 0)), factor) for store, factor in both))
    for seq in range(n_seq):
        pos = np.random.RandomState(seq).permutation(3 * slots)[:slots]
        each, slot = np.full(slots, seq, np.int32), np.arange(slots, dtype=np.int32)
        ops.append(kv, each, slot, *latents(s, slots, pos, seed=seq))
    return kv


# -- rows --------------------------------------------------------------------------------------------------------------


def hard_rows(n: int, rank: int) -> np.ndarray:
    """Of all sizes, positions last; constant, tied, of large mean, tiny, too large, and not finite."""
    rows = normal(n, 1, rank + 1) * 10.0 ** np.random.RandomState(1).uniform(-4, 3, (n, 1, 1))
    rows[0], rows[1], rows[2], rows[3], rows[4] = 0, -0.0, 3.25, rows[3].round(), rows[4] + 100
    rows[5] *= 1e-9
    rows[6, 0, 3], rows[7, 0, 5], rows[8, 0, 0], rows[9] = np.inf, np.nan, -np.inf, rows[9] * 1e9
    rows[10], rows[11] = (
        rows[i] * np.float32(most) / np.abs(rows[i, 0, :-1]).max() for i, most in ((10, 7e4), (11, 6e4))
    )
    rows[:, 0, -1] = np.random.RandomState(2).randint(0, 9999, n)
    return rows.astype(np.float32)


FINITE = np.r_[0:6, 11:60]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank", [32, 64, 96, 80, 100, 9])
def test_round_trip(name: str, rank: int) -> None:
    k_store, v_store = (LatentStore(name, np.dtype(np.uint8), LATENT_BITS[name], keys) for keys in (True, False))
    rows = hard_rows(60, rank)
    rows[12, 0, -1] = 1 << 24
    blocks, head = -(-rank // 32), 0 if name == "latent-f16" else 4
    coded = k_store.encode(rows)
    assert coded.shape == (60, 1, head + blocks * 4 * LATENT_BITS[name] + 4)
    assert np.array_equal(coded[..., :-4], v_store.encode(rows[..., :-1]))
    assert k_store.row_bytes(rank + 1) == coded.shape[-1] == v_store.row_bytes(rank) + 4
    assert np.array_equal(k_store.positions(coded), rows[..., -1].astype(np.int32))
    x, found = rows[FINITE, 0, :-1], k_store.decode(coded)[..., :rank]
    assert not np.isfinite(found[6:11]).all(axis=2).any()
    span = x.max(axis=1) - x.min(axis=1)
    half = np.abs(x).max(axis=1) * 2.0**-11 + 2.0**-24
    step = 0 if name == "latent-f16" else span / (2 ** LATENT_BITS[name] - 1)
    # Half a step; scale and minimum rounded to float16, of which the scale counts as often as the largest code.
    assert (np.abs(found[FINITE, 0] - x).max(axis=1) <= step / 2 + half + span * 2.0**-11 + 16 * 2.0**-25).all()
    assert (found[0] == 0).all()
    assert (found[2] == 3.25).all()


def test_three_bits_lie_as_documented() -> None:
    store = LatentStore("latent-q3", np.dtype(np.uint8), 3, False)
    codes = np.arange(32) % 8
    row = store.encode(codes.astype(np.float32))
    assert row[:4].view(np.float16).tolist() == [1, 0]
    for i, code in enumerate(codes.tolist()):
        low, high = row[4 + i % 8] >> 2 * (i // 8) & 3, row[12 + i // 8] >> i % 8 & 1
        assert low + 4 * high == code
    four = LatentStore("latent-q4", np.dtype(np.uint8), 4, False).encode(np.arange(32, dtype=np.float32) % 16)
    assert four[4:].tolist() == [17 * i for i in range(16)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank", [32, 96, 80, 100])
def test_kernels_make_the_same_rows(name: str, rank: int) -> None:
    """Bit by bit; what a row with numbers that are not finite says of the others does not matter."""
    s = Shape(1, 1, 100, 1, rank, rank)
    rows, slots, found = hard_rows(60, rank), np.arange(60, dtype=np.int32), []
    with np.errstate(all="ignore"):
        for ops in OPS.values():
            both = zip(get_stores(name, model(s).palu), factors(ops, s, rope_of(s)), strict=True)
            kv = KV(*(ops.allocate(st, (1, 1, 60, st.numbers(model(s), 0)), factor) for st, factor in both))
            ops.append(kv, 0 * slots, slots, rows, rows[..., :-1])
            found.append([array.rows.copy() for array in kv])
            assert not np.isfinite(kv.k.store.decode(kv.k.rows)[0, 0, 6:11, :rank]).all(axis=1).any()
    for ours, truth in zip(*found, strict=True):
        assert np.array_equal(ours[0, 0, FINITE], truth[0, 0, FINITE])


# -- ops ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("s", SHAPES, ids=str)
def test_attention(s: Shape, name: str) -> None:
    for slots in (1, 63, 64, 65, 300):
        found = []
        first, stop = np.array([0, slots // 3], np.int32), np.array([slots, slots], np.int32)
        q, groups = normal(2, s.n_head, s.d, seed=9), s.n_head_kv // s.group_size
        for ops in (OPS["cpu"], TRUTH):
            kv, weights = filled(ops, s, name, slots), np.full((2, groups, slots), 0.5, np.float32)
            shared = weights[:, :1].copy()
            outs = [
                ops.attend(q, kv, first, stop).copy(),
                ops.attend(q, kv, stop, stop).copy(),
                ops.attend_weights(q, kv, stop, weights, True).copy(),
                ops.attend_weights(q, kv, stop, shared, False).copy(),
            ]
            found.append([*outs, weights, shared])
        for i, (ours, truth) in enumerate(zip(*found, strict=True)):
            assert_close(ours, truth, REBUILT)
            assert i != 1 or not ours.any()  # of nothing


@pytest.mark.parametrize("s", SHAPES, ids=str)
def test_prompts(s: Shape) -> None:
    for start, n, window in ((0, 5, 0), (60, 70, 0), (33, 40, 20)):
        q, found = normal(n, s.n_head, s.d, seed=9), []
        for ops in (OPS["cpu"], TRUTH):
            kv, lse = filled(ops, s, "latent-q4", start + n + 3), np.zeros((n, s.n_head), np.float32)
            out = ops.attend_chunk(q, kv, 1, start, window, lse=lse).copy()
            none = ops.attend_chunk(q, kv, 1, -3, stop=0).copy()
            sums = np.ones((s.n_head_kv // s.group_size, start + n), np.float32)
            if not window:
                ops.add_column_sums(q, kv, 1, start, lse, sums)
            found.append((out, lse, sums, none))
        for ours, truth in zip(*found, strict=True):
            assert_close(ours, truth, REBUILT)


def test_results_do_not_depend_on_threads() -> None:
    s, outs = SHAPES[1], []
    q, stop = normal(2, s.n_head, s.d), np.array([700, 129], np.int32)
    for threads in (1, 2):
        ops = CpuOps(threads)
        kv = filled(ops, s, "latent-f16", 700)
        outs += [[ops.attend(q, kv, 0 * stop, stop).copy(), ops.attend_chunk(q, kv, 0, 650).copy()]]
    for ours, theirs in zip(*outs, strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("device", OPS)
def test_rows_take_their_positions_along(device: str) -> None:
    """Copied, overwritten and moved rows are attended as before."""
    ops, s, n = OPS[device], SHAPES[1], 70
    q, stop = normal(1, s.n_head, s.d), np.full(1, n, np.int32)
    kv = filled(ops, s, "latent-q3", n, 1)
    before = ops.attend(q, kv, 0 * stop, stop).copy()
    other, order = filled(ops, s, "latent-q3", n, 1), np.random.RandomState(0).permutation(n).astype(np.int32)
    ops.copy_rows(kv, ops.indices(order[None]), other, 0)
    assert_close(ops.attend(q, other, 0 * stop, stop), before, 1e-6)
    k, v = latents(s, 1, np.array([5000]), seed=77)
    positions = np.zeros((1, 1, n), np.int32)
    ops.overwrite(other, np.array([[3]], np.int32), k, v, positions, np.array([5000], np.int32))
    ops.append(kv, np.zeros(1, np.int32), order[3:4], k, v)
    assert positions[0, 0, 3] == 5000
    assert_close(ops.attend(q, other, 0 * stop, stop), ops.attend(q, kv, 0 * stop, stop).copy(), 1e-6)


@pytest.mark.parametrize("device", OPS)
def test_what_does_not_fit_is_refused(device: str) -> None:
    ops, s = OPS[device], SHAPES[1]
    kv, (k, v) = filled(ops, s, "latent-f16", 5), latents(s, 1, np.array([0]))
    one = np.zeros(1, np.int32)
    for seq, slot in ((one, one + 5), (one, one - 1), (one + 2, one)):
        with pytest.raises(ValueError, match="slots"):
            ops.append(kv, seq, slot, k, v)
    with pytest.raises(ValueError, match="lie outside"):
        ops.overwrite(kv, np.full((2, 1), 5, np.int32), *(np.repeat(x, 2, 0) for x in (k, v)),
                      np.zeros((2, 1, 5), np.int32), np.zeros(2, np.int32))  # fmt: skip
    with pytest.raises(ValueError, match="do not fit"):
        ops.attend(normal(2, s.n_head, s.d + 1), kv, np.zeros(2, np.int32), np.full(2, 5, np.int32))
    if device == "cpu":
        with pytest.raises(ValueError, match="do not fit"):
            ops.append(kv, one, one, k[..., :-1], v)
        for position in (-1.0, np.nan, 2.0**25):
            k[..., -1] = position
            with pytest.raises(ValueError, match="outside a text"):
                ops.append(kv, one, one, k, v)


# -- policies ----------------------------------------------------------------------------------------------------------

BOUNDED = [spec for spec in POLICY_TABLE if spec.partition(":")[0] not in ("sparq", "topk", "d2o", "d2o-code")]
HEADS = Shape(6, 2, 16, 2, 32, 32)
APART = HEADS._replace(group_size=1, k_rank=16, v_rank=16)


class LatentRun(Run):
    """A policy on latents; keys go in as latents with their positions."""

    def __init__(self, policy: str, device: str, s: Shape = HEADS, n_ctx: int = 512, n_layer: int = 2, n_seq: int = 1):
        super().__init__(policy, OPS[device], (s.n_head, s.n_head_kv, s.d), n_ctx, n_layer, n_seq)
        self.config, self.rope = model(s, n_layer), rope_of(s)
        self.factors = [factors(self.ops, s, self.rope, layer) for layer in range(n_layer)]
        stores = get_stores("latent-f16", self.config.palu)
        self.policy.check(self.config, n_ctx, *stores)
        plan = self.policy.plan(self.config, n_ctx, *stores)
        self.cache = allocate_cache(plan, self.config, self.ops, n_seq, self.rope, self.factors)


def random_latents(s: Shape, n: int, n_layer: int = 2, seed: int = 0) -> list[np.ndarray]:
    """Queries [n_layer, n, H_q, d] and latents, small enough for attention not to rest on a token alone."""
    q = random_qkv((s.n_head, s.n_head_kv, s.d), n, n_layer, seed)[0]
    k, v = zip(*(latents(s, n, np.arange(n), seed=seed + 10 * layer) for layer in range(n_layer)), strict=True)
    keys, values = np.array(k), np.array(v)
    keys[..., :-1] *= 0.5
    return [q, keys, values]


@pytest.mark.parametrize("device", OPS)
@pytest.mark.parametrize("full", sorted({POLICY_TABLE[spec] for spec in BOUNDED}))
def test_a_full_budget_is_dense(full: str, device: str) -> None:
    n, prompt, qkv = 96, 70, random_latents(HEADS, 96)
    ours, truth = (LatentRun(spec.format(n=n), device, n_ctx=n) for spec in (full, "dense"))
    for run in (ours, truth):
        run.outs = [run.prompt(cut(qkv, 0, prompt)), run.steps(cut(qkv, prompt, n))]  # type: ignore[attr-defined]
    for a, b in zip(ours.outs, truth.outs, strict=True):  # type: ignore[attr-defined]
        assert distance(a, b) <= REBUILT / 5


@pytest.mark.parametrize("spec", BOUNDED)
def test_the_cpu_does_as_the_reference(spec: str) -> None:
    """A prompt in chunks, and 80 steps of two sequences: outputs, and which tokens are held."""
    n, qkv = 120, random_latents(HEADS, 120, seed=1)
    ours, truth = (LatentRun(spec, device, n_seq=2) for device in ("cpu", "reference"))
    for seq, length in enumerate((40, 23)):
        a, b = (run.prompt(cut(qkv, 0, length), seq, chunk=17) for run in (ours, truth))
        assert distance(a, b) <= 1e-5
    for t in range(40, n):
        step = [np.stack([x[:, t], x[:, t - 17]], axis=1) for x in qkv]
        assert distance(ours.step(step), truth.step(step)) <= 1e-5, t
    if isinstance(truth.policy, Evicting):
        for layer in range(2):
            for seq in range(2):
                assert ours.positions(layer, seq) == truth.positions(layer, seq)
                assert len(truth.positions(layer, seq)) == 1  # a group decides


@pytest.mark.parametrize("spec", BOUNDED)
def test_latents_are_keys_that_turn_later(spec: str) -> None:
    """The same as keys that were rebuilt and turned before they were stored."""
    n, s = 90, APART
    qkv = random_latents(s, n)
    ours, truth = LatentRun(spec, "reference", s), Run(spec, None, (s.n_head, s.n_head_kv, s.d), n_layer=2)
    truth.rope = truth.cache.rope = ours.rope
    whole = [qkv[0], *(np.empty((2, n, s.n_head_kv, s.d), np.float32) for _ in range(2))]
    for layer, both in enumerate(ours.factors):
        for x, store, factor in zip((1, 2), get_stores("latent-f16", ours.config.palu), both, strict=True):
            rows = TRUTH.allocate(store, (1, s.n_head_kv, n, qkv[x].shape[-1]), factor)
            rows.rows[0] = store.encode(qkv[x][layer]).swapaxes(0, 1)
            whole[x][layer] = decoded(rows[0]).swapaxes(0, 1)
    for run, given in ((ours, qkv), (truth, whole)):
        run.outs = [run.prompt(cut(given, 0, 50)), run.steps(cut(given, 50, n))]  # type: ignore[attr-defined]
    for a, b in zip(ours.outs, truth.outs, strict=True):  # type: ignore[attr-defined]
        assert distance(a, b) <= 5e-6


@pytest.mark.parametrize("device", OPS)
@pytest.mark.parametrize("spec", BOUNDED)
def test_nothing_is_left_of_the_last_text(spec: str, device: str) -> None:
    fresh, used = (LatentRun(spec, device) for _ in range(2))
    before, text = random_latents(HEADS, 60, seed=5), random_latents(HEADS, 60, seed=6)
    used.prompt(cut(before, 0, 50))
    used.steps(cut(before, 50, 60))
    assert used.rewind(0) == 0
    for run in (fresh, used):
        run.outs = [run.prompt(cut(text, 0, 30)), run.steps(cut(text, 30, 60))]  # type: ignore[attr-defined]
    for a, b in zip(used.outs, fresh.outs, strict=True):  # type: ignore[attr-defined]
        assert (a == b).all()


def test_bytes_are_exact_where_ranks_differ() -> None:
    """Of a plan, of what a sequence has filled, of what a step reads, and of what a budget in bytes buys."""
    s = Shape(8, 4, 64, 2, 32, 64)
    config = model(s, 3)
    config.palu = PaluConfig(2, (32, 64, 128), (96, 128, 32), "q4", False)
    stores = get_stores("palu", config.palu)
    rows = [2 * (4 + k // 2 + 4 + 4 + v // 2) for k, v in zip(config.palu.k_ranks, config.palu.v_ranks, strict=True)]
    dense, window = (Run(spec).policy for spec in ("dense", "window:budget=40"))
    plan = dense.plan(config, 100, *stores)
    assert [plan.slot_bytes(config, i) for i in range(3)] == rows
    assert plan.nbytes(config) == 100 * sum(rows)
    assert dense.bytes_read(config, plan, 30) == 30 * sum(rows)
    cache = allocate_cache(plan, config, TRUTH, 2, None, [(SimpleNamespace(rank=0),) * 2] * 3)
    assert [kv.k.rows.nbytes + kv.v.rows.nbytes for kv in cache.layers] == [2 * 100 * n for n in rows]
    cache.n_seen[:] = 7
    assert cache.nbytes(config, 0) == 7 * sum(rows)
    assert window.plan(config, 100, *stores).nbytes(config) == 40 * sum(rows)
    bytes_of_9 = 9 * sum(rows)
    assert Run(f"window:budget={bytes_of_9 / 1000:.3f}kB").policy.kept(config, 100, *stores) == 9
    h2o = Run("h2o:budget=40").policy
    plan = h2o.plan(config, 100, *stores)
    assert plan.nbytes(config) == 41 * sum(rows) + 3 * (41 * 2 * 8 + 2 * 4)
    assert h2o.bytes_read(config, plan, 90) == 41 * sum(rows) + 3 * 41 * 2 * 4
