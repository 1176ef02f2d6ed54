"""The emulation of CUDA that kernels are tested on: threads, warps, memory and arithmetic are as CUDA has them."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_bench import SEEDS, Bench
from cuda_host import HostDevice, KernelError


@pytest.fixture
def bench(cuda_host: HostDevice) -> Bench:
    return Bench(cuda_host)


# -- threads, blocks and what they compute -----------------------------------------------------------------------------


def test_every_thread_of_every_block_runs_once(bench: Bench) -> None:
    source = """extern "C" __global__ void k(int* a, int3 n) {
        int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
        int z = blockIdx.z * blockDim.z + threadIdx.z;
        if (x < n.x && y < n.y && z < n.z) a[(z * n.y + y) * n.x + x] += x + 100 * y + 10000 * z;
    }"""
    a = bench.ints(7 * 5 * 3)
    n = np.array((7, 5, 3), np.dtype("i4,i4,i4"))[()]
    bench.device.compile(source).get_function("k")((3, 3, 2), (3, 2, 2), (a, n))
    z, y, x = np.indices((3, 5, 7))
    assert np.array_equal(a.get().reshape(3, 5, 7), x + 100 * y + 10000 * z)


def test_order_of_blocks_and_threads_follows_the_seed(bench: Bench) -> None:
    function = bench("a[atomicAdd(next, 1)] = blockIdx.x * n + t;", "int* a, int* next")
    orders = []
    for bench.device.seed in (1, 1, 2):
        a = bench.ints(4 * 40)
        function((4,), (40,), (a, bench.ints(1)))
        orders.append(a.get())
        assert np.array_equal(np.sort(orders[-1]), np.arange(160))
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])


def test_barriers_order_shared_memory(bench: Bench) -> None:
    body = "__shared__ int s[200]; s[t] = t; __syncthreads(); a[t] = s[n - 1 - t]; __syncthreads(); s[t] = 0;"
    assert np.array_equal(bench.result(body, 200, block=(200,)), np.arange(200)[::-1])


def test_copies_are_there_when_they_were_waited_for(bench: Bench) -> None:
    """And may be before; two sets, of which one is waited for, or both."""
    body = """__shared__ int s[32], z[32]; a[t] = t; s[t] = z[t] = -1;
    cuda_host::copy_ahead(s + t, a + t, 4); cuda_host::end_copies();
    cuda_host::copy_ahead(z + t, nullptr, 4); cuda_host::end_copies();
    cuda_host::await_copies(BUT); __syncthreads();
    a[t] = s[n - 1 - t] + 100 * z[t];"""
    assert np.array_equal(bench.result(body.replace("BUT", "0"), 32), np.arange(32)[::-1])
    for but, stale in ((1, False), (2, True)):
        function, found = bench(body.replace("BUT", str(but))), []
        for bench.device.seed in SEEDS:
            a = bench.ints(32)
            function((1,), (32,), (a,))
            found += a.get().tolist()
        assert min(found) == -100 - stale  # zeros that have not come, and numbers that have not
        assert max(found) == 31


def test_dynamic_shared_memory(bench: Bench) -> None:
    function = bench(
        """extern __shared__ __align__(16) char room[];
        float* x = reinterpret_cast<float*>(room); int* y = reinterpret_cast<int*>(x + n);
        x[t] = t + 0.5f; y[t] = t; __syncthreads(); a[t] = x[n - 1 - t] + y[0];""",
        "float* a",
    )
    a = bench.xp.empty(50, np.float32)
    function((3,), (50,), (a,), shared_mem=400)
    assert np.array_equal(a.get(), np.arange(50)[::-1] + np.float32(0.5))
    with pytest.raises(KernelError, match=r"0 bytes past the end of dynamic shared memory \(396 bytes\)"):
        function((1,), (50,), (a,), shared_mem=396)
    with pytest.raises(KernelError, match="max_dynamic_shared_size_bytes is 49152"):
        function((1,), (50,), (a,), shared_mem=50000)
    function.max_dynamic_shared_size_bytes = 100000
    function((1,), (50,), (a,), shared_mem=100000)


# -- warps -------------------------------------------------------------------------------------------------------------

LANES = np.arange(32)


WARP = [
    ("__shfl_sync(~0u, t, 5)", np.full(32, 5)),
    ("__shfl_sync(~0u, t, t * 7)", LANES * 7 % 32),
    ("__shfl_sync(~0u, t, 3, 8)", LANES // 8 * 8 + 3),
    ("__shfl_up_sync(~0u, t, 3)", np.where(LANES < 3, LANES, LANES - 3)),
    ("__shfl_up_sync(~0u, t, 3, 16)", np.where(LANES % 16 < 3, LANES, LANES - 3)),
    ("__shfl_down_sync(~0u, t, 5)", np.where(LANES + 5 > 31, LANES, LANES + 5)),
    ("__shfl_down_sync(~0u, t, 5, 8)", np.where(LANES % 8 + 5 > 7, LANES, LANES + 5)),
    ("__shfl_xor_sync(~0u, t, 12)", LANES ^ 12),
    ("__shfl_xor_sync(~0u, t, 16, 16)", np.where(LANES < 16, LANES, LANES - 16)),
    ("int(__shfl_xor_sync(~0u, t + 0.5f, 1) * 2)", 2 * (LANES ^ 1) + 1),
    ("int(__shfl_sync(~0u, (1ull << 40) + t, 9) >> 36)", np.full(32, 16)),
    ("__ballot_sync(~0u, t % 3 == 0)", np.full(32, int("01" + "001" * 10, 2))),
    ("__any_sync(~0u, t == 31)", np.ones(32)),
    ("__any_sync(~0u, t == 32)", np.zeros(32)),
    ("__all_sync(~0u, t < 32)", np.ones(32)),
    ("__all_sync(~0u, t < 31)", np.zeros(32)),
    ("__syncthreads_count(t % 5 == 0)", np.full(32, 7)),
    ("__syncthreads_or(t == 3)", np.ones(32)),
    ("__syncthreads_and(t != 3)", np.zeros(32)),
]


@pytest.mark.parametrize(("call", "expected"), WARP)
def test_warp_operations(bench: Bench, call: str, expected: np.ndarray) -> None:
    among = [f"a[t] = {call};" for call, _ in WARP]
    assert np.array_equal(bench.result(f"a[t] = {call};", 32, among=among), expected)


def test_groups_of_lanes_and_a_warp_that_is_not_full(bench: Bench) -> None:
    body = """unsigned group = 0xffu << (t & 24);
    int sum = t;
    for (int d = 4; d; d /= 2) sum += __shfl_xor_sync(group, sum, d);
    if (t < 3) return;  // a lane that has exited is not waited for
    a[t] = sum + 1000 * __popc(__ballot_sync(~0u, 1));"""
    t = np.arange(40)
    expected = 28 + 8 * (t // 8 * 8) + np.where(t < 32, 29000, 8000)
    expected[:3] = -1
    assert np.array_equal(bench.result(body, 40, block=(40,)), expected)


def test_value_of_a_lane_outside_the_mask_is_a_nan(bench: Bench) -> None:
    assert (bench.result("if (t < 8) a[t] = isnan(__shfl_sync(0xff, 1.0f, 9));", 8) == 1).all()


def test_warp_barrier_orders_shared_memory(bench: Bench) -> None:
    body = "__shared__ int s[64]; s[t] = t; __syncwarp(); a[t] = s[t ^ 31];"
    assert np.array_equal(bench.result(body, 64, block=(64,)), np.arange(64) ^ 31)


# -- atomics and blocks ------------------------------------------------------------------------------------------------


def test_atomics(bench: Bench) -> None:
    body = """__shared__ int s; __shared__ float f;
    if (t == 0) s = 0, f = 0;
    __syncthreads();
    atomicAdd(&s, t); atomicAdd(&f, 0.5f);
    atomicAdd(a, 1); atomicMax(a + 1, t); atomicMin(a + 2, -t); atomicOr(a + 3, 1 << t % 8); atomicSub(a + 4, 2);
    for (int old = a5(a), seen; (seen = atomicCAS(a + 5, old, old + 3)) != old; old = seen) {}
    __syncthreads();
    if (t == 0) atomicExch(a + 6, s), atomicExch(a + 7, int(f));"""
    before = "__device__ int a5(int* a) { return atomicAdd(a + 5, 0); }"
    function = bench(body, before=before)
    for bench.device.seed in SEEDS:
        a = bench.ints(8)
        function((3,), (100,), (a,))
        assert a.get().tolist() == [300, 99, -99, 255, -600, 900, 4950, 50]


LAST_BLOCK = """
extern "C" __global__ void k(const int* x, int* part, unsigned* arrived, int* out, int n) {
    __shared__ int sum;
    __shared__ bool last;
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&sum, x[i]);
    __syncthreads();
    if (threadIdx.x == 0) {
        BEFORE
        last = atomicInc(arrived, gridDim.x - 1) == gridDim.x - 1;
        AFTER
    }
    __syncthreads();
    if (!last) return;
    int total = 0;
    for (int b = threadIdx.x; b < gridDim.x; b += 32) total += part[b];
    for (int d = 16; d; d /= 2) total += __shfl_xor_sync(0xffffffff, total, d);
    if (threadIdx.x == 0) *out = total;
}"""


@pytest.mark.parametrize(
    ("before", "after", "right"),
    [
        ("part[blockIdx.x] = sum; __threadfence();", "", True),
        ("part[blockIdx.x] = sum;", "", False),
        ("__threadfence(); part[blockIdx.x] = sum;", "", False),
        ("__threadfence();", "part[blockIdx.x] = sum;", False),
    ],
)
def test_the_last_block_sums_up(bench: Bench, before: str, after: str, right: bool) -> None:
    options = (f"-DBEFORE={before}", f"-DAFTER={after}")
    function = bench.device.compile(LAST_BLOCK, options=options).get_function("k")
    for bench.device.seed in SEEDS:
        x, arrived, out = bench.xp.asarray(np.arange(1000, dtype=np.int32)), bench.xp.zeros(1, np.uint32), bench.ints(1)
        args = (x, bench.ints(9), arrived, out, np.int32(1000))
        if right:
            function((9,), (32,), args)
            assert (out.get(), arrived.get()) == ([499500], [0])
        else:
            with pytest.raises(KernelError, match="which a thread of another block wrote"):
                function((9,), (32,), args)


# -- arithmetic --------------------------------------------------------------------------------------------------------

SIGNED, UNSIGNED = 1 * 2 - 1 * 3 + 127 * 4 - 128 * 5 + 7, 1 * 2 + 255 * 3 + 127 * 4 + 128 * 5 + 7
INTEGERS = [
    ("__popc(0xf0f0u)", 8),
    ("__ffs(8)", 4),
    ("__ffs(0)", 0),
    ("__clz(1)", 31),
    ("__clz(0)", 32),
    ("__brev(1u) == 0x80000000u", 1),
    ("__byte_perm(0x33221100, 0x77665544, 0x7250) == 0x77225500", 1),
    ("__byte_perm(0x00008000, 0, 0x9999)", -1),
    ("__funnelshift_r(0x10, 1, 4) == 0x10000001u", 1),
    ("__funnelshift_l(0x80000000u, 1, 4)", 24),
    ("__dp4a(0x01ff7f80, 0x02030405, 7)", SIGNED),
    ("__dp4a(0x01ff7f80u, 0x02030405u, 7u)", UNSIGNED),
    ("__vsub4(0x10002000, 0x20010101) == 0xf0ff1fff", 1),
    ("__vsubss4(0x80000000, 0x01000000) == 0x80000000", 1),
    ("__vcmpeq4(0x01020304, 0x01000304) == 0xff00ffff", 1),
    ("__vadd2(0xffff0001, 0x00010001)", 2),
    ("min(3, 2u) + max(-1, 4)", 6),
    ("min(-0.5f, __int_as_float(0x7fffffff)) * 2", -1),
    ("__mulhi(-1, 5)", -1),
    ("__float2int_rn(2.5f)", 2),
    ("__float2int_rn(3.5f)", 4),
    ("__float2int_rz(-1e20f) == (int)0x80000000", 1),
    ("__float2int_rn(__int_as_float(0x7fffffff))", 0),
    ("__float_as_int(1.0f) == 0x3f800000", 1),
    ("fmaf(1 + 0x1p-12f, 1 + 0x1p-12f, -1 - 0x1p-11f) == 0x1p-24f", 1),
    ("rsqrtf(16.0f) * 4 + exp2f(3) + __saturatef(-2.0f)", 9),
]


def test_integer_functions(bench: Bench) -> None:
    body = " ".join(f"a[{i}] = {call};" for i, (call, _) in enumerate(INTEGERS))
    results = bench.result(body, len(INTEGERS), block=(1,)).tolist()
    assert dict(zip(INTEGERS, results, strict=True)) == {case: case[1] for case in INTEGERS}


FLOATS = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
extern "C" __global__ void k(const float* x, const half* all, half* to_half, float* back, half2* pair, float* sums,
                             __nv_bfloat16* to_bf, int count) {
    int t = threadIdx.x + blockDim.x * blockIdx.x;
    if (t >= count) return;
    to_half[t] = __float2half_rn(x[t]);
    back[t] = __half2float(all[t]);
    half2 both = __floats2half2_rn(x[t], 2 * x[t]);
    pair[t] = both;
    sums[t] = __half22float2(__hadd2(both, both)).y;
    to_bf[t] = __float2bfloat16_rn(x[t]);
}"""


