"""Rows of activations on an emulated card: tests of all devices, at sizes that emulation can do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import test_ops
from cuda_host import HostDevice
from emulated import EmulatedDevice, emulated_ops
from test_dequantize import random_tensor

from kernels_gpu import row_ops
from kernels_gpu.device import source_of
from kernels_gpu.ops import GpuOps
from minirt.dequantize import dequantize
from minirt.gguf_file import TENSOR_TYPES


@pytest.fixture(scope="module")
def ops() -> Any:
    return emulated_ops()


@pytest.mark.parametrize("name", TENSOR_TYPES)
def test_products(ops: Any, name: str) -> None:
    for n in (1, 33):
        test_ops.test_products_of_every_type(ops, name, n)


@pytest.mark.parametrize("n", [2, 3, 7, 8, 9, 17])
def test_numbers_of_rows(ops: Any, n: int) -> None:
    test_ops.test_products_of_every_type(ops, "Q4_0", n)
    test_ops.test_products_of_every_type(ops, "F16", n)


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "F16", "F32"])
def test_some_rows_without_tensor_cores(ops: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.ops.device, "capability", (6, 1))
    monkeypatch.setattr(test_ops, "ROWS_OF_ONE", row_ops.FEW_ROWS)
    for n in (5, 8):
        test_ops.test_products_of_every_type(ops, name, n)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q6_K", "Q5_K", "F16", "F32"])
def test_products_of_prompts(ops: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_ops, "SOME_ROWS", 0)
    test_ops.test_products_of_every_type(ops, name, 33)


@pytest.mark.parametrize(
    ("name", "n", "rows", "columns"),
    [
        ("Q4_0", 64, 130, 64),
        ("Q8_0", 9, 300, 1056),
        ("F16", 17, 129, 72),
        ("BF16", 33, 40, 1544),
        ("F32", 10, 5, 40),
        ("Q6_K", 5, 200, 512),
    ],
)
def test_batches(ops: Any, name: str, n: int, rows: int, columns: int) -> None:
    """Rows and columns that end within a tile; columns that several blocks share, or one has."""
    tensor, x, norm = random_tensor(name, rows, columns), test_ops.normal(n, columns), np.ones(columns, np.float32)
    ours, truth = (device.logits(x, norm, 1e-5, device.matrix(tensor)) for device in (ops, test_ops.TRUTH))
    assert np.linalg.norm(ours - truth) <= test_ops.HALVES * np.linalg.norm(truth)


@pytest.mark.parametrize(
    ("name", "columns"), [("Q4_0", 4192), ("Q6_K", 2304), ("Q8_0", 2048), ("F16", 2056), ("F32", 516)]
)
def test_rows_that_a_warp_reads_one_after_another(ops: Any, name: str, columns: int) -> None:
    """They begin in the middle of what a warp reads at a time, and go on in another matrix."""
    c, shapes = test_ops.config(4, 2, 64), {"wq": 256, "wk": 128, "wv": 128}
    w = test_ops.layer(ops, name, c, 256, 256)
    truth = test_ops.layer(test_ops.TRUTH, name, c, 256, 256)
    tensors = {field: random_tensor(name, n_out, columns, seed=n_out) for field, n_out in shapes.items()}
    norm = test_ops.normal(columns)
    for n in (1, 2):
        x = test_ops.normal(n, columns, seed=n)
        ours, true = (
            device.qkv(
                x,
                replace(layer, attn_norm=device.vector(norm), **{k: device.matrix(t) for k, t in tensors.items()}),
                c,
                test_ops.angles(device, n, 64),
            )
            for device, layer in ((ops, w), (test_ops.TRUTH, truth))
        )
        for a, b in zip(ours, true, strict=True):
            assert np.linalg.norm(a - b) <= test_ops.allowed(ops, name, n) * np.linalg.norm(b)


@pytest.mark.parametrize("name", TENSOR_TYPES)
def test_decoding_is_exact(ops: Any, name: str) -> None:
    tensor, rows = random_tensor(name, 37, 512, seed=5), np.arange(37, dtype=np.int32)
    assert np.array_equal(
        ops.to_host(ops.embed(ops.table(tensor), rows)), test_ops.TRUTH.embed(test_ops.TRUTH.table(tensor), rows)
    )


@pytest.mark.parametrize("width", [1, 31, 8192, 20001])
def test_most_likely(ops: Any, width: int) -> None:
    test_ops.test_most_likely(ops, width)


def test_the_most_likely_at_the_borders_of_threads_and_parts(ops: Any) -> None:
    """It may stand anywhere, be the largest number that there is, and is not told where another is none."""
    width = 3 * row_ops.PART
    sizes = 1, row_ops.WARP, row_ops.PART_THREADS, row_ops.PART, width
    places = np.unique([at % width for size in sizes for at in (size - 1, size, width - size)])
    logits = test_ops.normal(2 * len(places), width)
    logits[range(len(logits)), np.tile(places, 2)] = np.finfo(np.float32).max
    logits[len(places) :, 5] = np.nan
    assert ops.most_likely(logits).tolist() == [*places, *(-1 for _ in places)]


@pytest.mark.parametrize("n", [1, 33])
def test_layers(ops: Any, n: int) -> None:
    test_ops.test_layer(ops, "Q6_K", n, (8, 2, 32), False, True)
    test_ops.test_layer(ops, "Q4_0", n, (4, 4, 64), True, False)
    test_ops.test_matrices_of_several_types(ops, n)


@pytest.mark.parametrize("columns", [1, 15, 72])
def test_odd_rows(ops: Any, columns: int) -> None:
    for name in ("F32", "F16", "BF16"):
        test_ops.test_rows_that_are_not_whole_vectors(ops, name, columns)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("F32", [1e-38, 1e-8, 1, 7e4, 1e30]), ("BF16", [1e-30, 1, 1e9]), ("F16", [1e-4, 1, 1e4]), ("Q8_0", [1e-5, 500])],
)
@pytest.mark.parametrize("most", [row_ops.SOME_ROWS, 0])
def test_rows_of_weights_of_any_size(
    ops: Any, name: str, sizes: list[float], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In products of halves, of batches and of prompts, none becomes infinite or nothing, or less exact than others."""
    tensor, scale = random_tensor(name, len(sizes), 256), np.float32(sizes)[:, None]
    if name == "Q8_0":
        tensor.data.reshape(len(sizes), -1, 34)[..., :2] = scale.astype(np.float16).view(np.uint8)[:, None]
    else:
        values = dequantize(tensor) * scale
        as_stored = {
            "F32": lambda: values,
            "F16": lambda: values.astype(np.float16),
            "BF16": lambda: values.view("<u2")[:, 1::2],
        }
        tensor.data[...] = np.ascontiguousarray(as_stored[name]()).view(np.uint8)
    monkeypatch.setattr(row_ops, "SOME_ROWS", most)
    x, norm = test_ops.normal(12, 256), np.ones(256, np.float32)
    ours, truth = (device.logits(x, norm, 1e-5, device.matrix(tensor)) for device in (ops, test_ops.TRUTH))
    for row, true in zip(ours.T.astype(np.float64), truth.T.astype(np.float64), strict=True):
        assert np.linalg.norm(row - true) <= 5e-4 * np.linalg.norm(true)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("d", "dim"), [(64, 64), (80, 20), (8, 2)])
