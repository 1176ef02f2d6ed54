"""Each rule of the KV policies on a case worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from golden import MODELS, make_model
from test_policies import OPS, Run, cut, distance, random_qkv

from minirt import Llama
from minirt.ops import MergeRule
from minirt.policies import parse_policy
from minirt.policies.d2o import spread
from minirt.reference.attention import turn
from minirt.rope import Angles
from minirt.stores import STORES


def toy(weights: Any, values: Any) -> list[np.ndarray]:
    """q, k, v [1, T, 1, 16] of tokens that weigh `weights` and say `values` in their first component."""
    n = len(weights)
    q, k, v = (np.zeros((1, n, 1, 16), np.float32) for _ in range(3))
    q[..., 0], k[0, :, 0, 0], v[0, :, 0, 0] = 4, np.log(weights), values
    return [q, k, v]


def toy_run(policy: Any, device: str) -> Run:
    return Run(policy, OPS[device], (1, 1, 16), n_layer=1)


def said(out: np.ndarray) -> float:
    return float(out[0, -1, 0, 0])


@pytest.mark.parametrize("device", OPS)
def test_tova_by_hand(device: str) -> None:
    run, text = toy_run("tova:budget=3", device), toy([2, 8, 4, 1, 16, 4], [1, 2, 3, 4, 5, 6])
    run.prompt(cut(text, 0, 3))
    assert run.positions() == [[0, 1, 2]]
    out = run.step(cut(text, 3, 4))
    assert said(out) == pytest.approx((2 * 1 + 8 * 2 + 4 * 3 + 1 * 4) / 15, rel=1e-6)
    assert run.positions() == [[0, 1, 2]]  # the newest weighed least, and went at once
    out = run.step(cut(text, 4, 5))
    assert said(out) == pytest.approx((2 * 1 + 8 * 2 + 4 * 3 + 16 * 5) / 30, rel=1e-6)
    assert run.positions() == [[1, 2, 4]]
    run.step(cut(text, 5, 6))
    assert run.positions() == [[1, 2, 4]]  # tokens 2 and 5 weigh the same: 5 stands in the slot of token 0
    run.rewind(0)
    run.prompt(toy([2, 64, 1, 4, 32], [0] * 5))
    assert run.positions() == [[1, 3, 4]]


@pytest.mark.parametrize("device", OPS)
def test_tova_by_layer_or_by_head(device: str) -> None:
    """Two heads that disagree: together they keep what one of them heeds much, alone each keeps its own."""
    weights = np.array([[8, 4, 1], [1, 4, 8]])  # [head, token]
    k = np.zeros((1, 3, 2, 16), np.float32)
    k[0, :, :, 0] = np.log(weights.T)
    q, v = np.zeros((1, 3, 2, 16), np.float32), np.zeros((1, 3, 2, 16), np.float32)
    q[..., 0] = 4
    for spec, held in (("tova:budget=2", [[0, 2]]), ("tova:budget=2:per=head", [[0, 1], [1, 2]])):
        run = Run(spec, OPS[device], (2, 2, 16), n_layer=1)
        run.prompt([q, k, v])
        assert run.positions() == held


@pytest.mark.parametrize("device", OPS)
def test_tova_keeps_neither_first_nor_newest(device: str) -> None:
    run, text = toy_run("tova:budget=4", device), toy([1, 9, 9, 9, 9, 2], [0] * 6)
    run.prompt(cut(text, 0, 5))
    run.step(cut(text, 5, 6))
    assert run.positions() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("device", OPS)
def test_h2o_by_hand(device: str) -> None:
    run, text = toy_run("h2o:budget=3:recent=1", device), toy([1, 2, 1, 4, 1], [1, 10, 100, 1000, 10000])
    run.prompt(cut(text, 0, 3))
    scores = np.array(run.cache.side["scores"][0])[0, 0]
    assert scores[:3] == pytest.approx([1 + 1 / 3 + 1 / 4, 2 / 3 + 1 / 2, 1 / 4], rel=1e-6)
    assert said(run.step(cut(text, 3, 4))) == pytest.approx((1 + 2 * 10 + 100 + 4 * 1000) / 8, rel=1e-6)
    assert run.positions() == [[0, 1, 3]]  # 1/4 + 1/8 of token 2 is least; the newest is protected
    out = run.step(cut(text, 4, 5))
    assert said(out) == pytest.approx((1 + 2 * 10 + 4 * 1000 + 10000) / 8, rel=1e-6)
    assert run.positions() == [[0, 1, 4]]  # token 3 came late: 1/2 + 1/2


@pytest.mark.parametrize("device", OPS)
def test_h2o_does_not_freeze_on_early_tokens(device: str) -> None:
    """New tokens have had no time to gather attention; the protected newest give it to them."""
    weights = np.ones(340)
    weights[60] = 1000
    run, text = toy_run("h2o:budget=16", device), toy(weights, weights)
    run.prompt(cut(text, 0, 40))
    run.steps(cut(text, 40, 340))
    (row,) = run.positions()
    assert row[-8:] == list(range(332, 340))
    assert 60 in row


@pytest.mark.parametrize("device", OPS)
def test_d2o_by_hand(device: str) -> None:
    """As H2O, but token 2 lives on in token 0: all keys have the same direction, so the first is most like it."""
    run = toy_run("d2o:budget=3:recent=1:sinks=0", device)
    text = toy([2, 4, 2, 8, 2], [1, 10, 100, 1000, 10000])
    run.prompt(cut(text, 0, 3))
    run.step(cut(text, 3, 4))
    assert run.positions() == [[0, 1, 3]]
    # u = 1: w = e / (e + exp(1)) = 1/2 for key and value, log 2 and log 2, 1 and 100
    assert said(run.step(cut(text, 4, 5))) == pytest.approx((2 * 50.5 + 4 * 10 + 8 * 1000 + 2 * 10000) / 16, rel=1e-5)
    first = 0.7 * 1 + 0.3 * 0
    assert np.array(run.cache.side["threshold"][0])[0, 0] == pytest.approx(0.7 * 1 + 0.3 * first, rel=1e-5)


@pytest.mark.parametrize("device", OPS)
def test_d2o_layers_share_what_was_promised(device: str) -> None:
    heads = (6, 2, 16)
    run, qkv = Run("d2o:budget=16", OPS[device], heads, n_layer=5), random_qkv(heads, 120, n_layer=5, seed=9)
    qkv[1] *= np.array([0.1, 0.5, 1, 2, 3], np.float32).reshape(5, 1, 1, 1)  # ever sharper attention
    run.prompt(cut(qkv, 0, 100))
    limits = run.cache.limits[0]
    assert limits.sum() == 5 * 16
    assert limits[0] == limits.max() > limits.min()  # where attention is even, many tokens are worth keeping
    assert limits.max() <= np.e * limits.min() + 2
    assert [kv.k.shape[2] for kv in run.cache.layers] == [n + 1 for n in limits]
    run.steps(cut(qkv, 100, 120))
    for layer in range(5):
        assert [len(row) for row in run.positions(layer)] == [limits[layer]] * 2


def test_layer_budgets_add_up() -> None:
    for share, total, most in (
        ([1, 1, 1], 48, 100),
        ([1, 2.7, 1], 100, 512),
        ([1, 1, 2], 300, 100),
        ([1, 1e-9], 20, 50),
    ):
        limits = spread(np.array(share), total, most)
        assert limits.sum() == min(total, most * len(share))
        assert limits.max() <= most
    assert spread(np.array([1.0, 1.0, 2.0]), 400, 300).tolist() == [100, 100, 200]


@pytest.mark.parametrize("device", OPS)
def test_sparq_by_hand(device: str) -> None:
    """q = (4, 2): r = 1 sees the first component, tau = sqrt(16 * 4 / 6). Keys are such that token i seems to weigh
    seems[i] and weighs weighs[i]."""
    seems, weighs, v = np.array([1, 4, 2, 1.0]), np.array([5, 3, 1, 1.0]), np.array([1, 10, 100, 1000.0])
    text, tau = toy(weighs, v), np.sqrt(16 * 4 / 6)
    text[0][..., 1] = 2
    text[1][0, :, 0, 0] = np.log(seems) * tau / 4
    text[1][0, :, 0, 1] = 2 * (np.log(weighs) - text[1][0, :, 0, 0])
    y, alpha = (3 * 10 + 1 * 1000) / 4, (4 + 1) / 8  # of the best that seems, and the newest
    for spec, expected in (
        ("sparq:r=1:k=2:local=1", alpha * y + (1 - alpha) * v.mean()),
        ("sparq:r=1:k=2:local=1:reallocate=off", y),
        ("sparq:r=1:k=2:local=0:reallocate=off", (3 * 10 + 1 * 100) / 4),
    ):
        run = toy_run(spec, device)
        run.prompt(cut(text, 0, 3))
        assert said(run.step(cut(text, 3, 4))) == pytest.approx(expected, rel=1e-5)
    run = toy_run("topk:k=2", device)
    run.prompt(cut(text, 0, 3))
    assert said(run.step(cut(text, 3, 4))) == pytest.approx((5 * 1 + 3 * 10) / 10, rel=1e-5)  # not renormalised


@pytest.mark.parametrize("device", OPS)
def test_sparq_is_dense_while_a_text_is_short(device: str) -> None:
    short = "sparq:r=1:k=1:local=0:reallocate=off:dense_until=4"
    runs, text = [toy_run(policy, device) for policy in (short, "dense")], toy([2, 8, 4, 1, 16, 4], [1, 2, 3, 4, 5, 6])
    found = [[said(run.step(cut(text, t, t + 1))) for run in runs] for t in range(6)]
    assert [sparse == dense for sparse, dense in found] == 4 * [True] + 2 * [False]
    assert [sparse for sparse, _ in found[4:]] == [5, 5]


@pytest.mark.parametrize("device", OPS)
@pytest.mark.parametrize("k", ["k=4", "k=auto:eps=0.2:most=4"])
def test_sparq_is_dense_for_the_short_texts_of_a_batch(k: str, device: str) -> None:
    """Each sequence as it would be alone, while the others pass the bound one by one."""
    spec, heads, lengths, steps = f"sparq:r=4:{k}:local=1:reallocate=on:dense_until=30", (6, 2, 16), (26, 1, 40), 10
    texts = [random_qkv(heads, n + steps, seed=n) for n in lengths]
    batch, dense = Run(spec, OPS[device], heads, n_seq=3), Run("dense", OPS[device], heads, n_seq=3)
    for run in (batch, dense):
        for seq, (n, text) in enumerate(zip(lengths, texts, strict=True)):
            run.prompt(cut(text, 0, n), seq)
    alone = [Run(spec, OPS[device], heads) for _ in lengths]
    for run, n, text in zip(alone, lengths, texts, strict=True):
        run.prompt(cut(text, 0, n))
    for s in range(steps):
        rows = [cut(text, n + s, n + s + 1) for n, text in zip(lengths, texts, strict=True)]
        all_rows = [np.concatenate(x, axis=1) for x in zip(*rows, strict=True)]
        together, whole = (run.step(all_rows) for run in (batch, dense))
        for seq, (run, n, row) in enumerate(zip(alone, lengths, rows, strict=True)):
            assert distance(together[:, seq], run.step(row)[:, 0]) <= 1e-6
            assert (distance(together[:, seq], whole[:, seq]) <= 1e-6) == (n + s + 1 <= 30)
    for counts in batch.cache.side.get("counts", ()):
        assert np.array(counts)[:, 0, 2].tolist() == [6, 0, 10]  # steps that were not dense


def test_bytes_of_texts_that_are_attended_densely() -> None:
    """All rows up to the bound; beyond it the index, and k of them."""
    for k in ("k=4", "k=auto:most=4"):
        run = Run(f"sparq:r=4:{k}:dense_until=30:reallocate=off", None, (6, 2, 16), n_layer=1)
        row, component = 2 * 2 * 16 * 4, 2 * 4  # of both heads
        for n, expected in ((3, 3 * row), (30, 30 * row), (31, 4 * row + 31 * 4 * component)):
            assert run.policy.bytes_read(run.config, run.cache.plan, n) == expected
        run.prompt(random_qkv((6, 2, 16), 28, n_layer=1))
        run.steps(random_qkv((6, 2, 16), 4, n_layer=1))
        assert run.policy.bytes_touched(run.ops, run.config, run.cache, 0, 30) == 30 * row
        assert run.policy.bytes_touched(run.ops, run.config, run.cache, 0, 32) <= 4 * row + 32 * 4 * component


def test_grouped_heads_choose_together() -> None:
    """sum-prob: two heads, of which one is sure; sum-logit: the other's veto counts."""
    q, k, v = (np.zeros((1, 4, h, 16), np.float32) for h in (2, 1, 1))
    q[..., 0, 0], q[..., 1, 1] = 4, 4
    k[0, :, 0, 0] = [3, 0, 1.5, -9]
    k[0, :, 0, 1] = [-9, 1.5, 1.5, -9]
    v[0, :, 0, 0] = [1, 2, 3, 4]
    for gqa, best in (("sum-prob", 0), ("sum-logit", 2)):
        run = Run(f"sparq:r=2:k=1:local=0:gqa={gqa}", None, (2, 1, 16), n_layer=1)
        run.prompt(cut([q, k, v], 0, 3))
        assert run.step(cut([q, k, v], 3, 4))[0, 0, :, 0].tolist() == [best + 1, best + 1]


