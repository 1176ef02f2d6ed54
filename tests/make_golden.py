"""Produce data/golden_logits.npz and .json: logits of the models in golden.py, by implementations that are not ours.

Run by hand, in an environment of its own (none of these is a dependency of minirt):

    pip install torch transformers llama-cpp-python gguf click numpy
    python tests/make_golden.py

Truth is transformers, eager attention, weights and activations in float64 (its RMSNorm, softmax and rotation tables
round to float32), given the dequantised weights of the GGUF file. llama.cpp reads the same file, converted by its own
quantiser to F32 where it is not, with float32 KV cache and without flash attention; the largest difference between the
two is recorded per model. llama.cpp ignores `llama.attention.sliding_window`, so those models are checked only
inside their first window.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import gguf
import golden
import llama_cpp as lc
import numpy as np
from make_model import make_model

_quiet = lc.llama_log_callback(lambda *_: None)
lc.llama_log_set(_quiet, None)
lc.llama_backend_init()


class LlamaCpp:
    """llama.cpp's low-level API on one file: 2 threads, no flash attention, KV cache of type 'F32' or 'F16'.

    Weight repacking buffers are off: llama-cpp-python 0.3.36 built on a CPU with AMX may crash in them, and they do not
    change which numbers are multiplied.
    """

    def __init__(self, path: str | Path, n_ctx: int, kv: str = "F32", n_threads: int = 2) -> None:
        params = lc.llama_model_default_params()
        params.use_extra_bufts = False
        self.model = lc.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.vocab = lc.llama_model_get_vocab(self.model)
        self.n_vocab = lc.llama_vocab_n_tokens(self.vocab)
        context = lc.llama_context_default_params()
        context.n_ctx = n_ctx
        context.n_batch = context.n_ubatch = 512
        context.n_threads = context.n_threads_batch = n_threads
        context.type_k = context.type_v = int(gguf.GGMLQuantizationType[kv])
        context.flash_attn_type = 0
        self.context = lc.llama_init_from_model(self.model, context)
        self.batch = lc.llama_batch_init(n_ctx, 0, 1)
        self.n_past = 0

    def close(self) -> None:
        lc.llama_batch_free(self.batch)
        lc.llama_free(self.context)
        lc.llama_model_free(self.model)

    def clear(self) -> None:
        lc.llama_memory_clear(lc.llama_get_memory(self.context), True)
        self.n_past = 0

    def decode(self, tokens: Any, first: int = 0) -> np.ndarray:
        """Append int tokens [T <= 512] to the cache; logits of tokens[first:], a copy, float32 [T - first, n_vocab]."""
        batch, n = self.batch, len(tokens)
        batch.n_tokens = n
        for i, token in enumerate(tokens):
            batch.token[i] = int(token)
            batch.pos[i] = self.n_past + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i >= first
        if lc.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        self.n_past += n
        return np.ctypeslib.as_array(lc.llama_get_logits(self.context), (n - first, self.n_vocab)).copy()

    def tokenize(self, text: bytes, parse_special: bool = False) -> np.ndarray:
        """Ids int32 of `text`, with BOS only if the file asks for it."""
        ids = (ctypes.c_int32 * (len(text) + 8))()
        n = lc.llama_tokenize(self.vocab, text, len(text), ids, len(ids), True, parse_special)
        return np.array(ids[:n], np.int32)


def to_f32(source: Path, target: Path) -> Path:
    """llama.cpp's own dequantised F32 copy of a GGUF."""
    params = lc.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = lc.LLAMA_FTYPE_ALL_F32, True, 2
    if lc.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp cannot convert {source}")
    return target


