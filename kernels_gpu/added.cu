// The values of chosen rows times their weights: FlexGen's step 2 (arXiv 2303.06865).
// Macros: HEAD_DIM, GROUP, V_STORE, V_ROTATED.
#include "rows.cuh"

constexpr int WARPS = 8, THREADS = WARPS * WARP;
constexpr int CHUNKS = (HEAD_DIM + 7) / 8, LANES = power_from(CHUNKS), READERS = THREADS / LANES;
constexpr int TOGETHER = V_STORE == F32 ? 2 : 4;                           // rows on their way to a lane
constexpr int SETS = (GROUP + 3) / 4, HEADS = (GROUP + SETS - 1) / SETS;  // heads of a block

// out [B, H_q, d] = sum over the first stop[b] of rows [B, H_kv, k] of weights [B, H_q, k] times values; rows that are
// none of n_slots are left out. Grid (SETS, H_kv, B).
KERNEL __launch_bounds__(THREADS) add_rows(
    u8* v_codes, u16* v_scales, i64 v_sequence, i64 v_head, const int* rows, const int* stop, int k, int n_slots,
    const float* weights, float* out
) {
    __shared__ float sums[WARPS][HEADS][HEAD_DIM], joined[HEADS][HEAD_DIM];
    const int b = blockIdx.z, first = blockIdx.x * HEADS, heads = min(HEADS, GROUP - first), n = min(stop[b], k);
    const i64 kv_head = i64(b) * gridDim.y + blockIdx.y, head = kv_head * GROUP + first;
    const Rows v{v_codes, v_scales, v_sequence, v_head};
    const i64 slot_0 = v.row(b, blockIdx.y, 0);
    const int chunk = threadIdx.x % LANES;
    rows += kv_head * k, weights += head * k;
    float sum[HEADS][8] = {};
    for (int i = threadIdx.x / LANES; i < n; i += READERS * TOGETHER) {
        Eight<V_STORE> values[TOGETHER];
        float weight[TOGETHER][HEADS];
#pragma unroll
        for (int u = 0; u < TOGETHER; u++) {
            const int at = i + u * READERS, slot = at < n ? rows[at] : -1;
            const bool read = u32(slot) < u32(n_slots) && chunk < CHUNKS;
            values[u] = {};
            if (read) values[u] = fetch<V_STORE, HEAD_DIM>(v, slot_0 + slot, chunk);
#pragma unroll
            for (int h = 0; h < HEADS; h++) weight[u][h] = read && h < heads ? weights[i64(h) * k + at] : 0.0f;
        }
#pragma unroll
        for (int u = 0; u < TOGETHER; u++) {
            float x[8];
            unpack(values[u], x);
#pragma unroll
            for (int h = 0; h < HEADS; h++)
#pragma unroll
                for (int j = 0; j < 8; j++) sum[h][j] += weight[u][h] * x[j];
        }
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
        for (int j = 0; j < 8; j++) {
#pragma unroll
            for (int step = LANES; step < WARP; step *= 2) sum[h][j] += __shfl_xor_sync(ALL, sum[h][j], step);
            const bool own = lane_id() < LANES && 8 * chunk + j < HEAD_DIM;
            if (own) sums[threadIdx.x / WARP][h][8 * chunk + j] = sum[h][j];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < HEADS * HEAD_DIM; i += THREADS) {
        float total = 0.0f;
        for (int warp = 0; warp < WARPS; warp++) total += (&sums[warp][0][0])[i];
        (&joined[0][0])[i] = total;
    }
    __syncthreads();
    if constexpr (V_ROTATED) rotate<HEAD_DIM>(&joined[0][0], HEADS);
    for (int i = threadIdx.x; i < heads * HEAD_DIM; i += THREADS) out[head * HEAD_DIM + i] = (&joined[0][0])[i];
}
