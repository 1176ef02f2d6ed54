"""Files with low-rank keys and values: what they may say, what they compute, and what goes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Cli, only_line
from golden import MODELS, make_model
from make_palu import factors, make_palu

from minirt import Llama
from minirt.config import ModelConfig
from minirt.errors import ModelError, UsageError
from minirt.gguf_file import GGUFFile
from minirt.llama import bytes_per_token
from minirt.stores import get_stores
from minirt.weights import check_tensors

DEVICES = ("reference", "cpu")
TOKENS = [int(t) for t in np.random.RandomState(0).randint(0, 300, 90)]
# A model, KV heads in a group, and the full rank.
FULL = [
    ("llama-gqa3-d64-tied", 2, 128),
    ("llama-gqa4-d80", 1, 80),
    ("llama-ropefreqs-long", 2, 128),
    ("llama-yarn-long", 1, 64),
    ("qwen2-gqa3-d128", 1, 128),
    ("qwen3-gqa1-d80", 2, 160),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("palu")


def source(folder: Path, name: str, **changes: Any) -> Path:
    path = folder / f"{name}-{'-'.join(map(str, changes.values()))}.gguf"
    if not path.exists():
        make_model(str(path), **MODELS[name] | changes)
    return path


@pytest.fixture(scope="module")
def low(folder: Path) -> Path:
    """3 layers whose ranks differ, 6 query heads, 2 KV heads of 64 in one group."""
    path = source(folder, "llama-gqa3-d64-tied")
    return make_palu(path, folder / "low.gguf", 2, [32, 64, 96], [96, 128, 32], latent="q4", type="F16")


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm((a - b).astype(np.float64)) / np.linalg.norm(b.astype(np.float64)))


# -- what a model computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "group_size", "rank"), FULL)
def test_full_rank_is_the_model(folder: Path, name: str, group_size: int, rank: int, device: str) -> None:
    """Rebuilt before it is cached: to 1e-4. Latents in float16: to what rounding them costs, as with a cache in float16
    of such random models; and a step is a prompt of one token."""
    path = source(folder, name)
    made = folder / f"{name}-full.gguf"
    if not made.exists():
        make_palu(path, made, group_size, rank, rank)
    found = {}
    for key, file, kv in (("truth", path, "f32"), ("whole", made, "f32"), ("latents", made, "auto")):
        with Llama.load(file, device=device, kv=kv, n_ctx=128) as llama:
            assert llama.session.cache.plan.k_store.latent == (key == "latents")
            found[key] = llama.logits(TOKENS[:72])
            steps = [llama.session.feed(TOKENS[:66]), *(llama.session.step(t) for t in TOKENS[66:72])]
            assert distance(np.array(steps), found[key][65:]) <= 2e-4
    assert distance(found["whole"], found["truth"]) <= 1e-4
    assert distance(found["latents"], found["truth"]) <= 2e-3


def test_low_rank_is_the_product_of_its_factors(folder: Path) -> None:
    """A file of factors and a plain one with their product in place of the weights."""
    path = source(folder, "qwen2-gqa1-d64-tied")
    made = make_palu(path, folder / "low32.gguf", 1, 32, 32)
    with GGUFFile.open(path) as file:
        weight = file.tensors["blk.1.attn_v.weight"].data.view(np.float32)
    first, second = factors(weight, 2, 32)
    expected = np.concatenate([second[:64] @ first[:32], second[64:] @ first[32:]])
    with Llama.load(made, kv="f32", device="reference") as llama:
        assert distance(llama.decoder.weights.layers[1].wv.values, expected) <= 1e-6
        whole = llama.logits(TOKENS)
    for device in DEVICES:
        with Llama.load(made, kv="latent-f16", device=device) as llama:
            assert distance(llama.logits(TOKENS), whole) <= 2e-3


@pytest.mark.parametrize("kv", ["latent-f16", "latent-q4", "latent-q3", "latent-f16/latent-q3"])
def test_the_cpu_does_as_the_reference(low: Path, kv: str) -> None:
    outs = []
    for device in DEVICES:
        with Llama.load(low, device=device, kv=kv) as llama:
            outs.append([llama.session.feed(TOKENS[:60]), *(llama.session.step(t) for t in TOKENS[60:70])])
    assert distance(np.array(outs[1]), np.array(outs[0])) <= 2e-2 if "q" in kv else 1e-3  # a code may go either way


@pytest.mark.parametrize(
    "policy", ["dense", "streaming:budget=16", "lm-infinite:budget=40", "h2o:budget=16", "tova:budget=16"]
)
def test_batches_and_reuse(low: Path, policy: str) -> None:
    """Prompts together answer as each alone; a text that begins like the last one as if it were new."""
    from minirt.sampling import Sampling

    greedy = Sampling(temperature=0)
    with Llama.load(low, policy=policy, n_ctx=64) as llama:
        prompts = [TOKENS[:30], TOKENS[5:12], TOKENS[40:57]]
        together = llama.generate(prompts, max_tokens=8, sampling=greedy)
        alone = [llama.generate(p, max_tokens=8, sampling=greedy) for p in prompts]
        assert [a.tokens for a in together] == [a.tokens for a in alone]
        llama.session.reset()
        fresh = llama.session.feed(TOKENS[:33])
        llama.session.feed([*TOKENS[:30], *TOKENS[50:55]])
        assert distance(llama.session.feed(TOKENS[:33]), fresh) <= 2e-2


# -- what goes with it -------------------------------------------------------------------------------------------------


def test_names_of_stores(folder: Path, low: Path) -> None:
    with GGUFFile.open(low) as file:
        palu = ModelConfig.from_gguf(file).palu
    assert palu is not None
    assert (palu.group_size, palu.k_ranks, palu.v_ranks) == (2, (32, 64, 96), (96, 128, 32))
    for text, names in (
        ("auto", ("latent-q4", "latent-q4")),
        ("palu", ("latent-q4", "latent-q4")),
        ("latent-f16/palu", ("latent-f16", "latent-q4")),
        ("f16/q8_0", ("f16", "q8_0")),
    ):
        assert tuple(store.name for store in get_stores(text, palu)) == names
    assert get_stores("auto")[0].name == "f16"
    with pytest.raises(UsageError, match="latents of keys go with latents of values"):
        get_stores("palu/f16", palu)
    with pytest.raises(UsageError, match="unknown KV type 'latent-q5'"):
        get_stores("latent-q5", palu)


def test_refusals(cli: Cli, tiny: Path, low: Path) -> None:
    for policy, why in (
        ("sparq", "reads components of keys"),
        ("topk", "reads values of single tokens"),
        ("d2o", "merges keys and values"),
        ("d2o-code", "merges keys and values"),
    ):
        result = cli("run", low, "-p", "x", "--device", "reference", "--policy", policy)
        assert (result.exit_code, result.stdout) == (2, "")
        line = only_line(result.stderr)
        assert line == f"minirt: --policy {policy} {why}, which --kv latent-q4 does not store"
    for flags in (("--kv", "palu"), ("--kv-k", "latent-f16", "--kv-v", "latent-f16")):
        result = cli("run", tiny, "-p", "x", "--device", "reference", *flags)
        assert result.exit_code == 2
        assert "takes a file made by `minirt palu`" in only_line(result.stderr)
    result = cli("run", low, "-p", "x", "--device", "reference", "--kv-k", "latent-f16", "--kv-v", "q8_0")
    assert result.exit_code == 2
    assert "latents of keys go with latents of values" in only_line(result.stderr)
    result = cli("run", low, "-p", "x", "--device", "reference", "--ctx", 1 << 25)
    assert result.exit_code == 2
    assert "--ctx 33554432 is out of range (up to 16777216 with --kv latent-q4)" in only_line(result.stderr)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_reads_the_factors_too(low: Path, device: str) -> None:
    """Keys' may lie in memory as float32, filled up."""
    with Llama.load(low, device=device) as llama:
        factors = {name: t.data.nbytes for name, t in llama.file.tensors.items() if name.endswith("_b.weight")}
        rest = sum(t.data.nbytes for name, t in llama.file.tensors.items() if name not in factors)  # tied
        found = bytes_per_token(llama.decoder.weights) - rest
    keys = sum(nbytes for name, nbytes in factors.items() if "attn_k" in name)
    assert len(factors) == 6
    assert sum(factors.values()) <= found <= sum(factors.values()) + 1.2 * keys


