"""Decode steps that are recorded and made again: the same numbers as steps made call by call, under every policy."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import MODELS, make_model
from make_palu import make_palu
from test_policies import POLICY_TABLE

import minirt.cache
from kernels_cpu import CpuOps, tape
from kernels_cpu.compiled import kernel
from kernels_cpu.crew import AWAKE, Crew, share_long
from minirt import Llama
from minirt.ops import CODED_UNIT
from minirt.stores import get_stores

N_CTX = 96
NAMES = ["llama-gqa3-d64-tied", "llama-gqa4-d80", "llama-gqa8-d128", "qwen2-gqa3-d128", "qwen3-gqa1-d80"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        make_model(folder / f"{name}.gguf", **MODELS[name])
    return {name: folder / f"{name}.gguf" for name in NAMES}


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each step that was made call by call: whether it was recorded."""
    seen: list[bool] = []
    record = CpuOps.record

    def noted(self: CpuOps, step: Any) -> Any:
        result = record(self, step)
        seen.append(result[1] is not None)
        return result

    monkeypatch.setattr(CpuOps, "record", noted)
    return seen


def load(path: Path, n_ctx: int = N_CTX, **options: Any) -> Llama:
    return Llama.load(path, n_ctx=n_ctx, device="cpu", threads=2, **options)


PROMPTS = ((1, 40), (30, 20), (10, 30))


def script(llama: Llama, prompts: Sequence[tuple[int, int]] = PROMPTS) -> Iterator[np.ndarray]:
    """The logits of steps after prompts of several lengths, with a rewind between them."""
    tokens = np.random.default_rng(0).integers(0, llama.config.n_vocab, 1000).tolist()
    session = llama.session
    for prompt, steps in prompts:
        session.reset()
        yield session.feed(tokens[:prompt])
        for token in tokens[prompt : prompt + steps]:
            yield session.step(token)


def call_by_call(self: CpuOps, step: Callable[[Any], Any]) -> tuple[Any, None]:
    return step(self), None


