"""The emulation of CUDA that kernels are tested on: what CUDA promises holds, and what CUDA forbids is an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from cuda_host import BuildError, Function, HostDevice, KernelError

SEEDS = range(8)


class Bench:
    """Small kernels, by their bodies."""

    def __init__(self, device: HostDevice) -> None:
        self.device, self.xp = device, device.xp

    def __call__(self, body: str, parameters: str = "int* a", before: str = "", among: Sequence[str] = ()) -> Function:
        """A kernel with this body, whose threads know their index `t` and the block's size `n`.

        `among` are bodies that are compiled together, which takes less time. A body begins on line 2.
        """
        bodies = list(among) or [body]
        parts = [
            f'#line 1\nextern "C" __global__ void k{i}({parameters}) {{ int t = threadIdx.x, n = blockDim.x;\n{b} }}\n'
            for i, b in enumerate(bodies)
        ]
        return self.device.compile("\n".join([before, *parts])).get_function(f"k{bodies.index(body)}")

    def ints(self, n: int, value: int = 0) -> Any:
        return self.xp.full(n, value, np.int32)

    def result(
        self, body: str, n: int, block: Sequence[int] = (32,), grid: Sequence[int] = (1,), **more: Any
    ) -> np.ndarray:
        """What the kernel writes to int a[n]; the same for every seed."""
        function, results = self(body, **more), []
        for self.device.seed in SEEDS:
            a = self.ints(n, -1)
            function(grid, block, (a,))
            results.append(a.get())
        assert all(np.array_equal(r, results[0]) for r in results)
        return results[0]

    def errors(
        self, body: str, message: str, block: Sequence[int] = (32,), grid: Sequence[int] = (1,), **more: Any
    ) -> list[str]:
        """The kernel, given a[64], ends in an error like this for every seed: the errors."""
        function, texts = self(body, **more), []
        for self.device.seed in SEEDS:
            with pytest.raises(KernelError, match=message) as e:
                function(grid, block, (self.ints(64),))
            texts.append(str(e.value))
        return texts


def bodies(cases: Sequence[tuple[str, Any]]) -> list[str]:
    return [body for body, _ in cases]


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


def test_templates_by_name_expression(bench: Bench) -> None:
    source = """
    template <class T, int N> __device__ T total(T x) {  // each instance has shared memory of its own
        __shared__ T part[N];
        part[threadIdx.x] = x;
        __syncthreads();
        T sum = 0;
        for (int i = 0; i < N; i++) sum += part[i];
        return sum;
    }
    namespace sums { template <class T, int N> __global__ void __launch_bounds__(N) k(const T* x, T* out) {
        out[threadIdx.x] = total<T, N>(x[threadIdx.x]);
    } }"""
    names = ["sums::k<float, 33>", "sums::k<unsigned long long, 7>"]
    module = bench.device.compile(source, names)
    for name, dtype, n in zip(names, (np.float32, np.uint64), (33, 7), strict=True):
        out = bench.xp.empty(n, dtype)
        module.get_function(name)((1,), (n,), (bench.xp.asarray(np.arange(n, dtype=dtype)), out))
        assert np.array_equal(out.get(), np.full(n, n * (n - 1) // 2, dtype))
    with pytest.raises(KernelError, match="no kernel 'k'"):
        module.get_function("k")


def test_constant_and_device_variables(bench: Bench) -> None:
    before = (
        "__constant__ float table[4] = {1, 2, 4, 8}; __device__ int calls; __device__ const int steps[3] = {5, 6, 7};"
    )
    body = "const int* s = steps + t % 3; a[t] = table[t % 4] * 10 + *s; if (t == 0) atomicAdd(&calls, 1);"
    expected = 10 * 2 ** (np.arange(32) % 4) + 5 + np.arange(32) % 3
    assert np.array_equal(bench.result(body, 32, before=before), expected)


def test_options_define_macros(bench: Bench) -> None:
    source = 'extern "C" __global__ void k(int* a) { *a = VALUE; }'
    a = bench.ints(1)
    for value in (3, 4):
        options = (f"-DVALUE={value}", "--use_fast_math", "-arch=sm_80")
        bench.device.compile(source, options=options).get_function("k")((1,), (1,), (a,))
        assert a.get() == [value]


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


# -- what is found: races ----------------------------------------------------------------------------------------------

RACES = [
    ("__shared__ int s[64]; s[t] = t; a[t] = s[t ^ 32];", "uninitialised"),  # whoever comes first
    ("__shared__ int s[64]; s[t] = 0; __syncthreads(); a[t] = s[63 - t]; s[t] = 1;", "race"),
    ("__shared__ int s[64]; s[t] = t; __shfl_sync(~0u, t, 0); a[t] = s[t ^ 1];", "race"),
    ("__shared__ int s[64]; s[t] = t; __syncwarp(0xffu << (t & 24)); a[t] = s[t ^ 8];", "race|uninitialised"),
    ("__shared__ int s; s = t; __syncthreads(); a[t] = s;", "race: writes 4 bytes"),
    ("a[0] += t;", "race"),
    ("a[t] = 1; int sum = a[0] + a[t]; __syncthreads(); a[63 - t] += sum; if (t == 5) a[6] = 0;", "race"),
    ("if (t == 0) a[0] = 7; atomicAdd(a, 1);", "race"),
    ("atomicAdd(a, 1); a[t] = a[0];", "race: .*(changed atomically|atomically changes)"),
    ("if (t == 9) a[0] = 1; else a[t] = *(volatile int*)a;", "race"),
    ("char* c = (char*)a; c[t + 1] = c[t];", "race: .* 1 byte"),
]


@pytest.mark.parametrize(("body", "message"), RACES)
def test_a_race_is_found(bench: Bench, body: str, message: str) -> None:
    texts = bench.errors(body, message, block=(64,), among=bodies(RACES))
    assert all("kernel.cu:2" in text for text in texts)


def test_a_race_of_blocks_is_found(bench: Bench) -> None:
    bench.errors("a[0] += 1;", "a thread of another block wrote", block=(1,), grid=(2,))
    bench.errors("a[t] = a[t + n * (1 - blockIdx.x)];", "a thread of another block", block=(16,), grid=(2,))


def test_what_is_no_race(bench: Bench) -> None:
    body = """__shared__ int flag, s[64]; __shared__ char bytes[64];
    flag = 7;                                                   // the same value by all
    bytes[t] = t;                                               // neighbours in a word
    s[t] = 0; s[t] = t; __syncthreads(); s[t] = s[t] + flag; __syncthreads();
    a[t] = s[63 - t] + bytes[t ^ 1];"""
    t = np.arange(64)
    assert np.array_equal(bench.result(body, 64, block=(64,)), 70 - t + (t ^ 1))
    assert np.array_equal(bench.result("a[t] = 5;", 64, block=(64,), grid=(3,)), np.full(64, 5))


# -- what is found: memory ---------------------------------------------------------------------------------------------

ACCESSES = [
    ("a[t + 33] = 1;", r"writes 4 bytes at kernel.cu:2, 0 bytes past the end of argument 0 \(256 bytes\)"),
    ("int x = a[t - 1]; a[t + 32] = x;", r"reads 4 bytes at kernel.cu:2, 4 bytes before argument 0"),
    ("__shared__ int s[32]; __shared__ int u[32]; int* p = s; p[t + 1] = 1; u[t] = 0;", r"past the end of k\d+::s"),
    ("__shared__ int s[4][8]; s[t / 8][t % 8 + 1] = 0;", "index of an array"),
    ("int local[31]; local[t] = 1; a[t] = local[a[t] + t - 1];", "index of an array"),
    ("((char*)a)[225 + t] = 0;", r"writes 1 byte at .* 0 bytes past"),
    ("((int4*)a)[t] = make_int4(1, 2, 3, 4);", "writes 16 bytes|writes 4 bytes"),
    ("memcpy(a + t, a + 62, 12);", "reads 12 bytes"),
    ("atomicAdd(a + 33 + t, 1);", "atomically changes 4 bytes"),
    ("a[__ldg(a + 64 + t)] = 1;", "reads 4 bytes at kernel.cu:2"),
    ("int* p = nullptr; *p = 1;", "null pointer"),
    ("int* p = (int*)4096 + t; *p = 1;", "no memory of this launch"),
    ("__shared__ int s[32]; if (t) s[t] = 1; __syncthreads(); a[t] = s[31 - t];", r"uninitialised: .*k\d+::s"),
    ("__shared__ int s[32]; atomicAdd(&s[t], 1);", r"uninitialised: .*k\d+::s"),
    ("if (t == 3) { int* p = a + 1; float4* v = (float4*)p; a[9] = v->x; }", "misaligned: .*float4"),
    ("if (t == 3) { const float4* v = (const float4*)(a + 1); float4 x = *v; a[9] = x.z; }", "misaligned"),
    ("if (t == 3) { uint4 x = __ldg((const uint4*)(a + 2)); a[9] = x.z; }", "misaligned"),
    ("if (t == 3) *(long long*)(a + 1) = 2;", "misaligned"),
]


@pytest.mark.parametrize(("body", "message"), ACCESSES)
def test_a_wrong_access_is_found(bench: Bench, body: str, message: str) -> None:
    bench.errors(body, message, among=bodies(ACCESSES))


def test_shared_memory_is_new_in_each_block(bench: Bench) -> None:
    body = "__shared__ int s; if (blockIdx.x == 0 && t == 0) s = 1; __syncthreads(); a[t + n * blockIdx.x] = s;"
    bench.errors(body, "uninitialised", grid=(2,))


def test_memory_of_empty_is_nan(bench: Bench) -> None:
    assert np.isnan(bench.xp.empty(9, np.float32).get()).all()
    assert np.isnan(bench.xp.empty((3, 3), np.float16).get()).all()


def test_an_array_may_be_a_view_and_known_by_its_address(bench: Bench) -> None:
    base = bench.ints(100)
    function = bench("a[t] = t; if (b) b[t] = -t;", "int* a, int* b")
    function((1,), (10,), (base[5:15], np.uint64(0)))
    assert np.array_equal(base.get()[4:16], [0, *range(10), 0])
    with pytest.raises(KernelError, match="past the end of argument 0"):
        function((1,), (11,), (base[5:15], np.uint64(0)))
    other = bench.ints(10)
    function((1,), (10,), (base[5:15], np.uint64(other.data.ptr)))
    assert np.array_equal(other.get(), -np.arange(10))


ARITHMETIC = [
    ("a[t] = 1 << (a[t] + 32);", "shift"),
    ("a[t] = 1 / a[t];", "division by zero"),
    ("a[t] = (a[t] + 2000000000) * 2;", r"signed overflow of \*"),
    ("a[t] = int(3e9f + t);", "range"),
]


@pytest.mark.parametrize(("body", "message"), ARITHMETIC)
def test_undefined_arithmetic_is_found(bench: Bench, body: str, message: str) -> None:
    bench.errors(body, message, among=bodies(ARITHMETIC))


# -- what is found: meetings that do not happen ------------------------------------------------------------------------

MEETINGS = [
    ("if (t < 16) __syncthreads(); else __syncwarp(0xffff0000);\n if (t >= 16) __syncwarp(~0u);", "never come"),
    ("if (t < 16) {\n __syncthreads(); } else {\n __syncthreads(); }", "divergent __syncthreads"),
    ("for (int i = 0; i < 1 + t % 2; i++)\n __syncthreads();\n if (t % 2 == 0) __syncthreads();", "divergent"),
    (
        "if (t < 16) __syncwarp();\n else __syncthreads();",
        "threads 0-15 wait in __syncwarp at kernel.cu:2; threads 16-31",
    ),
    ("if (t % 2) __shfl_sync(~0u, t, 0);\n else __ballot_sync(~0u, t);", "different operations"),
    ("__shfl_sync(t < 8 ? 0xffu : ~0u, t, 0); __syncthreads();", "never come"),
    ("__syncwarp(2);", "which leaves out the calling lane"),
    ("a[t] = __shfl_sync(~0u, t, 0, 12);", "shuffle of width 12"),
    ("if (t == 5) __trap();", "__trap"),
    ("assert(t < 31);", r"assert\(t < 31\)"),
    ("while (atomicAdd(a, 0) == 0) {}", "spins"),
]


@pytest.mark.parametrize(("body", "message"), MEETINGS)
def test_a_meeting_that_cannot_happen_is_an_error(bench: Bench, body: str, message: str) -> None:
    bench.errors(body, message, among=bodies(MEETINGS))


def test_a_thread_that_has_exited_is_not_waited_for(bench: Bench) -> None:
    body = "__shared__ int s[64]; if (t >= 40) return; s[t] = t; __syncthreads(); a[t] = s[39 - t];"
    assert np.array_equal(bench.result(body, 40, block=(64,)), np.arange(40)[::-1])


def test_recursion_without_end_is_an_error(bench: Bench) -> None:
    before = "__device__ __noinline__ int f(int x) { volatile int y[64]; y[0] = x; return f(x + 1) + y[0]; }"
    bench.errors("a[t] = f(t);", "stack overflow", before=before)


def test_after_an_error_the_module_works_on(bench: Bench) -> None:
    function = bench("a[t] = t; if (t >= 40) __syncthreads(); a[t + n - 32] += 1;")
    for _ in range(3):
        with pytest.raises(KernelError):
            function((2,), (64,), (bench.ints(96),))
        a = bench.ints(64)
        function((1,), (32,), (a,))
        assert np.array_equal(a.get()[:32], np.arange(32) + 1)


# -- launching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (lambda a: (a, np.int32(3)), "2 arguments for 3 parameters"),
        (lambda a: (a, 3, np.float32(1)), "argument 1: int for a parameter of 4 bytes"),
        (lambda a: (a, np.int32(3), 1.0), "argument 2: float for a parameter of 4 bytes"),
        (lambda a: (a, np.float32(3), np.float32(1)), "argument 1: float32 for a parameter of 4 bytes"),
        (lambda a: (a, a, np.float32(1)), "argument 1: DeviceArray"),
        (lambda a: (np.int32(1), np.int32(3), np.float32(1)), "argument 0: int32 for a parameter of 8 bytes"),
    ],
)
def test_wrong_arguments_are_refused(bench: Bench, args: Any, message: str) -> None:
    function = bench("a[t] = count * scale;", "float* a, int count, float scale")
    a = bench.xp.zeros(4, np.float32)
    with pytest.raises(KernelError, match=message):
        function((1,), (4,), args(a))
    with pytest.raises(TypeError, match="Unsupported type"):
        function((1,), (4,), (a.get(), np.int32(3), np.float32(1)))


def test_an_impossible_launch_is_refused(bench: Bench) -> None:
    function = bench("a[0] = 1;")
    for grid, block in [((0,), (1,)), ((1, 65536), (1,)), ((1,), (1025,)), ((1,), (32, 33)), ((1,), (1, 1, 65))]:
        with pytest.raises(KernelError):
            function(grid, block, (bench.ints(1),))


def test_host_and_device_do_not_mix(bench: Bench) -> None:
    host = np.ones((2, 3), np.float32)
    device = bench.xp.asarray(host)
    with pytest.raises(TypeError, match="Unsupported type"):
        device + host
    assert isinstance(device * 2 + device, bench.xp.ndarray)
    assert isinstance(bench.xp.matmul(device, device.T), bench.xp.ndarray)
    assert type(bench.xp.asnumpy(device)) is np.ndarray
    host[:] = 5
    device.set(host * 2)
    assert (device.get() == 10).all()


def test_a_source_that_does_not_compile(bench: Bench) -> None:
    with pytest.raises(BuildError, match=r"kernel\.cu:2"):
        bench("a[t] = unknown;")


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_integer_functions(bench: Bench) -> None:
    body = """a[0] = __popc(0xf0f0u); a[1] = __ffs(8); a[2] = __ffs(0); a[3] = __clz(1); a[4] = __clz(0);
    a[5] = __brev(1u) == 0x80000000u; a[6] = __byte_perm(0x33221100, 0x77665544, 0x7250) == 0x77225500;
    a[7] = __byte_perm(0x00008000, 0, 0x9999) == -1; a[8] = __funnelshift_r(0x10, 1, 4) == 0x10000001u;
    a[9] = __dp4a(0x01ff7f80, 0x02030405, 7); a[10] = __dp4a(0x01ff7f80u, 0x02030405u, 7u);
    a[11] = __vsub4(0x10002000, 0x20010101) == 0xf0ff1fff; a[12] = __vsubss4(0x80000000, 0x01000000) == 0x80000000;
    a[13] = __vcmpeq4(0x01020304, 0x01000304) == 0xff00ffff; a[14] = min(3, 2u) + max(-1, 4);
    a[15] = min(-0.5f, NAN) * 2;
    a[16] = __mulhi(-1, 5); a[17] = __float2int_rn(2.5f) + __float2int_rn(3.5f);
    a[18] = __float2int_rz(-1e20f) == INT_MIN; a[19] = __float2int_rn(NAN); a[20] = __float_as_int(1.0f) == 0x3f800000;
    a[21] = __vadd2(0xffff0001, 0x00010001);"""
    expected = [8, 4, 0, 31, 32, 1, 1, 1, 1]
    signed = 1 * 2 + -1 * 3 + 127 * 4 + -128 * 5 + 7
    expected += [signed, 2 + 255 * 3 + 127 * 4 + 128 * 5 + 7, 1, 1, 1, 6, -1, -1, 6, 1, 0, 1, 2]
    assert bench.result(body, 22, block=(1,)).tolist() == expected


def test_half_and_bfloat16_are_rounded_as_numpy_rounds(bench: Bench) -> None:
    before = "#include <cuda_fp16.h>\n#include <cuda_bf16.h>"
    body = """if (t < count) {
        to_half[t] = __float2half_rn(x[t]); back[t] = __half2float(all[t]);
        half2 both = __floats2half2_rn(x[t], 2 * x[t]); pair[t] = both;
        float2 sum = __half22float2(__hadd2(both, both)); sums[t] = sum.y;
        to_bf[t] = __float2bfloat16_rn(x[t]);
    }"""
    parameters = "const float* x, const half* all, half* to_half, float* back, half2* pair, float* sums, "
    function = bench(f"t += n * blockIdx.x; {body}", parameters + "__nv_bfloat16* to_bf, int count", before)
    xp, count = bench.xp, 65536
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
