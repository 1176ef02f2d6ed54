"""Whole models on an emulated card, and on a real one if there is any, against the reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import make_gguf
import numpy as np
import pytest
from conftest import Cli
from emulated import EmulatedDevice, device_ops, emulated_ops, has_card
from make_gguf import tiny_model
from make_palu import make_palu

import kernels_gpu
from kernels_gpu.row_ops import ROWS_OF_ONE
from minirt import Llama
from minirt.bandwidth import models
from minirt.bench import Workload, measure
from minirt.sampling import Sampling

Load = Callable[..., Llama]
HALVES = 4e-3  # of prompts, whose products are made of halves: by the last layer
EXACT = 1e-4  # of float32 throughout


@pytest.fixture(scope="module", params=["emulated", "gpu"] if has_card() else ["emulated"])
def device(request: pytest.FixtureRequest) -> Any:
    return (emulated_ops() if request.param == "emulated" else device_ops("gpu")).ops


@pytest.fixture
def on_card(device: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Llama.load(...) on the emulated card."""

    @contextmanager
    def load(path: Path, **options: Any) -> Iterator[Llama]:
        with monkeypatch.context() as m:
            m.setattr("minirt.llama.open_ops", lambda *args: device)
            llama = Llama.load(path, **options)
        with llama:
            yield llama

    return load


