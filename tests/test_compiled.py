"""Compiled kernels: the cache on disk may be damaged or missing, and CPUs without half-precision conversions exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import Cli, minirt
from test_dequantize import random_tensor

from minirt.dequantize import dequantize

RUN = "from minirt import Llama; import sys; print(Llama.load(sys.argv[1], n_ctx=32).logits([1, 2, 3]).sum())"


def run(model: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, str(model)], env=os.environ | env, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def filled(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache folder with all that RUN needs, and what it prints."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, run(tiny, XDG_CACHE_HOME=str(folder)).stdout


def kernels_in(folder: Path) -> list[Path]:
    return [path for path in folder.glob("minirt/kernels-*/*") if path.name != "used"]


def test_a_damaged_cache_is_compiled_again(tiny: Path, filled: tuple[Path, str], tmp_path: Path) -> None:
    """Files that are empty, cut, garbage, another's, or wrong in one bit."""
    cache, good = filled
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    files = kernels_in(tmp_path)
    assert len(files) >= 5
    whole = [path.read_bytes() for path in files]
    for i, (path, data) in enumerate(zip(files, whole, strict=True)):
        flipped = bytearray(data)
        flipped[len(data) * 2 // 3] ^= 4
        path.write_bytes((b"", data[: len(data) // 2], bytes(1000), whole[i - 1], flipped)[i % 5])
    damaged = {path: path.read_bytes() for path in files}
    for _ in range(2):
        again = run(tiny, XDG_CACHE_HOME=str(tmp_path))
        assert (again.stdout, again.stderr, again.returncode) == (good, "", 0)
    assert all(path.read_bytes() != damaged[path] for path in files)  # it healed


def test_processes_that_start_together(tiny: Path, tmp_path: Path) -> None:
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", RUN, str(tiny)]
    started = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    ended = [(*process.communicate(timeout=120), process.returncode) for process in started]
    assert len(set(ended)) == 1
    assert ended[0][1:] == ("", 0)
    assert all(len(path.name.split(".")) == 1 for path in kernels_in(tmp_path))  # nothing half-written is left


def test_a_cache_that_may_only_be_read(tiny: Path, filled: tuple[Path, str], tmp_path: Path) -> None:
    """It is used, as in a read-only image; what it lacks is compiled."""
    cache, good = filled
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    (folder,) = tmp_path.glob("minirt/kernels-*")
    kernels_in(tmp_path)[0].unlink()
    before = sorted(os.listdir(folder))
    for path in (folder, folder.parent):
        path.chmod(0o555)
    result = run(tiny, XDG_CACHE_HOME=str(tmp_path))
    assert (result.stdout, result.stderr, result.returncode) == (good, "", 0)
    if os.geteuid() != 0:
        assert sorted(os.listdir(folder)) == before
    for path in (folder, folder.parent):
        path.chmod(0o755)


def test_each_set_of_instructions_has_its_own_cache(tiny: Path, tmp_path: Path) -> None:
    for env in ({}, {"MINIRT_ISA": "portable"}, {"NUMBA_BOUNDSCHECK": "1"}, {"NUMBA_OPT": "1"}):
        ask = "from kernels_cpu import compiled; print(compiled._FOLDER)"
        subprocess.run(
            [sys.executable, "-c", ask], env=os.environ | env | {"XDG_CACHE_HOME": str(tmp_path)}, check=True
        )
    assert len(list(tmp_path.glob("minirt/kernels-*"))) == 4


def test_folders_nobody_uses_are_removed(tmp_path: Path) -> None:
    from kernels_cpu import compiled

    day, now = 86400, time.time()
    for name, age in (("kernels-old", 31), ("kernels-recent", 29), ("kernels-touched", 90), ("other-old", 90)):
        (tmp_path / name).mkdir()
        if name == "kernels-touched":
            (tmp_path / name / "used").touch()
        os.utime(tmp_path / name, (now - age * day,) * 2)
    mine = tmp_path / "kernels-mine"
    compiled._use(mine)
    assert sorted(os.listdir(tmp_path)) == ["kernels-mine", "kernels-recent", "kernels-touched", "other-old"]
    os.utime(tmp_path / "kernels-recent", (0, 0))
    compiled._use(mine)  # once a day is enough
    assert (tmp_path / "kernels-recent").exists()
    os.utime(mine / "used", (now - 2 * day,) * 2)
    compiled._use(mine)
    assert not (tmp_path / "kernels-recent").exists()
    blocked = tmp_path / "file"
    blocked.touch()
    compiled._use(blocked / "kernels-mine")  # says nothing


def test_warmup(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    """Nothing is left to compile for an answer after it, of whatever length."""
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    first, second = (minirt("warmup", tiny, env=env).stdout.decode() for _ in range(2))
    assert re.fullmatch(r"tiny.gguf: [1-9]\d* kernels compiled in \d+\.\d s\n", first)
    assert re.fullmatch(r"tiny.gguf: already compiled; loaded in \d+\.\d s\n", second)
    use = """
import sys
from kernels_cpu import compiled
from minirt import Llama
llama = Llama.load(sys.argv[1])
for n in (1, 3, 7, 8, 9, 100):
    llama.generate([1] * n, max_tokens=3)
    llama.logits([2] * n)
print(compiled.compilations)
"""
    result = subprocess.run([sys.executable, "-c", use, str(tiny)], env=env, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")
    assert cli("warmup", tiny, "no.gguf").exit_code == 1
    blocked = tmp_path / "file"
    blocked.touch()
    lost = minirt("warmup", tiny, env=env | {"XDG_CACHE_HOME": str(blocked)})
    assert lost.returncode == 1
    assert b"the cache folder cannot be written" in lost.stderr.splitlines()[-1]


@pytest.mark.parametrize("setting", ["NUMBA_ENABLE_AVX=0", "NUMBA_CPU_NAME=generic"])
def test_what_numba_is_told_and_no_cache_at_all(tiny: Path, tmp_path: Path, setting: str) -> None:
    """Fewer instructions, or another CPU (here: one without half-precision conversions), give the same result, but for
    the bits that activations are rounded to: 14 instead of 16. That nothing can be kept is no error."""
    name, _, value = setting.partition("=")
    blocked = tmp_path / "file"
    blocked.touch()
    result = run(tiny, XDG_CACHE_HOME=str(blocked), **{name: value})
    assert (result.returncode, result.stderr) == (0, "")
    assert np.isclose(float(result.stdout), float(run(tiny).stdout), rtol=1e-3)


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


def test_weights_may_lie_in_huge_pages() -> None:
    """Where the kernel offers them."""
    from kernels_cpu.memory import Arena

    kernel = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not kernel.exists() or "[never]" in kernel.read_text():
        pytest.skip("no huge pages")
    array = Arena().array((1 << 20,))
    array[:] = 1
    at, inside = array.ctypes.data, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            begin, end = (int(x, 16) for x in first.split("-"))
            inside = begin <= at < end
        elif inside and first == "THPeligible:":
            assert rest.strip() == "1"
            return
    pytest.skip("this kernel does not say")
