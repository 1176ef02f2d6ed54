"""Frozen truth from implementations that are not ours: tiny random models, and SmolLM2-135M.

Tiny models: logits by transformers, checked with llama.cpp (see make_golden.py). A test regenerates each model from
its seed and compares:

    for case in golden.cases():
        path = golden.build(case, tmp_path)
        ours = ...  # logits of case.tokens, float32 [T, n_vocab]
        assert abs(ours[case.positions] - case.logits).max() < tolerance

SmolLM2: greedy continuations and log-probabilities by llama.cpp on an F16 copy (see make_smollm2_golden.py): smollm2().
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from make_model import make_model

DATA = Path(__file__).parent / "data" / "golden_logits.npz"
SMOLLM2_DATA = DATA.with_name("smollm2_golden.npz")
SHORT, LONG = 24, 300  # prompt lengths
LONG_POSITIONS = (0, 31, 32, 33, 63, 64, 127, 200, 255, 256, 297, 298, 299)  # around windows, 64s and chunk borders


@dataclass(frozen=True)
class Case:
    name: str
    model: dict[str, Any]  # keyword arguments of make_model
    tokens: np.ndarray  # int32 [T], the prompt
    positions: np.ndarray  # int32 [P], the positions of the prompt whose logits are kept
    logits: np.ndarray  # float32 [P, n_vocab]
    weights_sha256: str  # of the bytes behind the header of the model file


def _llama(heads: int, heads_kv: int, head_dim: int, embd: int, **rest: Any) -> dict[str, Any]:
    shape = {"n_layer": 2, "n_ff": 224, "n_vocab": 320, "n_ctx": 512}
    return shape | {"n_head": heads, "n_head_kv": heads_kv, "head_dim": head_dim, "n_embd": embd} | rest


def _yarn(**rest: Any) -> dict[str, Any]:
    return {"kind": "yarn", "factor": 4.0, "original_context": 64} | rest


QWEN2 = {"architecture": "qwen2", "rope_base": 1e6, "rms_eps": 1e-6}
QWEN3 = {"architecture": "qwen3", "rope_base": 1e6, "rms_eps": 1e-6}

MODELS: dict[str, dict[str, Any]] = {
    "llama-gqa1-d64": _llama(2, 2, 64, 128, rms_eps=1e-2),
    "llama-gqa3-d64-tied": _llama(6, 2, 64, 192, n_layer=3, tied=True),
    "llama-gqa4-d80": _llama(8, 2, 80, 160),
    "llama-gqa8-d128": _llama(8, 1, 128, 256, tied=True, rope_base=5e5),
    "llama-ropefreqs": _llama(4, 1, 64, 96, rope_base=5e5, rope_freqs=64),
    "llama-ropefreqs-long": _llama(4, 2, 64, 128, rope_freqs=64, tied=True),
    "llama-linear-long": _llama(4, 2, 64, 128, scaling={"kind": "linear", "factor": 4.0}),
    "llama-yarn-long": _llama(4, 2, 64, 128, scaling=_yarn()),
    "llama-yarn-default-context-long": _llama(3, 1, 64, 96, scaling={"kind": "yarn", "factor": 4.0}),
    "llama-yarn-attention-factor-long": _llama(2, 1, 128, 192, rope_base=5e5, scaling=_yarn(attention_factor=1.25)),
    # llama.cpp ignores these keys for llama, qwen2 and qwen3; a file that has them must give its answers
    "llama-yarn-ignored-keys-long": _llama(
        3, 1, 64, 96, scaling=_yarn(beta_fast=8.0, beta_slow=2.0, extrapolation=0.5)
    ),
    "llama-window-long": _llama(4, 1, 64, 128, sliding_window=32),
    "llama-window-short": _llama(4, 2, 64, 128, sliding_window=8),
    "qwen2-gqa1-d64-tied": _llama(2, 2, 64, 128, tied=True, **QWEN2),
    "qwen2-gqa3-d128": _llama(3, 1, 128, 384, **QWEN2),  # llama.cpp wants head_dim = n_embd / n_head for qwen2
    "qwen2-yarn-long": _llama(4, 1, 64, 256, scaling=_yarn(), **QWEN2),
    "qwen3-gqa4-d128-tied": _llama(4, 1, 128, 160, n_layer=3, tied=True, **QWEN3),
    "qwen3-gqa8-d64": _llama(8, 1, 64, 128, **QWEN3 | {"rms_eps": 1e-2}),
    "qwen3-gqa1-d80": _llama(2, 2, 80, 96, **QWEN3),
    "qwen3-yarn-long": _llama(2, 1, 128, 128, scaling=_yarn(), **QWEN3),
    **{
        f"llama-{type.lower()}": _llama(4, 2, 64, 128, type=type, tied=type in ("Q4_0", "Q8_0"))
        for type in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
    },
    **{
        f"llama-{type.lower()}": _llama(4, 2, 64, 256, n_ff=256, type=type, tied=type == "Q6_K")
        for type in ("Q4_K", "Q5_K", "Q6_K")
    },
}
for _i, _model in enumerate(MODELS.values()):
    _model["seed"] = 1000 + _i  # append new models at the end: a seed belongs to a place


def cases() -> list[Case]:
    """Every frozen case, in the order of MODELS."""
    with np.load(DATA) as z:
        return [
            Case(
                name, model, z[f"{name}/tokens"], z[f"{name}/positions"], z[f"{name}/logits"], str(z[f"{name}/sha256"])
            )
            for name, model in MODELS.items()
        ]


def build(case: Case, folder: Path) -> Path:
    """Write the model of `case` into `folder`; AssertionError if the generator no longer makes the frozen weights."""
    path = folder / f"{case.name}.gguf"
    make_model(str(path), **case.model)
    assert weights_sha256(path) == case.weights_sha256, f"{case.name}: make_model or gguf writes other weights"
    return path


def weights_sha256(path: Path) -> str:
    """SHA-256 of the tensor data alone: the header may change with the version of the gguf package."""
    reader = gguf.GGUFReader(path)
    digest = hashlib.sha256()
    for tensor in sorted(reader.tensors, key=lambda t: t.name):
        digest.update(tensor.name.encode() + bytes(np.ascontiguousarray(tensor.data)))
    return digest.hexdigest()


@dataclass(frozen=True)
class Greedy:
    """One prompt and llama.cpp's greedy answer; it runs on after an end token."""

    text: str
    parse_special: bool  # whether special tokens in `text` were parsed
    prompt: np.ndarray  # int32 [T], no BOS
    tokens: np.ndarray  # int32 [96]
    runners_up: np.ndarray  # int32 [96], the second most likely token of each step
    margins: np.ndarray  # float32 [96], logit of tokens minus logit of runners_up


