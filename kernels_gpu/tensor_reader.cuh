// Attention to rows of at most 128 numbers on tensor cores: for groups of query heads, and for codes. A warp serves up
// to 8 query heads. It scores 8 rows at a time, queries times keys; lane 4 g + t then has scores of head g, just where
// the next product, values times weights, wants those of its 16 rows. Rows go from memory to registers: which of their
// numbers stands where in a tile does not matter, as long as both sides agree, so that lanes read 8 neighbours each.
//
// Queries and weights are split into a half and what it leaves over, so that nothing is lost. Codes are exact as
// halves: a key's scale multiplies sums of its block's products; a value's its codes, which rounds them to halves.
#pragma once
#include "cached.cuh"
#include "instructions.cuh"
#include "mma.cuh"

constexpr int WARPS = 4, THREADS = WARPS * WARP;
constexpr int SETS = power_from((GROUP + 7) / 8), HEADS = (GROUP + SETS - 1) / SETS;  // sets of heads, heads of a warp
constexpr int BLOCK_SETS = SETS < WARPS ? SETS : WARPS, BLOCK_HEADS = BLOCK_SETS * HEADS;
constexpr bool SMALL = K_STORE == Q4_0 && V_STORE == Q4_0;
constexpr int TILES = D > 64 ? 1 : SMALL ? 4 : 2;  // of 16 rows, on their way to a warp
constexpr int FITTING = 4 < HEADS && HEADS < 8 ? 2 : 3;  // that take more registers than 4 or 8 heads
constexpr int BLOCKS = !SMALL ? FITTING : D > 64 ? 4 : 2;  // of a multiprocessor, at least
constexpr int READ = WARPS / BLOCK_SETS * 16 * TILES;
constexpr int K_PARTS = (D + 31) / 32, V_PARTS = (D + 63) / 64;  // of a row, to which each lane of it has 8 numbers
constexpr float LIFT = 10.0f;  // weights reach to 2^10: small ones are farther from where halves end

// Which of eight numbers is the lower or upper half of a pair.
template <int STORE>
DEVICE constexpr int place(int pair, int half) {
    return STORE == Q4_0 ? pair + 4 * half : 2 * pair + half;
}

// Eight numbers, or codes without their scale, as pairs of halves. 0x6400 + i is 1024 + i.
DEVICE void codes_of(const Eight<F16>& from, u32 (&pairs)[4]) {
    pairs[0] = from.words.x, pairs[1] = from.words.y, pairs[2] = from.words.z, pairs[3] = from.words.w;
}

DEVICE void codes_of(const Eight<Q8_0>& from, u32 (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 bytes = (i < 2 ? from.words.x : from.words.y) ^ 0x80808080;
        pairs[i] = minus(__byte_perm(bytes, 0x64646464, i % 2 ? 0x4342 : 0x4140), 0x64806480);
    }
}

