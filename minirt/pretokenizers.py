"""How byte-level BPE cuts text into words before it merges: one row for each `tokenizer.ggml.pre`.

A pre-tokenizer is a list of regular expressions applied in turn: each cuts every piece of the one before into its
matches and what lies between them. The expressions are those that llama.cpp applies, in Oniguruma's syntax. Checked
on every code point, the two differ only on letters and digits of scripts that joined Unicode in version 16.
"""

from __future__ import annotations

from dataclasses import dataclass

_ANY_CASE = "'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"
_SPACES = r"|\s+(?!\S)|\s+"
_GPT2 = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+" + _SPACES
_LINES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+" + _SPACES
_LLAMA3 = _ANY_CASE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _LINES
_QWEN2 = _ANY_CASE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _LINES
_QWEN35 = _ANY_CASE + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|" + _LINES.replace(r"^\s\p{L}", r"^\s\p{L}\p{M}")
# A letter beyond ASCII counts as upper and as lower case.
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+" + _SPACES
)
# Cased letters without those that Unicode took in (or up) after DeepSeek's list was made.
_CASED = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10C7}-\x{10FF}\x{1C80}-\x{1C8F}\x{2D00}-\x{2D2F}\x{A790}-\x{A7FF}"
    r"\x{AB30}-\x{AB6F}\x{10570}-\x{105BF}\x{10D40}-\x{10D8F}\x{16E40}-\x{16EDF}\x{1D400}-\x{1DFFF}]]"
)
_ASIAN = r"[\x{800}-\x{9FA5}\x{AC00}-\x{D7FF}&&[^\s]]+"
_PUNCTUATION = r"[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3001}-\x{3002}]+"


@dataclass(frozen=True)
class PreTokenizer:
    """`splits` in order; `ignore_merges`: a word that is a token stays whole; `add_bos`: what the file may override."""

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_ROWS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9]{3}")),
    "gpt-2 phi-2 mpt olmo jais gigachat mellum exaone4 trillion granite-docling a.x-4.0": PreTokenizer((_GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": PreTokenizer((r"\p{N}", _GPT2)),
    "falcon": PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9]{3}")),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": PreTokenizer((_LLAMA3,), True, True),
    "dbrx smaug-bpe": PreTokenizer((_LLAMA3,)),
    "qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan solar-open grok-2 kormo": PreTokenizer((_QWEN2,)),
    "qwen35": PreTokenizer((_QWEN35,)),
    "tekken": PreTokenizer((_TEKKEN,), True, True),
    "deepseek-llm": PreTokenizer((r"[\r\n]", rf"\s?{_CASED}+", rf"\s?{_PUNCTUATION}", r"\s+\z", _ASIAN, r"\p{N}+")),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, r"\p{N}")),
}
PRETOKENIZERS = {name: row for names, row in _ROWS.items() for name in names.split()}