@pytest.mark.parametrize("device", OPS)
def test_sparq_reads_what_weighs_enough(device: str) -> None:
    """Of nine tokens that weigh 4, 3, 1 and, six times, 0.2: those of a tenth, and the newest; what is not read counts
    as the mean. Then the newest outweighs all others, and stays heavy when the next one weighs nothing."""
    weights, values = [4, 0.2, 3, 0.2, 0.2, 1, 0.2, 0.2, 0.2, 100, 0.001, 0.001], [5, 0, 7, 0, 0, 2, 0, 0, 0, 30, 9, 9]
    run = toy_run("sparq:r=16:k=auto:eps=0.4:most=4:local=1:reallocate=on", device)
    text, config = toy(weights, values), run.config
    run.prompt(cut(text, 0, 8))
    for n, read in ((9, [0, 2, 5, 8]), (10, [9]), (11, [9, 10])):
        out, w, v = said(run.step(cut(text, n - 1, n))), np.array(weights[:n]), np.array(values[:n])
        alpha = w[read].sum() / w.sum()
        expected = alpha * (w[read] @ v[read]) / w[read].sum() + (1 - alpha) * v.mean()
        assert out == pytest.approx(expected, rel=1e-5)
        assert np.array(run.cache.side["counts"][0])[0, 0].tolist() == [len(read), {9: 4, 10: 5, 11: 7}[n], n - 8]
    index, row = 16 * 4, 2 * 16 * 4
    touched = run.policy.bytes_touched(run.ops, config, run.cache, 0, 11)
    assert touched == pytest.approx(11 * index + index + 7 / 3 * row)  # r = 16: the index of a token, and a mean
    assert run.policy.bytes_read(config, run.cache.plan, 11) == 11 * index + index + 4 * row
    assert run.policy.bytes_touched(run.ops, config, run.cache, 0, 4) == 4 * row
    run.rewind(8)
    assert not np.array(run.cache.side["counts"][0]).any()


