"""ModelConfig: every hyper-parameter of a model, read from GGUF metadata in this one place.

Symbols used everywhere in minirt:
    N  rows in a call (tokens of a prompt chunk, or one per sequence)     B  sequences
    S  cached tokens                                                      T  tokens of a prompt chunk
    H_q, H_kv  query and key/value heads      d  head_dim                 g = H_q / H_kv
    G  groups of KV heads that share a latent (Palu)                      r  rank: numbers of a latent
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .gguf_file import GGUFFile, show

ARCHITECTURES = ("llama", "qwen2", "qwen3")
MAX_CONTEXT = 1 << 24
LATENTS = ("f16", "q4", "q3")
RANK_UNIT = 32  # a rank is a multiple of it, or full
# Keys that would change the maths of a layer, and the only value each may have here.
NEUTRAL = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attention.sliding_window_pattern": 1,
    "attn_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "rope.scaling.alpha": 0.0,
    "use_parallel_residual": False,
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context."""

    kind: str  # "none" | "linear" | "yarn"
    factor: float = 1.0  # context extension; frequencies are divided by it (fully for linear, by band for yarn)
    original_context: int = 0  # yarn: the context the model was trained at before extension
    attention_factor: float = 1.0  # multiplies the magnitude, which is 1, for yarn 0.1 ln(factor) + 1


@dataclass(frozen=True)
class PaluConfig:
    """Low-rank projections of keys and values (Palu, arXiv 2407.21118), as the keys `palu.*` of a file tell.

    The projection of a group of KV heads is the product of two factors, [group_size d, r] and [r, n_embd]. What lies
    between them, the latent, can be cached in place of keys and values.
    """

    group_size: int  # KV heads that share a latent
    k_ranks: tuple[int, ...]  # r of keys, per layer
    v_ranks: tuple[int, ...]
    latent: str  # how latents are stored by default: one of LATENTS
    hadamard: bool  # latents are rotated, which the factors have folded in


@dataclass(frozen=True)
class ModelConfig:
    """Hyper-parameters of one model, validated: finite, positive, and dividing as they must."""

    architecture: str  # "llama" | "qwen2" | "qwen3"
    name: str
    n_layer: int
    n_embd: int
    n_head: int  # H_q
    n_head_kv: int  # H_kv
    head_dim: int  # d, of keys and of values
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    rms_eps: float
    rope_base: float
    rope_dim: int  # leading components of a head that rotate, <= head_dim
    rope_interleaved: bool  # pairs are (2i, 2i+1) if true (llama), (i, i + rope_dim/2) if false (qwen)
    rope_scaling: RopeScaling
    sliding_window: int  # a query sees its last sliding_window positions, itself included; 0 = all
    palu: PaluConfig | None = None

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> ModelConfig:
        """Reads and checks the hyper-parameters of a model file. Raises ModelError naming the key and its value."""
        arch = file.get_str("general.architecture")
        if arch not in ARCHITECTURES:
            raise file.error(f"unknown architecture {show(arch)}, supported are {', '.join(ARCHITECTURES)}")
        if n_expert := file.get_int(f"{arch}.expert_count", 0):
            raise file.error(f"{arch}.expert_count is {n_expert}: mixture of experts is not supported")
        for key, neutral in NEUTRAL.items():
            value = file.metadata.get(f"{arch}.{key}", neutral)
            if isinstance(value, (str, list, np.ndarray)) or value != neutral:
                raise file.error(f"{arch}.{key} is {show(value)}, which is not supported; expected {neutral}")

        n_layer = file.get_int(f"{arch}.block_count", low=1, high=1024)
        n_embd = file.get_int(f"{arch}.embedding_length", low=1, high=1 << 17)
        n_head = _per_layer(file, f"{arch}.attention.head_count", n_layer, 1024)
        n_head_kv = _per_layer(file, f"{arch}.attention.head_count_kv", n_layer, 1024, n_head)
        if n_head % n_head_kv:
            raise file.error(f"{arch}.attention.head_count_kv is {n_head_kv}, expected a divisor of {n_head} heads")
        head_dim = _head_dim(file, arch, n_embd, n_head)
        rope_dim = file.get_int(f"{arch}.rope.dimension_count", head_dim, low=2, high=head_dim)
        if rope_dim % 2:
            raise file.error(f"{arch}.rope.dimension_count is {rope_dim}, expected an even number")
        n_ctx_train = file.get_int(f"{arch}.context_length", low=1, high=MAX_CONTEXT)
        return cls(
            architecture=arch,
            name=file.get_str("general.name", file.path.stem),
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=n_head_kv,
            head_dim=head_dim,
            n_ff=_per_layer(file, f"{arch}.feed_forward_length", n_layer, 1 << 20),
            n_vocab=_n_vocab(file, arch),
            n_ctx_train=n_ctx_train,
            rms_eps=file.get_float(f"{arch}.attention.layer_norm_rms_epsilon", low=1e-12, high=1.0),
            rope_base=file.get_float(f"{arch}.rope.freq_base", 10000.0, low=2.0, high=1e12),
            rope_dim=rope_dim,
            rope_interleaved=arch == "llama",
            rope_scaling=_rope_scaling(file, arch, n_ctx_train),
            sliding_window=file.get_int(f"{arch}.attention.sliding_window", 0),
            palu=_palu(file, n_layer, n_head_kv, head_dim),
        )

    def of_layers(self, layers: Sequence[int]) -> ModelConfig:
        """The same model with some of its layers only."""
        palu = self.palu
        if palu is not None:
            k_ranks, v_ranks = (tuple(ranks[i] for i in layers) for ranks in (palu.k_ranks, palu.v_ranks))
            palu = replace(palu, k_ranks=k_ranks, v_ranks=v_ranks)
        return replace(self, n_layer=len(layers), palu=palu)


