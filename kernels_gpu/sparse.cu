// SparQ's approximate scores (arXiv 2312.04985, step 1) from a copy of the keys that has their components apart.
// Macros: HEAD_DIM, GROUP, STORE (F32 or F16).
#define INTERLEAVED 0
#include "choice.cuh"
#include "components.cuh"
#include "rows.cuh"

constexpr int SPLIT = 4;                         // lanes, of a warp, that share a token's components
constexpr int SCORED = WARP / SPLIT * 8;         // tokens of a warp
constexpr int TILE = WARPS * SCORED;             // of a block; divides the tokens of a block of the index
constexpr int SETS = (GROUP + 7) / 8, HEADS = (GROUP + SETS - 1) / SETS;  // heads that see a number when it is read
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 750  // whose compiler keeps a few more registers for one head
constexpr int BLOCKS = GROUP > 8 ? 1 : GROUP > 2 ? 2 : 3;  // of a multiprocessor, at least
#else
constexpr int BLOCKS = GROUP > 8 ? 1 : GROUP > 2 ? 2 : 4;
#endif
constexpr int TOGETHER = 8 / ((STORE == F32 ? 2 : 1) * (HEADS > 4 ? 2 : 1));  // components on their way to a lane

// Eight sums become two, of all lanes that share the tokens.
DEVICE void join_components(float (&x)[8], float (&own)[2]) {
    const bool last = lane_id() & 16, odd = lane_id() & 8;
    float four[4];
#pragma unroll
    for (int i = 0; i < 4; i++) four[i] = (last ? x[i + 4] : x[i]) + __shfl_xor_sync(ALL, last ? x[i] : x[i + 4], 16);
#pragma unroll
    for (int i = 0; i < 2; i++)
        own[i] = (odd ? four[i + 2] : four[i]) + __shfl_xor_sync(ALL, odd ? four[i] : four[i + 2], 8);
}

// Known when this is compiled, if heads go together without a rest.
DEVICE bool is_head(int h) { return GROUP % HEADS == 0 || h < GROUP; }

// Scores SCORED tokens from `first` on, of which those before n count. runs: where component 0 has them.
DEVICE void score(const Choice& c, const u8* runs, int tokens, const Components& few, int r, int first, int n) {
    const Rows index{const_cast<u8*>(runs), nullptr, 0, 0};
    const int place = lane_id() % (WARP / SPLIT), at = first + 8 * place + lane_id() / (WARP / SPLIT) % 2 * 2 +
                                                       lane_id() / (WARP / SPLIT) / 2 * 4;
    float sums[2] = {0.0f, 0.0f};
#pragma unroll 1
    for (int set = 0; set < GROUP; set += HEADS) {
        float x[HEADS][8] = {};
        for (int i = lane_id() / (WARP / SPLIT); i < r; i += SPLIT * TOGETHER) {
            Eight<STORE> numbers[TOGETHER];
#pragma unroll
            for (int u = 0; u < TOGETHER; u++) {
                const int j = i + SPLIT * u;
                numbers[u] = {};
                if (j < r) numbers[u] = fetch<STORE, 8>(index, i64(few.chosen[j]) * (tokens / 8) + place, 0);
            }
#pragma unroll
            for (int u = 0; u < TOGETHER; u++) {
                float number[8];
                unpack(numbers[u], number);
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
                    if (!is_head(set + h)) continue;
                    const float factor = few.factor[i + SPLIT * u][set + h];
#pragma unroll
                    for (int t = 0; t < 8; t++) x[h][t] += factor * number[t];
                }
            }
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            if (!is_head(set + h)) continue;
            float own[2];
            join_components(x[h], own);
#pragma unroll
            for (int t = 0; t < 2; t++) {
                if (at + t >= n) own[t] = -INFINITE;
            }
            put<1, 8, 16>(c, set + h, at, own);
#pragma unroll
            for (int t = 0; t < 2; t++) sums[t] += own[t];
        }
    }
    if (c.sums) put_sums<1, 8, 16>(c, at, sums);
}

// index [B, H_kv, blocks, D, tokens]; q [B, H_q, D]; of sequence b the first stop[b] tokens.
KERNEL __launch_bounds__(THREADS, BLOCKS) approximate_top_k(
    const u8* index, int blocks, int tokens, const float* q, const int* stop, int r, int* done, CHOICE
) {
    __shared__ union {
        Components now;
        Chooser later;
    } shared;
    const int n = stop[blockIdx.z], tiles = (n + TILE - 1) / TILE, parts = min(int(gridDim.x), tiles);
    if (int(blockIdx.x) >= parts) return;
    const Choice c = CHOSEN;
    const float seen = choose_components(q + i64(kv_head_id()) * GROUP * D, r, shared.now);
    for (int tile = blockIdx.x; tile < tiles; tile += parts) {
        const int first = tile * TILE + threadIdx.x / WARP * SCORED;
        const i64 run = (i64(kv_head_id()) * blocks + first / tokens) * D * tokens + first % tokens;
        if (first < n) score(c, index + run * ROW_BYTES<STORE, 1>, tokens, shared.now, r, first, n);
    }
    choose(c, n, parts, done + kv_head_id(), shared.later, seen);
}