def half_split(w: np.ndarray, n_head: int) -> np.ndarray:
    """Rows of a llama-architecture Q or K, pairs (2i, 2i+1) -> pairs (i, i + d/2), as transformers wants them."""
    return w.reshape(n_head, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def transformers_model(path: Path, m: dict[str, Any]) -> Any:
    """The transformers model in float64 holding the dequantised weights of the GGUF at `path`, made with kwargs `m`."""
    import torch
    import transformers as tf

    architecture = m.get("architecture", "llama")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": m.get("rope_base", 10000.0)}
    scaling = m.get("scaling") or {}
    if scaling:
        rope |= {"rope_type": scaling["kind"], "factor": scaling["factor"]}
    if scaling.get("kind") == "yarn":
        rope["original_max_position_embeddings"] = scaling.get("original_context", m["n_ctx"])
        # for these architectures llama.cpp ignores yarn_beta_fast, yarn_beta_slow and yarn_ext_factor, and so do we;
        # its rope.scaling.attn_factor multiplies the magnitude 0.1 ln(factor) + 1, transformers' replaces it
        rope["attention_factor"] = scaling.get("attention_factor", 1.0) * (0.1 * np.log(scaling["factor"]) + 1.0)
    if m.get("rope_freqs"):
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = m["rope_freqs"]

    family = "Mistral" if m.get("sliding_window") else architecture.capitalize()
    config = getattr(tf, family + "Config")(
        vocab_size=m["n_vocab"], hidden_size=m["n_embd"], intermediate_size=m["n_ff"], num_hidden_layers=m["n_layer"],
        num_attention_heads=m["n_head"], num_key_value_heads=m["n_head_kv"], head_dim=m["head_dim"],
        max_position_embeddings=m["n_ctx"], rms_norm_eps=m.get("rms_eps", 1e-5), rope_parameters=rope,
        tie_word_embeddings=m.get("tied", False),
        **({"sliding_window": m["sliding_window"]} if family == "Mistral" else {}),
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = getattr(tf, family + "ForCausalLM")(config).double().eval()

    names = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    state = {}
    for t in gguf.GGUFReader(path).tensors:
        if t.name == "rope_freqs.weight":
            continue
        *block, stem, kind = t.name.split(".")
        w = gguf.dequantize(t.data, t.tensor_type)
        if architecture == "llama" and stem in ("attn_q", "attn_k"):
            w = half_split(w, m["n_head"] if stem == "attn_q" else m["n_head_kv"])
        prefix = f"model.layers.{block[1]}." if block else ""
        state[prefix + names[stem] + "." + kind] = torch.from_numpy(w.astype(np.float64))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == (["lm_head.weight"] if m.get("tied") else []), missing
    assert not unexpected, unexpected
    return model


def main() -> None:
    import torch

    torch.set_num_threads(2)
    arrays: dict[str, np.ndarray] = {}
    report: dict[str, Any] = {}
    for name, m in golden.MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            make_model(str(path), **m)
            n = golden.LONG if name.endswith("-long") else golden.SHORT
            tokens = np.random.RandomState(m["seed"]).randint(0, m["n_vocab"], n).astype(np.int32)
            with torch.no_grad():
                truth = transformers_model(path, m)(torch.from_numpy(tokens[None].astype(np.int64))).logits[0].numpy()
            exact = path if m.get("type", "F32") == "F32" else to_f32(path, Path(folder) / "f32.gguf")
            peer = LlamaCpp(exact, 512)
            theirs = peer.decode(tokens)
            peer.close()
            seen = slice(0, m.get("sliding_window") or n)
            positions = np.array(golden.LONG_POSITIONS if n == golden.LONG else range(n), np.int32)
            arrays |= {
                f"{name}/tokens": tokens,
                f"{name}/positions": positions,
                f"{name}/logits": truth[positions].astype(np.float32),
                f"{name}/sha256": np.array(golden.weights_sha256(path)),
            }
            difference = np.abs(truth - theirs)[seen]
            report[name] = {
                "logits_std": round(float(truth.std()), 3),
                "top1_margin_median": round(float(np.median(np.diff(np.sort(truth)[:, -2:]))), 3),
                "positions_compared_with_llamacpp": len(difference),
                "max_abs_difference": float(f"{difference.max():.3g}"),
                "nmse": float(f"{(difference**2).sum() / (truth[seen] ** 2).sum():.3g}"),
            }
            print(f"{name:32}", report[name], flush=True)
    np.savez_compressed(golden.DATA, **arrays)
    packages = ("transformers", "torch", "llama-cpp-python", "gguf", "numpy")
    versions = {package: importlib.metadata.version(package) for package in packages}
    summary = {"truth": "transformers", "versions": versions, "machine": platform.machine(), "models": report}
    golden.DATA.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
