"""Products in the tile registers of AMX, where the CPU has them: as exact as they say; what is not finite stays so."""

from __future__ import annotations

import numpy as np
import pytest

from kernels_cpu import isa
from kernels_cpu.compiled import kernel
from kernels_cpu.memory import zeros
from kernels_cpu.pointers import address
from kernels_cpu.tile_registers import HAS_TILES, multiply_strips, pack_strips, split_row

TOKENS = 64
needs_tiles = pytest.mark.skipif(not HAS_TILES, reason="this CPU has none, or they are not to be used")


@kernel
def _split(rows):  # type: ignore[no-untyped-def]
    for i in range(len(rows)):
        split_row(address(rows[i]), rows.shape[1])


@kernel
def _multiply(strips, panels, out):  # type: ignore[no-untyped-def]
    multiply_strips(address(strips), strips.shape[0], address(panels), strips.shape[1], address(out), 4 * out.shape[1])


def product(left: np.ndarray, right: np.ndarray, stride: int = TOKENS) -> np.ndarray:
    """left [16 s, 32 k] times right [64, 32 k], transposed, of which copies are made as kernels want them."""
    packed = pack_strips(left)
    strips, rows = zeros(packed.shape, np.float32), right.copy()
    strips.view(np.uint32)[...] = packed.view(np.uint32)
    _split(rows)
    panels = zeros((TOKENS // 16, right.shape[1], 16), np.float32)
    panels.view(np.uint32)[...] = rows.view(np.uint32).reshape(-1, 16, right.shape[1]).swapaxes(1, 2)
    out = zeros((len(left), stride), np.float32)
    _multiply(strips, panels, out)
    return out


@needs_tiles
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (48, 96), (144, 512)])
@pytest.mark.parametrize("stride", [TOKENS, 80])
def test_products(rows: int, columns: int, stride: int) -> None:
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((n, columns)).astype(np.float32) for n in (rows, TOKENS))
    left *= 10.0 ** rng.uniform(-4, 4, (rows, 1)).astype(np.float32)
    out, truth = product(left, right, stride), left.astype(np.float64) @ right.T.astype(np.float64)
    error = np.abs(out[:, :TOKENS] - truth) / (np.abs(left) @ np.abs(right).T)
    assert error.max() < 2.0**-17
    assert not out[:, TOKENS:].any()


@needs_tiles
def test_float16_is_exact() -> None:
    """Eleven bits are two parts of eight, and of small numbers no product is left out."""
    rng = np.random.default_rng(0)
    left, right = np.eye(32, dtype=np.float32), rng.standard_normal((TOKENS, 32)).astype(np.float16).astype(np.float32)
    assert np.array_equal(product(left, right), right.T)
    assert np.array_equal(product(right, np.tile(left, (2, 1))), np.tile(right, (1, 2)))


@needs_tiles
@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
def test_what_is_not_finite_stays_so(bits: int) -> None:
    right = np.ones((TOKENS, 32), np.float32)
    right.view(np.uint32)[5, 17] = bits
    out = product(np.ones((16, 32), np.float32), right)
    assert not np.isfinite(out[:, 5]).any()
    assert (np.delete(out, 5, axis=1) == 32).all()


def test_what_the_system_does_not_allow_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = dict.fromkeys(("sse2", "amx-tile", "amx-bf16", "amx-int8"), True)
    monkeypatch.setattr(isa.llvm, "get_host_cpu_features", lambda: tiles)
    for allowed in (True, False):
        monkeypatch.setattr(isa, "_may_use_tiles", lambda allowed=allowed: allowed)
        assert ({"amx-tile", "amx-bf16"} <= isa.host_features()) == allowed