DEVICE void codes_of(const Eight<Q4_0>& from, u32 (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[i] = minus((from.word >> 4 * i & 0x000f000f) | 0x64006400, 0x64086408);
}

template <int STORE>
DEVICE void halves_of(const Eight<STORE>& from, u32 (&pairs)[4]) {
    codes_of(from, pairs);
    if constexpr (STORE != F16) {
#pragma unroll
        for (int i = 0; i < 4; i++) pairs[i] = times(pairs[i], from.scale * 0x10001u);
    }
}

// The scale that lanes 4 g ... 4 g + 3 have.
template <int STORE>
DEVICE float scale_of(const Eight<STORE>& from, int g) {
    if constexpr (STORE == F16) return 1.0f;
    else return to_float(u16(__shfl_sync(ALL, int(from.scale), 4 * g)));
}

// What lane 4 g + t knows: the query of head g and its softmax, over the rows that its warp has read; of heads 2 t and
// 2 t + 1 sums of some numbers.
struct Reader {
    u32 q[K_PARTS][2][4];  // as multiply_tiles takes them: halves are its rows 0 ... 7, what they leave over the others
    float power, high, total, sum[V_PARTS][4][4];

    DEVICE static int set() { return threadIdx.x / WARP % BLOCK_SETS; }

    DEVICE void begin() {
        high = LOWEST, total = 0.0f;
#pragma unroll
        for (int i = 0; i < 16 * V_PARTS; i++) sum[i / 16][i / 4 % 4][i % 4] = 0.0f;
    }

    // What is read from here on goes with these queries [BLOCK_HEADS, PADDED] in shared memory.
    DEVICE void ask(const float* queries) {
        const int g = lane_id() / 4, t = lane_id() % 4;
        const float* from = queries + (set() * HEADS + g) * PADDED;
        float x[K_PARTS][8], most = 0.0f;
#pragma unroll
        for (int part = 0; part < K_PARTS; part++) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int chunk = 4 * part + t;
                x[part][j] = g < HEADS && chunk < CHUNKS ? from[8 * chunk + j] : 0.0f;
                most = fmaxf(most, fabsf(x[part][j]));
            }
        }
        most = max_over<4>(most);
        power = 1e-30f < most && most < INFINITE ? exp2f(floorf(log2f(most))) : 1.0f;
        const float inverse = 1.0f / power;
#pragma unroll
        for (int part = 0; part < K_PARTS; part++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float a = x[part][place<K_STORE>(i, 0)] * inverse, b = x[part][place<K_STORE>(i, 1)] * inverse;
                const u32 halves = two_halves(a, b);
                q[part][i / 2][i % 2 * 2] = halves;
                q[part][i / 2][i % 2 * 2 + 1] = two_halves(a - low_half(halves), b - high_half(halves));
            }
        }
    }

    // Rows begin ... end - 1. All threads of a block call.
    template <class Slots>
    DEVICE void read(const Cached& cached, const Slots& slots, int begin, int end) {
        const int g = lane_id() / 4, t = lane_id() % 4, own = threadIdx.x / WARP / BLOCK_SETS * 16 * TILES;
#pragma unroll 1
        for (int at = begin + own; at < end; at += READ) {
            Keys keys[2 * TILES];
            Values values[TILES];
#pragma unroll
            for (int u = 0; u < 2 * TILES; u++) {
                const int row = at + 8 * u + g, slot = row < end ? slots.slot(row) : -1;
#pragma unroll
                for (int part = 0; part < K_PARTS; part++) {
                    keys[u][part] = {};
                    if (slot >= 0 && 4 * part + t < CHUNKS) keys[u][part] = cached.key(slot, 4 * part + t);
                }
            }
#pragma unroll
            for (int i = 0; i < 4 * TILES; i++) {
                const int row = at + 8 * (i / 2) + 2 * t + i % 2, slot = row < end ? slots.slot(row) : -1;
#pragma unroll
                for (int part = 0; part < V_PARTS; part++) {
                    Eight<V_STORE>& value = values[i / 4][i % 4][part];
                    value = {};
                    if (slot >= 0 && 8 * part + g < CHUNKS) value = cached.value(slot, 8 * part + g);
                }
            }
            float score[2 * TILES][2];  // of row 8 u + 2 t + i
#pragma unroll
            for (int u = 0; u < 2 * TILES; u++) {
                score_rows(keys[u], score[u]);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int row = at + 8 * u + 2 * t + i, slot = row < end ? slots.slot(row) : -1;
                    const int head = set() * HEADS + g;
                    if (slot < 0) score[u][i] = -INFINITE;
                    else if (SCORES && g < HEADS && head < cached.heads)
                        cached.scores[i64(head) * cached.slots + slot] = score[u][i];
                }
            }
            raise(score);
#pragma unroll
            for (int u = 0; u < TILES; u++) add(values[u], score[2 * u], score[2 * u + 1]);
        }
    }

    // Sums of the heads of a block [WARPS / BLOCK_SETS, BLOCK_HEADS, PADDED], each with its highest score and the sum
    // of its weights.
    DEVICE void deposit(float* sums, float2* ends) {
        const int g = lane_id() / 4, t = lane_id() % 4, first = threadIdx.x / WARP * HEADS;
        total = sum_over<4>(total);
        if (t == 0 && g < HEADS) ends[first + g] = make_float2(high - LIFT, total);
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int part = 0; part < V_PARTS; part++) {
                if (2 * t + i >= HEADS || 8 * part + g >= CHUNKS) continue;
                float* to = sums + (first + 2 * t + i) * PADDED + 8 * (8 * part + g);
#pragma unroll
                for (int j = 0; j < 8; j++) to[place<V_STORE>(j / 2, j % 2)] = sum[part][j / 2][2 * (j % 2) + i];
            }
        }
    }

  private:
    using Keys = Eight<K_STORE>[K_PARTS];      // of a row of 8, as a lane has them
    using Values = Eight<V_STORE>[4][V_PARTS];  // of four rows of 16

    DEVICE void score_rows(const Keys& keys, float (&score)[2]) {
        const int t = lane_id() % 4;
        score[0] = score[1] = 0.0f;
#pragma unroll
        for (int part = 0; part < K_PARTS; part++) {
            u32 x[4];
            codes_of(keys[part], x);
            float product[4] = {};  // of few numbers: long sums of tensor cores drift
            multiply_tiles(product, q[part][0], {x[0], x[1]});
            multiply_tiles(product, q[part][1], {x[2], x[3]});
            score[0] += scale_of(keys[part], 2 * t) * (product[0] + product[2]);
            score[1] += scale_of(keys[part], 2 * t + 1) * (product[1] + product[3]);
        }
        score[0] *= power, score[1] *= power;
    }

    // Weights are relative to the highest of all scores from here on.
    DEVICE void raise(const float (&score)[2 * TILES][2]) {
        float highest = high;
#pragma unroll
        for (int u = 0; u < 2 * TILES; u++) highest = fmaxf(highest, fmaxf(score[u][0], score[u][1]));
        highest = max_over<4>(highest);
        const float less = power_of_2(high - highest);
        high = highest;
        if (!__any_sync(ALL, less != 1.0f)) return;
        total *= less;
        const float first = __shfl_sync(ALL, less, 8 * (lane_id() % 4));
        const float second = __shfl_sync(ALL, less, 8 * (lane_id() % 4) + 4);
#pragma unroll
        for (int i = 0; i < 16 * V_PARTS; i++) sum[i / 16][i / 4 % 4][i % 4] *= i % 2 ? second : first;
    }

    DEVICE void add(const Values& values, const float (&low)[2], const float (&high_rows)[2]) {
        u32 weights[2], left[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float(&score)[2] = i ? high_rows : low;
            const float a = power_of_2(score[0] - high + LIFT), b = power_of_2(score[1] - high + LIFT);
            total += a + b;
            weights[i] = two_halves(a, b);
            left[i] = two_halves(a - low_half(weights[i]), b - high_half(weights[i]));
        }
#pragma unroll
        for (int part = 0; part < V_PARTS; part++) {
            u32 x[4][4];
#pragma unroll
            for (int row = 0; row < 4; row++) halves_of(values[row][part], x[row]);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 a[4] = {
                    __byte_perm(x[0][i], x[1][i], 0x5410), __byte_perm(x[0][i], x[1][i], 0x7632),
                    __byte_perm(x[2][i], x[3][i], 0x5410), __byte_perm(x[2][i], x[3][i], 0x7632)};
                multiply_tiles(sum[part][i], a, weights);
                multiply_tiles(sum[part][i], a, left);
            }
        }
    }
};
