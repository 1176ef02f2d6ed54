// The components of queries by which SparQ looks for tokens (arXiv 2312.04985, algorithm 1).
// Macros: HEAD_DIM, GROUP.
#pragma once
#include "selection.cuh"

constexpr int D = HEAD_DIM;
constexpr int MOST = (D + 31) / 32 * 32;  // components, and room behind them

struct Components {
    float q[GROUP][D];
    __align__(16) u32 order[MOST];
    int chosen[MOST];            // the r components of largest sum |q|, of equal ones the first; then 0
    float factor[MOST][GROUP];       // what the queries have there, over tau; then 0
    float few[GROUP], every[GROUP];  // sums of |q| there, and of all
};

// For queries q [GROUP, D]; returns the share of |q| that is chosen. All threads of a block of whole warps call; ends with
// a barrier.
DEVICE float choose_components(const float* q, int r, Components& c) {
    for (int i = threadIdx.x; i < GROUP * D; i += blockDim.x) c.q[i / D][i % D] = q[i];
    __syncthreads();
    for (int j = threadIdx.x; j < MOST; j += blockDim.x) {
        float sum = 0.0f;
        if (j < D)
            for (int g = 0; g < GROUP; g++) sum += fabsf(c.q[g][j]);
        c.order[j] = j < D ? order_of(sum) : 0;
        if (j >= r) c.chosen[j] = 0;
    }
    __syncthreads();
    for (int j = threadIdx.x; j < D; j += blockDim.x) {
        const u32 own = c.order[j];
        int before = 0;
#pragma unroll 4
        for (int i = 0; i < MOST; i += 4) {
            const uint4 other = *reinterpret_cast<const uint4*>(c.order + i);
            before += (other.x > own) + (other.y > own) + (other.z > own) + (other.w > own);
            before += (i < j && other.x == own) + (i + 1 < j && other.y == own) + (i + 2 < j && other.z == own) +
                      (i + 3 < j && other.w == own);
        }
        if (before < r) c.chosen[before] = j;
    }
    __syncthreads();
    for (int g = threadIdx.x / WARP; g < GROUP; g += blockDim.x / WARP) {
        float every = 0.0f, few = 0.0f;
        for (int j = lane_id(); j < D; j += WARP) every += fabsf(c.q[g][j]);
        for (int i = lane_id(); i < r; i += WARP) few += fabsf(c.q[g][c.chosen[i]]);
        every = sum_over(every), few = sum_over(few);
        if (lane_id() == 0) c.few[g] = few, c.every[g] = every;
        const float tau = sqrtf(float(D) * (few / (every < 1e-30f ? 1e-30f : every)));
        for (int i = lane_id(); i < MOST; i += WARP)
            c.factor[i][g] = i < r && tau > 0.0f ? c.q[g][c.chosen[i]] / tau : 0.0f;
    }
    __syncthreads();
    float few = 0.0f, every = 0.0f;
    for (int g = 0; g < GROUP; g++) few += c.few[g], every += c.every[g];
    return few / (every < 1e-30f ? 1e-30f : every);
}
