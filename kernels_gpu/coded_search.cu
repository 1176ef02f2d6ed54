// SparQ's approximate scores (arXiv 2312.04985, step 1) from a copy of the keys in 4 bits, and from the keys themselves
// where the copy ends. Macros: HEAD_DIM, GROUP, K_STORE, K_ROTATED.
#define INTERLEAVED 1
#include "components.cuh"
#include "row_scores.cuh"

constexpr int UNIT = 256;       // tokens that share a scale: a warp's
constexpr int WORDS = UNIT / 8;  // of a unit
constexpr int TOGETHER = 16;     // words on their way to a lane
constexpr float TINY = 1.0f / (1 << 24);  // a code in the last bits of a half

// Codes of a word as halves, which hold them in their last bits, some 16 times larger: no arithmetic but this is needed.
DEVICE void spread(u32 word, float (&code)[8]) {
#pragma unroll
    for (int byte = 0; byte < 2; byte++) {
        const u32 low = word >> 8 * byte & 0x000f000f, high = word >> 8 * byte & 0x00f000f0;
        code[2 * byte] = low_half(low), code[2 * byte + 4] = high_half(low);
        code[2 * byte + 1] = low_half(high), code[2 * byte + 5] = high_half(high);
    }
}

// Known when this is compiled, if heads go together without a rest.
DEVICE bool is_head(int h) { return GROUP % SEEN == 0 || h < GROUP; }

// Scores the unit that begins with token `first`. words, scales: where component 0 of it has them; tokens: of a block.
DEVICE void score_unit(
    const Choice& c, const u32* words, const u32* scales, int tokens, const Components& few, int r, int first
) {
    float sums[8] = {};
#pragma unroll 1
    for (int set = 0; set < GROUP; set += SEEN) {
        float x[SEEN][8] = {}, offset[SEEN] = {};
        for (int begin = 0; begin < r; begin += WARP) {
            // A lane knows the scale of a component.
            const int mine = begin + lane_id();
            const u32 its = mine < r ? scales[i64(few.chosen[mine]) * (tokens / UNIT)] : 0;
            const float scale = low_half(its) / TINY, least = high_half(its);
#pragma unroll
            for (int h = 0; h < SEEN; h++)
                if (is_head(set + h)) offset[h] += few.factor[mine][set + h] * least;
#pragma unroll 1
            for (int half = 0; half < WARP; half += TOGETHER) {
                u32 word[TOGETHER];
#pragma unroll
                for (int u = 0; u < TOGETHER; u++) {
                    const int i = begin + half + u;
                    word[u] = i < r ? words[i64(few.chosen[i]) * (tokens / 8) + lane_id()] : 0;
                }
#pragma unroll
                for (int u = 0; u < TOGETHER; u++) {
                    const float of_code = __shfl_sync(ALL, scale, half + u);
                    float code[8];
                    spread(word[u], code);
#pragma unroll
                    for (int h = 0; h < SEEN; h++) {
                        if (!is_head(set + h)) continue;
                        const float factor = few.factor[begin + half + u][set + h] * of_code;
#pragma unroll
                        for (int t = 0; t < 8; t++) x[h][t] += factor * code[t];
                    }
                }
            }
        }
#pragma unroll
        for (int h = 0; h < SEEN; h++) {
            if (!is_head(set + h)) continue;
            const float least = sum_over(offset[h]);
#pragma unroll
            for (int t = 0; t < 8; t++) x[h][t] = least + (t % 2 ? 0.0625f : 1.0f) * x[h][t];
            put<1>(c, set + h, first + 8 * lane_id(), x[h]);
#pragma unroll
            for (int t = 0; t < 8; t++) sums[t] += x[h][t];
        }
    }
    if (c.sums) put_sums<1>(c, first + 8 * lane_id(), sums);
}

// The queries, which score_unit does not read, become what whole rows are multiplied with: factors, and 0 of other
// components. All threads of a block call; ends with a barrier.
DEVICE void spread_factors(Components& few, int r) {
    for (int i = threadIdx.x; i < GROUP * D; i += THREADS) few.q[i / D][i % D] = 0.0f;
    __syncthreads();
    for (int i = threadIdx.x; i < GROUP * r; i += THREADS)
        few.q[i / r][few.chosen[i % r]] = few.factor[i % r][i / r];
    __syncthreads();
    rotate_queries(&few.q[0][0]);
}

// codes [B, H_kv, blocks, D, tokens / 8], scales [B, H_kv, blocks, D, tokens / UNIT] of pairs, k: see minirt.ops.
// Of sequence b the first stop[b] tokens; of those that fill no unit, or of all if there are no codes, the rows are read.
KERNEL __launch_bounds__(THREADS, GROUP > 2 ? 2 : 3) approximate_top_k(
    const u32* codes, const u32* scales, int blocks, int tokens, u8* k_codes, u16* k_scales, i64 k_sequence, i64 k_head,
    const float* q, const int* stop, int r, int* done, CHOICE
) {
    __shared__ union {
        struct {
            Components few;
            float scores[SEEN * THREADS];
        } now;
        Chooser later;
    } shared;
    static_assert(UNIT == THREADS);
    const int n = stop[blockIdx.z], units = blocks > 0 ? n / UNIT : 0, whole = (units + WARPS - 1) / WARPS;
    const int tiles = whole + (n - units * UNIT + THREADS - 1) / THREADS, parts = min(int(gridDim.x), tiles);
    if (int(blockIdx.x) >= parts) return;
    const Choice c = CHOSEN;
    Components& few = shared.now.few;
    const float seen = choose_components(q + i64(kv_head_id()) * GROUP * D, r, few);
    int tile = blockIdx.x;
    for (; tile < whole; tile += parts) {
        const int unit = tile * WARPS + threadIdx.x / WARP, per_block = tokens / UNIT;
        const i64 block = i64(kv_head_id()) * blocks + unit / per_block;
        const i64 run = block * D * per_block + unit % per_block;
        if (unit < units) score_unit(c, codes + run * WORDS, scales + run, tokens, few, r, unit * UNIT);
    }
    if (tile < tiles) spread_factors(few, r);
    for (const Rows keys{k_codes, k_scales, k_sequence, k_head}; tile < tiles; tile += parts) {
        const int first = units * UNIT + (tile - whole) * THREADS;
        const i64 row = keys.row(blockIdx.z, blockIdx.y, first);
        score_tile<!K_ROTATED>(c, keys, row, first, min(THREADS, n - first), &few.q[0][0], shared.now.scores);
    }
    choose(c, n, parts, done + kv_head_id(), shared.later, seen);
}