@dataclass(frozen=True)
class Windows:
    """Windows of 512 tokens scored as llama-perplexity does: logits at 256..510 predict tokens 257..511."""

    tokens: np.ndarray  # int32 [W, 512]
    top_ids: np.ndarray  # int32 [W, 255, 64], most likely first
    top_logprobs: np.ndarray  # float32 [W, 255, 64], natural logarithms
    next_logprobs: np.ndarray  # float32 [W, 255], of the true next token


def smollm2() -> tuple[list[Greedy], Windows]:
    """What llama.cpp computes for SmolLM2-135M-Instruct on an F16 copy, float32 KV cache, no flash attention."""
    with np.load(SMOLLM2_DATA) as z:
        greedy = [
            Greedy(
                str(z["greedy/texts"][i]), bool(z["greedy/parse_special"][i]), z[f"greedy/prompt{i}"],
                z["greedy/tokens"][i], z["greedy/runners_up"][i], z["greedy/margins"][i],
            )
            for i in range(len(z["greedy/texts"]))
        ]  # fmt: skip
        return greedy, Windows(*(z[f"windows/{k}"] for k in ("tokens", "top_ids", "top_logprobs", "next_logprobs")))


def coarse_kld(top_ids: np.ndarray, top_logprobs: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    """KL divergence [...] in nats of `logprobs` [..., n_vocab] from truth known as its top k [..., k].

    All tokens outside the top k count as one, so this is at most the full divergence.
    """
    p = np.exp(top_logprobs.astype(np.float64))
    ours = np.take_along_axis(logprobs, top_ids, -1).astype(np.float64)
    p_rest = np.maximum(1.0 - p.sum(-1), 1e-9)
    q_rest = np.maximum(1.0 - np.exp(ours).sum(-1), 1e-9)
    return (p * (top_logprobs - ours)).sum(-1) + p_rest * np.log(p_rest / q_rest)
