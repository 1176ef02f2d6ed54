"""Every kernel that real models would run compiles for the cards minirt names, and spills no registers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gpu_variants import CARDS, resources, variants_of
from nvrtc import nvrtc_for

import kernels_gpu
from kernels_gpu.device import source_of
from kernels_gpu.formats import FORMATS, NUMBERS


@pytest.mark.parametrize("arch", CARDS)
def test_kernels_compile_and_spill_nothing(arch: int) -> None:
    if (found := resources(arch)) is None:
        pytest.skip(f"no NVRTC for sm_{arch} (nvidia-cuda-nvrtc from PyPI brings one)")
    assert found
    assert not {name: used for name, used in found.items() if used.spill or used.local}


@pytest.mark.parametrize("store", ["Q8_0", "Q4_0"])
def test_codes_are_rounded_after_they_are_scaled(store: str) -> None:
    """As in the reference: a product and a sum in one, which the compiler makes where it may, is another code at times.
    Emulated kernels would not show that."""
    if not (nvrtc := nvrtc_for(90)):
        pytest.skip("no NVRTC for sm_90 (nvidia-cuda-nvrtc from PyPI brings one)")
    constants = {"HEAD_DIM": 64, "K_STORE": store, "V_STORE": store, "K_ROTATED": 0, "V_ROTATED": 0}
    ptx = nvrtc.ptx(source_of("cache.cu"), 90, [f"-D{name}={value}" for name, value in constants.items()])
    assert "mul.rn.ftz.f32" in ptx
    assert "fma." not in ptx


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "F32"])
def test_activations_are_read_by_wide_loads(name: str) -> None:
    """From memory that the compiler knows: of one row from shared memory, of several from the card's."""
    if not (nvrtc := nvrtc_for(90)):
        pytest.skip("no NVRTC for sm_90 (nvidia-cuda-nvrtc from PyPI brings one)")
    constants = {"NUMBER": f"KIND_{name}"} if name in NUMBERS else FORMATS[name].constants
    for rows in (1, 8):
        macros = (f"-D{macro}={value}" for macro, value in {**constants, "ROWS": rows}.items())
        loads = re.findall(r"\tld\.(\S+)", nvrtc.ptx(source_of("products.cu"), 90, list(macros)))
        assert not [load for load in loads if re.match(r"(v\d\.)?[a-z]\d", load)]
        assert sum(load.startswith("shared.v4.") for load in loads) >= 2 * (rows == 1)
        assert sum(load.startswith("global.v4.") for load in loads) >= 2 * rows


def test_sources_are_in_the_wheel() -> None:
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    suffixes = {path.suffix for path in Path(kernels_gpu.__file__).parent.iterdir() if path.is_file()} - {".py"}
    assert all(f'"*{suffix}"' in pyproject for suffix in suffixes)


def test_every_file_is_among_them() -> None:
    files = {path.name for path in Path(kernels_gpu.__file__).parent.glob("*.cu")}
    assert {file for file, _ in variants_of(90)} == files
