"""Text to token ids and back, by the vocabulary inside the GGUF file.

SentencePiece models run on `sentencepiece`, byte-level BPE on `tokenizers`; both are rebuilt from the file's arrays.
Special tokens are cut out here, in llama.cpp's order, so both libraries only ever see plain text.

Bytes that are not UTF-8 (a `bytes` input, or surrogate escapes in a `str` from argv) become byte tokens and so come
back unchanged; a vocabulary without that byte gets U+FFFD, which is what llama.cpp makes of every such byte in BPE.
What a BPE vocabulary cannot spell (SmolLM2 lacks some control characters) is left out, as in llama.cpp.
"""

from __future__ import annotations

import codecs
import functools
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from . import vocabulary
from .errors import ModelError, UsageError
from .pretokenizers import PRETOKENIZERS
from .vocabulary import BYTE, CONTROL, UNKNOWN, USER_DEFINED, Vocabulary, byte_of

_NOT_UTF8 = re.compile("([\udc80-\udcff])")  # the byte 0x80 + n as Python's "surrogateescape" writes it
_SPACE = "▁"  # how SentencePiece writes a space


def _byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte: itself where it is visible, else the next one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return [chr(b) if b in visible else chr(0x100 + hidden.index(b)) for b in range(256)]


_BYTE_CHARS = _byte_alphabet()
_CHAR_BYTES = {ord(c): b for b, c in enumerate(_BYTE_CHARS)}