def test_commands(cli: Cli, low: Path, tmp_path: Path) -> None:
    facts = json.loads(cli("info", low, "--json").stdout)
    assert facts["model"]["palu"]["k_ranks"] == [32, 64, 96]
    # By layer: rank of keys and of values in bits, a scale and a minimum each, and a position.
    for name, bits, scales in (("latent-f16", 16, 0), ("latent-q4", 4, 8), ("latent-q3", 3, 8)):
        assert facts["memory"][0][name] == (192 + 256) * bits // 8 + 3 * (scales + 4)
    assert facts["memory"][0]["f16"] == 3 * 2 * 2 * 64 * 2
    assert [row["policy"] for row in facts["policies"]] == [
        "dense",
        "window",
        "streaming",
        "lm-infinite",
        "h2o",
        "tova",
    ]
    text = cli("info", low).stdout
    for words in (
        "groups of 2 KV heads, q4 latents",
        "32 to 96, mean 64.0, of 128",
        "--kv latent-q3",
        "--kv latent-q4",
    ):
        assert words in text

    flags = ("-p", 0, "-n", 2, "-d", 5, "-r", 1, "--device", "reference", "-o", "jsonl")
    rows = [json.loads(line) for line in cli("bench", low, *flags, "--kv", "auto,latent-f16,f16").stdout.splitlines()]
    assert [(r["type_k"], r["type_v"]) for r in rows] == [(n, n) for n in ("latent-q4", "latent-f16", "f16")]
    assert [r["kv_bytes_per_token"] for r in rows] == [6.5 * facts["memory"][0][r["type_k"]] for r in rows]
    assert "latent-q4" in cli("bench", low, *flags[:-2]).stdout

    book = tmp_path / "text"
    book.write_text("one and the other and the rest of them, " * 20)
    flags = ("-f", book, "-c", 64, "--chunks", 1, "--json", "--device", "reference")
    for kv, shown in (((), "latent-q4"), (("--kv-k", "latent-f16"), "latent-f16/latent-q4")):
        assert json.loads(cli("perplexity", low, *flags, *kv).stdout)["kv"] == shown
    same = json.loads(cli("perplexity", low, *flags, "--kld", "--decode", "--kv", "latent-f16").stdout)
    lost = json.loads(cli("perplexity", low, *flags, "--kld", "--decode", "--kv", "latent-q3").stdout)
    assert 0 <= same["kld"] < 1e-5 < lost["kld"]


