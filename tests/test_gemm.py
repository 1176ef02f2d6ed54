"""The float32 products and the attention of prefill, against NumPy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kernels_cpu.blocks import FORMATS
from kernels_cpu.gemm import ROWS, RUN, WIDTH, multiply_run, pack_rows, packed_size, tile_counts
from kernels_cpu.prefill_attention import KEYS, attend_block, attention_scratch, block_tokens


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def error(ours: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(ours - truth) / np.linalg.norm(truth))


# -- products ----------------------------------------------------------------------------------------------------------


def packed(x: np.ndarray) -> np.ndarray:
    """Packed in two parts, as two threads would; NaN where nothing was written."""
    out = np.full(packed_size(*x.shape), np.nan, np.float32)
    tiles = sum(tile_counts(len(x)))
    pack_rows(x, tiles // 2, tiles, out)
    pack_rows(x, 0, tiles // 2, out)
    assert np.isnan(out).any() == np.isnan(x).any()
    return out


def panels(w: np.ndarray) -> np.ndarray:
    """w [n_in, columns] as [panels, n_in, WIDTH]."""
    n_in, columns = w.shape
    padded = np.zeros((n_in, -(-columns // WIDTH) * WIDTH), np.float32)
    padded[:, :columns] = w
    return np.ascontiguousarray(padded.reshape(n_in, -1, WIDTH).transpose(1, 0, 2))


def multiplied(x: np.ndarray, w: np.ndarray, out: np.ndarray, column: int, add: bool) -> None:
    tile = np.full(ROWS * WIDTH, np.nan, np.float32)
    for k in range(0, len(w), RUN):
        part = w[k : k + RUN]
        multiply_run(packed(x), len(x), k, panels(part).ravel(), len(part), tile, out, column, w.shape[1], add or k > 0)


@pytest.mark.parametrize("n", range(1, 41))
def test_products_of_any_number_of_rows(n: int) -> None:
    for n_in, columns in ((16, 16), (80, WIDTH + 5), (RUN + 16, 2 * WIDTH)):
        x, w = normal(n, n_in), normal(n_in, columns, seed=1)
        out = np.full((n, columns + 10), 7.0, np.float32)
        multiplied(x, w, out, 3, False)
        assert error(out[:, 3:-7], x.astype(np.float64) @ w) <= 1e-6
        assert (out[:, :3] == 7.0).all()
        assert (out[:, -7:] == 7.0).all()


@pytest.mark.parametrize("n_in", range(16, 2101, 148))
@pytest.mark.parametrize("columns", [1, WIDTH - 1, WIDTH, 3 * WIDTH + 16])
def test_products_of_any_length(n_in: int, columns: int) -> None:
    for length in (n_in, n_in + 4 - n_in % 8, n_in + 3):  # not only whole vectors
        x, w = normal(23, length), normal(length, columns, seed=1)
        before = normal(23, columns, seed=2)
        out = before.copy()
        multiplied(x, w, out, 0, True)
        assert error(out, x.astype(np.float64) @ w + before) <= 1e-6


def test_a_product_in_several_runs() -> None:
    x, w = normal(50, 3 * RUN + 40), normal(3 * RUN + 40, 2 * WIDTH, seed=1)
    out = np.zeros((50, 2 * WIDTH), np.float32)
    multiplied(x, w, out, 0, False)
    assert error(out, x.astype(np.float64) @ w) <= 1e-6


def test_packed_rows_may_have_gaps() -> None:
    x, w = normal(30, 100)[:, 10:90], normal(80, WIDTH, seed=1)
    out = np.zeros((30, WIDTH), np.float32)
    multiplied(x, w, out, 0, False)
    assert error(out, x.astype(np.float64) @ w) <= 1e-6


def test_a_row_of_nan_stays_by_itself() -> None:
    x, w = normal(14, 48), normal(48, WIDTH, seed=1)
    x[12, 5], x[3, 0] = np.nan, np.inf
    out = np.zeros((14, WIDTH), np.float32)
    multiplied(x, w, out, 0, False)
    finite = np.isfinite(out)
    assert np.isnan(out[12]).all()
    assert not finite[3].any()
    assert finite[[i for i in range(14) if i not in (3, 12)]].all()


# -- attention ---------------------------------------------------------------------------------------------------------


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray, start: int, window: int, tokens: int) -> np.ndarray:
    """All blocks of q [N, H_q, d] over k, v [H_kv, slots, d], float32 or float16."""
    (n, _, d), group = q.shape, q.shape[1] // len(k)
    f = FORMATS["F16" if k.dtype == np.float16 else "F32"]
    size = attention_scratch(tokens, group, d)
    scratch, out = np.full(size + 64, np.nan, np.float32), np.full_like(q, np.nan)
    rows, between = [a.view(f.dtype).reshape(-1, d) for a in (k, v)], k.shape[1]
    lse, scale, stop = np.empty((0, 0), np.float32), 1.0 / math.sqrt(d), start + n
    for token in range(0, n, tokens):
        for head in range(len(k)):
            block = head, token, min(tokens, n - token)
            attend_block(q, *rows, between, group, *block, start, window, stop, scale, scratch[:size], out, lse)
    assert np.isnan(scratch[size:]).all()
    return out


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, start: int, window: int) -> np.ndarray:
    (n, n_head, d), group = q.shape, q.shape[1] // len(k)
    out = np.empty(q.shape)
    row, slot = np.arange(start, start + n)[:, None], np.arange(start + n)
    hidden = (slot > row) | ((slot <= row - window) if window else False)
    for h in range(n_head):
        keys, values = (a[h // group, : start + n].astype(np.float64) for a in (k, v))
        scores = np.where(hidden, -np.inf, q[:, h] @ keys.T / np.sqrt(d))
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, h] = p / p.sum(axis=1, keepdims=True) @ values
    return out


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("d", [16, 64, 80, 112, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
def test_attention(group: int, d: int, dtype: type) -> None:
    for n, start, window, tokens in (
        (1, 0, 0, 1),
        (1, 130, 0, 1),
        (37, 0, 0, 50),
        (37, 0, 0, 16),
        (41, 3, 1, 20),
        (65, KEYS - 1, 0, 32),
        (70, 2 * KEYS, 50, 70),
        (33, 5, 7, 33),
        (200, 0, KEYS + 3, block_tokens(group)),
    ):
        q = normal(n, 2 * group, d, seed=n) * 2
        k, v = (normal(2, start + n + 2, d, seed=seed).astype(dtype) for seed in (1, 2))
        k[:, start + n :] = v[:, start + n :] = np.nan  # nobody's business
        assert error(attended(q, k, v, start, window, tokens), attention(q, k, v, start, window)) <= 2e-6


def test_attention_far_from_zero() -> None:
    """Maxima that grow from tile to tile, scores beyond what an exponential can hold, and weights that vanish."""
    n = 3 * KEYS
    q, v = np.full((n, 1, 16), 30.0, np.float32), normal(1, n, 16)
    for slope in (1.0, -1.0, 40.0, -1e6):
        k = (slope * np.arange(n, dtype=np.float32) / 100)[None, :, None] * np.ones((1, n, 16), np.float32)
        assert error(attended(q, k, v, 0, 0, 64), attention(q, k, v, 0, 0)) <= 1e-4  # scores themselves are rounded
        assert error(attended(q, k, v, 0, 9, 64), attention(q, k, v, 0, 9)) <= 1e-4


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_a_number_comes_through(value: float) -> None:
    q, k, v = normal(200, 1, 64), normal(1, 200, 64), normal(1, 200, 64)
    k[0, 150, 0] = value
    q[:, 0, 0] = 1.0
    out = attended(q, k, v, 0, 0, 16)
    assert np.isnan(out[150:]).all()
    assert np.isfinite(out[:144]).all()