class Tokenizer:
    """Encodes and decodes; ids are ints in [0, n_vocab). Attributes of the vocabulary are listed in `Vocabulary`."""

    def __init__(self, vocab: Vocabulary, path: str) -> None:
        self.vocab = vocab
        self.kind, self.pre, self.n_vocab = vocab.kind, vocab.pre, vocab.n_vocab
        self.bos_id, self.eos_id, self.eot_id, self.eom_id = vocab.bos_id, vocab.eos_id, vocab.eot_id, vocab.eom_id
        self.unk_id, self.pad_id, self.eog_ids = vocab.unk_id, vocab.pad_id, vocab.eog_ids
        self.add_bos, self.add_eos = vocab.add_bos, vocab.add_eos
        special = [i for i, kind in enumerate(vocab.types) if kind in (CONTROL, UNKNOWN, USER_DEFINED)]
        special.sort(key=lambda i: -len(vocab.tokens[i].encode()))
        self._special = special
        self._user_defined = [i for i in special if vocab.types[i] == USER_DEFINED]
        self._words = _spm_encoder(vocab, path) if vocab.kind == "spm" else _bpe_encoder(vocab, path)
        if vocab.kind == "spm":
            self._byte_ids = {byte_of(vocab.tokens[i]): i for i, kind in enumerate(vocab.types) if kind == BYTE}
        else:
            self._byte_ids = {b: vocab.index[c] for b, c in enumerate(_BYTE_CHARS) if c in vocab.index}

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], path: str, warn: Callable[[str], None] = vocabulary.warn
    ) -> Tokenizer:
        """Build from `tokenizer.ggml.*`. Raises ModelError, also where the file has no tokenizer at all."""
        return cls(Vocabulary.from_metadata(metadata, path, warn), path)

    @functools.cached_property
    def longest(self) -> int:
        """Bytes that no token's text exceeds: with it a text that is too long is refused without encoding it."""
        return max(len(text.encode()) for text in self.vocab.tokens)

    # Text to ids

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Ids of a text. BOS (and EOS, where the file wants it) as the file says, or as `add_bos` says.

        `parse_special` turns "<|im_end|>" and its like into control tokens: only for text that is trusted.
        Raises UsageError for a surrogate that stands for no byte.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            try:
                text = text.encode(errors="surrogateescape").decode(errors="surrogateescape")
            except UnicodeEncodeError as error:
                raise UsageError(
                    f"character {error.start} of the text is the lone surrogate {text[error.start]!a}"
                ) from None
        ids: list[int] = []
        after_special = True
        for part in self._split_special(text, self._special if parse_special else self._user_defined):
            if isinstance(part, int):
                ids.append(part)
            elif after_special and self.vocab.add_space_prefix:
                ids += self._plain(" " + part)
            else:
                ids += self._plain(part)
            after_special = isinstance(part, int)
        if (self.add_bos if add_bos is None else add_bos) and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if self.add_eos and add_bos is not False and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def encode_bytes(self, raw: bytes, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """`encode` for bytes that need not be UTF-8."""
        return self.encode(raw.decode(errors="surrogateescape"), add_bos=add_bos, parse_special=parse_special)

    def encode_chat(self, text: str) -> list[int]:
        """Ids of a rendered chat template: special tokens parsed, never a second BOS, no EOS."""
        ids = self.encode(text, add_bos=False, parse_special=True)
        return [self.bos_id, *ids] if self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id] else ids

    def _split_special(self, text: str, candidates: list[int]) -> list[str | int]:
        """Cut special tokens out of a text, longest first: a long one wins over a shorter one that starts earlier."""
        parts: list[str | int] = [text] if text else []
        for i in candidates:
            token = self.vocab.tokens[i]
            if token not in text:
                continue
            blanks = " \t\n\v\f\r" if i in self.vocab.rstrip_ids else ""
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int):
                    cut.append(part)
                    continue
                start = 0
                while (end := part.find(token, start)) >= 0:
                    cut += [part[start:end], i] if end > start else [i]
                    start = end + len(token)
                    while part[start : start + 1] in blanks and start < len(part):
                        start += 1
                if start < len(part):
                    cut.append(part[start:])
            parts = cut
        return parts

    def _plain(self, text: str) -> list[int]:
        """Ids of a text without special tokens; what is not UTF-8 becomes byte tokens."""
        if not _NOT_UTF8.search(text):
            return self._words(text)
        ids: list[int] = []
        for k, piece in enumerate(_NOT_UTF8.split(text)):
            byte = ord(piece) - 0xDC00 if k % 2 else None
            if byte is None:
                ids += self._words(piece)
            elif byte in self._byte_ids:
                ids.append(self._byte_ids[byte])
            else:
                ids += self._words("\ufffd")
        return ids

    # Ids to text

    def token_text(self, token_id: int) -> str:
        """The token as the file writes it. Raises UsageError for an id outside the vocabulary."""
        if not 0 <= token_id < self.n_vocab:
            raise UsageError(f"token id {token_id} is outside the vocabulary of {self.n_vocab} tokens")
        return self.vocab.tokens[token_id]

    def is_special(self, token_id: int) -> bool:
        """True for control and unknown tokens, which `decode` hides by default."""
        return bool(self.token_text(token_id)) and self.vocab.types[token_id] in (CONTROL, UNKNOWN)

    def token_bytes(self, token_id: int, special: bool = False) -> bytes:
        """The bytes one token stands for, leading space included; b"" for a special one unless `special`."""
        text, kind = self.token_text(token_id), self.vocab.types[token_id]
        if kind in (CONTROL, UNKNOWN):
            return text.encode() if special else b""
        if kind == BYTE:
            return bytes([byte_of(text) or 0])
        if kind == USER_DEFINED:
            return text.encode()
        if self.kind == "spm":
            return text.replace(_SPACE, " ").encode()
        try:
            return bytes([_CHAR_BYTES[ord(c)] for c in text])
        except KeyError:
            return text.encode()

    def decode(self, ids: Iterable[int], *, special: bool = False, start: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD. `special` and `start` as in `stream_decoder`."""
        return self.decode_bytes(ids, special=special, start=start).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, special: bool = False, start: bool = True) -> bytes:
        """The bytes behind `decode`; with `special`, what `encode_bytes` was given."""
        return b"".join(map(self.stream_decoder(special, start).push_bytes, ids))

    def stream_decoder(self, special: bool = False, start: bool = True) -> StreamDecoder:
        """Decode token by token. `special` shows special tokens.

        `start`: the ids begin a text, so the space SentencePiece puts before it is taken off; False continues one.
        """
        return StreamDecoder(self, special, start)


class StreamDecoder:
    """Text from ids as they come. A character is held back until all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer, special: bool, start: bool) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._strip = start and tokenizer.vocab.add_space_prefix  # the next piece begins with a space nobody wrote
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that is complete with this token, possibly ""."""
        return self._decoder.decode(self.push_bytes(token_id))

    def push_bytes(self, token_id: int) -> bytes:
        """The bytes of this token in its place."""
        piece = self._tokenizer.token_bytes(token_id, self._special)
        if piece:
            # encode puts the space at the start and after every token it parsed; hidden ones keep words apart
            parsed = self._tokenizer.vocab.types[token_id] in (CONTROL, UNKNOWN, USER_DEFINED)
            piece = piece[1:] if self._strip and not parsed and piece[:1] == b" " else piece
            self._strip = parsed and self._tokenizer.vocab.add_space_prefix
        return piece

    def flush(self) -> str:
        """What is held back at the end of the text: U+FFFD for half a character, else ""."""
        return self._decoder.decode(b"", final=True)


# The two libraries, rebuilt


def _bpe_encoder(vocab: Vocabulary, path: str) -> Callable[[str], list[int]]:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    row = PRETOKENIZERS[vocab.pre]
    try:
        model = models.BPE(vocab=vocab.index, merges=vocab.merges, ignore_merges=row.ignore_merges)
    except Exception as error:
        raise ModelError(f"{path}: tokenizer.ggml.merges: {error}") from None
    engine = Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in row.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    return lambda text: engine.encode(text, add_special_tokens=False).ids


def _spm_encoder(vocab: Vocabulary, path: str) -> Callable[[str], list[int]]:
    from sentencepiece import SentencePieceProcessor

    n_bytes = vocab.types.count(BYTE)
    if n_bytes not in (0, 256):
        raise ModelError(f"{path}: tokenizer.ggml.tokens: {n_bytes} byte tokens, expected 0 or 256")
    if not n_bytes and vocab.unk_id is None:
        raise ModelError(f"{path}: tokenizer.ggml.tokens: neither byte tokens nor an unknown token")
    engine, unknown = SentencePieceProcessor(), vocab.unk_id
    try:
        engine.LoadFromSerializedProto(_spm_proto(vocab))
    except RuntimeError as error:
        raise ModelError(f"{path}: tokenizer.ggml.tokens: {error}") from None
    if n_bytes or unknown is None:
        return lambda text: engine.encode(text)
    return lambda text: [unknown if i == vocab.n_vocab else i for i in engine.encode(text)]


def _spm_proto(vocab: Vocabulary) -> bytes:
    """A sentencepiece ModelProto: pieces, a BPE trainer spec and a normalizer that changes nothing but spaces.

    Text never holds a raw space here (it is written as "▁"), so a piece like " 7" can match nothing: that is how
    control tokens are kept out. sentencepiece wants one unknown piece, which goes behind the last token.
    """

    def message(number: int, body: bytes) -> bytes:
        size, prefix = len(body), bytearray([number << 3 | 2])
        while size > 0x7F:
            prefix.append(size & 0x7F | 0x80)
            size >>= 7
        return bytes(prefix) + bytes([size]) + body

    def piece(text: str, score: float, kind: int) -> bytes:  # fields: piece = 1, score = 2, type = 3
        return message(1, message(1, text.encode()) + struct.pack("<Bf", 0x15, score) + bytes([0x18, kind]))

    normal, unknown, control, byte = 1, 2, 3, 6
    pieces = []
    for i, (text, score, kind) in enumerate(zip(vocab.tokens, vocab.scores, vocab.types, strict=True)):
        if kind == BYTE:
            pieces.append(piece(f"<0x{byte_of(text):02X}>", score, byte))
        elif kind in (CONTROL, UNKNOWN) or " " in text or "\0" in text:
            pieces.append(piece(f" {i}", 0.0, control))
        else:
            pieces.append(piece(text, score, normal))
    pieces.append(piece(" unknown", 0.0, unknown))
    # trainer_spec = 2: model_type = 3 (BPE is 2), byte_fallback = 35
    trainer = message(2, bytes([3 << 3, 2]) + bytes([0x98, 0x02, BYTE in vocab.types]))
    # normalizer_spec = 3: name = 1, add_dummy_prefix = 3, remove_extra_whitespaces = 4, escape_whitespaces = 5
    normalizer = message(3, message(1, b"identity") + bytes([0x18, 0, 0x20, 0, 0x28, 1]))
    return b"".join(pieces) + trainer + normalizer
