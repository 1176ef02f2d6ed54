"""The decoder against implementations that are not ours: tiny models of every architecture, and SmolLM2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import golden
import numpy as np
import pytest

from kernels_cpu.integer_products import HAS_WORDS
from minirt import Llama
from minirt.errors import ModelError

CASES = {case.name: case for case in golden.cases()}
# Weights in blocks meet activations in 14 or 16 bits on the CPU (at most 1.3e-4 here).
EXACT, ROUNDED = 2e-5, 1e-3
WORDS = 3e-4 if HAS_WORDS else EXACT


def allowed(case: golden.Case, device: str, rounded: float) -> float:
    return rounded if device == "cpu" and case.model.get("type", "F").startswith(("Q", "IQ")) else EXACT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_logits_of_a_tiny_model(folder: Path, name: str, device: str) -> None:
    case = CASES[name]
    with Llama.load(golden.build(case, folder), device=device, kv="f32") as llama:
        logits = llama.logits(case.tokens)[case.positions]
    assert np.abs(logits - case.logits).max() <= allowed(case, device, WORDS) * np.abs(case.logits).max()


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_steps_equal_the_prompt(folder: Path, name: str, device: str) -> None:
    """Prefill in chunks of odd lengths, then token by token: the same logits as the whole prompt at once."""
    case = CASES[name]
    tokens = case.tokens[:40]
    with Llama.load(golden.build(case, folder), device=device, kv="f32", n_ctx=64) as llama:
        whole = llama.logits(tokens)
        decoder, cache = llama.decoder, llama.session.cache
        parts = [decoder.prefill(cache, tokens[:1], logits="all"), decoder.prefill(cache, tokens[1:14], logits="all")]
        parts += [decoder.decode(cache, [token]) for token in tokens[14:]]
    assert np.abs(np.concatenate(parts) - whole).max() <= allowed(case, device, ROUNDED) * np.abs(whole).max()


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_the_most_likely_token(folder: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, logits, tokens = CASES["llama-gqa3-d64-tied"], [], [7]
    with Llama.load(golden.build(case, folder), device=device, kv="f32", n_ctx=64) as llama:
        decoder = llama.decoder
        for _ in range(5):
            tokens += decoder.choose(llama.session.cache, tokens[-1:])
        cache = decoder.new_cache(llama.session.cache.plan)
        logits = [decoder.decode(cache, [token])[0] for token in tokens[:-1]]  # kept: each is the caller's own
        assert tokens[1:] == [int(np.argmax(row)) for row in logits]
        for wrong in ([llama.config.n_vocab], [-1], [1, 2], []):  # when the step is played again, too
            with pytest.raises(ValueError, match="token"):
                decoder.choose(cache, wrong)
        llama.decoder.weights.output_norm[0] = np.nan
        with pytest.raises(ModelError, match="the logits are not finite"):
            decoder.choose(cache, [1])


def test_sequences_of_a_batch_do_not_mix(folder: Path) -> None:
    """Three sequences of different lengths, decoded together, give what each gives alone."""
    case = CASES["llama-gqa3-d64-tied"]
    from minirt.cache import allocate_cache

    with Llama.load(golden.build(case, folder), kv="f32", n_ctx=64) as llama:
        decoder = llama.decoder
        cache = allocate_cache(llama.session.cache.plan, llama.config, decoder.ops, n_sequences=3)
        lengths = [1, 9, 20]
        for seq, n in enumerate(lengths):
            decoder.prefill(cache, case.tokens[:n], seq, logits="none")
        together = decoder.decode(cache, [case.tokens[n] for n in lengths])
        alone = [llama.logits(case.tokens[: n + 1])[-1] for n in lengths]
    assert np.abs(together - alone).max() <= 2e-5 * np.abs(alone).max()


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_the_f16_cache_stays_close(folder: Path, device: str) -> None:
    case = CASES["llama-gqa4-d80"]
    with Llama.load(golden.build(case, folder), device=device, kv="f16") as llama:
        logits = llama.logits(case.tokens)[case.positions]
    assert 0 < np.abs(logits - case.logits).max() <= 5e-3 * np.abs(case.logits).max()


# -- SmolLM2 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[("cpu", "f16"), ("reference", "f32")], ids=["cpu-f16", "reference-f32"])
def smollm2_on(request: pytest.FixtureRequest, smollm2: Path) -> Iterator[Llama]:
    device, kv = request.param
    with Llama.load(smollm2, device=device, kv=kv, n_ctx=1024) as llama:
        yield llama


def test_greedy_continuations(smollm2_on: Llama) -> None:
    """The same tokens as llama.cpp on exact (F16) weights where its own margin decides; we follow its text."""
    compared = 0
    for answer in golden.smollm2()[0]:
        tokens = smollm2_on.tokenize(answer.text, parse_special=answer.parse_special)
        assert tokens == list(answer.prompt)
        if smollm2_on.decoder.ops.name == "reference":  # too slow to go step by step
            logits = smollm2_on.logits([*tokens, *answer.tokens[:-1]])[len(tokens) - 1 :]
        else:
            logits = [smollm2_on.session.feed(tokens), *map(smollm2_on.session.step, answer.tokens[:-1])]
        for ours, token, other, margin in zip(logits, answer.tokens, answer.runners_up, answer.margins, strict=True):
            assert ours.argmax() in ((token,) if margin > 0.02 else (token, other))
            compared += margin > 0.02
    assert compared > 740


def test_distributions_on_text(smollm2_on: Llama) -> None:
    """Mean KL divergence and agreement over two windows of 512, scored as llama-perplexity does."""
    windows = golden.smollm2()[1]
    klds, same, gaps = [], [], []
    for w, tokens in enumerate(windows.tokens):
        logits = smollm2_on.logits(tokens)[256:511]
        logprobs = logits - np.logaddexp.reduce(logits.astype(np.float64), axis=1, keepdims=True)
        klds.append(golden.coarse_kld(windows.top_ids[w], windows.top_logprobs[w], logprobs))
        same.append(logits.argmax(1) == windows.top_ids[w, :, 0])
        gaps.append(logprobs[np.arange(255), tokens[257:]] - windows.next_logprobs[w])
    assert np.mean(klds) <= 1e-4
    assert np.mean(same) >= 0.99
    assert abs(np.mean(gaps)) <= 1e-3  # of a perplexity: 0.1 %
