"""Writes GGUF files for tests, whole or deliberately broken. Independent of minirt and of the gguf package.

    model = tiny()
    model.keys["llama.block_count"] = ("u32", 3)
    model.tensors["blk.0.attn_q.weight"].dims = [64, 63]
    model.write(path)

Text is encoded with surrogateescape, so "\\udcff" in a key, a name or a value is the invalid byte ff in the file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {"u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8, "u64": 10, "i64": 11,
         "f64": 12}  # fmt: skip
FORMATS = dict(zip(KINDS, ["B", "b", "H", "h", "I", "i", "f", "B", "", "Q", "q", "d"], strict=True))
F32, F16, Q4_0, Q8_0, I32 = 0, 1, 2, 8, 26


@dataclass
class Entry:
    """A tensor: dims in GGUF order, innermost first. `offset` overrides the next free one."""

    type: int
    dims: list[int]
    data: bytes
    offset: int | None = None


@dataclass
class Gguf:
    """A file to be. Keys are name -> (kind, value), with kind "u32", "str" ... or "[u32]" for an array."""

    keys: dict[str, tuple[str, Any]] = field(default_factory=dict)
    tensors: dict[str, Entry] = field(default_factory=dict)
    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None  # what the header says, if not the truth
    n_keys: int | None = None
    raw_keys: list[bytes] = field(default_factory=list)  # whole entries, counted, after the others
    raw_tensors: list[bytes] = field(default_factory=list)
    alignment: int = 32  # used for the layout; the key general.alignment is up to the caller

    def to_bytes(self) -> bytes:
        out = [self.magic, struct.pack("<I", self.version)]
        n_tensors = len(self.tensors) + len(self.raw_tensors)
        n_keys = len(self.keys) + len(self.raw_keys)
        out.append(struct.pack("<Q", n_tensors if self.n_tensors is None else self.n_tensors))
        out.append(struct.pack("<Q", n_keys if self.n_keys is None else self.n_keys))
        out += [key_entry(name, kind, value) for name, (kind, value) in self.keys.items()]
        out += self.raw_keys
        data = bytearray()
        for name, t in self.tensors.items():
            offset = len(data) if t.offset is None else t.offset
            out.append(tensor_entry(name, t.type, t.dims, offset))
            data += t.data + bytes(-len(t.data) % self.alignment)
        out += self.raw_tensors
        head = b"".join(out)
        return head + bytes(-len(head) % self.alignment) + bytes(data)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.to_bytes())
        return path


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def key_entry(name: str, kind: str, value: Any) -> bytes:
    if kind.startswith("["):
        inner = kind[1:-1]
        body = b"".join(scalar(inner, v) for v in value)
        return text(name) + struct.pack("<IIQ", 9, KINDS[inner], len(value)) + body
    return text(name) + struct.pack("<I", KINDS[kind]) + scalar(kind, value)


def scalar(kind: str, value: Any) -> bytes:
    return text(value) if kind == "str" else struct.pack("<" + FORMATS[kind], value)


def tensor_entry(name: str, type_: int, dims: list[int], offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_, offset)


def weight(rng: np.random.RandomState, type_: int, *shape: int) -> Entry:
    """A random tensor of a NumPy shape whose values are about 1 / sqrt(columns)."""
    values = (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)
    if type_ == F16:
        data = values.astype("<f2").tobytes()
    elif type_ == F32:
        data = values.tobytes()
    else:
        n_blocks, n_bytes = values.size // 32, {Q4_0: 16, Q8_0: 32}[type_]
        scale = np.full((n_blocks, 1), 0.01, "<f2").view(np.uint8)
        data = np.hstack([scale, rng.randint(0, 256, (n_blocks, n_bytes)).astype(np.uint8)]).tobytes()
    return Entry(type_, list(shape[::-1]), data)


def tiny(tokenizer: str = "gpt2", arch: str = "llama", tied: bool = True, seed: int = 0) -> Gguf:
    """A valid model of 2 layers: n_embd 64, 4 heads of 16, 2 KV heads, n_ff 128, context 256; about 130 kB.

    `tokenizer` is "gpt2" (byte-level BPE) or "llama" (sentencepiece): see `bpe_keys` and `spm_keys`.
    """
    rng = np.random.RandomState(seed)
    vocabulary = {"gpt2": bpe_keys, "llama": spm_keys}[tokenizer]()
    n_vocab = len(vocabulary["tokenizer.ggml.tokens"][1])
    model = Gguf(
        {
            "general.architecture": ("str", arch),
            "general.name": ("str", "Tiny"),
            f"{arch}.block_count": ("u32", 2),
            f"{arch}.context_length": ("u32", 256),
            f"{arch}.embedding_length": ("u32", 64),
            f"{arch}.feed_forward_length": ("u32", 128),
            f"{arch}.attention.head_count": ("u32", 4),
            f"{arch}.attention.head_count_kv": ("u32", 2),
            f"{arch}.attention.layer_norm_rms_epsilon": ("f32", 1e-5),
            f"{arch}.rope.freq_base": ("f32", 10000.0),
            f"{arch}.rope.dimension_count": ("u32", 16),
            f"{arch}.vocab_size": ("u32", n_vocab),
        }
        | vocabulary
    )
    model.tensors["token_embd.weight"] = weight(rng, F16, n_vocab, 64)
    for i in range(2):
        layer = {
            "attn_norm.weight": ones(64),
            "attn_q.weight": weight(rng, Q8_0, 64, 64),
            "attn_k.weight": weight(rng, F32, 32, 64),
            "attn_v.weight": weight(rng, Q8_0, 32, 64),
            "attn_output.weight": weight(rng, Q4_0, 64, 64),
            "ffn_norm.weight": ones(64),
            "ffn_gate.weight": weight(rng, Q8_0, 128, 64),
            "ffn_up.weight": weight(rng, Q4_0, 128, 64),
            "ffn_down.weight": weight(rng, Q8_0, 64, 128),
        }
        if arch == "qwen2":
            layer |= {f"attn_{x}.bias": weight(rng, F32, n) for x, n in (("q", 64), ("k", 32), ("v", 32))}
        if arch == "qwen3":
            layer |= {"attn_q_norm.weight": ones(16), "attn_k_norm.weight": ones(16)}
        model.tensors |= {f"blk.{i}.{name}": entry for name, entry in layer.items()}
    model.tensors["output_norm.weight"] = ones(64)
    if not tied:
        model.tensors["output.weight"] = weight(rng, Q8_0, n_vocab, 64)
    return model


def tiny_model(path: Path, **options: Any) -> Path:
    """Writes `tiny(**options)` to the path."""
    return tiny(**options).write(path)


def ones(n: int) -> Entry:
    return Entry(F32, [n], np.ones(n, "<f4").tobytes())


NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def bpe_keys() -> dict[str, tuple[str, Any]]:
    """256 bytes as GPT-2 spells them, 8 merges, and 4 special tokens: 268 tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    merges = ["Ġ t", "h e", "i n", "Ġ a", "Ġt he", "e r", "o n", "r e"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
    tokens = special + [letter[b] for b in range(256)] + [m.replace(" ", "") for m in merges]
    return {
        "tokenizer.ggml.model": ("str", "gpt2"),
        "tokenizer.ggml.pre": ("str", "smollm"),
        "tokenizer.ggml.tokens": ("[str]", tokens),
        "tokenizer.ggml.token_type": ("[i32]", [CONTROL] * 4 + [NORMAL] * 264),
        "tokenizer.ggml.merges": ("[str]", merges),
        "tokenizer.ggml.bos_token_id": ("u32", 1),
        "tokenizer.ggml.eos_token_id": ("u32", 2),
        "tokenizer.ggml.add_bos_token": ("bool", False),
    }


def spm_keys() -> dict[str, tuple[str, Any]]:
    """Unknown, begin, end, 256 bytes, and pieces enough for plain English: about 330 tokens."""
    pieces = ["▁t", "he", "in", "▁a", "▁the", "er", "on", "re", "▁", *map(chr, range(33, 127))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": ("str", "llama"),
        "tokenizer.ggml.tokens": ("[str]", tokens),
        "tokenizer.ggml.scores": ("[f32]", [0.0] * 259 + [-float(i) for i in range(len(pieces))]),
        "tokenizer.ggml.token_type": ("[i32]", [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces)),
        "tokenizer.ggml.bos_token_id": ("u32", 1),
        "tokenizer.ggml.eos_token_id": ("u32", 2),
        "tokenizer.ggml.unknown_token_id": ("u32", 0),
        "tokenizer.ggml.add_bos_token": ("bool", True),
    }
