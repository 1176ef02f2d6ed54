"""Files with one defect each, the line each must give, and thousands of random corruptions of a good file.

Whatever a file holds, loading it ends in a model or in one line of ModelError, soon and in little memory.
"""

from __future__ import annotations

import math
import os
import resource
import struct
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from make_gguf import F32, Q8_0, Entry, Gguf, key_entry, ones, tensor_entry, text, tiny, weight

from minirt.config import ModelConfig
from minirt.errors import ModelError
from minirt.gguf_file import METADATA_LIMIT, GGUFFile, Tensor
from minirt.weights import Weights, load_weights

Edit = Callable[[Gguf], object]
NAN, INF = math.nan, math.inf


class HostOps:
    """What `load_weights` needs of a device."""

    def vector(self, values: np.ndarray) -> np.ndarray:
        return values

    def matrix(self, tensor: Tensor) -> Tensor:
        return tensor

    table = matrix


def load(path: Path) -> Weights:
    with GGUFFile.open(path) as file:
        return load_weights(file, ModelConfig.from_gguf(file), HostOps())  # type: ignore[arg-type]


def refusal(path: Path) -> str:
    """The one line a file gives, without its name; checks that it comes soon and cheaply."""
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(ModelError) as caught:
        load(path)
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert line.isprintable()
    assert len(line) < len(str(path)) + 400
    assert seconds < 2
    assert peak < 32 << 20
    return line.removeprefix(f"{path}: ")


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tokenizer", ["gpt2", "llama"])
def test_the_files_we_break_are_good(tmp_path: Path, arch: str, tokenizer: str) -> None:
    for tied in (True, False):
        assert len(load(tiny(tokenizer, arch, tied).write(tmp_path / "m.gguf")).layers) == 2


