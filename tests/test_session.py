"""A session computes only what is new, and survives being interrupted anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minirt import Llama, ModelError, Sampling
from minirt import session as module
from minirt.sampling import Sampler


@pytest.fixture
def llama(tiny: Path) -> Iterator[Llama]:
    with Llama.load(tiny, n_ctx=64, kv="f32", device="reference") as loaded:
        yield loaded


TEXT = [5, 9, 33, 7, 7, 120, 64, 2, 5, 200, 18, 90]


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return np.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_only_what_is_new_is_computed(llama: Llama) -> None:
    s = llama.session
    truth = {n: llama.logits(TEXT[:n])[-1] for n in (8, 10, 12)}
    assert close(s.feed(TEXT[:8]), truth[8])
    assert s.timings.prompt_tokens == 8
    assert close(s.feed(TEXT[:12]), truth[12])
    assert s.timings.prompt_tokens == 4
    # Going back: the last token is computed again, for its logits.
    assert close(s.feed(TEXT[:10]), truth[10])
    assert s.timings.prompt_tokens == 1
    assert s.tokens == TEXT[:10]
    # Another text with the same beginning.
    other = [*TEXT[:4], 11, 12]
    assert close(s.feed(other), llama.logits(other)[-1])
    assert s.timings.prompt_tokens == 2


@pytest.mark.parametrize("chunk", [1, 3, 4, 12])
def test_chunks_do_not_matter(llama: Llama, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PREFILL_CHUNK", chunk)
    heard: list[tuple[int, int]] = []
    logits = llama.session.feed(TEXT, lambda done, total: heard.append((done, total)))
    assert close(logits, llama.logits(TEXT)[-1])
    assert heard[-1] == (12, 12)
    assert len(heard) == -(-12 // chunk)


def test_steps_and_their_cost(llama: Llama) -> None:
    s = llama.session
    s.feed(TEXT[:5])
    for token in TEXT[5:8]:
        logits = s.step(token)
    assert close(logits, llama.logits(TEXT[:8])[-1])
    c = llama.config
    row = 2 * c.head_dim * 4 * c.n_head_kv * c.n_layer
    assert s.timings.tokens == 3
    assert s.timings.bytes_read == 3 * s.weight_bytes + row * (6 + 7 + 8)


def test_too_long_and_empty_leave_everything_as_it_was(llama: Llama) -> None:
    llama.session.feed(TEXT)
    with pytest.raises(ModelError, match=r"65 tokens, the context holds 64"):
        llama.session.feed([1] * 65)
    with pytest.raises(ModelError, match="empty"):
        llama.session.feed([])
    assert llama.session.tokens == TEXT
    llama.session.feed([*TEXT, 3])
    assert llama.session.timings.prompt_tokens == 1


def test_a_full_context_ends_the_answer(llama: Llama) -> None:
    logits = llama.session.feed([1] * 60)
    tokens = list(llama.session.generate(logits, Sampler(Sampling(temperature=0)), 100))
    assert len(tokens) == 5  # the fifth is known without being cached
    assert len(llama.session.tokens) == 64


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_an_interrupt_loses_nothing(llama: Llama, phase: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a layer: what is cached and what is believed to be cached still agree."""
    monkeypatch.setattr(module, "PREFILL_CHUNK", 4)
    policy_class, method = type(llama.decoder.policy), "prefill" if phase == "prefill" else "attend"
    original, left = getattr(policy_class, method), calls

    def interrupted(*args: Any) -> Any:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return original(*args)

    s = llama.session
    logits = s.feed(TEXT[:3])
    with monkeypatch.context() as patch:
        patch.setattr(policy_class, method, interrupted)
        answer = s.generate(logits, Sampler(Sampling(temperature=0)), 20)
        with pytest.raises(KeyboardInterrupt):
            s.feed(TEXT) if phase == "prefill" else list(answer)
    assert close(s.feed(TEXT), llama.logits(TEXT)[-1])
    assert s.tokens == TEXT
