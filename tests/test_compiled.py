"""Compiled kernels: the cache on disk may be damaged or missing, and CPUs without half-precision conversions exist."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_dequantize import random_tensor

from minirt.dequantize import dequantize

RUN = "from minirt import Llama; import sys; print(Llama.load(sys.argv[1], n_ctx=32).logits([1, 2, 3]).sum())"


def run(model: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, str(model)], env=os.environ | env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("damage", ["empty", "half", "garbage"])
def test_a_damaged_cache_is_compiled_again(tiny: Path, tmp_path: Path, damage: str) -> None:
    good = run(tiny, XDG_CACHE_HOME=str(tmp_path)).stdout
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".nbi", ".nbc")]
    assert len(files) > 4
    for path in files:
        data = path.read_bytes()
        path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "garbage": bytes(1000)}[damage])
    for _ in range(2):
        again = run(tiny, XDG_CACHE_HOME=str(tmp_path))
        assert (again.stdout, again.stderr, again.returncode) == (good, "", 0)
    # It healed: something that can be loaded was written over the damage.
    assert all(path.stat().st_size != 1000 for path in files if path.suffix == ".nbi")


def test_no_cache_at_all(tiny: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = run(tiny, XDG_CACHE_HOME=str(blocked))
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("setting", ["NUMBA_NUM_THREADS=1", "NUMBA_CPU_NAME=generic"])
def test_what_numba_is_told(tiny: Path, tmp_path: Path, setting: str) -> None:
    """Fewer threads, or another CPU (here: one without half-precision conversions), give the same result."""
    name, _, value = setting.partition("=")
    result = run(tiny, XDG_CACHE_HOME=str(tmp_path), **{name: value})
    assert result.returncode == 0, result.stderr
    assert np.isclose(float(result.stdout), float(run(tiny).stdout), rtol=1e-4)


def test_numba_told_not_to_compile(tiny: Path) -> None:
    assert "NUMBA_DISABLE_JIT is set" in run(tiny, NUMBA_DISABLE_JIT="1").stderr.splitlines()[-1]


def test_a_cpu_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 65,536 halves, decoded by arithmetic, and a table looked up by selection."""
    import numba

    from kernels_cpu import ir_vectors
    from kernels_cpu.blocks import FORMATS
    from kernels_cpu.rows import decode_row

    monkeypatch.setattr(ir_vectors, "HAS_HALF", False)
    monkeypatch.setattr(ir_vectors, "SHUFFLE", "")

    @numba.njit
    def decode(rows, out):  # type: ignore[no-untyped-def]
        for r in range(len(rows)):
            decode_row(rows, r, out, r)

    halves = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    out = np.empty(halves.shape, np.float32)
    decode(halves.view(np.uint8).view(FORMATS["F16"].dtype), out)
    assert np.array_equal(out, halves.view(np.float16).astype(np.float32), equal_nan=True)
    for name in ("Q4_1", "IQ4_NL"):
        tensor = random_tensor(name, 8, 64)
        out = np.empty((8, 64), np.float32)
        decode(tensor.data.view(FORMATS[name].dtype), out)
        assert np.array_equal(out, dequantize(tensor))
