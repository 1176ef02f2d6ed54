"""Tensors to weights: which field each reaches, tying, biases, progress. What is refused is in test_bad_files."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from make_gguf import F16, Gguf, ones, tiny, weight

from minirt.config import ModelConfig
from minirt.dequantize import dequantize
from minirt.gguf_file import GGUFFile
from minirt.weights import LAYER_TENSORS, LayerWeights, Weights, load_weights


class HostOps:
    """Vectors as they are, matrices dequantised."""

    def vector(self, values: np.ndarray) -> np.ndarray:
        assert values.dtype == np.float32
        assert values.ndim == 1
        return values

    matrix = table = staticmethod(dequantize)


def load(model: Gguf, path: Path, progress=None) -> tuple[Weights, GGUFFile]:  # type: ignore[no-untyped-def]
    file = GGUFFile.open(model.write(path / "m.gguf"))
    return load_weights(file, ModelConfig.from_gguf(file), HostOps(), progress), file  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_every_tensor_reaches_its_field(tmp_path: Path, arch: str) -> None:
    weights, file = load(tiny(arch=arch, tied=False), tmp_path)
    found = {
        "token_embd.weight": weights.token_embd,
        "output_norm.weight": weights.output_norm,
        "output.weight": weights.output,
    }
    for i, layer in enumerate(weights.layers):
        for field, name in LAYER_TENSORS.items():
            if (value := getattr(layer, field)) is not None:
                found[f"blk.{i}.{name}"] = value
    assert found.keys() == file.tensors.keys()
    for name, value in found.items():
        assert np.array_equal(value, dequantize(file.tensors[name]))


def test_every_field_has_a_tensor_name() -> None:
    assert [f.name for f in fields(LayerWeights)] == [*LAYER_TENSORS, "k_factor", "v_factor"]


def test_a_tied_output_is_the_embedding(tmp_path: Path) -> None:
    for tied in (True, False):
        weights, _ = load(tiny(tied=tied), tmp_path)
        assert np.array_equal(weights.output, weights.token_embd) == tied


def test_what_an_architecture_has_not_is_none(tmp_path: Path) -> None:
    layer = load(tiny(), tmp_path)[0].layers[0]
    assert (layer.bq, layer.bk, layer.bv, layer.q_norm, layer.k_norm) == (None,) * 5
    layer = load(tiny(arch="qwen2"), tmp_path)[0].layers[1]
    assert [b.shape for b in (layer.bq, layer.bk, layer.bv)] == [(64,), (32,), (32,)]
    layer = load(tiny(arch="qwen3"), tmp_path)[0].layers[1]
    assert [n.shape for n in (layer.q_norm, layer.k_norm)] == [(16,), (16,)]


def test_llama_may_have_biases(tmp_path: Path) -> None:
    model = tiny()
    model.tensors["blk.1.attn_k.bias"] = weight(np.random.RandomState(0), F16, 32)
    layers = load(model, tmp_path)[0].layers
    assert layers[0].bk is None
    assert layers[1].bk.shape == (32,)


def test_rope_freqs_stay_on_the_host(tmp_path: Path) -> None:
    assert load(tiny(), tmp_path)[0].rope_freqs is None
    model = tiny()
    model.tensors["rope_freqs.weight"] = ones(8)
    model.tensors["rope_freqs.weight"].data = np.arange(1, 9, dtype="<f4").tobytes()
    found = load(model, tmp_path)[0].rope_freqs
    assert found is not None
    assert found.dtype == np.float32
    assert found.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_progress_counts_to_the_number_of_tensors(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    model = tiny(tied=False)
    n = len(model.tensors)
    model.tensors["rope_freqs.weight"] = ones(8)  # not one of the device's
    load(model, tmp_path, lambda done, total: heard.append((done, total)))
    assert heard == [(i, n) for i in range(1, n + 1)]
