"""ModelConfig: every hyper-parameter of a model, read from GGUF metadata in this one place.

Symbols used everywhere in minirt:
    N  rows in a call (tokens of a prompt chunk, or one per sequence)     B  sequences
    S  cached tokens                                                      T  tokens of a prompt chunk
    H_q, H_kv  query and key/value heads      d  head_dim                 g = H_q / H_kv
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context."""

    kind: str  # "none" | "linear" | "yarn"
    factor: float = 1.0  # context extension; frequencies are divided by it (fully for linear, by band for yarn)
    original_context: int = 0  # yarn: the context the model was trained at before extension
    extrapolation: float = 1.0  # yarn: ext_factor, weight of the unscaled high-frequency band
    attention_factor: float = 1.0  # yarn: multiplies the magnitude mscale = 0.1 ln(factor) + 1
    beta_fast: float = 32.0  # yarn: rotations above which a frequency is not scaled
    beta_slow: float = 1.0  # yarn: rotations below which it is scaled fully


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
