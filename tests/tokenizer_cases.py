"""Small vocabularies for tests, as GGUF metadata, and the token ids llama.cpp gives for them.

The ids, texts and merges lie in data/pretokenizer_cases.json, which make_pretokenizer_cases.py wrote.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

CASES = Path(__file__).parent / "data" / "pretokenizer_cases.json"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
PRES = ["default", "gpt-2", "mpt", "smollm", "starcoder", "refact", "command-r", "falcon", "llama-bpe", "llama3"]
PRES += ["llama-v3", "qwen2", "deepseek-r1-qwen", "qwen35", "tekken", "deepseek-llm", "deepseek-coder", "dbrx"]
SPECIAL = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, "<|im_start|>": CONTROL, "<|im_end|>": CONTROL}
SPECIAL |= {
    "<|endoftext|>": CONTROL,
    "<|a|>": CONTROL,
    "|>bbbb": CONTROL,
    "<tool>": USER_DEFINED,
    "  \t": USER_DEFINED,
    "<reponame>": NORMAL,
}
WHOLE = ["Ġzebra", "zebra", "ĠZebra"]  # tokens no merge leads to: only `ignore_merges` finds them


def load() -> dict[str, Any]:
    return json.loads(CASES.read_text(encoding="utf-8"))


def byte_chars() -> list[str]:
    """GPT-2's character of each byte."""
    visible = [b for b in range(256) if 0x21 <= b < 0x7F or (b >= 0xA1 and b != 0xAD)]
    rest = iter(range(0x100, 0x200))
    return [chr(b if b in visible else next(rest)) for b in range(256)]


def bpe(merges: list[str], pre: str | None) -> dict[str, Any]:
    """Metadata of a byte-level BPE vocabulary: bytes, joined merges, whole words, special tokens."""
    joined = [merge.replace(" ", "") for merge in merges]
    tokens = [*dict.fromkeys([*byte_chars(), *joined, *WHOLE]), *SPECIAL]
    types = [NORMAL] * (len(tokens) - len(SPECIAL)) + list(SPECIAL.values())
    keys = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": np.array(types, np.int32), "merges": merges}
    keys |= {"bos_token_id": tokens.index("<s>"), "eos_token_id": tokens.index("</s>")}
    return {"tokenizer.ggml." + key: value for key, value in keys.items() if value is not None}


def spm(pieces: list[str], **more: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece vocabulary: special tokens, bytes, then pieces from best to worst."""
    tokens = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    types = [*SPECIAL.values(), *[BYTE] * 256, *[NORMAL] * len(pieces)]
    scores = np.zeros(len(tokens), np.float32)
    scores[-len(pieces) :] = -np.arange(len(pieces))
    keys = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": np.array(types, np.int32), **more}
    return {"tokenizer.ggml." + key if "." not in key else key: value for key, value in keys.items()}


def variants(cases: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Vocabularies for the special-token cases."""
    merges, pieces = cases["merges"], cases["pieces"]
    return {
        "bpe": bpe(merges, "llama-bpe"),
        "spm": spm(pieces),
        "spm, no space prefix": spm(pieces, add_space_prefix=False),
        "spm, strips like phi-3": spm(pieces, **{"general.name": "Phi-3 mini"}),
    }
