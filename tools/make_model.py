"""Write a random GGUF of any shape and weight type: small ones for exact tests, big ones for speed.

    python tools/make_model.py --shape 7b --layers 4 --type Q8_0 -o big.gguf

The file loads in llama.cpp too: its vocabulary is a real byte-level BPE (256 bytes, some English merges) padded with
pronounceable made-up words, so a random model prints text. Needs the `gguf` package (a development dependency).

Numbers are drawn from `np.random.RandomState`, whose stream NumPy has frozen, seeded by (seed, CRC-32 of the tensor's
name), and only by exact operations (uniform deviates, one multiplication): a seed gives the same bytes on any machine.
A tensor larger than `TILE` elements repeats one random tile, its rows rotated by one more block each time: right for
timing, useless for judging quality.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import click
import gguf
import numpy as np

TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
TILE = 1 << 20  # elements drawn at most for one tensor
QK_GAIN = 1.5  # widens attention scores, so that a wrong mask or rotation shows in the logits
OUT_GAIN = 2.0  # standard deviation of the logits

_LLAMA_3 = {"rope_base": 5e5, "rope_freqs": 8192, "n_vocab": 128256, "n_ctx": 131072}
_QWEN = {"rope_base": 1e6, "n_vocab": 151936, "tied": True}
SHAPES: dict[str, dict[str, Any]] = {
    name: dict(zip(("n_layer", "n_embd", "n_head", "n_head_kv", "head_dim", "n_ff"), numbers, strict=True)) | rest
    for name, numbers, rest in (
        ("tiny", (2, 256, 4, 2, 64, 512), {"n_vocab": 512, "n_ctx": 512}),
        ("smollm2-135m", (30, 576, 9, 3, 64, 1536), {"n_vocab": 49152, "n_ctx": 8192, "rope_base": 1e5, "tied": True}),
        ("llama-1b", (16, 2048, 32, 8, 64, 8192), {**_LLAMA_3, "tied": True}),
        ("7b", (32, 4096, 32, 32, 128, 11008), {"n_vocab": 32000, "n_ctx": 4096}),
        ("8b-gqa", (32, 4096, 32, 8, 128, 14336), _LLAMA_3),
        ("qwen2-0.5b", (24, 896, 14, 2, 64, 4864), {**_QWEN, "architecture": "qwen2", "n_ctx": 32768}),
        ("qwen3-0.6b", (28, 1024, 16, 8, 128, 3072), {**_QWEN, "architecture": "qwen3", "n_ctx": 40960}),
    )
}

MERGES = (
    *("Ġ t", "Ġ a", "h e", "i n", "r e", "o n", "e r", "Ġt he", "Ġ s", "Ġ w", "n d", "a t", "Ġ o", "o u", "i s"),
    *("Ġ c", "e n", "o r", "i t", "in g", "Ġ b", "e s", "a n", "Ġ f", "Ġ m", "e d", "a r", "Ġa nd", "Ġ p", "Ġo f"),
    *("i c", "a l", "l l", "Ġ h", "Ġt o", "Ġ in", "l e"),
)


def vocabulary(n_vocab: int) -> tuple[list[str], list[int], list[str]]:
    """Byte-level BPE of exactly n_vocab unique tokens: (tokens, token types, merges).

    Ids 0-255 are single bytes, 256 is <|endoftext|>, then as many merges as fit, then made-up words that text never
    merges into.
    """
    if n_vocab < 257:
        raise ValueError(f"n_vocab is {n_vocab}; a byte-level vocabulary needs at least 257")
    # GPT-2's alphabet: printable bytes stand for themselves, the other 68 are shifted up to U+0100 and on
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    shifted = iter(range(256, 512))
    tokens = [chr(b if b in printable else next(shifted)) for b in range(256)] + ["<|endoftext|>"]
    merges = list(MERGES[: n_vocab - len(tokens)])
    tokens += [merge.replace(" ", "") for merge in merges]
    known = set(tokens)
    words = (word for word in _words() if word not in known)
    tokens += [next(words) for _ in range(n_vocab - len(tokens))]
    types = [int(gguf.TokenType.NORMAL)] * n_vocab
    types[256] = int(gguf.TokenType.CONTROL)
    return tokens, types, merges


def _words() -> Iterator[str]:
    """Endless unique words of two, three ... syllables, each with a leading space (Ġ)."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    length = 2
    while True:
        for n in range(len(syllables) ** length):
            yield "Ġ" + "".join(syllables[n // len(syllables) ** i % len(syllables)] for i in range(length))
        length += 1


def make_model(
    path: str,
    *,
    architecture: str = "llama",
    n_layer: int,
    n_embd: int,
    n_head: int,
    n_head_kv: int,
    head_dim: int,
    n_ff: int,
    n_vocab: int,
    n_ctx: int,
    type: str = "F32",
    tied: bool = False,
    rope_base: float = 10000.0,
    rms_eps: float = 1e-5,
    scaling: dict[str, Any] | None = None,
    rope_freqs: int = 0,
    sliding_window: int = 0,
    seed: int = 0,
) -> None:
    """Write a random model to `path`; all matrices have `type`, all vectors are float32.

    architecture    llama | qwen2 (with non-zero QKV biases) | qwen3 (with Q/K norm weights away from 1)
    scaling         {"kind": "linear", "factor": f} or {"kind": "yarn", "factor": f, "original_context": n}, with
                    optional "extrapolation", "attention_factor", "beta_fast", "beta_slow" (named as in minirt.config;
                    attention_factor is the key rope.scaling.attn_factor, as llama.cpp ignores yarn_attn_factor)
    rope_freqs      original context of a Llama-3.1 style `rope_freqs.weight` (factor 8, low 1, high 4); 0 = no tensor
    sliding_window  `{architecture}.attention.sliding_window`; 0 = no key

    ValueError where the shape is impossible for the architecture or the type.
    """
    if architecture not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"architecture {architecture!r} is not one of llama, qwen2, qwen3")
    if type not in TYPES:
        raise ValueError(f"type {type!r} is not one of {', '.join(TYPES)}")
    if n_head % n_head_kv or head_dim % 2:
        raise ValueError(f"n_head {n_head} must be a multiple of n_head_kv {n_head_kv}, and head_dim {head_dim} even")
    qtype = gguf.GGMLQuantizationType[type]
    block, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    tensors = _tensors(architecture, n_layer, n_embd, n_head, n_head_kv, head_dim, n_ff, n_vocab, tied)
    for name, shape, _ in tensors:
        if len(shape) == 2 and shape[1] % block:
            raise ValueError(f"{name}: rows of {shape[1]} elements do not divide into {type} blocks of {block}")

    w = gguf.GGUFWriter(path, architecture)
    w.add_name(f"random {architecture} {n_layer}x{n_embd} seed {seed}")
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    w.add_context_length(n_ctx)
    w.add_embedding_length(n_embd)
    w.add_block_count(n_layer)
    w.add_feed_forward_length(n_ff)
    w.add_head_count(n_head)
    w.add_head_count_kv(n_head_kv)
    if head_dim * n_head != n_embd:
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
    w.add_layer_norm_rms_eps(rms_eps)
    w.add_rope_freq_base(rope_base)
    w.add_vocab_size(n_vocab)
    if architecture == "llama":  # as its converter does; qwen files leave it to the default, head_dim
        w.add_rope_dimension_count(head_dim)
    if sliding_window:
        w.add_sliding_window(sliding_window)
    if scaling:
        _add_scaling(w, scaling)
    _add_tokenizer(w, n_vocab)

    if rope_freqs:
        w.add_tensor_info("rope_freqs.weight", (head_dim // 2,), np.dtype(np.float32), head_dim // 2 * 4)
    for name, shape, _ in tensors:
        if len(shape) == 1:
            w.add_tensor_info(name, shape, np.dtype(np.float32), shape[0] * 4)
        else:
            row_bytes = shape[1] // block * block_bytes
            w.add_tensor_info(name, (shape[0], row_bytes), np.dtype(np.uint8), shape[0] * row_bytes, qtype)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    w.close()

    tiles: dict[tuple[int, float], np.ndarray] = {}
    with open(path, "ab") as f:
        _pad(f)
        if rope_freqs:
            f.write(_llama3_factors(rope_base, head_dim, rope_freqs).tobytes())
            _pad(f)
        for name, shape, spread in tensors:
            rng = np.random.RandomState([seed, zlib.crc32(name.encode())])
            if len(shape) == 1:
                centre = 0.0 if name.endswith("bias") else 1.0
                f.write((centre + spread * _uniform(rng, shape)).astype(np.float32).tobytes())
            elif shape[0] * shape[1] <= TILE:
                f.write(_encode(rng, shape, spread, qtype).tobytes())
            else:
                key = (shape[1], spread)
                if key not in tiles:
                    tiles[key] = _encode(rng, (TILE // shape[1], shape[1]), spread, qtype)
                _write_tiled(f, tiles[key], shape[0], block_bytes, zlib.crc32(name.encode()))
            _pad(f)


def _tensors(
    architecture: str, n_layer: int, n_embd: int, n_head: int, n_head_kv: int, head_dim: int, n_ff: int, n_vocab: int,
    tied: bool,
) -> list[tuple[str, tuple[int, ...], float]]:  # fmt: skip
    """(name, NumPy shape, spread) of every tensor: standard deviation of a matrix, half-width of a vector's range."""
    q, kv = n_head * head_dim, n_head_kv * head_dim
    out_std = OUT_GAIN / math.sqrt(n_embd)
    tensors: list[tuple[str, tuple[int, ...], float]] = []

    def add(name: str, *shape: int, spread: float) -> None:
        tensors.append((name, shape, spread))

    add("token_embd.weight", n_vocab, n_embd, spread=out_std if tied else 1.0)
    for i in range(n_layer):
        b = f"blk.{i}."
        add(b + "attn_norm.weight", n_embd, spread=0.3)
        for x, rows, gain in (("q", q, QK_GAIN), ("k", kv, QK_GAIN), ("v", kv, 1.0)):
            add(f"{b}attn_{x}.weight", rows, n_embd, spread=gain / math.sqrt(n_embd))
            if architecture == "qwen2":
                add(f"{b}attn_{x}.bias", rows, spread=1.0)
        if architecture == "qwen3":
            add(b + "attn_q_norm.weight", head_dim, spread=0.7)
            add(b + "attn_k_norm.weight", head_dim, spread=0.7)
        add(b + "attn_output.weight", n_embd, q, spread=1.0 / math.sqrt(q))
        add(b + "ffn_norm.weight", n_embd, spread=0.3)
        add(b + "ffn_gate.weight", n_ff, n_embd, spread=1.0 / math.sqrt(n_embd))
        add(b + "ffn_up.weight", n_ff, n_embd, spread=1.0 / math.sqrt(n_embd))
        add(b + "ffn_down.weight", n_embd, n_ff, spread=1.0 / math.sqrt(n_ff))
    add("output_norm.weight", n_embd, spread=0.3)
    if not tied:
        add("output.weight", n_vocab, n_embd, spread=out_std)
    return tensors


def _add_scaling(w: gguf.GGUFWriter, scaling: dict[str, Any]) -> None:
    """Write the rope.scaling.* keys of `scaling`; ValueError for an unknown kind or key."""
    rest = dict(scaling)
    kind = rest.pop("kind")
    if kind not in ("linear", "yarn"):
        raise ValueError(f"scaling kind {kind!r} is not one of linear, yarn")
    w.add_rope_scaling_type(gguf.RopeScalingType(kind))
    w.add_rope_scaling_factor(rest.pop("factor"))
    add = {
        "original_context": w.add_rope_scaling_orig_ctx_len,
        "extrapolation": w.add_rope_scaling_yarn_ext_factor,
        "attention_factor": w.add_rope_scaling_attn_factors,
        "beta_fast": w.add_rope_scaling_yarn_beta_fast,
        "beta_slow": w.add_rope_scaling_yarn_beta_slow,
    }
    for key, value in rest.items():
        if key not in add:
            raise ValueError(f"scaling key {key!r} is not one of kind, factor, {', '.join(add)}")
        add[key](value)


def _add_tokenizer(w: gguf.GGUFWriter, n_vocab: int) -> None:
    tokens, types, merges = vocabulary(n_vocab)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types(types)
    w.add_token_merges(merges)
    w.add_bos_token_id(256)
    w.add_eos_token_id(256)
    w.add_add_bos_token(False)


def _uniform(rng: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    """float64 of `shape` in [-1, 1); not normal deviates, whose logarithm differs between C libraries."""
    return 2.0 * rng.random_sample(shape) - 1.0


def _encode(rng: np.random.RandomState, shape: tuple[int, int], std: float, qtype: gguf.GGMLQuantizationType) -> Any:
    """Random matrix of `shape` with standard deviation `std` as bytes of `qtype`: uint8 [rows, row bytes]."""
    if qtype.name.endswith("_K"):
        return _random_k_blocks(rng, shape, std, qtype)
    values = (math.sqrt(3.0) * std * _uniform(rng, shape)).astype(np.float32)
    return gguf.quantize(values, qtype).view(np.uint8)


def _random_k_blocks(
    rng: np.random.RandomState, shape: tuple[int, int], std: float, qtype: gguf.GGMLQuantizationType
) -> np.ndarray:
    """Random valid superblocks (gguf cannot quantise to these types): any bits, scales set for mean 0 and `std`."""
    elements, size = gguf.GGML_QUANT_SIZES[qtype]
    blocks = rng.randint(0, 256, (shape[0] * shape[1] // elements, size)).astype(np.uint8)
    # where the float16 scales lie, and their ratio: the mean of scale x quant is cancelled by that of min x minimum
    scales = {"Q4_K": {0: 1.0, 2: 7.5}, "Q5_K": {0: 1.0, 2: 15.5}, "Q6_K": {208: 1.0}}[qtype.name]
    for factor in (1.0, None):
        if factor is None:
            factor = std / float(gguf.dequantize(blocks[:256], qtype).std(dtype=np.float64))
        for offset, ratio in scales.items():
            blocks[:, offset : offset + 2] = np.array([ratio * factor], np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def _write_tiled(f: BinaryIO, tile: np.ndarray, rows: int, block_bytes: int, start: int) -> None:
    """Write `rows` rows by repeating `tile` (uint8 [tile rows, row bytes]), rotated by one more block every time."""
    n_blocks = tile.shape[1] // block_bytes
    for i, first in enumerate(range(0, rows, len(tile))):
        shift = (start + i) % n_blocks * block_bytes
        f.write(np.roll(tile[: rows - first], shift, axis=1).tobytes())


def _llama3_factors(base: float, head_dim: int, original: int) -> np.ndarray:
    """Frequency divisors float32 [head_dim/2] of Llama 3.1: factor 8, low_freq_factor 1, high_freq_factor 4."""
    factor, low, high = 8.0, 1.0, 4.0
    divisors = []
    for i in range(head_dim // 2):
        turns = original * base ** (-2 * i / head_dim) / (2 * math.pi)  # rotations within the original context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def _pad(f: BinaryIO) -> None:
    f.write(bytes(-f.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


@click.command(help=__doc__)
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False), help="File to write.")
@click.option("--shape", type=click.Choice(list(SHAPES)), default="tiny", show_default=True, help="Model to imitate.")
@click.option("--type", "type_", type=click.Choice(TYPES), default="F32", show_default=True, help="Of all matrices.")
@click.option("--architecture", type=click.Choice(["llama", "qwen2", "qwen3"]), help="Instead of the shape's.")
@click.option("--layers", "n_layer", type=click.IntRange(1), help="Number of layers, instead of the shape's.")
@click.option("--embd", "n_embd", type=click.IntRange(1), help="Embedding length.")
@click.option("--heads", "n_head", type=click.IntRange(1), help="Query heads.")
@click.option("--heads-kv", "n_head_kv", type=click.IntRange(1), help="Key/value heads.")
@click.option("--head-dim", type=click.IntRange(2), help="Components of a head.")
@click.option("--ff", "n_ff", type=click.IntRange(1), help="Feed-forward length.")
@click.option("--vocab", "n_vocab", type=click.IntRange(257), help="Vocabulary size.")
@click.option("--ctx", "n_ctx", type=click.IntRange(1), help="Context length the file declares.")
@click.option("--tied/--untied", default=None, help="Output matrix is the embedding, or its own.")
@click.option("--rope-base", type=float, help="RoPE frequency base.")
@click.option("--sliding-window", type=click.IntRange(0), help="Positions a query sees; 0 = all.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
def main(output: str, shape: str, type_: str, seed: int, **overrides: Any) -> None:
    kwargs = {**SHAPES[shape], **{k: v for k, v in overrides.items() if v is not None}}
    try:
        make_model(output, type=type_, seed=seed, **kwargs)
    except (ValueError, OSError) as e:
        raise click.ClickException(str(e)) from e


if __name__ == "__main__":
    main()
