// The running mean of values that SparQ keeps of each KV head.
// Macro: HEAD_DIM.
#pragma once
#include "common.cuh"

constexpr int AHEAD = 8;  // rows on their way

// mean [B, H_kv, d] takes up rows of v [N, H_kv, d] as slots slot[i] of sequences seq[i], one after the other. Grid (N,
// H_kv): the block of a sequence's first row takes up all that it has. All threads of a block call.
DEVICE void take_up(float* mean, const int* seq, const int* slot, const float* v) {
    const int own = blockIdx.x, n = gridDim.x, b = seq[own];
    bool earlier = false;
    for (int i = threadIdx.x; i < own; i += blockDim.x) earlier |= seq[i] == b;
    if (__syncthreads_or(earlier)) return;
    for (int j = threadIdx.x; j < HEAD_DIM; j += blockDim.x) {
        float* to = mean + (i64(b) * gridDim.y + blockIdx.y) * HEAD_DIM + j;
        float x = *to;
        for (int first = own; first < n; first += AHEAD) {
            float row[AHEAD];
#pragma unroll
            for (int u = 0; u < AHEAD; u++)
                row[u] = first + u < n ? v[(i64(first + u) * gridDim.y + blockIdx.y) * HEAD_DIM + j] : 0.0f;
#pragma unroll
            for (int u = 0; u < AHEAD; u++)
                if (first + u < n && seq[first + u] == b) x += (row[u] - x) / float(slot[first + u] + 1);
        }
        *to = x;
    }
}