# -- hyper-parameters: key, kind, value, and the line; None as the value takes the key out -----------------------------
KEYS: list[tuple[str, str, object, str]] = [
    ("general.architecture", "", None, "key not found in model: general.architecture"),
    ("general.architecture", "str", "gpt5", "unknown architecture 'gpt5', supported are llama, qwen2, qwen3"),
    ("general.architecture", "str", "a\n\x1b[2J", r"unknown architecture 'a\n\x1b[2J'"),
    ("general.architecture", "str", "x" * 10000, "unknown architecture 'xxxx"),
    ("general.architecture", "u32", 1, "general.architecture is 1, expected a string"),
    ("general.name", "[str]", ["a"], "general.name is an array of 1 str, expected a string"),
    ("general.alignment", "u32", 0, "general.alignment is 0, expected a power of two of at least 8"),
    ("general.alignment", "u32", 48, "general.alignment is 48, expected a power of two"),
    ("general.alignment", "u32", 4, "general.alignment is 4, expected a power of two"),
    (
        "general.alignment",
        "u32",
        1 << 31,
        "'blk.0.attn_norm.weight' has offset 34304, expected a multiple of 2147483648",
    ),
    ("general.alignment", "str", "32", "general.alignment is '32', expected a power of two"),
    ("general.alignment", "f32", 32.0, "general.alignment is 32.0, expected a power of two"),
    ("general.alignment", "bool", True, "general.alignment is True, expected a power of two"),
    ("llama.block_count", "", None, "key not found in model: llama.block_count"),
    ("llama.block_count", "u32", 0, "llama.block_count is 0, expected an integer from 1 to 1024"),
    ("llama.block_count", "i32", -1, "llama.block_count is -1, expected an integer from 1 to 1024"),
    ("llama.block_count", "u64", 2**64 - 1, "llama.block_count is 18446744073709551615, expected"),
    ("llama.block_count", "f32", 2.0, "llama.block_count is 2.0, expected an integer"),
    ("llama.block_count", "bool", True, "llama.block_count is True, expected an integer"),
    ("llama.block_count", "u32", 3, "missing tensor 'blk.2.attn_norm.weight'"),
    ("llama.block_count", "u32", 1, "tensor 'blk.1.attn_k.weight' is not one a llama model"),
    ("llama.context_length", "", None, "key not found in model: llama.context_length"),
    ("llama.context_length", "u32", 0, "llama.context_length is 0, expected an integer from 1 to 16777216"),
    ("llama.context_length", "u32", 2**32 - 1, "llama.context_length is 4294967295"),
    ("llama.embedding_length", "u32", 0, "llama.embedding_length is 0"),
    ("llama.embedding_length", "u32", 128, "tensor 'token_embd.weight' has shape (268, 64), expected (268, 128)"),
    ("llama.embedding_length", "u64", 1 << 40, "llama.embedding_length is 1099511627776"),
    ("llama.feed_forward_length", "u32", 0, "llama.feed_forward_length is 0"),
    ("llama.feed_forward_length", "u32", 256, "'blk.0.ffn_gate.weight' has shape (128, 64), expected (256, 64)"),
    ("llama.feed_forward_length", "[u32]", [128, 64], "llama.feed_forward_length differs from layer to layer"),
    ("llama.attention.head_count", "u32", 0, "llama.attention.head_count is 0, expected an integer from 1 to 1024"),
    ("llama.attention.head_count", "u32", 3, "head_count_kv is 2, expected a divisor of 3 heads"),
    ("llama.attention.head_count", "u32", 6, "head_count is 6, expected a divisor of embedding_length 64"),
    ("llama.attention.head_count", "[u32]", [4, 2], "llama.attention.head_count differs from layer to layer"),
    ("llama.attention.head_count", "[u32]", [4], "head_count is an array of 1 uint32, expected 2 entries"),
    ("llama.attention.head_count", "[u32]", [], "head_count is an array of 0 uint32, expected 2 entries"),
    ("llama.attention.head_count", "[f32]", [4, 4], "head_count is an array of 2 float32, expected an array of int"),
    ("llama.attention.head_count", "[i32]", [-4, -4], "head_count is -4 in every layer, expected 1 to 1024"),
    ("llama.attention.head_count", "[str]", ["4", "4"], "head_count is an array of 2 str, expected an integer"),
    ("llama.attention.head_count_kv", "u32", 0, "llama.attention.head_count_kv is 0"),
    ("llama.attention.head_count_kv", "u32", 3, "llama.attention.head_count_kv is 3, expected a divisor of 4"),
    ("llama.attention.head_count_kv", "u32", 4, "'blk.0.attn_k.weight' has shape (32, 64), expected (64, 64)"),
    ("llama.attention.key_length", "u32", 32, "value_length is 16, expected llama.attention.key_length, 32"),
    ("llama.attention.key_length", "u32", 0, "llama.attention.key_length is 0, expected an integer from 2"),
    ("llama.attention.layer_norm_rms_epsilon", "", None, "key not found in model: llama.attention.layer_norm_rms_eps"),
    ("llama.attention.layer_norm_rms_epsilon", "f32", NAN, "layer_norm_rms_epsilon is nan, expected a finite number"),
    ("llama.attention.layer_norm_rms_epsilon", "f32", 0.0, "layer_norm_rms_epsilon is 0.0"),
    ("llama.attention.layer_norm_rms_epsilon", "f64", -1e-5, "layer_norm_rms_epsilon is -1e-05"),
    ("llama.attention.layer_norm_rms_epsilon", "str", "1e-5", "layer_norm_rms_epsilon is '1e-5', expected a finite"),
    ("llama.rope.freq_base", "f32", NAN, "llama.rope.freq_base is nan, expected a finite number from 2 to 1e+12"),
    ("llama.rope.freq_base", "f32", INF, "llama.rope.freq_base is inf"),
    ("llama.rope.freq_base", "f32", -10000.0, "llama.rope.freq_base is -10000.0"),
    ("llama.rope.freq_base", "f32", 0.0, "llama.rope.freq_base is 0.0"),
    ("llama.rope.dimension_count", "u32", 0, "llama.rope.dimension_count is 0, expected an integer from 2 to 16"),
    ("llama.rope.dimension_count", "u32", 15, "llama.rope.dimension_count is 15, expected an even number"),
    ("llama.rope.dimension_count", "u32", 32, "llama.rope.dimension_count is 32, expected an integer from 2 to 16"),
    ("llama.rope.scaling.type", "str", "longrope", "llama.rope.scaling.type is 'longrope', expected none, linear or"),
    ("llama.rope.scaling.type", "str", "dynamic", "llama.rope.scaling.type is 'dynamic', expected none, linear or"),
    ("llama.rope.scaling.type", "u32", 2, "llama.rope.scaling.type is 2, expected a string"),
    ("llama.rope.scaling.factor", "f32", NAN, "llama.rope.scaling.factor is nan"),
    ("llama.rope.scaling.factor", "f32", -2.0, "llama.rope.scaling.factor is -2.0"),
    ("llama.rope.scale_linear", "f32", 1e-9, "llama.rope.scale_linear is 1e-09, expected 0.001 or more"),
    ("llama.rope.scaling.attn_factor", "f32", INF, "llama.rope.scaling.attn_factor is inf"),
    ("llama.rope.scaling.alpha", "f32", 1000.0, "llama.rope.scaling.alpha is 1000.0, which is not supported"),
    ("llama.attention.sliding_window", "i32", -1, "llama.attention.sliding_window is -1"),
    ("llama.attention.sliding_window_pattern", "[bool]", [True], "sliding_window_pattern is an array of 1 bool, which"),
    ("llama.attention.causal", "bool", False, "llama.attention.causal is False, which is not supported"),
    ("llama.logit_scale", "f32", 16.0, "llama.logit_scale is 16.0, which is not supported; expected 1.0"),
    ("llama.expert_count", "u32", 8, "llama.expert_count is 8: mixture of experts is not supported"),
    ("llama.vocab_size", "u32", 267, "llama.vocab_size is 267, expected 268, the rows of token_embd.weight"),
    ("tokenizer.ggml.tokens", "[str]", ["a"] * 267, "tokenizer.ggml.tokens has 267 tokens, expected 268"),
    ("tokenizer.ggml.tokens", "[u32]", [1] * 268, "tokens is an array of 268 uint32, expected an array of str"),
    ("tokenizer.ggml.tokens", "[str]", ["a", "b\udcff"], "'tokenizer.ggml.tokens', string 1 is not valid UTF-8"),
    ("tokenizer.ggml.merges", "[str]", ["a b", "\udced\udca0\udc80"], "merges', string 1 is not valid UTF-8"),
    ("general.description", "str", "caf\udce9", "key 'general.description' at "),
    ("general.description", "str", "caf\udce9", "is not valid UTF-8: unexpected end of data at byte 3"),
    ("general.b\udcffd", "u32", 0, "is not valid UTF-8: invalid start byte at byte 9"),
    ("split.count", "u16", 3, "invalid split file: part 1 of 3 must be named NAME-00001-of-00003.gguf"),
    ("split.count", "u16", 65535, "split.count is 65535, expected an integer from 0 to 1000"),
]


