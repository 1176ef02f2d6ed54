// Rows of a cache, of any store: eight numbers read at a time, a row written by a block of threads. See rows.py.
#pragma once
#include "common.cuh"

enum Store { F32 = 0, F16 = 1, Q8_0 = 2, Q4_0 = 3 };
constexpr int BLOCK = 32;  // numbers that share a scale

// Keys or values [B, H_kv, slots, d] of which a kernel reads or writes rows.
struct Rows {
    u8* codes;
    u16* scales;
    i64 sequence, head;  // rows from one sequence, and from one head, to the next

    DEVICE i64 row(int b, int h, int slot) const { return b * sequence + h * head + slot; }
};

template <int STORE, int D>
constexpr int ROW_BYTES = STORE == F32 ? 4 * D : STORE == F16 ? 2 * D : STORE == Q8_0 ? D : D / 2;

// Eight numbers of a row as they lie in memory, so that many can be on their way before the first is needed.
template <int STORE>
struct Eight;
template <>
struct Eight<F32> {
    float4 low, high;
};
template <>
struct Eight<F16> {
    uint4 words;
};
template <>
struct Eight<Q8_0> {
    uint2 words;
    u16 scale;
};
template <>
struct Eight<Q4_0> {
    u32 word;
    u16 scale;
};

// Numbers 8 chunk ... 8 chunk + 7 of a row; those beyond D are 0.
template <int STORE, int D>
DEVICE Eight<STORE> fetch(const Rows& rows, i64 row, int chunk) {
    const u8* codes = rows.codes + row * ROW_BYTES<STORE, D>;
    Eight<STORE> x;
    if constexpr (STORE == F32 && D % 8 == 0) {
        const float4* at = reinterpret_cast<const float4*>(codes) + 2 * chunk;
        x.low = at[0], x.high = at[1];
    } else if constexpr (STORE == F16 && D % 8 == 0) {
        x.words = reinterpret_cast<const uint4*>(codes)[chunk];
    } else if constexpr (STORE == F32) {
        const float* at = reinterpret_cast<const float*>(codes) + 8 * chunk;
        const auto number = [&](int i) { return 8 * chunk + i < D ? at[i] : 0.0f; };
        x.low = make_float4(number(0), number(1), number(2), number(3));
        x.high = make_float4(number(4), number(5), number(6), number(7));
    } else if constexpr (STORE == F16) {
        const u16* at = reinterpret_cast<const u16*>(codes) + 8 * chunk;
        const auto half = [&](int i) { return 8 * chunk + i < D ? u32(at[i]) : 0u; };
        x.words = make_uint4(half(0) | half(1) << 16, half(2) | half(3) << 16, half(4) | half(5) << 16,
                             half(6) | half(7) << 16);
    } else {
        x.scale = rows.scales[row * (D / BLOCK) + 8 * chunk / BLOCK];
        if constexpr (STORE == Q8_0) x.words = reinterpret_cast<const uint2*>(codes)[chunk];
        else x.word = reinterpret_cast<const u32*>(codes)[chunk];
    }
    return x;
}

DEVICE void unpack(const Eight<F32>& from, float (&x)[8]) {
    x[0] = from.low.x, x[1] = from.low.y, x[2] = from.low.z, x[3] = from.low.w;
    x[4] = from.high.x, x[5] = from.high.y, x[6] = from.high.z, x[7] = from.high.w;
}

DEVICE void unpack(const Eight<F16>& from, float (&x)[8]) {
    const u32 words[4] = {from.words.x, from.words.y, from.words.z, from.words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) x[2 * i] = low_half(words[i]), x[2 * i + 1] = high_half(words[i]);
}

DEVICE void unpack(const Eight<Q8_0>& from, float (&x)[8]) {
    const float scale = to_float(from.scale);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[i] = scale * float(i8(from.words.x >> 8 * i));
        x[i + 4] = scale * float(i8(from.words.y >> 8 * i));
    }
}

