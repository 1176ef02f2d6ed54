// The mean of values as they lie in a cache.
// Macros: HEAD_DIM, V_STORE, V_ROTATED.
#include "rows.cuh"

constexpr int THREADS = 512;
constexpr int CHUNKS = (HEAD_DIM + 7) / 8, LANES = power_from(CHUNKS), READERS = THREADS / LANES;

// mean [B, H_kv, d] of sequence seq becomes that of its first n rows, 0 if there are none. Grid (H_kv).
KERNEL __launch_bounds__(THREADS) mean_rows(
    u8* v_codes, u16* v_scales, i64 v_sequence, i64 v_head, int seq, int n, float* mean
) {
    __shared__ float sums[THREADS / WARP][HEAD_DIM], x[HEAD_DIM];
    const Rows v{v_codes, v_scales, v_sequence, v_head};
    const i64 first = v.row(seq, blockIdx.x, 0);
    const int chunk = threadIdx.x % LANES;
    float sum[8] = {};
#pragma unroll 4
    for (int i = threadIdx.x / LANES; i < n; i += READERS) {
        float row[8];
        if (chunk >= CHUNKS) continue;
        load8<V_STORE, HEAD_DIM>(v, first + i, chunk, row);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += row[j];
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int step = LANES; step < WARP; step *= 2) sum[j] += __shfl_xor_sync(ALL, sum[j], step);
        if (lane_id() < LANES && 8 * chunk + j < HEAD_DIM) sums[threadIdx.x / WARP][8 * chunk + j] = sum[j];
    }
    __syncthreads();
    for (int j = threadIdx.x; j < HEAD_DIM; j += THREADS) {
        float total = 0.0f;
        for (int warp = 0; warp < THREADS / WARP; warp++) total += sums[warp][j];
        x[j] = total / float(max(n, 1));
    }
    __syncthreads();
    if constexpr (V_ROTATED) rotate<HEAD_DIM>(x);
    for (int j = threadIdx.x; j < HEAD_DIM; j += THREADS) mean[(i64(seq) * gridDim.x + blockIdx.x) * HEAD_DIM + j] = x[j];
}
