// Logits of a run of cached keys, read as rows.
// Macros: HEAD_DIM, GROUP, K_STORE, K_ROTATED.
#pragma once
#include "choice.cuh"
#include "rows.cuh"

constexpr int CHUNKS = (HEAD_DIM + 7) / 8, PADDED = 8 * CHUNKS;  // of eight numbers, in a row
constexpr int LANES = power_from(CHUNKS);                        // that read a row
constexpr int READERS = THREADS / LANES;                         // rows that are read side by side
constexpr int ASKED = K_STORE == F32 || GROUP == 7 ? 2 : 4;      // rows on their way to a lane, for which it has registers
constexpr int SETS = (GROUP + 3) / 4, SEEN = (GROUP + SETS - 1) / SETS;  // heads that see a row when it is read

// Queries [GROUP, HEAD_DIM] in shared memory as stored keys want them. All threads of a block call; ends with a barrier.
DEVICE void rotate_queries(float* q) {
    if constexpr (K_ROTATED) rotate<HEAD_DIM>(q, GROUP);
    else __syncthreads();
}

// scores [SEEN, THREADS] = products of queries [SEEN, HEAD_DIM] from q on, both in shared memory, and n <= THREADS rows of
// k from `first` on. SPARSE: where a query is 0, keys are left out, whatever they are.
template <bool SPARSE>
DEVICE void score_rows(const Rows& k, i64 first, int n, const float* q, int heads, float* scores) {
    const int chunk = threadIdx.x % LANES, own = threadIdx.x / LANES;
    float query[SEEN][8];
#pragma unroll
    for (int h = 0; h < SEEN; h++)
#pragma unroll
        for (int j = 0; j < 8; j++)
            query[h][j] = h < heads && 8 * chunk + j < HEAD_DIM ? q[h * HEAD_DIM + 8 * chunk + j] : 0.0f;
    for (int i = own; i - own < n; i += READERS * ASKED) {
        Eight<K_STORE> keys[ASKED];
#pragma unroll
        for (int u = 0; u < ASKED; u++) {
            keys[u] = {};
            const int row = i + u * READERS;
            if (row < n && chunk < CHUNKS) keys[u] = fetch<K_STORE, HEAD_DIM>(k, first + row, chunk);
        }
#pragma unroll
        for (int u = 0; u < ASKED; u++) {
            float x[8];
            unpack(keys[u], x);
#pragma unroll
            for (int h = 0; h < SEEN; h++) {
                float product = 0.0f;
#pragma unroll
                for (int j = 0; j < 8; j++)
                    product += SPARSE && query[h][j] == 0.0f ? 0.0f : query[h][j] * x[j];
                product = sum_over<LANES>(product);
                if (chunk == 0 && i + u * READERS < n) scores[h * THREADS + i + u * READERS] = product;
            }
        }
    }
}

// Scores THREADS tokens from `first` on, of which n count; their rows begin with `row`. All threads of a block call.
template <bool SPARSE>
DEVICE void score_tile(const Choice& c, const Rows& k, i64 row, int first, int n, const float* q, float* scores) {
    const int at = first + threadIdx.x, place = token_at(at) - first;
    float sum[1] = {0.0f};
#pragma unroll 1
    for (int set = 0; set < GROUP; set += SEEN) {
        const int heads = min(SEEN, GROUP - set);
        score_rows<SPARSE>(k, row, n, q + set * HEAD_DIM, heads, scores);
        __syncthreads();
        for (int h = 0; h < heads; h++) {
            float x[1] = {place < n ? scores[h * THREADS + place] : -INFINITE};
            put<1, 2, 4, 8>(c, set + h, at, x);
            sum[0] += x[0];
        }
        __syncthreads();
    }
    if (c.sums) put_sums<1, 2, 4, 8>(c, at, sum);
}
