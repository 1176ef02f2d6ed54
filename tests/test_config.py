"""Hyper-parameters from metadata: defaults, variants, rope scaling. What is refused is in test_bad_files."""

from __future__ import annotations

from pathlib import Path

import pytest
from make_gguf import tiny

from minirt.config import ModelConfig, RopeScaling
from minirt.gguf_file import GGUFFile


def read(path: Path, arch: str = "llama", drop: tuple[str, ...] = (), **keys: tuple[str, object]) -> ModelConfig:
    """The configuration of a tiny model with some keys dropped or set; "__" stands for a dot."""
    model = tiny(arch=arch)
    for key in drop:
        del model.keys[key]
    model.keys |= {f"{arch}.{key.replace('__', '.')}": value for key, value in keys.items()}
    return ModelConfig.from_gguf(GGUFFile.open(model.write(path / "tiny.gguf")))


def scaling(path: Path, **keys: tuple[str, object]) -> RopeScaling:
    return read(path, **{f"rope__scaling__{key}": value for key, value in keys.items()}).rope_scaling


def test_a_whole_configuration(tmp_path: Path) -> None:
    assert read(tmp_path) == ModelConfig(
        architecture="llama",
        name="Tiny",
        n_layer=2,
        n_embd=64,
        n_head=4,
        n_head_kv=2,
        head_dim=16,
        n_ff=128,
        n_vocab=268,
        n_ctx_train=256,
        rms_eps=pytest.approx(1e-5),
        rope_base=10000.0,
        rope_dim=16,
        rope_interleaved=True,
        rope_scaling=RopeScaling("none"),
        sliding_window=0,
    )


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_qwen_rotates_halves(tmp_path: Path, arch: str) -> None:
    config = read(tmp_path, arch)
    assert config.architecture == arch
    assert not config.rope_interleaved


def test_defaults(tmp_path: Path) -> None:
    dropped = ("rope.freq_base", "rope.dimension_count", "attention.head_count_kv", "vocab_size")
    config = read(tmp_path, drop=("general.name", *(f"llama.{key}" for key in dropped)))
    assert (config.name, config.rope_base, config.rope_dim) == ("tiny", 10000.0, 16)
    assert (config.n_head_kv, config.n_vocab) == (4, 268)


def test_a_file_without_tokens_has_the_rows_of_its_embedding(tmp_path: Path) -> None:
    assert read(tmp_path, drop=("tokenizer.ggml.tokens", "llama.vocab_size")).n_vocab == 268


def test_head_dim_need_not_divide(tmp_path: Path) -> None:
    lengths = {"attention__key_length": ("u32", 80), "attention__value_length": ("u32", 80)}
    config = read(tmp_path, attention__head_count=("u32", 6), rope__dimension_count=("u32", 20), **lengths)
    assert (config.n_head, config.head_dim, config.rope_dim) == (6, 80, 20)


def test_equal_values_per_layer_are_one(tmp_path: Path) -> None:
    arrays = {"attention__head_count": ("[u32]", [4, 4]), "feed_forward_length": ("[i32]", [128, 128])}
    config = read(tmp_path, attention__head_count_kv=("[u32]", [1, 1]), **arrays)
    assert (config.n_head, config.n_head_kv, config.n_ff) == (4, 1, 128)


def test_neutral_values_are_accepted(tmp_path: Path) -> None:
    read(tmp_path, attention__causal=("bool", True), expert_count=("u32", 0), logit_scale=("f32", 1.0))
    assert read(tmp_path, attention__sliding_window=("u32", 128)).sliding_window == 128


def test_linear_scaling(tmp_path: Path) -> None:
    linear = RopeScaling("linear", 4.0)
    assert scaling(tmp_path, type=("str", "linear"), factor=("f32", 4.0)) == linear
    assert scaling(tmp_path, factor=("f32", 4.0)) == linear  # the type defaults to linear
    assert read(tmp_path, rope__scale_linear=("f32", 4.0)).rope_scaling == linear  # the key of old files
    both = {"rope__scale_linear": ("f32", 2.0), "rope__scaling__factor": ("f32", 4.0)}
    assert read(tmp_path, **both).rope_scaling == linear


def test_no_scaling(tmp_path: Path) -> None:
    none = RopeScaling("none")
    assert scaling(tmp_path, type=("str", "none"), factor=("f32", 4.0)) == none
    assert scaling(tmp_path, type=("str", "yarn"), factor=("f32", 1.0)) == none
    assert scaling(tmp_path, type=("str", "linear"), factor=("f32", 0.0)) == none  # 0 means not set
    assert scaling(tmp_path, attn_factor=("f32", 1.5)) == RopeScaling("none", attention_factor=1.5)


def test_yarn(tmp_path: Path) -> None:
    keys = {"type": ("str", "yarn"), "factor": ("f32", 4.0)}
    assert scaling(tmp_path, **keys) == RopeScaling("yarn", 4.0, original_context=256)
    assert scaling(tmp_path, **keys, original_context_length=("u32", 64)).original_context == 64
    ignored = {"ext_factor": 0.5, "attn_factor": 2.0, "beta_fast": 8.0, "beta_slow": 2.0, "log_multiplier": 0.1}
    more = {f"yarn_{key}": ("f32", value) for key, value in ignored.items()}
    assert scaling(tmp_path, **keys, **more) == RopeScaling("yarn", 4.0, original_context=256)  # as llama.cpp does
    assert scaling(tmp_path, **keys, attn_factor=("f32", 1.5)).attention_factor == 1.5