def test_d2o_touches_what_its_layers_keep() -> None:
    run = Run("d2o:budget=16")
    planned = run.policy.bytes_read(run.config, run.cache.plan, 60)
    assert run.policy.bytes_touched(run.ops, run.config, run.cache, 0, 60) == planned
    run.prompt(random_qkv((6, 2, 16), 60))
    slots = sum(int(limit) + 1 for limit in run.cache.limits[0])
    each = 2 * (2 * 16 * 4 + 16 * 4 + 4)  # of both heads: a row, the key once more, a score
    assert run.policy.bytes_touched(run.ops, run.config, run.cache, 0, 60) == slots * each


def test_defaults_are_those_of_the_papers() -> None:
    """Which tokens count as new, how D2O and its published code merge, at what distance LM-Infinite sees the first."""
    assert [parse_policy(f"sparq:k={k}").newest for k in (128, 64)] == [32, 16]  # type: ignore[attr-defined]
    newest = {name: parse_policy(name).newest(512) for name in ("h2o", "tova", "d2o", "d2o-code")}  # type: ignore[attr-defined]
    assert newest == {"h2o": 256, "tova": 0, "d2o": 128, "d2o-code": 256}
    d2o, code = (parse_policy(name).rule() for name in ("d2o", "d2o-code"))  # type: ignore[attr-defined]
    assert d2o == MergeRule(beta=0.7, e=np.e, normalised=True, shared=False)
    assert code == MergeRule(beta=0.5, e=np.e, normalised=False, shared=True)
    pos, sinks, length = (np.array([n], np.int32) for n in (5000, 16, 496))
    assert parse_policy("lm-infinite").far_position(pos, sinks, length) == [496]  # type: ignore[attr-defined]