# -- what is wrong with a file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"palu.version": None}, "key not found in model: palu.version"),
        ({"palu.version": 2}, "palu.version is 2, expected an integer from 1 to 1"),
        ({"palu.group_size": None}, "key not found in model: palu.group_size"),
        ({"palu.group_size": 0}, "palu.group_size is 0, expected an integer from 1 to 4"),
        ({"palu.group_size": 3}, "palu.group_size is 3, expected a divisor of 4 KV heads"),
        ({"palu.group_size": 1}, "palu.k_rank is 96 in layer 1, expected a multiple of 32 below 64, or 64, the width"),
        ({"palu.k_rank": None}, "key not found in model: palu.k_rank"),
        ({"palu.k_rank": [32, 96, 64]}, "palu.k_rank is an array of 3 int32, expected 2 entries"),
        ({"palu.k_rank": [32]}, "palu.k_rank is an array of 1 int32, expected 2 entries"),
        ({"palu.v_rank": [0, 128]}, "palu.v_rank is 0 in layer 0, expected a multiple of 32 below 128, or 128"),
        ({"palu.v_rank": [64, -32]}, "palu.v_rank is -32 in layer 1"),
        ({"palu.v_rank": [48, 128]}, "palu.v_rank is 48 in layer 0"),
        ({"palu.v_rank": [64, 160]}, "palu.v_rank is 160 in layer 1"),
        ({"palu.v_rank": [64, 96]}, "tensor 'blk.1.attn_v_a.weight' has shape (256, 96), expected (192, 96)"),
        ({"palu.latent": "q5"}, "palu.latent is 'q5', expected one of f16, q4, q3"),
        ({"palu.latent": None}, "key not found in model: palu.latent"),
        ({"palu.hadamard": None}, "key not found in model: palu.hadamard"),
    ],
    ids=str,
)
def test_keys_that_do_not_fit(folder: Path, tmp_path: Path, keys: dict[str, Any], line: str) -> None:
    broken(folder, tmp_path, line, keys=keys)


