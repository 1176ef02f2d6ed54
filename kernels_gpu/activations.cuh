// Rows of activations rounded for products with integer codes: x = scale (128 high + low), 15 bits in two bytes, so that
// an instruction that multiplies bytes loses nothing that weights in blocks had kept.
#pragma once
#include "common.cuh"

constexpr int LARGEST = 127 * 128 + 63;

// Of 32 columns. Eight lanes that read 16 bytes of neighbours, 80 bytes apart, meet no bank of shared memory twice.
struct Rounded {
    uint4 high[2], low[2];
    float scale;
    int first, second;  // sums of the rounded values of either half
    int unused;
};

enum Making { PLAIN, NORMED, GATED };

DEVICE float4 four_of(const float* from) { return *reinterpret_cast<const float4*>(from); }

// How a row of activations becomes the input of products.
//   NORMED  RMSNorm with these weights (arXiv 1910.07467)
//   GATED   silu(x) times up, which follow each other in a row [2 n_in] (arXiv 2002.05202)
struct Source {
    const float* row;
    int n_in, kind;
    const float* norm;
    float factor;  // of NORMED

    DEVICE float operator()(int i) const {
        if (kind == NORMED) return row[i] * factor * norm[i];
        if (kind == GATED) return row[i] / (1.0f + expf(-row[i])) * row[n_in + i];
        return row[i];
    }

    // Of i ... i + 3, from rows that are aligned to it.
    DEVICE float4 four(int i) const {
        const float4 x = four_of(row + i);
        if (kind == NORMED) {
            const float4 w = four_of(norm + i);
            return make_float4(x.x * factor * w.x, x.y * factor * w.y, x.z * factor * w.z, x.w * factor * w.w);
        }
        if (kind == PLAIN) return x;
        const float4 up = four_of(row + n_in + i);
        return make_float4(
            x.x / (1.0f + expf(-x.x)) * up.x, x.y / (1.0f + expf(-x.y)) * up.y, x.z / (1.0f + expf(-x.z)) * up.z,
            x.w / (1.0f + expf(-x.w)) * up.w
        );
    }
};

// All threads of a block call. shared [32].
DEVICE Source source_of(const float* row, int n_in, int kind, const float* norm, float eps, float* shared) {
    float factor = 1.0f;
    if (kind == NORMED) {
        float squares = 0.0f;
        for (int i = threadIdx.x; i < n_in; i += blockDim.x) squares += row[i] * row[i];
        factor = 1.0f / sqrtf(block_sum(squares, shared) / float(n_in) + eps);
    }
    return {row, n_in, kind, norm, factor};
}

// Rounds 32 numbers, four of each of eight lanes. All lanes of a warp call; where `to` is null nothing is written.
DEVICE void round_group(const float4& from, Rounded* to) {
    const float x[4] = {from.x, from.y, from.z, from.w};
    int most = 0;  // as an integer NaN is the largest, so that the scale tells of it
#pragma unroll
    for (int i = 0; i < 4; i++) most = max(most, __float_as_int(x[i]) & 0x7fffffff);
#pragma unroll
    for (int step = 4; step > 0; step /= 2) most = max(most, __shfl_xor_sync(ALL, most, step));
    const float scale = __int_as_float(most) / float(LARGEST), inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
    u32 high = 0, low = 0;
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float rounded = rintf(x[i] * inverse);
        const int q = fabsf(rounded) <= float(LARGEST) ? int(rounded) : 0, above = (q + 64) >> 7;
        high |= u32(above & 255) << 8 * i, low |= u32((q - 128 * above) & 255) << 8 * i;
        sum += q;
    }
    sum = sum_over<4>(sum);
    const int other = __shfl_xor_sync(ALL, sum, 4), lane = lane_id() % 8;
    if (!to) return;
    reinterpret_cast<u32*>(to->high)[lane] = high;
    reinterpret_cast<u32*>(to->low)[lane] = low;
    if (lane == 0) to->scale = scale, to->first = sum, to->second = other;
}

// Rounds a row of whole groups; the threads of a block share it.
DEVICE void round_row(const Source& x, Rounded* to) {
    for (int begin = threadIdx.x / WARP * 4 * WARP; begin < x.n_in; begin += blockDim.x * 4) {
        const int i = begin + 4 * lane_id();
        const bool is = i < x.n_in;
        round_group(is ? x.four(i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f), is ? to + i / WARP : nullptr);
    }
}