DEVICE void unpack(const Eight<Q4_0>& from, float (&x)[8]) {
    const float scale = to_float(from.scale);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = scale * float(int(from.word >> 4 * i & 15) - 8);
}

template <int STORE, int D>
DEVICE void load8(const Rows& rows, i64 row, int chunk, float (&x)[8]) {
    unpack(fetch<STORE, D>(rows, row, chunk), x);
}

// The largest power of two that divides D: so many components are mixed by the rotation.
template <int D>
constexpr int ROTATION = D & -D;

// 1 / sqrt(n) of a power of two, to the nearest float: what is coded must be as the reference codes it.
DEVICE constexpr float inverse_root(int n) {
    return n == 1 ? 1.0f : n == 2 ? 0.70710678118654752f : 0.5f * inverse_root(n / 4);
}

// x [heads, D] in shared memory, each run of ROTATION<D> numbers times the Hadamard matrix of that size, of orthonormal
// rows; in the order of additions of the reference. All threads of the block call; each begins with the numbers
// threadIdx.x + n blockDim.x. Ends with a barrier.
template <int D>
DEVICE void rotate(float* x, int heads = 1) {
    constexpr float scale = inverse_root(ROTATION<D>);
    for (int i = threadIdx.x; i < heads * D; i += blockDim.x) x[i] *= scale;
    for (int step = 1; step < ROTATION<D>; step *= 2) {
        __syncthreads();
        for (int i = threadIdx.x; i < heads * D / 2; i += blockDim.x) {
            const int first = i / step * 2 * step + i % step;
            const float a = x[first], b = x[first + step];
            x[first] = a + b, x[first + step] = a - b;
        }
    }
    __syncthreads();
}

// Writes x [D] in shared memory as a row. All threads of a block of whole warps call.
template <int STORE, int D>
DEVICE void store_row(const Rows& rows, i64 row, const float* x) {
    u8* codes = rows.codes + row * ROW_BYTES<STORE, D>;
    if constexpr (STORE == F32 || STORE == F16) {
        for (int i = threadIdx.x; i < D; i += blockDim.x) {
            if constexpr (STORE == F32) reinterpret_cast<float*>(codes)[i] = x[i];
            else reinterpret_cast<u16*>(codes)[i] = to_half(x[i]);
        }
    } else {
        const int lane = lane_id();
        for (int block = threadIdx.x / WARP; block < D / BLOCK; block += blockDim.x / WARP) {
            const float value = x[block * BLOCK + lane];
            float scale;
            int code = 0;
            if constexpr (STORE == Q8_0) {
                // max_over leaves NaN out; a scale that is NaN tells of it.
                scale = __any_sync(ALL, value != value) ? NOT_A_NUMBER : max_over(fabsf(value)) / 127.0f;
                const float q = __fmul_rn(value, scale == 0.0f ? 0.0f : 1.0f / scale);  // never one with what is added
                if (fabsf(q) <= 127.5f) code = int(q < 0.0f ? q - 0.5f : q + 0.5f);
                codes[block * BLOCK + lane] = u8(i8(code));
            } else {
                const float high = max_over(fabsf(value));
                const u32 largest = __ballot_sync(ALL, fabsf(value) == high);
                scale = __shfl_sync(ALL, value, largest ? __ffs(largest) - 1 : 0) / -8.0f;
                if (__any_sync(ALL, value != value)) scale = NOT_A_NUMBER;
                const float q = __fmul_rn(value, scale == 0.0f ? 0.0f : 1.0f / scale);
                code = q == q ? min(15, max(0, int(q + 8.5f))) : 8;
                const int next = __shfl_down_sync(ALL, code, 1);
                if (lane % 2 == 0) codes[(block * BLOCK + lane) / 2] = u8(code | next << 4);
            }
            if (lane == 0) rows.scales[row * (D / BLOCK) + block] = to_half(scale);
        }
    }
}