@pytest.mark.parametrize(
    ("tensors", "line"),
    [
        ({"blk.0.attn_k_a.weight": None}, "missing tensor 'blk.0.attn_k_a.weight'"),
        ({"blk.1.attn_v_b.weight": None}, "missing tensor 'blk.1.attn_v_b.weight'"),
        ({"blk.0.attn_k_b.weight": np.zeros((128, 32), np.float32)}, "has shape (128, 32), expected (256, 32)"),
        ({"blk.0.attn_k.weight": np.zeros((256, 96), np.float32)}, "tensor 'blk.0.attn_k.weight' is not one a llama"),
        ({"blk.0.attn_k_b.weight": np.zeros((256, 32), np.int32)}, "is I32, which is not supported"),
        (
            {"blk.0.attn_k_b.weight": np.full((256, 32), np.nan, np.float32)},
            "tensor 'blk.0.attn_k_b.weight' holds a value that is not finite",
        ),
    ],
    ids=["no first factor", "no second factor", "wrong shape", "the projection too", "wrong type", "NaN"],
)
def test_tensors_that_do_not_fit(folder: Path, tmp_path: Path, tensors: dict[str, Any], line: str) -> None:
    broken(folder, tmp_path, line, tensors=tensors)


def broken(folder: Path, tmp_path: Path, line: str, **what: Any) -> None:
    """The error line of a file with something wrong."""
    path = source(folder, "llama-gqa1-d64", n_head=4, n_head_kv=4, n_embd=96)
    made = make_palu(path, tmp_path / "broken.gguf", 2, [32, 96], [64, 128], **what)
    with pytest.raises(ModelError) as e, GGUFFile.open(made) as file:
        check_tensors(file, ModelConfig.from_gguf(file))
    assert line in str(e.value)
    assert "\n" not in str(e.value)


def test_factors_must_be_plain_numbers(folder: Path, tmp_path: Path) -> None:
    """A quantised factor would be rotated by nothing and is not what `minirt palu` writes."""
    path = source(folder, "llama-gqa1-d64")
    made = make_palu(path, tmp_path / "bf16.gguf", 1, 32, 32)
    data = bytearray(made.read_bytes())
    name = b"blk.0.attn_k_a.weight"
    place = data.index(name) + len(name) + 4 + 16  # after the number of dimensions and the two of them
    data[place] = 30  # BF16, half as long
    made.write_bytes(data)
    with GGUFFile.open(made) as file, pytest.raises(ModelError, match=r"'blk.0.attn_k_a.weight' is BF16, expected F32"):
        check_tensors(file, ModelConfig.from_gguf(file))


def test_a_plain_file_with_factors_alone(folder: Path, tmp_path: Path) -> None:
    keys = dict.fromkeys(
        ("palu.version", "palu.group_size", "palu.k_rank", "palu.v_rank", "palu.latent", "palu.hadamard")
    )
    broken(folder, tmp_path, "missing tensor 'blk.0.attn_k.weight'", keys=keys)
