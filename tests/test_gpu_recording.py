"""Steps that are recorded on a card: what they read is renewed, and what they write is theirs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_host import stream
from emulated import EmulatedDevice, emulated_ops
from make_palu import make_palu
from test_gpu_decoder import HALVES, far_from

from kernels_gpu.ops import GpuOps
from minirt import Llama

STEPS = [*range(4, 22)]
TURNING = "streaming:budget=12:sinks=4:positions=reindexed"  # queries to other positions


@pytest.fixture(scope="module")
def gpu() -> GpuOps:
    ops: GpuOps = emulated_ops().ops
    return ops


@pytest.fixture
def captures(gpu: GpuOps, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was captured, or None where that failed."""
    found, capture = [], gpu.device.capture

    def noted(run: Callable[[], None]) -> Any:
        found.append(None)
        found[-1] = capture(run)
        return found[-1]

    monkeypatch.setattr(gpu.device, "capture", noted)
    return found


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("policy", ["lm-infinite:budget=12:sinks=4", TURNING])
def test_turns_are_renewed(
    gpu: GpuOps, captures: list[Any], monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path, policy: str,
    latent: bool,
) -> None:  # fmt: skip
    """From the first tokens, which become sinks, to those that lose sight of them."""
    path = make_palu(tiny, tmp_path / "model.gguf", 2, latent="f16") if latent else tiny
    with monkeypatch.context() as m:
        m.setattr("minirt.llama.open_ops", lambda *args: gpu)
        card = Llama.load(path, policy=policy, kv="auto" if latent else "f32")
    with card, Llama.load(path, policy=policy, kv="auto" if latent else "f32", device="reference") as truth:
        for session in (card.session, truth.session):
            session.feed([1, 2])
        for token in STEPS:
            assert far_from(card.session.step(token), truth.session.step(token)) < (8e-3 if latent else 1e-3)
    assert None not in captures
    assert len(captures) < len(STEPS) / 2  # the last ones are the same, again and again


@pytest.mark.parametrize("policy", ["lm-infinite:budget=12:sinks=4", TURNING, "d2o:budget=14"])
def test_a_step_that_cannot_be_recorded_is_made(
    gpu: GpuOps, monkeypatch: pytest.MonkeyPatch, tiny: Path, policy: str
) -> None:
    """Once, with what the attempt has left in the cache."""
    monkeypatch.setattr("minirt.llama.open_ops", lambda *args: gpu)
    monkeypatch.setattr(gpu.device, "capture", lambda run: stream.capture(run) and None)
    found = []
    for record in (gpu.record, lambda step: (step(gpu), None)):
        monkeypatch.setattr(gpu, "record", record)
        monkeypatch.setattr(gpu, "_failures", -len(STEPS))
        with Llama.load(tiny, policy=policy, kv="f32") as card:
            card.session.feed([1, 2])
            found.append([card.session.step(token).copy() for token in STEPS])
    assert np.array_equal(*found)


def test_a_step_that_is_interrupted(gpu: GpuOps, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    """While it is recorded, as the first of another kind: it is made later, and none that was recorded before."""
    monkeypatch.setattr("minirt.llama.open_ops", lambda *args: gpu)
    monkeypatch.setattr(gpu, "_recorded_before", True)

    def interrupted(run: Callable[[], None]) -> None:
        stream.capture(run)
        raise KeyboardInterrupt

    def steps(card: Llama, *tokens: int) -> np.ndarray:
        return np.array([card.session.step(token).copy() for token in tokens])

    text = list(range(20, 26))  # two less than there are before the first ones are out of the window
    with Llama.load(tiny, policy=TURNING, kv="f32") as card:
        card.session.feed(text)
        truth = steps(card, 5, 6, 7, 8)
    with Llama.load(tiny, policy=TURNING, kv="f32") as card:
        card.session.feed(text)
        assert np.array_equal(steps(card, 5, 6), truth[:2])
        with monkeypatch.context() as m:
            m.setattr(gpu.device, "capture", interrupted)
            with pytest.raises(KeyboardInterrupt):
                card.session.step(7)
        assert card.session.cache.recorded is None
        card.session.feed([*text, 5, 6])
        assert far_from(steps(card, 7, 8), truth[2:]) < HALVES


def test_steps_of_many_sequences(gpu: GpuOps, captures: list[Any], monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    """More than have scratch: memory that a step asks for is its own."""
    found = []
    monkeypatch.setattr("minirt.llama.open_ops", lambda *args: gpu)
    for record in (gpu.record, lambda step: (step(gpu), None)):
        monkeypatch.setattr(gpu, "record", record)
        with Llama.load(tiny, kv="f32") as card:
            decoder = card.decoder
            cache = decoder.new_cache(card.session.cache.plan, 9)
            for seq in range(9):
                decoder.prefill(cache, [seq + 1, 5], seq, logits="none")
            found.append([decoder.decode(cache, [*range(i, i + 9)]) for i in range(4)])
    assert len(captures) == 1
    assert np.array_equal(*found)


def test_counters_of_a_step_that_cannot_be_recorded(gpu: GpuOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are zeros, though what made them so was captured and never done."""
    found: list[Any] = []

    def capture(run: Callable[[], None]) -> None:
        stream.capture(run)

    def step(ops: Any) -> Any:
        found.append(ops._counters(1 << 12))
        return found[-1]

    monkeypatch.setattr(gpu, "_recorded_before", True)
    monkeypatch.setattr(gpu.device, "capture", capture)
    assert gpu.record(step)[1] is None
    assert not gpu.device.download(found[-1]).any()


def test_a_card_that_records_nothing_is_not_asked_for_ever(gpu: GpuOps, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(gpu, "_recorded_before", True)
    monkeypatch.setattr(gpu, "_failures", 0)
    monkeypatch.setattr(gpu.device, "capture", lambda run: asked.append(1))
    assert [gpu.record(lambda ops: 5) for _ in range(9)] == 9 * [(5, None)]
    assert len(asked) == 3


def test_what_a_capture_may_not_do() -> None:
    device = EmulatedDevice()
    a = device.upload(np.arange(3.0, dtype=np.float32))
    for call in (lambda: device.upload(np.ones(1)), lambda: device.download(a), device.synchronize):
        with pytest.raises(RuntimeError, match="while a stream is captured"):
            device.capture(call)


def test_a_recorded_step_keeps_its_scratch() -> None:
    """Though a later call asks for more, and gets other memory."""
    ops = emulated_ops().ops

    def step(ops: Any) -> Any:
        ops._buffer("some", (4,))
        ops._counters(4)
        return None

    ops.record(step)
    _, again = ops.record(step)
    assert again is not None
    kept = [weakref.ref(ops._scratch[name]) for name in ("some float32", "counters")]
    ops._buffer("some", (400,))
    ops._counters(400)
    assert all(array() is not None for array in kept)
    again()
    del again
    gc.collect()
    assert all(array() is None for array in kept)
