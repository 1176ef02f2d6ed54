// Rows of activations rounded for products with integer codes: x = scale (128 high + low), 15 bits in two bytes, so that
// an instruction that multiplies bytes loses nothing that weights in blocks had kept.
#pragma once
#include "common.cuh"

constexpr int LARGEST = 127 * 128 + 63;

// Of 32 columns. Its 80 bytes let the lanes of a warp read one each from shared memory without meeting in a bank.
struct Rounded {
    u32 high[8], low[8];
    float scale;
    int first, second;  // sums of the rounded values of either half
    int unused;
};

enum Making { PLAIN, NORMED, GATED };

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

// Rounds 32 numbers, one of each lane of a warp.
DEVICE void round_group(float x, Rounded& to) {
    // max_over leaves NaN out; a scale that is NaN tells of it.
    const float scale = __any_sync(ALL, x != x) ? NOT_A_NUMBER : max_over(fabsf(x)) / float(LARGEST);
    const float rounded = rintf(x * (scale == 0.0f ? 0.0f : 1.0f / scale));
    const int q = fabsf(rounded) <= float(LARGEST) ? int(rounded) : 0, high = (q + 64) >> 7;
    const int sum = sum_over<16>(q), other = __shfl_xor_sync(ALL, sum, 16), lane = lane_id();
    reinterpret_cast<i8*>(to.high)[lane] = i8(high);
    reinterpret_cast<i8*>(to.low)[lane] = i8(q - 128 * high);
    if (lane == 0) to.scale = scale, to.first = sum, to.second = other;
}

// Rounds a row of whole groups; the threads of a block share it.
DEVICE void round_row(const Source& x, Rounded* to) {
    for (int group = threadIdx.x / WARP; group * WARP < x.n_in; group += blockDim.x / WARP) {
        round_group(x(group * WARP + lane_id()), to[group]);
    }
}