def far_from(ours: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(ours - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_models(on_card: Any, tmp_path: Path, arch: str) -> None:
    path = tiny_model(tmp_path / "model.gguf", arch=arch, tied=arch != "qwen2")
    with on_card(path) as card, Llama.load(path, device="reference") as truth:
        for session, other in ((card.session, truth.session),):
            assert far_from(session.feed([5, 6, 7]), other.feed([5, 6, 7])) < 1e-3
            for token in (9, 8, 7):
                assert far_from(session.step(token), other.step(token)) < 1e-3
            longer = [5, 6, 7, *range(20, 50)]
            assert far_from(session.feed(longer), other.feed(longer)) < HALVES


def test_recorded_steps_are_the_steps(on_card: Any, device: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[int] = []
    capture = device.device.capture

    def counted(run: Any) -> Any:
        captured.append(1)
        return capture(run)

    def logits() -> np.ndarray:
        with on_card(tiny) as card:
            card.session.feed(list(range(4, 9)))
            steps = [card.session.step(token).copy() for token in (1, 2, 3, 4, 5)]
            card.session.feed([4, 5, 30])  # something else between, at another place
            return np.array([*steps, *(card.session.step(token).copy() for token in (1, 2, 3))])

    monkeypatch.setattr(device.device, "capture", counted)
    recorded = logits()
    assert 1 <= len(captured) <= 4  # not one for each of 8 steps
    monkeypatch.setattr(device, "record", lambda step: (step(device), None))
    assert np.array_equal(recorded, logits())


@pytest.mark.parametrize(
    ("arch", "latent", "n"), [("llama", "f16", 17), ("qwen2", "q4", 3), ("qwen3", "f16", 17), ("qwen3", "q3", 3)]
)
def test_latents(on_card: Any, tmp_path: Path, arch: str, latent: str, n: int) -> None:
    """Palu; steps after the second are recorded. Of few bits only where products are not made of halves: another code
    for a number that differs a little is much more than that."""
    source, prompt = tiny_model(tmp_path / "source.gguf", arch=arch), list(range(20, 20 + n))
    path = make_palu(source, tmp_path / "model.gguf", 2, latent=latent)
    with on_card(path) as card, Llama.load(path, device="reference") as truth:
        assert far_from(card.session.feed(prompt), truth.session.feed(prompt)) < 2 * HALVES
        for token in (9, 8, 7, 6):
            assert far_from(card.session.step(token), truth.session.step(token)) < 2 * HALVES


@pytest.fixture
def floats(device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that computes in float32 throughout, prompts too: its weights are, and few rows go through it together,
    whose results then need memory of their own."""
    monkeypatch.setattr("minirt.decoder.CHUNK", ROWS_OF_ONE)
    monkeypatch.setattr(device, "_own", lambda name, shape: device.device.empty(shape, np.float32))
    model, rng = make_gguf.tiny(), np.random.RandomState(1)
    for name, entry in model.tensors.items():
        if len(entry.dims) > 1:
            model.tensors[name] = make_gguf.weight(rng, make_gguf.F32, *entry.dims[::-1])
    return model.write(tmp_path / "floats.gguf")


@pytest.mark.parametrize("policy", ["window:budget=14", "h2o:budget=14", "tova:budget=14"])
def test_policies_over_latents(on_card: Any, floats: Path, tmp_path: Path, policy: str) -> None:
    path, found = make_palu(floats, tmp_path / "model.gguf", 2, latent="f16"), []
    with on_card(path, policy=policy) as card, Llama.load(path, policy=policy, device="reference") as truth:
        for session in (card.session, truth.session):
            logits = [session.feed(list(range(20, 41)))]
            found.append([*logits, *(session.step(token).copy() for token in (9, 8, 7, 6))])
    for ours, theirs in zip(*found, strict=True):
        assert far_from(ours, theirs) < HALVES


@pytest.fixture
def brought(device: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Shape and type of what leaves the device."""
    found: list[tuple[Any, ...]] = []
    download = device.device.download

    def noted(array: Any) -> Any:
        found.append((array.shape, np.dtype(array.dtype)))
        return download(array)

    monkeypatch.setattr(device.device, "download", noted)
    return found


@pytest.mark.parametrize("n", [1, 3])
def test_a_token_is_all_that_a_greedy_step_brings_back(on_card: Any, brought: Any, tiny: Path, n: int) -> None:
    with on_card(tiny) as card:
        prompts = [[i + 4, i + 5] for i in range(n)]
        card.generate(prompts, max_tokens=6, sampling=Sampling(temperature=0))
        first = (1, card.config.n_vocab), np.float32
    assert brought == [first] * n + [((n,), np.int32)] * 5


def test_a_token_is_all_that_a_timed_step_brings_back(on_card: Any, brought: Any, tiny: Path) -> None:
    with on_card(tiny) as card:
        measure(card, Workload(n_gen=3, n_sequences=2), repetitions=1, warmup=False)
        plan, work = card.session.cache.plan, models.Workload(2, 0, "f16", 4, 1)
        models.Run(card.decoder, card.decoder.new_cache(plan, 2), work)()
    assert brought == [((2,), np.int32)] * (3 + 4)


def test_sequences_side_by_side(on_card: Any, tiny: Path) -> None:
    prompts = [[5, 6, 7, 8], [9], list(range(30, 42))]
    with on_card(tiny) as card, Llama.load(tiny, device="reference") as truth:
        ours, theirs = (
            [a.tokens for a in m.generate(prompts, max_tokens=3, sampling=Sampling(temperature=0))]
            for m in (card, truth)
        )
    assert ours == theirs


def test_out_of_memory_is_one_line(on_card: Any, device: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with on_card(tiny) as card:
        first = card.session.feed([5, 6, 7])

        def full(*args: Any) -> Any:
            raise MemoryError("the card")

        with monkeypatch.context() as m:
            m.setattr(device.device, "empty", full)
            with pytest.raises(MemoryError):
                card.session.feed([5, 6, *range(10, 90)])
        assert np.array_equal(card.session.feed([5, 6, 7]), first)


@pytest.fixture
def card(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What --device gpu opens."""
    if isinstance(device.device, EmulatedDevice):
        monkeypatch.setattr(device.device, "memory", (512 << 20, 1 << 30))
    monkeypatch.setattr(kernels_gpu, "open_card", lambda: device)


def test_commands(card: None, device: Any, cli: Cli, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the hen in the inn " * 40)
    run = ("run", tiny, "-p", "the", "-n", "4", "--temp", "0", "--device", "gpu")
    chat = ("chat", tiny, "--device", "gpu", "-n", "3", "--temp", "0")
    bench = ("bench", tiny, "-p", "16", "-n", "4", "-r", "1", "-o", "json", "--device", "gpu")
    perplexity = ("perplexity", tiny, "-f", text, "-c", "32", "--chunks", "2", "--json", "--device")
    evaluate = ("eval", tiny, "-f", text, "--task", "repetition", "--length", "64", "-n", "1", "-o", "json", "--device")
    for command, given in ((run, None), (chat, "hello\n"), (bench, None), (perplexity, None), (evaluate, None)):
        result = cli(*command, *(["gpu"] if command in (perplexity, evaluate) else []), input=given)
        assert result.exit_code == 0, result.stderr
        assert result.stdout
        if command is bench:
            (first, *_) = json.loads(result.stdout)
            assert (first["backends"], first["gpu_info"]) == ("CUDA", device.device.name)
            assert first["memory_bytes_per_second"] > 0
        if command is evaluate:
            truth, found = json.loads(cli(*evaluate, "reference").stdout), json.loads(result.stdout)
            assert [row["score"] for row in found] == [row["score"] for row in truth]
        if command is perplexity:
            truth = json.loads(cli(*perplexity, "reference").stdout)["ppl"]
            assert json.loads(result.stdout)["ppl"] == pytest.approx(truth, rel=1e-3)


POLICIES = [
    "dense", "sparq:r=8:k=12", "sparq:r=8:k=12:reallocate=on:local=2:gqa=sum-logit", "topk:k=12", "window:budget=14",
    "streaming:budget=14", "lm-infinite:budget=14:sinks=4", "h2o:budget=14", "tova:budget=14",
    "tova:budget=14:compress=stepwise", "d2o:budget=14",
]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(on_card: Any, floats: Path, policy: str) -> None:
    """A prompt beyond the budget, steps (of which all but the first are recorded), something forgotten, more steps.

    From the same numbers: where prompts are rounded to halves another row may be chosen, and all after it differs.
    """
    found = []
    options = {"policy": policy, "kv": "f32"}
    with on_card(floats, **options) as card, Llama.load(floats, **options, device="reference") as t:
        for session in (card.session, t.session):
            logits = [session.feed(list(range(20, 41)))]
            logits += [session.step(token).copy() for token in (5, 6, 7, 8)]
            logits.append(session.feed([*range(20, 41), 5, 6, 50, 51]))
            logits += [session.step(token).copy() for token in (9, 10)]
            found.append(np.array(logits))
    for ours, truth in zip(*found, strict=True):
        assert far_from(ours, truth) < EXACT