@pytest.mark.parametrize(("key", "kind", "value", "line"), KEYS, ids=[f"{k}={v!r:.20}" for k, _, v, _ in KEYS])
def test_key(tmp_path: Path, key: str, kind: str, value: object, line: str) -> None:
    model = tiny()
    if key.startswith("split."):
        model.keys["split.no"] = ("u16", 0)
    if value is None:
        del model.keys[key]
    else:
        model.keys[key] = (kind, value)
    assert line in refusal(model.write(tmp_path / "model.gguf"))


YARN: list[tuple[str, float, str]] = [
    ("factor", 0.5, "llama.rope.scaling.factor is 0.5, expected 1 or more for yarn"),
    ("factor", INF, "llama.rope.scaling.factor is inf, expected a finite number"),
    ("attn_factor", 0.0, "llama.rope.scaling.attn_factor is 0.0, expected a finite number from 0.001 to 1000"),
    ("original_context_length", 0, "llama.rope.scaling.original_context_length is 0"),
]


@pytest.mark.parametrize(("key", "value", "line"), YARN, ids=[f"{k}={v}" for k, v, _ in YARN])
def test_yarn(tmp_path: Path, key: str, value: float, line: str) -> None:
    model = tiny()
    model.keys["llama.rope.scaling.type"] = ("str", "yarn")
    model.keys["llama.rope.scaling.factor"] = ("f32", 4.0)
    model.keys[f"llama.rope.scaling.{key}"] = ("u32" if isinstance(value, int) else "f64", value)
    assert line in refusal(model.write(tmp_path / "model.gguf"))