def test_rotation(ops: Any, d: int, dim: int, interleaved: bool) -> None:
    test_ops.test_rotation(ops, d, dim, interleaved)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_show(ops: Any, bad: float) -> None:
    test_ops.test_activations_that_are_not_finite_show(ops, bad, "Q4_0")
    test_ops.test_activations_that_are_not_finite_show(ops, bad, "Q6_K")


def test_extreme_activations(ops: Any) -> None:
    test_ops.test_extreme_activations(ops)


@pytest.mark.parametrize("name", ["Q4_K", "F16"])
def test_input_that_blocks_make_is_the_input(ops: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows too long for shared memory it is made before."""
    c, x, found = test_ops.config(4, 2, 64), test_ops.normal(1, 256), []
    w = test_ops.layer(ops, name, c, 256, 512)
    for room in (row_ops.ROOM, 0):
        monkeypatch.setattr(row_ops, "ROOM", room)
        grown = x.copy()
        ops.feed_forward(grown, w, c)
        found.append([grown, *ops.qkv(x, w, c, test_ops.angles(ops, 1, 64))])
    for made, given in zip(*found, strict=True):
        assert np.array_equal(made, given)


def test_tied_embeddings_are_on_the_card_once() -> None:
    ops, tensor = GpuOps(EmulatedDevice()), random_tensor("Q8_0", 8, 64)
    table = ops.table(tensor)
    assert ops.matrix(tensor) is table
    assert ops.matrix(random_tensor("Q8_0", 8, 64)) is not table


@pytest.mark.parametrize(("seed", "n"), [(1, 2), (2, 2), (1, 9), (2, 9)])
def test_the_order_of_threads_does_not_show(ops: Any, seed: int, n: int) -> None:
    tensor, x, norm = random_tensor("Q5_K", 37, 1024), test_ops.normal(n, 1024), test_ops.normal(1024, seed=1)
    other = emulated_ops(seed)
    first, second = (each.logits(x, norm, 1e-5, each.matrix(tensor)) for each in (ops, other))
    assert np.array_equal(first, second)


def test_sums_of_a_block_one_after_another(cuda_host: HostDevice) -> None:
    source = (
        source_of("common.cuh")
        + """
KERNEL sums(float* a) {
    __shared__ float shared[WARP];
    const float x = a[threadIdx.x], most = block_max(x, shared), sum = block_sum(x, shared);
    a[threadIdx.x] = most + sum + block_sum(2.0f * x, shared);
}"""
    )
    a = cuda_host.xp.asarray(np.arange(96, dtype=np.float32))
    cuda_host.compile(source).get_function("sums")((1,), (96,), (a,))
    assert (a.get() == 95 + 3 * 95 * 48).all()