def test_half_and_bfloat16_are_rounded_as_numpy_rounds(bench: Bench) -> None:
    function, xp, count = bench.device.compile(FLOATS).get_function("k"), bench.xp, 65536
    every = np.arange(count, dtype=np.uint16).view(np.float16)
    values = every.astype(np.float32)
    near = np.random.RandomState(0).choice([0, 2**-12, -(2**-12), 2**-11, 3 * 2**-13], count).astype(np.float32)
    with np.errstate(all="ignore"):
        x = values * (1 + near)
    half, back, pair, sums, bf = (xp.empty(s, d) for s, d in [
        (count, np.float16), (count, np.float32), ((count, 2), np.float16), (count, np.float32), (count, np.uint16)
    ])  # fmt: skip
    function((256,), (256,), (xp.asarray(x), xp.asarray(every), half, back, pair, sums, bf, np.int32(count)))
    with np.errstate(all="ignore"):
        assert np.array_equal(half.get(), x.astype(np.float16), equal_nan=True)
        assert np.array_equal(back.get(), values, equal_nan=True)
        assert np.array_equal(pair.get()[:, 1], (2 * x).astype(np.float16), equal_nan=True)
        doubled = pair.get()[:, 1] + pair.get()[:, 1]
        assert np.array_equal(sums.get(), doubled.astype(np.float32), equal_nan=True)
        word = x.view(np.uint32)
        rounded = ((word + 0x7FFF + (word >> 16 & 1)) >> 16).astype(np.uint16)
        assert np.array_equal(bf.get(), np.where(np.isnan(x), 0x7FFF, rounded))