def test_layer_budgets_of_the_published_d2o() -> None:
    """Six layers of which 0, 1 and 5 keep all; x, the mean of variances scaled across three heads, is 0, 1/3 and 2/3 in
    the others, and a layer keeps L budget exp(-x) / sum of exp(-x) over all six, at least a hundredth of the prompt."""
    flat, sharp = np.tile([1.0, 3.0], 5000), np.tile([0.0, 4.0], 5000)  # variances 1 and 4
    heads = [[flat] * 3] * 3 + [[flat, flat, sharp], [flat, sharp, sharp], [flat] * 3]
    scores, policy = [np.array(of_layer, np.float32) for of_layer in heads], parse_policy("d2o-code")
    total = 4 + np.exp(-1 / 3) + np.exp(-2 / 3)
    limits = policy.layer_limits(scores, 1000, 20000).tolist()  # type: ignore[attr-defined]
    expected = [int(6 * 1000 * np.exp(-x) / total) for x in (0, 1 / 3, 2 / 3)]
    assert limits == [20000, 20000, *expected, 20000]
    assert policy.layer_limits(scores, 8, 20000)[2:5].tolist() == [100] * 3  # type: ignore[attr-defined]


def test_bytes_that_d2o_reads() -> None:
    """Of 5 slots, the free one included: keys, values and scores; where all are taken the keys once more, to merge."""
    run = Run("d2o:budget=4:sinks=1", None, (6, 2, 16), n_layer=3)
    rows, sums = 2 * 16 * 4, 2 * 4  # of a slot, float32: keys of two heads, their scores
    full = run.policy.bytes_read(run.config, run.cache.plan, 100)
    h2o = Run("h2o:budget=4", None, (6, 2, 16), n_layer=3)
    assert full - h2o.policy.bytes_read(h2o.config, h2o.cache.plan, 100) == 3 * 5 * rows
    assert full >= 3 * 5 * (3 * rows + sums)
    for n in (1, 4):
        assert run.policy.bytes_read(run.config, run.cache.plan, n) == h2o.policy.bytes_read(
            h2o.config, h2o.cache.plan, n
        )


