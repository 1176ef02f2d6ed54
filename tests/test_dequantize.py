"""Every block type against the `gguf` package, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minirt import dequantize as module
from minirt.dequantize import dequantize
from minirt.gguf_file import TENSOR_TYPES, Tensor

# Where the half-precision scales of a block lie; the rest of its bytes may be anything.
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}  # fmt: skip


def random_tensor(name: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Blocks of random bytes whose scales, or values if it has no blocks, are finite."""
    kind = TENSOR_TYPES[name]
    rng = np.random.RandomState(seed)
    n_blocks = rows * columns // kind.block_size
    if kind.block_size == 1:
        values = rng.standard_normal(n_blocks).astype(np.float32)
        data = {"F32": values, "F16": values.astype(np.float16), "BF16": values.view(np.uint16)[1::2]}[name]
        blocks = np.ascontiguousarray(data).view(np.uint8)
    else:
        blocks = rng.randint(0, 256, (n_blocks, kind.block_bytes)).astype(np.uint8)
        for at in SCALES[name]:
            scale = (rng.standard_normal(n_blocks) * 10.0 ** rng.uniform(-5, 1, n_blocks)).astype("<f2")
            blocks[:, at : at + 2] = scale[:, None].view(np.uint8)
    return Tensor("t", kind, (rows, columns), blocks.reshape(rows, -1))


@pytest.fixture
def gguf() -> Any:
    """Not imported with this file, which tests import that a bare machine runs."""
    return pytest.importorskip("gguf")


@pytest.mark.parametrize("name", TENSOR_TYPES)
def test_equals_gguf_bit_for_bit(name: str, gguf: Any) -> None:
    tensor = random_tensor(name, 37, 512)
    expected = gguf.quants.dequantize(tensor.data, gguf.GGMLQuantizationType[name])
    ours = dequantize(tensor)
    assert ours.dtype == np.float32
    assert ours.shape == tensor.shape
    assert np.array_equal(ours.view(np.uint32), np.ascontiguousarray(expected, np.float32).view(np.uint32))


@pytest.mark.parametrize("name", TENSOR_TYPES)
def test_sizes_are_those_of_gguf(name: str, gguf: Any) -> None:
    kind = TENSOR_TYPES[name]
    assert gguf.GGMLQuantizationType[name] == kind.id
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (kind.block_size, kind.block_bytes)


@pytest.mark.parametrize("name", ["F32", "Q4_0", "Q6_K"])
def test_chunks_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_tensor(name, 5, 768)
    whole = dequantize(tensor)
    monkeypatch.setattr(module, "CHUNK", 512)
    assert np.array_equal(dequantize(tensor), whole)


def test_a_vector_and_three_dimensions() -> None:
    flat = random_tensor("Q8_0", 6, 64)
    cube = Tensor("t", flat.type, (2, 3, 64), flat.data)
    assert np.array_equal(dequantize(cube), dequantize(flat).reshape(2, 3, 64))
    row = Tensor("t", flat.type, (64,), flat.data[:1])
    assert np.array_equal(dequantize(row), dequantize(flat)[0])


def test_infinite_scales_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    kind = TENSOR_TYPES["Q4_K"]
    dequantize(Tensor("t", kind, (2, 256), np.full((2, kind.block_bytes), 0x7C, np.uint8)))
    assert not recwarn.list
