"""The text that shows what a model's layers really get, and the second moments of what keys and values are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from ..decoder import Decoder
from ..errors import ModelError
from ..llama import Llama
from ..policies import Dense
from ..reference import rms_norm
from ..stores import get_store
from .side_file import SideFile

WINDOW = 1024  # tokens, where the model allows so many


@dataclass(frozen=True)
class Windows:
    """Consecutive tokens of a text, each window read apart from the others."""

    tokens: np.ndarray  # int32 [n, length]
    source: str  # what the text is, for the file's metadata

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.tokens.shape).encode() + self.tokens.tobytes()).hexdigest()[:16]


def own_text() -> bytes:
    """The text that is used without another: articles and questions written for minirt, and a play of Shakespeare."""
    data = resources.files("minirt.eval.data")
    articles = [entry["article"] for entry in json.loads(data.joinpath("articles.json").read_text("utf-8"))]
    questions = json.loads(data.joinpath("questions.json").read_text("utf-8"))["data"]
    facts = [paragraph["context"] for entry in questions for paragraph in entry["paragraphs"]]
    return "\n\n".join([*articles, *facts, data.joinpath("shakespeare.txt").read_text("utf-8")]).encode()


def cut(llama: Llama, text: bytes | None, n_windows: int) -> Windows:
    """Up to n_windows windows, spread over the text (None: minirt's own). ModelError if it does not fill one."""
    source = "minirt's own text" if text is None else f"a text with SHA-256 {hashlib.sha256(text).hexdigest()[:16]}"
    tokens = np.asarray(llama.tokenizer.encode_bytes(own_text() if text is None else text, add_bos=False), np.int32)
    length = window_length(llama.config.n_ctx_train)
    available = len(tokens) // length
    if not available:
        raise ModelError(
            f"the calibration text is too short: it has {len(tokens)} tokens, a window of this model has {length}"
        )
    n = min(n_windows, available)
    chosen = tokens[: available * length].reshape(available, length)[np.arange(n) * available // n]
    if llama.tokenizer.add_bos and llama.tokenizer.bos_id is not None:
        chosen[:, 0] = llama.tokenizer.bos_id
    return Windows(chosen, f"{source}, {n} windows of {length} tokens")


def window_length(n_ctx_train: int) -> int:
    return min(WINDOW, n_ctx_train)


def input_moments(llama: Llama, windows: Windows, side: SideFile, key: str) -> np.ndarray:
    """The mean of x x^T over all tokens, x the normed input of a layer's projections: float64 [n_layer, n, n].

    Products are float32, sums over windows float64. ModelError if a number is not finite.
    """
    c, layers = llama.config, llama.decoder.weights.layers
    sums = np.zeros((c.n_layer, c.n_embd, c.n_embd))

    def add(layer: int, x: np.ndarray) -> None:
        normed = rms_norm(x, layers[layer].attn_norm, c.rms_eps)
        sums[layer] += normed.T @ normed

    n, length = windows.tokens.shape
    read = reader(llama, length, add)
    for i in side.steps("reading the calibration text", key, n, sums):
        read(windows.tokens[i])
        if not np.isfinite(sums).all():
            raise ModelError(f"{llama.file.path}: activations are not finite: the file's weights are damaged")
    return sums / (n * length)


def reader(llama: Llama, length: int, seen: Callable[[int, np.ndarray], None]) -> Callable[[np.ndarray], None]:
    """A function that runs up to `length` tokens through the model: seen(layer, x) gets each layer's input [T, n].

    T is a few hundred at most: the rows of one call after the other. x is valid until seen returns.
    """
    d, store = llama.decoder, get_store("f32")
    decoder = Decoder(d.config, d.weights, _Listening(llama, seen), Dense())
    cache = decoder.new_cache(Dense().plan(d.config, length, store, store))

    def read(tokens: np.ndarray) -> None:
        decoder.rewind(cache, 0, 0)
        decoder.prefill(cache, tokens.tolist(), logits="none")

    return read


class _Listening:
    """The model's Ops, but what goes into a layer is heard on the way."""

    def __init__(self, llama: Llama, seen: Callable[[int, np.ndarray], None]):
        self._ops, self._seen = llama.decoder.ops, seen
        self._index = {id(layer): i for i, layer in enumerate(llama.decoder.weights.layers)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def qkv(self, x: np.ndarray, layer: Any, config: Any, angles: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._seen(self._index[id(layer)], x)
        return self._ops.qkv(x, layer, config, angles)