@pytest.mark.parametrize("name", ["window", "streaming", "h2o", "tova", "d2o", "d2o-code"])
def test_a_budget_in_bytes_is_not_exceeded(name: str) -> None:
    """All that a policy keeps is counted, and one token more would be too much."""
    config: Any = SimpleNamespace(n_layer=6, n_head=6, n_head_kv=2, head_dim=16, sliding_window=0)
    for kib in (100, 333):
        policy = parse_policy(f"{name}:budget={kib}KiB")
        size = policy.plan(config, 64, STORES["f16"], STORES["f16"]).nbytes(config)
        more = parse_policy(f"{name}:budget={policy.kept(config, 64, *2 * [STORES['f16']]) + 1}")  # type: ignore[attr-defined]
        assert size <= kib << 10
        if size < kib << 10 and more.kept(config, 64, *2 * [STORES["f16"]]) < 64:  # type: ignore[attr-defined]
            assert more.plan(config, 64, STORES["f16"], STORES["f16"]).nbytes(config) > kib << 10


@pytest.mark.parametrize("device", OPS)
@pytest.mark.parametrize("prompt", [1, 9, 40])
@pytest.mark.parametrize("method", ["window", "streaming", "reindexed", "lm-infinite"])
def test_windows_see_the_right_tokens_at_the_right_distance(method: str, prompt: int, device: str) -> None:
    n, budget, sinks, limit = 48, 12, 0 if method == "window" else 3, 7
    spec = {
        "window": "window:budget=12", "streaming": "streaming:budget=12:sinks=3",
        "reindexed": "streaming:budget=12:sinks=3:positions=reindexed",
        "lm-infinite": "lm-infinite:budget=12:sinks=3:limit=7",
    }[method]  # fmt: skip
    run = Run(spec, OPS[device], (2, 1, 16), n_layer=1)
    rope, rng = run.rope, np.random.default_rng(0)
    plain = [rng.standard_normal((1, n, h, 16)).astype(np.float32) for h in (2, 1, 1)]
    turned = [x.copy() for x in plain]
    for x in turned[:2]:
        turn(x[0], Angles(rope.angles(np.arange(n)), True))
    got = np.concatenate([run.prompt(cut(turned, 0, prompt), chunk=7), run.steps(cut(turned, prompt, n))], axis=1)[0]

    window = budget - sinks
    for t in range(n):
        seen = {j: t - j for j in range(max(0, t + 1 - window), t + 1)}
        for j in range(min(sinks, t + 1 - window)):
            last = min(t, budget - 1) if method == "reindexed" else t
            seen[j] = min(t, limit) if method == "lm-infinite" else last - j
        weights = []
        for j, distance_ in seen.items():
            q = plain[0][0, t : t + 1].copy()
            turn(q, Angles(rope.angles(np.array([distance_])), True))
            weights.append(np.exp(rope.magnitude * (q[0] @ plain[1][0, j, 0]) / 4))
        p = np.array(weights) / np.sum(weights, axis=0)
        expected = np.einsum("jh,jd->hd", p, plain[2][0, list(seen), 0])
        assert np.abs(got[t] - expected).max() <= 2e-5, t


@pytest.mark.parametrize("device", OPS)
def test_only_distances_matter(device: str, tmp_path: Any) -> None:
    """One layer: what was evicted might never have been there; sinks that are re-indexed are the text's beginning."""
    path, rng = tmp_path / "one.gguf", np.random.default_rng(0)
    make_model(path, **MODELS["llama-gqa3-d64-tied"] | {"n_layer": 1})
    prefix, suffix = rng.integers(4, 300, 60).tolist(), rng.integers(4, 300, 20).tolist()
    with Llama.load(path, kv="f32", device=device, n_ctx=256) as llama:
        truth, with_sinks = llama.logits(suffix)[-1], llama.logits(prefix[:4] + suffix)[-1]
        assert np.abs(truth - llama.logits(prefix + suffix)[-1]).max() > 1e-2
        for policy, expected in (("window:budget=20", truth), ("streaming:budget=24:positions=reindexed", with_sinks)):
            for read in (10, 50, 80):
                llama.set_policy(policy)
                logits = llama.session.feed((prefix + suffix)[:read])
                for token in (prefix + suffix)[read:]:
                    logits = llama.session.step(token)
                assert np.abs(logits - expected).max() <= 2e-5 * np.abs(expected).max()
