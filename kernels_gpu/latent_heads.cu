// What is done to latents beside the cache: products taken apart, sums of values rebuilt, scores of a group's heads.
#include "common.cuh"

// Products [N, stride], in which r numbers of each of G groups begin at `first`: latents [N, G, r], or with the tokens'
// true positions [N, G, r + 1]. Grid (N, G).
KERNEL take_latents(const float* products, i64 stride, int first, int rank, const int* pos, float* latents) {
    const int i = blockIdx.x, g = blockIdx.y, width = rank + (pos ? 1 : 0);
    const float* from = products + i * stride + first + g * rank;
    float* to = latents + (i64(i) * gridDim.y + g) * width;
    for (int j = threadIdx.x; j < width; j += blockDim.x) to[j] = j < rank ? from[j] : float(pos[i]);
}

// sums [G, n] += the mean over a group's KV heads of those of each [H_kv, n]. Grid (n / threads rounded up, G).
KERNEL average_heads(const float* of_heads, int heads, int n, float* sums, i64 row) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, g = blockIdx.y;
    if (i >= n) return;
    float sum = 0.0f;
    for (int h = 0; h < heads; h++) sum += of_heads[(i64(g) * heads + h) * n + i];
    sums[g * row + i] += sum / float(heads);
}

#ifdef HEAD_DIM
constexpr int UNIT = 32, COLUMNS = (HEAD_DIM + 7) / 8;

// out [B, H_q, d] = weighted sums x [B, H_q, blocks UNIT] of latents through the factor of values (see factors.py), and
// their bias; 0 where totals [B, H_q] tell of no weight. A warp has eight numbers of a KV head, for its GROUP query
// heads. Grid (COLUMNS / warps rounded up, H_kv, B).
KERNEL rebuild_sums(
    const float* x, const float2* totals, const uint4* values, int blocks, float power, const float* bias, float* out
) {
    const int column = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, h = blockIdx.y, lane = lane_id();
    if (column >= COLUMNS) return;
    const i64 query = (i64(blockIdx.z) * gridDim.y + h) * GROUP;
    const uint4* row = values + (i64(h) * COLUMNS + column) * blocks * WARP + lane;
    const float2* from = reinterpret_cast<const float2*>(x + query * blocks * UNIT) + lane % 4;
    float sums[GROUP] = {};
#pragma unroll 4
    for (int block = 0; block < blocks; block++) {
        const uint4 four = row[block * WARP];
        const u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float a = low_half(words[i]), b = high_half(words[i]);
#pragma unroll
            for (int q = 0; q < GROUP; q++) {
                const float2 y = from[(q * blocks + block) * (UNIT / 2) + 4 * i];
                sums[q] += a * y.x + b * y.y;
            }
        }
    }
    const int number = 8 * column + lane / 4;
#pragma unroll
    for (int q = 0; q < GROUP; q++) {
        const float sum = sum_over<4>(sums[q]) * power;
        if (lane % 4 || number >= HEAD_DIM) continue;
        const float value = sum + (bias ? bias[h * 8 * COLUMNS + number] : 0.0f);
        out[(query + q) * HEAD_DIM + number] = totals[query + q].y == 0.0f ? 0.0f : value;
    }
}
#endif
