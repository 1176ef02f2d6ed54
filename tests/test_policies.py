"""What every KV policy must do, in one table over all of them.

A policy is run without a model: queries, keys and values are random, and go in as a decoder would send them.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kernels_cpu import CpuOps
from minirt.cache import allocate_cache
from minirt.errors import ModelError
from minirt.ops import NO_POSITION
from minirt.policies import POLICIES, BasePolicy, parse_policy
from minirt.policies.base import BoundedPolicy
from minirt.policies.evicting import Evicting
from minirt.reference import ReferenceOps
from minirt.rope import Rope
from minirt.stores import STORES

# One row a policy: as it is used, and with a budget that nothing exceeds ({n}: the context).
POLICY_TABLE = {
    "dense": "dense",
    "sparq:r=4:k=12": "sparq:r=4:k={n}",
    "sparq:r=4:k=12:reallocate=on:local=1:gqa=sum-logit": "sparq:r=4:k={n}:reallocate=on",
    "sparq:r=4:k=12:k_index=none": "sparq:r=4:k={n}:k_index=none",
    "sparq:r=4:k=auto:eps=0.4:most=12:local=2": "sparq:r=4:k=auto:most={n}",
    "sparq:r=4:k=auto:eps=0.4:most=12:local=2:reallocate=on:gqa=sum-logit": "sparq:r=4:k=auto:eps=0:most={n}",
    "topk:k=12": "topk:k={n}",
    "window:budget=16": "window:budget={n}",
    "streaming:budget=16": "streaming:budget={n}",
    "streaming:budget=16:positions=reindexed": "streaming:budget={n}:positions=reindexed",
    "lm-infinite:budget=16:sinks=3": "lm-infinite:recent={n}",
    "h2o:budget=16": "h2o:budget={n}",
    "h2o:budget=16:compress=chunked": "h2o:budget=1/1:compress=chunked",
    "tova:budget=16": "tova:budget={n}",
    "tova:budget=16:per=head": "tova:budget={n}:per=head",
    "tova:budget=16:compress=stepwise": "tova:budget={n}:compress=stepwise",
    "d2o:budget=16": "d2o:budget={n}",
    "d2o-code:budget=16": "d2o-code:budget={n}",
}
HEADS = [(4, 4, 20), (6, 2, 64), (4, 1, 80), (8, 1, 128)]  # H_q, H_kv, d
OPS = {"reference": ReferenceOps(), "cpu": CpuOps(threads=2)}


class Run:
    """A policy at work on one device: `prompt` and `step` take and give what a decoder's layers would."""

    def __init__(
        self,
        policy: str | BasePolicy,
        ops: Any = None,
        heads: tuple[int, int, int] = (6, 2, 16),
        n_ctx: int = 512,
        n_layer: int = 3,
        n_seq: int = 1,
        kv: str = "f32",
    ):
        self.policy: Any = parse_policy(policy) if isinstance(policy, str) else policy
        self.ops = ops or OPS["reference"]
        self.config: Any = SimpleNamespace(
            n_layer=n_layer, n_head=heads[0], n_head_kv=heads[1], head_dim=heads[2], sliding_window=0
        )
        self.rope = Rope(1e4 ** (-np.arange(heads[2] // 2) * 2.0 / heads[2]), 1.25, True)
        plan = self.policy.plan(self.config, n_ctx, STORES[kv], STORES[kv])
        self.cache = allocate_cache(plan, self.config, self.ops, n_seq, self.rope)

    def prompt(self, qkv: Any, seq: int = 0, chunk: int = 10**6) -> np.ndarray:
        """q, k, v [n_layer, T, H, d] -> [n_layer, T, H_q, d]."""
        outs, n = [], qkv[0].shape[1]
        chunk = n if self.policy.whole_prompt else chunk
        for i in range(0, n, chunk):
            part = [x[:, i : i + chunk] for x in qkv]
            outs.append(
                [self._own(self.policy.prefill, layer, seq, *(x[layer] for x in part)) for layer in self.layers]
            )
            self.policy.prefilled(self.ops, self.cache, seq)
            self.cache.n_seen[seq] += part[0].shape[1]
        return np.concatenate(outs, axis=1)

    def step(self, qkv: Any) -> np.ndarray:
        """q, k, v [n_layer, B, H, d] -> [n_layer, B, H_q, d]."""
        out = np.array([self._own(self.policy.attend, layer, *(x[layer] for x in qkv)) for layer in self.layers])
        self.cache.n_seen += 1
        return out

    def steps(self, qkv: Any) -> np.ndarray:
        """One sequence, token by token: [n_layer, T, H_q, d]."""
        return np.concatenate([self.step([x[:, t : t + 1] for x in qkv]) for t in range(qkv[0].shape[1])], axis=1)

    def rewind(self, n: int, seq: int = 0) -> int:
        return int(self.policy.rewind(self.ops, self.cache, seq, n))

    @property
    def layers(self) -> range:
        return range(self.config.n_layer)

    def positions(self, layer: int = 0, seq: int = 0) -> list[list[int]]:
        """Of the tokens that an evicting policy holds, per head, in order; the free slot left out."""
        held = min(int(self.cache.n_seen[seq]), int(self.policy.limits(self.cache, layer)[seq]) + 1)
        rows = np.array(self.cache.side["positions"][layer])[seq, :, :held]
        return [sorted(p for p in row.tolist() if p != NO_POSITION) for row in rows]

    def _own(self, method: Any, layer: int, *args: Any) -> np.ndarray:
        return np.array(method(self.ops, self.cache, layer, *args))


def random_qkv(heads: tuple[int, int, int], n: int, n_layer: int = 3, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    h_q, h_kv, d = heads
    q, k, v = (rng.standard_normal((n_layer, n, h, d)).astype(np.float32) for h in (h_q, h_kv, h_kv))
    # Some tokens are heeded by all, as in real text: else what is kept is kept by chance.
    k += 1.5 * rng.standard_normal((1, n, 1, 1)).astype(np.float32) * q.mean(axis=(1, 2), keepdims=True)
    return [q, k, v]


def cut(qkv: Any, start: int, stop: int) -> list[np.ndarray]:
    return [x[:, start:stop] for x in qkv]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm((a - b).astype(np.float64)) / np.linalg.norm(b.astype(np.float64)))


def test_every_policy_is_in_the_table() -> None:
    assert {spec.partition(":")[0] for spec in POLICY_TABLE} == set(POLICIES)
    for spec in POLICY_TABLE:
        assert str(parse_policy(str(parse_policy(spec)))) == str(parse_policy(spec))


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(
    ("device", "kv", "error"), [("reference", "f32", 1e-6), ("cpu", "f32", 2e-6), ("cpu", "f16", 1e-3)]
)
@pytest.mark.parametrize("full", sorted(set(POLICY_TABLE.values())))
def test_a_full_budget_is_dense(full: str, device: str, kv: str, error: float, heads: tuple[int, int, int]) -> None:
    n, prompt, qkv = 64, 40, random_qkv(heads, 64)
    ours = Run(full.format(n=n), OPS[device], heads, n_ctx=n, kv=kv)
    truth = Run("dense", None, heads, n_ctx=n)
    for run in (ours, truth):
        run.outs = [run.prompt(cut(qkv, 0, prompt)), run.steps(cut(qkv, prompt, n))]  # type: ignore[attr-defined]
    for a, b in zip(ours.outs, truth.outs, strict=True):  # type: ignore[attr-defined]
        assert distance(a, b) <= error


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("spec", POLICY_TABLE)
def test_the_cpu_does_as_the_reference(spec: str, heads: tuple[int, int, int]) -> None:
    """A prompt and 300 steps: outputs, and which tokens are held."""
    qkv = random_qkv(heads, 340, n_layer=2, seed=1)
    ours, truth = (Run(spec, OPS[device], heads, n_layer=2) for device in ("cpu", "reference"))
    assert distance(ours.prompt(cut(qkv, 0, 40)), truth.prompt(cut(qkv, 0, 40))) <= 2e-6
    for t in range(40, 340):
        a, b = (run.step(cut(qkv, t, t + 1)) for run in (ours, truth))
        assert distance(a, b) <= 2e-6, t
        if isinstance(truth.policy, Evicting):
            for layer in range(2):
                held = [np.array(run.cache.side["positions"][layer]) for run in (ours, truth)]
                n = min(t + 1, int(truth.policy.limits(truth.cache, layer)[0]) + 1)
                assert (held[0][:, :, :n] == held[1][:, :, :n]).all(), t


@pytest.mark.parametrize("device", OPS)
@pytest.mark.parametrize("spec", POLICY_TABLE)
def test_chunks_of_a_prompt_do_not_matter(spec: str, device: str) -> None:
    policy = parse_policy(spec)
    if isinstance(policy, Evicting) and policy.compress == "chunked":
        pytest.skip("cut after every chunk by definition")
    qkv = random_qkv((6, 2, 16), 90)
    whole, chunked = (Run(policy, OPS[device]) for _ in range(2))
    a, b = whole.prompt(cut(qkv, 0, 70)), chunked.prompt(cut(qkv, 0, 70), chunk=9)
    assert distance(b, a) <= 2e-6
    assert distance(chunked.steps(cut(qkv, 70, 90)), whole.steps(cut(qkv, 70, 90))) <= 1e-5


@pytest.mark.parametrize("device", OPS)
@pytest.mark.parametrize("spec", POLICY_TABLE)
def test_nothing_is_left_of_the_last_text(spec: str, device: str) -> None:
    fresh, used = (Run(spec, OPS[device]) for _ in range(2))
    before, text = random_qkv((6, 2, 16), 60, seed=5), random_qkv((6, 2, 16), 60, seed=6)
    used.prompt(cut(before, 0, 50))
    used.steps(cut(before, 50, 60))
    assert used.rewind(0) == 0
    for run in (fresh, used):
        run.outs = [run.prompt(cut(text, 0, 30)), run.steps(cut(text, 30, 60))]  # type: ignore[attr-defined]
    for a, b in zip(used.outs, fresh.outs, strict=True):  # type: ignore[attr-defined]
        assert (a == b).all()


@pytest.mark.parametrize("device", OPS)
@pytest.mark.parametrize("spec", POLICY_TABLE)
@pytest.mark.parametrize("prompt", [0, 30])
def test_what_can_be_kept_is_kept(spec: str, device: str, prompt: int) -> None:
    """Going back to n tokens gives what a text of n tokens gives; how far back is the policy's."""
    qkv, n = random_qkv((6, 2, 16), 60, seed=7), 36
    for back in (35, 14, 9):
        used, fresh = (Run(spec, OPS[device]) for _ in range(2))
        if prompt:
            used.prompt(cut(qkv, 0, prompt))
        used.steps(cut(qkv, prompt, n))
        kept = used.rewind(back)
        assert kept in (0, back)
        if kept and not (prompt and isinstance(used.policy, Evicting)):
            fresh.steps(cut(qkv, 0, kept))
            assert distance(used.steps(cut(qkv, kept, 60)), fresh.steps(cut(qkv, kept, 60))) <= 1e-5
    lossless = spec.partition(":")[0] in ("dense", "sparq", "topk")
    assert not lossless or kept == back


@pytest.mark.parametrize("device", OPS)
@pytest.mark.parametrize("spec", POLICY_TABLE)
def test_a_long_text_in_little_memory(spec: str, device: str) -> None:
    """Ten times past the budget, prompts between: finite, and bounded policies hold what they promise."""
    run = Run(spec, OPS[device], n_layer=1, n_ctx=400)
    before = run.cache.layers[0].k.nbytes
    qkv = random_qkv((6, 2, 16), 400, n_layer=1, seed=2)
    for start in range(0, 400, 100):
        out = run.prompt(cut(qkv, start, start + 60), chunk=25), run.steps(cut(qkv, start + 60, start + 100))
        assert all(np.isfinite(x).all() for x in out)
    config, policy = run.config, run.policy
    held = policy.held(config, run.cache, 0)
    if isinstance(policy, BoundedPolicy) and policy.name != "d2o-code":
        assert held == 16
        assert run.cache.layers[0].k.nbytes == before < 20 * 2 * 16 * 4 * 2
    else:
        assert held == 400


@pytest.mark.parametrize("device", OPS)
@pytest.mark.parametrize("spec", POLICY_TABLE)
def test_sequences_of_a_batch_do_not_mix(spec: str, device: str) -> None:
    lengths, heads = (3, 45, 20), (6, 2, 16)
    texts = [random_qkv(heads, n + 30, seed=n) for n in lengths]
    batch = Run(spec, OPS[device], heads, n_seq=3)
    for seq, (n, text) in enumerate(zip(lengths, texts, strict=True)):
        batch.prompt(cut(text, 0, n), seq)
    together = np.stack(
        [
            batch.step(
                [
                    np.concatenate([t[i][:, n + s : n + s + 1] for n, t in zip(lengths, texts, strict=True)], axis=1)
                    for i in range(3)
                ]
            )
            for s in range(30)
        ],
        axis=1,
    )  # [n_layer, steps, B, H_q, d]
    for seq, (n, text) in enumerate(zip(lengths, texts, strict=True)):
        alone = Run(spec, OPS[device], heads)
        alone.prompt(cut(text, 0, n))
        assert distance(together[:, :, seq], alone.steps(cut(text, n, n + 30))) <= 1e-5


@pytest.mark.parametrize("spec", POLICY_TABLE)
def test_a_sequence_moves_with_all_that_is_its_own(spec: str) -> None:
    """As when a batch shrinks: the last sequence takes the place of one that has ended."""
    heads, text = (6, 2, 16), random_qkv((6, 2, 16), 70)
    batch, alone = Run(spec, None, heads, n_seq=2), Run(spec, None, heads)
    batch.prompt(cut(random_qkv(heads, 20, seed=1), 0, 20), 0)
    for run, seq in ((batch, 1), (alone, 0)):
        run.prompt(cut(text, 0, 40), seq)
    batch.cache.move(1, 0)
    batch.cache = batch.cache.part(0, 1)
    assert distance(batch.steps(cut(text, 40, 70)), alone.steps(cut(text, 40, 70))) <= 1e-6


@pytest.mark.parametrize("spec", [s for s in POLICY_TABLE if isinstance(parse_policy(s), Evicting)])
def test_a_short_text_after_a_long_one(spec: str) -> None:
    """Nothing is cut then that would set thresholds or budgets anew."""
    used, fresh, text = Run(spec), Run(spec), random_qkv((6, 2, 16), 60, seed=6)
    used.prompt(random_qkv((6, 2, 16), 50, seed=5))
    used.rewind(0)
    for run in (used, fresh):
        run.outs = [run.prompt(cut(text, 0, 6)), run.steps(cut(text, 6, 60))]  # type: ignore[attr-defined]
    for a, b in zip(used.outs, fresh.outs, strict=True):  # type: ignore[attr-defined]
        assert (a == b).all()


@pytest.mark.parametrize("spec", [s for s in POLICY_TABLE if isinstance(parse_policy(s), BoundedPolicy)])
def test_too_much_that_is_pinned_is_refused(spec: str) -> None:
    run = Run(spec, n_layer=6)
    run.cache.pinned[:] = 12
    with pytest.raises(ModelError, match="12 tokens are pinned, which leaves no room in a budget of 16"):
        run.prompt(random_qkv((6, 2, 16), 20, n_layer=6))


def test_d2o_code_keeps_what_fits() -> None:
    heads, qkv = (6, 2, 16), random_qkv((6, 2, 16), 80, n_layer=6)
    ours, truth = (Run(spec, None, heads, n_layer=6) for spec in ("d2o-code:budget=100", "dense"))
    for run in (ours, truth):
        run.outs = [run.prompt(cut(qkv, 0, 5)), run.steps(cut(qkv, 5, 80))]  # type: ignore[attr-defined]
    assert ours.cache.limits[0].tolist() == [512, 512, 100, 100, 100, 512]
    for a, b in zip(ours.outs, truth.outs, strict=True):  # type: ignore[attr-defined]
        assert distance(a, b) <= 1e-6


@pytest.mark.parametrize("device", OPS)
@pytest.mark.parametrize("spec", POLICY_TABLE)
def test_pinned_tokens_stay(spec: str, device: str) -> None:
    """What the first tokens say is heard as long as they are pinned: their values are the only ones that are not 0."""
    policy = parse_policy(spec)
    if not isinstance(policy, BoundedPolicy):
        pytest.skip("nothing is evicted")
    qkv = random_qkv((6, 2, 16), 200, seed=3)
    qkv[2][:, 5:] = 0
    qkv[2][:, :5] = 1
    heard = {}
    for pinned in (0, 5):
        run = Run(replace(policy, budget=18), OPS[device])
        run.cache.pinned[:] = pinned
        run.prompt(cut(qkv, 0, 120))
        heard[pinned] = run.steps(cut(qkv, 120, 200))[:, -1]
        if isinstance(policy, Evicting):
            assert all(row[:pinned] == list(range(pinned)) for row in run.positions(1))
    assert (heard[5] > 0).all()
    assert heard[5].sum() >= heard[0].sum()


@pytest.mark.parametrize("device", OPS)
@pytest.mark.parametrize("spec", POLICY_TABLE)
def test_nan_harms_no_index(spec: str, device: str) -> None:
    run, qkv = Run(spec, OPS[device]), random_qkv((6, 2, 16), 80)
    qkv[1][:, 33] = np.nan
    with np.errstate(all="ignore"):
        run.prompt(cut(qkv, 0, 30))
        run.steps(cut(qkv, 30, 80))
        run.rewind(0)
        run.prompt(cut(qkv, 0, 80))


# A huge number in the cache changes what is computed from it: so many bytes does one step really read. Without an index
# components that are not chosen change nothing; the lines that they share with others are counted.
@pytest.mark.parametrize("device", OPS)
@pytest.mark.parametrize("n", [10, 39])
@pytest.mark.parametrize("spec", [s for s in POLICY_TABLE if "d2o" not in s and "none" not in s])
def test_bytes_read_are_what_a_step_touches(spec: str, n: int, device: str) -> None:
    heads, touched = (2, 1, 16), 0
    qkv = random_qkv(heads, n + 1, n_layer=1, seed=4)
    qkv[0][:] = np.abs(qkv[0]) + 0.1  # no component may be left out because it is zero

    run = Run(spec, OPS[device], heads, n_ctx=48, n_layer=1)
    run.prompt(cut(qkv, 0, n))
    arrays = {"k": run.cache.layers[0].k, "v": run.cache.layers[0].v}
    arrays |= {name: side[0] for name, side in run.cache.side.items()}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    before = {name: array.copy() for name, array in arrays.items()}

    def after(name: str = "k", huge: int | None = None) -> np.ndarray:
        """What the step gives if that number is huge."""
        for key, array in arrays.items():
            array[...] = before[key]
        run.cache.n_seen[:] = n
        if huge is not None:
            arrays[name].view(np.float32).reshape(-1)[huge] = 1e4
        out = run.step(cut(qkv, n, n + 1))
        scores = arrays["scores"] if "scores" in arrays else np.zeros(1)
        return np.concatenate([out.ravel(), scores.ravel()])

    with np.errstate(all="ignore"):
        clean = after()
        assert np.isfinite(clean).all()
        for name in ("k", "v", "index", "mean"):
            size = arrays[name].view(np.float32).size if name in arrays else 0
            touched += sum(not np.array_equal(after(name, i), clean, equal_nan=True) for i in range(size))
    after()
    config, policy = run.config, run.policy
    read = policy.bytes_touched(run.ops, config, run.cache, 0, n + 1)
    assert read <= policy.bytes_read(config, run.cache.plan, n + 1)
    held = min(n + 1, 17)
    if isinstance(policy, Evicting):
        read -= 4 * held  # its scores, which are compared with each other only
    # The step's own row is read, but written just before: what was there is gone.
    row = 16 * 4
    own = 2 * row
    if spec.startswith("topk"):
        qkv[2][:, n] += 1
        own = row + row * (not np.array_equal(after(), clean))  # its value, if it is among the best
    if "index" in arrays and n + 1 > policy.rows:
        own += 4 * policy.r
    assert 4 * touched + own == read