# -- tensors and the tables: an edit of a good model, and the line -----------------------------------------------------
def tensor(name: str, **changes: object) -> Edit:
    return lambda m: m.tensors[name].__dict__.update(changes)


def values(name: str, *numbers: float) -> Edit:
    """The first numbers of a float32 tensor."""
    data = np.array(numbers, "<f4").tobytes()
    return lambda m: m.tensors[name].__dict__.update(data=data + m.tensors[name].data[len(data) :])


def extra(name: str, entry: Entry) -> Edit:
    return lambda m: m.tensors.update({name: entry})


RNG = np.random.RandomState(1)
EDITS: dict[str, tuple[Edit, str]] = {
    "v1": (lambda m: setattr(m, "version", 1), "GGUFv1 is no longer supported"),
    "v0": (lambda m: setattr(m, "version", 0), "GGUF version is 0, expected 2 or 3"),
    "v4": (lambda m: setattr(m, "version", 4), "GGUF version is 4, expected 2 or 3"),
    "big-endian": (lambda m: setattr(m, "version", 3 << 24), "this GGUF file is big-endian"),
    "magic": (lambda m: setattr(m, "magic", b"ggjt"), "invalid magic characters: 'ggjt', expected 'GGUF'"),
    "magic bytes": (lambda m: setattr(m, "magic", b"\x00\xff\n\x1b"), r"invalid magic characters: '\x00\xff\n\x1b'"),
    "keys 2^64-1": (lambda m: setattr(m, "n_keys", 2**64 - 1), "number of keys 18446744073709551615 needs"),
    "keys 2^63": (lambda m: setattr(m, "n_keys", 2**63), "truncated file: number of keys 9223372036854775808"),
    "one key too many": (lambda m: setattr(m, "n_keys", len(m.keys) + 1), "truncated file: a tensor name"),
    "one key too few": (lambda m: setattr(m, "n_keys", len(m.keys) - 1), "tensor"),
    "tensors 2^64-1": (lambda m: setattr(m, "n_tensors", 2**64 - 1), "number of tensors 18446744073709551615 needs"),
    "tensors 2^60": (lambda m: setattr(m, "n_tensors", 2**60), "truncated file: number of tensors"),
    "one tensor too many": (lambda m: setattr(m, "n_tensors", len(m.tensors) + 1), "tensor"),
    "no tensors": (lambda m: m.tensors.clear(), "missing tensor 'token_embd.weight'"),
    "duplicate key": (
        lambda m: m.raw_keys.append(key_entry("llama.block_count", "u32", 2)),
        "duplicate key 'llama.block_count'",
    ),
    "duplicate tensor": (
        lambda m: m.raw_tensors.append(tensor_entry("output_norm.weight", F32, [64], 0)),
        "duplicate tensor 'output_norm.weight'",
    ),
    "array of arrays": (
        lambda m: m.raw_keys.append(text("x") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQI", 4, 1, 0)),
        "key 'x' is an array of arrays",
    ),
    "array nested 10,000 deep": (
        lambda m: m.raw_keys.append(text("x") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 10000),
        "key 'x' is an array of arrays",
    ),
    "array of 2^64-1 numbers": (
        lambda m: m.raw_keys.append(text("x") + struct.pack("<IIQ", 9, 0, 2**64 - 1)),
        "key 'x': array length 18446744073709551615 needs",
    ),
    "array of 2^62 doubles": (
        lambda m: m.raw_keys.append(text("x") + struct.pack("<IIQ", 9, 12, 2**62)),
        "key 'x': array length 4611686018427387904 needs",
    ),
    "array of 2^17 doubles": (
        lambda m: m.raw_keys.append(text("x") + struct.pack("<IIQ", 9, 12, 100000)),
        "truncated file: key 'x' needs 800000 bytes",
    ),
    "array of 2^28 strings": (
        lambda m: m.raw_keys.append(text("x") + struct.pack("<IIQ", 9, 8, 2**28)),
        "key 'x': array length 268435456 needs 2147483648 bytes",
    ),
    "string of 2^64-1": (
        lambda m: m.raw_keys.append(text("x") + struct.pack("<IQ", 8, 2**64 - 1)),
        "truncated file: key 'x' needs 18446744073709551615 bytes",
    ),
    "string in an array of 2^63": (
        lambda m: m.raw_keys.append(text("x") + struct.pack("<IIQQQ", 9, 8, 2, 0, 2**63)),
        "key 'x', string 1 needs 9223372036854775808 bytes",
    ),
    "key of 2^40 bytes": (
        lambda m: m.raw_keys.append(struct.pack("<Q", 2**40)),
        "truncated file: a key needs 1099511627776 bytes",
    ),
    "value type 13": (
        lambda m: m.raw_keys.append(text("x") + struct.pack("<II", 13, 0)),
        "key 'x' has value type 13, expected 0 to 12",
    ),
    "array of type 99": (
        lambda m: m.raw_keys.append(text("x") + struct.pack("<IIQI", 9, 99, 1, 0)),
        "key 'x' has value type 99, expected 0 to 12",
    ),
    "bool of 2": (
        lambda m: m.raw_keys.append(text("x") + struct.pack("<IB", 7, 2)),
        "key 'x' is a bool of 2, expected 0 or 1",
    ),
    "no dimensions": (tensor("output_norm.weight", dims=[]), "has 0 dimensions, expected 1 to 4"),
    "5 dimensions": (tensor("output_norm.weight", dims=[64, 1, 1, 1, 1]), "has 5 dimensions, expected 1 to 4"),
    "2^32-1 dimensions": (
        lambda m: m.raw_tensors.append(text("x") + struct.pack("<I", 2**32 - 1)),
        "tensor 'x' has 4294967295 dimensions",
    ),
    "zero dimension": (tensor("output_norm.weight", dims=[64, 0]), "has shape (0, 64), expected no zero"),
    "exabyte shape": (tensor("output_norm.weight", dims=[2**40, 2**20]), "truncated file: tensor 'output_norm.weight'"),
    "product 2^64": (tensor("output_norm.weight", dims=[2**32, 2**32]), "truncated file: tensor 'output_norm.weight'"),
    "product wraps to 64": (tensor("output_norm.weight", dims=[64, 2**58 + 1]), "truncated file: tensor 'output_no"),
    "row of 2^64-32": (tensor("blk.0.attn_q.weight", dims=[2**64 - 32, 1]), "truncated file: tensor 'blk.0.attn_q"),
    "row not of whole blocks": (tensor("blk.0.attn_q.weight", dims=[63, 64]), "rows of 63, expected a multiple of 32"),
    "type Q8_1": (tensor("blk.0.attn_q.weight", type=9), "'blk.0.attn_q.weight' is Q8_1, which is not supported"),
    "type IQ2_XXS": (tensor("blk.0.attn_q.weight", type=16), "is IQ2_XXS, which is not supported; expected one of F3"),
    "type MXFP4": (tensor("blk.0.attn_q.weight", type=39), "is MXFP4, which is not supported"),
    "type F64": (tensor("blk.0.attn_q.weight", type=28), "is F64, which is not supported"),
    "type 5": (tensor("blk.0.attn_q.weight", type=5), "is Q4_3, which is not supported"),
    "type 12345": (tensor("blk.0.attn_q.weight", type=12345), "is unknown type 12345, which is not supported"),
    "offset unaligned": (tensor("output_norm.weight", offset=33), "has offset 33, expected a multiple of 32"),
    "offset beyond the end": (tensor("output_norm.weight", offset=1 << 20), "truncated file: tensor 'output_norm"),
    "offset 2^64-64": (tensor("output_norm.weight", offset=2**64 - 64), "truncated file: tensor 'output_norm.weight'"),
    "offset of another tensor": (tensor("output_norm.weight", offset=0), "and 'output_norm.weight' overlap"),
    "overlap by a part": (
        tensor("blk.0.attn_q.weight", offset=32),
        "tensors 'token_embd.weight' and 'blk.0.attn_q.weight' overlap",
    ),
    "tensor name not UTF-8": (extra("bad\udcff", ones(32)), "a tensor name at "),
    "missing output_norm": (lambda m: m.tensors.pop("output_norm.weight"), "missing tensor 'output_norm.weight'"),
    "missing matrix": (lambda m: m.tensors.pop("blk.1.ffn_up.weight"), "missing tensor 'blk.1.ffn_up.weight'"),
    "matrix transposed": (
        tensor("blk.1.ffn_down.weight", dims=[64, 128]),
        "tensor 'blk.1.ffn_down.weight' has shape (128, 64), expected (64, 128)",
    ),
    "embedding of one dimension": (
        tensor("token_embd.weight", dims=[268]),
        "tensor 'token_embd.weight' has shape (268,), expected (268, 64)",
    ),
    "matrix of three dimensions": (
        tensor("blk.0.attn_q.weight", dims=[64, 32, 2]),
        "tensor 'blk.0.attn_q.weight' has shape (2, 32, 64), expected (64, 64)",
    ),
    "norm too short": (tensor("output_norm.weight", dims=[32]), "has shape (32,), expected (64,)"),
    "norm quantised": (
        extra("output_norm.weight", weight(RNG, Q8_0, 64)),
        "tensor 'output_norm.weight' is Q8_0, expected F32, F16 or BF16",
    ),
    "norm NaN": (values("output_norm.weight", NAN), "tensor 'output_norm.weight' holds a value that is not finite"),
    "norm infinite": (values("blk.1.ffn_norm.weight", 1, INF), "tensor 'blk.1.ffn_norm.weight' holds a value that"),
    "bias NaN": (extra("blk.0.attn_q.bias", Entry(F32, [64], np.full(64, NAN, "<f4").tobytes())), "attn_q.bias' holds"),
    "rope_freqs too long": (extra("rope_freqs.weight", ones(16)), "has shape (16,), expected (8,)"),
    "rope_freqs zero": (extra("rope_freqs.weight", Entry(F32, [8], bytes(32))), "holds 0, expected values above 0"),
    "rope_freqs NaN": (
        extra("rope_freqs.weight", Entry(F32, [8], np.full(8, NAN, "<f4").tobytes())),
        "'rope_freqs.weight' holds a value that is not finite",
    ),
    "output of another shape": (extra("output.weight", weight(RNG, F32, 267, 64)), "weight' has shape (267, 64), exp"),
    "bias we do not apply": (extra("blk.0.attn_output.bias", ones(64)), "'blk.0.attn_output.bias' is not one a llama"),
    "feed-forward bias": (extra("blk.0.ffn_up.bias", ones(128)), "tensor 'blk.0.ffn_up.bias' is not one a llama model"),
    "attention sinks": (extra("blk.0.attn_sinks.weight", ones(4)), "'blk.0.attn_sinks.weight' is not one a llama"),
    "q_norm in llama": (extra("blk.0.attn_q_norm.weight", ones(16)), "'blk.0.attn_q_norm.weight' is not one a llama"),
    "fused qkv": (extra("blk.0.attn_qkv.weight", weight(RNG, F32, 128, 64)), "'blk.0.attn_qkv.weight' is not one"),
    "layer out of range": (extra("blk.2.attn_norm.weight", ones(64)), "'blk.2.attn_norm.weight' is not one a llama"),
    "layer spelt 01": (extra("blk.01.attn_norm.weight", ones(64)), "'blk.01.attn_norm.weight' is not one a llama"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_edit(tmp_path: Path, name: str) -> None:
    edit, line = EDITS[name]
    model = tiny()
    edit(model)
    assert line in refusal(model.write(tmp_path / "model.gguf"))


@pytest.mark.parametrize(("arch", "missing"), [("qwen2", "blk.1.attn_v.bias"), ("qwen3", "blk.0.attn_q_norm.weight")])
def test_missing_tensor_of_an_architecture(tmp_path: Path, arch: str, missing: str) -> None:
    model = tiny(arch=arch)
    del model.tensors[missing]
    assert f"missing tensor '{missing}'" in refusal(model.write(tmp_path / "model.gguf"))


def test_rope_freqs_belong_to_llama(tmp_path: Path) -> None:
    model = tiny(arch="qwen2")
    model.tensors["rope_freqs.weight"] = ones(8)
    assert "'rope_freqs.weight' is not one a qwen2 model" in refusal(model.write(tmp_path / "model.gguf"))


# -- truncation, and files that are none -------------------------------------------------------------------------------
def test_truncated_anywhere(tmp_path: Path) -> None:
    """Cut at every third byte of the tables of a small file, and at some of the data."""
    model = tiny()
    for key in ("tokens", "token_type", "merges"):
        kind, values_ = model.keys[f"tokenizer.ggml.{key}"]
        model.keys[f"tokenizer.ggml.{key}"] = (kind, values_[:3])
    del model.keys["llama.vocab_size"]
    model.tensors["token_embd.weight"] = weight(RNG, F32, 3, 64)
    whole = model.to_bytes()
    tables = whole.index(b"output_norm.weight") + 200
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    load(path)
    for size in [*range(1, tables, 3), *range(tables, len(whole) - 32, 997)]:
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="truncated file" if size >= 4 else "invalid magic"):
            load(path)


@pytest.mark.parametrize("head", [b"GG", b"PK\x03\x04" + bytes(64), b"<!DOCTYPE html><html>", b"\x7fELF" + bytes(99)])
def test_not_a_gguf(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(head)
    assert "invalid magic characters: " in refusal(path)


def test_not_a_file(tmp_path: Path) -> None:
    assert "cannot open: No such file or directory" in refusal(tmp_path / "missing.gguf")
    assert "is a directory, expected a GGUF file" in refusal(tmp_path)
    (tmp_path / "empty").touch()
    assert "is empty, expected a GGUF file" in refusal(tmp_path / "empty")
    assert "cannot open: Not a directory" in refusal(tmp_path / "empty" / "model.gguf")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot open: Too many levels" in refusal(tmp_path / "loop")
    with pytest.raises(ModelError, match="cannot open: embedded null"):
        load(Path("model\0.gguf"))


def test_neither_pipe_nor_device_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
        assert "is not a regular file, expected a GGUF file" in refusal(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads anything")
def test_unreadable(tmp_path: Path) -> None:
    path = tiny().write(tmp_path / "model.gguf")
    path.chmod(0)
    assert "cannot open: Permission denied" in refusal(path)


# -- files larger than memory should be for them: sparse, so that they cost no disk ------------------------------------
def sparse(path: Path, head: bytes, size: int) -> Path:
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)
    return path


def header(n_tensors: int, n_keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys)


@pytest.mark.parametrize(
    ("head", "line"),
    [
        (header(0, 1) + text("x") + struct.pack("<IQ", 8, 2 << 30), "key 'x' goes beyond the 64 MiB allowed"),
        (
            header(0, 1) + text("x") + struct.pack("<IIQ", 9, 0, 2 << 30),
            "array length 2147483648 goes beyond the 64 MiB",
        ),
        (header(0, 1) + text("x") + struct.pack("<IIQ", 9, 8, 4 << 20), "array length is 4194304, expected at most"),
        (header(0, 1) + text("x") + struct.pack("<IIQQ", 9, 8, 2, 1 << 30), "string 0 goes beyond the 64 MiB allowed"),
        (header(0, 1) + struct.pack("<Q", 2 << 30), "a key goes beyond the 64 MiB allowed for metadata"),
        (header(0, 1 << 22), "number of keys is 4194304, expected at most 65536"),
        (header(1 << 20, 0), "number of tensors is 1048576, expected at most 65536"),
        (header(0, 1 << 40), "number of keys 1099511627776 goes beyond the 64 MiB"),
    ],
)
def test_giant(tmp_path: Path, head: bytes, line: str) -> None:
    assert METADATA_LIMIT == 64 << 20
    assert line in refusal(sparse(tmp_path / "model.gguf", head, 3 << 30))


def test_strings_are_counted_over_all_arrays(tmp_path: Path) -> None:
    array = struct.pack("<IIQ", 9, 8, 600_000) + bytes(8 * 600_000)
    keys = b"".join(text(f"k{i}") + array for i in range(4))
    path = sparse(tmp_path / "model.gguf", header(0, 4) + keys, 64 << 20)
    with pytest.raises(ModelError, match="key 'k3': array length is 600000, expected at most 297152"):
        load(path)


# -- random corruption -------------------------------------------------------------------------------------------------
EXTREMES = [0, 1, 2, 3, 7, 8, 9, 13, 31, 33, 127, 255, 256, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
            2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 64, 2**64 - 1]  # fmt: skip


def corrupt(good: bytes, rng: np.random.RandomState, tables: int) -> bytes:
    """One to four random injuries, three in four of them before offset `tables`."""
    bad = bytearray(good)
    for _ in range(rng.randint(1, 5)):
        end = max(1, min(tables if rng.randint(4) else len(bad), len(bad)))
        at = rng.randint(end)
        kind = rng.randint(6)
        if kind == 0:
            for _ in range(rng.randint(1, 9)):
                bad[rng.randint(end)] ^= 1 << rng.randint(8)
        elif kind == 1:
            bad[at] = rng.randint(256)
        elif kind == 2:
            width = int(rng.choice([1, 2, 4, 8]))
            value = EXTREMES[rng.randint(len(EXTREMES))] % (1 << 8 * width)
            bad[at : at + width] = value.to_bytes(width, "little")
        elif kind == 3:
            source, size = rng.randint(end), rng.randint(1, 65)
            bad[at : at + size] = bad[source : source + size]  # splice: the length may change at the end
        elif kind == 4:
            size = rng.randint(1, 17)
            bad[at:at] = rng.bytes(size) if rng.randint(2) else bytes(size)
        else:
            del bad[at : at + rng.randint(1, 17)]
    return bytes(bad[: rng.randint(len(bad) + 1)] if rng.randint(12) == 0 else bad)


@pytest.mark.parametrize("seed", range(6))
def test_random_corruption(tmp_path: Path, seed: int) -> None:
    """500 damaged files: each a model or one line, never another exception, a warning, or much memory."""
    arch, tokenizer = ("llama", "qwen2", "qwen3")[seed % 3], ("gpt2", "llama")[seed % 2]
    model = tiny(tokenizer, arch, tied=seed < 3)
    if arch == "llama":
        model.tensors["rope_freqs.weight"] = ones(8)
        model.keys["llama.rope.scaling.type"] = ("str", "yarn")
        model.keys["llama.rope.scaling.factor"] = ("f32", 4.0)
    model.keys["general.alignment"] = ("u32", 32)
    good = model.to_bytes()
    tables = good.index(b"output_norm.weight") + 64
    path = tmp_path / "model.gguf"
    lines: list[str] = []
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in range(500):
            path.write_bytes(corrupt(good, np.random.RandomState(1000 * seed + case), tables))
            start = time.perf_counter()
            try:
                load(path)
            except ModelError as error:
                lines.append(str(error))
            assert time.perf_counter() - start < 1, case
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100 << (20 if sys.platform == "darwin" else 10)
    assert all(line.isprintable() for line in lines)
    assert 200 < len(lines) < 480
