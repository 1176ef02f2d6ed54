// What all kernels share. No header of CUDA is needed, so that NVRTC compiles without any; what is not portable C++ has
// a portable body beside it, which runs when the tests build these sources for the CPU.
#pragma once

using i8 = signed char;
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

constexpr int WARP = 32;
constexpr u32 ALL = 0xffffffffu;
#define KERNEL extern "C" __global__ void
#define DEVICE __device__ __forceinline__
#define INFINITE __int_as_float(0x7f800000)
#define NOT_A_NUMBER __int_as_float(0x7fffffff)

DEVICE constexpr int power_from(int least) {
    int power = 1;
    while (power < least) power *= 2;
    return power;
}

// -- half precision, as its bits ------------------------------------------------------------------------------------

DEVICE float to_float(u16 half) {
#ifdef __CUDA_ARCH__
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
    return x;
#else
    return float(__builtin_bit_cast(_Float16, half));
#endif
}

// Rounded to the nearest, ties to even; beyond the largest half infinite.
DEVICE u16 to_half(float x) {
#ifdef __CUDA_ARCH__
    u16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
#else
    return __builtin_bit_cast(u16, _Float16(x));
#endif
}

DEVICE float low_half(u32 pair) { return to_float(u16(pair)); }
DEVICE float high_half(u32 pair) { return to_float(u16(pair >> 16)); }
DEVICE u32 two_halves(float low, float high) { return u32(to_half(low)) | u32(to_half(high)) << 16; }

// -- warps and blocks -------------------------------------------------------------------------------------------------

DEVICE int lane_id() { return threadIdx.x % WARP; }

// Over groups of WIDTH lanes, a power of two; every lane of a group gets the result.
template <int WIDTH = WARP>
DEVICE float sum_over(float x) {
#pragma unroll
    for (int step = WIDTH / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}

template <int WIDTH = WARP>
DEVICE float max_over(float x) {
#pragma unroll
    for (int step = WIDTH / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
    return x;
}

template <int WIDTH = WARP>
DEVICE int sum_over(int x) {
#pragma unroll
    for (int step = WIDTH / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}

// The sum over a block of whole warps, at most 32; every thread gets it, and all threads must call. shared [32] may be
// that of a call just before.
DEVICE float block_sum(float x, float* shared) {
    x = sum_over(x);
    __syncthreads();
    if (lane_id() == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    const int warps = blockDim.x / WARP;
    return sum_over(lane_id() < warps ? shared[lane_id()] : 0.0f);
}

DEVICE float block_max(float x, float* shared) {
    x = max_over(x);
    __syncthreads();
    if (lane_id() == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    const int warps = blockDim.x / WARP;
    return max_over(lane_id() < warps ? shared[lane_id()] : -INFINITE);
}

// True in the last of n blocks to come here, which sees what the others have written, and leaves the counter 0 as it was.
DEVICE bool is_last(int* done, int n) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(done, 1) == n - 1;
        if (last) *done = 0;
        __threadfence();  // PTX's memory model asks for one on either side of the atomic
    }
    __syncthreads();
    return last;
}
