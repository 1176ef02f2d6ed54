"""The emulation of CUDA builds modules and launches kernels as CuPy does, and refuses what CuPy or CUDA refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_bench import Bench
from cuda_host import BuildError, HostDevice, KernelError, StreamError, stream


@pytest.fixture
def bench(cuda_host: HostDevice) -> Bench:
    return Bench(cuda_host)


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


def test_captured_work_is_done_when_it_is_played(bench: Bench) -> None:
    function, a, b = bench("a[t] += 1;"), bench.ints(4), bench.xp.asarray(np.arange(4, dtype=np.int32))
    before = a.get()

    def work() -> None:
        a[...] = b
        function((1,), (4,), (a,))
        b[1:] = 7

    play = stream.capture(work)
    assert np.array_equal(a.get(), before)
    play()
    assert (a.get().tolist(), b.get().tolist()) == ([1, 2, 3, 4], [0, 7, 7, 7])
    play()
    assert a.get().tolist() == [1, 8, 8, 8]


def test_captured_work_keeps_no_memory(bench: Bench) -> None:
    function, arrays = bench("a[t] += 1;"), [bench.ints(4)]
    play = stream.capture(lambda: function((1,), (3,), (arrays[0][1:],)))
    arrays[0] = arrays[0][2:3]  # a view, which keeps it
    play()
    arrays.clear()
    with pytest.raises(StreamError, match="memory that was freed"):
        play()


def test_a_capture_waits_for_nothing(bench: Bench) -> None:
    a, many = bench.ints(4), [bench.ints(1) for _ in range(9)]
    calls = a.get, lambda: a.set(np.ones(4, np.int32)), lambda: bench.xp.asarray(np.ones(4)), lambda: a + a
    for call in (*calls, lambda: bench.xp.concatenate(many)):
        with pytest.raises(StreamError, match="while a stream is captured"):
            stream.capture(call)
    with pytest.raises(TypeError, match="Unsupported type"):
        a[...] = np.ones(4, np.int32)
    with pytest.raises(TypeError, match="Only cupy arrays"):
        bench.xp.concatenate([np.ones(2), np.ones(2)])
    assert len(bench.xp.concatenate(many)) == 9
