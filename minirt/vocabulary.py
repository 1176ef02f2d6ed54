"""The vocabulary of a GGUF file, read from metadata that nobody has checked yet.

Whatever is missing, contradictory or out of range is a ModelError of one line that names the key. What is left
follows llama.cpp: which ids are special, which end a generation, whether BOS is added.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import ModelError
from .pretokenizers import PRETOKENIZERS

UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)  # tokenizer.ggml.token_type
KINDS = {"llama": "spm", "gpt2": "bpe"}  # tokenizer.ggml.model
MAX_TOKENS = 1 << 20
MAX_TOKEN_CHARS = 1 << 14
NO_ID = (0xFFFFFFFF, -1)  # how files write "there is none"

# Texts that end a turn or a document, whatever the file says of them; the list is llama.cpp's.
EOT_TEXTS: tuple[str, ...] = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
    "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>",
)  # fmt: skip
EOG_TEXTS: tuple[str, ...] = (
    *EOT_TEXTS, "<|eom_id|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "</s>", "[EOS]", "<eos>", "<turn|>",
    "<|tool_response>", "[e~[",
)  # fmt: skip
FIM_TEXTS = {  # fill-in-the-middle marks; the last three also end a generation
    "pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>"),
    "suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>"),
    "mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>"),
    "pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "sep": ("<|file_sep|>",),
}


def warn(message: str) -> None:
    """Default listener for what is odd but usable."""
    warnings.warn(message, stacklevel=3)


def short(value: object) -> str:
    """A value of the file as it may appear in an error: printable, one line, at most 60 characters."""
    text = repr(value[:64] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:56] + "...'"


@dataclass
class Vocabulary:
    """Checked tokens and rules. `tokens[id]`, `types[id]` and `scores[id]` for 0 <= id < n_vocab; an id may be None."""

    kind: str  # "spm": SentencePiece, merged by score; "bpe": byte-level BPE, merged by rank
    pre: str  # how bpe splits text into words, a key of PRETOKENIZERS
    tokens: list[str]
    index: dict[str, int]  # text -> id
    types: bytearray
    scores: list[float] = field(default_factory=list)  # spm only
    merges: list[tuple[str, str]] = field(default_factory=list)  # bpe only, best first
    bos_id: int | None = None
    eos_id: int | None = None
    eot_id: int | None = None
    eom_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    eog_ids: frozenset[int] = frozenset()  # any of these ends a generation
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    rstrip_ids: frozenset[int] = frozenset()  # parsed specials that swallow the whitespace after them

    @property
    def n_vocab(self) -> int:
        return len(self.tokens)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], path: str, warn: Callable[[str], None] = warn) -> Vocabulary:
        """Read `tokenizer.ggml.*`. Raises ModelError; `warn` hears of a file that is usable but suspicious."""
        return _Reader(metadata, path, warn).read()


@dataclass
class _Reader:
    metadata: Mapping[str, Any]
    path: str
    warn: Callable[[str], None]

    def fail(self, key: str, problem: str) -> ModelError:
        return ModelError(f"{self.path}: tokenizer.ggml.{key}: {problem}")

    def read(self) -> Vocabulary:
        model = self.get("model", str)
        if model in (None, "no_vocab", "none"):
            raise ModelError(f"{self.path}: the file has no tokenizer (tokenizer.ggml.model: {model or 'missing'})")
        if model not in KINDS:
            raise ModelError(f"{self.path}: unknown tokenizer: {short(model)}, known are {', '.join(map(repr, KINDS))}")
        kind = KINDS[model]
        tokens, index = self.tokens()
        vocab = Vocabulary(kind, self.pre(kind), tokens, index, self.types(kind, tokens))
        if kind == "spm":
            vocab.scores = self.scores(len(tokens))
        else:
            vocab.merges = self.merges(index)
        self.ids(vocab)
        self.ends(vocab)
        self.rules(vocab)
        return vocab

    def get(self, key: str, kind: type) -> Any:
        """The value of a key, or None where it is missing; `kind` is str, int, bool or list."""
        value = self.metadata.get("tokenizer.ggml." + key)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise self.fail(key, f"expected {kind.__name__}, found {type(value).__name__}")
        return value

    def pre(self, kind: str) -> str:
        pre = self.get("pre", str)
        if kind == "spm":
            return ""
        if not pre:
            self.warn(f"{self.path}: missing pre-tokenizer type, using 'default': GENERATION QUALITY WILL BE DEGRADED")
            return "default"
        if pre not in PRETOKENIZERS:
            raise ModelError(f"{self.path}: unknown pre-tokenizer type: {short(pre)}")
        return pre

    def strings(self, key: str) -> list[str]:
        value = self.get(key, list)
        if not value:
            raise self.fail(key, "missing or empty")
        try:
            "".join(value).encode()
        except TypeError:
            raise self.fail(key, "expected strings only") from None
        except UnicodeEncodeError:
            raise self.fail(key, "not valid UTF-8") from None
        return value

    def tokens(self) -> tuple[list[str], dict[str, int]]:
        tokens = self.strings("tokens")
        n = len(tokens)
        if n > MAX_TOKENS:
            raise self.fail("tokens", f"{n} tokens, at most {MAX_TOKENS} are supported")
        if (longest := max(map(len, tokens))) > MAX_TOKEN_CHARS:
            raise self.fail("tokens", f"a token of {longest} characters, at most {MAX_TOKEN_CHARS} are supported")
        if "" in tokens:
            tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
        index = dict(zip(tokens, range(n), strict=True))
        if len(index) != n:
            first = next(i for i, text in enumerate(tokens) if index[text] != i)
            raise self.fail("tokens", f"duplicate token {short(tokens[first])}, ids {first} and {index[tokens[first]]}")
        return tokens, index

    def numbers(self, key: str, n: int, kinds: str) -> np.ndarray | None:
        """A numeric array of n entries whose NumPy kind is one of `kinds`, or None where it is missing."""
        value = self.metadata.get("tokenizer.ggml." + key)
        if value is None:
            return None
        try:
            array = np.asarray(value)
        except ValueError:
            raise self.fail(key, "not an array of numbers") from None
        if array.ndim != 1 or (array.dtype.kind not in kinds and array.size):
            raise self.fail(key, f"expected numbers, found {array.dtype} of shape {array.shape}")
        if array.size != n:
            raise self.fail(key, f"{array.size} entries for {n} tokens")
        return array

    def types(self, kind: str, tokens: list[str]) -> bytearray:
        array = self.numbers("token_type", len(tokens), "iu")
        if array is None:
            array = np.full(len(tokens), NORMAL)
            if kind == "spm":
                array[[i for i, text in enumerate(tokens) if byte_of(text) is not None]] = BYTE
        if (wrong := np.flatnonzero((array < UNDEFINED) | (array > BYTE))).size:
            raise self.fail("token_type", f"token {wrong[0]} has the unknown type {array[wrong[0]]}")
        for i in np.flatnonzero(array == BYTE):
            if byte_of(tokens[i]) is None:
                raise self.fail("tokens", f"byte token {i} is {short(tokens[i])}, expected the form '<0x1F>'")
        return bytearray(array.astype(np.uint8).tobytes())

    def scores(self, n: int) -> list[float]:
        array = self.numbers("scores", n, "fiu")
        if array is None:
            return [0.0] * n
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if np.isnan(array).any():
            raise self.fail("scores", f"the score of token {int(np.isnan(array).argmax())} is NaN")
        return array.tolist()

    def merges(self, index: dict[str, int]) -> list[tuple[str, str]]:
        lines = self.strings("merges")
        if len(set(lines)) != len(lines):
            lines = list(dict.fromkeys(lines))  # the first of equal merges counts, as in llama.cpp
        if len(lines) > 4 * MAX_TOKENS:
            raise self.fail("merges", f"{len(lines)} merges, at most {4 * MAX_TOKENS} are supported")
        merges: list[Any] = [tuple(line.split(" ", 1)) for line in lines]
        for i, pair in enumerate(merges):
            if len(pair) != 2 or pair[0] not in index or pair[1] not in index or pair[0] + pair[1] not in index:
                raise self.fail("merges", f"merge {i} is {short(lines[i])}, expected two tokens that join to a third")
        return merges

    def ids(self, vocab: Vocabulary) -> None:
        """Special ids: the file's, else llama.cpp's defaults where those are no ordinary words."""
        defaults = {"bos": 1, "eos": 2, "unk": 0} if vocab.kind == "spm" else {"bos": 11, "eos": 11}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("eot", "eot"), ("eom", "eom"), ("unk", "unknown")):
            token_id = self.token_id(f"{key}_token_id", vocab.n_vocab)
            default = defaults.get(name, vocab.n_vocab)
            if f"tokenizer.ggml.{key}_token_id" not in self.metadata and default < vocab.n_vocab:
                token_id = default if vocab.types[default] in (CONTROL, UNKNOWN) else None
            setattr(vocab, f"{name}_id", token_id)
        vocab.pad_id = self.token_id("padding_token_id", vocab.n_vocab, needed=False)

    def ends(self, vocab: Vocabulary) -> None:
        """What ends a generation, by id and by text; a token that is special by its text becomes CONTROL."""
        index = vocab.index

        def by_text(texts: Iterable[str]) -> int | None:
            return next((index[text] for text in texts if text in index), None)

        vocab.eot_id = by_text(EOT_TEXTS) if vocab.eot_id is None else vocab.eot_id
        vocab.eom_id = index.get("<|eom_id|>") if vocab.eom_id is None else vocab.eom_id
        ends = {index[text] for text in EOG_TEXTS if text in index}
        control = set(ends)
        for name, texts in FIM_TEXTS.items():
            token_id = self.token_id(f"fim_{name}_token_id", vocab.n_vocab, needed=False)
            if token_id is None and (token_id := by_text(texts)) is not None:
                control.add(token_id)
            if token_id is not None and name in ("pad", "rep", "sep"):
                ends.add(token_id)
        for i in control:
            vocab.types[i] = CONTROL
        ends |= {i for i in (vocab.eos_id, vocab.eot_id, vocab.eom_id) if i is not None}
        vocab.eog_ids = frozenset(ends)

    def rules(self, vocab: Vocabulary) -> None:
        """What is added to a text: BOS, EOS, a space; and what is taken away."""
        spm = vocab.kind == "spm"
        vocab.add_space_prefix = spm and self.get("add_space_prefix", bool) is not False
        vocab.add_bos = self.adds("bos", vocab.bos_id, default=spm or PRETOKENIZERS[vocab.pre].add_bos)
        vocab.add_eos = self.adds("eos", vocab.eos_id, default=False)
        if re.search("phi-?3", str(self.metadata.get("general.name", "")).lower()):  # no key says so
            special = {i for i, kind in enumerate(vocab.types) if kind in (CONTROL, USER_DEFINED, UNKNOWN)}
            plain = {vocab.index.get(text) for text in ("<unk>", "<s>", "<|endoftext|>")}
            vocab.rstrip_ids = frozenset(special - plain)

    def token_id(self, key: str, n_vocab: int, *, needed: bool = True) -> int | None:
        """A token id, None where there is none; out of range is an error, or a warning where no one `needed` it."""
        value = self.get(key, int)
        if value is None or value in NO_ID or 0 <= value < n_vocab:
            return None if value in NO_ID else value
        if needed:
            raise self.fail(key, f"{value} is outside the vocabulary of {n_vocab} tokens")
        self.warn(f"{self.path}: tokenizer.ggml.{key}: {value} is outside the vocabulary of {n_vocab} tokens, ignored")
        return None

    def adds(self, name: str, token_id: int | None, *, default: bool) -> bool:
        given = self.get(f"add_{name}_token", bool)
        if given and token_id is None:
            raise self.fail(f"add_{name}_token", f"is true, but tokenizer.ggml.{name}_token_id is not set")
        return (default if given is None else given) and token_id is not None


def byte_of(text: str) -> int | None:
    """The byte that a token of the form '<0x1F>' stands for, or None."""
    return int(text[3:5], 16) if re.fullmatch("<0x[0-9A-Fa-f]{2}>", text) else None
