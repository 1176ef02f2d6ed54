"""The Python API as its users call it."""

from __future__ import annotations

from pathlib import Path

import make_gguf
import numpy as np
import pytest

import minirt
from minirt import Llama, ModelError, Sampling, UsageError

GREEDY = Sampling(temperature=0)


def test_public_names() -> None:
    for name in minirt.__all__:
        assert getattr(minirt, name) is not None
    with pytest.raises(AttributeError, match="Lama"):
        _ = minirt.Lama


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("kv", ["f16", "f32"])
def test_load_and_speak(tiny: Path, device: str, kv: str) -> None:
    with Llama.load(tiny, device=device, kv=kv, n_ctx=32) as llama:
        assert llama.n_ctx == 32
        answer = llama.generate("ab", max_tokens=5, sampling=GREEDY)
        assert answer.finish_reason in ("length", "stop")
        assert len(answer.tokens) <= 5
        assert answer.text == llama.detokenize(answer.tokens)
        assert "".join(llama.stream("ab", max_tokens=5, sampling=GREEDY)) == answer.text


def test_tokens_are_a_prompt_too(tiny: Path) -> None:
    with Llama.load(tiny, n_ctx=32) as llama:
        text = llama.generate("hello", max_tokens=4, sampling=GREEDY).text
        assert llama.generate(llama.tokenize("hello"), max_tokens=4, sampling=GREEDY).text == text


def test_logits_leave_the_session_alone(tiny: Path) -> None:
    with Llama.load(tiny, n_ctx=32) as llama:
        llama.session.feed([1, 2, 3])
        logits = llama.logits([4, 5])
        assert logits.shape == (2, llama.config.n_vocab)
        assert logits.dtype == np.float32
        assert llama.session.tokens == [1, 2, 3]


def test_progress_counts_to_the_end(tiny: Path) -> None:
    heard: list[tuple[int, int]] = []
    with Llama.load(tiny, progress=lambda done, total: heard.append((done, total))):
        assert heard[-1][0] == heard[-1][1] == len(heard)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"n_ctx": 1}, "--ctx 1 is out of range"),
        ({"n_ctx": -5}, "--ctx -5 is out of range"),
        ({"n_ctx": 10**9}, "GiB of KV cache, this machine has"),
        ({"threads": 0}, "--threads 0 is out of range"),
        ({"threads": 10_000}, "--threads 10000 is out of range"),
        ({"policy": "magic"}, "unknown policy 'magic' .one of: dense"),
        ({"kv": "q1"}, "unknown KV type 'q1' .one of: f32, f16"),
        ({"device": "tpu"}, "unknown device 'tpu' .one of: auto"),
    ],
)
def test_impossible_arguments(tiny: Path, arguments: dict, line: str) -> None:
    with pytest.raises(UsageError, match=line):
        Llama.load(tiny, **arguments)


def test_unusable_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing\.gguf"):
        Llama.load(tmp_path / "nothing.gguf")


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(tiny: Path) -> None:
    with Llama.load(tiny, n_ctx=32) as llama:
        most = 32 * llama.tokenizer.longest
        with pytest.raises(
            ModelError, match=f"the prompt has {most + 1} bytes, the context of 32 tokens holds at most"
        ):
            llama.stream("a" * (most + 1))
        with pytest.raises(ModelError, match="the context holds 32"):
            llama.generate("a" * most)


def test_token_ids_are_checked(tiny: Path) -> None:
    with Llama.load(tiny, n_ctx=32) as llama:
        for call in (llama.logits, lambda tokens: llama.stream(tokens).finish()):
            with pytest.raises(ModelError, match="token id 99999 is out of range"):
                call([1, 99999])
            with pytest.raises(ModelError, match="empty"):
                call([])


def test_chat_is_the_template_and_stops_at_its_end(smollm2: Path) -> None:
    with Llama.load(smollm2, n_ctx=512) as llama:
        messages = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
        answer = llama.chat(messages, max_tokens=40, sampling=GREEDY)
        assert "Paris" in answer.text
        assert answer.finish_reason == "stop"
        assert "<|im_end|>" not in answer.text
        # The next turn only computes what is new.
        messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "And of Italy?"}]
        again = llama.chat(messages, max_tokens=30, sampling=GREEDY)
        assert "Rome" in again.text
        assert again.timings.prompt_tokens < 20


def test_the_default_model_knows_paris(smollm2: Path) -> None:
    with Llama.load(n_ctx=64) as llama:
        assert "Paris" in llama.generate("The capital of France is", max_tokens=8, sampling=GREEDY).text


def test_closing_twice_is_closing_once(tiny: Path) -> None:
    with Llama.load(tiny, n_ctx=32) as llama:
        llama.close()
    with pytest.raises(ModelError, match="this model is closed"):
        llama.generate("x")
    with pytest.raises(AttributeError, match="decoders"):
        _ = llama.decoders


def test_a_session_gives_one_answer_at_a_time(tiny: Path) -> None:
    with Llama.load(tiny, n_ctx=64) as llama:
        first = llama.stream("hello", max_tokens=10, sampling=GREEDY)
        next(first)
        other = llama.generate("another", max_tokens=3, sampling=GREEDY)
        with pytest.raises(UsageError, match="another answer was begun"):
            first.finish()
        assert other.timings.tokens == len(other.tokens) - 1
        assert llama.generate("x", max_tokens=5, sampling=GREEDY).timings.tokens <= 4
        assert other.timings.tokens == len(other.tokens) - 1


def test_a_stop_may_be_one_string(tiny: Path) -> None:
    with Llama.load(tiny, n_ctx=64) as llama:
        text = llama.generate("hello", max_tokens=12, sampling=GREEDY).text
        stop = text[2:4]
        assert llama.generate("hello", max_tokens=12, sampling=GREEDY, stop=stop).text == text[: text.find(stop)]


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_damaged_weights_are_one_clear_error(tmp_path: Path, device: str) -> None:
    model = make_gguf.tiny()
    embeddings = model.tensors["token_embd.weight"]
    values = np.frombuffer(embeddings.data, np.uint8).copy()
    values[:] = 0xFF  # NaN, whatever the float type
    embeddings.data = values.tobytes()
    with (
        Llama.load(model.write(tmp_path / "nan.gguf"), n_ctx=32, device=device) as llama,
        pytest.raises(ModelError, match="the logits are not finite"),
    ):
        llama.generate("hello", max_tokens=3)


def test_random_damage_reaches_kernels_and_does_no_harm(tmp_path: Path) -> None:
    """Bytes anywhere in the tensors replaced: an answer or one clear error, never another exception."""
    good = make_gguf.tiny().to_bytes()
    rng = np.random.RandomState(7)
    outcomes = set()
    for _ in range(60):
        data = np.frombuffer(good, np.uint8).copy()
        data[rng.randint(len(data) // 4, len(data), rng.randint(1, 400))] = rng.randint(0, 256)
        path = tmp_path / "damaged.gguf"
        path.write_bytes(data.tobytes())
        try:
            with Llama.load(path, n_ctx=32) as llama:
                llama.generate([1, 2, 3], max_tokens=3)
            outcomes.add("answered")
        except ModelError:
            outcomes.add("refused")
    assert outcomes == {"answered", "refused"}
