// Attention to rows by float arithmetic: any store, any card. A few lanes read a row, eight numbers each; a warp serves
// a few query heads, and where a group has more, several warps read the same rows at the same time.
#pragma once
#include "cached.cuh"

constexpr int WARPS = 8, THREADS = WARPS * WARP, BLOCKS = 2;  // blocks of a multiprocessor, at least
constexpr int LANES = power_from(CHUNKS);  // that read a row
constexpr int SETS = power_from((GROUP + 3) / 4), HEADS = (GROUP + SETS - 1) / SETS;  // sets of heads, heads of a warp
constexpr int BLOCK_SETS = SETS < WARPS ? SETS : WARPS, BLOCK_HEADS = BLOCK_SETS * HEADS;
constexpr int READERS = WARPS / BLOCK_SETS * (WARP / LANES);         // rows that are read side by side
// Rows on their way to a lane: fewer where they are wide, or where the scores of many heads are written beside.
constexpr int TOGETHER = (SCORES && HEADS > 2 ? 2 : 4) / (K_STORE == F32 || V_STORE == F32 ? 2 : 1);
constexpr int READ = READERS * TOGETHER;

// What a lane knows of the softmax of its heads, over the rows that it has read, and of eight sums of each.
struct Reader {
    float q[HEADS][8], high[HEADS], total[HEADS], sum[HEADS][8];

    DEVICE int chunk() const { return lane_id() % LANES; }
    DEVICE int set() const { return threadIdx.x / WARP % BLOCK_SETS; }

    DEVICE void begin() {
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            high[h] = LOWEST, total[h] = 0.0f;
#pragma unroll
            for (int j = 0; j < 8; j++) sum[h][j] = 0.0f;
        }
    }

    // What is read from here on goes with these queries [BLOCK_HEADS, PADDED] in shared memory.
    DEVICE void ask(const float* queries) {
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            const float* from = queries + (set() * HEADS + h) * PADDED + 8 * chunk();
#pragma unroll
            for (int j = 0; j < 8; j++) q[h][j] = chunk() < CHUNKS ? from[j] : 0.0f;
        }
    }

    // Rows begin ... end - 1. All threads of a block call.
    template <class Slots>
    DEVICE void read(const Cached& cached, const Slots& slots, int begin, int end) {
        const int own = threadIdx.x / WARP / BLOCK_SETS * (WARP / LANES) + lane_id() / LANES;
        for (int i = begin + own; i - own < end; i += READ) {
            Eight<K_STORE> keys[TOGETHER];
            Eight<V_STORE> values[TOGETHER];
            int slot[TOGETHER];
#pragma unroll
            for (int u = 0; u < TOGETHER; u++) slot[u] = i + u * READERS < end ? slots.slot(i + u * READERS) : -1;
#pragma unroll
            for (int u = 0; u < TOGETHER; u++) {
                keys[u] = {}, values[u] = {};
                if (slot[u] < 0 || chunk() >= CHUNKS) continue;
                keys[u] = cached.key(slot[u], chunk());
                values[u] = cached.value(slot[u], chunk());
            }
            float score[TOGETHER][HEADS];
#pragma unroll
            for (int u = 0; u < TOGETHER; u++) scores_of(cached, keys[u], slot[u], score[u]);
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                float highest = high[h];
#pragma unroll
                for (int u = 0; u < TOGETHER; u++) highest = fmaxf(highest, score[u][h]);
                raise(h, highest);
            }
#pragma unroll
            for (int u = 0; u < TOGETHER; u++) {
                float x[8];
                unpack(values[u], x);
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
                    const float weight = power_of_2(score[u][h] - high[h]);
                    total[h] += weight;
#pragma unroll
                    for (int j = 0; j < 8; j++) sum[h][j] += weight * x[j];
                }
            }
        }
    }

    // Sums of the heads of a block [WARPS / BLOCK_SETS, BLOCK_HEADS, PADDED], each with its highest score and the sum
    // of its weights.
    DEVICE void deposit(float* sums, float2* ends) {
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
#pragma unroll
            for (int step = LANES; step < WARP; step *= 2) {
                raise(h, fmaxf(high[h], __shfl_xor_sync(ALL, high[h], step)));
                total[h] += __shfl_xor_sync(ALL, total[h], step);
#pragma unroll
                for (int j = 0; j < 8; j++) sum[h][j] += __shfl_xor_sync(ALL, sum[h][j], step);
            }
            const int row = threadIdx.x / WARP * HEADS + h;
            if (lane_id() == 0) ends[row] = make_float2(high[h], total[h]);
            if (lane_id() >= CHUNKS) continue;
#pragma unroll
            for (int j = 0; j < 8; j++) sums[row * PADDED + 8 * lane_id() + j] = sum[h][j];
        }
    }

  private:
    DEVICE void scores_of(const Cached& cached, const Eight<K_STORE>& key, int slot, float (&score)[HEADS]) {
        float x[8];
        unpack(key, x);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float product = 0.0f;
#pragma unroll
            for (int j = 0; j < 8; j++) product += q[h][j] * x[j];
            product = sum_over<LANES>(product);
            score[h] = slot < 0 ? -INFINITE : product;
            const int head = set() * HEADS + h;
            if (SCORES && slot >= 0 && chunk() == 0 && head < cached.heads)
                cached.scores[i64(head) * cached.slots + slot] = product;
        }
    }

    // Weights are relative to this score from here on.
    DEVICE void raise(int h, float highest) {
        const float factor = power_of_2(high[h] - highest);
        high[h] = highest, total[h] *= factor;
#pragma unroll
        for (int j = 0; j < 8; j++) sum[h][j] *= factor;
    }
};