@pytest.mark.parametrize("kv", ["f16", "q8_0/q4_0"])
@pytest.mark.parametrize("policy", POLICY_TABLE)
def test_a_recorded_step_gives_the_same_logits(
    policy: str, kv: str, paths: dict[str, Path], records: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = load(paths[NAMES[0]], policy=policy, kv=kv)
    recorded = list(script(llama))
    assert all(records)
    assert len(records) < 25, "of 90 steps, those after a prompt and where a layer begins to do something else"
    monkeypatch.setattr(CpuOps, "record", call_by_call)
    assert np.array_equal(recorded, list(script(llama)))


def test_codes_of_an_index_are_made_in_recorded_steps(
    paths: dict[str, Path], records: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = load(paths[NAMES[0]], n_ctx=1024, policy="sparq:r=16:k=24:k_index=q4")
    prompts = ((CODED_UNIT - 10, 30), (2 * CODED_UNIT - 4, 8))
    recorded = list(script(llama, prompts))
    assert len(records) == 2
    monkeypatch.setattr(CpuOps, "record", call_by_call)
    assert np.array_equal(recorded, list(script(llama, prompts)))


@pytest.mark.parametrize("name", NAMES[1:])
def test_of_other_models(
    name: str, paths: dict[str, Path], records: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = load(paths[name])
    recorded = list(script(llama))
    assert len(records) < 15
    monkeypatch.setattr(CpuOps, "record", call_by_call)
    assert np.array_equal(recorded, list(script(llama)))


LATENT_POLICIES = [
    "dense", "window:budget=16", "streaming:budget=16", "streaming:budget=16:positions=reindexed",
    "lm-infinite:sinks=4:budget=16", "h2o:budget=16", "tova:budget=16",
]  # fmt: skip


@pytest.mark.parametrize("policy", LATENT_POLICIES)
def test_steps_from_latents(
    policy: str, paths: dict[str, Path], tmp_path: Path, records: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every type; the table of cosines and sines grows while steps are played."""
    for name, group, rank, kv in ((NAMES[0], 2, 96, "latent-f16/latent-q4"), (NAMES[4], 1, 32, "latent-q3")):
        path = make_palu(paths[name], tmp_path / f"{name}.gguf", group, rank, rank)
        records.clear()
        with monkeypatch.context() as patch:
            patch.setattr("kernels_cpu.latent_ops.POSITIONS", 8)
            recorded = list(script(load(path, policy=policy, kv=kv)))
        assert records.count(False) == (3 if "lm-infinite" in policy else 0), "whose sinks have keys of their own"
        assert len(records) < 30
        with monkeypatch.context() as patch:
            patch.setattr(CpuOps, "record", call_by_call)
            assert np.array_equal(recorded, list(script(load(path, policy=policy, kv=kv))))


def test_heads_of_no_whole_vectors_are_not_recorded(tmp_path: Path, records: list[bool]) -> None:
    shape: dict[str, Any] = {"n_embd": 80, "n_head": 4, "n_head_kv": 2, "head_dim": 20, "n_ff": 96, "n_vocab": 320}
    shape |= {"n_layer": 2, "n_ctx": 512}
    make_model(tmp_path / "m.gguf", **shape)
    llama = load(tmp_path / "m.gguf")
    assert len(list(script(llama))) == 93
    assert records
    assert not any(records)


@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize(
    "policy", ["dense", "sparq:r=4:k=12", "streaming:budget=16:positions=reindexed", "d2o:budget=16"]
)
def test_several_sequences_together(
    policy: str, latents: bool, paths: dict[str, Path], tmp_path: Path, records: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = paths[NAMES[0]]
    if latents:
        if policy.partition(":")[0] in ("sparq", "d2o"):
            pytest.skip("needs keys and values as they are")
        path = make_palu(path, tmp_path / "palu.gguf", 1, 32, 64)
    decoder = load(path, policy=policy).decoder
    plan = decoder.policy.plan(decoder.config, N_CTX, *get_stores("auto", decoder.config.palu))
    tokens = np.random.default_rng(0).integers(0, decoder.config.n_vocab, (3, 60))

    def steps() -> Iterator[np.ndarray]:
        cache = decoder.new_cache(plan, 3)
        for seq, n in enumerate((1, 20, 9)):
            decoder.prefill(cache, tokens[seq, :n].tolist(), seq)
        for t in range(20, 60):
            yield decoder.decode(cache, tokens[:, t].tolist())

    recorded = list(steps())
    assert all(records)
    assert len(records) < 15
    monkeypatch.setattr(CpuOps, "record", call_by_call)
    assert np.array_equal(recorded, list(steps()))


def test_texts_of_a_batch_pass_the_bound_of_dense_attention(
    paths: dict[str, Path], records: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are recorded while all are attended alike, and none is played that does something else."""
    decoder = load(paths[NAMES[0]], policy="sparq:r=4:k=12:dense_until=40").decoder
    plan = decoder.policy.plan(decoder.config, N_CTX, *get_stores("auto"))
    tokens = np.random.default_rng(0).integers(0, decoder.config.n_vocab, (2, 90))

    def steps() -> Iterator[np.ndarray]:
        cache = decoder.new_cache(plan, 2)
        for seq, n in enumerate((10, 20)):
            decoder.prefill(cache, tokens[seq, :n].tolist(), seq)
        for t in range(20, 80):
            yield decoder.decode(cache, tokens[:, t].tolist())

    recorded = list(steps())
    assert records.count(False) == 10
    assert records.count(True) < 10
    monkeypatch.setattr(CpuOps, "record", call_by_call)
    assert np.array_equal(recorded, list(steps()))


def test_two_caches_of_one_decoder(paths: dict[str, Path]) -> None:
    """They share the scratch of the ops."""
    llama = load(paths[NAMES[0]])
    decoder, tokens = llama.decoder, list(range(20, 40))
    alone = []
    for start in (0, 10):
        cache = decoder.new_cache(llama.session.cache.plan)
        decoder.prefill(cache, tokens[start : start + 5])
        alone.append([decoder.decode(cache, [t])[0] for t in tokens[start + 5 : start + 10]])
    caches = [decoder.new_cache(llama.session.cache.plan) for _ in range(2)]
    for cache, start in zip(caches, (0, 10), strict=True):
        decoder.prefill(cache, tokens[start : start + 5])
    for i in range(5):
        for which, (cache, start) in enumerate(zip(caches, (0, 10), strict=True)):
            if i == 3:
                decoder.prefill(decoder.new_cache(llama.session.cache.plan), tokens * 4)  # takes more scratch
            assert np.array_equal(decoder.decode(cache, [tokens[start + 5 + i]])[0], alone[which][i])


@pytest.mark.parametrize("policy", ["dense", "sparq:r=4:k=12", "topk:k=12", "window:budget=16", "d2o:budget=16"])
def test_a_cache_is_given_back_with_the_last_reference(policy: str, paths: dict[str, Path]) -> None:
    """Not when Python looks for cycles: it does not know how large the memory is."""
    llama = load(paths[NAMES[0]], policy=policy)
    list(script(llama))
    cache = weakref.ref(llama.session.cache)
    gc.disable()
    try:
        llama.set_policy("dense")
        assert cache() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("policy", ["dense", "streaming:budget=16", "d2o:budget=16"])
def test_an_interrupt_while_a_step_is_renewed(
    policy: str, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(old: Any, new: Any, seen: Any) -> bool:
        renew(old, new, seen)
        raise KeyboardInterrupt

    llama, renew = load(paths[NAMES[0]], policy=policy), minirt.cache._renew
    truth = list(script(llama, ((30, 5),)))
    generated = script(llama, ((30, 5),))
    for _ in range(3):
        next(generated)
    monkeypatch.setattr(minirt.cache, "_renew", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(generated)
    monkeypatch.undo()
    llama.session.feed(llama.session.tokens[:31])
    assert np.array_equal(truth, list(script(llama, ((30, 5),))))


def test_a_full_cache_is_an_error(paths: dict[str, Path]) -> None:
    llama = load(paths[NAMES[0]])
    decoder, cache = llama.decoder, llama.session.cache
    decoder.prefill(cache, [1] * (N_CTX - 3))
    for _ in range(3):
        decoder.decode(cache, [2])
    with pytest.raises(ValueError, match="slots"):
        decoder.decode(cache, [2])


def test_a_call_that_refuses_is_an_error(paths: dict[str, Path]) -> None:
    """Slots that the device chose are looked at by the kernel alone."""
    llama = load(paths[NAMES[0]], policy="tova:budget=16")
    llama.session.feed([1, 2, 3])
    for token in range(20):
        llama.session.step(token)
    llama.session.cache.side["free"][1][:] = 17
    with pytest.raises(RuntimeError, match="failed"):
        llama.session.step(4)
    llama.session.reset()
    llama.session.feed([1, 2, 3])
    llama.session.step(4)


def test_each_kernel_is_prepared_by_its_own_function() -> None:
    for k, prepare in tape._PREPARE.items():
        module = k.py_func.__module__.rpartition(".")[2]
        assert {module, k.py_func.__name__} <= set(prepare.py_func.__code__.co_names)


@kernel
def _meet(met, looks, task, thread):  # type: ignore[no-untyped-def]
    met[8 * thread] = 1
    for _ in range(looks):
        if met[0] + met[8] == 2:
            break
        met[16 + 8 * thread] += 1


@kernel
def meet(crew, met, looks):  # type: ignore[no-untyped-def]
    share_long(crew, 2, _meet, (met, looks))


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="nobody to meet")
def test_nobody_sleeps_while_calls_are_played() -> None:
    """A worker that finds nothing to do for a while is there when the next call comes; nothing else would wake it."""
    crew, met, deadline = Crew(2), np.zeros(32, np.int64), time.monotonic() + 60

    def calls() -> None:
        time.sleep(20 * AWAKE)
        meet(crew.state, met, 10_000_000)

    while met[:16].sum() < 2 and time.monotonic() < deadline:  # the other core may be busy
        met[:] = 0
        crew.play(calls)
    assert met[:16].sum() == 2
