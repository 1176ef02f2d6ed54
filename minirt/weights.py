"""The weights of a model: every tensor checked against the configuration, then brought to a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .config import ModelConfig
from .dequantize import dequantize
from .gguf_file import GGUFFile, Tensor, show
from .ops import Array, Factor, Matrix, Ops
from .rope import make_rope

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerWeights:
    """One transformer block. Matrices are [n_out, n_in]; what an architecture has not is None."""

    attn_norm: Array  # [n_embd]
    wq: Matrix  # [H_q d, n_embd]
    wk: Matrix  # [H_kv d, n_embd]; with factors [G r, n_embd]
    wv: Matrix
    bq: Array | None  # [H_q d]
    bk: Array | None  # [H_kv d]
    bv: Array | None  # [H_kv d]
    q_norm: Array | None  # [d]
    k_norm: Array | None  # [d]
    wo: Matrix  # [n_embd, H_q d]
    ffn_norm: Array  # [n_embd]
    w_gate: Matrix  # [n_ff, n_embd]
    w_up: Matrix  # [n_ff, n_embd]
    w_down: Matrix  # [n_embd, n_ff]
    k_factor: Factor | None = None  # [H_kv d, r]: keys are cached as latents (Palu), and rebuilt by it
    v_factor: Factor | None = None


@dataclass(frozen=True)
class Weights:
    """A whole model on its device."""

    token_embd: Matrix  # [n_vocab, n_embd]
    layers: list[LayerWeights]
    output_norm: Array  # [n_embd]
    output: Matrix  # [n_vocab, n_embd]; the embeddings again where the file ties them
    rope_freqs: np.ndarray | None  # host float32 [rope_dim / 2]: each divides a rotary frequency


def check_tensors(file: GGUFFile, config: ModelConfig) -> None:
    """Raises ModelError unless the file holds exactly the tensors of the model, each of its shape.

    Vectors are read: they must be unquantised and finite, rotary factors above zero. A tensor this runtime does not
    apply is an error, because leaving it out would silently give another model.
    """
    required, optional = _shapes(config)
    for name, shape in (required | optional).items():
        tensor = file.tensors.get(name)
        if tensor is not None:
            _check(file, tensor, shape)
            if name.endswith(("attn_k_a.weight", "attn_k_b.weight", "attn_v_a.weight", "attn_v_b.weight")):
                _check_factor(file, tensor)
        elif name in required:
            raise file.error(f"missing tensor '{name}'")
    if unknown := file.tensors.keys() - required.keys() - optional.keys():
        raise file.error(
            f"tensor {show(min(unknown))} is not one a {config.architecture} model of this runtime applies"
        )


def load_weights(
    file: GGUFFile,
    config: ModelConfig,
    ops: Ops,
    progress: Callable[[int, int], None] | None = None,
    latents: bool = False,
) -> Weights:
    """Checks every tensor, then brings them to the device. `progress` hears (tensors done, in all).

    latents: whether latents will be cached, if the file has low-rank projections; else these become whole ones.
    """
    check_tensors(file, config)
    stretch = file.tensors.get("rope_freqs.weight")
    rope_freqs = None if stretch is None else dequantize(stretch)
    rope = make_rope(config, rope_freqs)
    done, total = 0, len(file.tensors) - (stretch is not None)

    def count(n: int = 1) -> None:
        nonlocal done
        done += n
        if progress:
            progress(done, total)

    def fetch(name: str, bring: Callable[[Tensor], Matrix] = ops.matrix) -> Any:
        tensor = file.tensors.get(name)
        if tensor is None:
            return None
        array = ops.vector(dequantize(tensor)) if len(tensor.shape) == 1 else bring(tensor)
        count()
        return array

    def layer(i: int) -> LayerWeights:
        own = {field: fetch(f"blk.{i}.{name}") for field, name in LAYER_TENSORS.items()}
        for x in "kv" if config.palu is not None else "":
            first, second = (file.tensors[f"blk.{i}.attn_{x}_{factor}.weight"] for factor in "ab")
            own[f"w{x}"] = ops.matrix(first if latents else product(first, second))
            if latents:
                more = (own["k_norm"], rope) if x == "k" else ()
                own[f"{x}_factor"] = ops.factor(second, config, own[f"b{x}"], *more)
            count(2)
        return LayerWeights(**own)

    token_embd, output = fetch("token_embd.weight", ops.table), fetch("output.weight")
    return Weights(
        token_embd=token_embd,
        layers=[layer(i) for i in range(config.n_layer)],
        output_norm=fetch("output_norm.weight"),
        output=ops.matrix(file.tensors["token_embd.weight"]) if output is None else output,
        rope_freqs=rope_freqs,
    )


def product(first: Tensor, second: Tensor) -> Tensor:
    """The whole projection [H_kv d, n_embd] of low-rank factors [G r, n_embd] and [H_kv d, r], in their type."""
    a, b = dequantize(first), dequantize(second)
    rank = b.shape[1]
    groups = a.reshape(-1, rank, a.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):  # damaged factors are reported once, with the logits
        values = (b.reshape(len(groups), -1, rank) @ groups).reshape(len(b), -1)
        values = values.astype(np.float16 if first.type.name == "F16" else np.float32)
    return Tensor(f"{second.name} {first.name}", first.type, values.shape, values.view(np.uint8))


LAYER_TENSORS = {
    "attn_norm": "attn_norm.weight",
    "wq": "attn_q.weight",
    "wk": "attn_k.weight",
    "wv": "attn_v.weight",
    "bq": "attn_q.bias",
    "bk": "attn_k.bias",
    "bv": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "wo": "attn_output.weight",
    "ffn_norm": "ffn_norm.weight",
    "w_gate": "ffn_gate.weight",
    "w_up": "ffn_up.weight",
    "w_down": "ffn_down.weight",
}


def _shapes(c: ModelConfig) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Name -> shape of the tensors a model must have, and of those it may have."""
    q, kv, n, ff = c.n_head * c.head_dim, c.n_head_kv * c.head_dim, c.n_embd, c.n_ff
    layer: dict[str, Shape] = {
        "attn_norm": (n,), "wq": (q, n), "wo": (n, q),
        "ffn_norm": (n,), "w_gate": (ff, n), "w_up": (ff, n), "w_down": (n, ff),
    }  # fmt: skip
    biases: dict[str, Shape] = {"bq": (q,), "bk": (kv,), "bv": (kv,)}
    required: dict[str, Shape] = {"token_embd.weight": (c.n_vocab, n), "output_norm.weight": (n,)}
    optional: dict[str, Shape] = {"output.weight": (c.n_vocab, n)}
    if c.palu is None:
        layer |= {"wk": (kv, n), "wv": (kv, n)}
    else:
        groups = c.n_head_kv // c.palu.group_size
        for x, ranks in (("k", c.palu.k_ranks), ("v", c.palu.v_ranks)):
            for i, rank in enumerate(ranks):
                required[f"blk.{i}.attn_{x}_a.weight"] = (groups * rank, n)
                required[f"blk.{i}.attn_{x}_b.weight"] = (kv, rank)
    if c.architecture == "llama":
        optional["rope_freqs.weight"] = (c.rope_dim // 2,)
    if c.architecture == "qwen2":
        layer |= biases
    else:
        optional |= _in_layers(c, biases)
    if c.architecture == "qwen3":
        layer |= {"q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
    return required | _in_layers(c, layer), optional


def _in_layers(c: ModelConfig, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    return {f"blk.{i}.{LAYER_TENSORS[f]}": shape for i in range(c.n_layer) for f, shape in shapes.items()}


def _check_factor(file: GGUFFile, tensor: Tensor) -> None:
    """Of a low-rank projection."""
    kinds = {"F32": np.float32, "F16": np.float16}
    if tensor.type.name not in kinds:
        raise file.error(f"tensor '{tensor.name}' is {tensor.type.name}, expected F32 or F16")
    _check_finite(file, tensor, tensor.data.view(kinds[tensor.type.name]))


def _check(file: GGUFFile, tensor: Tensor, shape: Shape) -> None:
    if tensor.shape != shape:
        raise file.error(f"tensor '{tensor.name}' has shape {tensor.shape}, expected {shape}")
    if len(shape) > 1:
        return
    if tensor.type.block_size != 1:
        raise file.error(f"tensor '{tensor.name}' is {tensor.type.name}, expected F32, F16 or BF16")
    values = dequantize(tensor)
    _check_finite(file, tensor, values)
    if tensor.name == "rope_freqs.weight" and not (values > 0).all():
        raise file.error(f"tensor '{tensor.name}' holds {values.min():g}, expected values above 0")


def _check_finite(file: GGUFFile, tensor: Tensor, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise file.error(f"tensor '{tensor.name}' holds a value that is not finite")