def _per_layer(file: GGUFFile, key: str, n_layer: int, high: int, default: int | None = None) -> int:
    """A number that may be given once or as an array [n_layer] of equal values."""
    if isinstance(file.metadata.get(key), np.ndarray):
        values = file.get_array(key, int, length=n_layer)
        value = int(values[0])
        if (values != value).any():
            raise file.error(f"{key} differs from layer to layer, which is not supported")
        if not 1 <= value <= high:
            raise file.error(f"{key} is {value} in every layer, expected 1 to {high}")
        return value
    if default is None:
        return file.get_int(key, low=1, high=high)
    return file.get_int(key, default, low=1, high=high)


def _head_dim(file: GGUFFile, arch: str, n_embd: int, n_head: int) -> int:
    keys = [f"{arch}.attention.{kind}_length" for kind in ("key", "value")]
    if not all(key in file.metadata for key in keys) and n_embd % n_head:
        raise file.error(f"{arch}.attention.head_count is {n_head}, expected a divisor of embedding_length {n_embd}")
    head_dim, value_dim = (file.get_int(key, n_embd // n_head, low=2, high=1024) for key in keys)
    if head_dim != value_dim:
        raise file.error(f"{keys[1]} is {value_dim}, expected {keys[0]}, {head_dim}")
    return head_dim


def _palu(file: GGUFFile, n_layer: int, n_head_kv: int, head_dim: int) -> PaluConfig | None:
    if not any(key.startswith("palu.") for key in file.metadata):
        return None
    file.get_int("palu.version", low=1, high=1)
    group_size = file.get_int("palu.group_size", low=1, high=n_head_kv)
    if n_head_kv % group_size:
        raise file.error(f"palu.group_size is {group_size}, expected a divisor of {n_head_kv} KV heads")
    k_ranks, v_ranks = (_ranks(file, f"palu.{x}_rank", n_layer, group_size * head_dim) for x in "kv")
    latent = file.get_str("palu.latent")
    if latent not in LATENTS:
        raise file.error(f"palu.latent is {show(latent)}, expected one of {', '.join(LATENTS)}")
    return PaluConfig(group_size, k_ranks, v_ranks, latent, file.get_bool("palu.hadamard"))


def _ranks(file: GGUFFile, key: str, n_layer: int, full: int) -> tuple[int, ...]:
    ranks = tuple(file.get_array(key, int, length=n_layer).tolist())
    for layer, rank in enumerate(ranks):
        if rank != full and (rank % RANK_UNIT or not 0 < rank < full):
            expected = f"a multiple of {RANK_UNIT} below {full}, or {full}, the width of a group"
            raise file.error(f"{key} is {rank} in layer {layer}, expected {expected}")
    return ranks


def _n_vocab(file: GGUFFile, arch: str) -> int:
    """The rows of the embedding, which the token list and the declared size must agree with."""
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise file.error("missing tensor 'token_embd.weight'")
    n_vocab = table.shape[0]
    tokens = file.get_array("tokenizer.ggml.tokens", str, None)
    if tokens is not None and len(tokens) != n_vocab:
        raise file.error(f"tokenizer.ggml.tokens has {len(tokens)} tokens, expected {n_vocab}, the embedding's rows")
    if (declared := file.get_int(f"{arch}.vocab_size", n_vocab)) != n_vocab:
        raise file.error(f"{arch}.vocab_size is {declared}, expected {n_vocab}, the rows of token_embd.weight")
    return n_vocab


def _rope_scaling(file: GGUFFile, arch: str, n_ctx_train: int) -> RopeScaling:
    """As in llama.cpp: the type defaults to linear, a factor that is absent or 0 means 1, and for these architectures
    the keys `yarn_ext_factor`, `yarn_attn_factor`, `yarn_beta_fast`, `yarn_beta_slow` and `yarn_log_multiplier`, which
    converters may write, are not read: YaRN has its defaults."""
    prefix = f"{arch}.rope.scaling."
    kind = file.get_str(prefix + "type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise file.error(f"{prefix}type is {show(kind)}, expected none, linear or yarn")
    factor_key = prefix + "factor" if prefix + "factor" in file.metadata else f"{arch}.rope.scale_linear"
    factor = file.get_float(factor_key, 1.0, low=0.0, high=1e6) or 1.0
    attention_factor = file.get_float(prefix + "attn_factor", 1.0, low=1e-3, high=1e3)
    if kind == "none" or factor == 1.0:
        return RopeScaling("none", attention_factor=attention_factor)
    if kind == "linear":
        if factor < 1e-3:
            raise file.error(f"{factor_key} is {factor:g}, expected 0.001 or more")
        return RopeScaling("linear", factor, attention_factor=attention_factor)
    if factor < 1.0:
        raise file.error(f"{factor_key} is {factor:g}, expected 1 or more for yarn")
    original_context = file.get_int(prefix + "original_context_length", n_ctx_train, low=1, high=MAX_CONTEXT)
    return RopeScaling("yarn", factor, original_context, attention_factor=attention_factor)
