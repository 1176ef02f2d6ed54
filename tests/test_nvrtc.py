"""CUDA C++ compiled for GPUs that are not there, and what it needs of them. Our kernels: test_gpu_variants."""

from __future__ import annotations

import pytest
from cuda_bench import kernels
from nvrtc import Nvrtc, NvrtcError, nvrtc_for, registers_and_local
from test_cuda_host import FLOATS, INTEGERS, LAST_BLOCK, WARP

ARCHS = (61, 75, 80, 87, 90)  # 61: with the wheels of CUDA 12 only

SMALL = """
#include <cuda_fp16.h>
template <class T, int N> __global__ void __launch_bounds__(N) reversed(const T* x, float* out) {
    __shared__ T s[N];
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = float(s[N - 1 - threadIdx.x]);
}
extern "C" __global__ void indexed(const float* x, float* out, int n) {
    float local[64];
    for (int i = 0; i < 64; i++) local[i] = x[i];
    for (int i = 0; i < n; i++) local[int(x[i]) & 63] += x[n + i];
    out[threadIdx.x] = local[n & 63];
}
extern "C" __global__ void __launch_bounds__(1024) spilling(const float* x, float* out, int n) {
    float v[96];
    for (int i = 0; i < 96; i++) v[i] = x[i * n + threadIdx.x];
    for (int round = 0; round < n; round++)
        for (int i = 0; i < 96; i++) v[i] = v[i] * v[(i * 7 + 3) % 96] + v[(i + 1) % 96];
    for (int i = 0; i < 96; i++) out[i * n + threadIdx.x] = v[i];
}"""


@pytest.fixture(params=ARCHS, ids=lambda arch: f"sm_{arch}")
def arch(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def nvrtc(arch: int) -> Nvrtc:
    if not (found := nvrtc_for(arch, headers=True)):
        pytest.skip(f"no NVRTC for sm_{arch} (nvidia-cuda-nvrtc and nvidia-cuda-runtime from PyPI bring one)")
    return found


def test_resources(nvrtc: Nvrtc, arch: int) -> None:
    name = "reversed<__half, 256>"
    compiled = nvrtc.compile(SMALL, arch, [name])
    used = compiled.resources
    assert set(used) == {name, "indexed", "spilling"}
    assert (used[name].shared, used[name].local, used[name].spill) == (512, 0, 0)
    assert (used["indexed"].local, used["indexed"].spill) == (256, 0)
    assert used["spilling"].registers <= 64
    assert used["spilling"].spill > 0
    from_cubin = registers_and_local(compiled.cubin)
    assert {from_cubin[k] for k in ("indexed", "spilling")} == {
        (used[k].registers, used[k].local) for k in ("indexed", "spilling")
    }


def test_a_source_that_does_not_compile(nvrtc: Nvrtc, arch: int) -> None:
    with pytest.raises(NvrtcError, match=r"kernel\.cu\(1\): error"):
        nvrtc.compile('extern "C" __global__ void k(int* a) { a[0] = unknown; }', arch)


def test_what_the_emulation_is_tested_with_is_cuda(nvrtc: Nvrtc, arch: int) -> None:
    calls = [call for call, _ in [*WARP, *INTEGERS]]
    last_block = LAST_BLOCK.replace("BEFORE", "part[blockIdx.x] = sum; __threadfence();").replace("AFTER", "")
    for source in (kernels([f"a[t] = {call};" for call in calls]), last_block, FLOATS):
        assert nvrtc.compile(source, arch).resources
